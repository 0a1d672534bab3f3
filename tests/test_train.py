"""train.py end to end: its main, called in this process, on the smallest world that has every
stage."""
import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import cache
from itertools import product
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import fork, has_ended, randomise
from test_report import check_report
from PIL import Image

import kernels
import train
from ladd.cli import InputError
from ladd.core import losses, sampler
from ladd.core.mmdit import MMDiT, MMDiTConfig
from ladd.data.files import read_tensors
from ladd.data.shards import Latents
from ladd.engine import run as run_module
from ladd.engine import step
from ladd.engine.networks import Compute
from ladd.engine.optimizer import AdamW
from ladd.engine.state import open_state
from ladd.report import compare, evaluate, sheets
from ladd.sd3 import checkpoint
from ladd.toy import prompts
from ladd.toy.prompts import BEST, REAL, REPORT, VALIDATION

TINY = ("--device cpu --precision fp32 --sizes 32x64,64x32 --set depth=2 --set width=64 --taps 0,1 "
        "--set head_width=16 --teacher-steps 6 --set teacher_images=96 --teacher-batch 8 "
        "--teacher-lr 1e-2 --set warmup=2 --data-size 96 --set shard_size=24 --sample-steps 3 "
        "--steps 4 --set heads_first=2 --batch 8 --lr 1e-3 "
        "--guidance 2.5 --sampler euler --heads-repeats 1 --n 20 --set eval_n=12 --eval-every 2 "
        "--set log_every=1 --save-every 2")
REUSE = "--teacher runs/base/checkpoints/teacher.safetensors --data runs/base/data"
QUIET = "--eval-every 0"
# what depends on the machine
CLOCK = "seconds", "pairs_per_second", "data_wait", "gb", "ms_per_image"
ROOT = Path(train.__file__).parent


# git and the metadata of packages are asked once, not in each run
PROVENANCE = {name: cache(getattr(run_module, name)) for name in ("commit", "versions")}


def call(folder: Path, script, flags: list[str]) -> str:
    """What `script` prints, called in `folder`; the handlers of signals are put back."""
    printed, handlers = io.StringIO(), {s: signal.getsignal(s) for s
                                        in (signal.SIGINT, signal.SIGTERM)}
    with (contextlib.chdir(folder), contextlib.redirect_stdout(printed),
          contextlib.redirect_stderr(io.StringIO()),
          mock.patch.multiple(run_module, **PROVENANCE)):
        try:
            script(flags)
        except train.Stopped as stopped:
            print(stopped)
        finally:
            for s, handler in handlers.items():
                signal.signal(s, handler)
    return printed.getvalue()


def main(folder: Path, flags: str, report: bool = False) -> str:
    """What `train.py` with TINY and `flags` prints, run in `folder`; without the report, half of
    its time."""
    write = train.write_report if report else lambda *args: None
    with mock.patch.object(train, "write_report", write):
        return call(folder, train.main, f"{TINY} {flags}".split())


def without_clock(row: dict) -> dict:
    return {k: v for k, v in row.items() if k not in CLOCK}


def log_of(run: Path) -> list[dict]:
    """The log by stage and step; training and evaluation of one step are told apart. No line stands
    twice."""
    key = lambda line: (line["stage"] != "teacher", line["stage"] == "eval", line["step"])
    lines = sorted(map(json.loads, (run / "log.jsonl").read_text().splitlines()), key=key)
    assert len(lines) == len({key(line) for line in lines})
    return [without_clock(line) for line in lines]


def rows_of(run: Path) -> list[dict]:
    return [without_clock(row) for row in json.loads((run / "report.json").read_text())["rows"]]


def weights(path: Path) -> dict[str, torch.Tensor]:
    return read_tensors(path)[0]


def assert_same(a: Path, b: Path, pattern: str) -> None:
    """Two runs have the same tensor files with names that match, and these agree bit for bit."""
    names = [{str(path.relative_to(run)) for path in run.rglob("*.safetensors")} for run in (a, b)]
    left, right = ({name for name in found if re.search(pattern, name)} for found in names)
    assert left == right and left
    for name in left:
        one, two = weights(a / name), weights(b / name)
        assert one.keys() == two.keys(), name
        assert not [k for k in one if not torch.equal(one[k], two[k])], name


def stamps(run: Path) -> dict[str, tuple]:
    """Time and content of every file."""
    files = [path for path in run.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(run)): (path.stat().st_mtime_ns, path.read_bytes()) for path
            in files}


@contextlib.contextmanager
def refused(*parts: str):
    """InputError of one line that has each of `parts`: the thing, what was found, what is
    accepted."""
    with pytest.raises(InputError) as error:
        yield
    text = str(error.value)
    assert "\n" not in text and len(text) < 400, text
    assert all(re.search(part, text) for part in parts), text


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder whose runs/base is a whole run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("home")
    main(folder, "--name base", report=True)
    return folder


