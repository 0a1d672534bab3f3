"""AdamW in one pass: the kernel under Triton's interpreter, and the networks that it trains."""
import copy
import math
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import assert_close, rng, tiny, tiny_inputs
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from kernels import optimizer
from ladd.core import lora
from ladd.core.mmdit import Linear, MMDiT, MMDiTConfig
from ladd.engine.optimizer import AdamW

BF16 = torch.bfloat16
interpreted = pytest.mark.skipif(optimizer.triton is None or not optimizer.INTERPRET,
                                 reason="needs Triton and TRITON_INTERPRET=1")
# ragged, whole blocks, several blocks, one number, nothing
SIZES = (37,), (64, 64), (90, 100), (), (0, 3)
LR, BETA2, DECAY, EPS, KEPT = 1e-2, 0.95, 0.1, 1e-8, 0.7


def tensors(dtype: torch.dtype, sizes=SIZES, seed: int = 0) -> dict[str, list[Tensor]]:
    """Weights, moments as after many steps, EMA, and fp16 copies: to bf16 the interpreter truncates
    where a GPU rounds."""
    g = rng(seed)
    draw = lambda: [torch.randn(size, generator=g, dtype=torch.float64).to(dtype) for size in sizes]
    found = {"weights": draw(), "firsts": draw(), "seconds": [v.square() for v in draw()],
             "averages": draw()}
    return found | {"copies": [w.half() for w in found["weights"]]}


def grads_of(state: dict[str, list[Tensor]], seed: int) -> list[Tensor]:
    return [3 * torch.randn(w.shape, generator=rng(seed)).to(w) for w in state["weights"]]


def advance(function, state: dict, beta1: float, t: int, factor: float = 0.3) -> None:
    function(state["weights"], grads_of(state, t), state["firsts"] if beta1 else None,
             state["seconds"], state["averages"], state["copies"],
             torch.tensor(factor, dtype=state["weights"][0].dtype), LR, beta1, BETA2, DECAY, EPS,
             KEPT, t)


@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_the_reference_is_adamw_number_by_number(beta1):
    """In float64, by the formula of the paper."""
    state, expected = tensors(torch.float64), tensors(torch.float64)
    for t in (5, 6):
        advance(optimizer.reference_adamw, state, beta1, t)
        for i, grad in enumerate(grads_of(expected, t)):
            w, m, v, ema = (expected[k][i].view(-1) for k in ("weights", "firsts", "seconds",
                                                              "averages"))
            for j, g in enumerate((0.3 * grad).flatten().tolist()):
                v[j] = BETA2 * v[j] + (1 - BETA2) * g ** 2
                mean = g
                if beta1:
                    m[j] = mean = beta1 * m[j] + (1 - beta1) * g
                size = math.sqrt(v[j] / (1 - BETA2 ** t)) + EPS
                w[j] -= LR * DECAY * w[j] + LR * mean / (1 - beta1 ** t) / size
                ema[j] = KEPT * ema[j] + (1 - KEPT) * w[j]
    for name in ("weights", "firsts", "seconds", "averages"):
        for a, e in zip(state[name], expected[name]):
            assert_close(name, a, e)
    assert all(map(torch.equal, state["copies"], (w.half() for w in state["weights"])))


def formula(state: dict[str, list[Tensor]], grads: list[Tensor], beta1: float, t: int,
            ema: bool = True, decay: float = DECAY) -> None:
    """The formula at the top of the file in fp32, operation by operation, rounded after each. numpy
    rounds square roots correctly, as the interpreter does; torch's on the CPU are an ulp off in a
    sixth of all values."""
    f, root = np.float32, (1 - BETA2 ** t) ** 0.5
    rate, eps = f(LR * root / (1 - beta1 ** t)), f(EPS * root)
    for i, g in enumerate(grads):
        w, m, v, average = (state[k][i].numpy() for k in ("weights", "firsts", "seconds",
                                                          "averages"))
        g = g.numpy() * f(0.3)
        v[...] = v * f(BETA2) + g * g * f(1 - BETA2)
        if beta1:
            m[...] = g = m * f(beta1) + g * f(1 - beta1)
        w[...] = w * f(1 - LR * decay) - rate * g / (np.sqrt(v) + eps)
        if ema:
            average[...] = average + (w - average) * f(1 - KEPT)
        if state["copies"][i] is not None:
            state["copies"][i].copy_(state["weights"][i])


