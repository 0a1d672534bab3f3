"""Trains a teacher on the built-in world, lets it generate latents, distills a student by LADD, and reports.

    python train.py                              preset tiny, on every device
    python train.py --preset tiny --seed 1 --name tiny-1
    python train.py --dry-run                    sizes and costs, nothing written

With an SD3 checkpoint the teacher is loaded, and prompts come from a file:

    python train.py --preset sd3.5-medium --teacher FILE --encoders FOLDER --prompts FILE

On several GPUs or nodes, the same under torchrun:

    torchrun --nproc-per-node 8 train.py --preset sd3.5-large ...

Everything lies in runs/<name>/. Stages that are done are skipped;
the same command again resumes, on any number of processes; Ctrl-C saves first.
The file reads top to bottom: teacher, synthetic data, distillation, report. The step itself: ladd/step.py.
"""
import math
import os
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ladd import (checkpoint, cost, data, encode, evaluate, flow, metrics, parallel, speed, state,
                  synthesize)
from ladd.config import Config, InputError, parse_config, run_script
from ladd.distill import Text, TextImage, flow_loss
from ladd.domain import Domain, sd3_domain, world_domain
from ladd.evaluate import (BEST, VALIDATION, Prompts, draw_prompts, make_reference, shown_prompts,
                           world_latents)
from ladd.feed import Feed
from ladd.inputs import load_data, load_pairs, load_teacher, sizes_of, start_of, teacher_of
from ladd.mmdit import MMDiT, shrunk
from ladd.parallel import Watch, agree, ranks
from ladd.run import (Health, Log, Stopped, Stopper, compute_dtype, device_name, memory_gb, open_run,
                      pick_device, progress)
from ladd.step import (Layout, calibrate, check_lora, distill_config, inference, kept, ladd_step,
                       lay_out, lcm_step, learning_rate, make_players, moments, network, on_meta,
                       ops_of, plan_in_words, refresh, save_network, step_keys, step_parts,
                       tokens_of, trained)


def save_every(config: Config, saver: state.Saver, health: Health, step: int, done: int, stopper: Stopper,
               tensors, meta) -> None:
    """Saves at the interval, and on a signal or --stop-after before it raises Stopped. `done`: steps of this
    process. What is saved has been looked at: a loss or gradient that is no number stops the run instead."""
    wish = bool(stopper) or bool(config.stop_after and done >= config.stop_after)
    stop, unwritten = agree((wish, not saver.written))
    if not unwritten:
        saver.publish()
    if stop or step % config.save_every == 0:
        look(health, saver)
        saver.begin(step, tensors(), meta)
    if stop:
        saver.finish()
        reason = stopper.signal or ("--stop-after" if done == config.stop_after else "a signal elsewhere")
        raise Stopped(f"{reason}: saved step {step} in {saver.folder}; the same command resumes")


def look(health: Health, saver: state.Saver) -> None:
    """Stops a run whose losses or gradients are no numbers, the state before them on disk."""
    try:
        health.look()
    except FloatingPointError:
        saver.finish()
        raise


# --- stage 1: teacher ---

