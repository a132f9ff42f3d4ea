"""The simulated half of the way down: controllers and sensors that take commands, and the operator who sends them."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import paho.mqtt.client as paho
import pytest
from hypothesis import given
from hypothesis import strategies as st
from paho.mqtt.enums import MQTTProtocolVersion

from agents.edges.mqtt_wire import parse_url
from devices.efento.commands import encode, greeting
from devices.light_controller import schedule
from tools.demo import light_task
from tools.simulator import Controllers, LightController, Operator, Target
from tools.simulator.families import Efento
from tools.simulator.mqtt import new_client

NOW = datetime(2026, 1, 1, tzinfo=UTC)
AT = "2026-01-01T00:00:0{}Z"


@given(st.lists(st.tuples(st.sampled_from(list(schedule.HEADERS)), st.integers(0, 14), st.integers(0, 2**32 - 1))))
def test_what_a_light_controller_tells_adds_up_to_its_tasks(steps: Any) -> None:
    """Whatever commands come, the schedule that its messages give is the one that it has."""
    light, state = LightController(7, "1"), None
    for operation, number, alarm in steps:
        for frame in light.take(schedule.HEADERS[operation] | number, alarm, 50):
            state = schedule.merge(state, schedule.describe(schedule.parse(frame)))
    told = {int(number) for number in (state or {"tasks": {}})["tasks"]}
    assert told == set(light.tasks)


def test_a_configuration_gives_a_sensor_another_hash() -> None:
    """A command changes the hash; the usual answer, and what is no answer, do not."""
    sensor = Efento("run", 1, 1)
    sensor.answered(greeting(NOW))
    sensor.answered(b"\xff\xff")
    assert sensor.hash == 1
    sensor.answered(encode("config", {"transfer_limit": 5}, NOW))
    assert sensor.hash == 2


@pytest.mark.stack
def test_controllers_answer(mqtt_url: str) -> None:
    """A command gets its feedback, and the light controller tells its task; what is no command gets nothing."""
    heard: list[tuple[str, bytes]] = []
    done, subscribed = threading.Event(), threading.Event()

    def take(_client: Any, _data: Any, message: paho.MQTTMessage) -> None:
        heard.append((message.topic, message.payload))
        if message.topic.endswith("/feedback") and b"r-2-" in message.payload:
            done.set()

    controllers = Controllers(mqtt_url, [LightController(70, "sim9")], client_id="controllers-test")
    client = new_client(parse_url(mqtt_url), "operator-test", MQTTProtocolVersion.MQTTv311)
    client.on_message, client.on_subscribe = take, lambda *_: subscribed.set()
    url = parse_url(mqtt_url)
    client.connect(url.host, url.port)
    client.loop_start()
    try:
        client.subscribe([("broker_data/sim9/feedback", 1), ("broker_data/sim9/70/scheduler_data", 1)])
        assert subscribed.wait(30)
        controllers.start()
        task = {"uid": "r-1-sim9", "id_capteur": 70, "epoch": 5, "sync_header": 0x83, "sync_alarm": 3 << 25}
        for payload in (b"{no", json.dumps(task).encode(), b'{"uid": "r-2-sim9", "id_capteur": 71}'):
            client.publish("broker_data/sim9/command", payload, qos=1)
        assert done.wait(30)
    finally:
        controllers.stop()
        client.disconnect()
        client.loop_stop()
    words = [json.loads(payload)["uid"] for topic, payload in heard if topic.endswith("feedback")]
    frames = [schedule.parse(payload).operation for topic, payload in heard if topic.endswith("scheduler_data")]
    assert (words, frames) == (["r-1-sim9", "r-2-sim9"], ["read_all", "create"])
    assert controllers.heard == {"70": 1, "71": 1}


@contextmanager
def api(ends: dict[str, str]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """An API whose commands end as ``ends`` says of their devices; yields its address and what was posted."""
    posted: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def answer(self, status: int, body: Any) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def do_POST(self) -> None:
            posted.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.answer(202, {})

        def do_GET(self) -> None:
            name = self.path.rpartition("/")[2]
            device = next(body["device_id"] for body in posted if body["request_id"] == name)
            states = ("QUEUED", "SENT", ends[device])
            steps = [{"state": state, "time": AT.format(n)} for n, state in enumerate(states)]
            self.answer(200, {"state": ends[device], "transitions": steps})

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", posted
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(("last", "done"), [("TIMEOUT", True), ("SENT", False)])
def test_the_operator_follows_each_command_to_its_end(last: str, done: bool) -> None:
    """Each target gets its commands in turn; what has no end at the end is named."""
    ends = {"a": "SUCCESSFUL", "b": last}
    targets = [Target(name, "light_config_task", light_task, "mqtt") for name in ends]
    with api(ends) as (url, posted):
        operator = Operator(url, targets, name="op", every_seconds=0.01)
        operator.start()
        while len(posted) < 4:
            threading.Event().wait(0.01)
        assert operator.finish(30.0 if done else 2.0) is done
    assert [body["device_id"] for body in posted[:4]] == ["a", "b", "a", "b"]
    assert posted[2]["payload"] == light_task(1)
    assert operator.states["SUCCESSFUL"] >= 2
    assert operator.median_seconds == 2.0
    assert (f"{operator.states['SUCCESSFUL']} SUCCESSFUL" in operator.report()) and (
        "op-1 has no end" in operator.report()
    ) is not done
