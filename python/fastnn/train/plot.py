"""The main job's picture: both loss curves, and the time of every step."""

import statistics

from fastnn._cli import Problem, reason

COLOURS = {"torch.nn": "#e07b39", "fastnn": "#2a6fbb"}


def check_matplotlib():
    """Raises Problem when the picture cannot be drawn."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise Problem(
            f"--png needs matplotlib ({reason(error)}): type `pip install matplotlib`, or pass --png none"
        ) from None


def save(path, result, title):
    """Draws a Result of job.train into the PNG file `path`."""
    from matplotlib.figure import Figure  # no pyplot: no display, no global state; a bare Figure draws with Agg

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    figure.suptitle(title)
    loss_axes, time_axes = figure.subplots(1, 2)
    for side, width, style in zip(result.sides(), (3.5, 1.2), ("-", "--"), strict=True):
        name = side.library.name
        steps = range(1, len(side.losses) + 1)
        label = f"{name}, test accuracy {100 * side.accuracy:.2f} %"
        loss_axes.plot(steps, side.losses, style, color=COLOURS[name], linewidth=width, label=label)
        ms = [1e3 * s for s in side.seconds]
        time_axes.plot(steps, ms, ".", color=COLOURS[name], markersize=3, alpha=0.6)
        median = 1e3 * statistics.median(side.seconds)
        time_axes.axhline(median, color=COLOURS[name], linewidth=1.2, label=f"{name}, median {median:.2f} ms")
    if all(0 < loss for side in result.sides() for loss in side.losses):
        loss_axes.set_yscale("log")
    loss_axes.set(xlabel="step", ylabel="training loss", title="loss")
    times = sorted(1e3 * s for side in result.sides() for s in side.seconds)
    time_axes.set_ylim(0, 1.5 * times[int(0.98 * (len(times) - 1))])  # a few stalls would flatten the rest
    time_axes.set(
        xlabel="step", ylabel="ms", title=f"time per step: x{result.ratio:.2f} ({result.p20:.2f} to {result.p80:.2f})"
    )
    for axes in (loss_axes, time_axes):
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
    try:
        figure.savefig(path, format="png", dpi=130)
    except OSError as error:
        raise Problem(f"--png: cannot write {path!r}: {reason(error)}") from None
