"""What README.md and docs/ say: their Python runs, their flags and files exist, and their commands warn of nothing."""

import ast
import re
import shlex
from dataclasses import fields, replace
from pathlib import Path

import pytest
import tyro

import launch
from meanflow.config import MeanFlowConfig, TrainConfig
from meanflow.objectives.meanflow import MeanFlow
from meanflow.training.preflight import find_warnings
from tools.reference import PAGES, options, page

ROOT = Path(__file__).parents[1]
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RECIPES = sorted((ROOT / "recipes").glob("*.py"))
NUM_SAMPLES = {
    "imagenet": 1_281_167,
    "cifar10": 50_000,
    "digits": 1_347,
    "deterministic": 4,
    "volumes": 512,
    "toy2d": 50_000,
}
# Flags of other programs: accelerate, torchrun, pip, pytest, trackio.
OTHERS = {
    "--config_file",
    "--machine_rank",
    "--main_process_ip",
    "--multi_gpu",
    "--cpu",
    "--num_processes",
    "--help",
} | {"--run", "--metric"}
OTHERS |= {"--attempts", "--env", "--flavor", "--secrets", "--time", "--volume"}  # sbatch, hf jobs, sky


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(), flags=re.DOTALL)


def recipe_of(path: Path) -> TrainConfig:
    namespace = {"__name__": "recipe"}
    exec(compile(path.read_text(), path, "exec"), namespace)
    return namespace["RECIPE"]


def warnings_of(name: str, recipe: TrainConfig) -> list[str]:
    num_samples = NUM_SAMPLES[name.split("_")[0]]
    total = recipe.steps or -(-int(recipe.epochs * num_samples) // recipe.global_batch)
    return find_warnings(recipe, total, MeanFlow)


@pytest.mark.parametrize("path", [path for path in DOCS if blocks(path, "python")], ids=lambda path: path.name)
def test_python_blocks_run(path, digits_run, tmp_path, monkeypatch):
    """One after the other, in a folder with runs/digits. (test_extending.py runs the files of its page.)"""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/digits").symlink_to(digits_run)
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "page"}
    for block in blocks(path, "python"):
        if path.name == "extending.md":
            ast.parse(block)
        else:
            exec(block, namespace)


def known_flags() -> set[str]:
    found = set(OTHERS)
    for file, name, prefix, _ in PAGES:
        for field, *_ in options((ROOT / file).read_text(), name):
            flag = field.replace("_", "-")
            found |= {prefix + flag, f"{prefix}no-{flag}"}
    return found


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_every_flag_exists(path):
    text = re.sub(r"--(net|objective\.anneal)[.\w-]*", "", path.read_text())  # sizes of networks; a page's own options
    named = set(re.findall(r"(?<![\w-])--[a-z][\w.-]*\w", text)) - {"--objective.NAME"}
    assert named <= known_flags(), named - known_flags()


MADE = ("runs/", "models/", "data/", "images/", "volumes/", "step-", "samples/", "pipeline/", "user/", "modeling_")


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_every_file_exists(path):
    """Files that are named with their folder or with a link; those that commands make aside."""
    text = path.read_text()
    named = set(re.findall(r"(?<![\w/.:-])((?:\w[\w.-]*/)+[\w-]+\.(?:py|md|yaml|sbatch|txt|cfg|png))\b", text))
    named |= set(re.findall(r"\]\((?!http)([^)#]+)", text))
    missing = [name for name in named if not ((ROOT / name).exists() or (path.parent / name).exists())]
    assert [name for name in missing if not name.startswith(MADE)] == []


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_warn_of_nothing(path):
    assert warnings_of(path.stem, recipe_of(path)) == []


def commands() -> list[str]:
    """Every recipe's command in the docs and in the recipes' docstrings."""
    texts = [block for path in DOCS for block in blocks(path, "sh")]
    texts += [ast.get_docstring(ast.parse(path.read_text())) for path in RECIPES]
    lines = "\n".join(texts).replace("\\\n", " ").splitlines()
    return sorted({line.partition(" #")[0].strip() for line in lines if re.search(r" recipes/\w+\.py --", line)})


@pytest.mark.parametrize("command", commands())
def test_documented_commands_warn_of_nothing(command):
    name, flags = re.search(r"recipes/(\w+)\.py(.*)", command).groups()
    flags = [flag for flag in shlex.split(flags) if flag not in ("--help", "#")]
    if "launch.py" in command:
        _, flags = tyro.cli(launch.Options, args=[f"recipes/{name}.py", *flags], return_unknown_args=True)
    written = recipe_of(ROOT / f"recipes/{name}.py")
    recipe = tyro.cli(TrainConfig, default=written, args=flags)
    number = {"data/random": 4096}.get(recipe.data)
    if number:
        total = recipe.steps or -(-int(recipe.epochs * number) // recipe.global_batch)
        assert find_warnings(recipe, total, MeanFlow) == []
    else:
        assert warnings_of(name, recipe) == []


def test_what_past_runs_died_of_is_said_with_figures():
    """100 epochs of the paper's CIFAR-10 recipe, which end inside its warm-up; and the volumes as they once were."""
    recipe = replace(recipe_of(ROOT / "recipes/cifar10_unet_paper.py"), epochs=100.0)
    found = "\n".join(warnings_of("cifar10", recipe))
    assert "the warm-up of 9,766 steps is 200% of the run's 4,883 steps" in found
    assert "the average with decay 0.9999 will still hold 61% of the initial weights" in found
    assert "a checkpoint every 10,000 steps, and the run has 4,883: --checkpoint-every 1220" in found
    volumes = replace(recipe_of(ROOT / "recipes/volumes_dit.py"), global_batch=16, accumulation_steps=1)
    assert warnings_of("volumes", volumes)[0].startswith("only 4 of the 16 samples of an optimiser step have r != t")
    flow = replace(volumes, objective=MeanFlowConfig(meanflow_ratio=0.0))
    assert warnings_of("volumes", flow) == []


def test_the_reference_is_written_from_the_code():
    assert (ROOT / "docs/reference.md").read_text() == page(), "run python tools/reference.py"
    assert {f.name for f in fields(TrainConfig)} == {name for name, *_ in options(*read("TrainConfig"))}


def read(name: str) -> tuple[str, str]:
    return (ROOT / "meanflow/config.py").read_text(), name


def test_the_readme_fits_in_150_lines():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
