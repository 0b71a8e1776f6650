"""Exports a checkpoint as ONNX or safetensors, for programs without this repository.

    python -m model.export --resume SuperVLAD --resize 322 322 --output supervlad.onnx
    python -m model.export --resume best_model.pth --output supervlad.safetensors

The ONNX file takes `images`, B x 3 x H x W in [0, 1] normalised by ImageNet's mean and standard deviation, with any B
but only the size that it was exported for, and returns `descriptors`, B x K*D. It is compared with PyTorch before it
is put into place.
The safetensors file is another form of the checkpoint, which eval.py and train.py read.
With `--pca`, the model ends with the PCA that `eval.py --pca_dim` fitted on its descriptors: they have fewer
dimensions, and unit norm again; the metadata have it as `pca`, and eval.py applies it without being asked.
Both files store as JSON metadata the options of the model (`model`) and how photos are prepared: `resize` (height and
width), `antialias`, `upright` (turned as EXIF says), `mean` and `std`. The defaults are those of the checkpoint, if it
was exported, else those of eval.py for plain folders; eval.py in turn follows a safetensors file. `validated_at` is the
size at which the model was validated, if known.
With the cross-image encoder, a descriptor depends on the other images in the batch.
"""

import argparse
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from types import FrameType
from typing import Any

from .sizes import BACKBONES, require_patches


