"""The client of the PyTorch peers: against a script that stands in for PyTorch, and against PyTorch where it is installed."""

import functools
import math
import os
import subprocess
import sys
import textwrap
import time

import jax
import numpy as np
import pytest
from flax import nnx

from benchmarks.peers import SCRIPT, Peer, available
from tdlrt_jax.models import VGG16, AlexNet, ResNet18

MODELS = {"vgg16": VGG16, "alexnet": AlexNet, "resnet18": ResNet18}

# Speaks the protocol in plain Python; networks of some names misbehave.
FAKE = """
import json, os, sys, time

print("a library greets", file=sys.stderr, flush=True)
for line in sys.stdin:
    request = json.loads(line)
    op, name = request.pop("op"), request.get("id")
    if op == "quit":
        open("quitted", "w").close()
        break
    if name == "dies":
        print("Killed by a test", file=sys.stderr)
        sys.exit(3)
    if name == "sleeps":
        time.sleep(60)
    if name == "chatters":
        print("loading weights ...", flush=True)
        continue
    if name == "counts":
        print("[1, 2]", flush=True)
        continue
    reply = {"ok": True}
    if op == "hello":
        reply |= {"versions": {"torch": "0"}, "threads": request["threads"] or 7}
    elif op == "run" and name == "unknown":
        reply = {"ok": False, "error": "ValueError: id='unknown'"}
    elif op == "build" and request.get("method") == "tensorly":
        reply = {"ok": False, "error": "ModuleNotFoundError: No module named 'tltorch'"}
    elif op == "run":
        reply |= {"seconds": [0.5] * request["steps"]}
    else:
        reply |= {"echo": [op, request]}
    print(json.dumps(reply), flush=True)
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Makes peers that run the script above."""
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "fake.py"
    script.write_text(textwrap.dedent(FAKE))
    return functools.partial(Peer, sys.executable, script=script)


def test_requests_and_replies(fake, tmp_path):
    with fake(threads=2) as peer:
        assert peer.versions == {"torch": "0"}
        assert peer.threads == 2
        spec = {"mode": "train", "ranks": {"convs/0": [3, 3, 2, 4]}}
        assert peer.build("a", **spec) == {"echo": ["build", {"id": "a", **spec}]}
        assert peer.run("a", steps=3) == [0.5] * 3
        assert peer.run("a") == [0.5]
        assert peer.memory("a") == {"echo": ["memory", {"id": "a"}]}
        assert peer.drop("a") is None
    assert (tmp_path / "quitted").exists(), "the process ended by itself"
    with pytest.raises(RuntimeError, match="not running"):
        peer.run("a")


def test_threads_are_the_process_choice_by_default(fake):
    with fake() as peer:
        assert peer.threads == 7


def test_a_refusal_names_the_request_and_leaves_the_process_running(fake):
    with fake() as peer:
        with pytest.raises(
            RuntimeError, match=r"(?s)PyTorch peer .*\"op\": \"run\".*ValueError: id='unknown'"
        ) as refusal:
            peer.run("unknown")
        assert "make peers" not in str(refusal.value)
        with pytest.raises(RuntimeError, match=r"tltorch.*make peers"):
            peer.build("b", method="tensorly")
        assert peer.run("a") == [0.5]


@pytest.mark.parametrize(
    "name, message",
    [
        ("dies", r"(?s)ended with status 3 at the request \{\"op\": \"run\".*make peers.*Killed by a test"),
        ("chatters", r"loading weights .*no reply"),
        ("counts", r"\[1, 2\].*no reply"),
        ("sleeps", r"did not answer .*sleeps.* in 1 s"),
    ],
)
def test_a_failing_process_is_named_and_ended(fake, name, message):
    with fake(timeout=20) as peer:
        peer.timeout = 1 if name == "sleeps" else 20
        process = peer._process
        start = time.monotonic()
        with pytest.raises(RuntimeError, match=message):
            peer.run(name)
        assert time.monotonic() - start < 15
        assert process.poll() is not None, "no process is left behind"
        with pytest.raises(RuntimeError, match="not running"):
            peer.run("a")


