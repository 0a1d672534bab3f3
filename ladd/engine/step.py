"""One LADD step, of the discriminator alone or of discriminator and student: networks, optimizers
and micro-batches, in one process or several. train.py makes iterations of them.

The losses are in ladd/core/losses.py, sharding over processes in ladd/engine/parallel.py.
"""
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ladd.cli import must
from ladd.core import flow
from ladd.core.discriminator import Discriminator, DiscriminatorConfig, channel_moments
from ladd.core.losses import (LaddConfig, fake_pass, head_inputs, heads_loss, student_loss,
                              tapped_features)
from ladd.core.mmdit import MMDiT
from ladd.data.batches import Batching, MicroBatch, micro_batches, moved
from ladd.data.shards import Latents
from ladd.engine import parallel, state
from ladd.engine.fp8 import in_fp8
from ladd.engine.networks import Compute, LoraConfig, checkpoint_tensors, make_student, network
from ladd.engine.optimizer import AdamW
from ladd.engine.parallel import Norms

# our choices, for student and discriminator
BETA1 = 0.0      # AdamW without momentum
COOLDOWN = 0.4   # fraction of the student's steps at the end in which learning rates fall to 0


class Optim(NamedTuple):
    """How student and discriminator are optimized."""
    lr: float          # student
    heads_lr: float    # discriminator
    beta2: float
    steps: int         # of the student
    warmup: int        # steps of linear warm-up


class Networks(NamedTuple):
    """Networks and optimizers of a training step."""
    student: MMDiT
    ema: MMDiT
    teacher: MMDiT
    heads: Discriminator
    opt_g: AdamW
    opt_d: AdamW

    def to_checkpoint(self) -> state.Tensors:
        """Return the tensors that a run resumes from. Frozen weights are in the teacher's file."""
        return {"student": checkpoint_tensors(self.student, self.student),
                "ema": checkpoint_tensors(self.ema, self.student),
                "heads": self.heads.state_dict(),
                "opt_g": self.opt_g.state(), "opt_d": self.opt_d.state()}


def make_networks(base: MMDiT, compute: Compute, optim: Optim, heads: DiscriminatorConfig,
                  depth: int = 0, adapter: LoraConfig | None = None,
                  teacher_fp8: bool = False) -> Networks:
    """Return student and EMA with the weights of the teacher `base`, the frozen teacher, a new
    discriminator and both optimizers."""
    must(not (teacher_fp8 and compute.shard_teacher),
         "--teacher-fp8 requires a replicated teacher: --shard none or student")
    teacher = network(base.config, base.state_dict(), compute, compute.dtype,
                      sharded=compute.shard_teacher)
    student, ema = make_student(base, teacher, compute, depth, adapter)
    if teacher_fp8:
        in_fp8(teacher)
    discriminator = Discriminator(heads, compute.ops).to(compute.device)
    parallel.broadcast(discriminator)
    return Networks(student, ema, teacher, discriminator,
                    AdamW(student, optim.lr, BETA1, optim.beta2, ema=ema),
                    AdamW(discriminator, optim.heads_lr, BETA1, optim.beta2))


def calibrate(config: LaddConfig, batching: Batching, teacher: MMDiT, heads: Discriminator,
              latents: Latents) -> None:
    """Standardise the features that the heads read, by the statistics of one batch of renoised real
    samples. Processes and micro-batches share that batch as they share a step's."""
    # only sigma_d and eps_d are used; they do not depend on the student's step
    parts = micro_batches(latents, batching, config, 0, 0, (batching.seed, 3))
    total = 0
    for part in parts:
        x0, text, _, draws = moved(part, heads.feat_mean.device)
        with torch.no_grad():
            xt = flow.noised(x0, draws.eps_d, draws.sigma_d)
            total += channel_moments(tapped_features(teacher, heads, xt, draws.sigma_d, text))
    heads.calibrate(parallel.averaged(total / len(parts)))


# --- the step ---

