"""Every parameter of the public API with every odd value: refused by name, or rightly taken."""

from __future__ import annotations

import pathlib
import re
from collections import Counter

import pytest

from swatfx.arguments import COUNT, checked
from swatfx.errors import InputError, SwatError
from tests.nets import bad_calls

# What errors call an argument other than by its name.
CALLED = {
    "dtypes": "dtype",
    "gm": "compiled model",
    "model": r"torch\.nn\.Module|run that can be resumed wants a model",
    "path": "export format|checkpoint|file",
    "policy": "polic",
    "default": "unknown policy",
    "data": "batch|example inputs",
    "compile_options": "compile option",
    "train": "wants a (model|data set)|training option",
    "policies": "policy",
    "passes": "pass int",
    "loss_fn": r"ReLU\.__init__",
    "optimizer": "optimizer",
    "rules": "a policy",
    "seeds": "seed",
    "accelerators": "accelerator",
    "weight_selector": "selector",
    "activation_selector": "selector",
    "gradient_selector": "selector",
}
# What is right although it looks odd, by (function or "*", argument).
SPARSITY = {"0"}
TAKEN: dict[tuple[str, str], set[str]] = {
    ("*", "sparsity"): SPARSITY,
    ("*", "gradient_sparsity"): SPARSITY,
    ("*", "activation_sparsity"): {"None", "0"},
    ("*", "activation_floor"): {"0"},
    ("*", "hold_from_epoch"): {"None", "0"},
    ("*", "drop_fraction"): {"0"},
    ("*", "update_every"): {"0"},
    ("*", "penalty"): {"0", "1.5", "2**70"},
    ("*", "assumed_activation_density"): {"None"},
    ("*", "seed"): {"-1", "0"},
    ("*", "example_inputs"): {"None", "empty list", "empty dict", "list", "dict", "tensor"},
    ("swat_u", "weight_selector"): {"string"},  # names are looked up where it is compiled
    ("swat_u", "activation_selector"): {"string"},
    ("swat_u", "gradient_selector"): {"string"},
    ("swat_u", "grow_share"): {"string"},
    ("Policy", "name"): {"string"},
    ("Policy", "rules"): set(),
    ("ssc", "g"): {"2**70"},
    ("ssc", "p"): {"2**70"},
    ("ssc", "q"): {"None", "2**70"},
    ("attach", "steps_per_epoch"): {"None"},
    ("bench", "loss"): {"None"},
    ("bench", "seconds"): {"0", "1.5", "2**70"},
    ("bench", "compile_options"): {"None", "empty dict"},
    ("bench", "tell"): {"class"},
    ("compare", "model"): {"class"},
    ("compare", "num_classes"): {"None"},
    ("compare", "compile_options"): {"None", "empty dict"},
    ("compare", "device"): {"None", "empty string"},
    ("compare", "train"): {"None"},
    ("compare", "output_dir"): {"None", "string"},
    ("compare", "tell"): {"class"},
    ("compile", "passes"): {"None", "empty list"},
    ("compile", "value_dtype"): {"None"},
    ("export", "dynamic_shapes"): {"None"},
    ("load", "optimizer"): {"None"},
    ("save", "optimizer"): {"None"},
    ("save", "path"): {"string"},
    ("save", "extra"): {"None", "empty dict", "dict"},
    ("per_layer", "rules"): {"empty dict"},
    ("report", "topk_cost"): {"None"},
    ("report", "device"): {"None", "0"},
    ("report", "accelerators"): {"empty list"},
    ("report", "simulation_options"): {"None"},
    ("tune", "loss_fn"): {"None"},
    ("tune", "simulation_options"): {"None"},
}
FLAGS = "first_dense last_dense global_threshold forward_weight forward_activation backward_weight"
FLAGS += " backward_activation separate quiet training fallback torch_compile"


def _is_right(function: str, argument: str, value: str) -> bool:
    if argument in FLAGS.split() and value == "True":
        return True
    return any(value in TAKEN.get((name, argument), ()) for name in (function, "*"))


def _wrong(folder: pathlib.Path, every: int) -> tuple[Counter[str], list[str]]:
    wrong: list[str] = []
    tried: Counter[str] = Counter()
    for number, (function, argument, value, call) in enumerate(bad_calls.calls(folder)):
        if number % every:
            continue
        tried[function] += 1
        where = f"{function}({argument}={value})"
        try:
            call()
        except (SwatError, TypeError, ValueError) as error:
            said = str(error).replace("_", " ")
            named = argument.replace("_", " ") in said
            if not named and not re.search(CALLED.get(argument, "^$"), str(error)):
                wrong.append(f"{where} is not named: {type(error).__name__}: {error}")
            elif isinstance(error, SwatError) and "\n" in str(error):
                wrong.append(f"{where}: more than a line")
        except Exception as error:
            wrong.append(f"{where} raised {type(error).__name__}: {error}")
        else:
            if not _is_right(function, argument, value):
                wrong.append(f"{where} was taken")
    return tried, wrong


def test_a_sample_of_bad_calls(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tried, wrong = _wrong(tmp_path, 19)
    assert tried.total() > 100 and not wrong, "\n".join(wrong)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_bad_call(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tried, wrong = _wrong(tmp_path, 1)
    assert tried.total() > 2000 and len(tried) > 25 and not wrong, "\n".join(wrong)


def test_the_check_keeps_the_signature_and_knows_its_arguments() -> None:
    @checked(count=COUNT)
    def function(count: int, *, other: int = 0) -> int:
        """Says."""
        return count + other

    assert function(2, other=1) == 3 and function.__doc__ == "Says."
    for value in (0, True, 1.0, None, 2**70):
        with pytest.raises(InputError, match="count has to be a whole number"):
            function(value)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="other_name"):
        function(1, other_name=2)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"has no argument \['size'\]"):
        checked(size=COUNT)(function)
