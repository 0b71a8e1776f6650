"""Fine-tunes SuperVLAD on GSV-Cities and keeps the model with the best recall on the validation split."""

from parser import TrainData, TrainOptions, parse
from utils.system.signals import quiet_ctrl_c

if __name__ == "__main__":
    OPTIONS = parse(TrainOptions)  # before the slow imports, so that an error is reported at once
    quiet_ctrl_c()

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from datasets.evaluation.layout import split_folder
from datasets.evaluation.query_sets import validation_and_test
from datasets.evaluation.tree import DatabaseQueries
from datasets.photos.batches import image_batches
from datasets.photos.transforms import evaluation_transform, normalize, to_unit
from datasets.training import similar_places
from datasets.training.gsv_cities import GSVCities, PlaceBatches
from datasets.training.randaugment import TrainingTransform
from model import BACKBONES, SuperVLADNet, build_model
from model.initialization import initialize_layer, sample_local_features
from model.loss import MinedMultiSimilarity
from model.sizes import fitted, require_patches
from model.weights import FOUNDATION_FILES, GATED_FILES, fetch_foundation, load_checkpoint, load_foundation, read_file
from test import evaluate_split
from utils.outputs import figures
from utils.outputs.tables import format_recalls
from utils.retrieval import search
from utils.retrieval.descriptor_store import digest, warn_of_leftovers
from utils.run import checkpoint
from utils.run import log as run_log
from utils.run.log import RunLog
from utils.run.optimization import Optimization
from utils.run.preemption import Preemption
from utils.run.progress import Progress
from utils.system import distributed
from utils.system.device import (
    allow_tf32,
    autocast,
    extraction_batch_size,
    peak_memory,
    pick_device,
    reading_workers,
    require_determinism,
    to_device,
)
from utils.system.files import Outputs
from utils.system.reading import ImageLoader
from utils.system.seed import seed_everything

logger = logging.getLogger(__name__)

ReadImages = Callable[..., Iterator[Tensor]]  # `image_batches` that still needs paths and the progress bar's name
# Options under another value of which a run can be resumed: they decide where it runs and ends, and how it rounds; of
# paths the content of the files decides.
MAY_CHANGE = frozenset(
    """
    resume save_dir patience checkpoint_every device num_workers extraction_batch_size compile deterministic
    mixed_precision activation_checkpointing grad_cache_chunk eval_datasets_folder train_dataset_folder
    foundation_model_path query_keys given
    """.split()
)


