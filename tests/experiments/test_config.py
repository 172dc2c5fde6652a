"""Options: what the command line takes and refuses, before anything slow is imported."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import train
from experiments.config import TrainConfig, changed_by_epochs, from_json
from experiments.options import DataConfig, ModelConfig, OptimizerConfig, RunConfig, TdlrtConfig

ROOT = Path(__file__).resolve().parents[2]


def test_help_lists_every_option_and_imports_nothing_slow():
    code = (
        "import sys; from experiments import train\n"
        "try: train.main(['--help'])\n"
        "except SystemExit as end: sys.exit(end.code or [m for m in ('jax', 'flax') if m in sys.modules] or 0)"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert process.returncode == 0, process.stderr
    for option in TrainConfig().to_json():
        assert f"--{option.replace('_', '-')}" in process.stdout, option
    assert "{digits,mnist,fashion_mnist,cifar10,cifar100}" in process.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tau", "-0.1"], "--tau -0.1: expected a number at least 0"),
        (["--tau", "1.5"], r"--tau 1.5: expected a relative tolerance in \[0, 1\)"),
        (["--learning-rate", "0"], "--learning-rate 0.0: expected a number above 0"),
        (["--epochs", "0"], "--epochs 0: expected a number at least 1"),
        (["--rank", "1.5"], "--rank 1.5: expected a fraction up to 1.0 or a whole number"),
        (["--min-rank", "4", "--max-rank", "3"], "--max-rank 3: expected a number at least 4"),
        (["--width", "0.5"], "--width 0.5: lenet5 has one width"),
        (["--hidden-units", "64"], "--hidden-units 64: not of lenet5, expected --model alexnet or vgg16"),
        (
            ["--model", "resnet18", "--dropout", "0.5"],
            "--dropout 0.5: not of resnet18, expected --model alexnet or vgg16",
        ),
        (["--model", "vgg16", "--dropout", "1"], r"--dropout 1.0: expected a rate in \[0, 1\)"),
        (["--model", "vgg16", "--windows", "small"], "--windows small: not of vgg16, expected --model alexnet"),
        (["--model", "vgg16", "--hidden-units", "-1"], "--hidden-units -1: expected a number at least 0"),
        (["--freeze-epochs", "inf"], "--freeze-epochs inf: expected a number at least 0"),
        (["--budget", "0.9", "--budget-epochs", "inf"], "--budget-epochs inf: expected a number above 0"),
        (["--learning-rate", "inf"], "--learning-rate inf: expected a number above 0"),
        (["--model", "vgg16", "--width", "1e9"], "--width 1000000000.0: expected a number above 0 and at most 1000"),
        (["--warmup", "1000000000000"], "--warmup 1000000000000: expected a number at least 0 and at most 2147483647"),
        (["--adapt-every", "100000000000"], "expected a number at least 1 and at most 2147483647"),
        (["--spare", "100000000000"], "expected a number at least 0 and at most 2147483647"),
        (["--validation", "0.95"], "--validation 0.95: expected a number at least 0 and at most 0.9"),
        (["--momentum", "1"], "--momentum 1.0"),
        (
            ["--method", "tucker", "--budget", "0.9"],
            "--budget 0.9 has no effect on --method tucker, .* say what to save with --compression",
        ),
        (["--method", "snip", "--compression", "0.9", "--budget", "0.9"], "no effect on --method snip"),
        (["--resume"], "name the run to continue with --run-dir"),
        (["--dataset", "imagenet"], "cifar100"),
        (["--integrator", "euler"], "fixed_rank"),
        (["--no-such-option"], "--no-such-option"),
    ],
)
def test_bad_options_are_refused_with_a_reason(capsys, arguments, words):
    try:
        code = train.main(arguments)
    except SystemExit as end:
        code = end.code
    assert code == 2
    message = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert re.search(words, message), message


def test_names_are_checked_without_a_command_line_too():
    with pytest.raises(ValueError, match="--dataset svhn: expected one of digits, mnist"):
        DataConfig(dataset="svhn")
    with pytest.raises(ValueError, match="--schedule step"):
        OptimizerConfig(schedule="step")


def test_a_tolerance_that_is_absolute_may_be_large():
    assert TdlrtConfig(tau=2.0, convention="absolute").tau == 2.0


def test_digits_are_never_mirrored_unless_asked():
    chosen = {
        (dataset, augment): (config.crop, config.flip)
        for dataset in ("digits", "mnist", "cifar10", "cifar100")
        for augment in ("auto", "crop_flip", "crop", "off")
        for config in [DataConfig(dataset=dataset, augment=augment)]
    }
    assert [chosen[name, "auto"] for name in ("digits", "mnist", "cifar10", "cifar100")] == [
        (True, False),
        (False, False),
        (True, True),
        (True, True),
    ]
    for (_, augment), choice in chosen.items():
        if augment != "auto":
            assert choice == {"crop_flip": (True, True), "crop": (True, False), "off": (False, False)}[augment]


def test_a_compilation_costs_the_job_what_it_costs_the_library():
    from tdlrt_jax.capacity import COMPILATION_STEPS  # which imports what is slow

    assert TdlrtConfig().compilation_steps == COMPILATION_STEPS


def test_options_as_json_are_flat_and_complete(tmp_path):
    flat = TrainConfig(run=RunConfig(run_dir=tmp_path, seed=3), model=ModelConfig(rank=8)).to_json()
    assert (
        flat["run_dir"] == str(tmp_path)
        and flat["seed"] == 3
        and flat["rank"] == 8
        and flat["tau"] == TdlrtConfig().tau
    )


def test_a_budget_that_a_dense_network_ignores_is_no_obstacle_to_more_epochs():
    options = {"schedule": "constant", "budget": 0.9}
    assert "budget" in changed_by_epochs(from_json({**options, "method": "tdlrt"}))
    assert changed_by_epochs(from_json({**options, "method": "dense"})) is None
