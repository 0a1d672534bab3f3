"""Plan what a run takes (train.py --dry-run), or measure it by a few steps.

    python -m ladd.bench --preset sd3-medium --bench-steps 10      the same as with train.py

Takes any option of train.py. The steps are of random networks on random latents: no checkpoint is
read.
"""
import itertools
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial

import torch

from ladd.build import (batching_of, compute_of, heads_of, networks_on_meta, plan_of, student_lora,
                        text_tokens)
from ladd.cli import run_script
from ladd.config import Config, parse_config
from ladd.core.mmdit import MMDiT, MMDiTConfig, image_channels
from ladd.core.sampler import evaluations
from ladd.data.batches import Prefetch
from ladd.data.shards import Latents
from ladd.engine import parallel, run
from ladd.engine.memory import count
from ladd.engine.networks import Compute, OnMeta, choose_shards, distribute
from ladd.engine.run import device_name, memory_gb
from ladd.engine.step import Optim, calibrate, ladd_step, make_networks, no_lap, step_parts
from ladd.report import cost
from ladd.report.speed import Laps, forwards, peak_flops, wait


def step_costs(c: Config, networks: OnMeta, micro: int) -> tuple[dict[str, float], float]:
    """Return cost.step_cost of a micro-batch at the first size of the run, and the FLOPs of an
    iteration over all processes."""
    h, w = c.hw[0]
    teacher, student, heads = networks
    costs = cost.step_cost(student, teacher, heads, (16, h // 8, w // 8),
                           (text_tokens(c), teacher.config.context_dim), micro, c.ladd, c.recompute)
    return costs, costs["flops_step"] * c.batch // micro


def step_flops(c: Config, teacher: MMDiTConfig, dtype: torch.dtype) -> float:
    """Return the FLOPs of an iteration over all processes, at the first size of the run."""
    return step_costs(c, networks_on_meta(c, teacher, dtype), c.micro(parallel.ranks()[1]))[1]


# --- planned ---

def dry_run(c: Config, teacher: MMDiTConfig, compute: Compute, prompts: int) -> None:
    """Print the options and the plan of a run whose data have `prompts` distinct prompts."""
    print("\n".join(f"{name}: {value}" for name, value in asdict(c).items()) + "\n")
    memory = 80 * 10 ** 9
    if compute.device.type == "cuda":
        memory = torch.cuda.get_device_properties(compute.device).total_memory
    print("\n".join(plan(c, teacher, compute, prompts, memory)))


def plan(c: Config, sizes: MMDiTConfig, compute: Compute, prompts: int,
         memory: int) -> Iterator[str]:
    """Yield the lines of --dry-run: parameters, memory, FLOPs per step, hours and disk of the
    stages. `memory`: bytes of a GPU, which decide what is sharded."""
    h, w = c.hw[0]
    micro = c.micro(1)
    networks = networks_on_meta(c, sizes, compute.dtype)
    teacher, student, heads = networks
    costs, step = step_costs(c, networks, micro)
    teacher_step = costs["flops_flow_step"] * c.teacher_batch / micro
    loaded = c.teacher or c.real and c.task == "text"
    samples = c.data_size if c.steps and not c.data else 0

    line = f"parameters: teacher {count(teacher):,}"
    flops, stages = [], {}
    if not loaded:
        flops.append(f"{teacher_step:.3e} per teacher step of {c.teacher_batch}")
        stages["teacher"] = c.teacher_steps * teacher_step
    if c.steps:
        line += f", student {count(student):,}"
        if c.lora:
            line += f" ({count(student, True):,} in its LoRA)"
        line += f", heads {count(heads):,}"
        flops.insert(0, f"{step:.3e} per LADD step of {c.batch} pairs")
        each = evaluations(c.guidance, c.image_guidance)
        stages["data"] = samples * c.sample_steps * each * costs["flops_v"]
        # an upper bound, since iterations of the discriminator alone cost less
        stages["distill"] = (c.steps + c.heads_first) * step
    yield line
    if c.steps:
        yield from memory_lines(c, networks, compute, memory)
    yield "FLOPs: " + ", ".join(flops)
    rate = c.tflops * 1e12 or cost.measured_rate(compute.device, compute.dtype)
    how = "given" if c.tflops else "a matrix product timed here; networks reach a part of it"
    yield f"hours at {rate / 1e12:.2f} TFLOP/s ({how}):"
    for name, amount in stages.items():
        yield f"  {amount / rate / 3600:9.4f} h    {name}, {amount:.3e} FLOPs"

    if not samples:
        prompts = 0
    yield f"disk, with {samples:,} latents to generate from {prompts:,} prompts:"
    values = (16 + image_channels(c.task)) * (h // 8) * (w // 8)
    text = text_tokens(c) * sizes.context_dim + sizes.pooled_dim
    disk = {"latents": samples * values * (2 if c.real else 4), "text": prompts * text * 2}
    # weights are fp32; a state also has the moments: two of the teacher, one of student and heads;
    # and that of the student its EMA
    if not loaded:
        disk["teacher (two states, file)"] = (2 * 12 + 4) * count(teacher)
    if c.steps:
        disk["states (two kept)"] = 2 * (12 * count(student, True) + 8 * count(heads))
        disk["students (last and best)"] = 8 * count(student)
    for name, size in (disk | {"sum": sum(disk.values())}).items():
        yield f"  {size / 2 ** 30:9.3f} GiB  {name}"


def memory_lines(c: Config, networks: OnMeta, compute: Compute, memory: int) -> Iterator[str]:
    """Yield the memory plan for one device, and for real presets also that for 8 GPUs."""
    for gpus in (1, 8 * c.replicas) if c.real else (1,):
        if c.batch % gpus:
            continue
        replicas, shard = (c.replicas, c.shard) if gpus > 1 else (1, "none")
        student, teacher, found = choose_shards(memory, gpus, replicas,
                                                plan_of(c, networks, compute, gpus), shard)
        where = "on one device"
        if gpus > 1:
            names = ["replicated" if n == 1 else "sharded" for n in (student, teacher)]
            where = f"on each of {gpus} GPUs, student {names[0]}, teacher {names[1]}"
        yield (f"memory of distillation {where}, {compute.dtype}, {c.micro(gpus)} samples at a "
               f"time, recompute {c.recompute}:")
        for name, size in found.items():
            yield f"  {size / 2 ** 30:9.3f} GiB  {name}"
        if found["sum"] > memory and (c.real or compute.device.type == "cuda"):
            yield (f"  does not fit in {memory / 2 ** 30:.1f} GiB; --recompute full or a smaller "
                   "--micro-batch need less")


# --- measured ---

def bench(c: Config, compute: Compute) -> None:
    """Time --bench-steps LADD steps of random networks on random latents and print rates, FLOPs,
    memory and the share of each stage as JSON."""
    device = compute.device
    torch.manual_seed(c.seed)
    # a network that is sharded is made on the host, from which each process takes its part
    with torch.device(device if compute.mesh is None else "cpu"):
        base = MMDiT(c.model, compute.ops)
    sizes = base.config
    latents = random_latents(c, sizes)
    batching = batching_of(c)._replace(heads_first=0)
    p = make_networks(base, compute, c.group(Optim), heads_of(c, sizes), c.student_depth,
                      student_lora(c), c.teacher_fp8)
    del base
    calibrate(c.ladd, batching, p.teacher, p.heads, latents)

    keys = ((it,) for it in itertools.count())
    batches = iter(Prefetch(partial(step_parts, c.ladd, batching, latents), keys, device))

    def step(lap: Callable[[str], None] = no_lap) -> None:
        parts = next(batches)
        lap("batch and noise")
        ladd_step(c.ladd, p, parts, c.ema, True, lap)

    for _ in range(2):              # not timed: they compile, allocate and make Adam's moments
        step()
    wait(device)
    start = time.perf_counter()
    for _ in range(c.bench_steps):
        step()
    wait(device)
    seconds = (time.perf_counter() - start) / c.bench_steps

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    # the stages are timed in a step of their own, because each lap waits for the device
    with forwards(student=p.student, teacher=p.teacher) as counts:
        laps = Laps(device)
        step(laps)
    flops = step_flops(c, sizes, compute.dtype)
    name = device_name(device)
    peak = peak_flops(name)
    total = sum(laps.seconds.values())
    if batching.rank == 0:
        print(json.dumps({
            "preset": c.preset, "device": name, "world_size": batching.world,
            "versions": run.versions(), "commit": run.commit(), "batch": c.batch,
            "micro_batch": batching.micro, "size": c.sizes[0],
            "pairs_per_second": c.batch / seconds, "seconds": seconds, "flops": flops,
            "mfu": flops / seconds / (peak * batching.world) if peak else None,
            "forwards": counts, "memory_gb": memory_gb(device),
            "stages": {stage: took / total for stage, took in laps.seconds.items()}}, indent=1))


def random_latents(c: Config, sizes: MMDiTConfig) -> Latents:
    """Return two batches of random latents of the first size, each with a random prompt and image
    conditioning of its own."""
    n, hw, image = 2 * c.batch, (c.hw[0][0] // 8, c.hw[0][1] // 8), image_channels(c.task)
    context = torch.randn(n, text_tokens(c), sizes.context_dim).bfloat16()
    pooled = torch.randn(n, sizes.pooled_dim).bfloat16()
    images = {hw: torch.randn(n, image, *hw)} if image else {}
    numbers = torch.arange(n)
    return Latents([str(i) for i in range(n)], context, pooled, numbers[:, None],
                   (context[0], pooled[0]), {hw: (torch.randn(n, 16, *hw), numbers)}, {}, images)


def main(argv: list[str]) -> None:
    config = parse_config(["--bench-steps", "10", *argv], __doc__)
    compute = compute_of(config)
    parallel.start(compute.device, config.timeout)
    networks = networks_on_meta(config, config.model, compute.dtype)
    plan = plan_of(config, networks, compute, parallel.ranks()[1])
    bench(config, distribute(compute, config.shard, config.replicas, config.timeout, plan))
    parallel.finish()


if __name__ == "__main__":
    run_script("ladd.bench", main)
