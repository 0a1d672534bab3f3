"""Low-rank adaptation (Hu et al. 2021) of an MMDiT's linear layers, and its files.

    y = W x + bias + (alpha / rank) B A x,    A [rank, k], B [n, rank]

W and bias are frozen; B starts at zero, so the start is the base bit for bit. A layer keeps its weight and
bias and gets lora_a and lora_b beside them. Order: the base's weights or meta, add or apply, then
parallel.checkpointed, compiled, shard, load.

Files; ComfyUI loads both (names read in its comfy/lora.py, diffusers 0.42 and kohya's networks/lora_sd3.py):
    diffusers   transformer.transformer_blocks.0.attn.to_q.lora_A.weight and .lora_B.weight. Its loader
                refuses .alpha, so B carries alpha / rank; q, k and v have the fused A each, their rows of B
    comfyui     lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight, .lora_up.weight, .alpha (kohya's)
"""
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ladd.config import InputError
from ladd.data import publish, read_tensors, write_tensors
from ladd.formats import INNER, OUTER, diffusers_names, halves, header
from ladd.mmdit import Linear, MMDiT
from ladd.parallel import agree, fill, full, ranks

ATTENTION = "attn*.qkv", "attn*.proj"    # of both streams and the second attention: diffusers' choice for SD3
ALL = ("joint_blocks.*",)                # every linear layer of the blocks
TARGETS = {"attention": ATTENTION, "all": ALL}
PREFIXES = r"transformer\.|base_model\.model\.|(model\.)?diffusion_model\.|lora_(unet|transformer)_|lycoris_"
ROLES = {"lora_A.weight": "a", "lora_A.default.weight": "a", "lora_down.weight": "a",
         "lora_B.weight": "b", "lora_B.default.weight": "b", "lora_up.weight": "b", "alpha": "alpha"}


class Lora(Linear):
    """A linear layer with a low-rank product beside its frozen weight; both compute in the input's dtype."""

    lora_a: nn.Parameter      # [rank, k]
    lora_b: nn.Parameter      # [n, rank]
    alpha: float
    base: Tensor | None       # the weight without the product while that is merged into it

    @property
    def scale(self) -> float:
        return self.alpha / self.lora_a.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if self.base is not None:
            return y
        thin = F.linear(x, self.lora_a.to(x.dtype)) * self.scale
        return y + F.linear(thin, self.lora_b.to(x.dtype))


class Factors(NamedTuple):
    """What a file holds of a layer's LoRA: alpha / rank times b [n, rank] a [rank, k]."""
    a: Tensor
    b: Tensor
    alpha: float

    @property
    def scale(self) -> float:
        return self.alpha / len(self.a)

    def delta(self) -> Tensor:
        """(alpha / rank) B A [n, k] in float64."""
        return self.scale * (self.b.double() @ self.a.double())


# networks

def add(model: MMDiT, rank: int, alpha: float, targets: Sequence[str],
        generator: torch.Generator) -> dict[str, Tensor]:
    """Gives the linear layers that `targets` name a LoRA, in place; from then on nothing else trains.

    A target is a layer's name, its end, or a pattern of these with *: "mlp.fc1", "x_block.attn.qkv"; or those
    of ATTENTION or ALL. Returns the new matrices, whole, by parameter name: A uniform within 1 / sqrt(k), B
    zero. A network on meta takes them from there: parallel.load(model, base | add(...), device).
    """
    if not 1 <= rank <= model.config.width or not 0 < alpha < math.inf:
        raise InputError(f"LoRA: found rank {rank} and alpha {alpha}, 1 to the network's width "
                         f"{model.config.width} and above 0 accepted")
    linear = of_kind(model, Linear)
    meant = {target: {name for name in linear if fnmatchcase(f".{name}", f"*.{target}")}
             for target in targets}
    if unknown := [target for target in meant if not meant[target]] or ["none"] * (not meant):
        ends = sorted({".".join(name.split(".")[-2:]) for name in linear})
        raise InputError(f"LoRA targets: found {', '.join(unknown)}, names and patterns of this network's "
                         f"linear layers accepted: joint_blocks.*, {', '.join(ends)}")
    new = {}
    for name, layer in linear.items():
        if any(name in names for names in meant.values()):
            n, k = layer.weight.shape
            a = torch.empty(rank, k, device="cpu").uniform_(-k ** -0.5, k ** -0.5, generator=generator)
            new[name] = Factors(a, torch.zeros(n, rank, device="cpu"), alpha)
    return apply(model, new)


