"""Seeds that do not depend on what was generated before."""

from __future__ import annotations

import numpy as np


def mixed_seed(seed: int, number: int) -> int:
    """Return the 63-bit seed of training step or image `number`, unrelated to those of its neighbours."""
    # torch takes signed 64-bit seeds, hence the shift.
    return int(np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)[0]) >> 1
