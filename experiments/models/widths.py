"""Widths of thinner networks."""


def scaled(channels: int, factor: float) -> int:
    return max(1, int(channels * factor + 0.5))
