"""SD3's text encoders and VAE as published: prompts to text, images to latents and back.

transformers and diffusers are optional packages, imported here. Letters: p prompts, l tokens, d
width of context, e width of pooled, b images, H W size in pixels, h w size of the latents, H/8 W/8.
"""
import hashlib
import reprlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache as cache_of, partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ladd.cli import InputError, must
from ladd.core.mmdit import Text, cat
from ladd.data.files import content_hash, is_finite, read_json, read_tensors, write_tensors
from ladd.data.prompts import Codec


def sd3_codec(folder: str | Path, device: torch.device, t5: str, t5_tokens: int,
              cache: Path | None = None, tiled: bool = False) -> Codec:
    """Return the encoders and VAE of a pipeline folder, each of which is loaded when first needed.
    `embed` remembers text in memory and in the file `cache`, and then needs no encoders."""
    folder = Path(folder)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    widths = text_widths(folder)
    config = folder / "text_encoder" / "config.json"
    tokens = whole_number(config, "max_position_embeddings") + t5_tokens
    known = {}

    identity = cache_of(partial(encoder_identity, folder, t5, t5_tokens))
    encoders = cache_of(partial(load_encoders, folder, device, dtype, t5, t5_tokens))
    vae = cache_of(partial(load_vae, folder, device))

    def fresh_text(prompts: list[str]) -> Text:
        for line in truncations(encoders(), prompts):
            print(line)
        return encode_prompts(encoders(), prompts).to("cpu", torch.bfloat16)

    def text(prompts: list[str]) -> Text:
        keys = {prompt: hashlib.sha256(prompt.encode()).hexdigest() for prompt in prompts}
        new = [prompt for prompt, key in keys.items() if f"context.{key}" not in known]
        if new and cache and cache.exists():
            tensors, about = read_tensors(cache)
            must(about.get("encoders") == identity(), f"{cache} must hold text of the encoders "
                 f"{identity()} (got {about.get('encoders')})")
            for name, tensor in tensors.items():
                wanted = [widths[1]] if name[:7] == "pooled." else [tokens, widths[0]]
                must(list(tensor.shape) == wanted and tensor.dtype == torch.bfloat16
                     and is_finite(tensor) and name.replace("context", "pooled") in tensors,
                     f"{cache}: {name} must be {wanted} in bf16, finite, and have its pooled text "
                     f"(got {list(tensor.shape)} in {tensor.dtype})")
            known.update(tensors)
            new = [prompt for prompt in new if f"context.{keys[prompt]}" not in known]
        if new:
            found = fresh_text(new)
            for prompt, context, pooled in zip(new, found.context, found.pooled):
                known.update({f"context.{keys[prompt]}": context, f"pooled.{keys[prompt]}": pooled})
            if cache:
                write_tensors(cache, known, {"encoders": identity()})
        return Text(*(torch.stack([known[f"{name}.{keys[prompt]}"] for prompt in prompts])
                      for name in ("context", "pooled")))

    def decode(x0: Tensor) -> Tensor:
        return decode_latents(vae(), x0.to(device), tiled).cpu()

    def encode(images: Tensor) -> Tensor:
        return encode_images(vae(), images).cpu()

    def release() -> None:
        encoders.cache_clear()
        torch.cuda.empty_cache()    # nothing on a CPU

    return Codec(fresh_text, text, decode, encode, release, widths,
                 lambda: {"encoders": identity()})


def libraries():
    """Return the modules (transformers, diffusers)."""
    # Both look for a package called kernels. Ours is hidden from them: where the real one is also
    # installed, they would import ours instead and fail.
    ours = sys.modules.get("kernels")
    sys.modules["kernels"] = None
    try:
        import diffusers
        import transformers
        from transformers.utils import is_kernels_available
        is_kernels_available()      # transformers caches the answer
    except ModuleNotFoundError as error:
        raise InputError(f"{error.name}: SD3's text encoders and VAE need this package; "
                         f"pip install {error.name} (without another torch)") from None
    finally:
        del sys.modules["kernels"]
        if ours:
            sys.modules["kernels"] = ours
    transformers.utils.logging.disable_progress_bar()
    for library in (transformers, diffusers):
        library.utils.logging.set_verbosity_error()   # no tables of weights: load_part checks them
    return transformers, diffusers


