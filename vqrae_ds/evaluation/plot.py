"""The curves of one or several runs as one picture: a grid of panels, runs over each other."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from vqrae_ds.evaluation.curves import Curves

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NUM_COLUMNS = 4
PANEL_INCHES = (4.2, 3.0)
LINE_STYLES = ("-", "--", ":", "-.", (0, (1, 3)), (0, (6, 3)))
USES_SHOWN = 5  # ticks of the histogram


class Panel(NamedTuple):
    """A plot with the curves of these names; one that ends in / or _ stands for all that follow."""

    title: str
    names: tuple[str, ...]
    is_log: bool = False


PANELS = (
    Panel("loss, total", ("loss/total",), is_log=True),
    Panel(
        "reconstruction loss", ("loss/reconstruction", "loss/reconstruction_largest"), is_log=True
    ),
    Panel("LPIPS loss", ("loss/perceptual", "loss/perceptual_largest")),
    Panel("ConvNeXt loss", ("loss/convnext", "loss/convnext_largest")),
    Panel("quantizer loss", ("loss/quantizer", "loss/quantizer_largest"), is_log=True),
    Panel("distillation loss", ("loss/distillation_",), is_log=True),
    Panel("validation PSNR, dB", ("validation/psnr", "validation/baseline_psnr")),
    Panel("validation LPIPS", ("validation/lpips",)),
    Panel("validation SSIM", ("validation/ssim",)),
    Panel("codes in use, share", ("codebook/usage", "validation/usage")),
    Panel("codebook perplexity", ("codebook/perplexity", "validation/perplexity")),
    Panel("codes never used", ("codebook/dead_codes",)),
    Panel(
        "retention: cosine with the first encoder",
        ("validation/teacher_cosine", "retention/cosine"),
    ),
    Panel("retention: L2 from the first encoder", ("validation/teacher_l2", "retention/l2")),
    Panel("GAN losses", ("gan/discriminator", "loss/adversarial")),
    Panel("GAN losses, largest", ("gan/discriminator_largest", "loss/adversarial_largest")),
    Panel("GAN logits", ("gan/logits_",)),
    Panel("GAN: patches judged right, share", ("gan/accuracy",)),
    Panel("adaptive weight of the GAN", ("gan/adaptive_weight",), is_log=True),
    Panel("learning rate", ("optim/learning_rate_",)),
    Panel("gradient norm", ("optim/gradient_norm_",), is_log=True),
    Panel("images a second", ("perf/images_per_second", "perf/images_per_second_per_gpu")),
    Panel("TFLOP/s a GPU", ("perf/tflops_per_gpu",)),
    Panel("MFU", ("perf/mfu",)),
    Panel("seconds a step", ("perf/seconds_per_step", "perf/data_seconds")),
    Panel("peak memory, GB", ("perf/peak_memory_gb",)),
    Panel("steps skipped, saves failed", ("optim/skipped_steps", "checkpoint/failed_saves")),
)
NOT_SHOWN = ("samples",)


def plot_runs(runs: Mapping[str, Curves], path: Path) -> None:
    """Draw the curves of all runs, by label, into an image file; the name's ending says which kind.

    One run has a colour a curve; of several each has a colour, and the curves of a panel differ in
    their lines. A curve that no panel names has a panel of its own. Needs no display.
    Raises `ValueError` for an ending that matplotlib does not write.
    """
    from matplotlib.figure import Figure  # without pyplot, which would look for a display
    from matplotlib.lines import Line2D

    panels = list(panels_of(runs))
    histograms = sorted({name for run in runs.values() for name in run.histograms})
    num_rows = math.ceil((len(panels) + len(histograms)) / NUM_COLUMNS)
    size = (NUM_COLUMNS * PANEL_INCHES[0], num_rows * PANEL_INCHES[1] + 0.4)
    figure = Figure(size, layout="constrained")
    grid = figure.subplots(num_rows, NUM_COLUMNS, squeeze=False).flatten()
    for axes, panel in zip(grid, panels, strict=False):
        _draw_panel(axes, panel, runs)
    for axes, name in zip(grid[len(panels) :], histograms, strict=False):
        _draw_histogram(axes, name, runs)
    for axes in grid[len(panels) + len(histograms) :]:
        axes.set_axis_off()
    if len(runs) == 1:
        figure.suptitle(next(iter(runs)))
    else:
        handles = [Line2D([], [], color=f"C{i}", label=label) for i, label in enumerate(runs)]
        figure.legend(handles=handles, loc="outside upper center", ncols=NUM_COLUMNS)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def panels_of(runs: Mapping[str, Curves]) -> Iterator[Panel]:
    """The panels that there is something for, each with the full names of its curves."""
    names = sorted({name for run in runs.values() for name in run.curves} - set(NOT_SHOWN))
    placed: set[str] = set()
    for panel in PANELS:
        own = tuple(name for start in panel.names for name in names if _matches(name, start))
        placed |= set(own)
        if own:
            yield panel._replace(names=own)
    for name in names:
        if name not in placed:
            yield Panel(name, (name,))


def labels_of(names: Sequence[str]) -> list[str]:
    """What tells the curves of a panel apart: their names without the words that all begin with."""
    shared = os.path.commonprefix(list(names))
    cut = shared.rfind("/") + 1
    if shared not in names:  # else the shortest name would lose all its words
        cut = max(cut, shared.rfind("_") + 1)
    return [name[cut:] for name in names]


def _matches(name: str, start: str) -> bool:
    return name.startswith(start) if start.endswith(("/", "_")) else name == start


def _draw_panel(axes: Axes, panel: Panel, runs: Mapping[str, Curves]) -> None:
    smallest, is_alone = math.inf, len(runs) == 1
    for i, run in enumerate(runs.values()):
        for j, name in enumerate(panel.names):
            if name not in run.curves:
                continue
            steps, values = run.curves[name]
            color, style = (f"C{j}", "-") if is_alone else (f"C{i}", _style(j))
            marker = "." if len(steps) == 1 else ""  # a single point has no line to be seen
            axes.plot(steps, values, color=color, linestyle=style, linewidth=1.2, marker=marker)
            smallest = min(smallest, *values)
    axes.ticklabel_format(useOffset=False)
    if panel.is_log and smallest > 0:
        axes.set_yscale("log")
    if len(panel.names) > 1:
        for j, label in enumerate(labels_of(panel.names)):
            color, style = (f"C{j}", "-") if is_alone else ("grey", _style(j))
            axes.plot([], [], color=color, linestyle=style, label=label)
        axes.legend(fontsize=7)
    _finish(axes, panel.title, "step")


def _draw_histogram(axes: Axes, name: str, runs: Mapping[str, Curves]) -> None:
    """How many codes were used how often, buckets of powers of two, at the last logged step."""
    num_buckets = 0
    for i, run in enumerate(runs.values()):
        if name in run.histograms:
            counts = run.histograms[name].counts
            edges = [bucket - 0.5 for bucket in range(len(counts) + 1)]
            axes.stairs(counts, edges, color=f"C{i}")
            num_buckets = max(num_buckets, len(counts))
    ticks = range(0, num_buckets, max(1, math.ceil(num_buckets / USES_SHOWN)))
    axes.set_xticks(ticks, [_uses(bucket) for bucket in ticks])
    _finish(axes, f"{name}, last step: number of codes", "uses of a code in the window")


def _finish(axes: Axes, title: str, x_label: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x_label, fontsize=8)
    axes.tick_params(which="both", labelsize=8)
    axes.grid(alpha=0.3)


def _uses(bucket: int) -> str:
    """The numbers of uses that a bucket of `codebook/histogram` holds."""
    if bucket < 2:
        return str(bucket)
    return f"{2 ** (bucket - 1)}-{2**bucket - 1}"


def _style(number: int) -> str | tuple[int, tuple[int, int]]:
    return LINE_STYLES[number % len(LINE_STYLES)]
