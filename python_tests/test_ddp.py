"""Processes under torchrun compute what one does with the same batch; lost ones are told.

All run on the CPU: nccl refuses two processes on one GPU.
"""

import os
import signal
import subprocess
import sys
import time
from unittest import mock

import processes
import pytest
import torch
from safetensors.torch import load_file, save_file

from gankern import models
from gankern.cli import main
from gankern.training import checkpoint, make_config, train
from gankern.training.distributed import average_gradients, rank_and_world
from gankern.training.phases import Part, Phases
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
# Adam's first step divides a gradient by its size: one that rounding alone makes, 1e-9 where others
# have 0.1, moves a weight of D by up to the learning rate either way, and with it G's gradient. At
# 2e-6 that is at most 1.4e-6 of G's largest; a missing step of D still moves it by 1.8e-4 or more.
STEP = OPTIONS | {"kimg": 0.032, "tick_kimg": 0.032, "d_lr": 2e-6}
STEPS = {
    "vanilla": STEP | {"model": "vanilla"},
    "dcgan": STEP | {"model": "dcgan", "batch_gpu": 8},
    "pggan": STEP | LEVELS | {"model": "pggan", "stable_kimg": 0.016, "grow_from": 8},
    "stylegan2": STEP | STYLES | {"model": "stylegan2"},
}
# What is interrupted and goes on: kimg of the first part and of the whole, options.
SHORT = {"batch": 8, "tick_kimg": 0.016, "checkpoint_ticks": 1, "mbstd_group": 2, "r1_gamma": 1.0}
RESUMED = {
    "dcgan": (0.064, 0.128, OPTIONS | {
        "d_dropout": 0.3, "tick_kimg": 0.032, "checkpoint_ticks": 2,
    }),
    "stylegan2": (0.024, 0.048, OPTIONS | STYLES | SHORT | {
        "model": "stylegan2", "augment": "ada", "ada_p": 0.5, "ada_kimg": 0.1, "ada_interval": 2,
        "d_reg_interval": 2, "pl_weight": 2.0, "g_reg_interval": 2, "ema_kimg": 0.02,
        "ema_rampup": 0.0, "tick_kimg": 0.008,
    }),
    "pggan": (0.032, 0.064, OPTIONS | LEVELS | SHORT | {
        "model": "pggan", "stable_kimg": 0.016, "fade_kimg": 0.032, "level_batch": "8:16",
    }),
}  # fmt: skip
# What two processes do one after the other, in one start of them: run folder, kimg, options.
TWO = [(name, 0.032, STEPS[name]) for name in ("vanilla", "pggan", "stylegan2")]
for name, (half, full, options) in RESUMED.items():
    TWO += [(f"{name} whole", full, options), (f"{name} part", half, options)]
    TWO += [(f"{name} part", full, {})]  # goes on

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
        go_on(the_run(out / name), kimg)


def go_on(run, kimg):
    """In every process."""
    config = read_config(run)
    config.kimg = kimg
    train(config, run)


def gradients(model):
    """Of D and G over this process's part of a batch of 8, averaged over all, in float64.

    Noise is ones, since each process draws its own.
    """
    rank, world = rank_and_world()
    config = make_config(**STEPS[model] | {"style_mixing": 0.0, "r1_gamma": 1.0})
    config.resolution, config.channels, config.num_classes = (16, 16), 1, 10
    torch.manual_seed(0)
    G, D = (net.train().double() for net in models.build(config))
    real, z = torch.rand(8, 1, 16, 16).double() * 2 - 1, torch.randn(8, config.z_dim).double()
    c = torch.eye(10).double()[:8]
    part = Part(real, c, z, c.flip(0)).split(world)[rank]
    phases = Phases(config, G, D, lambda img: img, torch.device("cpu"), world)
    passes = [(D, phases.main_D), (D, phases.regularise_D), (G, phases.main_G)]
    if model == "stylegan2":
        config.pl_weight, config.pl_batch_shrink = 2.0, 1
        phases.pl_mean = phases.pl_mean.double()
        passes.append((G, phases.regularise_G))
    found = {}
    with mock.patch.multiple(torch, randn=torch.ones, randn_like=torch.ones_like):
        for net, run in passes:
            net.zero_grad()
            run(part, lambda loss: loss)
            average_gradients(net, world)
            grads = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
            found |= {f"{run.__name__} {name}": grad.clone() for name, grad in grads.items()}
    return found


def train_and_judge(out, runs):
    """In every process: `train_all`, then `gradients` of each model, which the first writes."""
    train_all(out, runs)
    for model in STEPS:
        found = gradients(model)
        if rank_and_world()[0] == 0:
            save_file(found, out / f"{model}.safetensors")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    out = tmp_path_factory.mktemp("two")
    processes.run(2, train_and_judge, out, TWO)
    return out


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    out = tmp_path_factory.mktemp("four")
    processes.run(4, train_and_judge, out, [("dcgan", 0.032, STEPS["dcgan"])])
    return out


def newest(run, name):
    return load_file(checkpoint.list_checkpoints(run)[-1] / f"{name}.safetensors")


