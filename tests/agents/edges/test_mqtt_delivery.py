"""The connector against a real mosquitto: what is acknowledged when, and what comes again."""

import asyncio
import random
import signal
import sys
from pathlib import Path

import pytest

from agents.edges.mqtt_client import SourceEvent, SourceState
from tests.agents.edges.broker import Mosquitto, Recorder, Rig, make_session, publish, until

CLIENT = "headrace-mqtt"


def numbers(count: int) -> list[str]:
    return [str(number) for number in range(count)]


async def test_pubacks_go_out_in_order_of_arrival(broker: Mosquitto) -> None:
    """However the batches are completed, every PUBACK follows those of what arrived before."""
    rng = random.Random(5)
    async with Recorder(broker.port) as recorder, Rig(recorder.url, keep=True, batch_messages=7, inflight=200) as rig:
        publishing = asyncio.create_task(publish(broker.url, numbers(1000)))
        pending = 0
        while len(rig.payloads) < 1000 or pending < len(rig.batches):
            open_batches = rig.batches[pending:]
            rng.shuffle(open_batches)
            for batch in open_batches:
                batch.acknowledge()
            pending += len(open_batches)
            await asyncio.sleep(0.001)
        await publishing
        (passage,) = recorder.of(CLIENT)
        await until(lambda: len(passage.mids("PUBACK", up=True)) == 1000)
        assert rig.payloads == numbers(1000)
        assert passage.mids("PUBACK", up=True) == passage.mids("PUBLISH", up=False)
        assert rig.events[SourceEvent.ACKNOWLEDGED] == 1000


async def test_one_open_batch_holds_back_all_acknowledgements_after_it(broker: Mosquitto) -> None:
    """While the first batch is open no PUBACK leaves, though every other batch is complete."""
    async with Recorder(broker.port) as recorder, Rig(recorder.url, keep=True, batch_messages=10) as rig:
        await publish(broker.url, numbers(100))
        await until(lambda: len(rig.payloads) == 100)
        for batch in rig.batches[1:]:
            batch.acknowledge()
        await rig.source.publish("devices/a/commands", b"now")  # a round trip to the broker
        (passage,) = recorder.of(CLIENT)
        assert passage.mids("PUBACK", up=True) == []
        rig.batches[0].acknowledge()
        await until(lambda: len(passage.mids("PUBACK", up=True)) == 100)


async def test_while_kafka_is_away_the_window_fills_and_nothing_is_acknowledged(broker: Mosquitto) -> None:
    """Unacknowledged messages stop at the receive maximum, come again (DUP) after a reconnect, and all arrive."""
    async with Recorder(broker.port) as recorder, Rig(recorder.url, keep=True, inflight=50) as rig:
        await publish(broker.url, numbers(2000))
        await until(lambda: len(rig.payloads) == 50)
        assert rig.source.status().unacknowledged == 50
        (first,) = recorder.of(CLIENT)
        assert first.mids("PUBACK", up=True) == []
        assert len(first.mids("PUBLISH", up=False)) == 50

        before, rig.batches = rig.batches, []
        recorder.cut(CLIENT)
        await until(lambda: len(rig.payloads) == 50)
        assert rig.payloads == numbers(50)
        assert all(message.dup for batch in rig.batches for message in batch.messages)
        assert all(batch.stale for batch in before)

        for batch in before:  # late: on a connection that is gone
            batch.acknowledge()
        await rig.source.publish("devices/a/commands", b"now")
        assert recorder.of(CLIENT)[-1].mids("PUBACK", up=True) == []
        assert rig.events[SourceEvent.STALE] == 50

        rig.keep = False
        for batch in rig.batches:
            batch.acknowledge()
        await until(lambda: rig.events.get(SourceEvent.ACKNOWLEDGED) == 2000)
        assert rig.payloads == numbers(2000)


async def test_without_a_receive_maximum_reading_stops(broker: Mosquitto) -> None:
    """Over MQTT 3.1.1 a broker without a window of its own cannot fill the memory: what is in hand stays bounded."""
    text = "x" * 2000
    async with (
        Recorder(broker.port, refusal=b"\x20\x02\x00\x01") as recorder,
        Rig(recorder.url, keep=True, inflight=100, keepalive_seconds=3) as rig,
    ):
        await publish(broker.url, [f"{number} {text}" for number in range(20_000)])
        await until(lambda: rig.source.status().paused)
        held = len(rig.payloads)
        assert held < 1000
        passage = recorder.of(CLIENT)[-1]
        await until(lambda: len([p for p in passage.packets if p.kind == "12" and p.up]) >= 3)  # PINGREQ goes on
        assert len(rig.payloads) == held
        rig.keep = False
        for batch in rig.batches:
            batch.acknowledge()
        await until(lambda: rig.events.get(SourceEvent.ACKNOWLEDGED) == 20_000, 60)
        assert [int(payload.split()[0]) for payload in rig.payloads] == list(range(20_000))
        assert rig.events[SourceEvent.CONNECTED] == 1


