"""sample.py end to end on a run folder of random networks: pictures, seeds, PNG text, bad input."""
import hashlib
import json
import re
import shutil
import subprocess
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import randomise, script
from PIL import Image
from safetensors.torch import save_file

import kernels
import sample
from ladd.cli import InputError
from ladd.config import Config, to_json
from ladd.core.mmdit import MMDiT, MMDiTConfig, image_channels
from ladd.core.sampler import Recipe, read_recipe
from ladd.data import masks
from ladd.engine.run import versions
from ladd.report.sheets import contact_sheet, save_png, to_pil
from ladd.sd3 import encoders
from ladd.sd3.checkpoint import load_metadata, load_mmdit, save_mmdit
from ladd.toy import captions, edits
from ladd.toy.scenes import decode, encode, render, sample_scenes

RED, BLUE = "large red circle left on black", "small blue cross"
CONFIG = Config(name="demo", depth=2, width=64, taps=(0, 1), shift=3.0, guidance=2.0,
                sample_steps=6, sampler="euler", sizes=("64x64", "48x80", "80x48"))
TASKS = {task: replace(CONFIG, name=task, task=task, image_guidance=1.5 if task == "edit" else 1.0)
         for task in ("edit", "inpaint")}
CROSS = "turn it into a cross"
# {1, .5}, {1, .75, .5, .25} shifted by 3
LEVELS = {1: [1, 0], 2: [1, .75, 0], 4: [1, .9, .75, .5, 0]}


def describe(config: Config, role: str) -> dict[str, str]:
    return config.recipe.metadata(role, config.real)


def network(seed: int, **changes) -> MMDiT:
    torch.manual_seed(seed)
    sizes = dict(depth=2, width=64, context_dim=64, pooled_dim=64, qk_norm=True, pos_grid=8)
    return randomise(MMDiT(MMDiTConfig(**{**sizes, **changes}), kernels.load("torch")), seed)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "demo"
    for seed, role in enumerate(("student", "teacher")):
        save_mmdit(network(seed), folder / "checkpoints" / f"{role}.safetensors",
                   describe(CONFIG, role))
    (folder / "config.json").write_text(to_json(CONFIG))
    return folder


@pytest.fixture(scope="module")
def task_runs(tmp_path_factory) -> dict[str, Path]:
    """A run folder of each task that reads a picture."""
    folder = tmp_path_factory.mktemp("tasks")
    for task, config in TASKS.items():
        for seed, role in enumerate(("student", "teacher")):
            model = network(seed, in_channels=16 + image_channels(task))
            save_mmdit(model, folder / task / "checkpoints" / f"{role}.safetensors",
                       describe(config, role))
        (folder / task / "config.json").write_text(to_json(config))
    return {task: folder / task for task in TASKS}


@pytest.fixture(autouse=True)
def fp32(monkeypatch):
    monkeypatch.setattr(sample, "compute_dtype", lambda precision, device: torch.float32)


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)                  # [H, W, 3]


def text(path: Path) -> tuple[str, dict]:
    chunks = Image.open(path).text
    assert set(chunks) == {"parameters", "ladd"}
    return chunks["parameters"], json.loads(chunks["ladd"])


def shoot(run: Path, out: Path, *flags: str, prompt: str = RED,
          instruction: str | None = None) -> np.ndarray:
    said = ["--prompt", prompt] if instruction is None else ["--instruction", instruction]
    sample.main(["--run", str(run), *said, "--out", str(out), *flags])
    return pixels(out)


def naive(path: Path, prompt: str, seed: int, sigmas: list[float], guidance: float = 1.0,
          size: tuple[int, int] = (64, 64), init: torch.Tensor | None = None,
          image: torch.Tensor | None = None, image_guidance: float = 1.0) -> np.ndarray:
    """The picture by Euler steps written out, one image at a time; from latents `init` noised to
    the first level, with channels `image` beside x."""
    model = load_mmdit(path)
    x = torch.randn(1, 16, size[0] // 8, size[1] // 8,
                    generator=torch.Generator().manual_seed(seed))
    x = x if init is None else (1 - sigmas[0]) * init + sigmas[0] * x
    edit = image is not None and image.shape[1] == 16
    spell, length = (edits.embed, 8) if edit else (captions.embed, 6)
    words, null = (spell([p], length, 64) for p in (prompt, ""))
    with torch.no_grad():
        for now, then in zip(sigmas, sigmas[1:]):
            ask = lambda text, image=image: model(x, torch.tensor([now]), *text[:2], image)
            v = ask(words)
            if (guidance, image_guidance) != (1, 1):
                v_null, v_none = ask(null), 0 if image is None else ask(null, 0 * image)
                v = v_none + image_guidance * (v_null - v_none) + guidance * (v - v_null)
            x = x + (then - now) * v
    return ((decode(x)[0] + 1) * 127.5).round().int().permute(1, 2, 0).numpy()


def assert_same(a: np.ndarray, b: np.ndarray, levels: int = 1) -> None:
    assert a.shape == b.shape and np.abs(a - b).max() <= levels, np.abs(a - b).max()


def differ(a: np.ndarray, b: np.ndarray) -> bool:
    return np.abs(a - b).mean() > 2


# pictures


@pytest.mark.parametrize("steps", LEVELS)
def test_a_students_picture_is_euler_over_its_shifted_levels(run, tmp_path, steps):
    image = shoot(run, tmp_path / "a.png", "--steps", str(steps), "--seed", "7")
    assert_same(image, naive(run / "checkpoints/student.safetensors", RED, 7, LEVELS[steps]))
    parameters, record = text(tmp_path / "a.png")
    assert record["columns"][0]["sigmas"] == pytest.approx(LEVELS[steps], abs=1e-6)
    assert f"Steps: {steps}," in parameters


def test_steps_are_all_levels_by_default(run, tmp_path):
    assert (shoot(run, tmp_path / "a.png") == shoot(run, tmp_path / "b.png", "--steps", "4")).all()


def test_a_teachers_picture_is_guided_as_in_its_run(run, tmp_path):
    teacher = run / "checkpoints/teacher.safetensors"
    image = shoot(run, tmp_path / "a.png", "--model", "teacher")
    even = [1 - i / 6 for i in range(7)]
    assert_same(image, naive(teacher, RED, 0, [3 * s / (1 + 2 * s) for s in even], guidance=2.0))
    assert "Steps: 6, Sampler: Euler, CFG scale: 2," in text(tmp_path / "a.png")[0]
    flags = "--model", "teacher", "--steps", "3", "--guidance"
    plain = shoot(run, tmp_path / "b.png", *flags, "1")
    assert_same(plain, naive(teacher, RED, 0, [1, 6 / 7, .6, 0]))
    assert differ(plain, shoot(run, tmp_path / "c.png", *flags, "4"))


