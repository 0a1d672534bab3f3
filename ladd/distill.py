"""The LADD step as pure functions: no optimizer, no logging, no distribution.

    x0_hat     = student's prediction from (1 - sigma_s) x0 + sigma_s eps
    feats_fake = teacher taps of renoise(x0_hat, sigma_d)    the graph lives on through the frozen teacher
                                                             into the student
    feats_real = teacher taps of renoise(x0, sigma_d')       no graph
    loss_d     = mean relu(1 - D(feats_real)) + mean relu(1 + D(feats_fake.detach()))
    loss_g     = - mean D(feats_fake)

One step: `fake_pass`, then `heads_loss` and `student_loss` with the same fake features, then both
optimizers. One student forward and one teacher forward of the fake serve both losses; the gradients
equal those of separate forwards. Source: Sauer et al. 2024, Sec. 3.
"""
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ladd import flow
from ladd.discriminator import Discriminator
from ladd.mmdit import MMDiT


R1_SIGMA = 0.05      # size of R1's perturbation. Our choice


@dataclass(frozen=True)
class DistillConfig:
    """What one step computes.
    Levels are unshifted; `shift` is applied to the student's by `draw` and nowhere else."""
    levels: tuple[float, ...]      # of the student, noisiest first
    probs: tuple[float, ...]       # their probabilities after the warm-up
    easy_steps: int                # warm-up steps on the easier half of the levels
    shift: float                   # resolution shift of the student's levels
    d_mean: float                  # sigma_d ~ LogitNormal(d_mean, d_std), final values:
                                   # the shift is not applied again
    d_std: float
    misaligned: float              # share of the batch that also counts as fake
                                   # under a caption that does not fit
    r1_weight: float               # approximate R1 on the renoised real sample
    distill_weight: float          # the paper's distillation loss, 0 with synthetic data


class Text(NamedTuple):
    """What a network reads of a caption."""
    context: Tensor    # [b, l, context_dim]
    pooled: Tensor     # [b, pooled_dim]


class TextImage(NamedTuple):
    """What a network reads that edits or inpaints: Text, and channels of its own beside those of xt."""
    context: Tensor    # [b, l, context_dim]
    pooled: Tensor     # [b, pooled_dim]
    image: Tensor      # [b, c', h, w], zeros for none


class Draws(NamedTuple):
    """Every random number of one pass."""
    sigma_s: Tensor    # [b] student's level, shifted
    eps_s: Tensor      # [b, c, h, w]
    sigma_d: Tensor    # [b] level of the renoised fake
    eps_d: Tensor
    sigma_r: Tensor    # [b] level of the renoised real sample
    eps_r: Tensor
    eps_r1: Tensor | None    # direction of R1's perturbation, None without R1


class Wrong(NamedTuple):
    """Captions that do not fit: m samples of the batch count as fake under them too."""
    rows: Tensor       # [m] which samples
    text: Text         # [m, ...] the other captions, of a TextImage beside the sample's own image
    weight: Tensor     # [m] 1, or 0 where every caption fits the sample
    count: float       # sum of the weights, on average over the micro-batches and processes of a step


class Fake(NamedTuple):
    """One fake sample and its teacher features, graph attached."""
    x0_hat: Tensor         # [b, c, h, w]
    feats: list[Tensor]    # k x [b, l, d]
    target: Tensor | None  # the teacher's own x0 estimate of the renoised fake, for the distillation loss


def draw(x0: Tensor, step: int, config: DistillConfig, key: Sequence[int], first: int = 0,
         batch: int | None = None) -> Draws:
    """All random numbers of samples `first`, `first` + 1, ... of `batch` (default: x0 is the whole batch).

    Functions of `key` and of the sample's number alone, drawn on the CPU in fp32: devices agree, and however
    many processes or micro-batches share a batch, each sample keeps its noise.
    """
    n, part, g = batch or len(x0), slice(first, first + len(x0)), flow.generator(*key)
    probs = flow.student_probs(step, config.probs, config.easy_steps)
    sigma_s = flow.shift(flow.student_levels(n, config.levels, probs, g), config.shift)[part]
    sigma_d, sigma_r = (flow.logit_normal(n, config.d_mean, config.d_std, g)[part] for _ in range(2))
    count = 4 if config.r1_weight else 3                 # noise that no option uses is not drawn
    eps = torch.stack([torch.randn(count, *x0.shape[1:], generator=flow.generator(*key, i))
                       for i in range(first, first + len(x0))], 1)
    eps_s, eps_d, eps_r, *eps_r1 = eps.to(x0.device)
    sigma_s, sigma_d, sigma_r = (t.to(x0.device) for t in (sigma_s, sigma_d, sigma_r))
    return Draws(sigma_s, eps_s, sigma_d, eps_d, sigma_r, eps_r, eps_r1[0] if eps_r1 else None)


def grid_of(teacher: MMDiT, x: Tensor) -> tuple[int, int]:
    return x.shape[-2] // teacher.config.patch, x.shape[-1] // teacher.config.patch


def predict_x0(model: MMDiT, xt: Tensor, sigma: Tensor, text: Text) -> Tensor:
    """x0_hat = xt - sigma v, in fp32."""
    return flow.to_x0(xt, model(xt, sigma, *text), sigma)


def taps_of(teacher: MMDiT, heads: Discriminator, xt: Tensor, sigma: Tensor, text: Text) -> list[Tensor]:
    """The features that the heads read; the teacher stops at its last tap."""
    return teacher(xt, sigma, *text, taps=heads.config.taps, stop_at_last_tap=True)[1]


