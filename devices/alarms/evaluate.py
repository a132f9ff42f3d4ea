"""The state machine of one series under one rule: quiet → open → acknowledged → resolved.

Guarantees, each a property test beside this module:

- A reading is its sample time: the second with the same time is a redelivery and changes nothing, not even a count.
- A late reading, older than one that counted, decides nothing. It can only be counted for ``repeat``, towards what the
  next reading in order decides.
- OPENED and RESOLVED alternate, whatever comes in whatever order.
- In order, the result is what the rule's text says; durations are measured between sample times, and only the silence
  after the last sample by the host's clock, so that a backlog worked off in a second raises nothing.
- The same readings give the same transitions with the same times.

A sample time beyond the limits (:class:`Limits`) counts for nothing. Where the host's clock has been set back,
remembered times can lie ahead: a newest sample further ahead than a reading may be is no longer believed, and a
silence is counted from the new now. All functions are pure: they return another state, or the same object where
nothing has changed.
"""

from __future__ import annotations

from bisect import bisect_left
from copy import copy
from typing import Any, Final

from devices.alarms.model import AlarmRule, AlarmState, Kind, Life, Reason, Transition
from devices.alarms.prepare import Prepared, brief, differs, fingerprint

Events = tuple[Transition, ...]
NOTHING: Final[Events] = ()
_QUIET: Final = Life.QUIET

# How often a reason to be silent that has no known end (a gateway that is down) is looked at again.
RECHECK_SECONDS: Final = 30.0


def evaluate(
    rule: Prepared,
    state: AlarmState,
    value: Any,
    sample_time: float,
    now: float,
    *,
    muted: bool = False,
    request_id: str = "",
    unit: str = "",
) -> tuple[AlarmState, Events]:
    """Let one reading of the series count. Times are epoch seconds.

    ``muted``: something that the rule depends on is down; state goes on, nobody is told. Returns the same ``state``
    object when the reading changes nothing: redelivered, late, too old or from the future.
    """
    ahead = now + rule.max_ahead
    if sample_time > ahead or sample_time < now - rule.max_age:
        return state, NOTHING
    believed = state.time <= ahead
    if sample_time <= state.time and believed:
        if not rule.count or sample_time == state.time:
            return state, NOTHING
        return _count_late(rule, state, value, sample_time), NOTHING
    events: Events = NOTHING
    if state.rule != rule.fingerprint and state.rule:
        new, events = _restart(rule, state, now, Reason.RULE_CHANGED, muted=muted)
    else:
        new = copy(state)
    new.rule = rule.fingerprint
    new.time = sample_time
    new.seen = now
    if not believed:
        new.since = None
        new.hits = ()
        new.floor = 0.0

    if new.life and new.cause is Reason.NO_DATA:
        events += (_resolve(rule, new, (sample_time, now), brief(value), Reason.DATA_IS_BACK, muted=muted),)
    raises = rule.raises
    if raises is not None:
        raised = raises(value)
    elif rule.on_change:
        kept = brief(value)
        raised = differs(kept, new.value, rule.changes_by)
        if kept is not None and kept == kept:  # noqa: PLR0124
            new.value = kept
    else:
        return new, events
    if raised is None:
        if new.hits:
            _count(rule, new, sample_time, hit=False)
        return new, events

    listens = rule.schedule is None or rule.schedule.contains(sample_time)
    if new.life:
        if rule.count:
            _count(rule, new, sample_time, hit=raised and listens)
        holds = rule.holds
        stays = raised if holds is None else holds(value)
        if not (stays or (rule.count and len(new.hits) >= rule.count)):
            events += (_resolve(rule, new, (sample_time, now), brief(value), Reason.CONDITION, muted=muted),)
        elif not rule.on_change:
            new.value = brief(value)
        return new, events

    raised = raised and listens
    if rule.count:
        _count(rule, new, sample_time, hit=raised)
        raised = raised and len(new.hits) >= rule.count
    if not raised:
        if new.since is not None:
            new.since = None
            new.request_id = new.unit = ""
            if not rule.on_change:
                new.value = None
        return new, events
    kept = brief(value)
    new.value = kept
    if rule.duration:
        if new.since is None or (rule.schedule is not None and rule.schedule.since(sample_time) > new.since):
            new.since = sample_time
            new.request_id = request_id
            new.unit = unit
        if sample_time - new.since < rule.duration:
            return new, events
        start = new.since
    else:
        start = sample_time
        new.request_id = request_id
        new.unit = unit
    return new, (*events, _open(rule, new, (start, sample_time, now), Reason.CONDITION, muted=muted))


