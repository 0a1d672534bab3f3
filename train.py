"""Train a teacher on the toy dataset, generate latents with it, distill a student by LADD, report.

    python train.py                              preset tiny, on every device
    python train.py --preset tiny --seed 1 --name tiny-1
    python train.py --dry-run                    sizes and costs, nothing written

With an SD3 checkpoint the teacher is loaded, and prompts come from a file:

    python train.py --preset sd3.5-medium --teacher FILE --encoders FOLDER --prompts FILE

On several GPUs or nodes, the same under torchrun:

    torchrun --nproc-per-node 8 -- train.py --preset sd3.5-large ...

Everything is written to runs/NAME/. Finished stages are skipped; the same command again resumes, on
any number of processes; Ctrl-C saves first.
"""
import math
import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ladd import bench
from ladd.build import (batching_of, compute_of, heads_of, needs_of, networks_on_meta, plan_of,
                        student_lora, teacher_lora, toy_of)
from ladd.cli import InputError, must, run_script
from ladd.config import Config, check_same, least_data, parse_config, to_json
from ladd.core import flow
from ladd.core.losses import flow_loss
from ladd.core.mmdit import MMDiT, MMDiTConfig, Text, shrunk
from ladd.data import files
from ladd.data.batches import Prefetch
from ladd.data.prompts import (Codec, Prompts, given_prompts, held_out, pairs_plan, prompt_plan,
                               read_prompts)
from ladd.data.shards import Latents
from ladd.engine import generate, parallel, state
from ladd.engine.inputs import Needs, load_data, load_teacher, start_of, teacher_sizes
from ladd.engine.networks import (Compute, check_lora, distribute, inference, checkpoint_tensors,
                                  network, refresh, save_network)
from ladd.engine.optimizer import AdamW
from ladd.engine.parallel import Watch, any_rank, barrier, ranks
from ladd.engine.run import (Health, Log, Stopped, Stopper, device_name, memory_gb, open_run,
                             progress, read_seconds, write_seconds)
from ladd.engine.step import (Optim, calibrate, ladd_step, make_networks, rate_factor,
                              step_parts)
from ladd.report import compare, evaluate, speed
from ladd.sd3 import checkpoint, encoders
from ladd.sd3.encoders import sd3_codec
from ladd.toy.prompts import BEST, VALIDATION, draw_prompts, toy_codec, toy_latents, toy_plan


def save_or_stop(config: Config, saver: state.Saver, health: Health, step: int, steps_here: int,
                 stopper: Stopper, to_checkpoint: Callable, meta: dict) -> None:
    """Save at the interval, and on a signal or stop_after, then raise Stopped. `steps_here`
    counts the steps of this process. Losses and gradients are checked first: NaN or inf ends the
    run instead. `to_checkpoint` returns the arguments of state.collect."""
    wish = bool(stopper) or bool(config.stop_after and steps_here >= config.stop_after)
    stop, unwritten = any_rank((wish, not saver.written))
    # a checkpoint that is written in the background becomes the newest once all have written it
    if not unwritten:
        saver.publish()
    if stop or step % config.save_every == 0:
        health.check()
        saver.begin(step, state.collect(to_checkpoint()), meta)
    if stop:
        saver.finish()
        reason = stopper.signal or ("stop_after" if steps_here == config.stop_after
                                    else "a signal elsewhere")
        raise Stopped(f"{reason}: saved step {step} in {saver.folder}; the same command resumes")


# --- stage 1: teacher ---