def test_sigmas_are_final_and_untrained_ones_are_announced(run, tmp_path, capsys):
    two = shoot(run, tmp_path / "a.png", "--steps", "2")
    assert (shoot(run, tmp_path / "b.png", "--sigmas", "1,0.75") == two).all()
    assert (shoot(run, tmp_path / "c.png", "--sigmas", "1,.75,0") == two).all()
    assert "note" not in capsys.readouterr().out
    image = shoot(run, tmp_path / "d.png", "--sigmas", "1,0.75,0.3,0.2")
    assert_same(image, naive(run / "checkpoints/student.safetensors", RED, 0, [1, .75, .3, .2, 0]))
    assert "not trained at levels 0.3, 0.2" in capsys.readouterr().out
    assert text(tmp_path / "d.png")[1]["columns"][0]["steps"] == 4
    shoot(run, tmp_path / "e.png", "--sigmas", "1,.3", "--model", "teacher")
    assert "note" not in capsys.readouterr().out                     # a teacher knows all levels


def test_image_i_has_seed_plus_i_whatever_the_batch(run, tmp_path):
    flags = "--run", str(run), "--seed", "40", "--num", "2", "--prompt", RED, "--prompt", BLUE
    for batch in "1", "4":
        sample.main([*flags, "--out", str(tmp_path / batch), "--batch", batch])
    names = [f"{i:06d}_seed{40 + i}.png" for i in range(4)]
    assert sorted(path.name for path in (tmp_path / "1").iterdir()) == names
    assert sorted(path.name for path in (tmp_path / "4").iterdir()) == names
    images = []
    for i, name in enumerate(names):
        prompt = (RED, RED, BLUE, BLUE)[i]
        images.append(pixels(tmp_path / "1" / name))
        assert_same(images[i], pixels(tmp_path / "4" / name))
        assert_same(images[i], naive(run / "checkpoints/student.safetensors", prompt, 40 + i,
                                     LEVELS[4]))
        parameters, record = text(tmp_path / "4" / name)
        assert parameters.splitlines()[0] == prompt and f"Seed: {40 + i}," in parameters
        assert record["prompts"] == [prompt] and record["seeds"] == [40 + i]
    assert differ(images[0], images[1])
    # the words matter, too
    assert differ(images[2], shoot(run, tmp_path / "x.png", "--seed", "42"))


def test_size_is_height_by_width(run, tmp_path):
    image = shoot(run, tmp_path / "a.png", "--size", "48x80")
    assert_same(image, naive(run / "checkpoints/student.safetensors", RED, 0, LEVELS[4], size=(48,
                                                                                               80)))
    assert image.shape == (48, 80, 3)
    parameters, record = text(tmp_path / "a.png")
    assert "Size: 80x48," in parameters and (record["height"], record["width"]) == (48, 80)


def test_the_empty_prompt_is_the_null_prompt(run, tmp_path):
    image = shoot(run, tmp_path / "a.png", prompt=" ")
    assert_same(image, naive(run / "checkpoints/student.safetensors", "", 0, LEVELS[4]))
    assert text(tmp_path / "a.png")[0].startswith("\nSteps: 4,")


def test_prompts_from_a_file(run, tmp_path):
    (tmp_path / "p.txt").write_text("# shapes\n\n  Large RED circle  left on black\n   "
                                    f"\n#{RED}\n{BLUE}\n")
    flags = ["--run", str(run), "--prompt-file", str(tmp_path / "p.txt"), "--out",
             str(tmp_path / "o")]
    sample.main(flags)
    first, second = sorted((tmp_path / "o").iterdir())
    assert text(first)[1]["prompts"] == [RED] and text(second)[1]["prompts"] == [BLUE]
    assert_same(pixels(first), shoot(run, tmp_path / "a.png"))


def test_a_checkpoint_says_all_that_its_run_says(run, tmp_path):
    for role in sample.ROLES:
        path = run / "checkpoints" / f"{role}.safetensors"
        a = shoot(run, tmp_path / f"{role}1.png", "--model", role)
        sample.main(["--checkpoint", str(path), "--prompt", RED, "--out",
                     str(tmp_path / f"{role}2.png")])
        assert (pixels(tmp_path / f"{role}2.png") == a).all()
        parameters = text(tmp_path / f"{role}2.png")[0]
        assert parameters.endswith(f"{hashlib.sha256(path.read_bytes()).hexdigest()[:10]}, Model: "
                                   f"{role}")
        assert text(tmp_path / f"{role}1.png")[0] == parameters.replace("Model: ", "Model: demo-")


def test_the_sampler_is_the_students_own(run, tmp_path):
    for sampler in "euler", "renoise":
        config = replace(CONFIG, sampler=sampler, levels=(1.0, 0.5), probs=(0.5, 0.5), shift=1.0)
        path = tmp_path / f"{sampler}.safetensors"
        save_mmdit(network(0), path, describe(config, "student"))
        sample.main(["--checkpoint", str(path), "--prompt", RED, "--out",
                     str(tmp_path / f"{sampler}.png")])
        parameters, record = text(tmp_path / f"{sampler}.png")
        assert f"Steps: 2, Sampler: {sampler.capitalize()}," in parameters
        assert record["columns"][0]["sigmas"] == [1, .5, 0]
    assert differ(pixels(tmp_path / "euler.png"), pixels(tmp_path / "renoise.png"))


def test_a_run_whose_teacher_lies_elsewhere(run, tmp_path):
    shutil.copytree(run, tmp_path / "other")
    moved = (tmp_path / "other/checkpoints/teacher.safetensors").rename(tmp_path / "t.safetensors")
    (tmp_path / "other/config.json").write_text(to_json(replace(CONFIG, teacher=str(moved),
                                                                guidance=5.0)))
    image = shoot(tmp_path / "other", tmp_path / "a.png", "--model", "teacher")
    assert (image == shoot(run, tmp_path / "b.png", "--model", "teacher", "--guidance", "5")).all()


# sheets


@pytest.fixture
def sheets(monkeypatch) -> list:
    """What contact_sheet is called with."""
    seen, original = [], contact_sheet
    array = lambda image: np.asarray(to_pil(image)).astype(int)

    def spy(columns, rows, cell):
        seen.append(({title: [*map(array, images)] for title, images in columns.items()}, rows))
        return original(columns, rows, cell)
    monkeypatch.setattr(sample.sheets, "contact_sheet", spy)
    return seen


def test_compare_shows_both_networks_from_the_same_seeds(run, tmp_path, sheets):
    sheet = shoot(run, tmp_path / "a.png", "--compare", "--prompt", BLUE, "--seed", "3", "--batch",
                  "1")
    (columns, rows), = sheets
    assert rows == [f"{RED}, seed=3", f"{BLUE}, seed=4"]
    wanted = {"teacher 6 x 2": ("--model", "teacher"),
              "teacher 4": ("--model", "teacher", "--steps", "4", "--guidance", "1"),
              "student 4": (), "student 2": ("--steps", "2"), "student 1": ("--steps", "1")}
    assert list(columns) == list(wanted)
    for title, flags in wanted.items():
        for i, prompt in enumerate((RED, BLUE)):
            alone = shoot(run, tmp_path / f"{title}{i}.png", *flags, "--seed", str(3 + i),
                          prompt=prompt)
            assert_same(columns[title][i], alone)
    assert sheet.shape[1] > 5 * 128 and sheet.shape[0] > 2 * 128
    parameters, record = text(tmp_path / "a.png")
    assert parameters.startswith(f"{RED}\n{BLUE}\nSteps: 6, Sampler: Euler, CFG scale: 2, Seed: 3,")
    assert [(c["role"], c["steps"], c["guidance"]) for c
            in record["columns"]] == [("teacher", 6, 2), ("teacher", 4, 1), ("student", 4, 1),
                                      ("student", 2, 1), ("student", 1, 1)]
    shoot(run, tmp_path / "b.png", "--compare", "--guidance", "1")
    assert list(sheets[-1][0])[0] == "teacher 6"


