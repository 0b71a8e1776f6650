"""ONNX and safetensors: written, read by others and by us, and refused where they would be wrong."""

import json
import shutil
import signal
import sys

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import ExifTags, Image
from safetensors import safe_open
from safetensors.torch import save_file
from test_readme import example_with

import eval as eval_script
import hubconf
import test as evaluation
import train as train_script
from datasets.photos.transforms import IMAGENET_MEAN, IMAGENET_STD, evaluation_transform, prepare
from model import build_model, export, weights
from model.weights import load_checkpoint, read_file

MODELS = {
    "encoder": {"clusters": 4, "ghost_clusters": 1, "crossimage_encoder": True},
    "one_cluster": {"clusters": 1, "ghost_clusters": 2, "crossimage_encoder": False},
}
# Of fewer blocks, since the exporter to ONNX takes a fifth of a second for each.
MODELS |= {f"short_{name}": {**settings, "backbone_blocks": 3} for name, settings in MODELS.items()}


@pytest.fixture(params=["encoder", "one_cluster"])
def saved(request, tmp_path):
    """A model, and the checkpoint as train.py writes it."""
    settings = {"backbone": "dino_tiny", **MODELS[request.param]}
    torch.manual_seed(3)
    model = build_model(**settings).eval()
    content = {"model_state_dict": model.state_dict(), "model": settings, "resize": [70, 56]}
    torch.save(content, tmp_path / "best_model.pth")
    return model, settings, tmp_path / "best_model.pth"


@pytest.mark.parametrize("saved", ["encoder", "short_one_cluster"], indirect=True)
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
    assert "model.onnx: descriptors differ from PyTorch's by at most" in shown.out and (
        "batches of one" in shown.out
    ) == bool(model.encoder)
    assert shown.err == "WARNING: the model was validated at 70 56, but is exported at 56 70\n"
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

    # The README's way to ask it, as it stands: what eval.py gives, but that Pillow rounds what it resizes.
    monkeypatch.chdir(tmp_path)
    shutil.move("model.onnx", "supervlad.onnx")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((640, 480)).save("a.jpg", exif=exif)
    names: dict[str, object] = {}
    exec(example_with("onnxruntime"), names)
    transform = evaluation_transform((56, 70), antialias=True)
    with torch.inference_mode():
        expected, other = (model(prepare("a.jpg", transform, upright=up)[None])[0].numpy() for up in (True, False))
    assert names["descriptor"].shape == expected.shape
    assert 1 - names["descriptor"] @ expected < 1e-4 < 1e-3 < 1 - other @ expected


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


@pytest.fixture
def evaluated(tmp_path, city):
    """A finished evaluation's folder: by `--save_descriptors`, of a file and with options."""
    flags = "--eval_dataset_name=toy_city --num_workers=0 --device=cpu --resize 56 56 --save_descriptors"

    def run(file, *more):
        save_dir = tmp_path / f"run{len(list(tmp_path.glob('run*')))}"
        given = [*flags.split(), f"--eval_datasets_folder={city}", f"--resume={file}", f"--save_dir={save_dir}", *more]
        eval_script.main(given)
        return next(save_dir.iterdir())

    return run


def numbers_of(folder):
    return np.load(folder / "descriptors" / "queries.npy")


