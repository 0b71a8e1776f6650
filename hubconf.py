"""torch.hub entry points: `torch.hub.load("<folder or owner/name>", "supervlad")`.

`prepare` gives the function that turns a photo into an image, and `place_map` a map that eval.py wrote, to ask where a
photo was taken. Each of the others gives a model in evaluation mode that turns images, B x 3 x H x W in [0, 1] with
ImageNet's mean and standard deviation taken out and sides that are multiples of the backbone's patch (14 pixels,
DINOv3's 16), into descriptors B x K*D of unit L2 norm. With the cross-image encoder, those depend on what shares the
batch.
"""

import importlib.util
import os
import re
import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

# Of the models; `prepare` takes torchvision and Pillow too, and `place_map` these and FAISS.
dependencies = ["torch", "numpy"]


def _ours(folder: str, module: str = "") -> ModuleType:
    """A package of this repository, or a module of it, which imports nothing of ours but relatively."""
    name = f"_supervlad_{folder}"  # not `model`, a name that the caller's own code may have
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
    """The same error without the form that its remedies have on a command line."""
    return ValueError(re.sub(r"(?<!\S)--(?=[a-z])", "", str(error)))


def _released(name: str, pretrained: bool, backbone: str = "dino", backbone_blocks: int | None = None) -> Any:
    weights = _ours("model", "weights")
    try:
        model = _ours("model").build_model(
            backbone=backbone, backbone_blocks=backbone_blocks, **weights.RELEASED[name].model
        )
        if pretrained:
            weights.load_checkpoint(model, weights.fetch_released(name, asked=name))
    except ValueError as error:  # whose remedies are options of a command line
        raise _without_flags(error) from error
    return model.eval()


def prepare(
    resize: tuple[int, int] | None = None, antialias: bool = True, upright: bool = True, backbone: str = "dino"
) -> Any:
    """The function that turns a photo, a path or a Pillow image, into an image 3 x H x W for the models.

    The defaults are what eval.py does with plain folders; benchmarks are published without antialiasing and turning.

    Args:
        resize: height and width in pixels, multiples of the backbone's patch; by default (322, 322), at which the
            released models were validated, and for DINOv3 (320, 320).
        antialias: whether the resize is antialiased.
        upright: whether the photo is turned as its EXIF data says.
        backbone: a name from `model.BACKBONES`.

    Raises:
        ValueError: an unknown backbone, or `resize` is not two multiples of its patch, from one patch on.
    """
    transforms, sizes = _ours("datasets", "transforms"), _ours("model", "sizes").BACKBONES
    if backbone not in sizes:
        raise ValueError(f"unknown backbone {backbone!r}; use one of {', '.join(sizes)}")
    patch_size, side = sizes[backbone].patch_size, sizes[backbone].side
    resize = (side, side) if resize is None else resize
    transforms.require_patches(resize, patch_size=patch_size, side=side)
    return partial(transforms.prepare, transform=transforms.evaluation_transform(resize, antialias), upright=upright)


def place_map(path: str | Path, resume: str | Path, accept: float | None = None, device: str = "cpu") -> Any:
    """A map that eval.py wrote by --save_map, with the model that it was made with: `map.locate(photo)`.

    `locate` takes a photo as a NumPy array, H x W x 3 bytes, red, green and blue, prepares it as the map's photos were,
    and gives `(path, position, distance, accepted)`, see `utils.place_map.Place`. The model computes in fp32.

    Args:
        path: of the map.
        resume: the checkpoint that it was made with, or the name of a released one.
        accept: squared distance of the descriptors up to which an answer is accepted, instead of the map's own.
        device: where the model is; the search is on the CPU.

    Raises:
        FileNotFoundError: one of the files is not there.
        ValueError: one is damaged, or the map was made with another model.
    """
    import torch

    transforms, weights = _ours("datasets", "transforms"), _ours("model", "weights")
    try:
        asked = _ours("utils", "place_map").PlaceMap(os.path.expanduser(path), accept=accept)
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


def supervlad(
    pretrained: bool = True,
    crossimage_encoder: bool = False,
    backbone: str = "dino",
    backbone_blocks: int | None = None,
) -> Any:
    """SuperVLAD, 4 clusters.

    Args:
        pretrained: the released weights, fetched once; else random ones.
        crossimage_encoder: with the encoder across the images of a batch, which makes a descriptor depend on them.
        backbone: a name from `model.BACKBONES`; released weights exist for "dino".
        backbone_blocks: how many of its blocks are kept, the first ones; None keeps all, as the released weights do.
    """
    name = "SuperVLAD-CrossImage" if crossimage_encoder else "SuperVLAD"
    return _released(name, pretrained, backbone, backbone_blocks)


def supervlad_crossimage(pretrained: bool = True, backbone: str = "dino", backbone_blocks: int | None = None) -> Any:
    """SuperVLAD with the encoder across the images of a batch; arguments as of `supervlad`."""
    return _released("SuperVLAD-CrossImage", pretrained, backbone, backbone_blocks)


def vlad_1cluster(pretrained: bool = True, backbone: str = "dino", backbone_blocks: int | None = None) -> Any:
    """1-cluster VLAD, 768 numbers; arguments as of `supervlad`."""
    return _released("1-ClusterVLAD", pretrained, backbone, backbone_blocks)
