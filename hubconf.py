"""torch.hub entry points: `torch.hub.load("<folder or owner/name>", "supervlad")`.

`prepare` returns the function that turns a photo into an image tensor, and `place_map` a map written by eval.py, which
finds where a photo was taken. The others return a model in evaluation mode. It turns images into descriptors B x K*D of
unit L2 norm; images are B x 3 x H x W in [0, 1], normalised by ImageNet's mean and standard deviation, with sides that
are multiples of the patch size (14 pixels; DINOv3: 16). With the cross-image encoder, a descriptor depends on the other
images in the batch.
"""

import importlib.util
import os
import re
import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

# For the models; `prepare` also needs torchvision and Pillow, and `place_map` these and FAISS.
dependencies = ["torch", "numpy"]


def _ours(folder: str, module: str = "") -> ModuleType:
    """Imports a package of this repository, or a module in it; these import our code relatively only."""
    name = f"_supervlad_{folder}"  # not `model`, since the caller's code may have a module of that name
    if name not in sys.modules:
        path = Path(__file__).parent / folder
        spec = importlib.util.spec_from_file_location(
            name, path / "__init__.py", submodule_search_locations=[str(path)]
        )
        assert spec is not None and spec.loader is not None
        package = importlib.util.module_from_spec(spec)
        sys.modules[name] = package
        spec.loader.exec_module(package)
    return importlib.import_module(f"{name}.{module}" if module else name)


def _without_flags(error: ValueError) -> ValueError:
    """The same error with option names instead of command-line flags."""
    return ValueError(re.sub(r"(?<!\S)--(?=[a-z])", "", str(error)))


def _released(name: str, pretrained: bool, backbone: str = "dino", backbone_blocks: int | None = None) -> Any:
    weights = _ours("model", "weights")
    try:
        model = _ours("model").build_model(
            backbone=backbone, backbone_blocks=backbone_blocks, **weights.RELEASED[name].model
        )
        if pretrained:
            weights.load_checkpoint(model, weights.fetch_released(name, asked=name))
    except ValueError as error:  # its remedies are command-line flags
        raise _without_flags(error) from error
    return model.eval()


def prepare(
    resize: tuple[int, int] | None = None, antialias: bool = True, upright: bool = True, backbone: str = "dino"
) -> Any:
    """Returns the function that turns a photo (a path or a Pillow image) into an image 3 x H x W for the models.

    The defaults are those of eval.py for plain folders; published benchmarks neither antialias nor turn photos.

    Args:
        resize: height and width in pixels, multiples of the patch size; by default (322, 322), the size at which the
            released models were validated, or (320, 320) for DINOv3.
        antialias: whether the resize is antialiased.
        upright: whether the photo is turned as its EXIF data says.
        backbone: a name from `model.BACKBONES`.

    Raises:
        ValueError: the backbone is unknown, or `resize` is not two positive multiples of its patch size.
    """
    transforms, sizes = _ours("datasets", "photos.transforms"), _ours("model", "sizes").BACKBONES
    if backbone not in sizes:
        raise ValueError(f"unknown backbone {backbone!r}; use one of {', '.join(sizes)}")
    patch_size, side = sizes[backbone].patch_size, sizes[backbone].side
    resize = (side, side) if resize is None else resize
    transforms.require_patches(resize, patch_size=patch_size, side=side)
    return partial(transforms.prepare, transform=transforms.evaluation_transform(resize, antialias), upright=upright)