@pytest.fixture(scope="module")
def base(home) -> Path:
    return home / "runs" / "base"


@pytest.fixture
def again(home, base):
    """again(NAME, patterns): a copy of the base run as if --name NAME had made it, less files that
    match."""
    def copy(name: str, *without: str) -> Path:
        run = home / "runs" / name
        shutil.copytree(base, run)
        config = json.loads((run / "config.json").read_text())
        (run / "config.json").write_text(json.dumps({**config, "name": name}))
        for path in [path for pattern in without for path in run.glob(pattern)]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return run
    return copy


# the whole pipeline

def test_a_run_ends_with_a_valid_report_that_has_every_baseline(base):
    out = json.loads((base / "report.json").read_text())
    check_report(out)
    rows = [(r["model"], r["steps"], r["guidance"], r["nfe"]) for r in out["rows"]]
    plain = [(model, n, 1.0, n) for model in ("untrained", "student") for n in (4, 2, 1)]
    assert rows == [("teacher", 3, 2.5, 6), ("teacher", 4, 2.5, 8), ("teacher", 4, 1.0, 4), *plain]
    assert {r["sampler"] for r in out["rows"]} == {"euler"}
    assert (out["n"], out["seeds"], out["preset"]) == (20, [0], "tiny")
    assert set(out["seconds"]) == {"teacher", "data", "distill", "report"}
    assert min(out["seconds"].values()) > 0
    assert set(out["heldout_prompt_accuracy"]) == {"teacher_3", "student_4"}
    # the untrained student is the teacher: without guidance both draw the same images from the same
    # seeds
    fd = {(r["model"], r["steps"], r["guidance"]): r["fd"] for r in out["rows"]}
    assert fd["untrained", 4, 1.0] == fd["teacher", 4, 1.0]
    assert len(set(fd.values())) == 8
    steps = {name: [step for step, _ in curve] for name, curve in out["curves"].items()}
    assert steps["loss_d"] == steps["margin_real"] == steps["accuracy_fake"] == [1, 2, 3, 4, 5, 6]
    assert steps["loss_g"] == [3, 4, 5, 6]
    assert all(steps[name] == [2, 4, 6] for name in ("fd_1", "fd_4", "prompt_accuracy_1", "auc",
                                                     "floor_fd"))
    with Image.open(base / "report.png") as picture:
        assert picture.format == "PNG" and min(picture.size) > 500


def test_what_a_run_leaves(base):
    """Grids from iteration 2 on, the first of the student; the last two checkpoints."""
    states = {f"checkpoints/{stage}/step_{step:06d}/{name}" for stage, step, name
              in product(("teacher", "distill"), (4, 6),
                         ("part-00000-of-00001.safetensors", "meta.json"))}
    shards = {f"data/0000{i}-{size}.safetensors" for i, size
              in enumerate(("4x8", "8x4", "4x8", "8x4"))}
    prompts = {f"data/{name}" for name in ("prompts.json", "prompts.safetensors", "provenance.json",
                                           "text-00000.safetensors")}
    grids = {f"samples/{step:06d}.png" for step in (2, 4, 6)}
    networks = {f"checkpoints/{name}.safetensors" for name in ("teacher", "student", "last")}
    rest = {"config.json", "env.txt", "inputs.json", "log.jsonl", "report.json",
            "report.png"}
    whole = states | shards | prompts | grids | networks | rest
    assert stamps(base).keys() - {"seconds.json"} == whole
    env = (base / "env.txt").read_text()
    assert env.startswith("command: ") and "torch: " in env and "commit: " in env
    with Image.open(base / "samples" / "000002.png") as picture:
        assert "euler" in picture.text["parameters"]


def test_the_student_kept_is_the_moving_average_at_its_best_evaluation(home, base, monkeypatch):
    """Best by the sum of the distances at 1 step and at all, also where a stop lies between best
    and end."""
    # at steps 2, 4, 6 of the heads
    scores = iter([(3.0, 3.0), (1.0, 2.0), (2.0, 1.5)])
    monkeypatch.setattr(train.evaluate, "quality", lambda *args: dict(zip(("fd_1", "fd_4"),
                                                                          next(scores))))
    run = home / "runs" / "best"
    main(home, f"--name best {REUSE} --set stop_after=5")
    best = weights(run / "checkpoints/distill/step_000004/part-00000-of-00001.safetensors")
    step, _, meta = load_state(run / "checkpoints/distill")
    assert (step, meta["best"]) == (5, 3.0)
    assert not (run / "checkpoints/student.safetensors").exists()
    main(home, f"--name best {REUSE}")
    newest = load_state(run / "checkpoints/distill")[1]
    student, last = (weights(run / f"checkpoints/{name}.safetensors") for name
                     in ("student", "last"))
    assert torch.equal(student.pop("pos_embed"), last.pop("pos_embed"))             # is no state
    assert all(torch.equal(student[k], best[f"ema.{k}"]) for k in student)
    assert all(torch.equal(last[k], newest[f"ema.{k}"]) for k in last)
    assert any(not torch.equal(student[k], last[k]) for k in last)
    # the average lags behind
    assert any(not torch.equal(last[k], newest[f"student.{k}"]) for k in last)
    meta = checkpoint.load_metadata(run)
    assert (meta["levels"], meta["sampler"], meta["sizes"]) == ("1.0,0.75,0.5,0.25", "euler",
                                                                "32x64,64x32")