def apply(model: MMDiT, loaded: Mapping[str, Factors]) -> dict[str, Tensor]:
    """Gives the layers named in `loaded` these LoRAs, matrices in fp32 or better; else as add.

    Raises InputError, before anything changes, where a layer is absent, of another width or has one already.
    """
    linear = of_kind(model, Linear)
    for name, f in loaded.items():
        if name not in linear:
            raise InputError(f"LoRA: found one of {name}, one of a linear layer of this network ("
                             f"{model.config.depth} blocks of width {model.config.width}) accepted")
        found, size = [len(f.b), f.a.shape[1]], list(linear[name].weight.shape)
        if found != size:
            raise InputError(f"LoRA of {name}: found one of a layer {found}, {size} accepted")
        if isinstance(linear[name], Lora):
            raise InputError(f"LoRA of {name}: found one there, a layer without accepted (merge, remove)")
    model.requires_grad_(False)
    for name, f in loaded.items():
        layer, weight = linear[name], linear[name].weight
        like = dict(device=weight.device, dtype=torch.promote_types(weight.dtype, torch.float32))
        layer.__class__, layer.alpha = Lora, f.alpha         # in place: whatever holds the layer keeps it
        layer.lora_a = nn.Parameter(torch.zeros(f.a.shape, **like))
        layer.lora_b = nn.Parameter(torch.zeros(f.b.shape, **like))
        layer.register_buffer("base", None, persistent=False)
    tensors = {f"{name}.lora_{part}": getattr(f, part) for name, f in loaded.items() for part in "ab"}
    trains = parameters(model)
    for p in trains.values():
        p.requires_grad_(True)
    if not model.pos_embed.is_meta:
        fill({name: trains[name] for name in tensors}, tensors)
    return tensors


def of_kind(model: nn.Module, kind: type) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, kind)}


def parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What trains, by name: for the optimizer, the average and the run state."""
    return {f"{name}.{part}": getattr(layer, part)
            for name, layer in of_kind(model, Lora).items() for part in ("lora_a", "lora_b")}


@torch.no_grad()
def delta(layer: Lora) -> Tensor:
    """(alpha / rank) B A [n, k] in float64. Of a sharded layer this process's rows; all processes call it."""
    a = layer.lora_a.full_tensor() if isinstance(layer.lora_a, DTensor) else layer.lora_a
    return Factors(a, rows(layer.lora_b), layer.alpha).delta()


def factors(model: nn.Module) -> dict[str, Factors]:
    """The network's LoRA, whole on the CPU, for `apply` and `merged`; all processes call it, in others than
    process 0 it is empty."""
    whole = dict(full(parameters(model)))
    return {} if ranks()[0] else {
        name: Factors(whole[f"{name}.lora_a"], whole[f"{name}.lora_b"], layer.alpha)
        for name, layer in of_kind(model, Lora).items()}


def merged(weights: Mapping[str, Tensor], found: Mapping[str, Factors]) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of a plain network's `weights`, in fp32 or better, the products of `found` added to
    theirs: what merge would leave of a network in those weights, which may be more exact than the trained
    one's. One at a time."""
    for name, tensor in weights.items():
        dtype = torch.promote_types(tensor.dtype, torch.float32)
        f = found.get(name.removesuffix(".weight"))
        yield name, tensor.to(dtype) if f is None else (tensor.double() + f.delta()).to(dtype)


def rows(p: Tensor) -> Tensor:
    return (p.to_local() if isinstance(p, DTensor) else p).detach()


def merge(model: nn.Module) -> None:
    """Weights become W + (alpha / rank) B A, rounded to their dtype; layers then cost what the base's do, and
    their LoRA gets no gradient. Each W is kept for unmerge. What is merged already stays so."""
    for layer in of_kind(model, Lora).values():
        if layer.base is None:
            weight = rows(layer.weight)
            layer.base = weight.clone()
            weight.copy_(weight.double() + delta(layer))


def unmerge(model: nn.Module) -> None:
    """The base's weights again, bit for bit."""
    for layer in of_kind(model, Lora).values():
        if layer.base is not None:
            rows(layer.weight).copy_(layer.base)
            layer.base = None


