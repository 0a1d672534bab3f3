"""Trains a teacher on the built-in world, lets it generate latents, distills a student by LADD, and reports.

    python train.py                              tiny without CUDA, shapes with it
    python train.py --preset tiny --seed 1 --name tiny-1
    python train.py --dry-run                    sizes and costs, nothing written

With an SD3 checkpoint the teacher is loaded, and prompts come from a file:

    python train.py --preset sd3.5-medium --teacher FILE --encoders FOLDER --prompts FILE

Everything lies in runs/<name>/. Stages that are done are skipped;
the same command again resumes; Ctrl-C saves first.
The file reads top to bottom: device, networks, teacher, synthetic data, distillation, report.
"""
import copy
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import kernels
from kernels import Kernels
from ladd import checkpoint, cost, data, encode, evaluate, feed, flow, metrics, report, shapes, speed, synthesize
from ladd.config import SCHEDULES, Config, InputError, parse_config, run_script
from ladd.discriminator import Discriminator, DiscriminatorConfig
from ladd.distill import (DistillConfig, Fake, Text, draw, fake_pass, flow_loss, grid_of, heads_loss,
                          student_loss, taps_of)
from ladd.domain import Domain, sd3_domain, world_domain
from ladd.evaluate import (BEST, VALIDATION, draw_prompts, given_prompts, make_reference, report_prompts,
                           world_latents)
from ladd.feed import Feed, Part, moved
from ladd.fp8 import in_fp8
from ladd.mmdit import MMDiT, MMDiTConfig, shrunk
from ladd.parallel import ranks
from ladd.run import (Log, Stopped, Stopper, check_finite, compute_dtype, device_name, frozen, memory_gb,
                      open_run, pick_device, pick_kernels, progress)



# --- networks ---

def ops_of(config: Config) -> Kernels:
    return pick_kernels(config.kernels, config.device, config.precision)


def teacher_config(config: Config) -> MMDiTConfig:
    patches = max(max(hw) for hw in config.hw) // 16                          # codec 8, patch 2
    return MMDiTConfig(config.depth, config.width, config.text_dim, config.pooled_dim or config.text_dim,
                       qk_norm=config.qk_norm, dual_blocks=tuple(range(config.dual_blocks)),
                       pos_grid=config.pos_grid or patches, predicts=config.predicts)


def distill_config(config: Config) -> DistillConfig:
    return DistillConfig(config.levels, config.probs, config.easy_steps, config.shift,
                         config.d_mean, config.d_std, config.shared_noise, config.misaligned,
                         config.misaligned_at, config.r1_weight, config.r1_sigma, config.distill_weight)


def compiled(model: MMDiT, config: Config, device: torch.device) -> MMDiT:
    """Each block compiled by itself, in place:
    one small graph serves all blocks, and every image size gets its own."""
    if config.compile == "on" or config.compile == "auto" and device.type == "cuda":
        for block in model.joint_blocks:
            block.compile(fullgraph=True)
    return model


def inference(model: MMDiT, config: Config, device: torch.device) -> MMDiT:
    return compiled(frozen(model, compute_dtype(config.precision, device), device), config, device)


def save_every(config: Config, folder: Path, step: int, done: int, stopper: Stopper, state,
               **terms: Tensor) -> None:
    """Saves at the interval, and on a signal or --stop-after before it raises Stopped. `done`: steps of this
    process. What is saved has been looked at: a loss or gradient norm among `terms` that is no number stops
    the run instead."""
    stop = bool(stopper) or config.stop_after and done >= config.stop_after
    if stop or step % config.save_every == 0:
        check_finite(step, **{name: term.item() for name, term in terms.items()})
        checkpoint.save_state(folder, step, *state())
    if stop:
        raise Stopped(f"{stopper.signal or '--stop-after'}: saved step {step} in {folder}; "
                      "the same command resumes")


# --- stage 1: teacher ---

