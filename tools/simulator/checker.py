"""The checker, written once: acknowledged minus stored minus dead-lettered minus meant drops must be empty.

`judge` is pure and sees a ledger and the evidence; `check` fetches the evidence and judges; `settle` does so until
nothing changes any more. All work against a run that goes on as well as after it.

A message counts as stored when *all* its rows are there. Devices that say when they sampled may have each sample once;
of the others a second row is one that came twice (`repeated`): with a copy that the plan or a reconnect made, or where
a connector died between Kafka's acknowledgement and its own.
"""

import asyncio
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

import asyncpg

from tools.simulator.evidence import DeadLetter, Group, Origin, Places, dead_letters, raw_digests, stored_groups
from tools.simulator.ledger import Book, Key
from tools.simulator.message import Outcome, run_tag, tag_and_seq

__all__ = ["Missing", "Report", "check", "disorder", "examine", "judge", "match_groups", "overtakers", "settle"]

_MARGIN = timedelta(seconds=5)
_SHOWN = 10


@dataclass(frozen=True, slots=True)
class Missing:
    """An acknowledged message of which something is lost, and what is known of it."""

    device_id: str
    seq: int
    acknowledged_at: float
    detail: str

    def __str__(self) -> str:
        at = datetime.fromtimestamp(self.acknowledged_at, UTC).isoformat(timespec="milliseconds")
        return f"device {self.device_id} seq {self.seq}, acknowledged {at}: {self.detail}"


@dataclass(slots=True)
class Report:
    """What the evidence says of a run. acknowledged = stored + dead-lettered + dropped + missing."""

    run: str
    acknowledged: int = 0
    stored: int = 0
    dead_lettered: int = 0
    dropped: int = 0
    refused: int = 0
    missing: list[Missing] = field(default_factory=list)
    # (device, seq) with the samples that it has and the samples that it may have
    duplicates: list[tuple[Key, int, int]] = field(default_factory=list)
    repeated: list[tuple[Key, int, int]] = field(default_factory=list)
    # readable messages that became dead letters, and poison that was stored
    unexpected_dead: list[tuple[Key, DeadLetter]] = field(default_factory=list)
    survived: list[Key] = field(default_factory=list)
    # records of iot_raw_data beyond the first of each message, and messages first seen after a younger one there
    kafka_copies: int = 0
    disordered: list[Key] = field(default_factory=list)
    dead_by_kind: Counter[str] = field(default_factory=Counter)

    @property
    def ok(self) -> bool:
        """Whether nothing is lost and no row is there twice."""
        return not self.missing and not self.duplicates

    @property
    def clean(self) -> bool:
        """Whether, besides, all went as meant: order kept, nothing repeated, dead letters only of poison."""
        return self.ok and not (self.repeated or self.disordered or self.unexpected_dead or self.survived)

    def text(self) -> str:
        """Return the ledger as people read it."""
        kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(self.dead_by_kind.items()))
        lines = [
            f"acknowledged   {self.acknowledged:>9,}",
            f"stored         {self.stored:>9,}",
            f"dead-lettered  {self.dead_lettered:>9,}" + (f"   ({kinds})" if kinds else ""),
            f"meant drops    {self.dropped:>9,}",
            f"missing        {len(self.missing):>9,}",
            f"duplicate rows {len(self.duplicates):>9,}",
        ]
        for label, count in (
            ("sent twice, stored twice (no sample time)", len(self.repeated)),
            ("delivered again on the way", self.kafka_copies),
            ("out of order", len(self.disordered)),
            ("readable, yet dead-lettered", len(self.unexpected_dead)),
            ("poison, yet stored", len(self.survived)),
            ("not taken by the broker", self.refused),
        ):
            if count:
                lines.append(f"{label}: {count:,}")
        lines += _some("missing", [str(missing) for missing in self.missing])
        lines += _some("duplicate", [f"{key}: {has} samples of {may}" for key, has, may in self.duplicates])
        lines += _some("dead", [f"{key}: {d.stage} {d.kind}: {d.message}" for key, d in self.unexpected_dead])
        return "\n".join(lines)