@pytest.mark.parametrize(("saved", "whiten"), [("short_encoder", True), ("one_cluster", False)], indirect=["saved"])
def test_a_pca_becomes_part_of_the_file(saved, evaluated, tmp_path, capsys, whiten):
    """With and without the encoder: what eval.py computes with the options, the file gives by itself."""
    model, settings, path = saved
    flags = ["--pca_dim=6", "--pca_dataset_folder=toy_city/images/train", *["--pca_whiten"] * whiten]
    fitted = evaluated(path, *flags)
    expected = numbers_of(fitted)
    assert (abs(np.linalg.norm(expected, axis=1) - 1) < 1e-5).all() == whiten, "published figures: not again"
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    file, onnx = tmp_path / "small.safetensors", tmp_path / "small.onnx"
    for output in (file, onnx)[: 1 + whiten]:  # the second takes seconds
        export.main(f"--resume {path} --pca {fitted}/pca.pth --resize 56 56 --output {output}".split())
    shown = capsys.readouterr().out
    context = "; fitted in --encoder_context file_order" * (model.encoder is not None)
    assert (
        f"a PCA leaves 6 of {model.descriptor_dim} dimensions{', whitened' * whiten}, of unit norm{context}\n" in shown
    )
    folder = evaluated(file)
    np.testing.assert_allclose(numbers_of(folder), expected, atol=2e-5)
    log = (folder / "info.log").read_text()
    assert "from the checkpoint: a PCA to 6 numbers, normalised again" in log
    results = json.loads((folder / "results.json").read_text())
    assert results["descriptor_dim"] == 6
    if whiten:
        assert results["recalls"] == json.loads((fitted / "results.json").read_text())["recalls"]
    # Others read it too: torch.hub's copy of the package, ONNX Runtime, and who exports it again.
    images = torch.randn(3, 3, 56, 56)
    hub = hubconf._ours("model", "weights")
    loaded = hubconf._ours("model").build_model(**settings)
    assert hub.load_checkpoint(loaded, file)["pca"]["whiten"] is whiten
    with torch.inference_mode():
        mine = loaded.eval()(images).numpy()
    assert mine.shape == (3, 6)
    if whiten:
        (theirs,) = onnxruntime.InferenceSession(onnx).run(None, {"images": images.numpy()})
        np.testing.assert_allclose(theirs, mine, atol=1e-5)
    export.main(f"--resume {file} --output {tmp_path}/again.safetensors".split())
    assert read_file(tmp_path / "again.safetensors")["pca"]["dim"] == 6
    assert torch.equal(
        read_file(tmp_path / "again.safetensors")["model_state_dict"]["projection.mean"],
        read_file(file)["model_state_dict"]["projection.mean"],
    )


@pytest.mark.parametrize("saved", ["one_cluster"], indirect=True)
def test_a_pca_that_does_not_fit(saved, evaluated, tmp_path, capsys, city):
    model, settings, path = saved
    flags = ["--pca_dim=6", "--pca_dataset_folder=toy_city/images/train"]
    fitted = evaluated(path, *flags) / "pca.pth"
    content = read_file(fitted)
    file = tmp_path / "small.safetensors"
    export.main(f"--resume {path} --pca {fitted} --output {file}".split())
    torch.save({**content, "components": content["components"][:, 1:]}, tmp_path / "other.pth")
    other = build_model(**settings)
    torch.save({"model_state_dict": other.state_dict(), "model": settings}, tmp_path / "weights.pth")
    for source, pca, told in (
        (path, path, "best_model.pth holds no PCA; give the pca.pth that eval.py --pca_dim writes"),
        (
            path,
            tmp_path / "other.pth",
            f"has a PCA of {model.vectors_dim - 1}-dimensional descriptors, but the model's",
        ),
        (path, tmp_path / "none.pth", "no weight file at"),
        (file, fitted, "the checkpoint already ends with a PCA; leave out --pca"),
        (tmp_path / "weights.pth", fitted, "pca.pth was fitted on descriptors of other weights than the checkpoint's"),
    ):
        with pytest.raises(SystemExit) as exit_:
            export.main(f"--resume {source} --pca {pca} --output {tmp_path}/b.safetensors".split())
        assert exit_.value.code == 2 and told in capsys.readouterr().err
        assert not (tmp_path / "b.safetensors").exists()
    # What is not an error is said: another size, and a file of an older version, which tells no weights.
    capsys.readouterr()
    del content["pca"]["weights"]
    torch.save(content, tmp_path / "older.pth")
    for pca, size, told in (
        (fitted, "56 56", ""),
        (fitted, "70 56", "pca.pth was fitted on images of 56 56, but the export is for 70 56"),
        (
            tmp_path / "older.pth",
            "56 56",
            "older.pth does not say which weights it was fitted on; check that they are these",
        ),
    ):
        export.main(f"--resume {path} --pca {pca} --resize {size} --output {tmp_path}/b.safetensors".split())
        lines = [line for line in capsys.readouterr().err.splitlines() if "fitted on" in line]
        assert len(lines) == bool(told) and all(told in line for line in lines)
    with pytest.raises(SystemExit):
        evaluated(file, *flags)
    assert "already ends with a PCA to 6 numbers; leave the option out" in capsys.readouterr().err
    # Training starts from the weights without it.
    train_script.main(
        f"--eval_datasets_folder={city} --eval_dataset_name=toy_city --backbone=dino_tiny --supervlad_clusters=1 "
        f"--ghost_clusters=2 --resume={file} --epochs_num=0 --resize 56 56 --train_resize 56 56 --device=cpu "
        f"--num_workers=0 --train_batch_size=4 --save_dir={tmp_path}/trained".split()
    )
    assert "small.safetensors ends with a PCA, which training leaves out" in capsys.readouterr().err
    (best,) = (tmp_path / "trained").glob("*/best_model.pth")
    assert read_file(best)["model_state_dict"].keys() == model.state_dict().keys()


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
            known = json.loads(file.metadata().get("validated_at", "null"))
        assert known == (expected if expected == written else None), "a size that was guessed is not a validated one"
    shown = capsys.readouterr()
    assert "WARNING" not in shown.err
    guessed = shown.out.count("does not say at which size it was validated; exported at 322 322")
    assert guessed == (0 if expected == written else 2)


