"""Schedule algebra and noise-level samplers: identities, exact end points, quantiles with 1e5
draws."""
import math
from collections import Counter
from statistics import NormalDist

import pytest
import torch
from conftest import assert_close, rng

from ladd.core import flow

N = 100_000
LEVELS, PROBS = (1.0, 0.75, 0.5, 0.25), (0.7, 0.1, 0.1, 0.1)
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
SHAPE = (4, 3, 2, 6)


def pair(dtype=torch.float64):
    return torch.randn(SHAPE, generator=rng(1)).to(dtype), torch.randn(SHAPE,
                                                                       generator=rng(2)).to(dtype)


def logit_normal_quantiles(mean: float) -> torch.Tensor:
    return torch.tensor([1 / (1 + math.exp(-NormalDist(mean).inv_cdf(q))) for q in QUANTILES])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_noised_is_exact_at_both_ends(dtype):
    x0, eps = pair(dtype)
    xt = flow.noised(x0, eps, torch.tensor([0.0, 1.0, 0.0, 1.0]))
    assert torch.equal(xt[::2], x0[::2]) and torch.equal(xt[1::2], eps[1::2]) and xt.dtype == dtype


def test_noised_takes_each_sample_at_its_own_level():
    x0, eps = pair()
    sigma = torch.tensor([0.1, 0.35, 0.6, 0.85], dtype=torch.float64)
    xt = flow.noised(x0, eps, sigma)
    for i, s in enumerate(sigma.tolist()):
        assert_close(f"sample {i}", xt[i], (1 - s) * x0[i] + s * eps[i])


def test_velocity_and_x0_round_trip():
    x0, eps = pair()
    sigma = torch.tensor([0.0, 0.3, 0.8, 1.0], dtype=torch.float64)
    xt, v = flow.noised(x0, eps, sigma), flow.velocity(x0, eps)
    assert torch.equal(v, eps - x0)
    assert_close("x0", flow.to_x0(xt, v, sigma), x0)
    ahead = flow.noised(x0, eps, sigma + 1e-3)                       # v is d xt / d sigma
    assert_close("derivative", (ahead - xt) / 1e-3, v, 1e-11)


def test_shift_adds_ln_a_to_the_logit_and_keeps_the_ends():
    sigma = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    for a in (1.0, 1.7, 3.0, 6.0):
        assert_close(f"a = {a}", torch.logit(flow.shift(sigma, a)), torch.logit(sigma)
                     + math.log(a))
        assert flow.shift(torch.tensor([0.0, 1.0]), a).tolist() == [0, 1]
    assert_close("shift 3", flow.shift(torch.tensor(LEVELS), 3.0),
                 torch.tensor([1, 0.9, 0.75, 0.5]), 1e-6)
    assert torch.equal(flow.shift(sigma, 1.0), sigma)


@pytest.mark.parametrize("mean", [0.0, 1.0, -0.5])
def test_logit_normal_quantiles(mean):
    sigma = flow.logit_normal(N, (mean,), rng())
    assert sigma.shape == (N,) and sigma.dtype == torch.float32
    assert sigma.min() > 0 and sigma.max() < 1
    error = sigma.quantile(torch.tensor(QUANTILES)) - logit_normal_quantiles(mean)
    assert error.abs().max() < 5e-3


def test_logit_normal_mixture_has_equal_strata():
    means = (0.0, 1.3, -1.0)
    sigma = flow.logit_normal(N, means, rng())
    assert sigma.shape == (N,)
    for i, mean in enumerate(means):
        got = sigma[i::3].quantile(torch.tensor(QUANTILES))
        assert (got - logit_normal_quantiles(mean)).abs().max() < 8e-3, f"stratum {i}"


def test_student_levels_have_the_stated_frequencies():
    found = Counter(flow.student_levels(N, LEVELS, PROBS, rng()).tolist())
    assert set(found) == set(LEVELS)
    assert all(abs(found[level] / N - p) < 5e-3 for level, p in zip(LEVELS, PROBS))


def test_student_warm_up_takes_the_easier_half_first():
    assert flow.student_probs(0, PROBS, 500) == flow.student_probs(499, PROBS, 500) == (0, 0, 0.5,
                                                                                        0.5)
    assert flow.student_probs(500, PROBS, 500) == flow.student_probs(0, PROBS, 0) == PROBS
    assert flow.student_probs(0, (0.5, 0.3, 0.2), 1) == (0, 0.5, 0.5)
    # a single level has no easier half
    assert flow.student_probs(0, (1.0,), 1) == (1,)
    found = Counter(flow.student_levels(N, LEVELS, flow.student_probs(0, PROBS, 500),
                                        rng()).tolist())
    assert set(found) == {0.5, 0.25} and abs(found[0.5] / N - 0.5) < 5e-3


def test_euler_levels():
    for steps in (1, 2, 3, 7, 50):
        for a in (1.0, 1.7, 3.0):
            s = flow.euler_sigmas(steps, a)
            assert s.shape == (steps + 1,) and s[0] == 1 and s[-1] == 0 and (s.diff() < 0).all()
    assert_close("4 steps", flow.euler_sigmas(4), torch.tensor([*LEVELS, 0]), 1e-7)
    assert_close("4 steps, shift 3", flow.euler_sigmas(4, 3.0),
                 torch.tensor([1, 0.9, 0.75, 0.5, 0]), 1e-6)


@pytest.mark.parametrize("draw", [lambda g: flow.logit_normal(9, (1.0,), g),
                                  lambda g: flow.logit_normal(9, (0.0, 1.3), g),
                                  lambda g: flow.student_levels(9, LEVELS, (0.25,) * 4, g)],
                         ids=["logit_normal", "mixture", "student_levels"])
def test_draws_depend_on_the_generator_alone(draw):
    torch.manual_seed(1)
    first = draw(rng(3))
    torch.manual_seed(2)
    assert torch.equal(draw(rng(3)), first) and not torch.equal(draw(rng(4)), first)


def test_euler_integrates_a_linear_field_exactly():
    x0, eps = pair()
    sigmas = flow.euler_sigmas(5, 2.0).double()
    x = eps
    # v is constant on the whole line
    for now, then in zip(sigmas, sigmas[1:]):
        x = x + (then - now) * flow.velocity(x0, eps)
        assert_close(f"at {then:.3f}", x, flow.noised(x0, eps, then.expand(4)))
