"""`python -m tools.simulator check LEDGER`: what became of a run, during it or afterwards."""

import argparse
import sys
from pathlib import Path

from settings import SettingsError, load
from tools.simulator.command import run_check


def main(arguments: list[str] | None = None) -> int:
    """Check a ledger against the services that the settings lead to; 0 when nothing is missing or doubled."""
    parser = argparse.ArgumentParser(prog="python -m tools.simulator", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("check", help="ask table and topics for what a ledger says was acknowledged")
    check.add_argument("ledger", type=Path)
    check.add_argument("--run", help="the run's id (default: the last one)")
    check.add_argument("--settle", action="store_true", help="wait until nothing changes any more")
    options = parser.parse_args(arguments)
    try:
        return run_check(load(), options.ledger, options.run, settling=options.settle)
    except (SettingsError, ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
