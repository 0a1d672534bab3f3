"""Consistency distillation: loss by hand, who gets gradients, what a step draws, the command."""
import json
import math
import os
import re
import shutil
import signal
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import assert_close, fork, has_ended, rng, script, tiny
from PIL import Image
from test_losses import AffineStudent, batch
from test_train import (QUIET, assert_same, call, load_state, main, refused, save_teacher,
                        stamps, wait_for, weights)

import sample
from ladd import lcm
from ladd.build import read_config
from ladd.core import flow
from ladd.core.mmdit import Text
from ladd.data import shards
from ladd.engine.optimizer import CLIP
from ladd.engine.step import BETA1
from ladd.lcm import HUBER, draw_parts, lcm_loss
from ladd.report.sheets import ROW
from ladd.sd3 import checkpoint, lora_files

LEVELS = flow.euler_sigmas(4, 2.0).double()                                # 1 .857 .667 .4 0


class Reader(torch.nn.Module):
    """v = 3 x + sigma + the mean of its text + the image."""

    def forward(self, x, sigma, context, pooled, image=None):
        image = 0 if image is None else image
        return 3 * x + (sigma + context.mean((1, 2)) + pooled.mean(1)).view(-1, 1, 1, 1) + image


def setting():
    x0, text = batch()
    g = rng(4)
    eps = torch.randn(x0.shape, generator=g).double()
    null = Text(torch.randn(5, 24, generator=g).double(), torch.randn(20, generator=g).double())
    return x0, text, null, eps, LEVELS[torch.tensor([0, 3, 1, 2])]


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_the_loss_by_hand(guidance):
    """Guided Euler step of the teacher, target by the EMA at the next level; at 0 the path's
    end."""
    x0, text, null, eps, sigma = setting()
    student, ema, teacher = AffineStudent(), AffineStudent(), Reader()
    with torch.no_grad():
        ema.a.fill_(0.2)
    loss = lcm_loss(student, ema, teacher, x0, text, null, eps, sigma, LEVELS, guidance)
    reads = lambda t, i: (t.context[i] if t is text else t.context).mean() + (
        t.pooled[i] if t is text else t.pooled).mean()
    terms = []
    for i, k in enumerate((0, 3, 1, 2)):
        now, then = LEVELS[k].item(), LEVELS[k + 1].item()
        xt = (1 - now) * x0[i] + now * eps[i]
        mean = reads(null, i) + guidance * (reads(text, i) - reads(null, i))
        xs = xt + (then - now) * (3 * xt + now + mean)
        target = xs if then == 0 else xs - then * (0.2 * xs + ema.bias)
        x0_hat = xt - now * (0.7 * xt + student.bias)
        terms.append(((x0_hat - target).square().mean() + HUBER ** 2).sqrt() - HUBER)
    assert_close("loss", loss, torch.stack(terms).mean(), 1e-10)
    assert LEVELS[-1] == 0 and loss.requires_grad


@pytest.mark.parametrize("guidance, image_guidance", [(1.0, 1.0), (2.5, 1.0), (2.5, 1.5)])
def test_the_loss_by_hand_with_an_image(guidance, image_guidance):
    """Student, EMA and teacher read it; only the term without it, of image guidance, does not."""
    x0, text, null, eps, sigma = setting()
    student, ema = AffineStudent(), AffineStudent()
    with torch.no_grad():
        ema.a.fill_(0.2)
    text = text._replace(image=torch.randn(x0.shape, generator=rng(5)).double())
    loss = lcm_loss(student, ema, Reader(), x0, text, null, eps, sigma, LEVELS, guidance,
                    image_guidance)
    plain = null.context.mean() + null.pooled.mean()
    terms = []
    for i, k in enumerate((0, 3, 1, 2)):
        now, then, image = LEVELS[k].item(), LEVELS[k + 1].item(), text.image[i]
        xt = (1 - now) * x0[i] + now * eps[i]
        said = plain + guidance * (text.context[i].mean() + text.pooled[i].mean() - plain)
        xs = xt + (then - now) * (3 * xt + now + said + image_guidance * image)
        target = xs if then == 0 else xs - then * (0.2 * xs + ema.bias + image)
        x0_hat = xt - now * (0.7 * xt + student.bias + image)
        terms.append(((x0_hat - target).square().mean() + HUBER ** 2).sqrt() - HUBER)
    assert_close("loss", loss, torch.stack(terms).mean(), 1e-10)


