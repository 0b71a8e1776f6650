"""Evaluates a checkpoint: recall@N on database/queries datasets, in every encoder context asked for."""

from parser import DRAWN_CONTEXTS, SUBMITTED, EvalOptions, parse
from utils.signals import quiet_ctrl_c

if __name__ == "__main__":
    OPTIONS = parse(EvalOptions)  # before the seconds of importing the rest: a mistake is answered at once
    quiet_ctrl_c()

import logging
import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from datasets.alignment import alignment, log_alignment, pair_up
from datasets.database_queries import DatabaseQueries, image_key, list_images, readable
from datasets.map_queries import MapQueries
from datasets.photo_files import identity
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
    state_digest,
    validated_size_of,
)
from test import Search, extract, format_recalls, image_batches, images_at_a_time, searched_by_all
from utils import acceptance, checkpoint, distributed, match_page, pairs, report, run_log, search
from utils.assignments import AssignedPhoto, draw_assignments
from utils.descriptor_store import DescriptorStore, digest
from utils.device import allow_tf32, autocast, cast_products, extraction_batch_size, pick_device, reading_workers
from utils.index_trial import require_index
from utils.lock import FolderLock
from utils.outputs import Outputs, whole
from utils.place_map import PlaceMap, require_place_for, write_map
from utils.preemption import Preemption
from utils.seed import seed_everything

logger = logging.getLogger(__name__)

PCA_IMAGES = 16_384  # that a PCA is fitted on, at most


Stores = dict[str, DescriptorStore | PlaceMap]  # of database and queries


@dataclass(kw_only=True)
class Task:
    """One set of queries of a dataset, how it is evaluated, and where the results go.

    Attributes:
        dataset: the queries, and the database that the sets of a dataset share.
        queries: name of the set, "queries" where there is one.
        of: name of the dataset, which what is kept of it goes by.
        test_method: a name from `transforms.TEST_METHODS`.
        positive_distance: a database image this near to a query is correct, in metres.
        infer_batch_size: images that share a batch in the cross-image encoder.
        subfolder: of the run's folder, where the results go.
        folder: that, once the run has one.
        accepted_distance: matches are accepted up to this squared distance of descriptors, once it is known; None
            where nobody asks for it.
        found_on_val: what that distance gives on the val split, where it was found there.
    """

    dataset: DatabaseQueries
    queries: str
    of: str
    test_method: str
    positive_distance: float
    infer_batch_size: int
    subfolder: str
    folder: Path = Path()
    accepted_distance: float | None = None
    found_on_val: dict[str, Any] | None = None

    @property
    def store(self) -> str:
        """What the descriptors of the queries are kept under: of no two sets the same, nor a name of other stores."""
        name = quote(os.fsencode(self.queries), safe="")  # which has no / and no =
        return name if name.startswith("queries") else f"queries={name}"

    @cached_property
    def positives(self) -> Sequence[NDArray[np.int64]] | None:
        """For each query the indices of its correct database images; None without labels."""
        return self.dataset.positives(self.positive_distance) if self.dataset.labelled else None

    @cached_property
    def findable(self) -> NDArray[np.bool_] | None:
        """The queries that have a correct database image, or a position that is not known, Q; None without labels."""
        if self.positives is None:
            return None
        found = np.fromiter((len(of_query) > 0 for of_query in self.positives), bool, len(self.dataset.queries_paths))
        return found | ~self.dataset.judged_queries

    @cached_property
    def alignment(self) -> dict[str, bool | int]:
        """What the batches of the cross-image encoder tell in file order; of a labelled task."""
        assert self.positives is not None
        batch = 1 if self.test_method == "single_query" else self.infer_batch_size  # such a query has no company
        return alignment(self.dataset, self.positives, batch)


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
        asked = None if options.map is None else PlaceMap(options.map)
        groups = [tasks_of(options, name, sets) for name, sets in datasets(options, asked)]
        val_tasks = [val_task(options, group) for group in groups]
        tasks = [task for group in groups for task in group]
        require_folders_of_their_own(tasks)
        path = distributed.on_main(lambda: find_checkpoint(options.resume))
        content = read_file(path)
        if asked is None:
            options = completed(options, model_of(options.resume, content), content)
        else:
            options = as_the_map_was_made(asked, options, model_of(options.resume, content))
        run_log.compare_with_record(asdict(options), device)
        model = build_model(**options.model)
        pca_paths = pca_images(options, model.descriptor_dim)
        with nullcontext() if asked is None else asked.fitting(str(options.resume)):
            load_checkpoint(model, path, content)
        if model.projection is not None:
            if options.pca_dim and asked is None:
                raise ValueError(
                    f"--pca_dim {options.pca_dim}: {path} ends with a PCA already, to {model.descriptor_dim} numbers; "
                    "leave it out, or evaluate the checkpoint without"
                )
            logger.info("from the checkpoint: a PCA to %d numbers, of unit norm again", model.descriptor_dim)
        del content
        weights = state_digest(model) if asked is not None or options.save_map is not None or options.pca_dim else ""
        if asked is not None:
            asked.require_weights(weights, str(options.resume))
        for line in options.unused(encoder=model.encoder is not None):
            logger.warning("%s", line)
        for group, on_val in zip(groups, val_tasks, strict=True):
            foresee(model, options, group)
            if on_val is not None:
                foresee_index(model, options, on_val)
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
        for task in tasks:
            task.folder = folder / task.subfolder
        outputs = Outputs()
        for group, on_val in zip(groups, val_tasks, strict=True):
            found = None
            distance = options.accept_distance if asked is None or options.accept is not None else asked.accept
            if on_val is not None:
                found = found_on_val(model, on_val, folder, pca_paths, options, device, preemption.stop)
                distance = found["threshold"]
            for task in group:
                task.accepted_distance, task.found_on_val = distance, found
        with ExitStack() as held:
            stores: list[Stores] = [
                {**extracted(model, group, pca_paths, options, device, held, preemption.stop)} for group in groups
            ]
            if asked is not None:
                stores[0]["database"] = asked
            if not distributed.is_main():
                for group, of_group in zip(groups, stores, strict=True):
                    help_search(model, group, of_group, options, device, contexts_of(model, options))
                return {}  # nobody waits for a search that the main process does alone
            # All results come before the first output that can fail.
            evaluations: list[Evaluation] = []
            with kept_if_it_fails(model, groups, stores, pca_paths, options, folder / "kept"):
                for group, of_group in zip(groups, stores, strict=True):
                    evaluations += evaluate(model, group, of_group, options, device, outputs)
            table = {evaluation.task.dataset.name: evaluation.recalls for evaluation in evaluations}
            if len(tasks) > 1:
                logger.info("%s", report.recall_table(table))
                with outputs.writing(str(folder / "results.json")):
                    run_log.write_results(folder, {"recalls": table}, asdict(options), device)
            for evaluation in evaluations:
                write_outputs(model, evaluation, options, device, outputs, weights)
            if options.save_map is not None:
                with outputs.writing(str(options.save_map)):
                    save_map(options.save_map, evaluations[0], options, weights)
        if outputs.missing:
            raise SystemExit(1)
    return table


