"""train.py end to end, by calling its main in this process on the smallest world that goes through every stage."""
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
from itertools import product
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import randomise
from PIL import Image

import kernels
import train
from ladd import checkpoint, data, report
from ladd.config import InputError
from ladd.mmdit import MMDiT, MMDiTConfig

SIZES = "--sizes 32x64,64x32"
TINY = (f"{SIZES} --depth 2 --width 64 --taps 0,1 --head-width 16 --device cpu --precision fp32 --teacher-steps 6 --teacher-images 96 "
        "--teacher-batch 8 --teacher-lr 1e-2 --warmup 2 --data-size 96 --data-batch 24 --sample-steps 3 --steps 4 --heads-first 2 "
        "--batch 8 --lr 1e-3 --n 20 --eval-n 12 --eval-every 2 --grid-every 2 --log-every 1 --save-every 2").split()
REUSE = "--teacher runs/base/checkpoints/teacher.safetensors --data runs/base/data".split()
CLOCK = ("seconds", "gb")                        # columns of the log that depend on the machine
ROOT = Path(train.__file__).parent


def main(folder: Path, *flags: str | Path, report: bool = False) -> str:
    """What `train.py` with TINY and `flags` prints, run in `folder`; the report, half of the time, only where it is asked for."""
    printed, handlers = io.StringIO(), {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    quick = contextlib.nullcontext() if report else mock.patch.object(train, "write_report", lambda *args: None)
    try:
        with contextlib.chdir(folder), contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()), quick:
            train.main([*TINY, *map(str, flags)])
    except train.Stopped as stopped:
        print(stopped, file=printed)
    finally:
        for s, handler in handlers.items():
            signal.signal(s, handler)
    return printed.getvalue()


def log_of(run: Path, stage: str = "") -> list[dict]:
    """The lines of log.jsonl without the machine's clock."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in CLOCK} for line in lines if stage in ("", line["stage"])]


def in_order(run: Path) -> list[dict]:
    """The lines by stage and step. Training's lines and the evaluations of one step are told apart; none stands twice."""
    key = lambda line: (line["stage"] == "teacher", "fd_1" in line, line["step"])
    lines = sorted(log_of(run), key=key)
    assert len(lines) == len({key(line) for line in lines})
    return lines


def tensors_of(run: Path) -> dict[str, dict]:
    """All weights, states and latents of a run: file -> name -> tensor."""
    return {str(path.relative_to(run)): data.read_tensors(path)[0] for path in sorted(run.rglob("*.safetensors"))}


def assert_same(a: Path, b: Path, pattern: str = "") -> None:
    """Two runs hold the same tensors bit for bit, in the files that both have and whose names match."""
    left, right = ({k: v for k, v in tensors_of(run).items() if re.search(pattern, k)} for run in (a, b))
    assert left and left.keys() == right.keys()
    for file, tensors in left.items():
        assert tensors.keys() == right[file].keys()
        for name, tensor in tensors.items():
            assert torch.equal(tensor, right[file][name]), f"{file}: {name}"


def stamps(run: Path) -> dict[str, tuple]:
    return {str(path.relative_to(run)): (path.stat().st_mtime_ns, path.read_bytes()) for path in run.rglob("*") if path.is_file()}


def one_line(error: pytest.ExceptionInfo, *parts: str) -> None:
    """The message is one line and names the thing, what was found and what is accepted."""
    text = str(error.value)
    assert "\n" not in text and all(re.search(part, text) for part in parts), text


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder whose runs/base is a whole run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("home")
    main(folder, "--name", "base", report=True)
    return folder


@pytest.fixture(scope="module")
def base(home) -> Path:
    return home / "runs" / "base"


@pytest.fixture
def again(home, base):
    """A copy of the base run in runs/NAME, as if --name NAME had made it."""
    def copy(name: str, *without: str) -> Path:
        run = home / "runs" / name
        shutil.copytree(base, run)
        config = json.loads((run / "config.json").read_text())
        (run / "config.json").write_text(json.dumps({**config, "name": name}))
        for pattern in without:
            for path in run.glob(pattern):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        return run
    return copy


