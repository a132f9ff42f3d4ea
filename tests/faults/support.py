"""What the scenarios of the fault suite share: patience, and how each of them ends."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

import settings
from tests.faults.worker import Realm
from tools.simulator import Fleet, Report

#: Bound of every wait: far above the 64 s of the highest backoff, for a machine that others use too.
LIVENESS_SECONDS = float(settings.environment().get("FAULTS_LIVENESS_SECONDS") or 150)
STAGES = "mqtt,normalizer,ingestor,caching"


def wait_for(what: str, condition: Callable[[], Any], seconds: float = LIVENESS_SECONDS) -> Any:
    """Return the first true answer of ``condition``; fails, saying ``what``, after a generous bound."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        found = condition()
        if found:
            return found
        time.sleep(0.2)
    pytest.fail(f"{what}: not within {seconds:.0f} s")


def settled(own: Realm, fleet: Fleet) -> Report:
    """Wait for the end of the fleet and check its ledger. Returns what was found.

    Nothing is lost, no row is there twice, and no fault of a service has made dead letters of readable messages.
    """
    assert fleet.join(LIVENESS_SECONDS), f"the fleet did not get its last acknowledgements\n{own.logs()}"
    report = own.settle(fleet)
    print(report.text())
    assert report.ok, f"{report.text()}\n{own.logs()}"
    assert not report.unexpected_dead, f"{report.text()}\n{own.logs()}"
    return report
