"""Compiles every kernel at real shapes for GPUs that are not here, and prints what came out: no GPU needed.

    python -m kernels.aot                                  all kernels for sm_90
    python -m kernels.aot --arch 80 90 --kernel attention --json aot.json

The public functions run forward and backward on CPU tensors that nobody reads; every launch is compiled
through Triton's own specialisation of its arguments and recorded instead of started. Columns: registers a
thread, bytes spilled a thread, shared memory of a CTA, CTAs that fit on an SM, tensor-core products, bulk
copies (TMA); of the costliest loop the instructions a warp, the waits for products, and the cycles an SM
needs for one pass of all its resident CTAs: issue slots, exponentials (MUFU), products, shared memory.
`bound` is their maximum where exponentials stand between a product and its wait, so that both run at once,
else their sum: good to rank candidates, no prediction of time (and without products on sm_100, whose
instruction does not tell its size). As many waits as products mean that products are serialised, whatever
spills say.
"""
import argparse
import contextlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from kernels import attention, heads, modulation

MODULES = {"attention": attention, "modulation": modulation, "heads": heads}
ARCHES = 80, 89, 90, 100


class Gpu(NamedTuple):
    """What one SM has; flops: dense bf16 with fp32 sums a clock."""
    registers: int
    shared: int         # bytes for CTAs, 1 KB of each reserved
    threads: int
    ctas: int
    flops: int
    mufu: int           # exponentials a clock


# sources: NVIDIA's tuning guides (registers, shared memory, threads) and peak rates / SMs / boost clock
GPUS = {80: Gpu(65536, 167936, 2048, 32, 2048, 16), 89: Gpu(65536, 102400, 1536, 24, 1024, 16),
        90: Gpu(65536, 233472, 2048, 32, 4096, 16), 100: Gpu(65536, 233472, 2048, 32, 8192, 16)}


# --- what is compiled ---

def cases() -> Iterator[tuple[str, str, Callable[[], None]]]:
    """(module, case, run): the public functions at the shapes of sd3-medium, sd3.5-medium and sd3.5-large at
    1024 px, training both networks' ways."""
    bf16 = dict(dtype=torch.bfloat16)
    for model, n, norm, text in (("sd3-medium", 24, False, 154), ("sd3.5-medium", 24, True, 333),
                                 ("sd3.5-large", 38, True, 333)):
        d = 64 * n

        def attend(n=n, norm=norm, text=text, dh=64, need_txt=True, alone=False, frozen=False) -> None:
            qkv = [torch.empty(2, l, 3, n, dh, **bf16, requires_grad=True) for l in (text, 4096)]
            weights = [tuple(torch.empty(dh, **bf16, requires_grad=not frozen) for _ in range(2))
                       for _ in qkv] if norm else (None, None)
            out = attention.joint_attention(None if alone else qkv[0], qkv[1], None if alone else weights[0],
                                            weights[1], need_txt=need_txt)
            torch.autograd.backward([o for o in out if o is not None],
                                    [torch.empty_like(o) for o in out if o is not None])

        def modulate(d=d) -> None:
            x, branch = (torch.empty(2, 4096, d, **bf16, requires_grad=True) for _ in range(2))
            chunks = torch.empty(2, 9 * d, **bf16, requires_grad=True).chunk(9, -1)
            shift, scale, gate, shift2, scale2 = chunks[:5]
            y = modulation.modulate(x, shift, scale)
            y1, y2 = modulation.modulate2(x, shift, scale, shift2, scale2)
            z, y3 = modulation.gate_modulate(x, branch, gate, shift, scale)
            out = [y, y1, y2, z, y3, modulation.gate(x, branch, gate)]
            torch.autograd.backward(out, [torch.empty_like(o) for o in out])

        def judge(student: bool, d=d, k=n) -> None:
            c, e = 512, 64
            feats = [torch.empty(2, 4096, d, **bf16, requires_grad=student) for _ in range(k)]
            sizes = ((k, d, c), *3 * [(k, c)], (k, 3, 3, c, c), *3 * [(k, c)], (k, e, c), (k, c), (k,))
            params = heads.HeadParams(*(torch.empty(size, requires_grad=not student) for size in sizes))
            logits = heads.discriminator_heads(feats, params, torch.empty(2, e), (64, 64))
            logits.backward(torch.empty_like(logits))

        yield "attention", f"{model}, training", attend
        yield "attention", f"{model}, last block", lambda f=attend: f(need_txt=False, frozen=True)
        if model == "sd3.5-medium":
            yield "attention", f"{model}, image only", lambda f=attend: f(alone=True)
        if model == "sd3.5-large":
            yield "attention", "heads of 128", lambda f=attend: f(n=19, dh=128)
        if model != "sd3.5-medium":
            yield "modulation", f"width {d}", modulate
            yield "heads", f"{n} taps of {d}, student's step", lambda f=judge: f(True)
            yield "heads", f"{n} taps of {d}, heads' step", lambda f=judge: f(False)


