"""The ImageNet table: `python -m experiments.imagenet_table plan|status|launch [...]`."""

from experiments.suite import main

if __name__ == "__main__":
    main("imagenet_table")
