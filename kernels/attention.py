"""Joint attention of an MMDiT: one softmax over [text, image], read from two qkv projections.

    q, k = rms(q) * w_q, rms(k) * w_k        per head and per stream, if the stream has norm weights
    out  = softmax([q_txt; q_img] [k_txt; k_img]^T / sqrt(dh)) [v_txt; v_img]

Gradient, with p the softmax and g the gradient of out:

    delta = sum(g * out),  ds = p * (g v^T - delta)                          a row, a pair
    dv = p^T g,  dk = ds^T q / sqrt(dh),  dq = ds k / sqrt(dh)
    of x -> rms(x) w, with r = 1 / rms:
        dx = r (g w - x r mean(g w x r)),  dw = sum of g x r over rows

Letters: b batch, l tokens of a stream, n heads, dh head width; m queries and n keys of a tile.
Source: Esser et al. 2024 (SD3), Sec. 4 and Fig. 2; the tiling is that of Dao 2023
(FlashAttention-2).

FLOPs forward: 4 b n dh (l_txt + l_img)^2, less 4 b n dh l_txt (l_txt + l_img) without text queries;
backward 2.5 times that, 3.5 where torch asks for determinism. Bytes forward: qkv once, out, and
with norm weights normalised q and k once written and read; backward: the same, out and its
gradient, the gradient of qkv, and dq in fp32, which every tile of keys adds to.

In the scores, 1 / sqrt(dh) becomes log2(e) / sqrt(dh), so that exp2 serves; with norm weights the
pre-pass puts it into q. The pre-pass also finds max |q| and max |k| of each 128 rows; a program
takes the largest |k| of its head. Where |q| times |k|, which bounds the scores, is small, it needs
no running maximum: exp2 of bounded scores does not overflow.
"""
import functools
import itertools
import math
import os
import sys
import warnings
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

if __name__ == "__main__" and not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")        # before triton is imported
try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:
    triton = None

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
ARCH: int | None = None       # kernels/aot.py sets it to compile for a GPU that is not here


def reference_joint_attention(qkv_txt: Tensor | None, qkv_img: Tensor,
                              norm_txt: tuple[Tensor, Tensor] | None = None,
                              norm_img: tuple[Tensor, Tensor] | None = None, eps: float = 1e-6,
                              need_txt: bool = True) -> tuple[Tensor | None, Tensor]:
    """Compute attention of both streams over all tokens, text first.

    qkv_txt, qkv_img: [b, l_*, 3, n, dh], any row stride; qkv_txt None means attention among image
    tokens only. norm_*: (w_q [dh], w_k [dh]) of the RMS norm, or None. Returns (out_txt, out_img),
    each [b, l_*, n, dh]; out_txt is None without text or with need_txt=False, which computes no
    text queries. Statistics are computed in fp32, those of float64 in float64.
    """
    acc = torch.float64 if qkv_img.dtype == torch.float64 else torch.float32
    streams = [(qkv_img, norm_img)]
    if qkv_txt is not None:
        streams.insert(0, (qkv_txt, norm_txt))
    qs, ks, vs = [], [], []
    for qkv, norm in streams:
        q, k, v = qkv.to(acc).transpose(1, 3).unbind(2)                        # [b, n, l, dh]
        if norm is not None:
            q, k = (F.rms_norm(x, x.shape[-1:], w.to(acc), eps) for x, w in zip((q, k), norm))
        qs.append(q), ks.append(k), vs.append(v)
    if not need_txt:
        qs = qs[-1:]
    q, k, v = torch.cat(qs, 2), torch.cat(ks, 2), torch.cat(vs, 2)
    out = F.scaled_dot_product_attention(q, k, v).to(qkv_img.dtype)
    out = out.transpose(1, 2)                                              # [b, l, n, dh]
    if len(qs) == 1:
        return None, out
    return out.split([qkv_txt.shape[1], qkv_img.shape[1]], 1)


# --- kernels; a pair (x[0], x[1]) is of text and image ---

ROWS = 128        # rows of a block in the passes over rows; max |q| is kept for each such block

