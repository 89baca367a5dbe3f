"""The house's own rules: floors, one-way imports, README's snippets, no machine paths."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# A file imports from its own floor and from lower ones, never from a higher one.
FLOORS = {
    0: [
        "swatfx.arguments",
        "swatfx.errors",
        "swatfx.version",
        "swatfx.locks",
        "swatfx.atomic",
        "swatfx.density",
        "swatfx.policy",
    ],
    1: [
        "swatfx.bits",
        "swatfx.layouts",
        "swatfx.observing",
        "swatfx.dispatch",
        "swatfx.saves",
        "swatfx.kernels",
        "swatfx.topk",
        "swatfx.selectors",
        "swatfx.ops",
        "swatfx.distributions",
        "swatfx.meta",
        "swatfx.macs",
        "swatfx.products",
        "swatfx.masks",
        "swatfx.averages",
        "swatfx.structured",
        "swatfx.learned",
        "swatfx.saved_policy",
        "swatfx.state",
        "swatfx.calls",
        "swatfx.graph_module",
        "swatfx.wrappers",
        "swatfx.change_rules",
        "swatfx.changes",
        "swatfx.walking",
        "swatfx.layers",
        "swatfx.eager_share",
        "swatfx.reaching",
        "swatfx.passing",
        "swatfx.models",
        "swatfx.recipes",
        "swatfx.datasets",
        "swatfx.accelerators",
    ],
    2: ["passes"],
    3: [
        "swatfx.pipeline",
        "swatfx.measuring",
        "swatfx.schedules",
        "swatfx.optimizers",
        "swatfx.joint_updates",
        "swatfx.dense_gradients",
        "swatfx.mask_updates",
        "swatfx.redistribution",
        "swatfx.attachment",
        "swatfx.training",
        "swatfx.reporting",
        "swatfx.checkpoint_file",
        "swatfx.checkpoint_checks",
        "swatfx.checkpoint",
        "swatfx.simulation",
        "swatfx.simulation_trace",
        "swatfx.table6",
        "swatfx.cli_types",
        "swatfx.cli_subject",
        "swatfx.cli_simulate",
        "swatfx.export_program",
        "swatfx.exporting",
        "swatfx.tuning",
        "swatfx.tuning_knapsack",
        "swatfx.tuning_costs",
        "swatfx.tuning_sensitivity",
        "swatfx.table1",
        "swatfx.comparing",
        "swatfx.comparing_runs",
        "swatfx.cli_compare",
        "swatfx.run_config",
        "swatfx.run_folder",
        "swatfx.runs",
        "swatfx.cli_train",
        "swatfx.demo",
        "swatfx.cli",
    ],
    4: ["swatfx", "swatfx.__main__"],
}


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def floor_of(module: str) -> int:
    best = max(
        (
            name
            for names in FLOORS.values()
            for name in names
            if (module + ".").startswith(name + ".")
        ),
        key=len,
    )
    if best == "swatfx" and module != "swatfx":
        raise AssertionError(f"{module} stands on no floor: add it to FLOORS")
    return next(floor for floor, names in FLOORS.items() if best in names)


def sources() -> list[Path]:
    return sorted([*(ROOT / "swatfx").rglob("*.py"), *(ROOT / "passes").rglob("*.py")])


def imports(path: Path) -> set[str]:
    known = {module_of(p) for p in sources()}
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in known else node.module)
    return {name for name in found if name.split(".")[0] in ("swatfx", "passes")}


@pytest.mark.parametrize("path", sources(), ids=module_of)
def test_imports_go_down(path: Path) -> None:
    module = module_of(path)
    if module == "passes":
        return  # its first line is the one exception: see design
    for imported in imports(path):
        assert floor_of(imported) <= floor_of(module), f"{module} imports {imported}"


def test_only_the_pipeline_imports_passes() -> None:
    users = {
        module_of(path)
        for path in sources()
        if any(name.split(".")[0] == "passes" for name in imports(path))
    }
    assert {m for m in users if m.startswith("swatfx")} == {"swatfx.pipeline"}


def test_a_pass_imported_alone_works() -> None:
    code = "import passes.find_layers as f; assert callable(f.find_layers)"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_no_module_bears_a_facade_name() -> None:
    import swatfx

    functions = {name for name in swatfx.__all__ if callable(getattr(swatfx, name))}
    names = {module_of(p).removeprefix("swatfx.") for p in sources()}
    assert functions and not names & functions


def test_no_machine_paths() -> None:
    files = subprocess.run(
        ["git", "ls-files", "*.py", "*.md", "*.toml", "Makefile"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert files
    pattern = re.compile(r"(^|[^\w.-])/(work|root|home|tmp)/\w")
    for name in files:
        assert not pattern.search((ROOT / name).read_text()), name


def snippets() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)


@pytest.mark.parametrize("index", range(len(snippets())))
def test_readme_snippets_run(index: int, tmp_path: Path) -> None:
    """Every Python block of the README runs by itself, in an empty folder."""
    code = snippets()[index]
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-2000:]


def test_readme_extension_examples_are_short() -> None:
    assert len(snippets()) >= 5
    for code in snippets():
        lines = [line for line in code.splitlines() if line.strip()]
        assert len(lines) <= 20, code
