"""Checkpoints: exact on any number of processes, written during training, complete after any
kill."""
import hashlib
import json
import math
import os
import random
import resource
import shutil
import signal
import tempfile
import threading
import time
from contextlib import suppress
from datetime import timedelta
from itertools import count, product
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import tiny, tiny_inputs
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.multiprocessing import start_processes

from ladd.cli import InputError
from ladd.core.mmdit import MMDiT
from ladd.data import files
from ladd.engine import parallel, state
from ladd.engine.optimizer import AdamW
from ladd.engine.state import Saver, collect, fill, open_state, restore, states


def listing(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def digests(tensors: dict[str, Tensor]) -> dict[str, str]:
    """Return a digest of every bit of each tensor, and its type."""
    whole = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in tensors.items()}
    return {name: f"{list(t.shape)} {t.dtype} "
            + hashlib.sha256(
                t.detach().clone().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()
            for name, t in whole.items()}


def save(folder: Path, step: int, tensors: dict[str, Tensor], meta=None, **options) -> None:
    saver = Saver(folder, **options)
    saver.begin(step, tensors, meta)
    saver.finish()


def load(folder: Path, targets: dict[str, Tensor]):
    found = open_state(folder)
    fill(found, targets)
    return found.step, found.meta


def open_each(folder: Path):
    """Yield every checkpoint of a folder, not only the newest."""
    for path in states(folder):
        with tempfile.TemporaryDirectory() as alone:
            os.symlink(path, Path(alone) / path.name)
            yield open_state(alone)


# one process

def values(step: int) -> dict[str, Tensor]:
    base = torch.full((4, 3), step + 0.1)
    return {"fp32": base, "view": base[1:], "same": base, "turned": base.T,
            "wide": base[:1].expand(5, 3), "bf16": base.bfloat16() / 3,
            "rng": torch.arange(7, dtype=torch.uint8), "index": torch.tensor(2 ** 40 + step),
            "empty": torch.zeros(0, 2), "no": torch.tensor(True)}


def blank() -> dict[str, Tensor]:
    return {name: torch.full(t.shape, 3).to(t.dtype) for name, t in values(0).items()}


def assert_values(folder: Path, step: int, meta) -> None:
    got = blank()
    assert load(folder, got) == (step, meta) and digests(got) == digests(values(meta["values"]))


def test_the_newest_state_comes_back_bit_for_bit_and_the_last_two_are_kept(tmp_path):
    assert open_state(tmp_path / "absent") is None
    saver = Saver(tmp_path / "new")
    assert saver.written and saver.publish() is None and open_state(tmp_path / "new") is None
    for step in (5, 90, 200000, 1000000):
        meta = {"best": math.inf, "values": step, "nested": {"list": [1, -math.inf, 0.1]}}
        saver.begin(step, values(step), meta)
        meta["best"] = 0                                      # the caller's from here on
        saver.finish()
        assert_values(tmp_path / "new", step, meta | {"best": math.inf})
    assert listing(tmp_path / "new") == ["step_1000000", "step_200000"]
    save(tmp_path / "new", 1000001, values(1), keep=1)
    assert listing(tmp_path / "new") == ["step_1000001"]
    path = tmp_path / "new" / "step_1000001"
    assert listing(path) == ["meta.json", "part-00000-of-00001.safetensors"]
    assert all(file.stat().st_mode & 0o777 == 0o644 for file in path.iterdir())


def test_parameters_are_filled_in_place_and_the_file_stays_as_it_is(tmp_path):
    layer, other = nn.Linear(3, 2), nn.Linear(3, 2)
    save(tmp_path, 1, dict(layer.named_parameters()))
    part, kept = tmp_path / "step_000001" / "part-00000-of-00001.safetensors", other.weight
    before = part.read_bytes()
    load(tmp_path, dict(other.named_parameters()))
    assert other.weight is kept and kept.requires_grad and torch.equal(kept, layer.weight)
    with torch.no_grad():
        kept.zero_()
    assert part.read_bytes() == before


def test_saving_a_step_again_replaces_it(tmp_path):
    for step, drawn in ((1, 1), (2, 2), (2, 7)):
        save(tmp_path, step, values(drawn), {"values": drawn})
    assert_values(tmp_path, 2, {"values": 7})
    shutil.copytree(tmp_path / "step_000001", tmp_path / "step_000002.old")    # left by a kill
    assert listing(tmp_path) == ["step_000001", "step_000002", "step_000002.old"]
    assert_values(tmp_path, 2, {"values": 7})
    save(tmp_path, 3, values(3), {"values": 3})
    assert listing(tmp_path) == ["step_000002", "step_000003"]


def network(beta1: float = 0.0) -> tuple[MMDiT, AdamW]:
    """A network one of whose parameters never gets a gradient: text's norm of queries."""
    model = tiny("qk_norm", torch.float32, 3, depth=1)
    return model, AdamW(model, 0.5, beta1, 0.95, weight_decay=0.1)


def parts_of(model: MMDiT, optimizer: AdamW) -> state.Tensors:
    return {"model": dict(model.named_parameters()), "opt": optimizer.state()}


def train(model: MMDiT, optimizer: AdamW, steps: range) -> None:
    for step in steps:
        optimizer.lr = 0.01 * (step + 1)
        model(*tiny_inputs(dtype=torch.float32, seed=step)).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_three_steps_a_file_and_three_more_equal_six_bit_for_bit(tmp_path, beta1):
    runs = []
    for parts in ((range(6),), (range(3), range(3, 6))):
        for steps in parts:
            model, optimizer = network(beta1)
            if found := open_state(tmp_path):
                restore(found, parts_of(model, optimizer))
            train(model, optimizer, steps)
            if steps == range(3):
                save(tmp_path, 3, collect(parts_of(model, optimizer)))
        runs.append(collect(parts_of(model, optimizer)))
    assert digests(runs[0]) == digests(runs[1])
    # the parameters, their moments, one count
    count = len(list(model.parameters()))
    assert len(runs[0]) == (3 if beta1 else 2) * count + 1 and runs[0]["opt.steps"] == 6


def test_a_state_before_the_first_step_empties_an_optimizer(tmp_path):
    model, optimizer = network(0.9)
    save(tmp_path, 0, collect({"opt": optimizer.state()}))
    train(model, optimizer, range(2))
    moments = [t for t in optimizer.state().values() if t.ndim]
    assert optimizer.steps == 2 and sum(not t.any() for t in moments) == 2     # the norm's
    restore(open_state(tmp_path), {"opt": optimizer.state()})
    assert not any(t.any() for t in optimizer.state().values())


# during training

@pytest.fixture
def gate(monkeypatch) -> threading.Event:
    """Return an event that writing waits for."""
    opened, real = threading.Event(), state.write_tensors

    def slow(*args):
        assert opened.wait(20)
        real(*args)
    monkeypatch.setattr(state, "write_tensors", slow)
    return opened


def test_training_goes_on_while_the_state_is_written_as_it_was(tmp_path, gate):
    tensors, saver = values(5), Saver(tmp_path)
    saver.begin(5, tensors, {"values": 5})
    assert not saver.written and not saver.written and states(tmp_path) == []
    for tensor in (tensors["fp32"], tensors["bf16"], tensors["index"]):
        tensor.zero_()
    gate.set()
    while not saver.written:
        time.sleep(0.001)
    assert states(tmp_path) == []                             # until it is published
    saver.publish()
    assert saver.written
    # the thread ends: while it lives, its OpenMP workers slow down those of training
    for thread in threading.enumerate():
        if thread.name.startswith("state"):
            thread.join(10)
            assert not thread.is_alive()
    assert_values(tmp_path, 5, {"values": 5})


def test_a_second_begin_waits_for_the_first_and_loses_none(tmp_path, gate):
    saver = Saver(tmp_path)
    saver.begin(1, values(1), {"values": 1})
    threading.Timer(0.2, gate.set).start()
    begun = time.perf_counter()
    saver.begin(2, values(2), {"values": 2})
    assert time.perf_counter() - begun > 0.1
    assert_values(tmp_path, 1, {"values": 1})
    saver.finish()
    assert_values(tmp_path, 2, {"values": 2})


def test_buffers_are_used_again_for_the_names_that_come(tmp_path):
    saver, at = Saver(tmp_path), []
    for step in (4, 5):
        saver.begin(step, {"a": torch.full((4,), float(step)), "b": torch.ones(3)}, None)
        saver.finish()
        at.append((saver.buffers["a"].data_ptr(), saver.buffers["b"].data_ptr()))
    assert at[0] == at[1]
    got = {"a": torch.zeros(4), "b": torch.zeros(3)}
    load(tmp_path, got)
    assert got["a"].tolist() == [5.0] * 4
    saver.begin(9, {"b": torch.ones(3)}, None)
    saver.finish()
    assert set(open_state(tmp_path).tensors) == {"b"}


def test_the_end_of_the_block_publishes_unless_another_process_may_not_arrive(tmp_path):
    for world, error, kept in ((1, RuntimeError, True), (1, None, True),
                               (2, FloatingPointError, True), (2, RuntimeError, False)):
        folder = tmp_path / f"{world} {error}"
        with suppress(error or ()):
            with Saver(folder, 0, world) as saver:
                saver.begin(1, {"a": torch.zeros(2)}, None)
                saver.job.result()
                files.write_tensors(state.part_file(saver.work, 1, 2), {"b": torch.ones(1)})
                if error:
                    raise error("an error")
        assert bool(states(folder)) == kept


def test_copies_on_the_host_keep_their_memory():
    """Of all dtypes, without elements and without axes."""
    kinds = product([(), (0, 3), (3,), (5, 7), (65, 9)],
                    [torch.float32, torch.uint8, torch.bfloat16, torch.int64])
    tensors = {f"{dtype} {shape}": torch.full(shape, i + 1, dtype=dtype)
               for i, (shape, dtype) in enumerate(kinds)}
    found = state.host_copies(tensors, {})
    assert all(torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype
               and found[name].is_contiguous() for name, tensor in tensors.items())
    kept = state.host_copies({name: tensor + 1 for name, tensor in tensors.items()}, found)
    assert all(kept[name] is found[name] and torch.equal(found[name], tensor + 1)
               for name, tensor in tensors.items())


@pytest.mark.parametrize("call", [
    lambda s: s.written, Saver.publish, Saver.finish, lambda s: s.begin(3, {}, 0)])
def test_a_full_disk_is_one_line_at_the_next_call_and_former_states_stay(tmp_path, call):
    save(tmp_path, 1, values(1), {"values": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    saver = Saver(tmp_path)
    # every write beyond fails, as on a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
    try:
        saver.begin(2, {"a": torch.zeros(10000)}, None)
        saver.job.exception()
        with pytest.raises(InputError) as error:
            call(saver)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    part = tmp_path / ".tmp_step_000002" / "part-00000-of-00001.safetensors"
    assert f"{part}: cannot be written (" in str(error.value) and "\n" not in str(error.value)
    assert_values(tmp_path, 1, {"values": 1})


def test_processes_wait_for_each_other(tmp_path, monkeypatch):
    """Two as two threads: the second one's disk is slow, and it begins before the first has cleaned
    up."""
    barrier, real = threading.Barrier(2), state.write_tensors

    def slow(path, tensors, header):
        if "part-00001" in path.name:
            time.sleep(0.2)
        real(path, tensors, header)
    monkeypatch.setattr(state, "write_tensors", slow)
    (tmp_path / ".tmp_step_000007").mkdir()
    (tmp_path / ".tmp_step_000007" / "part-00003-of-00004.safetensors").write_text("left by a kill")

    def second() -> None:
        saver = Saver(tmp_path, 1, 2, lambda: barrier.wait(20))
        # one step twice: the folder must be free again
        for step in (7, 7):
            saver.begin(step, {"a": torch.ones(3)}, "of 1")
        saver.finish()
    other = threading.Thread(target=second)
    other.start()
    time.sleep(0.3)
    saver = Saver(tmp_path, 0, 2, lambda: barrier.wait(20))
    for step in (7, 7):
        saver.begin(step, {"a": torch.zeros(3)}, "of 0")
    saver.finish()
    other.join()
    got = {"a": torch.ones(3)}
    assert load(tmp_path, got) == (7, "of 0") and not got["a"].any()
    assert listing(tmp_path) == ["step_000007"] and len(listing(tmp_path / "step_000007")) == 3


def test_content_reaches_the_disk_before_the_name(tmp_path, monkeypatch):
    events, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: events.append(
        Path(os.readlink(f"/proc/self/fd/{file}")).name) or fsync(file))
    monkeypatch.setattr(os, "replace", lambda old, new: events.append("replace")
                        or replace(old, new))
    save(tmp_path / "states", 1, values(1))
    part, work = "part-00000-of-00001.safetensors", ".tmp_step_000001"
    assert events == [part, f".tmp_{part}", "replace", work, "meta.json", ".tmp_meta.json",
                      "replace", work, "replace", "states"]


# kills

class Kill(BaseException):
    """Stands for SIGKILL: no handler of the code under test may run for it."""


def kill_at(m: pytest.MonkeyPatch, call: int) -> None:
    """Kill the `call`-th operation on files, half of it done where it has halves, and all that
    follow."""
    calls = []

    def wrap(owner, name, half=lambda *args: None):
        real = getattr(owner, name)

        def counted(*args, **kwargs):
            calls.append(name)
            if len(calls) == call:
                half(*args)
            if len(calls) >= call:
                raise Kill
            return real(*args, **kwargs)
        m.setattr(owner, name, counted)

    wrap(Path, "open", lambda path, mode: os.close(os.open(path, os.O_CREAT)))
    wrap(Path, "write_text", lambda path, text: path.write_bytes(text.encode()[:4]))
    wrap(shutil, "rmtree", lambda path, **options: [os.unlink(file) for file
                                         in list(Path(path).rglob("*.*"))[:1]])
    for owner, name in ((os, "fsync"), (os, "replace"), (Path, "mkdir"), (Path, "rename")):
        wrap(owner, name)


@pytest.mark.parametrize("step", [3, 2])      # a new state, and one over the newest
def test_a_kill_at_any_operation_leaves_a_whole_state(tmp_path, step):
    for call in range(1, 100):
        folder = tmp_path / str(call)
        for former in (1, 2):
            save(folder, former, values(former), {"values": former})
        with pytest.MonkeyPatch.context() as m:
            kill_at(m, call)
            try:
                save(folder, step, values(30 + step), {"values": 30 + step})
                break
            except Kill:
                pass
        *_, found = open_each(folder)
        assert (found.step, found.meta["values"]) in {(2, 2), (step, 30 + step)}, call
        assert_values(folder, found.step, found.meta)
        save(folder, found.step, values(8), {"values": 8})         # as a resumed run would
        save(folder, 9, values(9), {"values": 9})
        assert_values(folder, 9, {"values": 9})
        assert listing(folder) == [f"step_{found.step:06d}", "step_000009"], call
    assert 12 <= call < 99


def numbered(step: int) -> dict[str, Tensor]:
    return {"a": torch.full((200000,), float(step)), "b": torch.tensor(step)}


def killed_writers(rank: int, folder: Path) -> None:
    """Kill at least 25 forked writers, each at a random moment, and look after each at what is
    there. Go on until five died inside a save and five steps are published, which takes longer on a
    busy machine; write down both counts."""
    chance, begun, inside, step = random.Random(0), time.perf_counter(), 0, 0
    save(folder, 0, numbered(0), 0)
    pace = time.perf_counter() - begun
    for kills in range(250):
        if kills >= 25 and inside >= 5 and step >= 5:
            break
        start, (out, into) = open_state(folder).step, os.pipe()
        if not (child := os.fork()):
            os.write(into, start.to_bytes(8, "little"))
            saver = Saver(folder)
            for step in count(start):              # the first one over a state that is there
                saver.begin(step, numbered(step), step)
                saver.finish()
                os.write(into, step.to_bytes(8, "little"))
        os.close(into)
        os.read(out, 8)                            # it is up
        time.sleep(chance.uniform(0, 4 * pace))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        said = os.read(out, 1 << 16)               # the steps that it had published
        os.close(out)
        inside += any(name.startswith(".tmp") for name in listing(folder))
        for found in open_each(folder):
            got, step = {"a": torch.zeros(200000), "b": torch.tensor(0)}, found.step
            fill(found, got)
            assert found.meta == step == got["b"] and (got["a"] == step).all()
        assert step >= max(start, int.from_bytes(said[-8:], "little"))
    files.write_json(folder.parent / "facts.json", {"inside": inside, "newest": step})


def test_whatever_a_kill_leaves_is_whole(tmp_path):
    start_processes(killed_writers, (tmp_path / "states",), start_method="fork")
    facts = files.read_json(tmp_path / "facts.json")
    assert facts["inside"] >= 5 and facts["newest"] >= 5, facts


def test_leftovers_go_at_the_next_start_of_process_0_alone(tmp_path):
    save(tmp_path, 1, values(1))
    for left in (".tmp_step_000002", ".tmp_gone_step_000001"):
        shutil.copytree(tmp_path / "step_000001", tmp_path / left)
    Saver(tmp_path, rank=1, world=2)
    assert len(listing(tmp_path)) == 3
    Saver(tmp_path, rank=0, world=2)
    assert listing(tmp_path) == ["step_000001"]


# several processes

HEADS = {"heads.w": torch.arange(6.0).view(2, 3).bfloat16(), "heads.count": torch.tensor(4)}


def trained(mesh, seed: int) -> tuple[MMDiT, AdamW]:
    """A small MMDiT, sharded over the mesh where there is one; its output layer has one row."""
    model = tiny("qk_norm", torch.float32, seed, depth=1, patch=1, out_channels=1)
    if mesh:
        for module in (*model.joint_blocks, model):
            fully_shard(module, mesh=mesh, reshard_after_forward=True)
    return model, AdamW(model, 0.01, 0.9, 0.99)


def step_of(model: MMDiT, optimizer: AdamW, step: int) -> None:
    model(*tiny_inputs(dtype=torch.float32, seed=step)).square().mean().backward()
    optimizer.step()


def gathered(model: MMDiT, optimizer: AdamW, rank: int) -> dict[str, Tensor]:
    """All that a run would save; what is plain differs between the processes, to see whose is
    kept."""
    named = dict(model.named_parameters())
    average = {f"ema.{name}": (p.detach() * 0.5) for name, p in named.items()}
    return {**named, **average, **collect({"opt_g": optimizer.state()}),
            "table": model.pos_embed, **{name: t + rank for name, t in HEADS.items()}}


def resumed(folder: Path, mesh, rank: int) -> tuple[MMDiT, AdamW, dict[str, str]]:
    """(model, optimizer, digests) of the state in a folder, loaded into another network."""
    found = open_state(folder)
    model, optimizer = trained(mesh, 7)
    step_of(model, optimizer, 50)
    targets = gathered(model, optimizer, rank + 5)
    fill(found, targets)
    assert {isinstance(m, DTensor) for m in optimizer.second.values()} == {bool(mesh)}
    return model, optimizer, digests(targets)


def run_of(folder: Path, mesh, rank: int, world: int, meet) -> dict[str, dict[str, str]]:
    """Read every checkpoint next to `folder`, write its own, continue from memory and from it."""
    facts = {f"read {other.name}": resumed(other, mesh, rank)[-1]
             for other in sorted(folder.parent.iterdir()) if other != folder and other.is_dir()}
    model, optimizer = trained(mesh, 0)
    saver = Saver(folder, rank, world, meet)
    saver.begin(0, gathered(model, optimizer, rank), {"rank": rank})
    for step in (0, 1):
        step_of(model, optimizer, step)
    saver.begin(2, gathered(model, optimizer, rank), {"rank": rank})
    facts["saved"] = digests(gathered(model, optimizer, 0))
    # while it is written
    step_of(model, optimizer, 2)
    saver.finish()
    meet()
    facts["undisturbed"] = digests(gathered(model, optimizer, 0))
    model, optimizer, facts["read back"] = resumed(folder, mesh, rank)
    step_of(model, optimizer, 2)
    facts["continued"] = digests(gathered(model, optimizer, 0))
    shutil.copytree(folder / "step_000000", folder / f"first-{rank}" / "step_000000")
    fill(open_state(folder / f"first-{rank}"), gathered(model, optimizer, 0))
    facts["moments"] = {name: str(int((t.to_local() if isinstance(t, DTensor) else t).any()))
                        for name, t in optimizer.state().items()}
    return facts


def process(rank: int, folder: Path, shape: tuple[int, ...]) -> None:
    world = math.prod(shape)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))
    dist.init_process_group("gloo", f"file://{folder}/meet-{world}", rank=rank, world_size=world,
                            timeout=timedelta(seconds=60))
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape):])
    facts = run_of(folder / "x".join(map(str, shape)), mesh, rank, world, dist.barrier)
    files.write_json(folder / f"facts-{world}-{rank}.json", facts)
    across = distribute_tensor(torch.zeros(4, 4), mesh, [state.Shard(1)] * len(shape))
    with pytest.raises(InputError, match=r"placements of a must be .*Shard\(0\) \(got .*dim=1"):
        state.placed("a", across)
    parallel.finish()


