"""Exports a checkpoint as ONNX or safetensors, for programs without this repository.

    python -m model.export --resume SuperVLAD --resize 322 322 --output supervlad.onnx
    python -m model.export --resume best_model.pth --output supervlad.safetensors

The ONNX file takes `images`, B x 3 x H x W in [0, 1] normalised by ImageNet's mean and standard deviation, with any B
but only the size that it was exported for, and returns `descriptors`, B x K*D (with the cross-image encoder, each
depends on the whole batch). It is compared with PyTorch before it is put into place. The safetensors file is another
form of the checkpoint, which eval.py and train.py read.
Both store as JSON metadata the options of the model (`model`), how photos are prepared (`resize`, height and width;
`antialias`; `upright`; `mean`; `std`), and, if known, `validated_at`, the size, and what the PCA was fitted on (`pca`).
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.system.command_line import Parser, option, with_dashes
from utils.system.files import atomic_write
from utils.system.signals import left_on_signals

from .sizes import BACKBONES, MODEL_OPTIONS, require_patches

if TYPE_CHECKING:
    from .network import SuperVLADNet

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, to normalise photos in [0, 1]
RELEASED_SIZE = (322, 322)  # the released models were validated at this size


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Export; by default a model is as its file says, else as released."""

    resume: Path = option(None, "checkpoint: a file, or the name of a released one")
    output: Path = option(None, "file to write, .onnx or .safetensors")
    resize: tuple[int, int] | None = option(None, "height and width of the images; else the backbone's own")
    antialias: bool | None = option(None, "antialias the resize; else yes", action=argparse.BooleanOptionalAction)
    upright: bool | None = option(None, "turn photos as EXIF says; else yes", action=argparse.BooleanOptionalAction)
    pca: Path | None = option(None, "pca.pth of eval.py --pca_dim, as the last part; descriptors get unit norm")
    backbone: str | None = option(None, "backbone; else dino", choices=tuple(BACKBONES))
    backbone_blocks: int | None = option(None, "backbone blocks to keep, counted from the first; else all")
    supervlad_clusters: int | None = option(None, "clusters K; else 4")
    ghost_clusters: int | None = option(None, "ghost clusters; else 1")
    crossimage_encoder: bool | None = option(None, "the model has the encoder; only needed if its file does not say so")
    int8: bool = option(False, ".onnx with weights of 8 bits, a quarter of the size, refused below a cosine of 0.99")


