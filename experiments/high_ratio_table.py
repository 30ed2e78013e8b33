"""The CIFAR-10 table at high ratios: `python -m experiments.high_ratio_table plan|status|launch [...]`."""

from experiments.suite import main

if __name__ == "__main__":
    main("high_ratio_table")
