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
from wandb_workspaces.reports.v2.interface import LinePlot

from experiments.exits import plain_exits
from experiments.runs.files import DataError

# Section -> panel title -> metric keys, or one regular expression over the keys of all layers.
SECTIONS: dict[str, dict[str, list[Any] | str]] = {
    "Accuracy and loss": {"top-1 [%]": ["eval/top1"], "training loss": ["train/loss"]},
    "MACs cut": {"asked for and reached": ["psap/macs_cut_target", "psap/macs_cut"]},
    "Mask churn": {"mask churn": ["psap/mask_churn"]},
    "Filters": {name: [f"psap/{name}"] for name in ("proposed", "suspended", "restored")},
    "Layers": {
        name: f"^layer/{name}/.*"
        for name in (
            "weight_sparsity_ratio",
            "prune_ratio",
            "utility",
            "grad_norm_live",
            "grad_norm_suspended",
        )
    },
}
LINES = 100  # at most, in a panel: W&B's default of 10 would hide cells


def panel(title: str, keys: list[Any] | str) -> LinePlot:
    """Epochs across; one line for the mean of a cell's seeds, in a band from the lowest to the highest."""
    return LinePlot(
        title=title,
        x="epoch",
        y=keys if isinstance(keys, list) else [],
        metric_regex=keys if isinstance(keys, str) else None,
        groupby="Group",
        groupby_aggfunc="mean",
        groupby_rangefunc="minmax",
        max_runs_to_show=LINES,
    )


def view(project: str, entity: str = "", suite: str | None = None) -> ws.Workspace:
    """The view; `suite` leaves only the runs with that tag. Talks to nobody."""
    return ws.Workspace(
        entity=entity,
        project=project,
        name=f"PSAP against its peers{f': {suite}' if suite else ''}",
        sections=[
            ws.Section(
                name=name,
                panels=[panel(title, keys) for title, keys in panels.items()],
                is_open=True,
            )
            for name, panels in SECTIONS.items()
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
                plot.title: plot.metric_regex or plot.y
                for plot in section.panels
                if isinstance(plot, LinePlot)
            }
            for section in workspace.sections
        },
    }


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
