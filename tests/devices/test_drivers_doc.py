"""The example of docs/drivers.md works as it stands: driver, profile, test, and what `decode` prints."""

from __future__ import annotations

import re
import shlex
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from devices import registry as families
from devices import testing
from devices.decode_cli import explain, payload_of
from devices.registry import Registry, driver_class
from devices.testing import uplink

DOC = Path("docs/drivers.md").read_text(encoding="utf-8")


def block(kind: str, number: int = 0) -> str:
    """Return a code block of the page."""
    blocks: list[tuple[str, str]] = re.findall(r"^```(\w*)\n(.*?)^```$", DOC, re.DOTALL | re.MULTILINE)
    return [text for name, text in blocks if name == kind][number]


@pytest.fixture
def tank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry]:
    """The family as the page has it, beside the shipped ones; for the length of a test."""
    name, _, target = re.findall(r'"(tank)"(: )"(.*)",', block("", 0))[0]
    module = types.ModuleType("devices.tank.driver")
    exec(compile(block("python", 0), "docs/drivers.md", "exec"), module.__dict__)  # noqa: S102 - the page's own code
    monkeypatch.setitem(sys.modules, "devices.tank", types.ModuleType("devices.tank"))
    monkeypatch.setitem(sys.modules, "devices.tank.driver", module)
    monkeypatch.setattr(families, "DRIVERS", {**families.DRIVERS, name: target})
    driver_class.cache_clear()
    profiles = tmp_path / "profiles"
    profiles.mkdir()
    (profiles / "tank.yaml").write_text(block("yaml", 0), encoding="utf-8")
    for schema in Path("config").glob("*.schema.json"):
        (tmp_path / schema.name).write_bytes(schema.read_bytes())
    monkeypatch.setattr(testing, "SCHEMAS", tmp_path)
    yield Registry.load(tmp_path)
    driver_class.cache_clear()


def test_its_message_gives_what_decode_prints(tank: Registry) -> None:
    """The command of the page prints the page's next block."""
    words = shlex.split(block("", 1))
    topic = words[words.index("--topic") + 1]
    found = explain("tank", payload_of(words[-1], "tank"), tank, topic=topic, received_at=testing.NOW)
    assert found.accepted
    assert found.text.rstrip() == block("", 2).rstrip()


@pytest.mark.usefixtures("tank")
def test_its_test_passes() -> None:
    """Every test function of the page's test."""
    names: dict[str, Any] = {}
    exec(compile(block("python", 1), "docs/drivers.md", "exec"), names)  # noqa: S102 - the page's own code
    tests = [found for name, found in names.items() if name.startswith("test_")]
    assert len(tests) == 3
    for test in tests:
        test()


def test_its_profile_and_command_work(tank: Registry) -> None:
    """A level above the tank's height is refused, and the command is two bytes to the meter's topic."""
    assert tank.mqtt_filters() == ["tanks/+/level"]
    outcome = testing.read(uplink(bytes.fromhex("80252468ffff6608"), "tanks/t-7/level", device_id="t-7"), tank)
    assert [(refused.label, refused.reason) for refused in outcome.rejections] == [("level", "above_max")]
    sent = tank.driver("tank").encode(
        "interval", {"seconds": 300}, request_id="r", device_id="t-7", state={}, now=testing.NOW
    )
    assert (sent.route, sent.data) == ("tanks/t-7/interval", b"\x2c\x01")
