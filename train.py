"""Fine-tunes SuperVLAD on GSV-Cities, keeping the model that recalls most on the validation split."""

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from datasets.database_queries import DatabaseQueries
from datasets.gsv_cities import GSVCities, PlaceBatches
from datasets.transforms import TrainingTransform, evaluation_transform
from model import SuperVLADNet, build_model
from model.initialization import initialize_layer
from model.weights import FOUNDATION_FILES, load_checkpoint, load_foundation, missing_foundation
from parser import TrainOptions, parse
from test import evaluate, format_recalls, image_batches
from utils import checkpoint, run_log
from utils.device import estimated_hours, pick_device
from utils.multi_similarity import MinedMultiSimilarity
from utils.optimization import Optimization
from utils.seed import seed_everything

logger = logging.getLogger(__name__)


def run(options: TrainOptions) -> dict[int, float]:
    """Trains as the options say and evaluates the best model on the test split.

    Returns:
        Recall@N of the best model on the test split in percent, `{N: percent}`.

    Raises:
        SystemExit: bad input; the message is in the log and on the terminal.
    """
    with run_log.run_folder(options.save_dir) as folder:
        device = pick_device(options.device)
        run_log.log_header(asdict(options), device)
        seed_everything(options.seed)

        # The data: places to train on, and the splits that judge.
        places = GSVCities(
            options.train_dataset_folder or options.eval_datasets_folder / "gsv_cities",
            cities=options.cities,
            images_per_place=options.images_per_place,
            transform=TrainingTransform(options.train_resize, options.randaugment_ops),
            seed=options.seed,
        )
        batches = PlaceBatches(places, batch_size=options.train_batch_size, place_order=options.place_order)
        loader = DataLoader(
            places,
            batch_sampler=batches,
            num_workers=options.num_workers,
            pin_memory=device.type == "cuda",
            persistent_workers=options.num_workers > 0,
            generator=torch.Generator(),  # of its own: how often it draws depends on the number of workers
        )
        read_split = partial(DatabaseQueries.from_folder, options.eval_datasets_folder, options.eval_dataset_name)
        val, test = read_split("val"), read_split("test")
        logger.info("training on %s; validation on %s", places, val)

        # The model: DINOv2's weights with the last blocks free, the layer's clusters found by k-means.
        model = build_model(**options.model)
        if options.resume is not None:
            load_checkpoint(model, options.resume)
        elif options.foundation_model_path is not None:
            load_foundation(model.backbone, options.foundation_model_path)
        elif options.backbone in FOUNDATION_FILES:
            raise missing_foundation(options.backbone)
        model.backbone.freeze(options.freeze_te)
        model.to(device)
        read_images = partial(
            image_batches,
            transform=evaluation_transform(options.resize, options.antialias),
            batch_size=options.extraction_batch_size,
            num_workers=options.num_workers,
            device=device,
        )
        if options.resume is None:
            rng = np.random.default_rng(options.seed)
            paths = initialization_images(read_split, places)
            paths = [paths[index] for index in rng.choice(len(paths), size=min(5000, len(paths)), replace=False)]
            initialize_layer(model, read_images(paths, progress="initialisation"), generator=rng)
        run_log.log_parameters(model)

        optimization = Optimization(
            model,
            optim=options.optim,
            lr=options.lr,
            lr_encoder=options.lr_encoder,
            encoder_training=options.encoder_training,
            steps_per_epoch=len(batches),
            scale_gradients=options.mixed_precision,
        )
        if device.type == "cpu" and options.backbone in FOUNDATION_FILES and options.epochs_num:
            images = options.epochs_num * len(places) * options.images_per_place
            hours = estimated_hours(model.backbone, size=options.train_resize, images=images)
            logger.warning("training %s on a CPU takes about %.0f hours; use a CUDA GPU", options.backbone, hours)

        # The epochs: train, validate, keep the best, stop when it stays the best for too long.
        recall = partial(
            evaluate,
            model,
            read_images=read_images,
            positive_distance=options.val_positive_dist_threshold,
            infer_batch_size=options.infer_batch_size,
            device=device,
        )
        progress: dict[str, Any] = {"epoch_num": 0, "recalls": {}, "best_score": -1.0, "not_improved_num": 0}

        def save(name: str, **more: Any) -> None:
            made = {"model": options.model, "encoder_training": options.encoder_training}
            checkpoint.save(folder / name, {"model_state_dict": model.state_dict(), **made, **progress, **more})

        save("best_model.pth")
        save("last_model.pth", optimization=optimization.state_dict())
        for epoch in range(1, options.epochs_num + 1):
            started, lr = time.perf_counter(), optimization.lr
            batches.epoch = epoch - 1
            loss = train_one_epoch(model, loader, optimization, device=device, mixed_precision=options.mixed_precision)
            trained = time.perf_counter()
            recalls = recall(val, recall_values=sorted({1, 5, *options.recall_values}))
            score = recalls[1] + recalls[5]
            better = score > progress["best_score"]
            progress.update(epoch_num=epoch, recalls=recalls)
            if better:
                progress.update(best_score=score, not_improved_num=0)
                save("best_model.pth")
            else:
                progress["not_improved_num"] += 1
            save("last_model.pth", optimization=optimization.state_dict())
            logger.info(
                "epoch=%02d loss=%.4f lr=%.3g %s train=%.0fs val=%.0fs%s",
                epoch,
                loss,
                lr,
                " ".join(f"R@{n}={recall:.1f}" for n, recall in recalls.items()),
                trained - started,
                time.perf_counter() - trained,
                " best" if better else "",
            )
            if progress["not_improved_num"] >= options.patience:
                logger.info("stopping: no better validation recall for %d epochs", options.patience)
                break

        load_checkpoint(model, folder / "best_model.pth")
        recalls = recall(test, recall_values=options.recall_values)
        results = {"recalls": recalls, "dataset": test.sizes, "validation": progress, "places": len(places)}
        run_log.write_results(folder, results, asdict(options), device)
        logger.info("Recalls on %s: %s", test, format_recalls(recalls))
    return recalls


