"""The report: keys, numbers, text and pixels that a reader relies on."""
import json
import re
import time

import numpy as np
import pytest
import torch
from PIL import Image

import kernels
from ladd.cli import InputError
from ladd.core.mmdit import MMDiT, MMDiTConfig, image_channels
from ladd.core.sampler import Recipe
from ladd.engine import run
from ladd.report import compare, evaluate, sheets
from ladd.toy import grader
from ladd.toy.prompts import toy_codec
from ladd.toy.scenes import ToyConfig, decode, is_heldout

RED, GREEN, BLUE, BLACK = ([1, -1, -1], [-1, 1, -1], [-1, -1, 1], [-1, -1, -1])


def flat(colour: list[int], h: int, w: int) -> torch.Tensor:
    return torch.tensor(colour).float()[:, None, None].expand(3, h, w)


def row(model: str, steps: int, fd: float, **other) -> dict:
    return dict(model=model, sampler="euler", steps=steps, guidance=1.0, nfe=steps, fd=fd,
                fd2=2 * fd, prompt_accuracy=.5, coverage=.9, density=1.0, ms_per_image=1.5) | other


def full() -> dict:
    curves = {"loss_d": [[i, 2 - i / 100] for i in range(100)], "fd_1": [[0, 9.0], [50, 4.0]],
              "accuracy_fake": [[i, .5] for i in range(5)], "fd_floor": [[0, 1.0]],
              "margin_real": [[1, .5]], "prompt_accuracy_4": [[0, .2]]}
    return dict(preset="tiny", command="python train.py", device="cpu", world_size=1, commit="x",
                n=2048, versions=run.versions(), seeds=[0], seconds={"teacher": 1.0}, curves=curves,
                floor=dict(fd=1.0, fd2=2.0), rows=[row("teacher", 9, 2.0), row("untrained", 1, 9.0),
                                                   row("student", 1, 3.0)])


@pytest.fixture
def sheet() -> Image.Image:
    images = torch.stack([flat(RED, 16, 16), flat(BLUE, 16, 16)])
    columns = {"teacher": images, "student": images.flip(0)}
    return sheets.contact_sheet(columns, ["red square", "blue square"], cell=64)


# --- report.json and the table ---


def test_json_comes_back_and_has_a_line_for_each_row(tmp_path):
    sheets.save_report(tmp_path / "report.json", full())
    text = (tmp_path / "report.json").read_text()
    assert json.loads(text) == full()
    assert len(text.splitlines()) == len(full()) + 2 + len(full()["rows"]) + 1
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


@pytest.mark.parametrize("value, shown", [(float("nan"), "nan"), (float("inf"), "inf")])
def test_json_refuses_nan_and_inf_and_keeps_the_old_file(tmp_path, value, shown):
    path = tmp_path / "report.json"
    sheets.save_report(path, {"old": 1})
    broken = full()
    broken["rows"][1]["fd"] = value
    said = rf"report\.json: values must be finite \(got rows\.1\.fd is {shown}\)"
    with pytest.raises(InputError, match=said):
        sheets.save_report(path, broken)
    assert json.loads(path.read_text()) == {"old": 1} and len(list(tmp_path.iterdir())) == 1


def test_a_write_that_stops_halfway_keeps_the_old_file(tmp_path):
    class Full(Image.Image):
        def save(self, path, **_):
            path.write_bytes(b"half")
            raise OSError("disk full")

    sheets.save_png(torch.zeros(3, 4, 4), tmp_path / "a.png", {})
    with pytest.raises(InputError, match="a.png: cannot be written .disk full.$"):
        sheets.save_png(Full(), tmp_path / "a.png", {})
    assert Image.open(tmp_path / "a.png").size == (4, 4)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_excess_is_relative_to_the_untrained_student_at_one_step():
    rows = [row("untrained", 4, 5.0), row("untrained", 1, 9.0), row("student", 1, 3.0),
            row("teacher", 9, 1)]
    def excess(rows: list[dict]) -> list[str]:
        return [line.split("|")[7].strip() for line in sheets.table(rows, {"fd": 1.0}).splitlines()]

    assert excess(rows)[2:] == ["0.500", "1.000", "0.250", "0.000"]
    assert excess(rows[2:])[2:] == ["-", "-"] and excess(rows)[0] == "excess"


def test_table_is_aligned_markdown():
    rows = [row("untrained", 1, 9.0), row("teacher", 12, 12.3456, guidance=2.5,
                                          prompt_accuracy=None), row("student", 1, 3.0)]
    head, rule, *lines = sheets.table(rows, {"fd": 1.0}).splitlines()
    assert len({len(line) for line in (head, rule, *lines)}) == 1 and set(rule) == set("|-: ")
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in (head, *lines)]
    assert cells[0] == [*sheets.ROW][:6] + ["excess"] + [*sheets.ROW][6:]
    assert " ".join(cells[2]) == "teacher euler 12 2.5 12 12.346 1.418 24.691 - 0.900 1.000 1.50"
    assert " ".join(cells[3]) == "student euler 1 1 1 3.000 0.250 6.000 50.0% 0.900 1.000 1.50"


