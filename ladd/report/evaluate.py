"""Sample images for prompts and measure them against real images at equal n; measure the
discriminator, and warn of a collapse."""
import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ladd.core import flow
from ladd.core.discriminator import Discriminator
from ladd.core.losses import LaddConfig, draw, fake_pass, grid_of, hinge_d, tapped_features
from ladd.core.mmdit import MMDiT
from ladd.core.sampler import UNGUIDED, Recipe, evaluations, image_noise, sample
from ladd.data import masks
from ladd.data.prompts import Codec, Prompts, null_text
from ladd.data.shards import Latents
from ladd.engine import parallel
from ladd.engine.parallel import ranks
from ladd.report import metrics
from ladd.toy import grader, scenes
from ladd.toy.edits import KINDS, Edits
from ladd.toy.prompts import draw_prompts
from ladd.toy.scenes import ToyConfig


class Row(NamedTuple):
    """A row of a report: a network and how it is sampled."""
    name: str
    model: MMDiT
    sigmas: Tensor                   # final noise levels [steps + 1]
    sampler: str
    guidance: tuple[float, float]    # by the text, by the image

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1


class Reference(NamedTuple):
    """Real images (renders) to measure against, and the floor: the scores of the prompts' own
    renders."""
    features: tuple[Tensor, Tensor]    # [n, f] of renders of other scenes, in both feature spaces
    read: Tensor | None                # [n, A] attributes of the prompts' own renders (task text)
    floor: dict


# --- sampling ---

