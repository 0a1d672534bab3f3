"""One frozen dataclass, one preset table, and the command line made from its fields."""
import argparse
import difflib
import json
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

SAMPLERS = ("euler", "renoise")


class InputError(ValueError):
    """Input that we refuse; the scripts print it as one line and exit with code 2."""


def run_script(name: str, main: Callable[[list[str]], None]) -> None:
    """main(the command line); an InputError becomes one line and exit code 2."""
    try:
        main(sys.argv[1:])
    except InputError as error:
        sys.exit(print(f"{name}: {error}", file=sys.stderr) or 2)


def option(default, help: str, choices: tuple = (), low: float = -math.inf, high: float = math.inf):
    """A configuration field: default, meaning, and the values it takes."""
    return field(default=default, metadata={"help": help, "choices": choices, "low": low, "high": high})


@dataclass(frozen=True)
class Config:
    """Everything that decides a run. Levels are unshifted; `shift` is applied by flow.shift alone."""
    preset:          str = option("tiny", "name of the preset", (
        "tiny", "tiny-edit", "tiny-inpaint", "tiny-lora", "tiny-lcm", "shapes", "sd3-medium", "sd3.5-medium",
        "sd3.5-large"))
    task:            str = option("text", "what the networks do: pictures from captions; a source and an "
                                  "instruction to the edited picture; what a mask repaints of a picture",
                                  ("text", "edit", "inpaint"))
    name:            str = option("", "run folder runs/NAME; empty: the preset's name")
    seed:            int = option(0, "seed of everything", low=0, high=2 ** 31)
    device:          str = option("auto", "auto takes CUDA where there is one", ("auto", "cpu", "cuda"))
    kernels:         str = option("auto", "implementation of the fused operations", (
        "auto", "triton", "torch"))
    precision:       str = option(
        "auto", "compute dtype; weights that train stay fp32. auto: bf16 where the device has it",
        ("auto", "fp32", "bf16"))
    compile:         str = option("auto", "torch.compile of each block; auto: on CUDA", ("auto", "on", "off"))
    # world
    objects:         int = option(1, "objects in a scene", (1, 2))
    sizes:           tuple[str, ...] = option(
        ("48x80", "80x48"), "image sizes HxW in pixels, multiples of 16, of about one area")
    stated:          float = option(0.5, "probability that a caption states an attribute", low=0, high=0.95)
    text_dim:        int = option(
        64, "width of a text token; in the built-in world at least one a word", low=23)
    # real prompts and images
    encoders:        str = option("", "SD3 folder with text encoders and VAE; empty: the built-in world")
    prompts:         str = option("", "prompts of the data, a .txt with one a line or a .jsonl")
    eval_prompts:    str = option("", "prompts of grids and report; empty: the first 8 of --prompts")
    t5:              str = option(
        "device", "where T5 runs; none: its tokens are zeros", ("device", "cpu", "none"))
    t5_tokens:       int = option(256, "T5 tokens a prompt", low=1, high=512)
    pairs:           str = option("", "folder that ladd.encode made for --task edit or inpaint: what the "
                                  "teacher learns from, and the sources of its data")
    # teacher
    teacher:         str = option("", "checkpoint of a teacher; empty: train one")
    base:            str = option("", "network as which the teacher starts, of its sizes, new input channels "
                                  "at weight zero; empty: at random")
    teacher_lora:    int = option(0, "rank of a LoRA that trains in place of --base's weights, but for those "
                                  "that read the image; 0: all weights do", low=0, high=1024)
    depth:           int = option(6, "blocks of the teacher", low=1)
    width:           int = option(128, "width of the teacher, a multiple of 64", low=64)
    qk_norm:         bool = option(False, "RMS norm of queries and keys")
    dual_blocks:     int = option(
        0, "first blocks, with a second, image-only attention (SD3.5-medium)", low=0)
    pos_grid:        int = option(0, "side of the position table in patches; 0: as --sizes need", low=0)
    pooled_dim:      int = option(0, "width of the pooled text; 0: --text-dim", low=0)
    predicts:        str = option("x0", "what the teacher's output layer gives; SD3's is v", ("v", "x0"))
    teacher_images:  int = option(49152, "rendered images the teacher learns from", low=1)
    teacher_steps:   int = option(960, "training steps of the teacher", low=1)
    teacher_batch:   int = option(128, "batch of the teacher's training", low=1)
    teacher_lr:      float = option(4e-3, "its peak learning rate, decayed by a cosine", low=0)
    teacher_means:   tuple[float, ...] = option((1.0,), "its levels: equal parts of LogitNormal(mean, 1)")
    text_dropout:    float = option(0.1, "share of captions replaced by the empty one", low=0, high=1)
    image_dropout:   float = option(
        0.05, "share without caption and without the source that is to be edited", low=0, high=1)
    # synthetic data
    data:            str = option("", "folder of latents; empty: let the teacher generate them")
    data_size:       int = option(3072, "latents to generate", low=1)
    data_batch:      int = option(128, "latents a shard and a generating batch", low=1)
    guidance:        float = option(2.0, "teacher's guidance in data and samples", low=1)
    image_guidance:  float = option(1.0, "and towards the source that is edited; 1: none", low=0)
    sample_steps:    int = option(8, "teacher's steps: data and the report's many-step row", low=1)
    data_from:       str = option("teacher", "who makes the latents: the teacher, or the world's renders", (
        "teacher", "world"))
    # student
    objective:       str = option("ladd", "what the student learns by; lcm: the paper's baseline; flow: "
                                  "none, the run ends with its teacher", ("ladd", "lcm", "flow"))
    lcm_steps:       int = option(16, "steps of the teacher's path on which x0_hat is to stay one", low=2)
    student_depth:   int = option(0, "blocks of the student, taken evenly from the teacher's; 0: all", low=0)
    lora:            int = option(0, "rank of a LoRA on the teacher's weights that is the student; 0: all "
                                  "weights train", low=0, high=1024)
    lora_alpha:      float = option(0.0, "a LoRA's weight is this / its rank; 0: the rank", low=0)
    lora_targets:    tuple[str, ...] = option(
        ("all",), "layers with a LoRA: all of the blocks', attention, or names and patterns with *")
    steps:           int = option(180, "training steps of the student", low=1)
    batch:           int = option(64, "pairs a step", low=1)
    micro_batch:     int = option(0, "pairs at a time on a device; 0: all of its share of the batch", low=0)
    lr:              float = option(1.5e-4, "student's learning rate", low=0)
    heads_lr:        float = option(3e-3, "heads' learning rate", low=0)
    beta1:           float = option(0.0, "Adam's beta1 of student and heads", low=0, high=0.9999)
    beta2:           float = option(0.95, "Adam's beta2 of student and heads", low=0, high=0.9999)
    warmup:          int = option(20, "steps of linear learning-rate warm-up, teacher and student", low=0)
    decay:           float = option(
        0.4, "last share of the student's steps in which its learning rate falls to 0", low=0, high=1)
    clip:            float = option(1.0, "bound of the gradient norm of each network", low=0)
    ema:             float = option(
        0.99, "decay of the student's moving average, which is what is kept", low=0, high=1)
    sampler:         str = option("renoise", "the student's sampler", SAMPLERS)
    levels:          tuple[float, ...] = option(
        (1.0, 0.75, 0.5, 0.25), "student's levels, noisiest first, the first 1")
    probs:           tuple[float, ...] = option((0.4, 0.2, 0.2, 0.2), "their probabilities")
    easy_steps:      int = option(0, "first steps, on the easier half of the levels only", low=0)
    shift:           float = option(1.0, "resolution shift of all sampling levels", low=1)
    d_mean:          float = option(-2.0, "sigma_d ~ LogitNormal(d_mean, d_std)")
    d_std:           float = option(1.0, "its standard deviation", low=0)
    taps:            tuple[int, ...] = option((0, 1, 2), "teacher blocks that the heads read")
    head_width:      int = option(64, "channels inside a head, a multiple of 16", low=16)
    teacher_fp8:     bool = option(False, "products of the frozen teacher in fp8 while distilling")
    heads_steps:     int = option(2, "heads' steps a student step", low=1)
    heads_first:     int = option(40, "heads-only steps at the start", low=0)
    misaligned:      float = option(
        0.5, "share of the batch that is also fake under a caption that does not fit", low=0, high=1)
    r1_weight:       float = option(0.0, "approximate R1 on the renoised real sample", low=0)
    distill_weight:  float = option(0.0, "the paper's distillation loss, for its ablation", low=0)
    # processes (torchrun) and memory
    parallel:        str = option("auto", "copies of the student, or shards; auto: copies where they fit",
                                  ("auto", "ddp", "fsdp"))
    replicas:        int = option(1, "copies of what is sharded, such as one a node", low=1)
    shard_teacher:   str = option("auto", "shard the frozen teacher too; auto: where it does not fit",
                                  ("auto", "on", "off"))
    checkpoint:      str = option("none", "activations kept for backward: all; of a block its inputs and "
                                  "attentions; its inputs", ("none", "selective", "full"))
    timeout:         float = option(1800.0, "seconds after which a process that hangs ends the run", low=1)
    # evaluation
    n:               int = option(2048, "images of each row of the report", low=6)
    eval_n:          int = option(256, "images of an evaluation while training", low=6)
    eval_every:      int = option(90, "steps between evaluations; 0: none", low=0)
    grid_every:      int = option(90, "steps between sample grids; 0: none", low=0)
    log_every:       int = option(10, "steps between log lines", low=1)
    save_every:      int = option(100, "steps between checkpoints", low=1)
    eval_batch:      int = option(256, "batch of sampling for evaluation", low=2)
    # this process alone
    stop_after:      int = option(0, "save and end after so many steps of this process; 0: never", low=0)
    dry_run:         bool = option(False, "print the resolved configuration, sizes and costs, then exit")
    bench_steps:     int = option(0, "time so many LADD steps of random networks, then exit", low=0)
    tflops:          float = option(
        0.0, "rate for the dry run's hours; 0: a product timed on this device", low=0)
    profile:         str = option("", "file for a trace of the last 3 student steps")
    overfit_one_batch: bool = option(False, "train teacher and student on their first batch only")

    @property
    def run_name(self) -> str:
        return self.name or self.preset

    @property
    def real(self) -> bool:
        """Prompts, latents and pictures are SD3's, not the built-in world's."""
        return bool(self.encoders) or self.preset.startswith("sd3")

    def micro(self, world: int, teacher: bool = False) -> int:
        """Pairs at a time on each of `world` devices, of --batch or of --teacher-batch; InputError where that
        cannot be split so."""
        batch, flag = (self.teacher_batch, "--teacher-batch") if teacher else (self.batch, "--batch")
        if batch % world:
            raise InputError(f"{flag}: found {batch}, a multiple of the {world} processes expected")
        share = batch // world
        micro = min(self.micro_batch or share, share)
        if share % micro:
            raise InputError(f"--micro-batch: found {self.micro_batch}, a divisor of each process's share of "
                             f"{flag}, {share}, expected")
        return micro

    @property
    def beside(self) -> int:
        """Channels beside the noised latent: the source's latents; a mask and masked latents."""
        return {"text": 0, "edit": 16, "inpaint": 17}[self.task]

    @property
    def hw(self) -> tuple[tuple[int, int], ...]:
        """Image sizes in pixels."""
        return tuple(parse_size(s) for s in self.sizes)


