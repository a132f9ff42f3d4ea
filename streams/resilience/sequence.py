"""aiokafka's producer, whose sequence numbers survive a batch that the broker has refused.

Guarantee: a batch that the broker refuses (too large for its topic, not allowed, not valid) costs that batch alone.
aiokafka 0.14 counts its sequence numbers as used: the broker then takes every later batch of the partition for one out
of order, and nothing can be written to it until the producer is made anew. Whatever else puts the numbers out of step
is noted in :attr:`SequencedProducer.out_of_sequence`, and that producer is of no more use.
"""

from __future__ import annotations

from typing import Any

from aiokafka import AIOKafkaProducer, errors
from aiokafka.producer.sender import Sender, SendProduceReqHandler

#: What a broker answers without having written anything.
REFUSED = (
    errors.MessageSizeTooLargeError,
    errors.RecordListTooLargeError,
    errors.InvalidTopicError,
    errors.TopicAuthorizationFailedError,
    errors.CorruptRecordException,
    errors.PolicyViolationError,
    errors.UnsupportedForMessageFormatError,
    errors.InvalidTimestampError,
)
_SEQUENCES = 2**31


class _Sender(Sender):
    """aiokafka's sender, which takes back the numbers of what was refused before it sends on."""

    out_of_sequence: BaseException | None = None

    async def _send_produce_req(self, node_id: Any, batches: Any) -> None:
        await SendProduceReqHandler(self, batches).do(node_id)
        # In the same step in which the partitions are let go: no other batch has a number yet.
        for partition, batch in batches.items():
            self._repair(partition, batch)
        self._in_flight.remove(node_id)
        for partition in batches:
            self._muted_partitions.remove(partition)

    def _repair(self, partition: Any, batch: Any) -> None:
        if self._txn_manager is None or not batch.future.done() or batch.future.cancelled():
            return
        failure = batch.future.exception()
        if failure is None:
            return
        if isinstance(failure, REFUSED):
            numbers = self._txn_manager._sequence_numbers
            numbers[partition] = (numbers[partition] - batch.record_count) % _SEQUENCES
        else:
            self.out_of_sequence = failure


class SequencedProducer(AIOKafkaProducer):
    """An idempotent producer that lives on after a refusal."""

    _sender: Any

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        made = self._sender
        self._sender = _Sender(
            made.client,
            acks=made._acks,
            txn_manager=made._txn_manager,
            retry_backoff_ms=made._retry_backoff * 1000,
            message_accumulator=made._message_accumulator,
            request_timeout_ms=made._request_timeout_ms,
        )

    @property
    def out_of_sequence(self) -> BaseException | None:
        """What has put the sequence numbers out of step with the broker's, or None."""
        failure: BaseException | None = self._sender.out_of_sequence
        return failure