PHOTOS = "--num_workers=0 --device=cpu --no_labels --recall_values 1"


@pytest.fixture
def log_of(tmp_path, city, capsys):
    """The log of eval.py with a file, of plain folders."""

    def run(file, *flags):
        capsys.readouterr()
        folders = [f"--{kind}_folder={city}/toy_city/images/test/{kind}" for kind in ("database", "queries")]
        eval_script.main([*PHOTOS.split(), *folders, f"--resume={file}", f"--save_dir={tmp_path}/runs", *flags])
        return capsys.readouterr().err

    return run


@pytest.fixture
def trained(tmp_path):
    torch.manual_seed(3)
    settings = {"backbone": "dino_tiny", "clusters": 4, "ghost_clusters": 1, "crossimage_encoder": False}
    model = build_model(**settings)
    content = {"model_state_dict": model.state_dict(), "model": settings, "resize": [56, 56]}
    torch.save(content, tmp_path / "best.pth")
    torch.save(model.state_dict(), tmp_path / "bare.pth")
    return tmp_path / "best.pth"


def test_only_a_size_that_the_source_says_is_called_validated(trained, tmp_path, capsys, log_of):
    def exported(source, output, *flags):
        export.main([f"--resume={tmp_path}/{source}", f"--output={tmp_path}/{output}", "--backbone=dino_tiny", *flags])
        return capsys.readouterr().err

    assert exported("bare.pth", "bare.safetensors", "--resize", "42", "42") == ""
    shown = log_of(tmp_path / "bare.safetensors", "--resize", "56", "42")
    assert "validated at" not in shown and "the file was exported for 42 42, but --resize is 56 42\n" in shown
    warning = "WARNING: the model was validated at 56 56, but is exported at 112 84\n"
    assert exported("best.pth", "other.safetensors", "--resize", "112", "84") == warning
    assert exported("other.safetensors", "again.safetensors") == warning, "it goes on knowing both"
    shown = log_of(tmp_path / "again.safetensors")
    assert "--resize 112 84" in shown and shown.count("validated at 56 56") == 1 and "validated at 112" not in shown
    assert "validated at" not in log_of(tmp_path / "again.safetensors", "--resize", "56", "56")


