"""The losses of latent adversarial diffusion distillation, as pure functions.

    x0_hat     = student's prediction from (1 - sigma_s) x0 + sigma_s eps
    feats_fake = features of the frozen teacher at noised(x0_hat, sigma_d)     with gradient
    feats_real = features of the frozen teacher at noised(x0, sigma_d)         without gradient
    loss_d     = mean relu(1 - D(feats_real)) + mean relu(1 + D(feats_fake.detach()))
    loss_g     = - mean D(feats_fake)

One step: `fake_pass`, `head_inputs`, then `heads_loss` and `student_loss` with the same features,
then both optimizers; the heads may take further steps on these features. One student forward and
one teacher forward serve both losses; the gradients equal those of separate forwards. In the code
"fake" is what the student generates, "real" a latent that the teacher generated with guidance.
Letters: b batch, c channels, h w latent size (of logits: the token grid), k head, l tokens, d width
of the teacher, m mismatched samples, n samples of `HeadInputs.others`.
Source: Sauer et al. 2024, Sec. 3.
"""
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ladd.core import flow
from ladd.core.discriminator import Discriminator
from ladd.core.mmdit import MMDiT, Text, cat

R1_SIGMA = 0.05      # size of the perturbation of R1. Our choice


@dataclass(frozen=True)
class LaddConfig:
    """The options of one step. Noise levels are unshifted; `draw` shifts the student's."""
    levels: tuple[float, ...]      # noise levels of the student, largest first
    probs: tuple[float, ...]       # how often each one is trained, after the easy steps
    easy_steps: int                # first steps, on the smaller half of the levels only
    shift: float                   # resolution shift of the student's levels
    d_mean: float                  # sigma_d ~ LogitNormal(d_mean, 1); `shift` does not apply to it
    mismatched: float              # fraction of the real samples that are also shown with a
                                   # mismatched caption, labelled fake
    r1_weight: float               # weight of the approximate R1 penalty, 0: none
    distill_weight: float          # weight of LADD's optional distillation loss, 0: none
    heads_repeats: int = 1         # steps of the heads on the features of each batch


class Draws(NamedTuple):
    """All random numbers of one step."""
    sigma_s: Tensor          # [b] noise level of the student, shifted
    eps_s: Tensor            # [b, c, h, w]
    sigma_d: Tensor          # [b] noise level at which fake and real sample are renoised
    eps_d: Tensor            # noise of both, so that nothing but the sample differs (our choice)
    eps_r1: Tensor | None    # direction of R1's perturbation, None without R1


class Mismatched(NamedTuple):
    """Mismatched captions: m samples of the batch also enter the loss as fake, with another
    caption."""
    rows: Tensor       # [m] which samples
    text: Text         # [m, ...] the other captions, with the sample's own image
    weight: Tensor     # [m] 1, or 0 where every other caption fits the sample too
    count: float       # mismatched samples per micro-batch: the step's number times micro / batch


class Fake(NamedTuple):
    """What the student generated, and the teacher's features of it, with their graph."""
    x0_hat: Tensor         # [b, c, h, w]
    feats: list[Tensor]    # k tensors [b, l, d]
    target: Tensor | None  # the teacher's x0 estimate from the renoised x0_hat (distillation loss)


class HeadInputs(NamedTuple):
    """What the heads read of b samples, without graphs: the fakes' features, and those of n others,
    b real, m mismatched and, for R1, b perturbed ones."""
    fake: list[Tensor]       # k tensors [b, l, d]
    others: list[Tensor]     # k tensors [n, l, d]
    sigma: Tensor            # [n]; the first b belong to the fakes too
    pooled: Tensor           # [n, pooled_dim]; likewise
    weight: Tensor | None    # [m] of the mismatched ones, None if captions are not mixed
    count: float             # of Mismatched
    grid: tuple[int, int]


