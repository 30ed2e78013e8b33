"""Tables of suites: our runs beside what others published at comparable cuts.

python -m analysis.tables [FOLDER] [SUITE ...]
    prints what stands in the tables' first place: our rows, beside the suite's reference. FOLDER holds runs, or
    recorded results; analysis/recorded if absent. SUITE is a name, or the path of a suite's file; without one, all that
    FOLDER has runs of, and runs of no suite by recipe
python -m analysis.tables [FOLDER] [SUITE ...] --out OUT
    writes OUT/<suite>.md, .tex and .csv instead: all columns, and what others published
"""

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pandas as pd

from analysis.collect import read_runs
from analysis.findings import Study, compare
from analysis.published import read_published, usable
from analysis.recorded import read_latencies
from analysis.results import RESULTS, Run, named, training_hours
from analysis.stats import Estimate, estimate, paired_difference
from analysis.suites import (
    PUBLISHED_PIXELS,
    PlannedCell,
    PlannedSuite,
    Setting,
    plan_suite,
    refuse_different,
    runs_of_cells,
    suites_of,
)
from analysis.terminal import LEGEND as TERMINAL_LEGEND
from analysis.terminal import make_console, shown_rows, text_grid
from experiments.exits import plain_exits
from experiments.runs.files import DataError
from experiments.suites.spec import read_suite, suite_names

TOLERANCE = 2.0  # percentage points between our target and a published FLOPs cut
SAME_CUT = 1.0  # percentage points by which the real cuts of our rows may differ without a note
# Methods that all cells are compared with, their switches at the defaults.
BESIDE = ("psap", "thin", "dense")
# Each has columns _sd, _low, _high and _n, too.
ESTIMATES = ("top1", *(f"to_{method}" for method in BESIDE))
COLUMNS = [
    "section",
    "dataset",
    "model",
    "start",
    "epochs",
    "target",
    "kind",
    "method",
    "year",
    "peer",
    "cell",
    "method_name",
    "seeds",
    *(f"{name}{part}" for name in ESTIMATES for part in ("", "_sd", "_low", "_high", "_n")),
    "masked_top1",
    "macs_cut",
    "base_top1",
    "drop",
    "drop_n",
    "params",
    "params_cut",
    "train_macs",
    "train_macs_share",
    "train_seconds",
    "train_seconds_share",
    "train_seconds_share_low",
    "train_seconds_share_high",
    "start_stated",
    "commits",
    "devices",
    "source_url",
    "source_note",
]
LEGEND = [
    "Mean ± standard deviation over seeds and, in brackets, Student's 95 % interval of the mean.",
    "Masked: top-1 before the plan is applied for good; SFP's and FPGM's masks leave BatchNorm's beta alone. "
    "Base: the network that a pretrained run starts from, else our dense run of the same seed. "
    "Drop (base - top-1), to psap, to thin, to dense: paired over common seeds. "
    "Training MACs: forward MACs of the network in training; the batches of PSAP's pulses are not in them. "
    "Training time: of all steps, pruning too, over as many of the dense network, some of which the run timed (range).",
]
PUBLISHED_LEGEND = [
    f"Published rows: same data set, network and start, and a FLOPs cut within {TOLERANCE:g} points of our target. "
    "‡ FLOPs as the source counts them, another count than ours, the MACs of the exported network. "
    "† The source does not state the start. Parameters: of the exported network, or what was removed of them.",
    "PSAP (paper): the paper's own figures are not available to us.",
]
TOLD = ("Left out", "Not at one cut")  # the notes that a terminal shows, by their beginnings
ESCAPES = {ord(c): f"\\{c}" for c in "&%$#_{}"} | {
    ord("~"): r"\textasciitilde{}",
    ord("^"): r"\textasciicircum{}",
    ord("\\"): r"\textbackslash{}",
    ord("±"): r"$\pm$",
    ord("†"): r"$\dagger$",
    ord("‡"): r"$\ddagger$",
}


