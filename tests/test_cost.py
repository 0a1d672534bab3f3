"""The memory plan against real steps: what autograd keeps, what the allocator hands out; FLOPs."""
import copy
import gc
import re
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from conftest import begin_ranks, end_ranks, rng
from torch.profiler import ProfilerActivity, profile

import kernels
from kernels import heads as heads_file
from ladd import bench, build
from ladd.build import compute_of, plan_of
from ladd.config import Config, parse_config
from ladd.core import lora
from ladd.core.discriminator import Discriminator, DiscriminatorConfig
from ladd.core.losses import LaddConfig, Mismatched, draw
from ladd.core.mmdit import JointBlock, MMDiT, MMDiTConfig, Text
from ladd.data.batches import MicroBatch
from ladd.engine import parallel
from ladd.engine.memory import count, memory_plan, stream_bytes
from ladd.engine.networks import Compute, OnMeta, choose_shards, distribute, uses_triton
from ladd.engine.optimizer import AdamW
from ladd.engine.step import Networks, ladd_step
from ladd.report import cost

STEP = LaddConfig(levels=(1.0, 0.5), probs=(0.5, 0.5), easy_steps=0, shift=1.0, d_mean=0.0,
                     mismatched=0.5, r1_weight=0.0, distill_weight=0.0)
CPU = torch.device("cpu")
TOKENS = 6          # of a caption of the toy dataset


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
    """What is trained: half of the memory is activations without recomputation, a third with it."""
    recompute: str = "none"
    accumulate: int = 1
    replicas: int = 1

    def networks(self) -> tuple[MMDiT, MMDiT, Discriminator]:
        """Student, teacher and heads."""
        sizes = MMDiTConfig(4, 128, 64, 64, pos_grid=24, qk_norm=True, dual_blocks=(1,))
        student, teacher = (MMDiT(sizes, kernels.load("torch")) for _ in range(2))
        heads = Discriminator(DiscriminatorConfig((0, 1, 3), 128, 64, width=32),
                              kernels.load("torch"))
        return student, teacher.requires_grad_(False), heads

    def plan(self, **layout: int) -> dict[str, int]:
        batch = 4 // self.accumulate
        return memory_plan(*self.networks(), batch, batch // 2, 12, 144, self.recompute, False,
                           accumulate=self.accumulate, device="cpu", **layout)

    def train(self) -> None:
        """Two steps from the making of the networks on; Adam's moments are there from the
        second."""
        student, teacher, heads = self.networks()
        ema = copy.deepcopy(student).requires_grad_(False)
        mesh = parallel.mesh(CPU, self.replicas, 60)
        for model in (student, teacher):
            parallel.checkpointed(model, self.recompute)
        for model in (student, ema):
            parallel.shard(model, mesh)
        made = Networks(student, ema, teacher, heads, AdamW(student, 1e-4, 0.0, 0.99, ema=ema),
                        AdamW(heads, 1e-4, 0.0, 0.99))
        for i in range(2):
            ladd_step(STEP, made, self.parts(i), 0.99, True)

    def parts(self, i: int) -> list[MicroBatch]:
        b, g = 4 // self.accumulate, rng(i)
        x0, m = torch.randn(4, 16, 24, 24, generator=g), round(STEP.mismatched * b)
        text = Text(torch.randn(4, 12, 64, generator=g), torch.randn(4, 64, generator=g))
        other = Mismatched(torch.arange(m), text.map(lambda t: t[:m]), torch.ones(m), m)
        return [MicroBatch(x0[j:j + b], text.map(lambda t, j=j: t[j:j + b]), other,
                     draw(x0[j:j + b], 0, STEP, (i, j))) for j in range(0, 4, b)]


