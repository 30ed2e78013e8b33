"""What becomes of finished runs: reads files only, never torch, the network or W&B."""

import experiments as experiments  # which refuses an environment without the packages of the suite