def test_the_preparation_that_a_file_says_is_followed_in_plain_folders(trained, tmp_path, city, log_of):
    def exported(source, output, *flags):
        export.main([f"--resume={tmp_path}/{source}", f"--output={tmp_path}/{output}", *flags])
        with safe_open(tmp_path / output, framework="np") as file:
            return file.metadata()["antialias"], file.metadata()["upright"]

    def options_of():
        results = max((tmp_path / "runs").glob("*/results.json"), key=lambda path: path.stat().st_mtime_ns)
        options = json.loads(results.read_text())["options"]
        return options["antialias"], options["upright"]

    assert exported("best.pth", "a.safetensors", "--no-antialias", "--no-upright") == ("false", "false")
    assert exported("a.safetensors", "b.safetensors") == ("false", "false"), "kept when it is exported again"
    assert exported("a.safetensors", "c.safetensors", "--upright") == ("false", "true")
    shown = log_of(tmp_path / "b.safetensors")
    assert options_of() == (False, False) and ", --no-antialias\n" in shown
    assert "plain folders, photos not turned as EXIF says since the checkpoint says so\n" in shown
    log_of(tmp_path / "b.safetensors", "--antialias")
    assert options_of() == (True, False), "the command line comes first"
    log_of(tmp_path / "c.safetensors")
    assert options_of() == (False, True)
    log_of(trained)
    assert options_of() == (True, True)
    assert exported("best.pth", "d.safetensors") == ("true", "true")
    flags = f"--eval_datasets_folder={city} --eval_dataset_name=toy_city --resume={tmp_path}/d.safetensors"
    eval_script.main([*"--num_workers=0 --device=cpu".split(), *flags.split(), f"--save_dir={tmp_path}/runs"])
    assert options_of() == (False, False), "benchmarks as published"


def test_photos_are_turned_only_if_the_file_says_so(trained, tmp_path, log_of, monkeypatch):
    asked = []
    real = evaluation.image_batches
    monkeypatch.setattr(
        evaluation, "image_batches", lambda *a, **k: asked.append((k["upright"], k["transform"])) or real(*a, **k)
    )
    export.main(f"--resume={trained} --output={tmp_path}/a.safetensors --no-upright --antialias".split())
    log_of(tmp_path / "a.safetensors")
    log_of(trained)
    assert [upright for upright, _ in asked] == [False, False, True, True]
    assert all(transform.keywords["antialias"] for _, transform in asked)