def draw(x0: Tensor, step: int, config: LaddConfig, key: Sequence[int], first: int = 0,
         batch: int | None = None) -> Draws:
    """Return all random numbers of samples first, first + 1, ... of `batch` (default: all of x0).

    They are functions of `key`, `step`, the size of the batch and the sample's number alone, drawn
    on the CPU in fp32: a sample keeps its noise on every device, and however many processes or
    micro-batches share the batch. Noise that no option uses is not drawn.
    """
    n, part, g = batch or len(x0), slice(first, first + len(x0)), flow.generator(*key)
    probs = flow.student_probs(step, config.probs, config.easy_steps)
    sigma_s = flow.shift(flow.student_levels(n, config.levels, probs, g), config.shift)[part]
    sigma_d = flow.logit_normal(n, (config.d_mean,), g)[part]
    count = 3 if config.r1_weight else 2
    eps = torch.stack([torch.randn(count, *x0.shape[1:], generator=flow.generator(*key, i))
                       for i in range(first, first + len(x0))], 1)
    eps_s, eps_d, *eps_r1 = eps.to(x0.device)
    sigma_s, sigma_d = sigma_s.to(x0.device), sigma_d.to(x0.device)
    return Draws(sigma_s, eps_s, sigma_d, eps_d, eps_r1[0] if eps_r1 else None)


def grid_of(teacher: MMDiT, x: Tensor) -> tuple[int, int]:
    """Return (h, w) of x in tokens."""
    return x.shape[-2] // teacher.config.patch, x.shape[-1] // teacher.config.patch


def predict_x0(model: MMDiT, xt: Tensor, sigma: Tensor, text: Text) -> Tensor:
    """Return x0_hat = xt - sigma v, in fp32."""
    return flow.to_x0(xt, model(xt, sigma, *text), sigma)


def tapped_features(teacher: MMDiT, heads: Discriminator, xt: Tensor, sigma: Tensor,
                    text: Text) -> list[Tensor]:
    """Return the features that the heads read; the teacher stops after the last of them."""
    return teacher(xt, sigma, *text, taps=heads.config.taps, stop_at_last_tap=True)[1]


def fake_pass(student: MMDiT, teacher: MMDiT, heads: Discriminator, x0: Tensor, text: Text,
              draws: Draws, config: LaddConfig) -> Fake:
    """Run the student, renoise its prediction, run the frozen teacher on that.

    Gradients flow through the frozen teacher; the caller decides whether they are recorded.
    """
    x0_hat = predict_x0(student, flow.noised(x0, draws.eps_s, draws.sigma_s), draws.sigma_s, text)
    xt = flow.noised(x0_hat, draws.eps_d, draws.sigma_d)
    if not config.distill_weight:
        return Fake(x0_hat, tapped_features(teacher, heads, xt, draws.sigma_d, text), None)
    v, feats = teacher(xt, draws.sigma_d, *text, taps=heads.config.taps)
    # The target is a constant: no gradient reaches the student through it.
    return Fake(x0_hat, feats, flow.to_x0(xt, v, draws.sigma_d).detach())


def hinge_d(logits_real: Tensor, logits_fake: Tensor, logits_mismatched: Tensor | None = None,
            weight: Tensor | None = None, count: float = 0.0) -> Tensor:
    """Return mean relu(1 - D(real)) + mean relu(1 + D(fake)), per token and head, mean last.

    Logits are [k, b, h, w]. logits_mismatched [k, m, h, w] with `weight` [m] are averaged together
    with the fake ones. Dividing by the mean number of them, `count`, makes the average over
    micro-batches equal to the loss of the whole batch.
    """
    b = logits_fake.shape[1]
    loss_fake = F.relu(1 + logits_fake).mean()
    if logits_mismatched is not None:
        extra = (F.relu(1 + logits_mismatched).mean((0, 2, 3)) * weight).sum()
        loss_fake = (b * loss_fake + extra) / (b + count)
    return F.relu(1 - logits_real).mean() + loss_fake


