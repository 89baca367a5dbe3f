"""The demo: the paper's ResNet-50 figures, an export read back, and a real training run."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from swatfx import models
from swatfx.costs import report
from swatfx.errors import SwatError
from swatfx.exporting import export
from swatfx.pipeline import compile as compile_model
from swatfx.policy import dense, swat_u
from swatfx.runs import RunConfig, train_run
from swatfx.tables import Table
from swatfx.training import refresh

# Tables 3 of the paper: SWAT-U at 80% on ResNet-50.
PAPER = {
    "training_mac_reduction": 0.761,
    "activation_reduction": 0.392,
    "inference_mac_reduction": 0.777,
}


def run(folder: Path, epochs: int) -> None:
    """Run all three parts, writing below `folder`.

    Raises:
        SwatError: a figure of the paper does not come out within half a point, or the exported
            program computes something else.
    """
    folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    torch.manual_seed(0)
    gm = compile_model(models.create("resnet50"), swat_u(0.8))
    result = report(gm, (torch.empty(32, 3, 224, 224, device="meta"),))
    print(result)
    print()
    figures = [
        (name.replace("_", " "), f"{100 * paper:.1f}%", f"{100 * result.totals[name]:.1f}%")
        for name, paper in PAPER.items()
    ]
    print(Table(("ResNet-50, SWAT-U 80%", "paper", "here"), tuple(figures)).to_text())
    for name, paper in PAPER.items():
        if abs(result.totals[name] - paper) > 0.005:
            raise SwatError(f"{name} is not the paper's {paper}", value=result.totals[name])

    path = folder / "resnet50.pt2"
    x = torch.randn(2, 3, 224, 224)
    export(gm, path, (x,))
    refresh(gm)
    gm.eval()
    with torch.no_grad():
        apart = (torch.export.load(path).module()(x) - gm(x)).abs().max().item()
    print(f"\nexported to {path} and loaded back: outputs differ by at most {apart:g}")
    if apart > 1e-5:
        raise SwatError("the exported program computes something else", value=apart)

    print(f"\ntraining a small CNN on real handwritten digits, {epochs} epochs each")
    shape = models.default_input_shape("digits/cnn")
    rows = []
    for name, policy in (("dense", "dense"), ("SWAT-U 90%", "swat-u:0.9")):
        trained = train_run(
            RunConfig(model="digits/cnn", data="digits", policy=policy, epochs=epochs)
        )
        chosen = dense() if policy == "dense" else swat_u(0.9)
        cost = report(
            compile_model(models.create("digits/cnn"), chosen),
            (torch.empty(64, *shape, device="meta"),),
        ).totals
        macs = sum(v for k, v in cost.items() if k.startswith("sparse_") and k.endswith("_macs"))
        rows.append((name, f"{100 * trained.test_accuracy:.1f}%", f"{macs / 64 / 1e6:.2f}M"))
    heads = ("digits/cnn", "test accuracy", "training MACs an image")
    print(Table(heads, tuple(rows)).to_text())
    print(f"\ndone in {time.perf_counter() - start:.0f} s")