# the whole pipeline

def test_a_run_ends_with_a_valid_report_that_has_every_baseline(base):
    out = json.loads((base / "report.json").read_text())
    report.validate_report(out)
    rows = [(r["model"], r["steps"], r["guidance"], r["nfe"]) for r in out["rows"]]
    assert rows[0] == ("teacher", 3, 2.5, 6)
    assert sorted(rows[1:7]) == sorted(("teacher", n, g, n * (2 if g > 1 else 1)) for n in (4, 2, 1) for g in (2.5, 1.0))
    assert sorted(rows[7:]) == sorted((model, n, 1.0, n) for model in ("untrained", "student") for n in (4, 2, 1))
    assert {r["sampler"] for r in out["rows"]} == {"euler"} and out["n"] == 20 and out["seeds"] == [0] and out["preset"] == "tiny"
    assert {"teacher", "data", "distill", "report"} == set(out["seconds"]) and all(v > 0 for v in out["seconds"].values())
    assert set(out["heldout_prompt_accuracy"]) == {"teacher_3", "student_4"}
    # the untrained student is the teacher: without guidance both draw the same images from the same seeds
    fd = {(r["model"], r["steps"], r["guidance"]): r["fd"] for r in out["rows"]}
    assert all(fd["untrained", n, 1.0] == fd["teacher", n, 1.0] != fd["student", n, 1.0] for n in (4, 2, 1))
    assert all(fd["teacher", n, 1.0] != fd["teacher", n, 2.5] for n in (4, 2, 1)) and len(set(fd.values())) == 10
    curves = out["curves"]
    assert {"loss_d", "loss_g", "margin_real", "accuracy_fake", "fd_1", "fd_4", "prompt_accuracy_1", "auc", "floor_fd"} <= set(curves)
    assert [step for step, _ in curves["loss_d"]] == [1, 2, 3, 4, 5, 6] and [step for step, _ in curves["loss_g"]] == [3, 4, 5, 6]
    assert [step for step, _ in curves["fd_1"]] == [2, 4, 6]
    with Image.open(base / "report.png") as picture:
        assert picture.format == "PNG" and min(picture.size) > 500


def test_what_a_run_leaves(base):
    files = {str(path.relative_to(base)) for path in base.rglob("*") if path.is_file()} - {"seconds.json"}
    state = {f"checkpoints/{stage}/step_{step:06d}/{name}" for stage, step, name in
             product(("teacher", "distill"), (4, 6), ("state.safetensors", "meta.json"))}     # the last two, not step 2
    shards = {f"data/0000{i}-{size}.safetensors" for i, size in enumerate(("4x8", "8x4", "4x8", "8x4"))}
    assert files == state | shards | {f"data/{name}" for name in ("prompts.json", "prompts.safetensors", "provenance.json")} | \
        {f"samples/{step:06d}.png" for step in (0, 2, 4)} | \
        {f"checkpoints/{name}.safetensors" for name in ("teacher", "student", "last")} | \
        {"config.json", "env.txt", "log.jsonl", "report.json", "report.png"}
    assert (base / "env.txt").read_text().startswith("command: ") and "torch: " in (base / "env.txt").read_text()
    with Image.open(base / "samples" / "000000.png") as picture:
        assert "euler" in picture.text["parameters"]


