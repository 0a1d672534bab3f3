"""Editing and inpainting through train.py: prompts, grades of results, whole runs, a teacher's
start."""
import json
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import assert_close, rng
from test_report import check_report
from test_train import TINY, assert_same, log_of, main, refused, save_teacher, stamps, weights

import train
from ladd.build import toy_of
from ladd.config import parse_config
from ladd.core.mmdit import Text, image_channels
from ladd.core.sampler import UNGUIDED, image_noise, sample
from ladd.data import masks, shards
from ladd.data.prompts import held_out
from ladd.data.shards import Latents
from ladd.report import evaluate, sheets
from ladd.report.evaluate import Row, decoded, grade_prompts
from ladd.report.compare import sources
from ladd.sd3 import checkpoint
from ladd.toy import edits, grader
from ladd.toy.prompts import codes_of, draw_prompts, toy_codec, toy_latents, toy_plan
from ladd.toy.scenes import decode, encode
from ladd.toy.scenes import render as pictures

EDIT, INPAINT, PLAIN = (toy_of(parse_config(["--task", task])) for task
                        in ("edit", "inpaint", "text"))
FLAGS = {"edit": "--task edit --image-guidance 1.5 --set text_dropout=.4 --set image_dropout=.2 ",
         "inpaint": "--task inpaint "}
FLAGS = {task: flags + "--n 8 --set eval_n=6 --eval-every 4" for task, flags in FLAGS.items()}
each_task = pytest.mark.parametrize("task", ["edit", pytest.param("inpaint",
                                                                  marks=pytest.mark.slow)])
# what reads the image, behind the latent's 16 channels
READS = "x_embedder.proj.weight"
render = lambda scenes, hw: encode(pictures(scenes, hw))


