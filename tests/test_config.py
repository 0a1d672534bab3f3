"""The command line: what it takes, what it refuses, how it says so; every field of Config does something."""
import json
import math
import re
import resource
import subprocess
import sys
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from unittest import mock

import pytest
import test_train
import torch
from test_train import QUIET, ROOT, log_of, main, refused, save_teacher

import kernels
import train
from ladd import data, evaluate, tasks
from ladd.config import PRESETS, PROCESS_FIELDS, Config, check_same, parse_config, to_json, validated
from ladd.mmdit import MMDiT
from ladd.step import teacher_config

FIELDS = {f.name: f for f in fields(Config)}
NUMBERS = [name for name, f in FIELDS.items() if f.type in (int, float) and not f.metadata["choices"]]
flag_of = lambda name: "--" + name.replace("_", "-")


# parsing

@pytest.mark.parametrize("preset", PRESETS)
def test_presets_parse_and_a_flag_overrides_them(preset):
    dry = ["--dry-run"] * preset.startswith("sd3")                # else they want files
    config = parse_config(["--preset", preset, "--seed", "7", *dry], "tiny")
    assert config == replace(Config(), **PRESETS[preset], preset=preset, seed=7, dry_run=bool(dry))
    assert parse_config(dry, preset) == replace(config, seed=0) and config.run_name == preset
    assert parse_config(["--preset", preset, "--name", "mine", *dry], "tiny").run_name == "mine"
    changed = parse_config(["--preset", preset, "--width", "192", *dry], "tiny")
    assert changed.width == 192 and replace(changed, width=config.width, seed=7) == config


def test_presets_differ_and_name_only_fields():
    assert len({json.dumps(values, sort_keys=True) for values in PRESETS.values()}) == len(PRESETS)
    assert all(set(values) <= set(FIELDS) for values in PRESETS.values())


def test_json_round_trip():
    config = parse_config(["--lr", "1e-5", "--taps", "0,2", "--sizes", "32x64", "--qk-norm"], "tiny")
    stored = json.loads(to_json(config))
    back = Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in stored.items()})
    assert back == config and list(stored) == list(FIELDS)
    assert stored["taps"] == [0, 2] and stored["qk_norm"] is True
    check_same(config, stored)


def test_check_same_names_the_first_flag_that_differs():
    stored = json.loads(to_json(Config()))
    with refused(f"^runs/[^;]* --teacher-lr {Config().teacher_lr}, found 0.5; [^;]*another --name$"):
        check_same(replace(Config(), teacher_lr=0.5, lr=0.5, eval_n=7), stored)
    with refused("--taps None, found"):                                   # written by an older version
        check_same(Config(), {k: v for k, v in stored.items() if k != "taps"})
    for name in PROCESS_FIELDS:                                           # may differ when a run resumes
        check_same(replace(Config(), **{name: "x"}), stored)
    for name in set(FIELDS) - set(PROCESS_FIELDS):
        with refused(f"{flag_of(name)} "):
            check_same(replace(Config(), **{name: "x"}), stored)


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit) as end:
        parse_config(["--help"], "tiny", "what it is 100%")
    text = capsys.readouterr().out
    assert end.value.code == 0 and "what it is" in text
    assert not [name for name in FIELDS if f"{flag_of(name)} " not in text]


def test_negative_values_are_values():
    config = parse_config(["--d-mean", "-1.5", "--teacher-means", "-1,0.5"], "tiny")
    assert config.d_mean == -1.5 and config.teacher_means == (-1, 0.5)


# what is refused: the line names the flag, what was found, and what is accepted

