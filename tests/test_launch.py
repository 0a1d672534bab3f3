"""Every kernel can be launched: Triton's real launcher over a stand-in for libcuda, which can also refuse.

Under pytest Triton interprets; all that launches runs in other processes: tests/launch.py, and this file for
the launches that the stand-in must refuse.
"""
import ctypes
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
import launch  # noqa: E402
import triton.language as tl  # noqa: E402
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

pytestmark = pytest.mark.skipif(bool(launch.missing()), reason=launch.missing() or "nothing is missing")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The stand-in and Triton's cache, for all processes of these tests."""
    return tmp_path_factory.mktemp("launch")


def run(*command: str | Path) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")} | {"CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([sys.executable, *map(str, command)], cwd=launch.ROOT, env=env, capture_output=True,
                          text=True)


def launched(folder: Path, *options: str) -> None:
    done = run("tests/launch.py", "--folder", folder, *options)
    assert done.returncode == 0, "\n".join(line for line in done.stdout.splitlines() if "FAILED" in line) or \
        done.stderr[-3000:]


# the kernels

@pytest.mark.parametrize("module, case", [("modulation", "1536"), ("attention", "image only")])
def test_a_case_of_the_kernel_is_launched(folder, module, case):
    launched(folder, "--arch", "90", "--kernel", module, "--case", case)


@pytest.mark.slow
@pytest.mark.parametrize("module", ("attention", "heads", "modulation"))
@pytest.mark.parametrize("arch", launch.ARCHES)
def test_every_case_is_launched(folder, arch, module):
    launched(folder, "--arch", str(arch), "--kernel", module)


# the stand-in refuses what the driver refuses: through Triton where its own checks let it pass

ARCH = 90


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


def copy(*grid: int) -> None:
    _copy[grid](torch.empty(64), torch.empty(64), 64)


def tile(offset: int = 0, **changes) -> None:
    """Launch a copy of a tile whose descriptor changes after Triton has checked it."""
    x = torch.empty(65, 64, dtype=torch.bfloat16)
    descriptor = TensorDescriptor(x, [64, 64], [64, 1], [64, 64])
    descriptor.base = x.flatten()[offset:]
    for name, value in changes.items():
        setattr(descriptor, name, value)
    _copy_tile[1,](descriptor, x, 64, 64)


def product(stages: int) -> None:
    a = torch.empty(8, 128, 128, dtype=torch.bfloat16)
    _product[1,](a, a, torch.empty(128, 128), 8, 128, 128, num_warps=8, num_stages=stages)


class Config(ctypes.Structure):
    """CUlaunchConfig."""
    _fields_ = [*((f"{kind}{axis}", ctypes.c_uint) for kind in ("grid", "block") for axis in "xyz"),
                ("shared", ctypes.c_uint), ("stream", ctypes.c_void_p), ("attributes", ctypes.c_void_p),
                ("count", ctypes.c_uint)]


def checked(lib: ctypes.CDLL, code: int) -> None:
    text = ctypes.c_char_p()
    lib.cuGetErrorString(code, ctypes.byref(text))
    if code:
        raise RuntimeError(text.value.decode())


def start(lib: ctypes.CDLL, block: int = 128, shared: int = 0, allowed: int = 0, attribute: int = 0,
          cluster: int = 0, arch: int = ARCH) -> None:
    """Call cuLaunchKernelEx for a kernel k, with one launch attribute at most."""
    function = ctypes.c_void_p()
    checked(lib, lib.cuModuleGetFunction(ctypes.byref(function), None, b"k"))
    lib.standin_select(arch)
    if allowed:
        checked(lib, lib.cuFuncSetAttribute(function, 8, allowed))     # MAX_DYNAMIC_SHARED_SIZE_BYTES
    values = (ctypes.c_uint * 18)(attribute, 0, cluster, 1, 1)         # CUlaunchAttribute: id, padding, value
    config = Config(32, 1, 1, block, 1, 1, shared, None, ctypes.addressof(values), int(attribute > 0))
    checked(lib, lib.cuLaunchKernelEx(ctypes.byref(config), function, None, None))


def encode(lib: ctypes.CDLL, dims=(64, 1, 32, 2), strides=(16, 128, 4096), box=(64, 1, 32, 1), step=1, kind=9,
           swizzle=3, interleave=0, base=4096, arch=ARCH) -> None:
    """Call cuTensorMapEncodeTiled; the defaults are a legal map of bf16, innermost dimension first."""
    lib.standin_select(arch)
    rank = len(dims)
    array = lambda type_, values: (type_ * len(values))(*values)
    checked(lib, lib.cuTensorMapEncodeTiled(
        ctypes.c_void_p(4096), kind, rank, ctypes.c_void_p(base), array(ctypes.c_uint64, dims),
        array(ctypes.c_uint64, strides), array(ctypes.c_uint32, box), array(ctypes.c_uint32, [step] * rank),
        interleave, swizzle, 0, 0))


