"""The algebra of rectified flow and the distributions of noise levels, as pure functions.

sigma is the noise level in [0, 1]: 0 is the clean latent x0, 1 is Gaussian noise eps.
Source: Esser et al. 2024 (SD3), Sec. 2-3.
"""
import hashlib

import torch
from torch import Tensor


def generator(*key) -> torch.Generator:
    """Return a generator on the CPU that is a function of `key` (numbers, strings, tuples) alone.

    What a step draws from it needs no saved state and is the same on every machine. Keys of
    noise and weights begin with the run's seed and the number of a purpose: 1 the teacher's
    training, 2 steps of LADD and of consistency distillation, 3 calibration of the heads,
    7 preferences, 8 a LoRA's matrices. The order of batches has (seed, epoch), and with a size the
    order of its samples.
    """
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def per_sample(sigma: Tensor, x: Tensor) -> Tensor:
    """Return sigma [b] in the dtype of x, shaped to broadcast over x [b, ...]."""
    return sigma.to(x.dtype).view(-1, *[1] * (x.ndim - 1))


def noised(x0: Tensor, eps: Tensor, sigma: Tensor) -> Tensor:
    """Return xt = (1 - sigma) x0 + sigma eps, exact at 0 and 1; x0, eps [b, ...], sigma [b]."""
    s = per_sample(sigma, x0)
    return (1 - s) * x0 + s * eps


def velocity(x0: Tensor, eps: Tensor) -> Tensor:
    """Return v = d xt / d sigma = eps - x0, what the networks predict."""
    return eps - x0


def to_x0(xt: Tensor, v: Tensor, sigma: Tensor) -> Tensor:
    """Return x0_hat = xt - sigma v."""
    return xt - per_sample(sigma, xt) * v


def shift(sigma: Tensor, a: float) -> Tensor:
    """Return the shifted level sigma' = a sigma / (1 + (a - 1) sigma) (SD3, Eq. 23).

    That is logit(sigma') = logit(sigma) + ln a. All shifts go through this function; options and
    checkpoint headers hold levels before the shift.
    """
    return a * sigma / (1 + (a - 1) * sigma)


def logit_normal(n: int, means: tuple[float, ...], generator: torch.Generator) -> Tensor:
    """Return n levels on the CPU in fp32, level i sigmoid(u), u ~ N(means[i mod len(means)], 1).

    That is the logit-normal of SD3, Sec. 3.1, or a stratified mixture of several with equal parts
    (our choice). LADD renoises with mean 1 (Sec. 3.2).
    """
    centres = torch.tensor(means).repeat(-(-n // len(means)))[:n]
    return torch.sigmoid(centres + torch.randn(n, generator=generator))


def student_levels(n: int, levels: tuple[float, ...], probs: tuple[float, ...],
                   generator: torch.Generator) -> Tensor:
    """Return n unshifted levels drawn from `levels` with probabilities `probs`.

    LADD takes {1, 0.75, 0.5, 0.25} with [0.7, 0.1, 0.1, 0.1] (Sec. 4).
    """
    drawn = torch.multinomial(torch.tensor(probs), n, replacement=True, generator=generator)
    return torch.tensor(levels)[drawn]


def student_probs(step: int, probs: tuple[float, ...], easy_steps: int) -> tuple[float, ...]:
    """Return the probabilities of the levels, largest level first, at `step` (LADD, Sec. 4).

    In the first `easy_steps` they are uniform over the easier half, the levels of low noise.
    """
    if step >= easy_steps:
        return probs
    hard = len(probs) // 2
    easy = len(probs) - hard
    return (0.0,) * hard + (1 / easy,) * easy


def euler_sigmas(steps: int, a: float = 1.0) -> Tensor:
    """Return steps + 1 final levels from 1 to 0, both exact, evenly spaced before the shift `a`."""
    return shift(torch.linspace(1, 0, steps + 1), a)
