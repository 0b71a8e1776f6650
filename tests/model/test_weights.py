"""Weight files of every kind; a misfit names the option to change, and no file runs code."""

import errno
import os
import pickle
import re
import sys
import threading
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from types import ModuleType

import numpy as np
import pytest
import torch

from model import build_model, weights
from model.weights import FOUNDATION_FILES, foundation_address, load_checkpoint, load_foundation, read_file


def tiny(**options):
    return build_model(backbone="dino_tiny", **options)


def released_content(model):
    """What the released training script puts into a file."""
    return {
        "epoch_num": 3,
        "model_state_dict": {f"module.{name}": value for name, value in model.state_dict().items()},
        "optimizer_state_dict": {"state": {}, "param_groups": [{"lr": 5e-5}]},
        "recalls": np.array([91.5, 96.25, 97.0]),
        "best_r5": np.float64(187.75),
        "not_improved_num": 0,
    }


def under_numpy_1(path):
    """Renames NumPy's modules in a file to what they were called when the released files were written."""
    renamed = path.with_suffix(".numpy1.pth")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(renamed, "w") as new:
        for item in old.infolist():
            data = old.read(item)
            if item.filename.endswith("data.pkl"):
                assert b"numpy._core.multiarray" in data
                data = data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
            new.writestr(item, data)
    return renamed


def same_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("numpy", [1, 2])
def test_released_format(tmp_path, numpy):
    saved, model = tiny(crossimage_encoder=True), tiny(crossimage_encoder=True)
    path = tmp_path / "released.pth"
    torch.save(released_content(saved), path)
    if numpy == 1:
        path = under_numpy_1(path)
    content = load_checkpoint(model, path)
    assert same_weights(model, saved)
    assert content["recalls"].tolist() == [91.5, 96.25, 97.0] and content["best_r5"] == 187.75


@pytest.mark.parametrize("prefix", ["", "module."])
def test_bare_state_dict(tmp_path, prefix):
    saved, model = tiny(), tiny()
    torch.save({prefix + name: value for name, value in saved.state_dict().items()}, tmp_path / "bare.pth")
    assert load_checkpoint(model, tmp_path / "bare.pth") == {}
    assert same_weights(model, saved)


class RunsCode:
    def __reduce__(self):
        return os.system, ("touch " + os.environ["PROOF"],)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: f"_orig_mod.module.{name}",
        lambda name: name.replace("backbone.", "backbone._orig_mod."),
        lambda name: f"module.{name.replace('.attn.', '._orig_mod.attn.')}",
        lambda name: f"_fsdp_wrapped_module.{name.replace('.mlp.', '._checkpoint_wrapped_module.mlp.')}",
    ],
)
def test_names_of_a_wrapped_model(tmp_path, wrap):
    model, loaded = (build_model(backbone="dino_tiny", crossimage_encoder=True) for _ in range(2))
    torch.save({wrap(name): value for name, value in model.state_dict().items()}, tmp_path / "model.pth")
    load_checkpoint(loaded, tmp_path / "model.pth")
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())
    backbone = {wrap(f"backbone.{name}"): value for name, value in model.backbone.state_dict().items()}
    torch.save({name.replace("backbone.", ""): value for name, value in backbone.items()}, tmp_path / "dinov2.pth")
    load_foundation(build_model(backbone="dino_tiny").backbone, tmp_path / "dinov2.pth")


def test_names_that_a_wrapper_would_give_twice(tmp_path):
    state = build_model(backbone="dino_tiny").state_dict()
    torch.save({**state, **{f"_orig_mod.{name}": value for name, value in state.items()}}, tmp_path / "model.pth")
    with pytest.raises(ValueError, match="model.pth holds weights twice, under the names of a wrapped and of a plain"):
        load_checkpoint(build_model(backbone="dino_tiny"), tmp_path / "model.pth")


