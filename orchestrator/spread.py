"""What the benches print of a figure that was measured several times."""

from __future__ import annotations

import statistics
from collections.abc import Sequence


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest, with stable keys. Raises ValueError for no values at all."""
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}
