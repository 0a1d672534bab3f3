"""Write a network in the layouts that other programs load, and say how they sample it.

    python -m ladd.export runs/sd3.5-medium --out turbo.safetensors --workflow
    python -m ladd.export sd3.safetensors --lora style.safetensors:0.8 --out styled.safetensors
"""
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from ladd.cli import Parser, must, parse_size, run_script
from ladd.core.mmdit import MMDiT
from ladd.core.sampler import Recipe, read_recipe, step_counts
from ladd.data.files import publish, read_json, write_json, write_tensors, write_text
from ladd.sd3 import formats, lora_files
from ladd.sd3.checkpoint import load_metadata, load_mmdit


# --- how other programs sample a student ---

def final_levels(recipe: Recipe) -> list[float]:
    """Return the student's noise levels after the shift, and the closing 0."""
    return [round(level, 6) for level in recipe.sigmas(len(recipe.levels)).tolist()]


def is_even(levels: tuple[float, ...]) -> bool:
    """Return whether the levels are 1, (n - 1) / n, ..., 1 / n, which programs take by default."""
    return all(abs(level - 1 + i / len(levels)) < 1e-3 for i, level in enumerate(levels))


def usage(recipe: Recipe) -> list[str]:
    """Return one line for each program: the settings that sample this student."""
    n, sampler = len(recipe.levels), "lcm" if recipe.sampler == "renoise" else "euler"
    sigmas = ",".join(f"{level:g}" for level in final_levels(recipe))
    shift = f"ModelSamplingSD3 (shift {recipe.shift:g}), " if recipe.shift != 3 else ""
    comfyui, cpp = "SamplerCustom", f"--sigmas {sigmas}"
    if is_even(recipe.levels):
        comfyui, sigmas = "KSampler", "scheduler simple"
        cpp = cpp if shift else "--scheduler simple"
    return [f"ComfyUI: nodes Load Diffusion Model, {shift}{comfyui} (steps {n}, cfg 1.0, "
            f"sampler {sampler}, {sigmas})",
            f"stable-diffusion.cpp: sd-cli --diffusion-model FILE --steps {n} --cfg-scale 1 "
            f"--sampling-method {sampler} {cpp}",
            "Not supported: the scheduler normal and Stability's sd3_infer.py, which sample at "
            "other noise levels",
            f"Text: trained with {recipe.t5_tokens} T5 tokens (max_sequence_length of diffusers); "
            "ComfyUI and Stability's code give 77 for a short prompt"]


def workflow(recipe: Recipe, file: str) -> dict[str, Any]:
    """Return a ComfyUI workflow (API format), with the names of SD3's encoder and VAE files."""
    h, w = parse_size(recipe.sizes[0])
    clips = "clip_l", "clip_g", "t5xxl_fp16"
    nodes = [
        ("UNETLoader", {"unet_name": file, "weight_dtype": "default"}),
        ("ModelSamplingSD3", {"model": ["1", 0], "shift": recipe.shift}),
        ("TripleCLIPLoader", {f"clip_name{i}": f"{x}.safetensors" for i, x in enumerate(clips, 1)}),
        ("VAELoader", {"vae_name": "sd3_vae.safetensors"}),
        ("CLIPTextEncode", {"clip": ["3", 0], "text": "a red fox in snow"}),
        ("EmptySD3LatentImage", {"width": w, "height": h, "batch_size": 1}),
        # cfg 1.0 leaves the negative prompt out, so any text will do
        ("KSampler", {"model": ["2", 0], "positive": ["5", 0], "negative": ["5", 0],
                      "latent_image": ["6", 0], "seed": 0, "steps": len(recipe.levels), "cfg": 1.0,
                      "sampler_name": "lcm" if recipe.sampler == "renoise" else "euler",
                      "scheduler": "simple", "denoise": 1.0}),
        ("VAEDecode", {"samples": ["7", 0], "vae": ["4", 0]}),
        ("SaveImage", {"images": ["8", 0], "filename_prefix": "ladd"})]
    return {str(i): {"class_type": kind, "inputs": ins} for i, (kind, ins) in enumerate(nodes, 1)}


