"""Distill a student by latent consistency (LCM), the baseline of the paper: x0_hat stays the same
along the teacher's path.

    xs     = Euler step of the guided teacher from xt, at level t of a grid, to the next level s
    target = x0_hat of the student's EMA from xs at s;  xs itself at s = 0
    loss   = sqrt(mean |x0_hat - target|^2 + c^2) - c    per sample; x0_hat: the student's from xt

x0_hat = xt - t v is xt at t = 0, so the boundary condition needs no extra term.

    python -m ladd.lcm --run runs/tiny

Takes the configuration, the teacher and the synthetic data of a run of train.py; the run needs no
student yet. Writes student.safetensors (the EMA after the last step) and, for the toy dataset,
report.json and samples.png. The same command again resumes from OUT/checkpoints.
Source: Luo et al. 2023 (LCM), Alg. 1, with its pseudo-Huber loss; the form for rectified flow is
our choice.
"""
import time
from argparse import Namespace
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ladd.build import compute_of, needs_of, read_config, student_lora, toy_of
from ladd.cli import Parser, must, run_script
from ladd.config import Config, validated
from ladd.core import flow
from ladd.core.losses import predict_x0
from ladd.core.mmdit import MMDiT, MMDiTConfig, Text, shrunk
from ladd.core.sampler import guided
from ladd.data import shards
from ladd.data.batches import Prefetch
from ladd.data.files import fingerprint, locked
from ladd.data.shards import Latents
from ladd.engine import parallel, state
from ladd.engine.inputs import load_data, load_teacher
from ladd.engine.networks import (Compute, checkpoint_tensors, inference, make_student,
                                  save_network)
from ladd.engine.optimizer import AdamW
from ladd.engine.run import Health, Stopper, progress
from ladd.engine.step import BETA1, Optim, rate_factor
from ladd.report.compare import student_rows, teacher_row, write_toy_report
from ladd.sd3 import checkpoint
from ladd.toy.prompts import toy_codec, toy_latents

HUBER = 0.03    # c, in units of the latents' standard deviation
FIELDS = "steps lr batch micro_batch seed data save_every n".split()    # flags of the same names


def lcm_loss(student: MMDiT, ema: MMDiT, teacher: MMDiT, x0: Tensor, text: Text,
             null: Text, eps: Tensor, sigma: Tensor, levels: Tensor, guidance: float,
             image_guidance: float = 1.0) -> Tensor:
    """Return the loss, averaged over the samples. Only the student gets gradients.

    x0, eps [b, c, h, w]; sigma [b], each one of `levels` [n + 1], which fall from 1 to 0; null is
    the text of the empty prompt without a batch axis.
    """
    next_level = levels[(sigma[:, None] - levels).abs().argmin(1) + 1]
    xt = flow.noised(x0, eps, sigma)
    with torch.no_grad():
        v = guided(teacher, null, guidance, image_guidance)(xt, sigma, text)
        xs = xt + flow.per_sample(next_level - sigma, xt) * v
        target = predict_x0(ema, xs, next_level, text)
        target = torch.where(flow.per_sample(next_level, xs) > 0, target, xs)
    error = (predict_x0(student, xt, sigma, text) - target).square().flatten(1).mean(1)
    return ((error + HUBER ** 2).sqrt() - HUBER).mean()


def draw_parts(latents: Latents, step: int, batch: int, micro: int, seed: int, path_steps: int,
               shift: float) -> list[tuple[Tensor, Tensor, Tensor, Text]]:
    """Return x0, eps, sigma and text of each micro-batch of a step: of the batch that the LADD
    iteration of the same number has.

    Noise levels are drawn evenly from the grid of `path_steps` steps. Everything is a function of
    the arguments, and each sample has its own noise: resuming needs no saved state, and the size of
    the micro-batches changes nothing.
    """
    key = (seed, 2, step)
    grid = tuple((path_steps - i) / path_steps for i in range(path_steps))
    sigma = flow.student_levels(batch, grid, (1 / path_steps,) * path_steps, flow.generator(*key))
    found = latents.batch(step, batch, seed, latents.holdout)
    eps = torch.stack([torch.randn(found.x0.shape[1:], generator=flow.generator(*key, i))
                       for i in range(batch)])
    level = flow.shift(sigma, shift)
    parts = []
    for i in range(0, batch, micro):
        part = slice(i, i + micro)
        text = found.text.map(lambda t, part=part: t[part])
        parts.append((found.x0[part], eps[part], level[part], text))
    return parts


