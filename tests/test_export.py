"""ONNX and safetensors: written, read by others and by us, and refused where they would be wrong."""

import json
import sys

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import eval as eval_script
from datasets.transforms import IMAGENET_MEAN, IMAGENET_STD
from model import build_model, export, weights
from model.weights import load_checkpoint, read_file

MODELS = {
    "encoder": {"clusters": 4, "ghost_clusters": 1, "crossimage_encoder": True},
    "one_cluster": {"clusters": 1, "ghost_clusters": 2, "crossimage_encoder": False},
}


@pytest.fixture(params=MODELS)
def saved(request, tmp_path):
    """A model, and the checkpoint as train.py writes it."""
    settings = {"backbone": "dino_tiny", **MODELS[request.param]}
    torch.manual_seed(3)
    model = build_model(**settings).eval()
    content = {"model_state_dict": model.state_dict(), "model": settings, "resize": [70, 56]}
    torch.save(content, tmp_path / "best_model.pth")
    return model, settings, tmp_path / "best_model.pth"


def test_onnx(saved, tmp_path, capsys, monkeypatch):
    """One of the models as a large one is written, its weights in a file of their own."""
    model, settings, path = saved
    files = {"best_model.pth", "model.onnx"}
    if model.encoder is None:
        monkeypatch.setattr(export, "ONE_FILE", 0)
        files.add("model.onnx.data")
    else:
        (tmp_path / "model.onnx.data").write_text("of an earlier export")
    export.main(f"--resume {path} --resize 56 70 --no-upright --output {tmp_path}/model.onnx".split())
    shown = capsys.readouterr()
    assert "model.onnx: descriptors differ by" in shown.out and ("batches of one" in shown.out) == bool(model.encoder)
    assert shown.err == "WARNING: the model was validated at 70 56 and --resize is 56 70\n"
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (image,), (descriptor,) = session.get_inputs(), session.get_outputs()
    assert image.name == "images" and image.shape[1:] == [3, 56, 70] and isinstance(image.shape[0], str)
    assert descriptor.name == "descriptors" and descriptor.shape[1:] == [model.descriptor_dim]
    for count in (1, 2, 5):
        images = torch.randn(count, 3, 56, 70)
        with torch.inference_mode():
            expected = model(images).numpy()
        (found,) = session.run(None, {"images": images.numpy()})
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    facts = session.get_modelmeta().custom_metadata_map
    assert json.loads(facts["model"]) == settings and json.loads(facts["resize"]) == [56, 70]
    assert json.loads(facts["antialias"]) is True and json.loads(facts["upright"]) is False
    assert json.loads(facts["mean"]) == list(IMAGENET_MEAN) and json.loads(facts["std"]) == list(IMAGENET_STD)
    assert {file.name for file in tmp_path.iterdir()} == files


