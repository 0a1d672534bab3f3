"""Sample images from a student in 1 to 4 steps, or from its teacher.

    python sample.py --run runs/tiny --prompt "large red circle left on black" --out red.png
    python sample.py --run runs/tiny --prompt-file prompts.txt --num 4 --steps 2 --out folder
    python sample.py --run runs/tiny --prompt "small blue cross" --num 3 --compare --out all.png
    python sample.py --checkpoint student.safetensors --prompt "" --out any.png

With --init-image, the images have the size of that image. Networks of the edit and inpaint tasks
(train.py --task) take an instruction, or a mask of what to repaint; a text-to-image network starts
from the image, noised to --strength:

    python sample.py --run runs/tiny-edit --init-image a.png --instruction "make it red" --out b.png
    python sample.py --run runs/tiny-inpaint --init-image a.png --mask m.png \\
        --prompt "red circle" --out b.png
    python sample.py --run runs/tiny --init-image a.png --strength 0.5 \\
        --prompt "small red cross" --out b.png

Networks of real images need --encoders, the published folder of SD3's text encoders and VAE. A
teacher also writes latents to distill from, file by file; the same call resumes, and torchrun
divides the work:

    python sample.py --checkpoint sd3.safetensors --encoders FOLDER --prompt "a red fox" \\
        --out fox.png
    python sample.py --checkpoint sd3.safetensors --encoders FOLDER --prompt-file F \\
        --save-latents FOLDER

Image i starts from the noise of seed + i, drawn on the CPU in fp32: the image is the same, up to
rounding, for any batch size and device. Several images go to a folder, as 000000_seed0.png and so
on; no file is overwritten.
"""
import hashlib
import json
import os
import time
from argparse import Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

import kernels
from ladd.cli import InputError, Parser, must, parse_size, parse_value, run_script
from ladd.config import PRESETS, Config
from ladd.core import flow
from ladd.core.mmdit import MMDiT, image_channels
from ladd.core.sampler import (UNGUIDED, Recipe, evaluations, image_noise, read_recipe, sample,
                               step_counts)
from ladd.data import masks
from ladd.data.files import fingerprint, read_json
from ladd.data.images import displayed, image_size, read_image
from ladd.data.prompts import Codec, null_text, prompt_plan, read_prompts
from ladd.engine import generate
from ladd.engine.graphs import Graphed
from ladd.engine.networks import frozen, pick_kernels
from ladd.engine.parallel import finish, ranks
from ladd.engine.run import (Stopper, commit, compute_dtype, device_name, memory_gb, pick_device,
                             progress, versions)
from ladd.report import sheets
from ladd.report.speed import wait
from ladd.sd3 import checkpoint, lora_files
from ladd.sd3.encoders import sd3_codec
from ladd.toy import captions, edits
from ladd.toy.prompts import toy_codec
from ladd.toy.scenes import ToyConfig

CHANNELS = 16       # of the latents, of SD3 and of the toy dataset
ROLES = "student", "teacher"
RANGES = dict(num=(1, 10 ** 6), steps=(1, 1000), guidance=(0, 100), image_guidance=(0, 100),
              seed=(0, 2 ** 62), batch=(1, 4096), shard_size=(1, 10 ** 6), t5_tokens=(1, 512))
# by the task of a network: the flags that not every task takes, those that it requires
TASK_FLAGS = {"text": ("prompt", "init_image", "strength"),
              "inpaint": ("prompt", "init_image", "mask"),
              "edit": ("instruction", "init_image", "image_guidance")}
REQUIRED = {"text": (), "edit": ("init_image",), "inpaint": ("init_image", "mask")}


def flags(names: Iterable[str], between: str = " ") -> str:
    """Return the names as they are written on the command line."""
    return between.join(f"--{name}".replace("_", "-") for name in names)


# --- parse ---

