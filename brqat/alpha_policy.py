"""Who may move alpha, for weights and activations apart.

    policy      cross-entropy moves alpha     the regularizer moves alpha
    learnable   yes                           no: it sees a detached copy
    frozen      until warmup ends             no, and from then on nothing moves it
    backprop    yes                           yes: the levels move while the regularizer gathers values at them

Two mechanisms stand behind them. Freezing takes alpha out of the optimizer, with its state and its gradient: a mere
zero gradient leaves momentum, Adam's moments and weight decay at work. Detaching cuts the gradient from a site's
penalty to its own alpha. What a penalty on activations sends down the network, to weights and alphas of earlier
layers, is left alone as part of the loss: only freezing stops that.
"""

import logging
from collections.abc import Iterable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from brqat import kernels
from brqat.quantizer.base import Kind, Quantizer
from brqat.regularizer.base import Regularizer

log = logging.getLogger(__name__)

POLICIES = ("learnable", "frozen", "backprop")
KINDS: tuple[Kind, ...] = ("weight", "act")


class AlphaPolicy:
    """weight, act: one of POLICIES; lr_scale: alpha's share of the learning rate.

    force: train even where the stability index says that alpha will run away.
    """

    def __init__(self, weight: str, act: str, lr_scale: float = 1.0, force: bool = False):
        for kind, policy in (("weight", weight), ("act", act)):
            if policy not in POLICIES:
                raise ValueError(f"alpha_policy.{kind}={policy!r} is not known. Write one of {', '.join(POLICIES)}.")
        if isinstance(lr_scale, bool) or not isinstance(lr_scale, (int, float)) or not 0 < lr_scale < 1e6:
            raise ValueError(
                f"alpha_policy.lr_scale={lr_scale!r} cannot scale a learning rate: it must be a number above 0. "
                "An alpha that must not move from the start: alpha_policy=frozen warmup_epochs=0."
            )
        if not isinstance(force, bool):
            raise ValueError(f"alpha_policy.force={force!r} is neither true nor false.")
        self.of: dict[Kind, str] = {"weight": weight, "act": act}
        self.lr_scale = lr_scale
        self.force = force

    def seen_by_regularizer(self, site: Quantizer) -> Tensor:
        """The site's alpha where the regularizer may move it, else a detached one."""
        return site.alpha if self.moves_alpha(site) else site.alpha.detach()

    def moves_alpha(self, site: Quantizer) -> bool:
        """Whether the regularizer's gradient may reach the site's alpha."""
        return self.of[site.kind] == "backprop"

    def optimizer(self, make: partial, model: nn.Module, sites: Iterable[Quantizer]) -> torch.optim.Optimizer:
        """The optimizer with alphas in a group of their own: their learning rate, and no weight decay."""
        alphas = [site.alpha for site in sites]
        own = {id(alpha) for alpha in alphas}
        groups = [{"params": [p for p in model.parameters() if id(p) not in own]}]
        if alphas:
            groups.append({"params": alphas, "lr": make.keywords["lr"] * self.lr_scale, "weight_decay": 0.0})
        optimizer = make(groups)
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
        return optimizer

    def freeze(self, sites: Iterable[Quantizer], optimizer: torch.optim.Optimizer) -> None:
        """From this call on nothing moves the alphas of a frozen kind, not by a bit."""
        frozen = {id(site.alpha): site.alpha for site in sites if self.of[site.kind] == "frozen"}
        for alpha in frozen.values():
            alpha.requires_grad_(False)
            alpha.grad = None
            optimizer.state.pop(alpha, None)
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if id(p) not in frozen]

    def describe(self, regularizer: Regularizer, warmup_epochs: int) -> str:
        """What a run prints of its alpha control before it starts."""
        lines = ["alpha control   policy      cross-entropy moves it   the regularizer moves it    frozen from"]
        for kind, name in (("weight", "weights"), ("act", "activations")):
            policy, acts = self.of[kind], regularizer.lambdas[kind] > 0
            if policy == "frozen":
                by_ce = f"until epoch {warmup_epochs}" if warmup_epochs else "never"
                since = f"epoch {warmup_epochs + 1}"
            else:
                by_ce, since = "yes", "never"
            by_br = f"from epoch {warmup_epochs + 1}" if policy == "backprop" else "no"
            if not acts:
                by_br = "no, lambda is 0"
            lines.append(f"  {name:<13} {policy:<11} {by_ce:<24} {by_br:<27} {since}")
        return "\n".join(lines)

    def check_stability(
        self, sites: Mapping[str, Quantizer], regularizer: Regularizer, optimizer: torch.optim.Optimizer
    ) -> None:
        """Refuses a backprop run whose alpha will run away under SGD; warns of one that may.

        sites must have seen a forward, from which the regularizer takes its curvature.
        Raises ValueError above a stability index of 1 unless forced.
        """
        if not any(self.of[kind] == "backprop" and regularizer.lambdas[kind] > 0 for kind in KINDS):
            return
        if not isinstance(optimizer, torch.optim.SGD):
            log.warning(
                "alpha_policy=backprop with %s: the stability index speaks of SGD only. Alpha will follow the "
                "histogram of the values rather than the task.",
                type(optimizer).__name__,
            )
            return
        index, name = max((self.stability_index(site, regularizer, optimizer), n) for n, site in sites.items())
        advice = (
            f"alpha_policy=backprop has a stability index of {index:.3g} at {name}: above 1 the gradient step of "
            "the regularizer on alpha overshoots, and alpha runs away or through zero. Lower "
            f"regularizer.lambda_br{'_act' if sites[name].kind == 'act' else ''}, optimizer.lr or "
            "alpha_policy.lr_scale, or write alpha_policy=learnable."
        )
        if index > 1 and not self.force:
            raise ValueError(advice + " To train all the same: alpha_policy.force=true.")
        if index > 0.5:
            log.warning(advice)

    def stability_index(self, site: Quantizer, regularizer: Regularizer, optimizer: torch.optim.SGD) -> float:
        """How near the regularizer's step on one site's alpha is to overshooting; stable up to 1.

        eta * lambda * h / (2 * (1 + beta)) for heavy-ball momentum beta, and (1 + 2 * beta) times that for Nesterov's,
        at the run's base learning rate and full lambda: gradient descent on a curvature lambda * h. 0 where the
        regularizer's gradient does not reach alpha. LSQ's scale g is no part of it: it scales LSQ's gradient only.
        """
        if self.of[site.kind] != "backprop" or not regularizer.acts_on(site):
            return 0.0
        group = optimizer.param_groups[-1]
        beta = group["momentum"]
        limit = 2 * (1 + beta) / (1 + 2 * beta if group["nesterov"] else 1)
        return group["base_lr"] * regularizer.lambdas[site.kind] * regularizer.curvature(site) / limit


