"""One look for all figures: colours that the colour-blind can tell apart, line styles, sizes, legends, files."""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import AutoMinorLocator, MaxNLocator, ScalarFormatter

from fedsim.checks import ConfigError, FedsimError

# Okabe and Ito's palette without its yellow, which is too pale for a line on white; the darker colours first.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES: tuple[tuple[float, ...], ...] = (
    (),
    (5, 1.5),
    (1.2, 1.2),
    (6, 1.5, 1.2, 1.5),
    (9, 2),
    (3, 1, 1, 1, 1, 1),
    (2, 3),
)
SHADES = "Blues"
"""Colour map of counts: one hue from white to dark, so that it survives a printer without colours."""
MEGABYTE = 1e6
GREY = "#444444"
FONT = 8.5  # points; a figure is as wide as a column of text, so it is printed at this size
COLUMN = 3.3
"""Width of a figure that is not told another, in inches: one column of a paper with two."""
CHARACTERS = 17.5
"""Characters of a legend to an inch."""
KINDS = ("png", "pdf", "svg")
"""Endings of the files that a figure can be written to."""


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, sizes in inches, that belongs to no pyplot state."""
    # Room between panels, so that the last tick of one stays clear of the first of the next.
    return Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.05, h_pad=0.04, wspace=0.03))


def axes_for(ax: Axes | None, height: float = 2.3) -> Axes:
    """``ax``, or that of a new figure one column wide and ``height`` inches high."""
    return new_figure(COLUMN, height).subplots() if ax is None else ax


def figure_of(ax: Axes) -> Figure:
    """The figure that ``ax`` lies in."""
    figure = ax.get_figure(root=True)
    assert isinstance(figure, Figure)
    return figure


def style(index: int) -> tuple[str, tuple[float, ...]]:
    """Colour and dashes of the ``index``-th group: both differ between neighbours, and 49 pairs are distinct."""
    turn = index // len(COLOURS)
    return COLOURS[index % len(COLOURS)], DASHES[(index + turn) % len(DASHES)]


def key(index: int, label: str) -> Line2D:
    """A line without points in the style of the ``index``-th group, for a curve or a legend."""
    colour, dashes = style(index)
    line = Line2D([], [], color=colour, linewidth=1.4, label=plain(label), zorder=3, dash_capstyle="butt")
    if dashes:
        line.set_linestyle((0, dashes))
    return line


def plain(label: str) -> str:
    """A label as it is: a dollar sign would start a formula, an underscore in front would hide it."""
    return label.replace("$", r"\$")


def folded(label: str, inches: float) -> str:
    """A label in lines that fit into ``inches``, broken at spaces and commas where it can be."""
    width = max(8, int(inches * CHARACTERS))
    return "\n".join(textwrap.wrap(label, width, break_on_hyphens=False)) or label


def legend_below(figure: Figure, handles: Sequence[Artist]) -> None:
    """One legend below all panels; the figure grows by its height, and long labels are folded to its width."""
    if not handles:
        return
    width, height = figure.get_size_inches()
    for handle in handles:
        handle.set_label(folded(str(handle.get_label()), width - 0.5))
    lines = [str(handle.get_label()).split("\n") for handle in handles]
    longest = max(len(line) for label in lines for line in label)
    columns = max(1, min(len(handles), int(width * CHARACTERS / (longest + 9))))
    columns = math.ceil(len(handles) / math.ceil(len(handles) / columns))  # rows of about equal length
    rows = math.ceil(len(handles) / columns)
    tall = max(len(label) for label in lines)
    figure.set_size_inches(width, height + 0.05 + (0.135 * tall + 0.035) * rows)
    figure.legend(handles=list(handles), loc="outside lower center", ncols=columns, fontsize=FONT - 0.5, frameon=False,
                  handlelength=2.6, columnspacing=1.4, labelspacing=0.3, borderpad=0.1)  # fmt: skip


def tidy(ax: Axes, *, from_zero: bool = True) -> None:
    """Thin frame, few ticks, one font size; the x axis begins at 0 if ``from_zero``."""
    ax.spines[["top", "right"]].set_visible(False)
    thin(ax)
    ax.tick_params(which="minor", length=1.5, width=0.4, color=GREY)
    ax.grid(axis="y", color="#DDDDDD", linewidth=0.5, zorder=0)
    ax.set_axisbelow(True)
    if from_zero:
        ax.set_xlim(left=0)
    ax.xaxis.set_major_locator(MaxNLocator(5))
    formatter = ScalarFormatter(useMathText=True)
    formatter.set_powerlimits((-3, 5))
    ax.xaxis.set_major_formatter(formatter)
    ax.xaxis.get_offset_text().set_fontsize(FONT - 1)
    if ax.get_yscale() == "linear":
        ax.yaxis.set_major_locator(MaxNLocator(5))
        ax.yaxis.set_minor_locator(AutoMinorLocator(2))


def thin(ax: Axes) -> None:
    """Frame and ticks of every figure."""
    for spine in ax.spines.values():
        spine.set_linewidth(0.6)
        spine.set_color(GREY)
    ax.tick_params(labelsize=FONT - 1, width=0.6, length=2.5, color=GREY)


def save(figure: Figure, path: Path) -> None:
    """Write a figure in the format of the file's ending, whole or not at all.

    No dates are written: the same figure gives the same file.

    Raises:
        ConfigError: for another ending than ``png``, ``pdf`` or ``svg``.
        OSError: if it cannot be written.
    """
    kind = path.suffix.lstrip(".").lower()
    if kind not in KINDS:
        raise ConfigError(f"out={path}: must end with .png, .pdf or .svg")
    metadata = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}.get(kind, {})
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        # Type 42 keeps text in the PDF searchable and editable, which journals ask for.
        with matplotlib.rc_context({"pdf.fonttype": 42, "svg.hashsalt": "fedsim"}):
            figure.savefig(temporary, format=kind, dpi=300, metadata=metadata)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def save_all(figure: Figure, folder: Path, name: str, kinds: Sequence[str] = ("png", "pdf")) -> list[Path]:
    """Write ``folder/name.KIND`` for every kind.

    Raises:
        FedsimError: if they cannot be written.
    """
    paths = [folder / f"{name}.{kind}" for kind in kinds]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in paths:
            save(figure, path)
    except OSError as error:
        raise FedsimError(f"out={folder}: cannot be written ({error.strerror or error})") from error
    return paths
