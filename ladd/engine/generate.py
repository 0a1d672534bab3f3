"""Generate synthetic data: latents of the teacher with guidance, as shards (ladd/data/shards.py).

The second stage of train.py and sample.py --save-latents use it. A sample is a function of its
prompt, size and seed, so shards can be made in any order and by any number of processes, and an
interrupted folder is completed.
"""
import hashlib
from collections.abc import Callable
from pathlib import Path

import torch

from ladd.core import flow
from ladd.core.mmdit import MMDiT, Text
from ladd.core.sampler import image_noise, sample
from ladd.data import shards
from ladd.data.prompts import Codec, Plan
from ladd.engine.parallel import any_rank, barrier, ranks
from ladd.engine.run import Stopper, progress


def weights_sha(model: MMDiT) -> str:
    """Return a fingerprint of the weights, which tells one teacher's latents from another's."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        for part in tensor.split(4096):     # so that a memory-mapped tensor is never all in memory
            digest.update(part.cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def generate_latents(folder: Path, plan: Plan, weights: MMDiT, prepare: Callable[[MMDiT], MMDiT],
                     codec: Codec, steps: int, shift: float, guidance: tuple[float, float],
                     batch: int, real: bool, stopper: Stopper,
                     heartbeat: Callable[[int], None] = lambda done: None) -> bool:
    """Fill `folder` with the plan's text and latents, by Euler over `steps` levels.

    Return True when the folder is complete, False after a signal, which is looked for before each
    file. Text is encoded first; then the encoders are released and `prepare` puts the teacher on
    its device, which generates `batch` samples at a time. Each process makes every world-th file
    and calls `heartbeat` with the number of files it has made. Raise InputError if the folder was
    made in another way.
    """
    rank, world = ranks()
    # prompts per file of text, and the dtype of latents
    rows, dtype = (256, torch.bfloat16) if real else (1024, torch.float32)
    if rank == 0:
        null = codec.fresh_text([""])
        made = {"sampler": "euler", "steps": steps, "guidance": guidance[0], "shift": shift,
                **({"image_guidance": guidance[1]} if plan.shards[0].image else {}),
                **plan.provenance, "teacher": weights_sha(weights), **codec.provenance()}
        shards.open_folder(folder, made, plan.prompts, plan.codes,
                           (null.context[0], null.pooled[0]), rows)
    barrier()      # wait for the folder
    missing = shards.missing_text(folder)
    barrier()      # every process has the same list before one of them writes
    mine = missing[rank::world]
    with progress("text", len(mine) * rows, quiet=rank or not mine) as bar:
        for done, i in enumerate(mine):
            if stopper:
                break
            heartbeat(done)
            text = codec.fresh_text(plan.prompts[i * rows:(i + 1) * rows])
            shards.write_text(folder, i, text.context, text.pooled)
            bar.update(rows)
    codec.release()
    if any_rank(bool(stopper)):
        return False
    missing = shards.missing_shards(folder, [shard.hw for shard in plan.shards])
    barrier()
    mine = missing[rank::world]
    if mine:
        model, text = prepare(weights), Text(*shards.read_text(folder))
        device, channels = next(model.parameters()).device, model.config.out_channels
        _, tensors = shards.read_prompt_files(folder)
        null = Text(tensors["null_context"].to(device), tensors["null_pooled"].to(device))
        sigmas = flow.euler_sigmas(steps, shift)
    total = sum(len(shard.prompt_id) for shard in plan.shards)
    left = sum(len(plan.shards[i].prompt_id) for i in missing)
    text_files = -(-len(plan.prompts) // rows)
    with progress("data", total, total - left, quiet=rank or not mine) as bar:
        for done, i in enumerate(mine, text_files):
            if stopper:
                break
            heartbeat(done)
            hw, ids, seed, image = plan.shards[i]
            image = image and image()
            parts = []
            for j in range(0, len(ids), batch):
                few = ids[j:j + batch]
                seeds = list(range(seed + j, seed + j + len(few)))
                own = None if image is None else image[j:j + batch]
                conditioning = Text(text.context[few], text.pooled[few], own).to(device)
                noise = image_noise(seeds, (channels, *hw)).to(device)
                x0 = sample(model, noise, conditioning, sigmas, "euler", seeds, null, *guidance)
                parts.append(x0.cpu())
                bar.update(len(few) * world)    # an estimate: the other processes are as fast
            shards.write_shard(folder, i, torch.cat(parts).to(dtype), ids,
                               None if image is None else image.to(dtype))
    return not any_rank(bool(stopper))