def load_teacher(config: Config, path: Path) -> MMDiT:
    """The teacher in `path`, checked against the run:
    text width, channels, patch, positions, taps, student's depth."""
    teacher = checkpoint.load_mmdit(path, ops_of(config))
    want = teacher_config(config)
    text = () if config.real else ("context_dim", "pooled_dim")
    for name in (*text, "in_channels", "out_channels", "patch"):
        found, expected = getattr(teacher.config, name), getattr(want, name)
        if found != expected:
            raise InputError(f"{path}: found {name} {found}, the run takes {expected} "
                             "(text widths: --text-dim)")
    patches = max(max(hw) for hw in config.hw) // 16
    if teacher.config.pos_grid < patches:
        raise InputError(f"{path}: found positions for {teacher.config.pos_grid} patches a side, "
                         f"--sizes takes {patches}")
    if config.taps[-1] >= teacher.config.depth or config.student_depth > teacher.config.depth:
        raise InputError(f"{path}: --taps {','.join(map(str, config.taps))} and "
                         f"--student-depth {config.student_depth}: "
                         f"the teacher has {teacher.config.depth} block{'s' * (teacher.config.depth > 1)}")
    return teacher


def load_data(config: Config, path: Path, teacher: MMDiTConfig) -> data.Latents:
    """The latents in `path`, checked against the run: channels, text widths, a batch of every size."""
    latents = data.read_folder(path)
    found = latents.context.shape[-1], latents.pooled.shape[-1]
    wanted = teacher.context_dim, teacher.pooled_dim
    if found != wanted:
        raise InputError(f"{path}: found text of widths {found} (tokens, pooled), the teacher reads {wanted}")
    for hw, (x0, _) in latents.buckets.items():
        if x0.shape[1] != 16 or len(x0) - latents.holdout < config.batch:
            raise InputError(f"{path}: found {len(x0)} latents of {x0.shape[1]} channels and size "
                             f"{hw[0]}x{hw[1]}, 16 channels and at least --batch {config.batch} beside "
                             f"{latents.holdout} held out expected")
    return latents


