"""Alerts become mails and webhooks.

Consumes ``iot_alerts`` (Alert) and its own ticks; produces mails, requests and nothing on Kafka. Tables ``mail_sent``
(transition and recipient, for a week) and ``mail_held`` (what waits for a digest).
Guarantee: each recipient of each transition is told at least once, in order per partition, and once more at most for
each crash: what has gone out is in the table's changelog before the next mail goes.
Retried: a mail server that is away, 4xx, a webhook that does not answer; the partition waits meanwhile. Dead-lettered:
``poison`` what is no Alert; per recipient, whom the letter names, ``rejected`` after a 5xx and ``exhausted`` where it
was put off for half an hour. Dropped: nothing; an alert that nobody is to be told of counts as handled.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from types import SimpleNamespace
from typing import Any, Final
from zoneinfo import ZoneInfo

from mode import Service

from agents.mail.chart import draw
from agents.mail.delivery import NO_HISTORY, Delivery, Refusal
from agents.mail.ratelimit import HeldBack, RateLimiter
from agents.mail.render import History, Renderer
from agents.mail.send import SmtpSender
from agents.mail.webhook import WebhookSender
from agents.stores.postgresql import ReadingStore
from devices.alarms.model import Alert
from settings import tls_context
from streams import topics
from streams.messages import encode
from streams.resilience.chunks import Out, failure_of
from streams.resilience.deadletter import header, headers_of
from streams.resilience.failures import Retryable
from streams.resilience.producer import Outgoing
from streams.stage import Stage
from streams.ticks import TICK_SECONDS, Tick, write_ticks
from tables.mailer import Moments, Rows, declare

mailer = Stage("mailer")
sent_table, held_table = declare(mailer.app, mailer.settings)
ticks = topics.ticks("mailer", Tick, topics.alerts)

FORGET_SECONDS: Final = 3600.0
CHART_READINGS: Final = 60
# More alerts than this at once: mails without charts.
CROWD: Final = 20
# A server that has just taken a mail, or answered, is not asked again for so long.
PROBE_SECONDS: Final = 10.0
#: Header of a dead letter: the recipient that it is about. A replay of the letter tells that one again, nobody else.
RECIPIENT: Final = "mail-recipient"


class RecipientRefused(Exception):
    """A recipient cannot be told."""


class Post:
    """What all partitions share: connections, the look of mails, the rate."""

    def __init__(self) -> None:
        settings = mailer.settings
        self.renderer = Renderer(
            settings.mail_from, settings.link_base, settings.mail_language, settings.mail_time_zone
        )
        tls: ssl.SSLContext | None = None
        if settings.smtp_tls_cafile is not None:
            tls = tls_context(settings.smtp_tls_cafile, None, None)
        connect = partial(
            SmtpSender, settings.smtp_url, self.renderer.sender, timeout_seconds=settings.smtp_timeout_seconds, tls=tls
        )
        self.smtp = connect()
        #: for the health check alone, so that it neither waits for a mail nor breaks into one
        self.probe = connect()
        self.probed_at = float("-inf")
        self.webhooks = WebhookSender(
            settings.webhook_secret, timeout_seconds=settings.webhook_timeout_seconds, clock=time.time
        )
        self.limiter = RateLimiter(settings.mail_rate_per_minute, settings.mail_rate_per_recipient_per_minute)
        self.store: ReadingStore | None = None
        if settings.database_url.startswith("postgres"):
            self.store = ReadingStore(
                settings.database_url,
                pool_size=2,
                application_name=mailer.app.conf.id,
                statement_timeout_seconds=settings.connect_timeout_seconds,
                connect_timeout_seconds=settings.connect_timeout_seconds,
            )

    async def stop(self) -> None:
        """Close connections."""
        await self.smtp.stop()
        await self.probe.stop()
        await self.webhooks.stop()
        if self.store is not None:
            await self.store.stop()

    async def history(self, alert: Alert) -> History:
        """Return the last readings of the alert's series; raises what the database does."""
        if self.store is None or not alert.field_name:
            return NO_HISTORY
        found = await self.store.readings(
            alert.device_id,
            index=alert.metadata.get("index"),
            label=alert.field_name,
            until=alert.timestamp + timedelta(minutes=1),
            limit=CHART_READINGS,
        )
        return [(row["time"], row["value"]) for row in found]


