"""train.py on several processes: two equal one; resuming on another number; signals, hangs, losses,
kills."""
import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import begin_ranks, end_ranks, fork, has_ended, run_ranks
from test_train import CLOCK, QUIET, TINY, load_state, log_of, main, rows_of, save_teacher, weights

import train
from ladd import config
from ladd.cli import InputError
from ladd.engine import parallel, run, state, step
from ladd.engine.parallel import Norms
from ladd.engine.run import Health, Stopper, pick_device
from ladd.report import evaluate

ROOT = Path(__file__).parents[1]


def train_on(home: Path, *lines: str) -> None:
    """Run train.py with TINY and each of `lines` in one group of processes; the last act of each of
    these."""
    finish, start = parallel.finish, parallel.start
    parallel.finish = parallel.barrier
    parallel.start = lambda *args: None if torch.distributed.is_initialized() else start(*args)
    os.chdir(home)
    for line in lines:
        try:
            train.main(shlex.split(f"{TINY} {line}"))
        except train.Stopped as stopped:
            print(stopped)
    finish()
    sys.exit("finish() came back: a group's thread may meet Python's end")


def processes(home: Path, count: int, *lines: str) -> str:
    """Run train.py with each of `lines` on `count` processes; return what they print."""
    return run_ranks(count, lambda: train_on(home, *lines), home)


def torchrun(count: int, script: str, *args: str) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
            str(count), "--", script, *args]


def environment(**extra: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **extra}


def close(a: Path, b: Path, stage: str, net: str, limit: float = 0.02) -> None:
    """The weights of two runs lie within `limit` of how far the network moved: Adam divides by a
    gradient's size, so where that is near zero its rounding is magnified."""
    one, other = (load_state(run / "checkpoints" / stage)[1] for run in (a, b))
    assert one.keys() == other.keys()
    names = [k for k in one if k.startswith(net) and one[k].is_floating_point()]
    moved = sum(float(one[k].sum()) for k in one if k.startswith(MOMENTS[net])
                and k.endswith("_sq"))
    apart = sum(float((one[k] - other[k]).square().sum()) for k in names) ** 0.5
    assert moved > 0 and apart < limit, (net, apart)


MOMENTS = {"model.": "opt.", "student.": "opt_g.", "ema.": "opt_g.", "heads.": "opt_d."}


def same_log(a: Path, b: Path, tol: float) -> None:
    left, right = log_of(a), log_of(b)
    assert left
    assert [(x["stage"], x["step"]) for x in left] == [(x["stage"], x["step"]) for x in right]
    for x, y in zip(left, right):
        assert x.keys() - {"warnings"} == y.keys() - {"warnings"}
        for k in x.keys() - set(CLOCK) - {"stage", "warnings"}:
            assert abs(x[k] - y[k]) <= tol * (1 + abs(x[k])), (x["stage"], x["step"], k, x[k], y[k])


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("torchrun")
    save_teacher(folder)
    return folder


@pytest.fixture(scope="module")
def whole(home) -> Path:
    """Return a run of one process, whose data the others use."""
    main(home, "--name whole", report=True)
    return home / "runs" / "whole"


REUSE = "--teacher t.safetensors --data runs/whole/data"
# what is compared, and on how many processes it is run: (name, flags of both, flags of the
# processes) none on the first process
CASES = [("ddp", "", "--shard none"), ("fsdp", "", "--shard all --recompute selective"),
         ("few", "--mismatched .125", "--shard none"), ("micro", "--heads-repeats 2 --set "
                                                        "r1_weight=1", "--shard student "
                                                        "--micro-batch 2 --recompute full")]


