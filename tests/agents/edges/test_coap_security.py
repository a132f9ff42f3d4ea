"""OSCORE and DTLS with real clients: the right key gets in, a wrong one gets nothing in, nobody speaks for another."""

from __future__ import annotations

import asyncio
import json
import random
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiocoap
import pytest
from aiocoap import oscore
from aiocoap.message import Message
from aiocoap.numbers import codes

from agents.edges.coap_oscore import DeviceContext, OscoreShield, sequence_file
from agents.edges.coap_security import KeysError, OscoreKey, load_security
from devices.efento import messages
from tests.agents.edges import clients
from tests.agents.edges.clients import with_dtls
from tests.agents.edges.coap import Site, raw, request, site, until

JSON = b'{"t": 21.5}'
MASTER = "0102030405060708090a0b0c0d0e0f10"
KEY = OscoreKey(device_id="dev-1", recipient_id="01", master_secret=MASTER, master_salt="9e7ca92223786340")


@asynccontextmanager
async def device(here: Site, folder: Path, secret: str = MASTER, sender: str = "01") -> AsyncIterator[Any]:
    """An OSCORE device of aiocoap's; yields what posts a payload to a path."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"sender-id_hex": sender, "recipient-id_hex": "", "secret_hex": secret, "salt_hex": KEY.master_salt}
    (folder / "settings.json").write_text(json.dumps(settings))
    client = await aiocoap.Context.create_client_context()
    client.client_credentials[f"{here.uri}/*"] = oscore.FilesystemSecurityContext(str(folder))

    async def post(path: str, payload: bytes = JSON) -> Message:
        message = Message(code=codes.POST, uri=f"{here.uri}/{path}", payload=payload)
        return await asyncio.wait_for(client.request(message).response, 30)

    try:
        yield post
    finally:
        await client.shutdown()


def secured(folder: Path) -> dict[str, Any]:
    """Return a site's options: the shield of dev-1."""
    return {"shield": OscoreShield([KEY], folder / "server"), "secured": frozenset({"dev-1"})}


async def test_oscore_gets_in_and_names_its_device(tmp_path: Path) -> None:
    """An encrypted message is stored under the key's device; the answer is encrypted."""
    async with site(**secured(tmp_path)) as here, device(here, tmp_path / "client") as post:
        for _ in range(3):
            assert (await post("telemetry/dev-1")).code == codes.CHANGED
        assert [a.device_id for a in here.kafka.records] == ["dev-1"] * 3
        assert here.kafka.records[0].metadata["security"] == "oscore"


async def test_oscore_carries_large_messages(tmp_path: Path) -> None:
    """Blocks of an encrypted body are one record."""
    payload = json.dumps({f"f{n}": n for n in range(1000)}).encode()
    async with site(**secured(tmp_path)) as here, device(here, tmp_path / "client") as post:
        assert (await post("telemetry/dev-1", payload)).code == codes.CHANGED
        assert [a.payload for a in here.kafka.records] == [payload]


@pytest.mark.parametrize(("secret", "sender"), [("ff" * 16, "01"), (MASTER, "02")], ids=["wrong key", "unknown id"])
async def test_a_wrong_oscore_key_gets_nothing_in(secret: str, sender: str, tmp_path: Path) -> None:
    """Refused and counted; no arrival."""
    async with site(**secured(tmp_path)) as here, device(here, tmp_path / "client", secret, sender) as post:
        # aiocoap's client does not accept an answer that is not encrypted, which is right.
        with pytest.raises(aiocoap.error.Error):
            await post("telemetry/dev-1")
        assert here.kafka.records == []
        assert here.counts["bad_key"] == 1


async def test_nobody_speaks_for_another_device(tmp_path: Path) -> None:
    """4.03 and counted: dev-1's key with dev-2's path; 4.01: dev-1's path without its key."""
    async with site(**secured(tmp_path)) as here, device(here, tmp_path / "client") as post:
        assert (await post("telemetry/dev-2")).code == codes.FORBIDDEN
        async with raw(here.server.address) as plain:
            plain.send(request("telemetry/dev-1", JSON))
            assert (await plain.next()).code == codes.UNAUTHORIZED
        assert here.kafka.records == []
        assert (here.counts["another_device"], here.counts["not_secured"]) == (1, 1)


