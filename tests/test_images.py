"""Pictures as people have them: turns, transparency, sizes that lie; folders, lists, prompts."""
import io
import json
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile, features

from ladd.cli import InputError
from ladd.data import images
from ladd.data.files import read_objects
from ladd.data.prompts import read_prompts

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
T = Image.Transpose
# what is stored for each orientation, so that the quadrants are displayed
STORED = {1: None, 2: T.FLIP_LEFT_RIGHT, 3: T.ROTATE_180, 4: T.FLIP_TOP_BOTTOM, 5: T.TRANSPOSE,
          6: T.ROTATE_90, 7: T.TRANSVERSE, 8: T.ROTATE_270}


def quadrants(orientation: int = 1) -> Image.Image:
    """Red, green over blue, white."""
    image = Image.new("RGB", (60, 40), "white")
    for colour, x, y in (("red", 0, 0), ("lime", 30, 0), ("blue", 0, 20)):
        image.paste(colour, (x, y, x + 30, y + 20))
    return image if orientation == 1 else image.transpose(STORED[orientation])


def corners(path: Path, hw: tuple[int, int] = (32, 48)) -> torch.Tensor:
    return images.read_image(path, hw)[:, [3, 3, -4, -4], [3, -4, 3, -4]].T.float()


def assert_displayed(path: Path, expected=(RED, GREEN, BLUE, WHITE), most: float = 0) -> None:
    assert images.image_size(path) == (40, 60)
    assert (corners(path) - torch.tensor(expected)).abs().max() <= most


# --- turns ---

def chunk(kind: bytes, data: bytes) -> bytes:
    checksum = zlib.crc32(kind + data)
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)


def png(image: Image.Image, kind: bytes, data: bytes, after: bool) -> bytes:
    """A PNG with one chunk more, before or after its pixels."""
    file = io.BytesIO()
    image.save(file, "png")
    whole = file.getvalue()
    at = whole.rindex(b"IEND") - 4 if after else whole.index(b"IDAT") - 4
    return whole[:at] + chunk(kind, data) + whole[at:]


def exif(orientation: int) -> Image.Exif:
    data = Image.Exif()
    data[0x0112] = orientation
    return data


def xmp(orientation: int) -> bytes:
    return (f'<rdf:RDF><rdf:Description tiff:Orientation="{orientation}"/></rdf:RDF>').encode()


def raw_profile(orientation: int) -> bytes:
    """EXIF data in a text chunk, as ImageMagick writes it."""
    data = b"Exif\0\0" + exif(orientation).tobytes().removeprefix(b"Exif\0\0")
    return b"Raw profile type exif\0" + f"\nexif\n{len(data):8}\n{data.hex()}\n".encode()


def xmp_text(orientation: int) -> bytes:
    return b"XML:com.adobe.xmp\0\0\0\0\0" + xmp(orientation)


def tiff_exif(orientation: int) -> bytes:
    return exif(orientation).tobytes().removeprefix(b"Exif\0\0")


# way: (file name, options of Image.save by orientation, or a chunk of PNG and where it stands)
WAYS = {"jpeg": ("a.jpg", lambda o: dict(exif=exif(o), quality=95)),
        "jpeg xmp": ("a.jpeg", lambda o: dict(xmp=xmp(o), quality=95)),
        "mpo": ("a.mpo", lambda o: dict(exif=exif(o), save_all=True, append_images=[quadrants()])),
        "png": ("a.png", lambda o: dict(exif=exif(o))),
        "png exif after": ("a.png", (b"eXIf", tiff_exif, True)),
        "png raw": ("a.png", (b"tEXt", raw_profile, False)),
        "png raw after": ("a.png", (b"tEXt", raw_profile, True)),
        "png xmp": ("a.png", (b"iTXt", xmp_text, False)),
        "png xmp after": ("a.png", (b"iTXt", xmp_text, True)),
        "apng": ("a.apng", lambda o: dict(exif=exif(o), save_all=True, append_images=[
            Image.new("RGB", (60, 40) if o < 5 else (40, 60))])),
        "tiff": ("a.tif", lambda o: dict(tiffinfo={0x0112: o})),
        "tiff lzw": ("a.tiff", lambda o: dict(tiffinfo={0x0112: o}, compression="tiff_lzw")),
        "tiff pages": ("a.tif", lambda o: dict(tiffinfo={0x0112: o}, save_all=True,
                                               append_images=[quadrants()])),
        "tiff xmp": ("a.tif", lambda o: dict(tiffinfo={700: xmp(o)})),
        "tiff both": ("a.tif", lambda o: dict(tiffinfo={0x0112: o, 700: xmp(9 - o)})),
        "webp": ("a.webp", lambda o: dict(exif=exif(o), lossless=True)),
        "webp xmp": ("a.webp", lambda o: dict(xmp=xmp(o), lossless=True)),
        "avif": ("a.avif", lambda o: dict(exif=exif(o), quality=100)),
        "avif xmp": ("a.avif", lambda o: dict(xmp=xmp(o), quality=100))}


