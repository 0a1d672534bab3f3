"""Micro-batches of a step, made on the host: latents, captions, mismatched captions, noise.

A batch is a function of the step alone, however many processes and micro-batches share it:
resuming needs no saved state, and two processes train as one does.
"""
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ladd.core import flow
from ladd.core.losses import Draws, LaddConfig, Mismatched, draw
from ladd.core.mmdit import Text
from ladd.data.images import ahead
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
    heads_first: int = 0    # first iterations, which train only the discriminator
    rank: int = 0
    world: int = 1


def micro_batches(latents: Latents, batching: Batching, config: LaddConfig, index: int,
                  step: int, key: tuple[int, ...]) -> list[MicroBatch]:
    """Return this process's micro-batches of batch number `index` of the latents. Random numbers
    are functions of `key`; noise levels are those of the student's step `step`. A fraction
    config.mismatched of the samples, evenly spread, gets a mismatched caption."""
    seed, batch, micro, _, rank, world = batching
    bucket, chosen = latents.choose(index, batch, seed, latents.holdout)
    # Every process draws the mismatched captions of the full batch and keeps those of its rows:
    # where the running count reaches a new integer.
    before = torch.arange(batch)
    rows = before[((before + 1) * config.mismatched).long() > (before * config.mismatched).long()]
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
            image = None if got.text.image is None else got.text.image[local]
            text = Text(latents.context[other], latents.pooled[other], image)
            mismatched = Mismatched(local, text, found[mine].float(), count)
        draws = draw(got.x0, step, config, key, first, batch)
        out.append(MicroBatch(got.x0, got.text, mismatched, draws))
    return out


def moved(value: Any, device: torch.device) -> Any:
    """Return the tensors of nested tuples and lists on `device`. The host does not wait for copies
    from pinned memory, which run in the GPU's stream after the work queued before them."""
    return tree_map_only(Tensor, lambda t: t.to(device, non_blocking=True), value)


class Prefetch:
    """Iterate over make(*key) on `device`; `waited` is the seconds that the loop waited for data.

    For a GPU, a thread makes and pins the next value meanwhile. On the CPU a thread would take
    the cores of the networks, so each value is made when it is asked for.
    """

    def __init__(self, make: Callable, keys: Iterable[tuple], device: torch.device):
        self.make, self.keys, self.device, self.waited = make, keys, device, 0.0

    def __iter__(self) -> Iterator[Any]:
        if self.device.type != "cuda":
            for key in self.keys:
                yield self.wait(partial(self.make, *key))
            return

        def pinned(*key) -> Any:    # page-locked
            return tree_map_only(Tensor, Tensor.pin_memory, self.make(*key))

        with ThreadPoolExecutor(1) as pool:
            for pending in ahead(pool, pinned, self.keys, 2):
                yield moved(self.wait(pending.result), self.device)

    def wait(self, result: Callable) -> Any:
        """Return result(), and add the seconds that it takes to `waited`."""
        start = time.perf_counter()
        value = result()
        self.waited += time.perf_counter() - start
        return value
