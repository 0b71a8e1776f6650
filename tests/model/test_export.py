"""ONNX and safetensors: written, read by others and by us, and refused where they would be wrong."""

import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from helpers import MODEL, only_run, results_of, rows_of, same_weights, tiny
from PIL import ExifTags, Image
from safetensors import safe_open
from safetensors.torch import save_file

import eval as eval_script
import test as evaluation
from datasets.photos.transforms import IMAGENET_MEAN, IMAGENET_STD
from model import export, onnx_file, published, weights
from model.weights import load_checkpoint, read_file


def onnx_example():
    """The pages' way to ask an ONNX file."""
    root = Path(__file__).parents[2]
    pages = [page.read_text() for page in (root / "README.md", *root.glob("docs/*.md"))]
    (example,) = [e for page in pages for e in re.findall(r"```python\n(.*?)```", page, re.S) if "onnxruntime" in e]
    return example


@pytest.fixture(scope="module", autouse=True)
def each_graph_once():
    """Equal models share the exporter's graph, which takes seconds."""
    graphs, real = {}, onnx_file._program

    def program(model, images):
        key = model.backbone.size, model.encoder is None, images.shape
        if key not in graphs:
            graphs[key] = real(model, images)
        return graphs[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_file, "_program", program)
        yield


@pytest.fixture
def large(monkeypatch):
    """Lets the exporter take models for large ones, whose weights go into a file of their own."""
    return lambda: monkeypatch.setattr("torch.onnx._internal.exporter._onnx_program._LARGE_MODEL_THRESHOLD", 0)


@pytest.mark.slow
@pytest.mark.parametrize("saved", ["encoder", "dinov3"], indirect=True)
def test_onnx(saved, tmp_path, capsys, monkeypatch, large):
    model, settings, path = saved
    files = {"best_model.pth", "model.onnx"}
    if model.encoder is None:
        large()
        files.add("model.onnx.data")
    size = [80, 48] if "dinov3" in settings["backbone"] else [56, 70]
    export.main(f"--resume {path} --resize {size[0]} {size[1]} --no-upright --output {tmp_path}/model.onnx".split())
    shown = capsys.readouterr()
    assert "model.onnx: " in shown.out and ("batches of one" in shown.out) == bool(model.encoder)
    assert shown.err.startswith("WARNING: the model was validated at") and shown.err.count("\n") == 1
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (image,), (descriptor,) = session.get_inputs(), session.get_outputs()
    assert image.name == "images" and image.shape[1:] == [3, *size] and isinstance(image.shape[0], str)
    assert descriptor.name == "descriptors" and descriptor.shape[1:] == [model.descriptor_dim]
    for count in (1, 2, 5):
        images = torch.randn(count, 3, *size)
        with torch.inference_mode():
            expected = model(images).numpy()
        (descriptors,) = session.run(None, {"images": images.numpy()})
        np.testing.assert_allclose(descriptors, expected, rtol=0, atol=1e-5)
    metadata = session.get_modelmeta().custom_metadata_map
    assert metadata.pop("source") == "best_model.pth"
    facts = {name: json.loads(text) for name, text in metadata.items()}
    normalised = {"mean": [*IMAGENET_MEAN], "std": [*IMAGENET_STD]}
    told = {"model": settings, "resize": size, "antialias": True, "upright": False, **normalised}
    assert facts.items() >= told.items()
    assert {file.name for file in tmp_path.iterdir()} == files

    # The pages' example, as it stands, with a map: it finds what eval.py finds, but that Pillow rounds what it resizes.
    monkeypatch.chdir(tmp_path)
    shutil.move("model.onnx", "supervlad.onnx")
    held_upright = Image.Exif()
    held_upright[ExifTags.Base.Orientation] = 6
    rng = np.random.default_rng(0)
    for name in ("known/@1@10@.jpg", "known/@2@20@.jpg", "known/@3@30@.jpg", "asked/a.jpg"):
        Path(name).parent.mkdir(exist_ok=True)
        pixels = rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((640, 480)).save(name, exif=held_upright)
    flags = f"--resume={path} --resize {size[0]} {size[1]} --database_folder=known --queries_folder=asked --no_labels"
    making = f"--save_map=city.npz --accept=4 --device=cpu --num_workers=0 --save_dir={tmp_path}/run"
    eval_script.main([*flags.split(), *making.split()])
    shutil.copy("asked/a.jpg", "a.jpg")
    names = {}
    exec(onnx_example(), names)
    first = rows_of(only_run(tmp_path / "run"))[0]
    asked = {name: names["city"][name][names["nearest"]] for name in ("paths", "positions")}
    assert os.fsdecode(asked["paths"]) == Path(first["database"]).name
    assert asked["positions"].tolist() == [float(first["database_east"]), float(first["database_north"])]
    assert names["distances"].min() == pytest.approx(float(first["squared_descriptor_distance"]), abs=1e-3)
    assert names["accepted"]


