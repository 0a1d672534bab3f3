"""The layouts in which MMDiTs are published: a single file, and the diffusers folder of a
transformer or a pipeline.

One map serves reading and writing: the names in the file that hold the rows of each of our tensors.

    single      our names, with PREFIX or without; the file may also hold a VAE and text encoders
    diffusers   q, k and v are separate, and the last two norms read (scale, shift) where ours read
                (shift, scale)

Sources: Stability-AI/sd3.5 and diffusers 0.42. tests/test_formats.py shows that both networks
compute the same.
"""
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ladd.cli import InputError, must
from ladd.core.mmdit import BASE_GRID, HEAD_DIM, MMDiTConfig
from ladd.data.files import (DTYPE_NAMES, is_finite, read_json, read_tensors, write_json,
                             write_tensors)

PREFIX = "model.diffusion_model."
# other networks that a single file may hold; they are ignored
OTHERS = "first_stage_model.", "text_encoders.", "cond_stage_model.", "conditioner.", "vae."
WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
CLASS = "SD3Transformer2DModel"
PIPELINE = "StableDiffusion3Pipeline"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FLOATS = [dtype for dtype in DTYPE_NAMES if dtype.is_floating_point]
MOST_BLOCKS = 256
# our modules and those of diffusers, whose rows we stack in this order
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
FOREIGN = (   # what else a file may be, by the names of its tensors
    (r"lora_|\.lora[._]|\.alpha$", "a LoRA"),
    (r"(double|single|single_transformer)_blocks\.", "Flux or a relative"),
    (rf"^({re.escape(PREFIX)})?(input|down)_blocks\.", "a UNet of Stable Diffusion 1, 2 or XL"),
    (r"^(first_stage_model\.|vae\.)?(encoder|decoder)\.", "a VAE alone"),
    (r"^(text_encoders\.|text_model\.|shared\.)", "text encoders alone"))
# published models by (blocks, width, QK norm, blocks with a second attention), for the header
SIZES = {(24, 1536, False, 0): "-medium", (24, 1536, True, 13): ".5-medium",
         (38, 2432, True, 0): ".5-large"}


# --- layouts ---

def parts_of(name: str, layout: str) -> tuple[str, ...]:
    """Return the names in a file of the tensors whose rows are stacked in our tensor `name`: three
    for a qkv of diffusers, otherwise one."""
    if layout != "diffusers":
        return (PREFIX + name if layout == "single" else name,)
    if name == "pos_embed":
        return ("pos_embed.pos_embed",)
    module, kind = name.rsplit(".", 1)
    if block := re.fullmatch(r"joint_blocks\.(\d+)\.(.+)", module):
        parts = INNER[block[2]].split()
        return tuple(f"transformer_blocks.{block[1]}.{part}.{kind}" for part in parts)
    return (f"{OUTER[module]}.{kind}",)


