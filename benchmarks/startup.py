"""What a misspelt option costs: answered at once, against after the imports of the script, as it was before.

python -m benchmarks.startup
"""

import subprocess
import sys
from functools import partial
from pathlib import Path

import torch

from benchmarks.measuring import medians, record

ROOT = Path(__file__).parents[1]
WAYS = {
    "eval.py": (["eval.py", "--misspelt"], ["-c", "import eval; eval.main(['--misspelt'])"]),
    "train.py": (["train.py", "--misspelt"], ["-c", "import train; train.main(['--misspelt'])"]),
    "model.export": (
        ["-m", "model.export", "--misspelt"],
        ["-c", "from model.export import main; main(['--misspelt'])"],
    ),
    "datasets.check": (
        ["-m", "datasets.check", ".", "--misspelt"],
        ["-c", "from datasets.check import main; main(['.', '--misspelt'])"],
    ),
}


def answer(command: list[str]) -> None:
    """Runs Python until it has refused the option."""
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "--misspelt" in done.stderr, done.stderr


def main() -> None:
    """Prints a line a script and records the figures."""
    figures = {}
    for name, commands in WAYS.items():
        ways = dict(zip(("at once", "after the imports"), commands, strict=True))
        seconds = medians({way: partial(answer, command) for way, command in ways.items()}, rounds=5)
        figures[name] = {**seconds, "ratio": seconds["after the imports"] / seconds["at once"]}
        print(f"{name}: {seconds['at once']:.3f} s at once, {seconds['after the imports']:.2f} s after the imports")
    record("startup", figures, torch.device("cpu"))


if __name__ == "__main__":
    main()