@pytest.mark.parametrize("way", WAYS)
def test_size_and_pixels_are_turned_alike_however_the_turn_is_stored(tmp_path, monkeypatch, way):
    name, how = WAYS[way]
    if name.endswith(".avif") and not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    for orientation in STORED:
        path = tmp_path / name
        if callable(how):
            quadrants(orientation).save(path, **how(orientation))
        else:
            kind, data, after = how
            path.write_bytes(png(quadrants(orientation), kind, data(orientation), after))
        assert_displayed(path, most=8 if path.suffix in (".jpg", ".jpeg", ".mpo", ".avif") else 0)
        with monkeypatch.context() as patch:        # the size comes from the header alone
            patch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
            assert images.image_size(path) == (40, 60)


@pytest.mark.parametrize("kind, text", [(b"tEXt", b"xmp\0text"), (b"tEXt", b"exif\0text"),
                                        (b"tEXt", b"Raw profile type exif\0text"),
                                        (b"eXIf", b"no exif data")])
def test_broken_descriptions_are_one_line(tmp_path, kind, text):
    for after in (False, True):
        (tmp_path / "a.png").write_bytes(png(quadrants(), kind, text, after))
        try:
            assert_displayed(tmp_path / "a.png")
        except InputError as error:
            assert str(error).startswith("not a complete image (") and "\n" not in str(error)


# --- pixels ---

def raw_png(bits: int, colours: int, values: np.ndarray, transparent: list[int]) -> bytes:
    """A PNG of 60 x 40 (channels) values, with one transparent colour."""
    values = values.reshape(40, -1)
    rows = values.astype(">u2").view(np.uint8) if bits == 16 else np.packbits(
        np.unpackbits(values.astype(np.uint8)[..., None], axis=-1)[..., 8 - bits:].reshape(40, -1),
        axis=-1)
    return b"\x89PNG\r\n\x1a\n" + b"".join([
        chunk(b"IHDR", struct.pack(">IIBBBBB", 60, 40, bits, colours, 0, 0, 0)),
        chunk(b"tRNS", struct.pack(f">{len(transparent)}H", *transparent)),
        chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))),
        chunk(b"IEND", b"")])


@pytest.mark.parametrize("bits, clear, other, shown", [
    (1, 0, 1, 255), (2, 1, 2, 170), (4, 5, 10, 170), (8, 90, 91, 91), (16, 300, 43690, 170),
    (16, 43690, 43690 - 256, 169)])
def test_the_transparent_gray_of_a_png_is_white(tmp_path, bits, clear, other, shown):
    values = np.full((40, 60), other)
    values[:, :30] = clear
    (tmp_path / "a.png").write_bytes(raw_png(bits, 0, values, [clear]))
    assert_displayed(tmp_path / "a.png", (WHITE, (shown,) * 3, WHITE, (shown,) * 3))


