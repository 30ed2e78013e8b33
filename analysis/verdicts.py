"""How far every cell is from the best comparable published figure, and from its own goal."""

from collections.abc import Sequence
from typing import Any

import pandas as pd

from analysis.published import PEERS
from analysis.suites import PlannedSuite
from analysis.tables import Table
from analysis.terminal import make_console, text_grid

NONE_COMPARABLE = "none comparable"
REACHED, MISSED, IN_PART, NOT_RUN = "reached", "missed", "in part", "not run"
ABOVE, WITHIN, BELOW, ONE_RUN = "above", "within the interval", "below", "one run only"
COMPARED_WITH_ALL = ("psap", "dense")  # not only with published figures of their own method
RULE = (
    "Published: the best figure of the same method (of any for PSAP, the best base for dense) at a comparable cut, "
    "whose start is stated. Verdict: where Student's 95 % interval of our mean over seeds lies; one run has none."
)
GOALS_RULE = (
    "Goals: mean top-1 in percent over all seeds of a cell, last epoch, exported network. In part: some seeds have not "
    "run."
)


def print_verdicts(suites: Sequence[PlannedSuite], tables: Sequence[Table]) -> None:
    """The answers, then the goals, then the cells beside published figures."""
    aims = pd.concat(map(goals, suites, tables))
    found = pd.concat(map(verdicts, tables))
    comparable = found[found["published"] != NONE_COMPARABLE]
    ran = comparable[comparable["verdict"] != NOT_RUN]
    console = make_console()
    console.print(f"{goals_answer(aims)}\n{published_answer(comparable)}", style="bold")
    for rows, columns in (
        (aims, ["suite", "cell", "goal", "published", "ours", "difference", "n", "result"]),
        (ran, ["suite", "cell", "published", "ours", "difference", "n", "verdict"]),
    ):
        if not rows.empty:
            texts = rows[columns].to_dict("records")
            console.print()
            console.print(text_grid(texts, wrapped=["cell", "published"]))
    console.print(f"\n{GOALS_RULE} {RULE}", style="dim")


def goals_answer(aims: pd.DataFrame) -> str:
    """How many goals are reached, in one sentence; rows of `goals`."""
    if aims.empty:
        return "Goals: none is set."
    counts = aims["result"].value_counts()
    parts = [f"{counts.get(name, 0)} {name}" for name in (MISSED, NOT_RUN)]
    if IN_PART in counts:
        parts.append(f"{counts[IN_PART]} run in part")
    return f"Goals: {counts.get(REACHED, 0)} of {len(aims)} reached, {', '.join(parts)}."


def published_answer(comparable: pd.DataFrame) -> str:
    """Where the cells lie that a published figure is comparable with, in one sentence; rows of `verdicts`."""
    if comparable.empty:
        return "Published figures: none is comparable."
    counts = comparable["verdict"].value_counts()
    parts = [f"{counts.get(name, 0)} {name}" for name in (ABOVE, WITHIN, BELOW, ONE_RUN, NOT_RUN)]
    return f"Published figures: of {len(comparable)} comparable cells {', '.join(parts)}."


def verdicts(table: Table) -> pd.DataFrame:
    """One row per cell: suite, cell, published, ours, difference, verdict, n, commit, all as text.

    The published figure is the best one of the same method (of any for PSAP, the best base for dense) at a
    comparable cut, whose start is stated. The verdict says where Student's 95 % interval of our mean lies.
    """
    ours = table.rows[table.rows["kind"] == "ours"].drop_duplicates("cell").to_dict("records")
    compared = [
        {"suite": table.name, "cell": row["cell"], **_beside_published(row, table.rows)}
        for row in ours
    ]
    return pd.DataFrame(compared)


def goals(suite: PlannedSuite, table: Table) -> pd.DataFrame:
    """One row per cell that has a goal: suite, cell, goal, published, ours, difference, n, result, as text."""
    ours = table.rows[table.rows["kind"] == "ours"].drop_duplicates("cell").set_index("cell")
    rows = []
    for cell in suite.cells:
        if cell.goal is not None:
            row = ours.loc[cell.name]
            ran = not pd.isna(row["top1"])
            result = NOT_RUN
            if ran:
                result = REACHED if row["top1"] >= cell.goal else MISSED
                if row["top1_n"] < row["seeds"]:
                    result = IN_PART
            rows.append(
                {
                    "suite": suite.name,
                    "cell": cell.name,
                    "goal": f"{cell.goal:.2f}",
                    "published": _beside_published(row.to_dict(), table.rows)["published"],
                    "ours": f"{row['top1']:.2f}" if ran else NOT_RUN,
                    "difference": f"{row['top1'] - cell.goal:+.2f}" if ran else "",
                    "n": f"{row['top1_n']:.0f} of {row['seeds']:.0f}",
                    "result": result,
                }
            )
    return pd.DataFrame(rows)


def _beside_published(row: dict[str, Any], rows: pd.DataFrame) -> dict[str, str]:
    best = _best(row, rows[(rows["section"] == row["section"]) & rows["start_stated"].eq(True)])
    ran = not pd.isna(row["top1"])
    difference = None if best is None or not ran else row["top1"] - best[0]
    return {
        "published": NONE_COMPARABLE if best is None else f"{best[0]:.2f} {best[1]}",
        "ours": f"{row['top1']:.2f}" if ran else "",
        "difference": "" if difference is None else f"{difference:+.2f}",
        "verdict": _verdict(row, None if best is None else best[0]),
        "n": f"{row['top1_n']:.0f} of {row['seeds']:.0f}",
        "commit": row["commits"] if ran else "",
    }


def _best(row: dict[str, Any], published: pd.DataFrame) -> tuple[float, str] | None:
    """The accuracy to compare with, and whose it is."""
    column = "base_top1" if row["method_name"] == "dense" else "top1"
    if column == "base_top1" and row["start"] == "pretrained":  # ours trained on from there
        return None
    if row["method_name"] not in COMPARED_WITH_ALL:
        ours = row["method"] if row["method"] in PEERS else row["method_name"]
        published = published[published["peer"] == ours]
    usable = published.dropna(subset=[column])
    if usable.empty:
        return None
    best = usable.loc[usable[column].idxmax()]
    return float(best[column]), f"{best['method']} ({best['year']:.0f})" + (
        " base" if column == "base_top1" else ""
    )


def _verdict(row: dict[str, Any], published: float | None) -> str:
    if pd.isna(row["top1"]):
        return NOT_RUN
    if published is None:
        return "nothing to compare with"
    if row["top1_n"] == 1:
        return ONE_RUN
    if row["top1_low"] <= published <= row["top1_high"]:
        return WITHIN
    return ABOVE if row["top1_low"] > published else BELOW
