import json
import os
import re
import subprocess
import sys

import pytest

from analysis.results import read_run
from experiments.runs.summary import RunSummary
from tests.analysis.runs import LAYERS, write_run

wandb_view = pytest.importorskip("analysis.wandb_view", reason="wandb is not installed")
main, view = wandb_view.main, wandb_view.view


def test_a_dry_run_prints_the_view_without_a_login_or_a_network(capsys, monkeypatch):
    monkeypatch.setattr("wandb.login", lambda **_: 1 / 0)
    monkeypatch.setattr("wandb.Api", lambda: 1 / 0)
    main(["--project", "psap", "--suite", "cifar10_table", "--dry-run"])
    printed = json.loads(capsys.readouterr().out)
    assert printed["project"] == "psap"
    assert printed["runs"] == {
        "filters": "Metric(\"Tags\") in ['cifar10_table']",
        "groupby": ["suite", "Group"],
    }
    assert printed["sections"]["MACs cut"] == {
        "asked for and reached": ["psap/macs_cut_target", "psap/macs_cut"]
    }
    assert printed["sections"]["Layers"]["utility"] == "^layer/utility/.*"


def test_what_is_sent_groups_by_cell_filters_by_tag_and_matches_layers_by_expression():
    section = (
        view("psap", suite="cifar10_table")._to_model().spec.model_dump(by_alias=True)["section"]
    )
    (runs,) = section["runSets"]
    assert runs["grouping"] == [
        {"section": "config", "name": "suite.value"},
        {"section": "run", "name": "group"},
    ]
    (tag,) = runs["filters"]["filters"]
    assert (tag["key"]["name"], tag["op"], tag["value"]) == ("tags", "IN", ["cifar10_table"])
    plots = [
        panel["config"]
        for part in section["panelBankConfig"]["sections"]
        for panel in part["panels"]
    ]
    assert {plot["xAxis"] for plot in plots if "metricRegex" in plot} == {"epoch"}
    assert sum(plot.get("useMetricRegex") is True for plot in plots) == 6
    assert view("psap").runset_settings.filters == ""


def test_results_are_bars_by_cell_with_their_spread_and_scatters():
    section = view("psap")._to_model().spec.model_dump(by_alias=True)["section"]
    results = section["panelBankConfig"]["sections"][0]["panels"]
    bars, *scatters = [panel["config"] for panel in results]
    assert [panel["viewType"] for panel in results] == ["Bar Chart", "Scatter Plot", "Scatter Plot"]
    assert (bars["metrics"], bars["groupBy"]) == (["top1"], "group")
    assert (bars["groupAgg"], bars["groupArea"]) == ("mean", "stddev")
    assert [(plot["xAxis"], plot["yAxis"]) for plot in scatters] == [
        ("summary:macs", "summary:top1"),
        ("summary:latency_ms", "summary:top1"),
    ]


def test_every_panel_shows_keys_that_a_run_of_psap_logs(tmp_path, capsys):
    logged = list(read_run(write_run(tmp_path / "run", "psap")).metrics)
    summary = {*RunSummary.__dataclass_fields__, "latency_ms"}
    main(["--project", "psap", "--dry-run"])
    for section, panels in json.loads(capsys.readouterr().out)["sections"].items():
        for keys in panels.values():
            if isinstance(keys, list):
                assert set(keys) <= (summary if section == "Results" else set(logged))
            else:
                assert sum(re.match(keys, key) is not None for key in logged) == len(LAYERS)


def test_without_a_login_the_command_says_so_in_one_sentence(tmp_path):
    env = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    env |= {
        "HOME": str(tmp_path),
        "NETRC": str(tmp_path / "netrc"),
        "WANDB_CONFIG_DIR": str(tmp_path),
    }
    command = [sys.executable, "-m", "analysis.wandb_view", "--project", "psap"]
    refused = subprocess.run(
        command, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert refused.returncode == 2
    assert refused.stderr == (
        "error: nobody is logged in to W&B: run `wandb login`, or add --dry-run to only see the view\n"
    )
