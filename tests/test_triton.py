"""The kernels in place: load's choice, one whole LADD step on them, compiled, checkpointed,
offline."""
import copy
import re
from types import SimpleNamespace

import pytest
import torch
from conftest import assert_close, randomise, rng
from torch import Tensor

import kernels
import train
from ladd import build
from ladd.cli import InputError
from ladd.core.discriminator import Discriminator, DiscriminatorConfig
from ladd.core.losses import (LaddConfig, Mismatched, draw, fake_pass, grid_of, head_inputs,
                              heads_loss, student_loss)
from ladd.core.mmdit import MMDiT, MMDiTConfig, Text
from ladd.engine.networks import pick_kernels
from ladd.engine.run import compute_dtype

pytest.importorskip("triton")

STEP = LaddConfig((1.0, 0.5), (0.5, 0.5), 0, 3.0, 0.0, 0.5, 0.1, 0.3)


# load

def test_load_takes_the_kernels():
    assert kernels.load("triton") == kernels.Kernels(kernels.attention.joint_attention,
                                                     kernels.modulation.modulate,
                                                     kernels.modulation.modulate2,
                                                     kernels.modulation.gate_modulate,
                                                     kernels.modulation.gate,
                                                     kernels.heads.discriminator_heads,
                                                     kernels.optimizer.adamw)


def seem(monkeypatch, name: str, major: int) -> None:
    """Make torch see a GPU of this name and compute capability, as is_bf16_supported reads it."""
    there = SimpleNamespace(name=name, major=major, minor=0)
    for function, value in (("is_available", True), ("current_device", 0),
                            ("get_device_name", name), ("get_device_properties", there),
                            ("get_device_capability", (major, 0)),
                            ("_check_bf16_tensor_supported", True)):            # emulated
        monkeypatch.setattr(torch.cuda, function, lambda *args, value=value: value)


@pytest.fixture
def gpu(monkeypatch):
    """A machine that seems to have an H100, whose kernels all pass their self-check."""
    seem(monkeypatch, "H100", 9)
    monkeypatch.setattr(kernels, "failures", lambda device, gluon=False: {})
    monkeypatch.setattr(kernels.attention, "INTERPRET", False)
    kernels.announce.cache_clear()


@pytest.mark.parametrize("cuda, capability, triton, interpret, auto, why, refused",
                         [(True, (9, 0), True, False, "triton", "H100", False),
                          (True, (8, 0), True, False, "triton", "H100", False),
                          (True, (7, 5), True, False, "torch", "H100 has compute capability 7.5 "
                           "and the kernels need 8.0", True),
                          (True, (9, 0), False, False, "torch", "triton is not installed", True),
                          (False, None, True, False, "torch", "no CUDA device was found", True),
                          (False, None, True, True, "torch", "no CUDA device was found", False),
                          (False, None, False, False, "torch", "no CUDA device was found", True)])
def test_which_path_is_taken_and_why_is_said_once(monkeypatch, capsys, gpu, cuda, capability,
                                                  triton, interpret, auto, why, refused):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(kernels.attention, "triton", object() if triton else None)
    monkeypatch.setattr(kernels.attention, "INTERPRET", interpret)
    found = [kernels.load() for _ in range(3)]
    assert capsys.readouterr().out == f"kernels: {auto} ({why})\n"
    name = "modulate" if auto == "triton" else "reference_modulate"
    assert all(k.modulate is getattr(kernels.modulation, name) for k in found)
    if refused:
        with pytest.raises(ValueError, match=f"'triton', but {why}"):
            kernels.load("triton")
    else:
        kernels.load("triton")
    assert capsys.readouterr().out == ""
    assert kernels.load("torch").gate is kernels.modulation.reference_gate


def test_the_reference_is_taken_for_a_kernel_that_fails(monkeypatch, capsys, gpu):
    wrong = "gate fails its self-check (output 0 is 2 and must be 1 within 0.05)"
    monkeypatch.setattr(kernels, "failures", lambda device, gluon=False: {"gate": wrong})
    found = [kernels.load() for _ in range(2)][0]
    assert capsys.readouterr().out == (f"kernels: triton (H100)\nkernels: {wrong}; "
                                       "the reference is used instead\n")
    plain = kernels.modulation.reference_gate
    ours = kernels.Kernels(*(getattr(kernels.HOMES[field], field) for field
                             in kernels.Kernels._fields))
    assert found == ours._replace(gate=plain)
    with pytest.raises(ValueError, match="^kernels: gate fails its self-check"):
        kernels.load("triton")
    with pytest.raises(InputError, match="^--kernels: gate fails its self-check"):
        pick_kernels("triton", "auto")
    assert kernels.load("torch").gate is plain


