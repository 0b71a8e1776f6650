"""torch.hub entry points, inside a program that has modules of the same names as ours."""

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from model import build_model

REPOSITORY = str(Path(__file__).parents[1])


@pytest.fixture
def strangers(monkeypatch, tmp_path):
    """Somebody else's `model`, `utils` and `datasets`, and an empty cache of torch.hub."""
    for name in [
        name for name in sys.modules if name.split(".")[0] in ("model", "utils", "datasets", "_supervlad_model")
    ]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("model", "utils", "datasets"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    yield tmp_path / "checkpoints"
    for name in [name for name in sys.modules if name.startswith("_supervlad_model")]:
        del sys.modules[name]


@pytest.mark.parametrize(
    ("entry", "settings", "dim"),
    [
        ("supervlad", {}, 4 * 96),
        ("supervlad", {"crossimage_encoder": True}, 4 * 96),
        ("supervlad_crossimage", {}, 4 * 96),
        ("vlad_1cluster", {}, 96),
    ],
)
def test_entry_points(strangers, entry, settings, dim):
    before = {name: sys.modules[name] for name in ("model", "utils", "datasets")}
    model = torch.hub.load(REPOSITORY, entry, source="local", pretrained=False, backbone="dino_tiny", **settings)
    assert not model.training and (model.encoder is not None) == ("encoder" in str(settings) or "cross" in entry)
    descriptors = model(torch.rand(2, 3, 56, 70))
    assert descriptors.shape == (2, dim)
    torch.testing.assert_close(descriptors.norm(dim=1), torch.ones(2))
    assert all(sys.modules[name] is module for name, module in before.items())


def test_released_weights_are_loaded(strangers):
    saved = build_model(backbone="dino_tiny", clusters=1, ghost_clusters=2)
    strangers.mkdir()
    torch.save(
        {"model_state_dict": {f"module.{name}": value for name, value in saved.state_dict().items()}},
        strangers / "1-ClusterVLAD.pth",
    )
    model = torch.hub.load(REPOSITORY, "vlad_1cluster", source="local", backbone="dino_tiny")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), saved.state_dict().values(), strict=True))
