"""The options of train.py and eval.py in groups, one a dataclass; the defaults are the released recipe.

The scripts read them before they import torch and the rest, which takes seconds: this file does without. It checks what
needs no file, ranges and contradictions. Defaults that depend on the checkpoint or the backbone stay None here.
"""

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from datasets.evaluation.layout import split_folder
from model.sizes import BACKBONES, MODEL_OPTIONS
from utils.run import options_file
from utils.system.command_line import Parser, folder_name, option, path

TEST_METHODS = ("hard_resize", "single_query", "central_crop", "five_crops", "nearest_crop", "maj_voting")
CORRUPTIONS = ("noise", "blur", "motion_blur", "jpeg", "brightness", "contrast", "fog", "occlusion")
PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
SUBMITTED = 20  # least images per query: the MSLS challenge scores the first 1, 5, 10 and 20
# What a map decides, and what needs more than a map.
NOT_OF_A_MAP = (
    "database_folder", "eval_dataset_name", "queries_names", "eval_split", "positives_file", "query_keys",
    "test_method", "encoder_context", "pca_dim", "index", "save_map", "save_submission", "save_assignments",
)  # fmt: skip
REMOVED = {
    "positive_frames": "give the distance in metres with --val_positive_dist_threshold",
    "context_seeds": "leave it out; recalls of random contexts are the mean of 5 orders",
    "context_shift": "leave it out; the first batch of the unaligned context has half of --infer_batch_size",
    "lr_end_factor": "leave it out; linear and cosine schedules end at 0",
    "options": "repeat a run with @logs/.../options.txt as the first word",
    "labels_where_known": "leave it out; plain folders are searched like this",
}


def freeze_te(text: str) -> int | None:
    """The value of --freeze_te: a number of blocks, or none."""
    return None if text == "none" else int(text)


def queries_name(text: str) -> str:
    """A folder of queries, with an optional `<dataset>:` in front."""
    dataset, colon, queries = text.rpartition(":")
    return (folder_name(dataset) if colon else "") + colon + folder_name(queries)


def corruption(text: str) -> str:
    """A kind of corruption, alone or with a severity."""
    if not re.fullmatch(f"({'|'.join(CORRUPTIONS)})(:[1-5])?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is none; use {', '.join(CORRUPTIONS)}, alone or with :1 to :5")
    return text


def accepted_distance(text: str) -> float:
    """A squared descriptor distance."""
    if text.startswith("auto@"):
        remedy = "give one of the distances that the log of --eval_split val names"
        raise argparse.ArgumentTypeError(f"auto@ was removed in 2.0.0: {remedy}")
    return float(text)


@dataclass(frozen=True, kw_only=True)
class EvalData:
    """The data to evaluate on."""

    eval_datasets_folder: Path = option(None, "folder that holds the evaluation datasets")
    eval_dataset_name: tuple[str, ...] = option(
        ("pitts30k",), "datasets: <eval_datasets_folder>/<name>/images/test/{database,queries}", type=folder_name
    )
    queries_names: tuple[str, ...] = option(
        ("queries",), "folders of queries beside the database; svox:queries_rain is for svox only", type=queries_name
    )
    eval_split: str = option("test", "split of the datasets to evaluate, e.g. val", type=folder_name)
    database_folder: Path | None = option(None, "plain folder of database photos, instead of a dataset")
    queries_folder: Path | None = option(None, "plain folder of query photos, for --database_folder or --map")
    map: Path | None = option(None, "file from --save_map to search instead of a database")
    no_labels: bool = option(False, "search without labels: photos need no positions, and no recall is computed")
    positives_file: Path | None = option(None, "file of each query's correct database images, instead of positions")
    query_keys: Path | None = option(None, "text file of query keys to evaluate only, e.g. the official ones of MSLS")
    query_corruptions: tuple[str, ...] = option(
        (), "evaluate the queries under these too, e.g. blur jpeg:3; without :1 to :5 all five", type=corruption
    )
    skip_unreadable: bool = option(False, "read all photos first, leave out those that cannot be read, and name them")
    val_positive_dist_threshold: float | None = option(None, "metres that are correct, else the dataset's own", above=0)

    @property
    def plain_folders(self) -> bool:
        """Whether two plain folders are searched instead of a dataset."""
        return self.database_folder is not None

    @property
    def photo_folders(self) -> list[Path]:
        """The folders whose photos are listed, with subfolders."""
        plain = [folder for folder in (self.database_folder, self.queries_folder) if folder is not None]
        names = self.eval_dataset_name
        return plain or [split_folder(self.eval_datasets_folder, name, self.eval_split) for name in names]

    def queries_of(self, dataset: str) -> tuple[str, ...]:
        """The query folders that are evaluated on a dataset's database."""
        named = [name.rpartition(":") for name in self.queries_names]
        return tuple(queries for of, _, queries in named if of in ("", dataset)) or ("queries",)