def scheduler_config(recipe: Recipe) -> dict[str, Any]:
    """Return the scheduler_config.json that samples at the student's n levels by
    num_inference_steps=n, or, where they are not evenly spaced, by `sigmas`.

    FlowMapEulerDiscreteScheduler has the levels of every number of steps; it does not re-noise.
    FlowMatchEulerDiscreteScheduler shifts n points from 1 to a / (999 + a) by a and stretches them
    to end at shift_terminal: as a shift of s, if k a^2 - 999 (1 - k) a + 999 = 0.
    """
    n, s = len(recipe.levels), recipe.shift
    config = {"num_train_timesteps": 1000, "shift": s}
    if is_even(recipe.levels) and (recipe.sampler == "euler" or n == 1):
        return {"_class_name": "FlowMapEulerDiscreteScheduler", **config}
    if is_even(recipe.levels):
        k = (n - 1) * (s - 1) / (n * s)
        b = 999 * (1 - k)
        config |= {"shift": 2 * 999 / (b + math.sqrt(b * b - 4 * k * 999)),
                   "shift_terminal": final_levels(recipe)[-2]}
    return {"_class_name": "FlowMatchEulerDiscreteScheduler", **config,
            "stochastic_sampling": recipe.sampler == "renoise"}


# --- a pipeline ---

def model_card(name: str, base: Path, recipe: Recipe, dtype: torch.dtype) -> str:
    """Return the README of a pipeline folder `name`: how to sample this student of `base`."""
    text, base_name = "", base.resolve().name
    if hub := re.search(r"models--(.+?)--(.+)/snapshots/[^/]+$", str(base.resolve())):
        base_name = f"{hub[1]}/{hub[2]}"        # in the cache of the Hub
    if (base / "README.md").is_file():
        text = (base / "README.md").read_text("utf-8", "replace").split("\n---")[0]
    license = re.findall(r"^(license(?:_name|_link)?: *[\w.:/-]+) *$", text, re.M | re.A)
    license = "\n".join(license) or "license: other"
    (h, w), n, counts = parse_size(recipe.sizes[0]), len(recipe.levels), step_counts(recipe.levels)
    lists = ", ".join(f"`{list(recipe.levels[::n // k])}`" for k in counts[1:])
    steps = f"num_inference_steps={n}" if is_even(recipe.levels) else f"sigmas={[*recipe.levels]}"
    fewer = f"""\
The folder's scheduler is made for {n} steps. For fewer, pass `sigmas`, {lists}, after
`pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift={recipe.shift},
stochastic_sampling={recipe.sampler == "renoise"})`.
With `stochastic_sampling`, noise is added in each step, and the pipeline does not pass `generator`
to the scheduler: only `torch.manual_seed`, the global generator, makes images reproducible."""
    if "FlowMap" in scheduler_config(recipe)["_class_name"]:
        fewer = f"""\
The folder's scheduler, of diffusers 0.39 or newer, takes the student's levels for
`num_inference_steps` {", ".join(map(str, counts))}."""
    settings = "\n".join(f"- {line}" for line in usage(recipe))
    return f"""---
library_name: diffusers
pipeline_tag: text-to-image
base_model: {json.dumps(base_name)}
{license}
tags: [ladd, few-step, adversarial-distillation]
---
The transformer of {json.dumps(base_name)}, distilled by latent adversarial diffusion distillation
(LADD). All other parts but the scheduler are those of the base, whose license holds. It generates
an image in {n} steps, without guidance, at the noise levels {final_levels(recipe)[:-1]}.

```python
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

pipe = StableDiffusion3Pipeline.from_pretrained({name!a}, torch_dtype={dtype})
pipe.to("cuda" if torch.cuda.is_available() else "cpu")
image = pipe("a red circle", height={h}, width={w}, {steps}, guidance_scale=0.0,
             max_sequence_length={recipe.t5_tokens}, generator=torch.manual_seed(0)).images[0]
image.save("image.png")
```

{fewer}

{settings}
"""


def copy_base(base: Path, path: Path) -> None:
    """Copy the parts of a pipeline that a student keeps. Raise InputError for a link out of the
    folder, or out of the repository in a cache of the Hub."""
    root = base.resolve()
    if root.parent.name == "snapshots":
        root = root.parent.parent
    for source in base.rglob("*"):
        name = source.relative_to(base)
        # weights at the top duplicate the parts in a single file
        if re.match(r"(transformer|scheduler)/|README.md$|model_index.json$|\.|[^/]*\.safetensors$",
                    f"{name}/" if source.is_dir() else str(name)):
            continue
        must(not source.is_symlink() or source.is_file() and source.resolve().is_relative_to(root),
             f"{source} must be a file, or a link to one in the same folder (got a link to "
             f"{source.resolve()})")
        if source.is_file():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, path / name)


# --- the command ---