def remove(model: nn.Module) -> None:
    """Plain layers with the weights of this moment, merged or not: what save_mmdit, export, fp8 and another
    LoRA take. Nothing trains afterwards. Raises ValueError for a sharded network."""
    if any(isinstance(p, DTensor) for p in parameters(model).values()):
        raise ValueError("LoRA: found a sharded network, whose parameters FSDP holds; a whole one accepted")
    for layer in of_kind(model, Lora).values():
        del layer.lora_a, layer.lora_b, layer.alpha, layer.base
        layer.__class__ = Linear


# writing

def save(path: str | Path, model: MMDiT, layout: str, metadata: Mapping[str, str] | None = None,
         dtype: torch.dtype | None = None) -> None:
    """Writes the network's LoRA in `dtype` (None: as it is); the header holds ModelSpec's facts, the rank and
    alpha of training, and `metadata`. All processes call it, process 0 writes.

    Raises InputError for a layout that is none, a network without LoRA and a value that is not finite.
    """
    path, found = Path(path), of_kind(model, Lora)
    if layout not in ("diffusers", "comfyui"):
        raise InputError(f"layout: found {layout!r}, diffusers and comfyui accepted")
    if not found:
        raise InputError(f"{path}: found a network without LoRA, one with LoRA accepted")
    whole = factors(model)
    if ranks()[0] == 0:
        about = header(model.config, "diffusers" if layout == "diffusers" else "single", path.stem, {})
        about["modelspec.architecture"] += "/lora"
        for key, values in (("rank", {len(layer.lora_a) for layer in found.values()}),
                            ("alpha", {layer.alpha for layer in found.values()})):
            about[key] = ",".join(f"{value:g}" for value in sorted(values))
        tensors = {}
        for name, f in whole.items():
            tensors |= spelled(name, f, layout, model.config.depth, dtype or f.b.dtype)
        for name, tensor in tensors.items():
            if not tensor.isfinite().all():
                raise InputError(f"{name}: found a value beyond {tensor.dtype}, finite ones accepted")
        publish(path, lambda path: write_tensors(path, tensors, {**about, **(metadata or {})}))
    agree()


