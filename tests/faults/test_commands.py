"""Commands while their worker is killed: each finds one end, none is done without the device's word, none is lost."""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import shutil
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from devices.commands.model import TERMINAL
from tests.faults.support import wait_for as wait_long
from tests.faults.topics import committed
from tests.sensor import Sensor
from tests.test_command_life_e2e import TASK
from tests.test_commands_e2e import Http, config, house, wait_for
from tools.stack import Stack, ports

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]

STATES = ("QUEUED", "SENT", "DELIVERED")


def post(http: Http, body: dict[str, Any]) -> None:
    """Post until it is accepted, as a client does whose answer got lost: the request id makes that safe."""
    for _ in range(300):
        try:
            if http("POST", "/commands", body)[0] == 202:
                return
        except OSError:
            time.sleep(0.1)
    pytest.fail(f"{body} was never accepted")


def judged(http: Http, request_id: str, got: int, *, attempts: int) -> None:
    """Check the life of one command that has ended, and that its device has ``got`` so often."""
    found = http("GET", f"/commands/{request_id}")[1]
    states = [step["state"] for step in found["transitions"]]
    assert found["state"] in TERMINAL, states
    ends = [state for state in states if state in TERMINAL]
    assert set(ends) == {found["state"]}, states
    order = [STATES.index(state) for state in states if state not in TERMINAL]
    assert order == sorted(order), states
    if found["state"] == "SUCCESSFUL":
        assert got >= 1
        assert states[:3] == list(STATES) or set(states) >= {*STATES, "SUCCESSFUL"}
    assert got <= attempts, f"{request_id} went out {got} times: {states}"


def test_the_worker_is_killed_between_send_and_state(breakable: Stack, tmp_path: Path, short: bool, seed: int) -> None:
    """SIGKILL right after a downlink went out, again and again; then all commands have ended, each once.

    What is safe to repeat may go out once more for each kill; a reboot goes out once at most.
    """
    rng = random.Random(seed)
    kills = 2 if short else 5
    settings = {"BROKER_PROFILE": "fast", "COMMAND_TIMEOUT_SECONDS": "15", "COMMAND_ATTEMPTS": "2"}
    with house(breakable, tmp_path, **settings) as (_own, worker, http, gateway):
        devices = [2_261_100 + number for number in range(6)]
        for device in devices:
            gateway.climate(device)
        posted: dict[str, bool] = {}
        numbers = itertools.count()
        for kill in range(kills):
            before = len(gateway.commands)
            for device in devices:
                again = rng.random() < 0.5
                name = f"k{kill}-{next(numbers)}"
                body = config(device, request_id=name) if again else config(device, request_id=name, payload={})
                if not again:
                    body["command_type"] = "reboot"
                posted[name] = again
                post(http, body)
            # the first of them is out; the connector may not have told so yet
            wait_for("a command at the gateway", lambda least=before: len(gateway.commands) > least)
            time.sleep(rng.choice([0.0, 0.0, 0.01, 0.05]))
            worker.kill()
            worker.start()
        wait_for(
            "every command's end",
            lambda: all(http("GET", f"/commands/{name}")[1].get("state") in TERMINAL for name in posted),
        )
        for name, again in posted.items():
            judged(http, name, len(gateway.got(name)), attempts=2 * (kills + 1) if again else 1)
        ends = [http("GET", f"/commands/{name}")[1]["state"] for name in posted]
        print(f"{len(ends)} commands, {kills} kills: { ({end: ends.count(end) for end in set(ends)}) }")
        assert "SUCCESSFUL" in ends