@contextmanager
def foreign(folder: Path, name: str) -> Iterator[None]:
    """Turn what the libraries raise for a published folder into an InputError. Nothing else may
    catch every Exception: they raise one of any type for files of wrong content."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{folder} must hold a complete {name} (got: {reason})") from error


def load_part(kind: type, folder: Path, **options):
    """Return kind.from_pretrained(folder): a tokenizer, or with `options` a frozen network. Raises
    InputError for missing weights, which the libraries would only fill with random numbers."""
    name = kind.__name__
    files = {path.name: path for path in folder.glob("*.json")}
    complete = bool(files) if options else bool({"tokenizer.json", "vocab.json"} & files.keys())
    must(complete, f"{folder} must be the folder of a {name} in an SD3 pipeline (got none)")
    for path in files.values():
        for key, value in read_json(path, dict).items():
            must(key != "quantization_config", f"{path}: weights must not be quantized")
            # of more, the libraries would build layers or tokens until memory or patience ends
            most = 1000 if "layers" in key else 10 ** 5
            must(not path.name.endswith("config.json") or key == "model_max_length"
                 or type(value) is not int or value <= most,
                 f"{path}: {key} must be at most {most} (got {value})")
    if options:
        options |= {"use_safetensors": True, "output_loading_info": True}
    with foreign(folder, name):
        loaded = kind.from_pretrained(folder, local_files_only=True, **options)
        if not options:
            return loaded
        model, info = loaded
        missing = min(info["missing_keys"], default="")
        must(not missing, f"{folder} must hold all weights of {name} (got no {missing})")
        return model.requires_grad_(False).eval()


# --- text ---

class Encoder(NamedTuple):
    """A text encoder with its tokenizer."""
    name: str
    tokenizer: Callable
    model: Callable
    limit: int          # tokens, including the special ones

    def tokens(self, prompts: Sequence[str]) -> Tensor:
        """Return the tokens [p, limit] of prompts, on the device of the model."""
        return self.tokenizer(list(prompts), padding="max_length", max_length=self.limit,
                              truncation=True, return_tensors="pt").input_ids.to(self.model.device)

    def __call__(self, prompts: Sequence[str], **options):
        """Return the output of the model, on its device."""
        return self.model(self.tokens(prompts), **options)


class Encoders(NamedTuple):
    """The text encoders of SD3."""
    clips: list[Encoder]    # CLIP-L and CLIP-G
    t5: Encoder | None      # may run on another device
    t5_tokens: int
    width: int              # of a T5 token, and so of context


@torch.no_grad()
def load_encoders(folder: str | Path, device: torch.device, dtype: torch.dtype, t5: str = "device",
                  t5_tokens: int = 256) -> Encoders:
    """Load CLIP-L, CLIP-G and T5, unless t5 is "none", from a pipeline folder, and try them."""
    must(t5 in ("device", "cpu", "none"), f"t5 must be device, cpu or none (got {t5!r})")
    must(1 <= t5_tokens <= 512, f"t5_tokens must be from 1 to 512 (got {t5_tokens})")
    transformers, _ = libraries()
    folder = Path(folder)

    def load(name: str, ending: str, tokenizer: type, model: type, device: torch.device) -> Encoder:
        part = folder / f"text_encoder{ending}"
        tokenizer = load_part(tokenizer, folder / f"tokenizer{ending}")
        model = load_part(model, part, dtype=dtype).to(device)
        # some folders load but cannot be used, which a few tokens show early
        with foreign(part, f"{type(model).__name__} that fits its tokenizer"):
            limit = t5_tokens if name == "T5" else model.config.max_position_embeddings
            encoder = Encoder(name, tokenizer, model, limit)
            embedded = model.get_input_embeddings().num_embeddings
            must(len(tokenizer) <= embedded, f"{part} must have an embedding for each of its "
                 f"tokenizer's {len(tokenizer)} tokens (got {embedded})")
            truncations(Encoders([encoder], None, t5_tokens, 1), ["a"])
            out = model(encoder.tokens(["", "a"])[:, :4], output_hidden_states=True)
            must(bool(out[0].isfinite().all() and out.hidden_states[-2].isfinite().all()),
                 f"{part}: its output must be finite (got NaN or inf)")
        return encoder

    clip = transformers.CLIPTokenizer, transformers.CLIPTextModelWithProjection, device
    clips = [load("CLIP-L", "", *clip), load("CLIP-G", "_2", *clip)]
    width, _ = text_widths(folder)
    sizes = [encoder.model.config.hidden_size for encoder in clips]
    must(sum(sizes) <= width, f"{folder}: the widths of the two CLIPs must add up to at most T5's "
         f"{width} (got {sizes})")
    if t5 == "none":
        return Encoders(clips, None, t5_tokens, width)
    t5_encoder = load("T5", "_3", transformers.T5TokenizerFast, transformers.T5EncoderModel,
                      torch.device("cpu") if t5 == "cpu" else device)
    return Encoders(clips, t5_encoder, t5_tokens, width)


def text_widths(folder: Path) -> tuple[int, int]:
    """Return (width of context, width of pooled) of the encoders, from their configurations. The
    first is that of a T5 token, which without T5 the transformer's configuration has too."""
    pooled = sum(whole_number(folder / part / "config.json", "projection_dim")
                 for part in ("text_encoder", "text_encoder_2"))
    for part, key in (("text_encoder_3", "d_model"), ("transformer", "joint_attention_dim")):
        path = folder / part / "config.json"
        if path.exists() and key in read_json(path, dict):
            return whole_number(path, key), pooled
    raise InputError(f"{folder}: the width of a T5 token is missing; it must be d_model in "
                     "text_encoder_3/config.json or joint_attention_dim in transformer/config.json")


