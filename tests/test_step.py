"""The step as train.py runs it: nothing is read back from the device, nothing is held longer than
needed."""
import dataclasses
import gc
import weakref
from collections import Counter

import pytest
import torch
from conftest import assert_close
from test_batches import latents
from test_train import TINY
from torch.utils._python_dispatch import TorchDispatchMode

from ladd.build import batching_of, compute_of, heads_of, student_lora
from ladd.config import parse_config
from ladd.core import losses
from ladd.core.mmdit import MMDiT, MMDiTConfig
from ladd.engine import optimizer, parallel, state, step
from ladd.report import speed

# what makes the host wait for a device: reading a value, or a shape that depends on values
WAITS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal",
         "aten::masked_select",
         "aten::unique2", "aten::_unique2", "aten::repeat_interleave.Tensor"}


class Calls(TorchDispatchMode):
    """Counts the operators inside."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


def setting(flags: str = "", edit: bool = False):
    """Return (config, distillation config, networks, micro-batches of a step); `edit`: latents with
    images."""
    config = parse_config(f"{TINY} --kernels torch --batch 8 --heads-repeats 1 "
                          f"--set heads_first=0 {flags}".split())
    compute = compute_of(config)
    torch.manual_seed(0)
    base = MMDiT(MMDiTConfig(2, 64, 2, 4, 2 + edit, 2, pos_grid=4), compute.ops)
    for p in base.parameters():
        torch.nn.init.normal_(p, std=0.05)
    networks = step.make_networks(base, compute, config.group(step.Optim),
                                  heads_of(config, base.config), config.student_depth,
                                  student_lora(config), config.teacher_fp8)
    parts = step.step_parts(config.ladd, batching_of(config), latents(with_images=edit), 0)
    return config, config.ladd, networks, parts


@pytest.mark.parametrize("flags", ["--mismatched .5", "--micro-batch 2",
                                   "--set r1_weight=1 --set distill_weight=1"])
def test_a_step_reads_nothing_back(flags):
    config, dc, networks, parts = setting(flags)
    with Calls() as calls:
        step.ladd_step(dc, networks, parts, config.ema, True)
    assert sum(calls.count.values()) > 500 and not WAITS & set(calls.count)
    with Calls() as calls:                                              # it would be seen
        torch.ones(1).item(), torch.ones(2).nonzero()
    assert set(calls.count) >= {"aten::_local_scalar_dense", "aten::nonzero"}


@pytest.mark.parametrize("flags, waiting", [("", 0), ("--micro-batch 2", 0),
                                            ("--micro-batch 2 --heads-repeats 3", 1)])
def test_features_are_freed_when_nobody_needs_them(monkeypatch, flags, waiting):
    """Alive at once at most the real ones and the fakes of one micro-batch, and those that wait for
    the heads' further steps; none after the step."""
    config, dc, networks, parts = setting(flags)
    alive, held, tapped = weakref.WeakSet(), [], losses.__dict__["tapped_features"]

    class Tag:
        """Lives as long as the tensor it hangs on."""

    def noted(*args):
        feats = tapped(*args)
        feats[0].tag = Tag()
        alive.add(feats[0].tag)
        held.append(len(alive))                         # 1: the fakes; 2: the real ones as well
        return feats

    def spy(*args):
        out = losses.head_inputs(*args)
        out.fake[0].tag = Tag()
        waiting_fakes.add(out.fake[0].tag)
        return out
    waiting_fakes = weakref.WeakSet()
    monkeypatch.setitem(losses.__dict__, "tapped_features", noted)
    monkeypatch.setattr(step, "head_inputs", spy)
    gc.disable()
    try:
        for _ in range(2):
            step.ladd_step(dc, networks, parts, config.ema, True)
            assert not alive and not waiting_fakes
    finally:
        gc.enable()
    # a fake that waits is detached, so that its tag is gone
    assert held == [i * waiting + n for i in range(len(parts)) for n in (1, 2)] * 2


def test_gradients_are_dropped():
    config, dc, networks, parts = setting()
    step.ladd_step(dc, networks, parts, config.ema, True)
    assert all(p.grad is None for n in networks[::3] for p in n.parameters())


def test_weights_do_not_decay():
    """Where the gradient is 0 an optimizer's step changes nothing."""
    _, _, networks, _ = setting()
    for adam in (networks.opt_g, networks.opt_d):
        before = [p.detach().clone() for p in adam.params.values()]
        for p in adam.params.values():
            p.grad = torch.zeros_like(p)
        adam.step()
        assert all(map(torch.equal, adam.params.values(), before))


