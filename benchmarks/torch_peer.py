"""Trains and evaluates our networks in PyTorch, as a process that ``benchmarks.peers`` asks one JSON line at a time.

Runs in the environment that ``scripts/peers`` makes: of the packages installed there it imports torch and, for the method
``tensorly``, tensorly-torch; nothing of this project. Every line on the standard input is a request, an object with the key
``op``; every line on the standard output is the reply to one, ``{"ok": true, ...}`` or ``{"ok": false, "error": "..."}``.
Whatever else is printed goes to the standard error. The end of the input ends the process.

====== =========================================================== ==========================================================
op     fields                                                      reply
====== =========================================================== ==========================================================
hello  threads (``null``: as many as there are cores)              versions, threads
build  the fields of ``Spec``                                      parameters, conv_parameters, convolutions, state_bytes
run    id, steps                                                   seconds and losses, one for every step
memory id                                                          bytes of the tensors, peak_rss_bytes of the process
drop   id
quit
====== =========================================================== ==========================================================
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import importlib.metadata
import json
import os
import platform
import resource
import sys
import time
from collections.abc import Callable
from typing import IO, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VERSIONS = ("torch", "tensorly", "tensorly-torch")
Conv = Callable[..., nn.Module]


# The networks of tdlrt_jax.models: the same layers under the same names, in PyTorch's layout. BatchNorm moves its averages as
# flax.nnx.BatchNorm does by default, by 1%; both have an epsilon of 1e-5.

norm = functools.partial(nn.BatchNorm2d, momentum=0.01)


def scaled(filters: int, width: float) -> int:
    """``filters * width``, rounded, at least 1."""
    return max(1, round(filters * width))


class VGG16(nn.Module):
    """Thirteen convolutions of 3x3 in five stages, each ended by a pooling; global average; a linear classifier."""

    stages = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))

    def __init__(self, conv: Conv, width: float, num_classes: int, image: tuple[int, int]):
        super().__init__()
        channels = 3
        convs: list[nn.Module] = []
        norms: list[nn.Module] = []
        for filters in (scaled(filters, width) for stage in self.stages for filters in stage):
            convs.append(conv(f"convs/{len(convs)}", channels, filters, window=3, padding=1))
            norms.append(norm(filters))
            channels = filters
        self.convs, self.norms = nn.ModuleList(convs), nn.ModuleList(norms)
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(batch, channels, height, width)`` to logits."""
        layers = iter(zip(self.convs, self.norms))
        for stage in self.stages:
            for _ in stage:
                conv, norm = next(layers)
                x = F.relu(norm(conv(x)), inplace=True)
            x = F.max_pool2d(x, 2)
        return self.classifier(x.mean((-2, -1)))