def rate_factor(optim: Optim, done: int, steps_taken: int) -> float:
    """Return the factor of a network's learning rate: linear warm-up over the iterations that it
    has taken part in, then constant, then linear to 0 over the last COOLDOWN of the student's
    steps, of which `done` are done."""
    left = (optim.steps - done) / max(1, COOLDOWN * optim.steps)
    return min(1, (steps_taken + 1) / max(1, optim.warmup), left)


def step_parts(config: LaddConfig, batching: Batching, latents: Latents,
               it: int) -> list[MicroBatch]:
    """Return this process's micro-batches of iteration `it`; noise levels follow the student's
    steps."""
    return micro_batches(latents, batching, config, it, max(it - batching.heads_first, 0),
                         (batching.seed, 2, it))


def joined(stats: Sequence[dict[str, Tensor | None]]) -> dict[str, Tensor | None]:
    """Return the stats of a batch from those of its micro-batches: logits [k, b, h, w] are
    concatenated along b, losses averaged."""
    out = {}
    for name, first in stats[0].items():
        values = [s[name] for s in stats]
        if first is None:
            out[name] = None
        else:
            out[name] = torch.cat(values, 1) if first.ndim else torch.stack(values).mean()
    return out


def no_lap(name: str) -> None:
    """Do nothing: the default where nobody measures the stages of a step."""


def ladd_step(config: LaddConfig, p: Networks, parts: list[MicroBatch], ema_decay: float,
              update_student: bool, lap: Callable[[str], None] = no_lap
              ) -> tuple[dict[str, Tensor | None], dict[str, Norms]]:
    """Run one LADD step on the micro-batches `parts`; return (stats, gradient norms by network).

    One student forward and one teacher forward of the fake serve both losses of a micro-batch.
    Both losses are computed before the heads' optimizer steps, so each graph is freed after its
    micro-batch and no forward is repeated. Then the heads take config.heads_repeats steps in all on
    the same features. Without `update_student` only the heads train. stats: `loss_d`, and what
    `heads_loss` and `student_loss` return, before any step; the heads' norms are those of their
    last step. `lap` is called with the name of each stage that ends.
    """
    kept = []

    def backward(part: MicroBatch, last: bool) -> dict[str, Tensor | None]:
        x0, text, mismatched, draws = part

        # 1. generate: student, renoise, frozen teacher, through which the student's gradient flows
        with torch.set_grad_enabled(update_student):
            fake = fake_pass(p.student, p.teacher, p.heads, x0, text, draws, config)
        lap("generate")

        # 2. discriminator loss, on features without a graph: only the heads get gradients
        inputs = head_inputs(p.teacher, p.heads, x0, text, mismatched, fake.feats, draws, config)
        if config.heads_repeats > 1:
            kept.append(inputs)
        loss_d, stats = heads_loss(p.heads, inputs, config)
        (loss_d / len(parts)).backward()
        stats = {"loss_d": loss_d.detach()} | stats
        grid = inputs.grid
        del inputs      # with one step of the heads its features are not needed any more
        lap("discriminator loss")

        # 3. student loss: it detaches the heads' parameters, so only the student gets gradients
        if update_student:
            loss_g, stats_g = student_loss(p.heads, text, fake, draws, config, grid)
            parallel.accumulate(p.student, last)
            (loss_g / len(parts)).backward()
            stats |= stats_g
            lap("student loss")
        return stats

    # one call per micro-batch frees its features and graphs before the next one starts
    stats = joined([backward(part, part is parts[-1]) for part in parts])

    # 4. optimizers; the student's also updates the EMA
    parallel.average_gradients(p.heads)
    norms = {"heads": p.opt_d.step()}
    lap("heads' optimizer")
    for _ in range(config.heads_repeats - 1):
        for inputs in kept:
            (heads_loss(p.heads, inputs, config)[0] / len(parts)).backward()
        parallel.average_gradients(p.heads)
        # the last norm is returned: NaN in any step of the heads is NaN in it
        norms["heads"] = p.opt_d.step()
    if kept:
        lap("heads' further steps")
    if update_student:
        norms["student"] = p.opt_g.step(ema_decay)
        lap("student's optimizer, EMA")
    return stats, norms
