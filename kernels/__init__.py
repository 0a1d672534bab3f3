"""The operations that the networks are built on, behind one switch."""
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch

from kernels import attention, heads, modulation

NAMES = "auto", "triton", "torch"


class Kernels(NamedTuple):
    """One implementation of every operation; a network takes it at construction.
    Signatures: the reference_* functions."""
    joint_attention: Callable
    modulate: Callable
    modulate2: Callable
    gate_modulate: Callable
    gate: Callable
    discriminator_heads: Callable


def load(name: str = "auto") -> Kernels:
    """The operations called `name`: "torch" are the references, "triton" the kernels, "auto" the kernels
    where there is a CUDA device, else the references; which of them and why is said once.

    Raises ValueError for another name, and for "triton" where it cannot run.
    """
    if name not in NAMES:
        raise ValueError(f"kernels: found {name!r}, accepted are {', '.join(NAMES)}")
    cuda, installed = torch.cuda.is_available(), attention.triton is not None
    lacking = "" if cuda and installed else "triton is not installed" if cuda else "no CUDA device was found"
    if name == "auto":
        name = "torch" if lacking else "triton"
        announce(name, lacking or torch.cuda.get_device_name())
    elif name == "triton" and lacking and not (installed and attention.INTERPRET):
        raise ValueError(f"kernels: found 'triton', but {lacking}; TRITON_INTERPRET=1 runs the kernels "
                         "slowly without one, auto and torch run everywhere")
    kind = "reference_" if name == "torch" else ""
    homes = dict.fromkeys(Kernels._fields, modulation) | {"joint_attention": attention,
                                                          "discriminator_heads": heads}
    return Kernels(*(getattr(home, kind + field) for field, home in homes.items()))


@cache
def announce(name: str, why: str) -> None:
    print(f"kernels: {name} ({why})")
