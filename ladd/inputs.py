"""What a run is given, checked against its configuration before anything is made: the teacher and the network
it starts from, latents, pairs."""
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ladd import checkpoint, data, encode
from ladd.config import Config, InputError
from ladd.domain import Domain
from ladd.mmdit import MMDiT, MMDiTConfig, widened
from ladd.step import ops_of, teacher_config


def load_teacher(config: Config, path: Path) -> MMDiT:
    """The teacher in `path`, checked against the run:
    text width, channels, patch, positions, taps, student's depth."""
    return checked(config, path, checkpoint.load_mmdit(path, ops_of(config)))


def checked(config: Config, path: Path, teacher: MMDiT) -> MMDiT:
    """`teacher`, of `path`; InputError names what does not fit."""
    want = teacher_config(config)
    text = () if config.real else ("context_dim", "pooled_dim")
    for name in (*text, "in_channels", "out_channels", "patch"):
        found, expected = getattr(teacher.config, name), getattr(want, name)
        if found != expected:
            hint = {"in_channels": f" (--task {config.task}; --base widens a text-to-image network)",
                    "context_dim": " (--text-dim)", "pooled_dim": " (--text-dim)"}.get(name, "")
            raise InputError(f"{path}: found {name} {found}, the run takes {expected}{hint}")
    patches = max(max(hw) for hw in config.hw) // 16
    if teacher.config.pos_grid < patches:
        raise InputError(f"{path}: found positions for {teacher.config.pos_grid} patches a side, "
                         f"--sizes takes {patches}")
    if config.taps[-1] >= teacher.config.depth or config.student_depth > teacher.config.depth:
        raise InputError(f"{path}: --taps {','.join(map(str, config.taps))} and "
                         f"--student-depth {config.student_depth}: "
                         f"the teacher has {teacher.config.depth} block{'s' * (teacher.config.depth > 1)}")
    return teacher


def start_of(config: Config) -> tuple[MMDiTConfig, Mapping[str, Tensor]]:
    """(sizes, weights by name) that the teacher's training starts from: at random, or those of --base, whose
    new input channels get zeros, so that it starts as that network."""
    want = teacher_config(config)
    if not config.base:
        torch.manual_seed(config.seed)
        return want, MMDiT(want, ops_of(config)).state_dict()
    path = Path(config.base)
    if checkpoint.load_metadata(path).get("role") == "student":
        raise InputError(f"--base {path}: found a student, whose few steps a teacher is not to start from; "
                         "a teacher's file accepted")
    base = checkpoint.load_mmdit(path, ops_of(config))
    if base.config.in_channels not in (16, want.in_channels):       # another task's mean something else
        raise InputError(f"{path}: found {base.config.in_channels} input channels, 16 or the "
                         f"{want.in_channels} of --task {config.task} accepted")
    sizes, tensors = widened(base, want.in_channels)
    with torch.device("meta"):
        checked(config, path, MMDiT(sizes, ops_of(config)))
    return sizes, tensors


def load_data(config: Config, path: Path, teacher: MMDiTConfig, batch: int) -> data.Latents:
    """The latents in `path`, checked against the run: channels, text widths, a batch of every size."""
    latents = data.read_folder(path)
    found = latents.context.shape[-1], latents.pooled.shape[-1]
    wanted = teacher.context_dim, teacher.pooled_dim
    if found != wanted:
        raise InputError(f"{path}: found text of widths {found} (tokens, pooled), the teacher reads {wanted}")
    most = teacher.patch * teacher.pos_grid
    for hw, (x0, _) in latents.buckets.items():
        if max(hw) > most:
            raise InputError(f"{path}: found latents of {hw[0]}x{hw[1]}, at most {most} a side accepted, the "
                             "teacher's positions")
        if x0.shape[1] != 16 or latents.channels != config.beside or len(x0) - latents.holdout < batch:
            raise InputError(f"{path}: found {len(x0)} latents of {x0.shape[1]} channels, {latents.channels} "
                             f"beside them, and size {hw[0]}x{hw[1]}; 16, {config.beside} for --task "
                             f"{config.task}, and a batch of {batch} beside {latents.holdout} held out "
                             "expected")
    return latents


def load_pairs(config: Config, teacher: MMDiTConfig, domain: Domain) -> data.Latents | None:
    """What --pairs names, checked against the run: as load_data, encoders and VAE, and that each of its sizes
    gets a batch of generated latents."""
    if not config.pairs:
        return None
    pairs = load_data(config, Path(config.pairs), teacher, 1 if config.teacher else config.teacher_batch)
    for key, made, own in (("text", "text of the encoders", domain.provenance["encoders"]),
                           ("vae", "latents of the VAE", encode.fingerprint(config.encoders, ["vae"]))):
        if (found := pairs.provenance.get(key)) != own:
            raise InputError(f"{config.pairs}: found {made} {found}, {own} accepted (--encoders, --t5, "
                             "--t5-tokens)")
    n, size = len(pairs.buckets), config.data_batch
    least = n * size * math.ceil(max(config.batch + 2, config.batch * 16 / 15) / size)
    if config.data_size < least and not config.data and config.objective != "flow":
        raise InputError(f"--data-size: found {config.data_size}, at least {least} expected: a --batch of "
                         f"each of the {n} sizes of {config.pairs}")
    return pairs


def teacher_of(config: Config) -> Path:
    """The file of --teacher, or that of the run, which may be there or not."""
    return Path(config.teacher or Path("runs") / config.run_name / "checkpoints" / "teacher.safetensors")


def sizes_of(config: Config) -> MMDiTConfig:
    """Of the teacher, which may not be there yet."""
    if teacher_of(config).exists():
        return load_teacher(config, teacher_of(config)).config
    return start_of(config)[0] if config.base else teacher_config(config)
