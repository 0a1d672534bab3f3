"""Compile every kernel at real shapes for GPUs that are not here and print what came out.

    python -m kernels.aot                                  all kernels for sm_90
    python -m kernels.aot --arch 80 90 --kernel attention --json aot.json

No GPU is needed. The public functions run forward and backward on CPU tensors whose values nobody
reads; every launch is compiled through Triton's own specialisation of its arguments and recorded
instead of started.

Columns of a kernel: registers and spilled bytes of a thread; smem, bytes of shared memory of a CTA;
tmem, columns of tensor memory of a CTA (sm_100); ctas, how many fit on an SM by all of these;
products, instructions of the tensor cores; bulk, of TMA; async, of cp.async; hazards, instructions
of a loop that write registers which a product in flight (wgmma) still has as its left factor: PTX
calls the result undefined.
Columns of its costliest loop: instructions of a warp; waits for products or copies (as many as
products mean that the products are serialised); then the cycles that an SM needs for one pass of
all CTAs that fit on it, by resource:

    issue       every instruction of every warp, four a clock
    mufu        exponentials
    product     the tensor cores at their peak
    shared      shared memory at 128 bytes a clock: what the tensor cores read as operands, what
                cp.async and TMA write, what bulk reductions read, what threads load and store.
                Loads from one base whose offsets are closer than the bytes of a warp read the same
                words in several lanes and count those bytes once. Parts in --json: shared_operands,
                shared_bulk, shared_access

In a kernel whose warps have roles (Gluon), the loop is that of each warpgroup that multiplies, and
what the producer copies counts as copied there.

`bound` is the largest of them, and `limit` names it. On sm_90, where no exponential stands between
a product and its wait, products and exponentials count as one after the other. "-" is an amount
that the code does not tell; it is left out of the bound.

The model ranks candidates for a launch table; it does not predict time. It cannot see latencies,
barriers that make warps wait for each other, bank conflicts, L2 or memory, the prologue and the
epilogue of a kernel, or whether the overlap that the order of the instructions allows happens. Bank
conflicts cannot be counted from machine code alone, since the addresses are known only at run time.
For sm_100 which wait belongs to which product is not known, and overlap is assumed. Products by
mma.sync count at the peak of wgmma or tcgen05 where a GPU has them, which is too few cycles.
"""
import argparse
import contextlib
import json
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from kernels import attention, attention_gluon, heads, modulation, optimizer

MODULES = {"attention": attention, "modulation": modulation, "heads": heads,
           "optimizer": optimizer}


class Gpu(NamedTuple):
    """Hold what one SM has; flops: dense bf16 with fp32 sums a clock."""
    registers: int
    shared: int         # bytes for CTAs, 1 KB of each reserved
    threads: int
    ctas: int
    flops: int
    mufu: int           # exponentials a clock


# Registers, shared memory, threads, CTAs: CUDA C++ Programming Guide, technical specifications per
# compute capability; the same numbers are in cuda/__device/arch_traits.h of NVIDIA's CCCL and in
# cuda_occupancy.h. Exponentials: its table of arithmetic throughput; sm_103 has twice the rate of
# sm_100 ("Inside NVIDIA Blackwell Ultra"). flops: dense peak / (SMs x boost clock) of the white
# papers of A100, RTX A6000, Jetson AGX Orin (half its dense INT8), L40S, H100, B200, B300 and RTX
# PRO 6000 Blackwell; GeForce cards of sm_86, sm_89 and sm_120 reach half where sums are fp32.
GPUS = {80: Gpu(65536, 164 << 10, 2048, 32, 2048, 16),
        86: Gpu(65536, 100 << 10, 1536, 16, 1024, 16),
        87: Gpu(65536, 164 << 10, 1536, 16, 2048, 16),
        89: Gpu(65536, 100 << 10, 1536, 24, 1024, 16),
        90: Gpu(65536, 228 << 10, 2048, 32, 4096, 16),
        100: Gpu(65536, 228 << 10, 2048, 32, 8192, 16),
        103: Gpu(65536, 228 << 10, 2048, 32, 8192, 32),
        120: Gpu(65536, 100 << 10, 1536, 24, 1024, 16)}
ARCHES = tuple(GPUS)
TMEM = 512              # columns of tensor memory of an SM, where it has one


# --- what is compiled ---