def make_parser() -> Parser:
    """Return the parser of sample.py."""
    parser = Parser(prog="sample.py", description=__doc__,
                    formatter_class=RawDescriptionHelpFormatter)
    flag = parser.add_argument_group("network").add_argument
    flag("--run", metavar="FOLDER", help="run folder of train.py")
    flag("--checkpoint", metavar="FILE", help="one network: train.py's, or SD3 as a file or folder")
    flag("--model", choices=ROLES, help="network of the run; default: student")
    flag("--encoders", metavar="FOLDER", help="SD3's text encoders and VAE; default: the run's")
    flag("--t5", choices=("device", "cpu", "none"), default="device",
         help="where T5 runs; none: its tokens are zeros (default: device)")
    flag("--t5-tokens", metavar="N", type=int, help="T5 tokens per prompt; default: as the network "
         "was trained")
    flag("--text-cache", metavar="FILE", help="keep encoded text, so that known prompts load no "
         "encoder")
    flag("--lora", metavar="FILE[:WEIGHT]", action="append", default=[], help="add this LoRA to "
         "the network; may be repeated")
    flag = parser.add_argument_group("what to sample").add_argument
    flag("--prompt", metavar="TEXT", action="append", help="caption, may be repeated; "
         '"": the null prompt, for any image')
    flag("--instruction", metavar="TEXT", action="append", help="what to change, for "
         "--task edit; may be repeated")
    flag("--prompt-file", metavar="FILE", help="captions or instructions: .txt (one per line; "
         "empty lines and # comments are skipped), .jsonl, .json or .csv")
    flag("--init-image", metavar="FILE", help="image to edit, to inpaint or to start "
         "from")
    flag("--mask", metavar="FILE", help="mask for --task inpaint: white is repainted, "
         "black is kept")
    flag("--strength", metavar="S", type=float, help="noise level at which "
         "text-to-image starts from --init-image: near 0 keeps the image, 1 is noise alone; the "
         "nearest sampling level is taken")
    flag("--num", metavar="N", type=int, default=1, help="images per prompt (default: 1)")
    flag("--seed", metavar="N", type=int, default=0, help="seed; image i uses seed + i (default: "
         "0)")
    flag("--size", metavar="HxW", help="image size in pixels, multiples of 16; default: that of "
         "--init-image, or the run's first; --save-latents takes several, comma-separated")
    flag = parser.add_argument_group("how to sample").add_argument
    flag("--steps", metavar="N", type=int, help="sampling steps; default: one for each level of a "
         "student, the run's --sample-steps for a teacher")
    flag("--sigmas", metavar="A,B,...", help="noise levels to sample at, falling from 1, "
         "instead of --steps; the shift is not applied to them, and the last 0 may be left out")
    flag("--guidance", metavar="G", type=float, help="guidance scale of a teacher; default: the "
         "run's")
    flag("--image-guidance", metavar="G", type=float, help="guidance scale for the "
         "source image, for --task edit; default: the run's")
    flag("--batch", metavar="N", type=int, default=16, help="images sampled at a time "
         "(default: 16)")
    flag("--tiled", action="store_true", help="decode large images in tiles, to save memory")
    flag("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to sample; "
         "auto (the default): a GPU if there is one")
    flag("--kernels", choices=kernels.NAMES, default="auto", help="implementation of the fused "
         "operations (default: auto)")
    flag("--graph", action="store_true", help="run each network as a CUDA graph: for small images "
         "and batches")
    flag = parser.add_argument_group("output").add_argument
    flag("--out", metavar="PATH", help="a .png for one image or sheet, a folder for several images")
    flag("--compare", action="store_true", help="write one sheet: teacher with its own "
         "number of steps and with 4, student with 4, 2 and 1")
    flag("--grid", action="store_true", help="write one sheet of all images")
    flag("--no-metadata", action="store_true", help="write PNGs without their parameters")
    flag("--save-latents", metavar="FOLDER", help="write the teacher's latents instead of images, "
         "for train.py --data")
    flag("--shard-size", metavar="N", type=int, default=64, help="latents per file of "
         "--save-latents (default: 64)")
    return parser


