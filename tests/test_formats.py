"""Published layouts: the velocity of diffusers, exact round trips, errors, memory, pipelines.

    python tests/test_formats.py expected      writes tests/results/diffusers.json again; needs
                                               diffusers
    python tests/test_formats.py memory DIR    loads and exports an 8B network in DIR (33 GB): its
                                               peaks
"""
import ast
import json
import os
import re
import shutil
import subprocess
import sys
import time
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import sd3
import torch
import torch.nn.functional as F
from conftest import VARIANTS, assert_close, script, tiny
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import kernels
from ladd import export
from ladd.cli import InputError, run_script
from ladd.core import sampler
from ladd.core.mmdit import MMDiT, MMDiTConfig
from ladd.core.sampler import Recipe
from ladd.data import files
from ladd.export import export_mmdit
from ladd.sd3 import checkpoint, formats
from ladd.sd3.checkpoint import load_metadata, load_mmdit

ROOT = Path(__file__).parents[1]
EXPECTED = ROOT / "tests" / "results" / "diffusers.json"
RECIPE = Recipe("text", ("48x80", "80x48"), (1.0, 0.75, 0.5, 0.25), 3.0, "euler", 28, 5.0, 1.0, 1,
                64, 256)
STUDENT = RECIPE.metadata("student", True)
HINT = {"modelspec.usage_hint": "ComfyUI: nodes Load Diffusion Model, KSampler (steps 4, cfg 1.0, "
        "sampler euler, scheduler simple)"}
PUBLISHED = dict(context_dim=sd3.JOINT, pooled_dim=sd3.POOLED, in_channels=16, out_channels=16)


# the same velocity

def inputs(c: MMDiTConfig, l: int, dtype: torch.dtype) -> list[Tensor]:
    """x [2, c, 4, 6], sigma [2], context [2, l, dc], pooled [2, dp]; sigma in fp32 as theirs."""
    x, context, pooled = (4 * drawn(name, size) for name, size
                          in (("x", (2, c.in_channels, 4, 6)), ("context", (2, l, c.context_dim)),
                              ("pooled", (2, c.pooled_dim))))
    return [x.to(dtype), torch.tensor([0.7312, 0.1234]), context.to(dtype), pooled.to(dtype)]


def drawn(name: str, size, scale: float = 1.0) -> Tensor:
    """Numbers in scale * [-0.5, 0.5) that look random and are exact everywhere: integers times a
    constant."""
    i = torch.arange(torch.Size(size).numel(), dtype=torch.int64)
    i = i + zlib.crc32(name.encode()) % 2 ** 20
    i = i * 2654435761 % 2 ** 32
    i = (i ^ i >> 15) * 2246822519 % 2 ** 32
    return ((i ^ i >> 13) / 2.0 ** 32 - 0.5).reshape(size) * scale


