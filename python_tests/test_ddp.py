"""Two processes under torchrun compute what one does with the same batch."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from gankern.training import checkpoint
from gankern.training.run import read_stats
from gankern.training.stats import WALL_CLOCK

OPTIONS = {"width": 4, "d_width": 4, "d_dropout": 0, "batch": 32, "grid": 2}


def start(processes, out, **options):
    """Trains in so many processes, returns the run folder."""
    launch = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    command = [
        sys.executable, "-m", *(launch if processes > 1 else []), "gankern", "train",
        *flags, f"--out={out}",
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    (run,) = out.iterdir()
    return run


def newest(run, name):
    return load_file(checkpoint.list_checkpoints(run)[-1] / f"{name}.safetensors")


# Dropout is off: each process draws its own. Batch norm in G and D spans the processes.
@pytest.mark.parametrize("model", ["vanilla", "dcgan"])
def test_two_processes_compute_the_step_of_one(model, tmp_path):
    options = OPTIONS | {"model": model, "kimg": 0.032, "tick_kimg": 0.032}
    one = start(1, tmp_path / "one", **options)
    two = start(2, tmp_path / "two", **options)
    for name in ("D", "G"):
        # After one step Adam's mean is (1 - beta1) times the gradient.
        a, b = newest(one, f"optimizer_{name}"), newest(two, f"optimizer_{name}")
        for key in a:
            if key.endswith("exp_avg"):
                assert a[key].abs().max() > 0
                torch.testing.assert_close(
                    b[key], a[key], rtol=1e-4, atol=1e-6, msg=f"{name} {key}"
                )
    for key, value in newest(one, "G").items():
        if "running" in key:
            torch.testing.assert_close(newest(two, "G")[key], value, rtol=1e-5, atol=1e-6)
    for key in ("loss_D", "loss_G", "logit_real", "logit_fake"):
        assert read_stats(two)[0][key] == pytest.approx(read_stats(one)[0][key], abs=1e-5)


def test_two_processes_resume_exactly(tmp_path):
    options = OPTIONS | {"d_dropout": 0.3, "tick_kimg": 0.032, "checkpoint_ticks": 2}
    whole = start(2, tmp_path / "whole", **options, kimg=0.128)
    part = start(2, tmp_path / "part", **options, kimg=0.064)
    launch = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    command = [sys.executable, "-m", *launch, "gankern", "train", "--resume", part, "--kimg=0.128"]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    for name in ("G", "D", "G_ema", "optimizer_G", "optimizer_D"):
        a, b = newest(whole, name), newest(part, name)
        assert all(torch.equal(a[key], b[key]) for key in a), name
    for a, b in zip(read_stats(whole), read_stats(part), strict=True):
        assert {k: a[k] for k in a if k not in WALL_CLOCK} == {
            k: b[k] for k in b if k not in WALL_CLOCK
        }


def test_one_process_tells_the_error(tmp_path):
    launch = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    command = [sys.executable, "-m", *launch, "gankern", "train", "--batch=33"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode
    assert result.stderr.count("gankern: --batch must be a multiple of 2 processes, got 33") == 1
    assert not list(tmp_path.iterdir())
