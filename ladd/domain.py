"""What prompts and latents mean in a run: the built-in world, or SD3's text encoders and VAE."""
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ladd import data, encode, shapes, tasks
from ladd.config import Config
from ladd.distill import Text


class Domain(NamedTuple):
    encode: Callable[[list[str]], Text]     # prompts to text on the CPU; "" is the null prompt
    embed: Callable[[list[str]], Text]      # the same, but what was asked for before is remembered
    decode: Callable[[Tensor], Tensor]      # latents [b, 16, h, w] to images [b, 3, 8h, 8w] in [-1, 1]
    latents: Callable[[Tensor], Tensor]     # and back, the mean where it is drawn; both on the CPU
    release: Callable[[], None]             # frees the text encoders, until they are needed again
    widths: tuple[int, int]                 # of a token of text and of the pooled text
    provenance: dict                        # what tells its text from another's


def world_domain(config: Config) -> Domain:
    """The built-in world of ladd/shapes.py; instructions for editing, captions else."""
    spell, words = ((tasks.embed, tasks.MOST_WORDS[config.objects]) if config.task == "edit"
                    else (shapes.embed, shapes.max_words(config.objects)))
    embed = lambda texts: Text(*spell(texts, words, config.text_dim))
    decode, latents = lambda x: shapes.decode(x.cpu()), lambda images: shapes.encode(images.cpu())
    return Domain(embed, embed, decode, latents, lambda: None, (config.text_dim,) * 2, {})


def text_widths(folder: Path) -> tuple[int, int]:
    """(width of a token, of the pooled text) of SD3's encoders in `folder`, from their configurations."""
    configs = [data.read_json(folder / f"text_encoder{i}" / "config.json") for i in ("", "_2")]
    return encode.text_width(folder), sum(config["projection_dim"] for config in configs)


def sd3_domain(folder: str | Path, device: torch.device, t5: str, t5_tokens: int, cache: Path | None = None,
               tiled: bool = False) -> Domain:
    """SD3's encoders and VAE from a pipeline folder, each loaded when it is first needed.

    `embed` remembers text in memory and, given a `cache`, in that file too. Raises InputError for a folder
    that holds no such parts, and for a cache that other encoders made.
    """
    identity, loaded, known = encode.encoder_identity(folder, t5, t5_tokens), {}, {}
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def encoded(prompts: list[str]) -> Text:
        if "encoders" not in loaded:
            loaded["encoders"] = encode.load_encoders(folder, device, dtype, t5, t5_tokens)
        text = encode.encode_prompts(loaded["encoders"], prompts)
        return Text(*(t.to("cpu", torch.bfloat16) for t in text))

    def embed(prompts: list[str]) -> Text:
        if new := [prompt for prompt in dict.fromkeys(prompts) if prompt not in known]:
            text = encode.cached_text(cache, identity, new, encoded) if cache else encoded(new)
            known.update(zip(new, zip(*text)))
        return Text(*(torch.stack(rows) for rows in zip(*(known[prompt] for prompt in prompts))))

    def vae():
        if "vae" not in loaded:
            loaded["vae"] = encode.load_vae(folder, device)
        return loaded["vae"]

    def decode(x0: Tensor) -> Tensor:
        return encode.decode_latents(vae(), x0.to(device), tiled).cpu()

    def latents(images: Tensor) -> Tensor:
        return encode.encode_images(vae(), images).cpu()

    def release() -> None:
        if loaded.pop("encoders", None) and device.type == "cuda":
            torch.cuda.empty_cache()

    return Domain(encoded, embed, decode, latents, release, text_widths(Path(folder)), {"encoders": identity})
