"""The tables of README and docs are what the recorded results give; nobody types a figure."""

from pathlib import Path

import pytest

from analysis.findings import compare
from analysis.pages import PAGES, ROOT, TABLES, Sources, filled
from analysis.published import read_published
from analysis.recorded import read_results
from analysis.results import RESULTS
from analysis.suites import plan_suites
from analysis.tables import make_table
from experiments.runs.files import DataError


@pytest.fixture(scope="module")
def sources():
    suites = plan_suites()
    runs = read_results(RESULTS)
    tables = {suite.name: make_table(suite, runs, read_published()) for suite in suites}
    return Sources({suite.name: suite for suite in suites}, runs, tables, RESULTS)


@pytest.mark.parametrize("page", PAGES)
def test_a_page_holds_the_tables_that_the_recorded_results_give(page, sources):
    text = (ROOT / page).read_text()
    assert filled(text, Path(page), sources) == text


def test_every_table_stands_on_a_page():
    texts = "".join((ROOT / page).read_text() for page in PAGES)
    assert [name for name in TABLES if f"<!-- table: {name} -->" not in texts] == []


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("<!-- table: none -->\n<!-- end of table -->", "asks for the table 'none'"),
        ("<!-- table: aims -->\n", "has a table without an end"),
    ],
)
def test_a_marker_that_names_nothing_or_does_not_end_is_refused(text, sentence, sources):
    with pytest.raises(DataError, match=f"page.md {sentence}"):
        filled(text, Path("page.md"), sources)


def test_what_the_readme_says_is_known_is_what_the_studies_say(sources):
    """Adaptive ratios help, protection is not shown to, and the thin network is neither beaten nor ahead."""
    study = compare(sources.suites["cifar16_defaults"], sources.runs)
    assert study.effects["adaptive layer ratios"].verdict == "better"
    assert study.effects["protection"].verdict == "not shown"
    assert study.differences["thin"].verdict == "not shown"
    assert study.differences["margin 0.1"].verdict == "not shown"
    before = compare(sources.suites["cifar16_study"], sources.runs)
    worse = {name for name, found in before.differences.items() if found.verdict == "worse"}
    assert worse == {"ramp to 20 %", "later exact return", "later graded return"}
