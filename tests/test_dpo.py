"""Preference tuning: its loss by hand, who gets gradients, pairs of the grader and of files, the script."""
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import assert_close, rng, tiny
from PIL import Image
from test_distill import AffineStudent, batch
from test_train import QUIET, call, main, save_teacher

from ladd import dpo, lora, shapes
from ladd.config import InputError, read_config
from ladd.domain import world_domain


def setting():
    x0, text = batch()
    g = rng(5)
    rejected, eps = (torch.randn(x0.shape, generator=g).double() for _ in range(2))
    return x0, rejected, eps, torch.tensor([0.3, 0.9, 1.0, 0.5]).double(), text


def test_the_loss_by_hand():
    chosen, rejected, eps, sigma, text = setting()
    chosen[0], rejected[0] = rejected[0].clone(), chosen[0].clone()
    model, reference = AffineStudent(), AffineStudent()
    with torch.no_grad():
        reference.a.fill_(0.4)
    loss, stats = dpo.dpo_loss(model, reference, chosen, rejected, eps, sigma, text, 3.0)
    terms, right = [], []
    for i in range(4):
        change = []
        for x0 in (chosen[i], rejected[i]):
            xt, v = (1 - sigma[i]) * x0 + sigma[i] * eps[i], eps[i] - x0
            change.append((0.7 * xt + model.bias - v).square().mean()
                          - (0.4 * xt + reference.bias - v).square().mean())
        margin = -3.0 * (change[0] - change[1])
        terms.append(torch.log1p(torch.exp(-margin))), right.append(float(margin > 0))
    assert_close("loss", loss, torch.stack(terms).mean(), 1e-10)
    assert stats["right"].item() == sum(right) / 4 and 0 < sum(right) < 4
    same, _ = dpo.dpo_loss(reference, reference, chosen, rejected, eps, sigma, text, 3.0)
    assert_close("at the start", same, torch.tensor(2.0).double().log())


def test_gradients_reach_the_lora_alone_and_prefer_the_chosen():
    """A few steps lower the error on the chosen against that on the rejected."""
    chosen, rejected, eps, sigma, text = setting()
    model, reference = (tiny("qk_norm", seed=1).requires_grad_(False) for _ in range(2))
    lora.add(model, 4, 4.0, lora.ALL, rng())
    named = lora.parameters(model)
    optimizer, seen = torch.optim.Adam(named.values(), 3e-3), []
    for _ in range(12):
        loss, stats = dpo.dpo_loss(model, reference, chosen, rejected, eps, sigma, text, 20.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append((loss.item(), stats["right"].item()))
    assert abs(seen[0][0] - np.log(2)) < 1e-6 and seen[-1][0] < 0.5 * seen[0][0] and seen[-1][1] == 1
    assert all(p.grad is None for n in (model, reference) for k, p in n.named_parameters() if k not in named)
    assert all(p.grad is not None for k, p in named.items() if "joint_blocks.2.context_block" not in k)


def test_the_better_sample_is_first_and_ties_are_left_out():
    first, second = torch.arange(4.0).view(4, 1, 1, 1), 10 + torch.arange(4.0).view(4, 1, 1, 1)
    pairs, which = dpo.ranked(torch.tensor([[2, 1], [0, 3], [1, 1], [3, 0]]), first, second)
    assert pairs.flatten(1).tolist() == [[0, 10], [11, 1], [3, 13]] and which.tolist() == [0, 1, 3]


def test_the_grade_counts_stated_attributes():
    g = rng(3)
    scenes = shapes.sample_scenes(64, (64, 64), 1, g)
    codes = shapes.draw_captions(scenes.attributes, g, 0.6)
    latents = shapes.encode(shapes.render(scenes, (64, 64)))
    stated = (codes >= 0).sum(1)
    found = dpo.graded(latents, codes, 1)
    assert (found == stated).float().mean() > 0.95                            # renders show what is stated
    wrong = dpo.graded(latents.roll(1, 0), codes, 1)
    assert wrong.sum() < 0.7 * stated.sum() and (wrong <= stated).all()


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A run of a world's teacher and student."""
    folder = tmp_path_factory.mktemp("dpo")
    save_teacher(folder)
    main(folder, f"--name base --teacher t.safetensors --data-from world --steps 1 {QUIET}")
    return folder


FLAGS = "--run runs/base --prompts 96 --batch 4 --steps 4 --save-every 2 --rank 2 --device cpu"


def test_the_script_ends_with_rows_a_picture_and_a_delta_that_fits_both(home, monkeypatch):
    """Grades by chance here: an untrained teacher's samples would all tie."""
    monkeypatch.setattr(dpo, "graded", lambda x, codes, objects: (x.sum((1, 2, 3)) * 100).long() % 4)
    said = call(home, dpo.main, FLAGS.split())
    out = home / "runs/base/dpo"
    rows = json.loads((out / "report.json").read_text())["rows"]
    assert [(r["model"], r["steps"]) for r in rows] == [
        (name + more, steps) for name, steps in (("teacher", 3), *(("student", k) for k in (4, 2, 1)))
        for more in ("", " + preferences")]
    assert rows[0]["fd"] != rows[1]["fd"] and rows[2]["fd"] != rows[3]["fd"]
    with Image.open(out / "samples.png") as picture:
        assert min(picture.size) > 300
    factors = lora.load(out / "lora.safetensors")
    assert all(f.a.shape[0] == 2 for f in factors.values()) and f"on {len(factors)} layers" in said
    assert any(f.b.any() for f in factors.values())
    shutil.rmtree(out / "checkpoints/step_000004")                            # as if killed after step 2
    call(home, dpo.main, FLAGS.split())
    again = lora.load(out / "lora.safetensors")
    assert all(torch.equal(again[k].b, f.b) and torch.equal(again[k].a, f.a) for k, f in factors.items())


def test_pairs_that_all_tie_are_refused(home, monkeypatch):
    monkeypatch.setattr(dpo, "graded", lambda x, codes, objects: torch.zeros(len(x)))
    with pytest.raises(InputError, match=r"pairs of 32x64|pairs of \d+x\d+: found 0, at least --batch 4"):
        call(home, dpo.main, f"{FLAGS} --out ties".split())


def picture(path: Path, seed: int) -> None:
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (40, 64, 3), dtype=np.uint8)).save(path)


