"""The command line: what it takes, what it refuses, how it says so; every field of Config does
something."""
import json
import math
import re
import resource
import subprocess
import sys
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
import test_train
import torch
from test_train import QUIET, ROOT, log_of, main, refused, save_teacher

import kernels
import train
from ladd.config import (MAIN, MORE, PRESET, PRESETS, PROCESS_FIELDS, Config, check_same,
                         from_json, parse_config, to_json, validated)
from ladd.core import sampler
from ladd.core.losses import LaddConfig
from ladd.core.mmdit import MMDiT, MMDiTConfig
from ladd.core.sampler import Recipe
from ladd.data.files import read_tensors
from ladd.engine.run import pick_device
from ladd.engine.step import Optim
from ladd.report import evaluate, sheets
from ladd.toy import edits
from ladd.toy.scenes import ToyConfig

FIELDS = {f.name: f for f in fields(Config)}
NUMBERS = [name for name, f in FIELDS.items() if f.type in (int, float) and
           not f.metadata["choices"]]
SHOWN = {show: [name for name, f in FIELDS.items() if f.metadata["show"] == show]
         for show in (MAIN, MORE, PRESET)}


def flag_of(name: str) -> str:
    """How messages write an option."""
    return f"--set {name}" if name in SHOWN[PRESET] else "--" + name.replace("_", "-")


def given(name: str, value: str) -> str:
    """How a command line gives an option; two words where --set does it."""
    return f"{flag_of(name)}={value}"


# parsing

@pytest.mark.parametrize("preset", PRESETS)
def test_presets_parse_and_a_flag_overrides_them(preset):
    dry = ["--dry-run"] * preset.startswith("sd3")                # else they want files
    config = parse_config(["--preset", preset, "--seed", "7", *dry])
    assert config == replace(Config(), **PRESETS[preset], preset=preset, seed=7, dry_run=bool(dry))
    assert parse_config(["--preset", preset, *dry]) == replace(config, seed=0)
    assert config.folder == Path("runs") / preset
    named = parse_config(["--preset", preset, "--name", "mine", *dry])
    assert named.folder == Path("runs/mine")
    changed = parse_config(["--preset", preset, "--set", "width=192", *dry])
    assert changed.width == 192 and replace(changed, width=config.width, seed=7) == config


def test_without_a_preset_it_is_tiny():
    assert parse_config([]) == Config() == parse_config(["--preset", "tiny"])


def test_presets_differ_and_name_only_fields():
    assert len({json.dumps(values, sort_keys=True) for values in PRESETS.values()}) == len(PRESETS)
    assert all(set(values) <= set(FIELDS) for values in PRESETS.values())


def test_json_round_trip():
    flags = "--lr 1e-5 --taps 0,2 --sizes 32x64 --set qk_norm=on --teacher-fp8"
    config = parse_config(flags.split())
    stored = json.loads(to_json(config))
    back = Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in stored.items()})
    assert back == config and list(stored) == list(FIELDS)
    assert stored["taps"] == [0, 2] and stored["qk_norm"] is stored["teacher_fp8"] is True
    check_same(config, stored)


def test_check_same_names_the_first_flag_that_differs():
    stored = json.loads(to_json(Config()))
    with refused(rf"^runs/tiny: made with --teacher-lr {Config().teacher_lr} \(got 0.5\); "
                 "[^;]*another --name$"):
        check_same(replace(Config(), teacher_lr=0.5, lr=0.5, eval_n=7), stored)
    with refused(r"made with --set eval_n 256 \(got 7\); "):
        check_same(replace(Config(), eval_n=7), stored)
    # a number that was edited into a string must not read as if it were equal
    with refused(r"made with --heads-repeats '4' \(got 4\); "):
        check_same(Config(), {**stored, "heads_repeats": "4"})
    with refused(r"--taps None \(got"):                           # written by an older version
        check_same(Config(), {k: v for k, v in stored.items() if k != "taps"})
    # may differ when a run resumes
    for name in PROCESS_FIELDS:
        check_same(replace(Config(), **{name: "x"}), stored)
    for name in set(FIELDS) - set(PROCESS_FIELDS):
        with refused(f"{flag_of(name)} "):
            check_same(replace(Config(), **{name: "x"}), stored)


@pytest.mark.parametrize("name, value, kind", [
    ("depth", "6", "a whole number"), ("depth", True, "a whole number"), ("lr", None, "a number"),
    ("levels", 1, "numbers separated by commas"),
    ("levels", [1, "x"], "numbers separated by commas"),
    ("teacher", 5, "text"), ("qk_norm", 1, "on or off"),
    ("sizes", {}, "words separated by commas")])