def completed(options: EvalOptions, written: dict[str, Any], content: dict[str, Any]) -> EvalOptions:
    """The options with what the checkpoint says, where the command line says nothing: backbone and how many of its
    blocks; clusters and encoder; the size of the images, else the backbone's own; of plain folders also how photos are
    prepared.

    Args:
        options: as given.
        written: what `build_model` takes for the checkpoint.
        content: of its file.
    """
    found = {"supervlad_clusters" if name == "clusters" else name: value for name, value in written.items()}
    of_backbone = ("backbone", "backbone_blocks")
    found = {name: value for name, value in found.items() if name not in of_backbone or name not in options.given}
    if {"supervlad_clusters", "ghost_clusters", "crossimage_encoder"} & {*options.given}:
        found = {name: value for name, value in found.items() if name in of_backbone}
    shown = [f"--{name} {value}" for name, value in found.items()]
    backbone = found.get("backbone", options.backbone)
    size, validated_at = size_of(content, backbone), validated_size_of(content, backbone)
    if "resize" not in options.given:
        found["resize"] = size  # None is the backbone's own
    if "backbone_blocks" not in options.given:
        found.setdefault("backbone_blocks", None)
    prepared = preparation_of(content) if options.plain_folders else {}
    prepared = {name: value for name, value in prepared.items() if name not in options.given}
    found |= prepared
    options = replace(options, **found)
    options.fit_backbone()
    if "resize" not in options.given and (size is not None or "backbone" in found):
        own = " (its backbone's own)" * (size is None)
        shown.append("--resize {} {}{}".format(*options.resize, own))
    if validated_at is not None and validated_at != options.resize:
        logger.warning("the model was validated at %d %d, and --resize is %d %d", *validated_at, *options.resize)
    elif validated_at is None and size is not None and size != options.resize:
        logger.warning("the file was exported for %d %d, and --resize is %d %d", *size, *options.resize)
    if "antialias" in prepared:
        shown.append(f"--{'no-' * (not prepared['antialias'])}antialias")
    if shown:
        logger.info("from the checkpoint: %s", ", ".join(shown))
    return options


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


def datasets(options: EvalOptions, asked: PlaceMap | None = None) -> Iterator[tuple[str, list[DatabaseQueries]]]:
    """The datasets asked for, each with the name that its protocol goes by and its sets of queries."""
    settings: dict[str, Any] = {
        "labelled": not options.no_labels,
        "positives_file": options.positives_file,
        "query_keys": options.query_keys,
        "labels_where_known": options.labels_where_known,
        "skip_unreadable": options.skip_unreadable,
    }
    if asked is not None and options.queries_folder is not None:
        logger.info("%s", asked)
        labelled, skip = not options.no_labels, options.skip_unreadable
        of_map = MapQueries.asked(asked, options.queries_folder, labelled=labelled, skip_unreadable=skip)
        found: list[tuple[str, DatabaseQueries]] = [(of_map.name, of_map)]
    elif options.database_folder is not None and options.queries_folder is not None:
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
            (
                name,
                DatabaseQueries.from_folder(
                    options.eval_datasets_folder, name, "test", queries_names=options.queries_of(name), **settings
                ),
            )
            for name in options.eval_dataset_name
        ]
    if options.descriptors_folder is not None:
        kept = [kept_in(options.descriptors_folder, dataset.name) for _, dataset in found]
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
        queries_names = options.queries_of(name)
        sets = dataset.sets(queries_names)
        if queries_names != ("queries",):
            warn_of_counts(dataset, protocol_of(name), None)
        for queries, of_set in zip(queries_names, sets, strict=True):
            warn_of_counts(of_set, protocol_of(name), queries)
        yield name, sets