@pytest.mark.slow
def test_onnx_in_int8(saved, refused, tmp_path, capsys, monkeypatch, large):
    """A quarter of the size, nearly the same descriptors, and no file where they are not."""
    model, _, path = saved
    command = [f"--resume={path}", "--resize", "56", "70"]
    for name, flags in (("float", []), ("int8", ["--int8"])):
        export.main([*command, f"--output={tmp_path}/{name}.onnx", *flags])
    told = float(re.search(r"int8.onnx: .*cosine .* of at least ([\d.]+)", capsys.readouterr().out)[1])
    assert (tmp_path / "int8.onnx").stat().st_size < 0.4 * (tmp_path / "float.onnx").stat().st_size
    session = onnxruntime.InferenceSession(tmp_path / "int8.onnx")
    facts = session.get_modelmeta().custom_metadata_map
    assert facts["int8"] == "true" and json.loads(facts["resize"]) == [56, 70]
    images = torch.randn(3, 3, 56, 70)
    with torch.inference_mode():
        cosine = (torch.from_numpy(session.run(None, {"images": images.numpy()})[0]) * model(images)).sum(dim=1)
    assert 0.99 < told < 1.0001 and cosine.min() > 0.99
    large()
    export.main([*command, f"--output={tmp_path}/large.onnx", "--int8"])
    (again,) = onnxruntime.InferenceSession(tmp_path / "large.onnx").run(None, {"images": images.numpy()})
    np.testing.assert_array_equal(again, session.run(None, {"images": images.numpy()})[0])
    monkeypatch.setattr(onnx_file, "LEAST_COSINE", 1.1)
    monkeypatch.setattr(onnx_file, "TOLERANCE", -1.0)
    command.append(f"--output={tmp_path}/none.onnx")
    assert "--int8: " in (message := refused(*command, "--int8")) and "below 1.1" in message
    assert "more than -1e+00" in refused(*command)


def test_safetensors(saved, exported, tmp_path):
    """What eval.py finds with it is tested with DINOv3."""
    model, settings, path = saved
    facts = exported(path.name, "MODEL.Safetensors")
    assert facts["model"] == settings and facts["antialias"] is facts["upright"] is True
    assert facts["resize"] == [70, 56], "the checkpoint's, where none is given"
    with safe_open(tmp_path / "MODEL.Safetensors", framework="np") as file:
        assert set(file.keys()) == set(model.state_dict())
    load_checkpoint(other := tiny(**settings), tmp_path / "MODEL.Safetensors")
    assert same_weights(other, model)


@pytest.mark.parametrize(
    ("backbone", "written", "expected"),
    [
        ("dino_tiny", [56, 42], [56, 42]),
        ("dino_tiny", None, [322, 322]),
        ("dino_tiny", "large", [322, 322]),
        ("dinov3_tiny", None, [320, 320]),
    ],
)
def test_the_size_is_the_checkpoints_unless_given(tmp_path, exported, refused, capsys, backbone, written, expected):
    """Else the backbone's; and a file goes on telling it when it is exported again."""
    torch.save({"model_state_dict": tiny(backbone=backbone).state_dict(), "resize": written}, tmp_path / "model.pth")
    for source, output in (("model.pth", "a.safetensors"), ("a.safetensors", "b.safetensors")):
        facts = exported(source, output, f"--backbone={backbone}")
        assert facts["resize"] == expected
        known = expected if expected == written else None
        assert facts.get("validated_at") == known, "a size that was guessed is not a validated one"
    shown = capsys.readouterr()
    guessed = shown.out.count(f"does not say at which size it was validated; exported at {expected[0]} ")
    assert "WARNING" not in shown.err and guessed == (0 if known else 2)
    wrong = ["--resize", expected[0] + 1, expected[1]]
    assert f"--resize {expected[0] + 1} " in refused(f"--resume={tmp_path}/a.safetensors", "--output=b.onnx", *wrong)