def test_a_file_that_needs_code_is_refused_unrun(tmp_path, monkeypatch):
    monkeypatch.setenv("PROOF", str(tmp_path / "ran"))
    torch.save({"model_state_dict": RunsCode()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="would run code from the file: refused"):
        read_file(tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()


def test_missing_and_damaged_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no weight file at .*none.pth"):
        read_file(tmp_path / "none.pth")
    path = tmp_path / "whole.pth"
    torch.save(tiny().state_dict(), path)
    data = path.read_bytes()
    for damaged in (
        b"",
        b"G",
        b"Just text",
        b"(see",
        b"<html>quota exceeded</html>",
        data[: len(data) // 2],
        data[:100],
    ):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="is damaged or not a PyTorch weight file"):
            read_file(path)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="holds a list"):
        read_file(path)
    path.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(ValueError, match="is damaged or not a PyTorch weight file"):
        read_file(path)


@pytest.mark.parametrize("at", [5_000, 50_000, 200_000, -30])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_that_ends_too_early(tmp_path, at, zipped):
    path = tmp_path / "cut.pth"
    torch.save({"model_state_dict": tiny().state_dict()}, path, _use_new_zipfile_serialization=zipped)
    path.write_bytes(path.read_bytes()[:at])
    with pytest.raises(
        ValueError, match="cut.pth is damaged or not a PyTorch weight file; download or write it again$"
    ):
        read_file(path)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE])
def test_a_file_that_cannot_be_read_keeps_the_reason(tmp_path, monkeypatch, number):
    torch.save(tiny().state_dict(), tmp_path / "here.pth")

    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(torch, "load", refuse)
    with pytest.raises(OSError, match=re.escape(f"here.pth cannot be read ({os.strerror(number)}); check its ")):
        read_file(tmp_path / "here.pth")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            {"clusters": 1},
            "has 5 clusters, ghost clusters included, but 1 + 1 were asked for; use --supervlad_clusters=4 "
            "--ghost_clusters=1 or --supervlad_clusters=5 --ghost_clusters=0 or --supervlad_clusters=3 "
            "--ghost_clusters=2 or --supervlad_clusters=2 --ghost_clusters=3 or any other K + G = 5, "
            "whichever it was trained with",
        ),
        (
            {"clusters": 1, "ghost_clusters": 7},
            "but 1 + 7 were asked for; use --supervlad_clusters=4 --ghost_clusters=1",
        ),
        ({"crossimage_encoder": True}, "has no cross-image encoder, but one was asked for; leave out"),
    ],
)
def test_a_misfit_names_the_option(tmp_path, asked, message):
    torch.save(released_content(tiny()), tmp_path / "file.pth")
    with pytest.raises(ValueError, match=re.escape(message)):
        load_checkpoint(tiny(**asked), tmp_path / "file.pth")


@pytest.mark.parametrize(
    ("total", "first", "every"),
    [
        (1, (1, 0), 1),
        (2, (1, 1), 2),
        (3, (1, 2), 3),  # the released 1-cluster model
        (4, (3, 1), 4),
        (5, (4, 1), 4),  # the other released ones
        (9, (8, 1), 4),
        (65, (64, 1), 4),
    ],
)
def test_splits_that_fit_are_named_the_likeliest_first(tmp_path, total, first, every):
    torch.save(released_content(tiny(clusters=total, ghost_clusters=0)), tmp_path / "file.pth")
    with pytest.raises(ValueError) as error:
        load_checkpoint(tiny(clusters=70, ghost_clusters=1), tmp_path / "file.pth")
    message = str(error.value)
    named = [
        tuple(map(int, pair)) for pair in re.findall(r"--supervlad_clusters=(-?\d+) --ghost_clusters=(-?\d+)", message)
    ]
    assert named[0] == first and len(named) == len(set(named)) == every and "\n" not in message
    assert all(K >= 1 and G >= 0 and total == K + G for K, G in named)
    assert message.count(f" or any other K + G = {total}, whichever") == (total > 4)


def test_an_encoder_that_was_not_asked_for(tmp_path):
    torch.save(released_content(tiny(crossimage_encoder=True)), tmp_path / "file.pth")
    with pytest.raises(ValueError, match="add --crossimage_encoder"):
        load_checkpoint(tiny(), tmp_path / "file.pth")


def test_our_files_tell_ghost_clusters_from_clusters(tmp_path):
    """The tensor holds only their sum, so another split of the same sum would load and be wrong."""
    written = {"clusters": 4, "ghost_clusters": 1}
    torch.save({"model_state_dict": tiny().state_dict(), "model": written}, tmp_path / "ours.pth")
    with pytest.raises(ValueError, match="use --supervlad_clusters=4 --ghost_clusters=1$"):
        load_checkpoint(tiny(clusters=3, ghost_clusters=2), tmp_path / "ours.pth")


def test_another_backbone(tmp_path):
    torch.save(tiny().state_dict(), tmp_path / "tiny.pth")
    with torch.device("meta"):
        small = build_model(backbone="dino_small")
    with pytest.raises(ValueError, match="use --backbone=dino_tiny"):
        load_checkpoint(small, tmp_path / "tiny.pth")


