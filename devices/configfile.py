"""YAML files that know their lines: every error of every file at once, each with file, line, what was found, what is
allowed.

``load`` composes the YAML nodes beside the data, so that an error found later, by a JSON schema or by a rule that
looks at several files, can still say the line. Nothing here raises for a wrong file; errors are collected, and
whoever has collected them all raises one :class:`ConfigErrors`.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import yaml
from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError

Steps = tuple[str | int, ...]


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2's core schema, as written by people who know no other.

    PyYAML follows YAML 1.1, where ``ON`` is a boolean, ``18:00`` is 1080 and ``010`` is 8.
    """


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+0123456789.",
    ),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("merge", r"<<", "<"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))


def _integer(loader: _Loader, node: yaml.ScalarNode) -> int:
    return int(loader.construct_scalar(node))


_Loader.add_constructor("tag:yaml.org,2002:int", _integer)


@dataclass(frozen=True)
class ConfigError:
    """One thing wrong in one file. ``pointer`` is the JSON pointer to it, ``line`` counts from 1 (0: the file as a
    whole)."""

    file: str
    line: int
    pointer: str
    message: str
    found: str = ""
    allowed: str = ""

    def __str__(self) -> str:
        text = f"{self.file}:{self.line}: " if self.line else f"{self.file}: "
        text += f"{self.pointer}: {self.message}" if self.pointer else self.message
        if self.found:
            text += f"; found {self.found}"
        if self.allowed:
            text += f"; allowed: {self.allowed}"
        return text


class ConfigErrors(ValueError):
    """All that is wrong in the configuration; ``errors`` holds one :class:`ConfigError` each."""

    def __init__(self, errors: Sequence[ConfigError]) -> None:
        self.errors = list(errors)
        super().__init__("\n".join(str(error) for error in self.errors))


@dataclass
class Document:
    """The data of one YAML file and the line of each of its nodes."""

    file: str
    data: Any = None
    lines: dict[Steps, int] = field(default_factory=dict)

    def line(self, path: Iterable[str | int]) -> int:
        """Return the line of ``path``, or of its nearest parent that has one."""
        steps = tuple(path)
        while steps and steps not in self.lines:
            steps = steps[:-1]
        return self.lines.get(steps, 1)

    def error(self, path: Iterable[str | int], message: str, *, found: Any = None, allowed: str = "") -> ConfigError:
        """Describe what is wrong at ``path``."""
        steps = tuple(path)
        shown = "" if found is None else _show(found)
        return ConfigError(self.file, self.line(steps), _pointer(steps), message, shown, allowed)


def _show(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


def _pointer(steps: Steps) -> str:
    return "".join("/" + str(step).replace("~", "~0").replace("/", "~1") for step in steps)


def _walk(node: yaml.Node, path: Steps, document: Document, errors: list[ConfigError]) -> None:
    document.lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key_node, value_node in node.value:
            key = str(key_node.value)
            line = key_node.start_mark.line + 1
            if key in seen:
                pointer = _pointer((*path, key))
                errors.append(ConfigError(document.file, line, pointer, f"the key is already on line {seen[key]}"))
            seen[key] = line
            document.lines[(*path, key)] = line
            _walk(value_node, (*path, key), document, errors)
    elif isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            _walk(item, (*path, number), document, errors)


def load(path: Path, name: str, errors: list[ConfigError]) -> Document | None:
    """Read the YAML file ``path``; ``name`` is what errors call it. Returns None, with an error appended, when it
    cannot."""
    document = Document(name)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        errors.append(ConfigError(name, 0, "", f"the file cannot be read: {exc}"))
        return None
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return document
        _walk(node, (), document, errors)
        document.data = loader.construct_document(node)
    except RecursionError:
        errors.append(ConfigError(name, 0, "", "the YAML is nested too deeply or refers to itself"))
        return None
    except yaml.YAMLError as exc:
        mark = getattr(exc, "problem_mark", None)
        problem = getattr(exc, "problem", None) or str(exc)
        errors.append(ConfigError(name, mark.line + 1 if mark else 0, "", f"this is not YAML: {problem}"))
        return None
    finally:
        loader.dispose()
    return document


def _properties(error: ValidationError) -> list[str]:
    return sorted(error.schema.get("properties", {})) if isinstance(error.schema, dict) else []


def _allowed(error: ValidationError) -> str:
    rule, value = error.validator, cast("Any", error.validator_value)
    if rule == "type":
        return " or ".join(value) if isinstance(value, list) else str(value)
    if rule in ("enum", "const"):
        return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    if rule == "additionalProperties":
        return ", ".join(_properties(error))
    if rule == "required":
        return f"needs {', '.join(value)}"
    words = {
        "minimum": "at least",
        "maximum": "at most",
        "exclusiveMinimum": "more than",
        "exclusiveMaximum": "less than",
        "minLength": "characters, at least",
        "maxLength": "characters, at most",
        "minItems": "items, at least",
        "minProperties": "keys, at least",
        "pattern": "text that matches",
        "format": "format",
    }
    return f"{words.get(str(rule), str(rule))} {value}"


def schema_errors(document: Document, schema: dict[str, Any]) -> list[ConfigError]:
    """Check ``document`` against the JSON schema; one error each, an unknown key at its own line."""
    errors = sorted(Draft202012Validator(schema).iter_errors(document.data), key=lambda e: list(map(str, e.path)))
    return [told for error in errors for told in _told(document, error)]


def _told(document: Document, error: ValidationError) -> list[ConfigError]:
    path: Steps = tuple(error.absolute_path)
    if error.validator in ("oneOf", "anyOf") and error.context:
        return [told for inner in _meant(error) for told in _told(document, inner)]
    if error.validator == "additionalProperties" and isinstance(error.instance, dict):
        known = _properties(error)
        found = []
        for key in error.instance:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1)
                hint = f"; do you mean {near[0]}?" if near else ""
                found.append(document.error((*path, str(key)), f"unknown key{hint}", allowed=_allowed(error)))
        return found
    if error.validator == "required":
        missing = [name for name in cast("Any", error.validator_value) if name not in cast("Any", error.instance)]
        # jsonschema reports each missing key by an error of its own; its message begins with the key's name.
        name = next((key for key in missing if error.message.startswith(repr(key))), missing[0])
        return [document.error(path, f"the key {name} is missing", allowed=_allowed(error))]
    if error.validator == "not" and isinstance(error.validator_value, dict):
        keys = ", ".join(error.validator_value.get("required", ()))
        return [document.error(path, f"the key {keys} does not belong here" if keys else error.message)]
    text = error.message if error.validator not in ("type", "enum") else f"wrong {error.validator}"
    instance = error.instance if error.validator in ("type", "enum", "pattern") else None
    return [document.error(path, text, found=instance, allowed=_allowed(error))]


def _meant(error: ValidationError) -> list[ValidationError]:
    """Return the errors of the alternative that was meant: the one whose type fits, else that with the fewest
    errors."""
    branches: dict[Any, list[ValidationError]] = {}
    for inner in error.context or ():
        branches.setdefault(inner.schema_path[0], []).append(inner)

    def unfit(inner: list[ValidationError]) -> tuple[bool, int]:
        return any(e.validator == "type" and not e.path for e in inner), len(inner)

    return min(branches.values(), key=unfit)
