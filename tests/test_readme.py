"""What README.md and REPRODUCE.md tell people to type."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from PIL import Image

from datasets import check, toy_city
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
    assert all(callable(module.main) for module in (check, toy_city, export))


def test_the_example_of_torch_hub(tmp_path, monkeypatch, capsys):
    """As it stands but for the weights: random ones, of the small backbone."""
    ((_, example),) = blocks("python")
    example = example.replace("/path/to/this/repository", str(ROOT))
    entry = '"supervlad", source="local"'
    assert entry in example
    monkeypatch.chdir(tmp_path)
    for name, colour in (("a.jpg", (200, 90, 30)), ("b.jpg", (20, 90, 230))):
        Image.new("RGB", (64, 48), colour).save(name)
    exec(example.replace(entry, f'{entry}, pretrained=False, backbone="dino_tiny"'), {})
    assert re.fullmatch(r"cosine similarity -?[01]\.\d{3}\n", capsys.readouterr().out)
    assert not torch.is_inference_mode_enabled()


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
