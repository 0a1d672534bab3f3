"""Checkpoints of a run: each process writes its rows during training; any number can read them.

A folder step_000123/ is complete or absent and holds

    part-00001-of-00004.safetensors   the rows of sharded tensors that process 1 of 4 has; "rows" in
                                      the header is {name: [full shape, first row in this file]}
    part-00000-of-00004.safetensors   also the replicated tensors
    meta.json                         {"parts": 4, "meta": value of the caller, "sha256": of both}
"""
import copy
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from ladd.cli import must
from ladd.data.files import (finite_json, read_json, read_tensors, sync, write_json, write_tensors,
                             writing)
from ladd.engine.parallel import ranks

Tensors = Mapping[str, Mapping[str, Tensor]]       # by the name of the network or the optimizer


class Placed(NamedTuple):
    """The part of a tensor that one process holds."""
    shape: list[int]   # of the full tensor
    first: int         # row of the full tensor at which `local` begins
    local: Tensor      # shares the tensor's storage
    writes: bool       # True in one of the processes that hold the same rows


class Stored(NamedTuple):
    """A tensor of a checkpoint; parts: (first row, memory-mapped [rows, ...]), sorted. A scalar is
    stored as [1]."""
    shape: list[int]
    dtype: torch.dtype
    parts: list[tuple[int, Tensor]]


class State(NamedTuple):
    """An open checkpoint, of which only the headers were read."""
    path: Path
    step: int
    meta: Any
    tensors: dict[str, Stored]