@dataclass(frozen=True)
class Table:
    """A suite's table.

    Attributes:
        rows: COLUMNS of every row; accuracies and differences in percent, cuts and shares as shares, NaN where
            nothing is known; kind is ours, published or paper.
        head: what was run, on what.
        notes: what a reader must know, the sources last.
    """

    name: str
    title: str
    head: str
    rows: pd.DataFrame
    notes: list[str]


def make_table(suite: PlannedSuite, runs: Iterable[Run], published: pd.DataFrame) -> Table:
    """The table of all cells of a suite, whether they were run or not; of other suites, only dense runs count.

    Raises DataError if two runs are of the same cell and seed, or runs to be averaged of different configurations.
    """
    runs = list(runs)
    of_cells, left_out = runs_of_cells(suite, runs)
    rows, notes = [], []
    for section, cells in _sections(suite).items():
        facts = {
            "section": _heading(section),
            "dataset": section.dataset_title,
            "model": section.model_title,
            "start": section.start,
            "epochs": section.epochs,
            "target": section.target,
        }
        beside: dict[str, Mapping[int, Run]] = {
            cell.setting.method: of_cells[cell.name]
            for cell in reversed(cells)
            if cell.setting.method in BESIDE and cell.has_default_switches
        }
        if "dense" not in beside:
            own_runs = [run for cell in cells for run in of_cells[cell.name].values()]
            beside["dense"] = _dense_elsewhere(_heading(section), own_runs, runs)
        ours = [facts | _ours(cell, of_cells[cell.name], suite, section, beside) for cell in cells]
        rows += ours
        notes += _different_cuts(section, ours)
        if why := _incomparable(section):
            notes.append(why)
        elif section.target is not None:
            rows += [facts | row for row in _published(section, published)]
            rows.append(facts | {"kind": "paper", "method": "PSAP (paper)"})
    frame = pd.DataFrame(rows, columns=COLUMNS)
    if "published" in set(frame["kind"]):
        notes += PUBLISHED_LEGEND
    notes += _excluded(suite, published)
    notes += [f"Left out: {why}." for why in left_out]
    urls = frame["source_url"].dropna().unique()
    notes += [f"[{number}] {url}" for number, url in enumerate(urls, start=1)]
    return Table(
        suite.name, suite.title, _head(suite, of_cells), frame, LEGEND + list(dict.fromkeys(notes))
    )


def _sections(suite: PlannedSuite) -> dict[Setting, list[PlannedCell]]:
    """Cells by what they train, how long and to which target; dense ones stand in all sections of their network."""

    def key(cell: PlannedCell, target: float | None) -> Setting:
        return replace(cell.setting, method="", target=target)

    keys = dict.fromkeys(key(cell, cell.target) for cell in suite.cells)
    with_target = {replace(section, target=None) for section in keys if section.target is not None}
    return {
        section: [
            cell
            for cell in suite.cells
            if section in (key(cell, cell.target), _dense_key(cell, section))
        ]
        for section in keys
        if section.target is not None or section not in with_target
    }


def _dense_elsewhere(section: str, ours: Sequence[Run], runs: Iterable[Run]) -> dict[int, Run]:
    """The dense runs of another suite that trained as all of ours did but for the method, by seed."""
    trained = _training(ours[0]) if ours else None
    if not trained or any(_training(run) != trained for run in ours):
        return {}
    dense_runs = [run for run in runs if run.method == "dense" and _training(run) == trained]
    refuse_different(f"the dense network of {section}", dense_runs)
    return {run.seed: run for run in dense_runs}


def _training(run: Run) -> dict[str, Any]:
    """What was trained on what and how, but for the method."""
    return {key: value for key, value in run.identity.items() if key != "method"}


def _dense_key(cell: PlannedCell, section: Setting) -> Setting | None:
    if cell.setting.method != "dense":
        return None
    return replace(cell.setting, method="", target=section.target)


def _heading(section: Setting) -> str:
    cut = "" if section.target is None else f", {100 * section.target:g} % of the MACs cut"
    return f"{_trained(section)}, {section.epochs} epochs{cut}"


def _trained(section: Setting) -> str:
    parts = [f"{section.dataset_title} at {section.image_size} pixels"]
    if section.train_images is not None:
        parts.append(f"{section.train_images:,} training images")
    return ", ".join([*parts, section.network_title, section.start])


