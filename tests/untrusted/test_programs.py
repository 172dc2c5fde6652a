"""Exported models from strangers: what could run code is refused by name before it runs, and damage is no crash."""

import ctypes
import dataclasses
import hashlib
import subprocess
import sys
import textwrap

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.mlir import serialize_portable_artifact

from tdlrt_jax import export
from tdlrt_jax.programs import called_targets

HARMLESS = jax.export.export(jax.jit(jnp.sin), platforms=("cpu",))(jnp.ones(3))
CALLS = """
module @jit_sin {
  func.func public @main(%x: tensor<3xf32>) -> (tensor<3xf32>) {
    %y = func.call @inner(%x) : (tensor<3xf32>) -> tensor<3xf32>
    return %y : tensor<3xf32>
  }
  func.func private @inner(%x: tensor<3xf32>) -> (tensor<3xf32>) {
    OPERATION
    return %y : tensor<3xf32>
  }
}
"""
CUSTOM = "%y = stablehlo.custom_call @TARGET(%x) {OPTIONS} : (tensor<3xf32>) -> tensor<3xf32>"
HIDDEN = """
    %yes = stablehlo.constant dense<true> : tensor<i1>
    %y = "stablehlo.if"(%yes) ({
      %z = stablehlo.custom_call @evil(%x) {api_version = 1 : i32} : (tensor<3xf32>) -> tensor<3xf32>
      stablehlo.return %z : tensor<3xf32>
    }, {
      stablehlo.return %x : tensor<3xf32>
    }) : (tensor<i1>) -> tensor<3xf32>
"""
SEND = """
    %t = stablehlo.create_token : !stablehlo.token
    %s = "stablehlo.send"(%x, %t) <{channel_handle = #stablehlo.channel_handle<handle = 1, type = 2>, is_host_transfer = true}>
      : (tensor<3xf32>, !stablehlo.token) -> !stablehlo.token
    %y = stablehlo.sine %x : tensor<3xf32>
"""


def forged(operation):
    """An exported function of three numbers with another program in it, as ``jax.export`` would serialize it."""
    program = serialize_portable_artifact(CALLS.replace("OPERATION", operation), "1.9.0")
    return bytes(dataclasses.replace(HARMLESS, mlir_module_serialized=program).serialize())


def custom(target, options="api_version = 1 : i32"):
    return CUSTOM.replace("TARGET", target).replace("OPTIONS", options)


def sealed(body):
    """What anyone can do: the seal is a checksum."""
    return body + export._SEAL + hashlib.sha256(body).digest()


@pytest.fixture(scope="module")
def sentinel(tmp_path_factory):
    """A file that a function of this process writes, which a program can name as ``evil``."""
    path = tmp_path_factory.mktemp("sentinel") / "executed"

    @ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)
    def evil(output, inputs):
        path.write_text("executed")

    jax.ffi.register_ffi_target("evil", jax.ffi.pycapsule(evil), platform="cpu", api_version=0)
    yield path
    assert evil  # kept alive as long as it can be called


@pytest.mark.parametrize("operation", [custom("evil"), HIDDEN], ids=["plain", "in a branch"])
def test_a_program_that_runs_code_is_refused_by_name(operation, sentinel, tmp_path):
    path, body = tmp_path / "model.jaxexport", forged(operation)
    path.write_bytes(sealed(body))
    with pytest.raises(ValueError, match=r"model.jaxexport holds a program that calls 'evil'.*It was not run"):
        export.load(path)
    with pytest.raises(ValueError, match="data holds a program that calls 'evil'"):
        export.deserialize(sealed(body))
    assert not sentinel.exists()
    # The file is one that does it: jax itself reads and runs it.
    jax.block_until_ready(jax.export.deserialize(bytearray(body)).call(jnp.ones(3)))
    assert sentinel.exists()
    sentinel.unlink()


@pytest.mark.parametrize(
    ("operation", "name"),
    [
        (custom("xla_python_cpu_callback", 'backend_config = "140737354000000"'), "xla_python_cpu_callback"),
        (
            custom("xla_ffi_python_cpu_callback", "mhlo.backend_config = {index = 0 : ui64}, api_version = 4 : i32"),
            "xla_ffi_python_cpu_callback",
        ),
        (custom("lapack_sgesdd_ffi_and_more"), "lapack_sgesdd_ffi_and_more"),
        (custom("tpu_custom_call", 'backend_config = "{}"'), "tpu_custom_call"),
        (custom("__gpu$xla.gpu.triton".replace("$", "_")), "__gpu_xla.gpu.triton"),
        (SEND, "stablehlo.send"),
    ],
)
def test_callbacks_kernels_and_transfers_are_refused(operation, name):
    with pytest.raises(ValueError, match=f"calls '{name}'"):
        export.deserialize(sealed(forged(operation)))


def test_what_jax_itself_calls_is_allowed():
    def function(x):
        q = jnp.linalg.qr(x)[0] + jnp.linalg.svd(x)[0] + jnp.linalg.cholesky(x @ x.T + jnp.eye(3))
        values, _ = jax.lax.top_k(q + jax.random.normal(jax.random.key(0), x.shape), 2)
        return values

    program = export.deserialize(export.serialize(function, jnp.eye(3), any_batch=False))
    assert any(name.startswith("lapack_") for name in called_targets(program.exported))
    assert program(jnp.eye(3)).shape == (3, 2)
    batched = export.serialize(lambda x: x.reshape(x.shape[0], -1) @ jnp.ones((6, 2)), jnp.ones((1, 2, 3)))
    assert export.deserialize(batched)(np.ones((5, 2, 3), np.float32)).shape == (5, 2)


def altered(body, count):
    """Cut off everywhere, and with bits flipped anywhere."""
    yield from (body[:size] for size in range(0, len(body), max(len(body) // 60, 1)))
    rng = np.random.default_rng(0)
    for _ in range(count):
        content = np.frombuffer(body, np.uint8).copy()
        for _ in range(rng.choice([1, 1, 3, 30])):
            content[rng.integers(len(content))] ^= 1 << rng.integers(8)
        yield content.tobytes()


@pytest.fixture(scope="module")
def network():
    return export.serialize(lambda x: jnp.tanh(x @ jnp.ones((3, 2))), jnp.ones((1, 3)), platforms=("cpu",))


def test_cut_and_altered_files_are_errors_that_name_the_file(network, tmp_path):
    path = tmp_path / "model"
    for content in altered(network, 150):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"model (does not end as|is damaged)"):
            export.load(path)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_cut_files_with_a_new_seal_are_errors_that_name_the_file(network, tmp_path):
    """By intent; in a process of its own, which must survive."""
    body = network[: -len(export._SEAL) - 32]
    contents = list(altered(body, 0))
    for number, content in enumerate(contents):
        (tmp_path / f"{number}.model").write_bytes(sealed(content))
    script = """
        import sys
        from pathlib import Path
        from tdlrt_jax import export

        paths = sorted(Path(sys.argv[1]).iterdir())
        for path in paths:
            try:
                export.load(path)
            except ValueError as error:
                assert str(path) in str(error), error
                print("refused")
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    # The function's name is stored last: without the end of that a file may still hold the whole program.
    damaged = sum(len(content) < body.rindex(b"<lambda>") for content in contents)
    assert 58 <= damaged <= len(done.stdout.split()) <= len(contents)
