"""Networks as bytes: what comes back predicts the same, here and without this package; damage is noticed."""

import functools
import subprocess
import sys
import textwrap

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tdlrt_jax import export
from tdlrt_jax.models import LeNet5
from tdlrt_jax.nn import TuckerConv, TuckerLinear, tdlrt


class Net(nnx.Module):
    """A convolution, statistics, a random layer, and a linear layer."""

    def __init__(self, rngs):
        self.conv = TuckerConv(3, 8, (3, 3), rank=2, strides=2, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.linear = TuckerLinear(8 * 9, 5, rank=3, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv(x)))
        return self.linear(self.dropout(x).reshape(x.shape[0], -1))


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(1), (4, 6, 6, 3), "float32")


@pytest.fixture(scope="module")
def model(x):
    model = Net(nnx.Rngs(0))
    model(x)  # moves the statistics
    model.eval()
    return model


@pytest.fixture(scope="module")
def data(model, x):
    return export.serialize(model, x[:1])


def assert_close(found, expected):
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape and np.linalg.norm(expected) > 0.1
    assert np.linalg.norm(found - expected) <= 1e-5 * np.linalg.norm(expected)


def test_it_predicts_the_same_for_any_batch_on_both_platforms(model, data, x):
    program = export.deserialize(data)
    assert program.platforms == ("cpu", "cuda") and program.inputs == ("float32[batch,6,6,3]",)
    for batch in (1, 4):
        assert_close(program(x[:batch]), model(x[:batch]))
    with pytest.raises(ValueError, match=r"(?i)shape"):
        program(x[:, :5])


def test_a_fresh_process_without_this_package_runs_it(model, data, x, tmp_path):
    (tmp_path / "model").write_bytes(data)
    np.savez(tmp_path / "arrays.npz", x=x)
    script = """
        import sys

        class Blocked:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in ("tdlrt_jax", "flax"):
                    raise ImportError(f"{name} is blocked")

        sys.meta_path.insert(0, Blocked())
        try:
            import tdlrt_jax
        except ImportError:
            pass
        else:
            sys.exit("the package is not blocked")
        import jax.export, numpy as np

        exported = jax.export.deserialize(bytearray(open(sys.argv[1] + "/model", "rb").read()))
        x = np.load(sys.argv[1] + "/arrays.npz")["x"]
        np.save(sys.argv[1] + "/y.npy", exported.call(x))
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert_close(np.load(tmp_path / "y.npy"), model(x))


def test_a_file_appears_whole_or_not_at_all(model, data, x, tmp_path, monkeypatch):
    path = export.save(tmp_path / "model.jaxexport", model, x[:1], platforms=("cpu",), plan="dense", any_batch=False)
    program = export.load(path)
    assert program.platforms == ("cpu",) and program.inputs == ("float32[1,6,6,3]",)
    assert_close(program(x[:1]), model(x[:1]))

    def fail(descriptor):
        raise OSError("disk full")

    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", fail)
        with pytest.raises(OSError, match="disk full"):
            export.save(path, model, x[:1])
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["model.jaxexport"]
    with pytest.raises(FileNotFoundError, match="there is no directory"):
        export.save(tmp_path / "nowhere" / "model", model, x[:1])
    with pytest.raises(FileNotFoundError):
        export.load(tmp_path / "nothing")


def test_damaged_and_foreign_files_are_told_apart(data, x, tmp_path):
    path = tmp_path / "model"

    def loading(content):
        path.write_bytes(content)
        return pytest.raises(ValueError, match=pattern)

    pattern = "model does not end as what tdlrt_jax.export writes"
    for content in (b"", data[:-1], data[: len(data) // 2], b"PK\x03\x04" + bytes(2000)):
        with loading(content):
            export.load(path)
    foreign = bytes(jax.export.export(jax.jit(jnp.sin))(x).serialize())
    with loading(foreign):
        export.load(path)
    pattern = "model is damaged: its checksum"
    for place in (10, len(data) // 2, len(data) - 1):
        damaged = bytearray(data)
        damaged[place] ^= 1
        with loading(bytes(damaged)):
            export.load(path)
    body = b"not of jax.export"
    pattern = f"model is whole, but JAX {jax.__version__} does not read it"
    with loading(body + export._SEAL + export.hashlib.sha256(body).digest()):
        export.load(path)


def test_arrays_are_baked_at_the_ranks_in_use():
    """Fewer numbers at a lower rank, though the capacity of the arrays is the same."""

    def size(rank):
        model = TuckerLinear(200, 100, rank=50, rngs=nnx.Rngs(0))
        core, factors = model.kernel.get_value()
        cut = core.at[rank:].set(0).at[:, rank:].set(0)
        bases = tuple(factor.at[:, rank:].set(0) for factor in factors)
        model.kernel.set_value(type(model.kernel.get_value())(cut, bases))
        return len(export.serialize(model, jnp.ones((1, 200)), platforms=("cpu",), plan="factored"))

    assert size(50) - size(5) > 4 * 45 * 300 * 0.9  # bytes of 45 columns of both factors


def test_windows_wider_than_their_image_become_products_on_the_cpu():
    """XLA's own convolution is a hundred times slower there."""
    model = TuckerConv(8, 8, (3, 3), rank=4, rngs=nnx.Rngs(0))
    small, large = (jax.random.normal(jax.random.key(0), (3, size, size, 8)) for size in (2, 8))
    for x, convolutions in ((small, 0), (large, 1)):
        data = export.serialize(model, x[:1], platforms=("cpu",), plan="dense")
        program = export.deserialize(data)
        assert program.exported.mlir_module().count("stablehlo.convolution") == convolutions
        assert_close(program(x), model(x))