def run(options: TrainOptions) -> dict[int, float]:
    """Trains as the options describe, and returns Recall@N of the best model on the test split, `{N: percent}`.

    Raises:
        SystemExit: bad input (2), results.json not written (1), or a signal (128 + its number, after a checkpoint).
    """
    data, recipe, machine = options.data, options.recipe, options.machine
    with distributed.processes(), RunLog(options.flat) as log, Preemption() as preemption, ExitStack() as held:
        device = pick_device(machine.device)
        run_log.log_header(options, device)
        seed_everything(machine.seed)
        allow_tf32(machine.precision == "tf32")
        require_determinism(machine.deterministic)
        size = BACKBONES[options.model.backbone]
        resize = fitted(options.protocol.resize, size)
        require_patches("train_resize", recipe.train_resize, size)
        protocol = replace(options.protocol, resize=resize)

        # Data: places to train on, a validation split to choose the best model, a test split to evaluate it.
        folders = data.train_dataset_folder or (data.eval_datasets_folder / "gsv_cities",)
        images = [split_folder(data.eval_datasets_folder, data.eval_dataset_name, name) for name in ("val", "test")]
        save_dir = Path("logs") / options.outputs.save_dir
        run_log.require_outside([*images, *(folder / "Images" for folder in folders)], save_dir=save_dir)
        places = GSVCities(
            folders,
            cities=data.cities,
            images_per_place=recipe.images_per_place,
            transform=TrainingTransform(recipe.train_resize, recipe.randaugment_ops),
            seed=machine.seed,
        )
        batches = PlaceBatches(places, batch_size=recipe.train_batch_size, place_order=recipe.place_order)
        workers = reading_workers(device, machine.num_workers)
        loader = ImageLoader(
            places,
            batches,
            batch_bytes=max(batches.shares(0)) * recipe.images_per_place * 3 * math.prod(recipe.train_resize),
            num_workers=workers,
            device=device,
        )
        held.enter_context(loader)
        val, test, shared = validation_and_test(
            data.eval_datasets_folder,
            data.eval_dataset_name,
            distance=data.val_positive_dist_threshold,
            query_keys=data.query_keys,
            batch_size=protocol.infer_batch_size if options.model.crossimage_encoder else None,
        )
        logger.info("training on %s; validation on %s", places, val)
        read_images = partial(
            image_batches,
            transform=evaluation_transform(resize, protocol.antialias),
            batch_size=machine.extraction_batch_size or extraction_batch_size(device),
            num_workers=workers,
            device=device,
            stop=preemption.stop,
        )

        # Model: pretrained weights; the last blocks, the layer and the encoder are trained.
        path = options.model.resume
        if path == Path("auto"):
            log.lock(save_dir)  # so that no two runs resume the same checkpoint
            runs = run_log.runs_of(options.outputs.save_dir)
            path = distributed.on_main(lambda: checkpoint.newest(runs, read=read_file))
        model = build_model(**options.model.arguments)
        content: dict[str, Any] = {}
        foundation = options.model.foundation_model_path
        if path is not None:
            content = load_checkpoint(model, path)
            if model.projection is not None:
                logger.warning("%s ends with a PCA, which training leaves out", path)
                model.projection = None
        elif foundation is not None or options.model.backbone in FOUNDATION_FILES | GATED_FILES:
            foundation = foundation or distributed.on_main(lambda: fetch_foundation(options.model.backbone))
            load_foundation(model.backbone, foundation)
        resumed = "optimization" in content  # a last_model.pth; any other file only gives a new run its weights
        if resumed:
            content["decisive"].setdefault("the digest of --query_keys", None)  # an option that 1.0.0 did not have
            if factor := content["decisive"].get("--lr_end_factor"):
                raise ValueError(
                    f"{path} was trained with --lr_end_factor {factor}, removed in 2.0.0; finish that run with version "
                    "1.0.0, or start a new one from its best_model.pth"
                )
        model.backbone.freeze(recipe.freeze_te)
        model.backbone.activation_checkpointing = machine.activation_checkpointing
        model.grad_cache_chunk = machine.grad_cache_chunk
        model.to(device)
        if machine.compile:
            model.backbone.compile_blocks()

        # Optimisation, and the run's folder.
        optimization = Optimization(
            model,
            recipe,
            steps_per_epoch=len(batches),
            scale_gradients=step_precision(options) == "fp16",
            encoder_retired=content.get("encoder_retired", False),
        )
        named = "save_dir" in options.given
        folder = log.open(options.outputs.save_dir, path.parent if path and resumed else None, named=named)
        if path and resumed and folder != path.parent and distributed.is_main():
            checkpoint.copy_run(path, folder)
        run_log.write_options(folder, options)
        with suppress(OSError):  # folders that vanish meanwhile, or belong to another user
            warn_of_leftovers(run_log.runs_of(options.outputs.save_dir))
        preemption.advice = f"nothing was trained yet; run the same command to start again ({folder} can be removed)"
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        logger.info("parameters: %d trainable of %d", trained, sum(p.numel() for p in model.parameters()))
        values = options.flat | {
            "resize": resize,
            "backbone_blocks": options.model.backbone_blocks or size.depth,
            "precision": step_precision(options),
        }
        free = MAY_CHANGE | ({"epochs_num"} if recipe.lr_schedule == "halving" else set())  # others end with the run
        progress = Progress(
            folder,
            model,
            optimization,
            facts={
                "started": content.get("started", folder.name) if resumed else folder.name,
                "model": options.model.arguments,
                "encoder_training": recipe.encoder_training,
                "resize": list(resize),
                "training": {"seed": machine.seed, "precision": step_precision(options), **asdict(recipe)},
            },
            must_match={f"--{name}": value for name, value in values.items() if name not in free}
            | {"the number of places": len(places), "the digest of GSV-Cities' tables": places.digest}
            | {"the digest of --query_keys": data.query_keys and digest([data.query_keys.read_bytes().hex()])},
        )
        if distributed.rank():
            seed_everything(machine.seed + distributed.rank())  # so that each process has its own dropout

        # Resume, or start with the layer's clusters found by k-means.
        if resumed:
            progress.restore(content, read_file)
            if progress.finished(recipe.epochs_num, recipe.patience):
                logger.info("the run of %s is finished: only the test split is evaluated again", path)
            else:
                logger.info("resuming from %s: epoch %d, step %d", path, progress.epoch + 1, len(progress.losses) + 1)
        else:
            if path is None:
                initialize(model, data, places, read_images, machine.seed)
            distributed.broadcast_weights(model)
            progress.save_best()
            progress.save_last()
        last = folder / checkpoint.LAST
        resume = "" if options.model.resume == Path("auto") else f" with --resume={last}"
        preemption.advice = f"training is saved in {last}; run the same command{resume} to resume it"

        # Epochs: train, validate, keep the best model; stop after --patience epochs without a better one.
        recall = partial(
            evaluate_split,
            model,
            protocol=protocol,
            positive_distance=data.val_positive_dist_threshold,
            device=device,
            folder=folder / "descriptors",
            machine=machine,
            stop=preemption.stop,
        )
        while not progress.finished(recipe.epochs_num, recipe.patience):
            batches.epoch, batches.start = progress.epoch, len(progress.losses)
            if batches.by_similarity and progress.epoch and progress.order is None:
                progress.order = order_by_similarity(options, model, batches, read_images, device)
            batches.mined = progress.order
            speed = train_one_epoch(options, model, loader, batches, optimization, progress, preemption, device)
            progress.save_last()  # if validation is interrupted, nothing is trained again
            loss = progress.mean_loss
            depths = sorted({1, 5, *protocol.recall_values})
            recalls = recall(val, recall_values=depths, precision=machine.val_precision)
            better = progress.record_epoch(recalls, score=recalls[1] + recalls[5])
            if distributed.is_main():
                with Outputs().writing(str(folder / figures.TRAINING)):
                    figures.draw_training(folder)
            shown = " ".join(f"R@{n}={recall:.1f}" for n, recall in recalls.items())
            shown += f" {speed}" + " best" * better
            logger.info("epoch=%02d loss=%.4f lr=%.3g %s", progress.epoch, loss, progress.lr, shown)
        if progress.not_improved >= recipe.patience:
            logger.info("stopped early: validation recall has not improved for %d epochs", recipe.patience)

        # Test: recall of the best model on the test split.
        best = load_checkpoint(model, folder / checkpoint.BEST)
        recalls = recall(test, recall_values=protocol.recall_values)
        validation = {"epochs": progress.epoch, "best_epoch": best["epoch_num"], "best_recalls": best["recalls"]}
        validation["queries_also_in_test"] = shared
        results = {"recalls": recalls, "dataset": test.sizes, "validation": validation, "places": len(places)}
        logger.info("log and results.json in %s", folder)
        logger.info("Recalls on %s: %s", test, format_recalls(recalls))
        outputs = Outputs()
        with outputs.writing(str(folder / "results.json")):
            run_log.write_results(folder, results, replace(options, protocol=protocol), device)
        if outputs.missing:
            raise SystemExit(1)
    return recalls


