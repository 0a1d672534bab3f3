"""Text and latents against transformers and diffusers on a tiny random SD3; the command and its bad
input."""
import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import assert_close, rng, script
from PIL import Image
from safetensors.torch import load_file, save_file

from ladd import encode
from ladd.cli import InputError
from ladd.core import flow
from ladd.data import files, images, masks, shards
from ladd.data.files import read_json, read_tensors
from ladd.data.prompts import read_prompts
from ladd.engine.run import compute_dtype
from ladd.sd3 import encoders as sd3_encoders
from ladd.sd3.encoders import (decode_latents, encode_images, encode_prompts, encoder_identity,
                               fingerprint, libraries, load_encoders, load_vae, sd3_codec,
                               truncations)

for package in ("transformers", "diffusers"):
    pytest.importorskip(package)
from sd3 import JOINT, POOLED, make_folder    # noqa: E402, after the check for its packages

ROOT, CPU = Path(__file__).parents[1], torch.device("cpu")
PROMPTS = ["a red circle", "", "zebra! on black, 17", "small green cross " * 40, "A Red  Circle"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_folder(tmp_path_factory.mktemp("sd3"))


@pytest.fixture(scope="module")
def pipe(folder):
    libraries()
    from diffusers import StableDiffusion3Pipeline
    return StableDiffusion3Pipeline.from_pretrained(folder, local_files_only=True,
                                                    low_cpu_mem_usage=False)


@pytest.fixture(scope="module")
def encoders(folder):
    return load_encoders(folder, CPU, torch.float32, t5_tokens=40)


@pytest.fixture(scope="module")
def vae(folder):
    return load_vae(folder, CPU)


# text

@pytest.mark.parametrize("t5, dtype", [("device", torch.float32), ("cpu", torch.float32),
                                       ("none", torch.float32), ("device", torch.bfloat16)])
def test_text_is_what_the_library_gives_its_transformer(folder, pipe, t5, dtype, monkeypatch):
    encoders = load_encoders(folder, CPU, dtype, t5, 40)
    if t5 == "none":
        monkeypatch.setattr(pipe, "text_encoder_3", None)
    for part in (pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3):
        if part is not None:
            part.to(dtype)
    with torch.no_grad():
        context, _, pooled, _ = pipe.encode_prompt(PROMPTS, None, None, max_sequence_length=40,
                                                   do_classifier_free_guidance=False)
    got = encode_prompts(encoders, PROMPTS, batch=5)
    assert got.context.shape == (5, 77 + 40, JOINT) and got.pooled.shape == (5, POOLED)
    assert_close("context", got.context, context, 0 if dtype == torch.float32 else None)
    assert_close("pooled", got.pooled, pooled, 0 if dtype == torch.float32 else None)
    assert got.context[:, :77, 80:].eq(0).all() and got.context[:,
                                                                77:].ne(0).any() == (t5 != "none")
    for part in (pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3):
        if part is not None:
            part.float()


def test_text_does_not_depend_on_the_batch_and_carries_no_gradient(encoders):
    whole, one = (encode_prompts(encoders, PROMPTS, batch) for batch in (5, 1))
    assert_close("context", one.context, whole.context)
    assert_close("pooled", one.pooled, whole.pooled)
    assert not whole.context.requires_grad


def test_cut_prompts_are_reported_with_the_encoder_its_limit_and_the_first(encoders):
    long = "red " * 50          # 52 tokens of CLIP, 51 of T5
    lines = truncations(encoders, ["a", long, PROMPTS[3]])
    clip = "1 of 3 prompts are cut to {}'s 77 tokens; the first, of 242: 'small green cross small"
    assert len(lines) == 3 and lines[0].startswith(clip.format("CLIP-L"))
    assert lines[1].startswith(clip.format("CLIP-G"))
    assert lines[2].startswith("2 of 3 prompts are cut to T5's 40 tokens; the first, of 51: 'red "
                               "red")
    assert truncations(encoders, ["red " * 39, "red " * 10]) == []    # 40 with T5's end: just fits


def test_bad_encoders_raise(folder, tmp_path):
    for options, message in ((dict(t5="gpu"), r"t5 must be device, cpu or none \(got 'gpu'\)"),
                             (dict(t5_tokens=0), r"t5_tokens must be from 1 to 512 \(got 0\)"),
                             (dict(t5_tokens=513), r"t5_tokens must be from 1 to 512 \(got 513\)")):
        with pytest.raises(InputError, match=message):
            load_encoders(folder, CPU, torch.float32, **options)
    message = r"tokenizer must be the folder of a CLIPTokenizer .*\(got none\)"
    with pytest.raises(InputError, match=message):
        load_encoders(tmp_path, CPU, torch.float32)
    message = r"must be a StableDiffusion3 pipeline folder \(got no text_encoder\)"
    with pytest.raises(InputError, match=message):
        encoder_identity(tmp_path)


def copy_with(folder: Path, to: Path, **parts: str) -> Path:
    """The pipeline folder again, by links, with some parts taken from other ones."""
    to.mkdir()
    for path in folder.iterdir():
        (to / path.name).symlink_to(folder / parts.get(path.name, path.name))
    return to


@pytest.mark.parametrize("part, other, message", [
    ("text_encoder", "text_encoder_3",
     r"all weights of CLIPTextModelWithProjection \(got no text_model"),
    ("text_encoder_3", "text_encoder", r"all weights of T5EncoderModel \(got no "),
    ("tokenizer_3", "scheduler", "tokenizer_3 must be the folder of a T5Tokenizer"),
    ("vae", "transformer", r"all weights of AutoencoderKL \(got no ")])
def test_another_models_weights_raise_and_are_not_random(folder, tmp_path, part, other, message):
    bad = copy_with(folder, tmp_path / "bad", **{part: other})
    with pytest.raises(InputError, match=message):
        load_vae(bad, CPU) if part == "vae" else load_encoders(bad, CPU, torch.float32)


@pytest.mark.parametrize("name", ["text_encoder/model.safetensors", "tokenizer/tokenizer.json",
                                  "vae/diffusion_pytorch_model.safetensors"])
def test_a_truncated_file_raises(folder, tmp_path, name):
    part, file = name.split("/")
    bad = copy_with(folder, tmp_path / "bad")
    (bad / part).unlink()
    (bad / part).mkdir()
    for path in (folder / part).iterdir():
        content = path.read_bytes()
        (bad / part / path.name).write_bytes(content[:-100] if path.name == file else content)
    with pytest.raises(InputError, match="must hold a complete|not a complete"):
        load_vae(bad, CPU) if part == "vae" else load_encoders(bad, CPU, torch.float32)


@pytest.mark.parametrize("package", ["transformers", "diffusers"])
def test_an_absent_package_is_named_with_its_command(monkeypatch, folder, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=f"{package}: .* need this package; pip install {package}"):
        load_vae(folder, CPU)
    assert sys.modules["kernels"].__file__ == str(ROOT / "kernels" / "__init__.py")


# the libraries next to our folder kernels/

@pytest.mark.slow
@pytest.mark.parametrize("installed", [False, True])
def test_kernels_does_not_disturb_the_libraries(folder, tmp_path, installed):
    """In a process of its own, the repository first on sys.path; also where the package kernels is
    installed, whose name both libraries look up and whose version transformers believes."""
    from transformers.utils import import_utils
    version = getattr(import_utils, "KERNELS_MIN_VERSION", "0.18.2")       # one that it would take
    about = tmp_path / "site" / f"kernels-{version}.dist-info"
    if installed:
        about.mkdir(parents=True)
        (about / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: "
                                        f"{version}\n")
    code = f"""
import sys, importlib.metadata as m
assert sys.path[0] == ""
sys.path.append({str(tmp_path / 'site')!r})
if {installed}:
    assert m.version("kernels")
import kernels
from ladd.sd3.encoders import libraries
libraries()
assert sys.modules["kernels"] is kernels and kernels.load("torch")
import torch
from diffusers import StableDiffusion3Pipeline
pipe = StableDiffusion3Pipeline.from_pretrained({str(folder)!r}, local_files_only=True)
out = pipe("a red circle", height=64, width=96, num_inference_steps=2, output_type="np")
assert out.images.shape == (1, 64, 96, 3)
"""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          env=env)
    assert done.returncode == 0, done.stderr[-2000:]


