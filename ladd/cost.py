"""What a run will take, counted on the meta device before anything is allocated:
parameters, memory, FLOPs of a step."""
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ladd.discriminator import Discriminator
from ladd.distill import DistillConfig, Text, draw, fake_pass, flow_loss, grid_of, heads_loss, student_loss
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
              context: tuple[int, int], batch: int,
              config: DistillConfig) -> dict[str, int]:
    """FLOPs of one LADD step and of one teacher training step of `batch` samples,
    and the bytes kept for backward.

    All networks on the meta device; latent (c, h, w), context (l, dim).
    FLOPs are the matrix products that torch counts.
    """
    x0, g = torch.empty(batch, *latent, device="meta"), torch.Generator().manual_seed(0)
    text = Text(torch.empty(batch, *context, device="meta"),
                torch.empty(batch, student.config.pooled_dim, device="meta"))
    codes, drawn = torch.arange(batch)[:, None], draw(x0, config.easy_steps, config, g)
    kept = SavedBytes(student, teacher, heads)
    with FlopCounterMode(display=False) as counter, kept:
        fake = fake_pass(student, teacher, heads, x0, text, drawn, config)
        heads_loss(teacher, heads, x0, text, codes, fake.feats, drawn, config, g)[0].backward()
        student_loss(heads, text, fake, drawn, config, grid_of(teacher, x0))[0].backward(
            inputs=list(student.parameters()))
    with FlopCounterMode(display=False) as flow_counter:
        flow_loss(student, x0, x0, drawn.sigma_s, text).mean().backward()
    return {"flops_step": counter.get_total_flops(), "flops_flow_step": flow_counter.get_total_flops(),
            "bytes_saved": kept.bytes}


def memory_plan(student: MMDiT, teacher: MMDiT, heads: Discriminator, saved: int) -> dict[str, int]:
    """Bytes by purpose: fp32 masters with gradients, two Adam moments and a moving average;
    the frozen teacher; the heads; activations."""
    frozen = sum(p.numel() * p.element_size() for p in teacher.parameters())
    plan = {"student (weights, gradients, Adam, EMA)": 20 * count(student), "teacher (frozen)": frozen,
            "heads (weights, gradients, Adam)": 16 * count(heads), "activations for backward": saved}
    return plan | {"sum": sum(plan.values())}
