"""Write PNG images with their parameters, contact sheets, report.json and report.png."""
import json
import math
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from torch import Tensor

from ladd.cli import InputError
from ladd.data.files import publish, sync

# the keys of every row of report.json, and their form in a table
ROW = {"model": "{}", "sampler": "{}", "steps": "{}", "guidance": "{:g}", "nfe": "{}",
       "fd": "{:.3f}", "fd2": "{:.3f}", "prompt_accuracy": "{:.1%}", "coverage": "{:.3f}",
       "density": "{:.3f}", "ms_per_image": "{:.2f}"}
# keys that only rows of editing (the first three) or of inpainting have
MORE = {"asked": "{:.1%}", "kept": "{:.1%}", "background": "{:.3f}", "inside": "{:.1%}",
        "seam": "{:.3f}"}


# --- report.json and its table ---

def _nonfinite(value: Any, name: str) -> Iterator[str]:
    """Yield "name is nan" or "name is inf" for each NaN or infinity in a JSON value."""
    if isinstance(value, dict | list | tuple):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _nonfinite(item, f"{name}.{key}".lstrip("."))
    elif isinstance(value, float) and not math.isfinite(value):
        yield f"{name} is {value}"


def save_report(path: Path, report: dict) -> None:
    """Write report.json, one line per key and per row. InputError names the first NaN or inf."""
    if bad := next(_nonfinite(report, ""), None):
        raise InputError(f"{path}: values must be finite (got {bad})")
    lines = []
    for key, value in report.items():
        text = json.dumps(value)
        if key == "rows":
            text = "[\n  " + ",\n  ".join(map(json.dumps, value)) + "\n ]"
        lines.append(f"{json.dumps(key)}: {text}")

    def write(work: Path) -> None:
        work.write_text("{\n " + ",\n ".join(lines) + "\n}\n")
        sync(work)

    publish(path, write)


def table(rows: list[dict], floor: dict) -> str:
    """Return the rows as an aligned Markdown table. The excess is (fd - floor) / (fd of the
    untrained student at 1 step - floor); "-" stands for what is not measured."""
    forms = [*ROW.items(), *((key, form) for key, form in MORE.items() if key in rows[0])]
    forms.insert(6, ("excess", "{:.3f}"))
    cells = [[key for key, _ in forms]]
    base = [row["fd"] - floor["fd"] for row in rows
            if row["model"] == "untrained" and row["steps"] == 1 and row["fd"] is not None]
    for row in rows:
        row = {**row, "excess": None}
        if base and base[0] > 0:
            row["excess"] = (row["fd"] - floor["fd"]) / base[0]
        cells.append(["-" if row[key] is None else form.format(row[key]) for key, form in forms])
    widths = [max(map(len, column)) for column in zip(*cells)]
    # model and sampler to the left, numbers to the right
    sides = "<<" + ">" * (len(forms) - 2)
    lines = [" | ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths))
             for row in cells]
    rule = " | ".join("-" * width if side == "<" else "-" * (width - 1) + ":"
                      for side, width in zip(sides, widths))
    return "\n".join(f"| {line} |" for line in [lines[0], rule, *lines[1:]])


# --- images ---

def to_pil(image: Tensor) -> Image.Image:
    """Return an image [3, H, W] in [-1, 1], clamped, as 8 bits, rounded to nearest."""
    if not image.isfinite().all():
        raise FloatingPointError("an image has NaN or inf")
    pixels = image.detach().float().clamp(-1, 1).add(1).mul(127.5).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())          # [H, W, 3]


def save_png(image: Tensor | Image.Image, path: str | Path, text: dict[str, str]) -> None:
    """Write a PNG with a text chunk per key: "parameters" by custom, "ladd" for our JSON."""
    info = PngImagePlugin.PngInfo()
    for key, value in text.items():
        info.add_text(key, value)           # tEXt, or iTXt beyond Latin-1
    image = to_pil(image) if isinstance(image, Tensor) else image
    publish(Path(path), lambda work: image.save(work, format="PNG", pnginfo=info))