def train_teacher(config: Config, run: Path, pairs: data.Latents | None, layout: Layout,
                  stopper: Stopper) -> MMDiT:
    """Flow matching on renders or `pairs`; AdamW with a cosine schedule.
    Skipped where the run has its teacher or --teacher names one."""
    done, device, (rank, world) = teacher_of(config), layout.device, ranks()
    if done.exists():
        return load_teacher(config, done)
    sizes, untrained = start_of(config)
    model = network(sizes, untrained, config, layout, torch.float32, True, rank=config.teacher_lora,
                    also="x_embedder" if config.beside else "")
    optimizer = torch.optim.AdamW(trained(model).values(), config.teacher_lr, betas=(0.9, 0.99),
                                  weight_decay=0.01, fused=True)

    def tensors(saved: state.State | None = None) -> dict[str, Tensor]:
        weights = {f"model.{k}": v for k, v in kept(model, model).items()}
        return weights | moments(optimizer, model, "opt.", saved)

    saver, start = state.Saver(run / "checkpoints" / "teacher", rank, world, agree), 0
    meta = {"base": checkpoint.fingerprint(config.base) if config.base else ""}
    if saved := state.open_state(saver.folder):
        start = saved.step
        if saved.meta != meta:
            raise InputError(f"--base {config.base}: found another file than {saver.folder} began with; that "
                             "one or another --name accepted")
        state.fill(saved, tensors(saved))
    latents = pairs or world_latents(config, config.teacher_images, config.seed)
    exclude = latents.holdout if pairs else 0
    null = Text(*(t.to(device) for t in latents.null))
    share, micro = config.teacher_batch // world, config.micro(world, teacher=True)
    mine = slice(rank * share, (rank + 1) * share)

    def make(step: int) -> list[Tensor]:
        """x0, noise, levels, what decides who loses the text, and text, of this process's part of a step."""
        batch = latents.batch(0 if config.overfit_one_batch else step, config.teacher_batch, config.seed,
                              exclude)
        g, n = flow.generator(config.seed, 1, step), len(batch.x0)
        dropped = torch.rand(n, generator=g)
        sigma = flow.logit_normal_mixture(n, config.teacher_means, 1.0, g)
        eps = torch.randn(batch.x0.shape, generator=g)
        return [t[mine] for t in (batch.x0, eps, sigma, dropped, *batch.text)]

    def loss_of(x0: Tensor, eps: Tensor, sigma: Tensor, dropped: Tensor, *text: Tensor) -> Tensor:
        empty, bare = dropped < config.text_dropout, dropped < config.image_dropout
        text = (torch.where(empty[:, None, None], null.context, text[0]),
                torch.where(empty[:, None], null.pooled, text[1]), *text[2:])
        if config.task == "text":
            return flow_loss(model, x0, eps, sigma, Text(*text)).mean()
        text = TextImage(*text)
        if config.task == "edit":
            text = text._replace(image=text.image.masked_fill(bare[:, None, None, None], 0))
        return flow_loss(model, x0, eps, sigma, text).mean()

    log, health = Log(run, "teacher", start), Health()
    bar, since = progress("teacher", config.teacher_steps, start, quiet=rank), time.perf_counter()
    steps = range(start, config.teacher_steps)
    feed = Feed(make, ((i,) for i in steps), device)
    with Watch("teacher", config.timeout) as watch:
        for step, batch in zip(steps, feed):
            watch.reach(step)
            parts, loss = [*zip(*(t.split(micro) for t in batch))], 0.0
            for i, part in enumerate(parts, 1):
                parallel.accumulate(model, i == len(parts))
                part_loss = loss_of(*part) / len(parts)
                part_loss.backward()
                loss += part_loss.detach()
            rate = (min(1, (step + 1) / max(1, config.warmup))
                    * (1 + math.cos(math.pi * step / config.teacher_steps)) / 2)
            optimizer.param_groups[0]["lr"] = config.teacher_lr * rate
            norms = parallel.clip(model, config.clip)
            optimizer.step()
            optimizer.zero_grad()
            bar.update()
            health.note(step + 1, {"loss": loss}, {"": (model, norms)})
            if (step + 1) % config.log_every == 0:
                look(health, saver)
                line = parallel.mean({"loss": loss.item(), "grad_norm": norms.total.item()})
                log.write(step + 1, **line, seconds=time.perf_counter() - since)
                bar.set_postfix(loss=f"{line['loss']:.3f}", gb=f"{memory_gb(device):.1f}")
            save_every(config, saver, health, step + 1, step + 1 - start, stopper, tensors, meta)
        look(health, saver)
        saver.finish()
    bar.close()
    also = f" of {sizes.in_channels} input channels, with x_embedder of teacher.safetensors"
    save_network(model, untrained, done, describe(config, "teacher"),
                 Path(config.base).name + also * bool(config.beside))
    return load_teacher(config, done)