def version() -> str:
    """The version of this repository; "unknown" if the file VERSION is missing."""
    try:
        return (Path(__file__).parents[1] / "VERSION").read_text().strip()
    except OSError:
        return "unknown"


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line; an error in it ends the program with status 2."""
    parser = argparse.ArgumentParser(
        prog="python -m model.export",
        usage="%(prog)s --resume FILE --output FILE [--option value ...]; --help lists all options",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    either = argparse.BooleanOptionalAction
    added = [
        parser.add_argument(
            "--version", action="version", version=f"%(prog)s {version()}", help="print this repository's and exit"
        ),
        parser.add_argument("--resume", type=Path, help="checkpoint: a file, or the name of a released one"),
        parser.add_argument("--output", type=Path, help="file to write, .onnx or .safetensors"),
        parser.add_argument(
            "--resize",
            type=int,
            nargs=2,
            help="height and width of the images; by default as the file says, else the backbone's, 322 322 or 320 320",
        ),
        parser.add_argument(
            "--antialias", action=either, help="whether to antialias the resize; by default as the file says, else yes"
        ),
        parser.add_argument(
            "--upright",
            action=either,
            help="whether to turn photos as EXIF says; by default as the file says, else yes",
        ),
        parser.add_argument(
            "--pca", type=Path, help="pca.pth of an evaluation with --pca_dim, to add as the last part of the model"
        ),
        parser.add_argument(
            "--backbone", choices=tuple(BACKBONES), help="backbone; by default as the file says, else dino"
        ),
        parser.add_argument(
            "--backbone_blocks",
            type=int,
            help="number of backbone blocks, counted from the first; by default as the file says, else all",
        ),
        parser.add_argument("--supervlad_clusters", type=int, help="clusters K; by default as the file says, else 4"),
        parser.add_argument("--ghost_clusters", type=int, help="ghost clusters; by default as the file says, else 1"),
        parser.add_argument(
            "--crossimage_encoder",
            action="store_true",
            default=None,
            help="the model has the encoder across the batch; only needed if the file does not say so",
        ),
    ]
    found, unknown = parser.parse_known_args(argv)
    if unknown:
        near = get_close_matches(unknown[0].split("=")[0], [flag for a in added for flag in a.option_strings], n=1)
        parser.error(f"unknown option {unknown[0]}" + "".join(f", did you mean {flag}?" for flag in near))
    missing = [f"--{name}" for name in ("resume", "output") if getattr(found, name) is None]
    if missing:
        parser.error(f"{' and '.join(missing)} missing; name the checkpoint to read and the file to write")
    if found.output.is_dir():
        parser.error(f"--output {found.output} is a folder; name a file in it, .onnx or .safetensors")
    if found.output.suffix.lower() not in (".onnx", ".safetensors"):
        parser.error(f"--output {found.output} is neither .onnx nor .safetensors; use one of the two suffixes")
    if not found.output.parent.is_dir():
        parser.error(f"--output {found.output}: there is no folder {found.output.parent}; create it first")
    if not os.access(found.output.parent, os.W_OK | os.X_OK):
        parser.error(f"--output {found.output}: {found.output.parent} is not writable; name another folder")
    if found.resize and (found.backbone or not found.resume.is_file()):  # else the file names the backbone
        try:
            require_patches("--resize", found.resize, BACKBONES[found.backbone or "dino"])
        except ValueError as error:
            parser.error(str(error))
    return found


_stopped: list[int] = []  # the signal; during its own import PyTorch turns SystemExit into other errors


def _leave(signum: int, _: FrameType | None) -> None:
    _stopped.append(signum)
    for other in (signal.SIGINT, signal.SIGTERM):
        signal.signal(other, signal.SIG_IGN)  # a second one would interrupt the clean-up
    raise SystemExit(128 + signum)


def _leave_if_stopped() -> None:
    if _stopped:
        raise SystemExit(128 + _stopped[0])


@contextmanager
def _left_on_signals() -> Iterator[None]:
    """Within the block, Ctrl-C and SIGTERM remove temporary folders and end the program with status 130 and 143."""
    previous = {signum: signal.signal(signum, _leave) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
        _stopped.clear()


if __name__ == "__main__":
    for _signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(_signum, _leave)
    arguments()  # before the slow imports, so that an error is reported at once

import importlib
import json
import tempfile
import warnings

import torch
from torch import Tensor

from . import build_model
from .dinov2 import DINOv2
from .dinov3 import DINOv3
from .network import SuperVLADNet
from .weights import (
    RELEASED,
    find_checkpoint,
    load_checkpoint,
    load_projection,
    model_of,
    pca_of,
    preparation_of,
    read_file,
    size_of,
    validated_size_of,
)

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, to normalise photos in [0, 1]
RELEASED_SIZE = (322, 322)  # the released models were validated at this size
TOLERANCE = 1e-4  # largest difference in a descriptor between ONNX Runtime and PyTorch
ONE_FILE = 1_800_000_000  # bytes of weights; larger models need a second file, since protobuf is limited to 2 GiB


def export_onnx(model: SuperVLADNet, path: Path, *, size: tuple[int, int], metadata: dict[str, str]) -> float:
    """Writes a model in evaluation mode as ONNX with a dynamic batch size.

    Args:
        model: the model, on the CPU.
        path: file to write; a model of 1.8 GB or more keeps its weights beside it, in `<path>.data`.
        size: height and width of the images in pixels; the position embedding is resampled for it here.
        metadata: plain text to store in the file.

    Returns:
        The largest difference between the descriptors of ONNX Runtime and PyTorch, over batches of 1 and 3 images.

    Raises:
        ValueError: the difference is above 1e-4, or a package is missing; nothing is written.
    """
    ort, *_ = (_needed(name, "pip install onnx onnxscript onnxruntime") for name in ("onnxruntime", "onnxscript"))
    height, width = size
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(count, 3, height, width, generator=generator) for count in (3, 1)]
    with tempfile.TemporaryDirectory(dir=path.parent) as name, torch.no_grad():
        written = Path(name) / path.name
        with _resampled_positions(model.backbone, size), warnings.catch_warnings(action="ignore"):  # the exporter's own
            program = torch.onnx.export(
                model,
                (batches[0],),
                dynamo=True,
                input_names=["images"],
                output_names=["descriptors"],
                dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
                verbose=False,
            )
        assert program is not None
        program.model.metadata_props.update(metadata)
        weights = sum(value.numel() * value.element_size() for value in model.state_dict().values())
        program.save(written, external_data=weights > ONE_FILE)
        session = ort.InferenceSession(str(written), providers=["CPUExecutionProvider"])
        differences = [
            torch.from_numpy(session.run(["descriptors"], {"images": images.numpy()})[0]) - model(images)
            for images in batches
        ]
        difference = torch.cat(differences).abs().max().item()
        if not difference <= TOLERANCE:
            raise ValueError(
                f"{path} was not written: its descriptors differ by {difference:.1e} from PyTorch's, and "
                f"{TOLERANCE:.0e} is allowed; use other versions of torch, onnxscript or onnxruntime"
            )
        _leave_if_stopped()
        path.with_name(path.name + ".data").unlink(missing_ok=True)  # left by a larger model
        for file in sorted(Path(name).iterdir(), reverse=True):  # the data, if any, before the file that refers to it
            file.replace(path.parent / file.name)
    return difference


@contextmanager
def _resampled_positions(backbone: DINOv2 | DINOv3, size: tuple[int, int]) -> Iterator[None]:
    """Within the block, the position embedding of a DINOv2 is a constant, resampled for `size`; DINOv3 has none."""
    if not isinstance(backbone, DINOv2):
        yield
        return
    height, width = (side // backbone.size.patch_size for side in size)
    positions = backbone.position_embedding(height, width)
    backbone.position_embedding = lambda h, w: positions  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del backbone.position_embedding


def export_safetensors(model: SuperVLADNet, path: Path, *, metadata: dict[str, str]) -> float:
    """Writes a model's weights as safetensors, and reads them back.

    Args:
        model: the model whose state dict is written.
        path: file to write.
        metadata: plain text to store in the file; `model` holds the arguments of `build_model` as JSON.

    Returns:
        The largest difference between a weight read back and the model's, which is 0.

    Raises:
        ValueError: the difference is not 0, or the package is missing; nothing is written.
    """
    save: Callable[..., bytes] = _needed("safetensors.torch", "pip install safetensors").save
    content = save({name: value.contiguous() for name, value in model.state_dict().items()}, metadata)
    with tempfile.TemporaryDirectory(dir=path.parent) as name:
        written = Path(name) / path.name
        written.write_bytes(content)  # safetensors itself writes files that only their owner can read
        state: dict[str, Tensor] = read_file(written)["model_state_dict"]
        differences = [(value - state[name]).abs().max() for name, value in model.state_dict().items()]
        difference = torch.stack(differences).max().item()
        if difference != 0:
            raise ValueError(f"{path} was not written: weights read back differ by {difference:.1e}; try again")
        _leave_if_stopped()
        written.replace(path)
    return difference


def _needed(package: str, remedy: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        name = package.split(".")[0]
        raise ValueError(f"this export needs the package {name}, which is missing; {remedy}") from error


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Returns:
        The exit status 0. SystemExit is raised with 2 for bad input, and with 130 and 143 for Ctrl-C and SIGTERM.
    """
    options = arguments(argv)
    with _left_on_signals():
        try:
            path = find_checkpoint(options.resume)
            content = read_file(path)
            asked = {
                "backbone": options.backbone,
                "backbone_blocks": options.backbone_blocks,
                "clusters": options.supervlad_clusters,
                "ghost_clusters": options.ghost_clusters,
                "crossimage_encoder": options.crossimage_encoder,
            }
            settings = {**model_of(options.resume, content), **{k: v for k, v in asked.items() if v is not None}}
            settings = {"backbone": "dino", "clusters": 4, "ghost_clusters": 1, "crossimage_encoder": False, **settings}
            model = build_model(**settings).eval()
            backbone = model.backbone.size
            if options.resize:
                require_patches("--resize", options.resize, backbone)
            load_checkpoint(model, path, content)
            pca = pca_of(content) if options.pca is None else load_projection(model, options.pca)
            validated_at = validated_size_of(content, settings["backbone"])
            if str(options.resume) in RELEASED and path != options.resume:
                validated_at = RELEASED_SIZE
            written = size_of(content, settings["backbone"]) or validated_at
            size = tuple(options.resize or written or (backbone.side, backbone.side))
            height, width = size
            if validated_at not in (None, size):
                numbers = " ".join(map(str, validated_at))
                print(
                    f"WARNING: the model was validated at {numbers}, but is exported at {height} {width}",
                    file=sys.stderr,
                )
            elif validated_at is None:
                print(f"{path} does not say at which size it was validated; exported at {height} {width} (--resize)")
            preparation = {"antialias": True, "upright": True, **preparation_of(content)}
            preparation |= {name: getattr(options, name) for name in preparation if getattr(options, name) is not None}
            facts = {**preparation, "resize": size, "mean": MEAN, "std": STD}
            if validated_at is not None:
                facts["validated_at"] = validated_at
            if options.pca is not None and pca is not None:
                _warn_of_pca(options.pca, pca, size)
            if pca is not None:
                facts["pca"] = pca
                whitened = ", whitened" * bool(pca.get("whiten"))
                line = f"a PCA leaves {model.descriptor_dim} of {model.vectors_dim} dimensions{whitened}, of unit norm"
                # With the encoder, the context changes the descriptors that a PCA is fitted on.
                print(line + f"; fitted in --encoder_context {pca.get('context')}" * (model.encoder is not None))
            metadata = {"model": json.dumps(settings), "source": path.name}
            metadata |= {name: json.dumps(value) for name, value in facts.items()}
            _write(model, options.output, size=size, metadata=metadata)
        except (ValueError, OSError) as error:
            _leave_if_stopped()
            print(f"ERROR: {error}", file=sys.stderr)
            raise SystemExit(2) from None
    return 0


