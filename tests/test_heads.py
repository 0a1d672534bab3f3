"""The heads' Triton kernels under the interpreter, against the float64 reference: values, every
gradient, what is left out; and as machine code for GPUs that are not here.

Shapes: one token; primes; several tiles of tokens, channels and steps, whole and ragged; one head
and more.
"""
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import assert_close, compiler, randomise, rng, tiny
from test_kernels import head_inputs, unchanged
from torch import Tensor

triton = pytest.importorskip("triton")
import triton.language as tl

import kernels
from kernels import heads
from kernels.heads import HeadParams, reference_discriminator_heads
from ladd.core import losses, mmdit
from ladd.core.discriminator import Discriminator, DiscriminatorConfig, channel_moments

pytestmark = pytest.mark.skipif(not heads.INTERPRET,
                                reason="needs Triton's interpreter: TRITON_INTERPRET=1 and no CUDA")
ROOT = Path(__file__).parents[1]
SHAPES = {"one token": dict(k=1, b=1, h=1, w=1, c=16), "ragged": dict(k=2, b=2, h=3, w=5),
          "tiles": dict(k=2, b=1, h=7, w=9, d=136, c=48),
          "row": dict(k=1, b=2, h=1, w=70, d=8, c=16),
          "column": dict(k=1, b=2, h=70, w=1, d=8, c=16),
          "square": dict(k=1, b=1, h=16, w=16, d=64, c=32)}


def names(k: int) -> list[str]:
    return [*(f"feats {i}" for i in range(k)), *HeadParams._fields, "cond"]


def grads(function, feats, params, cond, grid, only=slice(None)) -> tuple[Tensor,
                                                                          dict[str, Tensor]]:
    """(logits, gradients by name of a weighted sum of them), of the leaves in `only` alone."""
    k = len(feats)
    leaves = [t.detach() for t in (*feats, *params, cond)]
    for t in leaves[only]:
        t.requires_grad_()
    logits = function(leaves[:k], HeadParams(*leaves[k:k + 11]), leaves[-1], grid)
    weight = torch.randn(logits.shape, generator=rng(5), dtype=torch.float64).to(logits.dtype)
    found = torch.autograd.grad((logits * weight).sum(), leaves[only])
    return logits.detach(), dict(zip(names(k)[only], found))


def widened(inputs):
    feats, params, cond, grid = inputs
    params = HeadParams(*(p.double() for p in params))
    return [f.double() for f in feats], params, cond.double(), grid


def compare(inputs, floor: float = 0.0) -> None:
    """Logits and every gradient; gradients that cancel down to rounding may differ by `floor` of
    the rest."""
    found = grads(heads.discriminator_heads, *inputs)
    expected = grads(reference_discriminator_heads, *widened(inputs))
    dtype = found[0].dtype
    assert_close("logits", found[0], expected[0].to(dtype))
    scale = max(e.abs().max() for e in expected[1].values())
    for name, e in expected[1].items():
        a, tol = found[1][name], {torch.float64: 1e-12, torch.float32: 2e-5}[dtype]
        assert a.shape == e.shape and a.dtype == dtype, name
        assert (a - e).abs().max() <= tol * e.abs().max() + floor * tol * scale, \
            f"{name}: {(a - e).abs().max():.3g} of {e.abs().max():.3g}"


# --- values ---

@pytest.mark.parametrize("shape, dtype", [
    *((shape, torch.float64) for shape in SHAPES),
    *((shape, torch.float32) for shape in ("one token", "ragged", "tiles"))], ids=str)
def test_logits_and_every_gradient(shape, dtype):
    # one token: a group has 16 values, and what reaches its bias and its norm cancels
    compare(head_inputs(dtype, **SHAPES[shape]), 1.0 if shape == "one token" else 0.0)


# each row once: sm_90 and sm_100 share some
@pytest.mark.parametrize("row", {heads.TABLE[key]: key for key in heads.TABLE if key[0]}.values(),
                         ids=str)
def test_shipped_tiles_give_the_same(row, monkeypatch):
    monkeypatch.setitem(heads.TABLE, (0, "any"), heads.TABLE[row])
    compare(head_inputs(torch.float32, k=1, b=2, h=5, w=7, d=72, c=48))


