"""Micro-batches of a step, made on the host: latents, captions, mismatched captions, noise.

A batch is a function of the step alone, however many processes and micro-batches share it:
resuming needs no saved state, and two processes train as one does.
"""
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ladd.core import flow
from ladd.core.losses import Draws, LaddConfig, Mismatched, draw
from ladd.core.mmdit import Text
from ladd.data.shards import Latents, mismatched_captions


class MicroBatch(NamedTuple):
    """One micro-batch of one process."""
    x0: Tensor                       # [b, c, h, w]
    text: Text
    mismatched: Mismatched | None    # None without mismatched captions
    draws: Draws


class Batching(NamedTuple):
    """How the pairs of a step are chosen, and divided over processes and micro-batches."""
    seed: int
    batch: int              # pairs per step
    micro: int              # pairs per micro-batch
    heads_steps: int = 1    # discriminator steps per iteration, each with its own batch
    heads_first: int = 0    # first iterations, which train only the discriminator
    rank: int = 0
    world: int = 1


def micro_batches(latents: Latents, batching: Batching, config: LaddConfig, index: int,
                  step: int, key: tuple[int, ...]) -> list[MicroBatch]:
    """Return this process's micro-batches of batch number `index` of the latents.

    Random numbers are functions of `key`; noise levels are those of the student's step `step`. A
    fraction config.mismatched of the samples, evenly spread, gets a mismatched caption.
    """
    seed, batch, micro, _, _, rank, world = batching
    bucket, chosen = latents.choose(index, batch, seed, latents.holdout)
    # Every process draws the mismatched captions of the full batch and keeps those of its rows.
    rows = evenly_spread(batch, config.mismatched)
    prompts = latents.buckets[bucket][1][chosen[rows]]
    # The string is part of the seed; another one would change the random numbers of runs.
    generator = flow.generator(*key, "misfits")
    others, found = mismatched_captions(latents.codes, prompts, generator)
    count = found.sum().item() * micro / batch
    out = []
    for first in range(rank * (batch // world), (rank + 1) * (batch // world), micro):
        got = latents.gather(bucket, chosen[first:first + micro])
        mismatched = None
        if config.mismatched:
            mine = (rows >= first) & (rows < first + micro)
            local, other = rows[mine] - first, others[mine]
            image = None if got.image is None else got.image[local]
            text = Text(latents.context[other], latents.pooled[other], image)
            mismatched = Mismatched(local, text, found[mine].float(), count)
        draws = draw(got.x0, step, config, key, first, batch)
        out.append(MicroBatch(got.x0, got.text, mismatched, draws))
    return out


def evenly_spread(n: int, fraction: float) -> Tensor:
    """Return the numbers below n at which the running count n * fraction reaches a new integer."""
    numbers = torch.arange(n)
    return numbers[((numbers + 1) * fraction).long() > (numbers * fraction).long()]


def moved(value: Any, device: torch.device) -> Any:
    """Return the tensors of nested tuples and lists on `device`.

    The host does not wait for copies from pinned memory. They run in the GPU's stream, after the
    work that was queued before them.
    """
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    return mapped(lambda item: moved(item, device), value)


def pinned(value: Any) -> Any:
    """Return the tensors of nested tuples and lists in pinned (page-locked) memory."""
    if isinstance(value, Tensor):
        return value.pin_memory()
    return mapped(pinned, value)


def mapped(function: Callable, value: Any) -> Any:
    """Return a list, tuple or NamedTuple of function(each); anything else unchanged."""
    if not isinstance(value, (list, tuple)):
        return value
    return getattr(type(value), "_make", type(value))(map(function, value))


class Prefetch:
    """Iterate over make(*key) on `device`.

    For a GPU, a thread makes and pins the next value meanwhile. On the CPU a thread would take
    the cores of the networks, so each value is made when it is asked for.

    waited: seconds that the loop waited for data.
    """

    def __init__(self, make: Callable, keys: Iterable[tuple], device: torch.device):
        self.make, self.keys, self.device, self.waited = make, keys, device, 0.0

    def __iter__(self) -> Iterator[Any]:
        if self.device.type != "cuda":
            for key in self.keys:
                yield self.wait(lambda key=key: self.make(*key))
            return
        with ThreadPoolExecutor(1) as pool:
            pending = None
            for key in self.keys:
                previous = pending
                pending = pool.submit(lambda key=key: pinned(self.make(*key)))
                if previous is not None:
                    yield moved(self.wait(previous.result), self.device)
            if pending is not None:
                yield moved(self.wait(pending.result), self.device)

    def wait(self, result: Callable) -> Any:
        """Return result(), and add the seconds that it takes to `waited`."""
        start = time.perf_counter()
        value = result()
        self.waited += time.perf_counter() - start
        return value
