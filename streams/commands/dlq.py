"""``faust -A streams dlq list | show | replay | discard``: look into dead letters, send them back, close the matter."""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime
from typing import Any

import click
import msgspec

import settings as configuration
from streams import desk


@click.group()
def dlq() -> None:
    """Look into dead letters and replay them."""


def _filters(command: Callable[..., Any]) -> Callable[..., Any]:
    options = (
        click.option("--stage", help="Only those of this stage."),
        click.option(
            "--class", "kind", type=click.Choice(["poison", "exhausted", "rejected"]), help="Only this class."
        ),
        click.option("--device", help="Only those of this device."),
        click.option("--exception", help="Only those whose exception or message contains this."),
        click.option("--since", help="Written since then: RFC 3339, or 15m, 2h, 3d ago."),
        click.option("--until", help="Written before then."),
    )
    for option in reversed(options):
        command = option(command)
    return command


def _filter(ids: tuple[str, ...], undecided: bool, **chosen: Any) -> desk.Filter:
    now = datetime.now(UTC)
    try:
        since = desk.ago(chosen["since"], now) if chosen.get("since") else None
        until = desk.ago(chosen["until"], now) if chosen.get("until") else None
    except ValueError as exc:
        raise click.BadParameter(f"{exc}; write 2026-01-31T12:00:00Z, or 15m, 2h, 3d") from exc
    return desk.Filter(
        frozenset(ids),
        chosen.get("stage"),
        chosen.get("kind"),
        chosen.get("device"),
        chosen.get("exception"),
        since,
        until,
        undecided,
    )


def _run(work: Coroutine[Any, Any, Any]) -> Any:
    try:
        return asyncio.run(work)
    except Exception as exc:
        click.echo(f"{type(exc).__name__}: {exc}", err=True)
        sys.exit(1)


def _table(found: list[desk.Letter]) -> None:
    for letter in found:
        decided = f" [{letter.decision.action}]" if letter.decision else ""
        click.echo(
            f"{letter.id:>12}  {letter.written:%Y-%m-%d %H:%M:%S}Z  "
            f"{letter.told('stage'):<11} {letter.told('class'):<9} "
            f"{desk.line(letter.device):<20.20} {desk.line(letter.told('message')):.90}{decided}"
        )


@dlq.command("list")
@_filters
@click.option("--limit", default=50, show_default=True, help="At most so many, the newest.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
def list_(limit: int, as_json: bool, **chosen: Any) -> None:
    """List dead letters, newest first."""
    settings = configuration.load()
    found: list[desk.Letter] = _run(desk.letters(settings, _filter((), False, **chosen), limit=limit))
    if as_json:
        for letter in found:
            click.echo(msgspec.json.encode(letter.as_dict()).decode())
        return
    _table(found)
    by_class = Counter(f"{letter.told('stage')}/{letter.told('class')}" for letter in found)
    click.echo(f"{len(found)} shown" + "".join(f", {name} {count}" for name, count in sorted(by_class.items())))


@dlq.command()
@click.argument("ids", nargs=-1, required=True)
def show(ids: tuple[str, ...]) -> None:
    """Show dead letters whole: headers and value."""
    found: list[desk.Letter] = _run(desk.letters(configuration.load(), desk.Filter(frozenset(ids)), limit=len(ids)))
    for letter in found:
        click.echo(msgspec.json.format(msgspec.json.encode(letter.as_dict(whole=True))).decode())
    missing = set(ids) - {letter.id for letter in found}
    if missing:
        click.echo(f"not found: {', '.join(sorted(missing))}", err=True)
        sys.exit(1)


def _decide(action: str, ids: tuple[str, ...], everything: bool, dry_run: bool, limit: int, **rest: Any) -> None:
    if (
        not ids
        and not everything
        and not any(rest.get(name) for name in ("stage", "kind", "device", "exception", "since", "until"))
    ):
        raise click.UsageError("name the letters (ids or filters), or say --all")
    rate, reason = rest.pop("rate", None), rest.pop("reason", "")
    settings = configuration.load()
    # one that is named and was decided before is refused with a word, not passed over
    wanted = _filter(ids, undecided=not ids, **rest)
    found: list[desk.Letter] = _run(desk.letters(settings, wanted, limit=sys.maxsize))
    missing = sorted(set(ids) - {letter.id for letter in found})
    # the oldest first: a device's messages go back in the order in which they came
    found.sort(key=lambda letter: (letter.written, letter.partition, letter.offset))
    del found[limit:]
    if dry_run:
        _table(found)
        outcome: desk.Outcome = _run(desk.foresee(settings, found, action))
    else:
        outcome = _run(desk.decide(settings, found, action, reason=reason, rate_per_second=rate))
    outcome.refused += [f"{name}: there is no such dead letter, or the filters leave it out" for name in missing]
    for word in outcome.refused:
        click.echo(word, err=True)
    click.echo(f"{outcome.done} {'would be ' * dry_run}{action}, {len(outcome.refused)} refused")
    sys.exit(1 if outcome.refused else 0)


@dlq.command()
@click.argument("ids", nargs=-1)
@_filters
@click.option("--all", "everything", is_flag=True, help="All that is undecided.")
@click.option("--dry-run", is_flag=True, help="Only say what would be done.")
@click.option("--rate", type=float, help="At most so many a second.")
@click.option("--limit", default=100_000, show_default=True, help="At most so many, the oldest.")
def replay(ids: tuple[str, ...], **rest: Any) -> None:
    """Send dead letters back to the topics that they came from, each once."""
    _decide("replayed", ids, **rest)


@dlq.command()
@click.argument("ids", nargs=-1)
@_filters
@click.option("--all", "everything", is_flag=True, help="All that is undecided.")
@click.option("--dry-run", is_flag=True, help="Only say what would be done.")
@click.option("--reason", default="", help="Kept with the decision.")
@click.option("--limit", default=100_000, show_default=True, help="At most so many, the oldest.")
def discard(ids: tuple[str, ...], **rest: Any) -> None:
    """Note that dead letters need nothing more; they stay readable."""
    _decide("discarded", ids, **rest)