# folders of others

def damaged(folder: Path, to: Path, file: str, change) -> Path:
    """The pipeline folder again, with the content of one file changed by `change`."""
    part, name = file.split("/")
    copy_with(folder, to)
    (to / part).unlink()
    shutil.copytree(folder / part, to / part)
    content = (to / file).read_bytes()
    if callable(change):
        change(to / file)
    elif isinstance(change, dict):
        (to / file).write_text(json.dumps(json.loads(content) | change))
    else:
        (to / file).write_bytes(change)
    return to


def weight(name: str, value: float):
    """A change of the first value of a tensor."""
    def change(path: Path) -> None:
        tensors = load_file(path)
        tensors[name].view(-1)[0] = value
        save_file(tensors, path, {"format": "pt"})
    return change


CLIP, T5, VAE = "text_encoder/config.json", "text_encoder_3/config.json", "vae/config.json"
TOKENS, SETUP = "tokenizer_2/tokenizer.json", "tokenizer_3/tokenizer_config.json"
DEEP, DIGITS = b"[" * 100_000, b'{"d_model": ' + b"9" * 5000 + b"}"
FOREIGN = [
    *((file, change, "not a complete JSON file") for file in (CLIP, T5, VAE, TOKENS, SETUP)
      for change in (DEEP, DIGITS, b"", b"\xff\xfe{}", b'{"a": ')),
    *((file, change, "must be a JSON object") for file in (CLIP, T5, VAE, TOKENS, SETUP)
      for change in (b"null", b"5", b"[]", b"true")),
    *((file, {"quantization_config": {"quant_method": "bitsandbytes"}}, "must not be quantized")
      for file in (CLIP, T5, VAE)),
    *((CLIP, {key: value}, "text_encoder") for key, value in (
        ("hidden_act", "nonsense"), ("hidden_act", 5), ("num_attention_heads", 0),
        ("num_attention_heads", "x"), ("num_hidden_layers", None), ("num_hidden_layers", 10 ** 9),
        ("vocab_size", 10 ** 15), ("vocab_size", 3), ("hidden_size", []),
        ("projection_dim", None), ("projection_dim", "32"), ("projection_dim", True),
        ("projection_dim", -1), ("max_position_embeddings", {}), ("max_position_embeddings", 76),
        ("layer_norm_eps", "x"))),
    *((T5, {key: value}, "text_encoder_3") for key, value in (
        ("d_model", 0), ("d_model", "x"), ("d_kv", None),
        ("num_layers", 10 ** 7), ("relative_attention_num_buckets", []), ("d_ff", 0))),
    (T5, {"feed_forward_proj": "nonsense", "dense_act_fn": "nonsense"}, "text_encoder_3"),
    *((VAE, {key: value}, "vae") for key, value in (
        ("act_fn", "nonsense"), ("scaling_factor", "x"), ("scaling_factor", None),
        ("scaling_factor", 0), ("scaling_factor", True), ("shift_factor", []),
        ("block_out_channels", 5), ("block_out_channels", []), ("down_block_types", ["x"]),
        ("latent_channels", 4), ("norm_num_groups", 0), ("layers_per_block", 10 ** 6),
        ("sample_size", "x"), ("in_channels", None))),
    *((TOKENS, {key: value}, "tokenizer_2") for key, value in (
        ("model", None), ("model", {"type": "nonsense"}), ("added_tokens", 5), ("decoder", []))),
    *((SETUP, {key: value}, "_3") for key, value in (
        ("extra_ids", 10 ** 9), ("model_max_length", "x"), ("pad_token", 5), ("pad_token", None),
        ("added_tokens_decoder", {"0": 5}))),
    ("text_encoder/model.safetensors", weight("text_model.final_layer_norm.bias", np.nan),
     "text_encoder: its output must be finite"),
    ("text_encoder_3/model.safetensors", weight("shared.weight", np.inf), "must be finite"),
    ("vae/diffusion_pytorch_model.safetensors", weight("decoder.conv_out.bias", np.nan),
     "vae: its output must be finite"),
    *((file, Path.unlink, "must") for file in (CLIP, T5, VAE, TOKENS,
                                               "text_encoder/model.safetensors"))]


@pytest.mark.parametrize("case", range(len(FOREIGN)))
def test_a_folder_that_cannot_be_used_is_named_in_one_line(folder, tmp_path, case):
    file, change, message = FOREIGN[case]
    bad = damaged(folder, tmp_path / "bad", file, change)
    with pytest.raises(InputError, match=message) as error:
        if file.startswith("vae"):
            load_vae(bad, CPU)
        else:
            sd3_codec(bad, CPU, "device", 8).text(["a red circle"])
    assert str(bad) in str(error.value) and "\n" not in str(error.value)
    if "(got: " in str(error.value):
        assert error.value.__cause__ is not None


def test_a_bad_vae_is_found_before_text_is_encoded(folder, pictures, tmp_path, monkeypatch):
    bad = damaged(folder, tmp_path / "bad", VAE, {"act_fn": "nonsense"})
    monkeypatch.setattr(encode, "encode_prompts", lambda *args: pytest.fail("encoded text"))
    with pytest.raises(InputError, match="vae must hold a complete AutoencoderKL"):
        command(bad, tmp_path / "out", "--images", str(pictures))
    assert not (tmp_path / "out").exists()