def export_mmdit(model: MMDiT, path: str | Path, layout: str = "single",
                 metadata: dict[str, str] | None = None, dtype: torch.dtype | None = None,
                 max_shard_bytes: int = 10 ** 10, base: str | Path | None = None,
                 with_workflow: bool = False) -> list[str]:
    """Write a published layout: "single", the file that ComfyUI loads; "diffusers", the folder that
    SD3Transformer2DModel.from_pretrained loads, in files of at most `max_shard_bytes`; "pipeline",
    a copy of the SD3 pipeline folder `base` with the student as its transformer, a scheduler that
    samples as `metadata` by train.py says, and a README.md with code. Return `usage` of a student.

    The header holds the facts of ModelSpec, which `metadata` may replace. dtype None keeps the
    dtype of each tensor. Raises InputError where `path` exists, and for a network that predicts x0.
    """
    path, base = Path(path), Path(base or "")
    c, state, metadata = model.config, model.state_dict(), metadata or {}
    must(c.predicts == "v", "export: the network must predict v, since published layouts cannot "
         f"say otherwise (got {c.predicts})")
    title = path.name.removesuffix(".safetensors")
    file = path.with_name(f"{title}.json") if with_workflow else path
    for new in (path, file):
        must(not new.exists(), f"{new}: already exists; choose a new name")
    must(layout in ("single", "diffusers", "pipeline"),
         f"layout must be single, diffusers or pipeline (got {layout!r})")
    facts, hints = formats.header(c, layout, title, metadata), []
    kind = ", ".join(f"{key} {metadata.get(key)}" for key in ("role", "task", "levels"))
    if kind.startswith("role student, task text,"):
        recipe = read_recipe(metadata, Path("metadata"))
        hints = usage(recipe)
        facts["modelspec.usage_hint"] = hints[0]
    must(not with_workflow or bool(hints) and layout == "single" and is_even(recipe.levels),
         "--workflow requires a text-to-image student with evenly spaced levels, and --layout "
         f"single (got {kind}, --layout {layout})")
    if layout == "single":
        write_tensors(path, formats.to_layout(state, layout, c.depth), facts, dtype)
        if with_workflow:
            write_json(file, workflow(recipe, path.name))
        return hints
    if layout == "pipeline":
        must(bool(hints), f"--layout pipeline requires a text-to-image student (got {kind})")
        index, scheduler = read_json(base / "model_index.json", dict), scheduler_config(recipe)
        must(index.get("_class_name") == formats.PIPELINE, f"{base}/model_index.json: _class_name "
             f"must be {formats.PIPELINE} (got {index.get('_class_name')})")
        index["scheduler"] = ["diffusers", scheduler["_class_name"]]
        theirs = read_json(base / "transformer" / "config.json", dict)
        ours = formats.transformer_config(c)
        for key in ("in_channels", "out_channels", "joint_attention_dim", "pooled_projection_dim"):
            must(theirs.get(key) == ours[key], f"{base}/transformer: {key} must be the student's "
                 f"{ours[key]} (got {theirs.get(key)})")
        card = model_card(path.name, base, recipe, dtype or model.x_embedder.proj.weight.dtype)

    def write(path: Path) -> None:
        if layout == "pipeline":
            copy_base(base, path)
            write_text(path / "README.md", card)
            write_json(path / "model_index.json", index)
            write_json(path / "scheduler" / "scheduler_config.json", scheduler)
            path = path / "transformer"
        formats.write_transformer(path, state, c, facts, dtype, max_shard_bytes)

    publish(path, write)
    return hints


def main(argv: list[str]) -> None:
    parser = Parser(prog="python -m ladd.export", description=__doc__.split("\n\n")[0])
    flag = parser.add_argument
    flag("source", help="run folder, single file or diffusers folder")
    flag("--out", metavar="PATH", required=True, help="file (single) or folder to create")
    flag("--layout", choices=("single", "diffusers", "pipeline"), default="single")
    flag("--base", metavar="FOLDER", help="SD3 pipeline with the other parts (--layout pipeline)")
    flag("--dtype", choices=formats.DTYPES, help="default: as stored")
    flag("--lora", metavar="FILE[:WEIGHT]", action="append", default=[], help="add this LoRA to "
         "the weights; may be repeated")
    flag("--workflow", action="store_true", help="also write a ComfyUI workflow for the file")
    args = parser.parse(argv)
    must((args.layout == "pipeline") == (args.base is not None),
         f"--base must be a folder with --layout pipeline, and absent with others (got {args.base} "
         f"with --layout {args.layout})")
    loras = lora_files.read_flags(args.lora)
    model, metadata = load_mmdit(args.source), load_metadata(args.source)
    lora_files.merge(model, loras)
    metadata |= {"lora": ", ".join(f"{path.name}:{w:g}" for path, w, _ in loras)} if loras else {}
    hints = export_mmdit(model, args.out, args.layout, metadata, formats.DTYPES.get(args.dtype),
                         base=args.base, with_workflow=args.workflow)
    size = sum(t.numel() for t in model.parameters())
    print(f"{args.out}: {size:,} parameters, {args.layout}", *hints, sep="\n")


if __name__ == "__main__":
    run_script("ladd.export", main)
