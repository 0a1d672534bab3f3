"""SD3's text encoders and VAE: captioned images, pairs, prompt files as our latents and text (ladd/data.py).

    python -m ladd.encode --encoders FOLDER --out DIR (--images FOLDER | --jsonl FILE | --prompt-file FILE)
    python -m ladd.encode --encoders FOLDER --out DIR --task edit --jsonl FILE
    python -m ladd.encode --encoders FOLDER --out DIR --task inpaint (--images FOLDER | --jsonl FILE)

FOLDER is a StableDiffusion3 pipeline as published. Every image takes the size of the aspect bucket nearest to
it: scaled to cover that, cropped to its centre; a pair's two alike. For inpainting each gets a random mask.
The same command again goes on after a kill. transformers and diffusers are optional packages.
Letters: p prompts, l tokens, d e widths of context and pooled; b images, H W pixels, h w = H/8 W/8.
"""
import hashlib
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor

from ladd import data, flow, tasks
from ladd.config import InputError, Parser, run_script
from ladd.distill import Text
from ladd.images import (Captioned, ahead, buckets, find_images, find_listed, find_pairs, measured, of_files,
                         plan, read_image, read_prompts)
from ladd.run import compute_dtype, pick_device, progress

ROWS = 256      # prompts a file: 700 MB of SD3's text. Our choice


def libraries():
    """(transformers, diffusers). InputError names the package that is missing.

    Both look for a package called kernels. Ours is hidden from them: where the real one is installed too,
    they would import ours in its place and fail.
    """
    ours, sys.modules["kernels"] = sys.modules.get("kernels"), None
    try:
        import diffusers
        import transformers
        from transformers.utils import is_kernels_available
        is_kernels_available()      # the answer is kept
    except ModuleNotFoundError as error:
        raise InputError(f"{error.name}: found no such package, which SD3's text encoders and VAE need; "
                         f"pip install {error.name} (without another torch)") from None
    finally:
        del sys.modules["kernels"]
        if ours:
            sys.modules["kernels"] = ours
    transformers.utils.logging.disable_progress_bar()
    for library in (transformers, diffusers):
        library.utils.logging.set_verbosity_error()     # tables of weights; what matters we check
    return transformers, diffusers


# text

class Encoder(NamedTuple):
    name: str
    tokenizer: Callable
    model: Callable     # may stand on another device than the text
    limit: int          # tokens, the special ones too


class Encoders(NamedTuple):
    clips: list[Encoder]
    t5: list[Encoder]   # one or none
    t5_tokens: int
    width: int          # of T5 and so of context
    device: torch.device


def load_encoders(folder: str | Path, device: torch.device, dtype: torch.dtype, t5: str = "device",
                  t5_tokens: int = 256) -> Encoders:
    """CLIP-L, CLIP-G and T5 of a pipeline folder. t5 "cpu" keeps the last on the host, "none" leaves it out.

    InputError for another t5 or t5_tokens, and for a folder or weights that are not SD3's.
    """
    if t5 not in ("device", "cpu", "none") or not 1 <= t5_tokens <= 512:
        raise InputError(f"t5: found {t5!r} of {t5_tokens} tokens, device, cpu or none of 1 to 512 accepted")
    transformers, _ = libraries()
    folder, clip = Path(folder), transformers.CLIPTextModelWithProjection
    parts = [("CLIP-L", "", clip, transformers.CLIPTokenizer, device),
             ("CLIP-G", "_2", clip, transformers.CLIPTokenizer, device)]
    parts += [("T5", "_3", transformers.T5EncoderModel, transformers.T5TokenizerFast,
               torch.device("cpu") if t5 == "cpu" else device)] * (t5 != "none")
    loaded = []
    for name, ending, kind, tokenizer, where in parts:
        words = _load(tokenizer, folder / f"tokenizer{ending}")
        model = _load(kind, folder / f"text_encoder{ending}", dtype=dtype).to(where)
        limit = t5_tokens if name == "T5" else model.config.max_position_embeddings
        loaded.append(Encoder(name, words, model, limit))
    wide, sizes = text_width(folder), [encoder.model.config.hidden_size for encoder in loaded[:2]]
    if sum(sizes) > wide:
        raise InputError(f"{folder}: found CLIPs of widths {sizes}, together at most T5's {wide} accepted")
    return Encoders(loaded[:2], loaded[2:], t5_tokens, wide, device)


