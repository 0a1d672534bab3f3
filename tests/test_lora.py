"""LoRA: what it computes, what trains, merging, files of other programs, shards; also what
processes run."""
import json
import time
from pathlib import Path

import pytest
import sd3
import torch
from conftest import TINY, VARIANTS, assert_close, rng, run_ranks, tiny, tiny_inputs
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import kernels
from ladd.cli import InputError
from ladd.core import lora
from ladd.core.mmdit import Linear, MMDiT, MMDiTConfig
from ladd.engine import parallel
from ladd.engine.networks import factors
from ladd.engine.optimizer import AdamW
from ladd.engine.state import Saver, collect, open_state, restore
from ladd.export import export_mmdit
from ladd.sd3 import lora_files
from ladd.sd3.checkpoint import load_mmdit, save_mmdit

CPU, RANK, ALPHA = torch.device("cpu"), 4, 6.0
QKV = "joint_blocks.0.x_block.attn.qkv"


def drawn(model: MMDiT, seed: int = 3) -> MMDiT:
    """Draws every matrix of a network's LoRA: B is not zero."""
    g = rng(seed)
    with torch.no_grad():
        for p in lora.parameters(model).values():
            p.copy_(0.2 * torch.randn(p.shape, generator=g, dtype=torch.float32))
    return model


def adapted(variant: str = "dual", dtype: torch.dtype = torch.float64, targets=lora.ALL,
            **changes) -> MMDiT:
    model = tiny(variant, dtype, **changes)
    lora.add(model, RANK, ALPHA, targets, rng(2))
    return drawn(model)


def save_lora(path: Path, model: MMDiT, *metadata) -> None:
    lora_files.save(path, factors(model), model.config, *metadata)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k
                                        in a)


def copied(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in state.items()}


def by_hand(model: MMDiT) -> MMDiT:
    """A plain network with W + alpha / rank B A in place of each W, in float64."""
    tensors = {name: t.double() for name, t in model.state_dict().items()}
    for name in [name.removesuffix(".lora_a") for name in tensors if name.endswith(".lora_a")]:
        a, b = tensors.pop(f"{name}.lora_a"), tensors.pop(f"{name}.lora_b")
        tensors[f"{name}.weight"] = tensors[f"{name}.weight"] + ALPHA / RANK * b @ a
    plain = MMDiT(model.config, model.kernels, torch.float64).double()
    plain.load_state_dict(tensors)
    return plain


# what it computes

@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_start_is_the_base_bit_for_bit(variant, dtype):
    base, model = tiny(variant, dtype), tiny(variant, dtype)
    new = lora.add(model, RANK, ALPHA, lora.ALL, rng(2))
    inputs = tiny_inputs(dtype=dtype)
    assert model(*inputs).equal(base(*inputs))
    names = model.state_dict().keys() - base.state_dict().keys()
    assert names == new.keys() == lora.parameters(model).keys()
    for name, p in lora.parameters(model).items():
        # masters, whatever the base's
        assert p.equal(new[name]) and p.dtype == torch.float32
        if name.endswith("lora_a"):
            largest = p.abs().max() * p.shape[1] ** 0.5
            assert 0.9 < largest <= 1 and abs(p.mean()) * p.shape[1] ** 0.5 < 0.1
    again = lora.add(tiny(variant, dtype), RANK, ALPHA, lora.ALL, rng(2))
    assert same(new, again) and not new[f"{QKV}.lora_a"].equal(new["joint_blocks.1" + QKV[14:]
                                                                   + ".lora_a"])
    # a base's names still fit
    other = tiny(variant, dtype, seed=5).state_dict()
    assert set(model.load_state_dict(other, strict=False).missing_keys) == names
    assert model(*inputs).equal(tiny(variant, dtype, seed=5)(*inputs))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_network_computes_as_with_the_sum_of_the_weights(variant):
    model = adapted(variant, targets=("*",))
    expected = by_hand(model)(*tiny_inputs())
    assert_close("v", model(*tiny_inputs()), expected)
    assert (expected - tiny(variant)(*tiny_inputs())).std() > 0.1 * expected.std()


def test_it_computes_in_the_inputs_type_and_its_gradients_in_its_own():
    model = adapted(dtype=torch.float32)
    layer = model.get_submodule(QKV)
    x = torch.randn(7, 128, generator=rng()).bfloat16().requires_grad_()
    y = layer(x)
    g = torch.randn(y.shape, generator=rng(1)).bfloat16()
    y.backward(g)
    a, b, w = (t.detach().double() for t in (layer.lora_a, layer.lora_b, layer.weight))
    xd, gd, s = x.detach().double(), g.double(), ALPHA / RANK
    assert y.dtype == x.grad.dtype == torch.bfloat16 and layer.lora_a.grad.dtype == torch.float32
    assert_close("y", y.double(), xd @ (w + s * b @ a).T + layer.bias.double(), 2e-2)
    assert_close("dx", x.grad.double(), gd @ (w + s * b @ a), 2e-2)
    assert_close("da", layer.lora_a.grad.double(), s * (gd @ b).T @ xd, 2e-2)
    assert_close("db", layer.lora_b.grad.double(), s * gd.T @ (xd @ a.T), 2e-2)
    assert layer.weight.grad is None and layer.bias.grad is None


def test_it_costs_two_thin_products():
    layer, x = adapted(dtype=torch.float32).get_submodule(QKV), torch.zeros(7, 128)
    with FlopCounterMode(display=False) as counted:
        layer(x)
    assert counted.get_total_flops() == 2 * 7 * (128 * 384 + RANK * (128 + 384))


# which layers

ENDS = {  # of the "dual" network of three blocks; the last text block has neither proj nor mlp
    lora.ATTENTION: """
        0.context_block.attn.proj 0.context_block.attn.qkv 0.x_block.attn.proj 0.x_block.attn.qkv
        0.x_block.attn2.proj 0.x_block.attn2.qkv 1.context_block.attn.proj 1.context_block.attn.qkv
        1.x_block.attn.proj 1.x_block.attn.qkv 1.x_block.attn2.proj 1.x_block.attn2.qkv
        2.context_block.attn.qkv 2.x_block.attn.proj 2.x_block.attn.qkv""",
    ("mlp.fc1", "context_block.attn.proj"): """
        0.context_block.attn.proj 0.context_block.mlp.fc1 0.x_block.mlp.fc1
        1.context_block.attn.proj 1.context_block.mlp.fc1 1.x_block.mlp.fc1 2.x_block.mlp.fc1""",
    ("joint_blocks.1.x_block.*",): """
        1.x_block.adaLN_modulation.1 1.x_block.attn.proj 1.x_block.attn.qkv
        1.x_block.attn2.proj 1.x_block.attn2.qkv 1.x_block.mlp.fc1 1.x_block.mlp.fc2"""}