def tasks_of(options: EvalOptions, name: str, sets: Sequence[DatabaseQueries]) -> list[Task]:
    """What is to be done for a dataset: one task for each set of queries."""
    trees = options.database_folder is None and options.map is None
    queries_names = options.queries_of(name)
    return [
        Task(
            dataset=dataset,
            queries=queries,
            of=f"{name} test" if trees else name,
            test_method=options.test_method or protocol_of(name).test_method,
            positive_distance=positive_distance(options, name),
            infer_batch_size=options.infer_batch_size,
            subfolder="/".join([name] * (trees and len(options.eval_dataset_name) > 1) + [queries] * (len(sets) > 1)),
        )
        for queries, dataset in zip(queries_names, sets, strict=True)
    ]


def require_folders_of_their_own(tasks: Sequence[Task]) -> None:
    """Raises ValueError if the results of two tasks would go to one folder."""
    names: dict[str, Task] = {}
    for task in tasks:
        other = names.setdefault(task.subfolder, task)
        if other is not task:
            raise ValueError(
                f"the results of {other.dataset.name} and {task.dataset.name} would go to one folder, "
                f"{task.subfolder}; evaluate one after the other"
            )


def as_the_map_was_made(asked: PlaceMap, options: EvalOptions, written: dict[str, Any]) -> EvalOptions:
    """The options with the map's model and preparation, which neither the checkpoint nor the command line may deny.

    Args:
        asked: the map.
        options: as given.
        written: what `build_model` takes for the checkpoint.
    """
    asked.require(written, str(options.resume))
    given = {"clusters" if name == "supervlad_clusters" else name for name in options.given}
    said = {"backbone_blocks": None, **options.model, "resize": options.resize, "antialias": options.antialias}
    asked.require({name: value for name, value in said.items() if name in given}, "the command line")
    if options.precision != asked.precision:
        logger.warning("the map was made in --precision %s, and is asked in %s", asked.precision, options.precision)
    made: dict[str, Any] = {"resize": asked.resize, "antialias": asked.antialias, "upright": asked.upright}
    made |= {"supervlad_clusters" if name == "clusters" else name: value for name, value in asked.model.items()}
    return replace(options, **made, pca_dim=0 if asked.pca is None else asked.descriptor_dim)


def depth(options: EvalOptions, task: Task) -> int:
    """How many database images are searched for each query."""
    k = max(options.recall_values)
    if task.test_method != "maj_voting":  # where the depth of the search decides how many crops can agree
        k = max(k, options.save_predictions, options.save_pairs, SUBMITTED if options.save_submission else 0)
    return min(k, len(task.dataset.database_paths))


def foresee(model: SuperVLADNet, options: EvalOptions, group: Sequence[Task]) -> None:
    """Says before the extraction what can be known then: an index or a context that cannot be, figures with a limit to
    them, and recalls that the batches may decide.

    Raises:
        ValueError: FAISS refuses the index, or queries and database images do not pair up for the paired context.
    """
    if not distributed.is_main():
        return
    database = group[0].dataset
    count = len(database.database_paths)
    asked = {"--recall_values": max(options.recall_values) if database.labelled else 0}
    asked |= {"--save_predictions": options.save_predictions, "--save_pairs": options.save_pairs}
    asked |= {"--save_submission": SUBMITTED * options.save_submission}
    for flag, wanted in asked.items():
        if wanted > count and (flag == "--save_submission" or flag.lstrip("-") in options.given):
            logger.warning("%s asks for %d matches, and %s has %d database images", flag, wanted, group[0].of, count)
    if options.save_submission and max(options.recall_values) < SUBMITTED <= count:
        logger.info("--save_submission: %d images a query are submitted, which are scored", SUBMITTED)
    for task in group:
        if task.positives is None or task.findable is None:
            continue
        lost = int((~task.findable).sum())
        if lost:
            logger.warning(
                "%s: %d of %d queries have no %sdatabase photo %s; they count as missed, as in published figures",
                task.dataset.name,
                lost,
                int(task.dataset.judged_queries.sum()),
                "correct " * bool(options.positives_file),
                rule(options, task.positive_distance),
            )
        if model.encoder is not None:
            foresee_contexts(options, task)
    foresee_outputs(model, options, group)
    foresee_index(model, options, group[0])