def arguments(argv: Sequence[str] | None = None) -> ExportOptions:
    """Reads the command line; an error in it ends the program with status 2."""
    usage = "%(prog)s --resume FILE --output FILE [--option value ...]; --help lists all options"
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="python -m model.export", usage=usage, description=__doc__, formatter_class=raw)
    parser.add_group(ExportOptions)
    given = ExportOptions(**vars(parser.parse(argv)))
    if missing := [f"--{name}" for name in ("resume", "output") if vars(given)[name] is None]:
        parser.error(f"{' and '.join(missing)} missing; name the checkpoint to read and the file to write")
    output = given.output
    if output.suffix.lower() not in (".onnx", ".safetensors"):
        parser.error(f"--output {output} is neither .onnx nor .safetensors; use one of the two suffixes")
    if given.int8 and output.suffix.lower() != ".onnx":
        parser.error(f"--int8 is for .onnx, but --output is {output}; name a file with this suffix")
    if not os.access(output.parent, os.W_OK | os.X_OK):
        parser.error(f"--output {output}: {output.parent} is no folder to write to; create it first, or name another")
    return given


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; its status is 0, 2 for bad input, or 130 and 143 for Ctrl-C and SIGTERM."""
    given = arguments(argv)
    try:
        with left_on_signals():
            export(given)
    except (ValueError, OSError) as error:
        print(f"ERROR: {with_dashes(str(error), vars(given))}", file=sys.stderr)
        raise SystemExit(2) from None
    return 0


def export(given: ExportOptions) -> None:
    """Loads the checkpoint, says what is uncertain about it, and writes the file."""
    from . import build_model, weights  # here, so that mistakes in the command line are reported at once

    path = weights.find_checkpoint(given.resume)
    content = weights.read_file(path)
    chosen = {name: value for name, word in MODEL_OPTIONS.items() if (value := vars(given).get(word)) is not None}
    settings: dict[str, Any] = {"backbone": "dino", "clusters": 4, "ghost_clusters": 1, "crossimage_encoder": False}
    settings |= weights.model_of(given.resume, content) | chosen
    model = build_model(**settings).eval()
    backbone = model.backbone.size
    if given.resize:
        require_patches("resize", given.resize, backbone)
    weights.load_checkpoint(model, path, content)
    pca: Any = None if model.projection is None else content.get("pca")
    if given.pca is not None:
        pca = weights.load_projection(model, given.pca)
    released = path != given.resume
    validated_at = RELEASED_SIZE if released else weights.validated_size_of(content, settings["backbone"])
    size = tuple(given.resize or weights.size_of(content, settings["backbone"]) or validated_at or (backbone.side,) * 2)
    if validated_at is None:
        print(f"{path} does not say at which size it was validated; exported at {_sides(size)} (--resize)")
    elif validated_at != size:
        _warn(f"the model was validated at {_sides(validated_at)}, but is exported at {_sides(size)}")
    preparation = {"antialias": True, "upright": True, **weights.preparation_of(content)}
    preparation |= {name: vars(given)[name] for name in preparation if vars(given)[name] is not None}
    if given.pca is not None:
        if "weights" not in pca:  # an older version wrote it
            _warn(f"{given.pca} does not say which weights it was fitted on; check that they are these")
        if tuple(pca.get("resize", size)) != size:
            _warn(f"{given.pca} was fitted on images of {_sides(pca['resize'])}, but the export is for {_sides(size)}")
    if model.projection is not None and pca is not None:
        outputs, inputs = model.projection.components.shape
        line = f"a PCA leaves {outputs} of {inputs} dimensions{', whitened' * bool(pca.get('whiten'))}, of unit norm"
        # With the encoder, the context changes the descriptors that a PCA is fitted on.
        print(line + f"; fitted in --encoder_context {pca.get('context')}" * (model.encoder is not None))
    facts = {**preparation, "resize": size, "mean": MEAN, "std": STD, "validated_at": validated_at, "pca": pca}
    facts["int8"] = given.int8 or None
    metadata = {"model": json.dumps(settings), "source": path.name}
    metadata |= {name: json.dumps(value) for name, value in facts.items() if value is not None}
    write(model, given.output, size=size, metadata=metadata, int8=given.int8)


def _sides(size: Sequence[int]) -> str:
    return " ".join(map(str, size))


def _warn(message: str) -> None:
    print(f"WARNING: {message}", file=sys.stderr)


def write(
    model: "SuperVLADNet", path: Path, *, size: tuple[int, ...], metadata: dict[str, str], int8: bool = False
) -> None:
    """Writes the file of the kind that its suffix names, and prints how far an ONNX file is from the model."""
    try:
        if path.suffix.lower() == ".onnx":
            from .onnx_file import export_onnx

            result = export_onnx(model, path, size=size, metadata=metadata, int8=int8)
            kind = "have a cosine to PyTorch's of at least" if int8 else "differ from PyTorch's by at most"
            print(f"{path}: descriptors {kind} {result:{'.5f' if int8 else '.1e'}}")
            if model.encoder is not None:
                print("the encoder attends across the batch: batches of one match eval.py on plain folders")
        else:
            from safetensors.torch import load, save

            state = {name: value.contiguous() for name, value in model.state_dict().items()}
            with atomic_write(path) as temporary:
                temporary.write_bytes(save(state, metadata))  # safetensors' own files can be read by their owner alone
                read = load(temporary.read_bytes())
                if not all(read[name].equal(value) for name, value in state.items()):
                    raise ValueError(f"output {path} was not written: weights read back differ; try again")
            print(f"{path}: {len(state)} weights, equal when read back")
    except ValueError:
        raise
    except Exception as error:  # the exporter and ONNX Runtime raise their own exceptions, with long messages
        told = str(error.__cause__ or error).strip().partition("\n")[0] or type(error).__name__
        remedy = "use other versions of torch, onnxscript or onnxruntime"
        if isinstance(error, ImportError):
            remedy = "pip install onnx onnxscript onnxruntime safetensors"
        elif isinstance(error, OSError):
            remedy = "name another place"
        raise ValueError(f"output {path} was not written ({told}); {remedy}") from error


if __name__ == "__main__":
    sys.exit(main())