# may differ when a run resumes
PROCESS_FIELDS = ("micro_batch", "parallel", "replicas", "shard_teacher", "checkpoint", "timeout",
                  "stop_after", "dry_run", "bench_steps", "tflops", "profile")

# refused where they would do nothing: those of the built-in world, of a teacher's training, of real prompts,
# of editing, of a LoRA
WORLD_FIELDS = "objects", "stated", "teacher_images", "data_from", "n"
TEACHER_FIELDS = ("base", "teacher_lora", "teacher_steps", "teacher_batch", "teacher_lr", "teacher_means",
                  "text_dropout", "image_dropout")
PROMPT_FIELDS = "prompts", "eval_prompts"
REAL_FIELDS = *PROMPT_FIELDS, "t5", "t5_tokens", "pooled_dim", "pairs"
EDIT_FIELDS = "image_guidance", "image_dropout"
LORA_FIELDS = "lora_alpha", "lora_targets"

# SD3's own values where they are known (shift, guidance, sampling steps); the rest is our choice, unmeasured
SD3 = dict(sizes=("1024x1024", "832x1216", "1216x832"), text_dim=4096, pooled_dim=2048, predicts="v",
           data_size=16384, data_batch=64, sample_steps=28, steps=2000, batch=16, micro_batch=2, lr=2e-6,
           heads_lr=2e-5, beta2=0.99, warmup=100, ema=0.995, sampler="euler", probs=(0.7, 0.1, 0.1, 0.1),
           teacher_steps=5000, teacher_batch=64, teacher_lr=2e-5, easy_steps=500, shift=3.0, d_mean=1.0,
           heads_steps=1, head_width=512, eval_every=250, grid_every=250, save_every=250, eval_batch=4)