@pytest.fixture
def log_of(tmp_path, city, capsys):
    """The log of eval.py with a file, of plain folders, and its results."""

    def run(file, *flags):
        capsys.readouterr()
        folders = [f"--{kind}_folder={city}/toy_city/images/test/{kind}" for kind in ("database", "queries")]
        more = "--num_workers=0 --device=cpu --no_labels --recall_values 1".split()
        save_dir = tmp_path / f"runs{len(list(tmp_path.glob('runs*')))}"
        eval_script.main([*more, *folders, f"--resume={tmp_path}/{file}", f"--save_dir={save_dir}", *flags])
        return capsys.readouterr().err, results_of(only_run(save_dir))

    return run


def test_the_size_at_which_a_model_was_validated_stays_known(trained, exported, capsys, log_of):
    warning = "WARNING: the model was validated at 56 56, but is exported at 112 84\n"
    exported("best.pth", "other.safetensors", "--resize", "112", "84")
    exported("other.safetensors", "again.safetensors")
    assert capsys.readouterr().err == 2 * warning, "it goes on knowing both"
    shown, results = log_of("again.safetensors")
    assert results["resize"] == [112, 84] and shown.count("validated at") == shown.count("validated at 56 56") == 1


def test_the_preparation_that_a_file_says_is_followed_in_plain_folders(
    trained, exported, tmp_path, evaluated, log_of, monkeypatch
):
    calls, real = [], evaluation.image_batches
    monkeypatch.setattr(evaluation, "image_batches", lambda *a, **k: calls.append(k) or real(*a, **k))

    def prepared(*arguments):
        """antialias and upright: in the results, which is also how photos were read."""
        calls.clear()
        _, results = log_of(*arguments)
        preparation = results["antialias"], results["upright"]
        assert {(call["transform"].keywords["antialias"], call["upright"]) for call in calls} == {preparation}
        return preparation

    for source, output, flags, expected in (
        ("best.pth", "a.safetensors", ["--no-antialias", "--no-upright"], (False, False)),
        ("a.safetensors", "b.safetensors", [], (False, False)),  # kept when it is exported again
        ("a.safetensors", "c.safetensors", ["--upright"], (False, True)),
        ("best.pth", "d.safetensors", [], (True, True)),
    ):
        facts = exported(source, output, *flags)
        assert (facts["antialias"], facts["upright"]) == expected
    assert prepared("b.safetensors") == (False, False)
    assert prepared("b.safetensors", "--antialias") == (True, False), "the command line comes first"
    assert prepared("c.safetensors") == (False, True)
    results = results_of(evaluated(f"--resume={tmp_path}/d.safetensors"))
    assert (results["antialias"], results["upright"]) == (False, False), "benchmarks as published"


