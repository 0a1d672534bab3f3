"""Latents with their prompts: safetensors shards on disk, and batches in an order that needs no saved state.

A folder holds, each file whole or absent (written under a temporary name and renamed):
    prompts.json            the distinct prompts
    prompts.safetensors     codes [p, a], null_context [l, dc], null_pooled [dp] (of the empty prompt)
    provenance.json         what made the latents (sampler, guidance, seed, sha of the teacher); written third
    text-00002.safetensors  context [r, l, dc], pooled [r, dp] bf16 of the third `rows` prompts
    00007-8x12.safetensors  one shard: x0 [n, c, h, w] of one latent size (here h 8, w 12), prompt_id [n]; for
                            editing and inpainting image [n, e, h, w], what the network reads beside x0

Text and latents stay memory-mapped: a folder may be larger than memory.

Letters: p distinct prompts, n samples, b batch, c channels, h w latent size, l tokens, dc dp widths
of context and pooled, a attributes. codes are -1 where a prompt leaves an attribute open; data without
attributes has one column, the prompt's own number.
"""
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ladd import flow
from ladd.config import InputError
from ladd.distill import Text, TextImage


class Batch(NamedTuple):
    x0: Tensor        # [b, c, h, w] fp32
    context: Tensor   # [b, l, dc] as stored
    pooled: Tensor    # [b, dp] as stored
    index: Tensor     # [b] int64, position in the dataset: bucket after bucket, by (h, w)
    image: Tensor | None = None    # [b, e, h, w] fp32

    @property
    def text(self) -> Text | TextImage:
        """What a network reads of it beside the noised x0."""
        text = self.context, self.pooled
        return Text(*text) if self.image is None else TextImage(*text, self.image)


class Rows:
    """Tensors joined along their first axis without a copy: rows[index], index [b] int64, gathers like
    torch.cat(parts)[index]."""

    def __init__(self, parts: Sequence[Tensor]):
        self.parts, self.starts = list(parts), torch.tensor([0, *accumulate(map(len, parts))])
        self.shape, self.dtype = torch.Size((int(self.starts[-1]), *parts[0].shape[1:])), parts[0].dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Tensor) -> Tensor:
        out = torch.empty(len(index), *self.shape[1:], dtype=self.dtype)
        part = torch.searchsorted(self.starts, index, right=True) - 1
        for k in part.unique().tolist():
            at = part == k
            out[at] = self.parts[k][index[at] - self.starts[k]]
        return out


