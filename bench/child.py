"""A process under measurement: its CPU time and its highest resident memory, read from the system."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Self

import psutil

from bench.work import ROOT


class BenchError(Exception):
    """A measurement could not be made; the message says which and why."""


class Sample(NamedTuple):
    """Where a process stood at one moment: seconds on the clock, CPU seconds, records that it has written."""

    at: float
    cpu: float
    done: int


def cpu_seconds(pid: int) -> float:
    """Return user and system time of a process and its children."""
    process = psutil.Process(pid)
    times = [process.cpu_times(), *(child.cpu_times() for child in process.children(recursive=True))]
    return sum(found.user + found.system for found in times)


def peak_mib(pid: int) -> float:
    """Return the highest resident memory so far: VmHWM, since ru_maxrss counts the parent's at the fork."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    return psutil.Process(pid).memory_info().rss / 2**20


class Child:
    """A program in the background, its output in a file."""

    def __init__(self, command: Sequence[str], log: Path) -> None:
        self._command = list(command)
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        with self._log.open("wb") as output:
            self._process = subprocess.Popen(
                self._command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
            )
        return self

    def __exit__(self, *_: object) -> None:
        process = self._process
        if process is not None and process.poll() is None:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    @property
    def pid(self) -> int:
        """The id of the process. Raises BenchError when it has ended."""
        process = self._process
        if process is None or process.poll() is not None:
            tail = "\n".join(self._log.read_text(errors="replace").splitlines()[-30:])
            raise BenchError(f"{' '.join(self._command)} ended by itself:\n{tail}")
        return process.pid


def follow(
    pid: Callable[[], int], done: Callable[[], int], wanted: int, *, patience_seconds: float, poll_seconds: float = 0.05
) -> list[Sample]:
    """Watch a process until it has written ``wanted`` records; raises BenchError when it stands still."""
    samples: list[Sample] = []
    progress, at = 0, time.monotonic()
    while progress < wanted:
        cpu = cpu_seconds(pid())
        found = done()
        samples.append(Sample(time.monotonic(), cpu, found))
        if found > progress:
            progress, at = found, samples[-1].at
        elif samples[-1].at - at > patience_seconds:
            raise BenchError(f"no progress for {patience_seconds:.0f} s at {progress} of {wanted} records")
        time.sleep(poll_seconds)
    return samples


def ensure_rivals() -> str:
    """Make the rivals' environment where it is missing or outdated; return its interpreter."""
    lock = Path(__file__).with_name("rivals.lock")
    folder = ROOT / ".venv-rivals"
    python, stamp = folder / "bin" / "python", folder / ".installed"
    if not stamp.exists() or stamp.read_text() != lock.read_text():
        print("installing the rivals into .venv-rivals (a minute, the first time)", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        options = ("-q", "--disable-pip-version-check", "--no-input", "--require-hashes")
        subprocess.run([str(python), "-m", "pip", "install", *options, "-r", str(lock)], check=True)
        stamp.write_text(lock.read_text())
    return str(python)


def rival_versions(python: str, *names: str) -> dict[str, str]:
    """Return the versions of packages in the rivals' environment."""
    code = "import sys; from importlib.metadata import version; print(*(version(n) for n in sys.argv[1:]))"
    found = subprocess.run([python, "-c", code, *names], check=True, capture_output=True, text=True).stdout.split()
    return dict(zip(names, found, strict=True))
