"""Break the code on purpose and see that the tests named for it fail: ``python -m tests.faults.mutate``.

    python -m tests.faults.mutate                     # all of them; control runs of the same tests first
    python -m tests.faults.mutate --rows 3 4          # those of some rows of the catalogue
    python -m tests.faults.mutate puback-at-once      # one by name
    python -m tests.faults.mutate --units             # those that need no processes of their own

Works on a copy of the checkout below the temporary folder, with this checkout's ``.venv/``. Exit code 0: every test
passed without a mutation and failed with its own.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from settings import environment
from tests.faults.mutations import MUTATIONS, Edit, Mutation

ROOT = Path(__file__).resolve().parents[2]
#: A mutated scenario waits in vain for what cannot come any more; its control has the same patience.
_LIVENESS_SECONDS = "60"
_PASSED, _FAILED = 0, 1


@contextmanager
def copied() -> Iterator[Path]:
    """Copy what is in the checkout, committed or not, and what it was installed with."""
    with tempfile.TemporaryDirectory(prefix="headrace-mutate-") as folder:
        target = Path(folder) / "headrace"
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            check=True,
            capture_output=True,
            text=True,
        )
        for name in filter(None, listed.stdout.split("\0")):
            if (ROOT / name).is_file():
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, target / name)
        (target / ".venv").symlink_to(ROOT / ".venv")
        yield target


@contextmanager
def mutated(folder: Path, edits: Sequence[Edit]) -> Iterator[None]:
    """Apply edits to the copy for as long as the block lasts. Raises LookupError where a text is not there once."""
    before = {edit.file: (folder / edit.file).read_text() for edit in edits}
    try:
        for edit in edits:
            text = (folder / edit.file).read_text()
            if text.count(edit.old) != 1:
                raise LookupError(f"{edit.file} has this {text.count(edit.old)} times instead of once:\n{edit.old}")
            (folder / edit.file).write_text(text.replace(edit.old, edit.new))
        yield
    finally:
        for name, text in before.items():
            (folder / name).write_text(text)


def run(folder: Path, test: str) -> tuple[int, list[str], str]:
    """Run a test in the copy, up to its first failure; returns the exit code, what failed, and the output's end."""
    done = subprocess.run(
        [folder / ".venv/bin/python", "-m", "pytest", "-x", "--timeout", "300", test],
        cwd=folder,
        env={**environment(), "FAULTS": "short", "FAULTS_LIVENESS_SECONDS": _LIVENESS_SECONDS},
        check=False,
        capture_output=True,
        text=True,
        start_new_session=True,
    )
    failed = re.findall(r"^(?:FAILED|ERROR) \S+?::(\S+)", done.stdout, re.MULTILINE)
    return done.returncode, failed, "\n".join((done.stdout + done.stderr).splitlines()[-25:])


def chosen(options: argparse.Namespace) -> list[Mutation]:
    """Return the mutations that are asked for."""
    return [
        mutation
        for mutation in MUTATIONS
        if (not options.names or mutation.name in options.names)
        and (not options.rows or set(options.rows) & set(mutation.rows))
        and not (options.units and mutation.with_processes)
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Try what is asked for, print a line for each test; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.mutate", description="see the tests fail")
    parser.add_argument("names", nargs="*", help="mutations; all without")
    parser.add_argument("--rows", nargs="*", type=int, help="rows of the catalogue")
    parser.add_argument("--units", action="store_true", help="only those that need no processes of their own")
    parser.add_argument("--no-control", action="store_true", help="do not run the tests without mutations first")
    options = parser.parse_args(arguments)
    if unknown := set(options.names) - {mutation.name for mutation in MUTATIONS}:
        parser.error(f"no mutation is called {', '.join(sorted(unknown))}")
    mutations = chosen(options)
    wrong = 0
    with copied() as folder:
        controls = () if options.no_control else [test for mutation in mutations for test in mutation.tests]
        for test in dict.fromkeys(controls):
            begun = time.monotonic()
            code, failed, tail = run(folder, test)
            print(f"control  {time.monotonic() - begun:5.0f} s  {test}: {'passes' if not code else failed}", flush=True)
            if code != _PASSED:
                wrong += 1
                print(tail, flush=True)
        for mutation in mutations:
            with mutated(folder, mutation.edits):
                for test in mutation.tests:
                    begun = time.monotonic()
                    code, failed, tail = run(folder, test)
                    seen = code == _FAILED and bool(failed)
                    told = f"fails: {failed[0]}" if seen else f"NOT SEEN (pytest ended with {code})"
                    print(f"mutated  {time.monotonic() - begun:5.0f} s  {mutation.name}: {test} {told}", flush=True)
                    if not seen:
                        wrong += 1
                        print(tail, flush=True)
    print(f"{len(mutations)} mutations; {wrong} of their tests did not do as they should")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
