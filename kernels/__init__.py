"""The operations that the networks are built on, behind one switch."""
from collections.abc import Callable
from typing import NamedTuple

from kernels import attention, heads, modulation


class Kernels(NamedTuple):
    """One implementation of every operation; a network takes it at construction.
    Signatures: the reference_* functions."""
    joint_attention: Callable
    modulate: Callable
    modulate2: Callable
    gate_modulate: Callable
    gate: Callable
    discriminator_heads: Callable


TORCH = Kernels(attention.reference_joint_attention, modulation.reference_modulate,
                modulation.reference_modulate2, modulation.reference_gate_modulate,
                modulation.reference_gate, heads.reference_discriminator_heads)
CHOICES = {"auto": TORCH, "torch": TORCH}


def load(name: str = "auto") -> Kernels:
    """The operations called `name`: "torch" are the references;
    "auto" picks the fastest that this checkout has.

    Raises ValueError for another name.
    """
    if name not in CHOICES:
        raise ValueError(f"kernels: found {name!r}, accepted are {', '.join(CHOICES)}")
    return CHOICES[name]
