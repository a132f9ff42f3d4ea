"""``faust -A streams alarms test`` over the shipped rules."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from streams.commands.alarms import alarms

ROOT = Path(__file__).resolve().parents[2]
HISTORY = """time,value,unit
2026-06-16T10:00:00Z,80,°C
2026-06-16T10:01:00Z,95,°C
2026-06-16T10:03:00Z,96,°C
2026-06-16T10:04:00Z,88,°C
2026-06-16T10:05:00Z,85,°C
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CliRunner:
    monkeypatch.setenv("CONFIG_PATH", str(ROOT / "config"))
    # the settings may have been read already, with the default, which is relative
    (tmp_path / "config").symlink_to(ROOT / "config")
    (tmp_path / "history.csv").write_text(HISTORY, encoding="utf-8")
    (tmp_path / "odd.csv").write_text("when,what\n1,2\n")
    monkeypatch.chdir(tmp_path)
    return CliRunner()


def test_prints_when_it_would_have_fired(run: CliRunner) -> None:
    """A line for each transition, durations counted by the samples, hysteresis kept."""
    result = run.invoke(alarms, ["test", "--rule", "machine-hot", "--csv", "history.csv"])
    assert result.exit_code == 0
    assert result.output.splitlines() == [
        "2026-06-16T10:02:00Z  opened        device/temperature/label  95 °C  (> 90)",
        "2026-06-16T10:05:00Z  resolved      device/temperature/label  85 °C  (> 90)",
        "5 readings over 300 s: the rule machine-hot opened 1 and resolved 1 alarms",
    ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--rule", "nope", "--csv", "history.csv"], "it has: machine-hot"),
        (["--rule", "machine-hot", "--csv", "odd.csv"], "needs time and value"),
    ],
)
def test_says_what_is_wrong(run: CliRunner, arguments: list[str], said: str) -> None:
    """A rule or a file that is not there ends with 1 and says what there is."""
    result = run.invoke(alarms, ["test", *arguments])
    assert result.exit_code == 1
    assert said in result.output
