"""Published weights: where they are, and their download into torch.hub's cache."""

import logging
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import torch

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


class Released(NamedTuple):
    """A published checkpoint."""

    drive_id: str  # its file on Google Drive
    model: dict[str, Any]  # its arguments of `build_model`


RELEASED = {
    "SuperVLAD": Released("1wRkUO4E8s5hNRNNIWcuA8RUvlGob3Tbf", {"clusters": 4, "ghost_clusters": 1}),
    "SuperVLAD-CrossImage": Released(
        "1yomnWGTJko6nf3F2Ju6RWsLhP2EG82tL", {"clusters": 4, "ghost_clusters": 1, "crossimage_encoder": True}
    ),
    "1-ClusterVLAD": Released("1pQcJx9n2-keAh9TttssZkz6D0vjpFWU6", {"clusters": 1, "ghost_clusters": 2}),
}


def cached(file: str) -> Path:
    """Where torch.hub keeps a weight file; the folder is created if missing."""
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / file


def foundation_address(backbone: str) -> str:
    """The address of the official weights of a backbone in `FOUNDATION_FILES`."""
    file = FOUNDATION_FILES[backbone]
    family = file.removesuffix("_pretrain.pth").removesuffix("_reg4")
    return f"https://dl.fbaipublicfiles.com/dinov2/{family}/{file}"


def fetch_foundation(backbone: str) -> Path:
    """The official weights of a backbone in `FOUNDATION_FILES`, downloaded the first time."""
    if backbone in GATED_FILES:
        told = f"backbone={backbone} needs {GATED_FILES[backbone]}, which Meta gives to those who accept its licence"
        raise ValueError(f"{told}; ask at https://github.com/facebookresearch/dinov3, give it as foundation_model_path")
    address, path = foundation_address(backbone), cached(FOUNDATION_FILES[backbone])
    if not path.exists():
        logger.info("downloading %s", address)
        try:
            torch.hub.download_url_to_file(address, str(path))
        except OSError as error:
            told = f"backbone={backbone}: DINOv2's weights could not be downloaded ({error})"
            remedy = f"get {address} elsewhere and put it at {path}, or give it as foundation_model_path"
            raise ValueError(f"{told}; {remedy}") from error
    return path


def fetch_released(name: str) -> Path:
    """A checkpoint of `RELEASED`, downloaded by gdown the first time."""
    path = cached(f"{name}.pth")
    if not path.exists():
        address = f"https://drive.google.com/uc?id={RELEASED[name].drive_id}"
        logger.info("downloading %s", address)
        temporary = path.with_suffix(".tmp")
        try:
            import gdown

            if gdown.download(address, str(temporary)) is None:
                raise OSError("Google Drive gave no file")
            if not zipfile.is_zipfile(temporary):
                raise OSError("Google Drive gave a web page, or a part of the file")
            temporary.replace(path)
        except Exception as error:  # gdown raises its own exceptions
            temporary.unlink(missing_ok=True)
            remedy = "pip install gdown, or get" if isinstance(error, ImportError) else "get"
            told = f"{name} could not be downloaded ({error})"
            raise ValueError(f"{told}; {remedy} {address} in a browser and put it at {path}") from error
    return path


def find_checkpoint(name: Path) -> Path:
    """The file of a checkpoint: `name` itself, or, for a name in `RELEASED`, that one, downloaded the first time."""
    if name.is_file():
        return name
    if str(name) not in RELEASED:
        raise FileNotFoundError(f"no weight file at {name}; check the path, or name one of {', '.join(RELEASED)}")
    return fetch_released(str(name))