def test_evaluations_are_of_the_moving_average(home, base, monkeypatch):
    """Grids, distances and what the discriminator says are of the average that a checkpoint holds,
    not of the student that trains."""
    key, seen = "final_layer.linear.weight", []

    def spied(model, values: dict) -> dict:
        seen.append(model.get_parameter(key).detach().clone())
        return values
    monkeypatch.setattr(compare, "save_grid", lambda *args: spied(args[2], {}))
    monkeypatch.setattr(evaluate, "quality", lambda *args: spied(args[2], {"fd_1": 1, "fd_4": 1}))
    monkeypatch.setattr(evaluate, "discriminator_metrics", lambda *args: spied(args[0], {}))
    flags = "--steps 1 --set heads_first=0 --eval-every 1 --save-every 1"
    main(home, f"--name average {REUSE} {flags}")
    _, saved, _ = load_state(home / "runs/average/checkpoints/distill")
    start = weights(base / "checkpoints/teacher.safetensors")[key]
    average, student = saved[f"ema.{key}"], saved[f"student.{key}"]
    assert len({tuple(t.flatten().tolist()) for t in (start, average, student)}) == 3
    assert len(seen) == 6                                     # before the step and after it
    assert all(torch.equal(t, start) for t in seen[:3])
    assert all(torch.equal(t, average) for t in seen[3:])


def test_alarms_compare_with_the_first_evaluation(base):
    lines = [line for line in log_of(base) if "fd_1" in line]
    first = load_state(base / "checkpoints/distill")[2]["first"]
    assert len(lines) == 3 and all(first[k] == lines[0][k] for k in ("fd_1", "fd_4", "auc"))
    assert first["fd_1"] != lines[1]["fd_1"]


def test_noise_counts_over_all_sizes(home, base, monkeypatch):
    """Prompt i of all starts from the noise of seed + i, whatever its size and batch."""
    seen, noise = [], sampler.image_noise
    spy = lambda seeds, shape: seen.extend(seeds) or noise(seeds, shape)
    monkeypatch.setattr(evaluate, "image_noise", spy)
    # grids alone
    monkeypatch.setattr(evaluate, "quality", lambda *args: {"fd_1": 1.0, "fd_4": 1.0})
    flags = "--steps 1 --set heads_first=0 --eval-every 1 --sample-batch 3"
    main(home, f"--name noise {REUSE} {flags}")
    # 4 of each size; 3 rows of the grid, at steps 0 and 1
    assert seen == [*range(8)] * 6


def test_the_same_command_again_does_no_work(home, base):
    before = stamps(base)
    main(home, "--name base", report=True)
    after = stamps(base)
    assert before == after


def test_latents_of_another_teacher_are_mentioned(home, base):
    flags = f"--data runs/base/data --steps 1 --set heads_first=0 {QUIET}"
    teacher = save_teacher(home, seed=5).rename(home / "other.safetensors")
    said = main(home, f"--name noted --teacher {teacher.name} {flags}")
    assert "note: --data runs/base/data: another teacher generated these latents" in said
    own = "--teacher runs/base/checkpoints/teacher.safetensors"
    assert "another teacher" not in main(home, f"--name own {own} {flags}")


def test_without_its_report_a_finished_run_is_evaluated_and_nothing_else(home, base, again):
    run = again("evaluate", "report.*")
    before = stamps(run)
    main(home, "--name evaluate", report=True)
    after = stamps(run)
    assert after.keys() - before.keys() == {"report.json", "report.png"}
    changed = {k for k in before if before[k] != after[k]}
    assert changed <= {"config.json", "env.txt", "inputs.json", "log.jsonl",
                       "seconds.json"}
    assert before["log.jsonl"][1] == after["log.jsonl"][1] and rows_of(run) == rows_of(base)


