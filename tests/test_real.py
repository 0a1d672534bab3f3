"""Real models end to end, on a tiny random SD3: encode, synthesize, train, sample, in one chain."""
import contextlib
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from unittest import mock

import pytest
import torch

pytest.importorskip("diffusers"), pytest.importorskip("transformers")

import numpy as np
import test_torchrun
import test_train
from conftest import assert_close, rng, run_ranks
from PIL import Image
from safetensors.torch import save_file
from sd3 import JOINT, POOLED, make_folder
from test_train import log_of, refused, rows_of, weights

import kernels
import sample
import train
from ladd import encode, export
from ladd.build import needs_of
from ladd.config import parse_config
from ladd.core.lora import Factors
from ladd.core.mmdit import MMDiT
from ladd.core.sampler import image_noise
from ladd.data.prompts import prompt_plan
from ladd.data.shards import open_folder, read_folder, write_shard, write_text
from ladd.engine import inputs
from ladd.report import sheets
from ladd.report.sheets import contact_sheet
from ladd.sd3 import encoders, lora_files
from ladd.sd3.checkpoint import load_metadata, load_mmdit, save_mmdit
from ladd.sd3.encoders import decode_latents, encode_prompts, load_encoders, load_vae, sd3_codec

ROOT = Path(__file__).parents[1]
# one of them twice
PROMPTS = ["a red circle", "a blue square on gray", "green cross left of yellow circle",
           "large white square", "a red circle"]
SHOWN = ["small red square", "a blue circle right"]
FLAGS = ("--preset sd3-medium --device cpu --precision fp32 --sizes 32x48,48x32 --taps 0,1 "
         "--set head_width=16 --data-size 24 --set shard_size=6 --sample-steps 2 --guidance 3 "
         "--steps 3 --set heads_first=1 --batch 4 --micro-batch 0 --set easy_steps=0 "
         "--set warmup=1 --lr 1e-3 --eval-every 2 --set log_every=1 --save-every 2 "
         "--sample-batch 4 --t5-tokens 6")