def cases(arch: int = 0) -> Iterator[tuple[str, str, Callable[[], None]]]:
    """Yield (module, case, run): the public functions at the shapes of sd3-medium, sd3.5-medium and
    sd3.5-large at 1024 px, with the gradients of both networks' steps; one grid of 832x1216 px.
    For sm_90 also attention with its forward pass in Gluon."""
    bf16 = dict(dtype=torch.bfloat16)
    for model, n, norm, text in (("sd3-medium", 24, False, 154), ("sd3.5-medium", 24, True, 333),
                                 ("sd3.5-large", 38, True, 333)):
        d = 64 * n

        def attend(n=n, norm=norm, text=text, dh=64, need_txt=True, alone=False, frozen=False,
                   home=attention) -> None:
            qkv = [torch.empty(2, l, 3, n, dh, **bf16, requires_grad=True) for l in (text, 4096)]
            weights = [tuple(torch.empty(dh, **bf16, requires_grad=not frozen) for _ in range(2))
                       for _ in qkv] if norm else (None, None)
            txt, norm_txt = (None, None) if alone else (qkv[0], weights[0])
            out = home.joint_attention(txt, qkv[1], norm_txt, weights[1], need_txt=need_txt)
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

        def judge(student: bool, d=d, k=n, grid=(64, 64)) -> None:
            c, e, l = 512, 64, grid[0] * grid[1]
            feats = [torch.empty(2, l, d, **bf16, requires_grad=student) for _ in range(k)]
            sizes = ((k, d, c), *3 * [(k, c)], (k, 3, 3, c, c), *3 * [(k, c)], (k, e, c), (k, c),
                     (k,))
            params = heads.HeadParams(*(torch.empty(size, requires_grad=not student)
                                        for size in sizes))
            logits = heads.discriminator_heads(feats, params, torch.empty(2, e), grid)
            logits.backward(torch.empty_like(logits))

        def step(d=d, beta1=0.0) -> None:
            for size in ((d, d), (38,)):            # the second one is not a multiple of 16
                w, g, m, v, ema = (torch.empty(size) for _ in range(5))
                optimizer.adamw([w], [g], [m] if beta1 else None, [v], [ema], [w.bfloat16()],
                                torch.ones(()), 1e-3, beta1, 0.99, 0.01, 1e-8, 0.99, 1)

        yield "attention", f"{model}, training", attend
        yield "attention", f"{model}, last block", lambda f=attend: f(need_txt=False, frozen=True)
        if arch == 90 and attention_gluon.gluon:
            yield "attention", f"{model}, Gluon", lambda f=attend: f(home=attention_gluon)
        if model == "sd3.5-medium":
            yield "attention", f"{model}, image only", lambda f=attend: f(alone=True)
        if model == "sd3.5-large":
            yield "attention", "heads of 128", lambda f=attend: f(n=19, dh=128)
        if model != "sd3.5-medium":
            yield "modulation", f"width {d}", modulate
            yield "heads", f"{n} taps of {d}, student's step", lambda f=judge: f(True)
            yield "heads", f"{n} taps of {d}, heads' step", lambda f=judge: f(False)
        if model == "sd3-medium":
            yield "optimizer", "student", step
            yield "optimizer", "with momentum", lambda f=step: f(beta1=0.9)
        if model == "sd3.5-large":          # another grid: the same code as for a square one
            yield ("heads", f"5 taps of {d}, 52x76, heads' step",
                   lambda f=judge: f(False, k=5, grid=(52, 76)))


# --- compile and record ---

class Device:
    """Stand for the CUDA driver and say what GPU to compile for. Each architecture is a device of
    its own, so that Triton keeps their kernels apart."""

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
    """Make launches compile for `arch` and append (kernel name, constant arguments, kernel)."""
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
    """Return the output of a CUDA tool of Triton's wheel."""
    import triton
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *args], capture_output=True, text=True, check=True).stdout


# --- read machine code ---

PRODUCT = r"(HGMMA|HMMA|UTCHMMA|UTCQMMA)"
WAIT = r"(WARPGROUP\.DEPBAR|SYNCS\.PHASECHK)"
BULK = r"(UTMALDG|UBLKCP|UTMASTG|UTMAREDG)"


