"""Whole training steps, and inference: SWAT beside the fastest dense form.

    python -m benchmarks.step [--model NAME[:BATCH[:SIDE]] ...] [--policies POLICY ...]
        [--norm-saves exact int8 int4] [--quick]

A step is forward, cross entropy, backward and SGD with momentum, in fp32 and under bf16 autocast.
The dense model runs in three forms (NCHW, channels_last, torch.compile of channels_last) of each; a
speed-up is the time of the fastest of them, whatever its dtype, over that of the side, taken round
by round; `same_dtype` is over the fastest of the side's own. Steps of a period above 1 hold no
refresh of thresholds: the first one does, and is not measured. `time_budgets` say where the time
of a step goes. Inference is `eval()` without gradients at batch 1 and 16. With codes among
`--norm-saves`, `over_exact` is the time of a step that keeps them over that of the same with exact
saves, round by round.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from benchmarks import common, options
from benchmarks.op_times import time_budget
from benchmarks.sides import (
    DENSE,
    FORMS,
    Network,
    Predictor,
    StepSide,
    Trainer,
    exact_twin,
    in_dtypes,
    parse_network,
    policy_sides,
)
from swatfx import models
from swatfx.ops.norm import EXACT
from swatfx.options import NORM_SAVES
from swatfx.policy import as_policy
from swatfx.timing.steps import DTYPES, failure

_NETWORKS = (Network("resnet50", 16), Network("cifar/resnet18", 128))
_QUICK_NETWORKS = (Network("digits/cnn", 4),)
_STRUCTURED = "swat-u:0.7,weight_selector=input-channel"
POLICIES = (
    *(f"swat-u:{s},period={p}" for s in (0.5, 0.8, 0.9, 0.95) for p in (1000, 1)),
    *(f"{_STRUCTURED},period={p}" for p in (1000, 1)),
    "dense",
)
_QUICK_POLICIES = ("swat-u:0.9,period=1000", "swat-u:0.9,period=1", "dense")
# Speed-ups that are aimed at, by sparsity; period 1 or 1,000: of fp32 over the fastest dense form
# in fp32, of bf16 over the fastest of any dtype.
TARGETS = {
    "fp32": {0.5: 1 / 1.1, 0.8: 1.4, 0.9: 2.2, 0.95: 3.0},
    "bf16": {0.8: 1.3, 0.9: 1.8, 0.95: 2.3},
}
STRUCTURED_TARGET = 1.8  # in fp32
MOST_OVER_EXACT = 1.05  # times that a step with codes is to take at most
_WARMUP = 2


def target(side: StepSide) -> float | None:
    """The speed-up that is aimed at, if any."""
    if side.policy is None:
        return None
    parsed, half = as_policy(side.policy), side.dtype is torch.bfloat16
    if parsed.weight_selector == "input-channel" and parsed.sparsity == 0.7:
        return None if half else STRUCTURED_TARGET
    plain = parsed.name == "swat-u" and parsed.weight_selector == "nchw"
    return TARGETS["bf16" if half else "fp32"].get(parsed.sparsity) if plain else None


def _made(
    network: Network, sides: Mapping[str, StepSide], make: Callable[..., Any]
) -> tuple[dict[str, Any], dict[str, str]]:
    """(trainers or predictors by side, why the others are not there)."""
    model = models.create(network.name)
    made: dict[str, Any] = {}
    unavailable: dict[str, str] = {}
    for name, side in sides.items():
        one = make(network, side, model)
        reason = None
        if side.form == "compiled":
            reason = failure(one.step if isinstance(one, Trainer) else one.predict)
        if reason is None:
            made[name] = one
        else:
            unavailable[name] = reason
    return made, unavailable


def _compare(rounds: common.Rounds, sides: Mapping[str, StepSide]) -> dict[str, Any]:
    forms = [name for name in rounds if sides[name].policy is None]
    dense = common.fastest(rounds, forms)
    rivals = {
        dtype: common.fastest(rounds, own)
        for dtype in {sides[name].dtype for name in rounds}
        if (own := [name for name in forms if sides[name].dtype is dtype])
    }
    others = [name for name in rounds if sides[name].policy is not None]
    return {
        "fastest_dense": dense,
        "sides": common.summary(rounds),
        "speedups": {name: common.ratio(rounds, dense, name) for name in others},
        "same_dtype": {
            name: {"over": rival, **common.ratio(rounds, rival, name)}
            for name in others
            if (rival := rivals.get(sides[name].dtype)) is not None
        },
        "over_exact": {
            name: {"over": twin, "wanted": MOST_OVER_EXACT, **common.ratio(rounds, name, twin)}
            for name in others
            if (twin := exact_twin(name, sides)) in rounds
        },
    }


def train(
    network: Network,
    policies: list[str],
    args: argparse.Namespace,
    repeats: int,
    tick: Callable[[], object],
) -> dict[str, Any]:
    """Step times of all sides of one network, and their time budgets."""
    torch._dynamo.reset()
    ways = _sides(policies, args, args.norm_saves)
    trainers, unavailable = _made(network, ways, Trainer)
    sides = {name: common.timed(trainer.step) for name, trainer in trainers.items()}
    rounds = common.alternate(sides, repeats, warmup=_WARMUP, tick=tick)
    for name, trainer in trainers.items():
        _check_refreshes(name, trainer)
    result = _compare(rounds, ways) | {"unavailable": unavailable}
    result["targets"] = {
        name: common.against(wanted, result[over][name]["median"])
        for name, side in ways.items()
        if name in result[over := "speedups" if side.dtype is torch.bfloat16 else "same_dtype"]
        and (wanted := target(side)) is not None
    }
    eager = [n for n in trainers if ways[n].policy or n.startswith("dense channels_last")]
    if args.form == "compiled":
        eager = eager[:1]
    result["time_budgets"] = {
        name: time_budget(trainers[name], args.budget_steps) for name in eager
    }
    return result


def _sides(
    policies: list[str], args: argparse.Namespace, saves: Sequence[str] = (EXACT,)
) -> dict[str, StepSide]:
    """The dense forms and the policies; --quick does without torch.compile."""
    dense = {k: v for k, v in DENSE.items() if v.form in _dense_forms(args)}
    return in_dtypes(dense | policy_sides(policies, args.form, saves), args.dtypes)


def _dense_forms(args: argparse.Namespace) -> list[str]:
    return [form for form in args.dense_forms if not (args.quick and form == "compiled")]


def _check_refreshes(name: str, trainer: Trainer) -> None:
    """The steps measured have to be of the period that their name says."""
    policy = trainer.side.policy
    if policy is None or as_policy(policy).period == 1:
        return
    late = {iteration for iteration in trainer.refreshed_at() if iteration > 0}
    if late:
        raise SystemExit(f"{name}: thresholds were recomputed at {late}; fewer --repeats, please")


def infer(
    network: Network,
    policies: list[str],
    args: argparse.Namespace,
    repeats: int,
    tick: Callable[[], object],
) -> dict[str, Any]:
    """Latencies of all sides of one network."""
    torch._dynamo.reset()
    ways = _sides(policies, args)
    predictors, unavailable = _made(network, ways, Predictor)
    sides = {name: common.timed(one.predict) for name, one in predictors.items()}
    rounds = common.alternate(sides, repeats, warmup=_WARMUP, tick=tick)
    shape = list(network.shape)
    return {"input_shape": shape, **_compare(rounds, ways), "unavailable": unavailable}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All networks: steps, budgets, inference."""
    networks = args.model or (_QUICK_NETWORKS if args.quick else _NETWORKS)
    if args.batch:
        networks = [replace(network, batch=args.batch) for network in networks]
    policies = list(args.policies or (_QUICK_POLICIES if args.quick else POLICIES))
    repeats = args.repeats or (2 if args.quick else 9)
    rounds = repeats + _WARMUP
    forms = len(_dense_forms(args))
    calls = forms + len(policies) * len(args.norm_saves) + len(args.inference_batches) * (forms + 1)
    calls *= len(args.dtypes)
    results = []
    with common.progress(len(networks) * calls * rounds, "step") as bar:
        for network in networks:
            result = {"network": network.name, "input_shape": list(network.shape)}
            result |= train(network, policies, args, repeats, bar.update)
            result["inference"] = [
                infer(
                    replace(network, batch=batch),
                    [args.inference_policy],
                    args,
                    repeats,
                    bar.update,
                )
                for batch in args.inference_batches
            ]
            results.append(result)
    return {"form": args.form, "networks": results}


