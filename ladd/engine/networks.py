"""The networks of a run: how they compute, where they are stored, how they are built and saved."""
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

import kernels
from kernels import Kernels
from ladd.cli import InputError
from ladd.core import flow, lora
from ladd.core.discriminator import Discriminator
from ladd.core.lora import Factors, Lora
from ladd.core.mmdit import MMDiT, MMDiTConfig, shrunk
from ladd.engine import parallel
from ladd.engine.run import compute_dtype, has_bf16
from ladd.sd3 import checkpoint, lora_files


def factors(model: nn.Module) -> dict[str, Factors]:
    """Return the LoRA of a network by layer, gathered on the CPU of process 0 and empty in others.
    All processes must call it."""
    gathered = dict(parallel.full(lora.parameters(model)))
    if parallel.ranks()[0]:
        return {}
    return {name: Factors(gathered[f"{name}.lora_a"], gathered[f"{name}.lora_b"], layer.alpha)
            for name, layer in lora.of_kind(model, Lora).items()}


# --- how they compute ---

class Compute(NamedTuple):
    """How the networks of this process compute, and where they are stored."""
    device: torch.device
    ops: Kernels
    dtype: torch.dtype                   # of activations and of frozen weights
    compile: bool = False                # torch.compile of each block
    recompute: str = "none"              # activation checkpointing: none, selective or full
    mesh: DeviceMesh | None = None       # of what trains; None: one process
    shard_teacher: bool = False          # else the frozen teacher is replicated


def make_compute(device: torch.device, flag: str, ops: str, precision: str, compile: str,
                 recompute: str) -> Compute:
    """Return how networks compute on `device`, from the values of --device (`flag`), --kernels
    (`ops`), --precision, --compile and --recompute."""
    compiles = compile == "on" or compile == "auto" and device.type == "cuda"
    if compiles and device.type == "cpu":
        # as torch does, which tries no other
        compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
        try:
            subprocess.run([compiler, "--version"], check=True, capture_output=True)
        except (OSError, ValueError, subprocess.SubprocessError):
            raise InputError("--compile must be off or auto without a C++ compiler, which "
                             "torch.compile needs on the CPU (got on); the environment variable "
                             f"CXX names one (got {compiler!r})") from None
    return Compute(device, pick_kernels(ops, flag, precision), compute_dtype(precision, device),
                   compiles, recompute)


def pick_kernels(name: str, device: str, precision: str = "auto") -> Kernels:
    """Return the operations called auto, triton, gluon or torch for the device of that name.

    auto is torch on the CPU, and where activations are in fp32 because it was asked for or the GPU
    has no bf16: the kernels on a GPU compute in bf16. Raise InputError where they cannot run.
    """
    gpu = torch.cuda.is_available()
    why = ""
    if device == "cpu":
        why = "--device cpu"
    elif precision == "fp32":
        why = "--precision fp32"
    elif gpu and not has_bf16():
        why = f"{torch.cuda.get_device_name()}, which has no bf16"
    if name == "auto" and why:
        kernels.announce(f"kernels: torch ({why})")
        name = "torch"
    if name in ("triton", "gluon") and gpu and why:
        raise InputError(f"--kernels must be auto or torch for {why} (got {name})")
    try:
        return kernels.load(name)
    except ValueError as error:
        raise InputError(f"--{error}") from None


def compiled(model: MMDiT, compute: Compute) -> MMDiT:
    """Compile each block by itself, in place: one small graph serves all blocks of a kind.

    JointBlock.forward has graphs for each kind of block (plain, dual, last) and each use (training,
    with a gradient passing through, without one) of one size, and for any size once there was a
    second one. That is more than the eight after which torch gives up.
    """
    if compute.compile:
        torch._dynamo.config.recompile_limit = 64
        for block in model.joint_blocks:
            block.compile(fullgraph=True)
    return model


def frozen(model: MMDiT, dtype: torch.dtype, device: torch.device) -> MMDiT:
    """Return a copy with frozen weights in the compute dtype, for inference and for gradients
    through it. It is filled tensor by tensor: a memory-mapped network is never all in memory."""
    with torch.device("meta"):
        out = MMDiT(model.config, model.kernels, dtype).to(dtype).requires_grad_(False).eval()
    return parallel.load(out, model.state_dict(), device)


