"""Preference tuning: its loss by hand, who gets gradients, pairs of the grader and of files, the
script."""
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import assert_close, rng, tiny
from PIL import Image
from test_losses import AffineStudent, batch
from test_train import QUIET, call, main, save_teacher

from ladd import dpo
from ladd.cli import InputError
from ladd.build import read_config
from ladd.core import lora
from ladd.data import images
from ladd.sd3 import encoders, lora_files
from ladd.sd3.encoders import sd3_codec
from ladd.toy import captions
from ladd.toy.prompts import toy_codec
from ladd.toy.scenes import ToyConfig, encode, render, sample_scenes


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
    assert abs(seen[0][0] - np.log(2)) < 1e-6
    assert seen[-1][0] < 0.5 * seen[0][0] and seen[-1][1] == 1
    assert all(p.grad is None for n in (model, reference) for k, p in n.named_parameters() if k
               not in named)
    assert all(p.grad is not None for k, p in named.items() if "joint_blocks.2.context_block"
               not in k)


def test_the_better_sample_is_first_and_ties_are_left_out():
    first, second = torch.arange(4.0).view(4, 1, 1, 1), 10 + torch.arange(4.0).view(4, 1, 1, 1)
    pairs, which = dpo.ranked(torch.tensor([[2, 1], [0, 3], [1, 1], [3, 0]]), first, second)
    assert pairs.flatten(1).tolist() == [[0, 10], [11, 1], [3, 13]] and which.tolist() == [0, 1, 3]


def test_the_grade_counts_stated_attributes():
    g = rng(3)
    scenes = sample_scenes(64, (64, 64), 1, g)
    codes = captions.draw_captions(scenes.attributes, g, 0.6)
    latents = encode(render(scenes, (64, 64)))
    stated = (codes >= 0).sum(1)
    found = dpo.graded(latents, codes, 1)
    # renders show what is stated
    assert (found == stated).float().mean() > 0.95
    wrong = dpo.graded(latents.roll(1, 0), codes, 1)
    assert wrong.sum() < 0.7 * stated.sum() and (wrong <= stated).all()


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder whose runs/base has a teacher and a student."""
    folder = tmp_path_factory.mktemp("dpo")
    save_teacher(folder)
    main(folder, f"--name base --teacher t.safetensors --data toy --steps 1 {QUIET}", report=True)
    return folder


FLAGS = "--run runs/base --prompts 96 --batch 4 --steps 4 --save-every 2 --rank 2 --device cpu"


def test_the_script_ends_with_rows_a_picture_and_a_delta_that_fits_both(home, monkeypatch):
    """Grades by chance here: an untrained teacher's samples would all tie."""
    monkeypatch.setattr(dpo, "graded", lambda x, codes,
                        objects: (x.sum((1, 2, 3)) * 100).long() % 4)
    said = call(home, dpo.main, FLAGS.split())
    out = home / "runs/base/dpo"
    rows = json.loads((out / "report.json").read_text())["rows"]
    assert [(r["model"], r["steps"]) for r in rows] == [(name + more, steps) for name, steps
                                                        in (("teacher", 3),
                                                            *(("student", k) for k in (4, 2, 1)))
                                                        for more in ("", " + preferences")]
    # without the delta the rows are those of the run, which measured the same prompts and seeds
    run = json.loads((home / "runs/base/report.json").read_text())["rows"]
    fds = {(r["model"], r["steps"], r["guidance"]): r["fd"] for r in run}
    for plain, tuned in zip(rows[::2], rows[1::2]):
        assert plain["fd"] == fds[plain["model"], plain["steps"], plain["guidance"]] != tuned["fd"]
    with Image.open(out / "samples.png") as picture:
        assert min(picture.size) > 300
    factors = lora_files.load(out / "lora.safetensors")
    assert all(f.a.shape[0] == 2 for f in factors.values()) and f"on {len(factors)} layers" in said
    assert any(f.b.any() for f in factors.values())
    # as if killed after step 2
    shutil.rmtree(out / "checkpoints/step_000004")
    call(home, dpo.main, FLAGS.split())
    again = lora_files.load(out / "lora.safetensors")
    assert all(torch.equal(again[k].b, f.b) and torch.equal(again[k].a, f.a) for k, f
               in factors.items())
    # other flags are refused before the pairs are made, which takes minutes
    monkeypatch.setattr(dpo, "toy_pairs", None)
    with pytest.raises(InputError, match="began with another beta; use the same"):
        call(home, dpo.main, f"{FLAGS} --beta 2".split())


def test_the_learning_rate_is_warmed_up(home, monkeypatch):
    """Adam's first step moves every value by the learning rate, whatever the size of its gradient:
    a twentieth of --lr."""
    monkeypatch.setattr(dpo, "graded", lambda x, codes,
                        objects: (x.sum((1, 2, 3)) * 100).long() % 4)
    monkeypatch.setattr(dpo, "write_toy_report", lambda *args: None)
    call(home, dpo.main, f"{FLAGS} --steps 1 --lr 1e-2 --out first".split())
    moved = torch.cat([f.b.flatten() for f
                       in lora_files.load(home / "first/lora.safetensors").values()])
    assert moved.abs().max().item() == pytest.approx(1e-2 / 20, rel=0.01)
    rates = []

    class Adam(dpo.AdamW):
        def step(self):
            rates.append(self.lr)
            return super().step()

    monkeypatch.setattr(dpo, "AdamW", Adam)
    call(home, dpo.main, f"{FLAGS} --steps 22 --lr 1e-2 --out warm".split())
    assert rates == pytest.approx([1e-2 * min(20, i + 1) / 20 for i in range(22)])