def test_a_process_that_was_killed_is_noticed_at_the_next_request(fake):
    with fake(timeout=20) as peer:
        peer._process.kill()
        peer._process.wait()
        with pytest.raises(RuntimeError, match="ended with status -9"):
            peer.run("a")


def test_an_exception_in_the_block_ends_the_process(fake):
    with pytest.raises(KeyError), fake() as peer:
        process = peer._process
        raise KeyError
    assert process.poll() == 0


def test_without_an_environment(tmp_path, monkeypatch):
    assert available(tmp_path / "python") is None
    assert available(tmp_path) is None, "a folder"
    monkeypatch.setenv("TDLRT_PEERS_PYTHON", str(tmp_path / "python"))
    assert available() is None
    with pytest.raises(RuntimeError, match=r"cannot be started.*make peers"), Peer(tmp_path / "python"):
        pass


def test_an_interpreter_without_torch(tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "ModuleNotFoundError: No module named torch" >&2\nexit 1\n')
    python.chmod(0o755)
    assert available(python) is None
    with pytest.raises(RuntimeError, match=r"(?s)ended with status 1 .*hello.*make peers.*No module named torch"):
        Peer(python, timeout=20).__enter__()
    python.write_text("#!/bin/sh\nexit 0\n")
    monkeypatch.setenv("TDLRT_PEERS_PYTHON", str(python))
    assert available() == python


@pytest.fixture(scope="module")
def torch():
    """PyTorch itself; it takes seconds to start."""
    python = available()
    if python is None:
        pytest.skip("no environment of peers: make peers")
    with Peer(python, threads=1, timeout=300) as peer:
        yield peer


@functools.cache
def kernels(name, width=0.125):
    """Our kernels' shapes, ``(height, width, in, out)``, by the paths that ranks are keyed by; and all parameters."""
    model = nnx.eval_shape(lambda: MODELS[name](width=width, rngs=nnx.Rngs(0)))
    leaves = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    shapes = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape for path, leaf in leaves}
    convs = {path.removesuffix("/kernel"): shape for path, shape in shapes.items() if len(shape) == 4}
    return convs, sum(map(math.prod, shapes.values()))


