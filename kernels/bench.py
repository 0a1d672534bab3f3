"""Time every kernel against its alternatives in one process: correctness first, then rounds.

    python -m kernels.bench                   all kernels on this GPU -> kernels/results/<gpu>.csv
    python -m kernels.bench --kernel modulation --batch 1 4 --rounds 30

Each round calls every contender once, in a new order, with a cold L2 cache. The contenders are
`ours`; `eager`, the reference in the tensors' dtype; `compile`, torch.compile of it; and for
attention the SDPA backends and FlashAttention 2 and 3 where they are installed, each with the
QK-norm, the concatenation and the split that it needs, and with --gluon attention_gluon.py; for the
optimizer torch's own operators.

ms is the time on the GPU between two events, the gaps between the kernels of a call included. Many
calls take less time on the GPU than Python takes to launch them (0.1 to 0.3 ms), so the GPU first
waits in a sleep kernel until the whole call is queued. A call that was not queued in time is
repeated after a longer sleep; a call that itself waits for the GPU is an error. host_ms is the time
from the call to its return: where it exceeds ms and nothing else is queued, the host is the limit,
and ms is reached only in a CUDA graph.

ms and host_ms are medians; ms_20 and ms_80 are the 20 and 80 % quantiles of ms. A rate is TFLOP/s
of useful products (recomputation does not count) or the share of the copy bandwidth that this GPU
reaches in the same process. What the numbers do not say: clocks are not fixed, and a call after a
sleep runs on a cool GPU, so a long run may be slower. Without a GPU --smoke runs the same code on
the CPU at tiny sizes, to test this file; its times mean nothing.
"""
import argparse
import csv
import datetime
import functools
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

from kernels import attention, attention_gluon, heads, modulation, optimizer

# heads of attention (as many blocks as heads), QK-norm, text tokens
MODELS = {"sd3-medium": (24, False, 154), "sd3.5-medium": (24, True, 333),
          "sd3.5-large": (38, True, 333)}
TOKENS = 4096                                         # image tokens at 1024 px
KERNELS = "attention", "modulation", "heads", "optimizer"


class Work(NamedTuple):
    """Hold one computation and the contenders that carry it out."""
    kernel: str
    shape: str
    direction: str                                    # forward, backward; heads: features, weights
    contenders: dict[str, Callable[[], Any]]          # "ours" among them
    flops: float = 0.0                                # useful products
    bytes: float = 0.0                                # least traffic of memory


# --- contenders ---

def normed(x: Tensor, weight: Tensor | None, eps: float = 1e-6) -> Tensor:
    """Return the RMS norm of x where there is a weight, else x."""
    return x if weight is None else F.rms_norm(x, x.shape[-1:], weight, eps)


def library_attention(attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable:
    """Return joint attention around `attend` [b, n, l, dh]: norms, concatenation, attend, split."""
    def run(qkv_txt: Tensor, qkv_img: Tensor, norm_txt, norm_img) -> tuple[Tensor, Tensor]:
        parts = [[normed(t, w) for t, w in zip(qkv.unbind(2), (*(norm or (None, None)), None))]
                 for qkv, norm in ((qkv_txt, norm_txt), (qkv_img, norm_img))]
        q, k, v = (torch.cat(pair, 1).transpose(1, 2) for pair in zip(*parts))    # [b, n, l, dh]
        out = attend(q, k, v).transpose(1, 2)
        return out.split([qkv_txt.shape[1], qkv_img.shape[1]], 1)
    return run


def sdpa(backend: SDPBackend) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return scaled_dot_product_attention restricted to one backend."""
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)
    return attend


def attention_contenders(device: torch.device, gluon: bool = False) -> dict[str, Callable]:
    """Return the contenders for joint attention on a device, by name; gluon: that in Gluon too."""
    out = {"ours": attention.joint_attention, "eager": attention.reference_joint_attention,
           "compile": torch.compile(library_attention(F.scaled_dot_product_attention))}
    if gluon:
        out["gluon"] = attention_gluon.joint_attention
    if device.type == "cuda":
        backends = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION,
                    "efficient": SDPBackend.EFFICIENT_ATTENTION}
        out |= {f"sdpa {name}": library_attention(sdpa(b)) for name, b in backends.items()}
        out |= {name: library_attention(transposed(f)) for name, f in flash_attention().items()}
    return out


def flash_attention() -> dict[str, Callable]:
    """Return flash_attn_func of every FlashAttention version that is installed."""
    found: dict[str, Callable] = {}
    try:
        from flash_attn import flash_attn_func
        found["flash_attn 2"] = flash_attn_func
    except ImportError:
        pass
    try:
        from flash_attn_interface import flash_attn_func
        found["flash_attn 3"] = flash_attn_func
    except ImportError:
        pass
    return found


def transposed(attend: Callable) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return attention over [b, n, l, dh] from a function over [b, l, n, dh].

    Some releases of FlashAttention 3 return (out, log-sum-exp): only out is kept.
    """
    def run(*qkv: Tensor) -> Tensor:
        out = attend(*(t.transpose(1, 2) for t in qkv))
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)
    return run


