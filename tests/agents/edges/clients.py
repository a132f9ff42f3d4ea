"""CoAP clients that are programs of their own: libcoap's (Debian: libcoap3-bin), aiocoap's where that is not installed.

What the tests ask of a server is the same with either.
"""

from __future__ import annotations

import asyncio
import functools
import importlib.util
import json
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

import pytest

from agents.edges.coap_security import KeysError, load_security
from tools.stack import machine

_JSON_FORMAT: Final = 50
DTLS: Final = importlib.util.find_spec("DTLSSocket") is not None


async def run(*command: str | Path) -> str:
    """Run a program and return what it says."""
    process = await asyncio.create_subprocess_exec(
        *command, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    out, _ = await asyncio.wait_for(process.communicate(), 60)
    return out.decode(errors="replace")


def _aiocoap() -> Path:
    return Path(sys.executable).with_name("aiocoap-client")


async def post(uri: str, file: Path, *, confirmable: bool = True, block_bytes: int = 1024) -> str:
    """Post the JSON in ``file``; return what the client says."""
    libcoap = machine.find_libcoap()
    if libcoap is not None:
        kind = () if confirmable else ("-N",)
        body = ("-t", str(_JSON_FORMAT), "-b", str(block_bytes), "-f", str(file))
        return await run(libcoap, *kind, "-B", "20", "-m", "post", *body, uri)
    kind = () if confirmable else ("--non",)
    size = ("--payload-initial-szx", str(block_bytes.bit_length() - 5))
    body = ("--content-format", str(_JSON_FORMAT), "--payload", f"@{file}")
    return await run(_aiocoap(), *kind, "-m", "POST", *size, *body, uri)


async def get(uri: str, *, confirmable: bool = True, block_bytes: int = 1024) -> str:
    """Get ``uri``, in blocks of that size where the client can ask for them; return what it says."""
    libcoap = machine.find_libcoap()
    if libcoap is not None:
        kind = () if confirmable else ("-N",)
        return await run(libcoap, *kind, "-B", "20", "-m", "get", "-b", str(block_bytes), uri)
    return await run(_aiocoap(), *(() if confirmable else ("--non",)), uri)


async def post_secured(uri: str, file: Path, *, identity: str, key: str) -> str:
    """Post the JSON in ``file`` over DTLS; return what the client says."""
    libcoap = machine.find_libcoap(dtls=True)
    if libcoap is not None:
        return await run(
            libcoap, "-B", "5", "-u", identity, "-k", key, "-m", "post", "-t", str(_JSON_FORMAT), "-f", str(file), uri
        )
    credentials = file.with_suffix(".credentials.json")
    secret = {"dtls": {"psk": {"ascii": key}, "client-identity": {"ascii": identity}}}
    credentials.write_text(json.dumps({uri: secret}))
    body = ("--content-format", str(_JSON_FORMAT), "--payload", f"@{file}")
    try:
        return await run(_aiocoap(), "--credentials", str(credentials), "-m", "POST", *body, uri)
    except TimeoutError:
        return "timeout"


def with_dtls(test: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
    """Run ``test``, which serves coaps; where DTLSSocket is not built, check that keys are refused and why."""
    if DTLS:
        return test

    @functools.wraps(test)
    async def refused(tmp_path: Path, **_: Any) -> None:
        with pytest.raises(KeysError, match="gcc, make, autoconf and libtool"):
            load_security(None, tmp_path / "keys.yaml", tmp_path)

    return refused
