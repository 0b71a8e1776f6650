"""The options of train.py and eval.py; the defaults are the recipe of the paper. Only this file uses argparse.

The scripts read the options before they import torch and the rest, which takes seconds, so this file imports only the
standard library.
"""

import argparse
import json
import logging
import math
import os
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar, cast

logger = logging.getLogger(__name__)

Part = TypeVar("Part")

TEST_METHODS = ("hard_resize", "single_query", "central_crop", "five_crops", "nearest_crop", "maj_voting")
CONTEXTS = ("file_order", "unaligned", "shuffled", "paired", "independent")
DRAWN_CONTEXTS = ("shuffled", "paired")  # in random orders
# How --help groups the options; each script shows those that it has.
GROUPS = {
    "data": """
        eval_datasets_folder eval_dataset_name queries_names database_folder queries_folder map train_dataset_folder
        cities images_per_place skip_unreadable query_keys
    """,
    "model and weights": """
        resume foundation_model_path backbone backbone_blocks supervlad_clusters ghost_clusters crossimage_encoder
    """,
    "what counts as correct": """
        val_positive_dist_threshold positive_frames positives_file no_labels labels_where_known
    """,
    "evaluation protocol": """
        resize antialias test_method majority_weight recall_values infer_batch_size encoder_context context_seeds
        context_shift pca_dim pca_whiten pca_dataset_folder
    """,
    "training recipe": """
        train_batch_size train_resize randaugment_ops place_order freeze_te epochs_num patience optim lr lr_encoder
        lr_schedule warmup_steps lr_end_factor weight_decay clip_grad_norm encoder_training
    """,
    "search": "index index_parameters rerank accept",
    "results": """
        save_dir save_predictions save_assignments save_descriptors save_submission save_pairs save_h5 save_map
    """,
    "repeat, resume, keep": "options checkpoint_every descriptors_folder descriptor_dtype",
    "device, speed and memory": """
        device precision val_precision mixed_precision compile deterministic num_workers extraction_batch_size
        activation_checkpointing grad_cache_chunk efficient_ram_testing seed
    """,
}
# What a checkpoint written by train.py or model.export says of its model.
OF_A_CHECKPOINT = ("backbone", "supervlad_clusters", "ghost_clusters")
SUBMITTED = 20  # least images per query: the MSLS challenge scores the first 1, 5, 10 and 20
# The options allowed with --map; those of the model and of the image size must equal the map's.
ASKING_A_MAP = frozenset(
    """
    map queries_folder resume eval_datasets_folder save_dir device num_workers compile seed precision
    backbone backbone_blocks supervlad_clusters ghost_clusters crossimage_encoder resize antialias infer_batch_size
    extraction_batch_size descriptors_folder descriptor_dtype recall_values no_labels skip_unreadable
    val_positive_dist_threshold accept save_predictions save_descriptors save_pairs save_h5
    """.split()
)


class Backbone(NamedTuple):
    """What the options need to know about a backbone; model/sizes.py has the rest, and a test compares the two.

    Attributes:
        patch_size: side of a patch in pixels; the sides of images are multiples of it.
        side: default side of an evaluated image in pixels.
        depth: number of blocks.
    """

    patch_size: int
    side: int
    depth: int


_DEPTHS = {"": 12, "_small": 12, "_large": 24, "_giant": 40, "_tiny": 12}
BACKBONES = {
    **{f"dino{size}": Backbone(14, 322, depth) for size, depth in _DEPTHS.items()},
    **{f"dino{size}_reg": Backbone(14, 322, depth) for size, depth in _DEPTHS.items() if size != "_tiny"},
    **{f"dinov3{size}": Backbone(16, 320, depth) for size, depth in _DEPTHS.items() if size != "_giant"},
}


def option(default: Any, help: str, **argparse_settings: Any) -> Any:
    """A field with its help text; the flag's type is that of the default unless `type` is given."""
    factory = {"default_factory": default} if callable(default) else {"default": default}
    return field(**factory, metadata={"help": help, **argparse_settings})


