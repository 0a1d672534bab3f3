"""Prompts of the built-in world, samples for them, and one row of the report:
quality against renders at equal n."""
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ladd import encode, flow, metrics, parallel, report, shapes, tasks
from ladd.config import Config
from ladd.data import Latents
from ladd.discriminator import Discriminator
from ladd.distill import DistillConfig, Text, TextImage, draw, fake_pass, grid_of, hinge_d, taps_of
from ladd.domain import Domain, world_domain
from ladd.mmdit import MMDiT
from ladd.parallel import ranks
from ladd.report import contact_sheet, save_png
from ladd.run import command, curves, device_name, levels_of, progress, step_counts
from ladd.sampler import evaluations, image_noise, sample


# seeds of prompts: beyond any --seed, so never those of training
VALIDATION, BEST, REPORT, REAL = range(2 ** 40, 2 ** 40 + 4)
SCORES = "fd", "fd2", "prompt_accuracy", "coverage", "density"


class Prompts(NamedTuple):
    """Prompts of one image size, with one render that fits each."""
    hw: tuple[int, int]
    codes: Tensor       # [n, A] what the captions state
    captions: list[str]
    latents: Tensor     # [n, 16, H/8, W/8] of the renders
    image: Tensor | None = None                   # [n, e, H/8, W/8], what the network reads beside the noise
    mask: Tensor | None = None                    # bool [n, H, W], True where the picture is repainted
    graded: tasks.Edits | shapes.Scenes | None = None  # what the results are graded by


def draw_prompts(config: Config, n: int, seed: int, heldout: bool = False) -> list[Prompts]:
    """n prompts drawn like the world's captions, split evenly over the image sizes; for editing pairs with
    their instructions, for inpainting captions with masks. A pure function of its arguments."""
    parts = []
    for i, hw in enumerate(config.hw):
        g = torch.Generator().manual_seed(seed * 1009 + i)
        count = n // len(config.hw) + (i < n % len(config.hw))
        if config.task == "edit":
            pairs = tasks.edits(count, hw, config.objects, g)
            source, target = (rendered(s, hw)[0] for s in (pairs.source, pairs.target))
            parts.append(Prompts(hw, codes_of(config, pairs.texts), pairs.texts, target, source, None, pairs))
            continue
        scenes = shapes.sample_scenes(count, hw, config.objects, g, heldout)
        codes = shapes.draw_captions(scenes.attributes, g, config.stated)
        captions = [shapes.caption(c, config.objects) for c in codes]
        mask, graded = (tasks.masks(count, hw, g), scenes) if config.task == "inpaint" else (None, None)
        latents, image = rendered(scenes, hw, mask)
        parts.append(Prompts(hw, codes, captions, latents, image, mask, graded))
    return parts