@pytest.mark.slow
def test_two_processes_train_as_one(home, whole):
    """The full pipeline, then three layouts of the distillation: every line of the log, every
    weight."""
    said = processes(home, 2, "--name whole2 --shard none")
    same_log(home / "runs/whole", home / "runs/whole2", 2e-3)
    for stage, nets in (("teacher", ["model."]), ("distill", ["student.", "ema.", "heads."])):
        for net in nets:
            close(home / "runs/whole", home / "runs/whole2", stage, net)
    ours, theirs = rows_of(home / "runs/whole"), rows_of(home / "runs/whole2")
    for a, b in zip(ours, theirs):
        assert a["model"] == b["model"] and abs(a["fd"] - b["fd"]) < 2e-2 * a["fd"]
    # one process speaks
    assert said.count("wrote runs/whole2/report.json") == 1
    for name, flags, _ in CASES:
        main(home, f"--name one-{name} {REUSE} {flags} {QUIET}")
    said = processes(home, 2, *(f"--name two-{name} {REUSE} {flags} {more} {QUIET}" for name, flags,
                                more in CASES), f"--name two-trace {REUSE} --steps 2 {QUIET} "
                     "--profile trace.json", "--bench-steps 1")
    assert min((home / name).stat().st_size for name in ("trace.json", "trace.json.1")) > 10 ** 4
    timed = json.loads(said[said.index('{\n "preset"'):].split("\n}")[0] + "\n}")
    assert timed["world_size"] == 2 and timed["micro_batch"] == 4
    for name, _, _ in CASES:
        one, two = (home / "runs" / f"{kind}-{name}" for kind in ("one", "two"))
        same_log(one, two, 2e-3)
        for net in ("student.", "ema.", "heads."):
            close(one, two, "distill", net)
        assert len(list((two / "checkpoints/distill").glob("step_000006/part-*"))) == 2


@pytest.mark.slow
def test_two_processes_edit_as_one(home):
    """Teacher on pairs of images, its own data, the discriminator: each process has its samples'
    sources."""
    flags = "--task edit --image-guidance 1.5 --set text_dropout=.4 --set image_dropout=.2 --n 8"
    main(home, f"--name edit {flags}")
    processes(home, 2, f"--name edit2 {flags} --shard none")
    one, two = home / "runs/edit", home / "runs/edit2"
    same_log(one, two, 2e-3)
    for stage, nets in (("teacher", ["model."]), ("distill", ["student.", "ema.", "heads."])):
        for net in nets:
            close(one, two, stage, net)
    for path in sorted((one / "data").glob("0*")):
        ours, theirs = weights(path), weights(two / "data" / path.name)
        assert all(torch.equal(ours[k], theirs[k]) for k in ("image", "prompt_id"))
        assert (ours["x0"] - theirs["x0"]).abs().max() < 1e-2 * ours["x0"].abs().max(), path.name


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(home, whole):
    """2 -> 1 and 1 -> 2 against the undisturbed run on one; 2 -> 2 is bit for bit."""
    flags = f"{REUSE} {QUIET}"
    main(home, f"--name straight {flags}")
    main(home, f"--name up {flags} --set stop_after=3")
    said = processes(home, 2, f"--name down {flags} --set stop_after=3", f"--name up {flags}",
                     f"--name even {flags}", f"--name odd {flags} --set stop_after=3",
                     f"--name odd {flags}")
    assert "saved step 3" in said
    main(home, f"--name down {flags}")
    for name in ("up", "down"):
        same_log(home / "runs/straight", home / "runs" / name, 2e-3)
        for net in ("student.", "ema.", "heads."):
            close(home / "runs/straight", home / "runs" / name, "distill", net)
    even, odd = (load_state(home / f"runs/{name}/checkpoints/distill")[1] for name
                 in ("even", "odd"))
    assert all(torch.equal(even[k], odd[k]) for k in even)
    assert all(torch.equal(a, b) for a, b
               in zip(*(weights(home / f"runs/{n}/checkpoints/student.safetensors") .values() for n
                        in ("even", "odd"))))


LONG = f"--steps 4000 --save-every 20 --set log_every=20 {QUIET} --shard student"


