"""What a state folder remembers between starts: ports, processes, identities. And who holds it.

`stack.json` is replaced by one rename at each change, so that a reader never sees half of it. `stack.lock` is held
(flock) as long as a stack lives on the folder, and the kernel lets go of it however that stack ends.
"""

import contextlib
import fcntl
import json
import os
import shlex
import threading
from pathlib import Path
from typing import Any

from tools.stack.errors import StackError
from tools.stack.processes import ProcessId

#: In the state folder while all of a stack answers: the settings that lead to it.
ENV_FILE = "stack.env"


class State:
    """The memory of one state folder; safe to use from several threads."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file = folder / "stack.json"
        self._lock = threading.Lock()
        self._lock_file: int | None = None
        self._data: dict[str, Any] = {}
        self.cancelled = threading.Event()  # set: whoever waits for a server gives up

    def acquire(self) -> None:
        """Take the folder for this process, or raise StackError with the id of the one that has it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.folder / "stack.lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.read(descriptor, 32).decode(errors="replace").strip() or "unknown"
            os.close(descriptor)
            raise StackError(
                f"another stack (process {holder}) is running on {self.folder}; stop it, "
                f"or set HEADRACE_STATE to another folder"
            ) from None
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())
        self._lock_file = descriptor
        with contextlib.suppress(OSError, ValueError):
            self._data = json.loads(self._file.read_text())

    def release(self) -> None:
        """Let go of the folder."""
        if self._lock_file is not None:
            os.close(self._lock_file)
            self._lock_file = None

    def get(self, section: str, name: str) -> Any:
        """Return what is remembered under `name`, or None."""
        with self._lock:
            return self._data.get(section, {}).get(name)

    def put(self, section: str, name: str, value: Any) -> None:
        """Remember `value`; None forgets."""
        with self._lock:
            entries = self._data.setdefault(section, {})
            if value is None:
                entries.pop(name, None)
            else:
                entries[name] = value
            write_by_rename(self._file, json.dumps(self._data, indent=1))

    def ports(self) -> set[int]:
        """Return every port that is remembered."""
        with self._lock:
            return set(self._data.get("ports", {}).values())

    def processes(self) -> dict[str, ProcessId]:
        """Return the recorded processes by the part that they belong to."""
        with self._lock:
            return {name: ProcessId(*value) for name, value in self._data.get("processes", {}).items()}


def write_by_rename(path: Path, text: str) -> None:
    """Put a file in place whole, or not at all."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    draft.write_text(text)
    draft.replace(path)


def render(env: dict[str, str]) -> str:
    """Return `KEY=VALUE` lines that a shell and an env-file reader take alike."""
    return "".join(f"{name}={shlex.quote(value)}\n" for name, value in env.items())
