"""Rules: what is parsed, which one decides, and what is refused."""

import re

import numpy as np
import pytest

from tdlrt_jax import RankPolicy
from tdlrt_jax.rules import Rule, check_rules_match, layer_path, parse_rules, rule_for


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ("dense", Rule(dense=True)),
        (8, Rule(rank=8)),
        (np.int64(8), Rule(rank=8)),
        (0.25, Rule(rank=0.25)),
        (None, Rule()),
        ([3, None, np.float32(0.5)], Rule(rank=(3, None, 0.5))),
        ({"rank": 4, "tolerance": 0.1}, Rule(rank=4, tolerance=0.1)),
        ({"min_rank": [1, 2], "max_rank": 3, "spare": 1}, Rule(min_rank=(1, 2), max_rank=3, spare=1)),
        ({"tolerance": 5.0}, Rule(tolerance=5.0)),  # may be meant with the optimizer's convention "absolute"
        (Rule(weights="fresh"), Rule(weights="fresh")),
    ],
)
def test_every_way_to_write_a_rule(wanted, expected):
    ((pattern, rule),) = parse_rules({"conv": wanted})
    assert pattern == "conv"
    assert rule == expected
    hash(rule)


def test_the_first_pattern_found_decides():
    parsed = parse_rules({r"^blocks/0/": "dense", "conv$": 4, "conv": 8})
    assert rule_for(parsed, "blocks/0/conv").dense
    assert rule_for(parsed, "blocks/10/conv").rank == 4
    assert rule_for(parsed, "conv1").rank == 8
    assert rule_for(parsed, "head") is None
    assert rule_for(parse_rules({".*": 1}), "") == Rule(rank=1)  # a model that is one layer


def test_policies_are_the_rules_where_they_say_something_and_the_defaults_elsewhere():
    default = RankPolicy("each", "per_mode", 2, 3, 9)
    assert Rule().policy(3, default) == RankPolicy("each", "per_mode", 2, (3, 3, 3), (9, 9, 9))
    rule = Rule(criterion="tail", convention="absolute", spare=0, min_rank=1, max_rank=(2, 2, 2))
    assert rule.policy(3, default) == RankPolicy("tail", "absolute", 0, (1, 1, 1), (2, 2, 2))
    with pytest.raises(ValueError, match=r"max_rank=\(2, 2, 2\) has 3 entries for a kernel with 4 modes"):
        rule.policy(4)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("densee", 'expected "dense"'),
        ({"tolerence": 0.1}, "did you mean 'tolerance'"),
        ({"qqq": 0.1}, "key 'qqq' is unknown: expected some of ('rank', 'weights'"),
        (0, "rank=0"),
        (True, "rank=True"),
        (1.5, "rank=1.5: a float is a fraction"),
        ([2, 0.0], "rank=0.0"),
        ([[2], 3], "rank=[2]"),
        (object, "rank=<class 'object'>"),
        ({"weights": "kaiming"}, "weights='kaiming' is unknown"),
        ({"tolerance": -0.1}, "tolerance=-0.1"),
        ({"tolerance": "0.1"}, "tolerance='0.1'"),
        ({"tolerance": 1.0, "convention": "shared"}, "a relative tolerance is below 1"),
        ({"criterion": "all"}, "criterion='all' is unknown"),
        ({"convention": "none"}, "convention='none' is unknown"),
        ({"spare": -1}, "spare=-1"),
        ({"spare": [1, 1]}, "spare=[1, 1]"),
        ({"min_rank": 0}, "min_rank=0"),
        ({"min_rank": 3, "max_rank": 2}, "max_rank=2 for mode 0 is below its min_rank=3"),
        ({"min_rank": [1, 1], "max_rank": [2, 2, 2]}, "max_rank=(2, 2, 2) has 3 entries"),
        ({"dense": True, "rank": 3}, "rank beside it"),
        ({"dense": 1}, "dense=1"),
    ],
)
def test_what_cannot_work_is_refused_at_once_naming_the_pattern(wanted, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        parse_rules({"conv": wanted})
    assert "rules['conv']" in str(error.value)


def test_patterns_and_mappings_that_are_none():
    with pytest.raises(ValueError, match=r"'\(' is no regular expression"):
        parse_rules({"(": 1})
    with pytest.raises(ValueError, match="pattern 3 must be a string"):
        parse_rules({3: 1})
    with pytest.raises(ValueError, match="must be a mapping"):
        parse_rules(0.5)


def test_rules_that_decide_nothing_are_mistakes():
    paths = ["conv1", "conv2", "head"]
    check_rules_match(parse_rules({"conv1": 1, "conv": 2, ".*": "dense"}), paths)
    check_rules_match(parse_rules({"conv": 1, "conv.$": 2}), paths)  # the same layers: perhaps elsewhere more
    with pytest.raises(
        ValueError, match=r"'convolution' is found in no layer's path; the paths are \['conv1', 'conv2'"
    ):
        check_rules_match(parse_rules({"conv": 1, "convolution": 2}), paths)
    with pytest.raises(ValueError, match="'conv1' never decides, since 'conv' stands before it"):
        check_rules_match(parse_rules({"conv": 1, "conv1": 2}), paths)


def test_layers_paths_from_kernels():
    assert [layer_path(path) for path in ("a/kernel", "a/kernel/value", "kernel", "a/kernels", "a/b", "mykernel")] == [
        "a", "a", "", "a/kernels", "a/b", "mykernel"
    ]  # fmt: skip
