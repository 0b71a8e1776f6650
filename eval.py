"""Evaluates a checkpoint: recall@N on database/queries datasets, in every encoder context asked for."""

from parser import SUBMITTED, EvalOptions, parse
from utils.signals import quiet_ctrl_c

if __name__ == "__main__":
    OPTIONS = parse(EvalOptions)  # before the seconds of importing the rest: a mistake is answered at once
    quiet_ctrl_c()

import logging
import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from datasets.database_queries import DatabaseQueries, image_key, list_images, readable
from datasets.protocols import protocol_of, warn_of_counts
from datasets.transforms import CROPS, evaluation_transform, read_pixels, read_reduced
from model import SuperVLADNet, build_model
from model.weights import (
    find_checkpoint,
    load_checkpoint,
    model_of,
    preparation_of,
    read_file,
    size_of,
    validated_size_of,
)
from test import Search, extract, format_recalls, image_batches, images_at_a_time, searched_by_all
from utils import checkpoint, distributed, match_page, report, run_log, search
from utils.assignments import AssignedPhoto, draw_assignments
from utils.descriptor_store import DescriptorStore, digest
from utils.device import allow_tf32, autocast, cast_products, extraction_batch_size, pick_device, reading_workers
from utils.index_trial import require_index
from utils.lock import FolderLock
from utils.outputs import Outputs, whole
from utils.preemption import Preemption
from utils.seed import seed_everything

logger = logging.getLogger(__name__)

PCA_IMAGES = 16_384  # that a PCA is fitted on, at most


@dataclass(frozen=True, kw_only=True)
class Task:
    """One dataset, how it is evaluated, and where the results go."""

    dataset: DatabaseQueries
    test_method: str
    positive_distance: float
    folder: Path


def run(options: EvalOptions) -> dict[str, dict[str, dict[int, float]]]:
    """Evaluates as the options say.

    Returns:
        Recall@N in percent by dataset and encoder context, `{dataset: {context: {N: percent}}}`; empty in all but the
        main process, and for datasets without labels.

    Raises:
        SystemExit: bad input (status 2), or an output that could not be written beside the results (1); the message is
            in the log and on the terminal.
    """
    with distributed.processes(), run_log.RunLog() as log, Preemption(at_once=True) as preemption:
        device = pick_device(options.device)
        run_log.log_header(asdict(options), device, given=options.given)
        seed_everything(options.seed)
        allow_tf32(options.precision == "tf32")

        save_dir = Path("logs") / options.save_dir
        run_log.require_outside(options.photo_folders, save_dir=save_dir, descriptors_folder=options.descriptors_folder)
        found = list(datasets(options))
        distances = [positive_distance(options, name) for name, _ in found]
        path = distributed.on_main(lambda: find_checkpoint(options.resume))
        content = read_file(path)
        options = completed(options, model_of(options.resume, content), content)
        model = build_model(**options.model)
        pca_paths = pca_images(options, model.descriptor_dim)
        load_checkpoint(model, path, content)
        if model.projection is not None:
            if options.pca_dim:
                raise ValueError(
                    f"--pca_dim {options.pca_dim}: {path} ends with a PCA already, to {model.descriptor_dim} numbers; "
                    "leave it out, or evaluate the checkpoint without"
                )
            logger.info("from the checkpoint: a PCA to %d numbers, of unit norm again", model.descriptor_dim)
        del content
        for line in options.unused(encoder=model.encoder is not None):
            logger.warning("%s", line)
        for (name, dataset), distance in zip(found, distances, strict=True):
            foresee(model, options, dataset, options.test_method or protocol_of(name).test_method, distance)
        model.to(device).eval()
        cast_products(model.backbone, options.precision)
        if options.compile:
            model.backbone.compile_blocks()
        run_log.log_parameters(model)
        if model.encoder is not None:
            logger.info(
                "largest difference between the two encoder layers: %.1e (3e-4 or less: one step at published rates)",
                model.encoder.layer_difference(),
            )
        say_what_plain_folders_change(options, encoder=model.encoder is not None)
        folder = log.open(options.save_dir)
        preemption.advice = (
            "--descriptors_folder would have kept what was computed"
            if options.descriptors_folder is None
            else "the same command goes on from what is in --descriptors_folder"
        )
        tasks = [
            Task(
                dataset=dataset,
                test_method=options.test_method or protocol_of(name).test_method,
                positive_distance=distance,
                folder=folder if len(found) == 1 else folder / name,
            )
            for (name, dataset), distance in zip(found, distances, strict=True)
        ]
        table: dict[str, dict[str, dict[int, float]]] = {}
        outputs = Outputs()
        with ExitStack() as held:
            stores = [extracted(model, task, pca_paths, options, device, held, preemption.stop) for task in tasks]
            if not distributed.is_main():
                for task, task_stores in zip(tasks, stores, strict=True):
                    help_search(model, task, task_stores, options, device)
                return {}  # nobody waits for a search that the main process does alone
            # All results come before the first output that can fail.
            matches = []
            with kept_if_it_fails(model, tasks, stores, pca_paths, options, folder / "kept"):
                for task, task_stores in zip(tasks, stores, strict=True):
                    table[task.dataset.name], of_task = evaluate(model, task, task_stores, options, device, outputs)
                    matches.append(of_task)
            if len(tasks) > 1:
                logger.info("%s", report.recall_table(table))
                with outputs.writing(str(folder / "results.json")):
                    run_log.write_results(folder, {"recalls": table}, asdict(options), device)
            for task, of_task in zip(tasks, matches, strict=True):
                write_outputs(model, task, of_task, options, device, outputs)
        if outputs.missing:
            raise SystemExit(1)
    return table


