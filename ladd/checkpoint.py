"""Networks and run states on disk: safetensors and JSON, no pickle; a file or folder is whole or absent."""
import math
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels import Kernels
from kernels import load as load_kernels
from ladd.config import InputError
from ladd.data import publish, read_json, read_tensors, sync, write_json, write_tensors
from ladd.mmdit import HEAD_DIM, MMDiT, MMDiTConfig

STUDENT = "checkpoints/student.safetensors"   # what a run folder stands for
PREFIX = "model.diffusion_model."             # in published files, which may hold VAE and text encoders too


def save_mmdit(model: MMDiT, path: str | Path, metadata: dict[str, str]) -> None:
    """Writes the model in the published single-file layout, dtypes kept, `metadata` in the header; the header
    also says what the network predicts unless that is v, as in published files."""
    header = metadata if model.config.predicts == "v" else {**metadata, "predicts": model.config.predicts}
    publish(Path(path), lambda path: write_tensors(path, model.state_dict(), header))


def load_mmdit(path: str | Path, kernels: Kernels | None = None) -> MMDiT:
    """The model of a single file or a run folder's student: sizes from the tensors' shapes, dtypes as stored.

    Names may start with PREFIX. The weights stay memory-mapped until they are moved or written to.
    It predicts what the header says, v where it says nothing, as in published files.
    Raises InputError that names missing, unknown and misshapen tensors.
    """
    path = model_file(path)
    tensors, metadata = read_tensors(path)
    predicts = metadata.get("predicts", "v")
    if predicts not in ("v", "x0"):
        raise InputError(f"{path}: found a network that predicts {predicts!r}, accepted are v and x0")
    if any(name.startswith(PREFIX) for name in tensors):
        tensors = {name.removeprefix(PREFIX): t for name, t in tensors.items() if name.startswith(PREFIX)}
    shapes = {name: list(t.shape) for name, t in tensors.items()}
    with torch.device("meta"):   # no memory, no initialisation: every tensor is assigned below
        model = MMDiT(replace(infer_config(shapes, path), predicts=predicts), kernels or load_kernels())
    wanted = {name: list(t.shape) for name, t in model.state_dict().items()}
    wrong = [name for name in wanted if shapes.get(name, wanted[name]) != wanted[name]]
    faults = {"missing": [name for name in wanted if name not in shapes],
              "unknown": [name for name in shapes if name not in wanted],
              "misshapen": [f"{name} {shapes[name]} ({wanted[name]} accepted)" for name in wrong],
              "not floating": [name for name, t in tensors.items() if not t.is_floating_point()]}
    found = [f"{len(names)} {kind}: {', '.join(names[:3])}" for kind, names in faults.items() if names]
    if found:
        raise InputError(f"{path}: of {len(wanted)} tensors of this MMDiT, found {'; '.join(found)}")
    model.load_state_dict(tensors, assign=True)
    return model


def load_metadata(path: str | Path) -> dict[str, str]:
    """The metadata in the header of a single file, or of a run folder's student."""
    return read_tensors(model_file(path))[1]


def model_file(path: str | Path) -> Path:
    path = Path(path)
    if path.is_dir() and not (path / STUDENT).exists():
        raise InputError(f"{path}: found no {STUDENT}, a safetensors file or a finished run accepted")
    return path / STUDENT if path.is_dir() else path


def infer_config(shapes: dict[str, list[int]], path: Path) -> MMDiTConfig:
    """The configuration that tensors of these shapes belong to; InputError where there is none."""
    def shape(name: str, rank: int) -> list[int]:
        if len(shapes.get(name, [])) != rank or 0 in shapes[name]:
            found = shapes.get(name, f"no {name} among {len(shapes)} tensors")
            raise InputError(f"{path}: found {found}, an MMDiT's {name} of rank {rank} accepted")
        return shapes[name]

    width, channels, patch, _ = shape("x_embedder.proj.weight", 4)
    matches = [re.fullmatch(r"joint_blocks\.(\d+)\.(.+)", name) for name in shapes]
    blocks = [(int(m[1]), m[2]) for m in matches if m]
    if not blocks or width % HEAD_DIM:
        raise InputError(f"{path}: found width {width} and {len(blocks)} tensors named joint_blocks.*, "
                         f"an MMDiT of heads of {HEAD_DIM} accepted")
    return MMDiTConfig(
        depth=max(index for index, _ in blocks) + 1,
        width=width,
        context_dim=shape("context_embedder.weight", 2)[1],
        pooled_dim=shape("y_embedder.mlp.0.weight", 2)[1],
        in_channels=channels,
        out_channels=shape("final_layer.linear.weight", 2)[0] // patch ** 2,
        patch=patch,
        qk_norm=any(".ln_q." in name for _, name in blocks),
        dual_blocks=tuple(sorted({index for index, name in blocks if name.startswith("x_block.attn2.")})),
        pos_grid=math.isqrt(shape("pos_embed", 3)[1]))


