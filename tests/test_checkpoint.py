"""Networks and run states on disk: exact round trips, strict loading, a kill at every operation."""
import copy
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import VARIANTS, assert_close, tiny, tiny_inputs
from safetensors.torch import load_file, save_file
from torch import nn

import kernels
from ladd import checkpoint, data
from ladd.checkpoint import (load_metadata, load_mmdit, load_optimizer, load_state, optimizer_tensors,
                             save_mmdit, save_state)
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


# run states

def state_of(step: int) -> tuple[dict, dict]:
    base = torch.full((4, 3), float(step))
    tensors = {"fp32": base, "view": base[1:], "same": base, "turned": base.T, "wide": base[:1].expand(5, 3),
               "bf16": base.bfloat16() / 3, "rng": torch.arange(7, dtype=torch.uint8),
               "index": torch.tensor(2 ** 40 + step), "empty": torch.zeros(0, 2)}
    return tensors, {"best": math.inf, "step": step, "nested": {"list": [1, -math.inf, 0.1]}}


def assert_state(found, step: int) -> None:
    tensors, meta = state_of(step)
    assert found[0] == step and found[2] == meta and set(found[1]) == set(tensors)
    assert all(torch.equal(found[1][k], v) and found[1][k].dtype == v.dtype for k, v in tensors.items())


