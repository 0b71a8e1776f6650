"""Fine-tunes SuperVLAD on GSV-Cities, keeping the model that recalls most on the validation split."""

from parser import TrainOptions, parse
from utils.signals import quiet_ctrl_c

if __name__ == "__main__":
    OPTIONS = parse(TrainOptions)  # before the seconds of importing the rest: a mistake is answered at once
    quiet_ctrl_c()

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from datasets import similar_places
from datasets.alignment import alignment, log_alignment
from datasets.database_queries import DatabaseQueries
from datasets.gsv_cities import GSVCities, PlaceBatches
from datasets.transforms import TrainingTransform, evaluation_transform, normalize, to_unit
from model import SuperVLADNet, build_model
from model.initialization import initialize_layer, sample_local_features
from model.weights import (
    FOUNDATION_FILES,
    GATED_FILES,
    fetch_foundation,
    load_checkpoint,
    load_foundation,
    read_file,
)
from test import evaluate, format_recalls, image_batches
from utils import checkpoint, distributed, report, run_log, search
from utils.device import (
    allow_tf32,
    autocast,
    estimated_hours,
    extraction_batch_size,
    peak_memory,
    pick_device,
    reading_workers,
    require_determinism,
    reset_peak_memory,
    to_device,
)
from utils.multi_similarity import MinedMultiSimilarity
from utils.optimization import Optimization
from utils.outputs import Outputs
from utils.preemption import Preemption
from utils.progress import Progress
from utils.reading import ImageLoader
from utils.seed import seed_everything

logger = logging.getLogger(__name__)