def backward_of(function: Callable, inputs: list[Tensor], args: tuple) -> Callable[[], None]:
    """Return a function that runs only the backward pass; it keeps the graph of one forward."""
    out = function(*args)
    out = [o for o in (out if isinstance(out, tuple | list) else [out]) if o is not None]
    grads = [torch.randn_like(o) for o in out]
    return lambda: torch.autograd.grad(out, inputs, grads, retain_graph=True)


def attention_work(model: str, batch: int, device: torch.device, small: bool,
                   gluon: bool = False) -> Iterator[Work]:
    """Yield joint attention of a model at 1024 px, forward and backward."""
    n, norm, text = (2, True, 5) if small else MODELS[model]
    tokens, dtype = (24, torch.float32) if small else (TOKENS, torch.bfloat16)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype, requires_grad=True)

    qkv = [draw(batch, l, 3, n, 64) for l in (text, tokens)]
    norms = [tuple(draw(64) for _ in range(2)) for _ in qkv] if norm else [None, None]
    inputs = [*qkv, *(w for pair in norms if pair for w in pair)]
    args, l = (*qkv, *norms), text + tokens
    products = 4 * batch * n * 64 * l * l
    contenders = attention_contenders(device, gluon)
    with torch.no_grad():
        expected = attention.reference_joint_attention(*[t.float() for t in qkv], *(
            tuple(w.float() for w in pair) if pair else None for pair in norms))
    plain = library_attention(F.scaled_dot_product_attention)
    for name in ("ours", "gluon"):
        if name in contenders:
            check(f"attention ({name})", contenders[name], plain, args, expected)

    def forward(function: Callable) -> Callable[[], Any]:
        def run():
            with torch.no_grad():
                return function(*args)
        return run

    shape = f"{model} b{batch} {text}+{tokens}"
    yield Work("attention", shape, "forward", {k: forward(f) for k, f in contenders.items()},
               products)
    yield Work("attention", shape, "backward",
               {k: backward_of(f, inputs, args) for k, f in contenders.items()}, 2.5 * products)


def modulation_work(model: str, batch: int, device: torch.device, small: bool) -> Iterator[Work]:
    """Yield modulate and gate_modulate of a model's image tokens, forward and backward."""
    d, l = (128, 24) if small else (64 * MODELS[model][0], TOKENS)
    dtype = torch.float32 if small else torch.bfloat16

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype, requires_grad=True)

    x, branch, vector = draw(batch, l, d), draw(batch, l, d), draw(batch, 6 * d)
    shift, scale, gate = vector.chunk(6, -1)[:3]                     # strided views, as in a block
    size, shape = batch * l * d * x.element_size(), f"{model} b{batch} {l}x{d}"
    # arguments, what gets a gradient, tensors [b, l, d] read and written forward and backward
    ops = {"modulate": ((x, shift, scale), [x, vector], (2, 3)),
           "gate_modulate": ((x, branch, gate, shift, scale), [x, branch, vector], (4, 6))}
    for name, (args, inputs, passes) in ops.items():
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
        yield Work(name, shape, "backward",
                   {k: backward_of(f, inputs, args) for k, f in contenders.items()},
                   bytes=passes[1] * size)


