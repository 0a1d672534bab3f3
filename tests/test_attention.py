"""The joint-attention kernels under Triton's interpreter against the float64 reference, and
compiled for GPUs that are not here: values, gradients, both softmaxes, registration, and what the
machine code looks like.

Lengths: one token; around 16 and 64; SD3's and SD3.5's text (154, 333); they end on, before and
after the end of a tile (64 queries and 32 keys forward, 32 and 64 backward, 128 rows in the passes
over rows).
"""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
from conftest import assert_close, compiler, rng
from torch import Tensor

from kernels import attention

pytest.importorskip("triton")
interpreted = pytest.mark.skipif(not attention.INTERPRET, reason="TRITON_INTERPRET=1 is not set")
ROOT = Path(__file__).parents[1]
GRADS = "qkv_txt", "qkv_img", "wq_txt", "wk_txt", "wq_img", "wk_img"


def make(b: int, l_txt: int | None, l_img: int, n: int = 1, dh: int = 64, norms: str = "both",
         dtype=torch.float64, spread: float = 1.0) -> dict[str, Tensor]:
    """Leaves by name; norms: none, both, txt or img; spread multiplies the norm weights."""
    g = rng(l_img)
    draw = lambda *s: torch.randn(s, generator=g, dtype=torch.float64)
    leaves = {"qkv_txt": draw(b, l_txt, 3, n, dh)} if l_txt is not None else {}
    leaves["qkv_img"] = draw(b, l_img, 3, n, dh)
    for side in ("txt", "img"):
        if norms in ("both", side) and f"qkv_{side}" in leaves:
            leaves |= {f"w{x}_{side}": spread * (1 + 0.3 * draw(dh)) for x in "qk"}
    return {k: v.to(dtype).requires_grad_() for k, v in leaves.items()}


def call(function, leaves: dict[str, Tensor], **kwargs) -> list[Tensor]:
    pair = lambda side: ((leaves[f"wq_{side}"], leaves[f"wk_{side}"])
                         if f"wq_{side}" in leaves else None)
    out = function(leaves.get("qkv_txt"), leaves["qkv_img"], pair("txt"), pair("img"), **kwargs)
    assert isinstance(out, tuple) and len(out) == 2
    return [o for o in out if o is not None]


def with_gradients(function, leaves: dict[str, Tensor], **kwargs) -> dict[str, Tensor]:
    """Outputs and all gradients by name."""
    out = call(function, leaves, **kwargs)
    grads = [torch.randn(o.shape, generator=rng(7), dtype=torch.float64).to(o.dtype) for o in out]
    wanted = {k: v for k, v in leaves.items() if v.requires_grad}
    found = torch.autograd.grad(out, list(wanted.values()), grads, allow_unused=True)
    found = [torch.zeros_like(v) if g is None else g for g, v in zip(found, wanted.values())]
    return {f"out {i - len(out)}": o for i, o in enumerate(out)} | {f"d{k}": g for k, g
                                                                    in zip(wanted, found)}


def check(leaves: dict[str, Tensor], tol: float | None = None, **kwargs) -> None:
    before = {k: v.detach().clone() for k, v in leaves.items()}
    found = with_gradients(attention.joint_attention, leaves, **kwargs)
    assert all(torch.equal(v, before[k]) for k, v in leaves.items()), "an input was written to"
    wide = {k: v.detach().double().requires_grad_(v.requires_grad) for k, v in leaves.items()}
    truth = with_gradients(attention.reference_joint_attention, wide, **kwargs)
    assert found.keys() == truth.keys()
    for name, e in truth.items():
        # with one key nothing depends on the scores
        if e.abs().max() < 1e-12:
            assert found[name].abs().max() < 1e-12, name
        else:
            assert_close(name, found[name], e.to(found[name].dtype), tol)


# --- values and gradients ---

CASES = [(1, 1, 1), (1, 15, 64), (2, 63, 16), (1, 64, 65), (1, 154, 63), (1, 65, 15), (1, 16, 333),
         (1, 333, 154), (2, None, 65), (1, None, 1)]


@interpreted
@pytest.mark.parametrize("b, l_txt, l_img", CASES)
def test_outputs_and_gradients(b, l_txt, l_img):
    check(make(b, l_txt, l_img, n=2 if l_img < 66 else 1), 1e-10)