def spelled(name: str, f: Factors, layout: str, depth: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """A layer's LoRA by the names of a layout."""
    a = f.a.to(dtype)
    if layout == "comfyui":
        key = "lora_unet_" + name.replace(".", "_")
        return {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": f.b.to(dtype),
                f"{key}.alpha": torch.tensor(f.alpha, dtype=torch.float32)}
    names = [f"transformer.{part.removesuffix('.weight')}" for part in diffusers_names(f"{name}.weight")]
    b = halves(f"{name}.weight", (f.b.double() * f.scale).to(dtype), depth)
    return {f"{part}.lora_{role}.weight": tensor for part, rows in zip(names, b.chunk(len(names)))
            for role, tensor in (("A", a), ("B", rows))}


# reading

class Place(NamedTuple):
    """Where a name in a file belongs."""
    layer: str      # ours
    part: int       # which rows of it
    parts: int      # of how many
    theirs: bool    # named as diffusers does


def place(module: str) -> Place | None:
    """The place of a layer as any of the known programs names it, None where it has none."""
    bare = re.sub(f"^({PREFIXES})", "", module).replace(".", "_")
    block = re.fullmatch(r"(joint|transformer)_blocks_(\d+)_(.+)", bare)
    for ours, theirs in (INNER if block else OUTER).items():
        layer = f"joint_blocks.{block[2]}.{ours}" if block else ours
        own, parts = (block[3] if block else bare), theirs.replace(".", "_").split()
        if own == ours.replace(".", "_"):
            return Place(layer, 0, 1, False)
        if own in parts:
            return Place(layer, parts.index(own), len(parts), True)
    return None


def load(path: str | Path) -> dict[str, Factors]:
    """{our layer: its LoRA} of a file by diffusers, PEFT, kohya, ComfyUI or OneTrainer, for `apply`.

    q, k and v that share A become one of the fused layer; others one whose rank is the sum of theirs, with a
    block diagonal B, which computes the same. Without alpha in tensors or header it is the rank.
    Raises InputError that names what is unknown, twice there, incomplete or misshapen.
    """
    path = Path(path)
    tensors, metadata = read_tensors(path)
    alpha_of, found, unknown = declared(metadata, path), {}, []
    for key, tensor in tensors.items():
        end = re.search(r"\.(lora_\w+\..*|alpha)$", key)
        role, module = (ROLES.get(end[1]), key[:end.start()]) if end else (None, key)
        if role is None or place(module) is None:
            unknown.append(key)
        elif role in found.setdefault(module, {}):
            raise InputError(f"{path}: found {key} and the same by another name, one accepted")
        else:
            found[module][role] = tensor
    if unknown or not tensors:
        raise InputError(f"{path}: of {len(tensors)} tensors, found {len(unknown)} unknown: "
                         f"{', '.join(unknown[:3])}; lora_A and lora_B or lora_down, lora_up and alpha of "
                         "SD3's linear layers accepted")
    layers: dict[str, list[Factors | None]] = {}
    for module, f in found.items():
        at = place(module)
        parts = layers.setdefault(at.layer, [None] * at.parts)
        if len(parts) != at.parts or parts[at.part] is not None:
            raise InputError(f"{path}: found {at.layer} by several names, such as {module}; one accepted")
        parts[at.part] = checked(f, at, alpha_of(module, len(f.get("a", ()))), f"{path}: {module}")
    return {layer: joined(parts, f"{path}: {layer}") for layer, parts in layers.items()}


def declared(metadata: Mapping[str, str], path: Path) -> Callable[[str, int], float]:
    """(name in the file, rank) -> alpha, as diffusers' header says it; the rank where it says nothing."""
    try:
        about = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        about = {key.removeprefix("transformer."): value for key, value in about.items()}
        usual = float(about["lora_alpha"]) if "lora_alpha" in about else None
        special = [(re.compile(rf"(.*\.)?({pattern})"), float(value))
                   for pattern, value in (about.get("alpha_pattern") or {}).items()]
    except (ValueError, TypeError, AttributeError, re.error) as error:
        raise InputError(f"{path}: found lora_adapter_metadata that says nothing ({error}), diffusers' own "
                         "accepted") from None

    def alpha(module: str, rank: int) -> float:
        name = module.removeprefix("transformer.")
        value = next((value for pattern, value in special if pattern.fullmatch(name)), usual)
        if value is None:
            return float(rank)
        return value * math.sqrt(rank) if about.get("use_rslora") else value     # it divides by the root
    return alpha


def checked(f: Mapping[str, Tensor], at: Place, alpha: float, what: str) -> Factors:
    """The LoRA that a file has by one name, in our order of rows; `alpha` where it has no tensor of it."""
    if absent := [kind for kind in "ab" if kind not in f]:
        raise InputError(f"{what}: found no {absent[0].upper()}, both matrices of a LoRA accepted")
    a, b, stored = f["a"], f["b"], f.get("alpha", torch.tensor(alpha))
    if a.ndim != 2 or b.ndim != 2 or not 0 < len(a) == b.shape[1] or stored.numel() != 1:
        raise InputError(f"{what}: found A {list(a.shape)}, B {list(b.shape)}, alpha {list(stored.shape)}; "
                         "[rank, k], [n, rank] and one number accepted")
    last = ".context_block.adaLN" in at.layer and len(b) == 2 * a.shape[1]       # of shift and scale alone
    if at.theirs and (last or at.layer.startswith("final_layer.adaLN")):
        b = b.roll(len(b) // 2, 0)                                               # formats.halves
    return Factors(a, b, f["alpha"].item() if "alpha" in f else alpha)


def joined(parts: list[Factors | None], what: str) -> Factors:
    """One LoRA of a stacked layer from those of its parts; one that is absent adds nothing to its rows."""
    if len(parts) == 1:
        return parts[0]
    there = [f for f in parts if f is not None]
    first, sizes = there[0], [[len(f.b), f.a.shape[1]] for f in there]
    if any(size != sizes[0] for size in sizes):
        raise InputError(f"{what}: found parts of layers {sizes}, of one size accepted")
    if len(there) == len(parts) and all(f.scale == first.scale and f.a.equal(first.a) for f in there):
        return first._replace(b=torch.cat([f.b for f in there]))
    blocks = [first.b.new_zeros(sizes[0][0], 0) if f is None else f.b.float() * (f.scale / first.scale)
              for f in parts]
    a = torch.cat([f.a for f in there])
    return Factors(a, torch.block_diag(*blocks), first.scale * len(a))
