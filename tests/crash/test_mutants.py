from __future__ import annotations

import pytest

from tests.crash import model
from tests.crash.mutants import HOUSE, MUTANTS


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_each_fault_has_its_one_place_and_a_story(mutant):
    """`make mutants` runs them; that they still fit is found out here."""
    assert (HOUSE / mutant.file).read_text().count(mutant.before) == 1
    assert mutant.story in model.stories()