def test_gradients_are_clipped_network_by_network(monkeypatch):
    config, dc, networks, parts = setting()
    monkeypatch.setattr(optimizer, "CLIP", 1e-3)
    factors, adamw = [], networks.student.kernels.adamw
    for net in (networks.student, networks.heads):
        net.kernels = net.kernels._replace(adamw=lambda *args: factors.append(args[6]) or
                                           adamw(*args))
    norms = step.ladd_step(dc, networks, parts, config.ema, True)[1]
    assert list(norms) == ["heads", "student"]
    assert min(n.total for n in norms.values()) > 0.01                 # before clipping
    for n, factor in zip(norms.values(), factors, strict=True):
        assert float(factor * n.total) == pytest.approx(1e-3, rel=0.01)


def test_levels_count_the_students_steps_and_data_the_heads(monkeypatch):
    config, dc, _, _ = setting()
    config, seen = dataclasses.replace(config, heads_first=2), []
    monkeypatch.setattr(step, "micro_batches", lambda latents, batching, dc, index, count, key:
                        seen.append((index, count)))
    for it in range(4):
        step.step_parts(dc, batching_of(config), None, it)
    assert seen == [(0, 0), (1, 0), (2, 0), (3, 1)]


def test_processes_and_micro_batches_share_the_calibration(monkeypatch):
    one, dc, networks, _ = setting()
    config, heads, teacher = setting("--micro-batch 2")[0], networks.heads, networks.teacher
    rows, own, tapped = [], [], losses.tapped_features
    step.calibrate(dc, batching_of(one), teacher, heads, latents())
    whole = heads.feat_mean.clone(), heads.feat_std.clone()
    monkeypatch.setattr(step, "tapped_features",
                        lambda *args: rows.append(len(args[2])) or tapped(*args))
    monkeypatch.setattr(parallel, "averaged", lambda moments: own.append(moments) or moments)
    for rank in (0, 1):
        monkeypatch.setattr(parallel, "ranks", lambda rank=rank: (rank, 2))
        step.calibrate(dc, batching_of(config), teacher, heads, latents())
    assert rows == [2, 2, 2, 2] and not torch.equal(*own)
    heads.calibrate((own[0] + own[1]) / 2)
    assert_close("mean", heads.feat_mean, whole[0])
    assert_close("std", heads.feat_std, whole[1])


def student_after(flags: str, edit: bool = False) -> torch.Tensor:
    """All weights of the student after a step."""
    config, dc, networks, parts = setting(flags, edit)
    step.ladd_step(dc, networks, parts, config.ema, True)
    return torch.cat([p.detach().flatten() for p in networks.student.parameters()])


def test_micro_batches_bring_their_own_images():
    """A step on micro-batches is that on the whole batch, images and mismatched captions too."""
    flags = "--lr 1e-3 --mismatched .5"
    start, whole, split = (student_after(f"{flags} {more}", True)
                           for more in ("--lr 1e-9", "", "--micro-batch 2"))
    moved = (whole - start).norm()
    # Adam magnifies rounding where gradients are near zero
    assert moved > 0.1 and (split - whole).norm() < 0.02 * moved


def gradients(monkeypatch, networks: step.Networks) -> dict[str, dict[str, torch.Tensor]]:
    """Gradients of heads and student by name, filled in when their optimizers step, which then do
    not move anything."""
    found = {}

    def keep(name, net):
        def taken(decay=0.0):
            found[name] = {k: p.grad.clone() for k, p in net.named_parameters()
                           if p.grad is not None}
        return taken

    monkeypatch.setattr(networks.opt_d, "step", keep("heads", networks.heads))
    monkeypatch.setattr(networks.opt_g, "step", keep("student", networks.student))
    return found


