"""Runs train.py and dies by SIGKILL at the given point: python killed.py POINT COUNT FLAG [FLAG ...].

POINT is `step` (after the COUNT-th optimiser step), `write` (half-way through the COUNT-th checkpoint), `move` (before
the COUNT-th file is moved into place) or `validation` (half-way through the COUNT-th). Under torchrun it is the second
process that dies. With the point `preempted` it gets SIGTERM instead, as the COUNT-th step begins.
"""

import io
import os
import signal
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import test as evaluation
import train
from utils.run import checkpoint
from utils.run.optimization import Optimization

point, count, *flags = sys.argv[1:]
left = int(count)


def now() -> bool:
    """Whether this is the COUNT-th call."""
    global left
    left -= 1
    return left == 0


def die():
    if os.environ.get("RANK", "1") == "1":
        os.kill(os.getpid(), signal.SIGTERM if point == "preempted" else signal.SIGKILL)


def patched(owner, name, wrap):
    setattr(owner, name, wrap(getattr(owner, name)))


def after(real):
    def call(*args, **kwargs):
        result = real(*args, **kwargs)
        if now():
            die()
        return result

    return call


def before(real):
    def call(*args, **kwargs):
        if now():
            die()
        return real(*args, **kwargs)

    return call


def half_way(real):
    def call(content, file):
        if now():
            buffer = io.BytesIO()
            real(content, buffer)
            file.write(buffer.getvalue()[: buffer.tell() // 2])
            file.flush()
            die()
        real(content, file)

    return call


match point:
    case "step":
        patched(Optimization, "step", after)
    case "write":
        patched(torch, "save", half_way)
    case "move":
        patched(checkpoint.os, "replace", before)
    case "preempted":
        patched(Optimization, "step", before)
    case "validation":
        patched(evaluation, "extract", before)

train.main(flags)
