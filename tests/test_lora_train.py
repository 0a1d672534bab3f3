"""LoRA in train.py: what trains, what is kept, written and planned; student, shrunk student and teacher."""
import json
from pathlib import Path

import pytest
import torch
from conftest import assert_close
from test_cost import allocator_peak
from test_step import setting
from test_torchrun import close, processes, same_log
from test_train import QUIET, assert_same, load_state, log_of, main, rows_of, save_teacher, weights
from torch import Tensor

import kernels
from ladd import lora, report, step
from ladd.checkpoint import load_metadata, load_mmdit
from ladd.config import parse_config
from ladd.data import Latents
from ladd.mmdit import MMDiT, shrunk, widened
from ladd.step import Layout, ladd_step, make_players

CPU, RANK = torch.device("cpu"), 4
REUSE = "--teacher t.safetensors --data runs/whole/data"
BASE = "--base t.safetensors --qk-norm --objective flow"


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
    """folder/name.safetensors is `base` and, bit for bit, the delta of name_lora.safetensors, which is not
    nothing; of `but` only that they moved."""
    found, made = lora.load(folder / f"{name}_lora.safetensors"), weights(folder / f"{name}.safetensors")
    assert made.keys() == base.keys() and found and all(f.b.abs().max() > 0 for f in found.values())
    for key, w in base.items():
        f = found.get(key.removesuffix(".weight"))
        w = w if f is None else (w.double() + f.scale * f.b.double() @ f.a.double()).float()
        assert made[key].equal(w) != (key in but), key


# a step

@pytest.mark.parametrize("precision, targets, alpha", [
    ("fp32", "all", 0), ("bf16", "attention,mlp.fc1", 3)])
def test_a_step_moves_the_matrices_and_nothing_else(precision, targets, alpha):
    """One copy of what is frozen serves three networks, in the compute dtype; the rest is fp32."""
    flags = f"--precision {precision} --lora {RANK} --lora-targets {targets} --lora-alpha {alpha} --ema .9"
    config, dc, p, parts = setting(flags)
    frozen = {k: t.clone() for k, t in p.teacher.state_dict().items()}
    before = {k: t.detach().clone() for k, t in p.tensors().items()}
    for _ in range(2):                                                # A moves once B is not zero
        ladd_step(config, dc, p, parts, True)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    student, ema = p.student.state_dict(), p.ema.state_dict()
    for key, t in p.teacher.state_dict().items():
        assert t.equal(frozen[key]) and t.dtype == dtype
        assert t.data_ptr() == student[key].data_ptr() == ema[key].data_ptr(), key
    names = lora.parameters(p.student).keys()
    assert names == student.keys() - frozen.keys() == ema.keys() - frozen.keys()
    assert names == step.trained(p.student).keys() and {id(q) for q in p.opt_g.param_groups[0]["params"]} == {
        id(q) for q in lora.parameters(p.student).values()}
    layers = lora.of_kind(p.student, lora.Lora).values()
    assert {layer.scale for layer in layers} == {(alpha or RANK) / RANK}
    for name in names:
        now, mean, start = student[name], ema[name], before[f"student.{name}"]
        assert now.dtype == mean.dtype == torch.float32 and before[f"ema.{name}"].equal(start)
        if "blocks.1.context" not in name:                            # the last text tokens reach no head
            assert not now.equal(start) and (mean - start).abs().max() < 0.5 * (now - start).abs().max(), name
        assert name.endswith("_a") or start.eq(0).all()


@pytest.mark.parametrize("flags", ["", f"--lora {RANK}"])
def test_the_average_follows_what_trains_and_keeps_no_graph(flags):
    config, dc, p, parts = setting(f"--ema .75 {flags}")
    before, names = {k: t.detach().clone() for k, t in p.ema.named_parameters()}, step.trained(p.student)
    ladd_step(config, dc, p, parts, True)
    for k, t in p.ema.named_parameters():
        assert not t.requires_grad and t.grad_fn is None
        assert_close(k, t, torch.lerp(before[k], p.student.get_parameter(k).detach(), 0.25 * (k in names)))


