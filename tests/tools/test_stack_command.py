"""`make stack` as a process: stack.env, signals, and what a killed one leaves behind."""

import contextlib
import json
import os
import random
import signal
import smtplib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.tools.support import CONNECTIONS, NAMES, ROOT, mails, until
from tools.stack import Stack, processes
from tools.stack.processes import ProcessId


class Command:
    """`python -m tools.stack` as a process of its own."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.env_file = folder / "stack.env"
        self.folder = folder
        environment = os.environ | {"HEADRACE_STATE": str(folder)}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tools.stack", *arguments],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def ready(self) -> dict[str, str]:
        """Wait for stack.env and return it."""
        until(lambda: self.env_file.exists() or self.process.poll() is not None, "stack.env is written")
        return dict(line.split("=", 1) for line in self.env_file.read_text().splitlines())

    def parts(self) -> dict[str, int]:
        """Return the recorded processes of the parts."""
        return {k: v[0] for k, v in json.loads((self.folder / "stack.json").read_text())["processes"].items()}

    def end(self, number: signal.Signals) -> tuple[int, str]:
        """Send a signal; return the exit code and what was printed."""
        self.process.send_signal(number)
        printed, _ = self.process.communicate(timeout=60)
        return self.process.returncode, printed


@pytest.fixture
def command(tmp_path: Path) -> Iterator[Callable[..., Command]]:
    """Start the command on one folder, as often as a test likes; whatever is left is ended."""
    started: list[Command] = []

    def start(*arguments: str) -> Command:
        started.append(Command(tmp_path / "state", *arguments))
        return started[-1]

    yield start
    for one in started:
        with contextlib.suppress(ProcessLookupError):
            one.process.kill()
        one.process.communicate()
    stale = Stack(tmp_path / "state", ())
    stale.acquire()
    stale.stop(discard=True)


WITHOUT = ("--without", "kafka", "--without", "postgresql")


def test_command_runs_all_and_ends_all(command: Callable[..., Command]) -> None:
    """stack.env appears once everything answers, equals what is printed, and TERM stops every process it started."""
    one = command()
    env = one.ready()
    assert set(env) == CONNECTIONS
    parts = one.parts()
    assert set(parts) == set(NAMES)
    code, printed = one.end(signal.SIGTERM)
    assert code == 0
    assert "".join(f"{k}={v}\n" for k, v in env.items()) in printed
    assert not any(processes.start_mark(pid) for pid in parts.values())
    assert not one.env_file.exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_command_ends_on_other_signals(command: Callable[..., Command], number: signal.Signals) -> None:
    """Ctrl-C and a closed terminal stop it as TERM does."""
    one = command(*WITHOUT)
    one.ready()
    parts = one.parts()
    assert one.end(number)[0] == 0
    assert not any(processes.start_mark(pid) for pid in parts.values())


def test_orphans_of_a_killed_command_are_ended(command: Callable[..., Command]) -> None:
    """After SIGKILL of the command its servers live on; the next start ends exactly them and keeps data and ports."""
    one = command("--without", "kafka")
    env = one.ready()
    orphans = one.parts()
    with smtplib.SMTP("127.0.0.1", int(env["SMTP_URL"].rsplit(":", 1)[1])) as client:
        client.sendmail("a@localhost", ["b@localhost"], b"Subject: kept\r\n\r\nbody\r\n")
    one.end(signal.SIGKILL)
    assert all(processes.start_mark(pid) for pid in orphans.values())
    two = command("--without", "kafka")
    until(lambda: not any(processes.start_mark(pid) for pid in orphans.values()), "the orphans are gone")
    until(lambda: "mqtt" in two.parts(), "the parts are recorded anew")
    assert two.ready() == env
    assert [m["subject"] for m in mails(env)] == ["kept"]
    code, printed = two.end(signal.SIGTERM)
    assert code == 0
    assert all(f"ending process {pid}, left by a stack that was killed" in printed for pid in orphans.values())


def test_second_command_is_refused_and_leaves_the_first_alone(command: Callable[..., Command]) -> None:
    """A second stack on the folder exits 1 naming the first one's process; stack.env stays."""
    one = command(*WITHOUT)
    one.ready()
    two = command(*WITHOUT)
    printed, _ = two.process.communicate(timeout=60)
    assert two.process.returncode == 1
    assert f"process {one.process.pid}" in printed
    assert one.env_file.exists()
    assert one.process.poll() is None


def test_command_starts_a_part_again_that_ended(command: Callable[..., Command]) -> None:
    """A server that is killed from outside comes back on its port."""
    one = command(*WITHOUT)
    env = one.ready()
    killed = one.parts()["valkey"]
    psutil.Process(killed).kill()
    until(lambda: one.parts().get("valkey") not in (None, killed), "Valkey is started again")
    port = int(env["REDIS_URL"].rsplit(":", 1)[1].split("/")[0])
    until(
        lambda: processes.listens(ProcessId(pid := one.parts()["valkey"], processes.start_mark(pid)), port),
        "it listens",
    )
    code, printed = one.end(signal.SIGTERM)
    assert code == 0
    assert "Valkey ended by itself" in printed


def test_part_left_out_passes_the_users_setting_on(
    command: Callable[..., Command], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--without kafka` starts no broker and writes the setting that leads to the user's own."""
    monkeypatch.setenv("KAFKA_BOOTSTRAP_SERVERS", "kafka.example:9092")
    one = command(*WITHOUT)
    assert one.ready()["KAFKA_BOOTSTRAP_SERVERS"] == "kafka.example:9092"
    assert "kafka" not in one.parts()


def test_command_killed_at_any_moment_leaves_a_folder_that_starts(command: Callable[..., Command]) -> None:
    """SIGKILL while data are laid out and servers come up (seed 11): no stray is left, no half-made data."""
    rng = random.Random(11)
    for _ in range(4):
        one = command()
        time.sleep(rng.uniform(0.3, 2.0))
        one.end(signal.SIGKILL)
    last = command()
    assert set(last.ready()) == CONNECTIONS
    ours = {str(last.folder) in " ".join(p.info["cmdline"] or []) and p.pid for p in psutil.process_iter(["cmdline"])}
    assert ours - {False} <= {*last.parts().values()}
    assert last.end(signal.SIGTERM)[0] == 0
