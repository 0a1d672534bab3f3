"""The discriminator heads: k independent convolutional heads, one per tapped teacher block,
in one batched evaluation.

    y_k      = lrelu(GN(F_k W_in + b_in))                       1x1 convolution d -> c
    z_k      = (y_k + lrelu(GN(conv3x3(y_k)))) / sqrt 2     residual, zero padding at the borders
    logit_k  = <z_k, w_out + W_cond cond> / sqrt c + b_out      per token; projection conditioning

Letters: k head, b batch, h w token grid, d teacher width, c head width, e conditioning width. GN:
group norm over the tokens of one sample and GROUP_SIZE channels, so a logit never depends on its
batch mates. The family is StyleGAN-T's head (Sauer et al. 2023) with 2-D convolutions (Sauer et al.
2024, LADD); widths, group norm and the place of the conditioning are our choice.

Gradient, with u = F W_in + b_in, v = conv3x3(y), r = readout / sqrt c, g that of the logits; GN'
takes a, the gradient of a norm's output, to rstd (gamma a - mean(gamma a) - xhat mean(gamma a
xhat)), means over the group:

    dv = GN'(lrelu' g r / sqrt 2);  dy = g r / sqrt 2 + conv3x3^T(dv)
    du = GN'(lrelu' dy);  dF = du W_in^T
    dW_in = F^T du;  dW_conv[shift] = y[tokens + shift]^T dv        sums over tokens and samples

FLOPs forward: k b h w (2 d c + 18 c^2). Backward: as many to the features; to the parameters k b h
w (2 d c + 36 c^2), since dv also goes back through the convolution.

Launches, each for all heads. Forward: product, activation, product, readout; backward: sums, norm,
product, norm, then a product for the features, or the activation again and two products for the
weights. Normalising in a pass of its own leaves the products' loops bare; statistics leave them as
partials per tile, which a few small kernels of torch merge: no atomics.

What the convolution reads, y and dv, is stored with one zero after each row of the grid but the
last, the padding of two rows at once: positions [h (w + 1) - 1] instead of tokens [h w]. A shift of
the convolution is then a shift along one axis, and a tile is a run of positions, read by TMA or
cp.async whatever the grid; positions before the first and after the last read as zero.

Bytes forward: the features copied once into one tensor (read and written), and in activations of
k b l c: u, y, v written, u, y, v read, and y nine times by the convolution, mostly from L2. Kept
for backward: u and v, and for the weights' gradient the copied features. Slower than it should be
in fp32 (no tensor cores).
"""
import functools
import os
import warnings
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

if __name__ == "__main__" and not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")    # before triton is imported

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:
    triton = None

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
ARCH: int | None = None    # kernels/aot.py sets it to compile for a GPU that is not here
DTYPES = torch.bfloat16, torch.float16, torch.float32, torch.float64

GROUP_SIZE = 16      # channels a group
SLOPE = 0.2          # leaky ReLU
EPS = 1e-5


class HeadParams(NamedTuple):
    """Hold the parameters of all heads, stacked over heads."""
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
    """Return lrelu(GN(x)) of x [k, b, l, c]; statistics per head, sample and group."""
    g = x.unflatten(-1, (-1, GROUP_SIZE))                     # [k, b, l, groups, GROUP_SIZE]
    var, mean = torch.var_mean(g, (2, 4), correction=0, keepdim=True)
    g = ((g - mean) * torch.rsqrt(var + EPS)).flatten(-2)
    return F.leaky_relu(torch.addcmul(beta[:, None, None], g, gamma[:, None, None]), SLOPE)


