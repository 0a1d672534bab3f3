"""Networks on disk: safetensors and JSON, no pickle; a file or folder is complete or absent."""
import hashlib
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from kernels import Kernels, load as load_kernels
from ladd.cli import must
from ladd.core.mmdit import MMDiT
from ladd.data.files import publish, write_tensors
from ladd.sd3 import formats

STUDENT = "checkpoints/student.safetensors"   # the network that a run folder stands for


def save_mmdit(model: MMDiT, path: str | Path, metadata: dict[str, str],
               tensors: dict[str, Tensor] | None = None) -> None:
    """Write the weights of `model` (or `tensors` instead) without a name prefix, in their dtypes.

    The header holds `metadata` and, where the network predicts x0, that fact too: a file that does
    not say predicts v, as published files do.
    """
    if model.config.predicts != "v":
        metadata = {**metadata, "predicts": model.config.predicts}
    tensors = model.state_dict() if tensors is None else tensors
    publish(Path(path), lambda path: write_tensors(path, tensors, metadata))


def load_mmdit(path: str | Path, kernels: Kernels | None = None) -> MMDiT:
    """Load a single file, a diffusers transformer or pipeline folder, or the student of a run.

    The sizes follow from the shapes of the tensors; the dtypes are those of the file. The weights
    stay memory-mapped until they are moved or written to; only the separate q, k and v of diffusers
    are copied, into one qkv. Raises InputError that names missing, unknown and misshapen tensors,
    or says what else the file is.
    """
    path = model_file(path)
    stored, metadata = formats.open_weights(path)
    predicts = metadata.get("predicts", "v")
    must(predicts in ("v", "x0"), f"{path}: predicts must be v or x0 (got {predicts!r})")
    shapes = {name: list(tensor.shape) for name, (tensor, _) in stored.items()}
    config = replace(formats.infer_config(shapes, path), predicts=predicts)
    with torch.device("meta"):   # no memory, no initialization: every tensor is assigned below
        model = MMDiT(config, kernels or load_kernels())
    weights = formats.assemble(model.state_dict(), stored, config.depth, path)
    model.load_state_dict(weights, assign=True)
    return model


def load_metadata(path: str | Path) -> dict[str, str]:
    """Return the metadata in the header of anything that load_mmdit takes."""
    return formats.open_weights(model_file(path))[1]


def ends(path: Path) -> bytes:
    """Return the first and last 64 KiB of a file, for a hash: weights take too long to read."""
    with path.open("rb") as file:
        first = file.read(2 ** 16)
        file.seek(max(0, path.stat().st_size - 2 ** 16))
        return first + file.read()


def fingerprint(path: str | Path) -> str:
    """Return 16 hex digits that identify anything that load_mmdit takes: a hash of the size and
    the ends of each of its files."""
    path = model_file(path)
    files = [path]
    if path.suffix == ".json":   # an index of shards
        files += sorted(path.parent.glob("*.safetensors"))
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.stat().st_size} ".encode() + ends(file))
    return digest.hexdigest()[:16]


def model_file(path: str | Path) -> Path:
    """Return the file with the weights: `path` itself, the student of a run folder, or the weights
    or their index in a diffusers folder."""
    path = Path(path)
    if not path.is_dir():
        return path
    return path / STUDENT if (path / STUDENT).exists() else formats.weights_of(path)