def freeze_te(text: str) -> int | None:
    """Parses the value of --freeze_te: a number of blocks, or none."""
    return None if text == "none" else int(text)


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options that training and evaluation share."""

    eval_datasets_folder: Path = option(None, "folder that holds the evaluation datasets", type=Path)
    save_dir: Path = option(
        Path("default"), "results go to logs/<save_dir>/<time>, or to <save_dir>/<time> if the path is absolute"
    )

    backbone: str = option(
        "dino",
        "dino is DINOv2 ViT-B/14, dinov3 is DINOv3 ViT-B/16; the tiny ones are for demos and tests",
        choices=BACKBONES,
    )
    backbone_blocks: int = option(
        None,
        "number of backbone blocks to keep, counted from the first; the final norm stays; by default all",
        type=int,
    )
    supervlad_clusters: int = option(4, "number of clusters K in the SuperVLAD layer")
    ghost_clusters: int = option(1, "number of clusters that take part in the soft assignment and are then dropped")
    crossimage_encoder: bool = option(False, "add the encoder that attends across the images of a batch")

    resize: tuple[int, int] = option(
        None, "height and width of evaluated images in pixels (default: 322 322; DINOv3: 320 320)", nargs=2, type=int
    )
    infer_batch_size: int = option(
        16, "batch size of the cross-image encoder; it changes descriptors, so it is part of the protocol"
    )
    extraction_batch_size: int = option(
        0, "batch size of the backbone; it changes speed and memory, never recall; 0 means 4 on a CPU and 16 elsewhere"
    )
    recall_values: tuple[int, ...] = option((1, 5, 10, 20), "values of N for recall@N", nargs="+", type=int)

    options: Path | None = option(
        None,
        "results.json of a run to repeat with the options it was given; the command line overrides them",
        type=Path,
    )
    given: tuple[str, ...] = field(default=(), compare=False, repr=False)  # the options that were set, or taken there
    notes: tuple[str, ...] = field(default=(), compare=False, repr=False)  # log lines about what was taken there
    started_in: str = field(default="", compare=False, repr=False)  # the folder that relative paths start from

    device: str = option("auto", "auto is cuda if available, else cpu", choices=("auto", "cuda", "cpu", "mps"))
    num_workers: int | None = option(
        None,
        "number of threads (evaluation) or processes (training) that read images; by default one per CPU core, at most "
        "16, or one per four cores if the model runs on the CPU too; 0 reads in the main thread",
        type=int,
    )
    compile: bool = option(False, "compile the backbone with torch.compile; no faster on a CPU")
    seed: int = option(0, "seed of all random numbers")

    @property
    def model(self) -> dict[str, Any]:
        """The arguments of `model.build_model`; a checkpoint stores them too."""
        cut = self.backbone_blocks not in (None, BACKBONES[self.backbone].depth)
        return {
            "backbone": self.backbone,
            **({"backbone_blocks": self.backbone_blocks} if cut else {}),
            "clusters": self.supervlad_clusters,
            "ghost_clusters": self.ghost_clusters,
            "crossimage_encoder": self.crossimage_encoder,
        }

    def part(self, of: Callable[..., Part]) -> Part:
        """An instance of a dataclass whose fields are taken from these options or their properties."""
        return of(**{entry.name: getattr(self, entry.name) for entry in fields(cast(Any, of))})

    @property
    def backbone_known(self) -> bool:
        """Whether the command line or its default decides the backbone."""
        return True

    def fit_backbone(self) -> None:
        """Fills in the defaults that depend on the backbone, and checks that the other options fit it.

        Raises:
            ValueError: an option does not fit.
        """
        patch_size, side, depth = BACKBONES[self.backbone]
        if self.backbone_blocks is None:
            object.__setattr__(self, "backbone_blocks", depth)
        if not 1 <= self.backbone_blocks <= depth:
            raise ValueError(
                f"--backbone_blocks {self.backbone_blocks}: --backbone={self.backbone} has {depth} blocks; "
                f"use 1 to {depth}"
            )
        if self.resize is None:
            object.__setattr__(self, "resize", (side, side))
        if self.resize[0] != self.resize[1]:  # to keep a photo's shape, which seldom fits the patches
            rounded = tuple(_whole_patches(side, patch_size) for side in self.resize)
            if rounded != self.resize:
                logger.warning("--resize %d %d is rounded to whole patches, %d %d", *self.resize, *rounded)
                object.__setattr__(self, "resize", rounded)
        _require_patches("--resize", self.resize, patch_size)

    def __post_init__(self) -> None:
        if self.backbone_known:
            self.fit_backbone()
        _require_positive(self, "infer_batch_size", "supervlad_clusters")
        if min(self.ghost_clusters, self.num_workers or 0, self.seed, self.extraction_batch_size) < 0:
            raise ValueError(
                "--ghost_clusters, --num_workers, --seed and --extraction_batch_size cannot be negative; use 0 or above"
            )
        if self.seed >= 2**32:
            raise ValueError(f"--seed {self.seed} is larger than NumPy allows; use one below {2**32}")
        if min(self.recall_values) < 1:
            raise ValueError(f"--recall_values {min(self.recall_values)} is below 1; use 1 or above")


@dataclass(frozen=True, kw_only=True)
class EvalOptions(Options):
    """Options of eval.py."""

    eval_dataset_name: tuple[str, ...] = option(
        ("pitts30k",),
        "evaluation datasets, each at <eval_datasets_folder>/<name>/images/test/{database,queries}",
        nargs="+",
        type=str,
    )
    queries_names: tuple[str, ...] = option(
        ("queries",),
        "query sets: names of folders beside the database; svox:queries_rain applies to svox only",
        nargs="+",
        type=str,
    )
    resize: tuple[int, int] = option(
        None,
        "height and width of images in pixels; by default as the checkpoint says, else 322 322 (DINOv3: 320 320)",
        nargs=2,
        type=int,
    )
    antialias: bool = option(
        None,
        "antialias the resize; by default on for plain folders, whose photos may be large, unless the checkpoint says "
        "no, and off for datasets, as published",
        action=argparse.BooleanOptionalAction,
    )
    upright: bool = field(default=None)  # type: ignore[assignment]  # for plain folders, unless the checkpoint says no
    database_folder: Path | None = option(
        None, "plain folder of database photos, instead of a dataset; needs --queries_folder", type=Path
    )
    queries_folder: Path | None = option(
        None, "plain folder of query photos; needs --database_folder or --map", type=Path
    )
    no_labels: bool = option(False, "search without labels: photos need no positions, and no recall is computed")
    positives_file: Path | None = option(
        None, ".npy or .csv file with the correct database images of each query, instead of positions", type=Path
    )
    labels_where_known: bool = option(
        False,
        "search photos without a position too; recall counts only queries that have one, and only database images that "
        "have one can be correct",
    )
    skip_unreadable: bool = option(
        False, "read all photos first, leave out those that cannot be read, and name them in the log"
    )
    query_keys: Path | None = option(
        None, "text file of query keys: evaluate only these queries (e.g. the official ones of MSLS)", type=Path
    )
    val_positive_dist_threshold: float | None = option(
        None,
        "a database image within this many metres is correct; by default the dataset's own distance, else 25",
        type=float,
    )
    positive_frames: int | None = option(
        None, "the same in frames, for datasets whose positions count frames (nordland)", type=int
    )

    resume: Path = option(
        None,
        "checkpoint to evaluate: a file (released, ours, or a bare state dict), or the name of a released one, "
        "downloaded once: SuperVLAD, SuperVLAD-CrossImage, 1-ClusterVLAD",
        type=Path,
    )
    test_method: str | None = option(
        None, "how queries are prepared; by default hard_resize, for every dataset", type=str, choices=TEST_METHODS
    )
    majority_weight: float = option(0.01, "weight of the crops' votes in maj_voting")
    encoder_context: tuple[str, ...] = option(
        None,
        "which photos share a batch in the encoder. file_order: neighbours by file name, as published (default for "
        "datasets); unaligned: the same, with the query batches shifted; shuffled: random photos; paired: the same, "
        "in one order for both sides; independent: each photo by itself (default for plain folders)",
        nargs="+",
        type=str,
        choices=CONTEXTS,
    )
    context_seeds: int = option(5, "number of random orders for the shuffled and the paired context")
    context_shift: int | None = option(
        None,
        "number of queries in the first batch of the unaligned context; by default half of --infer_batch_size",
        type=int,
    )
    pca_dim: int = option(0, "reduce descriptors to this many dimensions by PCA; 0 for no PCA")
    pca_whiten: bool = option(False, "scale the PCA's components to equal variance, and descriptors to unit norm again")
    pca_dataset_folder: Path | None = option(
        None, "folder below --eval_datasets_folder with the images to fit the PCA on", type=Path
    )

    precision: str = option(
        "fp32", "precision of the backbone; published figures use fp32", choices=("fp32", "tf32", "bf16", "fp16")
    )
    descriptors_folder: Path | None = option(
        None, "keep the backbone's output in this folder, and reuse what is already there", type=Path
    )
    descriptor_dtype: str = option(
        "float32", "data type of descriptors on disk, maps included", choices=("float32", "float16")
    )
    efficient_ram_testing: bool = option(
        False, "accepted as in the released code, without effect: memory is always bounded"
    )
    index: str | None = option(
        None,
        "approximate search: a FAISS index, e.g. IVF4096,PQ64, or binary, which compares the signs of descriptors and "
        "needs no training; by default search is exact",
        type=str,
    )
    index_parameters: str = option("", "search parameters of --index, e.g. nprobe=32")
    rerank: int = option(100, "images per query that --index binary ranks by exact distance")

    accept: str | None = option(
        None,
        "accept matches up to this squared_descriptor_distance; auto@99 takes the distance of 99 percent precision on "
        "the val split",
        type=str,
        metavar="{DISTANCE,auto@P}",
    )
    save_predictions: int = option(0, "write a page with each query and this many of its matches; 0 for none")
    save_assignments: int = option(
        0, "draw the VLAD layer's soft assignment for this many queries (resized by hard_resize); 0 for none"
    )
    save_descriptors: bool = option(False, "write descriptors and paths into the run's folder")
    save_submission: bool = option(False, "write the submission file of the MSLS challenge")
    save_pairs: int = option(0, "write this many matches of each query to pairs.txt, for hloc and COLMAP; 0 for none")
    save_h5: bool = option(False, "write descriptors to global_descriptors.h5, in hloc's format; needs h5py")
    save_map: Path | None = option(
        None,
        "write a map: a .npz file of the database's descriptors, paths and positions, to search later with --map",
        type=Path,
    )
    map: Path | None = option(
        None, "search this map, which --save_map wrote, instead of a database; needs --queries_folder", type=Path
    )

    @property
    def shift(self) -> int:
        """Queries in the first batch of the unaligned context."""
        return self.infer_batch_size // 2 if self.context_shift is None else self.context_shift

    @property
    def plain_folders(self) -> bool:
        """Whether two plain folders are searched instead of a dataset."""
        return self.database_folder is not None

    @property
    def photo_folders(self) -> list[Path]:
        """The folders whose photos are listed, with subfolders."""
        if self.map is not None and self.queries_folder is not None:
            return [self.queries_folder]
        if self.database_folder is not None and self.queries_folder is not None:
            return [self.database_folder, self.queries_folder]
        return [self.eval_datasets_folder / name / "images" for name in self.eval_dataset_name]

    @property
    def accept_distance(self) -> float | None:
        """The squared descriptor distance up to which matches are accepted; None without --accept, or with auto@P."""
        return None if self.accept is None else _acceptance(self.accept)[0]

    @property
    def accept_precision(self) -> float | None:
        """The precision in percent for which the distance is found on the val split; None unless --accept is auto@P."""
        return None if self.accept is None else _acceptance(self.accept)[1]

    @property
    def backbone_known(self) -> bool:
        """Whether the command line or its default decides the backbone, rather than a checkpoint."""
        return "backbone" in self.given or self.resume is None or not self.resume.is_file()

    @property
    def depth_wanted(self) -> int:
        """Matches per query that the outputs show."""
        return max(self.save_predictions, self.save_pairs, SUBMITTED if self.save_submission else 0)

    def completed(
        self,
        written: Mapping[str, Any],
        *,
        size: tuple[int, int] | None,
        validated_at: tuple[int, int] | None,
        prepared: Mapping[str, bool],
    ) -> "EvalOptions":
        """The options completed by what the checkpoint says; the command line takes precedence.

        Args:
            written: arguments of `build_model` in the checkpoint.
            size: image size that it was trained or exported for; None for the backbone's own.
            validated_at: image size that it was validated at, if the checkpoint says so.
            prepared: how an exported model expects plain photos to be prepared.
        """
        found = {"supervlad_clusters" if name == "clusters" else name: value for name, value in written.items()}
        of_backbone = ("backbone", "backbone_blocks")
        found = {name: value for name, value in found.items() if name not in of_backbone or name not in self.given}
        if {"supervlad_clusters", "ghost_clusters", "crossimage_encoder"} & {*self.given}:
            found = {name: value for name, value in found.items() if name in of_backbone}
        shown = [
            f"{'no ' * (value is False)}--{name}{'' if isinstance(value, bool) else f' {value}'}"
            for name, value in found.items()
        ]
        if "resize" not in self.given:
            found["resize"] = size
        if "backbone_blocks" not in self.given:
            found.setdefault("backbone_blocks", None)
        if self.plain_folders:
            found |= {name: value for name, value in prepared.items() if name not in self.given}
        options = replace(self, **found)
        options.fit_backbone()
        if "resize" not in self.given and (size is not None or "backbone" in found):
            own = " (its backbone's own)" * (size is None)
            shown.append("--resize {} {}{}".format(*options.resize, own))
        if validated_at is not None and validated_at != options.resize:
            logger.warning("the model was validated at %d %d, but --resize is %d %d", *validated_at, *options.resize)
        elif validated_at is None and size is not None and size != options.resize:
            logger.warning("the file was exported for %d %d, but --resize is %d %d", *size, *options.resize)
        if "antialias" in found:
            shown.append(f"--{'no-' * (not found['antialias'])}antialias")
        if shown:
            logger.info("from the checkpoint: %s", ", ".join(shown))
        return options

    @property
    def said_of_model(self) -> dict[str, Any]:
        """What the command line sets of the model (named as in `model`) and of how photos are prepared."""
        known = {"backbone_blocks": None, **self.model, "resize": self.resize, "antialias": self.antialias}
        given = {"clusters" if name == "supervlad_clusters" else name for name in self.given}
        return {name: value for name, value in known.items() if name in given}

    def departures(self, *, encoder: bool) -> str:
        """How an evaluation of plain folders departs from the published protocol, in one line; empty for others."""
        if not self.plain_folders:
            return ""
        changes = []
        if self.upright:
            changes.append("photos are turned as EXIF says")
        if self.antialias:
            changes.append("the resize is antialiased (--no-antialias turns this off)")
        if encoder and self.encoder_context[0] == "independent":
            changes.append("the encoder sees each photo by itself (--encoder_context file_order: neighbours by name)")
        line = "plain folders" + ", photos not turned as EXIF says since the checkpoint says so" * (not self.upright)
        return f"{line}, unlike published benchmarks: {'; '.join(changes)}" if changes else line

    def warn_of_depth(self, count: int, name: str, *, labelled: bool) -> None:
        """Warns of options that want more matches than there are database images, and says what a submission takes.

        Args:
            count: number of database images.
            name: name of the dataset.
            labelled: whether recall is computed.
        """
        asked = {"--recall_values": max(self.recall_values) if labelled else 0}
        asked |= {"--save_predictions": self.save_predictions, "--save_pairs": self.save_pairs}
        asked |= {"--save_submission": SUBMITTED * self.save_submission}
        for flag, wanted in asked.items():
            if wanted > count and (flag == "--save_submission" or flag.lstrip("-") in self.given):
                logger.warning("%s asks for %d matches, but %s has %d database images", flag, wanted, name, count)
        if self.save_submission and max(self.recall_values) < SUBMITTED <= count:
            logger.info("--save_submission: the %d images per query that are scored are submitted", SUBMITTED)

    def unused(self, *, encoder: bool) -> list[str]:
        """A line for each given option that has no effect on a model with or without the cross-image encoder."""
        lines = []
        if "eval_datasets_folder" in self.given and self.map is not None:
            lines.append("--eval_datasets_folder has no effect with --map")
        if "eval_datasets_folder" in self.given and self.plain_folders and not self.pca_dim:
            lines.append("--eval_datasets_folder has no effect with --database_folder and --queries_folder")
        if encoder:
            if "infer_batch_size" in self.given and set(self.encoder_context) == {"independent"}:
                lines.append(
                    f"--infer_batch_size {self.infer_batch_size} has no effect with --encoder_context independent"
                )
            return lines
        if "infer_batch_size" in self.given:
            lines.append(
                f"--infer_batch_size {self.infer_batch_size} has no effect without the cross-image encoder; "
                "for speed and memory use --extraction_batch_size"
            )
        if "encoder_context" in self.given and set(self.encoder_context) != {"file_order"}:
            lines.append(
                f"--encoder_context {' '.join(self.encoder_context)} has no effect without the cross-image encoder: "
                "all contexts give the same descriptors, evaluated once, as file_order"
            )
        return lines

    def _require_a_part(self) -> None:
        """Refuses options that have no effect with the others."""
        rules = (
            ("pca_whiten", self.pca_dim > 0, "with --pca_dim"),
            ("majority_weight", self.test_method == "maj_voting", "with --test_method maj_voting"),
            ("context_seeds", {*DRAWN_CONTEXTS} & {*self.encoder_context}, "with --encoder_context shuffled or paired"),
            ("rerank", self.index == "binary", "with --index binary"),
            ("index_parameters", self.index != "binary", "with a FAISS --index, e.g. IVF4096,PQ64"),
            ("context_shift", "unaligned" in self.encoder_context, "with --encoder_context unaligned"),
            ("queries_names", not self.plain_folders, "with datasets (plain folders take --queries_folder)"),
            ("context_seeds", not self.no_labels, "with labels, for the recalls of several orders (no --no_labels)"),
        )
        for name, has_part, of in rules:
            if name in self.given and not has_part:
                raise ValueError(f"--{name} works only {of}; otherwise leave it out")
        self._require_acceptable()
        labels = [
            flag
            for flag, given in (
                ("--no_labels", self.no_labels),
                ("--positives_file", self.positives_file is not None),
                ("--val_positive_dist_threshold", self.val_positive_dist_threshold is not None),
                ("--positive_frames", self.positive_frames is not None),
            )
            if given
        ]
        if len(labels) > 1:
            raise ValueError(f"{' and '.join(labels)} each define what is correct; give one of them")
        if len(set(self.encoder_context)) < len(self.encoder_context):
            raise ValueError(
                f"--encoder_context {' '.join(self.encoder_context)} names a context twice; name each once"
            )
        if self.no_labels and "paired" in self.encoder_context:
            raise ValueError(
                "--encoder_context paired needs labels, to know whether queries and database images pair up; "
                "leave out --no_labels, or use shuffled"
            )
        if self.no_labels and len(self.encoder_context) > 1:
            raise ValueError(
                f"--encoder_context {' '.join(self.encoder_context)}: without labels there are no recalls to compare, "
                "and matches are written for one context only; give one"
            )
        for name in ("save_predictions", "save_pairs"):
            asked = getattr(self, name)
            if self.test_method == "maj_voting" and asked > max(self.recall_values):
                raise ValueError(
                    f"--{name} {asked}: what maj_voting finds depends on the search depth, the largest of "
                    f"--recall_values ({max(self.recall_values)}); give no more, or --recall_values up to {asked}"
                )
        if self.save_map is not None and not self.plain_folders and len(self.eval_dataset_name) > 1:
            raise ValueError("--save_map writes the map of one dataset; give one --eval_dataset_name")
        depth = max(*self.recall_values, self.save_predictions, self.save_pairs)
        if self.index == "binary" and self.rerank < depth:
            raise ValueError(f"--rerank {self.rerank} is less than the {depth} images per query asked for; use more")
        if self.save_submission and self.skip_unreadable:
            raise ValueError(
                "--save_submission needs every query, and --skip_unreadable leaves some out; give one of the two"
            )
        if self.save_submission:
            if self.index is not None:
                raise ValueError(
                    "--save_submission: an approximate --index may find fewer images for some queries, but all lines "
                    "of the file must have the same length; leave out --index"
                )
            if self.test_method == "maj_voting" and max(self.recall_values) < SUBMITTED:
                raise ValueError(
                    f"--save_submission: what --test_method maj_voting finds depends on the search depth, and "
                    f"{SUBMITTED} images are scored; give --recall_values up to {SUBMITTED}"
                )

    def queries_of(self, dataset: str) -> tuple[str, ...]:
        """The query folders that are evaluated on a dataset's database."""
        named = [name.rpartition(":") for name in self.queries_names]
        return tuple(queries for of, _, queries in named if of in ("", dataset)) or ("queries",)

    def _require_sets(self) -> None:
        """Refuses query sets of a dataset that is not evaluated, sets named twice, and several where one is needed."""
        for name in self.queries_names:
            dataset = name.rpartition(":")[0]
            if dataset and dataset not in self.eval_dataset_name:
                raise ValueError(
                    f"--queries_names {name}: {dataset} is not among --eval_dataset_name "
                    f"{' '.join(self.eval_dataset_name)}; name it there too"
                )
        for dataset in self.eval_dataset_name:
            sets = self.queries_of(dataset)
            if len({*sets}) < len(sets):
                raise ValueError(
                    f"--queries_names {' '.join(self.queries_names)} names a set of {dataset} twice; name each once"
                )
            if len(sets) > 1 and (self.positives_file or self.query_keys):
                raise ValueError(
                    f"--positives_file and --query_keys apply to one set of queries, but --queries_names names "
                    f"{len(sets)} of {dataset}; give one"
                )

    def _require_acceptable(self) -> None:
        """Refuses a malformed --accept, or one that other options make meaningless."""
        if self.accept is None:
            return
        if self.test_method == "maj_voting":
            raise ValueError(
                f"--accept {self.accept}: with --test_method maj_voting, votes lower the distances, so a threshold "
                "means nothing; use another test method, e.g. nearest_crop"
            )
        if self.accept_precision is None:
            return
        for flag, given, why in (
            ("--map", self.map is not None, "a map has no val split"),
            ("--database_folder", self.plain_folders, "plain folders have no val split"),
            ("--no_labels", self.no_labels, "precision needs labels"),
            ("--positives_file", self.positives_file is not None, "the file covers the test split only"),
        ):
            if given:
                raise ValueError(
                    f"--accept {self.accept} takes the distance from the dataset's val split, which {flag} rules "
                    f"out: {why}; give a distance, e.g. one from another run's log"
                )

    def _require_of_map(self) -> None:
        """Refuses options that do not apply to the search of a map."""
        foreign = [f"--{name}" for name in self.given if name not in ASKING_A_MAP]
        if foreign:
            raise ValueError(
                f"{' and '.join(foreign)} {'do' if len(foreign) > 1 else 'does'} not apply to --map: the map "
                "defines the database and how photos are prepared; leave that out"
            )
        if self.queries_folder is None:
            raise ValueError("--map needs a folder of query photos; give --queries_folder")

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "eval_dataset_name", tuple(map(_dataset_name, self.eval_dataset_name)))
        object.__setattr__(self, "queries_names", tuple(map(_queries_name, self.queries_names)))
        if self.map is not None:
            self._require_of_map()
        plain = (self.database_folder is not None or self.map is not None) + (self.queries_folder is not None)
        if self.antialias is None:
            object.__setattr__(self, "antialias", self.plain_folders)
        if self.upright is None:
            object.__setattr__(self, "upright", self.plain_folders)
        if self.encoder_context is None:
            object.__setattr__(self, "encoder_context", ("independent" if plain else "file_order",))
        if self.context_shift is not None:
            _require_positive(self, "context_shift")
        if plain == 1:
            raise ValueError("--database_folder and --queries_folder go together; give both")
        if self.eval_datasets_folder is None and (not plain or (self.pca_dim and self.map is None)):
            raise ValueError(
                "--eval_datasets_folder is missing; name the folder that holds the evaluation datasets, or give "
                "--database_folder and --queries_folder"
            )
        if self.resume is None:
            raise ValueError("--resume is missing; name the checkpoint to evaluate")
        if self.map is None and bool(self.pca_dim) != (self.pca_dataset_folder is not None):
            raise ValueError("--pca_dim and --pca_dataset_folder go together; give both")
        if not plain and len(self.eval_dataset_name) > 1 and (self.positives_file or self.query_keys):
            raise ValueError("--positives_file and --query_keys apply to one dataset; give one --eval_dataset_name")
        if not plain:
            self._require_sets()
        if plain and "eval_dataset_name" in self.given:
            raise ValueError("--eval_dataset_name and --database_folder both say what to search; give one of the two")
        if self.labels_where_known and (self.no_labels or self.positives_file is not None):
            raise ValueError(
                "--labels_where_known applies to labels from positions, and --no_labels and --positives_file use none; "
                "give one of them"
            )
        if self.index_parameters and self.index is None:
            raise ValueError(f"--index_parameters {self.index_parameters} need an --index; give that too")
        if len(set(self.eval_dataset_name)) < len(self.eval_dataset_name):
            raise ValueError(
                f"--eval_dataset_name {' '.join(self.eval_dataset_name)} names a dataset twice; name each once"
            )
        for name in (
            "pca_dim",
            "save_predictions",
            "save_pairs",
            "save_assignments",
            "majority_weight",
            "positive_frames",
        ):
            value = getattr(self, name) or 0
            if not value >= 0:
                raise ValueError(f"--{name} {value} is {'negative' if value < 0 else 'not a number'}; use 0 for none")
        _require_positive(self, "context_seeds")
        self._require_a_part()
        if self.val_positive_dist_threshold is not None:
            _require_positive(self, "val_positive_dist_threshold")


