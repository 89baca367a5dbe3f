"""Builds the optional C kernels, one library an instruction set; all else is in pyproject.toml.

A library that does not build is left out: swatfx then runs its plain-torch kernels, and says so.
"""

import platform
import runpy
import sys
from pathlib import Path

from setuptools import Extension, setup

CSRC = Path("swatfx/kernels/csrc")
SOURCES = sorted(str(path) for path in CSRC.rglob("*.c"))
# The files in bf16/ include those they are named after.
HEADERS = sorted(str(path) for path in (*CSRC.rglob("*.h"), *CSRC.glob("*.c")))
# An instruction set -> what makes the compiler use it; which one runs is chosen at run time.
TARGETS = {"generic": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    TARGETS = {
        "avx2": ["-march=x86-64-v3"],
        "avx512": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
        "avx512bf16": ["-march=x86-64-v4", "-mprefer-vector-width=512", "-mavx512bf16"],
    }
FLAGS = ["-O3", "-std=gnu11", "-fopenmp", "-fno-math-errno", "-fvisibility=hidden", "-Wno-psabi"]
# A function that Python calls is declared in exports.h, or the compiler says that it is not.
FLAGS += ["-Wall", "-Wextra", "-Wshadow", "-Wmissing-prototypes"]

if sys.platform == "win32":
    TARGETS = {}  # MSVC has no vector extensions

DIGEST = runpy.run_path("swatfx/kernels/sources.py")["digest"]()

setup(
    ext_modules=[
        Extension(
            f"swatfx.kernels._{name}",
            SOURCES,
            depends=HEADERS,
            define_macros=[("SWATFX_SOURCES", f'"{DIGEST}"')],
            extra_compile_args=[*FLAGS, *target],
            extra_link_args=["-fopenmp"],
            optional=True,
        )
        for name, target in TARGETS.items()
    ]
)
