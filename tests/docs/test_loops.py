"""The programs on the page about loops run, one after the other, and do what it says."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import tdlrt_jax
from tdlrt_jax.nn import TuckerLinear

PAGE = Path(__file__).resolve().parents[2] / "docs" / "loops.md"


def test_the_page_runs(tmp_path):
    def loss_fn(params, images, labels):
        error = tdlrt_jax.tucker_linear(images, params["kernel"]) + params["bias"] - labels
        return jnp.mean(error**2)

    weights, images = jax.random.normal(jax.random.key(0), (6, 5)), jax.random.normal(jax.random.key(1), (8, 6))
    page = {
        "loss_fn": loss_fn,
        "params": {"kernel": tdlrt_jax.hosvd(weights, rank=4), "bias": jnp.zeros(5)},
        "model": TuckerLinear(6, 5, rank=4, rngs=nnx.Rngs(0)),
        "images": images,
        "labels": jnp.ones((8, 5)),
        "directory": tmp_path,
    }
    rates, models, saving, frozen, search = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)

    exec(rates, page)
    assert float(page["opt_state"].inner.hyperparams["learning_rate"]) == np.float32(0.01)
    assert int(page["opt_state"].step) == 2 and page["step"]._cache_size() == 1, "nothing is compiled anew"

    exec(models, page)
    found = page["optimizer"].opt_state.inner.hyperparams["learning_rate"].get_value()
    assert float(found) == np.float32(0.01) and int(page["info"].status) == 0

    exec(saving, page)
    assert page["metadata"] == {"epoch": 1}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["functions", "model"]

    before = tdlrt_jax.to_dense(page["params"]["kernel"])
    exec(frozen, page)
    np.testing.assert_allclose(tdlrt_jax.to_dense(page["params"]["kernel"]), before, atol=1e-6)
    assert np.any(page["params"]["bias"] != 0)

    exec(search, page)
    assert float(loss_fn(page["params"], images, page["labels"])) < float(page["value"])