def parse(argv: list[str]) -> Namespace:
    """Return the flags; raise InputError where one is out of range or two exclude each other."""
    args = make_parser().parse(argv)
    for names in ("run", "checkpoint"), ("prompt", "prompt_file", "instruction"):
        given = [name for name in names if getattr(args, name) is not None]
        must(len(given) == 1, f"exactly one of {flags(names, ', ')} must be given (got "
             f"{flags(given) or 'none'})")
    for name, (low, high) in RANGES.items():
        n = getattr(args, name)
        must(n is None or low <= n <= high, f"{flags([name])} must be {low} to {high} (got {n})")
    # NaN does not pass
    must(args.strength is None or 0 < args.strength <= 1,
         f"--strength must be above 0 and at most 1 (got {args.strength})")
    must(args.steps is None or args.sigmas is None, "--steps must be left out with "
         f"--sigmas (got {args.steps})")
    extra = [name for name in ("checkpoint", "model", "steps", "sigmas", "grid")
             if getattr(args, name)]
    must(not args.compare or not extra, "--compare excludes --checkpoint, --model, --steps, "
         f"--sigmas and --grid (got {flags(extra)})")
    of_images = ("out", "compare", "grid", "sigmas", "tiled", "text_cache", "graph", "init_image",
                 "lora")
    extra = [name for name in of_images if getattr(args, name)]
    must(not args.save_latents or not extra, "--save-latents must be used without the options of "
         f"images (got {flags(extra)})")
    must(bool(args.out or args.save_latents), "--out must be a .png for one image or a folder for "
         "several (got nothing)")
    args.lora = lora_files.read_flags(args.lora)
    return args


def check_task(args: Namespace, task: str) -> None:
    """Raise InputError for flags that a network of this task does not use, or that it needs."""
    must(task == "text" or not args.save_latents, "--save-latents requires a text-to-image network "
         f"(got task {task}); train.py makes the latents of others")
    for name in [name for names in TASK_FLAGS.values() for name in names]:
        value = getattr(args, name)
        must(value is None or name in TASK_FLAGS[task], f"{flags([name])} must be left out with a "
             f"network of task {task}, which takes {flags(TASK_FLAGS[task], ', ')} (got {value})")
    pair = [name for name in ("init_image", "strength") if getattr(args, name) is not None]
    must(task != "text" or len(pair) != 1, "--init-image and --strength must be given together "
         f"for text-to-image (got {flags(pair)})")
    for name in REQUIRED[task]:
        must(getattr(args, name) is not None, f"{flags([name])} must be a file for a "
             f"network of task {task} (got none)")


def read_texts(args: Namespace, toy: ToyConfig | None) -> list[str]:
    """Return the prompts or instructions; "" is the null prompt. Those of the toy dataset are
    checked by its grammar."""
    texts = args.prompt or args.instruction
    if texts is None:
        texts, notes = read_prompts(args.prompt_file)
        for note in notes:
            print(note)
    if toy:
        check = edits.parse_instruction if toy.task == "edit" else captions.parse
        texts = [" ".join(text.lower().split()) for text in texts]
        for text in filter(None, texts):
            check(text, toy.objects)
    return texts


def read_sigmas(text: str) -> list[float]:
    """Return final noise levels from 1 to the closing 0."""
    try:
        sigmas = list(parse_value(text, tuple[float, ...]))
    except ValueError:
        sigmas = []
    if sigmas[-1:] != [0]:
        sigmas.append(0.0)
    # NaN does not pass
    must(sigmas[0] == 1 and all(a > b for a, b in zip(sigmas, sigmas[1:])),
         f"--sigmas must be numbers falling from 1, such as 1,0.5 (got {text!r})")
    return sigmas


# --- source image ---

class Source(NamedTuple):
    """Hold --init-image and --mask."""
    image: Tensor               # [1, 3, H, W] in [-1, 1]
    mask: Tensor | None         # bool [1, H, W], True is repainted


