"""Evaluates a checkpoint: recall@N on database/queries datasets, in every encoder context chosen."""

from parser import SUBMITTED, EvalOptions, parse
from utils.system.signals import quiet_ctrl_c

if __name__ == "__main__":
    OPTIONS = parse(EvalOptions)  # before the slow imports, so that an error is reported at once
    quiet_ctrl_c()

import logging
import os
import shlex
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from datasets.evaluation.query_sets import QuerySet, only_set, pca_images, select, warn_before_extraction
from datasets.evaluation.tree import map_queries
from datasets.photos.corruptions import corrupt
from datasets.photos.positions import image_key
from datasets.photos.transforms import evaluation_transform, read_pixels, read_reduced
from model import SuperVLADNet, build_model
from model import weights as weight_files
from model.sizes import BACKBONES, MODEL_OPTIONS, fitted
from test import Evaluation, evaluate, extract_images
from utils.outputs import match_page, pairs
from utils.outputs.results import draw_corruptions, mean_over_corruptions, write_outputs
from utils.outputs.tables import recall_table
from utils.retrieval.descriptor_store import EXTRACTED, DescriptorStore, kept_in, warn_of_leftovers
from utils.retrieval.indices import require_index
from utils.retrieval.place_map import PlaceMap, require_place_for, write_map
from utils.run import log as run_log
from utils.run.preemption import Preemption
from utils.system import distributed
from utils.system.device import allow_tf32, autocast, cast_weights, pick_device
from utils.system.files import Outputs
from utils.system.lock import FolderLock
from utils.system.seed import seed_everything

logger = logging.getLogger(__name__)

PREPARATION = ("resize", "antialias", "upright")  # the facts on how photos become the model's input


def run(options: EvalOptions) -> dict[str, dict[str, dict[int, float]]]:
    """Runs the evaluation that the options describe.

    Returns:
        Recall@N, `{dataset: {context: {N: percent}}}`; empty in all but the main process, and without labels.

    Raises:
        SystemExit: bad input (status 2), or an output other than the results could not be written (1).
    """
    data, outputs, machine = options.data, options.outputs, options.machine
    with (
        distributed.processes(),
        run_log.RunLog(options.flat) as log,
        Preemption(at_once=True) as preemption,
        ExitStack() as held,
    ):
        device = pick_device(machine.device)
        run_log.log_header(options, device)
        seed_everything(machine.seed)
        allow_tf32(machine.precision == "tf32")

        # Select: the query sets of each dataset.
        place_map = None if data.map is None else PlaceMap(data.map)
        groups = {group[0].dataset_name: group for group in select_sets(options, place_map)}
        run_log.require_outside(
            data.photo_folders, save_dir=Path("logs") / outputs.save_dir, descriptors_folder=outputs.descriptors_folder
        )

        # Load the model, and check all that needs no descriptors.
        model, options, facts = load(options, place_map)
        protocol, search = options.protocol, options.search
        assert protocol.encoder_context is not None
        contexts = protocol.encoder_context if model.encoder is not None else ("file_order",)
        pca_paths = []
        if protocol.pca_dataset_folder is not None and place_map is None:
            pca_paths = pca_images(
                data.eval_datasets_folder / protocol.pca_dataset_folder,
                dim=protocol.pca_dim,
                whiten=protocol.pca_whiten,
                descriptor_dim=model.descriptor_dim,
                seed=machine.seed,
                skip_unreadable=data.skip_unreadable,
            )
        for name, group in groups.items():
            check_before_extraction(group, options, model, contexts, place_map)
            groups[name] = [each for clean in group for each in clean.with_corruptions(data.query_corruptions)]
        model.to(device).eval()
        cast_weights(model.backbone, machine.precision)
        if machine.compile:
            model.backbone.compile_blocks()
        folder = log.open(outputs.save_dir)
        run_log.write_options(folder, options)
        temporary = outputs.descriptors_folder is None
        if temporary and distributed.is_main():  # with the option, this run may go on from another's
            with suppress(OSError):  # folders that vanish meanwhile, or belong to another user
                warn_of_leftovers(run_log.runs_of(outputs.save_dir))
        kept = outputs.descriptors_folder or folder / EXTRACTED
        go_on = f" with --descriptors_folder={shlex.quote(str(kept.absolute()))}" if temporary else ""
        preemption.advice = f"the same command{go_on} resumes from the descriptors computed so far"

        # Extract, search, judge, record; all results come before the first output that can fail.
        weights = weight_files.state_digest({**model.backbone.state_dict(), **model.aggregation.state_dict()})
        failures = Outputs()

        def record(folder: Path, results: dict[str, Any]) -> None:
            with failures.writing(str(folder / "results.json")):
                folder.mkdir(parents=True, exist_ok=True)
                run_log.write_results(folder, results, options, device)

        stores: dict[str, dict[str, DescriptorStore]] = {name: {} for name in groups}
        evaluations: list[Evaluation] = []
        for name in groups if distributed.is_main() and not temporary else ():
            held.enter_context(FolderLock(kept_in(kept, name), "--descriptors_folder"))
        try:
            for name, group in groups.items():
                images = {"database": (group[0].dataset.database_paths, "hard_resize", "")} if place_map is None else {}
                for each in group:
                    images[each.store] = (each.dataset.queries_paths, each.test_method, each.corruption)
                if pca_paths:
                    images["pca"] = (pca_paths, "hard_resize", "")
                extract_images(
                    model,
                    images,
                    stores[name],
                    kept_in(kept, name),
                    preparation={fact: facts[fact] for fact in PREPARATION},
                    machine=machine,
                    device=device,
                    stop=preemption.stop,
                    dtype=outputs.descriptor_dtype,
                    weights=weights,
                    kept=not temporary,
                    title=name,
                )
            for name, group in groups.items() if distributed.is_main() else ():
                evaluations += evaluate(
                    model,
                    group,
                    stores[name] if place_map is None else {"database": place_map, **stores[name]},
                    contexts=contexts,
                    protocol=protocol,
                    search=search,
                    depth=depth_of(group[0], options),
                    seed=machine.seed,
                    device=device,
                    folder=folder,
                    facts=facts,
                    record=record,
                )
        except Exception:
            logger.warning("what was extracted is kept: %s", preemption.advice)
            raise
        table = {each.query_set.dataset.name: each.recalls for each in evaluations}
        if len(evaluations) > 1 or len(contexts) > 1:
            logger.info("%s", recall_table(table))
        if len(evaluations) > 1:
            means = {"mean_over_corruptions": mean_over_corruptions(evaluations)} if data.query_corruptions else {}
            record(folder, {"recalls": table, **means})

        # Outputs to look at, and for other programs.
        if data.query_corruptions:
            draw_corruptions(evaluations, failures)
        for evaluation in evaluations:
            write(evaluation, options, model, failures, device)
        if outputs.save_map is not None and evaluations:
            with failures.writing(str(outputs.save_map)):
                save_map(outputs.save_map, evaluations[0], options)
        if failures.missing:
            logger.warning("what was extracted is kept: %s", preemption.advice)
            raise SystemExit(1)
        if temporary and distributed.is_main():
            for store in (store for by_name in stores.values() for store in by_name.values()):
                store.remove()
    return table