@interpreted
@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_the_kernel_is_its_formula_bit_for_bit(beta1):
    ours, theirs = tensors(torch.float32), tensors(torch.float32)
    for state in (ours, theirs):                # a tensor that starts at an odd place; no copy
        state["weights"][1] = torch.cat([torch.zeros(1), state["weights"][1].flatten()])[1:]
        for name in ("firsts", "seconds", "averages", "copies"):
            state[name][1] = state[name][1].flatten()
        state["copies"][2] = None
    written = [t for name in ("weights", "averages", "copies") for t in ours[name]
               if t is not None]
    versions = [t._version for t in written]
    for t in (1, 2):
        formula(theirs, grads_of(theirs, t), beta1, t)
        advance(optimizer.adamw, ours, beta1, t)
    for name, expected in theirs.items():
        for a, e in zip(ours[name], expected):
            assert a is e is None or torch.equal(a, e), name
    # autograd sees that the tensors have changed
    assert all(t._version > v for t, v in zip(written, versions))


@interpreted
def test_what_the_kernel_may_leave_out():
    """EMA and copies are optional, and gradients stay as they are."""
    ours, theirs = tensors(torch.float32), tensors(torch.float32)
    grads = grads_of(ours, 1)
    optimizer.adamw(ours["weights"], grads, None, ours["seconds"], None, [None] * len(SIZES),
                    torch.tensor(0.3), LR, 0.0, BETA2, 0.0, EPS, 0.0, 4)
    assert all(map(torch.equal, grads, grads_of(ours, 1)))
    formula(theirs, grads, 0.0, 4, ema=False, decay=0.0)
    for name in ("weights", "seconds", "averages"):
        assert all(map(torch.equal, ours[name], theirs[name]))


@interpreted
def test_the_kernel_is_the_reference():
    """To fp32 rounding: the reference is torch's operator, which rounds less often."""
    ours, theirs = tensors(torch.float32), tensors(torch.float32)
    for t in (1, 2):
        advance(optimizer.adamw, ours, 0.9, t)
        advance(optimizer.reference_adamw, theirs, 0.9, t)
    for name, expected in theirs.items():
        for a, e in zip(ours[name], expected):
            assert_close(name, a.float(), e.float(), 1e-6 if name != "copies" else 1e-3)


@interpreted
@pytest.mark.parametrize("change, message", [
    (dict(grads=[torch.zeros(3)]), r"grad must be contiguous \[2, 3\] .* \(got \[3\] of"),
    (dict(seconds=[torch.zeros(3, 2).t()]), r"second must be contiguous .* of strides \(1, 2\)"),
    (dict(weights=[torch.zeros(2, 3).double()]), r"weight must be .* torch.float32 on .*float64"),
    (dict(copies=[torch.zeros(2, 3)]), r"copy must be .* one of torch.bfloat16, torch.float16"),
    (dict(copies=[torch.zeros(2, 3).to(BF16), torch.zeros(2, 3).half()]),
     r"copies must have one dtype \(got torch.bfloat16, torch.float16\)"),
    (dict(firsts=[torch.zeros(2, 3)]), r"firsts must be None where beta1 is 0, and only there"),
    (dict(averages=[]), "shorter")])
def test_what_the_kernel_does_not_take(change, message):
    names = "weights", "grads", "firsts", "seconds", "averages", "copies"
    given = {name: [torch.zeros(2, 3)] for name in names} | {"firsts": None, "copies": [None]}
    with pytest.raises(ValueError, match=message):
        optimizer.adamw(*(given | change).values(), torch.ones(()), LR, 0.0, BETA2, 0.0, EPS, 0.0,
                        1)


# networks

def mixed(seed: int = 0, **changes) -> MMDiT:
    """A network of fp32 weights that computes in bf16."""
    model = tiny("dual", torch.float32, seed, **changes)
    model.compute_dtype = BF16
    return model