class Loop(NamedTuple):
    """Hold the instructions of an innermost loop."""
    code: list[str]
    before: Sequence[str] = ()          # the code of the kernel above the loop
    reduced: float = 0                  # bytes that one bulk reduction (UTMAREDG) reads
    fed: float = 0                      # bytes that a producer warp copies in a pass of its loop

    def count(self, pattern: str) -> int:
        """Return how many instructions match."""
        return sum(bool(re.match(pattern, line)) for line in self.code)

    def order(self) -> str:
        """Return products, exponentials, waits and barriers in order: MMAx8 EX2x32 WAIT."""
        kinds = (("MMA", PRODUCT), ("EX2", r"MUFU\.EX2"), ("WAIT", WAIT), ("BAR", r"BAR\."),
                 ("TMA", BULK))
        words = [next((kind for kind, p in kinds if re.match(p, line)), None) for line in self.code]
        runs: list[list] = []
        for word in filter(None, words):
            if runs and runs[-1][0] == word:
                runs[-1][1] += 1
            else:
                runs.append([word, 1])
        return " ".join(word if n == 1 else f"{word}x{n}" for word, n in runs)

    def overlapped(self) -> bool:
        """Return whether an exponential follows a product (HGMMA) that is not waited for yet, also
        from one pass of the loop to the next."""
        flying = False
        for line in 2 * self.code:
            if line.startswith("HGMMA"):
                flying = True
            elif line.startswith("WARPGROUP.DEPBAR.LE gsb0, 0x0"):      # others leave some products
                flying = False
            elif flying and line.startswith("MUFU.EX2"):
                return True
        return False

    def overwritten(self) -> list[str]:
        """Return the instructions that write registers of a left factor whose product (HGMMA) is in
        flight, which PTX leaves undefined; the loop is a circle, gone through twice."""
        flying: list[set[int]] = [set()]                  # by group; the last one is still open
        found = []
        for line in 2 * self.code:
            written = re.match(r"(\S+) (?:P\d+, )?R(\d+)\b", line)
            if line.startswith("HGMMA"):
                if m := re.match(r"\S+ R\d+, R(\d+), gdesc", line):
                    flying[-1] |= set(range(int(m[1]), int(m[1]) + 4))
                if "gsb0" in line:
                    flying.append(set())
            elif m := re.match(r"WARPGROUP\.DEPBAR\.LE gsb0, (0x\d+)", line):
                flying = flying[-1 - int(m[1], 16):]
            elif written:
                wide = re.search(r"\.(128|64|WIDE|4|2)\b", written[1]) or [0, "1"]
                count = {"128": 4, "4": 4, "64": 2, "WIDE": 2, "2": 2, "1": 1}[wide[1]]
                registers = range(int(written[2]), int(written[2]) + count)
                if set().union(*flying) & set(registers) and line not in found:
                    found.append(line)
        return found

    def constant(self, register: str, line: int) -> int | None:
        """Return what a register holds at a line of the loop, if that is a constant moved there."""
        written = re.compile(rf"\S+ {register}, (.*)")
        for text in reversed([*self.before, *self.code[:line]]):
            if m := written.match(text):
                value = re.fullmatch(r"(?:RZ, RZ, )?(0x[0-9a-f]+)", m[1])
                return int(value[1], 16) if value and "MOV" in text.split()[0] else None
        return None

    def products(self, warps: int) -> tuple[float | None, float | None]:
        """Return the operations of the products of a CTA of `warps` warps, and the bytes that they
        read from shared memory; None where an instruction does not tell its size.

        A warpgroup's product (HGMMA m x n x k) reads the right factor (n x k) from shared memory,
        and the left one (m x k) unless it is in registers. A tcgen05 product is one instruction of
        a CTA; m and n are in the instruction descriptor, a constant, and a left factor that is not
        in shared memory is in tensor memory. A row of k elements has 32 bytes in any precision.
        """
        flops = read = 0.0
        for i, line in enumerate(self.code):
            if m := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)\S* R\d+, (R\d|gdesc)", line):
                rows, columns, depth = map(int, m.groups()[:3])
                flops += 2 * rows * columns * depth * warps / 4
                read += 32 * (columns + (rows if m[4] == "gdesc" else 0)) * warps / 4
            elif m := re.match(r"HMMA\.(16816|1688)\.", line):
                flops += 2 * 16 * 8 * int(m[1][3:]) * warps
            elif m := re.match(r"UTC[HQ]MMA (\w+)\[.*idesc\[(UR\d+)\]", line):
                descriptor = self.constant(m[2], i)
                if descriptor is None:
                    return None, None
                rows, columns = (descriptor >> 24 & 31) * 16, (descriptor >> 17 & 63) * 8
                flops += 2 * rows * columns * (32 if "Q" in line[:5] else 16)
                read += 32 * (columns + (rows if m[1] == "gdesc" else 0))
            elif re.match(PRODUCT, line):
                return None, None
        return flops, read

    def copied(self) -> float | None:
        """Return the bytes of shared memory that TMA writes or reduces from, of a CTA; None where
        the code does not tell. A barrier is told how many bytes to expect: a constant."""
        if self.count(r"(UTMASTG|UBLKCP)") or self.count("UTMAREDG") and not self.reduced:
            return None
        total = self.fed + self.count("UTMAREDG") * self.reduced
        for i, line in enumerate(self.code):
            if m := re.match(r"SYNCS\.ARRIVE\.TRANS64 RZ, \[.*\], (R\d+)", line):
                expected = self.constant(m[1], i)
                if expected is None:
                    return None
                total += expected
        return total if total or not self.count("UTMALDG") else None

    def accessed(self) -> int:
        """Return the bytes of shared memory that a warp loads, stores and copies by cp.async; at
        least 128, a clock, for each instruction."""
        offsets: dict[str, set[int]] = {}
        place = re.compile(r"LDS\S* \S+ \[(.*?)(?:\+(-?0x[0-9a-f]+))?\]")
        for line in self.code:
            if m := place.match(line):
                offsets.setdefault(m[1], set()).add(int(m[2] or "0", 16))
        total = 0
        for line in self.code:
            if m := re.match(r"(?:LDSM|STSM)\S*?(?:\.([24]))? ", line):
                total += 128 * int(m[1] or 1)
            elif re.match(r"(LDS|STS|LDGSTS)\b", line):
                size = 4 * int((re.search(r"\.(64|128)\b", line.split()[0]) or [0, 32])[1])
                if m := place.match(line):
                    near = sorted(offsets[m[1]])
                    size = min([size, *(b - a for a, b in zip(near, near[1:]))])
                total += max(128, size)
        return total

    def cycles(self, gpu: Gpu, warps: int, ctas: int) -> dict[str, float]:
        """Return the cycles of an SM for one pass of `ctas` CTAs of `warps` warps, by resource, and
        the parts of shared memory; what the code does not tell is left out."""
        flops, read = self.products(warps)
        parts = {"shared_operands": read, "shared_bulk": self.copied(),
                 "shared_access": self.accessed() * warps}
        found = {"issue": len(self.code) * warps * ctas / 4,
                 "mufu": self.count("MUFU") * warps * ctas * 32 / gpu.mufu,
                 "product": None if flops is None else flops * ctas / gpu.flops,
                 "shared": None if None in parts.values() else sum(parts.values()) * ctas / 128}
        found |= {k: None if v is None else v * ctas / 128 for k, v in parts.items()}
        return {k: v for k, v in found.items() if v is not None}

    def bound(self, cycles: dict[str, float]) -> tuple[str, float]:
        """Return (resource, cycles) of the resource that needs most."""
        needed = {k: v for k, v in cycles.items() if not k.startswith("shared_")}
        if self.count("HGMMA") and self.count(r"MUFU\.EX2") and not self.overlapped():
            needed["product+mufu"] = needed.pop("product") + needed.pop("mufu")
        return max(needed.items(), key=lambda item: item[1])


