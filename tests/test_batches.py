"""Micro-batches of a step: the same for any number of processes and micro-batches; prefetching."""
import time
from dataclasses import replace

import pytest
import torch
from test_losses import CONFIG

from ladd.core.losses import Draws, Mismatched
from ladd.core.mmdit import Text
from ladd.data import batches
from ladd.data.batches import Batching, MicroBatch, Prefetch, micro_batches
from ladd.data.shards import Latents

BATCH = 12


def latents(codes: torch.Tensor | None = None, with_images: bool = False) -> Latents:
    """Two sizes; latent i is full of i, its prompt is i modulo 20, whose text is full of that;
    its image, if there is one, is full of 100 + i."""
    n = torch.arange(20)
    buckets, first = {}, 0
    for (h, w), size in (((4, 4), 40), ((4, 6), 24)):
        i = torch.arange(first, first + size)
        buckets[h, w] = i[:, None, None, None].expand(size, 2, h, w).float(), i % 20
        first += size
    images = {hw: 100 + x0[:, :1].half() for hw, (x0, _) in buckets.items()} if with_images else {}
    return Latents([str(i) for i in range(20)], n[:, None, None].expand(20, 3, 2).float(),
                   n[:, None].expand(20, 4).float(), n[:, None] if codes is None else codes,
                   (torch.zeros(3, 2), torch.zeros(4)), buckets, {}, images)


def parts(index: int, micro: int, rank: int = 0, world: int = 1, share: float = 0.5,
          **kind) -> list[MicroBatch]:
    batching = Batching(5, BATCH, micro, rank=rank, world=world)
    config = replace(CONFIG, mismatched=share)
    return micro_batches(latents(**kind), batching, config, index, 3, (0, 2, index))


def joined(found: list[MicroBatch], micro: int) -> dict[str, torch.Tensor]:
    """All that the parts hold, rows numbered over the whole batch."""
    out = {name: torch.cat([getattr(p, name) for p in found]) for name in ("x0",)}
    # two, or three with an image
    fields = [k for k, t in enumerate(found[0].text) if t is not None]
    out |= {f"text {k}": torch.cat([p.text[k] for p in found]) for k in fields}
    used = [name for name in Draws._fields if getattr(found[0].draws, name) is not None]
    out |= {f"draws {name}": torch.cat([getattr(p.draws, name) for p in found]) for name in used}
    out["rows"] = torch.cat([p.mismatched.rows + i * micro for i, p in enumerate(found)])
    out["weight"] = torch.cat([p.mismatched.weight for p in found])
    return out | {f"other {k}": torch.cat([p.mismatched.text[k] for p in found]) for k in fields}


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("world, micro", [(1, 4), (1, 1), (2, 6), (2, 3), (3, 2), (12, 1)])
def test_any_split_of_a_batch_is_the_batch(world, micro, share):
    for index in range(4):
        kind = dict(share=share, with_images=index > 1)
        whole = joined(parts(index, BATCH, **kind), BATCH)
        split = [p for rank in range(world) for p in parts(index, micro, rank, world, **kind)]
        assert len(split) == BATCH // micro
        for name, t in joined(split, micro).items():
            assert torch.equal(t, whole[name]), name
        count, = {p.mismatched.count for p in split}                             # one for all
        assert abs(count * len(split) - float(whole["weight"].sum())) < 1e-9


def test_a_part_holds_what_it_should():
    seen = set()
    # an epoch: 3 batches of a size, 1 of the other
    for index in range(4):
        part, = parts(index, BATCH)
        i = part.x0[:, 0, 0, 0].long()
        seen |= set(i.tolist())
        assert torch.equal(part.text.context[:, 0, 0].long(), i % 20)
        assert part.draws.eps_s.shape == part.x0.shape
        assert torch.equal(part.text.pooled[:, 2].long(), i % 20)
        assert part.mismatched.rows.tolist() == [1, 3, 5, 7, 9, 11] and part.mismatched.count == 6
        assert torch.equal(part.mismatched.text.context[:, 1, 1], part.mismatched.text.pooled[:, 0])
        assert (part.mismatched.text.pooled[:, 0].long() != i[part.mismatched.rows] % 20).all()
    held_out = set(range(38, 40)) | set(range(62, 64))
    assert len(seen) == 4 * BATCH and not seen & held_out and latents().holdout == 2
    assert parts(0, BATCH, share=0.0)[0].mismatched is None
    assert not torch.equal(parts(0, BATCH)[0].draws.eps_s[0, 0, 0],
                           parts(1, BATCH)[0].draws.eps_s[0, 0, 0])