@dataclass(frozen=True, kw_only=True)
class TrainOptions(Options):
    """Options of train.py."""

    eval_dataset_name: str = option(
        "pitts30k", "evaluation dataset, at <eval_datasets_folder>/<name>/images/<split>/{database,queries}"
    )
    val_positive_dist_threshold: float = option(25.0, "a database image within this many metres is correct")
    train_dataset_folder: tuple[Path, ...] | None = option(
        None,
        "GSV-Cities, or several folders in its format; by default <eval_datasets_folder>/gsv_cities",
        nargs="+",
        type=Path,
    )
    resume: str | None = option(
        None,
        "continue from a run's last_model.pth; auto finds the newest in --save_dir; other files give initial weights",
        type=str,
    )
    checkpoint_every: int = option(0, "steps between checkpoints within an epoch; 0 writes one per epoch")
    foundation_model_path: Path | None = option(
        None,
        "official backbone weights, or a checkpoint to take the backbone from; by default DINOv2's are downloaded",
        type=Path,
    )
    cities: tuple[str, ...] = option(
        (), "cities to train on, from any of the folders; by default all", nargs="+", type=str
    )
    images_per_place: int = option(4, "images per place in a batch; places with fewer are left out")
    antialias: bool = option(False, "antialias the resize of evaluated images (the published protocol does not)")
    train_resize: tuple[int, int] = option(
        (224, 224), "height and width of training images in pixels", nargs=2, type=int
    )
    randaugment_ops: int = option(3, "RandAugment operations per image; 0 for none")
    place_order: str = option(
        "fixed",
        "order of the places. fixed: the same in every epoch; reshuffled: a new one in each; similar: from the second "
        "epoch on, places that the model confuses share a batch",
        choices=("fixed", "reshuffled", "similar"),
    )

    freeze_te: int | None = option(
        8,
        "train the backbone's blocks from this index on; none trains the whole backbone",
        type=freeze_te,
        metavar="{N,none}",
    )
    train_batch_size: int = option(120, "places per batch, over all GPUs together")
    epochs_num: int = option(20, "maximum number of epochs; 0 saves and evaluates the initialised model")
    patience: int = option(3, "stop after this many epochs without a better validation R@1 + R@5")
    lr: float = option(5e-5, "peak learning rate")
    lr_schedule: str = option(
        "halving",
        "halving: halve the rates every third epoch; linear, cosine: lower them to --lr_end_factor by the last epoch",
        choices=("halving", "linear", "cosine"),
    )
    warmup_steps: int = option(0, "warm-up steps before the schedule begins; 0 for none")
    lr_end_factor: float = option(0.0, "end of the linear and cosine schedules, as a fraction of the peak rate")
    lr_encoder: float = option(1e-4, "learning rate of the cross-image encoder")
    encoder_training: str = option(
        "released",
        "released: train the encoder in the first step only, as the released script does; every_step: in all steps, as "
        "the paper says",
        choices=("released", "every_step"),
    )
    optim: str = option("adam", "optimiser", choices=("adam", "adamw", "sgd"))
    weight_decay: float | None = option(
        None, "weight decay; by default the optimiser's own: adam 0, adamw 9.5e-9, sgd 0.001", type=float
    )
    precision: str = option("fp32", "precision of the training step", choices=("fp32", "tf32", "bf16", "fp16"))
    val_precision: str = option(
        "fp32",
        "precision of the backbone in validation, which picks the best model; the test split is evaluated in fp32 "
        "(with --precision tf32, both fp32 are tf32)",
        choices=("fp32", "bf16", "fp16"),
    )
    mixed_precision: bool = option(False, "the released code's name for --precision fp16")
    deterministic: bool = option(False, "repeat runs to the last bit on a GPU too, with slower kernels")
    clip_grad_norm: float = option(0.0, "clip the L2 norm of all gradients together to this; 0 for no clipping")
    activation_checkpointing: bool = option(
        False, "recompute the activations of trained blocks in the backward pass instead of keeping them"
    )
    grad_cache_chunk: int = option(
        0, "images whose backbone activations are kept at a time in the backward pass; 0 for all"
    )

    @property
    def decisive(self) -> dict[str, Any]:
        """The options that decide what a training run computes; the others may change when it is resumed."""
        free = {"resume", "save_dir", "epochs_num", "patience", "device", "num_workers", "checkpoint_every"}
        free |= {"extraction_batch_size", "mixed_precision"}
        # These only round differently.
        free |= {"activation_checkpointing", "grad_cache_chunk", "compile", "deterministic"}
        free |= {"options", "given", "notes", "started_in"}
        if self.lr_schedule != "halving":  # those end with the last epoch
            free -= {"epochs_num"}
        values = {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.name not in free}
        # Paths may change, but not the content of the files.
        return {f"--{name}": value for name, value in values.items() if not _is_path(value)}

    @property
    def defaults(self) -> dict[str, Any]:
        """The default of each option."""
        return {f"--{entry.name}": entry.default for entry in fields(self)}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eval_datasets_folder is None:
            raise ValueError("--eval_datasets_folder is missing; name the folder that holds the evaluation datasets")
        object.__setattr__(self, "eval_dataset_name", _dataset_name(self.eval_dataset_name))
        for name in ("lr_encoder", "encoder_training"):
            if name in self.given and not self.crossimage_encoder:
                logger.warning("--%s has no effect without --crossimage_encoder", name)
        if "lr_end_factor" in self.given and self.lr_schedule == "halving":
            logger.warning("--lr_end_factor has no effect with --lr_schedule halving")
        if self.foundation_model_path is not None and self.resume not in (None, "auto"):
            logger.warning("--foundation_model_path has no effect: --resume %s provides all weights", self.resume)
        _require_patches("--train_resize", self.train_resize, BACKBONES[self.backbone].patch_size)
        _require_positive(self, "images_per_place", "train_batch_size", "patience", "lr", "lr_encoder")
        _require_positive(self, "val_positive_dist_threshold")
        for name in (
            "epochs_num", "randaugment_ops", "checkpoint_every", "clip_grad_norm", "grad_cache_chunk", "warmup_steps",
            "weight_decay",
        ):  # fmt: skip
            if not (getattr(self, name) or 0) >= 0:
                raise ValueError(f"--{name} {getattr(self, name)} is negative or not a number; use 0 for none")
        if not 0 <= self.lr_end_factor <= 1:
            raise ValueError(f"--lr_end_factor {self.lr_end_factor} is not a fraction of the learning rate; use 0 to 1")
        if self.images_per_place < 2:
            raise ValueError(
                f"--images_per_place {self.images_per_place} leaves no two images of the same place; use 2 or more"
            )
        if len(set(self.cities)) < len(self.cities):
            raise ValueError(f"--cities {' '.join(self.cities)} names a city twice; name each once")
        if self.mixed_precision:
            if self.precision not in ("fp32", "fp16"):
                raise ValueError(f"--mixed_precision means --precision fp16, not {self.precision}; give only one")
            object.__setattr__(self, "precision", "fp16")
        if self.freeze_te is not None and self.freeze_te < 0:
            raise ValueError(f"--freeze_te {self.freeze_te} is negative; use 0 or above, or none")
        self._require_blocks_to_train()

    def _require_blocks_to_train(self) -> None:
        blocks = self.backbone_blocks
        if self.freeze_te is None or self.freeze_te < blocks:
            return
        if self.freeze_te > blocks:
            raise ValueError(
                f"--freeze_te {self.freeze_te} freezes more than the {blocks} blocks of this backbone; "
                f"use 0 to {blocks}, or none to train everything"
            )
        logger.warning("--freeze_te %d freezes all %d blocks, so the backbone is not trained", self.freeze_te, blocks)