def swap_halves(name: str, tensor: Tensor, depth: int) -> Tensor:
    """Return `tensor` with its halves swapped if diffusers orders them the other way (shift and
    scale of the last two norms). The function is its own inverse."""
    last = f"joint_blocks.{depth - 1}.context_block.adaLN_modulation."
    if name.startswith((last, "final_layer.adaLN_modulation.")):
        return tensor.roll(len(tensor) // 2, 0)
    return tensor


def to_layout(state: dict[str, Tensor], layout: str, depth: int) -> dict[str, Tensor]:
    """Return the state dict of a network of `depth` blocks in a layout. All tensors are views but
    those whose halves are swapped."""
    out = {}
    for name, tensor in state.items():
        parts = parts_of(name, layout)
        if layout == "diffusers":
            tensor = swap_halves(name, tensor, depth)
        out |= zip(parts, tensor.chunk(len(parts)))
    return out


def layout_of(names: Iterable[str]) -> str:
    """Return the layout of a file whose tensors have these names; "bare" is ours without PREFIX."""
    if any(name.startswith("transformer_blocks.") for name in names):
        return "diffusers"
    return "single" if any(name.startswith(PREFIX) for name in names) else "bare"


# --- reading ---

Stored = dict[str, tuple[Tensor, Path]]    # {name: (mapped tensor, its file)}


def open_weights(path: Path) -> tuple[Stored, dict[str, str]]:
    """Return the tensors and the metadata of a safetensors file or an index."""
    must(path.suffix not in (".ckpt", ".pt", ".pth", ".bin", ".pkl"),
         f"{path} must be a safetensors file (got a pickle, which can run code)")
    files = [path]
    weight_map = {}
    if path.suffix == ".json":
        weight_map = read_json(path, dict).get("weight_map")
        # a bare file name: an index must not reach outside its folder
        must(isinstance(weight_map, dict) and len(weight_map) > 0
             and all(isinstance(name, str) and name == Path(name).name
                     for name in weight_map.values()),
             f"{path}: weight_map must give a file in the same folder for each tensor "
             f"(got {weight_map!r:.80})")
        files = [path.with_name(name) for name in sorted(set(weight_map.values()))]
    found = {}
    for file in files:
        must(not weight_map or file.exists(),
             f"{path}: shard {file.name} is missing; copy all shards into one folder")
        tensors, metadata = read_tensors(file)
        found |= {name: (tensor, file) for name, tensor in tensors.items()}
    for name, shard in weight_map.items():
        must(name in found and found[name][1].name == shard,
             f"{path}: {name} is not in {shard}; use the index that belongs to these shards")
    return found, metadata


def infer_config(stored: Stored, path: Path) -> MMDiTConfig:
    """Return the configuration of the network with these tensors; raise InputError if no MMDiT has
    them."""
    layout = layout_of(stored)

    def shape(name: str, rank: int) -> list[int]:
        """Return the shape of our tensor `name`."""
        name, = parts_of(name, layout)
        if name in stored:
            got = list(stored[name][0].shape)
            if len(got) == rank and 0 not in got:
                return got
        else:
            got = f"none among {len(stored)} tensors"
            for pattern, kind in FOREIGN:
                must(not any(re.search(pattern, other) for other in stored),
                     f"{path} must hold a complete MMDiT of SD3 or SD3.5 (got {kind}: "
                     f"{len(stored)} tensors such as {min(stored)})")
        raise InputError(f"{path}: {name} of an MMDiT must be a tensor of rank {rank} (got {got})")

    width, channels, patch, _ = shape("x_embedder.proj.weight", 4)
    empty = [name for name, (tensor, _) in stored.items()
             if not (tensor.numel() or name.startswith(OTHERS))]
    must(not empty, f"{path}: tensors must have values (got {len(empty)} of size 0: "
         f"{', '.join(empty[:3])})")
    pattern = rf"(?:{re.escape(PREFIX)})?(?:joint|transformer)_blocks\.(\d{{1,9}})\.(.+)"
    matches = [re.fullmatch(pattern, name) for name in stored]
    blocks = [(int(match[1]), match[2]) for match in matches if match]
    must(len(blocks) > 0 and width % HEAD_DIM == 0,
         f"{path}: an MMDiT must have a width that is a multiple of {HEAD_DIM} and tensors named "
         f"joint_blocks.* (got width {width} and {len(blocks)} such tensors)")
    indices = {index for index, _ in blocks}
    depth = len(indices)
    gap = next(i for i in range(depth + 1) if i not in indices)
    must(gap == depth <= MOST_BLOCKS, f"{path}: blocks must be numbered from 0 without a gap, at "
         f"most {MOST_BLOCKS} (got {depth} blocks, no block {gap})")
    dual = {index for index, name in blocks if name.startswith(("x_block.attn2.", "attn2."))}
    return MMDiTConfig(
        depth=depth, width=width,
        context_dim=shape("context_embedder.weight", 2)[1],
        pooled_dim=shape("y_embedder.mlp.0.weight", 2)[1], in_channels=channels,
        out_channels=shape("final_layer.linear.weight", 2)[0] // patch ** 2, patch=patch,
        qk_norm=any(".ln_q." in name or ".norm_q." in name for _, name in blocks),
        dual_blocks=tuple(sorted(dual)), pos_grid=math.isqrt(shape("pos_embed", 3)[1]))


def assemble(wanted: dict[str, Tensor], stored: Stored, depth: int,
             path: Path) -> dict[str, Tensor]:
    """Return tensors with the names and shapes of `wanted`, a network of `depth` blocks, copied
    only where they must be joined. Raises InputError that names missing, unknown and misshapen
    tensors as the file names them; other networks in the file are ignored."""
    layout = layout_of(stored)
    sizes = {name: list(t.shape) for name, t in to_layout(wanted, layout, depth).items()}
    own = {name: tensor for name, (tensor, _) in stored.items() if not name.startswith(OTHERS)}
    found = {name: list(tensor.shape) for name, tensor in own.items()}
    dtypes = ", ".join(DTYPE_NAMES[dtype] for dtype in FLOATS)
    faults = {
        "missing": [name for name in sizes if name not in found],
        "unknown": [name for name in found if name not in sizes],
        "misshapen": [f"{name} {found[name]}, not {size}" for name, size in sizes.items()
                      if found.get(name, size) != size],
        "of another dtype": [f"{name} {tensor.dtype}, not {dtypes}" for name, tensor in own.items()
                             if tensor.dtype not in FLOATS]}
    listed = [f"{len(names)} {fault}: {', '.join(names[:3])}" for fault, names in faults.items()
              if names]
    must(not listed,
         f"{path} must hold the {len(sizes)} tensors of this MMDiT (got {'; '.join(listed)})")

    out = {}
    for name in wanted:
        parts = parts_of(name, layout)
        tensors = [own[parts[0]]]
        if len(parts) > 1:
            # each by a memory mapping of its own, whose pages are released together with it
            tensors = [read_tensors(stored[part][1], [part])[0][part] for part in parts]
        for part, tensor in zip(parts, tensors):
            must(is_finite(tensor), f"{stored[part][1]}: {part} must be finite (got NaN or inf)")
        out[name] = tensors[0] if len(parts) == 1 else torch.cat(tensors)
        if layout == "diffusers":
            out[name] = swap_halves(name, out[name], depth)
    return out


# --- writing ---

def header(c: MMDiTConfig, layout: str, title: str, metadata: dict[str, str]) -> dict[str, str]:
    """Return the header of a file: what Stability's ModelSpec 1.0 requires, and `metadata`, which
    may replace some of that."""
    size = SIZES.get((c.depth, c.width, c.qk_norm, len(c.dual_blocks)), "")
    source = "https://github.com/Stability-AI/sd3.5" if layout == "single" else "diffusers"
    return {"modelspec.sai_model_spec": "1.0.0", "modelspec.title": title,
            "modelspec.architecture": f"stable-diffusion-v3{size}",
            "modelspec.prediction_type": "velocity", **metadata, "modelspec.implementation": source,
            "format": "pt"}


def write_transformer(folder: Path, state: dict[str, Tensor], c: MMDiTConfig,
                      metadata: dict[str, str], dtype: torch.dtype | None,
                      max_shard_bytes: int = 10 ** 10) -> None:
    """Write the folder that SD3Transformer2DModel.from_pretrained loads: config.json and the
    weights, in several files with an index where one would be larger than `max_shard_bytes`."""
    write_json(folder / "config.json", transformer_config(c))
    shards = [{}]
    size = total = 0
    for name, tensor in to_layout(state, "diffusers", c.depth).items():
        more = tensor.numel() * (dtype or tensor.dtype).itemsize
        if shards[-1] and size + more > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += more
        total += more
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        file = WEIGHTS
        if len(shards) > 1:
            file = WEIGHTS.replace(".", f"-{i:05d}-of-{len(shards):05d}.")
        write_tensors(folder / file, shard, metadata, dtype)
        weight_map |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def transformer_config(c: MMDiTConfig) -> dict[str, Any]:
    """Return the config.json of SD3Transformer2DModel."""
    return {
        "_class_name": CLASS,
        # latent size of the images that a pipeline generates by default
        "sample_size": min(2 * BASE_GRID, c.patch * c.pos_grid),
        "patch_size": c.patch, "in_channels": c.in_channels, "out_channels": c.out_channels,
        "num_layers": c.depth, "attention_head_dim": HEAD_DIM,
        "num_attention_heads": c.width // HEAD_DIM, "joint_attention_dim": c.context_dim,
        "caption_projection_dim": c.width, "pooled_projection_dim": c.pooled_dim,
        "pos_embed_max_size": c.pos_grid, "dual_attention_layers": list(c.dual_blocks),
        "qk_norm": "rms_norm" if c.qk_norm else None}
