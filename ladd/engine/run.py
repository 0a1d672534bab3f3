"""The run folder and its log, signals, health checks, device and versions."""
import json
import math
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ladd.cli import InputError, must
from ladd.data.files import locked, read_json, write_json, write_text, writing
from ladd.engine.parallel import Norms, any_rank, env_number, ranks


def pick_device(name: str) -> torch.device:
    """Return the device called auto, cpu or cuda; auto is CUDA if there is a GPU. Under torchrun
    each process of a machine gets its own GPU, which becomes the current one."""
    gpu = torch.cuda.is_available()
    must(gpu or name != "cuda", "--device must be cpu or auto without a CUDA device (got cuda)")
    if name == "cpu" or not gpu:
        return torch.device("cpu")
    local, count = env_number("LOCAL_RANK", 0) if ranks()[1] > 1 else 0, torch.cuda.device_count()
    must(local < count, f"torchrun: --nproc-per-node must be at most {count}, the GPUs of this "
         f"machine (got process {local + 1})")
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def has_bf16() -> bool:
    """Return whether the current GPU computes in bf16, which takes compute capability 8.0. torch's
    emulation on older GPUs does not count: the Triton kernels do not run there."""
    return torch.cuda.is_bf16_supported(including_emulation=False)


def device_name(device: torch.device) -> str:
    """Return the name of the GPU, or "cpu" and its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {torch.get_num_threads()} threads"


def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Return the dtype of activations. auto is bf16 if the device computes in it (on the CPU: if
    its matrix library does), else fp32. Raise InputError for bf16 on a GPU that emulates it."""
    gpu = device.type == "cuda"
    has = has_bf16() if gpu else torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if precision == "bf16" and gpu and not has:
        raise InputError(f"--precision must be auto or fp32 on {device_name(device)}, a GPU below "
                         "compute capability 8.0 (got bf16)")
    return torch.bfloat16 if precision == "bf16" or precision == "auto" and has else torch.float32


@contextmanager
def open_run(folder: Path, config: str, inputs: dict[str, str]) -> Iterator[None]:
    """Make the run folder and write its config.json and env.txt; keep other commands out of it
    until the block ends. `inputs` are fingerprints of the files that the flags name; raise
    InputError where one is not that of the run's first call."""
    must((folder / "config.json").exists() or not any(folder.glob("checkpoints/*")),
         f"{folder} has checkpoints but no config.json, so they may belong to other flags; take "
         "another --name")
    with locked(folder):
        for name in ("samples", "checkpoints"):
            with writing(folder / name):
                (folder / name).mkdir(exist_ok=True)
        path = folder / "inputs.json"
        stored = read_json(path, dict) if path.exists() else {}
        for name, own in inputs.items():
            must(stored.get(name, own) == own, f"{folder}: the content of --{name} is not what it "
                 "was when the run began; give the same, or take another --name")
        write_json(path, stored | inputs)
        env = {"command": command(), "commit": commit(), **versions()}
        write_text(folder / "config.json", config)
        write_text(folder / "env.txt", "".join(f"{k}: {v}\n" for k, v in env.items()))
        yield


def command() -> str:
    """Return the command line of this run."""
    return shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])


def progress(name: str, total: int, start: int = 0, quiet: bool = False) -> tqdm:
    """Return a progress bar, to be closed by `with` so that an error begins on a line of its own; a
    quiet one, or one without a stderr, prints nothing."""
    return tqdm(total=total, initial=start, desc=f"{name:8}", dynamic_ncols=True, smoothing=0.1,
                mininterval=0.5, disable=bool(quiet) or sys.stderr is None)


class Log:
    """Write log.jsonl, one JSON object per line, in process 0. Lines of the stage after the step
    that it resumes at are dropped, so that each step is logged once. With `tensorboard`, numbers
    and images go to TensorBoard too."""

    def __init__(self, folder: Path, stage: str, resume_at: int, tensorboard: bool = False):
        self.path, self.stage, self.writes = folder / "log.jsonl", stage, ranks()[0] == 0
        self.board = None
        if not self.writes:
            return
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter
            self.board = SummaryWriter(folder / "tensorboard" / stage, purge_step=resume_at + 1)
        lines = [line for line in read_log(folder)
                 if line["stage"] != stage or line["step"] <= resume_at]
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in lines))

    def write(self, step: int, **values) -> None:
        if not self.writes:
            return
        with writing(self.path), self.path.open("a") as file:
            file.write(json.dumps({"stage": self.stage, "step": step, **values}) + "\n")
        if self.board:
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    self.board.add_scalar(name, value, step)
            self.board.flush()

    def show(self, step: int, path: Path) -> None:
        """Show the image in `path` in TensorBoard."""
        if self.board:
            with Image.open(path) as image:
                self.board.add_image("samples", np.asarray(image), step, dataformats="HWC")


