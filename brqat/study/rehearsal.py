"""What of a search space cannot be, found before anything is trained."""

import itertools
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

from brqat.study.space import overrides_of

MOST = 32  # settings that are tried out, and surroundings of a value
NEAR = 0.01  # how far inside of a range of real numbers its ends are tried: the very end is hardly ever drawn


class Rehearsal(NamedTuple):
    refused: str | None  # why the space cannot be searched
    doubtful: list[tuple[str, str]]  # settings that cannot be, though their values go with others; and why


def rehearse(
    distributions: Mapping[str, BaseDistribution],
    controls: Sequence[Mapping[str, Any]],
    why_not: Callable[[Mapping[str, Any]], str | None],
) -> Rehearsal:
    """Tries out the controls, and settings in which every choice and both sides of every range appear.

    A value is refused if it cannot be with any of the others; one that does not go with some is doubtful, since the
    rest of the space may be worth its trials. why_not: why a setting cannot be; None if it can.
    """
    doubtful = []
    said = [why_not(control) for control in controls]
    if said and all(said):
        return Rehearsal(f"{' '.join(overrides_of(controls[0]))} is the control, but {said[0]}", [])
    doubtful += [(" ".join(overrides_of(control)), why) for control, why in zip(controls, said, strict=True) if why]
    values = _tried(distributions)
    for setting in probes(distributions):
        why = why_not(setting)
        if why is None:
            continue
        never = [key for key in setting if _never(key, setting[key], values, why_not)]
        # Where another value does no better, it is not the value's fault.
        blamed = {
            key: setting[key] for key in never if not all(_never(key, other, values, why_not) for other in values[key])
        }
        if blamed:
            return Rehearsal(f"{' '.join(overrides_of(blamed))} is in the search space, but {why}", [])
        if never:
            return Rehearsal(why, [])
        doubtful.append((" ".join(overrides_of(setting)), why))
    return Rehearsal(None, doubtful)


def probes(distributions: Mapping[str, BaseDistribution]) -> list[dict[str, Any]]:
    """A few settings in which every choice, and both sides of every range, appears."""
    values = _tried(distributions)
    most = min(max(map(len, values.values()), default=0), MOST)
    return [{key: row[index % len(row)] for key, row in values.items()} for index in range(most)]


def _never(key: str, value: Any, values: Mapping[str, list], why_not: Callable) -> bool:
    """Whether a value cannot be, whatever the others. False where they are too many to try all."""
    others = {name: row for name, row in values.items() if name != key}
    if math.prod(map(len, others.values())) <= MOST:
        return all(why_not({key: value, **rest}) for rest in _product(others))
    draw = random.Random(0)
    rows = ({name: draw.choice(row) for name, row in others.items()} for _ in range(MOST))
    # Having seen it fail only is no proof, but one that varies all others at once is close to it.
    return all(why_not({key: value, **rest}) for rest in rows)


def _product(values: Mapping[str, list]) -> Iterator[dict[str, Any]]:
    for row in itertools.product(*values.values()):
        yield dict(zip(values, row, strict=True))


def _tried(distributions: Mapping[str, BaseDistribution]) -> dict[str, list]:
    found = {}
    for key, distribution in distributions.items():
        if isinstance(distribution, CategoricalDistribution):
            found[key] = list(distribution.choices)
        elif isinstance(distribution, FloatDistribution) and distribution.step is None:
            found[key] = list(dict.fromkeys(_inside(distribution)))
        else:
            found[key] = list(dict.fromkeys([distribution.low, distribution.high]))
    return found


def _inside(range_: FloatDistribution) -> tuple[float, float]:
    """Two values near the ends, on the axis that the range is drawn from."""
    if range_.log:
        low, high = math.log(range_.low), math.log(range_.high)
        return math.exp(low + NEAR * (high - low)), math.exp(high - NEAR * (high - low))
    return range_.low + NEAR * (range_.high - range_.low), range_.high - NEAR * (range_.high - range_.low)
