"""Launch every kernel without a GPU: Triton's driver module and C launcher over tests/libcuda.c.

    python tests/launch.py --arch 90 120 --kernel heads --case training

The public functions of kernels.aot.cases() run forward and backward on CPU tensors that nobody
reads. Each launch passes what a first launch on a GPU passes: the launcher's arguments, the CUDA
driver's rules for tensor maps, grids and shared memory, 4 KB of parameters. A line is printed for
each case; the exit code is 1 where one cannot be launched. Other scripts call `install` for the
driver, for example to time a call on the host.
"""
import argparse
import atexit
import ctypes
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.nvidia import driver as nvidia

ROOT = Path(__file__).parents[1]
INCLUDE = Path(nvidia.__file__).parent / "include"
ARCHES = 80, 89, 90, 100, 120
BY_TMA = {"attention": (90, 100), "heads": (90, 100, 120)}    # who reads through tensor maps where
# Triton compiles kernels with more, but a driver older than R530 (CUDA 12.1) cannot launch them.
PARAMETER_BYTES = 4096
parameters: dict[str, int] = {}  # bytes, by the hash of the compiled kernel


def missing() -> str:
    """Return what the stand-in needs and this machine lacks, or nothing."""
    if not shutil.which("gcc"):
        return "gcc is not installed"
    return "" if (INCLUDE / "cuda.h").exists() else "Triton brings no cuda.h"


def build(folder: Path) -> Path:
    """Compile libcuda.c into `folder`, over any older copy."""
    folder.mkdir(parents=True, exist_ok=True)
    path, source = folder / "libcuda.so.1", Path(__file__).with_name("libcuda.c")
    partial = folder / f"libcuda.{os.getpid()}"    # renamed when complete: the folder is shared
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", f"-I{INCLUDE}", f"-Wl,-soname,{path.name}",
                    source, "-o", partial], check=True)
    return partial.replace(path)


