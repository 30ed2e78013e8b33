"""Everything that trains, logs, or knows a data set."""

import importlib.util
import signal
import sys

# While `python -m experiments.<command>` imports, its name is all that there is of the command line.
_IS_COMMAND = sys.argv[:1] == ["-m"]

# Ctrl-C ends it without a traceback meanwhile. Then the command answers it.
if _IS_COMMAND and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

if _IS_COMMAND and importlib.util.find_spec("hydra") is None:
    print(
        f"error: {sys.executable} has psap_core's packages only: the suite runs after `make setup`, with "
        "`source .venv/bin/activate`",
        file=sys.stderr,
    )
    sys.exit(2)
