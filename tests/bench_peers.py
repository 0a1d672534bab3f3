"""Time our step and the schedules of public implementations on equal terms: one small model, one
process.

    python tests/bench_peers.py [--rounds 10] [--batch 16] [--width 256] [--grid 16] [--csv FILE]

A peer is imitated in what a pair of steps (one of the discriminator, one of the student) calls, as
read in its public source: how often student and teacher run and with which graph, whether the
teacher stops at its last tap, and how the heads are built. MMDiT, taps, batch, optimizers and the
hinge loss are the same for all. What else a peer computes (side losses, its own samplers) is left
out, so these are lower bounds of its cost. The steps of all take turns.
"""
import argparse
import copy
import csv
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

sys.path.insert(0, str(Path(__file__).parents[1]))

import kernels
from ladd.core import flow
from ladd.core.discriminator import Discriminator, DiscriminatorConfig
from ladd.core.losses import hinge_d, predict_x0
from ladd.core.mmdit import MMDiT, MMDiTConfig, Text
from ladd.report import speed


class Peer(NamedTuple):
    """How a pair of steps is computed."""
    heads: str              # ours, stylegan, strided or film
    student: int            # student forwards: 1 if both losses share one sample
    shared_fake: bool       # one teacher forward of the fake for both losses, then both optimizers
    early_exit: bool        # the teacher stops at its last tap


PEERS = {"ours": Peer("ours", 1, True, True),
         "ours, two forwards": Peer("ours", 2, False, True),
         "Nitro-1": Peer("stylegan", 2, False, True),       # features and heads of its DiT variant
         "FastGen, 1:1": Peer("strided", 2, False, True),
         "SANA-Sprint, adversarial half": Peer("stylegan", 2, False, False),
         "Z-Image-LADD, 1:1": Peer("film", 1, False, False),
         "FlowModels": Peer("strided", 1, False, True)}


# --- heads, each on one tap [b, l, d] ---

class StyleGanHead(nn.Module):
    """Full-width 1-D head: spectral-norm 1x1, residual circular convolution of 9 tokens, one logit
    per token; batch norm over virtual batches of 8."""

    def __init__(self, d: int):
        super().__init__()
        self.first = spectral_norm(nn.Conv1d(d, d, 1))
        self.second = spectral_norm(nn.Conv1d(d, d, 9, padding=4, padding_mode="circular"))
        self.last = spectral_norm(nn.Conv1d(d, 1, 1))

    def norm(self, x: Tensor) -> Tensor:
        groups = math.ceil(len(x) / 8)
        g = x.unflatten(0, (groups, -1)) if len(x) % groups == 0 else x[None]
        var, mean = torch.var_mean(g, (1, 3), keepdim=True, correction=0)
        return ((g - mean) * torch.rsqrt(var + 1e-5)).view_as(x)

    def forward(self, f: Tensor, grid: tuple[int, int], cond: Tensor) -> Tensor:
        x = F.leaky_relu(self.norm(self.first(f.mT)), 0.2)
        return self.last((x + F.leaky_relu(self.norm(self.second(x)), 0.2)) * 2 ** -0.5)


class StridedHead(nn.Module):
    """4x4 convolution of stride 2, group norm, leaky ReLU, 1x1, mean: one logit per sample."""

    def __init__(self, d: int):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(d, d, 4, 2, 1), nn.GroupNorm(32, d), nn.LeakyReLU(0.2),
                                  nn.Conv2d(d, 1, 1))

    def forward(self, f: Tensor, grid: tuple[int, int], cond: Tensor) -> Tensor:
        return self.body(f.mT.unflatten(2, grid)).mean((2, 3))


class FilmHead(nn.Module):
    """Linear to 256, FiLM of noise level and text, two 3x3 convolutions with group norm, mean: one
    logit per sample."""

    def __init__(self, d: int, e: int = 64):
        super().__init__()
        self.first, self.film = nn.Linear(d, 256), nn.Linear(e, 512)
        self.body = nn.Sequential(nn.Conv2d(256, 256, 3, 1, 1), nn.GroupNorm(32, 256), nn.SiLU(),
                                  nn.Conv2d(256, 128, 3, 1, 1), nn.GroupNorm(32, 128), nn.SiLU(),
                                  nn.Conv2d(128, 1, 1))

    def forward(self, f: Tensor, grid: tuple[int, int], cond: Tensor) -> Tensor:
        scale, shift = self.film(cond)[:, None].chunk(2, -1)
        return self.body((self.first(f) * (1 + scale) + shift).mT.unflatten(2, grid)).mean((2, 3))


HEADS = {"stylegan": StyleGanHead, "strided": StridedHead, "film": FilmHead}


def make_heads(kind: str, taps: tuple[int, ...], d: int, pooled_dim: int,
               ops: kernels.Kernels) -> nn.Module:
    """Return a head of this kind for each tap."""
    if kind == "ours":
        width = d // 3 // 16 * 16                                    # 512 of sd3-medium's 1536
        return Discriminator(DiscriminatorConfig(taps, d, pooled_dim, width=width), ops)
    return nn.ModuleList(HEADS[kind](d) for _ in taps)