@interpreted
@pytest.mark.parametrize("norms", ["none", "txt", "img"])
@pytest.mark.parametrize("need_txt", [True, False])
def test_norms_and_need_txt(norms, need_txt):
    check(make(1, 33, 66, n=2, norms=norms), 1e-10, need_txt=need_txt, eps=0.3)


@interpreted
@pytest.mark.parametrize("norms", ["none", "both"])
def test_need_txt_false_and_heads_of_128_in_fp32(norms):
    check(make(1, 70, 66, dh=128, norms=norms, dtype=torch.float32))
    check(make(1, 20, 70, norms=norms, dtype=torch.float32), need_txt=False)


@interpreted
def test_gradcheck():
    leaves = make(1, 2, 3)
    # a part of each
    pick = {k: v[..., :5] if v.ndim == 1 else v[..., 0, :6] for k, v in leaves.items()}

    def function(*parts):
        full = {}
        for (k, v), part in zip(leaves.items(), parts):
            full[k] = v.detach().clone()
            (full[k] if v.ndim == 1 else full[k].select(3, 0))[..., :part.shape[-1]] = part
        return tuple(call(attention.joint_attention, full))

    torch.autograd.gradcheck(function, [p.detach().clone().requires_grad_() for p in pick.values()],
                             fast_mode=True)


@interpreted
def test_strided_and_expanded_inputs():
    wide = torch.randn(2, 40, 3 * 64 + 32, generator=rng(1), dtype=torch.float64)
    txt = torch.randn(1, 20, 3, 1, 64, generator=rng(2), dtype=torch.float64, requires_grad=True)
    img = wide[:, 1:38, 16:16 + 192].unflatten(-1, (3, 1, 64)).requires_grad_()   # wider rows
    for norm in (None, [torch.rand(64, dtype=torch.float64) for _ in range(2)]):
        results = []
        for function in (attention.joint_attention, attention.reference_joint_attention):
            out = function(txt.expand(2, -1, -1, -1, -1), img, norm, norm)
            g = [torch.randn(o.shape, generator=rng(3), dtype=torch.float64)
                 .transpose(1, 2).contiguous().transpose(1, 2) for o in out]
            results.append([*out, *torch.autograd.grad(out, (txt, img), g)])
        for name, f, e in zip(("txt", "img", "dtxt", "dimg"), *results):
            assert_close(name, f, e, 1e-10)
    # an expanded gradient
    out = attention.joint_attention(None, img)[1].sum()
    expected = attention.reference_joint_attention(None, img)[1].sum()
    assert_close("sum", torch.autograd.grad(out, img)[0], torch.autograd.grad(expected, img)[0],
                 1e-10)


@interpreted
def test_text_of_no_tokens_is_no_text():
    leaves = make(1, 0, 20, norms="img")
    out_txt, out_img = attention.joint_attention(leaves["qkv_txt"], leaves["qkv_img"])
    assert out_txt.shape == (1, 0, 1, 64)
    assert_close("img", out_img, attention.reference_joint_attention(None, leaves["qkv_img"])[1],
                 1e-10)
    out_img.sum().backward()
    assert leaves["qkv_txt"].grad.shape == (1, 0, 3, 1, 64)


@interpreted
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("need_txt", [False, True])
def test_every_output_and_scratch_is_written(monkeypatch, deterministic, need_txt):
    made, empty = [], Tensor.new_empty

    def poisoned(self, *args, **kwargs):
        made.append(empty(self, *args, **kwargs).fill_(float("nan")))
        return made[-1]

    monkeypatch.setattr(Tensor, "new_empty", poisoned)
    torch.use_deterministic_algorithms(deterministic)
    try:
        check(make(1, 33, 70), 1e-10, need_txt=need_txt)
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(made) > 8


# --- the two softmaxes ---

