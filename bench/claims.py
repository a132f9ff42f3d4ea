"""What was claimed for the class, measured: lines of code, Kafka's errors, lost and repeated messages.

``python -m bench.claims [--messages N] [--seed N] [--write]``: six services in two forms (``bench/services``) read the
same topic at the same time, each form and service in a group of its own, while the broker is killed and started again
(twice), stopped for 35 s (a pause longer than 30 s) and for 12 s (a black hole: it takes connections and says
nothing). 3 % of the calls into each service's sink fail with ConnectionError, in the same seeded order for both
forms, and one message in 500 is no JSON. ``--write`` puts the table into ``docs/claims.md``.
"""

from __future__ import annotations

import argparse
import ast
import asyncio
import importlib
import json
import logging
import random
import signal
import time
import tokenize
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiokafka
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from tools.stack import Part, Stack

SERVICES = ("store", "archive", "latest", "alerts", "totals", "audit")
FORMS = ("before", "after")
TOPIC = "orders"
ROOM = Path(__file__).parent / "services"
PAGE = Path(__file__).parent.parent / "docs" / "claims.md"
QUIET_SECONDS = 45.0
_LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING, tokenize.ENDMARKER}


@dataclass(slots=True)
class Sink:
    """Where one service writes; fails by its seed, counts what came and the Kafka failures it was told of."""

    rng: random.Random
    written: list[int] = field(default_factory=list)
    kafka_errors: int = 0

    def write_blocking(self, number: int) -> None:
        """Write one order; ConnectionError for 3 % of the calls."""
        if self.rng.random() < 0.03:
            raise ConnectionError("the sink is away for a moment")
        self.written.append(number)

    async def write(self, number: int) -> None:
        """Write one order."""
        self.write_blocking(number)

    def told(self, _exc: BaseException, message: Any) -> None:
        """Count a failure that is no message's."""
        self.kafka_errors += message is None


class Counting(logging.Handler):
    """Counts what a hand-written loop logs of Kafka's failures."""

    def __init__(self, sink: Sink) -> None:
        super().__init__()
        self.sink = sink

    def emit(self, record: logging.LogRecord) -> None:
        """Count one record."""
        self.sink.kafka_errors += str(record.msg).startswith("kafka:")


def logical_lines(path: Path) -> int:
    """Count the logical lines of a module (NEWLINE tokens), without docstrings, comments and blank lines."""
    with path.open("rb") as file:
        tokens = [token for token in tokenize.tokenize(file.readline) if token.type not in _LAYOUT]
    count = sum(token.type == tokenize.NEWLINE for token in tokens)
    return count - sum(
        ast.get_docstring(node) is not None
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
    )


async def produce(servers: str, messages: int, sent: set[int]) -> None:
    """Send ``messages`` orders over about 150 s of undisturbed time; one in 500 is no JSON."""
    producer = aiokafka.AIOKafkaProducer(bootstrap_servers=servers, enable_idempotence=True, request_timeout_ms=120_000)
    await producer.start()
    for n in range(messages):
        broken = n % 500 == 250
        value = b"{broken" if broken else json.dumps({"n": n, "amount": n % 100}).encode()
        await producer.send(TOPIC, value, key=f"customer-{n % 20}".encode())
        if not broken:
            sent.add(n)
        if n % 20 == 19:
            await asyncio.sleep(150 * 20 / messages)
    await producer.stop()


async def faults(part: Part, rng: random.Random) -> None:
    """Kill, stop, stop, kill: each at a moment of its own."""

    async def killed() -> None:
        await asyncio.to_thread(part.kill, signal.SIGKILL)
        await asyncio.sleep(rng.uniform(3, 6))
        await asyncio.to_thread(part.start)

    async def silent(seconds: float) -> None:
        await asyncio.to_thread(part.pause)
        await asyncio.sleep(seconds)
        await asyncio.to_thread(part.resume)

    for fault in (killed(), silent(35), silent(12), killed()):
        await asyncio.sleep(rng.uniform(10, 20))
        await fault


