"""Published numbers come from results, never from a keyboard."""

import pytest

from cache4diffusion import method
from scripts import script

publish = script("publish")


def test_only_the_block_between_the_markers_changes(made_up):
    text = f"before\n{publish.BEGIN}\nold\n{publish.END}\nafter\n"
    new = publish.into_readme(text, made_up[0], "Measured.")
    assert new.startswith(f"before\n{publish.BEGIN}\nMeasured.\n")
    assert new.endswith(f"{publish.END}\nafter\n")
    assert "\nold\n" not in new
    assert publish.into_readme(new, made_up[0], "Measured.") == new


@pytest.mark.parametrize("text", ["", publish.BEGIN, publish.END + publish.BEGIN, 2 * (publish.BEGIN + publish.END)])
def test_without_its_markers_a_file_is_left_alone(made_up, text):
    with pytest.raises(ValueError, match="once each"):
        publish.into_readme(text, made_up[0], "")


def test_a_row_shows_the_settings_that_are_not_defaults(made_up):
    row = made_up[0].rows[-1].model_copy(update={"method": "fora", "settings": method("fora", interval=7).settings})
    assert publish.changed_settings(row) == "interval=7"


def test_the_short_table_has_fidelity_and_both_speedups(made_up):
    lines = publish.short_table(made_up[0]).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    row = made_up[0].row("speca")
    (line,) = [line for line in lines if line.startswith("| `speca")]
    cells = [cell.strip() for cell in line.split("|")]
    assert cells[2] == "paper"
    assert cells[4:7] == [f"{x:.2f}×" for x in (row.flops_speedup, row.latency_speedup, row.predicted_latency_speedup)]  # noqa: RUF001


def test_the_page_has_every_row_and_family(made_up):
    text = publish.page(made_up[0], "Title", "Words.")
    assert text.startswith("# Title\n\nWords.\n")
    for row in made_up[0].rows:
        assert row.name in text
        assert row.kind != "method" or row.strip in text
    for family in made_up[0].rows[0].accuracy_by_family or {}:
        assert family in text
