"""A picture of the experts' load: a panel a MoE layer, a bar an expert, sorted by load."""

from collections.abc import Sequence

WIDTH, PANEL, GAP, LEFT, TOP = 900, 130, 46, 64, 56
GOAL = (0.2, 5.0)
SVG = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">'
INK, FAINT, BAR, LINE = "#24292f", "#6e7781", "#4c78a8", "#d1495b"


def histogram(shares: Sequence[Sequence[float]], layers: Sequence[int], title: str) -> str:
    """An SVG picture.

    Args:
        shares: a MoE layer each, its experts' shares of the tokens over the mean share.
        layers: those layers' numbers.
    """
    top = max(2.0, *(max(layer) for layer in shares)) * 1.05
    height = TOP + len(shares) * (PANEL + GAP)
    parts = [
        SVG.format(width=WIDTH, height=height),
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        f'<text x="{LEFT}" y="26" font-size="16" fill="{INK}">{title}</text>',
    ]
    for panel, (number, layer) in enumerate(zip(layers, shares, strict=True)):
        parts += _panel(TOP + panel * (PANEL + GAP), number, sorted(layer, reverse=True), top)
    return "\n".join([*parts, "</svg>", ""])


def _panel(y: int, number: int, loads: list[float], top: float) -> list[str]:
    span = WIDTH - LEFT - 24
    step = span / len(loads)

    def height(value: float) -> float:
        return PANEL * min(value, top) / top

    words = f"layer {number}: busiest {loads[0]:.2f}, idlest {loads[-1]:.2f} times the mean"
    parts = [f'<text x="{LEFT}" y="{y + 4}" fill="{INK}">{words}</text>']
    base = y + 12 + PANEL
    for at, load in enumerate(loads):
        bar = (
            f'<rect x="{LEFT + at * step:.2f}" y="{base - height(load):.2f}" width="{max(0.5, step - 1):.2f}" '
            f'height="{height(load):.2f}" fill="{BAR}"/>'
        )
        parts.append(bar)
    for value, words in ((1.0, "mean"), *((goal, f"{goal:g}x") for goal in GOAL)):
        if value > top:
            continue
        at_y = base - height(value)
        dash = "" if value == 1.0 else ' stroke-dasharray="4 3"'
        parts.append(
            f'<line x1="{LEFT}" y1="{at_y:.2f}" x2="{LEFT + span}" y2="{at_y:.2f}" stroke="{LINE}"{dash}/>'
            f'<text x="{LEFT - 6}" y="{at_y + 4:.2f}" text-anchor="end" fill="{FAINT}">{words}</text>'
        )
    return parts
