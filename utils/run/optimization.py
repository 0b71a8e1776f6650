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


def schedule(
    optimizer: torch.optim.Optimizer,
    name: str = "halving",
    *,
    steps_per_epoch: int,
    total_steps: int,
    warmup_steps: int = 0,
    end_factor: float = 0.0,
) -> LRScheduler:
    """The schedule of the learning rates of all parameter groups, to step after each optimiser step.

    Args:
        optimizer: the optimiser; its current rates are the peak rates.
        name: "halving" halves them every third epoch, as released; "linear" and "cosine" lower them to `end_factor`
            times their value by the end of the last step, and then keep them.
        steps_per_epoch: optimiser steps in an epoch.
        total_steps: steps of the whole run, including the warm-up; has no effect with "halving".
        warmup_steps: steps before the schedule begins; rates rise in equal steps from 1 / (warmup_steps + 1) on.
        end_factor: for "linear" and "cosine".

    Raises:
        ValueError: the warm-up leaves "linear" or "cosine" no step.
    """
    steps = total_steps - warmup_steps
    if name != "halving" and total_steps and steps < 1:
        raise ValueError(
            f"--warmup_steps {warmup_steps} leaves no steps for --lr_schedule {name}: the run has {total_steps}; use "
            "fewer, or more --epochs_num"
        )

    if name == "halving" and 0 < total_steps <= warmup_steps:
        logger.warning(
            "--warmup_steps %d covers the whole run of %d steps: learning rates do not reach their full value",
            *(warmup_steps, total_steps),
        )

    def half_wave(step: int) -> float:  # CosineAnnealingLR would end at the same rate in all groups
        return end_factor + (1 - end_factor) * (1 + math.cos(math.pi * min(step / max(steps, 1), 1))) / 2

    # Created only when chosen: a scheduler sets the rates when it is created.
    schedules: dict[str, Callable[[], LRScheduler]] = {
        "halving": lambda: StepLR(optimizer, step_size=3 * steps_per_epoch, gamma=0.5),
        "linear": lambda: LinearLR(optimizer, 1.0, end_factor, total_iters=max(steps, 1)),
        "cosine": lambda: LambdaLR(optimizer, half_wave),
    }
    if not warmup_steps:
        return schedules[name]()
    warmup = LinearLR(optimizer, 1 / (warmup_steps + 1), 1.0, total_iters=warmup_steps)
    return SequentialLR(optimizer, [warmup, schedules[name]()], milestones=[warmup_steps])


