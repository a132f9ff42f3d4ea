"""The race: the normalizer's work on Apache Kafka, five ways, side by side in one run.

Every competitor gets the same input topic (Fluxor frames of 200 devices over 4 partitions), the same pure function and
an output topic of its own; sends with acks=all and the compression that costs it least; and commits what is done.
Rounds are interleaved, so that a machine that is busy is so for all. Rate and CPU are those of the stretch from the
first output that was seen to the last; start-up is not in them. Each run is checked: as many outputs as are due, the
first of them equal to what the function gives, and the group's committed offsets at the end of the input.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from bench import report
from bench.child import BenchError, Child, Sample, ensure_rivals, follow, peak_mib, rival_versions
from bench.kafka import Broker, digest_of, partition_of
from bench.work import PARTITIONS, READINGS_PER_MESSAGE, balanced_devices, make_expand, raw_messages
from tools.stack import Stack
from tools.worker import Worker

RIVALS = {
    "plain_faust": "Faust, its own transport",
    "aiokafka_loop": "aiokafka, handwritten",
    "quix": "Quix Streams",
    "librdkafka": "librdkafka in batches",
}
HEADRACE = "headrace"
NAMES = {**RIVALS, HEADRACE: "Headrace"}
PREFIX = "race_"
SOURCE = f"{PREFIX}iot_raw_data"
#: librdkafka packs lz4 at its fastest level, aiokafka at its slowest (level 9: five times the CPU of its zstd).
COMPRESSION = {"quix": "lz4", "librdkafka": "lz4"}
#: What is compared of each partition, in input messages.
CHECKED_MESSAGES = 250


class Result(NamedTuple):
    """One run: messages a second, CPU seconds per 100,000 messages, highest resident memory."""

    rate: float
    cpu: float
    peak_mib: float


class Course:
    """The input, the broker and the environments that all competitors run on."""

    def __init__(self, stack: Stack, folder: Path, messages: int, slow_messages: int, compression: str = "") -> None:
        self.stack = stack
        self.compression = compression
        self.folder = folder
        self.rivals = ensure_rivals()
        self.broker = Broker(stack.env["KAFKA_BOOTSTRAP_SERVERS"])
        self.expand = make_expand()
        devices = balanced_devices(partition_of)
        self.inputs = {SOURCE: messages, f"{SOURCE}_short": slow_messages}
        self.broker.create(*self.inputs)
        for topic, count in self.inputs.items():
            self.broker.fill(topic, raw_messages(count, devices))
        first = [value for _, value in raw_messages(CHECKED_MESSAGES * PARTITIONS, devices)]
        self.expected = digest_of(first, self.expand)

    def run(self, name: str, number: int) -> Result:
        """Let one competitor do the whole input."""
        source = f"{SOURCE}_short" if name == "plain_faust" else SOURCE
        count = self.inputs[source]
        group = f"{name}-{number}"
        target = f"{PREFIX}iot_validated_data" if name == HEADRACE else f"{PREFIX}{name}"
        if number == 0:
            self.broker.create(target)
        starts = self.broker.ends(target)
        with self._competitor(name, group, source, target) as pid:
            samples = follow(
                pid,
                lambda: sum(self.broker.ends(target)) - sum(starts),
                count * READINGS_PER_MESSAGE,
                patience_seconds=60,
            )
            ends = self.broker.ends(source)
            consumer_group = f"{group}-normalizer" if name == HEADRACE else group
            self._await_commit(consumer_group, source, ends)
            peak = peak_mib(pid())
        self._check(name, target, starts, count)
        return measure(samples, peak)

    def compression_of(self, name: str) -> str:
        """Return the codec that a competitor sends with."""
        return self.compression or COMPRESSION.get(name, "zstd")

    @contextmanager
    def _competitor(self, name: str, group: str, source: str, target: str) -> Iterator[Callable[[], int]]:
        log = self.folder / f"{group}.log"
        bootstrap = self.broker.bootstrap
        if name != HEADRACE:
            command = (
                self.rivals,
                "-m",
                f"bench.rivals.{name}",
                bootstrap,
                source,
                target,
                group,
                self.compression_of(name),
            )
            with Child(command, log) as child:
                yield lambda: child.pid
            return
        env = {
            **self.stack.env,
            "STAGES": "normalizer",
            "APP_ID": group,
            "TOPIC_PREFIX": PREFIX,
            "KAFKA_COMPRESSION": self.compression_of(name),
        }
        worker = Worker({**env, "DATA_DIR": str(self.folder / group)}, log=log)
        try:
            worker.spawn()
            yield lambda: alive(worker)
        finally:
            worker.stop()

    def _await_commit(self, group: str, source: str, ends: list[int]) -> None:
        until = time.monotonic() + 30
        while (found := self.broker.committed(group, source)) != ends:
            if time.monotonic() > until:
                raise BenchError(f"group {group} has committed {found} of {ends} after 30 s")
            time.sleep(0.2)

    def _check(self, name: str, target: str, starts: list[int], count: int) -> None:
        time.sleep(0.5)
        written = sum(self.broker.ends(target)) - sum(starts)
        if written != count * READINGS_PER_MESSAGE:
            raise BenchError(f"{name} wrote {written} readings for {count} messages")
        # All keep the order of a partition, so the first messages of the input are the first of the output.
        found = self.broker.digest(target, starts, CHECKED_MESSAGES * READINGS_PER_MESSAGE)
        if found != self.expected:
            raise BenchError(f"{name} wrote other readings: {found}, expected {self.expected}")


def alive(worker: Worker) -> int:
    """Return the process of ``worker``. Raises BenchError when it has ended."""
    if worker.pid is None:
        raise BenchError(f"the worker ended by itself\n{worker.tail()}")
    return worker.pid


def measure(samples: list[Sample], peak: float) -> Result:
    """Return rate and CPU between the first sample with outputs and the last."""
    first = next(sample for sample in samples if sample.done)
    last = samples[-1]
    messages = (last.done - first.done) / READINGS_PER_MESSAGE
    seconds = last.at - first.at
    if seconds <= 0 or messages <= 0:
        raise BenchError("all outputs came between two looks: take more messages")
    return Result(messages / seconds, (last.cpu - first.cpu) / messages * 1e5, peak)


def line(name: str, result: Result) -> str:
    """Return one run as a line for the terminal."""
    rate, cpu, peak = result
    return f"{NAMES[name]:<26} {rate:>9,.0f} messages/s {cpu:>7.2f} CPU s per 100k {peak:>5.0f} MiB"


def median(results: list[Result]) -> Result:
    """Return the median of each figure."""
    return Result(*(statistics.median(values) for values in zip(*results, strict=True)))


def show(results: dict[str, list[Result]]) -> str:
    """Return the table, ratios against Quix Streams."""
    medians = {name: median(found) for name, found in results.items()}
    base = medians.get("quix")
    rows = []
    for name, found in medians.items():
        ratios = [f"{found.rate / base.rate:.2f} ×", f"{found.cpu / base.cpu:.2f} ×"] if base else ["", ""]
        rows.append([NAMES[name], f"{found.rate:,.0f}", f"{found.cpu:.1f}", f"{found.peak_mib:.0f}", *ratios])
    header = ("", "messages/s", "CPU s per 100k", "peak MiB", "rate to Quix", "CPU to Quix")
    return report.table(header, rows)


def run(options: argparse.Namespace) -> None:
    """Race, print, write."""
    messages, slow, rounds = (40_000, 2_000, 1) if options.quick else (options.messages, options.slow, options.rounds)
    names = [name for name in NAMES if not options.only or name in options.only]
    results: dict[str, list[Result]] = {name: [] for name in names}
    facts = report.machine()
    with tempfile.TemporaryDirectory(prefix="headrace-bench-") as folder:
        stack = Stack.temporary(("kafka",), report=print)
        try:
            stack.start()
            course = Course(stack, Path(folder), messages, slow, options.compression)
            print(f"{messages:,} messages ({slow:,} for plain Faust), {rounds} round(s)", flush=True)
            # The first of all runs finds a cold broker; it is not counted.
            course.run("aiokafka_loop", 0)
            for number in range(rounds):
                for name in names:
                    result = course.run(name, number + (name == "aiokafka_loop"))
                    results[name].append(result)
                    print(f"round {number + 1}: {line(name, result)}", flush=True)
            course.broker.close()
        finally:
            stack.stop(discard=True)
    body = (
        f"A Fluxor frame in, {READINGS_PER_MESSAGE} readings out, acks=all, commit, "
        f"{options.compression or 'the compression that costs each least'}; {messages:,} messages ({slow:,} for plain "
        f"Faust) in 4 partitions, median of {rounds} interleaved round(s).\n\n{show(results)}"
    )
    data: dict[str, Any] = {
        "messages": messages,
        "compression": {name: course.compression_of(name) for name in names},
        "messages_plain_faust": slow,
        "rounds": {name: [result._asdict() for result in found] for name, found in results.items()},
        "median": {name: median(found)._asdict() for name, found in results.items()},
        "versions": rival_versions(course.rivals, "quixstreams", "confluent-kafka"),
    }
    report.publish("race-quick" if options.quick else "race", "The normalizer's work, five ways", body, data, facts)


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this measurement."""
    parser.add_argument("--messages", type=int, default=200_000, help="messages a run (default %(default)s)")
    parser.add_argument("--slow", type=int, default=8_000, help="messages for plain Faust (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds (default %(default)s)")
    parser.add_argument("--compression", default="", help="the same for all (default: what costs each least)")
    parser.add_argument("--only", nargs="*", choices=list(NAMES), help="only these competitors")