def read_log(folder: Path) -> list[dict]:
    """Return the lines of the log. Those that a kill or a power loss damaged are left out: nothing
    resumes from a log."""
    path = folder / "log.jsonl"
    lines = []
    for text in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict) and type(line.get("step")) is int and "stage" in line:
            lines.append(line)
    return lines


def curves(folder: Path, stage: str) -> dict[str, list]:
    """Return the columns of a stage's log: {name: [(step, value), ...]}, of lines that have it."""
    out: dict[str, list] = {}
    for line in read_log(folder):
        if line["stage"] == stage:
            for name, value in line.items():
                if isinstance(value, (int, float)) and name != "step":
                    out.setdefault(name, []).append((line["step"], value))
    return out


def read_seconds(folder: Path) -> dict[str, float]:
    """Return the seconds of each stage in the calls before this one; a damaged file has none."""
    try:
        stored = read_json(folder / "seconds.json", dict)
    except InputError:
        return {}
    return {name: value for name, value in stored.items() if isinstance(value, float)}


def write_seconds(folder: Path, seconds: dict[str, float]) -> None:
    """Write the seconds of each stage."""
    write_json(folder / "seconds.json", seconds)


class Stopper:
    """True after SIGINT or SIGTERM: the loops check it after each step, save and exit with code 0.

    A further signal ends the process at once, unless it comes within two seconds: those of a batch
    system and of torchrun come together.
    """

    def __init__(self):
        self.signal: str | None = None
        self.since = 0.0
        for s in (signal.SIGINT, signal.SIGTERM):
            signal.signal(s, self._note)

    def _note(self, number, frame) -> None:
        if self.signal is None:
            self.signal = signal.Signals(number).name
            self.since = time.monotonic()
        elif time.monotonic() - self.since > 2:
            self.end()
            signal.raise_signal(number)

    def end(self) -> None:
        """Let a signal end the process at once, because there is nothing left to save."""
        for s in (signal.SIGINT, signal.SIGTERM):
            signal.signal(s, signal.SIG_DFL)

    def __bool__(self) -> bool:
        return self.signal is not None


class Stopped(Exception):
    """Raised after a stage has saved its checkpoint because of a signal or stop_after."""


class Health:
    """Check losses and gradient norms for NaN and inf.

    They are collected on the device and read back together by `check`: no step waits for them.
    """

    def __init__(self):
        self.seen: list[tuple[int, dict[str, Tensor], dict[str, tuple[nn.Module, Norms]]]] = []

    def note(self, step: int, losses: dict[str, Tensor],
             norms: dict[str, tuple[nn.Module, Norms]]) -> None:
        self.seen.append((step, {name: loss.detach() for name, loss in losses.items()}, norms))

    def check(self) -> None:
        """Raise FloatingPointError at the first step with a loss or gradient that is NaN or inf,
        and name step, term and parameter. Losses differ between processes: if one has such a loss,
        all of them raise."""
        seen, self.seen = self.seen, []
        if not seen:
            return
        totals = torch.stack([n.total for _, _, norms in seen for _, n in norms.values()])
        terms = torch.stack([loss for _, losses, _ in seen for loss in losses.values()])
        if not any_rank(not torch.isfinite(torch.cat([totals, terms])).all()):
            return
        for step, losses, norms in seen:
            bad = [f"{name} is {loss.item()}" for name, loss in losses.items()
                   if not loss.isfinite()]
            for network, (module, n) in norms.items():
                for (name, _), value in zip(module.named_parameters(), n.each.tolist()):
                    if not math.isfinite(value):
                        term = f"{network} {name}".strip()
                        bad.append(f"the gradient of {term} has norm {value}")
                        break       # the first parameter of each network is enough
            if bad:
                raise FloatingPointError(f"step {step}: {'; '.join(bad)}; the last checkpoint is "
                                         "intact")
        raise FloatingPointError(f"step {seen[-1][0]} or before: a loss of another process is NaN "
                                 "or inf; the last checkpoint is intact")


def memory_gb(device: torch.device) -> float:
    """Return the peak memory of this process in GiB, on the CPU of its resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    import resource
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2 ** 30


# --- provenance ---

def versions() -> dict[str, str]:
    """Return the versions of Python, CUDA and the installed packages that results depend on."""
    packages = [name for name in ("torch", "numpy", "einops", "safetensors", "triton")
                if find_spec(name)]
    return {"python": platform.python_version(), "cuda": torch.version.cuda or "none"} | {
        name: metadata.version(name) for name in packages}


def commit() -> str:
    """Return the commit of this checkout, with "+dirty" if tracked files differ from it; "unknown"
    without git or commits."""
    def git(*args: str) -> str:
        done = subprocess.run(["git", *args], cwd=Path(__file__).parent, capture_output=True,
                              text=True)
        return done.stdout.strip()

    if not shutil.which("git") or not (head := git("rev-parse", "--verify", "--quiet", "HEAD")):
        return "unknown"
    return head + ("+dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
