"""Published weights: where they are, and what a download leaves behind."""

import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from types import ModuleType

import pytest
import torch
from helpers import same_weights, tiny

from model import published, weights
from model.weights import FOUNDATION_FILES, foundation_address, load_checkpoint, load_foundation


def test_where_foundation_weights_are_published(monkeypatch):
    base = "https://dl.fbaipublicfiles.com/dinov2/"
    assert foundation_address("dino") == base + "dinov2_vitb14/dinov2_vitb14_pretrain.pth"
    assert foundation_address("dino_giant_reg") == base + "dinov2_vitg14/dinov2_vitg14_reg4_pretrain.pth"
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_, **__: pytest.fail("nothing to be fetched"))
    for name, file in weights.GATED_FILES.items():
        with pytest.raises(ValueError, match=f"backbone={name} .*{file}.*github.*foundation_model_path"):
            weights.fetch_foundation(name)
    assert len(FOUNDATION_FILES | weights.GATED_FILES) == 11


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A folder that a server on this machine gives out, its address, and an empty cache of torch.hub."""
    (tmp_path / "served").mkdir()
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path / "served"))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    yield tmp_path / "served", f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_foundation_weights_are_fetched_once(served, tmp_path, monkeypatch):
    folder, address = served
    model = tiny()
    torch.save(model.backbone.state_dict(), folder / "tiny.pth")
    monkeypatch.setitem(weights.FOUNDATION_FILES, "dino_tiny", "tiny.pth")
    monkeypatch.setattr(published, "foundation_address", lambda _: f"{address}/tiny.pth")
    path = weights.fetch_foundation("dino_tiny")
    assert path == tmp_path / "hub/checkpoints/tiny.pth"
    other = tiny()
    load_foundation(other.backbone, path)
    assert same_weights(other.backbone, model.backbone)
    (folder / "tiny.pth").unlink()
    assert weights.fetch_foundation("dino_tiny") == path
    path.unlink()
    with pytest.raises(ValueError, match=r"404.*/tiny.pth .*foundation_model_path"):
        weights.fetch_foundation("dino_tiny")
    assert not list(path.parent.iterdir()), "nothing half-written"


def test_released_checkpoints_are_fetched_by_name(served, monkeypatch):
    folder, address = served
    saved = tiny(clusters=1, ghost_clusters=2)
    torch.save({"model_state_dict": saved.state_dict()}, folder / "file")
    gdown = ModuleType("gdown")

    def download(url, output):
        assert url == "https://drive.google.com/uc?id=1pQcJx9n2-keAh9TttssZkz6D0vjpFWU6"
        torch.hub.download_url_to_file(f"{address}/file", output, progress=False)
        return output

    gdown.download = download
    monkeypatch.setitem(sys.modules, "gdown", gdown)
    model = tiny(**weights.RELEASED["1-ClusterVLAD"].model)
    load_checkpoint(model, published.fetch_released("1-ClusterVLAD"))
    assert same_weights(model, saved)
    # A page instead of the file, no file at all, no gdown: one error, and nothing is left behind.
    path = published.cached("1-ClusterVLAD.pth")
    path.unlink()
    (folder / "file").write_text("<html>quota exceeded")
    for change, reason in (
        (lambda: None, "web page"),
        (lambda: (folder / "file").unlink(), "404"),
        (lambda: monkeypatch.setitem(sys.modules, "gdown", None), "pip install gdown"),
    ):
        change()
        with pytest.raises(ValueError, match=f"^1-ClusterVLAD could not be downloaded .*{reason}") as error:
            published.fetch_released("1-ClusterVLAD")
        assert "https://drive.google.com/uc?id=1pQ" in str(error.value) and str(path) in str(error.value)
        assert not list(path.parent.iterdir())
