"""torch.hub entry points: `torch.hub.load("<folder or owner/name>", "supervlad")`.

Each returns a model in evaluation mode that turns images, B x 3 x H x W in [0, 1] with ImageNet's mean and standard
deviation taken out and sides that are multiples of 14, into descriptors B x K*D of unit L2 norm.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

dependencies = ["torch", "numpy"]

_PACKAGE = "_supervlad_model"  # not `model`, a name that the caller's own code may have


def _ours(name: str) -> ModuleType:
    """A module of this repository's `model` package."""
    if _PACKAGE not in sys.modules:
        folder = Path(__file__).parent / "model"
        spec = importlib.util.spec_from_file_location(
            _PACKAGE, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        assert spec is not None and spec.loader is not None
        package = importlib.util.module_from_spec(spec)
        sys.modules[_PACKAGE] = package
        spec.loader.exec_module(package)
    return importlib.import_module(name, _PACKAGE)


def _released(name: str, pretrained: bool, backbone: str = "dino") -> Any:
    weights = _ours(".weights")
    model = sys.modules[_PACKAGE].build_model(backbone=backbone, **weights.RELEASED[name].model)
    if pretrained:
        weights.load_checkpoint(model, weights.fetch_released(name))
    return model.eval()


def supervlad(pretrained: bool = True, crossimage_encoder: bool = False, backbone: str = "dino") -> Any:
    """SuperVLAD, 4 clusters.

    Args:
        pretrained: the released weights, fetched once; else random ones.
        crossimage_encoder: with the encoder across the images of a batch, which makes a descriptor depend on them.
        backbone: a name from `model.BACKBONES`; released weights exist for "dino".
    """
    return _released("SuperVLAD-CrossImage" if crossimage_encoder else "SuperVLAD", pretrained, backbone)


def supervlad_crossimage(pretrained: bool = True, backbone: str = "dino") -> Any:
    """SuperVLAD with the encoder across the images of a batch; arguments as of `supervlad`."""
    return _released("SuperVLAD-CrossImage", pretrained, backbone)


def vlad_1cluster(pretrained: bool = True, backbone: str = "dino") -> Any:
    """1-cluster VLAD, 768 numbers; arguments as of `supervlad`."""
    return _released("1-ClusterVLAD", pretrained, backbone)
