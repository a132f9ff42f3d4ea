"""``faust -A streams alarms test``: when a rule would have fired on history; connects to nothing."""

from __future__ import annotations

import sys
from pathlib import Path

import click

import settings as configuration
from devices.alarms import rules
from devices.alarms.replay import report


@click.group()
def alarms() -> None:
    """Work with alarm rules."""


@alarms.command("test")
@click.option("--rule", "rule_id", required=True, help="Id of a rule in alarms.yaml.")
@click.option(
    "--csv",
    "file",
    required=True,
    type=click.Path(exists=True, dir_okay=False, allow_dash=True, path_type=Path),
    help="History with the columns time and value, as the table readings has them; - for standard input.",
)
def test(rule_id: str, file: Path) -> None:
    """Print when a rule would have opened and resolved alarms, had it been there; exit 1 where it cannot be said."""
    path = configuration.load().config_path / "alarms.yaml"
    found, errors = rules.read(path)
    rule = next((one for one in found if one.id == rule_id), None)
    if rule is None:
        for error in errors:
            click.echo(f"{error}", err=True)
        known = ", ".join(one.id for one in found) or "none"
        click.echo(f"{path} has no sound rule with the id {rule_id!r}; it has: {known}", err=True)
        sys.exit(1)
    try:
        with click.open_file(str(file), encoding="utf-8-sig") as lines:
            for line in report(rule, lines):
                click.echo(line)
    except (ValueError, OSError) as exc:
        click.echo(f"{file}: {exc}", err=True)
        sys.exit(1)