if triton is not None:

    @triton.jit
    def _at(rows, b, row, col, R: tl.constexpr, DH: tl.constexpr):
        """Return pointers to [R, DH] and the rows that exist; 64-bit up to the first row."""
        start, stride_b, stride_l, length = rows
        start += b.to(tl.int64) * stride_b + row * stride_l.to(tl.int64) + col
        i = tl.arange(0, R)
        return (start + i[:, None] * stride_l + tl.arange(0, DH)[None, :],
                (row + i < length)[:, None])

    @triton.jit
    def _load(x, b, row, col, R: tl.constexpr, DH: tl.constexpr):
        """Load [R, DH] of x, a descriptor or a tuple from _rows; zero beyond the last row."""
        if isinstance(x, tl.tensor_descriptor):
            tile = x.load([b, row, col]).reshape(R, DH)
        else:
            at, there = _at(x, b, row, col, R, DH)
            tile = tl.load(at, there, 0)
        return tile

    @triton.jit
    def _store(x, b, row, col, tile, R: tl.constexpr, DH: tl.constexpr):
        if isinstance(x, tl.tensor_descriptor):
            x.store([b, row, col], tile.to(x.dtype).reshape(1, R, DH))
        else:
            at, there = _at(x, b, row, col, R, DH)
            tl.store(at, tile.to(x[0].dtype.element_ty), there)

    @triton.jit
    def _product(x, y, ACC: tl.constexpr):
        return tl.dot(x, y, input_precision="ieee", out_dtype=ACC)

    @triton.jit
    def _prepare_rows(qkv, qk, w, maxima, b, head, n, row, block, blocks, EPS: tl.constexpr,
                      SCALE: tl.constexpr, FOLD: tl.constexpr, R: tl.constexpr, DH: tl.constexpr,
                      ACC: tl.constexpr):
        for i in tl.static_range(2):                                     # q, k
            x = _load(qkv, b, row, (i * n + head) * DH, R, DH).to(ACC)
            if w[i] is not None:
                # one factor after the other: with their product and fp32 weights sm_90 spilled
                # 8 bytes per thread
                x *= tl.rsqrt(tl.sum(x * x, 1) / DH + EPS)[:, None]
                x *= tl.load(w[i] + tl.arange(0, DH)).to(ACC)[None, :]
            if i == 0:
                x *= SCALE
            if FOLD:
                x = x.to(qk[0].dtype.element_ty)
                _store(qk, b, row, (i * n + head) * DH, x, R, DH)
                x = x.to(ACC)
            # a NaN may be lost here, but not in the scores: either softmax keeps it
            largest = tl.sqrt(tl.max(tl.sum(x * x, 1)))
            tl.store(maxima + ((b.to(tl.int64) * n + head) * 2 + i) * blocks + block, largest)

    @triton.jit
    def _prepare(qkv, qk, w_txt, w_img, maxima, n, blocks_txt, blocks, EPS: tl.constexpr,
                 SCALE: tl.constexpr, TXT: tl.constexpr, FOLD: tl.constexpr, R: tl.constexpr,
                 DH: tl.constexpr, ACC: tl.constexpr):
        """Store the largest norms of rows in maxima [b, n, 2, blocks]; if FOLD, also the normalised
        scaled q and the normalised k in qk."""
        head, block, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
        if TXT:
            if block < blocks_txt:
                _prepare_rows(qkv[0], qk[0], w_txt, maxima, b, head, n, block * R, block, blocks,
                              EPS, SCALE, FOLD, R, DH, ACC)
        if block >= blocks_txt:
            _prepare_rows(qkv[1], qk[1], w_img, maxima, b, head, n, (block - blocks_txt) * R, block,
                          blocks, EPS, SCALE, FOLD, R, DH, ACC)

    @triton.jit
    def _weigh(s, v, top, total, acc, ONLINE: tl.constexpr, SCALE: tl.constexpr):
        """Add a tile of scores s [m, n] and its values v [n, dh] to the softmax so far."""
        if ONLINE:
            new = tl.maximum(top, tl.max(s, 1) * SCALE)
            p = tl.exp2(s * SCALE - new[:, None])
            old = tl.exp2(top - new)
            total, acc, top = total * old, acc * old[:, None], new
        else:
            p = tl.exp2(s * SCALE)
        return top, total + tl.sum(p, 1), acc + _product(p.to(v.dtype), v, acc.dtype)

    @triton.jit
    def _key_tile(x, b, j, images, col, TXT: tl.constexpr, N: tl.constexpr, DH: tl.constexpr):
        """Load tile j of keys or values [n, dh]: the tiles of image from the last to the first,
        then those of text from the first to the last. So the cut ones are at the ends."""
        stream, tile = x[1], images - 1 - j
        if TXT:
            if j >= images:
                stream, tile = x[0], j - images
        return _load(stream, b, tile * N, col, N, DH)

    @triton.jit
    def _cut(s, j, images, l, TXT: tl.constexpr, N: tl.constexpr):
        """Return the scores s [m, n] of tile j, those of keys beyond the end as -inf."""
        row, length = (images - 1 - j) * N, l[1]
        if TXT:
            if j >= images:
                row, length = (j - images) * N, l[0]
        # not arange < length - row: ptxas would keep all indices from the first tile to the last
        return tl.where((row + tl.arange(0, N) < length)[None, :], s, -float("inf"))

    @triton.jit
    def _attend(q, k, v, b, head, n, l, ONLINE: tl.constexpr, TXT: tl.constexpr,
                SCALE: tl.constexpr, AHEAD: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
                DH: tl.constexpr, ACC: tl.constexpr):
        """Return out and lse of a tile of queries over all keys. With AHEAD the product of the next
        tile comes before the exponentials of this one: where products are asynchronous, both run at
        the same time."""
        top = tl.full([M], -float("inf") if ONLINE else 0.0, ACC)
        total, acc = tl.zeros([M], ACC), tl.zeros([M, DH], ACC)
        col_k, col_v, images = (n + head) * DH, (2 * n + head) * DH, tl.cdiv(l[1], N)
        tiles = images
        if TXT:
            tiles += tl.cdiv(l[0], N)
        if AHEAD:
            s = _product(q, _key_tile(k, b, 0, images, col_k, TXT, N, DH).T, ACC)
            s = _cut(s, 0, images, l, TXT, N)
            for j in range(tiles - 1):
                # v is loaded before the product, because waiting for it is a barrier
                tile_v = _key_tile(v, b, j, images, col_v, TXT, N, DH)
                ahead = _product(q, _key_tile(k, b, j + 1, images, col_k, TXT, N, DH).T, ACC)
                top, total, acc = _weigh(s, tile_v, top, total, acc, ONLINE, SCALE)
                s = ahead
            if TXT:
                s = _cut(s, tiles - 1, images, l, TXT, N)
            tile_v = _key_tile(v, b, tiles - 1, images, col_v, TXT, N, DH)
            top, total, acc = _weigh(s, tile_v, top, total, acc, ONLINE, SCALE)
        else:
            for j in range(tiles):
                s = _product(q, _key_tile(k, b, j, images, col_k, TXT, N, DH).T, ACC)
                tile_v = _key_tile(v, b, j, images, col_v, TXT, N, DH)
                s = _cut(s, j, images, l, TXT, N)
                top, total, acc = _weigh(s, tile_v, top, total, acc, ONLINE, SCALE)
        return acc * (1 / total)[:, None], top + tl.log2(total)

    @triton.jit
    def _forward(q_txt, q_img, k_txt, k_img, v_txt, v_img, out_txt, out_img, lse, maxima, l,
                 LIMIT: tl.constexpr, SCALE: tl.constexpr, TXT: tl.constexpr, TXT_Q: tl.constexpr,
                 AHEAD: tl.constexpr, R: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
                 DH: tl.constexpr, ACC: tl.constexpr):
        """Compute a tile of queries of either stream: rows of out [b, l, n, dh], lse [b, n, l]."""
        # Triton 3.6 and 3.7 cannot launch descriptors inside a tuple: they are single arguments
        q, out = (q_txt, q_img), (out_txt, out_img)
        k = q if k_img is None else (k_txt, k_img)
        v = k if v_img is None else (v_txt, v_img)
        tile, head, b, n = tl.program_id(0), tl.program_id(1), tl.program_id(2), tl.num_programs(1)
        at = b.to(tl.int64) * n + head
        blocks_txt, blocks = tl.cdiv(l[0], R), tl.cdiv(l[0], R) + tl.cdiv(l[1], R)
        tiles_txt, l_lse = (tl.cdiv(l[0], M), l[0] + l[1]) if TXT_Q else (0, l[1])

        # the queries, and the block of maxima that holds them; lse: text first
        queries, target, row, length = q[1], out[1], (tile - tiles_txt) * M, l[1]
        block = blocks_txt + row // R
        lse += at * l_lse + l_lse - l[1]
        if TXT_Q:
            if tile < tiles_txt:
                queries, target, row, length = q[0], out[0], tile * M, l[0]
                block = row // R
                lse += l[1] - l_lse

        # the bound of the scores chooses the softmax; the norms arrive while the queries do
        norms, others = maxima + at * 2 * blocks, tl.arange(0, 64)
        norm_q = tl.load(norms + block)
        norm_k = tl.load(norms + blocks + others, others < blocks, 0)
        tile_q = _load(queries, b, row, head * DH, M, DH)
        for i in range(64, blocks, 64):
            more = tl.load(norms + blocks + i + others, i + others < blocks, 0)
            norm_k = tl.maximum(norm_k, more)

        if norm_q * tl.max(norm_k) < LIMIT:
            acc, logs = _attend(tile_q, k, v, b, head, n, l, False, TXT, SCALE, AHEAD, M, N, DH,
                                ACC)
        else:
            acc, logs = _attend(tile_q, k, v, b, head, n, l, True, TXT, SCALE, AHEAD, M, N, DH, ACC)

        rows = row + tl.arange(0, M)
        tl.store(lse + rows, logs, rows < length)
        _store(target, b, row, head * DH, acc, M, DH)

    @triton.jit
    def _stats_rows(g, out, lse, stats, dq, b, head, row, length, block, blocks, ZERO: tl.constexpr,
                    R: tl.constexpr, DH: tl.constexpr, ACC: tl.constexpr):
        delta = tl.sum(_load(g, b, row, head * DH, R, DH).to(ACC)
                       * _load(out, b, row, head * DH, R, DH), 1)
        rows = tl.arange(0, R)
        logs = tl.load(lse + row + rows, row + rows < length, 0)
        tl.store(stats + block * R + rows, logs)
        tl.store(stats + (blocks + block) * R + rows, delta)
        if ZERO:
            to = dq + (block * R + rows)[:, None] * DH + tl.arange(0, DH)[None, :]
            tl.store(to, tl.zeros([R, DH], ACC))

    @triton.jit
    def _stats(g, out, lse, stats, dq, l, l_lse, n, blocks_txt, blocks, TXT_Q: tl.constexpr,
               ZERO: tl.constexpr, R: tl.constexpr, DH: tl.constexpr, ACC: tl.constexpr):
        """Store lse and delta by blocks in stats [b, n, 2, rows]; 0 beyond the end of a stream,
        where q and g are 0."""
        head, block, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
        at = b.to(tl.int64) * n + head
        lse, stats, dq = lse + at * l_lse, stats + at * 2 * blocks * R, dq + at * blocks * R * DH
        if TXT_Q:
            if block < blocks_txt:
                _stats_rows(g[0], out[0], lse, stats, dq, b, head, block * R, l[0], block, blocks,
                            ZERO, R, DH, ACC)
        if block >= blocks_txt:
            _stats_rows(g[1], out[1], lse + l_lse - l[1], stats, dq, b, head,
                        (block - blocks_txt) * R, l[1], block, blocks, ZERO, R, DH, ACC)

    @triton.jit
    def _norm_backward(g, x, w, EPS: tl.constexpr, DH: tl.constexpr):
        """Return the gradients of rms(x) w [r, dh] by x and, summed over rows, by w."""
        r = tl.rsqrt(tl.sum(x * x, 1) / DH + EPS)[:, None]
        x, gw = x * r, g * w[None, :]
        return r * (gw - x * (tl.sum(gw * x, 1) / DH)[:, None]), tl.sum(g * x, 0)

    @triton.jit
    def _queries(tile_k, tile_v, dk, dv, q, g, stats, dq, first, b, col, length, rows, there,
                 MASK: tl.constexpr, GRAD: tl.constexpr, DQ: tl.constexpr, HELD: tl.constexpr,
                 SCALE: tl.constexpr, M: tl.constexpr, DH: tl.constexpr):
        """Add what the queries of a stream give to dk and dv of a tile of keys, and the share of
        dq, rows from `first` on, that comes from the tile."""
        left_k, left_v, tiles = tile_k, tile_v, tl.cdiv(length, M)
        if HELD:        # wgmma takes what was computed from registers, what was loaded from memory
            left_k, left_v = tile_k + 0, tile_v + 0
        start = tl.program_id(0) % tiles        # programs of a head add to different rows of dq
        for step in range(tiles):
            i = start + step
            i -= tl.where(i < tiles, 0, tiles)
            tile_q, tile_g = _load(q, b, i * M, col, M, DH), _load(g, b, i * M, col, M, DH)
            at = stats + i * M + tl.arange(0, M)
            logs, delta = tl.load(at), tl.load(at + rows)
            p = tl.exp2(_product(left_k, tile_q.T, dk.dtype) * SCALE - logs[None, :])    # [n, m]
            if MASK:      # keys beyond the end score 0, which may be far above the others
                p = tl.where(there[:, None], p, 0)
            dp = _product(left_v, tile_g.T, dk.dtype)
            if GRAD:
                dv += _product(p.to(tile_g.dtype), tile_g, dv.dtype)
            ds = (p * (dp - delta[None, :])).to(tile_q.dtype)
            if GRAD:
                dk += _product(ds, tile_q, dk.dtype)
            if DQ:
                part = _product(ds.T, tile_k, dk.dtype)
                if isinstance(dq, tl.tensor_descriptor):
                    dq.atomic_add([(first + i * M).to(tl.int32), 0], part)
                else:
                    to = dq + (first + i * M) * DH + tl.arange(0, M)[:, None] * DH
                    tl.atomic_add(to + tl.arange(0, DH)[None, :], part, sem="relaxed")
        return dk, dv

    @triton.jit
    def _both_queries(tile_k, tile_v, q, g, stats, dq, at, b, head, l, first, rows, there,
                      MASK: tl.constexpr, GRAD: tl.constexpr, TXT_Q: tl.constexpr, DQ: tl.constexpr,
                      HELD: tl.constexpr, SCALE: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
                      DH: tl.constexpr, ACC: tl.constexpr):
        dk, dv = tl.zeros([N, DH], ACC), tl.zeros([N, DH], ACC)
        dk, dv = _queries(tile_k, tile_v, dk, dv, q[1], g[1], stats + first, dq, at * rows + first,
                          b, head * DH, l[1], rows, there, MASK, GRAD, DQ[1], HELD, SCALE, M, DH)
        if TXT_Q:
            dk, dv = _queries(tile_k, tile_v, dk, dv, q[0], g[0], stats, dq, at * rows, b,
                              head * DH, l[0], rows, there, MASK, GRAD, DQ[0], HELD, SCALE, M, DH)
        return dk, dv

    @triton.jit
    def _store_keys(dk, dv, qkv, dqkv, w, parts, b, row, head, n, WEIGHT: tl.constexpr,
                    EPS: tl.constexpr, N: tl.constexpr, DH: tl.constexpr):
        if w is not None:
            x = _load(qkv, b, row, (n + head) * DH, N, DH).to(dk.dtype)
            dk, dw = _norm_backward(dk, x, tl.load(w + tl.arange(0, DH)).to(dk.dtype), EPS, DH)
            if WEIGHT:
                tl.store(parts + tl.arange(0, DH), dw)
        _store(dqkv, b, row, (n + head) * DH, dk, N, DH)
        _store(dqkv, b, row, (2 * n + head) * DH, dv, N, DH)

    @triton.jit
    def _backward(q_txt, q_img, g_txt, g_img, k_txt, k_img, qkv_txt, qkv_img, dqkv_txt, dqkv_img, w,
                  parts, stats, dq, l, n, blocks_txt, blocks, tiles_txt, TXT: tl.constexpr,
                  TXT_Q: tl.constexpr, GRAD: tl.constexpr, WEIGHT: tl.constexpr, DQ: tl.constexpr,
                  HELD: tl.constexpr, EPS: tl.constexpr, SCALE: tl.constexpr,
                  DK_SCALE: tl.constexpr, R: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
                  DH: tl.constexpr, ACC: tl.constexpr):
        """Compute dk (through the norm), dv and the partial sum of dw_k of a tile of keys of either
        stream; add what the tile gives to dq to dq [b, n, rows, dh], a pointer or a descriptor of
        its rows. HELD: keys and values are factors in registers."""
        q, g, dqkv = (q_txt, q_img), (g_txt, g_img), (dqkv_txt, dqkv_img)
        k = q if k_img is None else (k_txt, k_img)
        qkv = k if qkv_img is None else (qkv_txt, qkv_img)
        tile, head, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
        at, rows, first = b.to(tl.int64) * n + head, blocks * R, blocks_txt * R
        stats += at * 2 * rows

        # the keys
        keys, values, row, length = k[1], qkv[1], (tile - tiles_txt) * N, l[1]
        if TXT:
            if tile < tiles_txt:
                keys, values, row, length = k[0], qkv[0], tile * N, l[0]
        tile_k = _load(keys, b, row, (n + head) * DH, N, DH)
        tile_v = _load(values, b, row, (2 * n + head) * DH, N, DH)
        there = row + tl.arange(0, N) < length

        # all queries
        if row + N <= length:
            dk, dv = _both_queries(tile_k, tile_v, q, g, stats, dq, at, b, head, l, first, rows,
                                   there, False, GRAD[0] or GRAD[1], TXT_Q, DQ, HELD, SCALE, M, N,
                                   DH, ACC)
        else:
            dk, dv = _both_queries(tile_k, tile_v, q, g, stats, dq, at, b, head, l, first, rows,
                                   there, True, GRAD[0] or GRAD[1], TXT_Q, DQ, HELD, SCALE, M, N,
                                   DH, ACC)
        dk *= DK_SCALE
        if GRAD[0]:
            if tile < tiles_txt:
                part = parts[0] + (at * tiles_txt + tile) * DH
                _store_keys(dk, dv, qkv[0], dqkv[0], w[0], part, b, row, head, n, WEIGHT[0],
                            EPS, N, DH)
        if GRAD[1]:
            if tile >= tiles_txt:
                part = parts[1] + (at * (tl.num_programs(0) - tiles_txt) + tile - tiles_txt) * DH
                _store_keys(dk, dv, qkv[1], dqkv[1], w[1], part, b, row, head, n, WEIGHT[1],
                            EPS, N, DH)

    @triton.jit
    def _keys(tile_q, tile_g, logs, delta, dq, keys, values, b, head, n, length,
              SCALE: tl.constexpr, N: tl.constexpr, DH: tl.constexpr):
        """Add what all keys of a stream give to dq of a tile of queries."""
        for j in range(tl.cdiv(length, N)):
            k = _load(keys, b, j * N, (n + head) * DH, N, DH)
            v = _load(values, b, j * N, (2 * n + head) * DH, N, DH)
            p = tl.exp2(_product(tile_q, k.T, dq.dtype) * SCALE - logs[:, None])
            p = tl.where((j * N + tl.arange(0, N) < length)[None, :], p, 0)
            ds = (p * (_product(tile_g, v.T, dq.dtype) - delta[:, None])).to(k.dtype)
            dq += _product(ds, k, dq.dtype)
        return dq

    @triton.jit
    def _backward_q(q_txt, q_img, g_txt, g_img, k_txt, k_img, v_txt, v_img, stats, dq, l, n,
                    blocks_txt, blocks, tiles_txt, TXT: tl.constexpr, TXT_Q: tl.constexpr,
                    SCALE: tl.constexpr, R: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
                    DH: tl.constexpr, ACC: tl.constexpr):
        """Compute the rows of dq of a tile of queries, summed in the same order every time."""
        q, g = (q_txt, q_img), (g_txt, g_img)
        k = q if k_img is None else (k_txt, k_img)
        v = k if v_img is None else (v_txt, v_img)
        tile, head, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
        at = (b.to(tl.int64) * n + head) * blocks * R
        queries, grads, row, first = q[1], g[1], (tile - tiles_txt) * M, blocks_txt * R
        if TXT_Q:
            if tile < tiles_txt:
                queries, grads, row, first = q[0], g[0], tile * M, 0
        tile_q, tile_g = (_load(queries, b, row, head * DH, M, DH),
                          _load(grads, b, row, head * DH, M, DH))
        rows = first + row + tl.arange(0, M)
        logs, delta = tl.load(stats + 2 * at + rows), tl.load(stats + 2 * at + blocks * R + rows)
        acc = tl.zeros([M, DH], ACC)
        acc = _keys(tile_q, tile_g, logs, delta, acc, k[1], v[1], b, head, n, l[1], SCALE, N, DH)
        if TXT:
            acc = _keys(tile_q, tile_g, logs, delta, acc, k[0], v[0], b, head, n, l[0],
                        SCALE, N, DH)
        tl.store(dq + (at + rows)[:, None] * DH + tl.arange(0, DH)[None, :], acc)

    @triton.jit
    def _finish_rows(dq, qkv, dqkv, w, parts, b, head, row, EPS: tl.constexpr,
                     DQ_SCALE: tl.constexpr, WEIGHT: tl.constexpr, R: tl.constexpr,
                     DH: tl.constexpr, ACC: tl.constexpr):
        there = (row + tl.arange(0, R) < qkv[3])[:, None]
        g = tl.load(dq + tl.arange(0, R)[:, None] * DH + tl.arange(0, DH)[None, :],
                    there, 0) * DQ_SCALE
        if w is not None:
            x = _load(qkv, b, row, head * DH, R, DH).to(ACC)
            g, dw = _norm_backward(g, x, tl.load(w + tl.arange(0, DH)).to(ACC), EPS, DH)
            if WEIGHT:
                tl.store(parts + tl.arange(0, DH), dw)
        _store(dqkv, b, row, head * DH, g, R, DH)

    @triton.jit
    def _finish(dq, qkv, dqkv, w, parts, n, blocks_txt, blocks, EPS: tl.constexpr,
                DQ_SCALE: tl.constexpr, DQ: tl.constexpr, WEIGHT: tl.constexpr, R: tl.constexpr,
                DH: tl.constexpr, ACC: tl.constexpr):
        """Store dq [b, n, rows, dh], taken through the norm, in the q part of dqkv, and the partial
        sums of dw_q."""
        head, block, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
        at = b.to(tl.int64) * n + head
        dq += (at * blocks + block) * R * DH
        if DQ[0]:
            if block < blocks_txt:
                _finish_rows(dq, qkv[0], dqkv[0], w[0], parts[0] + (at * blocks_txt + block) * DH,
                             b, head, block * R, EPS, DQ_SCALE, WEIGHT[0], R, DH, ACC)
        if DQ[1]:
            if block >= blocks_txt:
                block -= blocks_txt
                part = parts[1] + (at * (blocks - blocks_txt) + block) * DH
                _finish_rows(dq, qkv[1], dqkv[1], w[1], part, b, head, block * R, EPS, DQ_SCALE,
                             WEIGHT[1], R, DH, ACC)


