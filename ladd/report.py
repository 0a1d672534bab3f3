"""What a run leaves behind: PNGs that carry their parameters, report.json (DESIGN section 3) and report.png.

Curves are {name: [[step, value], ...]}, each with steps of its own. Drawn are loss_d, loss_g; the shares
margin_real, margin_fake, accuracy_real, accuracy_fake; fd_K, prompt_accuracy_K (the student at K steps).
Files appear whole or not at all.
"""
import json
import math
import os
import platform
import shutil
import subprocess
import textwrap
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from torch import Tensor

from ladd.config import InputError

KEYS = "preset command device world_size versions commit n seeds seconds floor curves rows".split()
ROW = {"model": "{}", "sampler": "{}", "steps": "{}", "guidance": "{:g}", "nfe": "{}",  # keys, and their form
       "fd": "{:.3f}", "fd2": "{:.3f}", "prompt_accuracy": "{:.1%}",                    # in a table
       "coverage": "{:.3f}", "density": "{:.3f}", "ms_per_image": "{:.2f}"}
MORE = {"asked": "{:.1%}", "kept": "{:.1%}", "background": "{:.3f}",                    # of editing
        "inside": "{:.1%}", "seam": "{:.3f}"}                                           # of inpainting


def _replace(path: str | Path, write: Callable[[Path], Any]) -> None:
    """write(a temporary name), then rename: `path` is the old file or the new one, never half of it."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    write(temporary)
    os.replace(temporary, path)


# --- provenance ---


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that numbers may depend on, as far as they are installed."""
    packages = [name for name in ("torch", "numpy", "einops", "safetensors", "triton") if find_spec(name)]
    return {"python": platform.python_version(), "cuda": torch.version.cuda or "none"} | {
        name: metadata.version(name) for name in packages}


def commit() -> str:
    """The commit of this checkout, "+dirty" if tracked files differ; "unknown" without git or commits."""
    def git(*args: str) -> str:
        done = subprocess.run(["git", *args], cwd=Path(__file__).parent, capture_output=True, text=True)
        return done.stdout.strip()

    if not shutil.which("git") or not (head := git("rev-parse", "--verify", "--quiet", "HEAD")):
        return "unknown"
    return head + ("+dirty" if git("status", "--porcelain", "--untracked-files=no") else "")


# --- report.json and its table ---


def _nonfinite(value: Any, name: str) -> Iterator[str]:
    if isinstance(value, dict | list | tuple):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _nonfinite(item, f"{name}.{key}".lstrip("."))
    elif isinstance(value, float) and not math.isfinite(value):
        yield f"{name} is {value}"


def write_json(path: str | Path, obj: dict) -> None:
    """Writes obj, one line a key and an object of a list. InputError names the first NaN or infinity."""
    if bad := next(_nonfinite(obj, ""), None):
        raise InputError(f"{path}: {bad}, accepted finite numbers")

    def text(value: Any) -> str:
        listed = isinstance(value, list) and value and isinstance(value[0], dict)
        return "[\n  " + ",\n  ".join(map(json.dumps, value)) + "\n ]" if listed else json.dumps(value)

    lines = ",\n ".join(f"{json.dumps(key)}: {text(value)}" for key, value in obj.items())
    _replace(path, lambda temporary: temporary.write_text("{\n " + lines + "\n}\n"))


def validate_report(report: dict) -> None:
    """InputError names what is missing of DESIGN section 3: keys, the floor in both spaces, rows' keys."""
    missing = [key for key in KEYS if key not in report]
    missing += [f"floor.{key}" for key in ("fd", "fd2") if key not in report.get("floor", {})]
    rows = report.get("rows") or [{}]
    missing += [f"rows.{i}.{key}" for i, row in enumerate(rows) for key in ROW if key not in row]
    if missing:
        raise InputError(f"report: {len(missing)} keys are missing, {', '.join(missing[:6])}; accepted: "
                         f"{', '.join(KEYS)}, and at least one row of {', '.join(ROW)}")


def relative_excess(rows: list[dict], floor: dict) -> list[float | None]:
    """(fd - floor) / (fd of the untrained student at 1 step - floor) of each row; None without that one."""
    if floor["fd"] is None:
        return [None] * len(rows)
    base = [row["fd"] - floor["fd"] for row in rows if row["model"] == "untrained" and row["steps"] == 1]
    return [(row["fd"] - floor["fd"]) / base[0] if base and base[0] > 0 else None for row in rows]


