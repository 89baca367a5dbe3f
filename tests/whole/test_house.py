"""The house's own rules: rooms, one-way imports, documents and their snippets, no machine paths."""

import ast
import io
import pydoc
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

from tests.nets.places import ROOT

FOLDERS = ("swatfx", "passes", "benchmarks", "tests")

# From the ground up: an import goes down, or stays in its room.
ROOMS = [
    "swatfx.version",
    "swatfx.errors",
    "swatfx.density",
    "swatfx.arguments",
    "swatfx.options",
    "swatfx.tables",
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
    "swatfx.forecast",
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
    "swatfx.timing",
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
    "options", "passing", "pipeline", "tables",
}  # fmt: skip


# Folders of tests that are about no room: see tests/README.md.
NO_ROOMS = {"benchmarks", "fuzz", "golden", "loose", "nets", "whole"}


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
        return  # it imports swatfx first, so that a pass can be imported alone
    for imported in imports(path):
        assert room_of(imported) <= room_of(module), f"{module} imports {imported}"


def test_nothing_lies_loose() -> None:
    assert {path.stem for path in (ROOT / "swatfx").glob("*.py")} == LOOSE


def test_tests_lie_in_rooms() -> None:
    """Of a room's name, so that whoever changes it finds them; and what is shared lies once."""
    tests = ROOT / "tests"
    packages = {name.split(".")[-1] for name in ROOMS if (ROOT / name.replace(".", "/")).is_dir()}
    folders = {path.parent for path in tests.rglob("*.py")} - {tests}
    assert {path.name for path in folders} <= packages | NO_ROOMS
    assert all(path.parent == tests for path in folders)
    files = [*tests.rglob("test_*.py")]
    assert not [path for path in files if path.parent == tests]
    names = [path.name for path in files]
    assert len(names) == len(set(names)), "pytest may tell files apart by name alone"
    assert [*tests.rglob("conftest.py")] == [tests / "conftest.py"]


def test_no_fixture_is_written_twice() -> None:
    seen: dict[str, str] = {}
    for path in sorted((ROOT / "tests").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and any(
                "pytest.fixture" in ast.unparse(mark) for mark in node.decorator_list
            ):
                says = bool(ast.get_docstring(node))
                body = "\n".join(ast.unparse(line) for line in node.body[says:])
                where = f"{name_of(path)}: {node.name}"
                assert body not in seen, f"{where} is {seen[body]}: see tests/conftest.py"
                seen[body] = where


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


def test_importing_waits_for_nothing_slow() -> None:
    """numba, networkx and torchvision are imported where they are first needed."""
    slow = "{'numba', 'networkx', 'torchvision'}"
    code = f"import sys, swatfx; print(sorted({slow} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


# What people read: snippets in them run, and links in them lead somewhere.
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("README.md")),
]
ALGORITHM = "swatfx/ops/README.md:0"  # all of SWAT
LONGEST = {"README.md": 150, "CONTRIBUTING.md": 60}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def snippets() -> dict[str, str]:
    """The Python blocks of all documents, by file and position."""
    return {
        f"{name_of(path)}:{index}": code
        for path in DOCUMENTS
        for index, code in enumerate(re.findall(r"```python\n(.*?)```", path.read_text(), re.S))
    }


@pytest.mark.parametrize("name", snippets())
def test_snippets_run(name: str, tmp_path: Path) -> None:
    """Every Python block of a document runs by itself, in an empty folder."""
    result = subprocess.run(
        [sys.executable, "-c", snippets()[name]],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-2000:]


def test_snippets_are_short() -> None:
    assert len(snippets()) >= 12
    for name, code in snippets().items():
        lines = [line for line in code.splitlines() if line.strip()]
        assert len(lines) <= (50 if name == ALGORITHM else 20), name


@pytest.mark.parametrize("name", LONGEST)
def test_the_front_door_is_short(name: str) -> None:
    assert len((ROOT / name).read_text().splitlines()) <= LONGEST[name]


def anchors(path: Path) -> set[str]:
    """What a link may name behind "#": headings, as GitHub spells them."""
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.S)
    titles = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_links_lead_somewhere(path: Path) -> None:
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"\w+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        assert target.is_relative_to(ROOT.resolve()) and target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_every_document_is_linked() -> None:
    """From README.md, at one click or more."""
    linked, todo = set(), [ROOT / "README.md"]
    while todo:
        path = todo.pop()
        linked.add(path)
        names = re.findall(r"\]\(([^)\s#:]+\.md)", path.read_text())
        found = {(path.parent / name).resolve().relative_to(ROOT.resolve()) for name in names}
        todo += [ROOT / one for one in found if ROOT / one not in linked]
    assert set(DOCUMENTS) <= linked


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_what_documents_name_is_there(path: Path) -> None:
    """Modules, functions and files of this repository."""
    text = re.sub(r"```python.*?```", "", path.read_text(), flags=re.S)  # these run
    for name in set(re.findall(r"(?<![\w./-])(?:swatfx|passes|benchmarks|tests)(?:\.\w+)+", text)):
        assert pydoc.locate(name) is not None, name
    inside = r"(?<![\w./-])(?:swatfx|passes|benchmarks|tests)/[\w./-]*\w(?![\w*{])"
    for name in set(re.findall(inside, text)):
        if not {"NAME", "DATE"} & set(re.split(r"\W", name)):
            assert (ROOT / name).exists() or (path.parent / name).exists(), name


def test_documents_that_code_cites_are_there() -> None:
    """A docstring or comment that names a document names one of this repository."""
    there = {path.name for path in DOCUMENTS}
    pattern = re.compile(r"(?<![\w./{}*-])([\w-]+\.md)\b|\bsee (?:the )?design\b")
    for path in [*sources(), *(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]:
        if path == Path(__file__).resolve():
            continue
        text = "\n".join(texts(path))
        for found in pattern.finditer(text):
            assert found[1] in there, f"{path.relative_to(ROOT)} cites {found[0]}"


def texts(path: Path) -> list[str]:
    """Docstrings and comments of a file."""
    code = path.read_text()
    nodes = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    tree = ast.walk(ast.parse(code))
    docs = [ast.get_docstring(node) or "" for node in tree if isinstance(node, nodes)]
    tokens = tokenize.generate_tokens(io.StringIO(code).readline)
    return docs + [token.string for token in tokens if token.type == tokenize.COMMENT]


# Of them, what torch's own functions take, and one public call whose options are its own.
MANY_ARGUMENTS = {"attention_core", "_heads", "shifted_window_attention"}


def test_functions_take_few_arguments() -> None:
    """At most ten; an op's options are a record (`swatfx.ops.calls`)."""
    for path in [*sources(), *(ROOT / "benchmarks").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                count = len([a for a in given if a.arg not in ("self", "cls")])
                assert count <= 10 or node.name in MANY_ARGUMENTS, f"{path}: {node.name}"
