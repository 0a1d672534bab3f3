"""The heads against naive convolutions with every gradient; independence, calibration, learning."""
import pytest
import torch
import torch.nn.functional as F
from conftest import assert_close, randomise, rng
from test_kernels import head_inputs
from torch import Tensor

import kernels
from kernels import heads as heads_file
from kernels.heads import HeadParams, reference_discriminator_heads
from ladd.core.discriminator import Discriminator, DiscriminatorConfig, channel_moments
from ladd.core.losses import hinge_d
from ladd.core.mmdit import sinusoid

CONFIG = DiscriminatorConfig(taps=(0, 2, 5), feat_dim=24, pooled_dim=10, width=32, cond_dim=12)
GRID = (3, 5)


def naive_heads(feats: list[Tensor], p: HeadParams, cond: Tensor, grid: tuple[int, int]) -> Tensor:
    """Head by head, sample by sample, with torch's own convolution and group norm on [1, c, h,
    w]."""
    logits = []
    for k, f in enumerate(feats):
        groups, c = p.w_in.shape[2] // 16, p.w_in.shape[2]
        rows = []
        for i in range(f.shape[0]):
            x = f[i].T.reshape(1, -1, *grid)
            y = F.conv2d(x, p.w_in[k].T[:, :, None, None], p.b_in[k])
            y = F.leaky_relu(F.group_norm(y, groups, p.gamma1[k], p.beta1[k], 1e-5), 0.2)
            z = F.conv2d(y, p.w_conv[k].permute(3, 2, 0, 1), p.b_conv[k], padding=1)
            z = F.leaky_relu(F.group_norm(z, groups, p.gamma2[k], p.beta2[k], 1e-5), 0.2)
            z = (y + z) / 2 ** 0.5
            readout = p.w_out[k] + p.w_cond[k].T @ cond[i]
            rows.append((z[0] * readout[:, None, None]).sum(0) / c ** 0.5 + p.b_out[k])
        logits.append(torch.stack(rows))
    return torch.stack(logits)


def make(dtype=torch.float32, seed: int = 0) -> Discriminator:
    torch.manual_seed(seed)
    return randomise(Discriminator(CONFIG, kernels.load("torch")), seed).to(dtype)


def inputs(b: int = 3, dtype=torch.float32) -> tuple[list[Tensor], Tensor, Tensor]:
    """(feats, sigma_d, pooled); the features' offset and scale differ between channels, as real
    ones do."""
    g = rng(1)
    scale, offset = 5 * torch.rand(3, 24, generator=g), torch.randn(3, 24, generator=g)
    feats = [(torch.randn(b, 15, 24, generator=g) * s + o).to(dtype) for s, o in zip(scale, offset)]
    return feats, torch.rand(b, generator=g).to(dtype), torch.randn(b, 10, generator=g).to(dtype)


@pytest.mark.parametrize("h, w", [(3, 5), (5, 3), (1, 1), (1, 7)])
def test_batched_heads_equal_naive_ones_with_every_gradient(h, w):
    feats, params, cond, grid = head_inputs(h=h, w=w)
    leaves = [t.requires_grad_() for t in (*feats, *params, cond)]
    logits = [f(feats, params, cond, grid) for f in (reference_discriminator_heads, naive_heads)]
    assert_close("logits", *logits)
    weight = torch.randn(logits[0].shape, generator=rng(5), dtype=torch.float64)
    grads = [torch.autograd.grad((y * weight).sum(), leaves) for y in logits]
    for name, a, e in zip((*(f"feats {i}" for i in range(len(feats))), *HeadParams._fields, "cond"),
                          *grads):
        # one token: a group has 16 values, its conv bias meets gradients that cancel down to
        # rounding
        assert (a - e).abs().max() <= 1e-10 * e.abs().max() + 1e-13, name