async def test_payload_bytes_in_hand_are_bounded(broker: Mosquitto) -> None:
    """Large payloads stop reading long before the message window is full."""
    async with Rig(broker.url, keep=True, buffer_bytes=1_000_000) as rig:
        await publish(broker.url, [b"y" * 100_000 for _ in range(100)])
        await until(lambda: rig.source.status().paused)
        assert rig.source.status().in_hand_bytes < 1_500_000
        rig.keep = False
        for batch in rig.batches:
            batch.acknowledge()
        await until(lambda: rig.events.get(SourceEvent.ACKNOWLEDGED) == 100)
        assert rig.source.status().in_hand_bytes == 0


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
async def test_a_broker_that_restarts_delivers_its_backlog(broker: Mosquitto, how: signal.Signals) -> None:
    """With persistence, what was unacknowledged and what came for an absent connector arrives after the restart."""
    async with Rig(broker.url, keep=True, inflight=10) as rig:
        await publish(broker.url, numbers(100))
        await until(lambda: len(rig.payloads) == 10)
        if how is signal.SIGKILL:
            await broker.saved()
        broker.end(how)
        await until(lambda: rig.state is not SourceState.ACTIVE)
        rig.batches.clear()
        rig.keep = False
        await broker.start()
        await until(lambda: len(rig.payloads) == 100)
        assert rig.payloads == numbers(100)
        assert SourceEvent.SESSION_LOST not in rig.events


async def test_a_broker_without_persistence_is_subscribed_to_anew(tmp_path: Path) -> None:
    """A broker that forgot the session is told the subscriptions again, and the loss is counted."""
    broker = Mosquitto(tmp_path, persistence=False)
    await broker.start()
    async with Rig(broker.url) as rig:
        broker.end()
        await until(lambda: rig.state is not SourceState.ACTIVE)
        await broker.start()
        await rig.active()
        await publish(broker.url, numbers(10))
        await until(lambda: rig.payloads == numbers(10))
        assert rig.events[SourceEvent.SESSION_LOST] == 1
    broker.end()


async def test_a_backlog_is_delivered_before_the_subscription_is_confirmed(broker: Mosquitto) -> None:
    """What the broker sends between CONNACK and SUBACK is delivered and acknowledged like all else."""
    async with Rig(broker.url):
        pass
    await publish(broker.url, numbers(300))
    async with Recorder(broker.port) as recorder, Rig(recorder.url) as rig:
        await until(lambda: rig.events.get(SourceEvent.ACKNOWLEDGED) == 300)
        assert rig.payloads == numbers(300)
        kinds = [packet.kind for packet in recorder.of(CLIENT)[0].packets if not packet.up]
        assert kinds.index("PUBLISH") < kinds.index("SUBACK")


async def test_a_backlog_that_fills_the_window_before_the_subscription_is_confirmed(broker: Mosquitto) -> None:
    """Over MQTT 3.1.1 SUBACK stands behind a backlog that is not read while Kafka is away: the connection holds on."""
    refusal = b"\x20\x02\x00\x01"
    async with Recorder(broker.port, refusal) as recorder, Rig(recorder.url):
        pass
    await publish(broker.url, [f"{number} {'x' * 2000}" for number in range(5000)])
    async with Recorder(broker.port, refusal) as recorder:
        rig = Rig(recorder.url, keep=True, inflight=100, keepalive_seconds=2, timeout_seconds=1.0).start()
        await until(lambda: rig.source.status().paused)
        await until(lambda: len([p for p in recorder.of(CLIENT)[-1].packets if p.kind == "12" and p.up]) >= 3)
        assert rig.state is SourceState.CONNECTING
        rig.keep = False
        for batch in rig.batches:
            batch.acknowledge()
        await until(lambda: rig.events.get(SourceEvent.ACKNOWLEDGED) == 5000)
        await rig.active()
        assert [int(payload.split()[0]) for payload in rig.payloads] == list(range(5000))
        assert rig.events[SourceEvent.CONNECTED] == 1
        await rig.__aexit__()