def test_dry_run_prints_what_a_run_takes_and_writes_nothing(tmp_path, base):
    out = main(tmp_path, "--dry-run")
    assert not list(tmp_path.iterdir())
    found = re.search(r"teacher ([\d,]+), student ([\d,]+), heads ([\d,]+)", out).groups()
    teacher, student, heads = (int(n.replace(",", "")) for n in found)
    saved = load_state(base / "checkpoints" / "distill")[1]
    buffers = r"pos_embed|feat_(mean|std)"                                    # are no parameters
    count = lambda part: sum(t.numel() for k, t in saved.items()
                             if re.match(rf"{part}\.(?!{buffers})", k))
    assert teacher == student == count("student") and heads == count("heads")
    assert "batch: 8\n" in out and "GiB  sum" in out
    assert re.search(r"FLOPs: \d\.\d+e\+\d+ per LADD step of 8 pairs", out)


@pytest.mark.parametrize("device, flags, said", [
    ("cpu", "", 0), ("cuda", "", 1), ("cuda", "--preset tiny", 0), ("cuda", "--preset=shapes", 0)])
def test_tiny_is_the_default_on_every_device(tmp_path, monkeypatch, device, flags, said):
    """Beside a GPU one line names the larger preset, unless a preset was asked for."""
    chosen, compute = [], Compute(torch.device(device), kernels.load("torch"), torch.float32)
    monkeypatch.setattr(train, "compute_of", lambda config: compute)
    monkeypatch.setattr(train.bench, "dry_run", lambda config, *rest: chosen.append(config.preset))
    lines = call(tmp_path, train.main, f"--dry-run {flags}".split()).splitlines()
    assert len(lines) == said and all("--preset shapes" in line for line in lines)
    assert chosen == ["shapes" if "shapes" in flags else "tiny"]


# reuse and determinism

def test_teacher_and_data_of_another_run_give_its_student_bit_for_bit(home, base):
    """The second run of one seed, with two stages skipped: a run is a function of its flags."""
    main(home, f"--name reuse {REUSE}")
    run = home / "runs" / "reuse"
    assert not (run / "data").exists() and not list(run.glob("checkpoints/teacher*"))
    assert log_of(run) == [line for line in log_of(base) if line["stage"] != "teacher"]
    assert_same(base, run, r"distill|student|last")


@pytest.mark.parametrize("flags", ["", REUSE], ids=["teacher", "student"])
def test_another_seed_gives_another_run(home, base, flags):
    name = f"seed{len(flags)}"
    main(home, f"--name {name} --seed 1 --set stop_after=1 {flags}")
    mine, loss = log_of(home / "runs" / name)[0], "loss_d" if flags else "loss"
    same = next(line for line in log_of(base) if loss in line)
    assert mine["step"] == same["step"] == 1 and mine[loss] != same[loss]


def test_prompts_of_training_of_choosing_and_of_the_report_are_never_the_same(home, monkeypatch):
    """Whatever --seed is: one of these near the numbers that train.py reserves for evaluation."""
    seeds, purpose = {}, {"toy_latents": "training", "toy_plan": "training", "distill": "choosing",
                          "shown_prompts": "choosing", "unseen_accuracy": "report",
                          "write_run_report": "report"}

    def spy(toy, n, seed, heldout=False):
        frame = sys._getframe(1)
        frame = frame.f_back if frame.f_code.co_name == "make_reference" else frame
        caller = frame.f_code.co_name
        seeds.setdefault(purpose.get(caller, caller), set()).add(seed)
        return drawn(toy, n, seed, heldout)

    drawn = prompts.draw_prompts
    for module in (compare, evaluate, prompts, train):
        monkeypatch.setattr(module, "draw_prompts", spy)
    for name in ("save_report", "plot_report"):
        monkeypatch.setattr(sheets, name, lambda *args: None)
    for seed in (VALIDATION, BEST, REPORT - 1, REAL - 1):
        flags = f"--seed {min(seed, 10 ** 9)} --teacher-steps 1 --steps 1 --set heads_first=1"
        main(home, f"--name prompts{seed} {flags} --n 12 {QUIET}", report=seed == BEST)
    assert seeds.keys() == {"training", "choosing", "report"}
    assert sum(map(len, seeds.values())) == len(set.union(*seeds.values())), seeds


def test_a_smaller_student_goes_through_to_the_report(home):
    main(home, f"--name small {REUSE} --student-depth 1 --steps 2 {QUIET}", report=True)
    run = home / "runs" / "small"
    assert checkpoint.load_mmdit(run).config.depth == 1
    fd = {(r["model"], r["steps"], r["guidance"]): r["fd"] for r in rows_of(run)}
    # half of the teacher is another
    assert fd["untrained", 4, 1.0] != fd["teacher", 4, 1.0]


def test_other_numbers_of_levels_go_through_to_the_report(home):
    """Steps are the divisors of their number; the best student is that of 1 and of all steps."""
    main(home, f"--name three {REUSE} --levels 1,.6,.3 --set probs=.4,.3,.3 --steps 2 --n 12",
         report=True)
    run = home / "runs" / "three"
    assert [(r["steps"], r["nfe"]) for r in rows_of(run) if r["model"] == "student"] == [(3, 3),
                                                                                         (1, 1)]
    scores = [line["fd_1"] + line["fd_3"] for line in log_of(run) if "fd_1" in line]
    assert len(scores) == 2 and load_state(run / "checkpoints/distill")[2]["best"] == scores[0]