def test_grid_shows_every_image_once(run, tmp_path, sheets):
    shoot(run, tmp_path / "a.png", "--grid", "--prompt", BLUE, "--num", "3", "--seed", "5",
          "--batch", "4")
    (columns, rows), = sheets
    assert rows == [f"{RED}, seed=5", f"{BLUE}, seed=8"] and list(columns) == ["student 4", "+1",
                                                                               "+2"]
    for j, images in enumerate(columns.values()):
        for p, prompt in enumerate((RED, BLUE)):
            seed = 5 + 3 * p + j
            assert_same(images[p], naive(run / "checkpoints/student.safetensors", prompt, seed,
                                         LEVELS[4]))
    record = text(tmp_path / "a.png")[1]
    assert record["seeds"] == [5, 6, 7, 8, 9, 10] and record["prompts"] == [RED] * 3 + [BLUE] * 3


# with a picture


def save_pixels(path: Path, seed: int, hw: tuple[int, int] = (64, 64)) -> torch.Tensor:
    """A file of random pixels, every value among them; the picture [1, 3, H, W] in [-1, 1]."""
    values = np.random.default_rng(seed).integers(0, 256, (*hw, 3), dtype=np.uint8)
    Image.fromarray(values).save(path)
    return torch.from_numpy(values).permute(2, 0, 1)[None].double().div(255).mul(2).sub(1).float()


def save_mask(path: Path, hw: tuple[int, int] = (64, 64)) -> np.ndarray:
    """A file white in a rectangle off the grid of cells; [H, W, 1], True where white."""
    mask = np.zeros(hw, bool)
    mask[13:46, 5:30] = True
    Image.fromarray(mask).save(path)
    return mask[..., None]


def test_an_edit_is_sampled_beside_its_source(task_runs, tmp_path):
    image = encode(save_pixels(tmp_path / "a.png", 0, (48, 80)))
    flags = "--init-image", str(tmp_path / "a.png"), "--seed", "7"
    shot = lambda name, *more: shoot(task_runs["edit"], tmp_path / name, *flags, *more,
                                     instruction=CROSS)
    checkpoint = lambda role: task_runs["edit"] / f"checkpoints/{role}.safetensors"
    by_teacher = lambda *guidance: naive(checkpoint("teacher"), CROSS, 7, [1, 6 / 7, .6, 0],
                                         guidance[0], (48, 80), None, image, guidance[1])
    student = shot("s.png")
    assert_same(student, naive(checkpoint("student"), CROSS, 7, LEVELS[4], 1, (48, 80), None,
                               image))
    steps = "--model", "teacher", "--steps", "3"
    assert_same(shot("t.png", *steps), by_teacher(2, 1.5))           # both as in its run
    assert_same(shot("p.png", *steps, "--guidance", "1"), by_teacher(1, 1.5))
    assert_same(shot("n.png", *steps, "--guidance", "1", "--image-guidance", "1"), by_teacher(1, 1))
    assert_same(shot("i.png", *steps, "--image-guidance", "3"), by_teacher(2, 3))
    save_pixels(tmp_path / "b.png", 1, (48, 80))
    assert differ(student, shot("b2.png", "--init-image", str(tmp_path / "b.png")))
    parameters, record = text(tmp_path / "t.png")
    said = f"{CROSS}\nSteps: 3, Sampler: Euler, CFG scale: 2, Image CFG scale: 1.5, Seed: 7,"
    assert said in parameters
    assert (record["task"], record["init_image"], "mask" in record) == ("edit", "a.png", False)
    assert "Image CFG" not in text(tmp_path / "s.png")[0] and "strength" not in parameters


def test_instructions_from_a_file_each_edit_the_picture(task_runs, tmp_path):
    image = encode(save_pixels(tmp_path / "a.png", 0))
    (tmp_path / "i.txt").write_text(f"# edits\n{CROSS}\nMake it  RED\n")
    flags = ["--run", str(task_runs["edit"]), "--init-image", str(tmp_path / "a.png")]
    sample.main([*flags, "--prompt-file", str(tmp_path / "i.txt"), "--out", str(tmp_path / "o")])
    for seed, (path, said) in enumerate(zip(sorted((tmp_path / "o").iterdir()), (CROSS,
                                                                                 "make it red"))):
        student = task_runs["edit"] / "checkpoints/student.safetensors"
        assert_same(pixels(path), naive(student, said, seed, LEVELS[4], image=image))
        assert text(path)[1]["prompts"] == [said]


def test_inpainting_keeps_every_pixel_outside_the_mask_and_sees_none_under_it(task_runs, tmp_path):
    picture, mask = save_pixels(tmp_path / "a.png", 0), save_mask(tmp_path / "m.png")
    shot = lambda out, source: shoot(task_runs["inpaint"], tmp_path / out, "--init-image",
                                     str(tmp_path / source), "--mask", str(tmp_path / "m.png"))
    source, image = pixels(tmp_path / "a.png"), shot("1.png", "a.png")
    assert set(source[~mask[..., 0]].flat) == set(range(256))
    assert (np.where(mask, source, image) == source).all()
    beside = masks.image_condition(encode, picture, torch.from_numpy(mask[None, ..., 0]))
    wanted = naive(task_runs["inpaint"] / "checkpoints/student.safetensors", RED, 0, LEVELS[4],
                   image=beside)
    assert_same(image * mask, wanted * mask)
    assert differ(image, source)

    def whitened(name: str, where: np.ndarray) -> np.ndarray:
        Image.fromarray(np.where(where, 255, source).astype(np.uint8)).save(tmp_path / name)
        return shot(f"of_{name}", name)
    assert (whitened("b.png", mask) == image).all()
    assert np.abs(mask * (whitened("c.png", ~mask) - image)).max() > 8
    record = text(tmp_path / "1.png")[1]
    assert (record["task"], record["init_image"], record["mask"]) == ("inpaint", "a.png", "m.png")


@pytest.mark.parametrize("ending", ["tif", "png"])
def test_a_turned_picture_and_mask_are_taken_as_displayed(task_runs, tmp_path, ending):
    save_pixels(tmp_path / "a.png", 0, (48, 80))
    save_mask(tmp_path / "m.png", (48, 80))
    exif = Image.Exif()
    exif[0x0112] = 6
    turn = {"tiffinfo": {0x0112: 6}} if ending == "tif" else {"exif": exif}
    for name in "a", "m":
        with Image.open(tmp_path / f"{name}.png") as image:
            image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / f"{name}2.{ending}", **turn)
    shots = []
    for a, m, out in (("a.png", "m.png", "1.png"), (f"a2.{ending}", f"m2.{ending}", "2.png")):
        shots.append(shoot(task_runs["inpaint"], tmp_path / out, "--init-image",
                           str(tmp_path / a), "--mask", str(tmp_path / m)))
    assert shots[0].shape[:2] == (48, 80) and (shots[0] == shots[1]).all()