def placed(name: str, tensor: Tensor, rank: int = 0) -> Placed:
    """Return the part of `tensor` that this process holds.

    A plain tensor is replicated. A DTensor is sharded along dimension 0 over one mesh axis, as by
    fully_shard: ceil(n / processes) rows each, the last ones fewer or none. Raise InputError for
    other placements.
    """
    if not isinstance(tensor, DTensor):
        return Placed(list(tensor.shape), 0, tensor.detach(), rank == 0)
    placements, mesh = tensor.placements, tensor.device_mesh
    shards = [p for p in placements if type(p) is not Replicate]
    must(len(shards) <= 1 and all(type(p) is Shard and p.dim == 0 for p in shards),
         f"checkpoint: placements of {name} must be Replicate and at most one Shard(0) "
         f"(got {placements})")
    first, writes = 0, True
    for axis, (placement, at) in enumerate(zip(placements, mesh.get_coordinate())):
        if type(placement) is Shard:
            first = min(at * -(-tensor.shape[0] // mesh.size(axis)), tensor.shape[0])
        else:
            writes &= at == 0
    return Placed(list(tensor.shape), first, tensor.to_local().detach(), writes)


# --- reading ---

def states(folder: str | Path) -> list[Path]:
    """Return the checkpoints in a folder, oldest first. For the same step, the replaced (.old)
    checkpoint sorts first."""
    found = []
    for path in Path(folder).glob("step_*"):
        if m := re.fullmatch(r"step_(\d+)(\.old)?", path.name):
            found.append((int(m[1]), m[2] is None, path))
    return [path for _, _, path in sorted(found)]


def open_state(folder: str | Path) -> State | None:
    """Return the newest checkpoint, or None if there is none. Only headers are read here.

    Raise InputError that names what is damaged: an older checkpoint is never taken silently.
    """
    found = states(folder)
    if not found:
        return None
    path = found[-1]
    about = read_json(path / "meta.json", dict)
    must(about.get("sha256") == meta_digest([about.get("parts"), about.get("meta")]),
         f"{path / 'meta.json'}: its content does not have the checksum in it (got {about!r:.60})")
    tensors: dict[str, Stored] = {}
    rank, world = ranks()
    step = int(path.stem.removeprefix("step_"))
    for i in range(about["parts"]):
        part = part_file(path, i, about["parts"])
        # each process verifies its share of the checksums
        held, header = read_tensors(part, verify=i % world == rank, renamed=False)
        must(header.get("step") == str(step), f"{part} must be of step {step} (got "
             f"{header.get('step')})")
        rows = read_rows(part, header.get("rows", ""))
        for name, tensor in held.items():
            shape, first = rows.get(name, (list(tensor.shape), 0))
            stored = tensors.setdefault(name, Stored(shape, tensor.dtype, []))
            fits = (shape == stored.shape and list(tensor.shape[1:]) == shape[1:]
                    and (tensor.ndim > 0 or name not in rows))
            must(fits and tensor.dtype == stored.dtype,
                 f"{part}: {name} must be rows of {stored.shape} {stored.dtype} "
                 f"(got {list(tensor.shape)} {tensor.dtype} of {shape})")
            stored.parts.append((first, torch.atleast_1d(tensor)))
    for name, stored in tensors.items():
        check_rows(path, name, stored)
    return State(path, step, about["meta"], tensors)


def read_rows(part: Path, text: str) -> dict[str, tuple[list[int], int]]:
    """Return {name: (full shape, first row)} from the header of a part."""
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError):
        rows = None
    must(isinstance(rows, dict) and all(isinstance(value, list) and len(value) == 2
                                        and isinstance(value[0], list) and len(value[0]) > 0
                                        and all(type(n) is int for n in [*value[0], value[1]])
                                        for value in rows.values()),
         f"{part}: rows must be an object of [full shape, first row] (got {text!r:.60})")
    return rows


def check_meta(saved: State, recipe: Mapping[str, Any]) -> None:
    """Raise InputError unless the meta of a checkpoint has the values of this run in `recipe`."""
    changed = [name for name in recipe if saved.meta.get(name) != recipe[name]]
    must(not changed, f"{saved.path.parent}: began with another {' and '.join(changed)}; use the "
         "same or take another folder")


def meta_digest(meta: Any) -> str:
    """Return the checksum of the meta of a checkpoint."""
    return hashlib.sha256(json.dumps(finite_json(meta), sort_keys=True).encode()).hexdigest()


def check_rows(path: Path, name: str, stored: Stored) -> None:
    """Sort the parts of a tensor; raise InputError unless they have each of its rows once."""
    stored.parts.sort(key=lambda part: (part[0], len(part[1])))
    rows = stored.shape[0] if stored.shape else 1
    end, complete = 0, True
    for first, part in stored.parts:
        complete &= first == end
        end = first + len(part)
    spans = ", ".join(f"{first}:{first + len(part)}" for first, part in stored.parts)
    must(complete and end == rows,
         f"{path}: {name} must have each of the rows 0:{rows} once (got {spans})")


def fill(state: State, targets: dict[str, Tensor]) -> None:
    """Copy the checkpoint into `targets`, plain tensors and DTensors, in place. Only the rows that
    this process holds are read.

    Raise InputError, before anything is written, unless names, shapes and dtypes are those of the
    checkpoint.
    """
    differences = []
    for kind, names in (("missing", set(targets) - set(state.tensors)),
                        ("unknown", set(state.tensors) - set(targets))):
        if names:
            differences.append(f"{len(names)} {kind}: {', '.join(sorted(names)[:3])}")
    must(not differences, f"{state.path} must have the {len(targets)} tensors of this run "
         f"(got {'; '.join(differences)})")
    for name, target in targets.items():
        shape, dtype, _ = state.tensors[name]
        must(shape == list(target.shape) and dtype == target.dtype,
             f"{state.path}: {name} must be {list(target.shape)} {target.dtype} "
             f"(got {shape} {dtype})")
    for name, target in targets.items():
        _, low, local, _ = placed(name, target)
        local = torch.atleast_1d(local)
        for first, rows in state.tensors[name].parts:
            start, end = max(first, low), min(first + len(rows), low + len(local))
            if start < end:
                local[start - low:end - low].copy_(rows[start - first:end - first])


def collect(parts: Tensors) -> dict[str, Tensor]:
    """Return all tensors of a checkpoint as name of the part + "." + name of the tensor."""
    return {f"{part}.{name}": tensor for part, tensors in parts.items()
            for name, tensor in tensors.items()}


def restore(saved: State, parts: Tensors) -> None:
    """Copy the checkpoint `saved` into the tensors of these parts."""
    fill(saved, collect(parts))


# --- writing ---

class Saver:
    """Write checkpoints into `folder` in the background; a kill at any moment leaves the earlier
    ones.

        with saver:
            saver.begin(step, tensors, meta)            # tensors may change once it returns
            if not any_rank(not saver.written):         # after each step
                saver.publish()

    The end of the block publishes what is pending, also after an error that all processes raise.
    Every process makes a Saver and the same calls. `meet` is a barrier over all processes. The copy
    of the tensors on the host is kept and reused; it is not pinned, since a checkpoint every few
    hundred steps may take a second longer. An error of the background write is raised as InputError
    by the next call.
    """

    def __init__(self, folder: str | Path, rank: int = 0, world: int = 1,
                 meet: Callable[[], Any] = lambda: None, keep: int = 2):
        self.folder = Path(folder)
        self.rank, self.world, self.meet = rank, world, meet
        self.keep = keep
        self.buffers: dict[str, Tensor] = {}
        self.pending: tuple[int, Any] | None = None     # (step, meta) begun and not published
        self.job: Future[None] | None = None
        if rank == 0:       # others write nothing before the barrier in begin
            for left in self.folder.glob(".tmp_*"):
                shutil.rmtree(left)

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind, error, trace) -> None:
        # another error may have occurred in one process only: the others would not arrive
        if kind in (None, FloatingPointError) or self.world == 1:
            self.finish()

    @property
    def written(self) -> bool:
        """Return whether this process's part is on disk, or nothing is pending."""
        if self.pending is None:
            return True
        if not self.job.done():
            return False
        self.job.result()       # raises the error of the write
        return True

    def begin(self, step: int, tensors: dict[str, Tensor], meta: Any) -> None:
        """Copy this process's part of `tensors` to the host and start writing it; a pending
        checkpoint is published first. `meta` is JSON, and that of process 0 is stored."""
        self.finish()
        own = {name: part for name, t in tensors.items()
               if (part := placed(name, t, self.rank)).writes}
        self.buffers = host_copies({name: part.local for name, part in own.items()},
                                   self.buffers)
        rows = {name: [p.shape, p.first] for name, p in own.items()
                if isinstance(tensors[name], DTensor)}
        self.meet()     # process 0 has removed leftovers and published what was pending
        self.pending = step, copy.deepcopy(meta)
        part = part_file(self.work, self.rank, self.world)
        header = {"rows": json.dumps(rows), "step": str(step)}
        # A thread for each write, which then ends: while another thread with OpenMP workers of its
        # own exists, GNU's OpenMP lets all of them sleep between operations, and a step of the
        # tiny preset takes 163 ms instead of 100.
        writer = ThreadPoolExecutor(1, "state")
        self.job = writer.submit(write_tensors, part, self.buffers, header)
        writer.shutdown(wait=False)

    def publish(self) -> None:
        """Make a pending checkpoint the newest one; all processes must have written their parts."""
        if self.pending is None:
            return
        self.job.result()
        if self.rank == 0:
            commit(self.work, self.world, self.pending[1], self.keep)
        self.pending = None

    def finish(self) -> None:
        """Wait until all processes have written a pending checkpoint, and publish it."""
        if self.pending is not None:
            self.job.result()
            self.meet()
            self.publish()

    @property
    def work(self) -> Path:
        return self.folder / f".tmp_step_{self.pending[0]:06d}"