def rendered(scenes: shapes.Scenes, hw: tuple[int, int],
             mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """(latents [n, 16, H/8, W/8] of scenes, what a network reads beside the noise where `mask` is given),
    some at a time: pictures take twelve times the memory."""
    latents, beside = [], []
    for i in range(0, max(1, len(scenes.attributes)), 1024):
        images = shapes.render(shapes.Scenes(*(t[i:i + 1024] for t in scenes)), hw)
        latents.append(shapes.encode(images))
        if mask is not None:
            beside.append(tasks.beside(shapes.encode, images, mask[i:i + 1024]))
    return torch.cat(latents), torch.cat(beside) if beside else None


def codes_of(config: Config, captions: list[str]) -> Tensor:
    """[n, a] what captions or instructions state, -1 where they leave it open."""
    if config.task == "edit":
        return tasks.instruction_codes(captions, config.objects)
    return torch.tensor([shapes.parse(caption, config.objects) for caption in captions])


def given_prompts(config: Config, captions: list[str]) -> list[Prompts]:
    """Prompts from outside the world, the image sizes in turn: without codes, without renders."""
    parts = [captions[i::len(config.hw)] for i in range(len(config.hw))]
    empty = torch.empty(0, dtype=torch.int64)
    return [Prompts(hw, empty, part, empty) for hw, part in zip(config.hw, parts) if part]


def held_out(latents: Latents, n: int) -> list[Prompts]:
    """The last samples of a folder for editing or inpainting, about n in all, at least one a size. They never
    train; another pair of the same source may."""
    parts, each = [], max(1, n // len(latents.buckets))
    for (h, w), (x0, prompt_id) in latents.buckets.items():
        rows = torch.arange(len(prompt_id) - min(each, latents.holdout), len(prompt_id))
        image, mask = latents.images[h, w][rows].float(), None
        if image.shape[1] > len(shapes.CHANNELS):
            mask = image[:, 0].bool().repeat_interleave(8, 1).repeat_interleave(8, 2)
        captions = [latents.prompts[i] for i in prompt_id[rows]]
        parts.append(Prompts((8 * h, 8 * w), prompt_id[:0], captions, x0[rows].float(), image, mask))
    return parts


def shown_prompts(config: Config, pairs: Latents | None) -> list[Prompts]:
    """What the grids show, and of real prompts the report."""
    if not config.real:
        return draw_prompts(config, 4 * len(config.hw), VALIDATION)
    return held_out(pairs, 8) if pairs else given_prompts(config, report_prompts(config))


def generate(model: MMDiT, domain: Domain, prompts: list[Prompts], sigmas: Tensor, sampler: str,
             guidance: tuple[float, float], seed: int, batch: int,
             progress: Callable[[int], None] = lambda n: None) -> tuple[list[Tensor], float]:
    """(latents per size, seconds in the model); prompt i of all starts from the noise of seed + i. guidance:
    by the text, by the image.

    Processes share the prompts, in batches of one size, so that all call the model equally often and compiled
    graphs are reused (the last ones may repeat a prompt), and all get all latents; the seconds are those for
    one device."""
    device, channels, (rank, world) = next(model.parameters()).device, model.config.out_channels, ranks()
    null = Text(*(t[0].to(device) for t in domain.embed([""])))
    out, seconds, first = [], 0.0, seed
    for part in prompts:
        latents, shape = [], (channels, part.hw[0] // 8, part.hw[1] // 8)
        n = len(part.captions)
        batches = -(-n // (world * batch))
        size = -(-n // (world * batches))
        for first_of in range(rank * batches * size, (rank + 1) * batches * size, size):
            few = [i % n for i in range(first_of, first_of + size)]
            captions = [part.captions[i] for i in few]
            text = Text(*(t.to(device) for t in domain.embed(captions)))
            if part.image is not None:
                text = TextImage(*text, part.image[few].to(device))
            seeds = [first + i for i in few]
            noise = image_noise(seeds, shape).to(device)
            start = time.perf_counter()
            latents.append(sample(model, noise, text, sigmas, sampler, seeds, null, *guidance).cpu())
            seconds += (time.perf_counter() - start) * world
            progress(len(captions) * world)
        out.append(parallel.gathered(torch.cat(latents))[:n])
        first += len(part.captions)
    return out, seconds


class Reference(NamedTuple):
    """Renders to measure against, and the floor:
    the prompts' own renders, measured like a model's samples."""
    features: tuple[Tensor, Tensor]    # [n, f] of renders of other scenes, in both feature spaces
    grades: Tensor                     # [n, A] of the prompts' own renders
    floor: dict


def decoded(latents: list[Tensor], prompts: list[Prompts], domain: Domain, batch: int) -> list[Tensor]:
    """Images [n, 3, H, W] of each size; what a mask keeps is the source's."""
    decode, out = lambda x: torch.cat([domain.decode(few) for few in x.split(batch)]), []
    for x, part in zip(latents, prompts):
        images = decode(x)
        if part.mask is not None:
            images = tasks.composite(decode(part.latents[:len(x)]), images, part.mask[:len(x)])
        out.append(images)
    return out


def readings(images: list[Tensor], objects: int) -> Tensor:
    return torch.cat([shapes.grade(x, objects) for x in images])


def features(images: list[Tensor]) -> tuple[Tensor, Tensor]:
    gather = lambda f: torch.cat([f(x) for x in images])
    return gather(metrics.features_random), gather(metrics.features_hand)


def score(images: list[Tensor], prompts: list[Prompts], objects: int, reference: Reference) -> dict:
    """The metrics of one set of pictures, one for each prompt."""
    feats, feats2 = features(images)
    density, coverage = metrics.density_coverage(reference.features[0], feats)
    return {"fd": metrics.frechet(reference.features[0], feats),
            "fd2": metrics.frechet(reference.features[1], feats2),
            "coverage": coverage, "density": density, **grades(images, prompts, objects, reference.grades)}


def grades(images: list[Tensor], prompts: list[Prompts], objects: int, real: Tensor) -> dict:
    """How images follow their prompts. prompt_accuracy: share of them with all that is asked, and all else as
    it was. entropy: of what captions leave open, against `real`.

    Editing: shares of images that show what was asked, that keep what was not, and the mean error of paper
    (tasks.grade_edit). Inpainting: share of images with the stated attributes that the mask decides, of those
    with any; seam error along the mask's edge (tasks.grade_inpaint). None where no image counts.
    """
    def mean(x: Tensor) -> float | None:
        value = x.float().nanmean().item()
        return None if math.isnan(value) else value

    if isinstance(prompts[0].graded, tasks.Edits):
        found = [tasks.grade_edit(x, p.graded) for x, p in zip(images, prompts)]
        asked, kept, background, success = (torch.cat([f[k] for f in found])
                                            for k in ("asked", "kept", "background", "success"))
        kind = torch.cat([p.graded.kind for p in prompts])
        each = {name: mean(success[kind == i]) for i, name in enumerate(tasks.KINDS) if (kind == i).any()}
        return {"prompt_accuracy": mean(success), "asked": mean(asked), "kept": mean(kept),
                "background": mean(background), "accuracy": each}
    if prompts[0].mask is not None:
        found = [tasks.grade_inpaint(x, p.graded, p.codes, p.mask) for x, p in zip(images, prompts)]
        names = "graded", "want", "inside", "right", "success", "seam"
        read, want, inside, right, success, seam = (torch.cat([f[k] for f in found]) for k in names)
        every = (right | ~inside).all(1)[inside.any(1)]
        return {"prompt_accuracy": mean(success), "inside": mean(every), "seam": mean(seam),
                "accuracy": metrics.prompt_accuracy(read, want)}
    codes = torch.cat([p.codes for p in prompts])
    read = shapes.align(readings(images, objects), codes)
    accuracy = metrics.prompt_accuracy(read, codes)
    return {"prompt_accuracy": accuracy["all"], "entropy": metrics.attribute_entropy(read, codes, real),
            "readable": mean(read[:, -1] >= 0), "accuracy": accuracy}


def make_reference(config: Config, prompts: list[Prompts], n: int, seed: int) -> Reference:
    """n renders drawn like those of `prompts` from another seed, and the floor between the two sets."""
    others, own = ([shapes.decode(p.latents) for p in some]
                   for some in (draw_prompts(config, n, seed), prompts))
    codes = torch.cat([p.codes for p in prompts])
    real = codes if config.task != "text" else shapes.align(readings(own, config.objects), codes)
    reference = Reference(features(others), real, {})
    return reference._replace(floor=score(own, prompts, config.objects, reference))


def measure(model: MMDiT, config: Config, domain: Domain, prompts: list[Prompts],
            reference: Reference | None, steps: int, sampler: str, guidance: tuple[float, float] = (1.0, 1.0),
            levels: tuple[float, ...] | None = None, seed: int = 0,
            progress: Callable[[int], None] = lambda n: None) -> dict:
    """One row: `steps` levels evenly spaced, or the given unshifted ones; images by `sampler`. Without a
    reference, outside the built-in world, what would need one is None."""
    sigmas = flow.euler_levels(steps, config.shift) if levels is None else \
        flow.shift(torch.tensor((*levels, 0.0)), config.shift)
    latents, seconds = generate(model, domain, prompts, sigmas, sampler, guidance, seed, config.eval_batch,
                                progress)
    row = dict.fromkeys(SCORES)
    if reference:
        images = decoded(latents, prompts, domain, config.eval_batch)
        row = score(images, prompts, config.objects, reference)
    n = sum(len(p.captions) for p in prompts)
    by_image = {"image_guidance": guidance[1]} if config.task == "edit" else {}
    return {"sampler": sampler, "steps": steps, "guidance": guidance[0], **by_image,
            "nfe": steps * evaluations(*guidance), **row, "ms_per_image": 1000 * seconds / n}


def quality(config: Config, domain: Domain, student: MMDiT, prompts: list[Prompts],
            reference: Reference) -> dict[str, float]:
    """Frechet distance and prompt accuracy at 1 step and at all levels."""
    out = {"floor_fd": reference.floor["fd"]}
    for steps in (1, len(config.levels)):
        row = measure(student, config, domain, prompts, reference, steps, config.sampler,
                      levels=levels_of(config.levels, steps))
        out |= {f"fd_{steps}": row["fd"], f"prompt_accuracy_{steps}": row["prompt_accuracy"],
                **({f"entropy_{steps}": row["entropy"]} if "entropy" in row else {})}
    return out


def pictures(config: Config, domain: Domain, model: MMDiT, prompts: list[Prompts], sigmas: Tensor,
             sampler: str, guidance: tuple[float, float] = (1.0, 1.0)) -> list[Tensor]:
    latents, _ = generate(model, domain, prompts, sigmas, sampler, guidance, 0, config.eval_batch)
    return [image for images in decoded(latents, prompts, domain, config.eval_batch) for image in images]


def sources(domain: Domain, prompts: list[Prompts]) -> dict[str, list[Tensor]]:
    """What the networks are shown beside the noise: sources, or pictures striped where to repaint."""
    if prompts[0].image is None:
        return {}
    few = [domain.decode(p.image[:len(p.captions), -len(shapes.CHANNELS):]) for p in prompts]
    if prompts[0].mask is None:
        return {"source": [image for images in few for image in images]}
    few = [tasks.hatched(images, p.mask[:len(images)]) for images, p in zip(few, prompts)]
    return {"to repaint": [image for images in few for image in images]}


def student_pictures(config: Config, domain: Domain, model: MMDiT,
                     prompts: list[Prompts]) -> dict[str, list[Tensor]]:
    sigmas = lambda n: flow.shift(torch.tensor((*levels_of(config.levels, n), 0.0)), config.shift)
    return {f"student {n}": pictures(config, domain, model, prompts, sigmas(n), config.sampler)
            for n in step_counts(config.levels)}


def save_grid(config: Config, domain: Domain, student: MMDiT, prompts: list[Prompts], path: Path) -> None:
    """The student's samples for fixed prompts and seeds."""
    sheet = contact_sheet(sources(domain, prompts) | student_pictures(config, domain, student, prompts),
                          [c for p in prompts for c in p.captions],
                          cell=min(256, max(64, *(side // 2 for p in prompts for side in p.hw))))
    if ranks()[0] == 0:
        save_png(sheet, path, {"parameters": f"sampler: {config.sampler}, seeds from 0"})


@torch.no_grad()
def duel(student: MMDiT, teacher: MMDiT, heads: Discriminator, latents: Latents, config: DistillConfig,
         batch: int) -> dict[str, float]:
    """How well the heads tell apart, over held-out latents of the first bucket, `batch` at a time, and four
    bands of sigma_d.

    auc: held-out real against fake (near .5: the heads are too weak; near 1: too strong).
    auc_memory: real from training against held-out (above .5: the heads have memorised).
    auc_null: one half of the held-out reals against the other (off .5: a leak).
    gap_k: mean logit of real less fake of head k. hinge_<level>: the hinge loss in bands of sigma_d.
    """
    device = next(teacher.parameters()).device
    bucket = min(latents.buckets)
    size = len(latents.buckets[bucket][1])
    n = min(max(batch, 64), latents.holdout) // 2 * 2            # fewer tell no AUC from 1

    def logits(first: int, fake: bool) -> tuple[Tensor, Tensor]:
        parts = [part(first, fake, i, min(i + batch, n)) for i in range(0, n, batch)]
        return torch.cat([out for out, _ in parts], 1), torch.cat([sigma for _, sigma in parts])

    def part(first: int, fake: bool, start: int, end: int) -> tuple[Tensor, Tensor]:
        found = latents.gather(bucket, torch.arange(first + start, first + end))
        x0, text = found.x0.to(device), type(found.text)(*(t.to(device) for t in found.text))
        drawn = draw(x0, config.easy_steps, config, (first, fake), start, n)
        if fake:
            out = fake_pass(student, teacher, heads, x0, text, drawn,
                            replace(config, distill_weight=0.0)).feats
        else:
            out = taps_of(teacher, heads, flow.noised(x0, drawn.eps_d, drawn.sigma_d), drawn.sigma_d, text)
        return heads(out, drawn.sigma_d, text.pooled, grid_of(teacher, x0)).float().cpu(), drawn.sigma_d.cpu()

    (held, sigma_r), (fake, sigma_f), (seen, _) = (
        logits(size - n, False), logits(size - n, True), logits(0, False))
    mean = lambda x: x.mean((0, 2, 3))                                         # one value a sample
    out = {"auc_n": float(n), "auc": metrics.auc(mean(held), mean(fake)),
           "auc_memory": metrics.auc(mean(seen), mean(held)),
           "auc_null": metrics.auc(mean(held[:, ::2]), mean(held[:, 1::2]))}
    out |= {f"gap_{k}": float(held[k].mean() - fake[k].mean()) for k in range(len(held))}
    for low in (0.0, 0.25, 0.5, 0.75):
        r, f = ((s >= low) & (s < low + 0.25) for s in (sigma_r, sigma_f))
        if r.any() and f.any():
            out[f"hinge_{low + 0.125:g}"] = float(hinge_d(held[:, r], fake[:, f]))
    return out


def alarms(values: dict[str, float], before: dict[str, float] = {}) -> list[str]:
    """What in a line of log.jsonl or an evaluation looks like a collapse, in words; thresholds are ours.

    Quality: entropy of the attributes left open below .8 of the data's and below that of the first
    evaluation, `before`. The duel: active margins below .05 (the heads have nothing left to learn); on
    held-out latents AUC below .5 (they are lost) or above .995 (they win), training reals told from held-out
    ones (memorised), reals from reals (a leak). An AUC is off .5 when it is by five standard deviations,
    1 / sqrt(6 n) for n against n.
    """
    on = "AUC on held-out latents is"
    found = [f"{name} is {value:.2f}, below .8 of the data's: images become alike"
             for name, value in values.items()
             if name.startswith("entropy_") and value < min(0.8, before.get(name, 1.0))]
    if "margin_real" in values and max(values["margin_real"], values["margin_fake"]) < 0.05:
        found.append("active margins are below .05: the heads win")
    if "auc" in values:
        off = 5 / math.sqrt(6 * values["auc_n"])
        found += [text for bad, text in (
            (values["auc"] > 0.995, f"{on} {values['auc']:.3f}: the heads win"),
            (values["auc"] < 0.5 - off, f"{on} {values['auc']:.3f}: the heads are lost"),
            (values["auc_memory"] > 0.5 + off, f"training reals against held-out ones have AUC "
             f"{values['auc_memory']:.3f}: the heads have memorised"),
            (abs(values["auc_null"] - 0.5) > off * 2 ** 0.5, f"real against real has AUC "
             f"{values['auc_null']:.3f}: something leaks")) if bad]
    return found


def world_latents(config: Config, n: int, seed: int) -> Latents:
    """n captioned renders as training data: what a folder of shards would hold, made in memory."""
    parts = draw_prompts(config, n, seed)
    captions = sorted({c for p in parts for c in p.captions})
    number = {c: i for i, c in enumerate(captions)}
    domain = world_domain(config)
    text, null = domain.embed(captions), tuple(t[0] for t in domain.embed([""]))
    buckets = {tuple(p.latents.shape[2:]): (p.latents, torch.tensor([number[c] for c in p.captions]))
               for p in parts}
    images = {tuple(p.latents.shape[2:]): p.image for p in parts if p.image is not None}
    return Latents(captions, *text, codes_of(config, captions), null, buckets, {}, images)


# --- the report ---

def report_prompts(config: Config) -> list[str]:
    return encode.read_prompts(config.eval_prompts or config.prompts)[0][:None if config.eval_prompts else 8]


def compare(config: Config, run: Path, shown: list[Prompts], domain: Domain, teacher: MMDiT,
            student: MMDiT, untrained: MMDiT, seconds: dict[str, float], start: float,
            reach: Callable[[int], None] = lambda row: None) -> None:
    """report.json and report.png: the student against the teacher at equal evaluations, at equal n, with the
    floor. Real prompts have no grader: there it is pictures at equal seeds, and times. `start`: when the
    stage began, by time.perf_counter; `reach` hears of each row."""
    if config.real:
        prompts, reference, floor = shown, None, dict.fromkeys(("fd", "fd2"))
    else:
        prompts = draw_prompts(config, config.n, REPORT)
        reference = make_reference(config, prompts, config.n, REAL)
        shown = [p._replace(captions=p.captions[:2]) for p in prompts]
        floor = reference.floor
    n = sum(len(p.captions) for p in prompts)
    counts = step_counts(config.levels)
    guided, plain = (config.guidance, config.image_guidance), (1.0, 1.0)
    plan = [("teacher", teacher, "euler", config.sample_steps, guided, None)]
    plan += [("teacher", teacher, "euler", k, g, None)
             for k in (4, 2, 1) for g in dict.fromkeys((guided, plain))]
    plan += [(name, model, config.sampler, k, plain, levels_of(config.levels, k))
             for name, model in (("untrained", untrained), ("student", student)) for k in counts]
    rows, bar = [], progress("report", len(plan) * n, quiet=ranks()[0])
    for i, (name, model, sampler, steps, guidance, levels) in enumerate(plan):
        reach(i)
        row = measure(model, config, domain, prompts, reference, steps, sampler, guidance, levels,
                      seed=REPORT * 10 ** 6, progress=bar.update)
        rows.append({"model": name, **row})
    unseen = {}
    if not config.real and config.task != "edit":                        # an edit has no held-out results
        unseen = unseen_accuracy(config, domain, (plan[0], plan[-len(counts)]))
    bar.close()

    many = flow.euler_levels(config.sample_steps, config.shift)
    few = flow.euler_levels(4, config.shift)
    columns = sources(domain, shown) | {
        f"teacher {config.sample_steps} x {evaluations(*guided)}": pictures(
            config, domain, teacher, shown, many, "euler", guided),
        "teacher 4": pictures(config, domain, teacher, shown, few, "euler"),
        **student_pictures(config, domain, student, shown)}
    sheet = contact_sheet(columns, [c for p in shown for c in p.captions],
                          cell=max(128, *(side // 4 for p in shown for side in p.hw)))
    log = curves(run, "distill") | curves(run, "eval")
    floor = {**floor, "fd_curves": log.get("floor_fd", [(0, floor["fd"])])[-1][1]}
    seconds["report"] = time.perf_counter() - start
    if ranks()[0]:
        return
    last = {k: log[k][-1][1] for k in ("pairs_per_second", "mfu", "data_wait", "gb") if k in log}
    report.write_report(run, sheet, {
        "preset": config.preset, "command": command(),
        "device": device_name(next(student.parameters()).device), "world_size": ranks()[1],
        "versions": report.versions(), "commit": report.commit(), "n": n, "seeds": [config.seed],
        "seconds": seconds, "throughput": last, "floor": floor, "curves": log,
        "heldout_prompt_accuracy": unseen, "rows": rows})
    print(report.table(rows, floor))
    if not config.real:
        print(f"floor {floor['fd']:.3f}" + "; prompts of held-out combinations: " * bool(unseen)
              + ", ".join(f"{k} {v:.1%}" for k, v in unseen.items()))
    print("seconds: " + ", ".join(f"{k} {v:.0f}" for k, v in seconds.items())
          + f"; wrote {run / 'report.json'}, {run / 'report.png'}")


def unseen_accuracy(config: Config, domain: Domain, plan) -> dict[str, float]:
    """Prompt accuracy on combinations of attributes that neither teacher nor student ever saw."""
    prompts, accuracy = draw_prompts(config, config.eval_n, REPORT, heldout=True), {}
    reference = make_reference(config, prompts, config.eval_n, REAL)
    for name, model, sampler, steps, guidance, levels in plan:
        row = measure(model, config, domain, prompts, reference, steps, sampler, guidance, levels)
        accuracy[f"{name}_{steps}"] = row["prompt_accuracy"]
    return accuracy