def test_only_the_student_gets_gradients_and_none_through_its_target():
    x0, text, null, eps, sigma = setting()
    student, ema, teacher = (tiny("qk_norm", seed=i) for i in range(3))
    loss = lcm_loss(student, ema, teacher, x0, text, null, eps, sigma, LEVELS, 2.0)
    loss.backward()
    assert all(p.grad is None for net in (ema, teacher) for p in net.parameters())
    grads = [p.grad for p in student.parameters() if p.grad is not None]
    assert len(grads) > 30 and all(g.any() for g in grads)
    before = torch.cat([g.flatten() for g in grads])
    student.zero_grad()
    # its own target
    same = lcm_loss(student, student, teacher, x0, text, null, eps, sigma, LEVELS, 2.0)
    same.backward()
    assert (torch.cat([p.grad.flatten() for p in student.parameters() if p.grad
                       is not None]) - before).any()


def test_a_student_on_a_straight_path_is_at_rest():
    """Where all predict one point, every level's x0_hat is that point: the loss is 0 and stays
    it."""
    x0, text, null, eps, sigma = setting()

    class Straight(torch.nn.Module):
        def forward(self, x, sigma, context, pooled, image=None):
            return (x - 0.5) / sigma.view(-1, 1, 1, 1)
    net = Straight()
    assert lcm_loss(net, net, net, x0, text, null, eps, sigma, LEVELS, 1.0).abs() < 1e-12


# what a step draws

def test_levels_are_drawn_evenly_from_the_shifted_grid(home):
    latents = shards.read_folder(home / "runs/base/data")
    parts = [part for i in range(60) for part in draw_parts(latents, i, 8, 8, 0, 5, 3.0)]
    seen = torch.cat([sigma for _, _, sigma, _ in parts])
    grid, counts = seen.unique(return_counts=True)
    assert_close("grid", grid.flip(0), flow.shift(torch.tensor([1, .8, .6, .4, .2]), 3.0))
    assert counts.sum() == 480 and (counts - 96).abs().max() < 5 * (480 * .2 * .8) ** 0.5 / 2


def test_a_step_is_a_function_of_its_numbers_whatever_the_micro_batch(home):
    """Latents in the order of training, without those held out; noise of each sample of its own."""
    latents = shards.read_folder(home / "runs/base/data")
    (whole,), parts = (draw_parts(latents, 3, 8, micro, 7, 4, 1.0) for micro in (8, 2))
    assert len(parts) == 4
    for i, one in enumerate(whole[:3]):
        assert torch.equal(one, torch.cat([part[i] for part in parts]))
    assert torch.equal(whole[3].context, torch.cat([part[3].context for part in parts]))
    expected = latents.batch(3, 8, 7, latents.holdout)
    assert torch.equal(whole[0], expected.x0)
    assert torch.equal(whole[3].pooled, expected.text.pooled)
    for numbers in ((2, 8, 8, 7), (3, 8, 8, 6)):
        assert not torch.equal(draw_parts(latents, *numbers, 4, 1.0)[0][1], whole[1])
    assert len({tuple(noise.flatten().tolist()) for noise in whole[1]}) == 8


# the command

