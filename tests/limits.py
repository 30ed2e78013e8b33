"""How long a process of a test may take: far longer than it does on a busy machine, so only a hang fails."""

HANG_SECONDS = 900