def test_functions_several_inputs_and_outputs():
    scale = jnp.arange(3.0)
    data = export.serialize(
        lambda x, t: {"sum": x * scale + t, "mean": x.mean()},
        (jax.ShapeDtypeStruct((2, 3), jnp.float32), jnp.float32(0)),
    )
    program = export.deserialize(data)
    assert program.inputs == ("float32[batch,3]", "float32[]")
    found = program(np.ones((5, 3), np.float32), np.float32(2))
    np.testing.assert_allclose(found["sum"], np.tile(np.arange(3.0) + 2, (5, 1)))
    assert found["mean"] == 1


def test_lenet5_with_an_open_batch():
    conv, linear = functools.partial(TuckerConv, rank=6), functools.partial(TuckerLinear, rank=8)
    model = LeNet5(conv=conv, linear=linear, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 28, 28, 1))
    assert_close(export.deserialize(export.serialize(model, x[:1]))(x), model(x))


def test_models_that_are_not_ready_are_refused(x):
    model = Net(nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"layer '(norm|dropout)' .*call model.eval\(\) first"):
        export.serialize(model, x)
    model.eval()
    optimizer = nnx.Optimizer(model, tdlrt(optax.sgd(0.1), tolerance=0.1), wrt=nnx.Param)
    with pytest.raises(ValueError, match=r"got a Optimizer: pass the model that it trains"):
        export.serialize(optimizer, x)
    with pytest.raises(ValueError, match="got a TdlrtState"):
        export.serialize(tdlrt(optax.sgd(0.1), tolerance=0.1).init(nnx.as_pure(nnx.state(model, nnx.Param))), x)
    with pytest.raises(ValueError, match=r"plan='dense' is for an nnx.Module"):
        export.serialize(jnp.sin, x, plan="dense")
    model.linear.bias.set_value(jnp.full(5, jnp.nan))
    with pytest.raises(ValueError, match="'linear/bias' has entries that are not finite"):
        export.serialize(model, x)


def test_a_model_that_needs_its_batch_size_says_what_to_do():
    def fixed(x):
        return x if x.shape[0] > 1 else 2 * x

    with pytest.raises(ValueError, match=r"does not work with an open batch dimension.*any_batch=False"):
        export.serialize(fixed, jnp.ones((1, 3), "f"))
    program = export.deserialize(export.serialize(fixed, jnp.ones((1, 3), "f"), any_batch=False))
    assert program(np.ones((1, 3), "f")).sum() == 6


def test_missing_packages_are_named_with_the_remedy(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="flatbuffers is not installed: pip install flatbuffers"):
        export.serialize(jnp.sin, jnp.ones(3))
    with pytest.raises(ImportError, match=r"jax2onnx is not installed: .*scripts/onnx_check"):
        export.to_onnx(jnp.sin, jnp.ones(3), tmp_path / "model.onnx")


def test_onnx_agrees(model, x, tmp_path):
    pytest.importorskip("jax2onnx", reason="needs the environment that scripts/onnx_check makes")
    runtime = pytest.importorskip("onnxruntime")
    path = export.to_onnx(model, x[:1], tmp_path / "model.onnx")
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: np.asarray(x)})
    assert_close(found, model(x))