@pytest.mark.parametrize("lines, said", [
    (['{"prompt": "a", "chosen": "a.png", "rejected": "a.png"}'], "found a tie in pair 1, 'a.png' twice"),
    (['{"prompt": "a", "chosen": "a.png", "rejected": "no.png"}'], "found no image .*no.png of pair 1"),
    (['{"prompt": "a", "chosen": "a.png"}'], 'in line 1, {"prompt": "...", "chosen": "...", "rejected"'),
    ([], "found no pair"), (["no json"], "found 'no json' in line 1")])
def test_bad_preference_files_are_one_line(tmp_path, home, lines, said):
    picture(tmp_path / "a.png", 0)
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    config = read_config(home / "runs/base/config.json")
    with pytest.raises(InputError, match=said) as error:
        dpo.read_pairs(tmp_path / "pairs.jsonl", config, world_domain(config), torch.device("cpu"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("flags, said", [
    ("--run nowhere", "nowhere/config.json: found no run's configuration"),
    ("--run runs/base --preferences x.jsonl", "--preferences: found x.jsonl; runs/base is of the built-in"),
    ("--run runs/base --rank 0", "--rank: found 0, at least 1"),
    ("--run runs/base --beta 0", "--beta: found 0.0"),
    ("--run runs/base --stepz 3", "nearest flag is --steps"),
    ("--run runs/other", "found other options (taps), the configuration")])
def test_bad_input_is_one_line(home, flags, said):
    other = home / "runs/other"
    other.mkdir(exist_ok=True)
    stored = json.loads((home / "runs/base/config.json").read_text())
    (other / "config.json").write_text(json.dumps({k: v for k, v in stored.items() if k != "taps"}))
    with pytest.raises(InputError, match=re.escape(said)):
        call(home, dpo.main, flags.split())


def test_several_processes_are_refused(home, monkeypatch):
    """Each would write the others' files."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="torchrun: found 2 processes, one accepted"):
        call(home, dpo.main, FLAGS.split())


def test_a_smaller_student_takes_no_delta(home):
    main(home, f"--name small --teacher t.safetensors --data-from world --steps 1 --student-depth 1 {QUIET}")
    with pytest.raises(InputError, match="found a student of 1 blocks, the teacher's 2 accepted"):
        call(home, dpo.main, "--run runs/small".split())


def test_pairs_of_files_are_encoded_in_the_nearest_size(tmp_path):
    """Both images of a pair in the size of the run nearest to the first's shape, chosen before rejected."""
    pytest.importorskip("diffusers")
    import sd3

    from ladd import encode, images
    from ladd.config import Config
    from ladd.domain import sd3_domain
    folder = sd3.make_folder(tmp_path / "sd3")
    for name, seed in (("a.png", 0), ("b.png", 1)):
        picture(tmp_path / name, seed)                                          # 40 x 64
    (tmp_path / "pairs.jsonl").write_text(
        '{"prompt": "x", "chosen": "b.png", "rejected": "a.png"}\n'
        '{"prompt": "y", "chosen": "a.png", "rejected": "b.png"}\n')
    config, cpu = Config(encoders=str(folder), sizes=("32x64", "64x32")), torch.device("cpu")
    domain = sd3_domain(folder, cpu, "none", 8)
    found = dpo.read_pairs(tmp_path / "pairs.jsonl", config, domain, cpu)
    (x0, ids), = found.buckets.values()
    assert list(found.buckets) == [(4, 8)] and ids.tolist() == [0, 1] and found.prompts == ["x", "y"]
    vae = encode.load_vae(folder, cpu)
    a, b = (encode.encode_images(vae, images.read_image(tmp_path / n, (32, 64))[None] / 127.5 - 1)[0]
            for n in ("a.png", "b.png"))
    assert_close("pair", x0[0], torch.cat([b, a]), 1e-5)
    assert_close("pair", x0[1], torch.cat([a, b]), 1e-5)
