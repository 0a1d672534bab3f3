"""What a run will take, counted on the meta device before anything is allocated: parameters, FLOPs, hours,
disk, and the memory of ladd/memory.py."""
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch.utils.flop_counter import FlopCounterMode

from kernels import Kernels
from ladd.config import Config
from ladd.discriminator import Discriminator
from ladd.distill import DistillConfig, flow_loss
from ladd.memory import PRODUCTS, Step, count, fused, memory_plan, peak, placed, references
from ladd.mmdit import MMDiT
from ladd.sampler import evaluations


def step_cost(student: MMDiT, teacher: MMDiT, heads: Discriminator, latent: tuple[int, int, int],
              context: tuple[int, int], batch: int, config: DistillConfig,
              checkpoint: str = "none", ops: Kernels | None = None) -> dict[str, int]:
    """Of one LADD step of `batch` samples the FLOPs, the bytes kept for backward and the bytes of weights;
    FLOPs of a further step of the heads, of one teacher training step, of one evaluation (flops_v, a sample).

    All networks on the meta device; latent (c, h, w), context (l, dim). FLOPs are the matrix products that
    torch counts in the references, those made again by a checkpoint too; bytes kept are those of `ops`, the
    references' by default.
    """
    step = Step(student, teacher, heads, latent, context, batch, config, checkpoint)
    made = step.made(references(), torch.float32)
    x0, text, wrong, drawn = made.inputs()

    def flops(function: Callable, *args) -> int:
        with FlopCounterMode(display=False, custom_mapping=PRODUCTS) as counter:
            function(*args)
        return counter.get_total_flops()

    with torch.no_grad():
        evaluation = flops(made.teacher, x0, drawn.sigma_s, *text)
    return {"flops_step": flops(made.run), "flops_v": evaluation / batch,
            "flops_heads_step": flops(lambda: made.heads_backward(
                x0, text, wrong, drawn, made.fakes(x0, text, drawn, False))),
            "flops_flow_step": flops(lambda: flow_loss(
                made.teacher.requires_grad_(), x0, x0, drawn.sigma_s, text).mean().backward()),
            "bytes_saved": peak(step, ops or references())[0],
            "bytes_weights": (count(student) + count(teacher)) * teacher.pos_embed.element_size()}


