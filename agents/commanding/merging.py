"""What the messages of a device add up to, where each tells a part: a light controller's schedule.

Guarantee: the state after a message is a reading on ``iot_validated_data`` before it is stored, and stored, its
changelog in Kafka, before the message counts as handled. A stretch of messages that comes again ends in the same
state.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from devices.registry import Registry
from streams import topics
from streams.messages import DeviceChange, Reading, encode
from streams.resilience.chunks import Out
from streams.resilience.failures import Rejected
from streams.resilience.producer import Outgoing
from tables.commands import STATES, encode_row


class Merging:
    """The states of one partition over ``rows``; what is to be sent (:attr:`readings`), stored (:attr:`changes`)."""

    def __init__(self, registry: Registry, rows: Mapping[str, bytes]) -> None:
        self.registry = registry
        self.rows = rows
        self.changes: dict[str, bytes | None] = {}
        self.readings: list[Outgoing] = []

    def take(self, told: DeviceChange, _out: Out) -> None:
        """Merge what a message changes, and make the reading that shows the state; raises Rejected for no profile."""
        profile = self.registry.profile(told.profile)
        if profile is None:
            raise Rejected(f"no_profile: {told.profile!r}, which read the message, is not active any more")
        driver = self.registry.driver(profile)
        states = self.states_of(told.device_id)
        state = driver.merge(states.get(told.profile), told.change)
        index, values = driver.summary(state)
        shape = profile.shape(index, tuple(values))
        reading = Reading(
            request_id=told.request_id,
            timestamp=told.timestamp,
            device_id=told.device_id,
            index=index,
            values=list(values.values()),
            labels=shape.labels,
            display_names=shape.display_names,
            metadata=shape.metadata,
        )
        self.readings.append((topics.validated_data.name, told.device_id.encode(), encode(reading), None))
        self.changes[told.device_id] = encode_row({**states, told.profile: state})

    def states_of(self, device_id: str) -> dict[str, dict[str, Any]]:
        """Return what the messages of a device add up to, by profile."""
        data = self.changes.get(device_id) or self.rows.get(device_id)
        return STATES.decode(data) if data is not None else {}
