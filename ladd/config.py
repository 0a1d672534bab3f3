"""Options of train.py: one table of fields, the presets, and the command line made from them."""
import argparse
import json
import math
from importlib.util import find_spec
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ladd.cli import InputError, Parser, describe, must, parse_size, parse_value
from ladd.core.losses import LaddConfig
from ladd.core.mmdit import MMDiTConfig, image_channels
from ladd.core.sampler import SAMPLERS, TASKS, Recipe

# where an option is shown: in --help, only in --help-all, or as a name for --set, since the preset
# decides it
MAIN, MORE, PRESET = "main", "more", "preset"
INF = math.inf


def option(default, help: str, show: str = MORE, choices: tuple = (), low: float = -INF,
           high: float = INF):
    """Return a field of Config: default, meaning, where it is shown, and the values it takes."""
    return field(default=default, metadata={"help": help, "show": show, "choices": choices,
                                            "low": low, "high": high})


# fmt: off
@dataclass(frozen=True)
class Config:
    """Hold everything that decides a run. Functions take single values or groups of it instead."""
    # --- run ---
    preset: str = option("tiny", "start from these values", MAIN,
                         ("tiny", "tiny-edit", "tiny-inpaint", "tiny-lora", "shapes", "sd3-medium",
                          "sd3.5-medium", "sd3.5-large"))
    name: str = option("", "name of the run folder, runs/NAME; default: the preset", MAIN)
    seed: int = option(0, "seed of all random numbers", MAIN, low=0, high=2 ** 31)
    device: str = option("auto", "auto: a GPU if there is one", MAIN, ("auto", "cpu", "cuda"))
    dry_run: bool = option(False, "print the options, parameters, memory, hours and disk; write "
                           "nothing", MAIN)
    # --- task and data ---
    task: str = option("text", "text: text-to-image; edit: instruction-based editing; inpaint: "
                       "fill the masked area", MAIN, TASKS)
    encoders: str = option("", "folder with SD3's text encoders and VAE; default: the toy dataset",
                           MAIN)
    prompts: str = option("", "prompts to generate training data from: .txt (one per line), "
                          ".jsonl, .json or .csv", MAIN)
    pairs: str = option("", "folder of ladd.encode with the images of --task edit or inpaint", MAIN)
    data: str = option("", "folder of latents to distill from, or toy: renders of the toy dataset; "
                       "default: the teacher generates them", MAIN)
    eval_prompts: str = option("", "prompts of sample grids and report; default: the first 8 of "
                               "--prompts")
    sizes: tuple[str, ...] = option(("48x80", "80x48"), "image sizes HxW in pixels, multiples of "
                                    "16, of similar area")
    t5: str = option("device", "where T5 runs; none: its tokens are zeros", MORE,
                     ("device", "cpu", "none"))
    t5_tokens: int = option(256, "T5 tokens per prompt", low=1, high=512)
    data_size: int = option(3072, "latents to generate", low=1)
    shard_size: int = option(128, "latents per file", PRESET, low=1, high=10 ** 6)
    objects: int = option(1, "objects in a scene of the toy dataset", PRESET, (1, 2))
    stated: float = option(0.5, "probability that a caption states an attribute", PRESET, low=0,
                           high=0.95)
    # --- teacher ---
    teacher: str = option("", "checkpoint of the teacher; default: train one", MAIN)
    base: str = option("", "initialize the teacher from this checkpoint; added input channels "
                       "start at zero", MAIN)
    guidance: float = option(2.0, "guidance scale of the teacher", MAIN, low=1, high=100)
    sample_steps: int = option(8, "sampling steps of the teacher", MAIN, low=1, high=1000)
    image_guidance: float = option(1.0, "guidance scale for the source image (--task edit); 1: off",
                                   low=0, high=100)
    teacher_steps: int = option(960, "training steps of the teacher", low=1)
    teacher_batch: int = option(128, "samples per step of the teacher's training", low=1)
    teacher_lr: float = option(4e-3, "peak learning rate of the teacher, with cosine decay",
                               low=1e-9, high=1)
    teacher_lora: int = option(0, "train a LoRA of this rank on --base instead of all weights",
                               low=0, high=1024)
    teacher_images: int = option(49152, "rendered images to train on", PRESET, low=1)
    teacher_means: tuple[float, ...] = option((1.0,), "noise levels: mixture of LogitNormal(mean, "
                                              "1)", PRESET)
    text_dropout: float = option(0.1, "probability of dropping the caption", PRESET, low=0,
                                 high=0.95)
    image_dropout: float = option(0.05, "probability of dropping caption and source image", PRESET,
                                  low=0, high=0.95)
    depth: int = option(6, "blocks of the teacher", PRESET, low=1, high=256)
    width: int = option(128, "width of the teacher, a multiple of 64", PRESET, low=64, high=16384)
    qk_norm: bool = option(False, "RMS norm of queries and keys", PRESET)
    dual_blocks: int = option(0, "first blocks with a second, image-only attention", PRESET, low=0)
    pos_grid: int = option(0, "side of the position table in patches; 0: as --sizes need", PRESET,
                           low=0, high=1024)
    text_dim: int = option(64, "width of a text token", PRESET, low=23, high=65536)
    pooled_dim: int = option(0, "width of the pooled text; 0: text_dim", PRESET, low=0, high=65536)
    predicts: str = option("x0", "prediction target of the network: velocity or clean latent",
                           PRESET, ("v", "x0"))
    # --- student ---
    steps: int = option(270, "training steps of the student; 0: only train the teacher", MAIN,
                        low=0)
    batch: int = option(64, "pairs per step", MAIN, low=1)
    micro_batch: int = option(0, "pairs at a time in each process; 0: all", MAIN, low=0)
    lr: float = option(1e-4, "learning rate of the student", MAIN, low=1e-9, high=1)
    lora: int = option(0, "the student is a LoRA of this rank; 0: all weights train", MAIN, low=0,
                       high=1024)
    lora_targets: tuple[str, ...] = option(("all",), "layers with a LoRA: all, attention, or names "
                                           "with *")
    student_depth: int = option(0, "blocks of the student, taken evenly from the teacher; 0: all",
                                low=0)
    ema: float = option(0.99, "decay of the student's EMA, which is what is saved", low=0,
                        high=0.999999)
    levels: tuple[float, ...] = option((1.0, 0.75, 0.5, 0.25), "noise levels of the student, "
                                       "largest first")
    shift: float = option(1.0, "resolution shift of the student's noise levels and the teacher's "
                          "sampling steps", low=1, high=100)
    sampler: str = option("renoise", "how the student samples", MORE, SAMPLERS)
    probs: tuple[float, ...] = option((0.4, 0.2, 0.2, 0.2), "how often each of --levels is trained",
                                      PRESET)
    easy_steps: int = option(0, "first steps, on the easier half of --levels only", PRESET, low=0)
    warmup: int = option(20, "steps of linear learning-rate warm-up", PRESET, low=0)
    beta2: float = option(0.95, "beta2 of Adam", PRESET, low=0, high=0.9999)
    # --- discriminator ---
    heads_lr: float = option(3e-3, "learning rate of the discriminator heads", low=1e-9, high=1)
    heads_repeats: int = option(4, "steps of the heads on the features of each batch", low=1,
                                high=100)
    taps: tuple[int, ...] = option((0, 1, 2), "teacher blocks that the heads read")
    d_mean: float = option(-2.0, "noise levels of the discriminator: LogitNormal(d_mean, 1)",
                           low=-10, high=10)
    mismatched: float = option(0.5, "fraction of real samples also shown with a mismatched "
                               "caption, labelled generated", low=0, high=1)
    head_width: int = option(64, "channels of a head, a multiple of 16", PRESET, low=16, high=4096)
    heads_first: int = option(40, "first iterations, which train only the discriminator", PRESET,
                              low=0)
    r1_weight: float = option(0.0, "weight of the approximate R1 penalty", PRESET, low=0,
                              high=10 ** 6)
    distill_weight: float = option(0.0, "weight of the paper's distillation loss", PRESET, low=0,
                                   high=10 ** 6)
    # --- compute ---
    recompute: str = option("none", "activation checkpointing: none, selective (all but "
                            "attention), full", MAIN, ("none", "selective", "full"))
    kernels: str = option("auto", "implementation of the fused operations", MORE,
                          ("auto", "triton", "gluon", "torch"))
    precision: str = option("auto", "compute dtype; auto: bf16 where the device has it", MORE,
                            ("auto", "fp32", "bf16"))
    compile: str = option("auto", "torch.compile of each block; auto: on a GPU", MORE,
                          ("auto", "on", "off"))
    teacher_fp8: bool = option(False, "matrix products of the frozen teacher in fp8")
    shard: str = option("auto", "what FSDP shards; auto: what does not fit", MORE,
                        ("auto", "none", "student", "all"))
    replicas: int = option(1, "copies of what is sharded, such as one per node", low=1)
    timeout: float = option(1800.0, "seconds without progress of any process until the run is "
                            "aborted", low=1, high=10 ** 7)
    stop_after: int = option(0, "save and end after so many steps of this process; 0: never",
                             PRESET, low=0)
    # --- evaluation ---
    n: int = option(2048, "images per row of the report", low=6)
    eval_every: int = option(90, "steps between evaluations and sample grids; 0: none", low=0)
    save_every: int = option(100, "steps between checkpoints", low=1)
    sample_batch: int = option(256, "images sampled at a time", low=2)
    eval_n: int = option(256, "images of an evaluation while training", PRESET, low=6)
    log_every: int = option(10, "steps between log lines", PRESET, low=1)
    tensorboard: bool = option(False, "also write scalars and sample grids for TensorBoard to "
                               "runs/NAME/tensorboard")
    profile: str = option("", "write a trace of the last 3 student steps to this file")
    bench_steps: int = option(0, "time this many steps of networks with random weights, then "
                              "exit", low=0)
    tflops: float = option(0.0, "TFLOP/s for the hours of --dry-run; 0: measure a matrix product",
                           low=0)