def test_what_is_seen_is_what_is_written(home, tmp_path):
    """Of a network in bf16 the sum is made with the weights it came from, not with its own roundings."""
    base = load_mmdit(home / "t.safetensors", kernels.load("torch"))
    config = parse_config(f"--preset tiny --device cpu --precision bf16 --lora {RANK}".split(), "tiny")
    model = step.network(base.config, base.state_dict(), config, Layout(CPU), torch.float32, True, rank=RANK)
    assert model.x_embedder.proj.weight.dtype == torch.bfloat16
    with torch.no_grad():
        for i, p in enumerate(lora.parameters(model).values()):
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    step.save_network(model, base.state_dict(), tmp_path / "n.safetensors", {}, "")
    viewer = step.inference(model, config, CPU)
    step.refresh(viewer, model, base.state_dict())
    written = weights(tmp_path / "n.safetensors")
    assert all(t.equal(written[k].bfloat16()) for k, t in viewer.state_dict().items())
    assert_sum(base.state_dict(), tmp_path, "n")


# a run

def test_a_run_writes_the_sum_and_the_lora(home, whole):
    assert_sum(teacher_of(home), whole, "student")
    about = load_metadata(whole / "student_lora.safetensors")
    assert (about["rank"], about["alpha"], about["base"], about["levels"]) == (
        "4", "4", "t.safetensors", load_metadata(whole / "student.safetensors")["levels"])
    names = weights(whole / "student_lora.safetensors").keys()
    assert all(name.startswith("lora_unet_joint_blocks_") for name in names)
    report.validate_report(json.loads((whole.parent / "report.json").read_text()))
    fds = {(row["model"], row["steps"]): row["fd"] for row in rows_of(whole.parent)}
    assert fds["student", 1] != fds["untrained", 1] and len(names) == 3 * 17


def test_a_state_holds_only_what_trains(whole):
    """16 bytes a number of the LoRA: weights, average, two moments; the frozen weights are nowhere in it."""
    _, state, _ = load_state(whole / "distill")
    lora_names = {k for k in state if k.startswith(("student.", "ema.")) or k.endswith(("_sq", "_avg"))}
    assert all(".lora_" in k for k in lora_names if not k.startswith("opt_d."))
    size = {end: sum(t.nbytes for k, t in state.items() if k.startswith("student.") and k.endswith(end))
            for end in ("lora_a", "lora_b")}
    n = sum(t.numel() for f in lora.load(whole / "student_lora.safetensors").values() for t in f[:2])
    assert sum(size.values()) == 4 * n
    ours = sum(t.nbytes for k, t in state.items() if not k.startswith(("heads.", "opt_d.")))
    count = sum(k.startswith("opt_g.") and k.endswith(".step") for k in state)
    assert 12 * n < ours <= 16 * n + 4 * count                        # what never moved has no moments
    base = sum(t.nbytes for t in weights(whole / "student.safetensors").values())
    assert ours < base / 3


def test_a_run_that_is_resumed_equals_one_that_is_not(home, whole):
    straight, run, flags = home / "runs/whole", home / "runs/resumed", f"{REUSE} --lora {RANK} {QUIET}"
    main(home, f"--name resumed {flags} --stop-after 3")
    main(home, f"--name resumed {flags}")
    assert_same(straight, run, r"(step_000006/part-.*|student|student_lora)\.safetensors$")
    assert log_of(straight) == log_of(run)


@pytest.mark.parametrize("name, flags, depth", [
    ("shrunk", "--student-depth 1 --lora 4 --lora-targets attention --lora-alpha 8", 1),
    ("lcm", "--objective lcm --lora 2 --checkpoint full", 2), ("best", "--lora 4 --eval-every 3", 2)])