def foresee_outputs(model: SuperVLADNet, options: EvalOptions, group: Sequence[Task]) -> None:
    """Refuses outputs that could not be written in the end.

    Raises:
        ValueError: it says which and why.
    """
    if options.save_map is not None:
        require_place_for(options.save_map, contexts_of(model, options)[0] if model.encoder is not None else None)
        approximate = options.index not in (None, "binary")
        if options.accept_precision is not None and (approximate or group[0].test_method != "hard_resize"):
            logger.warning(
                "--save_map keeps the distance of --accept %s, which %s gives; a map is asked exactly, by hard_resize",
                options.accept,
                f"--index {options.index}" if approximate else f"--test_method {group[0].test_method}",
            )
    for task in group:
        dataset = task.dataset
        if options.save_pairs or options.save_h5:
            pairs.require_names(
                dataset.queries_paths,
                dataset.database_paths,
                flag="--save_pairs" if options.save_pairs else "--save_h5",
                there=not isinstance(dataset, MapQueries) or dataset.photos_there,
            )
        if options.save_h5:
            pairs.require_one_each(task.test_method, options.pca_dim)


def foresee_index(model: SuperVLADNet, options: EvalOptions, task: Task) -> None:
    """Tries the index, as far as that can be done before the extraction.

    Raises:
        ValueError: FAISS refuses it.
    """
    if options.index not in (None, "binary") and distributed.is_main():
        assert options.index is not None
        count = len(task.dataset.database_paths)
        _, in_chunk = images_at_a_time((count, 1, *model.vectors_shape), options.infer_batch_size)
        require_index(
            options.index,
            options.index_parameters,
            dim=options.pca_dim or model.descriptor_dim,
            count=count,
            chunks=-(-count // in_chunk),
            k=depth(options, task),
        )


def foresee_contexts(options: EvalOptions, task: Task) -> None:
    """Says what the batches of the cross-image encoder tell of a task, and refuses a paired order where there is none.

    Raises:
        ValueError: queries and database images do not pair up.
    """
    assert task.positives is not None
    dataset, batch = task.dataset, options.infer_batch_size
    if "paired" in options.encoder_context and not pair_up(task.positives, len(dataset.database_paths)):
        raise ValueError(
            f"--encoder_context paired: {dataset.name} has {len(dataset.queries_paths)} queries and "
            f"{len(dataset.database_paths)} database images, which do not pair up one to one in the order of names; "
            "take shuffled"
        )
    same = ""
    if task.test_method == "single_query":
        same = "queries share a batch with none by --test_method single_query"
    elif options.shift % batch == 0:
        same = f"--context_shift {options.shift} is whole batches of {batch}"
    elif options.shift % batch >= len(dataset.queries_paths):
        same = (
            f"{dataset.name} has no more than {options.shift % batch} queries, --context_shift, which share one batch"
        )
    if "unaligned" in options.encoder_context and same:
        logger.warning("%s: unaligned is file_order then", same)
    if "file_order" not in options.encoder_context:
        return
    log_alignment(dataset, task.alignment, "--encoder_context file_order unaligned")


def rule(options: EvalOptions, distance: float) -> str:
    """What makes a database photo correct, in words."""
    return f"as {options.positives_file.name} says" if options.positives_file else f"within {distance:g} m"


def positive_distance(options: EvalOptions, name: str) -> float:
    """How near a correct database image is, in metres."""
    protocol = protocol_of(name)
    if options.val_positive_dist_threshold is not None:
        return options.val_positive_dist_threshold
    frames = protocol.frames if options.positive_frames is None else options.positive_frames
    if frames is None:
        return protocol.positive_distance
    if protocol.metres_a_frame is None:
        raise ValueError(f"--positive_frames: the positions of {name} do not count frames; use metres")
    return (frames + 0.5) * protocol.metres_a_frame  # half-way to the first frame too far


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


def images_of(group: Sequence[Task], pca_paths: list[str]) -> dict[str, tuple[list[str], str]]:
    """What is extracted for the tasks of a dataset: paths and test method by name."""
    images = {}
    if not isinstance(group[0].dataset, MapQueries):  # whose database a map has
        images["database"] = (group[0].dataset.database_paths, "hard_resize")
    images |= {task.store: (task.dataset.queries_paths, task.test_method) for task in group}
    if pca_paths:
        images["pca"] = (pca_paths, "hard_resize")
    return images


def kept_in(descriptors_folder: Path, dataset: str) -> Path:
    """Where `--descriptors_folder` has what was extracted of a dataset."""
    return descriptors_folder / dataset.replace(" ", "_")


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
    group: Sequence[Task],
    pca_paths: list[str],
    options: EvalOptions,
    device: torch.device,
    held: ExitStack,
    stop: Callable[[], None],
) -> dict[str, DescriptorStore]:
    """Runs the backbone over database, queries and perhaps the images for a PCA, as far as that was not done before.

    What is not kept is removed, and what is kept open to others again, when `held` ends.
    """
    images = images_of(group, pca_paths)
    batch_size = options.extraction_batch_size or extraction_batch_size(device)
    folder, fingerprint = group[0].folder / "extracted", None
    if options.descriptors_folder is not None:
        folder = kept_in(options.descriptors_folder, group[0].of)
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
            transform=evaluation_transform(
                options.resize, options.antialias, test_method, patch_size=model.backbone.size.patch_size
            ),
            # single_query keeps each photo's shape; crops are as many images.
            batch_size=1 if test_method == "single_query" else max(1, batch_size // CROPS[test_method]),
            num_workers=reading_workers(device) if options.num_workers is None else options.num_workers,
            device=device,
            progress=f"{group[0].of} {name}",
            upright=options.upright,
            stop=stop,
        )
        extract(model, paths, stores[name], read_images, options.precision)
    return stores


