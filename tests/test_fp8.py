"""fp8 products: rounding errors of the stated size, the gradient to the input, which layers are
replaced."""
import pytest
import torch
from conftest import assert_close, rng, tiny, tiny_inputs

from ladd.core import lora
from ladd.core.mmdit import Linear
from ladd.engine.fp8 import Fp8Linear, in_fp8, quantised


def layer(n: int = 48, k: int = 32) -> Linear:
    torch.manual_seed(0)
    out = Linear(k, n).bfloat16()
    # channels of very different sizes
    out.weight.data *= torch.logspace(-2, 2, n)[:, None].bfloat16()
    return out


def test_rows_are_scaled_by_their_largest_entry():
    x = torch.randn(5, 32, generator=rng()).bfloat16() * torch.tensor([1e-3, 1.0, 50.0, 1e4,
                                                                       0.0])[:, None]
    q, s = quantised(x.bfloat16())
    assert q.dtype == torch.float8_e4m3fn and s.shape == (5, 1) and s.dtype == torch.float32
    assert q[:4].float().abs().amax(1).tolist() == [448.0] * 4 and not q[4].float().any()
    error = (q.float() * s - x.float()).abs()
    # e4m3 has 3 bits after the point: half of the last is 1/16, and 2^-10 of the scale below its
    # normal range
    assert (error <= x.float().abs() / 16 + s * 2 ** -9).all() and (error[:4] > 0).any()


def test_products_are_those_of_the_rounded_operands():
    """Forward and gradient, against fp64 products of operands rounded by hand, to bf16's
    rounding."""
    lin = layer()
    fp8, x = Fp8Linear(lin), torch.randn(2, 3, 32, generator=rng(1)).bfloat16().requires_grad_()
    y = fp8(x)
    g = torch.randn(y.shape, generator=rng(2)).bfloat16()
    dx, = torch.autograd.grad(y, x, g)

    def rounded(t, dim):
        s = t.double().abs().amax(dim, keepdim=True) / 448
        return (t.double() / s).float().to(torch.float8_e4m3fn).double() * s
    w = lin.weight.detach()
    expected = rounded(x.detach(), -1) @ rounded(w, 1).T
    assert_close("y", y.detach().double(), expected + lin.bias.detach().double(), 1e-2)
    assert_close("dx", dx.double(), rounded(g, -1) @ rounded(w, 0), 1e-2)
    exact = x.detach().double() @ w.double().T
    error = y.detach().double() - lin.bias.double() - exact
    # each channel by itself: scales a channel
    error = error.norm(dim=(0, 1)) / exact.norm(dim=(0, 1))
    assert 0.01 < error.mean() < 0.06
    assert y.dtype == dx.dtype == torch.bfloat16 and dx.shape == x.shape


def test_nothing_is_kept_and_no_weight_gets_a_gradient():
    fp8, x, kept = Fp8Linear(layer()), torch.randn(4, 32).bfloat16().requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        fp8(x)
    assert {t.data_ptr() for t in kept} == {fp8.q_t.data_ptr(), fp8.s_t.data_ptr()}
    assert not list(fp8.parameters())


def frozen():
    return tiny("dual", torch.bfloat16).requires_grad_(False)


def test_a_network_in_fp8_stays_near_itself_and_its_gradient_too():
    model, (x, sigma, context, pooled) = frozen(), tiny_inputs(dtype=torch.float32)
    x.requires_grad_()
    found = []
    for network in (model, in_fp8(frozen())):
        feats = network(x, sigma, context, pooled, taps=(0, 1), stop_at_last_tap=True)[1]
        dx, = torch.autograd.grad(sum(f.float().square().mean() for f in feats), x)
        found.append([*(f.detach().float() for f in feats), dx])
    for a, b in zip(*found):
        error = float((a - b).norm() / a.norm())
        assert 1e-3 < error < 0.1
    names = {type(m).__name__: 0 for m in network.modules()}
    for m in network.modules():
        names[type(m).__name__] += 1
    # 3 blocks: image qkv, proj, fc1, fc2; text the same but for the last, with qkv alone; 2 second
    # attentions
    assert names["Fp8Linear"] == 3 * 4 + 2 * 4 + 1 + 2 * 2
    assert all(isinstance(b.x_block.adaLN_modulation[1], Linear) for b in network.joint_blocks)


def test_what_trains_or_computes_in_fp32_is_refused():
    with pytest.raises(ValueError, match="fp8: the network must be frozen and compute in bf16 "
                       r"\(got torch.float32, trainable weights False"):
        in_fp8(tiny(dtype=torch.float32).requires_grad_(False))
    with pytest.raises(ValueError, match=r"\(got torch.bfloat16, trainable weights True\)"):
        in_fp8(tiny(dtype=torch.bfloat16))
    model = frozen()
    lora.add(model, 2, 2.0, lora.ALL, rng())
    with pytest.raises(ValueError, match="fp8: the network has a LoRA; merge it first"):
        in_fp8(model.requires_grad_(False))


def test_a_block_in_fp8_compiles_whole():
    block = in_fp8(frozen()).joint_blocks[0]
    sizes = (2, 15, 128), (2, 5, 128), (2, 128)
    x_img, x_txt, cond = (torch.randn(s, generator=rng(3)).bfloat16() for s in sizes)
    x_img.requires_grad_()
    outs = []
    for f in (block, torch.compile(block, fullgraph=True, backend="aot_eager")):
        y = f(x_img, x_txt, cond, True)[0]
        outs.append((y.detach(), torch.autograd.grad(y.float().square().sum(), x_img)[0]))
    for a, b in zip(*outs):
        assert torch.equal(a, b)