def generate(row: Row, codec: Codec, prompts: list[Prompts], seed: int, batch: int,
             advance: Callable[[int], object] | None = None) -> tuple[list[Tensor], float]:
    """Return (latents of each image size, seconds in the model). Image i of all sizes together
    starts from the noise of seed + i; `advance` is called with the number of images made.

    Processes share the prompts, in batches of one size, so that all call the model equally often
    and compiled graphs are reused (the last batches may repeat a prompt). Every process gets all
    latents; the seconds are those that one device would take.
    """
    device = next(row.model.parameters()).device
    rank, world = ranks()
    null = null_text(codec).to(device)
    out = []
    seconds = 0.0
    first = seed
    for part in prompts:
        n = len(part.captions)
        shape = row.model.config.out_channels, part.hw[0] // 8, part.hw[1] // 8
        batches = -(-n // (world * batch))      # per process
        size = -(-n // (world * batches))
        latents = []
        for i in range(rank * batches, (rank + 1) * batches):
            which = [k % n for k in range(i * size, (i + 1) * size)]
            text = codec.text([part.captions[k] for k in which])
            if part.image is not None:
                text = text._replace(image=part.image[which])
            text = text.to(device)
            seeds = [first + k for k in which]
            noise = image_noise(seeds, shape).to(device)
            start = time.perf_counter()
            x0 = sample(row.model, noise, text, row.sigmas, row.sampler, seeds, null, *row.guidance)
            latents.append(x0.cpu())            # waits for the device, so the time is whole
            seconds += (time.perf_counter() - start) * world
            if advance:
                advance(size * world)
        out.append(parallel.gathered(torch.cat(latents))[:n])
        first += n
    return out, seconds


def decoded(latents: list[Tensor], prompts: list[Prompts], codec: Codec,
            batch: int) -> list[Tensor]:
    """Return the images [n, 3, H, W] of each size. What a mask keeps is copied from the source."""
    def decode(x: Tensor) -> Tensor:
        return torch.cat([codec.decode(few) for few in x.split(batch)])

    out = []
    for x, part in zip(latents, prompts):
        images = decode(x)
        if part.mask is not None:
            images = masks.composite(decode(part.latents[:len(x)]), images, part.mask[:len(x)])
        out.append(images)
    return out


# --- scores of images ---

def features(images: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the features [n, f] of images of all sizes, in both feature spaces."""
    for x in images:
        if bad := int((~x.isfinite()).sum()):
            raise FloatingPointError(f"images: {bad} of {x.numel()} values are NaN or inf")
    # some at a time, so that activations stay in the cache of one core
    few = [part.float() for x in images for part in x.split(64)]
    return (torch.cat([metrics.features_random(x) for x in few]),
            torch.cat([metrics.features_hand(x) for x in few]))


def read_attributes(images: list[Tensor], prompts: list[Prompts]) -> Tensor:
    """Return the attributes [n, A] that the grader reads, told from the object that prompts name
    first."""
    codes = torch.cat([p.codes for p in prompts])
    objects = 1 if codes.shape[1] == 5 else 2
    return grader.align(torch.cat([grader.grade(x, objects) for x in images]), codes)


def grade_prompts(images: list[Tensor], prompts: list[Prompts], real: Tensor | None = None,
                  read: Tensor | None = None) -> dict:
    """Return how well images follow their prompts, for every task: prompt_accuracy, the share of
    images that show all that is asked and keep all else; accuracy, that of each attribute or kind
    of edit; and what a task adds. A value is None where no image counts.

    Text: entropy of the attributes that captions leave open, relative to those of `real` [n, A],
    and the share of readable images; `read` is read_attributes, if known. Editing: the shares of
    images that show what was asked and that keep what was not, and the mean error of the background
    (grader.grade_edit). Inpainting: the share of images with the stated attributes that the mask
    decides, among those with any, and the seam error along the mask's edge (grader.grade_inpaint).
    """
    def mean(x: Tensor) -> float | None:
        value = x.float().nanmean().item()
        return None if math.isnan(value) else value

    def joined(found: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {name: torch.cat([part[name] for part in found]) for name in found[0]}

    if isinstance(prompts[0].graded, Edits):
        found = joined([grader.grade_edit(x, p.graded) for x, p in zip(images, prompts)])
        success, kind = found["success"], torch.cat([p.graded.kind for p in prompts])
        more = {name: mean(found[name]) for name in ("asked", "kept", "background")}
        accuracy = {name: mean(success[kind == i]) for i, name in enumerate(KINDS)
                    if (kind == i).any()}
    elif prompts[0].mask is not None:
        found = joined([grader.grade_inpaint(x, p.graded, p.codes, p.mask)
                        for x, p in zip(images, prompts)])
        success, inside = found["success"], found["inside"]
        every = (found["right"] | ~inside).all(1)[inside.any(1)]
        more = {"inside": mean(every), "seam": mean(found["seam"])}
        accuracy = metrics.prompt_accuracy(found["graded"], found["want"])
    else:
        codes = torch.cat([p.codes for p in prompts])
        read = read_attributes(images, prompts) if read is None else read
        success = ((read == codes) | (codes < 0)).all(1)
        more = {} if real is None else {"entropy": metrics.attribute_entropy(read, codes, real)}
        more["readable"] = mean(read[:, -1] >= 0)
        accuracy = metrics.prompt_accuracy(read, codes)
    return {"prompt_accuracy": mean(success), **more, "accuracy": accuracy}


def score(images: list[Tensor], prompts: list[Prompts], reference: Reference,
          read: Tensor | None = None) -> dict:
    """Return the metrics of a set of images, one for each prompt; `read` as in grade_prompts."""
    feats, feats2 = features(images)
    density, coverage = metrics.density_coverage(reference.features[0], feats)
    return {"fd": metrics.frechet(reference.features[0], feats),
            "fd2": metrics.frechet(reference.features[1], feats2),
            "coverage": coverage, "density": density,
            **grade_prompts(images, prompts, reference.read, read)}


def make_reference(toy: ToyConfig, prompts: list[Prompts], n: int, seed: int) -> Reference:
    """Return n renders drawn like those of `prompts` from another seed, and the floor between the
    two sets."""
    others = features([scenes.decode(p.latents) for p in draw_prompts(toy, n, seed)])
    own = [scenes.decode(p.latents) for p in prompts]
    read = read_attributes(own, prompts) if toy.task == "text" else None
    reference = Reference(others, read, {})
    return reference._replace(floor=score(own, prompts, reference, read))


def measure(row: Row, codec: Codec, prompts: list[Prompts], reference: Reference | None, batch: int,
            seed: int = 0, advance: Callable[[int], object] | None = None) -> dict:
    """Return a row of report.json, sampled `batch` images at a time. Without a reference (real
    prompts) the scores are None."""
    latents, seconds = generate(row, codec, prompts, seed, batch, advance)
    scores = dict.fromkeys(("fd", "fd2", "prompt_accuracy", "coverage", "density"))
    if reference:
        scores = score(decoded(latents, prompts, codec, batch), prompts, reference)
    out = {"model": row.name, "sampler": row.sampler, "steps": row.steps,
           "guidance": row.guidance[0]}
    if prompts[0].image is not None and prompts[0].mask is None:
        out["image_guidance"] = row.guidance[1]
    return {**out, "nfe": row.steps * evaluations(*row.guidance), **scores,
            "ms_per_image": 1000 * seconds / sum(map(len, latents))}


# --- while training ---

def quality(recipe: Recipe, codec: Codec, student: MMDiT, prompts: list[Prompts],
            reference: Reference, batch: int) -> dict[str, float]:
    """Return the Frechet distance and the prompt accuracy at 1 step and at one per noise level."""
    out = {"floor_fd": reference.floor["fd"]}
    for steps in (1, len(recipe.levels)):
        row = Row("student", student, recipe.sigmas(steps), recipe.sampler, UNGUIDED)
        found = measure(row, codec, prompts, reference, batch)
        for name in ("fd", "prompt_accuracy", "entropy"):
            if name in found:
                out[f"{name}_{steps}"] = found[name]
    return out


@torch.no_grad()
def discriminator_metrics(student: MMDiT, teacher: MMDiT, heads: Discriminator, latents: Latents,
                          config: LaddConfig, batch: int) -> dict[str, float]:
    """Return how well the heads tell real from fake, on held-out latents of the first bucket,
    `batch` at a time.

    auc: held-out real against fake (near 0.5 the heads are too weak, near 1 too strong).
    auc_memory: real latents of training against held-out ones (above 0.5 the heads have memorised).
    auc_null: one half of the held-out real latents against the other (off 0.5: a leak). gap_k: mean
    logit of real less that of fake, of head k. hinge_0.125 to hinge_0.875: the hinge loss in the
    quarter of sigma_d around that value.
    """
    device = next(teacher.parameters()).device
    bucket = min(latents.buckets)
    size = len(latents.buckets[bucket][1])
    # an even number, for the two halves; fewer than 64 cannot tell an AUC from 1
    n = min(max(batch, 64), latents.holdout) // 2 * 2
    config = replace(config, distill_weight=0.0)

    def logits(first: int, fake: bool) -> tuple[Tensor, Tensor]:
        """Return logits [k, n, h, w] and sigma_d [n] of the n samples from `first` on."""
        parts, sigmas = [], []
        for i in range(0, n, batch):
            found = latents.gather(bucket, torch.arange(first + i, first + min(i + batch, n)))
            x0, text = found.x0.to(device), found.text.to(device)
            drawn = draw(x0, config.easy_steps, config, (first, fake), i, n)
            if fake:
                feats = fake_pass(student, teacher, heads, x0, text, drawn, config).feats
            else:
                xt = flow.noised(x0, drawn.eps_d, drawn.sigma_d)
                feats = tapped_features(teacher, heads, xt, drawn.sigma_d, text)
            out = heads(feats, drawn.sigma_d, text.pooled, grid_of(teacher, x0))
            parts.append(out.float().cpu())
            sigmas.append(drawn.sigma_d.cpu())
        return torch.cat(parts, 1), torch.cat(sigmas)

    held, sigma_r = logits(size - n, False)
    fake, sigma_f = logits(size - n, True)
    seen, _ = logits(0, False)
    # one value per sample
    held_mean, fake_mean, seen_mean = (x.mean((0, 2, 3)) for x in (held, fake, seen))
    out = {"auc_n": float(n), "auc": metrics.auc(held_mean, fake_mean),
           "auc_memory": metrics.auc(seen_mean, held_mean),
           "auc_null": metrics.auc(held_mean[::2], held_mean[1::2])}
    out |= {f"gap_{k}": float(held[k].mean() - fake[k].mean()) for k in range(len(held))}
    for low in (0.0, 0.25, 0.5, 0.75):
        r, f = ((s >= low) & (s < low + 0.25) for s in (sigma_r, sigma_f))
        if r.any() and f.any():
            out[f"hinge_{low + 0.125:g}"] = float(hinge_d(held[:, r], fake[:, f]))
    return out


def batch_metrics(stats: dict[str, Tensor]) -> dict[str, float]:
    """Return the discriminator's metrics on the training batch of all processes: shares of logits
    with an active hinge (1 - D > 0 for real, 1 + D > 0 for fake; at 0 there is nothing left to
    learn) and on the right side of 0, and the gap between the mean logits."""
    real, fake, mismatched = (stats[f"logits_{name}"] for name in ("real", "fake", "mismatched"))
    line = {"margin_real": (real < 1).float().mean(), "margin_fake": (fake > -1).float().mean(),
            "accuracy_real": (real > 0).float().mean(), "accuracy_fake": (fake < 0).float().mean(),
            "gap": real.mean() - fake.mean(), "right": 0.0, "count": 0.0}
    if mismatched is not None:
        line["right"] = (mismatched < 0).float().mean((0, 2, 3)).sum()        # over the samples
        line["count"] = mismatched.shape[1]
    line = parallel.mean({name: float(value) for name, value in line.items()})
    # a process, or a small batch, may have no mismatched captions: their mean is taken over all
    right, count = line.pop("right"), line.pop("count")
    if count:
        line["accuracy_mismatched"] = right / count
    return line


def collapse_warnings(values: dict[str, float], before: dict[str, float] = {}) -> list[str]:
    """Return what in a line of log.jsonl, or in an evaluation, indicates a collapse, in words.
    `before`: the first evaluation. The thresholds are our choice.

    An AUC of n against n samples is off 0.5 from five standard deviations on, each 1 / sqrt(6 n).
    """
    found = []
    for name, value in values.items():
        if name.startswith("entropy_") and value < min(0.8, before.get(name, 1.0)):
            found.append(f"{name} is {value:.2f}, below 0.8 of the data's: images become alike")
    if "margin_real" in values and max(values["margin_real"], values["margin_fake"]) < 0.05:
        found.append("active margins are below 0.05: the heads win")
    if "auc" in values:
        auc, memory, null = values["auc"], values["auc_memory"], values["auc_null"]
        off = 5 / math.sqrt(6 * values["auc_n"])
        if auc > 0.995:
            found.append(f"AUC on held-out latents is {auc:.3f}: the heads win")
        if auc < 0.5 - off:
            found.append(f"AUC on held-out latents is {auc:.3f}: the heads are lost")
        if memory > 0.5 + off:
            found.append(f"training reals against held-out ones have AUC {memory:.3f}: the heads "
                         "have memorised")
        # each half has n / 2
        if abs(null - 0.5) > off * math.sqrt(2):
            found.append(f"real against real has AUC {null:.3f}: something leaks")
    return found
