"""The levels of every site over a run: what metrics.py measures at one evaluation, plus what moved since the last.

flip_rate         share of codes changed since the last evaluation (activations: on FLIP_PICTURES fixed pictures)
flip_rate_step    weights: share of codes changed per training step since the last evaluation
oscillation       weights: Nagel's frequency, the running mean (m = .01) over steps of "the code changed, and in the
                  direction opposite to its last change"; mean over weights, and share of weights above .005
                  (Nagel, Fournarakis, Bondarenko, Blankevoort, ICML 2022, Eq. 8-10)
dead_bins         bins that were empty in each of the last 5 evaluations
alpha_drift       mean over alphas of ln(alpha / alpha at the end of warmup)
alpha_path        mean over alphas of the sum of |change of ln alpha| between evaluations since then
alpha_grad_ce/br  norm of what cross-entropy and the regularizer send to alpha
"""

import logging
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from brqat import kernels
from brqat.alpha_policy import KINDS, AlphaPolicy
from brqat.bins import as_it_lies, bin_index
from brqat.metrics import histogram_edges, level_metrics, site_sums
from brqat.quantizer.base import Quantizer
from brqat.regularizer.base import Regularizer

log = logging.getLogger(__name__)

STEP_FIGURES = ("flip_rate_step", "oscillation", "oscillation_share")  # of weights, followed at every step
OSCILLATION_MOMENTUM = 0.01
OSCILLATING_ABOVE = 0.005
LEAST_FADED = 1e-6  # from here on frequencies are brought up to date: float32 has room for its inverse, not for 0
FLIP_PICTURES = 64
DEAD_AFTER = 5


class Oscillation:
    """Follows the codes of all weights from step to step, as flat tensors over all sites."""

    def __init__(self, sites: Mapping[str, Quantizer]):
        self.sites = {name: site for name, site in sites.items() if site.kind == "weight"}
        self.last: Tensor | None = None  # codes of the step before, each site's in the order of its memory
        self.direction: Tensor | None = None  # sign of the last change, 0 before the first
        self.frequency: Tensor | None = None  # over faded
        self.faded = 1.0  # what a frequency of 1 would have become since `frequency` was last brought up to date
        self.flips: Tensor | None = None  # of each site, since the last report
        self.steps = 0  # with a step before them, since the last report
        self.sizes: list[int] = []

    @torch.no_grad()
    def step(self) -> None:
        """Call once per training step, after the forward; reads the codes it used.

        A frequency fades by 1 - m at each step and gains m when its weight returns. Fading all of them would be most of
        the work, since few weights change: what is gained is raised instead, m / (1 - m)^steps.
        """
        if not self.sites:
            return
        codes = [site.seen.codes.to(torch.int8) for site in self.sites.values()]
        if self.last is None:
            self.last = _flat(codes)
            self.direction = torch.zeros_like(self.last)
            self.frequency = torch.zeros_like(self.last, dtype=torch.float32)
            self.flips = torch.zeros(len(codes), dtype=torch.int64, device=self.last.device)
            self.sizes = [part.numel() for part in codes]
            return
        self.steps += 1
        self.faded *= 1 - OSCILLATION_MOMENTUM
        share = OSCILLATION_MOMENTUM / self.faded
        if kernels.native_on(self.last.device):
            state = self.last, self.direction, self.frequency, self.flips
            torch.ops.brqat.oscillation(codes, *state, share)
        else:
            now = _flat(codes)
            change = (now > self.last).to(torch.int8) - (now < self.last).to(torch.int8)
            # Opposite signs multiply to -1; no earlier change multiplies to 0.
            self.frequency.add_((change * self.direction) < 0, alpha=share)
            changed = change != 0
            self.flips += torch.stack([part.sum() for part in changed.split(self.sizes)])
            self.direction = torch.where(changed, change, self.direction)
            self.last = now
        if self.faded < LEAST_FADED:
            self._bring_up_to_date()

    def _bring_up_to_date(self) -> None:
        if self.frequency is not None:
            self.frequency *= self.faded
        self.faded = 1.0

    def report(self) -> dict[str, tuple[Tensor, ...]]:
        """STEP_FIGURES per site, still on the device; then starts a new count of flips."""
        if self.steps == 0:
            return {}
        self._bring_up_to_date()
        out = {
            name: (
                flips.double() / (self.steps * frequency.numel()),
                frequency.double().mean(),
                (frequency > OSCILLATING_ABOVE).double().mean(),
            )
            for name, flips, frequency in zip(self.sites, self.flips, self.frequency.split(self.sizes), strict=True)
        }
        self.flips = torch.zeros_like(self.flips)
        self.steps = 0
        return out

    def state_dict(self) -> dict:
        self._bring_up_to_date()
        keys = ("last", "direction", "frequency", "flips", "steps", "sizes")
        return {key: getattr(self, key) for key in keys}

    def load_state_dict(self, state: dict) -> None:
        if state["last"] is not None and state["last"].dtype != torch.int8:
            log.warning("the checkpoint is of an earlier brqat: changes and oscillation of weights are counted anew")
            return
        for key, value in state.items():
            setattr(self, key, value)
        self.faded = 1.0