# --- launchers ---

class Launch(NamedTuple):
    """Hold the launch parameters of a kernel over tiles."""
    m: int           # queries of a tile
    n: int           # keys of a tile
    warps: int
    stages: int      # tiles in flight


# (architecture, dh) -> forward, backward, backward_q (the second pass, where torch asks for
# determinism). Nothing is measured on a GPU. All rows compile without spills (Triton 3.7.1). The
# comments give, of forward and backward, the cycles of the products in a pass of the inner loop and
# what bounds that pass, by python -m kernels.aot: products / bound (resource).
TABLE = {
    # before sm_90 16 rows a warp read the other operand again and again from shared memory
    (80, 64):   (Launch(128, 64, 8, 3),  Launch(32, 64, 4, 2),  Launch(64, 64, 4, 2)),
    #            1024 / 1280 (shared)    1280 / 2720 (shared), 2 CTAs
    (80, 128):  (Launch(64, 64, 8, 2),   Launch(32, 64, 8, 2),  Launch(64, 32, 8, 2)),
    #            2048 / 4864 (shared, 2 CTAs)    1792 / 3872 (shared)
    (89, 64):   (Launch(128, 64, 8, 3),  Launch(32, 64, 4, 2),  Launch(64, 64, 4, 2)),
    #            2048 / 2048 (products)  2560 / 2720 (shared), 2 CTAs
    (89, 128):  (Launch(64, 32, 4, 2),   Launch(32, 64, 8, 2),  Launch(64, 32, 8, 2)),
    #            2048 / 2176 (shared)    3584 / 3872 (shared)
    # exponentials run under the next product; the backward holds its keys and values in registers
    (90, 64):   (Launch(128, 128, 8, 3), Launch(64, 128, 8, 3), Launch(128, 64, 8, 3)),
    #            1024 / 1056 (exp)       1280 / 1552 (shared)
    # exponentials are not under a product here
    (90, 128):  (Launch(128, 64, 8, 3),  Launch(32, 64, 8, 2),  Launch(128, 64, 8, 2)),
    #            1024 / 1568 (both)      896 / 1168 (shared)
    # overlap is assumed; tensor memory leaves two CTAs an SM forward and one backward
    (100, 64):  (Launch(128, 128, 8, 2), Launch(64, 128, 8, 2), Launch(128, 64, 4, 2)),
    #            1024 / 2080 (exp)       640 / 1424 (shared)
    (100, 128): (Launch(128, 128, 8, 2), Launch(32, 64, 8, 2),  Launch(128, 64, 8, 2)),
    #            1024 / 1296 (shared)    320 / 1264 (shared)
}
LIKE = {86: 89, 87: 80, 103: 100, 120: 89, 121: 89}          # take the rows of another architecture
# for any other architecture
CONSERVATIVE = Launch(64, 32, 4, 1), Launch(32, 32, 4, 1), Launch(32, 32, 4, 1)
# small, so that the short inputs of tests have several tiles
INTERPRETED = Launch(64, 32, 4, 1), Launch(32, 64, 4, 1), Launch(32, 32, 4, 1)
announced: set[int] = set()