def test_tiles_read_by_pointers_give_the_same_bits(monkeypatch):
    """As on a GPU without TMA."""
    inputs = head_inputs(torch.float32, k=2, b=2, h=5, w=13, d=136, c=48)
    expected = grads(heads.discriminator_heads, *inputs)
    read = []
    monkeypatch.setattr(heads, "_tma", lambda device: read.append(device))
    found = grads(heads.discriminator_heads, *inputs)
    assert len(read) == 12 and torch.equal(found[0], expected[0])
    for name, g in found[1].items():
        assert torch.equal(g, expected[1][name]), name


@pytest.mark.slow
def test_float64_gradcheck():
    feats, params, cond, grid = head_inputs(k=1, b=2, h=2, w=3, d=8, c=16, e=3)
    leaves = [t.requires_grad_() for t in (*feats, *params, cond)]

    def logits(*t):
        return heads.discriminator_heads(list(t[:1]), HeadParams(*t[1:12]), t[12], grid)
    assert torch.autograd.gradcheck(logits, leaves, fast_mode=True)


def test_features_may_have_any_strides():
    feats, params, cond, grid = head_inputs(torch.float32, k=3, b=2, c=16)
    wide = torch.full((2, 18, 40), float("nan"))
    # a corner: strides of batch and row
    wide[:, 2:17, 8:32] = feats[0]
    turned = feats[1].transpose(0, 1).contiguous().transpose(0, 1)       # rows outside samples
    same = feats[2][:1].expand(2, -1, -1)                                # batch stride 0
    plain = grads(heads.discriminator_heads, [feats[0], feats[1], same.contiguous()], params, cond,
                  grid)
    strided = [wide[:, 2:17, 8:32], turned, same]
    logits, found = grads(heads.discriminator_heads, strided, params, cond, grid)
    assert torch.equal(logits, plain[0])
    for name, g in found.items():
        assert torch.equal(g, plain[1][name]), name


def test_bf16_features_are_computed_in_fp32_here():
    """The interpreter's bf16 products are wrong, so none may be taken."""
    feats, params, cond, grid = head_inputs(torch.float32)
    narrow = [f.bfloat16() for f in feats]
    logits, found = grads(heads.discriminator_heads, narrow, params, cond, grid)
    expected = grads(reference_discriminator_heads, narrow, params, cond, grid)
    assert_close("logits", logits, expected[0])
    for name, e in expected[1].items():
        assert_close(name, found[name], e, 1e-2 if "feats" in name else 2e-5)    # stored in bf16


def test_large_means_keep_their_digits():
    """A bias of 1000 on values of order 1, and means that grow from tile to tile: sums of squares
    fail here. fp32 keeps 6e-5 of 1000, so the bound is that of the fp32 reference, doubled."""
    feats, params, cond, grid = head_inputs(torch.float32, k=1, b=1, h=16, w=16, c=32)
    feats = [f + torch.linspace(0, 50, 256)[:, None] for f in feats]
    params = params._replace(b_in=params.b_in + 1000, b_conv=params.b_conv - 1000)
    expected = grads(reference_discriminator_heads, *widened((feats, params, cond, grid)))
    lowp, found = (grads(f, feats, params, cond, grid) for f in
                   (reference_discriminator_heads, heads.discriminator_heads))
    for name in ("logits", *expected[1]):
        e, low, a = ((x[0] if name == "logits" else x[1][name]) for x in (expected, lowp, found))
        assert (a - e).abs().max() <= 2 * (low - e).abs().max() + 2e-5 * e.abs().max(), name
        assert (a - e).abs().max() <= 2e-2 * e.abs().max(), name


def test_nan_stays_in_its_head_and_sample():
    feats, params, cond, grid = head_inputs(torch.float32, b=3)
    feats[1][2, 4, 3] = float("nan")
    logits, found = grads(heads.discriminator_heads, feats, params, cond, grid)
    expected = grads(reference_discriminator_heads, feats, params, cond, grid)
    assert torch.equal(logits.isnan(), expected[0].isnan()) and logits.isnan().sum() == 15
    for name, e in expected[1].items():
        assert torch.equal(found[name].isnan(), e.isnan()), name
    assert not found["feats 0"].isnan().any() and found["feats 1"].isnan().any()


# --- what is computed, written and touched ---