# fmt: off
PRESETS = {
    #           depth width text teacher              data              student              report
    "tiny":         {},
    "tiny-edit":    dict(task="edit", teacher_images=16384, teacher_steps=720,
                         guidance=1.5, image_guidance=1.3, lr=1e-4, misaligned=0.0),
    "tiny-inpaint": dict(task="inpaint", teacher_images=16384, teacher_steps=720, lr=1e-4, misaligned=0.0),
    "tiny-lora":    dict(lora=16, lr=1.5e-3),
    "tiny-lcm":     dict(objective="lcm", steps=360, lr=5e-4),
    "shapes": dict(objects=2, sizes=("256x256", "192x320", "320x192"), depth=12, width=512, qk_norm=True,
                   predicts="v", text_dim=256, teacher_images=65536, teacher_steps=3000, teacher_batch=128,
                   teacher_lr=5e-4, teacher_means=(0.7, 2.0), data_size=16384, data_batch=512,
                   sample_steps=16, steps=2000, batch=64, lr=5e-5, heads_lr=5e-4, ema=0.995,
                   probs=(0.7, 0.1, 0.1, 0.1), shift=2.0, d_mean=0.7, taps=(2, 5, 8, 11), head_width=256,
                   heads_steps=1,
                   eval_every=500, grid_every=500, save_every=500, eval_n=512, eval_batch=128),
    "sd3-medium":   dict(SD3, depth=24, width=1536, pos_grid=192, taps=tuple(range(24)), guidance=5.0),
    "sd3.5-medium": dict(SD3, depth=24, width=1536, pos_grid=384, taps=tuple(range(24)), guidance=5.0,
                         qk_norm=True, dual_blocks=13, sample_steps=40),
    "sd3.5-large":  dict(SD3, depth=38, width=2432, pos_grid=192, taps=tuple(range(38)), guidance=4.5,
                         qk_norm=True, sample_steps=40, lr=1e-6, heads_lr=1e-5),
}
# fmt: on


