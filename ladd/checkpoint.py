"""Networks on disk: safetensors and JSON, no pickle; a file or folder is whole or absent."""
import hashlib
from dataclasses import replace
from pathlib import Path

import torch

from kernels import Kernels
from kernels import load as load_kernels
from ladd import formats
from ladd.config import InputError, Parser, run_script
from ladd.data import publish, write_tensors
from ladd.mmdit import MMDiT
from ladd.parallel import agree, full, ranks

STUDENT = "checkpoints/student.safetensors"   # what a run folder stands for


def save_mmdit(model: MMDiT, path: str | Path, metadata: dict[str, str]) -> None:
    """Writes a checkpoint of ours: names without prefix, dtypes kept, `metadata` in the header; the header
    also says what the network predicts unless that is v, as in published files. All processes call it,
    process 0 gathers what is sharded and writes, the others wait."""
    header = metadata if model.config.predicts == "v" else {**metadata, "predicts": model.config.predicts}
    tensors = dict(full(model.state_dict()))
    if ranks()[0] == 0:
        publish(Path(path), lambda path: write_tensors(path, tensors, header))
    agree()


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


def fingerprint(path: str | Path) -> str:
    """16 digits of what load_mmdit takes: the size, first and last 64 KiB of each of its files."""
    file, digest = model_file(path), hashlib.sha256()
    for part in [file, *(sorted(file.parent.glob("*.safetensors")) if file.suffix == ".json" else ())]:
        size = part.stat().st_size
        with part.open("rb") as stream:
            digest.update(f"{size} ".encode() + stream.read(2 ** 16))
            stream.seek(max(0, size - 2 ** 16))
            digest.update(stream.read())
    return digest.hexdigest()[:16]


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
