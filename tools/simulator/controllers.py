"""Controllers that take commands over MQTT: field brokers answer for their devices, as real ones do.

Guarantees: every command that arrives is answered by one feedback with its `uid`, status 1, on the same connection; a
light controller tells its new task, or what it was asked for, as a schedule message before that. What `heard` counts
has been answered. Callbacks run on the network's thread.
"""

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import paho.mqtt.client as paho
from paho.mqtt.enums import MQTTProtocolVersion

from agents.edges.mqtt_wire import parse_url
from devices.light_controller.schedule import (
    OPERATIONS,
    TASK_MASK,
    Operation,
    Task,
    build_frame,
    pack_alarm,
    unpack_alarm,
)
from tools.simulator.mqtt import new_client

__all__ = ["Controllers", "LightController"]

_COMMANDS = "broker_data/+/command"
_CONNECT_SECONDS = 30.0


@dataclass(slots=True)
class LightController:
    """A light controller behind a field broker: its tasks, by id."""

    device_id: int
    broker_id: str
    tasks: dict[int, Task] = field(default_factory=dict)

    @property
    def topic(self) -> str:
        """Where it tells its schedule."""
        return f"broker_data/{self.broker_id}/{self.device_id}/scheduler_data"

    def take(self, header: int, alarm: int, epoch: int) -> list[bytes]:
        """Do what a command says; returns the schedule messages that tell it."""
        operation, number = OPERATIONS[header & ~TASK_MASK], header & TASK_MASK
        if operation == "read_all":
            return [self._frame(epoch, "read_all", alarm=len(self.tasks) << 25), *map(self._read(epoch), self.tasks)]
        if operation == "read_task":
            return [self._read(epoch)(number)] if number in self.tasks else []
        if operation == "create":
            self.tasks[number] = unpack_alarm(alarm)
        elif operation == "delete":
            self.tasks.pop(number, None)
        else:
            self.tasks.clear()
        return [self._frame(epoch, operation, task_id=number, alarm=alarm)]

    def _read(self, epoch: int) -> Any:
        def read(number: int) -> bytes:
            return self._frame(epoch, "read_task", task_id=number, alarm=pack_alarm(self.tasks[number]))

        return read

    def _frame(self, epoch: int, operation: Operation, *, task_id: int = 0, alarm: int = 0) -> bytes:
        return build_frame(self.device_id, epoch, operation, task_id=task_id, alarm=alarm)


class Controllers:
    """All field brokers of a fleet on one connection; `on_command` is called with the `uid` of what arrives.

    Raises ValueError for a URL that is none.
    """

    def __init__(
        self,
        url: str,
        lights: Sequence[LightController] = (),
        *,
        client_id: str = "",
        on_command: Callable[[str], None] = lambda _uid: None,
    ) -> None:
        self._url = parse_url(url)
        self._on_command = on_command
        self._lights = {light.device_id: light for light in lights}
        self._ready = threading.Event()
        #: answered commands, by device
        self.heard: Counter[str] = Counter()
        self._client = new_client(self._url, client_id, MQTTProtocolVersion.MQTTv311)
        self._client.on_connect = self._connected
        self._client.on_subscribe = lambda *_: self._ready.set()
        self._client.on_message = self._command

    def start(self) -> None:
        """Connect, and have each light controller tell that it has no task; ConnectionError without a broker."""
        self._client.connect_async(self._url.host, self._url.port, keepalive=30)
        self._client.loop_start()
        if not self._ready.wait(_CONNECT_SECONDS):
            raise ConnectionError(f"no MQTT broker answers at {self._url} within {_CONNECT_SECONDS:.0f} s")
        for light in self._lights.values():
            for frame in light.take(1 << 5, 0, int(time.time())):
                self._client.publish(light.topic, frame, qos=1)

    def stop(self) -> None:
        """Disconnect."""
        self._client.disconnect()
        self._client.loop_stop()

    def _connected(self, client: paho.Client, *_: Any) -> None:
        client.subscribe(_COMMANDS, qos=1)

    def _command(self, client: paho.Client, _data: Any, message: paho.MQTTMessage) -> None:
        try:
            command = json.loads(message.payload)
            uid, device = str(command["uid"]), int(command["id_capteur"])
            self._on_command(uid)
            light = self._lights.get(device)
            if light is not None and "sync_header" in command:
                for frame in light.take(command["sync_header"], command["sync_alarm"], command["epoch"]):
                    client.publish(light.topic, frame, qos=1)
        except (ValueError, KeyError, TypeError):
            return
        broker = message.topic.split("/")[1]
        client.publish(f"broker_data/{broker}/feedback", json.dumps({"uid": uid, "status": 1}), qos=1)
        self.heard[str(device)] += 1
