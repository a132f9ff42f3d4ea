"""The simulator: one seed gives one traffic, frames say who they are, the checker finds what is planted."""

import dataclasses
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from devices import testing
from devices.model import DecodeError, Reading
from devices.pipeline import Refused
from tools.simulator import poison
from tools.simulator.checker import disorder, judge, overtakers
from tools.simulator.evidence import DeadLetter, Group, Origin, dead_letter, raw_digest
from tools.simulator.fleet import Plan, devices_of, traffic
from tools.simulator.ledger import Book, Ledger, load
from tools.simulator.message import MAX_SEQ, Message, Outcome, SetPoints, digest, run_tag, set_points, tag_and_seq

RUN = "0badcafe"
START = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)


class Clock:
    """A clock that goes on by 2 ms each time it is asked."""

    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> datetime:
        self.now += timedelta(milliseconds=2)
        return self.now


def messages(plan: Plan, run: str = RUN) -> list[Message]:
    """Return all that a plan sends."""
    return list(traffic(plan, devices_of(plan, run, START), Clock()))


def readings(message: Message) -> list[Reading]:
    """Return what the shipped drivers read in a message, validated."""
    found = testing.uplink(message.payload, message.route, device_id=message.device_id, received_at=START)
    return testing.read(found).readings


def rows_of(found: list[Reading]) -> Iterator[tuple[str, str, datetime, object]]:
    """Yield index, label, time and value of what is kept."""
    for reading in found:
        persist = reading.metadata.get("persist") or [True] * len(reading.values)
        for label, value, kept in zip(reading.labels, reading.values, persist, strict=True):
            if kept is not False and value is not None:
                yield reading.index, label, reading.timestamp, value


def group_of(message: Message) -> list[Group]:
    """Return what `readings` would have of a message that is stored, a group for each sample."""
    groups: dict[datetime, list[tuple[str, str, object]]] = {}
    for index, label, time, value in rows_of(readings(message)):
        groups.setdefault(time, []).append((index, label, value))
    made = []
    for time, rows in groups.items():
        values = {(index, label): value for index, label, value in rows}
        points = [values.get(("P", name)) for name in ("U_consigne", "U_hysteresys", "T_consigne", "T_hysteresys")]
        made.append(
            Group(
                device_id=message.device_id,
                time=time,
                rows=len(rows),
                seq=values.get(("seq", "seq")),  # type: ignore[arg-type]
                run=values.get(("run", "run")),  # type: ignore[arg-type]
                points=None if None in points else SetPoints(*points),  # type: ignore[arg-type]
            )
        )
    return made


def letter_of(message: Message) -> DeadLetter:
    """Return the dead letter that a message became."""
    return DeadLetter(message.device_id, message.digest, "normalizer", "poison", "devices.model.DecodeError", "no")


def written(sent: list[Message], path: Path | None = None) -> Book:
    """Return the book of a run in which all of `sent` was acknowledged."""
    plan = Plan(devices=30)
    with Ledger(path, RUN, 1, clock=START.timestamp) as ledger:
        for device in devices_of(plan, RUN, START):
            ledger.device(device.device_id, device.family, own_time=device.own_time)
        for message in sent:
            ledger.acknowledged(message)
        return ledger.book


def raw_of(sent: list[Message]) -> list[tuple[str, str, str]]:
    """Return the records of `iot_raw_data` that `sent` gives."""
    return [(message.device_id, message.digest, f"iot_raw_data[0]@{n}") for n, message in enumerate(sent)]


PLAN = Plan(devices=30, seed=5, rate=0, messages=900)
MIXED = dataclasses.replace(PLAN, duplicates=0.2, poison=0.1, late=0.1)


def test_one_seed_one_traffic() -> None:
    """The same seed, run and clock give the same messages; another seed gives others from other devices."""
    assert messages(MIXED) == messages(MIXED)
    others = {message.device_id for message in messages(dataclasses.replace(MIXED, seed=6))}
    assert not others & {message.device_id for message in messages(MIXED)}


def test_devices_are_the_same_in_every_run() -> None:
    """A run changes what messages carry, not who sends them."""
    ids = [[d.device_id for d in devices_of(PLAN, run, START)] for run in ("a", "b")]
    assert ids[0] == ids[1]


def test_shares_of_a_plan() -> None:
    """About as many messages are doubled, spoilt and late as the plan says; each device's seq has no gap."""
    sent = messages(MIXED)
    unique = {(message.device_id.split("-0-")[0], message.seq): message for message in sent}
    assert sum(1 for _ in unique) >= 890
    assert 1000 < len(sent) < 1180
    assert 50 < sum(message.expect is Outcome.DEAD for message in unique.values()) < 140
    assert 40 < sum(message.late for message in unique.values()) < 130