def ranks_of(name, spatial=lambda window: window):
    """A third of the channels, and at least two where there are."""
    convs, _ = kernels(name)
    return {
        path: [spatial(height), spatial(width), *(min(size, max(2, size // 3)) for size in channels)]
        for path, (height, width, *channels) in convs.items()
    }


def tucker_size(shape, ranks):
    return math.prod(ranks) + sum(size * rank for size, rank in zip(shape, ranks))


@pytest.mark.parametrize("mode", ["train", "infer"])
@pytest.mark.parametrize("name", MODELS)
def test_dense_networks_are_ours(torch, name, mode):
    convs, parameters = kernels(name)
    built = torch.build("dense", mode=mode, model=name, method="dense", width=0.125, batch=2)
    assert built["convolutions"] == {path: math.prod(shape) for path, shape in convs.items()}, (
        "the same under our paths"
    )
    assert built["conv_parameters"] == sum(built["convolutions"].values())
    assert built["parameters"] == parameters, "BatchNorm's and the classifier's included"
    memory = torch.memory("dense")
    copies = 3 if mode == "train" else 1
    assert built["state_bytes"] == 4 * parameters * copies
    assert memory["parameter_bytes"] == 4 * parameters
    assert memory["gradient_bytes"] == memory["optimizer_bytes"] == 4 * parameters * (copies - 1) / 2
    assert memory["peak_rss_bytes"] > 2**25
    assert len(torch.run("dense", steps=2)) == 2


def test_the_shapes_of_other_images(torch):
    spec = {"mode": "infer", "method": "dense", "width": 0.125, "num_classes": 7, "image": [48, 64], "batch": 1}
    for name, model in MODELS.items():
        ours = nnx.eval_shape(
            lambda model=model: model(width=0.125, num_classes=7, input_shape=(48, 64), rngs=nnx.Rngs(0))
        )
        expected = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(ours, nnx.Param)))
        assert torch.build("other", model=name, **spec)["parameters"] == expected


# Computes our logits in PyTorch: arguments are the file of weights, images and logits, and the model's name.
SAME_LOGITS = """
data = np.load(sys.argv[2])
make = torch_peer.MODELS[sys.argv[3]]
model = make(lambda path, *sizes, **window: torch_peer.dense(*sizes, None, **window), 0.125, 10, (32, 32)).eval()
weights = {name: torch.tensor(data[name]) for name in data.files if name not in ("images", "logits")}
missing, unexpected = model.load_state_dict(weights, strict=False)
assert not unexpected and all("running" in name or "tracked" in name for name in missing), (missing, unexpected)
with torch.no_grad():
    found = model(torch.tensor(data["images"]))
torch.testing.assert_close(found, torch.tensor(data["logits"]), rtol=1e-4, atol=1e-5)
"""

# Compares the Tucker layers with the dense convolution of the kernel that they stand for.
SAME_CONVOLUTION = """
x = torch.randn(2, 6, 9, 9, dtype=torch.float64)
torch.set_default_dtype(torch.float64)
for height in (2, 3):
    sizes = dict(window=3, stride=2, padding=1)
    ours, theirs = (torch_peer.METHODS[name](6, 5, [4, 3, height, 2], **sizes) for name in ("factorized", "tensorly"))
    eye = torch.eye(3)
    factors = [ours.outward.weight.flatten(1), ours.inward.weight.flatten(1).T]
    factors += [eye if ours.height is None else ours.height, ours.width]
    for layer, core, factors in (
        (ours, ours.core.weight, factors),
        (theirs, theirs.weight.core, list(theirs.weight.factors)),
    ):
        kernel = torch.einsum("oihw,ao,bi,ch,dw->abcd", core, *factors)
        expected = torch.nn.functional.conv2d(x, kernel, stride=2, padding=1)
        torch.testing.assert_close(layer(x), expected)
        assert abs(kernel.norm() / 5**0.5 - 1) < 0.5, "as large as a dense kernel at its start"
"""


def run_in_environment(code, *arguments):
    """Runs code with the peer's module at hand as ``torch_peer``; arguments start at ``sys.argv[2]``."""
    python = available()
    if python is None:
        pytest.skip("no environment of peers: make peers")
    start = "import sys; sys.path.append(sys.argv[1]); import numpy as np, torch, torch_peer; torch.manual_seed(0)\n"
    command = [python, "-I", "-c", start + code, SCRIPT.parent, *arguments]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_ours(tmp_path, rng, name):
    model = MODELS[name](width=0.125, rngs=nnx.Rngs(0))
    model.eval()
    images = rng.normal(size=(3, 32, 32, 3)).astype(np.float32)
    leaves = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    weights = {}
    for path, leaf in leaves:
        path, leaf = jax.tree_util.keystr(path, simple=True, separator="."), np.asarray(leaf)
        if path == "classifier.kernel" and name == "alexnet":  # ours flattens rows, columns, channels
            leaf = leaf.reshape(2, 2, -1, 10).transpose(2, 0, 1, 3).reshape(-1, 10)
        layout = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}[leaf.ndim]
        weights[path.replace(".kernel", ".weight").replace(".scale", ".weight")] = leaf.transpose(layout)
    data = tmp_path / "weights.npz"
    np.savez(data, images=images.transpose(0, 3, 1, 2), logits=np.asarray(model(images)), **weights)
    run_in_environment(SAME_LOGITS, data, name)


def test_tucker_layers_are_convolutions_of_their_kernels():
    run_in_environment(SAME_CONVOLUTION)


@pytest.mark.parametrize("method", ["factorized", "tensorly"])
@pytest.mark.parametrize("name", MODELS)
def test_tucker_networks_have_the_given_ranks(torch, name, method):
    convs, _ = kernels(name)
    ranks = ranks_of(name)
    dense = next(iter(convs))
    del ranks[dense]
    built = torch.build("low", mode="train", model=name, method=method, width=0.125, batch=2, ranks=ranks)
    spatial = method == "tensorly"  # a factor for a mode at full rank, which three convolutions do without
    expected = {
        path: tucker_size(shape, ranks[path]) - (0 if spatial else shape[0] ** 2 + shape[1] ** 2)
        for path, shape in convs.items()
        if path in ranks
    }
    assert built["convolutions"] == {dense: math.prod(convs[dense]), **expected}


@pytest.mark.parametrize("method", ["factorized", "tensorly"])
def test_lower_spatial_ranks(torch, method):
    convs, _ = kernels("vgg16")
    ranks = ranks_of("vgg16", spatial=lambda window: window - 1)
    built = torch.build("low", mode="train", model="vgg16", method=method, width=0.125, batch=2, ranks=ranks)
    assert built["convolutions"] == {path: tucker_size(shape, ranks[path]) for path, shape in convs.items()}


@pytest.mark.parametrize("method, ranks", [("dense", None), ("factorized", "low"), ("tensorly", "low")])
@pytest.mark.parametrize("name", MODELS)
def test_losses_fall(torch, name, method, ranks):
    ranks = ranks and ranks_of(name)
    spec = {"width": 0.125, "batch": 8, "learning_rate": 0.05, "momentum": 0.9, "seed": 1, "ranks": ranks}
    torch.build("falls", mode="train", model=name, method=method, **spec)
    reply = torch.request("run", id="falls", steps=5)
    assert reply["losses"][-1] < reply["losses"][0]
    assert all(second > 0 for second in reply["seconds"])
    torch.build("again", mode="train", model=name, method=method, **spec)
    again = torch.request("run", id="again", steps=5)
    assert again["losses"] == pytest.approx(reply["losses"], rel=1e-3), "the seed decides"


def test_what_pytorch_refuses(torch):
    spec = {"mode": "train", "model": "vgg16", "method": "factorized", "width": 0.125, "batch": 2}
    for change, message in (
        ({"model": "vgg19"}, "model='vgg19': expected one of vgg16, alexnet, resnet18"),
        ({"method": "tucker"}, "method='tucker': expected one of dense, factorized, tensorly"),
        ({"mode": "test"}, "mode='test': expected one of train, infer"),
        ({"ranks": {"convs/13": [3, 3, 2, 2]}}, "ranks of convs/13: expected convolutions among convs/0, convs/1"),
        ({"ranks": {"convs/1": [4, 3, 2, 2]}}, r"convs/1: ranks=\[4, 3, 2, 2\].*\(3, 3, 8, 8\)"),
        ({"ranks": {"convs/1": [3, 3, 2]}}, r"convs/1: ranks=\[3, 3, 2\].*\(3, 3, 8, 8\)"),
        ({"method": "dense", "ranks": {"convs/1": [3, 3, 2, 2]}}, "method='dense'"),
        ({"colour": "red"}, "colour"),
    ):
        with pytest.raises(RuntimeError, match=f"refused .*{message}"):
            torch.build("bad", **{**spec, **change})
    with pytest.raises(RuntimeError, match="id='bad'"):
        torch.run("bad")
    torch.build("good", **spec)
    torch.drop("good")
    with pytest.raises(RuntimeError, match="id='good'"):
        torch.memory("good")
    with pytest.raises(RuntimeError, match="op='reset'"):
        torch.request("reset")


def test_versions_and_threads(torch):
    assert torch.threads == 1
    assert {"python", "torch", "tensorly", "tensorly-torch"} <= set(torch.versions)
    assert os.path.exists(torch.python)
