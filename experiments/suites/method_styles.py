"""What figures and tables know of the methods, from conf/method/<name>.yaml: style, publishers, whether they choose."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

METHODS = Path(__file__).parents[1] / "conf" / "method"


@cache
def method_styles() -> Mapping[str, Mapping[str, Any]]:
    """Colour, line style and marker of every method that has them, in the order of legends."""
    styles = {
        name: dict(figures["style"]) for name, figures in _figures().items() if "style" in figures
    }
    ordered = sorted(styles, key=lambda name: styles[name]["place"])
    legend_styles = {}
    for name in ordered:
        style = styles[name]
        del style["place"]
        if isinstance(style["linestyle"], list):
            offset, dashes = style["linestyle"]
            style["linestyle"] = (offset, tuple(dashes))
        legend_styles[name] = style
    return legend_styles


@cache
def published_names() -> Mapping[str, str]:
    """By method a regular expression of what others call it; of several that match, the first counts."""
    figures = _figures()
    return {
        name: figures[name]["published"] for name in method_styles() if "published" in figures[name]
    }


@cache
def chooses_filters(method: str) -> bool:
    """Does the method choose filters, and so make a plan? It has a `scope` then, its own or that of its defaults."""
    content = _contents().get(method, {})
    return "scope" in content or any(map(chooses_filters, content.get("defaults", [])))


def _figures() -> dict[str, dict[str, Any]]:
    return {name: content.get("figures", {}) for name, content in _contents().items()}


@cache
def _contents() -> dict[str, dict[str, Any]]:
    """The files of all methods, by name."""
    return {path.stem: yaml.safe_load(path.read_text()) for path in sorted(METHODS.glob("*.yaml"))}
