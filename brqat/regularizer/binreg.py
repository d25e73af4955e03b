"""Bin Regularization. Han, Li, Liu, Tian, Shan, "Improving Low-Precision Network Quantization via Bin
Regularization", ICCV 2021, pp. 5261-5270.
https://openaccess.thecvf.com/content/ICCV2021/html/Han_Improving_Low-Precision_Network_Quantization_via_Bin_Regularization_ICCV_2021_paper.html

    L_BR = sum over non-empty bins i of  (mean_i - i * alpha)^2 + var_i                           Eq. 4, 5
         = sum over non-empty bins i of  1/N_i * sum over the bin of (v - i * alpha)^2            (bins.py)

The paper gives each bin one vote, so the pull on one weight, 2 * (v - q) / N_i, fades with the size of the layer and
one lambda means something else in each. `normalize` says how bins are weighed:

    paper     sum of mse_i                    one vote per bin
    element   sum of N_i * mse_i / samples    one vote per element: the pull on a weight is 2 * (v - q) in any layer.
                                              Dampening's term (Nagel et al., ICML 2022)
    fan_in    element / fan_in                the same, over the weights that feed one output

samples is 1 for weights and the batch size for activations, like cross-entropy's mean. fan_in of activations is the
number of features of one sample.

`units: alpha` measures distances in steps, (v / alpha - i)^2: the penalty then does not change when a layer and its
alpha are scaled together. `clipped: drop` leaves out what lies beyond the end levels, whose long tail otherwise rules
the end bins; the paper keeps it.
"""

import torch
from torch import Tensor

from brqat.bins import BinTable, as_float, bin_index, site_table
from brqat.kernels import Bins
from brqat.quantizer.base import Quantizer, Seen
from brqat.regularizer.base import Regularizer

CHOICES = {
    "normalize": ("paper", "element", "fan_in"),
    "units": ("absolute", "alpha"),
    "clipped": ("keep", "drop"),
}


class BinReg(Regularizer):
    """Bin Regularization with the paper's reduction by default."""

    def __init__(
        self,
        lambda_br: float,
        lambda_br_act: float = 0.0,
        normalize: str = "paper",
        units: str = "absolute",
        clipped: str = "keep",
        schedule: str = "constant",
    ):
        super().__init__(lambda_br, lambda_br_act, schedule)
        for key, value in (("normalize", normalize), ("units", units), ("clipped", clipped)):
            if value not in CHOICES[key]:
                raise ValueError(f"{key}={value!r} is not known. Write one of {', '.join(CHOICES[key])}.")
        self.normalize = normalize
        self.bins = Bins(in_steps=units == "alpha", drop_clipped=clipped == "drop")

    def site_penalty(self, site: Quantizer, alpha: Tensor) -> Tensor:
        return self.site_terms(site, alpha).sum()

    def site_terms(self, site: Quantizer, alpha: Tensor) -> Tensor:
        return self._weigh(self._table(site, alpha), site)

    @torch.no_grad()
    def curvature(self, site: Quantizer) -> float:
        """h = d2 L / d alpha2 = 2 * sum over elements of weight_j * i_j^2, the largest of a site's alphas.

        With one vote per bin that is 2 * sum of i^2 over the bins in use. In steps it is divided by alpha^2, exact
        where the elements sit on their levels.
        """
        seen, alpha = site.seen, site.alpha.detach()
        table = self._table(site, alpha)
        # _weigh is linear in mse: with 1 everywhere it says what each bin counts for.
        per_bin = self._weigh(BinTable(table.count, torch.ones_like(table.mse, dtype=torch.float64)), site)
        per_element = per_bin / table.count.clamp(min=1)
        index = bin_index(seen.codes, site.grid)
        share = 2 * seen.codes.double().square() * per_element[index]
        if self.bins.drop_clipped:
            u = as_float(seen.v) / alpha
            share = torch.where((u < site.grid.qn) | (u > site.grid.qp), 0.0, share)
        h = share.sum_to_size(alpha.shape)
        if self.bins.in_steps:
            h = h / alpha.square()
        return h.max().item()

    def _table(self, site: Quantizer, alpha: Tensor) -> BinTable:
        return site.seen.table or site_table(site.seen.v, site.seen.codes, alpha, site.grid, self.bins)

    def _weigh(self, table: BinTable, site: Quantizer) -> Tensor:
        """What each bin adds to the site's penalty, (num_levels,)."""
        if self.normalize == "paper":
            return table.mse
        by_element = table.count * table.mse
        if self.normalize == "fan_in":
            return by_element / _fan_in(site.seen, site.kind) / _samples(site.seen, site.kind)
        return by_element / _samples(site.seen, site.kind)


def _samples(seen: Seen, kind: str) -> int:
    return seen.shape[0] if kind == "act" else 1


def _fan_in(seen: Seen, kind: str) -> int:
    # A weight is (outputs, inputs, ...) and an input (samples, features, ...): both say it in their first row.
    return seen.shape.numel() // seen.shape[0]
