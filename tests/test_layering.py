"""A file imports only from files above it in the reading order, and from packages we declare."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ORDER = ("jsontext", "config", "files", "linear", "lora", "embedding", "attention", "recompute",
         "model", "weights", "tokenizer", "notation", "dialects", "chat", "report", "sources",
         "formats", "readers", "data", "cache", "loss", "trainer", "estimate", "check",
         "patterns", "checkpoint", "state", "schema", "grammar", "automaton", "constrain",
         "generate", "tools", "compare", "bfcl", "evaluate", "view", "hub", "bench", "__main__")
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


def test_reading_order_is_told():
    package = ast.get_docstring(ast.parse((ROOT / "minilora" / "__init__.py").read_text()))
    readme = (ROOT / "README.md").read_text(encoding="utf-8").partition("## How it works")[2]
    for text in (package, readme.replace("`", " ")):
        at = [text.index(f" {name}.py ") for name in ORDER]
        assert at == sorted(at)


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def packages(lines: list[str]) -> set[str]:
    """The names in requirements, each of which says the lowest version that passes the tests."""
    assert all(re.fullmatch(r"\w+>=[\d.]+", line) for line in lines), lines
    return {line.split(">")[0] for line in lines}


def test_only_declared_packages_are_imported():
    allowed = sys.stdlib_module_names | {"minilora"} | packages(PROJECT["dependencies"])
    optional = packages(EXTRAS["report"] + EXTRAS["parquet"])
    for path in FILES:
        for module in imports(path):
            assert module.split(".")[0] in allowed | optional, path


def test_everything_imports_without_extras():
    """So an extra is asked for, by its name, only where it is needed."""
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in FILES]
    lacking = sorted(packages(sum(EXTRAS.values(), [])) - packages(PROJECT["dependencies"]))
    assert "matplotlib" in lacking and "transformers" in lacking
    code = (f"import importlib, sys\nfor name in {lacking}: sys.modules[name] = None\n"
            f"for name in {modules}: importlib.import_module(name)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert not done.returncode, done.stderr


def test_readme_and_pyproject_agree():
    readme = (ROOT / "README.md").read_text()
    lowest = re.fullmatch(r">=(\d+)\.(\d+)", PROJECT["requires-python"])
    assert f"Python {lowest[1]}.{lowest[2]} or newer" in readme
    ruff = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]
    assert ruff["target-version"] == f"py{lowest[1]}{lowest[2]}"
    asked = re.findall(r'pip install -e "\.\[([\w,]+)\]"', readme)
    assert asked and set(",".join(asked).split(",")) <= EXTRAS.keys()