def same(a, b) -> bool:
    """Whether two nested tuples are equal, tensors bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    return len(a) == len(b) and all(map(same, a, b)) if isinstance(a, tuple | list) else a == b


# prompts

def test_prompts_to_edit_are_pairs_with_their_sources():
    parts = draw_prompts(EDIT, 9, 5)
    assert [len(p.captions) for p in parts] == [5, 4] and same(parts, draw_prompts(EDIT, 9, 5))
    assert parts[0].captions != draw_prompts(EDIT, 9, 6)[0].captions
    for p in parts:
        assert torch.equal(p.image, render(p.graded.source, p.hw)) and p.mask is None
        assert torch.equal(p.latents, render(p.graded.target, p.hw))
        assert p.captions == p.graded.texts
        said = [edits.parse_instruction(text, 1) for text in p.captions]
        assert p.codes.tolist() == [[edits.KINDS.index(i.kind), *i.asked] for i in said]
        assert not torch.equal(p.image, p.latents) and p.latents.shape[2:] == (p.hw[0] // 8,
                                                                               p.hw[1] // 8)


def test_prompts_to_inpaint_are_scenes_without_what_their_masks_cover():
    parts, plain = draw_prompts(INPAINT, 9, 5), draw_prompts(PLAIN, 9, 5)
    assert same(parts, draw_prompts(INPAINT, 9, 5))
    assert not torch.equal(parts[0].mask, draw_prompts(INPAINT, 9, 6)[0].mask)
    for p, q in zip(parts, plain):
        # the world's own
        assert torch.equal(p.latents, q.latents) and p.captions == q.captions
        assert torch.equal(p.latents, render(p.graded, p.hw))
        cells = p.mask.unflatten(2, (-1, 8)).unflatten(1, (-1, 8)).any(4).any(2)
        assert torch.equal(p.image[:, 0], cells.float()) and cells.flatten(1).any(1).all()
        unseen = encode(pictures(p.graded, p.hw).masked_fill(p.mask[:, None], 0))
        assert torch.equal(p.image[:, 1:], torch.where(cells[:, None], 0, unseen))
        assert p.image.shape[1] == 17 and ((p.codes < 0) | (p.codes == p.graded.attributes)).all()


@pytest.mark.parametrize("toy", [EDIT, INPAINT], ids=["edit", "inpaint"])
def test_renders_to_train_on_keep_prompt_picture_and_image_together(toy):
    """By the sample's own words: its codes, its text, and the image it was drawn with."""
    latents, parts = toy_latents(toy, 60, 3), draw_prompts(toy, 60, 3)
    plan = toy_plan(toy, 96, 24, 2)
    drawn = draw_prompts(toy, 96, 3)
    codec = toy_codec(toy)
    assert latents.channels == image_channels(toy.task) == {"edit": 16, "inpaint": 17}[toy.task]
    for p in parts:
        hw = tuple(p.latents.shape[2:])
        b = latents.gather(hw, torch.arange(len(p.captions)))
        assert torch.equal(b.x0, p.latents) and torch.equal(b.text.image, p.image)
        assert same(b.text[:2], codec.text(p.captions)[:2])
        assert torch.equal(latents.codes[latents.buckets[hw][1]], p.codes)
    for i, shard in enumerate(plan.shards):
        p, rows = drawn[i % 2], slice(24 * (i // 2), 24 * (i // 2 + 1))
        assert [plan.prompts[k] for k in shard.prompt_id] == p.captions[rows]
        assert torch.equal(shard.image(), p.image[rows])
        assert torch.equal(plan.codes[shard.prompt_id], p.codes[rows])
    assert len(plan.shards) == 4


@pytest.mark.parametrize("one, other, exclude", [("make it red", "make it blue", True),
                                                 ("make it red", "make the large circle red",
                                                  False), ("make it red", "move it left", True),
                                                 ("make it red", "make the background black", True),
                                                 ("remove it", "remove the red circle", False),
                                                 ("add a red circle", "add a shape", False),
                                                 ("add a red circle", "add a large circle", False),
                                                 ("add a red circle", "add a blue circle", True),
                                                 ("add a circle left", "add a circle right", True),
                                                 ("turn it into a cross", "make it small", True)])
def test_instructions_exclude_each_other_where_kind_or_what_both_ask_differs(one, other, exclude):
    codes = codes_of(EDIT, [one, other])
    assert shards.mismatched_captions(codes, torch.tensor([0, 1]), rng())[1].tolist() == [exclude,
                                                                                          exclude]


@pytest.mark.parametrize("objects", [1, 2])
def test_misfits_of_instructions_ask_for_something_else(objects):
    texts = sorted(set(edits.edits(300, (128, 128), objects, rng()).texts))
    said = [edits.parse_instruction(text, objects) for text in texts]
    others, found = shards.mismatched_captions(codes_of(EDIT._replace(objects=objects), texts),
                                 torch.arange(len(texts)), rng(1))
    assert found.all() and len(texts) > 150
    for i, j in enumerate(others.tolist()):
        clash = [a != b for a, b in zip(said[i].asked, said[j].asked) if min(a, b) >= 0]
        assert said[i].kind != said[j].kind or any(clash), (texts[i], texts[j])
    kinds = [said[i].kind == said[j].kind for i, j in enumerate(others.tolist())]
    assert any(kinds) and not all(kinds)


@pytest.mark.parametrize("channels", [16, 17])
def test_what_is_shown_of_a_folder_is_held_out(channels):
    """The last samples of each size; a mask is the cells that the network is given."""
    buckets, images = {}, {}
    for (h, w), n in (((2, 3), 40), ((3, 2), 70)):
        number = torch.arange(n)[:, None, None, None].expand(n, 1, h, w).bfloat16()
        buckets[h, w] = number.expand(-1, 16, -1, -1), torch.arange(n) % 7
        images[h, w] = number.expand(-1, channels, -1, -1).clone()
        images[h, w][:, 0] = torch.rand(n, h, w, generator=rng(n)) < .5
    latents = Latents([f"do {i}" for i in range(7)], torch.zeros(7, 3, 4), torch.zeros(7, 4),
                      torch.arange(7)[:, None], (torch.zeros(3, 4), torch.zeros(4)), buckets, {},
                      images)
    for n, each in ((4, 2), (2, 1), (1, 1), (100, latents.holdout)):
        parts = held_out(latents, n)
        assert [p.hw for p in parts] == [(16, 24), (24, 16)]
        for p, size in zip(parts, (40, 70)):
            rows = torch.arange(size - each, size)
            assert torch.equal(p.latents[:, 5, 0, 0], rows.float())
            assert p.latents.dtype == torch.float32
            assert p.captions == [f"do {i % 7}" for i in rows.tolist()]
            assert torch.equal(p.image[:, 3, 1, 1], rows.float())
            if channels == 16:
                assert p.mask is None
            else:
                assert p.mask.dtype == torch.bool and torch.equal(masks.latent_mask(p.mask),
                                                                  p.image[:, :1])
    batches = [latents.batch(step, 20, 0, latents.holdout) for step in range(50)]
    assert latents.holdout == 2 and max(b.x0.max() for b in batches) == 67


# grades

def test_edits_are_graded_by_what_was_asked_and_what_was_to_stay():
    prompts = draw_prompts(EDIT, 140, 1)
    images = lambda name: [decode(getattr(p, name)) for p in prompts]
    done, idle = (grade_prompts(images(name), prompts) for name in ("latents", "image"))
    assert done.keys() == idle.keys() == {"prompt_accuracy", "asked", "kept", "background",
                                          "accuracy"}
    assert min(done["prompt_accuracy"], done["asked"], done["kept"]) >= .98
    assert done["background"] < .04
    assert idle["prompt_accuracy"] <= .02 and idle["asked"] <= .02
    # what add starts from is paper, which is no scene
    assert abs(idle["kept"] - 6 / 7) < .02
    assert set(done["accuracy"]) == set(edits.KINDS) and min(done["accuracy"].values()) > .9
    half = [torch.cat([a[:35], b[35:]]) for a, b in zip(images("latents"), images("image"))]
    assert abs(grade_prompts(half, prompts)["asked"] - .5) < .03
    gray = grade_prompts([torch.zeros_like(x) for x in half], prompts)
    assert gray["kept"] < .2 and gray["background"] > .1


def test_inpainting_is_graded_inside_and_at_the_seam():
    prompts, codec = draw_prompts(INPAINT, 140, 1), toy_codec(INPAINT)
    images = lambda latents: decoded(latents, prompts, codec, 9)
    done = grade_prompts(images([p.latents for p in prompts]), prompts)
    assert done.keys() == {"prompt_accuracy", "inside", "seam", "accuracy"}
    assert min(done["prompt_accuracy"], done["inside"]) >= .98 and abs(done["seam"]) < .03
    gray = grade_prompts(images([torch.zeros_like(p.latents) for p in prompts]), prompts)
    assert gray["inside"] < .1 and gray["seam"] > .3 and gray["prompt_accuracy"] < .5
    # inside counts those alone of whose mask a stated attribute depends
    counted = [(grader.decided(p.graded, p.mask) & (p.codes >= 0)).any(1) for p in prompts]
    mixed = [torch.where(rows[:, None, None, None], x, 0) for rows, x in
             zip(counted, images([p.latents for p in prompts]))]
    found = grade_prompts(mixed, prompts)
    assert found["inside"] == done["inside"] and found["prompt_accuracy"] < done["prompt_accuracy"]


def test_what_a_mask_keeps_is_the_sources_bit_for_bit():
    prompts, codec, drawn = draw_prompts(INPAINT, 20, 2), toy_codec(INPAINT), rng(3)
    made = [torch.randn(p.latents.shape, generator=drawn) for p in prompts]
    for batch in (3, 256):
        for p, latents, image in zip(prompts, made, decoded(made, prompts, codec, batch)):
            source, result = decode(p.latents), decode(latents)
            assert torch.equal(image, torch.where(p.mask[:, None], result, source))
    # the first ones, as in a sheet
    few = decoded([x[:2] for x in made], prompts, codec, 256)
    assert all(torch.equal(a, b[:2]) for a, b in zip(few, decoded(made, prompts, codec, 256)))
    plain = [p._replace(mask=None) for p in prompts]
    assert torch.equal(decoded(made, plain, codec, 7)[0], decode(made[0]))


def test_sheets_show_what_the_networks_are_given():
    codec, edit = toy_codec(EDIT), [p._replace(captions=p.captions[:2]) for p
                                    in draw_prompts(EDIT, 8, 1)]
    shown, = sources(codec, edit).items()
    assert shown[0] == "source" and len(shown[1]) == 4
    assert torch.equal(shown[1][3], decode(edit[1].image[1:2])[0])
    masked = [p._replace(captions=p.captions[:2]) for p in draw_prompts(INPAINT, 8, 1)]
    (name, images), = sources(codec, masked).items()
    mask, stripes = masked[1].mask[0], images[2][:, masked[1].mask[0]]
    assert name == "to repaint" and len(images) == 4
    assert_close("stripes", stripes.abs(), torch.full_like(stripes, .4))
    assert .3 < (stripes > 0).float().mean() < .7
    kept = ~masks.latent_mask(mask[None])[0, 0].bool().repeat_interleave(8, 0).repeat_interleave(8,
                                                                                                 1)
    assert_close("kept", images[2][:, kept], decode(masked[1].latents[:1])[0][:, kept], 1e-5)
    assert sources(codec, draw_prompts(PLAIN, 4, 1)) == {}


def test_where_nothing_counts_nothing_is_reported():
    """Masks without a border have no seam, captions that state nothing no accuracy inside: no NaN,
    which report.json refuses after hours."""
    prompts = [p._replace(mask=torch.ones_like(p.mask), codes=torch.full_like(p.codes, -1))
               for p in draw_prompts(INPAINT, 6, 1)]
    found = grade_prompts([decode(p.latents) for p in prompts], prompts)
    assert found["seam"] is None and found["inside"] is None and found["prompt_accuracy"] == 1
    row = {**dict.fromkeys(sheets.ROW, 1.0), **found}
    assert not list(sheets._nonfinite(row, "row"))
    assert sheets.table([row], {"fd": 0.0}).splitlines()[2].count("- |") == 3      # the excess too


# whole runs

@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder whose runs/edit and runs/inpaint are whole runs that nothing disturbed."""
    folder = tmp_path_factory.mktemp("tasks")
    # half of the time
    with mock.patch.object(sheets, "plot_report", lambda *args: None):
        for task, flags in FLAGS.items():
            main(folder, f"--name {task} {flags}", report=True)
    save_teacher(folder)
    return folder


EXTRA = {"edit": {"asked", "kept", "background"}, "inpaint": {"inside", "seam"}}


@pytest.mark.parametrize("task", FLAGS)
def test_a_run_ends_with_a_report_of_its_grades(home, task):
    text = (home / "runs" / task / "report.json").read_text()
    out = json.loads(text, parse_constant=lambda word: pytest.fail(word))
    check_report(out)
    assert all(EXTRA[task] <= row.keys() and "entropy" not in row for row in out["rows"])
    # of renders
    assert EXTRA[task] <= out["floor"].keys() and out["floor"]["prompt_accuracy"] >= .9
    evaluations = {(r["model"], r["steps"], r["guidance"]): r["nfe"] // r["steps"] for r
                   in out["rows"]}
    each = {"edit": 3, "inpaint": 2}[task]
    assert evaluations["teacher", 3, 2.5] == evaluations["teacher", 4, 2.5] == each
    assert evaluations["teacher", 4, 1.0] == evaluations["student", 4, 1.0] == 1
    assert bool(out["heldout_prompt_accuracy"]) == (task == "inpaint")
    said = checkpoint.load_metadata(home / "runs" / task)
    assert (said["task"], said["image_guidance"]) == (task, "1.5" if task == "edit" else "1.0")
    model = checkpoint.load_mmdit(home / "runs" / task)
    assert (model.config.in_channels, model.config.out_channels) == ({"edit": 32,
                                                                      "inpaint": 33}[task], 16)
    student, teacher = (weights(home / f"runs/{task}/checkpoints/{name}.safetensors")[READS]
                        for name in ("last", "teacher"))
    # what reads the image learns too
    assert (student - teacher)[:, 16:].abs().amax((0, 2, 3)).min() > 0


@each_task
def test_a_task_resumed_equals_one_undisturbed_bit_for_bit(home, task):
    for _ in range(4):
        said = main(home, f"--name again-{task} {FLAGS[task]} --set stop_after=3")
    assert "saved step 6" in said
    main(home, f"--name again-{task} {FLAGS[task]}")
    whole, again = home / "runs" / task, home / "runs" / f"again-{task}"
    assert_same(whole, again, r"(step_000006/part-.*|teacher|student|last|data/.*)\.safetensors$")
    assert log_of(whole) == log_of(again)


@pytest.mark.parametrize("task", FLAGS)
def test_latents_are_the_guided_teachers_of_the_images_beside_them(home, task):
    run, config = home / "runs" / task, parse_config(f"{TINY} {FLAGS[task]}".split())
    toy = toy_of(config)
    plan = toy_plan(toy, config.data_size, config.shard_size, config.seed)
    latents, codec = shards.read_folder(run / "data"), toy_codec(toy)
    shard = plan.shards[1]
    tensors = weights(run / "data/00001-8x4.safetensors")
    assert torch.equal(tensors["prompt_id"], shard.prompt_id) and latents.prompts == plan.prompts
    assert torch.equal(tensors["image"], shard.image()) and latents.channels == image_channels(task)
    found = latents.provenance
    assert found["guidance"] == 2.5 and found["image_guidance"] == (1.5 if task == "edit" else 1)
    text = codec.text([plan.prompts[i] for i
                        in shard.prompt_id[:3]])._replace(image=shard.image()[:3])
    teacher = checkpoint.load_mmdit(run / "checkpoints/teacher.safetensors")
    seeds = [shard.seed + i for i in range(3)]
    null = codec.text([""]).map(lambda t: t[0])
    # as it is stored
    text = Text(*(t.bfloat16().float() for t in text[:2]), text.image)
    levels = torch.tensor([1, 2 / 3, 1 / 3, 0])
    noise = image_noise(seeds, (16, 8, 4))
    x0 = sample(teacher, noise, text, levels, "euler", seeds, null, 2.5, found["image_guidance"])
    assert_close("latents", tensors["x0"][:3], x0, 1e-4)


@pytest.mark.parametrize("task", FLAGS)
def test_pictures_are_drawn_beside_their_own_images(home, monkeypatch, task):
    """In batches, of both sizes; the few of a sheet beside the first ones."""
    config = parse_config(f"{TINY} {FLAGS[task]}".split())
    toy = toy_of(config)
    prompts, codec, seen = draw_prompts(toy, 14, 1), toy_codec(toy), []
    model, levels = checkpoint.load_mmdit(home / "runs" / task), torch.tensor([1.0, 0.0])

    def spied(net, noise, text, sigmas, sampler, seeds, null, *guidance):
        seen.append((text, guidance))
        return sample(net, noise, text, sigmas, sampler, seeds, null, *guidance)
    monkeypatch.setattr(evaluate, "sample", spied)
    for both in ((2.5, config.image_guidance), (1.0, 1.0)):
        evaluate.generate(Row("", model, levels, "euler", both), codec, prompts, 0, 3)
        for part, calls in zip(prompts, (seen[:3], seen[3:])):
            assert torch.equal(torch.cat([text.image for text, _ in calls])[:7], part.image)
            said = torch.cat([text.pooled for text, _ in calls])[:7]
            assert torch.equal(said, codec.text(part.captions).pooled)
            assert {guided for _, guided in calls} == {both}
        assert len(seen) == 6
        seen.clear()
    few = [p._replace(captions=p.captions[:2]) for p in prompts]
    evaluate.generate(Row("", model, levels, "euler", UNGUIDED), codec, few, 0, 3)
    assert len(seen) == len(prompts) == 2
    assert all(torch.equal(text.image, p.image[:2]) for (text, _), p in zip(seen, prompts))


@pytest.mark.parametrize("flags, parts", [
    ("--task edit --data runs/inpaint/data",
     ("runs/inpaint/data", "--task edit must have 16 image", "got 17")),
    ("--task inpaint --data runs/edit/data",
     ("runs/edit/data", "--task inpaint must have 17 image", "got 16")),
    ("--data runs/edit/data", ("runs/edit/data", "--task text must have 0 image", "got 16")),
    ("--task edit --teacher t.safetensors",
     ("t.safetensors", "in_channels must be 32", "--task edit", "got 16")),
    ("--task inpaint --teacher runs/edit/checkpoints/teacher.safetensors",
     ("teacher.safetensors", "in_channels must be 33", "--task inpaint", "got 32")),
    ("--teacher runs/edit/checkpoints/teacher.safetensors",
     ("teacher.safetensors", "in_channels must be 16", "--task text", "got 32")),
    ("--base runs/edit/checkpoints/teacher.safetensors",
     ("teacher.safetensors", "in_channels must be 16", "--task text", "got 32")),
    ("--base runs/edit --task edit",
     ("--base", "runs/edit", "few-step student", "a teacher checkpoint")),
    ("--task edit --data runs/edit/data --teacher small.safetensors --sizes 32x32",
     ("runs/edit/data", "latents must be at most 4 per side", r"got \dx\d")),
    ("--task edit --base junk.safetensors",
     ("junk.safetensors", "not a complete safetensors file")),
    ("--task edit --base t.safetensors --set text_dim=48",
     ("t.safetensors", "context_dim must be 48", "--set text_dim", "got 64")),
    ("--task edit --base t.safetensors --taps 2 --set depth=3",
     ("t.safetensors", "--taps 2", "depth 2"))])
def test_what_is_of_another_task_is_refused_before_a_run_is_made(home, flags, parts):
    (home / "junk.safetensors").write_text("junk")
    save_teacher(home, pos_grid=2, in_channels=32).rename(home / "small.safetensors")
    save_teacher(home)
    before = set((home / "runs").iterdir())
    with refused(*parts):
        main(home, f"--name other {flags}")
    assert set((home / "runs").iterdir()) == before


def test_a_teacher_starts_as_its_base_and_learns_the_image(home):
    """From a text teacher: with almost no learning rate its weights, and zeros; with one all
    move, those of the image too. Sizes are the base's."""
    flags = "--steps 0 --task inpaint --base t.safetensors --set depth=1 --set width=128"
    for name, rate in (("still", 1e-9), ("moves", 1e-3)):
        main(home, f"--name {name} {flags} --teacher-lr {rate} --teacher-steps 2")
    base = weights(home / "t.safetensors")
    still, moves = (weights(home / f"runs/{name}/checkpoints/teacher.safetensors")
                    for name in ("still", "moves"))
    assert still.keys() == moves.keys() == base.keys()
    assert all(torch.allclose(still[k], base[k], 0, 1e-7) for k in base if k != READS)
    assert torch.allclose(still[READS][:, :16], base[READS], 0, 1e-7)
    assert still[READS].shape[1] == 33
    assert still[READS][:, 16:].abs().max() < 1e-7
    assert moves[READS][:, 16:].abs().amax((0, 2, 3)).min() > 0
    assert (moves[READS][:, :16] - base[READS]).abs().max() > 1e-5
    # the loss of its first step is the text network's
    first = log_of(home / "runs/moves")[0]["loss"]
    main(home, "--name random --steps 0 --task inpaint --teacher-steps 1")
    assert first == log_of(
        home / "runs/still")[0]["loss"] != log_of(home / "runs/random")[0]["loss"]


def test_zero_steps_end_with_the_teacher_of_the_whole_run(home):
    said = main(home, f"--name flow {FLAGS['edit']} --steps 0", report=True)
    run, whole = home / "runs/flow", home / "runs/edit"
    assert "--steps 0: the run ends with its teacher, runs/flow/checkpoints/teacher.saf" in said
    assert {path.name for path in run.iterdir()} == {
        ".lock", "config.json", "env.txt", "inputs.json", "log.jsonl", "seconds.json",
        "checkpoints", "samples"}
    assert_same(run, run, "teacher.safetensors")
    ours, theirs = (weights(folder / "checkpoints/teacher.safetensors") for folder in (run, whole))
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
    assert log_of(run) == [line for line in log_of(whole) if line["stage"] == "teacher"]
    before = stamps(run)
    main(home, f"--name flow {FLAGS['edit']} --steps 0")
    assert {k: v[1] for k, v in stamps(run).items() if "checkpoints" in k} == {
        k: v[1] for k, v in before.items() if "checkpoints" in k}


def test_a_teacher_in_micro_batches_is_the_whole_batchs(home):
    run = lambda name, flags: main(home, f"--name {name} --steps 0 --task edit --base "
                                   "t.safetensors --teacher-steps 2 --teacher-lr 1e-3 --set "
                                   f"warmup=0 {flags}")
    run("at-once", ""), run("in-two", "--micro-batch 4")
    one, two, start = (weights(home / path) for path
                       in (*(f"runs/{name}/checkpoints/teacher.safetensors" for name
                             in ("at-once", "in-two")), "t.safetensors"))
    distance = lambda a, b: sum(float((a[k] - b[k]).square().sum())
                                for k in start if k != READS) ** 0.5
    # rounding: Adam
    assert distance(one, start) > 0.1 and distance(one, two) < 0.02 * distance(one, start)


def test_a_teacher_goes_on_from_its_own_base_alone(home):
    flags = "--name began --steps 0 --task edit --base began.safetensors --teacher-steps 2"
    save_teacher(home).rename(home / "began.safetensors")
    assert "saved step 1" in main(home, f"{flags} --set stop_after=1")
    save_teacher(home, seed=1).rename(home / "began.safetensors")
    with refused("^runs/began: the content of --base is not what it was when the run began;"):
        main(home, flags)
    save_teacher(home).rename(home / "began.safetensors")
    main(home, flags)
    (home / "began.safetensors").unlink()                           # not read any more
    main(home, flags)
    save_teacher(home)


# what the teacher is shown

@pytest.mark.parametrize("task, text_dropout, image_dropout",
                         [("edit", .4, .15), ("edit", .3, .3), ("edit", .2, 0.),
                          ("inpaint", .4, None), ("text", .4, None)])
def test_sources_are_left_out_only_where_the_caption_is(tmp_path, monkeypatch, task, text_dropout,
                                                        image_dropout):
    """Shares of 640 samples; a mask is never left out; what is not left out is the sample's own."""
    shown, flow_loss = [], train.flow_loss

    def spied(model, x0, eps, sigma, text):
        shown.append((x0, *text))
        return flow_loss(model, x0, eps, sigma, text)
    monkeypatch.setattr(train, "flow_loss", spied)
    flags = f"--task {task} --set text_dropout={text_dropout}"
    flags += f" --set image_dropout={image_dropout}" * (task == "edit")
    main(tmp_path, f"--name drop {flags} --steps 0 --set width=64 --set depth=1 --taps 0 "
         "--teacher-batch 40 --teacher-steps 16 --set log_every=100 --save-every 100")
    toy = toy_of(parse_config(f"{TINY} {flags}".split()))
    latents, null = toy_latents(toy, 96, 0), toy_codec(toy).text([""])
    empty, bare = [], []
    for step, (x0, context, pooled, image) in enumerate(shown):
        b = latents.batch(step, 40, 0)
        empty.append((context == null.context).flatten(1).all(1))
        bare.append(torch.zeros(40, dtype=torch.bool) if image is None
                    else ~image.flatten(1).any(1))
        left = ~empty[-1][:, None]
        assert torch.equal(x0, b.x0)
        assert torch.equal(context, torch.where(left[..., None], b.text.context, null.context))
        assert torch.equal(pooled, torch.where(left, b.text.pooled, null.pooled))
        assert (image is None) == (task == "text")
        assert image is None or torch.equal(image, b.text.image * ~bare[-1][:, None, None, None])
    empty, bare = torch.cat(empty), torch.cat(bare)
    assert len(
        empty) == 640 and abs(
            empty.float().mean() - text_dropout) < .06 and not (bare & ~empty).any()
    assert abs(bare.float().mean() - (image_dropout
                                      or 0)) < .05 and bare.any() == bool(image_dropout)
    assert torch.equal(bare, empty) == (image_dropout == text_dropout)
