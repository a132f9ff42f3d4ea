"""The checker of every scenario: what was acknowledged is stored, or a dead letter, or a drop that was meant.

It lives with the simulator that writes the ledger (`tools/simulator/checker.py`), because `make demo` and
`faust -A streams simulate --check` end with it too.
"""

from tools.simulator.checker import Missing, Report, check, disorder, examine, judge, settle
from tools.simulator.evidence import Places
from tools.simulator.ledger import Book, Ledger, load

__all__ = ["Book", "Ledger", "Missing", "Places", "Report", "check", "disorder", "examine", "judge", "load", "settle"]