def test_strength_starts_from_the_noised_picture(run, tmp_path, capsys):
    init = encode(save_pixels(tmp_path / "a.png", 0))
    shot = lambda name, strength, *flags: shoot(run, tmp_path / name, "--init-image",
                                                str(tmp_path / "a.png"), "--strength", strength,
                                                *flags)
    half = shot("b.png", "0.5")
    checkpoint = run / "checkpoints/student.safetensors"
    assert_same(half, naive(checkpoint, RED, 0, [.75, .5, 0], init=init))
    parameters, record = text(tmp_path / "b.png")
    assert parameters.endswith(
        ", Denoising strength: 0.5") and parameters.startswith(f"{RED}\nSteps: 4,")
    column = record["columns"][0]
    assert column["sigmas"] == pytest.approx([.75, .5, 0], abs=1e-6) and column["strength"] == .5
    assert (record["task"], record["init_image"]) == ("text", "a.png")
    assert (shot("c.png", "1") == shoot(run, tmp_path / "d.png")).all()
    assert "note" not in capsys.readouterr().out
    assert (shot("e.png", "0.6") == half).all()
    assert "note: --strength 0.6: 0.5, the nearest trained level\n" in capsys.readouterr().out
    assert text(tmp_path / "e.png")[0].endswith(", Denoising strength: 0.5")
    assert_same(shot("f.png", "0.2", "--steps", "2"),
                naive(checkpoint, RED, 0, [.75, 0], init=init))
    assert_same(shot("g.png", "0.5", "--sigmas", "1,.7"),
                naive(checkpoint, RED, 0, [.7, 0], init=init))
    assert "--strength 0.5: 0.438, the nearest level\n" in capsys.readouterr().out


def test_the_lower_the_strength_the_nearer_to_the_picture(run, tmp_path):
    scenes = sample_scenes(1, (64, 64), 1, torch.Generator().manual_seed(0))
    save_png(render(scenes, (64, 64))[0], tmp_path / "a.png", {})
    shot = lambda strength: shoot(run, tmp_path / f"{strength}.png", "--init-image",
                                  str(tmp_path / "a.png"), "--strength", strength, "--model",
                                  "teacher", "--steps", "100")
    codec = ((decode(encode(render(scenes, (64, 64))))[0] + 1) * 127.5).permute(1, 2, 0)
    near, far = (np.abs(shot(s) - codec.numpy()).mean() for s in ("0.01", "0.5"))
    assert near < 5 < 40 < far, (near, far)


def test_compare_shows_what_the_networks_are_shown(run, task_runs, tmp_path, sheets, capsys):
    picture, mask = save_pixels(tmp_path / "a.png", 0), save_mask(tmp_path / "m.png")
    source, flags = pixels(tmp_path / "a.png"), ["--init-image", str(tmp_path / "a.png")]
    shoot(task_runs["edit"], tmp_path / "e.png", *flags, "--compare", "--instruction", "remove it",
          instruction=CROSS)
    columns, rows = sheets[-1]
    assert list(columns) == ["source", "teacher 6 x 3", "teacher 4", "student 4", "student 2",
                             "student 1"]
    assert rows == [f"{CROSS}, seed=0", "remove it, seed=1"]
    assert all((image == source).all() for image in columns["source"])
    alone = shoot(task_runs["edit"], tmp_path / "e2.png", *flags, "--steps", "2", instruction=CROSS)
    assert_same(columns["student 2"][0], alone)

    shoot(task_runs["inpaint"], tmp_path / "i.png", *flags, "--mask", str(tmp_path / "m.png"),
          "--compare")
    columns, _ = sheets[-1]
    assert list(columns)[0] == "to repaint" and len(columns) == 6
    striped, inside = columns.pop("to repaint")[0], np.broadcast_to(mask, source.shape)
    # -.4 and .4
    assert (striped == source)[~inside].all() and set(striped[inside]) == {76, 178}
    assert all((images[0] == np.where(mask, images[0], source)).all() for images
               in columns.values())

    capsys.readouterr()
    shoot(run, tmp_path / "t.png", *flags, "--strength", "0.5", "--compare")
    columns, _ = sheets[-1]
    assert (columns["source"][0] == source).all()
    assert_same(columns["student 2"][0], naive(run / "checkpoints/student.safetensors", RED, 0,
                                               [.75, 0], init=encode(picture)))
    assert re.findall("note.*", capsys.readouterr().out) == [
        "note: --strength 0.5: 1, the nearest trained level of student 1"]


def test_grid_of_edits(task_runs, tmp_path, sheets):
    image = encode(save_pixels(tmp_path / "a.png", 0))
    shoot(task_runs["edit"], tmp_path / "g.png", "--init-image", str(tmp_path / "a.png"), "--grid",
          "--num", "2", instruction=CROSS)
    (columns, rows), = sheets
    assert rows == [f"{CROSS}, seed=0"] and list(columns) == ["student 4", "+1"]
    wanted = naive(task_runs["edit"] / "checkpoints/student.safetensors", CROSS, 1, LEVELS[4],
                   image=image)
    assert_same(columns["+1"][0], wanted)


def test_a_real_picture_is_encoded_by_the_vae_that_decodes(tmp_path, monkeypatch):
    pytest.importorskip("diffusers"), pytest.importorskip("transformers")
    import sd3
    folder, loads, load = sd3.make_folder(tmp_path / "sd3"), [], encoders.load_vae
    monkeypatch.setattr(encoders, "load_vae",
                        lambda *given: loads.append(load(*given)) or loads[-1])
    picture, mask = save_pixels(tmp_path / "a.png", 0), save_mask(tmp_path / "m.png")
    d = encoders.sd3_codec(folder, torch.device("cpu"), "none", 6)
    d.decode(d.encode(picture))
    vae, = loads                                                     # once, for both
    mean = vae.encode(picture).latent_dist.mean
    torch.testing.assert_close(d.encode(picture), (mean - .0609) * 1.5305)

    config = replace(TASKS["inpaint"], encoders=str(folder))
    model = network(0, in_channels=33, context_dim=sd3.JOINT, pooled_dim=sd3.POOLED)
    save_mmdit(model, tmp_path / "m.safetensors", describe(config, "student"))
    flags = ["--checkpoint", str(tmp_path / "m.safetensors"), "--encoders", str(folder), "--prompt",
             "red", "--t5-tokens", "6", "--device", "cpu", "--mask", str(tmp_path / "m.png")]
    source = pixels(tmp_path / "a.png")
    Image.fromarray(np.where(mask, 255 - source, source).astype(np.uint8)).save(tmp_path / "b.png")
    for name in "a", "b":
        sample.main([*flags, "--init-image", str(tmp_path / f"{name}.png"), "--out",
                     str(tmp_path / f"of_{name}.png")])
    image = pixels(tmp_path / "of_a.png")
    assert (image == pixels(tmp_path / "of_b.png")).all() and differ(image, source)
    assert (np.where(mask, source, image) == source).all()

    # a VAE that cannot be used is found before anything is sampled
    config = folder / "vae" / "config.json"
    config.write_text(config.read_text().replace('"silu"', '"nonsense"'))
    monkeypatch.setattr(sample, "sample", lambda *args: pytest.fail("sampled"))
    with pytest.raises(InputError, match="vae must hold a complete AutoencoderKL"):
        sample.main([*flags, "--init-image", str(tmp_path / "a.png"), "--out",
                     str(tmp_path / "new" / "o.png")])
    assert not (tmp_path / "new").exists()