# --- compile and record ---

class Device:
    """Stands for the CUDA driver: says what GPU to compile for. Each architecture is a device of its own, so
    that Triton keeps their kernels apart."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


@contextlib.contextmanager
def recording(arch: int, seen: list) -> Iterator[None]:
    """Inside, launches compile for `arch` and append (kernel name, constant arguments, compiled kernel)."""
    import triton
    from triton.runtime.jit import JITFunction

    def getitem(self, grid):
        def launch(*args, **options):
            constants = {p.name: value for p, value in zip(self.params, args) if p.is_constexpr}
            compiled = self.run(*args, grid=grid, warmup=True, **options)
            seen.append((self.fn.__name__, {**constants, **options}, compiled))
        return launch

    before = JITFunction.__getitem__
    triton.runtime.driver.set_active(Device(arch))
    JITFunction.__getitem__ = getitem
    for module in MODULES.values():
        module.ARCH = arch
    try:
        yield
    finally:
        JITFunction.__getitem__ = before
        for module in MODULES.values():
            module.ARCH = None


def tool(name: str, *args: str) -> str:
    """Output of a CUDA tool that Triton's wheel brings."""
    import triton
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *args], capture_output=True, text=True, check=True).stdout


# --- read machine code ---

class Loop(NamedTuple):
    """The instructions of an innermost loop."""
    code: list[str]

    def count(self, pattern: str) -> int:
        return sum(bool(re.match(pattern, line)) for line in self.code)

    def order(self) -> str:
        """Products, exponentials, waits and barriers in order; runs are shortened: HGMMAx8 EX2x32 WAIT."""
        kinds = (("MMA", PRODUCT), ("EX2", r"MUFU\.EX2"), ("WAIT", WAIT), ("BAR", r"BAR\."), ("TMA", BULK))
        words = [next((kind for kind, p in kinds if re.match(p, line)), None) for line in self.code]
        runs: list[list] = []
        for word in filter(None, words):
            if runs and runs[-1][0] == word:
                runs[-1][1] += 1
            else:
                runs.append([word, 1])
        return " ".join(word if n == 1 else f"{word}x{n}" for word, n in runs)

    def overlapped(self) -> bool:
        """Exponentials stand after a product that is not waited for yet; the loop is seen as a circle."""
        words = self.order().split()
        return any(a.startswith("MMA") and b.startswith("EX2") for a, b in zip(words, words[1:] + words[:1]))

    def cycles(self, gpu: Gpu, warps: int, ctas: int) -> dict[str, float]:
        """Cycles of an SM for one pass of `ctas` CTAs of `warps` warps, by what they need."""
        all_warps = warps * ctas
        flops = 0.0
        for line in self.code:
            if m := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", line):
                a, b, c = map(int, m.groups())
                flops += 2 * a * b * c / 4                             # issued by each of four warps
            elif m := re.match(r"HMMA\.(\d)(\d*?)(8|16|32)\.", line):
                flops += 2 * 16 * 8 * (16 if "16816" in line else 8)
        # bytes a warp moves: 32 lanes of the width in the name, 4 bytes without one
        wide = lambda line: 32 * int((re.search(r"\.(64|128)\b", line) or [0, 32])[1]) / 8
        moved = sum(wide(line) for line in self.code if re.match(r"(LDS|STS)\b", line))
        moved += sum(512 if ".4" in line or "x4" in line else 256 for line in self.code
                     if re.match(r"(LDSM|STSM)", line))
        return {"issue": len(self.code) * all_warps / 4,
                "mufu": self.count(r"MUFU") * all_warps * 32 / gpu.mufu,
                "product": flops * all_warps / gpu.flops, "shared": moved * all_warps / 128}


PRODUCT = r"(HGMMA|HMMA|UTCHMMA|UTCQMMA)"
WAIT = r"(WARPGROUP\.DEPBAR|SYNCS\.PHASECHK)"
BULK = r"(UTMALDG|UBLKCP|UTMASTG|UTMAREDG)"