def run_processes(folder: Path, *shape: int) -> list[dict]:
    world = math.prod(shape)
    start_processes(process, (folder, shape), nprocs=world, start_method="fork")
    return [files.read_json(folder / f"facts-{world}-{rank}.json") for rank in range(world)]


def check(facts: list[dict], before: dict[str, dict[str, str]]) -> None:
    for rank, found in enumerate(facts):
        assert found["read back"] == found["saved"], rank
        assert found["continued"] == found["undisturbed"] != found["saved"], rank
        assert set(found["moments"].values()) == {"0"}, rank
        for name, saved in before.items():
            assert found[f"read {name}"] == saved, (name, rank)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """(folder of the states "1" and "2", facts of the one process, facts of the two)."""
    folder = tmp_path_factory.mktemp("runs")
    one = run_of(folder / "1", None, 0, 1, lambda: None)
    return folder, one, run_processes(folder, 2)


def test_one_process_and_two_read_each_other_and_go_on_bit_for_bit(two):
    folder, one, facts = two
    check([one], {})
    check(facts, {"1": one["saved"]})
    assert resumed(folder / "2", None, 0)[-1] == facts[0]["saved"] == facts[1]["saved"]
    assert open_state(folder / "2").meta == {"rank": 0}


def test_each_process_writes_its_own_rows_and_the_first_what_is_the_same_on_all(two):
    path = open_state(two[0] / "2").path
    assert listing(path) == [
        "meta.json", *(f"part-0000{rank}-of-00002.safetensors" for rank in (0, 1))]
    parts = [files.read_tensors(state.part_file(path, rank, 2)) for rank in (0, 1)]
    rows = [json.loads(header["rows"]) for _, header in parts]
    plain = {*HEADS, "table", "opt_g.steps"}
    assert set(
        parts[0][0]) - set(rows[0]) == plain and set(parts[1][0]) == set(rows[1]) == set(rows[0])
    narrow = "final_layer.linear.weight"
    wide = "opt_g.joint_blocks.0.x_block.attn.qkv.weight.exp_avg"
    assert [r[narrow] for r in rows] == [[[1, 128], 0], [[1, 128], 1]]
    assert [list(p[narrow].shape) for p, _ in parts] == [[1, 128], [0, 128]]
    assert [r[wide] for r in rows] == [[[384, 128], 0], [[384, 128], 192]]
    assert [list(p[wide].shape) for p, _ in parts] == [[192, 128], [192, 128]]


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(3,), (2, 2)], ids=str)
def test_three_processes_and_two_times_two(two, shape):
    folder, one, facts = two
    name = "x".join(map(str, shape))
    more = run_processes(folder, *shape)
    check(more, {"1": one["saved"], "2": facts[0]["saved"]})
    assert resumed(folder / name, None, 0)[-1] == more[0]["saved"]
    path = open_state(folder / name).path
    sizes = [len(files.read_tensors(file)[0]) for file in sorted(path.glob("part*"))]
    # of replicas only the first writes
    assert sizes[2:] == ([0, 0] if shape == (2, 2) else [sizes[1]])