def heads_work(model: str, batch: int, device: torch.device, small: bool) -> Iterator[Work]:
    """Yield the heads, of width 512 and on every block: forward, backward to the features (the
    student's step) and to the weights (the heads' step)."""
    n = MODELS[model][0]
    k, d, c, e, grid = (2, 64, 32, 8, (4, 6)) if small else (n, 64 * n, 512, 64, (64, 64))
    dtype, l = torch.float32 if small else torch.bfloat16, grid[0] * grid[1]

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=device)

    feats = [draw(batch, l, d).to(dtype) for _ in range(k)]
    sizes = ((k, d, c), *3 * [(k, c)], (k, 3, 3, c, c), *3 * [(k, c)], (k, e, c), (k, c), (k,))
    scales = [size[-2] ** -0.5 if len(size) > 2 else 1 for size in sizes]
    params = heads.HeadParams(*(draw(*size) * scale for size, scale in zip(sizes, scales)))
    cond, shape = draw(batch, e), f"{model} b{batch} {k} taps of {d}, {grid[0]}x{grid[1]}"
    first, second = (k * batch * l * n for n in (2 * d * c, 18 * c * c))
    reference = heads.reference_discriminator_heads
    contenders = {"ours": heads.discriminator_heads, "eager": reference,
                  "compile": torch.compile(reference)}
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


def optimizer_work(model: str, _: int, device: torch.device, small: bool) -> Iterator[Work]:
    """Yield a step on the weights of four blocks of a model, with EMA and copies in bf16. torch's
    is a clip, its fused AdamW, which keeps a first moment, and foreach operators for EMA and
    copies."""
    d = 64 if small else 64 * MODELS[model][0]
    sizes = [(3 * d, d), (d, d), (4 * d, d), (d, 4 * d), (6 * d, d)] * (1 if small else 8)

    def tensors() -> list[Tensor]:
        return [torch.rand(size, device=device) for size in sizes]

    weights, grads, seconds, averages = (tensors() for _ in range(4))
    copies = [w.bfloat16() for w in weights]
    factor = torch.tensor(0.5, device=device)
    rest = factor, 1e-6, 0.0, 0.99, 0.0, 1e-8, 0.99, 5
    args = weights, grads, None, seconds, averages, copies, *rest

    def stepped(function: Callable) -> Callable[..., list[Tensor]]:
        """Return a function that steps clones of the first tensors, so far that errors show."""
        def run(*lists: list[Tensor]) -> list[Tensor]:
            w, g, v, ema = ([t.clone() for t in tensors] for tensors in lists)
            function(w, g, None, v, ema, [None] * len(w), factor.to(w[0]), 0.1, *rest[2:])
            return [*w, *v, *ema]
        return run

    lists = weights[:5], grads[:5], seconds[:5], averages[:5]
    plain = stepped(optimizer.reference_adamw)
    expected = plain(*([t.double() for t in tensors] for tensors in lists))
    check("adamw", stepped(optimizer.adamw), plain, lists, expected)
    parameters = [torch.nn.Parameter(w) for w in weights]
    for p, g in zip(parameters, grads):
        p.grad = g
    adam = torch.optim.AdamW(parameters, 1e-6, betas=(0.0, 0.99), weight_decay=0.0, fused=True)

    def library() -> None:
        torch._foreach_mul_(grads, factor)
        adam.step()
        with torch.no_grad():
            torch._foreach_lerp_(averages, parameters, 0.01)
            torch._foreach_copy_(copies, parameters)

    contenders = {"ours": lambda: optimizer.adamw(*args), "torch": library}
    count = sum(w.numel() for w in weights)
    yield Work("optimizer", f"{model} {count / 1e6:.0f} M", "step", contenders, bytes=30 * count)