def contact_sheet(images_by_column: dict[str, Sequence[Tensor]], row_titles: list[str],
                  cell: int = 128) -> Image.Image:
    """Return rows of images [3, H, W] under column titles, with captions on the left.

    All are scaled by one factor, the longest side to `cell` pixels, and centred where aspect ratios
    differ.
    """
    columns = [[to_pil(x) for x in images] for images in images_by_column.values()]
    scale = cell / max(side for column in columns for x in column for side in x.size)
    columns = [[x.resize([max(1, round(side * scale)) for side in x.size], Image.Resampling.BICUBIC)
                for x in column] for column in columns]
    gap = max(4, cell // 24)
    font = ImageFont.load_default(max(10, cell // 9))
    ruler = ImageDraw.Draw(Image.new("RGB", (1, 1)))

    def size(text: str) -> list[int]:
        """Return [width, height] of a text in pixels."""
        return [math.ceil(side) for side in ruler.multiline_textbbox((0, 0), text, font)[2:]]

    heads = ["\n".join(textwrap.wrap(title, 17)) for title in images_by_column]
    titles = ["\n".join(textwrap.wrap(title, 20)) for title in row_titles]
    widths = [max(size(head)[0], *(x.width for x in column))
              for head, column in zip(heads, columns)]
    heights = [max(size(title)[1], *(x.height for x in images))
               for title, *images in zip(titles, *columns)]
    left = max(size(title)[0] for title in titles) + 2 * gap
    top = max(size(head)[1] for head in heads) + 2 * gap
    right = left + sum(widths) + gap * len(widths)
    bottom = top + sum(heights) + gap * len(heights)

    sheet = Image.new("RGB", (right, bottom), "white")
    draw = ImageDraw.Draw(sheet)
    x = left
    for head, width, column in zip(heads, widths, columns):
        draw.multiline_text((x + width / 2, top - gap), head, INK, font, anchor="md",
                            align="center")
        y = top
        for image, height in zip(column, heights):
            sheet.paste(image, (x + (width - image.width) // 2, y + (height - image.height) // 2))
            y += height + gap
        x += width + gap
    y = top
    for title, height in zip(titles, heights):
        draw.multiline_text((left - gap, y + height / 2), title, INK, font, anchor="rm",
                            align="right")
        y += height + gap
    return sheet


# --- report.png ---

INK, GRAY, PALE = "#222222", "#777777", "#ececec"
REAL, FAKE = "#2a7f62", "#c8553d"
STUDENT = (FAKE, "#2f6db2", "#8e5aa8", "#d19a1d")
DASHED = (0, (3, 1.2))
LOSSES = ("loss_d", REAL, "heads", "-"), ("loss_g", FAKE, "student", "-")
SHARES = (("margin_real", REAL, "margin, real", "-"), ("margin_fake", FAKE, "margin, fake", "-"),
          ("accuracy_real", REAL, "accuracy, real", DASHED),
          ("accuracy_fake", FAKE, "accuracy, fake", DASHED))


def _noisy(axes, curves: dict, lines: tuple, factor: float) -> None:
    """Draw the running means of curves over a fortieth of their length, and, where the line is
    solid, the curve itself faintly behind it."""
    for name, color, label, style in lines:
        if name not in curves:
            continue
        x, y = np.array(curves[name], dtype=float).T
        window = max(1, len(x) // 40)
        middle = (window - 1) // 2
        mean = np.convolve(factor * y, np.full(window, 1 / window), "valid")
        if style == "-":
            axes.plot(x, factor * y, color=color, alpha=0.15, linewidth=0.6)
        axes.plot(x[middle:middle + len(mean)], mean, color=color, label=label, linestyle=style,
                  linewidth=1.5)


def _by_steps(axes, curves: dict, prefix: str, factor: float) -> None:
    """Draw the curves <prefix>K for every number of steps K."""
    endings = [name.removeprefix(prefix) for name in curves if name.startswith(prefix)]
    for color, k in zip(STUDENT, sorted(int(ending) for ending in endings if ending.isdigit())):
        x, y = np.array(curves[f"{prefix}{k}"], dtype=float).T
        label = "student, 1 step" if k == 1 else f"student, {k} steps"
        axes.plot(x, factor * y, color=color, label=label, linewidth=1.5, marker="o",
                  markersize=3.5)


def plot_report(path: str | Path, sheet: Image.Image, curves: dict[str, list], rows: list[dict],
                floor: dict) -> None:
    """Write report.png: the sheet, pixel for pixel, above plots of the losses, the discriminator's
    margins and accuracy, the Frechet distance and the prompt accuracy.

    Curves are {name: [[step, value], ...]}, each with its own steps. The last two plots show the
    teacher's row of most steps, and are left out where floor["fd"] is None. Curves may be taken at
    a smaller n than the rows: floor["fd_curves"] is the floor at theirs (else floor["fd"]); the
    teacher's line keeps its distance to it.
    """
    # imported here: it takes half a second that only this function needs
    from matplotlib.figure import Figure

    measured = floor["fd"] is not None
    width = max(sheet.width, 960)                   # in pixels, at 100 dots per inch
    below = 600 if measured else 330
    height = sheet.height + below
    figure = Figure((width / 100, height / 100), dpi=100, facecolor="white")
    figure.figimage(np.asarray(sheet), (width - sheet.width) // 2, below)
    box = dict(left=58 / width, right=1 - 20 / width, bottom=48 / height, top=(below - 48) / height)
    grid = figure.add_gridspec(1 + measured, 2, hspace=0.36, wspace=0.16, **box)
    plots = [figure.add_subplot(cell) for cell in grid]
    losses, shares = plots[:2]
    _noisy(losses, curves, LOSSES, 1)
    _noisy(shares, curves, SHARES, 100)
    if measured:
        _quality(*plots[2:], curves, rows, floor)
    shares.set_ylim(-2, 102)
    titles = ("Hinge losses", "Active hinge margins and accuracy of the heads (%)",
              "Frechet distance", "Prompt accuracy (%)")
    for axes, title in zip(plots, titles):
        axes.set_title(title, fontsize=10.5, color=INK, loc="left", pad=8)
        axes.tick_params(labelsize=8.5, colors=GRAY, length=3)
        axes.grid(color=PALE, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#bbbbbb")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8.5, frameon=False, labelcolor=INK)
    for axes in plots[-2:]:
        axes.set_xlabel("iteration", fontsize=9, color=GRAY)
    publish(Path(path), lambda work: figure.savefig(work, format="png"))


def _quality(fd, prompts, curves: dict[str, list], rows: list[dict], floor: dict) -> None:
    """Draw Frechet distance and prompt accuracy of the student while it trains, with the floor and
    the teacher's row."""
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
