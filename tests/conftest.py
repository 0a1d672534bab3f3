"""Shared by the tests: one thread, a seed, tiny networks with every weight drawn, one table of
tolerances."""
import os
import sys

import pytest
import torch
from torch import Tensor, nn

# before triton is imported: kernels run on the CPU, but where the tests for a GPU are asked for by
# name
if "gpu" not in " ".join(sys.argv):
    os.environ["TRITON_INTERPRET"] = "1"

import kernels
from ladd.core.mmdit import MMDiT, MMDiTConfig

torch.set_num_threads(1)    # results and run time do not depend on the machine's cores

TINY = dict(depth=3, width=128, context_dim=24, pooled_dim=20, in_channels=4, out_channels=4,
            pos_grid=12)
VARIANTS = {"plain": {}, "qk_norm": dict(qk_norm=True),
            "dual": dict(qk_norm=True, dual_blocks=(0, 1))}
# max |a - b| over max |b|
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2}


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes seconds that the suite cannot spare; .ci/run "
                            "runs it")
    config.addinivalue_line("markers", "gpu: needs a GPU")
    # both run by name: -m slow, -m gpu
    config.option.markexpr = config.option.markexpr or "not slow and not gpu"


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def assert_close(name: str, actual: Tensor, expected: Tensor, tol: float | None = None) -> None:
    """Values agree within `tol` (default: the dtype's) of the largest expected one; else says where
    not."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype, (
        f"{name}: {tuple(actual.shape)} {actual.dtype}, "
        f"expected {tuple(expected.shape)} {expected.dtype}")
    if not expected.numel():
        return
    a, e = actual.detach().double(), expected.detach().double()
    diff, scale = (a - e).abs(), e.abs().max().clamp_min(1e-300)
    worst = tuple(int(i) for i in torch.unravel_index(diff.argmax(), diff.shape))
    ratio = diff.square().mean().sqrt() / e.square().mean().sqrt().clamp_min(1e-300)
    limit = TOLERANCE[expected.dtype] if tol is None else tol
    assert diff.max() <= limit * scale, \
        f"{name}: max abs {diff.max():.3g}, RMSE ratio {ratio:.3g}, worst at {worst}"


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Adds noise to every parameter and buffer: no zero or symmetry of the initialisation hides a
    swap."""
    g = rng(seed)
    with torch.no_grad():
        for t in [*module.parameters(), *module.buffers()]:
            t.add_((0.3 if t.ndim < 2 else 0.05) * torch.randn(t.shape, generator=g))
    return module


def tiny(variant: str = "plain", dtype: torch.dtype = torch.float64, seed: int = 0,
         ops: kernels.Kernels | None = None, **changes) -> MMDiT:
    """A randomised MMDiT of two heads that computes in `dtype`, on the references unless `ops` are
    given."""
    torch.manual_seed(seed)
    config = MMDiTConfig(**{**TINY, **VARIANTS[variant], **changes})
    return randomise(MMDiT(config, ops or kernels.load("torch"), compute_dtype=dtype),
                     seed).to(dtype)


def tiny_inputs(b: int = 2, h: int = 6, w: int = 10, l: int = 5, dtype: torch.dtype = torch.float64,
                seed: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x, sigma, context, pooled) for a `tiny` network; latents are not square, levels no round
    numbers."""
    g = rng(seed)
    x, context, pooled = (torch.randn(s, generator=g).to(dtype) for s
                          in ((b, 4, h, w), (b, l, 24), (b, 20)))
    return x, (torch.rand(b, generator=g) * 0.9 + 0.05).to(dtype), context, pooled
