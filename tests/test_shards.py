"""The order of batches, and latents on disk: what is written, what is refused, what a kill
leaves."""
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import rng
from safetensors.torch import save_file

from ladd.cli import InputError
from ladd.core.mmdit import Text
from ladd.data import files, shards
from ladd.data.shards import (Latents, missing_shards, missing_text, open_folder, read_folder,
                              write_shard, write_text)

# not in the order of (h, w), none a multiple of the batch
SIZES = {(4, 6): 23, (4, 4): 41, (6, 4): 10}
BATCH = 5
EPOCH = 4 + 8 + 2                               # batches


def text(p: int = 7) -> dict:
    """Prompts whose embeddings and codes carry the prompt's number."""
    n = torch.arange(p)
    return {"prompts": [f"prompt {i}" for i in range(p)],
            "context": n[:, None, None].expand(p, 3, 2).float(), "pooled": n[:, None].expand(p, 4)
            + 100.0, "codes": torch.stack([n, n - 1], 1),
            "null": (torch.full((3, 2), -1.0), torch.full((4,), -2.0))}


def latents() -> Latents:
    """Latents whose every value is the sample's position in the dataset; its prompt is that modulo
    7."""
    buckets, first = {}, dict(zip(sorted(SIZES), (0, 41, 64)))
    for (h, w), n in SIZES.items():
        position = torch.arange(n) + first[h, w]
        buckets[h, w] = position[:, None, None, None].expand(n, 2, h, w).half(), position % 7
    return Latents(**text(), buckets=buckets, provenance={})


def positions(batch: shards.Batch) -> list[int]:
    return batch.x0[:, 0, 0, 0].int().tolist()


# order

