"""LSQ and the bin table in one pass over the data: one file per kind of device, each equal to the plain formulas."""

from typing import NamedTuple


class Bins(NamedTuple):
    """What a regularizer wants of a site's per-bin table."""

    in_steps: bool  # distances in units of alpha, (v / alpha - c)^2, rather than (v - c * alpha)^2
    drop_clipped: bool  # leave out the elements with v / alpha beyond qn or qp
