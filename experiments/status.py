"""Where a run stands: `python -m experiments.status experiment=<recipe> [key=value ...]`, as for training.

Prints done, interrupted and when (the same command continues it), failed (it began, and is neither: it broke, or it is
training now), or not launched. Touches nothing.
"""

from experiments.harness.entry import entry_point
from experiments.harness.record import Record, State
from experiments.schema import Config


@entry_point("train")
def main(cfg: Config) -> None:
    record = Record(cfg)
    print(record.state.value, *([record.interrupted_at] if record.state is State.interrupted else []))


if __name__ == "__main__":
    main()
