"""Time of a step and its stages, peak rates, forwards counted: the log's rates and --bench-steps."""
import itertools
import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from ladd import cost, parallel, report
from ladd.config import Config
from ladd.data import Latents
from ladd.feed import Feed
from ladd.memory import fused
from ladd.mmdit import MMDiT, MMDiTConfig
from ladd.run import device_name, memory_gb
from ladd.step import (Layout, calibrate, distill_config, ladd_step, make_players, no_lap,
                       on_meta, ops_of, step_parts, teacher_config, tokens_of)

# dense bf16 TFLOP/s with fp32 sums, from NVIDIA's data sheets; names without memory and socket
PEAKS = {"H100": 989, "H100 PCIe": 756, "H100 NVL": 835, "H200": 989, "H200 NVL": 835, "H800": 989,
         "H800 PCIe": 756, "GH200": 989, "B200": 2250, "A100": 312, "A100 PCIe": 312,
         "A100-PCIE": 312, "A800": 312, "A800 PCIe": 312, "L40S": 362, "L40": 181, "L4": 121,
         "RTX 6000 Ada Generation": 364, "RTX 4090": 165}


def peak_flops(name: str) -> float | None:
    """Return the device's peak in FLOP/s; None for a name that is not in the table as a whole:
    a CPU, a part of a GPU (MIG), a variant such as "RTX 4090 D"."""
    peak = PEAKS.get(re.sub(r"NVIDIA |GeForce |[ -]\d+GB?\b|[ -](HBM|SXM)\w+", "", name))
    return peak and 1e12 * peak


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


def step_flops(config: Config, sizes: MMDiTConfig, latent: tuple[int, int, int],
               device: torch.device) -> tuple[int, int]:
    """(FLOPs of a step over all processes, bytes kept for backward by a micro-batch)."""
    world = parallel.ranks()[1]
    micro = config.micro(world)
    costs = cost.step_cost(*on_meta(config, sizes, device), latent, (tokens_of(config), sizes.context_dim),
                           micro, distill_config(config), config.checkpoint,
                           fused() if device.type == "cuda" and config.kernels != "torch" else None)
    flops = costs["flops_step"] + (config.heads_steps - 1) * costs["flops_heads_step"]
    return flops * config.batch // micro, costs["bytes_saved"]


class Pace:
    """Rates of a training loop between two lines of its log; what is inside `paused` does not count.

    Model FLOP utilisation needs the device's peak: where the table does not know it, such as a CPU's, there
    is none. FLOPs are counted at the first size of the run; the others have about its area.
    """

    def __init__(self, config: Config, sizes: MMDiTConfig, latent: tuple[int, int, int],
                 device: torch.device):
        self.config, self.device, peak = config, device, peak_flops(device_name(device))
        world = parallel.ranks()[1]                         # share: of the peak, at one step a second
        self.share = peak and step_flops(config, sizes, latent, device)[0] / (peak * world)
        self.began = self.since = time.perf_counter()
        self.idle = self.waited = 0.0

    @contextmanager
    def paused(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.idle += time.perf_counter() - start

    def line(self, waited: float, steps: int) -> dict[str, float]:
        """Of the last `steps` steps; `waited`: seconds that the loop has stood still for data so far."""
        now = time.perf_counter()
        seconds, wait = max(now - self.since - self.idle, 1e-9), waited - self.waited
        self.since, self.idle, self.waited = now, 0.0, waited
        rates = {"seconds": now - self.began, "pairs_per_second": steps * self.config.batch / seconds,
                 "data_wait": wait / seconds, "gb": memory_gb(self.device)}
        return rates | ({"mfu": self.share * steps / seconds} if self.share else {})


def bench(config: Config, layout: Layout) -> None:
    """Time --bench-steps LADD steps of random networks on random latents and print rates, FLOPs,
    memory and the share of each stage as JSON."""
    (h, w), n, device = config.hw[0], 2 * config.batch, layout.device
    torch.manual_seed(config.seed)
    with torch.device(device if layout.mesh is None else "cpu"):
        base = MMDiT(teacher_config(config), ops_of(config))
    c, latent = base.config, (16, h // 8, w // 8)
    widths = (tokens_of(config), c.context_dim), (c.pooled_dim,)
    text = [torch.randn(n, *width).bfloat16() for width in widths]
    latents = Latents([str(i) for i in range(n)], *text, torch.arange(n)[:, None], (text[0][0], text[1][0]),
                      {latent[1:]: (torch.randn(n, *latent), torch.arange(n))}, {},
                      {latent[1:]: torch.randn(n, config.beside, *latent[1:])} if config.beside else {})
    dc, p = distill_config(config), make_players(config, base, layout)
    del base
    calibrate(config, dc, p.teacher, p.heads, latents)

    keys = ((it, j) for it in itertools.count() for j in range(config.heads_steps))
    made = partial(step_parts, replace(config, heads_first=0), dc, latents)
    batches = iter(Feed(made, keys, device))                               # beside the steps, as in a run

    def step(lap: Callable[[str], None] = no_lap) -> None:
        for j in range(config.heads_steps):
            parts = next(batches)
            lap("batch and noise")
            ladd_step(config, dc, p, parts, j == config.heads_steps - 1, lap)

    for _ in range(2):              # not counted: they compile, allocate and make Adam's moments
        step()
    wait(device)
    start = time.perf_counter()
    for _ in range(config.bench_steps):
        step()
    wait(device)
    seconds = (time.perf_counter() - start) / config.bench_steps

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with forwards(student=p.student, teacher=p.teacher) as count:
        laps = Laps(device)
        step(laps)                  # not one of those above: each lap waits for the device
    flops, saved = step_flops(config, c, latent, device)
    rank, world = parallel.ranks()
    peak = peak_flops(device_name(device))
    if rank == 0:
        found = {"preset": config.preset, "device": device_name(device), "world_size": world,
                 "versions": report.versions(), "commit": report.commit(), "batch": config.batch,
                 "micro_batch": config.micro(world), "size": config.sizes[0],
                 "pairs_per_second": config.batch / seconds, "seconds": seconds, "flops": flops,
                 "mfu": flops / seconds / (peak * world) if peak else None, "forwards": count,
                 "memory_gb": memory_gb(device), "bytes_saved": saved,
                 "stages": {k: v / sum(laps.seconds.values()) for k, v in laps.seconds.items()}}
        print(json.dumps(found, indent=1))
