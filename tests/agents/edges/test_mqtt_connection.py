"""The connector and a real mosquitto: versions, rights, TLS, stand-by, shared subscriptions, downlinks."""

import asyncio
import contextlib
import socket
import struct
import subprocess
import sys
from pathlib import Path

import aiomqtt
import pytest
import uvloop

from agents.edges.mqtt_client import MqttSource, SourceEvent, SourceState, TlsFiles
from agents.edges.mqtt_connection import Connection
from agents.edges.mqtt_wire import Arrival, parse_url
from streams.resilience.failures import Rejected, Retryable
from tests.agents.edges.broker import Mosquitto, Passage, Recorder, Rig, free_port, publish, read_packet, until
from tests.agents.edges.certificates import make_certificates

CLIENT = "headrace-mqtt"


@pytest.mark.parametrize(
    "refusal",
    [b"\x20\x02\x00\x01", b"\x20\x03\x00\x84\x00", b""],
    ids=["3.1.1 return code 1", "reason code 0x84", "hangs up"],
)
async def test_a_broker_that_does_not_speak_mqtt_5_is_spoken_to_in_3_1_1(broker: Mosquitto, refusal: bytes) -> None:
    """The session is persistent in 3.1.1, too: what was not acknowledged comes again."""
    async with Recorder(broker.port, refusal=refusal) as recorder, Rig(recorder.url, keep=True) as rig:
        await publish(broker.url, ["1", "2"])
        await until(lambda: rig.payloads == ["1", "2"])
        recorder.cut(CLIENT)
        await until(lambda: rig.payloads == ["1", "2"] * 2)
        assert recorder.of(CLIENT)[-1].version == 4
        assert all(message.dup for batch in rig.batches[-1:] for message in batch.messages)