def listing(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_the_newest_state_comes_back_and_the_last_two_are_kept(tmp_path):
    assert load_state(tmp_path / "absent") is None and load_state(tmp_path) is None
    for step in (5, 90, 200000, 1000000):
        save_state(tmp_path, step, *state_of(step))
        assert_state(load_state(tmp_path), step)
    assert listing(tmp_path) == ["step_1000000", "step_200000"]
    save_state(tmp_path, 1000001, *state_of(1000001), keep=1)
    assert listing(tmp_path) == ["step_1000001"]
    assert listing(tmp_path / "step_1000001") == ["meta.json", "state.safetensors"]


def test_nan_in_meta_comes_back(tmp_path):
    save_state(tmp_path, 1, {}, {"best": math.nan})
    _, tensors, meta = load_state(tmp_path)
    assert tensors == {} and math.isnan(meta["best"])


def test_saving_a_step_again_replaces_it(tmp_path):
    for step, values in ((1, 1), (2, 2), (2, 7)):
        save_state(tmp_path, step, *state_of(values))
    assert load_state(tmp_path)[2]["step"] == 7 and listing(tmp_path) == ["step_000001", "step_000002"]
    shutil.copytree(tmp_path / "step_000001", tmp_path / "step_000002.old")    # left by a kill
    assert load_state(tmp_path)[2]["step"] == 7
    save_state(tmp_path, 3, *state_of(3))
    assert listing(tmp_path) == ["step_000002", "step_000003"]


@pytest.mark.parametrize("name", ["state.safetensors", "meta.json"])
@pytest.mark.parametrize("act", [
    lambda p: p.write_bytes(p.read_bytes()[:-5]), lambda p: p.write_bytes(b""), Path.unlink])
def test_a_damaged_newest_state_is_named_and_no_older_one_taken(tmp_path, name, act):
    save_state(tmp_path, 1, *state_of(1))
    save_state(tmp_path, 2, *state_of(2))
    act(tmp_path / "step_000002" / name)
    with pytest.raises(InputError) as error:
        load_state(tmp_path)
    assert str(tmp_path / "step_000002" / name) in str(error.value) and "\n" not in str(error.value)


class Kill(BaseException):
    """Stands for SIGKILL: no handler of the code under test may run for it."""


def kill_at(m: pytest.MonkeyPatch, call: int) -> None:
    """Kills the `call`-th operation on files, half of it done where it has halves."""
    calls = []

    def wrap(owner, name, half=lambda *args: None):
        real = getattr(owner, name)

        def counted(*args, **kwargs):
            calls.append(name)
            if len(calls) == call:
                half(*args)
            if len(calls) >= call:          # dead from then on
                raise Kill
            return real(*args, **kwargs)
        m.setattr(owner, name, counted)

    def remove_one(path, *args):
        for file in list(Path(path).rglob("*.*"))[:1]:
            os.unlink(file)

    wrap(data, "save_file", lambda tensors, path, metadata: Path(path).write_bytes(b"half"))
    wrap(Path, "write_text", lambda path, text: path.write_bytes(text.encode()[:4]))
    wrap(shutil, "rmtree", remove_one)
    wrap(os, "fsync")
    wrap(os, "replace")
    for name in ("mkdir", "rmdir", "rename", "chmod"):
        wrap(Path, name)


@pytest.mark.parametrize("step", [3, 2])      # a new state, and one over the newest
def test_a_kill_at_any_operation_of_a_save_leaves_a_whole_state(tmp_path, step):
    ops = 0
    for call in range(1, 100):
        folder = tmp_path / str(call)
        save_state(folder, 1, *state_of(1))
        save_state(folder, 2, *state_of(2))
        with pytest.MonkeyPatch.context() as m:
            kill_at(m, call)
            try:
                save_state(folder, step, *state_of(30 + step))
                break
            except Kill:
                ops += 1
        at, tensors, meta = load_state(folder)
        assert (at, meta["step"]) in {(2, 2), (step, 30 + step)}, call
        assert_state((meta["step"], tensors, meta), meta["step"])
        save_state(folder, at, *state_of(at))             # as a resumed run would
        save_state(folder, 9, *state_of(9))
        assert_state(load_state(folder), 9)
        assert listing(folder) == [f"step_{at:06d}", "step_000009"], call
    assert 15 <= ops < 99


# optimizers

def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * (step + 1)               # the schedule's, as train.py sets it
        optimizer.zero_grad()
        model[:3](x).square().mean().backward()
        optimizer.step()


def network() -> tuple[nn.Module, torch.optim.Optimizer]:
    """A network whose last layer never gets a gradient, hence no moments; two groups, one without decay."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2), nn.Linear(2, 2))
    matrices, biases = ([p for p in model.parameters() if p.ndim == n] for n in (2, 1))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": biases, "weight_decay": 0.0}]
    return model, torch.optim.AdamW(groups, lr=0.5, betas=(0.5, 0.95))


def test_three_steps_a_file_and_three_more_equal_six_bit_for_bit(tmp_path):
    straight, optimizer = network()
    train(straight, optimizer, range(6))
    first, first_optimizer = network()
    train(first, first_optimizer, range(3))
    optimizers = {**optimizer_tensors(first_optimizer, "opt."), **optimizer_tensors(network()[1], "opt_d.")}
    save_state(tmp_path, 3, {**first.state_dict(), **optimizers}, {})
    _, tensors, _ = load_state(tmp_path)
    second, second_optimizer = network()
    second.load_state_dict({k: tensors[k] for k in second.state_dict()})
    load_optimizer(second_optimizer, "opt.", tensors)
    file = (tmp_path / "step_000003" / "state.safetensors").read_bytes()
    train(second, second_optimizer, range(3, 6))
    weights = zip(straight.state_dict().values(), second.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in weights)
    left, right = optimizer_tensors(optimizer, ""), optimizer_tensors(second_optimizer, "")
    assert set(left) == set(right) and len(left) == 1 + 3 * 4
    assert all(torch.equal(left[k], right[k]) for k in left)
    assert [g["betas"] for g in second_optimizer.param_groups] == [(0.5, 0.95)] * 2
    assert (tmp_path / "step_000003" / "state.safetensors").read_bytes() == file
    third, third_optimizer = network()
    load_optimizer(third_optimizer, "opt_d.", tensors)    # a state before the first step is empty, not absent
    assert third_optimizer.state_dict()["state"] == {}


def test_loaded_moments_are_copies():
    model, optimizer = network()
    train(model, optimizer, range(2))
    tensors = {k: v.clone() for k, v in optimizer_tensors(optimizer, "opt.").items()}
    before = copy.deepcopy(tensors)
    _, fresh = network()
    load_optimizer(fresh, "opt.", tensors)
    for moments in fresh.state.values():
        moments["exp_avg"].zero_()
    assert all(torch.equal(tensors[k], v) for k, v in before.items())


def test_the_state_of_another_optimizer_is_refused():
    model, optimizer = network()
    train(model, optimizer, range(1))
    tensors = optimizer_tensors(optimizer, "opt.")
    with pytest.raises(InputError, match="'opt_g.': found nothing saved, 6 parameters accepted"):
        load_optimizer(network()[1], "opt_g.", tensors)
    with pytest.raises(InputError, match="'opt.': found 6 saved, 1 parameters accepted"):
        load_optimizer(torch.optim.AdamW([torch.zeros(2, requires_grad=True)]), "opt.", tensors)
    turned = [torch.zeros(p.shape[::-1], requires_grad=True) for p in checkpoint.parameters(optimizer)]
    with pytest.raises(InputError, match=r"opt.0.exp_avg: found \[5, 6\], \[6, 5\] accepted"):
        load_optimizer(torch.optim.AdamW(turned), "opt.", tensors)
