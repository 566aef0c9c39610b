"""Who may import whom: every import of every file, also those inside functions, by the standard library's ast."""

import ast
from pathlib import Path

import pytest

import meanflow

ROOT = Path(__file__).parents[1]
LEAVES = ("noise", "sampler", "files", "pictures", "fetch", "program")
# A part may import what stands before it, and its own files.
ORDER = (("config",), LEAVES, ("objectives",), ("data",), ("publishing",), ("evaluation",), ("training",), ("main",))
FLOORS = {part: floor for floor, parts in enumerate(ORDER) for part in parts}
USERS_OF_MODELS = FLOORS["publishing"]  # the zoo is imported from this floor on
FILES = sorted(path for folder in ("meanflow", "models") for path in (ROOT / folder).rglob("*.py"))


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path) for path in FILES}


def imports(module: str, source: str) -> set[str]:
    """The modules of this project that a source imports anywhere. A name of meanflow counts as the module of it."""
    package = module if (ROOT / module.replace(".", "/") / "__init__.py").exists() else module.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level]
            base = ".".join([*above, *([node.module] if node.module else [])]) if node.level else node.module
            for alias in node.names:
                lazily = f"meanflow.{meanflow._MODULES.get(alias.name)}" if base == "meanflow" else None
                found.add(next((name for name in (f"{base}.{alias.name}", lazily) if name in MODULES), base))
    return {name for name in found if name.split(".")[0] in ("meanflow", "models", "recipes", "tools")} - {module}


def faults(module: str, source: str) -> list[str]:
    """What an import of this module breaks."""
    top, _, rest = module.partition(".")
    part = rest.split(".")[0]
    found = []
    for name in sorted(imports(module, source)):
        other_top, _, other_rest = name.partition(".")
        other_part = other_rest.split(".")[0]
        if other_top in ("recipes", "tools") or (top == "models" and module != "models"):
            found.append(f"{module} imports {name}")
        elif top == "meanflow" and other_top == "models" and FLOORS.get(part, 0) < USERS_OF_MODELS:
            found.append(f"{module} imports {name}, before {ORDER[USERS_OF_MODELS][0]}")
        elif top == other_top == "meanflow":
            is_below = other_part in FLOORS and FLOORS[other_part] < FLOORS.get(part, 0)
            is_own_part = other_part == part or {part, other_part} <= set(LEAVES)
            if not (is_below or is_own_part):
                found.append(f"{module} imports {name}, which stands above it")
    return found


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_every_import_goes_down(path):
    assert faults(module_of(path), path.read_text()) == []


def test_every_file_has_a_place():
    parts = {name.split(".")[1] for name in MODULES if name.startswith("meanflow.")}
    assert parts == set(FLOORS)


def test_no_modules_import_each_other():
    """No circle, within a part either."""
    left = {module_of(path): imports(module_of(path), path.read_text()) & MODULES for path in FILES}
    while ready := {name for name, needs in left.items() if not needs & left.keys()}:
        left = {name: needs for name, needs in left.items() if name not in ready}
    assert not left


@pytest.mark.parametrize(
    "module, source",
    [
        ("meanflow.objectives.draws", "from meanflow.training.trainer import Trainer"),
        ("meanflow.objectives.draws", "def f():\n    from meanflow.training import trainer"),
        ("meanflow.objectives.draws", "def f():\n    from ..training.trainer import Trainer"),
        ("meanflow.objectives.draws", "class A:\n    def f(self):\n        import meanflow.training.trainer"),
        ("meanflow.objectives.draws", "from meanflow import run"),
        ("meanflow.noise", "from meanflow.config import TrainConfig; from meanflow.data.base import Data"),
        ("meanflow.data.loader", "from models import MODELS"),
        ("models.dit", "from models.unet import UNet"),
        ("meanflow.training.log", "from tools.sample import main"),
    ],
)
def test_an_import_that_goes_up_is_found(module, source):
    assert len(faults(module, source)) == 1


def test_no_function_is_longer_than_a_screen():
    """60 lines of code, docstrings, comments and blank lines aside."""
    for path in FILES:
        lines = path.read_text().splitlines()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                first = node.body[1].lineno if ast.get_docstring(node) and len(node.body) > 1 else node.body[0].lineno
                code = [line for line in lines[first - 1 : node.end_lineno] if line.strip() and line.strip()[0] != "#"]
                assert len(code) + node.body[0].lineno - node.lineno <= 60, f"{path}: {node.name}"