# fmt: on

    def group(self, kind: type) -> Any:
        """Return `kind` (a dataclass or NamedTuple) made of the values that have its fields'
        names."""
        return kind(**{name: getattr(self, name) for name in kind.__annotations__})

    @property
    def ladd(self) -> LaddConfig:
        """Return what the losses take."""
        return self.group(LaddConfig)

    @property
    def recipe(self) -> Recipe:
        """Return how teacher and student are sampled."""
        return self.group(Recipe)

    @property
    def model(self) -> MMDiTConfig:
        """Return the sizes of a teacher that is trained; those of a loaded one are in its file."""
        return MMDiTConfig(
            self.depth, self.width, self.text_dim, self.pooled_dim or self.text_dim,
            16 + image_channels(self.task), qk_norm=self.qk_norm, predicts=self.predicts,
            dual_blocks=tuple(range(self.dual_blocks)), pos_grid=self.pos_grid or self.patches)

    @property
    def folder(self) -> Path:
        """Return the run folder."""
        return Path("runs") / (self.name or self.preset)

    @property
    def teacher_file(self) -> Path:
        """Return the file of --teacher, or that of the run, which may not exist yet."""
        return Path(self.teacher or self.folder / "checkpoints" / "teacher.safetensors")

    @property
    def real(self) -> bool:
        """Return whether prompts and latents are SD3's, not those of the toy dataset."""
        return bool(self.encoders) or self.preset.startswith("sd3")

    @property
    def hw(self) -> tuple[tuple[int, int], ...]:
        """Return the image sizes in pixels."""
        return tuple(parse_size(s) for s in self.sizes)

    @property
    def patches(self) -> int:
        """Return the number of patches on the longest side of an image, of 16 pixels each: 8 of the
        VAE times 2."""
        return max(max(hw) for hw in self.hw) // 16

    def micro(self, world: int, teacher: bool = False) -> int:
        """Return the micro-batch of each of `world` processes, of --batch or --teacher-batch."""
        batch, flag = self.batch, "--batch"
        if teacher:
            batch, flag = self.teacher_batch, "--teacher-batch"
        must(batch % world == 0, f"{flag} must be a multiple of the {world} processes (got "
             f"{batch})")
        share = batch // world
        micro = min(self.micro_batch or share, share)
        must(share % micro == 0, f"--micro-batch must divide each process's share of {flag}, "
             f"{share} (got {self.micro_batch})")
        return micro