def measured_rate(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """FLOP/s of one large matrix product on `device`: what networks reach a part of."""
    n = 8192 if device.type == "cuda" else 1024
    a, done = torch.randn(n, n, device=device, dtype=dtype), 0

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    a @ a                                                          # the first call prepares
    wait()
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        a @ a
        wait()
        done += 1
    return 2 * n ** 3 * done / (time.perf_counter() - start)


def disk_plan(student: MMDiT | None, teacher: MMDiT | None, heads: Discriminator,
              latent: tuple[int, int, int], samples: int, itemsize: int, text: int) -> dict[str, int]:
    """Bytes a run leaves: latents of `itemsize` bytes a value, `text` values in bf16; two states of a teacher
    that trains and its file; two states of what trains in the student, average, Adam and heads; the student
    itself."""
    c, h, w = latent
    plan = {"latents": samples * c * h * w * itemsize, "text": text * 2}
    if teacher:
        plan["teacher (two states, file)"] = (2 * 12 + 4) * count(teacher)
    if student:
        plan |= {"states (two kept)": 2 * (16 * count(student, True) + 12 * count(heads)),
                 "students (last and best)": 8 * count(student)}
    return plan | {"sum": sum(plan.values())}


def plan(config: Config, student: MMDiT, teacher: MMDiT, heads: Discriminator, dc: DistillConfig, tokens: int,
         prompts: int, device: torch.device, memory: int = 80 * 10 ** 9) -> Iterator[str]:
    """Lines of --dry-run: parameters, memory, FLOPs and bytes of a step; hours and disk of the stages.
    Networks on the meta device; `tokens` of text a prompt, `prompts` distinct ones; `memory` bytes a GPU
    decide what is sharded."""
    (h, w), sizes, dtype = config.hw[0], teacher.config, teacher.pos_embed.dtype
    latent, micro, gpu = (16, h // 8, w // 8), config.micro(1), config.real or device.type == "cuda"
    ops = fused() if gpu and config.kernels != "torch" else references()
    networks = student, teacher, heads, latent, (tokens, sizes.context_dim)
    costs = step_cost(*networks, micro, dc, config.checkpoint, ops)
    distills, loaded = config.objective != "flow", config.teacher or config.real and config.task == "text"
    yield f"parameters: teacher {count(teacher):,}" + (
        f", student {count(student):,}" + f" ({count(student, True):,} in its LoRA)" * bool(config.lora)
        + f", heads {count(heads):,}") * distills
    worlds = ((1, 8 * config.replicas) if config.real else (1,)) if distills else ()
    for gpus in [n for n in worlds if config.batch % n == 0]:
        part = Step(*networks, config.micro(gpus), dc, config.checkpoint, not config.teacher_fp8)
        shard, shared, found = placed(memory, gpus, config.replicas if gpus > 1 else 1, partial(
            memory_plan, part, ops, gpus, accumulate=config.batch // gpus // part.batch,
            device="cuda" if gpu else "cpu"), *((config.parallel, config.shard_teacher) if gpus > 1 else ()))
        where = ("on one device" if gpus == 1 else f"on each of {gpus} GPUs, student "
                 f"{'sharded' if shard > 1 else 'whole'}, teacher {'sharded' if shared > 1 else 'whole'}")
        yield (f"memory of distillation {where}, {dtype}, {part.batch} samples at a time, checkpoint "
               f"{config.checkpoint}:")
        for name, size in found.items():
            yield f"  {size / 2 ** 30:9.3f} GiB  {name}"
        if gpu and found["sum"] > memory:
            yield (f"  does not fit in {memory / 2 ** 30:.1f} GiB; --checkpoint full or a smaller "
                   "--micro-batch take less")
    step = costs["flops_step"] + (config.heads_steps - 1) * costs["flops_heads_step"]
    step *= config.batch // micro
    flow_step = costs["flops_flow_step"] * config.teacher_batch / micro
    yield "FLOPs: " + ", ".join(
        [f"{step:.3e} a LADD step of {config.batch} pairs"] * distills
        + [f"{flow_step:.3e} a teacher step of {config.teacher_batch}"] * (not loaded))
    samples = config.data_size if distills and not config.data else 0
    stages = {} if loaded else {"teacher": config.teacher_steps * flow_step}
    if distills:
        yield (f"bytes: {costs['bytes_saved']:.3e} kept for backward of {micro} samples, "
               f"{costs['bytes_weights']:.3e} of student's and teacher's weights read in each forward")
        each = evaluations(config.guidance, config.image_guidance)
        stages["data"] = samples * config.sample_steps * each * costs["flops_v"]
        stages["distill"] = (config.steps + config.heads_first) * step       # a heads' step alone costs less
    rate = config.tflops * 1e12 or measured_rate(device, dtype)
    yield (f"hours at {rate / 1e12:.2f} TFLOP/s "
           f"({'given' if config.tflops else 'a product timed here; networks reach a part of it'}):")
    for name, flops in stages.items():
        yield f"  {flops / rate / 3600:9.4f} h    {name}, {flops:.3e} FLOPs"
    yield f"disk, with {samples:,} latents to generate from {prompts * bool(samples):,} prompts:"
    text = prompts * bool(samples) * (tokens * sizes.context_dim + sizes.pooled_dim)
    stored = 16 + config.beside, *latent[1:]
    plan = disk_plan(student if distills else None, None if loaded else teacher, heads, stored, samples,
                     2 if config.real else 4, text)
    for name, size in plan.items():
        yield f"  {size / 2 ** 30:9.3f} GiB  {name}"