def _by_patches(y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return the 3x3 convolutions of y [k, b, h, w, c] as one product, zero padding at borders."""
    (k, b, h, w, c), padded = y.shape, F.pad(y, (0, 0, 1, 1, 1, 1))
    patches = torch.stack([padded[:, :, i:i + h, j:j + w] for i in range(3) for j in range(3)], 4)
    return torch.baddbmm(bias[:, None], patches.reshape(k, -1, 9 * c),
                         weight.reshape(k, 9 * c, c)).view_as(y)


def _by_convolution(y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return the same by one convolution with a group of channels per head."""
    k, c = weight.shape[0], weight.shape[-1]
    z = F.conv2d(y.permute(1, 0, 4, 2, 3).flatten(1, 2),                       # [b, k c, h, w]
                 weight.permute(0, 4, 3, 1, 2).flatten(0, 1), bias.flatten(), padding=1, groups=k)
    return z.unflatten(1, (k, c)).permute(1, 0, 3, 4, 2)


def reference_discriminator_heads(feats: list[Tensor], params: HeadParams, cond: Tensor,
                                  grid: tuple[int, int]) -> Tensor:
    """Compute the logits [k, b, h, w] of all heads, in fp32 or better.

    feats: k tensors [b, h*w, d]; cond [b, e]. Raises ValueError if the number of taps, the grid or
    the widths do not fit.
    """
    (h, w), (k, d, c) = grid, params.w_in.shape
    if len(feats) != k or any(f.shape[1:] != (h * w, d) for f in feats):
        raise ValueError(f"heads: features must be {k} of [b, {h * w}, {d}] for grid {h}x{w} "
                         f"(got {len(feats)} of {sorted({tuple(f.shape) for f in feats})})")
    acc = torch.float64 if feats[0].dtype == torch.float64 else torch.float32
    p = HeadParams(*(t.to(acc) for t in params))
    x = torch.stack([f.to(acc) for f in feats])                                # [k, b, l, d]
    b = x.shape[1]
    y = torch.baddbmm(p.b_in[:, None], x.flatten(1, 2), p.w_in).unflatten(1, (b, h * w))
    y = _norm_act(y, p.gamma1, p.beta1)                                        # [k, b, l, c]
    # torch's convolution is twice as fast on a CPU; cudnn would use TF32, also for its gradient
    convolve = _by_convolution if y.device.type == "cpu" else _by_patches
    z = convolve(y.unflatten(2, (h, w)), p.w_conv, p.b_conv).flatten(2, 3)
    z = (y + _norm_act(z, p.gamma2, p.beta2)) * 0.5 ** 0.5
    readout = (p.w_out[:, None] + cond.to(acc) @ p.w_cond) * c ** -0.5         # [k, b, c]
    return (torch.einsum("kblc,kbc->kbl", z, readout) + p.b_out[:, None, None]).unflatten(2, (h, w))


# --- kernels ---

if triton is not None:
    GROUP, LEAK, HALF = tl.constexpr(GROUP_SIZE), tl.constexpr(SLOPE), tl.constexpr(0.5 ** 0.5)

    # A tile of rows (tokens or positions) and channels has four axes, [A, groups, B, GROUP] with
    # A B rows. Triton deals elements to lanes, then warps, from the last axis on. So with B = 16
    # a warp of a tile of 128 channels holds a group of all rows, and sums over rows need no shared
    # memory; with B = 1 a warp reads whole rows.

    @triton.jit
    def _index(A: tl.constexpr, B: tl.constexpr, N: tl.constexpr):
        """Return the indices of A B rows [A, B], N / GROUP groups and their N channels
        [groups, GROUP]."""
        g = tl.arange(0, N // GROUP)
        return ((tl.arange(0, A) * B)[:, None] + tl.arange(0, B)[None], g,
                (g * GROUP)[:, None] + tl.arange(0, GROUP)[None])

    @triton.jit
    def _down(x):
        """Return x [A, B], of rows, as [A, 1, B, 1]."""
        return x[:, None, :, None]

    @triton.jit
    def _across(x):
        """Return x [groups, GROUP], of channels, as [1, groups, 1, GROUP]."""
        return x[None, :, None, :]

    @triton.jit
    def _over_rows(x):
        """Return sums [groups, GROUP] over rows."""
        return tl.sum(tl.sum(x, 0), 1)

    @triton.jit
    def _over_groups(x):
        """Return sums [groups] over rows and the channels of a group; in this order few values are
        left where warps have different rows, as the products leave them."""
        return tl.sum(tl.sum(tl.sum(x, 3), 2), 0)

    @triton.jit
    def _tokens(i, l, w):
        """Return the tokens of positions i, and which of them hold one."""
        row, x = i // (w + 1), i % (w + 1)
        return row * w + x, (x < w) & (row * w + x < l)

    @triton.jit
    def _norm(x, stat_ptr, gamma_ptr, beta_ptr, kb, k, g, n, c):
        """Return (xhat, gamma xhat + beta, rstd, gamma) of x at groups g and channels n."""
        groups = c // GROUP
        mean = tl.load(stat_ptr + kb * 2 * groups + g, g < groups, 0.0)[None, :, None, None]
        rstd = tl.load(stat_ptr + (kb * 2 + 1) * groups + g, g < groups, 0.0)[None, :, None, None]
        gamma = _across(tl.load(gamma_ptr + k * c + n, n < c, 0.0))
        beta = _across(tl.load(beta_ptr + k * c + n, n < c, 0.0))
        xhat = (x - mean) * rstd
        return xhat, xhat * gamma + beta, rstd, gamma

    @triton.jit
    def _leaky(x):
        return tl.where(x > 0, x, x * LEAK)

    @triton.jit
    def _load(x, i, row, col, R: tl.constexpr, C: tl.constexpr, T: tl.constexpr = False):
        """Load [R, C], or with T its transpose, at x[i, row, col]; zero outside. x, [n, rows,
        columns], is a descriptor or (pointer, rows, columns)."""
        if isinstance(x, tl.tensor_descriptor):
            tile = x.load([i, row, col]).reshape(R, C)
            if T:
                tile = tile.T
        else:
            start, rows, columns = x
            r, c = row + tl.arange(0, R)[:, None], col + tl.arange(0, C)[None]
            if T:              # what is transposed after its load is not copied by cp.async
                r, c = row + tl.arange(0, R)[None], col + tl.arange(0, C)[:, None]
            tile = tl.load(start + i.to(tl.int64) * rows * columns + (r * columns + c),
                           (r >= 0) & (r < rows) & (c < columns), 0.0)
        return tile

    @triton.jit
    def _halves(x):
        """Return the first and the second half of the columns."""
        return x.reshape(x.shape[0], 2, x.shape[1] // 2).permute(0, 2, 1).split()

    @triton.jit
    def _group_stats(acc, inside, part, g, c):
        """Store count, mean and M2 of each group of acc in part."""
        there = _down(inside)
        # never 0: zeros are not neighbours, so that every tile has at least one token
        count = tl.sum(inside.to(acc.dtype)) * GROUP
        mean = _over_groups(tl.where(there, acc, 0.0)) / count
        apart = tl.where(there, acc - mean[None, :, None, None], 0.0)
        groups = c // GROUP
        tl.store(part + g, tl.zeros_like(mean) + count, g < groups)
        tl.store(part + groups + g, mean, g < groups)
        tl.store(part + 2 * groups + g, _over_groups(apart * apart), g < groups)

    @triton.jit
    def _norm_back(acc, rows, inside, part, g, n, kb, k, l, c, u_ptr, stat_ptr, gamma_ptr,
                   beta_ptr):
        """Take acc, the gradient of y, back through leaky ReLU. Store sums over tokens in part: of
        the result, of it times xhat, of xhat."""
        here = _down(inside) & _across(n < c)
        u_ptr += kb.to(tl.int64) * l * c
        u = tl.load(u_ptr + (_down(rows * c) + _across(n)), here, 0.0).to(acc.dtype)
        xhat, y, _, _ = _norm(u, stat_ptr, gamma_ptr, beta_ptr, kb, k, g, n, c)
        acc = tl.where(here, tl.where(y > 0, acc, acc * LEAK), 0.0)
        tl.store(part + n, _over_rows(acc), n < c)
        tl.store(part + c + n, _over_rows(acc * xhat), n < c)
        tl.store(part + 2 * c + n, _over_rows(tl.where(here, xhat, 0.0)), n < c)
        return acc

    @triton.jit
    def _product(src, weight, out_ptr, part_ptr, bias_ptr, u_ptr, stat_ptr, gamma_ptr, beta_ptr,
                 grad_ptr, readout_ptr, b, h, w, d, c, TAPS: tl.constexpr, BACK: tl.constexpr,
                 EPILOGUE: tl.constexpr, PIECES: tl.constexpr, TOKENS: tl.constexpr,
                 BN: tl.constexpr, BK: tl.constexpr, ACC: tl.constexpr):
        """Compute out [k, b, l, c] = sum over TAPS shifts of src [k b, positions, d] W; with BACK,
        shifts are reversed and W is transposed.

        A program computes TOKENS positions of one sample and BN channels; neighbours in the launch
        share tokens. EPILOGUE "store"; "stats": bias, group norm partials (count, mean, M2);
        "norm": the way back through residual, leaky ReLU and affine of the first norm, with
        per-channel sums for the norm's gradient.
        """
        pid, across, tiles = tl.program_id(0), tl.cdiv(c, BN), tl.cdiv(h * (w + 1) - 1, TOKENS)
        n0, t, kb = pid % across * BN, pid // across % tiles, pid // (across * tiles)
        k, first = kb // b, t * TOKENS
        steps = tl.cdiv(d, BK)
        acc = tl.zeros([TOKENS, BN], ACC)
        # the sum starts with the bias or the residual's gradient: registers are scarce after it
        n = n0 + tl.arange(0, BN)
        if EPILOGUE == "stats":
            acc += tl.load(bias_ptr + k * c + n, n < c, 0.0)[None]
        elif EPILOGUE == "norm":
            rows, inside = _tokens(first + tl.arange(0, TOKENS), h * w, w)
            acc += (tl.load(grad_ptr + kb.to(tl.int64) * h * w + rows, inside, 0.0)[:, None]
                    * (tl.load(readout_ptr + kb * c + n, n < c, 0.0) * HALF)[None])
        for step in range(TAPS * steps):
            tap, k0 = step // steps, step % steps * BK
            shift = (tap // 3 - 1) * (w + 1) + tap % 3 - 1 if TAPS == 9 else 0
            if BACK:
                a = _load(src, kb, first - shift, k0, TOKENS, BK)
                wt = _load(weight, k * TAPS + tap, n0, k0, BN, BK).T
            else:
                a = _load(src, kb, first + shift, k0, TOKENS, BK)
                wt = _load(weight, k * TAPS + tap, k0, n0, BK, BN)
            acc = tl.dot(a.to(wt.dtype), wt, acc, input_precision="ieee", out_dtype=ACC)

        # the epilogue, in PIECES of the channels to save registers
        few: tl.constexpr = BN // PIECES
        row, group, channel = _index(TOKENS // 16, 16, few)
        rows, inside = _tokens(first + row, h * w, w)
        out_ptr += kb.to(tl.int64) * h * w * c
        part = (part_ptr
                + (kb * tiles + t).to(tl.int64) * 3 * (c if EPILOGUE == "norm" else c // GROUP))
        for i in tl.static_range(PIECES):
            piece = _halves(acc)[i] if PIECES == 2 else acc
            piece = piece.reshape(TOKENS // 16, 16, few // GROUP, GROUP).permute(0, 2, 1, 3)
            g, n = (n0 + i * few) // GROUP + group, n0 + i * few + channel
            if EPILOGUE == "stats":
                _group_stats(piece, inside, part, g, c)
            elif EPILOGUE == "norm":
                piece = _norm_back(piece, rows, inside, part, g, n, kb, k, h * w, c, u_ptr,
                                   stat_ptr, gamma_ptr, beta_ptr)
            tl.store(out_ptr + (_down(rows * c) + _across(n)), piece.to(out_ptr.dtype.element_ty),
                     _down(inside) & _across(n < c))

    @triton.jit
    def _weight_grad(src, grad, out_ptr, b, h, w, d, c, heads, TAPS: tl.constexpr,
                     SPLIT: tl.constexpr, TOKENS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                     ACC: tl.constexpr):
        """Compute out [SPLIT, k, TAPS, d, c] = sum over positions and samples of
        src[position + shift]^T grad[position]. A program computes BM x BN weights of one head and
        shift from one SPLIT-th of the tiles."""
        pid, across, down = tl.program_id(0), tl.cdiv(c, BN), tl.cdiv(d, BM)
        n0, m0 = pid % across * BN, pid // across % down * BM
        pid = pid // (across * down)                                # (split, head, shift)
        tap, k, s = pid % TAPS, pid // TAPS % heads, pid // (TAPS * heads)
        shift = (tap // 3 - 1) * (w + 1) + tap % 3 - 1 if TAPS == 9 else 0
        tiles = tl.cdiv(h * (w + 1) - 1, TOKENS)
        acc = tl.zeros([BM, BN], ACC)
        for step in range(s * (b * tiles) // SPLIT, (s + 1) * (b * tiles) // SPLIT):
            kb, first = k * b + step // tiles, step % tiles * TOKENS
            g = _load(grad, kb, first, n0, TOKENS, BN)
            a = _load(src, kb, first + shift, m0, TOKENS, BM, True)
            acc = tl.dot(a.to(g.dtype), g, acc, input_precision="ieee", out_dtype=ACC)
        m, n = m0 + tl.arange(0, BM), n0 + tl.arange(0, BN)
        tl.store(out_ptr + pid.to(tl.int64) * d * c + (m[:, None] * c + n[None]), acc,
                 (m < d)[:, None] & (n < c)[None])

    @triton.jit
    def _place(c, R: tl.constexpr, C: tl.constexpr):
        """Return the sample, rows, groups and channels of a program of a pass over elements."""
        pid, across = tl.program_id(0), tl.cdiv(c, C)
        row, g, n = _index(R, 1, C)
        return (tl.program_id(1), pid // across * R + row, pid % across * (C // GROUP) + g,
                pid % across * C + n)

    @triton.jit
    def _store_positions(out_ptr, x, kb, i, l, w, n, c):
        """Store x in out [k b, positions, c] at positions i and channels n."""
        count = l + l // w - 1
        tl.store(out_ptr + kb.to(tl.int64) * count * c + (_down(i * c) + _across(n)),
                 x.to(out_ptr.dtype.element_ty), _down(i < count) & _across(n < c))

    @triton.jit
    def _load_positions(y_ptr, kb, rows, l, w, n, c):
        """Load y [k b, positions, c] at tokens `rows` and channels n."""
        at = _down((rows + rows // w) * c) + _across(n)
        return tl.load(y_ptr + kb.to(tl.int64) * (l + l // w - 1) * c + at,
                       _down(rows < l) & _across(n < c), 0.0)

    @triton.jit
    def _activate(u_ptr, y_ptr, stat_ptr, gamma_ptr, beta_ptr, b, l, w, c, R: tl.constexpr,
                  C: tl.constexpr, ACC: tl.constexpr):
        """Compute y = lrelu(GN(u)), R positions and C channels per program."""
        kb, i, g, n = _place(c, R, C)
        rows, inside = _tokens(i, l, w)
        here = _down(inside) & _across(n < c)
        u = tl.load(u_ptr + kb.to(tl.int64) * l * c + (_down(rows * c) + _across(n)),
                    here, 0.0).to(ACC)
        y = _leaky(_norm(u, stat_ptr, gamma_ptr, beta_ptr, kb, kb // b, g, n, c)[1])
        _store_positions(y_ptr, tl.where(here, y, 0.0), kb, i, l, w, n, c)

    @triton.jit
    def _readout(y_ptr, v_ptr, logit_ptr, stat_ptr, gamma_ptr, beta_ptr, readout_ptr, bias_ptr, b,
                 l, w, c, R: tl.constexpr, C: tl.constexpr, ACC: tl.constexpr):
        """Compute the logits of R tokens: <(y + lrelu(GN(v))) / sqrt 2, readout> + b_out."""
        row, group, channel = _index(R, 1, C)
        kb, rows = tl.program_id(1), tl.program_id(0) * R + row
        base, k = kb.to(tl.int64) * l, kb // b
        logit = tl.zeros([R, C // GROUP, 1, GROUP], ACC)
        for n0 in range(0, c, C):
            g, n = n0 // GROUP + group, n0 + channel
            here = _down(rows < l) & _across(n < c)
            y = _load_positions(y_ptr, kb, rows, l, w, n, c).to(ACC)
            v = tl.load(v_ptr + base * c + (_down(rows * c) + _across(n)), here, 0.0).to(ACC)
            z = y + _leaky(_norm(v, stat_ptr, gamma_ptr, beta_ptr, kb, k, g, n, c)[1])
            logit += z * _across(tl.load(readout_ptr + kb * c + n, n < c, 0.0) * HALF)
        logit = tl.sum(tl.sum(logit, 3), 1) + tl.load(bias_ptr + k)
        tl.store(logit_ptr + base + rows, logit, rows < l)

    @triton.jit
    def _readout_sums(y_ptr, v_ptr, grad_ptr, part_ptr, stat_ptr, gamma_ptr, beta_ptr, readout_ptr,
                      b, l, w, c, WEIGHTS: tl.constexpr, LOOPS: tl.constexpr, R: tl.constexpr,
                      C: tl.constexpr, ACC: tl.constexpr):
        """Compute sums over LOOPS R tokens, per channel, of a (the gradient of the second norm's
        output), a xhat and, with WEIGHTS, xhat and logit gradient times z."""
        row, group, channel = _index(R // 16, 16, C)
        kb, chunk = tl.program_id(2), tl.program_id(1)
        g, n = tl.program_id(0) * (C // GROUP) + group, tl.program_id(0) * C + channel
        base, k = kb.to(tl.int64) * l, kb // b
        readout = _across(tl.load(readout_ptr + kb * c + n, n < c, 0.0) * HALF)
        # each thread adds up its rows in registers; threads are summed once at the end
        s_a = tl.zeros([R // 16, C // GROUP, 16, GROUP], ACC)
        s_ax, s_x, s_z = s_a, s_a, s_a
        for loop in range(LOOPS):
            rows = (chunk * LOOPS + loop) * R + row
            here = _down(rows < l) & _across(n < c)
            grad = _down(tl.load(grad_ptr + base + rows, rows < l, 0.0))
            v = tl.load(v_ptr + base * c + (_down(rows * c) + _across(n)), here, 0.0).to(ACC)
            xhat, pre, _, _ = _norm(v, stat_ptr, gamma_ptr, beta_ptr, kb, k, g, n, c)
            a = grad * readout
            a = tl.where(here, tl.where(pre > 0, a, a * LEAK), 0.0)
            s_a += a
            s_ax += a * xhat
            if WEIGHTS:
                s_x += tl.where(here, xhat, 0.0)
                z = _load_positions(y_ptr, kb, rows, l, w, n, c).to(ACC) + _leaky(pre)
                s_z += grad * z
        part = (part_ptr
                + (kb * tl.num_programs(1) + chunk).to(tl.int64) * (4 if WEIGHTS else 2) * c + n)
        tl.store(part, _over_rows(s_a), n < c)
        tl.store(part + c, _over_rows(s_ax), n < c)
        if WEIGHTS:
            tl.store(part + 2 * c, _over_rows(s_x), n < c)
            tl.store(part + 3 * c, _over_rows(s_z) * HALF, n < c)

    @triton.jit
    def _norm_grad(x_ptr, g_ptr, out_ptr, grad_ptr, stat_ptr, gamma_ptr, beta_ptr, readout_ptr,
                   mean_ptr, b, l, w, c, SECOND: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
                   ACC: tl.constexpr):
        """Compute out = rstd (gamma a - m1 - xhat m2), the way back through a group norm.

        a is read (out may be its memory) or, at the SECOND norm, computed from the gradient of the
        logits. out has the positions of width w, which is l where they are the tokens.
        """
        kb, i, g, n = _place(c, R, C)
        rows, inside = _tokens(i, l, w)
        base, at = kb.to(tl.int64) * l, _down(rows * c) + _across(n)
        here = _down(inside) & _across(n < c)
        x = tl.load(x_ptr + base * c + at, here, 0.0).to(ACC)
        xhat, pre, rstd, gamma = _norm(x, stat_ptr, gamma_ptr, beta_ptr, kb, kb // b, g, n, c)
        if SECOND:
            a = (_down(tl.load(grad_ptr + base + rows, inside, 0.0))
                 * _across(tl.load(readout_ptr + kb * c + n, n < c, 0.0) * HALF))
            a = tl.where(pre > 0, a, a * LEAK)
        else:
            a = tl.load(g_ptr + base * c + at, here, 0.0).to(ACC)
        groups = c // GROUP
        m1 = tl.load(mean_ptr + kb * 2 * groups + g, g < groups, 0.0)
        m2 = tl.load(mean_ptr + (kb * 2 + 1) * groups + g, g < groups, 0.0)
        out = rstd * (a * gamma - m1[None, :, None, None] - xhat * m2[None, :, None, None])
        _store_positions(out_ptr, tl.where(here, out, 0.0), kb, i, l, w, n, c)


# --- launches ---

class Tiles(NamedTuple):
    """Hold the launch parameters of the products."""
    tokens: int     # of a tile, forward and backward to activations; a power of two
    channels: int
    depth: int      # channels a step
    warps: int
    stages: int
    w_rows: int     # the weights' gradient: input channels, output channels, tokens a step
    w_cols: int
    w_tokens: int
    w_warps: int
    w_stages: int


# (architecture, class) -> Tiles. Nothing is measured on a GPU. No row spills (Triton 3.7.1). The
# comments give the cycles of the products in a pass of the inner loop and what bounds that pass, by
# python -m kernels.aot: products / bound (resource).
TABLE = {
    (0, "any"):      Tiles(64, 32, 64, 4, 1, 64, 32, 64, 4, 1),        # the interpreter
    (80, "wide"):    Tiles(128, 128, 64, 8, 3, 128, 128, 32, 8, 4),    # 1024 / 1024 (products)
    (80, "narrow"):  Tiles(64, 64, 64, 4, 3, 64, 64, 64, 4, 3),
    (80, "fp32"):    Tiles(64, 32, 16, 4, 2, 32, 64, 16, 4, 2),        # no tensor cores
    # a smaller tile would be bound by shared memory, which takes 1024 as well
    (90, "wide"):    Tiles(128, 256, 64, 8, 4, 128, 256, 64, 8, 3),    # 1024 / 1024 (products)
    (90, "narrow"):  Tiles(64, 64, 64, 4, 3, 64, 64, 64, 4, 3),
    (100, "wide"):   Tiles(128, 256, 64, 8, 4, 128, 256, 64, 8, 3),    # 512 / 768 (shared)
    (100, "narrow"): Tiles(64, 64, 64, 4, 3, 64, 64, 64, 4, 3),
}
LIKE = {86: 80, 87: 80, 89: 80, 103: 100, 120: 80, 121: 80}  # take the rows of another architecture
# tokens and channels per program of the passes bound by memory; they compile to at most
# 128 registers without spills
ELEMENTS = dict(R=64, C=128, num_warps=8, num_stages=1)
REDUCE = dict(R=16, C=128, num_warps=8, num_stages=1)


@functools.cache
def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _arch(device: torch.device) -> int:
    """Return major * 10 + minor of the GPU to compile for, 0 for the interpreter."""
    if ARCH or INTERPRET:
        return ARCH or 0
    return _capability(device)


@functools.cache
def _rows(arch: int) -> int:
    """Return the architecture whose rows of TABLE are taken; warn once where that is a guess."""
    arch = LIKE.get(arch, arch)
    if arch not in (0, 80, 90, 100):
        warnings.warn(f"heads: no launch parameters for sm_{arch}, those of sm_80 are taken")
        return 80
    return arch


def _tiles(x: Tensor, l: int, c: int) -> Tiles:
    """Return the Tiles for l tokens per sample of x's dtype and c outputs; "wide" fills them."""
    rows = _rows(_arch(x.device))
    if not rows or x.element_size() > 2:
        return TABLE[(80, "fp32") if rows else (0, "any")]
    return TABLE[rows, "wide" if c > 128 and l >= 128 else "narrow"]


def _weights(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return weights [heads times taps, in, out], cast for the products."""
    x = x.to(dtype).reshape(-1, *x.shape[-2:]).contiguous()
    return x.clone() if x.data_ptr() % 16 else x            # descriptors need an aligned start


def _dtypes(dtype: torch.dtype) -> tuple[torch.dtype, torch.dtype, "tl.dtype"]:
    """Return the dtypes of activations and products, of sums, and the latter for Triton."""
    if dtype == torch.float64:
        return dtype, dtype, tl.float64
    if INTERPRET and dtype == torch.bfloat16:        # the interpreter's bf16 products are incorrect
        dtype = torch.float32
    return dtype, torch.float32, tl.float32


def _sums(acc: "tl.dtype") -> torch.dtype:
    """Return torch's name of the dtype of sums."""
    return torch.float64 if acc is tl.float64 else torch.float32


def _positions(h: int, w: int) -> int:
    """Return how many positions a grid has: a zero follows each row but the last."""
    return h * (w + 1) - 1


def _tma(device: torch.device) -> bool:
    """Return whether tiles are copied by descriptors (TMA); else by pointers (cp.async)."""
    return not 0 < _arch(device) < 90


def _tile_of(x: Tensor, *block: int) -> "TensorDescriptor | tuple":
    """Return what _load reads `block` rows and columns of contiguous x [n, rows, columns] by."""
    if _tma(x.device):
        return TensorDescriptor(x, x.shape, x.stride(), (1, *block))
    return x, *x.shape[1:]


def _multiply(src: Tensor, weight: Tensor, out: Tensor, grid: tuple[int, int], acc, taps: int = 1,
              back: bool = False, bias: Tensor | None = None,
              norm: tuple[Tensor, ...] = ()) -> Tensor:
    """Compute out [k, b, l, c] = src [k b, positions, d] * weight; return the partials
    [k b, tiles, 3, groups or c] of the epilogue."""
    (h, w), (k, b, _, c), d = grid, out.shape, src.shape[-1]
    tiles = _tiles(weight, h * w, c)
    bk, count = tiles.depth, triton.cdiv(_positions(h, w), tiles.tokens)
    pieces = 2 if tiles.channels > 128 else 1
    epilogue, rows, columns = "store", 0, 0
    if bias is not None:
        epilogue, rows, columns = "stats", count, c // GROUP_SIZE
    elif norm:
        epilogue, rows, columns = "norm", count, c
    part = out.new_empty(k * b, rows, 3, columns, dtype=_sums(acc))
    spare = part if bias is None else bias                       # for pointers that no kernel reads
    u, stat, gamma, beta, grad, readout = norm or (spare,) * 6
    block = (tiles.channels, bk) if back else (bk, tiles.channels)
    _product[(triton.cdiv(c, tiles.channels) * count * k * b,)](
        _tile_of(src, tiles.tokens, bk), _tile_of(weight, *block), out, part, spare, u, stat, gamma,
        beta, grad, readout, b, h, w, d, c, TAPS=taps, BACK=back, EPILOGUE=epilogue, PIECES=pieces,
        TOKENS=tiles.tokens, BN=tiles.channels, BK=bk, ACC=acc, num_warps=tiles.warps,
        num_stages=tiles.stages)
    return part


def _multiply_back(src: Tensor, grad: Tensor, b: int, grid: tuple[int, int], acc,
                   taps: int) -> Tensor:
    """Return the gradient [k, taps, d, c] of a product's weights from src [k b, positions, d] and
    grad [k b, positions, c]."""
    (h, w), k, d, c = grid, src.shape[0] // b, src.shape[-1], grad.shape[-1]
    tiles = _tiles(grad, h * w, c)
    programs = triton.cdiv(d, tiles.w_rows) * triton.cdiv(c, tiles.w_cols) * taps * k
    # few weights: split the positions until a large GPU is full; partial sums, no atomics
    split = max(1, min(256 // programs, b * triton.cdiv(_positions(h, w), tiles.w_tokens) // 4))
    out = grad.new_empty(split, k, taps, d, c, dtype=_sums(acc))
    _weight_grad[(programs * split,)](
        _tile_of(src, tiles.w_tokens, tiles.w_rows), _tile_of(grad, tiles.w_tokens, tiles.w_cols),
        out, b, h, w, d, c, k, TAPS=taps, SPLIT=split, TOKENS=tiles.w_tokens, BM=tiles.w_rows,
        BN=tiles.w_cols, ACC=acc, num_warps=tiles.w_warps, num_stages=tiles.w_stages)
    return out.sum(0) if split > 1 else out[0]


def _merge(part: Tensor) -> Tensor:
    """Return (mean, rstd) [k b, 2, groups] of the partials (count, mean, M2) [k b, tiles, 3,
    groups], merged by Chan's rule."""
    n, mean, m2 = part.unbind(2)
    total, first = n.sum(1), mean[:, :1]
    center = first + (n * (mean - first)).sum(1, True) / total[:, None]
    var = (m2 + n * (mean - center).square()).sum(1) / total
    return torch.stack([center[:, 0], torch.rsqrt(var + EPS)], 1)


def _elements(kernel, x: Tensor, w: int, *args, acc, **constants) -> None:
    """Start a pass over x [k, b, l, c], whose result has the positions of width w."""
    k, b, l, c = x.shape
    blocks = triton.cdiv(_positions(l // w, w), ELEMENTS["R"]) * triton.cdiv(c, ELEMENTS["C"])
    kernel[(blocks, k * b)](*args, b, l, w, c, ACC=acc, **constants, **ELEMENTS)


def _reduced(sums: Tensor, stat: Tensor, gamma: Tensor, l: int) -> tuple[Tensor, list[Tensor]]:
    """Return the means [k, b, 2, groups] of gamma g and gamma g xhat and, if the sums have xhat,
    the gradients [k, c] of the bias before the norm, gamma and beta.

    sums: [k, b, 2 or more, c] over tokens of g (the gradient of gamma xhat + beta), g xhat, xhat.
    """
    means = (sums[:, :, :2] * gamma[:, None, None]).unflatten(-1, (-1, GROUP_SIZE)).sum(-1)
    means = means / (l * GROUP_SIZE)
    if sums.shape[2] == 2:
        return means, []
    m1, m2, rstd = (t.repeat_interleave(GROUP_SIZE, -1) for t in (*means.unbind(2), stat[:, :, 1]))
    g, gx, x = sums[:, :, :3].unbind(2)
    return means, [(rstd * (gamma[:, None] * g - l * m1 - m2 * x)).sum(1), gx.sum(1), g.sum(1)]


# --- operators ---

# custom_op, not triton_op: outside Dynamo (which does not look into operators) torch <= 2.13 cannot
# trace launches with descriptors; torch.compile would silently drop them. An opaque operator costs
# nothing here.

@torch.library.custom_op("ladd::heads_forward", mutates_args=())
def heads_forward(feats: Tensor, w_in: Tensor, b_in: Tensor, gamma1: Tensor, beta1: Tensor,
                  w_conv: Tensor, b_conv: Tensor, gamma2: Tensor, beta2: Tensor, readout: Tensor,
                  b_out: Tensor, h: int, w: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return logits [k, b, h, w], u and v [k, b, l, c] before the norms, and the (mean, rstd)
    [k, b, 2, groups] of u and of v, from contiguous features [k, b, l, d]."""
    (k, b, l, d), c = feats.shape, w_in.shape[2]
    dtype, total, acc = _dtypes(feats.dtype)
    b_in, gamma1, beta1, b_conv, gamma2, beta2, readout, b_out = (
        t.to(total).contiguous()
        for t in (b_in, gamma1, beta1, b_conv, gamma2, beta2, readout, b_out))
    u, v = (feats.new_empty(k, b, l, c, dtype=dtype) for _ in range(2))
    y = feats.new_empty(k * b, _positions(h, w), c, dtype=dtype)
    logits = u.new_empty(k, b, h, w, dtype=total)
    # for a 1x1 product all tokens are one row
    stat1 = _merge(_multiply(feats.view(k * b, l, d), _weights(w_in, dtype), u, (1, l), acc,
                             bias=b_in))
    _elements(_activate, u, w, u, y, stat1, gamma1, beta1, acc=acc)
    stat2 = _merge(_multiply(y, _weights(w_conv, dtype), v, (h, w), acc, 9, bias=b_conv))
    _readout[(triton.cdiv(l, REDUCE["R"]), k * b)](
        y, v, logits, stat2, gamma2, beta2, readout, b_out, b, l, w, c, ACC=acc, **REDUCE)
    return logits, u, v, stat1.unflatten(0, (k, b)), stat2.unflatten(0, (k, b))


@heads_forward.register_fake
def _(feats, w_in, b_in, gamma1, beta1, w_conv, b_conv, gamma2, beta2, readout, b_out, h, w):
    (k, b, l, _), c = feats.shape, w_in.shape[2]
    dtype, total, _ = _dtypes(feats.dtype)

    def new(*shape: int, dtype: torch.dtype = total) -> Tensor:
        return feats.new_empty(shape, dtype=dtype)

    return (new(k, b, h, w), *(new(k, b, l, c, dtype=dtype) for _ in range(2)),
            *(new(k, b, 2, c // GROUP_SIZE) for _ in range(2)))


@torch.library.custom_op("ladd::heads_backward", mutates_args=())
def heads_backward(grad: Tensor, feats: Tensor, w_in: Tensor, gamma1: Tensor, beta1: Tensor,
                   w_conv: Tensor, gamma2: Tensor, beta2: Tensor, readout: Tensor, u: Tensor,
                   v: Tensor, stat1: Tensor, stat2: Tensor, need_feats: bool,
                   need_weights: bool) -> list[Tensor]:
    """Return the gradients of feats [k, b, l, d], w_in, b_in, gamma1, beta1, w_conv, b_conv,
    gamma2, beta2, readout [k, b, c] and b_out. What is not needed is not computed and has no
    elements; without need_weights only the dtype of feats is used."""
    (k, b, l, c), (h, w), d = u.shape, grad.shape[2:], w_in.shape[1]
    dtype, total, acc = _dtypes(feats.dtype)
    gamma1_, beta1_, gamma2_, beta2_, readout_, grad = (
        t.to(total).contiguous() for t in (gamma1, beta1, gamma2, beta2, readout, grad))
    norm1, norm2 = (stat1, gamma1_, beta1_), (stat2, gamma2_, beta2_)
    y = u
    if need_weights:                                  # y is not kept: one pass recomputes it
        y = u.new_empty(k * b, _positions(h, w), c)
        _elements(_activate, u, w, u, y, *norm1, acc=acc)

    # back through the readout and the second norm
    loops = min(32, triton.cdiv(l, REDUCE["R"]))
    chunks = triton.cdiv(l, loops * REDUCE["R"])
    part = u.new_empty(k, b, chunks, 4 if need_weights else 2, c, dtype=total)
    _readout_sums[(triton.cdiv(c, REDUCE["C"]), chunks, k * b)](
        y, v, grad, part, *norm2, readout_, b, l, w, c, WEIGHTS=need_weights, LOOPS=loops, ACC=acc,
        **REDUCE)
    sums2 = part.sum(2)
    means2, grads2 = _reduced(sums2, stat2, gamma2_, l)
    dv, du = u.new_empty(k * b, _positions(h, w), c), torch.empty_like(u)
    _elements(_norm_grad, v, w, v, v, dv, grad, *norm2, readout_, means2, acc=acc, SECOND=True)

    # back through the convolution and the first norm
    part = _multiply(dv, _weights(w_conv, dtype), du, (h, w), acc, 9, True,
                     norm=(u, *norm1, grad, readout_))
    means1, grads1 = _reduced(part.sum(1).unflatten(0, (k, b)), stat1, gamma1_, l)
    _elements(_norm_grad, u, l, u, du, du, grad, *norm1, readout_, means1, acc=acc, SECOND=False)

    out, du = [grad.new_empty(0) for _ in range(11)], du.view(k * b, l, c)
    if need_feats:
        out[0] = feats.new_empty(k, b, l, d)
        _multiply(du, _weights(w_in, dtype), out[0], (1, l), acc, back=True)
    if need_weights:
        out[1:] = [_multiply_back(feats.view(k * b, l, d), du, b, (1, l), acc, 1)[:, 0], *grads1,
                   _multiply_back(y, dv, b, (h, w), acc, 9).unflatten(1, (3, 3)), *grads2,
                   sums2[:, :, 3].contiguous(), grad.sum((1, 2, 3))]
    return out


@heads_backward.register_fake
def _(grad, feats, w_in, gamma1, beta1, w_conv, gamma2, beta2, readout, u, v, stat1, stat2,
      need_feats, need_weights):
    (k, b, l, c), d, total = u.shape, w_in.shape[1], stat1.dtype

    def new(needed: bool, *shape: int, dtype: torch.dtype = total) -> Tensor:
        return u.new_empty(shape if needed else 0, dtype=dtype)

    shapes = ((k, d, c), (k, c), (k, c), (k, c), (k, 3, 3, c, c), (k, c), (k, c), (k, c),
              (k, b, c), (k,))
    return [new(need_feats, k, b, l, d, dtype=feats.dtype if need_feats else total),
            *(new(need_weights, *shape) for shape in shapes)]


def _setup(ctx, inputs, output) -> None:
    """Save the parameters, u, v (2 b l c numbers per head in the dtype of the features) and the
    statistics, and for the weights' gradient the features. Backward recomputes y, both leaky ReLUs
    and the residual."""
    feats, w_in, _, gamma1, beta1, w_conv, _, gamma2, beta2, readout, *_ = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.need_weights = any(ctx.needs_input_grad[1:11])
    ctx.save_for_backward(feats if ctx.need_weights else feats.new_empty(0), w_in, gamma1, beta1,
                          w_conv, gamma2, beta2, readout, *output[1:])
    ctx.dtypes = [t.dtype for t in inputs[1:11]]


def _backward(ctx, grad, *_):
    needs = ctx.needs_input_grad
    if grad is None:                                  # nothing came back
        return (None,) * 13
    found = heads_backward(grad, *ctx.saved_tensors, needs[0], ctx.need_weights)
    d_weights = [g.to(t) if need else None
                 for g, t, need in zip(found[1:], ctx.dtypes, needs[1:11])]
    return found[0] if needs[0] else None, *d_weights, None, None


heads_forward.register_autograd(_backward, setup_context=_setup)


# --- public ---

def _check(feats: list[Tensor], params: HeadParams, cond: Tensor, grid: tuple[int, int]) -> None:
    (k, d, c), (h, w), first = params.w_in.shape, grid, feats[0]
    allowed = DTYPES if INTERPRET else DTYPES[:3]
    devices, dtypes = {t.device for t in (*feats, *params, cond)}, {f.dtype for f in feats}
    if len(feats) != k or any(f.shape[1:] != (h * w, d) or f.shape != first.shape for f in feats):
        raise ValueError(f"heads: features must be {k} of [b, {h * w}, {d}] for grid {h}x{w} "
                         f"(got {len(feats)} of {sorted({tuple(f.shape) for f in feats})})")
    if triton is None or not (first.is_cuda or INTERPRET or ARCH):
        missing = ", without Triton" if triton is None else ""
        raise RuntimeError("heads: features must be on CUDA, or on the CPU with TRITON_INTERPRET=1 "
                           f"(got {first.device}{missing}); the reference runs anywhere")
    if len(devices) > 1 or len(dtypes) > 1 or first.dtype not in allowed:
        got = ", ".join(sorted(map(str, (*devices, *dtypes))))
        raise ValueError("heads: tensors must be on one device and features of one dtype, "
                         f"{' or '.join(map(str, allowed))} (got {got})")
    if c % GROUP_SIZE:
        raise ValueError(f"heads: the width must be a multiple of {GROUP_SIZE} (got {c})")
    if not first.numel():
        raise ValueError(f"heads: features must not be empty (got {tuple(first.shape)})")
    if d * first.element_size() % 16:      # rows that bulk copies (TMA) can read
        raise ValueError("heads: the features' width must be a multiple of "
                         f"{16 // first.element_size()} in {first.dtype} (got {d})")


def discriminator_heads(feats: list[Tensor], params: HeadParams, cond: Tensor,
                        grid: tuple[int, int]) -> Tensor:
    """Compute the logits [k, b, h, w] of `reference_discriminator_heads` by Triton kernels, in fp32
    (float64 from float64).

    feats: k tensors [b, h*w, d] of one dtype and any strides, copied once into one; d in multiples
    of 16 bytes. The parameters are cast to that dtype for the products, which add up in fp32. The
    small products with cond are torch's. Backward computes what needs a gradient: to the features
    without weights' gradients where the parameters and cond require none, and the other way round.
    Raises ValueError if sizes, dtypes or devices do not fit, RuntimeError without a GPU.
    """
    _check(feats, params, cond, grid)
    p, (h, w), total = params, grid, _dtypes(feats[0].dtype)[1]
    readout = p.w_out.to(total)[:, None] + cond.to(total) @ p.w_cond.to(total)         # [k, b, c]
    return heads_forward(torch.stack(feats), p.w_in, p.b_in, p.gamma1, p.beta1, p.w_conv, p.b_conv,
                         p.gamma2, p.beta2, readout * p.w_in.shape[2] ** -0.5, p.b_out, h, w)[0]


# --- check and time: python kernels/heads.py ---

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
    """Print errors against the reference, relative to the largest value; on a GPU also speed."""
    cuda, g = torch.cuda.is_available(), torch.Generator().manual_seed(0)
    cases = [(2, 2, 3, 5, 64, 48, torch.float32), (1, 1, 7, 9, 128, 64, torch.float32)]
    if cuda:
        cases += [(4, 16, 16, 16, 512, 256, torch.bfloat16),
                  (24, 1, 64, 64, 1536, 512, torch.bfloat16)]
    print("heads batch grid d width dtype | errors: logits, gradients | "
          "TFLOP/s: forward, features, weights")
    for k, b, h, w, d, c, dtype in cases:
        def draw(*shape: int, scale: float = 0.5) -> Tensor:
            return torch.randn(shape, generator=g) * scale

        def call(function, t: list[Tensor]) -> Tensor:
            return function(list(t[:k]), HeadParams(*t[k:k + 11]), t[-1], (h, w))

        params = HeadParams(*(draw(k, c) for _ in range(11)))._replace(
            w_in=draw(k, d, c, scale=d ** -0.5), w_conv=draw(k, 3, 3, c, c, scale=(9 * c) ** -0.5),
            w_cond=draw(k, 64, c), b_out=draw(k))
        leaves = [*(draw(b, h * w, d).to(dtype) for _ in range(k)), *params, draw(b, 64)]
        leaves = [t.to("cuda" if cuda else "cpu").requires_grad_() for t in leaves]
        out = [call(f, leaves) for f in (discriminator_heads, reference_discriminator_heads)]
        weight = torch.randn(out[0].shape, generator=g).to(out[0])
        grads = [torch.autograd.grad(y, leaves, weight) for y in out]
        pairs = zip((out[0], *grads[0]), (out[1], *grads[1]))
        errors = [((a - e).abs().max() / e.abs().max()).item() for a, e in pairs]
        line = f"{k:5} {b:5} {h:2}x{w} {d:4} {c:3} {str(dtype)[6:]} | "
        line += f"{errors[0]:.0e} {max(errors[1:]):.0e} |"
        if cuda and dtype == torch.bfloat16:
            frozen, product, conv = [t.detach() for t in leaves], 2 * d * c, 18 * c * c
            for given, wanted, flops in ((frozen, [], product + conv),
                                         (leaves[:k] + frozen[k:], leaves[:k], product + conv),
                                         (frozen[:k] + leaves[k:], leaves[k:], product + 2 * conv)):
                y = call(discriminator_heads, given)

                def run():
                    if wanted:
                        return torch.autograd.grad(y, wanted, weight, retain_graph=True)
                    return call(discriminator_heads, given)

                line += f" {flops * k * b * h * w / milliseconds(run) / 1e9:8.0f}"
        print(line)
        limit = 5e-2 if dtype == torch.bfloat16 else 1e-4
        if not max(errors) < limit:
            raise SystemExit(f"heads: errors must be below {limit:.0e} (got {errors})")


if __name__ == "__main__":
    main()
