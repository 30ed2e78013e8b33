"""Suites: cells times seeds, and launching them. Imports no torch, but for `latency`."""