def _different_cuts(section: Setting, ours: Sequence[Mapping[str, Any]]) -> list[str]:
    """A note where the rows of a section with a target are not at one cut."""
    cuts = [
        100 * row["macs_cut"] for row in ours if row["top1_n"] and row["method_name"] != "dense"
    ]
    if section.target is None or not cuts or max(cuts) - min(cuts) <= SAME_CUT:
        return []
    return [
        f"Not at one cut: our rows of {_heading(section)}, cut between {min(cuts):.1f} and {max(cuts):.1f} %; thin "
        "networks have coarse widths."
    ]


def _incomparable(section: Setting) -> str | None:
    """Why no published figure stands beside a section; None where some may."""
    if section.full_size:
        return None
    if section.dataset not in PUBLISHED_PIXELS:
        return f"No published rows: published.csv has no figures of {section.dataset_title}."
    return (
        f"No published rows: published figures of {section.dataset_title} are of {PUBLISHED_PIXELS[section.dataset]} "
        f"pixels, all training images and the whole {section.model_title}, "
        f"and this is {_trained(section)}."
    )


def _ours(
    cell: PlannedCell,
    runs: Mapping[int, Run],
    suite: PlannedSuite,
    section: Setting,
    beside: Mapping[str, Mapping[int, Run]],
) -> dict[str, Any]:
    """The row of one cell; `beside` has the runs that it is compared with, by their method."""
    words = {section.model, "" if section.target is None else f"{100 * section.target:g}"}
    label = " ".join(word for word in cell.name.split() if word not in words)
    row: dict[str, Any] = {
        "kind": "ours",
        "method": label or cell.name,
        "cell": cell.name,
        "method_name": cell.setting.method,
        "seeds": len(suite.seeds),
        "top1_n": 0,
    }
    if not runs:
        return row
    dense = beside["dense"]
    top1, dense_top1 = _values(runs, "top1"), _values(dense, "top1")
    starts = {
        seed: start for seed, start in _values(runs, "start_top1").items() if start is not None
    }
    base = starts if cell.setting.pretrained else {} if runs is dense else dense_top1
    drop = paired_difference(base, top1)
    train_macs = fmean(_values(runs, "train_macs").values())
    dense_train_macs = _mean(_values(dense, "train_macs").values())
    time_shares = [*_values(runs, "train_seconds_dense_ratio").values()]
    row |= _flat("top1", estimate([top1[seed] for seed in sorted(top1)]))
    for method, others in beside.items():
        if runs is not others:
            row |= _flat(f"to_{method}", paired_difference(top1, _values(others, "top1")))
    return row | {
        "masked_top1": fmean(_values(runs, "masked_top1").values()),
        "macs_cut": fmean(_values(runs, "macs_cut").values()),
        "base_top1": _mean(base[seed] for seed in base.keys() & runs.keys()),
        "drop": drop and drop.mean,
        "drop_n": drop and drop.n,
        "params": fmean(_values(runs, "params").values()),
        "train_macs": train_macs,
        "train_macs_share": None if dense_train_macs is None else train_macs / dense_train_macs,
        "train_seconds": fmean(_values(runs, "train_seconds").values()),
        **_times(time_shares),
        "commits": named(run.provenance.commit for run in runs.values()),
        "devices": named(run.provenance.device for run in runs.values()),
    }


def _times(shares: Sequence[float | None]) -> dict[str, float]:
    """Mean, lowest and highest share of the dense network's time; nothing unless all runs have one."""
    measured = [share for share in shares if share is not None]
    if len(measured) < len(shares):
        return {}
    return {
        "train_seconds_share": fmean(measured),
        "train_seconds_share_low": min(measured),
        "train_seconds_share_high": max(measured),
    }


def _values(runs: Mapping[int, Run], name: str) -> dict[int, Any]:
    return {seed: getattr(run.summary, name) for seed, run in runs.items()}


def _mean(values: Iterable[float]) -> float | None:
    numbers = list(values)
    return fmean(numbers) if numbers else None


