"""Latents with their prompts: safetensors shards on disk, and batches that need no saved state.

A folder holds these files, each complete or absent (written elsewhere, then renamed):
    prompts.json            the distinct prompts
    prompts.safetensors     codes [p, a]; null_context [l, dc], null_pooled [dp] of the empty prompt
    provenance.json         what made the latents (sampler, guidance, seed, sha of the teacher);
                            it is written third
    text-00002.safetensors  context [r, l, dc], pooled [r, dp] bf16 of the third `rows` prompts
    00007-8x12.safetensors  one shard: x0 [n, c, h, w] of one latent size (here h 8, w 12),
                            prompt_id [n]; for editing and inpainting image [n, e, h, w], the
                            image conditioning

Text and latents stay memory-mapped: a folder may be larger than memory.

Letters: p distinct prompts, n samples, b batch, c channels, h w latent size, e channels of the
image conditioning, l tokens, dc dp widths of context and pooled, a attributes. codes are -1 where
a prompt leaves an attribute open; data without attributes has one column, the prompt's number.
"""
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ladd.cli import must
from ladd.core import flow
from ladd.core.mmdit import Text
from ladd.data.files import (fingerprint, finite_json, is_text, read_json, read_tensors,
                             write_json, write_tensors)


class Batch(NamedTuple):
    """Samples of one latent size."""
    x0: Tensor    # [b, c, h, w] fp32
    text: Text    # context and pooled as stored, image [b, e, h, w] fp32


