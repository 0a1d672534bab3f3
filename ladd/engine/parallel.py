"""The processes of a run: torchrun starts several; without it there is one, with nothing to do.

Each process gets its own samples of the batch, and gradients are averaged over the processes. One
code path (FSDP2) serves all layouts of a network that trains, as a mesh ("replicate", "shard"):
(world, 1) replicates it in each process, (1, world) shards it over all of them, (n, world / n)
shards it within n groups. Order: checkpointed, compiled, shard, load; then the optimizer.
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
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from ladd.cli import must
from ladd.core.mmdit import MMDiT

aten = torch.ops.aten
# what selective checkpointing keeps: it takes the most time to compute for its size
ATTENTION = [torch.ops.ladd.joint_attention_forward.default,
             torch.ops.ladd.joint_attention_forward_gluon.default,
             aten._scaled_dot_product_flash_attention_for_cpu.default,
             aten._scaled_dot_product_flash_attention.default,
             aten._scaled_dot_product_efficient_attention.default,
             aten._scaled_dot_product_cudnn_attention.default,
             aten._scaled_dot_product_fused_attention_overrideable.default]


# --- processes ---

def ranks() -> tuple[int, int]:
    """Return (rank of this process, number of processes), as torchrun sets them. Without
    WORLD_SIZE there is one process, whatever else is left in the environment."""
    world = env_number("WORLD_SIZE", 1)
    rank = env_number("RANK", 0) if "WORLD_SIZE" in os.environ else 0
    must(rank < world, f"environment: RANK must be below WORLD_SIZE, {world} (got {rank})")
    return rank, world


def env_number(name: str, default: int) -> int:
    """Return the number in an environment variable."""
    text = os.environ.get(name, str(default))
    must(text.isascii() and text.isdecimal() and len(text) < 10,
         f"environment: {name} must be a whole number (got {text!r})")
    return int(text)


def start(device: torch.device, timeout_s: float) -> None:
    """Join the processes of torchrun, each with its own `device`.

    A collective fails after twice `timeout_s`, so that Watch, which can name the rank that is
    missing, ends the run first.
    """
    world = ranks()[1]
    if world == 1:
        return
    absent = [n for n in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if n not in os.environ]
    must(not absent, f"environment: WORLD_SIZE is {world} without {', '.join(absent)}; start "
         "several processes with torchrun")
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                            timeout=timedelta(seconds=2 * timeout_s))
    sys.excepthook = _exit_after_error


def _exit_after_error(kind, error, trace) -> None:
    """Print an uncaught error and exit with code 1."""
    traceback.print_exception(kind, error, trace)
    leave(1)


def leave(code: int) -> None:
    """Exit this process with `code`, among several without the interpreter's shutdown: networks
    hold the process groups, so a group's thread may release the tensors of the last collective
    while the interpreter shuts down, and then aborts the process."""
    if "WORLD_SIZE" not in os.environ:
        sys.exit(code)
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.flush()
    os._exit(code)


def finish() -> None:
    """Wait for all processes, then exit this one with code 0; do nothing in a run of one process.

    Do not call it after an error: other processes may never arrive, and torchrun ends them.
    """
    if dist.is_initialized():
        barrier()
        dist.destroy_process_group()
        leave(0)


def barrier() -> None:
    """Wait until all processes are here. It needs no GPU."""
    any_rank(False)


def any_rank(flags: bool | tuple[bool, ...]) -> bool | tuple[bool, ...]:
    """Return the logical OR of each flag over all processes; also a barrier."""
    if ranks()[1] == 1:
        return flags
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    counts = torch.tensor(flags, dtype=torch.int32)
    dist.all_reduce(counts, dist.ReduceOp.MAX)
    return tuple(map(bool, counts)) if isinstance(flags, tuple) else bool(counts)


def mean(values: dict[str, float]) -> dict[str, float]:
    """Return each value's mean over the processes, which must give the same names in one order."""
    if ranks()[1] == 1:
        return values
    means = averaged(torch.tensor([*values.values()], dtype=torch.float64))
    return dict(zip(values, means.tolist()))


def averaged(tensor: Tensor) -> Tensor:
    """Return the mean over the processes of a tensor of one shape, which is overwritten."""
    if ranks()[1] > 1:
        dist.all_reduce(tensor)
        tensor = tensor / ranks()[1]
    return tensor


