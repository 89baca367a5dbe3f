"""C files call each other one way, as each says at its top; exports.h has all that Python calls."""

import re
from pathlib import Path

from tests.nets.places import ROOT

KERNELS = ROOT / "swatfx" / "kernels"
FILES = sorted((KERNELS / "csrc").glob("*.c"))
DEFINED = re.compile(
    r"^(?!static|INLINE|ONE|TARGET|typedef|#)\w[\w *]*?\b(\w+)\([^;{}]*\) \{", re.M
)


def code_of(path: Path) -> str:
    code = re.sub(r"/\*.*?\*/", "", path.read_text(), flags=re.S)
    return re.sub(r"TYPED\((\w+)\)", r"\1", code)


def called() -> dict[str, set[str]]:
    """File -> the files whose functions it calls."""
    code = {path.name: code_of(path) for path in FILES}
    home = {name: file for file, text in code.items() for name in DEFINED.findall(text)}
    assert home["sparse_conv"] == "conv.c" and home["kth_key"] == "kth.c"
    return {
        file: {home[name] for name in re.findall(r"\w+(?=\()", text) if name in home} - {file}
        for file, text in code.items()
    }


def test_each_says_what_it_stands_on() -> None:
    for path in FILES:
        top = path.read_text().partition("*/")[0]
        said = re.search(r" \* Stands on ([^\n]*\.c)( file)?\.\n", top)
        assert said, path.name
        named = set(re.findall(r"\w+\.c\b", said[1]))
        assert called()[path.name] == named, path.name


def test_calls_go_down() -> None:
    left = called()
    while left:
        ground = {file for file, below in left.items() if not below & left.keys()}
        assert ground, f"a circle among {sorted(left)}"
        left = {file: below for file, below in left.items() if file not in ground}


def test_exports_are_what_python_calls() -> None:
    exports = code_of(KERNELS / "csrc" / "exports.h")
    declared = set(re.findall(r"^EXPORT [^;]*?\b(\w+)\(", exports, re.M))
    text = "".join(path.read_text() for path in KERNELS.glob("*.py"))
    assert declared == {name for name in declared if re.search(rf'["._]{name}\b', text)}
    named = set(re.findall(r'\bfunction\(\s*"(\w+)"', text))
    assert len(named) > 15 and named <= declared


def test_bf16_is_the_same_source() -> None:
    for path in sorted((KERNELS / "csrc" / "bf16").iterdir()):
        lines = code_of(path).split("\n")
        assert [line for line in lines if line] == [
            "#define SWATFX_BF16",
            f'#include "../{path.name}"',
        ]
