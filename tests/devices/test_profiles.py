"""Profiles: what is wrong is said all at once, with its line; what matches is found fast and by the first match."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from devices.configfile import ConfigErrors
from devices.model import DriverOutOfMemory
from devices.pipeline import Refused, read
from devices.profiles import MAX_CACHED, Match, Profile, compile_profile
from devices.registry import DeviceEntry, Registry, driver_class
from devices.testing import NOW, uplink
from streams.resilience.failures import FailureClass, classify

SHIPPED = Path("config")

PROFILE = """\
profile: weather
driver: plain_json
match:
  protocol: mqtt
  topic: weather/{device_id}
values:
  t: {unit: °C, min: -50, max: 60}
"""


def folder(tmp_path: Any, devices: Any = None, **profiles: Any) -> Any:
    (tmp_path / "profiles").mkdir()
    for name, text in profiles.items():
        (tmp_path / "profiles" / f"{name}.yaml").write_text(text, encoding="utf-8")
    if devices is not None:
        (tmp_path / "devices.yaml").write_text(devices, encoding="utf-8")
    return tmp_path


def test_shipped_configuration_loads() -> None:
    """The shipped folder has no error, and the families of the contract are active."""
    registry = Registry.load(SHIPPED)
    assert {"fluxor", "plain_json"} <= {profile.name for profile in registry.profiles}
    for profile in registry.profiles:
        assert registry.driver(profile).name == profile.driver


def test_subscriptions_cover_what_is_active_and_never_everything() -> None:
    """The filters are those of the active profiles; none is #, none would bring back our own commands."""
    filters = Registry.load(SHIPPED).mqtt_filters()
    assert {"broker_data/+/+/data", "broker_data/+/feedback", "devices/+/telemetry"} <= set(filters)
    assert "#" not in filters
    command = Match(protocol="mqtt", route="x")
    assert command.params(["broker_data", "7", "command"]) is None
    assert not any(Match(protocol="mqtt", route=f).params(["broker_data", "7", "command"]) is not None for f in filters)


def test_covered_filters_are_left_out(tmp_path: Any) -> None:
    """A filter that another covers is not subscribed to: some brokers would deliver twice."""
    general = PROFILE.replace("weather/{device_id}", "weather/#").replace("profile: weather", "profile: all")
    registry = Registry.load(folder(tmp_path, a=PROFILE, b=general))
    assert registry.mqtt_filters() == ["weather/#"]


def test_coap_paths_have_methods() -> None:
    """CoAP paths come with the methods that their profiles take."""
    assert Registry.load(SHIPPED).coap_paths()["telemetry/{device_id}"] == ("POST",)


@pytest.mark.parametrize(
    ("protocol", "route", "device_id"),
    [
        ("mqtt", "broker_data/7/2261001/data", "2261001"),
        ("mqtt", "broker_data/7/feedback", "7"),
        ("mqtt", "devices/a b/telemetry", "a b"),
        ("coap", "telemetry/x", "x"),
        ("mqtt", "telemetry/x", None),
        ("mqtt", "devices//telemetry", None),
        ("mqtt", "devices/a\x07b/telemetry", None),
        ("mqtt", f"devices/{'x' * 256}/telemetry", None),
        ("mqtt", "broker_data/7/command", None),
        ("mqtt", "", None),
        ("http", "x", None),
    ],
)
def test_device_of_a_route(protocol: Any, route: Any, device_id: Any) -> None:
    """The route names the device; what no store could hold as an id is none."""
    assert Registry.load(SHIPPED).device_id(protocol, route) == device_id


def test_every_error_at_once_with_its_line(tmp_path: Any) -> None:
    """Errors of all files come together; each names file, line, what was found, what is allowed."""
    wrong = PROFILE.replace("min: -50", "minn: -50").replace("plain_json", "plain_jsn").replace("°C", "[1]")
    swapped = PROFILE.replace("profile: weather", "profile: other").replace("min: -50", "min: 61")
    devices = "devices:\n  - device_id: a\n    profile: nowhere\n  - device_id: a\n"
    path = folder(
        tmp_path,
        devices,
        a=wrong,
        b=swapped,
        c="profile: [\n",
        d=PROFILE.replace("topic: weather/{device_id}", "path: x"),
        e=PROFILE,
        f=PROFILE,
        g="profile: g\nprofile: g\ndriver: plain_jsn\nmatch: {protocol: mqtt, topic: '+/{a}'}\n",
    )
    with pytest.raises(ConfigErrors) as caught:
        Registry.load(path)
    found = {(Path(error.file).name, error.line, error.pointer) for error in caught.value.errors}
    assert ("a.yaml", 7, "/values/t/minn") in found
    assert ("a.yaml", 7, "/values/t/unit") in found
    assert ("b.yaml", 7, "/values/t/min") in found
    assert ("c.yaml", 2, "") in found
    assert any(name == "d.yaml" and pointer.startswith("/match") for name, _, pointer in found)
    assert ("f.yaml", 1, "/profile") in found
    assert ("g.yaml", 2, "/profile") in found
    assert ("g.yaml", 3, "/driver") in found
    assert ("g.yaml", 4, "/match/topic") in found
    assert ("devices.yaml", 3, "/devices/0/profile") in found
    assert ("devices.yaml", 4, "/devices/1/device_id") in found
    text = str(caught.value)
    assert "do you mean min?" in text
    assert "found [1]; allowed: string" in text


