"""What every scenario ends with, besides the ledger: accounts that balance, offsets at the end, nothing in flight.

While a realm is open the accounts of its workers are sampled (``Bookkeeping``): *received = forwarded + dead-lettered +
dropped + returned + in flight* holds at every moment, not at the end alone. At its end (``at_rest``) nothing is in
flight, `/metrics` says what `/accounts` says, and every group of a stage that runs has committed the end of each log
that it reads. Ticks go on for ever: of them, and of all else that is written meanwhile, the end as it was when it was
first asked for must have been passed. Each device's messages stand in `iot_validated_data` in the order that
`iot_raw_data` gave them (``overtaken``), and those that watched meanwhile have seen something (``watched``).
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Self

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError

from tools.simulator.checker import overtakers
from tools.simulator.evidence import Origin, origins

if TYPE_CHECKING:
    from tests.faults.worker import Realm
    from tools.worker import Worker

PATIENCE_SECONDS = 150.0
#: Somebody who samples twice a second has seen a worker that was ready this long ago.
_SEEN_SECONDS = 5.0
_BEGINNING = datetime(2020, 1, 1, tzinfo=UTC)
#: What a stage must have committed wherever there are records; what else its group has committed counts as well.
INPUTS = {
    "normalizer": "iot_raw_data",
    "ingestor": "iot_validated_data",
    "caching": "iot_validated_data",
    "alarms": "iot_validated_data",
    "mailer": "iot_alerts",
    "commands": "device_commands",
}
#: (committed, end) of a partition.
Standing = dict[tuple[str, str, int], tuple[int | None, int]]


def accounts(worker: Worker) -> list[dict[str, Any]]:
    """Return what a worker says on `GET /accounts`, empty while nothing answers."""
    status, body = worker.get("/accounts")
    found: list[dict[str, Any]] = json.loads(body) if status == 200 else []
    return found


def unbalanced(account: dict[str, Any]) -> str | None:
    """Return what is wrong with the accounts of one stage, counted here and not taken from its own balance."""
    became = (
        account["forwarded"]
        + sum(account["dead_lettered"].values())
        + sum(account["dropped"].values())
        + account["returned"]
        + account["in_flight"]
    )
    counts = (account["forwarded"], account["returned"], account["in_flight"])
    if account["received"] == became and min(counts) >= 0:
        return None
    return f"received {account['received']}, accounted for {became}: {account}"


class Bookkeeping:
    """Samples the accounts of a realm's workers from a thread of its own until it is closed."""

    def __init__(self, own: Realm, *, every_seconds: float = 0.5) -> None:
        self.violations: list[str] = []
        self.samples = 0
        #: what has ended the sampling before its time
        self.failure: Exception | None = None
        self._own = own
        self._every = every_seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(30)

    def _watch(self) -> None:
        try:
            self._run()
        except Exception as exc:
            self.failure = exc

    def _run(self) -> None:
        while not self._stop.wait(self._every):
            for worker in self._own.workers:
                for account in accounts(worker) if worker.alive else []:
                    self.samples += 1
                    if wrong := unbalanced(account):
                        self.violations.append(f"{worker.name}, stage {account['stage']}: {wrong}")


def restless(worker: Worker) -> list[str]:
    """Return what is still in flight in a worker, what does not balance, and what its metrics say otherwise."""
    found = accounts(worker)
    if not found:
        return [f"{worker.name}: no accounts"]
    wrong = []
    for account in found:
        stage = account["stage"]
        if account["in_flight"]:
            wrong.append(f"{worker.name}, stage {stage}: {account['in_flight']} in flight")
        if problem := unbalanced(account):
            wrong.append(f"{worker.name}, stage {stage}: {problem}")
        if not stage.endswith(("alarms", "mailer", "commands")):
            # the others have ticks, so that what is asked for next is another moment
            wrong += [
                f"{worker.name}, stage {stage}: {name} is {told:.0f} in /metrics and {count} in /accounts"
                for name, count in (
                    ("received_total", account["received"]),
                    ("forwarded_total", account["forwarded"]),
                    ("returned_total", account["returned"]),
                    ("dead_letters_total", sum(account["dead_lettered"].values())),
                    ("dropped_total", sum(account["dropped"].values())),
                )
                if (told := worker.metric(f"headrace_{name}", stage=stage)) != count
            ]
    if waiting := worker.metric("headrace_connector_in_flight"):
        wrong.append(f"{worker.name}: {waiting:.0f} device messages not acknowledged")
    return wrong


