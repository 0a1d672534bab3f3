"""Metrics of images and prompts, as pure functions without learned weights.

Letters: n, m samples, f features, A attributes of a caption (-1 = open or unreadable), p pixels.
A Frechet distance is compared at equal n in one feature space, as excess over the floor (real
against real). It is not FID.
"""
import math
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ladd.cli import must
from ladd.toy.scenes import ATTRIBUTES

# --- feature spaces ---

@cache
def _filters() -> list[tuple[Tensor, Tensor]]:
    """Return 4x4 filters (He scale) and biases of the four layers, drawn from one CPU generator.

    The first layer ignores flat colour: otherwise the background outweighs everything, and the
    floor varies by a third from draw to draw instead of a tenth (n = 1,024 of the toy dataset).
    """
    generator = torch.Generator().manual_seed(20240318)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    layers = [(draw(c_out, c_in, 4, 4) / math.sqrt(8 * c_in), draw(c_out) / 4)
              for c_in, c_out in ((3, 16), (16, 16), (16, 16), (16, 11))]
    layers[0][0].sub_(layers[0][0].mean((2, 3), keepdim=True))
    return layers


def features_random(x: Tensor) -> Tensor:
    """Return features [n, 95] of a frozen random convolution net: std of layers 1-3, 2x2 means of
    layer 4, and the mean colour.

    x [n, 3, H, W] in [-1, 1] is box-averaged to about 64 px first. In both spaces the gains bring
    each group of features to about unit variance over the toy dataset, so that none hides another.
    Our choice.
    """
    feats = []
    colour = x.mean((2, 3))
    x = F.avg_pool2d(x, 2 ** max(0, round(math.log2(x.shape[2] * x.shape[3]) / 2 - 6)))
    # without TF32 the distance is the same on every device
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for weight, bias in _filters():
            x = F.pad(x, (1, 1, 1, 1), mode="replicate")
            x = F.leaky_relu(F.conv2d(x, weight.to(x.device), bias.to(x.device), stride=2), 0.2)
            feats.append(x.flatten(2).std(2, correction=0))
    place = F.adaptive_avg_pool2d(x, 2).flatten(1)
    return torch.cat([35 * feats[0], 50 * feats[1], 50 * feats[2], 35 * place, 1.6 * colour], 1)


def features_hand(x: Tensor) -> Tensor:
    """Return features [n, 78] of images [n, 3, H, W] in [-1, 1]: a colour histogram (27), edge
    orientations (9), the RMS of 5 frequency bands per channel (15), and a 3x3 colour map (27). Our
    choice."""
    n, _, h, w = x.shape
    basis, bands = (t.to(x.device) for t in _bands())
    waves = F.conv2d(x.reshape(3 * n, 1, h, w), basis, stride=8)          # [3n, 64, h / 8, w / 8]
    energy = waves.square().mean((2, 3)) @ bands                          # [3n, 5]
    # without the mean colour, which the histogram holds
    place = F.adaptive_avg_pool2d(x - x.mean((2, 3), keepdim=True), 3)
    return torch.cat([10 * _colours(x), 2.5 * math.sqrt(h * w) * _orientations(x),
                      9 * energy.sqrt().view(n, 15), 6 * place.flatten(1)], 1)


def _colours(x: Tensor) -> Tensor:
    """Return [n, 27], the share of pixels at each colour with channels -1, 0 or 1; a pixel is split
    linearly between neighbours."""
    levels = torch.tensor([-1.0, 0.0, 1.0], device=x.device)
    distance = (x.flatten(2)[:, :, None] - levels[:, None]).abs()         # [n, channel, level, p]
    near = (1 - distance).clamp(min=0)
    pairs = (near[:, 0, :, None] * near[:, 1, None]).flatten(1, 2)        # [n, 9, p]
    return (pairs @ near[:, 2].mT).flatten(1) / pairs.shape[2]


def _orientations(x: Tensor) -> Tensor:
    """Return [n, 9], the mean over pixels of |g|^2 cos(2 j a) and |g|^2 sin(2 j a), j = 0..4, for
    the gradient g at angle a.

    The angle is doubled because an edge and its reverse are one orientation. |g| is squared so that
    faint noise counts little.
    """
    gx = (x[..., 1:-1, 2:] - x[..., 1:-1, :-2]).flatten(1)
    gy = (x[..., 2:, 1:-1] - x[..., :-2, 1:-1]).flatten(1)
    size = gx * gx + gy * gy
    cos, sin = (gx * gx - gy * gy) / size.clamp(min=1e-6), 2 * gx * gy / size.clamp(min=1e-6)
    re, im = size * cos, size * sin
    means = [size.mean(1)]
    for _ in range(4):
        means += [re.mean(1), im.mean(1)]
        re, im = re * cos - im * sin, re * sin + im * cos
    return torch.stack(means, 1)