async def test_a_killed_process_loses_nothing(broker: Mosquitto, tmp_path: Path) -> None:
    """What a connector had received when it was killed with SIGKILL is delivered to the next one, marked DUP."""
    got = tmp_path / "got"
    script = (
        "import asyncio, sys\n"
        "from agents.edges.mqtt_client import MqttSource\n"
        "async def deliver(batch):\n"
        "    with open(sys.argv[2], 'a') as file:\n"
        "        file.write(''.join(m.payload.decode() + '\\n' for m in batch.messages))\n"
        "asyncio.run(MqttSource(sys.argv[1], ['devices/+/telemetry'], client_id='headrace-mqtt').run(deliver))\n"
    )
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", script, broker.url, str(got))
    try:
        async with Rig(
            broker.url, client_id="watch"
        ) as watch:  # the connector is there once it gets what this one gets
            sent = 0
            while not got.exists():
                await publish(broker.url, [str(sent)])
                sent += 1
            await publish(broker.url, [str(number) for number in range(sent, sent + 200)])
            await until(lambda: len(watch.payloads) == sent + 200)
        await until(lambda: f"{sent + 199}\n" in got.read_text())
    finally:
        process.kill()
        await process.wait()
    received = got.read_text().split()
    async with Rig(broker.url) as rig:
        await until(lambda: len(rig.payloads) == len(received))
        assert rig.payloads == received
        assert rig.events[SourceEvent.REDELIVERED] == len(received)


async def test_qos_2_is_delivered_at_qos_1_and_acknowledged_after_kafka(broker: Mosquitto) -> None:
    """A device may publish at QoS 2; the connector's leg is QoS 1 with the same promise."""
    async with Recorder(broker.port) as recorder, Rig(recorder.url, keep=True) as rig:
        await publish(broker.url, numbers(20), qos=2)
        await until(lambda: len(rig.payloads) == 20)
        assert {message.qos for batch in rig.batches for message in batch.messages} == {1}
        (passage,) = recorder.of(CLIENT)
        assert passage.mids("PUBACK", up=True) == []
        for batch in rig.batches:
            batch.acknowledge()
        await until(lambda: len(passage.mids("PUBACK", up=True)) == 20)


async def test_what_comes_at_qos_2_is_received_only_after_kafka_has_it(broker: Mosquitto) -> None:
    """A session that still holds QoS 2 messages gets PUBREC at the acknowledgement, not before, and none is lost."""
    await make_session(broker.url, CLIENT, qos=2)
    await publish(broker.url, numbers(20), qos=2)
    async with Recorder(broker.port) as recorder, Rig(recorder.url, keep=True, standby_seconds=0.0) as rig:
        await until(lambda: len(rig.payloads) == 20)
        assert {message.qos for batch in rig.batches for message in batch.messages} == {2}
        passage = recorder.of(CLIENT)[0]
        assert passage.mids("PUBREC", up=True) == []
        recorder.cut(CLIENT)
        await until(lambda: len(rig.payloads) == 40)
        assert rig.payloads[20:] == numbers(20)
        for batch in rig.batches:
            batch.acknowledge()
        passage = recorder.of(CLIENT)[-1]
        await until(lambda: len(passage.mids("PUBCOMP", up=True)) == 20)
        assert passage.mids("PUBREC", up=True) == passage.mids("PUBLISH", up=False)
        recorder.cut(CLIENT)
        await until(lambda: rig.events[SourceEvent.CONNECTED] == 3)
        await rig.active()
        await publish(broker.url, ["last"])
        await until(lambda: len(rig.payloads) > 40)
        assert rig.payloads[40:] == ["last"]


async def test_a_released_batch_comes_again(broker: Mosquitto) -> None:
    """A batch that is given back, and all after it, is delivered anew."""
    async with Rig(broker.url, keep=True, batch_messages=5) as rig:
        await publish(broker.url, numbers(20))
        await until(lambda: len(rig.payloads) == 20)
        first, second, *_ = rig.batches
        first.acknowledge()
        second.release()
        second.acknowledge()  # too late, does nothing
        count = len(first.messages)
        await until(lambda: len(rig.payloads) >= 40 - count)
        assert rig.payloads[20:] in (numbers(20)[count:], numbers(20))


