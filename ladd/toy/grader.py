"""The grader of the toy dataset: it reads attributes from pixels and grades edits and inpainting.

Letters as in scenes.py, and p = h w.
"""
import torch
from torch import Tensor

from ladd.data.masks import composite, latent_mask
from ladd.toy.edits import REMOVE, Edits
from ladd.toy.scenes import (AREA, BACKGROUND_RGB, COLOUR_RGB, PHRASES, SINK, Scenes, coverage,
                             decode, encode, pixel_grid, render, swap)

# --- reading attributes ---

# An image is a scene if it has one body of colour per object on one background. Then the shape and
# the place of an object may still be unreadable.
NEAR = 0.5           # distance to a colour of the palette, below which a pixel has that colour
FAR = 0.6            # distance of a pixel to its explanation, above which it is unexplained
LEAST_BODY = 0.5     # IoU with the best shape, below which there is no object
LEAST_IOU = 0.7      # IoU with the best shape, below which the shape is unreadable
MOST_TIE = 0.75      # (1 - IoU) of the best shape over that of the second, above which the shape
                     # is unreadable
LEAST_COLOUR = 0.25  # fraction of the object that must be near its colour
MOST_STRAY = 0.2     # unexplained pixels as a fraction of the object's area
LEAST_WAY = 0.25     # least offset of a single object along the axis of its place, in units of the
                     # free way of the short side, and of two objects, in pixels
# r in short sides: least, limit of small and large, most
LIMITS = {1: (0.19, 0.307, 0.47), 2: (0.09, 0.168, 0.29)}