def train_teacher(config: Config, run: Path, device: torch.device, stopper: Stopper) -> MMDiT:
    """Flow matching on renders; AdamW with a cosine schedule.
    Skipped where the run has its teacher or --teacher names one."""
    done = run / "checkpoints" / "teacher.safetensors"
    if config.teacher or done.exists():
        return load_teacher(config, Path(config.teacher or done))
    torch.manual_seed(config.seed)
    model = MMDiT(teacher_config(config), ops_of(config), compute_dtype(config.precision, device)).to(device)
    params = list(model.parameters())
    optimizer = torch.optim.AdamW(params, config.teacher_lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    folder, start = run / "checkpoints" / "teacher", 0
    if state := checkpoint.load_state(folder):
        start, tensors, _ = state
        model.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items()
                               if k.startswith("model.")})
        checkpoint.load_optimizer(optimizer, "opt.", tensors)
    latents = world_latents(config, config.teacher_images, config.seed)
    null = Text(*(t.to(device) for t in latents.null))
    compiled(model, config, device)
    log, bar, since = (Log(run, "teacher", start), progress("teacher", config.teacher_steps, start),
                       time.perf_counter())
    def make(step: int) -> tuple[Tensor, ...]:
        """x0, noise, levels, text and which captions are left out, of one step."""
        batch = latents.batch(0 if config.overfit_one_batch else step, config.teacher_batch, config.seed)
        g, n = flow.generator(config.seed, 1, step), len(batch.x0)
        empty = torch.rand(n, generator=g) < config.text_dropout
        sigma = flow.logit_normal_mixture(n, config.teacher_means, 1.0, g)
        return batch.x0, torch.randn(batch.x0.shape, generator=g), sigma, batch.context, batch.pooled, empty

    steps = range(start, config.teacher_steps)
    for step, (x0, eps, sigma, *text, empty) in zip(steps, Feed(make, ((i,) for i in steps), device)):
        text = Text(torch.where(empty[:, None, None], null.context, text[0]),
                    torch.where(empty[:, None], null.pooled, text[1]))
        loss = flow_loss(model, x0, eps, sigma, text).mean()
        rate = (min(1, (step + 1) / max(1, config.warmup))
                * (1 + math.cos(math.pi * step / config.teacher_steps)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = config.teacher_lr * rate
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(params, config.clip)
        optimizer.step()
        bar.update()
        if (step + 1) % config.log_every == 0:
            line = {"loss": loss.item(), "grad_norm": norm.item()}
            check_finite(step + 1, **line)
            log.write(step + 1, **line, seconds=time.perf_counter() - since)
            bar.set_postfix(loss=f"{line['loss']:.3f}", gb=f"{memory_gb(device):.1f}")
        save_every(config, folder, step + 1, step + 1 - start, stopper, lambda: (
            {**{"model." + k: v for k, v in model.state_dict().items()},
             **checkpoint.optimizer_tensors(optimizer, "opt.")}, {}), loss=loss, norm=norm)
    bar.close()
    checkpoint.save_mmdit(model, done, describe(config, "teacher"))
    return model


# --- stage 2: synthetic data ---

def make_data(config: Config, run: Path, teacher: MMDiT, domain: Domain, device: torch.device,
              stopper: Stopper) -> data.Latents:
    """Latents that the teacher generates with guidance, from captions of the world or the run's prompts;
    skipped where --data names a folder."""
    if config.data:
        return load_data(config, Path(config.data), teacher.config)
    if config.real:
        prompts, _ = encode.read_prompts(config.prompts)
        plan = synthesize.prompt_plan(prompts, config.hw, config.data_size, config.data_batch, config.seed)
    else:
        plan = synthesize.world_plan(config)
    whole = synthesize.synthesize(
        run / "data", plan, teacher, lambda model: inference(model, config, device), domain,
        config.sample_steps, config.shift, config.guidance, config.eval_batch,
        *((torch.bfloat16, 256) if config.real else (torch.float32, 1024)), lambda: bool(stopper))
    if not whole:
        raise Stopped(f"{stopper.signal}: shards saved in {run / 'data'}; the same command resumes")
    return load_data(config, run / "data", teacher.config)


# --- stage 3: distillation ---

def make_heads(config: Config, teacher: MMDiT) -> Discriminator:
    sizes = DiscriminatorConfig(config.taps, teacher.config.width, teacher.config.pooled_dim,
                                config.head_width)
    return Discriminator(sizes, ops_of(config))


def learning_rate(config: Config, step: int, steps_taken: int) -> float:
    """Factor of a learning rate: linear warm-up over the steps that this network has taken, constant,
    linear to 0 over the last `decay` of the student's steps. `step` is the student's count, negative while
    the heads train alone."""
    left = (config.steps - max(step, 0)) / max(1, config.decay * config.steps)
    return min(1, (steps_taken + 1) / max(1, config.warmup), left)


class Players(NamedTuple):
    """Who takes part in a step."""
    student: MMDiT
    ema: MMDiT
    teacher: MMDiT
    heads: Discriminator
    opt_g: torch.optim.Optimizer
    opt_d: torch.optim.Optimizer


def make_players(config: Config, base: MMDiT, device: torch.device) -> Players:
    """Student and average in fp32 from the teacher `base`, the frozen teacher, new heads, two AdamWs."""
    teacher = inference(base, config, device)
    if config.teacher_fp8:
        in_fp8(teacher)
    student = shrunk(base, config.student_depth or base.config.depth).float().to(device)
    student.compute_dtype = compute_dtype(config.precision, device)
    heads = make_heads(config, base).to(device)
    ema = copy.deepcopy(student).requires_grad_(False)
    adam = dict(betas=(config.beta1, config.beta2), weight_decay=0.0, fused=True)
    return Players(student, ema, teacher, heads, torch.optim.AdamW(student.parameters(), config.lr, **adam),
                   torch.optim.AdamW(heads.parameters(), config.heads_lr, **adam))


def step_keys(config: Config, start: int, total: int) -> Iterator[tuple[int, int]]:
    """(iteration, heads' step) of every batch from iteration `start` on."""
    return ((it, j) for it in range(start, total) for j in range(config.heads_steps))


def step_parts(config: Config, dc: DistillConfig, latents: data.Latents, it: int, j: int) -> list[Part]:
    """This process's micro-batches for the j-th heads' step of iteration `it`; every one has its own batch."""
    return feed.parts(latents, 0 if config.overfit_one_batch else it * config.heads_steps + j,
                      max(it - config.heads_first, 0), (config.seed, 2, it, j), config.seed, config.batch,
                      config.micro(1), dc)


def heads_step(config: Config, dc: DistillConfig, p: Players, parts: list[Part], share: bool,
               lap: Callable[[str], None] = lambda name: None):
    """(loss_d, gradient norm, stats, fakes) of one step of the heads on the micro-batches `parts`.

    With `share` the student's step follows on the same fakes, so their graphs stay alive: one teacher forward
    serves both losses. With accumulation a graph a micro-batch would cost the memory that accumulation saves:
    the student's step then makes its own, as it does in the common schedule (--schedule two-forward).
    """
    share = share and len(parts) == 1 and config.schedule == "one-forward"
    p.opt_d.zero_grad()

    def backward(part: Part) -> tuple[Tensor, dict[str, Tensor], Fake | None]:
        with torch.set_grad_enabled(share):
            fake = fake_pass(p.student, p.teacher, p.heads, part.x0, part.text, part.draws, dc)
        lap("fake, forward")
        loss_d, stats = heads_loss(p.teacher, p.heads, part.x0, part.text, part.wrong, fake.feats, part.draws,
                                   dc)
        (loss_d / len(parts)).backward()
        lap("real forward, heads")
        return loss_d.detach(), stats, fake if share else None

    losses, stats, fakes = zip(*map(backward, parts))       # a function: what a part leaves is freed
    norm = torch.nn.utils.clip_grad_norm_(list(p.heads.parameters()), config.clip)
    p.opt_d.step()
    lap("heads' optimizer")
    return sum(losses) / len(parts), norm, stats[-1], list(fakes)


def student_step(config: Config, dc: DistillConfig, p: Players, parts: list[Part], fakes: list[Fake | None],
                 lap: Callable[[str], None] = lambda name: None):
    """(stats, gradient norm) of the student's step on the micro-batches of the last heads' step, which takes
    their `fakes` away; moves the average too."""
    params = list(p.student.parameters())
    p.opt_g.zero_grad()

    def backward(part: Part) -> dict[str, Tensor]:
        fake = fakes.pop(0) or fake_pass(p.student, p.teacher, p.heads, part.x0, part.text, part.draws, dc)
        lap("fake, forward")
        loss_g, stats = student_loss(p.heads, part.text, fake, part.draws, dc, grid_of(p.teacher, part.x0))
        (loss_g / len(parts)).backward(inputs=params)       # the heads get nothing from the student's loss
        lap("heads again, backward to the student")
        return stats

    stats = [backward(part) for part in parts][-1]
    norm = torch.nn.utils.clip_grad_norm_(params, config.clip)
    p.opt_g.step()
    torch._foreach_lerp_(list(p.ema.parameters()), params, 1 - config.ema)
    lap("student's optimizer, average")
    return stats, norm


def distill(config: Config, run: Path, base: MMDiT, latents: data.Latents, domain: Domain,
            device: torch.device, stopper: Stopper) -> None:
    """LADD: heads' steps and student steps in turn; writes checkpoints/student.safetensors,
    the best by the metric while training, the last where there is no metric (real prompts)."""
    out = run / "checkpoints" / "student.safetensors"
    if out.exists():
        return
    torch.manual_seed(config.seed + 1)
    dc, p = distill_config(config), make_players(config, base, device)
    student, ema, teacher, heads, opt_g, opt_d = p

    # resume: every random draw is a function of the step,
    # so weights, optimizers and the best value are all there is
    networks = {"student": student, "ema": ema, "heads": heads}
    folder, start, best = run / "checkpoints" / "distill", 0, math.inf
    if state := checkpoint.load_state(folder):
        start, tensors, meta = state
        best = meta["best"]
        for name, network in networks.items():
            network.load_state_dict({k.removeprefix(name + "."): v for k, v in tensors.items()
                                     if k.startswith(name + ".")})
        (checkpoint.load_optimizer(opt_g, "opt_g.", tensors),
         checkpoint.load_optimizer(opt_d, "opt_d.", tensors))
    else:
        calibrate(config, dc, teacher, heads, latents, device)
    compiled(student, config, device)

    def state():
        tensors = {f"{name}.{k}": v for name, network in networks.items()
                   for k, v in network.state_dict().items()}
        return {**tensors, **checkpoint.optimizer_tensors(opt_g, "opt_g."),
                **checkpoint.optimizer_tensors(opt_d, "opt_d.")}, {"best": best}

    if config.real:
        shown, reference = given_prompts(config, report_prompts(config)), None
    else:
        shown = draw_prompts(config, 4 * len(config.hw), VALIDATION)
        prompts = draw_prompts(config, config.eval_n, BEST)
        reference = make_reference(config, prompts, config.eval_n, VALIDATION)
    viewer = inference(ema, config, device)
    total = config.heads_first + config.steps                  # the first steps move the heads alone
    # the evaluation at `start` comes after its state
    log, evals = Log(run, "distill", start), Log(run, "eval", start - 1)
    bar, since = progress("distill", total, start), time.perf_counter()
    stream = Feed(partial(step_parts, config, dc, latents), step_keys(config, start, total), device)
    batches = iter(stream)
    for it in range(start, total + 1):
        step = it - config.heads_first                         # the student's own count
        every = lambda n: n and (step >= 0 and step % n == 0 or it == total)
        if every(config.grid_every) or every(config.eval_every):
            viewer.load_state_dict(ema.state_dict())
        if every(config.grid_every):
            evaluate.save_grid(config, domain, viewer, shown, run / "samples" / f"{step:06d}.png")
        if every(config.eval_every):
            values = evaluate.quality(config, domain, viewer, prompts, reference) if reference else {}
            values |= evaluate.duel(viewer, teacher, heads, latents, dc, config.eval_batch)
            evals.write(it, **values)
            bar.write(f"step {step:5d}  " + "  ".join(
                f"{k} {v:.3f}" for k, v in values.items() if k.startswith(("fd_", "prompt", "auc"))))
            if reference and values["fd_1"] + values[f"fd_{len(config.levels)}"] < best:
                best = values["fd_1"] + values[f"fd_{len(config.levels)}"]
                checkpoint.save_mmdit(ema, out.with_name("best.safetensors"), describe(config, "student"))
        if it == total:
            break
        if config.profile and it == max(start, total - 3):
            profiler = torch.profiler.profile()
            profiler.start()

        opt_g.param_groups[0]["lr"] = config.lr * learning_rate(config, step, max(step, 0))
        opt_d.param_groups[0]["lr"] = config.heads_lr * learning_rate(config, step, it)
        for j in range(config.heads_steps):
            share, parts = step >= 0 and j == config.heads_steps - 1, next(batches)
            loss_d, norm_d, stats, fakes = heads_step(config, dc, p, parts, share)
        if step >= 0:
            stats_g, norm_g = student_step(config, dc, p, parts, fakes)

        bar.update()
        if (it + 1) % config.log_every == 0:
            line = {"loss_d": loss_d.item(), "norm_d": norm_d.item(), **duel_line(stats)}
            if step >= 0:
                line |= {"loss_g": stats_g["loss_g"].item(), "loss_distill": stats_g["loss_distill"].item(),
                         "norm_g": norm_g.item()}
            check_finite(it + 1, **line)
            log.write(it + 1, **line, seconds=time.perf_counter() - since, waited=stream.waited,
                      gb=memory_gb(device))
            bar.set_postfix({k: f"{line[k]:.2f}" for k in ("loss_d", "loss_g") if k in line},
                            gb=f"{memory_gb(device):.1f}")
        terms = {"loss_d": loss_d, "norm_d": norm_d} | (
            {"loss_g": stats_g["loss_g"], "norm_g": norm_g} if step >= 0 else {})
        save_every(config, folder, it + 1, it + 1 - start, stopper, state, **terms)
    bar.close()
    if config.profile and start < total:
        profiler.stop()
        profiler.export_chrome_trace(config.profile)
        print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=15,
                                            max_name_column_width=40))
    checkpoint.save_mmdit(ema, out.with_name("last.safetensors"), describe(config, "student"))
    kept = out.with_name("best.safetensors")
    os.replace(kept if kept.exists() else out.with_name("last.safetensors"), out)


