"""The step as train.py runs it: nothing is read back from the device, nothing is held longer than needed."""
import dataclasses
import gc
import weakref
from collections import Counter

import pytest
import torch
from conftest import assert_close
from test_feed import latents
from test_train import TINY
from torch.utils._python_dispatch import TorchDispatchMode

from ladd import distill, parallel, speed, step
from ladd.config import parse_config
from ladd.mmdit import MMDiT, MMDiTConfig

CPU = torch.device("cpu")
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


def setting(flags: str = "", beside: bool = False):
    """(config, distillation config, players, the parts of one step); `beside`: of latents with images."""
    config = parse_config(f"{TINY} --kernels torch --batch 8 --heads-first 0 {flags}".split(), "tiny")
    torch.manual_seed(0)
    base = MMDiT(MMDiTConfig(2, 64, 2, 4, 2 + beside, 2, pos_grid=4), step.ops_of(config))
    for p in base.parameters():
        torch.nn.init.normal_(p, std=0.05)
    dc, data = step.distill_config(config), latents(beside=beside)
    players = step.make_players(config, base, step.Layout(CPU))
    return config, dc, players, step.step_parts(config, dc, data, 0, 0)


@pytest.mark.parametrize("flags", ["--misaligned .5", "--micro-batch 2",
                                   "--r1-weight 1 --distill-weight 1"])
def test_a_step_reads_nothing_back(flags):
    config, dc, players, parts = setting(flags)
    with Calls() as calls:
        step.ladd_step(config, dc, players, parts, True)
    assert sum(calls.count.values()) > 500 and not WAITS & set(calls.count)
    with Calls() as calls:                                              # it would be seen
        torch.ones(1).item(), torch.ones(2).nonzero()
    assert set(calls.count) >= {"aten::_local_scalar_dense", "aten::nonzero"}


@pytest.mark.parametrize("flags", ["", "--micro-batch 2"])
def test_features_are_freed_when_nobody_needs_them(monkeypatch, flags):
    """Alive at once at most the real ones and the fakes of one micro-batch; none when a micro-batch
    starts, and none after the step."""
    config, dc, players, parts = setting(flags)
    alive, held, tapped = weakref.WeakSet(), [], distill.__dict__["taps_of"]

    class Tag:
        """Lives as long as the tensor it hangs on."""

    def noted(*args):
        feats = tapped(*args)
        feats[0].tag = Tag()
        alive.add(feats[0].tag)
        held.append(len(alive))                         # 1: the fakes; 2: the real ones as well
        return feats
    monkeypatch.setitem(distill.__dict__, "taps_of", noted)
    gc.disable()
    try:
        for _ in range(2):
            step.ladd_step(config, dc, players, parts, True)
            assert not alive
    finally:
        gc.enable()
    assert held == [1, 2] * 2 * len(parts)


def test_gradients_are_dropped_not_filled_with_zeros():
    config, dc, players, parts = setting()
    step.ladd_step(config, dc, players, parts, True)
    with Calls() as calls:
        players.opt_g.zero_grad(), players.opt_d.zero_grad()
    assert not any(name.startswith("aten") for name in calls.count)
    assert all(p.grad is None for n in players[::3] for p in n.parameters())


def test_gradients_are_clipped_network_by_network(monkeypatch):
    config, dc, players, parts = setting("--clip 1e-3")
    grads = lambda net: [p.grad for p in net.parameters() if p.grad is not None]
    seen, norm = {}, lambda net: torch.stack(torch._foreach_norm(grads(net))).norm()
    for name, optimizer, net in (("d", players.opt_d, players.heads), ("g", players.opt_g, players.student)):
        take = lambda name=name, net=net: seen.update({name: float(norm(net))})
        monkeypatch.setattr(optimizer, "step", take)
    norms = step.ladd_step(config, dc, players, parts, True)[1]
    assert norms.keys() == {"heads", "student"}
    assert min(n.total for n in norms.values()) > 0.01                 # before clipping
    assert seen == {"d": pytest.approx(1e-3, rel=.01), "g": pytest.approx(1e-3, rel=.01)}


def test_levels_count_the_students_steps_and_data_the_heads(monkeypatch):
    config, dc, _, _ = setting("--heads-steps 2")
    config, seen = dataclasses.replace(config, heads_first=2), []
    monkeypatch.setattr(step.feed, "parts", lambda _, index, count, *rest: seen.append((index, count)))
    for it, j in step.step_keys(0, 4, 2):
        step.step_parts(config, dc, None, it, j)
    assert seen == [(0, 0), (1, 0), (2, 0), (3, 0), (4, 0), (5, 0), (6, 1), (7, 1)]


def test_processes_and_micro_batches_share_the_calibration(monkeypatch):
    config, dc, players, _ = setting("--micro-batch 2")
    heads, rows, own, tapped = players.heads, [], [], step.taps_of
    one = parse_config(f"{TINY} --kernels torch --batch 8 --heads-first 0".split(), "tiny")
    step.calibrate(one, dc, players.teacher, heads, latents())
    whole = heads.feat_mean.clone(), heads.feat_std.clone()
    monkeypatch.setattr(step, "taps_of", lambda *args: rows.append(len(args[2])) or tapped(*args))
    monkeypatch.setattr(parallel, "averaged", lambda moments: own.append(moments) or moments)
    for rank in (0, 1):
        monkeypatch.setattr(parallel, "ranks", lambda rank=rank: (rank, 2))
        step.calibrate(config, dc, players.teacher, heads, latents())
    assert rows == [2, 2, 2, 2] and not torch.equal(*own)
    heads.calibrate((own[0] + own[1]) / 2)
    assert_close("mean", heads.feat_mean, whole[0])
    assert_close("std", heads.feat_std, whole[1])


