"""Captioned images and pairs of images: found, checked, sorted into aspect buckets, cropped.

Letters: h w size of an image as displayed, H W size of its bucket, in pixels.
"""
import math
import struct
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps
import torch
from torch import Tensor

from ladd.cli import InputError, must
from ladd.data.files import is_text, read_json, read_lines, read_objects

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
# what Pillow raises for files that are no images or incomplete
BROKEN = (OSError, EOFError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError)
LEAST_SIDE = 16     # pixels; smaller images are skipped. Our choice
ROTATED = (5, 6, 7, 8)      # values of the EXIF orientation that swap height and width


# --- buckets ---

def buckets(area: int, multiple: int) -> list[tuple[int, int]]:
    """Return sizes (H, W) of about `area` with sides that are multiples of `multiple`: one for each
    short side, up to an aspect of 4:1.

    Our choice: few sizes, since training needs a batch of each; 17 for 1 megapixel and multiples of
    64.
    """
    must(multiple >= 16 and multiple % 16 == 0 and area >= multiple ** 2, "--multiple must be a "
         f"multiple of 16 whose square is at most --area, {area} (got {multiple})")
    sizes = set()
    for short in range(multiple, math.isqrt(area) + 1, multiple):
        long = round(area / short / multiple) * multiple
        if long <= 4 * short:
            sizes |= {(short, long), (long, short)}
    return sorted(sizes)


def _nearest(sizes: Iterable[tuple[int, int]], h: int, w: int, area: int) -> tuple[int, int]:
    """Return the size whose aspect is nearest to that of (h, w); of equal ones by area."""
    return min(sizes, key=lambda hw: (abs(math.log(hw[0] * w / (hw[1] * h))),
                                      abs(math.log(hw[0] * hw[1] / area)), hw))


def plan(images: Sequence["Captioned"], area: int, multiple: int, least: int = 1,
         shard: int = 512) -> list[tuple[tuple[int, int], list["Captioned"]]]:
    """Return the shards ((H, W), up to `shard` images), bucket after bucket. The images of a bucket
    with fewer than `least` go to the nearest bucket that has enough."""
    every = buckets(area, multiple)
    near = {hw: _nearest(every, *hw, area) for hw in {image.hw for image in images}}
    counts = Counter(near[image.hw] for image in images)
    kept = [hw for hw in counts if counts[hw] >= least] or [max(counts, key=counts.get)]
    for hw, bucket in near.items():
        if bucket not in kept:
            near[hw] = _nearest(kept, *hw, area)
    parts = {}
    for image in images:
        parts.setdefault(near[image.hw], []).append(image)
    return [(hw, part[i:i + shard]) for hw, part in sorted(parts.items())
            for i in range(0, len(part), shard)]


# --- image files ---

@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """Open an image. Errors of Pillow, also later while the image is used, become InputErrors."""
    try:
        with Image.open(path) as image:
            yield image
    except InputError:
        raise
    except BROKEN as error:
        reason = str(error).replace(str(path), path.name)
        raise InputError(f"not a complete image ({reason})") from None


def image_size(path: Path) -> tuple[int, int]:
    """Return (h, w) as displayed, from the header alone; raise InputError with the reason.

    The errors of this function and of read_image do not name the file; their callers do.
    """
    with _opened(path) as image:
        w, h = image.size
        must(min(h, w) >= LEAST_SIDE, f"sides must be at least {LEAST_SIDE} pixels (got {h}x{w})")
        # Pillow finds EXIF data after the pixels of a PNG only by decoding all of it.
        in_header = image.format != "PNG" or "exif" in image.info
        rotated = in_header and image.getexif().get(0x0112) in ROTATED
        return (w, h) if rotated else (h, w)


def read_image(path: Path, hw: tuple[int, int]) -> Tensor:
    """Return an image as uint8 [3, H, W], scaled to cover H x W and cropped at the centre.

    It is the first frame, upright, white where it is transparent. 16-bit gray keeps its upper 8
    bits; colour profiles are ignored. Raise InputError with the reason.
    """
    with _opened(path) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode[0] == "I":            # Pillow's own conversion would clip at 255
            gray = np.asarray(image).astype(np.int64)
            low, high = gray.min(), gray.max()
            must(low >= 0 and high <= 65535, f"gray must be 0 to 65535 (got {low} to {high})")
            image = Image.fromarray((gray >> 8).astype(np.uint8))
        elif image.mode == "F":
            raise InputError("pixels must be integers (got floating-point numbers)")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = ImageOps.fit(image.convert("RGB"), hw[::-1], Image.Resampling.LANCZOS)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


