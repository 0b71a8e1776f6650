"""A model as an ONNX or a safetensors file: written beside the path, checked, then moved there."""

import importlib
import logging
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .dinov2 import DINOv2
from .network import SuperVLADNet
from .reading import read_file

TOLERANCE = 1e-4  # largest difference in a descriptor between ONNX Runtime and PyTorch
LEAST_COSINE = 0.99  # of a descriptor in int8 and PyTorch's
ONE_FILE = 1_800_000_000  # bytes of weights; larger models need a second file, since protobuf is limited to 2 GiB


def export_onnx(
    model: SuperVLADNet, path: Path, *, size: tuple[int, int], metadata: dict[str, str], int8: bool = False
) -> float:
    """Writes a model in evaluation mode as ONNX with a dynamic batch size.

    Args:
        model: the model, on the CPU.
        path: file to write; a model of 1.8 GB or more keeps its weights beside it, in `<path>.data`.
        size: height and width of the images in pixels.
        metadata: plain text to store in the file.
        int8: round the weights of matrix products, with a scale for each channel, and activations as they come.

    Returns:
        The largest difference between descriptors of ONNX Runtime and PyTorch; with `int8`, their least cosine.

    Raises:
        ValueError: the difference is above 1e-4 or the cosine below 0.99, or a package is missing; nothing is written.
    """
    ort, _ = (_needed(name, "pip install onnx onnxscript onnxruntime") for name in ("onnxruntime", "onnxscript"))
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(count, 3, *size, generator=generator) for count in (3, 1)]
    with _moved_into_place(path) as written, torch.no_grad():
        program = _program(model, batches[0])
        program.model.metadata_props.update(metadata)
        weights = sum(value.numel() * value.element_size() for value in model.state_dict().values())
        program.save(written, external_data=weights > ONE_FILE)
        if int8:
            _quantize(written, external=weights > ONE_FILE)
        session = ort.InferenceSession(str(written), providers=["CPUExecutionProvider"])
        theirs = torch.cat([torch.from_numpy(session.run(None, {"images": images.numpy()})[0]) for images in batches])
        ours = torch.cat([model(images) for images in batches])
        result = (theirs * ours).sum(dim=1).min().item() if int8 else (theirs - ours).abs().max().item()
        if int8 and not result >= LEAST_COSINE:
            told = f"in int8 the least cosine to PyTorch's descriptors is {result:.4f}, below {LEAST_COSINE}"
            raise ValueError(f"{path} was not written: {told}; leave out --int8")
        if not int8 and not result <= TOLERANCE:
            told = f"its descriptors differ by {result:.1e} from PyTorch's, more than {TOLERANCE:.0e}"
            raise ValueError(f"{path} was not written: {told}; use other versions of torch, onnxscript or onnxruntime")
        path.with_name(path.name + ".data").unlink(missing_ok=True)  # left by a larger model
    return result


@contextmanager
def _moved_into_place(path: Path) -> Iterator[Path]:
    """Where to write a file, and others beside it: in a new folder, from which they are moved if all went well."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        yield Path(folder) / path.name
        for file in sorted(Path(folder).iterdir(), reverse=True):  # the data, if any, before the file that refers to it
            file.replace(path.parent / file.name)


def _quantize(path: Path, *, external: bool) -> None:
    """Rounds the weights of an ONNX file in place."""
    quantization = _needed("onnxruntime.quantization", "pip install onnx onnxruntime")
    with _moved_into_place(path) as written:
        logging.disable(logging.WARNING)  # it advises what the exporter has done
        try:
            quantization.quantize_dynamic(
                path,
                written,
                op_types_to_quantize=["MatMul", "Gemm"],
                per_channel=True,
                # Weights of 7 bits: with 8, sums of products overflow on CPUs without VNNI, and ViT-S's first four
                # blocks were measured to have a cosine of 0.951 instead of 0.9999.
                reduce_range=True,
                use_external_data_format=external,
            )
        finally:
            logging.disable(logging.NOTSET)


def _program(model: SuperVLADNet, images: torch.Tensor) -> torch.onnx.ONNXProgram:
    """The exporter's graph for images of this size, in batches of any."""
    backbone = model.backbone
    try:
        if isinstance(backbone, DINOv2):  # not every engine resamples with antialiasing, as it does with registers
            height, width = (side // backbone.size.patch_size for side in images.shape[2:])
            positions = backbone.position_embedding(height, width)
            backbone.position_embedding = lambda h, w: positions  # type: ignore[method-assign]
        with warnings.catch_warnings(action="ignore"):  # the exporter's own
            program = torch.onnx.export(
                model,
                (images,),
                dynamo=True,
                input_names=["images"],
                output_names=["descriptors"],
                dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
                verbose=False,
            )
    finally:
        backbone.__dict__.pop("position_embedding", None)
    assert program is not None
    return program


def export_safetensors(model: SuperVLADNet, path: Path, *, metadata: dict[str, str]) -> float:
    """Writes a model's weights as safetensors, with plain text as `metadata`.

    Returns:
        The largest difference between a weight read back and the model's; if it is not 0, nothing is written.
    """
    save = _needed("safetensors.torch", "pip install safetensors").save
    content: bytes = save({name: value.contiguous() for name, value in model.state_dict().items()}, metadata)
    with _moved_into_place(path) as written:
        written.write_bytes(content)  # safetensors itself writes files that only their owner can read
        state = read_file(written)["model_state_dict"]
        differences = [(value - state[name]).abs().max() for name, value in model.state_dict().items()]
        difference = torch.stack(differences).max().item()
        if difference != 0:
            raise ValueError(f"{path} was not written: weights read back differ by {difference:.1e}; try again")
    return difference


def _needed(package: str, remedy: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        name = package.split(".")[0]
        raise ValueError(f"this export needs the package {name}, which is missing; {remedy}") from error