AnyOptions = TypeVar("AnyOptions", bound=Options)


def _dataset_name(name: str) -> str:
    """A dataset's name as a relative path, below the folder of datasets and below the run's folder.

    Raises:
        ValueError: the path leaves that folder, as the results would.
    """
    return _folder_name("--eval_dataset_name", name, "--eval_datasets_folder")


def _queries_name(name: str) -> str:
    """The same for a folder of queries, with an optional `<dataset>:` in front."""
    dataset, colon, queries = name.rpartition(":")
    queries = _folder_name("--queries_names", queries, "the folder that holds the database")
    if colon:
        dataset = _folder_name(f"the dataset of --queries_names {name!r},", dataset, "--eval_datasets_folder")
    return dataset + colon + queries


def _folder_name(flag: str, name: str, above: str) -> str:
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/") or ".." in parts or not parts:
        raise ValueError(
            f"{flag} {name!r} is not the name of a folder below {above}; put it there and give its relative "
            "path, without .."
        )
    return "/".join(parts)


def _acceptance(text: str) -> tuple[float | None, float | None]:
    """Parses --accept: a distance, or the precision in percent of auto@P.

    Raises:
        ValueError: it is neither.
    """
    asked = text.removeprefix("auto@")
    try:
        value = float(asked)
    except ValueError:
        value = math.nan
    if asked != text and not 0 < value <= 100:
        raise ValueError(f"--accept {text}: auto@ takes a precision in percent, above 0 and up to 100, e.g. auto@99")
    if not 0 < value < math.inf:
        kind = "not above 0" if value <= 0 else "not finite" if value == math.inf else "not a number"
        raise ValueError(
            f"--accept {text} is {kind}; give a squared descriptor distance above 0, as in predictions.csv, or "
            "auto@99 for the distance of 99% precision on the val split"
        )
    return (None, value) if asked != text else (value, None)


