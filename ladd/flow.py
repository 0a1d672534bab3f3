"""Schedule algebra of rectified flow and the samplers of noise levels. Pure functions.

sigma is the noise level in [0, 1]: 0 is the clean latent x0, 1 is Gaussian noise eps.
Source: Esser et al. 2024 (SD3), Sec. 2-3.
"""
import hashlib

import torch
from torch import Tensor


def generator(*key) -> torch.Generator:
    """A generator on the CPU that is a function of `key`, numbers and tuples of them: what is drawn in a step
    needs no saved state, and is the same on every machine."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def per_sample(sigma: Tensor, x: Tensor) -> Tensor:
    """sigma [b] shaped to broadcast over x [b, ...]."""
    return sigma.to(x.dtype).view(-1, *[1] * (x.ndim - 1))


def noised(x0: Tensor, eps: Tensor, sigma: Tensor) -> Tensor:
    """xt = (1 - sigma) x0 + sigma eps; exact at sigma 0 and 1. x0, eps [b, ...]; sigma [b]."""
    s = per_sample(sigma, x0)
    return (1 - s) * x0 + s * eps


def velocity(x0: Tensor, eps: Tensor) -> Tensor:
    """v = d xt / d sigma = eps - x0, what the networks predict."""
    return eps - x0


def to_x0(xt: Tensor, v: Tensor, sigma: Tensor) -> Tensor:
    """x0_hat = xt - sigma v."""
    return xt - per_sample(sigma, xt) * v


def shift(sigma: Tensor, a: float) -> Tensor:
    """Resolution shift sigma' = a sigma / (1 + (a - 1) sigma),
    i.e. logit(sigma') = logit(sigma) + ln a (SD3, Eq. 23).

    The only place where a shift is applied: configurations and checkpoints hold unshifted levels.
    """
    return a * sigma / (1 + (a - 1) * sigma)


def logit_normal(n: int, mean: float, std: float, generator: torch.Generator) -> Tensor:
    """n levels sigmoid(u), u ~ N(mean, std^2), on the CPU in fp32
    (SD3, Sec. 3.1; LADD, Sec. 3.2 uses (1, 1) for the renoising)."""
    return torch.sigmoid(mean + std * torch.randn(n, generator=generator))


def logit_normal_mixture(n: int, means: tuple[float, ...], std: float, generator: torch.Generator) -> Tensor:
    """n levels, sample i from LogitNormal(means[i mod len], std):
    a stratified mixture with equal parts (our choice)."""
    centres = torch.tensor(means).repeat(-(-n // len(means)))[:n]
    return torch.sigmoid(centres + std * torch.randn(n, generator=generator))


def student_levels(n: int, levels: tuple[float, ...], probs: tuple[float, ...],
                   generator: torch.Generator) -> Tensor:
    """n unshifted levels drawn from `levels` with probabilities `probs`
    (LADD: {1, .75, .5, .25} with [.7, .1, .1, .1])."""
    return torch.tensor(levels)[torch.multinomial(torch.tensor(probs), n, replacement=True,
                                                  generator=generator)]


def student_probs(step: int, probs: tuple[float, ...], warmup_steps: int) -> tuple[float, ...]:
    """The level probabilities at `step`: uniform over the easier half (low noise) first,
    then `probs` (LADD, Sec. 4)."""
    half = len(probs) // 2
    return (0.0,) * half + (1 / (len(probs) - half),) * (len(probs) - half) if step < warmup_steps else probs


def euler_levels(steps: int, a: float = 1.0) -> Tensor:
    """steps + 1 levels from 1 to 0, evenly spaced before the shift by `a`; fp32, exact at both ends."""
    return shift(torch.linspace(1, 0, steps + 1), a)
