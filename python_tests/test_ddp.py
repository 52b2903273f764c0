"""Processes under torchrun compute what one does with the same batch; lost ones are told."""

import os
import signal
import subprocess
import sys
import time

import processes
import pytest
import torch
from safetensors.torch import load_file

from gankern.training import checkpoint, make_config, train
from gankern.training.run import read_config, read_stats
from gankern.training.stats import WALL_CLOCK

OPTIONS = {"width": 4, "d_width": 4, "d_dropout": 0, "batch": 32, "grid": 2}

# Dropout is off: each process draws its own. Batch norm in G and D spans the processes, minibatch
# standard deviation does not: groups of one image make it a constant.
LEVELS = {
    "data": "digits:16", "channel_base": 64, "channel_max": 8, "mbstd_group": 1, "r1_gamma": 1.0,
    "z_dim": 8,
}  # fmt: skip
STYLES = LEVELS | {"w_dim": 8, "mapping_layers": 2, "style_mixing": 0.5}
STEP = OPTIONS | {"kimg": 0.032, "tick_kimg": 0.032}
STEPS = {
    "vanilla": STEP | {"model": "vanilla"},
    "dcgan": STEP | {"model": "dcgan", "batch_gpu": 8},
    "pggan": STEP | LEVELS | {"model": "pggan", "stable_kimg": 0.016, "grow_from": 8},
    "stylegan2": STEP | STYLES | {"model": "stylegan2"},
}
PARTS = OPTIONS | {"d_dropout": 0.3, "tick_kimg": 0.032, "checkpoint_ticks": 2}
# What two processes do one after the other, in one start of them: run folder, kimg, options.
TWO = [
    *((name, 0.032, STEPS[name]) for name in ("vanilla", "pggan", "stylegan2")),
    ("whole", 0.128, PARTS),
    ("part", 0.064, PARTS),
    ("part", 0.128, {}),  # goes on
]

pytestmark = pytest.mark.xdist_group("ddp")


def the_run(out):
    (run,) = out.iterdir()
    return run


def train_all(out, runs):
    """In every process: trains each, or goes on where no options are given."""
    for name, kimg, options in runs:
        torch.distributed.barrier()  # the first process has written all of the run before
        if options:
            train(make_config(**options | {"kimg": kimg}, device="cpu", out=str(out / name)))
            continue
        config = read_config(the_run(out / name))
        config.kimg = kimg
        train(config, the_run(out / name))


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    out = tmp_path_factory.mktemp("two")
    processes.run(2, train_all, out, TWO)
    return out


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    out = tmp_path_factory.mktemp("four")
    processes.run(4, train_all, out, [("dcgan", 0.032, STEPS["dcgan"])])
    return out


def newest(run, name):
    return load_file(checkpoint.list_checkpoints(run)[-1] / f"{name}.safetensors")


@pytest.mark.parametrize("model", STEPS)
def test_processes_compute_the_step_of_one(model, request, tmp_path):
    one = train(make_config(**STEPS[model] | {"batch_gpu": 0}, out=str(tmp_path)))
    two = the_run(request.getfixturevalue("four" if model == "dcgan" else "two") / model)
    for name in ("D", "G"):
        # After one step Adam's mean is (1 - beta1) times the gradient.
        a, b = newest(one, f"optimizer_{name}"), newest(two, f"optimizer_{name}")
        assert a.keys() == b.keys()
        share = 1 - make_config().beta1
        gradients = {key: (a[key] / share, b[key] / share) for key in a if key.endswith("exp_avg")}
        largest = max(alone.abs().max().item() for alone, _ in gradients.values())
        assert largest > 0
        scalars = 0
        for key, (alone, ours) in gradients.items():
            if not alone.ndim:  # a noise strength: each process draws its own noise
                scalars += 1
                continue
            limit = 1e-6 * max(1.0, largest)
            torch.testing.assert_close(ours, alone, rtol=0, atol=limit, msg=f"{name} {key}")
        assert scalars == (5 if (model, name) == ("stylegan2", "G") else 0)
    for key, value in newest(one, "G").items():
        if "running" in key or "w_avg" in key:
            torch.testing.assert_close(newest(two, "G")[key], value, rtol=1e-5, atol=1e-6)
    for key in ("loss_D", "loss_G", "logit_real", "logit_fake"):
        assert read_stats(two)[0][key] == pytest.approx(read_stats(one)[0][key], abs=1e-5)


def test_two_processes_resume_exactly(two):
    whole, part = the_run(two / "whole"), the_run(two / "part")
    for name in ("G", "D", "G_ema", "optimizer_G", "optimizer_D"):
        a, b = newest(whole, name), newest(part, name)
        assert all(torch.equal(a[key], b[key]) for key in a), name
    for a, b in zip(read_stats(whole), read_stats(part), strict=True):
        assert {k: a[k] for k in a if k not in WALL_CLOCK} == {
            k: b[k] for k in b if k not in WALL_CLOCK
        }
    assert len(read_stats(part)) == 4


def test_one_process_tells_the_error(tmp_path):
    launch = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    command = [sys.executable, "-m", *launch, "gankern", "train", "--batch=33"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode
    assert result.stderr.count("gankern: --batch must be a multiple of 2 processes, got 33") == 1
    assert not list(tmp_path.iterdir())


def test_two_nodes_at_two_addresses(tmp_path):
    port = processes.free_port()
    options = OPTIONS | {"model": "vanilla", "kimg": 0.032, "tick_kimg": 0.032, "out": tmp_path}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    nodes = []
    for node in range(2):
        launch = [
            "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", f"--node-rank={node}",
            "--master-addr=127.0.0.1", f"--master-port={port}", f"--local-addr=127.0.0.{node + 1}",
        ]  # fmt: skip
        command = [sys.executable, "-m", *launch, "-m", "gankern", "train", *flags]
        environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo"}
        nodes.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    for node in nodes:
        _, err = node.communicate(timeout=300)
        assert node.returncode == 0, err
    (run,) = tmp_path.iterdir()
    assert read_stats(run)[0]["step"] == 1


def test_a_process_that_dies_stops_the_run_which_then_resumes(tmp_path):
    options = OPTIONS | {
        "model": "vanilla",
        "kimg": 5000,
        "tick_kimg": 0.032,
        "checkpoint_ticks": 2,
    }
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    # torchrun looks seldom enough that the process that is left can speak before it is ended.
    launch = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    launch += ["--monitor-interval", "10", "-m"]
    command = [sys.executable, "-m", *launch, "gankern", "train", *flags, f"--out={tmp_path}"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 200
    while not list(tmp_path.glob("0*/checkpoints/0*")) and time.monotonic() < deadline:
        time.sleep(0.2)
    listing = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True, check=True
    )
    os.kill(int(listing.stdout.split()[-1]), signal.SIGKILL)
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "has lost another of the 2: go on with --resume" in err
    (run,) = tmp_path.iterdir()
    reached = int(checkpoint.list_checkpoints(run)[-1].name)
    again = [*command[: command.index("train") + 1], "--resume", str(run)]
    result = subprocess.run(
        [*again, f"--kimg={(reached + 64) / 1000}"], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    assert int(checkpoint.list_checkpoints(run)[-1].name) == reached + 64