@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder whose runs/base has a teacher and its data, of which runs/base/lcm has learned."""
    folder = tmp_path_factory.mktemp("lcm")
    save_teacher(folder)
    main(folder, f"--name base --teacher t.safetensors --steps 1 {QUIET}")
    run_lcm(folder)
    return folder


def run_lcm(folder: Path, flags: str = "") -> str:
    """What the command prints; flags of `flags` replace those before them."""
    return call(folder, lcm.main, ("--run runs/base --steps 6 --save-every 2 --device cpu "
                                   f"--lr 1e-3 {flags}").split())


def test_it_ends_with_a_student_rows_and_a_picture(home):
    """The student is the EMA of the last step; its metadata are those that sampling needs."""
    out = home / "runs/base/lcm"
    rows = json.loads((out / "report.json").read_text())["rows"]
    assert [(r["model"], r["steps"], r["nfe"]) for r in rows] == [
        ("teacher", 3, 6), *(("consistency student", k, k) for k in (4, 2, 1))]
    assert all(ROW.keys() <= row.keys() and math.isfinite(row["fd"]) for row in rows)
    with Image.open(out / "samples.png") as picture:
        assert min(picture.size) > 300
    step, state, _ = load_state(out / "checkpoints")
    student, start = weights(out / "student.safetensors"), weights(home / "t.safetensors")
    names = [name for name in student if name != "pos_embed"]
    assert step == 6 and all(torch.equal(student[k], state[f"ema.{k}"]) for k in names)
    assert any(not torch.equal(student[k], state[f"student.{k}"]) for k in names)
    assert any(not torch.equal(student[k], start[k]) for k in names)
    ours, theirs = (checkpoint.load_metadata(home / path) for path in (
        "runs/base/lcm/student.safetensors", "runs/base/checkpoints/student.safetensors"))
    assert ours == theirs and ours["role"] == "student"


def test_its_student_can_be_sampled(home, monkeypatch):
    monkeypatch.chdir(home)
    path = "runs/base/lcm/student.safetensors"
    sample.main(["--checkpoint", path, "--prompt", "large red circle", "--steps", "2", "--device",
                 "cpu", "--out", "one.png"])
    with Image.open(home / "one.png") as picture:
        assert picture.size == (64, 32)


def test_the_first_steps_by_hand(home):
    """Adam, the clip, the learning rate and the EMA of two steps."""
    run_lcm(home, "--out two --steps 2")
    config = read_config(home / "runs/base")
    student, ema, teacher = (checkpoint.load_mmdit(home / "t.safetensors") for _ in range(3))
    latents, levels = shards.read_folder(home / "runs/base/data"), flow.euler_sigmas(16,
                                                                                     config.shift)
    moments = {}
    for step in range(2):
        (x0, eps, sigma, text), = draw_parts(latents, step, config.batch, config.batch, config.seed,
                                             16, config.shift)
        student.zero_grad()
        lcm_loss(student, ema, teacher, x0, text, Text(*latents.null), eps, sigma, levels,
                 config.guidance).backward()
        grads = {k: p.grad for k, p in student.named_parameters() if p.grad is not None}
        norm = torch.stack([g.norm() for g in grads.values()]).norm()
        rate = 1e-3 * min(1, (step + 1) / config.warmup, 2 - step)     # falls in the last step
        with torch.no_grad():
            for (name, p), average in zip(student.named_parameters(), ema.parameters()):
                if name not in grads:
                    continue
                grad = grads[name] * min(1, CLIP / (norm + 1e-6))
                moments[name] = config.beta2 * moments.get(name, 0) + (1 - config.beta2) * grad ** 2
                size = (moments[name] / (1 - config.beta2 ** (step + 1))).sqrt()
                p -= rate * grad / (size + 1e-8)                               # beta1 is 0
                average += (1 - config.ema) * (p - average)
    assert BETA1 == 0
    found, start = weights(home / "two/student.safetensors"), weights(home / "t.safetensors")
    made = {name: average.detach() for name, average in ema.named_parameters()}

    def square(a: dict, b: dict) -> float:
        return sum(float((a[k] - b[k]).square().sum()) for k in moments)
    moved = square(found, start)
    # Adam divides by the size of the gradient: where that is near zero, rounding is magnified
    assert moved > 1e-8 and square(found, made) < 0.02 ** 2 * moved


def test_a_run_that_is_resumed_equals_one_that_is_not(home, monkeypatch):
    """After a signal in step 3; after a kill: no newest state, and half of another."""
    whole, loss, calls = home / "runs/base/lcm", lcm.lcm_loss, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGTERM)
        return loss(*args)
    monkeypatch.setattr(lcm, "lcm_loss", interrupted)
    said = run_lcm(home, "--out again")
    assert said.endswith("SIGTERM: saved in again/checkpoints; the same command resumes\n")
    assert load_state(home / "again/checkpoints")[0] == 3
    assert not (home / "again/student.safetensors").exists()
    run_lcm(home, "--out again")
    assert len(calls) == 6
    assert_same(whole, home / "again", r"(step_000006/part-.*|student)\.safetensors$")
    shutil.rmtree(home / "again/checkpoints/step_000006")
    (home / "again/checkpoints/.tmp_step_000006").mkdir()
    run_lcm(home, "--out again")
    assert_same(whole, home / "again", r"(step_000006/part-.*|student)\.safetensors$")
    assert not list((home / "again").rglob(".tmp*"))


def test_a_killed_process_leaves_what_resumes(home):
    """SIGKILL of a process once it has saved a state."""
    said, states = home / "killed.txt", home / "killed/checkpoints"
    process = fork(lambda: run_lcm(home, "--steps 100000 --save-every 1 --lr 1e-3 --out killed"),
                   said)
    try:
        wait_for(lambda: list(states.glob("step_*")) or has_ended(process))
        assert not has_ended(process), said.read_text()
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    step = load_state(states)[0]
    assert step >= 1
    with refused("killed/checkpoints: began with another steps;", "another folder"):
        run_lcm(home, "--out killed")


@pytest.mark.parametrize("task, flags", [
    ("edit", "--task edit --image-guidance 1.5 --set text_dropout=.4 --set image_dropout=.2"),
    ("inpaint", "--task inpaint --micro-batch 4 --student-depth 1")])
def test_a_student_that_reads_an_image(home, task, flags):
    """It trains what reads the image; a run of renders needs no folder of data; it resumes."""
    main(home, f"--name {task} {flags} --data toy --teacher-steps 2 --steps 1 {QUIET}")
    with mock.patch.object(lcm, "lcm_loss", wraps=lcm_loss) as losses:
        run_lcm(home, f"--run runs/{task}")
    assert {call.args[-2:] for call in losses.call_args_list} == {
        (2.5, 1.5 if task == "edit" else 1.0)}                         # guidance of the run
    out, reads = home / f"runs/{task}/lcm", "x_embedder.proj.weight"
    student, teacher = (weights(path)[reads][:, 16:] for path in (
        out / "student.safetensors", home / f"runs/{task}/checkpoints/teacher.safetensors"))
    assert (student - teacher).abs().amax((0, 2, 3)).min() > 0
    before = weights(out / "student.safetensors")
    depth = checkpoint.load_mmdit(out / "student.safetensors").config.depth
    assert depth == (1 if task == "inpaint" else 2)
    rows = json.loads((out / "report.json").read_text())["rows"]
    assert rows[0]["nfe"] == (9 if task == "edit" else 6) and rows[1]["nfe"] == 4
    shutil.rmtree(out / "checkpoints/step_000006")
    run_lcm(home, f"--run runs/{task}")
    after = weights(out / "student.safetensors")
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_the_student_of_a_lora_run_is_a_lora(home):
    main(home, "--name lora --teacher t.safetensors --data runs/base/data --lora 2 --steps 1 "
         f"--recompute full {QUIET}")
    run_lcm(home, "--run runs/lora")
    out, base = home / "runs/lora/lcm", weights(home / "t.safetensors")
    found, made = lora_files.load(
        out / "student_lora.safetensors"), weights(out / "student.safetensors")
    assert found and all(len(f.a) == 2 and f.b.abs().max() > 0 for f in found.values())
    for key, w in base.items():
        f = found.get(key.removesuffix(".weight"))
        w = w if f is None else (w.double() + f.scale * f.b.double() @ f.a.double()).float()
        assert torch.equal(made[key], w), key
    assert checkpoint.load_metadata(out / "student_lora.safetensors")["base"] == "t.safetensors"


# what is refused

@pytest.mark.parametrize("flags, parts", [
    ("--run nowhere", ("nowhere/config.json: not a complete JSON file", "No such file")),
    ("--run runs/bare", ("teacher.safetensors", "no")),
    ("--run runs/base --data nowhere", ("nowhere", "no")),
    ("--run runs/base --data part", ("part: 1 of 4 shards are missing",)),
    ("--run runs/base --out runs/base/checkpoints", ("--out must not be the folder of a run",)),
    ("--run runs/base --out runs/base", ("--out must not be the folder of a run", "got runs/base")),
    ("--run runs/base --steps 0", ("--steps must be at least 1", "got 0")),
    ("--run runs/base --path-steps 1", ("--path-steps must be at least 2", "got 1")),
    ("--run runs/base --path-steps many", ("--path-steps", "many")),
    ("--run runs/base --lr nan", ("--lr", "nan")),
    ("--run runs/base --micro-batch 3", ("--micro-batch", "3", "8")),
    ("--run runs/base --batch 1000 --micro-batch 0", ("--data-size", "96")),
    ("--run runs/base --n 2", ("--n", "2", "6")),
    ("--run runs/base --stepz 3", ("nearest flag is --steps",)),
    ("--run runs/base --steps 7", ("runs/base/lcm/checkpoints: began with another steps",)),
    ("--run runs/base --steps 6 --lr 1e-3 --path-steps 4 --seed 2", (
        "began with another path_steps and seed",)),
    ("--run runs/old", (
        "runs/old/config.json: made by another version", r"\(objective\)"))])
def test_bad_input_is_one_line_and_leaves_what_was_there(home, flags, parts):
    stored = json.loads((home / "runs/base/config.json").read_text())
    if not (home / "runs/bare").exists():
        for name, change in (("bare", {"teacher": ""}), ("old", {"objective": "lcm"})):
            (home / "runs" / name).mkdir()
            (home / "runs" / name / "config.json").write_text(json.dumps({**stored, **change}))
        shutil.copytree(home / "runs/base/data", home / "part")
        next((home / "part").glob("00002-*")).unlink()
    before = {name: content for name, (_, content) in stamps(home).items()}
    with refused(*parts):
        call(home, lcm.main, [*flags.split(), "--device", "cpu"])
    assert before == {name: content for name, (_, content) in stamps(home).items()}


def test_bad_input_ends_the_process_with_code_2(home):
    done = script("ladd.lcm", home, "--run", "nowhere")
    assert done.returncode == 2
    assert re.fullmatch(r"ladd\.lcm: nowhere/config\.json: .*\n", done.stderr)


def test_several_processes_are_refused(home, monkeypatch):
    """Each would write the others' files."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with refused(r"torchrun must start 1 process of ladd\.lcm \(got 2\)"):
        run_lcm(home)


def test_a_loss_that_is_not_finite_ends_the_run_with_the_states_before_it(home, monkeypatch):
    loss, calls = lcm.lcm_loss, []

    def broken(*args):
        calls.append(1)
        return loss(*args) * (math.nan if len(calls) == 4 else 1)
    monkeypatch.setattr(lcm, "lcm_loss", broken)
    with pytest.raises(FloatingPointError, match="step 4: loss is nan"):
        run_lcm(home, "--out broken")
    assert load_state(home / "broken/checkpoints")[0] == 2
