"""Trained models as files that run without this package: ``jax.export`` bytes, and ONNX.

The bytes are what ``jax.export`` writes: the network as StableHLO with its weights as constants, lowered for several
platforms, for any batch size. Any JAX of its guaranteed compatibility window runs them by ``jax.export.deserialize``
alone. A seal at their end, which that function does not look at, lets :func:`deserialize` tell damaged files from
whole ones. It is a checksum, no signature: whoever writes a file can seal it. What a file holds is a program, so
:func:`deserialize` looks at what that would call before any of it can run (:mod:`tdlrt_jax.programs`).
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from tdlrt_jax.arguments import check_path, shown
from tdlrt_jax.compilation import compiler_options
from tdlrt_jax.programs import check_program

__all__ = ["Program", "deserialize", "load", "save", "serialize", "to_onnx"]

PathLike = str | os.PathLike[str]
_PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
_SEAL = b"\ntdlrt_jax.export 1\n"  # followed by the SHA-256 of all before it
# Moved within jax 0.10: the old place warns where the new one exists.
_HOME: Any = jax.errors if hasattr(jax.errors, "InconclusiveDimensionOperation") else jax.core
_DIGEST = hashlib.sha256().digest_size


class Program:
    """A deserialized network: call it with its inputs. It is compiled once for each batch size."""

    def __init__(self, exported: jax.export.Exported):
        if not isinstance(exported, jax.export.Exported):
            raise ValueError(
                f"exported is {shown(exported)}: expected a jax.export.Exported; export.deserialize reads one"
            )
        self.exported = exported  # of jax.export, for everything that it tells
        self._call = jax.jit(exported.call, compiler_options=compiler_options(runs_often=True))

    def __call__(self, *inputs: Any) -> Any:
        """The outputs for inputs of the exported shapes and dtypes; ``ValueError`` for others."""
        try:
            # Within another jitted function it is that function's options that count.
            traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(inputs))
            return (self.exported.call if traced else self._call)(*inputs)
        except (TypeError, ValueError) as error:
            message = str(error).splitlines()[0]
            raise ValueError(f"inputs do not fit {self}: expected {', '.join(self.inputs)}. {message}") from error

    @property
    def platforms(self) -> tuple[str, ...]:
        """Those that it was lowered for."""
        return tuple(self.exported.platforms)

    @property
    def inputs(self) -> tuple[str, ...]:
        """What it takes, such as ``float32[batch,28,28,1]``."""
        return tuple(f"{aval.dtype}[{','.join(map(str, aval.shape))}]" for aval in self.exported.in_avals)

    def __repr__(self) -> str:
        return f"Program(inputs={self.inputs}, platforms={self.platforms})"


def serialize(
    model: Any,
    example: Any,
    *,
    platforms: Sequence[str] = ("cpu", "cuda"),
    any_batch: bool = True,
    plan: str | None = None,
) -> bytes:
    """A trained network as bytes for :func:`deserialize`, or for ``jax.export.deserialize`` where this package is not.

    Args:
      model: an ``nnx.Module`` in evaluation mode, whose Tucker layers are first brought into the form with the
        cheapest forward pass for the example (:func:`tdlrt_jax.nn.plain.to_plain`); or a function of arrays, whose
        arrays become constants as they are.
      example: an input ``(batch, ...)``, an array or a ``jax.ShapeDtypeStruct``, or a tuple of all positional
        arguments; only shapes and dtypes matter.
      platforms: to lower for, of ``"cpu"``, ``"cuda"``, ``"rocm"`` and ``"tpu"``. None of them need be present; but
        only exported on a CPU do windows wider than their image run fast on one (:mod:`tdlrt_jax.conv.convolution`).
      any_batch: leave the first dimension of all inputs open (the same for all of them; inputs without dimensions stay
        as they are). Otherwise the batch is that of the example.
      plan: one form for all Tucker layers instead of the cheapest.

    Returns:
      The bytes.

    Raises:
      ValueError: for a model in training mode, with an optimizer or lifted kernels in it, or with weights that are not
        finite, naming the layer; or one that does not work with an open batch dimension.
      ImportError: without the package ``flatbuffers``, which ``jax.export`` needs.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> from tdlrt_jax.nn import TuckerLinear
      >>> model = TuckerLinear(20, 10, rank=4, rngs=nnx.Rngs(0))
      >>> data = serialize(model, jnp.ones((1, 20)))
      >>> program = deserialize(data)
      >>> program
      Program(inputs=('float32[batch,20]',), platforms=('cpu', 'cuda'))
      >>> bool(jnp.allclose(program(jnp.ones((7, 20))), model(jnp.ones((7, 20))), atol=1e-5))
      True
    """
    _require("flatbuffers", "pip install flatbuffers")
    listed = not isinstance(platforms, str) and isinstance(platforms, Sequence) and len(platforms) > 0
    if not listed or any(platform not in _PLATFORMS for platform in platforms):
        raise ValueError(f"platforms={shown(platforms)}: expected some of {_PLATFORMS}, in a tuple")
    for leaf in jax.tree.leaves(example, is_leaf=lambda node: node is None):
        if not hasattr(leaf, "shape") and not isinstance(leaf, int | float | complex):
            raise ValueError(
                f"example has the part {shown(leaf)}: expected arrays or jax.ShapeDtypeStructs, the model's inputs"
            )
    function = _inference_function(model, example, plan, fast=True)
    arguments = example if isinstance(example, tuple) else (example,)
    structs = [jax.tree.map(_struct, argument) for argument in arguments]
    if any_batch:
        (batch,) = jax.export.symbolic_shape("batch")
        structs = [jax.tree.map(lambda s: _open_batch(s, batch), struct) for struct in structs]
    try:
        exported = jax.export.export(jax.jit(function), platforms=tuple(platforms))(*structs)
    except _HOME.InconclusiveDimensionOperation as error:
        raise ValueError(
            f"model does not work with an open batch dimension: {str(error).splitlines()[0]} Pass any_batch=False for "
            "the example's batch, or write the batch dimension of a reshape as x.shape[0]"
        ) from error
    body = bytes(exported.serialize())
    return body + _SEAL + hashlib.sha256(body).digest()


def deserialize(data: bytes) -> Program:
    """The network in bytes that :func:`serialize` made.

    Args:
      data: the bytes, all of them.

    Returns:
      A callable of the network's inputs.

    Raises:
      ValueError: for bytes that are damaged, cut off or something else, that this version of JAX does not read, or whose program
        calls functions of the process other than those that JAX itself uses for arithmetic.
      ImportError: without the package ``flatbuffers``.
    """
    _require("flatbuffers", "pip install flatbuffers")
    if not isinstance(data, bytes | bytearray | memoryview):
        raise ValueError(
            f"data is {shown(data)}: expected the bytes that export.serialize made; export.load reads a file"
        )
    return _deserialize(bytes(data), "data")


def save(path: PathLike, model: Any, example: Any, **options: Any) -> Path:
    """:func:`serialize` into a file, which appears whole or not at all.

    Args:
      path: of the file; one that exists is replaced.
      model, example, options: as in :func:`serialize`.

    Returns:
      The path.

    Raises:
      ValueError, ImportError: as in :func:`serialize`; nothing is written then.
      FileNotFoundError: if the directory does not exist.

    Example:
      >>> import tempfile, jax.numpy as jnp
      >>> from flax import nnx
      >>> from tdlrt_jax.nn import TuckerLinear
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     path = save(f"{directory}/model.jaxexport", TuckerLinear(3, 2, rngs=nnx.Rngs(0)), jnp.ones((1, 3)))
      ...     load(path)(jnp.ones((5, 3))).shape
      (5, 2)
    """
    check_path("path", path)
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path={str(path)!r}: there is no directory {str(path.parent)!r}; make it first")
    _write(path, serialize(model, example, **options))
    return path


def load(path: PathLike) -> Program:
    """:func:`deserialize` from a file.

    Raises:
      FileNotFoundError: if there is none.
      ValueError: naming the file, as in :func:`deserialize`.
    """
    _require("flatbuffers", "pip install flatbuffers")
    check_path("path", path)
    if not Path(path).is_file():
        raise FileNotFoundError(f"path={str(path)!r}: there is no such file; export.save makes one")
    return _deserialize(Path(path).read_bytes(), str(path))


def to_onnx(
    model: Any, example: Any, path: PathLike, *, any_batch: bool = True, plan: str | None = None, **options: Any
) -> Path:
    """A trained network as an ONNX file, through jax2onnx.

    jax2onnx needs an environment of its own, since it does not go together with the version of orbax-checkpoint that
    this package's checkpoints are made by; ``scripts/onnx_check`` makes one and checks what comes out.

    Args:
      model, any_batch, plan: as in :func:`serialize`.
      example: as there; every argument an array or a ``jax.ShapeDtypeStruct``.
      path: of the file; one that exists is replaced.
      options: of ``jax2onnx.to_onnx``: ``opset``, ``model_name``, ``inputs_as_nchw``, ...

    Returns:
      The path.

    Raises:
      ValueError: as in :func:`serialize`.
      ImportError: without jax2onnx.
    """
    check_path("path", path)
    _require("jax2onnx", "it needs an environment of its own, which scripts/onnx_check makes")
    import jax2onnx

    path = Path(path)
    function = _inference_function(model, example, plan)
    structs = [_struct(argument) for argument in (example if isinstance(example, tuple) else (example,))]
    # Two open dimensions of one name are one dimension.
    shapes = [("B", *s.shape[1:]) if any_batch and s.shape else s.shape for s in structs]
    inputs: list[Any] = shapes if all(s.dtype == jnp.float32 for s in structs) else structs
    if inputs is structs and any_batch:
        raise ValueError(
            f"example has the dtypes {[str(s.dtype) for s in structs]}: jax2onnx leaves the batch open for float32 "
            "inputs alone; cast inside of the model, or pass any_batch=False"
        )
    proto = jax2onnx.to_onnx(function, inputs=inputs, **options)
    _write(path, proto.SerializeToString())
    return path


def _inference_function(model: Any, example: Any, plan: str | None, *, fast: bool = False) -> Callable[..., Any]:
    """A model as a function of its inputs alone, checked; ``fast`` as in ``nn.plain.inference_function``."""
    if not callable(model) or _is_flax(model):
        from tdlrt_jax.nn.plain import check_inference, check_parameters, inference_function, to_plain

        check_parameters(model)
        check_inference(model)
        return inference_function(to_plain(model, example, plan=plan), fast=fast)
    if plan is not None:
        raise ValueError(
            f"plan={plan!r} is for an nnx.Module; how a function applies its kernels is its own affair, pass None"
        )
    return model


def _is_flax(model: Any) -> bool:
    """Whether an object's class is one of flax's or derived from one; without importing flax."""
    return any(base.__module__.split(".")[0] == "flax" for base in type(model).__mro__)


def _struct(array: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(np.shape(array), jnp.result_type(array))


def _open_batch(struct: jax.ShapeDtypeStruct, batch: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((batch, *struct.shape[1:]), struct.dtype) if struct.shape else struct


def _deserialize(data: bytes, where: str) -> Program:
    body, seal, digest = data[: -_DIGEST - len(_SEAL)], data[-_DIGEST - len(_SEAL) : -_DIGEST], data[-_DIGEST:]
    if seal != _SEAL:
        raise ValueError(
            f"{where} does not end as what tdlrt_jax.export writes: expected a whole one. It was cut off, damaged, or "
            "written by something else (what jax.export wrote itself is read by jax.export.deserialize)"
        )
    if hashlib.sha256(body).digest() != digest:
        raise ValueError(f"{where} is damaged: its checksum is not the one it was written with. Export the model again")
    try:
        exported = jax.export.deserialize(bytearray(body))
    except Exception as error:
        raise ValueError(
            f"{where} is whole, but JAX {jax.__version__} does not read it ({type(error).__name__}: {error}): use a "
            "version nearer to the one that wrote it, or export the model again"
        ) from error
    check_program(exported, where)
    return Program(exported)


def _require(package: str, remedy: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ImportError(f"the package {package} is not installed: {remedy}", name=package)


def _write(path: Path, data: bytes) -> None:
    """Writes beside the target and renames, so that a reader sees the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
