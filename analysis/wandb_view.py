"""A saved W&B view of a project, as code: PSAP against its peers, grouped by cell.

python -m analysis.wandb_view --project P [--entity E] [--suite S] [--dry-run]

--suite shows only the runs with that tag; --dry-run prints the view as JSON and needs neither a login nor a network.
"""

import argparse
import json
import sys
from typing import Any

import wandb
import wandb_workspaces.workspaces as ws
from wandb_workspaces import expr
from wandb_workspaces.reports.v2.interface import BarPlot, LinePlot, ScatterPlot, SummaryMetric

from experiments.exits import plain_exits
from experiments.runs.files import DataError

LINES = 100  # at most, in a panel: W&B's default of 10 would hide cells
Panel = LinePlot | BarPlot | ScatterPlot


def lines(title: str, keys: list[str] | str) -> LinePlot:
    """Epochs across; one line for the mean of a cell's seeds, in a band from the lowest to the highest.

    `keys` are metrics, or one regular expression over the metrics of all layers.
    """
    return LinePlot(
        title=title,
        x="epoch",
        y=[*keys] if isinstance(keys, list) else [],
        metric_regex=keys if isinstance(keys, str) else None,
        groupby="Group",
        groupby_aggfunc="mean",
        groupby_rangefunc="minmax",
        max_runs_to_show=LINES,
    )


def bars(title: str, key: str) -> BarPlot:
    """One bar for the mean of a cell's seeds in a value of their summaries, with their standard deviation."""
    return BarPlot(
        title=title,
        metrics=[key],
        groupby="Group",
        groupby_aggfunc="mean",
        groupby_rangefunc="stddev",
        max_runs_to_show=LINES,
        max_bars_to_show=LINES,
    )


def scatter(title: str, x: str, y: str) -> ScatterPlot:
    """One point a run; both values are of its summary."""
    return ScatterPlot(title=title, x=SummaryMetric(x), y=SummaryMetric(y))


def sections() -> dict[str, list[Panel]]:
    """All panels; new ones at each call, because each has an id of its own."""
    layer_panels = (
        "weight_sparsity_ratio",
        "prune_ratio",
        "kept",
        "utility",
        "grad_norm_live",
        "grad_norm_suspended",
    )
    return {
        "Results": [
            bars("top-1 [%] by cell, with the standard deviation over seeds", "top1"),
            scatter("top-1 [%] against MACs", x="macs", y="top1"),
            scatter("top-1 [%] against latency [ms]", x="latency_ms", y="top1"),
        ],
        "Accuracy and loss": [
            lines("top-1 [%]", ["eval/top1"]),
            lines("training loss", ["train/loss"]),
        ],
        "Training": [
            lines("learning rate", ["train/lr"]),
            lines("images per second", ["train/images_per_second"]),
        ],
        "MACs cut": [lines("asked for and reached", ["psap/macs_cut_target", "psap/macs_cut"])],
        "Mask churn": [lines("mask churn", ["psap/mask_churn"])],
        "Filters": [
            lines(name, [f"psap/{name}"]) for name in ("proposed", "suspended", "restored")
        ],
        "Layers": [lines(name, f"^layer/{name}/.*") for name in layer_panels],
    }


def view(project: str, entity: str = "", suite: str | None = None) -> ws.Workspace:
    """The view; `suite` leaves only the runs with that tag. Talks to nobody."""
    return ws.Workspace(
        entity=entity,
        project=project,
        name=f"PSAP against its peers{f': {suite}' if suite else ''}",
        sections=[
            ws.Section(name=name, panels=[*panels], is_open=True)
            for name, panels in sections().items()
        ],
        settings=ws.WorkspaceSettings(x_axis="epoch", max_runs=LINES),
        runset_settings=ws.RunsetSettings(
            filters=expr.And(expr.Tags().isin([suite])) if suite else "",
            groupby=[
                expr.Config("suite"),
                expr.Metric("Group"),
            ],  # cells of two suites may share a name
            order=[expr.Ordering(expr.Metric("Group"))],
            pinned_columns=["summary:top1", "summary:macs_cut"],
        ),
    )


def description(workspace: ws.Workspace) -> dict[str, Any]:
    """What a reader of --dry-run wants to know about the view, as JSON."""
    runs = workspace.runset_settings
    return {
        "project": workspace.project,
        "entity": workspace.entity or "the login's default",
        "name": workspace.name,
        "runs": {"filters": runs.filters, "groupby": [metric.name for metric in runs.groupby]},
        "sections": {
            section.name: {
                panel.title: shown(panel) for panel in section.panels if isinstance(panel, Panel)
            }
            for section in workspace.sections
        },
    }


def shown(panel: Panel) -> Any:
    """The keys that a panel shows: a list, or a regular expression over all keys."""
    if isinstance(panel, ScatterPlot):
        return [axis.name for axis in (panel.x, panel.y) if isinstance(axis, SummaryMetric)]
    if isinstance(panel, BarPlot):
        return panel.metrics
    return panel.metric_regex or panel.y


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--project", required=True)
    parser.add_argument("--entity", default="")
    parser.add_argument("--suite")
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args(arguments)
    workspace = view(options.project, options.entity, options.suite)
    if options.dry_run:
        print(json.dumps(description(workspace), indent=1))
        return
    with plain_exits():
        try:
            if not wandb.login(prompt=False):
                raise DataError(
                    "nobody is logged in to W&B: run `wandb login`, or add --dry-run to only see the view"
                )
            workspace.entity = workspace.entity or wandb.Api().default_entity or ""
            workspace.save()  # type: ignore[no-untyped-call]
        except wandb.Error as error:
            raise DataError(f"W&B says: {' '.join(str(error).split())}") from error


if __name__ == "__main__":
    main(sys.argv[1:])
