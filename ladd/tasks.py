"""Editing and inpainting in the built-in world: pairs with instructions, masks, and how results are graded.

An edit is a scene before and after one change; what the instruction does not name is equal in both, down to
the jitter of place and size. Only the first object is ever changed; the second of two is what its place is
told from. An absent object has codes of -1, which the renderer passes over: with one object in the world,
"add" starts from an empty paper and "remove" ends at one. Masks are True where the picture is repainted.
All constants are our choice. Letters as in shapes.py: n images, a attributes, o objects, h/w here pixels.
"""
import math
import re
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ladd import shapes
from ladd.config import InputError
from ladd.shapes import ANY_SHAPE, ATTRIBUTES, CHOICES, INK, PAPER, PHRASES, Scenes

# --- instructions ---

# REF is "it" or "the THING"; THING is [size] [colour] and a shape or the word "shape"; PLACE is a position,
# which add may leave out; of two objects a relation and "the THING" that it is told from
FORMS = {"recolour": "make REF COLOUR", "move": "move REF PLACE", "resize": "make REF SIZE",
         "reshape": "turn REF into a SHAPE", "background": "make the background PAPER",
         "add": "add a THING PLACE", "remove": "remove REF"}
KINDS = tuple(FORMS)
COLUMN = torch.tensor([1, 3, 0, 2, -1, 0, 0])         # the attribute that a kind changes; add, remove: none
BACKGROUND, ADD, REMOVE = 4, 5, 6                     # of KINDS
MOST_WORDS = {1: 8, 2: 11}                            # of an instruction, by objects; captions are shorter
WORDS = [*shapes.VOCAB, *dict.fromkeys(word for word in " ".join(("it", *FORMS.values())).split()
                                       if word.islower() and word not in shapes.VOCAB)]


class Instruction(NamedTuple):
    kind: str
    named: list[int]                                  # [a] what it says of objects that are there, else -1
    asked: list[int]                                  # [a] what it asks for, else -1


def _phrases(objects: int) -> list[list[str]]:
    shapes._columns(objects)
    return [[phrase.removeprefix("on ") for phrase in column] for column in PHRASES[objects]]


def instruct(kind: str, named: list[int], asked: list[int], objects: int) -> str:
    """The words of an Instruction, for example "turn the red circle into a cross"."""
    phrases = _phrases(objects)
    say = lambda codes, i: phrases[i][codes[i]] if codes[i] >= 0 else ANY_SHAPE * (i % 4 == 2)
    thing = lambda codes, i: " ".join(say(codes, column) for column in range(i, i + 3))
    it = objects == 1 and max(named[:3]) < 0
    parts = {"SIZE": say(asked, 0), "COLOUR": say(asked, 1), "SHAPE": say(asked, 2), "PAPER": say(asked, -1),
             "THING": thing(asked, 0), "REF": "it" if it else f"the {thing(named, 0)}",
             "PLACE": say(asked, 3) + (f" the {thing(named, 4)}" if objects == 2 else "")}
    return " ".join(re.sub("[A-Z]+", lambda part: parts[part[0]], FORMS[kind]).split())


@lru_cache
def _patterns(objects: int) -> dict[str, re.Pattern]:
    """A regular expression a kind; its group "asked3" is the phrase of what is asked of attribute 3."""
    phrases = _phrases(objects)
    say = lambda field, i: f" (?P<{field}{i}>{'|'.join(phrases[i] + [ANY_SHAPE] * (i % 4 == 2))})"
    thing = lambda field, i: f"(?:{say(field, i)})?(?:{say(field, i + 1)})?{say(field, i + 2)}"
    parts = {"SIZE": say("asked", 0), "COLOUR": say("asked", 1), "SHAPE": say("asked", 2),
             "PAPER": say("asked", len(phrases) - 1), "THING": thing("asked", 0),
             "REF": f"(?:{' it|' * (objects == 1)} the{thing('named', 0)})",
             "PLACE": f"(?:{say('asked', 3)})?"}
    if objects == 2:
        parts["PLACE"] = f"{say('asked', 3)} the{thing('named', 4)}"
    return {kind: re.compile(re.sub(" ([A-Z]+)", lambda part: parts[part[1]], form))
            for kind, form in FORMS.items()}


