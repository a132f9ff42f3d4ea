"""What each scenario protects, broken on purpose: the tests named beside a mutation must fail with it.

``python -m tests.faults.mutate`` applies them, one at a time, to a copy of this checkout and runs their tests, first
without any mutation. A test of the default suite checks that this list fits the code, and `docs/faults.md` shows it.
"""

from __future__ import annotations

from typing import NamedTuple


class Edit(NamedTuple):
    """``old`` stands once in ``file`` and becomes ``new``."""

    file: str
    old: str
    new: str


class Mutation(NamedTuple):
    """One fault of the code: which rows of the catalogue it concerns, in words, how it is made, what sees it."""

    name: str
    rows: tuple[int, ...]
    what: str
    edits: tuple[Edit, ...]
    tests: tuple[str, ...]

    @property
    def with_processes(self) -> bool:
        """Whether real processes are killed to see it."""
        return any(test.startswith("tests/faults/") for test in self.tests)


_FAILURES = "streams/resilience/failures.py"
_TRANSPORT = "streams/resilience/transport.py"
_SETTLING = "streams/resilience/settling.py"
_COMMITS = "streams/resilience/commits.py"
_EVALUATE = "devices/alarms/evaluate.py"
_KILLS = "tests/faults/test_kills.py::"
_SINKS = "tests/faults/test_sinks.py::"
_EDGES = "tests/faults/test_edges.py::"
_MESSAGES = "tests/faults/test_messages.py::"


def _classed(*kinds: str, as_: str = "POISON") -> tuple[Edit, ...]:
    """Return the edits of the failure table that give ``kinds`` another class."""
    return tuple(
        Edit(_FAILURES, f"{kind}, FailureClass.RETRY)", f"{kind}, FailureClass.{as_})")
        if kind.startswith("(")
        else Edit(_FAILURES, f'"{kind}": FailureClass.RETRY', f'"{kind}": FailureClass.{as_}')
        for kind in kinds
    )


#: What is done counts as soon as it is read: the promise as a whole.
_READ_IS_DONE = (
    Edit(
        _COMMITS,
        "if self.mark is None or (self.committed is not None and self.mark <= self.committed):\n"
        "            return None\n        return self.mark",
        "if self.read_to is None or self.read_to == self.committed:\n            return None\n        return self.read_to",
    ),
)
_PUBACK_AT_ONCE = (
    Edit(
        "agents/mqtt.py",
        "    if not futures:\n        batch.acknowledge()",
        "    if True:\n        batch.acknowledge()",
    ),
)