def _whole_patches(side: int, patch_size: int) -> int:
    return max(patch_size, round(side / patch_size) * patch_size)


def _require_patches(flag: str, size: Sequence[int], patch_size: int) -> None:
    for side in size:
        if side < patch_size or side % patch_size:
            raise ValueError(
                f"{flag} {' '.join(map(str, size))}: {side} is not a multiple of the {patch_size}-pixel patch; "
                f"use e.g. {_whole_patches(side, patch_size)}"
            )


def _require_positive(options: Options, *names: str) -> None:
    for name in names:
        if not getattr(options, name) > 0:
            raise ValueError(f"--{name} {getattr(options, name)} is not above 0; give a positive number")


class _Parser(argparse.ArgumentParser):
    """Prints once for all processes that torchrun started on a machine.

    Attributes:
        source: prefix that names the origin of the options being parsed, if not the command line.
    """

    source = ""

    @property
    def silent(self) -> bool:
        """Whether another process on this machine prints instead."""
        return "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("LOCAL_RANK", "0") != "0"

    def _print_message(self, message: str, file: Any = None) -> None:  # --help, --version and errors come here
        if not self.silent:
            super()._print_message(message, file)

    def error(self, message: str) -> NoReturn:
        if self.silent:
            time.sleep(5)  # torchrun stops all when one exits: let the one that prints go first
            self.exit(2)
        super().error(self.source + message)