def save_state(folder: str | Path, step: int, tensors: dict[str, Tensor], meta: dict[str, Any],
               keep: int = 2) -> None:
    """Writes folder/step_000123 (state.safetensors, meta.json), then removes all but the last `keep` states.

    A kill at any moment leaves at least the states that were there; what it left half done is removed here.
    """
    def write(path: Path) -> None:
        path.mkdir()
        write_tensors(path / "state.safetensors", tensors)
        write_json(path / "meta.json", meta)
        sync(path)

    path = Path(folder) / f"step_{step:06d}"
    before = path.with_suffix(".old")
    for left in Path(folder).glob(".tmp_*"):
        shutil.rmtree(left)
    if path.exists():   # a folder cannot be renamed onto another: the former one steps aside, still readable
        discard(before)
        os.replace(path, before)
    publish(path, write)
    discard(before)
    for state in states(folder)[:-keep]:
        discard(state)


def load_state(folder: str | Path) -> tuple[int, dict[str, Tensor], dict[str, Any]] | None:
    """(step, tensors, meta) of the newest state, None without one; the tensors are memory-mapped.

    Raises InputError that names the damaged file: an older state is never taken silently.
    """
    found = states(folder)
    if not found:
        return None
    tensors, _ = read_tensors(found[-1] / "state.safetensors")
    return int(found[-1].stem.removeprefix("step_")), tensors, read_json(found[-1] / "meta.json")


def states(folder: str | Path) -> list[Path]:
    """The states in a folder, oldest first; of one step the one that stepped aside comes first."""
    found = [(re.fullmatch(r"step_(\d+)(\.old)?", path.name), path) for path in Path(folder).glob("step_*")]
    return [path for _, _, path in sorted((int(m[1]), m[2] is None, path) for m, path in found if m)]


def discard(path: Path) -> None:
    """Removes a folder if it is there; renamed first, so that no half of it is ever taken for a state."""
    if path.exists():
        shutil.rmtree(path.rename(path.with_name(f".tmp_{path.name}")))


def optimizer_tensors(optimizer: torch.optim.Optimizer, prefix: str) -> dict[str, Tensor]:
    """AdamW's moments and step counts, named `prefix` INDEX.NAME; parameters are numbered over all groups.

    Learning rates are not among them: the schedule sets them from the step.
    """
    named = {f"{prefix}parameters": torch.tensor(len(parameters(optimizer)))}
    for index, values in optimizer.state_dict()["state"].items():
        named |= {f"{prefix}{index}.{name}": tensor for name, tensor in values.items()}
    return named


def load_optimizer(optimizer: torch.optim.Optimizer, prefix: str, tensors: dict[str, Tensor]) -> None:
    """Puts optimizer_tensors back, bit for bit; the optimizer keeps its groups' hyperparameters.

    Raises InputError where the tensors are of another optimizer.
    """
    owned, count = parameters(optimizer), tensors.get(f"{prefix}parameters")
    if count is None or int(count) != len(owned):
        found = "nothing" if count is None else int(count)
        raise InputError(f"optimizer {prefix!r}: found {found} saved, {len(owned)} parameters accepted")
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if not (match := re.fullmatch(rf"{re.escape(prefix)}(\d+)\.(\w+)", key)):
            continue
        index, name = int(match[1]), match[2]
        size = [] if name == "step" else list(owned[index].shape)
        if list(tensor.shape) != size:
            raise InputError(f"optimizer {key}: found {list(tensor.shape)}, {size} accepted")
        state.setdefault(index, {})[name] = tensor.clone()   # the optimizer writes into its state
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]