GIVEN = "--encoders sd3 --teacher sd3 --prompts prompts.txt"
CPU = "--device cpu --t5-tokens 6"


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with an SD3 pipeline, prompt files, and runs/real, a complete run on them."""
    folder = tmp_path_factory.mktemp("real")
    make_folder(folder / "sd3", "qk_norm")
    (folder / "prompts.txt").write_text("# comment\n" + "\n".join(PROMPTS) + "\n\n")
    (folder / "shown.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in SHOWN))
    call(folder, train.main, f"{FLAGS} --name real --encoders sd3 --teacher sd3 --prompts "
         "prompts.txt --eval-prompts shown.jsonl")
    return folder


def call(folder: Path, main, flags: str | list[str]) -> str:
    return test_train.call(folder, main, flags.split() if isinstance(flags, str) else flags)


def without_report(folder: Path, flags: str) -> str:
    """Run train.py up to its report, which takes half of the time."""
    with mock.patch.object(train, "write_report", lambda *args: None):
        return call(folder, train.main, flags)


@pytest.fixture(autouse=True)
def fp32(monkeypatch):
    monkeypatch.setattr(sample, "compute_dtype", lambda precision, device: torch.float32)


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def naive(home: Path, model, prompts: list[str], sigmas: list[float], seeds: list[int],
          hw: tuple[int, int], guidance: float = 1.0) -> torch.Tensor:
    """Latents by Euler steps written out; text straight from the encoders, in the bf16 that is
    stored."""
    encoders = load_encoders(home / "sd3", torch.device("cpu"), torch.float32, "device", 6)
    words, null = (encode_prompts(encoders, p) for p in (prompts, [""] * len(prompts)))
    words, null = (text.to(torch.bfloat16) for text in (words, null))
    x = torch.stack([torch.randn(16, hw[0] // 8, hw[1] // 8,
                                 generator=torch.Generator().manual_seed(s)) for s in seeds])
    with torch.no_grad():
        for now, then in zip(sigmas, sigmas[1:]):
            v = model(x, torch.full((len(x),), now), *words)
            if guidance != 1:
                v_null = model(x, torch.full((len(x),), now), *null)
                v = v_null + guidance * (v - v_null)
            x = x + (then - now) * v
    return x


# one command

def test_one_command_encodes_generates_distills_and_shows(home):
    run = home / "runs" / "real"
    d = read_folder(run / "data")
    assert d.prompts == PROMPTS[:4]
    assert d.context.shape == (4, 77 + 6, JOINT) and d.pooled.shape == (4, POOLED)
    assert {hw: len(ids) for hw, (_, ids) in d.buckets.items()} == {(4, 6): 12, (6, 4): 12}
    assert (d.provenance["guidance"], d.provenance["steps"]) == (3, 2)
    assert "with T5, 6 tokens" in d.provenance["encoders"]
    lines = [line for line in log_of(run) if "loss_g" in line]
    assert len(lines) == 3 and [line["step"] for line in log_of(run) if "auc" in line]
    rows = rows_of(run)
    assert {(r["model"], r["steps"], r["guidance"]) for r in rows} == {
        ("teacher", 2, 3), ("teacher", 4, 3), ("teacher", 4, 1),
        *((name, k, 1) for k in (4, 2, 1) for name in ("untrained", "student"))}
    report = json.loads((run / "report.json").read_text())
    assert report["n"] == 2 and report["floor"]["fd"] is None and all(r["fd"] is None for r in rows)
    assert (run / "samples" / "000001.png").exists() and Image.open(run / "report.png").width > 600
    changed, teacher = load_mmdit(run).state_dict(), load_mmdit(home / "sd3").state_dict()
    assert any(not torch.equal(changed[k], v) for k, v in teacher.items())


@pytest.mark.slow
def test_two_processes_do_as_one(home):
    """One of them encodes and writes the file of text, both read it."""
    flags = f"{FLAGS} --name two {GIVEN} --eval-prompts shown.jsonl"
    done = subprocess.run(test_torchrun.torchrun(2, str(ROOT / "train.py"), *flags.split()),
                          cwd=home, env=test_torchrun.environment(), capture_output=True, text=True,
                          timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    test_torchrun.same_log(home / "runs/real", home / "runs/two", 2e-3)


def test_the_data_are_the_teachers_guided_samples(home):
    """Of the stored latents two, of different sizes and prompts, against Euler written out."""
    d, teacher = read_folder(home / "runs/real/data"), load_mmdit(home / "sd3")
    sigmas = [1.0, 3 * .5 / 2.0, 0.0]                              # .5 under shift 3
    shards = prompt_plan(PROMPTS, [(32, 48), (48, 32)], 24, 6, 0).shards
    for hw, i in (((4, 6), 1), ((6, 4), 5)):
        x0, ids = d.buckets[hw]
        seed = next(s for s in shards if s.hw == hw).seed + i
        assert d.prompts[ids[i]] == PROMPTS[seed % 5]              # the prompts in turn
        expected = naive(home, teacher, [PROMPTS[seed % 5]], sigmas, [seed], (hw[0] * 8, hw[1] * 8),
                         3)
        error = (x0[torch.tensor([i])].float() - expected).abs().max() / expected.abs().max()
        assert error < 1e-2, error                                 # stored in bf16


def test_the_same_command_again_does_nothing_and_data_can_be_given(home):
    flags = "--encoders sd3 --teacher sd3 --prompts prompts.txt --eval-prompts shown.jsonl"
    before = {p: p.stat().st_mtime_ns for p in (home / "runs/real").rglob("*.safetensors")}
    call(home, train.main, f"{FLAGS} --name real {flags}")
    assert {p: p.stat().st_mtime_ns for p in (home / "runs/real").rglob("*.safetensors")} == before
    without_report(home, f"{FLAGS} --name given {flags} --data runs/real/data")
    one, two = (weights(home / f"runs/{name}/checkpoints/student.safetensors") for name
                in ("real", "given"))
    assert all(torch.equal(one[k], two[k]) for k in one) and not (home / "runs/given/data").exists()


def test_without_eval_prompts_the_first_are_shown_and_t5_can_be_left_out(home):
    flags = f"{FLAGS} --name none --encoders sd3 --teacher sd3 --prompts prompts.txt --t5 none"
    call(home, train.main, f"{flags} --steps 1 --eval-every 0")
    assert json.loads((home / "runs/none/report.json").read_text())["n"] == len(PROMPTS)
    d = read_folder(home / "runs/none/data")
    every = torch.arange(4)
    assert not d.context[every][:, 77:].any() and "without T5" in d.provenance["encoders"]
    assert read_folder(home / "runs/real/data").context[every][:, 77:].any(-1).all()


# sample.py

@pytest.mark.parametrize("steps, sigmas", [(4, [1, .9, .75, .5, 0]), (2, [1, .75, 0]), (1, [1, 0])])
def test_the_student_of_a_run_samples_at_its_levels(home, tmp_path, steps, sigmas):
    out = tmp_path / "o.png"
    flags = f"--run runs/real --steps {steps} --seed 3 --size 32x64 --out {out} {CPU}"
    call(home, sample.main, [*flags.split(), "--prompt", PROMPTS[0]])
    x0 = naive(home, load_mmdit(home / "runs/real"), [PROMPTS[0]], sigmas, [3], (32, 64))
    vae = load_vae(home / "sd3", torch.device("cpu"))
    image = decode_latents(vae, x0)[0].clamp(-1, 1).add(1).mul(127.5).round()
    assert abs(pixels(out) - image.permute(1, 2, 0).numpy()).max() <= 1
    assert pixels(out).std() > 1 and pixels(out).shape == (32, 64, 3)


def test_a_text_cache_needs_no_encoder_the_second_time(home, tmp_path, monkeypatch):
    flags = [*f"--run runs/real --text-cache {tmp_path / 'text.safetensors'} {CPU}".split(),
             "--prompt", PROMPTS[1], "--out"]
    call(home, sample.main, [*flags, str(tmp_path / "a.png")])
    monkeypatch.setattr(encoders, "load_encoders", lambda *args: pytest.fail("encoders are loaded"))
    call(home, sample.main, [*flags, str(tmp_path / "b.png")])
    assert (pixels(tmp_path / "a.png") == pixels(tmp_path / "b.png")).all()
    with refused("text.safetensors must hold text of the encoders .* without T5, 6 tokens ",
                 r"\(got .* with T5, 6 tokens\)$"):
        call(home, sample.main, [*flags, str(tmp_path / "c.png"), "--t5", "none"])


def test_a_published_checkpoint_says_how_to_sample_it_by_its_sizes(home, tmp_path, monkeypatch):
    flags = ("--checkpoint sd3 --encoders sd3 --size 32x32 --prompt red "
             f"--out {tmp_path / 'o.png'} {CPU}")
    with refused("^sd3: an MMDiT of 3 blocks of width 128 without metadata", "train.py",
                 "sd3-medium, sd3.5-medium, sd3.5-large$"):
        call(home, sample.main, flags)
    like = {**sample.PRESETS["sd3.5-large"], "depth": 3, "width": 128, "taps": (0,)}
    monkeypatch.setitem(sample.PRESETS, "sd3.5-large", like)
    call(home, sample.main, flags)
    text = json.loads(Image.open(tmp_path / "o.png").text["ladd"])["columns"][0]
    assert (text["role"], text["steps"], text["guidance"]) == ("teacher", 40, 4.5)
    assert text["sigmas"][20] == pytest.approx(.75) and re.fullmatch(r"[0-9a-f]{10}",
                                                                     text["model_hash"])


def test_compare_and_tiled_decoding(home, tmp_path):
    for name, extra in (("a", ""), ("b", "--tiled")):
        out = tmp_path / f"{name}.png"
        call(home, sample.main, f"--run runs/real --compare --prompt red --out {out} {extra} {CPU}")
    assert pixels(tmp_path / "a.png").shape == pixels(tmp_path / "b.png").shape
    # smaller than a tile
    assert abs(pixels(tmp_path / "a.png") - pixels(tmp_path / "b.png")).max() <= 1


SAVE = ("--run runs/real --model teacher --prompt-file prompts.txt --guidance 3 --shard-size 6 "
        f"--batch 4 {CPU}")


def same_folder(a: Path, b: Path) -> None:
    names = [sorted(p.name for p in folder.iterdir()) for folder in (a, b)]
    assert names[0] == names[1]
    for name in names[0]:
        if name.endswith(".safetensors"):
            one, two = weights(a / name), weights(b / name)
            assert all(torch.equal(one[k], two[k]) for k in one), name
        else:
            assert (a / name).read_text() == (b / name).read_text()


def test_saved_latents_are_those_of_the_training_run(home, tmp_path):
    """sample.py --save-latents and train.py's own stage are one: the same files, byte for byte;
    also resumed after half, and by two processes."""
    flags = f"{SAVE} --steps 2 --size 32x48,48x32"
    call(home, train.main, f"{FLAGS} {GIVEN} --name part --data-size 20 --steps 1 --eval-every 0 "
                           "--set stop_after=1")
    said = call(home, sample.main, f"{flags} --num 4 --save-latents {tmp_path / 'one'}")
    assert "20 latents" in said and said.count("prompts.txt: 1 comments skipped") == 1
    same_folder(home / "runs/part/data", tmp_path / "one")

    shutil.copytree(tmp_path / "one", tmp_path / "half")
    for name in ("00001-6x4.safetensors", "00003-6x4.safetensors", "text-00000.safetensors"):
        next((tmp_path / "half").glob(name.replace("6x4", "*"))).unlink()
    call(home, sample.main, f"{flags} --num 4 --save-latents {tmp_path / 'half'}")
    same_folder(tmp_path / "one", tmp_path / "half")


@pytest.mark.slow
def test_processes_share_the_shards(home, tmp_path):
    flags = f"{SAVE} --steps 2 --size 32x48,48x32 --num 4"
    call(home, sample.main, f"{flags} --save-latents {tmp_path / 'one'}")

    def run() -> None:
        os.chdir(home)
        sample.main([*flags.split(), "--save-latents", str(tmp_path / "two")])

    said = run_ranks(2, run, tmp_path)
    same_folder(tmp_path / "one", tmp_path / "two")
    assert said.count("20 latents") == 1


def test_a_prompt_meets_every_size():
    """Also where the shards of one round of prompts are a multiple of the sizes."""
    for prompts, shard in ((12, 2), (5, 6), (6, 3), (4, 1)):
        names, sizes = [f"{i}" for i in range(prompts)], [(16, 16), (16, 32), (32, 16)]
        p = prompt_plan(names, sizes, 90, shard, 7)
        seen = {(int(i), s.hw) for s in p.shards for i in s.prompt_id}
        assert len(seen) == 3 * prompts and sum(len(s.prompt_id) for s in p.shards) == 90
        assert [s.seed for s in p.shards] == [7 + i for i in range(0, 90, shard)]


def test_images_with_captions_are_data_too(home):
    folder = home / "images"
    folder.mkdir(exist_ok=True)
    g = np.random.default_rng(0)
    for i in range(24):
        size = (48, 32) if i % 2 else (32, 48)
        Image.fromarray(g.integers(0, 255, (*size, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(PROMPTS[i % 4])
    call(home, encode.main, "--encoders sd3 --images images --out own --area 1536 --multiple 16 "
         "--device cpu --t5-tokens 6 --shard-size 6 --batch 4")
    assert set(read_folder(home / "own").buckets) == {(4, 6), (6, 4)}
    without_report(home, f"{FLAGS} --name own --encoders sd3 --teacher sd3 --data own --steps 1 "
                         "--eval-prompts shown.jsonl --eval-every 0")
    assert len([line for line in log_of(home / "runs/own") if "loss_g" in line]) == 1


# editing and inpainting

ASKED = "make it red", "to the right", "large"
ENCODE = ("--encoders sd3 --area 1536 --multiple 16 --device cpu --t5-tokens 6 --shard-size 6 "
          "--batch 4")
LEARN = ("--encoders sd3 --base sd3 --pairs {0} --task {0} --teacher-steps 2 --teacher-batch 4 "
         "--teacher-lr 1e-2 --steps 2")


@pytest.fixture(scope="module")
def folders(home) -> Path:
    """edit: 24 pairs of two sizes; inpaint: their targets, masked."""
    g, pairs, listed = np.random.default_rng(0), [], []
    (home / "pictures").mkdir()
    for i in range(24):
        size = (48, 32) if i % 2 else (32, 48)
        for role in "st":
            picture = Image.fromarray(g.integers(0, 255, (*size, 3), dtype=np.uint8))
            picture.save(home / "pictures" / f"{i}{role}.png")
        source, target = (f"pictures/{i}{role}.png" for role in "st")
        pairs.append({"source": source, "target": target, "instruction": ASKED[i % 3]})
        listed.append({"image": target, "caption": PROMPTS[i % 3]})
    for name, lines in (("edit", pairs), ("inpaint", listed)):
        (home / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        call(home, encode.main, f"{ENCODE} --task {name} --jsonl {name}.jsonl --out {name}")
    return home


def learn(home: Path, task: str, more: str) -> str:
    return call(home, train.main, f"{FLAGS} {LEARN.format(task)} {more}")


@pytest.fixture(scope="module")
def edited(folders) -> tuple[Path, list[dict]]:
    """runs/edit, from pairs to the report, and the columns of each contact sheet."""
    return folders / "runs" / "edit", sheets_of(folders, "edit", "--image-guidance 1.5 --name edit")


def sheets_of(home: Path, task: str, more: str) -> list[dict]:
    with mock.patch.object(sheets, "contact_sheet", wraps=contact_sheet) as drawn:
        learn(home, task, more)
    return [each.args[0] for each in drawn.call_args_list]


@pytest.mark.parametrize("task, more, parts", [
    ("edit", "--t5-tokens 8", (
        "^edit: text must come from .*, 8 tokens ", r"\(got .*, 6 tokens\)",
        "give the same --encoders, --t5 and --t5-tokens$")),
    ("edit", "--data-size 11 --set shard_size=11 --sizes 32x48",
     (r"^--data-size must be at least 22, .* edit \(got 11\)$",)),
    ("edit", "--pairs inpaint",
     (r"^inpaint: latents for --task edit must have 16 image channels \(got 17\)$",)),
    ("edit", "--teacher-batch 11",
     (r"^edit: latents of 4x6 must be at least 11, a batch, and 2 held out \(got 12\)$",)),
    ("inpaint", "--base runs/edit/checkpoints/teacher.safetensors",
     ("teacher.safetensors: in_channels must be 16 or 33 for --task inpaint", r"\(got 32\)$"))])
def test_pairs_that_do_not_fit_are_refused_before_a_run_is_made(folders, edited, task, more, parts):
    with refused(*parts):
        learn(folders, task, f"{more} --name bad")
    assert not (folders / "runs/bad").exists()


@pytest.mark.parametrize("task, channels", [("edit", 32), ("inpaint", 33)])
def test_a_teacher_starts_as_its_base_whatever_the_image(home, task, channels):
    flags = f"{FLAGS} {LEARN.format(task)}"
    with contextlib.chdir(home):
        config = parse_config(flags.split())
        sizes, tensors = inputs.start_of(needs_of(config), config.base, config.seed,
                                         kernels.load("torch"))
    base, start = load_mmdit(home / "sd3"), MMDiT(sizes, kernels.load("torch"))
    start.load_state_dict(tensors)
    assert sizes.in_channels == channels and sizes.out_channels == 16
    g = rng(7)
    draw = lambda *size: torch.randn(*size, generator=g)
    x, sigma, context, pooled = draw(2, 16, 4, 6), torch.tensor([.3, .9]), draw(2, 83,
                                                                                JOINT), draw(2,
                                                                                             POOLED)
    with torch.no_grad():
        expected = base(x, sigma, context, pooled)
        for scale in (0, 1, 100):
            image = scale * draw(2, channels - 16, 4, 6)
            assert_close(f"{scale}", start(x, sigma, context, pooled, image), expected)


def test_pairs_become_an_editing_student_and_its_report(folders, edited):
    run, sheets = edited
    teacher, student = (load_mmdit(run / f"checkpoints/{n}.safetensors") for n
                        in ("teacher", "student"))
    weight = [model.x_embedder.proj.weight for model
              in (load_mmdit(folders / "sd3"), teacher, student)]
    assert [w.shape[1] for w in weight] == [16, 32, 32] and student.config.out_channels == 16
    assert weight[1][:, 16:].abs().max() > 1e-3                    # two steps have seen the sources
    assert not torch.equal(weight[1][:, :16], weight[0]) and not torch.equal(weight[2], weight[1])
    lines = log_of(run)
    assert [line["step"] for line in lines if line["stage"] == "teacher"] == [1, 2]
    assert len([line for line in lines if "loss_g" in line]) == 2
    nfe = {(r["model"], r["steps"], r["guidance"]): r["nfe"] for r in rows_of(run)}
    assert nfe["teacher", 2, 3] == 6 and nfe["teacher", 4, 1] == 4 and nfe["student", 2, 1] == 2
    assert json.loads((run / "report.json").read_text())["n"] == 4 and (run / "report.png").exists()
    pairs, vae = read_folder(folders / "edit"), load_vae(folders / "sd3", torch.device("cpu"))
    held = torch.tensor([10, 11])                                  # of the twelve of each size
    sources = [x for hw in ((4, 6), (6, 4)) for x in decode_latents(vae, pairs.images[hw][held])]
    assert len(sheets) == 3 and "teacher 2 x 3" in sheets[-1]      # two grids and the report
    for columns in sheets:
        assert list(columns)[0] == "source" and {len(column) for column in columns.values()} == {4}
        for shown, source in zip(columns["source"], sources):
            assert_close("source", shown, source)


def test_held_out_pairs_never_train_the_teacher(folders, monkeypatch):
    """A batch of ten is all that remains of the twelve of a size without the last two."""
    shown, flow_loss = {}, train.flow_loss

    def spied(model, x0, *rest):
        shown[tuple(x0.shape[2:])] = {tuple(x.flatten().tolist()) for x in x0}
        return flow_loss(model, x0, *rest)
    monkeypatch.setattr(train, "flow_loss", spied)
    learn(folders, "edit", "--teacher-batch 10 --steps 0 --name held")
    kept = {hw: {tuple(x.flatten().tolist()) for x in x0[torch.arange(10)].float()}
            for hw, (x0, _) in read_folder(folders / "edit").buckets.items()}
    assert len(shown) == 2 and shown == kept


def test_the_data_are_edits_of_the_pairs_sources(folders, edited):
    """Sources in order without the held-out ones; of the latents one of each size, against three
    evaluations a step written out (InstructPix2Pix, Eq. 3)."""
    run, pairs, sigmas = edited[0], read_folder(folders / "edit"), (1.0, 3 * .5 / 2.0, 0.0)
    d, teacher = read_folder(run / "data"), load_mmdit(run / "checkpoints/teacher.safetensors")
    assert d.provenance["image_guidance"] == 1.5 and d.provenance["guidance"] == 3
    encoders = load_encoders(folders / "sd3", torch.device("cpu"), torch.float32, "device", 6)
    embed = lambda words: [t.bfloat16().float() for t in encode_prompts(encoders, [words], 1)[:2]]
    # shards of six, the sizes in turn
    for hw, i, seed in (((4, 6), 1, 1), ((6, 4), 5, 11)):
        x0, ids = d.buckets[hw]
        rows = torch.arange(12) % 10                               # two of the twelve are held out
        assert torch.equal(ids, pairs.buckets[hw][1][rows])
        assert torch.equal(d.images[hw][torch.arange(12)], pairs.images[hw][rows].bfloat16())
        image, text, null = pairs.images[hw][rows[i:i
                                                  + 1]].float(), embed(d.prompts[ids[i]]), embed("")
        x = image_noise([seed], (16, *hw))
        for now, then in zip(sigmas, sigmas[1:]):
            with torch.no_grad():
                full, bare, none = (teacher(x, torch.tensor([now]), *words, beside) for words,
                                    beside in ((text, image), (null, image), (null,
                                                                              torch.zeros_like(
                                                                                  image))))
            x = x + (then - now) * (none + 1.5 * (bare - none) + 3 * (full - bare))
        error = (x0[torch.tensor([i])].float() - x).abs().max() / x.abs().max()
        assert error < 1e-2, error                                 # stored in bf16


def shows_holes(home: Path, columns: dict) -> None:
    """What the mask keeps is the source's in every column; what it repaints is striped in the
    first."""
    d, vae = read_folder(home / "inpaint"), load_vae(home / "sd3", torch.device("cpu"))
    held, first, *others = torch.tensor([10, 11]), *columns
    whole = [x for hw in ((4, 6), (6, 4))
             for x in decode_latents(vae, d.buckets[hw][0][held].float())]
    masks = [m for hw in ((4, 6), (6, 4)) for m in d.images[hw][held][:, 0].bool()]
    assert first == "to repaint" and len(others) == 5 and sum(int((~m).sum()) for m in masks) > 0
    for i, (picture, cells) in enumerate(zip(whole, masks)):
        mask = cells.repeat_interleave(8, 0).repeat_interleave(8, 1)
        assert columns[first][i][:, mask].abs().sub(.4).abs().max() < 1e-6
        for name in others:
            shown = columns[name][i]
            assert_close(name, shown[:, ~mask], picture[:, ~mask])
            assert (shown[:, mask] - picture[:, mask]).abs().mean() > .01


@pytest.mark.slow
@pytest.mark.parametrize("task", ["edit", "inpaint"])
def test_a_run_from_real_images_goes_on_after_a_stop_in_each_stage(folders, task):
    """--set stop_after=1 stops after each step of the teacher, of the heads and of the student."""
    columns = sheets_of(folders, task, f"--name whole-{task}")[-1]
    if task == "inpaint":
        shows_holes(folders, columns)
    said = [learn(folders, task, f"--name parts-{task} --set stop_after=1") for _ in range(6)]
    stops = [re.search(r"saved step (\d) in \S*/(\w+)", text) for text in said]
    assert [stop and stop.groups() for stop in stops] == [("1", "teacher"), ("2", "teacher"),
                                                          ("1", "distill"), ("2", "distill"),
                                                          ("3", "distill"), None], said
    for name in ("teacher", "student"):
        one, two = (weights(folders / f"runs/{kind}-{task}/checkpoints/{name}.safetensors")
                    for kind in ("whole", "parts"))
        assert all(torch.equal(one[key], two[key]) for key in one), name
        assert one["x_embedder.proj.weight"].shape[1] == {"edit": 32, "inpaint": 33}[task]
    same_folder(folders / f"runs/whole-{task}/data", folders / f"runs/parts-{task}/data")
    assert (folders / f"runs/parts-{task}/report.png").exists()


def test_the_exported_student_generates_the_same_image_in_diffusers(home, tmp_path):
    """The end of the chain: the image of sample.py, from the exported folder, by diffusers, without
    noise levels."""
    from diffusers import StableDiffusion3Pipeline
    call(home, export.main, f"runs/real --layout pipeline --base sd3 --out {tmp_path / 'turbo'}")
    assert "max_sequence_length=6," in (tmp_path / "turbo" / "README.md").read_text()
    pipe = StableDiffusion3Pipeline.from_pretrained(tmp_path / "turbo", local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    for steps in (4, 2, 1):
        image = pipe(PROMPTS[0], height=32, width=64, num_inference_steps=steps, guidance_scale=0,
                     latents=image_noise([3], (16, 4, 8)), max_sequence_length=6,
                     output_type="np").images[0]
        out = tmp_path / f"{steps}.png"
        # the T5 tokens are the checkpoint's
        flags = f"--run runs/real --steps {steps} --seed 3 --size 32x64 --out {out} --device cpu"
        call(home, sample.main, [*flags.split(), "--prompt", PROMPTS[0]])
        difference = abs(pixels(out) - 255 * image)
        assert difference.max() < 4 and difference.mean() < .6      # our text is stored in bf16


def test_a_lora_of_the_teacher_is_sampled_and_exported(home, tmp_path):
    """load_lora_weights of diffusers and --lora of both commands."""
    pytest.importorskip("peft")
    from diffusers import StableDiffusion3Pipeline
    model, lora = load_mmdit(home / "sd3"), tmp_path / "style.safetensors"
    g = torch.Generator().manual_seed(0)
    layers = {f"joint_blocks.{i}.x_block.attn.qkv": Factors(
        torch.randn(4, 128, generator=g), torch.randn(384, 4, generator=g), 2.0)
        for i in range(3)}
    lora_files.save(lora, layers, model.config)
    call(home, export.main, f"runs/real --lora {lora}:0.5 --out {tmp_path / 'merged.safetensors'}")
    call(home, export.main, f"runs/real --layout pipeline --base sd3 --out {tmp_path / 'turbo'}")
    pipe = StableDiffusion3Pipeline.from_pretrained(tmp_path / "turbo", local_files_only=True)
    pipe.load_lora_weights(str(tmp_path), weight_name=lora.name)
    pipe.set_adapters("default_0", 0.5)
    image = pipe(PROMPTS[0], height=32, width=64, num_inference_steps=4, guidance_scale=0,
                 latents=image_noise([3], (16, 4, 8)), max_sequence_length=6,
                 output_type="np").images[0]
    flags = "--seed 3 --size 32x64 --device cpu --prompt".split() + [PROMPTS[0], "--out"]
    for name, source in (("a", f"--run runs/real --lora {lora}:0.5"), ("plain", "--run runs/real"),
                         ("b", f"--checkpoint {tmp_path}/merged.safetensors --encoders sd3")):
        call(home, sample.main, [*source.split(), *flags, str(tmp_path / f"{name}.png")])
    assert (pixels(tmp_path / "a.png") == pixels(tmp_path / "b.png")).all()
    difference = abs(pixels(tmp_path / "a.png") - 255 * image)
    assert difference.max() < 4 and difference.mean() < .6
    assert abs(pixels(tmp_path / "a.png") - pixels(tmp_path / "plain.png")).mean() > 2


def test_a_teacher_that_is_not_finite_is_named_before_a_run_is_made(home, folders):
    shutil.copytree(home / "sd3", home / "nan", ignore=shutil.ignore_patterns("text*", "vae"))
    file = next((home / "nan/transformer").glob("*.safetensors"))
    tensors, name = weights(file), "transformer_blocks.1.ff.net.2.weight"
    tensors[name][7, 7] = float("nan")
    save_file(tensors, file)
    for flags in (f"{FLAGS} --name nan {GIVEN}".replace("teacher sd3", "teacher nan"),
                  f"{FLAGS} --name nan {LEARN.format('edit')}".replace("base sd3", "base nan")):
        with refused(rf"transformer/{file.name}: {name} must be finite \(got NaN or inf\)$"):
            call(home, train.main, flags)
        assert not (home / "runs/nan").exists()
    shutil.rmtree(home / "nan")


# bad input

BAD = {"no encoders": ("train", "--teacher sd3 --prompts prompts.txt",
                       r"missing: --encoders; only --dry-run"),
       "no folder": ("train", "--teacher sd3 --prompts prompts.txt --encoders nowhere",
                     r"nowhere must be a StableDiffusion3 pipeline folder "
                     r"\(got no text_encoder\)$"),
       "no prompts": ("train", "--teacher sd3 --encoders sd3 --prompts nowhere.txt",
                      "nowhere.txt: cannot be read"),
       "no teacher": ("train", "--teacher nowhere --encoders sd3 --prompts prompts.txt",
                      "nowhere does not"),
       "few taps": ("train", f"{GIVEN} --taps 5",
                    "^sd3: --taps 5 .*must fit a teacher of depth 3$"),
       "too large": ("train", f"{GIVEN} --sizes 512x512",
                     r"^sd3: the position table must have at least 32 patches "
                     r".*--sizes \(got 12\)$"),
       "other text": ("train", "--teacher sd3 --encoders wide --prompts prompts.txt",
                      r"^--encoders wide: text must have widths \(96, 80\).*\(got \(96, 64\)\)$"),
       "world's data": ("train", f"{GIVEN} --data thin",
                        r"^thin: text must have widths \(96, 80\) .*\(got \(4, 4\)\)$"),
       "sample without": ("sample", "--checkpoint sd3 --prompt red --out o.png",
                          r"^--encoders must be a folder with SD3's text encoders and VAE for "
                          r"sd3.*\(got none\)$"),
       "sample size": ("sample", "--run runs/real --prompt red --size 32x40 --out o.png",
                       r"^--size must be multiples of 16, .*\(got 32x40\)$"),
       "sample large": ("sample", "--run runs/real --prompt red --size 512x512 --out o.png",
                        r"^--size must be at most 192x192 for .*\(got 512x512\)$"),
       "two sizes": ("sample", "--run runs/real --prompt red --size 32x32,32x48 --out o.png",
                     r"^--size must be one size \(got 32x32,32x48\)$"),
       "student's data": ("sample", "--run runs/real --prompt red --save-latents new",
                          r"^--save-latents requires --model teacher \(got a student\)$"),
       "out beside": ("sample", f"{SAVE} --save-latents new --out o.png",
                      r"^--save-latents must be used without the options of images \(got --out\)$"),
       "another run's": ("sample", f"{SAVE} --save-latents runs/real/data", "take another folder"),
       "another size": ("sample", f"{SAVE} --steps 2 --num 4 --size 48x48 --save-latents thin",
                        "other folder"),}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_and_nothing_is_written(home, case):
    script, flags, message = BAD[case]
    if not (home / "wide").exists():
        shutil.copytree(home / "sd3", home / "wide")
        path = home / "wide/text_encoder_2/config.json"
        path.write_text(path.read_text().replace('"projection_dim": 48', '"projection_dim": 32'))
        zeros = torch.zeros(3, 4)
        open_folder(home / "thin", {}, ["a"], torch.zeros(1, 1), (zeros, zeros[0]))
        write_text(home / "thin", 0, zeros[None], zeros[:1])
        write_shard(home / "thin", 0, torch.zeros(9, 16, 4, 6), torch.zeros(9).long())
    before = {p: p.stat().st_mtime_ns for p in home.rglob("*")}
    flags = f"{FLAGS} --name bad {flags}" if script == "train" else f"{flags} {CPU}"
    with refused(message):
        call(home, (train if script == "train" else sample).main, flags)
    assert {p: p.stat().st_mtime_ns for p in home.rglob("*")} == before


def test_the_worlds_networks_take_no_encoders(home, tmp_path):
    with refused("^--encoders must be left out for .*w.safetensors",
                 r"a network of the toy dataset \(got sd3\)$"):
        metadata = {**load_metadata(home / "runs/real"), "domain": "toy"}
        save_mmdit(load_mmdit(home / "runs/real"), tmp_path / "w.safetensors", metadata)
        path = tmp_path / "w.safetensors"
        call(home, sample.main, f"--checkpoint {path} --encoders sd3 --prompt red --out o.png")


def test_encoders_are_loaded_when_needed_and_released(home, monkeypatch):
    loads = []
    load = load_encoders
    monkeypatch.setattr(encoders, "load_encoders", lambda *args: loads.append(args) or load(*args))
    d = sd3_codec(home / "sd3", torch.device("cpu"), "device", 6)
    one = d.text(["a red circle", ""])
    assert torch.equal(d.text([""]).pooled[0], one.pooled[1]) and len(loads) == 1
    d.release()
    assert torch.equal(d.text(["a red circle"]).context[0], one.context[0]) and len(loads) == 1
    d.fresh_text(["a red circle"])
    assert len(loads) == 2 and d.widths == (JOINT, POOLED)
