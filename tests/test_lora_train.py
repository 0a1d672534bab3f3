"""LoRA in train.py: what trains, what is kept, written and planned; student, shrunk student and
teacher."""
import json
from pathlib import Path

import pytest
import torch
from conftest import assert_close
from test_cost import allocator_peak
from test_report import check_report
from test_torchrun import close, processes, same_log
from test_train import (QUIET, TINY, assert_same, load_state, log_of, main, rows_of, save_teacher,
                        weights)
from torch import Tensor

import kernels
from ladd.build import (batching_of, compute_of, heads_of, networks_on_meta, plan_of, student_lora,
                        text_tokens)
from ladd.config import Config, parse_config
from ladd.core import lora
from ladd.core.mmdit import MMDiT, shrunk, widened
from ladd.data.shards import Latents
from ladd.engine import networks, state
from ladd.engine.networks import LoraConfig
from ladd.engine.step import Networks, Optim, ladd_step, make_networks, step_parts
from ladd.sd3 import lora_files
from ladd.sd3.checkpoint import load_metadata, load_mmdit

RANK = 4
REUSE = "--teacher t.safetensors --data runs/whole/data"
BASE = "--base t.safetensors --set qk_norm=on --steps 0"


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with a teacher, and runs/whole, whose student is a LoRA on it, with a report."""
    folder = tmp_path_factory.mktemp("lora")
    save_teacher(folder)
    main(folder, f"--name whole --teacher t.safetensors --lora {RANK} {QUIET}", report=True)
    return folder


@pytest.fixture(scope="module")
def whole(home) -> Path:
    return home / "runs" / "whole" / "checkpoints"


def teacher_of(home: Path, depth: int = 2) -> dict[str, Tensor]:
    """The weights of the teacher, or of as many of its blocks."""
    return shrunk(load_mmdit(home / "t.safetensors", kernels.load("torch")), depth)[1]


def assert_sum(base: dict[str, Tensor], folder: Path, name: str, but: tuple[str, ...] = ()) -> None:
    """folder/name.safetensors is `base` and, bit for bit, the delta of name_lora.safetensors, which
    is not nothing; of `but` only that they moved."""
    found, made = lora_files.load(
        folder / f"{name}_lora.safetensors"), weights(folder / f"{name}.safetensors")
    assert made.keys() == base.keys() and found and all(f.b.abs().max() > 0 for f in found.values())
    for key, w in base.items():
        f = found.get(key.removesuffix(".weight"))
        w = w if f is None else (w.double() + f.scale * f.b.double() @ f.a.double()).float()
        assert made[key].equal(w) != (key in but), key


# a step

def made(config: Config, base: MMDiT) -> Networks:
    return make_networks(base, compute_of(config), config.group(Optim),
                         heads_of(config, base.config), adapter=student_lora(config))


def setting(flags: str) -> tuple[Config, Networks, list]:
    """Options, the networks, and the micro-batches of a step."""
    line = f"{TINY} --kernels torch --set qk_norm=on --set heads_first=0 {flags}"
    config = parse_config(line.split())
    torch.manual_seed(0)
    base = MMDiT(config.model, kernels.load("torch"))
    for p in base.parameters():
        torch.nn.init.normal_(p, std=0.05)
    latents = of_noise(config, (4, 8))
    return config, made(config, base), step_parts(config.ladd, batching_of(config), latents, 0)


@pytest.mark.parametrize("precision, targets", [("fp32", "all"), ("bf16", "attention,mlp.fc1")])
def test_a_step_moves_the_matrices_and_nothing_else(precision, targets):
    """One copy of what is frozen serves three networks, in the compute dtype; the rest is fp32."""
    config, p, parts = setting(
        f"--precision {precision} --lora {RANK} --lora-targets {targets} --ema .9")
    frozen = {k: t.clone() for k, t in p.teacher.state_dict().items()}
    before = {k: t.detach().clone() for k, t in state.collect(p.to_checkpoint()).items()}
    for _ in range(2):                                                # A moves once B is not zero
        ladd_step(config.ladd, p, parts, config.ema, True)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    student, ema = p.student.state_dict(), p.ema.state_dict()
    for key, t in p.teacher.state_dict().items():
        assert t.equal(frozen[key]) and t.dtype == dtype
        assert t.data_ptr() == student[key].data_ptr() == ema[key].data_ptr(), key
    names = lora.parameters(p.student).keys()
    assert names == student.keys() - frozen.keys() == ema.keys() - frozen.keys()
    assert names == networks.trainable(p.student).keys()
    assert {id(q) for q in p.opt_g.params.values()} == {
        id(q) for q in lora.parameters(p.student).values()}
    layers = lora.of_kind(p.student, lora.Lora).values()
    assert {(layer.alpha, layer.scale) for layer in layers} == {(RANK, 1)}
    for name in names:
        now, mean, start = student[name], ema[name], before[f"student.{name}"]
        assert now.dtype == mean.dtype == torch.float32 and before[f"ema.{name}"].equal(start)
        # the last text tokens reach no head
        if "blocks.1.context" not in name:
            assert not now.equal(
                start) and (mean - start).abs().max() < 0.5 * (now - start).abs().max(), name
        assert name.endswith("_a") or start.eq(0).all()


@pytest.mark.parametrize("flags", ["", f"--lora {RANK}"])
def test_the_average_follows_what_trains_and_keeps_no_graph(flags):
    config, p, parts = setting(f"--ema .75 {flags}")
    before = {k: t.detach().clone() for k, t in p.ema.named_parameters()}
    names = networks.trainable(p.student)
    ladd_step(config.ladd, p, parts, config.ema, True)
    for k, t in p.ema.named_parameters():
        assert not t.requires_grad and t.grad_fn is None
        weight = 0.25 * (k in names)
        assert_close(k, t, torch.lerp(before[k], p.student.get_parameter(k).detach(), weight))


def test_what_is_seen_is_what_is_written(home, tmp_path):
    """Of a network in bf16 the sum is made with the weights it came from, not with its own
    roundings."""
    base = load_mmdit(home / "t.safetensors", kernels.load("torch"))
    compute = compute_of(parse_config("--device cpu --precision bf16".split()))
    model = networks.network(base.config, base.state_dict(), compute, torch.float32, True,
                             adapter=LoraConfig(RANK, ("all",), 0))
    assert model.x_embedder.proj.weight.dtype == torch.bfloat16
    with torch.no_grad():
        for i, p in enumerate(lora.parameters(model).values()):
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    networks.save_network(model, base.state_dict(), tmp_path / "n.safetensors", {}, "")
    eval_model = networks.inference(model, compute)
    networks.refresh(eval_model, model, base.state_dict())
    written = weights(tmp_path / "n.safetensors")
    assert all(t.equal(written[k].bfloat16()) for k, t in eval_model.state_dict().items())
    assert_sum(base.state_dict(), tmp_path, "n")


# a run

def test_a_run_writes_the_sum_and_the_lora(home, whole):
    assert_sum(teacher_of(home), whole, "student")
    about = load_metadata(whole / "student_lora.safetensors")
    assert (about["base"], about["levels"]) == (
        "t.safetensors", load_metadata(whole / "student.safetensors")["levels"])
    peft = json.loads(about["lora_adapter_metadata"])
    assert (peft["transformer.r"], peft["transformer.lora_alpha"]) == (4, 4)
    names = weights(whole / "student_lora.safetensors").keys()
    assert all(name.startswith("transformer.transformer_blocks.") for name in names)
    check_report(json.loads((whole.parent / "report.json").read_text()))
    fds = {(row["model"], row["steps"]): row["fd"] for row in rows_of(whole.parent)}
    assert fds["student", 1] != fds["untrained", 1] and len(names) == 2 * (17 + 4 * 2)


def test_a_state_holds_only_what_trains(whole):
    """12 bytes a number of the LoRA: weights, EMA, a moment; and the count of steps."""
    _, state, _ = load_state(whole / "distill")
    lora_names = {k for k in state if k.startswith(("student.", "ema."))
                  or k.endswith(("_sq", "_avg"))}
    assert all(".lora_" in k for k in lora_names if not k.startswith("opt_d."))
    size = {end: sum(t.nbytes for k, t in state.items() if k.startswith("student.")
                     and k.endswith(end)) for end in ("lora_a", "lora_b")}
    n = sum(t.numel() for f in lora_files.load(whole / "student_lora.safetensors").values() for t
            in f[:2])
    assert sum(size.values()) == 4 * n
    ours = sum(t.nbytes for k, t in state.items() if not k.startswith(("heads.", "opt_d.")))
    assert ours == 12 * n + 8
    base = sum(t.nbytes for t in weights(whole / "student.safetensors").values())
    assert ours < base / 3


def test_a_run_that_is_resumed_equals_one_that_is_not(home, whole):
    straight, run = home / "runs/whole", home / "runs/resumed"
    flags = f"{REUSE} --lora {RANK} {QUIET}"
    main(home, f"--name resumed {flags} --set stop_after=3")
    main(home, f"--name resumed {flags}")
    assert_same(straight, run, r"(step_000006/part-.*|student|student_lora)\.safetensors$")
    assert log_of(straight) == log_of(run)


@pytest.mark.parametrize("name, flags, depth", [
    ("shrunk", "--student-depth 1 --lora 4 --lora-targets attention", 1),
    ("best", "--lora 4 --eval-every 3", 2)])
def test_other_students(home, whole, name, flags, depth):
    """Of fewer blocks, and the best of some: with its LoRA beside the last's."""
    main(home, f"--name {name} {REUSE} {QUIET} {flags}")
    folder = home / "runs" / name / "checkpoints"
    assert_sum(teacher_of(home, depth), folder, "student" if name != "best" else "last")
    left = sorted(path.name for path in folder.glob("*.safetensors"))
    assert left[-2:] == ["student.safetensors", "student_lora.safetensors"]
    assert left[:-2] == ["last.safetensors", "last_lora.safetensors"] * (name == "best")
    found, about = lora_files.load(folder / "student_lora.safetensors"), load_metadata(
        folder / "student_lora.safetensors")
    assert {len(f.a) for f in found.values()} == {int(flags.split("--lora ")[1][0])}
    if name == "shrunk":
        assert {f.alpha for f in found.values()} == {4} and about["base"] == (
            "t.safetensors, 1 of its blocks taken evenly")
        assert {key.split(".")[-1] for key in found} == {"qkv", "proj"}


