"""LoRA files: written with the names that diffusers and ComfyUI load, read with those of several
programs, and added to a network.

    transformer.transformer_blocks.0.attn.to_q.lora_A.weight and .lora_B.weight

diffusers rejects a tensor alpha and ComfyUI reads no header, so B is stored times alpha / rank, and
alpha is the rank. q, k and v each get the A of our fused qkv, and their rows of its B.

Sources: ComfyUI's comfy/lora.py, diffusers 0.42, kohya's networks/lora_sd3.py.
"""
import json
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ladd.cli import InputError, must
from ladd.core.lora import Factors
from ladd.core.mmdit import MMDiT, MMDiTConfig
from ladd.data.files import (DTYPE_NAMES, is_finite, parse_json, read_json, read_tensors,
                             write_tensors)
from ladd.sd3.formats import FLOATS, INNER, OUTER, header, parts_of, swap_halves

PREFIXES = (r"transformer\.|base_model\.model\.|(model\.)?diffusion_model\.|"
            r"lora_(unet|transformer)_|lycoris_")
ROLES = {"A": "a", "down": "a", "B": "b", "up": "b"}
# tensors of text encoders, which are left out, and of embeddings for them
TEXT = r"lora_te\d?_|text_encoders?(_\d)?\.|(clip_[lg]|t5|t5xxl|bundle_emb)\."
KINDS = {"DoRA": r"lora_magnitude_vector|dora_scale", "LoKr": r"\.lokr_", "LoHa": r"\.hada_",
         "OFT": r"\.b?oft_"}


# --- writing ---

def save(path: str | Path, layers: Mapping[str, Factors], sizes: MMDiTConfig,
         metadata: Mapping[str, str] | None = None) -> None:
    """Write the LoRA of a network of these sizes, {layer: matrices}. The header holds the facts of
    ModelSpec, the configuration for PEFT, and `metadata`."""
    path = Path(path)
    must(len(layers) > 0, f"{path}: the network must have a LoRA (got none)")
    tensors, ranks = {}, {}
    for name, f in layers.items():
        names = parts_of(f"{name}.weight", "diffusers")
        b = swap_halves(f"{name}.weight", (f.b.double() * f.scale).to(f.b.dtype), sizes.depth)
        for part, rows in zip(names, b.chunk(len(names))):
            module = part.removesuffix(".weight")
            ranks[module] = len(f.a)
            tensors |= {f"transformer.{module}.lora_A.weight": f.a,
                        f"transformer.{module}.lora_B.weight": rows}
    first = next(iter(ranks.values()))
    others = {module: rank for module, rank in ranks.items() if rank != first}
    peft = {"r": first, "lora_alpha": first, "rank_pattern": others, "alpha_pattern": others,
            "target_modules": list(ranks)}
    about = header(sizes, "diffusers", path.name.removesuffix(".safetensors"), {})
    about["modelspec.architecture"] += "/lora"
    about["lora_adapter_metadata"] = json.dumps({f"transformer.{k}": v for k, v in peft.items()})
    write_tensors(path, tensors, {**about, **(metadata or {})})


# --- reading ---

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
        if len(parts) == 3 and name[:-1] == f"{ours.replace('.', '_')}_" and name[-1] in "012":
            return layer, int(name[-1]), 3, False       # by OneTrainer
    return None


