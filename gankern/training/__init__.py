"""The trainer: configuration, losses, loop, checkpoints."""

from gankern.training.config import TrainConfig, TrainError, make_config
from gankern.training.load import load_generator
from gankern.training.loop import train

__all__ = ["TrainConfig", "TrainError", "load_generator", "make_config", "train"]
