"""The run folder: configuration, environment, log and the wish to stop."""
import json
import math
import os
import shlex
import signal
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

import kernels
from ladd.config import Config, InputError, check_same, to_json
from ladd.data import publish
from ladd.mmdit import MMDiT
from ladd.parallel import Norms, agree, load, ranks
from ladd.report import commit, versions


def pick_device(name: str) -> torch.device:
    """The device called auto, cpu or cuda; auto takes CUDA where there is one. Under torchrun each process of
    a machine takes a GPU of its own, which becomes the current one."""
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device: found cuda without a CUDA device, accepted is cpu or auto")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    local, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if local >= count:
        raise InputError(f"torchrun: found process {local + 1} on a machine of {count} GPUs, one a GPU "
                         f"accepted (--nproc-per-node {count})")
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def has_bf16() -> bool:
    """Return whether the current GPU computes in bf16, which takes compute capability 8.0: torch's
    emulation on older ones does not count, and the Triton kernels' products need the same GPUs."""
    return torch.cuda.is_bf16_supported(including_emulation=False)


def pick_kernels(name: str, device: str, precision: str = "auto") -> kernels.Kernels:
    """Return the operations called auto, triton or torch for the device of that name. auto is torch
    on the CPU, whatever else the machine has, and where fp32 is computed in, which the kernels on a
    GPU do not do: it was asked for, or the GPU has no bf16. InputError where they cannot run."""
    gpu = torch.cuda.is_available()
    why = ""
    if device == "cpu":
        why = "--device cpu"
    elif precision == "fp32":
        why = "--precision fp32"
    elif gpu and not has_bf16():
        why = f"{torch.cuda.get_device_name()}, which has no bf16"
    if name == "auto" and why:
        kernels.announce(f"kernels: torch ({why})")
        name = "torch"
    if name == "triton" and gpu and why:
        raise InputError(f"--kernels must be auto or torch for {why} (got triton)")
    try:
        return kernels.load(name)
    except ValueError as error:
        raise InputError(f"--{error}") from None


def device_name(device: torch.device) -> str:
    return (torch.cuda.get_device_name(device) if device.type == "cuda"
            else f"cpu, {torch.get_num_threads()} threads")


def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Return the dtype of activations. auto is bf16 where the device computes in it (on the CPU:
    where its matrix library does), else fp32. InputError for bf16 on a GPU that emulates it."""
    gpu = device.type == "cuda"
    has = has_bf16() if gpu else torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if precision == "bf16" and gpu and not has:
        name = torch.cuda.get_device_name(device)
        raise InputError(f"--precision must be auto or fp32 on {name}, a GPU below compute "
                         "capability 8.0 (got bf16)")
    return torch.bfloat16 if precision == "bf16" or precision == "auto" and has else torch.float32


def frozen(model: MMDiT, dtype: torch.dtype, device: torch.device) -> MMDiT:
    """A copy for inference and for gradients through it:
    weights in the compute dtype, none of them trains. Made tensor by tensor, so that a memory-mapped network
    is never whole in the host's memory."""
    with torch.device("meta"):
        out = MMDiT(model.config, model.kernels, dtype).to(dtype).requires_grad_(False).eval()
    return load(out, model.state_dict(), device)


def step_counts(levels: tuple[float, ...]) -> list[int]:
    """The numbers of steps that a student of these levels can take: 4, 2, 1 for four levels."""
    return [n for n in range(len(levels), 0, -1) if len(levels) % n == 0]


def levels_of(levels: tuple[float, ...], steps: int) -> tuple[float, ...]:
    """The student's levels for fewer steps: every second for half of them, the first for 1
    (Sauer et al. 2024, Sec. 4)."""
    if steps not in step_counts(levels):
        raise InputError(f"steps: found {steps}, the student was trained for {step_counts(levels)[::-1]}; "
                         "--sigmas takes other levels")
    return levels[::len(levels) // steps]


def open_run(config: Config) -> Path:
    """runs/NAME, made new or checked to belong to the same configuration."""
    folder = Path("runs") / config.run_name
    stored = folder / "config.json"
    if stored.exists():
        try:
            check_same(config, json.loads(stored.read_text()))
        except json.JSONDecodeError as e:
            raise InputError(f"{stored}: not JSON ({e})") from None
    for name in ("samples", "checkpoints"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    env = {"command": command(), "commit": commit(), **versions()}
    lines = "".join(f"{k}: {v}\n" for k, v in env.items())
    for name, text in (("config.json", to_json(config)), ("env.txt", lines)):
        publish(folder / name, lambda path, text=text: path.write_text(text))
    return folder


def command() -> str:
    return shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])


