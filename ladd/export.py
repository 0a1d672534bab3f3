"""Write a network in the layouts that other programs load.

    python -m ladd.export runs/sd3.5-medium --out turbo.safetensors
"""
import shutil
from pathlib import Path

import torch

from ladd.cli import Parser, must, run_script
from ladd.core.mmdit import MMDiT
from ladd.data.files import publish, write_tensors
from ladd.sd3 import formats
from ladd.sd3.checkpoint import load_metadata, load_mmdit


def export_mmdit(model: MMDiT, path: str | Path, layout: str = "single",
                 metadata: dict[str, str] | None = None, dtype: torch.dtype | None = None,
                 max_shard_bytes: int = 10 ** 10, base: str | Path | None = None) -> None:
    """Write a published layout: "single", the file that ComfyUI loads; "diffusers", the folder that
    SD3Transformer2DModel.from_pretrained loads, in files of at most `max_shard_bytes`; "pipeline",
    a copy of the SD3 pipeline folder `base` with the student as its transformer, and a README.md
    with code that samples it as `metadata` by train.py says.

    The header holds the facts of ModelSpec, which `metadata` may replace. dtype None keeps the
    dtype of each tensor. Raises InputError where `path` exists, and for a network that predicts x0.
    """
    path, base = Path(path), Path(base or "")
    c, state, metadata = model.config, model.state_dict(), metadata or {}
    must(c.predicts == "v", "export: the network must predict v, since published layouts cannot "
         f"say otherwise (got {c.predicts})")
    must(not path.exists(), f"{path}: already exists; choose a new name")
    must(layout in ("single", "diffusers", "pipeline"),
         f"layout must be single, diffusers or pipeline (got {layout!r})")
    title = path.name if layout == "pipeline" else path.stem
    facts = formats.header(c, layout, title, metadata)
    if layout == "single":
        return write_tensors(path, formats.to_layout(state, layout, c.depth), facts, dtype)
    if layout == "pipeline":
        card = formats.model_card(path.name, base, c, metadata,
                                  dtype or model.x_embedder.proj.weight.dtype)

    def write(path: Path) -> None:
        if layout == "pipeline":
            # weights at the top duplicate the parts in a single file
            left_out = shutil.ignore_patterns("transformer", "README.md", ".*", "*.safetensors")
            shutil.copytree(base, path, ignore=lambda folder, names: (
                left_out(folder, names) if Path(folder) == base else set()))
            (path / "README.md").write_text(card)
            path = path / "transformer"
        formats.write_transformer(path, state, c, facts, dtype, max_shard_bytes)

    publish(path, write)


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
    export_mmdit(model, args.out, args.layout, metadata, dtype, base=args.base)
    print(f"{args.out}: {sum(t.numel() for t in model.parameters()):,} parameters, {args.layout}")


if __name__ == "__main__":
    run_script("ladd.export", main)
