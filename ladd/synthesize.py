"""Synthetic data: latents that the teacher generates with guidance, as shards (ladd/data.py).

train.py's second stage and sample.py --save-latents are this code. Every sample follows from its prompt, size
and seed, so shards are made in any order, by any number of processes, and an interrupted folder is completed.
"""
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ladd import data, flow
from ladd.config import Config
from ladd.distill import Text, TextImage
from ladd.domain import Domain
from ladd.evaluate import codes_of, draw_prompts
from ladd.mmdit import MMDiT
from ladd.parallel import agree, ranks
from ladd.run import progress
from ladd.sampler import image_noise, sample


class Shard(NamedTuple):
    hw: tuple[int, int]     # latent size
    prompt_id: Tensor       # [n]
    seed: int               # of the first sample; the others count on
    image: Callable[[], Tensor] | None = None    # [n, e, h, w], what the teacher reads beside the noise


class Plan(NamedTuple):
    """What to generate: all but the teacher and how it samples."""
    prompts: list[str]      # distinct
    codes: Tensor           # [p, a]
    shards: list[Shard]
    provenance: dict        # of the plan


def world_plan(config: Config) -> Plan:
    """`data_size` captions of the built-in world; shards take the image sizes in turn."""
    n, sizes = config.data_batch, [(h // 8, w // 8) for h, w in config.hw]
    count = -(-config.data_size // n)
    parts = draw_prompts(config, n * -(-count // len(sizes)) * len(sizes), config.seed + 1)
    prompts = sorted({caption for part in parts for caption in part.captions})
    number = {caption: i for i, caption in enumerate(prompts)}
    shards = []
    for i in range(count):
        part, first = parts[i % len(sizes)], i // len(sizes) * n
        ids = torch.tensor([number[caption] for caption in part.captions[first:first + n]])
        image = None if part.image is None else (lambda part=part, first=first: part.image[first:first + n])
        shards.append(Shard(sizes[i % len(sizes)], ids, config.seed * 10 ** 9 + 10 ** 8 + i * n, image))
    return Plan(prompts, codes_of(config, prompts), shards,
                {"seed": config.seed, "shards": count, "shard": n})


def prompt_plan(prompts: list[str], sizes: Sequence[tuple[int, int]], count: int, shard: int,
                seed: int) -> Plan:
    """`count` samples of given prompts in turn, sample i from the noise of seed + i; shards take the image
    sizes (in pixels) in turn."""
    distinct = list(dict.fromkeys(prompts))
    number = {prompt: i for i, prompt in enumerate(distinct)}
    ids = torch.tensor([number[prompts[i % len(prompts)]] for i in range(count)])
    shards, same = [], len(prompts) % (shard * len(sizes)) == 0      # then a prompt would keep its size
    for i in range(0, count, shard):
        h, w = sizes[(i // shard + same * (i // len(prompts))) % len(sizes)]
        shards.append(Shard((h // 8, w // 8), ids[i:i + shard], seed + i))
    codes = torch.arange(len(distinct))[:, None]                     # without attributes: the prompt's number
    return Plan(distinct, codes, shards, {"seed": seed, "shards": len(shards), "shard": shard})


def pairs_plan(pairs: data.Latents, count: int, shard: int, seed: int) -> Plan:
    """`count` samples for the prompts and images of a folder for editing or inpainting, without its held-out
    samples; sample i from the noise of seed + i. The sizes take turns, each beginning anew at its end."""
    sizes, shards, first = list(pairs.buckets), [], dict.fromkeys(pairs.buckets, 0)
    for i in range(0, count, shard):
        hw = sizes[i // shard % len(sizes)]
        n = len(pairs.buckets[hw][1]) - pairs.holdout
        rows = (first[hw] + torch.arange(min(shard, count - i))) % n
        first[hw] += shard
        shards.append(Shard(hw, pairs.buckets[hw][1][rows], seed + i,
                            lambda hw=hw, rows=rows: pairs.images[hw][rows].float()))
    return Plan(pairs.prompts, pairs.codes, shards, {"seed": seed, "shards": len(shards), "shard": shard,
                                                     "pairs": pairs.provenance})


def weights_sha(model: MMDiT) -> str:
    """A fingerprint of the weights, so that latents of another teacher are not mistaken for its own."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        for part in tensor.split(4096):                              # a mapped tensor is read piece by piece
            digest.update(part.cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def synthesize(folder: Path, plan: Plan, weights: MMDiT, prepare: Callable[[MMDiT], MMDiT],
               domain: Domain, steps: int, shift: float, guidance: tuple[float, float], batch: int,
               dtype: torch.dtype, rows: int = 1024, stopped: Callable[[], bool] = lambda: False,
               reach: Callable[[int], None] = lambda done: None) -> bool:
    """Fills `folder` with the plan's text and latents (in `dtype`) by Euler over `steps` levels; True when it
    is whole, False when `stopped` said so before a file. `reach` hears how many files this process has done.

    Text is encoded first and stored, `rows` prompts a file; then the encoders are released and `prepare` puts
    the teacher on its device, `batch` samples at a time. Each process takes every world-th file.
    Raises InputError where the folder was made another way.
    """
    rank, world = ranks()
    if rank == 0:
        null = domain.encode([""])
        made = {"sampler": "euler", "steps": steps, "guidance": guidance[0], "shift": shift,
                **({"image_guidance": guidance[1]} if plan.shards[0].image else {}),
                **plan.provenance, "teacher": weights_sha(weights), **domain.provenance}
        data.open_folder(folder, made, plan.prompts, plan.codes, (null.context[0], null.pooled[0]), rows)
    agree()                                                          # the folder is there
    missing = data.missing_text(folder)
    agree()                                                          # all have looked before one writes
    mine = missing[rank::world]
    with progress("text", len(mine) * rows, quiet=rank or not mine) as bar:
        for done, i in enumerate(mine):
            if stopped():
                break
            reach(done)
            data.write_text(folder, i, *domain.encode(plan.prompts[i * rows:(i + 1) * rows]))
            bar.update(rows)
    domain.release()
    if agree(stopped()):
        return False
    missing = data.missing_shards(folder, [shard.hw for shard in plan.shards])
    agree()
    mine = missing[rank::world]
    if mine:
        model, text = prepare(weights), Text(*data.read_text(folder))
        device, channels = next(model.parameters()).device, model.config.out_channels
        _, tensors = data.read_prompts(folder)
        null = Text(tensors["null_context"].to(device), tensors["null_pooled"].to(device))
        sigmas = flow.euler_levels(steps, shift)
    whole = sum(len(shard.prompt_id) for shard in plan.shards)
    left = sum(len(plan.shards[i].prompt_id) for i in missing)
    with progress("data", whole, whole - left, quiet=rank or not mine) as bar:
        for done, i in enumerate(mine, -(-len(plan.prompts) // rows)):
            if stopped():
                break
            reach(done)
            hw, ids, seed, image = plan.shards[i]
            image, parts = image and image(), []
            for j in range(0, len(ids), batch):
                few = ids[j:j + batch]
                seeds = list(range(seed + j, seed + j + len(few)))
                read = Text(text.context[few].to(device), text.pooled[few].to(device))
                if image is not None:
                    read = TextImage(*read, image[j:j + batch].to(device))
                noise = image_noise(seeds, (channels, *hw)).to(device)
                parts.append(sample(model, noise, read, sigmas, "euler", seeds, null, *guidance).cpu())
                bar.update(len(few) * world)                         # the others are as fast
            data.write_shard(folder, i, torch.cat(parts).to(dtype), ids,
                             image if image is None else image.to(dtype))
    return not agree(stopped())