def test_the_student_kept_is_the_moving_average_at_its_best_evaluation(base):
    step, tensors, meta = checkpoint.load_state(base / "checkpoints" / "distill")
    scores = {line["step"]: line["fd_1"] + line["fd_4"] for line in log_of(base) if "fd_1" in line}
    assert step == 6 and list(scores) == [2, 4, 6] and meta["best"] == min(scores[2], scores[4])
    last = data.read_tensors(base / "checkpoints" / "last.safetensors")[0]
    student = data.read_tensors(base / "checkpoints" / "student.safetensors")[0]
    best = min(scores, key=scores.get)
    states = {6: tensors, 4: data.read_tensors(base / "checkpoints/distill/step_000004/state.safetensors")[0]}
    teacher = {f"ema.{k}": v for k, v in data.read_tensors(base / "checkpoints" / "teacher.safetensors")[0].items()}
    for name, tensor in last.items():
        assert torch.equal(tensor, tensors[f"ema.{name}"])
        assert torch.equal(student[name], (states | {2: teacher})[best][f"ema.{name}"])
    assert any(not torch.equal(last[k], tensors[f"student.{k}"]) for k in last)      # the average lags behind the weights
    meta = checkpoint.load_metadata(base)
    assert meta["levels"] == "1.0,0.75,0.5,0.25" and meta["sampler"] == "euler" and meta["sizes"] == "32x64,64x32"


def test_the_same_command_again_does_no_work(home, base):
    before = stamps(base)
    main(home, "--name", "base", report=True)
    after = stamps(base)
    assert before.keys() == after.keys()
    changed = {name for name in before if before[name] != after[name]}
    assert changed <= {"config.json", "env.txt", "log.jsonl"}, changed
    assert before["log.jsonl"][1] == after["log.jsonl"][1] and before["config.json"][1] == after["config.json"][1]


def test_dry_run_prints_what_a_run_takes_and_writes_nothing(tmp_path, base):
    out = main(tmp_path, "--dry-run")
    assert not list(tmp_path.iterdir())
    counts = [int(n.replace(",", "")) for n in re.search(r"teacher ([\d,]+), student ([\d,]+), heads ([\d,]+)", out).groups()]
    weights = data.read_tensors(base / "checkpoints" / "teacher.safetensors")[0]
    state = checkpoint.load_state(base / "checkpoints" / "distill")[1]
    numbers = lambda tensors, prefix: sum(t.numel() for k, t in tensors.items() if k.startswith(prefix))
    # buffers (the position table, the heads' statistics) are no parameters
    buffers = weights["pos_embed"].numel()
    assert counts[:2] == [numbers(weights, "") - buffers] * 2
    assert counts[2] == numbers(state, "heads.") - numbers(state, "heads.feat_")
    assert "batch: 8" in out and "GiB  sum" in out and re.search(r"FLOPs: \d\.\d+e\+\d+ a LADD step of 8 pairs", out)


# reuse and determinism

def test_teacher_and_data_of_another_run_give_its_student_bit_for_bit(home, base):
    """The second run of one seed, with both stages skipped: a run is a function of its flags."""
    main(home, "--name", "reuse", *REUSE)
    run = home / "runs" / "reuse"
    assert not (run / "data").exists() and not list(run.glob("checkpoints/teacher*"))
    assert in_order(run) == [line for line in in_order(base) if line["stage"] != "teacher"]
    left, right = tensors_of(base), tensors_of(run)
    for file in right:
        assert all(torch.equal(t, left[file][name]) for name, t in right[file].items()), file
    assert set(right) == {file for file in left if file.startswith("checkpoints") and "teacher" not in file}


def test_another_seed_gives_another_run(home, base):
    for flags in (["--stop-after", "1"], [*REUSE, "--stop-after", "1"]):             # teacher, then student
        name = f"seed{len(flags)}"
        main(home, "--name", name, "--seed", "1", *flags)
        stage = "distill" if flags[0] == "--teacher" else "teacher"
        mine, same = log_of(home / "runs" / name, stage)[0], log_of(base, stage)[0]
        assert mine.keys() == same.keys() and mine["step"] == same["step"] == 1
        loss = next(k for k in mine if k.startswith("loss"))
        assert mine[loss] != same[loss]