def test_every_message_reads_as_what_the_ledger_expects() -> None:
    """The shipped drivers read every message, and give as many rows and samples as it says."""
    for message in messages(PLAN):
        rows = list(rows_of(readings(message)))
        assert len(rows) == message.rows, message
        assert len({time for _, _, time, _ in rows}) == message.samples


def test_stored_rows_say_which_message_they_are() -> None:
    """Run and seq come back from what is stored, for frames as well as for JSON."""
    sent = messages(PLAN)
    book = written(sent)
    groups = [group for message in sent for group in group_of(message)]
    assert judge(book, groups, []).clean
    assert judge(dataclasses.replace(book, run="another"), groups, []).stored == 0


def test_json_times_are_the_devices_own_and_never_alike() -> None:
    """A device's samples have increasing times, also when the clock does not move."""
    plan = dataclasses.replace(PLAN, devices=6, messages=60)
    sent = list(traffic(plan, devices_of(plan, RUN, START), lambda: START))
    for device in {message.device_id for message in sent if message.sampled_at}:
        times = [time for m in sent if m.device_id == device for *_, time, _ in rows_of(readings(m))]
        assert times == sorted(times)
        assert len(set(times)) == sum(m.samples for m in sent if m.device_id == device)


@given(st.integers(0, MAX_SEQ), st.text(max_size=20))
def test_set_points_carry_run_and_seq(seq: int, run: str) -> None:
    """Any run and seq come back from the set points, which are what a controller could have."""
    points = set_points(run, seq)
    assert tag_and_seq(points) == (run_tag(run), seq)
    assert 0 <= points.humidity <= 100
    assert 15 <= points.temperature <= 30


def test_seq_beyond_a_frame_is_refused() -> None:
    """A sequence number that does not fit is an error, not another message's number."""
    with pytest.raises(ValueError, match="does not fit"):
        set_points(RUN, MAX_SEQ + 1)


@pytest.mark.parametrize("kind", poison.KINDS)
def test_poison_is_poison_and_known_again(kind: str) -> None:
    """No driver reads it, and its dead letter names the message: by its bytes, or by a device id that is its alone."""
    spoilt = [
        poison.spoil(message, kind)
        for message in messages(dataclasses.replace(PLAN, messages=30))
        if kind in poison.kinds_of(message)
    ]
    assert spoilt
    assert len({(message.device_id, message.digest) for message in spoilt}) == len(spoilt)
    for message in spoilt:
        assert message.expect is Outcome.DEAD
        if kind == "too_large":
            assert len(message.payload) > 1024 * 1024
            continue
        with pytest.raises((DecodeError, Refused)):
            readings(message)


def test_hot_device_crosses_and_comes_back() -> None:
    """The first device measures about 22 °C, about 48 °C while it is hot, and about 22 °C again."""
    plan = Plan(devices=1, hot=(5, 25))
    (device,) = devices_of(plan, RUN, START)
    seen = {}
    for second in (0, 4, 5, 24, 25, 60):
        at = START + timedelta(seconds=second)
        (reading,) = (r for r in readings(device.next(at)) if r.index == "T")
        seen[second] = reading.values[0]
    assert {second for second, value in seen.items() if value > 40} == {5, 24}
    assert all(20 < value < 24 for second, value in seen.items() if second not in (5, 24))


@pytest.mark.parametrize(
    "wrong", [{"devices": 0}, {"rate": -1}, {"poison": 1.5}, {"duplicates": -0.1}, {"poison_kinds": ("x",)}]
)
def test_plan_that_cannot_be(wrong: dict[str, object]) -> None:
    """A plan says what is wrong with it before anything connects."""
    with pytest.raises(ValueError, match=next(iter(wrong)).removesuffix("_kinds")):
        Plan(**wrong)  # type: ignore[arg-type]


def test_ledger_reads_back(tmp_path: Path) -> None:
    """What was written is read; a line cut by a crash is left out, and the next run begins on a line of its own."""
    path = tmp_path / "ledger.jsonl"
    sent = messages(MIXED)
    book = written(sent, path)
    with path.open("a") as file:
        file.write('{"kind": "ack", "dev')
    written(sent[:10], path)
    first, second = load(path)
    assert first.entries.keys() == book.entries.keys()
    assert all(first.entries[key].expect is book.entries[key].expect for key in book.entries)
    assert any(entry.acks == 2 for entry in first.entries.values())
    assert len(second.order) == len({(message.device_id, message.seq) for message in sent[:10]})