def parameter_bytes(ptx: str) -> int:
    """Return the size of the parameters of the kernel, each at a multiple of its alignment."""
    entry = re.search(r"\.entry\s+[\w$]+\((.*?)\)", ptx, re.S)[1]
    # .param .u64 .ptr .global .align 1 x,   .param .align 64 .b8 y[128]
    parameter = r"\.param\s+(?:\.align\s+(\d+)\s+)?\.[a-z]+(\d+)[^,\[]*(?:\[(\d+)\])?"
    end = 0
    for align, bits, count in re.findall(parameter, entry):
        size = int(bits) // 8
        step = int(align or size)
        end = -(-end // step) * step + size * int(count or 1)
    return end


def _loaded(module, function, name: str, files: dict[str, str], digest: str) -> None:
    """Note the size of a kernel's parameters; Triton calls this when it loads one."""
    ptx, = (path for file, path in files.items() if file.endswith(".ptx"))
    parameters[digest] = parameter_bytes(Path(ptx).read_text())


def _descriptors(name: str, kind) -> Iterator[str]:
    """Name the tensor descriptors in an argument, in the order in which they are encoded."""
    if isinstance(kind, str):
        if kind.startswith("tensordesc"):
            yield name
        return
    for i, inner in enumerate(kind):
        yield from _descriptors(f"{name}[{i}]", inner)


class Counts(NamedTuple):
    """Count what the stand-in was asked."""
    launches: int
    maps: int


class StandIn:
    """Load the stand-in as a GPU; `lib` has its functions, `launches` and `maps` count calls."""

    def __init__(self, path: Path, arch: int):
        self.lib = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        # Triton's modules ask for this name, and get what was loaded first under it.
        if not hasattr(ctypes.CDLL(path.name), "standin_select"):
            raise RuntimeError(f"{path.name} must be the stand-in (got one that was loaded before)")
        if not self.lib.standin_select(arch):
            raise ValueError(f"arch must be one that libcuda.c knows (got {arch})")
        self.launches = ctypes.c_long.in_dll(self.lib, "standin_launches")
        self.maps = ctypes.c_long.in_dll(self.lib, "standin_maps")

    def counts(self) -> Counts:
        return Counts(self.launches.value, self.maps.value)


class Launcher(nvidia.CudaLauncher):
    """Launch as Triton does; name the kernel and the argument where that fails."""
    standin: StandIn

    def __init__(self, src, metadata):
        self.kernel, self.digest = metadata.name, metadata.hash
        self.descriptors = [path for name, kind in src.signature.items()
                            for path in _descriptors(name, kind)]
        try:
            super().__init__(src, metadata)
        except (AssertionError, KeyError, RuntimeError) as e:
            why = f"{type(e).__name__}: {e}"
            if nested := [name for name in self.descriptors if "[" in name]:
                why = f"{len(nested)} tensor descriptors inside tuples, {nested[0]} and others"
            raise RuntimeError(f"kernel {self.kernel}: arguments must be what the launcher of "
                               f"Triton {triton.__version__} takes (got {why})") from e

    def __call__(self, x: int, y: int, z: int, *args):
        if parameters[self.digest] > PARAMETER_BYTES:
            raise RuntimeError(f"kernel {self.kernel}: parameters must be at most "
                               f"{PARAMETER_BYTES} bytes (got {parameters[self.digest]}, with "
                               f"{len(self.descriptors)} tensor descriptors)")
        launches, maps = self.standin.launches.value, self.standin.maps.value
        try:
            super().__call__(x, y, z, *args)
        except RuntimeError as e:
            subject, encoded = f"kernel {self.kernel}", self.standin.maps.value - maps
            why = str(e).splitlines()[0].removeprefix("Triton Error [CUDA]: ")
            if encoded and self.standin.launches.value == launches:
                subject += f", argument {self.descriptors[encoded - 1]}"
            why = why.removeprefix(f"{subject}: ")      # the stand-in may have named the kernel
            raise RuntimeError(f"{subject}: {why}") from e
        if self.standin.launches.value == launches:
            # Triton multiplies the grid in 32 bits, and starts nothing unless that is positive.
            raise RuntimeError(f"kernel {self.kernel}: grid must have 1 to 2^31 - 1 blocks "
                               f"(got {x}, {y}, {z}; nothing was launched)")


class Driver(nvidia.CudaDriver):
    """Drive the one device of the stand-in as Triton does; ask nothing of torch.cuda."""

    def __init__(self, arch: int):
        self.utils = nvidia.CudaUtils()
        self.launcher_cls = Launcher
        self.get_current_device = lambda: 0
        self.set_current_device = lambda device: None
        self.get_current_stream = lambda device=None: 0
        self.get_device_capability = lambda device=None: divmod(arch, 10)


def install(arch: int, folder: Path | None = None) -> StandIn:
    """Make Triton launch over the stand-in for sm_<arch>, for the rest of this process.

    Call it before anything uses CUDA, then set ARCH of the kernels' modules to `arch` and call them
    with CPU tensors. `folder` keeps the stand-in and, where TRITON_CACHE_DIR is not set, Triton's
    cache; without one they lie in a temporary folder. Raises RuntimeError where the process cannot
    be used, ValueError for an architecture that libcuda.c does not know.
    """
    if os.environ.get("TRITON_INTERPRET"):
        raise RuntimeError(f"TRITON_INTERPRET must be unset (got {os.environ['TRITON_INTERPRET']})")
    if missing():
        raise RuntimeError(f"gcc and Triton's cuda.h must be there ({missing()})")
    if folder is None:
        folder = Path(tempfile.mkdtemp(prefix="launch-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    standin = StandIn(build(folder), arch)
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    os.environ.setdefault("TRITON_CACHE_DIR", str(folder / "cache"))
    Launcher.standin = standin
    triton.knobs.runtime.kernel_load_start_hook.add(_loaded)
    triton.runtime.driver.set_active(Driver(arch))
    return standin


def attempt(standin: StandIn, module: str, arch: int,
            run: Callable[[], None]) -> tuple[Counts, str]:
    """Run a case; return what it launched and, where it failed, why."""
    before, error = standin.counts(), ""
    try:
        run()
    except Exception as e:                     # whatever a user would see, and then the next case
        error = " ".join(f"{type(e).__name__}: {e}".split())
    counts = Counts(*(b - a for a, b in zip(before, standin.counts())))
    if not error and not counts.launches:
        error = "the case must launch kernels (got none)"
    if not error and arch in BY_TMA.get(module, ()) and not counts.maps:
        error = "the case must encode tensor maps (got none)"
    return counts, error


def launch_all(arch: int, modules: list[str], words: list[str], folder: Path | None) -> int:
    """Launch the chosen cases for one architecture, print them; return how many failed."""
    standin = install(arch, folder)
    sys.path.insert(0, str(ROOT))
    import torch

    from kernels import aot
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for kernels in aot.MODULES.values():
        kernels.ARCH = arch
    failed = done = 0
    for module, case, run in aot.cases(arch):
        if modules and module not in modules or words and not any(w in case for w in words):
            continue
        counts, error = attempt(standin, module, arch, run)
        done, failed = done + 1, failed + bool(error)
        print(f"sm_{arch} {module:10} {case:34} launches {counts.launches:2}, tensor maps "
              f"{counts.maps:3}  {'FAILED ' + error if error else 'ok'}", flush=True)
    print(f"sm_{arch}, Triton {triton.__version__}: {done} cases, {failed} cannot be launched; "
          f"parameters of a kernel up to {max(parameters.values(), default=0)} bytes")
    return failed or not done


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python tests/launch.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=[90])
    parser.add_argument("--kernel", nargs="+", default=[], help="modules; all without it")
    parser.add_argument("--case", nargs="+", default=[], metavar="WORD",
                        help="only cases with one of these in their names")
    parser.add_argument("--folder", type=Path, help="keep the stand-in and Triton's cache here")
    args = parser.parse_args(argv)
    if len(args.arch) == 1:
        return int(launch_all(args.arch[0], args.kernel, args.case, args.folder) > 0)
    # A process for each architecture: Triton keeps one driver, and one kernel for each device.
    options = ["--case", *args.case] if args.case else []
    options += ["--kernel", *args.kernel] if args.kernel else []
    options += ["--folder", str(args.folder)] if args.folder else []
    return max(subprocess.run([sys.executable, __file__, "--arch", str(arch), *options]).returncode
               for arch in args.arch)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