def table(rows: list[dict], floor: dict) -> str:
    """The rows as an aligned Markdown table; excess is relative_excess, "-" is not measured."""
    forms = [*ROW.items(), *((key, form) for key, form in MORE.items() if key in rows[0])]
    forms.insert(6, ("excess", "{:.3f}"))
    rows = [row | {"excess": excess} for row, excess in zip(rows, relative_excess(rows, floor))]
    cells = [["-" if row[key] is None else form.format(row[key]) for key, form in forms] for row in rows]
    cells.insert(0, [key for key, _ in forms])
    widths = [max(map(len, column)) for column in zip(*cells)]
    sides = "<" * 2 + ">" * (len(forms) - 2)                         # words to the left, numbers to the right
    lines = [" | ".join(f"{cell:{side}{w}}" for cell, side, w in zip(row, sides, widths)) for row in cells]
    rule = " | ".join("-" * w if side == "<" else "-" * (w - 1) + ":" for side, w in zip(sides, widths))
    return "\n".join(f"| {line} |" for line in [lines[0], rule, *lines[1:]])


# --- pictures ---


def to_pil(image: Tensor) -> Image.Image:
    """image [3, H, W] in [-1, 1] (clamped) in 8 bits, rounded to nearest."""
    if image.ndim != 3 or image.shape[0] != 3 or not image.isfinite().all():
        finite = "finite" if image.isfinite().all() else "not finite"
        raise InputError(f"image: {tuple(image.shape)}, {finite}, accepted [3, H, W], finite")
    pixels = image.detach().float().clamp(-1, 1).add(1).mul(127.5).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())          # [H, W, 3]


def save_png(image: Tensor | Image.Image, path: str | Path, text: dict[str, str]) -> None:
    """Writes a PNG with a text chunk for each key: "parameters" by custom, "ladd" for our JSON."""
    info = PngImagePlugin.PngInfo()
    for key, value in text.items():
        info.add_text(key, value)                                         # tEXt, or iTXt beyond Latin-1
    image = to_pil(image) if isinstance(image, Tensor) else image
    _replace(path, lambda temporary: image.save(temporary, format="PNG", pnginfo=info))


