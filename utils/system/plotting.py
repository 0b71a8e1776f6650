"""Matplotlib, for figures in files only."""

import os
import sys
from contextlib import suppress
from typing import Any


def load_matplotlib() -> Any:
    """Matplotlib with what figures are made of, which `savefig` writes without any backend.

    Programs that a notebook's kernel starts inherit its MPLBACKEND. If that is not installed for them, Matplotlib
    refuses to be imported; so it is set afterwards, if it can be.
    """
    if "matplotlib" not in sys.modules and (backend := os.environ.pop("MPLBACKEND", None)):
        try:
            import matplotlib
        finally:
            os.environ["MPLBACKEND"] = backend
        with suppress(ValueError):
            matplotlib.rcParams["backend"] = backend
    import matplotlib.figure  # takes a quarter of a second
    import matplotlib.ticker

    return matplotlib
