"""Compare the networks of a run: grids of samples, report.json and report.png."""
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from ladd.core.mmdit import MMDiT, image_channels
from ladd.core.sampler import UNGUIDED, Recipe, evaluations, step_counts
from ladd.data import masks
from ladd.data.prompts import Codec, Prompts
from ladd.engine.parallel import ranks
from ladd.engine.run import command, commit, curves, device_name, progress, versions
from ladd.report import sheets
from ladd.report.evaluate import (Reference, Row, decoded, generate, grade_prompts, make_reference,
                                  measure)
from ladd.toy.prompts import REAL, REPORT, draw_prompts
from ladd.toy.scenes import ToyConfig


class Counts(NamedTuple):
    """Numbers of images."""
    n: int            # per row of the report
    eval_n: int       # of held-out combinations
    batch: int        # sampled at a time


# --- rows ---

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
                 heartbeat: Callable[[int], None] | None = None) -> list[dict]:
    """Return the measured rows of report.json, all from the same seeds. `heartbeat` is called with
    the number of each row before it is measured."""
    out = []
    n = sum(len(p.captions) for p in prompts)
    with progress("report", len(rows) * n, quiet=ranks()[0] > 0) as bar:
        for i, row in enumerate(rows):
            if heartbeat:
                heartbeat(i)
            out.append(measure(row, codec, prompts, reference, batch, REPORT * 10 ** 6, bar.update))
    return out


def unseen_accuracy(toy: ToyConfig, codec: Codec, rows: list[Row],
                    counts: Counts) -> dict[str, float]:
    """Return the prompt accuracy of each of `rows` on combinations of attributes that neither
    teacher nor student ever saw."""
    prompts = draw_prompts(toy, counts.eval_n, REPORT, heldout=True)
    accuracy = {}
    for row in rows:
        latents, _ = generate(row, codec, prompts, 0, counts.batch)
        found = grade_prompts(decoded(latents, prompts, codec, counts.batch), prompts)
        accuracy[f"{row.name}_{row.steps}"] = found["prompt_accuracy"]
    return accuracy


# --- samples ---

def sources(codec: Codec, prompts: list[Prompts]) -> dict[str, list]:
    """Return what the networks are conditioned on besides the text: source images for editing,
    images with stripes where to repaint for inpainting, nothing for text-to-image."""
    title, out = "source", []
    for p in prompts:
        if p.image is None:
            return {}
        images = codec.decode(p.image[:len(p.captions), -image_channels("edit"):])
        if p.mask is not None:
            title, images = "to repaint", masks.hatched(images, p.mask[:len(images)])
        out += images
    return {title: out}


def make_sheet(columns: dict[str, Row], codec: Codec, prompts: list[Prompts], batch: int,
               cell: int) -> Image.Image:
    """Return a contact sheet: what the networks are conditioned on, then a column of samples for
    each of `columns`, all from the seeds 0, 1, ..."""
    images = sources(codec, prompts)
    for title, row in columns.items():
        latents, _ = generate(row, codec, prompts, 0, batch)
        images[title] = [x for part in decoded(latents, prompts, codec, batch) for x in part]
    return sheets.contact_sheet(images, [c for p in prompts for c in p.captions], cell)


def by_title(rows: list[Row]) -> dict[str, Row]:
    """Return the rows by the titles of their columns."""
    return {f"{row.name} {row.steps}": row for row in rows}


def longest(prompts: list[Prompts]) -> int:
    """Return the longest side of the images, in pixels."""
    return max(side for p in prompts for side in p.hw)


