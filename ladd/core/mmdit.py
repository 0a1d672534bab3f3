"""MMDiT and MMDiT-X, the transformers of SD3 and SD3.5: teacher and student are this one class.

Letters: b batch, c channels, h w latent height and width, p patch, l tokens of a stream, n heads,
dh head width, d width. Parameter names are those of the published single-file checkpoints, so that
their weights load without a map. Source: Esser et al. 2024 (SD3), Sec. 4 and Fig. 2; the second,
image-only attention is that of SD3.5-medium.
"""
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from einops import rearrange
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from kernels import Kernels

HEAD_DIM = 64
SINUSOID_WIDTH = 256        # width of the sinusoidal embedding of the noise level
BASE_GRID = 64           # positions span [0, 64) whatever the size of the stored table
LEAST_SIGMA = 0.02       # smallest divisor where a network predicts x0 and v is computed from it


def image_channels(task: str) -> int:
    """Return the channels of Text.image for a task."""
    # edit: the latents of the source; inpaint: the mask and the masked latents
    return {"text": 0, "edit": 16, "inpaint": 17}[task]


class Text(NamedTuple):
    """Conditioning of an MMDiT, model(x, sigma, *text): text, and the image to edit or inpaint."""
    context: Tensor                # [b, l, context_dim]
    pooled: Tensor                 # [b, pooled_dim]
    image: Tensor | None = None    # [b, e, h, w], concatenated to the channels of x; zeros: none

    def map(self, function: Callable[[Tensor], Tensor]) -> "Text":
        """Return the Text of function(each tensor)."""
        return Text(*(None if t is None else function(t) for t in self))

    def to(self, *args) -> "Text":
        """Return the Text on another device or in another dtype."""
        return self.map(lambda t: t.to(*args))


def cat(texts: Sequence[Text]) -> Text:
    """Return one batch of all `texts`, which must all have an image or all have none."""
    return Text(*(None if parts[0] is None else torch.cat(parts) for parts in zip(*texts)))


@dataclass(frozen=True)
class MMDiTConfig:
    """Sizes of an MMDiT; head_dim is 64, so width must be a multiple of 64."""
    depth: int                           # joint blocks
    width: int                           # d
    context_dim: int                     # of a text token
    pooled_dim: int                      # of the pooled text embedding
    in_channels: int = 16                # of x, plus those of the image conditioning
    out_channels: int = 16               # of x
    patch: int = 2
    qk_norm: bool = False                # RMS norm of queries and keys (SD3.5)
    dual_blocks: tuple[int, ...] = ()    # blocks with a second, image-only attention (SD3.5-medium)
    pos_grid: int = 192                  # side of the stored position table, in patches
    predicts: str = "v"                  # output of the final layer: "v" (SD3), or "x0", from
                                         # which forward computes v

    def __post_init__(self):
        if self.predicts not in ("v", "x0"):
            raise ValueError(f"MMDiT: predicts must be 'v' or 'x0' (got {self.predicts!r})")
        if self.width % HEAD_DIM or self.depth < 1:
            raise ValueError(f"MMDiT: width must be a multiple of {HEAD_DIM} and depth at least 1 "
                             f"(got width {self.width}, depth {self.depth})")
        if any(not 0 <= i < self.depth for i in self.dual_blocks):
            raise ValueError("MMDiT: dual_blocks must be block indices below depth, "
                             f"{self.depth} (got {self.dual_blocks})")


