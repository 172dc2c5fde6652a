"""The programs on the page about faults run, one after the other, on a small network."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import tdlrt_jax
from tdlrt_jax.status import SKIPPED
from tests.helpers import orthonormality

PAGE = Path(__file__).resolve().parents[2] / "docs" / "faults.md"


def test_the_page_runs(capsys):
    def loss_fn(params, images, labels):
        error = tdlrt_jax.tucker_linear(images, params["kernel"]) + params["bias"] - labels
        return jnp.mean(error**2)

    weights, images = jax.random.normal(jax.random.key(0), (6, 5)), jax.random.normal(jax.random.key(1), (8, 6))
    params = {"kernel": tdlrt_jax.hosvd(weights, rank=3), "bias": jnp.zeros(5)}
    tx = tdlrt_jax.tdlrt(optax.sgd(0.1), tolerance=0.1)
    page = {
        "jax": jax,
        "jnp": jnp,
        "optax": optax,
        "tdlrt_jax": tdlrt_jax,
        "loss_fn": loss_fn,
        "params": params,
        "opt_state": tx.init(params),
        "step": tdlrt_jax.tdlrt_step(loss_fn, tx),
        "images": images.at[0, 0].set(jnp.nan),
        "labels": jnp.ones((8, 5)),
        "batches": [(images, jnp.ones((8, 5))), (images * jnp.inf, jnp.ones((8, 5))), (images, jnp.ones((8, 5)))],
    }
    programs = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(programs) == 4
    for program in programs:
        exec(program, page)
    assert "was not finite" in capsys.readouterr().out
    assert page["scale"] == 2.0**14 and int(page["info"].status) & SKIPPED == 0 and np.isfinite(page["info"].loss)
    assert int(page["state"].step) == 2
    assert page["params"]["kernel"].core.dtype == page["params"]["bias"].dtype == jnp.bfloat16
    assert orthonormality(page["params"]["kernel"]) < 2e-6
