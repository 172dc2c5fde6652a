"""Rules: what a user wants for which layer, one object for the conversion of a model and for its training.

A mapping from regular expressions to ranks, tolerances and bounds. ``tuckerize`` reads from it which layers become Tucker
layers and with what capacity, ``tdlrt`` how each of them is truncated. The first pattern that is found in a layer's path
decides, so exceptions come first.
"""

from __future__ import annotations

import dataclasses
import difflib
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from tdlrt_jax.initialization import INITIALIZATIONS, Rank
from tdlrt_jax.ranks import DEFAULT_POLICY, Convention, Criterion, RankPolicy, check_policy, check_tolerance, per_mode

__all__ = ["Rule", "check_rules_match", "layer_path", "parse_rules", "rule_for"]

WEIGHTS = ("hosvd", "fresh", *(name for name in INITIALIZATIONS if name != "hosvd"))


@dataclasses.dataclass(frozen=True)
class Rule:
    """What is wanted for the layers that a pattern finds; ``None`` leaves a matter to the optimizer.

    Args:
      rank: the capacity, as in :func:`tdlrt_jax.initialization.kernel_rank`: a count, a fraction, one entry a mode, or
        ``None`` for full ranks (for what the tolerance finds, where present weights are converted with one).
      weights: what a converted layer starts from. ``"hosvd"``: its present weights; ``"fresh"`` (the same as
        ``"dense"``), ``"normalized"`` or ``"spectral"``: new ones, as by the layer's ``initialization`` of that name; or a
        function such as these.
      dense: leave the layer as it is.
      tolerance: the layer's own ``tau``. When present weights are converted, also the relative tolerance of their HOSVD:
        within the capacity that ``rank`` gives, or else it sets the capacity.
      criterion, convention, spare: see :class:`tdlrt_jax.RankPolicy`.
      min_rank, max_rank: bounds on the ranks, one for all modes or one a mode. Capacities are not larger than
        ``max_rank``.

    Raises:
      ValueError: for values that cannot work on any layer.

    Example:
      >>> Rule(rank=0.25, max_rank=[3, 3, 32, 32]).max_rank
      (3, 3, 32, 32)
    """

    rank: Rank = None
    weights: str | Callable[..., Any] = "hosvd"
    dense: bool = False
    tolerance: float | None = None
    criterion: Criterion | None = None
    convention: Convention | None = None
    spare: int | None = None
    min_rank: int | tuple[int, ...] | None = None
    max_rank: int | tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "rank", _checked_rank(self.rank))
        for name, least in (("spare", 0), ("min_rank", 1), ("max_rank", 1)):
            object.__setattr__(self, name, _checked_counts(getattr(self, name), name, least))
        if not isinstance(self.dense, bool):
            raise ValueError(f"dense={self.dense!r}: expected True or False")
        if self.dense:
            others = [
                f.name for f in dataclasses.fields(self) if f.name != "dense" and getattr(self, f.name) != f.default
            ]
            if others:
                raise ValueError(
                    f"dense=True leaves a layer as it is, so {others[0]} beside it means nothing: drop one"
                )
        if not callable(self.weights) and self.weights not in WEIGHTS:
            raise ValueError(
                f"weights={self.weights!r} is unknown: expected one of {WEIGHTS}, or a function "
                "(key, shape, rank, *, norm, dtype) -> TuckerTensor"
            )
        if self.tolerance is not None:
            if isinstance(self.tolerance, bool) or not isinstance(self.tolerance, int | float | np.number):
                raise ValueError(f"tolerance={self.tolerance!r}: expected a number")
            # Without a convention of its own the rule has the optimizer's, under which a tolerance may be absolute.
            check_tolerance(float(self.tolerance), self.convention or "absolute")
        bounds = [bound for bound in (self.min_rank, self.max_rank) if isinstance(bound, tuple)]
        order = len(bounds[0]) if bounds else 2
        check_policy(self.policy(order), order)

    def policy(self, order: int, default: RankPolicy = DEFAULT_POLICY) -> RankPolicy:
        """The rank policy of a kernel with ``order`` modes; what the rule leaves open is that of ``default``."""
        own = {name: getattr(self, name, None) for name in RankPolicy._fields}
        policy = default._replace(**{name: value for name, value in own.items() if value is not None})
        return policy._replace(
            min_rank=per_mode(policy.min_rank, order, "min_rank"), max_rank=per_mode(policy.max_rank, order, "max_rank")
        )


KEYS = tuple(field.name for field in dataclasses.fields(Rule))


def parse_rules(rules: Mapping[str, Any]) -> tuple[tuple[str, Rule], ...]:
    """The rules that a user wrote, checked as far as they can be without a model.

    Args:
      rules: from a regular expression, searched for in layers' paths (``"conv1"``, ``"blocks/0/conv"``), to ``"dense"``
        (leave the layer dense), a rank (see :class:`Rule`), a mapping with some of the fields of :class:`Rule`, or a
        :class:`Rule`.

    Returns:
      ``(pattern, rule)`` pairs in the order given.

    Raises:
      ValueError: naming the pattern, for an invalid expression, an unknown key, or a value that cannot work.

    Example:
      >>> rules = parse_rules({"head": "dense", "conv1": 8, "conv": {"rank": 0.5, "tolerance": 0.1}})
      >>> [(pattern, rule.dense, rule.rank) for pattern, rule in rules]
      [('head', True, None), ('conv1', False, 8), ('conv', False, 0.5)]
    """
    if not isinstance(rules, Mapping):
        raise ValueError(
            f"rules must be a mapping from patterns to ranks or options, got {type(rules).__name__}: "
            'write {".*": 0.5} for one rank everywhere'
        )
    return tuple((_checked_pattern(pattern), _parse_rule(pattern, wanted)) for pattern, wanted in rules.items())