def completed(options: EvalOptions, written: dict[str, Any], content: dict[str, Any]) -> EvalOptions:
    """The options with what the checkpoint says, where the command line says nothing: backbone; clusters and encoder;
    the size of the images; of plain folders also how photos are prepared.

    Args:
        options: as given.
        written: what `build_model` takes for the checkpoint.
        content: of its file.
    """
    found = {"supervlad_clusters" if name == "clusters" else name: value for name, value in written.items()}
    if "backbone" in options.given:
        found.pop("backbone", None)
    if {"supervlad_clusters", "ghost_clusters", "crossimage_encoder"} & {*options.given}:
        found = {name: value for name, value in found.items() if name == "backbone"}
    shown = [f"--{name} {value}" for name, value in found.items()]
    size, validated_at = size_of(content), validated_size_of(content)
    if size is not None and "resize" not in options.given:
        found["resize"] = size
        shown.append("--resize {} {}".format(*size))
    taken = found.get("resize", options.resize)
    if validated_at is not None and validated_at != taken:
        logger.warning("the model was validated at %d %d, and --resize is %d %d", *validated_at, *taken)
    elif validated_at is None and size is not None and size != taken:
        logger.warning("the file was exported for %d %d, and --resize is %d %d", *size, *taken)
    if options.plain_folders:
        prepared = {name: value for name, value in preparation_of(content).items() if name not in options.given}
        found |= prepared
        if "antialias" in prepared:
            shown.append(f"--{'no-' * (not prepared['antialias'])}antialias")
    if shown:
        logger.info("from the checkpoint: %s", ", ".join(shown))
    return replace(options, **found)


def say_what_plain_folders_change(options: EvalOptions, *, encoder: bool) -> None:
    """Writes in one line how an evaluation of two plain folders departs from the published protocol."""
    if not options.plain_folders:
        return
    changes = []
    if options.upright:
        changes.append("photos are turned as EXIF says")
    if options.antialias:
        changes.append("the resize is antialiased (--no-antialias switches that off)")
    if encoder and options.encoder_context[0] == "independent":
        changes.append("the encoder sees each photo by itself (--encoder_context file_order: neighbours by name)")
    line = "plain folders" + ", photos not turned as EXIF says since the checkpoint says so" * (not options.upright)
    if changes:
        line += f", not as benchmarks are published: {'; '.join(changes)}"
    logger.info("%s", line)