def refuse(error: BaseException):
    def run(*args):
        raise error
    return run


BROKEN = {"value": (lambda x, y, g: kernels.modulation.reference_gate(x, y, 1.2 * g),
                    "output 0 is .* must be .*"), "gradient": (lambda x, y,
                                                               g: kernels.modulation.reference_gate(
                                                                   x, y.detach() + 0 * y, g),
                                                               "the gradient of input 1 is 0 and "
                                                               "must be .* within .*"),
          "NaN": (lambda x, y, g: kernels.modulation.reference_gate(x, y, g * float("nan")),
                  "output 0 is nan .*"), "launcher": (refuse(AssertionError()), "AssertionError: "
                                                      "no message"),
          "driver": (refuse(RuntimeError("Triton Error [CUDA]: invalid argument")), "RuntimeError: "
                     ".*argument"),
          "compiler": (refuse(kernels.attention.triton.TritonError("line 3\ndoes not fit")),
                       "TritonError: does not fit")}


@pytest.mark.parametrize("kind", BROKEN)
def test_the_self_check_finds_a_broken_kernel_and_only_that(monkeypatch, kind):
    broken, sentence = BROKEN[kind]
    monkeypatch.setattr(kernels.modulation, "gate", broken)
    kept = {name: kernels.samples(torch.device("cpu"), torch.float32)[name] for name
            in ("gate", "modulate")}
    monkeypatch.setattr(kernels, "samples", lambda device, dtype: kept)
    kernels.failures.cache_clear()
    found = kernels.failures(torch.device("cpu"))
    kernels.failures.cache_clear()
    assert list(found) == ["gate"]
    assert re.fullmatch(rf"gate fails its self-check \({sentence}\)", found["gate"]), found


@pytest.mark.slow
def test_every_kernel_passes_its_self_check():
    kernels.failures.cache_clear()
    assert set(kernels.samples(torch.device("cpu"), torch.float32)) == set(kernels.Kernels._fields)
    assert kernels.failures(torch.device("cpu")) == {}


def test_the_self_check_does_not_depend_on_its_caller(monkeypatch):
    """A network is built on "meta", a benchmark on a GPU, sampling happens without gradients."""
    kept = {"gate": kernels.samples(torch.device("cpu"), torch.float32)["gate"]}
    samples = kernels.samples
    for context in (torch.device("meta"), torch.no_grad(), torch.inference_mode()):
        kernels.failures.cache_clear()
        seen = []
        monkeypatch.setattr(kernels, "samples", lambda *args: seen.append(samples(*args)) or kept)
        with context:
            assert kernels.failures(torch.device("cpu")) == {}
        assert all(t.device.type == "cpu" and not t.is_inference()
                   for _, leaves in seen[0].values() for t in leaves)
    kernels.failures.cache_clear()


def test_a_kernel_that_ends_the_gpu_ends_the_run(monkeypatch):
    kept = {"gate": kernels.samples(torch.device("cpu"), torch.float32)["gate"]}
    monkeypatch.setattr(kernels, "samples", lambda device, dtype: kept)
    monkeypatch.setattr(kernels.modulation, "gate", refuse(RuntimeError("illegal memory access")))
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *args, **options: refuse(RuntimeError("illegal"))()
                        if options else zeros(*args))
    kernels.failures.cache_clear()
    with pytest.raises(ValueError, match="gate left the GPU unusable.*illegal.*--kernels torch"):
        kernels.failures(torch.device("cpu"))


