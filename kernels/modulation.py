"""Adaptive layer norm of a DiT block and the gated residual between two matrix products.

    modulate(x)     = hat (1 + scale) + shift,  hat = (x - mean x) rstd,
                      rstd = 1 / sqrt(var x + eps)
    gate(x, branch) = x + gate branch
    gate_modulate   = (z, modulate(z))  with z = x + gate branch
    modulate2       = two modulations of one normalised row (the second attention of MMDiT-X)

Gradient, with dy that of a modulated row, w = dy (1 + scale) (modulate2: summed over both), z = x
where there is no gate, and means over the width of a row:

    dz     = rstd (w - mean w - hat mean(w hat)) + what reaches z as the residual
    dx     = dz,  dbranch = gate dz
    dscale = sum dy hat,  dshift = sum dy,  dgate = sum dz branch  sums over the tokens of a sample

x, branch [b, l, d], d a multiple of 64, any batch and token stride; shift, scale, gate [b, d],
views of the modulation chunks with any row stride (0 too), read in place. What has no unit stride
over the width is copied once. One dtype for all: bf16, fp16, fp32 or fp64; arithmetic and sums in
fp32 (fp64 for fp64), one rounding a stored tensor. The kernels keep mean and rstd (8 bytes a row)
and recompute hat, from z as it was stored.

Bytes, in tensors of b l d, forward / backward: modulate 2 / 3, modulate2 3 / 4, gate 3 / 3,
gate_modulate 4 / 6; about 10 / 20 FLOPs an element: bound by memory. One kernel each way; what
needs no gradient is neither read nor computed. Sums go through partials [b, parts, n, d] without
atomics, so they are deterministic.

Source: Peebles & Xie 2023 (DiT), Sec. 3.2; Esser et al. 2024 (SD3), Fig. 2. The norm has no affine
parameters of its own.
"""
import functools
import itertools
import os
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

if __name__ == "__main__" and not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")       # Triton reads it when it is imported
try:
    import triton
    import triton.language as tl
except ImportError:                         # platforms without Triton keep the references
    triton = None

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
ARCH: int | None = None       # kernels/aot.py sets it to compile for a GPU that is not here
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


# --- reference ---

