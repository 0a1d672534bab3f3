"""Measures of images, prompts and the duel. Pure functions: nothing learned, nothing downloaded.

Letters: n, m samples, f features, A attributes of a caption (-1 = open or unreadable), p pixels.
Frechet distances compare at equal n in one space, as excess over the floor (real against real); not FID.
"""
import math
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ladd.config import InputError
from ladd.shapes import ATTRIBUTES

CHUNK = 64           # images at a time, so that the activations stay in the cache of one core

# --- feature spaces ---


def _chunked(features, images: Tensor) -> Tensor:
    if images.ndim != 4 or images.shape[1] != 3 or any(s % 16 for s in images.shape[2:]) or not len(images):
        raise InputError(f"images: {tuple(images.shape)}, accepted [n, 3, H, W], n > 0, 16 divides H and W")
    if bad := int((~images.isfinite()).sum()):
        raise InputError(f"images: {bad} of {images.numel()} values are NaN or infinite, accepted finite")
    return torch.cat([features(x.float()) for x in images.split(CHUNK)])


def features_random(images: Tensor) -> Tensor:
    """[n, 95]: std of layers 1-3, 2x2 means of layer 4 of a frozen random convolution net; mean colour.

    images [n, 3, H, W] in [-1, 1], box-averaged to about 64 px first. In both spaces the gains bring each
    group of features to about unit variance over the built-in world, so that none hides another. Our choice.
    """
    return _chunked(_random, images)


@cache
def _filters() -> list[tuple[Tensor, Tensor]]:
    """4x4 filters (He scale) and biases of the four layers, drawn from one CPU generator.

    The first layer is blind to flat colour: else the background outweighs all, and the floor varies by
    a third from draw to draw, not by a tenth (n = 1,024 of the built-in world).
    """
    generator = torch.Generator().manual_seed(20240318)
    draw = lambda *shape: torch.randn(shape, generator=generator)
    layers = [(draw(c_out, c_in, 4, 4) / math.sqrt(8 * c_in), draw(c_out) / 4)
              for c_in, c_out in ((3, 16), (16, 16), (16, 16), (16, 11))]
    layers[0][0].sub_(layers[0][0].mean((2, 3), keepdim=True))
    return layers


def _random(x: Tensor) -> Tensor:
    feats, colour = [], x.mean((2, 3))
    x = F.avg_pool2d(x, 2 ** max(0, round(math.log2(x.shape[2] * x.shape[3]) / 2 - 6)))
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):      # the same distance on every device
        for weight, bias in _filters():
            x = F.pad(x, (1, 1, 1, 1), mode="replicate")
            x = F.leaky_relu(F.conv2d(x, weight.to(x.device), bias.to(x.device), stride=2), .2)
            feats.append(x.flatten(2).std(2, correction=0))
    place = F.adaptive_avg_pool2d(x, 2).flatten(1)
    return torch.cat([35 * feats[0], 50 * feats[1], 50 * feats[2], 35 * place, 1.6 * colour], 1)


def features_hand(images: Tensor) -> Tensor:
    """[n, 78]: colour histogram 27, edge orientations 9, RMS of 5 frequency bands 3 x 5, 3x3 colour map 27.

    images [n, 3, H, W] in [-1, 1], at their own size. Our choice.
    """
    return _chunked(_hand, images)


def _hand(x: Tensor) -> Tensor:
    n, _, h, w = x.shape
    basis, bands = (t.to(x.device) for t in _bands())
    energy = F.conv2d(x.reshape(3 * n, 1, h, w), basis, stride=8).square().mean((2, 3)) @ bands      # [3n, 5]
    place = F.adaptive_avg_pool2d(x - x.mean((2, 3), keepdim=True), 3)      # the histogram has the mean
    return torch.cat([10 * _colours(x), 2.5 * math.sqrt(h * w) * _orientations(x),
                      9 * energy.sqrt().view(n, 15), 6 * place.flatten(1)], 1)


def _colours(x: Tensor) -> Tensor:
    """[n, 27]: share of pixels at each colour with channels -1, 0 or 1, split linearly between neighbours."""
    levels = torch.tensor([-1., 0, 1], device=x.device)
    near = (1 - (x.flatten(2)[:, :, None] - levels[:, None]).abs()).clamp(min=0)      # [n, channel, level, p]
    pairs = (near[:, 0, :, None] * near[:, 1, None]).flatten(1, 2)                    # [n, 9, p]
    return (pairs @ near[:, 2].mT).flatten(1) / pairs.shape[2]


def _orientations(x: Tensor) -> Tensor:
    """[n, 9]: mean over pixels of |g|^2 cos(2 j a) and sin(2 j a), j = 0..4, for the gradient g at angle a.

    2 a: an edge and its reverse are one orientation. Energies, not lengths: faint noise counts little.
    """
    gx = (x[..., 1:-1, 2:] - x[..., 1:-1, :-2]).flatten(1)
    gy = (x[..., 2:, 1:-1] - x[..., :-2, 1:-1]).flatten(1)
    size = gx * gx + gy * gy
    cos, sin = (gx * gx - gy * gy) / size.clamp(min=1e-6), 2 * gx * gy / size.clamp(min=1e-6)
    re, im, means = size * cos, size * sin, [size.mean(1)]
    for _ in range(4):
        means += [re.mean(1), im.mean(1)]
        re, im = re * cos - im * sin, re * sin + im * cos
    return torch.stack(means, 1)


