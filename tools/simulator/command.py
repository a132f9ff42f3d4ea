"""`faust -A streams simulate` and `python -m tools.simulator check`: a fleet from the command line."""

import logging
import signal
import sys
import time
from pathlib import Path
from types import FrameType

from settings import Settings
from tools.simulator.checker import Report, check, settle
from tools.simulator.evidence import Places
from tools.simulator.fleet import Fleet, Plan
from tools.simulator.ledger import load

__all__ = ["places_of", "run_check", "simulate"]


def places_of(settings: Settings) -> Places:
    """Return where to look for what became of messages, security included."""
    options = settings.kafka_client_options()
    servers = ",".join(options.pop("bootstrap_servers"))
    return Places(settings.database_url, servers, settings.topic_prefix, options)


def simulate(settings: Settings, plan: Plan, ledger: Path, *, checking: bool) -> int:
    """Run a fleet against `MQTT_URL` and `COAP_BIND` until its plan or Ctrl-C ends it; with `checking` check the store.

    Returns 0, or 1 where the broker is away or the check has found something.
    """
    fleet = Fleet(plan, settings.mqtt_url, ledger_path=ledger, coap_url=f"coap://{settings.coap_bind}")

    def end(_number: int, _frame: FrameType | None) -> None:
        fleet.stop()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)
    try:
        fleet.start(10.0)
    except ConnectionError as error:
        print(f"simulate: {error}", file=sys.stderr)
        return 1
    print(f"simulate: run {fleet.run}, seed {plan.seed}, {plan.devices} devices; ledger: {ledger}", flush=True)
    begun, live = time.monotonic(), sys.stdout.isatty()
    try:
        while not fleet.join(1.0):
            line = _progress(fleet, time.monotonic() - begun)
            print(f"\r{line}\x1b[K" if live else line, end="" if live else "\n", flush=True)
    finally:
        fleet.close()
    print(f"{chr(13) if live else ''}{_progress(fleet, time.monotonic() - begun)}")
    if fleet.book.refused:
        reason = next(iter(fleet.book.refused.values()))
        print(
            f"simulate: {len(fleet.book.refused)} messages were not taken: {reason}; do the mqtt and coap stages run?"
        )
    return _print(settle(fleet.book, places_of(settings))) if checking else 0


def run_check(settings: Settings, ledger: Path, run: str | None, *, settling: bool) -> int:
    """Check a run of a ledger (the last one, or the one named) against the store; 0 when nothing is missing."""
    logging.getLogger("aiokafka").setLevel(logging.ERROR)
    books = load(ledger)
    chosen = books[-1:] if run is None else [book for book in books if book.run == run]
    if not chosen:
        print(f"{ledger} has no run {run}; it has {', '.join(book.run for book in books)}", file=sys.stderr)
        return 1
    judging = settle if settling else check
    return _print(judging(chosen[0], places_of(settings)))


def _progress(fleet: Fleet, seconds: float) -> str:
    rate = fleet.acknowledged / seconds if seconds else 0.0
    state = "" if fleet.is_connected or not fleet.running else "   (broker away)"
    return f"{seconds:6.0f} s   {rate:8.1f}/s   sent {fleet.sent:,}   acknowledged {fleet.acknowledged:,}{state}"


def _print(report: Report) -> int:
    print(report.text())
    return 0 if report.ok else 1