async def test_a_payload_of_another_device_is_refused_under_a_key(tmp_path: Path) -> None:
    """An Efento message is of the serial number in it: 4.03 and counted under the key of another device."""
    of_another = messages.MEASUREMENTS(serial_num=bytes.fromhex("282c02424eed"), battery_status=True)
    async with site(**secured(tmp_path)) as here, device(here, tmp_path / "client") as post:
        assert (await post("m", of_another.SerializeToString())).code == codes.FORBIDDEN
        assert here.kafka.records == []
        assert here.counts["another_device"] == 1


async def test_a_replay_gets_nothing_in(tmp_path: Path) -> None:
    """An encrypted request that comes again under a new message id is refused; after a start it is asked for again."""
    client = DeviceContext(
        OscoreKey(device_id="c", sender_id="01", recipient_id="", master_secret=MASTER, master_salt=KEY.master_salt),
        None,
    )
    plain = Message(code=codes.POST, payload=JSON)
    plain.opt.uri_path = ("telemetry", "dev-1")
    recorded, _ = client.protect(plain)

    def datagram(message: Message, mid: int) -> bytes:
        message.mtype, message.mid, message.token = aiocoap.CON, mid, b"%d" % mid
        return bytes(message.encode())

    async with site(**secured(tmp_path)) as here, raw(here.server.address) as peer:
        for mid in (1, 2):
            peer.send(datagram(recorded, mid))
            await peer.next()
        # The first message after a start is asked for again with Echo; whoever replays cannot answer that.
        assert here.kafka.records == []
        assert here.counts["echo"] == 2
    async with site(**secured(tmp_path)) as here:
        async with device(here, tmp_path / "client") as post:
            for _ in range(3):
                await post("telemetry/dev-1")
        async with raw(here.server.address) as peer:
            peer.send(datagram(recorded, 3))
            assert (await peer.next()).code == codes.UNAUTHORIZED
        assert here.counts["replay"] == 1
        assert len(here.kafka.records) == 3


def test_sequence_numbers_are_never_used_twice(tmp_path: Path) -> None:
    """A context that begins anew goes on behind what the one before it may have used."""
    seen: set[int] = set()
    for _ in range(3):
        context = DeviceContext(KEY, sequence_file(tmp_path, KEY))
        numbers = {context.new_sequence_number() for _ in range(300)}
        assert not numbers & seen
        seen |= numbers


def test_numbers_that_are_not_on_disk_are_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk: taking a number fails until it can be written, however often it is tried."""
    context = DeviceContext(KEY, sequence_file(tmp_path, KEY))
    with monkeypatch.context() as disk:
        disk.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("no space left on device")))
        for _ in range(3):
            with pytest.raises(OSError, match="no space"):
                context.new_sequence_number()
    used = context.new_sequence_number()
    assert DeviceContext(KEY, sequence_file(tmp_path, KEY)).new_sequence_number() > used


OSCORE_FILES = {
    "no YAML": ("devices: [", "not YAML"),
    "unknown field": ("devices: [{device_id: a, recipient_id: '01', master_secret: 'aa', typo: 1}]", "typo"),
    "number": ("devices: [{device_id: a, recipient_id: 1, master_secret: 'aa'}]", "recipient_id"),
    "short": ("devices: [{device_id: a, recipient_id: '01', master_secret: 'aabb'}]", "master_secret"),
    "no digits": ("devices: [{device_id: a, recipient_id: 'zz', master_secret: '" + MASTER + "'}]", "recipient_id"),
    "algorithm": (
        "devices: [{device_id: a, recipient_id: '01', algorithm: rot13, master_secret: '" + MASTER + "'}]",
        "rot13",
    ),
    "twice": (
        "devices:\n" + f"- {{device_id: a, recipient_id: '01', master_secret: '{MASTER}'}}\n" * 2,
        "device a is there twice",
    ),
}


@pytest.mark.parametrize(("text", "expected"), OSCORE_FILES.values(), ids=OSCORE_FILES.keys())
def test_a_key_file_that_is_wrong_says_where(text: str, expected: str, tmp_path: Path) -> None:
    """The setting, the file and the field; never a key."""
    path = tmp_path / "keys.yaml"
    path.write_text(text)
    with pytest.raises(KeysError) as caught:
        load_security(path, None, tmp_path)
    assert f"COAP_OSCORE_KEYS={path}" in str(caught.value)
    assert expected in str(caught.value)
    assert MASTER not in str(caught.value)


def test_a_key_file_is_read(tmp_path: Path) -> None:
    """The documented example gives a shield and a device that must use it."""
    path = tmp_path / "keys.yaml"
    path.write_text(f"devices: [{{device_id: dev-1, recipient_id: '01', master_secret: '{MASTER}'}}]")
    found = load_security(path, None, tmp_path)
    assert found.shield is not None
    assert found.devices == {"dev-1"}
    assert load_security(None, None, tmp_path).shield is None


def test_dtls_keys_without_the_library_say_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clear error at the start, not a server without security."""
    monkeypatch.setitem(sys.modules, "DTLSSocket", None)
    with pytest.raises(KeysError, match=r"pip install '\.\[dtls\]'"):
        load_security(None, tmp_path / "keys.yaml", tmp_path)


