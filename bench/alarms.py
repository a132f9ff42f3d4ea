"""What the evaluation of alarms costs: 1,000 rules, 10,000 devices, states packed in a dict.

    python -m bench.alarms [READINGS]

Prints µs of CPU per reading and rule in the mean (states read, evaluated, packed and written back), what a reading
costs that no rule names, and how long a million states take to be read at a start. Single process, one core.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime

from devices.alarms.engine import AlarmEngine
from devices.alarms.model import AlarmRule, AlarmState, DeviceInfo, Repeat, Schedule, pack
from devices.model import Reading

DEVICES = 10_000
RULES = 1_000
PROFILES = 50
TAGS = 250
START = 1_750_000_000.0


def make_rules(rng: random.Random) -> list[AlarmRule]:
    """500 rules for a device, 250 a profile, 250 a tag; a fifth each with duration, repeat, schedule, silence."""
    rules = []
    for number in range(RULES):
        kind = number % 5
        rule = AlarmRule(
            id=f"rule-{number}",
            index=rng.choice(["T", "U"]),
            math_operator=rng.choice([">", "<", ">=", "outside"]),
            threshold=30.0,
            level="WARNING",
            recipients=["ops@example.org"],
        )
        if rule.math_operator == "outside":
            rule.threshold = [10, 30]
        elif rule.math_operator == "<":
            rule.threshold, rule.clear_threshold = 10, 12
        else:
            rule.clear_threshold = 28.0
        if kind == 1:
            rule.duration_seconds = 300
        elif kind == 2:
            rule.repeat = Repeat(count=3, within_seconds=600)
        elif kind == 3:
            rule.schedule = Schedule(start="08:00", end="18:00", time_zone="Europe/Paris")
        elif kind == 4:
            rule.no_data_seconds = 3600
        if number < 500:
            rule.device_id = f"device-{rng.randrange(DEVICES)}"
        elif number < 750:
            rule.profile = f"profile-{number % PROFILES}"
        else:
            rule.tag = f"tag-{number % TAGS}"
        rules.append(rule)
    return rules


def make_fleet(rng: random.Random) -> list[DeviceInfo]:
    """10,000 devices, each of one profile and with one tag."""
    return [
        DeviceInfo(
            device_id=f"device-{number}",
            profile=f"profile-{rng.randrange(PROFILES)}",
            tags=(f"tag-{rng.randrange(TAGS)}",),
        )
        for number in range(DEVICES)
    ]


def make_readings(rng: random.Random, fleet: list[DeviceInfo], count: int) -> list[tuple[Reading, DeviceInfo]]:
    """Readings of two labels, a second apart, mostly good values, one in fifty beyond its threshold."""
    found = []
    for number in range(count):
        info = fleet[rng.randrange(len(fleet))]
        value = rng.uniform(30, 50) if rng.random() < 0.02 else rng.uniform(13, 27)
        reading = Reading(
            request_id="6f9619ff-8b86-d011-b42d-00c04fc964ff",
            timestamp=datetime.fromtimestamp(START + number / 100, UTC),
            device_id=info.device_id,
            index=rng.choice(["T", "U"]),
            values=[value, value + 1],
            labels=["CH1", "CH2"],
            display_names=["Channel 1", "Channel 2"],
            metadata={"units": ["°C", "°C"], "category": "measurements"},
        )
        found.append((reading, info))
    return found


def timed(work: Callable[[], None]) -> float:
    """Return the CPU seconds of ``work``."""
    began = time.process_time()
    work()
    return time.process_time() - began


def main(count: int) -> None:
    """Run all three and print the table."""
    rng = random.Random(7)
    fleet = make_fleet(rng)
    engine = AlarmEngine({}, make_rules(rng))
    readings = make_readings(rng, fleet, count)

    def evaluate() -> None:
        for reading, info in readings:
            engine.process(reading, info, reading.timestamp.timestamp())

    seconds = timed(evaluate)
    pairs = engine.counts["evaluated"]
    opened = engine.counts["opened"]
    print(
        f"{RULES} rules, {DEVICES} devices, {count} readings of two labels: {pairs} evaluations, {opened} alarms opened"
    )
    print(f"{seconds / pairs * 1e6:8.2f} µs per reading and rule")

    strangers = [(reading, DeviceInfo(device_id=f"other-{info.device_id}")) for reading, info in readings]
    for reading, info in strangers:
        reading.device_id = info.device_id

    def ignore() -> None:
        for reading, info in strangers:
            engine.process(reading, info, START)

    print(f"{timed(ignore) / count * 1e6:8.2f} µs per reading that no rule names")

    state = AlarmState(rule=next(iter(engine.index)).fingerprint, time=START, seen=START)
    stored = {f"device-{number}|T|CH1|rule-0": pack(state) for number in range(1_000_000)}
    fresh = AlarmEngine(stored, [AlarmRule(id="rule-0", tag="x", threshold=1)])
    fresh.set_rules(engine.index.rules.values(), START)
    print(f"{timed(lambda: fresh.rebuild(START) and None):8.2f} s to take up 1,000,000 states")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 100_000)