def parse_instruction(text: str, objects: int) -> Instruction:
    """What a text asks for, case ignored: parse_instruction(instruct(*i, objects), objects) == i. InputError
    for what is no instruction; of two objects it must say which."""
    phrases, words = _phrases(objects), text.lower().split()
    shapes._check_words(words, WORDS, text)
    for kind, pattern in _patterns(objects).items():
        if found := pattern.fullmatch(" ".join(words)):
            codes = {"named": [-1] * len(phrases), "asked": [-1] * len(phrases)}
            for group, phrase in found.groupdict().items():
                if phrase not in (None, ANY_SHAPE):
                    codes[group[:-1]][int(group[-1])] = phrases[int(group[-1])].index(phrase)
            clear = objects == 1 or kind in ("background", "add") or max(codes["named"][:3]) >= 0
            if clear and (kind in ("add", "remove") or max(codes["asked"]) >= 0):
                return Instruction(kind, **codes)
    raise InputError(f"instruction {text!r}: found none, accepted are {', '.join(FORMS.values())}; THING is "
                     f"[size] [colour] shape, REF {'it or ' * (objects == 1)}the THING, PLACE a "
                     f"{ATTRIBUTES[objects][3]}{' the THING' * (objects == 2)}")


def instruction_codes(texts: list[str], objects: int) -> Tensor:
    """[n, 1 + a]: kind and what is asked. Two instructions that differ in what both say exclude each other:
    an edit changes one thing alone."""
    found = [parse_instruction(text, objects) for text in texts]
    return torch.tensor([[KINDS.index(i.kind), *i.asked] for i in found])


def embed(texts: list[str], length: int, dim: int) -> tuple[Tensor, Tensor]:
    """shapes.embed for instructions too: its vectors of a caption, more waves for the words that are new."""
    return shapes.embed(texts, length, dim, WORDS)


# --- pairs ---

class Edits(NamedTuple):
    """n edits of one image size; images are shapes.render(source, hw) and shapes.render(target, hw)."""
    hw: tuple[int, int]
    kind: Tensor                                      # [n] int64, of KINDS
    source: Scenes                                    # an absent object's attributes are -1,
    target: Scenes                                    # its geometry means nothing
    named: Tensor                                     # [n, a] int64, see Instruction
    asked: Tensor                                     # [n, a] int64
    texts: list[str]


def edits(n: int, hw: tuple[int, int], objects: int, generator: torch.Generator,
          kinds: tuple[str, ...] = KINDS, stated: float = .6) -> Edits:
    """n pairs, of all kinds in turn, from a random one on.

    The asked value is uniform; the source is drawn like the world's scenes until the value is new to it, no
    combination is held out, and the changed object lies inside the picture, clear of the other (1 in 10 where
    it moves about another). An added object's attributes are asked with probability `stated`, else open. Of
    what is there each attribute is named with probability 1/2, and always enough to tell two objects apart.
    """
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise InputError(f"kind of edit: found {unknown[0]!r}, accepted are {', '.join(KINDS)}")
    a, first = len(shapes._columns(objects)), torch.randint(len(kinds), (1,), generator=generator)
    kind = torch.tensor([KINDS.index(name) for name in kinds])[(first + torch.arange(n)) % len(kinds)]
    before, after = torch.empty(2, n, a, dtype=torch.int64).unbind()
    old, new = torch.empty(2, n, objects, 3).unbind()
    value, todo = torch.rand(n, generator=generator), torch.arange(n)
    while len(todo):
        scenes = shapes.sample_scenes(len(todo), hw, objects, generator)
        changed, fits = _changed(scenes, kind[todo], value[todo], hw)
        at = todo[fits]
        (before[at], old[at]), (after[at], new[at]) = ((t[fits] for t in pair) for pair in (scenes, changed))
        todo = todo[~fits]
    before[kind == ADD, :4] = after[kind == REMOVE, :4] = -1          # the first object and its place

    rand = lambda: torch.rand(n, a, generator=generator)
    added, fixed = (kind == ADD)[:, None], (torch.arange(a) == 3)[None] & (objects == 2)
    asked = torch.where((after != before) & (fixed | ~added | (rand() < stated)), after, -1)
    keep = rand() < .5
    keep[:, [3, -1]], keep[kind == BACKGROUND] = False, False
    if objects == 2:
        keep[:, 1] |= ((before[:, :3] == before[:, 4:7]) | ~keep[:, :3]).all(1) & (kind != BACKGROUND)
        keep[:, 4:] &= (added[:, 0] | (kind == KINDS.index("move")))[:, None]
    named = torch.where(keep, before, -1)
    texts = [instruct(KINDS[k], *codes, objects)
             for k, *codes in zip(kind.tolist(), named.tolist(), asked.tolist())]
    return Edits(hw, kind, Scenes(before, old), Scenes(after, new), named, asked, texts)


