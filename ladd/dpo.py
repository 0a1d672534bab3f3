"""Tune by preferences: train a LoRA on the teacher by diffusion DPO, and add its delta to the
student.

    loss = -log sigmoid(-beta ((e_w - r_w) - (e_l - r_l)))
    e, r = |v - (eps - x0)|^2 of the tuned network, of the network before tuning;
           w the preferred x0, l the other, at the same noise level and with the same noise

    python -m ladd.dpo --run runs/tiny          on samples of the teacher, which the grader ranks
    python -m ladd.dpo --run runs/sd3.5-medium --preferences pairs.jsonl --rank 256 --steps 3000

A line of pairs.jsonl: {"prompt": "...", "chosen": "a.png", "rejected": "b.png"}, with paths
relative to the file. Writes lora.safetensors (diffusers' names) and, for the toy dataset,
report.json and samples.png: teacher and student with and without the delta. The same command again
resumes from OUT/checkpoints.
Source: Wallace et al. 2024 (Diffusion-DPO), Eq. 14; Sauer et al. 2024, Sec. 4.
"""
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ladd.cli import InputError, Parser, must, run_script
from ladd.build import read_config
from ladd.core import flow, lora
from ladd.core.losses import flow_loss
from ladd.core.mmdit import MMDiT, Text
from ladd.core.sampler import Recipe
from ladd.data import images
from ladd.data.batches import Prefetch
from ladd.data.files import fingerprint, locked, read_objects
from ladd.data.prompts import Codec, null_text
from ladd.data.shards import Latents
from ladd.engine import parallel, state
from ladd.engine.networks import factors, frozen, pick_kernels
from ladd.engine.optimizer import AdamW
from ladd.engine.run import Health, Stopper, compute_dtype, pick_device, progress
from ladd.report.compare import student_rows, teacher_row, write_toy_report
from ladd.report.evaluate import generate
from ladd.sd3 import checkpoint, lora_files
from ladd.sd3.encoders import encode_images, load_vae, sd3_codec
from ladd.toy import grader, scenes
from ladd.toy.prompts import draw_prompts, toy_codec
from ladd.toy.scenes import ToyConfig

PREFERENCES = 2 ** 40 + 9      # seed of the prompts, beyond those of ladd/toy/prompts.py
# what a resumed call must have in common with the first
RECIPE = "prompts rank alpha targets beta steps batch lr seed".split()
WARMUP = 20                    # steps of linear learning-rate warm-up


