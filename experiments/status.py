"""Where a run stands: `python -m experiments.status experiment=<recipe> [key=value ...]`, as for training.

Prints one word: done, interrupted (the same command continues it), failed (it began, and is neither), or
not launched. Touches nothing.
"""

from experiments.harness.entry import entry_point
from experiments.harness.record import Record
from experiments.schema import Config


@entry_point("train")
def main(cfg: Config) -> None:
    print(Record(cfg).state.value)


if __name__ == "__main__":
    main()