@pytest.mark.parametrize("task", ["text", "edit", "inpaint"])
def test_a_teacher_starts_from_a_base_that_stays(home, task):
    """What edits or inpaints also trains what reads the image, whose weights start at zero."""
    flags = f"{BASE} --teacher-lora 4 --task {task}"
    main(home, f"--name t-{task} {flags}")
    folder, base = home / "runs" / f"t-{task}" / "checkpoints", load_mmdit(home / "t.safetensors")
    wide = widened(base, {"text": 16, "edit": 32, "inpaint": 33}[task])[1]
    also = ("x_embedder.proj.weight", "x_embedder.proj.bias") * (task != "text")
    assert_sum(wide, folder, "teacher", also)
    new = weights(folder / "teacher.safetensors")["x_embedder.proj.weight"][:, 16:]
    assert new.shape[1] == wide["x_embedder.proj.weight"].shape[1] - 16
    # each channel of the image
    assert task == "text" or new.flatten(2).abs().amax((0, 2)).min() > 0
    if task == "edit":
        for more in ("--set stop_after=4", ""):
            main(home, f"--name again {flags} {more}")
        assert_same(home / "runs/t-edit", home / "runs/again",
                    r"(step_000006/part-.*|teacher|r_lora)\.safe")
    names = {k.removeprefix("model.") for k in load_state(folder / "teacher")[1]
             if k.startswith("model.")}
    assert names - set(also) == {f"{k}.lora_{part}" for k
                                 in lora_files.load(folder / "teacher_lora.safetensors") for part
                                 in "ab"}
    assert load_metadata(folder / "teacher_lora.safetensors")["base"].startswith("t.safetensors")


