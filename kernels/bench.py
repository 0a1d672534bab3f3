"""Times every kernel against what else there is, in one process: correctness first, then interleaved rounds.

    python -m kernels.bench                        all kernels on this GPU -> kernels/results/<gpu>.csv
    python -m kernels.bench --kernel modulation --batch 1 4 --rounds 30

Each round calls every contender once, in a new order, with the L2 cache flushed before; reported are the
median and the 20 and 80 % quantiles. Contenders: ours; `eager`, the reference in the tensors' dtype as it
stands; `compile`, torch.compile of it; for attention the SDPA backends and FlashAttention if it is installed,
each with the QK-norm, the concatenation and the split that they need. A rate is TFLOP/s of useful products
(no credit for recomputation) or the share of the copy bandwidth that this GPU reaches in the same process.
Without a GPU --smoke runs the same on the CPU at tiny sizes, to test this file; its times mean nothing.
"""
import argparse
import csv
import datetime
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from kernels import attention, heads, modulation

MODELS = {"sd3-medium": (24, False, 154), "sd3.5-medium": (24, True, 333), "sd3.5-large": (38, True, 333)}
TOKENS = 4096                                         # image tokens at 1024 px
KERNELS = "attention", "modulation", "heads"


class Work(NamedTuple):
    """One thing to do, by several contenders."""
    kernel: str
    shape: str
    direction: str                                    # forward, backward (heads: to features, to weights)
    contenders: dict[str, Callable[[], Any]]          # "ours" among them
    flops: float = 0.0                                # useful products
    bytes: float = 0.0                                # least traffic of memory


# --- contenders ---

def normed(x: Tensor, weight: Tensor | None, eps: float = 1e-6) -> Tensor:
    return x if weight is None else F.rms_norm(x, x.shape[-1:], weight, eps)


def library_attention(attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable:
    """Joint attention as one writes it with a library: norms, concatenation, attend [b, n, l, dh], split."""
    def run(qkv_txt: Tensor, qkv_img: Tensor, norm_txt, norm_img) -> tuple[Tensor, Tensor]:
        parts = [[normed(t, w) for t, w in zip(qkv.unbind(2), (*(norm or (None, None)), None))]
                 for qkv, norm in ((qkv_txt, norm_txt), (qkv_img, norm_img))]
        q, k, v = (torch.cat(pair, 1).transpose(1, 2) for pair in zip(*parts))    # [b, n, l, dh]
        out = attend(q, k, v).transpose(1, 2)
        return out.split([qkv_txt.shape[1], qkv_img.shape[1]], 1)
    return run


def sdpa(backend: SDPBackend) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)
    return attend


def attention_contenders(device: torch.device) -> dict[str, Callable]:
    out = {"ours": attention.joint_attention, "eager": attention.reference_joint_attention,
           "compile": torch.compile(library_attention(F.scaled_dot_product_attention))}
    if device.type == "cuda":
        out |= {f"sdpa {name}": library_attention(sdpa(getattr(SDPBackend, f"{name.upper()}_ATTENTION")))
                for name in ("flash", "efficient", "cudnn")}
        try:
            from flash_attn import flash_attn_func
        except ImportError:
            return out
        swap = lambda t: t.transpose(1, 2)
        out["flash_attn"] = library_attention(lambda *qkv: swap(flash_attn_func(*map(swap, qkv))))
    return out


def backward_of(function: Callable, inputs: list[Tensor], args: tuple) -> Callable[[], None]:
    """The backward pass alone, of a graph that is kept."""
    out = function(*args)
    out = [o for o in (out if isinstance(out, tuple | list) else [out]) if o is not None]
    grads = [torch.randn_like(o) for o in out]
    return lambda: torch.autograd.grad(out, inputs, grads, retain_graph=True)


def attention_work(model: str, batch: int, device: torch.device, small: bool) -> Iterator[Work]:
    n, norm, text = (2, True, 5) if small else MODELS[model]
    tokens, dtype = (24, torch.float32) if small else (TOKENS, torch.bfloat16)
    make = lambda *shape: torch.randn(shape, device=device, dtype=dtype, requires_grad=True)
    qkv = [make(batch, l, 3, n, 64) for l in (text, tokens)]
    norms = [tuple(make(64) for _ in range(2)) for _ in qkv] if norm else [None, None]
    inputs = [*qkv, *(w for pair in norms if pair for w in pair)]
    args, l = (*qkv, *norms), text + tokens
    products = 4 * batch * n * 64 * l * l
    contenders = attention_contenders(device)
    with torch.no_grad():
        expected = attention.reference_joint_attention(*[t.float() for t in qkv], *(
            tuple(w.float() for w in pair) if pair else None for pair in norms))
    check("attention", contenders["ours"], library_attention(F.scaled_dot_product_attention), args, expected)

    def forward(function: Callable) -> Callable[[], Any]:
        def run():
            with torch.no_grad():
                return function(*args)
        return run

    shape = f"{model} b{batch} {text}+{tokens}"
    yield Work("attention", shape, "forward", {k: forward(f) for k, f in contenders.items()}, products)
    yield Work("attention", shape, "backward",
               {k: backward_of(f, inputs, args) for k, f in contenders.items()}, 2.5 * products)


