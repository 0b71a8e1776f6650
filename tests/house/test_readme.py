"""What README.md and the pages beside it tell people to type, and what MODELS.md says of weights."""

import importlib
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import SMALL, only_run, results_of, rows_of, save_weights
from PIL import ExifTags, Image

import eval as eval_script
from datasets.evaluation.protocols import PROTOCOLS
from model import build_model, weights
from parser import EvalOptions, TrainOptions, parse

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "REPRODUCE.md", ROOT / "MODELS.md", ROOT / "benchmarks" / "README.md"]
PAGES += [ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", ROOT / "RECIPES.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language):
    return [
        (page, block)
        for page in PAGES
        for block in re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)
    ]


COMMANDS = [
    pytest.param(line, id=f"{page.name}: {line[:60]}")
    for page, block in blocks("bash")
    for line in re.sub(r"\\\n\s*", "", block).splitlines()
]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_understood(command, capsys):
    """Scripts exist and take these options; what they then do is tested elsewhere."""
    words = shlex.split(re.sub(r"\$\(.*?\)|\.\.\.", "", command), comments=True)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return
    assert words[0] in ("python3", "torchrun")
    start = next(i for i, word in enumerate(words) if word in ("train.py", "eval.py", "-m"))
    script, flags = words[start], words[start + 1 :]
    if script == "train.py":
        parse(TrainOptions, ["--eval_datasets_folder=data", *flags])
    elif script == "eval.py":
        parse(EvalOptions, ["--eval_datasets_folder=data", "--resume=file.pth", *flags])
    else:
        with pytest.raises(SystemExit, match="^0$"):
            importlib.import_module(flags[0]).main(["--help"])
        options = set(re.findall(r"--\w+", capsys.readouterr().out))
        assert {flag.split("=")[0] for flag in flags if flag.startswith("--")} <= options


def test_the_pages_have_the_protocols_of_the_code():
    """Numbers and sources; the distance is tested by itself."""
    lines = (ROOT / "docs/evaluation.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| `")]
    table = {name.strip("`"): cells for name, *cells in rows if len(cells) == 4}
    assert list(table) == list(PROTOCOLS)
    for name, (database, queries, _, source) in table.items():
        protocol = PROTOCOLS[name]
        counts = [*protocol.queries, *protocol.query_sets.values(), *[protocol.database] * bool(protocol.database)]
        sets = [f"`{of}` {count:,}" for of, count in protocol.query_sets.items()]
        plain = [" or ".join(f"{count:,}" for count in protocol.queries)] * bool(protocol.queries)
        assert (queries, source) == (", ".join(plain + sets), protocol.source)
        assert database == (f"{protocol.database:,}" if protocol.database else "")
        (row,) = [line for line in (ROOT / "docs/data.md").read_text().splitlines() if f"`{name}` |" in line]
        assert [count for count in counts if f"{count:,}" not in row] == []


def example_with(text):
    """The Python example of the pages that has this in it."""
    ((_, example),) = [(page, block) for page, block in blocks("python") if text in block]
    return example.replace("/path/to/this/repository", str(ROOT))