# --- stage 2: synthetic data ---

def make_data(config: Config, run: Path, teacher: MMDiT, pairs: data.Latents | None, domain: Domain,
              device: torch.device, stopper: Stopper) -> data.Latents:
    """Latents that the teacher generates with guidance, from captions of the world, the run's prompts, or
    the sources and instructions of `pairs`; skipped where --data names a folder."""
    if config.data:
        return load_data(config, Path(config.data), teacher.config, config.batch)
    if config.data_from == "world":
        return world_latents(config, config.data_size, config.seed + 1)
    if pairs:
        plan = synthesize.pairs_plan(pairs, config.data_size, config.data_batch, config.seed)
    elif config.real:
        prompts, _ = encode.read_prompts(config.prompts)
        plan = synthesize.prompt_plan(prompts, config.hw, config.data_size, config.data_batch, config.seed)
    else:
        plan = synthesize.world_plan(config)
    with Watch("data", config.timeout) as watch:
        whole = synthesize.synthesize(
            run / "data", plan, teacher, lambda model: inference(model, config, device), domain,
            config.sample_steps, config.shift, (config.guidance, config.image_guidance), config.eval_batch,
            *((torch.bfloat16, 256) if config.real else (torch.float32, 1024)), lambda: bool(stopper),
            watch.reach)
    if not whole:
        raise Stopped(f"{stopper.signal}: shards saved in {run / 'data'}; the same command resumes")
    return load_data(config, run / "data", teacher.config, config.batch)


# --- stage 3: distillation ---