def student_after(flags: str, beside: bool = False) -> torch.Tensor:
    """All weights of the student after a step."""
    config, dc, players, parts = setting(flags, beside)
    step.ladd_step(config, dc, players, parts, True)
    return torch.cat([p.detach().flatten() for p in players.student.parameters()])


def test_micro_batches_bring_their_own_images():
    """A step on micro-batches is that on the whole batch, images and mismatched captions too."""
    flags = "--lr 1e-3 --misaligned .5"
    start, whole, split = (student_after(f"{flags} {more}", True)
                           for more in ("--lr 0", "", "--micro-batch 2"))
    moved = (whole - start).norm()
    # Adam magnifies rounding where gradients are near zero
    assert moved > 0.1 and (split - whole).norm() < 0.02 * moved


def gradients(monkeypatch, players: step.Players) -> dict[str, dict[str, torch.Tensor]]:
    """Gradients of heads and student by name, filled in when their optimizers step, which then do
    not move anything."""
    found = {}

    def keep(name, net):
        def taken():
            found[name] = {k: p.grad.clone() for k, p in net.named_parameters()
                           if p.grad is not None}
        return taken

    monkeypatch.setattr(players.opt_d, "step", keep("heads", players.heads))
    monkeypatch.setattr(players.opt_g, "step", keep("student", players.student))
    return found


@pytest.mark.parametrize("flags", ["", "--misaligned .5 --r1-weight 1 --distill-weight 1"])
@pytest.mark.parametrize("micro", [8, 2])
def test_gradients_equal_those_of_separate_forwards(monkeypatch, flags, micro):
    """The discriminator loss from a student and a teacher forward without a graph, the student loss
    from another student and another teacher forward, both of the whole batch."""
    flags = f"--clip 1e9 --misaligned 0 {flags}"
    _, dc, players, (whole,) = setting(flags)
    x0, text, wrong, draws = whole
    nets = players.student, players.teacher, players.heads
    with torch.no_grad():
        fake = distill.fake_pass(*nets, x0, text, draws, dc)
    distill.heads_loss(*nets[1:], x0, text, wrong, fake.feats, draws, dc)[0].backward()
    expected = {"heads": {k: p.grad for k, p in players.heads.named_parameters()}}
    fake = distill.fake_pass(*nets, x0, text, draws, dc)
    distill.student_loss(nets[2], text, fake, draws, dc, distill.grid_of(nets[1], x0))[0].backward()
    expected["student"] = {k: p.grad for k, p in players.student.named_parameters()
                           if p.grad is not None}

    config, dc, players, parts = setting(f"{flags} --micro-batch {micro}")
    found = gradients(monkeypatch, players)
    step.ladd_step(config, dc, players, parts, True)
    assert len(parts) == 8 // micro
    for name, grads in expected.items():
        assert found[name].keys() == grads.keys() and len(grads) > 10
        for key, grad in grads.items():
            assert_close(f"{name}, {key}", found[name][key], grad, 1e-4)


@pytest.mark.parametrize("update_student", [True, False])
@pytest.mark.parametrize("flags", ["", "--micro-batch 2 --misaligned .5 --r1-weight 1"])
def test_a_micro_batch_takes_one_student_forward_and_two_teacher_forwards(flags, update_student):
    """The teacher's: of the fake, for both losses; of all that needs no gradient, together."""
    config, dc, players, parts = setting(f"--misaligned 0 {flags}")
    with speed.forwards(student=players.student, teacher=players.teacher) as count:
        step.ladd_step(config, dc, players, parts, update_student)
    assert count == {"student": len(parts), "teacher": 2 * len(parts)}


def test_only_the_heads_train_without_update_student():
    config, dc, players, parts = setting("--micro-batch 2")
    before = {k: t.detach().clone() for k, t in players.tensors().items()}
    stats, norms = step.ladd_step(config, dc, players, parts, False)
    after = players.tensors()
    changed = {name for name, t in before.items() if not t.equal(after[name])}
    assert {name.split(".")[0] for name in changed} == {"heads", "opt_d"}      # .step counts
    assert not players.opt_g.state and all(p.grad is None for p in players.student.parameters())
    assert norms.keys() == {"heads"} and "loss_d" in stats and "loss_g" not in stats


def test_the_student_reads_the_heads_before_their_step():
    """So a step of the heads, however large, changes nothing in the student's step."""
    near, far = (student_after(f"--lr 1e-3 --beta1 0 --heads-lr {lr}") for lr in ("0", "0.1"))
    assert torch.equal(near, far) and not torch.equal(near, student_after("--lr 0"))


def test_only_the_last_micro_batch_reduces_the_students_gradients(monkeypatch):
    config, dc, players, parts = setting("--micro-batch 2")
    seen = []
    monkeypatch.setattr(parallel, "accumulate", lambda net, last: seen.append((net, last)))
    step.ladd_step(config, dc, players, parts, True)
    assert seen == [(players.student, last) for last in (False, False, False, True)]
