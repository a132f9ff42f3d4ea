"""Commands while their worker is killed: each finds one end, none is done without the device's word, none is lost."""

from __future__ import annotations

import itertools
import json
import random
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from devices.commands.model import TERMINAL
from tests.faults.topics import committed
from tests.test_commands_e2e import Gateway, Http, config, house, wait_for
from tools.stack import Stack

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


def judged(http: Http, gateway: Gateway, request_id: str, *, attempts: int) -> None:
    """Check the life of one command that has ended."""
    found = http("GET", f"/commands/{request_id}")[1]
    states = [step["state"] for step in found["transitions"]]
    assert found["state"] in TERMINAL, states
    ends = [state for state in states if state in TERMINAL]
    assert set(ends) == {found["state"]}, states
    order = [STATES.index(state) for state in states if state not in TERMINAL]
    assert order == sorted(order), states
    got = len(gateway.got(request_id))
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
            judged(http, gateway, name, attempts=2 * (kills + 1) if again else 1)
        ends = [http("GET", f"/commands/{name}")[1]["state"] for name in posted]
        print(f"{len(ends)} commands, {kills} kills: { ({end: ends.count(end) for end in set(ends)}) }")
        assert "SUCCESSFUL" in ends


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
