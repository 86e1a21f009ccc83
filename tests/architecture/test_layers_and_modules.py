"""The house rules that a machine can read: layers, our own packages, size and face of every module."""

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("placer", "sim", "solvers", "traces")
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
MOST_LINES = 400
TORCH_MODULES = ("placer/execute/", "placer/live/")
BACK_ENDS = {
    "simpy": "sim/",
    "numba": ("sim/", "solvers/", "traces/", "placer/execute/planes/"),
    "pulp": "solvers/",
    "ortools": "solvers/",
    "typer": "placer/cli/",
    "yaml": ("placer/config/", "placer/export/"),
    "msgspec": "placer/",
}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def top_level_imports(tree: ast.Module) -> Iterator[str]:
    """Packages imported when the module is: not in functions, not under TYPE_CHECKING."""
    stack: list[ast.stmt] = list(tree.body)
    while stack:
        node = stack.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.split(".")[0]
        elif isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.unparse(node.test):
            stack += [*node.body, *node.orelse]
        elif isinstance(node, ast.Try):
            stack += [*node.body, *node.orelse, *node.finalbody, *(s for h in node.handlers for s in h.body)]
        elif isinstance(node, ast.With | ast.ClassDef):
            stack += node.body


def test_the_layers_hold(tmp_path: Path) -> None:
    code = "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(config_filename='pyproject.toml', "
    code += f"cache_dir={str(tmp_path)!r}))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"Contracts: [3-9]\d* kept, 0 broken", done.stdout), done.stdout


def test_a_broken_layer_would_be_seen(tmp_path: Path) -> None:
    """The test above can fail: the same contracts upside down."""
    config = tmp_path / "upside_down.toml"
    config.write_text(
        '[tool.importlinter]\nroot_packages = ["placer", "traces"]\n'
        '[[tool.importlinter.contracts]]\nname = "upside down"\ntype = "layers"\nlayers = ["placer.core", "traces"]\n'
    )
    code = f"from importlinter.cli import lint_imports; raise SystemExit(lint_imports({str(config)!r}, "
    code += f"cache_dir={str(tmp_path)!r}))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode != 0


@pytest.mark.parametrize("package", PACKAGES)
def test_the_flat_packages_are_ours(package: str) -> None:
    """`traces` and `solvers` are also names of other packages on PyPI."""
    found = Path(str(importlib.import_module(package).__file__)).resolve()
    placer = Path(str(importlib.import_module("placer").__file__)).resolve()
    assert found.parent.parent == placer.parent.parent
    assert found == (ROOT / package / "__init__.py").resolve()


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_every_module_says_what_it_is_and_what_it_offers(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    doc = ast.get_docstring(tree)
    assert doc, "no docstring"
    assert doc.splitlines()[0].strip().endswith((".", ":")), "the first line is a sentence"
    assert len(text.splitlines()) <= MOST_LINES, f"split it: more than {MOST_LINES} lines"
    exported = exports(tree)
    body = [node for node in tree.body if not isinstance(node, ast.Expr)]
    if exported is None:
        assert not body, "no __all__, but definitions"
        return
    defined = names_defined(tree)
    assert [name for name in exported if name not in defined] == [], "__all__ names what is not there"
    assert len(set(exported)) == len(exported)
    assert [name for name in exported if name.startswith("_") and name != "__version__"] == []


def exports(tree: ast.Module) -> list[str] | None:
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    return None


def names_defined(tree: ast.Module) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return found


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_torch_is_imported_where_it_is_used(path: Path) -> None:
    """At top level in the executor only; elsewhere inside functions, so that the main job installs without it."""
    imported = set(top_level_imports(ast.parse(path.read_text(encoding="utf-8"))))
    if not name_of(path).startswith(TORCH_MODULES):
        assert not imported & {"torch", "transformers"}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_back_ends_are_imported_in_their_own_place(path: Path) -> None:
    imported = set(top_level_imports(ast.parse(path.read_text(encoding="utf-8"))))
    for package, homes in BACK_ENDS.items():
        if package in imported:
            assert name_of(path).startswith(homes), f"{package} belongs to {homes}"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_nothing_swallows_every_error(path: Path) -> None:
    """`except BaseException` only to clean up: it raises again."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ExceptHandler):
            caught = "" if node.type is None else ast.unparse(node.type)
            assert caught not in ("", "Exception"), f"line {node.lineno}"
            if caught == "BaseException":
                assert any(isinstance(inner, ast.Raise) for inner in ast.walk(node)), f"line {node.lineno}"


def committed_texts() -> list[Path]:
    kinds = ("*.py", "*.toml", "*.md", "*.yaml", "*.txt", "*.out")
    inside = [
        path for folder in (*PACKAGES, "tests", "examples", "docs") for k in kinds for path in (ROOT / folder).rglob(k)
    ]
    return sorted({*inside, *(path for kind in kinds for path in ROOT.glob(kind))})


def test_no_file_names_a_path_of_one_machine() -> None:
    marks = re.compile(r"(?<![\w.])/(?:work|home|root|Users)/\w+")
    found = [
        name_of(p) for p in committed_texts() if p != Path(__file__) and marks.search(p.read_text(encoding="utf-8"))
    ]
    assert found == []


def test_every_test_file_has_a_name_of_its_own() -> None:
    """Without __init__.py two files of one name would shadow each other."""
    names = [path.name for path in (ROOT / "tests").rglob("*.py") if path.name != "conftest.py"]
    assert sorted({name for name in names if names.count(name) > 1}) == []
    assert list((ROOT / "tests").rglob("__init__.py")) == []


def test_the_readme_knows_every_package_folder() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    folders = sorted({path.parent for path in MODULES})
    missing = [name_of(folder) for folder in folders if f"{name_of(folder)}/" not in readme]
    assert missing == []
