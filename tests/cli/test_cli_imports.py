"""What `import placer.cli` and `placer --help` may load: heavy packages wait for the verb that needs them."""

import subprocess
import sys

HEAVY = (
    "numpy", "numba", "scipy", "torch", "ortools", "pulp", "simpy", "networkx", "rich", "yaml", "msgspec",
    "safetensors", "jinja2", "highspy", "transformers", "pandas", "multiprocessing", "asyncio",
)  # fmt: skip
OURS = {"placer", "placer.cli", "placer.core", "placer.core.errors"}


def loaded_after(code: str) -> set[str]:
    program = f"import sys\n{code}\nsys.stderr.write(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    return set(done.stderr.split())


def test_importing_the_command_line_loads_nothing_heavy() -> None:
    loaded = loaded_after("import placer.cli")
    assert sorted(loaded & set(HEAVY)) == []
    ours = {name for name in loaded if name.split(".")[0] in ("placer", "traces", "solvers", "sim")}
    assert {name for name in ours if not name.startswith("placer.cli.")} == OURS


def test_help_loads_nothing_heavy() -> None:
    help_of = (
        "sys.argv = ['placer', 'solve', '--help']\nfrom placer.cli import main\ntry: main()\nexcept SystemExit: pass"
    )
    loaded = loaded_after(help_of)
    assert sorted(loaded & set(HEAVY)) == []
