"""Count the FLOPs of a step; ladd/engine/memory.py counts its memory."""
import copy
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

import kernels
from ladd.core.discriminator import Discriminator
from ladd.core.losses import (LaddConfig, Mismatched, draw, fake_pass, flow_loss, head_inputs,
                              heads_loss, student_loss)
from ladd.core.mmdit import MMDiT, Text
from ladd.engine.parallel import checkpointed
from ladd.report.speed import wait

FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Flash(TorchFunctionMode):
    """Call torch's attention as one operator, whose output selective recomputation keeps. On the
    meta device torch would use plain matrix products."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            return FLASH(*args)[0]
        return func(*args, **(kwargs or {}))


def joint_attention(*args, **kwargs) -> tuple[Tensor | None, Tensor]:
    """Compute the reference of the attention kernel, with torch's attention as one operator."""
    with Flash():       # here and not around the step, since recomputation calls this again
        return kernels.attention.reference_joint_attention(*args, **kwargs)


def step_cost(student: MMDiT, teacher: MMDiT, heads: Discriminator, latent: tuple[int, int, int],
              context: tuple[int, int], batch: int, config: LaddConfig,
              recompute: str = "none") -> dict[str, float]:
    """Return FLOPs: of one LADD step of `batch` samples (flops_step), of one training step of the
    teacher (flops_flow_step), and of one evaluation per sample (flops_v).

    All networks on the meta device; latent (c, h, w), context (tokens, width). FLOPs are the matrix
    products that torch counts in the references, those of recomputation included.
    """
    student, teacher, heads = (copy.deepcopy(model) for model in (student, teacher, heads))
    ops = kernels.load("torch")._replace(joint_attention=joint_attention)
    for model in (student, teacher):
        for block in model.joint_blocks:
            block.kernels = ops
        checkpointed(model, recompute)
    x0 = torch.empty(batch, *latent, device="meta")
    text = Text(x0.new_empty(batch, *context), x0.new_empty(batch, student.config.pooled_dim))
    if channels := student.config.in_channels - latent[0]:        # of the image conditioning
        text = text._replace(image=x0.new_empty(batch, channels, *latent[1:]))
    draws = draw(x0, config.easy_steps, config, (0,))
    mismatched = None
    if m := round(config.mismatched * batch):
        mismatched = Mismatched(torch.arange(m, device="meta"), text.map(lambda t: t[:m]),
                                x0.new_ones(m), m)

    def flops(function: Callable[..., None], *args) -> int:
        # the backward pass counts as twice the forward, whatever a kernel recomputes
        known = {FLASH: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
                 FLASH_BACKWARD: lambda _, q, k, v, *__, **___: 2 * sdpa_flop_count(q, k, v),
                 torch.ops.aten._addmm_activation: lambda _, a, b, **__: 2 * a[0] * a[1] * b[1]}
        with FlopCounterMode(display=False, custom_mapping=known) as counter:
            function(*args)
        return counter.get_total_flops()

    def evaluation() -> None:
        with torch.no_grad():
            teacher(x0, draws.sigma_s, *text)

    def step() -> None:
        fake = fake_pass(student, teacher, heads, x0, text, draws, config)
        inputs = head_inputs(teacher, heads, x0, text, mismatched, fake.feats, draws, config)
        for _ in range(config.heads_repeats):
            heads_loss(heads, inputs, config)[0].backward()
        student_loss(heads, text, fake, draws, config, inputs.grid)[0].backward()

    def teacher_step() -> None:
        flow_loss(teacher.requires_grad_(), x0, x0, draws.sigma_s, text).mean().backward()

    # teacher_step comes last, because it makes the teacher train
    return {"flops_v": flops(evaluation) / batch, "flops_step": flops(step),
            "flops_flow_step": flops(teacher_step)}


def measured_rate(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """Return the FLOP/s of a large matrix product on `device`. Networks reach a part of it."""
    n = 8192 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device, dtype=dtype)
    a @ a                           # the first call allocates and picks a kernel
    wait(device)
    done = 0
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        a @ a
        wait(device)
        done += 1
    return 2 * n ** 3 * done / (time.perf_counter() - start)
