"""Files of JSON and safetensors that are complete or absent: written elsewhere, then renamed."""
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ladd.cli import InputError, must


def check_finite(where: Path, tensors: dict[str, Tensor]) -> None:
    """Raise InputError for a tensor with NaN or inf."""
    for name, tensor in tensors.items():
        # In parts, since a memory-mapped tensor may be larger than memory.
        finite = all(part.isfinite().all() for part in tensor.split(1024))
        must(finite, f"{where}: {name} must be finite (got NaN or inf)")


def publish(path: Path, write: Callable[[Path], None]) -> None:
    """Let write(temporary path) make a file or folder, then rename it to `path`.

    A run that is killed leaves all of it or nothing. The temporary folder has the final name in
    its own, so that the next write of `path` removes what a killed run left.
    """
    work = path.with_name(f".tmp_{path.name}")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    write(work / path.name)
    sync(work)
    os.replace(work / path.name, path)
    work.rmdir()
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until the content of a file or the entries of a folder are on disk.

    Otherwise a rename could reach the disk before the content of what it names.
    """
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def write_tensors(path: Path, tensors: dict[str, Tensor],
                  metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file and wait until it is on disk."""
    # Copies, since safetensors refuses tensors that share storage.
    owned = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}
    save_file(owned, path, metadata)
    path.chmod(0o644)   # save_file leaves the private mode of its temporary file
    sync(path)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return (tensors, metadata) of a safetensors file.

    The tensors are memory-mapped; writing into one does not change the file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: not a complete safetensors file ({error})") from None


def write_json(path: Path, value: Any) -> None:
    """Write JSON that read_json returns unchanged, and wait until it is on disk."""
    path.write_text(json.dumps(finite_json(value), indent=1, allow_nan=False) + "\n")
    sync(path)


def read_json(path: Path) -> Any:
    """Return what write_json wrote; raise InputError where `path` is not a JSON file."""
    def special(found: dict) -> Any:
        return float(found["float"]) if list(found) == ["float"] else found

    try:
        return json.loads(path.read_text(), object_hook=special)
    except (OSError, ValueError) as error:   # ValueError: not JSON or not UTF-8
        raise InputError(f"{path}: not a complete JSON file ({error})") from None


def finite_json(value: Any) -> Any:
    """Return `value` with NaN and inf as {"float": "nan"}, since JSON cannot express them."""
    if isinstance(value, dict):
        return {key: finite_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": repr(value)}
    return value
