"""The processes of a run: torchrun starts several, without it there is one and everything here does nothing.

A trained network lies sharded over them (FSDP2), the batch is divided: each process sees its own samples, and
gradients are means over the processes. One code path serves all layouts, a mesh ("replicate", "shard"):
(world, 1) keeps a whole copy in each process, (1, world) a part, (n, world / n) parts within groups.
Order: checkpointed, compiled, shard, load; then the optimizer.
"""
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from ladd.config import InputError
from ladd.mmdit import MMDiT

aten = torch.ops.aten
ATTENTION = [torch.ops.ladd.joint_attention_forward.default,    # most time for least memory
             aten._scaled_dot_product_flash_attention_for_cpu.default,
             aten._scaled_dot_product_flash_attention.default,
             aten._scaled_dot_product_efficient_attention.default,
             aten._scaled_dot_product_cudnn_attention.default,
             aten._scaled_dot_product_fused_attention_overrideable.default]


# processes

def ranks() -> tuple[int, int]:
    """(this process's number, how many there are)."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def start(device: torch.device, timeout_s: float) -> None:
    """Joins torchrun's processes, each with its own `device`. A collective that waits for twice `timeout_s`
    fails: Watch, which knows who is missing, speaks first."""
    world = ranks()[1]
    if world == 1:
        return
    if absent := [n for n in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if n not in os.environ]:
        raise InputError(f"environment: found WORLD_SIZE {world} without {', '.join(absent)}; torchrun's "
                         "variables accepted")
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                            timeout=timedelta(seconds=2 * timeout_s))


def finish() -> None:
    """Waits for all and ends this process with code 0, where there are several. Not after an error: others
    may never come, and torchrun ends them.

    Python's own end comes too late: networks hold the groups, so a group's thread may just then let go of the
    last collective's tensors, waits for an interpreter that is gone, and aborts the process."""
    if dist.is_initialized():
        agree()
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def agree(flags: bool | tuple[bool, ...] = False) -> bool | tuple[bool, ...]:
    """Waits for all processes; True on all of them where any says so, each flag by itself.
    All say so: not agree(not flag). They meet over gloo: no GPU needed."""
    if ranks()[1] == 1:
        return flags
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    said = torch.tensor(flags, dtype=torch.int32)
    dist.all_reduce(said, dist.ReduceOp.MAX)
    return tuple(map(bool, said)) if isinstance(flags, tuple) else bool(said)


def mean(values: dict[str, float]) -> dict[str, float]:
    """Each value averaged over the processes, which all give the same names in the same order."""
    if ranks()[1] == 1:
        return values
    total = torch.tensor(list(values.values()), dtype=torch.float64)
    dist.all_reduce(total)
    return dict(zip(values, (total / ranks()[1]).tolist()))


def averaged(tensor: Tensor) -> Tensor:
    """The mean of the processes' tensors of one shape."""
    if ranks()[1] > 1:
        dist.all_reduce(tensor)
        tensor = tensor / ranks()[1]
    return tensor


