"""What the families behind a field broker (Fluxor, light controllers) have in common: topics, request ids, feedback.

A device sends on ``.../{broker_id}/{device_id}/...``; its commands go to ``.../{broker_id}/command`` as JSON with
``id_capteur`` and ``uid`` = ``{request_id}-{broker_id}``; the broker answers on ``.../{broker_id}/feedback``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from devices import jsontext
from devices.driver import Feedback
from devices.model import CommandError, DecodeError, Uplink


def state_of(route: str) -> dict[str, Any]:
    """Return the broker and its command topic from the topic of an uplink, whatever stands before ``{broker_id}``."""
    head = route.rsplit("/", 2)[0]
    return {"broker_id": head.rsplit("/", 1)[-1], "command_topic": f"{head}/command"}


def command(request_id: str, device_id: str, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that every command has; raises CommandError for a device that has not been heard of."""
    if "broker_id" not in state:
        raise CommandError(f"device {device_id} has not been heard of yet; its broker comes from its last uplink")
    return {
        "id_capteur": int(device_id) if device_id.isdecimal() else device_id,
        "uid": f"{request_id}-{state['broker_id']}",
    }


def feedback(uplink: Uplink) -> Feedback:
    """Read ``{"uid": "REQUEST-BROKER", "status": 1}``: 1 is success; the request id is all before the last ``-``."""
    data = jsontext.parse(uplink)
    uid = data.get("uid") if isinstance(data, dict) else None
    if not isinstance(uid, str) or "-" not in uid or "status" not in data:
        raise DecodeError('a feedback is {"uid": "REQUEST-BROKER", "status": 1}')
    status = data["status"]
    success = status == 1 and not isinstance(status, bool)
    return Feedback(request_id=uid.rpartition("-")[0], success=success, detail=f"status {status!r:.80}")
