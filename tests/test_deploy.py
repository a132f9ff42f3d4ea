"""The Procfile and the files under deploy/ fit the stages and the settings that there are."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from honcho.environ import parse as parse_env
from honcho.environ import parse_procfile

from settings import STAGES, Settings, declarations

ROOT = Path(__file__).resolve().parent.parent


def test_one_process_type_per_stage() -> None:
    """The Procfile runs every stage in a process of its own, each with an address of its own."""
    processes = parse_procfile((ROOT / "Procfile").read_text(encoding="utf-8")).processes
    assert tuple(processes) == STAGES
    ports = set()
    for stage, command in processes.items():
        assert f" STAGES={stage} " in command
        assert command.endswith("exec faust -A streams worker")
        found = re.search(r'WEB_BIND="127\.0\.0\.1:\$\{PORT:-(\d+)\}"', command)
        assert found is not None
        ports.add(found[1])
    assert len(ports) == len(STAGES)


def test_the_sample_environment_is_valid() -> None:
    """deploy/headrace.env sets only variables that exist, commented ones included, to values that are allowed."""
    text = (ROOT / "deploy" / "headrace.env").read_text(encoding="utf-8")
    known = {declared.variable for declared in declarations()}
    named = set(re.findall(r"^(?:# )?([A-Z][A-Z_]+)=", text, flags=re.MULTILINE))
    assert named
    assert named <= known
    Settings.from_env(parse_env(text))


def test_the_unit_waits_longer_than_a_worker_drains() -> None:
    """systemd kills only after the bound that a worker has for its end."""
    unit = (ROOT / "deploy" / "headrace@.service").read_text(encoding="utf-8")
    found = re.search(r"^TimeoutStopSec=(\d+)$", unit, flags=re.MULTILINE)
    assert found is not None
    assert int(found[1]) > Settings.from_env({}).shutdown_seconds
    for line in re.findall(r"^Environment=(.*)$", unit, flags=re.MULTILINE):
        names = {part.partition("=")[0] for part in line.split()}
        assert names <= {declared.variable for declared in declarations()} | {"PYTHONUNBUFFERED"}


def test_the_readme_names_every_dependency() -> None:
    """Each dependency is in the README's table with the reason for it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [
        *project["dependencies"],
        *(name for extra in project["optional-dependencies"].values() for name in extra),
    ]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    names = {re.split(r"[\[<>=!~; ]", requirement)[0] for requirement in wanted}
    assert sorted(name for name in names if f"`{name}`" not in readme and not name.startswith("types-")) == []


def test_links_lead_somewhere() -> None:
    """Every relative link in the README and in docs/ points at a file that exists."""
    pages = [ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")]
    broken = [
        f"{page.name}: {target}"
        for page in pages
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
        if not (page.parent / target).exists()
    ]
    assert broken == []
