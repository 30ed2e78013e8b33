"""Figures of recorded runs."""

from analysis.figures.draw import FIGURES, drawn, write_figures

__all__ = ["FIGURES", "drawn", "write_figures"]
