"""Scenes of the toy dataset: one or two coloured shapes, rendered from a seed; the latent codec.

Nothing is downloaded; everything follows from a seed. A scene is a row of attributes (integers, -1
for an absent object or an open attribute) and a geometry (cx as a fraction of W, cy of H, r of the
short side). Images are in [-1, 1]. All constants are our choice. Letters: n images, a attributes,
o objects, h w in pixels.
"""
import math
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

SIZES = ("small", "large")
COLOURS = ("red", "green", "blue", "yellow")
SHAPES = ("circle", "triangle", "cross", "square")
POSITIONS = ("left", "right", "top", "bottom")
RELATIONS = ("left of", "right of", "above", "below")
BACKGROUNDS = ("on black", "on gray", "on white")
ANY_SHAPE = "shape"      # the noun of a caption that leaves the shape open
ATTRIBUTES = {1: ("size", "colour", "shape", "position", "background"),
              2: ("size", "colour", "shape", "relation", "size2", "colour2", "shape2",
                  "background")}
# One object is never a square: a small teacher learns corners last, and draws a square without
# corners, which is a circle.
PHRASES = {1: (SIZES, COLOURS, SHAPES[:3], POSITIONS, BACKGROUNDS),
           2: (SIZES, COLOURS, SHAPES, RELATIONS, SIZES, COLOURS, SHAPES, BACKGROUNDS)}
CHOICES = {objects: tuple(map(len, phrases)) for objects, phrases in PHRASES.items()}
# of COLOURS
COLOUR_RGB = torch.tensor([[0.8, -0.8, -0.8], [-0.8, 0.55, -0.75], [-0.75, -0.55, 0.8],
                           [0.8, 0.7, -0.8]])
# of BACKGROUNDS
BACKGROUND_RGB = torch.tensor([[-0.8] * 3, [0.0] * 3, [0.8] * 3])
# in short sides: (least, most) r of small and large objects, least gap between two objects, and how
# far a centre of two is at most from its place along each axis
RADII = {1: ((0.25, 0.26), (0.355, 0.365)), 2: ((0.135, 0.145), (0.195, 0.205))}
GAP, JITTER = 0.04, 0.025
# In r: half the side of a square, the height of a triangle, half the thickness of a cross's arm.
SQUARE, TALL, ARM = 0.88, 1.725, 0.36
EDGE = 4.0               # width of an edge in pixels, about that of the codec's finest waves
# by SHAPES: area in r^2; distance of the centroid below the centre of the bounding box, in r
AREA = torch.tensor([math.pi, TALL**2 / math.sqrt(3), 8 * ARM - 4 * ARM**2, 4 * SQUARE**2])
SINK = torch.tensor([0.0, TALL / 6, 0.0, 0.0])


def words_of(phrases: tuple[tuple[str, ...], ...]) -> list[str]:
    """Return the distinct words of the phrases of all attributes, and ANY_SHAPE."""
    return list(dict.fromkeys(" ".join(sum(phrases, (ANY_SHAPE,))).split()))


VOCAB = words_of(PHRASES[1] + PHRASES[2])


class ToyConfig(NamedTuple):
    """Settings of the toy dataset."""
    task: str                         # text, edit or inpaint
    objects: int                      # in a scene
    stated: float                     # probability that a caption states an attribute
    text_dim: int                     # width of a text token and of the pooled text
    hw: tuple[tuple[int, int], ...]   # sizes of images, in pixels


class Scenes(NamedTuple):
    """n scenes."""
    attributes: Tensor                # [n, a] int64
    geometry: Tensor                  # [n, o, 3] fp32: cx of W, cy of H, r of the short side


def swap(attributes: Tensor) -> Tensor:
    """Return scenes [..., 8] told from the other object: "A left of B" as "B right of A"."""
    out = attributes[..., [4, 5, 6, 3, 0, 1, 2, 7]]
    # Relations come in pairs of opposites, so the last bit turns one into its opposite.
    out[..., 3] = torch.where(out[..., 3] < 0, -1, out[..., 3] ^ 1)
    return out


