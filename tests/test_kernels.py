"""The reference operations against naive float64 formulas: values, strides, dtypes, untouched
inputs.

Shapes: one token; prime numbers of tokens; text longer and shorter than the image; one batch entry
and more.
"""
import math

import pytest
import torch
from conftest import assert_close, rng
from torch import Tensor

import kernels
from kernels import attention, heads, modulation, optimizer

DTYPES = (torch.float64, torch.float32, torch.bfloat16)
ids = str


def randn(*shape: int, dtype=torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=rng(seed), dtype=torch.float64).to(dtype)


def unchanged(function, *args, **kwargs):
    """function(*args), after which every tensor argument must hold what it held."""
    flat = [t for a in [*args, *kwargs.values()] for t
            in (a if isinstance(a, (tuple, list)) else [a])]
    tensors = [t for t in flat if isinstance(t, Tensor)]
    before = [t.clone() for t in tensors]
    out = function(*args, **kwargs)
    assert all(torch.equal(t, b) for t, b in zip(tensors, before)), "an input was written to"
    return out


# --- load ---

def test_load_names_the_references():
    k = kernels.load("torch")
    assert k._fields == ("joint_attention", "modulate", "modulate2", "gate_modulate", "gate",
                         "discriminator_heads", "adamw")
    for field, function in k._asdict().items():
        home = next(m for m in (attention, modulation, heads, optimizer)
                    if hasattr(m, f"reference_{field}"))
        assert function is getattr(home, f"reference_{field}"), field
    assert isinstance(kernels.load(), kernels.Kernels)


def test_load_raises_for_an_unknown_name():
    with pytest.raises(ValueError, match="must be auto, triton, gluon or torch .got 'cuda'"):
        kernels.load("cuda")


# --- modulation ---

def naive_norm(x: Tensor, eps: float) -> Tensor:
    x = x.double()
    mean = x.sum(-1, keepdim=True) / x.shape[-1]
    return (x - mean) / torch.sqrt(((x - mean) ** 2).sum(-1, keepdim=True) / x.shape[-1] + eps)


def naive_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    rows = zip(x, shift.double(), scale.double())
    return torch.stack([naive_norm(r, eps) * (1 + s) + t for r, t, s in rows])


