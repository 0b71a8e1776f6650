"""Runs train.py or eval.py and signals it: python stopped.py "WHOM SIGNAL POINT COUNT" SCRIPT FLAG [FLAG ...].

WHOM is `self`, `other` (the second process of torchrun), `group` (all processes of the job, as a shell, `timeout` and
SLURM do) or `parent` (torchrun alone, which passes it on when it comes to it: the script waits for that, or it might be
done before). POINT is `step` (as the COUNT-th optimiser step begins), `stepped` (after it), `batch` (as the COUNT-th
batch of an extraction begins), `validation` (half-way through the COUNT-th), `write` (half-way through the COUNT-th
checkpoint) or `move` (before the COUNT-th checkpoint is moved). A second plan, after a comma, is for the processes that
torchrun has started again.
"""

import importlib
import io
import os
import signal
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import test as evaluation
from model import SuperVLADNet
from utils.run.optimization import Optimization
from utils.run.preemption import Preemption

torch.set_num_threads(1)

plans, script, *flags = sys.argv[1:]
whom, name, point, count = plans.split(",")[int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))].split()
owner, method = {
    "step": (Optimization, "step"),
    "stepped": (Optimization, "step"),
    "batch": (SuperVLADNet, "cluster_vectors"),
    "validation": (evaluation, "extract"),
    "write": (torch, "save"),
    "move": (os, "replace"),
}[point]
real, left = getattr(owner, method), int(count)
note, noted = Preemption._note, False


def noting(self, *args):
    global noted
    noted = True
    note(self, *args)


def send():
    if os.environ.get("RANK", "0") != ("1" if whom == "other" else "0"):
        return
    signum = signal.Signals[name]
    match whom:
        case "self" | "other":
            os.kill(os.getpid(), signum)
        case "group":
            os.killpg(os.getpgrp(), signum)
        case "parent":
            os.kill(os.getppid(), signum)
            while not noted:
                time.sleep(0.01)


def stopped(*args, **kwargs):
    global left
    match point:
        case "batch":  # in training the backbone passes here too; only what runs without a gradient is an extraction
            counts = not torch.is_grad_enabled()
        case "move":
            counts = str(args[1]).endswith("_model.pth")
        case _:
            counts = True
    left -= counts
    if not counts or left:
        return real(*args, **kwargs)
    if point == "stepped":
        result = real(*args, **kwargs)
        send()
        return result
    if point == "write":
        buffer = io.BytesIO()
        real(args[0], buffer)
        args[1].write(buffer.getvalue()[: buffer.tell() // 2])
        args[1].flush()
    send()
    return real(*args, **kwargs)


setattr(owner, method, stopped)
Preemption._note = noting
importlib.import_module(script).main(flags)