def test_ledger_of_nothing_is_said(tmp_path: Path) -> None:
    """A file without a run is an error that names it."""
    path = tmp_path / "x"
    path.write_text("hello\n")
    with pytest.raises(ValueError, match="holds no run"):
        load(path)


def evidence(sent: list[Message]) -> tuple[list[Group], list[DeadLetter]]:
    """Return rows and dead letters of a pipeline that does all right."""
    fine = {(m.device_id, m.seq): m for m in sent if m.expect is Outcome.STORED}
    letters = [letter_of(m) for m in sent if m.expect is Outcome.DEAD]
    return [group for message in fine.values() for group in group_of(message)], letters


def test_checker_is_content_with_what_is_right() -> None:
    """Stored, dead-lettered and nothing missing add up; copies count as delivered again."""
    sent = messages(MIXED)
    groups, letters = evidence(sent)
    report = judge(written(sent), groups, letters, raw_of(sent))
    assert report.clean, report.text()
    assert report.acknowledged == report.stored + report.dead_lettered == len({(m.device_id, m.seq) for m in sent})
    assert report.kafka_copies == len(sent) - report.acknowledged


@pytest.mark.parametrize("own_time", [True, False])
def test_checker_finds_a_planted_loss(own_time: bool) -> None:
    """One message without a row is named, with where it was last seen."""
    sent = messages(PLAN)
    lost = next(m for m in sent[200:] if (m.sampled_at is not None) is own_time)
    groups = [group for message in sent if message is not lost for group in group_of(message)]
    report = judge(written(sent), groups, [], raw_of(sent))
    assert [(found.device_id, found.seq) for found in report.missing] == [(lost.device_id, lost.seq)]
    assert "iot_raw_data[0]@" in report.missing[0].detail
    assert not report.ok
    gone = judge(written(sent), groups, [], [raw for raw in raw_of(sent) if raw[1] != lost.digest])
    assert "not in iot_raw_data" in gone.missing[0].detail


@pytest.mark.parametrize("own_time", [True, False])
def test_checker_finds_a_row_that_is_missing(own_time: bool) -> None:
    """A message of which one row is lost is missing, and says how many rows there are."""
    sent = messages(PLAN)
    hurt = next(m for m in sent[100:] if (m.sampled_at is not None) is own_time)
    groups = [
        dataclasses.replace(group, rows=group.rows - (message is hurt))
        for message in sent
        for group in group_of(message)
    ]
    report = judge(written(sent), groups, [])
    assert [(found.device_id, found.seq) for found in report.missing] == [(hurt.device_id, hurt.seq)]
    assert f"of {hurt.rows} rows" in report.missing[0].detail


def test_checker_finds_a_planted_duplicate() -> None:
    """A second sample of a message that says when it was sampled is a duplicate row; of a frame it came twice."""
    sent = messages(PLAN)
    groups = [group for message in sent for group in group_of(message)]
    twice = [next(m for m in sent if (m.sampled_at is not None) is own) for own in (True, False)]
    again = [
        dataclasses.replace(group, time=group.time + timedelta(seconds=1)) for m in twice for group in group_of(m)[:1]
    ]
    report = judge(written(sent), groups + again, [])
    assert [key for key, _, _ in report.duplicates] == [(twice[0].device_id, twice[0].seq)]
    assert [key for key, _, _ in report.repeated] == [(twice[1].device_id, twice[1].seq)]
    assert not report.ok


def test_frame_that_was_sent_twice_may_be_stored_twice() -> None:
    """A copy of a frame without a sample time is a second message; its row is no fault."""
    frame = next(m for m in messages(PLAN) if m.sampled_at is None)
    (group,) = group_of(frame)
    later = dataclasses.replace(group, time=group.time + timedelta(seconds=1))
    assert judge(written([frame, frame]), [group, later], []).clean


def test_checker_tells_dead_letters_that_nobody_meant() -> None:
    """A readable message that became a dead letter is accounted for and named; stored poison is named too."""
    sent = messages(dataclasses.replace(PLAN, poison=0.1))
    groups, letters = evidence(sent)
    good = next(m for m in sent if m.expect is Outcome.STORED and m.sampled_at is not None)
    bad = next(m for m in sent if m.expect is Outcome.DEAD)
    left = [group for group in groups if (group.device_id, group.time) != (good.device_id, group_of(good)[0].time)]
    stored = Group(bad.device_id, START, 5, bad.seq, RUN, set_points(RUN, bad.seq))
    letters = [letter for letter in letters if letter.digest != bad.digest] + [letter_of(good)]
    report = judge(written(sent), [*left, stored], letters)
    assert (good.device_id, good.seq) in [key for key, _ in report.unexpected_dead]
    assert report.survived == [(bad.device_id, bad.seq)]
    assert report.ok
    assert not report.clean


