"""Editing in the toy dataset: instructions, and pairs of images that follow them.

An edit is a scene before and after one change; what the instruction does not name is equal in
both, down to the jitter of place and size. Only the first object ever changes; the second of two
objects is the one that its place is relative to. An absent object has codes of -1 and is not
rendered: with one object, "add" starts from an empty background and "remove" ends at one. All
constants are our choice. Letters: n images, a attributes, o objects, h w in pixels.
"""
import re
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ladd.cli import InputError
from ladd.toy import captions
from ladd.toy.scenes import (ANY_SHAPE, ATTRIBUTES, CHOICES, GAP, PHRASES, RADII, VOCAB, Scenes,
                             is_heldout, sample_scenes)

# --- instructions ---

# REF is "it" or "the THING"; THING is [size] [colour] and a shape or the word "shape"; PLACE is a
# position, which "add" may leave out, or with two objects a relation and "the THING" it refers to
FORMS = {"recolour": "make REF COLOUR", "move": "move REF PLACE", "resize": "make REF SIZE",
         "reshape": "turn REF into a SHAPE", "background": "make the background SHADE",
         "add": "add a THING PLACE", "remove": "remove REF"}
KINDS = tuple(FORMS)
COLUMN = torch.tensor([1, 3, 0, 2, -1, 0, 0])    # attribute that a kind changes; add, remove: none
MOVE, BACKGROUND, ADD, REMOVE = 1, 4, 5, 6       # indices into KINDS
MOST_WORDS = {1: 8, 2: 11}          # of an instruction, by objects; captions are shorter
STATED = 0.6    # probability that an instruction asks for an attribute of an added object
WORDS = [*VOCAB, *dict.fromkeys(word for word in " ".join(("it", *FORMS.values())).split()
                                if word.islower() and word not in VOCAB)]


class Instruction(NamedTuple):
    """An edit in codes: -1 where the instruction says nothing."""
    kind: str
    named: list[int]     # [a] what it says of objects that exist
    asked: list[int]     # [a] what it asks for


def _phrases(objects: int) -> list[list[str]]:
    """Return the phrases of each attribute; those of the background are without "on"."""
    return [[phrase.removeprefix("on ") for phrase in column] for column in PHRASES[objects]]


def instruct(kind: str, named: list[int], asked: list[int], objects: int) -> str:
    """Return the words of an Instruction, e.g. "turn the red circle into a cross"."""
    phrases = _phrases(objects)

    def say(codes: list[int], i: int) -> str:
        if codes[i] >= 0:
            return phrases[i][codes[i]]
        return ANY_SHAPE if i % 4 == 2 else ""      # columns 2 and 6 are shapes

    def thing(codes: list[int], i: int) -> str:
        return " ".join(say(codes, column) for column in range(i, i + 3))

    parts = {"SIZE": say(asked, 0), "COLOUR": say(asked, 1), "SHAPE": say(asked, 2),
             "SHADE": say(asked, -1), "THING": thing(asked, 0), "REF": f"the {thing(named, 0)}",
             "PLACE": say(asked, 3)}
    if objects == 1 and max(named[:3]) < 0:
        parts["REF"] = "it"
    if objects == 2:
        parts["PLACE"] += f" the {thing(named, 4)}"
    return " ".join(re.sub("[A-Z]+", lambda part: parts[part[0]], FORMS[kind]).split())


