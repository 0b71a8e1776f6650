"""Evaluates a checkpoint: recall@N on a database/queries dataset."""

import logging
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial

from datasets.database_queries import DatabaseQueries
from datasets.transforms import evaluation_transform
from model import build_model
from model.weights import load_checkpoint
from parser import EvalOptions, parse
from test import evaluate, format_recalls, image_batches
from utils import distributed, run_log
from utils.device import allow_tf32, pick_device
from utils.seed import seed_everything

logger = logging.getLogger(__name__)


def run(options: EvalOptions) -> dict[int, float]:
    """Evaluates as the options say.

    Returns:
        Recall@N in percent, `{N: percent}`.

    Raises:
        SystemExit: bad input; the message is in the log and on the terminal.
    """
    with distributed.processes(), run_log.RunLog() as log:
        device = pick_device(options.device)
        run_log.log_header(asdict(options), device)
        seed_everything(options.seed)
        allow_tf32(False)  # the published protocol is fp32

        dataset = DatabaseQueries.from_folder(options.eval_datasets_folder, options.eval_dataset_name, "test")
        model = build_model(**options.model)
        load_checkpoint(model, options.resume)
        model.to(device)
        run_log.log_parameters(model)
        if model.encoder is not None:
            logger.info(
                "largest difference between the two encoder layers: %.1e (3e-4 or less: one step at published rates)",
                model.encoder.layer_difference(),
            )

        folder = log.open(options.save_dir)
        recalls = evaluate(
            model,
            dataset,
            read_images=partial(
                image_batches,
                transform=evaluation_transform(options.resize, options.antialias),
                batch_size=options.extraction_batch_size,
                num_workers=options.num_workers,
                device=device,
            ),
            recall_values=options.recall_values,
            positive_distance=options.val_positive_dist_threshold,
            infer_batch_size=options.infer_batch_size,
            device=device,
        )
        results = {"recalls": recalls, "dataset": dataset.sizes, "descriptor_dim": model.descriptor_dim}
        run_log.write_results(folder, results, asdict(options), device)
        logger.info("Recalls on %s: %s", dataset, format_recalls(recalls))
    return recalls


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line; exit status 2 for bad input."""
    run(parse(EvalOptions, argv))


if __name__ == "__main__":
    main()