def load_state(folder: Path) -> tuple[int, dict[str, torch.Tensor], dict]:
    """(step, whole tensors, meta) of the newest state."""
    found = open_state(folder)
    whole = {k: torch.cat([rows for _, rows in t.parts]).view(t.shape) for k, t
             in found.tensors.items()}
    return found.step, whole, found.meta


def save_teacher(folder: Path, seed: int = 0, **changes) -> Path:
    """folder/t.safetensors: a teacher for TINY without a zero weight: no gradient is mere
    rounding."""
    config = dict(depth=2, width=64, context_dim=64, pooled_dim=64, qk_norm=True, pos_grid=4)
    torch.manual_seed(seed)
    model = randomise(MMDiT(MMDiTConfig(**{**config, **changes}), kernels.load("torch")), seed)
    checkpoint.save_mmdit(model, folder / "t.safetensors", {})
    return folder / "t.safetensors"


def test_accumulation_equals_the_whole_batch(home, base, monkeypatch):
    monkeypatch.setattr(step, "COOLDOWN", 0)
    start = {f"student.{k}": v for k, v in weights(save_teacher(home)).items() if k != "pos_embed"}
    states = {}
    for count in (1, 2, 4):
        main(home, f"--name acc{count} --teacher t.safetensors --data runs/base/data --micro-batch "
             f"{8 // count} --steps 2 --set heads_first=0 --set warmup=0 {QUIET}")
        states[count] = load_state(home / f"runs/acc{count}/checkpoints/distill")[1]
    distance = lambda a, b: sum(float((a[k] - b[k]).square().sum()) for k in start) ** 0.5
    moved = distance(states[1], start)
    for count in (2, 4):
        # rounding: Adam divides by the gradient's size, so where that is near zero its noise is
        # magnified
        assert moved > 0.1 and distance(states[1], states[count]) < 0.02 * moved, count


def test_every_iteration_has_its_own_batch(home, base, monkeypatch):
    seen, choose = [], Latents.choose
    spy = lambda self, step, *args: seen.append(step) or choose(self, step, *args)
    monkeypatch.setattr(Latents, "choose", spy)
    main(home, f"--name many {REUSE} --heads-repeats 2 --steps 2 {QUIET}")
    assert seen[-4:] == list(range(4))


def test_latents_of_another_codec_are_refused(home, base, monkeypatch):
    monkeypatch.setattr(prompts, "CODEC", "another codec")
    with pytest.raises(InputError, match=r"toy images must be coded by another codec \(got lapped"):
        main(home, f"--name refused {REUSE} {QUIET}")
    assert not (home / "runs/refused").exists()


def test_profile_writes_a_trace_of_the_last_steps(home, base):
    main(home, f"--name profile {REUSE} --profile trace.json {QUIET}")
    events = json.loads((home / "trace.json").read_text())["traceEvents"]
    # two optimizers
    assert sum(e.get("name") == "AdamW.step" for e in events) == 2 * 3


def test_learning_rates_rise_stay_and_fall_and_are_never_negative():
    """The heads warm up in their own first steps: counted by the student's, these steps were
    negative, and so was the rate."""
    optim = step.Optim(1e-3, 1e-3, 0.9, steps=100, warmup=20)
    # heads_first: 40
    heads = [train.rate_factor(optim, max(it - 40, 0), it) for it in range(140)]
    student = [train.rate_factor(optim, step, step) for step in range(100)]
    assert step.COOLDOWN == 0.4
    assert heads[:20] == pytest.approx([(i + 1) / 20 for i
                                        in range(20)]) and set(heads[20:100]) == {1}
    assert student[:20] == pytest.approx([(i + 1) / 20 for i
                                          in range(20)]) and set(student[20:60]) == {1}
    assert (heads[100:] == student[60:] == pytest.approx([(100 - s) / 40 for s in range(60, 100)])
            and min(heads + student) > 0)


def test_the_teachers_learning_rate_is_a_cosine(tmp_path, monkeypatch):
    """A warm-up of two steps, then half a period of a cosine: (1 + cos(pi step / 6)) / 2."""
    rates, step_of = [], AdamW.step

    def spied(self, *args):
        rates.append(self.lr)
        return step_of(self, *args)
    monkeypatch.setattr(AdamW, "step", spied)
    main(tmp_path, "--name cosine --steps 0 --set log_every=100 --save-every 100")
    assert rates == pytest.approx([5e-3, 9.330127e-3, 7.5e-3, 5e-3, 2.5e-3, 6.69873e-4])


