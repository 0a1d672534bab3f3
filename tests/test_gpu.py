"""On a GPU: bf16 numerics of every kernel, the whole step, compiled. python -m pytest -m gpu

Two rules. `twice` (FlashAttention's): the kernel's error against the exact result is at most twice
that of a plain computation in bf16; cuDNN is no oracle here. Both errors are draws of chance where
rounding an intermediate value moves the result by more than the arithmetic does: at large scores,
and at kinks of leaky ReLU. There `near` compares with references that round alike (rounding.py).
"""
import copy
import math

import pytest
import rounding
import torch
import torch.nn.functional as F
from conftest import assert_close, rng
from test_triton import ladd_step, networks
from torch import Tensor

import kernels
import train
from kernels import attention, attention_gluon, bench, heads, modulation, optimizer
from ladd.core import sampler
from ladd.core.mmdit import Linear, Mlp, Text
from ladd.data.batches import Prefetch
from ladd.engine import graphs
from ladd.engine.fp8 import in_fp8

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(),
                                                  reason="needs CUDA")]
BF16 = torch.bfloat16
DEVICE = "cuda"     # "cpu" under something that runs the compiled kernels there


def rand(*shape: int, seed: int = 0, dtype=BF16) -> Tensor:
    return torch.randn(shape, generator=rng(seed)).to(DEVICE, dtype)


def twice(names, ours, plain, exact) -> None:
    """The 2x rule for each tensor; atol is what rounding of the exact values themselves costs."""
    for name, a, p, e in zip(names, ours, plain, exact, strict=True):
        e = e.float()
        limit = 2 * (p.float() - e).abs().max() + 2 * (e.to(BF16).float() - e).abs().max()
        error = (a.float() - e).abs().max()
        assert error <= limit, f"{name}: error {error:.3g}, at most {limit:.3g}"


def near(names, ours, rounded, order: float = math.inf, limit: float = 0.02) -> None:
    """Each tensor within `limit` of one that rounds as the kernel does, by norms of this order: of
    the largest numbers, or of all (2) where the last bit of fp32 may round one the other way."""
    norm = torch.linalg.vector_norm
    for name, a, e in zip(names, ours, rounded, strict=True):
        error = (norm(a.double() - e, order) / norm(e, order)).item()
        assert error <= limit, f"{name}: error {error:.3g} by the norm {order}, at most {limit:.3g}"


def both_ways(function, tensors: list[Tensor], *rest) -> list[Tensor]:
    """Outputs and gradients of all tensors, for upstream gradients in bf16 drawn once for all."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = function(*leaves, *rest)
    out = [o for o in (out if isinstance(out, tuple) else (out,)) if o is not None]
    up = [torch.randn(o.shape, generator=rng(90 + i)).to(BF16).to(o) for i, o in enumerate(out)]
    return [*out, *torch.autograd.grad(out, leaves, up)]


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("dh", [64, 128])
@pytest.mark.parametrize("l_txt, l_img", [(154, 4096), (333, 1024), (77, 113), (1, 799)])
def test_attention(l_txt, l_img, dh, norm, seed=0, home=attention):
    tensors = [rand(2, l, 3, 3, dh, seed=10 * seed + i) for i, l in enumerate((l_txt, l_img))]
    tensors += [1 + .3 * rand(dh, seed=10 * seed + 5 + i) for i in range(4)] if norm else []
    pairs = lambda w: ((w[0], w[1]), (w[2], w[3])) if w else (None, None)
    run = lambda attend: lambda txt, img, *w: attend(txt, img, *pairs(w))
    plain = bench.library_attention(F.scaled_dot_product_attention)
    exact = both_ways(run(attention.reference_joint_attention), [t.float() for t in tensors])
    results = [both_ways(run(f), tensors) for f in (home.joint_attention, plain)]
    twice([f"tensor {i}" for i in range(len(exact))], *results, exact)


@pytest.mark.parametrize("scale", [1.0, 3.0, 9.0])
def test_attention_chooses_its_softmax(scale, lengths=(77, 500), seed=0, home=attention):
    """Norm weights from small scores to scores beyond the offset-free branch's bound."""
    tensors = [rand(1, l, 3, 2, 64, seed=10 * seed + i) for i, l in enumerate(lengths)]
    tensors += [scale * (1 + .1 * rand(64, seed=10 * seed + 5 + i)) for i in range(4)]
    run = lambda attend, *rest: lambda txt, img, *w: attend(txt, img, w[:2], w[2:], *rest)
    ours = both_ways(run(home.joint_attention), tensors)
    rounded = both_ways(run(rounding.joint_attention, BF16), [t.double() for t in tensors])
    names = "text", "image", "d text", "d image", *(f"d weight {i}" for i in range(4))
    near(names, ours, rounded, order=2)     # one bit of one q times k moves a row's scores by 0.3


