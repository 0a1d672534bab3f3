"""Networks on disk: exact round trips, strict loading."""
import json
import time

import pytest
import torch
from conftest import VARIANTS, assert_close, tiny, tiny_inputs
from safetensors.torch import load_file, save_file

import kernels
from ladd.cli import InputError
from ladd.export import export_mmdit
from ladd.sd3.checkpoint import fingerprint, load_metadata, load_mmdit, save_mmdit
from ladd.sd3.formats import INDEX

# networks


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_network_survives_the_file(tmp_path, variant, dtype):
    model = tiny(variant, torch.float32, out_channels=3).to(dtype)
    path = tmp_path / "new" / "m.safetensors"
    metadata = {"levels": "[1, 0.5]", "note": "é"}
    save_mmdit(model, path, metadata)
    loaded = load_mmdit(path, kernels.load("torch"))
    assert loaded.config == model.config and load_metadata(path) == metadata
    assert path.stat().st_mode & 0o777 == 0o644
    state = loaded.state_dict()
    assert list(state) == list(model.state_dict())
    assert all(torch.equal(state[k], v) and state[k].dtype == dtype
               for k, v in model.state_dict().items())
    assert all(p.requires_grad for p in loaded.parameters()) and not loaded.pos_embed.requires_grad
    inputs = tiny_inputs(dtype=torch.float32)
    assert torch.equal(loaded(*inputs), model(*inputs))


@pytest.mark.parametrize("change", [
    dict(depth=1), dict(depth=12, width=64), dict(in_channels=16, out_channels=5), dict(patch=1),
    dict(context_dim=7, pooled_dim=9), dict(pos_grid=5), dict(dual_blocks=(2,), qk_norm=False)])
def test_every_size_is_inferred(tmp_path, change):
    model = tiny("plain", torch.float32, **change)
    save_mmdit(model, tmp_path / "m.safetensors", {})
    assert load_mmdit(tmp_path / "m.safetensors").config == model.config


def test_what_a_network_predicts_is_in_the_header(tmp_path):
    model, path = tiny("plain", torch.float32, predicts="x0"), tmp_path / "m.safetensors"
    save_mmdit(model, path, {"role": "teacher"})
    loaded, inputs = load_mmdit(path), tiny_inputs(dtype=torch.float32)
    assert loaded.config == model.config
    assert load_metadata(path) == {"role": "teacher", "predicts": "x0"}
    assert torch.equal(loaded(*inputs), model(*inputs))
    save_file(model.state_dict(), path, {"predicts": "eps"})
    with pytest.raises(InputError, match="m.safetensors: predicts must be v or x0 \\(got 'eps'\\)"):
        load_mmdit(path)


def test_a_run_folder_stands_for_its_student(tmp_path):
    model = tiny("plain", torch.float32)
    message = r"must be a finished run or a folder with .* \(got an empty folder\)"
    with pytest.raises(InputError, match=message):
        load_mmdit(tmp_path)
    save_mmdit(model, tmp_path / "checkpoints" / "student.safetensors", {"steps": "4"})
    loaded = load_mmdit(tmp_path)
    assert torch.equal(loaded.final_layer.linear.weight, model.final_layer.linear.weight)
    assert load_metadata(tmp_path) == {"steps": "4"}


@pytest.mark.parametrize("place", [0, 2 ** 16, -1])
def test_a_fingerprint_reads_the_whole_file(tmp_path, place):
    path, content = tmp_path / "m.safetensors", bytearray(3 * 2 ** 16)
    path.write_bytes(content)
    before = fingerprint(path)
    content[place] = 1
    path.write_bytes(content)
    assert fingerprint(path) != before
    path.write_bytes(bytes(len(content) + 1))               # zeros again, but one more
    assert fingerprint(path) != before


def test_published_prefix_and_other_networks_in_the_file(tmp_path):
    model = tiny("dual", torch.float32)
    named = {f"model.diffusion_model.{k}": v for k, v in model.state_dict().items()}
    named["first_stage_model.conv_in.weight"] = torch.zeros(3)
    save_file(named, tmp_path / "m.safetensors")
    loaded = load_mmdit(tmp_path / "m.safetensors")
    inputs = tiny_inputs(dtype=torch.float32)
    assert_close("v", loaded(*inputs), model(*inputs), 0)
    assert load_metadata(tmp_path / "m.safetensors") == {}


def test_training_a_loaded_network_leaves_its_file_alone(tmp_path):
    path = tmp_path / "m.safetensors"
    save_mmdit(tiny("plain", torch.float32), path, {})
    before = path.read_bytes()
    model = load_mmdit(path)
    optimizer = torch.optim.AdamW(model.parameters(), 0.1)
    model(*tiny_inputs(dtype=torch.float32)).square().mean().backward()
    optimizer.step()
    assert path.read_bytes() == before
    stored = load_file(path)["context_embedder.weight"]
    assert not torch.equal(model.context_embedder.weight, stored)
    save_mmdit(model, path, {})                                     # over the file that is mapped
    assert torch.equal(load_mmdit(path).context_embedder.weight, model.context_embedder.weight)


QKV, LINEAR = "joint_blocks.1.x_block.attn.qkv.weight", "final_layer.linear.weight"
PATCHES, TEXT = "x_embedder.proj.weight", "context_embedder.weight"
POOLED = "y_embedder.mlp.0.weight"


def without(start: str):
    return lambda t: {k: v for k, v in t.items() if not k.startswith(start)}