class AlexNet(nn.Module):
    """Convolutions of 11x11, 5x5 and three of 3x3, three poolings, a linear classifier."""

    # (filters, window, stride, whether a pooling follows)
    layers = ((64, 11, 2, True), (192, 5, 1, True), (384, 3, 1, False), (256, 3, 1, False), (256, 3, 1, True))

    def __init__(self, conv: Conv, width: float, num_classes: int, image: tuple[int, int]):
        super().__init__()
        channels = 3
        convs: list[nn.Module] = []
        norms: list[nn.Module] = []
        for filters, window, stride, _ in self.layers:
            filters = scaled(filters, width)
            convs.append(
                conv(f"convs/{len(convs)}", channels, filters, window=window, stride=stride, padding=window // 2)
            )
            norms.append(norm(filters))
            channels = filters
        self.convs, self.norms = nn.ModuleList(convs), nn.ModuleList(norms)
        pixels = (image[0] + 1) // 2 // 8 * ((image[1] + 1) // 2 // 8)
        self.classifier = nn.Linear(channels * pixels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(batch, channels, height, width)`` to logits."""
        for (_, _, _, pooled), conv, norm in zip(self.layers, self.convs, self.norms):
            x = F.relu(norm(conv(x)), inplace=True)
            x = F.max_pool2d(x, 2) if pooled else x
        return self.classifier(x.flatten(1))


class BasicBlock(nn.Module):
    """Two convolutions of 3x3, added to their input."""

    def __init__(self, conv: Conv, path: str, channels: int, filters: int, stride: int):
        super().__init__()
        self.conv1 = conv(f"{path}/conv1", channels, filters, window=3, stride=stride, padding=1)
        self.norm1 = norm(filters)
        self.conv2 = conv(f"{path}/conv2", filters, filters, window=3, padding=1)
        self.norm2 = norm(filters)
        self.has_shortcut = stride != 1 or channels != filters
        if self.has_shortcut:
            self.shortcut = conv(f"{path}/shortcut", channels, filters, window=1, stride=stride)
            self.shortcut_norm = norm(filters)

    def forward(self, x: Tensor) -> Tensor:
        """Of ``(batch, channels, height, width)``."""
        y = F.relu(self.norm1(self.conv1(x)), inplace=True)
        y = self.norm2(self.conv2(y))
        return F.relu(y + (self.shortcut_norm(self.shortcut(x)) if self.has_shortcut else x), inplace=True)


class ResNet18(nn.Module):
    """A 3x3 stem, eight basic blocks, global average, a linear classifier."""

    # (filters, stride) of the blocks
    layers = ((64, 1), (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), (512, 1))

    def __init__(self, conv: Conv, width: float, num_classes: int, image: tuple[int, int]):
        super().__init__()
        channels = scaled(self.layers[0][0], width)
        blocks: list[nn.Module] = []
        self.stem = conv("stem", 3, channels, window=3, padding=1)
        self.stem_norm = norm(channels)
        for filters, stride in self.layers:
            filters = scaled(filters, width)
            blocks.append(BasicBlock(conv, f"blocks/{len(blocks)}", channels, filters, stride))
            channels = filters
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(batch, channels, height, width)`` to logits."""
        x = self.blocks(F.relu(self.stem_norm(self.stem(x)), inplace=True))
        return self.classifier(x.mean((-2, -1)))


MODELS: dict[str, Callable[..., nn.Module]] = {"vgg16": VGG16, "alexnet": AlexNet, "resnet18": ResNet18}


# The layers. Kernels are (out, in, height, width) here, and so are the ranks of a Tucker kernel.


def dense(channels: int, filters: int, ranks: Any, *, window: int, stride: int = 1, padding: int = 0) -> nn.Module:
    """A convolution without bias and without a format."""
    layer = nn.Conv2d(channels, filters, window, stride, padding, bias=False)
    nn.init.normal_(layer.weight, std=(channels * window**2) ** -0.5)
    return layer


class FactorizedConv(nn.Module):
    """A Tucker kernel as three convolutions: 1x1 to the input's rank, the core, 1x1 to the filters.

    A spatial mode at full rank has no factor: the core holds it, which is Tucker-2. One at lower rank has a factor, which is
    multiplied into the core in every step.
    """

    def __init__(
        self, channels: int, filters: int, ranks: list[int], *, window: int, stride: int = 1, padding: int = 0
    ):
        super().__init__()
        r_out, r_in, *spatial = ranks
        self.inward = nn.Conv2d(channels, r_in, 1, bias=False)
        self.core = nn.Conv2d(r_in, r_out, tuple(spatial), stride, padding, bias=False)
        self.outward = nn.Conv2d(r_out, filters, 1, bias=False)
        self.height, self.width = (
            None if rank == window else nn.Parameter(torch.empty(window, rank)) for rank in spatial
        )
        factors = [self.outward.weight.flatten(1), self.inward.weight.flatten(1).T]
        start_tucker(
            self.core.weight, [*factors, *(mode for mode in (self.height, self.width) if mode is not None)], filters
        )

    def forward(self, x: Tensor) -> Tensor:
        """Of ``(batch, channels, height, width)``."""
        x = self.inward(x)
        if self.height is None and self.width is None:
            return self.outward(self.core(x))
        kernel = self.core.weight
        kernel = kernel if self.height is None else torch.einsum("oiab,ha->oihb", kernel, self.height)
        kernel = kernel if self.width is None else torch.einsum("oihb,wb->oihw", kernel, self.width)
        return self.outward(F.conv2d(x, kernel, stride=self.core.stride, padding=self.core.padding))


def tensorly(
    channels: int, filters: int, ranks: list[int], *, window: int, stride: int = 1, padding: int = 0
) -> nn.Module:
    """The same of tensorly-torch, which has factors for all four modes."""
    import tltorch  # takes a second, and only this method needs it

    layer = tltorch.FactorizedConv(
        channels,
        filters,
        (window, window),
        stride=stride,
        padding=padding,
        factorization="tucker",
        implementation="factorized",
        rank=tuple(ranks),
    )
    if list(layer.weight.core.shape) != ranks:
        raise ValueError(f"tensorly-torch made a core of {tuple(layer.weight.core.shape)} for ranks={ranks}")
    start_tucker(layer.weight.core.data, [factor.data for factor in layer.weight.factors], filters)
    return layer


@torch.no_grad()
def start_tucker(core: Tensor, factors: list[Tensor], filters: int) -> None:
    """Sets orthonormal factors and a normal core, in place, for a kernel as large as a dense one at its start."""
    for factor in factors:
        nn.init.orthogonal_(factor)
    nn.init.normal_(core, std=(filters / core.numel()) ** 0.5)


METHODS: dict[str, Callable[..., nn.Module]] = {"dense": dense, "factorized": FactorizedConv, "tensorly": tensorly}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """What ``build`` is asked for."""

    id: str
    mode: str  # "train" or "infer"
    model: str  # one of MODELS
    method: str  # one of METHODS: what a convolution with ranks becomes
    width: float = 1.0
    num_classes: int = 10
    image: tuple[int, int] = (32, 32)
    batch: int = 128
    # [height, width, in, out] of convolutions by their path in our networks, "convs/0"; those not named stay dense.
    ranks: dict[str, list[int]] | None = None
    learning_rate: float = 0.01
    momentum: float = 0.9
    seed: int = 0
    # The memory layout; null: what CHANNELS_LAST says of the method.
    channels_last: bool | None = None

    def __post_init__(self) -> None:
        """Refuses unknown names."""
        for name, known in (("mode", ("train", "infer")), ("model", MODELS), ("method", METHODS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected one of {', '.join(known)}")
        if self.method == "dense" and self.ranks:
            raise ValueError("ranks are given for method='dense': expected none")


# The memory layout that is faster by method. Measured for training VGG16 with PyTorch 2.13 on two cores of an AMD EPYC with
# AVX-512: channels last takes 5% (batch 32) to 7% (128) less for dense convolutions and 40% to 45% less for three. For
# tensorly-torch, which reshapes between its convolutions, there is little between the two.
CHANNELS_LAST = {"dense": True, "factorized": True, "tensorly": False}


class Run:
    """A network with its data and optimizer."""

    def __init__(self, spec: Spec):
        self.spec = spec
        self.sizes: dict[str, int] = {}  # of the convolutions, by path
        self.ranks = dict(spec.ranks or {})
        torch.manual_seed(spec.seed)
        self.model = MODELS[spec.model](self._conv, spec.width, spec.num_classes, spec.image)
        if self.ranks:
            raise ValueError(f"ranks of {', '.join(self.ranks)}: expected convolutions among {', '.join(self.sizes)}")
        self.images = torch.randn(spec.batch, 3, *spec.image)
        self.labels = torch.randint(spec.num_classes, (spec.batch,))
        channels_last = CHANNELS_LAST[spec.method] if spec.channels_last is None else spec.channels_last
        if channels_last:
            self.model.to(memory_format=torch.channels_last)
            self.images = self.images.contiguous(memory_format=torch.channels_last)
        self.training = spec.mode == "train"
        self.model.train(self.training).requires_grad_(self.training)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=spec.learning_rate, momentum=spec.momentum)
        # The first step finds the kernels for these shapes, and makes the gradients and the optimizer's state.
        self.step()

    def _conv(self, path: str, channels: int, filters: int, **window: int) -> nn.Module:
        ranks = self.ranks.pop(path, None)
        if ranks is None:
            layer = dense(channels, filters, None, **window)
        else:
            shape = (window["window"], window["window"], channels, filters)
            if len(ranks) != 4 or not all(0 < rank <= size for rank, size in zip(ranks, shape)):
                raise ValueError(f"{path}: ranks={ranks}: expected [height, width, in, out], at most {shape}")
            height, width, r_in, r_out = ranks
            layer = METHODS[self.spec.method](channels, filters, [r_out, r_in, height, width], **window)
        self.sizes[path] = sum(parameter.numel() for parameter in layer.parameters())
        return layer

    def step(self) -> Tensor | None:
        """One step of training and its loss, or one evaluation."""
        if not self.training:
            with torch.inference_mode():
                self.model(self.images)
            return None
        self.optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(self.model(self.images), self.labels)
        loss.backward()
        self.optimizer.step()
        return loss

    def memory(self) -> dict[str, int]:
        """Bytes of the tensors that outlive a step; none of the activations is among them."""
        parameters = list(self.model.parameters())
        state = [value for entry in self.optimizer.state.values() for value in entry.values()]
        return {
            "parameter_bytes": sum(map(_bytes, parameters)),
            "gradient_bytes": sum(_bytes(p.grad) for p in parameters if p.grad is not None),
            "optimizer_bytes": sum(_bytes(value) for value in state if isinstance(value, Tensor)),
            "buffer_bytes": sum(map(_bytes, self.model.buffers())),
        }


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


class Server:
    """Answers requests."""

    def __init__(self) -> None:
        self.runs: dict[str, Run] = {}

    def hello(self, *, threads: int | None = None) -> dict[str, Any]:
        """Sets the number of threads; versions."""
        # As XLA does on the CPU; of new threads too, which take it over from the one that makes them.
        torch.set_flush_denormal(True)
        torch.set_num_threads(threads or os.cpu_count() or 1)
        versions = {"python": platform.python_version()}
        for name in VERSIONS:
            try:
                versions[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                versions[name] = "missing"
        return {"versions": versions, "threads": torch.get_num_threads()}

    def build(self, **fields: Any) -> dict[str, Any]:
        """Makes a network, in place of an earlier one of its name, and takes one step."""
        spec = Spec(**fields)
        self.runs.pop(spec.id, None)
        run = Run(spec)
        self.runs[spec.id] = run
        memory = run.memory()
        return {
            "id": spec.id,
            "parameters": sum(parameter.numel() for parameter in run.model.parameters()),
            "conv_parameters": sum(run.sizes.values()),
            "convolutions": run.sizes,
            "state_bytes": sum(memory[f"{kind}_bytes"] for kind in ("parameter", "gradient", "optimizer")),
        }

    def run(self, *, id: str, steps: int = 1) -> dict[str, Any]:
        """Takes steps; the time of each."""
        run, seconds, losses = self._find(id), [], []
        for _ in range(steps):
            start = time.perf_counter()
            loss = run.step()
            seconds.append(time.perf_counter() - start)
            losses.append(None if loss is None else loss.item())
        return {"seconds": seconds, "losses": losses}

    def memory(self, *, id: str) -> dict[str, int]:
        """Exact bytes of one network, and the most that the whole process has ever held."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB, on macOS bytes
        return {**self._find(id).memory(), "peak_rss_bytes": peak * (1 if sys.platform == "darwin" else 1024)}

    def drop(self, *, id: str) -> dict[str, Any]:
        """Frees a network."""
        self._find(id)
        del self.runs[id]
        gc.collect()
        return {}

    def _find(self, id: str) -> Run:
        if id not in self.runs:
            raise ValueError(f"id={id!r}: expected one of {', '.join(self.runs) or 'none: nothing is built'}")
        return self.runs[id]

    def answer(self, line: str) -> dict[str, Any] | None:
        """The reply to a request, ``None`` to ``quit``."""
        try:
            fields = json.loads(line)
            op = fields.pop("op", None)
            if op == "quit":
                return None
            if op not in ("hello", "build", "run", "memory", "drop"):
                raise ValueError(f"op={op!r}: expected hello, build, run, memory, drop or quit")
            return {"ok": True, **getattr(self, op)(**fields)}
        except Exception as error:  # whatever it is, the client must hear of it
            return {"ok": False, "error": f"{type(error).__name__}: {error}"}


def serve(requests: IO[str], replies: IO[str]) -> None:
    """Answers until ``quit`` or the end of the requests."""
    server = Server()
    for line in requests:
        reply = server.answer(line)
        if reply is None:
            return
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def main() -> None:
    """Serves on the standard streams; what libraries print goes to the standard error."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(sys.stdin, replies)


if __name__ == "__main__":
    main()
