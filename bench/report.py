"""What every measurement says of itself: the machine, the versions, the day; tables as Markdown and as JSON."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("faust-streaming", "aiokafka", "msgspec", "uvloop", "asyncpg")


def machine() -> dict[str, Any]:
    """Return the machine's size: cores that this process may use, memory, processor, system."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    return {
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "processor": model,
        "system": platform.platform(terse=True),
        "load_before": round(os.getloadavg()[0], 1),
    }


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that matter here."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table, columns aligned for a terminal; all but the first are numbers."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        rest = (cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))
        return "| " + " | ".join((cells[0].ljust(widths[0]), *rest)) + " |"

    rule = "|" + "|".join("-" * (width + 1) + (":" if n else "-") for n, width in enumerate(widths)) + "|"
    return "\n".join((line(header), rule, *(line(row) for row in rows)))


def footer(facts: Mapping[str, Any], software: Mapping[str, str], moment: datetime) -> str:
    """Return the line that stands below a table."""
    names = ", ".join(f"{name} {number}" for name, number in software.items())
    return (
        f"{facts['cores']} cores ({facts['processor']}), {facts['memory_gib']} GiB, {facts['system']}; load before the "
        f"run {facts['load_before']}; {names}; {moment:%Y-%m-%d}"
    )


def publish(name: str, title: str, body: str, data: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Print ``body`` and write it, with machine and versions, to ``bench/results/NAME.md`` and ``NAME.json``."""
    moment = datetime.now(UTC)
    software = {**versions(), **data.get("versions", {})}
    text = f"# {title}\n\n{body}\n\n{footer(facts, software, moment)}\n"
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.md").write_text(text)
    document = {**data, "machine": facts, "versions": software, "date": f"{moment:%Y-%m-%dT%H:%M:%SZ}"}
    (RESULTS / f"{name}.json").write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    print("\n" + text)
