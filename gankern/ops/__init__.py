"""Fused operations for GANs, each in one module: public function, reference, kernels, autograd."""

from gankern.ops.adain import adain
from gankern.ops.bias_act import bias_act
from gankern.ops.conv2d_resample import conv2d_resample
from gankern.ops.convolution import no_weight_gradients
from gankern.ops.demod_coefs import demod_coefs
from gankern.ops.minibatch_stddev import minibatch_stddev
from gankern.ops.modulated_conv2d import modulated_conv2d
from gankern.ops.modulated_gemm import modulated_gemm
from gankern.ops.pixel_norm import pixel_norm
from gankern.ops.synthesis_epilogue import synthesis_epilogue
from gankern.ops.synthesis_layer import conv2d_layer, synthesis_layer
from gankern.ops.upfirdn2d import downsample2d, filter2d, setup_filter, upfirdn2d, upsample2d

__all__ = [
    "adain",
    "bias_act",
    "conv2d_layer",
    "conv2d_resample",
    "demod_coefs",
    "downsample2d",
    "filter2d",
    "minibatch_stddev",
    "modulated_conv2d",
    "modulated_gemm",
    "no_weight_gradients",
    "pixel_norm",
    "setup_filter",
    "synthesis_epilogue",
    "synthesis_layer",
    "upfirdn2d",
    "upsample2d",
]
