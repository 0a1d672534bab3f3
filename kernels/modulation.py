"""Adaptive layer norm of a DiT block and the gated residual between two matrix products.

    modulate(x)      = LN(x) (1 + scale) + shift,
                       LN(x) = (x - mean x) / sqrt(var x + eps) over the width, no affine
    gate(x, y)       = x + gate y
    gate_modulate    = (x', modulate(x'))  with x' = x + gate y
    modulate2        = two modulations of one normalised row (the second attention of MMDiT-X)

x, branch [b, l, d]; shift, scale, gate [b, d], views of the modulation chunks with any row stride. The work
is bound by memory: gate_modulate reads 2 and writes 2 tensors of b l d. Source: Peebles & Xie 2023 (DiT),
Sec. 3.2; Esser et al. 2024 (SD3), Fig. 2.
"""
import torch
import torch.nn.functional as F
from torch import Tensor


def _acc(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def reference_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """LayerNorm(x) * (1 + scale) + shift; x [b, l, d], shift and scale [b, d]. Computed in fp32 or better."""
    y = F.layer_norm(_acc(x), x.shape[-1:], eps=eps)
    return torch.addcmul(_acc(shift).unsqueeze(1), y, 1 + _acc(scale).unsqueeze(1)).to(x.dtype)


def reference_modulate2(x: Tensor, shift: Tensor, scale: Tensor, shift2: Tensor, scale2: Tensor,
                        eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Both modulations of one normalised row: (LN(x) (1 + scale) + shift, LN(x) (1 + scale2) + shift2)."""
    return reference_modulate(x, shift, scale, eps), reference_modulate(x, shift2, scale2, eps)


def reference_gate(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    """x + gate * branch; x and branch [b, l, d], gate [b, d]."""
    return torch.addcmul(_acc(x), _acc(gate).unsqueeze(1), _acc(branch)).to(x.dtype)


def reference_gate_modulate(x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor,
                            eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """(x', LN(x') (1 + scale) + shift) with x' = x + gate * branch:
    the residual and the input of the next product."""
    x = torch.addcmul(_acc(x), _acc(gate).unsqueeze(1), _acc(branch))
    return x.to(branch.dtype), reference_modulate(x, shift, scale, eps).to(branch.dtype)
