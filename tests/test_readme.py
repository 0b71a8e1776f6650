"""What README.md and REPRODUCE.md tell people to type."""

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
from model import export
from parser import EvalOptions, TrainOptions, parse

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "REPRODUCE.md", ROOT / "benchmarks" / "README.md"]


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
        path = ROOT / (flags[0].replace(".", "/") + ".py")
        assert path.is_file()
        for flag in flags[1:]:
            if flag.startswith("--"):
                assert f'"{flag.split("=")[0]}"' in path.read_text()


def test_modules_that_are_named_can_be_run():
    assert all(callable(module.main) for module in (check, toy_city, to_gsv_cities, export))


def test_the_example_of_torch_hub_gives_the_descriptors_of_eval(tmp_path, monkeypatch, capsys):
    """As it stands but for the weights, random ones of the small backbone: for photos as phones write them."""
    ((_, example),) = blocks("python")
    example = example.replace("/path/to/this/repository", str(ROOT))
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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)]+)\)", text):
        path, _, heading = target.partition("#")
        if path.startswith("http"):
            continue
        assert not path or (page.parent / path).exists(), target
        if heading and not path:
            headings = re.findall(r"^#+ (.*)", text, re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", name.lower()).replace(" ", "-") for name in headings}
            assert heading in anchors, target
