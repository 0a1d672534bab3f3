"""Preference tuning: a LoRA trained on the teacher by diffusion DPO, its delta then added to the student.

    loss = -log sigmoid(-beta ((e_w - r_w) - (e_l - r_l)))
    e, r = |v - (eps - x0)|^2 of the tuned network, of the network as it was; w the preferred x0, l the other,
           at one level and with one noise

    python -m ladd.dpo --run runs/tiny                                         two samples a prompt, graded
    python -m ladd.dpo --run runs/sd3.5-medium --preferences pairs.jsonl --rank 256 --steps 3000

A line of pairs.jsonl: {"prompt": "...", "chosen": "a.png", "rejected": "b.png"}, paths beside the file.
Writes lora.safetensors (ComfyUI's names) and, in the built-in world, report.json and a picture: teacher and
student with and without the delta.
Source: Wallace et al. 2024 (Diffusion-DPO), Eq. 14; Sauer et al. 2024, Sec. 4.
"""
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ladd import checkpoint, encode, flow, images, lora, parallel, report, shapes, state
from ladd.config import Config, InputError, Parser, read_config, run_script
from ladd.data import Latents
from ladd.distill import Text, flow_loss
from ladd.domain import Domain, sd3_domain, world_domain
from ladd.evaluate import REAL, REPORT, draw_prompts, generate, make_reference, measure, pictures
from ladd.feed import Feed
from ladd.mmdit import MMDiT
from ladd.run import (Health, Stopper, command, compute_dtype, device_name, frozen, levels_of, pick_device,
                      pick_kernels, progress, step_counts)

PREFERENCES = 2 ** 40 + 9      # a seed of prompts like those of ladd/evaluate.py