@pytest.mark.parametrize("targets", ENDS)
def test_targets_name_layers(targets):
    model = tiny("dual")
    lora.add(model, RANK, ALPHA, targets, rng())
    found = sorted(name.removeprefix("joint_blocks.") for name in lora.of_kind(model, lora.Lora))
    assert found == ENDS[targets].split()
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trains == {f"joint_blocks.{name}.{part}" for name in found for part
                      in ("lora_a", "lora_b")}


def test_all_are_the_linear_layers_of_the_blocks():
    model = tiny("dual")
    linear = {name for name, m in model.named_modules() if isinstance(m, Linear)}
    lora.add(model, RANK, ALPHA, lora.ALL, rng())
    found = set(lora.of_kind(model, lora.Lora))
    assert {name.split(".")[0] for name in linear - found} == {
        "t_embedder", "y_embedder", "context_embedder", "final_layer"} and found <= linear
    lora.add(model, RANK, ALPHA, ("final_layer.linear",), rng())                   # more, later
    assert set(lora.of_kind(model, lora.Lora)) == found | {"final_layer.linear"}
    assert all(p.requires_grad for p in lora.parameters(model).values())


LAYERS = (r"^LoRA targets must be names or patterns of this network's linear layers, such as "
          r"joint_blocks.\*, adaLN_modulation.1, attn.proj, attn.qkv, context_embedder, "
          r"final_layer.linear, mlp.0, mlp.2, mlp.fc1, mlp.fc2 \(got ")


@pytest.mark.parametrize("rank, alpha, targets, line", [
    (4, 4.0, ("attn.qkv", "to_q", "attn2.qkv", "lp.fc1", "mlp"),
     LAYERS + r"to_q, attn2.qkv, lp.fc1, mlp\)$"),
    (4, 4.0, (), LAYERS + r"none\)$"),
    (0, 4.0, lora.ALL, r"^LoRA rank must be 1 to the network's width, 128 \(got 0\)$"),
    (129, 4.0, lora.ALL, r"^LoRA rank must be 1 to the network's width, 128 \(got 129\)$"),
    (4, 0.0, lora.ALL, r"^LoRA alpha must be a finite number above 0 \(got 0.0\)$"),
    (4, float("nan"), lora.ALL, r"^LoRA alpha must be a finite number above 0 \(got nan\)$")])
def test_what_cannot_be_added_says_so_and_changes_nothing(rank, alpha, targets, line):
    model = tiny()
    with pytest.raises(InputError, match=line):
        lora.add(model, rank, alpha, targets, rng())
    assert same(model.state_dict(), tiny().state_dict())
    assert all(type(m) is not lora.Lora for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())


# training

def steps(model: MMDiT, n: int, first: int = 0, optimizer: AdamW | None = None,
          ema: MMDiT | None = None) -> AdamW:
    optimizer = optimizer or AdamW(model, 1e-2, 0.9, 0.999, weight_decay=0.1, ema=ema)
    for i in range(first, first + n):
        model(*tiny_inputs(dtype=model.compute_dtype, seed=10 + i)).square().mean().backward()
        optimizer.step(0.7)
    return optimizer


def test_only_its_matrices_train_and_all_of_them():
    model = tiny("dual", torch.float32)
    lora.add(model, RANK, ALPHA, lora.ALL, rng())
    before = copied(model.state_dict())
    steps(model, 2)                                            # A moves once B is not zero
    moved = {name for name, t in model.state_dict().items() if not t.equal(before[name])}
    assert moved == lora.parameters(model).keys()
    assert all(p.grad is None for name, p in model.named_parameters() if name not in moved)


@pytest.mark.slow
@pytest.mark.parametrize("keep, compiled", [("full", False), ("selective", True)])
def test_checkpointed_and_compiled_blocks_train_the_same(keep, compiled):
    inputs = tiny_inputs(dtype=torch.float32)
    plain, model = (adapted(dtype=torch.float32, depth=2, dual_blocks=()) for _ in range(2))
    parallel.checkpointed(model, keep)
    if compiled:                                               # one: each takes seconds
        model.joint_blocks[0].compile(fullgraph=True, backend="aot_eager")
    steps(plain, 2), steps(model, 2)
    for name, p in lora.parameters(plain).items():
        assert_close(name, model.get_parameter(name), p, 2e-4 if compiled else 0)
    with torch.no_grad():
        lora.merge(plain), lora.merge(model)                   # a compiled block sees it
        assert_close("v", model(*inputs), plain(*inputs), 1e-3)


def test_a_run_state_goes_on_bit_for_bit(tmp_path):
    def parts(model, ema, optimizer):
        return {"ema": lora.parameters(ema), "model": lora.parameters(model),
                "opt": optimizer.state()}
    model, ema = adapted(dtype=torch.float32), adapted(dtype=torch.float32)
    optimizer = steps(model, 2, ema=ema)
    saver = Saver(tmp_path)
    saver.begin(2, collect(parts(model, ema, optimizer)), None)
    saver.finish()
    steps(model, 1, 2, optimizer)
    expected = copied(model.state_dict()), copied(ema.state_dict())
    model, ema = adapted(dtype=torch.float32), adapted(dtype=torch.float32)
    optimizer, found = steps(model, 0, ema=ema), open_state(tmp_path)
    restore(found, parts(model, ema, optimizer))
    steps(model, 1, 2, optimizer)
    assert same(model.state_dict(), expected[0]) and same(ema.state_dict(), expected[1])
    # nothing of the base
    assert not found.tensors.keys() & tiny("dual").state_dict().keys()


# merging

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_rounds_once_and_leaves_a_plain_frozen_network(dtype):
    model, inputs = adapted(dtype=dtype), tiny_inputs(dtype=dtype)
    v, names = model(*inputs), tiny("dual", dtype).state_dict().keys()
    lora.merge(model)
    expected = by_hand(adapted(dtype=dtype)).state_dict()
    assert model.state_dict().keys() == names == expected.keys()
    for name, t in model.state_dict().items():
        assert t.equal(expected[name].to(dtype)), name
    assert all(type(m) is not lora.Lora for m in model.modules())
    merged = model(*inputs)
    assert_close("v", merged, v, 1e-5 if dtype == torch.float32 else 0.1)
    assert not merged.requires_grad
    # nothing is left to merge
    lora.merge(model)
    assert model(*inputs).equal(merged)