@functools.cache
def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _arch(device: torch.device) -> int:
    """Return major * 10 + minor of the GPU to compile for, 0 for the interpreter."""
    if ARCH is not None or INTERPRET:
        return ARCH or 0
    return _capability(device)


def _tma(device: torch.device) -> bool:
    """Return whether tiles are copied by descriptors (TMA) and products are asynchronous; the
    interpreter takes descriptors too. Elsewhere, also on sm_120, copies by pointers are
    asynchronous and products are not."""
    return _arch(device) in (0, 90, 100, 103)


def _launches(x: Tensor) -> tuple[Launch, Launch, Launch]:
    """Return the row of the table for x [b, l, 3, n, dh]."""
    if INTERPRET:
        return INTERPRETED
    arch = LIKE.get(_arch(x.device), _arch(x.device))
    if (arch, 64) not in TABLE and arch not in announced:
        announced.add(arch)
        warnings.warn(f"attention: the launch table does not list sm_{arch}; "
                      "small tiles are used, which are slow")
    return TABLE.get((arch, x.shape[-1]), CONSERVATIVE)


def _acc(x: Tensor):
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def _score_scale(x: Tensor) -> float:
    """Return the scale of the scores, which are in units of log 2."""
    return math.log2(math.e) / math.sqrt(x.shape[-1])


