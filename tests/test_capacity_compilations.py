"""How often capacities change: a network decides as a whole, and the number of compilations is bounded."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tdlrt_jax import TuckerTensor, fit_capacity, resize
from tdlrt_jax.capacity import full_kernels
from tdlrt_jax.ranks import max_capacity
from tdlrt_jax.tucker import parameter_count

SHAPES = {"first": (3, 3, 4, 40), "second": (24, 40), "third": (3, 16, 24)}
WHOLE = {"first": (True, True, False, False), "second": (False, False), "third": (True, False, False)}


def kernel_of(shape, rank, size, whole):
    """A kernel with given ranks and capacities, of unit vectors: all that a capacity depends on."""
    factors = [None if w else np.eye(n, c) * (np.arange(c) < r) for n, r, c, w in zip(shape, rank, size, whole)]
    return TuckerTensor(np.zeros(size), tuple(factors))


def network(ranks, sizes):
    """The three kernels with the given ranks and capacities."""
    return {name: kernel_of(shape, ranks[name], sizes[name], WHOLE[name]) for name, shape in SHAPES.items()}


def useful(ranks):
    """Ranks as a truncation leaves them: whole modes whole, ``r_i <= prod_{j != i} r_j``."""
    return {
        name: lowered(name, [n if w else min(n, r) for n, r, w in zip(shape, ranks[name], WHOLE[name])])
        for name, shape in SHAPES.items()
    }


def lowered(name, sizes):
    return tuple(n if w else s for n, w, s in zip(SHAPES[name], WHOLE[name], max_capacity(SHAPES[name], sizes)))


def stored(sizes):
    return sum(parameter_count(SHAPES[name], sizes[name], WHOLE[name]) for name in SHAPES)


def most_changes(first, multiple, headroom, hysteresis):
    """The bound of ``fit_capacity``'s docstring, for arrays that shrink while ranks fall."""
    ones = useful({name: (1,) * len(shape) for name, shape in SHAPES.items()})
    units = {name: [multiple if n >= 2 * multiple else 1 for n in shape] for name, shape in SHAPES.items()}
    fitting = {name: [max(r, math.ceil(headroom / u) * u) for r, u in zip(ones[name], units[name])] for name in SHAPES}
    least = {name: lowered(name, [min(f, c) for f, c in zip(first[name], fitting[name])]) for name in SHAPES}
    return math.log(stored(first) / stored(least)) / math.log(1 / hysteresis)


RANKS = st.fixed_dictionaries({name: st.tuples(*[st.integers(1, n) for n in shape]) for name, shape in SHAPES.items()})
OPTIONS = st.fixed_dictionaries(
    {
        "multiple": st.sampled_from([1, 4, 8]),
        "headroom": st.sampled_from([1.1, 1.5]),
        "hysteresis": st.sampled_from([0.5, 0.75, 0.9]),
    }
)


@settings(max_examples=200)
@given(start=RANKS, falls=st.lists(st.lists(st.integers(0, 3), min_size=9, max_size=9), max_size=12), options=OPTIONS)
def test_changes_are_bounded_while_ranks_fall(start, falls, options):
    """Arrays are filled at first, which is the one case in which falling ranks can make them grow."""
    ranks = useful(start)
    sizes, changes = dict(ranks), []
    for fall in [[0] * 9, *falls]:
        flat = iter(fall)
        ranks = useful({name: [max(1, r - next(flat)) for r in ranks[name]] for name in SHAPES})
        wanted = fit_capacity(network(ranks, sizes), **options)
        if wanted != sizes:
            changes.append(wanted)
            assert len(changes) == 1 or stored(wanted) < options["hysteresis"] * stored(sizes)
            sizes = wanted
    grew = bool(changes) and any(
        new > old for name in SHAPES for new, old in zip(changes[0][name], useful(start)[name])
    )
    first = changes[0] if grew else useful(start)
    assert len(changes) - grew <= most_changes(first, **options)


