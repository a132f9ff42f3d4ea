"""The examples of the documentation run, as they stand there."""

from __future__ import annotations

import ast
import asyncio
import inspect
import re
import subprocess
import sys
import textwrap
import types
from pathlib import Path
from typing import Any

import pytest
from aiokafka.admin import NewTopic
from aiokafka.errors import KafkaError

import streams.resilience
from tests.resilience.consumers.conftest import eventually

DOCS = Path(__file__).resolve().parents[3] / "docs"
_BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


class FakeKafkaConsumer:
    """Three orders, as kafka-python gives them."""

    def __init__(self, *_topics: str, **config: Any) -> None:
        assert config["group_id"]

    def __iter__(self) -> Any:
        return iter([types.SimpleNamespace(value=b'{"order": %d}' % n) for n in (1, 2, 3)])

    def poll(self, timeout_ms: int) -> dict[str, list[int]]:
        """Poll."""
        return {"orders[0]": [timeout_ms]}

    def commit(self, **_: Any) -> None:
        """Commit."""


async def execute(code: str, servers: str) -> None:
    """Run an example, in the loop where it awaits, else in a thread: it may block."""
    code = code.replace("localhost:9092", servers).replace("localhost:1", "127.0.0.1:1")
    namespace: dict[str, Any] = {"asyncio": asyncio, "__name__": "example"}
    if "from streams import app" in code:
        # The app is one for the whole process, and other tests use it: an agent more would be theirs too.
        await asyncio.wait_for(asyncio.to_thread(in_a_process, code), 90)
        return
    flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
    compiled = compile(code, "example", "exec", flags=flags, dont_inherit=True)
    if compiled.co_flags & inspect.CO_COROUTINE:
        await asyncio.wait_for(eval(compiled, namespace), 90)  # noqa: S307 - the documentation's own code
    else:
        await asyncio.wait_for(asyncio.to_thread(exec, compiled, namespace), 90)


def in_a_process(code: str) -> None:
    """Run an example that awaits in a process of its own."""
    body = "async def example():\n" + textwrap.indent(code, "    ") + "\nimport asyncio\nasyncio.run(example())\n"
    subprocess.run([sys.executable, "-c", body], check=True, cwd=DOCS.parent)


@pytest.fixture
async def orders(broker: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """Topics `orders` with three messages and `orders_errors`, made once; a stand-in for kafka-python."""
    module = types.ModuleType("kafka")
    module.KafkaConsumer = FakeKafkaConsumer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "kafka", module)
    if "orders" not in await broker.admin.list_topics():
        await broker.admin.create_topics([NewTopic("orders", 1, 1), NewTopic("orders_errors", 1, 1)])

        async def led() -> bool:
            try:
                described = await broker.admin.describe_topics(["orders", "orders_errors"])
            except KafkaError:
                return False
            return all(t["partitions"] and all(p["leader"] >= 0 for p in t["partitions"]) for t in described)

        await eventually(led, "leaders")
        await broker.send("orders", [{"order": n} for n in (1, 2, 3)])
    servers: str = broker.servers
    return servers


def blocks(name: str) -> list[str]:
    """Return the Python blocks of a page."""
    return _BLOCK.findall((DOCS / name).read_text())


@pytest.mark.parametrize("number", range(len(blocks("consumers.md"))))
async def test_consumers(orders: str, number: int) -> None:
    """An example of consumers.md runs."""
    await execute(blocks("consumers.md")[number], orders)


async def test_migration(orders: str) -> None:
    """The examples of migration.md run, in their order."""
    for code in blocks("migration.md"):
        await execute(code, orders)


def test_every_name_is_documented() -> None:
    """Each public name has its place in consumers.md, or in faust.md."""
    page = "".join((DOCS / name).read_text() for name in ("consumers.md", "faust.md"))
    assert [name for name in streams.resilience.__all__ if name not in page] == []