def naive_gate(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    return torch.stack([r.double() + g.double() * y.double() for r, y, g in zip(x, branch, gate)])


@pytest.mark.parametrize("eps", [1e-6, 0.3])
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("b, l, d", [(1, 1, 64), (3, 7, 48), (2, 5, 128)])
def test_modulation(b, l, d, dtype, eps):
    x, branch = randn(b, l, d, dtype=dtype, seed=1) * 3 + 2, randn(b, l, d, dtype=dtype, seed=2)
    # strided views
    shift, scale, gate, shift2, scale2 = randn(b, 5 * d, dtype=dtype, seed=3).chunk(5, -1)
    k = kernels.load("torch")

    y = unchanged(k.modulate, x, shift, scale, eps)
    assert_close("modulate", y, naive_modulate(x, shift, scale, eps).to(dtype))
    y, y2 = unchanged(k.modulate2, x, shift, scale, shift2, scale2, eps)
    assert_close("modulate2, first", y, naive_modulate(x, shift, scale, eps).to(dtype))
    assert_close("modulate2, second", y2, naive_modulate(x, shift2, scale2, eps).to(dtype))
    added = naive_gate(x, branch, gate)
    assert_close("gate", unchanged(k.gate, x, branch, gate), added.to(dtype))
    out, y = unchanged(k.gate_modulate, x, branch, gate, shift, scale, eps)
    assert_close("gate_modulate, residual", out, added.to(dtype))
    assert_close("gate_modulate, modulated", y, naive_modulate(added, shift, scale, eps).to(dtype))


def test_modulate_default_eps_and_extreme_rows():
    x = torch.zeros(1, 3, 64, dtype=torch.float64)
    # constant; variance like eps; large offset
    x[0, 1], x[0, 2] = 1e-3 * randn(64), 1e6 + randn(64)
    shift, scale = randn(1, 64, seed=1), randn(1, 64, seed=2)
    y = modulation.reference_modulate(x, shift, scale)
    assert_close("default eps", y, naive_modulate(x, shift, scale, 1e-6), 1e-9)
    assert_close("constant row", y[:, 0], shift)


def test_modulation_computes_half_inputs_in_fp32():
    x, branch = randn(2, 5, 64, dtype=torch.bfloat16), randn(2, 5, 64, dtype=torch.bfloat16, seed=1)
    shift, scale, gate = randn(2, 192, dtype=torch.bfloat16, seed=2).chunk(3, -1)
    wide = [t.float() for t in (x, branch, gate, shift, scale)]
    expected = [t.bfloat16() for t in modulation.reference_gate_modulate(*wide)]
    found = modulation.reference_gate_modulate(x, branch, gate, shift, scale)
    for name, a, e in zip(("residual", "modulated"), found, expected):
        assert torch.equal(a, e), name


# --- attention ---

def naive_attention(streams: list[tuple[Tensor, tuple[Tensor, Tensor] | None]],
                    eps: float) -> list[Tensor]:
    """Per sample and head: explicit RMS norms, explicit softmax over all keys; streams in key
    order."""
    b, _, _, n, dh = streams[0][0].shape
    outs = [torch.zeros(q.shape[0], q.shape[1], n, dh, dtype=torch.float64) for q, _ in streams]
    for i in range(b):
        for j in range(n):
            rows = []
            for qkv, norm in streams:
                q, k, v = (qkv[i, :, m, j].double() for m in range(3))
                if norm is not None:
                    q, k = (x / torch.sqrt((x ** 2).sum(-1, keepdim=True) / dh + eps) * w.double()
                            for x, w in zip((q, k), norm))
                rows.append((q, k, v))
            keys, values = torch.cat([r[1] for r in rows]), torch.cat([r[2] for r in rows])
            for out, (q, _, _) in zip(outs, rows):
                scores = q @ keys.T / math.sqrt(dh)
                e = torch.exp(scores - scores.max(-1, keepdim=True).values)
                out[i, :, j] = e / e.sum(-1, keepdim=True) @ values
    return outs


def qkv_view(b: int, l: int, n: int, dh: int, dtype, seed: int) -> Tensor:
    """[b, l, 3, n, dh] as the leading columns of a wider projection: rows are strided."""
    return randn(b, l, 3 * n * dh + 7, dtype=dtype, seed=seed)[..., :3 * n * dh].unflatten(-1,
                                                                                           (3, n,
                                                                                            dh))


@pytest.mark.parametrize("norms", ["none", "both", "text", "image"])
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("b, l_txt, l_img, n", [(2, 5, 13, 2), (1, 1, 1, 1), (1, 7, 4, 3)])
def test_joint_attention(b, l_txt, l_img, n, dtype, norms):
    txt, img = qkv_view(b, l_txt, n, 64, dtype, 1), qkv_view(b, l_img, n, 64, dtype, 2)
    w = [1 + 0.3 * randn(64, dtype=dtype, seed=s) for s in range(3, 7)]
    norm_txt = (w[0], w[1]) if norms in ("both", "text") else None
    norm_img = (w[2], w[3]) if norms in ("both", "image") else None
    attend = kernels.load("torch").joint_attention

    for eps in (1e-6, 0.5):
        out_txt, out_img = unchanged(attend, txt, img, norm_txt, norm_img, eps)
        naive_txt, naive_img = naive_attention([(txt, norm_txt), (img, norm_img)], eps)
        assert_close("text", out_txt, naive_txt.to(dtype))
        assert_close("image", out_img, naive_img.to(dtype))
    default = naive_attention([(txt, norm_txt), (img, norm_img)], 1e-6)[1]
    assert_close("default eps", attend(txt, img, norm_txt, norm_img)[1], default.to(dtype))

    no_txt, only_img = unchanged(attend, txt, img, norm_txt, norm_img, 0.5, need_txt=False)
    assert no_txt is None
    assert_close("image, need_txt=False", only_img, naive_img.to(dtype))
    no_txt, alone = unchanged(attend, None, img, None, norm_img, 0.5)
    assert no_txt is None
    assert_close("image without text", alone, naive_attention([(img, norm_img)], 0.5)[0].to(dtype))


def test_joint_attention_survives_huge_logits():
    img = qkv_view(1, 5, 1, 64, torch.float32, 1) * 100
    out = attention.reference_joint_attention(None, img)[1]
    assert_close("one winner a row", out, naive_attention([(img, None)], 1e-6)[0].float())


def test_joint_attention_computes_half_inputs_in_fp32():
    txt, img = qkv_view(2, 5, 2, 64, torch.bfloat16, 1), qkv_view(2, 6, 2, 64, torch.bfloat16, 2)
    norm = (1 + 0.3 * randn(64, dtype=torch.bfloat16), 1
            + 0.3 * randn(64, dtype=torch.bfloat16, seed=1))
    wide_norm = tuple(w.float() for w in norm)
    wide = attention.reference_joint_attention(txt.float(), img.float(), wide_norm, wide_norm)
    for name, a, e in zip(("text", "image"), attention.reference_joint_attention(txt, img, norm,
                                                                                 norm), wide):
        assert torch.equal(a, e.bfloat16()), name


# --- heads: values and gradients are in test_discriminator.py ---

def head_inputs(dtype=torch.float64, k=2, b=2, h=3, w=5, d=24, c=32, e=6):
    shapes = heads.HeadParams((k, d, c), (k, c), (k, c), (k, c), (k, 3, 3, c, c), (k, c), (k, c),
                              (k, c), (k, e, c), (k, c), (k,))
    params = heads.HeadParams(*(randn(*s, dtype=dtype, seed=i) * 0.3 for i, s in enumerate(shapes)))
    feats = [randn(b, h * w, d, dtype=dtype, seed=20 + i) for i in range(k)]
    return feats, params, randn(b, e, dtype=dtype, seed=30), (h, w)


def test_heads_leave_their_inputs_and_compute_half_inputs_in_fp32():
    feats, params, cond, grid = head_inputs(torch.bfloat16)
    logits = unchanged(heads.reference_discriminator_heads, feats, params, cond, grid)
    wide_params = heads.HeadParams(*(p.float() for p in params))
    wide = heads.reference_discriminator_heads([f.float() for f in feats], wide_params,
                                               cond.float(), grid)
    assert logits.dtype == torch.float32 and torch.equal(logits, wide)


def test_heads_raise_for_inputs_that_do_not_fit():
    feats, params, cond, grid = head_inputs()
    for bad_feats, bad_grid in ((feats[:1], grid), (feats, (5, 5)),
                                ([feats[0], feats[1][..., :8]], grid)):
        with pytest.raises(ValueError, match="heads: features must be 2 of .*got"):
            heads.reference_discriminator_heads(bad_feats, params, cond, bad_grid)