@settings(max_examples=200)
@given(history=st.lists(RANKS, min_size=1, max_size=8), start=RANKS, options=OPTIONS)
def test_every_change_has_its_reason_and_is_final(history, start, options):
    """Ranks that jump to and fro: each change saves enough or makes room, and until ranks move there is no other."""
    sizes = useful(start)
    set_at = {name: [None] * len(size) for name, size in sizes.items()}  # ranks when the arrays got their sizes
    limits = {name: max_capacity(shape) for name, shape in SHAPES.items()}
    for jump in history:
        # Training never exceeds its arrays.
        ranks = useful({name: [min(r, c) for r, c in zip(jump[name], sizes[name])] for name in SHAPES})
        params = network(ranks, sizes)
        full = full_kernels(params)
        wanted = fit_capacity(params, **options)
        for name in SHAPES:
            assert wanted[name] == lowered(name, wanted[name]), "capacities are useful ones"
            assert all(r <= size for r, size in zip(ranks[name], wanted[name])), "and hold the ranks"
        if wanted != sizes:
            assert full or stored(wanted) < options["hysteresis"] * stored(sizes)
            for name in full:
                modes = zip(ranks[name], sizes[name], set_at[name], limits[name])
                filled = [(r, before) for r, size, before, limit in modes if r >= size < limit]
                assert all(before is None or r >= options["headroom"] * before - 1e-9 for r, before in filled)
            assert full_kernels(network(ranks, wanted)) == []
            for name in SHAPES:
                for mode, (size, new) in enumerate(zip(sizes[name], wanted[name])):
                    if size != new:
                        set_at[name][mode] = ranks[name][mode]
            sizes = wanted
        assert fit_capacity(network(ranks, sizes), **options) == sizes
        if not full:
            assert fit_capacity(params, **options, grow=False) == wanted


def test_thirteen_layers_that_each_change_a_little_compile_seldom():
    """The convolutions of a VGG16 whose ranks fall at different times: by itself every layer would compile the step anew."""
    widths = [3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
    shapes = {f"conv{i}": (3, 3, *pair) for i, pair in enumerate(itertools.pairwise(widths))}
    rng = np.random.default_rng(0)
    sizes = {name: max_capacity(shape) for name, shape in shapes.items()}
    alone, together = dict(sizes), dict(sizes)
    alone_changes = together_changes = 0
    pace = {name: rng.uniform(0.03, 0.15) for name in shapes}
    for epoch in range(1, 31):
        ranks = {
            name: max_capacity(shape, [max(1, round(n * math.exp(-pace[name] * epoch))) for n in shape])
            for name, shape in shapes.items()
        }

        def kernels(present, ranks=ranks):
            whole = (False,) * 4
            return {name: kernel_of(shape, ranks[name], present[name], whole) for name, shape in shapes.items()}

        wanted = {name: fit_capacity({name: kernel})[name] for name, kernel in kernels(alone).items()}
        alone_changes += wanted != alone
        alone = wanted
        wanted = fit_capacity(kernels(together))
        together_changes += wanted != together
        together = wanted

    def total(present):
        return sum(parameter_count(shape, present[name]) for name, shape in shapes.items())

    least = fit_capacity({name: kernel_of(s, (1,) * 4, sizes[name], (False,) * 4) for name, s in shapes.items()})
    assert together_changes <= math.log(total(sizes) / total(least)) / math.log(1 / 0.75)
    assert alone_changes >= 20 and together_changes <= alone_changes / 2
    assert total(together) <= total(alone) / 0.75, "and the arrays follow as closely"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"headroom": 0.9}, r"headroom=0.9 must be 1 or more"),
        ({"multiple": 0}, r"multiple=0 must be a number of columns"),
        ({"hysteresis": 0.0}, r"hysteresis=0.0: expected a fraction in \(0, 1\]"),
        ({"hysteresis": 1.5}, r"hysteresis=1.5: expected a fraction in \(0, 1\]"),
        (
            {"max_rank": {"fourth": (3, 3)}},
            r"max_rank names 'fourth', which is no kernel's path; the paths are \['first'",
        ),
        ({"max_rank": {"second": (3, 3, 3)}}, r"max_rank\['second'\]=\(3, 3, 3\) has 3 entries"),
    ],
)
def test_options_that_cannot_work_are_refused(options, words):
    ranks = useful({name: (2,) * len(shape) for name, shape in SHAPES.items()})
    with pytest.raises(ValueError, match=words):
        fit_capacity(network(ranks, ranks), **options)


def test_full_kernels_are_those_that_could_grow():
    ranks = useful({"first": (3, 3, 4, 9), "second": (2, 2), "third": (3, 16, 24)})
    params = network(ranks, {"first": (3, 3, 4, 12), "second": (2, 2), "third": (3, 16, 24)})
    assert full_kernels(params) == ["second"], "the first has room, the third its whole size"
    assert full_kernels(params, max_rank={"second": (2, 2)}) == []
    wanted = fit_capacity(params)
    assert wanted["second"] == (8, 8)
    assert full_kernels(resize(params, wanted)) == []
