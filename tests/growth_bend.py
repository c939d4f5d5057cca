"""Where a curve bends: on logarithmic axes two straight lines, joined, against one."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Two lines must leave at most this share of what one line leaves, and their slopes differ so much.
SHARE_LEFT, LEAST_CHANGE = 0.25, 0.2
FEWEST_POINTS = 4


@dataclass(frozen=True)
class Bend:
    """The joint of the two lines, at one of the measured points."""

    x: float
    y: float
    before: float
    """What y is multiplied with when x doubles, up to the joint."""
    after: float

    @property
    def sentence(self) -> str:
        return f"bends at {self.x:g}: ×{self.before:.2f} a doubling before, ×{self.after:.2f} after"


def find_bend(points: Sequence[tuple[float, float]]) -> Bend | None:
    """Of a curve's points in order; None where it is as good as straight, has too few points or not all of them.

    Powers of x have straight lines on logarithmic axes: what is proportional to it has a factor of 2, what does not
    depend on it one of 1.
    """
    if len(points) < FEWEST_POINTS or not np.all(np.isfinite(points)) or np.min(points) <= 0:
        return None
    xs, ys = np.log2(np.array(points, dtype=float)).T
    ones = np.ones_like(xs)
    straight = _residual(np.column_stack([ones, xs]), ys)
    joints = xs[1:-1]
    pieces = [np.column_stack([ones, xs, np.maximum(0, xs - joint)]) for joint in joints]
    best = min(range(len(joints)), key=lambda number: _residual(pieces[number], ys))
    _, slope, change = _fit(pieces[best], ys)
    if _residual(pieces[best], ys) > SHARE_LEFT * straight or abs(change) < LEAST_CHANGE:
        return None
    return Bend(*points[best + 1], before=float(2**slope), after=float(2 ** (slope + change)))


def _fit(columns: np.ndarray, ys: np.ndarray) -> np.ndarray:
    return np.linalg.lstsq(columns, ys, rcond=None)[0]


def _residual(columns: np.ndarray, ys: np.ndarray) -> float:
    return float(np.sum((ys - columns @ _fit(columns, ys)) ** 2))
