"""How the weights are updated: optimiser, schedule, gradient scaling and the cross-image encoder's own rule."""

import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LinearLR, LRScheduler, SequentialLR, StepLR

logger = logging.getLogger(__name__)

OPTIMIZERS = {
    "adam": (torch.optim.Adam, {}),
    "adamw": (torch.optim.AdamW, {"weight_decay": 9.5e-9}),
    "sgd": (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 1e-3}),
}


def _schedule(optimizer: torch.optim.Optimizer, recipe: Any, steps_per_epoch: int) -> LRScheduler:
    """The schedule of the learning rates of all parameter groups, to step after each optimiser step."""
    name, warmup_steps = recipe.lr_schedule, recipe.warmup_steps
    total_steps = recipe.epochs_num * steps_per_epoch
    steps = total_steps - warmup_steps
    if name != "halving" and total_steps and steps < 1:
        raise ValueError(
            f"warmup_steps {warmup_steps} leaves no steps for lr_schedule {name}: the run has {total_steps}; use "
            "fewer, or more epochs_num"
        )

    def half_wave(step: int) -> float:  # CosineAnnealingLR would end at the same rate in all groups
        return (1 + math.cos(math.pi * min(step / max(steps, 1), 1))) / 2

    # Created only when chosen: a scheduler sets the rates when it is created.
    schedules: dict[str, Callable[[], LRScheduler]] = {
        "halving": lambda: StepLR(optimizer, step_size=3 * steps_per_epoch, gamma=0.5),
        "linear": lambda: LinearLR(optimizer, 1.0, 0.0, total_iters=max(steps, 1)),
        "cosine": lambda: LambdaLR(optimizer, half_wave),
    }
    if not warmup_steps:
        return schedules[name]()
    warmup = LinearLR(optimizer, 1 / (warmup_steps + 1), 1.0, total_iters=warmup_steps)
    return SequentialLR(optimizer, [warmup, schedules[name]()], milestones=[warmup_steps])


class Optimization:
    """The optimiser of a model with the schedule of its learning rates, as the recipe says.

    The cross-image encoder (`model.encoder`, may be None) follows its `encoder_training`:

    - "every_step": it is trained at `lr_encoder`, on the same schedule, as the paper describes.
    - "released": what the released training script does in fp32. There the main optimiser and the encoder's own Adam at
      `lr_encoder` both step it once, and then it is frozen. The first step of Adam is proportional to the learning
      rate, so one step at the sum of the two rates is the same, and no parameter needs two optimisers.

    The `lr_schedule` "halving" halves all learning rates every third epoch, as released; "linear" and "cosine" lower
    them to 0 by the last step of `epochs_num` epochs, and then keep them. In `warmup_steps` before it begins, rates
    rise in equal steps from 1 / (warmup_steps + 1) on.

    Args:
        recipe: the options of that group.
        steps_per_epoch: optimiser steps in an epoch, including the last short batch.
        scale_gradients: scale the loss so that fp16 gradients do not underflow.
        encoder_retired: whether the run being resumed already took the one step of "released".
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Any,
        *,
        steps_per_epoch: int,
        scale_gradients: bool = False,
        encoder_retired: bool = False,
    ):
        self.encoder: nn.Module | None = model.encoder  # type: ignore[assignment]
        self.encoder_retired = False
        self.clip_grad_norm = recipe.clip_grad_norm
        self.skipped = 0  # steps whose gradients overflowed, which gradient scaling skips and the schedule ignores
        self._one_step = self.encoder is not None and recipe.encoder_training == "released"
        if self._one_step and recipe.optim != "adam":
            raise ValueError(
                f"encoder_training released is of Adam only, not of {recipe.optim}; use encoder_training every_step"
            )
        encoder = {} if self.encoder is None else dict.fromkeys(self.encoder.parameters())
        others = [p for p in model.parameters() if p.requires_grad and p not in encoder]
        groups: list[dict[str, Any]] = [{"params": others, "lr": recipe.lr}]
        if encoder:
            lr = recipe.lr + recipe.lr_encoder if self._one_step else recipe.lr_encoder
            groups.append({"params": list(encoder), "lr": lr})
        optimizer, settings = OPTIMIZERS[recipe.optim]
        if recipe.weight_decay is not None:
            settings = {**settings, "weight_decay": recipe.weight_decay}
        device = next(model.parameters()).device.type
        # On a GPU, one kernel for all parameters; on a CPU, the loop that tests compare with the released code.
        self.optimizer = optimizer(groups, fused=device == "cuda" or None, **settings)
        self.scheduler = _schedule(self.optimizer, recipe, steps_per_epoch)
        self.scaler = torch.amp.GradScaler(device, enabled=scale_gradients)
        if encoder_retired and self._one_step:
            self._retire_encoder()

    @property
    def lr(self) -> float:
        """The current learning rate of everything but the encoder."""
        return self.optimizer.param_groups[0]["lr"]

    def backward(self, loss: Tensor) -> None:
        """Computes the gradients of a scalar loss."""
        self.scaler.scale(loss).backward()

    def step(self) -> bool:
        """Updates the weights once and clears the gradients; returns whether fewer parameters are trained from now."""
        if self.clip_grad_norm:
            self.scaler.unscale_(self.optimizer)
            parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(parameters, self.clip_grad_norm)
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if self.scaler.get_scale() < scale:
            self.skipped += 1
            logger.info("step skipped (%d so far): its gradients overflowed at a scale of %g", self.skipped, scale)
            return False
        self.scheduler.step()
        retires = self._one_step and not self.encoder_retired
        if retires:
            self._retire_encoder()
        return retires

    def _retire_encoder(self) -> None:
        assert self.encoder is not None
        self.encoder_retired = True
        self.encoder.requires_grad_(False)
        logger.info("cross-image encoder frozen after its one step (--encoder_training released)")

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to resume, as tensors and plain values."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "encoder_retired": self.encoder_retired,
            "skipped": self.skipped,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resumes from a `state_dict`; the constructor says whether the encoder is retired.

        This machine, not the file, decides which optimiser kernels run.
        """
        groups = [
            {**of_file, **{name: own.get(name) for name in ("fused", "foreach", "capturable")}}
            for of_file, own in zip(state["optimizer"]["param_groups"], self.optimizer.param_groups, strict=True)
        ]
        self.optimizer.load_state_dict({**state["optimizer"], "param_groups": groups})
        self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        self.skipped = state["skipped"]
