"""Latent consistency distillation, the paper's baseline: x0_hat is the same all along the teacher's path.

    xs     = Euler step of the guided teacher from xt, at level t of a grid, to the next level s
    target = x0_hat of the student's average from xs at s;  xs itself at s = 0
    loss   = sqrt(mean |x0_hat - target|^2 + c^2) - c       per sample, x0_hat the student's from xt at t

x0_hat = xt - t v is xt at t = 0, so the boundary holds without further ado. Samples by re-noising.
Source: Luo et al. 2023 (LCM), Alg. 1, with its pseudo-Huber loss; in rectified flow's terms, our choice.
"""
import torch
from torch import Tensor

from ladd import flow
from ladd.distill import Text, predict_x0
from ladd.mmdit import MMDiT
from ladd.sampler import guided

HUBER = 0.03    # c, in units of the latents' standard deviation


def lcm_loss(student: MMDiT, average: MMDiT, teacher: MMDiT, x0: Tensor, text: Text, null: Text, eps: Tensor,
             sigma: Tensor, levels: Tensor, guidance: float,
             image_guidance: float = 1.0) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, stats). x0, eps [b, c, h, w]; sigma [b] from `levels` [n + 1], which fall from 1 to 0; null the
    empty prompt's text without batch axis. Only the student gets gradients."""
    next_level = levels[(sigma[:, None] - levels).abs().argmin(1) + 1]
    xt = flow.noised(x0, eps, sigma)
    with torch.no_grad():
        v = guided(teacher, null, guidance, image_guidance)(xt, sigma, text)
        xs = xt + flow.per_sample(next_level - sigma, xt) * v
        target = predict_x0(average, xs, next_level, text)
        target = torch.where(flow.per_sample(next_level, xs) > 0, target, xs)
    error = (predict_x0(student, xt, sigma, text) - target).square().flatten(1).mean(1)
    loss = ((error + HUBER ** 2).sqrt() - HUBER).mean()
    return loss, {"loss_g": loss.detach()}
