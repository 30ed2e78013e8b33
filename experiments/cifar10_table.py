"""The CIFAR-10 table from pretrained networks: `python -m experiments.cifar10_table plan|status|launch [...]`."""

from experiments.suite import main

if __name__ == "__main__":
    main("cifar10_table")