def _flat(name: str, statistic: Estimate | None) -> dict[str, float | None]:
    if statistic is None:
        return {}
    return {
        name: statistic.mean,
        f"{name}_sd": statistic.sd,
        f"{name}_low": statistic.low,
        f"{name}_high": statistic.high,
        f"{name}_n": statistic.n,
    }


def _published(section: Setting, published: pd.DataFrame) -> list[dict[str, Any]]:
    """Usable published rows at a comparable cut, the best first, those that state no start last."""
    published, start = usable(published, section), "yes" if section.pretrained else "no"
    rows = published[
        (published["pretrained"].isna() | (published["pretrained"] == start))
        & (
            (published["flops_reduction_pct"] - 100 * (section.target or 0)).abs()
            <= TOLERANCE + 1e-9
        )
    ]
    difference = rows["base_top1"] - rows["pruned_top1"]
    rows = rows.assign(
        kind="published",
        start_stated=rows["pretrained"].notna(),
        top1=rows["pruned_top1"],
        macs_cut=rows["flops_reduction_pct"] / 100,
        params_cut=rows["params_reduction_pct"] / 100,
        drop=difference.fillna(rows["top1_drop"]),
    ).sort_values(["start_stated", "top1"], ascending=False, kind="stable")
    return [{k: v for k, v in row.items() if k in COLUMNS} for row in rows.to_dict("records")]


def _excluded(suite: PlannedSuite, published: pd.DataFrame) -> list[str]:
    """The published rows of the table's networks that cannot be used, and why."""
    comparable = [cell.setting for cell in suite.cells if cell.setting.full_size]
    networks = {(setting.dataset_title, setting.model_title) for setting in comparable}
    return [
        f"Excluded: {row['method']} ({row['year']}), {row['dataset']}, {row['model']}, "
        f"{row['flops_reduction_pct']:g} % of the FLOPs: {row['excluded']}."
        for row in published[published["excluded"].notna()].to_dict("records")
        if (row["dataset"], row["model"]) in networks
    ]


def _head(suite: PlannedSuite, of_cells: Mapping[str, Mapping[int, Run]]) -> str:
    runs = [run for by_seed in of_cells.values() for run in by_seed.values()]
    every = len(suite.cells) * len(suite.seeds)
    epochs = ", ".join(map(str, sorted({cell.setting.epochs for cell in suite.cells})))
    devices = named(run.provenance.device for run in runs) or "none"
    commits = named(run.provenance.commit for run in runs) or "none"
    return (
        f"{len(suite.seeds)} seed{'s' * (len(suite.seeds) > 1)} per cell; epochs: {epochs}; "
        f"runs: {len(runs)} of {every}, {every - len(runs)} not run; training: {training_hours(runs)} in all; "
        f"hardware: {devices}; commits: {commits}."
    )


def display(table: Table) -> dict[str, pd.DataFrame]:
    """What a person reads: for each section its rows, all values as text; columns without any are left out."""
    numbers = {url: i for i, url in enumerate(table.rows["source_url"].dropna().unique(), start=1)}
    sections = {}
    for section, rows in table.rows.groupby("section", sort=False):
        texts = pd.DataFrame([_texts(row, numbers) for row in rows.to_dict("records")])
        sections[str(section)] = texts.loc[:, (texts != "").any()]
    return sections