def train_teacher(config: Config, run: Path, needs: Needs, pairs: Latents | None, compute: Compute,
                  stopper: Stopper) -> MMDiT:
    """Return the teacher, trained by flow matching on renders or `pairs`; AdamW with a cosine
    schedule. Skipped where the run has its teacher or --teacher names one."""
    path, device = config.teacher_file, compute.device
    rank, world = ranks()
    if path.exists():
        return load_teacher(path, needs, compute.ops)
    sizes, untrained = start_of(needs, config.base, config.seed, compute.ops)
    # x_embedder has new input channels for the image, so it trains next to a LoRA
    reads_image = "x_embedder" if config.task != "text" else ""
    model = network(sizes, untrained, compute, torch.float32, trains=True,
                    adapter=teacher_lora(config), also=reads_image)
    optimizer = AdamW(model, config.teacher_lr, beta1=0.9, beta2=0.99, weight_decay=0.01)

    def to_checkpoint() -> state.Tensors:
        """Return what the stage resumes from."""
        return {"model": checkpoint_tensors(model, model), "opt": optimizer.state()}

    saver = state.Saver(run / "checkpoints" / "teacher", rank, world, barrier)
    start = 0
    if saved := state.open_state(saver.folder):
        start = saved.step
        state.restore(saved, to_checkpoint())
    latents = pairs or toy_latents(toy_of(config), config.teacher_images, config.seed)
    exclude = latents.holdout if pairs else 0
    null = Text(*latents.null).to(device)
    micro = config.micro(world, teacher=True)
    share = config.teacher_batch // world
    mine = slice(rank * share, (rank + 1) * share)

    def make(step: int) -> list[Tensor]:
        """Return x0, noise, noise levels, dropout draws and text of this process's share of a
        step."""
        batch = latents.batch(step, config.teacher_batch, config.seed, exclude)
        n = len(batch.x0)
        g = flow.generator(config.seed, 1, step)
        dropped = torch.rand(n, generator=g)
        sigma = flow.logit_normal(n, config.teacher_means, g)
        eps = torch.randn(batch.x0.shape, generator=g)
        return [t[mine] for t in (batch.x0, eps, sigma, dropped, *batch.text) if t is not None]

    def loss_of(x0: Tensor, eps: Tensor, sigma: Tensor, dropped: Tensor, *text: Tensor) -> Tensor:
        """Return the mean loss of a micro-batch, with text and source images dropped."""
        # one draw for both: samples that lose the image are among those that lose the caption
        empty, no_image = dropped < config.text_dropout, dropped < config.image_dropout
        text = Text(torch.where(empty[:, None, None], null.context, text[0]),
                    torch.where(empty[:, None], null.pooled, text[1]), *text[2:])
        if config.task == "edit":
            text = text._replace(image=text.image.masked_fill(no_image[:, None, None, None], 0))
        return flow_loss(model, x0, eps, sigma, text).mean()

    log = Log(run, "teacher", start, config.tensorboard)
    health = Health()
    bar = progress("teacher", config.teacher_steps, start, quiet=rank)
    since = time.perf_counter()
    steps = range(start, config.teacher_steps)
    feed = Prefetch(make, ((i,) for i in steps), device)
    with Watch("teacher", config.timeout) as watch, saver, bar:
        for step, batch in zip(steps, feed):
            watch.heartbeat(step)
            # 1. loss and gradients, micro-batch by micro-batch
            parts = [*zip(*(t.split(micro) for t in batch))]
            loss = 0.0
            for i, part in enumerate(parts, 1):
                parallel.accumulate(model, i == len(parts))
                part_loss = loss_of(*part) / len(parts)
                part_loss.backward()
                loss += part_loss.detach()

            # 2. optimizer: linear warm-up, then a cosine to 0
            rate = (min(1, (step + 1) / max(1, config.warmup))
                    * (1 + math.cos(math.pi * step / config.teacher_steps)) / 2)
            optimizer.lr = config.teacher_lr * rate
            norms = optimizer.step()

            # 3. once in a while: log, save
            bar.update()
            health.note(step + 1, {"loss": loss}, {"": (model, norms)})
            if (step + 1) % config.log_every == 0:
                health.check()
                line = parallel.mean({"loss": loss.item(), "grad_norm": norms.total.item()})
                log.write(step + 1, **line, seconds=time.perf_counter() - since)
                bar.set_postfix(loss=f"{line['loss']:.3f}", gb=f"{memory_gb(device):.1f}")
            save_or_stop(config, saver, health, step + 1, step + 1 - start, stopper, to_checkpoint,
                         {})
        health.check()
    base = Path(config.base).name
    if config.task != "text":
        base += f" of {sizes.in_channels} input channels, with x_embedder of teacher.safetensors"
    save_network(model, untrained, path, config.recipe.metadata("teacher", config.real), base)
    return load_teacher(path, needs, compute.ops)


# --- stage 2: synthetic data ---