@interpreted
@pytest.mark.parametrize("spread, online", [(1.0, False), (1.6, False), (3.0, True), (40.0, True)])
def test_the_bound_of_the_scores_chooses_the_softmax(spread, online):
    leaves = make(1, 20, 40, spread=spread)
    for norm in ("wq_txt", "wk_txt", "wq_img", "wk_img"):
        leaves[norm].data.fill_(spread)
    scale = attention._score_scale(leaves["qkv_img"])
    bound = 64 * spread ** 2 * scale                      # |q| = |k| = 8 spread after the norm
    assert (bound >= 50) == online
    frozen = [leaves[k].detach() for k in GRADS]
    qk_txt, qk_img, maxima = attention.prepare(*frozen, 1e-6)
    assert_close("|q|", maxima[0, 0, 0], torch.full((2,), 8 * spread * scale, dtype=torch.float64),
                 1e-5)
    assert_close("|k|", maxima[0, 0, 1], torch.full((2,), 8 * spread, dtype=torch.float64), 1e-5)
    args = frozen[0], frozen[1], qk_txt, qk_img
    right = attention.forward(*args, maxima, *frozen[2:], 1e-6, True)
    # either softmax alone: only the chosen one gives these bits, the other one the same values
    # while it can
    free, kept = (attention.forward(*args, maxima * f, *frozen[2:], 1e-6, True) for f in (0, 1e9))
    assert torch.equal(right[1], (kept if online else free)[1])
    assert not torch.equal(free[1], kept[1])
    if spread < 10:
        assert_close("either softmax", free[1], kept[1], 1e-10)
        assert_close("lse", free[2], kept[2], 1e-10)
        check(leaves, 1e-9)
    # one winner a row: its gradients are what rounding leaves
    else:
        assert_close("out", right[1], call(attention.reference_joint_attention, leaves)[1].detach(),
                     1e-9)


@interpreted
@pytest.mark.parametrize("tma", [True, False])
@pytest.mark.parametrize("spread", [1.0, 3.0])
def test_each_stream_may_end_within_a_tile_of_keys(monkeypatch, spread, tma):
    """Both softmaxes, by descriptors with the product of the next tile ahead, and by pointers."""
    monkeypatch.setattr(attention, "_tma", lambda device: tma)
    for l_txt, l_img in ((32, 64), (33, 64), (64, 65), (1, 31), (None, 64), (None, 65), (None, 5)):
        leaves = make(1, l_txt, l_img, spread=spread)
        wide = {k: v.detach() for k, v in leaves.items()}
        for f, e in zip(call(attention.joint_attention, leaves),
                        call(attention.reference_joint_attention, wide), strict=True):
            assert_close(f"{l_txt} and {l_img}", f, e, 1e-10)


@interpreted
def test_the_bound_is_that_of_all_blocks_of_keys():
    """66 blocks of keys, more than are read at once; the largest key is in the last."""
    leaves = make(1, 64 * attention.ROWS + 1, 4, norms="none")
    txt, img = (0.01 * leaves[name].detach() for name in ("qkv_txt", "qkv_img"))
    img[:, 3, 1] *= 1e6
    *_, maxima = ready = attention.prepare(txt, img, None, None, None, None, 1e-6)
    assert maxima.shape[3] == 66
    found, free, kept = (attention.forward(txt, img, *ready[:2], maxima * f, None, None, None, None,
                                           1e-6, False)[1] for f in (1, 0, 1e9))
    assert torch.equal(found, kept) and not torch.equal(found, free)


@interpreted
def test_each_program_chooses_for_itself():
    """One image row of huge queries: its tile keeps a running maximum, the other tiles do not."""
    leaves = make(1, 20, 300, norms="none")
    leaves["qkv_img"].data[0, 290, 0] *= 300
    frozen = [leaves[k].detach() for k in ("qkv_txt", "qkv_img")]
    maxima = attention.prepare(*frozen, None, None, None, None, 1e-6)[2]
    chosen = (maxima[0, 0, 0] * maxima[0, 0, 1].max() >= 50).tolist()
    assert chosen == [False, False, False, True]                      # text, then image
    check(leaves, 1e-9)


@interpreted
@pytest.mark.parametrize("norms", ["none", "both"])
def test_huge_logits_stay_finite_and_right(norms):
    leaves = make(1, 20, 40, norms=norms, spread=30.0, dtype=torch.float32)
    for k in ("qkv_txt", "qkv_img"):
        leaves[k].data[:, :, :2] *= 30
    found = with_gradients(attention.joint_attention, leaves)
    assert all(bool(v.isfinite().all()) for v in found.values())
    wide = {k: v.detach().double() for k, v in leaves.items()}
    for f, e in zip(call(attention.joint_attention, leaves),
                    call(attention.reference_joint_attention, wide)):
        assert_close("out", f, e.float(), 1e-3)


