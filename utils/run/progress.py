"""The progress of a training run, saved so that it can resume as if it had never stopped."""

import logging
import math
from collections.abc import Callable, Iterable, Iterator
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
    """

    def __init__(
        self,
        folder: Path,
        model: nn.Module,
        optimization: Optimization,
        *,
        facts: dict[str, Any],
        must_match: dict[str, Any],
    ):
        self.folder = folder
        self.model = model
        self.optimization = optimization
        self.facts = facts
        self.must_match = must_match
        self.epoch = 0  # finished ones, including validation
        self.losses: list[float] = []  # of the steps taken in the current epoch
        self.lr = 0.0  # of the newest step
        self.recalls: dict[int, float] = {}
        self.best_score = -1.0
        self.not_improved = 0  # epochs since the best score
        self.order: NDArray[np.int64] | None = None  # of the current epoch's places, if the model decided it

    def finished(self, epochs: int, patience: int) -> bool:
        """Whether all `epochs` are done, or the best epoch was `patience` epochs ago."""
        return self.epoch >= epochs or self.not_improved >= patience

    def record_step(self, loss: Tensor) -> None:
        """Records a step by its scalar loss; ValueError if that is infinite."""
        self.lr = self.optimization.lr
        value = loss.item()
        if not math.isfinite(value):
            raise ValueError(f"the loss became {value} in {self._place()}")
        self.losses.append(value)

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
                logger.warning("%d steps of epoch %d are saved, to resume from", len(self.losses), self.epoch + 1)
                raise problem or SystemExit(1)
            if batch is None:
                return
            yield batch

    def record_epoch(self, recalls: dict[int, float], score: float) -> bool:
        """Ends the epoch: writes its files, and best_model.pth if the score is strictly better, which is returned."""
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
        return better

    @property
    def mean_loss(self) -> float:
        """Mean loss of the steps in the current epoch."""
        return math.fsum(self.losses) / len(self.losses)

    def _place(self) -> str:
        return (
            f"step {len(self.losses) + 1} of epoch {self.epoch + 1} at a learning rate of {self.optimization.lr:.3g}; "
            f"lower --lr; the newest good checkpoint is {self.folder / checkpoint.LAST}"
        )

    def _content(self) -> dict[str, Any]:
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

    def restore(self, content: dict[str, Any], read: Callable[[Path], dict[str, Any]]) -> None:
        """Resumes from a `last_model.pth`, whose weights the model already has.

        Checks now, rather than after the last epoch, that there is a best model to evaluate; `read` reads it, and
        raises ValueError for a damaged file.

        Raises:
            ValueError: options differ, each named with both values, or the best model is missing or damaged.
        """
        differing = [
            f"{name} was {written} and is now {self.must_match[name]}"
            for name, written in content["decisive"].items()
            if name in self.must_match and written != self.must_match[name]
        ]
        if differing:
            raise ValueError(
                f"the checkpoint has other options: {'; '.join(differing)}; give the same ones, or leave out --resume"
            )
        self.epoch, self.losses, self.lr = content["epoch_num"], content["losses"], content["lr"]
        self.recalls, self.best_score = content["recalls"], content["best_score"]
        self.not_improved = content["not_improved_num"]
        self.order = content["order"].numpy() if "order" in content else None
        best, last = self.folder / checkpoint.BEST, self.folder / checkpoint.LAST
        if not distributed.on_main(lambda: checkpoint.is_whole(best, self.model.state_dict(), read=read)):
            if self.not_improved or self.losses:
                raise ValueError(
                    f"{best} is missing or damaged, and {last} is from later steps; restore it, or start a new run "
                    f"with its weights: python3 -m model.export --resume={last} --output=w.safetensors, then "
                    "--resume=w.safetensors"
                )
            logger.warning("%s was missing or damaged: rewritten from the checkpoint, which is the best so far", best)
            self.save_best()
        self.optimization.load_state_dict(content["optimization"])
        if distributed.is_main():
            metrics.cut_rows(self.folder, self.epoch)
        states, processes = content["generators"], distributed.world_size()
        if len(states) != processes:
            consequence = ": the encoder's dropout differs, and it attends across other images"
            consequence *= self.optimization.encoder is not None
            words = "the checkpoint was written by %d processes, but there are now %d%s"
            logger.warning(words, len(states), processes, consequence)
        elif not restore_generators(states[distributed.rank()]):
            logger.warning("the checkpoint was written on another kind of device: the encoder's dropout differs")