BAD = {
    "--stepz 5": ("'--stepz'", "--steps"),
    "--heads-learning-rate 1": ("--heads-learning-rate", "--heads"),
    "--lr=1 --taps=0 --quality=9": ("--quality", "nearest flag is --"),
    "steps": ("'steps'", "--steps"),
    "--preset huge": ("--preset", "'huge'", "tiny, tiny-edit, tiny-inpaint, tiny-lora, tiny-lcm, shapes"),
    "--steps many": ("--steps", "'many'", "whole number"),
    "--steps 1.5": ("--steps", "'1.5'", "whole number"),
    "--lr fast": ("--lr", "'fast'", "a number"),
    "--lr nan": ("--lr", "nan", "0 to"),
    "--lr inf": ("--lr", "inf", "0 to"),
    "--d-mean nan": ("--d-mean", "nan"),
    "--d-mean inf": ("--d-mean", "inf"),
    "--teacher-means 0,nan": ("--teacher-means", "nan"),
    "--teacher-means ,": ("--teacher-means", "nothing", "at least one"),
    "--taps a,b": ("--taps", "'a,b'", "comma-separated int"),
    "--taps": ("--taps", "expected"),
    "--qk-norm maybe": ("--qk-norm", "'maybe'", "on or off"),
    "--sizes 64": ("--sizes|size", "'64'", "HxW"),
    "--sizes 60x64": ("--sizes|size", "60x64", "multiples of 16", "64x64"),
    "--sizes 0x64": ("--sizes|size", "0x64", "16x64"),
    "--sizes 32x32,64x64": ("--sizes", r"\[1024, 4096\]", "about one area"),
    "--sizes 64x64,64x64": ("--sizes", "64x64", "once|twice|distinct|different"),
    "--width 100": ("--width", "100", "multiple of 64"),
    "--head-width 24": ("--head-width", "24", "multiple of 16"),
    "--teacher-fp8 --precision fp32": ("--teacher-fp8", "--precision fp32 on cpu", "bf16"),
    "--preset tiny-edit --task text": ("--task", "'text'", "tiny-edit"),
    "--preset tiny-edit --task inpaint": ("--task", "'inpaint'", "tiny-edit"),
    "--image-guidance 2": ("--image-guidance", "2", "--task edit"),
    "--task edit --stated .3": ("--stated", "0.3", "instructions"),
    "--task edit --image-guidance 2 --image-dropout 0": ("--image-dropout", "--image-guidance 2"),
    "--preset sd3-medium --objective flow --dry-run": ("--objective", "flow", "edit and inpaint"),
    "--micro-batch 32 --teacher-batch 48": ("--micro-batch", "32", "--teacher-batch, 48"),
    "--objective dpo": ("--objective", "'dpo'", "python -m ladd.dpo"),
    "--objective flow --teacher t": ("--teacher", "found t", "--base"),
    "--lcm-steps 4": ("--lcm-steps", "4", "--objective lcm"),
    "--lora-alpha 4": ("--lora-alpha", "4", "--lora or --teacher-lora"),
    "--lora-targets attention": ("--lora-targets", "attention", "--lora or --teacher-lora"),
    "--lora 4 --objective flow": ("--lora", "4", "--objective flow", "ladd and lcm"),
    "--lora 4 --lora-targets to_q": ("LoRA targets", "to_q", "joint_blocks", "attn.qkv"),
    "--lora 4 --student-depth 1 --lora-targets joint_blocks.1.*": ("LoRA targets", r"joint_blocks\.1"),
    "--lora 129": ("LoRA", "rank 129", "1 to the network's width 128"),
    "--lora 4 --lora-targets ,": ("--lora-targets", "nothing", "at least one"),
    "--teacher-lora 4": ("--teacher-lora", "4", "--base"),
    "--teacher-lora 4 --teacher t": ("--teacher-lora", "4", "is loaded"),
    "--micro-batch 3": ("--micro-batch", "3", "64"),
    "--taps 1,9": ("--taps", "9", "0 to 5"),
    "--taps 3,1": ("--taps", r"\(3, 1\)", "ascending"),
    "--taps=-1,2": ("--taps", r"\(-1, 2\)", "ascending"),
    "--probs .5,.5": ("--probs", "2 values", "4 --levels"),
    "--probs .7,.1,.1,.2": ("--probs", "1.1", "add up to 1"),
    "--probs 1.1,-.1,0,0": ("--probs", "probabilities"),
    "--levels .9,.75,.5,.25": ("--levels", r"0\.9", "falling from 1"),
    "--levels 1,.5,.75,.25": ("--levels", r"0\.75", "falling"),
    "--levels 1,.75,.5,0": ("--levels", "above 0"),
    "--student-depth 7": ("--student-depth", "7", "at most the teacher's 6"),
    "--batch 64 --data-size 32": ("--data-size", "32", "at least"),
    "--data-size 128": ("--data-size", "128", "at least"),               # too few for a batch of each size
    "--teacher-images 100": ("--teacher-images", "100", "at least"),
    "--n 5": (r"--n\b", "5", r"6|\d+ to"),
    "--eval-n 3": ("--eval-n", "3", r"6|\d+ to"),
    "--eval-batch 1": ("--eval-batch", "1", "2"),
    "--text-dim 16": ("--text-dim", "16", r"\d\d"),
    "--stated 1": ("--stated", "1", "0 to"),
    "--beta1 1": ("--beta1", "1", "0 to"),
    "--beta2 1": ("--beta2", "1", "0 to"),
    "--seed 99999999999999": ("--seed", "99999999999999", "0 to"),
    "--seed -1": ("--seed", "-1", "0 to"),
    "--objects 3": ("--objects", "3", "1, 2"),
    "--sampler ddim": ("--sampler", "'ddim'", "euler, renoise"),
    "--device tpu": ("--device", "'tpu'", "auto, cpu, cuda"),
    "--precision fp8": ("--precision", "'fp8'", "auto, fp32, bf16"),
    "--name a/b": ("--name", "'a/b'", "folder name"),
    "--name ..": ("--name", r"'\.\.'", "folder name"),
    "--guidance .5": ("--guidance", "0.5", "1 to"),
    "--profile nowhere/trace.json": ("--profile", "nowhere"),
    "--teacher no.safetensors": ("--teacher", "no.safetensors", "not exist"),
    "--data nowhere": ("--data", "nowhere", "not exist"),
    "--dual-blocks 7": ("--dual-blocks", "7", "at most --depth 6"),
    "--pos-grid 4": ("--pos-grid", "4", "at least 5"),
    "--task video": ("--task", "'video'", "text, edit, inpaint"),
    "--objective gan": ("--objective", "'gan'", "ladd, lcm, flow"),
    "--image-guidance 2": ("--image-guidance", "2", "--task edit, text is"),
    "--task edit --image-guidance -1": ("--image-guidance", "-1", "0 to"),
    "--task inpaint --image-dropout .1": ("--image-dropout", r"0\.1", "--task edit, inpaint is"),
    "--task edit --text-dropout .02": ("--image-dropout", r"0\.05", r"at most --text-dropout 0\.02"),
    "--task edit --text-dim 32": ("--text-dim", "32", "at least 33"),
    "--base no.safetensors": ("--base", "no.safetensors", "not exist"),
    "--base b --teacher t": ("--base", "'b'", "training, which is loaded"),
    "--pairs p": ("--pairs", "'p' with --task text", "edit and inpaint"),
    "--task edit --pairs p": ("--pairs", "'p'", "--encoders FOLDER expected"),
    "--task edit --prompts p": ("--prompts", "'p' with --task edit", "--pairs"),
    "--preset sd3-medium --task inpaint": ("--preset sd3-medium", "no --encoders --teacher --pairs"),
    "--preset sd3-medium --base b --dry-run": ("--base", "'b'", "training, which is loaded"),
    "--preset sd3-medium --task edit --teacher t --teacher-lr 1 --dry-run": ("--teacher-lr", "1", "loaded"),
    "--preset sd3-medium --task edit --encoders e --base nil --pairs p": ("--base", "nil", "not exist"),
    "--preset sd3-medium --task edit --encoders e --teacher . --pairs no": ("--pairs", "no", "not exist"),
    "--prompts p.txt": ("--prompts", "p.txt", "--encoders FOLDER expected"),
    "--t5 none": ("--t5", "'none'", "--encoders FOLDER expected"),
    "--preset sd3-medium": ("--preset sd3-medium", "no --encoders --teacher --prompts", "expected"),
    "--preset sd3.5-large --encoders e --teacher t --data d": ("--preset sd3.5-large", "no --eval-prompts"),
    "--preset sd3-medium --dry-run --teacher-steps 5": ("--teacher-steps", "5", "which is loaded"),
    "--encoders nowhere --teacher t --prompts p --objects 2": ("--objects", "2", "built-in world"),
    "--encoders nowhere --teacher nowhere --prompts p": ("--teacher", "nowhere", "not exist"),
}


