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
import functools
import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from ladd.cli import InputError, Parser, must, one_line, run_script
from ladd.core import flow
from ladd.data import files, masks, shards
from ladd.data.images import (Captioned, ahead, buckets, find_images, find_listed, measure,
                              of_files, plan, read_image)
from ladd.data.prompts import read_prompts
from ladd.engine.run import compute_dtype, pick_device, progress
from ladd.sd3.encoders import (encode_images, encode_prompts, encoder_identity, fingerprint,
                               load_encoders, load_vae, truncations)

ROWS = 256      # prompts per file: 700 MB of SD3's text. Our choice


def write_texts(args, prompts: list[str], provenance: dict, device: torch.device) -> None:
    """Create or check the folder and write the text that is missing in it. The encoders are only
    loaded where there is something to encode."""
    out = Path(args.out)

    @functools.cache
    def encoders():
        dtype = compute_dtype("auto", device)
        return load_encoders(args.encoders, device, dtype, args.t5, args.t5_tokens)

    if (out / "provenance.json").exists():
        tensors = shards.read_prompt_files(out)[1]
        null = tensors["null_context"], tensors["null_pooled"]
    else:
        text = encode_prompts(encoders(), [""])
        null = text.context[0], text.pooled[0]
    shards.open_folder(out, provenance, prompts, torch.arange(len(prompts))[:, None], null, ROWS)
    todo = shards.missing_text(out)
    if not todo:
        return
    for line in truncations(encoders(), prompts):
        print(line)
    with progress("text", len(prompts), min(len(prompts), todo[0] * ROWS)) as bar:
        for index in todo:
            part = prompts[index * ROWS:(index + 1) * ROWS]
            text = encode_prompts(encoders(), part, args.batch)
            shards.write_text(out, index, text.context, text.pooled)
            bar.update(len(part))


def read_sample(image: Captioned, hw: tuple[int, int], key: tuple[int, ...]) -> list[Tensor]:
    """Return the pixels uint8 [3, H, W] of an image or of target and source, cut to hw; with a
    `key` also a mask bool [H, W], a function of it."""
    mask = [masks.masks(1, hw, flow.generator(*key))[0]] if key else []
    return of_files(read_image, image, hw) + mask


def encode_samples(vae, samples: list[list[Tensor]], task: str) -> list[Tensor]:
    """Return x0 [b, c, h, w] and, for pairs, the latents of the sources, with masks their
    image_condition; on the CPU in fp16, which is finer than bf16 at the unit scale of latents."""
    encode = functools.partial(encode_images, vae)
    pixels, *more = (torch.stack(parts).to(vae.device) for parts in zip(*samples))
    pixels = pixels / 127.5 - 1
    latents = [encode(pixels)]
    if task == "edit":
        latents.append(encode(more[0] / 127.5 - 1))
    if task == "inpaint":
        latents.append(masks.image_condition(encode, pixels, more[0]))
    return [t.half().cpu() for t in latents]