@pytest.mark.parametrize("flags", ["", "--mismatched .5 --set r1_weight=1 --set distill_weight=1"])
@pytest.mark.parametrize("micro", [8, 2])
def test_gradients_equal_those_of_separate_forwards(monkeypatch, flags, micro):
    """The discriminator loss from a student and a teacher forward without a graph, the student loss
    from another student and another teacher forward, both of the whole batch."""
    flags = f"--mismatched 0 {flags}"
    _, dc, networks, (whole,) = setting(flags)
    x0, text, mismatched, draws = whole
    nets = networks.student, networks.teacher, networks.heads
    with torch.no_grad():
        fake = losses.fake_pass(*nets, x0, text, draws, dc)
    seen = losses.head_inputs(*nets[1:], x0, text, mismatched, fake.feats, draws, dc)
    losses.heads_loss(nets[2], seen, dc)[0].backward()
    expected = {"heads": {k: p.grad for k, p in networks.heads.named_parameters()}}
    fake = losses.fake_pass(*nets, x0, text, draws, dc)
    losses.student_loss(nets[2], text, fake, draws, dc, losses.grid_of(nets[1], x0))[0].backward()
    expected["student"] = {k: p.grad for k, p in networks.student.named_parameters()
                           if p.grad is not None}

    config, dc, networks, parts = setting(f"{flags} --micro-batch {micro}")
    found = gradients(monkeypatch, networks)
    step.ladd_step(dc, networks, parts, config.ema, True)
    assert len(parts) == 8 // micro
    for name, grads in expected.items():
        assert found[name].keys() == grads.keys() and len(grads) > 10
        for key, grad in grads.items():
            assert_close(f"{name}, {key}", found[name][key], grad, 1e-4)


@pytest.mark.parametrize("update_student", [True, False])
@pytest.mark.parametrize("flags", ["", "--micro-batch 2 --mismatched .5 --set r1_weight=1"])
def test_a_micro_batch_takes_one_student_forward_and_two_teacher_forwards(flags, update_student):
    """The teacher's: of the fake, for both losses; of all that needs no gradient, together."""
    config, dc, networks, parts = setting(f"--mismatched 0 {flags}")
    with speed.forwards(student=networks.student, teacher=networks.teacher) as count:
        step.ladd_step(dc, networks, parts, config.ema, update_student)
    assert count == {"student": len(parts), "teacher": 2 * len(parts)}


def test_only_the_heads_train_without_update_student():
    config, dc, networks, parts = setting("--micro-batch 2")
    before = {k: t.detach().clone() for k, t in state.collect(networks.to_checkpoint()).items()}
    stats, norms = step.ladd_step(dc, networks, parts, config.ema, False)
    after = state.collect(networks.to_checkpoint())
    changed = {name for name, t in before.items() if not t.equal(after[name])}
    assert {name.split(".")[0] for name in changed} == {"heads", "opt_d"}
    assert all(p.grad is None for p in networks.student.parameters())
    assert norms.keys() == {"heads"} and "loss_d" in stats and "loss_g" not in stats


@pytest.mark.parametrize("micro", [8, 2])
def test_the_heads_repeat_their_step_on_the_same_features(micro):
    """Three steps by hand on the features that the first one saw; the student's step is the one
    without repeats."""
    flags = f"--mismatched .5 --micro-batch {micro} --heads-lr 1e-2 --set r1_weight=1"
    config, dc, networks, parts = setting(flags)
    with torch.no_grad():
        seen = [losses.head_inputs(networks.teacher, networks.heads, x0, text, mismatched,
                                   losses.fake_pass(*networks[0:3:2], networks.heads, x0, text,
                                                    draws, dc).feats, draws, dc)
                for x0, text, mismatched, draws in parts]
    for _ in range(3):
        (sum(losses.heads_loss(networks.heads, s, dc)[0] for s in seen) / len(seen)).backward()
        networks.opt_d.step()
    expected, heads = networks.heads.state_dict(), {}
    for repeats in (1, 3):
        config, dc, networks, parts = setting(f"{flags} --heads-repeats {repeats}")
        step.ladd_step(dc, networks, parts, config.ema, True)
        heads[repeats] = networks.heads.state_dict(), networks.student.state_dict()
    for name, value in expected.items():
        # Adam divides by |g| + 1e-8: gradients near 0 differ by rounding alone
        assert_close(name, heads[3][0][name], value, 1e-3)
        assert name.startswith("feat") or not torch.equal(heads[1][0][name], value)
    assert all(torch.equal(a, b) for a, b in zip(heads[1][1].values(), heads[3][1].values()))


def test_the_student_reads_the_heads_before_their_step():
    """So a step of the heads, however large, changes nothing in the student's step."""
    near, far = (student_after(f"--lr 1e-3 --heads-lr {lr}") for lr in ("1e-9", "0.1"))
    assert torch.equal(near, far) and not torch.equal(near, student_after("--lr 1e-9"))


def test_only_the_last_micro_batch_reduces_the_students_gradients(monkeypatch):
    config, dc, networks, parts = setting("--micro-batch 2")
    seen = []
    monkeypatch.setattr(parallel, "accumulate", lambda net, last: seen.append((net, last)))
    step.ladd_step(dc, networks, parts, config.ema, True)
    assert seen == [(networks.student, last) for last in (False, False, False, True)]
