"""Runs compiled kernels on another processor than Python's: an emulated one, in its own process.

As a plugin of pytest, `-p tests.nets.other_processor`, every kernel that a test calls runs there.
What a call reads and may write, the storages of its tensors and its structures, goes there whole,
and comes back; other_processor.c makes the call. Structures lie alike on all 64-bit processors, and
hold no addresses but where they are `bytes`: there a word is one if a tensor of the call has it.
"""

from __future__ import annotations

import ctypes
import os
import pathlib
import pkgutil
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

from torch import Tensor

from swatfx import kernels
from swatfx.kernels import library

# What to run, and the file for the names of the functions that were called; both for the plugin.
COMMAND, REACHED = "SWATFX_OTHER_PROCESSOR", "SWATFX_OTHER_REACHED"
_WHOLE, _REAL, _BUFFERS, _INNER = 32, 8, 32, 16  # as in other_processor.c
_GUARD = bytes([0xA5]) * 64  # on both sides of every buffer


class Place(ctypes.c_void_p):
    """An address within a tensor that is known with it."""

    tensor: Tensor | None = None


class _Told(threading.local):
    """Tensors by their addresses: what this thread has asked for since its last call."""

    def __init__(self) -> None:
        self.tensors: dict[int, Tensor] = {}


_told = _Told()


class OtherProcessor:
    """What `library` takes for a library: a process that makes the calls.

    Args:
        command: runs other_processor.c on the library.
    """

    def __init__(self, command: list[str]):
        self._pipes = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._lock = threading.Lock()
        self.called: set[str] = set()

    def __getattr__(self, name: str) -> Call:
        return Call(self, name)

    def call(self, name: str, args: tuple[Any, ...]) -> int:
        """What the function returns, as 64 bits; of a smaller type its bits are the lowest."""
        whole: list[tuple[int, int]] = []
        real = []
        memory: dict[int, Any] = {}  # address -> bytes there, one entry a storage or structure
        inner: list[tuple[int, int, int, int]] = []  # see `call` in other_processor.c

        def place(at: int, start: int, count: int) -> tuple[int, int]:
            """(number of the buffer that goes there, offset) of an address."""
            memory.setdefault(start, (ctypes.c_char * count).from_address(start))
            return list(memory).index(start), at - start + len(_GUARD)

        tensors, _told.tensors = _told.tensors, {}
        for arg in args:
            if isinstance(arg, ctypes.c_float):
                real.append(struct.pack("<fI", arg.value, 0))
            elif isinstance(arg, ctypes.c_double):
                real.append(struct.pack("<d", arg.value))
            elif isinstance(arg, int) or type(arg).__base__ is ctypes._SimpleCData:
                assert not isinstance(arg, ctypes.c_void_p) or arg.value is None, name
                whole.append((-1, int(getattr(arg, "value", arg) or 0)))
            elif isinstance(arg, bytes):
                copied = (ctypes.c_char * len(arg)).from_buffer_copy(arg)
                memory[ctypes.addressof(copied)] = copied
                whole.append(place(ctypes.addressof(copied), ctypes.addressof(copied), len(arg)))
                record, begin = whole[-1]
                for i, word in enumerate(struct.unpack(f"<{len(arg) // 8}Q", arg)):
                    if word in tensors:
                        target = place(*_within(tensors[word], word))
                        inner.append((record, begin + 8 * i, *target))
            else:
                at, start, count = _where(arg)
                # To nothing: as it is, since C may ask whether it is NULL.
                whole.append(place(at, start, count) if count else (-1, at))
        numbers = [number for _, number in whole] + [0] * (_WHOLE - len(whole))
        buffers = [buffer for buffer, _ in whole] + [-1] * (_WHOLE - len(whole))
        sizes = [len(block) + 2 * len(_GUARD) for block in memory.values()]
        sizes += [0] * (_BUFFERS - len(sizes))
        head = name.encode().ljust(64, b"\0")
        head += struct.pack(f"<{2 * _WHOLE}q", *numbers, *buffers)
        head += b"".join(real).ljust(8 * _REAL, b"\0") + struct.pack(f"<{_BUFFERS}q", *sizes)
        inner += [(-1, 0, 0, 0)] * (_INNER - len(inner))
        head += struct.pack(f"<{4 * _INNER}q", *(number for entry in inner for number in entry))
        with self._lock:
            self.called.add(name)
            assert self._pipes.stdin is not None and self._pipes.stdout is not None
            self._pipes.stdin.write(head)
            for block in memory.values():
                self._pipes.stdin.writelines((_GUARD, block.raw, _GUARD))
            self._pipes.stdin.flush()
            result = int.from_bytes(self._read(8, name), "little", signed=True)
            for block in memory.values():
                before, block[:], after = (
                    self._read(count, name) for count in (len(_GUARD), len(block), len(_GUARD))
                )
                assert before == after == _GUARD, f"{name} wrote outside of a tensor"
        return result

    def _read(self, count: int, name: str) -> bytes:
        assert self._pipes.stdout is not None
        found = self._pipes.stdout.read(count)
        assert len(found) == count, f"{name} ended the process: {self._pipes.wait()}"
        return found


