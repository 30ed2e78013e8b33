"""How far every cell is from the best comparable published figure, and from its own goal."""

from typing import Any

import pandas as pd

from analysis.published import PEERS
from analysis.suites import PlannedSuite
from analysis.tables import Table

COMPARED_WITH_ALL = ("psap", "dense")  # not only with published figures of their own method
RULE = (
    "Verdicts: where Student's 95 % interval of the mean over seeds lies (n = 1 has none). Published: the best figure "
    "of the same method (of any for PSAP, the best base for dense) at a comparable cut, whose start is stated."
)
GOALS_RULE = (
    "Goals: mean top-1 in percent over a cell's seeds, last epoch, exported network; n says how many have run. "
    "Published: as above."
)


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
    """One row per cell that has a goal: suite, cell, goal, published, ours, difference, n, all as text."""
    ours = table.rows[table.rows["kind"] == "ours"].drop_duplicates("cell").set_index("cell")
    rows = []
    for cell in suite.cells:
        if cell.goal is not None:
            row = ours.loc[cell.name]
            ran = not pd.isna(row["top1"])
            rows.append(
                {
                    "suite": suite.name,
                    "cell": cell.name,
                    "goal": f"{cell.goal:.2f}",
                    "published": _beside_published(row.to_dict(), table.rows)["published"],
                    "ours": f"{row['top1']:.2f}" if ran else "not run",
                    "difference": f"{row['top1'] - cell.goal:+.2f}" if ran else "",
                    "n": f"{row['top1_n']:.0f} of {row['seeds']:.0f}",
                }
            )
    return pd.DataFrame(rows)


def _beside_published(row: dict[str, Any], rows: pd.DataFrame) -> dict[str, str]:
    best = _best(row, rows[(rows["section"] == row["section"]) & rows["start_stated"].eq(True)])
    ran = not pd.isna(row["top1"])
    difference = None if best is None or not ran else row["top1"] - best[0]
    return {
        "published": "none comparable" if best is None else f"{best[0]:.2f} {best[1]}",
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
        return "not run"
    if published is None:
        return "nothing to compare with"
    if row["top1_n"] == 1:
        return "one run, no interval"
    if row["top1_low"] <= published <= row["top1_high"]:
        return "within the interval"
    return "above" if row["top1_low"] > published else "below"
