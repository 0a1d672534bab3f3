"""Inputs changed at random, 500 of each kind: each is taken or refused in one line, in seconds and
without gigabytes."""
import copy
import json
import random
import resource
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sd3 import make_folder
from test_sample import CONFIG, describe, network

import sample
import train
from ladd.cli import InputError
from ladd.config import FIELDS, from_json, parse_config, to_json
from ladd.core.lora import Factors
from ladd.data import files, shards
from ladd.data.images import find_images, image_size, read_image
from ladd.data.prompts import read_prompts
from ladd.engine import state
from ladd.engine.run import read_log, read_seconds
from ladd.sd3 import checkpoint, lora_files
from ladd.sd3.encoders import encode_prompts, load_encoders, load_vae

CASES, SECONDS, BYTES = 500, 30, 2 * 2 ** 30
ODD = (None, True, -1, 0, 1, 3.5, 1e308, float("nan"), 10 ** 400, "", "x", "1", "nan", "\x1b[31m",
       "\ud800", "a" * 10 ** 5, [], [[]], [1], {}, {"float": []}, {"float": "x"}, {"a": {"b": 1}},
       "../../etc/passwd", "64x64", "1,0.5", "-1", "1e999", "9" * 5000)
WORDS = ("0", "1", "-1", "nan", "inf", "-inf", "1e400", "9" * 30, "", " ", "x", "true", "a,b",
         "1,2", ",", "16x16", "17x16", "99999999x16", "0x0", "../x", "/", "a\x00b", "\ud800", "é",
         "=", "--", "1.5", "0.5", "1e-400", "[]", "{}", "None", "on", "off", "1,0.75,0.5,0.25")


def change_bytes(data: bytes, chance: random.Random) -> bytes:
    """Return the bytes with a few flips, cuts, repeats or foreign parts."""
    data = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 5))):
        at = chance.randrange(len(data) + 1)
        end = min(len(data), at + chance.choice((1, 2, 8, 100, 10 ** 6)))
        kind = chance.randrange(6)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << chance.randrange(8)
        elif kind == 1:
            del data[at:end]
        elif kind == 2:
            data[at:at] = data[at:end]
        elif kind == 3:
            data[at:end] = bytes(end - at)
        elif kind == 4:
            data[at:at] = chance.choice((b"\xff\xfe", b"\xef\xbb\xbf", b"\x00", b'"', b"{", b"[[",
                                         b"[" * 10 ** 5, b"\r\n", b"NaN", b"-", b"e999"))
        else:
            data[at:end] = chance.randbytes(end - at)
    return bytes(data)


def change_json(value, chance: random.Random):
    """Return a value with one of its parts replaced, removed or renamed."""
    value = copy.deepcopy(value)
    places = []

    def visit(node) -> None:
        for key in (node if isinstance(node, dict) else range(len(node))):
            places.append((node, key))
            if isinstance(node[key], dict | list):
                visit(node[key])

    if not isinstance(value, dict | list) or not value:
        return chance.choice(ODD)
    visit(value)
    node, key = chance.choice(places)
    kind = chance.randrange(4)
    if kind == 0:
        del node[key]
    elif kind == 1 and isinstance(node, dict):
        node[chance.choice(("x", "", "\ud800", key + "x"))] = node.pop(key)
    else:
        node[key] = chance.choice(ODD)
    return value


def change_words(words: list[str], chance: random.Random) -> list[str]:
    """Return a command line of --flag=value with values replaced or extended, and now and then with
    words left out, repeated or added."""
    words = list(words)
    for _ in range(chance.choice((1, 1, 1, 2))):
        at = chance.randrange(len(words))
        flag, _, value = words[at].rpartition("=")
        kind = chance.randrange(8)
        if kind < 4:
            words[at] = f"{flag}={chance.choice(WORDS)}"
        elif kind < 6:
            more = chance.choice((value + chance.choice(WORDS), value[:-1], value * 2))
            words[at] = f"{flag}={more}"
        elif kind == 6:
            del words[at]
        else:
            words.insert(at, chance.choice((*WORDS, words[at])))
        words = words or ["--"]
    return words


def dump(value) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")


