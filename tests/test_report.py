"""Measured figures in the pages come out of the records: pytest tests/test_report.py"""

import pytest

from benchmarks import report


@pytest.mark.parametrize("page", report.PAGES, ids=lambda page: str(page.relative_to(report.ROOT)))
def test_the_page_is_what_the_records_say(page):
    text = page.read_text()
    assert "<!-- records: " in text
    assert report.fill(text) == text


@pytest.mark.parametrize("page", report.WRITTEN, ids=lambda page: page.name)
def test_a_written_page_comes_back_byte_for_byte(page):
    assert report.WRITTEN[page]() == page.read_text()


def test_plots_come_back_byte_for_byte():
    drawn = report.plots()
    assert {path.name for path in report.PLOTS.glob("*.svg")} == drawn.keys()
    for name, content in drawn.items():
        assert (report.PLOTS / name).read_bytes() == content


def test_a_figure_that_was_typed_in_is_noticed():
    text = "<!-- records: sample -->\n0.99\n<!-- end -->"
    assert report.fill(text) != text
