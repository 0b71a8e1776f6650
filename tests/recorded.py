"""Runs train.py and writes down every step: torchrun recorded.py OUTPUT FLAG [FLAG ...], or `record` in a test.

The dropout of the cross-image encoder is off, since processes draw different numbers for it.
"""

import os
import sys
from functools import partial
from pathlib import Path

import torch
from torch.distributed.elastic.multiprocessing.errors import record as report_errors

sys.path.insert(0, str(Path(__file__).parents[1]))

import train
from model import network
from model.cross_image import CrossImageEncoder
from utils.run.optimization import Optimization
from utils.run.progress import Progress


def record(flags, *, halves=None):
    """Trains, and returns the loss and the gradients of each step, and whether a pair was mined in it.

    Args:
        flags: of train.py.
        halves: for each call of the encoder in training, the images that the first of two processes would have.
    """
    steps = []
    real_record, real_step, real_forward = Progress.record_step, Optimization.step, CrossImageEncoder.forward
    halves = iter(halves) if halves else None

    def record_step(self, loss):
        steps.append({"loss": loss.item()})
        real_record(self, loss)

    def step(self):
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        steps[-1]["gradients"] = [p.grad.clone() for p in parameters if p.grad is not None]
        return real_step(self)

    def forward(self, vectors):
        if halves is None or not self.training:
            return real_forward(self, vectors)
        parts = vectors.split([first := next(halves), len(vectors) - first])
        return torch.cat([real_forward(self, part) for part in parts if len(part)])

    Progress.record_step, Optimization.step, CrossImageEncoder.forward = record_step, step, forward
    network.CrossImageEncoder = partial(CrossImageEncoder, dropout=0.0)
    try:
        train.main(flags)
    finally:
        Progress.record_step, Optimization.step, CrossImageEncoder.forward = real_record, real_step, real_forward
        network.CrossImageEncoder = CrossImageEncoder
    return steps


if __name__ == "__main__":
    output, *flags = sys.argv[1:]
    torch.set_num_threads(1)
    torch.save(report_errors(partial(record, flags))(), f"{output}.{os.environ['RANK']}")
