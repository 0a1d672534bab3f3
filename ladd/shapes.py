"""The built-in world: captioned scenes of one or two coloured shapes, latent codec, word embeddings, grader.

No download, everything follows from a seed. A scene is a row of attributes (integers, -1 = open, unreadable)
and a geometry (cx of W, cy of H, r in `unit`s). Images are in [-1, 1]. All constants are our choice.
Letters: n images, a attributes, o objects, h/w here pixels, p = h w.
"""
import difflib
import math
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ladd.config import InputError

SIZES, COLOURS = ("small", "large"), ("red", "green", "blue", "yellow")
SHAPES, POSITIONS = ("circle", "triangle", "cross", "square"), ("left", "right", "top", "bottom")
RELATIONS, BACKGROUNDS = ("left of", "right of", "above", "below"), ("on black", "on gray", "on white")
ANY_SHAPE = "shape"                                   # the noun of a caption that leaves the shape open
ATTRIBUTES = {1: ("size", "colour", "shape", "position", "background"),
              2: ("size", "colour", "shape", "relation", "size2", "colour2", "shape2", "background")}
# one object goes without squares: a small teacher draws corners last, and without them a square is a circle
PHRASES = {1: (SIZES, COLOURS, SHAPES[:3], POSITIONS, BACKGROUNDS),
           2: (SIZES, COLOURS, SHAPES, RELATIONS, SIZES, COLOURS, SHAPES, BACKGROUNDS)}
CHOICES = {objects: tuple(map(len, phrases)) for objects, phrases in PHRASES.items()}
_words = lambda columns: list(dict.fromkeys(" ".join(sum(columns, (ANY_SHAPE,))).split()))
VOCAB = _words(PHRASES[1] + PHRASES[2])

INK = torch.tensor([[.8, -.8, -.8], [-.8, .55, -.75], [-.75, -.55, .8], [.8, .7, -.8]])   # of COLOURS
PAPER = torch.tensor([[-.8] * 3, [0.] * 3, [.8] * 3])                                     # of BACKGROUNDS
# (least, most) r in units for small and large; four large radii of two objects and a gap fit into 192x320
RADII = {1: ((.25, .26), (.355, .365)), 2: ((.09, .105), (.15, .175))}
SQUARE, TALL, ARM = .88, 1.725, .36                   # half a side, height, half thickness of an arm; in r
AREA = torch.tensor([math.pi, TALL**2 / math.sqrt(3), 8 * ARM - 4 * ARM**2, 4 * SQUARE**2])   # in r^2
SINK = torch.tensor([0., TALL / 6, 0., 0.])           # centroid below the centre of the bounding box, in r
GAP = .04                                             # least gap between two objects, in units


class Scenes(NamedTuple):
    attributes: Tensor                                # [n, a] int64
    geometry: Tensor                                  # [n, o, 3] float32: cx of W, cy of H, r in units


def _columns(objects: int) -> tuple[str, ...]:
    if objects not in ATTRIBUTES:
        raise InputError(f"objects: found {objects!r}, accepted are 1 and 2")
    return ATTRIBUTES[objects]


def _check_size(hw: tuple[int, int]) -> None:
    if len(hw) != 2 or any(side < 16 or side % 16 for side in hw):
        raise InputError(f"image size (H, W): found {tuple(hw)}, accepted are positive multiples of 16")


def unit(hw: tuple[int, int], objects: int) -> float:
    """Pixels that radii count in. One object: the short side, from which its offset about the image's centre
    follows too. MMDiT's position table is cropped about its centre, so sizes whose sides in patches agree in
    parity show one scene at the same positions, and a small network need not learn each aspect ratio anew
    (measured: README). Two objects: sqrt(H W)."""
    return float(min(hw)) if objects == 1 else math.sqrt(hw[0] * hw[1])


def swap(attributes: Tensor) -> Tensor:
    """The same scenes told from the other object: "A left of B" is "B right of A". [..., 8] -> [..., 8]"""
    out = attributes[..., [4, 5, 6, 3, 0, 1, 2, 7]]
    out[..., 3] = torch.where(out[..., 3] < 0, -1, out[..., 3] ^ 1)    # relations come in opposite pairs
    return out