def is_heldout(attributes: Tensor) -> Tensor:
    """Return whether a scene has a combination that is held out from training: one of 4 (colour,
    shape, position) of 48 with one object, with two, told from either, one of 6 (colour, shape,
    relation) of 64."""
    _, colour, shape, place = attributes[..., :4].unbind(-1)
    held = ((colour + shape) % 4 == place) & ((2 * colour + shape) % 8 % 3 == 1)
    if attributes.shape[-1] == 8:
        held = held | is_heldout(swap(attributes)[..., :4])
    return held


@lru_cache
def _rows(objects: int, heldout: bool) -> Tensor:
    """Return all rows of attributes that are held out, or that are not."""
    rows = torch.cartesian_prod(*map(torch.arange, CHOICES[objects]))
    if objects == 2:
        rows = rows[rows[:, 1] != rows[:, 5]]       # two objects have two colours
    return rows[is_heldout(rows) == heldout]


def sample_scenes(n: int, hw: tuple[int, int], objects: int, generator: torch.Generator,
                  heldout: bool = False, anywhere: bool = False) -> Scenes:
    """Return n scenes, uniform over the attribute rows that are (or are not) held out.

    MMDiT crops its position table around the centre. Positions are therefore in units of the short
    side, around the centre: all sizes whose sides in patches are even (or odd) then show a scene at
    the same positions, and a small network need not learn each aspect ratio separately. Two objects
    lie a quarter of the short side from the centre, on opposite sides; with `anywhere` the pair
    lies anywhere in the image, which a network learns far more slowly (both measured).
    """
    def rand(*size: int) -> Tensor:
        return torch.rand(*size, generator=generator)

    rows = _rows(objects, heldout)
    attributes = rows[torch.randint(len(rows), (n,), generator=generator)]
    side, px = torch.tensor([hw[1], hw[0]]).float(), min(hw)
    least, most = torch.tensor(RADII[objects])[attributes[:, [0, 4][:objects]]].unbind(-1)
    r = (least + (most - least) * rand(n, objects)) * px                # [n, o] pixels
    place = attributes[:, 3]
    main = F.one_hot(place // 2, 2).bool()                              # [n, 2] axis of the word
    sign = torch.where(place % 2 == 0, -1.0, 1.0)[:, None]
    if objects == 1:
        # The offset from the image's centre is in units of the free way of the short side: 0.75 to
        # 0.85 along the axis of the word, at most 0.1 across.
        way = torch.where(main, sign * (0.75 + 0.1 * rand(n, 1)), 0.2 * rand(n, 1) - 0.1)
        centre = (side / 2 + way * (min(hw) / 2 - r))[:, None]
    elif not anywhere:
        first = torch.where(main, 0.25 * sign, 0.0)                                 # [n, 2]
        jitter = JITTER * (2 * rand(n, 2, 2) - 1)
        centre = side / 2 + px * (torch.stack([first, -first], 1) + jitter)
    else:
        # First the step from the first centre to the second, then the pair anywhere in the image.
        both = r.sum(1, keepdim=True)
        along = both + GAP * px + rand(n, 1) * (side - 2 * both - GAP * px)         # [n, 2]
        across = (2 * rand(n, 1) - 1) * torch.minimum(0.4 * along.flip(1), side - both)
        step = torch.where(main, -sign * along, across)
        low = torch.maximum(r[:, :1], r[:, 1:] - step)
        high = torch.minimum(side - r[:, :1], side - r[:, 1:] - step)
        first = low + rand(n, 2) * (high - low)
        centre = torch.stack([first, first + step], 1)
    return Scenes(attributes, torch.cat([centre / side, r[..., None] / px], -1))


# --- renderer ---

def signed_distance(shape: int, x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """Return the signed distance [n, h, w] in pixels to a shape whose bounding box is centred at 0,
    exact at its sides; y points down."""
    if shape == 0:
        return (x.square() + y.square()).sqrt() - r
    x = x.abs()
    if shape == 3:
        return torch.maximum(x, y.abs()) - SQUARE * r
    if shape == 1:
        return torch.maximum(0.5 * (math.sqrt(3) * x - y - TALL / 2 * r), y - TALL / 2 * r)
    y = y.abs()
    return torch.minimum(torch.maximum(x - r, y - ARM * r), torch.maximum(x - ARM * r, y - r))


def pixel_grid(h: int, w: int, centre: Tensor) -> tuple[Tensor, Tensor]:
    """Return pixel centres relative to `centre` [n, 2] (x, y): x [n, 1, w], y [n, h, 1]."""
    x, y = (torch.arange(side, device=centre.device) + 0.5 for side in (w, h))
    return x - centre[:, 0, None, None], y[:, None] - centre[:, 1, None, None]


def coverage(shape: int, h: int, w: int, centre: Tensor, r: Tensor) -> Tensor:
    """Return the opacity of a shape at each pixel, [n, h, w]: clamp(1/2 - signed distance / EDGE).
    centre [n, 2] (x, y) and r [n, 1] in pixels."""
    distance = signed_distance(shape, *pixel_grid(h, w, centre), r[..., None])
    return (0.5 - distance / EDGE).clamp_(0, 1)


def render(scenes: Scenes, hw: tuple[int, int]) -> Tensor:
    """Return images [n, 3, H, W] in [-1, 1] of scenes, objects over the background."""
    h, w = hw
    chunk, out = max(1, 2**18 // (h * w)), torch.empty(len(scenes.attributes), 3, h, w)
    scale = torch.tensor([w, h, min(hw)])
    for attributes, geometry, images in zip(*(t.split(chunk) for t in (*scenes, out))):
        images.copy_(BACKGROUND_RGB[attributes[:, -1], :, None, None].expand_as(images))
        for o in range(geometry.shape[1]):
            centre, r = (geometry[:, o] * scale).split((2, 1), -1)
            for shape in range(4):
                i = (attributes[:, 4 * o + 2] == shape).nonzero().flatten()
                colour = COLOUR_RGB[attributes[i, 4 * o + 1], :, None, None]
                cover = coverage(shape, h, w, centre[i], r[i])[:, None]
                images[i] = torch.lerp(images[i], colour, cover)
    return out


@lru_cache
def cosine_waves(dim: int) -> Tensor:
    """Return [dim, dim], whose row k is the k-th cosine of the DCT-II. The rows are orthogonal and
    have unit mean square."""
    k = torch.arange(dim, dtype=torch.float64)[:, None]
    j = torch.arange(dim, dtype=torch.float64) + 0.5
    return (torch.cos(math.pi / dim * k * j) * torch.where(k > 0, math.sqrt(2), 1.0)).float()


# --- latent codec ---

CODEC = "lapped transform"      # named in the provenance of latents
SCALE, SHIFT = 1.5305, 0.0609                    # SD3's affine: latent = (z - SHIFT) * SCALE
LAP = 2             # pixels that a wave of the codec reaches into the neighbouring blocks
# (colour axis, vertical frequency, horizontal frequency, gain) of each channel. Axes: luma, red -
# blue, red + blue - 2 green. Gains are proportional to deviation^-0.7 over the dataset, such that
# the mean of luma has deviation 1 and the finest detail 0.3.
CHANNELS = ((0, 0, 0, 0.08), (0, 0, 1, 0.4), (0, 1, 0, 0.4), (0, 1, 1, 0.69), (0, 0, 2, 0.97),
            (0, 2, 0, 0.97), (1, 0, 0, 0.18), (1, 0, 1, 0.47), (1, 1, 0, 0.47), (1, 1, 1, 0.8),
            (1, 0, 2, 1.13), (2, 0, 0, 0.21), (2, 0, 1, 0.56), (2, 1, 0, 0.56), (2, 1, 1, 0.97),
            (2, 2, 0, 1.34))


@lru_cache
def _lapped(side: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the waves [3 side / 8, side] of analysis and of synthesis: the three lowest of the 8
    frequencies of each block of 8 pixels, which reach LAP pixels into its neighbours and fade out.

    It is a lapped biorthogonal transform: the odd part of the 2 LAP pixels around each border of
    two blocks goes through `odd`, then each block through a DCT; synthesis is the inverse.
    Source: Tran et al. 2003, "Lapped transform via time-domain pre- and post-filtering".
    """
    eye, half = torch.eye(LAP, dtype=torch.float64), torch.arange(LAP, dtype=torch.float64) + 0.5
    dct2 = cosine_waves(LAP).double() / math.sqrt(LAP)
    dct4 = torch.cos(math.pi / LAP * half[:, None] * half) * math.sqrt(2 / LAP)
    dct4[0] *= math.sqrt(2)                             # waves then end near 0
    odd, flip = (dct2.T @ dct4).flip(0, 1), eye.flip(0)
    parts = torch.cat([torch.cat([eye, flip], 1), torch.cat([flip, -eye], 1)]) / math.sqrt(2)
    border, inner = parts @ torch.block_diag(eye, odd) @ parts, torch.eye(8 - 2 * LAP)
    before = torch.block_diag(eye, *[inner, border] * (side // 8 - 1), inner, eye)
    analysis = torch.block_diag(*[cosine_waves(8).double() / math.sqrt(8)] * (side // 8)) @ before
    both = analysis, torch.linalg.inv(analysis).T
    low, high = (waves.unflatten(0, (-1, 8))[:, :3].flatten(0, 1) for waves in both)
    return low.float().to(device), high.float().to(device)


@lru_cache
def _channels(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return the colour axes [3, 3], orthonormal rows; the number 9 axis + 3 vertical + horizontal
    frequency of each channel [16]; and the gains [16, 1, 1]."""
    axis, row, column, gain = (torch.tensor(field) for field in zip(*CHANNELS))
    colour = F.normalize(torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, -1.0], [1.0, -2.0, 1.0]]))
    number, gain = 9 * axis + 3 * row + column, gain[:, None, None]
    return colour.to(device), number.to(device), gain.to(device)


def encode(images: Tensor) -> Tensor:
    """Return latents [n, 16, H/8, W/8] of images [n, 3, H, W]: (gain * wave's coefficient - SHIFT)
    * SCALE for the waves of CHANNELS."""
    colour, number, gain = _channels(images.device)
    rows, columns = (_lapped(side, images.device)[0] for side in images.shape[2:])
    x = rows @ (images.float() @ columns.T)                             # [n, 3, 3 h, 3 w]
    x = x.unflatten(3, (-1, 3)).unflatten(2, (-1, 3))                   # [n, 3, h, 3, w, 3]
    x = torch.einsum("ac,nchrws->narshw", colour, x).flatten(1, 3)[:, number]
    return (x * gain - SHIFT) * SCALE


def decode(latents: Tensor) -> Tensor:
    """Return images [n, 3, H, W] of latents, clamped to [-1, 1]: the sum of the waves, each times
    its coefficient / gain. encode(decode(z)) is z where nothing is clamped."""
    colour, number, gain = _channels(latents.device)
    n, _, h, w = latents.shape
    rows, columns = (_lapped(8 * side, latents.device)[1] for side in (h, w))
    x = latents.new_zeros(n, 27, h, w, dtype=torch.float32)
    x[:, number] = (latents.float() / SCALE + SHIFT) / gain
    x = torch.einsum("ac,narshw->nchrws", colour, x.view(n, 3, 3, 3, h, w))
    x = x.reshape(n, 3, 3 * h, 3 * w)
    return (rows.T @ x @ columns).clamp_(-1, 1)