class MixedProduct(torch.autograd.Function):
    """Multiply x in 16 bits by an fp32 weight [n, k], of which `copy` is the value in 16 bits.

        y = x copy^T + bias,    dx = g copy,    dweight = g^T x,    dbias = sum of g over rows

    On a GPU the product that computes the gradient of the weight also stores it in fp32: it is
    neither rounded to 16 bits nor converted afterwards. (Compiled, Inductor's product of a single
    row does round it: a modulation's with a micro-batch of 1.)
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, copy: Tensor) -> Tensor:
        ctx.save_for_backward(x, copy)
        ctx.dtype = weight.dtype
        return F.linear(x, copy, bias.to(x.dtype))

    @staticmethod
    @once_differentiable               # dx depends on the weight, but copy has no gradient
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, ...]:
        x, copy = ctx.saved_tensors
        rows = g.flatten(0, -2)                                                # [rows, n]
        dx = g @ copy if ctx.needs_input_grad[0] else None
        # on the CPU torch has no such product, and such a sum is slower
        stored = {} if g.device.type == "cpu" else {"out_dtype": ctx.dtype}
        dw = torch.mm(rows.t(), x.flatten(0, -2), **stored).to(ctx.dtype)
        db = rows.sum(0, dtype=stored.get("out_dtype")).to(ctx.dtype)
        return dx, dw, db, None


class Linear(nn.Linear):
    """A linear layer that computes in its input's dtype.

    fp32 master weights thus serve a bf16 pass, and their gradients arrive in fp32. `copy` is the
    weight in that dtype; without one each pass makes its own. Whoever sets it keeps it equal to the
    weight (ladd.engine.optimizer).
    """

    copy: Tensor | None = None

    def rounded(self, dtype: torch.dtype) -> Tensor:
        """Return the weight in `dtype`, without a gradient."""
        return self.weight.detach().to(dtype) if self.copy is None else self.copy

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == self.weight.dtype or not self.weight.requires_grad:
            return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))
        return MixedProduct.apply(x, self.weight, self.bias, self.rounded(x.dtype))


def mlp(*widths: int) -> nn.Sequential:
    """Return Linear, SiLU, Linear: entries 0 and 2, as published checkpoints number them."""
    return nn.Sequential(Linear(widths[0], widths[1]), nn.SiLU(), Linear(widths[1], widths[2]))


class Embedder(nn.Module):
    """Embedding of the noise level or the pooled text: two linear layers named mlp.0 and mlp.2."""

    def __init__(self, in_dim: int, width: int):
        super().__init__()
        self.mlp = mlp(in_dim, width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)


class PatchEmbed(nn.Module):
    """The patch convolution, computed as a matrix product on [b, l, c p p]."""

    def __init__(self, patch: int, channels: int, width: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        w = self.proj.weight
        x = rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=w.shape[2], q=w.shape[3])
        return F.linear(x, w.flatten(1).to(x.dtype), self.proj.bias.to(x.dtype))


class Attention(nn.Module):
    """The weights of one stream's attention: qkv (stacked), proj, and the norms of q and k."""

    def __init__(self, width: int, qk_norm: bool, pre_only: bool = False):
        super().__init__()
        self.qkv = Linear(width, 3 * width)
        if qk_norm:
            self.ln_q, self.ln_k = nn.RMSNorm(HEAD_DIM, eps=1e-6), nn.RMSNorm(HEAD_DIM, eps=1e-6)
        if not pre_only:
            self.proj = Linear(width, width)

    def project(self, x: Tensor) -> Tensor:
        return self.qkv(x).unflatten(-1, (3, -1, HEAD_DIM))                    # [b, l, 3, n, dh]

    def norm(self) -> tuple[Tensor, Tensor] | None:
        return (self.ln_q.weight, self.ln_k.weight) if hasattr(self, "ln_q") else None


class Mlp(nn.Module):
    """fc2(gelu(fc1 x)) with the tanh form of GELU."""

    def __init__(self, width: int):
        super().__init__()
        self.fc1, self.fc2 = Linear(width, 4 * width), Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        fc1 = self.fc1
        if torch.is_grad_enabled() or x.device.type == "cpu" or type(fc1) is not Linear:
            return self.fc2(F.gelu(fc1(x), approximate="tanh"))
        # The product adds bias and GELU before it stores: nobody needs the input of GELU. On a GPU
        # its GELU is the tanh form (cuBLASLt), on the CPU it is not.
        h = torch._addmm_activation(fc1.bias.to(x.dtype), x.flatten(0, -2),
                                    fc1.rounded(x.dtype).t(), use_gelu=True)
        return self.fc2(h.unflatten(0, x.shape[:-1]))                          # [b, l, 4 d]