def parse(argv: list[str]) -> Namespace:
    """Return the flags; raise InputError for values out of range."""
    parser = Parser(prog="python -m ladd.lcm", description=__doc__.split("\n\n")[0])
    flag = parser.add_argument
    flag("--run", metavar="FOLDER", required=True, help="run of train.py with teacher and data")
    flag("--out", metavar="FOLDER", help="default: lcm in the run folder")
    flag("--data", metavar="FOLDER", help="folder of latents; default: the data of the run")
    flag("--path-steps", metavar="N", type=int, default=16, help="steps of the teacher's path")
    flag("--steps", metavar="N", type=int, default=360, help="training steps")
    flag("--lr", metavar="R", type=float, default=5e-4, help="peak learning rate")
    flag("--batch", metavar="N", type=int, help="pairs per step; default: as in the run")
    flag("--micro-batch", metavar="N", type=int,
         help="pairs at a time, 0 for the whole batch; default: as in the run")
    flag("--save-every", metavar="N", type=int,
         help="steps between checkpoints; default: as in the run")
    flag("--n", metavar="N", type=int, help="images of each row; default: as in the run")
    flag("--seed", metavar="N", type=int, help="seed of the training; default: as in the run")
    flag("--device", choices=("auto", "cpu", "cuda"), default="auto")
    args = parser.parse(argv)
    for name, least in (("path_steps", 2), ("steps", 1)):
        value = getattr(args, name)
        must(value >= least, f"--{name.replace('_', '-')} must be at least {least} (got {value})")
    return args


def read_data(config: Config, run: Path, seed: int, teacher: MMDiTConfig) -> Latents:
    """Return the latents to train on: those in config.data, renders, or those in run/data. Raise
    InputError for a folder that does not fit, or that train.py has not completed."""
    if config.data == "toy":
        return toy_latents(toy_of(config), config.data_size, seed + 1)
    folder = Path(config.data or run / "data")
    latents = load_data(folder, teacher, config.task, config.batch)
    found = len(shards.shards(folder))
    planned = latents.provenance.get("shards", 0)
    must(found >= planned, f"{folder}: {planned - found} of {planned} shards are missing; run the "
         "command that made it again")
    return latents


