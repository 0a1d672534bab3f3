"""Sample images for prompts of the toy dataset, grade them, and write the report: quality against
real images at equal n."""
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from ladd.core import flow
from ladd.core.discriminator import Discriminator
from ladd.core.losses import LaddConfig, draw, fake_pass, grid_of, hinge_d, taps_of
from ladd.core.mmdit import MMDiT, image_channels
from ladd.core.sampler import UNGUIDED, Recipe, evaluations, image_noise, sample, step_counts
from ladd.data import masks
from ladd.data.prompts import Codec, Prompts, null_text
from ladd.data.shards import Latents
from ladd.engine import parallel
from ladd.engine.parallel import ranks
from ladd.engine.run import command, commit, curves, device_name, progress, versions
from ladd.report import metrics, sheets
from ladd.report.sheets import contact_sheet, save_png
from ladd.toy import grader, scenes
from ladd.toy.edits import KINDS, Edits
from ladd.toy.prompts import REAL, REPORT, draw_prompts
from ladd.toy.scenes import ToyConfig

SCORES = "fd", "fd2", "prompt_accuracy", "coverage", "density"


class Sizes(NamedTuple):
    """How many images are measured."""
    n: int            # per row of the report
    eval_n: int       # per evaluation while training
    batch: int        # sampled at a time


class Row(NamedTuple):
    """A row of a report: a network and how it is sampled."""
    name: str
    model: MMDiT
    sigmas: Tensor                   # final noise levels [steps + 1]
    sampler: str
    guidance: tuple[float, float]    # by the text, by the image


class Reference(NamedTuple):
    """Real images (renders) to measure against, and the floor: the prompts' own renders, measured
    like the samples of a model."""
    objects: int                       # per scene
    features: tuple[Tensor, Tensor]    # [n, f] of renders of other scenes, in both feature spaces
    grades: Tensor                     # [n, A] of the prompts' own renders
    floor: dict


# --- sampling ---