def contact_sheet(images_by_column: dict[str, Sequence[Tensor]], row_titles: list[str],
                  cell: int = 128) -> Image.Image:
    """Rows of images [3, H, W] under column titles, captions on the left.

    All are scaled by one factor, the longest side to `cell` pixels, and centred where aspect ratios differ.
    """
    columns = [[to_pil(x) for x in images] for images in images_by_column.values()]
    if not columns or not row_titles or any(len(column) != len(row_titles) for column in columns):
        raise InputError(f"contact_sheet: columns of {[*map(len, columns)]} images, {len(row_titles)} rows, "
                         "accepted at least one column and one row, an image for every row")
    scale = cell / max(side for column in columns for x in column for side in x.size)
    resize = lambda x: x.resize([max(1, round(side * scale)) for side in x.size], Image.Resampling.BICUBIC)
    columns = [[resize(x) for x in column] for column in columns]
    gap, font = max(4, cell // 24), ImageFont.load_default(max(10, cell // 9))
    ruler = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    size = lambda text: [math.ceil(side) for side in ruler.multiline_textbbox((0, 0), text, font)[2:]]
    heads = ["\n".join(textwrap.wrap(title, 17)) for title in images_by_column]
    titles = ["\n".join(textwrap.wrap(title, 20)) for title in row_titles]
    widths = [max(size(head)[0], *(x.width for x in column)) for head, column in zip(heads, columns)]
    heights = [max(size(title)[1], *(x.height for x in images)) for title, *images in zip(titles, *columns)]
    left = max(size(title)[0] for title in titles) + 2 * gap
    top = max(size(head)[1] for head in heads) + 2 * gap

    right, bottom = left + sum(widths) + gap * len(widths), top + sum(heights) + gap * len(heights)
    sheet = Image.new("RGB", (right, bottom), "white")
    draw = ImageDraw.Draw(sheet)
    x = left
    for head, width, column in zip(heads, widths, columns):
        draw.multiline_text((x + width / 2, top - gap), head, INK, font, anchor="md", align="center")
        y = top
        for image, height in zip(column, heights):
            sheet.paste(image, (x + (width - image.width) // 2, y + (height - image.height) // 2))
            y += height + gap
        x += width + gap
    y = top
    for title, height in zip(titles, heights):
        draw.multiline_text((left - gap, y + height / 2), title, INK, font, anchor="rm", align="right")
        y += height + gap
    return sheet


# --- report.png ---

INK, GRAY, PALE = "#222222", "#777777", "#ececec"
REAL, FAKE = "#2a7f62", "#c8553d"
STUDENT = (FAKE, "#2f6db2", "#8e5aa8", "#d19a1d")
DASHED = (0, (3, 1.2))
DUEL = (("margin_real", REAL, "margin, real", "-"), ("margin_fake", FAKE, "margin, fake", "-"),
        ("accuracy_real", REAL, "accuracy, real", DASHED), ("accuracy_fake", FAKE, "accuracy, fake", DASHED))


def _noisy(axes, points: list, factor: float, color: str, label: str, style="-") -> None:
    """The running mean of a curve over a fortieth of its length; a solid one over its faint self."""
    x, y = np.array(points, dtype=float).T
    window = max(1, len(x) // 40)
    middle = (window - 1) // 2
    mean = np.convolve(factor * y, np.full(window, 1 / window), "valid")
    if style == "-":
        axes.plot(x, factor * y, color=color, alpha=.15, linewidth=.6)
    axes.plot(x[middle:middle + len(mean)], mean, color=color, label=label, linestyle=style, linewidth=1.5)


def _by_steps(axes, curves: dict, prefix: str, factor: float) -> None:
    """The curves <prefix>K for every number of steps K."""
    endings = [name.removeprefix(prefix) for name in curves if name.startswith(prefix)]
    for color, k in zip(STUDENT, sorted(int(ending) for ending in endings if ending.isdigit())):
        x, y = np.array(curves[f"{prefix}{k}"], dtype=float).T
        label = f"student, {k} step{'s' * (k > 1)}"
        axes.plot(x, factor * y, color=color, label=label, linewidth=1.5, marker="o", markersize=3.5)


def plot_report(path: str | Path, sheet: Image.Image, curves: dict[str, list], rows: list[dict],
                floor: dict) -> None:
    """report.png: the sheet, pixel for pixel, above losses, the duel, Frechet distance and prompt accuracy.

    The last two, left out where floor["fd"] is None, show the teacher's row of most steps. Curves may be
    taken at a smaller n than the rows: floor["fd_curves"] is the floor at theirs (else floor["fd"]); the
    teacher's line keeps its distance to it.
    """
    from matplotlib.figure import Figure                          # half a second that only this function pays

    measured = floor["fd"] is not None                                     # else losses and duel alone
    width, below = max(sheet.width, 960), 600 if measured else 330         # at 100 dots an inch
    height = sheet.height + below
    figure = Figure((width / 100, height / 100), dpi=100, facecolor="white")
    figure.figimage(np.asarray(sheet), (width - sheet.width) // 2, below)
    box = dict(left=58 / width, right=1 - 20 / width, bottom=48 / height, top=(below - 48) / height)
    plots = [figure.add_subplot(cell) for cell in
             figure.add_gridspec(1 + measured, 2, hspace=.36, wspace=.16, **box)]
    losses, duel = plots[:2]
    for name, color, label in (("loss_d", REAL, "heads"), ("loss_g", FAKE, "student")):
        if name in curves:
            _noisy(losses, curves[name], 1, color, label)
    for name, color, label, style in DUEL:
        if name in curves:
            _noisy(duel, curves[name], 100, color, label, style)
    if measured:
        _quality(*plots[2:], curves, rows, floor)
    duel.set_ylim(-2, 102)
    titles = ("Hinge losses", "Active hinge margins and accuracy of the heads (%)", "Frechet distance",
              "Prompt accuracy (%)")
    for axes, title in zip(plots, titles):
        axes.set_title(title, fontsize=10.5, color=INK, loc="left", pad=8)
        axes.tick_params(labelsize=8.5, colors=GRAY, length=3)
        axes.grid(color=PALE, linewidth=.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#bbbbbb")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8.5, frameon=False, labelcolor=INK)
    for axes in plots[-2:]:
        axes.set_xlabel("iteration", fontsize=9, color=GRAY)
    _replace(path, lambda temporary: figure.savefig(temporary, format="png"))


def _quality(fd, prompts, curves: dict[str, list], rows: list[dict], floor: dict) -> None:
    """Draws Frechet distance and prompt accuracy while training, with the floor and the teacher's row."""
    from matplotlib.ticker import LogLocator, NullLocator

    _by_steps(fd, curves, "fd_", 1)
    _by_steps(prompts, curves, "prompt_accuracy_", 100)
    level = dict(color=GRAY, linewidth=1.1, zorder=1)
    base = floor.get("fd_curves", floor["fd"])
    teachers = [row for row in rows if row["model"] == "teacher"]
    if teachers:
        best = min(teachers, key=lambda row: (-row["steps"], row["fd"]))
        label = f"teacher, {best['nfe']} evaluations"
        fd.axhline(best["fd"] - floor["fd"] + base, linestyle=DASHED, label=label, **level)
        if best["prompt_accuracy"] is not None:
            prompts.axhline(100 * best["prompt_accuracy"], linestyle=DASHED, label=label, **level)
    fd.axhline(base, linestyle=":", label="floor, real against real", **level)
    fd.set_yscale("log")
    fd.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    fd.yaxis.set_major_formatter("{x:g}")
    fd.yaxis.set_minor_locator(NullLocator())
    prompts.set_ylim(bottom=0)


def write_report(run: str | Path, sheet: Image.Image, report: dict) -> None:
    """Checks the report, then writes run/report.json and run/report.png."""
    validate_report(report)
    write_json(Path(run) / "report.json", report)
    plot_report(Path(run) / "report.png", sheet, report["curves"], report["rows"], report["floor"])