def duel_line(stats: dict[str, Tensor]) -> dict[str, float]:
    """The duel on the training batch: active margins and accuracy of the heads, and the mean logits' gap."""
    real, fake = stats["logits_real"], stats["logits_fake"]
    margins, accuracies = metrics.active_margins(real, fake), metrics.accuracy(real, fake)
    line = {"margin_real": margins[0], "margin_fake": margins[1],
            "accuracy_real": accuracies[0], "accuracy_fake": accuracies[1],
            "gap": real.mean() - fake.mean(), "loss_r1": stats["loss_r1"]}
    if stats["logits_misaligned"] is not None:
        line["accuracy_misaligned"] = (stats["logits_misaligned"] < 0).float().mean()
    return {k: v.item() for k, v in line.items()}


def calibrate(config: Config, dc: DistillConfig, teacher: MMDiT, heads: Discriminator,
              latents: data.Latents, device) -> None:
    """Sets the heads' standardisation from one batch of renoised reals."""
    batch = moved(latents.batch(0, config.batch, config.seed, latents.holdout), device)
    drawn = draw(batch.x0, dc.easy_steps, dc, (config.seed, 3))
    xt = flow.noised(batch.x0, drawn.eps_r, drawn.sigma_r)
    with torch.no_grad():
        heads.calibrate(taps_of(teacher, heads, xt, drawn.sigma_r, Text(batch.context, batch.pooled)))