def test_errors_within_alternatives_say_what_was_meant(tmp_path: Any) -> None:
    """A match is one or a list; what is wrong in one is said of that one, not that nothing fits."""
    text = PROFILE.replace(
        "  protocol: mqtt\n  topic: weather/{device_id}\n",
        "  - {protocol: mqtt, path: a, topc: x}\n"
        "  - {protocol: http, topic: a/b}\n"
        "  - {protocol: coap, path: 'a{b}/c'}\n",
    )
    found = [str(error).split(": ", 1)[1] for error in Registry.read(folder(tmp_path, a=text))[1]]
    assert any(error.startswith("/match/0/topc: unknown key; do you mean topic?") for error in found)
    assert any(error.startswith("/match/0: the key topic is missing") for error in found)
    assert "/match/0: the key path does not belong here" in found
    assert any('/match/1/protocol: wrong enum; found "http"; allowed: mqtt, coap' in error for error in found)
    right = text.replace("path: a, topc: x", "topic: a/+").replace(
        "{protocol: http, topic: a/b}", "{protocol: mqtt, topic: b/a}"
    )
    (tmp_path / "profiles" / "a.yaml").write_text(right, encoding="utf-8")
    (only,) = Registry.read(tmp_path)[1]
    assert only.pointer == "/match/2/path"
    assert only.found == '"a{b}"'


def test_an_unknown_driver_is_told_what_there_is(tmp_path: Any) -> None:
    """The error for a driver that is not registered lists those that are."""
    with pytest.raises(ConfigErrors, match=r"allowed: .*fluxor"):
        Registry.load(folder(tmp_path, a=PROFILE.replace("plain_json", "nothing")))


def test_driver_options_are_checked(tmp_path: Any) -> None:
    """An option that the driver does not take is an error at its line."""
    with pytest.raises(ConfigErrors, match=r"a\.yaml:8: /colour: unknown key"):
        Registry.load(folder(tmp_path, a=PROFILE + "options: {colour: red}\n"))


def test_no_profile_at_all_is_an_error(tmp_path: Any) -> None:
    """A folder without profiles is most likely the wrong folder."""
    with pytest.raises(ConfigErrors, match="CONFIG_PATH"):
        Registry.load(tmp_path)


def test_inactive_profile_matches_nothing(tmp_path: Any) -> None:
    """A profile that is shipped as inactive neither matches nor is subscribed to, and no device may ask for it."""
    path = folder(tmp_path, a=PROFILE + "active: false\n", b=PROFILE.replace("weather", "rain"))
    registry = Registry.load(path)
    assert registry.mqtt_filters() == ["rain/+"]
    with pytest.raises(Refused) as caught:
        read(uplink('{"t": 1}', "weather/d1"), registry)
    assert caught.value.reason == "no_profile"
    (path / "devices.yaml").write_text("devices:\n  - {device_id: a, profile: weather}\n")
    with pytest.raises(ConfigErrors, match="not active"):
        Registry.load(path)


def test_first_match_wins_in_order(tmp_path: Any) -> None:
    """Profiles match by `order`, then by file name; a device that names a profile gets that one."""
    second = PROFILE.replace("profile: weather", "profile: second")
    first = PROFILE.replace("profile: weather", "profile: first") + "order: 5\n"
    registry = Registry.load(
        folder(tmp_path, "devices:\n  - {device_id: special, profile: second}\n", a=second, b=first)
    )
    assert registry.match(uplink("{}", "weather/d1")).name == "first"
    assert registry.match(uplink("{}", "weather/special", device_id="special")).name == "second"