def whole_number(path: Path, key: str) -> int:
    """Return a whole number above 0 of a configuration in a pipeline folder."""
    must(path.exists(), f"{path.parents[1]} must be a StableDiffusion3 pipeline folder (got no "
         f"{path.parent.name})")
    value = read_json(path, dict).get(key)
    must(type(value) is int and value > 0, f"{path}: {key} must be a whole number above 0 (got "
         f"{reprlib.repr(value)})")
    return value


@torch.no_grad()
def encode_prompts(encoders: Encoders, prompts: Sequence[str], batch: int = 16) -> Text:
    """Return the Text that SD3 attends to: context [p, l, d] and pooled [p, e] (Esser et al. 2024,
    Sec. 4 and Fig. 2). Longer prompts are cut.

    context: the last but one hidden states of the CLIPs, without the final norm, side by side and
    padded with zeros to T5's width; then T5's tokens, without a mask, or zeros, as in diffusers.
    """
    texts = []
    for i in range(0, len(prompts), batch):
        part = prompts[i:i + batch]
        clips = [clip(part, output_hidden_states=True) for clip in encoders.clips]
        context = torch.cat([out.hidden_states[-2] for out in clips], -1)
        context = F.pad(context, (0, encoders.width - context.shape[-1]))       # [p, 77, d]
        if encoders.t5:
            t5 = encoders.t5(part)[0].to(context.device)
        else:
            t5 = context.new_zeros(len(context), encoders.t5_tokens, encoders.width)
        pooled = torch.cat([out.text_embeds for out in clips], -1)
        texts.append(Text(torch.cat([context, t5], 1), pooled))
    return cat(texts)


