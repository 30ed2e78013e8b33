"""Where a run stands: `python -m experiments.status experiment=<recipe> [key=value ...]`, as for training.

    python -m experiments.status experiment=digits_resnet20 method=l1
    python -m experiments.status experiment=cifar10_resnet20 seed=1
    python -m experiments.status experiment=imagenet_resnet50 runs_dir=<folder of runs>

A run is named by the words that it is trained with; there is no run=<folder> here. Many runs at once:
`python -m experiments.suite status <suite>`.

Prints its state: done, running, interrupted and when (UTC), failed, rejected, incomplete (killed, or running on another
machine) or not launched. Whatever is not done or running, training's same command begins or continues. Touches nothing.
"""

from experiments.entry import entry_point
from experiments.runs.folder import Record, State
from experiments.schema import Config


@entry_point("train")
def main(cfg: Config) -> None:
    record = Record(cfg)
    state = record.state
    if state is State.interrupted:
        print(state.value, record.interrupted_at)
    else:
        print(state.value)


if __name__ == "__main__":
    main()
