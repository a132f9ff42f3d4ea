"""One transition to all of its recipients.

Guarantees, for each recipient by itself:

- It is told at least once, by a mail, a digest or a webhook; or ``refuse`` is told why it never can be, and awaited (a
  dead letter for that recipient; the others have theirs).
- It is told at most once more for each crash or lost connection between the end of a mail and the record of it: what
  has gone out is in ``sent``, by transition and recipient, and is skipped when the work is done again.
- In order: what a server puts off is tried again before anything that follows it, and what follows something held back
  for a digest goes into the digest too.

A server that is away is waited for without end: :class:`~streams.resilience.failures.Retryable`. One recipient that is
put off again and again while the server works, or one webhook that does not answer, is given up after a time, so that
it cannot hold up everybody else's mails for ever.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final, NamedTuple
from urllib.parse import urlsplit

import aiosmtplib

from agents.mail.ratelimit import HeldBack, RateLimiter
from agents.mail.render import History, Mail, Renderer, transition_of
from agents.mail.send import Fate, Outcome, SmtpSender
from agents.mail.webhook import WebhookSender
from devices.alarms.model import Alert
from streams.resilience.failures import Retryable

# One recipient's 4xx or one webhook's silence is waited for so long. Greylisting ends after some minutes.
GIVE_UP_SECONDS: Final = 1800.0
# What has gone out is remembered for so long: longer than any redelivery takes.
REMEMBER_SECONDS: Final = 7 * 86400.0

NO_HISTORY: Final[History] = ()
GetHistory = Callable[[Alert], Awaitable[History]]

logger = logging.getLogger(__name__)


class Refusal(NamedTuple):
    """A recipient that cannot be told, ever, and what it was to be told: one alert, or those of a digest."""

    recipient: str
    alerts: Sequence[Alert]
    outcome: Outcome


Refuse = Callable[[Refusal], Awaitable[None]]


async def no_history(_alert: Alert) -> History:
    """Know no readings: a mail without a chart."""
    return NO_HISTORY


@dataclass
class Delivery:
    """See the module's docstring. ``sent`` maps ``transition|recipient`` to epoch seconds.

    ``now`` gives epoch seconds, ``clock`` monotonic ones. ``history`` may raise or take long: the mail then has no
    chart. ``counts``: ``sent``, ``refused``, ``later``, ``held``, ``digests``, ``skipped`` (all told already, or nobody
    to tell).
    """

    smtp: SmtpSender
    webhooks: WebhookSender
    renderer: Renderer
    limiter: RateLimiter
    held: HeldBack
    sent: MutableMapping[str, float]
    refuse: Refuse
    history: GetHistory = no_history
    history_timeout_seconds: float = 1.0
    give_up_seconds: float = GIVE_UP_SECONDS
    now: Callable[[], float] = time.time
    clock: Callable[[], float] = time.monotonic
    counts: Counter[str] = field(default_factory=Counter)
    # Tokens that were taken for what a server then put off, and since when each is put off: for this process only.
    _admitted: set[str] = field(default_factory=set)
    _first_tried: dict[str, float] = field(default_factory=dict)

    async def stop(self) -> None:
        """Close connections."""
        await self.smtp.stop()
        await self.webhooks.stop()

    async def deliver(self, alert: Alert) -> None:
        """Tell everybody whom the alert names and who was not told yet.

        Raises ``Retryable`` while somebody is still to be told: call again with the same alert, after a while.
        """
        transition = transition_of(alert)
        keys = {one: f"{transition}|{one}" for one in _to_tell(alert)}
        todo = [one for one, key in keys.items() if key not in self.sent]
        if not todo:
            self.counts["skipped"] += 1
            return
        mails = [one for one in todo if "://" not in one and self._admit(one, keys[one], transition, alert)]
        work: list[Awaitable[dict[str, Outcome]]] = [self._post(one, alert) for one in todo if "://" in one]
        if mails:
            work.append(self._mail(await self._render(alert), mails))
        problems = []
        # Together, and all of them whatever becomes of one: a dead webhook delays no mail.
        for result in await asyncio.gather(*work, return_exceptions=True):
            if isinstance(result, BaseException):
                problems.append(result)
                continue
            for one, outcome in result.items():
                final = self._patience(keys[one], outcome)
                if final.fate is Fate.LATER:
                    problems.append(Retryable(f"{_shown(one)} puts off {transition}: {final.code} {final.reply}"))
                else:
                    await self._settle(one, [alert], [keys[one]], final)
        if problems:
            raise problems[0]

    async def flush_digests(self) -> None:
        """Send the digests that are due and that the rates allow. Raises ``Retryable`` where the server is away."""
        for recipient in list(self.held.due(self.now())):
            key = f"digest|{recipient}"
            if key not in self._admitted and not self.limiter.admit(recipient, self.clock()):
                continue
            self._admitted.add(key)
            alerts = self.held.peek(recipient)
            mail = self.renderer.digest(alerts, datetime.fromtimestamp(self.now(), UTC))
            outcome = self._patience(key, (await self._mail(mail, [recipient]))[recipient])
            if outcome.fate is not Fate.LATER:
                await self._settle(recipient, alerts, [key], outcome)
                self.held.clear(recipient, len(alerts))
                self.counts["digests"] += 1

    def forget(self) -> int:
        """Drop from ``sent`` what no redelivery can bring any more; returns how many. To be called now and then."""
        oldest = self.now() - REMEMBER_SECONDS
        gone = [key for key, moment in self.sent.items() if moment < oldest]
        for key in gone:
            del self.sent[key]
        return len(gone)

    def _admit(self, recipient: str, key: str, transition: str, alert: Alert) -> bool:
        if key in self._admitted:
            return True
        if not self.held.waits(recipient) and self.limiter.admit(recipient, self.clock()):
            self._admitted.add(key)
            return True
        self.held.add(recipient, transition, alert, self.now())
        self.sent[key] = self.now()
        self.counts["held"] += 1
        return False

    async def _settle(self, recipient: str, alerts: Sequence[Alert], keys: Sequence[str], outcome: Outcome) -> None:
        if outcome.fate is Fate.REFUSED:
            await self.refuse(Refusal(recipient, alerts, outcome))
        self.counts[outcome.fate.value] += 1
        for key in keys:
            self._admitted.discard(key)
            self._first_tried.pop(key, None)
            if not key.startswith("digest|"):
                self.sent[key] = self.now()

    def _patience(self, key: str, outcome: Outcome) -> Outcome:
        if outcome.fate is not Fate.LATER:
            return outcome
        self.counts["later"] += 1
        waited = self.clock() - self._first_tried.setdefault(key, self.clock())
        if waited < self.give_up_seconds:
            return outcome
        return Outcome(Fate.REFUSED, outcome.code, f"given up after {waited:.0f} s: {outcome.reply}")

    async def _render(self, alert: Alert) -> Mail:
        moment = datetime.fromtimestamp(self.now(), UTC)
        try:
            async with asyncio.timeout(self.history_timeout_seconds):
                history = await self.history(alert)
            return await asyncio.to_thread(self.renderer.alert, alert, moment, history)
        except Exception as exc:
            # The news matters more than its picture.
            logger.warning(
                "no chart for alert %s of device %s: %s: %s", alert.id, alert.device_id, type(exc).__name__, exc
            )
            return self.renderer.alert(alert, moment)

    async def _mail(self, mail: Mail, recipients: Sequence[str]) -> dict[str, Outcome]:
        try:
            return await self.smtp.send(mail.bytes_to, recipients)
        except (aiosmtplib.SMTPException, OSError, TimeoutError) as exc:
            # Whatever the code: what is not about a recipient is about the server, and the mails are good.
            address = self.smtp.address
            raise Retryable(f"the mail server {address.host}:{address.port} cannot take mails now: {exc}") from exc

    async def _post(self, url: str, alert: Alert) -> dict[str, Outcome]:
        return {url: await self.webhooks.send(url, alert)}


def _to_tell(alert: Alert) -> list[str]:
    about = alert.metadata
    if not about.get("notify", True) or about.get("transition") == "acknowledged":
        return []
    return list(dict.fromkeys(name.strip() for name in alert.recipients.split(",") if name.strip()))


def _shown(recipient: str) -> str:
    """Return a recipient as a log may have it: a webhook's path and query can be secrets."""
    return f"the webhook at {urlsplit(recipient).netloc.rpartition('@')[2]}" if "://" in recipient else recipient
