"""The list of mutations fits the code, the catalogue and the page that shows it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.faults.mutate import copied, main, mutated
from tests.faults.mutations import MUTATIONS, Edit, Mutation

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "faults.md").read_text()


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_it_fits_the_code(mutation: Mutation) -> None:
    """Its texts stand once where they are said to stand, the result is other code, and its tests exist."""
    texts: dict[str, str] = {}
    for edit in mutation.edits:
        text = texts.get(edit.file) or (ROOT / edit.file).read_text()
        assert text.count(edit.old) == 1, f"{edit.file}: {edit.old}"
        texts[edit.file] = text.replace(edit.old, edit.new)
    for name, text in texts.items():
        assert ast.dump(ast.parse(text)) != ast.dump(ast.parse((ROOT / name).read_text()))
    for test in mutation.tests:
        file, _, function = test.partition("::")
        assert not function or f"def {function}(" in (ROOT / file).read_text(), test


def test_every_row_of_the_catalogue_is_broken_by_one() -> None:
    """Each scenario of the page has a mutation, and each mutation stands there in the same words."""
    rows = {int(number) for number in re.findall(r"^\| (\d+) \|", PAGE, re.MULTILINE)}
    assert rows == set(range(1, 32))
    assert {row for mutation in MUTATIONS for row in mutation.rows} == rows
    for mutation in MUTATIONS:
        numbers = ", ".join(map(str, mutation.rows))
        assert f"| {numbers} | `{mutation.name}`: {mutation.what} |" in PAGE


def test_names_are_unique() -> None:
    """A name says which one is meant; an unknown one is an error."""
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS)
    with pytest.raises(SystemExit) as ended:
        main(["no-such-mutation"])
    assert ended.value.code == 2


def test_a_mutation_lasts_as_long_as_its_block() -> None:
    """The copy is as before afterwards, and one that does not fit leaves it alone."""
    with copied() as folder:
        file = folder / "streams/resilience/ending.py"
        before = file.read_text()
        fits = Edit("streams/resilience/ending.py", "os._exit(code)", "os._exit(0)")
        with mutated(folder, (fits,)):
            assert "os._exit(code)" not in file.read_text()
        assert file.read_text() == before
        with (
            pytest.raises(LookupError, match="0 times instead of once"),
            mutated(folder, (fits, Edit(fits.file, "nowhere", ""))),
        ):
            pass
        assert file.read_text() == before