def test_released_checkpoints_go_by_name(tmp_path, monkeypatch):
    """In the released form, which does not say what it is of."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    model = build_model(backbone="dino_tiny", clusters=1, ghost_clusters=2)
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    torch.save({"model_state_dict": state}, weights.cached("1-ClusterVLAD.pth"))
    output = tmp_path / "model.safetensors"
    export.main(f"--resume 1-ClusterVLAD --backbone dino_tiny --output {output}".split())
    written = {"backbone": "dino_tiny", "clusters": 1, "ghost_clusters": 2, "crossimage_encoder": False}
    content = read_file(output)
    assert content["model"] == written and weights.validated_size_of(content) == (322, 322)


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


@pytest.mark.parametrize("saved", ["short_one_cluster"], indirect=True)
def test_what_is_refused(refused, tmp_path, monkeypatch):
    assert "neither .onnx nor .safetensors" in refused("", tmp_path / "model.pt")
    assert "there is no folder" in refused("", tmp_path / "none" / "model.onnx")
    assert f"--output {tmp_path} is a folder; name a file in it" in refused("", tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(export.os, "access", lambda *_: False)
        assert f"{tmp_path} is not writable; name another folder" in refused("", tmp_path / "model.onnx")
    assert "--resize 56 57 is not a multiple" in refused("--resize 56 57", tmp_path / "model.onnx")
    assert "use --supervlad_clusters=1 --ghost_clusters=2" in refused("--ghost_clusters=5", tmp_path / "model.onnx")
    monkeypatch.setattr(export, "TOLERANCE", -1.0)
    assert "its descriptors differ by" in refused("", tmp_path / "model.onnx")
    for package, output in (("onnxscript", "model.onnx"), ("safetensors.torch", "model.safetensors")):
        monkeypatch.setitem(sys.modules, package, None)
        assert f"needs the package {package.split('.')[0]}, which is missing" in refused("", tmp_path / output)


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
    with pytest.raises(ValueError, match="needs the package safetensors; pip install safetensors"):
        read_file(tmp_path / "cut.safetensors")


def failing(error):
    def fail(*_, **__):
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (torch.onnx.OnnxExporterError("\x1b[96mFailed\x1b[0m here. Next\nNext steps:\n* report"), "Failed here. Next"),
        (RuntimeError("no kernel\nof many lines"), "no kernel"),
        (NotImplementedError(), "NotImplementedError"),
    ],
)
def test_an_exporter_that_fails_is_one_line(trained, tmp_path, capsys, monkeypatch, error, told):
    monkeypatch.setattr(torch.onnx, "export", failing(error))
    with pytest.raises(SystemExit) as exit_:
        export.main(f"--resume={trained} --output={tmp_path}/a.onnx".split())
    shown = capsys.readouterr().err
    remedy = "use other versions of torch, onnxscript or onnxruntime"
    assert shown == f"ERROR: {tmp_path}/a.onnx was not written: the exporter failed ({told}); {remedy}\n"
    assert exit_.value.code == 2 and {path.name for path in tmp_path.iterdir()} == {"best.pth", "bare.pth"}


def test_an_output_that_cannot_be_written(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(export.tempfile, "TemporaryDirectory", failing(OSError(28, "No space left on device")))
    for output in ("a.onnx", "a.safetensors"):
        with pytest.raises(SystemExit):
            export.main(f"--resume={trained} --output={tmp_path}/{output}".split())
        assert f"--output {tmp_path}/{output} could not be written (No space left on device)" in capsys.readouterr().err


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("output", ["a.onnx", "a.safetensors"])
def test_a_signal_leaves_nothing_behind(trained, tmp_path, capsys, monkeypatch, signum, status, output):
    found = []

    def signalled(*_, **__):
        found.append({path.name for path in tmp_path.iterdir()})
        signal.raise_signal(signum)

    before = signal.getsignal(signum)
    monkeypatch.setattr(torch.onnx, "export", signalled)
    monkeypatch.setattr(
        export, "read_file", lambda path, n=[]: n.append(1) or (signalled() if n[1:] else read_file(path))
    )
    with pytest.raises(SystemExit) as exit_:
        export.main(f"--resume={trained} --output={tmp_path}/{output}".split())
    assert exit_.value.code == status and capsys.readouterr().err == "" and signal.getsignal(signum) is before
    assert len(found[0]) == 3 and {path.name for path in tmp_path.iterdir()} == {"best.pth", "bare.pth"}


def test_suffixes_in_capitals(trained, tmp_path, capsys):
    assert export.main(f"--resume={trained} --output={tmp_path}/A.SAFETENSORS".split()) == 0
    assert export.main(f"--resume={tmp_path}/A.SAFETENSORS --output={tmp_path}/B.Safetensors".split()) == 0
    assert read_file(tmp_path / "B.Safetensors")["resize"] == [56, 56]
    assert export.arguments(["--resume=x", f"--output={tmp_path}/X.ONNX"]).output.name == "X.ONNX"
    for name in ("e.onnx", "E.ONNX"):
        (tmp_path / name).write_bytes(b"onnx")
        with pytest.raises(SystemExit):
            export.main(f"--resume={tmp_path}/{name} --output={tmp_path}/c.safetensors".split())
        assert f"{name} is an ONNX file, which cannot be loaded; give the checkpoint" in capsys.readouterr().err


def test_a_signal_that_pytorch_makes_another_error_of(trained, tmp_path, capsys, monkeypatch):
    """As its lazy imports do, which are most of the time of a short export."""

    def swallowed(*_, **__):
        try:
            signal.raise_signal(signal.SIGTERM)
        except SystemExit:
            raise AttributeError("module has no such attribute") from None

    monkeypatch.setattr(torch.onnx, "export", swallowed)
    with pytest.raises(SystemExit) as exit_:
        export.main(f"--resume={trained} --output={tmp_path}/a.onnx".split())
    assert exit_.value.code == 143 and capsys.readouterr().err == ""
    assert {path.name for path in tmp_path.iterdir()} == {"best.pth", "bare.pth"}
