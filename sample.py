"""Prompts to images: a student in 1 to 4 steps, or its teacher.

    python sample.py --run runs/tiny --prompt "large red circle left on black" --out red.png
    python sample.py --run runs/tiny --prompt-file prompts.txt --num 4 --steps 2 --out folder
    python sample.py --run runs/tiny --prompt "small blue cross" --num 3 --compare --out compare.png
    python sample.py --checkpoint student.safetensors --prompt "" --out any.png

With a picture, whose size is kept: an instruction edits it, or a mask says where to repaint it, by networks
of those tasks (train.py --task); or a network of captions alone starts from it, noised to --strength:

    python sample.py --run runs/tiny-edit --init-image a.png --instruction "make it red" --out b.png
    python sample.py --run runs/tiny-inpaint --init-image a.png --mask m.png --prompt "red circle" --out b.png
    python sample.py --run runs/tiny --init-image a.png --strength 0.5 --prompt "small red cross" --out b.png

Networks of real images need SD3's encoders and VAE, a folder as it is published. A teacher also writes
latents to distill from, shard by shard; the same call completes them, torchrun shares them out:

    python sample.py --checkpoint sd3.safetensors --encoders FOLDER --prompt "a red fox" --out fox.png
    python sample.py --checkpoint sd3.safetensors --encoders FOLDER --prompt-file F --save-latents DIR

Image i starts from the noise of seed + i, made on the CPU in fp32: its picture is the same, to rounding,
whatever the batch or device. Several images go to a folder, as 000000_seed0.png and so on; no file is
overwritten. The script reads top to bottom: parse, picture, load, plan, write, main (text, noise, sample,
decode).
"""
import hashlib
import json
import os
import time
from argparse import Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import kernels
from ladd import checkpoint, encode, flow, images, report, shapes, synthesize, tasks
from ladd.config import (PRESETS, Config, InputError, Parser, parse_size, parse_value, run_script,
                         validated)
from ladd.data import read_json
from ladd.distill import Text, TextImage
from ladd.domain import Domain, sd3_domain, world_domain
from ladd.mmdit import MMDiT
from ladd.parallel import finish, ranks
from ladd.run import (Stopper, compute_dtype, device_name, frozen, levels_of, memory_gb, pick_device,
                      pick_kernels)
from ladd.sampler import Graphed, evaluations, image_noise, sample
from ladd.speed import wait

ROLES = "student", "teacher"
RECIPE = ("task", "objects", "text_dim", "sizes", "shift", "levels", "sampler", "guidance", "image_guidance",
          "sample_steps")
RANGES = dict(num=(1, 10 ** 6), steps=(1, 1000), guidance=(0, 100), image_guidance=(0, 100),
              seed=(0, 2 ** 62), batch=(1, 4096), shard=(1, 10 ** 6), t5_tokens=(1, 512))
READS = {"text": ("prompt", "init_image", "strength"), "inpaint": ("prompt", "init_image", "mask"),
         "edit": ("instruction", "init_image", "image_guidance")}       # flags of some tasks alone


def must(ok: bool, message: str) -> None:
    if not ok:
        raise InputError(message)


