"""The dead-letter desk as its users meet it: list, show, replay, discard, trace, tap and accounts, on real servers."""

from __future__ import annotations

import asyncio
import json
import random
import re
import subprocess
import sys
import urllib.request
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiokafka
import asyncpg
import pytest

from settings import declarations, environment
from streams.messages import Alert, AlertAction, encode
from tests.faults.support import wait_for
from tests.faults.topics import raw_message, read, write
from tests.faults.worker import Realm, Worker, realm
from tests.test_commands_e2e import config, house
from tools.stack import Stack, ports

pytestmark = [pytest.mark.stack]
ROOT = Path(__file__).parents[1]


def start(own: Realm, *arguments: str, **settings: str) -> subprocess.Popen[str]:
    """Start a command with the realm's settings and others."""
    known = {declared.variable for declared in declarations()}
    base = {name: value for name, value in environment().items() if name not in known}
    return subprocess.Popen(
        [sys.executable, "-m", "faust", "-A", "streams", *arguments],
        cwd=ROOT,
        env={**base, **own.env, **settings},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(running: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Wait for a command; returns exit code, output and errors."""
    try:
        out, err = running.communicate(timeout=60)
    finally:
        running.kill()
    return running.returncode, out, err


def faust(own: Realm, *arguments: str) -> tuple[int, str, str]:
    """Run a command; returns exit code, output and errors."""
    return ended(start(own, *arguments))


def listed(own: Realm, *each: tuple[str, ...]) -> list[list[dict[str, Any]]]:
    """Return what `dlq list` shows with each of several filters."""
    found = [ended(running) for running in [start(own, "dlq", "list", "--json", *filters) for filters in each]]
    assert [code for code, _, _ in found] == [0] * len(each), found
    return [[json.loads(line) for line in out.splitlines()] for _, out, _ in found]


def execute(own: Realm, statement: str) -> list[Any]:
    """Run a statement in the realm's database."""

    async def run() -> list[Any]:
        connection = await asyncpg.connect(own.env["DATABASE_URL"])
        try:
            return list(await connection.fetch(statement))
        finally:
            await connection.close()

    return asyncio.run(run())


def refuse_at_the_edge(own: Realm) -> None:
    """Write the dead letter of a message that was too large for any topic."""

    async def send() -> None:
        async with aiokafka.AIOKafkaProducer(bootstrap_servers=own.env["KAFKA_BOOTSTRAP_SERVERS"]) as producer:
            headers = [("dlq-stage", b"mqtt"), ("dlq-class", b"rejected"), ("dlq-topic", b"devices/edge/telemetry")]
            await producer.send_and_wait(own.places.topic("iot_errors"), b"x", key=b"edge", headers=headers)

    asyncio.run(send())


def alert(request_id: str) -> Alert:
    """Return the opening of an alarm by a reading of ``request_id``."""
    now = datetime.now(UTC)
    return Alert(
        id="alert-1",
        alarm_id="hot",
        name="hot",
        message="dev: t is at 1, above 0",
        level="WARNING",
        alarm_type="Measure",
        device_id="dev",
        sensor_name="dev",
        field_name="t",
        error_value="1",
        threshold="0",
        math_operator=">",
        start_date=now,
        end_date=None,
        is_resolved=False,
        recipients="",
        request_id=request_id,
        timestamp=now,
        metadata={"transition": "opened", "transition_id": "alert-1-opened", "notify": False},
    )


def places(told: str) -> set[str]:
    """Return where a trace has found something."""
    return {re.sub(r"^\S+ \S+Z  ", "", line).partition("[")[0].partition(":")[0] for line in told.splitlines()}


def filled(own: Realm) -> Worker:
    """Start a worker, have it make two letters of the ingestor's and one of the normalizer's, and one row."""
    worker = own.worker().start()
    execute(own, "ALTER TABLE readings ADD CONSTRAINT not_refused CHECK (label <> 'refused')")
    payloads = [
        '{"ts": 1700000000, "t": 1}',
        '{"ts": 1700000001, "refused": 1}',
        '{"ts": 1700000002, "refused": 2}',
        "{",
    ]
    write(
        own,
        "iot_raw_data",
        [(b"dev", raw_message("dev", number, payload)) for number, payload in enumerate(payloads)],
        0,
    )
    wait_for("the letters", lambda: worker.metric("headrace_dead_letters_total") == 3)
    worker.wait(lambda: worker.metric("headrace_in_flight") == 0, "idle")
    return worker


def test_the_desk(stack: Stack, tmp_path: Path) -> None:
    """Letters are found by what they are, go back once to where they came from, oldest first, and are accounted for."""
    with realm(stack, tmp_path, STAGES="normalizer,ingestor", TOPIC_PARTITIONS="1") as own:
        worker = filled(own)
        refused, unread, early = listed(
            own,
            ("--stage", "ingestor", "--since", "1h", "--until", "0s"),
            ("--class", "poison", "--stage", "normalizer", "--device", "dev"),
            ("--until", "1h"),
        )
        assert (len(refused), len(unread), early) == (2, 1, [])
        code, out, _ = faust(own, "dlq", "list", "--device", "dev")
        assert (code, len(out.splitlines())) == (0, 4)
        assert out.splitlines()[-1].startswith("3 shown, ")
        with urllib.request.urlopen(f"{worker.url}/api/v1/dead-letters?stage=ingestor", timeout=10) as answer:  # noqa: S310
            shown = json.load(answer)["dead_letters"]
        assert [letter["id"] for letter in shown] == [letter["id"] for letter in refused]
        newest, oldest = (letter["id"] for letter in refused)
        dry_run = start(own, "dlq", "replay", "--stage", "ingestor", "--limit", "1", "--dry-run")
        code, out, _ = faust(own, "dlq", "show", oldest)
        assert code == 0 and "not_refused" in out

        code, out, _ = ended(dry_run)
        assert (code, out.splitlines()[-1]) == (0, "1 would be replayed, 0 refused")
        assert oldest in out and newest not in out
        assert len(read(own, "iot_validated_data")) == 3
        execute(own, "ALTER TABLE readings DROP CONSTRAINT not_refused")
        code, out, _ = faust(own, "dlq", "replay", "--until", "0s", "--stage", "ingestor")
        assert (code, out.splitlines()[-1]) == (0, "2 replayed, 0 refused")
        wait_for("the rows", lambda: len(execute(own, "SELECT * FROM readings WHERE label = 'refused'")) == 2)
        assert [json.loads(record.value)["values"] for record in read(own, "iot_validated_data")[-2:]] == [[1], [2]]

        code, out, err = faust(own, "dlq", "replay", oldest, "9:999")
        assert (code, out.splitlines()[-1]) == (1, "0 replayed, 2 refused")
        assert "replayed at" in err and "9:999: there is no such dead letter" in err
        refuse_at_the_edge(own)
        commands = [start(own, "dlq", "replay", "--device", "edge", *dry) for dry in (("--dry-run",), ())]
        foreseen, real = (ended(running) for running in commands)
        assert (foreseen[0], foreseen[1].splitlines()[-1]) == (1, "0 would be replayed, 1 refused")
        assert (real[0], real[1].splitlines()[-1]) == (1, "0 replayed, 1 refused")
        assert foreseen[2] == real[2] and "the device must send it again" in real[2]
        code, out, _ = faust(own, "dlq", "discard", unread[0]["id"], "--reason", "a broken device")
        assert (code, out.splitlines()[-1]) == (0, "1 discarded, 0 refused")
        assert len(read(own, "iot_validated_data")) == 5

        worker.wait(lambda: worker.metric("headrace_in_flight") == 0, "idle")
        code, out, err = faust(own, "accounts", "--url", worker.url)
        assert code == 0, err
        counts = {}
        for line in out.splitlines():
            counts[line.split()[0]] = [int(count) for count in re.findall(r"(?:received|=|\+) \D*?(\d+)", line)]
        # received, forwarded, dead-lettered, dropped, returned, in flight
        assert counts == {"normalizer": [4, 3, 1, 0, 0, 0], "ingestor": [5, 3, 2, 0, 0, 0]}

        write(own, "iot_alerts", [(b"dev", encode(alert("r-dev-1")))])
        done = AlertAction(alert_id="alert-1", device_id="dev", action="ack", user="anna", timestamp=datetime.now(UTC))
        write(own, "iot_alert_actions", [(b"dev", encode(done))])
        nowhere = f"postgresql://127.0.0.1:{ports.choose(set(), random.SystemRandom())}/none"
        traces = [
            start(own, "trace", "r-dev-1"),
            start(own, "trace", "r-dev-0", DATABASE_URL=nowhere),
            start(own, "trace", "r-dev-no", DATABASE_URL=nowhere),
        ]
        whole, silent, unknown = [ended(running) for running in traces]
        stored = {"iot_raw_data", "iot_validated_data", "readings"}
        of_letters, of_alerts = {"iot_errors", "dlq-desk"}, {"iot_alerts", "iot_alert_actions"}
        assert (whole[0], places(whole[1])) == (0, stored | of_letters | of_alerts), whole
        assert (silent[0], places(silent[1])) == (1, stored - {"readings"}), silent
        assert "the database cannot be asked" in silent[2]
        assert unknown[:2] == (1, ""), unknown
        assert "nothing is known of r-dev-no" in unknown[2]


def test_a_command_is_traced_to_its_device_and_tap_knows_protocols(stack: Stack, tmp_path: Path) -> None:
    """A trace names what went down to the device and what came back; a connector's tap shows its protocol alone."""
    with house(stack, tmp_path) as (own, _, http, gateway):
        device = 2_262_001
        gateway.climate(device)
        assert http("POST", "/commands", config(device, request_id="wanted"))[0] == 202
        http.until("wanted", "SUCCESSFUL")
        code, out, err = faust(own, "trace", "wanted")
        assert code == 0, err
        down, back = {"device_commands", "downlinks"}, {"command-reports", "command-feedback", "iot_command_status"}
        assert places(out) >= down | back, out

        mqtt = raw_message("dev", 0, '{"ts": 1700000000, "t": 1}')
        coap = mqtt.replace(b'"mqtt"', b'"coap"')
        taps = {stage: start(own, "tap", "--stage", stage, "--limit", "2") for stage in ("mqtt", "coap")}
        try:
            # they show what comes from now on, and nobody says when that is
            values = [(b"dev", value) for value in (mqtt, b"{", coap)]
            running = list(taps.values())
            wait_for(
                "both taps",
                lambda: write(own, "iot_raw_data", values) and all(one.poll() is not None for one in running),
            )
            for stage, one in taps.items():
                code, out, err = ended(one)
                lines = out.splitlines()
                assert (code, len(lines)) == (0, 2), err
                assert {json.loads(line.split(" ", 2)[2])["protocol"] for line in lines} == {stage}
        finally:
            for one in taps.values():
                one.kill()
                one.wait(10)
