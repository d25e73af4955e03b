"""What a study searches, read from Hydra's overrides, and what must not change under it."""

import difflib
import itertools
import json
from collections.abc import Mapping
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    IntDistribution,
    distribution_to_json,
)

MOST_CONTROLS = 32


def controls_of(control: Mapping | None, distributions: Mapping[str, BaseDistribution], fixed: set[str]) -> list[dict]:
    """The settings of the arm without regularization: `set` crossed with every value of the parameters in `over`.

    control: {set: {key: value}, over: [key]}, or None for no such arm. Raises ValueError.
    """
    if not control:
        return []
    over = [name for name in control.get("over") or [] if name not in fixed]
    for name in over:
        if name not in distributions:
            raise ValueError(f"hydra.sweeper.control.over names {name}, which the study does not search.")
    values = [_values(name, distributions[name]) for name in over]
    settings = [dict(zip(over, row, strict=True)) | dict(control["set"]) for row in itertools.product(*values)]
    if len(settings) > MOST_CONTROLS:
        raise ValueError(f"hydra.sweeper.control.over={over} makes {len(settings)} controls: name fewer parameters.")
    return settings


def _values(name: str, distribution: BaseDistribution) -> list:
    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    if isinstance(distribution, IntDistribution) and not distribution.log:
        return list(range(distribution.low, distribution.high + 1, distribution.step))
    raise ValueError(f"hydra.sweeper.control.over names {name}, which is no choice and no range of whole numbers.")


def overrides_of(setting: Mapping[str, Any]) -> list[str]:
    """The setting as Hydra's command line takes it."""
    return [f"{key}={_plain(value)}" for key, value in setting.items()]


def _plain(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    if isinstance(value, str) and not _reads_as_text(value):
        return QuotedString(value, Quote.double).with_quotes()
    return repr(value) if isinstance(value, float) else str(value)


def _reads_as_text(value: str) -> bool:
    """Whether Hydra's grammar takes it for text without quotes: not 1, true, a,b or it's.

    A list or a dict among choices comes as text, too, and is not to be quoted.
    """
    if value.startswith(("[", "{")):
        return True
    try:
        return isinstance(OverridesParser.create().parse_override(f"key={value}").value(), (str, QuotedString))
    except HydraException:
        return False


def description(
    distributions: Mapping[str, BaseDistribution],
    controls: list[dict],
    constraints: Mapping,
    objective: dict[str, str],
    config: Mapping[str, Any],
) -> dict[str, str]:
    """Everything that makes the trials of a study comparable, as {name: text}: what a resumed study must agree in.

    objective: name -> direction; config: the composed configuration without what is swept.
    """
    said = {f"search {name}": _text_of(distribution) for name, distribution in distributions.items()}
    said["control"] = json.dumps(controls)
    said["constraints"] = json.dumps(constraints)
    said["objective"] = ", ".join(f"{name} ({direction})" for name, direction in objective.items())
    swept = {*distributions, *(key for setting in controls for key in setting)}
    settings = {
        key: json.dumps(value)
        for key, value in _flat(config).items()
        if not any(key == name or key.startswith(f"{name}.") for name in (name.replace("/", ".") for name in swept))
    }
    return settings | said  # where the objective has its direction


def difference(there: Mapping[str, str], here: Mapping[str, str]) -> list[str]:
    """Lines that say what differs, - for the study's and + for this command's; empty if nothing does."""
    lines = []
    for key in sorted(there.keys() | here.keys()):
        if there.get(key) != here.get(key):
            lines += [f"  - {key}: {there[key]}"] if key in there else []
            lines += [f"  + {key}: {here[key]}"] if key in here else []
    return lines


def key_of(argument: str) -> str:
    """The key that an override of the command line sets, without +, ++ or ~."""
    return OverridesParser.create().parse_override(argument).key_or_group


def nearest(name: str, names: list[str]) -> str:
    """A hint at what was meant."""
    near = difflib.get_close_matches(name, names, n=1)
    return f" Did you mean {near[0]}?" if near else f" Known: {', '.join(names)}."


def _text_of(distribution: BaseDistribution) -> str:
    kind = json.loads(distribution_to_json(distribution))
    return f"{kind['name'].removesuffix('Distribution').lower()} {json.dumps(kind['attributes'])}"


def _flat(node: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(node, Mapping) or (not node and prefix):
        return {prefix: node}
    found = {}
    for key, value in node.items():
        found |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return found
