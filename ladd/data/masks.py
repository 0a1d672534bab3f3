"""Masks for inpainting: random masks, and how images and latents are masked and composited.

A mask is bool [n, H, W] in pixels, True where the image is repainted. The distributions of random
masks are our choice.
"""
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ladd.cli import InputError, must

# --- random masks ---

def _pixels(hw: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return the centres of pixels: y [h, 1], x [1, w]."""
    return torch.arange(hw[0])[:, None] + 0.5, torch.arange(hw[1])[None] + 0.5


def _box(low: Tensor, high: Tensor, hw: tuple[int, int]) -> Tensor:
    """Return the pixels [n, h, w] between corners low, high [n, 2] (y, x) in [0, 1]."""
    y, x = _pixels(hw)
    low, high = ((t * torch.tensor(hw))[..., None, None] for t in (low, high))
    return (y > low[:, 0]) & (y < high[:, 0]) & (x > low[:, 1]) & (x < high[:, 1])


def _rectangles(n: int, hw: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Return rectangles anywhere in the image; each side is U(1/4, 3/4) of the image's."""
    size, at = torch.rand(2, n, 2, generator=generator)
    size = 0.25 + 0.5 * size
    low = at * (1 - size)
    return _box(low, low + size, hw)


def _polygons(n: int, hw: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Return polygons of 3 to 8 corners around a point of the middle half of the image, unevenly
    spaced at distances U(0.2, 0.5) of the short side."""
    centre = (0.25 + 0.5 * torch.rand(n, 2, generator=generator)) * torch.tensor(hw)
    count = torch.randint(3, 9, (n, 1), generator=generator)
    # All polygons get 8 corners; the last corner repeats.
    corner = torch.minimum(torch.arange(8), count - 1)                          # [n, 8]
    turn, jitter, r = torch.rand(3, n, 8, generator=generator)
    turn = math.tau * (turn[:, :1] + (corner + 0.5 * jitter.gather(1, corner)) / count)
    r = (0.2 + 0.3 * r.gather(1, corner)) * min(hw)
    return _filled(torch.stack([turn.sin() * r, turn.cos() * r], -1) + centre[:, None], hw)


def _filled(corners: Tensor, hw: tuple[int, int]) -> Tensor:
    """Return the pixels [n, h, w] inside polygons [n, k, 2] (y, x), by the even-odd rule."""
    y, x = _pixels(hw)
    inside = torch.zeros(len(corners), *hw, dtype=torch.bool)
    for a, b in zip(corners.unbind(1), corners.roll(-1, 1).unbind(1)):
        (ya, xa), (yb, xb) = (t[..., None, None].unbind(1) for t in (a, b))
        inside ^= ((ya > y) != (yb > y)) & (x < xa + (y - ya) / (yb - ya) * (xb - xa))
    return inside


def _strokes(n: int, hw: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Return 1 to 3 strokes of a round brush of radius U(0.05, 0.1) of the short side. A stroke
    starts at a point of the image and has three straight pieces, each U(0.2, 0.5) of it long."""
    start = torch.rand(n, 3, 1, 2, generator=generator)
    turn, length = torch.rand(2, n, 3, 3, generator=generator)
    radius = (0.05 + 0.05 * torch.rand(n, 1, 1, generator=generator)) * min(hw)
    turn, length = math.tau * turn, (0.2 + 0.3 * length) * min(hw)
    steps = torch.stack([turn.sin() * length, turn.cos() * length], -1)
    points = torch.cat([start * torch.tensor(hw), steps], 2).cumsum(2)       # [n, 3, 4, 2] (y, x)
    count = torch.randint(1, 4, (n, 1), generator=generator)
    # All masks get 3 strokes; the first strokes repeat.
    points = points[torch.arange(n)[:, None], torch.arange(3) % count]
    return _brushed(points[:, :, :-1].flatten(1, 2), points[:, :, 1:].flatten(1, 2), radius, hw)


def _brushed(starts: Tensor, ends: Tensor, radius: Tensor, hw: tuple[int, int]) -> Tensor:
    """Return the pixels [n, h, w] nearer than radius [n, 1, 1] to one of the pieces from starts to
    ends [n, k, 2] (y, x)."""
    y, x = _pixels(hw)
    painted = torch.zeros(len(starts), *hw, dtype=torch.bool)
    for a, b in zip(starts.unbind(1), ends.unbind(1)):
        (ya, xa), (dy, dx) = (t[..., None, None].unbind(1) for t in (a, b - a))
        t = (((y - ya) * dy + (x - xa) * dx) / (dy * dy + dx * dx)).clamp_(0, 1)
        painted |= (y - ya - t * dy).square() + (x - xa - t * dx).square() < radius.square()
    return painted


def _borders(n: int, hw: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Return 1 to 4 margins to outpaint, each U(1/8, 3/8) wide and there with probability 1/2."""
    margin, present = torch.rand(2, n, 4, generator=generator)
    one = F.one_hot(torch.randint(4, (n,), generator=generator), 4).bool()
    margin = torch.where(one | (present < 0.5), 0.125 + 0.25 * margin, 0)
    return ~_box(margin[:, :2], 1 - margin[:, 2:], hw)


def _everything(n: int, hw: tuple[int, int], generator: torch.Generator) -> Tensor:
    return torch.ones(n, *hw, dtype=torch.bool)


MASKS = {"rectangle": _rectangles, "polygon": _polygons, "strokes": _strokes, "border": _borders,
         "everything": _everything}


def masks(n: int, hw: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Return n masks, bool [n, H, W], none empty; the kinds alternate from a random one on."""
    first = int(torch.randint(len(MASKS), (1,), generator=generator))
    out = torch.empty(n, *hw, dtype=torch.bool)
    for i, draw in enumerate(MASKS.values()):
        rows = out[(i - first) % len(MASKS)::len(MASKS)]
        rows.copy_(draw(len(rows), hw, generator))
    return out


# --- applying masks ---

def check_mask(mask: Tensor, hw: tuple[int, int]) -> Tensor:
    """Return a user's mask [b, H, W] (bool, 0 and 1, or 0 and 255) as bool."""
    must(tuple(mask.shape[1:]) == tuple(hw), f"mask must have the image's size, {hw[0]}x{hw[1]} "
         f"pixels (got {'x'.join(map(str, mask.shape[1:]))})")
    white = 255 if mask.numel() and mask.max() > 1 else 1
    odd = mask[(mask != 0) & (mask != white)].tolist()
    if odd:
        raise InputError("mask must be black (0, kept) and white (1 or 255, repainted) (got "
                         f"{len(odd)} other pixels, such as {odd[0]:g})")
    must(bool((mask != 0).flatten(1).any(1).all()),
         "mask must be white where the image is to be repainted (got all black)")
    return mask != 0


def latent_mask(mask: Tensor) -> Tensor:
    """Return the mask [b, H, W] of latents, float32 [b, 1, H/8, W/8]: 1 where any of the 8 x 8
    pixels of a latent is repainted. A latent that is kept may still depend on repainted pixels
    nearby, so that networks are given latents of `masked` images (image_condition)."""
    return F.max_pool2d(mask[:, None].float(), 8)


def masked(x: Tensor, mask: Tensor) -> Tensor:
    """Return x [b, c, h, w] with 0 where it is repainted. Images have a mask [b, h, w], latents one
    of [b, 1, h, w]."""
    return x.masked_fill((mask if mask.dim() == 4 else mask[:, None]).bool(), 0)


def hatched(images: Tensor, mask: Tensor) -> Tensor:
    """Return images [b, 3, H, W] with stripes where the mask [b, H, W] repaints, to be shown."""
    y, x = _pixels(tuple(images.shape[2:]))
    return torch.where(mask[:, None], 0.8 * ((x + y) // 4 % 2 - 0.5), images)


def composite(source: Tensor, result: Tensor, mask: Tensor) -> Tensor:
    """Return the result [b, 3, H, W] where the mask [b, H, W] repaints, elsewhere the source."""
    return torch.where(mask[:, None], result, source)


def image_condition(encode: Callable[[Tensor], Tensor], images: Tensor, mask: Tensor) -> Tensor:
    """Return the image conditioning [n, 17, h, w] of an inpainting network: the latent mask, and
    the latents that `encode` makes of images [n, 3, H, W] without the pixels that the mask [n, H,
    W] repaints; latents in the latent mask are 0."""
    cells = latent_mask(mask)
    return torch.cat([cells, masked(encode(masked(images, mask)), cells)], 1)