@pytest.mark.parametrize("bits", [8, 16])
def test_the_transparent_colour_of_a_png_is_white(tmp_path, bits):
    scale = 1 if bits == 8 else 257
    values = np.full((40, 60, 3), 200 * scale)
    values[:, :30] = [10 * scale, 20 * scale, 30 * scale]
    (tmp_path / "a.png").write_bytes(raw_png(bits, 2, values, [c * scale for c in (10, 20, 30)]))
    assert_displayed(tmp_path / "a.png", (WHITE, (200,) * 3, WHITE, (200,) * 3))


@pytest.mark.parametrize("mode, name", [
    ("1", "a.png"), ("1", "a.pbm"), ("1", "a.tif"), ("L", "a.pgm"), ("LA", "a.png"),
    ("P", "a.gif"), ("PA", "a.tif"), ("RGB", "a.ppm"), ("RGB", "a.tga"), ("RGB", "a.qoi"),
    ("RGB", "a.jfif"), ("RGB", "a.jp2"), ("RGBA", "a.tga"), ("CMYK", "a.jpg"), ("CMYK", "a.tif"),
    ("YCbCr", "a.tif"), ("RGB", "a.pcx"), ("RGB", "a.bmp"), ("RGBA", "a.ico")])
def test_modes_and_formats_are_displayed_as_pillow_converts_them(tmp_path, mode, name):
    image = quadrants().convert(mode) if mode != "PA" else quadrants().convert("P").convert("PA")
    try:
        options = dict(sizes=[(60, 40)]) if name == "a.ico" else {}
        image.save(tmp_path / name, **options)
    except (OSError, KeyError):
        pytest.skip(f"this Pillow writes no {mode} to {name}")
    expected = image.convert("RGB") if mode != "CMYK" else quadrants()
    wanted = np.asarray(expected).astype(int)
    found = np.asarray(images.displayed(tmp_path / name).convert("RGB")).astype(int)
    assert images.image_size(tmp_path / name) == (40, 60) and found.shape == wanted.shape
    assert abs(found - wanted).mean() < (12 if name[-3:] in ("jpg", "fif", "jp2") else 1e-9)


# --- sizes that lie ---

def header_of(w: int, h: int) -> bytes:
    """A PNG whose header claims w x h pixels."""
    return b"\x89PNG\r\n\x1a\n" + b"".join([
        chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, 8, 2, 0, 0, 0)),
        chunk(b"IDAT", zlib.compress(bytes(520_000))), chunk(b"IEND", b"")])


@pytest.mark.parametrize("wh", [(13360, 13360), (8193, 8192), (2 ** 30, 16),
                                (2 ** 31 - 1, 2 ** 31)])
def test_a_huge_image_is_refused_before_it_is_decoded(tmp_path, monkeypatch, wh):
    bomb = header_of(*wh)
    (tmp_path / "a.png").write_bytes(bomb)
    # an icon has a picture inside
    (tmp_path / "a.ico").write_bytes(struct.pack("<3H4B2H2I", 0, 1, 1, 60, 40, 0, 0, 1, 32,
                                                 len(bomb), 22) + bomb)
    def fail(*args):
        pytest.fail("allocated")
    monkeypatch.setattr(Image.core, "new", fail)
    monkeypatch.setattr(Image.core, "fill", fail)
    for read in (images.image_size, lambda path: images.read_image(path, (32, 32))):
        for name in ("a.png", "a.ico"):
            with pytest.raises(InputError, match="exceeds limit of 67108864 pixels"):
                read(tmp_path / name)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_the_largest_size_is_read(tmp_path):
    (tmp_path / "a.png").write_bytes(header_of(8192, 8192))
    assert images.image_size(tmp_path / "a.png") == (8192, 8192)