def run(options: TrainOptions) -> dict[int, float]:
    """Trains as the options say and evaluates the best model on the test split.

    Returns:
        Recall@N of the best model on the test split in percent, `{N: percent}`.

    Raises:
        SystemExit: bad input (status 2), results.json not written (1), or a signal that asked to stop (128 + signal,
            after a checkpoint).
    """
    with distributed.processes(), run_log.RunLog() as log, Preemption() as preemption:
        device = pick_device(options.device)
        run_log.log_header(asdict(options), device, given=options.given)
        run_log.compare_with_record(asdict(options), device)
        seed_everything(options.seed)
        allow_tf32(options.precision == "tf32")
        require_determinism(options.deterministic)

        # The data: places to train on, and the splits that judge.
        gsv_cities = options.train_dataset_folder or (options.eval_datasets_folder / "gsv_cities",)
        photos = [options.eval_datasets_folder / options.eval_dataset_name / "images"]
        photos += [folder / "Images" for folder in gsv_cities]
        run_log.require_outside(photos, save_dir=Path("logs") / options.save_dir)
        places = GSVCities(
            gsv_cities,
            cities=options.cities,
            images_per_place=options.images_per_place,
            transform=TrainingTransform(options.train_resize, options.randaugment_ops),
            seed=options.seed,
        )
        if len(places) < 2:
            raise ValueError(
                f"{places}: there is nothing to learn from one place; add cities, or lower --images_per_place to keep "
                "places with fewer images"
            )
        if options.train_batch_size < distributed.world_size():
            raise ValueError(
                f"--train_batch_size {options.train_batch_size} gives no place to some of {distributed.world_size()} "
                "processes; use as many places or more"
            )
        if options.train_batch_size < 2:
            raise ValueError("--train_batch_size 1 leaves no other place to tell a place from; use 2 or more")
        batches = PlaceBatches(places, batch_size=options.train_batch_size, place_order=options.place_order)
        mines = options.place_order == "similar" and len(batches) > 1
        if options.place_order == "similar" and not mines:
            logger.warning("--place_order similar has no part: all %d places share a batch", len(places))
        elif options.epochs_num == 1 and options.place_order != "fixed":
            logger.warning("--place_order %s has no part: it begins with the second epoch", options.place_order)
        total_steps = options.epochs_num * len(batches)
        if options.lr_schedule == "halving" and 0 < total_steps <= options.warmup_steps:
            logger.warning(
                "--warmup_steps %d is as long as the run or longer, %d steps: learning rates never reach their height",
                *(options.warmup_steps, total_steps),
            )
        num_workers = reading_workers(device) if options.num_workers is None else options.num_workers
        loader = ImageLoader(
            places,
            batches,
            batch_size=max(batches.shares(0)),
            item_bytes=options.images_per_place * 3 * math.prod(options.train_resize),
            num_workers=num_workers,
            device=device,
        )
        val, test = (
            DatabaseQueries.from_folder(options.eval_datasets_folder, options.eval_dataset_name, split)
            for split in ("val", "test")
        )
        logger.info("training on %s; validation on %s", places, val)
        if options.crossimage_encoder and distributed.is_main():
            for split in (val, test):
                near = split.positives(options.val_positive_dist_threshold)
                found = alignment(split, near, options.infer_batch_size)
                log_alignment(split, found, "eval.py's --encoder_context file_order unaligned")

        read_images = partial(
            image_batches,
            transform=evaluation_transform(options.resize, options.antialias),
            batch_size=options.extraction_batch_size or extraction_batch_size(device),
            num_workers=num_workers,
            device=device,
            stop=preemption.stop,  # all that was trained is in last_model.pth
        )

        # The model: published weights with the last blocks free, the layer's clusters found by k-means.
        model = build_model(**options.model)
        path = Path(options.resume) if options.resume else None
        if options.resume == "auto":
            log.lock(Path("logs") / options.save_dir)  # so that two never find the same run
            runs = run_log.runs_of(options.save_dir)
            path = distributed.on_main(lambda: checkpoint.newest(runs, read=read_file))
        content = {} if path is None else load_checkpoint(model, path)
        if model.projection is not None:
            logger.warning("%s ends with a PCA, which has no part in training: left out", path)
            model.projection = None
        goes_on = "optimization" in content  # a run of ours; any other file gives its weights to a new run
        foundation = options.foundation_model_path
        published = options.backbone in FOUNDATION_FILES or options.backbone in GATED_FILES
        if path is None and foundation is None and published:
            foundation = distributed.on_main(lambda: fetch_foundation(options.backbone))
        if path is None and foundation is not None:
            load_foundation(model.backbone, foundation)
        model.backbone.freeze(options.freeze_te)
        model.backbone.activation_checkpointing = options.activation_checkpointing
        model.grad_cache_chunk = options.grad_cache_chunk
        model.to(device)
        if options.compile:
            model.backbone.compile_blocks()
        optimization = Optimization(
            model,
            optim=options.optim,
            weight_decay=options.weight_decay,
            lr=options.lr,
            lr_encoder=options.lr_encoder,
            encoder_training=options.encoder_training,
            encoder_retired=content.get("encoder_retired", False),
            steps_per_epoch=len(batches),
            epochs=options.epochs_num,
            lr_schedule=options.lr_schedule,
            warmup_steps=options.warmup_steps,
            lr_end_factor=options.lr_end_factor,
            scale_gradients=options.precision == "fp16",
            clip_grad_norm=options.clip_grad_norm,
        )
        folder = log.open(options.save_dir, path.parent if path and goes_on else None)
        preemption.advice = f"nothing was trained yet; the same command begins again, and {folder} can be removed"
        run_log.log_parameters(model)
        if device.type == "cpu" and published and options.epochs_num:
            seen = options.epochs_num * len(places) * options.images_per_place
            hours = estimated_hours(model.backbone, size=options.train_resize, images=seen)
            logger.warning("training %s on a CPU takes about %.0f hours; use a CUDA GPU", options.backbone, hours)
        progress = Progress(
            folder,
            model,
            optimization,
            facts={
                "model": options.model,
                "encoder_training": options.encoder_training,
                "resize": list(options.resize),
            },
            decisive={
                **options.decisive,
                "the number of places": len(places),
                "the digest of GSV-Cities' tables": places.digest,
            },
            unless_said=options.defaults,
            read_every=1 if device.type == "cpu" else 20,
        )
        if distributed.rank():
            seed_everything(options.seed + distributed.rank())  # a dropout of its own
        if goes_on:
            progress.restore(content)
            if progress.epoch >= options.epochs_num or progress.not_improved >= options.patience:
                logger.info("%s is of a finished run: only the test split is evaluated again", path)
            else:
                logger.info("going on from %s: epoch %d, step %d", path, progress.epoch + 1, progress.steps + 1)
        else:
            if path is None:
                rng = np.random.default_rng(options.seed)
                paths = initialization_images(options, places)
                paths = [paths[index] for index in rng.choice(len(paths), size=min(5000, len(paths)), replace=False)]
                share = distributed.shares(len(paths))[distributed.rank()]
                images = read_images(paths[share], progress="initialisation")
                features = sample_local_features(model, images, generator=rng, skip=share.start)
                features = torch.from_numpy(distributed.gather_rows(features.numpy()))
                if distributed.is_main():
                    initialize_layer(model, features)
            distributed.broadcast_weights(model)
            progress.save_best()
            progress.save_last()
        preemption.advice = f"all that was trained is in {folder / checkpoint.LAST}; " + (
            "the same command goes on"
            if options.resume == "auto"
            else f"the same command with --resume={folder / checkpoint.LAST} goes on"
        )

        # The epochs: train, validate, keep the best, stop when it stays the best for too long.
        recall = partial(
            evaluate,
            model,
            read_images=read_images,
            positive_distance=options.val_positive_dist_threshold,
            infer_batch_size=options.infer_batch_size,
            device=device,
            folder=folder / "descriptors",
        )
        while progress.epoch < options.epochs_num and progress.not_improved < options.patience:
            batches.epoch, batches.start = progress.epoch, len(progress.losses)
            if mines and progress.epoch and progress.order is None:
                progress.order = order_by_similarity(
                    model,
                    batches,
                    partial(
                        read_images,
                        transform=evaluation_transform(options.train_resize, antialias=True),
                        batch_size=similar_places.TOGETHER,
                    ),
                    device=device,
                    precision=options.val_precision,
                )
            batches.mined = progress.order
            speed = train_one_epoch(
                model,
                loader,
                batches,
                optimization,
                progress,
                device=device,
                precision=options.precision,
                checkpoint_every=options.checkpoint_every,
                preemption=preemption,
            )
            progress.save_last()  # so that nothing is trained again if validation is cut short
            loss = progress.mean_loss
            recalls = recall(val, recall_values=sorted({1, 5, *options.recall_values}), precision=options.val_precision)
            better = progress.record_epoch(recalls, score=recalls[1] + recalls[5])
            if distributed.is_main():
                try:
                    report.draw_training(folder)
                except Exception as error:  # a full disk, or a table that somebody wrote in
                    logger.warning("cannot draw %s (%s)", folder / report.TRAINING, error)
            logger.info(
                "epoch=%02d loss=%.4f lr=%.3g %s %s%s",
                progress.epoch,
                loss,
                progress.lr,
                " ".join(f"R@{n}={recall:.1f}" for n, recall in recalls.items()),
                speed,
                " best" if better else "",
            )
        if progress.not_improved >= options.patience:
            logger.info("stopped: no better validation recall for %d epochs", options.patience)

        best = load_checkpoint(model, folder / checkpoint.BEST)
        recalls = recall(test, recall_values=options.recall_values)
        validation = {"epochs": progress.epoch, "best_epoch": best["epoch_num"], "best_recalls": best["recalls"]}
        results = {"recalls": recalls, "dataset": test.sizes, "validation": validation, "places": len(places)}
        logger.info("log and results.json in %s", folder)
        logger.info("Recalls on %s: %s", test, format_recalls(recalls))
        outputs = Outputs()
        with outputs.writing(str(folder / "results.json")):
            run_log.write_results(folder, results, asdict(options), device)
        if outputs.missing:
            raise SystemExit(1)
    return recalls