def grade(images: Tensor, objects: int) -> Tensor:
    """Return codes [n, a] read from images [n, 3, H, W], after a pass through the codec.

    The row of an image that is no scene is -1; in a scene, shape and place are -1 where they
    cannot be read. Of two objects the one with the lower colour index comes first, see `align`.
    """
    chunk = max(1, 2**17 // (images.shape[2] * images.shape[3]))
    return torch.cat([_grade(decode(encode(part)), objects) for part in images.split(chunk)])


def _grade(images: Tensor, objects: int) -> Tensor:
    n, _, h, w = images.shape
    rows, pixels = torch.arange(n, device=images.device), images.flatten(2)     # pixels [n, 3, p]
    backgrounds, colours = BACKGROUND_RGB.to(images.device), COLOUR_RGB.to(images.device)
    palette = torch.cat([backgrounds, colours])
    lengths = palette.square().sum(1)[:, None] + pixels.square().sum(1)[:, None]
    distance = lengths - 2 * (palette @ pixels)                                 # squared, [n, 7, p]
    count = (distance < NEAR**2).sum(-1)                                        # [n, 7]
    background = count[:, :3].argmax(1)
    colour = count[:, 3:].topk(objects).indices.sort(1).values                  # [n, o]
    base = backgrounds[background]                                              # [n, 3]
    step = colours[colour] - base[:, None]                                      # [n, o, 3]

    # Every pixel belongs to the object that explains it best as base + cover * step.
    length = step.square().sum(-1, keepdim=True)
    cover = (step @ (pixels - base[..., None])) / length                        # [n, o, p]
    clear = cover.clamp(0, 1)
    error = distance[rows, background][:, None] + (clear.square() - 2 * clear * cover) * length
    least = error.amin(1, keepdim=True)
    # a coverage of the same area with a steeper edge, which is insensitive to noise
    mask = (2 * cover - 0.5).clamp_(0, 1).mul_(error == least)
    mask = mask.unflatten(-1, (h, w))                                           # [n, o, h, w]
    area = mask.sum((2, 3)).clamp_(min=1e-3)
    fits = [_fit(mask[:, o], area[:, o], base, step[:, o]) for o in range(objects)]
    # each [n, o], centre [n, o, 2]
    shape, iou, tie, centre, r = (torch.stack(field, 1) for field in zip(*fits))

    if objects == 1:
        # the offset from the image's centre in units of the free way, as in sample_scenes
        half = torch.tensor([w, h], device=images.device) / 2
        way = (centre[:, 0] - half) / (half.min() - r).clamp(min=1)             # [n, 2]
    else:
        way = centre[:, 0] - centre[:, 1]
    main = way.abs().argmax(1)
    r, (lower, middle, upper) = r / min(h, w), LIMITS[objects]
    coloured = count[rows[:, None], 3 + colour] > LEAST_COLOUR * area
    ok = ((iou > LEAST_BODY) & (lower < r) & (r < upper) & coloured).all(1)
    ok &= (least[:, 0] > FAR**2).sum(1) < MOST_STRAY * area.sum(1)
    readable = (iou > LEAST_IOU) & (tie < MOST_TIE) & (shape < len(PHRASES[objects][2]))
    shape = torch.where(readable, shape, -1)
    seen = torch.stack([(r > middle).long(), colour, shape], -1)                # [n, o, 3]
    place = torch.where(way[rows, main].abs() > LEAST_WAY, 2 * main + (way[rows, main] > 0), -1)
    codes = torch.cat([seen[:, 0], place[:, None], seen[:, 1:].flatten(1), background[:, None]], 1)
    return torch.where(ok[:, None], codes, -1)


def _fit(mask: Tensor, area: Tensor, base: Tensor, step: Tensor) -> tuple[Tensor, ...]:
    """Return (shape, IoU, tie, centre [n, 2], r) of the shape that fits masks [n, h, w] best. tie
    is (1 - IoU) of the best shape over that of the second.

    Each shape is painted with the mask's area and centroid and passed through the codec, since the
    mask has its blur, too.
    """
    h, w = mask.shape[1:]
    x, y = (t.flatten() for t in pixel_grid(h, w, torch.zeros(1, 2, device=mask.device)))
    centroid = torch.stack([mask.sum(1) @ x, mask.sum(2) @ y], -1) / area[:, None]
    r = (area[:, None] / AREA.to(mask.device)).sqrt()                           # [n, 4]
    sink = SINK.to(mask.device) * r
    centre = centroid[:, None] - torch.stack([torch.zeros_like(sink), sink], -1)    # [n, 4, 2]
    base, step, iou = base[..., None, None], step[..., None, None], []
    for shape in range(4):
        cover = coverage(shape, h, w, centre[:, shape], r[:, shape, None])
        painted = decode(encode(base + cover[:, None] * step)) - base           # [n, 3, h, w]
        template = (painted * step).sum(1) / step.square().sum(1)
        template = (2 * template - 0.5).clamp_(0, 1)
        total, differ = area + template.sum((1, 2)), (template - mask).abs_().sum((1, 2))
        # the sum of minima over the sum of maxima
        iou.append((total - differ) / (total + differ))
    (best, second), order = (t.t() for t in torch.stack(iou, 1).topk(2))
    pick = torch.arange(len(mask), device=mask.device), order[0]
    return order[0], best, (1 - best) / (1 - second).clamp(min=1e-6), centre[pick], r[pick]


def align(graded: Tensor, codes: Tensor) -> Tensor:
    """Return graded rows [n, a] told from the object that fits `codes` better, since pixels do not
    say which of two objects is the first."""
    if graded.shape[-1] != 8:
        return graded

    def misses(rows: Tensor) -> Tensor:
        return ((rows != codes) & (codes >= 0)).sum(-1, keepdim=True)

    swapped = swap(graded)
    return torch.where(misses(swapped) < misses(graded), swapped, graded)


# --- grading edits ---

# Most mean error of the background: an eighth of the distance of two backgrounds, twice the error
# of the noise that tests of the grader add (deviation 0.06, mean 0.048). The codec's blur causes
# at most 0.02.
WORST = 0.1


def grade_edit(results: Tensor, pairs: Edits) -> dict[str, Tensor]:
    """Return how results [n, 3, H, W] follow their instructions: [n] each, bool but the error.

    asked: the result is a scene, and its asked attributes are as asked; for "remove", there is
    background where the object was. kept: all attributes that the instruction does not change are
    as in the source; to read them after "remove", the removed object is put back. background: mean
    |result - background colour| over blocks of 8 x 8 pixels in which neither source nor result has
    an object's colour; 0 if there is none. success: asked and kept and background <= WORST.
    """
    before, after = pairs.source.attributes, pairs.target.attributes
    removed = pairs.kind == REMOVE
    source, target = render(pairs.source, pairs.hw), render(pairs.target, pairs.hw)
    gone = _has_colour(source) & (source != target).any(1) & removed[:, None, None]
    whole = torch.where(removed[:, None], before, after)
    seen = torch.where(_blocks(gone)[:, None], source, results)
    graded = align(grade(seen, pairs.source.geometry.shape[1]), whole)
    right, given = graded == whole, (before == after) | removed[:, None]
    asked = (right | (pairs.asked < 0)).all(1) & (graded[:, -1] >= 0)
    asked &= ~removed | (_mean_error(results, target, gone) <= WORST)
    kept = (right | ~given).all(1)
    background = _mean_error(results, BACKGROUND_RGB[after[:, -1], :, None, None],
                             ~_blocks(_has_colour(source) | _has_colour(results)))
    return {"asked": asked, "kept": kept, "background": background,
            "success": asked & kept & (background <= WORST)}


def _has_colour(images: Tensor) -> Tensor:
    """Return whether pixels of images [n, 3, H, W] are nearer to an object's colour than to a
    background, [n, H, W]."""
    def nearest(part: Tensor, palette: Tensor) -> Tensor:
        # squared distance without |pixel|^2, which both sides of the comparison have
        return (palette.square().sum(1)[:, None] - 2 * palette @ part.flatten(2)).amin(1)

    # 64 images at a time, since a palette of distances is larger than an image.
    found = [nearest(part, COLOUR_RGB) < nearest(part, BACKGROUND_RGB) for part in images.split(64)]
    return torch.cat(found).unflatten(1, images.shape[2:])


def _blocks(mask: Tensor) -> Tensor:
    """Return mask [n, H, W] grown to full blocks of 8 x 8 pixels, which covers most of the codec's
    blur."""
    return latent_mask(mask)[:, 0].bool().repeat_interleave(8, 1).repeat_interleave(8, 2)


def _mean_error(a: Tensor, b: Tensor, where: Tensor) -> Tensor:
    """Return mean |a - b| [n] over channels and the pixels `where` [n, H, W]; 0 without any."""
    return ((a - b).abs().mean(1) * where).sum((1, 2)) / where.sum((1, 2)).clamp(min=1)


# --- grading inpainted images ---

def seam_error(image: Tensor, reference: Tensor, mask: Tensor) -> Tensor:
    """Return jump(image) - jump(reference), [b]; NaN where a mask has no border.

    jump(x) is the mean |x_p - x_q| over channels and pairs of neighbours p, q, horizontal and
    vertical, of which the mask [b, H, W] repaints one. `image` is a composite; `reference` has no
    seam, such as the source. Real renders that the codec has blurred, composited into unblurred
    ones, have about 0.009 at 48x80 pixels and 0.002 at 192x320.
    """
    edges = {dim: mask.diff(dim=dim) for dim in (-2, -1)}
    count = sum(edge.sum((1, 2)) for edge in edges.values())
    jumps = [sum((x.diff(dim=dim).abs().mean(1) * edge).sum((1, 2)) for dim, edge in edges.items())
             for x in (image, reference)]
    return jumps[0] / count - jumps[1] / count


def decided(scenes: Scenes, mask: Tensor) -> Tensor:
    """Return which attributes the repainted area decides, bool [n, a]: size, colour and shape of an
    object whose centre it covers, the place if it covers one of the centres, and the background if
    all is repainted."""
    n, h, w = mask.shape
    x, y = (scenes.geometry[..., :2] * torch.tensor([w, h])).long().unbind(-1)
    inside = mask[torch.arange(n)[:, None], y, x]                               # [n, o]
    objects = inside.repeat_interleave(3, 1)
    place, background = inside.any(1, True), mask.flatten(1).all(1)[:, None]
    return torch.cat([objects[:, :3], place, objects[:, 3:], background], 1)


def grade_inpaint(results: Tensor, scenes: Scenes, codes: Tensor,
                  mask: Tensor) -> dict[str, Tensor]:
    """Return how results [n, 3, H, W], composited into the renders of scenes, follow `codes`.

    inside [n, a]: decided by the repainted area and stated, what the prompt accuracy inside
    counts. right [n, a]: as the prompt states, or left open, where decided; as in the source
    elsewhere. success [n]: a scene with all right. seam [n]: seam_error against the source. graded,
    want [n, a]: what is read, and what it is compared with. codes [n, a] are those of the prompts.
    """
    source = render(scenes, tuple(results.shape[2:]))
    whole, free = composite(source, results, mask), decided(scenes, mask)
    want = torch.where(free, codes, scenes.attributes)
    graded = align(grade(whole, scenes.geometry.shape[1]), want)
    right = (graded == want) | (want < 0)
    return {"graded": graded, "want": want, "inside": free & (codes >= 0), "right": right,
            "success": right.all(1) & (graded[:, -1] >= 0), "seam": seam_error(whole, source, mask)}
