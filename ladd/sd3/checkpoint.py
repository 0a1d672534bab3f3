"""Networks on disk: safetensors and JSON, no pickle; a file or folder is complete or absent."""
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from kernels import Kernels, load as load_kernels
from ladd.cli import InputError, must
from ladd.core.mmdit import MMDiT
from ladd.data.files import content_hash, read_json, write_tensors
from ladd.sd3 import formats

STUDENT = "checkpoints/student.safetensors"   # the network that a run folder stands for


def save_mmdit(model: MMDiT, path: str | Path, metadata: dict[str, str],
               tensors: dict[str, Tensor] | None = None) -> None:
    """Write the weights of `model` (or `tensors` instead) without a name prefix, in their dtypes,
    and `metadata` in the header."""
    if model.config.predicts != "v":       # what a file without this predicts, as published ones
        metadata = {**metadata, "predicts": model.config.predicts}
    write_tensors(Path(path), model.state_dict() if tensors is None else tensors, metadata)


def load_mmdit(path: str | Path, kernels: Kernels | None = None) -> MMDiT:
    """Load a single file, a diffusers transformer or pipeline folder, or the student of a run.

    The sizes follow from the tensors; the dtypes are those of the file. The weights stay
    memory-mapped until they are moved or written to; only the separate q, k and v of diffusers are
    copied, into one qkv. Raises InputError that names missing, unknown and misshapen tensors.
    """
    path = model_file(path)
    stored, metadata = formats.open_weights(path)
    # the domain of toy networks before the codec of their images changed
    must(metadata.get("domain") != "world", f"{path}: a network of toy images as they were before "
         "2026-11-30; train it again")
    predicts = metadata.get("predicts", "v")
    must(predicts in ("v", "x0"), f"{path}: predicts must be v or x0 (got {predicts!r})")
    config = replace(formats.infer_config(stored, path), predicts=predicts)
    with torch.device("meta"):   # no memory, no initialization: every tensor is assigned below
        model = MMDiT(config, kernels or load_kernels())
    weights = formats.assemble(model.state_dict(), stored, config.depth, path)
    model.load_state_dict(weights, assign=True)
    return model


def load_metadata(path: str | Path) -> dict[str, str]:
    """Return the metadata in the header of anything that load_mmdit takes."""
    return formats.open_weights(model_file(path))[1]


def fingerprint(path: str | Path) -> str:
    """Return the content_hash of anything that load_mmdit takes."""
    path = model_file(path)
    shards = sorted(path.parent.glob("*.safetensors")) if path.suffix == ".json" else []
    return content_hash((file.suffix, file) for file in [path, *shards])


def model_file(path: str | Path) -> Path:
    """Return the file with the weights: `path` itself, the student of a run folder, or the weights
    or the index of their shards in a diffusers transformer or pipeline folder."""
    path = Path(path)
    if not path.is_dir():
        return path
    if (path / STUDENT).exists():
        return path / STUDENT
    folder = path / "transformer" if (path / "transformer").is_dir() else path
    config = folder / "config.json"
    about = read_json(config, dict) if config.exists() else {}
    kind = about.get("_class_name", formats.CLASS)
    must(kind == formats.CLASS, f"{config}: _class_name must be {formats.CLASS} (got {kind})")
    for name in (formats.INDEX, formats.WEIGHTS):
        if (folder / name).exists():
            return folder / name
    names = ", ".join(sorted(path.name for path in folder.iterdir())[:4]) or "an empty folder"
    raise InputError(f"{folder} must be a finished run or a folder with {formats.WEIGHTS} "
                     f"(got {names})")