def make_data(config: Config, run: Path, teacher: MMDiT, pairs: Latents | None, codec: Codec,
              compute: Compute, stopper: Stopper) -> Latents:
    """Return latents that the teacher generates with guidance, from captions of the toy dataset,
    from --prompts, or from the sources and instructions of `pairs`; --data takes others instead."""
    toy, size, shard, seed = toy_of(config), config.data_size, config.shard_size, config.seed
    if config.data == "toy":
        return toy_latents(toy, size, seed + 1)
    if config.data:
        latents = load_data(Path(config.data), teacher.config, config.task, config.batch)
        made_by = latents.provenance.get("teacher")
        if ranks()[0] == 0 and made_by and made_by != generate.weights_sha(teacher):
            print(f"note: --data {config.data}: another teacher generated these latents")
        return latents
    if pairs:
        plan = pairs_plan(pairs, size, shard, seed)
    elif toy:
        plan = toy_plan(toy, size, shard, seed)
    else:
        prompts, _ = read_prompts(config.prompts)
        plan = prompt_plan(prompts, config.hw, size, shard, seed)
    with Watch("data", config.timeout) as watch:
        complete = generate.generate_latents(
            run / "data", plan, teacher, lambda model: inference(model, compute), codec,
            config.sample_steps, config.shift, (config.guidance, config.image_guidance),
            config.sample_batch, config.real, stopper, watch.heartbeat)
    if not complete:
        raise Stopped(f"{stopper.signal}: shards saved in {run / 'data'}; the same command resumes")
    return load_data(run / "data", teacher.config, config.task, config.batch)


# --- stage 3: distillation ---