def parse_size(text: str) -> tuple[int, int]:
    """(H, W) of "HxW"; both multiples of 16 (codec 8, patch 2)."""
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(p.isdecimal() for p in parts):
        raise InputError(f"size {text!r}: HxW in pixels expected, e.g. 64x64")
    h, w = map(int, parts)
    if min(h, w) < 16 or h % 16 or w % 16:
        near = "x".join(str(max(16, round(s / 16) * 16)) for s in (h, w))
        raise InputError(f"size {text}: sides are multiples of 16, the nearest is {near}")
    return h, w


def parse_value(text: str, kind):
    """`text` as a field's type; tuples are comma-separated. Raises ValueError."""
    if kind is bool:
        return {"true": True, "on": True, "1": True, "false": False, "off": False, "0": False}[text.lower()]
    if kind in (int, float, str):
        return kind(text)
    return tuple(kind.__args__[0](part) for part in text.split(",") if part)


class Parser(argparse.ArgumentParser):
    """argparse whose errors are InputErrors and which names the nearest known flag."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str):
        raise InputError(message)

    def parse(self, argv: list[str]) -> argparse.Namespace:
        args, unknown = self.parse_known_args(argv)
        if unknown:
            flags = [s for a in self._actions for s in a.option_strings if s.startswith("--")]
            near = difflib.get_close_matches(unknown[0].split("=")[0], flags, 1, 0)
            raise InputError(f"unknown argument {unknown[0]!r}; the nearest flag is {near[0]}")
        return args


def parse_config(argv: list[str], preset: str, description: str = "") -> Config:
    """The configuration of a command line:
    the preset's values (`preset` if none is named), then the flags."""
    parser = Parser(description=description, prog="train.py")
    for f in fields(Config):
        flag = "--" + f.name.replace("_", "-")
        shown = ",".join(map(str, f.default)) if isinstance(f.default, tuple) else f.default
        meaning = f.metadata["help"].replace("%", "%%") + (f" (tiny: {shown})" if shown != "" else "")
        choices = (f" one of {', '.join(f.metadata['choices'])}:"
                   if f.metadata["choices"] and f.type is str else "")
        optional = dict(nargs="?", const="true") if f.type is bool else {}
        parser.add_argument(flag, metavar=f.type.__name__.upper(), help=(choices + " " + meaning).strip(),
                            default=argparse.SUPPRESS, **optional)
    # a value that starts with a minus is a value, although argparse takes "-1,2" for a flag
    joined = []
    for word in argv:
        if (joined and joined[-1].startswith("--") and "=" not in joined[-1]
                and word[:1] == "-" and word[1:2] in "0123456789." and word[1:]):
            joined[-1] += "=" + word
        else:
            joined.append(word)
    given = {}
    for name, text in vars(parser.parse(joined)).items():
        kind = next(f.type for f in fields(Config) if f.name == name)
        try:
            given[name] = parse_value(text, kind)
        except (ValueError, KeyError):
            raise InputError(f"--{name.replace('_', '-')}: found {text!r}, "
                             f"{describe(kind)} expected") from None
    preset = given.get("preset", preset)
    if preset not in PRESETS:
        raise InputError(f"--preset: found {preset!r}, accepted are {', '.join(PRESETS)}")
    if given.get("objective") == "dpo":
        raise InputError("--objective: found 'dpo', a script of its own: python -m ladd.dpo --run FOLDER")
    config = Config(**{**PRESETS[preset], **given, "preset": preset})
    for name in given:
        found = f"--{name.replace('_', '-')}: found {given[name]!r}"
        if name == "task" and "task" in PRESETS[preset] and config.task != PRESETS[preset]["task"]:
            raise InputError(f"{found} with --preset {preset}, whose own or another preset expected")
        if name in EDIT_FIELDS and config.task != "edit":
            raise InputError(f"{found}, an option of --task edit, {config.task} is to be trained")
        if name == "stated" and config.task == "edit":
            raise InputError(f"{found}, an option of captions; instructions of --task edit say what they ask")
        if name == "pairs" and config.task == "text" or name in PROMPT_FIELDS and config.task != "text":
            raise InputError(f"{found} with --task {config.task}: --prompts and --eval-prompts are text's, "
                             "--pairs what edit and inpaint read")
        # in the built-in world a run with --teacher may keep the flags of the run that trained it
        if name in TEACHER_FIELDS and (config.teacher and (config.real or name in ("base", "teacher_lora"))
                                       or config.real and config.task == "text"):
            kind = "" if config.teacher else " (real text-to-image; --task edit or inpaint train one)"
            raise InputError(f"{found}, an option of the teacher's training, which is loaded{kind}")
        if name in (WORLD_FIELDS if config.real else REAL_FIELDS):
            where = ("of the built-in world, which --encoders and the sd3 presets leave" if config.real
                     else "of real prompts: --encoders FOLDER expected beside it")
            raise InputError(f"{found}, an option {where}")
        if name == "lcm_steps" and config.objective != "lcm":
            raise InputError(f"--lcm-steps: found {given[name]} without --objective lcm, which reads it")
        if name in LORA_FIELDS and not (config.lora or config.teacher_lora):
            raise InputError(f"{found} without --lora or --teacher-lora, ranks above 0, which read it")
    if config.real and not config.dry_run and not config.bench_steps:
        needed = {"encoders": config.encoders, "teacher": config.teacher or config.base}
        needed |= {"prompts": config.prompts or config.data,
                   "eval-prompts": config.prompts or config.eval_prompts} if config.task == "text" else {
                       "pairs": config.pairs}
        missing = [f"--{name}" for name, found in needed.items() if not found]
        if missing:
            raise InputError(f"--preset {preset}: found no {' '.join(missing)}; a teacher's file, an SD3 "
                             "folder with encoders and VAE, and "
                             f"{'prompts' if config.task == 'text' else 'pairs'} expected; --dry-run needs "
                             "none")
    return validated(config)