def describe(config: Config, role: str) -> dict[str, str]:
    """What sampling needs beside the weights; levels are unshifted."""
    listed = lambda values: ",".join(map(str, values))
    return {"role": role, "domain": "sd3" if config.real else "world", "levels": listed(config.levels),
            "shift": str(config.shift),
            "sampler": config.sampler, "guidance": str(config.guidance),
            "sample_steps": str(config.sample_steps), "objects": str(config.objects),
            "text_dim": str(config.text_dim), "sizes": listed(config.sizes)}


# --- stage 4: report ---

def write_report(config: Config, run: Path, base: MMDiT, domain: Domain, device: torch.device,
                 seconds: dict[str, float]) -> None:
    """report.json and report.png of the run's student beside its teacher and the untrained student."""
    start = time.perf_counter()
    stored = checkpoint.load_mmdit(run / "checkpoints" / "student.safetensors", ops_of(config))
    networks = (base, stored, shrunk(base, stored.config.depth))
    evaluate.compare(config, run, domain, *(inference(network, config, device) for network in networks),
                     seconds, start)


def dry_run(config: Config, device: torch.device) -> None:
    """Prints the resolved configuration, parameters, memory, FLOPs, hours and disk; allocates nothing."""
    ops, dtype = ops_of(config), compute_dtype(config.precision, device)
    sizes = load_teacher(config, Path(config.teacher)).config if config.teacher else teacher_config(config)
    with torch.device("meta"):
        teacher = MMDiT(sizes, ops, dtype).to(dtype).requires_grad_(False)
        student = shrunk(MMDiT(sizes, ops, dtype), config.student_depth or sizes.depth)
        heads = make_heads(config, teacher)
    tokens = 77 + config.t5_tokens if config.real else shapes.max_words(config.objects)
    prompts = encode.read_prompts(config.prompts)[0] if config.prompts else None
    print("\n".join(f"{k}: {v}" for k, v in asdict(config).items()) + "\n")
    print("\n".join(cost.plan(config, student, teacher, heads, distill_config(config), tokens,
                              len(set(prompts)) if prompts else config.data_size, device)))


