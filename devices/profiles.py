"""Profiles: which messages are a family's, which driver reads them, and what each value is allowed to be.

A profile is one YAML file in ``config/profiles``. It is compiled once; per message a driver asks it for a
:class:`Shape`, the constant part of a reading (labels, display names, units, persist flags, checks), which is built
once for each set of labels and shared by all readings that have it. **Nobody may change the lists and dicts of a
shape.** The caches are bounded: a device that sends ever new labels costs time, not memory.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Literal, TypeVar

import msgspec

ValueType = Literal["number", "integer", "boolean", "string"]
Kind = Literal["data", "feedback", "request"]

# A fleet has some hundred shapes; the rest is for devices that make up field names as they go.
MAX_CACHED: Final = 8_192
MAX_CACHED_CHARS: Final = 4_096
# PostgreSQL's index row of a reading holds device id, index and label in at most 2704 bytes, of up to 4 a character.
MAX_NAME_CHARS: Final = 200
MAX_DEVICE_ID_CHARS: Final = 255

T = TypeVar("T")


def usable_device_id(text: str) -> bool:
    """Tell whether ``text`` can be a device's id: 1 to 255 printable characters (PostgreSQL takes no NUL, Redis keys
    no newline)."""
    return 0 < len(text) <= MAX_DEVICE_ID_CHARS and text.isprintable()


class ValueRule(msgspec.Struct, frozen=True, kw_only=True):
    """What a profile says of a value; None: nothing. ``max_age_seconds``: an older sample is refused on arrival."""

    name: str | None = None
    unit: str | None = None
    type: ValueType | None = None
    min: float | None = None
    max: float | None = None
    whitelist: tuple[Any, ...] | None = None
    persist: bool | None = None
    max_age_seconds: float | None = None
    category: str | None = None

    def over(self, other: ValueRule) -> ValueRule:
        """Return this rule where it says something, ``other`` elsewhere."""
        mine = {name: value for name in RULE_FIELDS if (value := getattr(self, name)) is not None}
        return msgspec.structs.replace(other, **mine)

    @property
    def restricts(self) -> bool:
        return any(v is not None for v in (self.type, self.min, self.max, self.whitelist, self.max_age_seconds))


RULE_FIELDS: Final = ValueRule.__struct_fields__
NO_RULE: Final = ValueRule()


class PayloadTest(msgspec.Struct, frozen=True, kw_only=True):
    """A cheap test of the payload beside the route: lengths in bytes, hexadecimal text, first bytes, fields of a JSON
    object."""

    lengths: tuple[int, ...] | None = None
    hex: bool | None = None
    starts_with: bytes | None = None
    json_fields: tuple[str, ...] = ()

    def accepts(self, data: bytes) -> bool:
        if self.lengths is not None and len(data) not in self.lengths:
            return False
        if self.starts_with is not None and not data.startswith(self.starts_with):
            return False
        if self.hex is not None and self.hex is not _is_hex(data):
            return False
        if self.json_fields:
            try:
                found = msgspec.json.decode(data)
            except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
                return False
            return isinstance(found, dict) and all(field in found for field in self.json_fields)
        return True


_HEX_DIGITS: Final = b"0123456789abcdefABCDEF"


def _is_hex(data: bytes) -> bool:
    return bool(data) and len(data) % 2 == 0 and not data.strip(_HEX_DIGITS)


class Match(msgspec.Struct, frozen=True, kw_only=True):
    """One way in: an MQTT topic or a CoAP path with ``+``, ``#`` and ``{name}`` for whole segments.

    ``device_id`` is the template that names the device (the key on Kafka): ``{device_id}`` unless said otherwise.
    ``kind``: ``data`` is decoded, ``feedback`` answers a command, ``request`` is only answered (a device that asks
    for the time).
    """

    protocol: Literal["mqtt", "coap"]
    route: str
    kind: Kind = "data"
    device_id: str = "{device_id}"
    devices: tuple[str, ...] = ()
    methods: tuple[str, ...] = ("POST",)
    payload: PayloadTest | None = None

    @property
    def segments(self) -> tuple[str, ...]:
        return tuple(self.route.split("/"))

    @property
    def filter(self) -> str:
        """The route as an MQTT subscription filter."""
        return "/".join("+" if segment.startswith("{") else segment for segment in self.segments)

    def allows(self, device_id: str) -> bool:
        """Tell whether the messages of a device may be this match's."""
        patterns = self.devices
        return not patterns or any(fnmatch.fnmatchcase(device_id, pattern) for pattern in patterns)

    def params(self, segments: Sequence[str]) -> dict[str, str] | None:
        """Return the named segments of a route that matches, else None."""
        mine = self.segments
        found: dict[str, str] = {}
        for position, pattern in enumerate(mine):
            if pattern == "#":
                return found
            if position >= len(segments):
                return None
            segment = segments[position]
            if pattern.startswith("{"):
                if not segment:
                    return None
                found[pattern[1:-1]] = segment
            elif pattern not in ("+", segment):
                return None
        return found if len(mine) == len(segments) else None


