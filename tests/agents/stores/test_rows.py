"""From readings to rows."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agents.stores.base import open_store
from agents.stores.postgresql import ReadingStore
from agents.stores.rows import rows_of
from devices.model import Reading
from streams.resilience.failures import Rejected

NOON = datetime(2024, 5, 1, 12, tzinfo=UTC)


def make(values: list[Any], labels: list[str] | None = None, **metadata: Any) -> Reading:
    """Return a reading of device ``d``, index ``1``, with labels ``a``, ``b``, … unless given."""
    names = [chr(ord("a") + n) for n in range(len(values))] if labels is None else labels
    return Reading(
        request_id="r",
        timestamp=NOON,
        device_id="d",
        index="1",
        values=values,
        labels=names,
        display_names=names,
        metadata=metadata,
    )


def test_numbers_and_booleans_are_values_and_all_else_is_text() -> None:
    """Each value is one row; true and false are 1 and 0."""
    assert rows_of(make([1.5, 7, True, False, "open", [1, 2]])) == [
        ("d", "1", "a", NOON, 1.5, None, None, "r"),
        ("d", "1", "b", NOON, 7.0, None, None, "r"),
        ("d", "1", "c", NOON, 1.0, None, None, "r"),
        ("d", "1", "d", NOON, 0.0, None, None, "r"),
        ("d", "1", "e", NOON, None, "open", None, "r"),
        ("d", "1", "f", NOON, None, "[1,2]", None, "r"),
    ]


def test_none_is_no_row() -> None:
    """A value that the device did not give leaves no trace."""
    assert [row[2] for row in rows_of(make([None, 1, None]))] == ["b"]


def test_only_false_in_persist_keeps_a_value_out() -> None:
    """A list that is missing, shorter, or says null keeps the value."""
    assert [row[2] for row in rows_of(make([1, 2, 3], persist=[False, True, None]))] == ["b", "c"]
    assert [row[2] for row in rows_of(make([1, 2, 3], persist=[False]))] == ["b", "c"]
    assert [row[2] for row in rows_of(make([1, 2, 3], persist=None))] == ["a", "b", "c"]


def test_units_go_with_their_values() -> None:
    """A unit is text or nothing, whatever a profile wrote; a shorter list leaves the rest without."""
    assert [row[6] for row in rows_of(make([1, 2, 3, 4], units=["V", None, 1]))] == ["V", None, "1", None]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 10**400, -(10**400)])
def test_what_is_no_finite_double_is_refused(value: Any) -> None:
    """The value is named to the caller and its neighbours go on; where nobody listens, the reading is rejected."""
    refused: list[tuple[str, Any, str]] = []
    rows = rows_of(make([1, value, 3]), lambda *what: refused.append(what))
    assert [row[2] for row in rows] == ["a", "c"]
    assert [(label, reason) for label, _, reason in refused] == [("b", "is not a finite double")]
    with pytest.raises(Rejected, match=r"'d'.*'1'.*'b'"):
        rows_of(make([1, value, 3]))


def test_a_value_that_is_not_kept_is_not_refused_either() -> None:
    """What persist keeps out may be anything."""
    assert rows_of(make([math.nan], persist=[False])) == []


def test_values_without_labels_are_a_drivers_mistake() -> None:
    """Lists of different length are rejected, with both lengths."""
    with pytest.raises(Rejected, match="2 values and 1 labels"):
        rows_of(make([1, 2], labels=["a"]))


@given(st.lists(st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text()), max_size=20))
def test_every_row_is_storable(values: list[Any]) -> None:
    """Whatever values a reading has, each row has exactly one of a finite value and a text."""
    for row in rows_of(make(values, labels=[str(n) for n in range(len(values))]), lambda *_: None):
        assert (row[4] is None) != (row[5] is None)
        assert row[4] is None or (type(row[4]) is float and math.isfinite(row[4]))


def test_the_scheme_of_the_url_chooses_the_store() -> None:
    """PostgreSQL has two schemes; an unknown one is an error that lists what there is."""
    assert isinstance(open_store("postgresql://localhost/x", pool_size=3), ReadingStore)
    assert isinstance(open_store("postgres://localhost/x"), ReadingStore)
    with pytest.raises(ValueError, match=r"DATABASE_URL has the scheme 'mysql'.*postgresql://"):
        open_store("mysql://localhost/x")
