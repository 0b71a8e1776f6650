"""Who may import whom, so that each room can be read, tested and reused by itself."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BELOW = {"utils.system", "utils.run", "utils.retrieval", "utils.outputs", "datasets.photos", "datasets.evaluation"}
BELOW |= {"datasets.training"}
MAY_IMPORT = {  # each room and what lies below it
    "utils.system": set(),
    "utils.run": {"utils.system"},
    "utils.retrieval": {"utils.system"},
    "utils.outputs": {"utils.system", "utils.run", "utils.retrieval"},
    "utils.compare": {"utils.system", "utils.retrieval", "utils.outputs"},
    "datasets.photos": {"utils.system"},
    "datasets.evaluation": {"utils.system", "datasets.photos"},
    "datasets.training": {"utils.system", "datasets.photos"},
    # One floor above the two formats that they write, read or check.
    "datasets.own": {"utils.system", "datasets.photos", "datasets.evaluation", "datasets.training"},
    "datasets.to_gsv_cities": BELOW | {"datasets.own"},
    "datasets.faults": {"utils.system", "datasets.photos", "datasets.evaluation", "datasets.training"},
    "datasets.check": {"utils.system", "datasets.photos", "datasets.faults"},
    "datasets.toy_city": {"utils.system"},
    "model": set(),
    "model.export": {"utils.system", "model"},
    # Of these only what the standard library is enough for.
    "parser": {"utils.system", "utils.run", "model", "datasets.evaluation"},
    "test": BELOW,
    "train": BELOW | {"model", "parser", "test"},
    "eval": BELOW | {"model", "parser", "test"},
    "hubconf": {"model", "datasets.photos", "utils.retrieval"},
}
OURS = {name.split(".")[0] for name in MAY_IMPORT}
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for name in OURS
    for path in [ROOT / f"{name}.py", *(ROOT / name).rglob("*.py")]
    if path.exists()
}


def room_of(module):
    parts = module.split(".")
    return next((name for n in (2, 1) if (name := ".".join(parts[:n])) in MAY_IMPORT), None)


def imports(module, *, everywhere=True):
    """The modules that one imports, absolute names, each with whether it is spelt relatively."""
    path = MODULES[module]
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            yield from ((alias.name, False) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                yield (whole if whole in MODULES else base), bool(node.level)


def closure(*modules):
    """The modules of ours that are loaded with some, packages included."""
    reached, waiting = set(), list(modules)
    while waiting:
        module = waiting.pop()
        if module in reached or module not in MODULES:
            continue
        reached.add(module)
        waiting += [".".join(module.split(".")[:n]) for n in range(1, module.count(".") + 1)]
        waiting += [name for name, _ in imports(module, everywhere=False)]
    return reached


@pytest.mark.parametrize("module", sorted(MODULES))
def test_arrows_between_rooms_go_down(module):
    room = room_of(module)
    for name, _ in imports(module):
        if name.split(".")[0] in OURS and name.split(".")[0] not in sys.stdlib_module_names - OURS:
            other = room_of(name)
            assert other in (None, room) or other in MAY_IMPORT[room], f"{module} imports {name}"


def test_the_command_line_needs_the_standard_library_alone():
    """So that a misspelt option fails at once."""
    for module in closure("parser"):
        for name, _ in imports(module, everywhere=False):
            top = name.split(".")[0]
            assert top in OURS or top in sys.stdlib_module_names, f"{module} imports {name}"


def test_what_torch_hub_loads_imports_relatively():
    """Beside anyone's `utils` or `datasets`."""
    for module in closure("model", "model.weights", "datasets.photos.transforms", "utils.retrieval.place_map"):
        for name, relative in imports(module):
            assert relative or name.split(".")[0] not in OURS, f"{module} imports {name}"


def test_options_stop_at_the_scripts():
    """Functions below take plain values or one group of options, never all of them."""
    for module, path in MODULES.items():
        if module not in ("parser", "train", "eval"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.FunctionDef):
                    names = {arg.arg for arg in [*node.args.args, *node.args.kwonlyargs]}
                    assert not names & {"args", "options"} or module.startswith("utils.run"), f"{module} {node.name}"
