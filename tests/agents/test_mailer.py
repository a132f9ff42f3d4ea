"""The mailer under ``test_context``, with a real SMTP server and tables that are mappings."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import pytest

from agents import mailer
from devices.alarms.model import Alert
from streams import topics
from streams.messages import decoder, encode
from streams.resilience.chunks import Chunk
from streams.resilience.deadletter import header
from streams.resilience.failures import Retryable
from streams.ticks import Tick
from tests.agents.mail.conftest import Server, make_alert, server

__all__ = ["server"]

DECODE = decoder(Alert).decode


class Mapping(dict[str, bytes]):
    """Stands for the rows of a table."""

    async def settled(self) -> None:
        """Return at once: there is no Kafka."""


class Desk:
    """A mailer with a server of its own; :meth:`restart` is a crash: only the tables stay."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, server: Server) -> None:
        self.server = server
        self.tables = {id(mailer.sent_table): Mapping(), id(mailer.held_table): Mapping()}
        self._patch = monkeypatch
        monkeypatch.setattr(mailer, "Rows", lambda _app, table, _number: self.tables[id(table)])
        self.set(smtp_url=server.url, database_url="influx://token@127.0.0.1:1/o/b", mail_digest_seconds=1.0)

    def set(self, **settings: Any) -> None:
        """Change settings and start over."""
        self._patch.setattr(mailer.mailer, "settings", dataclasses.replace(mailer.mailer.settings, **settings))
        self.restart()

    def restart(self) -> None:
        """Start over with what the tables hold."""
        self._patch.setattr(mailer, "BOXES", mailer.Boxes())

    @asynccontextmanager
    async def at_work(self) -> AsyncIterator[Any]:
        """Run the agent."""
        async with mailer.send_mails.test_context() as agent:
            yield agent
        await mailer.BOXES.stop()

    @property
    def told(self) -> list[tuple[str, str]]:
        """Recipient and transition of each mail."""
        return [
            (recipient, str(message["X-Headrace-Transition"]))
            for recipients, message in self.server.taken
            for recipient in recipients
        ]


@pytest.fixture
def desk(monkeypatch: pytest.MonkeyPatch, server: Server) -> Desk:
    """A mailer whose server takes everything."""
    return Desk(monkeypatch, server)


def letters() -> list[tuple[bytes | None, bytes | None, list[tuple[str, bytes]]]]:
    """Key, value and headers of the dead letters."""
    return [
        (key, value, headers or [])
        for topic, key, value, headers in mailer.mailer.app.captured
        if topic == topics.errors.name
    ]


async def test_each_alert_is_a_mail_in_order_and_only_once(desk: Desk, records: Any) -> None:
    """A chunk makes its mails in order; delivered again, after a crash too, it makes none."""
    alerts = [make_alert(number) for number in range(5)]
    values = [encode(alert) for alert in alerts]
    async with desk.at_work() as agent:
        await agent.put(Chunk(records(*values), DECODE))
        await agent.put(Chunk(records(*values), DECODE))
    desk.restart()
    async with desk.at_work() as agent:
        await agent.put(Chunk(records(*values), DECODE))
    assert [transition for _, transition in desk.told] == [alert.metadata["transition_id"] for alert in alerts]


async def test_one_of_three_is_refused(desk: Desk, records: Any) -> None:
    """A 550 for one recipient is its dead letter, with the alert's bytes; the others have their mail."""
    desk.server.rcpt["bob@example.org"] = "550 no such user"
    value = encode(make_alert(1, "ann@example.org,bob@example.org,eve@example.org"))
    async with desk.at_work() as agent:
        await agent.put(Chunk(records(value, topic=topics.alerts.name), DECODE))
    assert [recipient for recipient, _ in desk.told] == ["ann@example.org", "eve@example.org"]
    ((key, found, headers),) = letters()
    assert (key, found) == (b"d1", value)
    assert header(headers, "dlq-class") == "rejected"
    assert header(headers, "dlq-stage") == "mailer"
    assert header(headers, "dlq-topic") == topics.alerts.name
    assert "bob@example.org: 550" in (header(headers, "dlq-message") or "")
    assert header(headers, mailer.RECIPIENT) == "bob@example.org"


