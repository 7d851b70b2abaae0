"""What a host says it is."""

from __future__ import annotations

import pytest

from agent_core.wire import Getter
from updater.inventory import distro, inventory


def test_a_host_says_what_it_is_in_a_form_that_a_report_takes():
    said = inventory()
    assert {"os", "arch", "kernel", "python"} <= said.keys()
    assert Getter({"inventory": said}, "report").labels("inventory") == said


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('PRETTY_NAME="x"\nID=debian\nVERSION_ID="12"\n', "debian-12"),
        ("ID=arch\n", "arch"),
        ("nonsense\n\n", ""),
        ("", ""),
        (None, ""),
    ],
    ids=["both", "no version", "nonsense", "empty", "no file"],
)
def test_the_distribution_is_told_where_the_host_says_it(tmp_path, content, said):
    file = tmp_path / "os-release"
    if content is not None:
        file.write_text(content)
    assert distro(file) == said