def step_precision(options: TrainOptions) -> str:
    return "fp16" if options.machine.mixed_precision else options.machine.precision


def initialize(model: SuperVLADNet, data: TrainData, places: GSVCities, read_images: ReadImages, seed: int) -> None:
    """Initialises the main process's layer by k-means on local features of at most 5,000 images, read by all.

    They are of the evaluation dataset's train split, if there is one, else of GSV-Cities.
    """
    folder = split_folder(data.eval_datasets_folder, data.eval_dataset_name, "train")
    if folder.is_dir():
        train = DatabaseQueries.from_folder(data.eval_datasets_folder, data.eval_dataset_name, "train")
        paths = train.covered_images(10.0)
    else:
        logger.info("no train split in %s: the layer is initialised from GSV-Cities images", folder.parent)
        paths = places.all_image_paths()
    rng = np.random.default_rng(seed)
    drawn = [paths[index] for index in rng.choice(len(paths), size=min(5000, len(paths)), replace=False)]

    def features_of(share: slice) -> NDArray[np.float32]:
        images = read_images(drawn[share], progress="initialisation")
        return sample_local_features(model, images, generator=rng, skip=share.start).numpy()

    features = distributed.gather_shares(len(drawn), features_of)
    if distributed.is_main():
        initialize_layer(model, torch.from_numpy(features))