def read_source(args: Namespace) -> Source | None:
    """Return --init-image and --mask; raise InputError where they do not fit each other or
    --size."""
    pixels = {}
    for name in ("init_image", "mask"):
        path = getattr(args, name)
        if path is not None:
            try:
                pixels[name] = read_image(Path(path), image_size(Path(path)))
            except InputError as error:
                raise InputError(f"{flags([name])} {path}: {error}") from None
    if not pixels:
        return None
    image, mask = pixels["init_image"], pixels.get("mask")
    h, w = image.shape[1:]
    must(h % 16 == w % 16 == 0, f"--init-image {args.init_image}: sides must be multiples of 16 "
         f"pixels (got {h}x{w})")
    must(args.size is None or parse_size(args.size, "--size") == (h, w),
         f"--size must be that of --init-image {args.init_image}, {h}x{w} (got {args.size})")
    if mask is not None:
        transparent = displayed(Path(args.mask)).mode == "RGBA"
        colours = "transparency" if transparent else "colours"
        must(not transparent and bool((mask == mask[:1]).all()),
             f"--mask {args.mask} must be black and white (got {colours})")
        try:
            mask = masks.check_mask(mask[:1], (h, w))
        except InputError as error:
            raise InputError(f"--mask {args.mask} {str(error).removeprefix('mask ')}") from None
    return Source(image[None].float() / 127.5 - 1, mask)


def image_sizes(args: Namespace, recipe: Recipe, source: Source | None) -> list[tuple[int, int]]:
    """Return (H, W) of the images: of --init-image, of --size, or the first one of the run."""
    if source:
        return [tuple(source.image.shape[2:])]
    texts = recipe.sizes[:1] if args.size is None else args.size.split(",")
    must(len(texts) == 1 or bool(args.save_latents), f"--size must be one size (got {args.size})")
    return [parse_size(text, "--size") for text in texts]


# --- networks ---

class Checkpoints(NamedTuple):
    """Hold what --run or --checkpoint names."""
    recipe: Recipe
    files: dict[str, Path]      # of each role that is asked for
    encoders: str               # folder of SD3's encoders and VAE; "": the toy dataset

    @property
    def toy(self) -> ToyConfig | None:
        """Return the settings of the toy dataset; None for real images."""
        r = self.recipe
        sizes = tuple(parse_size(size) for size in r.sizes)
        return None if self.encoders else ToyConfig(r.task, r.objects, 0.5, r.text_dim, sizes)


def published_recipe(path: Path) -> Recipe:
    """Return the recipe of a published SD3: its preset's, found by the network's sizes."""
    c = checkpoint.load_mmdit(path).config
    known = {name: Config(**{**values, "preset": name}) for name, values in PRESETS.items()
             if name.startswith("sd3")}
    for config in known.values():
        if ((c.depth, c.width, c.qk_norm, len(c.dual_blocks))
                == (config.depth, config.width, config.qk_norm, config.dual_blocks)):
            return config.recipe
    raise InputError(f"{path}: an MMDiT of {c.depth} blocks of width {c.width} without metadata on "
                     "how to sample; it must be a network of train.py or one of "
                     f"{', '.join(known)}")


def find_checkpoint(args: Namespace) -> Checkpoints:
    """Return recipe, file and encoders of --checkpoint."""
    path = Path(args.checkpoint)
    must(path.exists(), f"--checkpoint: {path} does not exist")
    header = checkpoint.load_metadata(path)
    role = header.get("role")
    # a published network has no metadata
    real = role is None or header.get("domain") == "sd3"
    must(not real or args.encoders is not None, "--encoders must be a folder with SD3's text "
         f"encoders and VAE for {path}, a network of real images (got none)")
    must(real or args.encoders is None, f"--encoders must be left out for {path}, a network of "
         f"the toy dataset (got {args.encoders})")
    if role is None:
        recipe, role = published_recipe(path), "teacher"
    else:
        recipe = read_recipe(header, path)
    must(role in ROLES, f"{path}: role must be {' or '.join(ROLES)} (got {role!r})")
    must(args.model in (None, role), f"--model must be {role} for {path} (got {args.model})")
    return Checkpoints(recipe, {role: path}, args.encoders or "")