def save_grid(recipe: Recipe, codec: Codec, student: MMDiT, prompts: list[Prompts], batch: int,
              path: Path) -> None:
    """Write a grid of the student's samples for fixed prompts and seeds."""
    columns = by_title(student_rows("student", student, recipe))
    sheet = make_sheet(columns, codec, prompts, batch, min(256, max(64, longest(prompts) // 2)))
    if ranks()[0] == 0:
        sheets.save_png(sheet, path, {"parameters": f"sampler: {recipe.sampler}, seeds from 0"})


# --- reports ---

def write_run_report(recipe: Recipe, toy: ToyConfig | None, run: Path, shown: list[Prompts],
                     codec: Codec, networks: tuple[MMDiT, MMDiT, MMDiT], counts: Counts,
                     about: dict[str, Any], seconds: dict[str, float], start: float,
                     heartbeat: Callable[[int], None] | None = None) -> None:
    """Write report.json and report.png of a run: the student at its numbers of steps, the teacher
    at many and at 4, the untrained student, and the real-against-real floor, all at equal n. Real
    prompts have no grader: there the report holds images at equal seeds, and times.

    networks: (teacher, student, untrained student). about: further keys of report.json. seconds: of
    the stages before; `start`: when this one began, by time.perf_counter. All processes call it,
    process 0 writes.
    """
    teacher, student, untrained = networks
    prompts, reference, floor = shown, None, {"fd": None, "fd2": None}
    if toy:
        prompts = draw_prompts(toy, counts.n, REPORT)
        reference = make_reference(toy, prompts, counts.n, REAL)
        shown = [p._replace(captions=p.captions[:2]) for p in prompts]
        floor = reference.floor
    guided = teacher_row(teacher, recipe)
    plan = [guided, *(guided._replace(sigmas=recipe.teacher_sigmas(4), guidance=guidance)
                      for guidance in dict.fromkeys((guided.guidance, UNGUIDED)))]
    students = student_rows("student", student, recipe)
    plan += student_rows("untrained", untrained, recipe) + students
    rows = measure_rows(plan, codec, prompts, reference, counts.batch, heartbeat)
    unseen = {}
    if toy and toy.task != "edit":              # the result of an edit may be any combination
        unseen = unseen_accuracy(toy, codec, [guided, students[0]], counts)

    columns = {f"teacher {recipe.sample_steps} x {evaluations(*guided.guidance)}": guided,
               "teacher 4": guided._replace(sigmas=recipe.teacher_sigmas(4), guidance=UNGUIDED),
               **by_title(students)}
    sheet = make_sheet(columns, codec, shown, counts.batch, max(128, longest(shown) // 4))
    log = curves(run, "distill") | curves(run, "eval")
    floor = {**floor, "fd_curves": log.get("floor_fd", [(0, floor["fd"])])[-1][1]}
    seconds["report"] = time.perf_counter() - start
    if ranks()[0]:
        return
    last = {k: log[k][-1][1] for k in ("pairs_per_second", "mfu", "data_wait", "gb") if k in log}
    sheets.save_report(run / "report.json", {
        **about, "command": command(), "device": device_name(next(student.parameters()).device),
        "world_size": ranks()[1], "versions": versions(), "commit": commit(),
        "n": sum(len(p.captions) for p in prompts), "seconds": seconds, "throughput": last,
        "floor": floor, "curves": log, "heldout_prompt_accuracy": unseen, "rows": rows})
    sheets.plot_report(run / "report.png", sheet, log, rows, floor)
    print(sheets.table(rows, floor))
    if toy:
        print(f"floor {floor['fd']:.3f}")
    if unseen:
        print("prompts of held-out combinations: "
              + ", ".join(f"{name} {value:.1%}" for name, value in unseen.items()))
    print("seconds: " + ", ".join(f"{name} {value:.0f}" for name, value in seconds.items())
          + f"; wrote {run / 'report.json'}, {run / 'report.png'}")


def write_toy_report(rows: list[Row], toy: ToyConfig, codec: Codec, n: int, batch: int, out: Path,
                     about: dict[str, Any], start: float) -> None:
    """Write report.json and samples.png to the folder `out`: all `rows` measured on n prompts of
    the toy dataset, and samples of them. For commands of one process; `about` and `start` as in
    write_run_report."""
    prompts = draw_prompts(toy, n, REPORT)
    reference = make_reference(toy, prompts, n, REAL)
    measured = measure_rows(rows, codec, prompts, reference, batch)
    shown = [p._replace(captions=p.captions[:2]) for p in prompts]
    sheet = make_sheet(by_title(rows), codec, shown, batch, max(96, longest(shown) // 4))
    sheets.save_png(sheet, out / "samples.png", {"parameters": command()})
    seconds = time.perf_counter() - start
    sheets.save_report(out / "report.json", {
        **about, "command": command(),
        "device": device_name(next(rows[0].model.parameters()).device), "versions": versions(),
        "commit": commit(), "n": n, "seconds": seconds, "floor": reference.floor,
        "rows": measured})
    print(sheets.table(measured, reference.floor))
    print(f"{seconds:.0f} s; wrote report.json and samples.png in {out}")
