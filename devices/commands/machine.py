"""The state machine of commands: QUEUED → SENT → DELIVERED → SUCCESSFUL | FAILED | EXPIRED | TIMEOUT. Pure: time is an
argument, and what comes of a call is returned.

Guarantees, whatever comes in whatever order and however often:

- a command passes its states forward, one after another, and ends in exactly one terminal state, at the latest one
  time-out after it expired or was last sent;
- SUCCESSFUL only on the device's word;
- a request id starts one command, once, for as long as it is remembered;
- of the commands that a device takes one at a time, one is on its way or waits for its answer; among those that are
  queued the higher priority goes first, then the older one;
- only what is safe to repeat is sent again, and the step that tells it says so.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from devices.commands.model import ON_THE_WAY, Ended, Life, Limits, OpenCommand, Report, State, Step


def accept(life: Life, command: OpenCommand, now: datetime, limits: Limits) -> list[Step]:
    """Take a new command; nothing comes of a request id that is known. ``order`` is set here."""
    if knows(life, command.request_id):
        return []
    life.order += 1
    command.order = life.order
    steps = [_step(command, "QUEUED", "", now)]
    if command.expires_at <= now:
        life.open.append(command)
        steps.append(_end(life, command, "EXPIRED", "it had expired when it was taken up", now=now, limits=limits))
        return steps
    if command.supersedes:
        detail = f"superseded by {command.request_id}"
        pointless = [older for older in life.open if _replaceable(older, command)]
        steps += [_end(life, older, "FAILED", detail, now=now, limits=limits) for older in pointless]
    life.open.append(command)
    return steps


def _replaceable(older: OpenCommand, newer: OpenCommand) -> bool:
    if older.command_type != newer.command_type or not older.supersedes or older.state != "QUEUED":
        return False
    # over MQTT what is on its way is as good as sent; over CoAP it waits for the device's next request
    return not older.on_way or older.protocol == "coap"


def refuse(life: Life, request_id: str, detail: str, now: datetime, limits: Limits) -> list[Step]:
    """End a new command that can never be sent; nothing comes of a request id that is known."""
    if knows(life, request_id):
        return []
    _remember(life, request_id, "FAILED", now, limits)
    return [
        Step(request_id, "QUEUED", "", now),
        Step(request_id, "FAILED", detail, now + timedelta(microseconds=1)),
    ]


def knows(life: Life, request_id: str) -> bool:
    """Tell whether a request id is open or remembered."""
    return request_id in {*(c.request_id for c in life.open), *(e.request_id for e in life.ended)}


def find(life: Life, request_id: str) -> OpenCommand | None:
    """Return an open command."""
    return next((command for command in life.open if command.request_id == request_id), None)


def candidates(life: Life) -> list[OpenCommand]:
    """Return what waits to be handed to the connector for the first time, the next one first."""
    return sorted(
        (command for command in life.open if command.state == "QUEUED" and not command.attempts),
        key=lambda command: (-command.priority, command.order),
    )


def may_go(life: Life, command: OpenCommand) -> bool:
    """Tell whether the device may get ``command`` now: no other of those that it takes one at a time is under way."""
    return not one_at_a_time(command) or not any(
        other is not command and other.attempts and one_at_a_time(other) for other in life.open
    )


def one_at_a_time(command: OpenCommand) -> bool:
    """Tell whether the device takes one command of this kind at a time; the answer to a CoAP request holds one."""
    return command.exclusive or command.protocol == "coap"


def hand_over(command: OpenCommand) -> int:
    """Note that ``command`` is handed to the connector; returns the number of the attempt."""
    command.attempts += 1
    command.on_way = True
    command.waits_until = None
    return command.attempts


def fail(life: Life, command: OpenCommand, detail: str, now: datetime, limits: Limits) -> list[Step]:
    """End an open command that turned out to be impossible."""
    return [_end(life, command, "FAILED", detail, now=now, limits=limits)]


def report(life: Life, word: Report, now: datetime, limits: Limits) -> list[Step]:
    """Take a connector's or a device's word; nothing comes of one that is late, repeated or of an unknown request."""
    command = find(life, word.request_id)
    if command is None or not command.attempts:
        return []
    if word.kind == "SENT":
        if word.attempt != command.attempts or not command.on_way:
            return []
        command.sent_at = command.sent_at or word.timestamp or now
        steps = _forward(command, "SENT", word.detail, now)
        _wait(command, now, limits)
        return steps
    if word.kind == "DELIVERED":
        if word.attempt not in (0, command.attempts):
            return []
        steps = _forward(command, "DELIVERED", word.detail, now)
        if command.confirmed or not word.by_device:
            if steps or command.on_way:
                _wait(command, now, limits)
            return steps
        detail = word.detail or "the device has acknowledged it"
        return [*steps, _end(life, command, "SUCCESSFUL", detail, now=now, limits=limits)]
    if word.kind == "EXPIRED":
        if command.state == "QUEUED":
            return [_end(life, command, "EXPIRED", word.detail, now=now, limits=limits)]
        return [_end(life, command, "TIMEOUT", f"no answer; {word.detail}", now=now, limits=limits)]
    if not word.by_device:
        # a connector can tell that something will never be sent, not that a device has done it
        return [_end(life, command, "FAILED", word.detail, now=now, limits=limits)] if word.kind == "FAILED" else []
    return [
        *_forward(command, "DELIVERED", "", now),
        _end(life, command, word.kind, word.detail, now=now, limits=limits),
    ]


def _forward(command: OpenCommand, to: State, detail: str, now: datetime) -> list[Step]:
    """Return the steps from the present state up to ``to``; a word can overtake the one before it."""
    passed = ON_THE_WAY[ON_THE_WAY.index(command.state) + 1 : ON_THE_WAY.index(to) + 1]
    if passed:
        command.state = passed[-1]
    return [_step(command, state, detail if state == to else "", now) for state in passed]


def _step(command: OpenCommand, state: State, detail: str, now: datetime, *, withdraw: bool = False) -> Step:
    """Return a step; each has a time after that of the one before it, so that whoever sorts them gets them in order."""
    if command.told_at is not None:
        now = max(now, command.told_at + timedelta(microseconds=1))
    command.told_at = now
    return Step(command.request_id, state, detail, now, withdraw)


def _wait(command: OpenCommand, now: datetime, limits: Limits) -> None:
    command.on_way = False
    command.waits_until = now + timedelta(seconds=limits.timeout_seconds)


def pass_time(life: Life, now: datetime, limits: Limits) -> tuple[list[Step], list[OpenCommand]]:
    """Return what has expired or timed out, and the commands that are to be handed over once more."""
    steps: list[Step] = []
    again: list[OpenCommand] = []
    for command in list(life.open):
        if now < due(command, limits):
            continue
        if command.state == "QUEUED":
            detail = "the connector did not send it in time" if command.attempts else "its device could not be reached"
            steps.append(_end(life, command, "EXPIRED", detail, now=now, limits=limits))
        elif not command.on_way and command.repeatable and _left(command, now, limits):
            again.append(command)
            steps.append(
                _step(
                    command,
                    command.state,
                    f"no answer after {limits.timeout_seconds:g} s: sent again, attempt {command.attempts + 1} of "
                    f"{limits.attempts}; the device may get it twice",
                    now,
                )
            )
        else:
            tries = f"{command.attempts} attempt" + ("s" if command.attempts > 1 else "")
            safe = "" if command.repeatable else "; not safe to repeat"
            detail = f"no answer from the device after {tries}{safe}"
            if not command.confirmed:
                detail = f"this device confirms no {command.command_type}; {tries}"
            steps.append(_end(life, command, "TIMEOUT", detail, now=now, limits=limits))
    _forget(life, now, limits)
    return steps, again


def _left(command: OpenCommand, now: datetime, limits: Limits) -> bool:
    return command.attempts < limits.attempts and now < command.expires_at


def due(command: OpenCommand, limits: Limits) -> datetime:
    """Return when time decides about ``command``: its expiry, or the end of its wait for an answer.

    What is on its way has a time-out's length more: the connector refuses it when it has expired, and may be late in
    telling that it was sent in time.
    """
    if command.waits_until is not None and not command.on_way:
        return command.waits_until
    return command.expires_at + timedelta(seconds=limits.timeout_seconds if command.on_way else 0.0)


def wake_at(life: Life, limits: Limits) -> datetime | None:
    """Return when :func:`pass_time` will have something to say of the open commands; None without any."""
    return min((due(command, limits) for command in life.open), default=None)


def _end(life: Life, command: OpenCommand, state: State, detail: str, *, now: datetime, limits: Limits) -> Step:
    life.open.remove(command)
    _remember(life, command.request_id, state, now, limits)
    return _step(command, state, detail, now, withdraw=command.protocol == "coap" and command.attempts > 0)


def _remember(life: Life, request_id: str, state: State, now: datetime, limits: Limits) -> None:
    life.ended.append(Ended(request_id, state, now))
    _forget(life, now, limits)


def _forget(life: Life, now: datetime, limits: Limits) -> None:
    since = now - timedelta(seconds=limits.keep_seconds)
    if len(life.ended) > limits.keep_count or (life.ended and life.ended[0].at < since):
        life.ended = [one for one in life.ended if one.at >= since][-limits.keep_count :]