def test_the_example_of_torch_hub_gives_the_descriptors_of_eval(tmp_path, monkeypatch, capsys):
    """As it stands but for the weights, random ones of the small backbone: for photos as phones write them."""
    example = example_with('"prepare"')
    entry = '"supervlad", source="local"'
    assert entry in example
    monkeypatch.chdir(tmp_path)
    held_upright = Image.Exif()
    held_upright[ExifTags.Base.Orientation] = 6
    rng = np.random.default_rng(0)
    for side, name, size, exif in (
        ("known", "a.jpg", (2592, 1944), held_upright),  # 5 megapixels
        ("asked", "b.jpg", (1200, 900), Image.Exif()),
    ):
        pixels = rng.integers(0, 256, (size[1] // 3, size[0] // 3, 3), dtype=np.uint8)  # detail that aliases
        Image.fromarray(pixels).resize(size).save(name, exif=exif)
        (tmp_path / side).mkdir()
        shutil.copy(name, tmp_path / side)
    example = example.replace(entry, f'{entry}, pretrained=False, backbone="dino_tiny"')
    names: dict[str, object] = {}
    exec(example, names)
    assert re.fullmatch(r"cosine similarity -?[01]\.\d{3}\n", capsys.readouterr().out)
    assert not torch.is_inference_mode_enabled()

    torch.save(names["model"].state_dict(), "model.pth")
    flags = "--database_folder=known --queries_folder=asked --no_labels --backbone=dino_tiny --resume=model.pth"
    eval_script.main(f"{flags} --device=cpu --num_workers=0 --save_descriptors --save_dir={tmp_path}/run".split())
    descriptors = only_run(tmp_path / "run") / "descriptors"
    for name, saved in (("a", "database"), ("b", "queries")):
        (descriptor,) = np.load(descriptors / f"{saved}.npy")
        np.testing.assert_allclose(descriptor, names[name].numpy(), rtol=0, atol=1e-5)
    # Neither turned nor antialiased is another descriptor: the test can fail.
    as_stored = torch.hub.load(str(ROOT), "prepare", source="local", antialias=False, upright=False)
    with torch.inference_mode():
        assert names["model"](as_stored("a.jpg")[None])[0] @ names["a"] < 0.999


def test_the_example_of_a_map_answers_as_eval_does(tmp_path, monkeypatch, capsys):
    """As it stands but for the name of the weights."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for name in ("known/a.png", "known/b.png", "known/c.png", "asked/d.png"):
        Path(name).parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (90, 120, 3), dtype=np.uint8)).save(name)
    save_weights(Path("model.pth"))
    flags = "--device=cpu --num_workers=0 --resume=model.pth --queries_folder=asked --no_labels".split()
    making = "--database_folder=known --backbone=dino_tiny --save_map=city.npz".split()
    eval_script.main([*flags, *making, f"--save_dir={tmp_path}/made"])
    eval_script.main([*flags, "--map=city.npz", f"--save_dir={tmp_path}/asked_of_map"])
    example = example_with('"place_map"').replace('resume="SuperVLAD"', 'resume="model.pth"')
    names: dict[str, object] = {"photo": np.asarray(Image.open("asked/d.png"))}
    exec(example, names)
    for save_dir in ("made", "asked_of_map"):
        first = rows_of(only_run(tmp_path / save_dir))[0]
        assert Path(names["path"]) == Path(first["database"]).absolute()
        assert names["distance"] == pytest.approx(float(first["squared_descriptor_distance"]), abs=1e-5)
    assert names["position"] is names["accepted"] is None


GEM = """
import sys
from pathlib import Path
import train, eval
from model import export

folder, data = Path(sys.argv[1]), sys.argv[2:]
training = "--gem --train_resize 56 56 --train_batch_size=4 --epochs_num=1 --freeze_te none".split()
train.main([*data, *training, f"--save_dir={folder}/trained"])
trained = folder / "trained/latest/best_model.pth"
export.main([f"--resume={trained}", f"--output={folder}/gem.safetensors"])
for file in (trained, folder / "gem.safetensors"):
    eval.main([*data, f"--resume={file}", f"--save_dir={folder}/{file.stem}"])
"""


@pytest.mark.slow
def test_the_lines_of_contributing_add_a_layer(city, tmp_path):
    """In a copy: it is trained for two steps, and its file, which says what it is, is evaluated and exported."""
    copy, ignored = tmp_path / "copy", shutil.ignore_patterns(".*", "tests", "data", "logs", "__pycache__")
    shutil.copytree(ROOT, copy, ignore=ignored)
    steps = re.findall(r"^`(\S+)`\n```(python|diff)\n(.*?)^```", (ROOT / "CONTRIBUTING.md").read_text(), re.M | re.S)
    assert len(steps) == 6
    for name, language, lines in steps:
        if language == "python":
            (copy / name).write_text(lines)
            continue
        before, after = ("".join(re.findall(rf"^[ {sign}](.*\n)", lines, re.M)) for sign in "-+")
        text = (copy / name).read_text()
        assert text.count(before) == 1, (name, before)
        (copy / name).write_text(text.replace(before, after))

    data = [*SMALL, f"--eval_datasets_folder={city}", "--eval_dataset_name=toy_city", "--recall_values", "1"]
    subprocess.run([sys.executable, "-c", GEM, tmp_path, *data], cwd=copy, check=True, capture_output=True, timeout=300)
    trained = tmp_path / "trained/latest/best_model.pth"
    assert torch.load(trained)["model_state_dict"].keys() >= {"aggregation.p"}
    found = [results_of(only_run(tmp_path / name)) for name in ("best_model", "gem")]
    assert found[0]["model"]["gem"] and found[0]["descriptor_dim"] == 96
    assert found[0]["recalls"] == found[1]["recalls"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)]+)\)", text):
        path, _, heading = target.partition("#")
        if path.startswith("http"):
            continue
        assert not path or (page.parent / path).exists(), target
        if heading:
            other = (page.parent / path).read_text() if path else text
            headings = re.findall(r"^#+ (.*)", other, re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", name.lower()).replace(" ", "-") for name in headings}
            assert heading in anchors, target


@pytest.mark.parametrize("name", [*weights.RELEASED, *weights.FOUNDATION_FILES, *weights.GATED_FILES])
def test_models_has_every_file_as_it_is_in_the_code(name):
    """One row each: where it is, its parameters, what these take."""
    (row,) = [line for line in (ROOT / "MODELS.md").read_text().splitlines() if line.startswith(f"| `{name}` |")]
    settings = {"backbone": name}
    if released := weights.RELEASED.get(name):
        where, settings = released.drive_id, released.model
    elif name in weights.FOUNDATION_FILES:
        where = weights.foundation_address(name).removeprefix("https://dl.fbaipublicfiles.com/dinov2/")
    else:
        where = weights.GATED_FILES[name]
    with torch.device("meta"):
        model = build_model(**settings)
    parameters = sum(p.numel() for p in (model if name in weights.RELEASED else model.backbone).parameters())
    expected = [f"`{where}`", f"{parameters:,}", f"{4 * parameters / 1e6:.1f}", "not computed here"]
    assert [cell.strip() for cell in row.split("|")][2:6] == expected