class Rows:
    """Tensors joined along their first axis without a copy: rows[index], index [b] int64, gathers
    like torch.cat(parts)[index]."""

    def __init__(self, parts: Sequence[Tensor]):
        self.parts = list(parts)
        self.starts = torch.tensor([0, *accumulate(map(len, parts))])
        self.shape = torch.Size((int(self.starts[-1]), *parts[0].shape[1:]))
        self.dtype = parts[0].dtype

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
    """A dataset: latents by size, their prompts with text, and the image conditioning."""
    prompts: list[str]
    context: Tensor | Rows              # [p, l, dc]
    pooled: Tensor | Rows               # [p, dp]
    codes: Tensor                       # [p, a]
    null: tuple[Tensor, Tensor]         # context [l, dc], pooled [dp] of the empty prompt
    # by (h, w): x0 [n, c, h, w], prompt_id [n]
    buckets: dict[tuple[int, int], tuple[Tensor | Rows, Tensor]]
    provenance: dict[str, Any]
    # by (h, w): image conditioning [n, e, h, w]; empty where there is none
    images: dict[tuple[int, int], Tensor | Rows] = field(default_factory=dict)

    @property
    def channels(self) -> int:
        """Return the channels of the image conditioning, 0 where there is none."""
        return next((image.shape[1] for image in self.images.values()), 0)

    @property
    def holdout(self) -> int:
        """Return how many latents of each size never train, to test the discriminator on."""
        return max(2, min(len(ids) for _, ids in self.buckets.values()) // 16)

    def gather(self, bucket: tuple[int, int], index: Tensor) -> Batch:
        """Return the samples `index` [b] of one bucket."""
        x0, prompt_id = self.buckets[bucket]
        prompt = prompt_id[index]
        image = self.images[bucket][index].float() if self.images else None
        return Batch(x0[index].float(), Text(self.context[prompt], self.pooled[prompt], image))

    def batch(self, step: int, batch: int, seed: int, exclude: int = 0) -> Batch:
        """Return the batch of `step`: gather(*choose(...))."""
        return self.gather(*self.choose(step, batch, seed, exclude))

    def choose(self, step: int, batch: int, seed: int,
               exclude: int = 0) -> tuple[tuple[int, int], Tensor]:
        """Return (bucket, index [batch]) of the batch of `step`, a function of the arguments alone.

        A batch has one size, and a sample occurs at most once per epoch: what a bucket has left
        below `batch` waits for the next epoch. The last `exclude` samples of each bucket are held
        out. Raise InputError for a bucket that cannot fill a batch, since its samples would never
        be seen. Our choice.
        """
        starts = []     # (bucket, first row) of the batches of an epoch
        for hw, (_, ids) in sorted(self.buckets.items()):
            size = len(ids) - exclude
            must(size >= batch, f"latents {hw[0]}x{hw[1]} must be at least a batch of {batch} (got "
                 f"{size})")
            starts += [(hw, i * batch) for i in range(size // batch)]
        epoch, position = divmod(step, len(starts))
        bucket, first = starts[permutation(len(starts), seed, epoch)[position]]
        order = permutation(len(self.buckets[bucket][1]) - exclude, seed, epoch, bucket)
        return bucket, order[first:first + batch]


@lru_cache(maxsize=64)
def permutation(n: int, *key) -> Tensor:
    """Return a permutation of n that is a function of `key` alone, the same on every machine."""
    return torch.randperm(n, generator=flow.generator(*key))


def mismatched_captions(codes: Tensor, prompt: Tensor, generator: torch.Generator,
                        tries: int = 32) -> tuple[Tensor, Tensor]:
    """Return (others, found): for each of `prompt` [m] another prompt that does not fit its image.

    Two captions exclude each other where both state an attribute (codes [p, a]) and differ. found
    [m] is False where none of `tries` drawn prompts excludes the caption, as where that states
    nothing; then `others` has the prompt itself.
    """
    drawn = torch.randint(len(codes), (len(prompt), tries), generator=generator)
    a, b = codes[prompt, None], codes[drawn]                                    # [m, tries, a]
    excludes = ((a != b) & (a >= 0) & (b >= 0)).any(-1)
    found = excludes.any(1)
    first = excludes.byte().argmax(1, keepdim=True)
    return torch.where(found, drawn.gather(1, first)[:, 0], prompt), found


def open_folder(folder: str | Path, provenance: dict[str, Any], prompts: Sequence[str],
                codes: Tensor, null: tuple[Tensor, Tensor], rows: int = 1024) -> None:
    """Create the folder with `rows` prompts per file of text, or check that an existing one was
    made alike, so that its files can stay. Raise InputError that names the first difference."""
    folder, prompts = Path(folder), list(prompts)
    new = {**provenance, "rows": rows}
    tensors = {"null_context": null[0].to("cpu", torch.bfloat16),
               "null_pooled": null[1].to("cpu", torch.bfloat16),
               "codes": codes.to("cpu", torch.int64)}
    check_tensors(folder, tensors, prompt_shapes(prompts))
    if not (folder / "provenance.json").exists():
        must(not shards(folder) and not list(folder.glob("text-*")),
             f"{folder}: shards without provenance.json; take another folder")
        write_tensors(folder / "prompts.safetensors", tensors)
        write_json(folder / "prompts.json", prompts)
        write_json(folder / "provenance.json", new)
        return
    old = finite_json(read_json(folder / "provenance.json", dict))
    new = json.loads(json.dumps(finite_json(new)))     # tuples become lists
    old_prompts, old_tensors = read_prompt_files(folder)
    values = [(name, old.get(name), new.get(name)) for name in [*new, *old]]
    values += [("prompt", a, b) for a, b in zip_longest(old_prompts, prompts)]
    for name, a, b in values:
        must(a == b, f"{folder}: made with {name} {a!r} (got {b!r}); take another folder")
    for name, tensor in tensors.items():
        must(torch.equal(old_tensors[name], tensor),
             f"{folder}: made with another {name} for the same prompts; take another folder")


def missing_text(folder: str | Path) -> list[int]:
    """Return the indices of the files of text that do not exist; file i holds the text of
    prompts[i * rows:(i + 1) * rows]."""
    return [i for i, (path, _) in enumerate(text_files(folder)) if not path.exists()]


def write_text(folder: str | Path, index: int, context: Tensor, pooled: Tensor) -> None:
    """Write file `index` of text: context [r, l, dc] and pooled [r, dp], in bf16."""
    path, shapes = text_files(folder)[index]
    text = {"context": context.to("cpu", torch.bfloat16),
            "pooled": pooled.to("cpu", torch.bfloat16)}
    check_tensors(path, text, shapes)
    write_tensors(path, text, {"folder": identity(path.parent)})


def write_shard(folder: str | Path, index: int, x0: Tensor, prompt_id: Tensor,
                image: Tensor | None = None) -> None:
    """Write the latents x0 [n, c, h, w] of the prompts prompt_id [n], and the image conditioning
    [n, e, h, w], dtypes kept."""
    path = Path(folder) / f"{index:05d}-{x0.shape[-2]}x{x0.shape[-1]}.safetensors"
    tensors = {"x0": x0, "prompt_id": prompt_id.long()}
    if image is not None:
        tensors["image"] = image
    check_shard(path, tensors)
    write_tensors(path, tensors, {"folder": identity(path.parent)})


def missing_shards(folder: str | Path, plan: Sequence[tuple[int, int]]) -> list[int]:
    """Return the indices into `plan`, the (h, w) of every shard, of shards that do not exist; raise
    InputError for a shard that the plan does not have."""
    present = shards(Path(folder))
    for index, hw, path in present:
        must(index < len(plan) and tuple(plan[index]) == hw,
             f"{path}: a shard that this run does not plan; take another folder")
    return sorted(set(range(len(plan))) - {index for index, _, _ in present})


def read_folder(folder: str | Path) -> Latents:
    """Return the latents of a folder, memory-mapped; raise InputError that names a file which is
    missing, truncated, misshapen or not finite."""
    folder = Path(folder)
    provenance = read_json(folder / "provenance.json", dict)
    prompts, tensors = read_prompt_files(folder)
    first = None
    parts = {}
    for _, hw, path in shards(folder):
        shard = read_own(path)
        check_shard(path, shard, hw, len(prompts), first)
        first = first or shard
        parts.setdefault(hw, []).append(shard)
    must(bool(parts), f"{folder} must have shards such as 00000-8x8.safetensors (got none)")
    buckets = {}
    images = {}
    for hw, some in sorted(parts.items()):
        buckets[hw] = joined(some, "x0"), torch.cat([shard["prompt_id"] for shard in some])
        if "image" in first:
            images[hw] = joined(some, "image")
    null = tensors["null_context"], tensors["null_pooled"]
    return Latents(prompts, *read_text(folder), tensors["codes"], null, buckets, provenance, images)


def identity(folder: Path) -> str:
    """Return what the header of each file in the folder says of it."""
    return fingerprint(folder / "provenance.json")


def read_own(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file; raise InputError unless it was written there, by this name."""
    tensors, header = read_tensors(path, renamed=False)
    must(header.get("folder", identity(path.parent)) == identity(path.parent),
         f"{path} belongs to another folder; put the original back, or remove it and make it again")
    return tensors


def read_prompt_files(folder: str | Path) -> tuple[list[str], dict[str, Tensor]]:
    """Return the content of prompts.json and of prompts.safetensors."""
    prompts = read_json(Path(folder) / "prompts.json", list)
    must(all(map(is_text, prompts)), f"{Path(folder) / 'prompts.json'} must be a list of texts")
    path = Path(folder) / "prompts.safetensors"
    tensors, _ = read_tensors(path)
    check_tensors(path, tensors, prompt_shapes(prompts))
    return prompts, tensors


def read_text(folder: str | Path) -> tuple[Tensor | Rows, Tensor | Rows]:
    """Return (context [p, l, dc], pooled [p, dp]) of all prompts, memory-mapped."""
    parts = []
    for path, shapes in text_files(folder):
        text = read_own(path)
        check_tensors(path, text, shapes)
        parts.append(text)
    return joined(parts, "context"), joined(parts, "pooled")


def joined(parts: list[dict[str, Tensor]], name: str) -> Tensor | Rows:
    """Return a tensor of all parts, joined along the first axis without a copy."""
    return Rows([part[name] for part in parts]) if len(parts) > 1 else parts[0][name]


Shapes = dict[str, tuple[int | str, ...]]    # by name; a letter stands for any size


def prompt_shapes(prompts: list[str]) -> Shapes:
    """Return the shapes in prompts.safetensors."""
    return {"codes": (len(prompts), "a"), "null_context": ("l", "dc"), "null_pooled": ("dp",)}


def text_files(folder: str | Path) -> list[tuple[Path, Shapes]]:
    """Return (path, shapes) of each file of text that the folder is to hold."""
    folder = Path(folder)
    prompts, tensors = read_prompt_files(folder)
    rows = read_json(folder / "provenance.json", dict).get("rows")
    must(type(rows) is int and rows > 0, f"{folder / 'provenance.json'}: rows must be a whole "
         f"number above 0 (got {rows!r})")
    files = []
    for i, first in enumerate(range(0, len(prompts), rows)):
        n = min(rows, len(prompts) - first)
        files.append((folder / f"text-{i:05d}.safetensors",
                      {"context": (n, *tensors["null_context"].shape),
                       "pooled": (n, *tensors["null_pooled"].shape)}))
    return files


def shards(folder: Path) -> list[tuple[int, tuple[int, int], Path]]:
    """Return (index, (h, w), path) of the shards in a folder, by index."""
    found = []
    for path in folder.glob("*"):
        if match := re.fullmatch(r"(\d{5,})-(\d+)x(\d+)\.safetensors", path.name):
            index, h, w = map(int, match.groups())
            found.append((index, (h, w), path))
    return sorted(found)


def check_shard(where: Path, tensors: dict[str, Tensor], hw: tuple = ("h", "w"),
                prompts: int | None = None, first: dict[str, Tensor] | None = None) -> None:
    """Raise InputError unless `tensors` are a shard of this latent size for so many prompts, with
    the channels of the shard `first`; None: any."""
    shapes = {"x0": ("n", first["x0"].shape[1] if first else "c", *hw), "prompt_id": ("n",)}
    if "image" in (first or tensors):
        shapes["image"] = "n", first["image"].shape[1] if first else "e", *hw
    check_tensors(where, tensors, shapes)
    for name, t in tensors.items():
        kind, ok = "floating-point", t.is_floating_point()
        if name == "prompt_id":
            kind, ok = "int64", t.dtype == torch.int64
        must(ok and t.numel() > 0, f"{where}: {name} must be {kind} and not empty (got {t.dtype} "
             f"{list(t.shape)})")
    low, high = int(tensors["prompt_id"].min()), int(tensors["prompt_id"].max())
    must(low >= 0 and (prompts is None or high < prompts),
         f"{where}: prompt_id must be rows of the {prompts} prompts (got {low} to {high})")


def check_tensors(where: Path, tensors: dict[str, Tensor], shapes: Shapes) -> None:
    """Raise InputError unless the tensors are finite and have these names and shapes, in which a
    letter has the same size wherever it occurs."""
    sizes = {}
    ok = set(tensors) == set(shapes)
    for name, sides in shapes.items():
        shape = tensors[name].shape if ok else ()
        ok &= len(shape) == len(sides)
        for size, side in zip(shape, sides):
            ok &= size == (sizes.setdefault(side, size) if isinstance(side, str) else side)
    wanted = ", ".join(f"{name} [{', '.join(map(str, sides))}]" for name, sides in shapes.items())
    found = ", ".join(f"{name} {list(t.shape)}" for name, t in tensors.items())
    must(ok, f"{where} must have {wanted} (got {found})")
    for name, tensor in tensors.items():
        # in parts, since a memory-mapped tensor may be larger than memory
        must(all(part.isfinite().all() for part in tensor.split(1024)),
             f"{where}: {name} must be finite (got NaN or inf)")