class Watch:
    """End a run that hangs.

        with Watch("distill", 600) as watch:
            watch.heartbeat(step)       # in each step, before its first collective

    When no process has made progress for timeout_s, each prints which ranks are behind and its own
    stack, and exits with code 1. A thread in each process writes its step to torchrun's store and
    reads those of the others, so it also works while all wait inside a collective. Work that takes
    longer than timeout_s must be outside of the block or call heartbeat.
    """

    def __init__(self, stage: str, timeout_s: float):
        self.stage, self.timeout_s, self.pause = stage, timeout_s, min(5, timeout_s / 10)
        self.reached, self.ended = 0, threading.Event()

    def heartbeat(self, step: int) -> None:
        self.reached = step + 1

    def __enter__(self) -> "Watch":
        if ranks()[1] > 1:
            threading.Thread(target=self._watch, name="watch", daemon=True).start()
        return self

    def __exit__(self, kind, error, trace) -> None:
        if kind is None:
            barrier()      # a process that left early would look like one that hangs
        self.ended.set()

    def _watch(self) -> None:
        rank, world = ranks()
        try:
            store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]),
                                  is_master=False, timeout=timedelta(seconds=self.timeout_s))
            published, before, since = 0, [], time.monotonic()
            while not self.ended.wait(self.pause):
                reached = self.reached          # the main thread may change it meanwhile
                store.add(f"{self.stage}/{rank}", reached - published)
                published = reached
                steps = [store.add(f"{self.stage}/{i}", 0) for i in range(world)]
                if steps != before:
                    before = steps
                    since = time.monotonic()
                elif time.monotonic() - since > self.timeout_s:
                    return self._end(self._blame(steps))
        except dist.DistError as error:
            if not self.ended.is_set():
                self._end(f"{self.stage}: torchrun's store is gone ({error})")

    def _blame(self, steps: list[int]) -> str:
        first, last = max(steps), min(steps)
        if first == last:
            where = f"got past step {first - 1}" if first else "reached a step"
            return f"{self.stage}: no rank {where} within {self.timeout_s:g} s"
        late = [str(i) for i, step in enumerate(steps) if step == last]
        noun = "rank" if len(late) == 1 else "ranks"
        return (f"{self.stage}: {noun} {', '.join(late)} did not reach step {first - 1} within "
                f"{self.timeout_s:g} s")

    def _end(self, line: str) -> None:
        stack = traceback.format_stack(sys._current_frames()[threading.main_thread().ident])
        print(f"rank {ranks()[0]} is at\n{''.join(stack)}{line}", file=sys.stderr, flush=True)
        time.sleep(2 * self.pause)      # the store may end with this process: let the others report
        os._exit(1)                     # the main thread may never return from its collective


def gathered(tensor: Tensor) -> Tensor:
    """Concatenate the CPU tensors of all processes, of one shape, along their first axis."""
    if ranks()[1] == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(ranks()[1])]
    dist.all_gather(parts, tensor)
    return torch.cat(parts)


# --- networks ---

def mesh(device: torch.device, replicas: int, timeout_s: float) -> DeviceMesh | None:
    """Return the mesh of `replicas` copies, each sharded over world / replicas consecutive
    processes; None for one process. `timeout_s` as in `start`."""
    world = ranks()[1]
    if world == 1:
        return None
    grid, groups = torch.arange(world).view(replicas, -1), []
    limit = timedelta(seconds=2 * timeout_s)
    # init_device_mesh would give each new group half an hour, whatever the timeout of the run
    for members in (grid.t(), grid):
        groups.append(dist.group.WORLD if len(members) == 1 else
                      dist.new_subgroups_by_enumeration(members.tolist(), limit)[0])
    return DeviceMesh.from_group(groups, device.type, grid, mesh_dim_names=("replicate", "shard"))


def checkpointed(model: MMDiT, recompute: str) -> MMDiT:
    """Checkpoint the activations of each block, in place; return the network.

    In the backward pass "full" recomputes a block from its inputs, "selective" all but the outputs
    of its attentions, "none" nothing. Parameters keep their names, gradients keep every bit, and
    passes without a gradient do not change.
    """
    must(recompute in ("none", "selective", "full"),
         f"--recompute must be none, selective or full (got {recompute})")
    if recompute != "none":
        options = {}
        if recompute == "selective":
            options["context_fn"] = partial(create_selective_checkpoint_contexts, ATTENTION)
        for block in model.joint_blocks:
            # a partial, because deepcopy does not copy what a closure refers to
            block.forward = partial(_recomputed, block.forward, options)
    return model