def test_devices_of_a_match(tmp_path: Any) -> None:
    """A match can be for some devices only."""
    text = PROFILE.replace("  topic:", "  devices: ['st-*']\n  topic:")
    registry = Registry.load(folder(tmp_path, a=text))
    assert registry.match(uplink("{}", "weather/st-1", device_id="st-1")) is not None
    assert registry.match(uplink("{}", "weather/other", device_id="other")) is None
    with pytest.raises(Refused, match="profile weather's, which does not allow device 'other'") as caught:
        read(uplink("{}", "weather/other", device_id="other"), registry)
    assert caught.value.reason == "device_not_allowed"


LIGHT = "2c5d200017b0816820ff9fff0f"


@pytest.mark.parametrize(
    ("data", "route", "protocol", "device_id"),
    [
        (LIGHT, "broker_data/b1/999/scheduler_data", "mqtt", "999"),
        ("2c5d2000" + "00" * 39, "broker_data/b1/999/data", "mqtt", "999"),
        (b"\x0a\x06\x28\x2c\x02\x42\x4e\xed", "m", "coap", "282c02424eee"),
    ],
    ids=["light controller", "fluxor", "efento"],
)
def test_a_payload_of_another_device_is_refused(data: str | bytes, route: str, protocol: str, device_id: str) -> None:
    """A message whose payload names another device than its topic is no message of either: refused, not poison."""
    with pytest.raises(Refused) as caught:
        read(uplink(data, route, protocol=protocol, device_id=device_id), Registry.load(SHIPPED))
    assert caught.value.reason == "another_device"


def test_plain_json_may_name_its_device(tmp_path: Any) -> None:
    """Option device_field: the field is no value, and must be the topic's device."""
    registry = Registry.load(folder(tmp_path, a=PROFILE + "options: {device_field: id}\n"))
    assert len(read(uplink('[{"t": 1, "id": "d1"}, {"t": 2}]', "weather/d1"), registry).readings) == 2
    with pytest.raises(Refused) as caught:
        read(uplink('[{"t": 1, "id": "d1"}, {"t": 2, "id": "d2"}]', "weather/d1"), registry)
    assert caught.value.reason == "another_device"


def test_unknown_devices_are_refused_where_that_is_wanted() -> None:
    """With `known`, data of others is refused; a broker's feedback names no device and passes."""
    registry = Registry.load(SHIPPED)
    with pytest.raises(Refused) as caught:
        read(uplink('{"t": 1}', "devices/d1/telemetry"), registry, known={"d2"}.__contains__)
    assert caught.value.reason == "unknown_device"
    feedback = uplink('{"uid": "r-1", "status": 1}', "broker_data/7/feedback", device_id="7")
    assert read(feedback, registry, known=set().__contains__).feedback is not None


def test_the_bound_of_a_sample_s_future_can_be_set() -> None:
    """READING_FUTURE_LIMIT_SECONDS: a sample an hour ahead passes with a day, and not with a minute."""
    registry = Registry.load(SHIPPED)
    later = (NOW + timedelta(hours=1)).isoformat()
    ahead = uplink(f'{{"t": 1, "ts": "{later}"}}', "devices/d1/telemetry")
    assert len(read(ahead, registry).readings) == 1
    with pytest.raises(Refused):
        read(ahead, registry, max_ahead=timedelta(minutes=1))


def test_device_overrides(tmp_path: Any) -> None:
    """What the configuration says of one device wins over its profile, for that device alone."""
    devices = """\
devices:
  - device_id: hot
    name: Furnace
    tags: [indoor]
    config:
      category: furnace
      values: {t: {max: 900}}
"""
    registry = Registry.load(folder(tmp_path, devices, a=PROFILE))
    hot = read(uplink('{"t": 800}', "weather/hot", device_id="hot"), registry)
    assert hot.readings[0].metadata["category"] == "furnace"
    assert hot.readings[0].metadata["units"] == ["°C"]
    with pytest.raises(Refused):
        read(uplink('{"t": 901}', "weather/hot", device_id="hot"), registry)
    with pytest.raises(Refused):
        read(uplink('{"t": 800}', "weather/d1"), registry)
    assert registry.device("hot").tags == ("indoor",)
    registry.set_device(DeviceEntry(device_id="hot", config={"values": {"t": {"max": 100}}}))
    with pytest.raises(Refused):
        read(uplink('{"t": 800}', "weather/hot", device_id="hot"), registry)
    registry.remove_device("hot")
    assert registry.device("hot") is None


