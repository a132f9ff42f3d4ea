"""The fleet: a few hundred devices, their traffic as a plan says, and a thread that sends it.

Guarantee: for one seed, run and clock the traffic is the same, message by message; the ledger has exactly what was
acknowledged. Per device, messages are sent in order of their sequence numbers, but for those that the plan makes late.
"""

import contextlib
import dataclasses
import random
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Self

from tools.simulator.coap import Requester
from tools.simulator.families import Device, Efento, Fluxor, HotFluxor, Meter, Tank, Weather, Yard
from tools.simulator.ledger import Book, Ledger
from tools.simulator.message import Message, Outcome
from tools.simulator.mqtt import Publisher
from tools.simulator.poison import KINDS, kinds_of, spoil

__all__ = ["Fleet", "Plan", "devices_of", "new_run", "traffic"]

_JSON_FAMILIES = (Weather, Meter, Tank)
_LATE_BY_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Plan:
    """What a fleet does. Raises ValueError for what cannot be.

    `rate` in messages/s, 0 for as fast as possible. It ends after `messages` or `seconds`, whichever comes first, or
    when it is stopped. `duplicates`, `poison` and `late` are shares: of messages that are sent twice, that nobody can
    read, and that are sent after a younger one of the same device. `hot` is the span, in seconds from the start, in
    which the first device measures 48 °C; None for never. `coap` is the share of devices that speak CoAP, half of them
    Efento sensors; their messages are never poison, which would be refused.
    """

    devices: int = 300
    seed: int = 1
    rate: float = 200.0
    messages: int | None = None
    seconds: float | None = None
    duplicates: float = 0.0
    poison: float = 0.0
    late: float = 0.0
    poison_kinds: tuple[str, ...] = KINDS
    hot: tuple[float, float] | None = (5.0, 25.0)
    coap: float = 0.0

    def __post_init__(self) -> None:
        if not 1 <= self.devices <= 100_000:
            raise ValueError(f"devices={self.devices}: allowed 1 to 100000")
        if self.rate < 0:
            raise ValueError(f"rate={self.rate}: allowed 0 (as fast as possible) or messages per second")
        for name in ("duplicates", "poison", "late", "coap"):
            share = getattr(self, name)
            if not 0 <= share <= 1:
                raise ValueError(f"{name}={share}: a share is 0 to 1")
        if unknown := set(self.poison_kinds) - set(KINDS):
            raise ValueError(f"poison {', '.join(sorted(unknown))}: there is {', '.join(KINDS)}")


def new_run() -> str:
    """Return the id of a new run: 8 hexadecimal digits."""
    return secrets.token_hex(4)