@pytest.mark.parametrize("line", BAD)
def test_bad_input_is_refused_in_one_line_and_nothing_is_made(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "open_run", lambda config: pytest.fail(f"{line} is accepted"))
    with refused(*BAD[line]):
        train.main(["--preset", "tiny", *line.split()] if "--preset" not in line else line.split())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", NUMBERS)
def test_bounds(name):
    """Beyond each bound: refused, with flag, value and range. Infinity and NaN are no numbers here."""
    f = FIELDS[name]
    step, no_numbers = (1, []) if f.type is int else (1e-3, [math.nan, math.inf, -math.inf])
    beyond = [v for v in (f.metadata["low"] - step, f.metadata["high"] + step) if math.isfinite(v)]
    for value in beyond + no_numbers:
        with refused(flag_of(name), re.escape(str(value)), " to "):
            validated(replace(Config(), **{name: value}))


@pytest.mark.parametrize("line, named", [("--stepz 5", "--stepz"), ("--micro-batch 3", "--micro-batch")])
def test_the_script_prints_one_line_and_ends_with_code_2(line, named, tmp_path):
    def processor_seconds() -> float:                    # the clock's would fail this for what others run
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    before, command = processor_seconds(), [sys.executable, str(ROOT / "train.py"), *line.split()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout and not list(tmp_path.iterdir())
    assert re.fullmatch(rf"train\.py: .*{named}.*\n", done.stderr) and processor_seconds() - before < 5


def test_the_narrowest_text_of_instructions_has_a_direction_for_each_word():
    """What --text-dim 32 is refused for."""
    _, words = tasks.embed(tasks.WORDS, 8, 33)
    assert (words @ words.T / 33 - torch.eye(len(words))).abs().max() < .1


# liveness: for each field, another value changes what a run computes, writes or prints

# the least that shows a field: two steps of a teacher; shards of a random one; three steps of a student
STAGES = {
    "teacher": "--stop-after 2 --teacher-steps 4 --taps 0",
    "data": "--teacher t.safetensors --stop-after 1",
    "student": "--teacher t.safetensors --data latents --steps 3 --heads-first 1 --log-every 1"}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with two teachers in which no weight is zero, and with latents of each."""
    folder = tmp_path_factory.mktemp("liveness")
    for i, latents in enumerate(("latents2", "latents")):
        save_teacher(folder, seed=i)
        main(folder, f"--name {latents} {QUIET} {STAGES['data']}")
        (folder / "runs" / latents / "data").rename(folder / latents)
    save_teacher(folder, seed=0).rename(folder / "other.safetensors")
    save_teacher(folder, in_channels=32).rename(folder / "edit.safetensors")
    save_teacher(folder, seed=1)
    return folder


@cache
def observed(home: Path, stage: str, flags: str) -> dict[str, object]:
    """What a run leaves, but for config.json and the clock: log, files, the sum of squares of each tensor."""
    run = home / "runs" / f"run{len(list((home / 'runs').iterdir()))}"
    printed = main(home, f"--name {run.name} {QUIET} {STAGES[stage]} {flags}")
    files = {str(path.relative_to(run)): path for path in sorted(run.rglob("*")) if path.is_file()}
    tensors = {name: {k: t.double().square().sum().item() for k, t in data.read_tensors(path)[0].items()}
               for name, path in files.items() if path.suffix == ".safetensors"}
    return {"log": log_of(run), "files": list(files), "said": printed.replace(run.name, ""),
            "weights": {name: sums for name, sums in tensors.items() if name.startswith("checkpoints")},
            "shards": {name: sums for name, sums in tensors.items() if name.startswith("data/0")}}


EDIT = "--task edit --teacher edit.safetensors"
CASES = {    # field: (what changes, in which stage, with which value, beside which other flags), ...
    "seed":           [("log", "teacher", "1"), ("shards", "data", "1"), ("log", "student", "1")],
    "precision":      [("log", "teacher", "bf16"), ("shards", "data", "bf16"), ("log", "student", "bf16")],
    "objects":        [("log", "teacher", "2", "--sizes 48x48"), ("shards", "data", "2", "--sizes 48x48")],
    "sizes":          [("log", "teacher", "48x48"), ("files", "data", "48x48")],
    "stated":         [("weights", "teacher", "0.2"), ("shards", "data", "0.2")],
    "text_dim":       [("weights", "teacher", "32")],
    "teacher":        [("shards", "data", "other.safetensors"), ("log", "student", "other.safetensors"),
                       ("files", "data", "")],
    "depth":          [("weights", "teacher", "1")],
    "width":          [("weights", "teacher", "128")],
    "qk_norm":        [("weights", "teacher", "on")],
    "dual_blocks":    [("weights", "teacher", "1")],
    "pos_grid":       [("weights", "teacher", "9")],
    "predicts":       [("weights", "teacher", "v")],
    "teacher_images": [("log", "teacher", "64")],
    "teacher_steps":  [("weights", "teacher", "8")],
    "teacher_batch":  [("log", "teacher", "6")],
    "teacher_lr":     [("weights", "teacher", "1e-3")],
    "teacher_means":  [("log", "teacher", "0,2")],
    "text_dropout":   [("weights", "teacher", "0.9")],
    "data":           [("log", "student", "latents2"), ("files", "student", "")],
    "data_size":      [("shards", "data", "144")],
    "data_batch":     [("shards", "data", "48")],
    "guidance":       [("shards", "data", "1")],
    "sample_steps":   [("shards", "data", "4")],
    "student_depth":  [("weights", "student", "1")],
    "lora":           [("log", "student", "4"), ("weights", "student", "8", "--lora 4")],
    "lora_alpha":     [("log", "student", "8", "--lora 4")],
    "lora_targets":   [("log", "student", "attention", "--lora 4")],
    "teacher_lora":   [("log", "teacher", "4", "--base t.safetensors --qk-norm")],
    "steps":          [("log", "student", "4")],
    "batch":          [("log", "student", "6")],
    "micro_batch":    [("log", "student", "2")],
    "lr":             [("weights", "student", "1e-4")],
    "heads_lr":       [("log", "student", "1e-1")],
    "beta1":          [("weights", "student", "0.9")],
    "beta2":          [("weights", "student", "0.5")],
    "warmup":         [("weights", "teacher", "9"), ("weights", "student", "9")],
    "decay":          [("weights", "student", "1")],
    "clip":           [("weights", "teacher", "1e-7"), ("weights", "student", "1e-7")],
    "ema":            [("weights", "student", "0.5")],
    "sampler":        [("log", "student", "renoise", "--eval-every 3")],
    "levels":         [("log", "student", "1,.9,.8,.7"),
                       ("log", "student", "1,.5,.4,.3", "--eval-every 3 --probs 1,0,0,0")],
    "probs":          [("log", "student", "0,0,0,1")],
    "easy_steps":     [("log", "student", "9")],
    "shift":          [("log", "student", "3"), ("shards", "data", "3")],
    "d_mean":         [("log", "student", "1")],
    "d_std":          [("log", "student", "0.1")],
    "taps":           [("weights", "student", "1")],
    "head_width":     [("weights", "student", "32")],
    "heads_steps":    [("log", "student", "2")],
    "heads_first":    [("log", "student", "2")],
    "misaligned":     [("log", "student", "0")],
    "task":           [("weights", "teacher", "edit"), ("weights", "teacher", "inpaint")],
    "base":           [("weights", "teacher", "t.safetensors")],
    "image_dropout":  [("weights", "teacher", "0.9", "--task edit --text-dropout .95")],
    "image_guidance": [("shards", "data", "2", EDIT),
                       ("log", "student", "2", f"{EDIT} --data= --data-from world --objective lcm")],
    "data_from":      [("log", "student", "world", "--data=")],
    "objective":      [("log", "student", "lcm")],
    "lcm_steps":      [("log", "student", "4", "--objective lcm")],
    "teacher_fp8":    [("log", "student", "on", "--precision bf16")],
    "r1_weight":      [("log", "student", "1"), ("weights", "student", "2", "--r1-weight 1")],
    "distill_weight": [("log", "student", "1"), ("weights", "student", "2", "--distill-weight 1")],
    "eval_n":         [("log", "student", "16", "--eval-every 3")],
    "eval_every":     [("log", "student", "3")],
    "grid_every":     [("files", "student", "3")],
    "log_every":      [("log", "student", "2")],
    "save_every":     [("files", "teacher", "1"), ("files", "student", "1")],
    "stop_after":     [("said", "teacher", "1"), ("files", "student", "2")],
    "overfit_one_batch": [("log", "teacher", "on"), ("log", "student", "on")],
}


@pytest.mark.parametrize("name, case", [(name, case) for name, cases in CASES.items() for case in cases],
                         ids=[f"{name}-{case[1]}" for name, cases in CASES.items() for case in cases])
def test_liveness(home, name, case):
    what, stage, value, extra = *case, *[""] * (4 - len(case))
    one, two = (observed(home, stage, flags)[what] for flags in (extra, f"{extra} {flag_of(name)}={value}"))
    assert one and two and one != two, f"{flag_of(name)} {value}: {what} of the {stage} stay as they are"


def test_preset_decides_the_sizes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    counts = {}
    for preset in PRESETS:
        config = parse_config(["--dry-run", "--preset", preset], "tiny")
        with torch.device("meta"):
            model = MMDiT(teacher_config(config), kernels.load("torch"))
        counts[preset] = sum(p.numel() for p in model.parameters())
    tiny = counts.pop("tiny")
    assert 1e6 < tiny < 1e7 < 5e7 < counts.pop("shapes") < 3e8
    more = [counts.pop(f"tiny-{task}") - tiny for task in ("edit", "inpaint")]
    assert counts.pop("tiny-lora") == counts.pop("tiny-lcm") == tiny
    assert more == [16 * 4 * 128, 17 * 4 * 128]                 # channels beside the latent, to 2 x 2 patches
    assert counts == {"sd3-medium": 2_028_328_000, "sd3.5-medium": 2_243_171_520,
                      "sd3.5-large": 8_056_627_520}
    train.main("--dry-run --preset sd3-medium --depth 2 --taps 0,1 --tflops 400".split())
    said = capsys.readouterr().out
    for pattern in ("on one device", "on each of 8 GPUs", r"at 400\.00 TFLOP/s \(given\)", "h +data",
                    "h +distill", "16,384 latents to generate", "GiB +text", r"bytes: [\d.e+]+ kept",
                    r"FLOPs: [\d.e+]+ a LADD"):
        assert re.search(pattern, said), pattern
    assert not list(tmp_path.iterdir())


def test_tflops_decide_the_hours(capsys):
    hours = []
    for rate in ("100", "200", "0"):
        train.main(f"--dry-run --preset tiny --depth 1 --taps 0 --tflops {rate}".split())
        hours.append(float(re.search(r"([\d.]+) h +teacher", capsys.readouterr().out)[1]))
    assert hours[2] > 10 * hours[0] >= 0 and hours[0] >= hours[1]                # this machine is slower


def test_text_of_real_prompts_decides_sizes_and_costs(capsys):
    said = []
    for flags in ("", "--pooled-dim 1024", "--t5-tokens 77"):
        train.main(f"--dry-run --preset sd3-medium --depth 1 --taps 0 --width 64 --tflops 1 {flags}".split())
        said.append([re.search(p, text)[0] for text in [capsys.readouterr().out]
                     for p in ("parameters: .*", "FLOPs: .*")])
    assert said[0][0] != said[1][0] and said[0][0] == said[2][0] and said[0][1] != said[2][1]


def test_name_decides_the_folder(home):
    main(home, f"--name mine {STAGES['teacher']}")
    main(home, f"--name= {STAGES['teacher']}")
    assert (home / "runs/mine/config.json").exists() and (home / "runs/tiny/config.json").exists()


def test_device_cuda_is_refused_where_there_is_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with refused("--device", "found cuda", "accepted is cpu or auto"):
        train.main(["--device", "cuda"])
    assert not list(tmp_path.iterdir())
    assert train.pick_device("cpu").type == train.pick_device("auto").type == "cpu"


def test_kernels_are_those_asked_for(home):
    for name, loaded in (("auto", "torch"), ("torch", "torch")):                 # of the CPU, as TINY says
        with mock.patch.object(kernels, "load", wraps=kernels.load) as load:
            main(home, f"--name kernels-{name} --kernels {name} --stop-after 1 {STAGES['student']}")
        assert load.call_count >= 2 and {call.args for call in load.call_args_list} == {(loaded,)}
    with mock.patch.object(kernels, "load", return_value=kernels.load("torch")) as load:
        main(home, f"--name kernels-triton --kernels triton --stop-after 1 {STAGES['student']}")
    assert {call.args for call in load.call_args_list} == {("triton",)}


def test_compile_compiles_each_block_of_each_network(home):
    """On the CPU, where auto is off: teacher, student, average, the one that draws; two blocks each."""
    for value, calls in (("on", 4 * 2), ("off", 0), ("auto", 0)):
        with mock.patch.object(torch.nn.Module, "compile") as compiled:
            main(home, f"--name compile-{value} --compile {value} --stop-after 1 {STAGES['student']}")
        assert [call.kwargs for call in compiled.call_args_list] == calls * [{"fullgraph": True}]


def test_n_is_the_number_of_images_of_a_row(home, monkeypatch):
    reports = []
    monkeypatch.setattr(evaluate.report, "write_report", lambda run, sheet, report: reports.append(report))
    for n in (12, 14):
        main(home, f"--name n{n} --n {n} {STAGES['student']} --eval-every 3 --grid-every 0", report=True)
    assert [r["n"] for r in reports] == [12, 14] and reports[0]["floor"]["fd"] != reports[1]["floor"]["fd"]


def test_eval_batch_bounds_what_is_sampled_at_once(home):
    for size, most in ((2, 2), (5, 4)):           # of 6 a size (two batches of 3), and 4 a size in a grid
        with mock.patch.object(evaluate, "sample", wraps=evaluate.sample) as sample:
            main(home, f"--name b{size} --eval-batch {size} {STAGES['student']} --eval-every 3")
        assert max(len(call.args[1]) for call in sample.call_args_list) == most


ELSEWHERE = {"preset": test_preset_decides_the_sizes, "tflops": test_tflops_decide_the_hours,
             "pooled_dim": test_text_of_real_prompts_decides_sizes_and_costs,
             "t5_tokens": test_text_of_real_prompts_decides_sizes_and_costs,
             "bench_steps": "tests/test_speed.py",
             **dict.fromkeys(("parallel", "replicas", "shard_teacher", "checkpoint", "timeout"),
                             "tests/test_torchrun.py"),
             **dict.fromkeys(("encoders", "prompts", "eval_prompts", "t5", "pairs"), "tests/test_real.py"),
             "name": test_name_decides_the_folder,
             "device": test_device_cuda_is_refused_where_there_is_none,
             "kernels": test_kernels_are_those_asked_for,
             "compile": test_compile_compiles_each_block_of_each_network,
             "n": test_n_is_the_number_of_images_of_a_row,
             "eval_batch": test_eval_batch_bounds_what_is_sampled_at_once,
             "dry_run": test_train.test_dry_run_prints_what_a_run_takes_and_writes_nothing,
             "profile": test_train.test_profile_writes_a_trace_of_the_last_steps}


def test_every_field_is_shown_to_be_live():
    """A field without a live effect has no place in Config; a new one needs a case above."""
    assert CASES.keys() | ELSEWHERE.keys() == FIELDS.keys() and not CASES.keys() & ELSEWHERE.keys()
