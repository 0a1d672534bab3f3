"""The operations that the networks are built on, behind one switch."""
import subprocess
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import attention, attention_gluon, heads, modulation, optimizer

NAMES = "auto", "triton", "gluon", "torch"
LIMIT = 0.05        # of the largest value: what bf16 may differ by in a self-check


class Kernels(NamedTuple):
    """Hold one implementation of every operation; a network takes it at construction. The
    signatures are those of the reference_* functions."""
    joint_attention: Callable
    modulate: Callable
    modulate2: Callable
    gate_modulate: Callable
    gate: Callable
    discriminator_heads: Callable
    adamw: Callable


HOMES = dict.fromkeys(Kernels._fields, modulation) | {"joint_attention": attention,
                                                      "discriminator_heads": heads,
                                                      "adamw": optimizer}
GLUON = HOMES | {"joint_attention": attention_gluon}


def load(name: str = "auto") -> Kernels:
    """Return the operations called `name`: "torch" are the references, "triton" the kernels, "auto"
    the kernels where there is a CUDA device of compute capability 8.0 or more, else the references,
    "gluon" the kernels with attention's forward pass in Gluon, for compute capability 9.0.

    On a GPU each kernel is first compared with its reference, once a process (see `failures`).
    "auto" takes the reference of a kernel that fails; what is taken, and why, is printed once.

    Raises ValueError for another name, for "triton" and "gluon" where they cannot run or where a
    kernel fails, and for a GPU that a kernel left unusable.
    """
    if name not in NAMES:
        raise ValueError(f"kernels must be {', '.join(NAMES[:-1])} or {NAMES[-1]} (got {name!r})")
    lacking, failed = missing(), {}
    interpreted = attention.triton is not None and attention.INTERPRET
    if lacking and (name == "gluon" or name == "triton" and not interpreted):
        raise ValueError(f"kernels must be auto or torch here (got {name!r}, but {lacking}); "
                         "TRITON_INTERPRET=1 runs those of triton slowly without a GPU")
    if name != "torch" and not lacking:
        device = torch.device("cuda", torch.cuda.current_device())
        if name == "gluon" and (why := attention_gluon.missing(device)):
            raise ValueError(f"kernels must be auto, triton or torch here (got 'gluon', but {why})")
        failed = failures(device, name == "gluon")
        if failed and name != "auto":
            raise ValueError(f"kernels: {'; '.join(failed.values())}; "
                             "auto takes another implementation instead")
    if name == "auto":
        name = "torch" if lacking else "triton"
        announce(f"kernels: {name} ({lacking or torch.cuda.get_device_name()})")
        for why in failed.values():
            announce(f"kernels: {why}; the reference is used instead")
    plain = Kernels._fields if name == "torch" else failed
    homes = GLUON if name == "gluon" else HOMES
    return Kernels(*(getattr(homes[field], f"reference_{field}" if field in plain else field)
                     for field in Kernels._fields))


def missing() -> str:
    """Return what the kernels lack on this machine, or nothing."""
    if not torch.cuda.is_available():
        return "no CUDA device was found"
    if attention.triton is None:
        return "triton is not installed"
    major, minor = torch.cuda.get_device_capability()
    if major < 8:                                                     # the kernels multiply in bf16
        return (f"{torch.cuda.get_device_name()} has compute capability {major}.{minor} "
                "and the kernels need 8.0")
    return ""


@cache
def announce(line: str) -> None:
    print(line)


# --- self-check ---

def samples(device: torch.device, dtype: torch.dtype) -> dict[str, tuple[Callable, list[Tensor]]]:
    """Return small inputs of each operation by name: (call, leaves) for call(function, *leaves)."""
    g = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g).to(device, dtype)

    x, branch, vectors = draw(2, 40, 128), draw(2, 40, 128), draw(2, 4 * 128)
    norms = [1 + 0.3 * draw(64) for _ in range(4)]
    # more than 128 channels and tokens: the tiles of the real presets
    k, d, c, e = 2, 64, 144, 16
    # norms of 0.3 about +-1.5: no leaky ReLU is so near its kink that rounding decides
    params = heads.HeadParams(
        w_in=draw(k, d, c) * d ** -0.5, b_in=draw(k, c), gamma1=0.3 + 0 * draw(k, c),
        beta1=1.5 * draw(k, c).sign(), w_conv=draw(k, 3, 3, c, c) * (9 * c) ** -0.5,
        b_conv=draw(k, c), gamma2=0.3 + 0 * draw(k, c), beta2=1.5 * draw(k, c).sign(),
        w_cond=draw(k, e, c) * e ** -0.5, w_out=draw(k, c), b_out=draw(k))
    taps = [draw(2, 144, d) for _ in range(k)]
    # a tensor of several blocks and one that is not aligned
    stepped = [draw(*size).float() for _ in range(5) for size in ((300, 64), (38,))]
    norms[0] *= 4                           # of text's queries: their softmax has a running maximum
    return {
        "joint_attention": (lambda f, txt, img, *w: f(txt, img, w[:2], w[2:]),
                            [draw(2, 20, 3, 2, 64), draw(2, 150, 3, 2, 64), *norms]),
        "modulate": (lambda f, x, v: f(x, *v.chunk(4, -1)[:2]), [x, vectors]),
        "modulate2": (lambda f, x, v: f(x, *v.chunk(4, -1)), [x, vectors]),
        "gate_modulate": (lambda f, x, y, v: f(x, y, *v.chunk(4, -1)[:3]), [x, branch, vectors]),
        "gate": (lambda f, x, y, v: f(x, y, v.chunk(4, -1)[0]), [x, branch, vectors]),
        "discriminator_heads": (
            lambda f, *t: f(list(t[:k]), heads.HeadParams(*t[k:-1]), t[-1], (9, 16)),
            [*taps, *(p.float() for p in params), draw(2, e).float()]),
        "adamw": (step, stepped)}