# what is refused

def rewritten(change):
    def act(path: Path) -> None:
        part = state.part_file(path, 1, 2)
        tensors, header = files.read_tensors(part)
        rows = json.loads(header["rows"])
        change(tensors, rows)
        tensors = {name: t.clone() for name, t in tensors.items()}
        files.write_tensors(part, tensors, {"rows": json.dumps(rows), "step": header["step"]})
    return act


def flipped(path: Path) -> None:
    """Flip one bit of a weight."""
    data = bytearray((path / PART).read_bytes())
    data[-50] ^= 4
    (path / PART).write_bytes(data)


def of_another_step(path: Path) -> None:
    """Put a part of another checkpoint in its place."""
    tensors, header = files.read_tensors(path / PART)
    files.write_tensors(path / PART, tensors, {"rows": header["rows"], "step": "1"})


def written_as(text: str):
    return lambda path: (path / "meta.json").write_text(text)


PART = "part-00001-of-00002.safetensors"
BIAS = "final_layer.linear.bias"
EMBEDDER = "x_embedder.proj.bias"
DAMAGED = {
    "flipped bit": (flipped, f"{PART}: its content does not have the checksum in its header"),
    "another part": (lambda p: shutil.copy(p / PART.replace("1-", "0-", 1), p / PART),
                     f"{PART} was written as part-00000-of-00002.safetensors"),
    "another step": (of_another_step, f"{PART} must be of step 2 (got 1)"),
    "other meta": (lambda p: (p / "meta.json").write_text(
        (p / "meta.json").read_text().replace('"rank": 0', '"rank": 1')),
        "meta.json: its content does not have the checksum in it"),
    "missing part": (lambda p: (p / PART).unlink(), f"{PART}: not a complete safetensors file"),
    "cut part": (lambda p: (p / PART).write_bytes((p / PART).read_bytes()[:-7]),
                 f"{PART}: not a complete"),
    "empty part": (lambda p: (p / PART).write_bytes(b""),
                   f"{PART}: not a complete safetensors file"),
    "missing meta": (lambda p: (p / "meta.json").unlink(),
                     "meta.json: not a complete JSON file"),
    "cut meta": (written_as('{"parts": 2, "me'), "meta.json: not a complete JSON file"),
    "older layout": (written_as('{"best": 3}'),
                     "meta.json: its content does not have the checksum in it (got {'best': 3})"),
    "no table": (written_as("[2]"), "meta.json must be a JSON object (got list)"),
    "parts as text": (written_as('{"parts": "2", "meta": 0}'),
                      "does not have the checksum in it (got {'parts': '2', 'meta': 0})"),
    "rows missing": (rewritten(lambda t, r: t.pop(EMBEDDER)),
                     f"{EMBEDDER} must have each of the rows 0:128 once (got 0:64)"),
    "rows twice": (rewritten(lambda t, r: (t.update({EMBEDDER: torch.zeros(96)}),
                                           r.update({EMBEDDER: [[128], 32]}))),
                   f"{EMBEDDER} must have each of the rows 0:128 once (got 0:64, 32:128)"),
    "rows beyond": (rewritten(lambda t, r: t.update({EMBEDDER: torch.zeros(70)})),
                    f"{EMBEDDER} must have each of the rows 0:128 once (got 0:64, 64:134)"),
    "other whole": (rewritten(lambda t, r: r.update({EMBEDDER: [[129], 64]})),
                    f"{PART}: {EMBEDDER} must be rows of [128] torch.float32 (got [64] "
                    "torch.float32 of [129])"),
    "other width": (rewritten(lambda t, r: t.update({"context_embedder.weight":
                                                     torch.zeros(64, 9)})),
                    "must be rows of [128, 24] torch.float32 (got [64, 9] torch.float32 of "
                    "[128, 24])"),
    "other dtype": (rewritten(lambda t, r: t.update({BIAS: torch.zeros(0).half()})),
                    f"{BIAS} must be rows of [1] torch.float32 (got [0] torch.float16 of [1])")}


