"""The built-in world: captioned scenes of one or two coloured shapes, a latent codec, word embeddings, a grader. No download.

Everything follows from a seed. A scene is a row of attributes (integers, -1 = open or unreadable) and a geometry (cx of W,
cy of H, r of sqrt(H W)). Letters: n images, a attributes, o objects, h/w pixels here, p = h w. Images are in [-1, 1].
All constants are our choice, not in the paper.
"""
import difflib
import math
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ladd.config import InputError

SIZES, COLOURS = ("small", "large"), ("red", "green", "blue", "yellow")
SHAPES, POSITIONS = ("circle", "square", "triangle", "cross"), ("left", "right", "top", "bottom")
RELATIONS, BACKGROUNDS = ("left of", "right of", "above", "below"), ("on black", "on gray", "on white")
ANY_SHAPE = "shape"                                   # the noun of a caption that leaves the shape open
ATTRIBUTES = {1: ("size", "colour", "shape", "position", "background"),
              2: ("size", "colour", "shape", "relation", "size2", "colour2", "shape2", "background")}
PHRASES = {1: (SIZES, COLOURS, SHAPES, POSITIONS, BACKGROUNDS),
           2: (SIZES, COLOURS, SHAPES, RELATIONS, SIZES, COLOURS, SHAPES, BACKGROUNDS)}
CHOICES = {objects: tuple(map(len, phrases)) for objects, phrases in PHRASES.items()}
_words = lambda columns: list(dict.fromkeys(" ".join(sum(columns, (ANY_SHAPE,))).split()))
VOCAB = _words(PHRASES[1] + PHRASES[2])

INK = torch.tensor([[.8, -.8, -.8], [-.8, .55, -.75], [-.75, -.55, .8], [.8, .7, -.8]])   # COLOURS, in [-1, 1]
PAPER = torch.tensor([[-.8] * 3, [0.] * 3, [.8] * 3])                                      # BACKGROUNDS
# r of sqrt(H W), (least, most) for small and large. Two objects are smaller: four large radii and a gap must fit into .77 (192 of 192x320)
RADII = {1: ((.125, .155), (.22, .26)), 2: ((.09, .105), (.15, .175))}
SQUARE, TALL, ARM = .88, 1.725, .36                   # half side, height of the triangle, half thickness of the cross; in r
AREA = torch.tensor([math.pi, 4 * SQUARE**2, TALL**2 / math.sqrt(3), 8 * ARM - 4 * ARM**2])  # in r^2, one a shape
SINK = torch.tensor([0., 0., TALL / 6, 0.])           # centroid below the centre of the bounding box, in r
GAP = .04                                             # least gap between two objects, of sqrt(H W)


class Scenes(NamedTuple):
    attributes: Tensor                                # [n, a] int64
    geometry: Tensor                                  # [n, o, 3] float32: cx of W, cy of H, r of sqrt(H W)


def _columns(objects: int) -> tuple[str, ...]:
    if objects not in ATTRIBUTES:
        raise InputError(f"objects: found {objects!r}, accepted are 1 and 2")
    return ATTRIBUTES[objects]


def _check_size(hw: tuple[int, int]) -> None:
    if len(hw) != 2 or any(side < 16 or side % 16 for side in hw):
        raise InputError(f"image size (H, W): found {tuple(hw)}, accepted are positive multiples of 16")


def swap(attributes: Tensor) -> Tensor:
    """The same scenes told from the other object: "A left of B" is "B right of A". [..., 8] -> [..., 8]"""
    out = attributes[..., [4, 5, 6, 3, 0, 1, 2, 7]]
    out[..., 3] = torch.where(out[..., 3] < 0, -1, out[..., 3] ^ 1)    # relations come in opposite pairs
    return out


def is_heldout(attributes: Tensor) -> Tensor:
    """Whether a scene shows one of 6 held-out (colour, shape, position | relation) of 64; in either object's view."""
    _, colour, shape, place = attributes[..., :4].unbind(-1)
    held = ((colour + shape) % 4 == place) & ((2 * colour + shape) % 8 % 3 == 1)
    return held | is_heldout(swap(attributes)[..., :4]) if attributes.shape[-1] == 8 else held


@lru_cache
def _rows(objects: int, heldout: bool) -> Tensor:
    rows = torch.cartesian_prod(*map(torch.arange, CHOICES[objects]))
    rows = rows if objects == 1 else rows[rows[:, 1] != rows[:, 5]]
    return rows[is_heldout(rows) == heldout]