def test_a_smaller_student_goes_through_to_the_report(home):
    main(home, "--name", "small", *REUSE, "--student-depth", "1", "--steps", "2", "--eval-every", "0", "--grid-every", "0", report=True)
    run = home / "runs" / "small"
    assert checkpoint.load_mmdit(run).config.depth == 1
    rows = json.loads((run / "report.json").read_text())["rows"]
    fd = {(r["model"], r["steps"], r["guidance"]): r["fd"] for r in rows}
    assert fd["untrained", 1, 1.0] != fd["teacher", 1, 1.0]                          # half of the teacher is another network


def test_other_numbers_of_levels_go_through_to_the_report(home):
    """Steps are the divisors of their number; the best student is that of 1 and of all steps."""
    main(home, "--name", "three", *REUSE, *"--levels 1,.6,.3 --probs .4,.3,.3 --steps 2 --n 12".split(), report=True)
    run = home / "runs" / "three"
    rows = json.loads((run / "report.json").read_text())["rows"]
    assert [(r["steps"], r["nfe"]) for r in rows if r["model"] == "student"] == [(3, 3), (1, 1)]
    scores = [line["fd_1"] + line["fd_3"] for line in log_of(run) if "fd_1" in line]
    assert len(scores) == 2 and checkpoint.load_state(run / "checkpoints/distill")[2]["best"] == scores[0]


def save_teacher(folder: Path, seed: int = 0, **changes) -> Path:
    """t.safetensors, a teacher for TINY in which no weight is zero, so that every gradient is more than rounding."""
    config = dict(depth=2, width=64, context_dim=64, pooled_dim=64, qk_norm=True, pos_grid=4)
    torch.manual_seed(seed)
    model = randomise(MMDiT(MMDiTConfig(**{**config, **changes}), kernels.load("torch")), seed)
    checkpoint.save_mmdit(model, folder / "t.safetensors", {})
    return folder / "t.safetensors"


def test_accumulation_equals_the_whole_batch(home, tmp_path):
    teacher = save_teacher(tmp_path)
    flags = ["--teacher", teacher, "--data", "runs/base/data", *"--misaligned 0 --steps 2 --heads-first 0 --warmup 0".split(),
             *"--eval-every 0 --grid-every 0 --ema 0 --decay 0 --batch 8".split()]
    for name, count in (("acc1", "1"), ("acc2", "2"), ("acc4", "4")):
        main(home, "--name", name, *flags, "--accumulate", count)
    state = {name: checkpoint.load_state(home / "runs" / name / "checkpoints" / "distill")[1] for name in ("acc1", "acc2", "acc4")}
    start = {f"student.{k}": v for k, v in data.read_tensors(teacher)[0].items()}
    size = lambda difference: sum(float(d.square().sum()) for d in difference) ** 0.5
    moved = size(state["acc1"][k] - v for k, v in start.items())
    for name in ("acc2", "acc4"):
        apart = size(state["acc1"][k] - state[name][k] for k in start)
        # rounding: Adam divides by the gradient's size, so where that is near zero its noise is magnified
        assert moved > 0.1 and apart < 0.02 * moved, f"{name}: {apart:.3g} of {moved:.3g}"


def test_overfit_one_batch_shows_one_batch(home, monkeypatch):
    seen, batch = [], data.Latents.batch
    monkeypatch.setattr(data.Latents, "batch", lambda self, step, *args: seen.append(step) or batch(self, step, *args))
    main(home, "--name", "one", "--overfit-one-batch", "--heads-steps", "2", "--steps", "2", "--eval-every", "0", "--grid-every", "0")
    assert len(seen) > 6 + 2 * 4 and set(seen) == {0}
    seen.clear()
    main(home, "--name", "many", *REUSE, "--heads-steps", "2", "--steps", "2", "--eval-every", "0", "--grid-every", "0")
    assert seen[-8:] == list(range(8))                                              # every heads' step its own


def test_profile_writes_a_trace_of_the_last_steps(home):
    main(home, "--name", "profile", *REUSE, "--profile", "trace.json", "--steps", "4", "--eval-every", "0", "--grid-every", "0")
    events = json.loads((home / "trace.json").read_text())["traceEvents"]
    steps = sum(e.get("name", "").startswith("Optimizer.step") for e in events)
    assert steps == 2 * 3, steps                                                    # two optimizers, three steps