def version() -> str:
    """The version of this repository; "unknown" if the file VERSION is missing."""
    try:
        return (Path(__file__).parent / "VERSION").read_text().strip()
    except OSError:
        return "unknown"


def _is_path(value: Any) -> bool:
    """Whether a value is a path, or several."""
    return isinstance(value, Path) or (isinstance(value, tuple) and bool(value) and all(map(_is_path, value)))


def _at_home(value: Any) -> Any:
    """A path, or each of several, with its ~ expanded."""
    if isinstance(value, tuple):
        return tuple(map(_at_home, value))
    return Path(os.path.expanduser(value)) if isinstance(value, Path) else value


def _unknown(words: Sequence[str], flags: Sequence[str], other: type[Options]) -> str:
    """The message for words on the command line that are neither options nor their values."""
    misspelt = [word.split("=")[0] for word in words if word.startswith("-")] or [words[0]]
    messages = []
    for word in misspelt:
        name = word.lstrip("-").replace("-", "_")
        message = f"unknown option {word}"
        if f"--{name}" not in flags and name in {entry.name for entry in fields(other) if entry.metadata}:
            message += f", it is an option of {'train.py' if other is TrainOptions else 'eval.py'}"
        elif near := get_close_matches(f"--{name}", flags, n=1):
            message += f", did you mean {near[0]}?"
        messages.append(message)
    return "; ".join(messages)