def loss_of(model: MMDiT, seed: int = 1) -> Tensor:
    return model(*tiny_inputs(dtype=torch.float32, seed=seed)).square().mean()


def train(model: MMDiT, adam: AdamW | None, steps: int = 1) -> None:
    for i in range(steps):
        loss_of(model, 10 + i).backward()
        adam.step()


def current(model: MMDiT) -> bool:
    """Whether each linear layer multiplies with the weight that it has."""
    layers = [m for m in model.modules() if isinstance(m, Linear)]
    return all(layer.copy.equal(layer.weight.to(BF16)) for layer in layers)


class Casts(TorchDispatchMode):
    """Count conversions of matrices between fp32 and bf16, by shape, and operators."""

    def __init__(self):
        super().__init__()
        self.shapes, self.ops = Counter(), Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        self.ops[op] += 1
        if op is torch.ops.aten._to_copy.default:
            self.shapes[tuple(out.shape)] += 1
        return out


ROUND = torch.ops.aten._foreach_copy_.default        # weights to their copies


def on_meta() -> tuple[MMDiT, tuple[Tensor, ...]]:
    """A network of two blocks and its inputs on a device that stands for a GPU."""
    with torch.device("meta"):
        model = MMDiT(MMDiTConfig(2, 128, 24, 20, 4, 4), kernels.load("torch"), BF16)
        return model, (torch.empty(2, 4, 8, 8), torch.empty(2), torch.empty(2, 5, 24),
                       torch.empty(2, 20))


def test_a_step_converts_no_weight_and_no_gradient():
    """On a device that has the product in fp32, which "meta" stands for. Before the first pass all
    weights are rounded at once; the patch embedding, a convolution, has no copy."""
    model, inputs = on_meta()
    layers = AdamW(model, 1e-3, 0.0, 0.99).layers
    weights = {tuple(layer.weight.shape) for layer in layers}
    with Casts() as casts:
        for _ in range(2):
            model(*inputs).sum().backward()
    assert casts.ops[ROUND] == 1
    assert casts.ops[torch.ops.aten.mm.dtype] == 2 * len(layers) == 2 * 24
    assert not weights & casts.shapes.keys()
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}
    # the count is of something: without copies each pass converts each weight
    for layer in layers:
        layer.copy = None
    model._forward_pre_hooks.clear()
    with Casts() as casts:
        model(*inputs)
    assert sum(casts.shapes[shape] for shape in weights) == len(layers)


def test_gradients_are_those_without_copies_bit_for_bit():
    plain, kept = mixed(), mixed()
    AdamW(kept, 1e-3, 0.0, 0.99)
    for model in (plain, kept):
        loss_of(model).backward()
    for (name, a), b in zip(plain.named_parameters(), kept.parameters()):
        assert a.grad is b.grad is None or a.grad.equal(b.grad), name


def test_the_product_of_a_bf16_pass_has_the_gradients_of_its_formula():
    """Against float64 products of the bf16 factors; dtypes, and what needs no gradient."""
    layer, x = Linear(24, 40), torch.randn(3, 5, 24, generator=rng(1)).to(BF16).requires_grad_()
    g = torch.randn(3, 5, 40, generator=rng(2)).to(BF16)
    layer(x).backward(g)
    rows, flat = g.double().flatten(0, 1), x.detach().double().flatten(0, 1)
    assert_close("dx", x.grad, (g.double() @ layer.weight.to(BF16).double()).to(BF16))
    assert_close("dw", layer.weight.grad, (rows.T @ flat).float(), 1e-2)    # rounded on the CPU
    assert_close("db", layer.bias.grad, rows.sum(0).float(), 1e-2)
    x.grad = layer.weight.grad = layer.bias.grad = None
    layer.requires_grad_(False)(x).backward(g)
    assert layer.weight.grad is layer.bias.grad is None and x.grad is not None
    assert_close("y", layer(x), (flat @ layer.weight.to(BF16).double().T + layer.bias.to(BF16)
                                 ).view(3, 5, 40).to(BF16))