def _changed(scenes: Scenes, kind: Tensor, value: Tensor, hw: tuple[int, int]) -> tuple[Scenes, Tensor]:
    """(scenes with the attribute of their kind changed to `value` [n] of [0, 1), add and remove as they are;
    whether that is a change and a scene of the world)."""
    (attributes, geometry), rows, objects = scenes, torch.arange(len(kind)), scenes.geometry.shape[1]
    column = COLUMN[kind] % attributes.shape[1]
    value = (value * torch.tensor(CHOICES[objects])[column]).long()
    changed = attributes.clone()
    changed[rows, column] = torch.where(kind < ADD, value, attributes[rows, column])

    # the radius keeps its quantile, the centre its offset, turned to the new side of its origin: the second
    # object, in pixels; without one the picture's centre, in units of the free way as in sample_scenes
    side, px = torch.tensor([hw[1], hw[0]]).float(), shapes.unit(hw, objects)
    radii, geometry = torch.tensor(shapes.RADII[objects]), geometry.clone()
    (least, most), (low, high) = (radii[codes[:, 0]].split(1, 1) for codes in (attributes, changed))
    centre, r = geometry[:, 0].split((2, 1), 1)
    resized, moved = (changed != attributes)[:, [0, 3]].split(1, 1)
    r_new = torch.where(resized, low + (r - least) / (most - least) * (high - low), r)
    origin = torch.full_like(centre, .5) if objects == 1 else geometry[:, 1, :2]
    reach, reach_new = (side.min() / 2 - px * t if objects == 1 else 1 for t in (r, r_new))
    offset, old, place = (centre - origin) * side / reach, attributes[:, 3], changed[:, 3]
    along, turned = offset[rows, old // 2].abs(), torch.empty_like(offset)
    turned[rows, place // 2] = torch.where(place % 2 == 0, -along, along)
    turned[rows, 1 - place // 2] = offset[rows, 1 - old // 2]
    centre_new = torch.where(moved | resized & (objects == 1), origin + turned * reach_new / side, centre)
    geometry[:, 0] = torch.cat([centre_new, r_new], 1)

    fits = ((centre_new.minimum(1 - centre_new) * side).amin(1) > r_new[:, 0] * px - 1e-3)
    fits &= ~shapes.is_heldout(changed) & ((changed != attributes).any(1) | (kind >= ADD))
    if objects == 2:
        fits &= changed[:, 1] != changed[:, 5]
        fits &= along > (geometry[..., 2].sum(1) + shapes.GAP) * px - 1e-3
    return Scenes(changed, geometry), fits


# --- grading edits ---

# mean error of paper: an eighth of what lies between two papers; twice what noise makes that the grader is
# tested to bear (deviation .06: mean .048); the codec's blur makes .036 at most
WORST = .1


def grade_edit(results: Tensor, pairs: Edits) -> dict[str, Tensor]:
    """How results [n, 3, H, W] follow their instructions; [n] each, bool but the error.

    asked: a scene whose asked attributes are as asked; of remove, paper where the object was.
    kept: all attributes that the instruction does not change, with the removed object put back to read them.
    background: mean |result - paper| of the codec's blocks in which neither source nor result has ink; 0 if
    there is none. success: asked and kept and background <= WORST.
    """
    if len(results) != len(pairs.kind) or tuple(results.shape[2:]) != pairs.hw:
        raise InputError(f"results: found {list(results.shape)}, {[len(pairs.kind), 3, *pairs.hw]} accepted")
    before, after, removed = pairs.source.attributes, pairs.target.attributes, pairs.kind == REMOVE
    source, target = (shapes.render(scenes, pairs.hw) for scenes in (pairs.source, pairs.target))
    hole = _blocks((source != target).any(1)) & removed[:, None, None]
    whole = torch.where(removed[:, None], before, after)
    seen = torch.where(hole[:, None], source, results)
    graded = shapes.align(shapes.grade(seen, pairs.source.geometry.shape[1]), whole)
    right, given = graded == whole, (before == after) | removed[:, None]
    asked = (right | (pairs.asked < 0)).all(1) & (graded[:, -1] >= 0)
    asked &= ~removed | (_mean_error(results, target, hole) <= WORST)
    kept = (right | ~given).all(1)
    background = _mean_error(results, PAPER[after[:, -1], :, None, None],
                             ~_blocks(_ink(source) | _ink(results)))
    return {"asked": asked, "kept": kept, "background": background,
            "success": asked & kept & (background <= WORST)}


def _ink(images: Tensor) -> Tensor:
    """[n, H, W], whether a pixel of images [n, 3, H, W] is nearer to an ink than to any paper."""
    nearest = lambda part, palette: (palette.square().sum(1)[:, None] - 2 * palette @ part.flatten(2)).amin(1)
    ink = [nearest(part, INK) < nearest(part, PAPER) for part in images.split(64)]      # 64: memory
    return torch.cat(ink).unflatten(1, images.shape[2:])


def _blocks(mask: Tensor) -> Tensor:
    """mask [n, H, W] grown to whole blocks of 8 x 8 pixels: what the codec spreads a pixel over."""
    return latent_mask(mask)[:, 0].bool().repeat_interleave(8, 1).repeat_interleave(8, 2)


def _mean_error(a: Tensor, b: Tensor, where: Tensor) -> Tensor:
    """[n], mean |a - b| over channels and the pixels `where` [n, H, W]; 0 where there are none."""
    return ((a - b).abs().mean(1) * where).sum((1, 2)) / where.sum((1, 2)).clamp(min=1)


# --- masks ---

def _pixels(hw: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Centres of pixels: y [h, 1], x [1, w]."""
    return torch.arange(hw[0])[:, None] + .5, torch.arange(hw[1])[None] + .5


def _box(low: Tensor, high: Tensor, hw: tuple[int, int]) -> Tensor:
    """[n, h, w], the pixels between the corners low and high [n, 2] (y, x) in shares of the sides."""
    (y, x), low, high = _pixels(hw), *((t * torch.tensor(hw))[..., None, None] for t in (low, high))
    return (y > low[:, 0]) & (y < high[:, 0]) & (x > low[:, 1]) & (x < high[:, 1])


def _rectangles(n: int, hw: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Each side U(1/4, 3/4) of the picture's, anywhere inside it."""
    part, at = torch.rand(2, n, 2, generator=generator)
    part = .25 + .5 * part
    return _box(at * (1 - part), at * (1 - part) + part, hw)


def _polygons(n: int, hw: tuple[int, int], generator: torch.Generator) -> Tensor:
    """3 to 8 corners about a point of the middle half, at U(.2, .5) of the short side, unevenly spaced."""
    centre = (.25 + .5 * torch.rand(n, 2, generator=generator)) * torch.tensor(hw)
    count = torch.randint(3, 9, (n, 1), generator=generator)
    corner = torch.minimum(torch.arange(8), count - 1)                  # [n, 8], the last one repeats
    turn, jitter, r = torch.rand(3, n, 8, generator=generator)
    turn = math.tau * (turn[:, :1] + (corner + .5 * jitter.gather(1, corner)) / count)
    r = (.2 + .3 * r.gather(1, corner)) * min(hw)
    return _filled(torch.stack([turn.sin() * r, turn.cos() * r], -1) + centre[:, None], hw)


def _filled(corners: Tensor, hw: tuple[int, int]) -> Tensor:
    """[n, h, w], the pixels inside polygons of corners [n, k, 2] (y, x), by the even-odd rule."""
    (y, x), inside = _pixels(hw), torch.zeros(len(corners), *hw, dtype=torch.bool)
    for a, b in zip(corners.unbind(1), corners.roll(-1, 1).unbind(1)):
        (ya, xa), (yb, xb) = (t[..., None, None].unbind(1) for t in (a, b))
        inside ^= ((ya > y) != (yb > y)) & (x < xa + (y - ya) / (yb - ya) * (xb - xa))
    return inside


def _strokes(n: int, hw: tuple[int, int], generator: torch.Generator) -> Tensor:
    """1 to 3 strokes of a round brush of radius U(.05, .1) of the short side, each of three straight pieces
    of U(.2, .5) of it, from a point of the picture."""
    start = torch.rand(n, 3, 1, 2, generator=generator)
    turn, length = torch.rand(2, n, 3, 3, generator=generator)
    radius = (.05 + .05 * torch.rand(n, 1, 1, generator=generator)) * min(hw)
    turn, length = math.tau * turn, (.2 + .3 * length) * min(hw)
    steps = torch.stack([turn.sin() * length, turn.cos() * length], -1)
    points = torch.cat([start * torch.tensor(hw), steps], 2).cumsum(2)                  # [n, 3, 4, 2] (y, x)
    count = torch.randint(1, 4, (n, 1), generator=generator)
    points = points[torch.arange(n)[:, None], torch.arange(3) % count]                  # strokes repeat
    return _brushed(points[:, :, :-1].flatten(1, 2), points[:, :, 1:].flatten(1, 2), radius, hw)


def _brushed(a: Tensor, b: Tensor, radius: Tensor, hw: tuple[int, int]) -> Tensor:
    """[n, h, w], the pixels nearer than radius [n, 1, 1] to a piece from a to b [n, k, 2] (y, x)."""
    (y, x), painted = _pixels(hw), torch.zeros(len(a), *hw, dtype=torch.bool)
    for a, b in zip(a.unbind(1), b.unbind(1)):
        (ya, xa), (dy, dx) = (t[..., None, None].unbind(1) for t in (a, b - a))
        t = (((y - ya) * dy + (x - xa) * dx) / (dy * dy + dx * dx)).clamp_(0, 1)
        painted |= (y - ya - t * dy).square() + (x - xa - t * dx).square() < radius.square()
    return painted


def _borders(n: int, hw: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Outpainting: each of four margins with probability 1/2, one of them always, U(1/8, 3/8) wide."""
    margin, there = torch.rand(2, n, 4, generator=generator)
    one = F.one_hot(torch.randint(4, (n,), generator=generator), 4).bool()
    margin = torch.where(one | (there < .5), .125 + .25 * margin, 0)
    return ~_box(margin[:, :2], 1 - margin[:, 2:], hw)


MASKS = {"rectangle": _rectangles, "polygon": _polygons, "strokes": _strokes, "border": _borders,
         "everything": lambda n, hw, generator: torch.ones(n, *hw, dtype=torch.bool)}


def masks(n: int, hw: tuple[int, int], generator: torch.Generator,
          kinds: tuple[str, ...] = tuple(MASKS)) -> Tensor:
    """bool [n, H, W], True is repainted, never nowhere; all kinds in turn, from a random one on."""
    shapes._check_size(hw)
    if unknown := [kind for kind in kinds if kind not in MASKS]:
        raise InputError(f"kind of mask: found {unknown[0]!r}, accepted are {', '.join(MASKS)}")
    first = int(torch.randint(len(kinds), (1,), generator=generator))
    out = torch.empty(n, *hw, dtype=torch.bool)
    for i, kind in enumerate(kinds):
        rows = out[(i - first) % len(kinds)::len(kinds)]
        rows.copy_(MASKS[kind](len(rows), hw, generator))
    return out


def check_mask(mask: Tensor, hw: tuple[int, int]) -> Tensor:
    """bool [b, H, W] of a mask [b, H, W] from outside: bool, 0 and 1, or 0 and 255.
    InputError for another size than the picture's, other values, and a mask that repaints nothing."""
    if tuple(mask.shape[1:]) != tuple(hw):
        raise InputError(f"mask: found {'x'.join(map(str, mask.shape[1:]))} pixels, the picture's "
                         f"{hw[0]}x{hw[1]} accepted")
    white = 255 if mask.numel() and mask.max() > 1 else 1
    if odd := mask[(mask != 0) & (mask != white)].tolist():
        raise InputError(f"mask: found {len(odd)} pixels neither black nor white, such as {odd[0]:g}; "
                         "0 (kept) and 1 or 255 (repainted) accepted")
    if not (mask != 0).flatten(1).any(1).all():
        raise InputError("mask: found all black, nothing to repaint; white accepted where to repaint")
    return mask != 0


def _check_same(what: str, x: Tensor, mask: Tensor) -> None:
    if len(x) != len(mask) or x.shape[-2:] != mask.shape[-2:]:
        raise InputError(f"mask: found {list(mask.shape)}, the size of the {what}, {list(x.shape)}, accepted")


def latent_mask(mask: Tensor) -> Tensor:
    """float32 [b, 1, H/8, W/8] of a mask [b, H, W]: 1 where any pixel of a cell is repainted, so that what is
    kept knows of none. A VAE that looks beyond its cells must be given `masked` images besides."""
    if any(side % 8 for side in mask.shape[1:]):
        raise InputError(f"mask: found {mask.shape[1]}x{mask.shape[2]} pixels, multiples of 8 accepted")
    return F.max_pool2d(mask[:, None].float(), 8)


def masked(x: Tensor, mask: Tensor) -> Tensor:
    """x [b, c, h, w], images with a mask [b, h, w] or latents with one [b, 1, h, w], as 0 where repainted."""
    _check_same("picture", x, mask)
    return x.masked_fill(mask.reshape(len(x), 1, *x.shape[2:]).bool(), 0)


def hatched(images: Tensor, mask: Tensor) -> Tensor:
    """images [b, 3, H, W] to look at, stripes where the mask [b, H, W] repaints."""
    _check_same("picture", images, mask)
    y, x = _pixels(tuple(images.shape[2:]))
    return torch.where(mask[:, None], .8 * ((x + y) // 4 % 2 - .5), images)


def composite(source: Tensor, result: Tensor, mask: Tensor) -> Tensor:
    """The result [b, 3, H, W] where the mask [b, H, W] repaints, elsewhere the source bit for bit."""
    _check_same("source", source, mask), _check_same("result", result, mask)
    return torch.where(mask[:, None], result, source)


def seam_error(image: Tensor, reference: Tensor, mask: Tensor) -> Tensor:
    """[b], jump(image) - jump(reference): jump(x) is the mean of |x_p - x_q| over channels and the pairs of
    neighbours p, q (beside or above each other) of which the mask [b, H, W] repaints one.

    image: a composite; reference: a picture without a seam, the source. NaN where a mask has no border. Real
    renders that the codec has blurred, in uncoded ones, have about .02 at 48x80 px, .005 at 192x320.
    """
    _check_same("image", image, mask), _check_same("reference", reference, mask)
    return _jump(image, mask) - _jump(reference, mask)


def _jump(x: Tensor, mask: Tensor) -> Tensor:
    pairs = [(x.diff(dim=dim).abs().mean(1), mask.diff(dim=dim)) for dim in (-2, -1)]
    return sum((jump * edge).sum((1, 2)) for jump, edge in pairs) / sum(edge.sum((1, 2)) for _, edge in pairs)


def beside(encode: Callable[[Tensor], Tensor], images: Tensor, mask: Tensor) -> Tensor:
    """[n, 17, h, w], what an inpainting network reads beside the noise: the latent mask, and the latents that
    `encode` makes of images [n, 3, H, W] without what mask [n, H, W] repaints, 0 in the cells of the mask."""
    cells = latent_mask(mask)
    return torch.cat([cells, masked(encode(masked(images, mask)), cells)], 1)


# --- grading inpainted pictures ---

def decided(scenes: Scenes, mask: Tensor) -> Tensor:
    """bool [n, a], which attributes the repainted area decides: size, colour and shape of an object whose
    centre it covers, the place if one of the centres, the background if all is repainted."""
    n, h, w = mask.shape
    x, y = (scenes.geometry[..., :2] * torch.tensor([w, h])).long().unbind(-1)
    inside = mask[torch.arange(n)[:, None], y, x]                       # [n, o]
    each, place, paper = inside.repeat_interleave(3, 1), inside.any(1, True), mask.flatten(1).all(1)[:, None]
    return torch.cat([each[:, :3], place, each[:, 3:], paper], 1)


def grade_inpaint(results: Tensor, scenes: Scenes, codes: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """How results [n, 3, H, W], composited into the scenes' renders, follow the prompts' codes [n, a].

    inside [n, a]: decided by the repainted area and stated: what prompt accuracy inside counts.
    right [n, a]: read as the prompt states, or open there, where decided; as in the source elsewhere.
    success [n]: all right, and a scene. seam [n]: seam_error against the source. graded, want [n, a]: what is
    read, and what it is compared with.
    """
    _check_same("results", results, mask)
    source = shapes.render(scenes, tuple(results.shape[2:]))
    whole, free = composite(source, results, mask), decided(scenes, mask)
    want = torch.where(free, codes, scenes.attributes)
    graded = shapes.align(shapes.grade(whole, scenes.geometry.shape[1]), want)
    right = (graded == want) | (want < 0)
    return {"graded": graded, "want": want, "inside": free & (codes >= 0), "right": right,
            "success": right.all(1) & (graded[:, -1] >= 0), "seam": seam_error(whole, source, mask)}
