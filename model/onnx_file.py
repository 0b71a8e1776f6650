"""A model as an ONNX file: written into a folder beside the path, compared with PyTorch, then moved there."""

import logging
import tempfile
import warnings
from pathlib import Path

import torch

from .dinov2 import DINOv2
from .network import SuperVLADNet

TOLERANCE = 1e-4  # largest difference in a descriptor between ONNX Runtime and PyTorch
LEAST_COSINE = 0.99  # of a descriptor in int8 and PyTorch's


def export_onnx(
    model: SuperVLADNet, path: Path, *, size: tuple[int, ...], metadata: dict[str, str], int8: bool = False
) -> float:
    """Writes a model in evaluation mode as ONNX with a dynamic batch size.

    Args:
        model: the model, on the CPU; afterwards it takes images of this size only.
        path: file to write; a model of 1.6 GB or more keeps its weights beside it, in `<path>.data`.
        size: height and width of the images in pixels.
        metadata: plain text to store in the file.
        int8: round the weights of matrix products, with a scale for each channel, and activations as they come.

    Returns:
        The largest difference between descriptors of ONNX Runtime and PyTorch; with `int8`, their least cosine.

    Raises:
        ValueError: the difference is above 1e-4 or the cosine below 0.99; nothing is written.
        ImportError: a package is missing.
    """
    import onnxruntime
    import onnxscript  # noqa: F401, which torch.onnx needs

    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(count, 3, *size, generator=generator) for count in (3, 1)]
    with tempfile.TemporaryDirectory(dir=path.parent) as folder, torch.no_grad():
        written = Path(folder) / path.name
        program = _program(model, batches[0])
        program.model.metadata_props.update(metadata)
        program.save(written)
        if int8:
            written = _quantized(written)
        session = onnxruntime.InferenceSession(str(written), providers=["CPUExecutionProvider"])
        theirs = torch.cat([torch.from_numpy(session.run(None, {"images": images.numpy()})[0]) for images in batches])
        ours = torch.cat([model(images) for images in batches])
        if int8:
            result = (theirs * ours).sum(dim=1).min().item()
            fits, told = result >= LEAST_COSINE, f"have a cosine to PyTorch's of {result:.4f}, below {LEAST_COSINE}"
            remedy = "leave the option out"
        else:
            result = (theirs - ours).abs().max().item()
            fits, told = result <= TOLERANCE, f"differ by {result:.1e} from PyTorch's, more than {TOLERANCE:.0e}"
            remedy = "use other versions of torch, onnxscript or onnxruntime"
        if not fits:
            raise ValueError(f"{'int8: ' * int8}{path} was not written: its descriptors {told}; {remedy}")
        for name in (f"{path.name}.data", path.name):  # the data, if any, before the file that refers to it
            if (file := written.with_name(name)).exists():
                file.replace(path.with_name(name))
    return result


def _quantized(path: Path) -> Path:
    """Rounds the weights of an ONNX file, and returns the new one, of the same name in a folder beside it."""
    from onnxruntime.quantization import quantize_dynamic

    written = path.parent / "int8" / path.name
    written.parent.mkdir()
    logging.disable(logging.WARNING)  # it advises what the exporter has done
    try:
        quantize_dynamic(
            path,
            written,
            op_types_to_quantize=["MatMul", "Gemm"],
            per_channel=True,
            # Weights of 7 bits: with 8, sums of products overflow on CPUs without VNNI, and ViT-S's first four blocks
            # were measured to have a cosine of 0.951 instead of 0.9999.
            reduce_range=True,
            use_external_data_format=path.with_name(f"{path.name}.data").exists(),
        )
    finally:
        logging.disable(logging.NOTSET)
    return written


def _program(model: SuperVLADNet, images: torch.Tensor) -> torch.onnx.ONNXProgram:
    """The exporter's graph for images of this size, in batches of any."""
    backbone = model.backbone
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
    assert program is not None
    return program
