"""Loads weight files without running code from them: DINOv2's, DINOv3's, released ones, ours, bare state dicts."""

import errno
import hashlib
import json
import logging
import pickle
import struct
import textwrap
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .dinov2 import DINOv2
from .dinov3 import DINOv3
from .network import Projection, SuperVLADNet
from .sizes import BACKBONES, BackboneSize

logger = logging.getLogger(__name__)

FOUNDATION_FILES = {
    "dino_small": "dinov2_vits14_pretrain.pth",
    "dino": "dinov2_vitb14_pretrain.pth",
    "dino_large": "dinov2_vitl14_pretrain.pth",
    "dino_giant": "dinov2_vitg14_pretrain.pth",
    "dino_small_reg": "dinov2_vits14_reg4_pretrain.pth",
    "dino_reg": "dinov2_vitb14_reg4_pretrain.pth",
    "dino_large_reg": "dinov2_vitl14_reg4_pretrain.pth",
    "dino_giant_reg": "dinov2_vitg14_reg4_pretrain.pth",
}

# Given only to those who accept their licence, so they are not downloaded here.
GATED_FILES = {
    "dinov3_small": "dinov3_vits16_pretrain_lvd1689m-08c60483.pth",
    "dinov3": "dinov3_vitb16_pretrain_lvd1689m-73cec8be.pth",
    "dinov3_large": "dinov3_vitl16_pretrain_lvd1689m-8aa4cbdd.pth",
}

SPLITS_NAMED = 4  # how many splits into clusters and ghosts an error lists


# What torch.load raises for files that torch.save did not write.
_UNREADABLE = (
    pickle.UnpicklingError, RuntimeError, EOFError, KeyError, IndexError, ValueError, AttributeError, struct.error,
    zipfile.BadZipFile,
)  # fmt: skip


def foundation_address(backbone: str) -> str:
    """The address of the official weights of a backbone in `FOUNDATION_FILES`."""
    file = FOUNDATION_FILES[backbone]
    family = file.removesuffix("_pretrain.pth").removesuffix("_reg4")
    return f"https://dl.fbaipublicfiles.com/dinov2/{family}/{file}"


def fetch_foundation(backbone: str) -> Path:
    """The official weights of a backbone in `FOUNDATION_FILES`, downloaded into torch.hub's cache the first time.

    Raises:
        ValueError: the download failed, or the weights are in `GATED_FILES`; the message says where to get them and
            where to put them.
    """
    if backbone in GATED_FILES:
        raise ValueError(
            f"--backbone={backbone} starts from DINOv3's weights, which are not downloaded: Meta gives them only to "
            "those who accept the DINOv3 License; ask at https://github.com/facebookresearch/dinov3 for "
            f"{GATED_FILES[backbone]}, and give the file as --foundation_model_path"
        )
    address = foundation_address(backbone)
    path = cached(FOUNDATION_FILES[backbone])
    if not path.exists():
        logger.info("downloading %s", address)
        try:
            torch.hub.download_url_to_file(address, str(path), progress=True)
        except OSError as error:
            raise ValueError(
                f"--backbone={backbone} starts from DINOv2's weights, which could not be downloaded ({error}); get "
                f"{address} elsewhere and give it as --foundation_model_path={path.name}, or put it at {path}"
            ) from error
    return path


@dataclass(frozen=True, kw_only=True)
class Released:
    """A published checkpoint: its file on Google Drive, and its arguments of `build_model`."""

    drive_id: str
    model: dict[str, Any]


RELEASED = {
    "SuperVLAD": Released(drive_id="1wRkUO4E8s5hNRNNIWcuA8RUvlGob3Tbf", model={"clusters": 4, "ghost_clusters": 1}),
    "SuperVLAD-CrossImage": Released(
        drive_id="1yomnWGTJko6nf3F2Ju6RWsLhP2EG82tL",
        model={"clusters": 4, "ghost_clusters": 1, "crossimage_encoder": True},
    ),
    "1-ClusterVLAD": Released(drive_id="1pQcJx9n2-keAh9TttssZkz6D0vjpFWU6", model={"clusters": 1, "ghost_clusters": 2}),
}


