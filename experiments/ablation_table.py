"""The table of PSAP's switches, one at a time: `python -m experiments.ablation_table plan|status|launch [...]`."""

from experiments.suite import main

if __name__ == "__main__":
    main("ablation_table")