@contextmanager
def kept_if_it_fails(
    model: SuperVLADNet,
    groups: Sequence[Sequence[Task]],
    stores: Sequence[Stores],
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
            for group, of_group in zip(groups, stores, strict=True):
                for name, (paths, test_method) in images_of(group, pca_paths).items():
                    fingerprint = fingerprint_of(weights, options, test_method)
                    store = of_group[name]
                    assert isinstance(store, DescriptorStore)
                    try:
                        store.keep(kept_in(folder, group[0].of), fingerprint, paths)
                    except (OSError, ValueError) as problem:
                        logger.warning("%s of %s could not be kept: %s", name, group[0].of, problem)
        logger.warning("what was extracted is kept: %s goes on with the search", advice)
        raise


@dataclass(frozen=True, kw_only=True)
class Matches:
    """What the search found for one set of queries.

    Attributes:
        search: which it was.
        context: of it.
        distances: squared, of the descriptors, Q x k.
        predictions: database indices, Q x k, best first; -1 is none.
        correct: which of them are right, Q x k; None without labels.
    """

    search: Search
    context: str
    distances: NDArray[np.float32]
    predictions: NDArray[np.int64]
    correct: NDArray[np.bool_] | None


@dataclass(kw_only=True)
class Evaluation:
    """What comes out for one set of queries, one encoder context after the other.

    Attributes:
        task: what was evaluated.
        results: of all contexts, as in `results.json`.
        recalls: recall@N in percent by context, of several orders the mean.
        curves: likewise, for N from 1 to the depth of the search.
        first_matches: what first matches are accepted by, by context.
        first: what was found in the first search of the first context.
    """

    task: Task
    results: dict[str, Any]
    recalls: dict[str, dict[int, float]] = field(default_factory=dict)
    curves: dict[str, list[float]] = field(default_factory=dict)
    first_matches: dict[str, acceptance.FirstMatches] = field(default_factory=dict)
    first: Matches | None = None

    def note(self, context: str, searched: Sequence[Matches], options: EvalOptions) -> list[str]:
        """Takes what the searches of a context found, one for each order.

        Returns:
            The lines that tell of it.
        """
        task, dataset = self.task, self.task.dataset
        starts = self.first is None
        if self.first is None:
            self.first = searched[0]
        masks = [of_order.correct for of_order in searched if of_order.correct is not None]
        lines = []
        if not masks:
            lines.append(f"Searched {dataset}, without labels: predictions.csv in {task.folder}")
        else:
            k = masks[0].shape[1]
            found = [search.recall_of(correct[dataset.judged_queries], range(1, k + 1)) for correct in masks]
            mean = {n: float(np.mean([recall[n] for recall in found])) for n in found[0]}
            self.curves[context] = list(mean.values())
            recalls = self.recalls[context] = {n: mean[min(n, k)] for n in options.recall_values}
            self.results["recalls"] = self.recalls[self.first.context]
            of_context = self.results.setdefault("contexts", {})[context] = {"recalls": recalls, "orders": len(found)}
            believed = acceptance.pooled([first_matches(task, options, of_order) for of_order in searched])
            self.first_matches[context] = believed
            summary = of_context["first_match"] = acceptance.summary(believed)
            if starts:
                in_words = acceptance.in_words(summary, k, task.positive_distance)
                lines.append(f"first match of {dataset.name}: {in_words}")
            line = f"Recalls on {dataset}"
            if not starts or context != "file_order":
                line += f", {context}" + (f" ({len(found)} orders)" if len(found) > 1 else "")
            line += f": {format_recalls(recalls)}"
            if len(found) > 1:
                deviation = {n: float(np.std([recall[n] for recall in found])) for n in found[0]}
                spread = of_context["deviations"] = {n: deviation[min(n, k)] for n in options.recall_values}
                line += f"; deviations {format_recalls(spread)}"
            lines.append(line)
        if starts and task.accepted_distance is not None:
            self.results["accepted"], line = what_is_accepted(task, self.first, options)
            lines.insert(-1, line)
        return lines


def searches(
    model: SuperVLADNet,
    group: Sequence[Task],
    stores: Stores,
    options: EvalOptions,
    device: torch.device,
    context: str,
) -> Iterator[Search]:
    """The searches in one encoder context; where it is drawn, an order after the other if recalls are averaged."""
    dataset = group[0].dataset
    for order in range(options.context_seeds if context in DRAWN_CONTEXTS and dataset.labelled else 1):
        yield Search(
            model,
            stores,
            test_method=group[0].test_method,
            context=context,
            infer_batch_size=options.infer_batch_size,
            shift=options.shift,
            seed=(options.seed, order),
            pca_dim=options.pca_dim,
            pca_whiten=options.pca_whiten,
            device=device,
            by_all=searched_by_all(len(dataset.database_paths), options.index),
        )


def contexts_of(model: SuperVLADNet, options: EvalOptions) -> tuple[str, ...]:
    """The encoder contexts that can differ."""
    return options.encoder_context if model.encoder is not None else ("file_order",)


def val_task(options: EvalOptions, group: Sequence[Task]) -> Task | None:
    """What `--accept auto@P` finds the distance on: the val split beside a test split; None where nobody asks for it.

    Raises:
        ValueError: there is none that can be used.
    """
    if options.accept_precision is None:
        return None
    name = group[0].of.removesuffix(" test")
    folder = options.eval_datasets_folder / name / "images" / "val"
    remedy = f"put one into {folder}, or give --accept a distance"
    if not folder.is_dir():
        raise ValueError(f"--accept {options.accept} is found on the val split, and {name} has none; {remedy}")
    if not (folder / "queries").is_dir():  # whatever sets the test split has
        raise ValueError(f"--accept {options.accept}: there is no folder {folder / 'queries'}; {remedy}")
    try:
        val = DatabaseQueries.from_folder(
            options.eval_datasets_folder,
            name,
            "val",
            labels_where_known=options.labels_where_known,
            skip_unreadable=options.skip_unreadable,
        )
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"--accept {options.accept} is found on the val split of {name}: {error}; {remedy}") from error
    test_queries = [path for task in group for path in task.dataset.queries_paths]
    tested = set(map(identity, test_queries))
    if any(identity(path) in tested for path in val.queries_paths):
        raise ValueError(
            f"--accept {options.accept}: queries of the val split of {name} are those of the test split, whose own "
            f"distance would flatter it; {remedy}"
        )
    named = set(map(os.path.basename, test_queries)) & set(map(os.path.basename, val.queries_paths))
    if named:
        logger.warning(
            "%s: %d queries have the names of queries of the test split, e.g. %s; if they are the same photos, what "
            "--accept %s finds flatters it",
            val.name,
            len(named),
            min(named),
            options.accept,
        )
    return replace(group[0], dataset=val, queries="queries", of=val.name)


