"""What it costs to decode a message of each family, in processor time: the driver's call alone, and the whole way from
bytes to validated readings.

The messages are the families' own vectors. The best of ``ROUNDS`` rounds is told: what else the machine does only adds.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import cbor2

from bench import report
from devices import testing
from devices.model import Uplink
from devices.pipeline import read
from devices.testing import FAMILIES, uplink

ROUNDS = 30


class Case(NamedTuple):
    """A message, and how many microseconds its driver may take (None: nothing is promised)."""

    name: str
    family: str
    message: Uplink
    bound_us: float | None = None


def _vectors(family: str) -> Any:
    return json.loads((FAMILIES / family / "vectors.json").read_text(encoding="utf-8"))


def cases() -> list[Case]:
    """Return a message or more of each family."""
    efento = _vectors("efento")
    fluxor, light = _vectors("fluxor")[0], _vectors("light_controller")["frames"][0]
    birth = _vectors("sparkplug")["messages"][0]
    tts, zigbee = _vectors("tts"), _vectors("zigbee2mqtt")[0]
    node = "/".join(birth["topic"].split("/")[n] for n in (1, 3))
    found = [
        Case(
            f"efento, {len(vector['samples'])} samples",
            "efento",
            uplink(bytes.fromhex(vector["hex"]), "m", protocol="coap", device_id=vector["device_id"]),
            60.0,
        )
        for vector in efento["measurements"]
    ]
    info = efento["device_info"][0]
    found.append(
        Case(
            "efento, device information",
            "efento",
            uplink(bytes.fromhex(info["hex"]), "i", protocol="coap", device_id=info["device_id"]),
        )
    )
    frame = uplink(fluxor["mqtt_payload_ascii_hex"], f"broker_data/b/{fluxor['device_id']}/data")
    frame.device_id = fluxor["device_id"]
    schedule = uplink(light["hex"], f"broker_data/b/{light['id']}/scheduler_data", device_id=str(light["id"]))
    return [
        *found,
        Case("fluxor", "fluxor", frame, 25.0),
        Case("light controller", "light_controller", schedule, 25.0),
        Case("plain JSON", "plain_json", uplink(_vectors("plain_json")[0]["payload"], "devices/d1/telemetry")),
        Case("SenML, JSON", "senml", uplink(json.dumps(_vectors("senml")[0]["json"]), "senml/d1")),
        Case("CBOR map", "cbor_map", uplink(cbor2.dumps({"t": 21.5, "u": 40, "on": True}), "cbor/d1")),
        Case("Sparkplug, birth", "sparkplug", uplink(bytes.fromhex(birth["hex"]), birth["topic"], device_id=node)),
        Case("The Things Stack", "tts", uplink(json.dumps(tts["uplink"]), "v3/a/devices/dev1/up", device_id="dev1")),
        Case("Zigbee2MQTT", "zigbee2mqtt", uplink(json.dumps(zigbee["payload"]), zigbee["topic"])),
    ]


def microseconds(function: Callable[[], object], seconds: float) -> float:
    """Return the processor time of a call, the best of ``ROUNDS`` rounds that take about ``seconds`` together."""
    begun = time.process_time()
    for _ in range(100):
        function()
    calls = max(10, int(seconds / ROUNDS / max((time.process_time() - begun) / 100, 1e-7)))
    best = float("inf")
    for _ in range(ROUNDS):
        begun = time.process_time()
        for _ in range(calls):
            function()
        best = min(best, (time.process_time() - begun) / calls)
    return best * 1e6


def run(options: argparse.Namespace) -> None:
    """Measure, print, write."""
    facts = report.machine()
    registry = testing.registry()
    seconds = 0.3 if options.quick else 2.0
    rows, data = [], {}
    for case in cases():
        profile = testing.shipped_profile(case.family)
        driver = registry.driver(case.family)
        readings = len(driver.decode(case.message, profile))
        alone = microseconds(lambda d=driver, m=case.message, p=profile: d.decode(m, p), seconds)
        whole = microseconds(lambda m=case.message: read(m, registry), seconds)
        data[case.name] = {"decode_us": alone, "read_us": whole, "bound_us": case.bound_us, "readings": readings}
        bound = "" if case.bound_us is None else f"{case.bound_us:.0f}"
        rows.append((case.name, str(readings), f"{alone:.1f}", bound, f"{whole:.1f}"))
    body = report.table(("message", "readings", "decode µs", "bound µs", "with match and validation µs"), rows)
    report.publish("drivers-quick" if options.quick else "drivers", "Drivers", body, {"cases": data}, facts)


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add no options."""


def main() -> None:
    """Measure drivers alone."""
    parser = argparse.ArgumentParser(prog="python -m bench.drivers", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a short run")
    run(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