def distill(config: Config, run: Path, base: MMDiT, latents: data.Latents, shown: list[Prompts],
            domain: Domain, layout: Layout, stopper: Stopper) -> None:
    """LADD, step by step; writes checkpoints/student.safetensors,
    the best by the metric while training, the last where there is no metric (real prompts).
    `shown`: of the grids."""
    out, device, (rank, world) = run / "checkpoints" / "student.safetensors", layout.device, ranks()
    if out.exists():
        return
    torch.manual_seed(config.seed + 1)
    dc, p, lcm = distill_config(config), make_players(config, base, layout), config.objective == "lcm"
    _, untrained = shrunk(base, config.student_depth or base.config.depth)
    origin = (Path(config.teacher or "teacher.safetensors").name
              + f", {config.student_depth} of its blocks taken evenly" * bool(config.student_depth))

    # resume: every random draw is a function of the step,
    # so weights, optimizers and the best value are all there is
    saver, start = state.Saver(run / "checkpoints" / "distill", rank, world, agree), 0
    meta = {"best": math.inf, "first": {}}       # the best distances yet; the first evaluation
    if saved := state.open_state(saver.folder):
        start, meta = saved.step, saved.meta
        state.fill(saved, p.tensors(saved))
    elif not lcm:
        calibrate(config, dc, p.teacher, p.heads, latents)

    reference = None
    if not config.real:
        prompts = draw_prompts(config, config.eval_n, BEST)
        reference = make_reference(config, prompts, config.eval_n, VALIDATION)
    viewer = p.ema if layout.mesh else inference(p.ema, config, device)
    first = 0 if lcm else config.heads_first                   # the first steps move the heads alone
    total, turns = first + config.steps, 1 if lcm else config.heads_steps
    null = Text(*(t.to(device) for t in latents.null))
    # the evaluation at `start` comes after its state
    log, evals, health = Log(run, "distill", start), Log(run, "eval", start - 1), Health()
    bar, pace = progress("distill", total, start, quiet=rank), speed.Pace(
        config, base.config, (16, config.hw[0][0] // 8, config.hw[0][1] // 8), device)
    stream = Feed(partial(step_parts, config, dc, latents), step_keys(start, total, turns), device)
    batches = iter(stream)
    with Watch("distill", config.timeout) as watch:
        for it in range(start, total + 1):
            step = it - first                                  # the student's own count
            every = lambda n: n and (step >= 0 and step % n == 0 or it == total)
            with pace.paused():
                if (every(config.grid_every) or every(config.eval_every)) and viewer is not p.ema:
                    refresh(viewer, p.ema, untrained)
                if every(config.grid_every):
                    evaluate.save_grid(config, domain, viewer, shown, run / "samples" / f"{step:06d}.png")
                if every(config.eval_every):
                    values = evaluate.quality(config, domain, viewer, prompts, reference) if reference else {}
                    if not lcm:
                        values |= evaluate.duel(viewer, p.teacher, p.heads, latents, dc, config.eval_batch)
                    values = parallel.mean(values)             # equal but for rounding: one for all
                    alarms = evaluate.alarms(values, meta["first"] or values)
                    evals.write(it, **values, **({"alarms": alarms} if alarms else {}))
                    bar.write(f"step {step:5d}  " + "  ".join(
                        f"{k} {v:.3f}" for k, v in values.items() if k.startswith(("fd_", "prompt", "auc"))))
                    meta["first"] = meta["first"] or values
                    warn(bar, step, alarms)
                    score = values["fd_1"] + values[f"fd_{len(config.levels)}"] if reference else math.inf
                    if score < meta["best"]:
                        meta["best"] = score
                        save_network(p.ema, untrained, out.with_name("best.safetensors"),
                                     describe(config, "student"), origin)
            if it == total:
                break
            if config.profile and it == max(start, total - 3):
                profiler = torch.profiler.profile()
                profiler.start()

            p.opt_g.param_groups[0]["lr"] = config.lr * learning_rate(config, step, max(step, 0))
            p.opt_d.param_groups[0]["lr"] = config.heads_lr * learning_rate(config, step, it)
            for j in range(turns):     # each has its own batch; the last updates the student too
                parts = next(batches)
                watch.reach(it)
                stats, norms = (lcm_step(config, p, parts, null) if lcm
                                else ladd_step(config, dc, p, parts, step >= 0 and j == turns - 1))
            losses = {k: v for k, v in stats.items() if k.startswith("loss")}

            bar.update()
            health.note(it + 1, losses, {name: (getattr(p, name), n) for name, n in norms.items()})
            if (it + 1) % config.log_every == 0:
                look(health, saver)
                line = {k: v.item() for k, v in losses.items()}
                line |= {f"norm_{'d' if name == 'heads' else 'g'}": n.total.item()
                         for name, n in norms.items()}
                line = parallel.mean(line) | ({} if lcm else duel_line(stats))
                line |= pace.line(stream.waited, config.log_every)
                alarms = evaluate.alarms(line) if step >= 0 else []
                log.write(it + 1, **line, **({"alarms": alarms} if alarms else {}))
                bar.set_postfix({k: f"{line[k]:.2f}" for k in ("loss_d", "loss_g") if k in line},
                                gb=f"{line['gb']:.1f}")
                warn(bar, step, alarms)
            save_every(config, saver, health, it + 1, it + 1 - start, stopper, p.tensors, meta)
        look(health, saver)
        saver.finish()
    bar.close()
    if config.profile and start < total:
        profiler.stop()
        profiler.export_chrome_trace(config.profile + f".{rank}" * bool(rank))
        if rank == 0:
            print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=15,
                                                max_name_column_width=40))
    save_network(p.ema, untrained, out.with_name("last.safetensors"), describe(config, "student"), origin)
    chosen = "best" if out.with_name("best.safetensors").exists() else "last"
    if rank == 0:
        for end in ("_lora", ""):              # the student last: once it is there, the stage is done
            if (made := out.with_name(f"{chosen}{end}.safetensors")).exists():
                os.replace(made, out.with_name(f"student{end}.safetensors"))
    agree()


def warn(bar, step: int, alarms: list[str]) -> None:
    """Print collapse warnings above the progress bar, whose name shows that there was one."""
    for alarm in alarms:
        bar.write(f"step {step}: warning: {alarm}")
        bar.set_description("distill!")