@dataclass(frozen=True)
class Latents:
    prompts: list[str]
    context: Tensor | Rows                                  # [p, l, dc]
    pooled: Tensor | Rows                                   # [p, dp]
    codes: Tensor                                           # [p, a]
    null: tuple[Tensor, Tensor]                             # context [l, dc], pooled [dp] of the empty prompt
    buckets: dict[tuple[int, int], tuple[Tensor | Rows, Tensor]]   # (h, w): x0 [n, c, h, w], prompt_id [n]
    provenance: dict[str, Any]
    images: dict[tuple[int, int], Tensor | Rows] = field(default_factory=dict)     # [n, e, h, w], or none

    @property
    def channels(self) -> int:
        """Of the image beside x0."""
        return next((image.shape[1] for image in self.images.values()), 0)

    def gather(self, bucket: tuple[int, int], index: Tensor) -> Batch:
        """The samples `index` [b] of one bucket."""
        x0, prompt_id = self.buckets[bucket]
        offset = sum(len(ids) for hw, (_, ids) in self.buckets.items() if hw < bucket)
        prompt = prompt_id[index]
        image = self.images[bucket][index].float() if self.images else None
        return Batch(x0[index].float(), self.context[prompt], self.pooled[prompt], offset + index, image)

    @property
    def holdout(self) -> int:
        """Latents of each size that never train, a sixteenth and at least two, to test the heads on."""
        return max(2, min(len(ids) for _, ids in self.buckets.values()) // 16)

    def batch(self, step: int, batch: int, seed: int, exclude: int = 0) -> Batch:
        """The batch of `step`: gather(*choose(...))."""
        return self.gather(*self.choose(step, batch, seed, exclude))

    def choose(self, step: int, batch: int, seed: int, exclude: int = 0) -> tuple[tuple[int, int], Tensor]:
        """(bucket, index [batch]) of the batch of `step`, a function of its arguments alone: permutations by
        (seed, epoch). Our choice.

        One size a batch, every sample once an epoch; what a bucket has left below `batch` waits for the next
        epoch. The last `exclude` samples of each bucket stay out (held-out reals, for `gather`).
        Raises InputError for a bucket that cannot fill a batch: its samples would never be seen.
        """
        starts, total = {}, 0                       # an epoch's batches, numbered bucket after bucket
        for hw in sorted(self.buckets):
            size = len(self.buckets[hw][1]) - exclude
            if size < batch:
                raise InputError(f"latents {hw[0]}x{hw[1]}: found {size}, a batch of {batch} needs as many")
            starts[hw], total = total, total + size // batch
        epoch, position = divmod(step, total)
        number = int(permutation(total, seed, epoch)[position])
        bucket = max(hw for hw, start in starts.items() if start <= number)
        first = (number - starts[bucket]) * batch
        order = permutation(len(self.buckets[bucket][1]) - exclude, seed, epoch, bucket)
        return bucket, order[first:first + batch]


@lru_cache(maxsize=64)
def permutation(n: int, *key) -> Tensor:
    """A permutation of n that is a function of `key` alone, the same on every machine."""
    return torch.randperm(n, generator=flow.generator(*key))


def misfits(codes: Tensor, prompt: Tensor, generator: torch.Generator,
            tries: int = 32) -> tuple[Tensor, Tensor]:
    """(others, found): for each prompt of `prompt` [m] another one among all whose caption does not fit it.

    codes [p, a]: stated attributes, -1 where open; two captions exclude each other where both state an
    attribute and differ. A caption that happens to fit is redrawn, up to `tries` times; found [m] is False
    where none was found, as for a caption that states nothing, and `others` is then the prompt itself.
    """
    drawn = torch.randint(len(codes), (len(prompt), tries), generator=generator)
    a, b = codes[prompt, None], codes[drawn]                                             # [m, tries, a]
    excludes = ((a != b) & (a >= 0) & (b >= 0)).any(-1)
    first = excludes.byte().argmax(1, keepdim=True)
    return torch.where(excludes.any(1), drawn.gather(1, first)[:, 0], prompt), excludes.any(1)


def open_folder(folder: str | Path, provenance: dict[str, Any], prompts: Sequence[str], codes: Tensor,
                null: tuple[Tensor, Tensor], rows: int = 1024) -> None:
    """Creates the folder, or checks that what lies there was made the same way, so that its files can stay.

    `rows`: prompts a file of text. Raises InputError that names the first difference and both values.
    """
    folder, prompts, provenance = Path(folder), list(prompts), {**provenance, "rows": rows}
    tensors = {name: t.to("cpu", torch.bfloat16) for name, t in zip(("null_context", "null_pooled"), null)}
    tensors["codes"] = codes.to("cpu", torch.int64)
    check_prompts(folder, prompts, tensors)
    if (folder / "provenance.json").exists():
        old = finite_json(read_json(folder / "provenance.json"))
        new = json.loads(json.dumps(finite_json(provenance)))
        old_prompts, old_tensors = read_prompts(folder)
        pairs = [(key, old.get(key), new.get(key)) for key in [*new, *old]]
        for name, a, b in [*pairs, *(("prompt", a, b) for a, b in zip_longest(old_prompts, prompts))]:
            if a != b:
                raise InputError(f"{folder}: found {name} {a!r}, {b!r} accepted; take another folder")
        for name, tensor in tensors.items():
            if not torch.equal(old_tensors[name], tensor):
                raise InputError(f"{folder}: found another {name} of the same prompts; take another folder")
    elif shards(folder) or list(folder.glob("text-*")):
        raise InputError(f"{folder}: found shards without provenance.json; take another folder")
    else:
        publish(folder / "prompts.safetensors", lambda path: write_tensors(path, tensors))
        publish(folder / "prompts.json", lambda path: write_json(path, prompts))
        publish(folder / "provenance.json", lambda path: write_json(path, provenance))


def missing_text(folder: str | Path) -> list[int]:
    """Indices of the files of text that are not on disk; file i embeds prompts[i * rows:(i + 1) * rows]."""
    folder = Path(folder)
    files = -(-len(read_json(folder / "prompts.json")) // read_json(folder / "provenance.json")["rows"])
    return [i for i in range(files) if not text_file(folder, i).exists()]


def write_text(folder: str | Path, index: int, context: Tensor, pooled: Tensor) -> None:
    """Writes the text of file `index`: context [r, l, dc] and pooled [r, dp], in bf16."""
    prompts, tensors = read_prompts(Path(folder))
    rows = read_json(Path(folder) / "provenance.json")["rows"]
    text = {"context": context.to("cpu", torch.bfloat16), "pooled": pooled.to("cpu", torch.bfloat16)}
    check_text(text_file(folder, index), text, len(prompts[index * rows:(index + 1) * rows]), tensors)
    publish(text_file(folder, index), lambda path: write_tensors(path, text))


def read_text(folder: str | Path) -> tuple[Tensor | Rows, Tensor | Rows]:
    """(context [p, l, dc], pooled [p, dp]) of all prompts, memory-mapped."""
    (prompts, tensors), parts = read_prompts(Path(folder)), []
    rows = read_json(Path(folder) / "provenance.json")["rows"]
    for i in range(-(-len(prompts) // rows)):
        text, _ = read_tensors(text_file(folder, i))
        check_text(text_file(folder, i), text, len(prompts[i * rows:(i + 1) * rows]), tensors)
        parts.append(text)
    return joined([text["context"] for text in parts]), joined([text["pooled"] for text in parts])


def text_file(folder: str | Path, index: int) -> Path:
    return Path(folder) / f"text-{index:05d}.safetensors"


def joined(parts: list[Tensor]) -> Tensor | Rows:
    return Rows(parts) if len(parts) > 1 else parts[0]


def write_shard(folder: str | Path, index: int, x0: Tensor, prompt_id: Tensor,
                image: Tensor | None = None) -> None:
    """Writes the latents x0 [n, c, h, w] (dtypes kept) of the prompts prompt_id [n], and the images
    [n, e, h, w] beside them, whole or not at all."""
    path = Path(folder) / f"{index:05d}-{x0.shape[-2]}x{x0.shape[-1]}.safetensors"
    tensors = {"x0": x0, "prompt_id": prompt_id.long()} | ({} if image is None else {"image": image})
    check_shard(path, tensors, beside=0 if image is None else image.shape[1])
    publish(path, lambda path: write_tensors(path, tensors))


def missing_shards(folder: str | Path, plan: Sequence[tuple[int, int]]) -> list[int]:
    """Indices into `plan`, every shard's (h, w), that are not on disk. InputError for a shard outside it."""
    present = shards(Path(folder))
    for index, hw, path in present:
        if index >= len(plan) or tuple(plan[index]) != hw:
            raise InputError(f"{path}: found a shard that is not in this run's plan; take another folder")
    return sorted(set(range(len(plan))) - {index for index, _, _ in present})


def read_folder(folder: str | Path) -> Latents:
    """The latents of a folder, memory-mapped.

    Raises InputError that names the file which is missing, truncated, misshapen or not finite.
    """
    folder = Path(folder)
    provenance, (prompts, tensors) = read_json(folder / "provenance.json"), read_prompts(folder)
    parts, channels, beside = {}, None, None
    for _, hw, path in shards(folder):
        shard, _ = read_tensors(path)
        check_shard(path, shard, hw, channels, len(prompts), beside)
        channels, beside = shard["x0"].shape[1], shard["image"].shape[1] if "image" in shard else 0
        for name, tensors_of in zip(("x0", "prompt_id", "image"), parts.setdefault(hw, ([], [], []))):
            tensors_of += [shard[name]] if name in shard else []
    if not parts:
        raise InputError(f"{folder}: found no shard, files such as 00000-8x8.safetensors accepted")
    buckets = {hw: (joined(x0), torch.cat(prompt_id)) for hw, (x0, prompt_id, _) in sorted(parts.items())}
    images = {hw: joined(image) for hw, (_, _, image) in sorted(parts.items()) if image}
    null = tensors["null_context"], tensors["null_pooled"]
    return Latents(prompts, *read_text(folder), tensors["codes"], null, buckets, provenance, images)


def shards(folder: Path) -> list[tuple[int, tuple[int, int], Path]]:
    """(index, (h, w), path) of the shards in a folder, by index."""
    name = re.compile(r"(\d{5,})-(\d+)x(\d+)\.safetensors")
    found = ((name.fullmatch(path.name), path) for path in folder.glob("*"))
    return sorted((int(m[1]), (int(m[2]), int(m[3])), path) for m, path in found if m)


def read_prompts(folder: Path) -> tuple[list[str], dict[str, Tensor]]:
    prompts, (tensors, _) = read_json(folder / "prompts.json"), read_tensors(folder / "prompts.safetensors")
    check_prompts(folder / "prompts.safetensors", prompts, tensors)
    return prompts, tensors


def check_prompts(where: Path, prompts: list[str], tensors: dict[str, Tensor]) -> None:
    want = {"codes": (len(prompts), "a"), "null_context": ("l", "dc"), "null_pooled": ("dp",)}
    check_shapes(where, tensors, want)


def check_text(where: Path, text: dict[str, Tensor], rows: int, tensors: dict[str, Tensor]) -> None:
    """Text of `rows` prompts, as wide and as long as the empty prompt among `tensors`."""
    check_shapes(where, text, {"context": (rows, *tensors["null_context"].shape),
                               "pooled": (rows, *tensors["null_pooled"].shape)})


def check_shapes(where: Path, tensors: dict[str, Tensor], want: dict[str, tuple]) -> None:
    """InputError unless the tensors have the names and shapes of `want`, where a letter is any size."""
    fits = lambda shape, sizes: len(shape) == len(sizes) and all(
        isinstance(size, str) or side == size for side, size in zip(shape, sizes))
    if set(tensors) != set(want) or not all(fits(tensors[k].shape, sizes) for k, sizes in want.items()):
        found = {name: list(t.shape) for name, t in tensors.items()}
        accepted = ", ".join(f"{name} [{', '.join(map(str, sizes))}]" for name, sizes in want.items())
        raise InputError(f"{where}: found {found}, {accepted} accepted")
    check_finite(where, tensors)


def check_shard(where: Path, tensors: dict[str, Tensor], hw: tuple[int, int] | None = None,
                channels: int | None = None, prompts: int | None = None, beside: int | None = None) -> None:
    """`beside`: channels of the image, 0 for none; None: as found."""
    found = {name: [*t.shape, str(t.dtype)] for name, t in tensors.items()}
    x0, ids, image = (tensors.get(name) for name in ("x0", "prompt_id", "image"))
    if (len(found) != 2 + (image is not None) or x0 is None or ids is None or x0.ndim != 4 or not x0.numel()
            or ids.shape != x0.shape[:1] or not x0.is_floating_point() or ids.dtype != torch.int64
            or hw not in (None, tuple(x0.shape[2:])) or channels not in (None, x0.shape[1])
            or image is not None and (image.ndim != 4 or not image.is_floating_point() or not image.shape[1]
                                      or image.shape[:1] + image.shape[2:] != x0.shape[:1] + x0.shape[2:])
            or beside not in (None, 0 if image is None else image.shape[1])):
        (h, w), c, e = hw or "hw", channels or "c", beside or "e"
        more = "" if beside == 0 else f", float image [n, {e}, {h}, {w}]" + " or none" * (beside is None)
        raise InputError(f"{where}: found {found}, float x0 [n, {c}, {h}, {w}], int64 prompt_id [n]{more} "
                         "accepted")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or prompts is not None and high >= prompts:
        raise InputError(f"{where}: found prompt_id {low} to {high}, rows of the {prompts} prompts accepted")
    check_finite(where, tensors)


def check_finite(where: Path, tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if not all(part.isfinite().all() for part in tensor.split(1024)):   # a mapped tensor may be huge
            raise InputError(f"{where}: found NaN or infinity in {name}, finite values accepted")


def publish(path: Path, write: Callable[[Path], None]) -> None:
    """Lets `write` make a file or folder elsewhere, then renames it: a kill leaves all of it or nothing.

    The temporary folder carries the final name, so the next write of `path` removes what a killed one left.
    """
    work = path.with_name(f".tmp_{path.name}")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    write(work / path.name)
    sync(work)
    os.replace(work / path.name, path)
    work.rmdir()
    sync(path.parent)


def sync(path: Path) -> None:
    """Waits until a file's content or a folder's entries are on disk: a rename comes after what it names."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    # copy: safetensors refuses tensors that share storage
    owned = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}
    save_file(owned, path, metadata)
    path.chmod(0o644)   # save_file leaves its temporary file's private mode
    sync(path)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) of a safetensors file; memory-mapped, writing into one leaves the file alone."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: found no whole safetensors file ({error})") from None


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(finite_json(value), indent=1, allow_nan=False) + "\n")
    sync(path)


def read_json(path: Path) -> Any:
    special = lambda found: float(found["float"]) if list(found) == ["float"] else found
    try:
        return json.loads(path.read_text(), object_hook=special)
    except (OSError, ValueError) as error:   # ValueError: no JSON or no UTF-8
        raise InputError(f"{path}: found no whole JSON file ({error})") from None


def finite_json(value: Any) -> Any:
    """NaN and infinity as {"float": "nan"}, which read_json turns back: JSON has no word for them."""
    if isinstance(value, dict):
        return {key: finite_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite_json(item) for item in value]
    return {"float": repr(value)} if isinstance(value, float) and not math.isfinite(value) else value