@pytest.mark.parametrize("h, w", [(3, 5), (1, 1), (1, 7)])
def test_the_product_of_patches_equals_the_convolution(h, w):
    """The reference takes the first on a GPU, the second on the CPU."""
    g = rng(3)
    leaves = [torch.randn(shape, generator=g, dtype=torch.float64, requires_grad=True)
              for shape in ((2, 3, h, w, 16), (2, 3, 3, 16, 16), (2, 16))]
    out = [f(*leaves) for f in (heads_file._by_patches, heads_file._by_convolution)]
    assert_close("convolution", *out)
    weight = torch.randn(out[0].shape, generator=g, dtype=torch.float64)
    grads = [torch.autograd.grad((y * weight).sum(), leaves) for y in out]
    for name, a, e in zip(("y", "weight", "bias"), *grads):
        assert_close(name, a, e)


def test_heads_pass_gradcheck():
    feats, params, cond, grid = head_inputs(b=2, h=2, w=3, d=5, c=16, e=3)
    leaves = [t.requires_grad_() for t in (*feats, *params, cond)]

    def logits(*t):
        return reference_discriminator_heads(list(t[:2]), HeadParams(*t[2:13]), t[13], grid)
    assert torch.autograd.gradcheck(logits, leaves, fast_mode=True)


def test_discriminator_standardises_conditions_and_reads():
    """The module is: standardised features, the embedded condition, the naive heads."""
    heads, (feats, sigma, pooled) = make(), inputs()
    w = {name: t.double() for name, t in heads.state_dict().items()}
    level = F.silu(sinusoid(sigma.double()) @ w["level_embedder.0.weight"].T
                   + w["level_embedder.0.bias"])
    level = level @ w["level_embedder.2.weight"].T + w["level_embedder.2.bias"]
    cond = F.silu(level + pooled.double() @ w["text_embedder.weight"].T + w["text_embedder.bias"])
    heads.calibrate(channel_moments(feats))
    wide = [f.double() for f in feats]
    standard = [(f - f.mean((0, 1))) / f.flatten(0, 1).std(0, correction=0) for f in wide]
    expected = naive_heads(standard, HeadParams(*(w[name] for name in HeadParams._fields)), cond,
                           GRID)
    logits = heads(feats, sigma, pooled, GRID)
    assert logits.shape == (3, 3, *GRID) and logits.dtype == torch.float32
    assert_close("logits", logits, expected.float())


def test_calibrate_standardises_every_channel():
    heads, (feats, _, _) = make(), inputs()
    # a constant channel: no division by zero
    feats[1][..., 3] = 7.0
    heads.calibrate(channel_moments(feats))
    for i, f in enumerate(feats):
        standard = (f - heads.feat_mean[i]) / heads.feat_std[i].T
        assert standard.mean((0, 1)).abs().max() < 1e-4
        live = [j for j in range(24) if (i, j) != (1, 3)]
        assert (standard.flatten(0, 1).std(0, correction=0)[live] - 1).abs().max() < 1e-4
    assert heads(feats, *inputs()[1:], GRID).isfinite().all()
    assert not any(name.startswith("feat_") for name, _ in heads.named_parameters())
    assert {"feat_mean", "feat_std"} <= set(heads.state_dict())      # a checkpoint carries them


def test_scaling_and_shifting_the_features_changes_nothing_after_calibration():
    feats, sigma, pooled = inputs()
    moved = [f * torch.logspace(-1, 2, 24) + torch.linspace(-9, 9, 24) for f in feats]
    heads, other = make(), make()
    heads.calibrate(channel_moments(feats)), other.calibrate(channel_moments(moved))
    # fp32 and |mean| / std up to 90: the folded mean costs two digits
    assert_close("logits", other(moved, sigma, pooled, GRID), heads(feats, sigma, pooled, GRID),
                 1e-3)


def test_a_logit_does_not_depend_on_batch_mates():
    feats, params, cond, grid = head_inputs(b=4)
    together = reference_discriminator_heads(feats, params, cond, grid)
    rows = [slice(i, i + 1) for i in range(4)]
    alone = [reference_discriminator_heads([f[r] for f in feats], params, cond[r], grid) for r
             in rows]
    assert_close("logits", together, torch.cat(alone, 1))


