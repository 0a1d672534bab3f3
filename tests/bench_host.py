"""Time what a call of joint_attention costs the host before and after a change, in one process.

    python tests/bench_host.py --before ba23594

Both versions launch through Triton's driver and C launcher over tests/libcuda.c, which starts
nothing: the time of a call is that of Python, torch's dispatcher and the launcher. The versions
take turns, and the least CPU time of the thread over all rounds counts. In the backward pass
torch's small sums over partial results run on the CPU and count too.
"""
import argparse
import importlib.util
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import launch
import torch

ROOT = launch.ROOT


def load(source: str, name: str, folder: Path) -> ModuleType:
    """Import a kernel file as a module of its own, with operators of its own."""
    source = source.replace('"ladd::', f'"{name}::').replace('Library("ladd"', f'Library("{name}"')
    path = folder / f"{name}.py"
    path.write_text(source.replace("torch.ops.ladd", f"torch.ops.{name}"))
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def call(module: ModuleType, norms: bool, what: str) -> Callable[[], object]:
    """Return a call at sd3-medium's sizes at 1024 px, two samples."""
    def make(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, requires_grad=what != "no grad")

    qkv = [make(2, l, 3, 24, 64) for l in (154, 4096)]
    weights = [(make(64), make(64)) if norms else None for _ in qkv]
    if what != "backward":
        return lambda: module.joint_attention(*qkv, *weights)
    out = module.joint_attention(*qkv, *weights)
    leaves = [*qkv, *(w for pair in weights if pair for w in pair)]
    up = list(map(torch.empty_like, out))
    return lambda: torch.autograd.grad(out, leaves, up, retain_graph=True)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", required=True, metavar="REVISION",
                        help="of kernels/attention.py")
    parser.add_argument("--arch", type=int, default=90)
    parser.add_argument("--rounds", type=int, default=100)
    args = parser.parse_args(argv)
    show = ["git", "-C", str(ROOT), "show", f"{args.before}:kernels/attention.py"]
    old = subprocess.run(show, capture_output=True, text=True, check=True).stdout
    new = (ROOT / "kernels" / "attention.py").read_text()
    torch.set_num_threads(1)
    launch.install(args.arch)
    # Triton's own launcher, since the checks of the one in tests/launch.py would count
    launch.triton.runtime.driver.active.launcher_cls = launch.nvidia.CudaLauncher
    with tempfile.TemporaryDirectory() as folder:
        modules = [load(*version, Path(folder)) for version in ((old, "before"), (new, "after"))]
        for module in modules:
            module.ARCH = args.arch
        for norms in (False, True):
            for what in ("no grad", "forward", "backward"):
                calls = [call(module, norms, what) for module in modules]
                times = [[], []]
                for _ in range(3 + args.rounds):
                    for run, seen in zip(calls, times):
                        start = time.thread_time()
                        run()
                        seen.append(time.thread_time() - start)
                # the first rounds fill caches
                before, after = (1e6 * min(seen[3:]) for seen in times)
                print(f"{what:8} {'with' if norms else 'without'} norms: {before:.0f} -> "
                      f"{after:.0f} us, {before / after:.2f} times less", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