class Watch:
    """Ends a run that hangs: `with Watch("distill", 600) as watch`, and watch.reach(step) before each step's
    first collective, when its batch is there. Once no process has got further for timeout_s, each says who is
    behind and where itself is, and exits with code 1.

    A thread of each process puts its step into torchrun's store and reads those of the others, so it also
    works while all wait inside a collective. What takes longer than timeout_s must be outside or call reach.
    """

    def __init__(self, stage: str, timeout_s: float):
        self.stage, self.timeout_s, self.pause = stage, timeout_s, min(5, timeout_s / 10)
        self.reached, self.ended = 0, threading.Event()

    def reach(self, step: int) -> None:
        self.reached = step + 1

    def __enter__(self) -> "Watch":
        if ranks()[1] > 1:
            threading.Thread(target=self._look, name="watch", daemon=True).start()
        return self

    def __exit__(self, kind, error, trace) -> None:
        if kind is None:
            agree()                        # a process that is through does not look like one that hangs
        self.ended.set()

    def _look(self) -> None:
        rank, world = ranks()
        try:
            store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False,
                                  timeout=timedelta(seconds=self.timeout_s))
            published, steps, since = 0, [], time.monotonic()
            while not self.ended.wait(self.pause):
                reached, before = self.reached, steps
                store.add(f"{self.stage}/{rank}", reached - published)
                published, steps = reached, [store.add(f"{self.stage}/{i}", 0) for i in range(world)]
                if steps != before:
                    since = time.monotonic()
                elif time.monotonic() - since > self.timeout_s:
                    return self._end(self._blame(steps))
        except dist.DistError as error:
            if not self.ended.is_set():
                self._end(f"{self.stage}: the processes' common store is gone ({error})")

    def _blame(self, steps: list[int]) -> str:
        first, last = max(steps), min(steps)
        if first == last:
            where = f"got past step {first - 1}" if first else "reached a step"
            return f"{self.stage}: no rank {where} within {self.timeout_s:g} s"
        late = [str(i) for i, step in enumerate(steps) if step == last]
        return (f"{self.stage}: rank{'s' * (len(late) > 1)} {', '.join(late)} did not reach step {first - 1} "
                f"within {self.timeout_s:g} s")

    def _end(self, line: str) -> None:
        stack = traceback.format_stack(sys._current_frames()[threading.main_thread().ident])
        print(f"rank {ranks()[0]} is at\n{''.join(stack)}{line}", file=sys.stderr, flush=True)
        time.sleep(2 * self.pause)         # so that the others speak too: the store may go with this process
        os._exit(1)                        # the main thread may never return from its collective


def gathered(tensor: Tensor) -> Tensor:
    """The tensors of all processes, of one shape and on the CPU, joined along their first axis."""
    if ranks()[1] == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(ranks()[1])]
    dist.all_gather(parts, tensor)
    return torch.cat(parts)


# networks

