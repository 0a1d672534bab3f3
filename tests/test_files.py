"""Files that are complete or absent, whatever the file system answers; what reads them notices
damage."""
import errno

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ladd import cli
from ladd.cli import InputError
from ladd.data import files

ROOT = Path(__file__).parents[1]
TENSORS = {"w": torch.arange(6.0).view(2, 3), "half": torch.ones(5, dtype=torch.bfloat16),
           "scalar": torch.tensor(3), "empty": torch.zeros(0, 2), "flag": torch.tensor([True])}
WRITERS = {"tensors": lambda path: files.write_tensors(path, TENSORS, {"note": "é"}),
           "json": lambda path: files.write_json(path, {"a": [1, float("inf")]}),
           "text": lambda path: files.write_text(path, "text\n")}


def test_tensors_come_back_bit_for_bit_with_their_metadata(tmp_path):
    files.write_tensors(tmp_path / "a.safetensors", TENSORS, {"note": "é"})
    tensors, metadata = files.read_tensors(tmp_path / "a.safetensors")
    assert metadata == {"note": "é"} and tensors.keys() == TENSORS.keys()
    assert all(t.dtype == TENSORS[k].dtype and torch.equal(t, TENSORS[k])
               for k, t in tensors.items())
    assert files.read_tensors(tmp_path / "a.safetensors", ["w"])[0].keys() == {"w"}
    # once more from what was read, as export does: the header has its own checksum
    files.write_tensors(tmp_path / "b.safetensors", *files.read_tensors(tmp_path / "a.safetensors"))
    assert files.read_tensors(tmp_path / "b.safetensors")[1] == {"note": "é"}


def test_any_flipped_bit_is_noticed(tmp_path):
    path = tmp_path / "a.safetensors"
    files.write_tensors(path, {"w": torch.arange(3.0)}, {"note": "a note"})
    data = path.read_bytes()
    for place in range(len(data)):
        damaged = bytearray(data)
        damaged[place] ^= 1
        path.unlink()                           # another file, not the one that was verified
        path.write_bytes(damaged)
        if b'"sha256": "' in damaged:           # not the name of the checksum itself
            with pytest.raises(InputError):
                files.read_tensors(path)


def test_a_file_under_another_name_is_refused_where_the_name_counts(tmp_path):
    files.write_tensors(tmp_path / "a.safetensors", TENSORS)
    (tmp_path / "a.safetensors").rename(tmp_path / "b.safetensors")
    files.read_tensors(tmp_path / "b.safetensors")
    with pytest.raises(InputError, match="b.safetensors was written as a.safetensors"):
        files.read_tensors(tmp_path / "b.safetensors", renamed=False)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_nan_and_inf_are_not_written(tmp_path, value, dtype):
    tensor = torch.zeros(3, 5, dtype=dtype)
    tensor[2, 1] = value
    with pytest.raises(InputError, match="a: not written, since the values of w must be finite"):
        files.write_tensors(tmp_path / "a", {"v": torch.ones(2), "w": tensor})
    assert not list(tmp_path.iterdir())
    assert files.is_finite(tensor) is False and files.is_finite(torch.ones(2, dtype=dtype))


@pytest.mark.parametrize("kind", WRITERS)
def test_a_full_disk_is_one_line_and_leaves_the_old_file(tmp_path, kind):
    path = tmp_path / "file"
    WRITERS[kind](path)
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2, hard))
    try:
        with pytest.raises(InputError) as error:
            WRITERS[kind](path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(error.value) == f"{path}: cannot be written (File too large)"
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("kind", WRITERS)
def test_folders_that_are_none_are_one_line(tmp_path, kind):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("nowhere")
    for path in (tmp_path / "file" / "a", tmp_path / "link" / "a", tmp_path / ("n" * 300)):
        with pytest.raises(InputError, match=r": cannot be written \("):
            WRITERS[kind](path)
    assert {p.name for p in tmp_path.iterdir()} == {"file", "link"}


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_file_systems_without_fsync_chmod_and_locks_do(tmp_path, monkeypatch, code):
    def refuse(*args):
        raise OSError(code, os.strerror(code))

    for owner, name in ((os, "fsync"), (os, "chmod"), (Path, "chmod"), (files.fcntl, "flock")):
        monkeypatch.setattr(owner, name, refuse)
    with files.locked(tmp_path):
        for kind, write in WRITERS.items():
            write(tmp_path / kind)
    assert files.read_json(tmp_path / "json") == {"a": [1, float("inf")]}


def test_an_error_of_the_disk_in_fsync_is_none_of_these(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(InputError, match=r"a: cannot be written \(Input/output error\)"):
        files.write_text(tmp_path / "a", "")
    assert not list(tmp_path.iterdir())


def test_the_mode_is_that_of_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        for kind, write in WRITERS.items():
            write(tmp_path / kind)
            assert (tmp_path / kind).stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(before)


def test_a_folder_has_one_user_at_a_time(tmp_path):
    with files.locked(tmp_path / "run"):
        with pytest.raises(InputError, match=rf"run is in use by process {os.getpid()} on .*, "
                           "since 20.*; wait until that ends, or take another folder"):
            with files.locked(tmp_path / "run"):
                pass
        (tmp_path / "run/.lock").write_text("")
        with pytest.raises(InputError, match="run is in use by another command; wait"):
            with files.locked(tmp_path / "run"):
                pass
    with files.locked(tmp_path / "run"):        # and again when that has ended
        pass
    with pytest.raises(RuntimeError):           # an error releases it too
        with files.locked(tmp_path / "run"):
            raise RuntimeError
    with files.locked(tmp_path / "run"):
        pass


@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 5000, "null", "[]", "5", "true", '"a"', "",
                                  '{"a": ', '{"float": []}x', b"\xff\xfe{}", '{"a": \x00}'])
