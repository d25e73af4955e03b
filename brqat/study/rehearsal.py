"""What of a search space cannot be, found before anything is trained."""

import itertools
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

from brqat.study.space import overrides_of

MOST = 32  # settings that are tried out, and surroundings of a value
FEW = 8  # whole numbers of a range that are all tried
NEAR = 0.01  # how far inside of a range of real numbers its ends are tried: the very end is hardly ever drawn


class Rehearsal(NamedTuple):
    refused: str | None  # why the space cannot be searched
    doubtful: list[tuple[str, str]]  # settings that cannot be, though their values go with others; and why


def rehearse(
    distributions: Mapping[str, BaseDistribution],
    controls: Sequence[Mapping[str, Any]],
    why_not: Callable[[Mapping[str, Any]], str | None],
) -> Rehearsal:
    """Tries out the controls and settings of the space, as many as MOST.

    A value is refused if it cannot be with any of the others, all of which were tried; one that does not go with some
    is doubtful, since the rest of the space may be worth its trials. why_not: why a setting cannot be; None if it can.
    """
    tried = [(setting, why_not(setting)) for setting in probes(distributions)]
    if tried and all(why for _, why in tried):  # not a value's fault: data that are missing, or all of them
        return Rehearsal(tried[0][1], [])
    said = [why_not(control) for control in controls]
    if said and all(said):
        return Rehearsal(f"{' '.join(overrides_of(controls[0]))} is the control, but {said[0]}", [])
    values = _tried(distributions)
    doubtful = [(control, why) for control, why in zip(controls, said, strict=True) if why]
    for setting, why in tried:
        if why is None:
            continue
        never = {key: value for key, value in setting.items() if _never(key, value, values, why_not)}
        if never:
            return Rehearsal(f"{' '.join(overrides_of(never))} is in the search space, but {why}", [])
        doubtful.append((setting, why))
    return Rehearsal(None, [(" ".join(overrides_of(setting)), why) for setting, why in doubtful])


def probes(distributions: Mapping[str, BaseDistribution]) -> list[dict[str, Any]]:
    """Settings over every choice, and values within every range: all of them, or MOST in which each value appears."""
    values = _tried(distributions)
    if not values:
        return []
    if math.prod(map(len, values.values())) <= MOST:
        return list(_product(values))
    longest = max(map(len, values.values()))
    found = [{key: row[index % len(row)] for key, row in values.items()} for index in range(longest)]
    draw = random.Random(0)
    while len(found) < MOST:
        found.append({key: draw.choice(row) for key, row in values.items()})
    return found


def _never(key: str, value: Any, values: Mapping[str, list], why_not: Callable) -> bool:
    """Whether a value cannot be, whatever the others. False where they are too many to try all."""
    others = {name: row for name, row in values.items() if name != key}
    if math.prod(map(len, others.values())) > MOST:
        return False
    return all(why_not({key: value, **rest}) for rest in _product(others))


def _product(values: Mapping[str, list]) -> Iterator[dict[str, Any]]:
    for row in itertools.product(*values.values()):
        yield dict(zip(values, row, strict=True))


def _tried(distributions: Mapping[str, BaseDistribution]) -> dict[str, list]:
    """Of each key every choice, or values from its range: both sides and the middle, or all whole numbers if few."""
    found = {}
    for key, range_ in distributions.items():
        if isinstance(range_, CategoricalDistribution):
            found[key] = list(range_.choices)
        elif isinstance(range_, FloatDistribution) and range_.step is None:
            found[key] = list(dict.fromkeys(_inside(range_)))
        else:
            steps = round((range_.high - range_.low) / (range_.step or 1))
            every = [range_.low + number * (range_.step or 1) for number in range(steps + 1)]
            found[key] = every if len(every) <= FEW else [every[0], every[len(every) // 2], every[-1]]
    return found


def _inside(range_: FloatDistribution) -> list[float]:
    """Values near the ends and in the middle, on the axis that the range is drawn from."""
    if range_.log:
        low, high = math.log(range_.low), math.log(range_.high)
        return [math.exp(low + share * (high - low)) for share in (NEAR, 0.5, 1 - NEAR)]
    return [range_.low + share * (range_.high - range_.low) for share in (NEAR, 0.5, 1 - NEAR)]