# the cache of text

def test_the_cache_asks_for_each_prompt_once_and_gives_equal_text(tmp_path, folder, encoders,
                                                                  monkeypatch):
    path, asked = tmp_path / "text.safetensors", []

    def ask(encoders, prompts):
        asked.append(list(prompts))
        return encode_prompts(encoders, prompts, 1)

    def embed(*prompts):
        """What a process of its own is given."""
        return sd3_codec(folder, CPU, "device", 40, path).text(list(prompts))

    monkeypatch.setattr(sd3_encoders, "encode_prompts", ask)
    first = embed("a", "b", "a")
    assert asked == [["a", "b"]]
    again = embed("b", "a", "a")
    assert asked == [["a", "b"]]
    more = embed("c", "b")
    assert asked == [["a", "b"], ["c"]]
    direct = encode_prompts(encoders, ["a", "b", "a"], 1).to(torch.bfloat16)
    assert torch.equal(first.context, direct.context) and torch.equal(first.pooled, direct.pooled)
    for part in (0, 1):
        assert torch.equal(again[part], first[part][[1, 0, 0]])
        assert torch.equal(more[part][1], first[part][1])
    assert [path.name for path in tmp_path.iterdir()] == ["text.safetensors"]


def test_the_cache_of_other_encoders_raises_and_survives_a_failure(tmp_path, folder, monkeypatch):
    path = tmp_path / "text.safetensors"
    embed = lambda tokens, *prompts: sd3_codec(folder, CPU, "device", tokens,
                                               path).text(list(prompts))
    embed(8, "a")
    before = path.read_bytes()
    message = r"must hold text of the encoders .* T5, 9 tokens \(got .* T5, 8 tokens\)"
    with pytest.raises(InputError, match=message):
        embed(9, "a")
    with monkeypatch.context() as patch:
        patch.setattr(sd3_encoders, "encode_prompts", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            embed(8, "a", "b")
    assert path.read_bytes() == before
    path.write_bytes(before[:50])
    with pytest.raises(InputError, match="not a complete safetensors"):
        embed(8, "a")


@pytest.mark.parametrize("name, tensor", [
    ("context", torch.zeros(85, JOINT)), ("context", torch.zeros(84, JOINT).bfloat16()),
    ("context", torch.zeros(85, 97).bfloat16()), ("context", torch.zeros(1, 85, 96).bfloat16()),
    ("context", torch.full((85, JOINT), np.nan).bfloat16()), ("context", torch.zeros(0)),
    ("pooled", torch.zeros(JOINT).bfloat16()), ("pooled", torch.zeros(POOLED).half()),
    ("pooled", torch.full((POOLED,), np.inf).bfloat16()), ("pooled", torch.zeros(POOLED).long())])
def test_text_of_another_form_in_the_cache_is_refused(tmp_path, folder, name, tensor):
    path = tmp_path / "text.safetensors"
    embed = lambda: sd3_codec(folder, CPU, "device", 8, path).text(["a"])
    embed()
    tensors, about = read_tensors(path)
    key = next(key for key in tensors if key.startswith(name))
    save_file({key: t.clone() for key, t in tensors.items()} | {key: tensor}, path, about)
    wanted = "85, 96" if name == "context" else "80"
    with pytest.raises(InputError, match=rf"{key} must be \[{wanted}\] in bf16, finite, "):
        embed()


def test_half_of_a_text_in_the_cache_is_refused(tmp_path, folder):
    path = tmp_path / "text.safetensors"
    embed = lambda: sd3_codec(folder, CPU, "device", 8, path).text(["a"])
    embed()
    tensors, about = read_tensors(path)
    save_file({key: t.clone() for key, t in tensors.items() if key[:7] == "context"}, path, about)
    with pytest.raises(InputError, match=r"context.* must .* and have its pooled text \(got "):
        embed()


def test_identity_follows_weights_tokenizers_and_t5(folder, tmp_path):
    names = {encoder_identity(folder, t5, n) for t5, n in
             [("device", 256), ("cpu", 256), ("device", 77), ("none", 256)]}
    # where T5 runs makes no other text
    assert len(names) == 3
    for part, other in (("text_encoder", "text_encoder_2"), ("tokenizer", "tokenizer_2"),
                        ("text_encoder_3", "text_encoder")):
        bad = copy_with(folder, tmp_path / part, **{part: other})
        assert encoder_identity(bad) not in names
        assert (encoder_identity(bad, "none") in names) == (part == "text_encoder_3")


@pytest.mark.parametrize("place", [0, -1])
def test_a_fingerprint_reads_both_ends_of_every_file(tmp_path, place):
    """Of two subfolders; a file of half precision next to the weights is not read."""
    for part in ("a", "b"):
        (tmp_path / part).mkdir()
        for name in ("config.json", "model.safetensors", "model.fp16.safetensors"):
            (tmp_path / part / name).write_bytes(bytes(3 * 2 ** 16))
    found = [fingerprint(tmp_path, ["a", "b"])]
    for part in ("a", "b"):
        for name in ("config.json", "model.safetensors", "model.fp16.safetensors"):
            content = bytearray(3 * 2 ** 16)
            content[place] = 1
            (tmp_path / part / name).write_bytes(content)
            found.append(fingerprint(tmp_path, ["a", "b"]))
    assert len(set(found)) == 5 and found[2] == found[3] and found[5] == found[6]


# the VAE

def test_latents_are_the_librarys_scaled_and_shifted(vae, pipe):
    x = torch.rand(2, 3, 64, 96, generator=rng()) * 2 - 1
    with torch.no_grad():
        posterior = pipe.vae.encode(x).latent_dist
    assert_close("mean", encode_images(vae, x), (posterior.mean - .0609) * 1.5305)
    x0 = torch.randn(2, 16, 8, 12, generator=rng(1))
    with torch.no_grad():
        expected = pipe.vae.decode(x0 / 1.5305 + .0609).sample.clamp(-1, 1)
    assert_close("image", decode_latents(vae, x0), expected)


def test_tiles_are_close_to_the_full_image_without_seams(vae, monkeypatch):
    """Tiles end at their border and are normalized separately, so the values differ, less for
    larger tiles: by 0.48, 0.24, 0.07 of the standard deviation for tiles of 64, 128, 256 pixels of
    this random VAE (the published size is 1024). The image must not have larger jumps than without
    tiles."""
    monkeypatch.setattr(vae, "tile_latent_min_size", 32)
    monkeypatch.setattr(vae, "tile_sample_min_size", 256)
    x0 = torch.randn(1, 16, 32, 40, generator=rng())
    whole, tiles = decode_latents(vae, x0), decode_latents(vae, x0, tiled=True)
    assert whole.shape == tiles.shape == (1, 3, 256, 320) and not torch.equal(whole, tiles)
    assert torch.equal(whole, decode_latents(vae, x0))      # the switch is off again
    assert (whole - tiles).square().mean().sqrt() < .15 * whole.std()
    jump = lambda image: image.diff(dim=-1).abs().max()
    assert jump(tiles) < 1.2 * jump(whole)
    small = x0[..., :32]
    assert torch.equal(decode_latents(vae, small, tiled=True), decode_latents(vae, small))


# buckets

def test_buckets_have_about_the_area_and_every_shape_up_to_4_to_1():
    sizes = images.buckets(1024 ** 2, 64)
    assert {(1024, 1024), (896, 1152), (1152, 896), (768, 1344), (512, 2048)} <= set(sizes)
    assert all(h % 64 == w % 64 == 0 and (w, h) in sizes for h, w in sizes)
    assert all(.93 < h * w / 1024 ** 2 < 1.07 for h, w in sizes)
    ratios = sorted(h / w for h, w in sizes)
    assert ratios[0] == 1 / 4 and ratios[-1] == 4
    # so a crop loses at most 1 / 8
    assert max(b / a for a, b in zip(ratios, ratios[1:])) < 1.29


@pytest.mark.parametrize("h, w, expected", [(1024, 1024, (1024, 1024)), (10, 10, (1024, 1024)),
                                            (1080, 1920, (768, 1344)), (1920, 1080, (1344, 768)),
                                            (3000, 4000, (896, 1152)), (100, 9000, (512, 2048)),
                                            (9000, 100, (2048, 512))])
def test_an_image_takes_the_bucket_of_the_nearest_shape(h, w, expected):
    image = images.Captioned(Path("x.png"), "", (h, w))
    (found, _), = images.plan([image], 1024 ** 2, 64)
    assert found == expected


def test_every_bucket_is_its_own_and_bad_ones_are_refused():
    for hw in images.buckets(512 ** 2, 32):
        image = images.Captioned(Path("x.png"), "", hw)
        assert images.plan([image], 512 ** 2, 32)[0][0] == hw
    for area, multiple in ((1024 ** 2, 24), (1024 ** 2, 0), (63 ** 2, 64)):
        with pytest.raises(InputError, match=r"--multiple must be .*\(got "):
            images.buckets(area, multiple)


def test_a_small_bucket_gives_its_images_to_the_nearest_that_is_not():
    sizes = [(64, 64)] * 5 + [(64, 128)] * 3 + [(64, 150)] + [(128, 64)]
    listed = [images.Captioned(Path(f"{i}"), "", hw) for i, hw in enumerate(sizes)]
    names = lambda plan: [(hw, [int(image.path.name) for image in part]) for hw, part in plan]
    assert names(images.plan(listed, 4096, 16)) == [
        ((48, 80), [5, 6, 7, 8]), ((64, 64), [0, 1, 2, 3, 4]), ((80, 48), [9])]
    assert names(images.plan(listed, 4096, 16, least=3, shard=2)) == [((48, 80), [5, 6]),
                                                                      ((48, 80), [7, 8]),
                                                                      ((64, 64), [0, 1]),
                                                                      ((64, 64), [2, 3]),
                                                                      ((64, 64), [4, 9])]
    assert {hw for hw, _ in images.plan(listed, 4096, 16, least=99)} == {(64, 64)}


# reading images

def quadrants(h: int = 40, w: int = 60) -> Image.Image:
    """Red, green over blue, white."""
    image = Image.new("RGB", (w, h), "white")
    for colour, x, y in (("red", 0, 0), ("lime", w // 2, 0), ("blue", 0, h // 2)):
        image.paste(colour, (x, y, x + w // 2, y + h // 2))
    return image


def corners(path: Path, hw: tuple[int, int] = (32, 48)) -> list[tuple[int, ...]]:
    pixels = images.read_image(path, hw)
    assert pixels.shape == (3, *hw) and pixels.dtype == torch.uint8
    return [tuple(pixels[:, y, x].tolist()) for y, x in ((3, 3), (3, -4), (-4, 3), (-4, -4))]


RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


@pytest.mark.parametrize("mode", ["RGB", "P", "CMYK", "RGBA"])
def test_an_image_of_any_mode_keeps_its_colours(tmp_path, mode):
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    quadrants().convert(mode).save(path)
    assert images.image_size(path) == (40, 60)
    assert corners(path) == [RED, GREEN, BLUE, WHITE]


def test_it_covers_its_bucket_and_is_cropped_to_its_centre(tmp_path):
    picture = Image.new("RGB", (300, 40), "red")
    picture.paste("blue", (120, 0, 180, 40))
    picture.save(tmp_path / "a.png")
    assert corners(tmp_path / "a.png") == [BLUE] * 4            # 60 of 300 columns are left
    assert corners(tmp_path / "a.png", (32, 96)) == [RED] * 4   # 120 of them


def test_exif_turns_an_image(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6                                            # to be turned right
    quadrants().save(tmp_path / "a.png", exif=exif)
    assert images.image_size(tmp_path / "a.png") == (60, 40)
    assert corners(tmp_path / "a.png", (48, 32)) == [BLUE, RED, WHITE, GREEN]


def test_what_is_transparent_is_white(tmp_path):
    palette = quadrants().convert("P")
    palette.save(tmp_path / "p.png", transparency=palette.getpixel((0, 0)))
    clear = quadrants().convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize(clear.size).point(lambda a: 255 * (a > 127)))
    clear.save(tmp_path / "a.png")
    quadrants().convert("LA").save(tmp_path / "la.png")
    assert corners(tmp_path / "p.png") == [WHITE, GREEN, BLUE, WHITE]
    assert corners(tmp_path / "a.png") == [WHITE, WHITE, BLUE, WHITE]
    assert corners(tmp_path / "la.png")[3] == WHITE


def test_16_bit_gray_keeps_its_range(tmp_path):
    gray = np.full((40, 60), 65535, np.uint16)
    gray[:20, :30] = 128 * 256
    Image.fromarray(gray).save(tmp_path / "a.png")
    assert corners(tmp_path / "a.png")[0] == (128, 128, 128)
    assert corners(tmp_path / "a.png")[3] == WHITE
    Image.fromarray(gray.astype(np.float32)).save(tmp_path / "f.tif")
    Image.fromarray(gray.astype(np.int32) * 2).save(tmp_path / "i.tif")
    for name, message in (("f.tif", "floating-point"), ("i.tif", "gray must be 0 to 65535 .got "
                                                        "65536 to 131070")):
        with pytest.raises(InputError, match=message):
            images.read_image(tmp_path / name, (32, 48))


def test_of_an_animation_the_first_frame_counts(tmp_path):
    quadrants().save(tmp_path / "a.gif", save_all=True,
                     append_images=[Image.new("RGB", (60, 40), "black")])
    assert corners(tmp_path / "a.gif") == [RED, GREEN, BLUE, WHITE]


# lists of prompts

@pytest.mark.parametrize("name, content, prompts, notes",
                         [("a.txt", b"\xef\xbb\xbfa cat\r\n\n# no\n  \n a dog \na cat\n",
                           ["a cat", "a dog", "a cat"],
                           ["2 empty lines skipped", "1 comments skipped"]),
                          ("a.txt", "größe".encode(), ["größe"], []),
                          ("a.jsonl", b'{"prompt": "a", "seed": 3}\n\n{"prompt": ""}\n', ["a", ""],
                           ["1 empty lines skipped", "1 empty prompts kept"])])
def test_prompts_are_read_and_what_is_none_is_counted(tmp_path, name, content, prompts, notes):
    (tmp_path / name).write_bytes(content)
    found = read_prompts(tmp_path / name)
    assert found == (prompts, [f"{tmp_path / name}: {note}" for note in notes])


@pytest.mark.parametrize("name, content, message", [
    ("none.txt", None, "cannot be read \\(No such file"),
    ("a.txt", b"a\nb\xff", "must be UTF-8 \\(got another byte at 3\\)"),
    ("a.txt", b"# a\n\n", "at least one prompt, one per line \\(got none\\)"),
    ("a.jsonl", b"\n", "at least one prompt, one per line \\(got none\\)"),
    ("a.jsonl", b'{"prompt": "a"}\n\n["b"]\n',
     "line 3 must be {\"prompt\": \"...\"} \\(got '\\[\"b\"\\]'\\)"),
    ("a.jsonl", b'{"prompt": "a"}\n{"prompt": "b"', "line 2 must be"),
    ("a.jsonl", b'{"title": "a"}', "line 1 must be"),
    ("a.jsonl", b'{"prompt": 3}', "line 1 must be"),
    ("a.jsonl", b'{"prompt": "\\ud800"}', "line 1 must be")])
def test_bad_lists_of_prompts_are_refused(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_prompts(tmp_path / name)


# the command

SMALL = ["--area", "4096", "--multiple", "16", "--shard-size", "3", "--batch", "2",
         "--t5-tokens", "8"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Nine captioned images of three shapes, and seven that cannot be used."""
    root = tmp_path_factory.mktemp("pictures")
    for i, hw in enumerate([(64, 64)] * 5 + [(40, 66)] * 3 + [(100, 60)]):
        pixels = np.random.default_rng(i).integers(0, 256, (*hw, 3), np.uint8)
        Image.fromarray(pixels).save(root / f"{i}.png")
        caption = f"a red circle {i // 2}"
        if i % 2:
            (root / f"{i}.txt").write_text(caption + "\n")
        else:
            (root / f"{i}.json").write_text(json.dumps({"caption": caption}))
    (root / "deep").mkdir()
    whole = (root / "0.png").read_bytes()
    (root / "deep" / "cut.png").write_bytes(whole[:-4000])      # the header is whole
    (root / "deep" / "no-image.jpg").write_text("no image")
    (root / "deep" / "empty.webp").write_bytes(b"")
    Image.new("RGB", (1, 1)).save(root / "deep" / "dot.png")
    for name in ("alone", "bad-text", "bad-json"):
        (root / "deep" / f"{name}.png").write_bytes(whole)
    for name in ("cut", "no-image", "empty", "dot"):
        (root / "deep" / f"{name}.txt").write_text("a caption")
    (root / "deep" / "bad-text.txt").write_bytes(b"\xff")
    (root / "deep" / "bad-json.json").write_text('{"title": "a"}')
    return root


def command(folder: Path, out: Path, *more: str) -> None:
    encode.main(["--encoders", str(folder), "--out", str(out), "--device", "cpu", *SMALL, *more])


@pytest.fixture(scope="module")
def done(folder, pictures, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("done") / "out"
    command(folder, out, "--images", str(pictures))
    return out


def weights(path: Path) -> dict[str, torch.Tensor]:
    return read_tensors(path)[0]


def digests(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def test_the_folder_holds_every_image_with_its_caption(done, folder, pictures, vae):
    latents = shards.read_folder(done)
    assert {hw: len(ids) for hw, (_, ids) in latents.buckets.items()} == {(8, 8): 5, (6, 10): 3,
                                                                          (10, 6): 1}
    assert latents.prompts == [f"a red circle {k}" for k in range(5)] + ["a caption"]
    x0, prompt = latents.buckets[6, 10]
    assert [latents.prompts[i] for i in prompt] == [f"a red circle {i // 2}" for i in (5, 6, 7)]
    pixels = torch.stack([images.read_image(pictures / f"{i}.png", (48, 80)) for i in (5, 6, 7)])
    expected = encode_images(vae, pixels / 127.5 - 1)
    assert_close("x0", x0[torch.arange(3)], expected.half(), 2e-3)
    dtype = compute_dtype("auto", CPU)
    encoders = load_encoders(folder, CPU, dtype, t5_tokens=8)
    text = encode_prompts(encoders, [*latents.prompts, ""])
    every = torch.arange(6)
    assert_close("context", latents.context[every], text.context[:6].bfloat16())
    assert_close("pooled", latents.pooled[every], text.pooled[:6].bfloat16())
    assert_close("null", latents.null[0], text.context[6].bfloat16())
    assert latents.codes.tolist() == [[i] for i in range(6)]


def test_what_cannot_be_used_is_listed_with_its_reason(done):
    skipped = {Path(path).name: reason for path, reason in read_json(done / "skipped.json").items()}
    reasons = {"cut.png": "not a complete image", "no-image.jpg": "not a complete image",
               "empty.webp": "not a complete image",
               "dot.png": "sides must be at least 16 pixels (got 1x1)",
               "alone.png": "no caption; write alone.txt",
               "bad-text.png": "must be UTF-8 (got another byte at 0)",
               "bad-json.png": 'bad-json.json must be {"caption": "..."} (got '}
    assert set(skipped) == set(reasons), skipped
    assert all(reasons[name] in skipped[name] for name in reasons), skipped


@pytest.mark.parametrize("writes", range(10))
def test_a_killed_command_goes_on_to_equal_an_undisturbed_one(folder, pictures, done, tmp_path,
                                                              writes, monkeypatch):
    """Killed before each rename in turn: the folder's three files, text, four shards, skipped.json
    twice."""
    class Killed(BaseException):
        pass

    left, rename = [writes], os.replace

    def replace(source, target):
        if not left[0]:
            raise Killed
        left[0] -= 1
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", replace)
        with pytest.raises(Killed):
            command(folder, tmp_path / "out", "--images", str(pictures))
    command(folder, tmp_path / "out", "--images", str(pictures))
    assert digests(tmp_path / "out") == digests(done)


def test_a_finished_command_loads_no_network(folder, pictures, done, monkeypatch, capsys):
    before = digests(done)
    for name in ("load_encoders", "load_vae"):
        monkeypatch.setattr(encode, name, lambda *args: pytest.fail("loaded a network"))
    command(folder, done, "--images", str(pictures))
    assert digests(done) == before
    assert "9 images, 3 of them enlarged, 7 skipped" in capsys.readouterr().out


def test_jsonl_names_images_relative_to_itself(folder, pictures, tmp_path, capsys):
    (tmp_path / "list").mkdir()
    lines = [("../a.png", "one"), (str(pictures / "6.png"), "two"), ("none.png", "three")]
    (tmp_path / "a.png").write_bytes((pictures / "0.png").read_bytes())
    (tmp_path / "list" / "l.jsonl").write_text(
        "\n".join(json.dumps({"image": image, "caption": caption}) for image, caption in lines))
    command(folder, tmp_path / "out", "--jsonl", str(tmp_path / "list" / "l.jsonl"), "--t5", "none")
    latents = shards.read_folder(tmp_path / "out")
    assert latents.prompts == ["one", "two"] and set(latents.buckets) == {(8, 8), (6, 10)}
    assert latents.context[torch.tensor([0])][:, 77:].eq(0).all()
    printed = capsys.readouterr().out
    assert "No such file" in printed and "waited" in printed and "48x80: 1  64x64: 1" in printed


def test_a_prompt_file_gives_the_text_alone(folder, encoders, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(encode, "ROWS", 2)
    (tmp_path / "p.txt").write_text("# c\na\nb\na\n" + "red " * 80 + "\n")
    command(folder, tmp_path / "out", "--prompt-file", str(tmp_path / "p.txt"))
    context, pooled = shards.read_text(tmp_path / "out")
    assert context.shape == (3, 77 + 8, JOINT) and pooled.shape == (3, POOLED)
    assert sorted(path.name for path in (tmp_path / "out").glob("text-*")) == [
        "text-00000.safetensors", "text-00001.safetensors"]
    printed = capsys.readouterr().out
    assert "4 prompts, 3 distinct" in printed and "1 comments skipped" in printed
    assert printed.count("1 of 3 prompts are cut to") == 3


def test_the_summary_counts_what_is_left_out(folder, tmp_path, capsys):
    """Also of names that are not UTF-8 or would reach the terminal raw."""
    root = tmp_path / "pictures"
    root.mkdir()
    for name in ("a", "b", "c", "d", "\x1b[31mred\n", "e\udcff"):
        Image.new("RGB", (64, 64), "red").save(root / f"{name}.png")
        (root / f"{name}.txt").write_text(name.isascii() * "a cat")
    (root / "b.txt").write_text(" \n")
    (root / "c.txt").unlink()
    (root / "f.caption").write_text("no image")
    for name in ("d", "\x1b[31mred\n"):
        (root / f"{name}.png").write_text("no image")
    command(folder, tmp_path / "out", "--images", str(root))
    printed = capsys.readouterr().out
    assert "3 images, 0 of them enlarged, 4 skipped (skipped.json)" in printed
    assert "skipped: 1 images without a caption, 1 captions without an image, 2 unusable" in printed
    assert "warning: 2 captions are empty; their images train the empty prompt" in printed
    assert f"skipped {root}/\\x1b[31mred\\n.png: not a complete image" in printed
    assert printed.isprintable() or set(printed) - {"\n"} and "\x1b" not in printed
    assert {Path(name).name for name in read_json(tmp_path / "out" / "skipped.json")} == {
        "c.png", "d.png", "f.caption", "\x1b[31mred\n.png"}
    latents = shards.read_folder(tmp_path / "out")
    assert latents.prompts == ["a cat", ""] and latents.buckets[8, 8][1].tolist() == [0, 1, 1]


@pytest.mark.parametrize("name", ["0.png", "deep/cut.png", "1.txt", "0.json", "deep/alone.txt"])
def test_another_content_of_the_same_name_is_refused(folder, pictures, done, tmp_path, name):
    """Also with the size in pixels and bytes that it had, and of a picture that was skipped."""
    root, out = tmp_path / "pictures", tmp_path / "out"
    shutil.copytree(pictures, root)
    shutil.copytree(done, out)
    command(folder, out, "--images", str(root))
    if name.endswith("0.png"):
        content = bytearray((root / name).read_bytes())
        Image.fromarray(np.full((64, 64, 3), 7, np.uint8)).save(root / name)
        padded = (root / name).read_bytes()
        (root / name).write_bytes(padded + bytes(len(content) - len(padded)))
        assert images.image_size(root / name) == (64, 64)
    elif name.endswith("cut.png"):
        shutil.copyfile(root / "0.png", root / name)
    else:
        (root / name).write_text('{"caption": "another"}')
    before = digests(out)
    with pytest.raises(InputError, match="made with (list|prompt|images) .*take another folder"):
        command(folder, out, "--images", str(root))
    assert digests(out) == before


def test_two_commands_do_not_write_one_folder(folder, pictures, tmp_path):
    with files.locked(tmp_path / "out"):
        message = rf"out is in use by process {os.getpid()} on .*, since .*; wait until that ends"
        for more in (["--images", str(pictures)], ["--prompt-file", "nowhere.txt"]):
            with pytest.raises(InputError, match=message):
                command(folder, tmp_path / "out", *more)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("function, number, place", [
    ("mkdir", errno.EROFS, "os"), ("replace", errno.ENOSPC, "os"), ("replace", errno.EDQUOT, "os"),
    ("fsync", errno.EIO, "os")])
def test_a_file_system_that_refuses_is_one_line_and_nothing_is_left(folder, pictures, tmp_path,
                                                                    monkeypatch, function, number,
                                                                    place):
    def refuse(*args, **options):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(files.os, function, refuse)
        with pytest.raises(InputError, match=r"cannot be written \(" + os.strerror(number)):
            command(folder, tmp_path / "deep" / "out", "--images", str(pictures))
    assert not (tmp_path / "deep").exists()


def test_out_may_not_be_a_file_nor_below_one(folder, pictures, tmp_path):
    (tmp_path / "file").write_text("")
    for out in ("file", "file/out", "a" * 300):
        with pytest.raises(InputError, match=r"cannot be written \("):
            command(folder, tmp_path / out, "--images", str(pictures))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_error_while_images_are_encoded_begins_a_line(folder, pictures, tmp_path, monkeypatch,
                                                         capsys):
    """A full disk after the first shard; what is complete stays and the command goes on from it."""
    write = shards.write_tensors

    def full(path, *args):
        if path.name.startswith("00001"):
            raise InputError(f"{path}: cannot be written (No space left on device)")
        write(path, *args)

    with monkeypatch.context() as patch:
        patch.setattr(shards, "write_tensors", full)
        with pytest.raises(InputError, match="No space left"):
            command(folder, tmp_path / "out", "--images", str(pictures))
    assert capsys.readouterr().err.endswith("\n")
    assert (tmp_path / "out" / "00000-6x10.safetensors").exists()


@pytest.mark.parametrize("form", ["metadata.jsonl", "metadata.csv", "caption", "json"])
def test_the_forms_of_other_programs_give_the_same_latents(folder, tmp_path, form):
    """Of a folder that is reached by a link."""
    for name in ("plain", "other"):
        for i in range(3):
            pixels = np.random.default_rng(i).integers(0, 256, (64, 64, 3), np.uint8)
            (tmp_path / name / "sub").mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(tmp_path / name / "sub" / f"{i}.png")
    rows = [{"file_name": f"sub/{i}.png", "text": f"a {i}, b"} for i in range(3)]
    for i, row in enumerate(rows):
        (tmp_path / "plain" / "sub" / f"{i}.txt").write_text(row["text"])
        if form in ("caption", "json"):
            content = row["text"] if form == "caption" else json.dumps(row)
            (tmp_path / "other" / "sub" / f"{i}.{form}").write_text(content)
    if form == "metadata.jsonl":
        (tmp_path / "other" / form).write_text("\n".join(map(json.dumps, rows)))
    if form == "metadata.csv":
        lines = [f'{row["file_name"]},"{row["text"]}"' for row in rows]
        (tmp_path / "other" / form).write_text("file_name,text\n" + "\n".join(lines))
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "link").symlink_to(tmp_path / "other")
    command(folder, tmp_path / "a", "--images", str(tmp_path / "plain"))
    command(folder, tmp_path / "b", "--images", str(tmp_path / "root"))
    a, b = shards.read_folder(tmp_path / "a"), shards.read_folder(tmp_path / "b")
    every = torch.arange(3)
    assert a.prompts == b.prompts and torch.equal(a.context[every], b.context[every])
    assert all(torch.equal(one[every], two[every]) for one, two in
               zip(a.buckets[8, 8], b.buckets[8, 8]))


# pairs and masks

# three of 64x64, three of 40x66
PAIRS = ["recolour", "move", "resize", "same source", "wide", "add"]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    """A list of six pairs, two of one source, amid five that cannot be used."""
    root = tmp_path_factory.mktemp("pairs")
    for i, name in enumerate(PAIRS):
        for j, role in enumerate(("source", "target")):
            hw = (64, 64) if i < 3 else (40, 66)
            pixels = np.random.default_rng(2 * i + j).integers(0, 256, (*hw, 3), np.uint8)
            Image.fromarray(pixels).save(root / f"{name} {role}.png")
    (root / "cut.png").write_bytes((root / "move source.png").read_bytes()[:-4000])
    good = [(f"{name} source.png", f"{name} target.png", name) for name in PAIRS]
    good[3] = ("wide source.png", *good[3][1:])
    bad = [("move source.png", "wide target.png", "1"), ("nowhere.png", "move target.png", "2"),
           ("move source.png", "nowhere.png", "3"), ("cut.png", "move target.png", "4"),
           ("move source.png", "cut.png", "5")]
    lines = [*good[:2], *bad, *good[2:]]
    (root / "list.jsonl").write_text("".join(
        json.dumps(dict(zip(("source", "target", "instruction"), line))) + "\n" for line in lines))
    return root


@pytest.fixture(scope="module")
def edits(folder, pairs, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("edits") / "out"
    command(folder, out, "--task", "edit", "--jsonl", str(pairs / "list.jsonl"))
    return out


def test_pairs_are_latents_of_the_targets_conditioned_on_those_of_the_sources(edits, pairs, vae):
    latents = shards.read_folder(edits)
    told = {hw: [latents.prompts[i] for i in ids] for hw, (_, ids) in latents.buckets.items()}
    assert told == {(8, 8): PAIRS[:3], (6, 10): PAIRS[3:]} and latents.channels == 16
    for (h, w), names in told.items():
        for role, found in (("target", latents.buckets[h, w][0]), ("source", latents.images[h, w])):
            files = [name.replace("same source", "wide") if role == "source" else name for name
                     in names]
            pixels = [images.read_image(pairs / f"{name} {role}.png", (8 * h, 8 * w)) for name
                      in files]
            expected = encode_images(vae, torch.stack(pixels) / 127.5 - 1).half()
            assert_close(role, found[torch.arange(3)], expected, 2e-3)
    assert latents.provenance["task"] == "edit" and "seed" not in latents.provenance


def test_a_pair_that_cannot_be_used_says_which_of_the_two_is_why(folder, edits, pairs, capsys):
    sizes = "source must have the size of its target, 40x66 pixels (got 64x64)"
    broken = "not a complete image ("
    reasons = {"move source.png -> wide target.png": sizes,
               "nowhere.png -> move target.png": f"source: {broken}[Errno 2] No such file",
               "move source.png -> nowhere.png": f"target: {broken}[Errno 2] No such file",
               "cut.png -> move target.png": f"source: {broken}",
               "move source.png -> cut.png": f"target: {broken}"}
    skipped = {name.replace(f"{pairs}/", ""): why for name, why in
               read_json(edits / "skipped.json").items()}
    assert set(skipped) == set(reasons) and all(skipped[name].startswith(reasons[name]) for name
                                                in reasons)
    command(folder, edits, "--task", "edit", "--jsonl", str(pairs / "list.jsonl"))
    assert "6 pairs, 3 of them enlarged, 5 skipped" in capsys.readouterr().out


def test_a_folder_of_pairs_is_resumed_but_not_with_another_source(folder, edits, pairs, tmp_path):
    shutil.copytree(edits, tmp_path / "out")
    (tmp_path / "out" / "00001-8x8.safetensors").unlink()
    flags = "--task", "edit", "--jsonl", str(pairs / "list.jsonl")
    command(folder, tmp_path / "out", *flags)
    assert digests(tmp_path / "out") == digests(edits)
    lines = (pairs / "list.jsonl").read_text().replace("recolour source", "move source")
    (pairs / "other.jsonl").write_text(lines)
    with pytest.raises(InputError, match="made with list "):
        command(folder, tmp_path / "out", *flags[:-1], str(pairs / "other.jsonl"))
    (pairs / "move source.txt").write_text("move")
    for more in (["--images", str(pairs)], ["--task", "inpaint", "--images", str(pairs)]):
        with pytest.raises(InputError, match=r"made with task 'edit' \(got '(text|inpaint)'\)"):
            command(folder, tmp_path / "out", *more)


@pytest.fixture(scope="module")
def holes(folder, pictures, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("holes") / "out"
    command(folder, out, "--task", "inpaint", "--seed", "5", "--images", str(pictures))
    return out


def test_inpainting_keeps_the_latents_and_adds_mask_and_masked_latents(holes, done, pictures, vae):
    latents, text = shards.read_folder(holes), shards.read_folder(done)
    assert latents.channels == 17 and set(latents.buckets) == set(text.buckets)
    for (h, w), (x0, ids) in latents.buckets.items():
        whole = torch.arange(len(ids))
        assert torch.equal(x0[whole], text.buckets[h, w][0][whole])
    # nine images of three sizes, three a shard: the first shard of 64x64 is the folder's second
    for hw, shard, names in (((48, 80), 0, (5, 6, 7)), ((64, 64), 1, (0, 1, 2))):
        pixels = torch.stack([images.read_image(pictures / f"{i}.png", hw) for i in names])
        pixels = pixels / 127.5 - 1
        mask = torch.cat([masks.masks(1, hw, flow.generator(5, shard, i)) for i in range(3)])
        expected = masks.image_condition(lambda x: encode_images(vae, x), pixels, mask)
        found = latents.images[hw[0] // 8, hw[1] // 8][torch.arange(3)]
        assert_close("image", found.float(), expected, 2e-3)
        assert torch.equal(found[:, :1].float(), masks.latent_mask(mask))
    five = latents.images[8, 8][torch.arange(5)][:, 0]
    assert len({tuple(m.flatten().tolist()) for m in five}) == 5


def test_masks_follow_from_the_seed_and_the_place_alone(folder, pictures, holes, tmp_path):
    """Neither the files already written, nor a file that became unreadable, nor --batch changes
    other masks."""
    root = tmp_path / "pictures"
    shutil.copytree(pictures, root)
    flags = "--task", "inpaint", "--images", str(root)
    for name in ("out", "cut"):
        shutil.copytree(holes, tmp_path / name)
        next((tmp_path / name).glob("00001-*")).unlink()
    command(folder, tmp_path / "out", *flags, "--seed", "5")
    one, two = (weights(path / "00001-8x8.safetensors") for path in (holes, tmp_path / "out"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    whole, stat = (root / "0.png").read_bytes(), (root / "0.png").stat()
    (root / "0.png").write_bytes(whole[:1000] + bytes(4000) + whole[5000:])     # broken pixels
    os.utime(root / "0.png", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    command(folder, tmp_path / "cut", *flags, "--seed", "5", "--batch", "1")
    cut = weights(tmp_path / "cut" / "00001-8x8.safetensors")
    assert torch.equal(cut["image"][:, 0], one["image"][1:, 0])
    assert_close("image", cut["image"], one["image"][1:], 2e-3)
    (root / "0.png").write_bytes(whole)
    os.utime(root / "0.png", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    for more in ([], ["--seed", "6"]):
        with pytest.raises(InputError, match=r"made with seed 5 \(got [06]\)"):
            command(folder, tmp_path / "out", *flags, *more)
    command(folder, tmp_path / "other", *flags, "--seed", "6")
    assert not torch.equal(weights(tmp_path / "other" / "00001-8x8.safetensors")["image"],
                           one["image"])


def test_a_list_of_pairs_without_any_that_can_be_used_is_refused(folder, tmp_path):
    lines = [{"source": f"{i}.png", "target": f"{i}.png", "instruction": "a"} for i in range(3)]
    (tmp_path / "l.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    message = r"must have at least one pair to encode \(got none; .*0.png -> .*0.png: target: "
    with pytest.raises(InputError, match=message):
        command(folder, tmp_path / "out", "--task", "edit", "--jsonl", str(tmp_path / "l.jsonl"))
    assert not (tmp_path / "out").exists()


def test_another_list_or_setting_is_refused_in_the_same_folder(folder, pictures, done):
    for more, message in ((["--shard-size", "4"], r"made with shard 3 \(got 4\)"),
                          (["--t5", "none"], "made with text .*with T5, 8 tokens"),
                          (["--area", "6000"], "made with area 4096")):
        with pytest.raises(InputError, match=message):
            command(folder, done, "--images", str(pictures), *more)


@pytest.mark.parametrize("argv, message", [
    (["--images", "nowhere"], "nowhere must be a folder with images and captions"),
    (["--jsonl", "nowhere.jsonl"], "nowhere.jsonl: cannot be read"),
    (["--jsonl", "{bad}"], 'line 1 must be {"image": "...", "caption": "..."} (got '),
    (["--images", "a", "--jsonl", "b"], "not allowed with argument"),
    ([], "one of the arguments"),
    (["--images", "a", "--batch", "0"], "--batch must be at least 1 (got 0)"),
    (["--images", "a", "--area", "1000000000000"], "--area must be at most 67108864, 8192x8192"),
    (["--images", "a", "--multiple", "24"], "--multiple must be a multiple of 16 whose square"),
    (["--images", "a", "--t5", "gpu"], "invalid choice"),
    (["--task", "edit", "--images", "a"],
     "--task edit requires --jsonl FILE of pairs (got --images)"),
    (["--task", "edit", "--prompt-file", "a"],
     "--task edit requires --jsonl FILE of pairs (got --prompt-file)"),
    (["--task", "inpaint", "--prompt-file", "a"],
     "--task inpaint requires --images or --jsonl (got --prompt-file)"),
    (["--task", "edit", "--jsonl", "{bad}"],
     'line 1 must be {"source": "...", "target": "...", "instruction": "..."} (got '),
    (["--task", "edit", "--jsonl", "{bad}", "--seed", "0"],
     "--seed requires --task inpaint (got --task edit)"),
    (["--images", "a", "--seed", "3"], "--seed requires --task inpaint (got --task text)"),
    (["--task", "inpaint", "--images", "a", "--seed", "-1"], "--seed must be at least 0 (got -1)"),
    (["--task", "paint", "--images", "a"], "invalid choice"),
    (["--imags", "a"], "one of the arguments|unknown argument")])
def test_a_bad_command_ends_in_one_line(folder, tmp_path, argv, message):
    (tmp_path / "bad.jsonl").write_text('{"image": "a.png"}')
    with pytest.raises(InputError) as error:
        command(folder, tmp_path / "out", *(word.format(bad=tmp_path / "bad.jsonl") for word
                                            in argv))
    assert any(part in str(error.value) for part in message.split("|")), error.value
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_the_module_runs_and_exits_with_code_2(folder, tmp_path):
    bad = script("ladd.encode", tmp_path, "--encoders", str(folder), "--out",
                 str(tmp_path / "out"), "--prompt-file", "nowhere.txt")
    assert bad.returncode == 2 and bad.stderr.startswith("ladd.encode: nowhere.txt: cannot be read")
    assert bad.stderr.count("\n") == 1
