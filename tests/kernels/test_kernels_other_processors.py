"""The kernels on an emulated 64-bit Arm, whose vectors are NEON's: tests that compare with plain
formulas in float64 run once more, their calls in a process of that processor. Minutes.
"""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Sequence

import pytest

from tests.nets.kernel_builds import FLAGS, SOURCES
from tests.nets.other_processor import COMMAND, REACHED
from tests.nets.places import ROOT

pytestmark = pytest.mark.slow
COMPILER, EMULATOR, SYSTEM = "aarch64-linux-gnu-gcc", "qemu-aarch64", "/usr/aarch64-linux-gnu"
# Tests -> some functions that they must have reached there.
RUNS = {
    "tests/kernels/test_kernels_products_bf16.py": (
        "sparse_conv_bf16",
        "sparse_weight_gradient_bf16",
        "sampled_weight_gradient_bf16",
    ),
    "tests/kernels/test_kernels_formula.py": (
        "put_strided",
        "sampled_weight_gradient",
        "sparse_conv",
        "sparse_weight_gradient",
        "take_strided",
    ),
    "tests/kernels/test_kernels_linear.py": ("sparse_linear_weight_gradient", "swatfx_transpose"),
    "tests/kernels/test_kernels_blocks.py": (
        "sparse_conv",
        "sparse_conv_bf16",
        "swatfx_keep_blocks",
    ),
    "tests/kernels/test_kernels_sampled.py": ("sampled_weight_gradient", "swatfx_keep_bits"),
    "tests/kernels/test_kernels_pack.py": ("swatfx_pack_top", "swatfx_pack_join", "swatfx_scatter"),
    "tests/kernels/test_kernels_topk.py": ("swatfx_greatest", "swatfx_count_digit", "swatfx_kth"),
    "tests/kernels/test_kernels_norm.py": ("swatfx_norm", "swatfx_norm_backward"),
    "tests/kernels/test_kernels_pool.py": (
        "swatfx_dropout_backward",
        "swatfx_max_pool",
        "swatfx_max_pool_backward",
        "swatfx_relu_backward",
    ),
    "tests/ops/test_features_norm.py": ("swatfx_layer_norm", "swatfx_layer_norm_backward"),
    "tests/ops/test_coded.py": ("swatfx_encode", "swatfx_decode_bf16"),
}


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Runs other_processor.c on a library of the kernels."""
    missing = [tool for tool in (COMPILER, EMULATOR) if shutil.which(tool) is None]
    if missing or not pathlib.Path(SYSTEM).is_dir():
        pytest.skip(f"no {' and no '.join(missing) or SYSTEM}")
    folder = tmp_path_factory.mktemp("arm")

    def build(out: str, *words: str) -> str:
        built = str(folder / out)
        subprocess.run([COMPILER, *words, "-o", built], check=True, cwd=ROOT)
        return built

    library = build("kernels.so", "-O3", *FLAGS, "-fPIC", "-shared", *map(str, SOURCES), "-lm")
    driver = build("driver", "-O2", "tests/nets/other_processor.c")
    return [EMULATOR, "-L", SYSTEM, driver, library]


@pytest.mark.parametrize(("tests", "reached"), RUNS.items(), ids=RUNS)
def test_formulas(
    command: list[str], tests: str, reached: Sequence[str], tmp_path: pathlib.Path
) -> None:
    names = tmp_path / "reached"
    told = {COMMAND: "\n".join(command), REACHED: str(names), "OMP_NUM_THREADS": "1"}
    words = ["-q", "-p", "no:cacheprovider", "-p", "tests.nets.other_processor", tests]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words],
        cwd=ROOT,
        env={**os.environ, **told, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert set(reached) <= set(names.read_text().split())