def select_sets(options: EvalOptions, place_map: PlaceMap | None) -> list[list[QuerySet]]:
    """The query sets of each dataset, or the one of a map."""
    data, protocol = options.data, options.protocol
    settings: dict[str, Any] = {"test_method": protocol.test_method, "infer_batch_size": protocol.infer_batch_size}
    if place_map is None:
        return select(data, **settings)
    assert data.queries_folder is not None
    queries = map_queries(
        data.queries_folder,
        name=f"{data.queries_folder.resolve().name} in {place_map.path.stem}",
        paths=place_map.paths,
        positions=place_map.positions,
        geographic=place_map.geographic,
        upright=place_map.upright,
        labelled=not data.no_labels,
        skip_unreadable=data.skip_unreadable,
    )
    logger.info("%s", place_map)
    return [[only_set(queries, distance=data.val_positive_dist_threshold, **settings)]]


def load(options: EvalOptions, place_map: PlaceMap | None) -> tuple[SuperVLADNet, EvalOptions, dict[str, Any]]:
    """Loads the model of a checkpoint, on the CPU; the command line decides first, then the checkpoint or the map.

    Returns:
        The model; the options with what they left open; facts for `results.json`, how photos are prepared among them.

    Raises:
        ValueError: checkpoint, map and options do not fit each other.
    """
    resume, protocol, search = options.model.resume, options.protocol, options.search
    plain = options.data.plain_folders
    path = distributed.on_main(lambda: weight_files.find_checkpoint(resume))
    content = weight_files.read_file(path)
    written = weight_files.model_of(resume, content)
    if place_map is None:
        arguments = model_arguments(options, written)
        size = BACKBONES[arguments["backbone"]]
        own_size = weight_files.size_of(content, arguments["backbone"])
        resize = fitted(protocol.resize or own_size, size)
        validated_at = weight_files.validated_size_of(content, arguments["backbone"])
        if validated_at not in (None, resize):
            logger.warning("the model was validated at %d %d, but --resize is %d %d", *validated_at, *resize)
        preparation: dict[str, Any] = {"resize": resize, "antialias": plain, "upright": plain}
        if plain:
            preparation |= weight_files.preparation_of(content)
        if protocol.antialias is not None:
            preparation["antialias"] = protocol.antialias
    else:
        place_map.require(written, str(resume))
        settings = {"backbone_blocks": None, **options.model.arguments}  # None is all of them
        settings |= {"resize": protocol.resize, "antialias": protocol.antialias}
        given = given_arguments(options)
        place_map.require({name: value for name, value in settings.items() if name in given}, "the command line")
        if options.machine.precision != place_map.precision:
            logger.warning("the map was made in precision %s, not %s", place_map.precision, options.machine.precision)
        arguments, preparation = place_map.model, {name: getattr(place_map, name) for name in PREPARATION}
        if search.accept is None:
            search = replace(search, accept=place_map.accept)
        if place_map.pca is not None:
            protocol = replace(protocol, pca_dim=place_map.descriptor_dim, pca_whiten=place_map.pca.whiten)
    model = build_model(**arguments)
    with nullcontext() if place_map is None else place_map.fitting(str(resume)):
        weight_files.load_checkpoint(model, path, content)
    if model.projection is not None:
        if protocol.pca_dim and place_map is None:
            problem = f"pca_dim {protocol.pca_dim}: {path} already ends with a PCA to {model.descriptor_dim} dimensions"
            raise ValueError(f"{problem}; leave the option out, or evaluate the checkpoint without its PCA")
        logger.info("from the checkpoint: a PCA to %d dimensions, normalised again", model.descriptor_dim)
    weights = weight_files.state_digest(model.state_dict())
    if place_map is not None:
        place_map.require_weights(weights, str(resume))
    alone = plain or place_map is not None
    context = protocol.encoder_context or ("independent" if alone else "file_order",)
    prepared = {name: preparation[name] for name in ("resize", "antialias")}
    protocol = replace(protocol, encoder_context=context, **prepared)
    options = replace(options, protocol=protocol, search=search)
    facts = {
        "descriptor_dim": protocol.pca_dim or model.descriptor_dim,
        **preparation,
        "split": None if alone else options.data.eval_split,
        "model": arguments,
        "weights": weights,
        "checkpoint": {name: content[name] for name in ("encoder_training", "training") if name in content},
    }
    log_model(model, options, facts)
    return model, options, facts