@cache
def _bands() -> tuple[Tensor, Tensor]:
    """The orthonormal 8x8 DCT as filters [64, 1, 8, 8], and [64, 5]: means over 5 bands of u + v, no DC."""
    u = torch.arange(8)
    wave = torch.cos(math.pi / 8 * u[:, None] * (u + .5)) / 2                         # [u, x]
    wave[0] *= .5 ** .5
    band = torch.bucketize((u + u[:, None]).flatten(), torch.tensor([0, 2, 4, 7, 10]))
    average = F.one_hot(band)[:, 1:].float()
    return torch.einsum("uy,vx->uvyx", wave, wave).view(64, 1, 8, 8), average / average.sum(0)


# --- distances between sets of features ---


def frechet(a: Tensor, b: Tensor) -> float:
    """|mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a^1/2 C_b C_a^1/2)^1/2) in float64. a [n, f], b [m, f].

    Dowson & Landau 1982: the distance of the Gaussians with the sets' means and covariances.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise InputError(f"frechet: {tuple(a.shape)} and {tuple(b.shape)}, accepted [n, f], [m, f], n, m > 1")
    a, b = a.double(), b.double()
    mean_a, mean_b = a.mean(0), b.mean(0)
    cov_a, cov_b = (a - mean_a).T @ (a - mean_a) / (len(a) - 1), (b - mean_b).T @ (b - mean_b) / (len(b) - 1)
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return float((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross)


def density_coverage(real: Tensor, fake: Tensor, k: int = 5) -> tuple[float, float]:
    """(mean number of reals' k-neighbour balls that hold a fake, over k; share of balls that hold any).

    real [n, f], fake [m, f]. Density is 1 on the data, more where fakes crowd; lost modes lower coverage.
    Naeem et al. 2020, "Reliable Fidelity and Diversity Metrics for Generative Models".
    """
    if len(real) <= k or not len(fake):
        raise InputError(f"density_coverage: {len(real)} real, {len(fake)} fake, accepted {k + 1}, 1 or more")
    real, fake = real.double(), fake.double()
    held = covered = 0
    for centres in real.split(512):
        radius = torch.cdist(centres, real).kthvalue(k + 1, 1).values      # k + 1: the first is itself
        inside = torch.cdist(centres, fake) <= radius[:, None]             # [512, m]
        held, covered = held + int(inside.sum()), covered + int(inside.any(1).sum())
    return held / (k * len(fake)), covered / len(real)


# --- prompts ---


def prompt_accuracy(graded: Tensor, codes: Tensor) -> dict[str, float]:
    """Share of rows with every stated attribute right ("all"), and for each attribute of those that state it.

    graded, codes [n, A] int64; an unreadable row of `graded` is all -1: wrong. Never stated: left out.
    """
    names = next((names for names in ATTRIBUTES.values() if len(names) == codes.shape[-1]), None)
    if names is None or graded.shape != codes.shape or not len(codes):
        raise InputError(f"prompt_accuracy: graded {tuple(graded.shape)}, codes {tuple(codes.shape)}, "
                         f"accepted equal [n, A], n > 0, A in {[*map(len, ATTRIBUTES.values())]}")
    stated, right = codes >= 0, graded == codes
    share = lambda x: x.float().mean().item()
    return {"all": share((right | ~stated).all(1))} | {
        name: share(right[stated[:, i], i]) for i, name in enumerate(names) if stated[:, i].any()}


def attribute_entropy(graded: Tensor, codes: Tensor, real: Tensor) -> float:
    """Mean over attributes of H(graded) / H(real), in the rows of `codes` that leave the attribute open.

    1 = as diverse as the data, < .8 = collapse. All [n, A] int64; `real` holds the attributes of the real
    images that `codes` are captions of. Unreadable images count nowhere.
    """
    opened = [codes[:, i] < 0 for i in range(codes.shape[1])]
    whole = [_entropy(real[rows, i]) for i, rows in enumerate(opened)]
    ratios = [_entropy(graded[rows, i]) / whole[i] for i, rows in enumerate(opened) if whole[i] > 0]
    if not ratios:
        raise InputError(f"attribute_entropy: {len(codes)} captions, no open attribute varies, accepted one")
    return sum(ratios) / len(ratios)


def _entropy(values: Tensor) -> float:
    """In nats, of the values that are not -1."""
    counts = torch.bincount(values[values >= 0]).double()
    return torch.special.entr(counts / counts.sum()).sum().item()


# --- the duel ---


def active_margins(logits_real: Tensor, logits_fake: Tensor) -> tuple[Tensor, Tensor]:
    """Shares of real and fake logits with an active hinge, 1 - D > 0 and 1 + D > 0. 0 = nothing to learn."""
    return (logits_real < 1).float().mean(), (logits_fake > -1).float().mean()


def accuracy(logits_real: Tensor, logits_fake: Tensor) -> tuple[Tensor, Tensor]:
    """Shares of real logits above 0 and of fake logits below 0."""
    return (logits_real > 0).float().mean(), (logits_fake < 0).float().mean()


def auc(pos: Tensor, neg: Tensor) -> float:
    """P(pos > neg) + P(pos = neg) / 2 over all pairs: .5 = not told apart. Any shapes."""
    pos, neg = pos.flatten().contiguous(), neg.flatten().sort().values
    below = torch.searchsorted(neg, pos) + torch.searchsorted(neg, pos, right=True)
    return below.double().mean().item() / (2 * len(neg))