def fake_pass(student: MMDiT, teacher: MMDiT, heads: Discriminator, x0: Tensor, text: Text, draws: Draws,
              config: DistillConfig) -> Fake:
    """Student forward and the one teacher forward on its renoised prediction.
    No no_grad: the features carry the student's gradient."""
    x0_hat = predict_x0(student, flow.noised(x0, draws.eps_s, draws.sigma_s), draws.sigma_s, text)
    xt = flow.noised(x0_hat, draws.eps_d, draws.sigma_d)
    if not config.distill_weight:
        return Fake(x0_hat, taps_of(teacher, heads, xt, draws.sigma_d, text), None)
    v, feats = teacher(xt, draws.sigma_d, *text, taps=heads.config.taps)
    return Fake(x0_hat, feats,
                flow.to_x0(xt, v, draws.sigma_d).detach())    # detach: the target is no way into the student


def hinge_d(logits_real: Tensor, logits_fake: Tensor, logits_wrong: Tensor | None = None,
            weight: Tensor | None = None, count: float = 0.0) -> Tensor:
    """mean relu(1 - D(real)) + mean relu(1 + D(fake)), per token and head; the mean comes last.

    Logits [k, b, h, w]. logits_wrong [k, m, h, w] with `weight` [m] join the fakes; the mean over b + `count`
    samples makes the average over micro-batches that of the batch.
    """
    loss_fake = F.relu(1 + logits_fake).mean()
    if logits_wrong is not None:
        wrong = (F.relu(1 + logits_wrong).mean((0, 2, 3)) * weight).sum()
        loss_fake = (len(logits_fake[0]) * loss_fake + wrong) / (len(logits_fake[0]) + count)
    return F.relu(1 - logits_real).mean() + loss_fake


def heads_loss(teacher: MMDiT, heads: Discriminator, x0: Tensor, text: Text, wrong: Wrong | None,
               fake_feats: list[Tensor], draws: Draws,
               config: DistillConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss_d, stats): hinge of real against fake and misaligned, plus approximate R1. Moves only the heads.

    What needs no gradient goes through the teacher in one pass: the real samples, those of `wrong` under
    their other captions, and R1's perturbed ones.
    stats: detached tensors `logits_real`, `logits_fake` [k, b, h, w], `logits_misaligned` or None,
    and `loss_r1`.
    """
    grid, b = grid_of(teacher, x0), len(x0)
    xt, sigma = flow.noised(x0, draws.eps_r, draws.sigma_r), draws.sigma_r
    passes, read = [(xt, sigma, *text)], [(sigma, text.pooled)]         # through the teacher; by the heads
    if wrong is not None:
        passes.append((xt[wrong.rows], sigma[wrong.rows], *wrong.text))
        read.append((sigma[wrong.rows], wrong.text.pooled))
    if config.r1_weight:
        # the RENOISED sample is perturbed, at the same level:
        # ||D(xt) - D(xt + R1_SIGMA n)||^2 (Lin et al. 2025, Sec. 3.3)
        passes.append((xt + R1_SIGMA * draws.eps_r1, sigma, *text))
        read.append((sigma, text.pooled))
    together = [torch.cat(parts) for parts in zip(*passes)]
    with torch.no_grad():                                                       # real features need no graph
        feats = taps_of(teacher, heads, *together[:2], type(text)(*together[2:]))
    logits = heads(feats, *(torch.cat(parts) for parts in zip(*read)), grid)
    logits_real, logits_wrong = logits[:, :b], None
    if wrong is not None:
        logits_wrong = logits[:, b:b + len(wrong.rows)]
    logits_fake = heads([f.detach() for f in fake_feats],         # detach: D must not move the student
                        draws.sigma_d, text.pooled, grid)
    loss = hinge_d(logits_real, logits_fake, *(() if wrong is None else
                                               (logits_wrong, wrong.weight, wrong.count)))
    loss_r1 = torch.zeros((), device=x0.device)
    if config.r1_weight:
        loss_r1 = (logits[:, -b:] - logits_real).square().mean()
        loss = loss + config.r1_weight * loss_r1
    return loss, {"logits_real": logits_real.detach(), "logits_fake": logits_fake.detach(),
                  "logits_misaligned": None if logits_wrong is None else logits_wrong.detach(),
                  "loss_r1": loss_r1.detach()}


def student_loss(heads: Discriminator, text: Text, fake: Fake, draws: Draws, config: DistillConfig,
                 grid: tuple[int, int]) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, stats) of the student step: - mean D(feats_fake),
    plus the distillation loss where it is asked for.

    The distillation loss is (1 - sigma_d) |x0_hat - teacher's x0 estimate|^2, the weight that ADD calls
    exponential (Sauer et al. 2023, Sec. 3.3, c(t) = alpha_t). The heads' parameters are detached: they get no
    gradient, and a fused kernel that sees this computes none.
    """
    frozen = {name: p.detach() for name, p in heads.named_parameters()}
    logits = torch.func.functional_call(heads, frozen, (fake.feats, draws.sigma_d, text.pooled, grid))
    loss_g = -logits.mean()
    loss_distill = torch.zeros((), device=logits.device)
    if config.distill_weight:
        weight = 1 - flow.per_sample(draws.sigma_d, fake.x0_hat)
        loss_distill = (weight * (fake.x0_hat - fake.target).square()).mean()
    return (loss_g + config.distill_weight * loss_distill,
            {"loss_g": loss_g.detach(), "loss_distill": loss_distill.detach(),
             "logits_fake_g": logits.detach()})


def flow_loss(model: MMDiT, x0: Tensor, eps: Tensor, sigma: Tensor, text: Text) -> Tensor:
    """The teacher's own training loss, per sample [b]: mean |v - (eps - x0)|^2
    (Esser et al. 2024, Eq. 2 with their weight 1)."""
    v = model(flow.noised(x0, eps, sigma), sigma, *text)
    return (v - flow.velocity(x0, eps)).square().flatten(1).mean(1)
