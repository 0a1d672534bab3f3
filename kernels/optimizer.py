"""One optimizer step over all tensors of a network: clip, AdamW, EMA and a copy in 16 bits.

    g    = factor grad                        factor scales the norm of all gradients to its limit
    m    = beta1 m + (1 - beta1) g            without momentum (beta1 = 0) m is g and not stored
    v    = beta2 v + (1 - beta2) g^2
    w    = (1 - lr weight_decay) w - lr / (1 - beta1^t) m / (sqrt(v / (1 - beta2^t)) + eps)
    ema  = ema + (1 - decay) (w - ema)
    copy = w, rounded to bf16 or fp16         what the next forward passes multiply with

w, grad, m, v, ema are fp32 tensors of any shape; t counts the steps from 1. EMA and copy are
optional. Nothing has a gradient.

Bytes per parameter: 20 for grad, v and w, 8 for the EMA, 8 for m, 2 for the copy; about 14 FLOPs:
bound by memory. The norm that `factor` comes from reads the gradients once more, 4 bytes. Clip,
AdamW and EMA one after the other move 52 bytes. All tensors share one launch, whose programs find
theirs in a table of addresses.

Source: Loshchilov & Hutter 2019 (AdamW), Algorithm 2; the EMA and the copy are our choice.
"""
import functools
import os
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

if __name__ == "__main__" and not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")       # Triton reads it when it is imported
try:
    import triton
    import triton.language as tl
except ImportError:                         # platforms without Triton keep the reference
    triton = None

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
ARCH: int | None = None       # kernels/aot.py sets it to compile for a GPU that is not here
BLOCK, WARPS = 4096, 8        # elements and warps of a program


# --- reference ---

@torch.no_grad()
def reference_adamw(weights: Sequence[Tensor], grads: Sequence[Tensor],
                    firsts: Sequence[Tensor] | None, seconds: Sequence[Tensor],
                    averages: Sequence[Tensor] | None, copies: Sequence[Tensor | None],
                    factor: Tensor, lr: float, beta1: float, beta2: float, weight_decay: float,
                    eps: float, decay: float, t: int) -> None:
    """Step `weights` and update moments, averages (EMA) and copies in place, with torch's own
    operators; overwrite the grads.

    Tensors at the same place of the sequences have one shape. firsts is None where beta1 is 0,
    averages is None without an EMA. factor [] is on their device: the host need not wait for it.
    """
    torch._foreach_mul_(grads, factor)
    # without momentum the first moment is the gradient, and may be the same memory
    torch._fused_adamw_(weights, grads, firsts or grads, seconds, [],
                        [factor.new_full((), t, dtype=torch.float32)] * len(weights), lr=lr,
                        beta1=beta1, beta2=beta2, weight_decay=weight_decay, eps=eps,
                        amsgrad=False, maximize=False)
    if averages:
        torch._foreach_lerp_(averages, weights, 1 - decay)
    if halves := [(c, w) for c, w in zip(copies, weights) if c is not None]:
        torch._foreach_copy_(*map(list, zip(*halves)))


# --- kernel ---