def flags(names: Iterable[str], between: str = " ") -> str:
    return between.join(f"--{name}".replace("_", "-") for name in names)


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
    flag("--instruction", metavar="TEXT", action="append", help="in place of captions where a network edits")
    flag("--prompt-file", metavar="FILE", help="captions or instructions, one a line; empty lines and # "
         "comments are skipped")
    flag("--init-image", metavar="FILE", help="the picture to edit, to repaint or to start from")
    flag("--mask", metavar="FILE", help="white where a network that inpaints is to repaint, black elsewhere")
    flag("--strength", metavar="S", type=float, help="of a text network: above 0, near the picture, to "
         "1, noise alone; the nearest of the levels that it samples at")
    flag("--num", metavar="N", type=int, default=1, help="images a prompt")
    flag("--steps", metavar="N", type=int, help="default: all levels of a student, a teacher's as in its run")
    flag("--sigmas", metavar="S,S", help="final levels falling from 1, in place of --steps; 0 is implied")
    flag("--guidance", metavar="G", type=float, help="the teacher's; default: as in its run")
    flag("--image-guidance", metavar="G", type=float, help="and towards the picture that is edited; default: "
         "as in its run")
    flag("--seed", metavar="N", type=int, default=0, help="image i uses seed + i")
    flag("--size", metavar="HxW", help="pixels, multiples of 16; default: the picture's, else the first "
         "size of the run; --save-latents takes several, comma-separated")
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
    for names in ("run", "checkpoint"), ("prompt", "prompt_file", "instruction"):
        given = [name for name in names if getattr(args, name) is not None]
        must(len(given) == 1, f"{flags(names, ', ')}: found {flags(given) or 'none'}, exactly one expected")
    for name, (low, high) in RANGES.items():
        n = getattr(args, name)
        must(n is None or low <= n <= high, f"{flags([name])}: found {n}, {low} to {high} expected")
    must(args.strength is None or 0 < args.strength <= 1,                # NaN does not pass
         f"--strength: found {args.strength}, above 0 and at most 1 expected")
    must(args.steps is None or args.sigmas is None, "--steps, --sigmas: found both, at most one expected")
    extra = [name for name in ("checkpoint", "model", "steps", "sigmas", "grid") if getattr(args, name)]
    must(not args.compare or not extra, f"--compare: found {flags(extra)}, only --run expected")
    if args.save_latents:
        pictures = "out", "compare", "grid", "sigmas", "tiled", "text_cache", "graph", "init_image"
        extra = [name for name in pictures if getattr(args, name)]
        must(not extra, f"--save-latents: found {flags(extra)} beside it, which are for pictures")
    else:
        must(bool(args.out), "--out: found nothing, a .png for one picture or a folder for several expected")
    return args


def check_task(args: Namespace, task: str) -> None:
    """InputError for flags that a network of this task does not read, and for those that it misses."""
    what = f"a network of task {task}"
    must(task == "text" or not args.save_latents,
         f"--save-latents: found {what}, one of task text expected; train.py makes the latents of others")
    extra = [name for names in READS.values() for name in names
             if name not in READS[task] and getattr(args, name) is not None]
    must(not extra, f"{flags(extra[:1])}: found with {what}, {flags(READS[task], ', ')} accepted")
    pair = [name for name in ("init_image", "strength") if getattr(args, name) is not None]
    must(task != "text" or len(pair) != 1,
         f"{flags(pair)}: found alone with {what}, --init-image and --strength together accepted")
    for name in {"text": (), "edit": ("init_image",), "inpaint": ("init_image", "mask")}[task]:
        must(getattr(args, name) is not None, f"{flags([name])}: found nothing, a file for {what} expected")


def read_prompts(args: Namespace, config: Config) -> list[str]:
    """The prompts or instructions; "" is the null prompt. Those of the world as shapes.embed spells them,
    each checked by the grammar."""
    prompts = args.prompt or args.instruction
    parse = tasks.parse_instruction if config.task == "edit" else shapes.parse
    if prompts is None:
        prompts, notes = encode.read_prompts(args.prompt_file)
        for note in notes:
            print(note)
    if config.real:
        return prompts
    prompts = [" ".join(prompt.lower().split()) for prompt in prompts]
    for prompt in filter(None, prompts):
        parse(prompt, config.objects)
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


# --- picture ---

class Source(NamedTuple):
    """The picture that is given."""
    picture: Tensor             # [1, 3, H, W] in [-1, 1]
    mask: Tensor | None         # bool [1, H, W], True is repainted


def read_file(flag: str, path: str) -> Tensor:
    """uint8 [3, H, W] of an image file, of its own size; InputError names the flag."""
    try:
        return images.read_image(Path(path), images.image_size(Path(path)))
    except InputError as error:
        raise InputError(f"{flag} {path}: {error}") from None