@cache
def _bands() -> tuple[Tensor, Tensor]:
    """Return the orthonormal 8x8 DCT as filters [64, 1, 8, 8], and the weights [64, 5] that average
    over 5 bands of u + v, without DC."""
    u = torch.arange(8)
    wave = torch.cos(math.pi / 8 * u[:, None] * (u + 0.5)) / 2            # [u, x]
    wave[0] *= 0.5 ** 0.5
    band = torch.bucketize((u + u[:, None]).flatten(), torch.tensor([0, 2, 4, 7, 10]))
    member = F.one_hot(band)[:, 1:].float()
    return torch.einsum("uy,vx->uvyx", wave, wave).view(64, 1, 8, 8), member / member.sum(0)


# --- distances between sets of features ---

def frechet(a: Tensor, b: Tensor) -> float:
    """Return |mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a^1/2 C_b C_a^1/2)^1/2), computed in float64.

    a [n, f], b [m, f]. It is the distance of the Gaussians that have the sets' means and
    covariances. Source: Dowson & Landau 1982.
    """
    a, b = a.double(), b.double()
    mean_a, mean_b = a.mean(0), b.mean(0)
    cov_a = (a - mean_a).T @ (a - mean_a) / (len(a) - 1)
    cov_b = (b - mean_b).T @ (b - mean_b) / (len(b) - 1)
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return float((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross)


def density_coverage(real: Tensor, fake: Tensor, k: int = 5) -> tuple[float, float]:
    """Return (density, coverage) of fake [m, f] on real [n, f], from the balls around each real
    sample that reach to its k-th neighbour.

    Density is the mean number of balls that hold a fake, over k: 1 on the data, more where fakes
    crowd. Coverage is the share of balls that hold any fake; lost modes lower it.
    Source: Naeem et al. 2020, "Reliable Fidelity and Diversity Metrics for Generative Models".
    """
    real, fake = real.double(), fake.double()
    held = covered = 0
    for centres in real.split(512):
        # k + 1, since the nearest one is the sample itself
        radius = torch.cdist(centres, real).kthvalue(k + 1, 1).values
        inside = torch.cdist(centres, fake) <= radius[:, None]            # [512, m]
        held += int(inside.sum())
        covered += int(inside.any(1).sum())
    return held / (k * len(fake)), covered / len(real)


# --- prompts and the discriminator ---

def prompt_accuracy(graded: Tensor, codes: Tensor) -> dict[str, float]:
    """Return the share of rows with every stated attribute right ("all"), and for each attribute
    the share among the rows that state it; an attribute that no row states is left out.

    graded, codes [n, A] int64. An unreadable row of `graded` is all -1, which counts as wrong.
    """
    stated, right = codes >= 0, graded == codes
    out = {"all": (right | ~stated).all(1).float().mean().item()}
    for i, name in enumerate(ATTRIBUTES[1 if codes.shape[1] == 5 else 2]):
        if stated[:, i].any():
            out[name] = right[stated[:, i], i].float().mean().item()
    return out


def attribute_entropy(graded: Tensor, codes: Tensor, real: Tensor) -> float:
    """Return the mean over attributes of H(graded) / H(real), each over the rows of `codes` that
    leave the attribute open: 1 is as diverse as the data, below 0.8 a collapse.

    All [n, A] int64; `real` holds the attributes of the real images that `codes` are captions of.
    Unreadable images are left out.
    """
    ratios = []
    for i in range(codes.shape[1]):
        rows = codes[:, i] < 0
        whole = _entropy(real[rows, i])
        if whole > 0:
            ratios.append(_entropy(graded[rows, i]) / whole)
    must(bool(ratios), "attribute_entropy: captions must leave an attribute open that varies (got "
         f"{len(codes)} captions without one)")
    return sum(ratios) / len(ratios)


def _entropy(values: Tensor) -> float:
    """Return the entropy in nats of the values that are not -1."""
    counts = torch.bincount(values[values >= 0]).double()
    return torch.special.entr(counts / counts.sum()).sum().item()


def auc(pos: Tensor, neg: Tensor) -> float:
    """Return P(pos > neg) + P(pos = neg) / 2 over all pairs, of any shapes; 0.5: not told apart."""
    pos = pos.flatten().contiguous()
    neg = neg.flatten().sort().values
    below = torch.searchsorted(neg, pos) + torch.searchsorted(neg, pos, right=True)
    return below.double().mean().item() / (2 * len(neg))