def having(**sizes: tuple[int, ...]):
    return lambda t: t | {globals().get(k, k): torch.zeros(size) for k, size in sizes.items()}


def spoiled(value: float):
    def change(tensors):
        tensors[QKV] = tensors[QKV].clone()
        tensors[QKV][5, 7] = value
        return tensors
    return change


def needs(name: str, rank: int, got: str = "none among") -> str:
    return f"{name} of an MMDiT must be a tensor of rank {rank} (got {got}"


BLOCKS = "a width that is a multiple of 64 and tensors named joint_blocks.* (got width "
BAD = {
    "missing":    (without(QKV), f"1 missing: {QKV}"),
    "hole":       (without("joint_blocks.1."), "without a gap, at most 256 (got 2 blocks, no block "
                   "1)"),
    "far block":  (having(**{"joint_blocks.100000.x_block.a": (1,)}), "(got 4 blocks, no block 3)"),
    "digits":     (having(**{f"joint_blocks.{6000 * '8'}.a": (1,)}), "1 unknown: joint_blocks.8"),
    "many blocks": (having(**{f"joint_blocks.{i}.a": (1,) for i in range(3, 300)}),
                    "at most 256 (got 300 blocks, no block 300)"),
    "empty":      (having(**{"joint_blocks.0.a": (0, 9)}),
                   "must have values (got 1 of size 0: joint_blocks.0.a)"),
    "nan":        (spoiled(float("nan")), f"m.safetensors: {QKV} must be finite (got NaN or inf)"),
    "inf":        (spoiled(-float("inf")), f"m.safetensors: {QKV} must be finite (got NaN or inf)"),
    "unknown":    (having(lora=(2,)), "1 unknown: lora"),
    "misshapen":  (having(QKV=(384, 64)), f"(got 1 misshapen: {QKV} [384, 64], not [384, 128])"),
    "both":       (having(lora=(2,), QKV=(3,)), f"1 unknown: lora; 1 misshapen: {QKV} [3]"),
    "integers":   (lambda t: t | {QKV: t[QKV].to(torch.int8)},
                   f"1 of another dtype: {QKV} torch.int8, not F32, BF16"),
    "table":      (having(pos_embed=(1, 140, 128)), "pos_embed [1, 140, 128], not [1, 121, 128]"),
    "flat input": (having(PATCHES=(128, 16)), needs(PATCHES, 4, "[128, 16])")),
    "no patch":   (having(PATCHES=(128, 4, 0, 0)), needs(PATCHES, 4, "[128, 4, 0, 0])")),
    "no input":   (without(PATCHES), needs(PATCHES, 4)),
    "no output":  (without(LINEAR), needs(LINEAR, 2)),
    "no table":   (without("pos_embed"), needs("pos_embed", 3)),
    "no text":    (without(TEXT), needs(TEXT, 2)),
    "no pooled":  (without(POOLED), needs(POOLED, 2)),
    "no blocks":  (without("joint"), BLOCKS + "128 and 0 such tensors)"),
    "width":      (having(PATCHES=(100, 4, 2, 2)), BLOCKS + "100 and"),
    "another":    (lambda t: {"unet.weight": torch.zeros(2)},
                   needs(PATCHES, 4, "none among 1 tensors)")),
}


@pytest.mark.parametrize("bad", BAD)
def test_another_network_raises_one_line_that_names_the_tensor(tmp_path, bad):
    change, message = BAD[bad]
    path = tmp_path / "m.safetensors"
    save_file(change(dict(tiny("plain", torch.float32).state_dict())), path)
    start = time.perf_counter()
    with pytest.raises(InputError) as error:
        load_mmdit(path)
    text = str(error.value)
    assert time.perf_counter() - start < 2
    assert message in text and str(path) in text and "\n" not in text


def test_a_part_of_a_folder_that_is_not_finite_is_named(tmp_path):
    """q, k and v of diffusers are separate, in files of their own."""
    model = tiny("qk_norm", torch.float32)
    export_mmdit(model, tmp_path / "d", "diffusers", max_shard_bytes=400_000)
    name = "transformer_blocks.1.attn.to_k.weight"
    index = json.loads((tmp_path / "d" / INDEX).read_text())
    file = tmp_path / "d" / index["weight_map"][name]
    tensors = load_file(file)
    tensors[name][3, 3] = float("inf")
    save_file(tensors, file)
    with pytest.raises(InputError) as error:
        load_mmdit(tmp_path / "d")
    assert str(error.value) == f"{file}: {name} must be finite (got NaN or inf)"


def test_export_never_writes_what_is_not_finite(tmp_path):
    model = tiny("plain", torch.float32)
    model.get_submodule(QKV.removesuffix(".weight")).weight.data[1, 1] = float("nan")
    for layout in ("single", "diffusers"):
        with pytest.raises(InputError, match="attn.*weight must be finite"):
            export_mmdit(model, tmp_path / "out", layout)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("act", [
    lambda p: p.write_text("no tensors\n"), lambda p: p.write_bytes(b""), lambda p: None,
    lambda p: p.write_bytes(p.with_name("whole").read_bytes()[:-7])])
@pytest.mark.parametrize("load", [load_mmdit, load_metadata])
def test_a_damaged_or_missing_file_raises_one_line(tmp_path, act, load):
    save_mmdit(tiny("plain", torch.float32), tmp_path / "whole", {})
    path = tmp_path / "m.safetensors"
    act(path)
    with pytest.raises(InputError, match="not a complete safetensors file") as error:
        load(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
