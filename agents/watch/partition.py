"""The alarms of one partition: an engine on a buffer over the table, made ready before each event.

Guarantees: rules, devices and open alarms that have changed are looked at before the next event counts; a reading that
cannot be evaluated leaves states and alerts as they were before it; time counts only as far as readings have.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, MutableMapping, Sequence
from typing import Final

from agents.watch.knowledge import Knowledge
from devices.alarms.buffer import StateBuffer
from devices.alarms.engine import AlarmEngine
from devices.alarms.model import Alert, DeviceInfo
from devices.alarms.prepare import Limits
from devices.model import Reading
from streams.resilience.failures import Poison
from streams.ticks import Reach

# After a longer silence of the ticks themselves (a start, an outage) time begins to count with the second one.
TICK_GAP_SECONDS: Final = 10.0

#: Tells the partition of a device.
Home = Callable[[str], int]


class Partition:
    """The engine of one partition, its states, and what it has to look at before its next event."""

    def __init__(
        self, number: int, knowledge: Knowledge, store: MutableMapping[str, bytes], limits: Limits, home: Home
    ) -> None:
        self.number = number
        self.home = home
        self.knowledge = knowledge
        self.version = knowledge.version
        self.buffer = StateBuffer(store)
        self.engine = AlarmEngine(self.buffer, knowledge.rules(), devices=knowledge.device, limits=limits)
        #: devices of this partition that were registered or changed
        self.changed: set[str] = set()
        self._rebuilt = False
        self._ticked = float("-inf")
        self._noted: tuple[float, int] | None = None

    async def prepare(self, now: float) -> list[Alert]:
        """Take up timers after a start, rules and devices that have changed; returns what that opens or closes.

        Other partitions have their turn in between: there may be a million states to look at.
        """
        found: list[Alert] = []
        engine = self.engine
        if not self._rebuilt:
            self.changed.clear()
            for alert in self.knowledge.open.values():
                engine.note(alert, now)
            for some in engine.rebuild_in_slices(now):
                found += some
                await asyncio.sleep(0)
            self._expect_all(now, found)
            self._rebuilt = True
        if self.version != self.knowledge.version:
            self.version = self.knowledge.version
            for some in engine.set_rules_in_slices(self.knowledge.rules(), now):
                found += some
                await asyncio.sleep(0)
            self._expect_all(now, found)
        while self.changed:
            device_id = self.changed.pop()
            found += engine.expect(self.knowledge.device(device_id) or DeviceInfo(device_id=device_id), now)
        return found

    def _expect_all(self, now: float, found: list[Alert]) -> None:
        """Let the silence of devices count that are registered here and were never heard."""
        for device_id in self.knowledge.devices():
            info = self.knowledge.device(device_id)
            if info is None or self.home(device_id) != self.number:
                continue
            if any(rule.no_data for rule in self.engine.index.rules_for(device_id, info.profile, info.tags, None)):
                found += self.engine.expect(info, now)

    def count(self, reading: Reading, now: float) -> Sequence[Alert]:
        """Let one reading count; one that cannot leaves everything as it was before it."""
        if not len(reading.values) == len(reading.labels) == len(reading.display_names):
            raise Poison(
                f"{len(reading.values)} values, {len(reading.labels)} labels and {len(reading.display_names)} display "
                "names: a reading has as many of each"
            )
        self.buffer.mark()
        try:
            return self.engine.process(reading, self.knowledge.device(reading.device_id), now)
        except BaseException:
            self.buffer.rollback()
            # What the engine has in memory may be ahead of its states.
            self._rebuilt = False
            raise

    def tick(self, now: float, reach: Reach | None) -> list[Alert]:
        """Let time count up to the last moment of which it is known that all readings that were there have counted.

        A silence is none while readings wait, and under load some always do. So a moment is noted together with how far
        the topic reached then; once all of that has counted, time passes up to that moment and the next one is noted.
        """
        last, self._ticked = self._ticked, now
        noted = self._noted
        if reach is None:
            self._noted = None
        elif noted is None or not 0 <= now - last <= TICK_GAP_SECONDS:
            self._noted = (now, reach.end)
        elif reach.done >= noted[1]:
            self._noted = (now, reach.end)
            return self.engine.tick(noted[0])
        return []
