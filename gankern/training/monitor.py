"""What a tick adds to a run's statistics, the alarms on them, and what the run does about those."""

from __future__ import annotations

import resource
import sys
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gankern.data import Dataset
from gankern.models.levels import shrink
from gankern.training.config import TrainConfig, TrainError
from gankern.training.distributed import average
from gankern.training.health import Alarm, Health
from gankern.training.noise import derive_seed
from gankern.training.probe import ANCHORS, SAMPLES, SIDE, Probe, weight_norm
from gankern.training.stats import finite

LOGISTIC = ("nonsaturating", "minimax")  # losses for which sigmoid(logit) is a probability
JUDGED = 64  # training and held-out images that D judges at each tick


class Unhealthy(TrainError):
    """A severe alarm in a run that shall not go on as it is."""

    def __init__(self, alarm: Alarm, text: str) -> None:
        super().__init__(text)
        self.alarm = alarm


class Monitor:
    """Fills in the row of a tick, and watches it.

    Args:
        config: of the run.
        dataset: images trained on.
        held: images held out, or None.
        G, D: the networks as they are before the first step.
        device: of the networks.
        world: number of processes; all take the same decision.
    """

    def __init__(
        self,
        config: TrainConfig,
        dataset: Dataset,
        held: Dataset | None,
        G: nn.Module,
        D: nn.Module,
        device: torch.device,
        world: int = 1,
    ) -> None:
        self.config, self.device, self.world = config, device, world
        rng = np.random.default_rng(derive_seed(config.first_seed, "grid"))
        chosen = rng.permutation(len(dataset))[: SAMPLES + ANCHORS]
        pieces = np.resize(chosen, max(len(chosen), 2)).tolist()
        small = [shrunk(dataset.batch([i])[0]) for i in pieces]
        self.probe = Probe(torch.cat(small).nan_to_num(0), device)
        self.judged: list[tuple[Dataset, np.ndarray]] = []
        if held is not None:
            self.judged = [(s, rng.permutation(len(s))[:JUDGED]) for s in (dataset, held)]
        self.health = Health(config.loss in LOGISTIC)
        self.health.start(weight_norms(G, D))

    def fill(
        self, row: dict[str, Any], G: nn.Module, D: nn.Module, images: Tensor, c: Tensor | None
    ) -> None:
        """Adds weight norms, broken buffers, variety of samples, D's held-out logits, and memory.

        Args:
            row: of stats.jsonl.
            G, D: the networks.
            images: samples of fixed latents, [N, C, H, W].
            c: their conditions, or None.
        """
        row |= weight_norms(G, D) | broken_buffers(G, D) | self.probe(shrunk(images))
        if self.judged:
            row |= self._judge(D, images, c)
        row["peak_mib"] = round(peak_memory(self.device) / 2**20, 1)

    def look(self, row: dict[str, Any]) -> tuple[list[Alarm], Unhealthy | None]:
        """New alarms of a filled row, which they are added to, and why training cannot go on.

        That is so where `--on-alarm` is stop or rollback and an alarm is severe, or a number of the
        row is not finite, so that nothing is left to go on with.
        """
        alarms = self.health.tick(row)
        if alarms:
            row["alarms"] = [alarm.to_json() for alarm in alarms]
        broken = [name for name, value in row.items() if not finite(value)]
        severe = [alarm for alarm in alarms if alarm.severe]
        wanted = self.config.on_alarm != "warn" and bool(severe)
        flag = torch.tensor(float(wanted or bool(broken)), device=self.device)
        if average(flag, self.world) > 0:
            alarm = (severe or alarms or [self._elsewhere(row)])[0]
            text = f"stopped at {row['kimg']:g} kimg by an alarm: {alarm}"
            if broken:
                text = (
                    f"{broken[0]} is {row[broken[0]]} at {row['kimg']} kimg: training has diverged;"
                    " go on from the last checkpoint, or start again with a lower learning rate"
                )
            return alarms, Unhealthy(alarm, text)
        return alarms, None

    def state_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return self.health.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from what `state_dict` gave."""
        self.health.load_state_dict(state)

    def _condition(self, labels: Tensor | None) -> Tensor | None:
        """[N, c_dim] of labels, as D takes it."""
        if labels is None or not self.config.c_dim:
            return None
        if labels.is_floating_point():
            return labels
        return nn.functional.one_hot(labels, self.config.c_dim).float()

    @torch.no_grad()
    def _judge(self, D: nn.Module, fake: Tensor, fake_c: Tensor | None) -> dict[str, float]:
        """D's mean logits of training, held-out and generated images, in evaluation mode."""
        training = D.training
        D.eval()
        means = []
        for dataset, index in self.judged:
            logits = []
            for start in range(0, len(index), self.config.batch):
                images, labels = dataset.batch(
                    index[start : start + self.config.batch], self.device
                )
                logits.append(self._logits(D, images, self._condition(labels)))
            means.append(float(torch.cat(logits).mean()))
        made = zip(*(self._pieces(t, len(fake)) for t in (fake, fake_c)), strict=True)
        means.append(float(torch.cat([self._logits(D, images, c) for images, c in made]).mean()))
        D.train(training)
        return dict(zip(("judged_train", "judged_held", "judged_fake"), means, strict=True))

    def _pieces(self, values: Tensor | None, count: int) -> list[Tensor] | list[None]:
        """Parts of at most a batch."""
        if values is None:
            return [None] * -(-count // self.config.batch)
        return list(values.split(self.config.batch))

    def _logits(self, D: Any, images: Tensor, c: Tensor | None) -> Tensor:
        return D(shrink(images, D) if self.config.grows else images, c).float()

    @staticmethod
    def _elsewhere(row: dict[str, Any]) -> Alarm:
        kimg = row["kimg"]
        return Alarm("another process", kimg, kimg, "an alarm there", {}, "see its output", True)


def weight_norms(G: nn.Module, D: nn.Module) -> dict[str, float]:
    """Lengths of all parameters of each network."""
    return {"weight_norm_G": weight_norm(G), "weight_norm_D": weight_norm(D)}


def broken_buffers(G: nn.Module, D: nn.Module) -> dict[str, int]:
    """Buffers of each network (running means and variances) that hold a NaN or an infinity, if any.

    A step that is left out does not mend them: batch norm has seen the images by then.
    """
    found = {}
    for name, net in (("G", G), ("D", D)):
        flags = [~b.isfinite().all() for b in net.buffers() if b.is_floating_point()]
        if flags and (count := int(torch.stack(flags).sum())):
            found[f"nan_buffers_{name}"] = count
    return found


def shrunk(images: Tensor) -> Tensor:
    """Images as the probe takes them: [N, C, 32, 32]."""
    return nn.functional.adaptive_avg_pool2d(images.float(), SIDE)


def decisions(real: Tensor, fake: Tensor, loss: str) -> dict[str, Tensor]:
    """How D decides: r_t = E[sign D(real)] (Karras et al. 2020), and the share that is right.

    Losses whose logits have no zero of their own are split halfway between the means.

    Args:
        real, fake: logits.
        loss: name of D's loss.
    """
    zero: Tensor | float = 0.5 if loss == "least-squares" else 0.0
    if loss in ("wasserstein", "relativistic"):
        zero = (real.mean() + fake.mean()) / 2
    right = ((real > zero).float().mean() + (fake < zero).float().mean()) / 2
    return {"r_t": (real - zero).sign().mean(), "acc_D": right}


def peak_memory(device: torch.device) -> int:
    """Most bytes in use so far: of tensors on a GPU, else of the process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
