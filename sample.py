"""Prompts to images: a student in 1 to 4 steps, or its teacher.

    python sample.py --run runs/tiny --prompt "large red circle left on black" --out red.png
    python sample.py --run runs/tiny --prompt-file prompts.txt --num 4 --steps 2 --out folder
    python sample.py --run runs/tiny --prompt "small blue cross" --num 3 --compare --out compare.png
    python sample.py --checkpoint student.safetensors --prompt "" --out any.png

Networks of real images need SD3's encoders and VAE, a folder as it is published. A teacher also writes
latents to distill from, shard by shard; the same call completes them, torchrun shares them out:

    python sample.py --checkpoint sd3.safetensors --encoders FOLDER --prompt "a red fox" --out fox.png
    python sample.py --checkpoint sd3.safetensors --encoders FOLDER --prompt-file F --save-latents DIR

Image i starts from the noise of seed + i, made on the CPU in fp32: its picture is the same, to rounding,
whatever the batch or device. Several images go to a folder, as 000000_seed0.png and so on; no file is
overwritten. The script reads top to bottom: parse, load, plan, write, main (text, noise, sample, decode).
"""
import hashlib
import json
import os
import time
from argparse import Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import kernels
from ladd import checkpoint, encode, flow, report, shapes, synthesize
from ladd.config import (PRESETS, Config, InputError, Parser, parse_size, parse_value, run_script,
                         validated)
from ladd.data import read_json
from ladd.distill import Text
from ladd.domain import Domain, sd3_domain, world_domain
from ladd.mmdit import MMDiT
from ladd.parallel import finish, ranks
from ladd.run import (Stopper, compute_dtype, device_name, frozen, levels_of, memory_gb, pick_device,
                      pick_kernels)
from ladd.sampler import Graphed, image_noise, sample
from ladd.speed import wait

ROLES = "student", "teacher"
RECIPE = "objects", "text_dim", "sizes", "shift", "levels", "sampler", "guidance", "sample_steps"
RANGES = dict(num=(1, 10 ** 6), steps=(1, 1000), guidance=(0, 100), seed=(0, 2 ** 62), batch=(1, 4096),
              shard=(1, 10 ** 6), t5_tokens=(1, 512))


def must(ok: bool, message: str) -> None:
    if not ok:
        raise InputError(message)


# --- parse ---

