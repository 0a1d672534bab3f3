"""kernels/bench.py and the reader of machine code in kernels/aot.py, without a GPU."""
import csv
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from conftest import script

from kernels import aot, bench

ROOT = Path(__file__).parents[1]


# bench

def test_quantiles():
    assert bench.quantiles([5, 1, 2, 4, 3]) == (2, 3, 4)
    assert bench.quantiles([7.0]) == (7, 7, 7)
    assert bench.quantiles(list(range(100))) == (20, 49.5, 79)


def test_every_round_calls_each_once_in_an_order_of_its_own():
    calls: list[str] = []
    contenders = {name: lambda name=name: calls.append(name) for name in "abcd"}
    times = bench.measure(contenders, 10, torch.empty(4))
    assert {name: len(t) for name, t in times.items()} == dict.fromkeys("abcd", 10)
    assert all(t.ms == t.host > 0 for values in times.values() for t in values)
    rounds = [tuple(calls[i:i + 4]) for i in range(0, len(calls), 4)]
    assert all(sorted(r) == list("abcd") for r in rounds) and len(set(rounds)) > 5


class FakeGpu:
    """Stand for torch.cuda: a host clock, and a queue of work that a GPU takes up in order.

    A sleep lasts `cycles` / 2e6 ms (2 GHz), a flush 0.1 ms. `log` has what was queued, in order.
    """

    def __init__(self, monkeypatch):
        self.host = self.gpu = 0.0           # ms: the host's clock, the end of all queued work
        self.log: list[str] = []
        gpu = self

        class Event:
            def __init__(self, enable_timing):
                self.at = 0.0

            def record(self):
                gpu.add("event", 0.0)
                self.at = gpu.gpu

            def query(self):
                return self.at <= gpu.host

            def synchronize(self):
                gpu.host = max(gpu.host, self.at)

            def elapsed_time(self, end):
                return end.at - self.at

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: self.add("sleep", cycles / 2e6))
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: self.wait())
        monkeypatch.setattr(bench.time, "perf_counter", lambda: self.host / 1000)

    @property
    def device(self):
        return torch.device("cuda")

    def zero_(self):                         # the tensor that flushes the cache
        self.add("flush", 0.1)

    def add(self, name: str, ms: float):
        self.log.append(name)
        self.gpu = max(self.gpu, self.host) + ms

    def wait(self):
        self.host = max(self.host, self.gpu)

    def call(self, python_ms: float, kernel_ms: float, syncs: bool = False):
        """Return a call that needs `python_ms` on the host and then starts a kernel."""
        def run():
            self.host += python_ms
            self.add("kernel", kernel_ms)
            if syncs:
                self.wait()
        return run


def test_a_call_is_timed_behind_a_sleep_that_hides_its_python(monkeypatch):
    """0.3 ms of Python for 0.05 ms on the GPU: the flush alone, 0.1 ms, hides too little."""
    gpu = FakeGpu(monkeypatch)
    call = gpu.call(python_ms=0.3, kernel_ms=0.05)
    assert bench.timed(call, gpu, sleep=0) is None
    assert bench.timed(call, gpu, sleep=200_000) is None           # 0.1 + 0.1 ms
    gpu.log.clear()
    found = bench.timed(call, gpu, sleep=1_000_000)
    assert gpu.log == ["flush", "sleep", "event", "kernel", "event"]
    assert found.ms == pytest.approx(0.05) and found.host == pytest.approx(0.3)


def test_the_sleep_follows_the_host_time_and_grows_where_it_is_too_short(monkeypatch):
    gpu = FakeGpu(monkeypatch)
    # ms of Python; the first three calls warm up
    slow = iter([5.0, 1.0, 0.4] + [0.3] * 4 + [20.0] + [0.3] * 99)
    run = {"a": lambda: gpu.call(next(slow), 0.05)()}
    sleeps: list[int] = []
    sleep = torch.cuda._sleep
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: (sleeps.append(cycles), sleep(cycles)))
    times = bench.measure(run, 10, gpu)["a"]
    assert [t.ms for t in times] == pytest.approx([0.05] * 10)
    assert max(t.host for t in times) < 1                  # the call of 20 ms was not accepted
    first = int(0.4 * bench.SLEEP_PER_MS)
    assert sleeps == [first] * 5 + [2 * first] * 6


