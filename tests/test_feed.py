"""What a step reads: the same for any number of processes and micro-batches; made ahead, waiting counted."""
import time
from dataclasses import replace

import pytest
import torch
from test_distill import CONFIG

from ladd import feed
from ladd.data import Latents
from ladd.distill import Draws, Text, TextImage, Wrong
from ladd.feed import Feed, Part

BATCH = 12


def latents(codes: torch.Tensor | None = None, beside: bool = False) -> Latents:
    """Two sizes; latent i is full of i, its prompt is i modulo 20, whose text is full of that; the image
    beside it, if there is one, full of 100 + i."""
    n = torch.arange(20)
    buckets, first = {}, 0
    for (h, w), size in (((4, 4), 40), ((4, 6), 24)):
        i = torch.arange(first, first + size)
        buckets[h, w], first = (i[:, None, None, None].expand(size, 2, h, w).float(), i % 20), first + size
    images = {hw: 100 + x0[:, :1].half() for hw, (x0, _) in buckets.items()} if beside else {}
    return Latents([str(i) for i in range(20)], n[:, None, None].expand(20, 3, 2).float(),
                   n[:, None].expand(20, 4).float(), n[:, None] if codes is None else codes,
                   (torch.zeros(3, 2), torch.zeros(4)), buckets, {}, images)


def parts(index: int, micro: int, rank: int = 0, world: int = 1, share: float = 0.5, **kind) -> list[Part]:
    return feed.parts(latents(**kind), index, 3, (0, 2, index), 5, BATCH, micro,
                      replace(CONFIG, misaligned=share), rank, world)


def joined(found: list[Part], micro: int) -> dict[str, torch.Tensor]:
    """All that the parts hold, rows numbered over the whole batch."""
    out = {name: torch.cat([getattr(p, name) for p in found]) for name in ("x0",)}
    fields = range(len(found[0].text))                                          # two, or three with an image
    out |= {f"text {k}": torch.cat([p.text[k] for p in found]) for k in fields}
    out |= {f"draws {name}": torch.cat([getattr(p.draws, name) for p in found]) for name in Draws._fields}
    out["rows"] = torch.cat([p.wrong.rows + i * micro for i, p in enumerate(found)])
    out["weight"] = torch.cat([p.wrong.weight for p in found])
    return out | {f"wrong {k}": torch.cat([p.wrong.text[k] for p in found]) for k in fields}


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("world, micro", [(1, 4), (1, 1), (2, 6), (2, 3), (3, 2), (12, 1)])
def test_any_split_of_a_batch_is_the_batch(world, micro, share):
    for index in range(4):
        kind = dict(share=share, beside=index > 1)
        whole = joined(parts(index, BATCH, **kind), BATCH)
        split = [p for rank in range(world) for p in parts(index, micro, rank, world, **kind)]
        assert len(split) == BATCH // micro
        for name, t in joined(split, micro).items():
            assert torch.equal(t, whole[name]), name
        count, = {p.wrong.count for p in split}                                  # one for all
        assert abs(count * len(split) - float(whole["weight"].sum())) < 1e-9


def test_a_part_holds_what_it_should():
    seen = set()
    for index in range(4):                               # an epoch: 3 batches of a size, 1 of the other
        part, = parts(index, BATCH)
        i = part.x0[:, 0, 0, 0].long()
        seen |= set(i.tolist())
        assert torch.equal(part.text.context[:, 0, 0].long(), i % 20)
        assert part.draws.eps_s.shape == part.x0.shape
        assert torch.equal(part.text.pooled[:, 2].long(), i % 20)
        assert part.wrong.rows.tolist() == [1, 3, 5, 7, 9, 11] and part.wrong.count == 6
        assert torch.equal(part.wrong.text.context[:, 1, 1], part.wrong.text.pooled[:, 0])
        assert (part.wrong.text.pooled[:, 0].long() != i[part.wrong.rows] % 20).all()
    held_out = set(range(38, 40)) | set(range(62, 64))
    assert len(seen) == 4 * BATCH and not seen & held_out and latents().holdout == 2
    assert parts(0, BATCH, share=0.0)[0].wrong is None
    assert not torch.equal(parts(0, BATCH)[0].draws.eps_s[0, 0, 0], parts(1, BATCH)[0].draws.eps_s[0, 0, 0])


