"""Everything that trains, logs, or knows a data set."""

import signal
import sys

# While `python -m experiments.<command>` imports, Ctrl-C ends it without a traceback. Then the command answers it.
if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
