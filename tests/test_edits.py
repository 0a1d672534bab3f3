"""Editing and inpainting data: one change a pair, instructions both ways, masks, graders by
value."""
import math
import re

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_close, rng

from ladd.cli import InputError
from ladd.data.masks import (MASKS, _brushed, _filled, check_mask, composite, image_condition,
                             latent_mask, masked, masks)
from ladd.toy import edits, grader, prompts
from ladd.toy.captions import MOST_WORDS, draw_captions, embed
from ladd.toy.edits import KINDS
from ladd.toy.scenes import (CHOICES, BACKGROUND_RGB, RADII, VOCAB, Scenes, cosine_waves, decode,
                             encode, is_heldout, render, sample_scenes)

WORLDS = [(1, (48, 80)), (1, (64, 64)), (2, (192, 320)), (2, (256, 256))]
READ = {1: (48, 80), 2: (128, 128)}                     # small enough to grade many


def codec(images):
    return decode(encode(images))


def rows_of(pairs, kind):
    return pairs.kind == KINDS.index(kind)


def by_kind(values, pairs):
    return {kind: values[rows_of(pairs, kind)].float().mean().item() for kind in KINDS}


# --- instructions ---

@pytest.mark.parametrize("objects", (1, 2))
def test_instructions_go_both_ways(objects):
    pairs = edits.edits(2100, (128, 128), objects, rng())
    for text, kind, named, asked in zip(pairs.texts, pairs.kind, pairs.named.tolist(),
                                        pairs.asked.tolist()):
        assert edits.parse_instruction(text.upper(), objects) == (KINDS[kind], named, asked), text
        assert edits.instruct(KINDS[kind], named, asked, objects) == text
    lengths = [len(text.split()) for text in pairs.texts]
    assert max(lengths) == edits.MOST_WORDS[objects] >= MOST_WORDS[objects]
    used = set(" ".join(pairs.texts).split())
    assert used <= set(edits.WORDS) and set(edits.WORDS) - set(VOCAB) <= used | {"it"}
    before, after = pairs.source.attributes, pairs.target.attributes
    # nothing is said that is not so
    for said, truth in ((pairs.named, before), (pairs.asked, after)):
        assert torch.equal(said[said >= 0], truth[said >= 0])


def test_instructions_read_as_written():
    none, columns = [-1] * 5, ("size", "colour", "shape", "place", "background")
    say = lambda **codes: [codes.get(column, -1) for column in columns]
    for text, *instruction in (("make it red", "recolour", none, say(colour=0)),
                               ("move it left", "move", none, say(place=0)),
                               ("make the circle large", "resize", say(shape=0), say(size=1)),
                               ("turn the small red shape into a cross", "reshape",
                                say(size=0, colour=0), say(shape=2)),
                               ("make the background white", "background", none, say(background=2)),
                               ("add a large cross top", "add", none,
                                say(size=1, shape=2, place=2)), ("add a shape", "add", none, none),
                               ("remove the yellow shape", "remove", say(colour=3), none)):
        assert edits.parse_instruction(text, 1) == tuple(instruction)
        assert edits.instruct(*instruction, 1) == text
    assert edits.parse_instruction("make the shape red",
                                   1) == edits.parse_instruction("make it red", 1)
    assert edits.parse_instruction("move the red square above the large shape", 2) == (
        "move", [-1, 0, 3, -1, 1, -1, -1, -1], [-1, -1, -1, 2, -1, -1, -1, -1])
    assert edits.parse_instruction("add a blue shape right of the shape", 2) == (
        "add", [-1] * 8, [-1, 2, -1, 1, -1, -1, -1, -1])


@pytest.mark.parametrize("text, objects, message", [
    ("make it rad", 1, "'rad'.*'red'"), ("make it", 1, "make REF COLOUR"), ("", 1, "remove REF"),
    ("move the circle", 1, "PLACE a position"),
    ("turn it into a shape", 1, "turn REF into a SHAPE"), ("turn it into a square", 1, "turn REF"),
    ("make it red left", 1, "make it red left"), ("make it red", 2, "REF the THING"),
    ("make the shape red", 2, "REF the THING"),
    ("add a circle", 2, "PLACE a relation the THING"),
    ("move the circle above it", 2, "a relation"),
    ("large red circle", 1, r"must be one of .*\(got 'large red circle'\)")])
