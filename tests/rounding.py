"""References that round where the kernels store 16 bits, for tests of kernels in bf16 or fp16.

Rounding q and k moves a score of 40 by 0.1, and a pre-activation near 0 takes the other side of
leaky ReLU when what it is computed from is rounded. Such differences from an exact result are draws
of chance; from these references they are not. All else is in the inputs' dtype, which is float64.
"""
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import attention, heads


def stored(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x rounded to `dtype`; its gradient passes as it is."""
    return x + (x.to(dtype).to(x.dtype) - x).detach()


def gradient_stored(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x, whose gradient is rounded to `dtype` on its way back."""
    if x.requires_grad:
        x.register_hook(lambda g: g.to(dtype).to(g.dtype))
    return x


def joint_attention(qkv_txt: Tensor, qkv_img: Tensor, norm_txt: tuple[Tensor, Tensor],
                    norm_img: tuple[Tensor, Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Compute attention from normalised q and k as the kernels' first pass stores them: q with the
    factor that makes exp of the scaled scores exp2 of the product."""
    scale, streams = math.log2(math.e) / math.sqrt(qkv_img.shape[-1]), []
    for qkv, (w_q, w_k) in ((qkv_txt, norm_txt), (qkv_img, norm_img)):
        q, k, v = qkv.unbind(2)
        q = F.rms_norm(q, q.shape[-1:], w_q, 1e-6)
        k = F.rms_norm(k, k.shape[-1:], w_k, 1e-6)
        streams.append(torch.stack([stored(q * scale, dtype) / scale, stored(k, dtype), v], 2))
    return attention.reference_joint_attention(*streams)


def normalised(x: Tensor, gamma: Tensor, beta: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute lrelu(GN(x)) of x [k, b, l, c] as stored, by the statistics of x before it is."""
    groups = x.unflatten(-1, (-1, heads.GROUP_SIZE))
    var, mean = torch.var_mean(groups, (2, 4), correction=0, keepdim=True)
    xhat = ((stored(groups, dtype) - mean) * torch.rsqrt(var + heads.EPS)).flatten(-2)
    return F.leaky_relu(gamma[:, None, None] * xhat + beta[:, None, None], heads.SLOPE)


def discriminator_heads(feats: list[Tensor], params: heads.HeadParams, cond: Tensor,
                        grid: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Compute logits [k, b, h, w] with the products' weights, u, y, v and the gradients of u and v
    as stored; biases add to u and v before they are, so their gradients are not rounded."""
    (h, w), c = grid, params.w_in.shape[2]
    x, w_in, w_conv = torch.stack(feats), stored(params.w_in, dtype), stored(params.w_conv, dtype)
    u = gradient_stored(torch.einsum("kbld,kdc->kblc", x, w_in), dtype) + params.b_in[:, None, None]
    y = stored(normalised(u, params.gamma1, params.beta1, dtype), dtype)
    padded = F.pad(y.unflatten(2, (h, w)), (0, 0, 1, 1, 1, 1))             # [k, b, h + 2, w + 2, c]
    v = sum(torch.einsum("kbyxc,kcn->kbyxn", padded[:, :, i:i + h, j:j + w], w_conv[:, i, j])
            for i in range(3) for j in range(3)).flatten(2, 3)
    v = gradient_stored(v, dtype) + params.b_conv[:, None, None]
    z = (y + normalised(v, params.gamma2, params.beta2, dtype)) / math.sqrt(2)
    readout = (params.w_out[:, None] + cond @ params.w_cond) / math.sqrt(c)    # [k, b, c]
    logits = torch.einsum("kblc,kbc->kbl", z, readout) + params.b_out[:, None, None]
    return logits.unflatten(2, (h, w))
