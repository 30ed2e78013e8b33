"""What happens over the epochs: accuracy, loss, mask churn."""

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

from analysis.figures.style import (
    NothingToDrawError,
    SeedGroup,
    add_legend,
    add_to_title,
    draw_band,
    grid,
    panels_of,
    seed_groups,
    within_reach,
)
from analysis.results import Run


def training_curves(runs: Sequence[Run]) -> Figure:
    """Accuracy while training.

    A panel is fitted to the cells that end within REACH of the best, and to nine tenths of their epochs; its title
    says what lies below.
    """
    images, cells = (
        "validation" if runs[0].identity["data"]["validation_images"] > 0 else "test",
        seed_groups(runs),
    )
    figure = _over_epochs(cells, "eval/top1", f"top-1 on the {images} images [%]")
    for axes, group in zip(figure.axes, panels_of(cells).values(), strict=True):
        shown = within_reach(
            axes, group, [cell.over_epochs("eval/top1").iloc[-1].mean() for cell in group]
        )
        curves = [cell.over_epochs("eval/top1").mean(axis=1) for cell in shown]
        # The first epochs would hide the differences that matter.
        low = min(curve.quantile(0.1) for curve in curves)
        if min(map(min, curves)) < low:
            add_to_title(
                axes, f"axis from {low:.0f} %: at most a tenth of each curve shown is below"
            )
        high = max(cell.over_epochs("eval/top1").max(axis=None) for cell in shown)
        axes.set_ylim(low, high + max(0.05 * (high - low), 0.1))
    return figure


def training_loss(runs: Sequence[Run]) -> Figure:
    """The loss while training."""
    figure = _over_epochs(seed_groups(runs), "train/loss", "training loss")
    for axes in figure.axes:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
    return figure


def mask_churn(runs: Sequence[Run]) -> Figure:
    """Filters whose state each pruning step changed, for the methods that prune more than once."""
    pruned = [cell for cell in seed_groups(runs) if len(cell.over_epochs("psap/mask_churn")) > 1]
    return _over_epochs(pruned, "psap/mask_churn", "mask churn [share of all filters]")


def _over_epochs(of: Sequence[SeedGroup], key: str, label: str) -> Figure:
    if not of:
        raise NothingToDrawError(f"no run has {key} of several epochs")
    figure, panels = grid(panels_of(of))
    for axes, group in zip(panels, panels_of(of).values(), strict=True):
        for number, cell in enumerate(group):
            values = cell.over_epochs(key)
            step = max(1, len(values) // 8)  # few markers, none above another's
            axes.plot(values.mean(axis=1), markevery=(2 * number % step, step), **cell.style)
            draw_band(axes, values.index, values.T, cell)
        axes.set(xlabel="epochs completed", ylabel=label, xlim=(0, group[0].runs[0].summary.epochs))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    add_legend(figure, of)
    return figure
