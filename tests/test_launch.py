"""Every kernel can be launched: Triton's launcher over a stand-in for libcuda, which also refuses.

Under pytest Triton interprets, so that all launches run in other processes: tests/launch.py, and
this file for the launches that the stand-in must refuse.
"""
import ctypes
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
import launch  # noqa: E402
import triton.language as tl  # noqa: E402
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

MISSING = launch.missing()
pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING or "nothing is missing")
ARCH = 90           # of the launches below


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Hold the stand-in and Triton's cache for all processes of these tests."""
    return tmp_path_factory.mktemp("launch")


def run(*command: str | Path) -> subprocess.CompletedProcess:
    """Run a Python file without the settings that other tests make for Triton."""
    env = {k: v for k, v in os.environ.items()
           if not k.startswith("TRITON_") or k == "TRITON_CACHE_DIR"}
    return subprocess.run([sys.executable, *map(str, command)], cwd=launch.ROOT, text=True,
                          env=env | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True)


def check(folder: Path, *options: str) -> None:
    """Launch the chosen cases; fail with the lines of those that cannot be launched."""
    done = run("tests/launch.py", "--folder", folder, *options)
    failed = [line for line in done.stdout.splitlines() if "FAILED" in line]
    assert done.returncode == 0, "\n".join(failed) or done.stdout + done.stderr[-3000:]


# The kernels. The fast tests have time to compile one case, which goes through tensor maps.

def test_a_case_of_attention_can_be_launched(launched):
    said, _ = launched
    assert len(said) == 2 and "0 cannot be launched" in said[1], said


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_every_case_can_be_launched(folder, arch):
    check(folder, "--arch", str(arch))


@pytest.mark.slow
@pytest.mark.parametrize("arch", sorted({*launch.ARCHES} - {80, 90, 100}))
def test_training_can_be_launched(folder, arch):
    """These load through pointers as sm_80 does, with less shared memory; `python tests/launch.py
    --arch 89 120` launches the other cases too."""
    check(folder, "--arch", str(arch), "--case", "training", "24 taps", "width 1536")


@pytest.mark.parametrize("ptx, size", [
    ("", 0), (".param .u32 a,\n.param .u64 .ptr .global .align 1 b", 16),
    (".param .u64 a,\n.param .align 64 .b8 b[128],\n.param .u16 c", 194)])
def test_parameters_are_counted_with_their_alignment(ptx, size):
    assert launch.parameter_bytes(f".visible .entry f(\n{ptx}\n)\n.reqntid 128\n") == size


# The stand-in refuses what the driver refuses: through Triton where Triton lets it pass

@triton.jit
def _copy(x, y, N: tl.constexpr):
    tl.store(y + tl.arange(0, N), tl.load(x + tl.arange(0, N)))


@triton.jit
def _copy_tile(tile, y, M: tl.constexpr, N: tl.constexpr):
    at = tl.arange(0, M)[:, None] * N + tl.arange(0, N)
    tl.store(y + at, tile.load([0, 0]))


@triton.jit
def _many(values, y):
    tl.store(y, values[0])


@triton.jit
def _product(a, b, out, steps, M: tl.constexpr, K: tl.constexpr):
    row, col = tl.arange(0, M)[:, None], tl.arange(0, K)
    total = tl.zeros((M, M), tl.float32)
    for _ in range(steps):
        total = tl.dot(tl.load(a + row * K + col), tl.trans(tl.load(b + row * K + col)), total)
        a += M * K
        b += M * K
    tl.store(out + row * M + tl.arange(0, M), total)


def grid(*blocks: int) -> None:
    """Launch a copy of 64 numbers in each block."""
    _copy[blocks](torch.empty(64), torch.empty(64), 64)


def tile(offset: int = 0, **changes) -> None:
    """Launch a copy of a tile whose descriptor changes after Triton has checked it."""
    x = torch.empty(65, 64, dtype=torch.bfloat16)
    descriptor = TensorDescriptor(x, [64, 64], [64, 1], [64, 64])
    descriptor.base = x.flatten()[offset:]
    for name, value in changes.items():
        setattr(descriptor, name, value)
    _copy_tile[1,](descriptor, x, 64, 64)


