"""``faust -A streams check [--connect]``: print all that is wrong, exit 0 or 1."""

from __future__ import annotations

import logging

from settings import declarations, environment
from streams.check import examine


def run(connect: bool) -> int:
    """Check settings and YAML, with ``connect`` every service too; print the findings and return the exit code."""
    env = environment()
    # The clients log what the findings say better.
    logging.disable(logging.CRITICAL)
    try:
        found = examine(env, connect)
    finally:
        logging.disable(logging.NOTSET)
    for probe in found.probes:
        if probe.problem is None:
            print(f"ok: {probe.service} at {probe.address}: {probe.detail}, {probe.seconds * 1000:.0f} ms")
    for finding in found.findings:
        print(finding)
    if not found.findings:
        used = sum(1 for declared in declarations() if env.get(declared.variable, "").strip())
        print(
            f"All is well: {len(declarations())} settings ({used} of them set), configuration in {found.config_path}."
        )
        return 0
    if connect and found.settings is None:
        print("No service was tried, because the settings cannot be used.")
    print(f"{len(found.findings)} thing(s) to correct.")
    return 1