FIELDS = {f.name: f for f in fields(Config)}
# options that may differ when a run resumes
PROCESS_FIELDS = ("micro_batch", "shard", "replicas", "recompute", "timeout", "stop_after",
                  "dry_run", "bench_steps", "tflops", "profile", "tensorboard")
# options that are refused where they would do nothing: of the toy dataset, of the teacher's
# training, of real prompts, of real images, of editing
TOY_FIELDS = "objects", "stated", "teacher_images", "n"
TEACHER_FIELDS = ("base", "teacher_lora", "teacher_steps", "teacher_batch", "teacher_lr",
                  "teacher_means", "text_dropout", "image_dropout")
PROMPT_FIELDS = "prompts", "eval_prompts"
REAL_FIELDS = *PROMPT_FIELDS, "t5", "t5_tokens", "pooled_dim", "pairs"
EDIT_FIELDS = "image_guidance", "image_dropout"
# SD3's own values where they are known (shift, guidance, sampling steps); the rest is our choice
SD3 = dict(
    sizes=("1024x1024", "832x1216", "1216x832"), text_dim=4096, pooled_dim=2048, predicts="v",
    data_size=16384, shard_size=64, sample_steps=28, steps=2000, batch=16, micro_batch=2, lr=2e-6,
    heads_lr=2e-5, beta2=0.99, warmup=100, ema=0.995, sampler="euler", probs=(0.7, 0.1, 0.1, 0.1),
    teacher_steps=5000, teacher_batch=64, teacher_lr=2e-5, easy_steps=500, shift=3.0, d_mean=1.0,
    heads_repeats=1, head_width=512, eval_every=250, save_every=250, sample_batch=4)