def found_on_val(
    model: SuperVLADNet,
    on_val: Task,
    folder: Path,
    pca_paths: list[str],
    options: EvalOptions,
    device: torch.device,
    stop: Callable[[], None],
) -> dict[str, Any]:
    """What `--accept auto@P` finds on the val split: the largest distance, `threshold`, of such a precision there.

    All processes call it at the same point.

    Args:
        model: in evaluation mode.
        on_val: the val split, which is extracted and searched as the test split will be, in the first encoder context
            asked for.
        folder: the run's.
        pca_paths: images that a PCA is fitted on.
        options: as completed.
        device: where the model is.
        stop: called now and then, to leave by an exception.

    Raises:
        ValueError: no distance has such a precision; what was extracted is kept.
    """
    on_val.folder = folder / on_val.subfolder / "val"
    context = contexts_of(model, options)[0]

    def found(stores: Stores) -> dict[str, Any]:
        orders = []
        for searched in searches(model, [on_val], stores, options, device, context):
            (of_order,) = searched_sets(searched, [on_val], options)
            orders.append(first_matches(on_val, options, matches_of(on_val, searched, context, *of_order)))
        return distance_on_val(acceptance.pooled(orders), on_val.dataset, context, options)

    with ExitStack() as held:
        if distributed.is_main():
            held.callback(remove_if_empty, on_val.folder.parent)
            held.callback(remove_if_empty, on_val.folder)
        stores: Stores = {**extracted(model, [on_val], pca_paths, options, device, held, stop)}
        if not distributed.is_main():
            help_search(model, [on_val], stores, options, device, [context])
            return distributed.on_main(dict)
        with kept_if_it_fails(model, [[on_val]], [stores], pca_paths, options, folder / "kept"):
            return distributed.on_main(lambda: found(stores))


def distance_on_val(
    found: acceptance.FirstMatches, val: DatabaseQueries, context: str, options: EvalOptions
) -> dict[str, Any]:
    """The largest distance of the precision that `--accept auto@P` asks for, with what it gives there, as in the log.

    Raises:
        ValueError: there is none.
    """
    assert options.accept_precision is not None
    curve = acceptance.distance_curve(found)
    best = curve.at_precision(options.accept_precision)
    if best is None:
        most = f"but {curve.precision.max():.1f}% at most" if len(curve.precision) else "as no match can be judged"
        raise ValueError(
            f"--accept {options.accept}: on {val.name} no distance gives {options.accept_precision:g}% precision, "
            f"{most}; ask for less, or give a distance"
        )
    point = curve.point(best)
    logger.info(
        "--accept %s is %s, the largest squared distance of that precision on %s, %s%s: %d of %d first matches are "
        "accepted, precision %.1f, recall %.1f",
        options.accept,
        acceptance.written(point["threshold"]),
        val,
        context,
        ", all its queries, since --query_keys are of the test split" if options.query_keys else "",
        point["accepted"],
        len(found.distances),
        point["precision"],
        point["recall"],
    )
    return {**val.sizes, "context": context, "first_matches": len(found.distances), **point}


