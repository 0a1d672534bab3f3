"""Low-rank adaptation (Hu et al. 2021) of an MMDiT's linear layers.

    y = W x + bias + (alpha / rank) B A x,    A [rank, k], B [n, rank]

W and bias are frozen; B starts at zero, so that the network starts as the base, bit for bit. A
layer keeps its weight and bias under their names and gets lora_a and lora_b in addition. The
order of the steps that change a network: weights of the base (or the meta device), add or apply,
activation checkpointing, compilation, sharding, load.
"""
import math
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ladd.cli import must
from ladd.core.mmdit import Linear, MMDiT

# both streams and the second attention: what diffusers adapts in SD3
ATTENTION = "attn*.qkv", "attn*.proj"
ALL = ("joint_blocks.*",)                # every linear layer of the blocks
TARGETS = {"attention": ATTENTION, "all": ALL}


class Lora(Linear):
    """A linear layer with a frozen weight and a LoRA; both compute in the input's dtype."""

    lora_a: nn.Parameter      # [rank, k]
    lora_b: nn.Parameter      # [n, rank]
    alpha: float

    @property
    def scale(self) -> float:
        return self.alpha / self.lora_a.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        thin = F.linear(x, self.lora_a.to(x.dtype)) * self.scale
        return super().forward(x) + F.linear(thin, self.lora_b.to(x.dtype))


class Factors(NamedTuple):
    """The LoRA of one layer, as files hold it: (alpha / rank) B A."""
    a: Tensor         # [rank, k]
    b: Tensor         # [n, rank]
    alpha: float

    @property
    def scale(self) -> float:
        return self.alpha / len(self.a)

    def delta(self) -> Tensor:
        """Return (alpha / rank) B A [n, k] in float64."""
        return self.scale * (self.b.double() @ self.a.double())


def add(model: MMDiT, rank: int, alpha: float, targets: Sequence[str],
        generator: torch.Generator) -> dict[str, Tensor]:
    """Add a LoRA to the linear layers that `targets` name, in place; then nothing else trains.

    A target is the name of a layer, the end of a name, or a pattern of these with *: "mlp.fc1",
    "x_block.attn.qkv", or those of ATTENTION and ALL. Return the full new matrices by parameter
    name: A is uniform within 1 / sqrt(k), B is zero. A network on the meta device is filled with
    them afterwards: parallel.load(model, base | add(...), device).
    """
    width, linear = model.config.width, of_kind(model, Linear)
    must(1 <= rank <= width, f"LoRA rank must be 1 to the network's width, {width} (got {rank})")
    must(0 < alpha < math.inf, f"LoRA alpha must be a finite number above 0 (got {alpha})")
    meant = {target: {name for name in linear if fnmatchcase(f".{name}", f"*.{target}")}
             for target in targets}
    unknown = [target for target, names in meant.items() if not names]
    ends = sorted({".".join(name.split(".")[-2:]) for name in linear})
    must(bool(meant) and not unknown, "LoRA targets must be names or patterns of this network's "
         f"linear layers, such as joint_blocks.*, {', '.join(ends)} (got "
         f"{', '.join(unknown) or 'none'})")
    chosen = set().union(*meant.values())
    new = {}
    for name, layer in linear.items():
        if name in chosen:
            n, k = layer.weight.shape
            a = torch.empty(rank, k, device="cpu").uniform_(-k ** -0.5, k ** -0.5,
                                                            generator=generator)
            new[name] = Factors(a, torch.zeros(n, rank, device="cpu"), alpha)
    return apply(model, new)


def apply(model: MMDiT, loaded: Mapping[str, Factors]) -> dict[str, Tensor]:
    """Add these LoRAs to the layers of their names, in place, with matrices in fp32 or better.

    Otherwise like `add`. Raise InputError, before anything changes, where a layer does not exist,
    has another size, or has a LoRA already.
    """
    linear, sizes = of_kind(model, Linear), model.config
    for name, f in loaded.items():
        must(name in linear, f"LoRA of {name}: this network ({sizes.depth} blocks of width "
             f"{sizes.width}) has no such linear layer")
        expected, size = list(linear[name].weight.shape), [len(f.b), f.a.shape[1]]
        must(size == expected, f"LoRA of {name} must be of a layer of size {expected} (got {size})")
        must(not isinstance(linear[name], Lora), f"LoRA of {name}: the layer already has a LoRA; "
             "merge that first")
    model.requires_grad_(False)
    tensors = {}
    for name, f in loaded.items():
        layer, weight = linear[name], linear[name].weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        # The class changes in place, so that whatever refers to the layer keeps it.
        layer.__class__ = Lora
        layer.alpha = f.alpha
        layer.lora_a = nn.Parameter(torch.zeros(f.a.shape, dtype=dtype, device=weight.device))
        layer.lora_b = nn.Parameter(torch.zeros(f.b.shape, dtype=dtype, device=weight.device))
        tensors |= {f"{name}.lora_a": f.a, f"{name}.lora_b": f.b}
    trains = parameters(model)
    for p in trains.values():
        p.requires_grad_(True)
    if not model.pos_embed.is_meta:
        with torch.no_grad():
            for name, tensor in tensors.items():
                trains[name].copy_(tensor)
    return tensors


def of_kind(model: nn.Module, kind: type) -> dict[str, nn.Module]:
    """Return the modules of this class by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, kind)}


def parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the matrices of all LoRAs by name: for the optimizer, the EMA and checkpoints."""
    return {f"{name}.{part}": getattr(layer, part)
            for name, layer in of_kind(model, Lora).items() for part in ("lora_a", "lora_b")}


def merged(weights: Mapping[str, Tensor],
           loras: Mapping[str, Factors]) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of a plain network's `weights` with `loras` added, in fp32 or better.

    These weights may be more exact than those that the LoRA was trained on; then the result is
    more exact than that of `merge`. One tensor at a time is in memory.
    """
    for name, tensor in weights.items():
        dtype = torch.promote_types(tensor.dtype, torch.float32)
        f = loras.get(name.removesuffix(".weight"))
        yield name, tensor.to(dtype) if f is None else (tensor.double() + f.delta()).to(dtype)


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Add each LoRA to its weight, rounded once to the weight's dtype; leave plain frozen layers.

    The network then costs what the base costs, and save_mmdit, export, fp8 and another LoRA take
    it. A sharded network is merged by `merged` from its gathered matrices.
    """
    for layer in of_kind(model, Lora).values():
        delta = Factors(layer.lora_a, layer.lora_b, layer.alpha).delta()
        layer.weight.copy_(layer.weight.double() + delta)
        del layer.lora_a, layer.lora_b, layer.alpha
        layer.__class__ = Linear
