"""The table of metrics in streams/metrics.py is what `GET /metrics` shows."""

from __future__ import annotations

import re
from typing import Any

from streams import metrics


def test_the_table_names_every_metric() -> None:
    """Each metric that can be collected stands in the table with its type, and no other does."""

    def name_of(metric: Any) -> str:
        return metric.name + ("_total" if metric.type == "counter" else "")

    collected = [*metrics.REGISTRY.collect(), *metrics.StageCollector(list).collect()]
    exported = {name_of(metric): metric.type for metric in collected}
    table = dict(re.findall(r"^(headrace_\w+) +(counter|gauge|histogram)", metrics.__doc__ or "", re.MULTILINE))
    assert table == exported
