"""A simulated step as a Chrome / Perfetto trace: a track a pass, a slice a layer."""

from __future__ import annotations

from typing import Any

from swatfx.costs.simulation import PASSES, Simulation


def trace_events(simulation: Simulation) -> dict[str, Any]:
    """The trace as a JSON-able object; write it to a file and open it in a trace viewer.

    A process is an accelerator, a thread a pass, one cycle one microsecond. Forward runs in layer
    order, then the layers backwards: of each the input gradient, then the weight gradient. Counters
    show utilisation.
    """
    events: list[dict[str, Any]] = []
    for process, name in enumerate(simulation.totals, start=1):
        events.append(_meta("process_name", process, 0, name))
        for thread, stage in enumerate(PASSES, start=1):
            events.append(_meta("thread_name", process, thread, stage.replace("_", " ")))
        rows = [row for row in simulation.rows if row.accelerator == name]
        forward = [row for row in rows if row.stage == "forward"]
        order = {row.layer: i for i, row in enumerate(forward)}
        backward = [row for row in rows if row.stage != "forward"]
        backward.sort(key=lambda row: (-order[row.layer], row.stage))
        now = 0.0
        for row in (*forward, *backward):
            thread = PASSES.index(row.stage) + 1
            arguments = {
                "cycles": row.cycles,
                "speedup over the dense tile": row.dense_cycles / row.cycles if row.cycles else 0,
                "limited by": row.note or row.limit,
            }
            events.append(
                {
                    "name": row.layer,
                    "ph": "X",
                    "ts": now,
                    "dur": row.cycles,
                    "pid": process,
                    "tid": thread,
                    "args": arguments,
                }
            )
            percent = {"utilisation %": round(100 * row.utilisation, 2)}
            events.append(
                {"name": "utilisation", "ph": "C", "ts": now, "pid": process, "args": percent}
            )
            now += row.cycles
        idle = {"utilisation %": 0}
        events.append({"name": "utilisation", "ph": "C", "ts": now, "pid": process, "args": idle})
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _meta(kind: str, process: int, thread: int, name: str) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": process, "tid": thread, "args": {"name": name}}