def is_heldout(attributes: Tensor) -> Tensor:
    """Whether a scene shows one of 6 held-out (colour, shape, relation) of 64, told either way; with one
    object one of 4 (colour, shape, position) of 48."""
    _, colour, shape, place = attributes[..., :4].unbind(-1)
    held = ((colour + shape) % 4 == place) & ((2 * colour + shape) % 8 % 3 == 1)
    return held | is_heldout(swap(attributes)[..., :4]) if attributes.shape[-1] == 8 else held


@lru_cache
def _rows(objects: int, heldout: bool) -> Tensor:
    rows = torch.cartesian_prod(*map(torch.arange, CHOICES[objects]))
    rows = rows if objects == 1 else rows[rows[:, 1] != rows[:, 5]]
    return rows[is_heldout(rows) == heldout]


def sample_scenes(n: int, hw: tuple[int, int], objects: int, generator: torch.Generator,
                  heldout: bool = False) -> Scenes:
    """n scenes, uniform over the attribute rows that are not held out (`heldout`: only those that are)."""
    _columns(objects), _check_size(hw)
    rand, rows = lambda *size: torch.rand(*size, generator=generator), _rows(objects, heldout)
    attributes = rows[torch.randint(len(rows), (n,), generator=generator)]
    side, px = torch.tensor([hw[1], hw[0]]).float(), unit(hw, objects)
    least, most = torch.tensor(RADII[objects])[attributes[:, [0, 4][:objects]]].unbind(-1)
    r = (least + (most - least) * rand(n, objects)) * px                # [n, o] pixels
    place = attributes[:, 3]
    main = F.one_hot(place // 2, 2).bool()                              # [n, 2] the axis of the word
    sign = torch.where(place % 2 == 0, -1., 1.)[:, None]
    if objects == 1:       # in units of the short side's free way:
                           # .75 to .85 along the word's axis, at most .1 across
        way = torch.where(main, sign * (.75 + .1 * rand(n, 1)), .2 * rand(n, 1) - .1)
        centre = (side / 2 + way * (min(hw) / 2 - r))[:, None]
    else:                  # step from the first centre to the second, then the pair anywhere inside
        both = r.sum(1, keepdim=True)
        along = both + GAP * px + rand(n, 1) * (side - 2 * both - GAP * px)         # [n, 2]
        across = (2 * rand(n, 1) - 1) * torch.minimum(.4 * along.flip(1), side - both)
        step = torch.where(main, -sign * along, across)
        low = torch.maximum(r[:, :1], r[:, 1:] - step)
        high = torch.minimum(side - r[:, :1], side - r[:, 1:] - step)
        first = low + rand(n, 2) * (high - low)
        centre = torch.stack([first, first + step], 1)
    return Scenes(attributes, torch.cat([centre / side, r[..., None] / px], -1))


# --- renderer ---

def _distance(shape: int, x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """Signed distance [n, h, w] in pixels to a shape, its bounding box at 0, y down; exact at its sides."""
    if shape == 0:
        return (x.square() + y.square()).sqrt() - r
    x = x.abs()
    if shape == 3:
        return torch.maximum(x, y.abs()) - SQUARE * r
    if shape == 1:
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
    scale = torch.tensor([w, h, unit(hw, scenes.geometry.shape[1])])
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
    """Codes [n, a]: attributes stated with probability `stated`, else -1; at least one, a relation always."""
    n, a = attributes.shape
    keep = torch.rand(n, a, generator=generator) < stated
    one = torch.randint(a, (n,), generator=generator)
    keep[torch.arange(n), 3 if a == 8 else one] |= True if a == 8 else ~keep.any(1)
    return torch.where(keep, attributes, -1)


def caption(codes: Tensor | list[int], objects: int) -> str:
    """The words of a row of codes, for example "large red circle left of small blue square on black"."""
    words = []
    for column, phrases, code in zip(_columns(objects), PHRASES[objects], map(int, codes), strict=True):
        if code < 0 and column == "relation":
            raise InputError(f"caption of two objects: found no relation, accepted are {RELATIONS}")
        words += [phrases[code]] if code >= 0 else [ANY_SHAPE] * column.startswith("shape")
    return " ".join(words)


def _check_words(words: list[str], known: list[str], text: str) -> None:
    for word in words:
        if word not in known:
            near = (difflib.get_close_matches(word, known, 1, 0) or known)[0]
            raise InputError(f"prompt {text!r}: unknown word {word!r}, nearest known word is {near!r}; "
                             f"accepted are {' '.join(known)}")


def parse(text: str, objects: int) -> list[int]:
    """The codes of a caption, case ignored: parse(caption(c)) == c. InputError for what is no caption."""
    columns, rest, codes = _columns(objects), text.lower().split(), []
    _check_words(rest, _words(PHRASES[objects]), text)
    for column, phrases in zip(columns, PHRASES[objects]):
        code = next((i for i, words in enumerate(map(str.split, phrases)) if rest[:len(words)] == words), -1)
        words = phrases[code].split() if code >= 0 else [ANY_SHAPE] * column.startswith("shape")
        if rest[:len(words)] != words or column == "relation" and code < 0:
            break
        rest, codes = rest[len(words):], codes + [code]
    if rest or len(codes) < len(columns):
        raise InputError(f"prompt {text!r}: found {rest[0] if rest else 'its end'!r} out of place, accepted "
                         f"is {' '.join(columns)} in this order, all but a shape (or the word {ANY_SHAPE!r})"
                         f"{' and the relation' * (objects == 2)} may be left out")
    if objects == 2 and codes[1] == codes[5] >= 0:
        raise InputError(f"prompt {text!r}: found two {COLOURS[codes[1]]} objects, accepted are two colours")
    return codes


def max_words(objects: int) -> int:
    return sum(max(len(phrase.split()) for phrase in phrases) for phrases in PHRASES[objects])


@lru_cache
def _waves(dim: int) -> Tensor:
    """[dim, dim], row k the k-th cosine of the DCT-II: orthogonal, unit mean square, the same everywhere."""
    k, j = torch.arange(dim, dtype=torch.float64)[:, None], torch.arange(dim, dtype=torch.float64) + .5
    return (torch.cos(math.pi / dim * k * j) * torch.where(k > 0, math.sqrt(2), 1.)).float()


def embed(texts: list[str], length: int, dim: int,
          vocab: list[str] = VOCAB) -> tuple[Tensor, Tensor]:
    """(context [n, length, dim] = word + .3 position, pooled [n, dim] = sum of the words / sqrt(count)).

    Vectors are frozen waves, words the first ones and positions the last, so orthogonal where dim allows.
    Word 0 pads to `length`; "" is all padding, its pooled vector zero.
    """
    if dim < len(vocab) + 1:
        raise InputError(f"width of the text embedding: found {dim}, accepted is at least {len(vocab) + 1}")
    ids = torch.zeros(len(texts), length, dtype=torch.long)
    for row, text in zip(ids, texts):
        words = text.lower().split()
        _check_words(words, vocab, text)
        if len(words) > length:
            raise InputError(f"prompt {text!r}: found {len(words)} words, accepted are at most {length}")
        row[:len(words)] = torch.tensor([vocab.index(word) + 1 for word in words], dtype=torch.long)
    waves, said = _waves(dim), (ids > 0)[..., None]     # said [n, l, 1]
    words, positions = waves[ids], waves[-1 - torch.arange(length) % dim]
    return words + .3 * positions, (words * said).sum(1) / said.sum(1).clamp(min=1).sqrt()


# --- latent codec ---

SCALE, SHIFT = 1.5305, .0609                          # SD3's affine: latent = (z - SHIFT) * SCALE
# (colour axis, vertical, horizontal frequency, gain) a channel; axes: luma, red - blue, red + blue - 2 green.
# Gains: proportional to deviation^-.7 over the world,
# so that luma's mean has deviation 1 and the finest detail .3
CHANNELS = ((0, 0, 0, .08), (0, 0, 1, .35), (0, 1, 0, .35), (0, 1, 1, .61), (0, 0, 2, .63), (0, 2, 0, .62),
            (1, 0, 0, .18), (1, 0, 1, .41), (1, 1, 0, .41), (1, 1, 1, .71), (1, 0, 2, .74),
            (2, 0, 0, .21), (2, 0, 1, .5), (2, 1, 0, .5), (2, 1, 1, .88), (2, 2, 0, .88))


@lru_cache
def _filters(device: torch.device) -> tuple[Tensor, Tensor]:
    """Orthonormal filters [16, 3, 8, 8], each a colour axis times a 2-D DCT wave, and gains [16, 1, 1, 1]."""
    axis, row, column, gain = (torch.tensor(field) for field in zip(*CHANNELS))
    colour = F.normalize(torch.tensor([[1., 1., 1.], [1., 0., -1.], [1., -2., 1.]]))
    wave = _waves(8) / math.sqrt(8)
    filters = torch.einsum("kc,ky,kx->kcyx", colour[axis], wave[row], wave[column])
    return filters.to(device), gain.to(device)[:, None, None, None]


def encode(images: Tensor) -> Tensor:
    """Latents [n, 16, H/8, W/8] = (gain * <filter, 8x8 block> - SHIFT) * SCALE of images [n, 3, H, W]."""
    _check_size(images.shape[2:])
    filters, gain = _filters(images.device)
    return (F.conv2d(images.float(), filters * gain, stride=8) - SHIFT) * SCALE


def decode(latents: Tensor) -> Tensor:
    """Images [n, 3, H, W], clamped to [-1, 1]: the sum of the filters, each times its coefficient / gain."""
    filters, gain = _filters(latents.device)
    blocks = F.conv2d(latents.float() / SCALE + SHIFT, (filters / gain).flatten(1).t()[..., None, None])
    return F.pixel_shuffle(blocks, 8).clamp_(-1, 1)     # faster than conv_transpose2d on a CPU


# --- grader ---

# A scene is what has one body of ink per object on one paper;
# its shape and place may still be unreadable by themselves
NEAR, FAR = .5, .6          # colour distances: a pixel of that palette entry; a pixel that no object explains
LEAST_BODY = .5             # overlap with the best shape, below which there is no object
LEAST_IOU = .7              # ... below which its shape is unreadable
MOST_TIE = .8               # misfit of the best shape over that of the second, above which it is unreadable
LEAST_INK = .25             # share of the object near its ink's colour
MOST_STRAY = .2             # unexplained pixels, of the object's area
LEAST_WAY = .25             # offset of a single object along its word's axis, of the short side's free way;
                            # less has no place
LIMITS = {1: (.19, .307, .47), 2: (.06, .125, .25)}                  # r in units: least, small | large, most


def grade(images: Tensor, objects: int) -> Tensor:
    """Codes [n, a] read from images [n, 3, H, W] as the codec carries them; rows of -1 for what is no scene.

    In a scene shape and place are -1 by themselves where they cannot be told.
    Of two objects the one of the lower colour index comes first: see `align`.
    """
    _columns(objects), _check_size(images.shape[2:])
    chunk = max(1, 2**17 // (images.shape[2] * images.shape[3]))
    return torch.cat([_grade(decode(encode(part)), objects) for part in images.split(chunk)])


def _grade(images: Tensor, objects: int) -> Tensor:
    n, _, h, w = images.shape
    rows, pixels = torch.arange(n, device=images.device), images.flatten(2)     # pixels [n, 3, p]
    papers, inks = PAPER.to(images.device), INK.to(images.device)
    palette = torch.cat([papers, inks])
    distance = palette.square().sum(1)[:, None] + pixels.square().sum(1)[:, None] - 2 * (palette @ pixels)
    count = (distance < NEAR**2).sum(-1)                                        # [n, 7]
    background = count[:, :3].argmax(1)
    colours = count[:, 3:].topk(objects).indices.sort(1).values                 # [n, o]
    paper = papers[background]
    step = inks[colours] - paper[:, None]                                       # [n, o, 3]

    # every pixel belongs to the object that explains it best as paper + cover * step
    length = step.square().sum(-1, keepdim=True)
    cover = (step @ (pixels - paper[..., None])) / length                       # [n, o, p]
    clear = cover.clamp(0, 1)
    misfit = distance[rows, background][:, None] + (clear.square() - 2 * clear * cover) * length
    least = misfit.amin(1, keepdim=True)
    mask = _steep(cover).mul_(misfit == least).unflatten(-1, (h, w))            # [n, o, h, w]
    area = mask.sum((2, 3)).clamp_(min=1e-3)
    fits = [_fit(mask[:, o], area[:, o], paper, step[:, o]) for o in range(objects)]
    shape, iou, tie, centre, r = (torch.stack(field, 1) for field in zip(*fits))    # [n, o], centre [n, o, 2]

    half = torch.tensor([w, h], device=images.device) / 2
    free = (centre[:, 0] - half) / (half.min() - r[:, :1]).clamp(min=1)         # [n, 2] as in sample_scenes
    way = free if objects == 1 else centre[:, 0] - centre[:, 1]
    main = way.abs().argmax(1)
    r, (lower, middle, upper) = r / unit((h, w), objects), LIMITS[objects]
    ok = ((iou > LEAST_BODY) & (lower < r) & (r < upper)
          & (count[rows[:, None], 3 + colours] > LEAST_INK * area)).all(1)
    ok &= (least[:, 0] > FAR**2).sum(1) < MOST_STRAY * area.sum(1)
    named = (iou > LEAST_IOU) & (tie < MOST_TIE) & (shape < len(PHRASES[objects][2]))
    shape = torch.where(named, shape, -1)
    seen = torch.stack([(r > middle).long(), colours, shape], -1)               # [n, o, 3]
    place = torch.where(way[rows, main].abs() > LEAST_WAY, 2 * main + (way[rows, main] > 0), -1)
    codes = torch.cat([seen[:, 0], place[:, None], seen[:, 1:].flatten(1), background[:, None]], 1)
    return torch.where(ok[:, None], codes, -1)


def _steep(cover: Tensor) -> Tensor:
    return (2 * cover - .5).clamp_(0, 1)                # same area, steeper edge: deaf to noise


def _fit(mask: Tensor, area: Tensor, paper: Tensor, step: Tensor) -> tuple[Tensor, ...]:
    """(shape, IoU, misfit over the second's, centre [n, 2], r) of the shape that fits masks [n, h, w] best.

    Each is painted with the mask's area and centroid and seen through the codec, whose blur the mask has too.
    """
    h, w = mask.shape[1:]
    x, y = (t.flatten() for t in _grid(h, w, torch.zeros(1, 2, device=mask.device)))
    centroid = torch.stack([mask.sum(1) @ x, mask.sum(2) @ y], -1) / area[:, None]
    r = (area[:, None] / AREA.to(mask.device)).sqrt()                           # [n, 4]
    sink = SINK.to(mask.device) * r
    centre = centroid[:, None] - torch.stack([torch.zeros_like(sink), sink], -1)    # [n, 4, 2]
    paper, step, iou = paper[..., None, None], step[..., None, None], []
    for shape in range(4):
        cover = (.5 - _distance(shape, *_grid(h, w, centre[:, shape]), r[:, shape, None, None])).clamp_(0, 1)
        painted = decode(encode(paper + cover[:, None] * step)) - paper         # [n, 3, h, w]
        template = _steep((painted * step).sum(1) / step.square().sum(1))
        total, differ = area + template.sum((1, 2)), (template - mask).abs_().sum((1, 2))
        iou.append((total - differ) / (total + differ))                         # sum of min / sum of max
    (best, second), order = (t.t() for t in torch.stack(iou, 1).topk(2))
    pick = torch.arange(len(mask), device=mask.device), order[0]
    return order[0], best, (1 - best) / (1 - second).clamp(min=1e-6), centre[pick], r[pick]


def align(graded: Tensor, codes: Tensor) -> Tensor:
    """Graded rows [n, a] told from the object that fits `codes` better: pixels do not say which is first."""
    if graded.shape[-1] != 8:
        return graded
    misses = lambda rows: ((rows != codes) & (codes >= 0)).sum(-1, keepdim=True)
    return torch.where(misses(swap(graded)) < misses(graded), swap(graded), graded)