def test_a_merged_network_is_saved_and_takes_another_lora(tmp_path):
    model, inputs = adapted("qk_norm", torch.float32), tiny_inputs(dtype=torch.float32)
    lora.merge(model)
    merged = model(*inputs)
    save_mmdit(model, tmp_path / "m.safetensors", {})
    assert load_mmdit(tmp_path / "m.safetensors", kernels.load("torch"))(*inputs).equal(merged)
    lora.add(model, 2, 2.0, ("mlp.fc1",), rng())
    assert model(*inputs).equal(merged)


# files: names written by hand, those of diffusers 0.42 and of ComfyUI's and kohya's sources

def blocks(of: str, parts: dict[int, str]) -> list[str]:
    return [of.format(i, part) for i, some in parts.items() for part in some.split()]


DIFFUSERS = """context_embedder proj_out norm_out.linear time_text_embed.timestep_embedder.linear_1
    time_text_embed.timestep_embedder.linear_2 time_text_embed.text_embedder.linear_1
    time_text_embed.text_embedder.linear_2""".split() + blocks("transformer_blocks.{}.{}", {
        0: """attn.to_q attn.to_k attn.to_v attn.to_out.0
              attn.add_q_proj attn.add_k_proj attn.add_v_proj attn.to_add_out
              attn2.to_q attn2.to_k attn2.to_v attn2.to_out.0 ff.net.0.proj ff.net.2
              ff_context.net.0.proj ff_context.net.2 norm1.linear norm1_context.linear""",
        1: """attn.to_q attn.to_k attn.to_v attn.to_out.0
              attn.add_q_proj attn.add_k_proj attn.add_v_proj
              ff.net.0.proj ff.net.2 norm1.linear norm1_context.linear"""})
KEYS = {f"transformer.{name}.lora_{x}.weight" for name in DIFFUSERS for x in "AB"}


def everywhere(dtype: torch.dtype = torch.float32) -> MMDiT:
    """LoRA on every linear layer of a network of two blocks, the first with a second attention."""
    return adapted("dual", dtype, ("*",), depth=2, dual_blocks=(0,))


def test_files_have_the_names_that_others_load(tmp_path):
    path = tmp_path / "sd3.5-turbo.safetensors"
    save_lora(path, everywhere(), {"base": "sd3.5-medium"})
    with safe_open(path, "pt") as file:
        about = file.metadata()
    assert load_file(path).keys() == KEYS
    assert about["modelspec.architecture"] == "stable-diffusion-v3/lora"
    assert (about["modelspec.title"], about["base"]) == ("sd3.5-turbo", "sd3.5-medium")
    peft = json.loads(about["lora_adapter_metadata"])
    assert (peft["transformer.r"], peft["transformer.lora_alpha"]) == (RANK, RANK)
    assert peft["transformer.rank_pattern"] == peft["transformer.alpha_pattern"] == {}
    assert sorted(peft["transformer.target_modules"]) == sorted(DIFFUSERS)


def test_a_file_read_and_written_again_is_the_same(tmp_path):
    """It holds A and alpha / rank B, in one rounding."""
    model = everywhere()
    save_lora(tmp_path / "1.safetensors", model)
    loaded = lora_files.load(tmp_path / "1.safetensors")
    assert loaded.keys() == lora.of_kind(model, lora.Lora).keys()
    for name, layer in lora.of_kind(model, lora.Lora).items():
        a, b = layer.lora_a.detach(), layer.lora_b.detach()
        assert loaded[name].alpha == RANK and loaded[name].a.equal(a), name
        assert loaded[name].b.equal((1.5 * b.double()).float()), name
    twin = tiny("dual", torch.float32, depth=2, dual_blocks=(0,))
    lora.apply(twin, loaded)
    save_lora(tmp_path / "2.safetensors", twin)
    assert same(load_file(tmp_path / "1.safetensors"), load_file(tmp_path / "2.safetensors"))
    inputs = tiny_inputs(dtype=torch.float32)
    assert_close("v", twin(*inputs), model(*inputs), 1e-5)


def product(f: lora.Factors) -> Tensor:
    return (f.alpha / len(f.a)) * f.b.double() @ f.a.double()


@pytest.mark.parametrize("alpha", [0.5, None])
def test_kohyas_names_and_comfyuis_rule_place_every_tensor(tmp_path, alpha):
    """The key of a weight is lora_unet_ and its name in the single file with _ for each dot;
    W becomes W + alpha / rank up down."""
    model = everywhere()
    held = {}
    for name, f in factors(model).items():
        key = "lora_unet_" + name.replace(".", "_")
        held |= pair(key, f.a, f.b, ("lora_down", "lora_up"))
        held |= {} if alpha is None else {f"{key}.alpha": torch.tensor(alpha)}
    export_mmdit(lora_free(), tmp_path / "m.safetensors")
    weights = load_file(tmp_path / "m.safetensors")
    found = lora_files.load(write(tmp_path / "l.safetensors", held))
    for name, weight in weights.items():
        if name.endswith(".weight"):
            key = name.removeprefix("model.diffusion_model.").removesuffix(".weight")
            key = f"lora_unet_{key.replace('.', '_')}"
            if f"{key}.lora_up.weight" in held:
                up, down = (held.pop(f"{key}.{end}.weight").double()
                            for end in ("lora_up", "lora_down"))
                scale = held.pop(f"{key}.alpha", torch.tensor(RANK)).double() / len(down)
                weights[name] = (weight + scale * up @ down).float()
    assert not held
    save_file(weights, tmp_path / "patched.safetensors")
    twin, inputs = lora_free(), tiny_inputs(dtype=torch.float32)
    lora.apply(twin, found)
    lora.merge(twin)
    assert load_mmdit(tmp_path / "patched.safetensors",
                      kernels.load("torch"))(*inputs).equal(twin(*inputs))


def lora_free() -> MMDiT:
    return tiny("dual", torch.float32, depth=2, dual_blocks=(0,))


# files of others