def filled(shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    """A state dict by diffusers' names, every value from its name and place; norms near 1."""
    return {name: drawn(name, size, 0.3 if len(size) > 1 else 0.6)
            + ("attn" in name and ".norm_" in name) for name, size in shapes.items()}


def theirs(model, x: Tensor, sigma: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
    with torch.no_grad():
        return model(hidden_states=x, encoder_hidden_states=context, pooled_projections=pooled,
                     timestep=1000 * sigma, return_dict=False)[0]


def ours(path: Path, dtype: torch.dtype, l: int) -> Tensor:
    model = load_mmdit(path, kernels.load("torch"))
    model.compute_dtype = dtype
    with torch.no_grad():
        return model(*inputs(model.config, l, dtype))


def exact_norms(model) -> None:
    """diffusers takes the variance of q and k in fp32 whatever their dtype; here in theirs."""
    for module in model.modules():
        if type(module).__name__ == "RMSNorm":
            module.forward = lambda x, m=module: F.rms_norm(x, x.shape[-1:], m.weight, m.eps)


@pytest.mark.parametrize("variant", sd3.VARIANTS)
@pytest.mark.parametrize("dtype, tol", [(torch.float32, 1e-5), (torch.float64, 1e-9)])
def test_our_velocity_is_that_of_diffusers(tmp_path, variant, dtype, tol):
    pytest.importorskip("diffusers")
    model = sd3.draw(sd3.transformer(variant), 1).to(dtype)
    if dtype == torch.float64:
        exact_norms(model)
    model.save_pretrained(tmp_path / "t")
    loaded = load_mmdit(tmp_path / "t", kernels.load("torch"))
    loaded.compute_dtype = dtype
    g = torch.Generator().manual_seed(2)
    for l in (1, 5, 77):
        x, context, pooled = (torch.randn(size, generator=g).to(dtype) for size in (
            (2, 16, 8, 14), (2, l, sd3.JOINT), (2, sd3.POOLED)))
        sigma = torch.rand(2, generator=g)
        expected = theirs(model, x, sigma, context, pooled)
        with torch.no_grad():
            v = loaded(x, sigma, context, pooled)
        error = (v - expected).abs().max()
        assert expected.std() > 0.5 and error < tol, (l, error)


def stored_config(variant: str) -> MMDiTConfig:
    sizes = dict(depth=3, width=128, context_dim=24, pooled_dim=20, in_channels=4, out_channels=4,
                 pos_grid=6)
    return MMDiTConfig(**sizes, **VARIANTS[variant])


def write_expected() -> None:
    """What diffusers computes in float64 from `filled` weights and `inputs`, 5 tokens of text."""
    from diffusers import SD3Transformer2DModel
    values = {}
    for variant in VARIANTS:
        c = stored_config(variant)
        model = SD3Transformer2DModel.from_config(formats.transformer_config(c)).double()
        exact_norms(model)
        model.load_state_dict(filled({name: list(t.shape) for name, t
                                      in model.state_dict().items()}))
        v = theirs(model, *inputs(c, 5, torch.float64))
        values[variant] = [float(f"{value:.11g}") for value in v.flatten().tolist()]
    EXPECTED.write_text(json.dumps(values) + "\n")


@pytest.mark.parametrize("variant", VARIANTS)
def test_our_velocity_is_what_diffusers_once_computed(tmp_path, variant):
    c = stored_config(variant)
    with torch.device("meta"):
        meta = MMDiT(c, kernels.load("torch")).state_dict()
    names = formats.to_layout(meta, "diffusers", c.depth)
    save_file(filled({name: list(t.shape) for name, t in names.items()}),
              tmp_path / "m.safetensors")
    v = ours(tmp_path / "m.safetensors", torch.float64, 5)
    expected = torch.tensor(json.loads(EXPECTED.read_text())[variant],
                            dtype=torch.float64).view_as(v)
    assert expected.std() > 0.3
    assert_close("v", v, expected, 1e-9)


# round trips

def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k
                                        in a)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_single_to_diffusers_to_single_keeps_every_byte(tmp_path, variant, dtype):
    model = tiny(variant, torch.float32).to(dtype)
    first, second = (tmp_path / part / "m.safetensors" for part in "ab")
    folder = tmp_path / "d"
    export_mmdit(model, first)
    stored = load_file(first)
    assert all(name.startswith("model.diffusion_model.") for name in stored)
    assert same({k.removeprefix("model.diffusion_model."): t for k, t in stored.items()},
                model.state_dict())
    export_mmdit(load_mmdit(first), folder, "diffusers", max_shard_bytes=400_000)
    assert len(list(folder.glob("*.safetensors"))) > 2
    back = load_mmdit(folder)
    assert back.config == model.config and same(back.state_dict(), model.state_dict())
    export_mmdit(back, second)
    assert second.read_bytes() == first.read_bytes()


@pytest.mark.parametrize("variant", sd3.VARIANTS)
@pytest.mark.parametrize("max_shard_bytes", [10 ** 10, 10 ** 6])
def test_diffusers_loads_what_is_written_and_we_what_it_writes(tmp_path, variant, max_shard_bytes):
    diffusers = pytest.importorskip("diffusers")
    model = sd3.draw(sd3.transformer(variant), 3)
    model.save_pretrained(tmp_path / "pipe" / "transformer", max_shard_size=max_shard_bytes)
    loaded = load_mmdit(tmp_path / "pipe")
    export_mmdit(loaded, tmp_path / "out", "diffusers", {"levels": "1,0.5"},
                 max_shard_bytes=max_shard_bytes)
    assert (tmp_path / "out" / formats.INDEX).exists() == (max_shard_bytes == 10 ** 6)
    sizes = [p.stat().st_size for p in (tmp_path / "out").glob("*.safetensors")]
    assert max(sizes) < max_shard_bytes + 10 ** 5                   # the headers
    again, info = diffusers.SD3Transformer2DModel.from_pretrained(tmp_path / "out",
                                                                  output_loading_info=True)
    assert not any(info.values()), info
    assert same(again.state_dict(), model.state_dict())
    theirs, read = model.config, again.config
    assert {k: read[k] for k in read if not k.startswith("_")} == {
        **{k: theirs[k] for k in theirs if not k.startswith("_")}, "sample_size": 24,
        "dual_attention_layers": list(theirs["dual_attention_layers"])}
    assert load_metadata(tmp_path / "out")["levels"] == "1,0.5"


def test_config_json_is_not_needed_and_a_prefix_may_be_missing(tmp_path):
    model = tiny("dual", torch.float32)
    export_mmdit(model, tmp_path / "d", "diffusers")
    (tmp_path / "d" / "config.json").unlink()
    assert load_mmdit(tmp_path / "d").config == model.config
    beside = {"text_encoders.a.b": torch.zeros(3, dtype=torch.int8),
              "first_stage_model.a": torch.ones(2)}
    for prefix in ("", "model.diffusion_model."):
        named = {prefix + k: t for k, t in model.half().state_dict().items()}
        save_file(named | beside, tmp_path / "m.safetensors")
        assert same(load_mmdit(tmp_path / "m.safetensors").state_dict(), model.state_dict())
    save_file({**load_file(tmp_path / "m.safetensors"), "stray": torch.zeros(1)},
              tmp_path / "m.safetensors")
    with pytest.raises(InputError, match="1 unknown: stray"):
        load_mmdit(tmp_path / "m.safetensors")


def test_the_header_holds_modelspec_and_the_students_levels(tmp_path):
    model = tiny("dual", torch.float32)
    export_mmdit(model, tmp_path / "red.safetensors", metadata=STUDENT)
    spec = {"modelspec.sai_model_spec": "1.0.0", "modelspec.title": "red", "format": "pt",
            "modelspec.architecture": "stable-diffusion-v3",
            "modelspec.prediction_type": "velocity",
            "modelspec.implementation": "https://github.com/Stability-AI/sd3.5"}
    found = load_metadata(tmp_path / "red.safetensors")
    assert found == spec | STUDENT | HINT
    export_mmdit(model, tmp_path / "d", "diffusers", {**found, "modelspec.title": "A red one"})
    assert load_metadata(tmp_path / "d") == spec | STUDENT | HINT | {
        "modelspec.title": "A red one", "modelspec.implementation": "diffusers"}
    export_mmdit(model, tmp_path / "teacher", metadata={"role": "teacher"})
    assert "modelspec.usage_hint" not in load_metadata(tmp_path / "teacher")
    large = MMDiTConfig(depth=38, width=2432, context_dim=4096, pooled_dim=2048, qk_norm=True)
    said = formats.header(large, "single", "", {})
    assert said["modelspec.architecture"] == "stable-diffusion-v3.5-large"


@pytest.mark.parametrize("layout", ["single", "diffusers"])
@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_weights_are_rounded_on_demand(tmp_path, layout, name):
    model, dtype = tiny("qk_norm", torch.float32), formats.DTYPES[name]
    export_mmdit(model, tmp_path / "out", layout, dtype=dtype)
    rounded = {k: t.to(dtype) for k, t in model.state_dict().items()}
    assert same(load_mmdit(tmp_path / "out").state_dict(), rounded)
    with torch.no_grad():
        model.context_embedder.weight[1, 2] = 70000
    if name == "fp16":
        message = r"context_embedder.weight must be at most 65504 .*\(got 70000\)"
        with pytest.raises(InputError, match=message):
            export_mmdit(model, tmp_path / "large", layout, dtype=dtype)
        assert not (tmp_path / "large").exists()


def test_mixed_types_keep_theirs_and_are_aligned(tmp_path):
    model = tiny("plain", torch.float32)
    model.final_layer.half()
    export_mmdit(model, tmp_path / "m.safetensors")
    assert same(load_mmdit(tmp_path / "m.safetensors").state_dict(), model.state_dict())
    with safe_open(tmp_path / "m.safetensors", framework="pt") as file:
        tensors = [file.get_tensor(name) for name in file.keys()]
    assert all(t.data_ptr() % t.element_size() == 0 for t in tensors)


class Kill(BaseException):
    """Stands for SIGKILL."""


@pytest.mark.parametrize("layout", ["single", "diffusers"])
def test_a_kill_while_writing_leaves_nothing(tmp_path, monkeypatch, layout):
    def kill(*_):
        raise Kill
    for module, name in ((files, "sync"), (files.os, "replace")):
        with monkeypatch.context() as m, pytest.raises(Kill):
            m.setattr(module, name, kill)
            export_mmdit(tiny("plain", torch.float32), tmp_path / "out", layout)
        assert not (tmp_path / "out").exists()
    export_mmdit(tiny("plain", torch.float32), tmp_path / "out", layout)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    with pytest.raises(InputError, match="out: already exists; choose a new name"):
        export_mmdit(tiny("plain", torch.float32), tmp_path / "out", layout)


def test_a_network_that_predicts_x0_is_not_exported(tmp_path):
    for layout in ("single", "diffusers"):
        with pytest.raises(InputError, match=r"the network must predict v, .* \(got x0\)"):
            export_mmdit(tiny("plain", torch.float32, predicts="x0"), tmp_path / "m", layout)
    message = r"layout must be single, diffusers or pipeline \(got 'gguf'\)"
    with pytest.raises(InputError, match=message):
        export_mmdit(tiny("plain", torch.float32), tmp_path / "m", "gguf")
    assert not list(tmp_path.iterdir())


# bad input

def one(*names: str):
    """Writes m.safetensors with small tensors of these names."""
    tensors = {name: torch.zeros(2, 2) for name in names}
    return lambda path: save_file(tensors, path / "m.safetensors") or "m.safetensors"


def folder(change):
    """Writes a sharded diffusers folder d, then changes it."""
    def write(path: Path) -> str:
        export_mmdit(tiny("plain", torch.float32), path / "d", "diffusers", max_shard_bytes=400_000)
        change(path / "d", json.loads((path / "d" / formats.INDEX).read_text()))
        return "d"
    return write


def edit(name: str, **changes):
    return lambda d, _: (d / name).write_text(json.dumps(json.loads((d / name).read_text())
                                                         | changes))


def moved(d: Path, index: dict) -> None:
    index["weight_map"]["proj_out.bias"] = index["weight_map"]["pos_embed.pos_embed"]
    (d / formats.INDEX).write_text(json.dumps(index))


def typed(dtype: torch.dtype):
    def write(path: Path) -> str:
        tensors = dict(tiny("plain", torch.float32).state_dict())
        tensors["context_embedder.weight"] = tensors["context_embedder.weight"].to(dtype)
        save_file(tensors, path / "m.safetensors")
        return "m.safetensors"
    return write


def named(name: str):
    return lambda path: (path / name).write_bytes(b"PK\x03\x04") and name


def cut(path: Path) -> str:
    export_mmdit(tiny("plain", torch.float32), path / "m.safetensors")
    (path / "m.safetensors").write_bytes((path / "m.safetensors").read_bytes()[:-100])
    return "m.safetensors"


def reshaped(path: Path) -> str:
    state = formats.to_layout(tiny("plain", torch.float32).state_dict(), "diffusers", 3)
    state["transformer_blocks.1.attn.to_k.weight"] = torch.zeros(64, 128)
    save_file({k: t.clone() for k, t in state.items() if "to_add_out" not in k},
              path / "m.safetensors")
    return "m.safetensors"


SHARD = "diffusion_pytorch_model-00002-of-"
BAD = {"lora": (one("transformer.transformer_blocks.0.attn.to_q.lora_A.weight", "a.alpha"),
                "must hold a complete MMDiT of SD3 or SD3.5 (got a LoRA: 2 tensors such as "
                "a.alpha)"), "vae": (one("first_stage_model.decoder.conv_in.weight"),
                                     "(got a VAE alone: 1 tensors"),
       "diffusers vae": (one("decoder.up_blocks.0.x", "encoder.down_blocks.0.x"),
                         "(got a VAE alone: 2"),
       "encoders": (one("text_encoders.t5xxl.transformer.shared.weight"), "(got text encoders "
                    "alone: 1 tensors"),
       "sdxl": (one("model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.decoder.x"),
                "(got a UNet of Stable Diffusion 1, 2 or XL: 2 tensors"),
       "flux": (one("double_blocks.0.img_attn.qkv.weight", "img_in.weight"), "(got Flux or a "
                "relative: 2 tensors"), "language model": (one("model.layers.0.mlp.weight"),
                                                           "x_embedder.proj.weight of an MMDiT "
                                                           "must be a tensor of rank 4 (got none "
                                                           "among 1"),
       "cut": (cut, "m.safetensors: not a complete safetensors file"),
       "absent": (lambda path: "no.safetensors", "no.safetensors: not a complete safetensors file"),
       "int8": (typed(torch.int8), "1 of another dtype: context_embedder.weight torch.int8, not "
                "F32, BF16, F16"), "float8": (typed(torch.float8_e4m3fn), "context_embedder.weight "
                                              "torch.float8_e4m3fn, not F32, BF16, F16"),
       "ckpt": (named("m.ckpt"), "m.ckpt must be a safetensors file (got a pickle, which can run "
                "code)"), "pt": (named("m.pt"), "m.pt must be a safetensors file (got a pickle"),
       "bin": (named("diffusion_pytorch_model.bin"), "must be a safetensors file (got a pickle"),
       "empty": (lambda path: ".", "must be a finished run or a folder with "
                 "diffusion_pytorch_model.safetensors (got an empty folder)"),
       "bin folder": (lambda path: named("diffusion_pytorch_model.bin")(path) and ".",
                      "diffusion_pytorch_model.safetensors (got diffusion_pytorch_model.bin)"),
       "class": (folder(edit("config.json", _class_name="FluxTransformer2DModel")), "config.json: "
                 "_class_name must be SD3Transformer2DModel (got FluxTransformer2DModel)"),
       "no shard": (folder(lambda d, index: next(d.glob(f"{SHARD}*")).unlink()),
                    f"json: shard {SHARD}00023.safetensors is missing; copy all shards"),
       "other shard": (folder(moved), "proj_out.bias is not in diffusion_pytorch_model-00001-of-"),
       "no map": (folder(edit(formats.INDEX, weight_map={})), "weight_map must give a file in the "
                  "same folder for each tensor (got {})"),
       "outside": (folder(edit(formats.INDEX, weight_map={"a": "../m.safetensors"})),
                   "for each tensor (got {'a': '../m"),
       "spelled": (reshaped, "4 missing: transformer_blocks.0.attn.to_add_out.weight"),
       "part": (reshaped, "1 misshapen: transformer_blocks.1.attn.to_k.weight [64, 128], not [128, "
                "128]"),}


@pytest.mark.parametrize("bad", BAD)
def test_what_is_no_mmdit_raises_one_line(tmp_path, bad):
    write, message = BAD[bad]
    path = tmp_path / write(tmp_path)
    start = time.perf_counter()
    with pytest.raises(InputError) as error:
        load_mmdit(path)
    assert time.perf_counter() - start < 3
    assert message in str(
        error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


# the command

def test_the_command_writes_each_layout_and_raises_one_line(tmp_path, capsys):
    run, out = tmp_path / "run", tmp_path / "out"
    model = tiny("plain", torch.float32)
    checkpoint.save_mmdit(model, run / "checkpoints" / "student.safetensors", STUDENT)
    export.main([str(run), "--out", str(out / "m.safetensors"), "--dtype", "bf16"])
    export.main([str(out / "m.safetensors"), "--out", str(out / "d"), "--layout", "diffusers"])
    assert "parameters, diffusers" in capsys.readouterr().out
    assert same(load_mmdit(out / "d").state_dict(),
                {k: t.bfloat16() for k, t in model.state_dict().items()})
    assert STUDENT.items() <= load_metadata(out / "d").items()
    done = script("ladd.export", tmp_path, str(tmp_path), "--out", "x")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and str(tmp_path) in done.stderr
    for argv, message in ((["--layout", "pipeline"],
                           r"--base must be a folder with --layout pipeline.*\(got None"),
                          (["--base", "b"], r"absent with others \(got b with --layout single\)"),
                          (["--lay", "single"], "flag is --layout"),
                          (["--dtype", "int8"], "invalid choice: 'int8'")):
        with pytest.raises(InputError, match=message):
            export.main([str(run), "--out", str(out / "n"), *argv])


@pytest.mark.parametrize("layout", ["single", "diffusers"])
def test_a_dot_in_a_name_is_no_ending(tmp_path, layout):
    export_mmdit(tiny("plain", torch.float32), tmp_path / "sd3.5-turbo", layout)
    assert load_metadata(tmp_path / "sd3.5-turbo")["modelspec.title"] == "sd3.5-turbo"


def test_a_lora_is_exported_with_the_network(tmp_path):
    model = tiny("dual", torch.float32)
    checkpoint.save_mmdit(model, tmp_path / "m.safetensors", STUDENT)
    g, name = torch.Generator().manual_seed(0), "joint_blocks.0.x_block.mlp.fc2"
    a, b = torch.randn(2, 512, generator=g), torch.randn(128, 2, generator=g)
    save_file({f"diffusion_model.{name}.lora_A.weight": a,
               f"diffusion_model.{name}.lora_B.weight": b}, tmp_path / "style.safetensors")
    lora = f"{tmp_path}/style.safetensors"
    export.main([str(tmp_path / "m.safetensors"), "--out", str(tmp_path / "out.safetensors"),
                 "--lora", f"{lora}:0.5", "--lora", f"{lora}:-2"])
    written, expected = load_mmdit(tmp_path / "out.safetensors").state_dict(), model.state_dict()
    expected[f"{name}.weight"] = (expected[f"{name}.weight"].double()
                                  - 1.5 * b.double() @ a.double()).float()
    assert_close("merged", written[f"{name}.weight"], expected[f"{name}.weight"], 1e-6)
    assert same(written, expected | {f"{name}.weight": written[f"{name}.weight"]})
    said = load_metadata(tmp_path / "out.safetensors")["lora"]
    assert said == "style.safetensors:0.5, style.safetensors:-2"


def test_control_characters_never_reach_the_terminal(tmp_path, monkeypatch, capsys):
    red, name = "\x1b[31m", "context_embedder"
    model = tiny("plain", torch.float32)
    lora = {f"{name}.lora_A.weight": torch.zeros(1, 24),
            f"{name}.lora_B.weight": torch.zeros(128, 1)}
    for file, tensors in {
            "m": model.state_dict(), "text": {**lora, f"text_encoder.{red}": torch.zeros(1)},
            "unknown": {**lora, f"{red}.alpha": torch.zeros(1)},
            "kind": {**lora, f"{red}\n.hada_w1": torch.zeros(1)},
            "net": {**model.state_dict(), f"{red}\r": torch.zeros(1)},
            "empty": {**model.state_dict(), f"{red}\r": torch.zeros(0)}}.items():
        save_file(tensors, tmp_path / f"{file}.safetensors")
    for source, lora, code in (("m", "text", 0), ("m", "unknown", 2), ("m", "kind", 2),
                               ("net", None, 2), ("empty", None, 2)):
        left, flags = [], ["--lora", f"{tmp_path}/{lora}.safetensors"] if lora else []
        monkeypatch.setattr(sys, "argv", ["x", str(tmp_path / f"{source}.safetensors"), "--out",
                                          str(tmp_path / "out"), *flags])
        run_script("ladd.export", export.main, left.append)
        said = capsys.readouterr()
        assert left == [2] * (code == 2) and said.err.count("\n") == len(left)
        assert "\x1b" not in said.out + said.err and (r"\x1b[31m" in said.err) == (code == 2)


# other programs

@pytest.mark.parametrize("recipe, lines", [
    (RECIPE, [HINT["modelspec.usage_hint"],
              "--steps 4 --cfg-scale 1 --sampling-method euler --scheduler simple", "256 T5"]),
    (replace(RECIPE, sampler="renoise", shift=1.5, levels=(1.0, 0.5), t5_tokens=77), [
        "Load Diffusion Model, ModelSamplingSD3 (shift 1.5), KSampler (steps 2, cfg 1.0, sampler "
        "lcm, scheduler simple)", "--sampling-method lcm --sigmas 1,0.6,0", "77 T5"]),
    (replace(RECIPE, levels=(1.0, 0.5, 0.25)), [
        "Load Diffusion Model, SamplerCustom (steps 3, cfg 1.0, sampler euler, 1,0.75,0.5,0)",
        "--sampling-method euler --sigmas 1,0.75,0.5,0", "256 T5"])])
def test_the_settings_for_other_programs(tmp_path, capsys, recipe, lines):
    path = tmp_path / "m.safetensors"
    checkpoint.save_mmdit(tiny("plain", torch.float32), path, recipe.metadata("student", True))
    export.main([str(path), "--out", str(tmp_path / "o.safetensors")])
    said = capsys.readouterr().out
    assert all(line in said for line in lines) and "sd3_infer.py" in said, said
    hint = load_metadata(tmp_path / "o.safetensors")["modelspec.usage_hint"]
    assert lines[0] in hint and hint in said


@pytest.mark.parametrize("shift, sampler", [(3.0, "euler"), (1.5, "renoise")])
def test_the_workflow_samples_at_the_students_levels(tmp_path, shift, sampler):
    recipe = replace(RECIPE, shift=shift, sampler=sampler)
    path = tmp_path / "m.safetensors"
    checkpoint.save_mmdit(tiny("plain", torch.float32), path, recipe.metadata("student", True))
    command = [str(path), "--out", str(tmp_path / "sd3.5-turbo.safetensors"), "--workflow"]
    export.main(command)
    nodes = json.loads((tmp_path / "sd3.5-turbo.json").read_text())
    links = [(node["class_type"], nodes[value[0]]["class_type"]) for node in nodes.values()
             for value in node["inputs"].values() if isinstance(value, list)]
    assert set(links) == {("ModelSamplingSD3", "UNETLoader"),
                          ("CLIPTextEncode", "TripleCLIPLoader"),
                          ("KSampler", "ModelSamplingSD3"), ("KSampler", "CLIPTextEncode"),
                          ("KSampler", "EmptySD3LatentImage"), ("VAEDecode", "KSampler"),
                          ("VAEDecode", "VAELoader"), ("SaveImage", "VAEDecode")}
    by_class = {node["class_type"]: node["inputs"] for node in nodes.values()}
    settings = by_class["KSampler"]
    assert by_class["UNETLoader"]["unet_name"] == "sd3.5-turbo.safetensors"
    assert by_class["EmptySD3LatentImage"] == {"width": 80, "height": 48, "batch_size": 1}
    assert (settings["cfg"], settings["denoise"]) == (1, 1)
    assert settings["sampler_name"] == {"euler": "euler", "renoise": "lcm"}[sampler]
    # ComfyUI's scheduler "simple": every 250th of 1,000 levels of its shift
    every = [by_class["ModelSamplingSD3"]["shift"] * t / (1000 + (shift - 1) * t)
             for t in range(1, 1001)]
    levels = [every[-1 - int(i * 1000 / settings["steps"])] for i in range(settings["steps"])]
    assert settings["scheduler"] == "simple"
    assert levels == pytest.approx(recipe.sigmas(4)[:-1].tolist(), abs=1e-6)
    (tmp_path / "sd3.5-turbo.safetensors").unlink()
    with pytest.raises(InputError, match="sd3.5-turbo.json: already exists"):
        export.main(command)
    (tmp_path / "sd3.5-turbo.json").unlink()
    for metadata, flags, message in (
            (recipe.metadata("teacher", True), [], "--workflow requires a .*role teacher, task "),
            ({}, [], r"--workflow requires a text-to-image student .*\(got role None"),
            (STUDENT, ["--layout", "diffusers"], "--layout diffusers"),
            ({**STUDENT, "levels": "1,0.5,0.25"}, [], "with evenly spaced .*levels 1,0.5,0.25, ")):
        checkpoint.save_mmdit(tiny("plain", torch.float32), path, metadata)
        with pytest.raises(InputError, match=message):
            export.main([*command, *flags])
        assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


# a pipeline

def snippet(folder: Path) -> str:
    card = (folder / "README.md").read_text()
    code, = re.findall(r"^```python\n(.*?)^```$", card, re.S | re.M)
    return code


PIPELINES = {
    "euler": ("dual", RECIPE),
    "renoise": ("plain", replace(RECIPE, sampler="renoise")),
    "euler, another shift, two levels": (
        "qk_norm", replace(RECIPE, levels=(1.0, 0.5), shift=1.7, t5_tokens=77)),
    "renoise, no shift, three levels": (
        "plain", replace(RECIPE, levels=(1.0, 0.6667, 0.3333), shift=1.0, sampler="renoise")),
    "renoise, a large shift, eight levels": (
        "plain", replace(RECIPE, levels=tuple(1 - i / 8 for i in range(8)), shift=6.5,
                         sampler="renoise")),
    "one level": ("plain", replace(RECIPE, levels=(1.0,), sampler="renoise")),
    "euler, uneven": ("plain", replace(RECIPE, levels=(1.0, 0.8, 0.3, 0.1))),
    "renoise, uneven": ("plain", replace(RECIPE, levels=(1.0, 0.3), sampler="renoise")),
}


@pytest.mark.parametrize("case", PIPELINES)
def test_the_cards_code_generates_our_samplers_image(tmp_path, monkeypatch, case):
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    variant, recipe = PIPELINES[case]
    base = sd3.make_folder(tmp_path / "base", variant)
    # replaced, whatever it is
    config = {"_class_name": "DDIMScheduler", "use_karras_sigmas": True}
    (base / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    (base / "teacher.safetensors").write_bytes(b"not copied")
    student = tiny(variant, torch.float32, seed=4, **PUBLISHED)
    folder = tmp_path / "my.student's"
    export_mmdit(student, folder, "pipeline", recipe.metadata("student", True), base=base)
    kept = [p.relative_to(base) for p in base.rglob("*") if p.is_file()]
    new = "transformer", "scheduler", "teacher.safetensors", "model_index.json"
    for path in kept:
        if path.parts[0] not in new:
            assert (folder / path).read_bytes() == (base / path).read_bytes()
    assert not (folder / "teacher.safetensors").exists() and len(kept) > 15
    code, card = snippet(folder), (folder / "README.md").read_text()
    even = "uneven" not in case
    assert ("sigmas=" in code) != even and (f"num_inference_steps={len(recipe.levels)}," in code
                                            ) == even
    assert "guidance_scale=0" in code and "height=48, width=80" in code
    assert f"max_sequence_length={recipe.t5_tokens}" in code

    decoded = []
    decode = diffusers.AutoencoderKL.decode
    monkeypatch.setattr(diffusers.AutoencoderKL, "decode",
                        lambda self, z, *a, **k: decoded.append(z) or decode(self, z, *a, **k))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    space = {}
    exec(code, space)

    pipe, n = space["pipe"], len(recipe.levels)
    prompt = re.search(r'pipe\("(.*?)"', code)[1]
    context, _, pooled, _ = pipe.encode_prompt(
        prompt, None, None, do_classifier_free_guidance=False,
        max_sequence_length=recipe.t5_tokens)
    assert context.shape[1] == 77 + recipe.t5_tokens
    g = torch.Generator()
    # one stream: the noise, then renoise's
    draw = lambda *_: torch.randn(1, 16, 6, 10, generator=g)
    monkeypatch.setattr(sampler, "image_noise", draw)
    student.kernels = kernels.load("torch")

    def ours(levels: Tensor) -> Tensor:
        g.manual_seed(0)
        x0 = sampler.sample(student, draw(), (context, pooled), levels, recipe.sampler, [0])
        return x0 / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor

    levels = recipe.sigmas(n)
    # the levels 0.6667 and 0.3333 are rounded
    tol = 1e-4 if "three" in case else 1e-6
    torch.testing.assert_close(pipe.scheduler.sigmas.float(), levels, rtol=0, atol=tol)
    z = ours(levels)
    assert_close("latents", decoded[0], z, 3e-3 if "three" in case else 1e-4)
    with torch.no_grad():
        pixels = (decode(pipe.vae, z).sample / 2 + 0.5).clamp(0, 1)[0].permute(1, 2, 0) * 255
    image = torch.tensor(np.asarray(Image.open("image.png")).astype("float32"))      # [48, 80, 3]
    assert (image - pixels.round()).abs().max() <= (2 if "three" in case else 1)
    assert pixels.std() > 1
    if n == 4:
        # the base's own scheduler
        assert (ours(torch.tensor([1, 0.858, 0.602, 0.0089, 0])) - z).abs().max() > 1e-2

    # fewer steps, as the card says
    by_count = even and (recipe.sampler == "euler" or n == 1)
    assert ("diffusers 0.39" in card) == by_count == ("only `torch.manual_seed`" not in card)
    if not by_count:
        exec(re.search(r"`(pipe\.scheduler = .*?)`", card, re.S)[1], space)
    call = dict(guidance_scale=0.0, height=48, width=80, max_sequence_length=recipe.t5_tokens)
    for count in sampler.step_counts(recipe.levels):
        steps = {"num_inference_steps": count}
        if not by_count and count < n:
            lists = re.findall(r"`(\[.*?\])`", card)
            steps = {"sigmas": next(found for found in map(json.loads, lists)
                                    if len(found) == count)}
        elif not by_count:
            continue
        pipe(prompt, **steps, **call, generator=torch.manual_seed(0))
        assert_close(f"{count} steps", decoded[-1], ours(recipe.sigmas(count)), 1e-4)


BASE = {"model_index.json": {"_class_name": "StableDiffusion3Pipeline", "vae": ["diffusers", "A"]},
        "scheduler/scheduler_config.json": {"_class_name": "DDIMScheduler"},
        "transformer/config.json": dict(in_channels=16, out_channels=16, joint_attention_dim=96,
                                        pooled_projection_dim=80),
        "vae/config.json": {"vae": 1}}


def write_base(base: Path, **changes: dict) -> Path:
    for name, values in BASE.items():
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_text(json.dumps(values | changes.get(name, {})))
    return base


def export_to(out: Path, base: Path, **changes: str | None) -> None:
    facts = {k: v for k, v in {**STUDENT, **changes}.items() if v is not None}
    export_mmdit(tiny("plain", torch.float32, **PUBLISHED), out, "pipeline", facts, base=base)


CODE = "48x80\n```\nimport os; os.system('x')\n```"


@pytest.mark.parametrize("file, changes, metadata, message", [
    ("model_index.json", {"_class_name": "FluxPipeline"}, {},
     "must be StableDiffusion3Pipeline (got FluxPipeline)"),
    ("transformer/config.json", {"joint_attention_dim": 7}, {},
     "joint_attention_dim must be the student's 96 (got 7)"),
    ("", {}, {"levels": None}, "metadata: no levels; it must be written by train.py"),
    ("", {}, {"levels": "1,x"}, "metadata: levels must be numbers separated by commas (got '1,x')"),
    ("", {}, {"sampler": "ddim"}, "metadata: sampler must be one of euler, renoise (got 'ddim')"),
    ("", {}, {"sizes": CODE}, "metadata: sizes must be HxW in pixels"),
    ("", {}, {"levels": f"1,0.5\n{CODE}"}, "metadata: levels must be numbers"),
    ("", {}, {"shift": "3.0)\nimport os"}, "metadata: shift must be a number"),
    ("", {}, {"shift": "nan"}, "metadata: shift must be a finite number"),
    ("", {}, {"t5_tokens": "0"}, "metadata: t5_tokens must be 1 to 512 (got 0)"),
    ("", {}, {"role": "teacher"}, "requires a text-to-image student (got role teacher, task text"),
    ("", {}, {"task": "edit"}, "requires a text-to-image student (got role student, task edit"),
    ("", {}, {"role": None}, "requires a text-to-image student (got role None, task text, levels"),
])
def test_a_base_or_metadata_that_do_not_fit_raise(tmp_path, file, changes, metadata, message):
    base = write_base(tmp_path / "base", **{file: changes})
    with pytest.raises(InputError) as error:
        export_to(tmp_path / "out", base, **metadata)
    assert message in str(error.value) and not (tmp_path / "out").exists()
    assert "\n" not in str(error.value).replace(CODE, "")
    (base / "model_index.json").write_text("[]")
    with pytest.raises(InputError, match=r"model_index.json must be a JSON object \(got list\)"):
        export_to(tmp_path / "out", base)
    (base / "model_index.json").unlink()
    with pytest.raises(InputError, match="model_index.json: not a complete JSON file"):
        export_to(tmp_path / "out", base)


@pytest.mark.parametrize("name", ["it's \"quoted\"", "a\nimport os", "{name}", "back\\slash",
                                  "```", "\x1b[31mred"])
def test_a_name_stays_a_string_of_the_cards_code(tmp_path, name):
    base = write_base(tmp_path / f"{name} base")
    export_to(tmp_path / name, base)
    loaded = []
    tree = ast.parse(snippet(tmp_path / name))
    loaded = [node.args[0].value for node in ast.walk(tree) if isinstance(node, ast.Call)
              and getattr(node.func, "attr", "") == "from_pretrained"]
    assert loaded == [name] and len(tree.body) == 6
    facts = (tmp_path / name / "README.md").read_text().split("---\n")[1].splitlines()
    assert f"base_model: {json.dumps(f'{name} base')}" in facts and len(facts) == 5
    assert "\x1b" not in (tmp_path / name / "README.md").read_text()


def test_the_card_has_the_hubs_lines(tmp_path):
    base = write_base(tmp_path / "models--stabilityai--stable-diffusion-3.5-medium/snapshots/abc")
    (base / "README.md").write_text("---\nlicense: other\nlicense_name: stabilityai-ai-community\n"
                                    "license_link: LICENSE.md\ninference: true\n"
                                    "extra: 'license: mit'\n---\nlicense: mit\n")
    (base / "LICENSE.md").write_text("terms")
    export_to(tmp_path / "out", base)
    assert (tmp_path / "out" / "README.md").read_text().startswith(
        '---\nlibrary_name: diffusers\npipeline_tag: text-to-image\n'
        'base_model: "stabilityai/stable-diffusion-3.5-medium"\n'
        "license: other\nlicense_name: stabilityai-ai-community\nlicense_link: LICENSE.md\n"
        "tags: [ladd, few-step, adversarial-distillation]\n---\n")
    assert (tmp_path / "out" / "LICENSE.md").read_text() == "terms"
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index == {**BASE["model_index.json"],
                     "scheduler": ["diffusers", "FlowMapEulerDiscreteScheduler"]}


def test_links_out_of_a_base_are_not_followed(tmp_path):
    (tmp_path / "secret").write_text("key")
    (tmp_path / "more").mkdir()
    for i, (link, target) in enumerate((("vae/id", tmp_path / "secret"), ("id", "../secret"),
                                        ("vae/etc", tmp_path / "more"), ("loop", "."),
                                        ("gone", "nowhere"))):
        base = write_base(tmp_path / f"base{i}")
        (base / link).symlink_to(target)
        with pytest.raises(InputError) as error:
            export_to(tmp_path / "out", base)
        assert f"{base / link} must be a file, or a link to one in the same folder" in str(
            error.value)
        assert not list(tmp_path.glob("*out*"))
    base = write_base(tmp_path / "inside")
    (base / "vae/copy.json").symlink_to("config.json")
    # what is not copied may be a link
    (base / "all.safetensors").symlink_to(tmp_path / "secret")
    export_to(tmp_path / "out", base)
    assert json.loads((tmp_path / "out/vae/copy.json").read_text()) == {"vae": 1}
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))


def test_a_base_in_the_cache_of_the_hub_is_links_to_its_blobs(tmp_path):
    repository = tmp_path / "models--a--b"
    base = write_base(repository / "snapshots/abc")
    (repository / "blobs").mkdir()
    for i, path in enumerate([p for p in base.rglob("*") if p.is_file()]):
        path.rename(repository / f"blobs/{i}")
        path.symlink_to(os.path.relpath(repository / f"blobs/{i}", path.parent))
    export_to(tmp_path / "out", base)
    assert json.loads((tmp_path / "out/vae/config.json").read_text()) == {"vae": 1}
    assert 'base_model: "a/b"' in (tmp_path / "out/README.md").read_text()


# memory

def peak() -> int:
    """Most bytes that this process had in memory so far: anonymous pages and touched pages of
    mapped files.

    ru_maxrss would start at the parent's peak.
    """
    return 1024 * int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1])


