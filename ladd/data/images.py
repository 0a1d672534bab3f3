"""Captioned images and pairs of images: found, checked, sorted into aspect buckets, cropped.

Letters: h w size of an image as displayed, H W size of its bucket, in pixels.
"""
import math
import os
import reprlib
import struct
import warnings
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps
import torch
from torch import Tensor

from ladd.cli import InputError, must
from ladd.data.files import read_json, read_lines, read_objects, text_of

# what Pillow cannot decode, or only by Ghostscript, which runs the file as a program
NOT_READ = {"EPS", "BUFR", "GRIB", "HDF5", "MPEG", "WMF"}
# images that Pillow opens, and those that it may not, so that they are not left out silently
SUFFIXES = {".avif", ".heic", ".heif", ".jp2", ".jxl", ".webp"} | {
    ending for ending, name in Image.registered_extensions().items()
    if name in Image.OPEN and name not in NOT_READ}
CAPTIONS = (".txt", ".caption", ".json")    # in the order in which they are taken
# what Pillow raises for files that are no images or incomplete
BROKEN = (OSError, EOFError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError,
          AttributeError, AssertionError, RuntimeError, struct.error, zlib.error,
          Image.DecompressionBombError)
LEAST_SIDE = 16     # pixels; smaller images are skipped. Our choice
MOST_PIXELS = 8192 * 8192       # larger images are not decoded. Our choice
# Pillow refuses twice its limit when it has read a header, also of an image inside a file
Image.MAX_IMAGE_PIXELS = MOST_PIXELS // 2
warnings.filterwarnings("ignore", module=r"PIL\.")
ORIENTATION = 0x0112        # the tag in EXIF data and TIFF; 5 to 8 swap height and width


# --- buckets ---

def buckets(area: int, multiple: int) -> list[tuple[int, int]]:
    """Return sizes (H, W) of about `area` with sides that are multiples of `multiple`: one for each
    short side, up to an aspect of 4:1. Our choice: few sizes, since training needs a batch of each;
    17 for 1 megapixel and multiples of 64."""
    must(area <= 8192 ** 2, f"--area must be at most {8192 ** 2}, 8192x8192 (got {area})")
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
        must(not path.exists() or path.is_file(), "must be a file (got a folder, pipe or device)")
        with Image.open(path, formats=[name for name in Image.ID if name not in NOT_READ]) as image:
            yield image
    except InputError:
        raise
    except BROKEN as error:
        reason = str(error).replace(str(path), path.name) or type(error).__name__
        raise InputError(f"not a complete image ({reason})") from None


def image_size(path: Path) -> tuple[int, int]:
    """Return (h, w) as displayed, without decoding the pixels. The InputErrors of the functions for
    image files do not name the file; their callers do."""
    with _opened(path) as image:
        w, h = image.size
        must(min(h, w) >= LEAST_SIDE, f"sides must be at least {LEAST_SIDE} pixels (got {h}x{w})")
        if image.format == "PNG" and "exif" not in image.info:
            image.load_prepare()
            with suppress(OSError):
                image.load_end()    # reads what stands after the pixels
        # not that of PNG, which decodes the pixels
        orientation = Image.Image.getexif(image).get(ORIENTATION)
        # Pillow has turned the size of a TIFF that has the tag itself
        turned = orientation in (5, 6, 7, 8) and ORIENTATION not in getattr(image, "tag_v2", ())
        return (w, h) if turned else (h, w)


def displayed(path: Path) -> Image.Image:
    """Return an image as displayed: the first frame, upright, RGB, or RGBA where it may be
    transparent. Of 16 bits the upper 8 are kept; colour profiles are ignored."""
    size = image_size(path)
    with _opened(path) as image:
        stored = str(image.tile[0].args) if image.tile else ""     # how pixels are stored
        image = ImageOps.exif_transpose(image)
        clear = image.info.get("transparency")
        if image.mode[0] == "I":            # Pillow's own conversion would clip at 255
            gray = np.asarray(image).astype(np.int64)
            low, high = gray.min(), gray.max()
            must(low >= 0 and high <= 65535, f"gray must be 0 to 65535 (got {low} to {high})")
            image = Image.fromarray((gray >> 8).astype(np.uint8))
            if clear is not None:
                image.putalpha(Image.fromarray(gray != clear).convert("L"))
        elif image.mode == "F":
            raise InputError("pixels must be integers (got floating-point numbers)")
        elif stored == "RGB;16B" and clear is not None:
            image.info["transparency"] = tuple(value >> 8 for value in clear)
        elif clear is not None:     # Pillow scales gray of 2 and 4 bits, but not this
            image.info["transparency"] = clear * {"L;2": 85, "L;4": 17}.get(stored, 1)
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
        must(image.size == size[::-1], f"pixels must have the size in the header, {size} (got "
             f"{image.size[::-1]})")
        return image