def find_run(args: Namespace) -> Checkpoints:
    """Return recipe, files and encoders of --run."""
    run = Path(args.run)
    stored = run / "config.json"
    must(stored.exists(), f"--run must be a run folder of train.py; {run} has no config.json")
    config = read_json(stored)
    recipe = read_recipe(config, stored)
    for name in "encoders", "teacher":
        must(isinstance(config.get(name, ""), str), f"{stored}: {name} must be text (got "
             f"{config.get(name)!r:.60})")
    encoders = config.get("encoders", "")
    must(bool(encoders) or args.encoders is None, f"--encoders must be left out for {run}, a run "
         f"of the toy dataset (got {args.encoders})")
    files = {}
    for role in ROLES if args.compare else [args.model or "student"]:
        files[role] = run / "checkpoints" / f"{role}.safetensors"
        if role == "teacher" and config.get("teacher"):
            files[role] = Path(config["teacher"])       # such a run has no copy of it
        hint = " (never with --steps 0: --model teacher)" if config.get("steps") == 0 else ""
        must(files[role].exists(), f"{files[role]} does not exist; train.py writes it when that "
             f"stage is done{hint}")
    return Checkpoints(recipe, files, args.encoders or encoders)


def load(path: Path, args: Namespace, found: Checkpoints, sizes: list[tuple[int, int]]) -> MMDiT:
    """Return the network, memory-mapped on the CPU; raise InputError unless it has the channels of
    its task, takes these sizes, and, of the toy dataset, reads text of its width."""
    model = checkpoint.load_mmdit(path, pick_kernels(args.kernels, args.device))
    c, recipe = model.config, found.recipe
    widths = c.in_channels, c.out_channels, c.context_dim, c.pooled_dim
    wanted = (CHANNELS + image_channels(recipe.task), CHANNELS, recipe.text_dim, recipe.text_dim)
    # the width of real text is checked against the encoders
    if found.encoders:
        widths, wanted = widths[:2], wanted[:2]
    must(widths == wanted, f"{path}: channels (in, out, text, pooled) must be {wanted} for task "
         f"{recipe.task} (got {widths})")
    # the VAE makes 8x8 pixels one position of the latents
    most = 8 * c.patch * c.pos_grid
    flag = f"--init-image {args.init_image}" if args.init_image else "--size"
    for h, w in sizes:
        must(max(h, w) <= most, f"{flag} must be at most {most}x{most} for {path} (got {h}x{w})")
    return model


def load_codec(args: Namespace, found: Checkpoints, device: torch.device,
               models: dict[str, MMDiT]) -> Codec:
    """Return encoders and decoder; raise InputError where their text has another width than the
    networks read."""
    if found.toy:
        return toy_codec(found.toy)
    cache = Path(args.text_cache) if args.text_cache else None
    trained = found.recipe.t5_tokens
    tokens = args.t5_tokens or trained
    if tokens != trained:
        print(f"note: --t5-tokens {tokens}, not the {trained} that the network was trained with")
    codec = sd3_codec(found.encoders, device, args.t5, tokens, cache, args.tiled)
    for role, model in models.items():
        wanted = model.config.context_dim, model.config.pooled_dim
        must(codec.widths == wanted, f"--encoders {found.encoders}: text must have widths "
             f"{wanted} (tokens, pooled), which the {role} reads (got {codec.widths})")
    if not args.save_latents:
        codec.decode(torch.zeros(1, CHANNELS, 8, 8))    # loads the VAE, before anything is sampled
    return codec


# --- columns: ways to sample ---

class Column(NamedTuple):
    """Hold one way to sample: all that decides an image except weights, prompt, seed and size."""
    role: str
    sampler: str
    steps: int                  # from noise; with --strength the last ones are made
    sigmas: list[float]         # final levels from 1 to 0; with --strength from where it starts
    guidance: float
    image_guidance: float
    strength: float = 1.0       # the first level, before the shift