PRESETS = {
    "tiny": {},
    "tiny-edit": dict(task="edit", teacher_images=16384, teacher_steps=720, guidance=1.5,
                      image_guidance=1.3),
    "tiny-inpaint": dict(task="inpaint", teacher_images=16384, teacher_steps=720),
    "tiny-lora": dict(lora=16, lr=1.5e-3),
    "shapes": dict(
        objects=2, sizes=("256x256", "192x320", "320x192"), depth=12, width=512, qk_norm=True,
        text_dim=256, teacher_images=65536, teacher_steps=10000, teacher_lr=1e-3, data_size=6144,
        shard_size=512, steps=2000, lr=5e-5, heads_lr=1e-3, ema=0.995, shift=2.0, taps=(1, 3, 5),
        head_width=256, eval_every=500, save_every=500, eval_n=512, sample_batch=128),
    "sd3-medium": dict(SD3, depth=24, width=1536, pos_grid=192, taps=tuple(range(24)),
                       guidance=5.0),
    "sd3.5-medium": dict(SD3, depth=24, width=1536, pos_grid=384, taps=tuple(range(24)),
                         guidance=5.0, qk_norm=True, dual_blocks=13, sample_steps=40),
    "sd3.5-large": dict(SD3, depth=38, width=2432, pos_grid=192, taps=tuple(range(38)),
                        guidance=4.5, qk_norm=True, sample_steps=40, lr=1e-6, heads_lr=1e-5),
}


# --- the command line ---

def flag_of(name: str) -> str:
    """Return an option as it is written on the command line."""
    dashed = name.replace("_", "-")
    return f"--set {name}" if FIELDS[name].metadata["show"] == PRESET else f"--{dashed}"


def make_parser(description: str, everything: bool) -> Parser:
    """Return the parser of train.py; `everything`: its help shows all flags."""
    parser = Parser(prog="train.py", description=description, add_help=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-h", "--help", action="help", help="show the options that most people "
                        "need")
    parser.add_argument("--help-all", action="help", help="show all options")
    names = ", ".join(name for name, f in FIELDS.items() if f.metadata["show"] == PRESET)
    parser.add_argument("--set", metavar="NAME=VALUE", action="append", default=argparse.SUPPRESS,
                        help=f"change another value of the preset: {names}" if everything
                        else argparse.SUPPRESS)
    sections = {"preset": "run", "task": "task and data", "teacher": "teacher", "steps": "student",
                "heads_lr": "discriminator", "recompute": "compute", "n": "evaluation"}
    for name, f in FIELDS.items():
        if name in sections:
            group = parser.add_argument_group(sections[name])
        meta = f.metadata
        if meta["show"] == PRESET:
            continue
        text = meta["help"].replace("%", "%%")
        default = ",".join(map(str, f.default)) if isinstance(f.default, tuple) else str(f.default)
        # the default of --preset is tiny itself
        if name == "preset":
            text += "; default: tiny"
        elif f.type is not bool and default and "default:" not in text:
            text += f" (tiny: {default})"
        options = dict(metavar="N")
        if f.type is bool:
            options = dict(nargs="?", const="true", metavar="on|off")
        elif meta["choices"]:
            options = dict(metavar="{" + ",".join(map(str, meta["choices"])) + "}")
        elif f.type is str:
            options = dict(metavar="TEXT" if name == "name" else "PATH")
        elif f.type is float:
            options = dict(metavar="X")
        elif f.type is not int:
            options = dict(metavar="A,B,...")
        hidden = meta["show"] == MORE and not everything
        group.add_argument(flag_of(name), default=argparse.SUPPRESS,
                           help=argparse.SUPPRESS if hidden else text, **options)
    return parser