def test_a_caption_that_does_not_fit_stands_beside_the_samples_own_image():
    for index, share in ((0, 0.5), (1, 0.25), (2, 1.0)):
        found = parts(index, BATCH // 2, 1, 2, share, beside=True)
        part, = found
        i = part.x0[:, 0, 0, 0]
        assert isinstance(part.text, TextImage) and isinstance(part.wrong.text, TextImage)
        assert torch.equal(part.text.image, (100 + i)[:, None, None, None].expand_as(part.x0[:, :1]))
        assert part.wrong.text.image.dtype == torch.float32
        assert torch.equal(part.wrong.text.image, part.text.image[part.wrong.rows])
        assert (part.wrong.text.pooled[:, 0] != part.text.pooled[part.wrong.rows, 0]).all()
        plain, = parts(index, BATCH // 2, 1, 2, share)                   # nothing else depends on the image
        assert all(map(torch.equal, part.wrong.text[:2], plain.wrong.text)) and isinstance(plain.text, Text)
        assert all(map(torch.equal, part.draws, plain.draws))
        moved = feed.moved(found, torch.device("meta"))[0]
        assert isinstance(moved.wrong.text, TextImage) and moved.wrong.text.image.is_meta


def test_captions_that_fit_everywhere_weigh_nothing():
    """The first ten captions state 0 or 1 in turn, the others nothing, so they have no misfit."""
    codes = torch.full((20, 1), -1)
    codes[:10, 0] = torch.arange(10) % 2
    for index in range(4):
        part, = parts(index, BATCH, share=1.0, codes=codes)
        mine, others = part.x0[:, 0, 0, 0].long() % 20, part.wrong.text.pooled[:, 0].long()
        states = mine < 10
        assert torch.equal(part.wrong.weight, states.float()) and part.wrong.count == states.sum().item()
        assert (others < 10)[states].all() and ((mine + others) % 2 == 1)[states].all()
        assert torch.equal(others[~states], mine[~states])


def test_levels_are_those_of_the_students_step():
    config = replace(CONFIG, misaligned=0.0, easy_steps=10)
    for step, levels in ((9, {0.5, 0.25}), (10, {1.0, 0.75, 0.5, 0.25})):
        found = {s for key in range(20) for s in
                 feed.parts(latents(), 0, step, (key,), 5, BATCH, BATCH, config)[0].draws.sigma_s.tolist()}
        assert found == levels


def test_moving_keeps_types_and_values():
    part, = parts(0, BATCH)
    there = feed.moved([part], torch.device("meta"))
    assert isinstance(there, list) and isinstance(there[0], Part) and isinstance(there[0].wrong, Wrong)
    assert isinstance(there[0].text, Text) and there[0].draws.eps_s.is_meta and there[0].wrong.rows.is_meta
    assert there[0].wrong.count == part.wrong.count
    none = part._replace(wrong=None)
    assert feed.moved(none, torch.device("cpu")).wrong is None
    plain = feed.moved((part.x0, [part.x0], None), torch.device("meta"))     # as the teacher's and dpo's
    assert type(plain) is tuple and plain[0].is_meta and plain[1][0].is_meta and plain[2] is None


@pytest.mark.parametrize("ahead", [False, True])
def test_the_feed_gives_each_key_in_turn_and_counts_the_wait(monkeypatch, ahead):
    """With a thread the next one is made while the loop works; without, the loop waits for all of it."""
    monkeypatch.setattr(feed, "pinned", lambda value: value)
    monkeypatch.setattr(feed, "moved", lambda value, device: value)
    made = []

    def make(i: int, j: int) -> tuple[int, int]:
        time.sleep(0.03)
        made.append((i, j))
        return i, j
    keys, device = [(i, 2 * i) for i in range(6)], torch.device("cuda" if ahead else "cpu")
    stream, found, most = Feed(make, iter(keys), device), [], 0
    for value in stream:
        found.append(value)
        time.sleep(0.06)
        most = max(most, len(made) - len(found))
    assert found == made == keys and most == (1 if ahead else 0)
    assert 0.02 < stream.waited < 0.09 if ahead else stream.waited > 0.17
    assert list(Feed(make, [], device)) == []


def test_an_error_in_the_thread_reaches_the_loop(monkeypatch):
    monkeypatch.setattr(feed, "pinned", lambda value: value)
    with pytest.raises(ZeroDivisionError):
        list(Feed(lambda i: 1 / i, [(0,)], torch.device("cuda")))
