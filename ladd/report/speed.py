"""Measure the time of a step and its stages, and count forward passes."""
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

from ladd.engine.run import device_name, memory_gb

# dense bf16 TFLOP/s with fp32 sums, from NVIDIA's data sheets; names without memory and socket
PEAKS = {"H100": 989, "H100 PCIe": 756, "H100 NVL": 835, "H200": 989, "H200 NVL": 835, "H800": 989,
         "H800 PCIe": 756, "GH200": 989, "B200": 2250, "A100": 312, "A100 PCIe": 312,
         "A100-PCIE": 312, "A800": 312, "A800 PCIe": 312, "L40S": 362, "L40": 181, "L4": 121,
         "RTX 6000 Ada Generation": 364, "RTX 4090": 165}


def peak_flops(name: str) -> float | None:
    """Return the device's peak in FLOP/s. None for a name that is not in the table, such as a CPU,
    a part of a GPU (MIG) or a variant ("RTX 4090 D")."""
    peak = PEAKS.get(re.sub(r"NVIDIA |GeForce |[ -]\d+GB?\b|[ -](HBM|SXM)\w+", "", name))
    return peak and 1e12 * peak


def wait(device: torch.device) -> None:
    """Wait until a GPU has done all that was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Laps:
    """Add up the seconds of stages: laps(name) adds the time since the last lap to `name`. Each lap
    waits for the device, which makes the whole step slower than without laps."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: dict[str, float] = {}
        wait(device)
        self.since = time.perf_counter()

    def __call__(self, name: str) -> None:
        wait(self.device)
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self.since
        self.since = now


@contextmanager
def forwards(**models: nn.Module) -> Iterator[dict[str, int]]:
    """Count the forward passes of each model inside the block."""
    counts = dict.fromkeys(models, 0)

    def count(name: str, *_) -> None:
        counts[name] += 1

    hooks = [model.register_forward_hook(partial(count, name)) for name, model in models.items()]
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()


class Pace:
    """Measure the rates of a training loop between two lines of its log, without what is inside
    `paused`.

    Model FLOP utilisation (mfu) needs the device's peak. Where the table does not know it, as for a
    CPU, there is no mfu, and `flops`, which counts the FLOPs of a step over all processes, is not
    called.
    """

    def __init__(self, batch: int, device: torch.device, world: int, flops: Callable[[], int]):
        self.batch, self.device = batch, device
        peak = peak_flops(device_name(device))
        self.share = peak and flops() / (peak * world)      # of the peak, at one step per second
        self.began = self.since = time.perf_counter()
        self.idle = self.waited = 0.0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time inside the block."""
        start = time.perf_counter()
        yield
        self.idle += time.perf_counter() - start

    def line(self, waited: float, steps: int) -> dict[str, float]:
        """Return the rates of the last `steps` steps. `waited`: seconds in all that the loop stood
        still for data."""
        now = time.perf_counter()
        seconds = max(now - self.since - self.idle, 1e-9)
        rates = {"seconds": now - self.began, "pairs_per_second": steps * self.batch / seconds,
                 "data_wait": (waited - self.waited) / seconds, "gb": memory_gb(self.device)}
        if self.share:
            rates["mfu"] = self.share * steps / seconds
        self.since, self.idle, self.waited = now, 0.0, waited
        return rates