def test_a_mismatched_caption_comes_with_the_samples_own_image():
    for index, share in ((0, 0.5), (1, 0.25), (2, 1.0)):
        found = parts(index, BATCH // 2, 1, 2, share, with_images=True)
        part, = found
        i = part.x0[:, 0, 0, 0]
        assert part.text.image is not None and part.mismatched.text.image is not None
        assert torch.equal(part.text.image, (100 + i)[:, None, None,
                                                      None].expand_as(part.x0[:, :1]))
        assert part.mismatched.text.image.dtype == torch.float32
        assert torch.equal(part.mismatched.text.image, part.text.image[part.mismatched.rows])
        assert (part.mismatched.text.pooled[:, 0] != part.text.pooled[part.mismatched.rows,
                                                                      0]).all()
        # nothing else depends on the image
        plain, = parts(index, BATCH // 2, 1, 2, share)
        assert all(map(torch.equal, part.mismatched.text[:2], plain.mismatched.text[:2]))
        assert plain.text.image is plain.mismatched.text.image is None
        assert all(map(torch.equal, part.draws[:-1], plain.draws[:-1]))
        moved = batches.moved(found, torch.device("meta"))[0]
        assert isinstance(moved.mismatched.text, Text) and moved.mismatched.text.image.is_meta


def test_captions_that_fit_everywhere_weigh_nothing():
    """The first ten captions state 0 or 1 in turn, the others nothing, so none is mismatched."""
    codes = torch.full((20, 1), -1)
    codes[:10, 0] = torch.arange(10) % 2
    for index in range(4):
        part, = parts(index, BATCH, share=1.0, codes=codes)
        mine, others = part.x0[:, 0, 0, 0].long() % 20, part.mismatched.text.pooled[:, 0].long()
        states = mine < 10
        assert torch.equal(part.mismatched.weight, states.float())
        assert part.mismatched.count == states.sum().item()
        assert (others < 10)[states].all() and ((mine + others) % 2 == 1)[states].all()
        assert torch.equal(others[~states], mine[~states])


def test_levels_are_those_of_the_students_step():
    config, batching = replace(CONFIG, mismatched=0.0, easy_steps=10), Batching(5, BATCH, BATCH)
    for step, levels in ((9, {0.5, 0.25}), (10, {1.0, 0.75, 0.5, 0.25})):
        found = set()
        for key in range(20):
            part, = micro_batches(latents(), batching, config, 0, step, (key,))
            found |= set(part.draws.sigma_s.tolist())
        assert found == levels


def test_moving_keeps_types_and_values():
    part, = parts(0, BATCH)
    there = batches.moved([part], torch.device("meta"))
    assert isinstance(there, list) and isinstance(there[0], MicroBatch)
    assert isinstance(there[0].text, Text) and isinstance(there[0].mismatched, Mismatched)
    assert there[0].draws.eps_s.is_meta and there[0].mismatched.rows.is_meta
    assert there[0].mismatched.count == part.mismatched.count
    none = part._replace(mismatched=None)
    assert batches.moved(none, torch.device("cpu")).mismatched is None
    # as the teacher's and dpo's
    plain = batches.moved((part.x0, [part.x0], None), torch.device("meta"))
    assert type(plain) is tuple and plain[0].is_meta and plain[1][0].is_meta and plain[2] is None


@pytest.mark.parametrize("ahead", [False, True])
def test_prefetch_yields_each_key_in_turn_and_counts_the_wait(monkeypatch, ahead):
    """With a thread the next one is made while the loop works; without, the loop waits for all of
    it."""
    monkeypatch.setattr(batches, "tree_map_only", lambda kind, function, value: value)
    made = []

    def make(i: int, j: int) -> tuple[int, int]:
        time.sleep(0.03)
        made.append((i, j))
        return i, j
    keys, device = [(i, 2 * i) for i in range(6)], torch.device("cuda" if ahead else "cpu")
    stream, found, most = Prefetch(make, iter(keys), device), [], 0
    for value in stream:
        found.append(value)
        time.sleep(0.06)
        most = max(most, len(made) - len(found))
    assert found == made == keys and most == (1 if ahead else 0)
    assert 0.02 < stream.waited < 0.09 if ahead else stream.waited > 0.17
    assert list(Prefetch(make, [], device)) == []


def test_an_error_in_the_thread_reaches_the_loop(monkeypatch):
    monkeypatch.setattr(batches, "tree_map_only", lambda kind, function, value: value)
    with pytest.raises(ZeroDivisionError):
        list(Prefetch(lambda i: 1 / i, [(0,)], torch.device("cuda")))