def _flat(codes: Iterable[Tensor]) -> Tensor:
    """All sites' codes in one tensor, each in the order of its memory."""
    return torch.cat([as_it_lies(part) for part in codes])


class LevelHistory:
    """Measures every site at each evaluation and keeps what the next one compares with."""

    def __init__(self, sites: Mapping[str, Quantizer], oscillation: Oscillation, warmup_epochs: int):
        self.sites = sites
        self.warmup_epochs = warmup_epochs
        self.oscillation = oscillation
        self.alphas: dict[str, Tensor] = {}  # at the last evaluation
        self.codes: dict[str, Tensor] = {}  # at the last evaluation, as positions in the grid, uint8
        self.reference: dict[str, Tensor] = {}  # alphas at the end of warmup
        self.path: dict[str, float] = {}
        self.empty: dict[str, list[Tensor]] = {}  # which bins were empty, the last DEAD_AFTER evaluations
        if warmup_epochs == 0:
            self._set_reference()

    def _set_reference(self) -> None:
        self.reference = {name: site.alpha.detach().clone() for name, site in self.sites.items()}
        self.path = dict.fromkeys(self.sites, 0.0)

    def numel(self) -> dict[str, int]:
        """Weights of each site, or features of one picture: what a site counts for in the aggregates."""
        return {
            name: site.seen.shape.numel() // (site.seen.shape[0] if site.kind == "act" else 1)
            for name, site in self.sites.items()
        }

    @torch.no_grad()
    def evaluate(self, model: nn.Module, batches: Iterable[Tensor], epoch: int) -> tuple[list[dict], dict[str, Tensor]]:
        """One row per site, and its histogram counts. The model is in eval mode.

        batches: pictures of a fixed subset of the validation split, the same at each evaluation.
        One copy from the device for all sites.
        """
        sums: dict[str, Tensor] = {}
        flips: dict[str, Tensor] = {}
        steps = self.oscillation.report()
        with recording(self.sites.values()):
            for number, pictures in enumerate(batches):
                model(pictures)
                for name, site in self.sites.items():
                    if site.kind == "act" or number == 0:
                        fresh = site_sums(site, site.seen.v, site.seen.codes, self.alphas.get(name))
                        sums[name] = sums[name] + fresh if name in sums else fresh
                    if number == 0:
                        flips[name] = self._flips(name, site)
            numel = self.numel()
        on_device = [
            torch.cat([sums[name], flips[name][None], *(v[None] for v in steps.get(name, ()))]) for name in self.sites
        ]
        alphas = [site.alpha.detach().double().reshape(-1) for site in self.sites.values()]
        host = torch.cat([*on_device, *alphas]).cpu().split([len(t) for t in (*on_device, *alphas)])
        if epoch == self.warmup_epochs and epoch > 0:
            self._set_reference()
            self.alphas = dict(self.reference)
        rows, histograms = [], {}
        for position, (name, site) in enumerate(self.sites.items()):
            values, alpha = host[position], host[len(on_device) + position]
            size = sums[name].numel()
            figures, histograms[name] = level_metrics(values[:size], site.grid)
            known_flip = values[size].item()
            extra = dict(zip(STEP_FIGURES, values[size + 1 :].tolist(), strict=False))
            rows.append(
                {
                    "epoch": epoch,
                    "site": name,
                    "kind": site.kind,
                    "bits": site.bits,
                    "codes": list(site.grid.codes),
                    "exempt": site.exempt,
                    "numel": numel[name],
                    "alpha": alpha.mean().item(),
                    **figures,
                    "dead_bins": self._dead_bins(name, torch.tensor(figures["occupancy"]) == 0),
                    "flip_rate": None if known_flip < 0 else known_flip,
                    **(dict.fromkeys(STEP_FIGURES) | extra),
                    **self._alpha_moves(name, site),
                }
            )
        self.alphas = {name: site.alpha.detach().clone() for name, site in self.sites.items()}
        return rows, histograms

    def _flips(self, name: str, site: Quantizer) -> Tensor:
        """Share of codes changed since the last evaluation, -1 at the first."""
        codes = site.seen.codes[:FLIP_PICTURES] if site.kind == "act" else site.seen.codes
        now = bin_index(codes, site.grid).to(torch.uint8)
        before = self.codes.get(name)
        self.codes[name] = now
        if before is None:
            return torch.tensor(-1.0, dtype=torch.float64, device=now.device)
        return (now != before).double().mean()

    def _dead_bins(self, name: str, empty: Tensor) -> int:
        window = [*self.empty.get(name, []), empty][-DEAD_AFTER:]
        self.empty[name] = window
        return int(torch.stack(window).all(0).sum()) if len(window) == DEAD_AFTER else 0

    def _alpha_moves(self, name: str, site: Quantizer) -> dict[str, float | None]:
        """None before the end of warmup, from where both are counted."""
        if name not in self.reference:
            return {"alpha_drift": None, "alpha_path": None}
        alpha = site.alpha.detach().double()
        # The last evaluation is missing only where warmup ended before any: then the path starts at the reference.
        before = self.alphas.get(name, self.reference[name]).double()
        self.path[name] += (alpha / before).log().abs().mean().item()
        drift = (alpha / self.reference[name].double()).log().mean().item()
        return {"alpha_drift": drift, "alpha_path": self.path[name]}

    def state_dict(self) -> dict:
        keys = ("alphas", "codes", "reference", "path", "empty")
        return {"oscillation": self.oscillation.state_dict()} | {key: getattr(self, key) for key in keys}

    def load_state_dict(self, state: dict) -> None:
        state = dict(state)
        self.oscillation.load_state_dict(state.pop("oscillation"))
        # Kept on the host, wherever the checkpoint was loaded to.
        state["empty"] = {name: [t.cpu() for t in window] for name, window in state["empty"].items()}
        for key, value in state.items():
            setattr(self, key, value)


