"""Joint attention of an MMDiT: one softmax over [text, image], read from two qkv projections.

    q, k = rms(q) * w_q, rms(k) * w_k        per head and per stream, if the stream has norm weights
    out  = softmax([q_txt; q_img] [k_txt; k_img]^T / sqrt(dh)) [v_txt; v_img]

Letters: b batch, l tokens of a stream, n heads, dh head width.
Source: Esser et al. 2024 (SD3), Sec. 4 and Fig. 2.
FLOPs forward: 4 b n dh (l_txt + l_img)^2, less 4 b n dh l_txt (l_txt + l_img) without text queries.
"""
import torch
import torch.nn.functional as F
from torch import Tensor


def reference_joint_attention(qkv_txt: Tensor | None, qkv_img: Tensor,
                              norm_txt: tuple[Tensor, Tensor] | None = None,
                              norm_img: tuple[Tensor, Tensor] | None = None, eps: float = 1e-6,
                              need_txt: bool = True) -> tuple[Tensor | None, Tensor]:
    """Attention of both streams over all tokens; text first. Statistics in fp32 (float64 stays float64).

    qkv_txt, qkv_img: [b, l_*, 3, n, dh], any row stride; qkv_txt None means attention among image tokens
    only. norm_*: (w_q [dh], w_k [dh]) of the RMS norm, or None. Returns (out_txt, out_img), each
    [b, l_*, n, dh]; out_txt is None without text or with need_txt=False, which computes no text queries.
    """
    acc = torch.float64 if qkv_img.dtype == torch.float64 else torch.float32
    streams = [(qkv_img, norm_img)] if qkv_txt is None else [(qkv_txt, norm_txt), (qkv_img, norm_img)]
    qs, ks, vs = [], [], []
    for qkv, norm in streams:
        q, k, v = qkv.to(acc).transpose(1, 3).unbind(2)                        # [b, n, l, dh]
        if norm is not None:
            q, k = (F.rms_norm(x, x.shape[-1:], w.to(acc), eps) for x, w in zip((q, k), norm))
        qs.append(q), ks.append(k), vs.append(v)
    if not need_txt:
        qs = qs[-1:]
    q, k, v = torch.cat(qs, 2), torch.cat(ks, 2), torch.cat(vs, 2)
    out = F.scaled_dot_product_attention(q, k, v).to(qkv_img.dtype).transpose(1, 2)   # [b, l, n, dh]
    if len(qs) == 1:
        return None, out
    return out.split([qkv_txt.shape[1], qkv_img.shape[1]], 1)
