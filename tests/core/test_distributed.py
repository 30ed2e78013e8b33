"""Two ranks with unequal data make the same plans through reduced gradients, and are caught if they do not."""

import json
import subprocess
import sys

import pytest

from tests.limits import HANG_SECONDS


@pytest.fixture(scope="module")
def said(tmp_path_factory) -> list[dict[str, list[str]]]:
    """What every rank says in every training. Starting the two of them takes longer than all trainings."""
    store = tmp_path_factory.mktemp("ranks") / "store"
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.core.ranks", str(rank), store],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    return [json.loads(rank.communicate(timeout=HANG_SECONDS)[0]) for rank in ranks]


@pytest.mark.parametrize("scope", ["coupled", "all", "inner"])
def test_ranks_with_unequal_data_make_the_same_plans(said, scope: str) -> None:
    first, second = (rank[scope] for rank in said)
    assert len(first) == 5
    assert first == second


def test_a_difference_between_ranks_is_caught(said) -> None:
    for rank in said:
        assert rank["gradients of its own"][-1].startswith(
            "refused: the ranks made different plans"
        )