def generate(model: MMDiT, codec: Codec, prompts: list[Prompts], sigmas: Tensor, sampler: str,
             guidance: tuple[float, float], seed: int, batch: int,
             advance: Callable[[int], None] = lambda n: None) -> tuple[list[Tensor], float]:
    """Return (latents of each image size, seconds in the model). Image i of all sizes together
    starts from the noise of seed + i; `advance` is called with the number of images made.

    Processes share the prompts, in batches of one size, so that all call the model equally often
    and compiled graphs are reused (the last batches may repeat a prompt). Every process gets all
    latents; the seconds are those that one device would take.
    """
    device = next(model.parameters()).device
    rank, world = ranks()
    null = null_text(codec).to(device)
    out = []
    seconds = 0.0
    first = seed
    for part in prompts:
        n = len(part.captions)
        shape = model.config.out_channels, part.hw[0] // 8, part.hw[1] // 8
        batches = -(-n // (world * batch))      # per process
        size = -(-n // (world * batches))
        latents = []
        for i in range(rank * batches, (rank + 1) * batches):
            rows = [row % n for row in range(i * size, (i + 1) * size)]
            image = None if part.image is None else part.image[rows]
            captions = [part.captions[row] for row in rows]
            text = codec.embed(captions)._replace(image=image).to(device)
            seeds = [first + row for row in rows]
            noise = image_noise(seeds, shape).to(device)
            start = time.perf_counter()
            x0 = sample(model, noise, text, sigmas, sampler, seeds, null, *guidance)
            latents.append(x0.cpu())            # waits for the device, so the time is whole
            seconds += (time.perf_counter() - start) * world
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


def sample_images(model: MMDiT, codec: Codec, prompts: list[Prompts], sigmas: Tensor, sampler: str,
                  guidance: tuple[float, float], batch: int) -> list[Tensor]:
    """Return an image [3, H, W] for each prompt, from the seeds 0, 1, ..."""
    latents, _ = generate(model, codec, prompts, sigmas, sampler, guidance, 0, batch)
    return [image for images in decoded(latents, prompts, codec, batch) for image in images]


# --- grading ---

def readings(images: list[Tensor], objects: int) -> Tensor:
    """Return the attributes [n, A] that the grader reads from images of all sizes."""
    return torch.cat([grader.grade(x, objects) for x in images])


def features(images: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the features [n, f] of images of all sizes, in both feature spaces."""
    return (torch.cat([metrics.features_random(x) for x in images]),
            torch.cat([metrics.features_hand(x) for x in images]))


def score(images: list[Tensor], prompts: list[Prompts], reference: Reference) -> dict:
    """Return the metrics of a set of images, one for each prompt."""
    feats, feats2 = features(images)
    density, coverage = metrics.density_coverage(reference.features[0], feats)
    return {"fd": metrics.frechet(reference.features[0], feats),
            "fd2": metrics.frechet(reference.features[1], feats2),
            "coverage": coverage, "density": density,
            **grades(images, prompts, reference.objects, reference.grades)}


def grades(images: list[Tensor], prompts: list[Prompts], objects: int, real: Tensor) -> dict:
    """Return how well images follow their prompts; None where no image counts.

    prompt_accuracy is the share of images that show all that is asked and keep all else. The rest
    depends on the task. Text: entropy of the attributes that captions leave open, relative to
    `real`. Editing: the shares of images that show what was asked and that keep what was not, and
    the mean error of the background (grader.grade_edit). Inpainting: the share of images with the
    stated attributes that the mask decides, among those with any, and the seam error along the
    mask's edge (grader.grade_inpaint).
    """
    def mean(x: Tensor) -> float | None:
        value = x.float().nanmean().item()
        return None if math.isnan(value) else value

    if isinstance(prompts[0].graded, Edits):
        found = [grader.grade_edit(x, p.graded) for x, p in zip(images, prompts)]
        names = "asked", "kept", "background", "success"
        asked, kept, background, success = (torch.cat([f[k] for f in found]) for k in names)
        kind = torch.cat([p.graded.kind for p in prompts])
        each = {name: mean(success[kind == i]) for i, name in enumerate(KINDS) if (kind == i).any()}
        return {"prompt_accuracy": mean(success), "asked": mean(asked), "kept": mean(kept),
                "background": mean(background), "accuracy": each}
    if prompts[0].mask is not None:
        found = [grader.grade_inpaint(x, p.graded, p.codes, p.mask)
                 for x, p in zip(images, prompts)]
        names = "graded", "want", "inside", "right", "success", "seam"
        read, want, inside, right, success, seam = (torch.cat([f[k] for f in found]) for k in names)
        every = (right | ~inside).all(1)[inside.any(1)]
        return {"prompt_accuracy": mean(success), "inside": mean(every), "seam": mean(seam),
                "accuracy": metrics.prompt_accuracy(read, want)}
    codes = torch.cat([p.codes for p in prompts])
    read = grader.align(readings(images, objects), codes)
    accuracy = metrics.prompt_accuracy(read, codes)
    return {"prompt_accuracy": accuracy["all"],
            "entropy": metrics.attribute_entropy(read, codes, real),
            "readable": mean(read[:, -1] >= 0), "accuracy": accuracy}


def make_reference(toy: ToyConfig, prompts: list[Prompts], n: int, seed: int) -> Reference:
    """Return n renders drawn like those of `prompts` from another seed, and the floor between the
    two sets."""
    others = [scenes.decode(p.latents) for p in draw_prompts(toy, n, seed)]
    own = [scenes.decode(p.latents) for p in prompts]
    real = torch.cat([p.codes for p in prompts])
    if toy.task == "text":
        real = grader.align(readings(own, toy.objects), real)
    reference = Reference(toy.objects, features(others), real, {})
    return reference._replace(floor=score(own, prompts, reference))


def measure(model: MMDiT, codec: Codec, prompts: list[Prompts], reference: Reference | None,
            sigmas: Tensor, sampler: str, guidance: tuple[float, float], batch: int, seed: int = 0,
            advance: Callable[[int], None] = lambda n: None) -> dict:
    """Return one row of the report: images by `sampler` at the final noise levels `sigmas`, `batch`
    at a time. Without a reference (real prompts) the scores are None."""
    latents, seconds = generate(model, codec, prompts, sigmas, sampler, guidance, seed, batch,
                                advance)
    scores = dict.fromkeys(SCORES)
    if reference:
        scores = score(decoded(latents, prompts, codec, batch), prompts, reference)
    n = sum(len(p.captions) for p in prompts)
    steps = len(sigmas) - 1
    row = {"sampler": sampler, "steps": steps, "guidance": guidance[0]}
    if prompts[0].image is not None and prompts[0].mask is None:
        row["image_guidance"] = guidance[1]
    return {**row, "nfe": steps * evaluations(*guidance), **scores,
            "ms_per_image": 1000 * seconds / n}


# --- while training ---

def quality(recipe: Recipe, codec: Codec, student: MMDiT, prompts: list[Prompts],
            reference: Reference, batch: int) -> dict[str, float]:
    """Return the Frechet distance and the prompt accuracy at 1 step and at all noise levels."""
    out = {"floor_fd": reference.floor["fd"]}
    for steps in (1, len(recipe.levels)):
        row = measure(student, codec, prompts, reference, recipe.sigmas(steps), recipe.sampler,
                      UNGUIDED, batch)
        for name in ("fd", "prompt_accuracy", "entropy"):
            if name in row:
                out[f"{name}_{steps}"] = row[name]
    return out


def save_grid(recipe: Recipe, codec: Codec, student: MMDiT, prompts: list[Prompts], batch: int,
              path: Path) -> None:
    """Write a grid of the student's samples for fixed prompts and seeds."""
    columns = {f"student {len(row.sigmas) - 1}": row
               for row in student_rows("student", student, recipe)}
    cell = min(256, max(64, longest(prompts) // 2))
    sheet = make_sheet(columns, codec, prompts, batch, cell)
    if ranks()[0] == 0:
        save_png(sheet, path, {"parameters": f"sampler: {recipe.sampler}, seeds from 0"})


@torch.no_grad()
def discriminator_metrics(student: MMDiT, teacher: MMDiT, heads: Discriminator, latents: Latents,
                          config: LaddConfig, batch: int) -> dict[str, float]:
    """Return how well the heads tell real from fake, on held-out latents of the first bucket,
    `batch` at a time.

    auc: held-out real against fake (near 0.5 the heads are too weak, near 1 too strong).
    auc_memory: real latents of training against held-out ones (above 0.5 the heads have memorised).
    auc_null: one half of the held-out real latents against the other (off 0.5: a leak). gap_k: mean
    logit of real less that of fake, of head k. hinge_0.125 to hinge_0.875: the hinge loss
    in the quarter of sigma_d around that value.
    """
    device = next(teacher.parameters()).device
    bucket = min(latents.buckets)
    size = len(latents.buckets[bucket][1])
    # an even number, for the two halves; fewer than 64 cannot tell an AUC from 1
    n = min(max(batch, 64), latents.holdout) // 2 * 2

    def part(first: int, fake: bool, start: int, end: int) -> tuple[Tensor, Tensor]:
        found = latents.gather(bucket, torch.arange(first + start, first + end))
        x0 = found.x0.to(device)
        text = found.text.to(device)
        drawn = draw(x0, config.easy_steps, config, (first, fake), start, n)
        if fake:
            feats = fake_pass(student, teacher, heads, x0, text, drawn,
                              replace(config, distill_weight=0.0)).feats
        else:
            xt = flow.noised(x0, drawn.eps_d, drawn.sigma_d)
            feats = taps_of(teacher, heads, xt, drawn.sigma_d, text)
        logits = heads(feats, drawn.sigma_d, text.pooled, grid_of(teacher, x0))
        return logits.float().cpu(), drawn.sigma_d.cpu()

    def logits(first: int, fake: bool) -> tuple[Tensor, Tensor]:
        """Return logits [k, n, h, w] and sigma_d [n] of the n samples from `first` on."""
        parts = [part(first, fake, i, min(i + batch, n)) for i in range(0, n, batch)]
        return torch.cat([out for out, _ in parts], 1), torch.cat([sigma for _, sigma in parts])

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
    """Return the discriminator's metrics on the training batch of all processes: active margins and
    accuracy of the heads, and the gap between the mean logits."""
    real, fake = stats["logits_real"], stats["logits_fake"]
    margins = metrics.active_margins(real, fake)
    accuracies = metrics.accuracy(real, fake)
    line = {"margin_real": margins[0], "margin_fake": margins[1],
            "accuracy_real": accuracies[0], "accuracy_fake": accuracies[1],
            "gap": real.mean() - fake.mean(), "right": 0.0, "count": 0.0}
    mismatched = stats["logits_mismatched"]
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
    """Return what in a line of log.jsonl, or in an evaluation, indicates a collapse, in words. The
    thresholds are our choice.

    Quality: entropy of the attributes left open below 0.8 of the data's and below that of the first
    evaluation, `before`. Discriminator: active margins below 0.05 (the heads have nothing left to
    learn); on held-out latents an AUC below 0.5 (the heads are lost) or above 0.995 (they win), an
    AUC of real latents of training against held-out ones above 0.5 (memorised), or of real against
    real off 0.5 (a leak). An AUC is off 0.5 from five standard deviations on, 1 / sqrt(6 n) for n
    against n.
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


# --- the report ---

def teacher_row(teacher: MMDiT, recipe: Recipe) -> Row:
    """Return the row of the teacher at its many steps, with guidance."""
    return Row("teacher", teacher, recipe.teacher_sigmas(recipe.sample_steps), "euler",
               (recipe.guidance, recipe.image_guidance))


def student_rows(name: str, student: MMDiT, recipe: Recipe) -> list[Row]:
    """Return the rows of a student at each number of steps that it can take, most first."""
    return [Row(name, student, recipe.sigmas(k), recipe.sampler, UNGUIDED)
            for k in step_counts(recipe.levels)]


def measure_rows(rows: list[Row], codec: Codec, prompts: list[Prompts],
                 reference: Reference | None, batch: int,
                 heartbeat: Callable[[int], None] = lambda row: None) -> list[dict]:
    """Return the measured rows of report.json, all from the same seeds. `heartbeat` is called with
    the number of each row before it is measured."""
    out = []
    n = sum(len(p.captions) for p in prompts)
    with progress("report", len(rows) * n, quiet=ranks()[0] > 0) as bar:
        for i, (name, model, *how) in enumerate(rows):
            heartbeat(i)
            row = measure(model, codec, prompts, reference, *how, batch, REPORT * 10 ** 6,
                          bar.update)
            out.append({"model": name, **row})
    return out


def sources(codec: Codec, prompts: list[Prompts]) -> dict[str, list[Tensor]]:
    """Return what the networks are conditioned on besides the text: source images for editing,
    images with stripes where to repaint for inpainting, nothing for text-to-image."""
    if prompts[0].image is None:
        return {}
    few = [codec.decode(p.image[:len(p.captions), -image_channels("edit"):]) for p in prompts]
    if prompts[0].mask is None:
        return {"source": [image for images in few for image in images]}
    few = [masks.hatched(images, p.mask[:len(images)]) for images, p in zip(few, prompts)]
    return {"to repaint": [image for images in few for image in images]}


def longest(prompts: list[Prompts]) -> int:
    """Return the longest side of the images, in pixels."""
    return max(side for p in prompts for side in p.hw)


def make_sheet(columns: dict[str, Row], codec: Codec, prompts: list[Prompts], batch: int,
               cell: int) -> Image.Image:
    """Return a contact sheet: what the networks are conditioned on, then a column of samples for
    each of `columns`, all from the same seeds."""
    images = sources(codec, prompts)
    for title, (_, model, *how) in columns.items():
        images[title] = sample_images(model, codec, prompts, *how, batch)
    return contact_sheet(images, [c for p in prompts for c in p.captions], cell=cell)


def compare(recipe: Recipe, toy: ToyConfig | None, run: Path, shown: list[Prompts], codec: Codec,
            networks: tuple[MMDiT, MMDiT, MMDiT], sizes: Sizes, about: dict[str, Any],
            seconds: dict[str, float], start: float,
            heartbeat: Callable[[int], None] = lambda row: None) -> None:
    """Write report.json and report.png of a run: the student against the teacher at equal numbers
    of evaluations and equal n, with the real-against-real floor. Real prompts have no grader: there
    the report holds images at equal seeds, and times.

    networks: (teacher, student, untrained student). about: further keys of report.json. seconds: of
    the stages before; `start`: when this one began, by time.perf_counter. All processes call it,
    process 0 writes.
    """
    teacher, student, untrained = networks
    if toy is None:
        prompts, reference = shown, None
        floor = {"fd": None, "fd2": None}
    else:
        prompts = draw_prompts(toy, sizes.n, REPORT)
        reference = make_reference(toy, prompts, sizes.n, REAL)
        shown = [p._replace(captions=p.captions[:2]) for p in prompts]
        floor = reference.floor
    guided = teacher_row(teacher, recipe)
    plan = [guided]
    for k in (4, 2, 1):
        few = guided._replace(sigmas=recipe.teacher_sigmas(k))
        plan.append(few)
        if guided.guidance != UNGUIDED:
            plan.append(few._replace(guidance=UNGUIDED))
    students = student_rows("student", student, recipe)
    plan += student_rows("untrained", untrained, recipe) + students
    rows = measure_rows(plan, codec, prompts, reference, sizes.batch, heartbeat)
    unseen = {}
    if toy and toy.task != "edit":              # the result of an edit may be any combination
        unseen = unseen_accuracy(toy, codec, [guided, students[0]], sizes)

    columns = {f"teacher {recipe.sample_steps} x {evaluations(*guided.guidance)}": guided,
               "teacher 4": guided._replace(sigmas=recipe.teacher_sigmas(4), guidance=UNGUIDED),
               **{f"student {len(row.sigmas) - 1}": row for row in students}}
    sheet = make_sheet(columns, codec, shown, sizes.batch, max(128, longest(shown) // 4))
    log = curves(run, "distill") | curves(run, "eval")
    floor = {**floor, "fd_curves": log.get("floor_fd", [(0, floor["fd"])])[-1][1]}
    seconds["report"] = time.perf_counter() - start
    if ranks()[0]:
        return
    last = {k: log[k][-1][1] for k in ("pairs_per_second", "mfu", "data_wait", "gb") if k in log}
    sheets.write_report(run, sheet, {
        **about, "command": command(), "device": device_name(next(student.parameters()).device),
        "world_size": ranks()[1], "versions": versions(), "commit": commit(),
        "n": sum(len(p.captions) for p in prompts), "seconds": seconds, "throughput": last,
        "floor": floor, "curves": log, "heldout_prompt_accuracy": unseen, "rows": rows})
    print(sheets.table(rows, floor))
    if toy:
        print(f"floor {floor['fd']:.3f}")
    if unseen:
        print("prompts of held-out combinations: "
              + ", ".join(f"{name} {value:.1%}" for name, value in unseen.items()))
    print("seconds: " + ", ".join(f"{name} {value:.0f}" for name, value in seconds.items())
          + f"; wrote {run / 'report.json'}, {run / 'report.png'}")


def unseen_accuracy(toy: ToyConfig, codec: Codec, rows: list[Row],
                    sizes: Sizes) -> dict[str, float]:
    """Return the prompt accuracy of each of `rows` on combinations of attributes that neither
    teacher nor student ever saw."""
    prompts = draw_prompts(toy, sizes.eval_n, REPORT, heldout=True)
    reference = make_reference(toy, prompts, sizes.eval_n, REAL)
    accuracy = {}
    for name, model, *how in rows:
        row = measure(model, codec, prompts, reference, *how, sizes.batch)
        accuracy[f"{name}_{row['steps']}"] = row["prompt_accuracy"]
    return accuracy


def compare_on_toy(rows: list[Row], toy: ToyConfig, codec: Codec, n: int, batch: int, out: Path,
                   about: dict[str, Any], start: float) -> None:
    """Write report.json and samples.png to the folder `out`: all `rows` measured on n prompts of
    the toy dataset, and samples of them. For commands of one process; `about` and `start` as in
    compare."""
    prompts = draw_prompts(toy, n, REPORT)
    reference = make_reference(toy, prompts, n, REAL)
    measured = measure_rows(rows, codec, prompts, reference, batch)
    shown = [p._replace(captions=p.captions[:2]) for p in prompts]
    columns = {f"{row.name} {len(row.sigmas) - 1}": row for row in rows}
    sheet = make_sheet(columns, codec, shown, batch, max(96, longest(shown) // 4))
    save_png(sheet, out / "samples.png", {"parameters": command()})
    seconds = time.perf_counter() - start
    sheets.save_report(out / "report.json", {
        **about, "command": command(),
        "device": device_name(next(rows[0].model.parameters()).device), "versions": versions(),
        "commit": commit(), "n": n, "seconds": seconds, "floor": reference.floor,
        "rows": measured})
    print(sheets.table(measured, reference.floor))
    print(f"{seconds:.0f} s; wrote report.json and samples.png in {out}")