def datasets(options: EvalOptions) -> Iterator[tuple[str, DatabaseQueries]]:
    """The datasets asked for, with the names that their protocols go by."""
    settings: dict[str, Any] = {
        "labelled": not options.no_labels,
        "positives_file": options.positives_file,
        "query_keys": options.query_keys,
        "labels_where_known": options.labels_where_known,
        "skip_unreadable": options.skip_unreadable,
    }
    if options.database_folder is not None and options.queries_folder is not None:
        name = f"{options.queries_folder.resolve().name} in {options.database_folder.resolve().name}"
        found = [
            (
                name,
                DatabaseQueries.from_folders(
                    options.database_folder, options.queries_folder, name=name, exif=True, **settings
                ),
            )
        ]
    else:
        found = [
            (name, DatabaseQueries.from_folder(options.eval_datasets_folder, name, "test", **settings))
            for name in options.eval_dataset_name
        ]
    if options.descriptors_folder is not None:
        kept = [kept_in(options.descriptors_folder, dataset) for _, dataset in found]
        if len({*kept}) < len(kept):
            raise ValueError(
                f"--descriptors_folder would keep two of {', '.join(name for name, _ in found)} in one folder; take "
                "one at a time, each with a folder of its own"
            )
    for name, dataset in found:
        keys = map(image_key, dataset.queries_paths + dataset.database_paths if options.save_submission else ())
        if not all(len(key.split()) == 1 for key in keys):
            raise ValueError(
                f"--save_submission: some file names of {dataset.name} have no image key without spaces, the seventh "
                "field of @east@north@zone@letter@lat@lon@key@...; use a tree with such names"
            )
        warn_of_counts(dataset, protocol_of(name))
        yield name, dataset


def depth(options: EvalOptions, dataset: DatabaseQueries, test_method: str) -> int:
    """How many database images are searched for each query."""
    k = max(options.recall_values)
    if test_method != "maj_voting":  # where the depth of the search decides how many crops can agree
        k = max(k, options.save_predictions, SUBMITTED if options.save_submission else 0)
    return min(k, len(dataset.database_paths))


