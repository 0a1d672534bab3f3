"""kernels/bench.py and the reader of machine code in kernels/aot.py, without a GPU."""
import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels import aot, bench

ROOT = Path(__file__).parents[1]


# bench

def test_quantiles():
    assert bench.quantiles([5, 1, 2, 4, 3]) == (2, 3, 4)
    assert bench.quantiles([7.0]) == (7, 7, 7) and bench.quantiles(list(range(100))) == (20, 49.5, 79)


def test_every_round_calls_each_once_in_an_order_of_its_own():
    calls: list[str] = []
    contenders = {name: lambda name=name: calls.append(name) for name in "abcd"}
    times = bench.measure(contenders, 10, torch.empty(4))
    assert {name: len(t) for name, t in times.items()} == dict.fromkeys("abcd", 10)
    rounds = [tuple(calls[i:i + 4]) for i in range(0, len(calls), 4)]
    assert all(sorted(r) == list("abcd") for r in rounds) and len(set(rounds)) > 5


def test_a_wrong_kernel_is_not_timed():
    x = torch.randn(64)
    plain = lambda t: t * 2
    bench.check("double", lambda t: t * 2 + 1e-9, plain, (x,), (2 * x.double(),))
    for wrong in (lambda t: t * 2.01, lambda t: t * float("nan")):
        with pytest.raises(SystemExit, match="double is wrong"):
            bench.check("double", wrong, plain, (x,), (2 * x.double(),))


def test_a_library_attention_is_the_joint_one():
    qkv = [torch.randn(2, l, 3, 2, 64) for l in (5, 9)]
    norms = [tuple(torch.randn(64) for _ in range(2)) for _ in qkv]
    run = bench.library_attention(torch.nn.functional.scaled_dot_product_attention)
    for pair in (norms, (None, None)):
        found, expected = run(*qkv, *pair), bench.attention.reference_joint_attention(*qkv, *pair)
        assert all(torch.allclose(a, e, atol=1e-5) for a, e in zip(found, expected))


@pytest.mark.slow
def test_smoke_writes_a_row_for_each_contender(tmp_path):
    """On the CPU, under the interpreter: the file that a GPU would leave, with times that mean nothing."""
    command = [sys.executable, "-m", "kernels.bench", "--smoke", "--model", "sd3.5-medium", "--batch", "1",
               "--rounds", "2", "--out", str(tmp_path / "o.csv")]
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = list(csv.DictReader((tmp_path / "o.csv").open()))
    names = {(r["kernel"], r["direction"], r["contender"]) for r in rows}
    done = [*((k, d) for k in ("attention", "modulate", "gate_modulate") for d in ("forward", "backward")),
            *(("heads", d) for d in ("forward", "features", "weights"))]
    assert names == {(*work, c) for work in done for c in ("ours", "eager", "compile")}
    for row in rows:
        assert row["gpu"] == "cpu" and float(row["ms_20"]) <= float(row["ms"]) <= float(row["ms_80"])
        assert bool(row["tflops"]) == (row["kernel"] in ("attention", "heads")) != bool(row["copy_share"])
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", row["date"]) and row["torch"] == torch.__version__


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_bench_says_that_it_needs_a_gpu():
    done = subprocess.run([sys.executable, "-m", "kernels.bench"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and re.fullmatch(r"bench: found no CUDA device.*\n", done.stderr)


def test_lower_computes_products_in_the_lower_precision():
    x, cpu = torch.randn(64, 64), torch.device("cpu")
    exact, low = torch.mm(x, x), bench.lower(torch.mm, cpu, torch.bfloat16)(x, x)
    assert low.dtype == torch.bfloat16 and torch.equal(bench.lower(torch.mm, cpu, torch.float32)(x, x), exact)


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