# name: what is launched, and what the error must say; nothing for a launch that must pass
LAUNCHES: dict[str, tuple[Callable[[ctypes.CDLL], None], str]] = {
    "a copy": (lambda lib: copy(2, 65535, 1), ""),
    "a grid of 70000 in y": (lambda lib: copy(1, 70000, 1),
                             r"kernel _copy: grid y must be 1 to 65535 \(got 70000\)"),
    "a grid of 70000 in z": (lambda lib: copy(1, 1, 70000), "kernel _copy: grid z must be 1 to 65535"),
    "an empty grid": (lambda lib: copy(4, 0, 1), r"kernel _copy: grid must .* \(got 4, 0, 1; nothing"),
    "a grid of 2^31 blocks": (lambda lib: copy(2 ** 17, 2 ** 14, 1), "kernel _copy: grid must have 1 to 2"),
    "a tile": (lambda lib: tile(), ""),
    "a misaligned base": (lambda lib: tile(offset=1),
                          "kernel _copy_tile, argument tile: base must be a multiple of 16"),
    "a stride of 24 bytes": (lambda lib: tile(strides=[12, 1]),
                             r"argument tile: stride of dimension 1 must be a multiple of 16 .*\(got 24\)"),
    "a stride inside the row": (lambda lib: tile(strides=[32, 1]),
                                r"argument tile: .* at least the 128 bytes of what lies inside it \(got 64\)"),
    "1000 bytes of parameters": (lambda lib: _many[1,]((2 ** 40,) * 120, torch.empty(1)), ""),
    "4 KB of parameters": (lambda lib: _many[1,]((2 ** 40,) * 520, torch.empty(1)),
                           r"kernel _many: parameters must be at most 4096 bytes \(got 4184, 0 tensor"),
    "shared memory in three stages": (lambda lib: product(3), ""),
    "shared memory in five stages": (lambda lib: product(5), r"out of resource: shared memory.*: 232448"),
    "a legal map": (lambda lib: encode(lib), ""),
    "a map of sm_89": (lambda lib: encode(lib, arch=89), r"must be for sm_90 or later \(got sm_89\)"),
    "a map of nothing": (lambda lib: encode(lib, base=0), "base must be a multiple of 16, not null"),
    "a box of 257": (lambda lib: encode(lib, box=(64, 257, 1, 1)), r"box 1 must be 1 to 256 \(got 257\)"),
    "a box of 0": (lambda lib: encode(lib, box=(64, 0, 1, 1)), "box 1 must be 1 to 256"),
    "a dimension over 2^32": (lambda lib: encode(lib, dims=(64, 2 ** 32 + 1, 1, 1)), "dimension 1 must be 1 to"),
    "an empty dimension": (lambda lib: encode(lib, dims=(64, 1, 0, 1)), "dimension 2 must be 1 to"),
    "a stride of 2^40": (lambda lib: encode(lib, strides=(16, 128, 2 ** 40)), r"dimension 3 .* below 2\^40"),
    "a stride between rows": (lambda lib: encode(lib, dims=(64, 8, 32, 1), strides=(256, 2176, 4096)),
                              r"dimension 2 must be a multiple of the inner stride of 256 .*\(got 2176\)"),
    "an element stride of 9": (lambda lib: encode(lib, step=9), "element stride 0 must be 1 to 8"),
    "an inner box of 8 bytes": (lambda lib: encode(lib, box=(4, 1, 32, 1)), r"multiple of 16 bytes \(got 8\)"),
    "an inner box over its swizzle": (lambda lib: encode(lib, swizzle=1), r"the 32 bytes of its swizzle \(got"),
    "a rank of 6": (lambda lib: encode(lib, dims=(64,) * 6, strides=(128,) * 5, box=(8,) * 6), "rank must be"),
    "an interleaved map": (lambda lib: encode(lib, interleave=1), "interleave must be none"),
    "a packed data type": (lambda lib: encode(lib, kind=13), "data type must be one of"),
    "227 KB of shared memory": (lambda lib: start(lib, shared=232448, allowed=232448), ""),
    "48 KB that nobody allowed": (lambda lib: start(lib, shared=49153),
                                  r"kernel k: dynamic shared memory .* the 49152 bytes .*\(got 49153\)"),
    "100 KB of sm_120": (lambda lib: start(lib, allowed=101377, arch=120), "at most 101376 bytes on sm_120"),
    "164 KB of sm_80": (lambda lib: start(lib, allowed=166913, arch=80), "at most 166912 bytes on sm_80"),
    "a block of 1056": (lambda lib: start(lib, block=1056), r"block must be 1 to 1024 threads \(got 1056\)"),
    "a cluster of 8": (lambda lib: start(lib, attribute=4, cluster=8), ""),
    "a cluster of 16": (lambda lib: start(lib, attribute=4, cluster=16), r"1 to 8 blocks \(got 16\)"),
    "a cluster that splits the grid": (lambda lib: start(lib, attribute=4, cluster=5), "multiple of its cluster"),
    "a cluster of sm_89": (lambda lib: start(lib, attribute=4, cluster=2, arch=89), "from sm_90 on"),
}


@pytest.fixture(scope="module")
def answers(folder) -> dict[str, str]:
    done = run("tests/test_launch.py", folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", LAUNCHES)
def test_the_stand_in_refuses_what_the_driver_refuses(answers, name):
    expected = LAUNCHES[name][1]
    assert re.search(expected, answers[name]) if expected else answers[name] == ""


def main(folder: str) -> None:
    """Print the error of each of LAUNCHES as JSON; an empty text where there was none."""
    standin, found = launch.install(ARCH, Path(folder)), {}
    for name, (function, _) in LAUNCHES.items():
        standin.lib.standin_select(ARCH)
        try:
            function(standin.lib)
            found[name] = ""
        except (RuntimeError, triton.runtime.errors.OutOfResources) as e:
            found[name] = " ".join(str(e).split())
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