def until(condition, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it does not come"
        time.sleep(0.05)


def begin(home: Path, flags: str, ready) -> dict[int, Path]:
    """Start two processes, which need not have the same fate; return when ready()."""
    job = begin_ranks(2, lambda: train_on(home, flags), home)
    first = next(iter(job))
    until(lambda: ready() or has_ended(first))
    assert not has_ended(first), end_ranks(job, 1)
    return job


def hangs(job: dict[int, Path], stage: str) -> None:
    """Stop the second process: the first one names it and ends."""
    first, second = job
    os.kill(second, signal.SIGSTOP)
    start = time.monotonic()
    until(lambda: has_ended(first), 60)
    (code, said), _ = end_ranks(job, 1)
    assert code == 1 and time.monotonic() - start < 60
    assert re.search(rf"{stage}: rank 1 did not reach step \d+ within 4 s", said), said


@pytest.mark.slow
def test_a_rank_that_hangs_while_data_are_made_is_named_too(home):
    shards = lambda: len(list((home / "runs/made/data").glob("0*")))
    hangs(begin(home, "--name made --teacher t.safetensors --data-size 6000 --timeout 4",
                lambda: shards() > 2), "data")
    assert shards() > 2


@pytest.mark.slow
def test_sigterm_saves_a_lost_or_hanging_rank_ends_the_run(home, whole):
    """In each case the last checkpoint is complete and the run resumes from it. The first one is
    torchrun's."""
    folder = lambda name: home / "runs" / name / "checkpoints" / "distill"
    flags = lambda name: f"--name {name} {REUSE} {LONG}"
    there = lambda name: len(state.states(folder(name))) == 2
    job = subprocess.Popen(torchrun(2, str(ROOT / "train.py"),
                                    *shlex.split(f"{TINY} {flags('term')}")),
                           cwd=home, env=environment(), stdout=subprocess.PIPE,
                           stderr=subprocess.STDOUT, text=True)
    until(lambda: job.poll() is not None or there("term"))
    job.send_signal(signal.SIGTERM)
    said = job.communicate(timeout=120)[0]
    assert "SIGTERM: saved step" in said, said
    assert state.open_state(folder("term")).step == max(int(p.name[5:])
                                                        for p in state.states(folder("term")))

    job = begin(home, flags("lost"), lambda: there("lost"))
    os.kill([*job][1], signal.SIGKILL)
    (code, said), _ = end_ranks(job, 120)
    assert code == 1 and state.open_state(folder("lost")).step >= 40, said

    hangs(begin(home, f"{flags('hang')} --timeout 4", lambda: there("hang")), "distill")
    assert state.open_state(folder("hang")).step >= 40


@pytest.mark.slow
def test_a_run_killed_at_random_ends_as_if_undisturbed(home, whole):
    """SIGKILL at 20 random moments and more: some time after the start, or after a new state."""
    flags = f"{REUSE} {QUIET} --steps 300 --save-every 4 --set log_every=4"
    start = time.monotonic()
    main(home, f"--name calm {flags}")
    pace = (time.monotonic() - start) / 75                      # s from one state to the next
    draw, kills, lives = random.Random(0), 0, 0
    done = home / "runs/killed/checkpoints/student.safetensors"
    listed = lambda: state.states(home / "runs/killed/checkpoints/distill")
    while not done.exists():
        child = fork(lambda: main(home, f"--name killed {flags}"), home / "killed.txt")
        lives += 1
        before = listed()
        if draw.random() < 0.5:
            until(lambda: listed() != before or has_ended(child))
        patience = draw.uniform(0, 2 * pace if listed() != before else 0.5) if kills < 25 else 1e9
        end = time.monotonic() + patience
        while time.monotonic() < end and not has_ended(child):
            time.sleep(0.005)
        if not has_ended(child):
            os.kill(child, signal.SIGKILL)
            kills += 1
        os.waitpid(child, 0)
        assert lives < 300
    assert kills >= 20, kills
    calm, killed = (load_state(home / f"runs/{name}/checkpoints/distill") for name
                    in ("calm", "killed"))
    assert calm[0] == killed[0] == 300 and all(torch.equal(calm[1][k], killed[1][k]) for k
                                               in calm[1])
    assert log_of(home / "runs/calm") == log_of(home / "runs/killed")


# one process

def test_each_process_of_a_machine_takes_a_gpu_of_its_own(monkeypatch):
    taken = []
    for name, value in (("is_available", True), ("device_count", 2)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    assert pick_device("auto") == torch.device("cuda",
                                               0) and pick_device("cpu") == torch.device("cpu")
    # left over from another program
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("RANK", "1")
    assert pick_device("cuda") == torch.device("cuda", 0) and taken.pop() == 0
    assert parallel.ranks() == (0, 1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert pick_device("cuda") == torch.device("cuda", 1) and taken == [0, 1]
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(InputError,
                       match=r"--nproc-per-node must be at most 2, .* \(got process 3\)"):
        pick_device("auto")


def test_out_of_memory_says_what_the_plan_was_and_what_helps(home, whole, monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    monkeypatch.setattr(step, "student_loss", full)
    with pytest.raises(InputError) as error:
        main(home, f"--name full {REUSE} {QUIET} --save-every 1")
    said = str(error.value)
    assert re.fullmatch(
        r"out of memory on cpu \(CUDA out of memory\. Tried .*\); the plan was, in GiB: "
        r"student \(weights.*, sum [\d.]+; a --micro-batch below 8, --recompute selective "
        r"or full and --shard student or all need less", said), said
    assert state.open_state(home / "runs/full/checkpoints/distill").step in (1, 2)


def test_batches_that_cannot_be_shared_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(InputError,
                       match=r"--batch must be a multiple of the 3 processes \(got 8\)"):
        main(tmp_path, "")
    with pytest.raises(InputError,
                       match=r"--teacher-batch must be a multiple of the 3 processes \(got 8\)"):
        main(tmp_path, "--batch 9")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="WORLD_SIZE is 2 without LOCAL_RANK, MASTER_ADDR, "
                       "MASTER_PORT"):
        main(tmp_path, "")
    with pytest.raises(InputError, match=r"--replicas must be 1 with --shard none.* \(got 2\)"):
        main(tmp_path, "--shard none --replicas 2")
    with pytest.raises(InputError, match=r"--replicas must divide .* processes, 2 \(got 3\)"):
        main(tmp_path, "--replicas 3")
    assert not list(tmp_path.iterdir())


def numbers(good: float = 1.0):
    """Return (module, norms) of two parameters whose gradients have norm `good`."""
    each = torch.tensor([1.0, good])
    return torch.nn.Linear(2, 2), Norms(each.norm(), each)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_the_first_step_with_nan_or_inf_is_named(bad):
    health = Health()
    health.check()
    health.note(1, {"loss_d": torch.tensor(1.0)}, {"heads": numbers()})
    health.check()
    health.note(2, {"loss_d": torch.tensor(1.0)}, {"heads": numbers()})
    health.note(3, {"loss_d": torch.tensor(1.0)}, {"heads": numbers(), "student": numbers(bad)})
    health.note(4, {"loss_d": torch.tensor(bad)}, {"heads": numbers(bad)})
    with pytest.raises(FloatingPointError, match="^step 3: the gradient of student bias has norm "
                       f"{bad};"):
        health.check()
    health.note(5, {"loss_d": torch.tensor(bad), "loss_g": torch.tensor(2.0)}, {"heads": numbers()})
    with pytest.raises(FloatingPointError, match=f"^step 5: loss_d is {bad}; the last"):
        health.check()


def test_a_loss_of_another_process_stops_this_one_too(monkeypatch):
    """Otherwise it would wait in the next collective for a process that has left."""
    monkeypatch.setattr(run, "any_rank", lambda bad: True)
    health = Health()
    health.note(7, {"loss_d": torch.tensor(1.0)}, {"heads": numbers()})
    with pytest.raises(FloatingPointError, match="^step 7 or before: a loss of another process is "
                       "NaN"):
        health.check()


BALANCED = {"auc_n": 96.0, "auc": 0.6, "auc_memory": 0.5, "auc_null": 0.5}


@pytest.mark.parametrize("values, said", [
    ({"entropy_1": 0.79}, "entropy_1 is 0.79"), ({"entropy_1": 0.81}, ""), ({"entropy_4": 0.5}, ""),
    ({"margin_real": 0.04, "margin_fake": 0.03}, "active margins"),
    ({"margin_real": 0.04, "margin_fake": 0.2}, ""),
    (BALANCED, ""), (BALANCED | {"auc": 0.999}, "the heads win"),
    (BALANCED | {"auc": 0.2}, "the heads are lost"),
    (BALANCED | {"auc": 0.4}, ""), (BALANCED | {"auc_memory": 0.75}, "memorised"),
    (BALANCED | {"auc_memory": 0.65}, ""),
    (BALANCED | {"auc_null": 0.85}, "leaks"), (BALANCED | {"auc_null": 0.15}, "leaks"),
    (BALANCED | {"auc_null": 0.7}, "")])
def test_collapse_warnings(values, said):
    """entropy_4 was lower at the first evaluation; 5 sd of an AUC are .21 at 96 against 96, .29 at
    48."""
    found = evaluate.collapse_warnings(values, {"entropy_4": 0.4, "entropy_1": 0.9})
    assert len(found) == bool(said) and all(said in text for text in found)


def test_a_collapse_warning_is_printed_and_logged(home, whole, monkeypatch):
    monkeypatch.setattr(evaluate, "collapse_warnings",
                        lambda values, before={}: ["all is grey"] * ("auc" in values))
    flags = f"{REUSE} --eval-every 2"
    said = main(home, f"--name warned {flags}")
    assert all(f"step {step}: warning: all is grey" in said for step in (2, 4, 6))
    lines = [json.loads(line) for line in (home / "runs/warned/log.jsonl").read_text().splitlines()]
    found = [line.get("warnings") for line in lines if line["stage"] == "eval"]
    assert found == [["all is grey"]] * 3
    assert (home / "runs/warned/checkpoints/student.safetensors").exists()


def test_a_checkpoint_is_published_before_the_next_one_begins(home, whole, monkeypatch):
    seen, save_or_stop = {}, train.save_or_stop

    def spied(config, saver, health, step, *rest):
        until(lambda: saver.written)
        save_or_stop(config, saver, health, step, *rest)
        seen[step] = [path.name for path in state.states(saver.folder)]
    monkeypatch.setattr(train, "save_or_stop", spied)
    main(home, f"--name published {REUSE} {QUIET} --save-every 4")
    assert seen[3] == seen[4] == [] and seen[5] == ["step_000004"]


def test_tensorboard_gets_the_numbers_of_the_log_and_the_grids(home, whole, monkeypatch):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    main(home, f"--name board {REUSE} --eval-every 2 --tensorboard")
    run = home / "runs/board"
    lines = [line for line in log_of(run) if line["stage"] == "distill" and "loss_g" in line]
    read = events.EventAccumulator(str(run / "tensorboard" / "distill")).Reload()
    assert [(event.step, event.value) for event in read.Scalars("loss_g")] == [
        (line["step"], pytest.approx(line["loss_g"])) for line in lines]
    read = events.EventAccumulator(str(run / "tensorboard" / "eval")).Reload()
    assert [event.step for event in read.Images("samples")] == [2, 4, 6]
    assert {event.step for event in read.Scalars("fd_1")} == {2, 4, 6}


def test_tensorboard_needs_its_package(monkeypatch):
    monkeypatch.setattr(config, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="^--tensorboard requires the package tensorboard; pip"):
        config.parse_config(["--tensorboard"])


def test_a_warning_about_the_training_batch_is_printed(home, whole, monkeypatch):
    """Not while only the heads train."""
    monkeypatch.setattr(evaluate, "collapse_warnings",
                        lambda values, *before: ["grey"] * ("margin_real" in values))
    said = main(home, f"--name heard {REUSE} {QUIET}")
    assert re.findall(r"step (\d+): warning: grey", said) == ["3", "4", "5", "6"]


def test_a_share_without_mismatched_captions_has_no_accuracy_of_them(home, whole):
    """Of a batch of 8 one sample in ten: none. A mean over nothing would be NaN, which no report
    takes."""
    main(home, f"--name few {REUSE} {QUIET} --mismatched 0.1", report=True)
    lines = [line for line in log_of(home / "runs/few") if "loss_d" in line]
    assert len(lines) == 6 and not any("accuracy_mismatched" in line for line in lines)
    assert (home / "runs/few/report.json").exists()


def test_signals_that_come_together_count_as_one(monkeypatch):
    """A batch system signals torchrun and its processes, torchrun them too; one later ends at
    once."""
    clock, raised = [100.0], []
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    try:
        stopper = Stopper()
        assert not stopper
        for clock[0] in (100.0, 101.5):
            os.kill(os.getpid(), signal.SIGTERM)
            assert stopper and stopper.signal == "SIGTERM"
        monkeypatch.setattr(signal, "raise_signal", raised.append)
        clock[0] = 102.5
        os.kill(os.getpid(), signal.SIGTERM)
        assert raised == [signal.SIGTERM] and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        for s, handler in handlers.items():
            signal.signal(s, handler)


def test_a_signal_ends_the_report_at_once(home, whole, monkeypatch):
    """There is nothing to save: torchrun would wait for half a minute and kill it."""
    seen = []
    monkeypatch.setattr(train, "write_report",
                        lambda *args: seen.append(signal.getsignal(signal.SIGTERM)))
    main(home, f"--name ended {REUSE} {QUIET}", report=True)
    assert seen == [signal.SIG_DFL]


def test_one_process_prints_the_dry_run(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "batch: 8" in main(tmp_path, "--dry-run")
    monkeypatch.setenv("RANK", "1")
    assert not main(tmp_path, "--dry-run")


def test_recomputing_changes_nothing(home, whole):
    found = {}
    for keep in ("none", "selective", "full"):
        main(home, f"--name keep-{keep} {REUSE} {QUIET} --recompute {keep}")
        found[keep] = load_state(home / f"runs/keep-{keep}/checkpoints/distill")[1]
    for keep in ("selective", "full"):
        assert all(torch.equal(found["none"][k], found[keep][k]) for k in found["none"])


@pytest.mark.slow
def test_compiled_graphs_are_reused(home, whole, monkeypatch):
    """Three kinds of block, two sizes: after both were seen in every use, no step compiles
    anything."""
    from torch._dynamo.utils import counters
    compile_, counts, ladd_step = torch.nn.Module.compile, [], train.ladd_step
    eager = lambda self, **kind: compile_(self, backend="eager", **kind)
    monkeypatch.setattr(torch.nn.Module, "compile", eager)

    def counted(*args):
        counts.append(counters["stats"]["unique_graphs"])
        return ladd_step(*args)
    monkeypatch.setattr(train, "ladd_step", counted)
    torch._dynamo.reset(), counters.clear()
    sizes = ("--sizes 32x64,48x48 --set depth=3 --set dual_blocks=1 --set qk_norm=on --taps 0,2 "
             "--set pos_grid=4")
    main(home, f"--name graphs {sizes} --data-size 240 --teacher-steps 2 --steps 14 {QUIET} "
         "--compile on --recompute selective")
    assert counts[-1] == counts[8] and 6 < counts[-1] <= 24, counts
