"""How values become JSON on Kafka's topics, here and in :mod:`streams.messages`."""

from __future__ import annotations

import msgspec

encode = msgspec.json.Encoder(decimal_format="number").encode
