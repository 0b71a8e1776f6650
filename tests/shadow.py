"""A device that is not the CPU, where there is no GPU: python shadow.py train|eval FLAG [FLAG ...] runs a script on it,
and python shadow.py hub CHECKPOINT MAP PHOTO the models of hubconf.py.

A tensor on it holds one on the CPU, which computes. Every operation, forward and backward, fails as on a GPU if its
tensors lie on both sides; those without dimensions and indices may lie on the CPU. So do `.numpy()` and the like.
"""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

ROOT = Path(__file__).parents[1]
MAY_MIX = ("copy_", "_to_copy", "index", "index_put_", "_index_put_impl_")


class Module(backend_registration._DummyBackendModule):
    def get_amp_supported_dtype(self):
        return [torch.bfloat16]


backend_registration._setup_privateuseone_for_python_backend("shadow", backend_module=Module())
DEVICE = torch.device("shadow", 0)


class Shadow(Tensor):
    """A tensor on the device."""

    @staticmethod
    def __new__(cls, computed):
        layout = {"strides": computed.stride(), "storage_offset": computed.storage_offset()}
        shadow = Tensor._make_wrapper_subclass(cls, computed.shape, **layout, dtype=computed.dtype, device=DEVICE)
        shadow.computed = computed
        return shadow

    def __reduce_ex__(self, protocol):
        return self.computed.detach().__reduce_ex__(protocol)

    def tolist(self):
        return self.computed.tolist()

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return computed(function, args, kwargs or {})


class OnShadow(TorchDispatchMode):
    """Makes tensors there too, and moves them there."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return computed(function, args, kwargs or {})


def computed(function, args, kwargs):
    """The result of a function of tensors on one of the sides."""
    name = function.overloadpacket.__name__
    tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
    there = any(isinstance(tensor, Shadow) for tensor in tensors)
    if there and name not in MAY_MIX and any(tensor.dim() and not isinstance(tensor, Shadow) for tensor in tensors):
        raise RuntimeError(f"{name}: expected all tensors to be on the same device, but found shadow:0 and cpu")
    if (device := kwargs.get("device")) is not None:
        there, kwargs = torch.device(device).type == "shadow", {**kwargs, "device": "cpu"}
    result = function(*tree_map(plain, args), **tree_map(plain, kwargs))
    if name == "copy_":
        return args[0]
    result = tree_map(shadowed, result) if there else result
    return return_and_correct_aliasing(function, args, kwargs, result) if there and tensors else result


def plain(value):
    return value.computed if isinstance(value, Shadow) else value


def shadowed(value):
    return Shadow(value) if isinstance(value, Tensor) else value


# What C++ makes and copies by itself, as torch.tensor does.
@torch.library.impl("aten::empty_strided", "PrivateUse1")
def _empty_strided(size, stride, *, dtype=None, **_):
    return Shadow(torch.empty_strided(size, stride, dtype=dtype))


@torch.library.impl("aten::_copy_from", "PrivateUse1")
def _copy_from(source, target, non_blocking=False):
    plain(target).copy_(plain(source))
    return target


# Python's tensors cannot be views in inference mode.
torch.inference_mode.__enter__, torch.inference_mode.__exit__ = torch.no_grad.__enter__, torch.no_grad.__exit__


def hub(checkpoint, city, photo):
    """The models of hubconf.py: a photo's descriptor, and where a map says it was taken, as a line of JSON."""
    import hubconf

    image = hubconf.prepare((56, 56))(photo)[None]
    with torch.inference_mode():
        descriptor = hubconf.checkpoint(checkpoint).to(DEVICE)(image.to(DEVICE))[0].cpu()
    place = hubconf.place_map(city, checkpoint, device="shadow").locate(np.asarray(Image.open(photo)))
    print(json.dumps({"descriptor": descriptor.tolist(), "path": place.path, "distance": place.distance}))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    script, *arguments = sys.argv[1:]
    with OnShadow():
        if script == "hub":
            hub(*arguments)
        else:
            main = importlib.import_module(script).main
            for module in [*sys.modules.values()]:  # that defines it, and those that import it
                if hasattr(module, "pick_device"):
                    module.pick_device = lambda name: DEVICE
            main(arguments)