async def measure(part: Part, messages: int, seed: int) -> dict[tuple[str, str], dict[str, int]]:
    """Run all services through the plan; return the numbers of each form and service."""
    servers = part.address()
    admin = AIOKafkaAdminClient(bootstrap_servers=servers)
    await admin.start()
    await admin.create_topics([NewTopic(TOPIC, 4, 1), NewTopic(f"{TOPIC}-errors", 1, 1)])
    await admin.close()
    await asyncio.sleep(1)
    stop, sent = asyncio.Event(), set[int]()
    sinks: dict[tuple[str, str], Sink] = {}
    tasks = {}
    for form in FORMS:
        for service in SERVICES:
            sink = sinks[form, service] = Sink(random.Random(f"{seed} {service}"))
            module = importlib.import_module(f"bench.services.{form}.{service}")
            logger = logging.getLogger(f"bench.services.{form}.{service}")
            logger.addHandler(Counting(sink))
            logger.propagate = False
            tasks[form, service] = asyncio.create_task(module.run(sink, TOPIC, f"{form}-{service}", servers, stop))
    plan = asyncio.create_task(faults(part, random.Random(seed)))
    await produce(servers, messages, sent)
    await plan
    await _quiet(sinks, len(sent))
    ended = {who: task.done() for who, task in tasks.items()}
    stop.set()
    await asyncio.wait(tasks.values(), timeout=30)
    return {
        (form, service): {
            "lines": logical_lines(ROOM / form / f"{service}.py"),
            "errors": sink.kafka_errors,
            "lost": len(sent - set(sink.written)),
            "repeated": len(sink.written) - len(set(sink.written)),
            "ended": int(ended[form, service]),
        }
        for (form, service), sink in sinks.items()
    }


async def _quiet(sinks: dict[Any, Sink], expected: int) -> None:
    """Wait until every service has all, or nothing has come for a while."""
    before, since = -1, time.monotonic()
    while time.monotonic() - since < QUIET_SECONDS:
        if all(len(set(sink.written)) >= expected for sink in sinks.values()):
            return
        now = sum(len(sink.written) for sink in sinks.values())
        if now != before:
            before, since = now, time.monotonic()
        await asyncio.sleep(0.5)


def _less(before: int, after: int) -> str:
    return f"{(after - before) / before * 100:+.0f} %" if before else f"from {before} to {after}"


def table(found: dict[tuple[str, str], dict[str, int]]) -> str:
    """Return the table of both forms, with the sums and what they mean."""
    lines = [
        (
            "| service | lines, by hand | class | Kafka errors, by hand | class | lost, by hand | class "
            "| repeated, by hand | class |"
        ),
        "| --- " + "| ---: " * 8 + "|",
    ]
    sums = {(form, what): 0 for form in FORMS for what in ("lines", "errors", "lost", "repeated")}
    for service in SERVICES:
        cells = [service]
        for what in ("lines", "errors", "lost", "repeated"):
            for form in FORMS:
                number = found[form, service][what]
                sums[form, what] += number
                cells.append(f"{number:,}" + (" (ended)" if what == "lost" and found[form, service]["ended"] else ""))
        lines.append("| " + " | ".join(cells) + " |")
    total = [f"{sums[form, what]:,}" for what in ("lines", "errors", "lost", "repeated") for form in FORMS]
    lines.append("| **all six** | " + " | ".join(total) + " |")
    changes = {what: _less(sums["before", what], sums["after", what]) for what in ("lines", "errors", "lost")}
    lines += [
        "",
        "| claim | claimed | measured |",
        "| --- | ---: | ---: |",
        f"| lines of code | −85 to −90 % | {changes['lines']} |",
        f"| connection-related errors | −95 % | {changes['errors']} |",
        f"| lost messages | | {changes['lost']} |",
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure and print; with ``--write`` also into the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--messages", type=int, default=6000)
    parser.add_argument("--seed", type=int, default=20_251_107)
    parser.add_argument("--write", action="store_true", help="put the table into docs/claims.md")
    options = parser.parse_args()
    logging.basicConfig(level=logging.CRITICAL)
    stack = Stack.temporary({"kafka"})
    try:
        stack.start()
        found = asyncio.run(measure(stack.part("kafka"), options.messages, options.seed))
    finally:
        stack.stop(discard=True)
    text = table(found)
    print(text)
    if options.write:
        page = PAGE.read_text()
        head, _, rest = page.partition("<!-- table -->\n")
        tail = rest.partition("<!-- end of table -->")[2]
        PAGE.write_text(f"{head}<!-- table -->\n{text}\n<!-- end of table -->{tail}")


if __name__ == "__main__":
    main()
