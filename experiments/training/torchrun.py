"""torchrun for the job scripts: `python -m experiments.training.torchrun`, with torchrun's own arguments.

Where training refuses, or was interrupted, it says so itself. Then this leaves with training's exit code, and without
the traceback and the exit code 1 that torchrun has for every end of a process but a good one.
"""

import logging
import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from experiments.exits import EXIT_INTERRUPTED, EXIT_REFUSED

# Tells of processes that ended; a ChildFailedError that is raised tells of them, too.
logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)


def main() -> None:
    """torchrun; of unlike ends of the processes of this machine, a refusal goes before an interruption."""
    try:
        run.main()
    except ChildFailedError as error:
        codes = {failure.exitcode for failure in error.failures.values()}
        for code in (EXIT_REFUSED, EXIT_INTERRUPTED):
            if code in codes:
                sys.exit(code)
        raise


if __name__ == "__main__":
    main()
