"""Tables of the README and of docs/, each written between two markers by `make tables`: nobody types a figure.

<!-- table: comparison -->
<!-- end of table -->
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.findings import Study, compare, effect_rows, findings
from analysis.results import Run, named, training_hours
from analysis.stats import verdict
from analysis.suites import PlannedSuite, runs_of_suite
from analysis.tables import Table
from analysis.verdicts import goals
from experiments.runs.files import DataError

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/results.md", "docs/cost.md", "psap_core/METHOD.md")
TABLE = re.compile(r"<!-- table: ([\w-]+) -->\n(.*?)<!-- end of table -->", re.DOTALL)
TITLES = {
    "dense": "dense network",
    "thin": "width-scaled network from scratch",
    "thin_plan": "PSAP's architecture from fresh weights",
    "l1": "L1 norm, one shot",
    "sfp": "SFP",
    "fpgm": "FPGM",
    "psap": "PSAP",
    "psap without protection": "PSAP without protection",
    "psap one step": "PSAP in one step",
}
SCOPES = {"coupled": "`coupled`", "coupled_8": "`coupled`, 8", "all": "`all`", "thin": "thinner"}


@dataclass(frozen=True)
class Sources:
    """What the tables are built from: suites, their runs and tables by name, and the folder of all that is recorded."""

    suites: Mapping[str, PlannedSuite]
    runs: Sequence[Run]
    tables: Mapping[str, Table]
    results: Path

    def study(self, name: str) -> Study:
        return compare(self.suites[name], self.runs)

    def report(self, name: str) -> dict[str, Any]:
        """A report of `experiments.benchmark`."""
        path = self.results / "benchmark" / f"{name}.json"
        try:
            report: dict[str, Any] = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise DataError(f"{path} cannot be read: measure again") from error
        return report


def filled_pages(sources: Sources) -> dict[Path, str]:
    """All pages with their tables."""
    pages = [ROOT / page for page in PAGES]
    return {path: filled(path.read_text(encoding="utf-8"), path, sources) for path in pages}


def filled(text: str, path: Path, sources: Sources) -> str:
    """A page with its tables. Raises DataError where a marker names no table or is not closed."""
    for name in re.findall(r"<!-- table: ([^ ]*) -->", text):
        if name not in TABLES:
            raise DataError(f"{path} asks for the table {name!r}: there are {', '.join(TABLES)}")
    if len(TABLE.findall(text)) != text.count("<!-- table:"):
        raise DataError(f"{path} has a table without an end: <!-- end of table -->")

    def fill(match: re.Match[str]) -> str:
        name = match.group(1)
        return f"<!-- table: {name} -->\n{TABLES[name](sources).strip()}\n<!-- end of table -->"

    return TABLE.sub(fill, text)


def _markdown(rows: Iterable[Mapping[str, str]]) -> str:
    table: str = pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True)
    return table


# ---------------------------------------------------------------------------- results


HEADLINE = {
    "dense": "dense network",
    "coupled": "PSAP",
    "thin": "width-scaled network from scratch",
    "coupled from fresh weights": "PSAP's architecture from fresh weights",
    "l2 coupled": "L2 norm, one shot",
    "taylor coupled": "Taylor importance, step by step",
    "coupled without protection": "PSAP without protection",
    "coupled one ratio": "PSAP with one ratio for all layers",
    "all": "PSAP in scope `all`",
}


def headline_table(sources: Sources) -> str:
    """Top-1 of PSAP in scope coupled and its rivals, where all seeds have run, and the paired differences."""
    seeds = len(sources.suites["cifar16_scopes"].seeds)
    cells = {
        (row["method"], row["target"]): row
        for row in _ours(sources.tables["cifar16_scopes"])
        if row["method"] in HEADLINE and row["top1_n"] == seeds
    }
    methods = {method for method, _ in cells}
    rows = []
    for method in [method for method in HEADLINE if method in methods]:
        row = {"top-1 on 10,000 test images, %": HEADLINE[method]}
        for target in sorted({target for _, target in cells}):
            cell = cells.get((method, target))
            cut = f"{100 * target:g} %"
            row[f"{cut} cut"] = "not run" if cell is None else _mean_and_spread(cell)
            row[f"{cut}, to PSAP"] = "" if cell is None else _to_psap(cell)
        rows.append(row)
    return _markdown(rows)


def _mean_and_spread(row: Mapping[str, Any]) -> str:
    return f"{row['top1']:.1f} ± {row['top1_sd']:.1f}"


def _to_psap(row: Mapping[str, Any]) -> str:
    """A row's difference to PSAP with its interval; nothing for PSAP itself."""
    if pd.isna(row["to_psap"]):
        return ""
    return f"{row['to_psap']:+.1f} [{row['to_psap_low']:+.1f}, {row['to_psap_high']:+.1f}]"