@interpreted
@pytest.mark.parametrize("deterministic", [False, True])
def test_low_scores_in_a_cut_tile_keep_gradients_finite(deterministic):
    """All scores far below 0, where the zero keys past the end would win: their p overflows unless
    masked."""
    leaves = make(1, 5, 7, norms="none", dtype=torch.float32)
    for k in ("qkv_txt", "qkv_img"):
        leaves[k].data[:, :, 0], leaves[k].data[:, :, 1] = 8.0, -8.0       # scores -739 (log2)
        leaves[k].data[:, :, :2] += 0.01 * torch.randn(leaves[k][:, :, :2].shape, generator=rng(1))
    torch.use_deterministic_algorithms(deterministic)
    try:
        check(leaves, 1e-3)
    finally:
        torch.use_deterministic_algorithms(False)


@interpreted
@pytest.mark.parametrize("spread", [1.0, 5.0])
def test_nan_reaches_what_it_touches(spread):
    for name, where in (("qkv_img", (0, 35, 0, 0, 5)), ("qkv_img", (0, 35, 1, 0, 5)),
                        ("qkv_txt", (0, 3, 2, 0, 5)), ("wk_txt", (2,)), ("wq_img", (2,))):
        leaves = make(1, 20, 40, spread=spread, dtype=torch.float32)
        leaves[name].data[where] = float("nan")
        found, expected = (call(f, leaves) for f in (attention.joint_attention,
                                                     attention.reference_joint_attention))
        for f, e in zip(found, expected):
            assert torch.equal(f.isnan(), e.isnan()), name


# --- what is not needed ---

@interpreted
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("frozen", [GRADS[2:], ("qkv_txt", "wq_txt", "wk_txt"), ("qkv_img",
                                                                                 *GRADS[2:]),
                                    ("wq_txt", "wk_img"), ("qkv_txt", "qkv_img")])
def test_frozen_inputs_cost_nothing_and_change_nothing(frozen, deterministic, monkeypatch):
    full = with_gradients(attention.joint_attention, make(1, 20, 70))
    leaves = make(1, 20, 70)
    for k in frozen:
        leaves[k].requires_grad_(False)
    results, real = [], attention.backward_op

    def spy(*args):
        results.append(real(*args))
        return results[-1]

    monkeypatch.setattr(attention, "backward_op", spy)
    torch.use_deterministic_algorithms(deterministic)
    try:
        found = with_gradients(attention.joint_attention, leaves)
    finally:
        torch.use_deterministic_algorithms(False)
    for k, v in found.items():
        assert_close(k, v, full[k], 1e-10)
    assert len(results) == 1
    free = lambda *names: any(n not in frozen for n in names)
    wanted = [free("qkv_txt", "wq_txt", "wk_txt"), free("qkv_img", "wq_img", "wk_img"),
              *(free(f"wq_{s}", f"wk_{s}") for s in ("txt", "txt", "img", "img"))]
    assert [bool(t.numel()) for t in results[0]] == wanted


@interpreted
def test_an_output_without_gradient():
    leaves = make(1, 20, 40)
    for i in range(2):
        results = []
        for function in (attention.joint_attention, attention.reference_joint_attention):
            out = call(function, leaves)[i]
            results.append(torch.autograd.grad(out.square().sum(), list(leaves.values()),
                                               allow_unused=True))
        for name, f, e in zip(leaves, *results):
            assert_close(f"{name}, output {i}", f, torch.zeros_like(f) if e is None else e, 1e-10)


@interpreted
def test_without_gradients_nothing_is_kept():
    leaves = make(1, 20, 40)
    with torch.no_grad():
        out = call(attention.joint_attention, leaves)
    assert all(o.grad_fn is None for o in out)
    assert_close("img", out[1], call(attention.reference_joint_attention, leaves)[1].detach(),
                 1e-10)


@interpreted
def test_deterministic_where_torch_asks(monkeypatch):
    monkeypatch.setattr(attention.tl, "atomic_add", None)             # nobody may call it
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (with_gradients(attention.joint_attention,
                                        make(1, 40, 70, dtype=torch.float32)) for _ in range(2))
        assert all(torch.equal(first[k], second[k]) for k in first)
        check(make(1, 40, 70), 1e-10)
        check(make(1, 40, 70, norms="none"), 1e-10, need_txt=False)
    finally:
        torch.use_deterministic_algorithms(False)


