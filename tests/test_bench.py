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


def test_a_call_that_waits_for_the_gpu_is_refused(monkeypatch):
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
    assert names == {(*work, c) for work in done for c in ("ours", "eager", "compile")}
    for row in rows:
        assert float(row["ms_20"]) <= float(row["ms"]) <= float(row["ms_80"])
        assert row["gpu"] == "cpu" and row["host_ms"] == row["ms"]
        products = row["kernel"] in ("attention", "heads")
        assert bool(row["tflops"]) == products and bool(row["copy_share"]) == (not products)
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", row["date"]) and row["torch"] == torch.__version__


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_bench_says_that_it_needs_a_gpu():
    done = subprocess.run([sys.executable, "-m", "kernels.bench"], cwd=ROOT, capture_output=True,
                          text=True)
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


def test_cycles_of_a_loop():
    first, second = aot.loops(SASS)
    # 8 warps of one CTA: two warpgroups; a product is 2 * 64 * 128 * 16 operations, an SM does 4096 a clock
    assert first.cycles(aot.GPUS[90], 8, 1) == {
        "issue": 8 * 8 / 4, "mufu": 2 * 8 * 32 / 16, "product": 2 * 2 * (2 * 64 * 128 * 16) / 4096,
        "shared": 8 * 512 / 128}
    assert first.cycles(aot.GPUS[90], 8, 2)["product"] == 2 * first.cycles(aot.GPUS[90], 8, 1)["product"]
    assert second.cycles(aot.GPUS[80], 4, 1)["product"] == 4 * 2 * 16 * 8 * 16 / 2048


def test_the_table_shows_every_row():
    text = aot.table([{"kernel": "a.b", "arch": 90, "registers": 7}, {"kernel": "c", "spills": 4}])
    assert len(text.splitlines()) == 3 and "a.b" in text and text.count("-") > 10


def test_the_interpreter_leaves_nothing_to_compile(monkeypatch):
    monkeypatch.setattr(aot.attention, "INTERPRET", True, raising=False)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        aot.compile_all([90], ["attention"])
