"""Models in files, and exports of them."""

import json

import pytest
import torch
from helpers import MODEL, tiny
from safetensors import safe_open

from model import export
from model.network import Projection

MODELS = {
    "encoder": {"crossimage_encoder": True},
    "one_cluster": {"clusters": 1, "ghost_clusters": 2},
    "dinov3": {"backbone": "dinov3_tiny"},
}


@pytest.fixture(params=["encoder"])
def saved(request, tmp_path):
    """A model, its arguments, and the checkpoint as train.py writes it; that of DINOv3 ends with a PCA, as exported."""
    settings = MODEL | {"backbone_blocks": 1} | MODELS[request.param]  # the exporter to ONNX takes long for each block
    torch.manual_seed(3)
    model = tiny(**settings)
    if request.param == "dinov3":
        model.projection = Projection(model.descriptor_dim, 6)
        model.projection.components.normal_()
        model.projection.mean.normal_()
    size = [64, 80] if "dinov3" in settings["backbone"] else [70, 56]
    content = {"model_state_dict": model.state_dict(), "model": settings, "resize": size}
    torch.save(content, tmp_path / "best_model.pth")
    return model, settings, tmp_path / "best_model.pth"


@pytest.fixture
def trained(tmp_path):
    """A checkpoint as train.py writes it, and its state dict beside it, `bare.pth`."""
    model = tiny()
    torch.save({"model_state_dict": model.state_dict(), "model": MODEL, "resize": [56, 56]}, tmp_path / "best.pth")
    torch.save(model.state_dict(), tmp_path / "bare.pth")
    return tmp_path / "best.pth"


@pytest.fixture
def exported(tmp_path):
    """Exports a file of the folder, and returns the metadata of the new safetensors file, parsed."""

    def run(source, output, *flags):
        assert export.main([f"--resume={tmp_path}/{source}", f"--output={tmp_path}/{output}", *flags]) == 0
        with safe_open(tmp_path / output, framework="np") as file:
            return {name: json.loads(text) for name, text in file.metadata().items() if name != "source"}

    return run


@pytest.fixture
def refused(tmp_path, capsys):
    """Exports what is to be refused, and returns the message; nothing may be left."""

    def run(*flags, status=2):
        before = {file.name for file in tmp_path.iterdir()}
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            export.main([*map(str, flags)])
        assert exit_.value.code == status and {file.name for file in tmp_path.iterdir()} == before
        return capsys.readouterr().err

    return run