class Kept(torch.autograd.graph.saved_tensors_hooks):
    """Count the bytes of the storages that autograd keeps for backward, without parameters."""

    def __init__(self, *parameters: torch.Tensor):
        self.storages = {}
        known = {p.untyped_storage().data_ptr() for p in parameters}

        def pack(t: torch.Tensor) -> torch.Tensor:
            storage = t.untyped_storage()
            if storage.data_ptr() not in known:
                self.storages[storage.data_ptr()] = storage.nbytes()   # t keeps the address
            return t

        super().__init__(pack, lambda t: t)

    @property
    def bytes(self) -> int:
        return sum(self.storages.values())


@pytest.mark.parametrize("norm, dual", [(False, False), (True, True)])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("ops, dtype", [("torch", torch.float32), ("torch", torch.bfloat16),
                                        ("triton", torch.float32)])
def test_a_block_keeps_what_the_formula_says(ops, dtype, trains, last, norm, dual):
    """A real forward of one block on the CPU, the kernels under Triton's interpreter, weights in
    the compute dtype: bytes that autograd keeps, to 10 %. The input counts where a norm keeps it,
    in the references as its fp32 copy."""
    if ops == "triton":
        pytest.importorskip("triton")
    d, text, image, b = 128, 24, 64, 2
    sizes = MMDiTConfig(2, d, 64, 64, qk_norm=norm, dual_blocks=(0, 1) if dual else ())
    block = JointBlock(sizes, int(last), kernels.load(ops)).to(dtype).requires_grad_(trains)
    g = rng(0)
    x_img, x_txt = (torch.randn(b, l, d, generator=g).to(dtype).requires_grad_()
                    for l in (image, text))
    cond = torch.randn(b, d, generator=g).to(dtype).requires_grad_(trains)
    kept = Kept(*block.parameters())
    with kept:
        out = block(x_img, x_txt, cond, not last)
    formula = b * d * sum(l * stream_bytes(stream, dtype.itemsize, "none", ops == "triton")
                          for l, stream in ((text, block.context_block), (image, block.x_block)))
    assert out[0].requires_grad and formula == pytest.approx(kept.bytes, rel=0.1)


@pytest.mark.parametrize("case", [Case(), Case("selective"), Case("full"), *(
    pytest.param(case, marks=pytest.mark.slow)
    for case in (Case(accumulate=2), Case("full", accumulate=2)))])
def test_the_plan_is_the_allocators_peak(case):
    """Of one process, weights and all, to 10 %."""
    found = allocator_peak(case.train)
    assert case.plan()["sum"] == pytest.approx(found, rel=0.1)


MEDIUM = dict(depth=4, width=128, qk_norm=True, dual_blocks=(1,)), (24, 24), (0, 1, 3), 32


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("repeats, accumulate", [(1, 1), (3, 1), (3, 3)])
@pytest.mark.parametrize("recompute, sizes, hw, taps, head_width", [
    *((recompute, *MEDIUM) for recompute in ("none", "selective", "full")),
    ("none", dict(depth=3, width=256), (16, 32), (0, 1, 2), 64),
    ("full", dict(depth=4, width=128), (24, 24), (0, 1, 2, 3), 128),
    ("full", dict(depth=6, width=64, qk_norm=True), (32, 32), (2, 5), 16)])
