"""The memory plan: against the allocator's log of real steps, against the kernels' own operators, at 8B."""
import copy
import gc
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from conftest import rng
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import kernels
from ladd import cost, memory, parallel
from ladd.config import parse_config
from ladd.discriminator import Discriminator, DiscriminatorConfig
from ladd.distill import DistillConfig, Text, Wrong, draw
from ladd.feed import Part
from ladd.mmdit import MMDiT, MMDiTConfig
from ladd.step import Players, distill_config, ladd_step, on_meta, teacher_config

ROOT = Path(__file__).parent.parent
STEP = DistillConfig((1.0, 0.5), (0.5, 0.5), 0, 1.0, 0.0, 1.0, False, 0.5, "teacher", 0.0, 0.05, 0.0)


# measured

def allocator_peak(run) -> int:
    """The most bytes that the CPU's allocator had out at once while run() ran, from its own log."""
    gc.collect()             # what an earlier test left in cycles would count as given back here
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as log:
        run()
    events = [e for e in log.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


class Case(NamedTuple):
    """What is trained: half of the memory is activations without checkpoints, a third with them."""
    checkpoint: str = "none"
    accumulate: int = 1
    replicas: int = 1

    def networks(self) -> tuple[MMDiT, MMDiT, Discriminator]:
        """Student, teacher and heads."""
        sizes = MMDiTConfig(4, 128, 64, 64, pos_grid=24, qk_norm=True, dual_blocks=(1,))
        student, teacher = (MMDiT(sizes, kernels.load("torch")) for _ in range(2))
        heads = Discriminator(DiscriminatorConfig((0, 1, 3), 128, 64, width=32), kernels.load("torch"))
        return student, teacher.requires_grad_(False), heads

    def step(self) -> memory.Step:
        with torch.device("meta"):
            return memory.Step(*self.networks(), (16, 24, 24), (12, 64), 4 // self.accumulate, STEP,
                             self.checkpoint)

    def plan(self, **layout: int) -> dict[str, int]:
        return memory.memory_plan(self.step(), memory.references(), accumulate=self.accumulate, device="cpu",
                                **layout)

    def train(self) -> None:
        """Two steps from the making of the networks on; Adam's moments are there from the second."""
        student, teacher, heads = self.networks()
        ema = copy.deepcopy(student).requires_grad_(False)
        mesh = parallel.mesh(torch.device("cpu"), self.replicas)
        for model in (student, teacher):
            parallel.checkpointed(model, self.checkpoint)
        for model in (student, ema):
            parallel.shard(model, mesh)
        opt_g, opt_d = (torch.optim.AdamW(m.parameters(), 1e-4, fused=True) for m in (student, heads))
        players = Players(student, ema, teacher, heads, opt_g, opt_d)
        config = SimpleNamespace(clip=1.0, ema=0.99)
        for i in range(2):
            ladd_step(config, STEP, players, self.parts(i), True)

    def parts(self, i: int) -> list[Part]:
        b, g = 4 // self.accumulate, rng(i)
        x0, m = torch.randn(4, 16, 24, 24, generator=g), round(STEP.misaligned * b)
        text = Text(torch.randn(4, 12, 64, generator=g), torch.randn(4, 64, generator=g))
        cut = lambda tensors, j: type(tensors)(*(t[j:j + b] for t in tensors))
        wrong = Wrong(torch.arange(m), Text(*(t[:m] for t in text)), torch.ones(m), m)
        return [Part(x0[j:j + b], cut(text, j), wrong, draw(x0[j:j + b], 0, STEP, (i, j)))
                for j in range(0, 4, b)]


@pytest.mark.parametrize("case", [Case(), Case("selective"), Case("full"), *(
    pytest.param(case, marks=pytest.mark.slow)
    for case in (Case(accumulate=2), Case("full", accumulate=2)))])
def test_the_plan_is_the_allocators_peak(case):
    """Of one process, to 2 %: what operators take and give back inside is not in the plan."""
    found = allocator_peak(case.train)
    assert case.plan()["sum"] == pytest.approx(found, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("case", [Case("full"), Case("none", replicas=2)])
def test_the_plan_is_the_allocators_peak_in_each_of_two_processes(case):
    """Student shared by both, and whole in both."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
           "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    started = [subprocess.Popen([sys.executable, __file__, *map(str, case)], text=True,
                                env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                                stdout=subprocess.PIPE) for rank in range(2)]
    found = [int(process.communicate(timeout=120)[0].split()[-1]) for process in started]
    plan = case.plan(world=2, shard=2 // case.replicas)
    assert all(plan["sum"] == pytest.approx(peak, rel=0.08) for peak in found)


# counted

@pytest.mark.parametrize("checkpoint", ["none", "selective", "full"])
def test_the_stand_ins_keep_what_the_kernels_keep(checkpoint):
    """The kernels' own operators on the meta device, to the byte: kept for backward and at the peak, which is
    not where operators need more inside; with both kinds of attention, with and without norms of q and k."""
    pytest.importorskip("triton")
    for changes in (dict(qk_norm=True, dual_blocks=(0, 1)), {}):
        with torch.device("meta"):
            sizes = MMDiTConfig(3, 128, 64, 64, pos_grid=24, **changes)
            student, teacher = (MMDiT(sizes, kernels.load("torch")) for _ in range(2))
            heads = Discriminator(DiscriminatorConfig((0, 2), 128, 64, width=16), kernels.load("torch"))
        step = memory.Step(student, teacher, heads, (16, 24, 24), (12, 64), 4, STEP, checkpoint=checkpoint)
        assert memory.peak(step, memory.fused()) == memory.peak(step, kernels.load("triton"))


@pytest.mark.slow
def test_flops_of_a_checkpoint_are_those_made_again():
    """full: the blocks of the student and of the teacher's fake pass once more, but for products whose result
    nobody keeps; selective: less by their attentions exactly; a no_grad pass: none."""
    s = Case().step()
    costs = {name: cost.step_cost(*s[:7], checkpoint=name, ops=memory.fused())
             for name in ("none", "selective", "full")}
    flops = {name: c["flops_step"] for name, c in costs.items()}
    with FlopCounterMode(display=False) as counter:                # torch's attention, product by product
        s.made(kernels.load("torch"), torch.float32).run()
    assert flops["none"] == counter.get_total_flops()
    l_img, l_txt, b, d, depth = 144, 12, 4, 128, 4
    joint = 4 * b * d * (l_img + l_txt) ** 2
    attention = depth * joint - 4 * b * d * l_txt * (l_img + l_txt) + 4 * b * d * l_img ** 2   # last; dual
    assert flops["full"] - flops["selective"] == 2 * attention
    again = (flops["full"] - flops["none"]) / (2 * b * costs["none"]["flops_v"])
    assert 0.85 < again < 1
    assert len({c["flops_heads_step"] - c["flops_v"] * b for c in costs.values()}) == 1
    kept = [costs[name]["bytes_saved"] for name in ("none", "selective", "full")]
    assert kept[0] > 2.5 * kept[1] and kept[1] - kept[2] > 2 * b * d * 4 * depth * l_img       # their outputs


def large() -> memory.Step:
    """sd3.5-large at 1024 px, 333 text tokens, 4 pairs a GPU, half of them misaligned."""
    with torch.device("meta"):
        sizes = MMDiTConfig(38, 2432, 4096, 2048, pos_grid=192, qk_norm=True)
        student, teacher = (MMDiT(sizes, kernels.load("torch"), torch.bfloat16).bfloat16() for _ in range(2))
        heads = Discriminator(DiscriminatorConfig(tuple(range(38)), 2432, 2048, 512), kernels.load("torch"))
    return memory.Step(student, teacher, heads, (16, 128, 128), (333, 4096), 4, STEP, checkpoint="selective")


@pytest.mark.slow
def test_8b_on_8_gpus_of_80_gb():
    """Fits with selective checkpoints and a whole teacher, at 4 pairs a GPU; without checkpoints it does not.
    Weights by hand: 8,056,627,520 parameters, position tables of 192^2 2432 values, heads of 138 M."""
    plan = memory.memory_plan(large(), memory.fused(), world=8, shard=8)
    n, table = 8_056_627_520, 192 ** 2 * 2432
    print(*(f"{size / 2 ** 30:8.2f} GiB  {name}" for name, size in plan.items()), sep="\n")
    assert plan["student (fp32 weights, Adam, average)"] == 2 * n + 8 * table
    assert plan["teacher (frozen)"] == 2 * n + 2 * table
    assert plan["sum"] < 80e9 and plan["activations and features"] > 15e9
    none = memory.memory_plan(large()._replace(checkpoint="none"), memory.fused(), world=8, shard=8)
    assert none["sum"] > 120e9


def test_what_is_shared_is_what_must_be():
    """A plan by hand: the student takes 40, shared by n 40 / n, the teacher 20 or 20 / n, the rest 10."""
    asked = []

    def plan(shard: int, teacher_shard: int) -> dict[str, int]:
        asked.append((shard, teacher_shard))
        return {"sum": 40 // shard + 20 // teacher_shard + 10}

    assert memory.placed(70, 8, 1, plan) == (1, 1, {"sum": 70}) and asked == [(1, 1)]
    assert memory.placed(69, 8, 1, plan)[:2] == (8, 1)
    assert memory.placed(34, 8, 1, plan) == (8, 8, {"sum": 17})
    assert memory.placed(16, 8, 1, plan) == (8, 8, {"sum": 17})          # does not fit; the caller sees it
    assert memory.placed(40, 8, 2, plan) == (4, 1, {"sum": 40})
    assert memory.placed(16, 1, 1, plan)[:2] == (1, 1)
    assert memory.placed(16, 8, 1, plan, "ddp")[:2] == (1, 1)
    for limit, *flags, expected in ((16, "ddp", "auto", (1, 1)), (99, "fsdp", "auto", (8, 1)),
                                    (16, "fsdp", "auto", (8, 8)), (16, "auto", "off", (8, 1)),
                                    (99, "auto", "on", (8, 8)), (16, "fsdp", "off", (8, 1))):
        assert memory.placed(limit, 8, 1, plan, *flags)[:2] == expected, flags
    real, size = Case().plan(world=2, shard=2, teacher_shard=2), memory.count(Case().networks()[1])
    assert real["teacher (frozen)"] == 4 * (size // 2 + 24 ** 2 * 128)


@pytest.mark.slow
def test_the_lines_of_a_dry_run():
    """Sums printed are those of the plan, of 1 and 8 processes; what does not fit is said."""
    flags = "--dry-run --preset sd3-medium --sizes 384x384 --tflops 1 --checkpoint full --micro-batch 2"
    config, step = parse_config(flags.split(), "tiny"), Case().step()
    said = {limit: list(cost.plan(config, *step[:3], STEP, 12, 8, torch.device("cpu"), limit))
            for limit in (10 ** 10, 10 ** 9)}
    for gpus, lines in ((1, "on one device"), (8, "on each of 8 GPUs, student whole, teacher whole")):
        part = step._replace(latent=(16, 48, 48), batch=2, checkpoint="full")
        found = memory.memory_plan(part, memory.fused(), gpus, accumulate=8 // gpus)["sum"]
        at = next(i for i, line in enumerate(said[10 ** 10]) if lines in line)
        assert f"{found / 2 ** 30:9.3f} GiB  sum" in said[10 ** 10][at + 1:at + 9][-1]
    assert not any("does not fit" in line for line in said[10 ** 10])
    assert any("8 GPUs, student sharded, teacher sharded" in line for line in said[10 ** 9])
    assert sum("does not fit in 0.9 GiB" in line for line in said[10 ** 9]) == 2


def test_a_dry_run_counts_what_editing_adds(monkeypatch):
    """The image beside each latent on disk, the third evaluation of a sample, a teacher that trains."""
    one = dict.fromkeys(("step", "v", "heads_step", "flow_step"), 1.0)
    one = {f"flops_{k}": v for k, v in one.items()} | {"bytes_saved": 1, "bytes_weights": 1}
    monkeypatch.setattr(cost, "step_cost", lambda *args: one)
    monkeypatch.setattr(cost, "placed", lambda *args: (1, 1, {"sum": 1}))

    def said(flags: str) -> dict[str, float]:
        config = parse_config(f"--dry-run --tflops 1 --taps 0 {flags}".split(), "tiny")
        cpu = torch.device("cpu")
        teacher, student, heads = on_meta(config, teacher_config(config), cpu)
        lines = cost.plan(config, student, teacher, heads, distill_config(config), 12, 8, cpu)
        found = [re.search(r"^ +([\d.]+) (?:GiB|h) +(\w+)(?:, ([\d.e+]+) FLOPs)?$", line) for line in lines]
        return {m[2]: float(m[3] or m[1]) for m in found if m}
    small = "--depth 1 --width 64 --data-size 1000000"
    text, edit, more, inpaint = (said(f"{small} {flags}") for flags in (
        "", "--task edit", "--task edit --image-guidance 2", "--task inpaint"))
    assert edit["latents"] / text["latents"] == pytest.approx(32 / 16, rel=1e-3)
    assert inpaint["latents"] / text["latents"] == pytest.approx(33 / 16, rel=1e-3)
    assert more["data"] / edit["data"] == pytest.approx(3 / 2, rel=1e-3)
    assert edit["data"] == 10 ** 6 * 8 * 2
    plain = said(f"{small} --task edit --image-guidance 2 --guidance 1")
    assert plain["data"] / edit["data"] == pytest.approx(3 / 2, rel=1e-3)
    real = "--preset sd3-medium --depth 1 --width 64"
    assert "teacher" in said(f"{real} --task edit --base b") and "teacher" not in said(real)
    assert "teacher" not in said(f"{real} --task edit --teacher t")
    alone = said(f"{small} --task edit --objective flow")
    assert set(alone) >= {"teacher"} and not set(alone) & {"data", "distill", "states", "students"}


if __name__ == "__main__":
    parallel.start(torch.device("cpu"), 60)
    checkpoint, *counts = sys.argv[1:]
    print(allocator_peak(Case(checkpoint, *map(int, counts)).train))
    parallel.finish()
