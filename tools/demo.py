"""`make demo`: the whole pipeline on this machine, with a simulated fleet, until Ctrl-C or for `DEMO_SECONDS`.

Guarantees: what it starts it stops, also on errors and signals, and what a killed demo left running the next one ends;
nothing but free ports of loopback and the state folder is touched. Exit code 0 only when every message that was
acknowledged is stored or is a dead letter, no row is there twice, and every command that was sent has its end.
"""

import contextlib
import json
import logging
import signal
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

from settings import Settings, SettingsError, environment
from tools.simulator import (
    Controllers,
    Fleet,
    LightController,
    Operator,
    Places,
    Plan,
    Report,
    Target,
    Watch,
    settle,
)
from tools.stack import Stack, StackError, processes
from tools.stack.processes import ProcessId
from tools.stack.state import ENV_FILE, render, write_by_rename
from tools.worker import Worker, WorkerError

PLAN = Plan(devices=300, seed=1, rate=200.0, duplicates=0.02, poison=0.002, late=0.01, hot=(5.0, 25.0), coap=0.3)
_WORKER_FILE = "demo-worker.json"
_SETTLE_SECONDS = 30.0
# Controllers and sensors of the fleet that get configurations, beside a light controller of their own.
_CLIMATE_TARGETS, _SENSOR_TARGETS = 4, 2
_LIGHTS_ID = 2_121_004
_COMMAND_EVERY_SECONDS = 1.0
_COMMANDS_AFTER_SECONDS = 2.0
# Long enough for a second attempt after the time-out of the first.
_COMMANDS_PATIENCE_SECONDS = 90.0


class Screen:
    """One line that is written over each second, and lines that stay above it; each on a line of its own in a file."""

    def __init__(self) -> None:
        self._live = sys.stdout.isatty()
        self._lock = threading.Lock()
        self._line = ""

    def say(self, text: str) -> None:
        """Print what stays."""
        with self._lock:
            if self._live and self._line:
                print(f"\r{text}\x1b[K\n{self._line}", end="", flush=True)
            else:
                print(text, flush=True)

    def progress(self, text: str) -> None:
        """Print what the next second replaces; nothing where nobody watches a line change."""
        with self._lock:
            self._line = text
            print(f"\r{text}\x1b[K" if self._live else text, end="" if self._live else "\n", flush=True)

    def settle(self) -> None:
        """Leave the line as it is."""
        with self._lock:
            if self._live and self._line:
                print(flush=True)
            self._line = ""