class PositiveAlphas:
    """Keeps every trainable alpha above its floor after each step, and counts how often that was needed."""

    def __init__(self, sites: Mapping[str, Quantizer]):
        self.names = list(sites)
        self.alphas = [site.alpha for site in sites.values()]
        self.floors = [site.alpha_floor for site in sites.values()]
        self.sizes = [alpha.numel() for alpha in self.alphas]
        self.clamped: Tensor | None = None
        if self.alphas:
            self.clamped = torch.zeros(sum(self.sizes), dtype=torch.int64, device=self.alphas[0].device)

    @torch.no_grad()
    def guard(self) -> None:
        """Call after optimizer.step(); waits for nothing on the device."""
        if not self.alphas:
            return
        if kernels.native_on(self.clamped.device):
            torch.ops.brqat.guard(self.alphas, self.floors, self.clamped)
            return
        flat, floor = (torch.cat([t.reshape(-1) for t in part]) for part in (self.alphas, self.floors))
        self.clamped += flat < floor
        torch._foreach_maximum_(self.alphas, self.floors)

    def counts(self) -> dict[str, int]:
        """How often the guard has acted, per site."""
        if self.clamped is None:
            return {}
        per_site = [part.sum() for part in self.clamped.split(self.sizes)]
        return dict(zip(self.names, torch.stack(per_site).tolist(), strict=True))

    def state_dict(self) -> dict:
        return {"clamped": self.clamped}

    def load_state_dict(self, state: dict) -> None:
        if self.clamped is not None:
            self.clamped.copy_(state["clamped"])
