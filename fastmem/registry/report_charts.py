"""Bar charts of the report: bars in SVG that stretch with the page, their labels in HTML so that they stay readable."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

_MOST_BARS = 40


def bars(name: str, counts: Sequence[int], names: Sequence[str], ticks: Sequence[tuple[float, str]]) -> str:
    """A chart of counts.

    Args:
        name: its class, which gives the colour.
        counts, names: of each bar; a name is shown on pointing at it.
        ticks: (place, label) along the bars; 0 is the left end, 1 the right one.
    """
    step = _round_up(max(max(counts), 1) / 4)
    top = step * -(-max(max(counts), 1) // step)
    lines = range(0, top + 1, step)
    grid = "".join(f'<line x1="0" x2="{len(counts)}" y1="{_y(n, top)}" y2="{_y(n, top)}"/>' for n in lines)
    rects = "".join(
        f'<rect x="{i + 0.08:.2f}" width="0.84" y="{_y(count, top)}" height="{100 * count / top:.3f}">'
        f"<title>{label}: {count:,}</title></rect>"
        for i, (count, label) in enumerate(zip(counts, names, strict=True))
        if count
    )
    return (
        f'<div class="chart {name}" role="img" aria-label="{name}: {sum(counts):,} in {len(counts)} bars">'
        f'<div class="y">{"".join(_label("bottom", n / top, f"{n:,}") for n in lines)}</div>'
        f'<svg viewBox="0 0 {len(counts)} 100" preserveAspectRatio="none"><g class="grid">{grid}</g>{rects}</svg>'
        f'<div class="x">{"".join(_label("left", place, text) for place, text in ticks)}</div></div>'
    )


def by_epoch(name: str, counts: Mapping[int, int], first: int, last: int) -> str:
    """A chart of counts by epoch, from `first` to `last`; several epochs to a bar where there are many."""
    width = _round_up((last - first + 1) / _MOST_BARS)
    start = first - first % width
    number = (last - start) // width + 1
    sums = [0] * number
    for epoch, count in counts.items():
        sums[(epoch - start) // width] += count
    starts = [start + i * width for i in range(number)]
    names = [f"epoch {at}" if width == 1 else f"epochs {at} to {at + width - 1}" for at in starts]
    every = _round_up(number / 6)
    ticks = [((i + 0.5) / number, f"{starts[i]:,}") for i in range(0, number, every)]
    return bars(name, sums, names, ticks)


def _y(count: float, top: int) -> str:
    return f"{100 - 100 * count / top:.3f}"


def _label(side: str, place: float, text: str) -> str:
    return f'<span style="{side}:{100 * place:.2f}%">{text}</span>'


def _round_up(value: float) -> int:
    """The next of 1, 2, 5, 10, 20, 50 ..."""
    power = 1
    while True:
        for factor in (1, 2, 5):
            if factor * power >= value:
                return factor * power
        power *= 10
