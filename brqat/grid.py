"""The integer codes of a quantizer, in one place: quantizer, regularizer and metrics all read a Grid."""

from typing import NamedTuple

import torch


class Grid(NamedTuple):
    """The codes qn, qn + gap, ..., qp. Level k sits at k * alpha."""

    qn: int
    qp: int

    # Not a field: only SignGrid has another one, and a Grid stays the pair that the papers write.
    gap = 1

    @property
    def num_levels(self) -> int:
        return (self.qp - self.qn) // self.gap + 1

    @property
    def dtype(self) -> torch.dtype:
        """What stored codes are, of up to 8 bits."""
        return torch.int8 if self.qn < 0 else torch.uint8

    @property
    def codes(self) -> range:
        """Every code, lowest first; entry i of a per-bin table belongs to codes[i]."""
        return range(self.qn, self.qp + 1, self.gap)


class SignGrid(Grid):
    """The grid of 1-bit weights, {-1, +1}: two codes and no zero."""

    gap = 2


SIGN_GRID = SignGrid(-1, 1)


def uniform_grid(bits: int, signed: bool) -> Grid:
    """Codes of a uniform quantizer (Esser et al., LSQ, ICLR 2020, section 2).

    signed: -2^(b-1) ... 2^(b-1) - 1;  unsigned: 0 ... 2^b - 1.

    Raises ValueError for bits outside 1..8, and for 1 bit signed: {-1, 0} has no positive level.
    """
    if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 8:
        raise ValueError(
            f"bits={bits!r} is not a width that brqat quantizes to: codes are kept in 8 bits. "
            "Write a whole number from 1 to 8 (from 2 for weights), or bits=float to leave the tensor alone."
        )
    if not signed:
        return Grid(0, 2**bits - 1)
    if bits == 1:
        raise ValueError(
            "bits=1, signed=True has no positive level: the codes would be {-1, 0}. "
            "1-bit weights: quantizer=sign. 1-bit activations need inputs that are never negative."
        )
    return Grid(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