def test_the_connector_is_killed_between_send_and_state(
    breakable: Stack, tmp_path: Path, short: bool, seed: int
) -> None:
    """SIGKILL of the process with the edges alone, right after a device has its command; for each kind of device.

    The state machine goes on meanwhile; climate configuration, light task and sensor configuration end once each.
    """
    rng = random.Random(seed)
    kills = 3 if short else 9
    address = f"127.0.0.1:{ports.choose(set(), random.SystemRandom(), socket.SOCK_DGRAM)}"
    settings = {"BROKER_PROFILE": "fast", "COMMAND_TIMEOUT_SECONDS": "15", "COMMAND_ATTEMPTS": "3"}
    with (
        house(breakable, tmp_path, STAGES="normalizer,ingestor,commands", **settings) as (own, _worker, http, gateway),
        contextlib.closing(Sensor(address)) as sensor,
    ):
        edge = own.worker("edge", STAGES="mqtt,coap", COAP_BIND=address).start()
        device = 2_261_300
        gateway.climate(device)
        gateway.lights(device + 1)
        sensor.ask()
        bodies: list[dict[str, Any]] = [
            config(device),
            {"device_id": str(device + 1), "command_type": "light_config_task", "payload": TASK},
            {"device_id": sensor.device_id, "command_type": "config", "protocol": "coap"},
        ]
        limits: dict[str, int] = {}
        for kill in range(kills):
            names = [f"k{kill}-{number}" for number in range(len(bodies))]
            limits[names[2]] = kill + 1
            # of which kind the command is that the connector dies over
            fatal = kill % len(bodies)
            payloads: list[dict[str, Any]] = [{}, {}, {"payload": {"transfer_limit": kill + 1}}]
            for number in sorted(range(len(bodies)), key=lambda number: number != fatal):
                post(http, {**bodies[number], **payloads[number], "request_id": names[number]})

            def out(name: str = names[fatal], fatal: int = fatal, limit: int = kill + 1) -> bool:
                if fatal != 2:
                    return bool(gateway.got(name))
                sensor.ask()
                return limit in sensor.limits()

            wait_for(f"{names[fatal]} at its device", out)
            time.sleep(rng.choice([0.0, 0.0, 0.005, 0.02]))
            edge.kill()
            edge.start()

            def ended(names: list[str] = names) -> bool:
                sensor.ask()
                return all(http("GET", f"/commands/{name}")[1].get("state") in TERMINAL for name in names)

            wait_long("every command's end", ended)
        states = []
        for name in (f"k{kill}-{number}" for kill in range(kills) for number in range(len(bodies))):
            got = sensor.limits().count(limits[name]) if name in limits else len(gateway.got(name))
            judged(http, name, got, attempts=4)
            states.append(http("GET", f"/commands/{name}")[1]["state"])
        print(f"{len(states)} commands, {kills} kills: { ({state: states.count(state) for state in set(states)}) }")
        assert states.count("SUCCESSFUL") > len(states) / 2


def test_a_schedule_survives_the_loss_of_its_folder(breakable: Stack, tmp_path: Path) -> None:
    """Tasks that were told before the worker was killed and its tables deleted are in the schedule after it."""
    with house(breakable, tmp_path, BROKER_PROFILE="fast") as (own, worker, http, gateway):
        device = 2_261_200
        alarms = {number: 540 | 60 << 11 | number << 25 | 1 << 30 for number in range(1, 6)}

        def schedule() -> dict[str, Any]:
            path = f"/devices/{device}/readings?index=SCHEDULE_STATE&limit=4"
            found = http("GET", path)[1].get("readings") or []
            newest = [row for row in found if row["time"] == found[0]["time"]]
            return {row["label"]: row["value_text"] or row["value"] for row in newest}

        def done() -> int:
            offsets = committed(own, f"{own.name}-commands")
            return sum(at for (topic, _), at in offsets.items() if topic.endswith("-device-changes"))

        for number in (1, 2, 3):
            gateway.lights(device, "create", task_id=number, alarm=alarms[number])
        wait_for("the first tasks", lambda: schedule().get("known") == 3)
        wait_for("the first tasks' commit: they never come again", lambda: done() == 3)
        worker.kill()
        shutil.rmtree(Path(own.env["DATA_DIR"]))
        gateway.lights(device, "delete", task_id=2)
        gateway.lights(device, "create", task_id=5, alarm=alarms[5])
        gateway.lights(device, "read_all", alarm=3 << 25)
        worker.start()
        wait_for("all that was told", lambda: schedule().get("complete"))
        assert sorted(json.loads(schedule()["tasks"])) == ["1", "3", "5"]
