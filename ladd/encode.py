"""Encode captioned images, pairs or prompt files with SD3's VAE and text encoders, as the latents
and text that train.py reads (ladd/data/shards.py).

    python -m ladd.encode --encoders FOLDER --out DIR --images FOLDER
    python -m ladd.encode --encoders FOLDER --out DIR --jsonl FILE
    python -m ladd.encode --encoders FOLDER --out DIR --prompt-file FILE      text only
    python -m ladd.encode --encoders FOLDER --out DIR --task edit --jsonl FILE
    python -m ladd.encode --encoders FOLDER --out DIR --task inpaint --images FOLDER

FOLDER of --encoders is a StableDiffusion3 pipeline as published. Every image takes the size of the
nearest aspect bucket: it is scaled to cover that size and cropped to its centre, both images of a
pair alike. For inpainting each image gets a random mask. The same command again resumes.

Letters: b images, c channels, H W size in pixels, h w size of the latents, H/8 W/8.
"""
import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ladd.cli import InputError, Parser, must, run_script
from ladd.core import flow
from ladd.data import files, masks, shards
from ladd.data.images import (Captioned, ahead, buckets, find_images, find_listed, find_pairs,
                              measured, of_files, plan, read_image)
from ladd.data.prompts import read_prompts
from ladd.engine.run import compute_dtype, pick_device, progress
from ladd.sd3.encoders import (encode_images, encode_prompts, encoder_identity, fingerprint,
                               load_encoders, load_vae, truncations)

ROWS = 256      # prompts per file: 700 MB of SD3's text. Our choice


# --- text ---

def write_texts(args, prompts: list[str], provenance: dict, device: torch.device) -> None:
    """Create or check the folder and write the text that is missing in it. The encoders are only
    loaded where there is something to encode."""
    out = Path(args.out)
    dtype = compute_dtype("auto", device)
    encoders = None
    if (out / "provenance.json").exists():
        tensors = shards.read_prompt_files(out)[1]
        null = tensors["null_context"], tensors["null_pooled"]
    else:
        encoders = load_encoders(args.encoders, device, dtype, args.t5, args.t5_tokens)
        text = encode_prompts(encoders, [""])
        null = text.context[0], text.pooled[0]
    shards.open_folder(out, provenance, prompts, torch.arange(len(prompts))[:, None], null, ROWS)
    todo = shards.missing_text(out)
    if not todo:
        return
    if encoders is None:
        encoders = load_encoders(args.encoders, device, dtype, args.t5, args.t5_tokens)
    for line in truncations(encoders, prompts):
        print(line)
    bar = progress("text", len(prompts), min(len(prompts), todo[0] * ROWS))
    for index in todo:
        part = prompts[index * ROWS:(index + 1) * ROWS]
        text = encode_prompts(encoders, part, args.batch)
        shards.write_text(out, index, text.context, text.pooled)
        bar.update(len(part))
    bar.close()


# --- images ---

class Sample(NamedTuple):
    """An image or a pair, cut to the size of its bucket."""
    pixels: Tensor          # uint8 [3, H, W], the image whose latents are x0
    source: Tensor | None   # uint8 [3, H, W], of a pair
    mask: Tensor | None     # bool [H, W], True where the image is repainted


def read_sample(image: Captioned, hw: tuple[int, int], key: tuple[int, ...]) -> Sample:
    """Return an image or a pair, cut to hw. Its mask is a function of `key` alone; (): no mask.
    Raises InputError with the reason where a file cannot be used."""
    pixels, *source = of_files(read_image, image, hw)
    mask = masks.masks(1, hw, flow.generator(*key))[0] if key else None
    return Sample(pixels, source[0] if source else None, mask)


def encode_samples(vae, samples: Sequence[Sample]) -> tuple[Tensor, Tensor | None]:
    """Return (x0 [b, c, h, w], image conditioning), both on the CPU in fp16, which is finer than
    bf16 at the unit scale of latents.

    The conditioning of pairs is the latents of the sources [b, c, h, w], of masks
    masks.image_condition [b, 1 + c, h, w], otherwise None.
    """
    pixels, source, mask = (None if parts[0] is None else torch.stack(parts)
                            for parts in zip(*samples))

    def scaled(images: Tensor) -> Tensor:
        return images.to(vae.device) / 127.5 - 1

    def encoded(images: Tensor) -> Tensor:
        return encode_images(vae, images)

    x0 = encoded(scaled(pixels)).half().cpu()
    if source is not None:
        return x0, encoded(scaled(source)).half().cpu()
    if mask is not None:
        image = masks.image_condition(encoded, scaled(pixels), mask.to(vae.device))
        return x0, image.half().cpu()
    return x0, None


