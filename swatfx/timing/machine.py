"""What figures were measured on: the machine, versions of packages, the allocator's settings."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from typing import Any

import torch

from swatfx import kernels
from swatfx.forecast import processor

ALLOCATOR = "GLIBC_TUNABLES"  # the environment variable
# glibc gives big buffers back at every free, and a fresh page costs more than the arithmetic that
# fills it: under these settings it keeps them.
TUNED = ":".join(
    (
        "glibc.malloc.hugetlb=1",
        "glibc.malloc.mmap_threshold=4294967296",
        "glibc.malloc.trim_threshold=17179869184",
    )
)
_PACKAGES = ("torch", "torchvision", "numba", "numpy", "networkx", "swatfx")


def machine() -> dict[str, Any]:
    """The hardware and what of it PyTorch uses; no names of hosts or folders."""
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "system": platform.system(),
        "architecture": platform.machine(),
        "processor": processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "swatfx_kernels": kernels.instruction_set(),
        "memory_bytes": _memory_bytes(),
        "accelerator": accelerator,
    }


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that matter."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def today() -> str:
    """The date as YYYY-MM-DD."""
    return datetime.date.today().isoformat()


def allocator() -> str | None:
    """Settings of glibc's allocator in this process, or None."""
    return os.environ.get(ALLOCATOR) or None


def allocator_advice() -> str | None:
    """What to set so that big buffers are kept, where glibc gives them back; else None."""
    if platform.libc_ver()[0] != "glibc" or "mmap_threshold" in (allocator() or ""):
        return None
    return (
        "glibc gives big buffers back at every free here, which costs every form time: "
        f"export {ALLOCATOR}={TUNED}"
    )