def test_a_stored_configuration_has_the_types_of_its_fields(name, value, kind):
    stored = json.loads(to_json(Config()))
    assert from_json(stored, Path("c.json")) == Config()
    with refused(f"^c.json: {name} must be {kind} {re.escape(f'(got {value!r})')}$"):
        from_json({**stored, name: value}, Path("c.json"))
    with refused("^c.json: made by another version of train.py"):
        from_json({**stored, "more": 1}, Path("c.json"))


def test_negative_values_are_values():
    for flags in ("--d-mean -1.5 --set teacher_means=-1,0.5",
                  "--set=teacher_means=-1,0.5 --d-mean=-1.5"):
        config = parse_config(flags.split())
        assert config.d_mean == -1.5 and config.teacher_means == (-1, 0.5)


def test_set_changes_the_other_values_and_the_last_one_counts():
    flags = "--set width=192 --lr 1 --set=qk_norm=on --set width=256 --set probs=.4,.4,.1,.1"
    config = parse_config(flags.split())
    assert config == replace(Config(), width=256, qk_norm=True, probs=(.4, .4, .1, .1), lr=1)


def test_every_option_has_one_way_to_be_given():
    """A flag or --set, never both, for the same value."""
    for name, f in FIELDS.items():
        value = ",".join(map(str, f.default)) if isinstance(f.default, tuple) else str(f.default)
        own, other = f"--{name.replace('_', '-')}={value}", f"--set {name}={value}"
        flag = own.split("=")[0]
        message = f"--set must not be used for {name} (got {other[6:]!r}); it has a flag, {flag}"
        if name in SHOWN[PRESET]:
            message = f"{flag} is a value of the preset; use --set {name}=VALUE"
        with refused(f"^{re.escape(message)}$"):
            parse_config((own if name in SHOWN[PRESET] else other).split())


# help