def _some(name: str, items: Sequence[str]) -> list[str]:
    lines = [f"  {name}: {item}" for item in items[:_SHOWN]]
    if len(items) > _SHOWN:
        lines.append(f"  … and {len(items) - _SHOWN:,} more {name}")
    return lines


def since(book: Book, keys: Iterable[Key] | None = None) -> datetime:
    """Return the earliest time that a row of these messages (all of the run) can have, with a margin."""
    entries = [book.entries[key] for key in (list(book.order) if keys is None else keys)]
    times = [entry.at if entry.sampled is None else min(entry.sampled, entry.at) for entry in entries]
    first = book.started.timestamp() if keys is None else float("inf")
    return datetime.fromtimestamp(min([first, *times]), UTC) - _MARGIN


def match_groups(book: Book, groups: Iterable[Group]) -> dict[Key, list[Group]]:
    """Return the stored groups of each message of the run; those of other runs and strangers are left out."""
    tag = run_tag(book.run)
    by_time = {
        (device, round(entry.sampled * 1000)): (device, seq)
        for (device, seq), entry in list(book.entries.items())
        if entry.sampled is not None
    }
    found: dict[Key, list[Group]] = defaultdict(list)
    for group in groups:
        if group.run is not None and group.seq is not None:
            if group.run == book.run:
                found[group.device_id, group.seq].append(group)
        elif group.points is not None:
            carried = tag_and_seq(group.points)
            if carried is not None and carried[0] == tag:
                found[group.device_id, carried[1]].append(group)
        else:
            # Identity is not (yet) among the rows; the sample's time can tell.
            key = by_time.get((group.device_id, round(group.time.timestamp() * 1000)))
            if key is not None:
                found[key].append(group)
    return dict(found)


def is_complete(book: Book, key: Key, groups: Sequence[Group]) -> bool:
    """Tell whether a message is stored with all its rows."""
    entry = book.entries[key]
    if entry.sampled is None:
        return any(group.rows >= entry.rows for group in groups)
    return sum(group.rows for group in groups) >= entry.rows


def disorder(book: Book, arrivals: Iterable[tuple[str, str]]) -> tuple[int, list[Key]]:
    """Return how many of the (device, digest) `arrivals` came again, and which messages came after a younger one.

    Late ones that the plan made are not disordered; neither is what has come before.
    """
    by_digest = {(device, entry.digest): (device, seq) for (device, seq), entry in list(book.entries.items())}
    seen: set[Key] = set()
    newest: dict[str, int] = {}
    again = 0
    disordered: list[Key] = []
    for arrival in arrivals:
        key = by_digest.get(arrival)
        if key is None:
            continue
        if key in seen:
            again += 1
            continue
        seen.add(key)
        device, seq = key
        if book.entries[key].late:
            continue
        if seq < newest.get(device, -1):
            disordered.append(key)
        newest[device] = max(seq, newest.get(device, -1))
    return again, disordered


def overtakers(raw: Iterable[Origin], validated: Iterable[Origin]) -> list[Origin]:
    """Return which of the `validated` first came after a younger message of their device, by the order in `raw`.

    Both in order per partition. What comes again is not disordered; what is not in `raw`, or in another partition of
    it than the device's others, has no order among them.
    """
    ages: dict[str, tuple[int, int]] = {}
    for age, origin in enumerate(raw):
        ages.setdefault(origin.request_id, (origin.partition, age))
    seen: set[tuple[str, str]] = set()
    youngest: dict[tuple[str, int], int] = {}
    wrong: list[Origin] = []
    for origin in validated:
        name = (origin.device_id, origin.request_id)
        if name in seen or origin.request_id not in ages:
            continue
        seen.add(name)
        partition, age = ages[origin.request_id]
        if age < youngest.get((origin.device_id, partition), -1):
            wrong.append(origin)
        else:
            youngest[origin.device_id, partition] = age
    return wrong