def test_provenance(monkeypatch):
    assert run.versions()["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert re.fullmatch(r"unknown|[0-9a-f]{40,64}(\+dirty)?", run.commit())
    monkeypatch.setattr(run.shutil, "which", lambda name: None)
    assert run.commit() == "unknown"


# --- images ---


def test_pixels_are_rounded_and_clamped():
    image = torch.tensor([-1.0, 1.0, 0.0, -2.0, 2.0, 0.5]).expand(3, 1, 6)
    assert np.asarray(sheets.to_pil(image))[0, :, 0].tolist() == [0, 255, 128, 0, 255, 191]
    assert np.asarray(sheets.to_pil(flat(GREEN, 2, 3))).tolist() == [[[0, 255, 0]] * 3] * 2


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_to_pil_refuses(value):
    with pytest.raises(FloatingPointError, match="an image has NaN or inf"):
        sheets.to_pil(torch.full((3, 2, 2), value))


def test_png_carries_pixels_and_text(tmp_path):
    image = torch.rand(3, 8, 12) * 2 - 1
    text = {"parameters": "red circle\nSteps: 4, Seed: 7", "ladd": '{"prompt": "красный"}'}
    sheets.save_png(image, tmp_path / "a.png", text)
    with Image.open(tmp_path / "a.png") as saved:
        assert saved.format == "PNG" and saved.text == text
        assert np.array_equal(np.asarray(saved), np.asarray(sheets.to_pil(image)))
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def boxes(sheet: Image.Image, colour: list[int]) -> list[int]:
    """(left, top, right, bottom, count) of the pixels of exactly this colour."""
    y, x = np.nonzero((np.asarray(sheet) == (np.array(colour) + 1) * 255 // 2).all(2))
    return [int(v) for v in (x.min(), y.min(), x.max(), y.max(), len(x))]


def test_sheet_puts_images_in_columns_and_rows_at_one_scale():
    """Rows of 16x16, 8x16 and 16x8 pixels at 4 times; a narrower image is centred in its column."""
    sizes = ((16, 16), (8, 16), (16, 8))
    first = [flat(colour, *size) for colour, size in zip((RED, GREEN, BLUE), sizes)]
    columns = {"one": first, "two": [flat(BLACK, *size) for size in sizes]}
    sheet = sheets.contact_sheet(columns, ["", "", ""], cell=64)
    red, green, blue, black = (boxes(sheet, colour) for colour in (RED, GREEN, BLUE, BLACK))
    assert [box[4] for box in (red, green, blue)] == [64 * 64, 32 * 64, 64 * 32]
    assert red[2] - red[0] == green[2] - green[0] == 63 and blue[2] - blue[0] == 31
    assert red[3] < green[1] and green[3] < blue[1]                   # rows from top to bottom
    assert red[0] == green[0] and blue[0] - red[0] == 16              # centred
    assert black[0] > red[2] and (black[1], black[3]) == (red[1], blue[3])


def test_sheet_writes_titles_next_to_their_rows_and_above_their_columns():
    image = [flat(RED, 32, 32), flat(BLUE, 32, 32)]
    plain = sheets.contact_sheet({"": image}, ["", ""], cell=96)
    for head, title, where in (("student 4", "", "above"), ("", "blue square", "left")):
        sheet = sheets.contact_sheet({head: image}, ["", title], cell=96)
        (left, top, _, bottom, count), ink = boxes(sheet, BLUE), np.asarray(sheet.convert("L"))
        assert count == 96 * 96 == boxes(plain, BLUE)[4]
        if where == "above":
            assert (ink[:boxes(sheet, RED)[1]] < 128).sum() > 50
            assert (ink[:, :left] < 128).sum() == 0
        else:
            assert (ink[top:bottom, :left] < 128).sum() > 50 and (ink[:top, :left] < 128).sum() == 0


# --- report.png ---


def test_report_holds_the_sheet_pixel_for_pixel_above_the_plots(tmp_path, sheet):
    data = full()
    sheets.plot_report(tmp_path / "report.png", sheet, data["curves"], data["rows"], data["floor"])
    assert [path.name for path in tmp_path.iterdir()] == ["report.png"]
    with Image.open(tmp_path / "report.png") as saved:
        whole = np.asarray(saved.convert("RGB"))
    assert whole.shape == (sheet.height + 600, max(960, sheet.width), 3)
    left = (whole.shape[1] - sheet.width) // 2
    assert np.array_equal(whole[:sheet.height, left:left + sheet.width], np.asarray(sheet))
    # axes, curves and words below it
    assert (whole[sheet.height:] < 200).sum() > 5000


def test_every_curve_and_the_teacher_show_in_the_plots(tmp_path, sheet):
    """Leaving any of them out changes the picture; a curve that is not drawn does not."""
    def drawn(**change) -> bytes:
        data = full() | change
        sheets.plot_report(tmp_path / "x.png", sheet, data["curves"], data["rows"], data["floor"])
        return (tmp_path / "x.png").read_bytes()

    whole, curves = drawn(), full()["curves"]
    without = {name: drawn(curves={k: v for k, v in curves.items() if k != name}) == whole for name
               in curves}
    assert without == {name: name == "fd_floor" for name in curves}
    for other in (row("teacher", 9, 2.5), row("teacher", 9, 2.0, prompt_accuracy=.6),
                  row("student", 9, 2.0)):
        assert drawn(rows=[other, *full()["rows"][1:]]) != whole
    # fewer steps, higher FD: not the line
    cheap = [row("teacher", 1, 8.0), row("teacher", 9, 4.0)]
    assert drawn(rows=cheap + full()["rows"]) == whole
    assert drawn(floor=dict(fd=1.0, fd2=2.0, fd_curves=.5)) != whole
    assert drawn() == whole
    assert drawn(curves={}, rows=[]) != whole                         # nothing logged yet


# --- what write_run_report writes ---

KEYS = set(
    "preset command device world_size versions commit n seeds seconds floor curves rows".split())
ROW_KEYS = set("model sampler steps guidance nfe fd fd2 prompt_accuracy coverage density "
               "ms_per_image".split())


def check_report(report: dict) -> None:
    """Assert the keys that DESIGN promises to outside code, in section 3."""
    assert KEYS <= report.keys() and {"fd", "fd2"} <= report["floor"].keys()
    assert report["rows"] and all(ROW_KEYS <= row.keys() for row in report["rows"])


@pytest.mark.parametrize("task", ["text", "edit"])
def test_a_report_has_the_keys_of_the_contract(tmp_path, monkeypatch, task):
    """Of networks that were not trained; prompts of held-out combinations come last, but not for
    editing, and show only such combinations."""
    toy = ToyConfig(task, 1, 0.5, 40, ((32, 32),))
    recipe = Recipe(task, ("32x32",), (1.0, 0.5), 1.0, "renoise", 3, 2.0, 1.0, 1, 40)
    sizes = MMDiTConfig(2, 64, 40, 40, 16 + image_channels(task), 16, pos_grid=2)
    networks = [MMDiT(sizes, kernels.load("torch")).requires_grad_(False) for _ in range(3)]
    measured, original = [], evaluate.generate

    def spy(row, codec, prompts, *rest):
        if len(prompts[0].captions) > 2:                               # not those of the sheet
            measured.append((row.model, prompts))
        return original(row, codec, prompts, *rest)

    for module in (compare, evaluate):
        monkeypatch.setattr(module, "generate", spy)
    seconds = {"teacher": 1.0}
    compare.write_run_report(recipe, toy, tmp_path, [], toy_codec(toy), networks,
                             compare.Counts(8, 6, 4), {"preset": "tiny", "seeds": [3]}, seconds,
                             time.perf_counter())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "report.png"]
    report = json.loads((tmp_path / "report.json").read_text())
    check_report(report)
    assert (report["preset"], report["seeds"], report["n"]) == ("tiny", [3], 8)
    assert seconds.keys() == {"teacher", "report"} and report["seconds"] == seconds
    teacher, student, untrained = networks
    models = {"teacher": teacher, "student": student, "untrained": untrained}
    rows = report["rows"]
    assert [models[row["model"]] for row in rows] == [model for model, _ in measured[:len(rows)]]
    assert [row["model"] for row in rows] == ["teacher"] * 3 + ["untrained"] * 2 + ["student"] * 2
    assert [(row["guidance"], row["nfe"]) for row in rows[:3]] == [(2, 6), (2, 8), (1, 4)]
    unseen = measured[len(rows):]
    if task == "edit":
        assert not unseen and report["heldout_prompt_accuracy"] == {}
        return
    assert [model for model, _ in unseen] == [teacher, student]
    assert report["heldout_prompt_accuracy"].keys() == {"teacher_3", "student_2"}
    for prompts, heldout in ((measured[0][1], False), *((prompts, True) for _, prompts in unseen)):
        for part in prompts:
            shown = grader.grade(decode(part.latents), 1)
            assert (is_heldout(shown) == heldout).all() and len(part.captions) == (6 if heldout
                                                                                   else 8)