def logits_of(heads: nn.Module, feats: list[Tensor], sigma: Tensor, pooled: Tensor,
              grid: tuple[int, int]) -> Tensor:
    """Return the logits of all heads, stacked."""
    if isinstance(heads, Discriminator):
        return heads(feats, sigma, pooled, grid)
    cond = pooled[:, :64]
    return torch.stack([head(f.float(), grid, cond) for head, f in zip(heads, feats)])


# --- a pair of steps ---

def make_pair(peer: Peer, student: MMDiT, teacher: MMDiT, heads: nn.Module, taps: tuple[int, ...],
              x0: Tensor, text: Text) -> Callable[[], None]:
    """Return a function that takes one step of the heads and one of the student, as `peer`
    schedules them."""
    grid = x0.shape[-2] // 2, x0.shape[-1] // 2
    opt_g, opt_d = (torch.optim.AdamW(m.parameters(), 1e-6) for m in (student, heads))
    params = list(student.parameters())

    def draw() -> tuple[Tensor, Tensor]:
        return torch.randn_like(x0), torch.rand(len(x0), device=x0.device)

    def sample() -> Tensor:
        eps, sigma = draw()
        return predict_x0(student, flow.noised(x0, eps, sigma), sigma, text)

    def features(x: Tensor) -> tuple[list[Tensor], Tensor]:
        eps, sigma = draw()
        xt = flow.noised(x, eps, sigma)
        return teacher(xt, sigma, *text, taps=taps, stop_at_last_tap=peer.early_exit)[1], sigma

    def pair() -> None:
        # 1. the heads' step
        with torch.set_grad_enabled(peer.student == 1):
            fake = sample()
        with torch.set_grad_enabled(peer.shared_fake):
            feats, sigma = features(fake if peer.shared_fake else fake.detach())
        with torch.no_grad():
            real, sigma_r = features(x0)
        opt_d.zero_grad()
        hinge_d(logits_of(heads, real, sigma_r, text.pooled, grid),
                logits_of(heads, [f.detach() for f in feats], sigma, text.pooled, grid)).backward()
        if not peer.shared_fake:    # with a shared fake both losses come before the optimizers
            opt_d.step()
        # 2. the student's step
        if peer.student == 2:
            fake = sample()
        if not peer.shared_fake:
            feats, sigma = features(fake)
        opt_g.zero_grad()
        (-logits_of(heads, feats, sigma, text.pooled, grid).mean()).backward(inputs=params)
        if peer.shared_fake:
            opt_d.step()
        opt_g.step()

    return pair


def interleaved(steps: dict[str, Callable[[], None]], count: int, device: torch.device,
                warm: int = 2) -> dict[str, float]:
    """Return the seconds of a call of each, after `warm` calls that do not count. They take turns,
    so that what slows the machine slows all."""
    seconds = dict.fromkeys(steps, 0.0)
    for i in range(-warm, count):
        for name, step in steps.items():
            speed.wait(device)
            start = time.perf_counter()
            step()
            speed.wait(device)
            if i >= 0:
                seconds[name] += time.perf_counter() - start
    return {name: total / count for name, total in seconds.items()}


def compare(width: int, depth: int, grid: int, batch: int, rounds: int, device: torch.device,
            ops: kernels.Kernels) -> list[dict]:
    """Return a row per peer: forwards, parameters of the heads, pairs per second."""
    torch.manual_seed(0)
    sizes = MMDiTConfig(depth, width, 64, 64, 16, 16, qk_norm=True, pos_grid=grid)
    taps = tuple(depth * (i + 1) // 4 - 1 for i in range(4))
    student, teacher = (MMDiT(sizes, ops).to(device) for _ in range(2))
    teacher.requires_grad_(False)
    x0 = torch.randn(batch, 16, 2 * grid, 2 * grid, device=device)
    text = Text(torch.randn(batch, 16, 64, device=device), torch.randn(batch, 64, device=device))
    pairs = {}
    rows = []
    for name, peer in PEERS.items():
        own = copy.deepcopy(student)
        heads = make_heads(peer.heads, taps, width, 64, ops).to(device)
        pairs[name] = make_pair(peer, own, teacher, heads, taps, x0, text)
        with speed.forwards(student=own, teacher=teacher) as count:
            pairs[name]()
        size = sum(p.numel() for p in heads.parameters())
        rows.append({"schedule": name, **count, "heads_parameters": size})
    seconds = interleaved(pairs, rounds, device)
    for row in rows:
        row |= {"pairs_per_second": batch / seconds[row["schedule"]],
                "ours_is_faster": seconds[row["schedule"]] / seconds["ours"]}
    return rows


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in dict(width=256, depth=8, grid=16, batch=16, rounds=10).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    here = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=here)
    parser.add_argument("--kernels", choices=kernels.NAMES, default="auto")
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args(argv)
    rows = compare(args.width, args.depth, args.grid, args.batch, args.rounds,
                   torch.device(args.device), kernels.load(args.kernels))
    print(f"{'schedule':32} student teacher  heads' parameters  pairs/s  ours is faster")
    for r in rows:
        print(f"{r['schedule']:32} {r['student']:7} {r['teacher']:7} {r['heads_parameters']:18,} "
              f"{r['pairs_per_second']:8.2f} {r['ours_is_faster']:8.2f}x")
    if args.csv:
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main(sys.argv[1:])