async def test_a_replayed_letter_tells_its_recipient_alone(desk: Desk, records: Any) -> None:
    """The dead letter of a recipient, replayed once the mailbox exists, is a mail to that one and nobody else."""
    desk.server.rcpt["bob@example.org"] = "550 no such user"
    (first,) = records(encode(make_alert(1, "ann@example.org,bob@example.org")), topic=topics.alerts.name)
    async with desk.at_work() as agent:
        await agent.put(Chunk([first], DECODE))
        ((_, _, headers),) = letters()
        desk.server.rcpt.clear()
        (replayed,) = records(first.value, topic=topics.alerts.name)
        replayed.headers = [pair for pair in headers if not pair[0].startswith("dlq-")]
        await agent.put(Chunk([replayed], DECODE))
    assert [recipient for recipient, _ in desk.told] == ["ann@example.org", "bob@example.org"]


async def test_a_server_that_is_away_holds_all_back_and_loses_none(desk: Desk, records: Any) -> None:
    """Nothing is sent, refused or skipped while the server is away; then all goes out in order."""
    values = [encode(make_alert(number)) for number in range(3)]
    chunk = Chunk(records(*values), DECODE)
    await desk.server.stop()
    async with desk.at_work() as agent:
        with pytest.raises(Retryable):
            await agent.put(chunk)
    assert chunk.pending == [0, 1, 2]
    await desk.server.start()
    async with desk.at_work() as agent:
        await agent.put(Chunk(records(*values), DECODE))
    assert [transition[:32] for _, transition in desk.told] == [f"{number:032x}" for number in range(3)]
    assert letters() == []


async def test_a_crash_after_data_repeats_one_mail(desk: Desk, records: Any) -> None:
    """The connection ends after DATA and the process with it: one mail comes twice, with one Message-ID."""
    desk.server.drop_after_data = 1
    values = [encode(make_alert(number)) for number in range(3)]
    async with desk.at_work() as agent:
        with pytest.raises(Retryable):
            await agent.put(Chunk(records(*values), DECODE))
    desk.restart()
    async with desk.at_work() as agent:
        await agent.put(Chunk(records(*values), DECODE))
    assert [int(transition[:32], 16) for _, transition in desk.told] == [0, 0, 1, 2]
    first, second = (message["Message-ID"] for _, message in desk.server.taken[:2])
    assert first == second


async def test_what_is_no_alert_is_a_dead_letter(desk: Desk, records: Any) -> None:
    """Poison between two alerts is one dead letter; both are told."""
    values = [encode(make_alert(0)), b"{not json", encode(make_alert(1))]
    async with desk.at_work() as agent:
        await agent.put(Chunk(records(*values), DECODE))
    assert len(desk.told) == 2
    ((_, value, headers),) = letters()
    assert value == b"{not json"
    assert header(headers, "dlq-class") == "poison"


async def test_what_the_rate_holds_back_survives_and_comes_as_a_digest(desk: Desk, records: Any) -> None:
    """Beyond the rate alerts wait in the table; after a crash a tick sends them as one digest."""
    desk.set(mail_rate_per_recipient_per_minute=1)
    values = [encode(make_alert(number)) for number in range(4)]
    async with desk.at_work() as agent:
        await agent.put(Chunk(records(*values), DECODE))
    assert len(desk.server.taken) == 1
    assert len(desk.tables[id(mailer.held_table)]) == 3
    desk.restart()
    async with mailer.send_digests.test_context() as agent:
        async with asyncio.timeout(60):
            while len(desk.server.taken) < 2:
                tick = encode(Tick(datetime.now(UTC), 0))
                await agent.put(Chunk(records(tick), decoder(Tick).decode))
                await asyncio.sleep(0.05)
    await mailer.BOXES.stop()
    assert "3" in str(desk.server.taken[1][1]["Subject"])
    assert desk.tables[id(mailer.held_table)] == {}


async def test_the_check_says_which_server_is_away(desk: Desk) -> None:
    """The readiness check passes while the server answers, and names it when it does not."""
    await mailer.smtp()
    await desk.server.stop()
    desk.restart()
    with pytest.raises(Retryable, match=f"127.0.0.1:{desk.server.port}"):
        await mailer.smtp()
    await mailer.BOXES.stop()