# --- torch.library, torch.compile, checkpoints ---

def op_arguments(norms: str, need_txt: bool) -> dict[str, tuple]:
    leaves = make(1, 17, 20, norms=norms, dtype=torch.float32)
    tensors = [leaves.get(k) for k in GRADS]
    frozen = [None if t is None else t.detach() for t in tensors]
    forward = *tensors[:2], *attention.prepare(*frozen, 1e-6), *tensors[2:], 1e-6, need_txt
    out = [o.detach() for o in attention.forward(*forward)]
    g_txt = torch.randn_like(out[0]) if need_txt else None
    weights = norms == "both"
    backward = (g_txt, torch.randn_like(out[1]), *frozen[:2], *forward[2:4], *frozen[2:], *out,
                1e-6, True, True, weights, weights, False)
    return {"prepare": (*frozen, 1e-6), "forward": forward, "backward": backward}


@interpreted
@pytest.mark.parametrize("norms, need_txt", [("none", False), ("both", True)])
@pytest.mark.parametrize("name", ["prepare", "forward", "backward"])
def test_opcheck(name, norms, need_txt):
    torch.library.opcheck(getattr(attention, f"{name}_op"), op_arguments(norms, need_txt)[name])


@interpreted
def test_compiles_whole_and_recompiles_for_no_bucket_of_one_area():
    torch._dynamo.reset()
    compiled = torch.compile(attention.joint_attention, fullgraph=True, backend="aot_eager",
                             dynamic=True)
    count = lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]
    before = count()
    for l_img in (60, 63, 64, 66):
        leaves = make(1, 17, l_img)
        found, expected = (with_gradients(f, leaves) for f in (compiled, attention.joint_attention))
        for k in expected:
            assert torch.equal(found[k], expected[k]), k
    assert count() == before + 1
    static = torch.compile(attention.joint_attention, fullgraph=True, backend="aot_eager")
    leaves = make(1, 17, 33, norms="none")
    found, expected = (with_gradients(f, leaves, need_txt=False) for f
                       in (static, attention.joint_attention))
    assert all(torch.equal(found[k], expected[k]) for k in expected)


@interpreted
def test_a_selective_checkpoint_does_not_attend_again(monkeypatch):
    from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
    launches, real = [], attention._forward
    monkeypatch.setattr(attention, "_forward", type("Spy", (), {"__getitem__": lambda _,
                                                                g: launches.append(g)
                                                                or real[g]})())
    keep = [torch.ops.ladd.joint_attention_forward.default]
    leaves = make(1, 17, 33)

    def block(*tensors):
        named = dict(zip(leaves, tensors))
        out = call(attention.joint_attention, {**named, "qkv_img": named["qkv_img"] * 1.5})
        return sum(o.square().sum() for o in out)

    results = []
    for context in (None, lambda: create_selective_checkpoint_contexts(keep)):
        before = len(launches)
        extra = {} if context is None else {"context_fn": context}
        out = checkpoint(block, *leaves.values(), use_reentrant=False, **extra)
        results.append(torch.autograd.grad(out, list(leaves.values())))
        assert len(launches) - before == (2 if context is None else 1)
    for name, f, e in zip(leaves, *results):
        assert torch.equal(f, e), name


# --- errors ---

@interpreted
def test_rows_beyond_32_bit_offsets():
    """The last rows start beyond 2^31 elements; only the pages that are touched take memory."""
    l, stride = 260, 2 ** 23
    far = torch.empty((l - 1) * stride + 192).as_strided((1, l, 3, 1, 64),
                                                         (l * stride, stride, 64, 64, 1))
    near = torch.randn(1, l, 3, 1, 64, generator=rng(1))
    far.copy_(near)
    norm = tuple(1 + 0.3 * torch.randn(2, 64, generator=rng(2)))
    results = []
    for x in (far, near):
        leaf = x.detach().requires_grad_()
        out = attention.joint_attention(None, leaf, None, norm)[1]
        results.append((out, *torch.autograd.grad(out.square().sum(), leaf)))
    for name, a, e in zip(("output", "gradient"), *results):
        assert_close(name, a.contiguous(), e, 1e-6)
    too_far = torch.empty(2 ** 24 + 192).as_strided((1, 2, 3, 1, 64), (2 ** 25, 2 ** 24, 64, 64, 1))
    with pytest.raises(ValueError, match="strides of qkv_img must be .*16777215"):
        attention.joint_attention(None, too_far)


