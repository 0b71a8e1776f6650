"""torch.hub entry points: `torch.hub.load("<folder or owner/name>", "supervlad")`.

All but `prepare` and `place_map` return a model in evaluation mode: images B x 3 x H x W in [0, 1], normalised by
ImageNet's mean and standard deviation, with sides that are multiples of the patch size (14 pixels; DINOv3: 16), to
descriptors B x K*D of unit L2 norm. With the cross-image encoder, each depends on the other images in the batch.
"""

import importlib
import os
import sys
from functools import partial
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

# For the models; `prepare` also needs torchvision and Pillow, and `place_map` these and FAISS.
dependencies = ["torch", "numpy"]


def _ours(module: str) -> ModuleType:
    """Imports a module of this repository, which imports others of ours relatively only.

    All are in a package without a file: the caller may have a `model` or `utils`. Its name tells copies of this
    repository apart, and a copy from its successor at the same place (force_reload).
    """
    file = Path(__file__).resolve()
    made = file.stat()
    package = f"_supervlad_{sha256(repr((file, made.st_ino, made.st_mtime_ns)).encode()).hexdigest()[:12]}"
    sys.modules.setdefault(package, ModuleType(package)).__path__ = [str(file.parent)]
    return importlib.import_module(f"{package}.{module}")


def _released(name: str, pretrained: bool, **settings: Any) -> Any:
    published = _ours("model.published")
    model = _ours("model").build_model(**settings, **published.RELEASED[name].model)
    if pretrained:
        _ours("model.weights").load_checkpoint(model, published.fetch_released(name))
    return model.eval()


def _read(name: str | Path) -> tuple[Path, Any, Any]:
    """The file of a checkpoint, its content, and what it says of its model."""
    weights, path = _ours("model.weights"), Path(os.path.expanduser(name))
    content = weights.read_file(file := weights.find_checkpoint(path))
    return file, content, weights.model_of(path, content)


def prepare(
    resize: tuple[int, int] | None = None,
    antialias: bool | None = None,
    upright: bool | None = None,
    backbone: str = "dino",
    resume: str | Path | None = None,
) -> Any:
    """Returns the function that turns a photo (a path or a Pillow image) into an image 3 x H x W for the models.

    The defaults are those of eval.py for plain folders; published benchmarks neither antialias nor turn photos.

    Args:
        resize: height and width in pixels, multiples of the patch size; by default as the checkpoint says, else
            (322, 322), the size at which the released models were validated, or (320, 320) for DINOv3.
        antialias, upright: antialias the resize, turn photos as EXIF says; by default like the checkpoint, else yes.
        backbone: a name from `model.BACKBONES`, if there is no checkpoint, or it does not say.
        resume: the model's checkpoint, or the name of a released one.
    """
    transforms, sizes, weights = _ours("datasets.photos.transforms"), _ours("model.sizes"), _ours("model.weights")
    said = {"antialias": True, "upright": True}
    if resume is not None:
        _, content, settings = _read(resume)
        backbone = settings.get("backbone", backbone)
        resize, said = resize or weights.size_of(content, backbone), said | weights.preparation_of(content)
    size = sizes.size_named(backbone)
    resize = resize or (size.side, size.side)
    sizes.require_patches("resize", resize, size)
    transform = transforms.evaluation_transform(resize, said["antialias"] if antialias is None else antialias)
    return partial(transforms.prepare, transform=transform, upright=said["upright"] if upright is None else upright)


def place_map(path: str | Path, resume: str | Path, accept: float | None = None, device: str = "cpu") -> Any:
    """Loads a map that eval.py wrote with --save_map, and the model that it was made with: `map.locate(photo)`.

    `locate` takes a photo as a NumPy array of H x W x 3 bytes in RGB order, prepares it as the map's photos were, and
    returns `(path, position, distance, accepted)`, see `utils.retrieval.place_map.Place`. The model runs in fp32.

    Args:
        resume: the checkpoint that the map was made with, or the name of a released one.
        accept: squared descriptor distance up to which an answer is accepted, instead of the map's own.
        device: device of the model; the search runs on the CPU.
    """
    transforms, weights = _ours("datasets.photos.transforms"), _ours("model.weights")
    places = _ours("utils.retrieval.place_map").PlaceMap(os.path.expanduser(path), accept=accept)
    file, content, settings = _read(resume)
    places.require(settings, str(resume))
    model = _ours("model").build_model(**places.model)
    with places.fitting(str(resume)):
        weights.load_checkpoint(model, file, content)
    places.require_weights(weights.state_digest(model.state_dict()), str(resume))
    places.load()
    model.to(device).eval()
    transform = transforms.evaluation_transform(places.resize, places.antialias)

    @torch.inference_mode()
    def describe(photo: Any) -> Any:
        pixels = torch.tensor(photo).permute(2, 0, 1).contiguous()
        return model(transforms.prepare(pixels, transform)[None].to(device))[0].cpu().numpy()

    places.describe = describe
    return places


def checkpoint(path: str | Path) -> Any:
    """The model of a file that train.py or `model.export` wrote, or of a released one by its name.

    Images should have the size that it was trained or exported for, see `prepare`.
    """
    file, content, settings = _read(path)
    if not settings:
        raise ValueError(f"{path} does not say what its model is; for a released file use supervlad or vlad_1cluster")
    model = _ours("model").build_model(**settings)
    _ours("model.weights").load_checkpoint(model, file, content)
    return model.eval()


def supervlad(pretrained: bool = True, crossimage_encoder: bool = False, **settings: Any) -> Any:
    """SuperVLAD with 4 clusters, 3072-dimensional for ViT-B.

    Args:
        pretrained: load the released weights, downloaded once; False gives random weights.
        crossimage_encoder: add the encoder across the images of a batch.
        settings: `backbone` and `backbone_blocks` of `model.build_model`; the released weights are for its defaults.
    """
    return _released("SuperVLAD-CrossImage" if crossimage_encoder else "SuperVLAD", pretrained, **settings)


def supervlad_crossimage(pretrained: bool = True, **settings: Any) -> Any:
    """SuperVLAD with the encoder across the images of a batch; same arguments as `supervlad`."""
    return supervlad(pretrained, True, **settings)


def vlad_1cluster(pretrained: bool = True, **settings: Any) -> Any:
    """1-cluster VLAD, 768-dimensional for ViT-B; same arguments as `supervlad`."""
    return _released("1-ClusterVLAD", pretrained, **settings)
