"""Prompts: read from files, planned as shards of latents, and the codec that encodes them."""
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ladd.cli import must
from ladd.core.mmdit import Text, image_channels
from ladd.data.files import read_lines, read_objects
from ladd.data.shards import Latents


def read_prompts(path: str | Path) -> tuple[list[str], list[str]]:
    """Return (prompts, notes) of a .txt file, one prompt per line, or a .jsonl, .json or .csv file
    that read_objects reads. Notes count empty lines, # comments of .txt and empty prompts."""
    kind = Path(path).suffix.lower()
    must(kind in (".txt", ".jsonl", ".json", ".csv"), f"{path} must be a .txt file with one prompt "
         "per line, or .jsonl, .json or .csv with a prompt, text or caption each (got "
         f"{kind or 'no ending'})")
    # the last line is what follows the last newline, not an empty line
    lines = read_lines(path) if kind in (".txt", ".jsonl") else []
    counts = {"empty lines skipped": lines[:-1].count("")}
    if kind == ".txt":
        for number, line in enumerate(lines, 1):
            must(not re.match(r'[{[]\s*(["{}\[\]]|$)', line), f"{path}: line {number} is JSON, not "
                 f"a prompt (got {line[:60]!r}); let the file's name end in .jsonl or .json")
        prompts = [line for line in lines if line and line[0] != "#"]
        counts["comments skipped"] = sum(line[:1] == "#" for line in lines)
    else:
        prompts = [found["prompt"] for found in read_objects(path, ["prompt"])]
        counts["empty prompts kept"] = sum(not prompt.strip() for prompt in prompts)
    must(bool(prompts), f"{path} must have at least one prompt, one per line (got none)")
    return prompts, [f"{path}: {n} {what}" for what, n in counts.items() if n]


class Codec(NamedTuple):
    """Text encoders and autoencoder, of SD3 or of the toy dataset. Results are on the CPU."""
    fresh_text: Callable[[list[str]], Text] # text of prompts; "" is the null prompt
    text: Callable[[list[str]], Text]       # the same, from a cache where a prompt was seen before
    decode: Callable[[Tensor], Tensor]      # [b, 16, h, w] to images [b, 3, 8h, 8w] in [-1, 1]
    encode: Callable[[Tensor], Tensor]      # latents of images; the mean of a VAE's distribution
    release: Callable[[], None]             # frees the text encoders until they are needed again
    widths: tuple[int, int]                 # of a text token and of the pooled text
    provenance: Callable[[], dict]          # identifies the encoders whose text this is


def null_text(codec: Codec) -> Text:
    """Return the text of the empty prompt: context [l, context_dim], pooled [pooled_dim]."""
    return codec.text([""]).map(lambda t: t[0])


class Shard(NamedTuple):
    """One file of latents to generate."""
    hw: tuple[int, int]     # latent size
    prompt_id: Tensor       # [n] rows of Plan.prompts
    seed: int               # of the noise of the first sample; the next one has seed + 1
    image: Callable[[], Tensor] | None = None    # returns the image conditioning [n, e, h, w]


class Plan(NamedTuple):
    """The latents to generate; the teacher and how it samples are not part of it."""
    prompts: list[str]      # distinct
    codes: Tensor           # [p, a], see Latents
    shards: list[Shard]
    provenance: dict        # identifies the plan


def prompt_plan(prompts: list[str], sizes: Sequence[tuple[int, int]], count: int, shard: int,
                seed: int) -> Plan:
    """Return the plan of `count` samples, from the noise of seed + i. They cycle through `prompts`,
    shards through the image sizes (in pixels)."""
    distinct = list(dict.fromkeys(prompts))
    number = {prompt: i for i, prompt in enumerate(distinct)}
    ids = torch.tensor([number[prompts[i % len(prompts)]] for i in range(count)])
    # If the cycles of prompts and sizes have a common end, each prompt would always have the same
    # size; then every pass over the prompts starts with the next size.
    common = len(prompts) % (shard * len(sizes)) == 0
    shards = []
    for i in range(0, count, shard):
        passes = i // len(prompts) if common else 0
        h, w = sizes[(i // shard + passes) % len(sizes)]
        shards.append(Shard((h // 8, w // 8), ids[i:i + shard], seed + i))
    # Without attributes the only code of a prompt is its number.
    codes = torch.arange(len(distinct))[:, None]
    return Plan(distinct, codes, shards, {"seed": seed, "shards": len(shards), "shard": shard})


def pairs_plan(pairs: Latents, count: int, shard: int, seed: int) -> Plan:
    """Return the plan of `count` samples for the pairs that are not held out, from the noise of
    seed + i. Shards cycle through the sizes, and each size through its samples."""
    sizes = list(pairs.buckets)
    shards = []
    first = dict.fromkeys(sizes, 0)
    for i in range(0, count, shard):
        hw = sizes[i // shard % len(sizes)]
        n = len(pairs.buckets[hw][1]) - pairs.holdout
        rows = (first[hw] + torch.arange(min(shard, count - i))) % n
        first[hw] += shard
        shards.append(Shard(hw, pairs.buckets[hw][1][rows], seed + i,
                            lambda hw=hw, rows=rows: pairs.images[hw][rows].float()))
    return Plan(pairs.prompts, pairs.codes, shards,
                {"seed": seed, "shards": len(shards), "shard": shard, "pairs": pairs.provenance})


class Prompts(NamedTuple):
    """Prompts of one image size, each with the latents of an image that fits it."""
    hw: tuple[int, int]             # in pixels
    codes: Tensor                   # [n, a], see Latents
    captions: list[str]
    latents: Tensor                 # [n, 16, H/8, W/8]
    image: Tensor | None = None     # [n, e, H/8, W/8], the image conditioning
    mask: Tensor | None = None      # bool [n, H, W], True where the image is repainted
    graded: Any = None              # toy dataset: what the grader compares results with


def given_prompts(sizes: Sequence[tuple[int, int]], captions: list[str]) -> list[Prompts]:
    """Return the user's prompts, cycling through the image sizes, without codes and latents."""
    parts = [captions[i::len(sizes)] for i in range(len(sizes))]
    empty = torch.empty(0, dtype=torch.int64)
    return [Prompts(hw, empty, part, empty) for hw, part in zip(sizes, parts) if part]


def held_out(latents: Latents, n: int) -> list[Prompts]:
    """Return about n held-out pairs, at least one of each size; others may have their sources."""
    parts = []
    each = max(1, n // len(latents.buckets))
    for (h, w), (x0, prompt_id) in latents.buckets.items():
        rows = torch.arange(len(prompt_id) - min(each, latents.holdout), len(prompt_id))
        image = latents.images[h, w][rows].float()
        mask = None
        if image.shape[1] > image_channels("edit"):
            mask = image[:, 0].bool().repeat_interleave(8, 1).repeat_interleave(8, 2)
        captions = [latents.prompts[i] for i in prompt_id[rows]]
        parts.append(Prompts((8 * h, 8 * w), prompt_id[:0], captions, x0[rows].float(), image,
                             mask))
    return parts