def load(path: str | Path) -> dict[str, Factors]:
    """Return {our layer: its LoRA} of a file by diffusers, PEFT, kohya, ComfyUI, LyCORIS or
    OneTrainer; print how many tensors of text encoders are left out.

    alpha is the rank where neither a tensor nor the header gives it; A of the patch convolution is
    [rank, c p p]. Raises InputError that names the tensor, or the kind of what is no plain LoRA.
    """
    path = Path(path)
    tensors, metadata = read_tensors(path)
    alpha_of = header_alpha(metadata, path)
    own = {key: tensor for key, tensor in tensors.items() if not re.match(TEXT, key)}
    left_out = len(tensors) - len(own)
    for kind, pattern in KINDS.items():
        found = [key for key in own if re.search(pattern, key)]
        must(not found, f"{path} must be a plain LoRA of matrices A and B (got {kind}: "
             f"{', '.join(found[:1])})")
    modules: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for key, tensor in own.items():
        match = re.fullmatch(r"(.*?)\.(lora_(A|B|down|up)(\.default)?\.weight|alpha)", key)
        if match is None or place(match[1]) is None:
            unknown.append(key)
            continue
        role = ROLES.get(match[3], "alpha")
        matrices = modules.setdefault(match[1], {})
        must(role not in matrices, f"{path}: {key} is also stored by another name; keep one")
        must(tensor.dtype in (DTYPE_NAMES if role == "alpha" else FLOATS),
             f"{path}: {key} must be F32, BF16, F16 or F64 (got {tensor.dtype})")
        must(is_finite(tensor), f"{path}: {key} must be finite (got NaN or inf)")
        matrices[role] = tensor
    must(len(own) > 0 and not unknown,
         f"{path} must hold lora_A and lora_B, or lora_down, lora_up and alpha, of SD3's linear "
         f"layers (got {len(own)} tensors and {left_out} of text encoders, {len(unknown)} unknown: "
         f"{', '.join(unknown[:3])})")
    layers: dict[str, list[Factors | None]] = {}
    for module, matrices in modules.items():
        what = f"{path}: {module}"
        layer, part, count, diffusers = place(module)
        parts = layers.setdefault(layer, [None] * count)
        must(len(parts) == count and parts[part] is None,
             f"{path}: {layer} is stored by several names, such as {module}; keep one")
        missing = min({"a", "b"} - set(matrices), default="").upper()
        must(not missing, f"{what} must have both matrices A and B (got no {missing})")
        a, b = matrices["a"], matrices["b"]
        if layer == "x_embedder.proj" and a.ndim == 4 and list(b.shape[2:]) == [1, 1]:
            a, b = a.flatten(1), b.flatten(1)
        alpha = matrices.get("alpha", torch.empty(()))
        must(a.ndim == 2 and b.ndim == 2 and 0 < len(a) == b.shape[1] and alpha.numel() == 1,
             f"{what} must have A [rank, k], B [n, rank] and one number alpha (got A "
             f"{list(a.shape)}, B {list(b.shape)}, alpha {list(alpha.shape)})")
        # The modulation of the text in the last block has shift and scale only, so 2 k rows. A
        # file does not tell the depth of the network, which formats.swap_halves goes by.
        last = ".context_block.adaLN" in layer and len(b) == 2 * a.shape[1]
        if diffusers and (last or layer.startswith("final_layer.adaLN")):
            b = b.roll(len(b) // 2, 0)
        number = alpha.item() if "alpha" in matrices else alpha_of(module, len(a))
        parts[part] = Factors(a, b, float(number))
    if left_out:
        print(f"note: {path}: {left_out} tensors of text encoders are left out")
    return {layer: stacked(parts, f"{path}: {layer}") for layer, parts in layers.items()}


def header_alpha(metadata: Mapping[str, str], path: Path) -> Callable[[str, int], float]:
    """Return the function (module, rank) -> alpha that a header by diffusers, or the configuration
    that PEFT writes next to its file, defines; alpha is the rank where they say nothing."""
    try:
        about = parse_json(metadata.get("lora_adapter_metadata", "{}"))
        beside = path.with_name("adapter_config.json")
        if path.name == "adapter_model.safetensors" and beside.exists():
            about = read_json(beside, dict)
        about = {key.removeprefix("transformer."): value for key, value in about.items()}
        # PEFT reads regular expressions; those that name modules are taken, since others can hang
        ends = {pattern.removeprefix("^").removesuffix("$").replace("\\.", "."): float(value)
                for pattern, value in (about.get("alpha_pattern") or {}).items()}
        if about.get("lora_alpha") is not None:
            ends[""] = float(about["lora_alpha"])       # of all others
        for end, value in ends.items():
            if not (re.fullmatch(r"[\w.]*", end) and math.isfinite(value)):
                raise ValueError(f"alpha {value:g} of {end!r}, not a finite number of a module")
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise InputError(f"{path}: lora_adapter_metadata must be as diffusers writes it "
                         f"(got: {error})") from None

    def alpha(module: str, rank: int) -> float:
        name = f".{re.sub(f'^({PREFIXES})', '', module)}"
        for end, value in ends.items():
            if name.endswith(f".{end}") or not end:
                # rank-stabilized LoRA scales by alpha / sqrt(rank), not alpha / rank
                return value * math.sqrt(rank) if about.get("use_rslora") else value
        return rank

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


# --- adding to a network ---

Loras = list[tuple[Path, float, dict[str, Factors]]]    # file, weight, {layer: its LoRA}


def read_flags(flags: list[str]) -> Loras:
    """Return the files of --lora FILE or FILE:WEIGHT; raise InputError that names the flag."""
    loras = []
    for text in flags:
        file, _, number = text.rpartition(":")
        try:
            weight = float(number)
        except ValueError:
            weight = None
        if weight is None or os.path.isfile(text):      # the colon belongs to the name
            file, weight = text, 1.0
        must(os.path.isfile(file), "--lora must be FILE or FILE:WEIGHT, an existing file and a "
             f"number (got {text!r})")
        must(math.isfinite(weight), f"--lora {file}: the weight must be finite (got {number})")
        try:
            loras.append((Path(file), weight, load(file)))
        except InputError as error:
            raise InputError(f"--lora {error}") from None
    return loras


@torch.no_grad()
def merge(model: MMDiT, loras: Loras) -> None:
    """Add the sum of weight (alpha / rank) B A to the weights of `model`, rounded once to their
    dtype. Raise InputError where a LoRA is of another network."""
    weights, c = {name: t for name, t in model.named_parameters() if t.ndim > 1}, model.config
    for name in sorted({name for *_, layers in loras for name in layers}):
        weight, total = weights.get(f"{name}.weight"), 0
        size = [] if weight is None else [len(weight), weight[0].numel()]
        for path, scale, layers in [lora for lora in loras if name in lora[2]]:
            f = layers[name]
            must(size == [len(f.b), f.a.shape[1]], f"--lora {path} must be of this network, "
                 f"{c.depth} blocks of width {c.width}, whose {name} has size {size} (got "
                 f"{[len(f.b), f.a.shape[1]]})")
            total = total + scale * f.delta()
        total = (weight.double() + total.view_as(weight)).to(weight.dtype)
        must(is_finite(total), f"--lora {path}: {name} with the LoRA added must be finite in "
             f"{weight.dtype} (got NaN or inf)")
        weight.copy_(total)
