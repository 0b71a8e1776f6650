"""Fits weight files to models: DINOv2's, DINOv3's, released ones, ours, bare state dicts; and what files say of theirs.

`published` downloads them, and `reading` reads them.
"""

import hashlib
import logging
import re
import textwrap
from collections.abc import Mapping
from contextlib import suppress
from operator import index
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .network import Projection, SuperVLADNet
from .published import FOUNDATION_FILES, GATED_FILES, RELEASED, fetch_foundation, find_checkpoint, foundation_address  # noqa: F401
from .reading import read_file
from .sizes import BACKBONES, MODEL_OPTIONS, require_patches
from .supervlad import SuperVLAD
from .vit import Backbone

logger = logging.getLogger(__name__)

PATCHES = "patch_embed.proj.weight"  # a name that each backbone has once


def model_of(name: Path, content: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `build_model` for a checkpoint; empty where the file does not say, as only ours do.

    Raises:
        ValueError: the file names an argument that this version does not have.
    """
    if str(name) in RELEASED and not name.is_file():
        return {"backbone": "dino", "crossimage_encoder": False, **RELEASED[str(name)].model}
    written = content.get("model")
    if not isinstance(written, dict) or not written.keys() & MODEL_OPTIONS.keys():
        return {}  # other projects keep other things there
    if unknown := [repr(key) for key in written if key not in MODEL_OPTIONS]:
        raise ValueError(f"{name} says {', '.join(unknown)} of its model, unknown here; use the version that wrote it")
    return written


def size_of(content: dict[str, Any], backbone: str = "dino", entry: str = "resize") -> tuple[int, int] | None:
    """Default height and width in pixels of a file's model; None where it does not say.

    Args:
        content: the content of its file.
        backbone: a name from `BACKBONES`; a size that is no multiple of its patch size is ignored.
        entry: where the file says it.
    """
    with suppress(ValueError, TypeError, KeyError):  # other projects' entries of the same name
        height, width = map(index, content[entry])
        require_patches(entry, (height, width), BACKBONES[backbone])
        return height, width
    return None


def validated_size_of(content: dict[str, Any], backbone: str = "dino") -> tuple[int, int] | None:
    """Like `size_of`, the size at which the model was validated."""
    # train.py writes it as `resize`; an exported file has a separate entry, since it may be for another size.
    return size_of(content, backbone, "validated_at" if "validated_at" in content else "resize")


def preparation_of(content: dict[str, Any]) -> dict[str, bool]:
    """Whether photos are antialiased (`antialias`) and turned as EXIF says (`upright`), where an exported file says."""
    return {name: content[name] for name in ("antialias", "upright") if isinstance(content.get(name), bool)}


def state_digest(state: Mapping[str, Tensor]) -> str:
    """A digest that identifies weights; PCAs, maps and kept descriptors store it, since they fit one model."""
    digest = hashlib.sha256()
    for name, value in state.items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def load_foundation(backbone: Backbone, path: Path) -> None:
    """Loads an official DINOv2 or DINOv3 file, or the backbone of a checkpoint; every key must fit.

    Raises:
        FileNotFoundError, ValueError: as in `read_file`, or the file is for another backbone.
    """
    state = _official_names(read_file(path), path)
    _require_backbone(backbone, state, path, foundation=True)
    kept, count = backbone.size.kept_blocks, _blocks_in(state)
    if kept < count:
        state = {n: value for n, value in state.items() if not n.startswith("blocks.") or int(n.split(".")[1]) < kept}
        logger.info("%s: the first %d of its %d blocks are taken (--backbone_blocks)", path, kept, count)
    _load(backbone, state, path)


def load_checkpoint(model: SuperVLADNet, path: Path, content: dict[str, Any] | None = None) -> dict[str, Any]:
    """Loads a checkpoint (released, ours, or a bare state dict); every key must fit.

    The file alone decides whether the model ends with a PCA (`model.projection`).

    Args:
        content: the result of `read_file`, if the file was read before.

    Returns:
        The file's other contents; empty for a bare state dict.

    Raises:
        FileNotFoundError, ValueError: as in `read_file`, or the file is for another model.
    """
    content = dict(read_file(path) if content is None else content)
    if "model_state_dict" not in content:
        content = {"model_state_dict": content}
    state = _plain_names(content.pop("model_state_dict"), path)
    _require_options(model, state, model_of(path, content), path)
    model.projection = None
    if (components := state.get("projection.components")) is not None:
        model.projection = _projection_for(model, components, path)
    _load(model, state, path)
    return content


def load_projection(model: SuperVLADNet, path: Path) -> dict[str, Any]:
    """Adds the PCA that eval.py wrote with `--pca_dim` as the last part of a model.

    Returns:
        What the file says about it: `dim`, `whiten`, `images`, `count`, `context`, and, unless an older version wrote
        it, `weights` (as `state_digest`) and `resize` of what it was fitted on.

    Raises:
        FileNotFoundError, ValueError: as in `read_file`, or it holds no PCA of this model's descriptors.
    """
    content = read_file(path)
    mean, components, facts = (content.get(name) for name in ("mean", "components", "pca"))
    if not isinstance(mean, Tensor) or not isinstance(components, Tensor) or not isinstance(facts, dict):
        raise ValueError(f"{path} holds no PCA; give the pca.pth that eval.py --pca_dim writes into its folder")
    if model.projection is not None:
        raise ValueError("pca: the checkpoint already ends with one; leave it out, or give the checkpoint without it")
    projection = _projection_for(model, components, path)
    if facts.get("weights", own := state_digest(model.state_dict())) != own:
        raise ValueError(f"{path} was fitted on another checkpoint's descriptors; give that one")
    _load(projection, {"mean": mean, "components": components}, path)
    model.projection = projection
    return facts


def _projection_for(model: SuperVLADNet, components: Tensor, path: Path) -> Projection:
    outputs, inputs = components.shape if components.ndim == 2 else (0, 0)
    if inputs != model.descriptor_dim:
        told = f"{path} has a PCA of {inputs} dimensions, but the model has {model.descriptor_dim}"
        raise ValueError(f"{told}; use its own")
    return Projection(inputs, outputs)


# Parts of names that wrappers add: DataParallel (which the released training used), DistributedDataParallel,
# torch.compile, FSDP, activation checkpointing.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


def _plain_names(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    plain = {".".join(part for part in name.split(".") if part not in _WRAPPERS): v for name, v in state.items()}
    if len(plain) < len(state):
        raise ValueError(f"{path} holds weights twice, of a wrapped and of a plain model; save only one of them")
    return plain


def _official_names(content: dict[str, Any], path: Path) -> dict[str, Tensor]:
    """The backbone in a file of ours, of DINOv2's training code or of timm, under the names of the official files."""
    states = (content.get(key) for key in ("model_state_dict", "teacher", "state_dict", "model"))
    nested = [s for s in states if isinstance(s, dict) and any(isinstance(v, Tensor) for v in s.values())] or [content]
    state = _plain_names({name: value for name, value in nested[0].items() if isinstance(value, Tensor)}, path)
    prefixes = [name.removesuffix(PATCHES) for name in state if name.endswith(PATCHES)]
    prefix = next((prefix for prefix in prefixes if "teacher" in prefix), (prefixes or [""])[0])
    # In training, DINOv2 groups its blocks: blocks.<group>.<block>.
    state = {
        re.sub(r"^blocks\.\d+\.(?=\d+\.)", "blocks.", name.removeprefix(prefix)): value
        for name, value in state.items()
        if name.startswith(prefix)
    }
    if "pos_embed" in state:
        absent = torch.zeros(1, 1, state["pos_embed"].shape[2])
        state.setdefault("mask_token", absent[0])  # timm leaves it out: it has no part in the output
        if "reg_token" in state:  # timm adds the class token's position to the token itself
            state["register_tokens"] = state.pop("reg_token")
            state["pos_embed"] = torch.cat((absent.to(state["pos_embed"].dtype), state["pos_embed"]), dim=1)
    return state


def _require_options(model: SuperVLADNet, state: dict[str, Tensor], written: dict[str, Any], path: Path) -> None:
    """Compares what the options decide, so that an error names the option to change instead of tensors."""
    backbone = {name.removeprefix("backbone."): value for name, value in state.items() if name.startswith("backbone.")}
    _require_backbone(model.backbone, backbone, path)
    layer, weight = model.aggregation, state.get("aggregation.conv.weight")
    if isinstance(layer, SuperVLAD) and weight is not None:
        total, asked = len(weight), (layer.clusters, layer.ghost_clusters)
        if known := {"clusters", "ghost_clusters"} <= written.keys():
            K, G = written["clusters"], written["ghost_clusters"]
        else:  # the tensor tells only K + G; of 3, the released 1-cluster model has 2 ghosts, the others have one
            K = 1 if total == 3 else max(1, total - 1)
            G = total - K
        if asked != (K, G) and (known or sum(asked) != total):
            others = "" if known else f", or what it was trained with: any K + G = {total}"
            told = f"{path} has {total} clusters, ghost clusters included, but {asked[0]} + {asked[1]} were asked for"
            raise ValueError(f"{told}; use supervlad_clusters={K} ghost_clusters={G}{others}")
    encoder_in_file = any(name.startswith("encoder.") for name in state)
    if encoder_in_file != (model.encoder is not None):
        has, remedy = ("has a", "add") if encoder_in_file else ("has no", "leave out")
        raise ValueError(f"{path} {has} cross-image encoder, unlike what was asked for; {remedy} crossimage_encoder")


def _blocks_in(state: dict[str, Tensor]) -> int:
    return len({name.split(".")[1] for name in state if name.startswith("blocks.")})


def _require_backbone(backbone: Backbone, state: dict[str, Tensor], path: Path, *, foundation: bool = False) -> None:
    """Raises ValueError unless a state dict is of this backbone; a `foundation` may have more blocks than are kept."""
    size, depth = backbone.size, _blocks_in(state)
    if "storage_tokens" in state:
        family, registers = "DINOv3", state["storage_tokens"].shape[1]
    elif "pos_embed" in state:
        family, registers = "DINOv2", state["register_tokens"].shape[1] if "register_tokens" in state else 0
    else:
        remedy = "a checkpoint's begin with backbone., and official files go to train.py --foundation_model_path"
        raise ValueError(f"{path} holds no {size.family} backbone under its official names; {remedy}, see MODELS.md")
    kind = family, len(state.get(PATCHES, ())), registers
    same_kind = kind == (size.family, size.channels, size.registers)
    if same_kind and (depth == size.kept_blocks or (foundation and depth > (size.blocks or depth))):
        return
    told = (
        f"{path} has a {kind[0]} backbone of {kind[1]} channels, {depth} blocks and {kind[2]} registers, but a "
        f"{size.family} one of {size.channels}, {size.kept_blocks} and {size.registers} was asked for"
    )
    for name, other in BACKBONES.items():
        if kind == (other.family, other.channels, other.registers) and depth <= other.depth:
            cut = depth < other.depth or (size.blocks is not None and not foundation)
            raise ValueError(f"{told}; use backbone={name}" + f" backbone_blocks={depth}" * cut)
    raise ValueError(f"{told}; no backbone of this repository fits it")


def _load(module: torch.nn.Module, state: dict[str, Tensor], path: Path) -> None:
    for name, value in state.items():
        if not torch.isfinite(value).all():
            raise ValueError(f"{path} is of no use: {name} has values that are NaN or infinite; give another file")
    try:
        module.load_state_dict(state, strict=True)
    except RuntimeError as error:
        told = textwrap.shorten(str(error), 600, placeholder=" ...")  # it may list hundreds of keys
        raise ValueError(f"{path} does not fit the model: {told}") from error
    logger.info("weights loaded from %s", path)