def test_pairs_that_all_tie_are_refused(home, monkeypatch):
    monkeypatch.setattr(dpo, "graded", lambda x, codes, objects: torch.zeros(len(x)))
    said = r"^pairs of (32x64|64x32) images must be at least --batch, 4 \(got 0\)$"
    with pytest.raises(InputError, match=said):
        call(home, dpo.main, f"{FLAGS} --out ties".split())


def picture(path: Path, seed: int) -> None:
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (40, 64, 3),
                                                         dtype=np.uint8)).save(path)


@pytest.mark.parametrize("lines, said", [
    (['{"prompt": "a", "chosen": "a.png", "rejected": "a.png"}'],
     r"pair 1 must be of two images \(got 'a.png' twice\)"),
    (['{"prompt": "a", "chosen": "a.png", "rejected": "no.png"}'],
     r"pair 1 must be of existing files \(got .*no.png\)"),
    (['{"prompt": "a", "chosen": "a.png"}'],
     r'line 1 must be \{"prompt": "...", "chosen": "...", "rejected": "..."\} \(got .*a\.png'),
    ([], "pairs.jsonl: it has no pair"),
    (["no json"], r"line 1 must be .* \(got 'no json'\)")])
def test_bad_preference_files_are_one_line(tmp_path, home, lines, said):
    picture(tmp_path / "a.png", 0)
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    config = read_config(home / "runs/base")
    with pytest.raises(InputError, match=said) as error:
        dpo.read_pairs(tmp_path / "pairs.jsonl", config.encoders, config.hw,
                       toy_codec(config.group(ToyConfig)), torch.device("cpu"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("flags, said", [
    ("--run nowhere", "nowhere/config.json: not a complete JSON file ("),
    ("--run runs/base --preferences x.jsonl",
     "--preferences must be left out for a run on the toy dataset, runs/base (got x.jsonl)"),
    ("--run runs/base --out runs/base", "--out must not be the folder of a run (got runs/base)"),
    ("--run runs/base --out runs/base/samples/../checkpoints", "must not be the folder of a run"),
    ("--run runs/base --rank 0", "--rank must be 1 to 1000000000 (got 0)"),
    ("--run runs/base --lr nan", "--lr must be 1e-09 to 1 (got nan)"),
    ("--run runs/base --alpha inf", "--alpha must be 1e-09 to 1000000 (got inf)"),
    ("--run runs/base --n 5", "--n must be at least 6 (got 5)"),
    ("--run runs/base --beta 0", "--beta must be 1e-09 to 1000000 (got 0.0)"),
    ("--run runs/base --stepz 3", "nearest flag is --steps"),
    ("--run runs/other",
     "runs/other/config.json: made by another version of train.py (taps); use the version that")])
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
    with pytest.raises(InputError, match=r"torchrun must start 1 process of ladd\.dpo \(got 2\)"):
        call(home, dpo.main, FLAGS.split())


def test_a_smaller_student_takes_no_delta(home):
    main(home, "--name small --teacher t.safetensors --data toy --steps 1 --student-depth 1 "
               f"{QUIET}")
    with pytest.raises(InputError, match=r"must have the teacher's 2 blocks, .*\(got 1\)"):
        call(home, dpo.main, "--run runs/small".split())


def test_pairs_of_files_are_encoded_in_the_nearest_size(tmp_path):
    """Both images of a pair in the size of the run nearest to the first's shape, chosen before
    rejected."""
    pytest.importorskip("diffusers")
    import sd3
    folder = sd3.make_folder(tmp_path / "sd3")
    for name, seed in (("a.png", 0), ("b.png", 1)):
        picture(tmp_path / name, seed)                                          # 40 x 64
    (tmp_path / "pairs.jsonl").write_text(
        '{"prompt": "x", "chosen": "b.png", "rejected": "a.png"}\n'
        '{"prompt": "y", "chosen": "a.png", "rejected": "b.png"}\n')
    sizes, cpu = ((32, 64), (64, 32)), torch.device("cpu")
    codec = sd3_codec(folder, cpu, "none", 8)
    found = dpo.read_pairs(tmp_path / "pairs.jsonl", str(folder), sizes, codec, cpu)
    (x0, ids), = found.buckets.values()
    assert list(found.buckets) == [(4, 8)] and ids.tolist() == [0, 1] and found.prompts == ["x",
                                                                                            "y"]
    vae = encoders.load_vae(folder, cpu)
    pixels = (images.read_image(tmp_path / n, (32, 64)) for n in ("a.png", "b.png"))
    a, b = (encoders.encode_images(vae, p[None] / 127.5 - 1)[0] for p in pixels)
    assert_close("pair", x0[0], torch.cat([b, a]), 1e-5)
    assert_close("pair", x0[1], torch.cat([a, b]), 1e-5)
    (tmp_path / "b.png").write_text("no image")
    with pytest.raises(InputError, match="pairs.jsonl: .*b.png and .*a.png: not a complete image"):
        dpo.read_pairs(tmp_path / "pairs.jsonl", str(folder), sizes, codec, cpu)