def _split_values(word: str, argv: Sequence[str], several: Sequence[str]) -> str:
    """The message for a second value after `--option=value`, which takes only one; empty for other errors."""
    before = argv[: argv.index(word)]
    flag, joined, first = next((given for given in before[::-1] if given.startswith("-")), "").partition("=")
    if word.startswith("-") or not joined or flag not in several:
        return ""
    return f"{flag}={first} {word}: only one value can follow =; write {flag} {first} {word}"


def _names(options_class: type[Options]) -> dict[str, Any]:
    """The options that a run can be given, with their defaults as in a results.json."""
    defaults = {
        entry.name: entry.default if entry.default_factory is MISSING else entry.default_factory()
        for entry in fields(options_class)
        if entry.metadata and entry.name != "options"
    }
    return dict(json.loads(json.dumps(defaults, default=str)))


def _read_results(file: Path, options_class: type[Options]) -> tuple[dict[str, Any], str]:
    """The options in a results.json, and the version that wrote it, in words.

    Raises:
        ValueError: the file is not a results.json, or another script's.
    """
    named = f"--options {file}"
    remedy = "name the results.json of an earlier run"
    try:
        if not file.is_file():
            raise ValueError(f"{named} is {'a folder' if file.is_dir() else 'not a file'}; {remedy}")
        text = file.read_bytes()
    except OSError as error:
        raise ValueError(f"{named} cannot be read ({error.strerror}); {remedy}") from error
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{named} is damaged or not JSON ({error}); {remedy}") from error
    recorded = content.get("options") if isinstance(content, dict) else None
    mine, others = (set(_names(of)) for of in (TrainOptions, EvalOptions))
    here, there = "train.py", "eval.py"
    if options_class is not TrainOptions:
        mine, others, here, there = others, mine, there, here
    if not isinstance(recorded, dict) or not recorded.keys() & (mine ^ others):
        raise ValueError(f"{named} holds no options of train.py or eval.py; {remedy}")
    if len(recorded.keys() & (others - mine)) > len(recorded.keys() & (mine - others)):
        raise ValueError(f"{named} is from {there}, whose options {here} does not take; {remedy} of {here}")
    written = content.get("environment")
    written = written if isinstance(written, dict) else {}
    return recorded, "version {} ({})".format(*(written.get(name, "unknown") for name in ("version", "git")))


def _words(name: str, value: Any, action: argparse.Action) -> list[str]:
    """An option of a results.json as words of a command line.

    Raises:
        ValueError: the option cannot have this value.
    """
    switch, several = action.nargs == 0, action.nargs not in (None, 0)
    values = value if several and isinstance(value, list) else [value]
    kinds: dict[Any, tuple[type, ...]] = {int: (int,), float: (int, float), freeze_te: (int, type(None))}
    allowed = (bool,) if switch else kinds.get(action.type, (str,))
    counted = len(values) > 0 if action.nargs == "+" else len(values) == (action.nargs or 1)
    typed = all(isinstance(of, allowed) and isinstance(of, bool) == switch for of in values)
    flags = [of for of in values if isinstance(of, str) and of.startswith("-")] if len(values) > 1 else []
    if isinstance(value, list) != several or not counted or not typed or flags:
        raise ValueError(
            f"--{name} cannot be {json.dumps(value)[:60]}, as the file says; give --{name} on the command line"
        )
    if switch:
        return [flag for flag in (f"--{name}" if value else f"--no-{name}",) if flag in action.option_strings]
    words = ["none" if of is None else str(of) for of in values]
    return [f"--{name}={words[0]}"] if len(words) == 1 else [f"--{name}", *words]


def _given_in(recorded: dict[str, Any], options_class: type[Options], written_by: str) -> list[str]:
    """The options that a recorded run was given; if the file is too old to say, those that differ from the default.

    Raises:
        ValueError: the file is damaged, or names options that this version does not have.
    """
    defaults = _names(options_class)
    if "given" not in recorded:
        return [
            name
            for name, default in defaults.items()
            if name in recorded and recorded[name] != default and (recorded[name] is not None or name == "freeze_te")
        ]
    names = recorded["given"]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError('its "given" is not a list of options; use the file as it was written')
    if unknown := [json.dumps(name) for name in names if name not in defaults]:
        raise ValueError(
            f"that run, {written_by}, was given {', '.join(unknown)}, not an option of this version, "
            f'{version()}; remove it from "given" in the file'
        )
    if missing := [name for name in names if name not in recorded]:
        raise ValueError(f"--{missing[0]} was given but has no value; use the file as it was written")
    return list(dict.fromkeys(names))