async def test_what_the_receiver_raises_ends_the_source_and_loses_nothing(broker: Mosquitto) -> None:
    """An error of the caller is the caller's: run() ends with it, and the broker keeps the messages."""

    async def deliver(_: object) -> None:
        raise LookupError("no channel")

    rig = Rig(broker.url)
    running = asyncio.create_task(rig.source.run(deliver))
    await rig.active()
    await publish(broker.url, numbers(3))
    with pytest.raises(LookupError, match="no channel"):
        await running
    async with Rig(broker.url) as again:
        await until(lambda: again.payloads == numbers(3))


async def test_stop_waits_for_what_is_handed_over(broker: Mosquitto) -> None:
    """An orderly stop lets open batches be acknowledged first, so that they do not come again."""
    async with Rig(broker.url, keep=True) as rig:
        await publish(broker.url, numbers(50))
        await until(lambda: len(rig.payloads) == 50)
        stopping = asyncio.create_task(rig.source.stop(drain_seconds=30))
        await asyncio.sleep(0.05)
        for batch in rig.batches:
            batch.acknowledge()
        await stopping
        await rig.task
        assert rig.state is SourceState.STOPPED
    async with Rig(broker.url) as again:
        await publish(broker.url, ["new"])
        await until(lambda: again.payloads == ["new"])


async def test_oversize_messages_are_marked_and_their_neighbours_pass(broker: Mosquitto) -> None:
    """Above the limit only size, hash and first KiB are handed over; the messages around it are whole."""
    async with Rig(broker.url, max_message_bytes=1000) as rig:
        await publish(broker.url, ["before", b"z" * 3_000_000, b"w" * 1000, b"v" * 1001, "after"])
        await until(lambda: rig.events.get(SourceEvent.ACKNOWLEDGED) == 5)
        messages = [message for batch in rig.batches for message in batch.messages]
        assert [message.size_bytes for message in messages] == [6, 3_000_000, 1000, 1001, 5]
        assert [message.oversize for message in messages] == [False, True, False, True, False]
        assert messages[1].payload == b"z" * 1024
        assert rig.events[SourceEvent.OVERSIZE] == 2


async def test_retained_messages_are_marked_and_come_once(broker: Mosquitto) -> None:
    """What was retained before the subscription is marked so, and does not come again with every reconnect."""
    await publish(broker.url, ["old"], retain=True)
    async with Recorder(broker.port) as recorder, Rig(recorder.url) as rig:
        await publish(broker.url, ["new"], retain=True)
        await until(lambda: rig.payloads == ["old", "new"])
        assert [message.retain for batch in rig.batches for message in batch.messages] == [True, False]
        recorder.cut(CLIENT)
        await until(lambda: rig.events.get(SourceEvent.CONNECTED) == 2)
        await rig.active()
        await publish(broker.url, ["newer"])
        await until(lambda: rig.payloads[-1:] == ["newer"])
        # the cut may have swallowed the PUBACK of what came last before it, which then comes again
        messages = [message for batch in rig.batches for message in batch.messages]
        assert [message.payload for message in messages if not message.dup] == [b"old", b"new", b"newer"]


async def test_qos_0_is_delivered_and_counted(broker: Mosquitto) -> None:
    """What carries no promise is handed over all the same; the broker hears nothing of it."""
    async with Recorder(broker.port) as recorder, Rig(recorder.url) as rig:
        for number in range(10):
            await rig.source.publish("devices/a/telemetry", b"%d" % number, qos=number % 2)
        await until(lambda: sorted(rig.payloads) == numbers(10))
        assert rig.events[SourceEvent.DONE_QOS0] == 5
        assert rig.events[SourceEvent.ACKNOWLEDGED] == 5
        (passage,) = recorder.of(CLIENT)
        await until(lambda: len(passage.mids("PUBACK", up=True)) == 5)


async def test_records_of_connectors_are_no_device_messages(broker: Mosquitto) -> None:
    """A filter wide enough to bring them delivers none, and leaves none unacknowledged."""
    async with Rig(broker.url, topics=("+/+/+", "+/+/+/+"), keep=True) as rig:
        await publish(broker.url, ["record"], topic="headrace/connectors/other/x")
        await publish(broker.url, ["1"])
        await until(lambda: rig.payloads == ["1"])
        rig.batches[-1].acknowledge()
        assert rig.source.status().unacknowledged == 0


async def test_twenty_thousand_messages_arrive_once_and_in_order(broker: Mosquitto) -> None:
    """A burst far above the window passes whole."""
    async with Rig(broker.url) as rig:
        publishing = asyncio.create_task(publish(broker.url, numbers(20_000)))
        await until(lambda: rig.events.get(SourceEvent.ACKNOWLEDGED) == 20_000, 120)
        await publishing
        assert rig.payloads == numbers(20_000)
