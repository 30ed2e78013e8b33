"""What becomes of finished runs: reads files only, never torch, the network or W&B."""