def test_released_checkpoints_go_by_name(tmp_path, exported, monkeypatch):
    """In the released form, which does not say what it is of."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    model = {"clusters": 1, "ghost_clusters": 2}
    state = {f"module.{name}": value for name, value in tiny(**model).state_dict().items()}
    torch.save({"model_state_dict": state}, published.cached("1-ClusterVLAD.pth"))
    monkeypatch.chdir(tmp_path)
    export.main("--resume 1-ClusterVLAD --backbone dino_tiny --output model.safetensors".split())
    content = read_file(tmp_path / "model.safetensors")
    assert content["model"] == MODEL | model
    assert weights.validated_size_of(content) == (322, 322)


@pytest.mark.parametrize("saved", ["one_cluster"], indirect=True)
def test_what_is_refused(saved, refused, tmp_path, monkeypatch):
    def message(output, *flags):
        return refused(f"--resume={saved[2]}", f"--output={output}", *(flags or ("--resize", 56, 56)))

    onnx = tmp_path / "model.onnx"
    assert "--output missing" in refused("--resume=a.pth") and "unknown option --outptu" in refused("--outptu=a.onnx")
    assert "neither .onnx nor .safetensors" in message(tmp_path / "model.pt")
    assert "--int8 is for .onnx" in message(tmp_path / "a.safetensors", "--int8")
    for folder in ("none", "best_model.pth"):
        told = refused("--resume=none.pth", f"--output={tmp_path}/{folder}/model.onnx")
        assert f"--output {tmp_path}/{folder}/model.onnx" in told, "before the checkpoint is read"
    assert "--resize 56 57" in message(onnx, "--resize", 56, 57)
    assert "use --supervlad_clusters=1 --ghost_clusters=2" in message(onnx, "--ghost_clusters=5")
    for name in ("e.onnx", "E.ONNX"):
        (tmp_path / name).write_bytes(b"onnx")
        told = refused(f"--resume={tmp_path}/{name}", f"--output={tmp_path}/c.safetensors")
        assert f"{name} is an ONNX file; give the checkpoint" in told
    for package, output in (("onnxscript", onnx), ("safetensors.torch", tmp_path / "model.safetensors")):
        monkeypatch.setitem(sys.modules, package, None)
        assert f"import of {package} halted" in (told := message(output)) and "pip install onnx " in told


def test_safetensors_of_other_projects_say_nothing_of_ours(tmp_path):
    for number, metadata in enumerate((None, {"model": "vit", "resize": "322x322"}, {"model": "[1]", "resize": "322"})):
        path = tmp_path / f"{number}.safetensors"
        save_file({"pos_embed": torch.zeros(1)}, path, metadata)
        content = read_file(path)
        assert weights.model_of(path, content) == {} and weights.size_of(content) is None
        assert "pos_embed" in content["model_state_dict"]


def test_safetensors_that_cannot_be_read(tmp_path, monkeypatch):
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    with pytest.raises(ValueError, match="cut.safetensors is damaged"):
        read_file(tmp_path / "cut.safetensors")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ValueError, match="pip install safetensors"):
        read_file(tmp_path / "cut.safetensors")


def failing(error):
    def fail(*_, **__):
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (torch.onnx.OnnxExporterError("Failed here. Next\nNext steps:\n* report"), "Failed here. Next"),
        (NotImplementedError(), "NotImplementedError"),
        (OSError(28, "No space left on device"), "No space left on device"),
    ],
)
@pytest.mark.parametrize("output", ["a.onnx", "a.safetensors"])
def test_a_writer_that_fails_is_one_line(trained, refused, tmp_path, monkeypatch, error, told, output):
    monkeypatch.setattr(torch.onnx, "export", failing(error))
    monkeypatch.setattr(Path, "write_bytes", failing(error))
    shown = refused(f"--resume={trained}", f"--output={tmp_path}/{output}")
    assert shown.startswith(f"ERROR: --output {tmp_path}/{output} ") and told in shown and shown.count("\n") == 1


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("swallowed", [False, True])
def test_a_signal_leaves_nothing_behind(trained, refused, tmp_path, monkeypatch, signum, status, swallowed):
    """PyTorch's lazy imports, most of the time of a short export, may turn it into another error."""
    files = []

    def signalled(*_, **__):
        files.append(len(list(tmp_path.iterdir())))
        try:
            signal.raise_signal(signum)
        except SystemExit:
            if not swallowed:
                raise
            raise AttributeError("module has no such attribute") from None

    before = signal.getsignal(signum)
    monkeypatch.setattr(torch.onnx, "export", signalled)
    monkeypatch.setattr(Path, "write_bytes", signalled)
    for output in ("a.onnx", "a.safetensors"):
        assert refused(f"--resume={trained}", f"--output={tmp_path}/{output}", status=status) == ""
    assert files == [3, 2] and signal.getsignal(signum) is before