def _load(kind, folder: Path, **options):
    """kind.from_pretrained(folder), a network where there are options; InputError unless all is there."""
    name, files = kind.__name__, {path.name: path for path in folder.glob("*.json")}
    if not files or not options and not {"tokenizer.json", "vocab.json"} & set(files):
        raise InputError(f"{folder}: found no {name}, the folder of one in an SD3 pipeline accepted")
    for path in files.values():
        data.read_json(path)        # the tokenizers' own error for a broken one has no type
    if not options:
        return kind.from_pretrained(folder, local_files_only=True)
    try:
        model, info = kind.from_pretrained(folder, local_files_only=True, use_safetensors=True,
                                           output_loading_info=True, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{folder}: found no whole {name} ({str(error).strip().splitlines()[0]})") from None
    if missing := sorted(info["missing_keys"]):     # they would be random numbers
        raise InputError(f"{folder}: found no {missing[0]}, all weights of {name} accepted")
    return model.requires_grad_(False).eval()


def text_width(folder: Path) -> int:
    """Width of T5's text, known without T5 too."""
    for part, key in (("text_encoder_3", "d_model"), ("transformer", "joint_attention_dim")):
        path = folder / part / "config.json"
        if path.exists() and key in (config := data.read_json(path)):
            return config[key]
    raise InputError(f"{folder}: found no width of T5's text, d_model in text_encoder_3/config.json or "
                     "joint_attention_dim in transformer/config.json accepted")


@torch.no_grad()
def encode_prompts(encoders: Encoders, prompts: Sequence[str], batch: int = 16,
                   report: Callable[[str], None] = print) -> Text:
    """context [p, l, d], pooled [p, e] as SD3 attends to them (Esser et al. 2024, Sec. 4 and Fig. 2).

    The CLIPs' last but one hidden states, without final norm, side by side and zero-padded to T5's width;
    then T5's tokens; no mask. Without T5 its t5_tokens rows are zeros, as in diffusers. pooled: both CLIPs'.
    Longer prompts are cut; `report` gets a line for each encoder that cut some. InputError without a prompt.
    """
    if not prompts:
        raise InputError("prompts: found none, at least one accepted")
    for line in truncations(encoders, prompts):
        report(line)
    parts = [_encode(encoders, prompts[i:i + batch]) for i in range(0, len(prompts), batch)]
    return Text(*(torch.cat(part) for part in zip(*parts)))


def _encode(encoders: Encoders, prompts: Sequence[str]) -> Text:
    run = lambda encoder, **options: encoder.model(encoder.tokenizer(
        list(prompts), padding="max_length", max_length=encoder.limit, truncation=True,
        return_tensors="pt").input_ids.to(encoder.model.device), **options)
    clips = [run(encoder, output_hidden_states=True) for encoder in encoders.clips]
    context = torch.cat([out.hidden_states[-2] for out in clips], -1)
    context = F.pad(context, (0, encoders.width - context.shape[-1]))       # [p, 77, d]
    t5 = [run(encoder)[0].to(encoders.device) for encoder in encoders.t5]
    t5 = t5[0] if t5 else context.new_zeros(len(context), encoders.t5_tokens, encoders.width)
    return Text(torch.cat([context, t5], 1), torch.cat([out.text_embeds for out in clips], -1))


def truncations(encoders: Encoders, prompts: Sequence[str]) -> list[str]:
    """A line for each encoder that cuts some of the prompts: how many, and the first of them."""
    lines = []
    for encoder in [*encoders.clips, *encoders.t5]:
        lengths = [len(ids) for ids in encoder.tokenizer(list(prompts), verbose=False).input_ids]
        long = [i for i, length in enumerate(lengths) if length > encoder.limit]
        if long:
            lines.append(f"{len(long)} of {len(prompts)} prompts are cut to {encoder.name}'s {encoder.limit} "
                         f"tokens; the first, of {lengths[long[0]]}: {prompts[long[0]][:60]!r}")
    return lines


def encoder_identity(folder: str | Path, t5: str = "device", t5_tokens: int = 256) -> str:
    """What tells these encoders' text from others'; where they run and in which dtype is no part of it."""
    used = ["", "_2", *["_3"] * (t5 != "none")]
    digest = fingerprint(folder, [part + ending for part in ("text_encoder", "tokenizer") for ending in used])
    return f"{digest} {'without' if t5 == 'none' else 'with'} T5, {t5_tokens} tokens"


def fingerprint(folder: str | Path, parts: Sequence[str]) -> str:
    """16 digits of the files in these subfolders: names, sizes, first and last 64 KiB (weights are huge)."""
    digest = hashlib.sha256()
    for part in parts:
        paths = [path for path in sorted((Path(folder) / part).glob("*")) if ".fp16." not in path.name
                 and path.suffix in (".json", ".txt", ".model", ".safetensors")]
        if not paths:
            raise InputError(f"{folder}: found no {part}, a StableDiffusion3 pipeline folder accepted")
        for path in paths:
            size = path.stat().st_size
            digest.update(f"{part}/{path.name} {size}\n".encode())
            with path.open("rb") as file:
                digest.update(file.read(2 ** 16))
                file.seek(max(0, size - 2 ** 16))
                digest.update(file.read())
    return digest.hexdigest()[:16]


def cached_text(path: str | Path, identity: str, prompts: Sequence[str],
                encode: Callable[[list[str]], Text]) -> Text:
    """Text of the prompts in bf16, on the CPU, from a file of earlier ones; `encode` gives what it lacks.

    InputError for the file of other encoders than `identity` (encoder_identity).
    """
    path, key = Path(path), lambda name, prompt: f"{name}.{hashlib.sha256(prompt.encode()).hexdigest()}"
    tensors, about = data.read_tensors(path) if path.exists() else ({}, {"encoders": identity})
    if about.get("encoders") != identity:
        raise InputError(f"{path}: found text of the encoders {about.get('encoders')}, {identity} accepted")
    if new := [prompt for prompt in dict.fromkeys(prompts) if key("context", prompt) not in tensors]:
        text = Text(*(t.to("cpu", torch.bfloat16) for t in encode(new)))
        for name in Text._fields:
            tensors |= {key(name, prompt): t for prompt, t in zip(new, getattr(text, name))}
        data.publish(path, lambda path: data.write_tensors(path, tensors, {"encoders": identity}))
    return Text(*(torch.stack([tensors[key(name, prompt)] for prompt in prompts]) for name in Text._fields))


# images

def load_vae(folder: str | Path, device: torch.device, dtype: torch.dtype = torch.float32):
    """The VAE of a pipeline folder; InputError if it is none."""
    _, diffusers = libraries()
    vae = _load(diffusers.AutoencoderKL, Path(folder) / "vae", torch_dtype=dtype, low_cpu_mem_usage=False)
    return vae.to(device)


def to_x0(vae, z: Tensor) -> Tensor:
    """x0 = (z - shift) * scale of what the VAE's encoder gives; shift and scale are its configuration's."""
    return (z.float() - (vae.config.shift_factor or 0)) * vae.config.scaling_factor


def from_x0(vae, x0: Tensor) -> Tensor:
    """z = x0 / scale + shift, what the VAE's decoder takes."""
    return x0.float() / vae.config.scaling_factor + (vae.config.shift_factor or 0)


@torch.no_grad()
def encode_images(vae, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """x0 [b, c, h, w] fp32 of images [b, 3, H, W] in [-1, 1]: a sample, or without generator the mean."""
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] % factor or images.shape[3] % factor:
        raise InputError(f"images: found {list(images.shape)}, [b, 3, H, W] by {factor} accepted")
    posterior = vae.encode(images.to(vae.device, vae.dtype)).latent_dist
    return to_x0(vae, posterior.sample(generator) if generator else posterior.mode())


@torch.no_grad()
def decode_latents(vae, x0: Tensor, tiled: bool = False) -> Tensor:
    """Images [b, 3, H, W] fp32 in [-1, 1]. Tiles, overlapping, of the VAE's sample_size bound the memory but
    are normalised each for itself: near the whole picture's values, not equal."""
    vae.use_tiling = tiled
    return vae.decode(from_x0(vae, x0).to(vae.device, vae.dtype)).sample.float().clamp(-1, 1)


# the command

def write_texts(args, prompts: list[str], provenance: dict, device: torch.device) -> None:
    """Makes or checks the folder and writes the text that it lacks; loads the encoders only for that."""
    out = Path(args.out)
    dtype = compute_dtype("auto", device)
    load = lambda: load_encoders(args.encoders, device, dtype, args.t5, args.t5_tokens)
    encoders = None if (out / "provenance.json").exists() else load()
    if encoders:
        null = [part[0] for part in encode_prompts(encoders, [""])]
    else:
        tensors = data.read_prompts(out)[1]
        null = tensors["null_context"], tensors["null_pooled"]
    data.open_folder(out, provenance, prompts, torch.arange(len(prompts))[:, None], null, ROWS)
    if not (todo := data.missing_text(out)):
        return
    encoders = encoders or load()
    print(*(line + "\n" for line in truncations(encoders, prompts)), sep="", end="")
    bar = progress("text", len(prompts), min(len(prompts), todo[0] * ROWS))
    for index in todo:
        part = prompts[index * ROWS:(index + 1) * ROWS]
        data.write_text(out, index, *encode_prompts(encoders, part, args.batch, report=lambda line: None))
        bar.update(len(part))
    bar.close()


class Sample(NamedTuple):
    pixels: Tensor          # uint8 [3, H, W], what the latents are of
    source: Tensor | None   # uint8 [3, H, W], of a pair
    mask: Tensor | None     # bool [H, W], True is repainted


def read_sample(image: Captioned, hw: tuple[int, int], key: tuple[int, ...]) -> Sample:
    """An image or a pair, cut to hw; its mask is a function of `key` alone, () for none. InputError says why
    it is refused."""
    pixels, *source = of_files(read_image, image, hw)
    mask = tasks.masks(1, hw, flow.generator(*key))[0] if key else None
    return Sample(pixels, source[0] if source else None, mask)


def encode_samples(vae, samples: Sequence[Sample]) -> tuple[Tensor, Tensor | None]:
    """x0 [b, c, h, w] of the samples' pixels, and the image beside it: for pairs the latents of the sources
    [b, c, h, w], for masks tasks.beside [b, 1 + c, h, w]. Both fp16 on the CPU: at the latents' unit scale
    finer than bf16."""
    pixels, source, mask = (None if part[0] is None else torch.stack(part) for part in zip(*samples))
    encoded = lambda x: encode_images(vae, x)
    scaled = lambda x: x.to(vae.device) / 127.5 - 1
    x0, image = encoded(scaled(pixels)), None
    if source is not None:
        image = encoded(scaled(source))
    elif mask is not None:
        image = tasks.beside(encoded, scaled(pixels), mask.to(vae.device))
    return x0.half().cpu(), image if image is None else image.half().cpu()


def write_shards(args, pieces: list, number: dict[str, int], device: torch.device, pool: ThreadPoolExecutor,
                 skipped: dict[str, str]) -> float:
    """Writes the missing shards, images read ahead; returns the share of time spent waiting for images.

    What cannot be read goes to `skipped` and, before its shard, to skipped.json. A shard of which nothing
    could be read is not written. Masks follow from --seed, the shard and the place in it, so that what is
    skipped, or was made before a kill, changes none.
    """
    out, waited = Path(args.out), 0.0
    todo = data.missing_shards(out, [(h // 8, w // 8) for (h, w), _ in pieces])
    if not todo:
        return 0.0
    vae, began = load_vae(args.encoders, device), time.perf_counter()       # fp32, as diffusers' trainers do

    def wanted() -> Iterator[tuple]:
        for index in todo:
            for i, image in enumerate(pieces[index][1]):
                yield image, pieces[index][0], (args.seed, index, i) if args.task == "inpaint" else ()

    stream = ahead(pool, read_sample, wanted(), 4 * args.batch)
    total, left = (sum(len(pieces[i][1]) for i in which) for which in (range(len(pieces)), todo))
    bar = progress("images", total, total - left)
    for index in todo:
        images, parts, ids, before = pieces[index][1], [], [], len(skipped)
        for start in range(0, len(images), args.batch):
            samples, asked = [], time.perf_counter()
            for image, result in zip(images[start:start + args.batch], stream):
                try:
                    samples.append(result.result())
                    ids.append(number[image.caption])
                except InputError as error:
                    skipped[image.name] = str(error)
            waited += time.perf_counter() - asked
            if samples:
                parts.append(encode_samples(vae, samples))
            bar.update(min(args.batch, len(images) - start))
        if len(skipped) > before:
            data.publish(out / "skipped.json", lambda path: data.write_json(path, skipped))
        if parts:
            x0, image = (None if part[0] is None else torch.cat(part) for part in zip(*parts))
            data.write_shard(out, index, x0, torch.tensor(ids), image)
    bar.close()
    return waited / (time.perf_counter() - began)


def parse(argv: list[str]):
    parser = Parser(prog="python -m ladd.encode", description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--task", default="text", choices=("text", "edit", "inpaint"), help="what a network learns from it: "
        "pictures from captions; from a source and an instruction the target; what a mask repaints")
    add("--encoders", required=True, help="StableDiffusion3 pipeline folder: text encoders, tokenizers, vae")
    add("--out", required=True, help="folder of latents and text, made or completed")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--images", help="folder of images with a .txt or .json caption beside each")
    source.add_argument("--jsonl", help='file of {"image": path, "caption": text} lines; for --task edit of '
                        '{"source": path, "target": path, "instruction": text}')
    source.add_argument("--prompt-file", help='.txt or .jsonl ({"prompt": text}) file: the text part alone')
    add("--t5", default="device", choices=("device", "cpu", "none"), help="where T5 runs, if at all")
    add("--t5-tokens", type=int, default=256, help="tokens of T5, 1 to 512")
    add("--batch", type=int, default=8, help="images or prompts at once")
    add("--shard", type=int, default=512, help="images a file; a kill loses at most one file's work")
    add("--area", type=int, default=1024 ** 2, help="pixels of an image, about")
    add("--multiple", type=int, default=64, help="sides are multiples of this multiple of 16")
    add("--least", type=int, default=1,
        help="a size of fewer images gives them to the nearest (training needs a batch of each)")
    add("--seed", type=int, help="of the masks of --task inpaint (0)")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"))
    args = parser.parse(argv)
    if args.task == "edit" and not args.jsonl:
        raise InputError(f"--task edit: found {'--images' if args.images else '--prompt-file'}, --jsonl FILE "
                         "of pairs accepted")
    if args.task == "inpaint" and args.prompt_file:
        raise InputError("--task inpaint: found --prompt-file, --images or --jsonl accepted")
    if args.seed is not None and (args.task != "inpaint" or args.seed < 0):
        raise InputError(f"--seed: found {args.seed} with --task {args.task}, at least 0 with --task inpaint "
                         "accepted")
    args.seed = args.seed or 0
    for name in ("batch", "shard", "least"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name}: found {getattr(args, name)}, at least 1 accepted")
    buckets(args.area, args.multiple)               # refuses both early
    return args


def main(argv: list[str]) -> None:
    args = parse(argv)
    out, device = Path(args.out), pick_device(args.device)
    provenance = {"source": "ladd.encode", "text": encoder_identity(args.encoders, args.t5, args.t5_tokens)}
    if args.prompt_file:
        found, notes = read_prompts(args.prompt_file)
        prompts = list(dict.fromkeys(found))
        print(*notes, f"{args.prompt_file}: {len(found)} prompts, {len(prompts)} distinct", sep="\n")
        return write_texts(args, prompts, provenance, device)
    find, what = (find_pairs, "pair") if args.task == "edit" else (find_listed, "image")
    listed, skipped = find_images(args.images) if args.images else (find(args.jsonl), {})
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        images = measured(listed, pool, skipped)
        if not images:
            path, reason = next(iter(skipped.items()), (args.jsonl, "found no line"))
            raise InputError(f"{args.images or args.jsonl}: found no {what} to encode ({path}: {reason}), "
                             "at least one accepted")
        root, prompts = args.images or Path(args.jsonl).parent, list(dict.fromkeys(i.caption for i in images))
        names = lambda image: of_files(os.path.relpath, image, root)
        table = json.dumps([[*names(image), image.caption, image.hw] for image in images])
        provenance |= {"task": args.task, **({"seed": args.seed} if args.task == "inpaint" else {}),
                       "vae": fingerprint(args.encoders, ["vae"]), "images": len(images),
                       "list": hashlib.sha256(table.encode()).hexdigest()[:16]}
        provenance |= {name: getattr(args, name) for name in ("area", "multiple", "shard", "least")}
        write_texts(args, prompts, provenance, device)
        if (out / "skipped.json").exists():     # of the shards that are there
            skipped = data.read_json(out / "skipped.json") | skipped
        pieces = plan(images, args.area, args.multiple, args.least, args.shard)
        number = {prompt: i for i, prompt in enumerate(prompts)}
        share = write_shards(args, pieces, number, device, pool, skipped)
    data.publish(out / "skipped.json", lambda path: data.write_json(path, skipped))
    summary(out, pieces, skipped, share, what)


def summary(out: Path, pieces: list, skipped: dict[str, str], share: float, what: str) -> None:
    """Prints what the folder holds by size, and what it does not hold and why; InputError if it is empty."""
    counts, enlarged = Counter(), 0
    for (h, w), images in pieces:
        kept = [image.hw for image in images if image.name not in skipped]
        counts[h, w] += len(kept)
        enlarged += sum(h > hw[0] or w > hw[1] for hw in kept)
    for path, reason in list(skipped.items())[:20]:
        print(f"skipped {path}: {reason}")
    if not counts.total():
        raise InputError(f"{out}: found no {what} that could be read, at least one accepted")
    print("  ".join(f"{h}x{w}: {n}" for (h, w), n in sorted(counts.items())))
    print(f"{counts.total()} {what}s, {enlarged} of them enlarged, {len(skipped)} skipped (skipped.json); "
          f"waited {share:.1%} of the time for {what}s")


if __name__ == "__main__":
    run_script("ladd.encode", main)