def duel_line(stats: dict[str, Tensor]) -> dict[str, float]:
    """The duel on the training batch of all processes: active margins and accuracy of the heads, and the mean
    logits' gap."""
    real, fake = stats["logits_real"], stats["logits_fake"]
    margins, accuracies = metrics.active_margins(real, fake), metrics.accuracy(real, fake)
    line = {"margin_real": margins[0], "margin_fake": margins[1],
            "accuracy_real": accuracies[0], "accuracy_fake": accuracies[1],
            "gap": real.mean() - fake.mean()}
    if (wrong := stats["logits_misaligned"]) is not None:
        right = (wrong < 0).float().mean((0, 2, 3))                         # [m] of the samples
        line |= {"accuracy_misaligned": right.sum(), "misaligned": len(right)}
    line = parallel.mean({k: float(v) for k, v in line.items()})
    # its samples lie unevenly: a process, or a small batch, may have none
    count, right = line.pop("misaligned", 0), line.pop("accuracy_misaligned", 0)
    return line | ({"accuracy_misaligned": right / count} if count else {})


def describe(config: Config, role: str) -> dict[str, str]:
    """What sampling needs beside the weights; levels are unshifted."""
    listed = lambda values: ",".join(map(str, values))
    return {"role": role, "domain": "sd3" if config.real else "world", "levels": listed(config.levels),
            "shift": str(config.shift),
            "sampler": config.sampler, "guidance": str(config.guidance),
            "sample_steps": str(config.sample_steps), "objects": str(config.objects),
            "text_dim": str(config.text_dim), "sizes": listed(config.sizes), "task": config.task,
            "image_guidance": str(config.image_guidance)}


# --- stage 4: report ---

def write_report(config: Config, run: Path, base: MMDiT, shown: list[Prompts], domain: Domain,
                 layout: Layout, seconds: dict[str, float]) -> None:
    """report.json and report.png of the run's student beside its teacher and the untrained student."""
    start, device = time.perf_counter(), layout.device
    student = checkpoint.load_mmdit(run / "checkpoints" / "student.safetensors", ops_of(config))
    weights = ((base.config, base.state_dict()), (student.config, student.state_dict()),
               shrunk(base, student.config.depth))
    networks = [network(*pair, config, layout, compute_dtype(config.precision, device), False,
                        layout.shard_teacher) for pair in weights]
    with Watch("report", config.timeout) as watch:
        evaluate.compare(config, run, shown, domain, *networks, seconds, start, watch.reach)


def dry_run(config: Config, device: torch.device) -> None:
    """Prints the resolved configuration, parameters, memory, FLOPs, hours and disk; allocates nothing."""
    sizes = sizes_of(config)
    check_lora(config, sizes)
    teacher, student, heads = on_meta(config, sizes, device)
    prompts = encode.read_prompts(config.prompts)[0] if config.prompts else None
    limit = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 80 * 10 ** 9
    print("\n".join(f"{k}: {v}" for k, v in asdict(config).items()) + "\n")
    print("\n".join(cost.plan(config, student, teacher, heads, distill_config(config), tokens_of(config),
                              len(set(prompts)) if prompts else config.data_size, device, limit)))


# --- main ---

