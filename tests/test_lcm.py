"""Latent consistency distillation: its loss by hand, who gets gradients, and the whole run."""
import math

import pytest
import torch
from conftest import assert_close, rng, tiny
from test_distill import AffineStudent, batch
from test_train import QUIET, TINY, load_state, log_of, main, save_teacher

from ladd import flow
from ladd.config import parse_config
from ladd.distill import Text, TextImage
from ladd.lcm import HUBER, lcm_loss
from ladd.step import distill_config

LEVELS = flow.euler_levels(4, 2.0).double()                                # 1 .857 .667 .4 0


class Reader(torch.nn.Module):
    """v = 3 x + sigma + the mean of its text + the image."""

    def forward(self, x, sigma, context, pooled, image=0):
        return 3 * x + (sigma + context.mean((1, 2)) + pooled.mean(1)).view(-1, 1, 1, 1) + image


def setting():
    x0, text = batch()
    g = rng(4)
    eps = torch.randn(x0.shape, generator=g).double()
    null = Text(torch.randn(5, 24, generator=g).double(), torch.randn(20, generator=g).double())
    return x0, text, null, eps, LEVELS[torch.tensor([0, 3, 1, 2])]


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_the_loss_by_hand(guidance):
    """Guided Euler step of the teacher, target by the average at the next level; at 0 the path's end."""
    x0, text, null, eps, sigma = setting()
    student, average, teacher = AffineStudent(), AffineStudent(), Reader()
    with torch.no_grad():
        average.a.fill_(0.2)
    loss, stats = lcm_loss(student, average, teacher, x0, text, null, eps, sigma, LEVELS, guidance)
    reads = lambda t, i: (t.context[i] if t is text else t.context).mean() + (
        t.pooled[i] if t is text else t.pooled).mean()
    terms = []
    for i, k in enumerate((0, 3, 1, 2)):
        now, then = LEVELS[k].item(), LEVELS[k + 1].item()
        xt = (1 - now) * x0[i] + now * eps[i]
        mean = reads(null, i) + guidance * (reads(text, i) - reads(null, i))
        xs = xt + (then - now) * (3 * xt + now + mean)
        target = xs if then == 0 else xs - then * (0.2 * xs + average.bias)
        x0_hat = xt - now * (0.7 * xt + student.bias)
        terms.append(((x0_hat - target).square().mean() + HUBER ** 2).sqrt() - HUBER)
    assert_close("loss", loss, torch.stack(terms).mean(), 1e-10)
    assert_close("logged", stats["loss_g"], loss.detach())
    assert LEVELS[-1] == 0 and not stats["loss_g"].requires_grad


@pytest.mark.parametrize("guidance, image_guidance", [(1.0, 1.0), (2.5, 1.0), (2.5, 1.5)])
def test_the_loss_by_hand_with_an_image(guidance, image_guidance):
    """Student, average and teacher read it; only the term without it, of image guidance, does not."""
    x0, text, null, eps, sigma = setting()
    student, average = AffineStudent(), AffineStudent()
    with torch.no_grad():
        average.a.fill_(0.2)
    text = TextImage(*text, torch.randn(x0.shape, generator=rng(5)).double())
    loss, _ = lcm_loss(student, average, Reader(), x0, text, null, eps, sigma, LEVELS, guidance,
                       image_guidance)
    plain = null.context.mean() + null.pooled.mean()
    terms = []
    for i, k in enumerate((0, 3, 1, 2)):
        now, then, image = LEVELS[k].item(), LEVELS[k + 1].item(), text.image[i]
        xt = (1 - now) * x0[i] + now * eps[i]
        said = plain + guidance * (text.context[i].mean() + text.pooled[i].mean() - plain)
        xs = xt + (then - now) * (3 * xt + now + said + image_guidance * image)
        target = xs if then == 0 else xs - then * (0.2 * xs + average.bias + image)
        x0_hat = xt - now * (0.7 * xt + student.bias + image)
        terms.append(((x0_hat - target).square().mean() + HUBER ** 2).sqrt() - HUBER)
    assert_close("loss", loss, torch.stack(terms).mean(), 1e-10)


def test_only_the_student_gets_gradients_and_none_through_its_target():
    x0, text, null, eps, sigma = setting()
    student, average, teacher = (tiny("qk_norm", seed=i) for i in range(3))
    loss, _ = lcm_loss(student, average, teacher, x0, text, null, eps, sigma, LEVELS, 2.0)
    loss.backward()
    assert all(p.grad is None for net in (average, teacher) for p in net.parameters())
    grads = [p.grad for p in student.parameters() if p.grad is not None]
    assert len(grads) > 30 and all(g.any() for g in grads)
    before = torch.cat([g.flatten() for g in grads])
    student.zero_grad()
    same, _ = lcm_loss(student, student, teacher, x0, text, null, eps, sigma, LEVELS, 2.0)   # its own target
    same.backward()
    assert (torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None]) - before).any()


def test_a_student_on_a_straight_path_is_at_rest():
    """Where all predict one point, every level's x0_hat is that point: the loss is 0 and stays it."""
    x0, text, null, eps, sigma = setting()

    class Straight(torch.nn.Module):
        def forward(self, x, sigma, context, pooled):
            return (x - 0.5) / sigma.view(-1, 1, 1, 1)
    net = Straight()
    assert lcm_loss(net, net, net, x0, text, null, eps, sigma, LEVELS, 1.0)[0].abs() < 1e-12


def test_the_grid_is_drawn_from_evenly():
    config = parse_config(f"{TINY} --objective lcm --lcm-steps 5 --shift 3".split(), "tiny")
    dc = distill_config(config)
    assert dc.levels == pytest.approx((1, .8, .6, .4, .2)) and dc.probs == (.2,) * 5 and dc.shift == 3
    assert dc.misaligned == 0


def test_a_run_ends_and_resumes_bit_for_bit(tmp_path):
    save_teacher(tmp_path)
    flags = f"--teacher t.safetensors --objective lcm --data-from world {QUIET}"
    main(tmp_path, f"--name whole {flags}", report=True)
    main(tmp_path, f"--name halves {flags} --stop-after 2")
    main(tmp_path, f"--name halves {flags}")
    whole, halves = (load_state(tmp_path / f"runs/{name}/checkpoints/distill")
                     for name in ("whole", "halves"))
    assert whole[0] == halves[0] == 4 and all(torch.equal(whole[1][k], halves[1][k]) for k in whole[1])
    lines = log_of(tmp_path / "runs/whole")
    assert lines == log_of(tmp_path / "runs/halves") and len(lines) == 4
    assert all(line["loss_g"] > 0 and "loss_d" not in line for line in lines)
    assert all(math.isfinite(line["norm_g"]) for line in lines)
    heads = [v for k, v in whole[1].items() if k.startswith("opt_d.") and k.endswith(".step")]
    assert heads and not any(step.any() for step in heads)                  # the heads do nothing here