def given_arguments(options: EvalOptions) -> set[str]:
    """The options that were given, those of the model as the arguments of `build_model`."""
    arguments = {option: name for name, option in MODEL_OPTIONS.items()}
    return {arguments.get(name, name) for name in options.given}


def model_arguments(options: EvalOptions, written: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `build_model`: from the command line, else from the checkpoint, else the defaults.

    Of layer and encoder, the command line says all or nothing. `written` is what the checkpoint says.
    """
    given = given_arguments(options)
    head = MODEL_OPTIONS.keys() - {"backbone", "backbone_blocks"}
    given |= head if given & head else set()
    taken = {name: value for name, value in written.items() if name not in given}
    if taken:
        logger.info("from the checkpoint: %s", ", ".join(f"{name} {value}" for name, value in taken.items()))
    return {**options.model.arguments, **taken}


def log_model(model: SuperVLADNet, options: EvalOptions, facts: Mapping[str, Any]) -> None:
    """Logs what the model is, which options it leaves without effect, and how plain folders depart from benchmarks."""
    contexts = options.protocol.encoder_context or ()
    logger.info("parameters: %d", sum(parameter.numel() for parameter in model.parameters()))
    idle = [f"--{name}" for name in ("infer_batch_size", "encoder_context") if name in options.given]
    if idle and model.encoder is None:
        logger.warning("%s: no effect without the cross-image encoder", ", ".join(idle))
    if "encoder_training" in facts["checkpoint"]:
        logger.info("the checkpoint's encoder_training: %s", facts["checkpoint"]["encoder_training"])
    elif model.encoder is not None:
        logger.info(
            "largest difference between the two encoder layers: %.1e (at the published learning rates, 3e-4 or less "
            "means one training step)",
            model.encoder.layer_difference(),
        )
    if options.data.plain_folders:
        changes = ["photos are turned as EXIF says" if facts["upright"] else "photos are not turned as EXIF says"]
        changes += ["the resize is antialiased (--no-antialias turns this off)"] * facts["antialias"]
        if model.encoder is not None and contexts[0] == "independent":
            changes.append("the encoder sees each photo by itself (--encoder_context file_order: neighbours by name)")
        logger.info("plain folders, unlike published benchmarks: %s", "; ".join(changes))


def depth_of(query_set: QuerySet, options: EvalOptions) -> int:
    """Number of database images to find for each query."""
    outputs, k = options.outputs, max(options.protocol.recall_values)
    if query_set.test_method != "maj_voting":  # there, the depth decides how many crops can agree
        k = max(k, outputs.save_predictions, outputs.save_pairs, SUBMITTED * outputs.save_submission)
    return min(k, len(query_set.dataset.database_paths))


def check_before_extraction(
    group: Sequence[QuerySet],
    options: EvalOptions,
    model: SuperVLADNet,
    contexts: Sequence[str],
    place_map: PlaceMap | None,
) -> None:
    """Warns of what makes results of a dataset differ from expectation; ValueError for what cannot be done later."""
    if not distributed.is_main():
        return
    outputs, search = options.outputs, options.search
    database = group[0].dataset.database_paths
    warn_before_extraction(group, contexts if model.encoder is not None else ())
    if outputs.save_map is not None:
        require_place_for(outputs.save_map, contexts[0] if model.encoder is not None else None)
    for query_set in group:
        queries = query_set.dataset.queries_paths
        scored = (*queries, *database) if outputs.save_submission else ()
        if keyless := [path for path in scored if len(image_key(path).split()) != 1]:
            remedy = "use a dataset with names like @east@north@zone@letter@lat@lon@key@..."
            raise ValueError(f"save_submission: {keyless[0]} has no image key without spaces; {remedy}")
        if outputs.save_pairs or outputs.save_h5:
            there = place_map is None or place_map.photos_there
            flag = "--save_pairs" if outputs.save_pairs else "--save_h5"
            pairs.require_names(queries, database, flag=flag, there=there)
        if outputs.save_h5:
            pairs.require_one_each(query_set.test_method, options.protocol.pca_dim)
    if search.index not in (None, "binary"):
        dim = options.protocol.pca_dim or model.descriptor_dim
        require_index(search.index, search.index_parameters, dim=dim, count=len(database))


def write(
    evaluation: Evaluation, options: EvalOptions, model: SuperVLADNet, failures: Outputs, device: torch.device
) -> None:
    """Writes the outputs of a query set."""
    resize, antialias, upright = (evaluation.results[name] for name in PREPARATION)
    query_set = evaluation.query_set

    def read(path: str) -> Image.Image | None:
        if options.data.map is not None and not (os.path.isabs(path) and os.path.exists(path)):
            return None
        return read_reduced(path, match_page.THUMBNAIL_SIDE, upright=upright)

    @torch.inference_mode()
    def assigned(path: str) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
        pixels = read_pixels(path, upright=upright)
        if query_set.corruption and path in query_set.dataset.queries_paths:
            pixels = corrupt(pixels, path, corruption=query_set.corruption, seed=options.machine.seed)
        transform = evaluation_transform(resize, antialias)
        with autocast(device, options.machine.precision):
            assignment = model.assignments(transform(pixels[None]).to(device))[0]
        return pixels.permute(1, 2, 0).numpy(), assignment.float().cpu().numpy()

    write_outputs(
        evaluation,
        options.outputs,
        failures,
        protocol=options.protocol,
        search=options.search,
        exif=options.data.plain_folders,
        image_key=image_key,
        read=read,
        assigned=assigned,
    )


def save_map(path: Path, evaluation: Evaluation, options: EvalOptions) -> None:
    """Writes the map of a database, which all its query sets share."""
    located = evaluation.query_set.dataset.located(exif=options.data.plain_folders)
    facts = {name: evaluation.results[name] for name in (*PREPARATION, "model", "weights")}
    write_map(
        path,
        evaluation.search.chunks("database"),
        paths=located.database_paths,
        positions=located.database_positions,
        geographic=located.geographic,
        dtype=options.outputs.descriptor_dtype,
        pca=evaluation.search.pca,
        checkpoint=options.model.resume.name,
        precision=options.machine.precision,
        accept=options.search.accept,
        **facts,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line; an exit status other than 0 is raised as SystemExit."""
    run(parse(EvalOptions, argv))
    return 0


if __name__ == "__main__":
    run(OPTIONS)
