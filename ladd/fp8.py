"""Products in fp8 (e4m3) of a frozen network: forward and gradient to the input, no gradient of the weights.

    y  = (q(x) q(W)^T) s_x s_W + bias,    dx = (q(g) q(W)) s_g s_W'

q divides a row by its largest entry / 448 and rounds to e4m3; s are these factors: one a token for x and g,
one an output channel for W, one an input channel for the W of dx. A GPU of compute capability 9.0 multiplies
fp8 at twice the rate of bf16; two fp8 copies of W take the memory of one in bf16. Our choice.
"""
import torch
from torch import Tensor, nn

from ladd.mmdit import Linear, MMDiT

LARGEST = torch.finfo(torch.float8_e4m3fn).max


def quantised(x: Tensor) -> tuple[Tensor, Tensor]:
    """(x / s rounded to e4m3 [m, n], s [m, 1] fp32) with s the largest entry of a row over 448."""
    s = x.abs().amax(1, keepdim=True).float().clamp_min(1e-12) / LARGEST
    return (x.float() / s).to(torch.float8_e4m3fn), s


class Product(torch.autograd.Function):
    """x [m, k] bf16 times the transpose of weight (q [n, k], s [n, 1]); its gradient by weight_t (q [k, n],
    s [k, 1]). Nothing is kept for it."""

    @staticmethod
    def forward(ctx, x: Tensor, q: Tensor, s: Tensor, q_t: Tensor, s_t: Tensor) -> Tensor:
        ctx.save_for_backward(q_t, s_t)
        return scaled(x, q, s)

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, ...]:
        return scaled(g, *ctx.saved_tensors), None, None, None, None


def scaled(x: Tensor, q: Tensor, s: Tensor) -> Tensor:
    qx, sx = quantised(x)
    return torch._scaled_mm(qx, q.t(), scale_a=sx, scale_b=s.t(), out_dtype=x.dtype)


class Fp8Linear(nn.Module):
    """A frozen linear layer whose products are in fp8; bf16 in and out."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        for name, weight in (("", layer.weight.detach()), ("_t", layer.weight.detach().t().contiguous())):
            q, s = quantised(weight)
            self.register_buffer("q" + name, q), self.register_buffer("s" + name, s)
        self.register_buffer("bias", layer.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        y = Product.apply(x.flatten(0, -2), self.q, self.s, self.q_t, self.s_t)
        return y.view(*x.shape[:-1], -1) + self.bias


def in_fp8(model: MMDiT) -> MMDiT:
    """The frozen bf16 network `model`, its blocks' products over tokens in fp8 from now on, in place.

    Modulation, embedders and the output layer, which see few rows or set the scale, stay in bf16.
    Raises ValueError where the network trains, computes in another dtype or has a LoRA that is not merged.
    """
    trains = any(p.requires_grad for p in model.parameters())
    if model.compute_dtype != torch.bfloat16 or trains:
        raise ValueError(f"fp8: found {model.compute_dtype}, trainable weights {trains}; a frozen bf16 "
                         "network accepted")
    if any(hasattr(layer, "lora_a") for layer in model.modules()):
        raise ValueError("fp8: found a LoRA, a network without accepted: merge and remove it")
    for block in model.joint_blocks:
        for stream in (block.x_block, block.context_block):
            for parent in (stream.attn, getattr(stream, "attn2", None), getattr(stream, "mlp", None)):
                for name, layer in list(parent.named_children() if parent is not None else ()):
                    if isinstance(layer, Linear):
                        setattr(parent, name, Fp8Linear(layer))
    return model