def _taken(
    parser: _Parser,
    actions: dict[str, argparse.Action],
    options_class: type[Options],
    file: Path,
    said: Sequence[str],
) -> tuple[dict[str, Any], list[str]]:
    """What --options takes from a results.json, and lines for the log about it.

    Only options that the run was given are taken: the rest follows from them, the defaults and the checkpoint as it did
    then, and an option that was not given cannot conflict with others.

    Args:
        said: the options on the command line.

    Raises:
        ValueError: see `_read_results`, `_given_in` and `_words`.
    """
    recorded, written_by = _read_results(file, options_class)
    parser.source = f"--options {file}: "
    names = _given_in(recorded, options_class, written_by)
    others = [f"--{name}" for name in names if name in said]
    names = [name for name in names if name not in said]
    started_in = recorded.get("started_in")
    started_in = started_in if isinstance(started_in, str) else ""
    notes = []
    if options_class is TrainOptions and "resume" in names and isinstance(recorded["resume"], str):
        checkpoint = Path(started_in, recorded["resume"])
        if recorded["resume"] == "auto" or os.path.realpath(checkpoint.parent) == os.path.realpath(file.parent):
            names.remove("resume")
            notes.append(
                f"--resume {recorded['resume']} is left out: it resumed that run itself, which is now repeated from "
                "its start; use --resume=auto to resume it, or name with --resume any weights that it started from"
            )
    words = [word for name in names for word in _words(name, recorded[name], actions[name])]
    found, rest = parser.parse_known_args(words)
    assert not rest, rest
    taken = {name: tuple(value) if isinstance(value, list) else value for name, value in vars(found).items()}
    parser.source = ""

    line = f"options from {file}, {written_by}: {' '.join(f'--{name}' for name in taken) or 'none'}"
    line += ", those that differ from the default, since it does not say what was given" * ("given" not in recorded)
    notes.insert(0, line + f"; the command line overrides {' '.join(others)}" * bool(others))
    relative = [name for name, value in taken.items() if _is_relative(name, value)]
    if relative and not os.path.isdir(started_in):
        where = f"no folder {started_in}, where that run was started" if started_in else "it names no folder"
        notes.append(f"{where}: its relative paths start from the current one")
    elif relative and not os.path.samefile(started_in, "."):
        notes.append(f"its relative paths start from {started_in}, where that run was started")
        taken |= {name: _from(started_in, taken[name]) for name in relative}
    return taken, notes


def _is_relative(name: str, value: Any) -> bool:
    """Whether an option is a path, or several, relative to the folder in which a run is started."""
    if name in ("save_dir", "pca_dataset_folder"):  # below logs/, below --eval_datasets_folder
        return False
    if isinstance(value, tuple):
        return any(_is_relative(name, of) for of in value)
    if name == "resume":  # may be the name of released weights
        value = Path(value)
        return not value.is_absolute() and (value.suffix != "" or len(value.parts) > 1)
    return isinstance(value, Path) and not value.is_absolute()


def _from(folder: str, value: Any) -> Any:
    """A path, or each of several, relative to a folder."""
    return tuple(_from(folder, of) for of in value) if isinstance(value, tuple) else type(value)(Path(folder, value))


def _here() -> str:
    try:
        return os.getcwd()
    except OSError:  # it was removed
        return ""


def parse(options_class: type[AnyOptions], argv: Sequence[str] | None = None) -> AnyOptions:
    """Parses the command line (`sys.argv` when None); bad options print one message and exit with status 2."""
    parser = _Parser(
        description=options_class.__doc__,
        allow_abbrev=False,
        usage="%(prog)s [--option value ...]; %(prog)s --help lists all options",
    )
    parser.add_argument(
        "--version", action="version", version=f"%(prog)s {version()}", help="print the version and exit"
    )
    flags, several, actions, sections = ["--help", "--version"], [], {}, {}
    entries = {entry.name: entry for entry in fields(options_class) if entry.metadata}
    for title, name in ((title, name) for title, names in GROUPS.items() for name in names.split()):
        if (entry := entries.get(name)) is None:
            continue
        if title not in sections:
            sections[title] = parser.add_argument_group(title)
        settings = dict(entry.metadata)
        if "nargs" in settings:
            several.append(f"--{entry.name}")
        default = entry.default if entry.default_factory is MISSING else entry.default_factory()
        if isinstance(default, bool):
            settings["action"] = "store_true"
        else:
            if "action" not in settings:
                settings.setdefault("type", type(default))
            shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
            if options_class is EvalOptions and entry.name in OF_A_CHECKPOINT:
                shown = f"the checkpoint's, else {shown}"
            settings["help"] += f" (default: {shown})" if shown not in (None, "") else ""
        action = sections[title].add_argument(f"--{entry.name}", default=argparse.SUPPRESS, **settings)
        actions[entry.name] = action
        flags += action.option_strings
    given, unknown = parser.parse_known_args(argv)
    if find_spec("torch") is None:
        parser.error(f"{sys.executable} has no PyTorch; run `make .venv/ready` once, then `source .venv/bin/activate`")
    if unknown:
        if split := _split_values(unknown[0], sys.argv[1:] if argv is None else argv, several):
            parser.error(split)
        parser.error(_unknown(unknown, flags, EvalOptions if options_class is TrainOptions else TrainOptions))
    logger.disabled = parser.silent
    values: dict[str, Any] = vars(given)
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    # A shell does not expand a ~ after =; os.path leaves it if there is no such user.
    values = {name: _at_home(value) for name, value in values.items()}
    if isinstance(values.get("resume"), str):
        values["resume"] = os.path.expanduser(values["resume"])
    file, taken, notes = values.pop("options", None), dict[str, Any](), list[str]()
    try:
        if file is not None:
            taken, notes = _taken(parser, actions, options_class, file, tuple(values))
            values = {**taken, **values}
        return options_class(**values, options=file, given=tuple(values), notes=tuple(notes), started_in=_here())
    except ValueError as error:
        of_file = [f"--{name}" for name in taken if re.search(rf"--{name}\b", str(error))]
        of_file = [flag for flag in of_file if flag.removeprefix("--") not in given]
        parser.error(
            str(error)
            + f' ({" ".join(of_file)}: from --options {file}; to leave it out, remove it from "given" in a copy)'
            * bool(of_file)
        )