def distill(config: Config, run: Path, teacher: MMDiT, latents: Latents, shown: list[Prompts],
            codec: Codec, compute: Compute, stopper: Stopper) -> None:
    """Distill a student of `teacher` and write checkpoints/student.safetensors: of the evaluated
    ones that with the lowest sum of FD at 1 step and FD at its largest number of steps, without
    evaluations and for real prompts, which have no metric, the last one. `shown`: prompts of the
    sample grids."""
    out = run / "checkpoints" / "student.safetensors"
    device = compute.device
    rank, world = ranks()
    if out.exists():
        return
    torch.manual_seed(config.seed + 1)                          # the heads' initial weights
    dc, recipe = config.ladd, config.recipe
    batching, optim = batching_of(config), config.group(Optim)
    p = make_networks(teacher, compute, optim, heads_of(config, teacher.config),
                      config.student_depth, student_lora(config), config.teacher_fp8)
    _, untrained = shrunk(teacher, config.student_depth)
    origin = config.teacher_file.name
    if config.student_depth:
        origin += f", {config.student_depth} of its blocks taken evenly"

    # resume: every random number is a function of the step, so that weights, optimizers and the
    # metrics in `meta` are all that a checkpoint needs
    saver = state.Saver(run / "checkpoints" / "distill", rank, world, barrier)
    start = 0
    # the best score so far and the metrics of the first evaluation
    meta = {"best": math.inf, "first": {}}
    if saved := state.open_state(saver.folder):
        start, meta = saved.step, saved.meta
        state.restore(saved, p.to_checkpoint())
    else:
        calibrate(dc, batching, p.teacher, p.heads, latents)

    toy = toy_of(config)
    reference = None
    if toy:
        prompts = draw_prompts(toy, config.eval_n, BEST)
        reference = evaluate.make_reference(toy, prompts, config.eval_n, VALIDATION)
    # one process evaluates a copy of the EMA in the compute dtype, several the EMA itself
    eval_model = p.ema if compute.mesh else inference(p.ema, compute)
    # the first iterations train only the heads
    first = config.heads_first
    total = first + config.steps
    log = Log(run, "distill", start, config.tensorboard)
    # a resumed run evaluates at `start` again, so the old line of that evaluation is dropped
    evals = Log(run, "eval", start - 1, config.tensorboard)
    health = Health()
    bar = progress("distill", total, start, quiet=rank)
    pace = speed.Pace(config.batch, device, world,
                      partial(bench.step_flops, config, teacher.config, compute.dtype))
    stream = Prefetch(partial(step_parts, dc, batching, latents),
                      ((it,) for it in range(start, total)), device)
    batches = iter(stream)

    def evaluate_student(it: int) -> None:
        """Save a grid of samples and the metrics after `it` iterations; keep the best student."""
        if eval_model is not p.ema:
            refresh(eval_model, p.ema, untrained)
        health.check()
        grid = run / "samples" / f"{it:06d}.png"
        compare.save_grid(recipe, codec, eval_model, shown, config.sample_batch, grid)
        evals.show(it, grid)
        values = {}
        if reference:
            values = evaluate.quality(recipe, codec, eval_model, prompts, reference,
                                      config.sample_batch)
        values |= evaluate.discriminator_metrics(eval_model, p.teacher, p.heads, latents, dc,
                                                 config.sample_batch)
        # equal except for rounding; the mean makes all processes choose the same best student
        values = parallel.mean(values)
        warnings = evaluate.collapse_warnings(values, meta["first"] or values)
        evals.write(it, **values, **warnings_column(warnings))
        bar.write(f"step {it:5d}  " + "  ".join(
            f"{k} {v:.3f}" for k, v in values.items() if k.startswith(("fd_", "prompt", "auc"))))
        warn(bar, it, warnings)
        meta["first"] = meta["first"] or values
        score = values["fd_1"] + values[f"fd_{len(config.levels)}"] if reference else math.inf
        if score < meta["best"]:
            meta["best"] = score
            save_network(p.ema, untrained, out.with_name("best.safetensors"),
                         recipe.metadata("student", config.real), origin)

    with Watch("distill", config.timeout) as watch, saver, bar:
        for it in range(start, total + 1):
            # 1. once in a while: evaluate. Log, files and messages count iterations, `done` the
            # student's steps before this iteration
            student_trains, done = it >= first, max(it - first, 0)
            every = config.eval_every
            if every and (student_trains and done % every == 0 or it == total):
                try:
                    with pace.paused():
                        evaluate_student(it)
                except FloatingPointError as error:
                    raise FloatingPointError(f"{error} (student after iteration {it})") from None
            if it == total:
                break
            if config.profile and it == max(start, total - 3):
                profiler = torch.profiler.profile()
                profiler.start()

            # 2. steps of the discriminator and of the student
            p.opt_g.lr = config.lr * rate_factor(optim, done, done)
            p.opt_d.lr = config.heads_lr * rate_factor(optim, done, it)
            parts = next(batches)
            watch.heartbeat(it)
            stats, norms = ladd_step(dc, p, parts, config.ema, student_trains)

            # 3. once in a while: log, save
            bar.update()
            losses = {k: v for k, v in stats.items() if k.startswith("loss")}
            health.note(it + 1, losses, {name: (getattr(p, name), n) for name, n in norms.items()})
            if (it + 1) % config.log_every == 0:
                health.check()
                line = {k: v.item() for k, v in losses.items()}
                line |= {f"norm_{'d' if name == 'heads' else 'g'}": n.total.item() for name, n
                         in norms.items()}
                line = parallel.mean(line) | evaluate.batch_metrics(stats)
                line |= pace.line(stream.waited, config.log_every)
                warnings = evaluate.collapse_warnings(line) if student_trains else []
                log.write(it + 1, **line, **warnings_column(warnings))
                bar.set_postfix({k: f"{line[k]:.2f}" for k in ("loss_d", "loss_g") if k in line},
                                gb=f"{line['gb']:.1f}")
                warn(bar, it + 1, warnings)
            save_or_stop(config, saver, health, it + 1, it + 1 - start, stopper, p.to_checkpoint,
                         meta)
        health.check()
    if config.profile and start < total:
        profiler.stop()
        profiler.export_chrome_trace(config.profile if rank == 0 else f"{config.profile}.{rank}")
        if rank == 0:
            print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=15,
                                                max_name_column_width=40))
    save_network(p.ema, untrained, out.with_name("last.safetensors"),
                 recipe.metadata("student", config.real), origin)
    chosen = "best" if out.with_name("best.safetensors").exists() else "last"
    if rank == 0:
        # the student is renamed last: once it exists, the stage is done
        for end in ("_lora", ""):
            if (made := out.with_name(f"{chosen}{end}.safetensors")).exists():
                os.replace(made, out.with_name(f"student{end}.safetensors"))
    barrier()


def warnings_column(warnings: list[str]) -> dict[str, list[str]]:
    """Return the column of the log, which exists only with a warning."""
    return {"warnings": warnings} if warnings else {}


def warn(bar, it: int, warnings: list[str]) -> None:
    """Print collapse warnings above the progress bar, whose name shows that there was one."""
    for warning in warnings:
        bar.write(f"step {it}: warning: {warning}")
        bar.set_description("distill!")


# --- stage 4: report ---

