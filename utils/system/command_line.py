"""Command lines that report errors at once: standard library only."""

import argparse
import io
import os
import re
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import field, fields
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, NoReturn, get_args, get_origin

from .version import version


def printable(line: str) -> str:
    """The same as one line of text, since a file name may contain a line break, or bytes that are not text."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in line)


def with_dashes(message: str, flags: Collection[str]) -> str:
    """An error of the libraries, which name parameters, with -- before names of options.

    These are the first word, and words that no text has, with an underscore or before a `=`.
    """

    def dashed(word: re.Match[str]) -> str:
        marked = "_" in word[0] or word.start() == 0 or message[word.end() :].startswith("=")
        return f"--{word[0]}" if marked and word[0] in flags else word[0]

    return re.sub(r"(?<![\w/.-])\w+(?![\w/-]|\.\w)", dashed, message)  # not in paths, and not where they are already


def write_all_names() -> None:
    """Lets standard output and error write what their encoding lacks, as in file names, as \\x.. or \\u...."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors != "backslashreplace":
            with suppress(OSError, ValueError):  # it is lost or closed
                stream.reconfigure(errors="backslashreplace")


def option(default: Any, help: str, **settings: Any) -> Any:
    """A field for `Parser.add_group`; `least` or `above` is the range of its numbers, other settings are argparse's."""
    return field(default=default, metadata={"help": help, **settings})


def folder_name(text: str) -> str:
    """A folder below another one as a relative path in its shortest form, since results go to a folder of that name."""
    parts = [part for part in text.split("/") if part not in ("", ".")]
    if text.startswith("/") or ".." in parts or not parts:
        raise argparse.ArgumentTypeError(f"{text!r} is no folder below another; give a relative path, without ..")
    return "/".join(parts)


def path(text: str) -> Path:
    """A path; a ~ is expanded, which a shell does not do after =."""
    return Path(os.path.expanduser(text))


def _number(text: str, kind: type, least: float | None, above: float | None) -> float:
    number = "a whole number" if kind is int else "a number"
    allowed = f"use {number} above {above}" if least is None else f"use {number} of {least} or more"
    try:
        value: float = kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is none; {allowed}") from None
    if value is not None and ((least is not None and not value >= least) or (above is not None and not value > above)):
        raise argparse.ArgumentTypeError(f"{text} is out of range; {allowed}")
    return value


class Parser(argparse.ArgumentParser):
    """An argument parser that suggests the option for a misspelt one, and accepts no abbreviations.

    `hints` says what to answer to options of another program or version, by their names without dashes. Of the
    processes that torchrun started on a machine, only the first prints.
    """

    def __init__(self, *, hints: Mapping[str, str] | None = None, **settings: Any):
        self._hints = hints or {}
        super().__init__(allow_abbrev=False, **settings)
        self.add_argument(
            "--version", action="version", version=f"%(prog)s {version()}", help="print the version and exit"
        )

    def add_group(self, group: Any) -> None:
        """Adds the options of a dataclass, whose docstring is their title; those not given are not in the namespace.

        Its fields are `option`s, each annotated bool, int, float, str, Path or a tuple, perhaps `| None`.
        """
        section = self.add_argument_group(group.__doc__.rstrip("."))
        for entry in fields(group):
            settings, kind = dict(entry.metadata), entry.type
            least, above = settings.pop("least", None), settings.pop("above", None)
            if isinstance(kind, UnionType):
                (kind,) = (each for each in get_args(kind) if each is not NoneType)
            if get_origin(kind) is tuple:
                kind, *others = get_args(kind)
                settings["nargs"] = "+" if ... in others else 1 + len(others)
            if kind is bool:
                settings.setdefault("action", "store_true")
            else:
                settings.setdefault("type", path if kind is Path else kind)
            if least is not None or above is not None:
                settings["type"] = partial(_number, kind=settings["type"], least=least, above=above)
            if entry.default not in (None, (), "", False):
                values = entry.default if isinstance(entry.default, tuple) else (entry.default,)
                settings["help"] += f" (default: {' '.join(map(str, values))})"
            section.add_argument(f"--{entry.name}", default=argparse.SUPPRESS, **settings)

    def parse(self, argv: Sequence[str] | None = None) -> argparse.Namespace:
        """Parses the command line (`sys.argv` when None); an error ends the program with status 2."""
        write_all_names()
        parsed, unknown = self.parse_known_args(argv)
        if unknown:
            self.error(self._message(unknown, sys.argv[1:] if argv is None else argv))
        return parsed

    def _message(self, unknown: Sequence[str], argv: Sequence[str]) -> str:
        flags = self._option_string_actions
        before = argv[: argv.index(unknown[0])]
        flag, joined, first = next((word for word in before[::-1] if word.startswith("-")), "").partition("=")
        if joined and not unknown[0].startswith("-") and flag in flags and flags[flag].nargs not in (None, 0):
            words = f"{flag}={first} {unknown[0]}"
            return f"{words}: only one value can follow =; write {words.replace('=', ' ', 1)}"
        messages = []
        for word in [word for word in unknown if word.startswith("-")] or unknown[:1]:
            name = word.split("=")[0].lstrip("-").replace("-", "_")
            near = get_close_matches(f"--{name}", flags, n=1)
            hint = f", {self._hints[name]}" if name in self._hints and f"--{name}" not in flags else ""
            messages.append(f"unknown option {word}" + (hint or "".join(f", did you mean {flag}?" for flag in near)))
        return "; ".join(messages)

    def _print_message(self, message: str, file: Any = None) -> None:  # --help, --version and errors come here
        if not _silent():
            super()._print_message(message, file)

    def error(self, message: str) -> NoReturn:
        """See argparse."""
        if _silent():
            time.sleep(5)  # torchrun stops all when one exits: let the one that prints go first
            self.exit(2)
        super().error(message)


def _silent() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("LOCAL_RANK", "0") != "0"