def tick(rule: Prepared, state: AlarmState, now: float, *, muted: bool = False) -> tuple[AlarmState, Events]:
    """Let time count: what a silence decides, reminders, what a quiet time held back. Call at :func:`due` or later."""
    if state.rule != rule.fingerprint:
        if not state.rule:
            return state, NOTHING
        return _restart(rule, state, now, Reason.RULE_CHANGED, muted=muted)
    new = state
    if state.seen > now:
        new = copy(state)
        new.seen = now
    if new.owed and not _silent(rule, now, muted):
        new = copy(new)
        return new, (_tell_again(new, now, Reason.QUIET_TIME_OVER),)
    if new.life is Life.OPEN:
        # What was never told is owed, and comes by the way above.
        if rule.renotify and new.told and now - new.told >= rule.renotify and not _silent(rule, now, muted):
            new = copy(new)
            return new, (_tell_again(new, now, Reason.STILL_OPEN),)
        return new, NOTHING
    if new.life or (rule.schedule is not None and not rule.schedule.contains(now)):
        return new, NOTHING
    if new.since is not None and rule.duration:
        at = _run_ends(rule, new, now)
        if now >= at:
            new = copy(new)
            start = new.since or 0.0
            return new, (_open(rule, new, (start, start + rule.duration, now), Reason.CONDITION, muted=muted),)
    if rule.no_data:
        at = _silence_ends(rule, new, now)
        if now >= at:
            new = copy(new)
            start = new.time or new.seen
            return new, (_open(rule, new, (start, max(at, start), now), Reason.NO_DATA, muted=muted),)
    return new, NOTHING


def due(rule: Prepared, state: AlarmState, now: float, *, muted: bool = False) -> float | None:
    """Return when :func:`tick` should look at this state next, None for never. Later than ``now`` unless it is due."""
    if not state.rule:
        return None
    if state.rule != rule.fingerprint:
        return now
    times = []
    if state.owed:
        times.append(_when_told(rule, now, now, muted))
    elif state.life is Life.OPEN and rule.renotify and state.told:
        times.append(_when_told(rule, min(state.told, now) + rule.renotify, now, muted))
    if state.life is Life.QUIET:
        scheduled = now if rule.schedule is None or rule.schedule.contains(now) else rule.schedule.changes_at(now)
        if state.since is not None and rule.duration:
            times.append(max(scheduled, _run_ends(rule, state, scheduled)))
        if rule.no_data:
            times.append(max(scheduled, _silence_ends(rule, state, scheduled)))
    soonest = min(times, default=None)
    return None if soonest == float("inf") else soonest


def acknowledge(state: AlarmState, now: float) -> tuple[AlarmState, Events]:
    """Take the word of an operator who has seen the open alarm: no more reminders. Twice is once."""
    if state.life is not Life.OPEN:
        return state, NOTHING
    new = copy(state)
    new.life = Life.ACKNOWLEDGED
    new.owed = False
    step = Transition(kind=Kind.ACKNOWLEDGED, start=new.start, at=now, value=new.value, cause=new.cause, notify=False)
    return new, (step,)


def rule_changed(
    old: AlarmRule, new: AlarmRule | None, state: AlarmState, now: float, *, silent: bool = False
) -> tuple[AlarmState, Events]:
    """Say what becomes of a state when its rule is edited, switched off (``active``) or removed (None).

    Another condition (what :func:`fingerprint` covers) resolves an open alarm and forgets what was pending; the newest
    sample time stays, so that nothing counts twice. Any other edit keeps both. ``silent``: a quiet time, do not tell.
    """
    if new is None:
        return close(state, now, Reason.RULE_REMOVED, silent=silent)
    if not new.active:
        return close(state, now, Reason.RULE_SWITCHED_OFF, silent=silent)
    mark = fingerprint(new)
    if mark == fingerprint(old):
        return state, NOTHING
    state, events = close(state, now, Reason.RULE_CHANGED, silent=silent)
    if state.rule:
        state = copy(state)
        state.rule = mark
    return state, events


def close(state: AlarmState, now: float, reason: Reason, *, silent: bool = False) -> tuple[AlarmState, Events]:
    """End what is open or pending, whatever the rule says. Nobody is told who was not told of the opening."""
    new = copy(state)
    events = NOTHING
    if new.life:
        events = (_resolved(new, now, None, reason, notify=bool(new.told) and not silent),)
        new.closed += 1
    _forget(new)
    # What has counted towards something that is over counts towards nothing else, however often it comes.
    new.floor = new.time
    return new, events


def _restart(
    rule: Prepared, state: AlarmState, now: float, reason: Reason, *, muted: bool
) -> tuple[AlarmState, Events]:
    new, events = close(state, now, reason, silent=_silent(rule, now, muted))
    new.rule = rule.fingerprint
    return new, events