def parse_flags(argv: list[str], description: str) -> dict[str, Any]:
    """Return the values that a command line gives, by field."""
    # a value that starts with a minus is a value, although argparse takes "-1,2" for a flag
    words = []
    for word in argv:
        number = word[:1] == "-" and word[1:2] in "0123456789." and len(word) > 1
        if words and words[-1].startswith("--") and "=" not in words[-1] and number:
            words[-1] += "=" + word
        else:
            words.append(word)
    for word in words:
        flag = word.split("=")[0]
        name = flag.removeprefix("--").replace("-", "_")
        known = flag.startswith("--") and name in FIELDS
        must(not known or FIELDS[name].metadata["show"] != PRESET,
             f"{flag} is a value of the preset; use --set {name}=VALUE")
    found = vars(make_parser(description, "--help-all" in words).parse(words))
    texts = {name: text for name, text in found.items() if name != "set"}
    for pair in found.get("set", []):
        name, equals, text = pair.partition("=")
        known = name in FIELDS
        must(not known or FIELDS[name].metadata["show"] == PRESET,
             f"--set must not be used for {name} (got {pair!r}); it has a flag, "
             f"--{name.replace('_', '-')}")
        must(known and bool(equals), "--set must be NAME=VALUE with a name that --help-all lists "
             f"(got {pair!r})")
        texts[name] = text
    given = {}
    for name, text in texts.items():
        try:
            given[name] = parse_value(text, FIELDS[name].type)
        except (ValueError, KeyError):
            kind = describe(FIELDS[name].type)
            raise InputError(f"{flag_of(name)} must be {kind} (got {text!r})") from None
    return given


def parse_config(argv: list[str], description: str = "") -> Config:
    """Return the configuration of a command line: the values of the preset, then the flags."""
    given = parse_flags(argv, description)
    preset = given.get("preset", "tiny")
    must(preset in PRESETS, f"--preset must be one of {', '.join(PRESETS)} (got {preset!r})")
    config = Config(**{**PRESETS[preset], **given, "preset": preset})
    for name in given:
        check_used(config, name)
    if config.real and not config.dry_run and not config.bench_steps:
        check_real(config)
    return validated(config)


def check_used(c: Config, name: str) -> None:
    """Raise InputError for a given option that would do nothing."""
    flag, got = flag_of(name), f"(got {getattr(c, name)})"
    preset = PRESETS[c.preset]
    if name == "task" and "task" in preset:
        must(c.task == preset["task"], f"--task must be {preset['task']} with --preset {c.preset} "
             f"(got {c.task})")
    if name in EDIT_FIELDS:
        must(c.task == "edit", f"{flag} requires --task edit (got {c.task})")
    if name == "stated":
        must(c.task != "edit", f"{flag} must be left out with --task edit, whose instructions "
             f"state everything {got}")
    if name == "pairs":
        must(c.task != "text", "--pairs requires --task edit or inpaint (got text)")
    if name in PROMPT_FIELDS:
        must(c.task == "text", f"{flag} requires --task text (got {c.task}); --pairs has the "
             "prompts of others")
    if name in TEACHER_FIELDS:
        # with the toy dataset a run with --teacher may keep the flags of the run that trained it
        loaded = c.real or name in ("base", "teacher_lora")
        must(not (c.teacher and loaded), f"{flag} must be left out with --teacher, which is not "
             f"trained {got}")
        must(not (c.real and c.task == "text"), f"{flag} must be left out for real text-to-image, "
             f"whose teacher is loaded; --task edit and inpaint train one {got}")
    if name in TOY_FIELDS:
        must(not c.real, f"{flag} must be left out with real images: it is an option of the toy "
             f"dataset {got}")
    if name in REAL_FIELDS:
        must(c.real, f"{flag} requires --encoders FOLDER: it is an option of real images "
             "(got none)")
    if name == "lora_targets":
        must(bool(c.lora or c.teacher_lora), f"{flag} requires --lora or --teacher-lora (got "
             "neither)")