def test_a_call_that_waits_for_the_gpu_raises(monkeypatch):
    gpu = FakeGpu(monkeypatch)
    with pytest.raises(RuntimeError, match="bench: a must return before the GPU is done"):
        bench.measure({"a": gpu.call(0.1, 0.05, syncs=True)}, 3, gpu)


def test_a_row_has_both_times():
    times = {"ours": [bench.Time(1.0, 0.5), bench.Time(3.0, 0.1), bench.Time(2.0, 0.2)],
             "eager": [bench.Time(4.0, 8.0)] * 3}
    work = bench.Work("k", "s", "forward", {}, flops=4e9, bytes=1e9)
    ours, eager = bench.rows_of(work, times, 1e12, {})
    assert (ours["ms"], ours["host_ms"], ours["speedup"]) == ("2.0000", "0.2000", "1.000")
    assert (eager["ms"], eager["host_ms"], eager["speedup"]) == ("4.0000", "8.0000", "2.000")
    assert (ours["tflops"], ours["gbps"], ours["copy_share"]) == ("2.0", "500", "0.500")
    assert set(ours) <= set(bench.COLUMNS)


def test_an_incorrect_kernel_is_not_timed():
    x = torch.randn(64)
    plain = lambda t: t * 2
    bench.check("double", lambda t: t * 2 + 1e-9, plain, (x,), (2 * x.double(),))
    for wrong in (lambda t: t * 2.01, lambda t: t * float("nan")):
        with pytest.raises(SystemExit, match="the error of double must be at most twice"):
            bench.check("double", wrong, plain, (x,), (2 * x.double(),))