def test_neither_programs_nor_pipes_are_opened(tmp_path, monkeypatch):
    """Ghostscript would run a PostScript file; a pipe would wait for ever."""
    quadrants().save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.png")
    os.mkfifo(tmp_path / "b.png")
    (tmp_path / "c.png").mkdir()
    for name, message in (("a.png", "cannot identify"), ("b.png", "must be a file"),
                          ("c.png", "must be a file"), ("a\0.png", "not a complete image"),
                          ("a" * 300, "not a complete image")):
        with pytest.raises(InputError, match=message):
            images.read_image(tmp_path / name, (32, 32))
    assert not {".eps", ".ps", ".pdf", ".txt", ".json"} & images.SUFFIXES
    assert {".avif", ".jfif", ".jp2", ".tga", ".ppm", ".heic", ".png"} <= images.SUFFIXES


# --- folders ---

def save(path: Path, **texts: str | bytes) -> Path:
    """Save a picture with files next to it, given by their endings."""
    path.parent.mkdir(parents=True, exist_ok=True)
    quadrants().save(path)
    for ending, text in texts.items():
        path.with_suffix(f".{ending}").write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def found_in(folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """(captions, reasons) by the paths below a folder."""
    found, skipped = images.find_images(folder)
    assert [image.path for image in found] == sorted(image.path for image in found)
    return ({str(image.path.relative_to(folder)): image.caption for image in found},
            {name.removeprefix(f"{folder}/"): reason for name, reason in skipped.items()})


def test_captions_are_taken_from_what_stands_beside_an_image(tmp_path):
    save(tmp_path / "a.png", txt="one\n two", caption="no", json='{"caption": "no"}')
    save(tmp_path / "b.PNG", caption="two", json='{"caption": "no"}')
    save(tmp_path / "c.bmp", json='{"text": "three", "seed": 1}')
    save(tmp_path / "d.ppm", json='{"prompt": "four", "caption": null}')
    save(tmp_path / "e.tga", TXT=b"\xef\xbb\xbffive\r\n")
    save(tmp_path / "f.png", txt="")
    assert found_in(tmp_path) == ({"a.png": "one two", "b.PNG": "two", "c.bmp": "three",
                                   "d.ppm": "four", "e.tga": "five", "f.png": ""}, {})


@pytest.mark.parametrize("name, text", [
    ("metadata.jsonl", '{"file_name": "a.png", "text": "one"}\n'
                       '{"file_name": "./sub/b.png", "caption": "two, three"}\n'
                       '{"file_name": "gone.png", "prompt": "four"}\n'
                       '{"file_name": "sub/b.png", "caption": "again"}\n'),
    ("metadata.csv", '\ufefffile_name, Text\r\na.png,one\r\nsub/b.png,"two, three"\r\n'
                     'gone.png,four\r\nsub/b.png,again\r\n')])
def test_an_imagefolder_is_read(tmp_path, name, text):
    for path in ("data/train/a.png", "data/train/sub/b.png", "data/train/c.png"):
        save(tmp_path / path)
    save(tmp_path / "data/train/d.png", txt="five")
    (tmp_path / "data" / "train" / name).write_text(text)
    found, skipped = found_in(tmp_path / "data")
    assert found == {"train/a.png": "one", "train/sub/b.png": "two, three", "train/d.png": "five"}
    folder = tmp_path / "data" / "train"
    assert skipped == {"train/c.png": "no caption; write c.txt or c.json",
                       "train/gone.png": "no image for this caption in the metadata",
                       f"train/{name}: {folder / 'sub/b.png'}": "no image for this second caption"}


@pytest.mark.parametrize("name, text, reason", [
    ("metadata.jsonl", '{"file_name": "a.png"}', 'line 1 must be {"image": "...", "caption": '),
    ("metadata.csv", "id,text\n1,one", 'row 1 must be {"image": "...", "caption": "..."} (got '),
    ("metadata.csv", "file_name,text\na.png,red, round", "must be a CSV file with names in its"),
    ("metadata.csv", 'file_name,text\na.png,"red', "must be a CSV file with names in its")])
def test_a_table_that_is_none_is_listed_and_the_rest_is_read(tmp_path, name, text, reason):
    save(tmp_path / "a.png", txt="one")
    (tmp_path / name).write_text(text)
    found, skipped = found_in(tmp_path)
    assert found == {"a.png": "one"} and list(skipped) == [name] and reason in skipped[name]


def test_linked_folders_are_followed_once_and_loops_end(tmp_path):
    save(tmp_path / "elsewhere" / "deep" / "a.png", txt="one")
    save(tmp_path / "photos" / "b.png", txt="two")
    (tmp_path / "photos" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "photos" / "other").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "photos" / "self").symlink_to(tmp_path / "photos")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "photos")
    (tmp_path / "photos" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "photos" / "c.png").symlink_to(tmp_path / "photos" / "b.png")
    found, skipped = found_in(tmp_path / "photos")
    assert found == {"b.png": "two", "link/deep/a.png": "one"}
    assert set(skipped) == {"c.png", "gone.png"}