def inference(model: MMDiT, compute: Compute) -> MMDiT:
    """Return a replicated frozen copy in the compute dtype."""
    return compiled(frozen(model, compute.dtype, compute.device), compute)


# --- building ---

class LoraConfig(NamedTuple):
    """A LoRA that trains instead of all weights."""
    rank: int                    # alpha is the rank
    targets: tuple[str, ...]     # names of ladd.core.lora.TARGETS, or layers and patterns with *
    seed: int


def network(sizes: MMDiTConfig, tensors: Mapping[str, Tensor], compute: Compute, dtype: torch.dtype,
            trains: bool = False, sharded: bool = True, adapter: LoraConfig | None = None,
            also: str = "") -> MMDiT:
    """Return an MMDiT with the weights `tensors` in `dtype`, sharded over the mesh.

    With an `adapter` the weights are frozen in the compute dtype, and its matrices and the module
    `also` train. The network is built on meta and filled tensor by tensor, in each process with its
    own rows: neither a mapped file nor a sharded network is ever all in memory.
    """
    mesh = compute.mesh if sharded else None
    with torch.device("meta"):
        model = MMDiT(sizes, compute.ops, compute.dtype).to(compute.dtype if adapter else dtype)
    model.requires_grad_(trains)
    if adapter:
        tensors = {**tensors, **add_lora(model, adapter, also)}
        if not trains:
            model.requires_grad_(False)
    compiled(parallel.checkpointed(model, compute.recompute), compute)
    if not adapter or mesh:
        return parallel.load(parallel.shard(model, mesh), tensors, compute.device)
    # frozen tensors are shared: one copy serves student, EMA and teacher
    model.load_state_dict({name: tensors[name].to(compute.device, t.dtype, copy=t.requires_grad)
                           for name, t in model.state_dict(keep_vars=True).items()}, assign=True)
    return model


def add_lora(model: MMDiT, adapter: LoraConfig, also: str = "") -> dict[str, Tensor]:
    """Add a LoRA to `model` on the meta device; only it and the module `also` train, in fp32.
    Return its initial matrices, which are the same in every process."""
    targets = [name for word in adapter.targets for name in lora.TARGETS.get(word, (word,))]
    new = lora.add(model, adapter.rank, adapter.rank, targets, flow.generator(adapter.seed, 8))
    if also:
        model.get_submodule(also).float().requires_grad_()
    return new


def check_lora(sizes: MMDiTConfig, depth: int, teacher_lora: LoraConfig | None,
               student_lora: LoraConfig | None) -> None:
    """Raise InputError if a teacher of `sizes`, or its student of `depth` blocks (0: all), cannot
    have these LoRAs."""
    if not (teacher_lora or student_lora):
        return
    with torch.device("meta"):
        teacher = MMDiT(sizes, kernels.load("torch"))
        student = MMDiT(shrunk(teacher, depth)[0], teacher.kernels)
    for flag, adapter, model in (("--teacher-lora", teacher_lora, teacher),
                                 ("--lora", student_lora, student)):
        if adapter:
            try:
                add_lora(model, adapter)
            except InputError as error:
                raise InputError(f"{flag}: {error}") from None


def make_student(base: MMDiT, teacher: MMDiT, compute: Compute, depth: int,
                 adapter: LoraConfig | None) -> tuple[MMDiT, MMDiT]:
    """Return (student, EMA) in fp32 with the weights of the teacher `base`, `depth` of its blocks
    (0: all). With an `adapter` each is a LoRA on the frozen weights of `teacher`, which all three
    share in one process."""
    source = teacher if adapter and not compute.mesh else base
    sizes, tensors = shrunk(source, depth)
    student, ema = (network(sizes, tensors, compute, torch.float32, trains=trains, adapter=adapter)
                    for trains in (True, False))
    return student, ema


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that train, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


# --- checkpoints ---