def test_attention_is_repeatable_where_torch_asks_for_it():
    tensors = [rand(2, l, 3, 3, 64, seed=i) for i, l in enumerate((154, 1024))]
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        one, two = (both_ways(attention.joint_attention, tensors) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(before)
    assert all(torch.equal(a, b) for a, b in zip(one, two))


@pytest.mark.parametrize("d", [64, 1536, 2432])
@pytest.mark.parametrize("name, count", [("modulate", 2), ("modulate2", 4), ("gate_modulate", 3),
                                         ("gate", 1)])
def test_modulation(name, count, d):
    gated = name.startswith("gate")
    tensors = [rand(3, 333, d, seed=i) for i in range(1 + gated)]
    vectors = rand(3, 6 * d, seed=9)
    run = lambda f: lambda *t: f(*t[:-1], *t[-1].chunk(6, -1)[:count])
    ours = both_ways(run(getattr(modulation, name)), [*tensors, vectors])
    reference = run(getattr(modulation, f"reference_{name}"))
    plain = both_ways(reference, [*tensors, vectors])
    exact = both_ways(reference, [t.float() for t in (*tensors, vectors)])
    twice([f"tensor {i}" for i in range(len(exact))], ours, plain, exact)


@pytest.mark.parametrize("k, d, c, grid", [(3, 128, 64, (3, 5)), (4, 512, 256, (16, 16)),
                                           (24, 1536, 512, (64, 64)), (5, 2432, 512, (52, 76))])
def test_heads(k, d, c, grid, b=2, seed=0):
    e, first = 64, 100 * seed
    sizes = ((k, d, c), *3 * [(k, c)], (k, 3, 3, c, c), *3 * [(k, c)], (k, e, c), (k, c), (k,))
    params = [rand(*s, seed=first + i, dtype=torch.float32) * (s[-2] ** -.5 if len(s) > 2 else 1)
              for i, s in enumerate(sizes)]
    feats = [rand(b, grid[0] * grid[1], d, seed=first + 40 + i) for i in range(k)]
    cond = rand(b, e, seed=first + 99, dtype=torch.float32)

    def run(f, *rest):
        return lambda *t: f(list(t[:k]), heads.HeadParams(*t[k:-1]), t[-1], grid, *rest)

    tensors = [*feats, *params, cond]
    names = ["logits", *(f"feats {i}" for i in range(k)), *heads.HeadParams._fields, "cond"]
    ours = both_ways(run(heads.discriminator_heads), tensors)
    rounded = both_ways(run(rounding.discriminator_heads, BF16), [t.double() for t in tensors])
    near(names, ours, rounded)
    reference = run(heads.reference_discriminator_heads)     # gradients are left to the kinks
    with torch.no_grad():
        plain = bench.lower(reference, torch.device(DEVICE), BF16)(*tensors)
        twice(names[:1], ours[:1], [plain], [reference(*tensors)])


def test_a_ladd_step_in_bf16_is_near_the_one_in_fp32():
    """Losses to a percent, and every gradient of some size in the same direction."""
    ours = ladd_step(kernels.load("triton"), True, (0,), "cuda", BF16)
    exact = ladd_step(kernels.load("torch"), True, (0,), "cuda", torch.float32)
    for name, e in exact.items():
        if name.startswith("loss"):
            assert_close(name, ours[name], e, 1e-2)
        elif e.norm() > 1e-4 * max(g.norm() for g in exact.values()):
            assert F.cosine_similarity(ours[name].flatten(), e.flatten(), 0) > .97, name


@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_adamw(beta1):
    """Against float64, by the size of the step; a large tensor, and two that are not aligned."""
    sizes = (300, 1536), (38,), (5, 7)
    draw = lambda seed: [rand(*size, seed=seed + i, dtype=torch.float32)
                         for i, size in enumerate(sizes)]
    weights, grads, firsts, averages = draw(1), draw(2), draw(3) if beta1 else None, draw(4)
    seconds, copies = [v.square() for v in draw(5)], [w.to(BF16) for w in weights]
    exact = [xs and [x.double() for x in xs] for xs in (weights, grads, firsts, seconds, averages)]
    start, rest = [w.clone() for w in weights], (1e-2, beta1, 0.95, 0.1, 1e-8, 0.7, 3)
    factor = torch.tensor(0.3, device=DEVICE)
    optimizer.adamw(weights, grads, firsts, seconds, averages, copies, factor, *rest)
    optimizer.reference_adamw(*exact, [None] * len(sizes), factor.double(), *rest)
    for w, e, s, ema, copied, average in zip(weights, exact[0], start, averages, copies, exact[4]):
        assert_close("step", w.double() - s.double(), e - s.double(), 1e-4)
        assert_close("EMA", ema.double(), average, 1e-6)
        assert torch.equal(copied, w.to(BF16))


def test_a_product_of_16_bits_has_its_weight_gradient_in_fp32():
    """It is nearer to the exact one than a gradient that is rounded to bf16."""
    layer, x, g = Linear(256, 512).to(DEVICE), rand(3, 100, 256, seed=1), rand(3, 100, 512, seed=2)
    layer(x).backward(g)
    exact = g.double().flatten(0, 1).T @ x.double().flatten(0, 1)
    assert_close("dw", layer.weight.grad.double(), exact, 1e-5)
    assert_close("db", layer.bias.grad.double(), g.double().sum((0, 1)), 1e-5)


def test_gelu_in_the_product_is_the_tanh_form():
    """A pass without a gradient against one with: both round to bf16, once or twice."""
    mlp, x = Mlp(256).to(DEVICE), 3 * rand(3, 100, 256)
    with torch.no_grad():
        fused = mlp(x)
    exact = mlp.double()(x.double())
    twice(["y"], [fused], [mlp.float().to(BF16)(x)], [exact])


def test_a_block_compiles_with_inductor_in_bf16():
    model, _, _ = networks(kernels.load("triton"), True, (0,), "cuda", BF16)
    block = model.joint_blocks[0].to(BF16)
    inputs = [rand(*s, seed=i) for i, s in enumerate(((2, 60, 64), (2, 154, 64), (2, 64)))]
    plain = both_ways(lambda *t: block(*t, True), inputs)
    fused = both_ways(lambda *t: torch.compile(block, fullgraph=True)(*t, True), inputs)
    for i, (a, e) in enumerate(zip(fused, plain)):
        assert_close(f"tensor {i}", a.float(), e.float(), 3e-2)


def test_a_graph_samples_what_the_network_does():
    model = networks(kernels.load("triton"), True, (0,), "cuda",
                     BF16)[0].to(BF16).requires_grad_(False)
    graphed, levels = graphs.Graphed(model), torch.tensor([1.0, 0.5, 0.0])
    text = Text(rand(3, 5, 24, seed=1), rand(3, 20, seed=2))
    for seed in range(2):
        noise = sampler.image_noise([seed, 8, 9], (4, 6, 10)).cuda()
        plain, replayed = (sampler.sample(m, noise, text, levels, "euler", [0]) for m
                           in (model, graphed))
        assert torch.equal(plain, replayed) and len(graphed.graphs) == 1


def test_fp8_products_run_and_are_near_bf16():
    model = networks(kernels.load("triton"), True, (0,), "cuda", BF16)[1].to(BF16)
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("compute capability 9.0")
    x, rest = rand(2, 4, 6, 10, seed=1, dtype=torch.float32).requires_grad_(), (
        torch.rand(2, device="cuda"), rand(2, 5, 24, seed=2), rand(2, 20, seed=3))
    found = []
    for network in (model, in_fp8(copy.deepcopy(model))):
        feats = network(x, *rest, taps=(0, 1), stop_at_last_tap=True)[1]
        dx, = torch.autograd.grad(sum(f.float().square().mean() for f in feats), x)
        found.append([*(f.detach().float() for f in feats), dx])
    for a, b in zip(*found):
        assert 1e-4 < (a - b).norm() / a.norm() < 0.1


def test_the_feed_gives_what_was_made():
    """Plain tuples, lists and NamedTuples, pinned by the thread and copied."""
    text = Text(*(torch.arange(4.) + i for i in range(3)))
    made = lambda i: (torch.full((2,), i), [text, None])
    for i, (x, (moved, none)) in enumerate(Prefetch(made, ((i,) for i in range(3)),
                                                    torch.device("cuda"))):
        assert x.tolist() == [i, i] and isinstance(moved, Text) and none is None
        assert all(t.is_cuda and t.cpu().equal(u) for t, u in zip(moved, text))


@pytest.mark.parametrize("flags", ["", "--task edit --image-guidance 1.3",
                                   "--task inpaint --lora 4"])
def test_a_short_run_ends_with_its_report(tmp_path, monkeypatch, flags):
    monkeypatch.chdir(tmp_path)
    short = ("--teacher-steps 4 --set teacher_images=256 --data-size 256 --set shard_size=64 "
             "--steps 2 --batch 16 --set heads_first=2 --n 16 --set eval_n=16 --sample-steps 2")
    train.main(f"--preset tiny --name short {short} {flags}".split())
    assert (tmp_path / "runs/short/report.png").exists()


# last, because opt-in: a kernel that leaves the GPU unusable fails no other test

def needs_gluon() -> None:
    if why := attention_gluon.missing(torch.device(DEVICE)):
        pytest.skip(why)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("l_txt, l_img", [(154, 4096), (333, 1024), (77, 113), (1, 799)])
def test_attention_in_gluon(l_txt, l_img, norm):
    needs_gluon()
    test_attention(l_txt, l_img, 64, norm, home=attention_gluon)


@pytest.mark.parametrize("scale", [1.0, 3.0, 9.0])
def test_attention_in_gluon_chooses_its_softmax(scale):
    needs_gluon()
    test_attention_chooses_its_softmax(scale, home=attention_gluon)