# loras


def lora_of(path: Path, seed: int, layer: str = "joint_blocks.1.x_block.mlp.fc1",
            size: tuple[int, int] = (256, 64)) -> torch.Tensor:
    """A LoRA of one layer with a text encoder's tensor; its product."""
    g = torch.Generator().manual_seed(seed)
    b, a = torch.randn(size[0], 4, generator=g), torch.randn(4, size[1], generator=g) / 4
    name = f"lora_unet_{layer.replace('.', '_')}"
    save_file({f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b,
               f"{name}.alpha": torch.tensor(8.0), "lora_te1_x.lora_up.weight": a.clone()}, path)
    return 2 * b @ a


@pytest.mark.parametrize("role", sample.ROLES)
def test_loras_are_added_with_their_weights(run, tmp_path, capsys, role):
    one, two = (lora_of(tmp_path / f"{name}.safetensors", i) for i, name in enumerate(("a:1", "b")))
    model = load_mmdit(run / f"checkpoints/{role}.safetensors")
    with torch.no_grad():
        model.joint_blocks[1].x_block.mlp.fc1.weight += 0.5 * one - two
    save_mmdit(model, tmp_path / "m.safetensors", describe(CONFIG, role))
    sample.main(["--checkpoint", str(tmp_path / "m.safetensors"), "--prompt", RED, "--out",
                 str(tmp_path / "m.png")])
    capsys.readouterr()
    flags = ["--lora", f"{tmp_path}/a:1.safetensors:0.5", "--lora", f"{tmp_path}/b.safetensors:-1"]
    image = shoot(run, tmp_path / "l.png", "--model", role, *flags)
    assert_same(image, pixels(tmp_path / "m.png"))
    assert differ(image, shoot(run, tmp_path / "n.png", "--model", role))
    said = capsys.readouterr().out
    assert said.count("b.safetensors: 1 tensors of text encoders are left out\n") == 1
    parameters, record = text(tmp_path / "l.png")
    assert parameters.endswith(", Lora: a:1.safetensors x 0.5, Lora: b.safetensors x -1")
    assert [(x["lora"], x["weight"]) for x in record["loras"]] == [("a:1.safetensors", .5),
                                                                   ("b.safetensors", -1)]
    assert len({x["fingerprint"] for x in record["loras"]}) == 2
    assert text(tmp_path / "n.png")[1]["loras"] == []


def test_compare_adds_a_lora_to_both_networks(run, tmp_path, sheets, capsys):
    lora_of(tmp_path / "a.safetensors", 0)
    flags = "--lora", f"{tmp_path}/a.safetensors"
    shoot(run, tmp_path / "c.png", "--compare", *flags)
    assert capsys.readouterr().out.count("text encoders") == 1
    for title, more in (("student 2", ("--steps", "2")), ("teacher 6 x 2", ("--model", "teacher"))):
        alone = shoot(run, tmp_path / f"{title}.png", *flags, *more)
        assert_same(sheets[0][0][title][0], alone)


# text


def test_the_t5_tokens_are_those_of_the_checkpoint(run, tmp_path, monkeypatch, capsys):
    seen = []

    def codec(folder, device, t5, tokens, *rest):
        seen.append(tokens)
        raise InputError("enough")
    monkeypatch.setattr(sample, "sd3_codec", codec)
    header = describe(replace(CONFIG, encoders="sd3", t5_tokens=77), "student")
    older = {name: value for name, value in header.items() if name != "t5_tokens"}
    for i, metadata in enumerate((header, older)):
        save_mmdit(network(0), tmp_path / f"{i}.safetensors", metadata)
        for flags in ([], ["--t5-tokens", "128"], ["--t5-tokens", "77"]):
            with pytest.raises(InputError, match="enough"):
                sample.main(["--checkpoint", str(tmp_path / f"{i}.safetensors"), "--encoders",
                             "sd3", "--prompt", "red", "--out", str(tmp_path / "o.png"), *flags])
    assert seen == [77, 128, 77, 256, 128, 77]
    note = "note: --t5-tokens {}, not the {} that the network was trained with"
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note")]
    assert notes == [note.format(*n) for n in ((128, 77), (128, 256), (77, 256))]
    save_mmdit(network(0), tmp_path / "bad.safetensors", {**header, "t5_tokens": "513"})
    with pytest.raises(InputError, match=r"t5_tokens must be 1 to 512 \(got 513\)"):
        sample.main(["--checkpoint", str(tmp_path / "bad.safetensors"), "--encoders", "sd3",
                     "--prompt", "red", "--out", str(tmp_path / "o.png")])


def test_what_a_png_says(run, tmp_path, capsys):
    shoot(run, tmp_path / "a.png", "--seed", "42", "--kernels", "torch")
    digest = hashlib.sha256((run / "checkpoints/student.safetensors").read_bytes()).hexdigest()[:10]
    parameters, record = text(tmp_path / "a.png")
    assert parameters == (f"{RED}\nSteps: 4, Sampler: Euler, CFG scale: 1, Seed: 42, Size: 64x64, "
                          f"Model hash: {digest}, Model: demo-student")
    sigmas = record["columns"][0].pop("sigmas")
    assert sigmas == pytest.approx(LEVELS[4], abs=1e-6)
    assert record["versions"] == versions() and record["commit"] and record["device"]
    assert {k: record[k] for k in ("prompts", "seeds", "height", "width", "shift",
                                   "columns")} == {"prompts": [RED], "seeds": [42], "height": 64,
                                                   "width": 64, "shift": 3.0,
                                                   "columns": [{"role": "student",
                                                                "sampler": "euler", "steps": 4,
                                                                "guidance": 1.0,
                                                                "image_guidance": 1.0,
                                                                "strength": 1.0,
                                                                "model": "demo-student",
                                                                "model_hash": digest}]}
    assert record["task"] == "text" and not {"init_image", "mask"} & set(record)
    line = capsys.readouterr().out.splitlines()[-1]
    line = re.sub(r"[\d.]+ (?=images/s|ms|GB)", "", line)
    assert line == f"{tmp_path / 'a.png'}: 1 images, images/s, ms a step of 1, GB at peak"


