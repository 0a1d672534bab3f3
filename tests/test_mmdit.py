"""MMDiT against a naive one, the published table, taps, early stop, students, precision, bad
input."""
import math
import re

import pytest
import torch
from conftest import TINY, VARIANTS, assert_close, rng, tiny, tiny_inputs
from torch import Tensor

import kernels
from ladd.core import flow
from ladd.core.mmdit import (LEAST_SIGMA, MMDiT, MMDiTConfig, position_table, shrunk, sinusoid,
                             widened)

all_variants = pytest.mark.parametrize("variant", VARIANTS)


# --- a naive MMDiT from the reference text: sample by sample, head by head, elementary functions
# only ---

def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3)))


def layer_norm(x: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(((x - mean) ** 2).mean(-1, keepdim=True) + 1e-6)


class Naive:
    """SD3's transformer from a state dict with published names; `one` gives v and each block's
    streams."""

    def __init__(self, state: dict[str, Tensor]):
        self.w = state
        self.depth = 1 + max(int(name.split(".")[1]) for name in state
                             if name.startswith("joint_blocks."))

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.w[f"{name}.weight"].T + self.w[f"{name}.bias"]

    def embed(self, name: str, x: Tensor) -> Tensor:
        return self.linear(f"{name}.mlp.2", silu(self.linear(f"{name}.mlp.0", x)))

    def heads_of(self, name: str, x: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """[(q, k, v)] of each head, normalised where the attention `name` has norm weights."""
        qkv, d, out = self.linear(f"{name}.qkv", x), x.shape[-1], []
        for head in range(d // 64):
            q, k, v = (qkv[:, part * d + head * 64:part * d + head * 64 + 64] for part in range(3))
            if f"{name}.ln_q.weight" in self.w:
                q = q / torch.sqrt((q ** 2).mean(-1, keepdim=True)
                                   + 1e-6) * self.w[f"{name}.ln_q.weight"]
                k = k / torch.sqrt((k ** 2).mean(-1, keepdim=True)
                                   + 1e-6) * self.w[f"{name}.ln_k.weight"]
            out.append((q, k, v))
        return out

    @staticmethod
    def attend(heads: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
        out = []
        for q, k, v in heads:
            e = torch.exp(q @ k.T / 8)                              # sqrt 64
            out.append(e / e.sum(-1, keepdim=True) @ v)
        return torch.cat(out, -1)

    def block(self, i: int, img: Tensor, txt: Tensor, c: Tensor) -> tuple[Tensor, Tensor | None]:
        xb, cb = f"joint_blocks.{i}.x_block", f"joint_blocks.{i}.context_block"
        m = self.linear(f"{xb}.adaLN_modulation.1", silu(c)).split(img.shape[-1])
        t = self.linear(f"{cb}.adaLN_modulation.1", silu(c)).split(img.shape[-1])
        img_heads = self.heads_of(f"{xb}.attn", layer_norm(img) * (1 + m[1]) + m[0])
        txt_heads = self.heads_of(f"{cb}.attn", layer_norm(txt) * (1 + t[1]) + t[0])
        joint = [tuple(torch.cat(pair) for pair in zip(a, b)) for a, b in zip(txt_heads, img_heads)]
        attended = self.attend(joint)
        l = txt.shape[0]
        new = img + m[2] * self.linear(f"{xb}.attn.proj", attended[l:])
        # reads the block's input, not `new`
        if f"{xb}.attn2.qkv.weight" in self.w:
            second = self.attend(self.heads_of(f"{xb}.attn2", layer_norm(img) * (1 + m[7]) + m[6]))
            new = new + m[8] * self.linear(f"{xb}.attn2.proj", second)
        new = new + m[5] * self.mlp(f"{xb}.mlp", layer_norm(new) * (1 + m[4]) + m[3])
        if i == self.depth - 1:
            return new, None
        txt = txt + t[2] * self.linear(f"{cb}.attn.proj", attended[:l])
        return new, txt + t[5] * self.mlp(f"{cb}.mlp", layer_norm(txt) * (1 + t[4]) + t[3])

    def mlp(self, name: str, x: Tensor) -> Tensor:
        return self.linear(f"{name}.fc2", gelu_tanh(self.linear(f"{name}.fc1", x)))

    def one(self, x: Tensor, sigma: float, context: Tensor, pooled: Tensor) -> tuple[Tensor,
                                                                                     list[tuple]]:
        w, h2, w2 = self.w, x.shape[1] // 2, x.shape[2] // 2
        angles = [1000 * sigma * math.exp(-math.log(10000) * i / 128) for i in range(128)]
        wave = [math.cos(a) for a in angles] + [math.sin(a) for a in angles]
        wave = torch.tensor(wave, dtype=torch.float64)
        c = self.embed("t_embedder", wave) + self.embed("y_embedder", pooled)
        side = math.isqrt(w["pos_embed"].shape[1])
        tokens = []
        for i in range(h2):
            for j in range(w2):
                patch = x[:, 2 * i:2 * i + 2, 2 * j:2 * j + 2]
                token = (w["x_embedder.proj.weight"] * patch).sum((1, 2,
                                                                   3)) + w["x_embedder.proj.bias"]
                tokens.append(token + w["pos_embed"][0, ((side - h2) // 2 + i) * side
                                                     + (side - w2) // 2 + j])
        img, txt, streams = torch.stack(tokens), self.linear("context_embedder", context), []
        for i in range(self.depth):
            img, txt = self.block(i, img, txt, c)
            streams.append((img, txt))
        shift, scale = self.linear("final_layer.adaLN_modulation.1", silu(c)).split(img.shape[-1])
        y = self.linear("final_layer.linear", layer_norm(img) * (1 + scale) + shift)
        v = torch.zeros(y.shape[-1] // 4, 2 * h2, 2 * w2, dtype=torch.float64)
        for i in range(h2):
            for j in range(w2):
                for p in range(2):
                    for q in range(2):
                        for ch in range(v.shape[0]):
                            v[ch, 2 * i + p, 2 * j + q] = y[i * w2 + j, (2 * p + q) * v.shape[0]
                                                            + ch]
        return v, streams


@all_variants
def test_equals_the_naive_one(variant):
    model, (x, sigma, context, pooled) = tiny(variant), tiny_inputs()
    found = []
    for block in model.joint_blocks:
        block.register_forward_hook(lambda module, args, out: found.append(out))
    with torch.no_grad():
        v = model(x, sigma, context, pooled)
    naive = Naive(model.state_dict())
    expected = [naive.one(x[b], sigma[b].item(), context[b], pooled[b]) for b in range(2)]
    assert_close("v", v, torch.stack([e[0] for e in expected]))
    for i, (img, txt) in enumerate(found):
        assert_close(f"image tokens after block {i}", img,
                     torch.stack([e[1][i][0] for e in expected]))
        if i < model.config.depth - 1:
            assert_close(f"text tokens after block {i}", txt,
                         torch.stack([e[1][i][1] for e in expected]))
    # the last text block is pre-only
    assert found[-1][1] is None


# --- published layout ---

def published(depth: int, d: int, qk_norm: bool, dual: tuple[int, ...], context: int, pooled: int,
              side: int) -> dict[str, tuple[int, ...]]:
    table = {"pos_embed": (1, side * side, d), "x_embedder.proj.weight": (d, 4, 2, 2),
             "x_embedder.proj.bias": (d,)}

    def linear(name: str, out: int, inp: int) -> None:
        table.update({f"{name}.weight": (out, inp), f"{name}.bias": (out,)})

    def attention(name: str, with_proj: bool) -> None:
        linear(f"{name}.qkv", 3 * d, d)
        if with_proj:
            linear(f"{name}.proj", d, d)
        if qk_norm:
            table.update({f"{name}.ln_q.weight": (64,), f"{name}.ln_k.weight": (64,)})

    linear("t_embedder.mlp.0", d, 256), linear("t_embedder.mlp.2", d, d)
    linear("y_embedder.mlp.0", d, pooled), linear("y_embedder.mlp.2", d, d)
    linear("context_embedder", d, context)
    for i in range(depth):
        for stream, last in (("x_block", False), ("context_block", i == depth - 1)):
            name = f"joint_blocks.{i}.{stream}"
            attention(f"{name}.attn", not last)
            second = stream == "x_block" and i in dual
            linear(f"{name}.adaLN_modulation.1", (9 if second else 2 if last else 6) * d, d)
            if second:
                attention(f"{name}.attn2", True)
            if not last:
                linear(f"{name}.mlp.fc1", 4 * d, d), linear(f"{name}.mlp.fc2", d, 4 * d)
    linear("final_layer.adaLN_modulation.1", 2 * d, d), linear("final_layer.linear", 4 * 4, d)
    return table


@all_variants
def test_names_and_shapes_are_the_published_ones(variant):
    changes = VARIANTS[variant]
    expected = published(3, 128, changes.get("qk_norm", False), changes.get("dual_blocks", ()), 24,
                         20, 12)
    assert {name: tuple(t.shape) for name, t in tiny(variant).state_dict().items()} == expected


@pytest.mark.parametrize("depth, changes, parameters, table",
                         [(24, {}, 2_028_328_000, 56_623_104),
                          (24, dict(qk_norm=True, dual_blocks=tuple(range(13)), pos_grid=384),
                           2_243_171_520, 226_492_416),
                          (38, dict(qk_norm=True), 8_056_627_520, 89_653_248)],
                         ids=["sd3-medium", "sd3.5-medium", "sd3.5-large"])
def test_published_sizes(depth, changes, parameters, table):
    with torch.device("meta"):
        model = MMDiT(MMDiTConfig(depth, 64 * depth, 4096, 2048, **changes), kernels.load("torch"))
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert [(name, b.numel()) for name, b in model.named_buffers()] == [("pos_embed", table)]


def test_x0_prediction_is_the_same_network_read_another_way():
    """v = (x - output) / sigma: x0_hat is the output at any level of a sampler; at 0 v stays
    finite."""
    network, other = tiny("qk_norm"), tiny("qk_norm", predicts="x0")
    other.load_state_dict(network.state_dict())
    x, sigma, context, pooled = tiny_inputs()
    output, v = network(x, sigma, context, pooled), other(x, sigma, context, pooled)
    assert_close("v", v, (x - output) / sigma[:, None, None, None])
    assert_close("x0_hat", flow.to_x0(x, v, sigma), output)
    v, feats = other(x, sigma, context, pooled, taps=(0, 2))
    assert_close("v with taps", v, (x - output) / sigma[:, None, None, None])
    assert_close("taps", feats[1], network(x, sigma, context, pooled, taps=(2,))[1][0])
    zero = torch.zeros_like(sigma)
    expected = (x - network(x, zero, context, pooled)) / LEAST_SIGMA
    assert_close("v at 0", other(x, zero, context, pooled), expected)
    with pytest.raises(ValueError, match=r"predicts must be 'v' or 'x0' \(got 'eps'\)"):
        tiny(predicts="eps")


# --- image conditioning ---

def condition(channels: int = 3, b: int = 2, h: int = 6, w: int = 10) -> Tensor:
    return torch.randn(b, channels, h, w, generator=rng(11)).double()


def test_an_image_is_read_as_channels_behind_those_of_x():
    """v, taps and the gradient to the image are those of the network called with both in one
    tensor; a network that predicts x0 makes its v from x alone."""
    inputs, image = tiny_inputs(), condition().requires_grad_()
    model, clean = tiny("dual", in_channels=7), tiny("dual", in_channels=7, predicts="x0")
    together = torch.cat([inputs[0], image], 1)
    v, feats = model(*inputs, image, taps=(0, 2))
    whole, whole_feats = model(together, *inputs[1:], taps=(0, 2))
    assert torch.equal(v, whole) and all(map(torch.equal, feats,
                                             whole_feats)) and v.shape == inputs[0].shape
    grads = [torch.autograd.grad(out.square().sum(), image)[0] for out in (v, whole)]
    assert torch.equal(*grads) and grads[0].abs().flatten(2).amax(2).min() > 0
    x, sigma = inputs[:2]
    assert_close("v of x0", clean(*inputs, image), (x - whole) / sigma[:, None, None, None])
    moved = (model(*inputs, image.flip(0)) - v).abs()
    # each sample reads its own
    assert moved.flatten(1).amax(1).min() > 1e-3
    # as precise as x, not as it came
    single = model(*(t.float() for t in inputs), image.double())
    assert single.dtype == torch.float32


@pytest.mark.parametrize("x, image", [((2, 4, 6, 10), (2, 4, 6, 10)), ((2, 4, 6, 10), (2, 3, 10,
                                                                                       6)),
                                      ((2, 4, 6, 10), (1, 3, 6, 10)), ((2, 4, 6, 10), None),
                                      ((2, 7, 6, 10), (2, 3, 6, 10)), ((2, 4, 6, 10), (3, 6, 10))],
                         ids=str)
def test_an_image_of_a_wrong_shape_is_refused(x, image):
    """Other channels, size, batch, rank; none where channels are missing; one where x has them
    all."""
    image = None if image is None else torch.zeros(image).double()
    with pytest.raises(ValueError, match=r"MMDiT: (x|image) must be \[.*\(got \["):
        tiny(in_channels=7)(torch.zeros(x).double(), *tiny_inputs()[1:], image)
    with pytest.raises(ValueError,
                       match=r"MMDiT: image must be \[2, 0, 6, 10\] \(got \[2, 3, 6, 10\]\)"):
        tiny()(*tiny_inputs(), condition())


@pytest.mark.parametrize("variant, predicts", [("plain", "v"), ("dual", "x0")])
def test_widened_starts_as_the_base_and_learns_the_image(variant, predicts):
    base, inputs, image = tiny(variant, predicts=predicts), tiny_inputs(), condition()
    kept = {k: t.clone() for k, t in base.state_dict().items()}
    sizes, tensors = widened(base, 7)
    wide = MMDiT(sizes, base.kernels, torch.float64).double()
    wide.load_state_dict(tensors)
    assert (sizes.in_channels, sizes.out_channels, sizes.depth) == (7, 4, base.config.depth)
    name = "x_embedder.proj.weight"
    assert tensors.keys() == kept.keys()
    assert all(torch.equal(t, kept[k]) for k, t in tensors.items() if k != name)
    assert torch.equal(tensors[name][:, :4], kept[name]) and not tensors[name][:, 4:].any()
    for other in (image, -5 * image.flip(0)):
        v, feats = wide(*inputs, other, taps=(1,))
        plain, plain_feats = base(*inputs, taps=(1,))
        assert_close("v", v, plain, 1e-12)
        assert_close("tap", feats[0], plain_feats[0], 1e-12)
    wide(*inputs, image).square().sum().backward()
    assert wide.x_embedder.proj.weight.grad[:, 4:].abs().amax((0, 2, 3)).min() > 1e-3
    assert all(torch.equal(t, kept[k]) for k, t in base.state_dict().items())
    same, tensors = widened(base, 4)
    assert same == base.config and torch.equal(tensors[name], kept[name])
    with pytest.raises(ValueError, match=r"in_channels must be at least the base's, 4 \(got 3\)"):
        widened(base, 3)


# --- embeddings ---

@pytest.mark.parametrize("grid, step", [(192, 3), (384, 6), (12, 12 / 64)])
def test_position_table(grid, step):
    table = position_table(grid, 64)
    assert table.shape == (1, grid * grid, 64) and table.dtype == torch.float32
    for row, column in ((0, 0), (1, 0), (0, 1), (5, 9), (grid - 1, grid - 3)):
        expected = []
        for index in (column, row):                                  # column first
            angles = [index / step * 10000 ** (-j / 16) for j in range(16)]
            expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
        found = table[0, row * grid + column]
        assert_close(f"row {row}, column {column}", found, torch.tensor(expected), 2e-7)


@pytest.mark.parametrize("h, w", [(1, 12), (3, 5), (4, 5), (12, 12)])
def test_positions_are_the_centre_crop(h, w):
    model = tiny()
    rows = [((12 - h) // 2 + i) * 12 + (12 - w) // 2 + j for i in range(h) for j in range(w)]
    assert torch.equal(model.positions(h, w), model.pos_embed[:, rows])


def test_sinusoid_is_cos_then_sin_of_1000_sigma():
    sigma = torch.tensor([0.0, 0.37, 1.0], dtype=torch.float64)
    wave = sinusoid(sigma)
    for b, s in enumerate(sigma.tolist()):
        for i in (0, 1, 64, 127):
            angle = 1000 * s * 10000 ** (-i / 128)
            assert abs(wave[b, i] - math.cos(angle)) < 1e-10
            assert abs(wave[b, 128 + i] - math.sin(angle)) < 1e-10
    # bf16 angles of 1000 are off by radians
    assert sinusoid(sigma.bfloat16()).dtype == torch.float32


def test_initialisation():
    """Blocks are the identity and v is 0 at the start; products are Xavier's, the patches' too."""
    model = MMDiT(MMDiTConfig(**{**TINY, **VARIANTS["dual"]}), kernels.load("torch"))
    v, feats = model(*tiny_inputs(dtype=torch.float32), taps=(0, 1, 2))
    assert not v.any() and torch.equal(feats[0], feats[2]) and feats[0].std() > 0.1
    for name, fan in (("x_embedder.proj", 16 + 128),
                      ("joint_blocks.1.context_block.mlp.fc1", 128 + 512)):
        weight = model.get_parameter(f"{name}.weight")
        assert_close(name, weight.abs().max(), torch.tensor(math.sqrt(6 / fan)), 0.02)


# --- taps ---

@all_variants
@pytest.mark.parametrize("taps", [(0,), (0, 2), (1,), (0, 1, 2)])
def test_taps_are_the_block_outputs_and_stopping_changes_nothing(variant, taps):
    model, inputs = tiny(variant), tiny_inputs()
    hooked = {}
    for i, block in enumerate(model.joint_blocks):
        block.register_forward_hook(lambda module, args, out, i=i: hooked.update({i: out[0]}))
    x, *rest = inputs
    x_full, x_stopped = x.clone().requires_grad_(), x.clone().requires_grad_()
    v, feats = model(x_full, *rest, taps=taps)
    assert len(feats) == len(taps) and all(torch.equal(f, hooked[i]) for f, i in zip(feats, taps))
    assert_close("v with taps", v, model(x, *rest))

    none, stopped = model(x_stopped, *rest, taps=taps, stop_at_last_tap=True)
    assert none is None
    for i, (f, s) in enumerate(zip(feats, stopped)):
        assert_close(f"tap {taps[i]}", s, f)
    weights = [torch.randn(f.shape, dtype=f.dtype) for f in feats]
    grads = [torch.autograd.grad(sum((w * f).sum() for w, f in zip(weights, fs)), leaf)[0]
             for fs, leaf in ((feats, x_full), (stopped, x_stopped))]
    assert grads[0].abs().min() > 0
    assert_close("gradient of x", grads[1], grads[0])


def counting(calls: list) -> kernels.Kernels:
    """The references, which note (name, tokens of the first tensor, need_txt) of every call."""
    def counted(name, function):
        def call(*args, **kwargs):
            tokens = next(a.shape[1] for a in args if isinstance(a, Tensor))
            calls.append((name, tokens, kwargs.get("need_txt", True)))
            return function(*args, **kwargs)
        return call
    return kernels.Kernels(*(counted(n, f) for n, f in kernels.load("torch")._asdict().items()))


@all_variants
def test_stopping_runs_no_later_block_and_no_text_branch_of_the_last_one(variant):
    calls, text, image = [], 5, 15
    model = tiny(variant, ops=counting(calls), depth=5)
    model(*tiny_inputs(), taps=(0, 2), stop_at_last_tap=True)
    joint = [c for c in calls if c[0] == "joint_attention" and c[1] == text]
    assert joint == [("joint_attention", text, True)] * 2 + [("joint_attention", text, False)]
    assert sum(c[0] == "joint_attention" and c[1] == image for c
               in calls) == len(model.config.dual_blocks)
    after = calls[calls.index(joint[-1]) + 1:]
    # no text projection, residual or MLP
    assert after and all(c[1] == image for c in after)
    calls.clear()
    model(*tiny_inputs())
    assert [c[2] for c in calls if c[0] == "joint_attention"
            and c[1] == text] == [True] * 4 + [False]


# --- students ---

@pytest.mark.parametrize("full, depth, keep", [(7, 4, (0, 2, 4, 6)), (5, 2, (0, 4)), (4, 1, (3,)),
                                               (3, 3, (0, 1, 2))])
def test_shrunk_takes_the_right_blocks(full, depth, keep):
    teacher = tiny("dual", depth=full, dual_blocks=(0, 1, 2))
    config, tensors = shrunk(teacher, depth)
    student = MMDiT(config, kernels.load("torch"), torch.float64).double()
    student.load_state_dict(tensors)
    assert student.config.depth == depth
    assert student.config.dual_blocks == tuple(i for i, j in enumerate(keep) if j < 3)
    theirs, ours = teacher.state_dict(), student.state_dict()
    for name, value in ours.items():
        m = re.match(r"joint_blocks\.(\d+)(.*)", name)
        source = f"joint_blocks.{keep[int(m[1])]}{m[2]}" if m else name
        assert torch.equal(value, theirs[source]), name
    inputs = tiny_inputs()
    x, sigma, context, pooled = inputs
    assert_close("v", student(*inputs)[0], Naive(ours).one(x[0], sigma[0].item(), context[0],
                                                           pooled[0])[0])


def test_shrunk_refuses_a_depth_out_of_range():
    for depth in (-1, 4):
        with pytest.raises(ValueError, match=rf"depth must be 1 to .*3 \(got {depth}\)"):
            shrunk(tiny(), depth)
    assert shrunk(tiny(), 0)[0] == shrunk(tiny(), 3)[0] == tiny().config


# --- precision and input ---

def test_bf16_compute_keeps_fp32_masters():
    wide, narrow = tiny("dual", torch.float32), tiny("dual", torch.float32)
    narrow.compute_dtype = torch.bfloat16
    inputs = tiny_inputs(dtype=torch.float32)
    target = torch.randn_like(inputs[0])
    for model in (wide, narrow):
        v, feats = model(*inputs, taps=(1,))
        assert v.dtype == torch.float32 and feats[0].dtype == model.compute_dtype
        (v - target).square().mean().backward()
    v, reference = narrow(*inputs), wide(*inputs)
    assert 1e-4 < (v - reference).norm() / reference.norm() < 2e-2   # bf16 is at work, and close
    for (name, p), q in zip(narrow.named_parameters(), wide.parameters()):
        assert p.dtype == torch.float32 and (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            assert p.grad.dtype == torch.float32, name
            assert (p.grad - q.grad).norm() <= 0.1 * q.grad.norm() + 1e-7, name


def moved_by_adamw(model: MMDiT) -> float:
    """Share of the weights with a gradient that one AdamW step at lr 1e-6 changes."""
    before = [p.detach().clone() for p in model.parameters()]
    model(*tiny_inputs(dtype=torch.float32)).square().mean().backward()
    torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0).step()
    live = [(p, b, p.grad != 0) for p, b in zip(model.parameters(), before) if p.grad is not None]
    return sum(((p != b) & g).sum().item() for p, b, g in live) / sum(g.sum().item() for _, _, g
                                                                      in live)


def test_small_steps_do_not_vanish():
    model = tiny(dtype=torch.float32)
    model.compute_dtype = torch.bfloat16
    assert moved_by_adamw(model) > 0.99
    # what bf16 weights do: the test can tell
    assert moved_by_adamw(tiny(dtype=torch.bfloat16)) < 0.2


BAD_INPUT = {
    "channels": lambda x, sigma, context, pooled: (x[:, :3], sigma, context, pooled),
    "rank": lambda x, sigma, context, pooled: (x[0], sigma, context, pooled),
    "odd height": lambda x, sigma, context, pooled: (x[:, :, :5], sigma, context, pooled),
    "odd width": lambda x, sigma, context, pooled: (x[..., :9], sigma, context, pooled),
    "too large": lambda x, sigma, context, pooled: (x.repeat(1, 1, 5, 1), sigma, context, pooled),
    "sigma": lambda x, sigma, context, pooled: (x, sigma[:1], context, pooled),
    "context batch": lambda x, sigma, context, pooled: (x, sigma, context[:1], pooled),
    "context width": lambda x, sigma, context, pooled: (x, sigma, context[..., :9], pooled),
    "pooled width": lambda x, sigma, context, pooled: (x, sigma, context, pooled[:, :9])}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_input_of_a_wrong_shape_is_refused(case):
    with pytest.raises(ValueError, match=r"MMDiT: .* must be \[.*\(got \["):
        tiny()(*BAD_INPUT[case](*tiny_inputs()))


@pytest.mark.parametrize("taps, stop, message", [
    ((3,), False, "taps.*3"), ((-1,), False, "taps.*3"), ((1, 0), False, "ascending"),
    ((1, 1), False, "ascending"), ((), True, "stop_at_last_tap")])
def test_wrong_taps_are_refused(taps, stop, message):
    with pytest.raises(ValueError, match=message):
        tiny()(*tiny_inputs(), taps=taps, stop_at_last_tap=stop)


@pytest.mark.parametrize("changes", [dict(width=96), dict(depth=0), dict(dual_blocks=(3,)),
                                     dict(dual_blocks=(-1,))], ids=str)
def test_wrong_sizes_are_refused(changes):
    with pytest.raises(ValueError, match=r"MMDiT: .* must be .*\(got "):
        MMDiTConfig(**{**TINY, **changes})