def check_real(c: Config) -> None:
    """Raise InputError unless all that a run of real images needs is given."""
    needed = {"--encoders": c.encoders, "--teacher": c.teacher or c.base}
    if c.task == "text":
        needed |= {"--prompts": c.prompts or c.data,
                   "--eval-prompts": not c.data or c.prompts or c.eval_prompts}
    else:
        needed["--pairs"] = c.pairs
    missing = [name for name, found in needed.items() if not found]
    must(not missing, "a run of real images requires --encoders, --teacher (or --base), and "
         "--prompts (or --data with --eval-prompts; --pairs for --task edit and inpaint); missing: "
         f"{' '.join(missing)}; only --dry-run works without")


def validated(c: Config) -> Config:
    """Return `c`; raise InputError unless every field is in range and fields that belong together
    agree."""
    for name, f in FIELDS.items():
        value, flag, meta = getattr(c, name), flag_of(name), f.metadata
        choices, low, high = meta["choices"], meta["low"], meta["high"]
        if choices:
            must(value in choices, f"{flag} must be one of {', '.join(map(str, choices))} (got "
                 f"{value!r})")
        if f.type in (int, float):
            most = 10 ** 9 if f.type is int and high == INF else high
            limits = f"{low:g} to {most:.10g}"
            if high == INF and not value > most:
                limits = f"at least {low:g}"
            must(low <= value <= most and math.isfinite(value),
                 f"{flag} must be {limits} (got {value})")
        if isinstance(value, tuple):
            must(bool(value), f"{flag} must have at least one value (got none)")
            numbers = [v for v in value if not isinstance(v, str)]
            must(all(map(math.isfinite, numbers)), f"{flag} must be finite numbers (got {value})")

    must(not c.tensorboard or bool(find_spec("tensorboard")), "--tensorboard requires the package "
         "tensorboard; pip install tensorboard")
    areas = [h * w for h, w in c.hw]
    must(max(areas) <= 4 / 3 * min(areas), "--sizes must be of similar area, the largest at most "
         f"4/3 of the smallest (got areas {areas})")
    must(len(set(c.hw)) == len(c.hw), "--sizes must differ from each other (got "
         f"{','.join(c.sizes)})")
    named = c.folder.parent == Path("runs") and c.folder.name not in ("", "..", "runs")
    must(named and len(c.folder.name.encode()) <= 200,
         f"--name must be the name of a folder, at most 200 bytes long (got {c.name!r})")
    must(c.dual_blocks <= c.depth, f"--set dual_blocks must be at most depth, {c.depth} (got "
         f"{c.dual_blocks})")
    must(not c.pos_grid or c.pos_grid >= c.patches,
         f"--set pos_grid must be at least {c.patches} for --sizes (got {c.pos_grid})")
    must(c.width % 64 == 0, f"--set width must be a multiple of 64 (got {c.width})")
    must(c.head_width % 16 == 0, f"--set head_width must be a multiple of 16 (got {c.head_width})")
    must(c.replicas == 1 or c.shard != "none",
         f"--replicas must be 1 with --shard none, where nothing is sharded (got {c.replicas})")
    c.micro(1)
    falling = all(a > b for a, b in zip(c.levels, c.levels[1:]))
    must(c.levels[0] == 1 and c.levels[-1] > 0 and falling,
         f"--levels must fall from 1 and stay above 0 (got {c.levels})")
    must(len(c.probs) == len(c.levels), f"--set probs must have {len(c.levels)} values, one for "
         f"each of --levels (got {len(c.probs)})")
    must(abs(sum(c.probs) - 1) < 1e-6 and min(c.probs) > 0, "--set probs must be probabilities "
         f"above 0 that add up to 1 (got {c.probs}); leave a level that is not trained out of "
         "--levels")
    must(max(map(abs, c.teacher_means)) <= 10, "--set teacher_means must be -10 to 10 (got "
         f"{c.teacher_means})")
    must(list(c.taps) == sorted(set(c.taps)) and c.taps[0] >= 0,
         f"--taps must be ascending block numbers (got {c.taps})")
    # otherwise the file of the teacher says how deep it is
    if not (c.teacher or c.base):
        must(c.taps[-1] < c.depth, f"--taps must be at most {c.depth - 1}, the teacher's last "
             f"block (got {c.taps})")
        must(c.student_depth <= c.depth, f"--student-depth must be at most {c.depth}, the "
             f"teacher's depth (got {c.student_depth})")
    if c.task == "edit":
        must(c.text_dim > 32, "--set text_dim must be at least 33 for --task edit (got "
             f"{c.text_dim})")
        must(c.image_dropout <= c.text_dropout, "--set image_dropout must be at most "
             f"text_dropout, {c.text_dropout}: these samples lack the caption too (got "
             f"{c.image_dropout})")
    must(c.image_guidance == 1 or c.task == "edit",
         f"--image-guidance must be 1 without --task edit (got {c.image_guidance})")
    must(c.image_guidance == 1 or c.image_dropout or c.teacher, "--set image_dropout must be "
         f"above 0 with --image-guidance {c.image_guidance}, which needs samples without a source "
         "(got 0)")
    must(c.base or not c.teacher_lora, f"--teacher-lora requires --base (got {c.teacher_lora})")
    must(not c.steps or c.easy_steps < c.steps, "--set easy_steps must be below --steps, "
         f"{c.steps}, or the larger half of --levels is never trained (got {c.easy_steps})")
    if not c.steps:
        must(c.task != "text" or not c.real, "--steps must be at least 1 for real text-to-image, "
             "whose teacher is loaded (got 0); --task edit and inpaint train one")
        must(not c.teacher, "--teacher must be left out with --steps 0, which trains the teacher "
             f"(got {c.teacher}); to start from a network, use --base")
        must(not c.lora, f"--lora must be 0 with --steps 0, which trains no student (got {c.lora})")
    least = least_data(len(c.hw), c.batch, c.shard_size)
    must(c.data_size >= least or not c.steps, f"--data-size must be at least {least}, a --batch of "
         f"each of {len(c.hw)} sizes (got {c.data_size})")
    least = c.teacher_batch * len(c.hw)
    must(c.teacher_images >= least, f"--set teacher_images must be at least {least}, a "
         f"--teacher-batch of each size (got {c.teacher_images})")
    must(c.data != "toy" or not c.real, "--data must be a folder with real images (got toy)")
    # torch leaves a trace that it cannot write out without a word, and replaces a device by it
    path = Path(c.profile)
    must(not c.profile or path.parent.is_dir() and (path.is_file() or not path.exists()),
         f"--profile must be a file in an existing folder (got {c.profile})")
    return c