def main(argv: list[str]) -> None:
    config = parse_config(argv, "tiny", __doc__)
    device, (rank, world) = pick_device(config.device), ranks()
    dtype = compute_dtype(config.precision, device)
    say = print if rank == 0 else lambda *words: None
    if device.type == "cuda" and not any(a.startswith("--preset") for a in argv):
        say("preset tiny: the default on every device; --preset shapes is the larger one for a GPU")
    if config.teacher_fp8 and dtype != torch.bfloat16:
        raise InputError(f"--teacher-fp8: found --precision {config.precision} on {device}, bf16 accepted")
    if config.teacher_fp8 and device.type == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        raise InputError(f"--teacher-fp8: found {torch.cuda.get_device_name()}, compute capability 9.0 "
                         "accepted")
    config.micro(world)
    if world > 1 and world % config.replicas:
        raise InputError(f"--replicas: found {config.replicas}, a divisor of the {world} processes accepted")
    if (not config.real or config.base) and not config.teacher:
        config.micro(world, teacher=True)
    if config.dry_run:
        return dry_run(config, device) if rank == 0 else None
    ops_of(config)                     # before anything is made: --kernels triton may end here
    for name in ("teacher", "base", "data", "pairs"):
        path, what = getattr(config, name), f"--{name}"
        if name == "base" and teacher_of(config).exists():
            continue                                                         # not read any more
        if path and not Path(path).exists():
            raise InputError(f"{what}: {path} does not exist")
    # all are looked at before the run folder is made: a failed attempt does not take the name from the next
    for path in filter(None, (config.prompts, config.eval_prompts)):
        for note in encode.read_prompts(path)[1]:
            say(note)
    sizes = sizes_of(config)
    check_lora(config, sizes)
    if config.data:
        load_data(config, Path(config.data), sizes, config.batch)
    parallel.start(device, config.timeout)
    layout = lay_out(config, sizes, device)
    if config.bench_steps:
        speed.bench(config, layout)
        return parallel.finish()
    domain = (sd3_domain(config.encoders, device, config.t5, config.t5_tokens,
                         Path("runs") / config.run_name / "text.safetensors") if config.real
              else world_domain(config))
    if domain.widths != (sizes.context_dim, sizes.pooled_dim):
        raise InputError(f"--encoders {config.encoders}: found text of widths {domain.widths}, the "
                         f"teacher reads {(sizes.context_dim, sizes.pooled_dim)} (tokens, pooled)")
    pairs = load_pairs(config, sizes, domain)
    shown = shown_prompts(config, pairs)
    run, stopper = Path("runs") / config.run_name, Stopper()
    if rank == 0:
        open_run(config)
        if config.real:                                  # one process writes the file of text, all read it
            domain.embed(["", *(c for p in shown for c in p.captions)])
            domain.release()
    agree()                                              # the run folder is there and of this configuration
    say(f"{run}: {device_name(device)}, {dtype}")
    clock = run / "seconds.json"
    seconds = data.read_json(clock) if clock.exists() else {}

    def timed(name: str, stage, *args):
        """Runs a stage; its seconds add up over all calls of the run."""
        start = time.perf_counter()
        try:
            return stage(config, run, *args)
        finally:
            seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start
            if rank == 0:
                data.publish(clock, lambda path: data.write_json(path, seconds))

    try:
        teacher = timed("teacher", train_teacher, pairs, layout, stopper)
        if config.objective == "flow":
            say(f"--objective flow: the run ends with its teacher, "
                f"{teacher_of(config)}")
            return parallel.finish()
        latents = timed("data", make_data, teacher, pairs, domain, device, stopper)
        timed("distill", distill, teacher, latents, shown, domain, layout, stopper)
        if not (run / "report.json").exists():
            if agree(bool(stopper)):
                raise Stopped(f"{stopper.signal or 'a signal elsewhere'}: the student is saved; the same "
                              "command reports")
            stopper.end()
            write_report(config, run, teacher, shown, domain, layout, seconds)
    except torch.OutOfMemoryError as error:
        raise InputError(f"out of memory on {device} ({str(error).splitlines()[0]}); the plan was, in GiB: "
                         f"{plan_in_words(config, sizes, layout)}; less take a --micro-batch below "
                         f"{config.micro(world)}, --checkpoint selective or full, --parallel fsdp, "
                         "--shard-teacher on") from None
    parallel.finish()


if __name__ == "__main__":
    try:
        run_script("train.py", main)
    except Stopped as stopped:
        print(stopped if ranks()[0] == 0 else "", end="\n" * (ranks()[0] == 0))
        parallel.finish()
