"""Files of JSON and safetensors that are complete or absent: written elsewhere, then renamed.

What must be complete or absent goes through `publish`, every JSON file that is read through
`read_json`, every tensor through `write_tensors` and `read_tensors`.
"""
import csv
import errno
import fcntl
import hashlib
import json
import math
import os
import re
import reprlib
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
import torch
from torch import Tensor

from ladd.cli import InputError, must

# what write_tensors takes, with the names in the header
DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16",
               torch.float64: "F64", torch.int64: "I64", torch.uint8: "U8", torch.bool: "BOOL"}
# what some mounted object stores and network drives answer to fsync and flock
UNSUPPORTED = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK,
               errno.EPERM}
UNKNOWN = "0" * 64      # stands for the checksum while it is computed
# other names that the files of other programs have for what we call so
ALIASES = {"prompt": ("text", "caption"), "caption": ("text", "prompt"), "image": ("file_name",)}


# --- writing ---

@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what a file system answers while `path` is written into an InputError of one line."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error})") from None


def publish(path: Path, write: Callable[[Path], Any]) -> None:
    """Let write(temporary path) make a file or folder, then rename it to `path`: a run that is
    killed leaves all of it or nothing. Raise InputError, with nothing left behind, where the file
    system refuses."""
    work = path.with_name(f".tmp_{path.name}")     # so the next write removes what a kill left
    with writing(path):
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        try:
            write(work / path.name)
            # otherwise the rename could reach the disk before the content
            for part in (*work.rglob("*"), work):
                sync(part)
            os.replace(work / path.name, path)
        finally:
            shutil.rmtree(work, ignore_errors=True)
        sync(path.parent)


def sync(path: Path) -> None:
    """Wait until the content of a file or the entries of a folder are on disk, if the file system
    can say so."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
    finally:
        os.close(handle)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make a folder and keep other commands out of it until the block ends, where the file system
    has locks. Raise InputError that says who uses it. A block without any file leaves no folder."""
    missing = [path for path in (folder, *folder.parents) if not os.path.exists(path)]
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("a+b", buffering=0)
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            # a command that began just now has not written its name yet
            owner = file.read(200).decode(errors="replace").strip() or "another command"
            must(error.errno not in (errno.EAGAIN, errno.EACCES), f"{folder} is in use by {owner}; "
                 "wait until that ends, or take another folder")
            if error.errno not in UNSUPPORTED:
                raise
        try:
            with writing(folder):
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}, since "
                           f"{time.strftime('%Y-%m-%d %H:%M:%S')}\n".encode())
            yield
        finally:
            with suppress(OSError):
                if os.listdir(folder) == [".lock"]:
                    (folder / ".lock").unlink()
                    for path in missing:
                        path.rmdir()


def write_tensors(path: Path, tensors: Mapping[str, Tensor],
                  metadata: Mapping[str, str] | None = None,
                  dtype: torch.dtype | None = None) -> None:
    """Write a safetensors file in `dtype` (None: as they are), one tensor at a time, so that a
    network is not copied in memory.

    The header holds a checksum of all the rest, and the file's name. Raise InputError for NaN and
    inf, also those of a value beyond the range of fp16.
    """
    dtypes = {name: dtype or tensor.dtype for name, tensor in tensors.items()}
    names = sorted(tensors, key=lambda name: -dtypes[name].itemsize)   # aligns each to its size
    header = {"__metadata__": {**(metadata or {}), "file": path.name, "sha256": UNKNOWN}}
    end = 0
    for name in names:
        start = end
        end += tensors[name].numel() * dtypes[name].itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtypes[name]], "shape": list(tensors[name].shape),
                        "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)   # the data must start at a multiple of 8 bytes
    digest = hashlib.sha256(text)

    def write(work: Path) -> None:
        with work.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in names:
                cast = tensors[name].detach().to("cpu", dtypes[name]).contiguous()
                if not is_finite(cast):
                    limit = "at most 65504 in fp16" if dtype == torch.float16 else "finite"
                    raise InputError(f"{path}: not written, since the values of {name} must be "
                                     f"{limit} (got {tensors[name].abs().max():g})")
                data = cast.flatten().view(torch.uint8).numpy()
                digest.update(data)
                file.write(data)
            file.seek(8)
            file.write(text.replace(UNKNOWN.encode(), digest.hexdigest().encode(), 1))

    publish(path, write)


def is_finite(tensor: Tensor) -> bool:
    """Return whether a tensor on the CPU has neither NaN nor inf, in one pass without a copy."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    return all(math.isfinite(value) for value in tensor.aminmax())


def write_json(path: Path, value: Any) -> None:
    """Write JSON that read_json returns unchanged."""
    write_text(path, json.dumps(finite_json(value), indent=1, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file."""
    publish(path, lambda work: work.write_text(text))


