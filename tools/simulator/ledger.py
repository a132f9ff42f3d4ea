"""The ledger: an append-only file of what was acknowledged, one JSON object a line.

Guarantee: a message is in it only after its PUBACK (or 2.xx) has arrived, so that whatever the ledger says Headrace has
to answer for. A line cut short by a crash is ignored; a message sent twice has a line for each acknowledgement.

===========  =========================================================================================================
line         fields
===========  =========================================================================================================
`run`        `run`, `seed`, `started` (RFC 3339); begins a run, a file may hold several
`device`     `device`, `family`, `own_time`: whether its messages say when they were sampled
`ack`        `device`, `seq`, `digest` of the payload, `at` (epoch s), `sends` (transmissions of this copy), `rows`;
             where they are not the usual ones `expect`, `poison`, `late`, `sampled` (epoch s), `samples`
`refused`    `device`, `seq`, `reason`: the broker did not take it, or had nobody to give it to; nobody answers for it
===========  =========================================================================================================
"""

import json
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tools.simulator.message import Message, Outcome

Key = tuple[str, int]


@dataclass(slots=True)
class Entry:
    """What is known of one acknowledged message; `sends` counts transmissions of all its copies."""

    digest: str
    at: float
    sends: int
    acks: int = 1
    expect: Outcome = Outcome.STORED
    poison: str = ""
    late: bool = False
    sampled: float | None = None
    rows: int = 0
    samples: int = 1


@dataclass(slots=True)
class Book:
    """One run as the ledger has it: what was acknowledged, by (device, seq), and in which order."""

    run: str
    seed: int
    started: datetime
    entries: dict[Key, Entry] = field(default_factory=dict)
    order: list[Key] = field(default_factory=list)
    own_time: dict[str, bool] = field(default_factory=dict)
    families: dict[str, str] = field(default_factory=dict)
    refused: dict[Key, str] = field(default_factory=dict)

    @property
    def acknowledged(self) -> int:
        """How many messages were acknowledged, copies not counted."""
        return len(self.entries)

    def add(self, key: Key, entry: Entry) -> None:
        """Note an acknowledgement; one of a message that is known adds to it."""
        known = self.entries.get(key)
        if known is None:
            self.entries[key] = entry
            self.order.append(key)
        else:
            known.acks += 1
            known.sends += entry.sends


class Ledger:
    """Writes one run's acknowledgements; may be called from several threads. `path` None keeps it in memory."""

    def __init__(
        self,
        path: Path | None,
        run: str,
        seed: int,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self.book = Book(run, seed, datetime.fromtimestamp(clock(), UTC))
        self._file = None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            # A predecessor may have been killed in the middle of a line.
            cut = _is_cut(path)
            self._file = path.open("a", encoding="utf-8", buffering=1)
            if cut:
                self._file.write("\n")
        self._write({"kind": "run", "run": run, "seed": seed, "started": self.book.started.isoformat()})

    def device(self, device_id: str, family: str, *, own_time: bool) -> None:
        """Note a device."""
        with self._lock:
            self.book.own_time[device_id] = own_time
            self.book.families[device_id] = family
            self._write({"kind": "device", "device": device_id, "family": family, "own_time": own_time})

    def acknowledged(self, message: Message, sends: int = 1) -> None:
        """Note that `message` was acknowledged, after `sends` transmissions."""
        entry = Entry(
            digest=message.digest,
            at=self._clock(),
            sends=sends,
            expect=message.expect,
            poison=message.poison,
            late=message.late,
            sampled=message.sampled_at.timestamp() if message.sampled_at else None,
            rows=message.rows,
            samples=message.samples,
        )
        line: dict[str, Any] = {
            "kind": "ack",
            "device": message.device_id,
            "seq": message.seq,
            "digest": entry.digest,
            "at": round(entry.at, 3),
            "sends": sends,
            "rows": entry.rows,
        }
        if entry.expect is not Outcome.STORED:
            line |= {"expect": entry.expect.value, "poison": entry.poison}
        if entry.late:
            line["late"] = True
        if entry.sampled is not None:
            line["sampled"] = entry.sampled
        if entry.samples != 1:
            line["samples"] = entry.samples
        with self._lock:
            self.book.add((message.device_id, message.seq), entry)
            self._write(line)

    def refuse(self, message: Message, reason: str) -> None:
        """Note that the broker did not take `message`."""
        with self._lock:
            self.book.refused[message.device_id, message.seq] = reason
            self._write({"kind": "refused", "device": message.device_id, "seq": message.seq, "reason": reason})

    def close(self) -> None:
        """Close the file; what was acknowledged later stays in `book` alone."""
        with self._lock:
            if self._file is not None:
                self._file.close()
                self._file = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _at: TracebackType | None
    ) -> None:
        self.close()

    def _write(self, line: Mapping[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(line) + "\n")


def _is_cut(path: Path) -> bool:
    if not path.exists() or path.stat().st_size == 0:
        return False
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read(1) != b"\n"


def load(path: Path) -> list[Book]:
    """Return the runs of a ledger, oldest first. Raises OSError, and ValueError where the file is no ledger."""
    with path.open(encoding="utf-8", errors="replace") as lines:
        books = parse(lines)
    if not books:
        raise ValueError(f"{path} holds no run; `faust -A streams simulate --ledger {path}` writes one")
    return books


def parse(lines: Iterable[str]) -> list[Book]:
    """Return the runs that `lines` tell of; lines that are cut short are left out."""
    books: list[Book] = []
    for text in lines:
        try:
            line = json.loads(text)
            kind = line["kind"]
        except (ValueError, KeyError, TypeError):
            continue
        if kind == "run":
            books.append(Book(line["run"], line["seed"], datetime.fromisoformat(line["started"])))
            continue
        if not books:
            continue
        book = books[-1]
        if kind == "device":
            book.own_time[line["device"]] = line["own_time"]
            book.families[line["device"]] = line["family"]
        elif kind == "refused":
            book.refused[line["device"], line["seq"]] = line["reason"]
        elif kind == "ack":
            entry = Entry(
                digest=line["digest"],
                at=line["at"],
                sends=line["sends"],
                expect=Outcome(line.get("expect", "stored")),
                poison=line.get("poison", ""),
                late=line.get("late", False),
                sampled=line.get("sampled"),
                rows=line["rows"],
                samples=line.get("samples", 1),
            )
            book.add((line["device"], line["seq"]), entry)
    return books