def _texts(row: Mapping[str, Any], numbers: Mapping[str, int]) -> dict[str, str]:
    ours, others = row["kind"] == "ours", row["kind"] == "published"
    known = {key for key, value in row.items() if not pd.isna(value)}
    if ours:
        source = f"ours: {row['commits']}; {row['devices']}" if "commits" in known else "ours"
    else:
        source = (
            f"[{numbers[row['source_url']]}]" + ("" if row["start_stated"] else " †")
            if others
            else ""
        )
    missing = {"ours": "not run", "published": "not printed", "paper": "not available to us"}[
        row["kind"]
    ]
    params = f"{row['params'] / 1e6:.3f} M" if "params" in known else ""
    return {
        "method": row["method"] + (f" ({row['year']:.0f})" if others else ""),
        "source": source,
        "n": f"{row['top1_n']:.0f} of {row['seeds']:.0f}" if ours else "",
        "top-1 [%]": _spread(row, "top1", ".2f") if "top1" in known else missing,
        "masked [%]": f"{row['masked_top1']:.2f}" if "masked_top1" in known else "",
        "MACs cut [%]": f"{100 * row['macs_cut']:.1f}" + (" ‡" if others else "")
        if "macs_cut" in known
        else "",
        "base [%]": f"{row['base_top1']:.2f}" if "base_top1" in known else "",
        "drop": f"{row['drop']:.2f}{_other_n(row, 'drop')}" if "drop" in known else "",
        "parameters": params
        or (f"-{100 * row['params_cut']:.1f} %" if "params_cut" in known else ""),
        "training MACs [% of dense]": f"{100 * row['train_macs_share']:.1f}"
        if "train_macs_share" in known
        else "",
        "training time [% of dense]": _time_text(row) if "train_seconds_share" in known else "",
    } | {
        f"to {name}": _spread(row, f"to_{name}", "+.2f") if f"to_{name}" in known else ""
        for name in BESIDE
    }


def _time_text(row: Mapping[str, Any]) -> str:
    """Mean and range, in percent."""
    mean, low, high = (100 * row[f"train_seconds_share{part}"] for part in ("", "_low", "_high"))
    return f"{mean:.0f}" if low == high else f"{mean:.0f} ({low:.0f} to {high:.0f})"


def _spread(row: Mapping[str, Any], name: str, form: str) -> str:
    """Mean ± sd [interval], and n where it is not the row's."""
    mean, sd, low, high = (row[f"{name}{part}"] for part in ("", "_sd", "_low", "_high"))
    spread = "" if pd.isna(sd) else f" ± {sd:.2f} [{low:{form}}, {high:{form}}]"
    return f"{mean:{form}}{spread}{_other_n(row, name)}"


def _other_n(row: Mapping[str, Any], name: str) -> str:
    n = row[f"{name}_n"]
    return "" if pd.isna(n) or n == row["top1_n"] else f" (n = {n:.0f})"


def table_markdown(table: Table) -> str:
    parts = [f"# {table.title}", table.head]
    for section, rows in display(table).items():
        parts += [f"## {section}", rows.to_markdown(index=False, disable_numparse=True)]
    return "\n\n".join([*parts, "\n".join(f"- {note}" for note in table.notes)]) + "\n"


def latex(table: Table) -> str:
    """Needs the package booktabs."""
    parts = [rf"\paragraph{{{_escaped(table.title)}}} {_escaped(table.head)}"]
    for section, rows in display(table).items():
        style = rows.rename(columns=_escaped).map(_escaped).style.hide(axis="index")
        form = "ll" + "r" * (rows.shape[1] - 2)
        parts.append(
            style.to_latex(
                hrules=True, position="htbp", column_format=form, caption=_escaped(section)
            )
        )
    notes = "\n\n".join(_escaped(note) for note in table.notes)
    return "\n".join([*parts, rf"{{\footnotesize {notes}\par}}"]) + "\n"


def _escaped(text: str) -> str:
    return text.translate(ESCAPES)


def to_csv(table: Table) -> str:
    return table.rows.to_csv(index=False, float_format="%.6g", lineterminator="\n")


def write_tables(tables: Iterable[Table], out: Path) -> list[Path]:
    """Write <suite>.md, <suite>.tex and <suite>.csv of each table."""
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for table in tables:
        for suffix, text in (
            ("md", table_markdown(table)),
            ("tex", latex(table)),
            ("csv", to_csv(table)),
        ):
            written.append(out / f"{table.name}.{suffix}")
            written[-1].write_text(text, encoding="utf-8")
    return written


