"""Evaluates a checkpoint: recall@N on database/queries datasets, in every encoder context chosen."""

from parser import EvalOptions, parse
from utils.system.signals import quiet_ctrl_c

if __name__ == "__main__":
    OPTIONS = parse(EvalOptions)  # before the slow imports, so that an error is reported at once
    quiet_ctrl_c()

import logging
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import torch

from datasets.evaluation import tasks
from model import SuperVLADNet, build_model
from model import weights as weight_files
from test import Evaluator, Settings
from utils.outputs import report, results
from utils.retrieval.place_map import PlaceMap
from utils.run import log as run_log
from utils.run.preemption import Preemption
from utils.system import distributed
from utils.system.device import allow_tf32, cast_products, pick_device
from utils.system.files import Outputs
from utils.system.seed import seed_everything

logger = logging.getLogger(__name__)


def run(options: EvalOptions) -> dict[str, dict[str, dict[int, float]]]:
    """Runs the evaluation that the options describe.

    Returns:
        Recall@N in percent by dataset and encoder context, `{dataset: {context: {N: percent}}}`; empty in all but the
        main process, and for datasets without labels.

    Raises:
        SystemExit: bad input (status 2), or an output other than the results could not be written (1); the message is
            in the log and on the terminal.
    """
    with distributed.processes(), run_log.RunLog() as log, Preemption(at_once=True) as preemption, ExitStack() as held:
        device = pick_device(options.device)
        run_log.log_header(asdict(options), device, given=options.given)
        seed_everything(options.seed)
        allow_tf32(options.precision == "tf32")
        save_dir = Path("logs") / options.save_dir
        run_log.require_outside(options.photo_folders, save_dir=save_dir, descriptors_folder=options.descriptors_folder)

        # Data: the query sets of each dataset, and its val split if the accepted distance is found there.
        place_map = None if options.map is None else PlaceMap(options.map)
        selection = options.part(tasks.Selection)
        groups = tasks.select(selection, place_map)
        val_splits = [tasks.val_task(selection, group) for group in groups]
        all_tasks = [task for group in groups for task in group]
        tasks.require_folders_of_their_own(all_tasks)

        # Model, and every check and warning that needs no descriptors.
        model, options, weights, pca_paths = load(options, place_map)
        run_log.compare_with_record(asdict(options), device)
        evaluator = Evaluator(
            model,
            options.part(Settings),
            device=device,
            place_map=place_map,
            pca_paths=pca_paths,
            record=lambda folder, found: run_log.write_results(folder, found, asdict(options), device),
            stop=preemption.stop,
        )
        wanted = options.part(results.Wanted)
        for group, on_val in zip(groups, val_splits, strict=True):
            database = group[0].dataset
            options.warn_of_depth(len(database.database_paths), group[0].of, labelled=database.labelled)
            evaluator.foresee(group, on_val, wanted)
        prepare(model, options, device)

        folder = log.open(options.save_dir)
        preemption.advice = (
            "--descriptors_folder would have kept the descriptors computed so far"
            if options.descriptors_folder is None
            else "the same command resumes from what is in --descriptors_folder"
        )
        for task in all_tasks:
            task.folder = folder / task.subfolder

        # Accepted distance, descriptors, search; all results come before the first output that can fail.
        for group, on_val in zip(groups, val_splits, strict=True):
            evaluator.settle_acceptance(group, on_val, folder)
        stores = [evaluator.extract(group, held) for group in groups]
        outputs = Outputs()
        evaluations = evaluator.evaluate(groups, stores, folder, outputs)
        table = {evaluation.task.dataset.name: evaluation.recalls for evaluation in evaluations}
        if len(evaluations) > 1:
            logger.info("%s", report.recall_table(table))
            with outputs.writing(str(folder / "results.json")):
                evaluator.record(folder, {"recalls": table})

        # Outputs to look at, and for other programs.
        for evaluation in evaluations:
            found = evaluator.found(evaluation, outputs, weights=weights, pca_images=str(options.pca_dataset_folder))
            results.write(found, wanted, outputs)
        if options.save_map is not None and evaluations:
            with outputs.writing(str(options.save_map)):
                evaluator.save_map(options.save_map, evaluations[0], options.model, options.resume.name, weights)
        if outputs.missing:
            raise SystemExit(1)
    return table


def load(options: EvalOptions, place_map: PlaceMap | None) -> tuple[SuperVLADNet, EvalOptions, str, list[str]]:
    """Loads the model of a checkpoint, on the CPU.

    Returns:
        The model; the options, completed by the checkpoint or the map; a digest of the weights if a map or a PCA
        stores it, else ""; the images to fit a PCA on.

    Raises:
        ValueError: checkpoint, map and options do not fit each other.
    """
    path = distributed.on_main(lambda: weight_files.find_checkpoint(options.resume))
    content = weight_files.read_file(path)
    written = weight_files.model_of(options.resume, content)
    if place_map is None:
        backbone = options.backbone if "backbone" in options.given else written.get("backbone", options.backbone)
        options = options.completed(
            written,
            size=weight_files.size_of(content, backbone),
            validated_at=weight_files.validated_size_of(content, backbone),
            prepared=weight_files.preparation_of(content),
        )
    else:
        place_map.require(written, str(options.resume))
        place_map.require(options.said_of_model, "the command line")
        if options.precision != place_map.precision:
            logger.warning(
                "the map was made in --precision %s, but is queried in %s", place_map.precision, options.precision
            )
        options = replace(options, **place_map.settings)
    model = build_model(**options.model)
    pca_paths = tasks.pca_images(options.part(tasks.Selection), model.descriptor_dim)
    with nullcontext() if place_map is None else place_map.fitting(str(options.resume)):
        weight_files.load_checkpoint(model, path, content)
    if model.projection is not None:
        if options.pca_dim and place_map is None:
            raise ValueError(
                f"--pca_dim {options.pca_dim}: {path} already ends with a PCA to {model.descriptor_dim} numbers; "
                "leave the option out, or evaluate the checkpoint without its PCA"
            )
        logger.info("from the checkpoint: a PCA to %d numbers, normalised again", model.descriptor_dim)
    carried = place_map is not None or options.save_map is not None or options.pca_dim
    weights = weight_files.state_digest(model) if carried else ""
    if place_map is not None:
        place_map.require_weights(weights, str(options.resume))
    for line in options.unused(encoder=model.encoder is not None):
        logger.warning("%s", line)
    return model, options, weights, pca_paths


def prepare(model: SuperVLADNet, options: EvalOptions, device: torch.device) -> None:
    """Moves the model to its device, sets evaluation mode and logs what the model is."""
    model.to(device).eval()
    cast_products(model.backbone, options.precision)
    if options.compile:
        model.backbone.compile_blocks()
    run_log.log_parameters(model)
    if model.encoder is not None:
        logger.info(
            "largest difference between the two encoder layers: %.1e (at the published learning rates, 3e-4 or less "
            "means one training step)",
            model.encoder.layer_difference(),
        )
    if departures := options.departures(encoder=model.encoder is not None):
        logger.info("%s", departures)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line.

    Returns:
        The exit status, 0; others, such as 2 for bad input, are raised as SystemExit.
    """
    run(parse(EvalOptions, argv))
    return 0


if __name__ == "__main__":
    run(OPTIONS)