def _bad_name(text: str) -> bool:
    return not 0 < len(text) <= MAX_NAME_CHARS or "\x00" in text


class Shape:
    """What all readings with the same index and labels have in common; see the module's docstring.

    ``checks``: (position, rule) of the values that a rule restricts. ``trusted``: the driver vouches that every value
    is a boolean or a finite number. ``bad_names``: positions whose label (or all, where the index) no store can hold.
    """

    __slots__ = (
        "bad_names",
        "checks",
        "display_names",
        "free",
        "index",
        "labels",
        "max_age_seconds",
        "metadata",
        "trusted",
    )

    def __init__(
        self,
        *,
        index: str,
        labels: list[str],
        display_names: list[str],
        metadata: dict[str, Any],
        checks: tuple[tuple[int, ValueRule], ...],
        trusted: bool,
    ) -> None:
        self.index = index
        self.labels = labels
        self.display_names = display_names
        self.metadata = metadata
        self.checks = checks
        self.trusted = trusted
        everywhere = _bad_name(index)
        self.bad_names = tuple(n for n, label in enumerate(labels) if everywhere or _bad_name(label))
        # Nothing to check but the time of the sample.
        self.free = trusted and not checks and not self.bad_names
        ages = [rule.max_age_seconds for _, rule in checks if rule.max_age_seconds is not None]
        self.max_age_seconds = min(ages, default=None)


class IndexRules(msgspec.Struct, frozen=True, kw_only=True):
    """The rules of one index: for all of its labels, and for those that a name or pattern selects."""

    rule: ValueRule = NO_RULE
    labels: Mapping[str, ValueRule] = {}


def _select(table: Mapping[str, T], name: str) -> T | None:
    """Return the entry for ``name``: its own, else the first pattern that it matches."""
    found = table.get(name)
    if found is not None:
        return found
    return next((entry for pattern, entry in table.items() if fnmatch.fnmatchcase(name, pattern)), None)