class Stream(nn.Module):
    """The weights of one stream in one block; JointBlock.forward computes with them.

    `chunks` is the number of modulation vectors: 6 (shift, scale, gate of the attention, then of
    the MLP); 9 with a second attention (its shift, scale, gate last); 2 for the text stream of the
    last block, which only supplies keys and values.
    """

    def __init__(self, width: int, qk_norm: bool, chunks: int):
        super().__init__()
        self.chunks = chunks
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(width, chunks * width))
        self.attn = Attention(width, qk_norm, pre_only=chunks == 2)
        if chunks == 9:
            self.attn2 = Attention(width, qk_norm)
        if chunks > 2:
            self.mlp = Mlp(width)

    def modulation(self, cond: Tensor) -> tuple[Tensor, ...]:
        return self.adaLN_modulation[1](cond).chunk(self.chunks, -1)           # each [b, d]


class JointBlock(nn.Module):
    """One MMDiT block: both streams modulated, one joint attention, gated residuals, gated MLPs."""

    def __init__(self, config: MMDiTConfig, index: int, kernels: Kernels):
        super().__init__()
        self.kernels = kernels
        width, last = config.width, index == config.depth - 1
        self.context_block = Stream(width, config.qk_norm, 2 if last else 6)
        self.x_block = Stream(width, config.qk_norm, 9 if index in config.dual_blocks else 6)

    def forward(self, x_img: Tensor, x_txt: Tensor, cond: Tensor,
                need_txt: bool) -> tuple[Tensor, Tensor | None]:
        """Return (x_img, x_txt) after the block.

        Without need_txt the text stream is not computed beyond its projection to queries, keys and
        values; x_txt is None.
        """
        k, img, txt = self.kernels, self.x_block, self.context_block
        m, t = img.modulation(cond), txt.modulation(cond)

        # attention
        h_txt = k.modulate(x_txt, t[0], t[1])
        if img.chunks == 9:
            h_img, h_img2 = k.modulate2(x_img, m[0], m[1], m[6], m[7])
        else:
            h_img = k.modulate(x_img, m[0], m[1])
        a_txt, a_img = k.joint_attention(txt.attn.project(h_txt), img.attn.project(h_img),
                                         txt.attn.norm(), img.attn.norm(), need_txt=need_txt)

        # image stream
        branch, gate = img.attn.proj(a_img.flatten(2)), m[2]
        if img.chunks == 9:
            x_img = k.gate(x_img, branch, gate)
            a_img2 = k.joint_attention(None, img.attn2.project(h_img2), None, img.attn2.norm())[1]
            branch, gate = img.attn2.proj(a_img2.flatten(2)), m[8]
        x_img, h_img = k.gate_modulate(x_img, branch, gate, m[3], m[4])
        x_img = k.gate(x_img, img.mlp(h_img), m[5])
        if not need_txt:
            return x_img, None

        # text stream
        x_txt, h_txt = k.gate_modulate(x_txt, txt.attn.proj(a_txt.flatten(2)), t[2], t[3], t[4])
        return x_img, k.gate(x_txt, txt.mlp(h_txt), t[5])


class FinalLayer(nn.Module):
    """Modulated norm and projection to p p c values per token."""

    def __init__(self, width: int, out_dim: int, kernels: Kernels):
        super().__init__()
        self.kernels = kernels
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(width, 2 * width))
        self.linear = Linear(width, out_dim)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation[1](cond).chunk(2, -1)
        return self.linear(self.kernels.modulate(x, shift, scale))


def sinusoid(sigma: Tensor) -> Tensor:
    """Return [cos, sin] of 1000 sigma f_i, f_i = 10000^(-i / 128), in fp32 or better.

    sigma [b] -> [b, 256].
    """
    half = SINUSOID_WIDTH // 2
    acc = torch.float64 if sigma.dtype == torch.float64 else torch.float32
    f = torch.exp(-math.log(10000) / half * torch.arange(half, dtype=acc, device=sigma.device))
    angle = 1000 * sigma.to(acc)[:, None] * f
    return torch.cat([angle.cos(), angle.sin()], -1)