def test_what_is_no_instruction_is_refused(text, objects, message):
    with pytest.raises(InputError, match=message) as error:
        edits.parse_instruction(text, objects)
    assert "\n" not in str(error.value) and re.search(" must (be|have) .*got |; use ",
                                                      str(error.value))


def test_embedding_is_that_of_captions_with_more_words():
    captions = ["large red circle left on black", "small square above blue shape", ""]
    for mine, theirs in zip(edits.embed(captions, 11, 64), embed(captions, 11, 64)):
        assert torch.equal(mine, theirs)
    words = torch.cat([edits.embed([word], 1, 64)[1] for word in edits.WORDS])
    assert len(edits.WORDS) == 32
    assert_close("orthonormal", words @ words.t() / 64, torch.eye(32), 1e-5)
    context, pooled = edits.embed(["make it red"], 11, 64)
    three = words[[edits.WORDS.index(word) for word in ("make", "it", "red")]]
    assert_close("pooled", pooled[0], three.sum(0) / math.sqrt(3))
    padding = edits.embed([""], 11, 64)[0][0, :3] - cosine_waves(64)[0]
    assert_close("context", context[0, :3] - three, padding)
    with pytest.raises(InputError, match="at least 33 .got 32"):
        edits.embed(["make it red"], 11, 32)


# --- pairs ---

