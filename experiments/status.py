"""Where a run stands: `python -m experiments.status experiment=<recipe> [key=value ...]`, as for training.

    python -m experiments.status experiment=digits_resnet20 method=l1
    python -m experiments.status experiment=cifar10_resnet20 seed=1
    python -m experiments.status experiment=imagenet_resnet50 runs_dir=<folder of runs>

Prints its state: done, running, interrupted and when, failed, rejected, incomplete (killed, or running on another
machine) or not launched. Whatever is not done or running, training's same command begins or continues. Touches nothing.
"""

from experiments.entry import entry_point
from experiments.runs.folder import Record, State
from experiments.schema import Config


@entry_point("train")
def main(cfg: Config) -> None:
    record = Record(cfg)
    print(
        record.state.value, *([record.interrupted_at] if record.state is State.interrupted else [])
    )


if __name__ == "__main__":
    main()
