"""Write a network in the layouts that other programs load.

    python -m ladd.export runs/sd3.5-medium --out turbo.safetensors
"""
from functools import partial
from pathlib import Path

import torch

from ladd.cli import InputError, Parser, must, run_script
from ladd.core.mmdit import MMDiT
from ladd.data.files import publish
from ladd.sd3 import formats
from ladd.sd3.checkpoint import load_metadata, load_mmdit


def export_mmdit(model: MMDiT, path: str | Path, layout: str = "single",
                 metadata: dict[str, str] | None = None, dtype: torch.dtype | None = None,
                 max_shard_bytes: int = 10 ** 10) -> None:
    """Write a published layout: "single", the file that ComfyUI loads, or "diffusers", the folder
    that SD3Transformer2DModel.from_pretrained loads, in files of at most `max_shard_bytes`.

    The header holds the facts of ModelSpec, which `metadata` may replace. dtype None keeps the
    dtype of each tensor. Raises InputError where `path` exists, and for a network that predicts x0.
    """
    path = Path(path)
    check_exportable(model, path)
    facts = formats.header(model.config, layout, path.stem, metadata or {})
    if layout == "diffusers":
        write = partial(formats.write_transformer, state=model.state_dict(), c=model.config,
                        metadata=facts, dtype=dtype, max_shard_bytes=max_shard_bytes)
    elif layout == "single":
        tensors = formats.to_layout(model.state_dict(), layout, model.config.depth)
        write = partial(formats.write_weights, tensors=tensors, metadata=facts, dtype=dtype)
    else:
        raise InputError(f"layout must be single or diffusers (got {layout!r})")
    publish(path, write)


def export_pipeline(model: MMDiT, base: str | Path, path: str | Path, metadata: dict[str, str],
                    dtype: torch.dtype | None = None) -> None:
    """Write a copy of the SD3 pipeline folder `base` with the student as its transformer.

    Its README.md has code that samples at the student's noise levels, which come from `metadata` as
    train.py writes it. dtype and errors as in export_mmdit.
    """
    path, base = Path(path), Path(base)
    check_exportable(model, path)
    stored = dtype or model.x_embedder.proj.weight.dtype
    card = formats.model_card(path.name, base, model.config, metadata, stored)
    facts = formats.header(model.config, "diffusers", path.name, metadata)
    write = partial(formats.write_transformer, state=model.state_dict(), c=model.config,
                    metadata=facts, dtype=dtype)
    publish(path, lambda path: formats.write_pipeline(path, base, card, write))


def check_exportable(model: MMDiT, path: Path) -> None:
    """Raise InputError where `path` exists, or where no published layout can describe `model`."""
    must(model.config.predicts == "v", "export: the network must predict v, since published "
         f"layouts cannot say otherwise (got {model.config.predicts})")
    must(not path.exists(), f"{path}: already exists; choose a new name")


def main(argv: list[str]) -> None:
    parser = Parser(prog="python -m ladd.export",
                    description="Write a network in a published layout.")
    parser.add_argument("source", help="run folder, single file or diffusers folder")
    parser.add_argument("--out", metavar="PATH", required=True,
                        help="file (single) or folder to create")
    parser.add_argument("--layout", choices=("single", "diffusers", "pipeline"), default="single")
    parser.add_argument("--base", metavar="FOLDER",
                        help="SD3 pipeline with the other parts (--layout pipeline)")
    parser.add_argument("--dtype", choices=formats.DTYPES, help="default: as stored")
    args = parser.parse(argv)
    must((args.layout == "pipeline") == (args.base is not None),
         f"--base must be a folder with --layout pipeline, and absent with others (got {args.base} "
         f"with --layout {args.layout})")
    model, metadata = load_mmdit(args.source), load_metadata(args.source)
    dtype = formats.DTYPES.get(args.dtype)
    if args.layout == "pipeline":
        export_pipeline(model, args.base, args.out, metadata, dtype)
    else:
        export_mmdit(model, args.out, args.layout, metadata, dtype)
    print(f"{args.out}: {sum(t.numel() for t in model.parameters()):,} parameters, {args.layout}")


if __name__ == "__main__":
    run_script("ladd.export", main)