def read_image(path: Path, hw: tuple[int, int]) -> Tensor:
    """Return an image as uint8 [3, H, W], scaled to cover H x W and cropped at the centre, white
    where it is transparent; raise InputError with the reason."""
    image = displayed(path)
    if image.mode == "RGBA":
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
    version: tuple = ()             # (bytes, time in ns) of each file, to notice another content

    @property
    def name(self) -> str:
        """Return what a skipped image is called; a pair by both, as sources recur."""
        return str(self.path) if self.source is None else f"{self.source} -> {self.path}"


def find_images(folder: str | Path) -> tuple[list[Captioned], dict[str, str]]:
    """Return the captioned images below a folder and the folders that it links to, sorted, and
    {path: reason} of what is left out. The caption of a.png is in a.txt, a.caption, a.json
    ({"caption": ...}), or in metadata.jsonl or metadata.csv of a folder above it, as {"file_name":
    ..., "caption": ...}. Raise InputError for a folder that does not exist or has no image."""
    groups: dict[str, list[Path]] = {}          # files by path without ending
    listed: dict[str, str] = {}                 # captions in metadata by path
    found, skipped, errors, folders = [], {}, [], set()
    for root, below, names in os.walk(folder, followlinks=True, onerror=errors.append):
        if (real := os.path.realpath(root)) in folders:
            below.clear()       # was read by another path; also ends loops of links
            continue
        folders.add(real)
        below.sort()
        for path in (Path(root, name) for name in sorted(names)):
            groups.setdefault(str(path.with_suffix("")), []).append(path)
            if path.name in ("metadata.jsonl", "metadata.csv"):
                try:
                    for line in find_listed(path):
                        name = os.path.normpath(line.path)
                        if listed.setdefault(name, line.caption) != line.caption:
                            skipped[f"{path}: {name}"] = "no image for this second caption"
                except InputError as error:
                    skipped[str(path)] = str(error)
    skipped |= {str(error.filename): f"cannot be read ({error.strerror})" for error in errors}

    for files in groups.values():
        images = [path for path in files if path.suffix.lower() in SUFFIXES]
        captions = [path for ending in CAPTIONS for path in files if path.suffix.lower() == ending]
        if not images:
            skipped |= {str(path): "no image for this caption" for path in captions}
        for path in images:
            caption = listed.pop(os.path.normpath(path), None)
            try:
                if captions and captions[0].suffix.lower() == ".json":
                    caption = text_of(value := read_json(captions[0]), "caption")
                    must(caption is not None, f'{captions[0]} must be {{"caption": "..."}} (got '
                         f'{reprlib.repr(value)})')
                elif captions:
                    caption = " ".join(" ".join(read_lines(captions[0])).split())
                must(caption is not None, f"no caption; write {path.stem}.txt or {path.stem}.json")
                found.append(Captioned(path, caption))
            except InputError as error:
                skipped[str(path)] = str(error)
    skipped |= dict.fromkeys(listed, "no image for this caption in the metadata")
    endings = {path.suffix.lower() for files in groups.values() for path in files}
    must(not SUFFIXES.isdisjoint(endings), f"{folder} must be a folder with images and captions, "
         f"such as a.png and a.txt (got no image among {', '.join(sorted(endings)[:8]) or 'none'})")
    return sorted(found), skipped


def find_listed(path: str | Path, pairs: bool = False) -> list[Captioned]:
    """Return the images of a file of objects {"image": ..., "caption": ...}, or the pairs of
    {"source": ..., "target": ..., "instruction": ...}. Paths are relative to the file."""
    folder, keys = Path(path).parent, ["image", "caption"]
    if pairs:
        keys = ["source", "target", "instruction"]
    return [Captioned(folder / found[keys[-2]], found[keys[-1]],
                      source=folder / found["source"] if pairs else None)
            for found in read_objects(path, keys)]


def of_files(function: Callable, image: Captioned, *options) -> list:
    """Return [function(path, *options)] for an image, for a pair those of target and source; an
    InputError then says which of the two it is about."""
    pair = {"target: ": image.path, "source: ": image.source}
    results = []
    for which, path in (pair if image.source else {"": image.path}).items():
        try:
            results.append(function(path, *options))
        except InputError as error:
            raise InputError(f"{which}{error}") from None
    return results


def measure(image: Captioned) -> Captioned:
    """Return the image with size and version. A pair must have one size, to be cropped alike."""
    size, *source = of_files(image_size, image)
    for h, w in source:
        must((h, w) == size, f"source must have the size of its target, {size[0]}x{size[1]} pixels "
             f"(got {h}x{w})")
    stats = of_files(Path.stat, image)
    return image._replace(hw=size, version=tuple((s.st_size, s.st_mtime_ns) for s in stats))


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