@pytest.mark.parametrize("how", DAMAGED)
def test_a_damaged_newest_state_is_named_and_no_older_one_taken(two, tmp_path, how):
    change, message = DAMAGED[how]
    shutil.copytree(two[0] / "2", tmp_path, dirs_exist_ok=True)
    open_state(tmp_path)
    change(tmp_path / "step_000002")
    with pytest.raises(InputError) as error:
        open_state(tmp_path)
    text = str(error.value)
    assert message in text and str(tmp_path / "step_000002") in text and "\n" not in text
    assert len(states(tmp_path)) == 2


@pytest.mark.parametrize("change, message", [(lambda t: t.pop("view"), "step_000001 must have the "
                                              "9 tensors of this run (got 1 unknown: view)"),
                                             (lambda t: t.update(new=t["view"], x=t["view"]),
                                              "must have the 12 tensors of this run (got 2 "
                                              "missing: new, x)"),
                                             (lambda t: t.update(new=t.pop("view")),
                                              "the 10 tensors of this run (got 1 missing: new; 1 "
                                              "unknown: view)"),
                                             (lambda t: t.update(view=torch.zeros(3, 4)),
                                              "view must be [3, 4] torch.float32 (got [3, 3] "
                                              "torch.float32)"),
                                             (lambda t: t.update(view=torch.zeros(9)),
                                              "view must be [9] torch.float32 (got [3, 3] "
                                              "torch.float32)"),
                                             (lambda t: t.update(view=t["view"].bfloat16()),
                                              "view must be [3, 3] torch.bfloat16 (got [3, 3] "
                                              "torch.float32)"),])