def test_safetensors(saved, tmp_path, city, capsys):
    model, settings, path = saved
    assert export.main(f"--resume {path} --output {tmp_path}/model.safetensors".split()) == 0
    assert "weights read back, largest difference 0" in capsys.readouterr().out
    with safe_open(tmp_path / "model.safetensors", framework="np") as file:
        facts = file.metadata()
        assert json.loads(facts["model"]) == settings and set(file.keys()) == set(model.state_dict())
    assert json.loads(facts["resize"]) == [70, 56], "the checkpoint's, where none is given"
    assert facts["antialias"] == facts["upright"] == "true"
    other = build_model(**settings)
    load_checkpoint(other, tmp_path / "model.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), model.state_dict().values(), strict=True))
    # eval.py takes everything from the file, the backbone too, and finds what it finds with the checkpoint.
    recalls = []
    for file in (tmp_path / "model.safetensors", path):
        flags = (
            f"--eval_datasets_folder={city} --eval_dataset_name=toy_city --num_workers=0 --device=cpu --resize 56 56"
        )
        eval_script.main([*flags.split(), f"--resume={file}", f"--save_dir={tmp_path}/{file.suffix}"])
        (folder,) = (tmp_path / file.suffix).iterdir()
        recalls.append(json.loads((folder / "results.json").read_text())["recalls"])
        assert "from the checkpoint: --backbone dino_tiny, --supervlad_clusters" in (folder / "info.log").read_text()
    assert recalls[0] == recalls[1]


@pytest.mark.parametrize(("written", "expected"), [([56, 42], [56, 42]), (None, [322, 322]), ("large", [322, 322])])
def test_the_size_is_the_checkpoints_unless_given(tmp_path, capsys, written, expected):
    """Else the released models'; and a file goes on telling it when it is exported again."""
    model = build_model(backbone="dino_tiny")
    torch.save({"model_state_dict": model.state_dict(), "resize": written}, tmp_path / "model.pth")
    export.main(f"--resume {tmp_path}/model.pth --backbone dino_tiny --output {tmp_path}/a.safetensors".split())
    export.main(f"--resume {tmp_path}/a.safetensors --output {tmp_path}/b.safetensors".split())
    for name in ("a", "b"):
        with safe_open(tmp_path / f"{name}.safetensors", framework="np") as file:
            assert json.loads(file.metadata()["resize"]) == expected
    assert "WARNING" not in capsys.readouterr().err


def test_released_checkpoints_go_by_name(tmp_path, monkeypatch):
    """In the released form, which does not say what it is of."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    model = build_model(backbone="dino_tiny", clusters=1, ghost_clusters=2)
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    torch.save({"model_state_dict": state}, weights.cached("1-ClusterVLAD.pth"))
    output = tmp_path / "model.safetensors"
    export.main(f"--resume 1-ClusterVLAD --backbone dino_tiny --output {output}".split())
    written = {"backbone": "dino_tiny", "clusters": 1, "ghost_clusters": 2, "crossimage_encoder": False}
    assert read_file(output)["model"] == written


@pytest.fixture
def refused(saved, capsys, tmp_path):
    """Exports what is to be refused, and returns the message; nothing may be left."""

    def run(flags, output):
        with pytest.raises(SystemExit) as exit_:
            export.main(f"--resume {saved[2]} --output {output} --resize 56 56 {flags}".split())
        assert exit_.value.code == 2
        assert {file.name for file in tmp_path.iterdir()} == {"best_model.pth"}
        return capsys.readouterr().err

    return run


@pytest.mark.parametrize("saved", ["one_cluster"], indirect=True)
def test_what_is_refused(refused, tmp_path, monkeypatch):
    assert "neither .onnx nor .safetensors" in refused("", tmp_path / "model.pt")
    assert "there is no folder" in refused("", tmp_path / "none" / "model.onnx")
    assert "--resize 56 57 is not a multiple" in refused("--resize 56 57", tmp_path / "model.onnx")
    assert "use --supervlad_clusters=1 --ghost_clusters=2" in refused("--ghost_clusters=5", tmp_path / "model.onnx")
    monkeypatch.setattr(export, "TOLERANCE", -1.0)
    assert "its descriptors differ by" in refused("", tmp_path / "model.onnx")
    for package, output in (("onnxscript", "model.onnx"), ("safetensors.torch", "model.safetensors")):
        monkeypatch.setitem(sys.modules, package, None)
        assert f"takes the package {package.split('.')[0]}, which is missing" in refused("", tmp_path / output)


def test_safetensors_of_other_projects_say_nothing_of_ours(tmp_path):
    for number, metadata in enumerate((None, {"model": "vit", "resize": "322x322"}, {"model": "[1]", "resize": "322"})):
        path = tmp_path / f"{number}.safetensors"
        save_file({"pos_embed": torch.zeros(1)}, path, metadata)
        content = read_file(path)
        assert weights.model_of(path, content) == {} and weights.size_of(content) is None
        assert "pos_embed" in content["model_state_dict"]


def test_safetensors_that_cannot_be_read(tmp_path, monkeypatch):
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    with pytest.raises(ValueError, match="damaged or not a safetensors file"):
        read_file(tmp_path / "cut.safetensors")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ValueError, match="takes the package safetensors; pip install safetensors"):
        read_file(tmp_path / "cut.safetensors")