def progress(name: str, total: int, start: int = 0, quiet: bool = False) -> tqdm:
    return tqdm(total=total, initial=start, desc=f"{name:8}", dynamic_ncols=True, smoothing=0.1,
                mininterval=0.5, disable=bool(quiet))


class Log:
    """log.jsonl: one object a line, written by process 0. Lines of a stage beyond the step that it resumes at
    are dropped, so no step stands twice."""

    def __init__(self, folder: Path, stage: str, resume_at: int):
        self.path, self.stage, self.writes = folder / "log.jsonl", stage, ranks()[0] == 0
        if not self.writes:
            return
        lines = [line for line in read_log(folder) if line["stage"] != stage or line["step"] <= resume_at]
        temp = self.path.with_suffix(".tmp")
        temp.write_text("".join(json.dumps(line) + "\n" for line in lines))
        os.replace(temp, self.path)

    def write(self, step: int, **values) -> None:
        if not self.writes:
            return
        with self.path.open("a") as f:
            f.write(json.dumps({"stage": self.stage, "step": step, **values}) + "\n")


def read_log(folder: Path) -> list[dict]:
    """All lines; a last line cut off by a kill is left out."""
    path = folder / "log.jsonl"
    if not path.exists():
        return []
    text = path.read_text()
    return [json.loads(line) for line in text[:text.rfind("\n") + 1].splitlines()]


def curves(folder: Path, stage: str) -> dict[str, list]:
    """Columns of a stage's log: name -> [(step, value), ...] of the lines that have it."""
    out: dict[str, list] = {}
    for line in read_log(folder):
        if line["stage"] == stage:
            for name, value in line.items():
                if isinstance(value, (int, float)) and name != "step":
                    out.setdefault(name, []).append((line["step"], value))
    return out


class Stopper:
    """True after SIGINT or SIGTERM: the loops look after each step, save and end with code 0.
    Another signal ends at once, but not one of the next two seconds: a batch system's and torchrun's come
    together."""

    def __init__(self):
        self.signal, self.since = None, 0.0
        for s in (signal.SIGINT, signal.SIGTERM):
            signal.signal(s, self._note)

    def _note(self, number, frame) -> None:
        if self.signal is None:
            self.signal, self.since = signal.Signals(number).name, time.monotonic()
        elif time.monotonic() - self.since > 2:
            self.end()
            signal.raise_signal(number)

    def end(self) -> None:
        """From here on there is nothing to save: a signal ends at once."""
        for s in (signal.SIGINT, signal.SIGTERM):
            signal.signal(s, signal.SIG_DFL)

    def __bool__(self) -> bool:
        return self.signal is not None


class Stopped(Exception):
    """Raised once a stage has saved itself after a signal or --stop-after."""


class Health:
    """Losses and gradient norms of the steps since the last look, read back from the device in one go:
    no step waits for it."""

    def __init__(self):
        self.seen: list[tuple[int, dict[str, Tensor], dict[str, tuple[nn.Module, Norms]]]] = []

    def note(self, step: int, losses: dict[str, Tensor], norms: dict[str, tuple[nn.Module, Norms]]) -> None:
        self.seen.append((step, {name: loss.detach() for name, loss in losses.items()}, norms))

    def look(self) -> None:
        """Raises FloatingPointError at the first step with a loss or gradient that is no number, naming step,
        term and parameter. A loss is one process's own: where one is no number, all of them raise."""
        seen, self.seen = self.seen, []
        if not seen:
            return
        totals = torch.stack([n.total for _, _, norms in seen for _, n in norms.values()])
        terms = torch.stack([loss for _, losses, _ in seen for loss in losses.values()])
        if not agree(not torch.isfinite(torch.cat([totals, terms])).all()):
            return
        for step, losses, norms in seen:
            bad = [f"{name} is {loss.item()}" for name, loss in losses.items() if not loss.isfinite()]
            for network, (module, n) in norms.items():
                named = zip(module.named_parameters(), n.each.tolist())
                worst = [f"the gradient of {f'{network} {name}'.strip()} has norm {value}"
                         for (name, _), value in named if not math.isfinite(value)]
                bad += worst[:1]
            if bad:
                raise FloatingPointError(f"step {step}: {'; '.join(bad)}; the last checkpoint is intact")
        raise FloatingPointError(f"step {seen[-1][0]} or before: another process found a loss that is no "
                                 "number; the last checkpoint is intact")


def memory_gb(device: torch.device) -> float:
    """Peak memory of this process on the device (the host's resident set on the CPU)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    import resource
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2 ** 30