def test_missing_or_surplus_tensors(tmp_path):
    state = tiny().state_dict()
    state["surplus"] = torch.zeros(1)
    torch.save(state, tmp_path / "file.pth")
    with pytest.raises(ValueError, match="surplus"):
        load_checkpoint(tiny(), tmp_path / "file.pth")
    torch.save({"something": torch.zeros(1)}, tmp_path / "file.pth")
    with pytest.raises(ValueError, match="holds no DINOv2 backbone"):
        load_checkpoint(tiny(), tmp_path / "file.pth")


def test_files_with_a_model_entry_of_another_kind(tmp_path):
    """Other projects keep the state dict itself there."""
    torch.save({"model": {"pos_embed": torch.zeros(1)}, "epoch": 3}, tmp_path / "other.pth")
    assert weights.model_of(tmp_path / "other.pth", read_file(tmp_path / "other.pth")) == {}
    with pytest.raises(ValueError, match="holds no DINOv2 backbone"):
        load_checkpoint(tiny(), tmp_path / "other.pth")


def test_foundation_file(tmp_path):
    saved, model = tiny(), tiny()
    torch.save(saved.backbone.state_dict(), tmp_path / "dinov2.pth")
    load_foundation(model.backbone, tmp_path / "dinov2.pth")
    assert same_weights(model.backbone, saved.backbone)
    with torch.device("meta"):
        base = build_model(backbone="dino")
    with pytest.raises(ValueError, match="use --backbone=dino_tiny"):
        load_foundation(base.backbone, tmp_path / "dinov2.pth")


@pytest.mark.parametrize("prefix", ["", "module."])
def test_the_backbone_of_a_checkpoint_is_a_foundation_too(tmp_path, prefix):
    """Of ours and of the released form; its layer and encoder are left behind."""
    saved, model = tiny(clusters=2, crossimage_encoder=True), tiny()
    layer = model.aggregation.conv.weight.clone()
    state = {prefix + name: value for name, value in saved.state_dict().items()}
    torch.save({"model_state_dict": state, "resize": [56, 56]}, tmp_path / "best_model.pth")
    load_foundation(model.backbone, tmp_path / "best_model.pth")
    assert same_weights(model.backbone, saved.backbone) and torch.equal(model.aggregation.conv.weight, layer)


def test_where_foundation_weights_are_published():
    base = "https://dl.fbaipublicfiles.com/dinov2/"
    assert foundation_address("dino") == base + "dinov2_vitb14/dinov2_vitb14_pretrain.pth"
    assert foundation_address("dino_giant_reg") == base + "dinov2_vitg14/dinov2_vitg14_reg4_pretrain.pth"
    assert len(FOUNDATION_FILES) == 8


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
    monkeypatch.setattr(weights, "foundation_address", lambda _: f"{address}/tiny.pth")
    path = weights.fetch_foundation("dino_tiny")
    assert path == tmp_path / "hub/checkpoints/tiny.pth"
    other = tiny()
    load_foundation(other.backbone, path)
    assert same_weights(other.backbone, model.backbone)
    (folder / "tiny.pth").unlink()
    assert weights.fetch_foundation("dino_tiny") == path
    path.unlink()
    with pytest.raises(ValueError, match=r"not be downloaded \(.*404.*\); get http.*/tiny.pth elsewhere .*put it at"):
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
    load_checkpoint(model, weights.fetch_released("1-ClusterVLAD"))
    assert same_weights(model, saved)
    # A page instead of the file, no file at all, no gdown: one error, and nothing is left behind.
    path = weights.cached("1-ClusterVLAD.pth")
    path.unlink()
    (folder / "file").write_text("<html>quota exceeded")
    for change, reason in (
        (lambda: None, "damaged or not a PyTorch weight file"),
        (lambda: (folder / "file").unlink(), "404"),
        (lambda: monkeypatch.setitem(sys.modules, "gdown", None), "pip install gdown"),
    ):
        change()
        with pytest.raises(ValueError, match=f"--resume=1-ClusterVLAD could not be downloaded .*{reason}") as error:
            weights.fetch_released("1-ClusterVLAD")
        assert "https://drive.google.com/uc?id=1pQ" in str(error.value) and str(path) in str(error.value)
        assert not list(path.parent.iterdir())
