"""Writes docs/reference.md: every option of a recipe and of the tools, from the dataclasses and their comments.

python tools/reference.py
"""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
# The file, the class of its options, the prefix of their flags, and the heading.
PAGES = [
    ("meanflow/config.py", "TrainConfig", "--", "A recipe"),
    ("meanflow/config.py", "MeanFlowConfig", "--objective.", "Its objective"),
    ("meanflow/config.py", "ImprovedMeanFlowConfig", "--objective.", "The objective of improved MeanFlow"),
    ("tools/cache_latents.py", "Options", "--", "tools/cache_latents.py"),
    ("tools/sample.py", "Options", "--", "tools/sample.py"),
    ("tools/evaluate.py", "Options", "--", "tools/evaluate.py"),
    ("tools/experiments.py", "Options", "--", "tools/experiments.py"),
    ("tools/toy2d_report.py", "Options", "--", "tools/toy2d_report.py"),
    ("tools/export.py", "Options", "--", "tools/export.py"),
    ("tools/convert.py", "Options", "--", "tools/convert.py"),
    ("tools/push_to_hub.py", "Options", "--", "tools/push_to_hub.py"),
    ("tools/launch.py", "Options", "--", "tools/launch.py"),
    ("tools/app.py", "Options", "--", "tools/app.py"),
    ("tools/digits_report.py", "Options", "--", "tools/digits_report.py"),
    ("tools/benchmarks/options.py", "Step", "--", "tools/benchmark.py step"),
    ("tools/benchmarks/options.py", "Scale", "--", "tools/benchmark.py scale"),
    ("tools/benchmarks/options.py", "Improved", "--", "tools/benchmark.py improved"),
    ("tools/benchmarks/options.py", "Sample", "--", "tools/benchmark.py sample"),
    ("tools/benchmarks/options.py", "Loader", "--", "tools/benchmark.py loader"),
    ("tools/benchmarks/options.py", "Data", "--", "tools/benchmark.py data"),
]


def options(source: str, name: str) -> list[tuple[str, str, str, str]]:
    """(field, type, default, help) of each field of a dataclass; its help is the comment above or the string below.

    Fields of a base class in the same file come first, unless the class has them, too.
    """
    lines = source.splitlines()
    classes = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}
    body, found = classes[name].body, []
    for base in classes[name].bases:
        own = {node.target.id for node in body if isinstance(node, ast.AnnAssign)}
        if isinstance(base, ast.Name) and base.id in classes:
            found += [option for option in options(source, base.id) if option[0] not in own]
    for node, after in zip(body, [*body[1:], None]):
        if not isinstance(node, ast.AnnAssign):
            continue
        comment, number = [], node.lineno - 2
        while lines[number].strip().startswith("#"):
            comment.insert(0, lines[number].strip().removeprefix("#").strip())
            number -= 1
        below = after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else ""
        default = ast.unparse(node.value) if node.value else "must be given"
        default = default.replace("field(default_factory=dict)", "{}")
        kind, about = ast.unparse(node.annotation), " ".join([*comment, *below.split()])
        choices = re.findall(r"'([^']+)'", kind)
        if choices and not all(choice in about for choice in choices):
            about = f"{about} ({', '.join(choices)})"
        found.append((node.target.id, kind, default, about))
    return found


def page() -> str:
    text = ["# Every option", "", "Written by `python tools/reference.py` from the code."]
    for file, name, prefix, heading in PAGES:
        text += ["", f"## {heading}", "", "| option | default | what |", "|---|---|---|"]
        for field, kind, default, about in options((ROOT / file).read_text(), name):
            if field == "objective":
                continue  # its own fields are the flags
            flag = field if "Positional" in kind else prefix + field.replace("_", "-")
            cells = [f"`{flag}`", f"`{default}`", about]
            text.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(text) + "\n"


if __name__ == "__main__":
    (ROOT / "docs/reference.md").write_text(page())
    print("docs/reference.md")