class Call:
    """A function of an `OtherProcessor`, as ctypes has them."""

    def __init__(self, processor: OtherProcessor, name: str):
        self._processor, self._name = processor, name
        self.restype: Any = None

    def __call__(self, *args: Any) -> Any:
        result = self._processor.call(self._name, args)
        return None if self.restype is None else self.restype(result).value


def _where(arg: Any) -> tuple[int, int, int]:
    """(address, where the memory begins that it lies in, bytes of that)."""
    if isinstance(arg, Place):
        assert arg.tensor is not None
        return _within(arg.tensor, arg.value or 0)
    structure = getattr(arg, "_obj", arg)  # of a byref, or an array
    address = ctypes.addressof(structure)
    return address, address, ctypes.sizeof(structure)


def _within(tensor: Tensor, address: int) -> tuple[int, int, int]:
    """`_where`, of an address in the tensor's storage."""
    storage = tensor.untyped_storage()
    return address, storage.data_ptr(), storage.nbytes()


def install(command: list[str]) -> OtherProcessor:
    """Have all kernels of this process run by `command`, from now on."""
    noting = {"address": _telling, "made": _telling, "pointer": _noting, "result": _noting}
    for name, wrapper in noting.items():
        plain = getattr(library, name)
        noted = wrapper(plain)
        for module in (library, *_modules()):
            if getattr(module, name, None) is plain:
                module.__dict__[name] = noted
    processor = OtherProcessor(command)
    library._loaded[:] = [("generic", processor)]
    return processor


def _noting(plain: Callable[..., ctypes.c_void_p]) -> Callable[..., ctypes.c_void_p]:
    """`plain`, whose address comes with its tensor."""

    def pointer(x: Tensor | None, *past: int) -> ctypes.c_void_p:
        address = plain(x, *past)
        if x is None:
            return address
        place = Place(address.value)
        place.tensor = x
        return place

    return pointer


def _telling(plain: Callable[..., int]) -> Callable[..., int]:
    """`plain`, an address by itself, which the next call's records may hold."""

    def address(x: Tensor | None) -> int:
        found = plain(x)
        if x is not None and found:
            _told.tensors[found] = x
        return found

    return address


def _modules() -> Iterator[Any]:
    for found in pkgutil.iter_modules(kernels.__path__, f"{kernels.__name__}."):
        if not found.name.rpartition(".")[2].startswith("_"):  # the compiled ones
            yield import_module(found.name)


def pytest_configure(config: Any) -> None:
    config.other_processor = install(os.environ[COMMAND].split("\n"))


def pytest_unconfigure(config: Any) -> None:
    called = sorted(config.other_processor.called)
    pathlib.Path(os.environ[REACHED]).write_text("\n".join(called))


if __name__ == "__main__":
    sys.exit("a plugin of pytest: -p tests.nets.other_processor")