def comparison_table(sources: Sources) -> str:
    """The comparison's methods beside PSAP, a difference with its interval."""
    table = sources.tables["cifar16_comparison"]
    rows: dict[str, dict[str, str]] = {}
    for row in _ours(table):
        title = TITLES.get(row["method"], row["method"])
        cut = f"{100 * row['target']:g} %"
        rows.setdefault(title, {"method": title})
        rows[title][f"top-1 at {cut}"] = _mean_and_spread(row)
        rows[title][f"to PSAP at {cut}"] = _to_psap(row)
        rows[title][f"masked at {cut}"] = f"{row['masked_top1']:.1f}"
    return _markdown(rows.values())


def short_table(sources: Sources) -> str:
    """One run each from the pretrained ResNet-20."""
    table = sources.tables["cifar10_short_comparison"]
    losses = {
        run.cell: run.metrics["train/loss"].iloc[-1]
        for run in sources.runs
        if run.suite == table.name
    }
    rows = sorted(_ours(table), key=lambda row: -row["top1"])
    return _markdown(
        {
            "method": TITLES.get(row["method"], row["method"]),
            "top-1": f"{row['top1']:.1f}",
            "drop": f"{row['drop']:.1f}",
            "training loss, last epoch": f"{losses[row['cell']]:.2f}",
        }
        for row in rows
    )


def _ours(table: Table) -> list[dict[str, Any]]:
    """Rows of cells that have run."""
    ours = table.rows[(table.rows["kind"] == "ours") & (table.rows["top1_n"] > 0)]
    return [{str(key): value for key, value in row.items()} for row in ours.to_dict("records")]


def study_table(sources: Sources) -> str:
    return _of_study(sources.study("cifar16_study"))


def defaults_table(sources: Sources) -> str:
    study = sources.study("cifar16_defaults")
    effects = effect_rows(study)[["effect", "n", "difference", "95 %", "verdict", "above zero"]]
    return f"{_of_study(study)}\n\n{effects.to_markdown(index=False, disable_numparse=True)}"


def coupled_table(sources: Sources) -> str:
    """Scope coupled beside its rivals, and its parts."""
    return _of_study(sources.study("cifar16_scopes"), "test [%]")


def scope_defaults_table(sources: Sources) -> str:
    """Fresh seeds for the default scope."""
    return _of_study(sources.study("cifar16_scope_defaults"), "test [%]")


def _of_study(study: Study, *more: str) -> str:
    """The cells that have run, with `more` of their columns."""
    rows, _ = findings(study)
    run = rows[~rows["n"].str.startswith("0 ")]
    columns = ["cell", "n", *more, "against", "difference", "95 %", "verdict", "plan"]
    table: str = run[columns].to_markdown(index=False, disable_numparse=True)
    return table


@dataclass(frozen=True)
class Choice:
    """A row of the method card: what PSAP does, another way, and the cell that takes it instead of PSAP."""

    ours: str
    other: str
    cut: str
    suite: str
    cell: str


CHOICES = (
    Choice("scope `coupled`", "scope `all`", "85 %", "cifar16_scope_defaults", "all 85"),
    Choice("scope `coupled`", "scope `all`", "54 %", "cifar16_scope_defaults", "all 54"),
    Choice("pruned from a dense network", "width-scaled from scratch", "95 %", "cifar16_scopes", "thin 95"),
    Choice("pruned from a dense network", "width-scaled from scratch", "85 %", "cifar16_scopes", "thin 85"),
    Choice("pruned from a dense network", "width-scaled from scratch", "54 %", "cifar16_scopes", "thin 54"),
    Choice("protection", "none", "85 %", "cifar16_scopes", "coupled without protection 85"),
    Choice("protection", "none", "54 %", "cifar16_scopes", "coupled without protection 54"),
    Choice("adaptive layer ratios", "one ratio", "85 %", "cifar16_scopes", "coupled one ratio 85"),
    Choice("adaptive layer ratios", "one ratio", "54 %", "cifar16_scopes", "coupled one ratio 54"),
    Choice("small after the freeze", "masked to the end", "54 %", "cifar16_scopes", "coupled masked to the end 54"),
    Choice("protection, `all`", "none", "85 %", "cifar16_defaults", "without protection"),
    Choice("adaptive layer ratios, `all`", "one ratio", "85 %", "cifar16_defaults", "one ratio for all layers"),
    Choice("ramp to 40 %, `all`", "ramp to 20 %", "85 %", "cifar16_study", "ramp to 20 %"),
    Choice("margin 0.3, `all`", "margin 0.1", "85 %", "cifar16_defaults", "margin 0.1"),
    Choice("earlier filters stay out, `all`", "they return exactly", "85 %", "cifar16_study", "later exact return"),
)  # fmt: skip


