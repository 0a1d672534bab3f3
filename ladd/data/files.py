"""Files of JSON and safetensors that are complete or absent: written elsewhere, then renamed."""
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
import torch
from torch import Tensor

from ladd.cli import InputError, must

# what write_tensors takes, with the names in the header
DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16",
               torch.float64: "F64", torch.int64: "I64"}


def publish(path: Path, write: Callable[[Path], Any]) -> None:
    """Let write(temporary path) make a file or folder, then rename it to `path`: a run that is
    killed leaves all of it or nothing."""
    work = path.with_name(f".tmp_{path.name}")     # so the next write removes what a kill left
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    write(work / path.name)
    # otherwise the rename could reach the disk before the content
    for part in (*work.rglob("*"), work):
        sync(part)
    os.replace(work / path.name, path)
    work.rmdir()
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until the content of a file or the entries of a folder are on disk."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def write_tensors(path: Path, tensors: Mapping[str, Tensor],
                  metadata: Mapping[str, str] | None = None,
                  dtype: torch.dtype | None = None) -> None:
    """Write a safetensors file in `dtype` (None: as they are), one tensor at a time, so that a
    network is not copied in memory. Raise InputError for a value beyond the range of fp16."""
    dtypes = {name: dtype or tensor.dtype for name, tensor in tensors.items()}
    names = sorted(tensors, key=lambda name: -dtypes[name].itemsize)   # aligns each to its size
    header = {"__metadata__": dict(metadata or {})}
    end = 0
    for name in names:
        start = end
        end += tensors[name].numel() * dtypes[name].itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtypes[name]], "shape": list(tensors[name].shape),
                        "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)   # the data must start at a multiple of 8 bytes

    def write(path: Path) -> None:
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in names:
                cast = tensors[name].detach().to("cpu", dtypes[name]).contiguous()
                if dtype == torch.float16 and not cast.isfinite().all():
                    raise InputError(f"{name}: values must be at most 65504 in fp16 "
                                     f"(got {tensors[name].abs().max():g})")
                file.write(cast.flatten().view(torch.uint8).numpy())

    publish(path, write)


def write_json(path: Path, value: Any) -> None:
    """Write JSON that read_json returns unchanged."""
    text = json.dumps(finite_json(value), indent=1, allow_nan=False) + "\n"
    publish(path, lambda path: path.write_text(text))


def finite_json(value: Any) -> Any:
    """Return `value` with NaN and inf as {"float": "nan"}, since JSON cannot express them."""
    if isinstance(value, dict):
        return {key: finite_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": repr(value)}
    return value


def read_tensors(path: Path, names: Sequence[str] = ()) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return (tensors, metadata) of a safetensors file, of all its tensors or those of `names`.
    They are memory-mapped; writing into one does not change the file."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in names or file.keys()}
            return tensors, file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: not a complete safetensors file ({error})") from None


def parse_json(text: str) -> Any:
    """Return the value of JSON in which {"float": "nan"} stands for NaN; the errors are those of
    json.loads."""
    def special(found: dict) -> Any:
        text = found.get("float") if len(found) == 1 else None
        return float(text) if isinstance(text, str) else found

    return json.loads(text, object_hook=special)


def read_json(path: Path, kind: type = object) -> Any:
    """Return the value in a JSON file, of type dict or list where `kind` says so."""
    try:
        value = parse_json(path.read_text())
    except (OSError, ValueError) as error:   # ValueError: not JSON or not UTF-8
        raise InputError(f"{path}: not a complete JSON file ({error})") from None
    must(isinstance(value, kind), f"{path} must be a JSON {'object' if kind is dict else 'list'} "
         f"(got {type(value).__name__})")
    return value


def read_lines(path: str | Path) -> list[str]:
    """Return the lines of a UTF-8 file, stripped; raise InputError where it cannot be read."""
    try:
        return [line.strip() for line in Path(path).read_text("utf-8-sig").split("\n")]
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} must be UTF-8 (got another byte at {error.start})") from None


def is_text(value: Any) -> bool:
    """Return whether `value` is a string without halves of surrogate pairs, which JSON may hold and
    no tokenizer reads."""
    return isinstance(value, str) and not any("\ud800" <= letter <= "\udfff" for letter in value)


def read_objects(path: str | Path, keys: Sequence[str]) -> list[dict]:
    """Return the objects of a .jsonl file without its empty lines; raise InputError that names the
    first line which has no text for one of `keys`."""
    objects = []
    wanted = ", ".join(f'"{key}": "..."' for key in keys)
    for number, line in enumerate(read_lines(path), 1):
        if not line:
            continue
        try:
            value = parse_json(line)
        except ValueError:
            value = None
        must(isinstance(value, dict) and all(is_text(value.get(key)) for key in keys),
             f"{path}: line {number} must be {{{wanted}}} (got {line[:60]!r})")
        objects.append(value)
    return objects