def test_the_product_has_no_second_derivative():
    """Of dx with respect to the weight it would lack a part without an error."""
    x = torch.randn(3, 24).to(BF16).requires_grad_()
    dx, = torch.autograd.grad(Linear(24, 40)(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.square().sum().backward()


def test_a_frozen_layer_keeps_no_input():
    """Of a frozen fp32 weight only the input's gradient is computed, as in ladd.dpo."""
    layer, x, kept = Linear(24, 40), torch.randn(3, 24).to(BF16).requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape), lambda t: t):
        layer(x)
        assert x.shape in kept and len(kept) == 2
        layer.requires_grad_(False)(x)
    assert x.shape not in kept[2:] and len(kept) == 3           # the weight, to multiply with


def test_gelu_is_in_the_product_where_no_gradient_is_kept():
    """One operator instead of two; not where the layer does more than a product."""
    model, inputs = on_meta()

    def gelus() -> tuple[int, int]:
        with Casts() as casts:
            assert model(*inputs).shape == (2, 4, 8, 8)
        return casts.ops[torch.ops.aten.gelu.default], casts.ops[torch.ops.aten._addmm_activation
                                                                 .default]

    assert gelus() == (3, 0)                   # the last block has no text
    with torch.no_grad():
        assert gelus() == (0, 3)
        lora.add(model, 4, 4.0, ("mlp.fc1",), rng())
        assert gelus() == (3, 0)


def test_copies_follow_the_weights():
    """After a step, which needs no further pass over the weights; after any other change."""
    model = mixed()
    plain = model.kernels.adamw

    def stepped(weights, *rest) -> None:       # as the kernel does, which torch's operator does not
        plain(weights, *rest)
        torch.autograd.graph.increment_version(weights)

    model.kernels = model.kernels._replace(adamw=stepped)
    adam = AdamW(model, 1e-2, 0.0, 0.99)
    before = loss_of(model).item()
    assert current(model)
    train(model, adam, 2)
    assert current(model)
    with Casts() as casts:
        moved = loss_of(model).item()
    assert moved != before and not casts.ops[ROUND]
    model.load_state_dict(mixed().state_dict())
    assert loss_of(model).item() == before and current(model)
    layer = model.joint_blocks[0].x_block.mlp.fc1
    with torch.no_grad():
        layer.weight.mul_(2), layer.bias.mul_(2)
    with Casts() as casts:
        changed = loss_of(model).item()
    assert changed != before and current(model)
    assert casts.ops[ROUND] == 1


def test_copies_follow_other_weights():
    """Whose count of changes is that of the weights before them."""
    model = copy.deepcopy(mixed())
    layers = AdamW(model, 1e-2, 0.0, 0.99).layers
    loss_of(model)
    counts = [layer.weight._version for layer in layers]
    model.load_state_dict({k: 2 * t for k, t in model.state_dict().items()}, assign=True)
    assert counts == [layer.weight._version for layer in layers]
    loss_of(model)
    assert current(model)
    with torch.no_grad():
        for layer in layers:
            layer.weight.mul_(2)
    twin = copy.deepcopy(model)                 # whose weights begin to count at 0
    loss_of(twin)
    assert current(twin)


def test_a_step_marks_only_the_copies_that_it_makes():
    """Not that of a weight without a gradient; two optimizers have the same copies."""
    model = mixed()
    adam, other = (AdamW(model, 1e-2, 0.0, 0.99) for _ in range(2))
    loss_of(model).backward()
    embedder = model.context_embedder
    embedder.weight.grad = None
    with torch.no_grad():
        embedder.weight.mul_(2)
    adam.step()
    loss_of(model)
    assert current(model)
    train(model, other)
    assert current(model)
    train(model, adam)
    assert current(model)


def test_a_deep_copy_has_its_own_copies():
    model = mixed()
    adam = AdamW(model, 1e-2, 0.0, 0.99)
    train(model, adam)
    twin, before = copy.deepcopy(model), loss_of(model).item()
    train(model, adam)
    with torch.no_grad():
        twin.final_layer.linear.weight.mul_(2)
    assert loss_of(twin).item() != before != loss_of(model).item()
    assert current(model) and current(twin)