def many(count: int) -> None:
    """Launch a kernel with `count` parameters of 8 bytes, and three pointers."""
    _many[1,]((2 ** 40,) * count, torch.empty(1))


def product(stages: int) -> None:
    """Launch a product that keeps 64 KB a stage in shared memory."""
    a = torch.empty(8, 128, 128, dtype=torch.bfloat16)
    _product[1,](a, a, torch.empty(128, 128), 8, 128, 128, num_warps=8, num_stages=stages)


class Config(ctypes.Structure):
    """Lay out CUlaunchConfig."""
    _fields_ = [("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3),
                ("shared", ctypes.c_uint), ("stream", ctypes.c_void_p),
                ("attributes", ctypes.c_void_p), ("attribute_count", ctypes.c_uint)]


def call(name: str, *args) -> None:
    """Call a function of the stand-in, raise what it refuses."""
    lib, text = launch.Launcher.standin.lib, ctypes.c_char_p()
    if code := getattr(lib, name)(*args):
        lib.cuGetErrorString(code, ctypes.byref(text))
        raise RuntimeError(text.value.decode())


def start(block: int = 128, shared: int = 0, allow: int = 0, cluster: int = 0) -> None:
    """Launch 32 blocks of a kernel k, with one launch attribute at most."""
    function = ctypes.c_void_p()
    call("cuModuleGetFunction", ctypes.byref(function), None, b"k")
    if allow:
        call("cuFuncSetAttribute", function, 8, allow)              # MAX_DYNAMIC_SHARED_SIZE_BYTES
    attribute = (ctypes.c_uint * 18)(4, 0, cluster, 1, 1)           # CLUSTER_DIMENSION
    config = Config((32, 1, 1), (block, 1, 1), shared, None, ctypes.addressof(attribute),
                    int(cluster > 0))
    call("cuLaunchKernelEx", ctypes.byref(config), function, None, None)


def encode(dims=(64, 1, 32, 2), strides=(16, 128, 4096), box=(64, 1, 32, 1), step: int = 1,
           kind: int = 9, swizzle: int = 3, interleave: int = 0, base: int = 4096) -> None:
    """Encode a tensor map, the innermost dimension first; the defaults are a legal map of bf16."""
    wide, narrow = ctypes.c_uint64 * 6, ctypes.c_uint32 * 6
    call("cuTensorMapEncodeTiled", ctypes.c_void_p(4096), kind, len(dims), ctypes.c_void_p(base),
         wide(*dims), wide(*strides), narrow(*box), narrow(*[step] * 6), interleave, swizzle, 0, 0)


def on(arch: int, function, *args, **options) -> None:
    """Call the function with the stand-in as another GPU."""
    launch.Launcher.standin.lib.standin_select(arch)
    function(*args, **options)


# what is launched, and what the error says; None where there must be none
LAUNCHES = [
    ("grid(2, 65535, 1)", None),
    ("grid(1, 70000, 1)", r"kernel _copy: grid y must be 1 to 65535 \(got 70000\)"),
    ("grid(1, 1, 70000)", r"kernel _copy: grid z must be 1 to 65535 \(got 70000\)"),
    ("grid(4, 0, 1)", r"kernel _copy: grid must have .* \(got 4, 0, 1; nothing was launched\)"),
    ("grid(2 ** 17, 2 ** 14, 1)", r"grid must have 1 to 2\^31 - 1 blocks \(got 131072, 16384, 1"),
    ("tile()", None),
    ("tile(offset=1)", "kernel _copy_tile, argument tile: .*base must be a multiple of 16"),
    ("tile(strides=[12, 1])", r"argument tile: .* 1 must be a multiple of 16 .* \(got 24\)"),
    ("tile(strides=[32, 1])", r"argument tile: .*at least the 128 bytes of what .* \(got 64\)"),
    ("many(500)", None),
    ("many(512)", r"kernel _many: parameters must be at most 4096 bytes \(got 4120, with 0 tensor"),
    ("product(3)", None),
    ("product(5)", "out of resource: shared memory.* 232448"),
    ("encode()", None),
    ("on(89, encode)", r"tensor map must be for sm_90 or later \(got sm_89\)"),
    ("encode(base=0)", "base must be a multiple of 16, not null"),
    ("encode(box=(64, 257, 1, 1))", r"box 1 must be 1 to 256 \(got 257\)"),
    ("encode(box=(64, 0, 1, 1))", r"box 1 must be 1 to 256 \(got 0\)"),
    ("encode(box=(4, 1, 32, 1))", r"inner box must be a multiple of 16 bytes \(got 8\)"),
    ("encode(swizzle=1)", r"inner box must be at most the 32 bytes of its swizzle \(got 128\)"),
    ("encode(dims=(64, 2 ** 32 + 1, 1, 1))", r"dimension 1 must be 1 to 2\^32 \(got 4294967297\)"),
    ("encode(dims=(64, 1, 0, 1))", r"dimension 2 must be 1 to 2\^32 \(got 0\)"),
    ("encode(dims=(8, 8, 8, 8, 8, 8), strides=(16,) * 5)", r"rank must be 1 to 5 \(got 6\)"),
    ("encode(strides=(16, 128, 2 ** 40))", r"dimension 3 must be a multiple .* below 2\^40"),
    ("encode(dims=(64, 8, 2, 1), strides=(256, 2176, 16))", r"multiple of the inner stride of 256"),
    ("encode(step=9)", r"element stride 0 must be 1 to 8 \(got 9\)"),
    ("encode(interleave=1)", r"interleave must be none, 0 \(got 1\)"),
    ("encode(kind=13)", r"data type must be one of whole bytes, 0 to 12 \(got 13\)"),
    ("start(shared=232448, allow=232448)", None),
    ("start(shared=49152)", None),
    ("start(shared=49153)", r"kernel k: shared memory must be at most the 49152 .* \(got 49153\)"),
    ("start(allow=232449)", r"kernel k: shared memory must be at most 232448 bytes on sm_90 \(got"),
    ("on(120, start, allow=101377)", "at most 101376 bytes on sm_120"),
    ("on(80, start, allow=166913)", "at most 166912 bytes on sm_80"),
    ("start(block=1056)", r"kernel k: block must be 1 to 1024 threads \(got 1056\)"),
    ("start(cluster=8)", None),
    ("start(cluster=16)", r"kernel k: cluster must be 1 to 8 blocks \(got 16\)"),
    ("start(cluster=5)", r"kernel k: grid must be a multiple of its cluster \(got 32, 1, 1 by 5"),
    ("on(89, start, cluster=2)", r"launch attribute 4 must be used from sm_90 on \(got sm_89\)"),
]


@pytest.fixture(scope="module")
def launched(folder) -> tuple[list[str], dict[str, str | None]]:
    """Return what tests/launch.py prints of a case, and the error of each of LAUNCHES."""
    done = run("tests/test_launch.py", folder)
    assert done.returncode == 0, done.stderr[-3000:]
    *said, errors = done.stdout.splitlines()
    return said, json.loads(errors)


@pytest.mark.parametrize("expression, expected", LAUNCHES)
def test_the_stand_in_fails_where_the_driver_fails(launched, expression, expected):
    error = launched[1][expression]
    assert error is None if expected is None else re.search(expected, error or ""), error


def main(folder: str) -> None:
    """Launch a case of attention; print the error of each of LAUNCHES as JSON, null where there was
    none."""
    launch.launch_all(ARCH, ["attention"], ["image only"], Path(folder))
    standin = launch.Launcher.standin
    errors: dict[str, str | None] = {}
    for expression, _ in LAUNCHES:
        standin.lib.standin_select(ARCH)
        try:
            eval(expression)
            errors[expression] = None
        except (RuntimeError, triton.runtime.errors.OutOfResources) as e:
            errors[expression] = " ".join(str(e).split())
    print(json.dumps(errors))


if __name__ == "__main__":
    main(sys.argv[1])