def fetch_released(name: str, asked: str | None = None) -> Path:
    """A checkpoint of `RELEASED`, downloaded by gdown into torch.hub's cache the first time.

    Args:
        name: its name.
        asked: how the user asked for it, for the error message; by default `--resume=<name>`.

    Raises:
        ValueError: the download failed; the message says where to get the file and where to put it.
    """
    path = cached(f"{name}.pth")
    if not path.exists():
        address = f"https://drive.google.com/uc?id={RELEASED[name].drive_id}"
        logger.info("downloading %s", address)
        temporary = path.with_suffix(".tmp")
        try:
            import gdown

            if gdown.download(address, str(temporary)) is None:
                raise OSError("Google Drive gave no file")
            read_file(temporary)  # Google Drive may answer with a web page instead of the file
            temporary.replace(path)
        except Exception as error:  # gdown raises its own exceptions
            temporary.unlink(missing_ok=True)
            remedy = "install gdown (pip install gdown), or get" if isinstance(error, ImportError) else "get"
            raise ValueError(
                f"{asked or f'--resume={name}'} could not be downloaded ({error}); {remedy} {address} in a browser and "
                f"put it at {path}"
            ) from error
    return path


def find_checkpoint(name: Path) -> Path:
    """The file of a checkpoint: `name` itself, or, for a name in `RELEASED`, that one, downloaded the first time."""
    return name if name.is_file() or str(name) not in RELEASED else fetch_released(str(name))


