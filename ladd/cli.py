"""Command line: the class of input errors, the parser, and the reading of values.

Standard library only.
"""
import argparse
import difflib
import io
import os
import sys
from collections.abc import Callable


class InputError(ValueError):
    """Report refused input; the scripts print it as one line and exit with code 2."""


def run_script(name: str, main: Callable[[list[str]], None],
               leave: Callable[[int], None] = sys.exit) -> None:
    """Call main with the command line; turn refused input, losses that are NaN or inf and what a
    file system answers into one line and leave(2)."""
    # otherwise a terminal that is not UTF-8 ends the run at the first name in another script
    for stream in sys.stdout, sys.stderr:
        if isinstance(stream, io.TextIOWrapper):        # None where it is closed
            stream.reconfigure(errors="backslashreplace")
    try:
        main(sys.argv[1:])
        print(end="", flush=True)
    except (InputError, FloatingPointError) as error:
        print(f"{name}: {one_line(str(error))}", file=sys.stderr)
        leave(2)
    except BrokenPipeError:
        # what reads the output has ended; otherwise the interpreter reports it once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        leave(1)
    except OSError as error:
        # without a name it is the output, which goes to a full disk
        text = f"{error.filename or 'output'}: {error.strerror or error}"
        print(f"{name}: {one_line(text)}", file=sys.stderr)
        try:
            print(end="", flush=True)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        leave(2)


def is_control(c: str) -> bool:
    """Return whether a character must not reach a terminal: control characters, and the halves of
    surrogate pairs, as which Python reads bytes that are not UTF-8."""
    return c < " " or "\x7f" <= c <= "\x9f" or "\ud800" <= c <= "\udfff"


def one_line(text: str, most: int = 1000) -> str:
    """Return `text` in one line of at most `most` characters; those that a terminal must not get
    are written as escape sequences."""
    shown = "".join(c.encode("unicode_escape", "surrogatepass").decode() if is_control(c) else c
                    for c in text)
    return shown if len(shown) <= most else f"{shown[:most // 2]} ... {shown[-most // 2:]}"


def must(ok: bool, message: str) -> None:
    """Raise InputError(message) unless `ok`."""
    if not ok:
        raise InputError(message)


class Parser(argparse.ArgumentParser):
    """Raise InputError for what argparse refuses, and name the flag nearest to an unknown one."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str):
        """Raise InputError; argparse calls this where it would exit."""
        raise InputError(message)

    def parse(self, argv: list[str]) -> argparse.Namespace:
        """Return the flags; raise InputError for an unknown one, and for what is no text."""
        for word in argv:
            must(not any(map(is_control, word)), "arguments must be UTF-8 text without control "
                 f"characters (got {word!r})")
            # argparse of Python 3.11 would return an empty list
            must(word != "--" and not word.endswith("=--"), f"unknown argument {word!r}; --help "
                 "shows the flags")
        args, unknown = self.parse_known_args(argv)
        if unknown:
            flags = [s for a in self._actions for s in a.option_strings if s.startswith("--")]
            near = difflib.get_close_matches(unknown[0].split("=")[0], flags, 1)
            hint = f"the nearest flag is {near[0]}" if near else "--help shows the flags"
            raise InputError(f"unknown argument {unknown[0]!r}; {hint}")
        return args


def describe(kind) -> str:
    """Return what a value of this type must look like on the command line."""
    if hasattr(kind, "__args__"):
        of = {int: "whole numbers", float: "numbers", str: "words"}[kind.__args__[0]]
        return f"{of} separated by commas"
    return {bool: "on or off", int: "a whole number", float: "a number", str: "text"}[kind]


def parse_value(text: str, kind):
    """Return `text` as a value of the type `kind`; tuples are comma-separated. Raise ValueError or
    KeyError for text of another form."""
    if kind is bool:
        return {"true": True, "on": True, "1": True, "false": False, "off": False,
                "0": False}[text.lower()]
    if kind in (int, float, str):
        return kind(text)
    return tuple(kind.__args__[0](part) for part in text.split(",") if part)


def parse_size(text: str, flag: str = "--sizes") -> tuple[int, int]:
    """Return (H, W) of "HxW", multiples of 16 (8 of the autoencoder, 2 of the patches)."""
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(p.isdecimal() for p in parts):
        raise InputError(f"{flag} must be HxW in pixels, such as 64x64 (got {text!r})")
    if max(map(len, parts)) > 5 or max(map(int, parts)) > 8192:
        raise InputError(f"{flag} must be at most 8192x8192 (got {text})")
    h, w = map(int, parts)
    if min(h, w) < 16 or h % 16 or w % 16:
        near = "x".join(str(max(16, round(s / 16) * 16)) for s in (h, w))
        raise InputError(f"{flag} must be multiples of 16, such as {near} (got {text})")
    return h, w