def choices_table(sources: Sources) -> str:
    """What PSAP's choices bring: PSAP less the other way, in points on validation images."""
    studies = {name: sources.study(name) for name in {choice.suite for choice in CHOICES}}
    rows = []
    for choice in CHOICES:
        other_less_ours = studies[choice.suite].differences[choice.cell]
        row = {
            "PSAP": choice.ours,
            "instead of": choice.other,
            "cut": choice.cut,
            "n": "0",
            "points [95 %]": "not run",
            "verdict": "",
        }
        if other_less_ours is not None:
            row["n"] = str(len(other_less_ours.by_seed))
            points = -other_less_ours.mean
            row["points [95 %]"] = f"{points:+.2f}"
            if other_less_ours.half is not None:
                low = points - other_less_ours.half
                high = points + other_less_ours.half
                row["points [95 %]"] += f" [{low:+.2f}, {high:+.2f}]"
            row["verdict"] = verdict(points, other_less_ours.together)
        rows.append(row)
    return _markdown(rows)


def aims_table(sources: Sources) -> str:
    """Cells that have a goal, and how far off they are."""
    frames = [goals(suite, sources.tables[name]) for name, suite in sources.suites.items()]
    rows = pd.concat(frames)[["suite", "cell", "goal", "published", "ours", "n"]]
    table: str = rows.to_markdown(index=False, disable_numparse=True)
    return table


def suites_run_table(sources: Sources) -> str:
    """Which suites have run, how long, on what."""
    rows = []
    for name, suite in sources.suites.items():
        claimed = [run for run in sources.runs if run.suite == name]
        runs, _ = runs_of_suite(name, claimed)
        every = len(suite.cells) * len(suite.seeds)
        rows.append(
            {
                "suite": f"`{name}`",
                "runs": f"{len(runs)} of {every}" if runs else "not run",
                "training": training_hours(runs) if runs else "",
                "hardware": "; ".join(sorted({run.provenance.device for run in runs})),
                "commits": named(run.provenance.commit for run in runs),
            }
        )
    return _markdown(rows)


# ---------------------------------------------------------------------------- cost


def _spread(figure: Mapping[str, Any], form: str = ".2f", unit: str = "") -> str:
    low, high = figure["spread"]
    return f"{figure['median']:{form}}{unit} [{low:{form}}, {high:{form}}]"


def scopes_table(sources: Sources) -> str:
    """ResNet-50's speed-up by scope, beside the evenly thinner network."""
    figures = sources.report("cpu_2_cores_scopes")["figures"]
    whats = {"training step, batch 16, 128 px": ("train_step_ms_{}", "train_step_speedup_{}")}
    for batch in (1, 16):
        for backend in ("eager", "onnx"):
            name = f"inference_b{batch}_{backend}"
            whats[f"inference, batch {batch}, {backend}"] = (
                f"{name}_ms_{{}}",
                f"{name}_speedup_{{}}",
            )
    rows = []
    for what, (ms, speedup) in whats.items():
        row = {"what": what, "dense, ms": f"{figures[ms.format('dense')]['median']:.0f}"}
        for scope, title in SCOPES.items():
            row[title] = _spread(figures[speedup.format(scope)], unit="x")
        row["n"] = str(figures[ms.format("dense")]["n"])
        rows.append(row)
    return _markdown(rows)


def compaction_table(sources: Sources) -> str:
    """Whole trainings of ResNet-50 that get small at the freeze, as shares of the dense one's."""
    figures = sources.report("cpu_2_cores_compaction")["figures"]
    schedules = {"freeze_half": "half of the epochs", "freeze_third": "a third of the epochs"}
    rows = []
    for name, title in schedules.items():
        seconds = figures[f"train_seconds_ratio_{name}"]
        rows.append(
            {
                "small after": title,
                "MACs of the training": _spread(figures[f"train_macs_ratio_{name}"]),
                "time of the training": _spread(seconds),
                "n": str(seconds["n"]),
            }
        )
    return _markdown(rows)