def test_a_png_can_be_silent(run, tmp_path):
    plain = shoot(run, tmp_path / "a.png", "--no-metadata")
    assert Image.open(tmp_path / "a.png").text == {} and (plain == shoot(run,
                                                                         tmp_path / "b.png")).all()


# bad input


def metadata_without(*names: str, **changes: str) -> dict[str, str]:
    return {k: v for k, v in {**describe(CONFIG, "student"), **changes}.items() if k not in names}


def checkpoint_of(folder: Path, *without: str, model: MMDiT | None = None,
                  **changes: str) -> list[str]:
    save_mmdit(model or network(0), folder / "m.safetensors", metadata_without(*without, **changes))
    return ["--checkpoint", str(folder / "m.safetensors"), "--prompt", RED]


def truncated(folder: Path) -> list[str]:
    flags = checkpoint_of(folder)
    Path(flags[1]).write_bytes(Path(flags[1]).read_bytes()[:5000])
    return flags


def something_else(folder: Path) -> list[str]:
    save_file({"weight": torch.zeros(3)}, folder / "m.safetensors", describe(CONFIG, "student"))
    return ["--checkpoint", str(folder / "m.safetensors"), "--prompt", RED]


def run_with(folder: Path, content: str) -> list[str]:
    (folder / "config.json").write_text(content)
    return ["--run", str(folder), "--prompt", RED]


def file_with(folder: Path, content: bytes) -> list[str]:
    (folder / "p.txt").write_bytes(content)
    return ["--prompt-file", str(folder / "p.txt")]


def taken(folder: Path) -> list[str]:
    (folder / "taken.png").write_bytes(b"mine")
    return ["--out", str(folder / "taken.png")]


def taken_in_folder(folder: Path) -> list[str]:
    (folder / "o").mkdir()
    (folder / "o" / "000001_seed1.png").write_bytes(b"mine")
    return ["--num", "2", "--out", str(folder / "o")]


def under_a_file(folder: Path) -> list[str]:
    (folder / "file").write_bytes(b"mine")
    return ["--out", str(folder / "file" / "a.png")]


def from_picture(kind: str, *flags: str, hw: tuple[int, int] = (64, 64), mask: np.ndarray
                 | None = None, prompt: str | None = None, instruction: str | None = None):
    """A function of a folder: writes a.png and m.png there and gives the flags to sample with
    them."""
    if (prompt, instruction) == (None, None):
        prompt, instruction = (None, CROSS) if kind == "EDIT" else (RED, None)
    said = ["--prompt", prompt] if instruction is None else ["--instruction", instruction]

    def made(folder: Path) -> list[str]:
        save_pixels(folder / "a.png", 0, hw)
        if mask is not None:
            Image.fromarray(mask).save(folder / "m.png")
        masked = [] if mask is None else ["--mask", "m.png"]
        return ["--run", kind, *said, "--init-image", "a.png", *masked, *flags]
    return made


def no_picture(folder: Path) -> list[str]:
    (folder / "a.png").write_bytes(b"a letter")
    return EDIT + ["--init-image", "a.png"]