def test_other_students(home, whole, name, flags, depth):
    """Of fewer blocks, by consistency, and the best of some: with its LoRA beside the last's."""
    main(home, f"--name {name} {REUSE} {QUIET} {flags}")
    folder = home / "runs" / name / "checkpoints"
    assert_sum(teacher_of(home, depth), folder, "student" if name != "best" else "last")
    left = sorted(path.name for path in folder.glob("*.safetensors"))
    assert left[-2:] == ["student.safetensors", "student_lora.safetensors"]
    assert left[:-2] == ["last.safetensors", "last_lora.safetensors"] * (name == "best")
    found, about = lora.load(folder / "student_lora.safetensors"), load_metadata(
        folder / "student_lora.safetensors")
    assert {len(f.a) for f in found.values()} == {int(flags.split("--lora ")[1][0])}
    if name == "shrunk":
        assert {f.alpha for f in found.values()} == {8} and about["base"] == (
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
    assert task == "text" or new.flatten(2).abs().amax((0, 2)).min() > 0       # each channel of the image
    if task == "edit":
        for more in ("--stop-after 4", ""):
            main(home, f"--name again {flags} {more}")
        assert_same(home / "runs/t-edit", home / "runs/again", r"(step_000006/part-.*|teacher|r_lora)\.safe")
    names = {k.removeprefix("model.") for k in load_state(folder / "teacher")[1] if k.startswith("model.")}
    assert names - set(also) == {f"{k}.lora_{part}" for k in lora.load(folder / "teacher_lora.safetensors")
                                 for part in "ab"}
    assert load_metadata(folder / "teacher_lora.safetensors")["base"].startswith("t.safetensors")


# the plan

@pytest.mark.parametrize("flags", ["--lora 8", pytest.param(
    "--lora 8 --checkpoint full", marks=pytest.mark.slow)])
def test_the_plan_is_the_allocators_peak(flags):
    """From the making of the networks on, to 0.5 %; the frozen weights count once."""
    line = f"--device cpu --precision fp32 --batch 4 --depth 3 --heads-steps 1 --text-dim 64 {flags}"
    config = parse_config([*line.split(), "--preset", "tiny", "--sizes", "96x96"], "tiny")
    torch.manual_seed(0)
    base = MMDiT(step.teacher_config(config), kernels.load("torch"))
    dc = step.distill_config(config)
    latents = of_noise(config, (12, 12))

    def run() -> None:
        p = make_players(config, base, Layout(CPU))
        for i in range(2):
            parts = step.step_parts(config, dc, latents, i, 0)
            ladd_step(config, dc, p, parts, True)

    found, plan = allocator_peak(run), step.memory_plan_of(config, base.config, CPU)()
    gone = plan["heads (weights, gradients, Adam)"] / 4            # their gradients, which it always counts
    assert plan["sum"] - gone == pytest.approx(found, rel=0.005)
    kept = plan["student (fp32 weights, Adam, average)"]
    assert kept == 16 * sum(t.numel() for t in step.trained(make_players(
        config, base, Layout(CPU)).student).values()) < plan["teacher (frozen)"]


def of_noise(config, hw: tuple[int, int]) -> Latents:
    n, tokens = 12, step.tokens_of(config)
    text = torch.randn(n, tokens, config.text_dim).bfloat16(), torch.randn(n, config.text_dim).bfloat16()
    return Latents([str(i) for i in range(n)], *text, torch.arange(n)[:, None], (text[0][0], text[1][0]),
                   {hw: (torch.randn(n, 16, *hw), torch.arange(n))}, {})


@pytest.mark.slow
def test_the_dry_run_knows_it(home):
    said = main(home, "--dry-run --tflops 1 --lora 4")
    assert "student 314,048 (19,456 in its LoRA)" in said


# two processes

@pytest.mark.slow
def test_two_processes_train_as_one(home, whole):
    layouts = {"ddp": "--parallel ddp", "fsdp": "--parallel fsdp --checkpoint selective --shard-teacher on"}
    edit = f"{BASE} --teacher-lora 4 --task edit"
    main(home, f"--name one {REUSE} --lora 3 {QUIET}")
    main(home, f"--name one-edit {edit}")
    done = processes(home, 2, *(f"--name {name} {REUSE} --lora 3 {QUIET} {flags}"
                                for name, flags in layouts.items()), f"--name two-edit {edit}")
    assert done.returncode == 0, done.stderr
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