def test_each_network_is_given_its_own_learning_rate(home, base, monkeypatch):
    """heads_first 2, warm-up over 4 steps, no decay: the heads' rate rises from their own first
    step."""
    seen, ladd_step = {"d": [], "g": []}, train.ladd_step
    monkeypatch.setattr(step, "COOLDOWN", 0)

    def spied(dc, p, parts, ema_decay, update_student):
        seen["d"].append(p.opt_d.lr)
        if update_student:
            seen["g"].append(p.opt_g.lr)
        return ladd_step(dc, p, parts, ema_decay, update_student)
    monkeypatch.setattr(train, "ladd_step", spied)
    main(home, f"--name rates {REUSE} {QUIET} --set warmup=4 --lr 4e-3 --heads-lr 8e-3")
    assert seen == {"d": pytest.approx([2e-3, 4e-3, 6e-3, 8e-3, 8e-3, 8e-3]),
                    "g": pytest.approx([1e-3, 2e-3, 3e-3, 4e-3])}


# resume

@pytest.fixture(scope="module")
def resumed(home, base) -> tuple[Path, list[str]]:
    """The base run again, stopped after every third step, and what each process printed."""
    printed = [main(home, "--name resumed --set stop_after=3") for _ in range(4)]
    return home / "runs" / "resumed", [*printed, main(home, "--name resumed", report=True)]


def test_three_steps_and_three_resumed_equal_six_bit_for_bit(base, resumed):
    """Teacher, student, average, heads, their optimizers, data, best student; by the log the data's
    order."""
    run, printed = resumed
    said = [re.findall(r"saved step (\d+) in \S*(teacher|distill)", text) for text in printed]
    assert said == [[("3", "teacher")], [("6", "teacher")], [("3", "distill")], [("6", "distill")],
                    []]
    assert_same(base, run, r"(step_000006/part-.*|teacher|student|last|data/.*)\.safetensors$")
    newest = "checkpoints/distill/step_000006"
    state = weights(run / newest / "part-00000-of-00001.safetensors")
    assert {name.split(".")[0] for name in state} == {"student", "ema", "heads", "opt_g", "opt_d"}
    assert (base / newest / "meta.json").read_text() == (run / newest / "meta.json").read_text()
    assert log_of(base) == log_of(run) and rows_of(base) == rows_of(run)
    for grid in (base / "samples").iterdir():
        assert grid.read_bytes() == (run / "samples" / grid.name).read_bytes()


def test_the_report_counts_the_seconds_of_all_processes(resumed):
    run, _ = resumed
    seconds = json.loads((run / "report.json").read_text())["seconds"]
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    for stage in ("teacher", "distill"):
        spent = [line["seconds"] for line in lines if line["stage"] == stage and "seconds" in line]
        assert seconds[stage] >= max(spent) > 0, stage


def test_no_line_stands_twice_after_a_kill(home, base, again):
    """As a kill leaves it: log and grids ahead of the newest state, the log's last line cut off."""
    run = again("killed", "checkpoints/*.safetensors", "checkpoints/distill/step_000006",
                "report.*")
    shutil.copy(base / "checkpoints/teacher.safetensors", run / "checkpoints")
    with (run / "log.jsonl").open("a") as f:
        f.write('{"stage": "distill", "step": 7, "lo')
    main(home, "--name killed")
    assert log_of(run) == log_of(base)
    assert_same(base, run, r"(step_000006/state|student|last)\.safetensors$")


def test_data_generation_resumes_at_the_missing_shard(home, base, again):
    run = again("shards", "data/00002*", "checkpoints/*.safetensors", "checkpoints/distill",
                "report.*")
    shutil.copy(base / "checkpoints/teacher.safetensors", run / "checkpoints")
    kept = {path: path.stat().st_mtime_ns for path in run.glob("data/0000[013]*")}
    main(home, "--name shards --set stop_after=1")
    assert len(kept) == 3 and all(path.stat().st_mtime_ns == stamp for path, stamp in kept.items())
    assert_same(base, run, r"data/.*safetensors$")


@pytest.mark.slow
def test_preset_shapes_takes_a_few_steps_on_a_cpu(tmp_path):
    """Every stage at 256 px and the width of 113 M parameters, at a reduced depth and batch; it
    ends in a whole report."""
    flags = ("--preset shapes --device cpu --set depth=3 --taps 0,2 --set teacher_images=6 "
             "--teacher-batch 2 --teacher-steps 2 --data-size 12 --set shard_size=4 "
             "--sample-steps 2 --batch 2 --steps 2 --set heads_first=1 --n 6 --set eval_n=6 "
             "--sample-batch 2 --eval-every 0 --set log_every=1")
    call(tmp_path, train.main, flags.split())
    out = json.loads((tmp_path / "runs/shapes/report.json").read_text())
    check_report(out)
    models = {row["model"] for row in out["rows"]}
    assert out["preset"] == "shapes" and models == {"teacher", "untrained", "student"}
    steps = {"teacher": {1, 2}, "distill": {1, 2, 3}}
    lines = [json.loads(line) for line
             in (tmp_path / "runs/shapes/log.jsonl").read_text().splitlines()]
    for stage, expected in steps.items():
        assert {line["step"] for line in lines if line["stage"] == stage} == expected
    with Image.open(tmp_path / "runs/shapes/report.png") as image:
        assert min(image.size) > 600