def read_source(args: Namespace) -> Source | None:
    """What --init-image and --mask hold; InputError where they do not fit each other, --size or the codec."""
    if args.init_image is None:
        return None
    pixels = read_file("--init-image", args.init_image)
    h, w = hw = tuple(pixels.shape[1:])
    must(h % 16 == w % 16 == 0, f"--init-image {args.init_image}: found {h}x{w} pixels, sides that are "
         "multiples of 16 expected")
    must(args.size is None or parse_size(args.size) == hw,
         f"--size: found {args.size}, --init-image {args.init_image} has {h}x{w}")
    picture = pixels[None].float() / 127.5 - 1
    if args.mask is None:
        return Source(picture, None)
    mask = read_file("--mask", args.mask)
    with Image.open(args.mask) as file:
        clear = file.has_transparency_data
    must(not clear, f"--mask {args.mask}: found transparency, black and white expected")
    must(bool((mask == mask[:1]).all()), f"--mask {args.mask}: found colours, black and white expected")
    try:
        return Source(picture, tasks.check_mask(mask[:1], hw))
    except InputError as error:
        raise InputError(f"--mask {args.mask}: {str(error).removeprefix('mask: ')}") from None


def sizes_of(args: Namespace, config: Config, source: Source | None) -> list[tuple[int, int]]:
    """(H, W) of the pictures: the given one's, or of --size, or the first of the run."""
    if source:
        return [tuple(source.picture.shape[2:])]
    sizes = [config.hw[0]] if args.size is None else [parse_size(size) for size in args.size.split(",")]
    must(len(sizes) == 1 or bool(args.save_latents), f"--size: found {args.size}, one size expected")
    return sizes