def loops(sass: str, reduced: float = 0) -> list[Loop]:
    """Return the innermost loops: from a label to a branch back to it, with no other one inside."""
    code, labels, spans = [], {}, []
    for line in sass.splitlines():
        if m := re.match(r"\s*(\.L_x_\d+):", line):
            labels[m[1]] = len(code)
        elif m := re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\d+ )?(.*?) ?;", line):
            code.append(m[1])
            branch = re.match(r"(?:BRA|BRA\.\w+)\b.*`\((\.L_x_\d+)\)", m[1])
            if branch and branch[1] in labels:
                if labels[branch[1]] < len(code) - 1:        # a kernel's last code jumps to itself
                    spans.append((labels[branch[1]], len(code)))
    inner = [(a, z) for a, z in spans
             if not any((a, z) != (c, y) and a <= c and y <= z for c, y in spans)]
    return [Loop(code[a:z], code[:a], reduced) for a, z in inner]


def reduction(ttgir: str, count: int) -> float:
    """Return the bytes that each of `count` bulk reductions reads, from Triton's GPU dialect: on
    average, 0 where it has none. Each of the dialect becomes as many instructions, less those that
    ptxas merges."""
    shapes = re.findall(r"async_tma_reduce.*memdesc<((?:\d+x)+)[a-z]+(\d+)", ttgir)
    sizes = [math.prod(map(int, shape.split("x")[:-1])) * int(bits) / 8 for shape, bits in shapes]
    return sum(sizes) / (len(sizes) * -(-count // len(sizes))) if count else 0.0


def describe(module: str, case: str, arch: int, name: str, options: dict[str, Any],
             compiled) -> dict[str, Any]:
    """Return a row of the table."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = tool("cuobjdump", "--dump-resource-usage", file.name)
        sass = tool("nvdisasm", "-c", file.name)
    registers, stack = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK"))
    gpu, warps, shared = GPUS[arch], compiled.metadata.num_warps, compiled.metadata.shared
    tmem = getattr(compiled.metadata, "tmem_size", None) or 0
    if getattr(compiled.metadata, "num_ctas", 1) != 1:
        raise ValueError(f"{name}: num_ctas must be 1 (got {compiled.metadata.num_ctas})")
    by_registers = gpu.registers // (-(-registers // 8) * 8 * 32 * warps)
    by_tmem = TMEM // tmem if tmem else gpu.ctas
    ctas = min(by_registers, by_tmem, gpu.shared // (shared + 1024), gpu.threads // (32 * warps),
               gpu.ctas)

    def count(pattern: str) -> int:
        return len(re.findall(rf"\*/\s+(?:@!?U?P\d+ )?{pattern}", sass))

    config = {k: v for k, v in options.items() if isinstance(v, int | bool)}
    row = {"kernel": f"{module}.{name.lstrip('_')}", "case": case, "arch": arch, "config": config,
           "registers": registers, "spills": stack, "shared": shared, "tmem": tmem, "ctas": ctas,
           "products": count(PRODUCT), "bulk": count(BULK), "async": count("LDGSTS"),
           "vector": count(r"(LDG|STG)\.E\.\S*128")}
    found = loops(sass, reduction(compiled.asm.get("ttgir", ""), count("UTMAREDG")))
    row["hazards"] = sum(len(loop.overwritten()) for loop in found)
    if found:
        main = max(found, key=lambda loop: (loop.count(PRODUCT), len(loop.code)))
        # a role of fewer warps than a product needs copies; it takes the place of a warpgroup
        roles = re.findall(r"partition\d+\(.*\) num_warps\(([12])\)", compiled.asm.get("ttgir", ""))
        if roles:
            main = main._replace(fed=max(loop.copied() or 0 for loop in found))
            warps -= 4 * len(roles)
        cycles = main.cycles(gpu, warps, max(1, ctas))
        limit, bound = main.bound(cycles)
        row |= {"instructions": len(main.code), "waits": main.count(WAIT),
                **{f"cycles_{k}": round(v) for k, v in cycles.items()},
                "bound": round(bound), "limit": limit, "order": main.order(),
                "loops": [loop.order() for loop in found if loop.count(PRODUCT)]}
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as text; "-" where a row lacks a column."""
    columns = {c: c.removeprefix("cycles_") for c in (
        "kernel", "arch", "registers", "spills", "shared", "tmem", "ctas", "products", "bulk",
        "async", "hazards", "instructions", "waits", "cycles_issue", "cycles_mufu",
        "cycles_product", "cycles_shared", "bound", "limit", "case", "config")} | {"shared": "smem"}
    cells = [list(columns.values())]
    for row in rows:
        brief = " ".join(f"{k}={int(v)}" for k, v in row.get("config", {}).items())
        cells.append([str((row | {"config": brief}).get(c, "-")) for c in columns])
    widths = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip()
                     for row in cells)


def compile_all(arches: list[int], modules: list[str]) -> list[dict[str, Any]]:
    """Return the rows of all kernels; of equal launches (kernel, options, code) the first."""
    if any(getattr(module, "INTERPRET", False) for module in MODULES.values()):
        raise RuntimeError("aot: TRITON_INTERPRET=1 leaves nothing to compile; unset it")
    rows, done = [], set()
    work = [(arch, *case) for arch in arches for case in cases(arch) if case[0] in modules]
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
    """Run the command; see the top of this file."""
    parser = argparse.ArgumentParser(prog="python -m kernels.aot", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHES, default=[90])
    parser.add_argument("--kernel", nargs="+", choices=tuple(MODULES), default=list(MODULES))
    parser.add_argument("--json", metavar="FILE",
                        help="also write the rows, with options and loops")
    args = parser.parse_args(argv)
    rows = compile_all(args.arch, args.kernel)
    print(table(rows))
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