# signals

def start(folder: Path, flags: str) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "train.py"), *f"{TINY} {flags}".split()]
    return subprocess.Popen(command, cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"},
                            text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def wait_for(condition, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)


def lines_in(path: Path) -> int:
    return path.read_text().count("\n") if path.exists() else 0


def test_sigterm_saves_and_ends_with_code_0_and_the_run_resumes(home, base):
    """Wherever the signal falls, the run that resumes equals one that nothing disturbed."""
    flags, run = f"{REUSE} {QUIET} --steps 100000 --save-every 100000", home / "runs" / "term"
    process = start(home, f"--name term {flags}")
    try:
        wait_for(lambda: lines_in(run / "log.jsonl") >= 2 or process.poll() is not None)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0 and "Traceback" not in err, err
    step = int(re.search(r"SIGTERM: saved step (\d+) in runs/term/\S+; the same command resumes",
                         out)[1])
    assert [path.name for path in (run / "checkpoints/distill").iterdir()] == [f"step_{step:06d}"]
    main(home, f"--name term {flags} --set stop_after=2")
    main(home, f"--name whole {flags} --set stop_after={step + 2}")
    assert log_of(run) == log_of(home / "runs" / "whole")
    assert_same(run, home / "runs" / "whole", f"step_{step + 2:06d}/part")


@pytest.mark.slow
def test_kill_at_a_random_moment_leaves_a_run_that_resumes(home, base):
    """SIGKILL after a random time, over and over, each process resuming the last, until one ends
    itself. On a busy machine a process needs longer to save something, so later ones get longer."""
    run, said, kills = home / "runs" / "kill", home / "kill.txt", 0
    for delay in (0.3 * torch.rand(40) * 1.1 ** torch.arange(40)).tolist():
        seen = lines_in(run / "log.jsonl")
        process = fork(lambda: main(home, "--name kill", report=True), said)
        try:
            wait_for(lambda: lines_in(run / "log.jsonl") != seen or has_ended(process))
            time.sleep(delay)
            killed = not has_ended(process)
        finally:
            os.kill(process, signal.SIGKILL)
            code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        kills += killed
        assert killed or code == 0, said.read_text()
        if not killed:
            break
    assert kills >= 3 and not killed
    assert log_of(run) == log_of(base)
    assert_same(base, run, r"(step_000006/part-.*|teacher|student|last|data/.*)\.safetensors$")


# what stops a run

def test_a_damaged_state_is_named(home, again):
    run = again("damaged", "checkpoints/student.safetensors", "report.json")
    state = run / "checkpoints/distill/step_000006/part-00000-of-00001.safetensors"
    state.write_bytes(state.read_bytes()[:-1000])
    with refused(r"damaged/.*/step_000006/part-00000-of-00001\.safetensors", "not a complete "
                 "safetensors file"):
        main(home, "--name damaged")


@pytest.mark.parametrize("flags", ["--name shard", "--name other --data runs/shard/data"])
def test_a_damaged_shard_is_named(home, base, again, flags):
    shutil.rmtree(home / "runs" / "shard", ignore_errors=True)
    run = again("shard", "checkpoints/student.safetensors", "report.json")
    shard = run / "data/00001-8x4.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1000])
    with refused("runs/shard/data/00001-8x4.safetensors", "not a complete safetensors file"):
        main(home, flags)


@pytest.mark.parametrize("flags, parts", [("--lr 5e-4", ("--lr 0.001", "got 0.0005")),
                                          ("--taps 1", (r"--taps \[0, 1\]", r"got \[1\]"))])
def test_a_run_of_other_flags_is_left_alone(home, base, flags, parts):
    before = stamps(base)
    with refused("runs/base", *parts, "another --name"):
        main(home, f"--name base {flags}")
    assert stamps(base) == before


def test_a_broken_config_is_named(home, again):
    (again("broken") / "config.json").write_text('{"preset": "ti')
    with refused("runs/broken/config.json", "JSON"):
        main(home, "--name broken")


@pytest.mark.parametrize("changes, flags, parts", [
    (dict(context_dim=32), "",
     ("t.safetensors", "context_dim must be 64", "--set text_dim", "got 32")),
    (dict(pooled_dim=32), "",
     ("t.safetensors", "pooled_dim must be 64", "--set text_dim", "got 32")),
    (dict(in_channels=4, out_channels=4), "", ("t.safetensors", "4", "16")),
    (dict(pos_grid=2), "", ("t.safetensors", "2", "4|--sizes")),
    (dict(patch=1), "", ("t.safetensors", "1", "2")),
    (dict(depth=1), "", ("t.safetensors", "--taps 0,1", "depth 1")),
    ({}, "--student-depth 3", ("t.safetensors", "--student-depth 3", "depth 2"))],
                         ids=["context", "pooled", "channels", "positions", "patch", "taps",
                              "student"])
def test_a_teacher_that_does_not_fit_is_refused_before_a_run_is_made(tmp_path, changes, flags,
                                                                     parts):
    save_teacher(tmp_path, **changes)
    with refused(*parts):
        main(tmp_path, f"--teacher t.safetensors {flags}")
    # a failed attempt does not take the name from the next
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("flags, parts", [
    ("--teacher no.safetensors", ("--teacher", "no.safetensors", "not exist")),
    ("--teacher empty", ("empty", "finished run")),
    ("--teacher junk.safetensors", ("junk.safetensors", "not a complete safetensors file")),
    ("--data nowhere", ("--data", "nowhere", "not exist")),
    ("--data empty", ("empty", "provenance.json"))])
def test_what_is_not_there_is_refused_before_a_run_is_made(tmp_path, flags, parts):
    (tmp_path / "empty").mkdir()
    (tmp_path / "junk.safetensors").write_text("junk")
    with refused(*parts):
        main(tmp_path, flags)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("changes, flags, parts", [(dict(context_dim=32, pooled_dim=32),
                                                    "--set text_dim=32",
                                                    ("runs/base/data", "64", "32")),
                                                   ({}, "--batch 48 --data-size 4096",
                                                    ("latents of 4x8", "at least 48", "got 48"))],
                         ids=["text", "batch"])
def test_latents_that_do_not_fit_are_refused(home, base, changes, flags, parts):
    """Text of another width; too few for the batch, whatever --data-size says."""
    save_teacher(home, **changes)
    with refused(*parts):
        main(home, f"--name misfit --teacher t.safetensors --data runs/base/data {flags}")


def test_the_holdout_follows_the_latents_not_the_flag(home, base):
    """--data-size says what to generate; with --data it does not decide what is held out."""
    main(home, f"--name holdout {REUSE} --data-size 4096 --steps 2")
    first = lambda run: [line for line in log_of(run) if "loss_d" in line][0]
    assert first(home / "runs/holdout") == first(base)


class Poison:
    """A loss function whose value is NaN at its call number `at`."""

    def __init__(self, function, at: int):
        self.function, self.at, self.calls = function, at, 0

    def __call__(self, *args):
        self.calls += 1
        out, factor = self.function(*args), float("nan") if self.calls == self.at else 1.0
        return (out[0] * factor, *out[1:]) if isinstance(out, tuple) else out * factor


@pytest.mark.parametrize("log_every", [1, 100])
@pytest.mark.parametrize("name, stage, call, term",
                         [("flow_loss", "teacher", 3, "loss"),
                          # the second of three steps of the heads
                          ("heads_loss", "distill", 8, "the gradient of heads [\\w.]+"),
                          ("heads_loss", "distill", 3, "loss_d"),
                          ("student_loss", "distill", 1, "(the gradient of student "
                           "[\\w.]+|loss_[gd])")])
def test_nan_stops_and_is_not_saved(home, base, monkeypatch, name, stage, call, term, log_every):
    """Step and term are named; also where no line is logged, what is saved has been looked at."""
    where = train if stage == "teacher" else step
    monkeypatch.setattr(where, name, Poison(getattr(where, name), call))
    run = home / "runs" / f"nan_{name}_{call}_{log_every}"
    repeats = "--heads-repeats 3" if call == 8 else ""
    with pytest.raises(FloatingPointError, match=rf"^step 3: {term} (is|has norm) nan[^\n]*$"):
        main(home, f"--name {run.name} --set log_every={log_every} {QUIET} {repeats} "
             f"{REUSE if stage == 'distill' else ''}")
    found, tensors, _ = load_state(run / "checkpoints" / stage)
    assert found == 2 and all(t.isfinite().all() for t in tensors.values())


def test_a_last_step_that_is_no_number_gives_no_student(home, base, monkeypatch):
    """Where neither a line of the log nor a state has looked at it."""
    monkeypatch.setattr(step, "heads_loss", Poison(losses.heads_loss, 6))
    with pytest.raises(FloatingPointError, match="^step 6: loss_d is nan"):
        main(home, f"--name nan_last --set log_every=100 --save-every 100 {QUIET} {REUSE}")
    assert not list((home / "runs/nan_last/checkpoints").glob("*.safetensors"))
