"""Build the arguments that functions take from the options of a run."""
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

import kernels
from ladd.cli import must
from ladd.config import Config, from_json
from ladd.core.discriminator import Discriminator, DiscriminatorConfig
from ladd.core.mmdit import MMDiT, MMDiTConfig, shrunk
from ladd.data.batches import Batching
from ladd.data.files import read_json
from ladd.engine import parallel
from ladd.engine.inputs import Needs
from ladd.engine.memory import memory_plan
from ladd.engine.networks import (Compute, LoraConfig, OnMeta, add_lora, make_compute,
                                  uses_triton)
from ladd.engine.run import pick_device
from ladd.toy.prompts import tokens_of
from ladd.toy.scenes import ToyConfig


def read_config(run: Path) -> Config:
    """Return the configuration of a run folder."""
    return from_json(read_json(run / "config.json", dict), run / "config.json")


def compute_of(c: Config) -> Compute:
    """Return how this process computes; raise InputError if the device cannot."""
    compute = make_compute(pick_device(c.device), c.device, c.kernels, c.precision, c.compile,
                           c.recompute)
    if c.dry_run and c.real and c.precision == "auto":
        compute = compute._replace(dtype=torch.bfloat16)       # the plan is for a GPU
    if c.teacher_fp8:
        must(compute.dtype == torch.bfloat16, f"--teacher-fp8 requires bf16 (got {compute.dtype})")
        must(compute.device.type == "cpu" or torch.cuda.get_device_capability() >= (9, 0),
             "--teacher-fp8 requires a GPU of compute capability 9.0")
    return compute


def toy_of(c: Config) -> ToyConfig | None:
    """Return the settings of the toy dataset, or None for real images."""
    return None if c.real else c.group(ToyConfig)


def needs_of(c: Config) -> Needs:
    """Return what the run requires of its teacher."""
    return Needs(c.model, c.real, c.patches, c.taps, c.student_depth, c.task)


def student_lora(c: Config) -> LoraConfig | None:
    """Return the LoRA that the student trains, or None if it trains all weights."""
    return LoraConfig(c.lora, c.lora_targets, c.seed) if c.lora else None


def teacher_lora(c: Config) -> LoraConfig | None:
    """Return the LoRA that the teacher trains on --base, or None if it trains all weights."""
    return LoraConfig(c.teacher_lora, c.lora_targets, c.seed) if c.teacher_lora else None


def heads_of(c: Config, teacher: MMDiTConfig) -> DiscriminatorConfig:
    """Return the sizes of the discriminator heads for that teacher."""
    return DiscriminatorConfig(c.taps, teacher.width, teacher.pooled_dim, c.head_width)


def text_tokens(c: Config) -> int:
    """Return the number of text tokens per prompt."""
    return 77 + c.t5_tokens if c.real else tokens_of(c.group(ToyConfig))


def batching_of(c: Config) -> Batching:
    """Return which part of each step's batch this process takes, in which micro-batches."""
    rank, world = parallel.ranks()
    return Batching(c.seed, c.batch, c.micro(world), c.heads_first, rank, world)


def networks_on_meta(c: Config, teacher: MMDiTConfig, dtype: torch.dtype) -> OnMeta:
    """Return the networks of a step without memory, for plans and counts: the teacher in the
    compute dtype, student and heads in fp32."""
    ops, adapter = kernels.load("torch"), student_lora(c)
    with torch.device("meta"):
        frozen = MMDiT(teacher, ops, dtype).to(dtype).requires_grad_(False)
        student = MMDiT(shrunk(frozen, c.student_depth)[0], ops, dtype)
        if adapter:
            add_lora(student.to(dtype), adapter)
        return OnMeta(frozen, student, Discriminator(heads_of(c, teacher), ops))


def plan_of(c: Config, networks: OnMeta, compute: Compute,
            world: int) -> Callable[..., dict[str, int]]:
    """Return the memory_plan of a step in `world` processes as a function of shard and
    teacher_shard.

    A dry run of a real preset without a GPU plans for a GPU on which the Triton kernels pass their
    checks.
    """
    (h, w), micro = c.hw[0], c.micro(world)
    device = compute.device.type
    fused = uses_triton(compute.ops)
    if c.dry_run and c.real and device != "cuda":
        device = "cuda"
        fused = c.kernels != "torch" and c.precision != "fp32"
    more = round(c.mismatched * micro) + micro * (c.r1_weight > 0)      # mismatched, R1
    return partial(memory_plan, networks.student, networks.teacher, networks.heads, micro, more,
                   text_tokens(c), h * w // 256, c.recompute, fused, world,
                   accumulate=c.batch // world // micro, repeats=c.heads_repeats,
                   shared=not c.teacher_fp8, device=device)