MUTATIONS = (
    Mutation(
        "raised-is-done",
        (1,),
        "an event whose body raised is acknowledged, as Faust does",
        (
            Edit(
                _SETTLING,
                "        if live:\n            self._settle_failure(live, exc)",
                "        for event in live:\n            event.ack()",
            ),
        ),
        ("tests/resilience/test_streams_unit.py",),
    ),
    Mutation(
        "past-the-head",
        (2,),
        "the mark passes a head that is in flight, as Faust's does",
        (Edit(_COMMITS, "        while spans and spans[0].complete:", "        while spans:"),),
        ("tests/resilience/test_commits.py", "tests/resilience/test_streams_batches.py"),
    ),
    Mutation(
        "read-is-done",
        (2,),
        "what was read is committed, whether it is done or not",
        _READ_IS_DONE,
        (_KILLS + "test_a_worker_killed_again_and_again",),
    ),
    Mutation(
        "declared-once",
        (3,),
        "topics are declared at the start alone",
        (Edit("streams/core.py", "missing = await self.missing_topics()", "missing: list[str] = []"),),
        (_EDGES + "test_a_broker_that_comes_back_empty",),
    ),
    Mutation(
        "refused-batch-has-numbers",
        (3, 11),
        "the sequence numbers of a batch that the broker has refused count as used",
        (
            Edit(
                "streams/resilience/sequence.py",
                "numbers[partition] = (numbers[partition] - batch.record_count) % _SEQUENCES",
                "numbers[partition] = numbers[partition] % _SEQUENCES",
            ),
        ),
        ("tests/resilience/test_kafka_stage.py",),
    ),
    Mutation(
        "kafka-failed-is-sent",
        (3, 18),
        "what Kafka failed to take counts as sent",
        (
            Edit(
                _SETTLING,
                '"""Have the event delivered again."""\n        self.stream.delivery_failed(self.event, exc)',
                '"""Have the event delivered again."""\n        self.event.message.decref()',
            ),
        ),
        ("tests/resilience/test_chunks.py",),
    ),
    Mutation(
        "away-counts",
        (4,),
        "the time without a broker counts as time without progress",
        (Edit("streams/resilience/judgement.py", '    if "away" not in changed:', "    if True:"),),
        ("tests/resilience/consumers/test_judgement.py",),
    ),
    Mutation(
        "timeouts-are-poison",
        (4, 13),
        "a statement that runs out of time is the message's fault",
        _classed("(asyncio.TimeoutError", "(TimeoutError"),
        (_SINKS + "test_the_database_frozen_for_longer_than_a_session",),
    ),
    Mutation(
        "absent-at-start",
        (5,),
        "a broker that is absent at the start is not waited for",
        (
            Edit(
                "streams/provision.py",
                "except (KafkaError, OSError, TimeoutError) as exc:\n            delay = backoff.next()",
                "except LookupError as exc:\n            delay = backoff.next()",
            ),
        ),
        (_EDGES + "test_every_service_absent_at_the_start",),
    ),
    Mutation(
        "moved-brokers-are-lost",
        (5,),
        "brokers that come back at other addresses are not asked for",
        (
            Edit(
                "streams/resilience/clients.py",
                "        elif now - self._lost_at >= MOVED_SECONDS:",
                "        elif False:",
            ),
        ),
        ("tests/resilience/test_kafka_moved.py",),
    ),
    Mutation(
        "no-drain",
        (7,),
        "a revocation waits for nothing",
        (Edit(_TRANSPORT, "        while self.busy and time.monotonic() < until:", "        while False:"),),
        ("tests/resilience/test_streams_revocation.py",),
    ),
    Mutation(
        "reset-in-silence",
        (3, 8),
        "where a log does not have what is to be read next, it is read from its beginning, and nobody is told",
        (
            Edit(
                "streams/resilience/positions.py",
                "            elif first <= offset <= end:\n                await self.seek(tp, offset)",
                "            elif first <= end:\n                await self.seek(tp, first)",
            ),
        ),
        ("tests/resilience/test_kafka_positions.py",),
    ),
    Mutation(
        "failed-commit-is-done",
        (8,),
        "a commit that failed counts as made",
        (
            Edit(
                _TRANSPORT,
                "            if not offsets or not await self._thread.commit_offsets(offsets):\n                return False",
                "            if not offsets:\n                return False\n            await self._thread.commit_offsets(offsets)",
            ),
        ),
        ("tests/resilience/test_streams_revocation.py",),
    ),
    Mutation(
        "commits-what-is-not-ours",
        (6, 8),
        "partitions that are not assigned are committed",
        (
            Edit(
                _TRANSPORT,
                "            offsets = {tp: offset for tp, offset in offsets.items() if tp in held}\n            if not offsets or",
                "            offsets = {tp: offset for tp, offset in offsets.items() if held is not None}\n            if not offsets or",
            ),
        ),
        ("tests/resilience/test_streams_revocation.py",),
    ),
    Mutation(
        "letter-without-key",
        (9,),
        "a dead letter loses its key",
        (
            Edit(
                _SETTLING,
                "return (options.dead_letter_topic, record.key, record.value, headers)",
                "return (options.dead_letter_topic, None, record.value, headers)",
            ),
        ),
        (_MESSAGES + "test_records_that_are_no_messages",),
    ),
    Mutation(
        "guard-never-trips",
        (10,),
        "the dead-letter guard never trips",
        (
            Edit(
                "streams/resilience/guard.py",
                "            self._dead > self.share * self._total\n            and len(self._dead_keys) >= self.devices",
                "            False\n            and len(self._dead_keys) >= self.devices",
            ),
        ),
        ("tests/resilience/test_guard.py", "tests/faults/test_guard.py::test_a_storm_of_poison_stops_the_stage"),
    ),
    Mutation(
        "any-good-message-frees",
        (10,),
        "whatever is handled while the guard holds a stage lets it go on",
        (Edit("streams/resilience/guard.py", "if self.held.isdisjoint(messages):", "if not list(messages):"),),
        ("tests/resilience/test_guard.py", "tests/faults/test_guard.py::test_a_storm_of_poison_stops_the_stage"),
    ),
    Mutation(
        "refused-letter-is-skipped",
        (11,),
        "a dead letter that its topic refuses is skipped",
        (
            Edit(
                "streams/resilience/application.py",
                "                    self.fatal(exc)\n                await self._again(exc, backoff)\n            else:\n                return\n\n    async def _again",
                "                    self.fatal(exc)\n                await self._again(exc, backoff)\n                return\n            else:\n                return\n\n    async def _again",
            ),
        ),
        ("tests/resilience/test_streams_unit.py", "tests/faults/test_letters.py"),
    ),
    Mutation(
        "no-bounds",
        (12,),
        "a slow sink bounds neither bytes nor chunks under way",
        (
            Edit(_COMMITS, "if ledger is None or ledger.in_flight_bytes < share:", "if ledger is None or share:"),
            Edit(_TRANSPORT, "or self.ledgers.spans_of(tp) < limit", "or limit"),
        ),
        (_SINKS + "test_a_slow_database",),
    ),
    Mutation(
        "away-is-poison",
        (13, 31),
        "what a database that is away raises is the message's fault",
        _classed("(ConnectionError", "(OSError", "asyncpg.exceptions._base.InterfaceError"),
        (
            _KILLS + "test_the_database_away",
            _SINKS + "test_connections_to_the_database_reset_in_the_midst",
            "tests/faults/test_random_plan.py",
        ),
    ),
    Mutation(
        "one-row-condemns-all",
        (13,),
        "a row that the database refuses takes its neighbours with it",
        (
            Edit(
                "agents/stores/database.py",
                "            if len(items) == 1:\n                return [BadRow.because(items[0], refused.reason)]",
                "            if items:\n                return [BadRow.because(item, refused.reason) for item in items]",
            ),
        ),
        (_MESSAGES + "test_a_row_that_the_database_refuses",),
    ),
    Mutation(
        "read-only-cache-is-poison",
        (14,),
        "a cache that takes no writes is the message's fault",
        _classed("redis.exceptions.ReadOnlyError", "redis.exceptions.OutOfMemoryError"),
        (_SINKS + "test_a_cache_that_takes_no_writes",),
    ),
    Mutation(
        "4xx-is-final",
        (15,),
        "whatever a mail server answers is final",
        (Edit("agents/mail/send.py", "Fate.REFUSED if 500 <= exc.code < 600 else Fate.LATER", "Fate.REFUSED"),),
        ("tests/agents/mail/test_send.py",),
    ),
    Mutation(
        "clean-session",
        (16,),
        "the connector begins with a clean session, so that the broker forgets what was not acknowledged",
        (Edit("agents/edges/mqtt_connection.py", "clean_start=not persistent if mqtt5", "clean_start=True if mqtt5"),),
        ("tests/agents/edges/test_mqtt_delivery.py",),
    ),
    Mutation(
        "puback-at-once",
        (17, 18),
        "the connector acknowledges as soon as a batch was handed to the producer",
        _PUBACK_AT_ONCE,
        (
            _EDGES + "test_the_connector_killed_between_receipt_and_acknowledgement",
            _EDGES + "test_kafka_down_while_mqtt_is_up",
        ),
    ),
    Mutation(
        "puback-in-any-order",
        (19,),
        "PUBACKs go out in the order of Kafka's answers",
        (
            Edit(
                "agents/edges/mqtt_wire.py",
                "        while self._queue and self._queue[0].done:\n            due.extend(self._queue.popleft().acks)\n        return due",
                "        self._queue.remove(entry)\n        due.extend(entry.acks)\n        return due",
            ),
        ),
        ("tests/agents/edges/test_mqtt_wire.py",),
    ),
    Mutation(
        "retransmission-is-new",
        (20,),
        "a retransmitted CoAP request is a new one",
        (Edit("agents/edges/coap_exchanges.py", "found = self._known.get((peer.where, wire_id))", "found = None"),),
        ("tests/agents/edges/test_coap_exchanges.py",),
    ),
    Mutation(
        "rows-are-not-unique",
        (21,),
        "a row that is there already is not left as it is",
        (
            Edit(
                "agents/stores/postgresql.py",
                "ORDER BY device_id, index, label, time, ctid\nON CONFLICT DO NOTHING",
                "ORDER BY device_id, index, label, time, ctid",
            ),
            Edit(
                "agents/stores/postgresql.py",
                "ORDER BY 1, 2, 3, 4, number\nON CONFLICT DO NOTHING",
                "ORDER BY 1, 2, 3, 4, number",
            ),
        ),
        (_MESSAGES + "test_duplicates_and_late_data",),
    ),
    Mutation(
        "duration-by-the-host",
        (22,),
        "an alarm's duration goes by the host's clock",
        (
            Edit(_EVALUATE, "            new.since = sample_time\n", "            new.since = now\n"),
            Edit(
                _EVALUATE,
                "        if sample_time - new.since < rule.duration:",
                "        if now - new.since < rule.duration:",
            ),
        ),
        ("devices/alarms/test_evaluate.py", "tests/faults/test_clock.py"),
    ),
    Mutation(
        "older-replaces-newer",
        (23,),
        "an older sample replaces a newer one in the cache",
        (Edit("agents/stores/valkey.py", "elseif old and stamp(old) > stamp(json) then", "elseif false then"),),
        (_MESSAGES + "test_duplicates_and_late_data",),
    ),
    Mutation(
        "opens-while-open",
        (24,),
        "an alarm opens while it is open",
        (
            Edit(
                _EVALUATE,
                "    if new.life:\n        if rule.count:\n            _count(rule, new, sample_time, hit=raised and listens)",
                "    if new.life and not raised:\n        if rule.count:\n            _count(rule, new, sample_time, hit=raised and listens)",
            ),
        ),
        ("devices/alarms/test_evaluate.py", "devices/alarms/test_engine.py"),
    ),
    Mutation(
        "full-disk-is-poison",
        (25,),
        "what RocksDB says of a full disk is the message's fault",
        (Edit(_FAILURES, "            found = FailureClass.FATAL", "            found = FailureClass.POISON"),),
        ("tests/faults/test_machine.py::test_the_disk_is_full",),
    ),
    Mutation(
        "no-descriptor-is-poison",
        (26,),
        "a lack of descriptors is the message's fault",
        _classed("(OSError"),
        ("tests/faults/test_machine.py::test_descriptors_run_out",),
    ),
    Mutation(
        "slow-driver-stays",
        (27,),
        "a driver that keeps being slow is not set aside",
        (Edit("devices/timing.py", "        aside = streak >= STRIKES or within", "        aside = False"),),
        ("tests/faults/test_drivers.py",),
    ),
    Mutation(
        "nobody-is-condemned",
        (27,),
        "a record that has ended the worker twice is handled again",
        (
            Edit(
                "streams/resilience/watchdog.py",
                "for name, count in self.counts.items() if count >= ENDED_TWICE",
                "for name, count in self.counts.items() if count < 0",
            ),
        ),
        ("tests/faults/test_stuck.py",),
    ),
    Mutation(
        "unsafe-is-repeated",
        (28,),
        "a command that is not safe to repeat is sent again",
        (
            Edit(
                "devices/commands/machine.py", "not command.on_way and command.repeatable and", "not command.on_way and"
            ),
        ),
        ("devices/commands/test_machine.py",),
    ),
    Mutation(
        "sends-twice-after-a-crash",
        (28,),
        "a request id that was seen is taken for a new command",
        (
            Edit(
                "devices/commands/machine.py",
                "    return request_id in {*(c.request_id for c in life.open), *(e.request_id for e in life.ended)}",
                "    return request_id is None",
            ),
        ),
        ("devices/commands/test_machine.py",),
    ),
    Mutation(
        "watchdog-does-not-end",
        (29,),
        "a blocked event loop is told of, and the worker goes on",
        (
            Edit(
                "streams/resilience/watchdog.py",
                "        self._end(EXIT_CODE)\n        return True",
                "        return True",
            ),
        ),
        ("tests/resilience/test_watchdog.py",),
    ),
    Mutation(
        "second-signal-unheard",
        (30,),
        "a second signal is not heard",
        (
            Edit(
                "streams/resilience/ending.py",
                "        if self._first is not None:",
                "        if self._first is None and False:",
            ),
        ),
        ("tests/resilience/test_ending.py",),
    ),
    Mutation(
        "the-end-is-a-revocation",
        (30,),
        "the end waits as long as a revocation does",
        (
            Edit(
                "streams/resilience/application.py",
                "options.shutdown_seconds if self.should_stop else options.drain_seconds",
                "options.drain_seconds",
            ),
        ),
        ("tests/faults/test_ends.py::test_a_sink_that_hangs_at_the_end",),
    ),
)