def test_another_runs_state_is_refused_before_anything_is_written(tmp_path, change, message):
    save(tmp_path, 1, values(1))
    targets = blank()
    change(targets)
    before = digests(targets)
    with pytest.raises(InputError) as error:
        load(tmp_path, targets)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert digests(targets) == before


def test_another_optimizers_state_is_refused(tmp_path):
    model, optimizer = network()
    train(model, optimizer, range(1))
    tensors = optimizer.state()
    gone = "final_layer.linear.bias.exp_avg_sq"
    save(tmp_path, 1, collect({"opt": {k: t for k, t in tensors.items() if k != gone}}))
    found = open_state(tmp_path)
    with pytest.raises(InputError, match=rf"the {len(tensors)} tensors .* \(got 1 missing: "
                       f"opt.{gone}"):
        restore(found, {"opt": tensors})
    with pytest.raises(InputError, match=rf"\(got {len(tensors)} missing: opt_g.context_embedder."):
        restore(found, {"opt_g": tensors})
    momentum = network(0.9)[1]
    with pytest.raises(InputError, match=r"missing: .*\.exp_avg, .*"):
        restore(found, {"opt": momentum.state()})


def test_no_state_is_published_without_the_part_of_each_process(tmp_path):
    saver = Saver(tmp_path, rank=0, world=2)
    saver.begin(1, values(1), None)
    with pytest.raises(InputError, match="part-00001-of-00002.safetensors does not exist; a "
                       "checkpoint"):
        saver.finish()
    assert states(tmp_path) == []


def test_only_the_rows_that_a_process_holds_are_read(tmp_path, monkeypatch):
    resident = lambda: next(int(line.split()[1]) for line in open("/proc/self/status") if "VmRSS"
                            in line)
    rows, held = 1 << 24, torch.zeros(5)
    save(tmp_path, 1, {"big": torch.arange(rows).float()})                              # 64 MB
    before = resident()
    found = open_state(tmp_path)
    monkeypatch.setattr(state, "placed", lambda name,
                        target: state.Placed([rows], 1000, held, True))
    fill(found, {"big": torch.empty(rows, device="meta")})
    assert held.tolist() == [1000, 1001, 1002, 1003, 1004] and resident() - before < 10000