def test_heads_are_independent():
    heads, (feats, sigma, pooled) = make(), inputs()
    leaves = [f.requires_grad_() for f in feats]
    logits = heads(leaves, sigma, pooled, GRID)
    assert logits[0].std() > 0.1
    for k in range(3):
        grads = torch.autograd.grad(logits[k].square().sum(), leaves, retain_graph=True,
                                    allow_unused=True)
        assert [g is not None and bool(g.any()) for g in grads] == [i == k for i in range(3)]
        for name in HeadParams._fields:
            grad = torch.autograd.grad(logits[k].square().sum(), getattr(heads, name),
                                       retain_graph=True)[0]
            assert [bool(grad[i].any()) for i in range(3)] == [i == k for i in range(3)], name


@pytest.mark.parametrize("what", ["sigma_d", "pooled"])
def test_the_condition_reaches_every_head_and_its_own_sample_only(what):
    heads, (feats, sigma, pooled) = make(), inputs()
    before = heads(feats, sigma, pooled, GRID)
    sigma, pooled = sigma.clone(), pooled.clone()
    if what == "pooled":
        pooled[1] = -pooled[1]
    else:
        sigma[1] = 1 - sigma[1]
    moved = (heads(feats, sigma, pooled, GRID) - before).abs().amax((2, 3))    # [k, b]
    assert (moved[:, 1] > 1e-2).all() and not moved[:, ::2].any()


def test_all_parameters_learn():
    heads, (feats, sigma, pooled) = make(), inputs()
    heads(feats, sigma, pooled, GRID).square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in heads.parameters())


def test_bf16_features_meet_bf16_weights_without_an_offset():
    """A kernel rounds w_in to the features' dtype; a mean folded with other weights leaves (mean W
    - mean W rounded), which for channels of large mean and small deviation is larger than the
    signal."""
    heads, (feats, sigma, pooled) = make(), inputs()
    heads.feat_mean += 100
    seen = []
    ops = heads.kernels._replace(discriminator_heads=lambda f, params, *rest: seen.append(params))
    heads.kernels = ops
    heads([f.bfloat16() for f in feats], sigma, pooled, GRID)
    w_in = seen[0].w_in
    assert torch.equal(w_in, w_in.bfloat16().float())
    assert not torch.equal(w_in, heads.w_in / heads.feat_std)
    assert_close("bias", seen[0].b_in + (heads.feat_mean @ w_in).squeeze(1), heads.b_in, 1e-3)
    seen.clear(), heads(feats, sigma, pooled, GRID)
    assert torch.equal(seen[0].w_in, heads.w_in / heads.feat_std)


def separation(seed: int, steps: int) -> tuple[float, float]:
    """(share of active hinge margins, accuracy) of new heads after so many steps on two fixed
    sets."""
    torch.manual_seed(seed)
    heads = Discriminator(CONFIG, kernels.load("torch"))
    scale, gap = torch.rand(24) * 10, 0.2 * torch.randn(24)
    real, fake = ([scale * (torch.randn(8, 15, 24) + offset) for _ in CONFIG.taps] for offset
                  in (0, gap))
    sigma, pooled = torch.rand(8), torch.randn(8, 10)
    heads.calibrate(channel_moments(real))
    optimizer = torch.optim.AdamW(heads.parameters(), lr=1e-3, betas=(0.0, 0.95))
    for _ in range(steps):
        optimizer.zero_grad()
        hinge_d(heads(real, sigma, pooled, GRID), heads(fake, sigma, pooled, GRID)).backward()
        optimizer.step()
    with torch.no_grad():
        signed = torch.cat([heads(real, sigma, pooled, GRID), -heads(fake, sigma, pooled, GRID)])
    return (signed < 1).float().mean().item(), (signed > 0).float().mean().item()


def test_heads_separate_two_fixed_sets_in_50_steps():
    """10 seeds end at .06 at most and .998 at least; untrained heads lie within .82-.91 and
    .46-.56."""
    active, accuracy = separation(0, 50)
    assert active < 0.15 and accuracy > 0.98


def test_wrong_sizes_are_refused():
    for bad in (dict(width=24), dict(taps=())):
        with pytest.raises(ValueError, match=r"multiple of 16 and taps at least one .*\(got "):
            DiscriminatorConfig(**{**dict(taps=(0,), feat_dim=8, pooled_dim=4), **bad})
    feats, sigma, pooled = inputs()
    with pytest.raises(ValueError, match=r"heads: features must be 3 of .* \(got 2 of"):
        make()(feats[:2], sigma, pooled, GRID)