def measure(path: str) -> None:
    """In a process of its own: loads, touches every page of the weights, prints seconds and peaks
    as JSON."""
    # what torch imports when first used is no weight
    with torch.device("meta"):
        MMDiT(stored_config("dual"), kernels.load("torch"))
    before, start = peak(), time.perf_counter()
    model = load_mmdit(path, kernels.load("torch"))
    loaded, seconds = peak(), time.perf_counter() - start
    for tensor in model.state_dict().values():
        tensor.flatten().view(torch.uint8)[::4096].sum()                 # a byte of every page
    print(json.dumps({"before": before, "loaded": loaded, "touched": peak(), "seconds": seconds,
                      "touch_seconds": time.perf_counter() - start - seconds}))


def measured(*arguments) -> dict[str, float]:
    command = [sys.executable, __file__, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True,
                          env={"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
    return json.loads(done.stdout)


def write_random(path: Path, c: MMDiTConfig, layout: str, max_shard_bytes: int = 10 ** 10) -> int:
    """A bf16 checkpoint whose tensors are views of one random row, so that it fits any memory; its
    bytes."""
    with torch.device("meta"):
        meta = MMDiT(c, kernels.load("torch")).state_dict()
    row = torch.randn(max(t.numel() for t in meta.values()) + 999).bfloat16()
    state = {name: row[i % 999:][:t.numel()].view(t.shape) for i, (name, t)
             in enumerate(meta.items())}
    if layout == "single":
        files.write_tensors(path, formats.to_layout(state, layout, c.depth))
    else:
        formats.write_transformer(path, state, c, {}, None, max_shard_bytes)
    return sum(2 * t.numel() for t in meta.values())


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells a process's peak "
                    "there")
@pytest.mark.parametrize("layout", ["single", "diffusers"])
def test_a_network_is_never_twice_in_memory(tmp_path, layout):
    c = MMDiTConfig(depth=3, width=1024, context_dim=512, pooled_dim=512, qk_norm=True, pos_grid=64)
    size = write_random(tmp_path / "m", c, layout, max_shard_bytes=10 ** 8)
    found = measured("measure", tmp_path / "m")
    assert size > 2e8 and found["touched"] - found["before"] < 1.1 * size, (size, found)
    assert found["touched"] - found["before"] > 0.8 * size, "the pages were not counted"


def measure_export(source: str, out: str, layout: str) -> None:
    before, start = peak(), time.perf_counter()
    export_mmdit(load_mmdit(source, kernels.load("torch")), out, layout)
    print(json.dumps({"before": before, "peak": peak(), "seconds": time.perf_counter() - start}))


def memory(folder: Path) -> None:
    """SD3.5-large's 8B network in both layouts, the second exported from the first; removes
    both."""
    c = MMDiTConfig(depth=38, width=2432, context_dim=4096, pooled_dim=2048, qk_norm=True,
                    pos_grid=192)
    folder.mkdir()
    single, other = folder / "single", folder / "diffusers"
    size = write_random(single, c, "single")
    for what in (("measure", single), ("export", single, other, "diffusers"), ("measure", other)):
        found = measured(*what)
        times = {name: round(value, 1) for name, value in found.items() if "seconds" in name}
        peaks = {name: round(value / 1e9, 3) for name, value in found.items() if name not in times}
        print(f"{what[0]} {what[-1]}: {size / 1e9:.3f} GB of weights; GB {peaks}, {times}",
              flush=True)
    shutil.rmtree(folder)


if __name__ == "__main__":
    command, *arguments = sys.argv[1:]
    {"expected": write_expected, "measure": measure, "export": measure_export,
     "memory": lambda path: memory(Path(path))}[command](*arguments)