def table(measured: Mapping[str, Any]) -> tuple[list[str], list[common.Row]]:
    """One row a side, for steps and for inference, and one a kind of op."""
    headers = ["network", "what", "side", "ms [min, max]", "speed-up [min, max]", "wanted"]
    coded = any(result["over_exact"] for result in measured["networks"])
    headers += ["time over exact [min, max]"] if coded else []
    rows: list[common.Row] = []
    for result in measured["networks"]:
        network = result["network"]
        rows += _rows(network, "step", result)
        for inference in result["inference"]:
            rows += _rows(network, "inference", inference)
        for side, budget in result["time_budgets"].items():
            for kind, part in budget["kinds"].items():
                if part["share"] < 0.005:
                    continue
                figures = f"{part['seconds'] * 1e3:.3g}", f"{part['share']:.1%} of the step"
                rows.append([network, kind, side, *figures, None, None])
    return headers, [row[: len(headers)] for row in rows]


def _rows(network: str, what: str, result: Mapping[str, Any]) -> list[common.Row]:
    shape = tuple(result["input_shape"])
    rows: list[common.Row] = []
    for name, quantities in result["sides"].items():
        seconds = {key: value * 1e3 for key, value in quantities["seconds"].items()}
        over = result["speedups"].get(name)
        note = "fastest dense" if name == result["fastest_dense"] else None
        gain = note if over is None else common.with_spread(over)
        wanted = result.get("targets", {}).get(name, {}).get("wanted")
        exact = result["over_exact"].get(name)
        lost = None if exact is None else common.with_spread(exact)
        place = [f"{network} {shape}", what, name]
        rows.append([*place, common.with_spread(seconds), gain, wanted, lost])
    for name, reason in result["unavailable"].items():
        rows.append([f"{network} {shape}", what, name, reason, None, None, None])
    return rows


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        nargs="+",
        type=parse_network,
        metavar="NAME[:BATCH[:SIDE]]",
        help="networks of swatfx.models.create (default: resnet50:16 cifar/resnet18:128)",
    )
    parser.add_argument("--batch", type=options.positive, help="images a step, for every network")
    parser.add_argument(
        "--policies", nargs="+", type=options.policy, metavar="POLICY", help="to train by"
    )
    parser.add_argument(
        "--norm-saves", nargs="+", choices=NORM_SAVES, default=[EXACT], help="of each policy"
    )
    parser.add_argument(
        "--dense-forms", nargs="+", choices=FORMS, default=list(FORMS), help="to compare with"
    )
    parser.add_argument(
        "--form", choices=FORMS, default="channels_last", help="of the model that is rewritten"
    )
    parser.add_argument(
        "--dtypes", nargs="+", choices=tuple(DTYPES), default=list(DTYPES), help="of all sides"
    )
    parser.add_argument(
        "--budget-steps", type=options.positive, default=3, help="steps that a time budget covers"
    )
    parser.add_argument(
        "--inference-batches", nargs="*", type=options.positive, default=[1, 16], metavar="N"
    )
    parser.add_argument("--inference-policy", type=options.policy, default="swat-u:0.9")


BENCHMARK = common.Benchmark(
    "step",
    "training steps and inference: SWAT over the fastest dense form",
    _add_arguments,
    measure,
    table,
    (
        "Speed-up: seconds of the fastest dense form of any dtype over those of the side, round by",
        "round: median [minimum, maximum]. Dense forms: NCHW, channels_last, torch.compile of it,",
        "each in fp32 and under bf16 autocast; `dense` is a policy that makes nothing sparse. What",
        "is wanted of fp32 is so over the fastest of fp32. Time over exact: seconds of a step that",
        f"keeps codes over those of the same with exact saves; wanted: at most {MOST_OVER_EXACT}.",
    ),
)

if __name__ == "__main__":
    raise SystemExit(common.run(BENCHMARK))