def sample_scenes(n: int, hw: tuple[int, int], objects: int, generator: torch.Generator, heldout=False) -> Scenes:
    """n scenes, uniform over the attribute rows that are not held out (or only over those that are); all objects inside."""
    _columns(objects), _check_size(hw)
    rand = lambda *size: torch.rand(*size, generator=generator)
    rows = _rows(objects, heldout)
    attributes = rows[torch.randint(len(rows), (n,), generator=generator)]
    side, unit = torch.tensor([hw[1], hw[0]]).float(), math.sqrt(hw[0] * hw[1])            # (W, H)
    least, most = torch.tensor(RADII[objects])[attributes[:, [0, 4][:objects]]].unbind(-1)
    r = (least + (most - least) * rand(n, objects)) * unit                                  # [n, o] pixels
    place = attributes[:, 3]
    main = F.one_hot(place // 2, 2).bool()                                                  # [n, 2] the axis of the word
    sign = torch.where(place % 2 == 0, -1., 1.)[:, None]
    if objects == 1:       # in units of the free way: .5 to 1 along the word's axis, at most .35 across
        way = torch.where(main, sign * (.5 + .5 * rand(n, 1)), .7 * rand(n, 1) - .35)
        centre = (side / 2 + way * (side / 2 - r))[:, None]
    else:                  # step from the first centre to the second, then the pair anywhere inside
        both = r.sum(1, keepdim=True)
        along = both + GAP * unit + rand(n, 1) * (side - 2 * both - GAP * unit)             # [n, 2]
        across = (2 * rand(n, 1) - 1) * torch.minimum(.4 * along.flip(1), side - both)
        step = torch.where(main, -sign * along, across)
        low = torch.maximum(r[:, :1], r[:, 1:] - step)
        high = torch.minimum(side - r[:, :1], side - r[:, 1:] - step)
        first = low + rand(n, 2) * (high - low)
        centre = torch.stack([first, first + step], 1)
    return Scenes(attributes, torch.cat([centre / side, r[..., None] / unit], -1))


# --- renderer ---

def _distance(shape: int, x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """Signed distance in pixels to the outline of a shape at the origin (of its bounding box), y down; exact at the edges."""
    if shape == 0:
        return (x.square() + y.square()).sqrt() - r
    x = x.abs()
    if shape == 1:
        return torch.maximum(x, y.abs()) - SQUARE * r
    if shape == 2:
        return torch.maximum(.5 * (math.sqrt(3) * x - y - TALL / 2 * r), y - TALL / 2 * r)
    y = y.abs()
    return torch.minimum(torch.maximum(x - r, y - ARM * r), torch.maximum(x - ARM * r, y - r))


def _grid(h: int, w: int, centre: Tensor) -> tuple[Tensor, Tensor]:
    """Pixel centres relative to `centre` [n, 2] (x, y) in pixels: x [n, 1, w], y [n, h, 1]."""
    x, y = (torch.arange(side, device=centre.device) + .5 for side in (w, h))
    return x - centre[:, 0, None, None], y[:, None] - centre[:, 1, None, None]


def render(scenes: Scenes, hw: tuple[int, int]) -> Tensor:
    """Images [n, 3, H, W] in [-1, 1]: ink over paper with coverage clamp(1/2 - signed distance)."""
    _check_size(hw)
    h, w = hw
    chunk, out = max(1, 2**18 // (h * w)), torch.empty(len(scenes.attributes), 3, h, w)
    scale = torch.tensor([w, h, math.sqrt(h * w)])
    for attributes, geometry, images in zip(*(t.split(chunk) for t in (*scenes, out))):
        images.copy_(PAPER[attributes[:, -1], :, None, None].expand_as(images))
        for o in range(geometry.shape[1]):
            centre, r = (geometry[:, o] * scale).split((2, 1), -1)
            for shape in range(4):
                i = (attributes[:, 4 * o + 2] == shape).nonzero().flatten()
                cover = (.5 - _distance(shape, *_grid(h, w, centre[i]), r[i, :, None])).clamp_(0, 1)[:, None]
                images[i] = torch.lerp(images[i], INK[attributes[i, 4 * o + 1], :, None, None], cover)
    return out


# --- captions ---

def draw_captions(attributes: Tensor, generator: torch.Generator, stated: float = .6) -> Tensor:
    """Codes [n, a]: each attribute stated with probability `stated`, the others -1; a relation always, at least one."""
    n, a = attributes.shape
    keep = torch.rand(n, a, generator=generator) < stated
    one = torch.randint(a, (n,), generator=generator)
    keep[torch.arange(n), 3 if a == 8 else one] |= True if a == 8 else ~keep.any(1)
    return torch.where(keep, attributes, -1)


def caption(codes: Tensor | list[int], objects: int) -> str:
    """The words of a row of codes, for example "large red circle left of small blue square on black"."""
    words = []
    for column, phrases, code in zip(_columns(objects), PHRASES[objects], [int(c) for c in codes], strict=True):
        if code < 0 and column == "relation":
            raise InputError("caption of two objects: found no relation, accepted are " + ", ".join(RELATIONS))
        words += [phrases[code]] if code >= 0 else [ANY_SHAPE] * column.startswith("shape")
    return " ".join(words)


def _check_words(words: list[str], known: list[str], text: str) -> None:
    for word in words:
        if word not in known:
            near = (difflib.get_close_matches(word, known, 1, 0) or known)[0]
            raise InputError(f"prompt {text!r}: unknown word {word!r}, nearest known word is {near!r}; "
                             f"accepted are {' '.join(known)}")


def parse(text: str, objects: int) -> list[int]:
    """The codes of a caption, case ignored; raises InputError for what the grammar does not know. parse(caption(c)) == c."""
    columns, rest, codes = _columns(objects), text.lower().split(), []
    _check_words(rest, _words(PHRASES[objects]), text)
    for column, phrases in zip(columns, PHRASES[objects]):
        code = next((i for i, phrase in enumerate(phrases) if rest[:len(phrase.split())] == phrase.split()), -1)
        words = phrases[code].split() if code >= 0 else [ANY_SHAPE] * column.startswith("shape")
        if rest[:len(words)] != words or column == "relation" and code < 0:
            break
        rest, codes = rest[len(words):], codes + [code]
    if rest or len(codes) < len(columns):
        raise InputError(f"prompt {text!r}: found {rest[0] if rest else 'its end'!r} out of place, accepted is "
                         f"{' '.join(columns)} in this order, each may be left out but "
                         f"{'shape (or the word shape)' if objects == 1 else 'the two shapes (or the word shape) and relation'}")
    if objects == 2 and codes[1] == codes[5] >= 0:
        raise InputError(f"prompt {text!r}: found two {COLOURS[codes[1]]} objects, accepted are two different colours")
    return codes


def max_words(objects: int) -> int:
    return sum(max(len(phrase.split()) for phrase in phrases) for phrases in PHRASES[objects])


@lru_cache
def _waves(dim: int) -> Tensor:
    """Row k is the k-th cosine of the DCT-II: orthogonal rows of unit mean square, the same on every machine."""
    k, j = torch.arange(dim, dtype=torch.float64)[:, None], torch.arange(dim, dtype=torch.float64) + .5
    return (torch.cos(math.pi / dim * k * j) * torch.where(k > 0, math.sqrt(2), 1.)).float()


def embed(texts: list[str], length: int, dim: int) -> tuple[Tensor, Tensor]:
    """(context [n, length, dim], pooled [n, dim]): frozen orthogonal word vectors, .3 of a position vector added in context.

    Word 0 is the padding. pooled = sum of word vectors / sqrt(count), zero for "". Positions take the last waves, words the
    first ones, so that both stay orthogonal where dim >= words + length.
    """
    if dim < len(VOCAB) + 1:
        raise InputError(f"width of the text embedding: found {dim}, accepted is at least {len(VOCAB) + 1}, one a word")
    ids = torch.zeros(len(texts), length, dtype=torch.long)
    for row, text in zip(ids, texts):
        words = text.split()
        _check_words(words, VOCAB, text)
        if len(words) > length:
            raise InputError(f"prompt {text!r}: found {len(words)} words, accepted are at most {length}")
        row[:len(words)] = torch.tensor([VOCAB.index(word) + 1 for word in words])
    waves, said = _waves(dim), (ids > 0)[..., None]                                         # said [n, l, 1]
    words, positions = waves[ids], waves[-1 - torch.arange(length) % dim]
    return words + .3 * positions, (words * said).sum(1) / said.sum(1).clamp(min=1).sqrt()


# --- latent codec ---

SCALE, SHIFT = 1.5305, .0609                          # SD3's affine: latent = (z - SHIFT) * SCALE
# (colour axis, vertical, horizontal frequency, gain) of each channel; axis 0 is luma, 1 red - blue, 2 red + blue - 2 green.
# The gains give unit deviation between 64 px with one object (edges are frequent: up to 1.45) and 256 px with two (down to .68)
CHANNELS = ((0, 0, 0, .076), (0, 0, 1, 1.), (0, 1, 0, 1.), (0, 1, 1, 2.5), (0, 0, 2, 2.4), (0, 2, 0, 2.4),
            (1, 0, 0, .3), (1, 0, 1, 1.3), (1, 1, 0, 1.3), (1, 1, 1, 3.2), (1, 0, 2, 3.),
            (2, 0, 0, .4), (2, 0, 1, 1.7), (2, 1, 0, 1.7), (2, 1, 1, 4.3), (2, 2, 0, 3.8))


def _basis(device: torch.device) -> tuple[Tensor, Tensor]:
    """Orthonormal filters [16, 3, 8, 8] (colour axis times 2-D DCT) and their gains [16]."""
    colour = torch.tensor([[1., 1., 1.], [1., 0., -1.], [1., -2., 1.]])
    colour, wave = colour / colour.norm(dim=1, keepdim=True), _waves(8) / math.sqrt(8)
    filters = [torch.einsum("c,y,x->cyx", colour[c], wave[i], wave[j]) for c, i, j, _ in CHANNELS]
    return torch.stack(filters).to(device), torch.tensor([gain for *_, gain in CHANNELS], device=device)


def encode(images: Tensor) -> Tensor:
    """Latents [n, 16, H/8, W/8] = (gain * <filter, 8x8 block> - SHIFT) * SCALE of images [n, 3, H, W]."""
    _check_size(images.shape[2:])
    filters, gain = _basis(images.device)
    return (F.conv2d(images.float(), filters * gain[:, None, None, None], stride=8) - SHIFT) * SCALE


def decode(latents: Tensor) -> Tensor:
    """Images [n, 3, H, W], clamped to [-1, 1]: the transpose of `encode`, which is orthonormal up to its gains."""
    filters, gain = _basis(latents.device)
    return F.conv_transpose2d(latents.float() / SCALE + SHIFT, filters / gain[:, None, None, None], stride=8).clamp_(-1, 1)


# --- grader ---

NEAR, MISFIT = .5, .6                                 # colour distances: the same colour; a pixel that the fit leaves unexplained
SIZE_LIMITS = {1: (.105, .185, .30), 2: (.07, .125, .205)}                     # least, small | large, most r
LEAST_PAPER, LEAST_INK, LEAST_IOU, MOST_STRAY, LEAST_OFFSET = .5, .4, .7, .1, .42


def grade(images: Tensor, objects: int) -> Tensor:
    """Codes [n, a] read back from the pixels of images [n, 3, H, W]; a row of -1 where they show no scene of the world."""
    _columns(objects), _check_size(images.shape[2:])
    chunk = max(1, 2**18 // images[0, 0].numel()) if len(images) else 1
    return torch.cat([_grade(part, objects)[0] for part in images.split(chunk)])


def _grade(images: Tensor, objects: int) -> tuple[Tensor, dict[str, Tensor]]:
    """(codes, the measurements that decide readability): colours by nearest palette entry, shape and size by the best template."""
    n, _, h, w = images.shape
    device, unit, rows = images.device, math.sqrt(h * w), torch.arange(n, device=images.device)
    pixels, palette = decode(encode(images)).flatten(2), torch.cat([PAPER, INK]).to(device)
    distance = palette.square().sum(1)[:, None] + pixels.square().sum(1, keepdim=True) - 2 * (palette @ pixels)  # [n, 7, p]
    count = (distance < NEAR**2).sum(-1)                                                    # NEAR separates the palette
    background, colours = count[:, :3].argmax(1), count[:, 3:].topk(objects).indices.sort(1).values
    paper, ink = PAPER.to(device)[background], INK.to(device)[colours]                      # [n, 3], [n, o, 3]

    # coverage: the projection of pixel - paper on ink - paper; the misfit is what it leaves
    step = ink - paper[:, None]
    length = step.square().sum(-1, keepdim=True)                                            # [n, o, 1]
    cover = (step @ (pixels - paper[..., None])) / length                                   # [n, o, p]
    clear = cover.clamp(0, 1)
    misfit = distance[rows, background][:, None] + (clear.square() - 2 * clear * cover) * length
    least = misfit.amin(1, keepdim=True)
    mask = _steep(cover).mul_(misfit == least).view(-1, h, w)                               # [n o, h, w]
    area = mask.sum((1, 2)).clamp_(min=1e-3)                                                # [n o] pixels
    mid = torch.stack([mask.sum(1) @ (torch.arange(w, device=device) + .5),
                       mask.sum(2) @ (torch.arange(h, device=device) + .5)], -1) / area[:, None]

    # fit: each shape at the area and centroid found, painted and seen through the codec as well
    radius = (area[:, None] / AREA.to(device)).sqrt()                                       # [n o, 4] one a template
    centre = mid[:, None] - torch.stack([torch.zeros_like(radius), SINK.to(device) * radius], -1)
    step, length, fits = step.flatten(0, 1), length.flatten(0, 1), []
    for shape in range(4):
        alpha = (.5 - _distance(shape, *_grid(h, w, centre[:, shape]), radius[:, shape, None, None])).clamp_(0, 1)
        seen = decode(encode(paper.repeat_interleave(objects, 0)[:, :, None, None] + alpha[:, None] * step[:, :, None, None]))
        seen = (step[:, None] @ (seen.flatten(2) - paper.repeat_interleave(objects, 0)[..., None]))[:, 0] / length
        template = _steep(seen).view_as(mask)
        total, differ = area + template.sum((1, 2)), (template - mask).abs_().sum((1, 2))
        fits.append((total - differ) / (total + differ))                                    # soft min / soft max
    iou, shape = torch.stack(fits, -1).max(-1)                                              # [n o]
    second = torch.stack(fits, -1).topk(2,-1).values[:,1]
    radius = (radius.gather(1, shape[:, None]) / unit).view(n, objects)
    centre = centre[torch.arange(len(shape), device=device), shape].view(n, objects, 2)
    iou, shape, area, second = (t.view(n, objects) for t in (iou, shape, area, second))
    lower, limit, upper = SIZE_LIMITS[objects]
    size = (radius > limit).long()
    side = torch.tensor([w, h], device=device)
    if objects == 1:
        way = ((centre[:, 0] - side / 2) / (side / 2 - radius * unit).clamp(min=1))         # [n, 2] as in sample_scenes
    else:
        way = centre[:, 0] - centre[:, 1]
    main = way.abs().argmax(1)
    place = 2 * main + (way[rows, main] > 0)
    found = dict(paper=count[rows, background] / (h * w), ink=(count[rows[:, None], 3 + colours] / area).amin(1),
                 iou=iou.amin(1), lead=(iou-second).amin(1), rel=((1-iou)/(1-second)).amax(1), stray=(least[:, 0] > MISFIT**2).sum(1) / area.sum(1), radius=radius,
                 offset=way.abs().amax(1) if objects == 1 else torch.ones(n, device=device))
    objects_read = torch.stack([size, colours, shape], -1)                                  # [n, o, 3]
    codes = torch.cat([objects_read[:, 0], place[:, None], objects_read[:, 1:].flatten(1), background[:, None]], 1)
    ok = ((found["paper"] > LEAST_PAPER) & (found["ink"] > LEAST_INK) & (found["iou"] > LEAST_IOU)
          & (found["stray"] < MOST_STRAY) & (found["offset"] > LEAST_OFFSET)
          & (radius > lower).all(1) & (radius < upper).all(1))
    return torch.where(ok[:, None], codes, -1), found


def _steep(cover: Tensor) -> Tensor:
    return (2 * cover - .5).clamp_(0, 1)                                                    # half a pixel of edge: deaf to noise


def contradicts(a: Tensor, b: Tensor) -> Tensor:
    """Whether two rows of codes [..., a] cannot describe one scene: some attribute that both state differs (in either telling)."""
    differ = lambda a, b: ((a != b) & (a >= 0) & (b >= 0)).any(-1)
    return differ(a, b) & differ(swap(a), b) if a.shape[-1] == 8 else differ(a, b)


def align(graded: Tensor, codes: Tensor) -> Tensor:
    """Graded rows told from the object that fits `codes` better: pixels do not say which object a caption names first."""
    if graded.shape[-1] != 8:
        return graded
    misses = lambda rows: ((rows != codes) & (codes >= 0)).sum(-1)
    other = swap(graded)
    return torch.where((misses(other) < misses(graded))[:, None], other, graded)
