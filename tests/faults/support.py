"""What the scenarios of the fault suite share: patience, and how each of them ends."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.coordinator.protocol import ConsumerProtocolMemberAssignment

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


def members(own: Realm, stage: str) -> dict[str, list[tuple[str, int]]]:
    """Return the members of a stage's group, as the broker describes it, and the (topic, partition) that each owns."""

    async def ask() -> dict[str, list[tuple[str, int]]]:
        admin = AIOKafkaAdminClient(bootstrap_servers=own.env["KAFKA_BOOTSTRAP_SERVERS"], request_timeout_ms=20_000)
        await admin.start()
        try:
            (described,) = await admin.describe_consumer_groups([f"{own.name}-{stage}"])
        finally:
            await admin.close()
        found = {}
        for member in described.groups[0][5]:
            assigned = ConsumerProtocolMemberAssignment.decode(member[-1]).partitions() if member[-1] else []
            found[member[0]] = [(tp.topic, tp.partition) for tp in assigned]
        return found

    return asyncio.run(ask())


def partition_count(own: Realm, topic: str) -> int:
    """Return how many partitions a topic of the contract has."""

    async def ask() -> int:
        admin = AIOKafkaAdminClient(bootstrap_servers=own.env["KAFKA_BOOTSTRAP_SERVERS"], request_timeout_ms=20_000)
        await admin.start()
        try:
            (described,) = await admin.describe_topics([own.places.topic(topic)])
        finally:
            await admin.close()
        return len(described["partitions"])

    return asyncio.run(ask())


def misowned(own: Realm, stage: str, topic: str) -> list[str]:
    """Return which partitions of a stage's input do not have exactly one owner, by the broker and by the workers."""
    owned = Counter(place for places in members(own, stage).values() for place in places)
    wanted = [(own.places.topic(topic), number) for number in range(partition_count(own, topic))]
    wrong = [f"{name}[{number}]: {owned[name, number]} owners" for name, number in wanted if owned[name, number] != 1]
    held = sum(worker.metric("headrace_assigned_partitions", stage=stage) for worker in own.workers if worker.alive)
    if held != sum(owned.values()):
        wrong.append(f"the workers hold {held:.0f} partitions, and the broker has given out {sum(owned.values())}")
    return wrong


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