class Spy:
    """Counts a kernel's launches by `label` of its arguments."""

    def __init__(self, kernel, name, seen):
        self.kernel, self.name, self.seen = kernel, name, seen

    def __getitem__(self, grid):
        def launch(*args, **options):
            self.seen[f"{self.name} {options.get('EPILOGUE', '')}".strip()] += 1
            return self.kernel[grid](*args, **options)
        return launch


@pytest.fixture
def launches(monkeypatch):
    seen = Counter()
    for name in ("_product", "_weight_grad", "_activate", "_readout", "_readout_sums",
                 "_norm_grad"):
        monkeypatch.setattr(heads, name, Spy(getattr(heads, name), name.strip("_"), seen))
    return seen


def test_each_step_computes_what_it_needs(launches):
    inputs = head_inputs(torch.float32, h=2, w=3, c=16)
    forward = Counter({"product stats": 2, "activate": 1, "readout": 1})
    back = Counter({"readout_sums": 1, "norm_grad": 2, "product norm": 1})
    weights = Counter({"activate": 1, "weight_grad": 2})
    _, everything = grads(heads.discriminator_heads, *inputs)
    # for any number of heads
    assert launches == forward + back + weights + Counter({"product store": 1})
    for only, more in ((slice(0, 2), Counter({"product store": 1})), (slice(2, None), weights)):
        launches.clear()
        _, found = grads(heads.discriminator_heads, *inputs, only=only)
        assert launches == forward + back + more
        for name, g in found.items():
            assert torch.equal(g, everything[name]), name
    launches.clear()
    with torch.no_grad():
        heads.discriminator_heads(*inputs)
    assert launches == forward


def test_gradients_nobody_needs_have_no_elements():
    feats, params, cond, grid = head_inputs(torch.float32)
    p = [t for t in params if t is not params.w_cond]
    readout = torch.randn(2, 2, 32)
    stacked = torch.stack(feats)
    logits, *saved = heads.heads_forward(stacked, *p[:8], readout, p[9], *grid)
    args = (torch.randn_like(logits), stacked, p[0], p[2], p[3], p[4], p[6], p[7], readout, *saved)
    for need_feats, need_weights in ((True, False), (False, True)):
        found = heads.heads_backward(*args, need_feats, need_weights)
        assert [bool(g.numel()) for g in found] == [need_feats] + [need_weights] * 10


@pytest.mark.parametrize("weights", [True, False])
def test_features_are_kept_for_the_weights_gradient_alone(weights):
    feats, params, cond, grid = head_inputs(torch.float32)
    for t in (*feats, *(params if weights else ())):
        t.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)),
                                                  lambda t: t):
        heads.discriminator_heads(feats, params, cond, grid)
    assert ((2, *feats[0].shape) in kept) == weights