def test_inactive_device_is_refused() -> None:
    """Messages of a device that is configured as not active are refused with that reason."""
    registry = Registry.load(SHIPPED)
    registry.set_device(DeviceEntry(device_id="d1", active=False))
    with pytest.raises(Refused) as caught:
        read(uplink('{"t": 1}', "devices/d1/telemetry"), registry)
    assert caught.value.reason == "device_inactive"


@pytest.mark.parametrize(
    ("test", "payload", "accepted"),
    [
        ({"length": 4}, b"abcd", True),
        ({"length": [2, 4]}, b"abc", False),
        ({"hex": True}, b"00ff", True),
        ({"hex": True}, b"00f", False),
        ({"hex": True}, b"00zzff", False),
        ({"hex": False}, b"{}", True),
        ({"starts_with_hex": "0a06"}, b"\x0a\x06x", True),
        ({"starts_with_hex": "0a06"}, b"\x0a", False),
        ({"json_fields": ["a"]}, b'{"a": 1}', True),
        ({"json_fields": ["a", "b"]}, b'{"a": 1}', False),
        ({"json_fields": ["a"]}, b"[", False),
    ],
)
def test_payload_tests(test: Any, payload: Any, accepted: Any) -> None:
    """A match can look at length, hexadecimal text, first bytes and JSON fields."""
    raw = {
        "profile": "p",
        "driver": "plain_json",
        "match": {"protocol": "mqtt", "topic": "x/{device_id}", "payload": test},
    }
    registry = Registry([compile_profile(raw)])
    assert (registry.match(uplink(payload, "x/d1")) is not None) is accepted


def test_caches_are_bounded() -> None:
    """A device that makes up field names and topics costs time, not memory."""
    registry = Registry.load(SHIPPED)
    profile = registry.profile("plain_json")
    for number in range(MAX_CACHED + 500):
        shape = profile.shape(f"x{number}", (f"x{number}",))
        assert profile.shape_of(f"x{number}", shape.labels) is shape
    assert len(profile._by_labels) <= MAX_CACHED
    assert len(profile._shapes) <= MAX_CACHED
    profile.shape("y" * 10_000, ("y" * 10_000,))
    assert all(len(index) < 10_000 for index, *_ in profile._by_labels)


def test_what_a_driver_raises_is_poison() -> None:
    """Whatever a driver raises becomes a DecodeError that names it; it never gets further."""
    registry = Registry.load(SHIPPED)
    driver = registry.driver("plain_json")
    driver.decode = lambda *_: 1 / 0
    with pytest.raises(ValueError, match="driver plain_json failed on this message: ZeroDivisionError"):
        read(uplink("{}", "devices/d1/telemetry"), registry)


def test_a_driver_without_memory_is_tried_again_and_then_given_up() -> None:
    """It is neither the message's fault at once nor waited for as long as it takes: a few attempts decide."""
    registry = Registry.load(SHIPPED)
    registry.driver("plain_json").decode = lambda *_: bytearray(1 << 62)
    with pytest.raises(DriverOutOfMemory, match="driver plain_json found no memory") as raised:
        read(uplink("{}", "devices/d1/telemetry"), registry)
    assert classify(raised.value) is FailureClass.UNCLASSIFIED


def test_driver_of_a_command() -> None:
    """The device's own family encodes its commands; a family that shares the device is found by the command's name."""
    registry = Registry.load(SHIPPED)
    assert registry.driver_for("config", "fluxor").name == "fluxor"
    assert registry.driver_for("light_read_all", "fluxor").name == "light_controller"
    assert registry.driver_for("light_read_all", None).name == "light_controller"
    assert registry.driver_for("explode", "fluxor") is None


def test_every_registered_driver_declares_itself() -> None:
    """Names agree with the registry, traits speak of commands that exist, schemas are schemas."""
    from jsonschema import Draft202012Validator

    from devices.registry import DRIVERS

    for name in DRIVERS:
        driver = driver_class(name)
        assert driver.name == name
        assert set(driver.traits) == set(driver.commands)
        for command in (*driver.commands.values(), driver.options):
            Draft202012Validator.check_schema(command)


def test_the_same_labels_of_other_channels_keep_their_names() -> None:
    """Two devices whose values have the same labels, from other channels, each keep their display names."""
    profile = Profile("p", "fluxor")
    one = profile.shape("T", ["T_int", "T_ext"], display_names=["CH1", "CH4"], units=["°C", "°C"])
    other = profile.shape("T", ["T_int", "T_ext"], display_names=["CH1", "CH2"], units=["°C", "°C"])
    assert (one.display_names, other.display_names) == (["CH1", "CH4"], ["CH1", "CH2"])
