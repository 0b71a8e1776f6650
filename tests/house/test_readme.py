"""What README.md and the pages beside it tell people to type, and what MODELS.md says of weights."""

import csv
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

import eval as eval_script
from datasets import check, to_gsv_cities, toy_city
from datasets.evaluation.protocols import PROTOCOLS
from model import build_model, export, weights
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
def test_commands_are_understood(command):
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
        path = ROOT / flags[0].replace(".", "/")
        files = sorted(path.glob("*.py")) if (path / "__main__.py").is_file() else [path.with_suffix(".py")]
        text = "".join(file.read_text() for file in files)
        for flag in flags[1:]:
            if flag.startswith("--"):
                assert f'"{flag.split("=")[0]}"' in text


def test_the_table_of_protocols_is_that_of_the_code():
    """Numbers and sources; the distance is tested by itself."""
    lines = (ROOT / "docs/evaluation.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| `")]
    table = {name.strip("`"): cells for name, *cells in rows if len(cells) == 4}
    assert list(table) == list(PROTOCOLS)
    for name, (database, queries, _, source) in table.items():
        protocol = PROTOCOLS[name]
        assert database == ("" if protocol.database is None else f"{protocol.database:,}")
        sets = [f"`{of}` {count:,}" for of, count in protocol.query_sets.items()]
        assert queries == ", ".join(
            [" or ".join(f"{count:,}" for count in protocol.queries)] * bool(protocol.queries) + sets
        )
        assert source == protocol.source


def test_modules_that_are_named_can_be_run():
    assert all(callable(module.main) for module in (check, toy_city, to_gsv_cities, export))


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
        ("asked", "b.jpg", (1200, 900), None),
    ):
        pixels = rng.integers(0, 256, (size[1] // 3, size[0] // 3, 3), dtype=np.uint8)  # detail that aliases
        Image.fromarray(pixels).resize(size).save(name, **({} if exif is None else {"exif": exif}))
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
    (folder,) = (tmp_path / "run").iterdir()
    for name, saved in (("a", "database"), ("b", "queries")):
        (descriptor,) = np.load(folder / "descriptors" / f"{saved}.npy")
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
    torch.save(build_model(backbone="dino_tiny").state_dict(), "model.pth")
    flags = "--device=cpu --num_workers=0 --resume=model.pth --queries_folder=asked --no_labels".split()
    making = "--database_folder=known --backbone=dino_tiny --save_map=city.npz".split()
    eval_script.main([*flags, *making, f"--save_dir={tmp_path}/made"])
    eval_script.main([*flags, "--map=city.npz", f"--save_dir={tmp_path}/asked_of_map"])
    example = example_with('"place_map"').replace('resume="SuperVLAD"', 'resume="model.pth"')
    names: dict[str, object] = {"photo": np.asarray(Image.open("asked/d.png"))}
    exec(example, names)
    for save_dir in ("made", "asked_of_map"):
        (folder,) = (tmp_path / save_dir).iterdir()
        with open(folder / "predictions.csv", newline="") as file:
            first = next(csv.DictReader(file))
        assert Path(names["path"]) == Path(first["database"]).absolute()
        assert names["distance"] == pytest.approx(float(first["squared_descriptor_distance"]), abs=1e-5)
    assert names["position"] is names["accepted"] is None


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
    if released := weights.RELEASED.get(name):
        where, settings = f"`{released.drive_id}`", released.model
    elif name in weights.FOUNDATION_FILES:
        where = f"`{weights.foundation_address(name).removeprefix('https://dl.fbaipublicfiles.com/dinov2/')}`"
        settings = {"backbone": name}
    else:
        where, settings = f"`{weights.GATED_FILES[name]}`", {"backbone": name}
    with torch.device("meta"):
        model = build_model(**settings)
    parameters = sum(p.numel() for p in (model if name in weights.RELEASED else model.backbone).parameters())
    assert [cell.strip() for cell in row.split("|")][2:6] == [
        where,
        f"{parameters:,}",
        f"{4 * parameters / 1e6:.1f}",
        "not computed here",
    ]