def _acc(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def reference_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """Return LayerNorm(x) * (1 + scale) + shift, computed in fp32 or better; x [b, l, d], shift and
    scale [b, d]."""
    y = F.layer_norm(_acc(x), x.shape[-1:], eps=eps)
    return torch.addcmul(_acc(shift).unsqueeze(1), y, 1 + _acc(scale).unsqueeze(1)).to(x.dtype)


def reference_modulate2(x: Tensor, shift: Tensor, scale: Tensor, shift2: Tensor, scale2: Tensor,
                        eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Return two modulations of one normalised row: LN(x) (1 + scale) + shift and
    LN(x) (1 + scale2) + shift2."""
    return reference_modulate(x, shift, scale, eps), reference_modulate(x, shift2, scale2, eps)


def reference_gate(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    """Return x + gate * branch; x and branch [b, l, d], gate [b, d]."""
    return torch.addcmul(_acc(x), _acc(gate).unsqueeze(1), _acc(branch)).to(x.dtype)


def reference_gate_modulate(x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor,
                            eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Return (x', LN(x') (1 + scale) + shift) with x' = x + gate * branch:
    the residual and the input of the next product."""
    x = torch.addcmul(_acc(x), _acc(gate).unsqueeze(1), _acc(branch))
    return x.to(branch.dtype), reference_modulate(x, shift, scale, eps).to(branch.dtype)


# --- kernels ---

# A row is held in registers as D // BLOCK pieces of BLOCK columns and one of TAIL, if D has a rest.

if triton is not None:
    @triton.jit(do_not_specialize=["L"])
    def _forward(x_ptr, branch_ptr, gate_ptr, shift_ptr, scale_ptr, shift2_ptr, scale2_ptr, z_ptr,
                 y_ptr, y2_ptr, stats_ptr, L, stride_xb, stride_xl, stride_nb, stride_nl,
                 stride_gate, stride_shift, stride_scale, stride_shift2, stride_scale2,
                 EPS: tl.constexpr, D: tl.constexpr, GATE: tl.constexpr, NORMS: tl.constexpr,
                 ROWS: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr):
        """Compute z = x + gate branch if GATE, and y and y2, the NORMS modulations of it, for ROWS
        tokens of a sample."""
        ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
        FULL: tl.constexpr = D // BLOCK
        PIECES: tl.constexpr = FULL + (1 if TAIL > 0 else 0)
        # which rows; in 64 bits, since b l d may pass 2^31
        b, rows = tl.program_id(1).to(tl.int64), tl.arange(0, ROWS)[:, None]
        at = tl.program_id(0).to(tl.int64) * ROWS + rows
        live, out = at < L, (b * L + at) * D

        # Load x and add the gated branch. Vectors are read as [ROWS, columns] (rows * 0), so that
        # they have the layout of the tile.
        xs = ()
        total, rest = tl.zeros([ROWS, BLOCK], ACC), tl.zeros([ROWS, 1], ACC)
        for c in tl.static_range(PIECES):
            cols = c * BLOCK + tl.arange(0, BLOCK if c < FULL else TAIL)[None, :]
            mask = live & (cols < D)
            x = tl.load(x_ptr + b * stride_xb + at * stride_xl + cols, mask, 0).to(ACC)
            if GATE:
                gate = tl.load(gate_ptr + b * stride_gate + rows * 0 + cols, mask, 0).to(ACC)
                x += gate * tl.load(branch_ptr + b * stride_nb + at * stride_nl + cols,
                                    mask, 0).to(ACC)
                tl.store(z_ptr + out + cols, x, mask)
            xs = xs + (x,)
            if c < FULL:
                total += x
            else:
                rest += tl.sum(x, 1, keep_dims=True)

        if NORMS > 0:
            # statistics in two passes over the registers: a row far from zero keeps its variance
            mean = (tl.sum(total, 1, keep_dims=True) + rest) / D
            total, rest = tl.zeros([ROWS, BLOCK], ACC), tl.zeros([ROWS, 1], ACC)
            for c in tl.static_range(PIECES):
                delta = xs[c] - mean
                if c < FULL:
                    total += delta * delta
                else:
                    cols = c * BLOCK + tl.arange(0, TAIL)[None, :]
                    rest += tl.sum(tl.where(cols < D, delta * delta, 0), 1, keep_dims=True)
            rstd = tl.rsqrt((tl.sum(total, 1, keep_dims=True) + rest) / D + EPS)
            tl.store(stats_ptr + (b * L + at) * 2, mean, live)
            tl.store(stats_ptr + (b * L + at) * 2 + 1, rstd, live)

            # modulate
            for c in tl.static_range(PIECES):
                cols = c * BLOCK + tl.arange(0, BLOCK if c < FULL else TAIL)[None, :]
                mask = live & (cols < D)
                hat = (xs[c] - mean) * rstd
                scale = tl.load(scale_ptr + b * stride_scale + rows * 0 + cols, mask, 0).to(ACC)
                shift = tl.load(shift_ptr + b * stride_shift + rows * 0 + cols, mask, 0).to(ACC)
                tl.store(y_ptr + out + cols, hat * (1 + scale) + shift, mask)
                if NORMS > 1:
                    scale = tl.load(scale2_ptr + b * stride_scale2 + rows * 0 + cols,
                                    mask, 0).to(ACC)
                    shift = tl.load(shift2_ptr + b * stride_shift2 + rows * 0 + cols,
                                    mask, 0).to(ACC)
                    tl.store(y2_ptr + out + cols, hat * (1 + scale) + shift, mask)

    @triton.jit(do_not_specialize=["L"])
    def _backward(dz_ptr, dy_ptr, dy2_ptr, h_ptr, branch_ptr, stats_ptr, gate_ptr, scale_ptr,
                  scale2_ptr, dx_ptr, dbranch_ptr, partial_ptr, L, stride_dzb, stride_dzl,
                  stride_dyb, stride_dyl, stride_dy2b, stride_dy2l, stride_hb, stride_hl, stride_nb,
                  stride_nl, stride_gate, stride_scale, stride_scale2, D: tl.constexpr,
                  NORMS: tl.constexpr, DZ: tl.constexpr, DX: tl.constexpr, DBRANCH: tl.constexpr,
                  DGATE: tl.constexpr, DSHIFT: tl.constexpr, DSCALE: tl.constexpr,
                  DSHIFT2: tl.constexpr, DSCALE2: tl.constexpr, ROWS: tl.constexpr,
                  BLOCK: tl.constexpr, TAIL: tl.constexpr):
        """Compute dx, dbranch and the program's share of the sums, over its tokens of one sample.

        The flags D* say which gradients are wanted, DZ whether the residual has a gradient; h is
        what was normalised.
        """
        ACC: tl.constexpr = tl.float64 if partial_ptr.dtype.element_ty == tl.float64 else tl.float32
        FULL: tl.constexpr = D // BLOCK
        PIECES: tl.constexpr = FULL + (1 if TAIL > 0 else 0)
        COUNT: tl.constexpr = DSHIFT + DSCALE + DSHIFT2 + DSCALE2
        # which rows
        b, rows = tl.program_id(1).to(tl.int64), tl.arange(0, ROWS)[:, None]
        part, parts = tl.program_id(0), tl.num_programs(0)
        span = (L + parts * ROWS - 1) // (parts * ROWS) * ROWS

        # sums over tokens stay in registers: COUNT tiles per piece, then dgate's, one per piece
        sums = ()
        for c in tl.static_range(PIECES):
            for i in tl.static_range(COUNT):
                sums = sums + (tl.zeros([ROWS, BLOCK if c < FULL else TAIL], ACC),)
        for c in tl.static_range(PIECES if DGATE else 0):
            sums = sums + (tl.zeros([ROWS, BLOCK if c < FULL else TAIL], ACC),)

        for i in range(0, min(span, L - part * span), ROWS):
            at = part.to(tl.int64) * span + i + rows
            live, out = at < L, (b * L + at) * D
            new, hats, ws = (), (), ()                     # new is built in the order of sums
            if NORMS > 0:
                mean = tl.load(stats_ptr + (b * L + at) * 2, live, 0)
                rstd = tl.load(stats_ptr + (b * L + at) * 2 + 1, live, 0)
                a1, a2 = tl.zeros([ROWS, BLOCK], ACC), tl.zeros([ROWS, BLOCK], ACC)
                m1, m2 = tl.zeros([ROWS, 1], ACC), tl.zeros([ROWS, 1], ACC)
                for c in tl.static_range(PIECES):
                    cols = c * BLOCK + tl.arange(0, BLOCK if c < FULL else TAIL)[None, :]
                    mask = live & (cols < D)
                    h = tl.load(h_ptr + b * stride_hb + at * stride_hl + cols, mask, 0).to(ACC)
                    dy = tl.load(dy_ptr + b * stride_dyb + at * stride_dyl + cols, mask, 0).to(ACC)
                    scale = tl.load(scale_ptr + b * stride_scale + rows * 0 + cols, mask, 0).to(ACC)
                    hat, w = (h - mean) * rstd, dy * (1 + scale)
                    if DSHIFT:
                        new = new + (sums[len(new)] + dy,)
                    if DSCALE:
                        new = new + (sums[len(new)] + dy * hat,)
                    if NORMS > 1:
                        dy = tl.load(dy2_ptr + b * stride_dy2b + at * stride_dy2l + cols,
                                     mask, 0).to(ACC)
                        scale = tl.load(scale2_ptr + b * stride_scale2 + rows * 0 + cols,
                                        mask, 0).to(ACC)
                        w += dy * (1 + scale)
                        if DSHIFT2:
                            new = new + (sums[len(new)] + dy,)
                        if DSCALE2:
                            new = new + (sums[len(new)] + dy * hat,)
                    hats, ws = hats + (hat,), ws + (w,)
                    if c < FULL:
                        a1 += w
                        a2 += w * hat
                    else:
                        m1 += tl.sum(w, 1, keep_dims=True)
                        m2 += tl.sum(w * hat, 1, keep_dims=True)
                m1 = (tl.sum(a1, 1, keep_dims=True) + m1) / D
                m2 = (tl.sum(a2, 1, keep_dims=True) + m2) / D
            for c in tl.static_range(PIECES if DX or DBRANCH or DGATE else 0):
                cols = c * BLOCK + tl.arange(0, BLOCK if c < FULL else TAIL)[None, :]
                mask = live & (cols < D)
                dx = tl.zeros([ROWS, BLOCK if c < FULL else TAIL], ACC)
                if NORMS > 0:
                    dx = rstd * (ws[c] - m1 - hats[c] * m2)
                if DZ:
                    dx += tl.load(dz_ptr + b * stride_dzb + at * stride_dzl + cols, mask, 0).to(ACC)
                if DX:
                    tl.store(dx_ptr + out + cols, dx, mask)
                if DBRANCH:
                    gate = tl.load(gate_ptr + b * stride_gate + rows * 0 + cols, mask, 0).to(ACC)
                    tl.store(dbranch_ptr + out + cols, gate * dx, mask)
                if DGATE:
                    branch = tl.load(branch_ptr + b * stride_nb + at * stride_nl + cols,
                                     mask, 0).to(ACC)
                    new = new + (sums[len(new)] + dx * branch,)
            sums = new

        # store the sums: shift, scale, shift2, scale2, gate, as far as wanted
        partial_ptr += (b * parts + part) * (COUNT + DGATE) * D
        for c in tl.static_range(PIECES):
            cols = c * BLOCK + tl.arange(0, BLOCK if c < FULL else TAIL)
            for i in tl.static_range(COUNT):
                tl.store(partial_ptr + i * D + cols, tl.sum(sums[c * COUNT + i], 0), cols < D)
            if DGATE:
                tl.store(partial_ptr + COUNT * D + cols, tl.sum(sums[PIECES * COUNT + c], 0),
                         cols < D)


# --- launch ---

class Launch(NamedTuple):
    """Hold the launch parameters of a kernel."""
    block: int        # columns of a piece
    rows: int         # tokens that a program works on at once
    warps: int        # per program
    ctas: int = 0     # backward: at most this many programs per SM,
    least: int = 1    # each of this many tokens or more


# Modelled, nothing was measured on a GPU: registers are the most that Triton 3.7 compiles for bf16
# on sm_90 over the four functions; sm_80, 89 and 100 differ by a few. In flight: bytes that a full
# SM has asked for; 18 KB hide the latency of 3.35 TB/s on 132 SMs (H100), 43 KB that of 8 TB/s on
# 148 (B200).
#   forward   One warp per row: sums without barriers. Width 1536: 80 registers, 6 CTAs, 72 KB in
#             flight; 2432: 128, 4, 76 KB. Two warps per row need 48 to 79 registers, but nine
#             barriers per program.
#   backward  No sums over tokens (frozen networks). Two warps per row. Width 1536: 128 registers,
#             4 CTAs, 72 KB; 2432: 168, 3, 84 KB. One warp needs 168 and 242. More CTAs than fit
#             cost nothing here and end evenly.
#   sums      Two warps per row: a thread holds 24 columns at width 1536, 40 at 2432, with up to
#             four sums of each: 251 registers, 2 CTAs, 48 KB. Blocks of 1024 need 128, but change
#             the layout between pieces, through shared memory. `least` limits the partials, written
#             and read, to an eighth of the traffic.
#   many      gate_modulate's sums at 2432 spill 88 bytes with two warps: four warps per row, 167 to
#             224 registers, 2 to 3 CTAs, 57 KB; its loads have 64 bits, not 128.
_ROWS = {"forward": Launch(256, 4, 4), "backward": Launch(512, 2, 4, ctas=8, least=4),
         "sums": Launch(512, 2, 4, ctas=2, least=16), "many": Launch(512, 1, 4, ctas=3, least=16)}
MANY = 6144       # columns of sums above which two warps per row spill
# (SMs, rows); of several GPUs the one with the most SMs. The interpreter (0) gets few programs,
# because each costs it milliseconds.
TABLE = {80: (108, _ROWS), 86: (84, _ROWS), 87: (16, _ROWS), 89: (142, _ROWS), 90: (132, _ROWS),
         100: (148, _ROWS), 103: (160, _ROWS), 120: (188, _ROWS), 121: (48, _ROWS),
         0: (1, {kind: Launch(512, 16, 4, 4, 32) for kind in _ROWS})}


@functools.cache
def _table(arch: int) -> tuple[int, dict[str, Launch]]:
    """Return (SMs, launch parameters) of an architecture. One that is not listed gets those of
    sm_80, whose rows fit every GPU since; warn once."""
    if arch not in TABLE:
        warnings.warn(f"modulation: no launch parameters for sm_{arch}; it gets those of sm_80",
                      stacklevel=2)
    return TABLE.get(arch, TABLE[80])


def _arch(device: torch.device) -> int:
    if ARCH is not None:
        return ARCH
    if INTERPRET:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def pieces(d: int, block: int) -> tuple[int, int]:
    """Return (BLOCK, TAIL) of rows of d columns: BLOCK fits d // BLOCK times, TAIL is the power of
    two that holds the rest, 0 without one. BLOCK is the largest up to `block` that leaves at most
    6 % of the lanes idle."""
    while block > 64:
        tail = triton.next_power_of_2(d % block) if d % block else 0
        if block <= d and d >= 0.94 * (d // block * block + tail):
            return block, tail
        block //= 2
    return 64, 0


def _wrap(kernel):
    """Show the launch to torch.compile."""
    # up to torch 2.12 wrap_triton does not take an interpreted kernel
    return kernel if INTERPRET else torch.library.wrap_triton(kernel)


def _rows(x: Tensor | None) -> Tensor | None:
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


Maybe = Tensor | None          # None: this part of the chain is absent


def _new_forward(x: Tensor, branch: Maybe, gate: Maybe, shift: Maybe, scale: Maybe, shift2: Maybe,
                 scale2: Maybe, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the outputs of modulation_forward, not yet written."""
    z, y, y2 = (x.new_empty(0 if v is None else x.shape) for v in (gate, shift, shift2))
    return z, y, y2, x.new_empty(0 if shift is None else (*x.shape[:2], 2), dtype=_wide(x))


def _run_forward(x: Tensor, branch: Maybe, gate: Maybe, shift: Maybe, scale: Maybe, shift2: Maybe,
                 scale2: Maybe, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return z = x + gate branch [b, l, d], y and y2, its modulations, and stats [b, l, 2], mean
    and rstd. z, y or y2 has size 0 if gate, shift or shift2 is None."""
    outs = _new_forward(x, branch, gate, shift, scale, shift2, scale2, eps)
    (b, l, d), (_, table) = x.shape, _table(_arch(x.device))
    row = table["forward"]
    if x.numel():
        block, tail = pieces(d, row.block)
        x, n = _rows(x), _rows(x if branch is None else branch)
        vectors = [x[:, 0] if v is None else _rows(v) for v in (gate, shift, scale, shift2, scale2)]
        _wrap(_forward)[(triton.cdiv(l, row.rows), b)](
            x, n, *vectors, *(o if o.numel() else x for o in outs), l, *x.stride()[:2],
            *n.stride()[:2], *(v.stride(0) for v in vectors), EPS=eps, D=d, GATE=gate is not None,
            NORMS=(shift is not None) + (shift2 is not None), ROWS=row.rows, BLOCK=block, TAIL=tail,
            num_warps=row.warps, num_stages=1)
    return outs


def _new_backward(dz: Maybe, dy: Maybe, dy2: Maybe, h: Maybe, stats: Maybe, branch: Maybe,
                  gate: Maybe, scale: Maybe, scale2: Maybe,
                  needs: Sequence[bool]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the outputs of modulation_backward, not yet written."""
    like = dz if dy is None else dy
    dx, dbranch = (like.new_empty(like.shape if need else 0)
                   for need in (needs[0] and dy is not None, needs[1]))
    return dx, dbranch, like.new_empty(like.shape[0], sum(needs[2:]), like.shape[2])


def _run_backward(dz: Maybe, dy: Maybe, dy2: Maybe, h: Maybe, stats: Maybe, branch: Maybe,
                  gate: Maybe, scale: Maybe, scale2: Maybe,
                  needs: Sequence[bool]) -> tuple[Tensor, Tensor, Tensor]:
    """Return dx, dbranch [b, l, d] and sums [b, n, d].

    h [b, l, d] is what was normalised; needs says which of x, branch, gate, shift, scale, shift2
    and scale2 need a gradient. sums holds the n needed ones of shift, scale, shift2, scale2 and
    gate, in this order. A gradient that is not needed has size 0; so has dx without dy, when it is
    dz.
    """
    dx, dbranch, _ = _new_backward(dz, dy, dy2, h, stats, branch, gate, scale, scale2, needs)
    like, count = dz if dy is None else dy, sum(needs[2:])
    (b, l, d), (sms, table) = like.shape, _table(_arch(like.device))
    kind = "backward"
    if count:
        kind = "sums" if count * d <= MANY else "many"
    row = table[kind]
    parts = min(triton.cdiv(l, row.least), max(1, row.ctas * sms // max(1, b)))
    partial = like.new_empty(b, parts, count, d, dtype=_wide(like))
    if like.numel():
        block, tail = pieces(d, row.block)
        tensors = [like if t is None else _rows(t) for t in (dz, dy, dy2, h, branch)]
        vectors = [like[:, 0] if v is None else _rows(v) for v in (gate, scale, scale2)]
        _wrap(_backward)[(parts, b)](
            *tensors, partial if stats is None else stats, *vectors,
            *(o if o.numel() else like for o in (dx, dbranch)), partial, l,
            *(s for t in tensors for s in t.stride()[:2]), *(v.stride(0) for v in vectors), D=d,
            NORMS=(dy is not None) + (dy2 is not None), DZ=dz is not None, DX=dx.numel() > 0,
            DBRANCH=needs[1], DGATE=needs[2], DSHIFT=needs[3], DSCALE=needs[4], DSHIFT2=needs[5],
            DSCALE2=needs[6], ROWS=row.rows, BLOCK=block, TAIL=tail, num_warps=row.warps,
            num_stages=1)
    return dx, dbranch, partial.sum(1).to(like.dtype)


# --- autograd ---

def _save(ctx, inputs, output) -> None:
    x, branch, gate, shift, scale, shift2, scale2, eps = inputs
    ctx.set_materialize_grads(False)
    h = stats = None
    if shift is not None:
        h, stats = x if gate is None else output[0], output[3]
    ctx.save_for_backward(h, stats, branch if ctx.needs_input_grad[2] else None,
                          gate if ctx.needs_input_grad[1] else None, scale, scale2)


def _differentiate(ctx, *grads):
    dz, dy, dy2, _ = (g if g is not None and g.ndim == 3 else None for g in grads)
    h, stats, branch, gate, scale, scale2 = ctx.saved_tensors
    needs, order = list(ctx.needs_input_grad[:7]), [3, 4, 5, 6, 2]
    if dy is None and dy2 is not None:                   # only the second modulation was used
        dy, dy2, scale, scale2 = dy2, None, scale2, None
        needs[3:], order = [*needs[5:], False, False], [5, 6, 3, 4, 2]
    grads = [None] * 8
    if dy is None:                                       # no norm: dx is dz
        grads[0], h, stats, scale, scale2, needs[3:] = dz, None, None, None, None, 4 * [False]
    if dy2 is None:
        scale2, needs[5:] = None, 2 * [False]
    if dy is not None or dz is not None and any(needs[1:]):
        dx, grads[1], sums = torch.ops.ladd.modulation_backward(
            dz, dy, dy2, h, stats, branch, gate, scale, scale2, needs)
        grads[0] = dz if dy is None else dx
        wanted = [i for i, need in zip(order, needs[3:] + needs[2:3]) if need]
        for i, total in zip(wanted, sums.unbind(1)):
            grads[i] = total
    return tuple(g if need else None for g, need in zip(grads, ctx.needs_input_grad))


# --- public functions ---

def _check(name: str, x: Tensor, *others: Tensor) -> None:
    """Raise RuntimeError if Triton cannot run, ValueError if shapes or dtypes do not fit."""
    if triton is None or not (x.is_cuda or INTERPRET or ARCH is not None):
        missing = ", without Triton" if triton is None else ""
        raise RuntimeError(f"{name}: tensors must be on CUDA, or on the CPU with "
                           f"TRITON_INTERPRET=1 (got {x.device}{missing}); reference_{name} runs "
                           "anywhere")
    if x.ndim != 3 or x.shape[2] % 64 or not x.shape[2] or x.dtype not in DTYPES:
        raise ValueError(f"{name}: x must be [b, l, d] with d a multiple of 64, in "
                         f"{' or '.join(map(str, DTYPES))} (got {tuple(x.shape)} {x.dtype})")
    for t in others:
        shape = x.shape if t.ndim == 3 else x.shape[::2]
        if t.shape != shape or t.dtype != x.dtype or t.device != x.device:
            raise ValueError(f"{name}: tensors must be {tuple(shape)} {x.dtype} on {x.device} to "
                             f"fit x (got {tuple(t.shape)} {t.dtype} on {t.device})")


def modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """Return LayerNorm(x) * (1 + scale) + shift; x [b, l, d], shift and scale [b, d].

    The top of this file lists strides and dtypes. Raises ValueError for shapes and dtypes that do
    not fit, RuntimeError if Triton cannot run.
    """
    _check("modulate", x, shift, scale)
    return torch.ops.ladd.modulation_forward(x, None, None, shift, scale, None, None, eps)[1]


def modulate2(x: Tensor, shift: Tensor, scale: Tensor, shift2: Tensor, scale2: Tensor,
              eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Return LN(x) (1 + scale) + shift and LN(x) (1 + scale2) + shift2; see modulate."""
    _check("modulate2", x, shift, scale, shift2, scale2)
    return torch.ops.ladd.modulation_forward(x, None, None, shift, scale, shift2, scale2, eps)[1:3]


def gate_modulate(x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor,
                  eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Return (x', LN(x') (1 + scale) + shift) with x' = x + gate * branch; branch has the shape of
    x, gate that of shift."""
    _check("gate_modulate", x, branch, gate, shift, scale)
    return torch.ops.ladd.modulation_forward(x, branch, gate, shift, scale, None, None, eps)[:2]


def gate(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    """Return x + gate * branch; x and branch [b, l, d], gate [b, d]."""
    _check("gate", x, branch, gate)
    return torch.ops.ladd.modulation_forward(x, branch, gate, None, None, None, None, 0.)[0]


# --- registration ---

def _register(name: str, run, fake):
    """Register an operator for torch.compile: a triton_op, whose launch the compiler sees. The
    interpreter cannot run on tensors without values: it gets a custom_op with shapes from `fake`.
    """
    if not INTERPRET:
        return torch.library.triton_op(f"ladd::{name}", run, mutates_args=())
    op = torch.library.custom_op(f"ladd::{name}", run, mutates_args=())
    op.register_fake(fake)
    return op


if triton is not None:
    _register("modulation_forward", _run_forward, _new_forward).register_autograd(
        _differentiate, setup_context=_save)
    _register("modulation_backward", _run_backward, _new_backward)


# --- check and time: python kernels/modulation.py ---

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
    """Print the largest errors against the reference; on a GPU also times and bandwidths."""
    cuda = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    shapes = [(2, 65, 192), (1, 9, 2432)]
    if cuda:
        shapes = [(b, 4096, d) for d in (1536, 2432) for b in (1, 4, 8)]
    # function, reference, which inputs, tensors moved forward and backward
    cases = ((modulate, reference_modulate, (0, 2, 3), 2, 3),
             (modulate2, reference_modulate2, (0, 2, 3, 4, 5), 3, 4),
             (gate, reference_gate, (0, 1, 2), 3, 3),
             (gate_modulate, reference_gate_modulate, (0, 1, 2, 3, 4), 4, 6))
    print(f"{torch.cuda.get_device_name() if cuda else 'interpreter'}, {dtype}; error over the "
          "fp64 maximum")
    print("                 b     l     d    error gradient"
          + ("  us and GB/s forward, backward" if cuda else ""))
    for (b, l, d), (run, reference, which, *moved) in itertools.product(shapes, cases):
        torch.manual_seed(0)
        wide = [torch.randn(b, l, d, device=device) for _ in range(2)]
        wide += torch.randn(b, 4 * d, device=device).chunk(4, -1)
        inputs = [wide[i].to(dtype).requires_grad_() for i in which]
        exact = [t.detach().double().requires_grad_() for t in inputs]
        out, expected = (o if isinstance(o, tuple) else (o,)
                         for o in (run(*inputs), reference(*exact)))
        dout = [torch.randn_like(o) for o in out]

        def step():
            return torch.autograd.grad(out, inputs, dout, retain_graph=True)

        gradients = torch.autograd.grad(expected, exact, [g.double() for g in dout])
        errors = [max(float((a - e).detach().abs().max() / e.detach().abs().max())
                      for a, e in zip(*pair))
                  for pair in ((out, expected), (step(), gradients))]
        line = f"{run.__name__:14} {b:3} {l:5} {d:5} {errors[0]:8.1e} {errors[1]:8.1e}"
        for work, n in zip((lambda: run(*inputs), step), moved if cuda else ()):
            ms = milliseconds(work)
            line += f"  {1e3 * ms:8.1f} {n * b * l * d * 2 / ms / 1e6:6.0f}"
        print(line)
        if not max(errors) < (2e-2 if cuda else 2e-5):
            raise SystemExit(f"{run.__name__}: the kernel differs from its reference")


if __name__ == "__main__":
    main()
