"""Layers for models of your own; each wraps the fused operations of `gankern.ops`."""

from gankern.nn.batch_norm import BatchNorm
from gankern.nn.layers import (
    AdaIN,
    Blur,
    Downsample,
    EqualizedConv2d,
    EqualizedLinear,
    FusedLeakyReLU,
    MinibatchStdDev,
    NoiseInjection,
    PixelNorm,
    Upsample,
)
from gankern.nn.mapping import MappingNetwork
from gankern.nn.synthesis import ModulatedConv2d, SynthesisLayer, ToRGB

__all__ = [
    "AdaIN",
    "BatchNorm",
    "Blur",
    "Downsample",
    "EqualizedConv2d",
    "EqualizedLinear",
    "FusedLeakyReLU",
    "MappingNetwork",
    "MinibatchStdDev",
    "ModulatedConv2d",
    "NoiseInjection",
    "PixelNorm",
    "SynthesisLayer",
    "ToRGB",
    "Upsample",
]