@lru_cache
def _patterns(objects: int) -> dict[str, re.Pattern]:
    """Return a regular expression for each kind, whose group "asked3" is the phrase that is asked
    for attribute 3, "named3" that which is named."""
    phrases = _phrases(objects)

    def say(field: str, i: int) -> str:
        words = phrases[i] + [ANY_SHAPE] if i % 4 == 2 else phrases[i]
        return f" (?P<{field}{i}>{'|'.join(words)})"

    def thing(field: str, i: int) -> str:
        return f"(?:{say(field, i)})?(?:{say(field, i + 1)})?{say(field, i + 2)}"

    parts = {"SIZE": say("asked", 0), "COLOUR": say("asked", 1), "SHAPE": say("asked", 2),
             "SHADE": say("asked", len(phrases) - 1), "THING": thing("asked", 0)}
    if objects == 1:
        parts["REF"] = f"(?: it| the{thing('named', 0)})"
        parts["PLACE"] = f"(?:{say('asked', 3)})?"
    else:
        parts["REF"] = f"(?: the{thing('named', 0)})"
        parts["PLACE"] = f"{say('asked', 3)} the{thing('named', 4)}"
    return {kind: re.compile(re.sub(" ([A-Z]+)", lambda part: parts[part[1]], form))
            for kind, form in FORMS.items()}


def parse_instruction(text: str, objects: int) -> Instruction:
    """Return the Instruction of a text, in any case, or raise InputError; inverse of `instruct`.
    With two objects it must say which one."""
    phrases, words = _phrases(objects), text.lower().split()
    captions.check_words(words, WORDS, text)
    for kind, pattern in _patterns(objects).items():
        match = pattern.fullmatch(" ".join(words))
        if match is None:
            continue
        codes = {"named": [-1] * len(phrases), "asked": [-1] * len(phrases)}
        for group, phrase in match.groupdict().items():
            if phrase not in (None, ANY_SHAPE):
                field, i = group[:-1], int(group[-1])
                codes[field][i] = phrases[i].index(phrase)
        clear = objects == 1 or kind in ("background", "add") or max(codes["named"][:3]) >= 0
        if clear and (kind in ("add", "remove") or max(codes["asked"]) >= 0):
            return Instruction(kind, **codes)
    place, it = f"a {ATTRIBUTES[objects][3]}", "it or "
    if objects == 2:
        place, it = f"{place} the THING", ""
    raise InputError(f"instruction must be one of {', '.join(FORMS.values())}; THING is [size] "
                     f"[colour] shape, REF {it}the THING, PLACE {place} (got {text!r})")


def embed(texts: list[str], length: int, dim: int) -> tuple[Tensor, Tensor]:
    """Embed instructions like captions; words that captions lack have further vectors."""
    return captions.embed(texts, length, dim, WORDS)


# --- pairs ---

class Edits(NamedTuple):
    """n edits of one image size; the images are render(source, hw) and render(target, hw)."""
    hw: tuple[int, int]
    kind: Tensor         # [n] int64, indices into KINDS
    source: Scenes       # the attributes of an absent object are -1, its geometry means nothing
    target: Scenes
    named: Tensor        # [n, a] int64, see Instruction
    asked: Tensor        # [n, a] int64
    texts: list[str]


def edits(n: int, hw: tuple[int, int], objects: int, generator: torch.Generator) -> Edits:
    """Return n edits; the kinds alternate, starting with a random one.

    The asked value is uniform. The source is drawn like other scenes until the value is new to it,
    no combination is held out, and the changed object lies inside the image and clear of the other
    one (1 in 10 to 20 where it moves around another). Each attribute of what exists is named with
    probability 1/2; two objects are always named so that they can be told apart.
    """
    a, first = len(ATTRIBUTES[objects]), torch.randint(len(KINDS), (1,), generator=generator)
    kind = (first + torch.arange(n)) % len(KINDS)
    before, after = torch.empty(2, n, a, dtype=torch.int64).unbind()
    old, new = torch.empty(2, n, objects, 3).unbind()
    value, todo = torch.rand(n, generator=generator), torch.arange(n)
    while len(todo):
        # a move needs room around the other object
        scenes = sample_scenes(len(todo), hw, objects, generator, anywhere=True)
        changed, fits = _changed(scenes, kind[todo], value[todo], hw)
        at = todo[fits]
        before[at], old[at] = (t[fits] for t in scenes)
        after[at], new[at] = (t[fits] for t in changed)
        todo = todo[~fits]
    # An absent object has no codes: those of the first object and of its place become -1.
    before[kind == ADD, :4] = after[kind == REMOVE, :4] = -1

    added, background = (kind == ADD)[:, None], kind == BACKGROUND
    # The relation of an added object is always asked for: it has no place without one.
    fixed = (torch.arange(a) == 3)[None] & (objects == 2)
    stated = torch.rand(n, a, generator=generator) < STATED
    asked = torch.where((after != before) & (fixed | ~added | stated), after, -1)
    keep = torch.rand(n, a, generator=generator) < 0.5
    keep[:, [3, -1]] = False                        # place and background name no object
    keep[background] = False
    if objects == 2:
        # Where nothing that is named differs between the objects, the colour is named, too: it
        # always differs. The second object is named only where a place refers to it.
        same = (before[:, :3] == before[:, 4:7]) | ~keep[:, :3]
        keep[:, 1] |= same.all(1) & ~background
        keep[:, 4:] &= added | (kind == MOVE)[:, None]
    named = torch.where(keep, before, -1)
    texts = [instruct(KINDS[k], *codes, objects)
             for k, *codes in zip(kind.tolist(), named.tolist(), asked.tolist())]
    return Edits(hw, kind, Scenes(before, old), Scenes(after, new), named, asked, texts)


