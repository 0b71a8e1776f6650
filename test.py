"""Measures recall@N: the evaluation of train.py, and that of eval.py with all its options."""

import logging
import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from datasets.evaluation.database_queries import DatabaseQueries, image_key
from datasets.evaluation.judging import Evaluation, Matches, distance_on_val, first_matches, format_recalls
from datasets.evaluation.map_queries import MapQueries
from datasets.evaluation.tasks import Task, foresee_recalls
from datasets.photos.batches import image_batches
from datasets.photos.transforms import CROPS, evaluation_transform, read_pixels, read_reduced
from utils.outputs import match_page, pairs
from utils.outputs.results import Found, Wanted
from utils.retrieval import acceptance, search
from utils.retrieval.contexts import DRAWN_CONTEXTS, Search, searched_by_all
from utils.retrieval.descriptor_store import DescriptorStore, digest, kept_in
from utils.retrieval.extraction import PlaceDescriber, extract, images_at_a_time
from utils.retrieval.index_trial import require_index
from utils.retrieval.place_map import PlaceMap, require_place_for, write_map
from utils.system import distributed
from utils.system.device import autocast, extraction_batch_size, reading_workers
from utils.system.files import Outputs
from utils.system.lock import FolderLock

logger = logging.getLogger(__name__)

Stores = dict[str, DescriptorStore | PlaceMap]  # by name: database, query sets and perhaps pca


def evaluate(
    model: PlaceDescriber,
    dataset: DatabaseQueries,
    *,
    read_images: Callable[..., Iterator[Tensor]],
    recall_values: Sequence[int],
    positive_distance: float,
    infer_batch_size: int,
    device: torch.device,
    folder: Path,
    precision: str = "fp32",
) -> dict[int, float]:
    """Recall@N of a model on a dataset, with `hard_resize` and in file order: `{N: percent of the queries}`.

    With several processes, each extracts its share; the main one searches, or all do (`searched_by_all`); all get the
    result. If the search fails, the descriptors are lost too: training resumed from its checkpoint extracts them again.

    Args:
        model: the model to evaluate.
        dataset: database and queries.
        read_images: `image_batches` that needs only paths and the bar's name; its batch size never changes recall.
        recall_values: values of N.
        positive_distance: a database image within this many metres of a query is correct.
        infer_batch_size: images that share a batch in `describe`.
        device: device of the model.
        folder: temporary folder for descriptors, removed afterwards.
        precision: precision of the backbone, a name from `utils.system.device.autocast`.
    """
    recalls: dict[int, float] = {}
    stores: dict[str, DescriptorStore] = {}
    try:
        for name, paths in (("database", dataset.database_paths), ("queries", dataset.queries_paths)):
            stores[name] = DescriptorStore(folder, name, (len(paths), 1, *model.vectors_shape))
            extract(model, paths, stores[name], partial(read_images, progress=name), precision)
        by_all = searched_by_all(len(dataset.database_paths))
        if by_all or distributed.is_main():
            searched = Search(model, stores, infer_batch_size=infer_batch_size, device=device, by_all=by_all)
            ((_, predictions),) = searched.run(max(recall_values))
            if distributed.is_main():
                recalls = search.recall_at(predictions, dataset.positives(positive_distance), recall_values)
    finally:
        if distributed.is_main():
            for store in stores.values():
                store.remove()
    return distributed.broadcast(recalls)