def test_inputs_stay_results_repeat_bitwise_and_every_buffer_is_written(monkeypatch):
    inputs = head_inputs(torch.float32, k=1, b=2, h=7, w=9, c=48)
    expected = unchanged(lambda *a: grads(heads.discriminator_heads, *a), *inputs)
    poison = lambda make: lambda *args, **options: make(*args, **options).fill_(float("nan"))
    monkeypatch.setattr(Tensor, "new_empty", poison(Tensor.new_empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
    found = grads(heads.discriminator_heads, *inputs)
    assert torch.equal(found[0], expected[0])
    for name, g in found[1].items():
        assert torch.equal(g, expected[1][name]), name


# --- torch.library and torch.compile ---

@pytest.mark.slow
def test_opcheck():
    feats, params, cond, grid = head_inputs(torch.float32, h=1, w=2, c=16)
    p = [t.requires_grad_() for t in params if t is not params.w_cond]
    readout = torch.randn(2, 2, 16, requires_grad=True)
    stacked = torch.stack(feats).requires_grad_()
    args = (stacked, *p[:8], readout, p[9], *grid)
    torch.library.opcheck(heads.heads_forward, args)
    logits, *saved = heads.heads_forward(*args)
    detached = [t.detach() for t in (p[0], p[2], p[3], p[4], p[6], p[7], readout, *saved)]
    for needs in ((True, False), (False, True)):
        torch.library.opcheck(heads.heads_backward, (torch.randn_like(logits), stacked.detach(),
                                                     *detached, *needs))


def test_compiled_equals_eager_without_graph_breaks():
    inputs = head_inputs(torch.float32, h=1, w=2, c=16)

    def loss(*args):
        return torch.tanh(heads.discriminator_heads(*args)) * 2
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for only in (slice(None), slice(0, 2), slice(2, None)):
        expected, found = (grads(f, *inputs, only=only) for f in (loss, compiled))
        assert torch.equal(found[0], expected[0])
        for name, g in found[1].items():
            assert torch.equal(g, expected[1][name]), name


# --- in place ---

def test_the_discriminator_takes_the_same_steps():
    """Heads' loss with mismatched samples and R1, and the student's loss back through the
    teacher."""
    dc = losses.LaddConfig(levels=(1.0, 0.5), probs=(0.5, 0.5), easy_steps=0, shift=1.0, d_mean=0.0,
                              mismatched=0.5, r1_weight=1.0, distill_weight=0.0)
    teacher, student = (tiny(dtype=torch.float32, seed=s) for s in (0, 1))
    teacher.requires_grad_(False)
    g = rng(7)
    x0, context, pooled = (torch.randn(s, generator=g) for s
                           in ((2, 4, 6, 10), (2, 5, 24), (2, 20)))
    text = mmdit.Text(context, pooled)
    wrong = losses.Mismatched(torch.tensor([1]), mmdit.Text(context[:1], pooled[:1]), torch.ones(1),
                              1.0)
    drawn, found = losses.draw(x0, 0, dc, (3,)), []
    for op in (reference_discriminator_heads, heads.discriminator_heads):
        torch.manual_seed(0)
        config = DiscriminatorConfig(taps=(0, 2), feat_dim=128, pooled_dim=20, width=32,
                                     cond_dim=12)
        net = randomise(Discriminator(config,
                                      kernels.load("torch")._replace(discriminator_heads=op)))
        fake = losses.fake_pass(student, teacher, net, x0, text, drawn, dc)
        net.calibrate(channel_moments([f.detach() for f in fake.feats]))
        seen = losses.head_inputs(teacher, net, x0, text, wrong, fake.feats, drawn, dc)
        loss_d = losses.heads_loss(net, seen, dc)[0]
        parameters = dict(net.named_parameters())
        of_heads = dict(zip(parameters, torch.autograd.grad(loss_d, parameters.values())))
        net.requires_grad_(False)
        loss_g = losses.student_loss(net, text, fake, drawn, dc, losses.grid_of(teacher, x0))[0]
        parameters = dict(student.named_parameters())
        of_student = torch.autograd.grad(loss_g, parameters.values(), allow_unused=True)
        found.append({"loss_d": loss_d, "loss_g": loss_g, **of_heads,
                      **{f"student's {n}": t for n, t in zip(parameters, of_student) if t
                         is not None}})
    assert found[0].keys() == found[1].keys() and len(found[0]) > 30
    for name, e in found[0].items():
        # sums that cancel: a bias before a norm; R1 takes differences of logits
        assert (found[1][name] - e).abs().max() <= 2e-4 * e.abs().max() + 1e-6, name


# --- errors ---

def test_inputs_that_do_not_fit_raise(monkeypatch):
    feats, params, cond, grid = head_inputs(torch.float32)
    call = heads.discriminator_heads
    short = HeadParams(params.w_in[:, :22], *params[1:])
    for bad, match in (((feats[:1], params, cond, grid), "must be 2 of .*15, 24.*got 1"),
                       ((feats, params, cond, (5, 5)), "grid 5x5"),
                       (([feats[0], feats[1].double()], params, cond, grid),
                        "one dtype.*got.*float64"),
                       (([f.int() for f in feats], params, cond, grid), "bfloat16.*got.*int32"),
                       (([f[:0] for f in feats], params, cond[:0], grid), "empty"),
                       (([f[..., :22] for f in feats], short, cond, grid),
                        "multiple of 4 .*got 22"), ((feats, HeadParams(*(t[..., :24] for t
                                                                         in params)), cond, grid),
                                                    "multiple of 16 .got 24")):
        with pytest.raises(ValueError, match=match):
            call(*bad)
    monkeypatch.setattr(heads, "INTERPRET", False)
    with pytest.raises(RuntimeError, match="CUDA.*TRITON_INTERPRET.*got cpu"):
        call(feats, params, cond, grid)


# --- launch parameters ---

def test_an_unknown_gpu_gets_conservative_tiles_and_says_so_once():
    heads._rows.cache_clear()
    with pytest.warns(UserWarning, match="sm_75.*sm_80"):
        assert heads._rows(75) == 80
    assert heads._rows(75) == 80 and heads._rows(90) == 90 and heads._rows(0) == 0
    assert [heads._rows(arch) for arch in (86, 87, 89, 103, 120)] == [80, 80, 80, 100, 80]


@triton.jit
def _list_tokens(out, l, w, COUNT: tl.constexpr):
    token, inside = heads._tokens(tl.arange(0, COUNT), l, w)
    tl.store(out + tl.arange(0, COUNT), tl.where(inside, token, -1))


@pytest.mark.parametrize("h, w", [(1, 1), (1, 7), (5, 1), (3, 5)])
def test_a_shift_of_a_position_finds_the_neighbour_or_a_zero(h, w):
    """The layout that the convolution reads: the neighbour (dy, dx) of position p is p + dy (w + 1)
    + dx."""
    count, token = heads._positions(h, w), torch.empty(32, dtype=torch.int32)
    _list_tokens[(1,)](token, h * w, w, COUNT=32)
    assert (token[count:] == -1).all() and token[count - 1] == h * w - 1
    token = token[:count].tolist()
    assert [t for t in token if t >= 0] == list(range(h * w))
    # so a tile always holds a token
    assert all(a >= 0 or b >= 0 for a, b in zip(token, token[1:]))
    for p, t in enumerate(token):
        for dy in (-1, 0, 1) if t >= 0 else ():
            for dx in (-1, 0, 1):
                y, x, q = t // w + dy, t % w + dx, p + dy * (w + 1) + dx
                expected = y * w + x if 0 <= y < h and 0 <= x < w else -1
                assert (token[q] if 0 <= q < count else -1) == expected


# three heads of narrow tiles, which python -m kernels.aot does not compile, and one of wide ones;
# words: how often a sum over rows in different warps would write shared memory
SMALL = """
import json
import torch
from kernels import aot, heads
rows, d = [], 128
for arch in (80, 90, 100):
    for k, b, c, h in ((3, 8, 64, 3), (1, 2, 512, 12)):
        shapes = heads.HeadParams((k, d, c), (k, c), (k, c), (k, c), (k, 3, 3, c, c),
                                  (k, c), (k, c), (k, c), (k, 8, c), (k, c), (k,))
        params = heads.HeadParams(*(torch.zeros(s, requires_grad=True) for s in shapes))
        feats = [torch.empty(b, h * h, d, dtype=torch.bfloat16, requires_grad=True)
                 for _ in range(k)]
        seen = []
        with aot.recording(arch, seen):
            heads.discriminator_heads(feats, params, torch.zeros(b, 8), (h, h)).sum().backward()
        rows += [aot.describe("heads", "small", arch, *launch)
                 | {"epilogue": launch[1].get("EPILOGUE"),
                    "words": launch[2].asm["ptx"].count("st.shared.b32")} for launch in seen]
print(json.dumps(rows))
"""


@pytest.fixture(scope="module")
def small_machine_code() -> list[dict]:
    return json.loads(compiler("-c", SMALL))


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_compiled_for_gpus_that_are_not_here(arch, machine_code, small_machine_code):
    small = [row for row in small_machine_code if row["arch"] == arch]
    large = [row for row in machine_code[0]
             if row["arch"] == arch and row["kernel"].startswith("heads.")]
    assert len(small) == 24 and {r["kernel"] for r in small} == {r["kernel"] for r in large}
    summed = [r for r in small if r["epilogue"] == "norm" or r["kernel"] == "heads.readout_sums"]
    # a vector that changes threads writes one; one sum wrote ten or more
    assert len(summed) == 4 and all(r["words"] < 4 for r in summed), summed
    for row in small + large:
        if row["kernel"] in ("heads.product", "heads.weight_grad"):
            assert row["products"] and row["bulk" if arch >= 90 else "async"], row
        assert not row["spills"], row
    for row in large:
        # one wait for products a step, and one or two for data, at full size
        if arch == 90 and row["products"]:
            assert "MMAx4" in row["order"] and row["waits"] <= 3, row


@pytest.mark.slow
def test_the_file_checks_itself_alone(tmp_path):
    (tmp_path / "heads.py").write_text((ROOT / "kernels" / "heads.py").read_text())
    done = subprocess.run([sys.executable, "-I", "heads.py"], cwd=tmp_path, capture_output=True,
                          text=True)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 3, done.stderr