class Optimization:
    """The optimiser of a model with its `schedule`; by default learning rates halve every third epoch.

    The cross-image encoder (`model.encoder`, may be None) follows `encoder_training`:

    - "every_step": it is trained at `lr_encoder`, on the same schedule, as the paper describes.
    - "released": what the released training script does in fp32. There the main optimiser and the encoder's own Adam at
      `lr_encoder` both step it once, and then it is frozen. The first step of Adam is proportional to the learning
      rate, so one step at the sum of the two rates is the same, and no parameter needs two optimisers.

    Args:
        model: its trainable parameters are optimised.
        optim: a name from `OPTIMIZERS`.
        weight_decay: weight decay of all parameters; None keeps the optimiser's default.
        lr: learning rate of everything but the encoder.
        lr_encoder: learning rate of the encoder.
        encoder_training: "released" (Adam only) or "every_step".
        encoder_retired: whether the run being resumed already took the one step of "released".
        steps_per_epoch: optimiser steps in an epoch, including the last short batch.
        epochs: epochs of the whole run, at whose end "linear" and "cosine" end.
        lr_schedule: `name` of `schedule`, for all parameters.
        warmup_steps: see `schedule`.
        lr_end_factor: `end_factor` of `schedule`.
        scale_gradients: scale the loss so that fp16 gradients do not underflow.
        clip_grad_norm: the largest L2 norm of all gradients together; 0 does not clip.

    Attributes:
        skipped: steps that gradient scaling skipped because gradients overflowed; the schedule does not count them.

    Raises:
        ValueError: "released" with an optimiser other than Adam.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        optim: str = "adam",
        weight_decay: float | None = None,
        lr: float,
        lr_encoder: float,
        encoder_training: str = "released",
        encoder_retired: bool = False,
        steps_per_epoch: int,
        epochs: int = 0,
        lr_schedule: str = "halving",
        warmup_steps: int = 0,
        lr_end_factor: float = 0.0,
        scale_gradients: bool = False,
        clip_grad_norm: float = 0.0,
    ):
        self.encoder: nn.Module | None = model.encoder  # type: ignore[assignment]
        self.encoder_training = encoder_training
        self.encoder_retired = False
        self.clip_grad_norm = clip_grad_norm
        self.skipped = 0
        if self.encoder is not None and encoder_training == "released" and optim != "adam":
            raise ValueError(
                f"--encoder_training released, as in the released script, exists for Adam only, not for "
                f"--optim {optim}; use --encoder_training every_step"
            )
        in_encoder = set() if self.encoder is None else set(self.encoder.parameters())
        groups: list[dict[str, Any]] = [
            {"params": [p for p in model.parameters() if p.requires_grad and p not in in_encoder], "lr": lr}
        ]
        if self.encoder is not None:
            rate = lr + lr_encoder if encoder_training == "released" else lr_encoder
            groups.append({"params": list(self.encoder.parameters()), "lr": rate})
        if warmup_steps and self.encoder is not None and encoder_training == "released":
            logger.warning(
                "--warmup_steps %d lowers the encoder's rate too in its only step (--encoder_training released)",
                warmup_steps,
            )
        optimizer, settings = OPTIMIZERS[optim]
        if weight_decay is not None:
            settings = {**settings, "weight_decay": weight_decay}
        device = next(model.parameters()).device.type
        # On a GPU, one kernel for all parameters; on a CPU, the loop that tests compare with the released code.
        self.optimizer = optimizer(groups, fused=device == "cuda" or None, **settings)
        self.scheduler = schedule(
            self.optimizer,
            lr_schedule,
            steps_per_epoch=steps_per_epoch,
            total_steps=epochs * steps_per_epoch,
            warmup_steps=warmup_steps,
            end_factor=lr_end_factor,
        )
        self.scaler = torch.amp.GradScaler(device, enabled=scale_gradients)
        if encoder_retired and encoder_training == "released":
            self._retire_encoder()

    @property
    def lr(self) -> float:
        """The current learning rate of everything but the encoder."""
        return self.optimizer.param_groups[0]["lr"]

    def backward(self, loss: Tensor) -> None:
        """Computes the gradients of a scalar loss."""
        self.scaler.scale(loss).backward()

    def step(self) -> bool:
        """Updates the weights once and clears the gradients.

        Returns:
            Whether there are now fewer parameters to train.
        """
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
            logger.info(
                "step skipped (%d so far): its gradients overflowed at a scale of %g, which is now %g",
                *(self.skipped, scale, self.scaler.get_scale()),
            )
            return False
        self.scheduler.step()
        retires = self.encoder is not None and self.encoder_training == "released" and not self.encoder_retired
        if retires:
            self._retire_encoder()
        return retires

    def _retire_encoder(self) -> None:
        self.encoder_retired = True
        if self.encoder is not None:
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
        """Resumes from a `state_dict`; this machine, not the file, decides which optimiser kernels run."""
        groups = [
            {**of_file, **{name: own.get(name) for name in ("fused", "foreach", "capturable")}}
            for of_file, own in zip(state["optimizer"]["param_groups"], self.optimizer.param_groups, strict=True)
        ]
        self.optimizer.load_state_dict({**state["optimizer"], "param_groups": groups})
        self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        self.skipped = state.get("skipped", 0)
        if state["encoder_retired"] and not self.encoder_retired:
            self._retire_encoder()