def order_by_similarity(
    options: TrainOptions, model: SuperVLADNet, batches: PlaceBatches, read_images: ReadImages, device: torch.device
) -> NDArray[np.int64]:
    """The order of places in an epoch by what the model confuses: each image alone in its batch, in evaluation mode."""
    transform = evaluation_transform(options.recipe.train_resize, antialias=True)

    @torch.inference_mode()
    def describe(paths: Sequence[str]) -> NDArray[np.float32]:
        model.eval()
        rows = [np.empty((0, model.descriptor_dim), dtype=np.float32)]
        for images in read_images(
            paths, transform=transform, batch_size=similar_places.TOGETHER, progress="similar places"
        ):
            with autocast(device, options.machine.val_precision):
                vectors = model.cluster_vectors(images)
            rows.append(model.describe(vectors.float(), group=1).cpu().numpy())
        return np.concatenate(rows)

    def nearest(rows: NDArray[np.float32], k: int) -> NDArray[np.int64]:
        search.to_unit_norm(rows)
        return search.nearest(rows, [(np.arange(len(rows)), rows)], k, device)[1]

    return similar_places.order_by_similarity(batches, describe, nearest)


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
    """Trains the remaining steps of the epoch, one per batch of places; returns speed and memory for the log."""
    criterion = MinedMultiSimilarity()
    model.train()
    replica = distributed.replicate(model)
    started = waiting = time.perf_counter()
    waited, seen, mined = 0.0, 0, 0
    bar = tqdm(
        loader,
        desc=f"epoch {progress.epoch + 1}",
        unit="step",
        total=len(batches),
        initial=len(progress.losses),
        disable=not distributed.is_main(),
    )
    for images, labels in progress.saving(to_device(bar, device)):
        waited += time.perf_counter() - waiting
        counts = [places * images.shape[1] for places in batches.shares(len(progress.losses))]  # images of each process
        labels = labels.repeat_interleave(images.shape[1])  # (P,) -> (P*K,)
        images = normalize(to_unit(images.flatten(0, 1)), inplace=True)  # (P, K, 3, H, W) -> (P*K, 3, H, W)
        with autocast(device, step_precision(options)):
            descriptors = replica(images)
        descriptors = distributed.gather_with_gradient(descriptors.float(), counts)
        loss = criterion(descriptors, distributed.gather_with_gradient(labels, counts))
        mined += criterion.mined_pairs
        progress.record_step(loss)
        optimization.backward(loss * distributed.world_size())
        if optimization.step():
            replica = distributed.replicate(model)
        every = options.machine.checkpoint_every
        due = every and len(progress.losses) % every == 0
        if preemption.agreed() or due:
            progress.save_last()
            preemption.stop()
        bar.set_postfix(loss=f"{progress.losses[-1]:.3f}", mined=f"{criterion.mined_share:.0%}", refresh=False)
        seen += len(descriptors)
        waiting = time.perf_counter()
    if seen and not mined:
        logger.warning(
            "no pair of images was mined in epoch %d, so nothing was learnt: the model separates all places of a "
            "batch; use a larger --train_batch_size or other places",
            progress.epoch + 1,
        )
    seconds = max(time.perf_counter() - started, 1e-9)
    return f"images/s={seen / seconds:.1f} data_wait={waited / seconds:.1%} peak_mem={peak_memory(device):.2f}GB"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line; returns the exit status 0, while others, such as 2 for bad input, are SystemExit."""
    run(parse(TrainOptions, argv))
    return 0


if __name__ == "__main__":
    run(OPTIONS)