def test_checker_knows_order() -> None:
    """What comes after a younger message of its device is named, unless it was sent so or has come before."""
    sent = messages(dataclasses.replace(PLAN, devices=1, messages=6))
    book = written(sent)
    arrivals = [(m.device_id, m.digest) for m in sent]
    assert disorder(book, arrivals) == (0, [])
    assert disorder(book, [*arrivals, *arrivals[2:]]) == (4, [])
    swapped = [arrivals[0], arrivals[2], arrivals[1], *arrivals[3:]]
    assert disorder(book, swapped) == (0, [(sent[1].device_id, 1)])
    late = written([dataclasses.replace(m, late=m.seq == 1) for m in sent])
    assert disorder(late, swapped) == (0, [])


class FakeRecord:
    """A consumed record."""

    def __init__(self, key: bytes, value: bytes, headers: list[tuple[str, bytes]]) -> None:
        self.key, self.value, self.headers = key, value, headers


@pytest.mark.parametrize("payload", [b'{"a":1}', b"\xff\x00", b""])
def test_dead_letter_of_a_device_message_has_its_digest(payload: bytes) -> None:
    """Text, bytes and nothing: the fingerprint is that of the device's bytes."""
    try:
        fields: dict[str, str | None] = {"payload": payload.decode(), "payload_hex": None}
    except UnicodeDecodeError:
        fields = {"payload": None, "payload_hex": payload.hex()}
    value = msgspec.json.encode({"device_id": "d", "request_id": "r", **fields})
    headers = [("dlq-stage", b"normalizer"), ("dlq-class", b"poison")]
    found = dead_letter(FakeRecord(b"d", value, headers))  # type: ignore[arg-type]
    assert (found.device_id, found.digest, found.stage, found.kind) == ("d", digest(payload), "normalizer", "poison")
    assert raw_digest(value) == ("d", digest(payload))


def test_dead_letter_of_an_oversize_message_is_known_by_its_hash() -> None:
    """Only the first KiB is there; the header has the hash of the whole."""
    import hashlib

    whole = b"x" * 2000
    headers = [("dlq-sha256", hashlib.sha256(whole).hexdigest().encode()), ("dlq-class", b"rejected")]
    found = dead_letter(FakeRecord(b"d", whole[:1024], headers))  # type: ignore[arg-type]
    assert (found.device_id, found.digest, found.kind) == ("d", digest(whole), "rejected")


def test_dead_letter_of_a_reading_is_known_by_its_time() -> None:
    """A reading that a sink refused accounts for the rows that its message lacks."""
    sent = [next(m for m in messages(PLAN) if m.sampled_at and m.samples == 1)]
    (group,) = group_of(sent[0])
    (reading,) = (r for r in readings(sent[0]) if r.index == "seq")
    found = dead_letter(FakeRecord(b"", msgspec.json.encode(reading), [("dlq-class", b"poison")]))  # type: ignore[arg-type]
    report = judge(written(sent), [dataclasses.replace(group, rows=group.rows - 1)], [found])
    assert report.ok
    assert [key for key, _ in report.unexpected_dead] == [(sent[0].device_id, sent[0].seq)]


def origins(told: str) -> list[Origin]:
    """Return records from words of device, message and perhaps partition: `a1 a2 b1/3`."""
    words = (word.partition("/") for word in told.split())
    return [Origin(name[0], name, int(partition or 0)) for name, _, partition in words]


@pytest.mark.parametrize(
    ("raw", "validated", "overtaken"),
    [
        ("a1 b1 a2 b2", "b1 b1 a1 a1 b2 a2", ""),
        ("a1 a2 a3", "a1 a3 a2", "a2"),
        ("a1 a2 a3", "a3 a1 a2", "a1 a2"),
        # a message without readings, redeliveries there and here, a message that raw does not have
        ("a1 a2 a3", "a1 a3", ""),
        ("a1 a2 a1 a2 a3", "a1 a2 a1 a2 a2 a3 a1", ""),
        ("a1 a2", "a9 a2 a9", ""),
        ("a1 a2 a1", "a2 a1", "a1"),
        # another partition of raw has an order of its own
        ("a2/1 a1/0", "a1/0 a2/0", ""),
        ("", "a1 a2", ""),
    ],
)
def test_messages_that_jump_ahead_are_told(raw: str, validated: str, overtaken: str) -> None:
    """What first comes behind a younger message of its device is told; what comes again, or is left out, is not."""
    assert [origin.request_id for origin in overtakers(origins(raw), origins(validated))] == overtaken.split()
