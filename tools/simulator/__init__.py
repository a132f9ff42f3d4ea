"""A seeded fleet of devices, the ledger of what was acknowledged to them, and the checker that asks for it.

fleet = Fleet(Plan(devices=300, rate=500, messages=20_000), env["MQTT_URL"], ledger_path=path)
fleet.start()
fleet.join()
report = settle(fleet.book, Places.from_env(env))      # or load(path)[-1] for the book of a run that is over
assert report.ok, report.text()
"""

from tools.simulator.checker import Missing, Report, check, examine, judge, settle
from tools.simulator.controllers import Controllers, LightController
from tools.simulator.evidence import Places
from tools.simulator.fleet import Fleet, Plan, new_run
from tools.simulator.ledger import Book, Ledger, load
from tools.simulator.message import Message, Outcome
from tools.simulator.operator import Operator, Target
from tools.simulator.watch import Watch

__all__ = [
    "Book",
    "Controllers",
    "Fleet",
    "Ledger",
    "LightController",
    "Message",
    "Missing",
    "Operator",
    "Outcome",
    "Places",
    "Plan",
    "Report",
    "Target",
    "Watch",
    "check",
    "examine",
    "judge",
    "load",
    "new_run",
    "settle",
]