def modulation_work(model: str, batch: int, device: torch.device, small: bool) -> Iterator[Work]:
    d, l = (128, 24) if small else (64 * MODELS[model][0], TOKENS)
    dtype = torch.float32 if small else torch.bfloat16
    make = lambda *shape: torch.randn(shape, device=device, dtype=dtype, requires_grad=True)
    x, branch, vector = make(batch, l, d), make(batch, l, d), make(batch, 6 * d)
    shift, scale, gate = vector.chunk(6, -1)[:3]                     # strided views, as in a block
    size, shape = batch * l * d * x.element_size(), f"{model} b{batch} {l}x{d}"
    for name, args, inputs, passes in (("modulate", (x, shift, scale), [x, vector], (2, 3)),
                                       ("gate_modulate", (x, branch, gate, shift, scale), [x, branch, vector],
                                        (4, 6))):
        reference = getattr(modulation, f"reference_{name}")
        contenders = {"ours": getattr(modulation, name), "eager": reference,
                      "compile": torch.compile(reference)}
        with torch.no_grad():
            expected = reference(*(t.float() for t in args))
        expected = expected if isinstance(expected, tuple) else (expected,)
        check(name, contenders["ours"], reference, args, expected)

        def forward(function: Callable, args=args) -> Callable[[], Any]:
            def run():
                with torch.no_grad():
                    return function(*args)
            return run

        yield Work(name, shape, "forward", {k: forward(f) for k, f in contenders.items()},
                   bytes=passes[0] * size)
        yield Work(name, shape, "backward", {k: backward_of(f, inputs, args) for k, f in contenders.items()},
                   bytes=passes[1] * size)


def heads_work(model: str, batch: int, device: torch.device, small: bool) -> Iterator[Work]:
    """A head of width 512 on every block; backward as the student's step and as the heads' step need it."""
    n = MODELS[model][0]
    k, d, c, e, grid = (2, 64, 32, 8, (4, 6)) if small else (n, 64 * n, 512, 64, (64, 64))
    dtype, l = torch.float32 if small else torch.bfloat16, grid[0] * grid[1]
    make = lambda *shape: torch.randn(shape, device=device)
    feats = [make(batch, l, d).to(dtype) for _ in range(k)]
    sizes = ((k, d, c), *3 * [(k, c)], (k, 3, 3, c, c), *3 * [(k, c)], (k, e, c), (k, c), (k,))
    params = heads.HeadParams(*(make(*size) * (size[-2] ** -0.5 if len(size) > 2 else 1) for size in sizes))
    cond, shape = make(batch, e), f"{model} b{batch} {k} taps of {d}, {grid[0]}x{grid[1]}"
    first, second = (k * batch * l * n for n in (2 * d * c, 18 * c * c))
    reference = heads.reference_discriminator_heads
    contenders = {"ours": heads.discriminator_heads, "eager": reference, "compile": torch.compile(reference)}
    with torch.no_grad():
        expected = reference([f.float() for f in feats], params, cond, grid)
    check("heads", contenders["ours"], lower(reference, device, dtype), (feats, params, cond, grid),
          (expected,))
    runs: dict[str, dict[str, Callable]] = {"forward": {}, "features": {}, "weights": {}}
    for name, function in contenders.items():
        def forward(function=function) -> Any:
            with torch.no_grad():
                return function(feats, params, cond, grid)

        runs["forward"][name] = forward
        leaves = [f.detach().requires_grad_() for f in feats]
        runs["features"][name] = backward_of(function, leaves, (leaves, params, cond, grid))
        own = heads.HeadParams(*(p.detach().requires_grad_() for p in params))
        runs["weights"][name] = backward_of(function, list(own), (feats, own, cond, grid))
    for direction, flops in (("forward", first + second), ("features", first + second),
                             ("weights", first + 2 * second)):
        yield Work("heads", shape, direction, runs[direction], flops)


def check(name: str, ours: Callable, plain: Callable, args: tuple, expected: tuple) -> None:
    """Ours must be within twice the error of `plain`, a plain computation in the tensors' own precision, both
    against fp32 (FlashAttention's rule); SystemExit otherwise."""
    def error(function: Callable) -> float:
        with torch.no_grad():
            out = function(*args)
        out = out if isinstance(out, tuple | list) else (out,)
        return max(float((a.float() - e.float()).abs().max()) for a, e in zip(out, expected))

    found, usual = error(ours), error(plain)
    least = 1e-5 * max(float(e.abs().max()) for e in expected)
    if not found <= 2 * usual + least:
        raise SystemExit(f"bench: {name} is wrong: error {found:.3g}, at most twice {usual:.3g} accepted")


def lower(function: Callable, device: torch.device, dtype: torch.dtype) -> Callable:
    """`function` with its products in `dtype`, which a reference takes in fp32."""
    def run(*args):
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return function(*args)
    return run


# --- timing ---

