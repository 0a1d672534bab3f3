"""Prompts of the toy dataset with a render that fits each, for training data and evaluation."""
from types import ModuleType

import torch
from torch import Tensor

from ladd.core.mmdit import Text
from ladd.data import masks
from ladd.data.prompts import Codec, Plan, Prompts, Shard, null_text
from ladd.data.shards import Latents
from ladd.toy import captions, edits
from ladd.toy.scenes import CODEC, Scenes, ToyConfig, decode, encode, render, sample_scenes

# Seeds of prompts. They are beyond any --seed, so that no prompt is one of training.
VALIDATION, BEST, REPORT, REAL = range(2 ** 40, 2 ** 40 + 4)


def tokens_of(toy: ToyConfig) -> int:
    """Return the text tokens of a prompt of the toy dataset."""
    return grammar(toy).MOST_WORDS[toy.objects]


def grammar(toy: ToyConfig) -> ModuleType:
    """Return the module of the prompts' grammar: instructions or captions."""
    return edits if toy.task == "edit" else captions


def toy_codec(toy: ToyConfig) -> Codec:
    """Return the word embeddings and the latent codec of the toy dataset."""
    def text_of(texts: list[str]) -> Text:
        return Text(*grammar(toy).embed(texts, tokens_of(toy), toy.text_dim))

    return Codec(fresh_text=text_of, text=text_of, decode=lambda x: decode(x.cpu()),
                 encode=lambda images: encode(images.cpu()), release=lambda: None,
                 widths=(toy.text_dim, toy.text_dim), provenance=lambda: {"codec": CODEC})


def toy_plan(toy: ToyConfig, size: int, n: int, seed: int) -> Plan:
    """Return the plan of `size` captions of the toy dataset, `n` per shard, which cycle through the
    image sizes."""
    sizes, count = [(h // 8, w // 8) for h, w in toy.hw], -(-size // n)
    rounds = -(-count // len(sizes))
    parts = draw_prompts(toy, n * rounds * len(sizes), seed + 1)
    prompts, numbers = numbered(parts)
    shards = []
    for i in range(count):
        turn, k = divmod(i, len(sizes))
        part, rows = parts[k], slice(turn * n, (turn + 1) * n)
        image = None if part.image is None else lambda part=part, rows=rows: part.image[rows]
        noise = seed * 10 ** 9 + 10 ** 8 + i * n
        shards.append(Shard(sizes[k], numbers[k][rows], noise, image))
    return Plan(prompts, codes_of(toy, prompts), shards,
                {"seed": seed, "shards": count, "shard": n})


def numbered(parts: list[Prompts]) -> tuple[list[str], list[Tensor]]:
    """Return the distinct captions, sorted, and for each part the numbers of its captions."""
    texts = sorted({text for part in parts for text in part.captions})
    number = {text: i for i, text in enumerate(texts)}
    return texts, [torch.tensor([number[text] for text in part.captions]) for part in parts]


def draw_prompts(toy: ToyConfig, n: int, seed: int, heldout: bool = False) -> list[Prompts]:
    """Return n random prompts, split evenly over the image sizes, as a function of the arguments:
    for editing pairs with instructions, for inpainting captions with masks."""
    parts = []
    for i, hw in enumerate(toy.hw):
        g = torch.Generator().manual_seed(seed * 1009 + i)
        count = n // len(toy.hw) + (i < n % len(toy.hw))
        if toy.task == "edit":
            pairs = edits.edits(count, hw, toy.objects, g)
            source, _ = rendered(pairs.source, hw)
            target, _ = rendered(pairs.target, hw)
            parts.append(Prompts(hw, codes_of(toy, pairs.texts), pairs.texts, target, source,
                                 graded=pairs))
            continue
        scenes = sample_scenes(count, hw, toy.objects, g, heldout)
        codes = captions.draw_captions(scenes.attributes, g, toy.stated)
        texts = [captions.caption(c, toy.objects) for c in codes]
        mask, graded = None, None
        if toy.task == "inpaint":
            mask, graded = masks.masks(count, hw, g), scenes
        latents, image = rendered(scenes, hw, mask)
        parts.append(Prompts(hw, codes, texts, latents, image, mask, graded))
    return parts


def rendered(scenes: Scenes, hw: tuple[int, int],
             mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Return (latents [n, 16, H/8, W/8] of scenes, image conditioning where `mask` is given). 1024
    are rendered at a time, since images take twelve times the memory of latents."""
    latents, conditions = [], []
    for i in range(0, max(1, len(scenes.attributes)), 1024):
        images = render(Scenes(*(t[i:i + 1024] for t in scenes)), hw)
        latents.append(encode(images))
        if mask is not None:
            conditions.append(masks.image_condition(encode, images, mask[i:i + 1024]))
    return torch.cat(latents), torch.cat(conditions) if conditions else None


def codes_of(toy: ToyConfig, texts: list[str]) -> Tensor:
    """Return what captions state, [n, a], -1 where they leave it open; of instructions the kind and
    what is asked, [n, 1 + a]. Texts that differ in what both state exclude each other."""
    if toy.task == "edit":
        found = [edits.parse_instruction(text, toy.objects) for text in texts]
        return torch.tensor([[edits.KINDS.index(i.kind), *i.asked] for i in found])
    return torch.tensor([captions.parse(text, toy.objects) for text in texts])


def toy_latents(toy: ToyConfig, n: int, seed: int) -> Latents:
    """Return n captioned renders as training data, in memory instead of a folder of shards."""
    parts = draw_prompts(toy, n, seed)
    texts, numbers = numbered(parts)
    codec = toy_codec(toy)
    text, null = codec.text(texts), null_text(codec)
    buckets, images = {}, {}
    for part, ids in zip(parts, numbers):
        hw = tuple(part.latents.shape[2:])
        buckets[hw] = part.latents, ids
        if part.image is not None:
            images[hw] = part.image
    return Latents(texts, text.context, text.pooled, codes_of(toy, texts), null, buckets, {},
                   images)