@pytest.mark.parametrize("stride_b", [0, 5 * 192 - 64, 2 * 192],
                         ids=["expanded", "within a row", "overlapping"])
def test_samples_that_no_tensor_map_describes(stride_b):
    base = torch.randn(1, 20 * 192, generator=rng(1))
    view = base.as_strided((2, 5, 3, 1, 64), (stride_b, 192, 64, 64, 1))
    stride_b, stride_l, _ = attention._tiles(view, 32).strides
    assert stride_b >= 5 * stride_l and stride_b % stride_l == 0
    whole = view.contiguous()
    for a, e in zip(attention.joint_attention(view, view), attention.joint_attention(whole, whole)):
        assert torch.equal(a, e)


def test_a_second_derivative_raises():
    x = torch.randn(1, 4, 3, 1, 64, requires_grad=True)
    out = attention.joint_attention(None, x)[1]
    first, = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="attention: the backward pass has no derivative"):
        first.square().sum().backward()


def test_unsupported_inputs_raise():
    x = lambda *s, dtype=torch.float32: torch.zeros(s, dtype=dtype)
    good, attend = x(1, 4, 3, 2, 64), attention.joint_attention
    for args, match in (((None, x(1, 4, 3, 2, 32)), "dh 64 or 128"),
                        ((x(2, 4, 3, 2, 64), good), "qkv_txt"),
                        ((None, x(1, 4, 2, 2, 64)), "3, n, dh"),
                        ((None, x(4, 3, 2, 64)), "qkv_img"),
                        ((None, x(1, 4, 3, 2, 64, dtype=torch.bfloat16)), "bfloat16"),
                        ((x(1, 4, 3, 2, 64, dtype=torch.float64), good), "float64"),
                        ((None, x(1, 4, 2, 3, 64).transpose(2, 3)), "strides"),
                        ((None, x(1, 1, 3, 2, 64).expand(1, 4, 3, 2, 64)), "strides"),
                        ((None, x(1, 0, 3, 2, 64)), "at least one token .got .1, 0, 3, 2, 64"),
                        ((None, good, (x(64), x(64))), "norm_txt requires qkv_txt"),
                        ((None, good, None, (x(64), x(32))), "norm weights of qkv_img must be "
                         ".*64.*got .*32")):
        with pytest.raises(ValueError, match=match):
            attend(*args)
    for bad in (torch.zeros(385)[1:].view(1, 1, 3, 2, 64),
                torch.zeros(1, 2, 385)[..., :384].unflatten(-1, (3, 2, 64))):
        with pytest.raises(ValueError, match="multiples of 16 bytes"):
            attend(None, bad)


def test_a_cpu_without_the_interpreter_is_an_error(monkeypatch):
    monkeypatch.setattr(attention, "INTERPRET", False)
    with pytest.raises(RuntimeError, match="must be on CUDA.*TRITON_INTERPRET.*got cpu"):
        attention.joint_attention(None, torch.zeros(1, 4, 3, 1, 64))
    monkeypatch.setattr(attention, "ARCH", 90)
    with pytest.raises(ValueError, match="in torch.bfloat16 or torch.float16 .got .*float32"):
        attention.joint_attention(None, torch.zeros(1, 4, 3, 1, 64))


def test_an_unknown_architecture_is_announced_once(monkeypatch):
    monkeypatch.setattr(attention, "INTERPRET", False)
    monkeypatch.setattr(attention, "ARCH", 61)
    x = torch.zeros(1, 4, 3, 1, 64, dtype=torch.bfloat16)
    with pytest.warns(UserWarning, match="sm_61"):
        assert attention._launches(x) == attention.CONSERVATIVE
    import warnings
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert attention._launches(x) == attention.CONSERVATIVE


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the main guard would time a GPU")
def test_the_file_checks_itself_alone(tmp_path):
    (tmp_path / "attention.py").write_text((ROOT / "kernels" / "attention.py").read_text())
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-I", "attention.py"], cwd=tmp_path, env=env,
                          capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("e-0") >= 4, done.stdout + done.stderr


# --- compiled for GPUs that are not here ---

