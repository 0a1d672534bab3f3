"""Captions of the toy dataset: words of attributes, their grammar, word embeddings."""
import difflib

import torch
from torch import Tensor

from ladd.cli import InputError, must
from ladd.toy.scenes import (ANY_SHAPE, ATTRIBUTES, COLOURS, PHRASES, VOCAB, cosine_waves,
                             words_of)

MOST_WORDS = {1: 6, 2: 10}      # of a caption, by objects


def draw_captions(attributes: Tensor, generator: torch.Generator, stated: float) -> Tensor:
    """Return codes [n, a]: the attributes that a caption states, -1 where it leaves them open. Each
    is stated with probability `stated`, at least one of them, and a relation always."""
    n, a = attributes.shape
    keep = torch.rand(n, a, generator=generator) < stated
    one = torch.randint(a, (n,), generator=generator)
    if a == 8:
        keep[:, 3] = True
    else:
        keep[torch.arange(n), one] |= ~keep.any(1)
    return torch.where(keep, attributes, -1)


def caption(codes: Tensor | list[int], objects: int) -> str:
    """Return the caption of a row of codes, e.g. "large red circle left of small blue square"."""
    words = []
    for name, phrases, code in zip(ATTRIBUTES[objects], PHRASES[objects], map(int, codes)):
        if code >= 0:
            words.append(phrases[code])
        elif name.startswith("shape"):
            words.append(ANY_SHAPE)
    return " ".join(words)


def check_words(words: list[str], known: list[str], text: str) -> None:
    """Raise InputError for the first word that is not known."""
    for word in words:
        if word not in known:
            near = difflib.get_close_matches(word, known, 1, 0)[0]   # a cutoff of 0 finds one
            raise InputError(f"prompt {text!r}: unknown word {word!r}, the nearest known word is "
                             f"{near!r}; use {' '.join(known)}")


def parse(text: str, objects: int) -> list[int]:
    """Return the codes of a caption, in any case, or raise InputError: parse(caption(c)) == c."""
    names, rest, codes = ATTRIBUTES[objects], text.lower().split(), []
    check_words(rest, words_of(PHRASES[objects]), text)
    for name, phrases in zip(names, PHRASES[objects]):
        options = [*phrases, ANY_SHAPE] if name.startswith("shape") else phrases
        said = [phrase for phrase in options if rest[:len(phrase.split())] == phrase.split()]
        if not said and name.startswith(("shape", "relation")):
            break
        rest = rest[len(said[0].split()) if said else 0:]
        codes.append(phrases.index(said[0]) if said and said[0] in phrases else -1)
    if rest or len(codes) < len(names):
        needed = f"a shape (or the word {ANY_SHAPE!r})"
        if objects == 2:
            needed += " and the relation"
        raise InputError(f"prompt {text!r} must be {' '.join(names)} in this order, all but "
                         f"{needed} may be left out (got {rest[0] if rest else 'its end'!r} out of "
                         "place)")
    if objects == 2:
        must(codes[1] < 0 or codes[1] != codes[5], f"prompt {text!r}: its objects must have two "
             f"colours (got {COLOURS[codes[1]]} twice)")
    return codes


def embed(texts: list[str], length: int, dim: int,
          vocab: list[str] = VOCAB) -> tuple[Tensor, Tensor]:
    """Return (context [n, length, dim], pooled [n, dim]) of texts.

    context = word + 0.3 position; pooled = sum of the words / sqrt(count). The vectors are frozen
    cosine waves, the first ones for words and the last ones for positions, so they are orthogonal
    where dim allows. Word 0 pads to `length`; "" is all padding, and its pooled vector is zero.
    """
    must(dim > len(vocab),
         f"width of the text embedding must be at least {len(vocab) + 1} (got {dim})")
    ids = torch.zeros(len(texts), length, dtype=torch.long)
    for row, text in zip(ids, texts):
        words = [vocab.index(word) + 1 for word in text.lower().split()]
        row[:len(words)] = torch.tensor(words, dtype=torch.long)
    waves, said = cosine_waves(dim), (ids > 0)[..., None]                       # said [n, l, 1]
    words, positions = waves[ids], waves[-1 - torch.arange(length) % dim]
    return words + 0.3 * positions, (words * said).sum(1) / said.sum(1).clamp(min=1).sqrt()