# resume

@pytest.fixture(scope="module")
def resumed(home) -> tuple[Path, list[str]]:
    """The base run again, stopped after every third step."""
    printed = [main(home, "--name", "resumed", "--stop-after", "3") for _ in range(4)]
    printed.append(main(home, "--name", "resumed", report=True))
    return home / "runs" / "resumed", printed


def test_three_steps_and_three_resumed_equal_six_bit_for_bit(base, resumed):
    """Teacher, its optimizer, data, student, average, heads, both optimizers, best student, data order (by the log)."""
    run, printed = resumed
    said = [re.search(r"saved step (\d+) in \S*(teacher|distill)", text) for text in printed]
    assert [m and (m[2], m[1]) for m in said] == [("teacher", "3"), ("teacher", "6"), ("distill", "3"), ("distill", "6"), None]
    assert_same(base, run, r"(step_000006/state|teacher|student|last|data/.*)\.safetensors$")
    state = data.read_tensors(run / "checkpoints/distill/step_000006/state.safetensors")[0]
    assert {"student", "ema", "heads", "opt_g", "opt_d"} == {name.split(".")[0] for name in state}
    metas = [json.loads((r / "checkpoints/distill/step_000006/meta.json").read_text()) for r in (base, run)]
    assert metas[0] == metas[1]
    assert in_order(base) == in_order(run)
    rows = [[{k: v for k, v in row.items() if k != "ms_per_image"} for row in json.loads((r / "report.json").read_text())["rows"]]
            for r in (base, run)]
    assert rows[0] == rows[1]
    for step in (0, 2, 4):
        assert (base / f"samples/{step:06d}.png").read_bytes() == (run / f"samples/{step:06d}.png").read_bytes()


def test_the_report_counts_the_seconds_of_all_processes(resumed):
    run, _ = resumed
    seconds = json.loads((run / "report.json").read_text())["seconds"]
    first = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    for stage in ("teacher", "distill"):
        spent = max(line["seconds"] for line in first if line["stage"] == stage and "seconds" in line)
        assert seconds[stage] >= spent, stage


def test_no_line_stands_twice_after_a_kill(home, base, again):
    """As a kill leaves it: log and grids ahead of the newest state, its last line cut off."""
    run = again("killed", "checkpoints/*.safetensors", "checkpoints/distill/step_000006", "report.*")
    shutil.copy(base / "checkpoints/teacher.safetensors", run / "checkpoints")
    with (run / "log.jsonl").open("a") as f:
        f.write('{"stage": "distill", "step": 7, "lo')
    main(home, "--name", "killed")
    assert in_order(run) == in_order(base)
    assert_same(base, run, r"(step_000006/state|student|last)\.safetensors$")


def test_data_generation_resumes_at_the_missing_shard(home, base, again):
    run = again("shards", "data/00002*", "checkpoints/*.safetensors", "checkpoints/distill", "report.*")
    shutil.copy(base / "checkpoints/teacher.safetensors", run / "checkpoints")
    kept = {path: path.stat().st_mtime_ns for path in run.glob("data/0000[013]*")}
    main(home, "--name", "shards", "--stop-after", "1")
    assert len(kept) == 3 and all(path.stat().st_mtime_ns == stamp for path, stamp in kept.items())
    assert_same(base, run, r"data/.*safetensors$")


# signals

def start(folder: Path, *flags: str) -> subprocess.Popen:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, str(ROOT / "train.py"), *TINY, *flags], cwd=folder, env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def wait_for(condition, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)


def lines_in(path: Path) -> int:
    return path.read_text().count("\n") if path.exists() else 0


LONG = "--steps 100000 --eval-every 0 --grid-every 0".split()