def make_columns(args: Namespace, recipe: Recipe, role: str) -> dict[str, Column]:
    """Return the column asked for, or those of --compare, by title."""
    guidance = recipe.guidance if args.guidance is None else args.guidance
    image_guidance = args.image_guidance
    if image_guidance is None:
        image_guidance = recipe.image_guidance

    def column(role: str, steps: int, guidance: tuple[float, float] = UNGUIDED) -> Column:
        if role == "teacher":
            return Column(role, "euler", steps, recipe.teacher_sigmas(steps).tolist(), *guidance)
        return Column(role, recipe.sampler, steps, recipe.sigmas(steps).tolist(), *UNGUIDED)

    if args.compare:
        columns = [column("teacher", recipe.sample_steps, (guidance, image_guidance)),
                   column("teacher", 4)]
        columns += [column("student", n) for n in (4, 2, 1) if n in step_counts(recipe.levels)]
    else:
        for name in "guidance", "image_guidance":
            value = getattr(args, name)
            must(role == "teacher" or value in (None, 1), f"{flags([name])} must be 1 for a "
                 "student, which learned the guidance of its teacher; to change it use --model "
                 f"teacher (got {value})")
        steps = recipe.sample_steps if role == "teacher" else len(recipe.levels)
        columns = [column(role, args.steps or steps, (guidance, image_guidance))]
        if args.sigmas is not None:
            sigmas, trained = read_sigmas(args.sigmas), columns[0].sigmas
            columns = [columns[0]._replace(steps=len(sigmas) - 1, sigmas=sigmas)]
            new = [f"{s:g}" for s in sigmas if min(abs(s - t) for t in trained) > 1e-3]
            if role == "student" and new:
                print(f"note: this student was not trained at levels {', '.join(new)}")
    if args.strength is not None:
        columns = [start_at_strength(args, recipe.shift, c) for c in columns]
    evals = [evaluations(c.guidance, c.image_guidance) for c in columns]
    return {f"{c.role} {c.steps}" + (f" x {n}" if n > 1 else ""): c for c, n in zip(columns, evals)}


def start_at_strength(args: Namespace, shift: float, column: Column) -> Column:
    """Return the column from that of its levels on which, before the shift, is nearest to
    --strength; print which one if it is another value."""
    # a shift of 1 / a undoes a shift of a
    levels = flow.shift(torch.tensor(column.sigmas[:-1]), 1 / shift).tolist()
    i = min(range(len(levels)), key=lambda i: abs(levels[i] - args.strength))
    if abs(levels[i] - args.strength) > 1e-3:
        kind = "trained level" if column.role == "student" and args.sigmas is None else "level"
        of = f" of {column.role} {column.steps}" if args.compare else ""
        print(f"note: --strength {args.strength:g}: {levels[i]:.3g}, the nearest {kind}{of}")
    return column._replace(sigmas=column.sigmas[i:], strength=round(levels[i], 6))


# --- output ---

def output_paths(args: Namespace, count: int) -> list[Path]:
    """Return the files to write, in a folder that exists; raise InputError where one exists or
    cannot be written."""
    out = Path(args.out)
    one = args.grid or args.compare or count == 1
    form = "a name ending in .png" if one else "a folder for several images, or use --grid"
    must(one == (out.suffix.lower() == ".png"), f"--out must be {form} (got {out})")
    paths = [out] if one else [out / f"{i:06d}_seed{args.seed + i}.png" for i in range(count)]
    for path in paths:
        must(not path.exists(), f"--out: {path} exists already; take another name")
    folder = paths[0].parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out: {folder} cannot be made ({error})") from None
    must(os.access(folder, os.W_OK), f"--out: {folder} is read-only; take another folder")
    return paths


def describe_sampling(args: Namespace, recipe: Recipe, columns: Iterable[Column],
                      files: dict[str, Path], hw: tuple[int, int], device: torch.device) -> dict:
    """Return all that decides the images but their prompts and seeds, for the PNG."""
    models = {}
    for role, path in files.items():
        digest = hashlib.sha256()
        for part in sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]:
            with part.open("rb") as file:
                digest = hashlib.file_digest(file, lambda: digest)
        name = f"{Path(args.run).resolve().name}-{role}" if args.run else path.name
        models[role] = {"model": name.removesuffix(".safetensors"),
                        "model_hash": digest.hexdigest()[:10]}
    given = {name: Path(getattr(args, name)).name for name in ("init_image", "mask")
             if getattr(args, name)}
    given["loras"] = [{"lora": path.name, "weight": weight, "fingerprint": fingerprint(path)}
                      for path, weight, _ in args.lora]
    return {"task": recipe.task, **given, "height": hw[0], "width": hw[1], "shift": recipe.shift,
            "device": device_name(device), "commit": commit(), "versions": versions(),
            "columns": [c._asdict() | models[c.role] for c in columns]}