@dataclass(frozen=True, kw_only=True)
class TrainData:
    """The data to train, validate and test on."""

    eval_datasets_folder: Path = option(None, "folder that holds the evaluation datasets")
    eval_dataset_name: str = option("pitts30k", "dataset to validate and test on", type=folder_name)
    val_positive_dist_threshold: float = option(25.0, "metres within which a database image is correct", above=0)
    train_dataset_folder: tuple[Path, ...] | None = option(
        None, "GSV-Cities or folders like it; default gsv_cities there"
    )
    query_keys: Path | None = option(None, "text file of query keys: validate and test with only these queries")
    cities: tuple[str, ...] = option((), "cities to train on, from any of the folders; by default all")


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The model."""

    backbone: str = option(
        "dino", "dino is DINOv2 ViT-B/14, dinov3 is DINOv3 ViT-B/16; tiny is for demos and tests", choices=BACKBONES
    )
    backbone_blocks: int | None = option(None, "backbone blocks to keep, counted from the first; default all", least=1)
    supervlad_clusters: int = option(4, "clusters K in the SuperVLAD layer", least=1)
    ghost_clusters: int = option(1, "clusters that take part in the soft assignment and are then dropped", least=0)
    crossimage_encoder: bool = option(False, "add the encoder that attends across the images of a batch")

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of `model.build_model`; a checkpoint stores them too."""
        cut = self.backbone_blocks not in (None, BACKBONES[self.backbone].depth)
        values = {name: getattr(self, option) for name, option in MODEL_OPTIONS.items()}
        return {name: value for name, value in values.items() if cut or name != "backbone_blocks"}


@dataclass(frozen=True, kw_only=True)
class EvalModel(ModelOptions):
    """The model; where the checkpoint says what it is, that goes before a default."""

    resume: Path = option(None, "weights: a file, or SuperVLAD, SuperVLAD-CrossImage or 1-ClusterVLAD, downloaded")


@dataclass(frozen=True, kw_only=True)
class TrainModel(ModelOptions):
    """The model and its first weights."""

    resume: Path | None = option(
        None, "last_model.pth of a run to continue, or auto, the newest in --save_dir; other files are first weights"
    )
    foundation_model_path: Path | None = option(
        None, "official backbone weights, or a checkpoint to take the backbone from; default DINOv2's, downloaded"
    )


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """The evaluation protocol."""

    resize: tuple[int, int] | None = option(
        None, "height and width in pixels; default the checkpoint's, else 322 322 (DINOv3: 320 320)", least=1
    )
    antialias: bool = option(False, "antialias the resize (the published protocol does not)")
    infer_batch_size: int = option(16, "batch size of the cross-image encoder; it changes descriptors", least=1)
    recall_values: tuple[int, ...] = option((1, 5, 10, 20), "values of N for recall@N", least=1)