def test_sigterm_saves_and_ends_with_code_0_and_the_run_resumes(home, base):
    """Wherever the signal falls, the run that resumes equals one that nothing disturbed."""
    flags = [*REUSE, *LONG, "--save-every", "100000"]
    process, run = start(home, "--name", "term", *flags), home / "runs" / "term"
    try:
        wait_for(lambda: lines_in(run / "log.jsonl") >= 2 or process.poll() is not None)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, err
    step = int(re.search(r"SIGTERM: saved step (\d+) in runs/term/checkpoints/distill; the same command resumes", out)[1])
    assert [path.name for path in (run / "checkpoints/distill").iterdir()] == [f"step_{step:06d}"] and "Traceback" not in err
    main(home, "--name", "term", *flags, "--stop-after", "2")
    main(home, "--name", "whole", *flags, "--stop-after", str(step + 2))
    assert log_of(run) == log_of(home / "runs" / "whole")
    assert_same(run, home / "runs" / "whole", f"step_{step + 2:06d}/state")


@pytest.mark.slow
def test_kill_at_a_random_moment_leaves_a_run_that_resumes(home, base):
    """SIGKILL after a random time, over and over, each run resuming the one before, until one ends by itself."""
    delays, run, kills = torch.rand(40).tolist(), home / "runs" / "kill", 0
    for delay in delays:
        process = start(home, "--name", "kill", "--save-every", "1", *"--eval-every 2".split())
        seen = lines_in(run / "log.jsonl")
        try:
            wait_for(lambda: lines_in(run / "log.jsonl") != seen or process.poll() is not None)
            time.sleep(delay)
            killed = process.poll() is None
            process.kill()
            err = process.communicate()[1]
        finally:
            process.kill()
        kills += killed
        assert killed or process.returncode == 0, err
        if not killed:
            break
    assert kills and not killed
    assert in_order(run) == in_order(base)
    assert_same(base, run, r"(step_000006/state|teacher|student|last|data/.*)\.safetensors$")


# what stops a run

def test_a_damaged_state_is_named(home, again):
    run = again("damaged", "checkpoints/student.safetensors", "report.json")
    state = run / "checkpoints/distill/step_000006/state.safetensors"
    state.write_bytes(state.read_bytes()[:-1000])
    with pytest.raises(InputError) as error:
        main(home, "--name", "damaged")
    one_line(error, "runs/damaged/checkpoints/distill/step_000006/state.safetensors", "no whole safetensors file")


def test_a_damaged_shard_is_named(home, again):
    run = again("shard", "checkpoints/student.safetensors", "report.json")
    shard = run / "data/00001-8x4.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1000])
    for flags in ([], [*REUSE[:2], "--data", "runs/shard/data", "--name", "other"]):
        with pytest.raises(InputError) as error:
            main(home, "--name", "shard", *flags)
        one_line(error, "runs/shard/data/00001-8x4.safetensors", "no whole safetensors file")


def test_a_run_of_other_flags_is_left_alone(home, base):
    before = stamps(base)
    for flags, parts in ((["--lr", "5e-4"], ("--lr 0.001", "found 0.0005")), (["--taps", "1"], (r"--taps \[0, 1\]", r"found \[1\]"))):
        with pytest.raises(InputError) as error:
            main(home, "--name", "base", *flags)
        one_line(error, "runs/base", *parts, "another --name")
    assert stamps(base) == before


def test_a_broken_config_is_named(home, again):
    run = again("broken")
    (run / "config.json").write_text('{"preset": "ti')
    with pytest.raises(InputError) as error:
        main(home, "--name", "broken")
    one_line(error, "runs/broken/config.json", "JSON")


