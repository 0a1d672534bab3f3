"""The layouts in which MMDiTs are published: a single file, diffusers' folder of a transformer or a pipeline.

One map serves reading and writing: for each of our tensors, the names in the file that hold its rows.
    single      our names, behind PREFIX or not; a VAE and text encoders may lie beside them
    diffusers   q, k and v apart; its last two norms read (scale, shift) where ours read (shift, scale)
Sources: Stability-AI/sd3.5 and diffusers 0.42; that both compute the same is shown in tests/test_formats.py.
"""
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ladd import flow
from ladd.config import SAMPLERS, InputError
from ladd.data import read_json, read_tensors, sync, write_json
from ladd.mmdit import BASE_GRID, HEAD_DIM, MMDiTConfig

PREFIX = "model.diffusion_model."
BESIDE = "first_stage_model.", "text_encoders.", "cond_stage_model.", "conditioner.", "vae."   # ignored
WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
CLASS, PIPELINE = "SD3Transformer2DModel", "StableDiffusion3Pipeline"
SCHEDULER = "FlowMatchEulerDiscreteScheduler"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
HEADER = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}

# our modules: diffusers', whose rows are stacked in this order
OUTER = {
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "context_embedder": "context_embedder",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
INNER = {
    "x_block.attn.qkv": "attn.to_q attn.to_k attn.to_v",
    "x_block.attn.ln_q": "attn.norm_q",
    "x_block.attn.ln_k": "attn.norm_k",
    "x_block.attn.proj": "attn.to_out.0",
    "x_block.attn2.qkv": "attn2.to_q attn2.to_k attn2.to_v",
    "x_block.attn2.ln_q": "attn2.norm_q",
    "x_block.attn2.ln_k": "attn2.norm_k",
    "x_block.attn2.proj": "attn2.to_out.0",
    "x_block.mlp.fc1": "ff.net.0.proj",
    "x_block.mlp.fc2": "ff.net.2",
    "x_block.adaLN_modulation.1": "norm1.linear",
    "context_block.attn.qkv": "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
    "context_block.attn.ln_q": "attn.norm_added_q",
    "context_block.attn.ln_k": "attn.norm_added_k",
    "context_block.attn.proj": "attn.to_add_out",
    "context_block.mlp.fc1": "ff_context.net.0.proj",
    "context_block.mlp.fc2": "ff_context.net.2",
    "context_block.adaLN_modulation.1": "norm1_context.linear",
}
FOREIGN = (   # what a file is that holds no MMDiT, by the names in it
    (r"lora_|\.lora[._]|\.alpha$", "a LoRA"),
    (r"(double|single|single_transformer)_blocks\.", "Flux or a relative"),
    (rf"^({re.escape(PREFIX)})?(input|down)_blocks\.", "a UNet of Stable Diffusion 1, 2 or XL"),
    (r"^(first_stage_model\.|vae\.)?(encoder|decoder)\.", "a VAE alone"),
    (r"^(text_encoders\.|text_model\.|shared\.)", "text encoders alone"))
# published sizes by (blocks, width, QK norm, blocks with a second attention), for the header
SIZES = {(24, 1536, False, 0): "-medium", (24, 1536, True, 13): ".5-medium", (38, 2432, True, 0): ".5-large"}


# names

def diffusers_names(name: str) -> tuple[str, ...]:
    """The names in diffusers' layout of what our tensor `name` holds, stacked: three for a qkv, else one."""
    if name == "pos_embed":
        return ("pos_embed.pos_embed",)
    module, kind = name.rsplit(".", 1)
    if block := re.fullmatch(r"joint_blocks\.(\d+)\.(.+)", module):
        return tuple(f"transformer_blocks.{block[1]}.{part}.{kind}" for part in INNER[block[2]].split())
    return (f"{OUTER[module]}.{kind}",)


def spelling(names) -> Callable[[str], tuple[str, ...]]:
    """Our name -> its names in a file that holds `names`."""
    if any(name.startswith("transformer_blocks.") for name in names):
        return diffusers_names
    prefix = PREFIX if any(name.startswith(PREFIX) for name in names) else ""
    return lambda name: (prefix + name,)


def halves(name: str, tensor: Tensor, depth: int) -> Tensor:
    """`tensor`, its two halves swapped if they are ordered otherwise in diffusers; its own inverse."""
    last = f"joint_blocks.{depth - 1}.context_block.adaLN_modulation.", "final_layer.adaLN_modulation."
    return tensor.roll(len(tensor) // 2, 0) if name.startswith(last) else tensor


# reading

def weights_of(folder: Path) -> Path:
    """The weights in a transformer's or a pipeline's folder, or the index of their shards."""
    folder = folder / "transformer" if (folder / "transformer").is_dir() else folder
    described = folder / "config.json"
    found = read_json(described) if described.exists() else {}
    found = found.get("_class_name", CLASS) if isinstance(found, dict) else found
    if found != CLASS:
        raise InputError(f"{described}: found {found}, {CLASS} accepted")
    for name in (INDEX, WEIGHTS):
        if (folder / name).exists():
            return folder / name
    names = ", ".join(sorted(path.name for path in folder.iterdir())[:4]) or "nothing"
    raise InputError(f"{folder}: found {names}, a finished run or a folder with {WEIGHTS} accepted")


def open_weights(path: Path) -> tuple[dict[str, tuple[Tensor, Path]], dict[str, str]]:
    """({name: (tensor, its file)}, metadata) of a safetensors file or an index; memory-mapped."""
    if path.suffix in (".ckpt", ".pt", ".pth", ".bin", ".pkl"):
        raise InputError(f"{path}: found a pickle, which can run code; a safetensors file accepted")
    files, weight_map = [path], {}
    if path.suffix == ".json":
        index = read_json(path)
        weight_map = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(weight_map, dict) or not weight_map or not all(
                isinstance(name, str) and name == Path(name).name for name in weight_map.values()):
            raise InputError(f"{path}: found no weight_map from tensors to files beside it, one accepted")
        files = [path.with_name(name) for name in sorted(set(weight_map.values()))]
    found, metadata = {}, {}
    for file in files:
        if weight_map and not file.exists():
            raise InputError(f"{path}: found no shard {file.name}, which it names; all shards accepted")
        tensors, metadata = read_tensors(file)
        found |= {name: (tensor, file) for name, tensor in tensors.items()}
    for name, shard in weight_map.items():
        if name not in found or found[name][1].name != shard:
            raise InputError(f"{path}: found no {name} in {shard}, where it says; its shards' index accepted")
    return found, metadata


def infer_config(shapes: dict[str, list[int]], path: Path) -> MMDiTConfig:
    """The configuration that tensors of these shapes, named as in the file, belong to; InputError if none."""
    spell = spelling(shapes)

    def shape(name: str, rank: int) -> list[int]:
        name, = spell(name)
        if len(shapes.get(name, [])) != rank or 0 in shapes[name]:
            kinds = [kind for pattern, kind in FOREIGN if any(re.search(pattern, other) for other in shapes)]
            if name not in shapes and kinds:
                raise InputError(f"{path}: found {kinds[0]} ({len(shapes)} tensors such as {min(shapes)}), "
                                 "a whole MMDiT (SD3, SD3.5) accepted")
            found = shapes.get(name, f"no {name} among {len(shapes)} tensors")
            raise InputError(f"{path}: found {found}, an MMDiT's {name} of rank {rank} accepted")
        return shapes[name]

    width, channels, patch, _ = shape("x_embedder.proj.weight", 4)
    pattern = rf"(?:{re.escape(PREFIX)})?(?:joint|transformer)_blocks\.(\d+)\.(.+)"
    blocks = [(int(m[1]), m[2]) for m in (re.fullmatch(pattern, name) for name in shapes) if m]
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
        qk_norm=any(".ln_q." in name or ".norm_q." in name for _, name in blocks),
        dual_blocks=tuple(sorted({i for i, name in blocks if name.startswith(("x_block.attn2.", "attn2."))})),
        pos_grid=math.isqrt(shape("pos_embed", 3)[1]))


def gather(wanted: dict[str, Tensor], stored: dict[str, tuple[Tensor, Path]], depth: int,
           path: Path) -> dict[str, Tensor]:
    """The tensors `wanted` (on the meta device) of a network of `depth` blocks from what open_weights found,
    memory-mapped but for those that are joined. BESIDE is ignored.

    Raises InputError that names missing, unknown and misshapen tensors as the file spells them.
    """
    spell = spelling(stored)
    sizes = {part: [len(tensor) // len(spell(name)), *tensor.shape[1:]]
             for name, tensor in wanted.items() for part in spell(name)}
    own = {name: tensor for name, (tensor, _) in stored.items() if not name.startswith(BESIDE)}
    found = {name: list(tensor.shape) for name, tensor in own.items()}
    faults = {"missing": [name for name in sizes if name not in found],
              "unknown": [name for name in found if name not in sizes],
              "misshapen": [f"{name} {found[name]} ({size} accepted)" for name, size in sizes.items()
                            if found.get(name, size) != size],
              "of another type": [f"{name} {tensor.dtype} ({', '.join(DTYPES)} accepted)"
                                  for name, tensor in own.items() if tensor.dtype not in HEADER]}
    listed = [f"{len(names)} {kind}: {', '.join(names[:3])}" for kind, names in faults.items() if names]
    if listed:
        raise InputError(f"{path}: of {len(sizes)} tensors of this MMDiT, found {'; '.join(listed)}")

    def alone(name: str) -> Tensor:      # in a mapping of its own: its pages go when it goes
        with safe_open(stored[name][1], framework="pt") as file:
            return file.get_tensor(name)

    def whole(name: str) -> Tensor:
        first, *others = spell(name)
        if others:
            return torch.cat([alone(first), *map(alone, others)])
        return halves(name, own[first], depth) if spell is diffusers_names else own[first]
    return {name: whole(name) for name in wanted}


# writing

def spelled(state: dict[str, Tensor], layout: str, depth: int) -> dict[str, Tensor]:
    """A state dict by the names of a published layout; views but for the swapped halves."""
    if layout == "single":
        return {PREFIX + name: tensor for name, tensor in state.items()}
    return {part: rows for name, tensor in state.items() for parts in [diffusers_names(name)]
            for part, rows in zip(parts, halves(name, tensor, depth).chunk(len(parts)))}


def header(c: MMDiTConfig, layout: str, title: str, metadata: dict[str, str]) -> dict[str, str]:
    """`metadata` beside what Stability's ModelSpec 1.0 asks of a file, which it may replace."""
    size = SIZES.get((c.depth, c.width, c.qk_norm, len(c.dual_blocks)), "")
    source = "https://github.com/Stability-AI/sd3.5" if layout == "single" else "diffusers"
    return {"modelspec.sai_model_spec": "1.0.0", "modelspec.title": title,
            "modelspec.architecture": f"stable-diffusion-v3{size}", "modelspec.prediction_type": "velocity",
            **metadata, "modelspec.implementation": source, "format": "pt"}


def write_weights(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str],
                  dtype: torch.dtype | None = None) -> None:
    """A safetensors file of `dtype` (None: as they are), written one by one: no copy of the network is made.

    Raises InputError for a value that fp16 cannot hold.
    """
    kinds = {name: dtype or tensor.dtype for name, tensor in tensors.items()}
    entries, end = {"__metadata__": metadata}, 0
    for name in tensors:
        start, end = end, end + tensors[name].numel() * kinds[name].itemsize
        entries[name] = {"dtype": HEADER[kinds[name]], "shape": list(tensors[name].shape),
                         "data_offsets": [start, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in tensors:
            tensor = tensors[name].detach().to("cpu", kinds[name]).contiguous()
            if dtype == torch.float16 and not tensor.isfinite().all():
                raise InputError(f"{name}: found {tensors[name].abs().max():g}, at most 65504 accepted")
            file.write(tensor.flatten().view(torch.uint8).numpy())
    sync(path)


def write_transformer(folder: Path, state: dict[str, Tensor], c: MMDiTConfig, metadata: dict[str, str],
                      dtype: torch.dtype | None, max_shard_bytes: int) -> None:
    """The folder that SD3Transformer2DModel.from_pretrained loads: config.json, weights whole or in parts."""
    folder.mkdir()
    write_json(folder / "config.json", transformer_config(c))
    shards, size, total = [{}], 0, 0
    for name, tensor in spelled(state, "diffusers", c.depth).items():
        more = tensor.numel() * (dtype or tensor.dtype).itemsize
        if shards[-1] and size + more > max_shard_bytes:
            shards, size = [*shards, {}], 0
        shards[-1][name], size, total = tensor, size + more, total + more
    stem, suffix = WEIGHTS.rsplit(".", 1)
    files = [f"{stem}-{i + 1:05d}-of-{len(shards):05d}.{suffix}" for i in range(len(shards))]
    files = files if len(files) > 1 else [WEIGHTS]
    for file, shard in zip(files, shards):
        write_weights(folder / file, shard, metadata, dtype)
    if len(files) > 1:
        weight_map = {name: file for file, shard in zip(files, shards) for name in shard}
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    sync(folder)


def transformer_config(c: MMDiTConfig) -> dict[str, Any]:
    side = min(2 * BASE_GRID, c.patch * c.pos_grid)      # of the pictures that a pipeline makes by default
    return {"_class_name": CLASS, "sample_size": side, "patch_size": c.patch, "in_channels": c.in_channels,
            "out_channels": c.out_channels, "num_layers": c.depth, "attention_head_dim": HEAD_DIM,
            "num_attention_heads": c.width // HEAD_DIM, "joint_attention_dim": c.context_dim,
            "caption_projection_dim": c.width, "pooled_projection_dim": c.pooled_dim,
            "pos_embed_max_size": c.pos_grid, "dual_attention_layers": list(c.dual_blocks),
            "qk_norm": "rms_norm" if c.qk_norm else None}


# a pipeline

CARD = """---
library_name: diffusers
pipeline_tag: text-to-image
---
A student of latent adversarial diffusion distillation (LADD) in place of the transformer of {base};
every other part is the base's, whose license holds. It makes a picture in {steps} steps, without guidance.

```python
import torch
from diffusers import {classes}

pipe = StableDiffusion3Pipeline.from_pretrained("{name}", torch_dtype={dtype})
pipe.scheduler = {scheduler}.from_config(pipe.scheduler.config, stochastic_sampling={stochastic})
pipe.to("cuda" if torch.cuda.is_available() else "cpu")
image = pipe("a red circle", {size}sigmas={sigmas}, guidance_scale=0.0,
             generator=torch.manual_seed(0)).images[0]
image.save("image.png")
```

Pass `sigmas` always. The scheduler shifts them by {shift:g} to the levels that the student knows, {levels};
`num_inference_steps={steps}` would take others, the last next to 0, and a scheduler's configuration has no
place for a list.
The student was trained for the sampler "{sampler}", {meaning}: `stochastic_sampling={stochastic}`.
"""
MEANING = {"euler": "which follows the velocity from level to level",
           "renoise": "which predicts the picture and noises it anew to the next level"}


def write_pipeline(path: Path, base: Path, card: str, write: Callable[[Path], None]) -> None:
    """A copy of the pipeline folder `base` with the transformer that `write` makes and the model card.

    Single files of weights that lie beside its parts stay out, hidden files too.
    """
    skipped = shutil.ignore_patterns("transformer", "README.md", ".*", "*.safetensors")
    top = lambda folder, names: skipped(folder, names) if Path(folder) == base else ()
    shutil.copytree(base, path, ignore=top)
    (path / "README.md").write_text(card)
    for file in path.rglob("*"):
        sync(file)
    write(path / "transformer")
    sync(path)


def model_card(name: str, base: Path, c: MMDiTConfig, metadata: dict[str, str], dtype: torch.dtype) -> str:
    """The README of a pipeline folder `name`: how to sample the student of which `metadata` tells.

    Raises InputError where `base` is no SD3 pipeline for this network, or cannot be told its levels.
    """
    def must(file: str, ok: bool, found, accepted: str) -> None:
        if not ok:
            raise InputError(f"{base / file}: found {found}, {accepted} accepted")

    def described(file: str) -> dict[str, Any]:
        found = read_json(base / file)
        must(file, isinstance(found, dict), type(found).__name__, "an object")
        return found

    index, s, theirs = map(described, (
        "model_index.json", "scheduler/scheduler_config.json", "transformer/config.json"))
    must("model_index.json", index.get("_class_name") == PIPELINE, index.get("_class_name"), PIPELINE)
    must("transformer/config.json", theirs.get("_class_name") == CLASS, theirs.get("_class_name"), CLASS)
    for key in ("in_channels", "out_channels", "joint_attention_dim", "pooled_projection_dim"):
        ours = transformer_config(c)[key]
        must("transformer", theirs.get(key) == ours, f"{key} {theirs.get(key)}", f"the student's {ours}")
    must("scheduler", s.get("_class_name") == SCHEDULER, s.get("_class_name"), SCHEDULER)
    bent = [key for key in s if s[key] and (key in ("use_dynamic_shifting", "shift_terminal", "invert_sigmas")
                                            or re.fullmatch("use_.*_sigmas", key))]
    must("scheduler", not bent, ", ".join(bent), "a fixed shift alone")
    missing = [key for key in ("levels", "shift", "sampler") if key not in metadata]
    sampler = metadata.get("sampler")
    if missing or sampler not in SAMPLERS:
        raise InputError(f"metadata: found {f'no {missing[0]}' if missing else f'sampler {sampler!r}'}, "
                         f"levels, shift and sampler ({' or '.join(SAMPLERS)}) of a student accepted")
    try:
        levels = torch.tensor([float(level) for level in metadata["levels"].split(",")], dtype=torch.float64)
        final, shift = flow.shift(levels, float(metadata["shift"])), s.get("shift", 1.0)
    except ValueError:
        raise InputError(f"metadata: found levels {metadata['levels']!r}, shift {metadata['shift']!r}, "
                         "numbers accepted") from None
    sigmas = flow.shift(final, 1 / shift)                # what the scheduler's own shift turns into `final`
    rounded = lambda values: [round(value, 7) for value in values.tolist()]
    h, w = (metadata["sizes"].split(",")[0].split("x") if "sizes" in metadata else (0, 0))
    return CARD.format(
        name=name, base=base.resolve().name, classes=f"{SCHEDULER}, {PIPELINE}", scheduler=SCHEDULER,
        dtype=dtype, size=f"height={h}, width={w}, " if h else "", sigmas=rounded(sigmas), shift=shift,
        levels=rounded(final), steps=len(levels), sampler=sampler, meaning=MEANING[sampler],
        stochastic=sampler == "renoise")
