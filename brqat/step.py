"""One training step: a batch forward, cross-entropy and the regularizer backward, weights and alphas moved."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from brqat.alpha_policy import KINDS, AlphaPolicy, PositiveAlphas
from brqat.levels import Oscillation
from brqat.quantizer.base import Asked, Quantizer
from brqat.regularizer.base import Regularizer


class Step:
    """Called once per batch. Nothing in it waits for the device.

    compiled: the losses go through torch.compile, as one graph or not at all.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Mapping[str, Quantizer],
        regularizer: Regularizer,
        policy: AlphaPolicy,
        optimizer: torch.optim.Optimizer,
        autocast: Callable[[], AbstractContextManager],
        compiled: bool = False,
    ):
        self.model, self.sites = model, dict(sites)
        self.regularizer, self.policy = regularizer, policy
        self.optimizer = optimizer
        self.autocast = autocast
        self.positive = PositiveAlphas(self.sites)
        self.oscillation = Oscillation(self.sites)
        self.losses = torch.compile(self._losses, fullgraph=True, dynamic=False) if compiled else self._losses

    def prepare(self, regularized: bool) -> None:
        """Before an epoch's first step: says what each site keeps of its forwards, with the regularizer or without.

        Weight sites show their codes, for the oscillation; regularized ones what the regularizer reads.
        """
        self.model.train()
        bins = self.regularizer.bins
        for site in self.sites.values():
            acts = regularized and self.regularizer.acts_on(site)
            site.recording = site.kind == "weight" or (acts and bins is None)
            site.asked = Asked(bins, self.policy.moves_alpha(site)) if acts and bins is not None else None

    def __call__(self, images: Tensor, labels: Tensor, strength: Mapping[str, float] | None) -> Tensor:
        """The loss, cross-entropy and the penalties of weights and activations before the step, (4,).

        strength: lambda of each kind; None leaves the regularizer out. The loss adds penalties times their lambdas.
        """
        factors = None
        if strength is not None:  # a tensor, since a compiled graph is made anew for another number
            factors = torch.tensor([strength[kind] for kind in KINDS]).to(images.device, non_blocking=True)
        loss, figures = self.losses(images, labels, factors)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.positive.guard()
        self.oscillation.step()
        for site in self.sites.values():
            site.seen = None  # lets go of the activations before the next forward makes its own
        return figures

    def _losses(self, images: Tensor, labels: Tensor, factors: Tensor | None) -> tuple[Tensor, Tensor]:
        with self.autocast():
            logits = self.model(images)
        ce = nn.functional.cross_entropy(logits.float(), labels)
        loss, penalties = ce, [ce.new_zeros(()), ce.new_zeros(())]
        if factors is not None:
            penalty = self.regularizer(self.sites.values(), self.policy.seen_by_regularizer)
            for position, part in enumerate(penalty):
                if part is not None:
                    loss = loss + factors[position] * part
                    penalties[position] = part
        return loss, torch.stack([loss, ce, *penalties]).detach()
