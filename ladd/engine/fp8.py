"""Matrix products in fp8 (e4m3) for a frozen network: forward, and the gradient of the input.

    y  = (q(x) q(W)^T) s_x s_W + bias,    dx = (q(g) q(W)) s_g s_W'

q divides each row by s = its largest entry / 448 and rounds to e4m3. There is one s per token for x
and g, per output channel for W, per input channel for the W of dx. A GPU of compute capability 9.0
multiplies fp8 at twice the rate of bf16, and two fp8 copies of W take the memory of one in bf16.
Our choice.
"""
import torch
from torch import Tensor, nn

from ladd.core.mmdit import Linear, MMDiT

LARGEST = torch.finfo(torch.float8_e4m3fn).max


def quantised(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return (x / s rounded to e4m3 [m, n], s [m, 1] in fp32); s is a row's largest entry / 448."""
    s = x.abs().amax(1, keepdim=True).float().clamp_min(1e-12) / LARGEST
    return (x.float() / s).to(torch.float8_e4m3fn), s


class Product(torch.autograd.Function):
    """Multiply x [m, k] in bf16 by the transpose of the weight (q [n, k], s [n, 1]).

    The gradient of x is the product with the transposed weight (q_t [k, n], s_t [k, 1]), so no
    activation is kept.
    """

    @staticmethod
    def forward(ctx, x: Tensor, q: Tensor, s: Tensor, q_t: Tensor, s_t: Tensor) -> Tensor:
        ctx.save_for_backward(q_t, s_t)
        return scaled(x, q, s)

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, ...]:
        return scaled(g, *ctx.saved_tensors), None, None, None, None


def scaled(x: Tensor, q: Tensor, s: Tensor) -> Tensor:
    """Return x (q s)^T, with x quantised on the way."""
    qx, sx = quantised(x)
    return torch._scaled_mm(qx, q.t(), scale_a=sx, scale_b=s.t(), out_dtype=x.dtype)


class Fp8Linear(nn.Module):
    """Frozen linear layer whose products are in fp8; input and output are bf16."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        weight = layer.weight.detach()
        for suffix, matrix in (("", weight), ("_t", weight.t().contiguous())):
            q, s = quantised(matrix)
            self.register_buffer("q" + suffix, q)
            self.register_buffer("s" + suffix, s)
        self.register_buffer("bias", layer.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        y = Product.apply(x.flatten(0, -2), self.q, self.s, self.q_t, self.s_t)
        return y.view(*x.shape[:-1], -1) + self.bias


def in_fp8(model: MMDiT) -> MMDiT:
    """Replace, in place, the blocks' layers over tokens by fp8 ones; return the network.

    Modulation, embedders and the output layer stay in bf16: they see few rows or set the scale.
    Raise ValueError if the network trains, computes in another dtype or has a LoRA.
    """
    trains = any(p.requires_grad for p in model.parameters())
    if model.compute_dtype != torch.bfloat16 or trains:
        raise ValueError("fp8: the network must be frozen and compute in bf16 (got "
                         f"{model.compute_dtype}, trainable weights {trains})")
    if any(hasattr(layer, "lora_a") for layer in model.modules()):
        raise ValueError("fp8: the network has a LoRA; merge it first")
    for block in model.joint_blocks:
        for stream in (block.x_block, block.context_block):
            for part in ("attn", "attn2", "mlp"):
                parent = getattr(stream, part, nn.Module())     # not every stream has all three
                for name, layer in list(parent.named_children()):
                    if isinstance(layer, Linear):
                        setattr(parent, name, Fp8Linear(layer))
    return model
