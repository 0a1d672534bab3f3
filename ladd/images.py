"""Captioned images, pairs, lists of prompts on disk: read, checked, sorted into aspect buckets, cut to size.

Letters: h w an image as displayed, H W the size of its bucket, in pixels.
"""
import json
import math
import struct
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ladd import data
from ladd.config import InputError
from ladd.run import progress

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
BROKEN = (OSError, EOFError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError)   # Pillow's
LEAST_SIDE = 16     # our choice: pixels of an image that says anything


def buckets(area: int, multiple: int) -> list[tuple[int, int]]:
    """Sizes (H, W) of about `area`, sides multiples of `multiple`, one for every short side up to 4:1.

    Our choice: few, since training needs a batch of each; 17 at 1 MP and 64.
    """
    if multiple < 16 or multiple % 16 or area < multiple ** 2:
        raise InputError(f"--multiple: found {multiple} for --area {area}, a multiple of 16 whose square is "
                         "at most the area accepted")
    sides = range(multiple, math.isqrt(area) + 1, multiple)
    sizes = [(side, round(area / side / multiple) * multiple) for side in sides]
    return sorted({hw for a, b in sizes for hw in ((a, b), (b, a)) if b <= 4 * a})


def _nearest(sizes: Iterable[tuple[int, int]], h: int, w: int, area: int) -> tuple[int, int]:
    far = lambda hw: abs(math.log(hw[0] * w / (hw[1] * h)))
    return min(sizes, key=lambda hw: (far(hw), abs(math.log(hw[0] * hw[1] / area)), hw))


def plan(images: Sequence["Captioned"], area: int, multiple: int, least: int = 1,
         shard: int = 512) -> list[tuple[tuple[int, int], list["Captioned"]]]:
    """Shards ((H, W), up to `shard` images), bucket after bucket.

    A bucket of fewer than `least` images gives them to the nearest one that is not so small.
    """
    every, parts = buckets(area, multiple), {}
    near = {hw: _nearest(every, *hw, area) for hw in {image.hw for image in images}}
    counts = Counter(near[image.hw] for image in images)
    kept = [hw for hw in counts if counts[hw] >= least] or [max(counts, key=counts.get)]
    for hw in near:
        near[hw] = near[hw] if near[hw] in kept else _nearest(kept, *hw, area)
    for image in images:
        parts.setdefault(near[image.hw], []).append(image)
    return [(hw, part[i:i + shard]) for hw, part in sorted(parts.items()) for i in range(0, len(part), shard)]


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """The image in a file. What Pillow raises, then or while it is used, is an InputError of the reason."""
    try:
        with Image.open(path) as image:
            yield image
    except InputError:
        raise
    except BROKEN as error:
        raise InputError(f"found no whole image ({str(error).replace(str(path), path.name)})") from None


def image_size(path: Path) -> tuple[int, int]:
    """(h, w) as displayed, from the header alone. InputError says why the image is refused."""
    with _opened(path) as image:
        w, h = image.size
        if min(h, w) < LEAST_SIDE:
            raise InputError(f"found {h}x{w} pixels, sides of at least {LEAST_SIDE} accepted")
        known = image.format != "PNG" or "exif" in image.info      # else Pillow would decode all of a PNG
        return (w, h) if known and image.getexif().get(0x0112) in (5, 6, 7, 8) else (h, w)


def read_image(path: Path, hw: tuple[int, int]) -> Tensor:
    """uint8 [3, H, W]: the first frame, upright, white where it is transparent, cropped to cover H x W.

    16-bit gray keeps its upper 8 bits; colour profiles are left aside. InputError says why it is refused.
    """
    with _opened(path) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode[0] == "I":            # Pillow's own conversion would clip at 255
            gray = np.asarray(image).astype(np.int64)
            if gray.min() < 0 or gray.max() > 65535:
                raise InputError(f"found gray of {gray.min()} to {gray.max()}, 0 to 65535 accepted")
            image = Image.fromarray((gray >> 8).astype(np.uint8))
        elif image.mode == "F":
            raise InputError("found floating-point pixels, integers accepted")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = ImageOps.fit(image.convert("RGB"), hw[::-1], Image.Resampling.LANCZOS)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


# lists of prompts and of captioned images

def read_lines(path: str | Path) -> list[str]:
    """The lines of a UTF-8 file, stripped; InputError if it is none."""
    try:
        return [line.strip() for line in Path(path).read_text("utf-8-sig").split("\n")]
    except OSError as error:
        raise InputError(f"{path}: found no file to read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: found byte {error.start} that is no UTF-8, UTF-8 accepted") from None


def is_text(value) -> bool:
    """A string that UTF-8 can write: JSON may hold halves of surrogate pairs, which no tokenizer reads."""
    return isinstance(value, str) and not any("\ud800" <= letter <= "\udfff" for letter in value)


def read_objects(path: str | Path, keys: Sequence[str]) -> list[dict]:
    """The objects of a .jsonl file, empty lines skipped; InputError names a line without text for `keys`."""
    found = []
    for number, line in enumerate(read_lines(path), 1):
        try:
            value = json.loads(line) if line else None
        except ValueError:
            value = line
        if line and not (isinstance(value, dict) and all(is_text(value.get(key)) for key in keys)):
            wanted = ", ".join(f'"{key}": "..."' for key in keys)
            raise InputError(f"{path}: found {line[:60]!r} in line {number}, {{{wanted}}} accepted")
        found += [value] if line else []
    return found


