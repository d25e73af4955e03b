"""A site: one place in the network where a tensor is fake-quantized, with its grid and its step size alpha."""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from brqat import kernels
from brqat.bins import BinTable, site_table
from brqat.grid import Grid
from brqat.kernels import Bins, Norm

Kind = Literal["weight", "act"]
STARTS = ("lsq", "mse")

# The guard holds alpha above this share of its start: low enough to touch nothing that trains well, high enough
# that v / alpha stays far from overflow.
ALPHA_FLOOR = 1e-3


class Asked(NamedTuple):
    """The table that the regularizer wants of every training forward."""

    bins: Bins
    moves_alpha: bool  # its gradient reaches alpha


class Quantized(NamedTuple):
    """What quantizing gives: v_hat at least."""

    v_hat: Tensor
    codes: Tensor | None = None
    table: BinTable | None = None


class Seen(NamedTuple):
    """What a site quantized in the last forward, kept for the regularizer and the metrics."""

    shape: torch.Size
    v: Tensor | None  # before fake-quantization, while recording
    codes: Tensor | None  # in the grid's dtype, v's shape, while recording
    table: BinTable | None = None  # as asked


class Quantizer(nn.Module):
    """Base of all sites. A subclass gives `grid_for`, `codes` and `fake_quantize`.

    alpha has shape () per tensor, or one entry per output channel in a shape that broadcasts to the weight,
    (C, 1, 1, 1) or (C, 1). It is NaN, and the grid None, until `start` has been called.
    """

    def __init__(self, kind: Kind, bits: int, per_channel: bool = False, start: str = "lsq"):
        super().__init__()
        if start not in STARTS:
            raise ValueError(f"start={start!r} is no way to find alpha. Write one of {', '.join(STARTS)}.")
        if not isinstance(per_channel, bool):
            raise ValueError(f"per_channel={per_channel!r} is neither true nor false.")
        if per_channel and kind == "act":
            raise ValueError(
                "per_channel=True on activations would need one rescaling per input channel inside the dot "
                "product. Only weights have a step size per channel: leave act.per_channel=false."
            )
        self.kind = kind
        self.bits = bits
        self.per_channel = per_channel
        self.start_rule = start
        self.exempt = False  # first or last layer at their own width: outside BR and the level aggregates
        self.recording = False
        self.asked: Asked | None = None
        self.seen: Seen | None = None
        self.grid: Grid | None = None
        self.alpha = nn.Parameter(torch.tensor(math.nan))
        self.register_buffer("alpha_floor", torch.tensor(0.0))

    def grid_for(self, signed: bool) -> Grid:
        raise NotImplementedError

    def codes(self, v: Tensor, alpha: Tensor) -> Tensor:
        """The code of each value as a float tensor of v's shape."""
        raise NotImplementedError

    def fake_quantize(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """v_hat in v's dtype, and the codes in the grid's dtype.

        A `Quantized` may hold the table that `asked_now` describes as well, and leave out codes that nobody records.
        """
        raise NotImplementedError

    def forward(self, v: Tensor) -> Tensor:
        if self.grid is None:
            raise RuntimeError("this site has no alpha yet: call brqat.layers.calibrate(model, batches) first")
        v_hat, codes, table = Quantized(*self.fake_quantize(v))
        asked = self.asked_now
        if asked is not None and table is None:
            table = site_table(v, codes, self.alpha_seen_by(asked), self.grid, asked.bins)
        if self.recording:
            self.seen = Seen(v.shape, v, codes, table)
        elif asked is not None:
            self.seen = Seen(v.shape, None, None, table)
        return v_hat

    @property
    def asked_now(self) -> Asked | None:
        """The regularizer speaks in training only."""
        return self.asked if self.training else None

    def alpha_seen_by(self, asked: Asked | None) -> Tensor:
        return self.alpha if asked and asked.moves_alpha else self.alpha.detach()

    def one_pass(self, v: Tensor, scale: float) -> Quantized | None:
        """v quantized by the kernel for this site's grid; None where plain PyTorch has to do it."""
        asked = self.asked_now
        out = kernels.lsq(
            v, self.alpha, self.alpha_seen_by(asked), self.grid, scale, self.recording, asked and asked.bins
        )
        if out is None:
            return None
        return Quantized(out.v_hat, out.codes, asked and BinTable(out.count, out.mse))

    def after_norm(
        self, x: Tensor, shortcut: Tensor | None, training: bool, norm: Callable[[], Norm]
    ) -> tuple[Tensor, Tensor | None] | None:
        """In one pass v_hat of r = activation(norm(x) + shortcut), and with a shortcut r; None where it takes several.

        training: whether BatchNorm normalises by the batch. norm: makes what the kernel needs, and counts the batch.
        """
        return None

    @torch.no_grad()
    def start(self, mean_abs: Tensor, sample: Tensor, signed: bool) -> None:
        """Sets grid and alpha from data.

        mean_abs: mean of |v|, in alpha's shape; sample: values to minimise the error on, for start=mse.
        Raises ValueError where no step size can be had: values that are all zero or not finite.
        """
        grid = self.grid_for(signed)
        if not bool(torch.isfinite(mean_abs).all()) or not bool((mean_abs > 0).any()):
            raise ValueError(
                f"mean |v| is {mean_abs.flatten()[:4].tolist()}: no step size follows from values that are all "
                "zero or not finite. Look at the float network and at the pictures."
            )
        # A channel that is all zero takes the mean step of the others: any step represents it exactly.
        mean_abs = torch.where(mean_abs > 0, mean_abs, mean_abs[mean_abs > 0].mean())
        self.grid = grid
        alpha = self.alpha_start(mean_abs, grid)
        if self.start_rule == "mse":
            alpha = self._mse_start(sample, alpha)
        self.alpha = nn.Parameter(alpha.clone(), requires_grad=self.alpha.requires_grad)
        self.alpha_floor = alpha * ALPHA_FLOOR

    def alpha_start(self, mean_abs: Tensor, grid: Grid) -> Tensor:
        """LSQ's start, alpha = 2 * mean|v| / sqrt(qp) (Esser et al., 2020, section 2.1)."""
        return 2 * mean_abs / math.sqrt(grid.qp)

    def _mse_start(self, sample: Tensor, guess: Tensor) -> Tensor:
        """The alpha of least squared error on the sample: a sweep of factors around a guess, then a finer one.

        LSQ+ (Bhalgat et al., CVPR workshops 2020) reports that this start lowers the spread between runs.
        """
        best, least = guess, torch.full_like(guess, math.inf)
        for span, count in ((3.0, 61), (1.05, 21)):  # 0.33..3 of the guess in steps of 4%, then of 0.5%
            centre = best
            for factor in torch.logspace(-math.log10(span), math.log10(span), count).tolist():
                alpha = centre * factor
                error = (sample - self.codes(sample, alpha) * alpha).square_()
                error = error.sum_to_size(alpha.shape)
                best = torch.where(error < least, alpha, best)
                least = torch.minimum(error, least)
        return best

    def get_extra_state(self) -> dict:
        return {"grid": None if self.grid is None else [self.grid.qn, self.grid.qp]}

    def set_extra_state(self, state: dict) -> None:
        if state["grid"] is not None:
            qn, qp = state["grid"]
            self.grid = self.grid_for(signed=qn < 0)
            if (qn, qp) != self.grid:
                raise ValueError(f"the file holds codes {qn}..{qp}, this site has {self.bits} bits: other bit-width")

    def extra_repr(self) -> str:
        grid = "not started" if self.grid is None else f"codes {self.grid.qn}..{self.grid.qp}"
        return f"{self.kind}, {grid}{', per channel' if self.per_channel else ''}"


def gradient_scale(v: Tensor, kind: Kind, alpha: Tensor, qp: int) -> float:
    """LSQ's g = 1/sqrt(N * qp) (Esser et al., 2020, section 2.2).

    N counts the weights that share an alpha, or the features of one sample: with the batch axis in it, g and so
    the learning of alpha would change with the batch size.
    """
    per_sample = v.shape[0] if kind == "act" else 1
    return 1 / math.sqrt(max(v.numel() // per_sample // alpha.numel(), 1) * qp)