def loops(sass: str) -> list[Loop]:
    """The innermost loops: from a label to a branch back to it, with no such branch inside."""
    code, labels, spans = [], {}, []
    for line in sass.splitlines():
        if m := re.match(r"\s*(\.L_x_\d+):", line):
            labels[m[1]] = len(code)
        elif m := re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\d+ )?(.*?) ?;", line):
            code.append(m[1])
            if (b := re.match(r"(?:BRA|BRA\.\w+)\b.*`\((\.L_x_\d+)\)", m[1])) and b[1] in labels:
                if labels[b[1]] < len(code) - 1:                     # a kernel's last code jumps to itself
                    spans.append((labels[b[1]], len(code)))
    inner = [(a, z) for a, z in spans if not any((a, z) != (c, y) and a <= c and y <= z for c, y in spans)]
    return [Loop(code[a:z]) for a, z in inner]


def describe(module: str, case: str, arch: int, name: str, options: dict[str, Any],
             compiled) -> dict[str, Any]:
    """A row of the table."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, sass = tool("cuobjdump", "--dump-resource-usage", file.name), tool("nvdisasm", "-c", file.name)
    registers, stack = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK"))
    gpu, warps, shared = GPUS[arch], compiled.metadata.num_warps, compiled.metadata.shared
    if getattr(compiled.metadata, "num_ctas", 1) != 1:
        raise ValueError(f"{name}: found clusters, one CTA a cluster accepted")
    by_registers = gpu.registers // (-(-registers // 8) * 8 * 32 * warps)
    ctas = min(by_registers, gpu.shared // (shared + 1024), gpu.threads // (32 * warps), gpu.ctas)
    count = lambda pattern: len(re.findall(rf"\*/\s+(?:@!?U?P\d+ )?{pattern}", sass))
    row = {"kernel": f"{module}.{name.lstrip('_')}", "case": case, "arch": arch,
           "config": {k: v for k, v in options.items() if isinstance(v, int | bool) and v not in (None,)},
           "registers": registers, "spills": stack, "shared": shared, "ctas": ctas,
           "products": count(PRODUCT), "bulk": count(BULK), "vector": count(r"(LDG|STG)\.E\.\S*128")}
    found = loops(sass)
    if found:
        weigh = lambda loop: (loop.count(PRODUCT), len(loop.code))
        main = max(found, key=weigh)
        cycles = main.cycles(gpu, warps, max(1, ctas))
        apart = main.count(r"MUFU\.EX2") and not main.overlapped()
        bound = sum(cycles.values()) if apart else max(cycles.values())
        row |= {"instructions": len(main.code), "waits": main.count(WAIT),
                **{f"cycles_{k}": round(v) for k, v in cycles.items()}, "bound": round(bound),
                "order": main.order(), "loops": [loop.order() for loop in found if loop.count(PRODUCT)]}
    return row


def table(rows: list[dict[str, Any]]) -> str:
    columns = ("kernel", "arch", "registers", "spills", "shared", "ctas", "products", "bulk", "instructions",
               "waits", "cycles_issue", "cycles_mufu", "cycles_product", "cycles_shared", "bound", "case",
               "config")
    cells = [[c.removeprefix("cycles_") for c in columns]]
    for row in rows:
        brief = " ".join(f"{k}={int(v)}" for k, v in row.get("config", {}).items())
        cells.append([str((row | {"config": brief}).get(c, "-")) for c in columns])
    widths = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in cells)


def compile_all(arches: list[int], modules: list[str]) -> list[dict[str, Any]]:
    """Rows of all kernels; of equal launches (kernel, options, machine code) the first."""
    if any(getattr(module, "INTERPRET", False) for module in MODULES.values()):
        raise RuntimeError("aot: found TRITON_INTERPRET=1, which leaves nothing to compile; unset it")
    rows, done, work = [], set(), [(arch, *case) for arch in arches for case in cases() if case[0] in modules]
    for arch, module, case, run in tqdm(work, desc="compile", dynamic_ncols=True):
        seen: list = []
        with recording(arch, seen):
            run()
        for name, options, compiled in seen:
            key = arch, name, repr(sorted(options.items(), key=str)), compiled.hash
            if key not in done:
                done.add(key)
                rows.append(describe(module, case, arch, name, options, compiled))
    return rows


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m kernels.aot", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHES, default=[90])
    parser.add_argument("--kernel", nargs="+", choices=tuple(MODULES), default=list(MODULES))
    parser.add_argument("--json", metavar="FILE", help="also write the rows, with options and loops")
    args = parser.parse_args(argv)
    rows = compile_all(args.arch, args.kernel)
    print(table(rows))
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
