"""How a model is compiled, beside the policy: the options that every command and checkpoint has."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from swatfx.errors import InputError, UnknownNameError

NORM_SAVES = ("exact", "int8", "int4")
VALUE_DTYPES: dict[str | None, torch.dtype | None] = {None: None, "bf16": torch.bfloat16}
KERNELS = ("auto", "sparse", "dense")


@dataclass(frozen=True)
class CompileOptions:
    """Options of `swatfx.compile`, which tells what each is for.

    Attributes:
        norm_saves: one of `NORM_SAVES`.
        value_dtype: a name of `VALUE_DTYPES`; given as a dtype, it becomes its name.
        kernels: one of `KERNELS`.

    Raises:
        InputError: a value is none of these.
    """

    norm_saves: str = "exact"
    value_dtype: str | None = None
    kernels: str = "auto"

    def __post_init__(self) -> None:
        """Check the values."""
        if self.norm_saves not in NORM_SAVES:
            raise InputError(
                "norm_saves says what norms keep for backward",
                value=self.norm_saves,
                remedy="use 'exact', 'int8' or 'int4'",
            )
        names = {name: name for name in VALUE_DTYPES} | {d: n for n, d in VALUE_DTYPES.items()}
        given: Any = self.value_dtype
        try:
            object.__setattr__(self, "value_dtype", names[given])
        except (KeyError, TypeError) as error:
            raise InputError(
                "packed values cannot be stored as this",
                value=given,
                remedy="value_dtype is 'bf16' (torch.bfloat16), or None for the layer's own dtype",
            ) from error
        if self.kernels not in KERNELS:
            raise InputError(
                "kernels says which ones convolutions run",
                value=self.kernels,
                remedy="use 'auto', 'sparse' or 'dense'",
            )

    @staticmethod
    def of(given: CompileOptions | Mapping[str, Any] | None) -> CompileOptions:
        """Options by name; what is not named is at its default. UnknownNameError for others."""
        if isinstance(given, CompileOptions):
            return given
        for name in given or {}:
            if name not in OPTION_NAMES:
                raise UnknownNameError("compile option", name, OPTION_NAMES)
        return CompileOptions(**(given or {}))

    def to_json(self) -> dict[str, str | None]:
        """By name, as checkpoints hold them and `swatfx.compile` takes them."""
        return dataclasses.asdict(self)

    def changed(self) -> dict[str, str | None]:
        """Those that are not at their defaults."""
        default = CompileOptions().to_json()
        return {name: value for name, value in self.to_json().items() if value != default[name]}


OPTION_NAMES = tuple(field.name for field in dataclasses.fields(CompileOptions))