def dpo_loss(model: MMDiT, reference: MMDiT, chosen: Tensor, rejected: Tensor, eps: Tensor,
             sigma: Tensor, text: Text, beta: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Return (loss, stats). Only `model` gets gradients.

    chosen, rejected, eps [b, c, h, w]; sigma [b]. stats: the share of pairs that `model` ranks
    right relative to `reference`, and the mean change of both errors.
    """
    def twice(t: Tensor) -> Tensor:
        return torch.cat([t, t])

    args = torch.cat([chosen, rejected]), twice(eps), twice(sigma), text.map(twice)
    with torch.no_grad():
        before = flow_loss(reference, *args)
    change_w, change_l = (flow_loss(model, *args) - before).chunk(2)
    margin = -beta * (change_w - change_l)
    return -F.logsigmoid(margin).mean(), {"right": (margin.detach() > 0).float().mean(),
                                          "change_w": change_w.detach().mean(),
                                          "change_l": change_l.detach().mean()}


# --- preferences: the channels of x0 hold the chosen latent, then the rejected one ---

def ranked(scores: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Return (pairs [m, 2c, h, w], their indices [m]), the better sample first, without ties.
    scores [n, 2]; first, second [n, c, h, w]."""
    which = torch.nonzero(scores[:, 0] != scores[:, 1]).squeeze(1)
    better = (scores[which, 0] > scores[which, 1]).view(-1, 1, 1, 1)
    a, b = first[which], second[which]
    return torch.cat([torch.where(better, a, b), torch.where(better, b, a)], 1), which


def graded(latents: Tensor, codes: Tensor, objects: int) -> Tensor:
    """Return how many of the attributes that its prompt states each image [n] shows."""
    found = grader.align(grader.grade(scenes.decode(latents), objects), codes)
    return ((found == codes) & (codes >= 0)).sum(1)


def as_latents(captions: list[str], codec: Codec,
               buckets: dict[tuple[int, int], tuple[Tensor, Tensor]]) -> Latents:
    """Return pairs, by latent size with the numbers of their captions, as training data."""
    text = codec.text(captions)
    return Latents(captions, text.context, text.pooled, torch.arange(len(captions))[:, None],
                   null_text(codec), buckets, {})


def toy_pairs(toy: ToyConfig, recipe: Recipe, teacher: MMDiT, codec: Codec, prompts: int, seed: int,
              batch: int) -> Latents:
    """Return two samples of the teacher for each of `prompts` prompts, drawn with guidance. The
    grader prefers the one that shows more of what the prompt states."""
    parts = draw_prompts(toy, prompts, PREFERENCES + seed)
    row = teacher_row(teacher, recipe)
    with progress("pairs", 2 * prompts) as bar:
        samples = [generate(row, codec, parts, (2 * seed + i) * prompts, batch, bar.update)[0]
                   for i in range(2)]
    captions = sorted({caption for part in parts for caption in part.captions})
    number = {caption: i for i, caption in enumerate(captions)}
    buckets = {}
    for part, first, second in zip(parts, *samples):
        scores = torch.stack([graded(x, part.codes, toy.objects) for x in (first, second)], 1)
        pairs, which = ranked(scores, first, second)
        ids = torch.tensor([number[part.captions[i]] for i in which])
        buckets[tuple(pairs.shape[2:])] = pairs, ids
    return as_latents(captions, codec, buckets)


def read_pairs(path: Path, encoders: str, sizes: Sequence[tuple[int, int]], codec: Codec,
               device: torch.device) -> Latents:
    """Return the pairs of images of a .jsonl file, encoded by the VAE in `encoders`, each pair at
    the size of the run with the nearest aspect ratio.

    Raises InputError that names the pair where both images are one file or one is missing.
    """
    found = read_objects(path, ["prompt", "chosen", "rejected"])
    must(bool(found), f"{path}: it has no pair; write one per line")
    files = []
    for number, line in enumerate(found, 1):
        chosen, rejected = line["chosen"], line["rejected"]
        must(chosen != rejected,
             f"{path}: pair {number} must be of two images (got {chosen!r} twice)")
        files.append([path.parent / chosen, path.parent / rejected])
        for file in files[-1]:
            must(file.exists(), f"{path}: pair {number} must be of existing files (got {file})")
    vae = load_vae(encoders, device)
    captions = list(dict.fromkeys(line["prompt"] for line in found))
    number = {caption: i for i, caption in enumerate(captions)}
    parts = {}
    for line, pair in zip(found, files):
        try:
            h, w = images.image_size(pair[0])
            size = min(sizes, key=lambda hw: abs(hw[0] / hw[1] - h / w))
            pixels = torch.stack([images.read_image(file, size) for file in pair])
        except InputError as error:
            raise InputError(f"{path}: {pair[0]} and {pair[1]}: {error}") from None
        latents = encode_images(vae, pixels.to(device) / 127.5 - 1)
        x0, ids = parts.setdefault((size[0] // 8, size[1] // 8), ([], []))
        x0.append(latents.cpu().flatten(0, 1))
        ids.append(number[line["prompt"]])
    buckets = {hw: (torch.stack(x0), torch.tensor(ids)) for hw, (x0, ids) in sorted(parts.items())}
    return as_latents(captions, codec, buckets)


# --- the command ---

def parse(argv: list[str]) -> Namespace:
    """Return the flags; raise InputError for values out of range."""
    parser = Parser(prog="python -m ladd.dpo", description=__doc__.split("\n\n")[0])
    flag = parser.add_argument
    flag("--run", metavar="FOLDER", required=True, help="run of train.py with teacher and student")
    flag("--out", metavar="FOLDER", help="default: dpo in the run folder")
    flag("--preferences", metavar="FILE",
         help=".jsonl of pairs; default: samples of the teacher, graded (toy dataset only)")
    flag("--prompts", metavar="N", type=int, default=12288,
         help="prompts with two graded samples each; ties are left out")
    flag("--rank", metavar="N", type=int, default=16, help="rank of the LoRA")
    flag("--alpha", metavar="A", type=float,
         help="LoRA alpha, scale = alpha / rank; default: the rank")
    flag("--targets", choices=lora.TARGETS, default="all", help="layers with a LoRA")
    flag("--beta", metavar="B", type=float, default=100.0,
         help="strength of the tie to the network before tuning")
    flag("--steps", metavar="N", type=int, default=200, help="training steps")
    flag("--batch", metavar="N", type=int, default=64, help="pairs per step")
    flag("--lr", metavar="R", type=float, default=3e-4,
         help=f"learning rate, after {WARMUP} steps of warm-up")
    flag("--save-every", metavar="N", type=int, default=100, help="steps between checkpoints")
    flag("--n", metavar="N", type=int, help="images of each row; default: as in the run")
    flag("--seed", metavar="N", type=int, default=0, help="seed of prompts, noise and LoRA")
    flag("--device", choices=("auto", "cpu", "cuda"), default="auto")
    args = parser.parse(argv)
    for name in ("prompts", "rank", "steps", "batch", "save_every"):
        value = getattr(args, name)
        must(1 <= value <= 10 ** 9, f"--{name.replace('_', '-')} must be 1 to 1000000000 (got "
             f"{value})")
    must(args.n is None or 6 <= args.n <= 10 ** 9, f"--n must be at least 6 (got {args.n})")
    must(0 <= args.seed < 2 ** 31, f"--seed must be 0 to {2 ** 31 - 1} (got {args.seed})")
    for name, most in (("lr", 1), ("beta", 10 ** 6), ("alpha", 10 ** 6)):
        value = getattr(args, name)
        must(value is None or 1e-9 <= value <= most,        # NaN does not pass
             f"--{name} must be 1e-09 to {most} (got {value})")
    return args


def train(args: Namespace, means: tuple[float, ...], model: MMDiT, reference: MMDiT,
          latents: Latents, out: Path, recipe: dict, device: torch.device,
          stopper: Stopper) -> None:
    """Train the LoRA of `model` at the noise levels of the teacher's training, a mixture of
    LogitNormal(mean, 1). Training resumes from checkpoints of the same `recipe` in `out`, and ends
    early after a signal."""
    optimizer = AdamW(model, args.lr, beta1=0.9, beta2=0.99)
    parts = {"lora": lora.parameters(model), "opt": optimizer.state()}  # what training resumes from
    saver = state.Saver(out / "checkpoints")
    start = 0
    if saved := state.open_state(saver.folder):
        start = saved.step
        state.restore(saved, parts)

    def make(step: int) -> tuple[Tensor, ...]:
        """Return chosen, rejected, noise, noise level and text, a function of the step alone."""
        batch = latents.batch(step, args.batch, args.seed)
        g = flow.generator(args.seed, 7, step)
        chosen, rejected = batch.x0.chunk(2, 1)
        sigma = flow.logit_normal(len(chosen), means, g)
        eps = torch.randn(chosen.shape, generator=g)
        return chosen, rejected, eps, sigma, *batch.text[:2]

    steps = range(start, args.steps)
    batches = Prefetch(make, ((i,) for i in steps), device)
    health = Health()
    bar = progress("dpo", args.steps, start)
    with saver, bar:
        for step, (*x0, eps, sigma, context, pooled) in zip(steps, batches):
            optimizer.lr = args.lr * min(1, (step + 1) / WARMUP)
            text = Text(context, pooled)
            loss, stats = dpo_loss(model, reference, *x0, eps, sigma, text, args.beta)
            loss.backward()
            norms = optimizer.step()
            health.note(step + 1, {"loss": loss}, {"": (model, norms)})
            bar.update()
            done = step + 1 == args.steps or bool(stopper)
            if done or (step + 1) % 10 == 0:
                health.check()
                bar.set_postfix(loss=f"{loss.item():.3f}", right=f"{stats['right'].item():.2f}")
            if done or (step + 1) % args.save_every == 0:
                saver.begin(step + 1, state.collect(parts), recipe)
            if done:
                break


def main(argv: list[str]) -> None:
    args = parse(argv)
    world = parallel.ranks()[1]
    must(world == 1, f"torchrun must start 1 process of ladd.dpo (got {world})")
    began = time.perf_counter()
    run = Path(args.run)
    config = read_config(run)
    device = pick_device(args.device)
    dtype = compute_dtype(config.precision, device)
    kind = "a .jsonl of pairs for a run on real images"
    if not config.real:
        kind = "left out for a run on the toy dataset"
    must(bool(args.preferences) == config.real,
         f"--preferences must be {kind}, {run} (got {args.preferences})")
    must(config.task == "text", "--run must be a run of --task text, since pairs are of captions "
         f"(got {config.task})")
    out = Path(args.out or run / "dpo")
    parts = [run / name for name in ("", "checkpoints", "data", "samples")]
    must(not (out / "config.json").exists() and out.resolve() not in map(Path.resolve, parts),
         f"--out must not be the folder of a run (got {out})")
    ops = pick_kernels("auto", args.device, config.precision)
    paths = {"teacher": config.teacher or run / "checkpoints" / "teacher.safetensors",
             "student": run}
    networks = {name: checkpoint.load_mmdit(Path(path), ops) for name, path in paths.items()}
    depths = {name: network.config.depth for name, network in networks.items()}
    must(networks["teacher"].config == networks["student"].config,
         f"{run}: the student must have the teacher's {depths['teacher']} blocks, whose delta it "
         f"gets (got {depths['student']})")
    toy = config.group(ToyConfig)
    if config.real:
        codec = sd3_codec(config.encoders, device, config.t5, config.t5_tokens)
    else:
        codec = toy_codec(toy)
    stopper = Stopper()
    teacher, student = (frozen(networks[name], dtype, device) for name in ("teacher", "student"))
    recipe = {"teacher": checkpoint.fingerprint(paths["teacher"]),
              "preferences": fingerprint(args.preferences) if args.preferences else "",
              **{name: getattr(args, name) for name in RECIPE}}
    # before the pairs, which take minutes: a folder that cannot be used
    with locked(out):
        if saved := state.open_state(out / "checkpoints"):
            state.check_meta(saved, recipe)
        if config.real:
            latents = read_pairs(Path(args.preferences), config.encoders, config.hw, codec, device)
        else:
            latents = toy_pairs(toy, config.recipe, teacher, codec, args.prompts, args.seed,
                                config.sample_batch)
        codec.release()
        for (h, w), (x0, _) in latents.buckets.items():
            must(len(x0) >= args.batch, f"pairs of {8 * h}x{8 * w} images must be at least "
                 f"--batch, {args.batch} (got {len(x0)})")
        model = networks["teacher"].float().to(device)
        model.compute_dtype = dtype
        generator = torch.Generator().manual_seed(args.seed)
        lora.add(model, args.rank, args.alpha or args.rank, lora.TARGETS[args.targets], generator)
        train(args, config.teacher_means, model, teacher, latents, out, recipe, device, stopper)
        if stopper:
            return print(f"{stopper.signal}: saved in {out / 'checkpoints'}; the same command "
                         "resumes")
        path = out / "lora.safetensors"
        lora_files.save(path, factors(model), model.config,
                        {"run": run.name, "beta": str(args.beta), "steps": str(args.steps)})
        pairs = sum(len(x0) for x0, _ in latents.buckets.values())
        print(f"{path}: rank {args.rank} on {len(lora.of_kind(model, lora.Lora))} layers, from "
              f"{pairs} pairs")
        if config.real:
            return
        rows = []
        for network, its_rows in (
                (teacher, [teacher_row(teacher, config.recipe)]),
                (student, student_rows("student", student, config.recipe))):
            tuned = with_delta(network, path)
            for row in its_rows:
                rows += [row, row._replace(name=f"{row.name} + preferences", model=tuned)]
        write_toy_report(rows, toy, codec, args.n or config.n, config.sample_batch, out,
                         {"pairs": pairs}, began)


def with_delta(network: MMDiT, path: Path) -> MMDiT:
    """Return a frozen copy with the LoRA of `path` merged into its weights."""
    copy = frozen(network, network.compute_dtype, network.pos_embed.device)
    lora.apply(copy, lora_files.load(path))
    lora.merge(copy)
    return copy.requires_grad_(False)


if __name__ == "__main__":
    run_script("ladd.dpo", main)