def assert_same_gradients(one, other, model):
    """Of the one step of two runs, in float32: to 4e-6 of a network's largest gradient."""
    for name in ("D", "G"):
        # After one step Adam's mean is (1 - beta1) times the gradient.
        a, b = newest(one, f"optimizer_{name}"), newest(other, f"optimizer_{name}")
        assert a.keys() == b.keys()
        share = 1 - make_config().beta1
        found = {key: (a[key] / share, b[key] / share) for key in a if key.endswith("exp_avg")}
        largest = max(alone.abs().max().item() for alone, _ in found.values())
        assert largest > 0
        scalars = 0
        for key, (alone, ours) in found.items():
            if not alone.ndim:  # a noise strength: each process draws its own noise
                scalars += 1
                continue
            limit = 4e-6 * largest
            torch.testing.assert_close(ours, alone, rtol=0, atol=limit, msg=f"{name} {key}")
        assert scalars == (5 if (model, name) == ("stylegan2", "G") else 0)


@pytest.mark.parametrize("model", STEPS)
def test_processes_compute_the_step_of_one(model, request, tmp_path):
    options = STEPS[model] | {"batch_gpu": 0, "device": "cpu"}
    one = train(make_config(**options, out=str(tmp_path)))
    two = the_run(request.getfixturevalue("four" if model == "dcgan" else "two") / model)
    assert_same_gradients(one, two, model)
    for key, value in newest(one, "G").items():
        if "running" in key or "w_avg" in key:
            torch.testing.assert_close(newest(two, "G")[key], value, rtol=1e-5, atol=1e-6)
    for key in ("loss_D", "loss_G", "logit_real", "logit_fake"):
        assert read_stats(two)[0][key] == pytest.approx(read_stats(one)[0][key], abs=1e-5)


@pytest.mark.parametrize("model", STEPS)
def test_gradients_of_processes_are_those_of_one(model, two, four):
    """In float64, where rounding hides nothing: each parameter's to 1e-12 of its largest."""
    alone = gradients(model)
    for out in (two, four):
        ours = load_file(out / f"{model}.safetensors")
        assert ours.keys() == alone.keys()
        for name, grad in alone.items():
            error, largest = (ours[name] - grad).abs().max(), grad.abs().max()
            assert error <= 1e-12 * largest, f"{name}: {error / largest:.1e} of {largest:.1e}"


@pytest.mark.parametrize("model", RESUMED)
def test_two_processes_resume_exactly(model, two):
    whole, part = the_run(two / f"{model} whole"), the_run(two / f"{model} part")
    states = [checkpoint.load_checkpoint(run) for run in (whole, part)]
    assert states[0].state["engine"] == states[1].state["engine"]
    for name in ("G", "D", "G_ema", "optimizer_G", "optimizer_D"):
        a, b = (state.tensors[name] for state in states)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a), name
    rows, others = (
        [{k: v for k, v in row.items() if k not in WALL_CLOCK} for row in read_stats(run)]
        for run in (whole, part)
    )
    assert rows == others
    assert len(rows) == {"dcgan": 4, "stylegan2": 6, "pggan": 4}[model]
    if model == "pggan":
        assert 0 < rows[1]["growth"] < rows[2]["growth"] < 1  # the second goes on
    if model == "stylegan2":
        assert {"r1", "path_length", "pl_mean", "ada_p"} <= rows[4].keys()
        assert states[0].state["engine"]["ada"]["p"] not in (0, 0.5, 1)
        assert any(
            not torch.equal(states[0].tensors["G_ema"][key], value)
            for key, value in states[0].tensors["G"].items()
        )


def fail_by_command(out):
    """In every process: a command that cannot run; what it says goes to a file."""
    with open(out / f"said by {rank_and_world()[0]}", "w") as file:
        os.dup2(file.fileno(), 2)
        with pytest.raises(SystemExit) as exit:
            main(["train", "--device=cpu", "--batch=33", f"--out={out / 'runs'}"])
    assert exit.value.code


def test_one_process_tells_the_error(tmp_path):
    processes.run(2, fail_by_command, tmp_path)
    said = [(tmp_path / f"said by {rank}").read_text() for rank in range(2)]
    assert said == ["gankern: --batch must be a multiple of 2 processes, got 33\n", ""]
    assert not (tmp_path / "runs").exists()


def test_two_nodes_at_two_addresses(tmp_path):
    port = processes.free_port()
    options = STEPS["vanilla"] | {"device": "cpu", "out": tmp_path / "two"}
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
    run = the_run(tmp_path / "two")
    assert read_stats(run)[0]["step"] == 1
    one = train(make_config(**options | {"out": str(tmp_path / "one")}))
    assert_same_gradients(one, run, "vanilla")


def test_a_process_that_dies_stops_the_run_which_then_resumes(tmp_path):
    options = OPTIONS | {
        "model": "vanilla",
        "kimg": 5000,
        "tick_kimg": 0.032,
        "checkpoint_ticks": 2,
        "device": "cpu",
    }
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    # torchrun looks seldom enough that the process that is left can speak before it is ended.
    launch = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    launch += ["--monitor-interval", "10", "-m"]
    command = [sys.executable, "-m", *launch, "gankern", "train", *flags, f"--out={tmp_path}"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 200
    while not list(tmp_path.glob("0*/checkpoints/0*")) and time.monotonic() < deadline:
        assert process.poll() is None, process.stderr.read()
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
    processes.run(2, go_on, run, (reached + 64) / 1000)
    assert int(checkpoint.list_checkpoints(run)[-1].name) == reached + 64