def truncations(encoders: Encoders, prompts: Sequence[str]) -> list[str]:
    """Return a line for each encoder that cuts some of the prompts: how many, and the first one."""
    lines = []
    for encoder in filter(None, (*encoders.clips, encoders.t5)):
        lengths = [len(ids) for ids in encoder.tokenizer(list(prompts), verbose=False).input_ids]
        long = [i for i, length in enumerate(lengths) if length > encoder.limit]
        if long:
            lines.append(f"{len(long)} of {len(prompts)} prompts are cut to {encoder.name}'s "
                         f"{encoder.limit} tokens; the first, of {lengths[long[0]]}: "
                         f"{prompts[long[0]][:60]!r}")
    return lines


def encoder_identity(folder: str | Path, t5: str = "device", t5_tokens: int = 256) -> str:
    """Return what identifies the text of these encoders; their device and dtype do not matter."""
    endings = ("", "_2") if t5 == "none" else ("", "_2", "_3")
    digest = fingerprint(folder, [part + ending for part in ("text_encoder", "tokenizer")
                                  for ending in endings])
    return f"{digest} {'without' if t5 == 'none' else 'with'} T5, {t5_tokens} tokens"


def fingerprint(folder: str | Path, parts: Sequence[str]) -> str:
    """Return the content_hash of these subfolders of a pipeline."""
    files = []
    for part in parts:
        paths = [path for path in sorted((Path(folder) / part).glob("*"))
                 if path.suffix in (".json", ".txt", ".model", ".safetensors")
                 and ".fp16." not in path.name]
        must(len(paths) > 0, f"{folder} must be a StableDiffusion3 pipeline folder (got no {part})")
        files += [(f"{part}/{path.name}", path) for path in paths]
    return content_hash(files)


# --- images ---

def load_vae(folder: str | Path, device: torch.device):
    """Load the VAE of a pipeline folder in fp32, as diffusers' training scripts do, and try it."""
    folder = Path(folder) / "vae"
    vae = load_part(libraries()[1].AutoencoderKL, folder, torch_dtype=torch.float32,
                    low_cpu_mem_usage=False).to(device)
    shift = vae.config.shift_factor
    for value in (vae.config.scaling_factor, 0 if shift is None else shift):
        must(type(value) in (int, float), f"{folder}: scale, shift must be numbers (got {value!r})")
    with foreign(folder, "AutoencoderKL"):
        x0 = encode_images(vae, torch.zeros(1, 3, 64, 64))
        image = decode_latents(vae, x0)
    must(x0.shape == (1, 16, 8, 8) and image.shape == (1, 3, 64, 64), f"{folder} must make images "
         f"16 channels at 1/8 of their size (got {list(x0.shape)} of 64x64)")
    must(bool(x0.isfinite().all() and image.isfinite().all()),
         f"{folder}: its output must be finite (got NaN or inf)")
    return vae


@torch.no_grad()
def encode_images(vae, images: Tensor) -> Tensor:
    """Return x0 = (z - shift) * scale [b, c, h, w], fp32, where z is the mean that the VAE encodes
    images [b, 3, H, W] in [-1, 1] to; its configuration has shift and scale."""
    z = vae.encode(images.to(vae.device, vae.dtype)).latent_dist.mode()
    return (z.float() - (vae.config.shift_factor or 0)) * vae.config.scaling_factor


@torch.no_grad()
def decode_latents(vae, x0: Tensor, tiled: bool = False) -> Tensor:
    """Return images [b, 3, H, W], fp32 in [-1, 1], of z = x0 / scale + shift. `tiled` decodes
    overlapping tiles of the VAE's sample_size, which bounds the memory; since each tile is
    normalized on its own, the values differ slightly."""
    vae.use_tiling = tiled
    z = x0.float() / vae.config.scaling_factor + (vae.config.shift_factor or 0)
    return vae.decode(z.to(vae.device, vae.dtype)).sample.float().clamp(-1, 1)
