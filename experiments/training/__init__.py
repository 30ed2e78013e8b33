"""One training: its loop, its steps, and what carries it."""