def step(function: Callable, *leaves: Tensor) -> tuple[Tensor, ...]:
    """Return weights, moments, EMA and copies after a step of `function` from those in `leaves`."""
    fresh = [t.detach().clone() for t in leaves]
    w, g, m, v, ema = (fresh[i:i + 2] for i in range(0, 10, 2))
    v = [t.square() for t in v]
    copies = [t.bfloat16() for t in w]
    function(w, g, m, v, ema, copies, w[0].new_tensor(0.5), 0.1, 0.9, 0.99, 0.1, 1e-8, 0.9, 2)
    return *w, *m, *v, *ema, *copies


def results(function: Callable, call: Callable, leaves: list[Tensor]) -> dict[str, Tensor]:
    """Return the outputs of call(function, *leaves) and the gradients of all leaves, if there are
    some, in fp32."""
    leaves = [t.detach().requires_grad_() for t in leaves]
    out = call(function, *leaves)
    out = out if isinstance(out, tuple) else (out,)
    found = {f"output {i}": t for i, t in enumerate(out)}
    if out[0].requires_grad:
        g = torch.Generator().manual_seed(1)
        up = [torch.randn(o.shape, generator=g).to(o) for o in out]
        grads = torch.autograd.grad(out, leaves, up)
        found |= {f"the gradient of input {i}": t for i, t in enumerate(grads)}
    return {name: t.detach().float().cpu() for name, t in found.items()}


def difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> str:
    """Return where two results differ by more than LIMIT of the largest value, or nothing."""
    for name, e in expected.items():
        error, limit = (found[name] - e).abs(), LIMIT * float(e.abs().max())
        if not bool((error <= limit).all()):                                # NaN differs as well
            at = int(torch.where(error <= error, error, float("inf")).argmax())
            return (f"{name} is {found[name].flatten()[at]:.4g} and must be "
                    f"{e.flatten()[at]:.4g} within {limit:.2g}")
    return ""


@cache
def failures(device: torch.device, gluon: bool = False) -> dict[str, str]:
    """Compare each kernel with its reference on the device, forward and backward on small inputs,
    in bf16 on a GPU and in fp32 under Triton's interpreter, once per process. Return a sentence for
    each operation that failed: it could not run, or a value differs. gluon: attention's forward
    pass is the one in Gluon.

    Raises ValueError if a kernel leaves the GPU unusable, so that no reference can run either.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if device.type == "cuda":
        announce("kernels: each is compared with its reference, which may have to compile it")
    # a caller may be building on "meta", or without gradients
    with torch.device("cpu"), torch.inference_mode(False), torch.enable_grad():
        checked = {field: failure(GLUON if gluon else HOMES, field, *sample, device)
                   for field, sample in samples(device, dtype).items()}
    return {field: f"{field} fails its self-check ({why})" for field, why in checked.items() if why}


def failure(homes: dict, field: str, call: Callable, leaves: list[Tensor],
            device: torch.device) -> str:
    """Return why the kernel of this operation fails on these inputs, or nothing."""
    # what torch, Triton and its C compiler raise where a kernel cannot be built or launched
    cannot_run = (RuntimeError, AssertionError, ValueError, TypeError, AttributeError, LookupError,
                  ImportError, OSError, subprocess.SubprocessError, attention.triton.TritonError)
    reference = getattr(homes[field], f"reference_{field}")
    expected = results(reference, call, [t.float() for t in leaves])
    try:
        return difference(results(getattr(homes[field], field), call, leaves), expected)
    except cannot_run as error:
        message = str(error).strip() or "no message"
        why = f"{type(error).__name__}: {message.splitlines()[-1]}"
    try:
        torch.zeros(1, device=device).item()
    except RuntimeError:
        raise ValueError(f"kernels: {field} left the GPU unusable ({why}); start again with "
                         "--kernels torch") from None
    return why