class EvaluatedModel(PlaceDescriber, Protocol):
    """A model whose parts are accessible: kept descriptors depend only on backbone and aggregation."""

    backbone: Any
    aggregation: Any
    encoder: Any

    @property
    def descriptor_dim(self) -> int:
        """Dimension of a descriptor."""

    def assignments(self, images: Tensor) -> Tensor:
        """Normalised images B x 3 x H x W to soft assignments B x (K+G) x h x w of each patch to each cluster."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to evaluate a model; most fields are named like eval.py's options.

    Attributes:
        shift: queries in the first batch of the "unaligned" context.
        depth_wanted: matches per query that the outputs show, beyond the recall values.
        accept_distance: the squared descriptor distance given by `accept`; None if it gives none.
        accept_precision: or the precision in percent whose distance is found on the val split.
        plain_folders: whether the photos are in plain folders, so that EXIF may say where they were taken.
    """

    resize: tuple[int, int]
    antialias: bool
    upright: bool
    precision: str
    extraction_batch_size: int
    num_workers: int | None
    descriptor_dtype: str
    descriptors_folder: Path | None

    encoder_context: tuple[str, ...]
    context_seeds: int
    shift: int
    infer_batch_size: int
    seed: int
    pca_dim: int
    pca_whiten: bool
    index: str | None
    index_parameters: str
    rerank: int
    majority_weight: float

    recall_values: tuple[int, ...]
    depth_wanted: int
    accept: str | None
    accept_distance: float | None
    accept_precision: float | None
    query_keys: Path | None
    plain_folders: bool