@pytest.mark.parametrize("epoch", [0, 3])
def test_an_epoch_shows_every_sample_once_and_one_size_a_batch(epoch):
    d, seen, sizes = latents(), [], Counter()
    for step in range(epoch * EPOCH, (epoch + 1) * EPOCH):
        b = d.batch(step, BATCH, seed=1)
        assert b.x0.shape[:2] == (BATCH, 2) and b.x0.dtype == torch.float32
        index = b.x0[:, 0, 0, 0]
        assert torch.equal(b.x0, index[:, None, None, None].expand_as(b.x0))
        assert torch.equal(b.text.context[:, 0, 0], index % 7)
        assert torch.equal(b.text.pooled[:, 3], index % 7 + 100)
        sizes[tuple(b.x0.shape[2:])] += 1
        seen += index.tolist()
    assert sizes == {hw: n // BATCH for hw, n in SIZES.items()}
    assert len(seen) == len(set(seen)) == EPOCH * BATCH and max(seen) == 73


def test_the_remainder_changes_from_epoch_to_epoch_and_the_order_with_it():
    d = latents()
    steps = [range(e * EPOCH, (e + 1) * EPOCH) for e in range(8)]
    epochs = [[i for s in epoch for i in positions(d.batch(s, BATCH, 1))] for epoch in steps]
    left = [frozenset(range(74)) - frozenset(e) for e in epochs]
    assert all(len(x) == 4 for x in left) and len(set(left)) == 8 and len({tuple(e) for e
                                                                           in epochs}) == 8
    sizes = [tuple(d.batch(s, BATCH, 1).x0.shape[2:]) for s in range(EPOCH)]
    assert sizes != sorted(sizes) and sizes != sorted(sizes, reverse=True)      # buckets are mixed


def test_a_batch_depends_on_step_and_seed_alone():
    straight = [positions(latents().batch(s, BATCH, 1)) for s in range(2 * EPOCH)]
    d = latents()
    shards.permutation.cache_clear()
    backwards = [positions(d.batch(s, BATCH, 1)) for s in reversed(range(2 * EPOCH))][::-1]
    torch.manual_seed(5)
    resumed = [positions(latents().batch(s, BATCH, 1)) for s in range(EPOCH + 3, 2 * EPOCH)]
    assert straight == backwards and straight[EPOCH + 3:] == resumed
    assert straight[:EPOCH] != [positions(d.batch(s, BATCH, 2)) for s in range(EPOCH)]
    assert shards.permutation(8, 0, 0).tolist() == [1, 3, 0, 4, 2, 5, 7, 6]    # on every machine


def test_excluded_samples_never_appear_and_gather_returns_them():
    d, exclude = latents(), 4
    held = {41 - 1 - i for i in range(4)} | {64 - 1 - i for i in range(4)} | {74 - 1 - i for i
                                                                              in range(4)}
    seen = {i for s in range(50 * EPOCH) for i in positions(d.batch(s, BATCH, 1, exclude))}
    assert seen == set(range(74)) - held
    b = d.gather((4, 6), torch.tensor([22, 19]))
    assert positions(b) == b.x0[:, 1, 3, 5].tolist() == [63, 60]


@pytest.mark.parametrize("sizes, held", [((20, 60), 2), ((47, 100), 2), ((48, 100), 3),
                                         ((160, 320), 10)])
def test_a_sixteenth_of_the_smallest_size_is_held_out(sizes, held):
    """At least two of each size, rounded down."""
    buckets = {(4, 4 + i): (torch.zeros(n, 1, 1, 1), torch.zeros(n, dtype=torch.int64))
               for i, n in enumerate(sizes)}
    assert replace(latents(), buckets=buckets).holdout == held


def test_a_bucket_that_cannot_fill_a_batch_is_refused():
    with pytest.raises(InputError, match=r"latents 6x4 must be at least a batch of 11 \(got 10\)"):
        latents().batch(0, 11, 0)
    with pytest.raises(InputError, match=r"latents 6x4 must be at least a batch of 5 \(got 4\)"):
        latents().batch(0, 5, 0, exclude=6)


def test_each_sample_comes_with_its_own_image():
    """As it is stored, of whatever size and epoch; without one the text is plain."""
    d = latents()
    image = {hw: x0[:, :1].half() + 1000 for hw, (x0, _) in d.buckets.items()}
    paired = replace(d, images=image)
    assert (d.channels, paired.channels) == (0, 1)
    for step in range(2 * EPOCH):
        b, plain = paired.batch(step, BATCH, 1), d.batch(step, BATCH, 1)
        assert isinstance(b.text, Text) and b.text.image.dtype == torch.float32
        assert torch.equal(b.text.image, b.x0[:, :1] + 1000)
        assert plain.text.image is None and torch.equal(plain.x0, b.x0)


# mismatched captions

def excludes(a: list[int], b: list[int]) -> bool:
    return any(x >= 0 and y >= 0 and x != y for x, y in zip(a, b))


def test_mismatched_captions_never_fit():
    """And they are found where there are some: 64 draws miss one of 6 captions once in 10^5."""
    for seed in range(200):
        codes = torch.randint(-1, 2, (6, 3), generator=rng(seed))
        prompt = torch.randint(6, (9,), generator=rng(seed + 1))
        others, found = shards.mismatched_captions(codes, prompt, rng(seed), tries=64)
        c = codes.tolist()
        assert found.tolist() == [any(excludes(c[i], d) for d in c) for i in prompt]
        assert all(excludes(c[i], c[j]) if ok else i == j for i, j, ok
                   in zip(prompt, others, found))


@pytest.mark.parametrize("codes, allowed", [
    ([[0, 1]], [set()]), ([[0, 1], [0, -1]], [set(), set()]), ([[0, 1], [1, 1]], [{1}, {0}]),
    ([[0, -1], [-1, 1], [1, 0]], [{2}, {2}, {0, 1}]), ([[5], [5], [6]], [{2}, {2}, {0, 1}])],
    ids=["one", "two that fit", "two", "three", "prompt ids"])
def test_mismatched_captions_of_few_prompts(codes, allowed):
    others, found = shards.mismatched_captions(torch.tensor(codes), torch.arange(len(codes)), rng())
    assert found.tolist() == [bool(a) for a in allowed]
    assert all(j in a or not a for j, a in zip(others.tolist(), allowed))


def test_mismatched_captions_are_drawn_evenly():
    codes = torch.tensor([[0], [0], [1], [2], [3]])
    others, found = shards.mismatched_captions(codes, torch.zeros(3000, dtype=torch.int64), rng())
    found = Counter(others.tolist())
    assert set(found) == {2, 3, 4} and all(abs(n / 3000 - 1 / 3) < 0.04 for n in found.values())


# folders

PLAN = [(4, 4), (4, 6), (4, 4)]
ROWS = 3                                        # prompts a file of text: 3, 3, 1


def prompts(p: int = 7) -> dict:
    """What open_folder takes of text()."""
    return {k: v for k, v in text(p).items() if k not in ("context", "pooled")} | {"rows": ROWS}


def write_texts(path: Path, indices) -> None:
    for i in indices:
        write_text(path, i, *(text()[k][i * ROWS:(i + 1) * ROWS] for k in ("context", "pooled")))


PROVENANCE = {"sampler": "euler", "guidance": 2.5, "levels": (1.0, 0.5),
              "more": {"clip": float("inf")}}


def shard(i: int, n: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(n, 2, *PLAN[i], generator=rng(i)).bfloat16(), torch.arange(n) + i


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "data"
    open_folder(path, PROVENANCE, **prompts())
    write_texts(path, missing_text(path))
    for i in range(len(PLAN)):
        write_shard(path, i, *shard(i))
    return path


def test_what_is_written_is_read(folder):
    d, t = read_folder(folder), text()
    names = ["00000-4x4", "00001-4x6", "00002-4x4", "prompts", "prompts", "provenance",
             "text-00000", "text-00001", "text-00002"]
    assert sorted(p.stem for p in folder.iterdir()) == names and d.prompts == t["prompts"]
    assert d.context.dtype == d.pooled.dtype == torch.bfloat16 and d.codes.dtype == torch.int64
    every, some = torch.arange(7), torch.tensor([6, 0, 3, 3, 2])
    for index in (every, some):
        assert torch.equal(d.context[index].float(), t["context"][index])
        assert torch.equal(d.pooled[index].float(), t["pooled"][index])
    assert d.context.shape == (7, 3, 2) and len(d.pooled) == 7 and torch.equal(d.codes, t["codes"])
    assert d.null[0].tolist() == [[-1, -1]] * 3 and d.null[1].tolist() == [-2] * 4
    assert d.provenance == {**PROVENANCE, "levels": [1.0, 0.5], "rows": ROWS}
    assert list(d.buckets) == [(4, 4), (4, 6)]
    x0, prompt_id = d.buckets[4, 4]
    assert x0.dtype == torch.bfloat16 and x0.shape == (6, 2, 4, 4)
    assert torch.equal(x0[torch.tensor([5, 0, 2])],
                       torch.cat([shard(0)[0], shard(2)[0]])[[5, 0, 2]])
    assert prompt_id.tolist() == [0, 1, 2, 2, 3, 4]
    assert torch.equal(d.buckets[4, 6][0], shard(1)[0])
    hw, index = d.choose(0, 3, 0)
    b = d.batch(0, 3, 0)
    assert torch.equal(b.text.context[:, 0, 0], d.buckets[hw][1][index].bfloat16())
    assert torch.equal(b.x0, d.buckets[hw][0][index].float())


def image(i: int, n: int = 3, channels: int = 5) -> torch.Tensor:
    return torch.randn(n, channels, *PLAN[i], generator=rng(10 + i)).bfloat16()


def test_images_come_back_with_their_latents(folder):
    for i in range(len(PLAN)):
        write_shard(folder, i, *shard(i), image(i))
    d, every = read_folder(folder), torch.arange(6)
    assert list(d.images) == [(4, 4), (4, 6)] and d.channels == 5
    assert torch.equal(d.images[4, 4][every], torch.cat([image(0), image(2)]))
    assert torch.equal(d.buckets[4, 4][0][every], torch.cat([shard(0)[0], shard(2)[0]]))
    b = d.gather((4, 4), torch.tensor([5, 1]))
    assert torch.equal(b.text.image, torch.stack([image(2)[2], image(0)[1]]).float())
    assert torch.equal(d.gather((4, 6), torch.tensor([2])).text.image, image(1)[2:].float())


@pytest.mark.parametrize("bare, name, accepted", [
    (0, "00001-4x6", "prompt_id [n] (got "), (1, "00001-4x6", "image [n, 5, 4, 6] (got "),
    (2, "00002-4x4", "image [n, 5, 4, 4] (got ")])
def test_a_folder_with_images_for_some_latents_is_refused(folder, bare, name, accepted):
    """The first shard says what the others have."""
    for i in range(len(PLAN)):
        write_shard(folder, i, *shard(i), None if i == bare else image(i))
    with pytest.raises(InputError) as error:
        read_folder(folder)
    line = str(error.value)
    assert f"{folder / name}.safetensors must have x0 [n, 2, " in line and accepted in line
    assert ("image [3, 5, " in line.split("(got ")[1]) == (bare == 0)


def test_reading_maps_the_file_and_never_changes_it(folder):
    path = folder / "00001-4x6.safetensors"
    before = path.read_bytes()
    read_folder(folder).buckets[4, 6][0].zero_()
    assert path.read_bytes() == before and path.stat().st_mode & 0o777 == 0o644


def test_json_stays_standard_with_infinities(folder):
    def refuse(word):
        raise AssertionError(word)
    json.loads((folder / "provenance.json").read_text(), parse_constant=refuse)


def test_an_interrupted_folder_is_completed(folder):
    assert missing_shards(folder, PLAN) == []
    (folder / "00001-4x6.safetensors").unlink()
    before = (folder / "00000-4x4.safetensors").stat()
    open_folder(folder, PROVENANCE, **prompts())               # the same run: nothing is touched
    assert missing_shards(folder, PLAN) == [1]
    assert (folder / "00000-4x4.safetensors").stat() == before
    assert missing_shards(folder, [*PLAN, (6, 4), (6, 4)]) == [1, 3, 4]
    assert missing_shards(folder.parent / "absent", PLAN) == [0, 1, 2]
    write_shard(folder, 1, *shard(1))
    assert missing_shards(folder, PLAN) == []
    assert torch.equal(read_folder(folder).buckets[4, 6][0], shard(1)[0])


@pytest.mark.parametrize("plan", [PLAN[:2], [(4, 4), (4, 6), (6, 4)]])
def test_a_shard_outside_the_plan_is_refused(folder, plan):
    message = "00002-4x4.safetensors: a shard that this run does not plan; take another folder"
    with pytest.raises(InputError, match=message):
        missing_shards(folder, plan)


@pytest.mark.parametrize("change, message", [
    (dict(provenance={**PROVENANCE, "guidance": 3.0}),
     "made with guidance 2.5 (got 3.0); take another folder"),
    (dict(provenance=dict(list(PROVENANCE.items())[1:])), "made with sampler 'euler' (got None)"),
    (dict(provenance={**PROVENANCE, "seed": 0}), "made with seed None (got 0)"),
    (dict(provenance={**PROVENANCE, "more": {"clip": 1}}),
     "made with more {'clip': {'float': 'inf'}} (got {'clip': 1})"),
    (dict(prompts=[*text()["prompts"][:6], "other"]), "made with prompt 'prompt 6' (got 'other')"),
    (prompts(6), "made with prompt 'prompt 6' (got None)"),
    (dict(rows=4), "made with rows 3 (got 4)"),
    (dict(codes=text()["codes"] - 1), "made with another codes for the same prompts"),
    (dict(null=(torch.zeros(3, 2), text()["null"][1])),
     "made with another null_context for the same prompts"),
])
def test_a_folder_of_another_run_is_refused(folder, change, message):
    before = {p: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(InputError) as error:
        open_folder(folder, **{"provenance": PROVENANCE, **prompts(), **change})
    assert message in str(
        error.value) and str(folder) in str(error.value) and "\n" not in str(error.value)
    assert {p: p.read_bytes() for p in folder.iterdir()} == before


def test_text_is_written_file_by_file(folder):
    (folder / "text-00001.safetensors").unlink()
    open_folder(folder, PROVENANCE, **prompts())
    assert missing_text(folder) == [1]
    with pytest.raises(InputError,
                       match=r"text-00001.* context \[3, 3, 2\].*got context \[2, 3, 2\]"):
        write_text(folder, 1, text()["context"][3:5], text()["pooled"][3:6])
    with pytest.raises(InputError, match=r"text-00002.*pooled \[1, 4\] \(got .*pooled \[1, 2\]"):
        write_text(folder, 2, text()["context"][6:], text()["pooled"][6:, :2])
    write_texts(folder, [1])
    assert missing_text(folder) == [] and torch.equal(
        read_folder(folder).context[torch.tensor([4])].float(), text()["context"][4:5])


def test_shards_of_unknown_origin_are_refused(folder):
    (folder / "provenance.json").unlink()
    with pytest.raises(InputError, match="shards without provenance.json; take another"):
        open_folder(folder, PROVENANCE, **prompts())


def rewrite(path: Path, **tensors) -> None:
    save_file({"x0": shard(0)[0], "prompt_id": shard(0)[1], **tensors}, path)


def nan() -> torch.Tensor:
    x0 = shard(0)[0].clone()
    x0[2, 1, 3, 3] = float("nan")
    return x0


def retext(path: Path, rows: int, value: float = 0.0) -> None:
    save_file({"context": torch.full((rows, 3, 2), value), "pooled": torch.zeros(rows, 4)}, path)


CUT = "not a complete safetensors file"
TEXT, IMAGE = "text-00001.safetensors", "image [n, e, 4, 4] (got"
SHARD, LAST, PROMPTS = "00000-4x4.safetensors", "00002-4x4.safetensors", "prompts.safetensors"
DAMAGE = {"cut": (SHARD, lambda p: p.write_bytes(p.read_bytes()[:-4]), CUT),
          "cut header": (SHARD, lambda p: p.write_bytes(p.read_bytes()[:30]), CUT),
          "empty": (SHARD, lambda p: p.write_bytes(b""), CUT),
          "text": (SHARD, lambda p: p.write_text("no tensors\n but a text"), CUT),
          "nan": (SHARD, lambda p: rewrite(p, x0=nan()), "x0 must be finite (got NaN or inf)"),
          "inf": (SHARD, lambda p: rewrite(p, x0=shard(0)[0] / 0), "x0 must be finite (got NaN or "
                  "inf)"), "size": (SHARD, lambda p: rewrite(p, x0=torch.zeros(3, 2, 4, 6)),
                                    "x0 [n, c, 4, 4]"),
          "rank": (SHARD, lambda p: rewrite(p, x0=torch.zeros(3, 4, 4)), "x0 [n, c, 4, 4]"),
          "channels": (LAST, lambda p: rewrite(p, x0=torch.zeros(3, 5, 4, 4)), "x0 [n, 2, 4, 4]"),
          "integers": (SHARD, lambda p: rewrite(p, x0=torch.zeros(3, 2, 4, 4).int()),
                       "x0 must be floating"),
          "ids short": (SHARD, lambda p: rewrite(p, prompt_id=torch.arange(2)),
                        "prompt_id [n] (got"),
          "ids float": (SHARD, lambda p: rewrite(p, prompt_id=torch.zeros(3)),
                        "prompt_id must be int64"),
          "ids high": (SHARD, lambda p: rewrite(p, prompt_id=torch.tensor([0, 7, 1])),
                       "7 prompts (got 0 to 7)"),
          "ids low": (SHARD, lambda p: rewrite(p, prompt_id=torch.tensor([0, -1, 1])),
                      "prompts (got -1 to 1)"),
          "extra": (SHARD, lambda p: rewrite(p, more=torch.zeros(3)), "(got more [3], "),
          "no ids": (SHARD, lambda p: save_file({"x0": shard(0)[0]}, p), "prompt_id [n] (got x0 "
                     "[3, 2, 4, 4])"),
          "image size": (SHARD, lambda p: rewrite(p, image=torch.zeros(3, 5, 4, 6)), IMAGE),
          "image few": (SHARD, lambda p: rewrite(p, image=torch.zeros(2, 5, 4, 4)), IMAGE),
          "image rank": (SHARD, lambda p: rewrite(p, image=torch.zeros(3, 4, 4)), IMAGE),
          "image none": (SHARD, lambda p: rewrite(p, image=torch.zeros(3, 0, 4, 4)),
                         "image must be floating-"),
          "image ints": (SHARD, lambda p: rewrite(p, image=torch.zeros(3, 5, 4, 4).int()),
                         "must be floating"), "image nan": (SHARD, lambda p: rewrite(p,
                                                                                     image=image(
                                                                                         0) / 0),
                                                            "image must be finite (got NaN or "
                                                            "inf)"),
          "other name": (SHARD, lambda p: rewrite(p, picture=image(0)), "prompt_id [n] (got"),
          "no prompts": (PROMPTS, Path.unlink, CUT), "a shard": (PROMPTS, rewrite, "codes [7, a], "
                                                                 "null_context [l, dc]"),
          "no text": (TEXT, Path.unlink, CUT), "text short": (TEXT, lambda p: retext(p, 2),
                                                              "context [3, 3, 2], pooled [3, 4] "
                                                              "(got"),
          "text nan": (TEXT, lambda p: retext(p, 3, float("nan")), "context must be finite (got "
                       "NaN or inf)"), "no list": ("prompts.json", Path.unlink,
                                                   "not a complete JSON"),
          "short list": ("prompts.json", lambda p: p.write_text('["prompt 0"]'), "codes [1, a]"),
          "cut JSON": ("provenance.json", lambda p: p.write_bytes(p.read_bytes()[:-4]),
                       "not a complete JSON"),}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_refused_in_one_line_that_names_the_file(folder, damage):
    name, act, message = DAMAGE[damage]
    act(folder / name)
    with pytest.raises(InputError) as error:
        read_folder(folder)
    where = PROMPTS if damage == "short list" else name
    found = str(error.value)
    assert str(folder / where) in found and message in found and "\n" not in found


def test_a_folder_without_shards_or_without_anything_is_refused(folder):
    for path in folder.glob("0*"):
        path.unlink()
    with pytest.raises(InputError, match=r"must have shards such as .* \(got none\)"):
        read_folder(folder)
    with pytest.raises(InputError, match="provenance.json"):
        read_folder(folder.parent / "absent")


def test_what_is_not_finite_is_never_written(folder):
    with pytest.raises(InputError, match="00005-4x4.safetensors: x0 must be finite"):
        write_shard(folder, 5, nan(), torch.arange(3))
    with pytest.raises(InputError, match=": pooled must be finite"):
        write_text(folder, 0, text()["context"][:3], text()["pooled"][:3] / 0)
    with pytest.raises(InputError, match=": null_pooled must be finite"):
        null = prompts()["null"][0], prompts()["null"][1] / 0
        open_folder(folder.parent / "new", PROVENANCE, **{**prompts(), "null": null})
    with pytest.raises(InputError,
                       match=r"00005-4x4.*image \[n, e, h, w\] \(got .*image \[3, 5, 4, 6\]"):
        write_shard(folder, 5, *shard(0), image(1))
    assert not (folder.parent / "new").exists() and len(list(folder.iterdir())) == 9


@pytest.mark.parametrize("row", [0, 1023, 1024, 2060])
def test_every_row_is_checked(folder, row):
    """Rows are looked at in parts of 1,024; also in the second and in the last part."""
    x0 = torch.zeros(2061, 2, 1, 1)
    write_shard(folder, 6, x0, torch.zeros(2061))
    x0[row] = float("inf")
    with pytest.raises(InputError, match="00005-1x1.safetensors: x0 must be finite"):
        write_shard(folder, 5, x0, torch.zeros(2061))


class Kill(BaseException):
    """Stands for SIGKILL: no handler of the code under test may run for it."""


@pytest.mark.parametrize("where", ["write", "fsync", "replace"])
def test_an_interrupted_write_leaves_no_half_file(folder, monkeypatch, where):
    def killed(*args):
        if where == "write":
            with open(args[0], "wb") as file:
                file.write(b"half")
        raise Kill

    def names() -> list[str]:
        return sorted(p.name for p in folder.glob("[!.]*"))

    (folder / "00001-4x6.safetensors").unlink()
    before = names()
    with monkeypatch.context() as m:
        m.setattr(*((Path, "open") if where == "write" else (files.os, where)), killed)
        with pytest.raises(Kill):
            write_shard(folder, 1, *shard(1))
        with pytest.raises(Kill):
            open_folder(folder.parent / "new", PROVENANCE, **prompts())
    assert names() == before and missing_shards(folder, PLAN) == [1]
    assert list(read_folder(folder).buckets) == [(4, 4)]
    write_shard(folder, 1, *shard(1))
    assert torch.equal(read_folder(folder).buckets[4, 6][0],
                       shard(1)[0]) and not list(folder.glob(".*"))
    open_folder(folder.parent / "new", PROVENANCE, **prompts())
    assert len(list((folder.parent / "new").iterdir())) == 3
