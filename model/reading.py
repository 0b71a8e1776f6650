"""Reads weight files, torch.save's and safetensors, without running code from them."""

import errno
import json
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

_METADATA = {"model", "resize", "validated_at", "antialias", "upright", "pca"}  # JSON, by model.export


def read_file(path: Path) -> dict[str, Any]:
    """Reads a `torch.save`d dict, or a `.safetensors` file, onto the CPU; nothing in the file is executed.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: the file cannot be read, because of its permissions or the disk.
        ValueError: it is damaged, not a dict, or holds objects that only arbitrary code could rebuild.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weight file at {path}; check the path")
    if path.suffix.lower() == ".onnx":
        raise ValueError(f"{path} is an ONNX file; give the checkpoint that it was exported from")
    if path.suffix.lower() == ".safetensors":
        return _read_safetensors(path)
    with torch.serialization.safe_globals(_numpy_globals()):
        try:
            # torch.load does not verify checksums: a flipped bit would go unnoticed.
            if zipfile.is_zipfile(path) and (name := zipfile.ZipFile(path).testzip()):
                raise RuntimeError(f"{name} does not match its checksum")
            content = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch.load raises many kinds for files that torch.save did not write
            # A damaged file with offsets before its start also gives an OSError: EINVAL, or no errno at all.
            if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
                raise _not_readable(path, error) from error
            foreign: list[str] = []
            with suppress(Exception):  # it cannot be read at all
                foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path)
            if foreign:
                told = f"{path} holds {', '.join(foreign)}, and loading that would run code from the file: refused"
                raise ValueError(f"{told}; save its state dict alone, torch.save(model.state_dict(), ...)") from error
            raise ValueError(f"{path} is damaged or not a PyTorch weight file; download or write it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; give a checkpoint or a state dict")
    return content


def _not_readable(path: Path, error: OSError) -> OSError:
    return OSError(f"{path} cannot be read ({error.strerror or error}); check its permissions and the disk")


def _numpy_globals() -> list[Any]:
    """The NumPy names that the released checkpoints need beyond tensors (they hold recalls as NumPy values)."""
    # NumPy 1 wrote them, whose module paths NumPy 2 renamed; functions from what NumPy itself pickles work with both.
    reconstruct, scalar = np.zeros(1).__reduce__()[0], np.float64(0).__reduce__()[0]
    names: list[Any] = [np.ndarray, np.dtype, *{type(np.dtype(code)) for code in "?bhilqBHILQefd"}]
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        names += [(reconstruct, f"{module}._reconstruct"), (scalar, f"{module}.scalar")]
    return names


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load
    except ImportError as error:
        raise ValueError(f"reading {path} needs the package safetensors; pip install safetensors") from error
    try:
        data = path.read_bytes()  # safe_open needs a file system with mmap
        state = load(data)
        metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {})
    except OSError as error:
        raise _not_readable(path, error) from error
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is damaged or no safetensors file ({error}); download or write it again") from error
    content = {"model_state_dict": state, "validated_at": None}
    for name in _METADATA & metadata.keys():
        with suppress(ValueError):  # other projects' need not be JSON
            content[name] = json.loads(metadata[name])
    return content
