"""A file imports only from files above it in the reading order, and from packages we declare."""

import ast
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ORDER = ("config", "files", "linear", "lora", "embedding", "attention", "recompute", "model",
         "weights", "tokenizer", "jsontext", "notation", "dialects", "chat", "report", "sources",
         "formats", "readers", "data", "cache", "loss", "trainer", "estimate", "check",
         "checkpoint", "state", "grammar", "automaton", "constrain", "generate", "tools", "compare",
         "bfcl", "evaluate", "view", "hub", "bench", "__main__")
FILES = sorted((ROOT / "minilora").rglob("*.py")) + [ROOT / "train.py", ROOT / "infer.py"]


def imports(path: Path) -> set[str]:
    """Every module that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found.add(node.module)
    return found


def test_every_file_has_its_place():
    inside = {path.stem for path in (ROOT / "minilora").glob("*.py")} - {"__init__"}
    assert inside <= set(ORDER)
    allowed = {"minilora", "train.py", "infer.py", "tests", "pyproject.toml", "README.md",
               "LICENSE"}
    generated = {"runs", "build", "minilora.egg-info"}
    found = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")}
    assert found - generated <= allowed


@pytest.mark.parametrize("name", ORDER)
def test_imports_go_one_way(name):
    path = ROOT / "minilora" / f"{name}.py"
    above = set(ORDER[:ORDER.index(name)])
    for module in imports(path):
        if module.split(".")[0] == "minilora":
            assert module.split(".")[1] in above, f"{name} imports {module}"


def test_reading_order_is_the_package_docstring():
    text = ast.get_docstring(ast.parse((ROOT / "minilora" / "__init__.py").read_text()))
    at = [text.index(f"{name}.py") for name in ORDER]
    assert at == sorted(at)


def test_only_declared_packages_are_imported():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {line.split(">")[0].strip() for line in project["dependencies"]} | {"tqdm"}
    optional = {"matplotlib", "pyarrow"}  # asked for by name when it is missing
    for path in FILES:
        for module in imports(path):
            top = module.split(".")[0]
            assert top in sys.stdlib_module_names or top in declared | optional | {"minilora"}, path
