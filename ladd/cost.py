"""What a run will take, counted on the meta device before anything is allocated: parameters, memory, FLOPs,
hours, disk."""
import time
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ladd.config import Config
from ladd.discriminator import Discriminator
from ladd.distill import (DistillConfig, Text, Wrong, draw, fake_pass, flow_loss, grid_of, heads_loss,
                          student_loss)
from ladd.mmdit import MMDiT


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Counts the bytes that autograd keeps for the backward pass;
    parameters and shared storages count once or not at all."""

    def __init__(self, *models: torch.nn.Module):
        self.bytes = 0
        self.seen = {p.untyped_storage()._cdata for m in models for p in (*m.parameters(), *m.buffers())}

        def pack(t: Tensor) -> Tensor:
            key = t.untyped_storage()._cdata
            if key not in self.seen:
                self.seen.add(key)
                self.kept.append(t)                # keeps the storage alive, so that its key stays its own
                self.bytes += t.untyped_storage().nbytes()
            return t

        self.kept: list[Tensor] = []
        super().__init__(pack, lambda t: t)


def count(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def step_cost(student: MMDiT, teacher: MMDiT, heads: Discriminator, latent: tuple[int, int, int],
              context: tuple[int, int], batch: int, config: DistillConfig,
              schedule: str = "one-forward") -> dict[str, int]:
    """Of one LADD step of `batch` samples the FLOPs, the bytes kept for backward and the bytes of weights;
    FLOPs of a further step of the heads, of one teacher training step, of one evaluation (flops_v, a sample).

    All networks on the meta device; latent (c, h, w), context (l, dim).
    FLOPs are the matrix products that torch counts.
    """
    x0 = torch.empty(batch, *latent, device="meta")
    text = Text(torch.empty(batch, *context, device="meta"),
                torch.empty(batch, student.config.pooled_dim, device="meta"))
    drawn, m = draw(x0, config.easy_steps, config, (0,)), round(config.misaligned * batch)
    wrong = Wrong(torch.arange(m, device="meta"), Text(*(t[:m] for t in text)), x0.new_ones(m), m) if m else None
    kept = SavedBytes(student, teacher, heads)
    with FlopCounterMode(display=False) as counter, kept:
        fake = fake_pass(student, teacher, heads, x0, text, drawn, config)
        heads_loss(teacher, heads, x0, text, wrong, fake.feats, drawn, config)[0].backward()
        if schedule == "two-forward":
            kept.bytes, kept.kept = 0, []                          # the heads' fakes need no graph
            fake = fake_pass(student, teacher, heads, x0, text, drawn, config)
        student_loss(heads, text, fake, drawn, config, grid_of(teacher, x0))[0].backward(
            inputs=list(student.parameters()))
    with FlopCounterMode(display=False) as heads_counter:
        with torch.no_grad():
            fake = fake_pass(student, teacher, heads, x0, text, drawn, config)
        heads_loss(teacher, heads, x0, text, wrong, fake.feats, drawn, config)[0].backward()
    with FlopCounterMode(display=False) as flow_counter:
        flow_loss(student, x0, x0, drawn.sigma_s, text).mean().backward()
    with FlopCounterMode(display=False) as evaluation, torch.no_grad():
        teacher(x0, drawn.sigma_s, *text)
    weights = sum(p.numel() * teacher.final_layer.linear.weight.element_size()
                  for model in (student, teacher) for p in model.parameters())
    return {"flops_step": counter.get_total_flops(), "flops_heads_step": heads_counter.get_total_flops(),
            "flops_flow_step": flow_counter.get_total_flops(),
            "flops_v": evaluation.get_total_flops() / batch, "bytes_saved": kept.bytes,
            "bytes_weights": weights}


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


def disk_plan(student: MMDiT, heads: Discriminator, latent: tuple[int, int, int], samples: int, itemsize: int,
              text: int) -> dict[str, int]:
    """Bytes a run leaves: latents of `itemsize` bytes a value, `text` values in bf16; two states of student,
    average, Adam and heads; the student itself."""
    c, h, w = latent
    plan = {"latents": samples * c * h * w * itemsize, "text": text * 2,
            "states (two kept)": 2 * (16 * count(student) + 12 * count(heads)),
            "students (last and best)": 8 * count(student)}
    return plan | {"sum": sum(plan.values())}


def memory_plan(student: MMDiT, teacher: MMDiT, heads: Discriminator, saved: int,
                gpus: int = 1) -> dict[str, int]:
    """Bytes of each of `gpus` by purpose: fp32 masters with gradients, two Adam moments and a moving average,
    sharded over them; the frozen teacher, the heads and the activations of a micro-batch on each."""
    frozen = sum(p.numel() * p.element_size() for p in teacher.parameters())
    plan = {"student (weights, gradients, Adam, EMA)": 20 * count(student) // gpus,
            "teacher (frozen)": frozen, "heads (weights, gradients, Adam)": 16 * count(heads),
            "activations for backward": saved}
    return plan | {"sum": sum(plan.values())}


def plan(config: Config, student: MMDiT, teacher: MMDiT, heads: Discriminator, dc: DistillConfig, tokens: int,
         prompts: int, device: torch.device) -> Iterator[str]:
    """Lines of --dry-run: parameters, memory, FLOPs and bytes of a step; hours and disk of the stages.
    Networks on the meta device; `tokens` of text a prompt, `prompts` distinct ones."""
    h, w = config.hw[0]
    latent, micro = (16, h // 8, w // 8), config.batch // config.accumulate
    sizes, dtype = teacher.config, teacher.final_layer.linear.weight.dtype
    costs = step_cost(student, teacher, heads, latent, (tokens, sizes.context_dim), micro, dc)
    yield (f"parameters: teacher {count(teacher):,}, student {count(student):,}, heads {count(heads):,}")
    for gpus in (1, 8) if config.real else (1,):
        where = f"on each of {gpus} GPUs, the student sharded" if gpus > 1 else "on one device"
        yield f"memory of distillation {where}, {dtype}, {micro} samples at a time:"
        for name, size in memory_plan(student, teacher, heads, costs["bytes_saved"], gpus).items():
            yield f"  {size / 2 ** 30:9.3f} GiB  {name}"
    step = config.accumulate * (costs["flops_step"] + (config.heads_steps - 1) * costs["flops_heads_step"])
    flow_step = costs["flops_flow_step"] * config.teacher_batch / micro
    loaded = config.teacher or config.real
    yield (f"FLOPs: {step:.3e} a LADD step of {config.batch} pairs"
           + ("" if loaded else f", {flow_step:.3e} a teacher step of {config.teacher_batch}"))
    yield (f"bytes: {costs['bytes_saved']:.3e} kept for backward of {micro} samples, "
           f"{costs['bytes_weights']:.3e} of student's and teacher's weights read in each forward")
    samples = 0 if config.data else config.data_size
    stages = {} if loaded else {"teacher": config.teacher_steps * flow_step}
    stages["data"] = samples * config.sample_steps * (1 + (config.guidance != 1)) * costs["flops_v"]
    stages["distill"] = (config.steps + config.heads_first) * step           # a heads' step alone costs less
    rate = config.tflops * 1e12 or measured_rate(device, dtype)
    yield (f"hours at {rate / 1e12:.2f} TFLOP/s "
           f"({'given' if config.tflops else 'a product timed here; networks reach a part of it'}):")
    for name, flops in stages.items():
        yield f"  {flops / rate / 3600:9.4f} h    {name}, {flops:.3e} FLOPs"
    yield f"disk, with {samples:,} latents to generate from {prompts * bool(samples):,} prompts:"
    text = prompts * bool(samples) * (tokens * sizes.context_dim + sizes.pooled_dim)
    for name, size in disk_plan(student, heads, latent, samples, 2 if config.real else 4, text).items():
        yield f"  {size / 2 ** 30:9.3f} GiB  {name}"