def finite_json(value: Any) -> Any:
    """Return `value` with NaN and inf as {"float": "nan"}, since JSON cannot express them."""
    if isinstance(value, dict):
        return {key: finite_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": repr(value)}
    return value


# --- reading ---

def read_tensors(path: Path, names: Sequence[str] = (), verify: bool = True,
                 renamed: bool = True) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return (tensors, metadata) of a safetensors file, of all its tensors or those of `names`.
    They are memory-mapped; writing into one does not change the file. With `verify`, raise
    InputError unless the content has the checksum in its header, if it has one; without `renamed`,
    unless it was written under this name."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            name, expected = metadata.pop("file", path.name), metadata.pop("sha256", None)
            must(renamed or name == path.name, f"{path} was written as {name}; put the original "
                 "back")
            if verify and expected:
                stat = path.stat()
                checksum = read_checksum(path, stat.st_size, stat.st_mtime_ns, stat.st_ino)
                must(checksum == expected, f"{path}: its content does not have the checksum in its "
                     "header; the file was damaged after it was written")
            return {name: file.get_tensor(name) for name in names or file.keys()}, metadata
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: not a complete safetensors file ({error})") from None


@lru_cache(maxsize=4096)
def read_checksum(path: Path, *version: int) -> str:
    """Return the sha256 of a file whose header has UNKNOWN in place of its checksum; once for each
    `version`, the size and time of the file."""
    with path.open("rb") as file:
        text = file.read(int.from_bytes(file.read(8), "little"))
        text = re.sub(rb'"sha256": "[0-9a-f]{64}"', f'"sha256": "{UNKNOWN}"'.encode(), text)
        digest = hashlib.sha256(text)
        return hashlib.file_digest(file, lambda: digest).hexdigest()


def content_hash(files: Iterable[tuple[str, Path]]) -> str:
    """Return 16 hex digits that identify the labels and contents of these files."""
    digest = hashlib.sha256()
    for label, path in files:
        stat = path.stat()
        digest.update(f"{label} {file_hash(path, stat.st_size, stat.st_mtime_ns, stat.st_ino)}\n"
                      .encode())
    return digest.hexdigest()[:16]


@lru_cache(maxsize=4096)
def file_hash(path: Path, *version: int) -> str:
    """Return the checksum in the header of a file of write_tensors, of others the sha256."""
    with path.open("rb") as file:
        if path.suffix == ".safetensors":
            text = file.read(min(int.from_bytes(file.read(8), "little"), 10 ** 8))
            if match := re.search(rb'"sha256": "([0-9a-f]{64})"', text):
                return match[1].decode()
            file.seek(0)
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(path: str | Path) -> str:
    """Return 16 hex digits that identify the content of a file or of all files in a folder."""
    path = Path(path)
    if path.is_file():
        return content_hash([("", path)])
    return content_hash((file.name, file) for file in sorted(path.rglob("*"))
                        if file.is_file() and not file.name.startswith("."))


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
        value = parse_json(path.read_text("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:  # ValueError: not JSON or not UTF-8
        raise InputError(f"{path}: not a complete JSON file ({error})") from None
    must(isinstance(value, kind), f"{path} must be a JSON {'object' if kind is dict else 'list'} "
         f"(got {type(value).__name__})")
    return value


def read_lines(path: str | Path) -> list[str]:
    """Return the lines of a UTF-8 file, stripped; raise InputError where it cannot be read."""
    must(not Path(path).is_char_device(), f"{path} must be a file (got a device)")
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


def text_of(value: Any, key: str) -> str | None:
    """Return the text that an object has for `key` or one of its ALIASES, None without."""
    names = (key, *ALIASES.get(key, ())) if isinstance(value, dict) else ()
    return next((value[name] for name in names if is_text(value.get(name))), None)


def read_objects(path: str | Path, keys: Sequence[str]) -> list[dict]:
    """Return the items of a .json list, the rows of a .csv file, or the lines of any other file,
    JSON each, without empty ones; raise InputError that names the first without a text for one of
    `keys` or their ALIASES. An item may be the text of the first key alone."""
    path = Path(path)
    what = {".json": "item", ".csv": "row"}.get(path.suffix.lower(), "line")
    found = read_json(path, list) if what == "item" else read_lines(path)
    if what == "row":
        rows = csv.reader((line + "\n" for line in found), skipinitialspace=True, strict=True)
        try:
            names = [name.strip().lower() for name in next(rows)]
            must(len(set(names)) == len(names), f"{path}: names of columns must differ (got "
                 f"{', '.join(names)})")
            found = [dict(zip(names, row, strict=True)) if row else "" for row in rows]
        except (csv.Error, ValueError) as error:
            raise InputError(f"{path} must be a CSV file with names in its first row and a cell "
                             f"for each in the others, in quotes with commas ({error})") from None
    objects = []
    for number, shown in enumerate(found, 1):
        if shown == "" and what != "item":
            continue
        value = {keys[0]: shown} if isinstance(shown, str) and what == "item" else shown
        if what == "line":
            with suppress(ValueError, RecursionError):
                value = parse_json(shown)
        texts = {key: text_of(value, key) for key in keys}
        wanted = ", ".join(f'"{key}": "..."' for key in keys)
        must(None not in texts.values(), f"{path}: {what} {number} must be {{{wanted}}} (got "
             f"{reprlib.repr(shown)})")
        objects.append(value | texts)
    return objects