def test_what_is_left_out_is_listed_with_its_reason(tmp_path, monkeypatch):
    save(tmp_path / "a.png", txt="one")
    (tmp_path / "b.txt").write_text("two")
    (tmp_path / "c.caption").write_text("three")
    (tmp_path / "c.raw").write_bytes(b"")
    (tmp_path / "d.heic").write_bytes(b"ftypheic")
    (tmp_path / "d.txt").write_text("four")
    for name, json_text in (("e", "[" * 100_000), ("f", '{"caption": 5}'), ("g", "null"),
                            ("h", '{"caption": ' + "9" * 5000 + "}"), ("i", '{"text": "\\ud800"}')):
        save(tmp_path / f"{name}.png", json=json_text)
    found, skipped = found_in(tmp_path)
    assert found == {"a.png": "one", "d.heic": "four"}      # Pillow may open it, which is tried
    assert skipped["b.txt"] == skipped["c.caption"] == "no image for this caption"
    assert all("must be" in skipped[f"{name}.png"] for name in "fgi")
    assert all("not a complete JSON file" in skipped[f"{name}.png"] for name in "eh")
    with pytest.raises(InputError, match=r"not a complete image \(cannot identify"):
        images.image_size(tmp_path / "d.heic")

    def walk(folder, onerror, **options):
        onerror(PermissionError(13, "Permission denied", str(tmp_path / "closed")))
        return [(str(tmp_path), [], ["a.png", "a.txt"])]

    monkeypatch.setattr(images.os, "walk", walk)
    assert found_in(tmp_path)[1] == {"closed": "cannot be read (Permission denied)"}


def test_names_of_any_bytes_are_read(tmp_path):
    folder = os.fsencode(tmp_path)
    for i, name in enumerate((b"\xff\xfe", b"new\nline", b"\x1b[31mred", b"a.b c", b"'\"")):
        save(tmp_path / "a.png", txt=f"{i}")
        for ending in (b".png", b".txt"):
            os.rename(folder + b"/a" + ending, folder + b"/" + name + ending)
    found, skipped = images.find_images(tmp_path)
    assert sorted(image.caption for image in found) == list("01234") and not skipped
    json.dumps([str(image.path) for image in found]).encode()
    assert all(images.image_size(image.path) == (40, 60) for image in found)