def foresee(
    model: SuperVLADNet, options: EvalOptions, dataset: DatabaseQueries, test_method: str, distance: float
) -> None:
    """Says before the extraction what can be known then: an index that cannot be, and figures with a limit to them.

    Raises:
        ValueError: FAISS refuses the index.
    """
    if not distributed.is_main():
        return
    count = len(dataset.database_paths)
    asked = {"--recall_values": max(options.recall_values) if dataset.labelled else 0}
    asked |= {"--save_predictions": options.save_predictions, "--save_submission": SUBMITTED * options.save_submission}
    for flag, wanted in asked.items():
        if wanted > count and (flag == "--save_submission" or flag.lstrip("-") in options.given):
            logger.warning("%s asks for %d matches, and %s has %d database images", flag, wanted, dataset.name, count)
    if options.save_submission and max(options.recall_values) < SUBMITTED <= count:
        logger.info("--save_submission: %d images a query are submitted, which are scored", SUBMITTED)
    if dataset.labelled:
        lost = int((~findable(dataset, distance)).sum())
        if lost:
            logger.warning(
                "%s: %d of %d queries have no %sdatabase photo %s; they count as missed, as in published figures",
                dataset.name,
                lost,
                int(dataset.judged_queries.sum()),
                "correct " * bool(options.positives_file),
                rule(options, distance),
            )
    if options.index is not None:
        _, in_chunk = images_at_a_time((count, 1, *model.vectors_shape), options.infer_batch_size)
        require_index(
            options.index,
            options.index_parameters,
            dim=options.pca_dim or model.descriptor_dim,
            count=count,
            chunks=-(-count // in_chunk),
            k=depth(options, dataset, test_method),
        )


def findable(dataset: DatabaseQueries, distance: float) -> NDArray[np.bool_]:
    """Which queries have a correct database image at all, Q; those of which nothing is known count among them."""
    return np.array([len(found) > 0 for found in dataset.positives(distance)], dtype=bool) | ~dataset.judged_queries


def rule(options: EvalOptions, distance: float) -> str:
    """What makes a database photo correct, in words."""
    return f"as {options.positives_file.name} says" if options.positives_file else f"within {distance:g} m"


def positive_distance(options: EvalOptions, name: str) -> float:
    """How near a correct database image is, in metres."""
    protocol = protocol_of(name)
    if options.positive_frames is not None:
        if protocol.metres_a_frame is None:
            raise ValueError(f"--positive_frames: the positions of {name} do not count frames; use metres")
        return (options.positive_frames + 0.5) * protocol.metres_a_frame  # half-way to the first frame too far
    return options.val_positive_dist_threshold or protocol.positive_distance


def pca_images(options: EvalOptions, descriptor_dim: int) -> list[str]:
    """The images that a PCA is fitted on, in random order; none where none is asked for."""
    if options.pca_dataset_folder is None:
        return []
    folder = options.eval_datasets_folder / options.pca_dataset_folder
    chosen = np.random.default_rng(options.seed).permutation(list_images(folder))[:PCA_IMAGES]
    if options.skip_unreadable:
        chosen = chosen[readable(chosen.tolist(), folder, upright=options.upright)]
    if options.pca_whiten and options.pca_dim == len(chosen):
        raise ValueError(
            f"--pca_whiten: {len(chosen)} images vary in {len(chosen) - 1} directions; use --pca_dim "
            f"{len(chosen) - 1} at most"
        )
    if options.pca_dim > min(len(chosen), descriptor_dim):
        raise ValueError(
            f"--pca_dim {options.pca_dim}: descriptors have {descriptor_dim} numbers and {options.pca_dataset_folder} "
            f"has {len(chosen)} images; use no more than the smaller of the two"
        )
    return list(chosen.tolist())


def images_of(task: Task, pca_paths: list[str]) -> dict[str, tuple[list[str], str]]:
    """What is extracted for a task: paths and test method by name."""
    images = {
        "database": (task.dataset.database_paths, "hard_resize"),
        "queries": (task.dataset.queries_paths, task.test_method),
    }
    if pca_paths:
        images["pca"] = (pca_paths, "hard_resize")
    return images


def kept_in(descriptors_folder: Path, dataset: DatabaseQueries) -> Path:
    """Where `--descriptors_folder` has what was extracted of a dataset."""
    return descriptors_folder / dataset.name.replace(" ", "_")


def weights_digest(model: SuperVLADNet) -> str:
    """Of the weights that the extraction depends on."""
    return digest({**model.backbone.state_dict(), **model.aggregation.state_dict()})


def fingerprint_of(weights: str, options: EvalOptions, test_method: str) -> dict[str, Any]:
    """What extracted descriptors depend on, besides the photos."""
    return {
        "weights": weights,
        "test_method": test_method,
        "resize": list(options.resize),
        "antialias": options.antialias,
        "upright": options.upright,
        "precision": options.precision,
    }


def extracted(
    model: SuperVLADNet,
    task: Task,
    pca_paths: list[str],
    options: EvalOptions,
    device: torch.device,
    held: ExitStack,
    stop: Callable[[], None],
) -> dict[str, DescriptorStore]:
    """Runs the backbone over database, queries and perhaps the images for a PCA, as far as that was not done before.

    What is not kept is removed, and what is kept open to others again, when `held` ends.
    """
    images = images_of(task, pca_paths)
    batch_size = options.extraction_batch_size or extraction_batch_size(device)
    folder, fingerprint = task.folder / "extracted", None
    if options.descriptors_folder is not None:
        folder = kept_in(options.descriptors_folder, task.dataset)
        if distributed.is_main():
            held.enter_context(FolderLock(folder, "--descriptors_folder", "keep descriptors"))
        weights = weights_digest(model)
    stores = {}
    for name, (paths, test_method) in images.items():
        if options.descriptors_folder is not None:  # nobody comes back to the others
            fingerprint = fingerprint_of(weights, options, test_method)
        stores[name] = DescriptorStore(
            folder,
            name,
            (len(paths), CROPS[test_method], *model.vectors_shape),
            dtype=options.descriptor_dtype,
            fingerprint=fingerprint,
            photos=paths if fingerprint is not None else (),
        )
        if fingerprint is None and distributed.is_main():
            held.callback(stores[name].remove)
        read_images = partial(
            image_batches,
            transform=evaluation_transform(options.resize, options.antialias, test_method),
            # single_query keeps each photo's shape; crops are as many images.
            batch_size=1 if test_method == "single_query" else max(1, batch_size // CROPS[test_method]),
            num_workers=reading_workers(device) if options.num_workers is None else options.num_workers,
            device=device,
            progress=f"{task.dataset.name} {name}",
            upright=options.upright,
            stop=stop,
        )
        extract(model, paths, stores[name], read_images, options.precision)
    return stores


@contextmanager
def kept_if_it_fails(
    model: SuperVLADNet,
    tasks: Sequence[Task],
    stores: Sequence[dict[str, DescriptorStore]],
    pca_paths: list[str],
    options: EvalOptions,
    folder: Path,
) -> Iterator[None]:
    """Keeps what was extracted in `folder`, as `--descriptors_folder` does, if the search fails within the block."""
    try:
        yield
    except search.UselessDescriptors:
        raise
    except Exception:
        advice = "the same command"
        if options.descriptors_folder is None:
            advice += f" with --descriptors_folder={shlex.quote(str(folder.absolute()))}"
            weights = weights_digest(model)
            for task, of_task in zip(tasks, stores, strict=True):
                for name, (paths, test_method) in images_of(task, pca_paths).items():
                    fingerprint = fingerprint_of(weights, options, test_method)
                    try:
                        of_task[name].keep(kept_in(folder, task.dataset), fingerprint, paths)
                    except (OSError, ValueError) as problem:
                        logger.warning("%s of %s could not be kept: %s", name, task.dataset.name, problem)
        logger.warning("what was extracted is kept: %s goes on with the search", advice)
        raise


@dataclass(frozen=True, kw_only=True)
class Matches:
    """What the search found in the first encoder context asked for, and the recall curves of all.

    Attributes:
        search: which it was.
        context: of it.
        distances: squared, of the descriptors, Q x k.
        predictions: database indices, Q x k, best first; -1 is none.
        correct: which of them are right, Q x k; None without labels.
        findable: which queries have a correct image, or a position that is not known, Q; None without labels.
        curves: recall@N in percent for N from 1 to k, by context.
    """

    search: Search
    context: str
    distances: NDArray[np.float32]
    predictions: NDArray[np.int64]
    correct: NDArray[np.bool_] | None
    findable: NDArray[np.bool_] | None
    curves: dict[str, list[float]]


def searches(
    model: SuperVLADNet,
    task: Task,
    stores: dict[str, DescriptorStore],
    options: EvalOptions,
    device: torch.device,
    context: str,
) -> Iterator[Search]:
    """The searches in one encoder context; the shuffled one has an order after the other where recalls are averaged."""
    for order in range(options.context_seeds if context == "shuffled" and task.dataset.labelled else 1):
        yield Search(
            model,
            stores,
            test_method=task.test_method,
            context=context,
            infer_batch_size=options.infer_batch_size,
            seed=(options.seed, order),
            pca_dim=options.pca_dim,
            pca_whiten=options.pca_whiten,
            device=device,
            by_all=searched_by_all(len(task.dataset.database_paths), options.index),
        )


def contexts_of(model: SuperVLADNet, options: EvalOptions) -> tuple[str, ...]:
    """The encoder contexts that can differ."""
    return options.encoder_context if model.encoder is not None else ("file_order",)


def help_search(
    model: SuperVLADNet, task: Task, stores: dict[str, DescriptorStore], options: EvalOptions, device: torch.device
) -> None:
    """Searches this process's share of the database, in the order in which `evaluate` searches in the main process."""
    if searched_by_all(len(task.dataset.database_paths), options.index):
        for context in contexts_of(model, options):
            for searched in searches(model, task, stores, options, device, context):
                searched.run(depth(options, task.dataset, task.test_method))


def evaluate(
    model: SuperVLADNet,
    task: Task,
    stores: dict[str, DescriptorStore],
    options: EvalOptions,
    device: torch.device,
    outputs: Outputs,
) -> tuple[dict[str, dict[int, float]], Matches]:
    """Searches in every encoder context asked for; each has its line, and `results.json`, before the next is searched.

    Returns:
        Recall@N by context, of several orders the mean; and what was found in the first.
    """
    dataset = task.dataset
    k = depth(options, dataset, task.test_method)
    positives = dataset.positives(task.positive_distance) if dataset.labelled else None
    results: dict[str, Any] = {}
    to_find = None
    if positives is not None:
        to_find = findable(dataset, task.positive_distance)
        results = {"recalls": {}, "positive_distance": task.positive_distance}
        results |= {"queries_without_positives": int((~to_find).sum())}
    results |= {"dataset": dataset.sizes, "descriptor_dim": options.pca_dim or model.descriptor_dim}
    results |= {"test_method": task.test_method}
    recalls: dict[str, dict[int, float]] = {}
    curves: dict[str, list[float]] = {}
    contexts = contexts_of(model, options)
    first: Matches | None = None
    for context in contexts:
        found = []
        for searched in searches(model, task, stores, options, device, context):
            distances, predictions = searched.run(
                k,
                index=options.index,
                index_parameters=options.index_parameters,
                majority_weight=options.majority_weight,
            )
            correct = None if positives is None else search.correct_among(predictions, positives)
            if first is None:
                first = Matches(
                    search=searched,
                    context=context,
                    distances=distances,
                    predictions=predictions,
                    correct=correct,
                    findable=to_find,
                    curves=curves,
                )
                if options.index is not None:
                    results["index_agreement"] = searched.agreement
            if correct is not None:
                found.append(search.recall_of(correct[dataset.judged_queries], range(1, k + 1)))
        line = f"Searched {dataset}, without labels: predictions.csv in {task.folder}"
        if found:
            mean = {n: float(np.mean([recall[n] for recall in found])) for n in found[0]}
            deviation = {n: float(np.std([recall[n] for recall in found])) for n in found[0]}
            curves[context] = list(mean.values())
            recalls[context] = {n: mean[min(n, k)] for n in options.recall_values}
            line = f"Recalls on {dataset}"
            if context != contexts[0] or context != "file_order":
                line += f", {context}" + (f" ({len(found)} orders)" if len(found) > 1 else "")
            line += f": {format_recalls(recalls[context])}"
            results["recalls"] = recalls[contexts[0]]
            results.setdefault("contexts", {})[context] = {"recalls": recalls[context], "orders": len(found)}
            if len(found) > 1:
                spread = {n: deviation[min(n, k)] for n in options.recall_values}
                results["contexts"][context]["deviations"] = spread
                line += f"; deviations {format_recalls(spread)}"
        if context == contexts[0]:
            logger.info("log and results.json in %s", task.folder)
        logger.info("%s", line)
        with outputs.writing(str(task.folder / "results.json")):
            task.folder.mkdir(parents=True, exist_ok=True)
            run_log.write_results(task.folder, results, asdict(options), device)
    assert first is not None
    return recalls, first


def write_outputs(
    model: SuperVLADNet, task: Task, matches: Matches, options: EvalOptions, device: torch.device, outputs: Outputs
) -> None:
    """Writes what there is to look at and to compute with, as asked for; the page comes last."""
    dataset, folder, predictions = task.dataset, task.folder, matches.predictions
    correct = matches.correct
    judged = None if correct is None else dataset.judged(predictions)
    located = dataset
    with outputs.writing(f"positions in {folder / 'predictions.csv'}"):
        located = dataset.located(exif=options.plain_folders)
    metres = located.metres(predictions)
    with outputs.writing(str(folder / "predictions.csv")):
        report.write_predictions(
            folder,
            dataset.queries_paths,
            dataset.database_paths,
            predictions,
            matches.distances,
            correct=correct,
            judged=judged,
            metres=metres,
            positions=located.database_positions,
            geographic=located.geographic,
        )
    if matches.curves:
        with outputs.writing(str(folder / "recalls.png")):
            report.draw_recalls(folder, dataset.name, matches.curves, options.recall_values)
    if options.save_submission:
        with outputs.writing(str(folder / "submission.zip")):
            query_keys, database_keys = (
                [image_key(path) for path in side] for side in (dataset.queries_paths, dataset.database_paths)
            )
            report.write_submission(folder, query_keys, database_keys, predictions)
    if options.pca_dim:
        with outputs.writing(str(folder / "pca.pth")):
            facts = {"dim": options.pca_dim, "whiten": options.pca_whiten, "context": matches.context}
            facts |= {"images": str(options.pca_dataset_folder), "count": matches.search.pca.n_samples_}
            checkpoint.save(folder / "pca.pth", {**matches.search.projection(), "pca": facts})
    if options.save_descriptors:
        with outputs.writing(str(folder / "descriptors")):
            matches.search.save(folder / "descriptors", database=dataset.database_paths, queries=dataset.queries_paths)
    if options.save_assignments:
        write_assignments(model, task, options, predictions, correct, device, outputs)
    if options.save_predictions:
        first = np.s_[:, : options.save_predictions]
        title = str(dataset)
        if matches.curves:
            curve = matches.curves[matches.context]
            shown = {n: curve[min(n, len(curve)) - 1] for n in options.recall_values}
            title += f", {matches.context}" * (model.encoder is not None) + f", {format_recalls(shown)}"
        # Of unit vectors the distance tells the cosine; not of those that a PCA, an index or a mean over crops changes.
        plain_pca = options.pca_dim and not options.pca_whiten
        mean = task.test_method == "five_crops" and not options.pca_dim
        unit = not (plain_pca or mean or task.test_method == "maj_voting") and options.index is None
        with outputs.writing(str(folder / "matches")):
            with whole(folder / "matches") as unfinished:
                match_page.write_match_page(
                    unfinished,
                    title=title,
                    queries=dataset.queries_paths,
                    database=dataset.database_paths,
                    predictions=predictions[first],
                    correct=None if correct is None else correct[first],
                    judged=None if judged is None else judged[first],
                    metres=None if metres is None else metres[first],
                    read=partial(read_reduced, side=match_page.THUMBNAIL_SIDE, upright=options.upright),
                    similarity=1 - matches.distances[first].astype(np.float64) / 2 if unit else None,
                    rule=rule(options, task.positive_distance),
                    findable=None if correct is None else matches.findable,
                )
            logger.info("open in a browser: %s", (folder / "matches/index.html").absolute().as_uri())


@torch.inference_mode()
def write_assignments(
    model: SuperVLADNet,
    task: Task,
    options: EvalOptions,
    predictions: NDArray[np.int64],
    correct: NDArray[np.bool_] | None,
    device: torch.device,
    outputs: Outputs,
) -> None:
    """Draws what the layer looks at in some queries, spread over all of them, and in their first matches."""
    dataset, folder = task.dataset, task.folder / "assignments"
    transform = evaluation_transform(options.resize, options.antialias)

    def draw(query: int) -> None:
        match = predictions[query, 0]
        shown = [(f"query {query}", dataset.queries_paths[query])]
        if match >= 0:  # an approximate index may find nothing
            judged = correct is not None and dataset.judged(predictions[:, :1])[query, 0]
            verdict = "" if correct is None or not judged else ", correct" if correct[query, 0] else ", wrong"
            shown.append((f"first match{verdict}", dataset.database_paths[match]))
        photos = []
        for title, path in shown:
            pixels = read_pixels(path, upright=options.upright)
            with autocast(device, options.precision):
                assignment = model.assignments(transform(pixels[None]).to(device))[0]
            photos.append(
                AssignedPhoto(
                    title=f"{title}: {os.path.basename(path)}",
                    pixels=pixels.permute(1, 2, 0).numpy(),
                    assignment=assignment.float().cpu().numpy(),
                )
            )
        draw_assignments(folder / f"{query:06d}.png", photos, ghost_clusters=options.ghost_clusters)

    with outputs.writing(str(folder)):
        folder.mkdir()
        count = min(options.save_assignments, len(predictions))
        for query in np.linspace(0, len(predictions) - 1, count).round().astype(int):
            with outputs.writing(str(folder / f"{query:06d}.png")):
                draw(query)
        logger.info("soft assignments of %d queries: %s", len(list(folder.glob("*.png"))), folder)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line.

    Returns:
        The exit status, 0; others, such as 2 for bad input, are raised as SystemExit.
    """
    run(parse(EvalOptions, argv))
    return 0


if __name__ == "__main__":
    run(OPTIONS)