def write_shards(args, pieces: list, number: dict[str, int], device: torch.device,
                 pool: ThreadPoolExecutor, skipped: dict[str, str]) -> float:
    """Write the missing shards, with images read ahead. Return the fraction of the time spent
    waiting for images.

    `pieces` are ((H, W), images) of each shard, `number` the index of each caption. The reason why
    a file cannot be used goes to `skipped` and, before its shard is written, to skipped.json. A
    shard without any usable image is not written. A mask depends on --seed, the shard and the place
    in it, so that neither skipped files nor an interruption change other masks.
    """
    out = Path(args.out)
    todo = shards.missing_shards(out, [(h // 8, w // 8) for (h, w), _ in pieces])
    if not todo:
        return 0.0
    vae = load_vae(args.encoders, device)
    began = time.perf_counter()
    waited = 0.0

    def requests() -> Iterator[tuple]:
        for index in todo:
            hw, images = pieces[index]
            for i, image in enumerate(images):
                key = (args.seed, index, i) if args.task == "inpaint" else ()
                yield image, hw, key

    stream = ahead(pool, read_sample, requests(), 4 * args.batch)
    total = sum(len(images) for _, images in pieces)
    left = sum(len(pieces[index][1]) for index in todo)
    bar = progress("images", total, total - left)
    for index in todo:
        images = pieces[index][1]
        parts = []
        ids = []
        skipped_before = len(skipped)
        for start in range(0, len(images), args.batch):
            batch = images[start:start + args.batch]
            samples = []
            asked = time.perf_counter()
            # the batch comes first: zip must not take a result from the stream after its end
            for image, result in zip(batch, stream):
                try:
                    samples.append(result.result())
                    ids.append(number[image.caption])
                except InputError as error:
                    skipped[image.name] = str(error)
            waited += time.perf_counter() - asked
            if samples:
                parts.append(encode_samples(vae, samples))
            bar.update(len(batch))
        if len(skipped) > skipped_before:
            write_skipped(out, skipped)
        if parts:
            x0, image = (None if part[0] is None else torch.cat(part) for part in zip(*parts))
            shards.write_shard(out, index, x0, torch.tensor(ids), image)
    bar.close()
    return waited / (time.perf_counter() - began)


def write_skipped(out: Path, skipped: dict[str, str]) -> None:
    """Write skipped.json, {file: why it cannot be used}."""
    files.publish(out / "skipped.json", lambda path: files.write_json(path, skipped))


# --- the command ---

def parse(argv: list[str]):
    """Return the options. Raises InputError for values that cannot be used together."""
    parser = Parser(prog="python -m ladd.encode", description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--task", default="text", choices=("text", "edit", "inpaint"),
        help="text: text-to-image; edit: instruction-based editing; inpaint: fill the masked area")
    add("--encoders", required=True,
        help="StableDiffusion3 pipeline folder: text encoders, tokenizers, vae")
    add("--out", required=True, help="folder of latents and text to create or complete")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--images",
                        help="folder of images, each with a .txt or .json caption next to it")
    source.add_argument("--jsonl", help='file of {"image": path, "caption": text} lines; for '
                        '--task edit of {"source": path, "target": path, "instruction": text}')
    source.add_argument("--prompt-file",
                        help='.txt or .jsonl ({"prompt": text}) file: encode only text')
    add("--t5", default="device", choices=("device", "cpu", "none"),
        help="where T5 runs; none: its tokens are zeros")
    add("--t5-tokens", type=int, default=256, help="tokens of T5, 1 to 512")
    add("--batch", type=int, default=8, help="images or prompts at a time")
    add("--shard", type=int, default=512,
        help="images per file; an interruption loses the work on one file at most")
    add("--area", type=int, default=1024 ** 2, help="approximate area of an image in pixels")
    add("--multiple", type=int, default=64,
        help="sides are multiples of this, itself a multiple of 16")
    add("--least", type=int, default=1,
        help="sizes with fewer images are merged into the nearest (training needs a batch of each)")
    add("--seed", type=int, help="seed of the masks (--task inpaint), default 0")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"))
    args = parser.parse(argv)
    given = next(flag for flag, value in (("--images", args.images), ("--jsonl", args.jsonl),
                                          ("--prompt-file", args.prompt_file)) if value is not None)
    must(args.task != "edit" or given == "--jsonl",
         f"--task edit requires --jsonl FILE of pairs (got {given})")
    must(args.task != "inpaint" or given != "--prompt-file",
         f"--task inpaint requires --images or --jsonl (got {given})")
    must(args.seed is None or args.task == "inpaint",
         f"--seed requires --task inpaint (got --task {args.task})")
    args.seed = args.seed or 0
    must(args.seed >= 0, f"--seed must be at least 0 (got {args.seed})")
    for name in ("batch", "shard", "least"):
        value = getattr(args, name)
        must(value >= 1, f"--{name} must be at least 1 (got {value})")
    buckets(args.area, args.multiple)   # raises InputError for a bad --area or --multiple
    return args


def main(argv: list[str]) -> None:
    args = parse(argv)
    device = pick_device(args.device)
    provenance = {"source": "ladd.encode",
                  "text": encoder_identity(args.encoders, args.t5, args.t5_tokens)}
    if args.prompt_file is not None:
        found, notes = read_prompts(args.prompt_file)
        prompts = list(dict.fromkeys(found))
        print(*notes, f"{args.prompt_file}: {len(found)} prompts, {len(prompts)} distinct",
              sep="\n")
        write_texts(args, prompts, provenance, device)
    else:
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            encode_all(args, provenance, device, pool)


def encode_all(args, provenance: dict, device: torch.device, pool: ThreadPoolExecutor) -> None:
    """Encode the captions and images of --images or --jsonl, and print a summary."""
    out = Path(args.out)
    what = "pair" if args.task == "edit" else "image"
    skipped = {}
    if args.images is not None:
        source, root = args.images, args.images
        listed, skipped = find_images(source)
    else:
        source, root = args.jsonl, Path(args.jsonl).parent
        listed = find_pairs(source) if args.task == "edit" else find_listed(source)
    with progress("headers", len(listed)) as bar:
        images = measured(listed, pool, skipped, bar.update)
    if not images:
        path, reason = next(iter(skipped.items()), (source, "it has no lines"))
        raise InputError(f"{source} must have at least one {what} to encode "
                         f"(got none; {path}: {reason})")

    prompts = list(dict.fromkeys(image.caption for image in images))
    table = json.dumps([[*of_files(os.path.relpath, image, root), image.caption, image.hw]
                        for image in images])
    provenance["task"] = args.task
    if args.task == "inpaint":
        provenance["seed"] = args.seed
    provenance |= {"vae": fingerprint(args.encoders, ["vae"]), "images": len(images),
                   "list": hashlib.sha256(table.encode()).hexdigest()[:16], "area": args.area,
                   "multiple": args.multiple, "shard": args.shard, "least": args.least}
    write_texts(args, prompts, provenance, device)

    if (out / "skipped.json").exists():     # from shards that are already written
        skipped = files.read_json(out / "skipped.json") | skipped
    pieces = plan(images, args.area, args.multiple, args.least, args.shard)
    number = {prompt: i for i, prompt in enumerate(prompts)}
    waiting = write_shards(args, pieces, number, device, pool, skipped)
    write_skipped(out, skipped)
    summary(out, pieces, skipped, waiting, what)


def summary(out: Path, pieces: list, skipped: dict[str, str], waiting: float, what: str) -> None:
    """Print how many images of each size the folder holds, and which are skipped and why. Raises
    InputError if there is none."""
    counts = Counter()
    enlarged = 0
    for (h, w), images in pieces:
        kept = [image.hw for image in images if image.name not in skipped]
        counts[h, w] += len(kept)
        enlarged += sum(h > hw[0] or w > hw[1] for hw in kept)
    for path, reason in list(skipped.items())[:20]:
        print(f"skipped {path}: {reason}")
    must(counts.total() > 0, f"{out} must get at least one {what} that can be read (got none)")
    print("  ".join(f"{h}x{w}: {n}" for (h, w), n in sorted(counts.items())))
    print(f"{counts.total()} {what}s, {enlarged} of them enlarged, {len(skipped)} skipped "
          f"(skipped.json); waited {waiting:.1%} of the time for {what}s")


if __name__ == "__main__":
    run_script("ladd.encode", main)