def least_data(sizes: int, batch: int, shard: int) -> int:
    """Return the latents in files of `shard` that give a batch of each size in addition to the
    held-out part."""
    return sizes * shard * math.ceil(max(batch + 2, batch * 16 / 15) / shard)


# --- config.json of a run folder ---

def to_json(c: Config) -> str:
    """Return the text of config.json."""
    return json.dumps(asdict(c), indent=1) + "\n"


def from_json(stored: dict[str, Any], path: Path) -> Config:
    """Return the configuration that config.json, read from `path`, holds; raise InputError for one
    of another version, or with values of other types."""
    odd = sorted(set(FIELDS) ^ set(stored))
    must(not odd, f"{path}: made by another version of train.py ({', '.join(odd[:3])}); use the "
         "version that made it, or train again")
    values = {}
    for name, f in FIELDS.items():
        value = stored[name]
        parts, kind = [value], f.type
        if hasattr(kind, "__args__"):
            parts, kind = value, kind.__args__[0]
            value = tuple(value) if isinstance(value, list) else None
        kinds = (int, float) if kind is float else (kind,)
        must(value is not None and all(type(part) in kinds for part in parts),
             f"{path}: {name} must be {describe(f.type)} (got {stored[name]!r:.60})")
        values[name] = value
    return validated(Config(**values))


def check_same(c: Config, stored: dict[str, Any]) -> None:
    """Raise InputError unless a stored configuration is `c`, except for what concerns one
    process."""
    for name, value in json.loads(to_json(c)).items():
        must(name in PROCESS_FIELDS or stored.get(name) == value, f"{c.folder}: made with "
             f"{flag_of(name)} {stored.get(name)!r} (got {value!r}); resume with the same flags "
             "or take another --name")