def test_the_activations_are_what_a_real_step_takes(recompute, sizes, hw, taps, head_width, repeats,
                                                    accumulate, device, monkeypatch):
    """The most that the allocator hands out on top of what is stored, in a step after the first
    one, which made the moments, against activations and gradients of the plan: to 10 %."""
    if device == "cuda":        # the references are run here as they are there
        monkeypatch.setattr(heads_file, "_by_convolution", heads_file._by_patches)
    b, text, dim = 4, 24, 64
    sizes = MMDiTConfig(context_dim=dim, pooled_dim=dim, pos_grid=24, **sizes)
    student, teacher = (MMDiT(sizes, kernels.load("torch")) for _ in range(2))
    teacher.requires_grad_(False)
    heads = Discriminator(DiscriminatorConfig(taps, sizes.width, dim, width=head_width),
                          kernels.load("torch"))
    for model in (student, teacher):
        parallel.checkpointed(model, recompute)
    ema = copy.deepcopy(student).requires_grad_(False)
    made = Networks(student, ema, teacher, heads, AdamW(student, 1e-4, 0.0, 0.99, ema=ema),
                    AdamW(heads, 1e-4, 0.0, 0.99))
    x0 = torch.randn(b, 16, *hw, generator=rng(0))
    context = torch.randn(b, text, dim, generator=rng(1))
    caption = Text(context, torch.randn(b, dim, generator=rng(2)))
    other = Mismatched(torch.arange(2), caption.map(lambda t: t[:2]), torch.ones(2), 2)
    part = MicroBatch(x0, caption, other, draw(x0, 0, STEP, (0,)))

    def train() -> None:
        ladd_step(replace(STEP, heads_repeats=repeats), made, [part] * accumulate, 0.99, True)

    train()
    found = allocator_peak(train)
    plan = memory_plan(student, teacher, heads, b, 2, text, hw[0] * hw[1] // 4, recompute, False,
                       accumulate=accumulate, repeats=repeats, device=device)
    planned = plan["activations and features"] + plan["student (gradients)"]
    print(f"{recompute} {sizes.width} {repeats} {accumulate} {device}: planned "
          f"{planned / 1e6:.2f} MB, found {found / 1e6:.2f} MB, {planned / found:.3f}")
    assert planned == pytest.approx(found, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("case", [Case("full"), Case("none", replicas=2)])
def test_the_plan_is_the_allocators_peak_in_each_of_two_processes(case, tmp_path):
    """Student sharded over both, and replicated."""
    def run() -> None:
        parallel.start(CPU, 60)
        print(allocator_peak(case.train))
        parallel.finish()

    done = end_ranks(begin_ranks(2, run, tmp_path), 120)
    found = [int(said.split()[-1]) for _, said in done]
    plan = case.plan(world=2, shard=2 // case.replicas)
    assert all(plan["sum"] == pytest.approx(peak, rel=0.1) for peak in found)


# counted

@pytest.mark.slow
def test_flops_of_recomputation_are_those_made_again():
    """full: the blocks of the student and of the teacher's fake pass once more, except for products
    whose result nobody keeps; selective: less by their attentions exactly; without gradient:
    none."""
    with torch.device("meta"):
        made = Case().networks()
    costs = {name: cost.step_cost(*made, (16, 24, 24), (12, 64), 4, STEP, name)
             for name in ("none", "selective", "full")}
    flops = {name: c["flops_step"] for name, c in costs.items()}
    l_img, l_txt, b, d, depth = 144, 12, 4, 128, 4
    joint = 4 * b * d * (l_img + l_txt) ** 2
    # last; dual
    attention = depth * joint - 4 * b * d * l_txt * (l_img + l_txt) + 4 * b * d * l_img ** 2
    assert flops["full"] - flops["selective"] == 2 * attention
    again = (flops["full"] - flops["none"]) / (2 * b * costs["none"]["flops_v"])
    assert 0.85 < again < 1
    again = [cost.step_cost(*made, (16, 24, 24), (12, 64), 4, replace(STEP, heads_repeats=3),
                            name)["flops_step"] - c["flops_step"] for name, c in costs.items()]
    # two more steps of the heads on 4 fakes and 6 others, whatever is computed again: forward,
    # and twice that for the weights, less the gradient of the features
    assert len(set(again)) == 1
    one = 2 * l_img * d * 32 + 18 * l_img * 32 ** 2             # a head and sample, forward
    assert again[0] == pytest.approx(2 * 3 * 10 * (3 * one - 2 * l_img * d * 32), rel=0.05)


def large(**changes) -> dict[str, int]:
    """Return the plan of sd3.5-large: 1024 px, 333 text tokens, 4 pairs a GPU, half mismatched."""
    with torch.device("meta"):
        sizes = MMDiTConfig(38, 2432, 4096, 2048, pos_grid=192, qk_norm=True)
        ops = kernels.load("torch")
        student, teacher = (MMDiT(sizes, ops, torch.bfloat16).bfloat16() for _ in range(2))
        heads = Discriminator(DiscriminatorConfig(tuple(range(38)), 2432, 2048, 512), ops)
    values = dict(recompute="selective", fused=True, world=8, shard=8) | changes
    return memory_plan(student, teacher.requires_grad_(False), heads, 4, 2, 333, 4096, **values)


@pytest.mark.slow
def test_8b_on_8_gpus_of_80_gb():
    """Fits with selective recomputation and a replicated teacher, at 4 pairs a GPU; without
    recomputation it does not. Weights by hand: 8,056,627,520 parameters, position tables of
    192^2 2432 values, heads of 138 M."""
    plan = large()
    n, table = 8_056_627_520, 192 ** 2 * 2432
    print(*(f"{size / 2 ** 30:8.2f} GiB  {name}" for name, size in plan.items()), sep="\n")
    assert plan["student (weights, moment, EMA)"] == 1.5 * n + 8 * table
    assert plan["teacher (frozen)"] == 2 * n + 2 * table
    assert plan["sum"] < 80e9 and plan["activations and features"] > 15e9
    assert large(recompute="none")["sum"] > 120e9


def test_the_plan_counts_trained_weights_in_16_bits_too():
    """In one process: copies of all, or what graphs keep of a LoRA: of one block where they are
    recomputed."""
    def stored(recompute: str) -> int:
        return memory_plan(student, teacher, heads, 2, 1, 8, 16, recompute, False,
                           shared=True)["student (weights, moment, EMA)"]

    with torch.device("meta"):
        student, teacher, heads = Case().networks()
    teacher.bfloat16()
    tables = 2 * 4 * student.pos_embed.numel()
    assert stored("none") == stored("full") == 14 * count(student) + tables
    lora.add(student.bfloat16(), 8, 8.0, lora.ATTENTION, rng())
    n, block = count(student, True), max(count(b, True) for b in student.joint_blocks)
    assert stored("none") == 14 * n and stored("full") == 12 * n + 2 * block


def test_what_is_sharded_is_what_must_be():
    """A plan by hand: the student takes 40, shared by n 40 / n, the teacher 20 or 20 / n, the rest
    10."""
    asked = []

    def plan(shard: int, teacher_shard: int) -> dict[str, int]:
        asked.append((shard, teacher_shard))
        return {"sum": 40 // shard + 20 // teacher_shard + 10}

    assert choose_shards(70, 8, 1, plan, "auto") == (1, 1, {"sum": 70}) and asked == [(1, 1)]
    assert choose_shards(69, 8, 1, plan, "auto")[:2] == (8, 1)
    assert choose_shards(34, 8, 1, plan, "auto") == (8, 8, {"sum": 17})
    # does not fit; the caller sees it
    assert choose_shards(16, 8, 1, plan, "auto") == (8, 8, {"sum": 17})
    assert choose_shards(40, 8, 2, plan, "auto") == (4, 1, {"sum": 40})
    assert choose_shards(16, 1, 1, plan, "auto")[:2] == (1, 1)
    # a choice by name does not ask what fits
    for limit in (16, 34, 99):
        for shard, expected in (("none", (1, 1)), ("student", (8, 1)), ("all", (8, 8))):
            assert choose_shards(limit, 8, 1, plan, shard)[:2] == expected, shard
    assert choose_shards(99, 8, 4, plan, "all") == (2, 2, {"sum": 40})
    real, size = Case().plan(world=2, shard=2, teacher_shard=2), count(Case().networks()[1])
    assert real["teacher (frozen)"] == 4 * (size // 2 + 24 ** 2 * 128)


def test_processes_take_the_shards_that_were_chosen(monkeypatch, capsys):
    """distribute: a mesh of world / shards copies; rank 0 says it, one process needs neither."""
    compute = Compute(CPU, kernels.load("torch"), torch.float32)
    plan = lambda shard, teacher_shard: {"sum": (40 // shard + 20 // teacher_shard) * 2 ** 30}
    assert distribute(compute, "auto", 1, 60, plan) is compute and not capsys.readouterr().out
    monkeypatch.setattr(parallel, "mesh", lambda device, replicas, timeout_s: (device, replicas,
                                                                           timeout_s))
    one = "replicated in every process"
    cases = (("auto", 1, 4, False, f"student {one}, teacher {one}"),
             ("none", 1, 4, False, f"student {one}, teacher {one}"),
             ("student", 1, 1, False, f"student sharded over 4 processes, teacher {one}"),
             ("all", 2, 2, True,
              "student sharded over 2 processes, teacher sharded over 2 processes"))
    for rank in (0, 1):
        monkeypatch.setattr(parallel, "ranks", lambda rank=rank: (rank, 4))
        for shard, replicas, copies, teacher, said in cases:
            found, text = distribute(compute, shard, replicas, 60, plan), capsys.readouterr().out
            assert found == compute._replace(mesh=(CPU, copies, 60), shard_teacher=teacher)
            assert rank and not text or f"4 processes: {said}; planned memory " in text, text


def test_the_plan_of_a_run_is_of_its_options(monkeypatch):
    """build.plan_of gives memory_plan each of its values at its place."""
    asked = []
    monkeypatch.setattr(build, "memory_plan", lambda *args, **more: asked.append((args, more)))
    with torch.device("meta"):
        student, teacher, heads = Case().networks()
    made = OnMeta(teacher, student, heads)

    flags = "--device cpu --precision fp32 --sizes 32x64 --recompute selective --batch 16"
    for extra, expected, more in (
            ("", (16, 8, TOKENS, 8, "selective", False, 1),
             dict(accumulate=1, repeats=4, shared=True, device="cpu")),
            ("--micro-batch 4 --mismatched .25 --set r1_weight=1 --teacher-fp8 --precision bf16 "
             "--heads-repeats 2", (4, 1 + 4, TOKENS, 8, "selective", False, 2),
             dict(accumulate=2, repeats=2, shared=False, device="cpu")),
            ("--preset sd3-medium --dry-run --precision auto --mismatched 0 --t5-tokens 100 "
             "--micro-batch 2", (2, 0, 77 + 100, 8, "selective", True, 2),
             dict(accumulate=4, repeats=1, shared=True, device="cuda"))):
        config = parse_config([*flags.split(), *extra.split()])
        plan_of(config, made, compute_of(config), expected[-1])(shard=2, teacher_shard=1)
        more |= dict(shard=2, teacher_shard=1)
        assert asked.pop() == ((student, teacher, heads, *expected), more), extra


@pytest.mark.slow
def test_the_lines_of_a_dry_run(monkeypatch):
    """Sums printed are those of the plan, of 1 and 8 processes; what does not fit is said."""
    flags = ("--device cpu --dry-run --preset sd3-medium --sizes 384x384 --tflops 1 "
             "--recompute full --micro-batch 2")
    config = parse_config(flags.split())
    compute = compute_of(config)
    with torch.device("meta"):
        student, teacher, heads = Case().networks()
    made = OnMeta(teacher, student, heads)
    monkeypatch.setattr(bench, "networks_on_meta", lambda *args: made)
    said = {limit: list(bench.plan(config, teacher.config, compute, 12, limit))
            for limit in (10 ** 10, 10 ** 9)}
    for gpus, lines in ((1, "on one device"),
                        (8, "on each of 8 GPUs, student replicated, teacher replicated")):
        found = plan_of(config, made, compute, gpus)(shard=1, teacher_shard=1)["sum"]
        at = next(i for i, line in enumerate(said[10 ** 10]) if lines in line)
        assert f"{found / 2 ** 30:9.3f} GiB  sum" in said[10 ** 10][at + 1:at + 9][-1]
    assert not any("does not fit" in line for line in said[10 ** 10])
    assert any("8 GPUs, student sharded, teacher sharded" in line for line in said[10 ** 9])
    assert sum("does not fit in 0.9 GiB" in line for line in said[10 ** 9]) == 2


@pytest.mark.parametrize("flags, triton", [
    ("--preset sd3-medium --dry-run", True),
    ("--preset sd3-medium --dry-run --kernels torch", False),
    ("--preset sd3-medium --dry-run --precision fp32", False), ("--kernels auto", False)])
def test_the_plan_is_of_the_kernels_that_run(flags, triton, monkeypatch):
    """Without a GPU: a dry run of a real preset is of one, anything else takes the references."""
    config = parse_config([*flags.split(), "--device", "cpu"])
    assert planned_kernels(config, compute_of(config), monkeypatch) == (
        triton, "cuda" if config.real else "cpu")


def test_on_a_gpu_the_plan_asks_which_kernels_were_picked(monkeypatch):
    """Also where a kernel failed its self-check, which the flags do not tell."""
    config = parse_config(["--preset", "sd3-medium", "--dry-run"])
    for name in ("triton", "torch"):
        picked = kernels.load("torch")
        if name == "triton":
            picked = picked._replace(joint_attention=kernels.attention.joint_attention)
        compute = Compute(torch.device("cuda"), picked, torch.bfloat16)
        assert uses_triton(picked) == (name == "triton")
        assert planned_kernels(config, compute, monkeypatch) == (name == "triton", "cuda")


def planned_kernels(config: Config, compute: Compute, monkeypatch) -> tuple[bool, str]:
    """Return what the plan of a run takes for granted: the Triton kernels, the kind of device."""
    asked = []
    monkeypatch.setattr(build, "memory_plan",
                        lambda *args, **more: asked.append((args[8], more["device"])))
    plan_of(config, OnMeta(None, None, None), compute, 1)(shard=1, teacher_shard=1)
    return asked.pop()


def test_a_dry_run_counts_what_editing_adds(monkeypatch):
    """The image beside each latent on disk, the third evaluation of a sample, a teacher that
    trains."""
    one = dict.fromkeys(("step", "v", "flow_step"), 1.0)
    one = {f"flops_{k}": v for k, v in one.items()}
    monkeypatch.setattr(cost, "step_cost", lambda *args: one)
    monkeypatch.setattr(bench, "choose_shards", lambda *args: (1, 1, {"sum": 1}))

    def said(flags: str) -> dict[str, float]:
        config = parse_config(f"--device cpu --dry-run --tflops 1 --taps 0 {flags}".split())
        lines = bench.plan(config, config.model, compute_of(config), 12, 8)
        found = [re.search(r"^ +([\d.]+) (?:GiB|h) +(\w+)(?:, ([\d.e+]+) FLOPs)?$", line) for line
                 in lines]
        return {m[2]: float(m[3] or m[1]) for m in found if m}
    small = "--set depth=1 --set width=64 --data-size 1000000"
    text, edit, more, inpaint = (said(f"{small} {flags}") for flags in (
        "", "--task edit", "--task edit --image-guidance 2", "--task inpaint"))
    assert edit["latents"] / text["latents"] == pytest.approx(32 / 16, rel=1e-3)
    assert inpaint["latents"] / text["latents"] == pytest.approx(33 / 16, rel=1e-3)
    assert more["data"] / edit["data"] == pytest.approx(3 / 2, rel=1e-3)
    assert edit["data"] == 10 ** 6 * 8 * 2
    plain = said(f"{small} --task edit --image-guidance 2 --guidance 1")
    assert plain["data"] / edit["data"] == pytest.approx(3 / 2, rel=1e-3)
    real = "--preset sd3-medium --set depth=1 --set width=64"
    assert "teacher" in said(f"{real} --task edit --base b") and "teacher" not in said(real)
    assert "teacher" not in said(f"{real} --task edit --teacher t")
    alone = said(f"{small} --task edit --steps 0")
    assert set(alone) >= {"teacher"} and not set(alone) & {"data", "distill", "states", "students"}