def write_shards(args, pieces: list, number: dict[str, int], vae, pool: ThreadPoolExecutor,
                 skipped: dict[str, str]) -> float:
    """Write the missing shards, ((H, W), images) each; return the fraction of the time spent
    waiting for images. `number` is the index of each caption.

    The reason why a file cannot be used goes to `skipped` and, before its shard is written, to
    skipped.json. A shard without any usable image is not written. A mask depends on --seed, the
    shard and the place in it, so that neither skipped files nor an interruption change others.
    """
    out = Path(args.out)
    todo = shards.missing_shards(out, [(h // 8, w // 8) for (h, w), _ in pieces])
    if not todo:
        return 0.0
    began = time.perf_counter()
    waited = 0.0

    def requests() -> Iterator[tuple]:
        for index in todo:
            hw, images = pieces[index]
            for i, image in enumerate(images):
                yield image, hw, (args.seed, index, i) if args.task == "inpaint" else ()

    stream = ahead(pool, read_sample, requests(), 4 * args.batch)
    total = sum(len(images) for _, images in pieces)
    left = sum(len(pieces[index][1]) for index in todo)
    with progress("images", total, total - left) as bar:
        for index in todo:
            images = pieces[index][1]
            parts, ids = [], []
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
                    parts.append(encode_samples(vae, samples, args.task))
                bar.update(len(batch))
            if len(skipped) > skipped_before:
                files.write_json(out / "skipped.json", skipped)
            if parts:
                x0, *image = (torch.cat(part) for part in zip(*parts))
                shards.write_shard(out, index, x0, torch.tensor(ids), *image)
    return waited / (time.perf_counter() - began)


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
    source.add_argument("--images", help="folder of images, each with a .txt, .caption or .json "
                        "caption next to it, or listed in a metadata.jsonl or metadata.csv")
    source.add_argument("--jsonl", help='file of {"image": path, "caption": text} lines; for '
                        '--task edit of {"source": path, "target": path, "instruction": text}')
    source.add_argument("--prompt-file", help=".txt file, or .jsonl, .json or .csv with a prompt, "
                        "text or caption each: encode only text")
    add("--t5", default="device", choices=("device", "cpu", "none"),
        help="where T5 runs; none: its tokens are zeros")
    add("--t5-tokens", type=int, default=256, help="tokens of T5, 1 to 512")
    add("--batch", type=int, default=8, help="images or prompts at a time")
    add("--shard-size", type=int, default=512,
        help="images per file; an interruption loses the work on one file at most")
    add("--area", type=int, default=1024 ** 2, help="approximate area of an image in pixels")
    add("--multiple", type=int, default=64,
        help="sides are multiples of this, itself a multiple of 16")
    add("--least", type=int, default=1,
        help="sizes with fewer images are merged into the nearest (training needs a batch of each)")
    add("--seed", type=int, help="seed of the masks (--task inpaint), default 0")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"))
    args = parser.parse(argv)
    given = next(f"--{name}".replace("_", "-") for name in ("images", "jsonl", "prompt_file")
                 if getattr(args, name) is not None)
    must(args.task != "edit" or given == "--jsonl",
         f"--task edit requires --jsonl FILE of pairs (got {given})")
    must(args.task != "inpaint" or given != "--prompt-file",
         f"--task inpaint requires --images or --jsonl (got {given})")
    must(args.seed is None or args.task == "inpaint",
         f"--seed requires --task inpaint (got --task {args.task})")
    args.seed = args.seed or 0
    must(args.seed >= 0, f"--seed must be at least 0 (got {args.seed})")
    for name in ("batch", "shard_size", "least"):
        value = getattr(args, name)
        must(value >= 1, f"--{name.replace('_', '-')} must be at least 1 (got {value})")
    buckets(args.area, args.multiple)   # raises InputError for a bad --area or --multiple
    return args


def main(argv: list[str]) -> None:
    args = parse(argv)
    device = pick_device(args.device)
    with files.locked(Path(args.out)), ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        encode_all(args, device, pool)


def encode_all(args, device: torch.device, pool: ThreadPoolExecutor) -> None:
    """Encode what the options name, and print how many images of each size the folder holds, and
    what is left out and why."""
    provenance = {"source": "ladd.encode",
                  "text": encoder_identity(args.encoders, args.t5, args.t5_tokens)}
    if args.prompt_file is not None:
        found, notes = read_prompts(args.prompt_file)
        prompts = list(dict.fromkeys(found))
        notes.append(f"{args.prompt_file}: {len(found)} prompts, {len(prompts)} distinct")
        print(*map(one_line, notes), sep="\n")
        return write_texts(args, prompts, provenance, device)
    out = Path(args.out)
    what = "pair" if args.task == "edit" else "image"
    skipped = {}
    if args.images is not None:
        source = root = args.images
        listed, skipped = find_images(source)
    else:
        source, root = args.jsonl, Path(args.jsonl).parent
        listed = find_listed(source, pairs=args.task == "edit")
    images = []
    with progress("headers", len(listed)) as bar:
        for image, result in zip(listed, ahead(pool, measure, zip(listed), 64)):
            try:
                images.append(result.result())
            except InputError as error:
                skipped[image.name] = str(error)
            bar.update()
    if not images:
        path, reason = next(iter(skipped.items()), (source, "it has no lines"))
        raise InputError(f"{source} must have at least one {what} to encode "
                         f"(got none; {path}: {reason})")

    prompts = list(dict.fromkeys(image.caption for image in images))
    table = json.dumps([[*of_files(os.path.relpath, image, root), image.caption, image.hw,
                         image.version] for image in images])
    provenance["task"] = args.task
    if args.task == "inpaint":
        provenance["seed"] = args.seed
    digest = hashlib.sha256(table.encode()).hexdigest()[:16]
    provenance |= {"vae": fingerprint(args.encoders, ["vae"]), "images": len(images),
                   "list": f"{digest} of names, captions, sizes and times", "area": args.area,
                   "multiple": args.multiple, "shard": args.shard_size, "least": args.least}
    pieces = plan(images, args.area, args.multiple, args.least, args.shard_size)
    # a bad VAE is found before the text is encoded, which may take hours
    vae = load_vae(args.encoders, device) if len(shards.shards(out)) < len(pieces) else None
    write_texts(args, prompts, provenance, device)

    if (out / "skipped.json").exists():     # from shards that are already written
        skipped = files.read_json(out / "skipped.json", dict) | skipped
    number = {prompt: i for i, prompt in enumerate(prompts)}
    waiting = write_shards(args, pieces, number, vae, pool, skipped)
    files.write_json(out / "skipped.json", skipped)

    for path, reason in list(skipped.items())[:20]:
        print(one_line(f"skipped {path}: {reason}"))
    counts = Counter()
    enlarged = 0
    for (h, w), part in pieces:
        kept = [image.hw for image in part if image.name not in skipped]
        counts[h, w] += len(kept)
        enlarged += sum(h > hw[0] or w > hw[1] for hw in kept)
    must(counts.total() > 0, f"{out} must get at least one {what} that can be read (got none)")
    print("  ".join(f"{h}x{w}: {n}" for (h, w), n in sorted(counts.items())))
    print(f"{counts.total()} {what}s, {enlarged} of them enlarged, {len(skipped)} skipped "
          f"(skipped.json); waited {waiting:.1%} of the time for {what}s")
    kinds = Counter(str(reason)[:8] for reason in skipped.values())     # "no image", "no capti"
    print(f"skipped: {kinds['no capti']} images without a caption, {kinds['no image']} captions "
          f"without an image, {len(skipped) - kinds['no capti'] - kinds['no image']} unusable")
    if empty := sum(not image.caption.strip() for image in images):
        print(f"warning: {empty} captions are empty; their {what}s train the empty prompt")


if __name__ == "__main__":
    run_script("ladd.encode", main)