def conditions(source: Source | None, task: str, domain: Domain,
               device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    """(latents to noise and start from, channels beside the noise), [1, c, h, w] each, None for none."""
    if source is None:
        return None, None
    if task == "inpaint":
        return None, tasks.beside(domain.latents, *source).to(device)
    latents = domain.latents(source.picture).to(device)
    return (latents, None) if task == "text" else (None, latents)


def finished(pictures: Tensor, source: Source | None) -> Tensor:
    """Pictures [b, 3, H, W] with what a mask keeps of the source."""
    if source is None or source.mask is None:
        return pictures
    mask = source.mask.expand(len(pictures), -1, -1)
    return tasks.composite(source.picture.expand_as(pictures), pictures, mask)


def shown(source: Source | None, count: int) -> dict[str, list[Tensor]]:
    """--compare's first column, `count` times the picture, stripes where it is repainted."""
    if source is None:
        return {}
    if source.mask is None:
        return {"source": [source.picture[0]] * count}
    return {"to repaint": [tasks.hatched(*source)[0]] * count}


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
        must(path.exists(), f"{path}: found no such file; train.py writes it when that stage is done"
             + " (never with --objective flow: --model teacher)" * (values.get("objective") == "flow"))
    return config, asked


def load(path: Path, args: Namespace, config: Config, sizes: list[tuple[int, int]]) -> MMDiT:
    """The network, memory-mapped on the CPU; InputError unless it has its task's channels, takes these sizes,
    and reads the world's text if it is of the world."""
    model = checkpoint.load_mmdit(path, pick_kernels(args.kernels, args.device))
    c, d, channels = model.config, config.text_dim, len(shapes.CHANNELS)
    widths = c.in_channels, c.out_channels, c.context_dim, c.pooled_dim
    wanted = channels + config.beside, channels, d, d
    if config.real:
        widths, wanted = widths[:2], wanted[:2]
    must(widths == wanted, f"{path}: found {widths} channels (in, out, text, pooled), {wanted} expected of "
         f"task {config.task}")
    most, flag = 8 * c.patch * c.pos_grid, f"--init-image {args.init_image}" if args.init_image else "--size"
    for h, w in sizes:
        must(max(h, w) <= most, f"{flag}: found {h}x{w}, {path} takes at most {most}x{most}")
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
    steps: int                  # from noise; with --strength the last ones are made
    sigmas: list[float]         # final levels from 1 to 0; with --strength from where it starts
    guidance: float
    image_guidance: float
    strength: float = 1.0       # the first level, before the shift


def plan(args: Namespace, config: Config, role: str) -> dict[str, Column]:
    """The column asked for, or those of --compare, which are the report's; titles tell the evaluations."""
    guidance = config.guidance if args.guidance is None else args.guidance
    both = guidance, config.image_guidance if args.image_guidance is None else args.image_guidance

    def column(role: str, steps: int, guidance: tuple[float, float] = (1.0, 1.0)) -> Column:
        if role == "teacher":
            return Column(role, "euler", steps, flow.euler_levels(steps, config.shift).tolist(), *guidance)
        levels = torch.tensor((*levels_of(config.levels, steps), 0.0))
        return Column(role, config.sampler, steps, flow.shift(levels, config.shift).tolist(), 1.0, 1.0)

    if args.compare:
        columns = [column("teacher", config.sample_steps, both), column("teacher", 4)]
        columns += [column("student", n) for n in (4, 2, 1) if len(config.levels) % n == 0]
    else:
        for name in "guidance", "image_guidance":
            value = getattr(args, name)
            must(role == "teacher" or value in (None, 1), f"{flags([name])}: found {value}, 1 (none) "
                 "expected: a student has its teacher's distilled into it; --model teacher takes others")
        full = config.sample_steps if role == "teacher" else len(config.levels)
        columns = [column(role, args.steps or full, both)]
        if args.sigmas is not None:
            sigmas, trained = read_sigmas(args.sigmas), columns[0].sigmas
            columns = [columns[0]._replace(steps=len(sigmas) - 1, sigmas=sigmas)]
            new = [f"{s:g}" for s in sigmas if min(abs(s - t) for t in trained) > 1e-3]
            if role == "student" and new:
                print(f"note: this student was not trained at levels {', '.join(new)}")
    if args.strength is not None:
        columns = [started(args, config, c) for c in columns]
    evals = [evaluations(c.guidance, c.image_guidance) for c in columns]
    return {f"{c.role} {c.steps}" + (f" x {n}" if n > 1 else ""): c for c, n in zip(columns, evals)}


def started(args: Namespace, config: Config, column: Column) -> Column:
    """The column from that of its levels on which, before the shift, is nearest to --strength; a note says so
    where it is another value."""
    levels = flow.shift(torch.tensor(column.sigmas[:-1]), 1 / config.shift).tolist()  # 1 / a undoes a
    i = min(range(len(levels)), key=lambda i: abs(levels[i] - args.strength))
    if abs(levels[i] - args.strength) > 1e-3:
        kind = "trained level" if column.role == "student" and args.sigmas is None else "level"
        of = f" of {column.role} {column.steps}" if args.compare else ""
        print(f"note: --strength {args.strength:g}: {levels[i]:.3g}, the nearest {kind}{of}")
    return column._replace(sigmas=column.sigmas[i:], strength=round(levels[i], 6))


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
    given = {name: Path(getattr(args, name)).name for name in ("init_image", "mask") if getattr(args, name)}
    shared = {"task": config.task, **given, "height": hw[0], "width": hw[1], "shift": config.shift,
              "device": device_name(device), "commit": report.commit(), "versions": report.versions(),
              "columns": described}

    def text(prompts: list[str], seeds: list[int]) -> dict[str, str]:
        c = described[0]                                             # the customary form knows one of each
        line = (f"Steps: {c['steps']}, Sampler: {c['sampler'].capitalize()}, CFG scale: {c['guidance']:g}, "
                + f"Image CFG scale: {c['image_guidance']:g}, " * (c["image_guidance"] != 1)
                + f"Seed: {seeds[0]}, Size: {hw[1]}x{hw[0]}, "
                f"Model hash: {c['model_hash']}, Model: {c['model']}"
                + f", Denoising strength: {c['strength']:g}" * (args.strength is not None))
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
        Path(args.save_latents), plan, model, prepare, domain, steps, config.shift, (guidance, 1.0),
        args.batch, *((torch.bfloat16, 256) if config.real else (torch.float32, 1024)), lambda: bool(stopper))
    if ranks()[0] == 0:
        print(f"{args.save_latents}: {f'{count} latents' if whole else 'stopped, the same call goes on'}, "
              f"{time.perf_counter() - begin:.0f} s, {memory_gb(device):.2f} GB at peak")
    finish()