def test_the_cpu_gets_the_references_even_next_to_a_gpu(monkeypatch, gpu):
    assert pick_kernels("auto", "cpu") == kernels.load("torch")
    assert pick_kernels("auto", "auto") == kernels.load("triton")
    assert pick_kernels("auto", "auto", "fp32") == kernels.load("torch")
    with pytest.raises(InputError, match="must be auto or torch for --precision fp32 .got triton"):
        pick_kernels("triton", "auto", "fp32")
    with pytest.raises(InputError, match="must be auto or torch for --device cpu .got triton"):
        pick_kernels("triton", "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="--kernels must be .*'triton', but no CUDA device"):
        pick_kernels("triton", "auto")


@pytest.mark.parametrize("name, major, auto", [
    ("Tesla T4", 7, torch.float32), ("A100", 8, torch.bfloat16), ("H100", 9, torch.bfloat16)])
def test_bf16_is_for_gpus_that_compute_in_it(monkeypatch, tmp_path, name, major, auto):
    """torch calls bf16 supported on a T4 too, by emulation; the kernels do not compile there."""
    seem(monkeypatch, name, major)
    monkeypatch.setattr(kernels, "failures", lambda device, gluon=False: {})
    cuda = torch.device("cuda", 0)
    assert compute_dtype("auto", cuda) == auto and compute_dtype("fp32", cuda) == torch.float32
    if auto == torch.bfloat16:
        assert compute_dtype("bf16", cuda) == auto
        found = [pick_kernels(name, "auto") for name in ("auto", "triton")]
        assert found == 2 * [kernels.load("triton")]
        return
    assert pick_kernels("auto", "auto") == pick_kernels("torch", "cuda") == kernels.load("torch")
    with pytest.raises(InputError, match="must be auto or torch for Tesla T4.*got triton"):
        pick_kernels("triton", "auto")
    with pytest.raises(InputError, match="--precision must be auto or fp32 on Tesla T4,.*got bf16"):
        compute_dtype("bf16", cuda)
    assert compute_dtype("bf16", torch.device("cpu")) == torch.bfloat16
    monkeypatch.chdir(tmp_path)                           # before anything is written or allocated
    monkeypatch.setattr(build, "pick_device", lambda name: cuda)
    with pytest.raises(InputError, match="--precision must be auto or fp32 on Tesla T4,.*got bf16"):
        train.main(["--precision", "bf16"])
    assert not list(tmp_path.iterdir())


# one LADD step

def networks(ops: kernels.Kernels, qk_norm: bool, dual: tuple[int, ...], device: str = "cpu",
             dtype: torch.dtype = torch.float32) -> tuple[MMDiT, MMDiT, Discriminator]:
    sizes = MMDiTConfig(2, 64, 24, 20, 4, 4, qk_norm=qk_norm, dual_blocks=dual, pos_grid=12)
    torch.manual_seed(0)
    student, teacher = (randomise(MMDiT(sizes, ops, dtype), seed).to(device) for seed in (1, 2))
    heads = randomise(Discriminator(DiscriminatorConfig((0, 1), 64, 20, width=32), ops),
                      3).to(device)
    return student, teacher.requires_grad_(False), heads


def ladd_step(ops: kernels.Kernels, qk_norm: bool = True, dual: tuple[int, ...] = (),
              device: str = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Losses and all gradients of one step."""
    student, teacher, heads = networks(ops, qk_norm, dual, device, dtype)
    g = rng(5)
    x0 = torch.randn(2, 4, 6, 10, generator=g)
    text = Text(torch.randn(2, 5, 24, generator=g).to(device),
                torch.randn(2, 20, generator=g).to(device))
    drawn = draw(x0.to(device), 10, STEP, (5,))
    wrong = Mismatched(torch.tensor([1], device=device), text.map(lambda t: t[:1]),
                       torch.ones(1, device=device), 1.0)
    fake = fake_pass(student, teacher, heads, x0.to(device), text, drawn, STEP)
    seen = head_inputs(teacher, heads, x0.to(device), text, wrong, fake.feats, drawn, STEP)
    loss_d, _ = heads_loss(heads, seen, STEP)
    loss_d.backward()
    out = {"loss_d": loss_d} | {f"heads.{k}": p.grad.clone() for k, p in heads.named_parameters()}
    loss_g, _ = student_loss(heads, text, fake, drawn, STEP, grid_of(teacher, x0))
    loss_g.backward(inputs=list(student.parameters()))
    # of queries that are not there
    zero = lambda p: torch.zeros_like(p) if p.grad is None else p.grad
    out |= {"loss_g": loss_g} | {f"student.{k}": zero(p) for k, p in student.named_parameters()}
    return {k: v.detach().cpu() for k, v in out.items()}


@pytest.mark.parametrize("qk_norm, dual", [
    pytest.param(False, (), marks=pytest.mark.slow, id="sd3"),
    pytest.param(True, (0,), id="sd3.5-medium")])
def test_a_ladd_step_on_the_kernels_is_the_one_on_the_references(qk_norm, dual):
    ours, reference = (ladd_step(kernels.load(name), qk_norm, dual) for name in ("triton", "torch"))
    assert ours.keys() == reference.keys() and len(ours) > 50
    for name, expected in reference.items():
        assert_close(name, ours[name], expected, 1e-4)


def test_the_teacher_gets_nothing_and_the_frozen_norms_nothing(monkeypatch):
    """The frozen teacher's pass computes no gradient of weights, norms or modulation."""
    student, teacher, heads = networks(kernels.load("triton"), True, ())
    x, sigma = torch.randn(2, 4, 6, 10, requires_grad=True), torch.rand(2)
    context, pooled = torch.randn(2, 5, 24), torch.randn(2, 20)
    _, feats = teacher(x, sigma, context, pooled, taps=(0, 1), stop_at_last_tap=True)
    sum(f.square().sum() for f in feats).backward()
    assert x.grad.abs().sum() > 0 and all(p.grad is None for p in teacher.parameters())


# compile, checkpoint

def test_a_block_compiles_whole_and_both_ways():
    """fullgraph: no graph break; the gradients are those of the uncompiled block, which attends
    twice and so calls all that a simpler one calls."""
    model, _, _ = networks(kernels.load("triton"), True, (0,))
    block, other = model.joint_blocks[0], copy.deepcopy(model.joint_blocks[0])
    inputs = [torch.randn(s, generator=rng(i)).requires_grad_()
              for i, s in enumerate(((2, 15, 64), (2, 5, 64), (2, 64)))]
    results = []
    for run in (other, torch.compile(block, fullgraph=True, backend="aot_eager")):
        out = run(*inputs, True)
        grads = torch.autograd.grad([o.square().sum() for o in out], inputs)
        results.append([*out, *grads])
    for i, (a, e) in enumerate(zip(*results)):
        assert_close(f"value {i}", a.cpu(), e.cpu(), 1e-4)


def test_a_selective_checkpoint_keeps_attention(monkeypatch):
    """Attention's output is saved, the rest is computed again: the forward op runs once, modulation
    twice."""
    from torch.utils.checkpoint import (CheckpointPolicy, checkpoint,
                                        create_selective_checkpoint_contexts)
    model, _, _ = networks(kernels.load("triton"), True, ())
    inputs = [torch.randn(s, requires_grad=True)
              for s in ((2, 15, 64), (2, 5, 64), (2, 64))]
    keep = torch.ops.ladd.joint_attention_forward.default
    calls: dict[str, int] = {}

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            calls[str(function)] = calls.get(str(function), 0) + 1
            return function(*args, **(kwargs or {}))

    def policy(ctx, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if op is keep else CheckpointPolicy.PREFER_RECOMPUTE

    with Count():
        out = checkpoint(model.joint_blocks[0], *inputs, True, use_reentrant=False,
                         context_fn=lambda: create_selective_checkpoint_contexts(policy))
        sum(o.square().sum() for o in out).backward()
    counted = {name: n for name, n in calls.items() if name.startswith("ladd.") and "forward"
               in name}
    assert counted.pop(str(keep)) == 1
    # two of three kinds, twice
    assert sum(n for name, n in counted.items() if "modulat" in name) == 2 * 6


# offline

@pytest.mark.slow
def test_aot_compiles_every_kernel_without_spills(machine_code):
    """Run python -m kernels.aot; of sm_90 (the kernels' own tests look at the others):

    Products are wgmma's and not serialised; operands come by TMA; in attention's forward,
    exponentials stand between a product and its wait; of every main loop it is known what products
    and copies take of shared memory."""
    rows, said = machine_code
    assert len(said.splitlines()) == len(rows) + 1
    rows = [row for row in rows if row["arch"] == 90]
    assert {row["kernel"].split(".")[0] for row in rows} == {"attention", "modulation", "heads",
                                                             "optimizer"}
    assert not [(row["kernel"], row["config"], row["spills"]) for row in rows if row["spills"]]
    assert all(row["ctas"] >= 1 for row in rows)
    for row in rows:
        if not row["products"]:
            assert row["kernel"] not in ("attention.forward", "attention.backward", "heads.product")
            continue
        products = sum(int(word[4:] or 1)
                       for word in row["order"].replace("MMA ", "MMAx1 ").split()
                       if word.startswith("MMAx"))
        assert row["waits"] < max(products, 3) and row["bulk"], row
        assert row["cycles_product"] and row["cycles_shared_operands"], row
        assert row["cycles_shared_bulk"], row
        if row["kernel"] == "attention.forward" and row["config"]["DH"] == 64:
            cycles = [row[f"cycles_{name}"] for name in ("issue", "mufu", "product", "shared")]
            assert row["bound"] == max(cycles), row             # a sum where nothing overlaps
    narrow = {row["kernel"] for row in rows if "52x76" in row["case"]}
    assert "heads.weight_grad" in narrow
    # no left factor in registers is loaded again while a product may still read it
    assert [(row["kernel"], row["case"]) for row in rows if row["hazards"]] == []