def speed_table(sources: Sources) -> str:
    """Exported networks against dense ones, by backend."""
    reports = {
        "resnet50": "cpu_2_cores_pruning_latency",
        "resnet50_all": "cpu_2_cores_pruning_latency",
    }
    rows = []
    for network, report in reports.items():
        figures = sources.report(report)["figures"]
        for batch in (1, 16):
            for backend in ("eager", "compiled", "onnx"):
                name = f"{network}_b{batch}_{backend}"
                dense, pruned = (
                    figures[f"latency_ms_{name}_{kind}"] for kind in ("dense", "pruned")
                )
                rows.append(
                    {
                        "network": network,
                        "MACs": f"{figures[f'macs_ratio_{network}']['median']:.2f}x fewer",
                        "batch": str(batch),
                        "backend": backend,
                        "dense, ms": f"{dense['median']:.1f}",
                        "pruned, ms": f"{pruned['median']:.1f}",
                        "speed-up": _spread(figures[f"latency_speedup_{name}"], unit="x"),
                        "n": str(dense["n"]),
                    }
                )
    return _markdown(rows)


@dataclass(frozen=True)
class Cost:
    """A row of the table of costs: what, from which report, and how it is written."""

    what: str
    report: str
    name: str
    form: str = ".2f"
    factor: float = 1.0


COSTS = (
    Cost("what PSAP adds to a pruning epoch's training, ResNet-20, %", "pruning", "psap_epoch_overhead_pct", ".1f"),
    Cost("... the pulse alone, 10 batches beside 391, %", "pruning", "pulse_overhead_pct", ".1f"),
    Cost("the hook between steps, % of a training step", "pruning", "psap_between_steps_pct", ".3f"),
    Cost("... of VGG-16 without BatchNorm, %", "pruning", "psap_between_steps_vgg16_pct"),
    Cost("one pruning step of ResNet-50 without pulse and eq. 1, ms", "pruning", "prune_step_resnet50_ms", ".0f"),
    Cost("... eq. 1's count, ms", "pruning", "weight_sparsity_resnet50_ms", ".0f"),
    Cost("... SFP's and FPGM's official masks, times that step", "pruning", "prune_step_vs_loop_ratio", ".1f"),
    Cost("thousands of augmented 32x32 images a second", "bench", "augment_images_per_second_per_core", ".0f", 1e-3),
    Cost("... times torchvision's transforms of PIL images", "bench", "augment_vs_pil_ratio", ".1f"),
    Cost("photographs read a second by one worker, 500x375 JPEGs", "bench", "loader_images_per_second_per_core", ".0f"),
    Cost("... times plain torchvision's", "bench", "loader_vs_plain_ratio"),
    Cost("... Imagenette's", "bench", "loader_images_per_second_per_core_imagenette", ".0f"),
    Cost("... times plain torchvision's", "bench", "loader_vs_plain_ratio_imagenette"),
    Cost("a checkpoint of ResNet-50, s", "bench", "checkpoint_seconds_resnet50", ".1f"),
    Cost("a resume of ResNet-50, s", "bench", "resume_seconds"),
    Cost("an export of ResNet-50, s", "bench", "export_seconds_resnet50", ".1f"),
    Cost("`experiments.train --help`, s", "bench", "help_seconds", ".1f"),
    Cost("`experiments.train` of a run that is done, s", "bench", "done_seconds", ".1f"),
    Cost("importing torch, s", "bench", "import_torch_seconds", ".1f"),
    Cost("PSAP's peak memory over dense training's, ResNet-50, %", "", "psap_memory_overhead_pct", ".1f"),
)  # fmt: skip


def costs_table(sources: Sources) -> str:
    rows = []
    for cost in COSTS:
        report = sources.report("_".join(filter(None, ["cpu_2_cores", cost.report])))
        figure = report["figures"][cost.name]
        scaled = {
            "median": figure["median"] * cost.factor,
            "spread": [value * cost.factor for value in figure["spread"]],
        }
        rows.append(
            {
                "what": cost.what,
                "median [range]": _spread(scaled, cost.form),
                "n": str(figure["n"]),
                "commit": report["machine"]["commit"][:7],
            }
        )
    return _markdown(rows)


TABLES: dict[str, Callable[[Sources], str]] = {
    "headline": headline_table,
    "comparison": comparison_table,
    "short": short_table,
    "study": study_table,
    "defaults": defaults_table,
    "coupled": coupled_table,
    "scope-defaults": scope_defaults_table,
    "choices": choices_table,
    "aims": aims_table,
    "suites-run": suites_run_table,
    "scopes": scopes_table,
    "compaction": compaction_table,
    "latency": speed_table,
    "costs": costs_table,
}