# the plan

@pytest.mark.parametrize("flags", ["--lora 8", pytest.param(
    "--lora 8 --recompute full", marks=pytest.mark.slow)])
def test_the_plan_is_the_allocators_peak(flags):
    """From the making of the networks on, to 10 %; the frozen weights count once."""
    line = ("--device cpu --precision fp32 --batch 4 --set depth=3 --heads-repeats 1 "
            f"--set text_dim=64 {flags}")
    config = parse_config([*line.split(), "--sizes", "96x96"])
    torch.manual_seed(0)
    base, compute = MMDiT(config.model, kernels.load("torch")), compute_of(config)
    latents, batching = of_noise(config, (12, 12)), batching_of(config)

    def run() -> None:
        p = made(config, base)
        for i in range(2):
            parts = step_parts(config.ladd, batching, latents, i)
            ladd_step(config.ladd, p, parts, config.ema, True)

    planned = plan_of(config, networks_on_meta(config, base.config, compute.dtype), compute, 1)
    found, plan = allocator_peak(run), planned()
    # the gradients of the heads are always counted
    gone = plan["heads (weights, gradients, moment)"] / 3
    assert plan["sum"] - gone == pytest.approx(found, rel=0.1)
    kept = plan["student (weights, moment, EMA)"]
    numbers = sum(t.numel() for t in networks.trainable(made(config, base).student).values())
    assert kept == 12 * numbers < plan["teacher (frozen)"]


