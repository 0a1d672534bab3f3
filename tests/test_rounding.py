"""The references that round, which tests on a GPU compare with: the project's own where nothing is
rounded, and rounded at each place that they name."""
import pytest
import rounding
import torch
from conftest import assert_close, rng
from test_kernels import head_inputs, randn
from torch import Tensor

from kernels import attention, heads

SHAPES = dict(k=2, b=2, h=4, w=5, d=24, c=32)


def attention_leaves() -> list[Tensor]:
    return [randn(2, 5, 3, 2, 16, seed=1), randn(2, 7, 3, 2, 16, seed=2),
            *(1 + .3 * randn(16, seed=3 + i) for i in range(4))]


def attend(function, *rest):
    return lambda txt, img, *w: function(txt, img, w[:2], w[2:], *rest)


def head_leaves() -> list[Tensor]:
    feats, params, cond, _ = head_inputs(**SHAPES)
    return [*feats, *params, cond]


def judge(function, *rest):
    k, grid = SHAPES["k"], (SHAPES["h"], SHAPES["w"])
    return lambda *t: function(list(t[:k]), heads.HeadParams(*t[k:-1]), t[-1], grid, *rest)


CASES = {"attention": (attend, attention.reference_joint_attention, rounding.joint_attention,
                       attention_leaves),
         "heads": (judge, heads.reference_discriminator_heads, rounding.discriminator_heads,
                   head_leaves)}


def both_ways(function, tensors: list[Tensor]) -> list[Tensor]:
    """Outputs and gradients of all tensors."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = function(*leaves)
    out = list(out) if isinstance(out, tuple) else [out]
    up = [torch.randn(o.shape, generator=rng(9), dtype=o.dtype) for o in out]
    return [*(o.detach() for o in out), *torch.autograd.grad(out, leaves, up)]


@pytest.mark.parametrize("name", CASES)
def test_without_rounding_they_are_the_references(name):
    run, reference, rounded, leaves = CASES[name]
    expected = both_ways(run(reference), leaves())
    found = both_ways(run(rounded, torch.float64), leaves())
    for i, (a, e) in enumerate(zip(found, expected, strict=True)):
        assert_close(f"tensor {i}", a, e)


def test_values_and_gradients_are_rounded_apart():
    x = torch.tensor([1 + 2 ** -9, 3.0]).double().requires_grad_()
    up = torch.tensor([1 + 2 ** -9, -5.0]).double()
    value = rounding.stored(x, torch.bfloat16)
    gradient = rounding.gradient_stored(x * 1, torch.bfloat16)
    assert value.tolist() == [1, 3] and torch.equal(gradient, x)
    assert torch.equal(torch.autograd.grad(value, x, up)[0], up)
    assert torch.autograd.grad(gradient, x, up)[0].tolist() == [1, -5]


@pytest.mark.parametrize("name, values, gradients", [("attention", 4, 0), ("heads", 5, 2)])
def test_what_the_kernels_store_is_rounded(monkeypatch, name, values, gradients):
    """Prepared q and k of both streams; weights of products, u, v, y, the gradients of u and v."""
    counts = {"stored": 0, "gradient_stored": 0}
    for function in counts:
        def counted(x, dtype, function=function, plain=getattr(rounding, function)):
            counts[function] += 1
            assert dtype == torch.bfloat16
            return plain(x, dtype)
        monkeypatch.setattr(rounding, function, counted)
    run, _, rounded, leaves = CASES[name]
    run(rounded, torch.bfloat16)(*leaves())
    assert counts == {"stored": values, "gradient_stored": gradients}