def matrices(n: int, k: int, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    g = rng(seed)
    return torch.randn(rank, k, generator=g), torch.randn(n, rank, generator=g)


def write(path: Path, tensors: dict[str, Tensor], **header) -> Path:
    save_file({name: t.contiguous().clone() for name, t in tensors.items()}, path,
              {key: json.dumps(value) for key, value in header.items()} or None)
    return path


def pair(module: str, a: Tensor, b: Tensor, names=("lora_A", "lora_B")) -> dict[str, Tensor]:
    return {f"{module}.{names[0]}.weight": a, f"{module}.{names[1]}.weight": b}


def test_three_matrices_of_q_k_v_become_one_lora_of_the_same_product(tmp_path):
    three = [matrices(128, 128, r, 5 + i) for i, r in enumerate((2, 3, 4))]
    names = [f"transformer.transformer_blocks.1.attn2.to_{x}" for x in "qkv"]
    blocks = [b.double() @ a.double() for a, b in three]
    tensors = {key: t for name, ab in zip(names, three) for key, t in pair(name, *ab).items()}
    f, = lora_files.load(write(tmp_path / "l", tensors)).values()
    assert f.a.shape == (9, 128) and f.b.shape == (384, 9) and f.alpha == 9
    assert_close("three", product(f), torch.cat(blocks), 1e-6)

    tensors |= {f"{names[0]}.alpha": torch.tensor(1.0), f"{names[2]}.alpha": torch.tensor(6.0)}
    f, = lora_files.load(write(tmp_path / "l", tensors)).values()
    assert_close("alphas", product(f), torch.cat([blocks[0] / 2, blocks[1], blocks[2] * 1.5]), 1e-6)

    tensors = pair("transformer.transformer_blocks.1.attn.add_q_proj", *three[0]) | pair(
        "transformer.transformer_blocks.1.attn.add_v_proj", *three[2])
    loaded = lora_files.load(write(tmp_path / "l", tensors))
    assert list(loaded) == ["joint_blocks.1.context_block.attn.qkv"]
    nothing = torch.zeros(128, 128, dtype=torch.float64)
    f, = loaded.values()
    assert_close("no k", product(f), torch.cat([blocks[0], nothing, blocks[2]]), 1e-6)
    model = tiny("dual", torch.float32)
    lora.apply(model, loaded)
    save_lora(tmp_path / "again", model)
    again = load_file(tmp_path / "again")
    for x, block in zip("qkv", (blocks[0], nothing, blocks[2])):
        key = f"transformer.transformer_blocks.1.attn.add_{x}_proj.lora_"
        found = again[f"{key}B.weight"].double() @ again[f"{key}A.weight"].double()
        assert (found - block).abs().max() < 1e-5, x


@pytest.mark.parametrize("module, layer, names, swapped",
                         [("transformer.transformer_blocks.7.attn.to_out.0",
                           "joint_blocks.7.x_block.attn.proj", "AB", False),
                          ("transformer_blocks.7.ff.net.0.proj", "joint_blocks.7.x_block.mlp.fc1",
                           "AB", False), ("base_model.model.transformer_blocks.10.ff_context.net.2",
                                          "joint_blocks.10.context_block.mlp.fc2", "PP", False),
                          ("lora_transformer_transformer_blocks_3_attn_to_add_out",
                           "joint_blocks.3.context_block.attn.proj", "du", False),
                          ("lycoris_transformer_blocks_3_norm1_linear",
                           "joint_blocks.3.x_block.adaLN_modulation.1", "du", False),
                          ("diffusion_model.joint_blocks.0.x_block.attn2.qkv",
                           "joint_blocks.0.x_block.attn2.qkv", "AB", False),
                          ("model.diffusion_model.joint_blocks.0.x_block.mlp.fc2",
                           "joint_blocks.0.x_block.mlp.fc2", "du", False),
                          ("lora_unet_joint_blocks_23_context_block_adaLN_modulation_1",
                           "joint_blocks.23.context_block.adaLN_modulation.1", "du", False),
                          ("transformer.transformer_blocks.23.norm1_context.linear",
                           "joint_blocks.23.context_block.adaLN_modulation.1", "AB", True),
                          ("transformer.norm_out.linear", "final_layer.adaLN_modulation.1", "AB",
                           True), ("lora_unet_final_layer_adaLN_modulation_1",
                                   "final_layer.adaLN_modulation.1", "du", False),
                          ("transformer.context_embedder", "context_embedder", "AB", False),
                          ("lora_unet_context_embedder", "context_embedder", "du", False),
                          ("transformer.time_text_embed.text_embedder.linear_2", "y_embedder.mlp.2",
                           "AB", False), ("lora_unet_t_embedder_mlp_0", "t_embedder.mlp.0", "du",
                                          False)])
def test_names_of_other_programs_and_the_order_of_halves(tmp_path, module, layer, names, swapped):
    a, b = matrices(16, 8, 2, 1)                     # twice as many rows: as the last norms have
    ends = {"AB": ("lora_A", "lora_B"), "PP": ("lora_A.default", "lora_B.default"),
            "du": ("lora_down", "lora_up")}[names]
    found = lora_files.load(write(tmp_path / "l", pair(module, a, b, ends)))
    assert list(found) == [layer] and found[layer].a.equal(a) and found[layer].alpha == 2
    assert found[layer].b.equal(torch.cat([b[8:], b[:8]]) if swapped else b)
    alpha = {f"{module}.alpha": torch.tensor(0.5)}
    found = lora_files.load(write(tmp_path / "l", pair(module, a, b, ends) | alpha))
    assert found[layer].alpha == 0.5


def test_the_text_norm_of_another_block_is_not_swapped(tmp_path):
    a, b = matrices(48, 8, 2, 1)
    name = "transformer.transformer_blocks.3.norm1_context.linear"
    found = lora_files.load(write(tmp_path / "l", pair(name, a, b)))
    assert found["joint_blocks.3.context_block.adaLN_modulation.1"].b.equal(b)


def test_alpha_in_diffusers_header_counts(tmp_path):
    a, b = matrices(8, 8, 4, 1)
    one, two = "transformer_blocks.1.attn.to_out.0", "transformer_blocks.11.attn.to_out.0"
    tensors = pair(f"transformer.{one}", a, b) | pair(f"transformer.{two}", a, b)
    about = {"transformer.r": 4, "transformer.lora_alpha": 12,
             "transformer.alpha_pattern": {"^transformer_blocks.1.attn.to_out.0": 2,
                                           "11.attn.to_out": 6, "blocks.11.attn.to_out.0": 3}}
    alphas = lambda about: [f.alpha for f in lora_files.load(
        write(tmp_path / "l", tensors, lora_adapter_metadata=about)).values()]
    assert alphas(about) == [2, 12]
    # 12 / sqrt(4) = 24 / 4
    assert alphas({"lora_alpha": 12, "use_rslora": True}) == [24, 24]
    assert alphas({"transformer.r": 4}) == [4, 4]
    for bad in ([1], {"lora_alpha": "much"}, {"alpha_pattern": {"(": 1}}):
        with pytest.raises(InputError, match="lora_adapter_metadata must be as diffusers writes "
                           "it"):
            alphas(bad)


A, B = matrices(128, 128, 2, 1)
OUT = "transformer.transformer_blocks.0.attn.to_out.0"
KNOWN = "must hold lora_A and lora_B, or lora_down, lora_up and alpha, of SD3's linear layers "


@pytest.mark.parametrize("tensors, line", [
    ({}, KNOWN + r"\(got 0 tensors and 0 of text encoders, 0 unknown: \)$"),
    ({"transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": A, **pair(OUT, A, B)},
     KNOWN + r"\(got 3 tensors and 0 of text encoders, 1 unknown: "
     r"transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight\)$"),
    (pair(OUT, A, B) | {f"{OUT}.lora_magnitude_vector": B},
     rf"must be a plain LoRA of matrices A and B \(got DoRA: {OUT}.lora_magnitude_vector\)$"),
    (pair("text_encoder.text_model.encoder.layers.0.self_attn.q_proj", A, B),
     r"\(got 0 tensors and 2 of text encoders, 0 unknown: \)$"),
    (pair("transformer.transformer_blocks.0.attn.norm_q", A, B),
     r"^LoRA of joint_blocks.0.x_block.attn.ln_q: this network \(.*\) has no such linear layer$"),
    ({f"{OUT}.lora_A.weight": A}, rf"{OUT} must have both matrices A and B \(got no B\)$"),
    ({f"{OUT}.lora_B.weight": A}, rf"{OUT} must have both matrices A and B \(got no A\)$"),
    (pair(OUT, A, B.T),
     rf"{OUT} must have A .* \(got A \[2, 128\], B \[2, 128\], alpha \[\]\)$"),
    (pair(OUT, A[..., None, None], B), r"\(got A \[2, 128, 1, 1\], B \[128, 2\], alpha \[\]\)$"),
    (pair(OUT, A, B) | {f"{OUT}.alpha": torch.ones(2)},
     r"and one number alpha .* alpha \[2\]\)$"),
    (pair(OUT, A, B) | pair(OUT, A, B, ("lora_down", "lora_up")),
     "is also stored by another name; keep one$"),
    (pair(OUT, A, B) | pair(OUT[12:], A, B), "is stored by several names, such as transformer"),
    (pair(OUT, A, B) | pair(f"diffusion_model.{QKV[:-3]}proj", A, B),
     "by several names, such as transf"),
    (pair("transformer.transformer_blocks.0.attn.to_q", A, B)
     | pair(f"diffusion_model.{QKV}", A, B),
     f"{QKV} is stored by several names, such as transformer.*to_q; keep one$"),
    (pair("transformer.transformer_blocks.0.attn.to_q", A, B)
     | pair("transformer.transformer_blocks.0.attn.to_k", A, B[:64]),
     rf"{QKV}: the parts .* must have one size \(got \[\[128, 128\], \[64, 128\]\]\)$")])
def test_what_is_no_lora_of_sd3_raises_one_line(tmp_path, tensors, line):
    with pytest.raises(InputError, match=line) as error:
        found = lora_files.load(write(tmp_path / "l.safetensors", tensors))
        lora.apply(tiny("qk_norm"), found)
    assert "\n" not in str(error.value)


def test_what_does_not_fit_the_network_is_refused_and_changes_nothing():
    model, (a, b) = tiny("plain", torch.float32), matrices(128, 128, 2, 1)
    good = {"joint_blocks.0.x_block.attn.proj": lora.Factors(a, b, 2.0)}
    wide = lora.Factors(torch.zeros(2, 1536), torch.zeros(1536, 2), 2.0)
    for bad, line in (({"joint_blocks.1.x_block.attn.proj": wide},
                       r"^LoRA of joint_blocks.1.x_block.attn.proj must be of a layer of size "
                       r"\[128, 128\] \(got \[1536, 1536\]\)$"),
                      ({"joint_blocks.3.x_block.attn.proj": lora.Factors(a, b, 2.0)},
                       r"^LoRA of joint_blocks.3.x_block.attn.proj: this network "
                       r"\(3 blocks of width 128\) has no such linear layer$"),
                      ({"x_embedder.proj": lora.Factors(a, b, 2.0)},
                       "^LoRA of x_embedder.proj: this network ")):
        with pytest.raises(InputError, match=line):
            lora.apply(model, good | bad)
        assert same(model.state_dict(), tiny("plain", torch.float32).state_dict())
        assert all(p.requires_grad for p in model.parameters())
    lora.apply(model, good)
    with pytest.raises(InputError, match="^LoRA of .*: the layer already has a LoRA; merge that "
                       "first"):
        lora.apply(model, good)
    assert model.joint_blocks[0].x_block.attn.proj.lora_b.equal(b)


def test_what_cannot_be_written_leaves_the_former_file(tmp_path):
    path, model = tmp_path / "l.safetensors", everywhere()
    save_lora(path, model)
    before = path.read_bytes()
    for line, attempt in (
            (r"l\.safetensors: the network must have a LoRA \(got none\)$",
             lambda: save_lora(path, lora_free())),
            (r"to_q.lora_B.weight must be finite \(got nan\)$",
             lambda: save_lora(path, spoiled(model, float("nan"))))):
        with pytest.raises(InputError, match=line):
            attempt()
        assert path.read_bytes() == before


def spoiled(model: MMDiT, value: float) -> MMDiT:
    model.get_submodule(QKV).lora_b.data[5, 1] = value
    return model


def merged_by_hand(model: MMDiT, *terms: tuple[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a network with these products added, in float64."""
    weights = {name: weight.double() for name, weight in model.state_dict().items()}
    for name, product in terms:
        weights[f"{name}.weight"] = weights[f"{name}.weight"] + product.view_as(
            weights[f"{name}.weight"])
    return weights


def check_merged(files: list[str], *terms: tuple[str, Tensor], **changes) -> None:
    model = tiny("dual", torch.float32, **changes)
    expected = merged_by_hand(model, *terms)
    lora_files.merge(model, lora_files.read_flags(files))
    for name, weight in model.state_dict().items():
        assert weight.equal(expected[name].float()), name


def text_encoders() -> dict[str, Tensor]:
    module = "text_model_encoder_layers_0_self_attn_q_proj"
    names = (f"lora_te1_{module}", f"lora_te2_{module}", "lora_te3_encoder_block_0_layer_0_k")
    tensors = {f"{names[0]}.alpha": torch.tensor(1.0), f"{names[0]}.dora_scale": A}
    for name in names:
        tensors |= pair(name, A, B, ("lora_down", "lora_up"))
    return tensors


def patch_matrices(seed: int = 7) -> tuple[Tensor, Tensor]:
    g = rng(seed)
    return torch.randn(2, 4, 2, 2, generator=g), torch.randn(128, 2, 1, 1, generator=g)


WRITERS = {   # name of a layer's module by each program; matrices, alpha and its place
    "kohya": ("lora_unet_joint_blocks_1_x_block_mlp_fc1", "du", "lora_unet_x_embedder_proj"),
    "OneTrainer": ("lora_transformer_transformer_blocks_1_ff_net_0_proj", "du",
                   "lora_transformer_pos_embed_proj"),
    "OneTrainer, original": ("transformer.joint_blocks.1.x_block.mlp.fc1", "du",
                             "transformer.x_embedder.proj"),
    "diffusers": ("transformer.transformer_blocks.1.ff.net.0.proj", "AB",
                  "transformer.pos_embed.proj"),
    "PEFT": ("base_model.model.transformer_blocks.1.ff.net.0.proj", "AB",
             "base_model.model.pos_embed.proj"),
    "LyCORIS": ("lycoris_transformer_blocks_1_ff_net_0_proj", "du", "lycoris_pos_embed_proj")}


@pytest.mark.parametrize("writer", WRITERS)
def test_loras_of_each_program_are_merged_with_their_patch_convolution(tmp_path, capsys, writer):
    module, ends, patches = WRITERS[writer]
    ends = {"AB": ("lora_A", "lora_B"), "du": ("lora_down", "lora_up")}[ends]
    (a, b), (pa, pb) = matrices(512, 128, 2, 1), patch_matrices()
    tensors = pair(module, a, b, ends) | pair(patches, pa, pb, ends) | text_encoders()
    scale, path = 1.0, tmp_path / "C:\\style.safetensors"
    if ends[0] == "lora_down":
        tensors |= {f"{name}.alpha": torch.tensor(0.5) for name in (module, patches)}
        scale = 0.25
    write(path, tensors)
    small = scale * (b.double() @ a.double())
    patch = scale * torch.einsum("drxy,rcpq->dcpq", pb.double(), pa.double())
    layers = "joint_blocks.1.x_block.mlp.fc1", "x_embedder.proj"
    check_merged([str(path)], (layers[0], small), (layers[1], patch))
    assert capsys.readouterr().out == f"note: {path}: 8 tensors of text encoders are left out\n"
    check_merged([f"{path}:0.5", f"{path}:-2"], (layers[0], -1.5 * small),
                 (layers[1], -1.5 * patch))


def test_onetrainer_and_peft_say_alpha_in_their_own_way(tmp_path):
    """OneTrainer numbers q, k and v of the original names; PEFT writes a file of its own."""
    three = [matrices(128, 128, 2, 5 + i) for i in range(3)]
    tensors = {key: t for i, ab in enumerate(three) for key, t in pair(
        f"transformer.joint_blocks.0.x_block.attn.qkv.{i}", *ab, ("lora_down", "lora_up")).items()}
    check_merged([str(write(tmp_path / "l.safetensors", tensors))],
                 (QKV, torch.cat([b.double() @ a.double() for a, b in three])))
    path = write(tmp_path / "adapter_model.safetensors", pair(f"base_model.model.{OUT[12:]}", A, B))
    (tmp_path / "adapter_config.json").write_text(json.dumps(
        {"r": 2, "lora_alpha": 8, "alpha_pattern": {}, "use_rslora": False}))
    check_merged([str(path)],
                 ("joint_blocks.0.x_block.attn.proj", 4 * (B.double() @ A.double())))


@pytest.mark.parametrize("name", ["a:b.safetensors", "C:\\x\\y", "style:2", ":", "x:", "a b:1e",
                                  "é:½", "nan"])
def test_a_colon_in_a_name_is_no_weight(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / name, pair(OUT, A, B))
    for flag, weight in ((name, 1), (f"{name}:0.5", 0.5), (f"./{name}:-1e-2", -0.01)):
        (path, found, layers), = lora_files.read_flags([flag])
        assert (path, found) == (Path(flag.rpartition(":")[0] if weight != 1 else name), weight)


@pytest.mark.parametrize("flag, message", [
    ("nowhere.safetensors", r"(got 'nowhere.safetensors')"),
    ("l.safetensors:strong", "must be FILE or FILE:WEIGHT, an existing file and a number (got "
     "'l.safetensors:strong')"),
    ("l.safetensors:", "(got 'l.safetensors:')"),
    ("l.safetensors:1:2", "(got 'l.safetensors:1:2')"),
    ("l.safetensors:nan", "l.safetensors: the weight must be finite (got nan)"),
    ("l.safetensors:-inf", "l.safetensors: the weight must be finite (got -inf)"),
    ("l.safetensors:1e999", "l.safetensors: the weight must be finite (got 1e999)"),
    (".", "(got '.')"), ("", "(got '')"), (":1", "(got ':1')"), (300 * "x", "(got 'xxx"),
    ("text.txt", "text.txt: not a complete safetensors file"),
    ("wide.safetensors", "wide.safetensors must be of this network, 3 blocks of width 128, whose "
     "joint_blocks.1.x_block.attn.proj has size [128, 128] (got [256, 256])"),
    ("deep.safetensors", "deep.safetensors must be of this network, 3 blocks of width 128, whose "
     "joint_blocks.3.x_block.attn.proj has size [] (got [128, 128])"),
    ("norm.safetensors", "norm.safetensors must be of this network"),
    ("flux.safetensors", "flux.safetensors must hold lora_A"),
    ("dora.safetensors", "dora.safetensors must be a plain LoRA of matrices A and B (got DoRA: "),
    ("l.safetensors:1e39", "joint_blocks.0.x_block.attn.proj with the LoRA added must be finite in "
     "torch.float32 (got NaN or inf)")])
def test_a_flag_that_cannot_be_used_is_named(tmp_path, monkeypatch, flag, message):
    monkeypatch.chdir(tmp_path)
    wide, name = matrices(256, 256, 2, 1), "diffusion_model.joint_blocks.{}.x_block.attn.proj"
    flux = "transformer.single_transformer_blocks.0.attn.to_q"
    (tmp_path / "text.txt").write_text("no tensors")
    for file, tensors in {
            "l": pair(OUT, A, B), "wide": pair(name.format(1), *wide),
            "deep": pair(name.format(3), A, B), "flux": pair(flux, A, B),
            "norm": pair("transformer.transformer_blocks.0.attn.norm_q", A[:, :1], B[:64]),
            "dora": pair(OUT, A, B) | {f"{OUT}.dora_scale": A}}.items():
        write(tmp_path / f"{file}.safetensors", tensors)
    with pytest.raises(InputError) as error:
        lora_files.merge(tiny("qk_norm", torch.float32), lora_files.read_flags([flag]))
    text = str(error.value)
    assert text.startswith("--lora ") and message in text and "\n" not in text


@pytest.mark.parametrize("kind, key, shape", [
    ("DoRA", "lora_magnitude_vector.weight", (128,)), ("DoRA", "dora_scale", (128, 1)),
    ("LoKr", "lokr_w1", (4, 4)), ("LoKr", "lokr_w2_a", (4, 2)), ("LoHa", "hada_w1_a", (4, 2)),
    ("OFT", "oft_blocks", (2, 4, 4)), ("OFT", "oft_R.weight", (2, 6)), ("OFT", "boft_R", (2, 6))])
def test_what_is_no_plain_lora_is_refused_by_its_name(tmp_path, kind, key, shape):
    path = write(tmp_path / "l.safetensors", pair(OUT, A, B) | {f"{OUT}.{key}": torch.ones(shape)})
    with pytest.raises(InputError) as error:
        lora_files.load(path)
    assert str(error.value) == (f"{path} must be a plain LoRA of matrices A and B (got {kind}: "
                                f"{OUT}.{key})")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("key", ["lora_down.weight", "lora_up.weight", "alpha"])
def test_nan_and_inf_are_refused_with_the_tensors_name(tmp_path, key, value):
    tensors = pair(OUT, A, B, ("lora_down", "lora_up")) | {f"{OUT}.alpha": torch.tensor(1.0)}
    tensors[f"{OUT}.{key}"] = tensors[f"{OUT}.{key}"].clone()
    tensors[f"{OUT}.{key}"].view(-1)[-1] = value
    path = write(tmp_path / "l.safetensors", tensors)
    with pytest.raises(InputError) as error:
        lora_files.load(path)
    assert str(error.value) == f"{path}: {OUT}.{key} must be finite (got NaN or inf)"


@pytest.mark.parametrize("a, b, alpha", [
    (torch.tensor(1.0), B, None), (A, torch.tensor(1.0), None), (A[:0], B[:, :0], None),
    (A[0], B, None), (A.to(torch.float8_e4m3fn), B, None), (A.to(torch.int32), B, None),
    (A, B, torch.ones(0)), (A[None, None], B[..., None, None], None)])
def test_matrices_of_another_form_are_one_line(tmp_path, a, b, alpha):
    tensors = pair(OUT, a, b) | ({} if alpha is None else {f"{OUT}.alpha": alpha})
    path = write(tmp_path / "l.safetensors", tensors)
    with pytest.raises(InputError) as error:
        lora_files.load(path)
    assert f"{path}: {OUT}" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("about", [
    {"alpha_pattern": {"(a+)+$": 1}}, {"alpha_pattern": {"(.*)*x": 2, "to_q": 1}},
    {"alpha_pattern": {"to_q": float("nan")}}, {"lora_alpha": float("inf")}, {"lora_alpha": [1]},
    {"lora_alpha": 10 ** 400}, [], 5, None, {"alpha_pattern": [1]}, "DEEP"])
def test_a_header_that_is_not_as_diffusers_writes_it_is_one_line(tmp_path, about):
    text = json.dumps(about) if about != "DEEP" else 10 ** 5 * "["
    path = tmp_path / "l.safetensors"
    save_file(pair(OUT, A, B), path, {"lora_adapter_metadata": text})
    start = time.perf_counter()
    with pytest.raises(InputError) as error:
        lora_files.load(path)
    assert f"{path}: lora_adapter_metadata must be as diffusers writes it" in str(error.value)
    assert "\n" not in str(error.value) and time.perf_counter() - start < 2


# diffusers itself

@pytest.mark.parametrize("variant", sd3.VARIANTS)
def test_diffusers_network_with_the_files_products_is_ours(tmp_path, variant):
    diffusers = pytest.importorskip("diffusers")
    theirs = sd3.draw(sd3.transformer(variant), 1)
    theirs.save_pretrained(tmp_path / "t")
    model = load_mmdit(tmp_path / "t", kernels.load("torch"))
    lora.add(model, RANK, ALPHA, ("*",), rng(2))
    save_lora(tmp_path / "l.safetensors", drawn(model))
    held = diffusers.StableDiffusion3Pipeline.lora_state_dict(str(tmp_path),
                                                              weight_name="l.safetensors")
    assert all("lora" in key for key in held)                  # or its loader refuses the file
    weights = theirs.state_dict()
    for key in [key for key in held if key.endswith(".lora_A.weight")]:
        module = key.removeprefix("transformer.").removesuffix(".lora_A.weight")
        weights[f"{module}.weight"] += held.pop(key.replace("_A", "_B")) @ held.pop(key)
    assert not held
    compare(theirs, model)
    lora.merge(model)
    compare(theirs, model)


def compare(theirs, model: MMDiT) -> None:
    g = rng(2)
    x, context, pooled = (torch.randn(size, generator=g) for size in (
        (2, 16, 8, 14), (2, 5, sd3.JOINT), (2, sd3.POOLED)))
    sigma = torch.tensor([0.7312, 0.1234])
    with torch.no_grad():
        expected = theirs(hidden_states=x, encoder_hidden_states=context, pooled_projections=pooled,
                          timestep=1000 * sigma, return_dict=False)[0]
        assert_close("v", model(x, sigma, context, pooled), expected, 1e-5)


@pytest.mark.parametrize("variant", sd3.VARIANTS)
def test_diffusers_loads_our_file_and_we_load_its_own(tmp_path, variant):
    pytest.importorskip("diffusers")
    peft = pytest.importorskip("peft")
    theirs = sd3.draw(sd3.transformer(variant), 1)
    theirs.save_pretrained(tmp_path / "t")
    model = load_mmdit(tmp_path / "t", kernels.load("torch"))
    compare(theirs, model)
    lora.add(model, RANK, ALPHA, ("*",), rng(2))
    save_lora(tmp_path / "l.safetensors", drawn(model))
    theirs.load_lora_adapter(str(tmp_path / "l.safetensors"), prefix="transformer")
    compare(theirs, model)
    theirs.delete_adapters("default_0")

    config = peft.LoraConfig(r=3, lora_alpha=5, alpha_pattern={"attn.to_k": 2.0},
                             init_lora_weights=False, target_modules="to_q to_k add_v_proj "
                             "to_out.0 norm_out.linear net.2".split())
    theirs.add_adapter(config, "own")
    sd3.draw(theirs, 4)
    theirs.save_lora_adapter(tmp_path / "own", adapter_name="own")
    base = {k.replace(".base_layer", ""): t for k, t in theirs.state_dict().items() if ".lora_"
            not in k}
    model = load_mmdit(write(tmp_path / "base.safetensors", base), kernels.load("torch"))
    loaded = lora_files.load(tmp_path / "own" / "pytorch_lora_weights.safetensors")
    lora.apply(model, loaded)
    compare(theirs, model)


@pytest.mark.parametrize("several", [False, True])
def test_a_pipeline_with_our_file_is_the_merged_network(tmp_path, several):
    """load_lora_weights says nothing of a file that it does not understand. It takes alpha from the
    header."""
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    folder = sd3.make_folder(tmp_path / "base", "dual")
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(folder)
    model = load_mmdit(folder, kernels.load("torch"))
    compare(pipe.transformer, model)
    lora.add(model, RANK, ALPHA, lora.ALL, rng(2))
    made = factors(drawn(model))
    if several:      # one layer of another rank
        f = made[f"{QKV[:-3]}proj"]
        made[f"{QKV[:-3]}proj"] = f._replace(a=f.a[:3], b=f.b[:, :3])
    lora_files.save(tmp_path / "l.safetensors", made, model.config)
    pipe.load_lora_weights(str(tmp_path), weight_name="l.safetensors")
    assert pipe.get_list_adapters() == {"transformer": ["default_0"]}
    merged = load_mmdit(folder, kernels.load("torch"))
    lora_files.merge(merged, lora_files.read_flags([str(tmp_path / "l.safetensors")]))
    compare(pipe.transformer, merged)
    expected = load_mmdit(folder, kernels.load("torch"))
    lora.apply(expected, made)
    compare(pipe.transformer, expected)
    pipe.set_adapters("default_0", 0.25)
    merged = load_mmdit(folder, kernels.load("torch"))
    lora_files.merge(merged, lora_files.read_flags([f"{tmp_path / 'l.safetensors'}:0.25"]))
    compare(pipe.transformer, merged)


# two processes

HALF = {"bf16 base": dict(base="bfloat16", compute="bfloat16"),
        "fp32 base in bf16": dict(base="float32", compute="bfloat16")}
CASES = {"float64": dict(base="float64", compute="float64"), **HALF}


def play(case: dict, folder: Path) -> dict[str, Tensor]:
    """Some steps of a network built on meta; what it became, was written and merged to."""
    rank, world = parallel.ranks()
    base, compute = (getattr(torch, case[key]) for key in ("base", "compute"))
    mesh, pair = parallel.mesh(CPU, 1, 60), []
    whole = tiny("dual", base).state_dict()
    for keep in ("selective", "none"):                                     # the student and its EMA
        with torch.device("meta"):
            model = MMDiT(MMDiTConfig(**TINY, **VARIANTS["dual"]), kernels.load("torch"),
                          compute).to(base)
            # 3 rows: 2 and 1 in two processes
            new = lora.add(model, 3, ALPHA, lora.ALL, rng(2))
        model.requires_grad_(False) if keep == "none" else None
        g = rng(3)
        new = {name: t + 0.2 * torch.randn(t.shape, generator=g) for name, t in new.items()}
        pair.append(parallel.load(parallel.shard(parallel.checkpointed(model, keep), mesh), whole
                                  | new, CPU))
    model, ema = pair
    trains = lora.parameters(model)
    optimizer = AdamW(model, 1e-2, 0.5, 0.9, ema=ema)
    out = {}
    for it in range(2):
        inputs = [t[rank * 4 // world:(rank + 1) * 4 // world] for t
                  in tiny_inputs(4, seed=20 + it, dtype=torch.promote_types(compute,
                                                                            torch.float32))]
        model(*inputs).square().mean().backward()
        with torch.no_grad():
            ema(*inputs)
        grads = {f"grad.{it}.{k}": p.grad for k, p in trains.items()}
        out |= {k: t.clone() for k, t in parallel.full(grads) if t is not None}
        out[f"norm.{it}"] = optimizer.step(0.7).total.clone()
    made = factors(ema)                                                # all processes gather them
    if rank == 0:
        lora_files.save(folder / f"lora{world}.safetensors", made, ema.config)
    # each process the same sample
    with torch.no_grad():
        out["trained.v"] = model(*tiny_inputs(seed=9,
                                              dtype=torch.promote_types(compute, torch.float32)))
    out |= {f"trained.{k}": t.clone() for k, t in parallel.full(model.state_dict()) if t
            is not None}
    loras = factors(model)                                              # empty in other processes
    out |= {f"merged.{k}": t.clone() for k, t in lora.merged(whole, loras)} if rank == 0 else {}
    return out if rank == 0 else {}


def worker(name: str, folder: Path) -> None:
    parallel.start(CPU, 300)
    out = play(CASES[name], folder)
    if parallel.ranks()[0] == 0:
        save_file(out, folder / "out.safetensors")
    parallel.finish()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["float64", *HALF])
def test_two_processes_equal_one(tmp_path, name):
    """In bf16 the gradients of the first step are compared, before AdamW divides by them: some
    roundings of 2^-9 through three blocks, and norms whose weights FSDP rounds too."""
    run_ranks(2, lambda: worker(name, tmp_path), tmp_path)
    got, expected = load_file(tmp_path / "out.safetensors"), play(CASES[name], tmp_path)
    base = tiny("dual", getattr(torch, CASES[name]["base"])).state_dict()
    assert got.keys() == expected.keys() and len(got) > 2 * len(base)
    for key, value in expected.items():
        kind, rest = key.split(".", 1)
        if kind == "trained" and rest in base:
            assert got[key].equal(base[rest]), key
        elif name == "float64":
            assert_close(key, got[key], value)
        elif key.startswith(("grad.0", "norm.0")):
            assert_close(key, got[key], value, 0.1)
        else:
            assert got[key].dtype == value.dtype, key
    assert base.keys() == {key.removeprefix("merged.") for key in got if key.startswith("merged.")}
    assert not got[f"merged.{QKV}.weight"].equal(base[f"{QKV}.weight"])
    if name == "float64":
        one, two = (load_file(tmp_path / f"lora{world}.safetensors") for world in (1, 2))
        assert one.keys() == two.keys()
        for key in one:
            assert_close(key, two[key], one[key])