def begun(column: Column, seeds: list[int], shape: tuple[int, ...], text: Text, init: Tensor | None,
          beside: Tensor | None) -> tuple[Tensor, Text | TextImage]:
    """(x [b, *shape], text) that sampling begins with: noise, or `init` noised to the column's first level;
    the text with what the network reads beside x."""
    x = image_noise(seeds, shape).to(text.context.device)
    if init is not None:
        x = flow.noised(init.expand_as(x), x, torch.tensor(column.sigmas[:1]).to(x))
    if beside is not None:
        text = TextImage(*text, beside.expand(len(x), *beside.shape[1:]))
    return x, text


def main(argv: list[str]) -> None:
    args = parse(argv)
    config, files = locate(args)
    check_task(args, config.task)
    prompts, source = read_prompts(args, config), read_source(args)
    sizes = sizes_of(args, config, source)
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
    given = conditions(source, config.task, domain, device)
    models = {role: frozen(model, compute_dtype("auto", device), device) for role, model in models.items()}
    if args.graph:
        models = {role: Graphed(model) for role, model in models.items()}
    null = Text(*(t[0].to(device) for t in domain.embed([""])))
    shape = len(shapes.CHANNELS), hw[0] // 8, hw[1] // 8
    pictures = {title: [] for title in columns}
    bar = tqdm(total=len(columns) * len(prompts), desc="images", dynamic_ncols=True)
    begin, seconds, steps = time.perf_counter(), 0.0, 0
    for title, c in columns.items():
        for i in range(0, len(prompts), args.batch):
            part, drawn = prompts[i:i + args.batch], seeds[i:i + args.batch]
            text = Text(*(t.to(device) for t in domain.embed(part)))
            x, text = begun(c, drawn, shape, text, *given)
            wait(device)
            start, sigmas = time.perf_counter(), torch.tensor(c.sigmas)
            x0 = sample(models[c.role], x, text, sigmas, c.sampler, drawn, null, c.guidance, c.image_guidance)
            wait(device)
            seconds, steps = seconds + time.perf_counter() - start, steps + len(sigmas) - 1
            out = finished(domain.decode(x0), source)                # [b, 3, H, W]
            if args.grid or args.compare:
                pictures[title].extend(out)
            else:                                                    # at once: an interrupted call keeps them
                for path, image, prompt, seed in zip(paths[i:], out, part, drawn):
                    report.save_png(image, path, text_of([prompt], [seed]))
            bar.update(len(part))
    bar.close()
    if args.grid or args.compare:
        first = shown(source, len(prompts)) if args.compare else {}
        report.save_png(sheet(args, prompts, seeds, first | pictures), paths[0], text_of(prompts, seeds))
    count, wall = len(columns) * len(prompts), time.perf_counter() - begin
    where = paths[0] if len(paths) == 1 else paths[0].parent
    print(f"{where}: {count} images, {count / wall:.2f} images/s, {1000 * seconds / steps:.1f} ms a step of "
          f"{min(args.batch, len(prompts))}, {memory_gb(device):.2f} GB at peak")


if __name__ == "__main__":
    run_script("sample.py", main)