def place_map(path: str | Path, resume: str | Path, accept: float | None = None, device: str = "cpu") -> Any:
    """Loads a map that eval.py wrote with --save_map, and the model that it was made with: `map.locate(photo)`.

    `locate` takes a photo as a NumPy array of H x W x 3 bytes in RGB order, prepares it as the map's photos were, and
    returns `(path, position, distance, accepted)`, see `utils.retrieval.place_map.Place`. The model runs in fp32.

    Args:
        path: path of the map.
        resume: the checkpoint that the map was made with, or the name of a released one.
        accept: squared descriptor distance up to which an answer is accepted, instead of the map's own.
        device: device of the model; the search runs on the CPU.

    Raises:
        FileNotFoundError: the map or the checkpoint is missing.
        ValueError: a file is damaged, or the map was made with another model.
    """
    import torch

    transforms, weights = _ours("datasets", "photos.transforms"), _ours("model", "weights")
    try:
        asked = _ours("utils", "retrieval.place_map").PlaceMap(os.path.expanduser(path), accept=accept)
        file = weights.find_checkpoint(Path(os.path.expanduser(resume)))
        content = weights.read_file(file)
        asked.require(weights.model_of(Path(resume), content), str(resume))
        model = _ours("model").build_model(**asked.model)
        with asked.fitting(str(resume)):
            weights.load_checkpoint(model, file, content)
        asked.require_weights(weights.state_digest(model), str(resume))
        patch_size, side = model.backbone.size.patch_size, model.backbone.size.side
        transforms.require_patches(asked.resize, patch_size=patch_size, side=side)
        asked.load()
    except ValueError as error:
        raise _without_flags(error) from error
    model.to(device).eval()
    transform = transforms.evaluation_transform(asked.resize, asked.antialias)

    def describe(photo: Any) -> Any:
        with torch.inference_mode():
            pixels = torch.tensor(photo).permute(2, 0, 1).contiguous()
            return model(transforms.prepare(pixels, transform)[None].to(device))[0].cpu().numpy()

    asked.describe = describe
    return asked


def checkpoint(path: str | Path) -> Any:
    """The model of a checkpoint file that train.py or `model.export` wrote (best_model.pth, .safetensors).

    The file says what the model is; images should have the size that it was trained or exported for, see `prepare`.

    Args:
        path: path of the file.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: it is damaged, or does not say what its model is, as the released files: these have entry points.
    """
    path = Path(os.path.expanduser(path))
    weights = _ours("model", "weights")
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; name a best_model.pth, or a file that model.export wrote")
    try:
        content = weights.read_file(path)
        if not (written := weights.model_of(path, content)):
            raise ValueError(
                f"{path} does not say what its model is; use supervlad, supervlad_crossimage or vlad_1cluster for a "
                "released file"
            )
        model = _ours("model").build_model(**written)
        weights.load_checkpoint(model, path, content)
    except ValueError as error:
        raise _without_flags(error) from error
    return model.eval()


def supervlad(
    pretrained: bool = True,
    crossimage_encoder: bool = False,
    backbone: str = "dino",
    backbone_blocks: int | None = None,
) -> Any:
    """SuperVLAD with 4 clusters, 3072-dimensional for ViT-B.

    Args:
        pretrained: load the released weights, downloaded once; False gives random weights.
        crossimage_encoder: add the encoder across the images of a batch, so that a descriptor depends on them all.
        backbone: a name from `model.BACKBONES`; released weights exist for "dino".
        backbone_blocks: number of blocks to keep, counted from the first; None keeps all, as the released weights do.
    """
    name = "SuperVLAD-CrossImage" if crossimage_encoder else "SuperVLAD"
    return _released(name, pretrained, backbone, backbone_blocks)


def supervlad_crossimage(pretrained: bool = True, backbone: str = "dino", backbone_blocks: int | None = None) -> Any:
    """SuperVLAD with the encoder across the images of a batch; same arguments as `supervlad`."""
    return _released("SuperVLAD-CrossImage", pretrained, backbone, backbone_blocks)


def vlad_1cluster(pretrained: bool = True, backbone: str = "dino", backbone_blocks: int | None = None) -> Any:
    """1-cluster VLAD, 768-dimensional for ViT-B; same arguments as `supervlad`."""
    return _released("1-ClusterVLAD", pretrained, backbone, backbone_blocks)