def initialization_images(options: TrainOptions, places: GSVCities) -> list[str]:
    """The images whose local features are clustered: the evaluation dataset's train split, else GSV-Cities."""
    if (options.eval_datasets_folder / options.eval_dataset_name / "images" / "train").is_dir():
        train = DatabaseQueries.from_folder(options.eval_datasets_folder, options.eval_dataset_name, "train")
        return train.covered_images(10.0)
    logger.info("no train split beside the evaluation dataset: the layer is initialised from GSV-Cities images")
    return places.all_image_paths()


@torch.inference_mode()
def order_by_similarity(
    model: SuperVLADNet,
    batches: PlaceBatches,
    read_images: Callable[..., Iterator[Tensor]],
    *,
    device: torch.device,
    precision: str,
) -> NDArray[np.int64]:
    """The order of an epoch in which places that the model confuses share a batch, see `similar_places`.

    It depends on seed, epoch and weights alone; each process describes its share, and no generator of training is used.

    Args:
        model: what is trained; it describes each photo by itself, in evaluation mode.
        batches: of the epoch.
        read_images: paths, and the name of the bar, to batches of `similar_places.TOGETHER` on the device.
        device: where the model is, and what is searched on.
        precision: of the backbone, a name from `utils.device.autocast`.
    """
    started = time.perf_counter()
    places, epoch = batches.dataset, batches.epoch
    model.eval()
    rng = np.random.default_rng((places.seed, epoch, len(places)))
    counted = 0

    def nearest(described: NDArray[np.int64], k: int) -> NDArray[np.int64]:
        nonlocal counted
        counted = len(described)
        paths = [path for place in described for path in places.drawn_paths(place, similar_places.IMAGES, rng)]
        share = distributed.shares(len(paths), similar_places.TOGETHER)[distributed.rank()]  # in the batches of one
        rows = [np.empty((0, model.descriptor_dim), dtype=np.float32)]
        for images in read_images(paths[share], progress="similar places"):
            with autocast(device, precision):
                vectors = model.cluster_vectors(images)
            rows.append(model.describe(vectors.float(), group=1).cpu().numpy())
        of_images = distributed.gather_rows(np.concatenate(rows))

        def search_all() -> NDArray[np.int64]:
            means = of_images.reshape(len(described), -1, of_images.shape[1]).mean(axis=1)
            means /= np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)
            return search.nearest(means, [(np.arange(len(means)), means)], k, device)[1]

        return distributed.on_main(search_all)

    order = similar_places.similar_order(
        batches.order(epoch),
        batch_size=batches.batch_size,
        images_per_place=places.images_per_place,
        rng=rng,
        nearest=nearest,
    )
    logger.info(
        "epoch %d: %d of %d places were described in %.1f s, and those alike share a batch",
        epoch + 1,
        counted,
        len(places),
        time.perf_counter() - started,
    )
    return order


