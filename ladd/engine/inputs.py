"""Load and check the inputs of a run before anything is made: teacher, --base, latents."""
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import Kernels
from ladd.cli import must
from ladd.core.mmdit import MMDiT, MMDiTConfig, image_channels, widened
from ladd.data import shards
from ladd.sd3 import checkpoint


class Needs(NamedTuple):
    """Requirements of a run for its teacher."""
    sizes: MMDiTConfig        # channels, patch, text widths
    any_text: bool            # text widths are checked against real encoders instead
    patches: int              # on the longest side of an image
    taps: tuple[int, ...]     # blocks that the discriminator reads
    student_depth: int        # blocks of the student, 0: all
    task: str


def load_teacher(path: Path, needs: Needs, ops: Kernels) -> MMDiT:
    """Return the teacher in `path`; raise InputError if it does not fit the run."""
    teacher = checkpoint.load_mmdit(path, ops)
    check_fit(path, teacher.config, needs)
    return teacher


def check_fit(path: Path, c: MMDiTConfig, needs: Needs) -> None:
    """Raise InputError unless a teacher of the sizes `c`, loaded from `path`, fits the run."""
    hints = {"in_channels": f" (--task {needs.task}; --base widens a text-to-image network)",
             "context_dim": " (--set text_dim)", "pooled_dim": " (--set text_dim)"}
    text = () if needs.any_text else ("context_dim", "pooled_dim")
    for name in (*text, "in_channels", "out_channels", "patch"):
        got, wanted = getattr(c, name), getattr(needs.sizes, name)
        must(got == wanted, f"{path}: {name} must be {wanted}{hints.get(name, '')} (got {got})")
    must(c.pos_grid >= needs.patches, f"{path}: the position table must have at least "
         f"{needs.patches} patches per side for --sizes (got {c.pos_grid})")
    must(needs.taps[-1] < c.depth and needs.student_depth <= c.depth, f"{path}: --taps "
         f"{','.join(map(str, needs.taps))} and --student-depth {needs.student_depth} must fit a "
         f"teacher of depth {c.depth}")


def start_of(needs: Needs, base: str, seed: int,
             ops: Kernels) -> tuple[MMDiTConfig, Mapping[str, Tensor]]:
    """Return (sizes, weights by name) that the teacher's training starts from.

    The weights are random, or those of the file `base` with zeros for added input channels, so that
    the teacher starts as that network.
    """
    want = needs.sizes
    if not base:
        torch.manual_seed(seed)
        return want, MMDiT(want, ops).state_dict()
    path = Path(base)
    must(checkpoint.load_metadata(path).get("role") != "student",
         f"--base must be a teacher checkpoint; {path} is a few-step student")
    network = checkpoint.load_mmdit(path, ops)
    # 16 can be widened; the image channels of another task have another meaning
    must(network.config.in_channels in (16, want.in_channels), f"{path}: in_channels must be 16 or "
         f"{want.in_channels} for --task {needs.task} (got {network.config.in_channels})")
    sizes, tensors = widened(network, want.in_channels)
    check_fit(path, sizes, needs)
    return sizes, tensors


def teacher_sizes(path: Path, needs: Needs, base: str, ops: Kernels) -> MMDiTConfig:
    """Return the sizes of the teacher in `path`, or of the one that will be trained."""
    if path.exists():
        return load_teacher(path, needs, ops).config
    return start_of(needs, base, 0, ops)[0] if base else needs.sizes


def load_data(path: Path, teacher: MMDiTConfig, task: str, batch: int,
              made: Mapping[str, str] | None = None) -> shards.Latents:
    """Return the latents in `path`; raise InputError if text widths, sizes or channels do not fit
    the teacher, if a size has fewer samples than a batch and its held-out ones, or if other
    encoders, another VAE or another codec of toy images made them than those of the run, `made`."""
    latents = shards.read_folder(path)
    got = latents.context.shape[-1], latents.pooled.shape[-1]
    wanted = teacher.context_dim, teacher.pooled_dim
    must(got == wanted, f"{path}: text must have widths {wanted} (tokens, pooled), which the "
         f"teacher reads (got {got})")
    about = latents.provenance
    made = dict(made or {})
    codec = made.pop("codec", None)
    must(codec in (None, about.get("codec")), f"{path}: toy images must be coded by {codec} (got "
         f"{about.get('codec', 'a former version')}); generate them again")
    must(not made or bool({"encoders", "text"} & set(about)), f"{path}: text must come from "
         "encoders that it names; make the folder by ladd.encode, sample.py or train.py")
    for key, own in made.items():
        must(about.get(key, own) == own, f"{path}: {key} must come from {own} (got "
             f"{about.get(key)}); give the same --encoders, --t5 and --t5-tokens")
    must(latents.channels == image_channels(task), f"{path}: latents for --task {task} must have "
         f"{image_channels(task)} image channels (got {latents.channels})")
    longest = teacher.patch * teacher.pos_grid
    for hw, (x0, _) in latents.buckets.items():
        size = f"{hw[0]}x{hw[1]}"
        must(max(hw) <= longest, f"{path}: latents must be at most {longest} per side, the "
             f"teacher's positions (got {size})")
        must(x0.shape[1] == 16, f"{path}: latents must have 16 channels (got {x0.shape[1]})")
        must(len(x0) - latents.holdout >= batch, f"{path}: latents of {size} must be at least "
             f"{batch}, a batch, and {latents.holdout} held out (got {len(x0)})")
    return latents