def png_text(args: Namespace, prompts: list[str], seeds: list[int],
             sampling: dict) -> dict[str, str]:
    """Return the text chunks of a PNG: "parameters" in the form that other programs read, which has
    room for one column and one seed, and "ladd", all of it as JSON. Empty with --no-metadata."""
    if not sampling:
        return {}
    c = sampling["columns"][0]
    line = (f"Steps: {c['steps']}, Sampler: {c['sampler'].capitalize()}, "
            f"CFG scale: {c['guidance']:g}, ")
    if c["image_guidance"] != 1:
        line += f"Image CFG scale: {c['image_guidance']:g}, "
    line += (f"Seed: {seeds[0]}, Size: {sampling['width']}x{sampling['height']}, "
             f"Model hash: {c['model_hash']}, Model: {c['model']}")
    for lora in sampling["loras"]:
        line += f", Lora: {lora['lora']} x {lora['weight']:g}"
    if args.strength is not None:
        line += f", Denoising strength: {c['strength']:g}"
    return {"parameters": "\n".join([*dict.fromkeys(prompts), line]),
            "ladd": json.dumps({"prompts": prompts, "seeds": seeds, **sampling})}


def make_sheet(args: Namespace, prompts: list[str], seeds: list[int], source: Source | None,
               columns: dict[str, list[Tensor]]) -> Image.Image:
    """Return one sheet. --compare: one row per image, first what the networks were given. --grid:
    one row per prompt, with seed + j in column +j."""
    stride = args.num if args.grid else 1
    rows = [f"{prompt or '(empty)'}, seed={seed}"
            for prompt, seed in zip(prompts[::stride], seeds[::stride])]
    if args.grid:
        (title, images), = columns.items()
        columns = {f"+{j}" if j else title: images[j::stride] for j in range(stride)}
    elif source and source.mask is None:
        columns = {"source": [source.image[0]] * len(rows), **columns}
    elif source:
        columns = {"to repaint": [masks.hatched(*source)[0]] * len(rows), **columns}
    cell = max(128, *next(iter(columns.values()))[0].shape)
    return sheets.contact_sheet(columns, rows, cell)


# --- main ---

def save_latents(args: Namespace, found: Checkpoints, prompts: list[str],
                 sizes: list[tuple[int, int]], model: MMDiT, codec: Codec,
                 device: torch.device) -> None:
    """Write latents that the teacher generates, --num for each prompt."""
    count = len(prompts) * args.num
    plan = prompt_plan(prompts, sizes, count, args.shard_size, args.seed)
    toy, recipe = found.toy, found.recipe
    if toy:
        codes = [captions.parse(prompt, toy.objects) for prompt in plan.prompts]
        plan = plan._replace(codes=torch.tensor(codes))
    guidance = recipe.guidance if args.guidance is None else args.guidance
    start, stopper = time.perf_counter(), Stopper()
    complete = generate.generate_latents(
        Path(args.save_latents), plan, model,
        lambda model: frozen(model, compute_dtype("auto", device), device), codec,
        args.steps or recipe.sample_steps, recipe.shift, (guidance, 1.0), args.batch, toy is None,
        stopper)
    if ranks()[0] == 0:
        result = f"{count} latents" if complete else "stopped; the same call resumes"
        print(f"{args.save_latents}: {result}, {time.perf_counter() - start:.0f} s, "
              f"{memory_gb(device):.2f} GB at peak")
    finish()