def _forget(state: AlarmState) -> None:
    state.life = _QUIET
    state.since = None
    state.hits = ()
    state.value = None
    state.start = 0.0
    state.cause = Reason.CONDITION
    state.told = 0.0
    state.owed = False
    state.reminders = 0
    state.request_id = state.unit = ""
    state.alert = None


def _silent(rule: Prepared, now: float, muted: bool) -> bool:
    return muted or (rule.quiet is not None and rule.quiet.contains(now))


def _when_told(rule: Prepared, at: float, now: float, muted: bool) -> float:
    """Return the first time from ``at`` on at which somebody may be told."""
    at = max(at, now + RECHECK_SECONDS) if muted else at
    if rule.quiet is not None and rule.quiet.contains(max(at, now)):
        return rule.quiet.changes_at(max(at, now))
    return at


def _run_ends(rule: Prepared, state: AlarmState, now: float) -> float:
    """Return the host's time at which a run has lasted, should no further sample come.

    Never where the run began in an earlier window of the schedule: nobody has listened in between.
    """
    since = state.since or 0.0
    if rule.schedule is not None and rule.schedule.contains(now) and rule.schedule.since(now) > since:
        return float("inf")
    return state.seen + rule.duration - (state.time - since)


def _silence_ends(rule: Prepared, state: AlarmState, now: float) -> float:
    """Return when silence has lasted. Outside its schedule a rule does not listen: silence begins with the window."""
    begins = state.seen
    if rule.schedule is not None and rule.schedule.contains(now):
        begins = max(begins, rule.schedule.since(now))
    return begins + rule.no_data


def _open(
    rule: Prepared, new: AlarmState, times: tuple[float, float, float], cause: Reason, *, muted: bool
) -> Transition:
    start, at, now = times
    silent = _silent(rule, now, muted)
    new.life = Life.OPEN
    new.start = start
    new.cause = cause
    new.since = None
    new.told = 0.0 if silent else now
    new.owed = silent
    new.reminders = 0
    new.alert = None
    value = None if cause is Reason.NO_DATA else new.value
    return Transition(kind=Kind.OPENED, start=start, at=at, value=value, cause=cause, reason=cause, notify=not silent)


def _resolve(
    rule: Prepared, new: AlarmState, times: tuple[float, float], value: Any, reason: Reason, *, muted: bool
) -> Transition:
    """Close the open alarm; where the opening was told and this is a quiet time, the news is owed."""
    at, now = times
    told, silent = bool(new.told), _silent(rule, now, muted)
    step = _resolved(new, at, value, reason, notify=told and not silent)
    new.life = _QUIET
    if told and silent:
        new.owed = True
        # Kept for the belated news: start, cause, value, alert.
        new.told = 0.0
        if not rule.on_change:
            new.value = value
    else:
        kept, hits = new.value, new.hits
        _forget(new)
        new.hits = hits
        if rule.on_change:
            new.value = kept
    return step


def _resolved(state: AlarmState, at: float, value: Any, reason: Reason, *, notify: bool) -> Transition:
    return Transition(
        kind=Kind.RESOLVED,
        start=state.start,
        at=max(at, state.start),
        value=value,
        cause=state.cause,
        reason=reason,
        notify=notify,
        resolved=True,
    )


def _tell_again(new: AlarmState, now: float, reason: Reason) -> Transition:
    new.reminders += 1
    resolved = new.life is _QUIET
    step = Transition(
        kind=Kind.REMINDED,
        start=new.start,
        at=now,
        value=new.value,
        cause=new.cause,
        reason=reason,
        resolved=resolved,
        number=new.reminders,
    )
    new.owed = False
    new.told = now
    if resolved:
        new.told = new.start = 0.0
        new.cause = Reason.CONDITION
        new.reminders = 0
        new.alert = None
    return step


def _count(rule: Prepared, new: AlarmState, time: float, *, hit: bool) -> None:
    """Keep the newest ``count`` hits of the window that ends at ``time``."""
    oldest = time - rule.within
    hits = new.hits
    if hits and hits[0] < oldest:
        hits = hits[bisect_left(hits, oldest) :]
    new.hits = (*hits, time)[-rule.count :] if hit else hits


def _count_late(rule: Prepared, state: AlarmState, value: Any, time: float) -> AlarmState:
    """Count a late hit, once, inside the window of the newest sample; if that suffices, the next sample decides."""
    if rule.raises is None or state.rule != rule.fingerprint or time < state.time - rule.within or time <= state.floor:
        return state
    place = bisect_left(state.hits, time)
    if place < len(state.hits) and state.hits[place] == time:
        return state
    if place == 0 and len(state.hits) >= rule.count:
        return state
    if not rule.raises(value) or (rule.schedule is not None and not rule.schedule.contains(time)):
        return state
    new = copy(state)
    new.hits = (*state.hits[:place], time, *state.hits[place:])[-rule.count :]
    return new