def first_matches(task: Task, options: EvalOptions, found: Matches) -> acceptance.FirstMatches:
    """What the first matches of a search in a dataset with labels are judged by."""
    assert found.correct is not None and task.findable is not None
    dataset, predictions = task.dataset, found.predictions
    nothing = predictions[:, 0] < 0
    apart = None
    if task.test_method == "maj_voting":
        no_ratio = "votes lower the distances"
    else:
        no_ratio = f"{'--positives_file' if options.positives_file else 'the dataset'} gives no metres"
        apart = dataset.metres_from_first(predictions)
    return acceptance.first_matches(
        found.distances,
        predictions,
        correct=found.correct[:, 0],
        findable=task.findable,
        judged=dataset.judged(predictions[:, :1])[:, 0] | (dataset.judged_queries & nothing),
        elsewhere=None if apart is None else apart > task.positive_distance,
        no_ratio=no_ratio,
    )


def what_is_accepted(task: Task, matches: Matches, options: EvalOptions) -> tuple[dict[str, Any], str]:
    """What `--accept` comes to on a task: for `results.json`, and in a line."""
    assert task.accepted_distance is not None
    first, distances = matches.predictions[:, 0] >= 0, matches.distances[:, 0]
    count = int((first & acceptance.accepted(distances, task.accepted_distance)).sum())
    asked = f"--accept {options.accept}"
    if options.accept is None:
        asked = f"the map's accepted distance, {acceptance.written(task.accepted_distance)}"
    elif options.accept_precision is not None:
        asked += f" ({acceptance.written(task.accepted_distance)})"
    results: dict[str, Any] = {
        "accept": options.accept,
        "distance": task.accepted_distance,
        "accepted": count,
        "queries": len(first),
    }
    if task.found_on_val is not None:
        results["found_on"] = task.found_on_val
    line = f"{asked}: {count} of {len(first)} first matches are accepted"
    if matches.correct is not None:
        curve = acceptance.distance_curve(first_matches(task, options, matches))
        point = curve.point(curve.at(task.accepted_distance))
        results |= {"judged": point["accepted"], "precision": point["precision"], "recall": point["recall"]}
        if point["accepted"] < count:
            line += f", {point['accepted']} of them judged, since positions are missing"
        for name in ("precision", "recall"):
            line += f", {name} {'unknown' if point[name] is None else format(point[name], '.1f')}"
    return results, line


def remove_if_empty(folder: Path) -> None:
    """Removes a folder that nothing was left in."""
    with suppress(OSError):
        folder.rmdir()


def help_search(
    model: SuperVLADNet,
    group: Sequence[Task],
    stores: Stores,
    options: EvalOptions,
    device: torch.device,
    contexts: Sequence[str],
) -> None:
    """Searches this process's share of the database, in the order in which the main process searches."""
    if searched_by_all(len(group[0].dataset.database_paths), options.index):
        for context in contexts:
            for searched in searches(model, group, stores, options, device, context):
                searched.run(depth(options, group[0]))


def evaluate(
    model: SuperVLADNet,
    group: Sequence[Task],
    stores: Stores,
    options: EvalOptions,
    device: torch.device,
    outputs: Outputs,
) -> list[Evaluation]:
    """Searches the sets of queries of a dataset in every encoder context asked for; each set has its lines, and its
    `results.json`, before the next context is searched."""
    evaluations = [Evaluation(task=task, results=facts(model, task, options)) for task in group]
    contexts = contexts_of(model, options)
    for context in contexts:
        found: list[list[Matches]] = [[] for _ in group]
        agreements: list[list[dict[str, float]]] = []  # by order and set
        for searched in searches(model, group, stores, options, device, context):
            for task, of_task, of_set in zip(group, found, searched_sets(searched, group, options), strict=True):
                of_task.append(matches_of(task, searched, context, *of_set))
            agreements.append(searched.agreements)
        for number, (evaluation, of_task) in enumerate(zip(evaluations, found, strict=True)):
            lines = evaluation.note(context, of_task, options)
            if options.index is not None:
                of_orders = [of_sets[number] for of_sets in agreements]
                evaluation.results.setdefault("index_agreement", of_orders[0])
                if context in evaluation.curves:
                    evaluation.results["contexts"][context]["index_agreements"] = of_orders
            folder = evaluation.task.folder
            if context == contexts[0]:
                logger.info("log and results.json in %s", folder)
            for line in lines:
                logger.info("%s", line)
            with outputs.writing(str(folder / "results.json")):
                folder.mkdir(parents=True, exist_ok=True)
                run_log.write_results(folder, evaluation.results, asdict(options), device)
    return evaluations


def searched_sets(
    searched: Search, group: Sequence[Task], options: EvalOptions
) -> list[tuple[NDArray[np.float32], NDArray[np.int64]]]:
    """Squared distances and database indices that a search finds for each set of queries, Q x k each."""
    return searched.run(
        depth(options, group[0]),
        index=options.index,
        index_parameters=options.index_parameters,
        rerank=options.rerank,
        majority_weight=options.majority_weight,
    )


def matches_of(
    task: Task, searched: Search, context: str, distances: NDArray[np.float32], predictions: NDArray[np.int64]
) -> Matches:
    """What a search found for a task, judged."""
    correct = None if task.positives is None else search.correct_among(predictions, task.positives)
    return Matches(search=searched, context=context, distances=distances, predictions=predictions, correct=correct)