def write_report(config: Config, run: Path, teacher: MMDiT, shown: list[Prompts], codec: Codec,
                 compute: Compute, seconds: dict[str, float]) -> None:
    """Write report.json and report.png: the student next to its teacher and the untrained
    student."""
    start = time.perf_counter()
    student = checkpoint.load_mmdit(run / "checkpoints" / "student.safetensors", compute.ops)
    weights = ((teacher.config, teacher.state_dict()), (student.config, student.state_dict()),
               shrunk(teacher, student.config.depth))
    networks = [network(*pair, compute, compute.dtype, sharded=compute.shard_teacher)
                for pair in weights]
    with Watch("report", config.timeout) as watch:
        compare.write_run_report(config.recipe, toy_of(config), run, shown, codec, networks,
                                 compare.Counts(config.n, config.eval_n, config.sample_batch),
                                 {"preset": config.preset, "seeds": [config.seed]}, seconds, start,
                                 watch.heartbeat)


# --- main ---

def shown_prompts(config: Config, pairs: Latents | None) -> list[Prompts]:
    """Return the prompts of sample grids, and for real images of the report."""
    if toy := toy_of(config):
        return draw_prompts(toy, 4 * len(config.hw), VALIDATION)
    if pairs:
        return held_out(pairs, 8)
    captions, _ = read_prompts(config.eval_prompts or config.prompts)
    return given_prompts(config.hw, captions if config.eval_prompts else captions[:8])


def check_inputs(config: Config, compute: Compute, needs: Needs, say: Callable) -> MMDiTConfig:
    """Return the sizes of the teacher. Everything is checked before the run folder is made, so that
    a refused command leaves none behind."""
    for name in ("teacher", "base", "data", "pairs"):
        path = getattr(config, name)
        # --base is not read any more once the run has its teacher; --data toy is no folder
        if name == "base" and config.teacher_file.exists() or name == "data" and path == "toy":
            continue
        must(not path or Path(path).exists(), f"--{name}: {path} does not exist")
    for path in filter(None, (config.prompts, config.eval_prompts)):
        for note in read_prompts(path)[1]:
            say(note)
    sizes = teacher_sizes(config.teacher_file, needs, config.base, compute.ops)
    check_lora(sizes, config.student_depth, teacher_lora(config), student_lora(config))
    stored = config.folder / "config.json"
    if stored.exists() and not config.dry_run:
        check_same(config, files.read_json(stored, dict))
    return sizes


def hash_inputs(config: Config) -> dict[str, str]:
    """Return a fingerprint of each file or folder that a flag names. --data toy is none, and
    --base may be gone once the run has its teacher."""
    hashes = {}
    for names, fingerprint in ((("teacher", "base"), checkpoint.fingerprint),
                               (("data", "pairs", "prompts", "eval_prompts"), files.fingerprint)):
        for name in names:
            path = getattr(config, name)
            if path and Path(path).exists():
                hashes[name.replace("_", "-")] = fingerprint(path)
    return hashes


def read_pairs(config: Config, sizes: MMDiTConfig, made: dict[str, str]) -> Latents | None:
    """Return the images of --pairs, of which each size gets a batch of generated latents."""
    if not config.pairs:
        return None
    # no teacher is trained with --teacher, so a single pair is enough
    batch = 1 if config.teacher else config.teacher_batch
    pairs = load_data(Path(config.pairs), sizes, config.task, batch, made)
    least = least_data(len(pairs.buckets), config.batch, config.shard_size)
    must(config.data_size >= least or bool(config.data) or not config.steps, "--data-size must be "
         f"at least {least}, a --batch of each of the {len(pairs.buckets)} sizes of {config.pairs} "
         f"(got {config.data_size})")
    return pairs


