"""Fine-tunes SuperVLAD on GSV-Cities and keeps the model with the best recall on the validation split."""

from parser import TrainOptions, parse
from utils.system.signals import quiet_ctrl_c

if __name__ == "__main__":
    OPTIONS = parse(TrainOptions)  # before the slow imports, so that an error is reported at once
    quiet_ctrl_c()

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from datasets.evaluation.alignment import alignment, log_alignment
from datasets.evaluation.database_queries import DatabaseQueries
from datasets.photos.transforms import evaluation_transform, normalize, to_unit
from datasets.training import similar_places
from datasets.training.gsv_cities import GSVCities, PlaceBatches
from datasets.training.randaugment import TrainingTransform
from model import SuperVLADNet, build_model
from model.initialization import initialize_layer, sample_local_features
from model.loss import MinedMultiSimilarity
from model.weights import FOUNDATION_FILES, GATED_FILES, fetch_foundation, load_checkpoint, load_foundation, read_file
from test import evaluate, format_recalls, image_batches
from utils.outputs import report
from utils.run import checkpoint
from utils.run import log as run_log
from utils.run.optimization import Optimization
from utils.run.preemption import Preemption
from utils.run.progress import Progress
from utils.system import distributed
from utils.system.device import (
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
from utils.system.files import Outputs
from utils.system.reading import ImageLoader
from utils.system.seed import seed_everything

logger = logging.getLogger(__name__)

ReadImages = Callable[..., Iterator[Tensor]]  # `image_batches` that still needs paths and the progress bar's name


def run(options: TrainOptions) -> dict[int, float]:
    """Runs the training that the options describe and evaluates the best model on the test split.

    Returns:
        Recall@N of the best model on the test split in percent, `{N: percent}`.

    Raises:
        SystemExit: bad input (status 2), results.json could not be written (1), or a signal asked to stop (128 + its
            number, after a checkpoint).
    """
    with distributed.processes(), run_log.RunLog() as log, Preemption() as preemption, ExitStack() as held:
        device = pick_device(options.device)
        run_log.log_header(asdict(options), device, given=options.given)
        run_log.compare_with_record(asdict(options), device)
        seed_everything(options.seed)
        allow_tf32(options.precision == "tf32")
        require_determinism(options.deterministic)

        # Data: places to train on, a validation split to choose the best model, a test split to evaluate it.
        places, batches, loader = load_places(options, device)
        held.enter_context(loader)
        val, test = load_splits(options, places)
        read_images = image_reader(options, device, preemption)

        # Model: pretrained weights; the last blocks, the layer and the encoder are trained.
        path = starting_checkpoint(options, log)
        model, content = load_model(options, path, device)

        # Optimisation, and the run's folder.
        optimization = build_optimization(options, model, len(batches), content.get("encoder_retired", False))
        resumed = "optimization" in content  # a last_model.pth; any other file only gives a new run its weights
        folder = log.open(options.save_dir, path.parent if path and resumed else None)
        preemption.advice = f"nothing was trained yet; run the same command to start again ({folder} can be removed)"
        run_log.log_parameters(model)
        warn_of_hours(options, model, places, device)
        progress = new_progress(options, folder, model, optimization, places, device)
        if distributed.rank():
            seed_everything(options.seed + distributed.rank())  # so that each process has its own dropout

        # Resume, or start with the layer's clusters found by k-means.
        if resumed:
            progress.restore(content)
            log_resumed(options, progress, path)
        else:
            if path is None:
                initialize(model, initialization_images(options, places), read_images, options.seed)
            distributed.broadcast_weights(model)
            progress.save_best()
            progress.save_last()
        last = folder / checkpoint.LAST
        resume = "" if options.resume == "auto" else f" with --resume={last}"
        preemption.advice = f"training is saved in {last}; run the same command{resume} to resume it"

        # Epochs: train, validate, keep the best model; stop after --patience epochs without a better one.
        recall = recall_function(options, model, read_images, folder, device)
        while not progress.finished(options.epochs_num, options.patience):
            begin_epoch(options, model, batches, progress, read_images, device)
            speed = train_one_epoch(options, model, loader, batches, optimization, progress, preemption, device)
            progress.save_last()  # if validation is interrupted, nothing is trained again
            loss = progress.mean_loss
            recalls = recall(val, recall_values=sorted({1, 5, *options.recall_values}), precision=options.val_precision)
            better = progress.record_epoch(recalls, score=recalls[1] + recalls[5])
            log_epoch(progress, loss, recalls, speed, better)
        if progress.not_improved >= options.patience:
            logger.info("stopped early: validation recall has not improved for %d epochs", options.patience)

        # Test: recall of the best model on the test split.
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


def load_places(options: TrainOptions, device: torch.device) -> tuple[GSVCities, PlaceBatches, ImageLoader]:
    """The places to train on, their batches, and the loader of their images."""
    folders = options.train_dataset_folder or (options.eval_datasets_folder / "gsv_cities",)
    photos = [options.eval_datasets_folder / options.eval_dataset_name / "images"]
    photos += [folder / "Images" for folder in folders]
    run_log.require_outside(photos, save_dir=Path("logs") / options.save_dir)
    places = GSVCities(
        folders,
        cities=options.cities,
        images_per_place=options.images_per_place,
        transform=TrainingTransform(options.train_resize, options.randaugment_ops),
        seed=options.seed,
    )
    batches = PlaceBatches(places, batch_size=options.train_batch_size, place_order=options.place_order)
    if options.place_order == "similar" and not batches.by_similarity:
        logger.warning("--place_order similar has no effect: all %d places share a batch", len(places))
    elif options.epochs_num == 1 and options.place_order != "fixed":
        logger.warning("--place_order %s has no effect: it starts with the second epoch", options.place_order)
    loader = ImageLoader(
        places,
        batches,
        batch_size=max(batches.shares(0)),
        item_bytes=options.images_per_place * 3 * math.prod(options.train_resize),
        num_workers=reading_workers(device, options.num_workers),
        device=device,
    )
    return places, batches, loader


def load_splits(options: TrainOptions, places: GSVCities) -> tuple[DatabaseQueries, DatabaseQueries]:
    """The validation and test splits; warns if file order tells the cross-image encoder which photos match."""
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
    return val, test


def image_reader(options: TrainOptions, device: torch.device, preemption: Preemption) -> ReadImages:
    """`image_batches` for evaluation and initialisation; a signal ends the run before the next batch."""
    return partial(
        image_batches,
        transform=evaluation_transform(options.resize, options.antialias),
        batch_size=options.extraction_batch_size or extraction_batch_size(device),
        num_workers=reading_workers(device, options.num_workers),
        device=device,
        stop=preemption.stop,
    )


def starting_checkpoint(options: TrainOptions, log: run_log.RunLog) -> Path | None:
    """The file of --resume; for `auto`, the newest checkpoint in --save_dir, which is locked. None if there is none."""
    if options.resume != "auto":
        return Path(options.resume) if options.resume else None
    log.lock(Path("logs") / options.save_dir)  # so that no two runs resume the same checkpoint
    runs = run_log.runs_of(options.save_dir)
    return distributed.on_main(lambda: checkpoint.newest(runs, read=read_file))


def load_model(options: TrainOptions, path: Path | None, device: torch.device) -> tuple[SuperVLADNet, dict[str, Any]]:
    """The model with its initial weights and frozen parts, on the device.

    Returns:
        The model, and the content of the checkpoint (empty if there is none).
    """
    model = build_model(**options.model)
    content: dict[str, Any] = {}
    if path is not None:
        content = load_checkpoint(model, path)
        if model.projection is not None:
            logger.warning("%s ends with a PCA, which training leaves out", path)
            model.projection = None
    else:
        foundation = options.foundation_model_path
        if foundation is None and is_published(options.backbone):
            foundation = distributed.on_main(lambda: fetch_foundation(options.backbone))
        if foundation is not None:
            load_foundation(model.backbone, foundation)
    model.backbone.freeze(options.freeze_te)
    model.backbone.activation_checkpointing = options.activation_checkpointing
    model.grad_cache_chunk = options.grad_cache_chunk
    model.to(device)
    if options.compile:
        model.backbone.compile_blocks()
    return model, content


def is_published(backbone: str) -> bool:
    """Whether the backbone has pretrained weights; all but the tiny ones do."""
    return backbone in FOUNDATION_FILES or backbone in GATED_FILES


def build_optimization(
    options: TrainOptions, model: SuperVLADNet, steps_per_epoch: int, encoder_retired: bool
) -> Optimization:
    """The optimiser and its schedule."""
    return Optimization(
        model,
        optim=options.optim,
        weight_decay=options.weight_decay,
        lr=options.lr,
        lr_encoder=options.lr_encoder,
        encoder_training=options.encoder_training,
        encoder_retired=encoder_retired,
        steps_per_epoch=steps_per_epoch,
        epochs=options.epochs_num,
        lr_schedule=options.lr_schedule,
        warmup_steps=options.warmup_steps,
        lr_end_factor=options.lr_end_factor,
        scale_gradients=options.precision == "fp16",
        clip_grad_norm=options.clip_grad_norm,
    )


def warn_of_hours(options: TrainOptions, model: SuperVLADNet, places: GSVCities, device: torch.device) -> None:
    """Warns how long training takes on a CPU, except with a tiny backbone."""
    if device.type == "cpu" and is_published(options.backbone) and options.epochs_num:
        seen = options.epochs_num * len(places) * options.images_per_place
        hours = estimated_hours(model.backbone, size=options.train_resize, images=seen)
        logger.warning("training %s on a CPU takes about %.0f hours; use a CUDA GPU", options.backbone, hours)


def new_progress(
    options: TrainOptions,
    folder: Path,
    model: SuperVLADNet,
    optimization: Optimization,
    places: GSVCities,
    device: torch.device,
) -> Progress:
    """The progress and the files of a run at its start."""
    return Progress(
        folder,
        model,
        optimization,
        facts={"model": options.model, "encoder_training": options.encoder_training, "resize": list(options.resize)},
        decisive={
            **options.decisive,
            "the number of places": len(places),
            "the digest of GSV-Cities' tables": places.digest,
        },
        unless_said=options.defaults,
        read_every=1 if device.type == "cpu" else 20,
    )


def log_resumed(options: TrainOptions, progress: Progress, path: Path | None) -> None:
    """Logs where a run resumes."""
    if progress.finished(options.epochs_num, options.patience):
        logger.info("the run of %s is finished: only the test split is evaluated again", path)
    else:
        logger.info("resuming from %s: epoch %d, step %d", path, progress.epoch + 1, progress.steps + 1)


def initialization_images(options: TrainOptions, places: GSVCities) -> list[str]:
    """The images whose local features k-means clusters: the evaluation dataset's train split, else GSV-Cities."""
    folder = options.eval_datasets_folder / options.eval_dataset_name / "images" / "train"
    if folder.is_dir():
        train = DatabaseQueries.from_folder(options.eval_datasets_folder, options.eval_dataset_name, "train")
        return train.covered_images(10.0)
    logger.info("no train split in %s: the layer is initialised from GSV-Cities images", folder.parent)
    return places.all_image_paths()


def initialize(model: SuperVLADNet, paths: Sequence[str], read_images: ReadImages, seed: int) -> None:
    """Initialises the layer by k-means on local features of 5,000 images, or of all if there are fewer.

    Each process reads its share of them; only the main one initialises its model.
    """
    rng = np.random.default_rng(seed)
    drawn = [paths[index] for index in rng.choice(len(paths), size=min(5000, len(paths)), replace=False)]

    def features_of(share: slice) -> NDArray[np.float32]:
        images = read_images(drawn[share], progress="initialisation")
        return sample_local_features(model, images, generator=rng, skip=share.start).numpy()

    features = distributed.gather_shares(len(drawn), features_of)
    if distributed.is_main():
        initialize_layer(model, torch.from_numpy(features))


def recall_function(
    options: TrainOptions, model: SuperVLADNet, read_images: ReadImages, folder: Path, device: torch.device
) -> Callable[..., dict[int, float]]:
    """`test.evaluate` that still needs a split, recall values and a precision."""
    return partial(
        evaluate,
        model,
        read_images=read_images,
        positive_distance=options.val_positive_dist_threshold,
        infer_batch_size=options.infer_batch_size,
        device=device,
        folder=folder / "descriptors",
    )


def begin_epoch(
    options: TrainOptions,
    model: SuperVLADNet,
    batches: PlaceBatches,
    progress: Progress,
    read_images: ReadImages,
    device: torch.device,
) -> None:
    """Sets the batches to the next epoch and step, ordered by similarity with --place_order similar."""
    batches.epoch, batches.start = progress.epoch, len(progress.losses)
    if batches.by_similarity and progress.epoch and progress.order is None:
        transform = evaluation_transform(options.train_resize, antialias=True)
        read_places = partial(read_images, transform=transform, batch_size=similar_places.TOGETHER)
        describe = partial(describe_images, model, read_places, device=device, precision=options.val_precision)
        progress.order = similar_places.order_by_similarity(batches, describe, device)
    batches.mined = progress.order


@torch.inference_mode()
def describe_images(
    model: SuperVLADNet, read_images: ReadImages, paths: Sequence[str], *, device: torch.device, precision: str
) -> NDArray[np.float32]:
    """Descriptors of N images, N x D; in evaluation mode, each image in a batch of its own."""
    model.eval()
    rows = [np.empty((0, model.descriptor_dim), dtype=np.float32)]
    for images in read_images(paths, progress="similar places"):
        with autocast(device, precision):
            vectors = model.cluster_vectors(images)
        rows.append(model.describe(vectors.float(), group=1).cpu().numpy())
    return np.concatenate(rows)


def train_one_epoch(
    options: TrainOptions,
    model: SuperVLADNet,
    loader: ImageLoader,
    batches: PlaceBatches,
    optimization: Optimization,
    progress: Progress,
    preemption: Preemption,
    device: torch.device,
) -> str:
    """Trains the remaining steps of the epoch: multi-similarity loss on mined pairs, one step per batch of places.

    Returns:
        Images per second, share of the time spent waiting for data, and peak memory, for the log.

    Raises:
        ValueError: a loss is not finite.
        SystemExit: a signal asked to stop; the current step was finished and a checkpoint written.
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
        counts = [places * images.shape[1] for places in batches.shares(progress.steps)]  # images of each process
        labels = labels.repeat_interleave(images.shape[1])  # (P,) -> (P*K,)
        images = normalize(to_unit(images.flatten(0, 1)), inplace=True)  # (P, K, 3, H, W) -> (P*K, 3, H, W)
        with autocast(device, options.precision):
            descriptors = replica(images)
        descriptors = distributed.gather_with_gradient(descriptors.float(), counts)
        loss = criterion(descriptors, distributed.gather_with_gradient(labels, counts))
        mined += criterion.mined_pairs
        progress.record_step(loss)
        optimization.backward(loss * distributed.world_size())
        if optimization.step():
            replica = distributed.replicate(model)
        due = options.checkpoint_every and progress.steps % options.checkpoint_every == 0
        if preemption.agreed() or due:
            progress.save_last()
            preemption.stop()
        if progress.losses:
            bar.set_postfix(loss=f"{progress.losses[-1]:.3f}", mined=f"{criterion.mined_share:.0%}", refresh=False)
        seen += len(descriptors)
        waiting = time.perf_counter()
    if seen and not mined:
        logger.warning(
            "no pair of images was mined in epoch %d, so nothing was learnt: the model already separates all places "
            "of a batch; use a larger --train_batch_size or other places",
            progress.epoch + 1,
        )
    seconds = max(time.perf_counter() - started, 1e-9)
    speed = f"images/s={seen / seconds:.1f} data_wait={waited / seconds:.1%} peak_mem={peak_memory(device):.2f}GB"
    skipped = optimization.skipped - skipped
    return f"{speed} skipped_steps={skipped}" if skipped else speed


def log_epoch(progress: Progress, loss: float, recalls: dict[int, float], speed: str, better: bool) -> None:
    """Logs the epoch and draws the training curves so far."""
    if distributed.is_main():
        try:
            report.draw_training(progress.folder)
        except Exception as error:  # a full disk, or an edited table
            logger.warning("cannot draw %s (%s)", progress.folder / report.TRAINING, error)
    logger.info(
        "epoch=%02d loss=%.4f lr=%.3g %s %s%s",
        progress.epoch,
        loss,
        progress.lr,
        " ".join(f"R@{n}={recall:.1f}" for n, recall in recalls.items()),
        speed,
        " best" if better else "",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line.

    Returns:
        The exit status, 0; others, such as 2 for bad input, are raised as SystemExit.
    """
    run(parse(TrainOptions, argv))
    return 0


if __name__ == "__main__":
    run(OPTIONS)