def host_copies(tensors: dict[str, Tensor], buffers: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return copies on the host, in the buffers of the same names where there are some."""
    out = {}
    for name, tensor in tensors.items():
        memory = buffers.get(name)
        if memory is None:
            memory = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
        out[name] = memory.copy_(tensor)
    return out


def part_file(path: Path, rank: int, world: int) -> Path:
    return path / f"part-{rank:05d}-of-{world:05d}.safetensors"


def commit(work: Path, world: int, meta: Any, keep: int) -> None:
    """Make the folder `work` with its `world` parts the newest checkpoint; remove all but the last
    `keep`."""
    path = work.with_name(work.name.removeprefix(".tmp_"))
    before = path.with_suffix(".old")
    for rank in range(world):
        part = part_file(work, rank, world)
        must(part.exists(), f"{part} does not exist; a checkpoint needs the part of each process")
    about = {"parts": world, "meta": meta}
    write_json(work / "meta.json", about | {"sha256": meta_digest([world, meta])})
    with writing(path):
        # a folder cannot be renamed onto another: the old one gets another name, still readable
        if path.exists():
            discard(before)
            os.replace(path, before)
        os.replace(work, path)
        sync(path.parent)
        discard(before)
        for state in states(path.parent)[:-keep]:
            discard(state)


def discard(path: Path) -> None:
    """Remove a folder if it exists. It is renamed first, so that a partly removed one is never read
    as a checkpoint."""
    if path.exists():
        shutil.rmtree(path.rename(path.with_name(f".tmp_gone_{path.name}")))
