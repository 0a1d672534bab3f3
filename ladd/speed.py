"""Time of a step and its stages, peak rates, forwards counted: the measuring side of --bench-steps."""
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

# dense bf16 TFLOP/s with fp32 sums, from NVIDIA's data sheets; the first name that fits counts
PEAKS = {"H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "H800": 989, "GH200": 989, "B200": 2250,
         "A100": 312, "A800": 312, "L40S": 362, "L4": 121, "RTX 6000 Ada": 364, "4090": 165}


def peak_flops(name: str) -> float | None:
    """The device's peak in FLOP/s; None for one that the table does not know, a CPU among them."""
    return next((1e12 * peak for part, peak in PEAKS.items() if part in name), None)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Laps:
    """laps(name) adds the time since the last lap to `name`; waits for the device, so not for total times."""

    def __init__(self, device: torch.device):
        self.device, self.seconds = device, {}
        self.start()

    def start(self) -> None:
        wait(self.device)
        self.since = time.perf_counter()

    def __call__(self, name: str) -> None:
        wait(self.device)
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self.since
        self.since = now


@contextmanager
def forwards(**models: nn.Module) -> Iterator[dict[str, int]]:
    """Counts the forward passes of each model inside."""
    counts = dict.fromkeys(models, 0)

    def counted(name: str) -> Callable:
        def hook(module, args, output) -> None:
            counts[name] += 1
        return hook

    hooks = [model.register_forward_hook(counted(name)) for name, model in models.items()]
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()


def interleaved(steps: dict[str, Callable[[int], None]], count: int, device: torch.device,
                warm: int = 2) -> dict[str, float]:
    """Seconds of a call of each; they take turns, so that what slows the machine slows all of them."""
    seconds = dict.fromkeys(steps, 0.0)
    for i in range(-warm, count):
        for name, step in steps.items():
            wait(device)
            start = time.perf_counter()
            step(i + warm)
            wait(device)
            seconds[name] += (time.perf_counter() - start) * (i >= 0)
    return {name: total / count for name, total in seconds.items()}