def train_one_epoch(
    model: SuperVLADNet,
    loader: ImageLoader,
    batches: PlaceBatches,
    optimization: Optimization,
    progress: Progress,
    *,
    device: torch.device,
    precision: str,
    checkpoint_every: int,
    preemption: Preemption,
) -> str:
    """Goes over the places once, or over what is left of them, with the multi-similarity loss on mined pairs.

    Returns:
        Images a second, share of the time spent waiting for data, and peak memory, for the log.

    Raises:
        ValueError: a loss that is not finite.
        SystemExit: a signal asked to stop; the step in hand is done and a checkpoint written.
    """
    criterion = MinedMultiSimilarity()
    model.train()
    replica = distributed.replicate(model)
    reset_peak_memory(device)
    started = waiting = time.perf_counter()
    waited, seen, mined = 0.0, 0, 0
    skipped = optimization.skipped
    bar = tqdm(
        loader,
        desc=f"epoch {progress.epoch + 1}",
        unit="step",
        total=len(batches),
        initial=len(progress.losses),
        disable=not distributed.is_main() or len(progress.losses) == len(batches),
    )
    for images, labels in to_device(bar, device):
        waited += time.perf_counter() - waiting
        counts = [places * images.shape[1] for places in batches.shares(progress.steps)]  # of each process
        labels = labels.repeat_interleave(images.shape[1])  # (P,) -> (P*K,)
        images = normalize(to_unit(images.flatten(0, 1)), inplace=True)  # (P, K, 3, H, W) -> (P*K, 3, H, W)
        with autocast(device, precision):
            descriptors = replica(images)
        descriptors = distributed.gather_with_gradient(descriptors.float(), counts)
        loss = criterion(descriptors, distributed.gather_with_gradient(labels, counts))
        mined += criterion.mined_pairs
        progress.record_step(loss)
        optimization.backward(loss * distributed.world_size())
        if optimization.step():
            replica = distributed.replicate(model)
        if preemption.agreed() or (checkpoint_every and progress.steps % checkpoint_every == 0):
            progress.save_last()
            preemption.stop()
        if progress.losses:
            bar.set_postfix(loss=f"{progress.losses[-1]:.3f}", mined=f"{criterion.mined_share:.0%}", refresh=False)
        seen += len(descriptors)
        waiting = time.perf_counter()
    if seen and not mined:
        logger.warning(
            "no pair of images was mined in epoch %d, so nothing was learnt: no two places of a batch are alike to the "
            "model; use a larger --train_batch_size or other places",
            progress.epoch + 1,
        )
    seconds = max(time.perf_counter() - started, 1e-9)
    speed = f"images/s={seen / seconds:.1f} data_wait={waited / seconds:.1%} peak_mem={peak_memory(device):.2f}GB"
    skipped = optimization.skipped - skipped
    return f"{speed} skipped_steps={skipped}" if skipped else speed


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line.

    Returns:
        The exit status, 0; others, such as 2 for bad input, are raised as SystemExit.
    """
    run(parse(TrainOptions, argv))
    return 0


if __name__ == "__main__":
    run(OPTIONS)