@dataclass(frozen=True, kw_only=True)
class EvalProtocol(Protocol):
    """The evaluation protocol."""

    antialias: bool | None = option(  # type: ignore[assignment]
        None, "antialias the resize; by default for plain folders only", action=argparse.BooleanOptionalAction
    )
    test_method: str | None = option(None, "how queries are prepared; default hard_resize", choices=TEST_METHODS)
    majority_weight: float = option(0.01, "weight of the crops' votes in maj_voting", least=0)
    encoder_context: tuple[str, ...] | None = option(
        None,
        "photos that share a batch in the encoder. file_order: neighbours by name (default for datasets); unaligned: "
        "the same, with query batches shifted; shuffled: random ones; paired: the same order for both sides; "
        "independent: none (default for plain folders)",
        choices=("file_order", "unaligned", "shuffled", "paired", "independent"),
    )
    pca_dim: int = option(0, "reduce descriptors to this many dimensions by PCA; 0 for no PCA", least=0)
    pca_whiten: bool = option(False, "scale the PCA's components to equal variance, and descriptors to unit norm again")
    pca_dataset_folder: Path | None = option(None, "folder below --eval_datasets_folder with images to fit the PCA on")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The training recipe."""

    train_batch_size: int = option(120, "places per batch, over all GPUs together", least=1)
    images_per_place: int = option(4, "images per place in a batch; places with fewer are left out", least=2)
    train_resize: tuple[int, int] = option((224, 224), "height and width of training images in pixels", least=1)
    randaugment_ops: int = option(3, "RandAugment operations per image; 0 for none", least=0)
    place_order: str = option(
        "fixed",
        "the same in all epochs, a new one in each, or from the second on such that similar places share a batch",
        choices=("fixed", "reshuffled", "similar"),
    )
    freeze_te: int | None = option(8, "train blocks from this index on, none: all of it", type=freeze_te, least=0)
    epochs_num: int = option(20, "most epochs; 0 saves and evaluates the initialised model", least=0)
    patience: int = option(3, "stop after this many epochs without a better validation R@1 + R@5", least=1)
    optim: str = option("adam", "optimiser", choices=("adam", "adamw", "sgd"))
    lr: float = option(5e-5, "peak learning rate", above=0)
    lr_encoder: float = option(1e-4, "learning rate of the cross-image encoder", above=0)
    lr_schedule: str = option(
        "halving",
        "halving: every third epoch; linear, cosine: to 0 by the last",
        choices=("halving", "linear", "cosine"),
    )
    warmup_steps: int = option(0, "warm-up steps before the schedule begins; 0 for none", least=0)
    weight_decay: float | None = option(None, "default the optimiser's: adam 0, adamw 9.5e-9, sgd 0.001", least=0)
    clip_grad_norm: float = option(0.0, "clip the L2 norm of all gradients together to this; 0 for none", least=0)
    encoder_training: str = option(
        "released", "train it in the first step only, or as the paper says in all", choices=("released", "every_step")
    )


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """The search."""

    index: str | None = option(
        None, "approximate search: a FAISS index, e.g. IVF4096,PQ64, or binary, which compares signs; default exact"
    )
    index_parameters: str = option("", "search parameters of a FAISS --index, e.g. nprobe=32")
    rerank: int = option(100, "images per query that --index binary ranks by exact distance", least=1)
    accept: float | None = option(
        None, "accept matches up to this squared_descriptor_distance", type=accepted_distance, above=0
    )
    efficient_ram_testing: bool = option(False, "accepted as in the released code: memory is always bounded")


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """What a run writes."""

    save_dir: Path = option(Path("default"), "results go to logs/<save_dir>/<time>, without logs/ if it is absolute")


@dataclass(frozen=True, kw_only=True)
class OutputOptions(Outputs):
    """What a run writes."""

    save_predictions: int = option(0, "matches of each query to show on a page; 0 for none", least=0)
    save_assignments: int = option(0, "queries whose soft assignment to clusters is drawn; 0 for none", least=0)
    save_descriptors: bool = option(False, "write descriptors and paths into the run's folder")
    save_submission: bool = option(False, "write the submission file of the MSLS challenge")
    save_pairs: int = option(0, "matches of each query in pairs.txt, for hloc and COLMAP; 0 for none", least=0)
    save_h5: bool = option(False, "write descriptors to global_descriptors.h5, in hloc's format; needs h5py")
    save_map: Path | None = option(None, "write the database's descriptors, paths and positions as .npz for --map")
    descriptors_folder: Path | None = option(None, "keep the backbone's output here, and reuse what is already there")
    descriptor_dtype: str = option("float32", "of descriptors on disk and in maps", choices=("float32", "float16"))


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Device, speed and memory."""

    device: str = option("auto", "auto is cuda if available, else cpu", choices=("auto", "cuda", "cpu", "mps"))
    precision: str = option("fp32", "of the backbone, or of the training step; published: fp32", choices=PRECISIONS)
    compile: bool = option(False, "compile the backbone with torch.compile; no faster on a CPU")
    num_workers: int | None = option(None, "threads (training: processes) that read; default by the cores", least=0)
    extraction_batch_size: int = option(0, "images in the backbone; 0 means 4 on a CPU and 16 elsewhere", least=0)
    seed: int = option(0, "seed of all random numbers", least=0)