def model_of(name: Path, content: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `build_model` for a checkpoint; empty where the file does not say, as only ours do.

    Args:
        name: as given to `find_checkpoint`.
        content: the content of its file.
    """
    if str(name) in RELEASED and not name.is_file():
        return {"backbone": "dino", "crossimage_encoder": False, **RELEASED[str(name)].model}
    written = content.get("model")
    known = {"backbone", "backbone_blocks", "clusters", "ghost_clusters", "crossimage_encoder"}
    return written if isinstance(written, dict) and written.keys() <= known else {}


def size_of(content: dict[str, Any], backbone: str | None = None) -> tuple[int, int] | None:
    """Default height and width in pixels of a checkpoint's model; None where the file does not say.

    Args:
        content: the content of its file.
        backbone: a name from `BACKBONES`; a size that is no multiple of its patch size is ignored. None allows any.
    """
    return _size(content.get("resize"), backbone)


def validated_size_of(content: dict[str, Any], backbone: str | None = None) -> tuple[int, int] | None:
    """Height and width in pixels at which a checkpoint's model was validated; None where the file does not say.

    train.py writes it as `resize`; an exported file has a separate entry, since it may be for another size.

    Args:
        content: the content of its file.
        backbone: as in `size_of`.
    """
    return _size(content["validated_at"] if "validated_at" in content else content.get("resize"), backbone)


def _size(written: Any, backbone: str | None) -> tuple[int, int] | None:
    if not isinstance(written, (list, tuple)) or len(written) != 2:
        return None
    patches = {size.patch_size for name, size in BACKBONES.items() if backbone in (None, name)}
    if not any(all(type(side) is int and side > 0 and side % patch == 0 for side in written) for patch in patches):
        return None  # an entry of another project with the same name
    return written[0], written[1]


def preparation_of(content: dict[str, Any]) -> dict[str, bool]:
    """Whether photos are antialiased (`antialias`) and turned as EXIF says (`upright`), where an exported file says so.

    Args:
        content: the content of its file.
    """
    return {name: content[name] for name in ("antialias", "upright") if isinstance(content.get(name), bool)}


def pca_of(content: dict[str, Any]) -> dict[str, Any] | None:
    """What an exported file says about the PCA at the end of its model; None where it says nothing.

    Args:
        content: the content of its file.
    """
    written = content.get("pca")
    return written if isinstance(written, dict) else None


def state_digest(model: SuperVLADNet) -> str:
    """A digest that identifies a model's weights; PCAs and maps store it, since they fit one model's descriptors."""
    found = hashlib.sha256()
    for name, value in model.state_dict().items():
        found.update(name.encode())
        found.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def cached(file: str) -> Path:
    """Where torch.hub keeps a weight file; the folder is created if missing."""
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / file


def _numpy_globals() -> list[Any]:
    """The NumPy names that the released checkpoints need beyond tensors (they hold recalls as NumPy values).

    They were written with NumPy 1, whose module paths NumPy 2 renamed; taking the functions from what NumPy itself
    pickles works with both.
    """
    reconstruct = np.zeros(1).__reduce__()[0]
    scalar = np.float64(0).__reduce__()[0]
    names: list[Any] = [np.ndarray, np.dtype, *{type(np.dtype(code)) for code in "?bhilqBHILQefd"}]
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        names += [(reconstruct, f"{module}._reconstruct"), (scalar, f"{module}.scalar")]
    return names


def _not_readable(path: Path, error: OSError) -> OSError:
    return OSError(f"{path} cannot be read ({error.strerror or error}); check its permissions and the disk")


def _foreign_objects(path: Path) -> list[str]:
    """Names of what a file holds beyond tensors and plain values; empty if it cannot be read at all."""
    try:
        return torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except (*_UNREADABLE, OSError):
        return []


def read_file(path: Path) -> dict[str, Any]:
    """Reads a `torch.save`d dict, or a `.safetensors` file, onto the CPU; nothing in the file is executed.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: the file cannot be read, because of its permissions or the disk.
        ValueError: it is damaged, not a dict, or holds objects that only arbitrary code could rebuild.
    """
    path = Path(path)
    if not path.is_file():
        names = "" if path.parent.name or path.suffix else f", or use the name of a released one: {', '.join(RELEASED)}"
        raise FileNotFoundError(f"no weight file at {path}; check the path{names}")
    if path.suffix.lower() == ".onnx":
        raise ValueError(
            f"{path} is an ONNX file, which cannot be loaded; give the checkpoint that it was exported from"
        )
    if path.suffix.lower() == ".safetensors":
        return _read_safetensors(path)
    with torch.serialization.safe_globals(_numpy_globals()):
        try:
            # torch.load does not verify checksums: a flipped bit would go unnoticed.
            if zipfile.is_zipfile(path) and (name := zipfile.ZipFile(path).testzip()):
                raise RuntimeError(f"{name} does not match its checksum")
            content = torch.load(path, map_location="cpu", weights_only=True)
        except (*_UNREADABLE, OSError) as error:
            # A damaged file with offsets before its start also gives an OSError: EINVAL, or no errno at all.
            if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
                raise _not_readable(path, error) from error
            if foreign := _foreign_objects(path):
                raise ValueError(
                    f"{path} holds {', '.join(foreign)}, and loading that would run code from the file: refused; "
                    "save its state dict alone, torch.save(model.state_dict(), ...), and use that"
                ) from error
            raise ValueError(f"{path} is damaged or not a PyTorch weight file; download or write it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; give a checkpoint or a state dict")
    return content


_WRITTEN = ("model", "resize", "validated_at", "antialias", "upright", "pca")  # by model.export, in JSON


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ValueError(f"reading {path} needs the package safetensors; pip install safetensors") from error
    try:
        with safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
            written = file.metadata() or {}
            known = {name: _parsed(written[name]) for name in _WRITTEN if name in written}
            return {"model_state_dict": state, "validated_at": None, **known}
    except OSError as error:
        raise _not_readable(path, error) from error
    except (SafetensorError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged or not a safetensors file ({error}); download or write it again"
        ) from error


def _parsed(text: str) -> Any:
    """The parsed JSON; None if the text is not JSON, as in files of other projects."""
    try:
        return json.loads(text)
    except ValueError:
        return None


def load_foundation(backbone: DINOv2 | DINOv3, path: Path) -> None:
    """Loads an official DINOv2 or DINOv3 file, or the backbone of a checkpoint; every key must fit.

    If the backbone keeps only its first blocks, a line of the log says that the file's other blocks are left out.

    Raises:
        FileNotFoundError, ValueError: as in `read_file`, or the file is for another backbone.
    """
    content = read_file(path)
    state = _plain_names(content.get("model_state_dict", content), path)
    if any(name.startswith("backbone.") for name in state):
        state = {n.removeprefix("backbone."): value for n, value in state.items() if n.startswith("backbone.")}
    _require_backbone(backbone, state, path, first_blocks=True)
    kept, count = backbone.size.kept_blocks, _blocks_in(state)
    if kept < count:
        state = {n: value for n, value in state.items() if not n.startswith("blocks.") or int(n.split(".")[1]) < kept}
        logger.info("%s: the first %d of its %d blocks are taken (--backbone_blocks)", path, kept, count)
    _load(backbone, state, path)


def load_checkpoint(model: SuperVLADNet, path: Path, content: dict[str, Any] | None = None) -> dict[str, Any]:
    """Loads a checkpoint (released, ours, or a bare state dict); every key must fit.

    The file alone decides whether the model ends with a PCA (`model.projection`).

    Args:
        model: the model to load the weights into.
        path: path of the file.
        content: the result of `read_file`, if the file was read before.

    Returns:
        The file's other contents; empty for a bare state dict.

    Raises:
        FileNotFoundError, ValueError: as in `read_file`, or the file is for another model; the message names the
            option to change.
    """
    content = dict(read_file(path) if content is None else content)
    state = content.pop("model_state_dict", None)
    if state is None:
        state, content = content, {}
    state = _plain_names(state, path)
    _require_options(model, state, model_of(path, content), path)
    components = state.get("projection.components")
    model.projection = None if components is None else _projection_for(model, components, path)
    _load(model, state, path)
    return content


def load_projection(model: SuperVLADNet, path: Path) -> dict[str, Any]:
    """Adds the PCA that eval.py wrote with `--pca_dim` as the last part of a model.

    Returns:
        What the file says about it: `dim`, `whiten`, `images`, `count`, `context`, and, unless an older version wrote
        it, `weights` (as `state_digest`) and `resize` of what it was fitted on.

    Raises:
        FileNotFoundError, ValueError: as in `read_file`, or it holds no such PCA, or one of other descriptors or
            weights.
    """
    content = read_file(path)
    mean, components, facts = (content.get(name) for name in ("mean", "components", "pca"))
    if not isinstance(mean, Tensor) or not isinstance(components, Tensor) or not isinstance(facts, dict):
        raise ValueError(f"{path} holds no PCA; give the pca.pth that eval.py --pca_dim writes into its folder")
    if model.projection is not None:
        raise ValueError(
            "the checkpoint already ends with a PCA; leave out --pca, or export from the checkpoint without"
        )
    projection = _projection_for(model, components, path)
    if facts.get("weights", own := state_digest(model)) != own:
        raise ValueError(
            f"{path} was fitted on descriptors of other weights than the checkpoint's; give the checkpoint that it was "
            "fitted on, or the pca.pth of an evaluation of this checkpoint"
        )
    _load(projection, {"mean": mean, "components": components}, path)
    model.projection = projection
    return facts


def _projection_for(model: SuperVLADNet, components: Tensor, path: Path) -> Projection:
    outputs, inputs = components.shape if components.ndim == 2 else (0, 0)
    if inputs != model.vectors_dim:
        raise ValueError(
            f"{path} has a PCA of {inputs}-dimensional descriptors, but the model's have {model.vectors_dim}; use the "
            "PCA that was fitted on this model"
        )
    return Projection(inputs, outputs)


# Parts of names that wrappers add: DataParallel (which the released training used), DistributedDataParallel,
# torch.compile, FSDP, activation checkpointing.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


def _plain_names(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    plain = {".".join(part for part in name.split(".") if part not in _WRAPPERS): v for name, v in state.items()}
    if len(plain) < len(state):
        raise ValueError(
            f"{path} holds weights twice, under the names of a wrapped and of a plain model; save only one of them"
        )
    return plain


def splits(total: int) -> list[tuple[int, int]]:
    """All splits (K, G) of a total into K clusters and G ghost clusters, the likeliest first.

    First come those of released models, then a single ghost, the default, then the rest from large K to small.
    """
    usual = [(r.model["clusters"], r.model["ghost_clusters"]) for r in RELEASED.values()] + [(total - 1, 1)]
    every = [(K, total - K) for K in range(total, 0, -1)]
    return sorted(every, key=lambda split: usual.index(split) if split in usual else len(usual))


def _require_options(model: SuperVLADNet, state: dict[str, Tensor], written: dict[str, Any], path: Path) -> None:
    """Compares what the options decide, so that an error names the option to change instead of tensors."""
    backbone = {name.removeprefix("backbone."): value for name, value in state.items() if name.startswith("backbone.")}
    _require_backbone(model.backbone, backbone, path)
    layer = model.aggregation
    if "aggregation.conv.weight" in state:
        total, asked = state["aggregation.conv.weight"].shape[0], (layer.clusters, layer.ghost_clusters)
        # The tensor tells only K + G.
        said = {"clusters", "ghost_clusters"} <= written.keys()
        fitting = [(written["clusters"], written["ghost_clusters"])] if said else splits(total)
        if asked not in fitting:
            flags = " or ".join(f"--supervlad_clusters={K} --ghost_clusters={G}" for K, G in fitting[:SPLITS_NAMED])
            if len(fitting) > SPLITS_NAMED:
                flags += f" or any other K + G = {total}"
            raise ValueError(
                f"{path} has {total} clusters, ghost clusters included, but {asked[0]} + {asked[1]} were asked for; "
                f"use {flags}" + (", whichever it was trained with" if len(fitting) > 1 else "")
            )
    encoder_in_file = any(name.startswith("encoder.") for name in state)
    if encoder_in_file and model.encoder is None:
        raise ValueError(f"{path} has a cross-image encoder, but none was asked for; add --crossimage_encoder")
    if model.encoder is not None and not encoder_in_file:
        raise ValueError(f"{path} has no cross-image encoder, but one was asked for; leave out --crossimage_encoder")


def _family_of(state: dict[str, Tensor]) -> str | None:
    """The backbone family that the names of a state dict belong to; None for neither."""
    if {"rope_embed.periods", "storage_tokens"} <= state.keys():
        return "DINOv3"
    return "DINOv2" if "pos_embed" in state else None


def _blocks_in(state: dict[str, Tensor]) -> int:
    return len({name.split(".")[1] for name in state if name.startswith("blocks.")})


def _require_backbone(
    backbone: DINOv2 | DINOv3, state: dict[str, Tensor], path: Path, *, first_blocks: bool = False
) -> None:
    """Raises ValueError unless a state dict is of this backbone; `first_blocks` allows more blocks than are kept."""
    size, family, depth = backbone.size, _family_of(state), _blocks_in(state)
    if family is None:
        others = "embeddings.cls_token" in state
        raise ValueError(
            f"{path} holds no {size.family} backbone: a checkpoint for --resume has it under names that begin with "
            "backbone., perhaps in model_state_dict; the official files go to train.py's --foundation_model_path"
            + "; the names in this file are those of Hugging Face's transformers"
            * others
        )
    embedding = state.get("patch_embed.proj.weight")
    registers = state.get("storage_tokens" if family == "DINOv3" else "register_tokens")
    kind = (family, *(0 if of is None else of.shape[at] for of, at in ((embedding, 0), (registers, 1))))
    if kind == _kind(size) and (depth == size.kept_blocks or (first_blocks and depth > (size.blocks or depth))):
        return
    said = f"a {family} backbone, but a {size.family} one"
    if family == size.family:
        said = (
            f"a backbone of {kind[1]} channels, {depth} blocks and {kind[2]} registers, but one of {size.channels}, "
            f"{size.kept_blocks} and {size.registers}"
        )
    for name, of in BACKBONES.items():
        if kind == _kind(of) and depth <= of.depth:
            flags = [f"--backbone={name}"] * (of != replace(size, blocks=None))
            flags += [f"--backbone_blocks={depth}"] * (depth < of.depth)
            leave = depth == of.depth and size.blocks is not None and not first_blocks
            remedies = [f"use {' '.join(flags)}"] * bool(flags) + ["leave out --backbone_blocks"] * leave
            raise ValueError(f"{path} has {said} was asked for; {' and '.join(remedies)}")
    raise ValueError(f"{path} has {said} was asked for; no --backbone of this repository fits it")


def _kind(size: BackboneSize) -> tuple[str, int, int]:
    """What a file tells about a backbone besides its number of blocks: family, channels, registers."""
    return size.family, size.channels, size.registers


def _load(module: torch.nn.Module, state: dict[str, Tensor], path: Path) -> None:
    try:
        module.load_state_dict(state, strict=True)
    except RuntimeError as error:
        told = textwrap.shorten(str(error), 600, placeholder=" ...")  # it may list hundreds of keys
        raise ValueError(f"{path} does not fit the model: {told}") from error
    logger.info("weights loaded from %s", path)