class recording:
    """Inside, the sites keep what they see; afterwards they let go of it, and of the memory behind it."""

    def __init__(self, sites: Iterable[Quantizer]):
        self.sites = list(sites)

    def __enter__(self):
        self.before = [(site.recording, site.asked) for site in self.sites]
        for site in self.sites:
            site.recording, site.asked = True, None

    def __exit__(self, *_):
        for site, before in zip(self.sites, self.before, strict=True):
            (site.recording, site.asked), site.seen = before, None


def histogram_arrays(sites: Mapping[str, Quantizer], histograms: Mapping[str, Tensor], epoch: int) -> dict:
    """Arrays for histograms.npz: SITE@EPOCH counts, SITE@edges in units of v / alpha."""
    out = {}
    for name, counts in histograms.items():
        out[f"{name}@{epoch}"] = counts.numpy()
        out[f"{name}@edges"] = histogram_edges(sites[name].grid).numpy()
    return out


def alpha_gradients(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    sites: Mapping[str, Quantizer],
    regularizer: Regularizer,
    policy: AlphaPolicy,
    strength: Mapping[str, float],
    optimizer: torch.optim.Optimizer,
) -> dict[str, dict[str, float | None]]:
    """Norm per site of the gradients that reach alpha, with the stability index under SGD (None elsewhere).

    alpha_grad_ce           from cross-entropy
    alpha_grad_br           from the site's own penalty, times strength: exactly 0 unless the policy is backprop
    alpha_grad_br_upstream  from the activation penalties of later sites, through the network between: like all of the
                            loss that depends on a layer's output, they train what lies below, alphas included

    All are exactly 0 once alpha is frozen.
    """
    moving = {name: site.alpha for name, site in sites.items() if site.alpha.requires_grad}

    def gradients(target: Tensor | None) -> list[Tensor]:
        """In moving's order, zeros where the target does not depend on an alpha."""
        if target is None or not target.requires_grad or not moving:
            return [torch.zeros_like(alpha) for alpha in moving.values()]
        found = torch.autograd.grad(target, list(moving.values()), retain_graph=True, allow_unused=True)
        return [
            torch.zeros_like(alpha) if grad is None else grad
            for grad, alpha in zip(found, moving.values(), strict=True)
        ]

    def pull() -> Tensor | None:
        penalty = regularizer(sites.values(), policy.seen_by_regularizer)
        parts = [strength[kind] * part for kind, part in zip(KINDS, penalty, strict=True) if part is not None]
        return sum(parts) if parts else None

    with torch.enable_grad(), recording(sites.values()):
        from_ce = gradients(nn.functional.cross_entropy(model(images).float(), labels))
        from_all = gradients(pull())
        for site in sites.values():
            site.seen = site.seen._replace(v=site.seen.v.detach())
        own = gradients(pull())
        sgd = isinstance(optimizer, torch.optim.SGD)
        index = {n: policy.stability_index(s, regularizer, optimizer) if sgd else None for n, s in sites.items()}
    upstream = [both - direct for both, direct in zip(from_all, own, strict=True)]
    keys = ("alpha_grad_ce", "alpha_grad_br", "alpha_grad_br_upstream")
    norms = [grad.double().norm() for grads in (from_ce, own, upstream) for grad in grads]
    host = torch.stack(norms).cpu().view(len(keys), -1).T.tolist() if norms else []
    known = {name: dict(zip(keys, values, strict=True)) for name, values in zip(moving, host, strict=True)}
    return {name: known.get(name, dict.fromkeys(keys, 0.0)) | {"stability_index": index[name]} for name in sites}
