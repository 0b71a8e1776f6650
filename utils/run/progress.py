"""The progress of a training run, saved so that it can resume as if it had never stopped."""

import logging
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..system import distributed
from ..system.seed import generator_states, restore_generators
from . import checkpoint, metrics
from .optimization import Optimization

logger = logging.getLogger(__name__)


class Progress:
    """A run's progress, best score and files; only the main process writes them.

    Args:
        facts: plain values to store in every checkpoint.
        must_match: values that decide the result, by the name to show; a run resumes only under the same values.
        unless_said: values of `must_match` for older checkpoints, written before an option existed.
        read_every: steps between two readings of the losses, since reading one waits for the GPU; they are also read
            before anything is written.
    """

    def __init__(
        self,
        folder: Path,
        model: nn.Module,
        optimization: Optimization,
        *,
        facts: dict[str, Any],
        must_match: dict[str, Any],
        unless_said: dict[str, Any],
        read_every: int,
    ):
        self.folder = folder
        self.model = model
        self.optimization = optimization
        self.facts = facts
        self.must_match = must_match
        self.unless_said = unless_said
        self.read_every = read_every
        self.epoch = 0  # finished ones, including validation
        self.losses: list[float] = []  # of the steps in the current epoch that have been read
        self._unread: list[Tensor] = []
        self.lr = 0.0  # of the newest step
        self.recalls: dict[int, float] = {}
        self.best_score = -1.0
        self.not_improved = 0  # epochs since the best score
        self.order: NDArray[np.int64] | None = None  # of the current epoch's places, if the model decided it

    @property
    def steps(self) -> int:
        """Steps taken in the current epoch."""
        return len(self.losses) + len(self._unread)

    def finished(self, epochs: int, patience: int) -> bool:
        """Whether all `epochs` are done, or the best epoch was `patience` epochs ago."""
        return self.epoch >= epochs or self.not_improved >= patience

    def record_step(self, loss: Tensor) -> None:
        """Records a step by its scalar loss; see `read_losses`."""
        self._unread.append(loss.detach())
        self.lr = self.optimization.lr
        if len(self._unread) == self.read_every:
            self.read_losses()

    def read_losses(self) -> None:
        """Reads the losses that are still on the device; ValueError if one is infinite, before anything is written."""
        unread, self._unread = self._unread, []
        for loss in torch.stack(unread).tolist() if unread else []:
            if not math.isfinite(loss):
                raise ValueError(f"the loss became {loss} in {self._place()}")
            self.losses.append(loss)

    def saving(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Yields batches; if a process cannot read one, all save the finished steps before they end."""
        iterator = iter(batches)
        while True:
            batch, problem = None, None
            try:
                batch = next(iterator, None)
            except Exception as error:  # a photo that cannot be read, a reading process that was killed
                problem = error
            if distributed.maximum(problem is not None):
                self.save_last()
                logger.warning("%d steps of epoch %d are saved, to resume from", self.steps, self.epoch + 1)
                raise problem or SystemExit(1)
            if batch is None:
                return
            yield batch

    def record_epoch(self, recalls: dict[int, float], score: float) -> bool:
        """Ends the epoch: writes its files, and best_model.pth if the score is strictly better, which is returned."""
        self.read_losses()
        self.epoch, self.recalls = self.epoch + 1, recalls
        row = {"epoch": self.epoch, "steps": len(self.losses), "loss": self.mean_loss, "lr": self.lr}
        if distributed.is_main():
            metrics.append_row(self.folder, {**row, **{f"R@{n}": recall for n, recall in recalls.items()}})
        better = score > self.best_score
        self.best_score, self.not_improved = (score, 0) if better else (self.best_score, self.not_improved + 1)
        self.losses, self.order = [], None
        if better:
            self.save_best()
        self.save_last()
        if not distributed.on_main((self.folder / checkpoint.BEST).is_file):
            raise self._best_is_gone()
        return better

    @property
    def mean_loss(self) -> float:
        """Mean loss of the steps in the current epoch."""
        self.read_losses()
        return math.fsum(self.losses) / len(self.losses)

    def _place(self) -> str:
        return (
            f"step {len(self.losses) + 1} of epoch {self.epoch + 1} at a learning rate of {self.optimization.lr:.3g}; "
            f"lower --lr; the newest good checkpoint is {self.folder / checkpoint.LAST}"
        )

    def _content(self) -> dict[str, Any]:
        self.read_losses()
        if not all(parameter.isfinite().all() for parameter in self.model.parameters()):
            raise ValueError(f"a weight became infinite before {self._place()}")
        return {
            "model_state_dict": self.model.state_dict(),
            **self.facts,
            "encoder_retired": self.optimization.encoder_retired,
            "epoch_num": self.epoch,
            "losses": self.losses,
            "lr": self.lr,
            "recalls": self.recalls,
            "best_score": self.best_score,
            "not_improved_num": self.not_improved,
        }

    def save_best(self) -> None:
        """Writes best_model.pth: the weights, with how they were trained."""
        self._save(checkpoint.BEST, self._content())

    def save_last(self) -> None:
        """Writes last_model.pth: everything needed to resume; the one before becomes previous_model.pth."""
        content = self._content() | {
            "optimization": self.optimization.state_dict(),
            "generators": distributed.gather_objects(generator_states()),
            "decisive": self.must_match,
        }
        if self.order is not None:
            content["order"] = torch.from_numpy(self.order)
        self._save(checkpoint.LAST, content)

    def _save(self, name: str, content: dict[str, Any]) -> None:
        if distributed.is_main():
            checkpoint.save(self.folder / name, content)
        distributed.barrier()  # no process reads it before it is written

    def _keep_best(self) -> None:
        """Checks now, rather than after the last epoch, that there is a best model to evaluate."""
        path = self.folder / checkpoint.BEST
        if distributed.on_main(lambda: checkpoint.is_whole(path, like=self.model.state_dict())):
            return
        if self.not_improved or self.losses:
            raise self._best_is_gone()
        logger.warning("%s was missing or damaged: rewritten from the checkpoint, which is the best so far", path)
        self.save_best()

    def _best_is_gone(self) -> ValueError:
        best, last = self.folder / checkpoint.BEST, self.folder / checkpoint.LAST
        return ValueError(
            f"{best} is missing or damaged, and {last} is from later steps; restore it, or start a new run with its "
            f"weights: python3 -m model.export --resume={last} --output=w.safetensors, then --resume=w.safetensors"
        )

    def restore(self, content: dict[str, Any]) -> None:
        """Resumes from a `last_model.pth`, whose weights the model already has, if options are the same."""
        checkpoint.require_same(self.must_match, {**self.unless_said, **content["decisive"]})
        self.epoch, self.losses, self.lr = content["epoch_num"], content["losses"], content["lr"]
        self.recalls, self.best_score = content["recalls"], content["best_score"]
        self.not_improved = content["not_improved_num"]
        self.order = content["order"].numpy() if "order" in content else None
        self._keep_best()
        self.optimization.load_state_dict(content["optimization"])
        if distributed.is_main():
            metrics.cut_rows(self.folder, self.epoch)
        states, processes = content["generators"], distributed.world_size()
        if len(states) != processes:
            consequence = ": dropout differs, and the cross-image encoder attends across other images"
            consequence *= self.optimization.encoder is not None
            logger.warning(
                "the checkpoint was written by %d processes, but there are now %d%s",
                len(states),
                processes,
                consequence,
            )
        elif not restore_generators(states[distributed.rank()]):
            logger.warning("the checkpoint was written on another kind of device: the encoder's dropout differs")
