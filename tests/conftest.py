"""Shared by the tests: one thread, a seed, tiny networks with every weight drawn, one table of
tolerances, machine code, and scripts and ranks without new interpreters."""
import contextlib
import io
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

# before triton is imported: kernels run on the CPU, but where the tests for a GPU are asked for by
# name
if "gpu" not in " ".join(sys.argv):
    os.environ["TRITON_INTERPRET"] = "1"

import kernels
from ladd.core.mmdit import MMDiT, MMDiTConfig

os.fsync = lambda file: None    # tests kill processes, not the machine; a disk takes milliseconds
torch.set_num_threads(1)    # results and run time do not depend on the machine's cores

ROOT = Path(__file__).parents[1]
TINY = dict(depth=3, width=128, context_dim=24, pooled_dim=20, in_channels=4, out_channels=4,
            pos_grid=12)
VARIANTS = {"plain": {}, "qk_norm": dict(qk_norm=True),
            "dual": dict(qk_norm=True, dual_blocks=(0, 1))}
# max |a - b| over max |b|
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2}


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes seconds that the suite cannot spare; .ci/run "
                            "runs it")
    config.addinivalue_line("markers", "gpu: needs a GPU")
    # both run by name: -m slow, -m gpu
    config.option.markexpr = config.option.markexpr or "not slow and not gpu"


def patch_language_once() -> None:
    """Make Triton's interpreter replace its language once a launch, not in each call of a function
    within a kernel, which takes a third of its time and changes nothing."""
    try:
        from triton import language
        from triton.runtime import interpreter
        patch = interpreter._patch_lang
    except (ImportError, AttributeError):
        return
    replaced: set[frozenset] = set()        # sets of modules, in this launch

    def patched(function):
        modules = frozenset(id(value) for value in function.__globals__.values()
                            if value is language or value is language.core)
        if modules in replaced:
            return None                     # of a call, which restores nothing
        replaced.add(modules)
        scope = patch(function)
        restore = scope.restore
        scope.restore = lambda: (replaced.clear(), restore())
        return scope
    interpreter._patch_lang = patched


patch_language_once()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# to import torch takes a new process seconds

def script(name: str, folder: Path, *argv: str) -> subprocess.CompletedProcess:
    """Run a script of the root, or a module, in `folder` as `python` and `python -m` do, but in
    this process."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (contextlib.chdir(folder), contextlib.redirect_stdout(out),
          contextlib.redirect_stderr(err), mock.patch.object(sys, "argv", [name, *argv]),
          warnings.catch_warnings(action="ignore", category=RuntimeWarning)):   # imported already
        try:
            if name.endswith(".py"):
                runpy.run_path(str(ROOT / name), run_name="__main__")
            else:
                runpy.run_module(name, run_name="__main__")
        except SystemExit as end:
            code = end.code
    return subprocess.CompletedProcess([name, *argv], code, out.getvalue(), err.getvalue())


def fork(run: Callable[[], object], output: Path, **environment: str) -> int:
    """Call run() in a copy of this process, which writes what it prints to `output`; return its
    number. It exits with 0, with 1 after an error, or as run() says."""
    sys.stdout.flush(), sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.environ.update(environment)
        sys.stdout = sys.stderr = output.open("w", buffering=1)
        os.dup2(sys.stdout.fileno(), 1), os.dup2(sys.stdout.fileno(), 2)
        run()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def has_ended(process: int) -> bool:
    return os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def begin_ranks(count: int, run: Callable[[], object], folder: Path) -> dict[int, Path]:
    """Call run() in `count` processes as torchrun would start them; return where each writes what
    it prints, by its number."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    outputs = [folder / f"rank{rank}-{port}.txt" for rank in range(count)]
    return {fork(run, path, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count),
                 MASTER_ADDR="127.0.0.1", MASTER_PORT=port): path
            for rank, path in enumerate(outputs)}


def end_ranks(started: dict[int, Path], limit: float = 600) -> list[tuple[int, str]]:
    """Wait for processes; return (exit code, output) of each. End what is left at the limit, in
    seconds."""
    done, last = [], time.monotonic() + limit
    for pid, output in started.items():
        while not has_ended(pid) and time.monotonic() < last:
            time.sleep(0.02)
        if not has_ended(pid):
            os.kill(pid, signal.SIGKILL)
        done.append((os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), output.read_text()))
    return done


def run_ranks(count: int, run: Callable[[], object], folder: Path) -> str:
    """Call run() in `count` processes, which must end with code 0; return what they print."""
    done = end_ranks(begin_ranks(count, run, folder))
    assert not any(code for code, _ in done), "\n".join(text[-3000:] for _, text in done)
    return "".join(text for _, text in done)


def compiler(*command: str | Path) -> str:
    """Return what a Python command prints where Triton compiles: without the interpreter."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, env=env, text=True,
                          capture_output=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="session")
def machine_code(tmp_path_factory) -> tuple[list[dict], str]:
    """Run python -m kernels.aot for three architectures; return the rows and what it prints."""
    path = tmp_path_factory.mktemp("aot") / "aot.json"
    said = compiler("-m", "kernels.aot", "--arch", "80", "90", "100", "--json", path)
    return json.loads(path.read_text()), said


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def assert_close(name: str, actual: Tensor, expected: Tensor, tol: float | None = None) -> None:
    """Values agree within `tol` (default: the dtype's) of the largest expected one; else says where
    not."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype, (
        f"{name}: {tuple(actual.shape)} {actual.dtype}, "
        f"expected {tuple(expected.shape)} {expected.dtype}")
    if not expected.numel():
        return
    a, e = actual.detach().double(), expected.detach().double()
    diff, scale = (a - e).abs(), e.abs().max().clamp_min(1e-300)
    worst = tuple(int(i) for i in torch.unravel_index(diff.argmax(), diff.shape))
    ratio = diff.square().mean().sqrt() / e.square().mean().sqrt().clamp_min(1e-300)
    limit = TOLERANCE[expected.dtype] if tol is None else tol
    assert diff.max() <= limit * scale, \
        f"{name}: max abs {diff.max():.3g}, RMSE ratio {ratio:.3g}, worst at {worst}"


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Adds noise to every parameter and buffer: no zero or symmetry of the initialisation hides a
    swap."""
    g = rng(seed)
    with torch.no_grad():
        for t in [*module.parameters(), *module.buffers()]:
            t.add_((0.3 if t.ndim < 2 else 0.05) * torch.randn(t.shape, generator=g))
    return module


def tiny(variant: str = "plain", dtype: torch.dtype = torch.float64, seed: int = 0,
         ops: kernels.Kernels | None = None, **changes) -> MMDiT:
    """A randomised MMDiT of two heads that computes in `dtype`, on the references unless `ops` are
    given."""
    torch.manual_seed(seed)
    config = MMDiTConfig(**{**TINY, **VARIANTS[variant], **changes})
    return randomise(MMDiT(config, ops or kernels.load("torch"), compute_dtype=dtype),
                     seed).to(dtype)


def tiny_inputs(b: int = 2, h: int = 6, w: int = 10, l: int = 5, dtype: torch.dtype = torch.float64,
                seed: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x, sigma, context, pooled) for a `tiny` network; latents are not square, levels no round
    numbers."""
    g = rng(seed)
    x, context, pooled = (torch.randn(s, generator=g).to(dtype) for s
                          in ((b, 4, h, w), (b, l, 24), (b, 20)))
    return x, (torch.rand(b, generator=g) * 0.9 + 0.05).to(dtype), context, pooled
