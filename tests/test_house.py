"""The house's own rules: floors, one-way imports, README's snippets, no machine paths."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# A file imports from its own floor and from lower ones, never from a higher one.
# From the ground up: an import goes down, or stays in its room.
ROOMS = [
    "swatfx.version",
    "swatfx.errors",
    "swatfx.density",
    "swatfx.arguments",
    "swatfx.files",
    "swatfx.tensors",
    "swatfx.models",
    "swatfx.datasets",
    "swatfx.accelerators",
    "swatfx.policy",
    "swatfx.selectors",
    "swatfx.distributions",
    "swatfx.meta",
    "swatfx.macs",
    "swatfx.products",
    "swatfx.ops",
    "swatfx.kernels",
    "swatfx.compiled",
    "swatfx.masks",
    "swatfx.passing",
    "passes.tracing",
    "passes.reading",
    "passes.writing",
    "passes",
    "swatfx.training",
    "swatfx.costs",
    "swatfx.pipeline",
    "swatfx.checkpoint",
    "swatfx.exporting",
    "swatfx.tuning",
    "swatfx.paper",
    "swatfx.runs",
    "swatfx.comparing",
    "swatfx.cli",
    "swatfx",
    "swatfx.__main__",
]
LONGEST_CHAIN = 14
# What lies loose in swatfx/: too small for a room, or the door.
LOOSE = {
    "__init__", "__main__", "version", "errors", "density", "arguments", "meta", "macs", "products",
    "passing", "pipeline",
}  # fmt: skip


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> int:
    found = [name for name in ROOMS if (module + ".").startswith(name + ".")]
    best = max(found, key=len)
    assert best != "swatfx" or module == "swatfx", f"{module} lies in no room: see ROOMS"
    return ROOMS.index(best)


def sources() -> list[Path]:
    return sorted([*(ROOT / "swatfx").rglob("*.py"), *(ROOT / "passes").rglob("*.py")])


def imports(path: Path, types: bool = True) -> set[str]:
    """What a file imports of ours; with `types`, also what only type checkers see."""
    known = {module_of(p) for p in sources()}
    found: set[str] = set()
    tree = ast.parse(path.read_text())
    guarded = [
        n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.dump(n.test)
    ]
    unread = set() if types else {n for guard in guarded for n in ast.walk(guard)}
    for node in ast.walk(tree):
        if node in unread:
            continue
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
        assert room_of(imported) <= room_of(module), f"{module} imports {imported}"


def test_nothing_lies_loose() -> None:
    assert {path.stem for path in (ROOT / "swatfx").glob("*.py")} == LOOSE


def test_chains_of_imports_are_short() -> None:
    """Between modules, the faces of packages left out."""
    faces = {module_of(path) for path in sources() if path.stem == "__init__"}
    modules = [path for path in sources() if path.stem != "__init__"]
    below = {module_of(path): imports(path, types=False) - faces for path in modules}
    lengths: dict[str, int] = {}

    def length(module: str, above: tuple[str, ...] = ()) -> int:
        assert module not in above, f"a circle: {' -> '.join((*above, module))}"
        if module not in lengths:
            chain = (*above, module)
            lengths[module] = 1 + max((length(m, chain) for m in below[module]), default=0)
        return lengths[module]

    longest = max(below, key=length)
    assert length(longest) <= LONGEST_CHAIN, longest


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


def test_importing_waits_for_nothing_slow() -> None:
    """numba, networkx and torchvision are imported where they are first needed."""
    slow = "{'numba', 'networkx', 'torchvision'}"
    code = f"import sys, swatfx; print(sorted({slow} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