def test_a_folder_without_images_says_what_it_has(tmp_path):
    for name in ("a.tar", "b.parquet", "c.txt"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(InputError, match=r"\(got no image among .parquet, .tar, .txt\)$"):
        images.find_images(tmp_path)


def test_lists_take_the_names_and_forms_of_other_programs(tmp_path):
    expected = [images.Captioned(tmp_path / "a.png", "one"), images.Captioned(tmp_path / "b", "2")]
    rows = [{"file_name": "a.png", "text": "one"}, {"image": "b", "prompt": "2"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "a.JSON").write_text(json.dumps(rows))
    (tmp_path / "a.csv").write_text("image,caption\na.png,one\nb,2\n")
    for name in ("a.jsonl", "a.JSON", "a.csv"):
        assert images.find_listed(tmp_path / name) == expected


# --- prompt files ---

@pytest.mark.parametrize("name, content, prompts", [
    ("a.TXT", "a cat\n{red|blue} fox\n[a:b:0.5]\n", ["a cat", "{red|blue} fox", "[a:b:0.5]"]),
    ("a.JSONL", '{"prompt": "a"}\n{"text": "b"}\n{"caption": "c"}\n', ["a", "b", "c"]),
    ("a.jsonl", '{"prompt": "a", "text": "no"}\r\n{"prompt": null, "caption": "c"}', ["a", "c"]),
    ("a.Json", '["a", {"prompt": "b"}, {"text": "c"}, {"caption": "d"}]', list("abcd")),
    ("a.csv", '\ufeffid,Prompt\r\n1,"a, b"\r\n\r\n2,c\r\n', ["a, b", "c"]),
    ("a.CSV", 'text\n"two\nlines"\n', ["two\nlines"]),
    ("a.csv", "caption,seed\na,1", ["a"])])
def test_prompt_files_are_read_by_their_ending(tmp_path, name, content, prompts):
    (tmp_path / name).write_text(content, newline="")
    assert read_prompts(tmp_path / name)[0] == prompts


DEEP = "[" * 100_000
FORMS = r"must be a .txt file with one prompt per line, or .jsonl, .json or .csv .*\(got "


@pytest.mark.parametrize("name, content, message", [
    ("a.md", "a cat", FORMS + r".md\)"), ("prompts", "a cat", FORMS + r"no ending\)"),
    ("a.txt", 'a cat\n{"prompt": "a"}', r"line 2 is JSON, not a prompt .*end in .jsonl or .json"),
    ("a.txt", '{\n "prompt": "a"\n}', "line 1 is JSON"),
    ("a.txt", '["a", "b"]', "line 1 is JSON"), ("a.txt", '{"a": ' + DEEP, "line 1 is JSON"),
    ("a.txt", "", "at least one prompt"), ("a.json", "", "not a complete JSON file"),
    ("a.json", "[]", "at least one prompt"), ("a.json", '{"prompt": "a"}', r"JSON list \(got dict"),
    ("a.json", '["a", 5]', r"item 2 must be {\"prompt\": .* \(got 5\)"),
    ("a.json", '[{"prompt": ["a"]}]', "item 1 must be"), ("a.json", DEEP, "not a complete JSON"),
    ("a.json", "[" + "9" * 5000 + "]", "not a complete JSON"),
    ("a.json", "null", r"JSON list \(got NoneType"), ("a.json", '["\\ud800"]', "item 1 must be"),
    ("a.jsonl", DEEP, "line 1 must be"),
    ("a.jsonl", '{"prompt": ' + "9" * 5000 + "}", "line 1 must be"),
    ("a.csv", "", "at least one prompt"),
    ("a.csv", "a cat\na dog", r"row 1 must be .*\(got {'a cat': 'a dog'}\)"),
    ("a.csv", "prompt\n", "at least one prompt"),
    ("a.csv", "prompt\na, b", "a cell for each in the others, in quotes with commas"),
    ("a.csv", "id,prompt\n1", "a cell for each"), ("a.csv", 'prompt\n"a', "must be a CSV file"),
    ("a.csv", "prompt\n" + "a" * 200_000, "must be a CSV file")])
def test_bad_prompt_files_are_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message) as error:
        read_prompts(tmp_path / name)
    assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.csv"])
def test_prompt_files_that_are_no_utf_8_are_one_line(tmp_path, name):
    for content in ("prompt\na".encode("utf-16"), b"prompt\n\xff"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match="UTF-8|utf-8|not a complete JSON"):
            read_prompts(tmp_path / name)


def test_empty_prompts_are_counted(tmp_path):
    (tmp_path / "a.csv").write_text('prompt,seed\na,1\n,2\n" ",3\n')
    prompts, notes = read_prompts(tmp_path / "a.csv")
    assert prompts[:2] == ["a", ""] and notes == [f"{tmp_path / 'a.csv'}: 2 empty prompts kept"]


def test_objects_keep_what_else_they_have(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a", "seed": 3}')
    assert read_objects(tmp_path / "a.jsonl", ["prompt"]) == [
        {"text": "a", "seed": 3, "prompt": "a"}]
