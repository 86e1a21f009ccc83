"""Writes the README's file tree from the first line of every module's docstring, so that it cannot go stale.

    python scripts/file_tree.py            rewrites README.md between the two markers
"""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
START, END = "<!-- tree: python scripts/file_tree.py -->", "<!-- /tree -->"
PACKAGES = ("placer", "sim", "solvers", "traces", "examples")


def about(path: Path) -> str:
    """The first line of a module's docstring, without its full stop."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return text.split("\n\n")[0].replace("\n", " ").strip().rstrip(".")


def tree() -> str:
    """The tree as text: a line per file, folders before their files; tests are one line per folder."""
    lines = ["```"]
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py"), key=lambda p: (p.parent.parts, p.name != "__init__.py", p.name)):
            name = path.relative_to(ROOT).as_posix().replace("/__init__.py", "/")
            lines.append(f"{name:38} {about(path)}")
    for folder in sorted(path for path in (ROOT / "tests").iterdir() if path.is_dir() and any(path.glob("*.py"))):
        count = sum(1 for _ in folder.glob("test_*.py"))
        lines.append(f"tests/{folder.name + '/':32} {count} files of tests")
    return "\n".join([*lines, "```"])


def updated(readme: str) -> str:
    """The README with its tree replaced."""
    before, rest = readme.split(START)
    after = rest.split(END)[1]
    return f"{before}{START}\n{tree()}\n{END}{after}"


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(updated(path.read_text(encoding="utf-8")), encoding="utf-8")
