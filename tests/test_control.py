"""What decides the ranks of a step: rules for single layers, frozen ranks, and their errors."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tdlrt_jax
from tdlrt_jax import Budget, tdlrt, tdlrt_step
from tests.helpers import regression


def run(steps, **options):
    """Ranks of both kernels after every step."""
    params, loss = regression(rank=(4, None, 6), capacity=(4, 3, 6))
    options = {"tolerance": 0.3, **options}
    tx = tdlrt(optax.sgd(0.02, momentum=0.9), **options)
    step, state = tdlrt_step(loss, tx, donate=False), tx.init(params)
    history = []
    for _ in range(steps):
        params, state, info = step(params, state)
        history.append({name: np.asarray(rank).tolist() for name, rank in info.rank.items()})
    return history, params, state


def test_a_rule_has_its_own_tolerance_and_leaves_the_others_alone():
    plain, *_ = run(4)
    ruled, *_ = run(4, rules={"first$": {"tolerance": 0.0}})
    assert ruled[0]["first/kernel"] == [4, 3, 6] != plain[0]["first/kernel"]
    assert ruled[0]["second/kernel"] == plain[0]["second/kernel"]
    same, *_ = run(4, rules={"first$": {"tolerance": 0.3}})
    assert same == plain


def test_a_rule_has_its_own_bounds_criterion_and_spare_directions():
    history, *_ = run(3, rules={"first": {"max_rank": (2, 3, 2)}, "second": {"min_rank": 2, "spare": 1}})
    assert all(ranks["first/kernel"][0] <= 2 and ranks["first/kernel"][2] <= 2 for ranks in history)
    assert all(min(ranks["second/kernel"]) >= 2 for ranks in history)


def test_what_only_conversion_reads_is_no_obstacle():
    plain, *_ = run(2)
    ruled, *_ = run(2, rules={"first": {"rank": 0.5, "weights": "fresh"}, "second": None})
    assert ruled == plain


def test_rules_that_decide_nothing_or_are_misspelled():
    params, _ = regression()
    with pytest.raises(ValueError, match="'third' is found in no layer's path"):
        tdlrt(optax.sgd(0.1), tolerance=0.1, rules={"third": 2}).init(params)
    with pytest.raises(ValueError, match=r"tolerence.*did you mean 'tolerance'"):
        tdlrt(optax.sgd(0.1), tolerance=0.1, rules={"first": {"tolerence": 0.1}})
    with pytest.raises(ValueError, match=r"first/kernel.*2 entries"):
        tdlrt(optax.sgd(0.1), tolerance=0.1, rules={"first": {"max_rank": (2, 2)}}).init(params)
    with pytest.raises(ValueError, match="freeze_after=-1"):
        tdlrt(optax.sgd(0.1), tolerance=0.1, freeze_after=-1)


@pytest.mark.parametrize("integrator", ["bug", "parallel"])
def test_frozen_ranks_stay_while_bases_move(integrator):
    params, loss = regression(rank=(4, None, 6), capacity=(4, 3, 6))
    tx = tdlrt(optax.sgd(0.02, momentum=0.9), tolerance=0.3, integrator=integrator, freeze_after=2)
    step, state = tdlrt_step(loss, tx, donate=False), tx.init(params)
    ranks, losses, bases = [], [], []
    for _ in range(8):
        params, state, info = step(params, state)
        ranks.append([np.asarray(rank).tolist() for rank in info.rank.values()])
        losses.append(float(info.loss))
        bases.append(jax.tree.leaves([node["kernel"].factors for node in params.values()]))
    assert ranks[1] != [[4, 3, 6], [2, 2]]
    assert all(later == ranks[1] for later in ranks[2:])
    assert losses[-1] < losses[2]
    turned = [np.abs(u @ u.T - v @ v.T).max() for u, v in zip(bases[2], bases[-1])]
    assert max(turned) > 1e-3


def test_frozen_from_the_start_every_rank_stays():
    history, *_ = run(3, freeze_after=0, tolerance=0.9)
    assert all(ranks == {"first/kernel": [4, 3, 6], "second/kernel": [2, 2]} for ranks in history)


def test_a_rule_s_tolerance_is_kept_out_of_a_budget():
    rules = {"second": {"tolerance": 0.0}}
    history, _, state = run(12, tolerance=Budget(0.3, steps=6, every=1), rules=rules)
    # Nothing of it is ever cut, and its ranks rise to all there is; the other kernel makes room.
    assert history[-1]["second/kernel"] == [5, 5]
    assert np.prod(history[-1]["first/kernel"]) < 4 * 3 * 6
    assert float(state.tolerance) > 0


def test_only_a_budget_adds_leaves_to_the_state():
    """Checkpoints of runs without one keep their form."""
    params, _ = regression()
    plain = tdlrt(optax.sgd(0.1), tolerance=0.1).init(params)
    assert jax.tree.leaves(plain.budget) == []
    budget = tdlrt(optax.sgd(0.1), tolerance=Budget(0.2, steps=5)).init(params).budget
    assert {name: ceiling.dtype for name, ceiling in budget.ceiling.items()} == {
        "first/kernel": jnp.int32,
        "second/kernel": jnp.int32,
    }


def test_rules_for_what_another_part_of_a_partition_moves_are_known():
    """They are those that tuckerize was given as well; misspelled ones are found all the same."""
    kernel = tdlrt_jax.hosvd(jnp.ones((6, 5)), rank=1)
    params = {"conv": {"kernel": kernel}, "head": {"kernel": jnp.ones((5, 3)), "bias": jnp.zeros(3)}}
    labels = {"conv": {"kernel": "tucker"}, "head": {"kernel": "rest", "bias": "rest"}}

    def init(rules):
        inner = tdlrt_jax.tdlrt(optax.sgd(0.1), tolerance=0.1, rules=rules)
        return optax.partition({"tucker": inner, "rest": optax.sgd(0.1)}, labels).init(params)

    init({"head": "dense", "conv": 0.5})
    with pytest.raises(ValueError, match="'haed' is found in no layer's path"):
        init({"haed": "dense"})