def _limit(x: Tensor) -> float:
    """Return the bound of the scores below which p needs no running maximum: sums of 2^50 fit bf16
    and fp32; 2^8 and 2^-8 fit fp16, the latter as a normal number."""
    return 8.0 if x.dtype == torch.float16 else 50.0


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _there(x: Tensor | None) -> bool:
    return x is not None and x.numel() > 0


def _pair(function, txt: Tensor | None, img: Tensor | None, *args) -> tuple:
    """Return the function's results for both streams. A stream without a tensor, which no kernel
    reads, gets the result of the other one, so that both have one type."""
    txt, img = function(txt, *args), function(img, *args)
    return txt or img, img or txt


def _rows(x: Tensor | None) -> tuple | None:
    """Return [b, l, ...] as rows [b, l, columns] for _load and _store by pointers, or None."""
    if not _there(x):
        return None
    shape, strides = x.shape, x.stride()
    b, l = shape[0], shape[1]
    stride_l = strides[1] if l > 1 else math.prod(shape[2:])     # torch leaves that of one row open
    return x, strides[0] if b > 1 else l * stride_l, stride_l, l


if triton is not None:
    class _Tile(TensorDescriptor):
        """Hold a descriptor that _tiles has checked: a second check would double its cost."""

        def __post_init__(self):
            pass


def _tiles(x: Tensor | None, rows: int) -> "tuple | _Tile | None":
    """Return [b, l, ...] as tiles [rows, dh] of rows [b, l, columns]: a descriptor where the
    hardware copies by descriptors, else the pointers of _rows; None for no tensor.

    Raises ValueError if base and strides are not multiples of 16 bytes.
    """
    pointers = _rows(x)
    if pointers is None:
        return None
    _, stride_b, stride_l, l = pointers
    size = x.element_size()
    if x.data_ptr() % 16 or stride_l * size % 16 or stride_b * size % 16:
        raise ValueError("attention: start and strides of a tensor must be multiples of 16 bytes "
                         f"(got {tuple(x.shape)} of strides {x.stride()} at offset "
                         f"{x.storage_offset()})")
    if not _tma(x.device):
        return pointers
    if stride_b < l * stride_l or stride_b % stride_l:
        # no tensor map describes samples that are expanded, overlap or start within a row
        return _tiles(x.contiguous(), rows)
    shape = x.shape
    return _Tile(x, (shape[0], l, math.prod(shape[2:])), (stride_b, stride_l, 1),
                 (1, rows, shape[-1]))


def _qkv_tiles(qk: tuple, qkv: tuple, m: int, keys: int) -> tuple[tuple, tuple, tuple]:
    """Return tiles of q [m, dh], of k and of v [keys, dh], pairs of text and image. A pair of None
    stands for the pair before it: each descriptor costs the launch a few microseconds."""
    same = None, None
    return (_pair(_tiles, *qk, m), same if m == keys else _pair(_tiles, *qk, keys),
            same if qk is qkv else _pair(_tiles, *qkv, keys))


