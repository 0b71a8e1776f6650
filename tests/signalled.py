"""Runs train.py or eval.py and signals it: python signalled.py WHOM SIGNAL POINT COUNT SCRIPT FLAG [FLAG ...].

WHOM is `group` (all processes of the job, as a shell, `timeout` and SLURM do), `self` or `parent` (torchrun alone,
which passes it on when it comes to it: the script waits for that, or it might be done before).
POINT is `step` (as the COUNT-th optimiser step begins) or `batch` (as the COUNT-th batch of an extraction does).
"""

import importlib
import os
import signal
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from model import SuperVLADNet
from utils.run.optimization import Optimization
from utils.run.preemption import Preemption

torch.set_num_threads(1)

whom, name, point, count, script, *flags = sys.argv[1:]
owner, method = {"step": (Optimization, "step"), "batch": (SuperVLADNet, "cluster_vectors")}[point]
real, left = getattr(owner, method), int(count)
note, noted = Preemption._note, False


def noting(self, *args):
    global noted
    noted = True
    note(self, *args)


def signalled(self, *args):
    global left
    # In training the backbone passes here too; only what runs without a gradient is an extraction.
    if point == "step" or not torch.is_grad_enabled():
        left -= 1
        if left == 0 and os.environ.get("RANK", "0") == "0":
            signum = signal.Signals[name]
            match whom:
                case "group":
                    os.killpg(os.getpgrp(), signum)
                case "self":
                    os.kill(os.getpid(), signum)
                case "parent":
                    os.kill(os.getppid(), signum)
                    while not noted:
                        time.sleep(0.01)
    return real(self, *args)


setattr(owner, method, signalled)
Preemption._note = noting
importlib.import_module(script).main(flags)