def rule_for(parsed: Sequence[tuple[str, Rule]], path: str) -> Rule | None:
    """The rule of the layer at ``path``: the first whose pattern is found in it, ``None`` if there is none.

    A kernel's path is taken to its layer's by :func:`layer_path`.

    Example:
      >>> parsed = parse_rules({"conv1$": 8, "conv": 0.5})
      >>> rule_for(parsed, "conv1").rank, rule_for(parsed, "blocks/0/conv").rank, rule_for(parsed, "head")
      (8, 0.5, None)
    """
    return next((rule for pattern, rule in parsed if re.search(pattern, path)), None)


def check_rules_match(parsed: Sequence[tuple[str, Rule]], paths: Iterable[str]) -> None:
    """Raises ``ValueError`` for a rule that decides nothing: a misspelled pattern, or one that stands too late.

    Args:
      parsed: of :func:`parse_rules`.
      paths: of all layers, those that stay dense included.
    """
    paths = list(paths)
    earlier: list[tuple[str, set[str]]] = []
    for pattern, _ in parsed:
        found = {path for path in paths if re.search(pattern, path)}
        if not found:
            raise ValueError(f"rules: the pattern {pattern!r} is found in no layer's path; the paths are {paths}")
        for general, taken in earlier:
            # A pattern for all the rest that finds nothing left is no mistake.
            if found < taken:
                raise ValueError(
                    f"rules: the pattern {pattern!r} never decides, since {general!r} stands before it and is found in the "
                    "same paths: the first one found wins, so put the exception first"
                )
        earlier.append((pattern, found))


def layer_path(kernel_path: str) -> str:
    """The path of a layer from that of its kernel in a tree of parameters; other paths stay.

    Example:
      >>> layer_path("blocks/0/conv/kernel"), layer_path("conv1/kernel/value"), layer_path("kernel"), layer_path("w")
      ('blocks/0/conv', 'conv1', '', 'w')
    """
    return re.sub(r"(^|/)kernel(/value)?$", "", kernel_path)


def _parse_rule(pattern: str, wanted: Any) -> Rule:
    try:
        if isinstance(wanted, Rule):
            return wanted
        if isinstance(wanted, str):
            if wanted != "dense":
                raise ValueError(f'{wanted!r} is unknown: expected "dense", a rank, or a mapping of options')
            return Rule(dense=True)
        if not isinstance(wanted, Mapping):
            return Rule(rank=wanted)
        for key in wanted:
            if key not in KEYS:
                close = difflib.get_close_matches(str(key), KEYS, n=1)
                hint = f" (did you mean {close[0]!r}?)" if close else ""
                raise ValueError(f"the key {key!r} is unknown{hint}: expected some of {KEYS}")
        return Rule(**wanted)
    except ValueError as error:
        raise ValueError(f"rules[{pattern!r}]: {error}") from None


def _checked_pattern(pattern: Any) -> str:
    if not isinstance(pattern, str):
        raise ValueError(f"rules: the pattern {pattern!r} must be a string, a regular expression on layers' paths")
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"rules: the pattern {pattern!r} is no regular expression ({error}); re.escape takes a path literally"
        ) from None
    return pattern


def _checked_rank(rank: Any) -> Rank:
    """A rank with plain numbers; raises ``ValueError`` for what no kernel can have."""
    if isinstance(rank, Sequence | np.ndarray) and not isinstance(rank, str):
        return tuple(_checked_entry(entry) for entry in rank)
    return _checked_entry(rank)


def _checked_entry(entry: Any) -> int | float | None:
    if entry is None:
        return None
    if isinstance(entry, float | np.floating):
        if not 0 < entry <= 1:
            raise ValueError(
                f"rank={entry}: a float is a fraction of a mode's size, in (0, 1]; write an int for a count"
            )
        return float(entry)
    return _checked_count(entry, "rank", 1, "expected a count, a fraction in (0, 1], or one of these (or None) a mode")


def _checked_counts(value: Any, name: str, least: int) -> Any:
    """One integer or, for the bounds, a tuple with one a mode; ``None`` passes."""
    if value is None:
        return None
    if isinstance(value, Sequence) and not isinstance(value, str) and name != "spare":
        return tuple(_checked_count(entry, name, least) for entry in value)
    return _checked_count(value, name, least)


def _checked_count(value: Any, name: str, least: int, expected: str | None = None) -> int:
    try:
        count = operator.index(value)
    except TypeError:
        count = least - 1
    if isinstance(value, bool) or count < least:
        raise ValueError(f"{name}={value!r}: " + (expected or f"expected an integer, {least} or more"))
    return count