class Evaluator:
    """Evaluates a model on tasks, in steps that all processes take together: extract, then search.

    Args:
        model: the model to evaluate; on its device and in evaluation mode before the first extraction.
        settings: how to evaluate it.
        device: device of the model.
        place_map: a map to query instead of a database, if any.
        pca_paths: images to fit a PCA on.
        record: takes a folder and results, and writes `results.json` there.
        stop: called regularly; it may raise to stop the evaluation.
    """

    def __init__(
        self,
        model: EvaluatedModel,
        settings: Settings,
        *,
        device: torch.device,
        place_map: PlaceMap | None = None,
        pca_paths: Sequence[str] = (),
        record: Callable[[Path, dict[str, Any]], None] = lambda folder, results: None,
        stop: Callable[[], None] = lambda: None,
    ):
        self.model = model
        self.settings = settings
        self.device = device
        self.place_map = place_map
        self.pca_paths = list(pca_paths)
        self.record = record
        self.stop = stop

    @property
    def contexts(self) -> tuple[str, ...]:
        """The encoder contexts to evaluate; without the encoder they are all the same, so one."""
        return self.settings.encoder_context if self.model.encoder is not None else ("file_order",)

    @property
    def descriptor_dim(self) -> int:
        """Dimension of the descriptors that are searched."""
        return self.settings.pca_dim or self.model.descriptor_dim

    def depth(self, task: Task) -> int:
        """Number of database images to find for each query."""
        k = max(self.settings.recall_values)
        if task.test_method != "maj_voting":  # there, the depth decides how many crops can agree
            k = max(k, self.settings.depth_wanted)
        return min(k, len(task.dataset.database_paths))

    def foresee(self, group: Sequence[Task], on_val: Task | None, wanted: Wanted) -> None:
        """Checks before the extraction what can be checked then: outputs, contexts and an index that are impossible,
        queries that cannot be found, and batches that give the answer away.

        Args:
            group: the tasks of a dataset.
            on_val: its val split, if the accepted distance is found there.
            wanted: the outputs to write.

        Raises:
            ValueError: an option asks for something impossible.
        """
        if not distributed.is_main():
            return
        encoder = self.model.encoder is not None
        foresee_recalls(group, self.contexts if encoder else (), self.settings.shift)
        if wanted.save_map is not None:
            require_place_for(wanted.save_map, self.contexts[0] if encoder else None)
            self._foresee_accepting(group[0])
        flag = "--save_pairs" if wanted.save_pairs else "--save_h5" if wanted.save_h5 else None
        for task in group:
            dataset = task.dataset
            if flag is not None:
                there = not isinstance(dataset, MapQueries) or dataset.photos_there
                pairs.require_names(dataset.queries_paths, dataset.database_paths, flag=flag, there=there)
            if wanted.save_h5:
                pairs.require_one_each(task.test_method, self.settings.pca_dim)
        for task in (group[0], *([on_val] if on_val is not None else [])):
            self._require_index(task)

    def _foresee_accepting(self, task: Task) -> None:
        """Warns if queries of the map will be searched differently from those that gave the accepted distance."""
        settings = self.settings
        approximate = settings.index not in (None, "binary")
        if settings.accept_precision is not None and (approximate or task.test_method != "hard_resize"):
            logger.warning(
                "--save_map keeps the distance of --accept %s, found by %s; a map is searched exactly, by hard_resize",
                settings.accept,
                f"--index {settings.index}" if approximate else f"--test_method {task.test_method}",
            )

    def _require_index(self, task: Task) -> None:
        """Tries the index, as far as possible before the extraction.

        Raises:
            ValueError: FAISS refuses it.
        """
        settings = self.settings
        if settings.index is None or settings.index == "binary":
            return
        count = len(task.dataset.database_paths)
        _, in_chunk = images_at_a_time((count, 1, *self.model.vectors_shape), settings.infer_batch_size)
        require_index(
            settings.index,
            settings.index_parameters,
            dim=self.descriptor_dim,
            count=count,
            chunks=-(-count // in_chunk),
            k=self.depth(task),
        )

    def _images_of(self, group: Sequence[Task]) -> dict[str, tuple[list[str], str]]:
        """The images to extract for the tasks of a dataset: paths and test method by name."""
        images = {}
        if not isinstance(group[0].dataset, MapQueries):  # its database is in the map
            images["database"] = (group[0].dataset.database_paths, "hard_resize")
        images |= {task.store: (task.dataset.queries_paths, task.test_method) for task in group}
        if self.pca_paths:
            images["pca"] = (self.pca_paths, "hard_resize")
        return images

    @cached_property
    def _weights(self) -> str:
        """Digest of the weights that the extraction depends on."""
        return digest({**self.model.backbone.state_dict(), **self.model.aggregation.state_dict()})

    def _fingerprint(self, weights: str, test_method: str) -> dict[str, Any]:
        """Everything that extracted descriptors depend on, besides the photos."""
        return {
            "weights": weights,
            "test_method": test_method,
            "resize": list(self.settings.resize),
            "antialias": self.settings.antialias,
            "upright": self.settings.upright,
            "precision": self.settings.precision,
        }

    def extract(self, group: Sequence[Task], held: ExitStack) -> Stores:
        """Runs the backbone on database, queries and any images for a PCA, except on those extracted before.

        When `held` ends, descriptors that are not kept are removed, and the folder of kept ones is unlocked.
        """
        settings = self.settings
        batch_size = settings.extraction_batch_size or extraction_batch_size(self.device)
        folder, fingerprint = group[0].folder / "extracted", None
        if settings.descriptors_folder is not None:
            folder = kept_in(settings.descriptors_folder, group[0].of)
            if distributed.is_main():
                held.enter_context(FolderLock(folder, "--descriptors_folder", "keep descriptors"))
            weights = self._weights
        stores: Stores = {}
        for name, (paths, test_method) in self._images_of(group).items():
            if settings.descriptors_folder is not None:  # others are not reused
                fingerprint = self._fingerprint(weights, test_method)
            store = DescriptorStore(
                folder,
                name,
                (len(paths), CROPS[test_method], *self.model.vectors_shape),
                dtype=settings.descriptor_dtype,
                fingerprint=fingerprint,
                photos=paths if fingerprint is not None else (),
            )
            stores[name] = store
            if fingerprint is None and distributed.is_main():
                held.callback(store.remove)
            read_images = partial(
                image_batches,
                transform=evaluation_transform(
                    settings.resize,
                    settings.antialias,
                    test_method,
                    patch_size=self.model.backbone.size.patch_size,
                ),
                # single_query keeps each photo's shape; each crop counts as an image.
                batch_size=1 if test_method == "single_query" else max(1, batch_size // CROPS[test_method]),
                num_workers=reading_workers(self.device, settings.num_workers),
                device=self.device,
                progress=f"{group[0].of} {name}",
                upright=settings.upright,
                stop=self.stop,
            )
            extract(self.model, paths, store, read_images, settings.precision)
        if self.place_map is not None:
            stores["database"] = self.place_map
        return stores

    @contextmanager
    def kept_if_it_fails(
        self, groups: Sequence[Sequence[Task]], stores: Sequence[Stores], folder: Path
    ) -> Iterator[None]:
        """Keeps the descriptors in `folder`, as `--descriptors_folder` does, if the search in the block fails."""
        try:
            yield
        except search.UselessDescriptors:
            raise
        except Exception:
            advice = "the same command"
            if self.settings.descriptors_folder is None:
                advice += f" with --descriptors_folder={shlex.quote(str(folder.absolute()))}"
                weights = self._weights
                for group, of_group in zip(groups, stores, strict=True):
                    for name, (paths, test_method) in self._images_of(group).items():
                        store = of_group[name]
                        assert isinstance(store, DescriptorStore)
                        try:
                            store.keep(kept_in(folder, group[0].of), self._fingerprint(weights, test_method), paths)
                        except (OSError, ValueError) as problem:
                            logger.warning("%s of %s could not be kept: %s", name, group[0].of, problem)
            logger.warning("the descriptors are kept: %s resumes with the search", advice)
            raise

    def searches(self, group: Sequence[Task], stores: Stores, context: str) -> Iterator[Search]:
        """The searches in one encoder context: one per order if it is random and recalls are averaged."""
        dataset, settings = group[0].dataset, self.settings
        for order in range(settings.context_seeds if context in DRAWN_CONTEXTS and dataset.labelled else 1):
            yield Search(
                self.model,
                stores,
                test_method=group[0].test_method,
                context=context,
                infer_batch_size=settings.infer_batch_size,
                shift=settings.shift,
                seed=(settings.seed, order),
                pca_dim=settings.pca_dim,
                pca_whiten=settings.pca_whiten,
                device=self.device,
                by_all=searched_by_all(len(dataset.database_paths), settings.index),
            )

    def _matches(self, searched: Search, group: Sequence[Task], context: str) -> list[Matches]:
        """What a search finds for each query set, judged."""
        settings = self.settings
        found = searched.run(
            self.depth(group[0]),
            index=settings.index,
            index_parameters=settings.index_parameters,
            rerank=settings.rerank,
            majority_weight=settings.majority_weight,
        )
        return [
            Matches(
                search=searched,
                context=context,
                distances=distances,
                predictions=predictions,
                correct=None if task.positives is None else search.correct_among(predictions, task.positives),
            )
            for task, (distances, predictions) in zip(group, found, strict=True)
        ]

    def help_search(self, group: Sequence[Task], stores: Stores, contexts: Sequence[str]) -> None:
        """Searches this process's share of the database, in the order in which the main process searches."""
        if searched_by_all(len(group[0].dataset.database_paths), self.settings.index):
            for context in contexts:
                for searched in self.searches(group, stores, context):
                    searched.run(self.depth(group[0]))

    def evaluate(
        self, groups: Sequence[Sequence[Task]], stores: Sequence[Stores], folder: Path, outputs: Outputs
    ) -> list[Evaluation]:
        """Searches the query sets of each dataset in every encoder context.

        Each set is logged, and its `results.json` written, before the next context is searched.

        Args:
            groups: the tasks of each dataset.
            stores: what was extracted for them.
            folder: the run's folder, where the descriptors are kept if a search fails.
            outputs: collects what cannot be written.

        Returns:
            An evaluation for each task; none in processes other than the main one, which help with the search.
        """
        if not distributed.is_main():
            for group, of_group in zip(groups, stores, strict=True):
                self.help_search(group, of_group, self.contexts)
            return []  # the others do not wait for a search that the main process does alone
        with self.kept_if_it_fails(groups, stores, folder / "kept"):
            found = [self._evaluate(group, of_group, outputs) for group, of_group in zip(groups, stores, strict=True)]
        return [evaluation for of_group in found for evaluation in of_group]

    def _evaluate(self, group: Sequence[Task], stores: Stores, outputs: Outputs) -> list[Evaluation]:
        settings = self.settings
        evaluations = [
            Evaluation(
                task=task,
                recall_values=settings.recall_values,
                accept=settings.accept,
                results=self._facts(task),
            )
            for task in group
        ]
        for context in self.contexts:
            orders: list[list[Matches]] = []
            agreements: list[list[dict[str, float]]] = []  # by order and set
            for searched in self.searches(group, stores, context):
                orders.append(self._matches(searched, group, context))
                agreements.append(searched.agreements)
            for number, evaluation in enumerate(evaluations):
                lines = evaluation.note(context, [of_sets[number] for of_sets in orders])
                if settings.index is not None:
                    of_orders = [of_sets[number] for of_sets in agreements]
                    evaluation.results.setdefault("index_agreement", of_orders[0])
                    if context in evaluation.curves:
                        evaluation.results["contexts"][context]["index_agreements"] = of_orders
                folder = evaluation.task.folder
                if context == self.contexts[0]:
                    logger.info("log and results.json in %s", folder)
                for line in lines:
                    logger.info("%s", line)
                with outputs.writing(str(folder / "results.json")):
                    folder.mkdir(parents=True, exist_ok=True)
                    self.record(folder, evaluation.results)
        return evaluations

    def _facts(self, task: Task) -> dict[str, Any]:
        """What `results.json` says about a task besides what was found."""
        results: dict[str, Any] = {}
        if task.findable is not None:
            results = {"recalls": {}, "positive_distance": task.positive_distance}
            results |= {"queries_without_positives": int((~task.findable).sum())}
            if self.model.encoder is not None:
                results["alignment"] = task.alignment
        results |= {"dataset": task.dataset.sizes, "descriptor_dim": self.descriptor_dim}
        return results | {"test_method": task.test_method}

    def settle_acceptance(self, group: Sequence[Task], on_val: Task | None, folder: Path) -> None:
        """Sets the accepted distance of a dataset's tasks: as given, from the map, or found on the val split.

        Args:
            group: the tasks.
            on_val: the val split, if the distance is found there.
            folder: the run's folder.

        Raises:
            ValueError: see `_found_on_val`.
        """
        found = None if on_val is None else self._found_on_val(on_val, folder)
        distance = self.settings.accept_distance if found is None else found["threshold"]
        if self.settings.accept is None and self.place_map is not None:
            distance = self.place_map.accept
        for task in group:
            task.accepted_distance, task.found_on_val = distance, found

    def _found_on_val(self, on_val: Task, folder: Path) -> dict[str, Any]:
        """What `--accept auto@P` finds on the val split: the largest distance with that precision, as `threshold`.

        The split is extracted and searched as the test split will be, in the first encoder context. All processes call
        this at the same point.

        Args:
            on_val: the val split.
            folder: the run's folder.

        Raises:
            ValueError: no distance has that precision; the descriptors are kept.
        """
        on_val.folder = folder / on_val.subfolder / "val"
        context = self.contexts[0]

        def found() -> dict[str, Any]:
            orders = []
            for searched in self.searches([on_val], stores, context):
                (of_order,) = self._matches(searched, [on_val], context)
                orders.append(first_matches(on_val, of_order))
            return distance_on_val(
                acceptance.pooled(orders),
                on_val.dataset,
                context,
                accept=self.settings.accept,
                precision=self.settings.accept_precision,
                query_keys=self.settings.query_keys,
            )

        with ExitStack() as held:
            if distributed.is_main():
                held.callback(_remove_if_empty, on_val.folder.parent)
                held.callback(_remove_if_empty, on_val.folder)
            stores = self.extract([on_val], held)
            if not distributed.is_main():
                self.help_search([on_val], stores, [context])
                return distributed.on_main(dict)
            with self.kept_if_it_fails([[on_val]], [stores], folder / "kept"):
                return distributed.on_main(found)

    def found(self, evaluation: Evaluation, outputs: Outputs, *, weights: str, pca_images: str) -> Found:
        """Collects what `results.write` needs.

        Args:
            evaluation: the evaluation of a query set.
            outputs: notes if positions cannot be read.
            weights: digest of the model's weights, to store with a PCA.
            pca_images: folder of the PCA's images.
        """
        assert evaluation.first is not None
        task, matches, settings = evaluation.task, evaluation.first, self.settings
        dataset = located = task.dataset
        with outputs.writing(f"positions in {task.folder / 'predictions.csv'}"):
            located = dataset.located(exif=settings.plain_folders)
        title = str(dataset)
        if curve := evaluation.curves.get(matches.context):
            shown = {n: curve[min(n, len(curve)) - 1] for n in settings.recall_values}
            title += f", {matches.context}" * (self.model.encoder is not None) + f", {format_recalls(shown)}"
        facts = None
        if settings.pca_dim and self.place_map is None:
            facts = {"dim": settings.pca_dim, "whiten": settings.pca_whiten, "context": matches.context}
            facts |= {"images": pca_images, "weights": weights, "resize": list(settings.resize)}
        plain_pca = settings.pca_dim and not settings.pca_whiten
        mean = task.test_method == "five_crops" and not settings.pca_dim
        return Found(
            folder=task.folder,
            dataset=dataset.name,
            title=title,
            store=task.store,
            search=matches.search,
            queries=dataset.queries_paths,
            database=dataset.database_paths,
            predictions=matches.predictions,
            distances=matches.distances,
            # A PCA, an index and a mean over crops change the norm or the distances.
            unit=not (plain_pca or mean or task.test_method == "maj_voting") and settings.index is None,
            correct=matches.correct,
            judged=None if matches.correct is None else dataset.judged(matches.predictions),
            metres=located.metres(matches.predictions),
            positions=located.database_positions,
            geographic=located.geographic,
            findable=task.findable,
            rule=task.rule,
            curves=evaluation.curves,
            first_matches=evaluation.first_matches,
            accepted_distance=task.accepted_distance,
            pca=facts,
            key=image_key,
            read=self._shown_photo,
            assigned=self._assigned,
        )

    def _shown_photo(self, path: str) -> Image.Image | None:
        """A photo for the page of matches; None if a map's photo is missing."""
        if self.place_map is not None and not os.path.exists(path):
            return None
        return read_reduced(path, match_page.THUMBNAIL_SIDE, upright=self.settings.upright)

    @torch.inference_mode()
    def _assigned(self, path: str) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
        """A photo, H x W x 3, and the soft assignment of its patches, (K+G) x h x w."""
        pixels = read_pixels(path, upright=self.settings.upright)
        transform = evaluation_transform(self.settings.resize, self.settings.antialias)
        with autocast(self.device, self.settings.precision):
            assignment = self.model.assignments(transform(pixels[None]).to(self.device))[0]
        return pixels.permute(1, 2, 0).numpy(), assignment.float().cpu().numpy()

    def save_map(
        self, path: Path, evaluation: Evaluation, model: dict[str, Any], checkpoint: str, weights: str
    ) -> None:
        """Writes the map of a database: its descriptors as they were searched, and the known positions.

        Args:
            path: file to write.
            evaluation: the evaluation of one of the database's query sets.
            model: arguments of `build_model`.
            checkpoint: file name of the checkpoint.
            weights: digest of the model's weights.
        """
        assert evaluation.first is not None
        searched, settings = evaluation.first.search, self.settings
        located = evaluation.task.dataset.located(exif=settings.plain_folders)
        write_map(
            path,
            searched.chunks("database"),
            paths=located.database_paths,
            positions=located.database_positions,
            geographic=located.geographic,
            dtype=settings.descriptor_dtype,
            pca=searched.pca,
            model=model,
            checkpoint=checkpoint,
            weights=weights,
            resize=settings.resize,
            antialias=settings.antialias,
            upright=settings.upright,
            precision=settings.precision,
            accept=evaluation.task.accepted_distance,
        )


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()
