"""The CIFAR-10 table from scratch: `python -m experiments.from_scratch_table plan|status|launch [...]`."""

from experiments.suite import main

if __name__ == "__main__":
    main("from_scratch_table")
