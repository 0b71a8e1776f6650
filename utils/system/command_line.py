"""Command lines that report errors at once: standard library only."""

import argparse
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

from .version import version


class Parser(argparse.ArgumentParser):
    """An argument parser that suggests the option for a misspelt one, and accepts no abbreviations."""

    def __init__(self, **settings: Any):
        self._flags: list[str] = []
        super().__init__(allow_abbrev=False, **settings)
        self.add_argument(
            "--version", action="version", version=f"%(prog)s {version()}", help="print the version and exit"
        )

    def add_argument(self, *names: Any, **settings: Any) -> argparse.Action:
        """See argparse."""
        action = super().add_argument(*names, **settings)
        self._flags += action.option_strings
        return action

    def parse(self, argv: Sequence[str] | None = None) -> argparse.Namespace:
        """Parses the command line (`sys.argv` when None); an error ends the program with status 2."""
        found, unknown = self.parse_known_args(argv)
        if unknown:
            near = get_close_matches(unknown[0].split("=")[0], self._flags, n=1)
            self.error(f"unknown option {unknown[0]}" + "".join(f", did you mean {flag}?" for flag in near))
        return found
