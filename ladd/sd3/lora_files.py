"""LoRA files: written with the names of diffusers or ComfyUI, read with those of several programs.

ComfyUI loads both layouts:
    diffusers   transformer.transformer_blocks.0.attn.to_q.lora_A.weight and .lora_B.weight. Its
                loader rejects .alpha, so B is stored times alpha / rank. q, k and v each get the A
                of our fused qkv, and their rows of its B.
    comfyui     lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight, .lora_up.weight and
                .alpha, the names of kohya.

Sources: ComfyUI's comfy/lora.py, diffusers 0.42, kohya's networks/lora_sd3.py.
"""
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ladd.cli import InputError, must
from ladd.core.lora import Factors
from ladd.core.mmdit import MMDiTConfig
from ladd.data.files import parse_json, read_tensors, write_tensors
from ladd.sd3.formats import INNER, OUTER, header, parts_of, swap_halves

PREFIXES = (r"transformer\.|base_model\.model\.|(model\.)?diffusion_model\.|"
            r"lora_(unet|transformer)_|lycoris_")
ROLES = {"lora_A.weight": "a", "lora_A.default.weight": "a", "lora_down.weight": "a",
         "lora_B.weight": "b", "lora_B.default.weight": "b", "lora_up.weight": "b",
         "alpha": "alpha"}


def save(path: str | Path, layers: Mapping[str, Factors], sizes: MMDiTConfig, layout: str,
         metadata: Mapping[str, str] | None = None, dtype: torch.dtype | None = None) -> None:
    """Write the LoRA of a network of these sizes, {layer: matrices}, in `dtype` (None: as it is).
    The header holds the facts of ModelSpec, rank and alpha of the training, and `metadata`."""
    path = Path(path)
    must(layout in ("diffusers", "comfyui"),
         f"layout must be diffusers or comfyui (got {layout!r})")
    must(len(layers) > 0, f"{path}: the network must have a LoRA (got none)")
    about = header(sizes, "diffusers" if layout == "diffusers" else "single", path.stem, {})
    about["modelspec.architecture"] += "/lora"
    about["rank"] = ",".join(f"{rank:g}" for rank in sorted({len(f.a) for f in layers.values()}))
    about["alpha"] = ",".join(f"{alpha:g}" for alpha in sorted({f.alpha for f in layers.values()}))
    tensors = {}
    for name, f in layers.items():
        kept = dtype or f.b.dtype
        a = f.a.to(kept)
        if layout == "comfyui":
            key = "lora_unet_" + name.replace(".", "_")
            tensors |= {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": f.b.to(kept),
                        f"{key}.alpha": torch.tensor(f.alpha, dtype=torch.float32)}
            continue
        names = parts_of(f"{name}.weight", "diffusers")
        b = swap_halves(f"{name}.weight", (f.b.double() * f.scale).to(kept), sizes.depth)
        for part, rows in zip(names, b.chunk(len(names))):
            key = f"transformer.{part.removesuffix('.weight')}"
            tensors |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": rows}
    for name, tensor in tensors.items():
        must(bool(tensor.isfinite().all()),
             f"{name}: values must be finite in {tensor.dtype} (got NaN or inf)")
    write_tensors(path, tensors, {**about, **(metadata or {})})


def place(module: str) -> tuple[str, int, int, bool] | None:
    """Return (our layer, which of the modules stacked in it, their number, named as in diffusers)
    of a module as any of the known programs names it, None if the network has none."""
    bare = re.sub(f"^({PREFIXES})", "", module).replace(".", "_")
    block = re.fullmatch(r"(joint|transformer)_blocks_(\d+)_(.+)", bare)
    name = block[3] if block else bare
    for ours, theirs in (INNER if block else OUTER).items():
        layer = f"joint_blocks.{block[2]}.{ours}" if block else ours
        parts = theirs.replace(".", "_").split()
        if name == ours.replace(".", "_"):
            return layer, 0, 1, False
        if name in parts:
            return layer, parts.index(name), len(parts), True
    return None


def load(path: str | Path) -> dict[str, Factors]:
    """Return {our layer: its LoRA} of a file by diffusers, PEFT, kohya, ComfyUI or OneTrainer, for
    lora.apply.

    alpha is the rank where neither a tensor nor the header gives it. Raises InputError that names
    what is unknown, duplicated, incomplete or misshapen.
    """
    path = Path(path)
    tensors, metadata = read_tensors(path)
    alpha_of = header_alpha(metadata, path)
    modules: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for key, tensor in tensors.items():
        match = re.fullmatch(r"(.*?)\.(lora_\w+\..*|alpha)", key)
        role = ROLES.get(match[2]) if match else None
        if role is None or place(match[1]) is None:
            unknown.append(key)
            continue
        matrices = modules.setdefault(match[1], {})
        must(role not in matrices, f"{path}: {key} is also stored by another name; keep one")
        matrices[role] = tensor
    must(len(tensors) > 0 and not unknown,
         f"{path} must hold lora_A and lora_B, or lora_down, lora_up and alpha, of SD3's linear "
         f"layers (got {len(tensors)} tensors, {len(unknown)} unknown: {', '.join(unknown[:3])})")
    layers: dict[str, list[Factors | None]] = {}
    for module, matrices in modules.items():
        what = f"{path}: {module}"
        layer, part, count, diffusers = place(module)
        parts = layers.setdefault(layer, [None] * count)
        must(len(parts) == count and parts[part] is None,
             f"{path}: {layer} is stored by several names, such as {module}; keep one")
        for role in ("a", "b"):
            must(role in matrices,
                 f"{what} must have both matrices A and B (got no {role.upper()})")
        a, b = matrices["a"], matrices["b"]
        alpha = matrices.get("alpha")
        if alpha is None:
            alpha = torch.tensor(alpha_of(module, len(a)), dtype=torch.float64)
        must(a.ndim == 2 and b.ndim == 2 and 0 < len(a) == b.shape[1] and alpha.numel() == 1,
             f"{what} must have A [rank, k], B [n, rank] and one number alpha (got A "
             f"{list(a.shape)}, B {list(b.shape)}, alpha {list(alpha.shape)})")
        # The modulation of the text in the last block has shift and scale only, so 2 k rows. A
        # file does not tell the depth of the network, which formats.swap_halves goes by.
        last = ".context_block.adaLN" in layer and len(b) == 2 * a.shape[1]
        if diffusers and (last or layer.startswith("final_layer.adaLN")):
            b = b.roll(len(b) // 2, 0)
        parts[part] = Factors(a, b, alpha.item())
    return {layer: stacked(parts, f"{path}: {layer}") for layer, parts in layers.items()}


def header_alpha(metadata: Mapping[str, str], path: Path) -> Callable[[str, int], float]:
    """Return the function (module, rank) -> alpha that a header by diffusers defines; alpha is the
    rank where it says nothing."""
    try:
        about = parse_json(metadata.get("lora_adapter_metadata", "{}"))
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


def stacked(parts: list[Factors | None], what: str) -> Factors:
    """Return one LoRA of a stacked layer from those of its parts; a part without one (None) gets
    zero rows. Parts with the same A keep their rank; others become one whose rank is the sum of
    theirs, with a block-diagonal B, which computes the same."""
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