class Profile:
    """One compiled profile. ``options`` are the driver's own settings; ``values`` maps an index (or pattern) to its
    rules."""

    def __init__(
        self,
        name: str,
        driver: str,
        *,
        match: Sequence[Match] = (),
        category: str = "measurements",
        values: Mapping[str, IndexRules] | None = None,
        options: Mapping[str, Any] | None = None,
        active: bool = True,
        description: str = "",
        qos: int = 1,
    ) -> None:
        self.name = name
        self.driver = driver
        self.match = tuple(match)
        self.category = category
        self.values = dict(values or {})
        self.options = dict(options or {})
        self.active = active
        self.description = description
        self.qos = qos
        self._shapes: dict[int, Shape] = {}
        self._by_labels: dict[tuple[Any, ...], Shape] = {}
        self._memory: dict[Any, Any] = {}

    def remember(self, key: Any, build: Callable[[], T]) -> T:
        """Return what ``build`` made for ``key``, now or earlier. For what a driver prepares once a profile."""
        found: T | None = self._memory.get(key)
        if found is None:
            if len(self._memory) >= MAX_CACHED:
                self._memory.clear()
            found = self._memory[key] = build()
        return found

    def rule(self, index: str, label: str) -> ValueRule:
        """Return what this profile says of the value ``label`` of ``index``."""
        rules = _select(self.values, index)
        if rules is None:
            return NO_RULE
        own = _select(rules.labels, label)
        return rules.rule if own is None else own.over(rules.rule)

    def shape(
        self,
        index: str,
        labels: Sequence[str],
        *,
        display_names: Sequence[str] | None = None,
        units: Sequence[str] | None = None,
        category: str | None = None,
        persist: bool = True,
        trusted: bool = False,
    ) -> Shape:
        """Return the shape of readings with these labels; what the profile says wins over what the driver passes.

        ``units`` and ``display_names`` have the length of ``labels``; where the driver has none, the unit is empty
        and the name is the label.
        """
        names = None if display_names is None else tuple(display_names)
        key = (index, tuple(labels), names, None if units is None else tuple(units), category, persist, trusted)
        found = self._by_labels.get(key)
        if found is not None:
            return found
        shape = self._build(
            index,
            labels,
            display_names=display_names,
            units=units,
            category=category,
            persist=persist,
            trusted=trusted,
        )
        if len(index) + sum(map(len, labels)) > MAX_CACHED_CHARS:
            return shape
        if len(self._by_labels) >= MAX_CACHED:
            # Shapes that drivers hold on to go on working: they are found by their labels, or built again.
            self._by_labels.clear()
            self._shapes.clear()
        self._by_labels[key] = shape
        self._shapes[id(shape.labels)] = shape
        return shape

    def _build(
        self,
        index: str,
        labels: Sequence[str],
        *,
        display_names: Sequence[str] | None = None,
        units: Sequence[str] | None = None,
        category: str | None = None,
        persist: bool = True,
        trusted: bool = False,
    ) -> Shape:
        rules = [self.rule(index, label) for label in labels]
        given_units = list(units) if units is not None else [""] * len(labels)
        given_names = list(display_names) if display_names is not None else list(labels)
        metadata: dict[str, Any] = {
            "category": next((rule.category for rule in rules if rule.category), None) or category or self.category,
            "units": [u if r.unit is None else r.unit for r, u in zip(rules, given_units, strict=True)],
            "persist": [persist if r.persist is None else r.persist for r in rules],
            "profile": self.name,
        }
        return Shape(
            index=index,
            labels=list(labels),
            display_names=[n if r.name is None else r.name for r, n in zip(rules, given_names, strict=True)],
            metadata=metadata,
            checks=tuple((position, rule) for position, rule in enumerate(rules) if rule.restricts),
            trusted=trusted,
        )

    def shape_of(self, index: str, labels: list[str]) -> Shape:
        """Return the shape that readings with this very list, or an equal one, belong to."""
        # The list is kept alive by the shape in the table, so its id cannot have passed to another.
        shape = self._shapes.get(id(labels))
        if shape is not None and shape.index == index:
            return shape
        return self._by_labels.get((index, tuple(labels), None, None, None, True, False)) or self._build(index, labels)

    def overridden(self, config: Mapping[str, Any]) -> Profile:
        """Return this profile with a device's overrides (``category``, ``options``, ``values`` as in a profile
        file)."""
        values = dict(self.values)
        for index, raw in (config.get("values") or {}).items():
            new, old = index_rules(raw), _select(self.values, index) or IndexRules()
            labels = dict(old.labels)
            for label, rule in new.labels.items():
                labels[label] = rule.over(labels.get(label, NO_RULE))
            if new.rule is not NO_RULE:
                labels = {label: rule if label in new.labels else new.rule.over(rule) for label, rule in labels.items()}
            values[index] = IndexRules(rule=new.rule.over(old.rule), labels=labels)
        return Profile(
            self.name,
            self.driver,
            match=self.match,
            category=config.get("category", self.category),
            values=values,
            options={**self.options, **(config.get("options") or {})},
            active=self.active,
            description=self.description,
            qos=config.get("qos", self.qos),
        )


def _rule(raw: Mapping[str, Any]) -> ValueRule:
    fields = {name: raw[name] for name in RULE_FIELDS if raw.get(name) is not None}
    if "whitelist" in fields:
        fields["whitelist"] = tuple(fields["whitelist"])
    return ValueRule(**fields) if fields else NO_RULE


def index_rules(raw: Mapping[str, Any]) -> IndexRules:
    """Compile one entry of ``values`` of a profile file that fits the schema."""
    return IndexRules(rule=_rule(raw), labels={label: _rule(rule) for label, rule in (raw.get("labels") or {}).items()})


def _match(raw: Mapping[str, Any]) -> Match:
    test = raw.get("payload")
    payload = None
    if test:
        length = test.get("length")
        payload = PayloadTest(
            lengths=None if length is None else tuple(length) if isinstance(length, list) else (length,),
            hex=test.get("hex"),
            starts_with=bytes.fromhex(test["starts_with_hex"]) if "starts_with_hex" in test else None,
            json_fields=tuple(test.get("json_fields", ())),
        )
    return Match(
        protocol=raw["protocol"],
        route=raw["topic"] if raw["protocol"] == "mqtt" else raw["path"].strip("/"),
        kind=raw.get("kind", "data"),
        device_id=raw.get("device_id", "{device_id}"),
        devices=tuple(raw.get("devices", ())),
        methods=tuple(raw.get("methods", ("POST",))),
        payload=payload,
    )


def compile_profile(raw: Mapping[str, Any]) -> Profile:
    """Compile the data of a profile file that fits ``profile.schema.json``."""
    matches = raw["match"] if isinstance(raw["match"], list) else [raw["match"]]
    return Profile(
        raw["profile"],
        raw["driver"],
        match=[_match(entry) for entry in matches],
        category=raw.get("category", "measurements"),
        values={index: index_rules(entry) for index, entry in (raw.get("values") or {}).items()},
        options=raw.get("options") or {},
        active=raw.get("active", True),
        description=raw.get("description", ""),
        qos=raw.get("qos", 1),
    )