def print_ours(
    table: Table, suite: PlannedSuite, runs: Iterable[Run], latencies: Mapping[str, Any] | None
) -> None:
    """Print our rows, at most as wide as terminal.WIDTH; of a suite without runs one line."""
    console = make_console()
    console.print(f"{table.name}: {table.title}", style="bold")
    ours = table.rows[table.rows["kind"] == "ours"]
    if not ours["top1_n"].any():
        console.print(f"not run: {ours['cell'].nunique()} cells\n")
        return
    study, why_not = _judged(suite, runs)
    measured = latencies["latency_ms"] if latencies else {}
    for section, rows in shown_rows(table.rows, _references(suite, ours), measured, study).items():
        console.print(f"\n{section}\n")
        console.print(text_grid(rows, wrapped=["method"]))
    notes = [note for note in table.notes if note.startswith(TOLD)]
    if study:
        notes.append(
            f"A study: on validation images, as `python -m analysis.findings {suite.name}` judges."
        )
    if why_not:
        notes.append(f"Not judged as a study: {why_not}.")
    if latencies:
        notes.append(f"Latency: one image, {latencies['device']}, threads: {latencies['threads']}.")
    console.print("".join(f"\n{note}" for note in notes) + "\n" * bool(notes))


def _references(suite: PlannedSuite, ours: pd.DataFrame) -> dict[str, str | None]:
    """By section, the first method of BESIDE that it trains with default switches, or is compared with."""
    as_it_is = {cell.name for cell in suite.cells if cell.has_default_switches}
    references: dict[str, str | None] = {}
    for section, rows in ours.groupby("section", sort=False):
        trained = set(rows[rows["cell"].isin(as_it_is)]["method_name"])
        trained |= {method for method in BESIDE if rows[f"to_{method}"].notna().any()}
        references[str(section)] = next((name for name in BESIDE if name in trained), None)
    return references


def _judged(suite: PlannedSuite, runs: Iterable[Run]) -> tuple[Study | None, str]:
    """What a suite with a reference found, or why it cannot be judged as a study; neither of other suites."""
    if suite.reference is None:
        return None, ""
    try:
        return compare(suite, runs), ""
    except DataError as error:
        return None, str(error)


def _folder_and_suites(words: Sequence[str]) -> tuple[Path, list[str]]:
    """What the command's words name."""
    suites = [word for word in words if word in suite_names() or word.endswith(".yaml")]
    folders = [Path(word) for word in words if word not in suites]
    for folder in folders:
        if not folder.is_dir():
            raise DataError(
                f"there is no folder and no suite {str(folder)!r}: a suite is one of {', '.join(suite_names())}, or "
                "the path of a file"
            )
    if len(folders) > 1:
        raise DataError(f"name one folder, not {' and '.join(map(str, folders))}")
    return (folders or [RESULTS])[0], suites


def _chosen(folder: Path, names: Sequence[str]) -> tuple[list[PlannedSuite], list[Run]]:
    """The suites to show, those of the folder's runs where none is named, and the runs."""
    wanted = [plan_suite(read_suite(name)) for name in names]
    runs = read_runs(folder)
    if not wanted:
        found = suites_of(runs)
        wanted, runs = [suite for suite, _ in found], [run for _, of in found for run in of]
    if folder != RESULTS and not {run.suite for run in runs} & {suite.name for suite in wanted}:
        raise DataError(f"{folder} holds no finished run of {', '.join(names) or 'any suite'}")
    return wanted, runs


def _latencies(folder: Path, suite: str) -> dict[str, Any] | None:
    """What was measured of a suite; None where nothing was."""
    is_suite = (folder / "runs.csv").is_file()
    path = (folder if is_suite else folder / suite) / "latency.json"
    return read_latencies(path) if path.is_file() else None


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="*", metavar="FOLDER or SUITE")
    parser.add_argument("--out", type=Path, metavar="OUT")
    options = parser.parse_args(arguments)
    with plain_exits():
        folder, names = _folder_and_suites(options.what)
        suites, runs = _chosen(folder, names)
        published = read_published()
        tables = [make_table(suite, runs, published) for suite in suites]
        if options.out is not None:
            print("\n".join(map(str, write_tables(tables, options.out))))
            return
        for suite, table in zip(suites, tables, strict=True):
            print_ours(table, suite, runs, _latencies(folder, suite.name))
        told = TERMINAL_LEGEND
        if not {run.suite for run in runs} & {suite.name for suite in suites}:
            told = "Nothing of this is recorded. Your own runs: python -m analysis.tables runs"
        make_console().print(told, style="dim")


if __name__ == "__main__":
    main(sys.argv[1:])