def timed(run: Callable[[], Any], flush: Tensor) -> float:
    """Milliseconds of one call with a cold L2."""
    flush.zero_()
    if flush.device.type != "cuda":
        start = time.perf_counter()
        run()
        return 1000 * (time.perf_counter() - start)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def measure(contenders: dict[str, Callable[[], Any]], rounds: int, flush: Tensor) -> dict[str, list[float]]:
    """Milliseconds by contender; every round calls each of them once, in an order of its own."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    shuffled, names = random.Random(0), list(contenders)
    for i in range(-3, rounds):                                      # the first three rounds warm up
        shuffled.shuffle(names)
        for name in names:
            ms = timed(contenders[name], flush)
            if i >= 0:
                times[name].append(ms)
    return times


def quantiles(values: list[float]) -> tuple[float, float, float]:
    """(20 %, median, 80 %)."""
    values = sorted(values)
    return values[len(values) // 5], statistics.median(values), values[len(values) - 1 - len(values) // 5]


def copy_bandwidth(flush: Tensor, rounds: int) -> float:
    """Bytes a second that a large copy moves on this device, read and write counted."""
    source = torch.empty(2 ** 28 if flush.is_cuda else 2 ** 20, dtype=torch.uint8, device=flush.device)
    target = torch.empty_like(source)
    _, ms, _ = quantiles(measure({"copy": lambda: target.copy_(source)}, rounds, flush)["copy"])
    return 2 * source.numel() / ms * 1000


# --- rows ---

def about(device: torch.device) -> dict[str, str]:
    """Where the numbers come from."""
    run = lambda *command: subprocess.run(command, capture_output=True, text=True).stdout.strip()
    triton = sys.modules.get("triton")
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    driver = "-"
    if device.type == "cuda":
        driver = run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0]
    commit = run("git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD") or "unknown"
    return {"gpu": gpu, "driver": driver, "torch": torch.__version__, "cuda": torch.version.cuda or "-",
            "triton": getattr(triton, "__version__", "-"), "commit": commit,
            "date": datetime.date.today().isoformat()}


COLUMNS = ("kernel", "shape", "direction", "contender", "ms", "ms_20", "ms_80", "tflops", "gbps",
           "copy_share", "speedup", "gpu", "driver", "torch", "cuda", "triton", "commit", "date")


def rows_of(work: Work, times: dict[str, list[float]], copy: float, origin: dict[str, str]) -> list[dict]:
    """A row a contender; speedup is how many times faster ours is than it, of the medians."""
    ours, rows = quantiles(times["ours"])[1], []
    for name, values in times.items():
        low, ms, high = quantiles(values)
        rate = work.bytes / ms * 1000
        rows.append({"kernel": work.kernel, "shape": work.shape, "direction": work.direction,
                     "contender": name, "ms": f"{ms:.4f}", "ms_20": f"{low:.4f}", "ms_80": f"{high:.4f}",
                     "tflops": f"{work.flops / ms / 1e9:.1f}" if work.flops else "",
                     "gbps": f"{rate / 1e9:.0f}" if work.bytes else "",
                     "copy_share": f"{rate / copy:.3f}" if work.bytes else "", "speedup": f"{ms / ours:.3f}",
                     **origin})
    return rows


def write_csv(path: Path, rows: list[dict]) -> None:
    """All rows, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    os.replace(temporary, path)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m kernels.bench", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--model", nargs="+", choices=tuple(MODELS), default=list(MODELS))
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path, help="default: kernels/results/<gpu>.csv")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on the CPU, to test this file")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available() and not args.smoke:
        sys.exit(print("bench: found no CUDA device, one is needed (--smoke tests this file without)",
                       file=sys.stderr) or 2)
    device = torch.device("cpu" if args.smoke else "cuda")
    # twice the largest L2 of today: what was read or written before is gone
    flush = torch.empty(2 ** 20 if args.smoke else 2 ** 28, dtype=torch.uint8, device=device)
    copy, origin, rows = copy_bandwidth(flush, args.rounds), about(device), []
    path = args.out or Path(__file__).parent / "results" / f"{origin['gpu'].replace(' ', '-').lower()}.csv"
    print(f"{origin}; copy bandwidth {copy / 1e9:.0f} GB/s")
    works = {"attention": attention_work, "modulation": modulation_work, "heads": heads_work}
    plan = [(k, m, b) for k in args.kernel for m in args.model for b in args.batch]
    for kernel, model, batch in tqdm(plan, desc="bench", dynamic_ncols=True):
        for work in works[kernel](model, batch, device, args.smoke):
            new = rows_of(work, measure(work.contenders, args.rounds, flush), copy, origin)
            rows += new
            write_csv(path, rows)                                    # what is measured is kept
            line = ", ".join(f"{r['contender']} {r['ms']} ms" for r in new)
            tqdm.write(f"{work.kernel:14} {work.shape:28} {work.direction:9} {line}"
                       + (f"; ours {new[0]['tflops']} TFLOP/s" if work.flops
                          else f"; ours {float(new[0]['copy_share']):.0%} of copy"))
    print(f"wrote {path}")


if __name__ == "__main__":
    main(sys.argv[1:])