def _warn_of_pca(path: Path, pca: dict[str, Any], size: tuple[int, int]) -> None:
    """Warns where the weights or the image size of a PCA are unknown, or differ from the export's."""
    if "weights" not in pca:
        print(
            f"WARNING: {path} does not say which weights it was fitted on; check that they are these", file=sys.stderr
        )
    fitted = tuple(pca.get("resize", size))
    if fitted != size:
        numbers, exported = (" ".join(map(str, sides)) for sides in (fitted, size))
        print(f"WARNING: {path} was fitted on images of {numbers}, but the export is for {exported}", file=sys.stderr)


def _write(model: SuperVLADNet, path: Path, *, size: tuple[int, int], metadata: dict[str, str]) -> None:
    try:
        if path.suffix.lower() == ".onnx":
            difference = export_onnx(model, path, size=size, metadata=metadata)
            print(f"{path}: descriptors differ from PyTorch's by at most {difference:.1e}")
            if model.encoder is not None:
                print("the encoder attends across the batch: batches of one match eval.py on plain folders")
        else:
            difference = export_safetensors(model, path, metadata=metadata)
            print(f"{path}: weights read back, largest difference {difference:g}")
    except ValueError:
        raise
    except OSError as error:
        raise ValueError(
            f"--output {path} could not be written ({error.strerror or error}); free space, or name another folder"
        ) from error
    except Exception as error:  # the exporter and ONNX Runtime raise their own exceptions, with long messages
        told = str(error.__cause__ or error).strip().partition("\n")[0]
        told = re.sub(r"\x1b\[[0-9;]*m", "", told) or type(error).__name__
        raise ValueError(
            f"{path} was not written: the exporter failed ({told}); use other versions of torch, "
            "onnxscript or onnxruntime"
        ) from error


if __name__ == "__main__":
    sys.exit(main())
