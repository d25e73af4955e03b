"""What every regularizer shares: its strengths, their schedule, and the sum over sites."""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from brqat.kernels import Bins
from brqat.quantizer.base import Kind, Quantizer
from brqat.schedule import LAMBDA_SCHEDULES


class Penalty(NamedTuple):
    """Sum of the sites' penalties per kind, not yet multiplied by lambda; None where nothing was asked for."""

    weight: Tensor | None
    act: Tensor | None


class Regularizer:
    """Base: a subclass gives the penalty of one site and its curvature along alpha.

    A site takes part when its kind's lambda is above zero and it is not a first or last layer at its own width.
    """

    # What the penalty reads of a site's bins, which one pass over the data gives with the quantization: then
    # `site.seen.table` holds it, and v and codes are not kept. None: the penalty reads v and codes.
    bins: Bins | None = None

    def __init__(self, lambda_br: float, lambda_br_act: float, schedule: str = "constant"):
        for key, value in (("lambda_br", lambda_br), ("lambda_br_act", lambda_br_act)):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise ValueError(
                    f"{key}={value!r} is no strength: it multiplies the penalty in the loss, so it must be a "
                    "finite number, zero or above. Write 0 to leave the penalty out."
                )
        if schedule not in LAMBDA_SCHEDULES:
            raise ValueError(f"schedule={schedule!r} is not known. Write one of {', '.join(LAMBDA_SCHEDULES)}.")
        self.lambdas: dict[Kind, float] = {"weight": float(lambda_br), "act": float(lambda_br_act)}
        self.schedule = LAMBDA_SCHEDULES[schedule]

    def site_penalty(self, site: Quantizer, alpha: Tensor) -> Tensor:
        """Penalty of what the site saw last, a scalar; alpha is the site's own or a detached copy."""
        raise NotImplementedError

    def site_terms(self, site: Quantizer, alpha: Tensor) -> Tensor:
        """What the site's penalty is the sum of, 1-D: where it is a sum, all sites' terms are added up in one go."""
        return self.site_penalty(site, alpha)[None]

    def curvature(self, site: Quantizer) -> float:
        """Largest second derivative of the site's penalty along any of its alphas, at the codes it saw last."""
        raise NotImplementedError

    def acts_on(self, site: Quantizer) -> bool:
        return self.lambdas[site.kind] > 0 and not site.exempt

    def lambda_at(self, kind: Kind, progress: float) -> float:
        """Strength at a progress in [0, 1] through the regularized part of the run."""
        return self.lambdas[kind] * self.schedule(progress)

    def __call__(self, sites: Iterable[Quantizer], alpha_of: Callable[[Quantizer], Tensor]) -> Penalty:
        """Penalties of the last forward; alpha_of says which alpha, attached or detached, each site shows."""
        terms: dict[Kind, list[Tensor]] = {"weight": [], "act": []}
        for site in sites:
            if self.acts_on(site):
                terms[site.kind].append(self.site_terms(site, alpha_of(site)))
        return Penalty(*(torch.cat(terms[kind]).sum() if terms[kind] else None for kind in ("weight", "act")))