def facts(model: SuperVLADNet, task: Task, options: EvalOptions) -> dict[str, Any]:
    """What `results.json` says of a task beside what is found."""
    results: dict[str, Any] = {}
    if task.findable is not None:
        results = {"recalls": {}, "positive_distance": task.positive_distance}
        results |= {"queries_without_positives": int((~task.findable).sum())}
        if model.encoder is not None:
            results["alignment"] = task.alignment
    results |= {"dataset": task.dataset.sizes, "descriptor_dim": options.pca_dim or model.descriptor_dim}
    return results | {"test_method": task.test_method}


def save_map(path: Path, evaluation: Evaluation, options: EvalOptions, weights: str) -> None:
    """Writes the map of a database: its descriptors as they were searched, and the positions that are known."""
    assert evaluation.first is not None
    searched = evaluation.first.search
    located = evaluation.task.dataset.located(exif=options.plain_folders)
    write_map(
        path,
        searched.chunks("database"),
        paths=located.database_paths,
        positions=located.database_positions,
        geographic=located.geographic,
        dtype=options.descriptor_dtype,
        pca=searched.pca,
        model=options.model,
        checkpoint=options.resume.name,
        weights=weights,
        resize=options.resize,
        antialias=options.antialias,
        upright=options.upright,
        precision=options.precision,
        accept=evaluation.task.accepted_distance,
    )


def write_outputs(
    model: SuperVLADNet,
    evaluation: Evaluation,
    options: EvalOptions,
    device: torch.device,
    outputs: Outputs,
    weights: str,
) -> None:
    """Writes what there is to look at and to compute with, as asked for; the page comes last.

    Args:
        model, evaluation, options, device, outputs: of the run.
        weights: what a PCA is of, as `model.weights.state_digest`.
    """
    assert evaluation.first is not None
    task, matches, curves = evaluation.task, evaluation.first, evaluation.curves
    dataset, folder = task.dataset, task.folder
    predictions, correct = matches.predictions, matches.correct
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
            accepted_distance=task.accepted_distance,
        )
    if curves:
        with outputs.writing(str(folder / "recalls.png")):
            report.draw_recalls(folder, dataset.name, curves, options.recall_values)
        with outputs.writing(str(folder / "first_match.png")):
            report.draw_first_match(folder, dataset.name, evaluation.first_matches, task.accepted_distance)
    if options.save_submission:
        with outputs.writing(str(folder / "submission.zip")):
            query_keys, database_keys = (
                [image_key(path) for path in side] for side in (dataset.queries_paths, dataset.database_paths)
            )
            report.write_submission(folder, query_keys, database_keys, predictions)
    if options.save_pairs:
        with outputs.writing(str(folder / pairs.PAIRS)):
            first_of = predictions[:, : options.save_pairs]
            pairs.write_pairs(folder, dataset.queries_paths, dataset.database_paths, first_of)
    if options.save_h5:
        with outputs.writing(str(folder / pairs.DESCRIPTORS)):
            sides = {"database": dataset.database_paths, task.store: dataset.queries_paths}
            pairs.write_h5(folder, {name: (paths, matches.search.chunks(name)) for name, paths in sides.items()})
    if options.pca_dim and options.map is None:
        with outputs.writing(str(folder / "pca.pth")):
            facts = {"dim": options.pca_dim, "whiten": options.pca_whiten, "context": matches.context}
            facts |= {"images": str(options.pca_dataset_folder), "count": matches.search.pca.n_samples_}
            facts |= {"weights": weights, "resize": list(options.resize)}
            checkpoint.save(folder / "pca.pth", {**matches.search.projection(), "pca": facts})
    if options.save_descriptors:
        with outputs.writing(str(folder / "descriptors")):
            paths = {"database": dataset.database_paths, task.store: dataset.queries_paths}
            matches.search.save(folder / "descriptors", **paths)
    if options.save_assignments:
        write_assignments(model, task, options, predictions, correct, device, outputs)
    if options.save_predictions:
        first = np.s_[:, : options.save_predictions]
        title = str(dataset)
        if curves:
            curve = curves[matches.context]
            shown = {n: curve[min(n, len(curve)) - 1] for n in options.recall_values}
            title += f", {matches.context}" * (model.encoder is not None) + f", {format_recalls(shown)}"
        # Of unit vectors the distance tells the cosine; not of those that a PCA, an index or a mean over crops changes.
        plain_pca = options.pca_dim and not options.pca_whiten
        mean = task.test_method == "five_crops" and not options.pca_dim
        unit = not (plain_pca or mean or task.test_method == "maj_voting") and options.index is None
        accepted = None
        if task.accepted_distance is not None:
            accepted = acceptance.accepted(matches.distances[first], task.accepted_distance)
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
                    read=partial(shown_photo, options=options),
                    similarity=1 - matches.distances[first].astype(np.float64) / 2 if unit else None,
                    rule=rule(options, task.positive_distance),
                    findable=task.findable,
                    accepted=accepted,
                    accepted_rule=f"squared distance of descriptors up to {task.accepted_distance}",
                )
            logger.info("open in a browser: %s", (folder / "matches/index.html").absolute().as_uri())


def shown_photo(path: str, options: EvalOptions) -> Image.Image | None:
    """A photo for the page of matches; None for one of a map that is not there."""
    if options.map is not None and not os.path.exists(path):
        return None
    return read_reduced(path, match_page.THUMBNAIL_SIDE, upright=options.upright)


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