def test_json_of_any_other_kind_is_one_line(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match="a.json(: not a complete| must be a JSON object)"):
        files.read_json(path, dict)


def test_json_may_have_a_byte_order_mark(tmp_path):
    (tmp_path / "a.json").write_text('{"a": 1}', "utf-8-sig")
    assert files.read_json(tmp_path / "a.json", dict) == {"a": 1}
    (tmp_path / "a.json").write_text('{"float": []}')
    assert files.read_json(tmp_path / "a.json", dict) == {"float": []}


def test_a_device_is_no_file_and_columns_have_names_of_their_own(tmp_path):
    (tmp_path / "endless").symlink_to("/dev/zero")
    with pytest.raises(InputError, match=r"endless must be a file \(got a device\)"):
        files.read_lines(tmp_path / "endless")
    (tmp_path / "a.csv").write_text("prompt,Prompt\na fox,a dog\n")
    with pytest.raises(InputError, match=r"names of columns must differ \(got prompt, prompt\)"):
        files.read_objects(tmp_path / "a.csv", ["prompt"])


def test_a_fingerprint_is_of_the_content(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        files.write_tensors(tmp_path / name / "t.safetensors", TENSORS)
        (tmp_path / name / "text").write_text("x" * 10 ** 6)
    same, other = (files.fingerprint(tmp_path / name) for name in ("a", "b"))
    assert same == other
    with (tmp_path / "b" / "text").open("r+") as file:
        file.seek(500_000)
        file.write("y")
    assert files.fingerprint(tmp_path / "b") != same
    files.write_tensors(tmp_path / "a" / "t.safetensors", {**TENSORS, "w": torch.ones(2, 3)})
    assert files.fingerprint(tmp_path / "a") != same


# --- what a terminal gets ---

@pytest.mark.parametrize("text, shown", [
    ("a\x1b[31mb", r"a\x1b[31mb"), ("a\nb\r", r"a\nb\r"), ("\udcff", r"\udcff"),
    ("日本 é \u3000👩‍💻", "日本 é \u3000👩‍💻"), ("\x9b", r"\x9b")])
def test_errors_are_printable(text, shown):
    assert cli.one_line(text) == shown


def test_errors_have_a_length():
    assert cli.one_line("x" * 10 ** 6) == f"{'x' * 500} ... {'x' * 500}"


def test_without_a_stderr_or_a_reader_scripts_still_end(tmp_path):
    """Closed streams: the exit code alone says what happened."""
    command = f"{sys.executable} {ROOT / 'train.py'}"
    for line, code in ((f"{command} --help >&- 2>&-", 0), (f"{command} --no-such-flag 2>&-", 2)):
        done = subprocess.run(line, shell=True, cwd=tmp_path, stdout=subprocess.PIPE)
        assert done.returncode == code, line


def test_a_full_disk_at_the_output_and_an_ascii_terminal_are_no_tracebacks(tmp_path):
    train, sample = (f"{sys.executable} {ROOT / name}" for name in ("train.py", "sample.py"))
    for line, code in ((f"{train} --dry-run --tflops 1 >/dev/full", 2),
                       (f"PYTHONIOENCODING=ascii {train} --dry-run --tflops 1 --name größe", 0),
                       (f"{sample} --checkpoint {'x' * 300} --prompt a --out b.png", 2)):
        done = subprocess.run(line, shell=True, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == code, line
        assert done.stderr.count("\n") == bool(code) and "Traceback" not in done.stderr, line
    assert not any(tmp_path.iterdir())
