"""Processes that the stack starts, and the record by which a later start recognises them.

Guarantee: a process that `spawn` started is in the record before its program runs. The child is a shell that waits for
one line on its standard input and then becomes the program (same id, same start time); when the stack is killed before
it has recorded the child, the shell reads the end of its input and ends.

A recorded process is ended only when id *and* start time agree. Ids are used again, and what has another start time
belongs to somebody else.
"""

import contextlib
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import psutil

_WAIT_FOR_GO = 'read -r _ || exit 1; exec "$@" </dev/null'
_LOG_LIMIT_BYTES = 10 * 1024 * 1024


class ProcessId(NamedTuple):
    """A process beyond doubt: its id and when it started, as `start_mark` gives it."""

    pid: int
    started: str


def start_mark(pid: int) -> str | None:
    """Return when the process started, or None when it is gone, or a zombie whose last thread has ended.

    A process of many threads is shown as a zombie while some of them still hold its ports.

    On Linux this is the boot's id and the ticks since boot (/proc/PID/stat, field 22), which a step of the clock does
    not change; elsewhere psutil's creation time.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except (OSError, IndexError):
        try:
            process = psutil.Process(pid)
            return None if process.status() == psutil.STATUS_ZOMBIE else f"{process.create_time():.2f}"
        except psutil.Error:
            return None
    if fields[0] in "ZX":
        try:
            ended = len(list(Path(f"/proc/{pid}/task").iterdir())) <= 1
        except OSError:
            ended = True
        if ended:
            return None
    return f"{boot}:{fields[19]}"


def is_running(process: ProcessId) -> bool:
    """Tell whether this very process still runs."""
    return start_mark(process.pid) == process.started


def spawn(
    argv: Sequence[str | Path], *, log: Path, cwd: Path, record: Callable[[ProcessId], None]
) -> subprocess.Popen[bytes]:
    """Start a program in a session of its own, its output appended to `log`; `record` is called before it runs."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        if log.stat().st_size > _LOG_LIMIT_BYTES:
            log.replace(log.with_suffix(".log.1"))
    with log.open("ab") as output:
        child = subprocess.Popen(
            ["/bin/sh", "-c", _WAIT_FOR_GO, "headrace-stack", *map(str, argv)],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=cwd,
            start_new_session=True,
        )
    assert child.stdin is not None
    record(ProcessId(child.pid, start_mark(child.pid) or "gone"))
    with contextlib.suppress(BrokenPipeError):
        child.stdin.write(b"\n")
        child.stdin.close()
    return child


def end(process: ProcessId, *, polite: signal.Signals, patience_seconds: float) -> bool:
    """End a process and what it has started: `polite` first, SIGKILL after `patience_seconds`.

    Returns False when SIGKILL was needed. A process that is stopped (SIGSTOP) is continued so that it can end in order.
    With `polite=SIGKILL` the whole family goes at once, as in a power cut.
    """
    if not is_running(process):
        return True
    family = _family(process.pid)
    marks = [ProcessId(member.pid, started) for member in family if (started := start_mark(member.pid))]
    in_order = polite is not signal.SIGKILL
    if in_order:
        _signal(family[:1], polite)
        _signal(family, signal.SIGCONT)
        in_order = _wait_gone(marks, patience_seconds)
    if not in_order:
        _signal(family, signal.SIGKILL)
        _wait_gone(marks, 10)
    return in_order


def send(process: ProcessId, number: signal.Signals) -> None:
    """Send a signal to a recorded process; SIGSTOP and SIGCONT go to its children too."""
    if is_running(process):
        family = _family(process.pid)
        _signal(family if number in (signal.SIGSTOP, signal.SIGCONT) else family[:1], number)


def listens(process: ProcessId, port: int) -> bool:
    """Tell whether this very process, or a child of it, is what listens on the TCP port."""
    for member in _family(process.pid):
        try:
            sockets = member.net_connections(kind="tcp")
        except psutil.Error:
            continue
        if any(s.status == psutil.CONN_LISTEN and s.laddr.port == port for s in sockets):
            return is_running(process)
    return False


def _family(pid: int) -> list[psutil.Process]:
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.Error:
        return []


def _wait_gone(members: list[ProcessId], timeout_seconds: float) -> bool:
    deadline = time.monotonic() + timeout_seconds
    while any(is_running(member) for member in members):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


def _signal(processes: list[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.send_signal(number)