@asynccontextmanager
async def dtls_site(folder: Path) -> AsyncIterator[tuple[Site, str]]:
    """A site that serves coaps for dev-7, with where."""
    path = folder / "dtls.yaml"
    path.write_text("devices: [{device_id: dev-7, identity: sensor-7, key: 73757065722d736563726574}]")
    security = load_security(None, path, folder)
    async with site(secured=security.devices) as here:
        listener = security.listener("127.0.0.1", 0, here.server.received)
        assert listener is not None
        await listener.start()
        try:
            yield here, "coaps://{}:{}".format(*listener.address)
        finally:
            listener.stop()


async def dtls_post(uri: str, path: str, key: bytes = b"super-secret", identity: bytes = b"sensor-7") -> Message:
    """Post over DTLS with aiocoap's client."""
    client = await aiocoap.Context.create_client_context(transports=["tinydtls"])
    client.client_credentials.load_from_dict(
        {f"{uri}/*": {"dtls": {"psk": {"hex": key.hex()}, "client-identity": {"hex": identity.hex()}}}}
    )
    try:
        message = Message(code=codes.POST, uri=f"{uri}/{path}", payload=JSON)
        return await asyncio.wait_for(client.request(message).response, 10)
    finally:
        await client.shutdown()


@with_dtls
async def test_dtls_gets_in_and_names_its_device(tmp_path: Path) -> None:
    """A message over coaps is stored under the key's device; another device's path is refused."""
    async with dtls_site(tmp_path) as (here, uri):
        assert (await dtls_post(uri, "telemetry/dev-7")).code == codes.CHANGED
        assert (await dtls_post(uri, "telemetry/dev-8")).code == codes.FORBIDDEN
        assert [a.device_id for a in here.kafka.records] == ["dev-7"]
        assert here.kafka.records[0].metadata["security"] == "dtls"
        async with raw(here.server.address) as plain:
            plain.send(request("telemetry/dev-7", JSON))
            assert (await plain.next()).code == codes.UNAUTHORIZED
        assert len(here.kafka.records) == 1
        assert (here.counts["another_device"], here.counts["not_secured"]) == (1, 1)


@pytest.mark.parametrize(("key", "identity"), [(b"wrong", b"sensor-7"), (b"super-secret", b"nobody")])
@with_dtls
async def test_a_wrong_dtls_key_gets_nothing_in(key: bytes, identity: bytes, tmp_path: Path) -> None:
    """No handshake, no arrival."""
    async with dtls_site(tmp_path) as (here, uri):
        with pytest.raises((aiocoap.error.Error, TimeoutError)):
            await dtls_post(uri, "telemetry/dev-7", key, identity)
        assert here.kafka.records == []
        assert here.server.exchanges.remembered == 0


@with_dtls
async def test_a_client_program_speaks_dtls(tmp_path: Path) -> None:
    """libcoap with OpenSSL: the same key gets in, another does not."""
    body = tmp_path / "body.json"
    body.write_bytes(JSON)
    async with dtls_site(tmp_path) as (here, uri):
        for key in ("super-secret", "another"):
            await clients.post_secured(f"{uri}/telemetry/dev-7", body, identity="sensor-7", key=key)
        assert len(here.kafka.records) == 1


@with_dtls
async def test_noise_at_the_dtls_port_does_no_harm(tmp_path: Path) -> None:
    """Random datagrams, and pieces of a handshake, leave the server serving."""
    rng = random.Random(3)
    async with dtls_site(tmp_path) as (here, uri):
        host, port = uri.removeprefix("coaps://").split(":")
        async with raw((host, int(port))) as noise:
            for _ in range(300):
                noise.send(bytes((rng.choice((22, 23, 20, 0)),)) + rng.randbytes(rng.randrange(80)))
                noise.send(b"\x16\xfe\xfd\0\0\0\0\0\0\0\0\0\x10\x01" + rng.randbytes(rng.randrange(40)))
            assert (await dtls_post(uri, "telemetry/dev-7")).code == codes.CHANGED
        await until(lambda: len(here.kafka.records) == 1)