class Box:
    """The alerts of one partition on their way: who has been told, and what waits."""

    def __init__(self, post: Post, number: int) -> None:
        self.rows = Rows(mailer.app, sent_table, number), Rows(mailer.app, held_table, number)
        sent, held = self.rows
        self.number = number
        self.post = post
        #: how many alerts came together with the one that is being told
        self.crowd = 0
        self.forgotten_at = float("-inf")
        #: what is being told: its bytes and where they were, for dead letters
        self.record: Any = None
        self.delivery = Delivery(
            post.smtp,
            post.webhooks,
            post.renderer,
            post.limiter,
            HeldBack(held, mailer.settings.mail_digest_seconds),
            Moments(sent),
            self.refuse,
            history=self.history,
        )

    async def history(self, alert: Alert) -> History:
        """Return what the chart shows; in a storm the news goes out first, and drawing takes longer than mailing."""
        return NO_HISTORY if self.crowd > CROWD else await self.post.history(alert)

    async def tell(self, alert: Alert, out: Out) -> None:
        """Tell everybody whom the alert names; raises Retryable while somebody is still to be told."""
        record = self.record = out.record
        again = header(record.headers or (), RECIPIENT)
        if again is not None:
            alert.recipients = again
            self.delivery.sent.pop(f"{alert.metadata.get('transition_id')}|{again}", None)
        try:
            await self.delivery.deliver(alert)
        finally:
            await self.settled()

    async def pass_time(self, _tick: Tick, out: Out) -> None:
        """Send the digests that are due; now and then forget what is long over."""
        self.record = out.record
        try:
            await self.delivery.flush_digests()
            if time.monotonic() - self.forgotten_at > FORGET_SECONDS:
                self.forgotten_at = time.monotonic()
                self.delivery.forget()
        finally:
            await self.settled()

    async def settled(self) -> None:
        """Wait until Kafka knows who was told."""
        for rows in self.rows:
            await rows.settled()

    async def refuse(self, refusal: Refusal) -> None:
        """Write a dead letter for each alert that a recipient will not be told of, and wait for it."""
        app, outcome = mailer.app, refusal.outcome
        given_up = outcome.reply.startswith("given up")
        letters: list[Outgoing] = []
        for alert in refusal.alerts:
            record = self.record
            if record.topic != topics.alerts.name:
                # Out of a digest: what is known of its record is the record itself.
                record = SimpleNamespace(
                    topic=topics.alerts.name,
                    partition=self.number,
                    offset=-1,
                    timestamp=int(alert.timestamp.timestamp() * 1000),
                    key=alert.device_id.encode(),
                    value=encode(alert),
                    headers=(),
                )
            problem = RecipientRefused(f"{refusal.recipient}: {outcome.code} {outcome.reply}")
            failure = failure_of("exhausted" if given_up else "rejected", problem, 1, None, record)
            app.on_dead_letter(record, failure)
            headers = [
                (name, value)
                for name, value in headers_of(record, failure, stage=mailer.name, group=app.conf.id)
                if name != RECIPIENT
            ]
            headers.append((RECIPIENT, refusal.recipient.encode()))
            letters.append((topics.errors.name, record.key, record.value, headers))
        number = self.number
        await app.send_letters(letters, lambda: number in BOXES.boxes)


class Boxes:
    """The partitions that this worker holds."""

    def __init__(self) -> None:
        self.boxes: dict[int, Box] = {}
        self._locks: dict[int, asyncio.Lock] = {}
        self._post: Post | None = None

    @property
    def post(self) -> Post:
        """Return what all partitions share, made when it is first needed."""
        if self._post is None:
            self._post = Post()
        return self._post

    async def handle(self, chunk: Any, what: Callable[[Box], Callable[[Any, Out], Any]]) -> None:
        """Handle a chunk, one message after the other, while nobody else is at its partition."""
        number = chunk.records[0].partition
        async with self._locks.setdefault(number, asyncio.Lock()):
            box = self.boxes.get(number)
            if box is None:
                box = self.boxes[number] = Box(self.post, number)
            box.crowd = len(chunk)
            handler = what(box)

            async def handle(message: Any, out: Out) -> None:
                # What is left of a partition that was revoked is somebody else's to tell.
                if chunk.ours:
                    await handler(message, out)

            try:
                await chunk.each(handle)
            except BaseException:
                self.forget(number)
                raise

    def forget(self, number: int) -> None:
        """Drop what is known of a partition: its next event begins with what the tables say."""
        self.boxes.pop(number, None)

    async def stop(self) -> None:
        """Close connections."""
        post, self._post = self._post, None
        self.boxes.clear()
        if post is not None:
            await post.stop()


BOXES = Boxes()


@mailer.prepare
def prepare() -> None:
    """Raise for settings of which no mail can be made."""
    _ = BOXES.post


@mailer.app.on_partitions_revoked.connect  # type: ignore[arg-type]
async def forget_boxes(_app: Any, revoked: Any, **_: Any) -> None:
    """Drop what is known of partitions that are somebody else's now."""
    for tp in revoked:
        BOXES.forget(tp.partition)


@mailer.agent(topics.alerts, chunks=True, name="mailer")
async def send_mails(stream: Any) -> None:
    """Tell the recipients of each alert, in order."""
    async for chunk in stream:
        await BOXES.handle(chunk, lambda box: box.tell)


@mailer.agent(ticks, chunks=True, name="mailer-ticks")
async def send_digests(stream: Any) -> None:
    """Send the digests that are due."""
    async for chunk in stream:
        await BOXES.handle(chunk, lambda box: box.pass_time)


class Clock(Service):
    """Writes a tick to each partition that this worker holds; closes connections at the end."""

    async def on_start(self) -> None:
        """Make the database ready to connect; without it mails have no chart."""
        if BOXES.post.store is not None:
            await BOXES.post.store.start()

    async def on_stop(self) -> None:
        """Close connections."""
        await BOXES.stop()

    @Service.task
    async def _warm_up(self) -> None:
        # The first chart loads its library, which takes a second: not when somebody waits for a mail.
        moment = datetime.now(UTC)
        points = [(moment, 0.0), (moment + timedelta(seconds=1), 1.0)]
        try:
            await asyncio.to_thread(draw, points, None, "", ZoneInfo("UTC"))
        except Exception as exc:
            self.log.warning("Mails have no charts: %r", exc)

    @Service.task
    async def _tick(self) -> None:
        while not self.should_stop:
            await self.sleep(TICK_SECONDS)
            try:
                await write_ticks(mailer.app, ticks)
            except Exception as exc:
                self.log.info("No tick: %r; digests wait for the next one", exc)


mailer.service(Clock)


@mailer.check("smtp")
async def smtp() -> None:
    """Raise while the mail server does not answer."""
    post = BOXES.post
    if time.monotonic() - post.probed_at < PROBE_SECONDS:
        return
    try:
        await post.probe.probe()
    except Exception as exc:
        post.probed_at = float("-inf")
        address = post.smtp.address
        raise Retryable(f"{address.host}:{address.port} (SMTP_URL): {type(exc).__name__}: {exc}") from exc
    post.probed_at = time.monotonic()