@torch.no_grad()
def head_inputs(teacher: MMDiT, heads: Discriminator, x0: Tensor, text: Text,
                mismatched: Mismatched | None, fake_feats: list[Tensor], draws: Draws,
                config: LaddConfig) -> HeadInputs:
    """Return what the heads read; one teacher pass serves all but the fakes.

    The features have no graph: the discriminator loss must not move the student.
    """
    xt = flow.noised(x0, draws.eps_d, draws.sigma_d)
    passes = [(xt, draws.sigma_d, text)]
    if mismatched is not None:
        rows = mismatched.rows
        passes.append((xt[rows], draws.sigma_d[rows], mismatched.text))
    if config.r1_weight:
        # R1 perturbs the RENOISED sample and keeps its noise level (Lin et al. 2025, Sec. 3.3).
        passes.append((xt + R1_SIGMA * draws.eps_r1, draws.sigma_d, text))
    xts, sigmas, texts = zip(*passes)
    sigma, together = torch.cat(sigmas), cat(texts)
    others = tapped_features(teacher, heads, torch.cat(xts), sigma, together)
    weight, count = (mismatched.weight, mismatched.count) if mismatched else (None, 0.0)
    return HeadInputs([f.detach() for f in fake_feats], others, sigma, together.pooled, weight,
                      count, grid_of(teacher, x0))


def heads_loss(heads: Discriminator, inputs: HeadInputs,
               config: LaddConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """Return (loss_d, stats): the hinge of real against fake, plus the approximate R1 penalty.

    R1 is the mean |D(xt) - D(xt + R1_SIGMA n)|^2 with Gaussian noise n. stats are detached:
    logits_real and logits_fake [k, b, h, w], logits_mismatched [k, m, h, w] or None, and loss_r1.
    """
    b = len(inputs.fake[0])
    logits = heads(inputs.others, inputs.sigma, inputs.pooled, inputs.grid)
    logits_fake = heads(inputs.fake, inputs.sigma[:b], inputs.pooled[:b], inputs.grid)
    logits_real = logits[:, :b]
    stats = {"logits_real": logits_real.detach(), "logits_fake": logits_fake.detach(),
             "logits_mismatched": None, "loss_r1": torch.zeros((), device=logits.device)}
    if inputs.weight is None:
        loss = hinge_d(logits_real, logits_fake)
    else:
        extra = logits[:, b:b + len(inputs.weight)]
        loss = hinge_d(logits_real, logits_fake, extra, inputs.weight, inputs.count)
        stats["logits_mismatched"] = extra.detach()
    if config.r1_weight:
        loss_r1 = (logits[:, -b:] - logits_real).square().mean()
        loss = loss + config.r1_weight * loss_r1
        stats["loss_r1"] = loss_r1.detach()
    return loss, stats


def student_loss(heads: Discriminator, text: Text, fake: Fake, draws: Draws, config: LaddConfig,
                 grid: tuple[int, int]) -> tuple[Tensor, dict[str, Tensor]]:
    """Return (loss, stats): loss_g = - mean D(feats_fake), plus the distillation loss.

    The distillation loss is (1 - sigma_d) |x0_hat - teacher's x0 estimate|^2, with the weight that
    ADD calls exponential (Sauer et al. 2023, Sec. 3.3, c(t) = alpha_t). stats are detached.
    """
    # Detached parameters get no gradient, and a fused kernel that sees this computes none.
    frozen = {name: p.detach() for name, p in heads.named_parameters()}
    inputs = fake.feats, draws.sigma_d, text.pooled, grid
    logits = torch.func.functional_call(heads, frozen, inputs)
    loss_g = -logits.mean()
    loss_distill = torch.zeros((), device=logits.device)
    if config.distill_weight:
        weight = 1 - flow.per_sample(draws.sigma_d, fake.x0_hat)
        loss_distill = (weight * (fake.x0_hat - fake.target).square()).mean()
    loss = loss_g + config.distill_weight * loss_distill
    return loss, {"loss_g": loss_g.detach(), "loss_distill": loss_distill.detach(),
                  "logits_fake_g": logits.detach()}


def flow_loss(model: MMDiT, x0: Tensor, eps: Tensor, sigma: Tensor, text: Text) -> Tensor:
    """Return the teacher's training loss mean |v - (eps - x0)|^2 per sample, [b].

    Source: Esser et al. 2024, Eq. 2 with their weight 1.
    """
    v = model(flow.noised(x0, eps, sigma), sigma, *text)
    return (v - flow.velocity(x0, eps)).square().flatten(1).mean(1)