def checkpoint_tensors(model: MMDiT, learner: MMDiT) -> dict[str, Tensor]:
    """Return the tensors to checkpoint: all weights of `model`, or with a LoRA those that train in
    `learner` (`model` itself, or the student of this EMA); the teacher's file has the rest."""
    tensors = model.state_dict()
    if not lora.parameters(model):
        return tensors
    return {name: tensors[name] for name in trainable(learner)}


def merged(model: MMDiT, initial: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of the weights used for inference. A LoRA is added in fp32 to the
    replicated weights `initial`, as they are stored; then only process 0 gets the values, and all
    processes must call it."""
    new = lora.parameters(model)
    if not new:
        return iter(model.state_dict().items())
    also = parallel.full({name: p for name, p in trainable(model).items() if name not in new})
    weights = {**initial, **{name: p for name, p in also if p is not None}}
    return lora.merged(weights, factors(model))


def refresh(eval_model: MMDiT, model: MMDiT, initial: Mapping[str, Tensor]) -> None:
    """Copy to `eval_model` the weights of `model` used for inference."""
    targets = eval_model.state_dict()
    for name, tensor in merged(model, initial):
        targets[name].copy_(tensor)


def save_network(model: MMDiT, initial: Mapping[str, Tensor], path: Path,
                 metadata: Mapping[str, str], origin: str) -> None:
    """Write the weights used for inference, and a LoRA also alone as ..._lora.safetensors, where
    `origin` names the network it belongs to. All processes must call it."""
    tensors = dict(parallel.full(dict(merged(model, initial))))
    adapters = factors(model)
    if parallel.ranks()[0] == 0:
        checkpoint.save_mmdit(model, path, metadata, tensors)
        if adapters:
            lora_files.save(path.with_name(f"{path.stem}_lora.safetensors"), adapters, model.config,
                            {**metadata, "base": origin})
    parallel.barrier()


# --- what is sharded ---

class OnMeta(NamedTuple):
    """The networks of a step on the meta device, with the reference operations."""
    teacher: MMDiT
    student: MMDiT
    heads: Discriminator


def uses_triton(ops: Kernels) -> bool:
    """Return whether these operations are the Triton kernels."""
    return ops.joint_attention in (kernels.attention.joint_attention,
                                   kernels.attention_gluon.joint_attention)


def choose_shards(memory: float, world: int, replicas: int, plan: Callable[..., dict[str, int]],
                  shard: str) -> tuple[int, int, dict[str, int]]:
    """Return (processes that share the student, those that share the teacher, their plan).

    shard "none" replicates both, "student" shards the student over world / replicas processes,
    "all" also the teacher; "auto" is the first of these that fits into `memory` bytes per GPU, or
    "all". plan(shard=, teacher_shard=) is a memory_plan.
    """
    n = world // replicas
    choices = {"none": (1, 1), "student": (n, 1), "all": (n, n)}
    for student, teacher in choices.values() if shard == "auto" else [choices[shard]]:
        planned = plan(shard=student, teacher_shard=teacher)
        if planned["sum"] <= memory:
            break
    return student, teacher, planned


def distribute(compute: Compute, shard: str, replicas: int, timeout_s: float,
               plan: Callable[..., dict[str, int]]) -> Compute:
    """Return `compute` with the mesh of this run's processes; rank 0 says what is sharded.
    `timeout_s` as in parallel.start."""
    rank, world = parallel.ranks()
    if world == 1:
        return compute
    device = compute.device
    cuda = device.type == "cuda"
    memory = torch.cuda.get_device_properties(device).total_memory if cuda else math.inf
    student, teacher, planned = choose_shards(memory, world, replicas, plan, shard)
    if rank == 0:
        where = {n: "replicated in every process" if n == 1 else f"sharded over {n} processes"
                 for n in (student, teacher)}
        print(f"{world} processes: student {where[student]}, teacher {where[teacher]}; planned "
              f"memory {planned['sum'] / 2 ** 30:.1f} GiB each")
    mesh = parallel.mesh(device, world // student, timeout_s)
    return compute._replace(mesh=mesh, shard_teacher=teacher > 1)