def describe(kind) -> str:
    if hasattr(kind, "__args__"):
        return f"comma-separated {kind.__args__[0].__name__}"
    return {bool: "on or off", int: "a whole number", float: "a number", str: "text"}[kind]


def validated(c: Config) -> Config:
    """`c`, every field in range and fields that belong together in agreement; InputError otherwise."""
    for f in fields(c):
        value, flag = getattr(c, f.name), "--" + f.name.replace("_", "-")
        meta = f.metadata
        if meta["choices"] and value not in meta["choices"]:
            raise InputError(f"{flag}: found {value!r}, accepted are {', '.join(map(str, meta['choices']))}")
        if f.type in (int, float) and not (meta["low"] <= value <= meta["high"] and math.isfinite(value)):
            raise InputError(f"{flag}: found {value}, {meta['low']:g} to {meta['high']:g} accepted")
        if isinstance(value, tuple) and not value:
            raise InputError(f"{flag}: found nothing, at least one value expected")
        if isinstance(value, tuple) and not all(math.isfinite(v) for v in value if not isinstance(v, str)):
            raise InputError(f"{flag}: found {value}, finite numbers expected")

    def must(ok: bool, message: str) -> None:
        if not ok:
            raise InputError(message)

    areas = [h * w for h, w in c.hw]
    must(max(areas) <= 4 / 3 * min(areas), f"--sizes: found areas {areas}, "
         "sizes of about one area (the largest at most 4/3 of the smallest) expected")
    must(len(set(c.hw)) == len(c.hw),
         f"--sizes: found {','.join(c.sizes)}, different sizes expected, each once")
    must(c.run_name == Path(c.run_name).name and c.run_name not in (".", ".."),
         f"--name: found {c.run_name!r}, a folder name expected")
    must(c.dual_blocks <= c.depth,
         f"--dual-blocks: found {c.dual_blocks}, at most --depth {c.depth} expected")
    patches = max(max(hw) for hw in c.hw) // 16
    must(not c.pos_grid or c.pos_grid >= patches,
         f"--pos-grid: found {c.pos_grid}, at least {patches} expected for --sizes")
    must(c.width % 64 == 0, f"--width: found {c.width}, a multiple of 64 expected")
    must(c.head_width % 16 == 0, f"--head-width: found {c.head_width}, a multiple of 16 expected")
    must(c.shard_teacher != "on" or c.parallel != "ddp",
         "--shard-teacher: found on with --parallel ddp, where nothing is sharded; fsdp or auto expected")
    must(c.replicas == 1 or c.parallel != "ddp",
         f"--replicas: found {c.replicas} with --parallel ddp, whose copies are one a process")
    c.micro(1)
    must(len(c.probs) == len(c.levels), f"--probs: found {len(c.probs)} values for {len(c.levels)} --levels")
    must(abs(sum(c.probs) - 1) < 1e-6 and min(c.probs) >= 0,
         f"--probs: found sum {sum(c.probs):g}, probabilities that add up to 1 expected")
    falling = all(a > b for a, b in zip(c.levels, c.levels[1:]))
    must(c.levels[0] == 1 and c.levels[-1] > 0 and falling,
         f"--levels: found {c.levels}, falling from 1 and above 0 expected")
    must(list(c.taps) == sorted(set(c.taps)) and c.taps[0] >= 0,
         f"--taps: found {c.taps}, ascending block indices expected")
    if not (c.teacher or c.base):                       # else the file says how deep it is
        must(c.taps[-1] < c.depth, f"--taps: found {c.taps[-1]}, the teacher has blocks 0 to {c.depth - 1}")
        must(c.student_depth <= c.depth,
             f"--student-depth: found {c.student_depth}, at most the teacher's {c.depth} expected")
    must(c.text_dim > 32 or c.task != "edit",
         f"--text-dim: found {c.text_dim}, at least 33 expected for --task edit, which has more words")
    must(c.image_dropout <= c.text_dropout or c.task != "edit", f"--image-dropout: found {c.image_dropout}, "
         f"at most --text-dropout {c.text_dropout} expected: these samples lack the caption too")
    must(c.image_guidance == 1 or c.task == "edit", f"--image-guidance: found {c.image_guidance} with --task "
         f"{c.task}, 1 (none) expected: there is no source to guide by")
    must(c.image_guidance == 1 or c.image_dropout or c.teacher, "--image-dropout: found 0 with "
         f"--image-guidance {c.image_guidance}, which needs samples without a source, more expected")
    must(c.task != "text" or not c.real or c.objective != "flow", "--objective: found flow for real "
         "text-to-image, whose teacher is loaded; --task edit and inpaint accepted")
    must(c.base or not c.teacher_lora,
         f"--teacher-lora: found {c.teacher_lora} without --base, weights that it adapts expected")
    must(not c.teacher or c.objective != "flow",
         f"--teacher: found {c.teacher} with --objective flow, which trains one; --base accepted")
    must(not c.lora or c.objective != "flow",
         f"--lora: found {c.lora} with --objective flow, which trains no student; ladd and lcm accepted")
    # a batch of each size beside the held-out part
    least = len(c.hw) * c.data_batch * math.ceil(max(c.batch + 2, c.batch * 16 / 15) / c.data_batch)
    must(c.data_size >= least, f"--data-size: found {c.data_size}, at least {least} expected: "
         f"a --batch of each of {len(c.hw)} sizes")
    least = c.teacher_batch * len(c.hw)
    must(c.teacher_images >= least, f"--teacher-images: found {c.teacher_images}, "
         f"at least {least} expected: a --teacher-batch of each size")
    must(not c.profile or Path(c.profile).parent.is_dir(),
         f"--profile: found {c.profile}, a file in a folder that exists expected")
    return c


def to_json(c: Config) -> str:
    return json.dumps(asdict(c), indent=1) + "\n"


def read_config(path: Path) -> Config:
    """The configuration that a run folder holds; InputError for what this version did not write."""
    try:
        stored = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: found no run's configuration ({error})") from None
    names = [f.name for f in fields(Config)]
    if not isinstance(stored, dict) or (odd := sorted(set(names) ^ set(stored))):
        kind = f"other options ({', '.join(odd[:3])})" if isinstance(stored, dict) else "no options"
        raise InputError(f"{path}: found {kind}, the configuration of a run of this version accepted")
    return validated(Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in stored.items()}))


def check_same(c: Config, stored: dict) -> None:
    """Raises InputError unless a run folder's stored configuration is `c`,
    but for what concerns one process alone."""
    for name, value in json.loads(to_json(c)).items():
        if name not in PROCESS_FIELDS and stored.get(name) != value:
            raise InputError(f"runs/{c.run_name}: made with --{name.replace('_', '-')} {stored.get(name)}, "
                             f"found {value}; resume with the same flags or take another --name")