def initialization_images(read_split: Callable[[str], DatabaseQueries], places: GSVCities) -> list[str]:
    """The images whose local features are clustered: the evaluation dataset's train split, else GSV-Cities."""
    try:
        return read_split("train").covered_images(10.0)
    except FileNotFoundError:
        logger.info("no train split beside the evaluation dataset: the layer is initialised from GSV-Cities images")
        return places.all_image_paths()


def train_one_epoch(
    model: SuperVLADNet, loader: DataLoader, optimization: Optimization, *, device: torch.device, mixed_precision: bool
) -> float:
    """Goes over the places once with the multi-similarity loss on mined pairs.

    Returns:
        The mean loss of the steps.

    Raises:
        ValueError: a loss that is not finite; the weights are then of no use.
    """
    criterion = MinedMultiSimilarity()
    model.train()
    losses = []
    bar = tqdm(loader, desc="training", unit="step")
    for images, labels in bar:
        labels = labels.repeat_interleave(images.shape[1]).to(device, non_blocking=True)  # (P,) -> (P*K,)
        images = images.flatten(0, 1).to(device, non_blocking=True)  # (P, K, 3, H, W) -> (P*K, 3, H, W)
        with torch.autocast(device.type, dtype=torch.float16, enabled=mixed_precision):
            loss = criterion(model(images), labels)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise ValueError(f"the loss became {losses[-1]} at a learning rate of {optimization.lr}; lower --lr")
        optimization.backward(loss)
        optimization.step()
        bar.set_postfix(loss=f"{losses[-1]:.3f}")
    return float(np.mean(losses))


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line; exit status 2 for bad input."""
    run(parse(TrainOptions, argv))


if __name__ == "__main__":
    main()