def _readable(x: Tensor) -> bool:
    """Return whether tiles of x can be read in place."""
    aligned = x.data_ptr() % 16 == 0 and all(s > 0 and s * x.element_size() % 16 == 0
                                             for s in x.stride()[:2])
    return aligned and x.stride()[2:] == (x.shape[3], 1) and x.stride(1) < 2 ** 31 // ROWS


def prepare(qkv_txt: Tensor | None, qkv_img: Tensor, wq_txt: Tensor | None, wk_txt: Tensor | None,
            wq_img: Tensor | None, wk_img: Tensor | None,
            eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Run the pre-pass; return (qk_txt, qk_img, maxima).

    qk_* [b, l, 2, n, dh]: q in units of the scores, and k, both normalised; empty without norm
    weights. maxima [b, n, 2, blocks]: the largest norm of q, as it enters the scores, and of k in
    ROWS rows.
    """
    qk_txt, qk_img, maxima = prepare_fake(qkv_txt, qkv_img, wq_txt, wk_txt, wq_img, wk_img, eps)
    b, _, _, n, dh = qkv_img.shape
    blocks, blocks_txt = maxima.shape[3], maxima.shape[3] - _cdiv(qkv_img.shape[1], ROWS)
    _prepare[(n, blocks, b)](
        _pair(_rows, qkv_txt, qkv_img), _pair(_rows, qk_txt, qk_img), (wq_txt, wk_txt),
        (wq_img, wk_img), maxima, n, blocks_txt, blocks, EPS=eps, SCALE=_score_scale(qkv_img),
        TXT=blocks_txt > 0, FOLD=qk_img.numel() > 0, R=ROWS, DH=dh, ACC=_acc(qkv_img), num_warps=8,
        num_stages=1)
    return qk_txt, qk_img, maxima


def prepare_fake(qkv_txt, qkv_img, wq_txt, wk_txt, wq_img, wk_img, eps):
    b, l_img, _, n, dh = qkv_img.shape
    l_txt = 0 if qkv_txt is None else qkv_txt.shape[1]
    fold = wq_txt is not None or wq_img is not None
    qk_txt, qk_img = (qkv_img.new_empty((b, l, 2, n, dh) if fold else (0,)) for l in (l_txt, l_img))
    blocks = _cdiv(l_txt, ROWS) + _cdiv(l_img, ROWS)
    acc = torch.promote_types(qkv_img.dtype, torch.float32)
    return qk_txt, qk_img, qkv_img.new_empty((b, n, 2, blocks), dtype=acc)


def forward(qkv_txt: Tensor | None, qkv_img: Tensor, qk_txt: Tensor, qk_img: Tensor, maxima: Tensor,
            wq_txt: Tensor | None, wk_txt: Tensor | None, wq_img: Tensor | None,
            wk_img: Tensor | None, eps: float, need_txt: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return (out_txt, out_img, lse) from the projections and their pre-pass.

    out_txt is empty without text queries. lse [b, n, l]: log2 of the softmax's denominator, text
    first. The norm weights are arguments because autograd returns gradients to arguments.
    """
    out_txt, out_img, lse = forward_fake(qkv_txt, qkv_img, qk_txt, qk_img, maxima, wq_txt, wk_txt,
                                         wq_img, wk_img, eps, need_txt)
    b, l_img, _, n, dh = qkv_img.shape
    l_txt = qkv_txt.shape[1] if _there(qkv_txt) else 0
    fold, txt_q = qk_img.numel() > 0, out_txt.numel() > 0
    m, keys, warps, stages = _launches(qkv_img)[0]
    tiles_txt = _cdiv(l_txt, m) if txt_q else 0
    qkv = qkv_txt, qkv_img
    q, k, v = _qkv_tiles((qk_txt, qk_img) if fold else qkv, qkv, m, keys)
    _forward[(tiles_txt + _cdiv(l_img, m), n, b)](
        *q, *k, *v, *_pair(_tiles, out_txt, out_img, m), lse, maxima, (l_txt, l_img),
        LIMIT=_limit(qkv_img), SCALE=1.0 if fold else _score_scale(qkv_img), TXT=l_txt > 0,
        TXT_Q=txt_q, AHEAD=_tma(qkv_img.device), R=ROWS, M=m, N=keys, DH=dh, ACC=_acc(qkv_img),
        num_warps=warps, num_stages=stages)
    return out_txt, out_img, lse


def forward_fake(qkv_txt, qkv_img, qk_txt, qk_img, maxima, wq_txt, wk_txt, wq_img, wk_img, eps,
                 need_txt):
    b, l_img, _, n, dh = qkv_img.shape
    l_txt = qkv_txt.shape[1] if need_txt and qkv_txt is not None else 0
    out_txt, out_img = (qkv_img.new_empty((b, l, n, dh)) for l in (l_txt, l_img))
    return out_txt, out_img, maxima.new_empty((b, n, l_txt + l_img))


def attend(qkv_txt: Tensor | None, qkv_img: Tensor, wq_txt: Tensor | None, wk_txt: Tensor | None,
           wq_img: Tensor | None, wk_img: Tensor | None, eps: float,
           need_txt: bool) -> tuple[Tensor, Tensor]:
    """Run both passes where nothing needs a gradient; return (out_txt, out_img)."""
    weights = wq_txt, wk_txt, wq_img, wk_img
    ready = prepare(qkv_txt, qkv_img, *weights, eps)
    return forward(qkv_txt, qkv_img, *ready, *weights, eps, need_txt)[:2]


def attend_fake(qkv_txt, qkv_img, wq_txt, wk_txt, wq_img, wk_img, eps, need_txt):
    weights = wq_txt, wk_txt, wq_img, wk_img
    ready = prepare_fake(qkv_txt, qkv_img, *weights, eps)
    return forward_fake(qkv_txt, qkv_img, *ready, *weights, eps, need_txt)[:2]


def backward(g_txt: Tensor | None, g_img: Tensor, qkv_txt: Tensor | None, qkv_img: Tensor,
             qk_txt: Tensor, qk_img: Tensor, wq_txt: Tensor | None, wk_txt: Tensor | None,
             wq_img: Tensor | None, wk_img: Tensor | None, out_txt: Tensor, out_img: Tensor,
             lse: Tensor, eps: float, grad_txt: bool, grad_img: bool, weight_txt: bool,
             weight_img: bool, deterministic: bool,
             ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return (dqkv_txt, dqkv_img, dw_q_txt, dw_k_txt, dw_q_img, dw_k_img) from the gradients of
    out; empty where grad_* (the stream) or weight_* (the norm weights of a stream that has a
    gradient) is False."""
    dqkv_txt, dqkv_img, *dw = backward_fake(
        g_txt, g_img, qkv_txt, qkv_img, qk_txt, qk_img, wq_txt, wk_txt, wq_img, wk_img, out_txt,
        out_img, lse, eps, grad_txt, grad_img, weight_txt, weight_img, deterministic)
    b, l_img, _, n, dh = qkv_img.shape
    l = qkv_txt.shape[1] if _there(qkv_txt) else 0, l_img
    txt = l[0] > 0
    txt_q = txt and _there(g_txt)
    fold, atomic = qk_img.numel() > 0, not deterministic
    grad, weight = (grad_txt and txt, grad_img), (weight_txt and txt, weight_img)
    want_q = grad[0] and txt_q, grad_img
    g = [x if not _there(x) or _readable(x) else x.contiguous() for x in (g_txt, g_img)]
    qkv, rows = (qkv_txt, qkv_img), dict(R=ROWS, DH=dh, ACC=_acc(qkv_img))
    qk, scale = (qkv, _score_scale(qkv_img)) if not fold else ((qk_txt, qk_img), 1.0)

    # lse and delta by blocks of rows, text only where it has queries; dq starts at zero
    blocks_txt = _cdiv(l[0], ROWS) if txt_q else 0
    blocks = blocks_txt + _cdiv(l_img, ROWS)
    stats, dq = lse.new_empty((b, n, 2, blocks * ROWS)), lse.new_empty((b, n, blocks * ROWS, dh))
    # wider heads get more warps, so that a thread holds as many numbers
    _stats[(n, blocks, b)](
        _pair(_rows, *g), _pair(_rows, out_txt, out_img), lse, stats, dq, l, lse.shape[2], n,
        blocks_txt, blocks, TXT_Q=txt_q, ZERO=atomic, **rows, num_warps=dh // 8, num_stages=1)

    # dk and dv; where sums may come in any order, dq in the same pass
    _, (m, keys, warps, stages), second = _launches(qkv_img)
    any_q = atomic and any(want_q)
    tiles = [_cdiv(x, keys) if x and (wanted or any_q) else 0 for x, wanted in zip(l, grad)]

    def parts(counts, wanted) -> tuple[Tensor, ...]:
        """Return room for the partial sums of norm weights, for each stream `counts` per head."""
        return tuple(lse.new_empty((b * n * count if want else 0, dh))
                     for count, want in zip(counts, wanted))

    parts_k = parts(tiles, weight)
    if sum(tiles):
        q, k, v = _qkv_tiles(qk, qkv, m, keys)
        # ds is the gradient by natural scores; the folded q brings its own scale and log2(e)
        dk_scale = math.log(2) if fold else dh ** -0.5
        add_to = dq
        if _tma(dq.device) and not INTERPRET:       # Triton's interpreter does not reduce by them
            add_to = _Tile(dq, (b * n * blocks * ROWS, dh), (dh, 1), (m, dh))
        _backward[(sum(tiles), n, b)](
            *q, *_pair(_tiles, *g, m), *k, *v, *_pair(_tiles, dqkv_txt, dqkv_img, keys),
            (wk_txt, wk_img), parts_k, stats, add_to, l, n, blocks_txt, blocks, tiles[0],
            TXT=tiles[0] > 0, TXT_Q=txt_q, GRAD=grad, WEIGHT=weight,
            DQ=(want_q[0] and atomic, want_q[1] and atomic), HELD=_arch(dq.device) == 90, EPS=eps,
            SCALE=scale, DK_SCALE=dk_scale, M=m, N=keys, **rows, num_warps=warps, num_stages=stages)
    if deterministic and any(want_q):
        m, keys, warps, stages = second
        tiles = [_cdiv(x, m) if wanted else 0 for x, wanted in zip(l, want_q)]
        q, k, v = _qkv_tiles(qk, qkv, m, keys)
        _backward_q[(sum(tiles), n, b)](
            *q, *_pair(_tiles, *g, m), *k, *v, stats, dq, l, n, blocks_txt, blocks, tiles[0],
            TXT=txt, TXT_Q=want_q[0], SCALE=scale, M=m, N=keys, **rows, num_warps=warps,
            num_stages=stages)

    # dq through the norm into its place
    parts_q = parts((blocks_txt, blocks - blocks_txt), (weight[0] and want_q[0], weight[1]))
    if any(want_q):
        _finish[(n, blocks, b)](
            dq, _pair(_rows, *qkv), _pair(_rows, dqkv_txt, dqkv_img), (wq_txt, wq_img), parts_q, n,
            blocks_txt, blocks, EPS=eps, DQ_SCALE=dh ** -0.5, DQ=want_q, WEIGHT=weight, **rows,
            num_warps=dh // 16, num_stages=1)
    if grad[0] and not txt_q:
        dqkv_txt[:, :, 0].zero_()
    for out, part in zip(dw, (parts_q[0], parts_k[0], parts_q[1], parts_k[1])):
        if out.numel():
            out.copy_(part.sum(0))
    return dqkv_txt, dqkv_img, *dw


def backward_fake(g_txt, g_img, qkv_txt, qkv_img, qk_txt, qk_img, wq_txt, wk_txt, wq_img, wk_img,
                  out_txt, out_img, lse, eps, grad_txt, grad_img, weight_txt, weight_img,
                  deterministic):
    def empty(x: Tensor | None, wanted: bool) -> Tensor:
        return x.new_empty(x.shape) if wanted and x is not None else qkv_img.new_empty((0,))

    return (empty(qkv_txt, grad_txt), empty(qkv_img, grad_img), empty(wq_txt, weight_txt),
            empty(wk_txt, weight_txt), empty(wq_img, weight_img), empty(wk_img, weight_img))


# --- registration and autograd ---

# The operators are opaque also on a GPU: torch.library.triton_op traces a launch without its
# descriptors ("not yet supported in non-dynamo tracing", torch 2.13) and would run compiled code on
# the tensors of the trace. They are registered by hand because torch.library.custom_op adds checks
# that cost 15 us a call.

_LIBRARY = torch.library.Library("ladd", "FRAGMENT")


def _register(name: str, function, fake):
    name = f"joint_attention_{name}"
    _LIBRARY.define(name + torch.library.infer_schema(function, mutates_args=()))
    _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ladd::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.ladd, name).default


prepare_op = _register("prepare", prepare, prepare_fake)
forward_op = _register("forward", forward, forward_fake)      # what a selective checkpoint saves
backward_op = _register("backward", backward, backward_fake)
attend_op = _register("attend", attend, attend_fake)          # costs the host less than two


def _setup(ctx, inputs, output) -> None:
    qkv_txt, qkv_img, qk_txt, qk_img, _, *weights, ctx.eps, _ = inputs
    ctx.save_for_backward(qkv_txt, qkv_img, qk_txt, qk_img, *weights, *output)
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _gradients(ctx, g_txt: Tensor | None, g_img: Tensor | None, _):
    saved, needs = ctx.saved_tensors, ctx.needs_input_grad
    if g_txt is None and g_img is None:
        return (None,) * 11
    if g_img is None:
        g_img = torch.zeros_like(saved[9])
    weight_txt, weight_img = any(needs[5:7]), any(needs[7:9])
    dqkv_txt, dqkv_img, *dw = backward_op(g_txt, g_img, *saved, ctx.eps, needs[0] or weight_txt,
                                          needs[1] or weight_img, weight_txt, weight_img,
                                          torch.are_deterministic_algorithms_enabled())
    dw = [g if need else None for g, need in zip(dw, needs[5:9])]
    return (dqkv_txt if needs[0] else None, dqkv_img if needs[1] else None,
            None, None, None, *dw, None, None)


torch.library.register_autograd("ladd::joint_attention_forward", _gradients, setup_context=_setup,
                                lib=_LIBRARY)


def _no_second_derivative(ctx, *_):
    raise RuntimeError("attention: the backward pass has no derivative of its own "
                       "(got create_graph=True)")


torch.library.register_autograd("ladd::joint_attention_backward", _no_second_derivative,
                                lib=_LIBRARY)


def _check(qkv_txt: Tensor | None, qkv_img: Tensor, norm_txt, norm_img) -> None:
    if triton is None or not (qkv_img.is_cuda or INTERPRET or ARCH is not None):
        missing = "" if triton else ", without Triton"
        raise RuntimeError("attention: tensors must be on CUDA, or on the CPU with "
                           f"TRITON_INTERPRET=1 (got {qkv_img.device}{missing})")
    if norm_txt is not None and qkv_txt is None:
        raise ValueError("attention: norm_txt requires qkv_txt (got None)")
    if qkv_img.ndim != 5 or not qkv_img.numel():
        raise ValueError("attention: qkv_img must be [b, l, 3, n, dh] with at least one token "
                         f"(got {tuple(qkv_img.shape)})")
    dtypes = (torch.float32, torch.float64) if INTERPRET else (torch.bfloat16, torch.float16)
    b, _, _, n, dh = qkv_img.shape
    for name, x, norm in (("qkv_txt", qkv_txt, norm_txt), ("qkv_img", qkv_img, norm_img)):
        if x is None:
            continue
        shape, strides = x.shape, x.stride()
        if len(shape) != 5 or shape != (b, shape[1], 3, n, dh) or dh not in (64, 128):
            raise ValueError(f"attention: {name} must be [b, l, 3, n, dh] with dh 64 or 128 and b, "
                             f"n and dh as in qkv_img {tuple(qkv_img.shape)} (got {tuple(shape)})")
        if x.dtype != qkv_img.dtype or x.dtype not in dtypes or x.device != qkv_img.device:
            raise ValueError(f"attention: {name} and qkv_img must be on one device, both in "
                             f"{' or '.join(map(str, dtypes))} (got {name} in {x.dtype} on "
                             f"{x.device}, qkv_img in {qkv_img.dtype} on {qkv_img.device})")
        # offsets within a tile of at most ROWS rows are 32-bit, hence the upper limit
        if strides[2:] != (n * dh, dh, 1) or (
                shape[1] > 1 and not 3 * n * dh <= strides[1] < 2 ** 31 // ROWS):
            raise ValueError(f"attention: strides of {name} must be (any, {3 * n * dh} to "
                             f"{2 ** 31 // ROWS - 1}, {n * dh}, {dh}, 1) (got {strides})")
        if norm is not None and any(w.shape != (dh,) or w.stride() != (1,) for w in norm):
            raise ValueError(f"attention: norm weights of {name} must be two contiguous [{dh}] "
                             f"(got {[(tuple(w.shape), w.stride()) for w in norm]})")


def joint_attention(qkv_txt: Tensor | None, qkv_img: Tensor,
                    norm_txt: tuple[Tensor, Tensor] | None = None,
                    norm_img: tuple[Tensor, Tensor] | None = None, eps: float = 1e-6,
                    need_txt: bool = True) -> tuple[Tensor | None, Tensor]:
    """Compute reference_joint_attention by Triton kernels; products in the dtype of qkv, sums in
    fp32.

    qkv_*: bf16 or fp16, under Triton's interpreter fp32 or float64; dh 64 or 128; start and strides
    of rows and samples in multiples of 16 bytes, samples may be expanded. What needs no gradient is
    not computed. Raises ValueError for what it does not take, RuntimeError where it cannot run.
    """
    _check(qkv_txt, qkv_img, norm_txt, norm_img)
    weights = *(norm_txt or (None, None)), *(norm_img or (None, None))
    inputs = qkv_txt, qkv_img, *weights
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        frozen = [None if x is None else x.detach() for x in inputs]
        out_txt, out_img, _ = forward_op(qkv_txt, qkv_img, *prepare_op(*frozen, eps), *weights, eps,
                                         need_txt)
    else:
        out_txt, out_img = attend_op(*inputs, eps, need_txt)
    return (out_txt if need_txt and qkv_txt is not None else None), out_img


# --- check and time ---

def milliseconds(run) -> float:
    """Return the median time of run() on the GPU, which sleeps until the call is queued: most calls
    are shorter than their Python."""
    flush, times = torch.empty(2 ** 28, dtype=torch.uint8, device="cuda"), []
    for _ in range(23):                              # three warm up
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()                                # nothing of the call before is in the L2 cache
        torch.cuda._sleep(20_000_000)                # about 10 ms
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times[3:])[10]


def main() -> None:
    """Print the largest error of out and all gradients against the reference, relative to the
    largest value; on CUDA also TFLOP/s of useful products, forward and backward."""
    cuda = torch.cuda.is_available()
    device, dtype, limit = ("cuda", torch.bfloat16, 2e-2) if cuda else ("cpu", torch.float32, 1e-5)
    shapes = [(2, 33, 70, 1, 64), (1, 70, 65, 1, 128)]
    if cuda:
        shapes = [(2, 154, 4096, 24, 64), (2, 333, 4096, 38, 64), (1, 333, 4095, 12, 128)]
    print(f"{'(b, l_txt, l_img, n, dh)':26} norms    error"
          + ("  TFLOP/s forward  backward" if cuda else ""))
    for (b, l_txt, l_img, n, dh), norms in itertools.product(shapes, (False, True)):
        g = torch.Generator(device).manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=g, device=device).to(dtype)

        inputs = [draw(b, l, 3, n, dh) for l in (l_txt, l_img)]
        if norms:
            inputs += [draw(dh) for _ in range(4)]
        grads = [draw(b, l, n, dh) for l in (l_txt, l_img)]

        def run(function, inputs):
            inputs = [t.requires_grad_() for t in inputs]
            out = function(*inputs[:2], *((inputs[2:4], inputs[4:]) if norms else (None, None)))
            return out, lambda: torch.autograd.grad(out, inputs,
                                                    [x.to(out[0].dtype) for x in grads],
                                                    retain_graph=True)

        (out, back), (truth, back_truth) = run(joint_attention, inputs), run(
            reference_joint_attention, [t.float() for t in inputs])
        error = max(float((f - t).detach().abs().max() / t.detach().abs().max())
                    for f, t in zip((*out, *back()), (*truth, *back_truth())))
        line = f"{(b, l_txt, l_img, n, dh)!s:26} {'both' if norms else 'none'}   {error:.1e}"
        if cuda:
            flops = 4 * b * n * dh * (l_txt + l_img) ** 2 / 1e9
            with torch.no_grad():
                ms = milliseconds(lambda: run(joint_attention, [t.detach() for t in inputs]))
            line += f"  {flops / ms:15.0f}  {2.5 * flops / milliseconds(back):8.0f}"
        print(line)
        if not error < limit:
            sys.exit(f"attention: the error must be below {limit:.0e} (got {error:.1e})")


if __name__ == "__main__":
    main()