def check(name: str, ours: Callable, plain: Callable, args: tuple, expected: tuple) -> None:
    """Exit unless our error is at most twice that of `plain`, which computes in the tensors' own
    precision; both against fp32 (the rule of FlashAttention's tests)."""
    def error(function: Callable) -> float:
        with torch.no_grad():
            out = function(*args)
        out = out if isinstance(out, tuple | list) else (out,)
        return max(float((a.float() - e.float()).abs().max()) for a, e in zip(out, expected))

    found, usual = error(ours), error(plain)
    least = 1e-5 * max(float(e.abs().max()) for e in expected)
    if not found <= 2 * usual + least:
        raise SystemExit(f"bench: the error of {name} must be at most twice {usual:.3g} "
                         f"(got {found:.3g})")


def lower(function: Callable, device: torch.device, dtype: torch.dtype) -> Callable:
    """Return `function` with its products in `dtype`; a reference computes them in fp32."""
    def run(*args):
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return function(*args)
    return run


# --- timing ---

class Time(NamedTuple):
    """Hold the milliseconds of one call."""
    ms: float             # on the GPU
    host: float           # from the call to its return


WARMUP = 3                        # rounds that are not counted
SLEEP_PER_MS = 5_000_000          # clocks slept for each host millisecond: twice what 2.5 GHz needs
SHORTEST, LONGEST = 500_000, 2 ** 31          # clocks of a sleep; 2 ** 31 take about a second


def on_host(run: Callable[[], Any]) -> float:
    """Return the milliseconds from the call of `run` to its return."""
    start = time.perf_counter()
    run()
    return 1000 * (time.perf_counter() - start)


def timed(run: Callable[[], Any], flush: Tensor, sleep: int) -> Time | None:
    """Time one call with a cold L2 cache while the GPU sleeps for `sleep` clocks before it.

    Return None where the sleep ended before the whole call was queued: the events would then
    enclose the time that the GPU waited for the host.
    """
    flush.zero_()
    if flush.device.type != "cuda":
        host = on_host(run)
        return Time(host, host)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(sleep)
    start.record()
    host = on_host(run)
    end.record()
    ahead = not start.query()                 # the GPU still sleeps, and all of the call is queued
    end.synchronize()
    return Time(start.elapsed_time(end), host) if ahead else None


def measure(contenders: dict[str, Callable[[], Any]], rounds: int,
            flush: Tensor) -> dict[str, list[Time]]:
    """Return the times by contender; every round calls each of them once, in an order of its own.

    The last warm-up call of a contender gives the length of its sleep, which is doubled whenever
    it turns out to be too short.
    """
    times: dict[str, list[Time]] = {name: [] for name in contenders}
    sleep: dict[str, int] = {}
    shuffled, names = random.Random(0), list(contenders)
    for i in range(-WARMUP, rounds):
        shuffled.shuffle(names)
        for name in names:
            if i < 0:
                sleep[name] = max(SHORTEST, int(SLEEP_PER_MS * on_host(contenders[name])))
                synchronize(flush)
                continue
            while (found := timed(contenders[name], flush, sleep[name])) is None:
                sleep[name] *= 2
                if sleep[name] > LONGEST:
                    raise RuntimeError(f"bench: {name} must return before the GPU is done with it "
                                       f"(it was not queued within {LONGEST} clocks)")
            times[name].append(found)
    return times


def synchronize(flush: Tensor) -> None:
    """Wait until the GPU of `flush` is idle."""
    if flush.device.type == "cuda":
        torch.cuda.synchronize(flush.device)


def quantiles(values: list[float]) -> tuple[float, float, float]:
    """Return (20 %, median, 80 %)."""
    values, fifth = sorted(values), len(values) // 5
    return values[fifth], statistics.median(values), values[len(values) - 1 - fifth]


def copy_bandwidth(flush: Tensor, rounds: int) -> float:
    """Return the bytes per second of a large copy on this device, read and write counted."""
    size = 2 ** 28 if flush.is_cuda else 2 ** 20
    source = torch.empty(size, dtype=torch.uint8, device=flush.device)
    target = torch.empty_like(source)
    times = measure({"copy": lambda: target.copy_(source)}, rounds, flush)["copy"]
    ms = statistics.median(t.ms for t in times)
    return 2 * source.numel() / ms * 1000


