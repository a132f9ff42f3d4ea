"""The dead-letter desk as its users meet it: list, show, replay, discard, trace and accounts, against real servers."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from settings import declarations, environment
from tests.faults.support import wait_for
from tests.faults.topics import raw_message, read, write
from tests.faults.worker import Realm, Worker, realm
from tools.stack import Stack

pytestmark = [pytest.mark.stack]
ROOT = Path(__file__).parents[1]


def faust(own: Realm, *arguments: str) -> tuple[int, str, str]:
    """Run a command; returns exit code, output and errors."""
    known = {declared.variable for declared in declarations()}
    base = {name: value for name, value in environment().items() if name not in known}
    done = subprocess.run(
        [sys.executable, "-m", "faust", "-A", "streams", *arguments],
        cwd=ROOT,
        env={**base, **own.env},
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.returncode, done.stdout, done.stderr


def listed(own: Realm, *filters: str) -> list[dict[str, Any]]:
    """Return what `dlq list` shows."""
    code, out, err = faust(own, "dlq", "list", "--json", *filters)
    assert code == 0, err
    return [json.loads(line) for line in out.splitlines()]


def execute(own: Realm, statement: str) -> list[Any]:
    """Run a statement in the realm's database."""

    async def run() -> list[Any]:
        connection = await asyncpg.connect(own.env["DATABASE_URL"])
        try:
            return list(await connection.fetch(statement))
        finally:
            await connection.close()

    return asyncio.run(run())


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
        refused, unread = listed(own, "--stage", "ingestor"), listed(own, "--class", "poison", "--stage", "normalizer")
        assert (len(refused), len(unread), len(listed(own, "--device", "dev"))) == (2, 1, 3)
        assert listed(own, "--until", "1h") == listed(own, "--device", "other") == []
        with urllib.request.urlopen(f"{worker.url}/api/v1/dead-letters?stage=ingestor", timeout=10) as answer:  # noqa: S310
            shown = json.load(answer)["dead_letters"]
        assert [letter["id"] for letter in shown] == [letter["id"] for letter in refused]
        newest, oldest = (letter["id"] for letter in refused)
        code, out, _ = faust(own, "dlq", "show", oldest)
        assert code == 0 and "not_refused" in out

        code, out, _ = faust(own, "dlq", "replay", "--stage", "ingestor", "--limit", "1", "--dry-run")
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
        assert faust(own, "dlq", "replay", oldest, "--dry-run")[0] == 1
        assert faust(own, "dlq", "replay")[0] == 2
        code, out, _ = faust(own, "dlq", "discard", unread[0]["id"], "--reason", "a broken device")
        assert (code, out.splitlines()[-1]) == (0, "1 discarded, 0 refused")
        assert len(read(own, "iot_validated_data")) == 5

        code, out, err = faust(own, "trace", "r-dev-0")
        assert code == 0, err
        assert "iot_raw_data" in out and "iot_validated_data" in out and "readings" in out
        assert faust(own, "trace", "r-dev-no")[0] == 1
        worker.wait(lambda: worker.metric("headrace_in_flight") == 0, "idle")
        with urllib.request.urlopen(f"{worker.url}/accounts", timeout=10) as answer:  # noqa: S310
            accounts = {one["stage"]: one for one in json.load(answer)}
        assert {name: one["balance"] for name, one in accounts.items()} == {"normalizer": 0, "ingestor": 0}
        assert (accounts["ingestor"]["received"], accounts["ingestor"]["forwarded"]) == (5, 3)