def parse(argv: list[str]) -> Namespace:
    """The flags, each in its range, those that exclude each other apart; InputError otherwise."""
    parser = Parser(prog="sample.py", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("--run", metavar="FOLDER", help="run folder of train.py")
    flag("--checkpoint", metavar="FILE", help="one network: train.py's, or SD3 as a file or diffusers folder")
    flag("--encoders", metavar="FOLDER", help="SD3's text encoders and VAE; default: as in the run")
    flag("--t5", choices=("device", "cpu", "none"), default="device", help="where T5 runs; none: zeros")
    flag("--t5-tokens", metavar="N", type=int, default=256, help="T5 tokens a prompt")
    flag("--text-cache", metavar="FILE", help="keeps text of --encoders, so that known prompts load none")
    flag("--tiled", action="store_true", help="decode large images in tiles, to save memory")
    flag("--model", choices=ROLES, help="network of the run; default: the student")
    flag("--prompt", metavar="TEXT", action="append", help="caption, repeatable; empty: anything")
    flag("--prompt-file", metavar="FILE", help="captions, one a line; empty lines and # comments are skipped")
    flag("--num", metavar="N", type=int, default=1, help="images a prompt")
    flag("--steps", metavar="N", type=int, help="default: all levels of a student, a teacher's as in its run")
    flag("--sigmas", metavar="S,S", help="final levels falling from 1, in place of --steps; 0 is implied")
    flag("--guidance", metavar="G", type=float, help="the teacher's; default: as in its run")
    flag("--seed", metavar="N", type=int, default=0, help="image i uses seed + i")
    flag("--size", metavar="HxW", help="pixels, multiples of 16; default: the first size of the run; "
         "--save-latents takes several, comma-separated")
    flag("--batch", metavar="N", type=int, default=16, help="images at a time")
    flag("--compare", action="store_true", help="one sheet: teacher at many and 4 steps, student at 4, 2, 1")
    flag("--grid", action="store_true", help="one sheet of all images")
    flag("--out", metavar="PATH", help="a .png for one image or sheet, a folder for several images")
    flag("--save-latents", metavar="DIR", help="no pictures: the teacher's latents, for train.py --data")
    flag("--shard", metavar="N", type=int, default=64, help="latents a shard")
    flag("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: CUDA where there is one")
    flag("--kernels", choices=kernels.NAMES, default="auto", help="implementation of the operations")
    flag("--graph", action="store_true", help="each network as a CUDA graph: for small pictures and batches")
    flag("--no-metadata", action="store_true", help="PNGs without their parameters")
    args = parser.parse(argv)
    for a, b in ("run", "checkpoint"), ("prompt", "prompt_file"):
        given = sum(getattr(args, name) is not None for name in (a, b))
        found = ("neither", "one", "both")[given]
        must(given == 1, f"--{a}, --{b}: found {found}, exactly one expected".replace("_", "-"))
    for name, (low, high) in RANGES.items():
        value = getattr(args, name)
        must(value is None or low <= value <= high, f"--{name}: found {value}, {low} to {high} expected")
    must(args.steps is None or args.sigmas is None, "--steps, --sigmas: found both, at most one expected")
    extra = [name for name in ("checkpoint", "model", "steps", "sigmas", "grid") if getattr(args, name)]
    must(not args.compare or not extra, f"--compare: found --{' --'.join(extra)}, only --run expected")
    if args.save_latents:
        pictures = "out", "compare", "grid", "sigmas", "tiled", "text_cache", "graph"
        extra = [f"--{name.replace('_', '-')}" for name in pictures if getattr(args, name)]
        must(not extra, f"--save-latents: found {' '.join(extra)} beside it, which are for pictures")
    else:
        must(bool(args.out), "--out: found nothing, a .png for one picture or a folder for several expected")
    return args


def read_prompts(args: Namespace, config: Config) -> list[str]:
    """The prompts; "" is the null prompt. Those of the world as shapes.embed spells them, each checked by the
    grammar."""
    prompts = args.prompt
    if prompts is None:
        prompts, notes = encode.read_prompts(args.prompt_file)
        for note in notes:
            print(note)
    if config.real:
        return prompts
    prompts = [" ".join(prompt.lower().split()) for prompt in prompts]
    for prompt in filter(None, prompts):
        shapes.parse(prompt, config.objects)
    return prompts


def read_sigmas(text: str) -> list[float]:
    """Final levels from 1 to the closing 0."""
    try:
        sigmas = list(parse_value(text, tuple[float, ...]))
    except ValueError:
        sigmas = []
    sigmas += [0.0] * (sigmas[-1:] != [0])
    must(sigmas[0] == 1 and all(a > b for a, b in zip(sigmas, sigmas[1:])),      # NaN does not pass
         f"--sigmas: found {text!r}, numbers falling from 1 expected, such as 1,0.5")
    return sigmas


# --- load ---

def recipe(stored: Any, where: Path, encoders: str) -> Config:
    """What sampling needs of Config, from config.json or a checkpoint's metadata (tuples there are "a,b")."""
    missing = [name for name in RECIPE if not isinstance(stored, dict) or name not in stored]
    must(not missing, f"{where}: found no {', '.join(missing)}; accepted is what train.py wrote")
    text = lambda value: ",".join(map(str, value)) if isinstance(value, list) else str(value)
    try:
        given = {name: parse_value(text(stored[name]), Config.__annotations__[name]) for name in RECIPE}
        probs = tuple(1 / len(given["levels"]) for _ in given["levels"])         # of training; any will do
        return validated(Config(**given, probs=probs, encoders=encoders))
    except ValueError as error:
        raise InputError(f"{where}: {error}") from None


def published(path: Path, encoders: str) -> Config:
    """The recipe of a published SD3: its preset's, found by the network's sizes."""
    c = checkpoint.load_mmdit(path).config
    known = [Config(**preset, preset=name, encoders=encoders) for name, preset in PRESETS.items()
             if name.startswith("sd3")]
    for config in known:
        if ((c.depth, c.width, c.qk_norm, len(c.dual_blocks))
                == (config.depth, config.width, config.qk_norm, config.dual_blocks)):
            return validated(config)
    raise InputError(f"{path}: found an MMDiT of {c.depth} blocks of width {c.width} and no metadata on how "
                     f"to sample; train.py's networks or {', '.join(k.preset for k in known)} accepted")


def locate(args: Namespace) -> tuple[Config, dict[str, Path]]:
    """(the recipe, the file of each role that is asked for)."""
    if args.checkpoint is not None:
        path = Path(args.checkpoint)
        values = checkpoint.load_metadata(path)
        role = values.get("role")
        real = role is None or values.get("domain") == "sd3"           # a published network tells nothing
        must(not real or args.encoders is not None, f"--encoders: found nothing; {path} is a network of real "
             "images, a folder with SD3's text encoders and VAE expected")
        must(real or args.encoders is None, f"--encoders: found {args.encoders}; {path} is a network of the "
             "built-in world, which needs none")
        if role is None:
            config, role = published(path, args.encoders), "teacher"
        else:
            config = recipe(values, path, args.encoders if real else "")
        must(role in ROLES, f"{path}: found role {role!r}, {' or '.join(ROLES)} expected")
        must(args.model in (None, role), f"--model: found {args.model}, {path} is a {role}")
        return config, {role: path}
    run, stored = Path(args.run), Path(args.run) / "config.json"
    must(stored.exists(), f"--run {run}: found no config.json there, a run folder of train.py expected")
    values = read_json(stored)
    encoders = values.get("encoders", "") if isinstance(values, dict) else ""
    must(bool(encoders) or args.encoders is None,
         f"--encoders: found {args.encoders}; {run} is of the built-in world, which needs none")
    config = recipe(values, stored, encoders and args.encoders or encoders)
    files = {role: run / "checkpoints" / f"{role}.safetensors" for role in ROLES}
    if values.get("teacher"):
        files["teacher"] = Path(values["teacher"])        # a run with --teacher holds no copy of it
    asked = {role: files[role] for role in (ROLES if args.compare else (args.model or "student",))}
    for path in asked.values():
        must(path.exists(), f"{path}: found no such file; train.py writes it when that stage is done")
    return config, asked


def load(path: Path, args: Namespace, config: Config, sizes: list[tuple[int, int]]) -> MMDiT:
    """The network, memory-mapped on the CPU; InputError unless it takes these sizes, and reads the world's
    text if it is of the world."""
    model = checkpoint.load_mmdit(path, pick_kernels(args.kernels, args.device))
    c, d, channels = model.config, config.text_dim, len(shapes.CHANNELS)
    widths, wanted = (c.in_channels, c.out_channels, c.context_dim, c.pooled_dim), (channels, channels, d, d)
    if config.real:
        widths, wanted = widths[:2], wanted[:2]
    must(widths == wanted, f"{path}: found {widths} channels (in, out, text, pooled), {wanted} expected")
    most = 8 * c.patch * c.pos_grid
    for h, w in sizes:
        must(max(h, w) <= most, f"--size: found {h}x{w}, {path} takes at most {most}x{most}")
    return model


def domain_of(args: Namespace, config: Config, device: torch.device, models: dict[str, MMDiT]) -> Domain:
    """Encoders and decoder of these networks; InputError where their text has not the networks' width."""
    if not config.real:
        return world_domain(config)
    cache = Path(args.text_cache) if args.text_cache else None
    domain = sd3_domain(config.encoders, device, args.t5, args.t5_tokens, cache, args.tiled)
    for role, model in models.items():
        wanted = model.config.context_dim, model.config.pooled_dim
        must(domain.widths == wanted, f"--encoders {config.encoders}: found text of widths {domain.widths} "
             f"(tokens, pooled), the {role} reads {wanted}")
    return domain


# --- plan ---

class Column(NamedTuple):
    """One way to sample: all that decides a picture but the weights, prompt, seed and size."""
    role: str
    sampler: str
    steps: int
    sigmas: list[float]         # final levels from 1 to 0
    guidance: float


def plan(args: Namespace, config: Config, role: str) -> dict[str, Column]:
    """The column asked for, or those of --compare, which are the report's; titles tell the evaluations."""
    guidance = config.guidance if args.guidance is None else args.guidance

    def column(role: str, steps: int, guidance: float = 1.0) -> Column:
        if role == "teacher":
            return Column(role, "euler", steps, flow.euler_levels(steps, config.shift).tolist(), guidance)
        levels = torch.tensor((*levels_of(config.levels, steps), 0.0))
        return Column(role, config.sampler, steps, flow.shift(levels, config.shift).tolist(), 1.0)

    if args.compare:
        columns = [column("teacher", config.sample_steps, guidance), column("teacher", 4)]
        columns += [column("student", n) for n in (4, 2, 1) if len(config.levels) % n == 0]
    else:
        must(role == "teacher" or args.guidance in (None, 1), f"--guidance: found {args.guidance}, 1 (none) "
             "expected: a student has its teacher's distilled into it; --model teacher takes others")
        full = config.sample_steps if role == "teacher" else len(config.levels)
        columns = [column(role, args.steps or full, guidance)]
        if args.sigmas is not None:
            sigmas, trained = read_sigmas(args.sigmas), columns[0].sigmas
            columns = [columns[0]._replace(steps=len(sigmas) - 1, sigmas=sigmas)]
            new = [f"{s:g}" for s in sigmas if min(abs(s - t) for t in trained) > 1e-3]
            if role == "student" and new:
                print(f"note: this student was not trained at levels {', '.join(new)}")
    return {f"{c.role} {c.steps}" + (" x 2" if c.guidance != 1 else ""): c for c in columns}


# --- write ---

def outputs(args: Namespace, count: int) -> list[Path]:
    """The files to write, none of which exists, in a folder that does."""
    out, one = Path(args.out), args.grid or args.compare or count == 1
    accepted = "a name ending in .png" if one else "a folder's name, or --grid,"
    must(one == (out.suffix.lower() == ".png"), f"--out: found {out}, {accepted} expected")
    paths = [out] if one else [out / f"{i:06d}_seed{args.seed + i}.png" for i in range(count)]
    for path in paths:
        must(not path.exists(), f"--out: found {path} there already, a new name expected")
    folder = paths[0].parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out: found no way to make {folder} ({error})") from None
    must(os.access(folder, os.W_OK), f"--out: found {folder} read-only, a folder to write in expected")
    return paths


def texts(args: Namespace, config: Config, columns: list[Column], files: dict[str, Path],
          hw: tuple[int, int], device: torch.device) -> Callable[[list[str], list[int]], dict[str, str]]:
    """PNG text of given prompts and seeds: "parameters" in the customary form, "ladd" all of it as JSON."""
    if args.no_metadata:
        return lambda prompts, seeds: {}
    models = {}
    for role, path in files.items():
        parts, digest = sorted(path.rglob("*.safetensors")) if path.is_dir() else [path], hashlib.sha256()
        for part in parts:
            with part.open("rb") as file:
                digest = hashlib.file_digest(file, lambda: digest)
        digest = digest.hexdigest()[:10]
        name = f"{Path(args.run).resolve().name}-{role}" if args.run else path.stem
        models[role] = {"model": name, "model_hash": digest}
    described = [c._asdict() | models[c.role] for c in columns]
    shared = {"height": hw[0], "width": hw[1], "shift": config.shift, "device": device_name(device),
              "commit": report.commit(), "versions": report.versions(), "columns": described}

    def text(prompts: list[str], seeds: list[int]) -> dict[str, str]:
        c = described[0]                                             # the customary form knows one of each
        line = (f"Steps: {c['steps']}, Sampler: {c['sampler'].capitalize()}, CFG scale: {c['guidance']:g}, "
                f"Seed: {seeds[0]}, Size: {hw[1]}x{hw[0]}, "
                f"Model hash: {c['model_hash']}, Model: {c['model']}")
        return {"parameters": "\n".join([*dict.fromkeys(prompts), line]),
                "ladd": json.dumps({"prompts": prompts, "seeds": seeds, **shared})}
    return text


def sheet(args: Namespace, prompts: list[str], seeds: list[int],
          pictures: dict[str, list[Tensor]]) -> Image.Image:
    """--compare: a row an image. --grid: a row a prompt, whose seed is increased by j in column +j."""
    stride = args.num if args.grid else 1
    rows = [f"{prompt or '(empty)'}, seed={seed}" for prompt, seed in zip(prompts[::stride], seeds[::stride])]
    if args.grid:
        (title, images), = pictures.items()
        pictures = {f"+{j}" if j else title: images[j::stride] for j in range(stride)}
    return report.contact_sheet(pictures, rows, cell=max(128, *next(iter(pictures.values()))[0].shape))


# --- main ---

def save_latents(args: Namespace, config: Config, prompts: list[str], sizes: list[tuple[int, int]],
                 model: MMDiT, domain: Domain, device: torch.device) -> None:
    """Shards of the teacher's latents, the prompts in turn until each has --num."""
    count = len(prompts) * args.num
    plan = synthesize.prompt_plan(prompts, sizes, count, args.shard, args.seed)
    if not config.real:
        plan = plan._replace(codes=torch.tensor([shapes.parse(p, config.objects) for p in plan.prompts]))
    steps = args.steps or config.sample_steps
    guidance = config.guidance if args.guidance is None else args.guidance
    begin, stopper = time.perf_counter(), Stopper()
    prepare = lambda model: frozen(model, compute_dtype("auto", device), device)
    whole = synthesize.synthesize(
        Path(args.save_latents), plan, model, prepare, domain, steps, config.shift, guidance, args.batch,
        *((torch.bfloat16, 256) if config.real else (torch.float32, 1024)), lambda: bool(stopper))
    if ranks()[0] == 0:
        print(f"{args.save_latents}: {f'{count} latents' if whole else 'stopped, the same call goes on'}, "
              f"{time.perf_counter() - begin:.0f} s, {memory_gb(device):.2f} GB at peak")
    finish()


def main(argv: list[str]) -> None:
    args = parse(argv)
    config, files = locate(args)
    prompts = read_prompts(args, config)
    sizes = [config.hw[0]] if args.size is None else [parse_size(size) for size in args.size.split(",")]
    must(len(sizes) == 1 or bool(args.save_latents), f"--size: found {args.size}, one size expected")
    models = {role: load(path, args, config, sizes) for role, path in files.items()}
    device = pick_device(args.device)
    must(not args.graph or device.type == "cuda", f"--graph: found {device}, a CUDA device accepted")
    domain = domain_of(args, config, device, models)
    if args.save_latents:
        must("teacher" in models, "--save-latents: found a student; --model teacher expected")
        return save_latents(args, config, prompts, sizes, models["teacher"], domain, device)
    prompts, hw = [prompt for prompt in prompts for _ in range(args.num)], sizes[0]
    seeds = [args.seed + i for i in range(len(prompts))]
    columns = plan(args, config, next(iter(files)))
    paths = outputs(args, len(prompts))                              # the last check
    text_of = texts(args, config, [*columns.values()], files, hw, device)

    domain.embed(["", *prompts])
    domain.release()
    models = {role: frozen(model, compute_dtype("auto", device), device) for role, model in models.items()}
    if args.graph:
        models = {role: Graphed(model) for role, model in models.items()}
    null = Text(*(t[0].to(device) for t in domain.embed([""])))
    shape = len(shapes.CHANNELS), hw[0] // 8, hw[1] // 8
    pictures: dict[str, list[Tensor]] = {title: [] for title in columns}
    bar = tqdm(total=len(columns) * len(prompts), desc="images", dynamic_ncols=True)
    begin, seconds, steps = time.perf_counter(), 0.0, 0
    for title, c in columns.items():
        for i in range(0, len(prompts), args.batch):
            part, drawn = prompts[i:i + args.batch], seeds[i:i + args.batch]
            text = Text(*(t.to(device) for t in domain.embed(part)))
            noise = image_noise(drawn, shape).to(device)             # [b, c, h, w]
            wait(device)
            start, sigmas = time.perf_counter(), torch.tensor(c.sigmas)
            x0 = sample(models[c.role], noise, text, sigmas, c.sampler, drawn, null, c.guidance)
            wait(device)
            seconds, steps = seconds + time.perf_counter() - start, steps + c.steps
            images = domain.decode(x0)                               # [b, 3, H, W]
            if args.grid or args.compare:
                pictures[title].extend(images)
            else:                                                    # at once: an interrupted call keeps them
                for path, image, prompt, seed in zip(paths[i:], images, part, drawn):
                    report.save_png(image, path, text_of([prompt], [seed]))
            bar.update(len(part))
    bar.close()
    if args.grid or args.compare:
        report.save_png(sheet(args, prompts, seeds, pictures), paths[0], text_of(prompts, seeds))
    count, wall = len(columns) * len(prompts), time.perf_counter() - begin
    where = paths[0] if len(paths) == 1 else paths[0].parent
    print(f"{where}: {count} images, {count / wall:.2f} images/s, {1000 * seconds / steps:.1f} ms a step of "
          f"{min(args.batch, len(prompts))}, {memory_gb(device):.2f} GB at peak")


if __name__ == "__main__":
    run_script("sample.py", main)
