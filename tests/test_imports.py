"""Imports inside the package: none in a circle, and only down the floors of the README's architecture section."""

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def imports(path: Path) -> Iterator[str]:
    """Names of all imports of a file, also inside functions, but not of those for type checkers only."""

    def visit(node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            return
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))
        for child in ast.iter_child_nodes(node):
            yield from visit(child)

    return visit(ast.parse(path.read_text()))


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    """The modules that every module imports. The package itself does not count: it only forwards names."""
    files = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in (ROOT / "litgpt").rglob("*.py")}
    files = {name.removesuffix(".__init__"): path for name, path in files.items()}
    del files["litgpt"]
    return {
        name: {other for other in imports(path) if other in files and other != name} for name, path in files.items()
    }


def floors() -> list[set[str]]:
    """The names of modules and packages on every floor of the README's picture, the highest floor first."""
    picture = (ROOT / "README.md").read_text().split("## Architecture")[1].split("```")[1]
    levels = [re.findall(r"\b(\w+)(?:\.py|/)", level) for level in re.split(r"\n(?=\w)", picture.strip())]
    top = {path.stem for path in (ROOT / "litgpt").iterdir()}
    return [set(names) & top for names in levels]


def test_no_circle(graph):
    sorter = TopologicalSorter(graph)
    try:
        sorter.prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def test_imports_go_down_the_floors(graph):
    level = {name: i for i, names in enumerate(floors()) for name in names}
    top = {name: name.split(".")[1] for name in graph}
    assert not set(top.values()) - level.keys(), "not in the README's picture"
    upward = [(a, b) for a, others in graph.items() for b in others if level[top[b]] < level[top[a]]]
    assert not upward