def read_prompts(path: str | Path) -> tuple[list[str], list[str]]:
    """(prompts, notes) of a .txt file, one a line, or of .jsonl, {"prompt": ...} a line.

    Empty lines and, in .txt, lines that begin with # are no prompts; notes count them. InputError for a file
    that cannot be read, a line of .jsonl without prompt, and a file without one.
    """
    lines = read_lines(path)
    if Path(path).suffix == ".jsonl":
        prompts, comments = [found["prompt"] for found in read_objects(path, ["prompt"])], 0
    else:
        prompts = [line for line in lines if line and line[0] != "#"]
        comments = sum(line[:1] == "#" for line in lines)
    if not prompts:
        raise InputError(f"{path}: found no prompt, one a line accepted")
    counts = {"empty lines": lines[:-1].count(""), "comments": comments}       # all end with a line end
    notes = [f"{path}: {n} {what} skipped" for what, n in counts.items() if n]
    return prompts, notes


class Captioned(NamedTuple):
    path: Path
    caption: str                    # of a pair the instruction
    hw: tuple[int, int] = (0, 0)    # as displayed
    source: Path | None = None      # of a pair: what the instruction makes into `path`

    @property
    def name(self) -> str:
        """What it is called where it is skipped: a source may be edited in several ways."""
        return str(self.path) if self.source is None else f"{self.source} -> {self.path}"


def find_images(folder: str | Path) -> tuple[list[Captioned], dict[str, str]]:
    """The images below a folder by name, each captioned by a .txt or .json ({"caption": ...}) file beside it,
    and {path: reason} of those without; InputError for no folder and no image."""
    found, skipped = [], {}
    paths = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise InputError(f"{folder}: found no image, files such as a.png beside a.txt accepted")
    for path in paths:
        text, tree = path.with_suffix(".txt"), path.with_suffix(".json")
        try:
            if text.exists():
                found.append(Captioned(path, " ".join(" ".join(read_lines(text)).split())))
                continue
            caption = data.read_json(tree)
            if not isinstance(caption, dict) or not is_text(caption.get("caption")):
                raise InputError(f'{tree}: found no caption, {{"caption": "..."}} accepted')
            found.append(Captioned(path, caption["caption"]))
        except InputError as error:
            there = tree.exists() or text.exists()
            skipped[str(path)] = str(error) if there else "found no caption beside it"
    return found, skipped


def find_listed(path: str | Path) -> list[Captioned]:
    """The images of a .jsonl file, {"image": ..., "caption": ...} a line, paths relative to the file."""
    listed = read_objects(path, ["image", "caption"])
    return [Captioned(Path(path).parent / found["image"], found["caption"]) for found in listed]


def find_pairs(path: str | Path) -> list[Captioned]:
    """The pairs of a .jsonl file, {"source": ..., "target": ..., "instruction": ...} a line, paths relative
    to the file."""
    listed, folder = read_objects(path, ["source", "target", "instruction"]), Path(path).parent
    return [Captioned(folder / found["target"], found["instruction"], source=folder / found["source"])
            for found in listed]


def of_files(function: Callable, image: Captioned, *options) -> list:
    """function(path, *options) of the image, and of a pair's source after its target; an InputError says of
    which of the two."""
    files = [("", image.path)] if image.source is None else [
        ("target: ", image.path), ("source: ", image.source)]
    results = []
    for which, path in files:
        try:
            results.append(function(path, *options))
        except InputError as error:
            raise InputError(f"{which}{error}") from None
    return results


def size_of(image: Captioned) -> tuple[int, int]:
    """(h, w) as displayed, of a pair that of both: cut alike, what is kept lies at the same place in both.
    InputError says why it is refused."""
    size, *source = of_files(image_size, image)
    if source and source[0] != size:
        shown = ["x".join(map(str, hw)) for hw in (source[0], size)]
        raise InputError(f"found a source of {shown[0]} pixels and a target of {shown[1]}, one size accepted")
    return size


def ahead(pool: ThreadPoolExecutor, function: Callable, tasks: Iterable[tuple],
          depth: int) -> Iterator[Future]:
    """function(*task) of every task in order, up to `depth` of them under way or waiting to be taken."""
    queue: deque[Future] = deque()
    for task in tasks:
        queue.append(pool.submit(function, *task))
        if len(queue) == depth:
            yield queue.popleft()
    yield from queue


def measured(images: list[Captioned], pool: ThreadPoolExecutor, skipped: dict[str, str]) -> list[Captioned]:
    """The images whose header can be read, with their sizes; the others' reasons go to `skipped`."""
    kept, bar = [], progress("headers", len(images))
    for image, size in zip(images, ahead(pool, size_of, ((image,) for image in images), 64)):
        try:
            kept.append(image._replace(hw=size.result()))
        except InputError as error:
            skipped[image.name] = str(error)
        bar.update()
    bar.close()
    return kept
