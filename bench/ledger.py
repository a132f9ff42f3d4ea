"""A ledger over two topics: what Kafka has acknowledged to the writer, and what became of it."""

from __future__ import annotations

import asyncio
import json
import threading
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition

from bench.work import PARTITIONS

#: Device and number within the device.
Key = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Tally:
    """What became of acknowledged messages. acknowledged = delivered + dead_lettered + lost, each message once."""

    acknowledged: int
    delivered: int
    dead_lettered: int
    lost: int
    #: records beyond the first of each message, in the output and among the dead letters
    copies: int


def tally(acknowledged: Collection[Key], outputs: Iterable[Key], letters: Iterable[Key]) -> Tally:
    """Count: a message is delivered when it is among the outputs, else dead-lettered, else lost.

    Outputs that were never acknowledged (their acknowledgement was under way) count as nothing.
    """
    wanted = set(acknowledged)
    out, dead = Counter(outputs), Counter(letters)
    delivered = wanted & out.keys()
    dead_lettered = (wanted & dead.keys()) - delivered
    records = sum(out[key] for key in wanted) + sum(dead[key] for key in wanted)
    return Tally(
        acknowledged=len(wanted),
        delivered=len(delivered),
        dead_lettered=len(dead_lettered),
        lost=len(wanted) - len(delivered) - len(dead_lettered),
        copies=records - len(delivered) - len(dead_lettered),
    )


class Load(threading.Thread):
    """Writes ``count`` messages of ``devices`` devices in turn, numbered per device, at ``rate`` a second.

    acks=all and idempotent, with patience for a broker that is away; ``acknowledged`` has what Kafka has acknowledged.
    """

    def __init__(self, bootstrap: str, topic: str, *, count: int, rate: float, devices: int = 20) -> None:
        super().__init__(daemon=True)
        self.acknowledged: set[Key] = set()
        self.failure: BaseException | None = None
        self._servers = bootstrap
        self._topic = topic
        self._count = count
        self._rate = rate
        self._devices = devices

    def run(self) -> None:
        """Write all of it."""
        try:
            asyncio.run(self._write())
        except BaseException as exc:  # handed to finish()
            self.failure = exc

    def finish(self, seconds: float) -> None:
        """Wait for the last acknowledgement. Raises what ended the thread, and TimeoutError."""
        self.join(seconds)
        if self.failure is not None:
            raise self.failure
        if self.is_alive():
            raise TimeoutError(f"{self._topic} was not written within {seconds:.0f} s")

    async def _write(self) -> None:
        async with AIOKafkaProducer(
            bootstrap_servers=self._servers, acks="all", enable_idempotence=True, request_timeout_ms=120_000
        ) as producer:
            loop = asyncio.get_running_loop()
            begun = loop.time()
            under_way = []
            for number in range(self._count):
                seq, device = divmod(number, self._devices)
                key = (f"device-{device:02}", seq)
                value = json.dumps({"device": key[0], "seq": seq, "n": number}).encode()
                future = await producer.send(self._topic, value, key=key[0].encode())
                under_way.append(asyncio.ensure_future(self._note(key, future)))
                await asyncio.sleep(max(0.0, begun + number / self._rate - loop.time()))
            await asyncio.gather(*under_way)

    async def _note(self, key: Key, future: asyncio.Future[object]) -> None:
        await future
        self.acknowledged.add(key)


async def read_keys(bootstrap: str, topic: str) -> list[Key]:
    """Return device and number of every record of ``topic``, as they are now."""
    found: list[Key] = []
    async with AIOKafkaConsumer(bootstrap_servers=bootstrap, enable_auto_commit=False) as consumer:
        partitions = [TopicPartition(topic, number) for number in range(PARTITIONS)]
        consumer.assign(partitions)
        await consumer.seek_to_beginning(*partitions)
        ends = await consumer.end_offsets(partitions)
        while [tp for tp in partitions if await consumer.position(tp) < ends[tp]]:
            for records in (await consumer.getmany(timeout_ms=500)).values():
                for record in records:
                    message = json.loads(record.value)
                    found.append((message["device"], message["seq"]))
    return found
