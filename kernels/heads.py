"""The discriminator heads: k independent convolutional heads, one per tapped teacher block,
in one batched evaluation.

    y_k      = lrelu(GN(F_k W_in + b_in))                       1x1 convolution d -> c
    z_k      = (y_k + lrelu(GN(conv3x3(y_k)))) / sqrt 2         residual, zero padding at the borders
    logit_k  = <z_k, w_out + W_cond cond> / sqrt c + b_out      per token; projection conditioning

Letters: k head, b batch, h w token grid, d teacher width, c head width, e conditioning width. GN: group norm
over the tokens of one sample and GROUP_SIZE channels, so a logit never depends on its batch mates. The family
is StyleGAN-T's head (Sauer et al. 2023) with 2-D convolutions (Sauer et al. 2024, LADD); widths, group norm
and the place of the conditioning are our choice.
FLOPs forward: k b h w (2 d c + 18 c^2).
"""
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

GROUP_SIZE = 16      # channels a group
SLOPE = 0.2          # leaky ReLU
EPS = 1e-5


class HeadParams(NamedTuple):
    """Parameters of all heads, stacked over heads."""
    w_in: Tensor     # [k, d, c]
    b_in: Tensor     # [k, c]
    gamma1: Tensor   # [k, c]
    beta1: Tensor    # [k, c]
    w_conv: Tensor   # [k, 3, 3, c, c]  (row, column, input, output)
    b_conv: Tensor   # [k, c]
    gamma2: Tensor   # [k, c]
    beta2: Tensor    # [k, c]
    w_cond: Tensor   # [k, e, c]
    w_out: Tensor    # [k, c]
    b_out: Tensor    # [k]


def _norm_act(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """lrelu(GN(x)) of x [k, b, l, c]: statistics per head, sample and group over (l, GROUP_SIZE)."""
    g = x.unflatten(-1, (-1, GROUP_SIZE))                                      # [k, b, l, groups, GROUP_SIZE]
    var, mean = torch.var_mean(g, (2, 4), correction=0, keepdim=True)
    g = ((g - mean) * torch.rsqrt(var + EPS)).flatten(-2)
    return F.leaky_relu(torch.addcmul(beta[:, None, None], g, gamma[:, None, None]), SLOPE)


def reference_discriminator_heads(feats: list[Tensor], params: HeadParams, cond: Tensor,
                                  grid: tuple[int, int]) -> Tensor:
    """Logits [k, b, h, w] of all heads.
    feats: k tensors [b, h*w, d]; cond [b, e]; computed in fp32 or better.

    Raises ValueError where the number of taps, the grid or the widths do not fit.
    """
    (h, w), (k, d, c) = grid, params.w_in.shape
    if len(feats) != k or any(f.shape[1:] != (h * w, d) for f in feats):
        raise ValueError(f"heads: {k} features [b, {h * w}, {d}] expected for grid {h}x{w}, "
                         f"found {len(feats)} of shapes {sorted({tuple(f.shape) for f in feats})}")
    acc = torch.float64 if feats[0].dtype == torch.float64 else torch.float32
    p = HeadParams(*(t.to(acc) for t in params))
    x = torch.stack([f.to(acc) for f in feats])                                # [k, b, l, d]
    b = x.shape[1]
    y = torch.baddbmm(p.b_in[:, None], x.flatten(1, 2), p.w_in).unflatten(1, (b, h * w))
    y = _norm_act(y, p.gamma1, p.beta1)                                        # [k, b, l, c]
    padded = F.pad(y.unflatten(2, (h, w)), (0, 0, 1, 1, 1, 1))                 # [k, b, h + 2, w + 2, c]
    patches = torch.stack([padded[:, :, i:i + h, j:j + w] for i in range(3) for j in range(3)], 4)
    z = torch.baddbmm(p.b_conv[:, None], patches.reshape(k, -1, 9 * c),
                      p.w_conv.reshape(k, 9 * c, c)).view_as(y)
    z = (y + _norm_act(z, p.gamma2, p.beta2)) * 0.5 ** 0.5
    readout = (p.w_out[:, None] + cond.to(acc) @ p.w_cond) * c ** -0.5         # [k, b, c]
    return (torch.einsum("kblc,kbc->kbl", z, readout) + p.b_out[:, None, None]).unflatten(2, (h, w))