def of_noise(config: Config, hw: tuple[int, int]) -> Latents:
    n, tokens = 12, text_tokens(config)
    text = (torch.randn(n, tokens, config.text_dim).bfloat16(),
            torch.randn(n, config.text_dim).bfloat16())
    return Latents([str(i) for i in range(n)], *text, torch.arange(n)[:, None],
                   (text[0][0], text[1][0]), {hw: (torch.randn(n, 16, *hw), torch.arange(n))}, {})


@pytest.mark.slow
def test_the_dry_run_knows_it(home):
    said = main(home, "--dry-run --tflops 1 --lora 4")
    assert "student 314,048 (19,456 in its LoRA)" in said


# two processes

@pytest.mark.slow
def test_two_processes_train_as_one(home, whole):
    layouts = {"ddp": "--shard none", "fsdp": "--shard all --recompute selective"}
    edit = f"{BASE} --teacher-lora 4 --task edit"
    main(home, f"--name one {REUSE} --lora 3 {QUIET}")
    main(home, f"--name one-edit {edit}")
    processes(home, 2, *(f"--name {name} {REUSE} --lora 3 {QUIET} {flags}"
                         for name, flags in layouts.items()), f"--name two-edit {edit}")
    for name in layouts:
        run = home / "runs" / name
        same_log(home / "runs/one", run, 2e-3)
        for net in ("student.", "ema.", "heads."):
            close(home / "runs/one", run, "distill", net)
        assert_sum(teacher_of(home), run / "checkpoints", "student")
    close(home / "runs/one-edit", home / "runs/two-edit", "teacher", "model.")
    base = load_mmdit(home / "t.safetensors")
    assert_sum(widened(base, 32)[1], home / "runs/two-edit/checkpoints", "teacher",
               ("x_embedder.proj.weight", "x_embedder.proj.bias"))