def dpo_loss(model: MMDiT, reference: MMDiT, chosen: Tensor, rejected: Tensor, eps: Tensor, sigma: Tensor,
             text: Text, beta: float) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, stats). chosen, rejected, eps [b, c, h, w]; sigma [b]. Only `model` gets gradients; stats: the
    share of pairs that it tells right against `reference`, and the mean change of both errors."""
    x0, twice = torch.cat([chosen, rejected]), lambda t: torch.cat([t, t])
    args = x0, twice(eps), twice(sigma), Text(*map(twice, text))
    with torch.no_grad():
        before = flow_loss(reference, *args)
    change_w, change_l = (flow_loss(model, *args) - before).chunk(2)
    margin = -beta * (change_w - change_l)
    return -F.logsigmoid(margin).mean(), {"right": (margin.detach() > 0).float().mean(),
                                          "change_w": change_w.detach().mean(),
                                          "change_l": change_l.detach().mean()}


# --- preferences: chosen and rejected side by side in the channels of one x0 ---

def ranked(scores: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """(pairs [m, 2c, h, w], which [m]) of n samples each, the better one first, no ties. scores [n, 2]."""
    which = torch.nonzero(scores[:, 0] != scores[:, 1]).squeeze(1)
    better = (scores[which, 0] > scores[which, 1]).view(-1, 1, 1, 1)
    a, b = first[which], second[which]
    return torch.cat([torch.where(better, a, b), torch.where(better, b, a)], 1), which


def graded(latents: Tensor, codes: Tensor, objects: int) -> Tensor:
    """How many of the stated attributes [n] a picture shows."""
    found = shapes.align(shapes.grade(shapes.decode(latents), objects), codes)
    return ((found == codes) & (codes >= 0)).sum(1)


def world_pairs(config: Config, teacher: MMDiT, domain: Domain, prompts: int, seed: int) -> Latents:
    """Two samples of the teacher for each of `prompts` prompts, as its data are drawn; the grader prefers the
    one that shows more of what the prompt states."""
    parts, sigmas = draw_prompts(config, prompts, PREFERENCES + seed), flow.euler_levels(config.sample_steps,
                                                                                         config.shift)
    bar = progress("pairs", 2 * prompts)
    samples = [generate(teacher, domain, parts, sigmas, "euler", (config.guidance, 1.0),
                        (2 * seed + i) * prompts, config.eval_batch, bar.update)[0] for i in range(2)]
    bar.close()
    captions = sorted({caption for part in parts for caption in part.captions})
    number, buckets = {caption: i for i, caption in enumerate(captions)}, {}
    for part, first, second in zip(parts, *samples):
        scores = torch.stack([graded(x, part.codes, config.objects) for x in (first, second)], 1)
        pairs, which = ranked(scores, first, second)
        ids = torch.tensor([number[part.captions[i]] for i in which])
        buckets[tuple(pairs.shape[2:])] = pairs, ids
    return Latents(captions, *domain.embed(captions), torch.arange(len(captions))[:, None],
                   tuple(t[0] for t in domain.embed([""])), buckets, {})


def read_pairs(path: Path, config: Config, domain: Domain, device: torch.device) -> Latents:
    """Pairs of images from a .jsonl file, encoded by the run's VAE, each pair at the nearest size of the run.

    Raises InputError that names the line where the two are one file, or a file that cannot be read.
    """
    found = images.read_objects(path, ["prompt", "chosen", "rejected"])
    if not found:
        raise InputError(f"{path}: found no pair, one a line accepted")
    for number, line in enumerate(found, 1):
        if line["chosen"] == line["rejected"]:
            raise InputError(f"{path}: found a tie in pair {number}, {line['chosen']!r} twice; two images "
                             "accepted")
    files = [[path.parent / line[side] for side in ("chosen", "rejected")] for line in found]
    for number, pair in enumerate(files, 1):
        for file in pair:
            if not file.exists():
                raise InputError(f"{path}: found no image {file} of pair {number}, an existing file accepted")
    vae = encode.load_vae(config.encoders, device)
    captions = list(dict.fromkeys(line["prompt"] for line in found))
    ids, parts = {caption: i for i, caption in enumerate(captions)}, {}
    for line, pair in zip(found, files):
        h, w = images.image_size(pair[0])
        size = min(config.hw, key=lambda hw: abs(hw[0] / hw[1] - h / w))
        pixels = torch.stack([images.read_image(file, size) for file in pair]).to(device) / 127.5 - 1
        x0, prompt = parts.setdefault((size[0] // 8, size[1] // 8), ([], []))
        x0.append(encode.encode_images(vae, pixels).cpu().flatten(0, 1))
        prompt.append(ids[line["prompt"]])
    buckets = {hw: (torch.stack(x0), torch.tensor(prompt)) for hw, (x0, prompt) in sorted(parts.items())}
    return Latents(captions, *domain.embed(captions), torch.arange(len(captions))[:, None],
                   tuple(t[0] for t in domain.embed([""])), buckets, {})


# --- the script ---

def parse(argv: list[str]):
    parser = Parser(prog="python -m ladd.dpo", description=__doc__.split("\n\n")[0])
    flag = parser.add_argument
    flag("--run", metavar="FOLDER", required=True, help="run folder of train.py: teacher, student, recipe")
    flag("--out", metavar="FOLDER", help="default: dpo in the run folder")
    flag("--preferences", metavar="FILE", help=".jsonl of pairs; the built-in world makes its own")
    flag("--prompts", metavar="N", type=int, default=12288, help="of two samples each, graded; ties drop out")
    flag("--rank", metavar="N", type=int, default=16, help="of the LoRA")
    flag("--alpha", metavar="A", type=float, help="its weight is alpha / rank; default: the rank")
    flag("--targets", choices=lora.TARGETS, default="all", help="layers with LoRA: attentions', or a block's")
    flag("--beta", metavar="B", type=float, default=100.0, help="how far the network may move from its start")
    flag("--steps", metavar="N", type=int, default=200, help="training steps")
    flag("--batch", metavar="N", type=int, default=64, help="pairs a step")
    flag("--lr", metavar="R", type=float, default=3e-4, help="learning rate, after 20 steps of warm-up")
    flag("--save-every", metavar="N", type=int, default=100, help="steps between checkpoints")
    flag("--n", metavar="N", type=int, help="images of each row; default: as in the run")
    flag("--seed", metavar="N", type=int, default=0)
    flag("--device", choices=("auto", "cpu", "cuda"), default="auto")
    args = parser.parse(argv)
    for name in ("prompts", "rank", "steps", "batch", "save_every"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name.replace('_', '-')}: found {getattr(args, name)}, at least 1 accepted")
    if not args.beta > 0:
        raise InputError(f"--beta: found {args.beta}, above 0 accepted")
    return args


def train(args, config: Config, model: MMDiT, reference: MMDiT, latents: Latents, out: Path,
          device: torch.device, stopper: Stopper) -> bool:
    """Trains the LoRA of `model` at the levels of the teacher's training; resumes from and saves to
    out/checkpoints. False when a signal ended it."""
    named = lora.parameters(model)
    optimizer = torch.optim.AdamW(named.values(), args.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    saver, start = state.Saver(out / "checkpoints"), 0
    if saved := state.open_state(saver.folder):
        start = saved.step
        state.fill(saved, named | state.optimizer_targets(optimizer, named, "opt.", saved))

    def make(step: int) -> tuple[Tensor, ...]:
        batch, g = latents.batch(step, args.batch, args.seed), flow.generator(args.seed, 7, step)
        chosen, rejected = batch.x0.chunk(2, 1)
        sigma = flow.logit_normal_mixture(len(chosen), config.teacher_means, 1.0, g)
        return chosen, rejected, torch.randn(chosen.shape, generator=g), sigma, batch.context, batch.pooled

    steps, health, bar = range(start, args.steps), Health(), progress("dpo", args.steps, start)
    for step, (*x0, eps, sigma, context, pooled) in zip(steps, Feed(make, ((i,) for i in steps), device)):
        optimizer.param_groups[0]["lr"] = args.lr * min(1, (step + 1) / 20)
        loss, stats = dpo_loss(model, reference, *x0, eps, sigma, Text(context, pooled), args.beta)
        loss.backward()
        norms = parallel.clip(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        health.note(step + 1, {"loss": loss}, {"": (model, norms)})
        bar.update()
        done = step + 1 == args.steps or bool(stopper)
        if done or (step + 1) % 10 == 0:
            health.look()
            bar.set_postfix(loss=f"{loss.item():.3f}", right=f"{stats['right'].item():.2f}")
        if done or (step + 1) % args.save_every == 0:
            saver.begin(step + 1, named | state.optimizer_tensors(optimizer, named, "opt."), None)
        if done:
            break
    saver.finish()
    bar.close()
    return not stopper


def main(argv: list[str]) -> None:
    args = parse(argv)
    if parallel.ranks()[1] > 1:
        raise InputError(f"torchrun: found {parallel.ranks()[1]} processes, one accepted")
    run, began = Path(args.run), time.perf_counter()
    config, device = read_config(run / "config.json"), pick_device(args.device)
    dtype = compute_dtype(config.precision, device)
    if bool(args.preferences) != config.real:
        kind = "real images, a .jsonl of pairs" if config.real else "the built-in world, none"
        raise InputError(f"--preferences: found {args.preferences}; {run} is of {kind} accepted")
    if config.task != "text":
        raise InputError(f"--run: found a run of --task {config.task}, text accepted: pairs are of captions")
    out, ops = Path(args.out or run / "dpo"), pick_kernels("auto", args.device, config.precision)
    paths = {"teacher": Path(config.teacher or run / "checkpoints" / "teacher.safetensors"), "student": run}
    networks = {name: checkpoint.load_mmdit(path, ops) for name, path in paths.items()}
    if networks["teacher"].config != networks["student"].config:
        depth = {name: network.config.depth for name, network in networks.items()}
        raise InputError(f"{run}: found a student of {depth['student']} blocks, the teacher's "
                         f"{depth['teacher']} accepted: a delta fits its own layers alone")
    domain = (sd3_domain(config.encoders, device, config.t5, config.t5_tokens) if config.real
              else world_domain(config))
    stopper = Stopper()
    still = {name: frozen(network, dtype, device) for name, network in networks.items()}
    latents = (read_pairs(Path(args.preferences), config, domain, device) if config.real
               else world_pairs(config, still["teacher"], domain, args.prompts, args.seed))
    domain.release()
    for hw, (x0, _) in latents.buckets.items():
        if len(x0) < args.batch:
            raise InputError(f"pairs of {hw[0]}x{hw[1]}: found {len(x0)}, at least --batch {args.batch} "
                             "accepted")
    model = networks["teacher"].float().to(device)
    model.compute_dtype = dtype
    generator = torch.Generator().manual_seed(args.seed)
    lora.add(model, args.rank, args.alpha or args.rank, lora.TARGETS[args.targets], generator)
    if not train(args, config, model, still["teacher"], latents, out, device, stopper):
        return print(f"{stopper.signal}: saved in {out / 'checkpoints'}; the same command resumes")
    path = out / "lora.safetensors"
    lora.save(path, model, "comfyui", {"run": run.name, "beta": str(args.beta), "steps": str(args.steps)})
    print(f"{path}: rank {args.rank} on {len(lora.of_kind(model, lora.Lora))} layers")
    if not config.real:
        compare(replace(config, n=args.n or config.n), out, domain, still, path, latents, began)


def with_delta(network: MMDiT, path: Path) -> MMDiT:
    """A frozen copy with the LoRA of `path` merged into its weights."""
    copy = frozen(network, network.compute_dtype, network.pos_embed.device)
    lora.apply(copy, lora.load(path))
    lora.merge(copy)
    lora.remove(copy)
    return copy.requires_grad_(False)


def compare(config: Config, out: Path, domain: Domain, networks: dict[str, MMDiT], path: Path,
            latents: Latents, began: float) -> None:
    """report.json and samples.png: teacher and student with and without the delta, at equal seeds."""
    prompts = draw_prompts(config, config.n, REPORT)
    reference, rows, columns = make_reference(config, prompts, config.n, REAL), [], {}
    shown = [p._replace(captions=p.captions[:2]) for p in prompts]
    plan = [("teacher", "euler", config.sample_steps, (config.guidance, 1.0), None)]
    plan += [("student", config.sampler, k, (1.0, 1.0), levels_of(config.levels, k))
             for k in step_counts(config.levels)]
    bar = progress("report", 2 * len(plan) * config.n)
    for role, sampler, steps, guidance, levels in plan:
        for tuned in (False, True):
            model = with_delta(networks[role], path) if tuned else networks[role]
            name = f"{role} + preferences" if tuned else role
            row = measure(model, config, domain, prompts, reference, steps, sampler, guidance, levels,
                          seed=REPORT * 10 ** 6, progress=bar.update)
            rows.append({"model": name, **row})
            sigmas = flow.euler_levels(steps, config.shift) if levels is None else \
                flow.shift(torch.tensor((*levels, 0.0)), config.shift)
            columns[f"{name} {steps}"] = pictures(config, domain, model, shown, sigmas, sampler, guidance)
    bar.close()
    sheet = report.contact_sheet(columns, [c for p in shown for c in p.captions],
                                 cell=max(96, *(side // 4 for p in shown for side in p.hw)))
    report.save_png(sheet, out / "samples.png", {"parameters": f"lora: {path.name}"})
    pairs = sum(len(x0) for x0, _ in latents.buckets.values())
    report.write_json(out / "report.json", {
        "command": command(), "device": device_name(networks["student"].pos_embed.device),
        "versions": report.versions(), "commit": report.commit(), "n": config.n, "pairs": pairs,
        "seconds": time.perf_counter() - began, "floor": reference.floor, "rows": rows})
    print(report.table(rows, reference.floor))
    print(f"{pairs} pairs; {time.perf_counter() - began:.0f} s; wrote report.json and samples.png in {out}")


if __name__ == "__main__":
    run_script("ladd.dpo", main)