def bench(config: Config, device: torch.device) -> None:
    """Times --bench-steps LADD steps of random networks on random latents, under both schedules in turn."""
    ops, (h, w), n = ops_of(config), config.hw[0], 2 * config.batch
    tokens = 77 + config.t5_tokens if config.real else shapes.max_words(config.objects)
    torch.manual_seed(config.seed)
    with device:
        base = MMDiT(teacher_config(config), ops, compute_dtype(config.precision, device))
    c = base.config
    text = torch.randn(n, tokens, c.context_dim).bfloat16(), torch.randn(n, c.pooled_dim).bfloat16()
    x0 = torch.randn(n, 16, h // 8, w // 8)
    latents = data.Latents([str(i) for i in range(n)], *text, torch.arange(n)[:, None],
                           (text[0][0], text[1][0]), {(h // 8, w // 8): (x0, torch.arange(n))}, {})
    dc, p = distill_config(config), make_players(config, base, device)
    calibrate(config, dc, p.teacher, p.heads, latents, device)
    compiled(p.student, config, device)
    with torch.device("meta"):
        meta = [MMDiT(c, kernels.load("torch")).to(p.teacher.compute_dtype) for _ in range(2)]
        heads = Discriminator(p.heads.config, kernels.load("torch"))

    def step(schedule: str, it: int, lap: Callable[[str], None] = lambda name: None) -> None:
        run = replace(config, schedule=schedule, heads_first=0)
        for j in range(run.heads_steps):
            parts = moved(step_parts(run, dc, latents, it, j), device)
            lap("batch and noise")
            fakes = heads_step(run, dc, p, parts, j == run.heads_steps - 1, lap)[-1]
        student_step(run, dc, p, parts, fakes, lap)

    seconds = speed.interleaved({s: partial(step, s) for s in SCHEDULES}, config.bench_steps, device)
    peak, rows = speed.peak_flops(device_name(device)), []
    for schedule in SCHEDULES:
        with speed.forwards(student=p.student, teacher=p.teacher) as count:
            laps = speed.Laps(device)
            step(schedule, 0, laps)
        costs = cost.step_cost(*meta, heads, (16, h // 8, w // 8), (tokens, c.context_dim),
                               config.batch // config.accumulate, dc, schedule)
        flops = costs["flops_step"] + (config.heads_steps - 1) * costs["flops_heads_step"]
        flops *= config.accumulate
        rate = flops / seconds[schedule]
        rows.append({"schedule": schedule, "pairs_per_second": config.batch / seconds[schedule],
                     "seconds": seconds[schedule], "flops": flops, "mfu": rate / peak if peak else None,
                     "forwards": count, "memory_gb": memory_gb(device), "bytes_saved": costs["bytes_saved"],
                     "stages": {k: v / sum(laps.seconds.values()) for k, v in laps.seconds.items()}})
    gain = rows[0]["pairs_per_second"] / rows[1]["pairs_per_second"]
    print(json.dumps({"preset": config.preset, "device": device_name(device), "versions": report.versions(),
                      "commit": report.commit(), "batch": config.batch, "accumulate": config.accumulate,
                      "size": config.sizes[0], "gain": gain, "rows": rows}, indent=1))


# --- main ---

def main(argv: list[str]) -> None:
    default = "shapes" if torch.cuda.is_available() else "tiny"
    config = parse_config(argv, default, __doc__)
    device = pick_device(config.device)
    if ranks()[1] > 1:
        raise InputError(f"torchrun: found {ranks()[1]} processes, one accepted; sample.py --save-latents "
                         "takes more, and --data what they made")
    if not any(a.startswith("--preset") for a in argv):
        print(f"preset {config.preset}: "
              f"{'a CUDA device was' if default == 'shapes' else 'no CUDA device was'} found")
    if config.teacher_fp8 and compute_dtype(config.precision, device) != torch.bfloat16:
        raise InputError(f"--teacher-fp8: found --precision {config.precision} on {device}, bf16 accepted")
    if config.teacher_fp8 and device.type == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        raise InputError(f"--teacher-fp8: found {torch.cuda.get_device_name()}, compute capability 9.0 accepted")
    if config.dry_run:
        return dry_run(config, device)
    if config.bench_steps:
        return bench(config, device)
    for path, what in ((config.teacher, "--teacher"), (config.data, "--data")):
        if path and not Path(path).exists():
            raise InputError(f"{what}: {path} does not exist")
    # all are looked at before the run folder is made: a failed attempt does not take the name from the next
    for path in filter(None, (config.prompts, config.eval_prompts)):
        for note in encode.read_prompts(path)[1]:
            print(note)
    sizes = load_teacher(config, Path(config.teacher)).config if config.teacher else teacher_config(config)
    if config.data:
        load_data(config, Path(config.data), sizes)
    domain = (sd3_domain(config.encoders, device, config.t5, config.t5_tokens,
                         Path("runs") / config.run_name / "text.safetensors") if config.real
              else world_domain(config))
    if domain.widths != (sizes.context_dim, sizes.pooled_dim):
        raise InputError(f"--encoders {config.encoders}: found text of widths {domain.widths}, the "
                         f"teacher reads {(sizes.context_dim, sizes.pooled_dim)} (tokens, pooled)")
    run, stopper = open_run(config), Stopper()
    print(f"{run}: {device_name(device)}, {compute_dtype(config.precision, device)}")
    clock = run / "seconds.json"
    seconds = data.read_json(clock) if clock.exists() else {}

    def timed(name: str, stage, *args):
        """Runs a stage; its seconds add up over all processes of the run."""
        start = time.perf_counter()
        try:
            return stage(config, run, *args)
        finally:
            seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start
            data.publish(clock, lambda path: data.write_json(path, seconds))

    teacher = timed("teacher", train_teacher, device, stopper)
    latents = timed("data", make_data, teacher, domain, device, stopper)
    timed("distill", distill, teacher, latents, domain, device, stopper)
    if not (run / "report.json").exists():
        write_report(config, run, teacher, domain, device, seconds)


if __name__ == "__main__":
    try:
        run_script("train.py", main)
    except Stopped as stopped:
        print(stopped)
