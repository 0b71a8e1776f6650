"""Who may import whom, so that each part can be read, tested and reused by itself."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OURS = {"parser", "utils", "model", "datasets", "test", "train", "eval"}
MAY_IMPORT = {
    "parser": set(),
    "utils": set(),
    "model": set(),
    "datasets": {"datasets", "utils"},
    "test": {"utils", "datasets"},
    "train": OURS - {"train", "eval"},
    "eval": OURS - {"train", "eval"},
}
FILES = sorted(
    p.relative_to(ROOT) for name in OURS for p in [ROOT / f"{name}.py", *(ROOT / name).rglob("*.py")] if p.exists()
)


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_stay_within_the_layers(path):
    part = path.parts[0].removesuffix(".py")
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            modules = [node.module]
        else:
            continue  # a relative import stays in its package
        for module in modules:
            top = module.split(".")[0]
            assert top not in OURS - MAY_IMPORT[part], f"{path}:{node.lineno} imports {module}"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_options_stop_at_the_scripts(path):
    """No function outside parser.py, train.py and eval.py takes the options object."""
    if path.parts[0] in ("parser.py", "train.py", "eval.py"):
        return
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.FunctionDef):
            names = {arg.arg for arg in [*node.args.args, *node.args.kwonlyargs]}
            assert not names & {"args", "options"}, f"{path}:{node.lineno} {node.name}"


@pytest.mark.parametrize("script", ["train.py", "eval.py"])
def test_the_scripts_read_as_the_method(script):
    """`run` is named steps: less than 80 lines, docstring included."""
    (run,) = (node for node in ast.parse((ROOT / script).read_text()).body if getattr(node, "name", "") == "run")
    assert run.end_lineno - run.lineno + 1 < 80
