"""Any Faust app under commit control by one line: the example of ``docs/faust.md``, and what the line refuses."""

from __future__ import annotations

import asyncio
import json
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import faust
import pytest
from faust.exceptions import ImproperlyConfigured

import streams.resilience
from streams.resilience import ResilientTransport
from streams.resilience.application import App
from streams.resilience.deadletter import header
from streams.resilience.topics import Topic
from tests.resilience.conftest import ROOT, Log

PAGE = ROOT / "docs" / "faust.md"


def example() -> str:
    """Return the example of the page."""
    found = re.search(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    assert found is not None
    return found[1]


def start(folder: Path) -> subprocess.Popen[bytes]:
    """Run the example as a worker."""
    command = [sys.executable, str(folder / "orders.py"), "-D", str(folder / "data"), "worker", "--without-web"]
    with (folder / "worker.log").open("ab") as output:
        # Faust takes these over what the app says: a worker that was killed shall not be waited for for a minute.
        env = {"BROKER_SESSION_TIMEOUT": "6", "BROKER_HEARTBEAT_INTERVAL": "1", "PYTHONPATH": str(ROOT), "PATH": ""}
        return subprocess.Popen(command, cwd=folder, env=env, stdout=output, stderr=output)


@pytest.mark.stack
async def test_the_example_of_the_page(log: Log, tmp_path: Path) -> None:
    """As it stands in the page: what raises is a dead letter, a kill loses nothing, the table goes on, TERM ends it."""
    text = example().replace("localhost:9092", log.servers)
    for name in ("orders-errors", "orders", "totals"):
        text = text.replace(f'"{name}"', f'"{log.prefix}{name}"')
    (tmp_path / "orders.py").write_text(text)
    orders, totals, errors = (f"{log.prefix}{name}" for name in ("orders", "totals", "orders-errors"))
    await log.topic("orders")
    await log.topic("totals")
    child = start(tmp_path)
    try:
        await log.write(orders, *(json.dumps({"amount": n}).encode() for n in range(1, 11)), b'{"price": 3}', b"{")
        assert len(await log.read(totals, 10)) == 10
        (keyless, broken) = await log.read(errors, 2)
        await log.until_committed(orders, orders, 12)
        child.kill()
        child.wait(60)
        await log.write(orders, b'{"amount": 45}')
        child = start(tmp_path)
        last = (await log.read(totals, 11))[-1]
        await log.until_committed(orders, orders, 13)
        child.terminate()
        assert await asyncio.to_thread(child.wait, 90) == 0
    finally:
        child.kill()
        print((tmp_path / "worker.log").read_text()[-6000:])
    assert json.loads(last.value) == {"customer": "k", "spent": 100}, "the table was restored from its changelog"
    assert {keyless.value, broken.value} == {b'{"price": 3}', b"{"}
    classes = {letter.value: header(letter.headers, "dlq-class") for letter in (keyless, broken)}
    assert classes == {b'{"price": 3}': "exhausted", b"{": "poison"}
    assert header(keyless.headers, "dlq-topic") == orders


def test_nothing_else_of_headrace_is_loaded() -> None:
    """Every module of the layer can be imported without settings, stages, devices and configuration."""
    names = [f"streams.resilience.{found.name}" for found in pkgutil.iter_modules(streams.resilience.__path__)]
    code = (
        f"import importlib, sys\nfor name in {names}: importlib.import_module(name)\n"
        "print(*sorted(name for name in sys.modules if name.split('.')[0] in "
        "('settings', 'agents', 'devices', 'tables', 'config', 'tools') or "
        "name.startswith('streams.') and not name.startswith('streams.resilience')))"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert found.stdout.split() == []


def new_app(**options: Any) -> faust.App:
    """Return a Faust app as somebody else's."""
    return faust.App("others", broker="kafka://127.0.0.1:1", store="memory://", **options)


def test_the_line_makes_agents_and_topics_ours_and_leaves_other_apps_alone() -> None:
    """Subclasses of Faust's app keep their own methods; options of Faust that would break the promise are overruled."""

    class Mine(faust.App):
        def hello(self) -> str:
            return "hello"

    app = Mine("others", broker="kafka://127.0.0.1:1", store="memory://", stream_wait_empty=True)
    app.transport = ResilientTransport(app, dead_letters="others-errors", max_attempts=2)
    assert isinstance(app, App) and isinstance(app, Mine) and app.hello() == "hello"
    assert isinstance(app.topic("some"), Topic)
    assert (app.conf.stream_wait_empty, app.resilience.max_attempts) == (False, 2)
    assert [str(url) for url in app.transport.url] == ["kafka://127.0.0.1:1"]
    assert app.producer_transport is app.transport
    assert not isinstance(new_app(), App)


def test_the_line_after_an_app_was_configured() -> None:
    """Somebody has looked at ``app.conf`` before: the options that matter are set all the same."""
    app = new_app()
    assert app.conf.stream_wait_empty
    app.transport = ResilientTransport(app, dead_letters="others-errors")
    assert not app.conf.stream_wait_empty and isinstance(app.topic("some"), Topic)


def test_the_line_comes_first() -> None:
    """After agents it would come too late: they would lose what they raise for."""
    app = new_app()

    @app.agent(app.topic("some"))
    async def some(stream: Any) -> None:
        async for _ in stream:
            pass

    with pytest.raises(ImproperlyConfigured, match="right after the app is made"):
        ResilientTransport(app, dead_letters="others-errors")
    with pytest.raises(ImproperlyConfigured, match="dead_letters is empty"):
        ResilientTransport(new_app(), dead_letters="")


async def test_a_topic_that_was_made_before_the_line() -> None:
    """It is found when the app starts: an agent on it would not be under commit control."""
    app = new_app()
    topic = app.topic("some")
    app.transport = ResilientTransport(app, dead_letters="others-errors")

    @app.agent(topic)
    async def some(stream: Any) -> None:
        async for _ in stream:
            pass

    with pytest.raises(ImproperlyConfigured, match="made before"):
        await app.on_start()


async def test_exactly_once_is_refused() -> None:
    """Faust's transactions belong to its own transport."""
    app = new_app(processing_guarantee="exactly_once")
    app.transport = ResilientTransport(app, dead_letters="others-errors")
    with pytest.raises(ImproperlyConfigured, match="exactly_once"):
        await app.on_start()
