"""What `faust -A streams decode` prints: every README's example works, and what is wrong is said."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from devices import testing
from devices.decode_cli import explain, payload_of
from devices.registry import DRIVERS, Registry

FAMILIES = sorted(path.parent.name for path in Path("devices").glob("*/driver.py"))


def run(driver: Any, argument: Any, **options: Any) -> Any:
    registry, errors = Registry.read("config", with_inactive=True)
    assert not errors
    return explain(driver, payload_of(argument, driver), registry, received_at=testing.NOW, **options)


def test_every_family_is_complete() -> None:
    """A family is registered and has driver, test, vectors, README and a profile."""
    assert set(FAMILIES) == set(DRIVERS)
    for family in FAMILIES:
        folder = Path("devices") / family
        assert (folder / "vectors.json").exists()
        assert list(folder.glob("test_*.py"))
        assert (Path("config/profiles") / f"{family}.yaml").exists()
        assert testing.readme_shows(family, family)


@pytest.mark.parametrize("family", FAMILIES)
def test_examples_of_the_readme(family: Any) -> None:
    """The command in a family's README prints readings, with its topic and without."""
    text = (Path("devices") / family / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```\n(faust -A streams decode .*?)```", text, re.DOTALL)
    words = shlex.split(example.replace("\\\n", " "))
    assert words[words.index("--driver") + 1] == family
    topic = words[words.index("--topic") + 1] if "--topic" in words else None
    for given in {topic, None}:
        found = run(family, words[-1], topic=given)
        assert found.accepted, found.text
        assert re.search(r"\d+ readings, \d+ values accepted, 0 refused", found.text)


def test_a_file_is_its_bytes(tmp_path: Any) -> None:
    """An argument that is a file is read; digits in it are bytes to a binary driver, themselves to a textual one."""
    path = tmp_path / "frame"
    path.write_bytes(b"2c5d200017b0816820ff9fff0f\n")
    assert payload_of(str(path), "light_controller") == b"2c5d200017b0816820ff9fff0f"
    assert payload_of(str(path), "efento")[:4] == b"\x2c\x5d\x20\x00"
    path.write_bytes(b"\x0a\x06\x28")
    assert payload_of(str(path), "efento") == b"\x0a\x06\x28"
    assert payload_of('[{"n": "a"}]', "senml") == b'[{"n": "a"}]'


def test_refused_values_are_shown() -> None:
    """A value that validation refuses is shown with its reason, beside what goes on."""
    frame = "098022000043454383000088137dd0077e7f7f7f7fffff9513b02e76170000000000000000000800000000"
    found = run("fluxor", frame)
    assert found.accepted
    assert "refused  T/T_int = 555.35: above_max" in found.text
    assert "T_ext  19.52 °C" in found.text
    assert "1 refused" in found.text


def test_dead_letters_are_said() -> None:
    """What would be a dead letter says its class and why."""
    found = run("fluxor", "00")
    assert not found.accepted
    assert "dead letter (poison): a Fluxor frame has 43 bytes" in found.text
    found = run("plain_json", '{"x": 1}', topic="nowhere/at/all")
    assert "dead letter (rejected, no_profile)" in found.text
    found = run("plain_json", '{"ts": 32503680000, "x": 1}')
    assert "in_future" in found.text
    assert "dead letter (rejected, rejected_value)" in found.text


def test_feedback_is_shown() -> None:
    """A feedback shows the command and what the device says of it."""
    found = run("fluxor", '{"uid": "abc-7", "status": 1}', topic="broker_data/7/feedback")
    assert found.accepted
    assert "feedback  command abc: success" in found.text


def test_unknown_driver() -> None:
    """A driver that is not registered is a KeyError, for the command to say."""
    with pytest.raises(KeyError):
        run("nothing", "00")


def test_device_given_by_hand() -> None:
    """A device id given by hand is the uplink's."""
    assert "device   elsewhere" in run("plain_json", '{"x": 1}', device_id="elsewhere").text
