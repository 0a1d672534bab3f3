"""Networks and run states on disk: safetensors and JSON, no pickle; a file or folder is whole or absent."""
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
from ladd import formats
from ladd.config import InputError, Parser, run_script
from ladd.data import publish, read_json, read_tensors, sync, write_json, write_tensors
from ladd.mmdit import MMDiT

STUDENT = "checkpoints/student.safetensors"   # what a run folder stands for


def save_mmdit(model: MMDiT, path: str | Path, metadata: dict[str, str]) -> None:
    """Writes a checkpoint of ours: names without prefix, dtypes kept, `metadata` in the header; the header
    also says what the network predicts unless that is v, as in published files."""
    header = metadata if model.config.predicts == "v" else {**metadata, "predicts": model.config.predicts}
    publish(Path(path), lambda path: write_tensors(path, model.state_dict(), header))


def load_mmdit(path: str | Path, kernels: Kernels | None = None) -> MMDiT:
    """The model of a single file, a diffusers folder or a run's student: sizes from the tensors' shapes,
    dtypes as stored.

    The weights stay memory-mapped until they are moved or written to; only diffusers' q, k and v are joined.
    It predicts what the header says, v where it says nothing, as in published files.
    Raises InputError that names missing, unknown and misshapen tensors, or what else the file is.
    """
    path = model_file(path)
    stored, metadata = formats.open_weights(path)
    predicts = metadata.get("predicts", "v")
    if predicts not in ("v", "x0"):
        raise InputError(f"{path}: found a network that predicts {predicts!r}, accepted are v and x0")
    config = formats.infer_config({name: list(tensor.shape) for name, (tensor, _) in stored.items()}, path)
    with torch.device("meta"):   # no memory, no initialisation: every tensor is assigned below
        model = MMDiT(replace(config, predicts=predicts), kernels or load_kernels())
    model.load_state_dict(formats.gather(model.state_dict(), stored, config.depth, path), assign=True)
    return model


def load_metadata(path: str | Path) -> dict[str, str]:
    """The metadata in the header of whatever load_mmdit takes."""
    return formats.open_weights(model_file(path))[1]


def model_file(path: str | Path) -> Path:
    """What stands for a network: the file itself, a run's student, a diffusers folder's weights or index."""
    path = Path(path)
    if not path.is_dir():
        return path
    return path / STUDENT if (path / STUDENT).exists() else formats.weights_of(path)


def export_mmdit(model: MMDiT, path: str | Path, layout: str = "single",
                 metadata: dict[str, str] | None = None, dtype: torch.dtype | None = None,
                 max_shard_bytes: int = 10 ** 10) -> None:
    """Writes a published layout: "single", the file that ComfyUI loads, or "diffusers", the folder that
    SD3Transformer2DModel.from_pretrained loads, in files of at most `max_shard_bytes` (or one tensor).

    The header holds ModelSpec's facts and `metadata`, which prevails. `dtype`: None keeps each tensor's.
    Raises InputError where `path` exists, and for a network that predicts x0, which these layouts cannot say.
    """
    path = exportable(model, path)
    facts = formats.header(model.config, layout, path.stem, metadata or {})
    if layout == "diffusers":
        publish(path, lambda path: formats.write_transformer(
            path, model.state_dict(), model.config, facts, dtype, max_shard_bytes))
    elif layout == "single":
        named = formats.spelled(model.state_dict(), layout, model.config.depth)
        publish(path, lambda path: formats.write_weights(path, named, facts, dtype))
    else:
        raise InputError(f"layout: found {layout!r}, single and diffusers accepted")


def export_pipeline(model: MMDiT, base: str | Path, path: str | Path, metadata: dict[str, str],
                    dtype: torch.dtype | None = None, max_shard_bytes: int = 10 ** 10) -> None:
    """Writes the SD3 pipeline folder `base` with the student as its transformer, and a README.md whose code
    samples it at its levels, which `metadata` holds as train.py writes them. Else as export_mmdit."""
    path, base = exportable(model, path), Path(base)
    stored = dtype or model.x_embedder.proj.weight.dtype
    card = formats.model_card(path.name, base, model.config, metadata, stored)
    facts = formats.header(model.config, "diffusers", path.name, metadata)
    write = lambda folder: formats.write_transformer(folder, model.state_dict(), model.config, facts, dtype,
                                                     max_shard_bytes)
    publish(path, lambda path: formats.write_pipeline(path, base, card, write))


def exportable(model: MMDiT, path: str | Path) -> Path:
    if model.config.predicts != "v":
        raise InputError(f"export: found a network that predicts {model.config.predicts}, v accepted: "
                         "published layouts cannot say otherwise")
    if Path(path).exists():
        raise InputError(f"{path}: found there already, a new name accepted")
    return Path(path)


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


def main(argv: list[str]) -> None:
    parser = Parser(prog="python -m ladd.checkpoint", description="Writes a network in a published layout.")
    parser.add_argument("command", choices=("export",))
    parser.add_argument("source", help="run folder, single file or diffusers folder")
    parser.add_argument("--out", metavar="PATH", required=True, help="a new file (single) or folder")
    parser.add_argument("--layout", choices=("single", "diffusers", "pipeline"), default="single")
    parser.add_argument("--base", metavar="FOLDER", help="SD3 pipeline of the other parts, for pipeline")
    parser.add_argument("--dtype", choices=formats.DTYPES, help="default: as stored")
    args = parser.parse(argv)
    if (args.layout == "pipeline") != (args.base is not None):
        raise InputError(f"--base: found {args.base}, a folder accepted with --layout pipeline alone")
    model, metadata = load_mmdit(args.source), load_metadata(args.source)
    dtype = formats.DTYPES.get(args.dtype)
    if args.base is not None:
        export_pipeline(model, args.base, args.out, metadata, dtype)
    else:
        export_mmdit(model, args.out, args.layout, metadata, dtype)
    print(f"{args.out}: {sum(t.numel() for t in model.parameters()):,} parameters, {args.layout}")


if __name__ == "__main__":
    run_script("ladd.checkpoint", main)