def position_table(grid: int, width: int) -> Tensor:
    """Return the fixed 2-D sin-cos table [1, grid^2, width] of SD3.

    The first half of each vector encodes the column, the second half the row, each as [sin | cos].
    """
    pos = torch.arange(grid, dtype=torch.float64) * BASE_GRID / grid
    omega = 10000 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angle = pos[:, None] * omega
    axis = torch.cat([angle.sin(), angle.cos()], 1)                          # [grid, d / 2]
    columns = axis.expand(grid, -1, -1)                                      # [row, column, d / 2]
    rows = axis[:, None].expand(-1, grid, -1)
    return torch.cat([columns, rows], -1).reshape(1, grid * grid, width).float()


class MMDiT(nn.Module):
    """The transformer that predicts the velocity v = eps - x0 from a noised latent and its text.

    compute_dtype is the dtype of activations; parameters keep theirs (fp32 master weights with
    bf16 compute while training).

    With predicts="x0" the final layer returns x0_hat, and v = (x - x0_hat) / max(sigma,
    LEAST_SIGMA). A narrow network then need not carry the noise, which fills every dimension of a
    patch, through its width (Li & He 2025, "Back to Basics", JiT). SD3's weights predict v.
    """

    def __init__(self, config: MMDiTConfig, kernels: Kernels,
                 compute_dtype: torch.dtype = torch.float32):
        super().__init__()
        self.config, self.kernels, self.compute_dtype = config, kernels, compute_dtype
        d = config.width
        self.register_buffer("pos_embed", position_table(config.pos_grid, d))
        self.x_embedder = PatchEmbed(config.patch, config.in_channels, d)
        self.t_embedder = Embedder(SINUSOID_WIDTH, d)
        self.y_embedder = Embedder(config.pooled_dim, d)
        self.context_embedder = Linear(config.context_dim, d)
        self.joint_blocks = nn.ModuleList(
            JointBlock(config, i, kernels) for i in range(config.depth))
        self.final_layer = FinalLayer(d, config.patch ** 2 * config.out_channels, kernels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize as DiT does (Peebles & Xie 2023): every block starts as the identity."""
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                if "adaLN_modulation" in name or name == "final_layer.linear":
                    nn.init.zeros_(module.weight)
                else:
                    nn.init.xavier_uniform_(module.weight.flatten(1))
                nn.init.zeros_(module.bias)

    def positions(self, h: int, w: int) -> Tensor:
        """Return the centre crop [1, h w, d] of the position table, h and w in patches."""
        s = self.config.pos_grid
        top, left = (s - h) // 2, (s - w) // 2
        table = self.pos_embed.view(1, s, s, -1)[:, top:top + h, left:left + w]
        return table.flatten(1, 2)

    def check(self, x: Tensor, sigma: Tensor, context: Tensor, pooled: Tensor, image: Tensor | None,
              taps: Sequence[int]) -> None:
        """Raise ValueError unless the inputs of forward have the shapes that it names."""
        c, p = self.config, self.config.patch
        b, h, w = x.shape[0], x.shape[-2], x.shape[-1]
        own = c.in_channels if image is None else c.out_channels
        if x.ndim != 4 or x.shape[1] != own or h % p or w % p or max(h, w) > p * c.pos_grid:
            raise ValueError(f"MMDiT: x must be [b, {own}, h, w], h and w multiples of {p} and at "
                             f"most {p * c.pos_grid} (got {list(x.shape)})")
        if image is not None and image.shape != (b, c.in_channels - own, h, w):
            raise ValueError(f"MMDiT: image must be {[b, c.in_channels - own, h, w]} (got "
                             f"{list(image.shape)})")
        if (sigma.shape != (b,) or pooled.shape != (b, c.pooled_dim)
                or context.ndim != 3 or context.shape[::2] != (b, c.context_dim)):
            raise ValueError(f"MMDiT: sigma, context, pooled must be [{b}], [{b}, l, "
                             f"{c.context_dim}], [{b}, {c.pooled_dim}] (got {list(sigma.shape)}, "
                             f"{list(context.shape)}, {list(pooled.shape)})")
        if any(not 0 <= i < c.depth for i in taps) or list(taps) != sorted(set(taps)):
            raise ValueError(f"MMDiT: taps must be ascending block indices below {c.depth} (got "
                             f"{tuple(taps)})")

    def forward(self, x: Tensor, sigma: Tensor, context: Tensor, pooled: Tensor,
                image: Tensor | None = None, taps: Sequence[int] = (),
                stop_at_last_tap: bool = False) -> Tensor | tuple[Tensor | None, list[Tensor]]:
        """Return v [b, c, h, w] in the dtype of x; with taps (v, feats).

        feats are the image tokens [b, l, d] after the blocks `taps`; with stop_at_last_tap the
        pass ends after the last of them, and v is None. x [b, c, h, w]; sigma [b] in [0, 1];
        context [b, l, context_dim]; pooled [b, pooled_dim]; image [b, in_channels - c, h, w],
        conditioning without noise. Raise ValueError where a shape does not fit.
        """
        self.check(x, sigma, context, pooled, image, taps)
        if stop_at_last_tap and not taps:
            raise ValueError("MMDiT: taps must have at least one block with stop_at_last_tap (got "
                             "none)")
        dtype, p = self.compute_dtype, self.config.patch
        grid = x.shape[-2] // p, x.shape[-1] // p
        cond = self.t_embedder(sinusoid(sigma).to(dtype)) + self.y_embedder(pooled.to(dtype))
        # The SiLU is entry 0 of every adaLN_modulation; it is computed once for all blocks.
        cond = F.silu(cond)                                                    # [b, d]
        inputs = x if image is None else torch.cat([x, image.to(x)], 1)        # [b, c + e, h, w]
        x_img = self.x_embedder(inputs.to(dtype)) + self.positions(*grid).to(dtype)   # [b, l, d]
        x_txt = self.context_embedder(context.to(dtype))                       # [b, l, d]
        feats, last = [], (taps[-1] if stop_at_last_tap else self.config.depth - 1)
        for i, block in enumerate(self.joint_blocks[:last + 1]):
            x_img, x_txt = block(x_img, x_txt, cond, i < last)
            if i in taps:
                feats.append(x_img)
        if stop_at_last_tap:
            return None, feats
        v = rearrange(self.final_layer(x_img, cond), "b (h w) (p q c) -> b c (h p) (w q)",
                      h=grid[0], p=p, q=p).to(x.dtype)
        if self.config.predicts == "x0":
            v = (x - v) / sigma.to(x.dtype).clamp(min=LEAST_SIGMA)[:, None, None, None]
        return (v, feats) if taps else v


def shrunk(teacher: MMDiT, depth: int) -> tuple[MMDiTConfig, dict[str, Tensor]]:
    """Return (sizes, weights by name) of a student that starts as `depth` blocks of the teacher
    (0: all).

    The blocks are taken evenly, the first and the last among them. The tensors are the teacher's
    own.
    """
    full, dual = teacher.config.depth, teacher.config.dual_blocks
    depth = depth or full
    if not 1 <= depth <= full:
        raise ValueError(f"student depth must be 1 to the teacher's, {full} (got {depth})")
    keep = [full - 1]
    if depth > 1:
        keep = [round(i * (full - 1) / (depth - 1)) for i in range(depth)]
    tensors = {k: v for k, v in teacher.state_dict().items() if not k.startswith("joint_blocks.")}
    for i, j in enumerate(keep):
        block = teacher.joint_blocks[j].state_dict()
        tensors |= {f"joint_blocks.{i}.{k}": v for k, v in block.items()}
    dual = tuple(i for i, j in enumerate(keep) if j in dual)
    return replace(teacher.config, depth=depth, dual_blocks=dual), tensors


def widened(base: MMDiT, in_channels: int) -> tuple[MMDiTConfig, dict[str, Tensor]]:
    """Return (sizes, weights by name) of a network with `in_channels` that starts as `base`.

    The weights of the added input channels are zero. The other tensors are the base's own.
    """
    more = in_channels - base.config.in_channels
    if more < 0:
        raise ValueError(f"in_channels must be at least the base's, {base.config.in_channels} "
                         f"(got {in_channels})")
    tensors, name = base.state_dict(), "x_embedder.proj.weight"
    tensors[name] = F.pad(tensors[name], (0, 0, 0, 0, 0, more))            # [d, c + more, p, p]
    return replace(base.config, in_channels=in_channels), tensors