def standing(own: Realm) -> Standing:
    """Return (committed, end) of every partition that holds records and is read by a stage that runs."""
    return asyncio.run(_standing(own))


async def _standing(own: Realm) -> Standing:
    options = {"bootstrap_servers": own.env["KAFKA_BOOTSTRAP_SERVERS"], "request_timeout_ms": 10_000}
    stages = {account["stage"] for worker in own.workers if worker.alive for account in accounts(worker)}
    admin, consumer = AIOKafkaAdminClient(**options), AIOKafkaConsumer(**options)
    await admin.start()
    await consumer.start()
    found: Standing = {}
    try:
        for stage in sorted(stages):
            group = f"{own.name}-{stage}"
            offsets = {tp: entry.offset for tp, entry in (await admin.list_consumer_group_offsets(group)).items()}
            topics = {tp.topic for tp in offsets}
            if stage in INPUTS:
                topics.add(own.places.topic(INPUTS[stage]))
            for topic in sorted(topics):
                await consumer._client.add_topic(topic)
                tps = [TopicPartition(topic, number) for number in consumer.partitions_for_topic(topic) or ()]
                first, ends = await consumer.beginning_offsets(tps), await consumer.end_offsets(tps)
                for tp in tps:
                    if ends[tp] > first[tp] or tp in offsets:
                        found[group, topic, tp.partition] = (offsets.get(tp), ends[tp])
    finally:
        await consumer.stop()
        await admin.close()
    return found


def at_rest(own: Realm, seconds: float = PATIENCE_SECONDS) -> None:
    """Wait until nothing is in flight and every group has committed the ends of its logs; AssertionError otherwise.

    Where no worker runs, each that was started must have been ended by `Worker.stop`.
    """
    until = time.monotonic() + seconds
    workers = [worker for worker in own.workers if worker.alive]
    if not workers:
        ended = {worker.name: worker.exit_code for worker in own.workers if worker.starts and not worker.stopped}
        assert not ended, f"no worker runs, and nobody stopped these; their exit codes: {ended}"
        return
    while wrong := [problem for worker in workers for problem in restless(worker)]:
        assert time.monotonic() < until, f"not at rest after {seconds:.0f} s: {wrong}"
        time.sleep(0.2)
    wanted: dict[tuple[str, str, int], int] = {}
    while True:
        try:
            found = standing(own)
        except (KafkaError, OSError, TimeoutError) as exc:
            if time.monotonic() > until:
                raise AssertionError(f"the broker does not tell the offsets: {exc!r}") from exc
            continue
        for place, (_, end) in found.items():
            wanted.setdefault(place, end)
        behind = {}
        for place, (committed, end) in found.items():
            assert committed is None or committed <= end, f"{place}: committed {committed}, and the log ends at {end}"
            if (committed or 0) < wanted[place]:
                behind[place] = (committed, wanted[place])
        if not behind:
            return
        assert time.monotonic() < until, f"committed and end differ after {seconds:.0f} s: {behind}"
        time.sleep(0.2)


def watched(own: Realm) -> None:
    """Check that the oracle and the bookkeeping have watched, and what they have seen; AssertionError otherwise."""
    now = time.monotonic()
    seen = any(worker.ready_at is not None and now - worker.ready_at > _SEEN_SECONDS for worker in own.workers)
    for watch in (own.oracle, own.bookkeeping):
        name = type(watch).__name__
        assert watch.failure is None, f"{name} ended after {watch.samples} samples: {watch.failure!r}"
        assert not watch.violations, f"{name}: {watch.violations}"
        assert watch.samples or not seen, f"{name} has sampled nothing"


def overtaken(own: Realm) -> list[Origin]:
    """Return which device messages stand in `iot_validated_data` behind one that came after them."""
    return asyncio.run(_overtaken(own))


async def _overtaken(own: Realm) -> list[Origin]:
    validated = await origins(own.places, "iot_validated_data", _BEGINNING)
    return overtakers(await origins(own.places, "iot_raw_data", _BEGINNING), validated)
