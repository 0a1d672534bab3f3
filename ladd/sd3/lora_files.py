"""LoRA files: written with the names of diffusers or ComfyUI, read with those of several programs.

ComfyUI loads both layouts:
    diffusers   transformer.transformer_blocks.0.attn.to_q.lora_A.weight and .lora_B.weight. Its
                loader rejects .alpha, so B is stored times alpha / rank. q, k and v each get the A
                of our fused qkv, and their rows of its B.
    comfyui     lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight, .lora_up.weight and
                .alpha, the names of kohya.

Sources: ComfyUI's comfy/lora.py, diffusers 0.42, kohya's networks/lora_sd3.py.
"""
import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ladd.cli import InputError, must
from ladd.core.lora import Factors
from ladd.core.mmdit import MMDiTConfig
from ladd.data.files import publish, read_tensors, write_tensors
from ladd.sd3.formats import INNER, OUTER, diffusers_names, header, swap_halves

PREFIXES = (r"transformer\.|base_model\.model\.|(model\.)?diffusion_model\.|"
            r"lora_(unet|transformer)_|lycoris_")
ROLES = {"lora_A.weight": "a", "lora_A.default.weight": "a", "lora_down.weight": "a",
         "lora_B.weight": "b", "lora_B.default.weight": "b", "lora_up.weight": "b",
         "alpha": "alpha"}


# --- writing ---

def save(path: str | Path, layers: Mapping[str, Factors], sizes: MMDiTConfig, layout: str,
         metadata: Mapping[str, str] | None = None, dtype: torch.dtype | None = None) -> None:
    """Write the LoRA of a network of these sizes, {layer: matrices}, in `dtype` (None: as it is).
    The header holds the facts of ModelSpec, rank and alpha of the training, and `metadata`.

    Raises InputError for an unknown layout, without layers, and for a value that is not finite.
    """
    path = Path(path)
    must(layout in ("diffusers", "comfyui"),
         f"layout must be diffusers or comfyui (got {layout!r})")
    must(len(layers) > 0, f"{path}: the network must have a LoRA (got none)")
    about = header(sizes, "diffusers" if layout == "diffusers" else "single", path.stem, {})
    about["modelspec.architecture"] += "/lora"
    ranks = {len(f.a) for f in layers.values()}
    alphas = {f.alpha for f in layers.values()}
    about["rank"] = ",".join(f"{rank:g}" for rank in sorted(ranks))
    about["alpha"] = ",".join(f"{alpha:g}" for alpha in sorted(alphas))
    tensors = {}
    for name, f in layers.items():
        tensors |= layer_tensors(name, f, layout, sizes.depth, dtype or f.b.dtype)
    for name, tensor in tensors.items():
        must(bool(tensor.isfinite().all()),
             f"{name}: values must be finite in {tensor.dtype} (got NaN or inf)")
    publish(path, lambda path: write_tensors(path, tensors, {**about, **(metadata or {})}))