def main(argv: list[str]) -> None:
    """Sample what the flags ask for; raise InputError before anything is written."""
    # 1. read and check everything that is given
    args = parse(argv)
    found = find_run(args) if args.run is not None else find_checkpoint(args)
    recipe = found.recipe
    check_task(args, recipe.task)
    prompts = read_texts(args, found.toy)
    source = read_source(args)
    sizes = image_sizes(args, recipe, source)
    models = {role: load(path, args, found, sizes) for role, path in found.files.items()}
    for model in models.values():
        lora_files.merge(model, args.lora)
    device = pick_device(args.device)
    must(not args.graph or device.type == "cuda", f"--graph requires a GPU (got {device})")
    codec = load_codec(args, found, device, models)
    if args.save_latents:
        must("teacher" in models, "--save-latents requires --model teacher (got a student)")
        return save_latents(args, found, prompts, sizes, models["teacher"], codec, device)
    hw = sizes[0]
    prompts = [prompt for prompt in prompts for _ in range(args.num)]
    seeds = [args.seed + i for i in range(len(prompts))]
    columns = make_columns(args, recipe, next(iter(models)))
    # the last check of the input, since it makes the folder
    paths = output_paths(args, len(prompts))
    sampling = {}
    if not args.no_metadata:
        sampling = describe_sampling(args, recipe, columns.values(), found.files, hw, device)

    # 2. encode text and source image
    codec.text(["", *prompts])
    codec.release()
    null = null_text(codec).to(device)
    init = image = None     # latents to noise and start from; image conditioning. [1, c, h, w] each
    if recipe.task == "inpaint":
        image = masks.image_condition(codec.encode, *source).to(device)
    elif recipe.task == "edit":
        image = codec.encode(source.image).to(device)
    elif source:
        init = codec.encode(source.image).to(device)

    # 3. sample, batch by batch
    dtype = compute_dtype("auto", device)
    models = {role: frozen(model, dtype, device) for role, model in models.items()}
    if args.graph:
        models = {role: Graphed(model) for role, model in models.items()}
    shape = CHANNELS, hw[0] // 8, hw[1] // 8
    images = {title: [] for title in columns}
    seconds, steps = 0.0, 0                                          # of the sampling alone
    begin = time.perf_counter()
    with progress("images", len(columns) * len(prompts)) as bar:
        for title, c in columns.items():
            sigmas = torch.tensor(c.sigmas)
            for i in range(0, len(prompts), args.batch):
                batch = slice(i, i + args.batch)
                text = codec.text(prompts[batch]).to(device)
                x = image_noise(seeds[batch], shape).to(device)         # [b, 16, h, w]
                if init is not None:
                    x = flow.noised(init.expand_as(x), x, sigmas[:1].to(x))
                if image is not None:
                    text = text._replace(image=image.expand(len(x), *image.shape[1:]))
                wait(device)
                start = time.perf_counter()
                x0 = sample(models[c.role], x, text, sigmas, c.sampler, seeds[batch], null,
                            c.guidance, c.image_guidance)
                wait(device)
                seconds += time.perf_counter() - start
                steps += len(sigmas) - 1
                out = codec.decode(x0)                                  # [b, 3, H, W]
                if source and source.mask is not None:
                    mask = source.mask.expand(len(out), -1, -1)
                    out = masks.composite(source.image.expand_as(out), out, mask)
                if args.grid or args.compare:
                    images[title].extend(out)
                else:
                    # each batch is written at once: an interrupted call keeps its images
                    for path, picture, prompt, seed in zip(paths[batch], out, prompts[batch],
                                                           seeds[batch]):
                        sheets.save_png(picture, path, png_text(args, [prompt], [seed], sampling))
                bar.update(len(out))

    # 4. one sheet, and what was done
    if args.grid or args.compare:
        sheet = make_sheet(args, prompts, seeds, source if args.compare else None, images)
        sheets.save_png(sheet, paths[0], png_text(args, prompts, seeds, sampling))
    wall = time.perf_counter() - begin
    count = len(columns) * len(prompts)
    where = paths[0] if len(paths) == 1 else paths[0].parent
    print(f"{where}: {count} images, {count / wall:.2f} images/s, {1000 * seconds / steps:.1f} ms "
          f"a step of {min(args.batch, len(prompts))}, {memory_gb(device):.2f} GB at peak")


if __name__ == "__main__":
    run_script("sample.py", main)