# --- captioned images ---

class Captioned(NamedTuple):
    """An image with its caption, or a pair: source, instruction, target."""
    path: Path                      # the image, or the target of a pair
    caption: str                    # or the instruction of a pair
    hw: tuple[int, int] = (0, 0)    # as displayed
    source: Path | None = None      # of a pair

    @property
    def name(self) -> str:
        """Return the name by which a skipped image is reported: both files of a pair, since a
        source may have several edits."""
        return str(self.path) if self.source is None else f"{self.source} -> {self.path}"


def find_images(folder: str | Path) -> tuple[list[Captioned], dict[str, str]]:
    """Return the captioned images below a folder, sorted, and {path: reason} of skipped ones.

    The caption of a.png is in a.txt, or in a.json as {"caption": ...}. Raise InputError for a
    folder that does not exist or has no image.
    """
    found, skipped = [], {}
    paths = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in SUFFIXES)
    must(bool(paths), f"{folder} must be a folder with images and captions, such as a.png and "
         "a.txt (got no image)")
    for path in paths:
        text, tree = path.with_suffix(".txt"), path.with_suffix(".json")
        if not text.exists() and not tree.exists():
            skipped[str(path)] = f"no caption; write {text.name} or {tree.name}"
            continue
        try:
            if text.exists():
                caption = " ".join(" ".join(read_lines(text)).split())
            else:
                value = read_json(tree)
                must(isinstance(value, dict) and is_text(value.get("caption")),
                     f'{tree} must be {{"caption": "..."}} (got {str(value)[:60]})')
                caption = value["caption"]
            found.append(Captioned(path, caption))
        except InputError as error:
            skipped[str(path)] = str(error)
    return found, skipped


def find_listed(path: str | Path) -> list[Captioned]:
    """Return the images of a .jsonl file with lines {"image": ..., "caption": ...}. Paths are
    relative to the file."""
    listed = read_objects(path, ["image", "caption"])
    return [Captioned(Path(path).parent / found["image"], found["caption"]) for found in listed]


def find_pairs(path: str | Path) -> list[Captioned]:
    """Return the pairs of a .jsonl file with lines {"source": ..., "target": ..., "instruction":
    ...}. Paths are relative to the file."""
    folder = Path(path).parent
    return [Captioned(folder / found["target"], found["instruction"],
                      source=folder / found["source"])
            for found in read_objects(path, ["source", "target", "instruction"])]


def of_files(function: Callable, image: Captioned, *options) -> list:
    """Return [function(path, *options)] for an image, for a pair those of target and source; an
    InputError then says which of the two it is about."""
    files = {"": image.path}
    if image.source is not None:
        files = {"target: ": image.path, "source: ": image.source}
    results = []
    for which, path in files.items():
        try:
            results.append(function(path, *options))
        except InputError as error:
            raise InputError(f"{which}{error}") from None
    return results


def size_of(image: Captioned) -> tuple[int, int]:
    """Return (h, w) as displayed; raise InputError where the two files of a pair differ in size,
    since then they would not be cropped alike."""
    size, *source = of_files(image_size, image)
    if source:
        (h, w), (source_h, source_w) = size, source[0]
        must(source[0] == size, f"source must have the size of its target, {h}x{w} pixels (got "
             f"{source_h}x{source_w})")
    return size


def ahead(pool: ThreadPoolExecutor, function: Callable, tasks: Iterable[tuple],
          depth: int) -> Iterator[Future]:
    """Yield the futures of function(*task) in the order of the tasks. Up to `depth` of them are in
    progress or not yet taken."""
    queue: deque[Future] = deque()
    for task in tasks:
        queue.append(pool.submit(function, *task))
        if len(queue) == depth:
            yield queue.popleft()
    yield from queue


def measured(images: list[Captioned], pool: ThreadPoolExecutor, skipped: dict[str, str],
             update: Callable[[], None]) -> list[Captioned]:
    """Return the images whose header can be read, with their sizes. The reasons of the others are
    added to `skipped`. `update` is called after each image."""
    kept = []
    for image, size in zip(images, ahead(pool, size_of, ((image,) for image in images), 64)):
        try:
            kept.append(image._replace(hw=size.result()))
        except InputError as error:
            skipped[image.name] = str(error)
        update()
    return kept