async def test_amqtt_will_do(tmp_path: Path) -> None:
    """The pure Python broker that stands in for mosquitto leaves a CONNECT of MQTT 5 unanswered; 3.1.1 works."""
    port = free_port()
    (tmp_path / "amqtt.yaml").write_text(
        f"listeners:\n  default:\n    type: tcp\n    bind: 127.0.0.1:{port}\n"
        "plugins:\n  amqtt.plugins.authentication.AnonymousAuthPlugin:\n    allow_anonymous: true\n"
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "amqtt.scripts.broker_script",
        "-c",
        str(tmp_path / "amqtt.yaml"),
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        async with Rig(f"mqtt://127.0.0.1:{port}", timeout_seconds=1.0) as rig:
            assert rig.source.status().protocol == "3.1.1"
            await rig.source.publish("devices/a/telemetry", b"1")
            await until(lambda: rig.payloads == ["1"])
    finally:
        process.kill()
        await process.wait()


async def test_a_second_connector_stands_by(broker: Mosquitto) -> None:
    """It does not connect with the common client id while the first lives, takes over when it ends, and so in turn."""
    async with Recorder(broker.port) as recorder, Rig(recorder.url) as first:
        second = Rig(recorder.url).start()
        await until(lambda: second.state is SourceState.STANDBY)
        assert second.source.healthy()
        await publish(broker.url, ["1"])
        await until(lambda: first.payloads == ["1"])
        assert len(recorder.of(CLIENT)) == 1
        await second.source.publish("devices/a/commands", b"a connector that stands by can still send")

        await first.source.stop()
        await first.task
        await second.active()
        await publish(broker.url, ["2"])
        await until(lambda: second.payloads == ["2"])
        first_again = Rig(recorder.url).start()
        await until(lambda: first_again.state is SourceState.STANDBY)
        assert len(recorder.of(CLIENT)) == 2

        for passage in recorder.passages:  # as if the second one's process were killed
            if passage.client_id.startswith(CLIENT) and second.source.status().holder in passage.client_id:
                recorder.cut(passage.client_id)
        second.task.cancel()
        await first_again.active()
        await publish(broker.url, ["3"])
        await until(lambda: first_again.payloads == ["3"])
        assert SourceEvent.TAKEN_OVER not in first.events | second.events | first_again.events
        await first_again.__aexit__()


async def test_ten_connectors_that_start_together_agree_on_one(broker: Mosquitto) -> None:
    """Exactly one works, nine stand by, and nobody takes over from anybody."""
    rigs = [Rig(broker.url).start() for _ in range(10)]
    await until(lambda: sorted(rig.state.value for rig in rigs) == ["active", *["standby"] * 9])
    await publish(broker.url, ["1"])
    await until(lambda: [text for rig in rigs for text in rig.payloads] == ["1"])
    await asyncio.sleep(0.5)
    assert sum(rig.events.get(SourceEvent.CONNECTED, 0) for rig in rigs) == 1
    for rig in rigs:
        await rig.__aexit__()


async def test_a_restarted_broker_finds_one_of_two_connectors_working(broker: Mosquitto) -> None:
    """Both lose their connections at once; afterwards one works again and one stands by."""
    async with Rig(broker.url) as first:
        second = Rig(broker.url).start()
        await until(lambda: second.state is SourceState.STANDBY)
        broker.end()
        await until(lambda: first.state is not SourceState.ACTIVE)
        await broker.start()
        await until(lambda: {first.state, second.state} == {SourceState.ACTIVE, SourceState.STANDBY})
        await publish(broker.url, ["1"])
        await until(lambda: first.payloads + second.payloads == ["1"])
        await second.__aexit__()


async def test_the_record_of_a_connector_that_is_gone_is_cleared(broker: Mosquitto) -> None:
    """A record that an unclean end of the broker left behind holds nobody up for longer than the time to answer."""
    record = b'{"instance":"ghost","since":1.0,"active":true,"host":"h","pid":1}'
    await publish(broker.url, [record], topic=f"headrace/connectors/{CLIENT}/ghost", retain=True)
    async with Rig(broker.url, answer_seconds=0.3), aiomqtt.Client("127.0.0.1", broker.port) as client:
        await client.subscribe(f"headrace/connectors/{CLIENT}/ghost")
        await client.subscribe(f"headrace/connectors/{CLIENT}/+")
        message = await anext(client.messages)
        assert not message.topic.matches(f"headrace/connectors/{CLIENT}/ghost")


async def test_a_stranger_with_our_client_id_is_not_fought(broker: Mosquitto) -> None:
    """A client that is no connector and insists on our client id gets it: the connector stands by and says so."""

    async def insist() -> None:
        while True:
            with contextlib.suppress(aiomqtt.MqttError):
                async with aiomqtt.Client("127.0.0.1", broker.port, identifier=CLIENT, clean_session=False) as stranger:
                    async for message in stranger.messages:
                        received.append(message.payload)  # noqa: PERF401 -- the loop ends with an exception
            await asyncio.sleep(0.05)

    received: list[object] = []
    async with Rig(broker.url) as rig:
        stranger = asyncio.create_task(insist())
        await until(lambda: rig.events.get(SourceEvent.TAKEN_OVER) == 1)
        assert rig.state is SourceState.STANDBY
        assert "MQTT_CLIENT_ID" in rig.source.status().detail
        await publish(broker.url, ["1"])
        await until(lambda: received)
        assert rig.events[SourceEvent.CONNECTED] == 2
        stranger.cancel()
        await asyncio.gather(stranger, return_exceptions=True)


async def test_a_broker_that_says_taken_over_is_believed() -> None:
    """Reason 0x8E alone makes the connector stand by, without a second try."""
    packets = {1: b"\x20\x03\x00\x00\x00", 8: b"\x90\x04\x00\x01\x00\x01"}

    async def broker(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        passage = Passage()
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while True:
                head, body = await read_packet(reader)
                Recorder.note(passage, head, body, up=True)
                if head >> 4 == 3:
                    writer.write(b"\x40\x02" + passage.packets[-1].mid.to_bytes(2, "big"))
                writer.write(packets.get(head >> 4, b""))
                if head >> 4 == 8 and passage.client_id == CLIENT:
                    writer.write(b"\xe0\x02\x8e\x00")
        writer.close()

    server = await asyncio.start_server(broker, "127.0.0.1", 0)
    rig = Rig(f"mqtt://127.0.0.1:{server.sockets[0].getsockname()[1]}", answer_seconds=0.2).start()
    await until(lambda: rig.events.get(SourceEvent.TAKEN_OVER) == 1)
    assert rig.events[SourceEvent.CONNECTED] == 1
    assert rig.state is SourceState.STANDBY
    await rig.__aexit__()
    server.close()


async def test_a_broker_without_rights_for_the_records_means_no_stand_by(tmp_path: Path) -> None:
    """The connector works as if alone, and downlinks go out all the same."""
    (tmp_path / "acl").write_text("topic readwrite devices/#\n")
    broker = Mosquitto(tmp_path, extra=f"acl_file {tmp_path}/acl")
    await broker.start()
    async with Rig(broker.url, answer_seconds=0.3) as rig:
        await publish(broker.url, ["1"])
        await until(lambda: rig.payloads == ["1"])
        await rig.source.publish("devices/a/commands", b"on")
        with pytest.raises(Rejected, match="0x87"):
            await rig.source.publish("elsewhere", b"on")
    broker.end()


async def test_connectors_of_a_shared_group_share_the_messages(broker: Mosquitto) -> None:
    """With MQTT_SHARE and a client id each, both work, and every message reaches one of them."""
    async with Rig(broker.url, share="g", client_id="a") as one, Rig(broker.url, share="g", client_id="b") as two:
        await publish(broker.url, [str(number) for number in range(200)])
        await until(lambda: len(one.payloads) + len(two.payloads) == 200)
        assert sorted(map(int, one.payloads + two.payloads)) == list(range(200))
        assert one.payloads
        assert two.payloads


async def test_tls_with_a_client_certificate_and_a_password(tmp_path: Path) -> None:
    """mqtts:// with an authority of one's own, a client certificate, user and password (percent-encoded); none gets in
    without the certificate."""
    files = make_certificates(tmp_path)
    subprocess.run(["mosquitto_passwd", "-c", "-b", str(tmp_path / "passwords"), "us er", "p@ss:/1"], check=True)
    (tmp_path / "passwords").chmod(0o644)
    broker = Mosquitto(
        tmp_path,
        extra=f"cafile {files.ca}\ncertfile {files.server_cert}\nkeyfile {files.server_key}\nrequire_certificate true\n"
        f"allow_anonymous false\npassword_file {tmp_path}/passwords",
    )
    await broker.start()
    tls = TlsFiles(str(files.ca), str(files.client_cert), str(files.client_key))
    url = f"mqtts://us%20er:p%40ss%3A%2F1@localhost:{broker.port}"
    async with Rig(url, tls=tls, max_message_bytes=1000) as rig:
        for payload in (b"x" * 500_000, b"short"):
            await rig.source.publish("devices/a/telemetry", payload)
        await until(lambda: rig.events.get(SourceEvent.ACKNOWLEDGED) == 2)
        assert [m.size_bytes for batch in rig.batches for m in batch.messages] == [500_000, 5]
    async with asyncio.timeout(30):
        wrong = Rig(url.replace("p%40ss", "no"), tls=tls).start()
        await until(lambda: wrong.events.get(SourceEvent.CONNECT_FAILED, 0) > 1)
        assert "refused" in wrong.source.status().detail
        assert "no%3A" not in wrong.source.status().detail
        await wrong.__aexit__()
    async with asyncio.timeout(30):
        nobody = Rig(url, tls=TlsFiles(str(files.ca))).start()
        await until(lambda: nobody.events.get(SourceEvent.CONNECT_FAILED, 0) > 1)
        assert not nobody.source.healthy()
        await nobody.__aexit__()
    broker.end()


async def test_a_broker_that_is_not_there_yet_is_waited_for(broker: Mosquitto) -> None:
    """Nothing is given up while the broker is away, and readiness says why."""
    broker.end()
    rig = Rig(broker.url).start()
    await until(lambda: "cannot be reached" in rig.source.status().detail)
    assert not rig.source.healthy()
    with pytest.raises(Retryable, match="not connected"):
        await rig.source.publish("devices/a/commands", b"on")
    await broker.start()
    await rig.active()
    assert rig.source.healthy()
    await rig.__aexit__()


async def test_a_broker_that_never_answers_is_left() -> None:
    """A port that accepts and says nothing does not hold the connector for ever, and no socket is left behind."""
    silent = await asyncio.start_server(lambda _reader, _writer: asyncio.sleep(60), "127.0.0.1", 0)
    rig = Rig(f"mqtt://127.0.0.1:{silent.sockets[0].getsockname()[1]}", timeout_seconds=0.2).start()
    await until(lambda: "did not answer within" in rig.source.status().detail)
    await rig.__aexit__()
    silent.close()


async def test_a_silent_network_is_noticed_by_the_keep_alive(broker: Mosquitto) -> None:
    """When nothing comes back any more the connection is given up and made anew."""
    async with Recorder(broker.port) as recorder, Rig(recorder.url, keepalive_seconds=1) as rig:
        recorder.mute()
        await until(lambda: rig.events.get(SourceEvent.DISCONNECTED, 0) >= 1)
        recorder.unmute()
        await until(lambda: rig.events[SourceEvent.CONNECTED] >= 2)
        await rig.active()
        await publish(broker.url, ["1"])
        await until(lambda: rig.payloads == ["1"])


@pytest.mark.parametrize("acknowledging", [False, True])
def test_a_reset_behind_a_message_is_noticed_at_once(acknowledging: bool) -> None:
    """uvloop, the worker's loop, calls the reader once for a socket with an error; that read ends at the message."""

    async def play() -> None:
        arrived: list[Arrival] = []
        with socket.create_server(("127.0.0.1", 0)) as server:
            connection = Connection(
                parse_url(f"mqtt://127.0.0.1:{server.getsockname()[1]}"),
                client_id=CLIENT,
                mqtt5=False,
                on_arrivals=arrived.extend,
                max_message_bytes=1000,
                persistent=False,
                keepalive_seconds=3600,
            )
            opening = asyncio.ensure_future(connection.open())
            ours, _ = await asyncio.to_thread(server.accept)
            assert (await asyncio.to_thread(ours.recv, 1000))[:1] == b"\x10"  # CONNECT
            ours.send(b"\x20\x02\x00\x00")  # CONNACK
            await opening
            ours.send(b"\x32\x06\x00\x01a\x00\x07!")  # PUBLISH, QoS 1
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            ours.close()  # a reset
        if acknowledging:
            await until(lambda: arrived)
            connection.acknowledge([(7, 1)])
        assert await asyncio.wait_for(connection.wait_lost(), 60)
        assert [(arrival.mid, arrival.payload) for arrival in arrived] == [(7, b"!")]

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(play())


async def test_downlinks_return_when_the_broker_has_them(broker: Mosquitto) -> None:
    """publish() tells whether somebody listens (MQTT 5), and refuses what no broker takes."""
    async with Rig(broker.url) as rig, aiomqtt.Client("127.0.0.1", broker.port) as device:
        assert await rig.source.publish("devices/a/commands", b"on") == 0x10
        await device.subscribe("devices/a/commands", qos=1)
        assert await rig.source.publish("devices/a/commands", b"on") == 0
        assert (await anext(device.messages)).payload == b"on"
        assert await rig.source.publish("devices/a/commands", b"off", qos=0) == 0
        codes = await asyncio.gather(*(rig.source.publish("devices/a/commands", b"%d" % n, qos=2) for n in range(100)))
        assert set(codes) == {0}
        with pytest.raises(Rejected, match="cannot publish"):
            await rig.source.publish("devices/+/commands", b"on")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"url": "http://localhost"}, "MQTT_URL: scheme 'http'"),
        ({"url": "mqtt://u:secret@"}, "MQTT_URL: no host"),
        ({"topics": []}, "MQTT_TOPICS: no topic filter"),
        ({"topics": ["a/#/b"]}, "'#' must be the last level"),
        ({"topics": ["a/b+"]}, "must stand alone"),
        ({"client_id": ""}, "MQTT_CLIENT_ID is empty"),
        ({"share": "a/b"}, "MQTT_SHARE"),
        ({"inflight": 0}, "inflight=0"),
        ({"url": "mqtts://localhost", "tls": TlsFiles(cafile="/nowhere.pem")}, "CA file '/nowhere.pem'"),
    ],
)
def test_what_cannot_be_right_is_refused_before_connecting(arguments: dict[str, object], message: str) -> None:
    """The error names the setting and what is wrong with it, never a password."""
    given = {"url": f"mqtt://localhost:{free_port()}", "topics": ["a"], "client_id": "c"} | arguments
    with pytest.raises(ValueError, match=r"^(?!.*secret)") as caught:
        MqttSource(given.pop("url"), given.pop("topics"), **given)
    assert message in str(caught.value)