def _recomputed(forward: Callable, options: dict, *args):
    """Call `forward` with checkpointing. The frame must be ours: torch.compile starts at none of
    torch's own. No block draws random numbers, so their state is not kept."""
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **options)


def shard(model: MMDiT, mesh: DeviceMesh | None) -> MMDiT:
    """Shard a network in place, on the device or on meta: each block, then the rest; return it.

    Parameters must be frozen before. They are gathered in the dtype that the network computes in,
    gradients are reduced in at least fp32. Everything is resharded after each forward, the root
    too: otherwise it would stay gathered after a forward without a gradient, and optimizer, clip
    and EMA would get other tensors than the sharded ones.
    """
    if mesh is None:
        return model
    stored, compute = model.final_layer.linear.weight.dtype, model.compute_dtype
    policy = MixedPrecisionPolicy(param_dtype=None if compute == stored else compute,
                                  reduce_dtype=torch.promote_types(stored, torch.float32),
                                  cast_forward_inputs=False)     # x and sigma keep their precision
    for module in (*model.joint_blocks, model):
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    return model


def load(model: MMDiT, tensors: Mapping[str, Tensor], device: torch.device) -> MMDiT:
    """Allocate a network on meta, sharded or not, on `device`, and fill it with the full tensors of
    these names, in the network's dtypes; return it. Of each only this process's rows are copied."""
    model.to_empty(device=device)
    fill(model.state_dict(), tensors)
    return model


@torch.no_grad()
def fill(targets: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Copy to each target, sharded or not, its rows of the full tensor of that name."""
    for name, target in targets.items():
        rows = tensors.get(name)
        must(rows is not None, f"{name} must have shape {list(target.shape)} (got no such tensor)")
        must(rows.shape == target.shape,
             f"{name} must have shape {list(target.shape)} (got {list(rows.shape)})")
        if isinstance(target, DTensor):
            count = -(-len(rows) // target.device_mesh["shard"].size())     # as in torch.chunk
            first = count * target.device_mesh.get_local_rank("shard")
            rows, target = rows[first:first + count], target.to_local()
        target.copy_(rows)


def full(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor | None]]:
    """Yield (name, full tensor on the CPU) in process 0 and (name, None) in others. Tensors are
    gathered one at a time; all processes must consume all of them."""
    rank = ranks()[0]
    for name, tensor in tensors.items():
        tensor = tensor.detach()
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()
        yield name, None if rank else tensor.cpu()


# --- gradients ---

def accumulate(model: nn.Module, last: bool) -> None:
    """Prepare the backward pass of a micro-batch, which is the step's `last` one or not.

    Gradients are reduced over shards after each micro-batch, so that no process ever holds all of
    them, but over replicas only after the last one.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_all_reduce(last)


class Norms(NamedTuple):
    """Gradient norms of a network, the same in all processes."""
    total: Tensor    # []
    each: Tensor     # [p] in the order of the parameters, 0 without a gradient


def gradient_norms(module: nn.Module) -> Norms:
    """Return the norms of the gradients of a network, sharded or not. The host does not wait for
    the device."""
    params = list(module.parameters())
    grads = [p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad
             for p in params if p.grad is not None]
    norms = iter(torch._foreach_norm(grads))
    dtype = torch.promote_types(grads[0].dtype, torch.float32)
    zero = torch.zeros((), device=grads[0].device, dtype=dtype)
    squares = torch.stack([zero if p.grad is None else next(norms).to(zero)
                           for p in params]).square()
    if isinstance(params[0], DTensor):
        dist.all_reduce(squares, group=params[0].device_mesh.get_group("shard"))
    return Norms(squares.sum().sqrt(), squares.sqrt())


def average_gradients(module: nn.Module) -> None:
    """Average the gradients of a replicated network over the processes, in one collective and in
    at least fp32. All its parameters must have a gradient."""
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
    """Copy the parameters and buffers of process 0 to all others."""
    if ranks()[1] > 1:
        for tensor in (*module.parameters(), *module.buffers()):
            dist.broadcast(tensor, 0)