def attack(seed: int, make: Callable[[random.Random], object],
           read: Callable[[object], object], most: float = 0.98) -> None:
    """Give `read` what `make` returns, CASES times; each call returns or raises InputError (or
    FloatingPointError), and at most a share `most` of them raise."""
    chance, refused = random.Random(seed), 0
    for i in range(CASES):
        case = make(chance)
        start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            read(case)
        except (InputError, FloatingPointError) as error:
            refused += 1
            assert str(error).strip(), (i, case)
        except SystemExit as end:       # --help
            assert end.code in (0, None), (i, case)
        except BaseException as error:
            raise AssertionError(f"case {i}: {case!r:.1000}") from error
        used = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        assert time.perf_counter() - start < SECONDS and used < BYTES, (i, case)
    # the changes are worth something, and not all of them
    assert CASES / 20 < refused <= most * CASES, refused


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with one of everything, each as small as can be."""
    home = tmp_path_factory.mktemp("made")
    run = home / "runs" / "demo"
    for seed, role in enumerate(("student", "teacher")):
        checkpoint.save_mmdit(network(seed), run / "checkpoints" / f"{role}.safetensors",
                              describe(CONFIG, role))
    (run / "config.json").write_text(to_json(CONFIG))
    (run / "log.jsonl").write_text('{"stage": "distill", "step": 1, "loss_d": 2.0}\n' * 3)
    (run / "seconds.json").write_text('{"teacher": 3.0}\n')
    saver = state.Saver(home / "state")
    saver.begin(3, {"a": torch.ones(4, 3), "b": torch.zeros(())}, {"best": 1.0, "first": {}})
    saver.finish()
    factors = Factors(torch.ones(2, 64), torch.ones(192, 2), 2.0)
    layers = {"joint_blocks.0.x_block.attn.qkv": factors}
    lora_files.save(home / "lora.safetensors", layers, network(0).config)
    null = torch.zeros(3, 4), torch.zeros(5)
    shards.open_folder(home / "data", {"seed": 1}, ["a", "b"], torch.zeros(2, 1), null, 2)
    shards.write_text(home / "data", 0, torch.ones(2, 3, 4), torch.ones(2, 5))
    shards.write_shard(home / "data", 0, torch.ones(4, 16, 2, 2), torch.tensor([0, 1, 0, 1]))
    pixels = np.random.default_rng(0).integers(0, 255, (32, 48, 3), np.uint8)
    for name in ("a.png", "a.jpg", "a.webp", "a.tif", "a.gif", "a.bmp"):
        Image.fromarray(pixels).save(home / name)
    (home / "prompts.txt").write_text("a fox\n# note\n\na dog in snow\n")
    (home / "prompts.jsonl").write_text('{"prompt": "a fox"}\n{"prompt": "a dog"}\n')
    return home


def copied(made: Path, target: Path, name: str) -> Path:
    """Return a fresh copy of a file or folder of `made` in `target`."""
    path = target / name
    shutil.rmtree(path, ignore_errors=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    if (made / name).is_dir():
        shutil.copytree(made / name, path)
    else:
        shutil.copy(made / name, path)
    return path


LINE = ("--preset=sd3-medium --steps=400 --batch=8 --lr=1e-5 --levels=1,0.5 --set=probs=0.5,0.5 "
        "--sizes=64x64,48x80 --taps=0,1 --set=easy_steps=3 --lora=4 --dry-run=on --name=x").split()


def test_command_lines_of_train(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    attack(1, lambda chance: change_words(LINE, chance), parse_config)
    names = list(FIELDS)

    def any_flag(chance: random.Random) -> list[str]:
        name = chance.choice(names)
        value = chance.choice(WORDS)
        if FIELDS[name].metadata["show"] == "preset":
            return ["--set", f"{name}={value}"]
        return [f"--{name.replace('_', '-')}", value]

    attack(2, any_flag, parse_config)
    assert not list(tmp_path.iterdir())


def test_dry_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    line = ("--tflops=1 --set=width=64 --set=depth=2 --taps=0,1 --sizes=64x64 --batch=8 --lora=2 "
            "--student-depth=1").split()
    monkeypatch.setattr(sys.modules[__name__], "CASES", 60)     # a quarter of a second each
    attack(3, lambda chance: change_words(line, chance) + ["--dry-run"], train.main)
    assert not list(tmp_path.iterdir())


def test_command_lines_of_sample(made, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(copied(made, tmp_path, "runs").parent)
    line = ("--run=runs/demo --prompt=circle --num=2 --steps=1 --seed=3 --size=32x32 --batch=2 "
            "--out=o --kernels=torch --device=cpu").split()

    def call(words: list[str]) -> None:
        for left in ("o", "o.png"):
            shutil.rmtree(tmp_path / left, ignore_errors=True)
        sample.main(words)

    call(line)
    attack(4, lambda chance: change_words(line, chance), call)


@pytest.mark.parametrize("name, read", [
    ("runs/demo/config.json", lambda path: from_json(files.read_json(path, dict), path)),
    ("runs/demo/config.json", lambda path: sample.find_run(sample.make_parser().parse(
        ["--run", str(path.parent), "--prompt", ""]))),
    ("state/step_000003/meta.json", lambda path: state.open_state(path.parents[1])),
    ("data/provenance.json", lambda path: shards.read_folder(path.parent)),
    ("data/prompts.json", lambda path: shards.read_folder(path.parent))],
    ids=["config", "recipe", "state", "provenance", "prompts"])
def test_json(made, tmp_path, name, read):
    copied(made, tmp_path, name.split("/")[0])
    path = tmp_path / name
    value, data = json.loads(path.read_text()), path.read_bytes()

    def make(chance: random.Random) -> bytes:
        return dump(change_json(value, chance)) if chance.random() < 0.5 else change_bytes(data,
                                                                                           chance)

    def call(content: bytes) -> None:
        path.write_bytes(content)
        read(path)

    # meta.json and tensors have checksums
    attack(5, make, call, 1)


def test_logs_and_clocks_never_stop_a_run(made, tmp_path):
    run = copied(made, tmp_path, "runs/demo")
    for name, read in (("log.jsonl", read_log), ("seconds.json", read_seconds)):
        chance, data = random.Random(6), (run / name).read_bytes()
        for _ in range(CASES):
            (run / name).write_bytes(change_bytes(data, chance))
            read(run)


@pytest.mark.parametrize("name, read", [
    ("runs/demo/checkpoints/student.safetensors", checkpoint.load_mmdit),
    ("runs/demo/checkpoints/student.safetensors", checkpoint.load_metadata),
    ("lora.safetensors", lora_files.load),
    ("state/step_000003/part-00000-of-00001.safetensors",
     lambda path: state.open_state(path.parents[1])),
    ("data/00000-2x2.safetensors", lambda path: shards.read_folder(path.parent)),
    ("data/text-00000.safetensors", lambda path: shards.read_folder(path.parent)),
    ("data/prompts.safetensors", lambda path: shards.read_folder(path.parent))],
    ids=["network", "metadata", "lora", "state", "shard", "text", "prompts"])
def test_safetensors(made, tmp_path, name, read):
    """Headers as JSON, bytes, and, so that the checksum is right, tensors."""
    copied(made, tmp_path, name.split("/")[0])
    path = tmp_path / name
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8:8 + size])
    tensors, metadata = files.read_tensors(path)
    tensors = {key: t.clone() for key, t in tensors.items()}

    def make(chance: random.Random) -> bytes | tuple[dict, dict]:
        kind = chance.randrange(3)
        if kind == 0:
            return change_bytes(data, chance)
        if kind == 1:
            text = dump(change_json(header, chance))
            return len(text).to_bytes(8, "little") + text + data[8 + size:]
        some, about = dict(tensors), dict(metadata)
        key = chance.choice(sorted(some))
        t = some.pop(key)
        new = chance.choice((t.flatten()[:1], t[None], t.flatten(), t.flatten()[:0],
                             torch.zeros(()), t.double(), t.long(),
                             torch.full_like(t, 1 if t.dtype == torch.int64 else 1e30),
                             t.bool(), torch.zeros(1, 2, 3)))
        name = chance.choice((key, key, f"{key}x", key.replace("0", "99999"), "\x1b[31m", "a" * 999,
                              key.replace("weight", "bias"),
                              key.replace("lora_A", "lora_magnitude"),
                              key.replace("lora_A.weight", "dora_scale")))
        if chance.random() < 0.8:
            some[name] = new
        if about and chance.random() < 0.3:
            about[chance.choice(sorted(about))] = chance.choice([v for v in ODD if type(v) is str
                                                                 and "\ud800" not in v])
        return some, about

    def call(content: bytes | tuple[dict, dict]) -> None:
        path.unlink(missing_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            files.write_tensors(path, *content)
        read(path)

    attack(7, make, call, 1)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.tif", "a.gif", "a.bmp"])
def test_pictures(made, tmp_path, name, monkeypatch):
    data = (made / name).read_bytes()
    path = tmp_path / name
    monkeypatch.setattr(sys.modules[__name__], "CASES", 150)    # of each format

    def call(content: bytes) -> None:
        path.write_bytes(content)
        h, w = image_size(path)
        read_image(path, (h, w) if h * w < 10 ** 7 else (32, 32))

    attack(8, lambda chance: change_bytes(data, chance), call)


def test_folders_of_pictures(made, tmp_path):
    """Names of files, captions beside them, links."""
    picture = (made / "a.png").read_bytes()
    names = ("a.png", "a.txt", "b.png", "b.json", "b.caption", "c.jpg", "metadata.jsonl",
             "metadata.csv", "d.txt", "e é.png", "e é.txt", "f\n.png", ".hidden.png", "g.PNG",
             "g.TXT", "x/a.png", "x/a.txt", "h.avif", "h.txt")
    captions = (b"a fox", b"", b"\xff", b'{"caption": "a fox"}', b'{"text": 5}', b"[]",
                b'{"file_name": "a.png", "text": "a fox"}\n', b"file_name,text\na.png,a fox\n",
                b"[" * 10 ** 5)

    def make(chance: random.Random) -> dict[str, bytes | None]:
        chosen = chance.sample(names, chance.randrange(1, 9))
        return {name: chance.choice((picture, change_bytes(picture, chance))) if "." in name
                and name.lower().endswith(("png", "jpg", "avif")) else chance.choice(captions)
                for name in chosen}

    def call(found: dict[str, bytes]) -> None:
        folder = tmp_path / "pictures"
        shutil.rmtree(folder, ignore_errors=True)
        for name, content in found.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        (folder / "loop").symlink_to(folder)
        find_images(folder)

    attack(9, make, call)


@pytest.mark.parametrize("name", ["prompts.txt", "prompts.jsonl"])
def test_prompt_files(made, tmp_path, name):
    data = (made / name).read_bytes()

    def call(content: bytes) -> None:
        for ending in ("prompts.csv", "prompts.json", "prompts"):   # of another form
            (tmp_path / ending).write_bytes(content)
            with suppress(InputError):
                read_prompts(tmp_path / ending)
        for ending in (name, name.upper()):
            (tmp_path / ending).write_bytes(content)
            read_prompts(tmp_path / ending)

    attack(10, lambda chance: change_bytes(data, chance), call)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    return make_folder(tmp_path_factory.mktemp("pipeline") / "sd3")


@pytest.mark.parametrize("parts", [("text_encoder", "text_encoder_3", "tokenizer", "tokenizer_3"),
                                   ("vae",)], ids=["text", "vae"])
def test_folders_of_published_encoders(pipeline, tmp_path, monkeypatch, parts):
    """Whatever transformers and diffusers raise for a folder is one line."""
    monkeypatch.setattr(sys.modules[__name__], "CASES", 250)    # 500 of both kinds
    folder = tmp_path / "sd3"
    shutil.copytree(pipeline, folder)
    paths = [path for part in parts for path in sorted((folder / part).glob("*.json"))]
    values = {path: json.loads(path.read_text()) for path in paths}

    def make(chance: random.Random) -> tuple[Path, bytes]:
        path = chance.choice(paths)
        if chance.random() < 0.7:
            return path, dump(change_json(values[path], chance))
        return path, change_bytes(path.read_bytes(), chance)

    def call(case: tuple[Path, bytes]) -> None:
        path, content = case
        before = path.read_bytes()
        path.write_bytes(content)
        try:
            if parts == ("vae",):
                load_vae(folder, torch.device("cpu"))
            else:
                loaded = load_encoders(folder, torch.device("cpu"), torch.float32, "device", 6)
                encode_prompts(loaded, ["a red fox"])
        finally:
            path.write_bytes(before)

    attack(11, make, call)