@pytest.mark.parametrize("changes, flags, parts", [
    (dict(context_dim=32), [], ("t.safetensors", "32", "--text-dim 64")),
    (dict(pooled_dim=32), [], ("t.safetensors", "32", "--text-dim 64")),
    (dict(in_channels=4, out_channels=4), [], ("t.safetensors", "4", "16")),
    (dict(pos_grid=2), [], ("t.safetensors", "2", "4|--sizes")),
    (dict(patch=1), [], ("t.safetensors", "1", "2")),
    (dict(depth=1), [], ("--taps", "1 block")),
    ({}, ["--student-depth", "3"], ("--student-depth 3", "2 blocks")),
], ids=lambda value: str(value) if isinstance(value, dict) else "")
def test_a_teacher_that_does_not_fit_is_refused_before_a_run_is_made(tmp_path, changes, flags, parts):
    with pytest.raises(InputError) as error:
        main(tmp_path, "--teacher", save_teacher(tmp_path, **changes), *flags)
    one_line(error, *parts)
    assert not (tmp_path / "runs").exists()                 # a failed attempt does not take the name from the next


def test_what_is_not_there_is_refused_before_a_run_is_made(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "junk.safetensors").write_text("junk")
    for flags, parts in ((["--teacher", "no.safetensors"], ("--teacher", "no.safetensors")), (["--data", "nowhere"], ("--data", "nowhere")),
                         (["--teacher", "empty"], ("empty", "student.safetensors")), (["--teacher", "junk.safetensors"], ("junk", "whole")),
                         (["--data", "empty"], ("empty", "provenance.json")),
                         (["--profile", "nowhere/trace.json"], ("--profile", "nowhere"))):
        with pytest.raises(InputError) as error:
            main(tmp_path, *flags)
        one_line(error, *parts)
        assert not (tmp_path / "runs").exists(), flags


def test_latents_that_do_not_fit_are_refused(home, tmp_path):
    """Text of another width; too few for the batch, whatever --data-size says."""
    for changes, flags, parts in ((dict(context_dim=32, pooled_dim=32), ["--text-dim", "32"], ("runs/base/data", "64", "32")),
                                  ({}, ["--batch", "48", "--data-size", "4096"], ("48",))):
        with pytest.raises(InputError) as error:
            main(home, "--name", f"misfit{len(parts)}", "--teacher", save_teacher(tmp_path, **changes), *REUSE[2:], *flags)
        one_line(error, *parts)


def test_the_holdout_follows_the_latents_not_the_flag(home, base):
    """--data-size says what to generate; with --data it must not decide what is held out."""
    main(home, "--name", "holdout", *REUSE, "--data-size", "4096", "--steps", "2")
    mine, same = (log_of(run, "distill")[0] for run in (home / "runs" / "holdout", base))
    assert mine == same


class Poison:
    """A loss function whose value is NaN at its `at`-th call."""

    def __init__(self, function, at: int):
        self.function, self.at, self.calls = function, at, 0

    def __call__(self, *args):
        self.calls += 1
        out = self.function(*args)
        if self.calls != self.at:
            return out
        return (out[0] * float("nan"), *out[1:]) if isinstance(out, tuple) else out * float("nan")


@pytest.mark.parametrize("log_every", ["1", "100"])
@pytest.mark.parametrize("name, stage, term, call, step", [("flow_loss", "teacher", "loss", 3, 3), ("heads_loss", "distill", "loss_d", 3, 3),
                                                           ("student_loss", "distill", "norm_g|loss_[gd]", 1, 3)])
def test_nan_stops_the_run_and_is_never_saved(home, monkeypatch, name, stage, term, call, step, log_every):
    """Also where no line is logged: what is saved has been looked at."""
    monkeypatch.setattr(train, name, Poison(getattr(train, name), call))
    run, flags = home / "runs" / f"nan_{name}_{log_every}", REUSE if stage == "distill" else []
    with pytest.raises(FloatingPointError) as error:
        main(home, "--name", run.name, *flags, "--log-every", log_every, "--eval-every", "0", "--grid-every", "0")
    one_line(error, rf"step {step if log_every == '1' else 4}\b", rf"\b({term})\b", "nan")
    found, tensors, _ = checkpoint.load_state(run / "checkpoints" / stage)
    assert found == 2 and all(t.isfinite().all() for t in tensors.values())