@dataclass(frozen=True, kw_only=True)
class TrainMachine(Machine):
    """Device, speed and memory."""

    val_precision: str = option("fp32", "of the backbone in validation", choices=("fp32", "bf16", "fp16"))
    mixed_precision: bool = option(False, "the released code's name for --precision fp16")
    checkpoint_every: int = option(0, "steps between checkpoints within an epoch; 0 writes one per epoch", least=0)
    deterministic: bool = option(False, "repeat runs to the last bit on a GPU too, with slower kernels")
    activation_checkpointing: bool = option(False, "recompute activations in the backward pass instead of keeping them")
    grad_cache_chunk: int = option(0, "images whose activations the backward pass keeps at a time; 0 for all", least=0)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the options of both scripts share; each adds its groups."""

    given: tuple[str, ...] = field(default=(), compare=False)  # names of the options set, here or in @FILE
    notes: tuple[str, ...] = field(default=(), compare=False)  # for the log: what has no effect or was left out

    @classmethod
    def groups(cls) -> dict[str, Any]:
        """The classes of the groups by name."""
        return {entry.name: entry.type for entry in fields(cls) if entry.name not in ("given", "notes")}

    @property
    def flat(self) -> dict[str, Any]:
        """Every option by its name, and `given`."""
        groups = [vars(getattr(self, name)) for name in self.groups()]
        return {name: value for group in groups for name, value in group.items()} | {"given": self.given}


@dataclass(frozen=True, kw_only=True)
class EvalOptions(Options):
    """Options of eval.py."""

    data: EvalData = EvalData()
    model: EvalModel = EvalModel()
    protocol: EvalProtocol = EvalProtocol()
    search: SearchOptions = SearchOptions()
    outputs: OutputOptions = OutputOptions()
    machine: Machine = Machine()

    def contradictions(self) -> Iterator[str]:
        """What cannot be done, each with a remedy."""
        data, protocol, search, outputs = self.data, self.protocol, self.search, self.outputs
        folders = data.plain_folders or data.map is not None
        if data.eval_datasets_folder is None and (not folders or protocol.pca_dim):
            yield "--eval_datasets_folder is missing; name the folder of the datasets, or give --database_folder"
        if self.model.resume is None:
            yield "--resume is missing; name the checkpoint to evaluate"
        if data.map is not None and (foreign := [f"--{name}" for name in NOT_OF_A_MAP if name in self.given]):
            yield f"{' and '.join(foreign)} cannot be used with --map, which has its own database; leave one out"
        if folders != (data.queries_folder is not None):
            yield "--queries_folder and --database_folder (or --map) go together; give both"
        labels = {"no_labels", "positives_file", "val_positive_dist_threshold"} & {*self.given}
        if len(labels) > 1:
            yield f"--{' and --'.join(sorted(labels))} each define what is correct; give one of them"
        for name in data.queries_names:
            if ":" in name and name.rpartition(":")[0] not in data.eval_dataset_name:
                yield f"--queries_names {name} is of a dataset that is not among --eval_dataset_name; add it there"
        sets = [data.queries_of(name) for name in data.eval_dataset_name]
        if not folders and (data.positives_file or data.query_keys) and (len(sets) > 1 or len(sets[0]) > 1):
            yield "--positives_file and --query_keys are of one set; give one --eval_dataset_name and --queries_names"
        if not folders and outputs.save_map is not None and len(sets) > 1:
            yield "--save_map writes the map of one dataset; give one --eval_dataset_name"
        contexts = protocol.encoder_context or ()
        names = [("queries_names", each) for each in sets]
        for name, each in [*names, ("eval_dataset_name", data.eval_dataset_name), ("encoder_context", contexts)]:
            if len({*each}) < len(each):
                yield f"--{name} {' '.join(each)} names one twice; name each once"
        if data.no_labels and (len(contexts) > 1 or "paired" in contexts):
            yield f"--encoder_context {' '.join(contexts)} needs labels; leave out --no_labels, or give one other"
        if protocol.pca_dim and protocol.pca_dataset_folder is None:
            yield f"--pca_dim {protocol.pca_dim} needs images to fit the PCA on; give --pca_dataset_folder"
        shown, depth = max(outputs.save_predictions, outputs.save_pairs), max(protocol.recall_values)
        wanted = max(shown, SUBMITTED * outputs.save_submission)
        if protocol.test_method == "maj_voting" and depth < wanted:
            yield f"--test_method maj_voting finds only {depth} images; give --recall_values up to {wanted}"
        if protocol.test_method == "maj_voting" and search.accept is not None:
            yield f"--accept {search.accept}: votes lower the distances; use another --test_method, e.g. nearest_crop"
        if search.index == "binary" and search.rerank < max(depth, shown):
            yield f"--rerank {search.rerank} is less than the {max(depth, shown)} images asked for; use more"
        if outputs.save_submission and (data.skip_unreadable or search.index is not None):
            yield "--save_submission needs all images of all queries; leave out --skip_unreadable and --index"

    def unmet_needs(self) -> dict[str, str]:
        """What options would need to have an effect; "" where it is given."""
        protocol, index = self.protocol, self.search.index
        trees = not self.data.plain_folders and self.data.map is None
        return {
            "pca_whiten pca_dataset_folder": "" if protocol.pca_dim else "--pca_dim",
            "majority_weight": "" if protocol.test_method == "maj_voting" else "--test_method maj_voting",
            "rerank": "" if index == "binary" else "--index binary",
            "index_parameters": "" if index not in (None, "binary") else "a FAISS --index",
            "eval_dataset_name queries_names eval_split": "" if trees else "a dataset",
            "eval_datasets_folder": "" if trees or protocol.pca_dim else "a dataset",
        }


@dataclass(frozen=True, kw_only=True)
class TrainOptions(Options):
    """Options of train.py."""

    data: TrainData = TrainData()
    model: TrainModel = TrainModel()
    protocol: Protocol = Protocol()
    recipe: Recipe = Recipe()
    outputs: Outputs = Outputs()
    machine: TrainMachine = TrainMachine()

    def contradictions(self) -> Iterator[str]:
        """What cannot be done, each with a remedy."""
        machine = self.machine
        if self.data.eval_datasets_folder is None:
            yield "--eval_datasets_folder is missing; name the folder that holds the evaluation datasets"
        if len({*self.data.cities}) < len(self.data.cities):
            yield f"--cities {' '.join(self.data.cities)} names one twice; name each once"
        if machine.mixed_precision and machine.precision not in ("fp32", "fp16"):
            yield f"--mixed_precision means --precision fp16, not {machine.precision}; give only one of them"

    def unmet_needs(self) -> dict[str, str]:
        """What options would need to have an effect; "" where it is given."""
        return {
            "lr_encoder encoder_training": "" if self.model.crossimage_encoder else "--crossimage_encoder",
            "foundation_model_path": "" if self.model.resume in (None, Path("auto")) else "no --resume of weights",
            "place_order": "" if self.recipe.epochs_num != 1 else "a second epoch",
        }


AnyOptions = TypeVar("AnyOptions", EvalOptions, TrainOptions)


def parse(options_class: type[AnyOptions], argv: Sequence[str] | None = None) -> AnyOptions:
    """Parses the command line (`sys.argv` when None); bad options print one message and exit with status 2."""
    others, script = (TrainOptions, "train.py") if options_class is EvalOptions else (EvalOptions, "eval.py")
    names = [entry.name for group in others.groups().values() for entry in fields(group)]
    hints = dict.fromkeys(names, f"it is an option of {script}")
    parser = Parser(
        description=f"{options_class.__doc__} The first word @logs/.../options.txt repeats a run; the last word wins.",
        usage="%(prog)s [--option value ...]; %(prog)s --help lists all options",
        hints=hints | {name: f"it was removed in 2.0.0: {instead}" for name, instead in REMOVED.items()},
    )
    for group in options_class.groups().values():
        parser.add_group(group)
    words, given, notes = list(sys.argv[1:] if argv is None else argv), dict[str, Any](), list[str]()
    if words and words[0].startswith("@"):
        try:
            given, notes = options_file.read(path(words.pop(0)[1:]), parser.parse)
        except ValueError as error:
            parser.error(str(error))
    given |= vars(parser.parse(words))
    if find_spec("torch") is None:
        parser.error(f"{sys.executable} has no PyTorch; run `make .venv/ready` once, then `source .venv/bin/activate`")
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    groups = {
        name: group(**{entry.name: values[entry.name] for entry in fields(group) if entry.name in values})
        for name, group in options_class.groups().items()
    }
    options = options_class(**groups, given=tuple(given))
    for contradiction in options.contradictions():
        parser.error(contradiction)
    needs = [(name, what) for names, what in options.unmet_needs().items() if what for name in names.split()]
    if idle := [f"--{name} (needs {what})" for name, what in needs if name in given]:
        notes.append(f"without effect: {', '.join(idle)}")
    return replace(options, notes=tuple(notes))