@pytest.mark.slow
def test_compiled_blocks_read_the_copies():
    model, eager = mixed(depth=1, dual_blocks=()), mixed(depth=1, dual_blocks=())
    for net in (model, eager):
        net.adam = AdamW(net, 1e-2, 0.0, 0.99)
    for block in model.joint_blocks:
        block.compile(fullgraph=True)
    for net in (model, eager):
        train(net, net.adam, 2)
    assert_close("loss", loss_of(model), loss_of(eager), 1e-2)
    before = loss_of(model).item()
    with torch.no_grad():
        model.joint_blocks[0].x_block.mlp.fc1.weight.zero_()
    assert loss_of(model).item() != before and current(model)


@pytest.mark.slow
def test_compiled_blocks_have_the_same_operators():
    """Forward with a gradient, backward and without one, of both blocks as torch.compile sees
    them: every weight gradient is stored in fp32, no matrix is converted."""
    (model, inputs), graphs = on_meta(), []

    def keep(graph, _):
        graphs.append(Counter(node.target for node in graph.graph.nodes))
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()              # what another test compiled would be for any size
    layers = AdamW(model, 1e-3, 0.0, 0.99).layers
    for block in model.joint_blocks:
        block.compile(fullgraph=True, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep))
    model(*inputs).sum().backward()
    with torch.no_grad():
        model(*inputs)
    forward, backward, without = (sum(pair, Counter()) for pair in (graphs[:2], graphs[2:4],
                                                                    graphs[4:]))
    aten, inside = torch.ops.aten, len(layers) - 7         # the others are in no block
    assert forward[aten.addmm.default] == backward[aten.mm.dtype] == inside == 17
    assert forward[aten.gelu.default] == without[aten._addmm_activation.default] == 3
    assert without[aten.addmm.default] == inside - 3 and not without[aten.gelu.default]


def test_only_16_bits_and_trained_weights_have_copies():
    assert not AdamW(tiny("plain", torch.float32), 1e-3, 0.0, 0.99).layers
    model = mixed().to(BF16)                         # frozen, with a LoRA in fp32
    lora.add(model, 4, 4.0, lora.ATTENTION, rng())
    adam = AdamW(model, 1e-3, 0.0, 0.99)
    assert not adam.layers and set(adam.params) == set(lora.parameters(model))
    train(model, adam)


@pytest.mark.parametrize("size, factor", [(0.01, 1.0), (100.0, 0.01)])
def test_only_large_gradients_are_scaled(size, factor):
    model, seen = mixed(depth=1, dual_blocks=()), []
    model.kernels = model.kernels._replace(adamw=lambda *args: seen.append(float(args[6])))
    adam = AdamW(model, 1e-2, 0.0, 0.99)
    count = sum(p.numel() for p in model.parameters())
    for p in model.parameters():
        p.grad = torch.full_like(p, size / count ** 0.5)
    adam.step()
    assert seen == [pytest.approx(factor, rel=1e-4)]


def test_momentum_needs_a_first_moment_and_nothing_else_does():
    with_, without = (AdamW(mixed(), 1e-3, beta1, 0.99).state() for beta1 in (0.9, 0.0))
    count = len(list(mixed().parameters()))
    assert len(with_) == 2 * count + 1 and len(without) == count + 1


def test_the_ema_and_the_gradients_after_a_step():
    model, ema = mixed(), mixed(seed=1).requires_grad_(False)
    before = {k: p.clone() for k, p in ema.named_parameters()}
    adam = AdamW(model, 1e-2, 0.0, 0.99, ema=ema)
    loss_of(model).backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    norms = adam.step(0.75)
    assert_close("norm", norms.total, norm, 1e-4)
    for (name, p), average in zip(model.named_parameters(), ema.parameters()):
        assert p.grad is None
        stays = "context_block.attn.ln_q" in name and "blocks.2" in name      # it has no gradient
        expected = before[name] if stays else torch.lerp(before[name], p.detach(), 0.25)
        assert_close(name, average, expected)