def train(config: Config, path_steps: int, base: MMDiT, teacher: MMDiT, compute: Compute,
          latents: Latents, saver: state.Saver, recipe: dict, stopper: Stopper) -> MMDiT:
    """Train a student of the teacher `base` and return its EMA; `teacher` is the frozen copy of
    `base` in the compute dtype.

    Training resumes from the checkpoints in the folder of `saver`, and ends early after a signal.
    Raises InputError for checkpoints of another `recipe`.
    """
    device = compute.device
    optim = config.group(Optim)
    student, ema = make_student(base, teacher, compute, config.student_depth, student_lora(config))
    optimizer = AdamW(student, optim.lr, BETA1, optim.beta2, ema=ema)

    def to_checkpoint() -> state.Tensors:
        return {"student": checkpoint_tensors(student, student),
                "ema": checkpoint_tensors(ema, student), "opt": optimizer.state()}

    start = 0
    if saved := state.open_state(saver.folder):
        state.check_meta(saved, recipe)
        start = saved.step
        state.restore(saved, to_checkpoint())
    levels = flow.euler_sigmas(path_steps, config.shift).to(device)
    null = Text(*latents.null).to(device)
    make = partial(draw_parts, latents, batch=config.batch, micro=config.micro(1), seed=config.seed,
                   path_steps=path_steps, shift=config.shift)
    health = Health()
    bar = progress("lcm", config.steps, start)
    steps = range(start, config.steps)
    keys = ((step,) for step in steps)
    with saver, bar:
        for step, parts in zip(steps, Prefetch(make, keys, device)):
            optimizer.lr = config.lr * rate_factor(optim, step, step)
            loss = torch.zeros((), device=device)
            for x0, eps, sigma, text in parts:
                part_loss = lcm_loss(student, ema, teacher, x0, text, null, eps, sigma, levels,
                                     config.guidance, config.image_guidance) / len(parts)
                part_loss.backward()
                loss += part_loss.detach()
            norms = optimizer.step(config.ema)
            health.note(step + 1, {"loss": loss}, {"": (student, norms)})
            bar.update()
            if saver.written:
                saver.publish()
            done = step + 1 == config.steps or bool(stopper)
            save = done or (step + 1) % config.save_every == 0
            if save or (step + 1) % 10 == 0:
                health.check()
                bar.set_postfix(loss=f"{loss.item():.3f}")
            if save:
                saver.begin(step + 1, state.collect(to_checkpoint()), recipe)
            if done:
                break
    return ema


def main(argv: list[str]) -> None:
    began = time.perf_counter()
    args = parse(argv)
    world = parallel.ranks()[1]
    must(world == 1, f"torchrun must start 1 process of ladd.lcm (got {world})")
    run = Path(args.run)
    made = read_config(run)
    given = {name: getattr(args, name) for name in FIELDS if getattr(args, name) is not None}
    # The teacher computes in the precision of the run: --teacher-fp8 is an option of LADD alone.
    config = validated(replace(made, device=args.device, teacher_fp8=False, **given))
    out = Path(args.out or run / "lcm")
    parts = [run / name for name in ("", "checkpoints", "data", "samples")]
    must(not (out / "config.json").exists() and out.resolve() not in map(Path.resolve, parts),
         f"--out must not be the folder of a run (got {out})")
    compute = compute_of(config)
    path = Path(config.teacher or run / "checkpoints" / "teacher.safetensors")
    base = load_teacher(path, needs_of(config), compute.ops)
    latents = read_data(config, run, made.seed, base.config)
    recipe = {"teacher": checkpoint.fingerprint(path), "path_steps": args.path_steps,
              "latents": config.data == "toy" or fingerprint(config.data or run / "data"),
              **{name: getattr(config, name) for name in ("steps", "lr", "batch", "seed")}}
    teacher = inference(base, compute)
    stopper = Stopper()
    with locked(out):
        ema = train(config, args.path_steps, base, teacher, compute, latents,
                    state.Saver(out / "checkpoints"), recipe, stopper)
        if stopper:
            return print(f"{stopper.signal}: saved in {out / 'checkpoints'}; the same command "
                         "resumes")
        stopper.end()
        student = out / "student.safetensors"
        depth = config.student_depth or base.config.depth
        origin = path.name
        if depth != base.config.depth:
            origin += f", {depth} of its blocks taken evenly"
        save_network(ema, shrunk(base, depth)[1], student,
                     config.recipe.metadata("student", config.real), origin)
        print(f"{student}: {config.steps} steps of {config.batch} pairs, "
              f"{time.perf_counter() - began:.0f} s")
        if not config.real:
            toy, recipe = toy_of(config), config.recipe
            network = inference(checkpoint.load_mmdit(student, compute.ops), compute)
            rows = [teacher_row(teacher, recipe),
                    *student_rows("consistency student", network, recipe)]
            about = {"seeds": [config.seed], "steps": config.steps, "batch": config.batch}
            write_toy_report(rows, toy, toy_codec(toy), config.n, config.sample_batch, out, about,
                             began)


if __name__ == "__main__":
    run_script("ladd.lcm", main)