# --- rows ---

def about(device: torch.device) -> dict[str, str]:
    """Return what the numbers depend on: GPU, driver, versions, commit and date."""
    def run(*command: str) -> str:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()

    triton = sys.modules.get("triton")
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    driver = "-"
    if device.type == "cuda":
        query = "--query-gpu=driver_version", "--format=csv,noheader"
        driver = run("nvidia-smi", *query).split("\n")[0]
    commit = run("git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD")
    return {"gpu": gpu, "driver": driver, "torch": torch.__version__,
            "cuda": torch.version.cuda or "-", "triton": getattr(triton, "__version__", "-"),
            "commit": commit or "unknown", "date": datetime.date.today().isoformat()}


COLUMNS = ("kernel", "shape", "direction", "contender", "ms", "ms_20", "ms_80", "host_ms", "tflops",
           "gbps", "copy_share", "speedup", "gpu", "driver", "torch", "cuda", "triton", "commit",
           "date")


def rows_of(work: Work, times: dict[str, list[Time]], copy: float,
            origin: dict[str, str]) -> list[dict]:
    """Return a row for each contender; speedup is its median time divided by that of ours."""
    ours, rows = statistics.median(t.ms for t in times["ours"]), []
    for name, values in times.items():
        low, ms, high = quantiles([t.ms for t in values])
        rate = work.bytes / ms * 1000
        rows.append({"kernel": work.kernel, "shape": work.shape, "direction": work.direction,
                     "contender": name, "ms": f"{ms:.4f}", "ms_20": f"{low:.4f}",
                     "ms_80": f"{high:.4f}",
                     "host_ms": f"{statistics.median(t.host for t in values):.4f}",
                     "tflops": f"{work.flops / ms / 1e9:.1f}" if work.flops else "",
                     "gbps": f"{rate / 1e9:.0f}" if work.bytes else "",
                     "copy_share": f"{rate / copy:.3f}" if work.bytes else "",
                     "speedup": f"{ms / ours:.3f}", **origin})
    return rows


def write_csv(path: Path, rows: list[dict]) -> None:
    """Write all rows; a reader finds the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    os.replace(temporary, path)


def main(argv: list[str]) -> None:
    """Run the command; see the top of this file."""
    parser = argparse.ArgumentParser(prog="python -m kernels.bench", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--model", nargs="+", choices=tuple(MODELS), default=list(MODELS))
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--gluon", action="store_true",
                        help="also time attention with its forward pass in Gluon, for sm_90")
    parser.add_argument("--out", type=Path, help="default: kernels/results/<gpu>.csv")
    parser.add_argument("--smoke", action="store_true",
                        help="tiny sizes on the CPU, to test this file")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available() and not args.smoke:
        print("bench: no CUDA device was found; run it on a GPU, or with --smoke to test this file",
              file=sys.stderr)
        sys.exit(2)
    device = torch.device("cpu" if args.smoke else "cuda")
    if args.gluon and (why := attention_gluon.missing(device)):
        print(f"bench: --gluon: {why}", file=sys.stderr)
        sys.exit(2)
    # twice the largest L2 of today: what was read or written before is gone
    flush = torch.empty(2 ** 20 if args.smoke else 2 ** 28, dtype=torch.uint8, device=device)
    copy, origin, rows = copy_bandwidth(flush, args.rounds), about(device), []
    name = f"{origin['gpu'].replace(' ', '-').lower()}.csv"
    path = args.out or Path(__file__).parent / "results" / name
    print(f"{origin}; copy bandwidth {copy / 1e9:.0f} GB/s")
    works = {"attention": functools.partial(attention_work, gluon=args.gluon),
             "modulation": modulation_work, "heads": heads_work, "optimizer": optimizer_work}
    plan = [(k, m, b) for k in args.kernel for m in args.model
            for b in (args.batch[:1] if k == "optimizer" else args.batch)]
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