class Demo:
    """One demo: `run` is its whole life."""

    def __init__(self, state: Path, seconds: float) -> None:
        self.folder = state.absolute()
        self.seconds = seconds
        self.begun = time.monotonic()
        self.screen = Screen()
        self.ended = threading.Event()
        self.stack = Stack(self.folder, report=self._report)
        self.worker: Worker | None = None
        self.fleet: Fleet | None = None
        self.watch: Watch | None = None
        self.controllers: Controllers | None = None
        self.operator: Operator | None = None
        self._mails_before = 0
        self._mails_told = 0
        self._played = 0.0

    @property
    def elapsed(self) -> float:
        """Seconds since the demo began."""
        return time.monotonic() - self.begun

    def run(self) -> int:
        """Start everything, play until the end, check, stop everything; the exit code."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._end)
        try:
            self.stack.acquire()
            self._forget_env()
            self._end_leftover()
            self._report(f"starting in {self.folder}; logs are in {self.folder / 'logs'}")
            self.stack.start()
            if not self._start_worker():
                print("demo: stopped before it had begun")
                return 1
            self._play()
            return self._finish()
        except (StackError, WorkerError, ConnectionError) as error:
            self.screen.settle()
            if self.ended.is_set() and self.fleet is None:
                print("demo: stopped before it had begun")
                return 1
            print(f"demo: error: {error}", file=sys.stderr)
            return 1
        finally:
            self._stop()

    # -- its parts

    def _start_worker(self) -> bool:
        env = {**self.stack.env}
        log = self.folder / "logs" / "worker.log"
        self.worker = Worker(env, log=log, name="the worker", record=self._record_worker)
        self.worker.spawn()
        self._report(f"worker started with all stages (log: {log})")
        deadline = time.monotonic() + 120
        while not self.worker.ready():
            if self.ended.wait(0.1):
                return False
            if not self.worker.alive or time.monotonic() > deadline:
                self.worker.wait_ready(1.0)  # raises with the reasons
        settings = {**env, "WEB_BIND": self.worker.url.removeprefix("http://")}
        write_by_rename(self.folder / ENV_FILE, render(settings))
        self._report(f"every stage is ready after {self.elapsed:.1f} s")
        return True

    def _play(self) -> None:
        assert self.worker is not None
        env = self.stack.env
        self._mails_before = self._mails_told = len(self._mails())
        fleet = self.fleet = Fleet(
            PLAN,
            env["MQTT_URL"],
            ledger_path=self.folder / "ledger.jsonl",
            on_sent=self._sent,
            coap_url=f"coap://{env['COAP_BIND']}",
        )
        fleet.start()
        watch = self.watch = Watch(fleet.book, Places.from_env(env), begun=self.begun, on_first=self._first)
        watch.start()
        operator = self._field(fleet)
        commanding = False
        begun = time.monotonic()
        self.screen.say(
            f"demo: {PLAN.devices} devices ({PLAN.coap:.0%} over CoAP) send {PLAN.rate:.0f} messages/s, one runs"
            f" hot from {timedelta(seconds=PLAN.hot[0])} to {timedelta(seconds=PLAN.hot[1])}, some get a command a"  # type: ignore[index]
            f" second; look at\n"
            f"  dashboard   {self.worker.url}/\n"
            f"  health      {self.worker.url}/health/ready\n"
            f"  metrics     {self.worker.url}/metrics\n"
            f"  commands    {self.worker.url}/api/v1/commands\n"
            f"  mail inbox  {env['INBOX_URL']}\n"
            f"  database    {env['DATABASE_URL']}   (table readings)\n"
            f"  ledger      {self.folder / 'ledger.jsonl'}\n"
            f"  shell       set -a; . {self.folder / ENV_FILE}; set +a; .venv/bin/faust -A streams accounts\n"
            + ("  Ctrl-C ends the demo" if not self.seconds else f"  ends by itself after {self.seconds:.0f} s")
        )
        before = 0
        while not self.ended.wait(1.0):
            self._played = time.monotonic() - begun
            if not commanding and self._played >= _COMMANDS_AFTER_SECONDS:
                commanding = True
                operator.start()
            if self.seconds and time.monotonic() - begun >= self.seconds:
                break
            if not self.worker.alive:
                raise WorkerError(f"the worker ended with exit code {self.worker.exit_code}.\n{self.worker.tail()}")
            for part in self.stack.ended():
                self._report(f"{part.title} ended by itself (log: {part.log}), starting it again")
                self.stack.start(part.name)
            if fleet.error is not None:
                fleet.join(0)
            self.screen.progress(self._line(fleet.acknowledged - before))
            before = fleet.acknowledged
            self._tell_mails()

    def _field(self, fleet: Fleet) -> Operator:
        """Have controllers answer commands, and make the operator who sends some."""
        assert self.worker is not None
        lights = LightController(_LIGHTS_ID, "1")
        self.controllers = Controllers(self.stack.env["MQTT_URL"], [lights], client_id=f"controllers-{fleet.run}")
        self.controllers.start()
        climate = [device for device in fleet.devices if fleet.devices[device].family == "fluxor"][:_CLIMATE_TARGETS]
        sensors = [device for device in fleet.devices if fleet.devices[device].family == "efento"][:_SENSOR_TARGETS]
        targets = [Target(device, "config", lambda n: {"T_consigne": 20.0 + n % 10 / 2}, "mqtt") for device in climate]
        targets += [Target(device, "config", lambda n: {"transfer_limit": 1 + n % 100}, "coap") for device in sensors]
        targets.append(Target(str(_LIGHTS_ID), "light_config_task", light_task, "mqtt"))
        self.operator = Operator(
            self.worker.url, targets, name=f"demo-{fleet.run}", every_seconds=_COMMAND_EVERY_SECONDS
        )
        return self.operator

    def _line(self, rate: int) -> str:
        assert self.fleet is not None and self.watch is not None and self.operator is not None
        latency = self.watch.latency_seconds
        return (
            f"{self.elapsed:5.0f} s  {rate:5d}/s  acknowledged {self.fleet.acknowledged:,}"
            f"  stored {self.watch.stored:,}  dead letters {self.watch.dead_letters:,}  device to row "
            + (f"{latency * 1000:.0f} ms" if latency is not None else "-")
            + f"  {self.operator.line()}"
        )

    def _finish(self) -> int:
        assert self.fleet is not None and self.watch is not None and self.operator is not None
        self.screen.settle()
        # Sensors get their commands in answers: as long as some wait, the fleet goes on.
        done = self.operator.finish(_COMMANDS_PATIENCE_SECONDS)
        print("demo: the fleet stops; waiting until everything has arrived", flush=True)
        self.fleet.stop()
        self.fleet.join(60)
        self._wait_for_all_clear()
        self.watch.stop()
        report = settle(self.fleet.book, Places.from_env(self.stack.env), patience_seconds=_SETTLE_SECONDS)
        print(f"demo: the ledger of run {report.run}\n{report.text()}", flush=True)
        print(f"demo: {self.operator.report()}", flush=True)
        return self._verdict(report, commands_ended=done)

    @staticmethod
    def _verdict(report: Report, *, commands_ended: bool) -> int:
        if not report.acknowledged:
            print("demo: nothing was acknowledged", file=sys.stderr)
            return 1
        if not report.ok:
            print("demo: what was sent is not what was stored", file=sys.stderr)
            return 1
        if not commands_ended:
            print(f"demo: commands without an end after {_COMMANDS_PATIENCE_SECONDS:.0f} s", file=sys.stderr)
            return 1
        return 0

    def _stop(self) -> None:
        # A second Ctrl-C must not leave half of it running.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        self.screen.settle()
        stops: list[Callable[[], object]] = [
            *([self._forget_env] if self.stack.held else []),
            *([self.operator.close] if self.operator else []),
            *([self.controllers.stop] if self.controllers else []),
            *([self.fleet.close] if self.fleet else []),
            *([self.watch.stop] if self.watch else []),
            *([self.worker.stop] if self.worker else []),
            *([(self.folder / _WORKER_FILE).unlink] if self.worker else []),
            self.stack.stop,
        ]
        for stop in stops:
            try:
                stop()
            except Exception as error:
                print(f"demo: while stopping: {error}", file=sys.stderr)
        print("demo: stopped; the data stay", flush=True)

    # -- inside

    def _end(self, _number: int, _frame: FrameType | None) -> None:
        self.ended.set()
        self.stack.cancel()

    def _report(self, line: str) -> None:
        self.screen.say(f"demo: {line}")

    def _forget_env(self) -> None:
        (self.folder / ENV_FILE).unlink(missing_ok=True)

    def _sent(self, message: Any) -> None:
        if self.watch is not None:
            self.watch.sent(message)

    def _first(self, device: str, seconds: float) -> None:
        self._report(f"first reading stored after {seconds:.1f} s, of device {device}")

    def _record_worker(self, process: ProcessId) -> None:
        (self.folder / _WORKER_FILE).write_text(json.dumps(process))

    def _end_leftover(self) -> None:
        with contextlib.suppress(OSError, ValueError, TypeError):
            process = ProcessId(*json.loads((self.folder / _WORKER_FILE).read_text()))
            if processes.is_running(process):
                self._report(f"ending worker {process.pid}, left by a demo that was killed")
                # Its servers are gone already, so that an orderly end would only wait for them.
                processes.end(process, polite=signal.SIGTERM, patience_seconds=2)

    def _wait_for_all_clear(self) -> None:
        """Wait a bounded time for the mail that says that the hot device is well again, where it has been."""
        deadline = time.monotonic() + _SETTLE_SECONDS
        while True:
            self._tell_mails()
            opened, resolved = (
                sum(1 for mail in self._mails()[self._mails_before :] if transition_of(mail).endswith(kind))
                for kind in ("-opened", "-resolved")
            )
            if opened <= resolved or self._played < PLAN.hot[1] or time.monotonic() > deadline:  # type: ignore[index]
                return
            time.sleep(0.5)

    def _mails(self) -> list[dict[str, Any]]:
        try:
            url = f"{self.stack.env['INBOX_URL']}/messages.json"
            with urllib.request.urlopen(url, timeout=2) as answer:  # noqa: S310 - the stack's own page
                found: list[dict[str, Any]] = json.load(answer)
        except (OSError, ValueError):
            return []
        return found

    def _tell_mails(self) -> None:
        mails = self._mails()
        for mail in mails[self._mails_told :][:5]:
            which = "first alarm mail" if self._mails_told == self._mails_before else "mail"
            if transition_of(mail).endswith("-resolved"):
                which = "resolved mail"
            self._report(f"{which} after {self.elapsed:.1f} s: {mail.get('subject')!r} to {mail.get('to')}")
            self._mails_told += 1
        self._mails_told = max(self._mails_told, len(mails))


def light_task(number: int) -> dict[str, Any]:
    """Return the n-th task for the light controller: eight, and then the same with other times."""
    return {
        "task_id": number % 8,
        "time_beg": 360 + 30 * (number % 24),
        "duration": 45,
        "day": number % 7,
        "channel": number % 2,
    }


def transition_of(mail: dict[str, Any]) -> str:
    """Return the transition that a mail of the inbox tells of, "" for a mail that is none of Headrace's."""
    return str(dict(mail.get("headers", ())).get("X-Headrace-Transition", ""))


def main() -> int:
    """Run the demo as the environment says (`HEADRACE_STATE`, `DEMO_SECONDS`)."""
    logging.basicConfig(level=logging.ERROR)
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)
    try:
        settings = Settings.from_env(
            {name: value for name, value in environment().items() if name in ("HEADRACE_STATE", "DEMO_SECONDS")}
        )
    except SettingsError as error:
        print(error, file=sys.stderr)
        return 1
    return Demo(Path(settings.headrace_state), settings.demo_seconds).run()


if __name__ == "__main__":
    sys.exit(main())
