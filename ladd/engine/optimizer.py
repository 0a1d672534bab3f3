"""AdamW for a network that trains: clipping, EMA and the 16-bit copies of its weights in one pass.

The formula and the kernel are in kernels/optimizer.py.
"""
from collections.abc import Iterable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.profiler import record_function

from ladd.core.discriminator import Discriminator
from ladd.core.mmdit import Linear, MMDiT
from ladd.engine import parallel
from ladd.engine.networks import trainable
from ladd.engine.parallel import Norms

CLIP = 1.0       # largest gradient norm of a network; our choice
EPS = 1e-8


class AdamW:
    """Step the parameters of `model` that train, replicated or sharded, and their EMA in the
    network `ema`. `lr` may change between steps.

    Without momentum (beta1 = 0) there is no first moment. Where a network of one process multiplies
    in 16 bits, each step also rounds the weights of its linear layers to Linear.copy. A parameter
    without a gradient stays as it is: text's norm of queries in the last block never has one.
    """

    def __init__(self, model: MMDiT | Discriminator, lr: float, beta1: float, beta2: float,
                 weight_decay: float = 0.0, ema: MMDiT | None = None):
        self.model, self.lr, self.weight_decay = model, lr, weight_decay
        self.beta1, self.beta2 = beta1, beta2
        self.params = trainable(model)
        self.averages = dict(ema.named_parameters()) if ema is not None else {}
        self.steps = np.zeros((), np.int64)         # not a tensor: the host reads it
        self.second = {name: torch.zeros_like(p) for name, p in self.params.items()}
        self.first = {name: torch.zeros_like(p) for name, p in self.params.items()} if beta1 else {}
        self.layers = keep_copies(model) if isinstance(model, MMDiT) else []

    def state(self) -> dict[str, Tensor]:
        """Return what a checkpoint holds: `steps`, and the moments as parameter name + .exp_avg
        and .exp_avg_sq. Learning rates are not included: the schedule sets them from the step."""
        return ({"steps": torch.from_numpy(self.steps)}
                | {f"{name}.exp_avg": m for name, m in self.first.items()}
                | {f"{name}.exp_avg_sq": v for name, v in self.second.items()})

    @record_function("AdamW.step")
    @torch.no_grad()
    def step(self, decay: float = 0.0) -> Norms:
        """Clip the gradients to a norm of CLIP, step and update the EMA; free the gradients. Return
        their norms before clipping. The host does not wait for the device.

            ema = decay ema + (1 - decay) weight
        """
        norms = parallel.gradient_norms(self.model)
        params = {name: p for name, p in self.params.items() if p.grad is not None}
        layers = {layer.weight: layer for layer in self.layers}
        stepped = [layers.get(p) for p in params.values()]
        self.steps += 1
        self.model.kernels.adamw(
            own(params.values()), [g.contiguous() for g in own(p.grad for p in params.values())],
            own(self.first[name] for name in params) if self.beta1 else None,
            own(self.second[name] for name in params),
            own(self.averages[name] for name in params) if self.averages else None,
            [layer.copy if layer else None for layer in stepped],
            (CLIP / (norms.total + 1e-6)).clamp(max=1), self.lr, self.beta1, self.beta2,
            self.weight_decay, EPS, decay, int(self.steps))
        for layer in filter(None, stepped):
            layer.copied = version(layer)
        for p in params.values():
            p.grad = None           # it needs no memory during the next forward
        return norms


def own(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return the part of each tensor that this process holds."""
    return [t.to_local() if isinstance(t, DTensor) else t.detach() for t in tensors]


def keep_copies(model: MMDiT) -> list[Linear]:
    """Let a network of one process that computes in 16 bits keep its linear weights in both dtypes;
    return the layers.

    A forward pass first rounds the weights that have changed since their copy was made, except by
    AdamW.step, which rounds them itself. A sharded network gathers its weights in 16 bits anyway.
    """
    dtype = model.compute_dtype
    layers = [layer for layer in model.modules() if isinstance(layer, Linear)
              and layer.weight.requires_grad and layer.weight.dtype != dtype]
    if isinstance(model, FSDPModule) or dtype not in (torch.bfloat16, torch.float16):
        return []
    for layer in layers:
        layer.copy, layer.copied = torch.empty_like(layer.weight, dtype=dtype), None
    # a partial, because deepcopy does not copy what a closure refers to
    model.register_forward_pre_hook(partial(round_changed, layers))
    return layers


@torch.no_grad()
def round_changed(layers: Sequence[Linear], *_) -> None:
    """Make the copies of the weights that have changed."""
    changed = [layer for layer in layers if layer.copied != version(layer)]
    if changed:
        torch._foreach_copy_([layer.copy for layer in changed], [layer.weight for layer in changed])
    for layer in changed:
        layer.copied = version(layer)


def version(layer: Linear) -> tuple[int, int]:
    """Return the weight's address and torch's count of changes to it; one of them changes whenever
    the weight does."""
    return layer.weight.data_ptr(), layer.weight._version
