"""Why there is no connection.

::

    aiomqtt.MqttError            retried by classify()
    └── ConnectError             the broker cannot be reached, or did not accept us
        ├── UnsupportedProtocol  it says that it does not speak this version of MQTT
        ├── Unanswered           it hung up, or said nothing, where a CONNACK should be
        └── Refused              it knows us and says no: client id, credentials, rights, retained messages
"""

from __future__ import annotations

import aiomqtt


class ConnectError(aiomqtt.MqttError):
    """The broker cannot be reached or did not accept us."""


class UnsupportedProtocol(ConnectError):
    """The broker does not speak this version of MQTT."""


class Unanswered(ConnectError):
    """The broker took the connection and hung up, or (``silent``) said nothing in time."""

    def __init__(self, message: str, *, silent: bool) -> None:
        super().__init__(message)
        self.silent = silent


class Refused(ConnectError):
    """The broker knows us and says no."""