def _changed(scenes: Scenes, kind: Tensor, value: Tensor,
             hw: tuple[int, int]) -> tuple[Scenes, Tensor]:
    """Return (scenes after the change, whether each is a valid change) of edits of `kind` [n]. The
    attribute of the kind becomes `value` [n] of [0, 1); for add and remove the scenes stay."""
    attributes, geometry = scenes
    rows, objects = torch.arange(len(kind)), geometry.shape[1]
    column = COLUMN[kind] % attributes.shape[1]
    value = (value * torch.tensor(CHOICES[objects])[column]).long()
    changed = attributes.clone()
    changed[rows, column] = torch.where(kind < ADD, value, attributes[rows, column])

    # The radius keeps its quantile within its size. The centre keeps its offset from an origin,
    # turned to the new side of it. The origin is the second object, with offsets in pixels;
    # without one it is the image's centre, with offsets in units of the free way, as in
    # sample_scenes.
    side, px = torch.tensor([hw[1], hw[0]]).float(), min(hw)
    radii, geometry = torch.tensor(RADII[objects]), geometry.clone()
    least, most = radii[attributes[:, 0]].split(1, 1)
    low, high = radii[changed[:, 0]].split(1, 1)
    centre, r = geometry[:, 0].split((2, 1), 1)
    resized, moved = (changed != attributes)[:, [0, 3]].split(1, 1)
    r_new = torch.where(resized, low + (r - least) / (most - least) * (high - low), r)
    if objects == 1:
        origin = torch.full_like(centre, 0.5)
        reach, reach_new = (side.min() / 2 - px * t for t in (r, r_new))
    else:
        origin = geometry[:, 1, :2]
        reach, reach_new = 1, 1
    offset, old, place = (centre - origin) * side / reach, attributes[:, 3], changed[:, 3]
    along, turned = offset[rows, old // 2].abs(), torch.empty_like(offset)
    turned[rows, place // 2] = torch.where(place % 2 == 0, -along, along)
    turned[rows, 1 - place // 2] = offset[rows, 1 - old // 2]
    centre_new = torch.where(moved | resized & (objects == 1), origin + turned * reach_new / side,
                             centre)
    geometry[:, 0] = torch.cat([centre_new, r_new], 1)

    inside = (centre_new.minimum(1 - centre_new) * side).amin(1) > r_new[:, 0] * px - 1e-3
    different = (changed != attributes).any(1) | (kind >= ADD)
    fits = inside & different & ~is_heldout(changed)
    if objects == 2:
        fits &= changed[:, 1] != changed[:, 5]
        fits &= along > (geometry[..., 2].sum(1) + GAP) * px - 1e-3
    return Scenes(changed, geometry), fits
