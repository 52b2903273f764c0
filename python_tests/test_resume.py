"""Exact resume: a run killed at any moment and resumed gives what an unbroken one gives."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gankern.training import checkpoint, make_config, train
from gankern.training.run import read_config, read_stats
from gankern.training.stats import WALL_CLOCK

# Batch norm and dropout in D, ticks and checkpoints that do not fall on epochs.
OPTIONS = {
    "width": 4,
    "d_width": 4,
    "batch": 24,
    "kimg": 4,
    "tick_kimg": 0.12,
    "sample_ticks": 10,
    "checkpoint_ticks": 2,
    "grid": 3,
    "data": "digits:16",
}


def command(**values):
    options = [(f"--{name.replace('_', '-')}", str(value)) for name, value in values.items()]
    return [sys.executable, "-m", "gankern", "train", *(text for o in options for text in o)]


def assert_equal_runs(a: Path, b: Path):
    rows_a, rows_b = (
        [{k: v for k, v in row.items() if k not in WALL_CLOCK} for row in read_stats(run)]
        for run in (a, b)
    )
    assert rows_a == rows_b
    folders_a, folders_b = checkpoint.list_checkpoints(a), checkpoint.list_checkpoints(b)
    assert [f.name for f in folders_a] == [f.name for f in folders_b]
    for folder_a, folder_b in zip(folders_a, folders_b, strict=True):
        for file in sorted(folder_a.glob("*.safetensors")):
            one, two = load_file(file), load_file(folder_b / file.name)
            assert one.keys() == two.keys()
            assert all(torch.equal(one[key], two[key]) for key in one), file
    for sample in (a / "samples").iterdir():
        assert sample.read_bytes() == (b / "samples" / sample.name).read_bytes()


def test_killed_at_random_moments(tmp_path):
    seed = random.SystemRandom().randrange(10**6)
    print(f"moments from seed {seed}")
    moments = random.Random(seed)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    options = OPTIONS | {"device": "cpu"}  # no command makes a GPU's convolutions deterministic
    began = time.monotonic()
    unbroken = command(**options, out=tmp_path / "unbroken")
    subprocess.run(unbroken, check=True, env=environment, capture_output=True)
    duration = time.monotonic() - began

    arguments, kills = command(**options, out=tmp_path / "killed"), 0
    while True:
        process = subprocess.Popen(
            arguments, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        try:  # the third time it may finish
            limit = moments.uniform(0.2, 0.9) * duration if kills < 2 else None
            _, err = process.communicate(timeout=limit)
            assert process.returncode == 0, err.decode()
            if kills:
                break
            shutil.rmtree(tmp_path / "killed")  # faster than the first: once more, and sooner
            duration /= 2
            continue
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            kills += 1
        runs = sorted((tmp_path / "killed").glob("0*"))
        assert len(runs) <= 1
        if runs:
            arguments = [sys.executable, "-m", "gankern", "train", "--resume", str(runs[0])]
    print(f"killed {kills} times in runs of {duration:.1f} s")
    (a,), (b,) = (tmp_path / "unbroken").glob("0*"), (tmp_path / "killed").glob("0*")
    assert_equal_runs(a, b)
    assert not list(b.rglob(".*"))


def test_stopped_and_resumed_at_every_checkpoint(tmp_path):
    options = OPTIONS | {"kimg": 0.96}
    unbroken = train(make_config(**options, out=str(tmp_path / "a")))
    broken = train(make_config(**options | {"kimg": 0.24}, out=str(tmp_path / "b")))
    for kimg in (0.48, 0.72, 0.96):
        config = read_config(broken)
        config.kimg = kimg
        train(config, broken)
    assert_equal_runs(unbroken, broken)


def test_statistics_and_events_are_cut_back(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = OPTIONS | {"kimg": 0.48}
    run = train(make_config(**options, out=str(tmp_path)))
    newest = checkpoint.list_checkpoints(run)[-1]
    shutil.rmtree(newest)
    with open(run / "stats.jsonl", "ab") as file:
        file.write(b'{"kimg": 9')  # a torn line
    train(read_config(run), run)
    assert [row["kimg"] for row in read_stats(run)] == [0.12, 0.24, 0.36, 0.48]
    events = EventAccumulator(str(run))
    events.Reload()
    assert [event.step for event in events.Scalars("loss_D")] == [120, 240, 360, 480]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_killed_between_any_two_operations_on_files(tmp_path, monkeypatch):
    """A checkpoint is saved by a child that dies at its n-th operation; the parent must load it."""
    run = train(make_config(**OPTIONS | {"kimg": 0.48}, out=str(tmp_path)))
    saved = checkpoint.load_checkpoint(run)
    nets = {"G": torch.nn.Linear(3, 3)}
    old = [p.name for p in checkpoint.list_checkpoints(run)]
    for n in range(1, 40):
        copy = Path(shutil.copytree(run, tmp_path / f"copy{n}"))
        child = os.fork()
        if child == 0:
            die_at(n, monkeypatch)
            checkpoint.save(copy, 600, make_config(), nets, {})
            os._exit(0)
        finished = os.waitpid(child, 0)[1] == 0
        names = [p.name for p in checkpoint.list_checkpoints(copy)]
        assert names in ([*old], [*old, "000000000600"], [old[-1], "000000000600"]), n
        loaded = checkpoint.load_checkpoint(copy)
        assert loaded.damaged == []
        assert loaded.state["cur_nimg"] in (600, saved.state["cur_nimg"])
        if finished:
            assert names == [old[-1], "000000000600"]
            assert n > 8
            return
    raise AssertionError("saving never finished")


def die_at(n, monkeypatch):
    """Makes this process die instead of making its n-th operation on files."""
    count = 0

    def counted(function):
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count == n:
                os._exit(1)
            return function(*args, **kwargs)

        return call

    for name in ("fsync", "rename", "rmdir", "unlink", "mkdir"):
        monkeypatch.setattr(os, name, counted(getattr(os, name)))
    monkeypatch.setattr("builtins.open", counted(open))