WHITE, BLACK = np.full((64, 64), 255, np.uint8), np.zeros((64, 64), np.uint8)
SMOOTH = np.arange(4096, dtype=np.uint16).reshape(64, 64).astype(np.uint8)
PURPLE = np.stack([WHITE, BLACK, WHITE], -1)
RUN, PROMPT, EDIT = ["--run", "RUN"], ["--prompt", RED], ["--run", "EDIT", "--instruction", CROSS]
# RUN stands for the run folder; --out is added where a case has none
GOOD = RUN + PROMPT
TOGETHER = "^--init-image and --strength must be given together for text-to-image"
STRENGTH = r"^--strength must be above 0 and at most 1 \(got "
FALLING = r"^--sigmas must be numbers falling from 1, such as 1,0.5 \(got "
BAD = {  # name: (flags or a function of a folder that gives them, what the message says)
    "a graph on a cpu": (GOOD + ["--graph", "--device", "cpu"],
                         r"^--graph requires a GPU \(got cpu\)$"),
    "near miss": (GOOD + ["--sed", "1"], "--sed.*--seed"),
    "abbreviation": (GOOD + ["--guid", "1"], "unknown argument '--guid'"),
    "no run": (["--run", "runs/nowhere"] + PROMPT,
               "^--run must be a run folder of train.py; runs/nowhere has no config.json$"),
    "no checkpoint": (["--checkpoint", "nowhere"] + PROMPT,
                      "^--checkpoint: nowhere does not exist$"),
    "neither": (PROMPT, r"^exactly one of --run, --checkpoint must be given \(got none\)$"),
    "both": (GOOD + ["--checkpoint", "x"],
             r"^exactly one of --run, --checkpoint must be given \(got --run --checkpoint\)$"),
    "broken config": (lambda f: run_with(f, "{"), "config.json: not a complete JSON"),
    "config of something else": (lambda f: run_with(f, "[1]"),
                                 "config.json: no task, sizes, .*train.py"),
    "folder of another type": (lambda f: run_with(f, to_json(CONFIG).replace(
        '"encoders": ""', '"encoders": 5')), r"config.json: encoders must be text \(got 5\)$"),
    "unfinished run": (lambda f: run_with(f, to_json(CONFIG)),
                       "student.safetensors does not exist; train.py writes it when that stage"),
    "run without a student": (lambda f: run_with(f, to_json(replace(CONFIG, steps=0))),
                              r"does not exist; .* \(never with --steps 0: --model teacher\)"),
    "truncated": (truncated, "m.safetensors: not a complete safetensors"),
    "something else": (something_else, "m.safetensors: x_embedder.proj.weight of an MMDiT must be"),
    "no metadata": (lambda f: checkpoint_of(f, "levels", "shift"),
                    "m.safetensors: no levels, shift; it must be written by train.py"),
    "no task": (lambda f: checkpoint_of(f, "task"),
                "m.safetensors: no task; it must be written by train.py"),
    "unknown task": (lambda f: checkpoint_of(f, task="paint"),
                     r"m.safetensors: task must be one of text, edit, inpaint \(got 'paint'\)"),
    "unknown sampler": (lambda f: checkpoint_of(f, sampler="heun"),
                        r"m.safetensors: sampler must be one of euler, renoise \(got 'heun'\)"),
    "metadata's size": (lambda f: checkpoint_of(f, sizes="60x64"),
                        r"m.safetensors: .*sizes must be multiples of 16, .* 64x64 \(got 60x64\)$"),
    "other task": (lambda f: checkpoint_of(f, task="edit")[:2] + from_picture("EDIT")(f)[2:],
                   r"m.safetensors: channels .* must be \(32, 16, 64, 64\) for task edit "
                   r"\(got \(16, 16, 64, 64\)\)$"),
    "role": (lambda f: checkpoint_of(f, role="vae"),
             r"m.safetensors: role must be student or teacher \(got 'vae'\)"),
    "bad number": (lambda f: checkpoint_of(f, shift="fast"),
                   r"m.safetensors: shift must be a number \(got 'fast'\)"),
    "no number": (lambda f: checkpoint_of(f, guidance="nan"),
                  r"m.safetensors: guidance must be .* at least 0 \(got nan\)"),
    "bad levels": (lambda f: checkpoint_of(f, levels="0.5,1.0"),
                   r"m.safetensors: levels must be .* fall from 1 .*\(got \(0.5, 1.0\)\)"),
    "no levels": (lambda f: checkpoint_of(f, levels=""),
                  r"m.safetensors: levels must be .* fall from 1 .*\(got \(\)\)"),
    "other text": (lambda f: checkpoint_of(f, model=network(0, context_dim=32)),
                   r"m.safetensors: channels .* must be \(16, 16, 64, 64\) for task text "
                   r"\(got \(16, 16, 32, 64\)\)$"),
    "other role": (lambda f: checkpoint_of(f) + ["--model", "teacher"],
                   r"^--model must be student for .*m.safetensors \(got teacher\)$"),
    "no prompt": (RUN, r"^exactly one of --prompt, --prompt-file, --instruction must be .* "
                  r"\(got none\)$"),
    "two prompts": (lambda f: GOOD + file_with(f, b"circle"),
                    r"^exactly one of .*--instruction must be given "
                    r"\(got --prompt --prompt-file\)$"),
    "empty file": (lambda f: RUN + file_with(f, b"\n# none\n"),
                   "p.txt must have at least one prompt"),
    "no file": (RUN + ["--prompt-file", "nowhere.txt"], "nowhere.txt: cannot be read"),
    "no text": (lambda f: RUN + file_with(f, b"\xff\xfe\x00"),
                "p.txt must be UTF-8 .got another byte at 0"),
    "unknown word": (RUN + ["--prompt", "large red circl"],
                     "'circl', the nearest known word is 'circle'"),
    "unknown word in a file": (lambda f: RUN + file_with(f, b"gren circle"),
                               "'gren', the nearest .* 'green'"),
    "word order": (RUN + ["--prompt", "circle red"], "got 'red' out of place"),
    "two objects": (RUN + ["--prompt", "red circle above blue cross"], "unknown word 'above'"),
    "size": (GOOD + ["--size", "60x64"],
             r"^--size must be multiples of 16, .* 64x64 \(got 60x64\)$"),
    "size form": (GOOD + ["--size", "64"], r"^--size must be HxW in pixels, .*\(got '64'\)$"),
    "empty size": (GOOD + ["--size", ""], r"^--size must be HxW in pixels, .*\(got ''\)$"),
    "large": (GOOD + ["--size", "64x144"],
              r"^--size must be at most 128x128 for .* \(got 64x144\)$"),
    "steps": (GOOD + ["--steps", "3"],
              r"^--steps must be one of \[1, 2, 4\].*\(got 3\); --sigmas takes other levels$"),
    "no steps": (GOOD + ["--steps", "0"], r"^--steps must be 1 to 1000 \(got 0\)$"),
    "steps and sigmas": (GOOD + ["--steps", "2", "--sigmas", "1"],
                         r"^--steps must be left out with --sigmas \(got 2\)$"),
    "rising": (GOOD + ["--sigmas", "1,0.5,0.6"], f"{FALLING}'1,0.5,0.6'"),
    "from elsewhere": (GOOD + ["--sigmas", "0.9,0.5"], f"{FALLING}'0.9,0.5'"),
    "nan": (GOOD + ["--sigmas", "1,nan"], f"{FALLING}'1,nan'"),
    "negative sigma": (GOOD + ["--sigmas", "1,-0.5"], f"{FALLING}'1,-0.5'"),
    "no sigmas": (GOOD + ["--sigmas", ""], f"{FALLING}''"),
    "words for sigmas": (GOOD + ["--sigmas", "1,half"], f"{FALLING}'1,half'"),
    "guided student": (GOOD + ["--guidance", "2"],
                       r"^--guidance must be 1 for a student.* --model teacher \(got 2.0\)$"),
    "guidance nan": (GOOD + ["--model", "teacher", "--guidance", "nan"],
                     r"^--guidance must be 0 to 100 \(got nan\)$"),
    "negative seed": (GOOD + ["--seed", "-1"],
                      r"^--seed must be 0 to 4611686018427387904 \(got -1\)$"),
    "seed": (GOOD + ["--seed", "x"], "--seed: .*'x'"),
    "batch": (GOOD + ["--batch", "0"], r"^--batch must be 1 to 4096 \(got 0\)$"),
    "num": (GOOD + ["--num", "0"], r"^--num must be 1 to 1000000 \(got 0\)$"),
    "device": (GOOD + ["--device", "tpu"], "--device: .*'tpu'.*auto.*cpu.*cuda"),
    "kernels": (GOOD + ["--kernels", "fast"], "--kernels: .*'fast'.*auto"),
    "compare one": (lambda f: checkpoint_of(f) + ["--compare"],
                    r"^--compare excludes --checkpoint, .* and --grid \(got --checkpoint\)$"),
    "compare steps": (GOOD + ["--compare", "--steps", "2", "--grid"],
                      r"^--compare excludes --checkpoint, .* and --grid \(got --steps --grid\)$"),
    "no out": (GOOD + ["--out", ""],
               r"^--out must be a .png for one image or a folder .*\(got nothing\)$"),
    "out type": (GOOD + ["--out", "a.jpg"], r"^--out must be a name ending in .png \(got a.jpg\)$"),
    "one file for many": (GOOD + ["--num", "2", "--out", "a.png"],
                          r"^--out must be a folder for several images, or use --grid "
                          r"\(got a.png\)$"),
    "out exists": (lambda f: GOOD + taken(f),
                   "^--out: .*taken.png exists already; take another name$"),
    "out exists in folder": (lambda f: GOOD + taken_in_folder(f),
                             "^--out: .*000001_seed1.png exists already; take another name$"),
    "out under a file": (lambda f: GOOD + under_a_file(f), "^--out: .*file cannot be made "),
    # with a picture; from_picture writes one
    "prompt and instruction": (GOOD + EDIT[2:],
                               r"^exactly one of .*--instruction must .*"
                               r"\(got --prompt --instruction\)$"),
    "prompt for an edit": (from_picture("EDIT", prompt=RED),
                           "^--prompt must be left out with a network of task edit, which takes "
                           fr"--instruction, --init-image, --image-guidance \(got .*{RED}"),
    "instruction for text": (RUN + EDIT[2:],
                             "^--instruction must be left out with a network of task text, "
                             "which takes "
                             fr"--prompt, --init-image, --strength \(got .*{CROSS}"),
    "mask for an edit": (from_picture("EDIT", mask=WHITE),
                         r"^--mask must be left out .* task edit, which takes .* \(got m.png\)$"),
    "mask for text": (from_picture("RUN", "--strength", "1", mask=WHITE),
                      r"^--mask must be left out .* task text, which takes .* \(got m.png\)$"),
    "strength for a mask": (from_picture("INPAINT", "--strength", "1", mask=WHITE),
                            r"^--strength must be left out .* inpaint, which takes .*--mask "
                            r"\(got 1.0\)$"),
    "image guidance for text": (GOOD + ["--image-guidance", "2"],
                                r"^--image-guidance must be left out .* text, which takes .* "
                                r"\(got 2.0\)$"),
    "image guided student": (from_picture("EDIT", "--image-guidance", "2"),
                             r"^--image-guidance must be 1 for a student.* \(got 2.0\)$"),
    "image guidance": (from_picture("EDIT", "--image-guidance", "-1"),
                       r"^--image-guidance must be 0 to 100 \(got -1.0\)$"),
    "no picture to edit": (EDIT,
                           r"^--init-image must be a file for a network of task edit "
                           r"\(got none\)$"),
    "no picture to repaint": (["--run", "INPAINT", *PROMPT],
                              r"^--init-image must be a file for a network of task inpaint "
                              r"\(got none\)$"),
    "no mask": (from_picture("INPAINT"),
               r"^--mask must be a file for a network of task inpaint \(got none\)$"),
    "no strength": (from_picture("RUN"), fr"{TOGETHER} \(got --init-image\)$"),
    "strength alone": (GOOD + ["--strength", "1"], fr"{TOGETHER} \(got --strength\)$"),
    "strength 0": (from_picture("RUN", "--strength", "0"), f"{STRENGTH}0.0"),
    "strength 1.1": (from_picture("RUN", "--strength", "1.1"), f"{STRENGTH}1.1"),
    "strength nan": (from_picture("RUN", "--strength", "nan"), f"{STRENGTH}nan"),
    "no instruction": (from_picture("EDIT", instruction="circle red"),
                       "instruction must be one of .*got 'circle red'"),
    "misspelt": (from_picture("EDIT", instruction="make it rod"),
                 "'rod', the nearest known .* 'red'"),
    "missing picture": (EDIT + ["--init-image", "no.png"],
                        "--init-image no.png: not a complete image .*No such file"),
    "a letter": (no_picture, "--init-image a.png: not a complete image"),
    "picture's sides": (from_picture("EDIT", hw=(60, 64)),
                        r"^--init-image a.png: sides must be multiples of 16 pixels "
                        r"\(got 60x64\)$"),
    "picture's size": (from_picture("EDIT", "--size", "48x80"),
                       r"^--size must be that of --init-image a.png, 64x64 \(got 48x80\)$"),
    "large picture": (from_picture("EDIT", hw=(144, 64)),
                      r"^--init-image a.png must be at most 128x128 for .* \(got 144x64\)$"),
    "missing mask": (from_picture("INPAINT", "--mask", "no.png"),
                     "--mask no.png: not a complete image"),
    "mask's size": (from_picture("INPAINT", mask=WHITE, hw=(48, 80)),
                    "--mask m.png must have the image's size, 48x80 pixels .got 64x64"),
    "black mask": (from_picture("INPAINT", mask=BLACK),
                   "--mask m.png must be white where .*got all black"),
    "grey mask": (from_picture("INPAINT", mask=SMOOTH),
                  "--mask m.png must be black .*got 4064 other pixels"),
    "clear mask": (from_picture("INPAINT", mask=np.stack([WHITE, WHITE, WHITE, BLACK], -1)),
                   r"^--mask m.png must be black and white \(got transparency\)$"),
    "coloured mask": (from_picture("INPAINT", mask=PURPLE),
                      r"^--mask m.png must be black and white \(got colours\)$"),
    "no lora": (GOOD + ["--lora", "nowhere.safetensors"],
                r"^--lora must be FILE or FILE:WEIGHT, .* \(got 'nowhere.safetensors'\)$"),
    "lora of another network": (
        lambda f: lora_of(f / "l.safetensors", 0, size=(64, 64)) is not None and GOOD
        + ["--lora", "l.safetensors:0.5"],
        r"^--lora l.safetensors must be of this network, 2 blocks of width 64, whose .*fc1 has "
        r"size \[256, 64\] \(got \[64, 64\]\)$"),
    "lora's weight": (lambda f: lora_of(f / "l.safetensors", 0) is not None and GOOD
                      + ["--lora", "l.safetensors:nan"],
                      r"^--lora l.safetensors: the weight must be finite \(got nan\)$"),
    "latents with a lora": (GOOD + ["--save-latents", "o", "--lora", "x"],
                            r"^--save-latents must be used without .* \(got --lora\)$"),
    "latents of an edit": (EDIT + ["--save-latents", "o"],
                           r"^--save-latents requires a text-to-image network "
                           r"\(got task edit\); train.py "),
    "latents by a picture": (from_picture("RUN", "--strength", "1", "--save-latents", "o"),
                             r"^--save-latents must be used without .* \(got --init-image\)$"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_and_nothing_is_written(run, task_runs, tmp_path, monkeypatch, case):
    flags, message = BAD[case]
    monkeypatch.chdir(tmp_path)
    flags = flags(tmp_path) if callable(flags) else flags
    runs = {"RUN": run, "EDIT": task_runs["edit"], "INPAINT": task_runs["inpaint"]}
    flags = [str(runs.get(flag, flag)) for flag in flags]
    flags += [] if {"--out", "--save-latents"} & {*flags} else ["--out", "o.png"]
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(InputError) as error:
        sample.main(flags)
    assert re.search(message, str(error.value)) and "\n" not in str(error.value), error.value
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_cuda_where_there_is_none(run, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(InputError,
                       match=r"--device must be cpu or auto without a CUDA device \(got cuda\)"):
        shoot(run, tmp_path / "a.png", "--device", "cuda")


def test_train_writes_what_a_checkpoint_must_say(run):
    found = load_metadata(run)
    assert {f.name for f in fields(Recipe)} | {"role", "domain"} == set(found)
    assert found == describe(CONFIG, "student") and read_recipe(found, run) == CONFIG.recipe
    assert (found["role"], found["domain"]) == ("student", "toy")
    assert found["levels"] == "1.0,0.75,0.5,0.25"
    assert read_recipe(json.loads(to_json(CONFIG)), run) == CONFIG.recipe
    assert describe(replace(CONFIG, encoders="sd3"), "teacher")["domain"] == "sd3"


def test_a_network_of_the_former_toy_images_is_refused(run, tmp_path):
    old = tmp_path / "old.safetensors"
    save_mmdit(load_mmdit(run), old, {**load_metadata(run), "domain": "world"})
    with pytest.raises(InputError, match=r"old\.safetensors: a network of toy images as they were"):
        sample.main(["--checkpoint", str(old), "--prompt", RED, "--out", str(tmp_path / "a.png")])


def test_the_script_itself(run, tmp_path):
    def again() -> subprocess.CompletedProcess:
        kernels.announce.cache_clear()
        return script("sample.py", tmp_path, "--run", str(run), "--prompt", RED, "--out",
                      "new/a.png")

    done = again()
    said = done.stdout.splitlines()
    assert done.returncode == 0 and said[-1].startswith("new/a.png: 1 images"), done.stderr
    assert pixels(tmp_path / "new/a.png").shape == (64, 64, 3)
    done = again()
    # which kernels, no more
    assert done.returncode == 2 and done.stdout.splitlines() == said[:-1]
    assert done.stderr == "sample.py: --out: new/a.png exists already; take another name\n"