def help_of(flag: str, capsys, monkeypatch) -> str:
    """What `train.py` prints for `flag`, on a terminal of 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as end:
        train.main([flag])
    assert end.value.code == 0
    return capsys.readouterr().out


def flags_in(text: str) -> list[str]:
    """The flags that a help describes, in its order."""
    return re.findall(r"^  (?:-h, )?(--[a-z0-9-]+)", text, re.M)


def words(text: str) -> str:
    """`text` without the line breaks of argparse, which may come after a hyphen."""
    return "".join(text.split())


@pytest.mark.parametrize("flag, shows", [
    ("--help", (MAIN,)), ("-h", (MAIN,)), ("--help-all", (MAIN, MORE))])
def test_help_shows_the_options_in_groups(flag, shows, capsys, monkeypatch):
    text = help_of(flag, capsys, monkeypatch)
    shown = [name for name in FIELDS if any(name in SHOWN[show] for show in shows)]
    everything = MORE in shows
    more = ["--set"] if everything else []
    assert flags_in(text) == ["--help", "--help-all", *more, *map(flag_of, shown)]
    usage = text[:text.index("\n\n")]
    assert set(re.findall(r"--[a-z0-9-]+", usage)) == {"--help-all", *more, *map(flag_of, shown)}

    # each with its meaning, the default of tiny and the accepted values
    for name in shown:
        part = text[re.search(rf"^  {flag_of(name)}\b(?!-)", text, re.M).start():]
        part, meta = words(re.split(r"\n(?:  -|\n)", part)[0]), FIELDS[name].metadata
        assert words(meta["help"]) in part, name
        assert not meta["choices"] or f"{{{','.join(map(str, meta['choices']))}}}" in part, name
        default = FIELDS[name].default
        default = ",".join(map(str, default)) if isinstance(default, tuple) else str(default)
        plain = (FIELDS[name].type is bool or default == "" or "default:" in meta["help"]
                 or name == "preset")                                  # its default is tiny
        assert (f"(tiny:{words(default)})" in part) != plain, name

    # the groups, as they stand in Config, each with options
    titles = ["options", "run", "task and data", "teacher", "student",
              *["discriminator"] * everything, "compute", *["evaluation"] * everything]
    found = re.findall(r"^([a-z ]+):\n(?=  -)", text, re.M)
    assert found == titles
    names = {title: flags_in(text[text.index(f"\n{title}:"):].split("\n\n")[0]) for title in titles}
    assert names["run"] == ["--preset", "--name", "--seed", "--device", "--dry-run"]
    assert names["student"][0] == "--steps" and names["compute"][0] == "--recompute"

    # the examples line by line as they are written
    lines = text.splitlines()
    start = lines.index(train.__doc__.splitlines()[0])
    assert lines[start:start + len(train.__doc__.splitlines())] == train.__doc__.splitlines()


def test_help_has_twenty_options_and_help_all_the_other_flags():
    assert len(SHOWN[MAIN]) == 20 and 50 <= len(SHOWN[MAIN] + SHOWN[MORE]) <= 60
    assert sorted(sum(SHOWN.values(), [])) == sorted(FIELDS)


def test_help_all_lists_the_names_for_set(capsys, monkeypatch):
    text = help_of("--help-all", capsys, monkeypatch)
    assert words(f"preset: {', '.join(SHOWN[PRESET])} run:") in words(text)       # and no others
    assert "--set" not in help_of("--help", capsys, monkeypatch)


def test_help_prints_percent_signs(capsys):
    for flag in ("--help", "--help-all"):
        with pytest.raises(SystemExit):
            parse_config([flag], "what it is 100 %")
        assert "what it is 100 %" in capsys.readouterr().out


# groups

def test_a_group_is_made_by_the_names_of_its_fields():
    class Pair(NamedTuple):
        taps: tuple[int, ...]
        lr: float

    flags = "--lr 1e-5 --taps 0,2 --set r1_weight=3 --sizes 32x64 --task edit"
    config = parse_config(flags.split())
    assert config.group(Pair) == Pair((0, 2), 1e-5)
    for kind, made in ((LaddConfig, config.ladd), (Recipe, config.recipe),
                       (Optim, config.group(Optim)), (ToyConfig, config.group(ToyConfig))):
        assert type(made) is kind
        for name in kind.__annotations__:
            assert getattr(made, name) == getattr(config, name), (kind, name)
    assert config.ladd.r1_weight == 3 and config.recipe.sizes == ("32x64",)

    class Odd(NamedTuple):
        lr: float
        colour: str

    with pytest.raises(AttributeError, match="colour"):
        config.group(Odd)


def test_sizes_of_the_teacher_follow_from_the_options():
    flags = ("--task inpaint --sizes 64x96,96x64 --set dual_blocks=2 --set text_dim=40 "
             "--set qk_norm=on --set predicts=v")
    config = parse_config(flags.split())
    assert config.hw == ((64, 96), (96, 64)) and config.patches == 6
    assert config.model == MMDiTConfig(6, 128, 40, 40, 16 + 17, qk_norm=True, predicts="v",
                                       dual_blocks=(0, 1), pos_grid=6)
    assert replace(config, pooled_dim=8, pos_grid=9, task="text").model == MMDiTConfig(
        6, 128, 40, 8, 16, qk_norm=True, predicts="v", dual_blocks=(0, 1), pos_grid=9)
    assert replace(config, task="edit").model.in_channels == 32
    assert config.teacher_file == Path("runs/tiny/checkpoints/teacher.safetensors")
    assert replace(config, teacher="t").teacher_file == Path("t")


# what is refused: the line names the flag, what was found, and what is accepted

# no batch of each size
BAD = {"--stepz 5": ("'--stepz'", "--steps"), "--heads-learning-rate 1": ("--heads-learning-rate",
                                                                          "--heads"),
       "--lr=1 --taps=0 --quality=9": ("--quality", "--help shows the flags"),
       "steps": ("'steps'", "--steps"), "--preset huge": ("--preset", "'huge'", "tiny, tiny-edit, "
                                                          "tiny-inpaint, tiny-lora, shapes"),
       "--steps many": ("--steps", "'many'", "whole number"),
       "--steps 1.5": ("--steps", "'1.5'", "whole number"),
       "--lr fast": ("--lr", "'fast'", "a number"),
       "--lr nan": ("--lr", "nan", "1e-09 to 1"),
       "--lr inf": ("--lr", "inf", "1e-09 to 1"),
       "--d-mean nan": ("--d-mean", "nan", "-10 to 10"),
       "--d-mean inf": ("--d-mean", "inf", "-10 to 10"),
       "--set teacher_means=0,nan": ("--set teacher_means", "nan", "finite"),
       "--set teacher_means=,": ("--set teacher_means", "at least one value", "got none"),
       "--taps a,b": ("--taps", "'a,b'", "whole numbers separated by commas"),
       "--taps": ("--taps", "expected"), "--set qk_norm=maybe": ("--set qk_norm", "'maybe'",
                                                                 "on or off"),
       "--sizes 64": ("--sizes|size", "'64'", "HxW"),
       "--sizes 60x64": ("--sizes|size", "60x64", "multiples of 16", "64x64"),
       "--sizes 0x64": ("--sizes|size", "0x64", "16x64"),
       "--sizes 32x32,64x64": ("--sizes", r"\[1024, 4096\]", "similar area", "4/3"),
       "--sizes 64x64,64x64": ("--sizes", "64x64", "differ"),
       "--set width=100": ("--set width", "100", "multiple of 64"),
       "--set head_width=24": ("--set head_width", "24", "multiple of 16"), "--teacher-fp8 "
       "--precision fp32": ("--teacher-fp8", "got torch.float32", "bf16"), "--preset tiny-edit "
       "--task text": ("--task must be edit", "got text", "tiny-edit"), "--preset tiny-edit --task "
       "inpaint": ("--task must be edit", "got inpaint", "tiny-edit"),
       "--image-guidance 2": ("--image-guidance requires --task edit", "got text"),
       "--task edit --set stated=.3": ("--set stated must be left out", "--task edit",
                                       "instructions", r"got 0\.3"), "--task edit --image-guidance "
       "2 --set image_dropout=0": ("--set image_dropout must be above 0", "got 0",
                                   "--image-guidance 2"),
       "--preset sd3-medium --steps 0 --dry-run": ("--steps must be at least 1", "got 0",
                                                   "edit and inpaint"), "--micro-batch 32 "
       "--teacher-batch 48": ("--micro-batch", "32", "--teacher-batch, 48"),
       "--steps 0 --teacher t": ("--teacher must be left out with --steps 0", "got t", "--base"),
       "--lora-targets attention": ("--lora-targets requires --lora or --teacher-lora",
                                    "got neither"), "--lora 4 --steps 0": ("--lora must be 0 with "
                                                                           "--steps 0", "got 4"),
       "--lora 4 --lora-targets to_q": ("LoRA targets", "to_q", "joint_blocks", "attn.qkv"),
       "--lora 4 --student-depth 1 --lora-targets joint_blocks.1.*": ("LoRA targets",
                                                                      r"joint_blocks\.1"),
       "--lora 129": ("--lora: LoRA rank", "got 129", "1 to the network's width, 128"),
       "--lora 4 --lora-targets ,": ("--lora-targets", "at least one value"),
       "--teacher-lora 4": ("--teacher-lora requires --base", "got 4"), "--teacher-lora 4 "
       "--teacher t": ("--teacher-lora must be left out with --teacher", "not trained", "got 4"),
       "--micro-batch 3": ("--micro-batch", "got 3", "divide .* --batch, 64"),
       "--taps 1,9": ("--taps", r"\(1, 9\)", "at most 5"),
       "--taps 3,1": ("--taps", r"\(3, 1\)", "ascending"),
       "--taps=-1,2": ("--taps", r"\(-1, 2\)", "ascending"),
       "--set probs=.5,.5": ("--set probs", "got 2", "4 values", "--levels"),
       "--set probs=.7,.1,.1,.2": ("--set probs", r"0\.7, 0\.1, 0\.1, 0\.2", "add up to 1"),
       "--set probs=1.1,-.1,0,0": ("--set probs", r"1\.1, -0\.1", "probabilities"),
       "--levels .9,.75,.5,.25": ("--levels", r"0\.9", "fall from 1"),
       "--levels 1,.5,.75,.25": ("--levels", r"0\.75", "fall"),
       "--levels 1,.75,.5,0": ("--levels", r"0\.0\)", "above 0"),
       "--student-depth 7": ("--student-depth", "got 7", "at most 6, the teacher"),
       "--batch 64 --data-size 32": ("--data-size", "got 32", "at least 256"),
       "--data-size 128": ("--data-size", "got 128", "at least 256"),
       "--set teacher_images=100": ("--set teacher_images", "got 100", "at least 256"),
       "--n 5": (r"--n\b", "got 5", "at least 6"), "--set eval_n=3": ("--set eval_n", "got 3",
                                                                      "at least 6"),
       "--sample-batch 1": ("--sample-batch", "got 1", "at least 2"),
       "--set text_dim=16": ("--set text_dim", "got 16", "23 to 65536"),
       "--set stated=1": ("--set stated", "got 1", r"0 to 0\.95"),
       "--set beta2=1": ("--set beta2", "got 1", r"0 to 0\.9999"),
       "--seed 99999999999999": ("--seed", "got 99999999999999", "0 to"),
       "--seed -1": ("--seed", "got -1", "0 to"), "--set objects=3": ("--set objects", "got 3",
                                                                      "1, 2"),
       "--sampler ddim": ("--sampler", "'ddim'", "euler, renoise"),
       "--device tpu": ("--device", "'tpu'", "auto, cpu, cuda"),
       "--precision fp8": ("--precision", "'fp8'", "auto, fp32, bf16"),
       "--name a/b": ("--name", "'a/b'", "name of a folder"),
       "--name ..": ("--name", r"'\.\.'", "name of a folder"),
       "--guidance .5": ("--guidance", r"0\.5", "1 to 100"),
       "--profile nowhere/trace.json": ("--profile", "got nowhere/trace.json", "existing folder"),
       "--profile .": ("--profile must be a file", "got ."),
       "--teacher no.safetensors": ("--teacher", "no.safetensors", "not exist"),
       "--data nowhere": ("--data", "nowhere", "not exist"),
       "--set dual_blocks=7": ("--set dual_blocks", "got 7", "at most depth, 6"),
       "--set pos_grid=4": ("--set pos_grid", "got 4", "at least 5"),
       "--task video": ("--task", "'video'", "text, edit, inpaint"),
       "--steps -1": ("--steps", "got -1", "at least 0"),
       "--task edit --image-guidance -1": ("--image-guidance", "got -1", "0 to 100"),
       "--task inpaint --set image_dropout=.1": ("--set image_dropout requires --task edit",
                                                 "got inpaint"), "--task edit --set "
       "text_dropout=.02": ("--set image_dropout", r"got 0\.05", r"at most text_dropout, 0\.02"),
       "--task edit --set text_dim=32": ("--set text_dim", "got 32", "at least 33", "--task edit"),
       "--base no.safetensors": ("--base", "no.safetensors", "not exist"),
       "--base b --teacher t": ("--base must be left out with --teacher", "not trained", "got b"),
       "--pairs p": ("--pairs requires --task edit or inpaint", "got text"),
       "--task edit --pairs p": ("--pairs requires --encoders FOLDER", "got none"),
       "--task edit --prompts p": ("--prompts requires --task text", "got edit", "--pairs"),
       "--preset sd3-medium --task inpaint": ("missing: --encoders --teacher --pairs;",
                                              "--dry-run"), "--preset sd3-medium --base b "
       "--dry-run": ("--base must be left out", "whose teacher is loaded", "edit and inpaint",
                     "got b"), "--preset sd3-medium --task edit --teacher t --teacher-lr 1 "
       "--dry-run": ("--teacher-lr must be left out with --teacher", "not trained", r"got 1\.0"),
       "--preset sd3-medium --task edit --encoders e --base nil --pairs p": ("--base", "nil",
                                                                             "not exist"),
       "--preset sd3-medium --task edit --encoders e --teacher . --pairs no": ("--pairs", "no",
                                                                               "not exist"),
       "--prompts p.txt": ("--prompts requires --encoders FOLDER", "got none"),
       "--t5 none": ("--t5 requires --encoders FOLDER", "got none"),
       "--preset sd3-medium": ("missing: --encoders --teacher --prompts;", "--dry-run"),
       "--preset sd3.5-large --encoders e --teacher t --data d":
           ("missing: --eval-prompts;", "--dry-run"),
       "--preset sd3-medium --dry-run --teacher-steps 5": ("--teacher-steps must be left out",
                                                           "whose teacher is loaded",
                                                           "edit and inpaint", "got 5"),
       "--encoders nowhere --teacher t --prompts p --set objects=2": ("--set objects must be left "
                                                                      "out with real images",
                                                                      "toy dataset", "got 2"),
       "--encoders nowhere --teacher nowhere --prompts p": ("--teacher", "nowhere", "not exist"),
       "--sizes ,": ("--sizes", "at least one value", "got none"), "--teacher-lora 4 "
       "--lora-targets attention": ("--teacher-lora requires --base", "got 4"),
       "--shard ddp": ("--shard", "'ddp'", "auto, none, student, all"),
       "--shard none --replicas 2": ("--replicas must be 1 with --shard none", "got 2"),
       "--recompute on": ("--recompute", "'on'", "none, selective, full"), "--preset sd3-medium "
       "--dry-run --data toy": ("--data must be a folder", "got toy"),
       "--set": ("--set", "expected"), "--set width": ("--set must be NAME=VALUE", "'width'",
                                                       "--help-all"), "--set =3": ("--set must be "
                                                                                   "NAME=VALUE",
                                                                                   "'=3'",
                                                                                   "--help-all"),
       "--set widht=128": ("--set must be NAME=VALUE", "'widht=128'", "--help-all"),
       "--set lr=1": (r"^--set must not be used for lr \(got 'lr=1'\); it has a flag, --lr$",),
       "--set d_mean=1": ("^--set must not be used for d_mean", "'d_mean=1'",
                          "has a flag, --d-mean$"), "--set head-width=32": ("--set must be "
                                                                            "NAME=VALUE",
                                                                            "'head-width=32'",
                                                                            "--help-all"),
       "--width 128": ("^--width is a value of the preset; use --set width=VALUE$",),
       "--head-width=32": ("^--head-width is a value of the preset; use --set head_width=VALUE$",),
       "--lr --width 128": ("^--width is a value of the preset; use --set width=VALUE$",),
       "--set width=wide": ("--set width must be a whole number", "'wide'"),
       "--set objects=": ("--set objects must be a whole number", "''"),
       "--set beta2=fast": ("--set beta2 must be a number", "'fast'"),
       "--set probs=1,x": ("--set probs must be numbers separated by commas", "'1,x'"),
       "--set predicts=eps": ("--set predicts must be one of v, x0", "'eps'"),
       "--set warmup=-1": ("--set warmup must be at least 0", "got -1"),}


@pytest.mark.parametrize("line", BAD)
def test_bad_input_is_refused_in_one_line_and_nothing_is_made(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "open_run", lambda config: pytest.fail(f"{line} is accepted"))
    with refused(*BAD[line]):
        train.main(["--preset", "tiny", *line.split()] if "--preset" not in line else line.split())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", NUMBERS)
def test_bounds(name):
    """Beyond each bound: refused, with flag, value and range. Infinity and NaN are no numbers
    here."""
    f = FIELDS[name]
    step, no_numbers = (1, []) if f.type is int else (1e-3, [math.nan, math.inf, -math.inf])
    low, high = f.metadata["low"], f.metadata["high"]
    beyond = [v for v in (low - step, high + step) if math.isfinite(v)]
    accepted = f"at least {low:g}" if high == math.inf else re.escape(f"{low:g} to {high:.10g}")
    for value in beyond + no_numbers + [10 ** 9 + 1] * (f.type is int):
        if value == 10 ** 9 + 1 and high == math.inf:
            accepted = f"{low:g} to 1000000000"
        elif value == 10 ** 9 + 1 and high > value:
            continue
        with refused(f"^{flag_of(name)} must be {accepted} ", re.escape(f"(got {value})")):
            validated(replace(Config(), **{name: value}))


def test_the_script_prints_one_line_and_ends_with_code_2(tmp_path):
    """A process of its own; what else is refused, main is called with in this one."""
    # the clock's would fail this for what others run
    def processor_seconds() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    before = processor_seconds()
    command = [sys.executable, str(ROOT / "train.py"), "--micro-batch", "3"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout and not list(tmp_path.iterdir())
    assert re.fullmatch(r"train\.py: .*--micro-batch.*\n", done.stderr)
    assert processor_seconds() - before < 5


def test_the_narrowest_text_of_instructions_has_a_direction_for_each_word():
    """What --set text_dim=32 is refused for."""
    _, words = edits.embed(edits.WORDS, 8, 33)
    assert (words @ words.T / 33 - torch.eye(len(words))).abs().max() < .1


# liveness: for each field, another value changes what a run computes, writes or prints

# the least that shows a field: two steps of a teacher; shards of a random one; three steps of a
# student
STAGES = {"teacher": "--set stop_after=2 --teacher-steps 4 --taps 0",
          "data": "--teacher t.safetensors --set stop_after=1",
          "student": "--teacher t.safetensors --data latents --steps 3 --set heads_first=1 --set "
          "log_every=1"}


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
    """What a run leaves, but for config.json and the clock: log, files, the sum of squares of each
    tensor."""
    run = home / "runs" / f"run{len(list((home / 'runs').iterdir()))}"
    printed = main(home, f"--name {run.name} {QUIET} {STAGES[stage]} {flags}")
    files = {str(path.relative_to(run)): path for path in sorted(run.rglob("*")) if path.is_file()}
    tensors = {name: {k: t.double().square().sum().item() for k, t in read_tensors(path)[0].items()}
               for name, path in files.items() if path.suffix == ".safetensors"}
    return {"log": log_of(run), "files": list(files), "said": printed.replace(run.name, ""),
            "weights": {name: sums for name, sums in tensors.items()
                        if name.startswith("checkpoints")},
            "shards": {name: sums for name, sums in tensors.items() if name.startswith("data/0")}}


EDIT = "--task edit --teacher edit.safetensors"
# field: (what changes, in which stage, with which value, beside which other flags), ...
CASES = {"seed": [("log", "teacher", "1"), ("shards", "data", "1"), ("log", "student", "1")],
         "precision": [("log", "teacher", "bf16"), ("shards", "data", "bf16"),
                       ("log", "student", "bf16")],
         "objects": [("log", "teacher", "2", "--sizes 48x48"),
                     ("shards", "data", "2", "--sizes 48x48")],
         "sizes": [("log", "teacher", "48x48"), ("files", "data", "48x48")],
         "stated": [("weights", "teacher", "0.2"), ("shards", "data", "0.2")],
         "text_dim": [("weights", "teacher", "32")],
         "teacher": [("shards", "data", "other.safetensors"),
                     ("log", "student", "other.safetensors"), ("files", "data", "")],
         "depth": [("weights", "teacher", "1")], "width": [("weights", "teacher", "128")],
         "qk_norm": [("weights", "teacher", "on")], "dual_blocks": [("weights", "teacher", "1")],
         "pos_grid": [("weights", "teacher", "9")], "predicts": [("weights", "teacher", "v")],
         "teacher_images": [("log", "teacher", "64")],
         "teacher_steps": [("weights", "teacher", "8")], "teacher_batch": [("log", "teacher", "6")],
         "teacher_lr": [("weights", "teacher", "1e-3")],
         "teacher_means": [("log", "teacher", "0,2")],
         "text_dropout": [("weights", "teacher", "0.9")],
         "data": [("log", "student", "latents2"), ("log", "student", "toy"),
                  ("files", "student", "")], "data_size": [("shards", "data", "144")],
         "shard_size": [("shards", "data", "48")], "guidance": [("shards", "data", "1")],
         "sample_steps": [("shards", "data", "4")], "student_depth": [("weights", "student", "1")],
         "lora": [("log", "student", "4"), ("weights", "student", "8", "--lora 4")],
         "lora_targets": [("log", "student", "attention", "--lora 4")],
         "teacher_lora": [("log", "teacher", "4", "--base t.safetensors --set qk_norm=on")],
         "steps": [("log", "student", "4")], "batch": [("log", "student", "6")],
         "micro_batch": [("log", "student", "2")], "lr": [("weights", "student", "1e-4")],
         "heads_lr": [("log", "student", "1e-1")], "beta2": [("weights", "student", "0.5")],
         "warmup": [("weights", "teacher", "9"), ("weights", "student", "9")],
         "ema": [("weights", "student", "0.5")], "sampler": [("log", "student", "renoise",
                                                              "--eval-every 3")],
         "levels": [("log", "student", "1,.9,.8,.7"),
                    ("log", "student", "1,.5,.4,.3", "--eval-every 3 --set probs=.97,.01,.01,.01")],
         "probs": [("log", "student", ".1,.1,.1,.7")], "easy_steps": [("log", "student", "2")],
         "shift": [("log", "student", "3"), ("shards", "data", "3")],
         "d_mean": [("log", "student", "1")], "taps": [("weights", "student", "1")],
         "head_width": [("weights", "student", "32")], "heads_repeats": [("log", "student", "2")],
         "heads_first": [("log", "student", "2")], "mismatched": [("log", "student", "0")],
         "task": [("weights", "teacher", "edit"), ("weights", "teacher", "inpaint")],
         "base": [("weights", "teacher", "t.safetensors")],
         "image_dropout": [("weights", "teacher", "0.9", "--task edit --set text_dropout=.95")],
         "image_guidance": [("shards", "data", "2", EDIT)],
         "teacher_fp8": [("log", "student", "on", "--precision bf16")],
         "r1_weight": [("log", "student", "1"), ("weights", "student", "2", "--set r1_weight=1")],
         "distill_weight": [("log", "student", "1"),
                            ("weights", "student", "2", "--set distill_weight=1")],
         "eval_n": [("log", "student", "16", "--eval-every 3")],
         "eval_every": [("log", "student", "3"), ("files", "student", "3")],
         "log_every": [("log", "student", "2")],
         "save_every": [("files", "teacher", "1"), ("files", "student", "1")],
         "stop_after": [("said", "teacher", "1"), ("files", "student", "2")],}


@pytest.mark.parametrize("name, case", [(name, case) for name, cases in CASES.items() for case
                                        in cases], ids=[f"{name}-{case[1]}" for name, cases
                                                        in CASES.items() for case in cases])
def test_liveness(home, name, case):
    what, stage, value, extra = *case, *[""] * (4 - len(case))
    one, two = (observed(home, stage, flags)[what]
                for flags in (extra, f"{extra} {given(name, value)}"))
    assert one and two and one != two, (
        f"{flag_of(name)} {value}: {what} of the {stage} stay as they are")


def test_zero_steps_need_no_data():
    assert parse_config("--steps 0 --data-size 1".split()).steps == 0


def test_preset_decides_the_sizes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    counts = {}
    for preset in PRESETS:
        config = parse_config(["--dry-run", "--preset", preset])
        with torch.device("meta"):
            model = MMDiT(config.model, kernels.load("torch"))
        counts[preset] = sum(p.numel() for p in model.parameters())
    tiny = counts.pop("tiny")
    assert 1e6 < tiny < 1e7 < 5e7 < counts.pop("shapes") < 3e8
    more = [counts.pop(f"tiny-{task}") - tiny for task in ("edit", "inpaint")]
    assert counts.pop("tiny-lora") == tiny
    # channels beside the latent, to 2 x 2 patches
    assert more == [16 * 4 * 128, 17 * 4 * 128]
    assert counts == {"sd3-medium": 2_028_328_000, "sd3.5-medium": 2_243_171_520,
                      "sd3.5-large": 8_056_627_520}
    train.main("--dry-run --preset sd3-medium --set depth=2 --taps 0,1 --tflops 400".split())
    said = capsys.readouterr().out
    for pattern in ("on one device", "on each of 8 GPUs", r"at 400\.00 TFLOP/s \(given\)",
                    "h +data", "h +distill", "16,384 latents to generate", "GiB +text",
                    "GiB +activations", r"FLOPs: [\d.e+]+ per LADD"):
        assert re.search(pattern, said), pattern
    assert not list(tmp_path.iterdir())


def test_tflops_decide_the_hours(capsys):
    hours = []
    for rate in ("100", "200", "0"):
        train.main(f"--dry-run --preset tiny --set depth=1 --taps 0 --tflops {rate}".split())
        hours.append(float(re.search(r"([\d.]+) h +teacher", capsys.readouterr().out)[1]))
    # this machine is slower
    assert hours[2] > 10 * hours[0] >= 0 and hours[0] >= hours[1]


def test_text_of_real_prompts_decides_sizes_and_costs(capsys):
    said = []
    for flags in ("", "--set pooled_dim=1024", "--t5-tokens 77"):
        train.main("--dry-run --preset sd3-medium --set depth=1 --taps 0 --set width=64 --tflops 1 "
                   f"{flags}".split())
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
    with refused("--device", "cuda", "cpu or auto"):
        train.main(["--device", "cuda"])
    assert not list(tmp_path.iterdir())
    assert pick_device("cpu").type == pick_device("auto").type == "cpu"


def test_kernels_are_those_asked_for(home):
    # of the CPU, as TINY says
    for name, loaded in (("auto", "torch"), ("torch", "torch")):
        with mock.patch.object(kernels, "load", wraps=kernels.load) as load:
            main(home, f"--name kernels-{name} --kernels {name} --set stop_after=1 "
                 f"{STAGES['student']}")
        assert load.called and {call.args for call in load.call_args_list} == {(loaded,)}
    # the others are asked for too, by networks on the meta device, which compute nothing
    plain, calls = kernels.load("torch"), {"triton": 0, "torch": 0}

    def counted(name: str) -> kernels.Kernels:
        def modulate(*args):
            calls[name] += 1
            return plain.modulate(*args)
        return plain._replace(modulate=modulate)

    with mock.patch.object(kernels, "load", side_effect=counted):
        main(home, f"--name kernels-triton --kernels triton --set stop_after=1 {STAGES['student']}")
    assert calls["triton"] and not calls["torch"]


@pytest.mark.parametrize("compiler", ["/none/such", "false"])
def test_compile_without_a_compiler_that_runs_is_refused(home, monkeypatch, compiler):
    monkeypatch.setenv("CXX", compiler)
    with refused("--compile must be off", f"CXX names one .got '{compiler}'"):
        main(home, "--name broken --compile on")
    assert not (home / "runs" / "broken").exists()


def test_compile_compiles_each_block_of_each_network(home):
    """On the CPU, where auto is off: teacher, student, average, the one that draws; two blocks
    each."""
    for value, calls in (("on", 4 * 2), ("off", 0), ("auto", 0)):
        with mock.patch.object(torch.nn.Module, "compile") as compiled:
            main(home, f"--name compile-{value} --compile {value} --set stop_after=1 "
                 f"{STAGES['student']}")
        assert [call.kwargs for call in compiled.call_args_list] == calls * [{"fullgraph": True}]


def test_n_is_the_number_of_images_of_a_row(home, monkeypatch):
    reports = []
    monkeypatch.setattr(sheets, "save_report", lambda path, report: reports.append(report))
    monkeypatch.setattr(sheets, "plot_report", lambda *args: None)
    for n in (12, 14):
        main(home, f"--name n{n} --n {n} {STAGES['student']} --eval-every 3", report=True)
    assert [r["n"] for r in reports] == [12,
                                         14] and reports[
                                             0]["floor"]["fd"] != reports[1]["floor"]["fd"]


def test_sample_batch_bounds_what_is_sampled_at_once(home):
    # of 6 a size (two batches of 3), and 4 a size in a grid
    for size, most in ((2, 2), (5, 4)):
        with mock.patch.object(evaluate, "sample", wraps=sampler.sample) as sample:
            main(home, f"--name b{size} --sample-batch {size} {STAGES['student']} --eval-every 3")
        assert max(len(call.args[1]) for call in sample.call_args_list) == most


ELSEWHERE = {"preset": test_preset_decides_the_sizes, "tflops": test_tflops_decide_the_hours,
             "pooled_dim": test_text_of_real_prompts_decides_sizes_and_costs,
             "t5_tokens": test_text_of_real_prompts_decides_sizes_and_costs,
             "bench_steps": "tests/test_speed.py",
             **dict.fromkeys(("shard", "replicas", "recompute", "timeout", "tensorboard"),
                             "tests/test_torchrun.py"),
             **dict.fromkeys(("encoders", "prompts", "eval_prompts", "t5", "pairs"),
                             "tests/test_real.py"), "name": test_name_decides_the_folder,
             "device": test_device_cuda_is_refused_where_there_is_none,
             "kernels": test_kernels_are_those_asked_for,
             "compile": test_compile_compiles_each_block_of_each_network,
             "n": test_n_is_the_number_of_images_of_a_row,
             "sample_batch": test_sample_batch_bounds_what_is_sampled_at_once,
             "dry_run": test_train.test_dry_run_prints_what_a_run_takes_and_writes_nothing,
             "profile": test_train.test_profile_writes_a_trace_of_the_last_steps}


def test_every_field_is_shown_to_be_live():
    """A field without a live effect has no place in Config; a new one needs a case above."""
    assert CASES.keys() | ELSEWHERE.keys() == FIELDS.keys() and not CASES.keys() & ELSEWHERE.keys()
