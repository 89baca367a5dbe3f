"""What a training run is, and how it ended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from swatfx.errors import InputError
from swatfx.options import OPTION_NAMES
from swatfx.policy import Policy


@dataclass(frozen=True)
class RunConfig:
    """What to train, and how; None means what the recipe says, or the default given here.

    Attributes:
        model: a name of `swatfx.models.create`, or ``package.module:callable``.
        data: a name of `swatfx.datasets.open_data`.
        policy: a policy or its string, e.g. ``"swat-u:0.9"``. Where a string gives no period, the
            recipe's is taken.
        data_root: where the data set's files are.
        recipe: name of a recipe; None chooses by model and data.
        epochs: epochs in all; the recipe's schedule is stretched or shrunk to them.
        batch_size: images a step. The learning rate is not adapted to it.
        lr: first learning rate; the later ones keep their ratio to it.
        seed: of initialisation, order, augmentation and dropout.
        device: "cpu", "cuda", "cuda:1", ...; None is "cuda" where there is one.
        output_dir: folder for configuration, metrics and checkpoints; None writes nothing.
        resume: continue the run in `output_dir`.
        limit: train on the first so many images only, and test on a fifth as many.
        max_steps: stop, with a checkpoint, once the run has taken so many steps in all.
        threads: CPU threads; None leaves PyTorch's setting.
        workers: processes that read images from disk (imagenet only).
        norm_saves: of `swatfx.compile`, as are the two below.
        value_dtype: dtype of packed values, "bf16" or None.
        kernels: "auto", "sparse" or "dense".
        compile: run training steps through `torch.compile`.
        tensorboard: also write TensorBoard events into `output_dir`.
        quiet: show no progress bar (nor is there one when stderr is not a terminal).
    """

    model: str
    data: str
    policy: Policy | str
    data_root: str | None = None
    recipe: str | None = None
    epochs: int | None = None
    batch_size: int | None = None
    lr: float | None = None
    seed: int = 0
    device: str | None = None
    output_dir: str | None = None
    resume: bool = False
    limit: int | None = None
    max_steps: int | None = None
    threads: int | None = None
    workers: int = 0
    norm_saves: str = "exact"
    value_dtype: str | None = None
    kernels: str = "auto"
    compile: bool = False
    tensorboard: bool = False
    quiet: bool = False

    def __post_init__(self) -> None:
        """Raise `InputError` for numbers out of range and options that need an output folder."""
        for name in ("epochs", "batch_size", "limit", "max_steps", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1", value=value)
        for name in ("resume", "tensorboard"):
            if getattr(self, name) and self.output_dir is None:
                raise InputError(f"{name} needs an output folder", remedy="give --output-dir DIR")

    def compile_options(self) -> dict[str, Any]:
        """Those of the fields that `swatfx.compile` takes."""
        return {name: getattr(self, name) for name in OPTION_NAMES}


@dataclass(frozen=True)
class RunResult:
    """How a run stands when `train_run` returns; rates and accuracies are fractions.

    Attributes:
        epochs: epochs completed.
        steps: optimizer steps taken, those before a resume included.
        finished: False where `max_steps` ended the run early.
        train_loss: mean training loss over the images of the last epoch.
        test_accuracy: fraction of test images classified rightly after the last epoch.
        best_test_accuracy: the best such fraction after any epoch.
        mean_weight_density: fraction of the weights of all layers that take part that were active
            in the last training batch; None where no layer does.
        mean_activation_density: plain mean over these layers of the fraction of the input
            activation that was kept for backward.
        seconds: training and testing, those before a resume included.
        output_dir: where metrics and checkpoint are.
    """

    epochs: int
    steps: int
    finished: bool
    train_loss: float
    test_accuracy: float
    best_test_accuracy: float
    mean_weight_density: float | None
    mean_activation_density: float | None
    seconds: float
    output_dir: str | None
