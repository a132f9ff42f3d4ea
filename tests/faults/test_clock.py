"""The host's clock is set back and forward under load: nothing is lost, and alarms go by the samples' own time."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from tests.faults.clock import SteppedClock
from tests.faults.support import settled, wait_for
from tests.faults.test_alarms import DEVICES, RULES, Storm, check_order, distinct, mails, prepared, recipient
from tests.faults.topics import read
from tools.simulator import Plan
from tools.stack import Stack

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]

_DURATION = timedelta(seconds=5)
_STEPS_SECONDS = (0, -3600, 1800)


def test_the_clock_of_a_worker_is_stepped(breakable: Stack, tmp_path: Path) -> None:
    """An hour back, then half an hour ahead: rows go on, each alarm opens when its duration of samples has passed."""
    clock = SteppedClock(tmp_path)
    with prepared(breakable, tmp_path, "mqtt,normalizer,ingestor,caching,alarms,mailer") as own:
        rule = RULES.format(recipient=recipient(tmp_path)) + f"    duration_seconds: {_DURATION.seconds}\n"
        Path(own.env["CONFIG_PATH"], "alarms.yaml").write_text(rule)
        worker = own.worker(**clock.env).start()
        fleet = own.fleet(Plan(rate=100))
        fleet.start()
        storm = Storm(own)

        def told(count: int) -> Callable[[], bool]:
            return lambda: distinct(own) == count

        for number, step in enumerate(_STEPS_SECONDS):
            clock.step(step)
            stored = worker.metric("headrace_forwarded_total", stage="ingestor")
            wait_for(
                "rows",
                lambda stored=stored: worker.metric("headrace_forwarded_total", stage="ingestor") > stored + 300,
            )
            # a sample a second: four are too short, six are enough
            storm.play(*[50.0] * 4, 20.0, *[50.0] * 6)
            wait_for(f"alarms, clock {step:+d} s", told(DEVICES * (2 * number + 1)))
            storm.play(20.0)
            wait_for(f"resolutions, clock {step:+d} s", told(DEVICES * (2 * number + 2)))
        clock.step(0)
        fleet.stop()
        # rows of devices without a time of their own have the worker's
        fleet.book.started -= timedelta(hours=2)
        report = settled(own, fleet)
        assert not report.unexpected_dead, report.text()
        check_order(mails(own))
        for record in read(own, "iot_alerts"):
            alert = json.loads(record.value)
            if not alert["is_resolved"]:
                begun, opened = (datetime.fromisoformat(alert[name]) for name in ("start_date", "timestamp"))
                assert opened - begun == _DURATION, alert
        assert worker.starts == 1