@pytest.mark.parametrize("objects, hw", WORLDS)
def test_an_edit_changes_what_it_names_and_nothing_else(objects, hw):
    pairs = edits.edits(2100, hw, objects, rng())
    (before, old), (after, new), (h, w) = pairs.source, pairs.target, hw
    assert torch.bincount(pairs.kind).tolist() == [300] * 7 and len(pairs.texts) == 2100
    column = {"recolour": [1], "move": [3], "resize": [0], "reshape": [2], "add": [0, 1, 2, 3],
              "remove": [0, 1, 2, 3], "background": [before.shape[1] - 1]}
    for kind, columns in column.items():
        rows = rows_of(pairs, kind)
        expected = torch.zeros_like(before, dtype=torch.bool)[rows]
        expected[:, columns] = True
        assert torch.equal((before != after)[rows], expected), kind
        same = [o for o in range(objects) if o or kind not in ("move", "resize")]
        assert torch.equal(old[rows][:, same], new[rows][:, same]), kind
        values = after[rows][:, columns[0]]
        if kind not in ("add", "remove"):                               # values are uniform
            share = torch.bincount(values, minlength=CHOICES[objects][columns[0]]) / 300
            assert (share - 1 / len(share)).abs().max() < .09
    assert (before[rows_of(pairs, "add")][:, :4] == -1).all()
    assert (after[rows_of(pairs, "remove")][:, :4] == -1).all()

    radii = torch.tensor(RADII[objects])
    grown, moved = rows_of(pairs, "resize"), rows_of(pairs, "move")
    assert torch.equal(old[moved][..., 2], new[moved][..., 2])
    least, most = radii[torch.stack([before, after])[:, grown][..., 0]].unbind(-1)
    quantile = (torch.stack([old, new])[:, grown][:, :, 0, 2] - least) / (most - least)
    assert_close("exact size", quantile[1], quantile[0], 1e-4)
    side = torch.tensor([w, h]).float()
    if objects == 1:
        way = [(g[:, 0, :2] * side - side / 2) / (side.min() / 2 - g[:, 0, 2:] * min(hw)) for g
               in (old, new)]
        assert_close("place in free ways", way[1][grown], way[0][grown], 1e-4)
    else:
        assert torch.equal(old[grown][..., :2], new[grown][..., :2])
        way = [(g[:, 0, :2] - g[:, 1, :2]) * side for g in (old, new)]
    away = [t[moved].gather(1, a[moved][:, 3:4] // 2)[:, 0] for t, a in zip(way, (before, after))]
    offset = [t[moved].gather(1, 1 - a[moved][:, 3:4] // 2)[:, 0] for t, a
              in zip(way, (before, after))]
    assert_close("distance", away[1].abs(), away[0].abs(), 1e-4)
    assert_close("jitter", offset[1], offset[0], 1e-4)
    # right and bottom are larger
    assert torch.equal(away[1] > 0, after[moved][:, 3] % 2 == 1)


@pytest.mark.parametrize("objects, hw", WORLDS)
def test_sources_and_targets_are_scenes_of_the_dataset(objects, hw):
    pairs = edits.edits(2100, hw, objects, rng(1))
    for attributes, geometry in (pairs.source, pairs.target):
        there = (attributes >= 0).all(1)
        assert there.float().mean() > .8 and not is_heldout(attributes[there]).any()
        side = torch.tensor([hw[1], hw[0]]).float()
        centre, r = (geometry * torch.tensor([*side, min(hw)])).split((2, 1), -1)
        assert (centre - r > -2e-3).all() and (centre + r < side + 2e-3).all()
        large = geometry[there][:, 0, 2] > {1: .307, 2: .168}[objects]
        assert torch.equal(attributes[there][:, 0] == 1, large)
        if objects == 2:
            step = (centre[:, 0] - centre[:, 1])[there]
            assert (step.abs().amax(1) > (r.sum((1, 2)) + .039 * min(hw))[there]).all()
            words = torch.stack([-step[:, 0], step[:, 0], -step[:, 1], step[:, 1]], 1)
            assert torch.equal(words.argmax(1), attributes[there][:, 3])
            assert (attributes[:, 1] != attributes[:, 5]).all()


@pytest.mark.parametrize("objects", (1, 2))
def test_what_is_said_and_what_is_left_open(objects):
    pairs = edits.edits(7000, (128, 128), objects, rng(2))
    added, named = rows_of(pairs, "add"), pairs.named >= 0
    share = (pairs.asked[added] >= 0).float().mean(0)[:4]
    assert (share[:3] - .6).abs().max() < .05 and abs(share[3] - (1. if objects == 2 else .6)) < .05
    assert not named[added][:, :4].any() and not named[rows_of(pairs, "background")].any()
    removed, changed = rows_of(pairs, "remove"), pairs.source.attributes != pairs.target.attributes
    assert torch.equal((pairs.asked >= 0)[~added], (changed & ~removed[:, None])[~added])
    referring = ~added & ~rows_of(pairs, "background")
    free = named[referring][:, [0, 2]].float().mean(0)
    assert (free - .5).abs().max() < .03 and not named[:, -1].any() and not named[:, 3].any()
    if objects == 1:
        assert "remove it" in pairs.texts
    else:       # the words fit the first object alone
        said, other = pairs.named[referring][:, :3], pairs.source.attributes[referring][:, 4:7]
        assert ((said >= 0) & (said != other)).any(1).all()
        anchored = named[:, 4:7].any(1)
        assert not (anchored & ~added & ~rows_of(pairs, "move")).any()
        assert anchored[added].float().mean() > .8


def test_edits_follow_the_seed_and_the_kinds():
    a, b, c = (edits.edits(20, (64, 64), 1, rng(seed)) for seed in (1, 1, 2))
    assert a.texts == b.texts != c.texts and torch.equal(a.target.geometry, b.target.geometry)
    assert (a.kind[1:] == (a.kind[:-1] + 1) % 7).all()
    starts = {edits.edits(1, (64, 64), 1, rng(seed)).kind.item() for seed in range(40)}
    # a batch of one sees them all
    assert starts == set(range(7))


# --- grading edits ---

def drawn(n, objects, seed=3):
    pairs = edits.edits(n, READ[objects], objects, rng(seed))
    return pairs, *(codec(render(scenes, pairs.hw)) for scenes in (pairs.source, pairs.target))


@pytest.mark.parametrize("n, objects", [(1050, 1), pytest.param(1050, 2, marks=pytest.mark.slow),
                                        (56, 2)])
def test_targets_succeed_sources_fail_and_others_score_chance(n, objects):
    pairs, source, target = drawn(n, objects)
    grades = grader.grade_edit(target, pairs)
    success = by_kind(grades["success"], pairs)
    assert min(success.values()) >= .98, success                                        # measured 1
    # measured .025
    assert grades["background"].max() < .04
    grades = grader.grade_edit(source, pairs)
    assert not grades["success"].any() and not grades["asked"].any()
    kept = by_kind(grades["kept"], pairs)
    assert kept.pop("add") == 0 and min(kept.values()) >= .98, kept     # there is no scene yet
    order = torch.randperm(n, generator=rng(4))
    success = grader.grade_edit(target[order], pairs)["success"]
    # chance, from the scenes' codes
    if objects == 1:
        before, after = pairs.source.attributes, pairs.target.attributes
        other = after[order]
        free = rows_of(pairs, "add")[:, None] & (before != after) & (pairs.asked < 0) & (other >= 0)
        fits = ((other == after) | free).all(1)
        # measured 1, 9
        assert (success == fits).float().mean() > .998 and 4 < fits.sum()
    assert success.float().mean() < .03


@pytest.mark.parametrize("objects", (1, 2))
def test_noise_that_the_grader_bears_is_borne(objects):
    pairs, _, target = drawn(140 if objects == 1 else 28, objects)
    noisy = target + .06 * torch.randn(target.shape, generator=rng())
    grades = grader.grade_edit(noisy, pairs)
    assert grades["success"].float().mean() > .95
    assert .04 < grades["background"].mean() < .06                      # mean |N(0, .06)| is .048


def test_each_fault_is_seen_where_it_is():
    pairs, source, target = drawn(210, 1)
    good = grader.grade_edit(target, pairs)
    paint = lambda attributes, geometry=pairs.target.geometry: codec(
        render(Scenes(attributes, geometry), pairs.hw))
    there, shapeless = (pairs.target.attributes >= 0).all(1), ~rows_of(pairs, "reshape")
    other = pairs.target.attributes.clone()
    other[:, 2] = torch.where(there, (other[:, 2] + 1) % 3, -1)
    grades, stated = grader.grade_edit(paint(other), pairs), pairs.asked[:, 2] >= 0
    # of reshape, and add if it says one
    assert torch.equal(grades["asked"], good["asked"] & ~stated)
    keeps = ~there | ~shapeless | rows_of(pairs, "add")
    assert torch.equal(grades["kept"], keeps)
    assert torch.equal(grades["success"], ~there | (rows_of(pairs, "add") & ~stated))

    # background off by more than WORST
    tinted = (target + .12).clamp(-1, 1)
    grades = grader.grade_edit(tinted, pairs)
    assert (grades["background"] > grader.WORST).all() and grades["kept"].float().mean() > .9
    assert not grades["success"].any()
    stripe = target.clone()
    stripe[..., -16:] = BACKGROUND_RGB[(pairs.target.attributes[:, -1] + 1) % 3, :, None, None]
    # a fifth of the image, .8 or 1.6 off
    grades = grader.grade_edit(stripe, pairs)
    assert (grades["background"] > .15).all() and not grades["success"].any()

    before, after = (grader._blocks(grader._has_colour(images))
                     for images in (render(pairs.source, pairs.hw), target))
    inked = (before & ~after)[:, None]
    # where the object was: not background
    ghost = torch.where(inked, target * .8, target)
    assert_close("ghost", grader.grade_edit(ghost, pairs)["background"], good["background"])

    gone, left = rows_of(pairs, "remove"), pairs.source.attributes.clone()
    moved = pairs.source.geometry.clone()
    moved[..., 0] = 1 - moved[..., 0] + torch.where((moved[..., 0] - .5).abs() < .1, .25, 0)
    elsewhere = grader.grade_edit(paint(left, moved), pairs)             # moved away, not removed
    assert not elsewhere["success"][gone].any() and not elsewhere["kept"][gone].all()
    faint = grader.grade_edit((target + source) / 2, pairs)
    assert not faint["asked"][gone].any() and faint["kept"][gone].all()
    assert not grader.grade_edit(torch.full_like(target, math.nan), pairs)["success"].any()


def removals(n, seed, hw=READ[2]):
    """n removals of one of two objects."""
    pairs = edits.edits(7 * n, hw, 2, rng(seed))
    at = rows_of(pairs, "remove")
    return pairs._replace(kind=pairs.kind[at], named=pairs.named[at], asked=pairs.asked[at],
                          source=Scenes(*(t[at] for t in pairs.source)),
                          target=Scenes(*(t[at] for t in pairs.target)))


def test_removal_of_one_of_two_keeps_the_other():
    pairs = removals(12, 5)
    empty = BACKGROUND_RGB[pairs.source.attributes[:, -1], :, None, None].expand(-1, -1, *READ[2])
    grades = grader.grade_edit(empty, pairs)                             # both are gone
    assert grades[
        "asked"].sum() <= 1 and not grades["kept"].any() and (grades["background"] == 0).all()
    changed = pairs.target.attributes.clone()
    changed[:, 6] = (changed[:, 6] + 1) % 4
    grades = grader.grade_edit(codec(render(Scenes(changed, pairs.target.geometry), READ[2])),
                               pairs)
    assert not grades["kept"].any() and not grades["success"].any()
    h, w = 192, 320                                                      # room for it
    pairs = removals(90, 1, (h, w))
    # the other one on the other side
    there = pairs.target.geometry.clone()
    there[:, 1, :2] = 2 * there[:, 0, :2] - there[:, 1, :2]
    side, r = torch.tensor([w, h]), there[:, 1, 2:] * min(h, w)
    inside = ((there[:, 1, :2] - .5).abs() * side + r < side / 2).all(1)
    found = codec(render(Scenes(pairs.target.attributes, there), (h, w)))
    grades = grader.grade_edit(found, pairs)
    assert inside.sum() > 5 and grades["asked"][inside].all() and not grades["kept"][inside].any()


# --- masks ---

@pytest.mark.parametrize("hw", [(48, 80), (96, 128)])
def test_masks_are_what_their_kind_says(hw):
    n, (h, w) = 200, hw
    draw = lambda kind: MASKS[kind](n, hw, rng(1))
    sides = lambda mask: torch.stack([mask.any(2).sum(1) / h, mask.any(1).sum(1) / w])
    box = lambda mask: (mask.any(2)[:, :, None] & mask.any(1)[:, None])
    rectangle, border = draw("rectangle"), draw("border")
    assert torch.equal(rectangle, box(rectangle)) and torch.equal(~border, box(~border))
    spread = sides(rectangle)                                           # U(1/4, 3/4)
    assert .23 < spread.min() < .28 and .72 < spread.max() < .77 and (
        spread.mean(1) - .5).abs().max() < .03
    centre = torch.stack([(rectangle.any(2) * torch.arange(h)).sum(1) / rectangle.any(2).sum(1) / h,
                          (
                              rectangle.any(
                                  1) * torch.arange(w)).sum(1) / rectangle.any(1).sum(1) / w])
    assert (centre.mean(1) - .5).abs().max() < .04 and centre.std(1).min() > .1
    edges = border[:, 0], border[:, -1], border[..., 0], border[..., -1]
    edges = torch.stack([edge.all(1) for edge in edges])
    # 1/4 + 3/4 * 1/2
    assert edges.any(0).all() and (edges.float().mean(1) - 5 / 8).abs().max() < .11
    kept = sides(~border)
    assert kept.min() > .22 and (kept[(kept < 1)] < .9).all() and (kept == 1).float().mean() > .1
    polygon, strokes = draw("polygon"), draw("strokes")
    for mask, low, high in ((polygon, .1, .25), (strokes, .08, .2)):
        assert low < mask.float().mean() < high and mask.flatten(1).any(1).all()
    assert (sides(polygon) * torch.tensor([[h], [w]])).max() <= min(hw) + 1
    assert draw("everything").all()


def test_polygons_and_strokes_are_filled():
    hw, (y, x) = (40, 64), (torch.arange(40)[:, None] + .5, torch.arange(64) + .5)
    # star-like or crossing itself
    turn = math.tau * torch.rand(6, 7, generator=rng(2))
    r = 5 + 14 * torch.rand(6, 7, generator=rng(3))
    corners = torch.stack([20 + r * turn.sin(), 32 + r * turn.cos()], -1)
    to = torch.broadcast_tensors(corners[..., 0, None, None] - y, corners[..., 1, None, None] - x)
    to = torch.stack(to, -1)                                            # [6, 7, h, w, 2]
    after = to.roll(-1, 1)
    cross = to[..., 0] * after[..., 1] - to[..., 1] * after[..., 0]
    winding = torch.atan2(cross, (to * after).sum(-1)).sum(1) / math.tau
    assert torch.equal(_filled(corners, hw), winding.round() % 2 == 1)
    a, b = torch.rand(2, 6, 3, 2, generator=rng(4)) * torch.tensor([*hw])
    radius = 2 + 3 * torch.rand(6, 1, 1, generator=rng(5))
    along = torch.linspace(0, 1, 400)[:, None]
    # [6, 1200, 2]
    points = (a[:, :, None] + along * (b - a)[:, :, None]).flatten(1, 2)
    pixels = torch.stack([*torch.broadcast_tensors(y, x)], -1).flatten(0, 1).expand(6, -1, -1)
    least = torch.cdist(pixels, points).amin(2).unflatten(1, hw)
    clear = (least - radius).abs() > .01
    assert torch.equal(_brushed(a, b, radius, hw)[clear], (least < radius)[clear])
    assert clear.float().mean() > .98


@pytest.mark.parametrize("hw", [(16, 16), (48, 80)])
def test_no_mask_is_empty_and_each_kind_comes_equally_often(hw):
    drawn = masks(4000, hw, rng(3))
    assert drawn.dtype == torch.bool and drawn.flatten(1).any(1).all()
    assert drawn.flatten(1).all(1).sum() == 800
    full = drawn.flatten(1).all(1).nonzero().flatten()
    assert (full.diff() == 5).all()
    assert torch.equal(drawn, masks(4000, hw, rng(3)))
    assert not torch.equal(drawn, masks(4000, hw, rng(4)))
    assert {masks(1, (48, 80), rng(s)).all().item() for s in range(30)} == {True, False}


def test_a_cell_is_repainted_if_any_of_its_pixels_is():
    mask = torch.zeros(2, 48, 80, dtype=torch.bool)
    mask[0, 15, 8] = mask[1, 16, 79] = True
    cells = latent_mask(mask)
    assert cells.shape == (2, 1, 6, 10) and cells.dtype == torch.float32
    assert cells.nonzero().tolist() == [[0, 0, 1, 1], [1, 0, 2, 9]] and cells.max() == 1
    mask = masks(60, (48, 80), rng())
    blocks = mask.unflatten(1, (6, 8)).unflatten(3, (10, 8)).permute(0, 1, 3, 2, 4).flatten(3)
    assert torch.equal(latent_mask(mask)[:, 0].bool(), blocks.any(3))
    images = render(sample_scenes(60, (48, 80), 1, rng()), (48, 80))
    noisy = torch.where(mask[:, None], torch.rand(images.shape, generator=rng()), images)
    a, b = (image_condition(encode, x, mask) for x in (images, noisy))
    # nothing of what is repainted shows, although the codec's waves reach into it
    assert torch.equal(a, b)
    kept = (latent_mask(mask) == 0).expand_as(a[:, 1:])
    assert not a[:, 1:][~kept].any() and kept.any()
    # where no wave reaches the mask, the latents are those of the image
    clear = (latent_mask(F.max_pool2d(mask.float(), 9, 1, 4) > 0) == 0).expand_as(kept)
    assert_close("far from the mask", a[:, 1:][clear], encode(images)[clear], 1e-5)
    assert clear.any() and not torch.equal(a[:, 1:][kept], encode(images)[kept])
    pixels = masked(noisy, mask)
    assert torch.equal(pixels, torch.where(mask[:, None], 0, images))


def test_outside_the_mask_the_source_stays_bit_for_bit():
    a, b = torch.randn(2, 5, 3, 48, 80, generator=rng())
    mask = masks(5, (48, 80), rng())
    out = composite(a, b, mask)
    inside = mask[:, None].expand_as(out)
    assert torch.equal(out[inside], b[inside]) and torch.equal(out[~inside], a[~inside])


def test_seam_error_by_hand():
    image = torch.zeros(2, 3, 3, 4)
    mask = torch.zeros(2, 3, 4, dtype=torch.bool)
    # pairs: 2 above, 2 below, 1 each end
    mask[:, 1, 1:3] = True
    # every jump is .6 over channels
    image[0, :, 1, 1:3] = torch.tensor([.3, .6, .9])[:, None]
    # 3 of 6 pairs, 1 of 3 channels
    image[1, 0, 1, 1] = .9
    reference = torch.zeros(2, 3, 3, 4)
    reference[1, :, 2] = .2                                             # the 2 pairs below
    found = grader.seam_error(image, reference, mask)
    assert_close("seam", found, torch.tensor([.6, 3 * .3 / 6 - 2 * .2 / 6]))
    assert_close("of itself", grader.seam_error(image, image, mask), torch.zeros(2))
    # away from the border: nothing
    image[0, :, 0, 0] = image[0, 2, 1, 3] - 1
    assert_close("local", grader.seam_error(image, reference, mask)[0], found[0])
    assert grader.seam_error(image, reference, torch.ones_like(mask)).isnan().all()


@pytest.mark.parametrize("mask, message", [(torch.ones(1, 48, 64), "48x80 pixels .got 48x64"),
                                           (torch.ones(1, 80, 48), "48x80 pixels .got 80x48"),
                                           (torch.zeros(1, 48, 80), "all black"),
                                           (torch.zeros(1, 48, 80, dtype=torch.bool), "all black"),
                                           (torch.stack([torch.ones(48, 80), torch.zeros(48, 80)]),
                                            "all black"),
                                           (torch.full((1, 48, 80), .5), "got 3840 other "
                                            "pixels.*0.5"),
                                           (torch.full((1, 48, 80), math.nan), "got 3840 other "
                                            "pixels.*nan"),
                                           (torch.tensor([0, 255, 128] * 1280,
                                                         dtype=torch.uint8).view(1, 48, 80),
                                            "got 1280 other pixels.*128")])
def test_masks_from_outside_are_checked(mask, message):
    with pytest.raises(InputError, match=message) as error:
        check_mask(mask, (48, 80))
    assert "\n" not in str(error.value) and re.search(" must (be|have) .*got |; use ",
                                                      str(error.value))


def test_good_masks_from_outside_pass():
    mask = masks(5, (48, 80), rng())
    for given in (mask, mask.float(), mask.byte(), mask.byte() * 255, mask * 255.):
        assert torch.equal(check_mask(given, (48, 80)), mask)


@pytest.mark.parametrize("call", [
    lambda x, m: masked(x, m), lambda x, m: composite(x, x, m),
    lambda x, m: grader.seam_error(x, x, m),
    lambda x, m: grader.grade_inpaint(x, sample_scenes(2, (48, 80), 1, rng()), None, m)])
def test_masks_of_another_size_are_refused(call):
    for shape in ((2, 48, 64), (3, 48, 80)):
        with pytest.raises(RuntimeError, match="must match"):
            call(torch.zeros(2, 3, 48, 80), torch.ones(shape, dtype=torch.bool))


# --- grading inpainted images ---

def test_what_the_repainted_area_decides():
    one = Scenes(torch.zeros(3, 5, dtype=torch.long),
                 torch.tensor([[[.25, .75, .2]]]).expand(3, 1, 3))
    mask = torch.zeros(3, 16, 32, dtype=torch.bool)
    # the centre's pixel; everything
    mask[0, 12, 8] = mask[2] = True
    mask[1], mask[1, 12, 8] = True, False                               # all but it
    yes, no = True, False
    assert grader.decided(one, mask).tolist() == [[yes] * 4 + [no], [no] * 5, [yes] * 5]
    both = torch.tensor([[[.25, .75, .1], [.75, .25, .1]]]).expand(3, 2, 3)
    two = Scenes(torch.zeros(3, 8, dtype=torch.long), both)
    assert grader.decided(two, mask).tolist() == [
        [yes] * 4 + [no] * 4, [no] * 3 + [yes] * 4 + [no], [yes] * 8]


def filled(n, objects, seed=6):
    hw = READ[objects]
    scenes = sample_scenes(n, hw, objects, rng(seed))
    codes = draw_captions(scenes.attributes, rng(seed + 1), 0.6)
    return scenes, codes, masks(n, hw, rng(seed + 2)), render(scenes, hw)


@pytest.mark.parametrize("n, objects", [(1000, 1), pytest.param(1000, 2, marks=pytest.mark.slow),
                                        (40, 2)])
def test_real_renders_are_right_inside_and_others_score_chance(n, objects):
    scenes, codes, mask, images = filled(n, objects)
    accuracy = lambda grades: grades["right"][grades["inside"]].float().mean()
    grades = grader.grade_inpaint(codec(images), scenes, codes, mask)
    # measured 1, 1
    assert accuracy(grades) >= .98 and grades["success"].float().mean() >= .98
    # measured .02
    assert grades["seam"].nanmean() < .03 and grades["inside"].float().mean() > .1
    gray = grader.grade_inpaint(masked(images, mask), scenes, codes, mask)
    # nothing was painted
    assert accuracy(gray) < .08 and gray["seam"].nanmean() > .4
    if objects == 1:
        everything = torch.ones_like(mask)
        swapped = grader.grade_inpaint(codec(images).roll(1, 0), scenes, codes, everything)
        assert torch.equal(swapped["inside"], codes >= 0)
        for column, choices in enumerate(CHOICES[1]):
            found = swapped["right"][:, column][codes[:, column] >= 0].float().mean()
            assert abs(found - 1 / choices) < .07, (column, found)
    empty = BACKGROUND_RGB[(scenes.attributes[:, -1] + 1) % 3, :, None, None].expand_as(images)
    wrong = grader.grade_inpaint(empty, scenes, codes, mask)
    assert wrong["seam"].nanmean() > .7 and not wrong["right"][wrong["inside"]].any()
    decided = grader.decided(scenes, mask)
    # measured .02: what is open too
    assert wrong["right"][~decided].float().mean() < .05


def test_what_is_decided_follows_the_prompt_the_rest_the_source():
    scenes, codes, mask, _ = filled(300, 1)
    x, y = (scenes.geometry[:, 0, :2] * torch.tensor([80, 48])).unbind(1)
    # some of all, else only the object
    mask[::3] = True
    boxes = [((torch.arange(side) + .5 - at[:, None]).abs() < 22) for side, at
             in ((48, y), (80, x))]
    mask[1::3] = (boxes[0][:, :, None] & boxes[1][:, None])[1::3]
    mask[2::3] = False
    mask[2::3, 0, 0] = True
    changed = scenes.attributes.clone()
    changed[:, 1] = (changed[:, 1] + 1) % 4
    images = codec(render(Scenes(changed, scenes.geometry), (48, 80)))
    grades, stated = grader.grade_inpaint(images, scenes, codes, mask), codes >= 0
    inside = grader.decided(scenes, mask)
    assert torch.equal(grades["inside"], inside & stated)
    assert torch.equal(inside[:, 1], torch.arange(300) % 3 < 2)
    wrong = torch.zeros_like(stated)
    wrong[:, 1] = inside[:, 1] & stated[:, 1]                           # counts where one is asked
    assert (grades["right"] == ~wrong).float().mean() > .995
    assert (grades["success"] == ~wrong.any(1)).float().mean() > .99
    # no prompt: any scene will do
    empty, everything = torch.full_like(codes, -1), torch.ones_like(mask)
    assert grader.grade_inpaint(images, scenes, empty, everything)["success"].float().mean() > .99
    assert not grader.grade_inpaint(0 * images, scenes, empty, everything)["success"].any()


def test_scenes_rendered_some_at_a_time_are_those_rendered_at_once():
    hw, g = (16, 32), rng(5)
    scenes, mask = sample_scenes(1030, hw, 1, g), masks(1030, hw, g)
    images = render(scenes, hw)
    latents, image = prompts.rendered(scenes, hw, mask)
    assert_close("latents", latents, encode(images))
    assert_close("image", image, image_condition(encode, images, mask))
    assert prompts.rendered(scenes, hw)[1] is None
