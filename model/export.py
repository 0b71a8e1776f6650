"""Writes a checkpoint for programs without this repository: ONNX, or safetensors.

    python -m model.export --resume SuperVLAD --resize 322 322 --output supervlad.onnx
    python -m model.export --resume best_model.pth --output supervlad.safetensors

The ONNX file takes `images`, B x 3 x H x W in [0, 1] with ImageNet's mean and standard deviation taken out, of any B
and of the one size that it was written for, and gives `descriptors`, B x K*D. It is compared with PyTorch before it is
put into place.
The safetensors file is another form of the checkpoint, which eval.py and train.py read.
With `--pca`, the model ends with the PCA that `eval.py --pca_dim` fitted on its descriptors: they have fewer numbers,
and unit norm again; metadata say it as `pca`, and eval.py applies it without being asked.
Both carry as metadata, in JSON, what the model is (`model`) and how photos become images: `resize` (height and width),
`antialias`, `upright` (turned as EXIF says), `mean` and `std`; by default as the checkpoint says, if it was exported,
else as eval.py prepares those of plain folders, which follows a safetensors file in turn. `validated_at` is the size at
which the model was validated, where that is known.
With the cross-image encoder the images of a batch look at each other: a descriptor depends on them.
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
    """The version of this repository; "unknown" where the file that holds it was left behind."""
    try:
        return (Path(__file__).parents[1] / "VERSION").read_text().strip()
    except OSError:
        return "unknown"


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line; a mistake in it ends the program with status 2."""
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
            help="height and width of the images; by default the file's own, else the backbone's, 322 322 or 320 320",
        ),
        parser.add_argument(
            "--antialias", action=either, help="how photos are to be resized; by default the file's own, else so"
        ),
        parser.add_argument(
            "--upright", action=either, help="whether EXIF turns photos; by default the file's own, else so"
        ),
        parser.add_argument(
            "--pca", type=Path, help="the pca.pth of an evaluation with --pca_dim, to become the model's last part"
        ),
        parser.add_argument("--backbone", choices=tuple(BACKBONES), help="by default the file's own, else dino"),
        parser.add_argument(
            "--backbone_blocks",
            type=int,
            help="blocks of the backbone, the first ones; by default the file's own, else all",
        ),
        parser.add_argument("--supervlad_clusters", type=int, help="by default the file's own, else 4"),
        parser.add_argument("--ghost_clusters", type=int, help="by default the file's own, else 1"),
        parser.add_argument(
            "--crossimage_encoder", action="store_true", default=None, help="if the file does not tell"
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
        parser.error(f"--output {found.output} is neither .onnx nor .safetensors; name it one of the two")
    if not found.output.parent.is_dir():
        parser.error(f"--output {found.output}: there is no folder {found.output.parent}; make it first")
    if not os.access(found.output.parent, os.W_OK | os.X_OK):
        parser.error(f"--output {found.output}: {found.output.parent} may not be written to; name another folder")
    if found.resize and (found.backbone or not found.resume.is_file()):  # else the file says of which backbone it is
        try:
            require_patches("--resize", found.resize, BACKBONES[found.backbone or "dino"])
        except ValueError as error:
            parser.error(str(error))
    return found


_stopped: list[int] = []  # by which signal; where PyTorch imports itself it makes other errors of SystemExit


def _leave(signum: int, _: FrameType | None) -> None:
    _stopped.append(signum)
    for other in (signal.SIGINT, signal.SIGTERM):
        signal.signal(other, signal.SIG_IGN)  # a second one would come between what is cleaned up
    raise SystemExit(128 + signum)


def _leave_if_stopped() -> None:
    if _stopped:
        raise SystemExit(128 + _stopped[0])


@contextmanager
def _left_on_signals() -> Iterator[None]:
    """Within the block Ctrl-C and SIGTERM end the program with 130 and 143, once temporary folders are gone."""
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
    arguments()  # before the seconds of importing the rest: a mistake is answered at once

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

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, which are taken out of photos in [0, 1]
RELEASED_SIZE = (322, 322)  # at which the released models were validated
TOLERANCE = 1e-4  # between a number of a descriptor from ONNX Runtime and from PyTorch
ONE_FILE = 1_800_000_000  # bytes of weights; what is larger goes into a second file, since protobuf ends at 2 GiB


def export_onnx(model: SuperVLADNet, path: Path, *, size: tuple[int, int], metadata: dict[str, str]) -> float:
    """Writes a model in evaluation mode as ONNX with a dynamic batch.

    Args:
        model: on the CPU.
        path: to write; a model of 1.8 GB and more keeps its weights in `<path>.data` beside it.
        size: height and width of the images, in pixels; a position embedding is resampled for it here.
        metadata: plain text, goes into the file.

    Returns:
        The largest difference between the descriptors of ONNX Runtime and of PyTorch, over batches of 1 and 3 images.

    Raises:
        ValueError: that difference is above 1e-4, or a package is missing; nothing is written.
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
        path.with_name(path.name + ".data").unlink(missing_ok=True)  # of a larger model that was here before
        for file in sorted(Path(name).iterdir(), reverse=True):  # the data, if any, before what refers to it
            file.replace(path.parent / file.name)
    return difference


@contextmanager
def _resampled_positions(backbone: DINOv2 | DINOv3, size: tuple[int, int]) -> Iterator[None]:
    """Within the block the position embedding of a DINOv2 is a constant, resampled for `size`; DINOv3 has none."""
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
        model: whose state dict is written.
        path: to write.
        metadata: plain text, goes into the file; `model`, as JSON, is what `build_model` takes.

    Returns:
        The largest difference between a weight read back and the model's, which is 0.

    Raises:
        ValueError: it is not, or the package is missing; nothing is written.
    """
    save: Callable[..., bytes] = _needed("safetensors.torch", "pip install safetensors").save
    content = save({name: value.contiguous() for name, value in model.state_dict().items()}, metadata)
    with tempfile.TemporaryDirectory(dir=path.parent) as name:
        written = Path(name) / path.name
        written.write_bytes(content)  # safetensors' own way of writing a file makes it its owner's alone
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
        raise ValueError(f"this export takes the package {name}, which is missing; {remedy}") from error


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Returns:
        The exit status, 0; raised as SystemExit are 2 for bad input, and 130 and 143 for Ctrl-C and SIGTERM.
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
                    f"WARNING: the model was validated at {numbers}, and is exported at {height} {width}",
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
                line = f"a PCA leaves {model.descriptor_dim} of {model.vectors_dim} numbers{whitened}, of unit norm"
                # What the encoder sees beside a photo changes the descriptors that a PCA is fitted on.
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
    """Says what is not known of a PCA, or is not what the export is for."""
    if "weights" not in pca:
        print(f"WARNING: {path} does not say which weights it was fitted on; are they these?", file=sys.stderr)
    fitted = tuple(pca.get("resize", size))
    if fitted != size:
        numbers, exported = (" ".join(map(str, sides)) for sides in (fitted, size))
        print(f"WARNING: {path} was fitted on images of {numbers}, and the export is for {exported}", file=sys.stderr)


def _write(model: SuperVLADNet, path: Path, *, size: tuple[int, int], metadata: dict[str, str]) -> None:
    try:
        if path.suffix.lower() == ".onnx":
            difference = export_onnx(model, path, size=size, metadata=metadata)
            print(f"{path}: descriptors differ by {difference:.1e} at most from PyTorch's")
            if model.encoder is not None:
                print("the encoder looks across a batch: batches of one give what eval.py gives for plain folders")
        else:
            difference = export_safetensors(model, path, metadata=metadata)
            print(f"{path}: weights read back, largest difference {difference:g}")
    except ValueError:
        raise
    except OSError as error:
        raise ValueError(
            f"--output {path} could not be written ({error.strerror or error}); free space, or name another folder"
        ) from error
    except Exception as error:  # the exporter and ONNX Runtime have exceptions of their own, of many lines
        told = str(error.__cause__ or error).strip().partition("\n")[0]
        told = re.sub(r"\x1b\[[0-9;]*m", "", told) or type(error).__name__
        raise ValueError(
            f"{path} was not written: the exporter failed ({told}); use other versions of torch, "
            "onnxscript or onnxruntime"
        ) from error


if __name__ == "__main__":
    sys.exit(main())