def main(argv: list[str]) -> None:
    """Run the stages that the flags ask for and that the run folder does not have yet."""
    config = parse_config(argv, __doc__)
    rank, world = ranks()

    def say(text: str) -> None:
        """Print in the first process."""
        if rank == 0:
            print(text)

    compute, needs = compute_of(config), needs_of(config)
    device = compute.device
    if device.type == "cuda" and not any(a.startswith("--preset") for a in argv):
        say("preset tiny: the default on every device; --preset shapes is the larger one for a GPU")
    config.micro(world)         # raises where the processes cannot share --batch
    must(world % config.replicas == 0, f"--replicas must divide the number of processes, {world} "
         f"(got {config.replicas})")
    if (not config.real or config.base) and not config.teacher:
        config.micro(world, teacher=True)
    sizes = check_inputs(config, compute, needs, say)
    if config.dry_run:
        prompts = len(set(read_prompts(config.prompts)[0])) if config.prompts else config.data_size
        return bench.dry_run(config, sizes, compute, prompts) if rank == 0 else None
    parallel.start(device, config.timeout)

    def plan(**shards: int) -> dict[str, int]:
        """Return the memory plan, which one process needs only when it runs out of memory."""
        networks = networks_on_meta(config, sizes, compute.dtype)
        return plan_of(config, networks, compute, world)(**shards)

    compute = distribute(compute, config.shard, config.replicas, config.timeout, plan)
    if config.bench_steps:
        bench.bench(config, compute)
        return parallel.finish()
    try:
        run_stages(config, compute, needs, sizes, say)
    except torch.OutOfMemoryError as error:
        shards = compute.mesh["shard"].size() if compute.mesh else 1
        planned = plan(shard=shards, teacher_shard=shards if compute.shard_teacher else 1)
        words = ", ".join(f"{name} {size / 2 ** 30:.1f}" for name, size in planned.items())
        raise InputError(
            f"out of memory on {device} ({str(error).splitlines()[0]}); the plan was, in GiB: "
            f"{words}; a --micro-batch below {config.micro(world)}, --recompute selective or full "
            "and --shard student or all need less") from None
    parallel.finish()


def run_stages(config: Config, compute: Compute, needs: Needs, sizes: MMDiTConfig,
               say: Callable[[str], None]) -> None:
    """Run the stages in the run folder, which only one command at a time may use."""
    run, rank, stopper = config.folder, ranks()[0], Stopper()
    if config.real:
        codec = sd3_codec(config.encoders, compute.device, config.t5, config.t5_tokens,
                          run / "text.safetensors")
    else:
        codec = toy_codec(toy_of(config))
    widths = sizes.context_dim, sizes.pooled_dim
    must(codec.widths == widths, f"--encoders {config.encoders}: text must have widths {widths} "
         f"(tokens, pooled), which the teacher reads (got {codec.widths})")
    made = {}       # what latents from elsewhere must have been made with
    if config.real and (config.pairs or config.data):
        text = codec.provenance()["encoders"]
        made = {"encoders": text, "text": text,
                "vae": encoders.fingerprint(config.encoders, ["vae"])}
    elif not config.real:
        made = codec.provenance()
    pairs = read_pairs(config, sizes, made)
    if config.data and config.data != "toy":
        load_data(Path(config.data), sizes, config.task, config.batch, made)
    shown = shown_prompts(config, pairs)
    if (run / "report.json").exists() and (run / "checkpoints/student.safetensors").exists():
        return say(f"{run} is complete: {run / 'report.json'}")
    if config.real and rank == 0:
        codec.decode(torch.zeros(1, 16, 8, 8))      # loads the VAE, before anything is made
    with open_run(run, to_json(config), hash_inputs(config)) if rank == 0 else nullcontext():
        # one process writes the file of text, all read it
        if rank == 0 and config.real:
            codec.text(["", *(c for p in shown for c in p.captions)])
            codec.release()
        # wait until the first process has made the run folder
        barrier()
        say(f"{run}: {device_name(compute.device)}, {compute.dtype}")
        seconds = read_seconds(run)

        def timed(name: str, stage: Callable, *args):
            """Run a stage; its seconds add up over all calls of the run."""
            start = time.perf_counter()
            try:
                return stage(config, run, *args)
            finally:
                seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start
                if rank == 0:
                    write_seconds(run, seconds)

        teacher = timed("teacher", train_teacher, needs, pairs, compute, stopper)
        if not config.steps:
            return say(f"--steps 0: the run ends with its teacher, {config.teacher_file}")
        latents = timed("data", make_data, teacher, pairs, codec, compute, stopper)
        timed("distill", distill, teacher, latents, shown, codec, compute, stopper)
        if any_rank(bool(stopper)):
            raise Stopped(f"{stopper.signal or 'a signal elsewhere'}: the student is saved; "
                          "the same command reports")
        stopper.end()
        write_report(config, run, teacher, shown, codec, compute, seconds)


if __name__ == "__main__":
    try:
        run_script("train.py", main, parallel.leave)
    except Stopped as stopped:
        if ranks()[0] == 0:
            print(stopped)
        parallel.finish()