def layer_tensors(name: str, f: Factors, layout: str, depth: int,
                  dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the LoRA of our layer `name` as {name in the file: tensor}."""
    a = f.a.to(dtype)
    if layout == "comfyui":
        key = "lora_unet_" + name.replace(".", "_")
        return {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": f.b.to(dtype),
                f"{key}.alpha": torch.tensor(f.alpha, dtype=torch.float32)}
    weight = f"{name}.weight"
    names = diffusers_names(weight)
    b = swap_halves(weight, (f.b.double() * f.scale).to(dtype), depth)
    out = {}
    for part, rows in zip(names, b.chunk(len(names))):
        key = f"transformer.{part.removesuffix('.weight')}"
        out |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": rows}
    return out


# --- reading ---

class Place(NamedTuple):
    """The place of a module of a file in our network."""
    layer: str         # our layer
    part: int          # index of its rows in the layer,
    parts: int         # which stacks so many modules
    diffusers: bool    # named as in diffusers


def place(module: str) -> Place | None:
    """Return the place of a module as any of the known programs names it, None if it has none."""
    bare = re.sub(f"^({PREFIXES})", "", module).replace(".", "_")
    block = re.fullmatch(r"(joint|transformer)_blocks_(\d+)_(.+)", bare)
    name = block[3] if block else bare
    for ours, theirs in (INNER if block else OUTER).items():
        layer = f"joint_blocks.{block[2]}.{ours}" if block else ours
        parts = theirs.replace(".", "_").split()
        if name == ours.replace(".", "_"):
            return Place(layer, 0, 1, False)
        if name in parts:
            return Place(layer, parts.index(name), len(parts), True)
    return None


def load(path: str | Path) -> dict[str, Factors]:
    """Return {our layer: its LoRA} of a file by diffusers, PEFT, kohya, ComfyUI or OneTrainer, for
    lora.apply.

    q, k and v with the same A become one LoRA of the fused layer with their rank; others become
    one whose rank is the sum of theirs, with a block-diagonal B, which computes the same. alpha is
    the rank where neither a tensor nor the header gives it. Raises InputError that names what is
    unknown, duplicated, incomplete or misshapen.
    """
    path = Path(path)
    tensors, metadata = read_tensors(path)
    alpha_of = header_alpha(metadata, path)
    found: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for key, tensor in tensors.items():
        match = re.search(r"\.(lora_\w+\..*|alpha)$", key)
        role = ROLES.get(match[1]) if match else None
        module = key[:match.start()] if match else key
        if role is None or place(module) is None:
            unknown.append(key)
            continue
        matrices = found.setdefault(module, {})
        must(role not in matrices, f"{path}: {key} is also stored by another name; keep one")
        matrices[role] = tensor
    must(len(tensors) > 0 and not unknown,
         f"{path} must hold lora_A and lora_B, or lora_down, lora_up and alpha, of SD3's linear "
         f"layers (got {len(tensors)} tensors, {len(unknown)} unknown: {', '.join(unknown[:3])})")
    layers: dict[str, list[Factors | None]] = {}
    for module, matrices in found.items():
        at = place(module)
        parts = layers.setdefault(at.layer, [None] * at.parts)
        must(len(parts) == at.parts and parts[at.part] is None,
             f"{path}: {at.layer} is stored by several names, such as {module}; keep one")
        alpha = alpha_of(module, len(matrices.get("a", ())))
        parts[at.part] = factors(matrices, at, alpha, f"{path}: {module}")
    return {layer: stacked(parts, f"{path}: {layer}") for layer, parts in layers.items()}


def header_alpha(metadata: Mapping[str, str], path: Path) -> Callable[[str, int], float]:
    """Return the function (module, rank) -> alpha that a header by diffusers defines; alpha is the
    rank where it says nothing."""
    try:
        about = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        about = {key.removeprefix("transformer."): value for key, value in about.items()}
        usual = float(about["lora_alpha"]) if "lora_alpha" in about else None
        special = [(re.compile(rf"(.*\.)?({pattern})"), float(value))
                   for pattern, value in (about.get("alpha_pattern") or {}).items()]
    except (ValueError, TypeError, AttributeError, re.error) as error:
        raise InputError(f"{path}: lora_adapter_metadata must be as diffusers writes it "
                         f"(got: {error})") from None

    def alpha(module: str, rank: int) -> float:
        name = module.removeprefix("transformer.")
        value = next((value for pattern, value in special if pattern.fullmatch(name)), usual)
        if value is None:
            return float(rank)
        # rank-stabilized LoRA scales by alpha / sqrt(rank), not alpha / rank
        return value * math.sqrt(rank) if about.get("use_rslora") else value

    return alpha


def factors(matrices: Mapping[str, Tensor], at: Place, alpha: float, what: str) -> Factors:
    """Return the LoRA of one module of a file with its rows in our order; `alpha` holds where the
    file has no tensor alpha."""
    for role in ("a", "b"):
        must(role in matrices, f"{what} must have both matrices A and B (got no {role.upper()})")
    a, b = matrices["a"], matrices["b"]
    stored = matrices.get("alpha", torch.tensor(alpha))
    must(a.ndim == 2 and b.ndim == 2 and 0 < len(a) == b.shape[1] and stored.numel() == 1,
         f"{what} must have A [rank, k], B [n, rank] and one number alpha (got A {list(a.shape)}, "
         f"B {list(b.shape)}, alpha {list(stored.shape)})")
    # The modulation of the text in the last block has shift and scale only, so 2 k rows. A file
    # does not tell the depth of the network, which formats.swap_halves goes by.
    last = ".context_block.adaLN" in at.layer and len(b) == 2 * a.shape[1]
    if at.diffusers and (last or at.layer.startswith("final_layer.adaLN")):
        b = b.roll(len(b) // 2, 0)
    return Factors(a, b, stored.item() if "alpha" in matrices else alpha)


def stacked(parts: list[Factors | None], what: str) -> Factors:
    """Return one LoRA of a stacked layer from those of its parts; a part without one (None) gets
    zero rows."""
    if len(parts) == 1:
        return parts[0]
    given = [f for f in parts if f is not None]
    first = given[0]
    sizes = [[len(f.b), f.a.shape[1]] for f in given]
    must(all(size == sizes[0] for size in sizes),
         f"{what}: the parts of a stacked layer must have one size (got {sizes})")
    if len(given) == len(parts) and all(f.scale == first.scale and f.a.equal(first.a)
                                        for f in given):
        return first._replace(b=torch.cat([f.b for f in given]))
    blocks = [first.b.new_zeros(sizes[0][0], 0) if f is None
              else f.b.float() * (f.scale / first.scale) for f in parts]
    a = torch.cat([f.a for f in given])
    return Factors(a, torch.block_diag(*blocks), first.scale * len(a))
