"""Run states: each process writes its rows beside training, any number of processes reads them back.

folder/step_000123/, whole or absent, holds
    part-00001-of-00004.safetensors   written by process 1 of 4: its rows of sharded tensors, placed by "rows"
                                      in the header: {name: [shape of the whole, first row here]}
    part-00000-of-00004.safetensors   also what is the same on all processes, whole
    meta.json                         {"parts": 4, "meta": what the caller gave}
"""
import copy
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from ladd.config import InputError
from ladd.data import read_json, read_tensors, sync, write_json


class Placed(NamedTuple):
    """What one process holds of a tensor."""
    shape: list[int]   # of the whole
    first: int         # row of the whole where `local` begins
    local: Tensor      # shares the tensor's storage
    writes: bool       # one process among those that hold the same rows


class Stored(NamedTuple):
    """A tensor in a state: its parts by first row, memory-mapped, [rows, ...] ([1] for a number)."""
    shape: list[int]
    dtype: torch.dtype
    parts: list[tuple[int, Tensor]]


class State(NamedTuple):
    path: Path
    step: int
    meta: Any
    tensors: dict[str, Stored]


def placed(name: str, tensor: Tensor, rank: int = 0) -> Placed:
    """What this process holds of a plain tensor (all, as every process does) or of a DTensor that is split
    along dimension 0 over one mesh axis, as by fully_shard: ceil(n / processes) rows each, the last ones
    fewer or none.

    Raises InputError for another placement.
    """
    if not isinstance(tensor, DTensor):
        return Placed(list(tensor.shape), 0, tensor.detach(), rank == 0)
    kinds, mesh, first, writes = tensor.placements, tensor.device_mesh, 0, True
    if sum(type(kind) is Shard for kind in kinds) > 1 or not all(
            type(kind) is Replicate or type(kind) is Shard and kind.dim == 0 for kind in kinds):
        raise InputError(f"state {name}: found placements {kinds}, one Shard(0) and else Replicate accepted")
    for axis, (kind, at) in enumerate(zip(kinds, mesh.get_coordinate())):
        if type(kind) is Shard:
            first = min(at * -(-tensor.shape[0] // mesh.size(axis)), tensor.shape[0])
        else:
            writes &= at == 0
    return Placed(list(tensor.shape), first, tensor.to_local().detach(), writes)


# reading

def states(folder: str | Path) -> list[Path]:
    """The states in a folder, oldest first; of one step the one that stepped aside comes first."""
    found = [(re.fullmatch(r"step_(\d+)(\.old)?", path.name), path) for path in Path(folder).glob("step_*")]
    return [path for _, _, path in sorted((int(m[1]), m[2] is None, path) for m, path in found if m)]


def open_state(folder: str | Path) -> State | None:
    """The newest state, None without one. Only headers are read here.

    Raises InputError that names what is damaged: an older state is never taken silently.
    """
    found = states(folder)
    if not found:
        return None
    path = found[-1]
    about = read_json(path / "meta.json")
    if not isinstance(about, dict) or set(about) != {"parts", "meta"} or type(about["parts"]) is not int:
        raise InputError(f"{path / 'meta.json'}: found {about!r:.60}, a number of parts and meta accepted")
    tensors: dict[str, Stored] = {}
    for rank in range(about["parts"]):
        part = part_file(path, rank, about["parts"])
        held, header = read_tensors(part)
        rows = json.loads(header.get("rows", "{}"))
        for name, tensor in held.items():
            shape, first = rows.get(name, (list(tensor.shape), 0))
            stored = tensors.setdefault(name, Stored(shape, tensor.dtype, []))
            if (stored.shape, stored.dtype, shape[1:]) != (shape, tensor.dtype, list(tensor.shape[1:])):
                raise InputError(f"{part}: found {name} {list(tensor.shape)} {tensor.dtype} of {shape}, "
                                 f"rows of {stored.shape} {stored.dtype} accepted")
            stored.parts.append((first, torch.atleast_1d(tensor)))
    for name, stored in tensors.items():
        stored.parts.sort(key=lambda part: (part[0], len(part[1])))
        spans = [(first, first + len(rows)) for first, rows in stored.parts]
        ends, whole = [0, *(end for _, end in spans)], stored.shape[0] if stored.shape else 1
        if [first for first, _ in spans] != ends[:-1] or ends[-1] != whole:
            raise InputError(f"{path}: found rows {', '.join(f'{a}:{b}' for a, b in spans)} of {name}, "
                             f"each of 0:{whole} once accepted")
    return State(path, int(path.stem.removeprefix("step_")), about["meta"], tensors)


def fill(state: State, targets: dict[str, Tensor]) -> None:
    """Copies the state into `targets`, plain tensors and DTensors, in place, reading only the rows that this
    process holds.

    Raises InputError, before anything is written, unless names, shapes and dtypes are the state's.
    """
    missing, unknown = sorted(set(targets) - set(state.tensors)), sorted(set(state.tensors) - set(targets))
    listed = [f"{len(names)} {kind}: {', '.join(names[:3])}"
              for names, kind in ((missing, "missing"), (unknown, "unknown")) if names]
    if listed:
        raise InputError(f"{state.path}: found {'; '.join(listed)}, the run's {len(targets)} accepted")
    for name, target in targets.items():
        shape, dtype, _ = state.tensors[name]
        if (shape, dtype) != (list(target.shape), target.dtype):
            raise InputError(f"{state.path}: found {name} {shape} {dtype}, "
                             f"{list(target.shape)} {target.dtype} accepted")
    for name, target in targets.items():
        _, low, local, _ = placed(name, target)
        local = torch.atleast_1d(local)
        for first, rows in state.tensors[name].parts:
            start, end = max(first, low), min(first + len(rows), low + len(local))
            if start < end:
                local[start - low:end - low].copy_(rows[start - first:end - first])


# optimizers

def optimizer_tensors(optimizer: torch.optim.Optimizer, named: dict[str, Tensor],
                      prefix: str) -> dict[str, Tensor]:
    """AdamW's step counts and moments, named `prefix` + parameter's name + .step, .exp_avg, .exp_avg_sq; a
    parameter that was never stepped has step 0 and no moments. `named`: all of the optimizer's parameters.

    Learning rates are not among them: the schedule sets them from the step.
    """
    groups_of(optimizer, named, prefix)
    return {f"{prefix}{name}.{key}": value for name, p in named.items()
            for key, value in (optimizer.state.get(p) or {"step": torch.zeros(())}).items()}


def optimizer_targets(optimizer: torch.optim.Optimizer, named: dict[str, Tensor], prefix: str,
                      state: State) -> dict[str, Tensor]:
    """optimizer_tensors to `fill`: each parameter gets moments, placed like itself, where the state has them
    and loses them where it has none. The optimizer keeps its groups' hyperparameters."""
    groups = groups_of(optimizer, named, prefix)
    for name, p in named.items():
        optimizer.state.pop(p, None)
        step, group = state.tensors.get(f"{prefix}{name}.step"), groups[id(p)]
        if step is not None and any(rows.any() for _, rows in step.parts):
            device = p.device if group["fused"] or group["capturable"] else "cpu"   # as AdamW does
            optimizer.state[p] = {"step": torch.zeros((), dtype=step.dtype, device=device),
                                  "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    return optimizer_tensors(optimizer, named, prefix)


def groups_of(optimizer: torch.optim.Optimizer, named: dict[str, Tensor], prefix: str) -> dict[int, dict]:
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    if set(groups) != {id(p) for p in named.values()}:
        raise ValueError(f"optimizer {prefix!r}: its {len(groups)} parameters are not the {len(named)} named")
    return groups


# writing

class Saver:
    """Writes states into `folder` in the background; a kill at any moment leaves those that were there.

        saver.begin(step, tensors, meta)      # training may change the tensors once it returns
        if all_say(saver.written):            # after each step, all processes agree
            saver.publish()
        saver.finish()                        # at the end, and on a signal

    Every process makes one and makes the same calls. `meet` returns when all processes have called it; one
    process needs none. Owns the copy of the tensors on the host, pinned for a GPU's, and uses it again.
    What goes wrong with a part is raised by the next call: InputError in one line.
    """

    def __init__(self, folder: str | Path, rank: int = 0, world: int = 1,
                 meet: Callable[[], Any] = lambda: None, keep: int = 2):
        self.folder, self.rank, self.world, self.meet, self.keep = Path(folder), rank, world, meet, keep
        self.buffers: dict[str, Tensor] = {}
        self.pending: tuple[int, Any] | None = None   # (step, meta) begun and not published
        self.job: Future[None] | None = None
        self.pool = ThreadPoolExecutor(1, "state")
        if rank == 0:   # the others write in begin, which meets
            for left in self.folder.glob(".tmp_*"):
                shutil.rmtree(left)

    @property
    def written(self) -> bool:
        """This process's part is on disk, or nothing is pending."""
        if self.pending is None or not self.job.done():
            return self.pending is None
        self.job.result()
        return True

    def begin(self, step: int, tensors: dict[str, Tensor], meta: Any) -> None:
        """Copies what this process writes of `tensors` to the host and starts writing it; publishes what was
        pending first. `meta`: JSON, process 0's counts."""
        self.finish()
        own = {name: part for name, t in tensors.items() if (part := placed(name, t, self.rank)).writes}
        self.buffers = snapshot({name: part.local for name, part in own.items()}, self.buffers)
        rows = {name: [p.shape, p.first] for name, p in own.items() if isinstance(tensors[name], DTensor)}
        self.meet()   # process 0 has removed leftovers and published what was pending
        self.pending = step, copy.deepcopy(meta)
        part = part_file(self.work, self.rank, self.world)
        self.job = self.pool.submit(write_part, part, self.buffers, rows)

    def publish(self) -> None:
        """Makes what is pending, if anything, the newest state; all processes must have written."""
        if self.pending is None:
            return
        self.job.result()
        if self.rank == 0:
            commit(self.work, {"parts": self.world, "meta": self.pending[1]}, self.keep)
        self.pending = None

    def finish(self) -> None:
        """Waits until all processes have written what is pending and publishes it."""
        if self.pending is not None:
            self.job.result()
            self.meet()
            self.publish()

    @property
    def work(self) -> Path:
        return self.folder / f".tmp_step_{self.pending[0]:06d}"


def snapshot(tensors: dict[str, Tensor], buffers: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return copies on the host, in `buffers` where one of that name fits; complete on return."""
    held = {name: buffers[name] for name, tensor in tensors.items() if name in buffers
            and (buffers[name].shape, buffers[name].dtype) == (tensor.shape, tensor.dtype)}
    held |= host_memory({name: tensor for name, tensor in tensors.items() if name not in held})
    out = {name: held[name].copy_(tensor, non_blocking=True) for name, tensor in tensors.items()}
    if any(tensor.is_cuda for tensor in tensors.values()):
        torch.cuda.synchronize()
    return out


def host_memory(like: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a tensor on the host for each of `like`, pinned if one of them is a GPU's."""
    pin, out = any(tensor.is_cuda for tensor in like.values()), {}
    for size, names in packed({name: tensor.nbytes for name, tensor in like.items()}):
        block, first = torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=pin), 0
        for name in names:
            tensor = like[name]
            part = block[first:first + tensor.nbytes]
            out[name] = part.view(tensor.dtype).view(tensor.shape)
            first += aligned(tensor.nbytes)
    return out


def packed(sizes: dict[str, int]) -> list[tuple[int, list[str]]]:
    """Return [(bytes, names)]: blocks that hold tensors of these sizes, each a power of two large.

    torch rounds pinned memory up to powers of two. With a block for each tensor that adds 65 % to
    sd3.5-large's state, in one block for all up to 100 %; here the largest power of two below what
    is left is filled with the largest tensors that fit, which leaves next to nothing over.
    """
    left, blocks = sorted(sizes, key=sizes.__getitem__, reverse=True), []
    while left:
        total = sum(aligned(sizes[name]) for name in left)
        largest = aligned(sizes[left[0]])
        size = room = max(1 << total.bit_length() - 1, 1 << (largest - 1).bit_length())
        names, rest = [], []
        for name in left:
            if aligned(sizes[name]) <= room:
                names.append(name)
                room -= aligned(sizes[name])
            else:
                rest.append(name)
        blocks.append((size, names))
        left = rest
    return blocks


def aligned(size: int) -> int:
    """Return the bytes that a tensor of `size` takes in a block: a multiple of 64, at least 64."""
    return max(-(-size // 64) * 64, 64)


def part_file(path: Path, rank: int, world: int) -> Path:
    return path / f"part-{rank:05d}-of-{world:05d}.safetensors"


def write_part(path: Path, tensors: dict[str, Tensor], rows: dict[str, list]) -> None:
    with one_line(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path, {"rows": json.dumps(rows)})   # data.write_tensors would copy the copy
        path.chmod(0o644)
        sync(path)
        sync(path.parent)


def commit(work: Path, about: dict[str, Any], keep: int) -> None:
    """Makes the folder `work` with all its parts the newest state, then drops all but the last `keep`."""
    path = work.with_name(work.name.removeprefix(".tmp_"))
    before = path.with_suffix(".old")
    parts = [part_file(work, rank, about["parts"]) for rank in range(about["parts"])]
    if missing := [part for part in parts if not part.exists()]:
        raise InputError(f"{missing[0]}: found no such file, a part of each process accepted in a state")
    with one_line(work / "meta.json"):
        write_json(work / "meta.json", about)
        sync(work)
    if path.exists():   # a folder cannot be renamed onto another: the former one steps aside, still readable
        discard(before)
        os.replace(path, before)
    os.replace(work, path)
    sync(path.parent)
    discard(before)
    for state in states(path.parent)[:-keep]:
        discard(state)


def discard(path: Path) -> None:
    """Removes a folder if it is there; renamed first, so that no half of it is ever taken for a state."""
    if path.exists():
        shutil.rmtree(path.rename(path.with_name(f".tmp_gone_{path.name}")))


@contextmanager
def one_line(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: found no way to write it ({error}); former states are whole") from None