def mesh(device: torch.device, replicas: int) -> DeviceMesh | None:
    """`replicas` copies of what is sharded, each over world / replicas processes that follow each other;
    None for one process."""
    world = ranks()[1]
    if replicas < 1 or world % replicas:
        raise InputError(f"--replicas: found {replicas}, a divisor of the {world} processes accepted")
    if world == 1:
        return None
    return init_device_mesh(device.type, (replicas, world // replicas), mesh_dim_names=("replicate", "shard"))


def checkpointed(model: MMDiT, keep: str) -> MMDiT:
    """Each block computes again in the backward pass what it does not keep: "full" keeps its inputs,
    "selective" also the outputs of its attentions, "none" everything. In place; parameters keep their names;
    gradients stay bit for bit, passes without gradient as they were."""
    if keep not in ("none", "selective", "full"):
        raise InputError(f"checkpointing: found {keep!r}, none, selective and full accepted")
    if keep != "none":
        some = ({"context_fn": partial(create_selective_checkpoint_contexts, ATTENTION)}
                if keep == "selective" else {})
        for block in model.joint_blocks:
            block.forward = partial(_recomputed, block.forward, some)    # deepcopy would not enter a closure
    return model


def _recomputed(forward: Callable, some: dict, *args):
    """Ours, because torch.compile starts at no frame of torch's own. No block draws random numbers."""
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **some)


def shard(model: MMDiT, mesh: DeviceMesh | None) -> MMDiT:
    """Shards block by block, then the rest, in place; on the device or on meta. What is frozen must be so
    before. Parameters travel in the dtype that the model computes in, gradients in at least fp32.

    Everything is resharded after each forward, the root too: after a forward without gradient it would else
    stay whole, and optimizer, clip and average would meet other tensors than the sharded ones.
    """
    if mesh is None:
        return model
    stored = model.final_layer.linear.weight.dtype
    policy = MixedPrecisionPolicy(param_dtype=model.compute_dtype if model.compute_dtype != stored else None,
                                  reduce_dtype=torch.promote_types(stored, torch.float32),
                                  cast_forward_inputs=False)             # x and sigma keep their precision
    for module in (*model.joint_blocks, model):
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    return model


def load(model: MMDiT, tensors: Mapping[str, Tensor], device: torch.device) -> MMDiT:
    """Gives a model on meta, sharded or not, memory on `device` and the values of `tensors`, whole ones by
    name, in the model's dtypes. Tensor by tensor, and of each only this process's rows."""
    model.to_empty(device=device)
    fill(model.state_dict(), tensors)
    return model


@torch.no_grad()
def fill(targets: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Copies to each target, sharded or not, its rows of the whole tensor of that name."""
    for name, target in targets.items():
        if name not in tensors or tensors[name].shape != target.shape:
            found = list(tensors[name].shape) if name in tensors else "nothing"
            raise InputError(f"{name}: found {found}, {list(target.shape)} accepted")
        rows = tensors[name]
        if isinstance(target, DTensor):
            size, index = target.device_mesh["shard"].size(), target.device_mesh.get_local_rank("shard")
            count = -(-len(rows) // size)  # as torch.chunk: the last may have fewer or none
            rows, target = rows[index * count:(index + 1) * count], target.to_local()
        target.copy_(rows)


def full(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor | None]]:
    """(name, whole tensor on the CPU) in rank 0, (name, None) elsewhere, gathered one at a time;
    all processes must go through all of them."""
    rank = ranks()[0]
    for name, tensor in tensors.items():
        whole = tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()
        yield name, None if rank else whole.cpu()


# gradients

def accumulate(model: nn.Module, last: bool) -> None:
    """Before the backward pass of a micro-batch: is it the step's last one? Shards' gradients are summed at
    each, so none is ever held whole; copies' only at the last."""
    if isinstance(model, FSDPModule):
        model.set_requires_all_reduce(last)


class Norms(NamedTuple):
    """Norms of a network's gradients before clipping, the same in all processes."""
    total: Tensor    # []
    each: Tensor     # [p], of the parameters in order; 0 where one has no gradient


def clip(module: nn.Module, max_norm: float) -> Norms:
    """Scales the gradients of a network, sharded or not, to at most `max_norm` in all; nothing waits."""
    params = list(module.parameters())
    grads = [p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad
             for p in params if p.grad is not None]
    norms = iter(torch._foreach_norm(grads))
    none = torch.zeros((), device=grads[0].device, dtype=torch.promote_types(grads[0].dtype, torch.float32))
    squares = torch.stack([none if p.grad is None else next(norms).to(none) for p in params]).square()
    if isinstance(params[0], DTensor):
        dist.all_reduce(squares, group=params[0].device_mesh.get_group("shard"))
    total = squares.sum().sqrt()
    torch._foreach_mul_(grads, (max_norm / (total + 1e-6)).clamp(max=1))
    return Norms(total, squares.sqrt())


def average_gradients(module: nn.Module) -> None:
    """Gradients of a network that every process has whole become their mean over the processes,
    in one collective, in at least fp32. All its parameters must have one."""
    if ranks()[1] == 1:
        return
    grads = [p.grad for p in module.parameters()]
    flat = torch.cat([g.flatten() for g in grads])
    flat = flat.to(torch.promote_types(flat.dtype, torch.float32))
    dist.all_reduce(flat)
    parts = (flat / ranks()[1]).split([g.numel() for g in grads])
    torch._foreach_copy_(grads, [part.view_as(g) for part, g in zip(parts, grads)])


@torch.no_grad()
def broadcast(module: nn.Module) -> None:
    """Parameters and buffers of rank 0 for all."""
    if ranks()[1] > 1:
        for tensor in (*module.parameters(), *module.buffers()):
            dist.broadcast(tensor, 0)
