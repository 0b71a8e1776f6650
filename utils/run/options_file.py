"""The options of a run as a file in its folder, by which it can be repeated: standard library only."""

import os
import shlex
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..system.files import atomic_write

FILE = "options.txt"
STARTED = ["#", "started", "in"]  # the file's first words; the folder follows


def as_typed(name: str, value: Any) -> str:
    """An option as it is written on a command line."""
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    values = value if isinstance(value, tuple) else ("none" if value is None else value,)
    return shlex.join([f"--{name}", *map(str, values)] if len(values) > 1 else [f"--{name}={values[0]}"])


def write(folder: Path, options: dict[str, Any]) -> None:
    """Writes the options named by options["given"], one a line with all its values, and where the run was started."""
    lines = [" ".join([*STARTED, shlex.quote(os.getcwd())])]
    lines += [as_typed(name, options[name]) for name in options["given"]]
    with atomic_write(folder / FILE) as path:
        path.write_bytes("".join(f"{line}\n" for line in lines).encode("utf-8", "surrogateescape"))


def read(file: Path, parse: Callable[[list[str]], Namespace]) -> tuple[dict[str, Any], list[str]]:
    """The options in a file by name, and notes for the log.

    Relative paths start from where that run was started. A `resume` by which it only resumed itself is left out.
    """
    remedy = f"name the {FILE} of an earlier run, e.g. @logs/default/.../{FILE}"
    try:
        words, started_in = shlex.split(file.read_bytes().decode("utf-8", "surrogateescape")), ""
    except (OSError, ValueError) as error:
        raise ValueError(f"@{file} cannot be read ({error}); {remedy}") from error
    if words[:3] == STARTED:
        started_in, words = "".join(words[3:4]), words[4:]
    if not all(word.startswith("--") for word in words[:1] or ["none"] * (not started_in)):
        raise ValueError(f"@{file} does not begin with an option; {remedy}")
    values, notes = vars(parse(words)), []
    resume = values.get("resume")
    own = resume is not None and os.path.realpath(Path(started_in, resume).parent) == os.path.realpath(file.parent)
    if resume == Path("auto") or own:
        del values["resume"]
        notes.append(
            f"--resume={resume} in {file} is left out, as it only resumed that run, which now starts anew; give it on "
            "the command line to resume, or with the weights that the run started from"
        )
    moved = {name: _from(started_in, value) for name, value in values.items()}
    for name in ("save_dir", "pca_dataset_folder"):  # below logs/, below --eval_datasets_folder
        moved.pop(name, None)
    if "resume" in moved and not os.path.exists(moved["resume"]):  # a released checkpoint's name
        del moved["resume"]
    if all(values[name] == value for name, value in moved.items()):
        return values, notes
    if not os.path.isdir(started_in):
        notes.append(f"no folder {started_in}, where that run was started: its relative paths start from this one")
    elif not os.path.samefile(started_in, "."):
        values |= moved
        notes.append(f"the relative paths in {file} start from {started_in}, where that run was started")
    return values, notes


def _from(folder: str, value: Any) -> Any:
    if isinstance(value, list):
        return [_from(folder, each) for each in value]
    return Path(folder, value) if isinstance(value, Path) else value
