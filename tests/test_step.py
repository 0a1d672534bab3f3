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

from ladd import distill, parallel, step
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


@pytest.mark.parametrize("flags", ["--misaligned .5", "--misaligned .5 --misaligned-at heads",
                                   "--micro-batch 2",
                                   "--r1-weight 1 --distill-weight 1", "--schedule two-forward",
                                   "--schedule simultaneous --micro-batch 2"])
def test_a_step_reads_nothing_back(flags):
    config, dc, players, parts = setting(flags)
    with Calls() as calls:
        fakes = step.heads_step(config, dc, players, parts, True)[-1]
        step.student_step(config, dc, players, parts, fakes)
    assert sum(calls.count.values()) > 500 and not WAITS & set(calls.count)
    with Calls() as calls:                                              # it would be seen
        torch.ones(1).item(), torch.ones(2).nonzero()
    assert set(calls.count) >= {"aten::_local_scalar_dense", "aten::nonzero"}


@pytest.mark.parametrize("flags, most", [("", 2), ("--micro-batch 2", 2), ("--schedule two-forward", 2),
                                         ("--schedule simultaneous --micro-batch 2", 2)])
def test_features_are_freed_when_nobody_needs_them(monkeypatch, flags, most):
    """Alive at once at most the real ones and the fakes of one micro-batch; after the student's step none."""
    config, dc, players, parts = setting(flags)
    alive, held, tapped = weakref.WeakSet(), [], distill.__dict__["taps_of"]

    class Tag:
        """Lives as long as the tensor it hangs on."""

    def noted(*args):
        feats = tapped(*args)
        feats[0].tag = Tag()
        alive.add(feats[0].tag)
        held.append(len(alive))
        return feats
    monkeypatch.setitem(distill.__dict__, "taps_of", noted)
    gc.disable()
    try:
        for _ in range(2):
            fakes = step.heads_step(config, dc, players, parts, True)[-1]
            assert len(alive) == (0 if flags else 1)              # the student's step shares the fakes
            step.student_step(config, dc, players, parts, fakes)
            assert not alive and not fakes
    finally:
        gc.enable()
    assert len(held) >= 4 and max(held) == most


def test_gradients_are_dropped_not_filled_with_zeros():
    config, dc, players, parts = setting()
    step.student_step(config, dc, players, parts, step.heads_step(config, dc, players, parts, True)[-1])
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
    _, norms_d, _, fakes = step.heads_step(config, dc, players, parts, True)
    norms_g = step.student_step(config, dc, players, parts, fakes)[1]
    assert min(norms_d.total, norms_g.total) > 0.01                    # before clipping
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
    fakes = step.heads_step(config, dc, players, parts, True)[-1]
    step.student_step(config, dc, players, parts, fakes)
    return torch.cat([p.detach().flatten() for p in players.student.parameters()])


def test_schedules_differ_in_which_heads_the_student_meets():
    """Of one batch, one-forward and two-forward are the same step; simultaneous meets the heads before their
    step, so that it is the same one where they do not move. In micro-batches it is what it is in one."""
    far, still = "--heads-lr 0.1 --beta1 0 --lr 1e-3", "--heads-lr 0 --lr 1e-3"
    one, two, before = (student_after(f"{far} --schedule {s}") for s in (
        "one-forward", "two-forward", "simultaneous"))
    start = student_after("--lr 0")
    moved = (one - start).norm()
    assert torch.equal(one, two) and (one - before).norm() > 0.05 * moved > 0
    assert torch.equal(student_after(f"{still} --schedule simultaneous"), student_after(still))
    assert torch.equal(student_after(f"{still} --schedule simultaneous"), before)
    parts = student_after(f"{far} --schedule simultaneous --micro-batch 2")
    assert (parts - before).norm() < 0.02 * moved      # Adam magnifies rounding where gradients are near zero


def test_micro_batches_bring_their_own_images():
    """A step on them is that on the whole batch, the captions that do not fit among them: the student meets
    the heads that these have moved."""
    flags = "--heads-lr 0.1 --beta1 0 --lr 1e-3 --misaligned .5 --schedule two-forward"
    start, whole, split = (student_after(f"{flags} {more}", True)
                           for more in ("--lr 0", "", "--micro-batch 2"))
    moved = (whole - start).norm()
    assert moved > 0.1 and (split - whole).norm() < 0.02 * moved
