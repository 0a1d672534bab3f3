"""Networks on disk: exact round trips, strict loading."""
import pytest
import torch
from conftest import VARIANTS, assert_close, tiny, tiny_inputs
from safetensors.torch import load_file, save_file

import kernels
from ladd.checkpoint import load_metadata, load_mmdit, save_mmdit
from ladd.config import InputError

# networks


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_network_survives_the_file(tmp_path, variant, dtype):
    model, path = tiny(variant, torch.float32, out_channels=3).to(dtype), tmp_path / "new" / "m.safetensors"
    metadata = {"levels": "[1, 0.5]", "note": "é"}
    save_mmdit(model, path, metadata)
    loaded = load_mmdit(path, kernels.load("torch"))
    assert loaded.config == model.config and load_metadata(path) == metadata
    assert path.stat().st_mode & 0o777 == 0o644
    state = loaded.state_dict()
    assert list(state) == list(model.state_dict())
    assert all(torch.equal(state[k], v) and state[k].dtype == dtype for k, v in model.state_dict().items())
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
    assert loaded.config == model.config and load_metadata(path) == {"role": "teacher", "predicts": "x0"}
    assert torch.equal(loaded(*inputs), model(*inputs))
    save_file(model.state_dict(), path, {"predicts": "eps"})
    with pytest.raises(InputError, match="m.safetensors: found .*'eps', accepted are v and x0"):
        load_mmdit(path)


def test_a_run_folder_stands_for_its_student(tmp_path):
    model = tiny("plain", torch.float32)
    with pytest.raises(InputError, match="found nothing, a finished run or a folder with"):
        load_mmdit(tmp_path)
    save_mmdit(model, tmp_path / "checkpoints" / "student.safetensors", {"steps": "4"})
    assert torch.equal(load_mmdit(tmp_path).final_layer.linear.weight, model.final_layer.linear.weight)
    assert load_metadata(tmp_path) == {"steps": "4"}


def test_published_prefix_and_other_networks_in_the_file(tmp_path):
    model = tiny("dual", torch.float32)
    named = {f"model.diffusion_model.{k}": v for k, v in model.state_dict().items()}
    save_file({**named, "first_stage_model.conv_in.weight": torch.zeros(3)}, tmp_path / "m.safetensors")
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
    assert not torch.equal(model.context_embedder.weight, load_file(path)["context_embedder.weight"])
    save_mmdit(model, path, {})                                     # over the file that is mapped
    assert torch.equal(load_mmdit(path).context_embedder.weight, model.context_embedder.weight)


QKV, LINEAR = "joint_blocks.1.x_block.attn.qkv.weight", "final_layer.linear.weight"
PATCHES, TEXT, POOLED = "x_embedder.proj.weight", "context_embedder.weight", "y_embedder.mlp.0.weight"


def without(start: str):
    return lambda t: {k: v for k, v in t.items() if not k.startswith(start)}


def having(**sizes: tuple[int, ...]):
    return lambda t: t | {globals().get(k, k): torch.zeros(size) for k, size in sizes.items()}


WRONG = {
    "missing":    (without(QKV), f"1 missing: {QKV}"),
    "hole":       (without("joint_blocks.1."), "20 missing: joint_blocks.1.context_block."),
    "unknown":    (having(lora=(2,)), "1 unknown: lora"),
    "misshapen":  (having(QKV=(384, 64)), f"1 misshapen: {QKV} [384, 64] ([384, 128] accepted)"),
    "both":       (having(lora=(2,), QKV=(3,)), f"1 unknown: lora; 1 misshapen: {QKV} [3]"),
    "integers":   (lambda t: t | {QKV: t[QKV].to(torch.int8)}, f"1 of another type: {QKV} torch.int8"),
    "table":      (having(pos_embed=(1, 140, 128)), "pos_embed [1, 140, 128] ([1, 121, 128] accepted)"),
    "flat input": (having(PATCHES=(128, 16)), f"found [128, 16], an MMDiT's {PATCHES} of rank 4"),
    "no patch":   (having(PATCHES=(128, 4, 0, 0)), "found [128, 4, 0, 0]"),
    "no input":   (without(PATCHES), f"found no {PATCHES} among"),
    "no output":  (without(LINEAR), f"found no {LINEAR} among"),
    "no table":   (without("pos_embed"), "found no pos_embed among"),
    "no text":    (without(TEXT), f"found no {TEXT} among"),
    "no pooled":  (without(POOLED), f"found no {POOLED} among"),
    "no blocks":  (without("joint"), "found width 128 and 0 tensors named joint_blocks.*"),
    "width":      (having(PATCHES=(100, 4, 2, 2)), "found width 100 and"),
    "another":    (lambda t: {"unet.weight": torch.zeros(2)}, f"found no {PATCHES} among 1 tensors"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_another_network_is_refused_in_one_line_that_names_the_tensor(tmp_path, wrong):
    change, message = WRONG[wrong]
    path = tmp_path / "m.safetensors"
    save_file(change(dict(tiny("plain", torch.float32).state_dict())), path)
    with pytest.raises(InputError) as error:
        load_mmdit(path)
    assert message in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("act", [
    lambda p: p.write_text("no tensors\n"), lambda p: p.write_bytes(b""), lambda p: None,
    lambda p: p.write_bytes(p.with_name("whole").read_bytes()[:-7])])
@pytest.mark.parametrize("load", [load_mmdit, load_metadata])
def test_no_safetensors_file_is_refused_in_one_line(tmp_path, act, load):
    save_mmdit(tiny("plain", torch.float32), tmp_path / "whole", {})
    path = tmp_path / "m.safetensors"
    act(path)
    with pytest.raises(InputError, match="found no whole safetensors file") as error:
        load(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