def judge(
    book: Book,
    groups: Iterable[Group],
    letters: Iterable[DeadLetter],
    raw: Sequence[tuple[str, str, str]] = (),
) -> Report:
    """Return what `groups` (rows), `letters` (dead letters) and `raw` (records of `iot_raw_data`) say of a run."""
    report = Report(book.run, acknowledged=book.acknowledged, refused=len(book.refused))
    found = match_groups(book, groups)
    by_digest: dict[tuple[str, str | None], DeadLetter] = {}
    by_time: dict[tuple[str, datetime | None], DeadLetter] = {}
    for dead in letters:
        by_digest.setdefault((dead.device_id, dead.digest), dead)
        by_time.setdefault((dead.device_id, dead.time), dead)
    places: dict[tuple[str, str], str] = {}
    for device, mark, at in raw:
        places.setdefault((device, mark), at)

    for key, entry in list(book.entries.items()):
        stored = found.get(key, [])
        letter: DeadLetter | None = by_digest.get((key[0], entry.digest))
        if letter is None:
            times = [group.time for group in stored]
            if entry.sampled is not None:
                times.append(datetime.fromtimestamp(round(entry.sampled * 1000) / 1000, UTC))
            letter = next((by_time[key[0], time] for time in times if (key[0], time) in by_time), None)
        may = entry.samples if entry.sampled is not None else entry.samples * max(entry.sends, entry.acks)
        if len(stored) > may:
            (report.duplicates if entry.sampled is not None else report.repeated).append((key, len(stored), may))
        if letter is not None:
            report.dead_by_kind[letter.kind] += 1
            if entry.expect is not Outcome.DEAD:
                report.unexpected_dead.append((key, letter))
        elif stored and entry.expect is Outcome.DEAD:
            report.survived.append(key)

        if stored and (letter is not None or is_complete(book, key, stored)):
            report.stored += 1
        elif letter is not None:
            report.dead_lettered += 1
        elif entry.expect is Outcome.DROPPED:
            report.dropped += 1
        else:
            place = places.get((key[0], entry.digest))
            rows = sum(group.rows for group in stored)
            detail = f"{rows} of {entry.rows} rows stored" if stored else "no row"
            detail += f", no dead letter; {place}" if place else ", no dead letter"
            if raw and not place:
                detail += "; not in iot_raw_data"
            report.missing.append(Missing(*key, entry.at, detail))
    report.kafka_copies, report.disordered = disorder(book, [(device, mark) for device, mark, _ in raw])
    return report


async def examine(book: Book, places: Places, *, raw: bool = True) -> Report:
    """Fetch the evidence of a run and judge; `raw=False` leaves out `iot_raw_data`, and with it order and places.

    Raises what asyncpg and aiokafka raise when a server does not answer.
    """
    begin = since(book)
    # Ledger first, evidence afterwards: what is acknowledged meanwhile is not held against the evidence.
    known = Book(book.run, book.seed, book.started, own_time=book.own_time, refused=dict(book.refused))
    for key in list(book.order):
        known.entries[key] = book.entries[key]
        known.order.append(key)
    connection = await asyncpg.connect(places.database_url, timeout=30)
    try:
        devices = sorted({device for device, _ in known.order})
        groups = await stored_groups(connection, devices, begin)
    finally:
        await connection.close()
    arrived = await raw_digests(places, begin) if raw else []
    return judge(known, groups, await dead_letters(places, begin), arrived)


def check(book: Book, places: Places, *, raw: bool = True) -> Report:
    """Do what `examine` does, for callers without an event loop."""
    return asyncio.run(examine(book, places, raw=raw))


def settle(
    book: Book,
    places: Places,
    *,
    patience_seconds: float = 30.0,
    bound_seconds: float = 600.0,
    poll_seconds: float = 0.5,
) -> Report:
    """Check until nothing is missing, or nothing has changed for `patience_seconds`; return the last report.

    A server that does not answer counts as no change.
    """
    end = time.monotonic() + bound_seconds
    calm = time.monotonic() + patience_seconds
    last: tuple[int, ...] | None = None
    while True:
        error: Exception | None = None
        try:
            report = check(book, places, raw=False)
        except Exception as exc:
            error = exc
        else:
            state = (report.acknowledged, report.stored, report.dead_lettered, len(report.missing))
            if not report.missing:
                break
            if state != last:
                last, calm = state, time.monotonic() + patience_seconds
        if time.monotonic() > min(calm, end):
            if error is not None:
                raise error
            break
        time.sleep(poll_seconds)
    return check(book, places)