if triton is not None:

    @triton.jit
    def _at(row, i: tl.constexpr, first, dtype: tl.constexpr, ALIGNED: tl.constexpr,
            BLOCK: tl.constexpr):
        """Return pointers to the elements from `first` on of tensor i of a row."""
        start = tl.load(row + i).to(tl.pointer_type(dtype)) + first
        if ALIGNED:     # four elements: with eight of a copy each load of fp32 would be two halves
            start = tl.multiple_of(start, dtype.primitive_bitwidth // 2)
        return start + tl.arange(0, BLOCK)

    @triton.jit
    def _adamw(table, places, factor, rate, shrink, beta1, beta2, rest1, rest2, eps, rest_ema,
              MOMENTUM: tl.constexpr, EMA: tl.constexpr, COPY: tl.constexpr, ALIGNED: tl.constexpr,
              BLOCK: tl.constexpr):
        """Step one block of a tensor. table [tensors, 7] int64: addresses of w, grad, m, v, ema and
        copy, 0 for none, and the number of elements; places [programs, 2]: tensor and block."""
        row = table + tl.load(places + 2 * tl.program_id(0)).to(tl.int64) * 7
        first = tl.load(places + 2 * tl.program_id(0) + 1).to(tl.int64) * BLOCK
        count = tl.load(row + 6) - first
        if ALIGNED:
            count = tl.multiple_of(count, 16)      # the mask is the same for 16 elements
        there = tl.arange(0, BLOCK) < count
        at_w = _at(row, 0, first, tl.float32, ALIGNED, BLOCK)
        at_g = _at(row, 1, first, tl.float32, ALIGNED, BLOCK)
        at_v = _at(row, 3, first, tl.float32, ALIGNED, BLOCK)
        w, v = tl.load(at_w, there, 0), tl.load(at_v, there, 0)
        g = tl.load(at_g, there, 0) * tl.load(factor)
        v = v * beta2 + g * g * rest2
        tl.store(at_v, v, there)
        if MOMENTUM:
            at_m = _at(row, 2, first, tl.float32, ALIGNED, BLOCK)
            g = tl.load(at_m, there, 0) * beta1 + g * rest1
            tl.store(at_m, g, there)
        w = w * shrink - rate * g / (tl.sqrt(v) + eps)
        tl.store(at_w, w, there)
        if EMA:
            at_ema = _at(row, 4, first, tl.float32, ALIGNED, BLOCK)
            ema = tl.load(at_ema, there, 0)
            tl.store(at_ema, ema + (w - ema) * rest_ema, there)
        if COPY is not None:
            if tl.load(row + 5) != 0:
                tl.store(_at(row, 5, first, COPY, ALIGNED, BLOCK), w.to(COPY), there)


# --- launcher ---

def _rows(*columns: Sequence[Tensor | None] | None) -> Iterator[tuple[Tensor | None, ...]]:
    """Yield the tensors of one weight; None of a column that is None."""
    nothing = [None] * len(columns[0])
    return zip(*(nothing if column is None else column for column in columns), strict=True)


def _corrected(lr: float, beta1: float, beta2: float, eps: float, t: int) -> tuple[float, float]:
    """Return rate and eps' with which an update is -rate m / (sqrt(v) + eps')."""
    root = (1 - beta2 ** t) ** 0.5
    return lr * root / (1 - beta1 ** t), eps * root


@functools.lru_cache(16)
def _places(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """Return (tensor, block) [programs, 2] int32 of all blocks of tensors of these sizes."""
    blocks = torch.tensor([-(-n // BLOCK) for n in sizes])
    tensor = torch.repeat_interleave(torch.arange(len(sizes)), blocks)
    first = torch.repeat_interleave(blocks.cumsum(0) - blocks, blocks)
    return torch.stack([tensor, torch.arange(len(tensor)) - first], 1).int().to(device)


def _launch(rows: list[tuple[Tensor | None, ...]], factor: Tensor, options: dict,
            *numbers: float) -> None:
    """Launch over rows (w, grad, m, v, ema, copy)."""
    sizes = tuple(row[0].numel() for row in rows)
    table = torch.tensor([[0 if x is None else x.data_ptr() for x in row] + [n]
                          for row, n in zip(rows, sizes)])
    if factor.is_cuda:
        table = table.pin_memory().to(factor.device, non_blocking=True)
    places = _places(sizes, factor.device)
    _adamw[(len(places),)](table, places, factor, *numbers, **options, BLOCK=BLOCK, num_warps=WARPS)


# --- public function ---

NAMES = "weight", "grad", "first", "second", "average", "copy"
HALVES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}


@torch.no_grad()
def adamw(weights: Sequence[Tensor], grads: Sequence[Tensor], firsts: Sequence[Tensor] | None,
          seconds: Sequence[Tensor], averages: Sequence[Tensor] | None,
          copies: Sequence[Tensor | None], factor: Tensor, lr: float, beta1: float, beta2: float,
          weight_decay: float, eps: float, decay: float, t: int) -> None:
    """Run reference_adamw in one launch, or in two where some tensors do not start at a multiple of
    16 bytes or do not have 16 n elements; leave the grads. All tensors are contiguous and fp32,
    copies bf16 or fp16.

    Raises ValueError for what it does not take, RuntimeError where Triton cannot run.
    """
    if triton is None or not (factor.is_cuda or INTERPRET or ARCH is not None):
        missing = ", without Triton" if triton is None else ""
        raise RuntimeError("adamw: tensors must be on CUDA, or on the CPU with TRITON_INTERPRET=1 "
                           f"(got {factor.device}{missing}); reference_adamw runs anywhere")
    if (beta1 > 0) != (firsts is not None):
        raise ValueError("adamw: firsts must be None where beta1 is 0, and only there (got beta1 "
                         f"{beta1})")
    groups: dict[bool, list[tuple[Tensor | None, ...]]] = {}
    halves = {c.dtype for c in copies if c is not None} or {torch.bfloat16}
    if len(halves) > 1:
        raise ValueError("adamw: copies must have one dtype (got "
                         f"{', '.join(sorted(map(str, halves)))})")
    for row in _rows(weights, grads, firsts, seconds, averages, copies):
        w = row[0]
        for x, name in zip(row, NAMES):
            dtypes = HALVES if name == "copy" else (torch.float32,)
            if x is not None and (x.dtype not in dtypes or x.shape != w.shape
                                  or x.device != factor.device or not x.is_contiguous()):
                raise ValueError(f"adamw: {name} must be contiguous {list(w.shape)} in one of "
                                 f"{', '.join(map(str, dtypes))} on {factor.device} (got "
                                 f"{list(x.shape)} of strides {x.stride()} in {x.dtype} on "
                                 f"{x.device})")
        if w.numel():
            starts = [x.data_ptr() % 16 for x in row if x is not None]
            groups.setdefault(w.numel() % 16 == 0 and not any(starts), []).append(row)
    rate, eps = _corrected(lr, beta1, beta2, eps, t)
    half = getattr(tl, HALVES[halves.pop()])
    for aligned, rows in groups.items():
        copy = half if any(row[5] is not None for row in rows) else None
        _launch(rows, factor, dict(MOMENTUM=beta1 > 0, EMA=averages is not None, COPY=copy,
                                   ALIGNED=aligned),
                rate, 1 - lr * weight_decay, beta1, beta2, 1 - beta1, 1 - beta2, eps, 1 - decay)
    # autograd cannot see what a kernel writes
    written = [*weights, *(averages or ()), *(c for c in copies if c is not None)]
    torch.autograd.graph.increment_version(written)


# --- check and time: python kernels/optimizer.py ---

def milliseconds(run) -> float:
    """Return the median time of run() on the GPU, which sleeps until the call is queued."""
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
    """Print the largest error of 3 steps against fp64, relative to the step; on a GPU also GB/s."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    sizes = [(4096, 1536), (1536,), (6144, 1536), (38,)] if cuda else [(70, 64), (64,), (3, 7)]
    half = torch.bfloat16 if cuda else torch.float16       # Triton's interpreter truncates to bf16
    for beta1 in (0.0, 0.9):
        torch.manual_seed(0)
        weights = [torch.randn(size, device=device) for size in sizes]
        firsts = [torch.zeros_like(w) for w in weights] if beta1 else None
        seconds, averages = [torch.zeros_like(w) for w in weights], [w.clone() for w in weights]
        copies = [w.to(half) for w in weights]
        state = weights, firsts, seconds, averages
        exact = [xs and [x.double() for x in xs] for xs in state]
        factor, start = torch.tensor(0.7, device=device), [w.double() for w in weights]
        for t in (1, 2, 3):
            grads = [torch.randn_like(w) for w in weights]
            rest = 1e-3, beta1, 0.99, 0.1, 1e-8, 0.9, t
            adamw(weights, grads, *state[1:], copies, factor, *rest)
            reference_adamw(exact[0], [g.double() for g in grads], *exact[1:], [None] * len(sizes),
                           factor.double(), *rest)
        error = max(float((w - e).abs().max() / (e - s).abs().max())
                    for w, e, s in zip(weights, exact[0], start))
        line = f"beta1 {beta1}: error {error:.1e}"
        if cuda:
            ms = milliseconds(lambda: adamw(weights, grads, *state[1:], copies, factor, *rest))
            moved = (38 if beta1 else 30) * sum(w.numel() for w in weights)
            line += f", {ms:.3f} ms, {moved / ms / 1e6:.0f} GB/s"
        print(line, flush=True)
        same = all(torch.equal(c, w.to(half)) for c, w in zip(copies, weights))
        if not error < 1e-3 or not same:
            raise SystemExit("adamw: the kernel differs from its reference")


if __name__ == "__main__":
    main()
