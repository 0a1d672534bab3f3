"""What a step reads: micro-batches of latents with captions, misfits and noise, made on the host.

Each is a function of the step alone, however many processes and micro-batches share the batch: resuming needs
no saved state, and two processes train as one does.
"""
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ladd import flow
from ladd.data import Latents, misfits
from ladd.distill import DistillConfig, Draws, Text, TextImage, Wrong, draw


class Part(NamedTuple):
    """One micro-batch of one process."""
    x0: Tensor             # [b, c, h, w]
    text: Text | TextImage
    wrong: Wrong | None    # None without misaligned captions
    draws: Draws


def parts(latents: Latents, index: int, step: int, key: tuple[int, ...], seed: int, batch: int, micro: int,
          config: DistillConfig, rank: int = 0, world: int = 1) -> list[Part]:
    """The micro-batches of process `rank` of `world` for a step of `batch` pairs: batch number `index` of the
    latents in the order of `seed`, random numbers by `key`, levels as at the student's step `step`.

    A share config.misaligned of the samples, evenly spread, gets a caption that does not fit.
    """
    bucket, chosen = latents.choose(index, batch, seed, latents.holdout)
    numbers = torch.arange(batch)
    rows = numbers[((numbers + 1) * config.misaligned).long() > (numbers * config.misaligned).long()]
    others, found = misfits(latents.codes, latents.buckets[bucket][1][chosen[rows]],
                            flow.generator(*key, "misfits"))
    out = []
    for first in range(rank * (batch // world), (rank + 1) * (batch // world), micro):
        mine = (rows >= first) & (rows < first + micro)
        got = latents.gather(bucket, chosen[first:first + micro])
        other = got.text._replace(context=latents.context[others[mine]], pooled=latents.pooled[others[mine]])
        if len(other) == 3:
            other = other._replace(image=got.text.image[rows[mine] - first])
        wrong = Wrong(rows[mine] - first, other, found[mine].float(),
                      found.sum().item() * micro / batch) if config.misaligned else None
        out.append(Part(got.x0, got.text, wrong, draw(got.x0, step, config, key, first, batch)))
    return out


def moved(value: Any, device: torch.device) -> Any:
    """Return tuples, lists and tensors of `value` on `device`. The host does not wait for copies
    from pinned memory; on the GPU they run in its stream, after the work queued before them."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    return mapped(lambda v: moved(v, device), value)


def pinned(value: Any) -> Any:
    """Return `value` in page-locked memory, from which copies to a GPU need no wait of the host."""
    if isinstance(value, Tensor):
        return value.pin_memory()
    return mapped(pinned, value)


def mapped(function: Callable, value: Any) -> Any:
    """A list, tuple or NamedTuple of function(each); anything else as it is."""
    if not isinstance(value, (list, tuple)):
        return value
    return getattr(type(value), "_make", type(value))(map(function, value))


class Feed:
    """Iterates over make(*key) on `device`. For a GPU a thread makes and pins the next one meanwhile; on the
    CPU, where it would take the networks' cores, each is made when it is asked for.

    waited: seconds that the loop stood still for data.
    """

    def __init__(self, make: Callable, keys: Iterable[tuple], device: torch.device):
        self.make, self.keys, self.device, self.waited = make, keys, device, 0.0

    def __iter__(self) -> Iterator[Any]:
        if self.device.type != "cuda":
            ready = (lambda key=key: self.make(*key) for key in self.keys)
            yield from map(self.wait, ready)
            return
        with ThreadPoolExecutor(1) as pool:
            pending = None
            for key in self.keys:
                pending, now = pool.submit(lambda: pinned(self.make(*key))), pending
                if now is not None:
                    yield moved(self.wait(now.result), self.device)
            if pending is not None:
                yield moved(self.wait(pending.result), self.device)

    def wait(self, result: Callable) -> Any:
        start = time.perf_counter()
        value = result()
        self.waited += time.perf_counter() - start
        return value