def test_both_versions_of_flash_attention_are_contenders(monkeypatch):
    """Version 3 is a module of its own; some of its releases return (out, log-sum-exp)."""
    def attend(q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(
            *(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)

    two, three = types.ModuleType("flash_attn"), types.ModuleType("flash_attn_interface")
    two.flash_attn_func, three.flash_attn_func = attend, lambda *qkv: (attend(*qkv), None)
    monkeypatch.setitem(sys.modules, "flash_attn", two)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)         # not installed
    assert set(bench.flash_attention()) == {"flash_attn 2"}
    monkeypatch.setitem(sys.modules, "flash_attn_interface", three)
    contenders = bench.attention_contenders(torch.device("cuda"))
    assert {"flash_attn 2", "flash_attn 3", "sdpa flash", "sdpa cudnn"} < set(contenders)
    qkv = [torch.randn(2, l, 3, 2, 64) for l in (5, 9)]
    expected = bench.attention.reference_joint_attention(*qkv)
    for name in ("flash_attn 2", "flash_attn 3"):
        found = contenders[name](*qkv, None, None)
        assert all(torch.allclose(a, e, atol=1e-5) for a, e in zip(found, expected))


def test_a_library_attention_is_the_joint_one():
    qkv = [torch.randn(2, l, 3, 2, 64) for l in (5, 9)]
    norms = [tuple(torch.randn(64) for _ in range(2)) for _ in qkv]
    run = bench.library_attention(torch.nn.functional.scaled_dot_product_attention)
    for pair in (norms, (None, None)):
        found, expected = run(*qkv, *pair), bench.attention.reference_joint_attention(*qkv, *pair)
        assert all(torch.allclose(a, e, atol=1e-5) for a, e in zip(found, expected))


@pytest.mark.slow
def test_smoke_writes_a_row_for_each_contender(tmp_path):
    """Run on the CPU, under the interpreter: the file is that of a GPU, the times mean nothing."""
    command = [sys.executable, "-m", "kernels.bench", "--smoke", "--model", "sd3.5-medium",
               "--batch", "1", "--rounds", "2", "--out", str(tmp_path / "o.csv")]
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1",
           "TORCHDYNAMO_DISABLE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = list(csv.DictReader((tmp_path / "o.csv").open()))
    names = {(r["kernel"], r["direction"], r["contender"]) for r in rows}
    done = [*((k, d) for k in ("attention", "modulate", "gate_modulate")
              for d in ("forward", "backward")),
            *(("heads", d) for d in ("forward", "features", "weights"))]
    assert names == {*((*work, c) for work in done for c in ("ours", "eager", "compile")),
                     *(("optimizer", "step", c) for c in ("ours", "torch"))}
    for row in rows:
        assert float(row["ms_20"]) <= float(row["ms"]) <= float(row["ms_80"])
        assert row["gpu"] == "cpu" and row["host_ms"] == row["ms"]
        products = row["kernel"] in ("attention", "heads")
        assert bool(row["tflops"]) == products and bool(row["copy_share"]) == (not products)
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", row["date"]) and row["torch"] == torch.__version__


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_bench_says_that_it_needs_a_gpu():
    done = script("kernels.bench", ROOT)
    assert done.returncode == 2
    assert re.fullmatch(r"bench: no CUDA device was found.*\n", done.stderr)


def test_lower_computes_products_in_the_lower_precision():
    x, cpu = torch.randn(64, 64), torch.device("cpu")
    exact, low = torch.mm(x, x), bench.lower(torch.mm, cpu, torch.bfloat16)(x, x)
    assert low.dtype == torch.bfloat16
    assert torch.equal(bench.lower(torch.mm, cpu, torch.float32)(x, x), exact)


# aot: machine code

SASS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8].tnspB, R24 ;
        /*0020*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8].tnspB, R24, gsb0 ;
        /*0030*/                   MUFU.EX2 R10, R31 ;
        /*0040*/              @!P0 MUFU.EX2 R11, R38 ;
        /*0050*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0060*/                   LDS.128 R4, [R5] ;
        /*0070*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0080*/               @P0 BRA `(.L_x_0) ;
.L_x_1:
        /*0090*/                   FADD R1, R1, R2 ;
.L_x_2:
        /*00a0*/                   HMMA.16816.F32.BF16 R4, R8, R10, R4 ;
        /*00b0*/               @P1 BRA `(.L_x_2) ;
        /*00c0*/                   BRA `(.L_x_1) ;
        /*00d0*/                   EXIT ;
"""


def test_loops_are_the_innermost_ones():
    first, second = aot.loops(SASS)
    assert len(first.code) == 8 and len(second.code) == 2
    assert first.order() == "MMAx2 EX2x2 WAIT BAR" and second.order() == "MMA"
    assert first.count(aot.WAIT) == 1 and first.count(r"MUFU") == 2 and first.overlapped()
    assert not aot.Loop([line for line in first.code if "MUFU" not in line]).overlapped()
    waits = ["HGMMA.64x128x16.F32.BF16 R24", "WARPGROUP.DEPBAR.LE gsb0, 0x0", "MUFU.EX2 R1, R2"]
    assert not aot.Loop(waits).overlapped()
    two = [*2 * ["HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0"], "BAR.SYNC 0x1"]
    for groups, overlapped in ((0, False), (1, True)):        # of two groups one is still computed
        wait = f"WARPGROUP.DEPBAR.LE gsb0, 0x{groups}"
        assert aot.Loop([*two, wait, "MUFU.EX2 R1, R2"]).overlapped() == overlapped
    assert first.before == ["MOV R1, c[0x0][0x28]"]


def test_cycles_of_a_loop():
    first, second = aot.loops(SASS)
    # 8 warps of one CTA: two warpgroups; a product is 2 * 64 * 128 * 16 operations, an SM does 4096
    # a clock; it reads 64 + 128 rows of 32 bytes; LDS.128 moves 512 bytes a warp, 128 are a clock
    assert first.cycles(aot.GPUS[90], 8, 1) == {
        "issue": 8 * 8 / 4, "mufu": 2 * 8 * 32 / 16, "product": 2 * 2 * (2 * 64 * 128 * 16) / 4096,
        "shared": 192 + 32, "shared_operands": 2 * 2 * 192 * 32 / 128, "shared_bulk": 0,
        "shared_access": 8 * 512 / 128}
    one, two = (first.cycles(aot.GPUS[90], 8, ctas) for ctas in (1, 2))
    assert two == {name: 2 * value for name, value in one.items()}
    found = second.cycles(aot.GPUS[80], 4, 1)
    assert found["product"] == 4 * 2 * 16 * 8 * 16 / 2048 and found["shared"] == 0


# the main loops of attention on sm_90, 8 warps: what touches shared memory
FORWARD = [*4 * ["HGMMA.64x128x16.F32.BF16 R24, gdesc[UR56], R24"],                # q k^T
           *8 * ["HGMMA.64x64x16.F32.BF16 R88, R120, gdesc[UR4].tnspB, R88"],      # p v
           "IMAD.MOV.U32 R16, RZ, RZ, 0x8000", "SYNCS.ARRIVE.TRANS64 RZ, [UR12+0x18000], R16",
           "UTMALDG.3D [UR24], [UR6]", "UTMALDG.3D [UR32], [UR16]"]
BACKWARD = [*(f"LDS.64 R190, [R171+UR9+{start + 32 * i:#x}]"                      # lse, delta
              for start in (0x10000, 0x10200) for i in range(8)),
            *8 * ["HGMMA.64x64x16.F32.BF16 R56, gdesc[UR20], R56"],                # k q^T, v g^T
            *8 * ["HGMMA.64x64x16.F32.BF16 R88, R56, gdesc[UR28].tnspB, R88"],     # p^T g, ds^T q
            *4 * ["STSM.16.M88.4 [R179+0xc000], R40"],
            *8 * ["LDSM.16.MT88.4 R72, [R23+0xc000]"],
            *8 * ["HGMMA.64x32x16.F32.BF16 R24, R72, gdesc[UR16].tnspB, R24"],     # ds k
            *8 * ["STS.64 [R169+UR49+0xc000], R24"],
            *(f"LDS.64 R40, [R{base}+UR49+{512 * i:#x}]" for base in (168, 183) for i in range(4)),
            "MOV R24, 0x4000", "SYNCS.ARRIVE.TRANS64 RZ, [UR17+0x10400], R24",
            "UTMALDG.3D [UR8], [UR22]", "UTMALDG.3D [UR16], [UR24]",
            "LDGSTS.E [R29+0x10000], desc[UR6][R24.64], !P4"]
HEADS = [*4 * ["HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8].tnspA, R24"],
         "IMAD.MOV.U32 R0, RZ, RZ, 0x4000", "SYNCS.ARRIVE.TRANS64 RZ, [UR38+0x30000], R0",
         "UTMALDG.3D [UR32], [UR16]", "IMAD.MOV.U32 R0, RZ, RZ, 0x8000",
         "SYNCS.ARRIVE.TRANS64 RZ, [UR38+0x30020], R0", "UTMALDG.4D [UR8], [UR18]"]


@pytest.mark.parametrize("code, product, operands, bulk, access", [
    # operands: two warpgroups, rows of 32 bytes, four rows a clock; p is read from registers
    (FORWARD, 1024, 2 * (4 * (64 + 128) + 8 * 64) / 4, 0x8000 / 128, 0),
    # 16 loads of the same 32 bytes by 8 rows of lanes, a clock each; 4 for each matrix of four
    (BACKWARD, 1280, 2 * (8 * (64 + 64) + 8 * 64 + 8 * 32) / 4, 0x4000 / 128,
     8 * (16 * 1 + (4 + 8) * 4 + 8 * 2 + 8 * 2 + 1)),
    (HEADS, 1024, 2 * 4 * (64 + 256) / 4, 0xc000 / 128, 0)], ids=["forward", "backward", "heads"])
def test_what_products_and_copies_take_of_shared_memory(code, product, operands, bulk, access):
    found = aot.Loop(code).cycles(aot.GPUS[90], 8, 1)
    assert (found["product"], found["shared_operands"]) == (product, operands)
    assert (found["shared_bulk"], found["shared_access"]) == (bulk, access)
    assert found["shared"] == operands + bulk + access


def test_the_known_sums_of_shared_memory():
    """Forward 896 of 1024 cycles of products, backward 1800 against 1280, heads 1024 of 1024."""
    shared = [aot.Loop(code).cycles(aot.GPUS[90], 8, 1)["shared"]
              for code in (FORWARD, BACKWARD, HEADS)]
    assert shared == [640 + 256, 896 + 128 + 768 + 8, 640 + 384]


def test_access_of_a_warp_counts_clocks_of_128_bytes():
    for line, expected in (("LDS R1, [R2]", 128), ("LDS.U16 R1, [R2]", 128),
                           ("STS.128 [R2], R4", 512), ("LDGSTS.E.BYPASS.128 [R2], [R4.64]", 512),
                           ("LDGSTS.E [R2], desc[UR6][R4.64]", 128), ("LDSM.16.M88 R4, [R2]", 128),
                           ("LDSM.16.MT88.2 R4, [R2]", 256), ("LDG.E.128 R4, [R2]", 0)):
        assert aot.Loop([line]).accessed() == expected, line
    near, far = (["LDS.128 R4, [R2]", f"LDS.128 R8, [R2+{gap:#x}]"] for gap in (256, 512))
    assert aot.Loop(near).accessed() == 2 * 256 and aot.Loop(far).accessed() == 2 * 512
    assert aot.Loop([near[0], near[1].replace("R2", "R3")]).accessed() == 2 * 512     # other bases


def test_the_size_of_a_copy_is_the_constant_moved_last():
    wait, copy = "SYNCS.ARRIVE.TRANS64 RZ, [UR1+0x8], R7", "UTMALDG.3D [UR8], [UR2]"
    loop = aot.Loop([wait, copy], ["MOV R7, 0x100", "IMAD.MOV.U32 R7, RZ, RZ, 0x200",
                                   "MOV R8, 0x1"])
    assert loop.copied() == 0x200
    for other in ("IADD3 R7, R7, 0x4, RZ", "MOV R7, R9", "LDS R7, [R2]", "I2F R7, 0x4"):
        loop = aot.Loop([other, wait, copy], ["MOV R7, 0x100"])
        assert loop.copied() is None, other
        found = loop.cycles(aot.GPUS[90], 4, 1)
        assert "shared" not in found and "shared_access" in found and loop.bound(found)
    assert aot.Loop([copy]).copied() is None
    assert aot.Loop(["UTMASTG.3D [UR8], [UR2]"]).copied() is None


def test_a_bulk_reduction_reads_what_the_dialect_says():
    line = ("ttng.async_tma_reduce add, %out[%x, %c0] %6 : !tt.tensordesc<tensor<64x64xf32, #s1>>, "
            "!ttg.memdesc<64x64xf32, #s1, #smem, mutable> loc(#loc7)\n")
    assert aot.reduction(line, 1) == 64 * 64 * 4 and aot.reduction(2 * line, 4) == 64 * 64 * 2
    assert aot.reduction("", 0) == aot.reduction(line, 0) == 0
    code = ["MOV R7, 0x80", "SYNCS.ARRIVE.TRANS64 RZ, [UR1], R7", "UTMALDG.3D [UR8], [UR2]",
            "UTMAREDG.2D.ADD [UR16], [UR14]"]
    assert aot.Loop(code, reduced=64 * 64 * 4).copied() == 64 * 64 * 4 + 0x80
    assert aot.Loop(code).copied() is None


def test_products_of_sm_100_are_read_from_their_descriptor():
    """n / 8 is in bits 17 to 22, m / 16 in bits 24 to 28: here 128 x 128 and 128 x 64, k 16."""
    both = "UTCHMMA gdesc[UR50], gdesc[UR56], tmem[UR21], tmem[UR52], idesc[UR53], !UPT"
    one = "UTCHMMA tmem[UR46], gdesc[UR24], tmem[UR45], tmem[UR32], idesc[UR33], UPT"
    assert 0x8200490 >> 17 & 63 == 128 // 8 and 0x8110490 >> 24 & 31 == 128 // 16
    loop = aot.Loop(["UMOV UR53, 0x8200490", *4 * [both], *8 * [one]], ["UMOV UR33, 0x8110490"])
    found = loop.cycles(aot.GPUS[100], 8, 1)
    assert found["product"] == (4 * 2 * 128 * 128 * 16 + 8 * 2 * 128 * 64 * 16) / 8192 == 512
    assert found["shared_operands"] == (4 * (128 + 128) + 8 * 64) * 32 / 128 == 384
    unknown = aot.Loop([both], ["UMOV UR53, UR7"])
    assert not {"product", "shared"} & set(unknown.cycles(aot.GPUS[100], 8, 1))


def test_a_left_factor_that_is_overwritten_in_flight_is_found():
    """Two groups of products, of which the second is in flight when the loop starts again."""
    product = "HGMMA.64x256x16.F32.BF16 R24, {}, gdesc[UR8].tnspB, R24{}"
    wait = "WARPGROUP.DEPBAR.LE gsb0, {}"
    code = ["LDSM.16.MT88.4 R160, [R8]", "LDSM.16.MT88.4 R152, [R9]",
            product.format("R160", ", gsb0"), wait.format("0x1"), product.format("R152", ", gsb0")]
    assert aot.Loop([*code, wait.format("0x1")]).overwritten() == [code[1]]
    assert aot.Loop([*code, wait.format("0x0")]).overwritten() == []
    assert aot.Loop([wait.format("0x0"), *code]).overwritten() == []
    assert aot.Loop([*code[:3], "MOV R163, R1"]).overwritten() == ["MOV R163, R1", code[0]]
    assert aot.Loop([*code[2:3], "MOV R164, R1"]).overwritten() == []
    assert aot.Loop([*code[2:3], "LDS.128 R157, [R1]"]).overwritten() == ["LDS.128 R157, [R1]"]
    assert aot.Loop([*code[2:3], "STS.128 [R160], R4", "FADD R4, R160, R4"]).overwritten() == []
    both = [product.format("gdesc[UR4]", ", gsb0").replace(", gdesc[UR8].tnspB", "")]
    assert aot.Loop([*both, "MOV R4, R1"]).overwritten() == []


def test_the_bound_adds_exponentials_to_products_that_are_waited_for_first():
    product = "HGMMA.64x128x16.F32.BF16 R24, R120, gdesc[UR4], R24"
    wait = "WARPGROUP.DEPBAR.LE gsb0, 0x0"
    cycles = {"issue": 10.0, "mufu": 30.0, "product": 40.0, "shared": 50.0, "shared_bulk": 99.0}
    assert aot.Loop([product, "MUFU.EX2 R1, R2", wait]).bound(cycles) == ("shared", 50)
    assert aot.Loop([product, wait, "MUFU.EX2 R1, R2"]).bound(cycles) == ("product+mufu", 70)
    assert aot.Loop(["HMMA.16816.F32 R4, R8", wait, "MUFU.EX2 R1"]).bound(cycles) == ("shared", 50)


class Compiled:
    """Stand for a compiled kernel of 8 warps: shared memory and tensor memory are given."""

    def __init__(self, shared: int, **metadata):
        self.asm = {"cubin": b"", "ttgir": ""}
        self.metadata = types.SimpleNamespace(num_warps=8, shared=shared, **metadata)


@pytest.mark.parametrize("arch, shared, metadata, ctas", [
    (100, 1024, {"tmem_size": 256}, 2), (100, 1024, {"tmem_size": 512}, 1),      # 512 columns
    (100, 1024, {"tmem_size": 0}, 4), (90, 1024, {}, 4),                         # registers
    (90, 100 * 1024, {}, 2), (80, 100 * 1024, {}, 1),                            # 228 and 164 KB
    (89, 40 * 1024, {}, 2), (120, 99 * 1024, {}, 1), (86, 100 * 1024, {}, 0)])
def test_how_many_ctas_fit_on_an_sm(monkeypatch, arch, shared, metadata, ctas):
    """64 registers of 256 threads are a quarter of an SM's."""
    text = {"cuobjdump": "REG:64 STACK:0", "nvdisasm": SASS}
    monkeypatch.setattr(aot, "tool", lambda name, *args: text[name])
    row = aot.describe("attention", "case", arch, "_f", {}, Compiled(shared, **metadata))
    assert row["ctas"] == ctas and row["tmem"] == metadata.get("tmem_size", 0)


def test_a_producer_warp_feeds_the_loop_of_those_that_multiply(monkeypatch):
    """Of 12 warps 8 multiply; the last warpgroup is a producer, whose loop copies 0x400 bytes."""
    sass = SASS.replace("MOV R1, c", "MOV R7, 0x400 ;\n        /*0008*/ MOV R1, c").replace(
        "HMMA.16816.F32.BF16 R4, R8, R10, R4",
        "SYNCS.ARRIVE.TRANS64 RZ, [UR4], R7 ;\n        /*00a8*/ UTMALDG.3D [UR8], [UR6]")
    monkeypatch.setattr(aot, "tool", lambda name, *args: {"cuobjdump": "REG:64 STACK:0",
                                                          "nvdisasm": sass}[name])
    compiled = Compiled(1024)
    plain = aot.describe("attention", "case", 90, "_f", {}, compiled)
    compiled.metadata.num_warps = 12
    compiled.asm["ttgir"] = ("partition0(%a: i32 loc(unknown)) num_warps(4) {\n"
                             "partition1(%a: i32 loc(unknown)) num_warps(1) {\n")
    row = aot.describe("attention", "case", 90, "_f", {}, compiled)
    assert (plain["ctas"], row["ctas"]) == (4, 2)
    assert row["cycles_issue"] == plain["cycles_issue"] / 2 == 8 * 8 / 4 * 2
    assert plain["cycles_shared_bulk"] == 0 and row["cycles_shared_bulk"] == 2 * 0x400 / 128


def test_every_architecture_that_is_offered_is_described():
    assert aot.ARCHES == tuple(aot.GPUS) == (80, 86, 87, 89, 90, 100, 103, 120)
    for arch, gpu in aot.GPUS.items():
        large = arch in (80, 90, 100, 103)
        assert gpu.threads == (2048 if large else 1536) and gpu.registers == 64 * 1024
        assert gpu.shared // 1024 == {80: 164, 87: 164, 90: 228, 100: 228, 103: 228}.get(arch, 100)


def test_the_table_shows_every_row():
    text = aot.table([{"kernel": "a.b", "arch": 90, "registers": 7}, {"kernel": "c", "spills": 4}])
    assert len(text.splitlines()) == 3 and "a.b" in text and text.count("-") > 10


def test_the_interpreter_leaves_nothing_to_compile(monkeypatch):
    monkeypatch.setattr(aot.attention, "INTERPRET", True, raising=False)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        aot.compile_all([90], ["attention"])


# first_run.sh

@pytest.mark.slow
def test_a_part_of_the_first_run_that_reaches_its_limit_is_interrupted(tmp_path):
    """Its program ends as by Ctrl-C: pytest then prints the failures before the limit."""
    text = (ROOT / "kernels" / "first_run.sh").read_text()
    part = re.search(r"^part\(\).*?^}$", text, re.S | re.M)[0]
    (tmp_path / "test_two.py").write_text("import time\ndef test_one():\n    assert 0, 'early'\n"
                                          "def test_two():\n    time.sleep(60)\n")
    run = f'{part}\nout=$1\npart tests 20 "$2" -m pytest -q test_two.py'
    said = subprocess.run(["bash", "-c", run, "first_run", tmp_path, sys.executable], cwd=tmp_path,
                          capture_output=True, text=True, check=True).stdout
    assert said.startswith("tests: exit code 124")
    assert "AssertionError: early" in (tmp_path / "tests.txt").read_text()