def devices_of(plan: Plan, run: str, started: datetime) -> list[Device]:
    """Return the devices: over MQTT every second one a Fluxor, the first of them the one that runs hot."""
    made: list[Device] = []
    over_coap = 0
    for number in range(plan.devices):
        if int((number + 1) * plan.coap) > int(number * plan.coap):
            over_coap += 1
            made.append((Efento if over_coap % 2 else Yard)(run, plan.seed, number))
        elif number == 0 and plan.hot is not None:
            begin, end = (started + timedelta(seconds=seconds) for seconds in plan.hot)
            made.append(HotFluxor(run, plan.seed, number, hot_from=begin, hot_until=end))
        elif number % 2 == 0:
            made.append(Fluxor(run, plan.seed, number))
        else:
            made.append(_JSON_FAMILIES[number // 2 % len(_JSON_FAMILIES)](run, plan.seed, number))
    return made


def traffic(
    plan: Plan,
    devices: Sequence[Device],
    clock: Callable[[], datetime],
    more: Callable[[], bool] = lambda: True,
) -> Iterator[Message]:
    """Yield the fleet's messages for as long as `more()` says and `plan.messages` lasts, copies not counted.

    Each device sends once a round, in an order that changes from round to round.
    """
    rng = random.Random(f"{plan.seed}/traffic")
    held: dict[str, Message] = {}
    turn: list[Device] = []
    made = 0
    while (plan.messages is None or made < plan.messages) and more():
        if not turn:
            turn = list(devices)
            rng.shuffle(turn)
        device = turn.pop()
        message = device.next(clock())
        made += 1
        spoilt, copied, delayed = (rng.random() < share for share in (plan.poison, plan.duplicates, plan.late))
        if spoilt:
            kinds = [kind for kind in kinds_of(message) if kind in plan.poison_kinds]
            if kinds:
                message = spoil(message, rng.choice(kinds))
        if delayed and message.expect is Outcome.STORED and device.device_id not in held:
            held[device.device_id] = dataclasses.replace(message, late=True)
            continue
        yield message
        if copied:
            yield message
        if (older := held.pop(device.device_id, None)) is not None:
            yield older
    yield from held.values()


class Fleet:
    """Sends a plan's traffic from a thread of its own and keeps the ledger.

    `ledger_path` None keeps the ledger in memory only. `on_sent(message)` is called on the sending thread. Raises
    ValueError for a URL that is none.
    """

    def __init__(
        self,
        plan: Plan,
        mqtt_url: str,
        *,
        ledger_path: Path | None = None,
        run: str | None = None,
        inflight: int = 500,
        on_sent: Callable[[Message], None] = lambda _message: None,
        drain_seconds: float = 60.0,
        coap_url: str | None = None,
    ) -> None:
        self.plan = plan
        self.run = run or new_run()
        self.sent = 0
        self.error: BaseException | None = None
        self._on_sent = on_sent
        self._drain_seconds = drain_seconds
        self._path = ledger_path
        self._ledger: Ledger | None = None
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._publisher = Publisher(
            mqtt_url,
            on_ack=self._acknowledged,
            on_refused=self._refused,
            inflight=inflight,
            client_id=f"simulator-{self.run}",
        )
        if plan.coap and coap_url is None:
            raise ValueError(f"coap={plan.coap}: devices over CoAP need coap_url")
        self._requester: Requester | None = None
        if coap_url is not None and plan.coap:
            self._requester = Requester(
                coap_url,
                on_ack=self._acknowledged,
                on_refused=self._refused,
                on_answer=self._answered,
                inflight=inflight,
            )
        #: from `start` on, by id
        self.devices: dict[str, Device] = {}

    @property
    def book(self) -> Book:
        """What was acknowledged so far."""
        if self._ledger is None:
            raise RuntimeError("start() comes first")
        return self._ledger.book

    @property
    def acknowledged(self) -> int:
        """How many messages were acknowledged, copies not counted."""
        return self.book.acknowledged

    @property
    def in_flight(self) -> int:
        """How many messages wait for their acknowledgement."""
        return self._publisher.in_flight + (self._requester.in_flight if self._requester else 0)

    @property
    def running(self) -> bool:
        """Whether it sends, or waits for the last acknowledgements."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def is_connected(self) -> bool:
        """Whether the broker is connected."""
        return self._publisher.is_connected or self.plan.coap == 1

    def start(self, patience_seconds: float = 30.0) -> None:
        """Connect and begin to send; ConnectionError when no broker answers (devices over CoAP alone need none)."""
        if self.plan.coap < 1:
            self._publisher.start(patience_seconds)
        if self._requester is not None:
            self._requester.start()
        ledger = self._ledger = Ledger(self._path, self.run, self.plan.seed)
        made = devices_of(self.plan, self.run, ledger.book.started)
        self.devices = {device.device_id: device for device in made}
        self._thread = threading.Thread(target=self._work, name="simulator", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Send nothing more; the last acknowledgements are still waited for. Returns at once; see `join`."""
        self._stopping.set()

    def join(self, timeout_seconds: float | None = None) -> bool:
        """Wait until all is sent and acknowledged; False when that takes longer. Raises what ended the thread."""
        if self._thread is None:
            return True
        self._thread.join(timeout_seconds)
        if self.error is not None:
            raise self.error
        return not self._thread.is_alive()

    def close(self) -> None:
        """End now: what is in flight is given up."""
        self._stopping.set()
        self._publisher.stop()
        if self._requester is not None:
            self._requester.stop()
        if self._thread is not None:
            self._thread.join(10)
        if self._ledger is not None:
            self._ledger.close()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _at: TracebackType | None
    ) -> None:
        self.close()

    def _acknowledged(self, message: Message, sends: int) -> None:
        if self._ledger is not None:
            self._ledger.acknowledged(message, sends)

    def _answered(self, message: Message, payload: bytes) -> None:
        self.devices[message.device_id].answered(payload)

    def _refused(self, message: Message, reason: str) -> None:
        if self._ledger is not None:
            self._ledger.refuse(message, reason)

    def _work(self) -> None:
        try:
            self._send_all()
            self._publisher.drain(self._drain_seconds)
            if self._requester is not None:
                self._requester.drain(self._drain_seconds)
        except BaseException as error:  # handed to join()
            self.error = error
        finally:
            with contextlib.suppress(Exception):
                self._publisher.stop()
            if self._requester is not None:
                self._requester.stop()

    def _send_all(self) -> None:
        assert self._ledger is not None
        devices = list(self.devices.values())
        for device in devices:
            self._ledger.device(device.device_id, device.family, own_time=device.own_time)
        end = None if self.plan.seconds is None else time.monotonic() + self.plan.seconds
        interval = 1 / self.plan.rate if self.plan.rate else 0.0
        due = time.monotonic()

        def more() -> bool:
            return not self._stopping.is_set() and (end is None or time.monotonic() < end)

        for message in traffic(self.plan, devices, lambda: datetime.now(UTC), more):
            if interval:
                wait = due - time.monotonic()
                if wait > 0:
                    self._stopping.wait(wait)
                # After a stay of the broker the fleet goes on at its rate; it does not make up for it.
                due = max(due, time.monotonic() - _LATE_BY_SECONDS) + interval
            sender = self._requester if message.protocol == "coap" else self._publisher
            if sender is None or not sender.publish(message):
                return
            self.sent += 1
            self._on_sent(message)