# What python -m kernels.aot does not print: the loops of the products for sm_90, instruction by
# instruction, and the kernels of the deterministic backward. All but the latter are its kernels.
LOOPS = """
import json, sys, tempfile
import torch
from kernels import aot, attention
rows = []
for arch, text, n, dh, norm, deterministic in (
        (90, 154, 24, 64, False, False), (90, 333, 24, 64, True, False),
        *((arch, 333, 19, 128, True, True) for arch in (80, 90, 100))):
    torch.use_deterministic_algorithms(deterministic)
    options = dict(dtype=torch.bfloat16, requires_grad=True)
    qkv = [torch.empty(2, l, 3, n, dh, **options) for l in (text, 4096)]
    norms = [tuple(torch.empty(dh, **options) for _ in range(2)) if norm else None for _ in qkv]
    seen = []
    with aot.recording(arch, seen):
        out = attention.joint_attention(*qkv, *norms)
        torch.autograd.backward(out, [torch.empty_like(o) for o in out])
    for name, options, compiled in seen:
        row = {"kernel": name, "arch": arch, "deterministic": deterministic}
        if "backward" in name and deterministic:
            row |= aot.describe("attention", str(dh), arch, name, options, compiled)
        if arch == 90 and ("forward" in name or "backward" in name):
            with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                file.write(compiled.asm["cubin"])
                file.flush()
                sass = aot.loops(aot.tool("nvdisasm", "-c", file.name))
            row |= {"ptx_wgmma": compiled.asm["ptx"].count("wgmma.mma_async"),
                    "loops": [[l.order(), l.count("HGMMA"), l.count("WARPGROUP.DEPBAR"),
                               l.overlapped(), l.count("FMNMX"),
                               l.count(r"HGMMA\\S* R\\d+, gdesc")]
                              for l in sass if l.count(aot.PRODUCT)]}
        rows.append(row)
json.dump(rows, sys.stdout)
"""
KERNELS = ["prepare", "forward", "stats", "backward", "finish"]


def check_row(row: dict, arch: int) -> None:
    assert row["spills"] == 0 and row["ctas"] >= 1, row
    product = row["kernel"].split(".")[1] in ("forward", "forward_gluon", "backward",
                                                    "backward_q")
    assert (row["products"] > 0) == product, row
    if product and arch >= 90:
        assert row["bulk"] > 0, row
    if not product:
        assert row["vector"] > 0, row


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_compiles_for_each_architecture(arch, machine_code):
    rows = [row for row in machine_code[0]
            if row["arch"] == arch and row["kernel"].startswith("attention.")]
    kernels = {case: [r["kernel"].split(".")[1] for r in rows if r["case"] == f"{case}, training"]
               for case in ("sd3-medium", "sd3.5-medium")}
    # the statistics do not depend on norms: the same kernel
    assert kernels == {"sd3-medium": KERNELS,
                       "sd3.5-medium": [name for name in KERNELS if name != "stats"]}
    for row in rows:
        check_row(row, arch)


@pytest.mark.slow
def test_loops_of_sm_90_overlap_and_the_deterministic_backward_compiles(machine_code):
    rows = json.loads(compiler("-c", LOOPS))
    for arch in (80, 90, 100):
        found = [r for r in rows if r["arch"] == arch and r["deterministic"]]
        assert [r["kernel"].split(".")[-1].lstrip("_") for r in found] == [
            *KERNELS[:4], "backward_q", "finish"]
        assert sum("spills" in row for row in found) == 2
        for row in found:
            if "spills" in row:
                check_row(row, arch)
    rows = [row for row in rows if "ptx_wgmma" in row]
    assert len(rows) == 3 * 2 + 1
    for row in rows:
        assert row["ptx_wgmma"] > 0 and row["loops"], row
        for order, hgmma, waits, overlapped, _, both_in_memory in row["loops"]:
            # products of one tl.dot are one group: a wait for each of them would serialise
            assert hgmma >= 4 and waits <= hgmma / 4, (row["kernel"], order)
            if row["kernel"].endswith("backward"):
                assert both_in_memory == 0, (row["kernel"], order)
        if row["kernel"].endswith("forward"):
            # no running maximum
            free = [loop for loop in row["loops"] if loop[4] == 0]
            assert len(free) == 1 and len(row["loops"]) == 2, row["kernel"]
            assert all(loop[3] for loop in free), free
