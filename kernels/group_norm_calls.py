"""Calls of `group_norm` in models, for which its kernels are compiled ahead of time."""

from __future__ import annotations

from typing import NamedTuple

from pydiff.kernels.group_norm_tiling import Sizes

AFFINE = ("weight", "bias")
# U-Nets: at each size of the image the widths of its blocks, and on the way up (all, second input's) channels.
Levels = dict[int, tuple[tuple[int, ...], tuple[tuple[int, int], ...]]]
SD15: Levels = {
    64: ((320,), ((640, 320), (960, 320))),
    32: ((320, 640), ((960, 320), (1280, 640), (1920, 640))),
    16: ((640, 1280), ((1920, 640), (2560, 1280))),
    8: ((1280,), ((2560, 1280),)),
}
SDXL: Levels = {
    128: ((320,), ((640, 320), (960, 320))),
    64: ((320, 640), ((960, 320), (1280, 640), (1920, 640))),
    32: ((640, 1280), ((1920, 640), (2560, 1280))),
}
VAE_DECODER = ((512, 128), (512, 256), (512, 512), (256, 512), (256, 1024), (128, 1024))  # (channels, size)


class NormCall(NamedTuple):
    """A call in 32 groups: `channels` of an image of size x size, `channels2` of them in a second input."""

    channels: int
    size: int
    channels2: int = 0
    given: tuple[str, ...] = AFFINE  # tensors besides the inputs
    samples: int = 2
    dtype: str = "bf16"
    nhwc: bool = True
    silu: bool = True

    @property
    def sizes(self) -> Sizes:
        channels1, itemsize = self.channels - self.channels2, 4 if self.dtype == "fp32" else 2
        return Sizes(self.samples, channels1, self.channels2, self.size**2, 32, itemsize, self.nhwc)

    @property
    def tensors(self) -> tuple[str, ...]:
        """The names of all that the kernels are given, in the dtype of x."""
        more = (*(("x2",) if self.channels2 else ()), *(("summed",) if "residual" in self.given else ()))
        return ("x", "y", *self.given, *more)

    def __str__(self) -> str:
        shape = (self.samples, self.channels, self.size**2, 32)
        extra = "+".join(name for name in self.tensors if name not in ("x", "y", *AFFINE))
        return f"{shape} {self.dtype} {'nhwc' if self.nhwc else 'nchw'} {'silu' if self.silu else ''} {extra}"


def _unet(levels: Levels) -> list[NormCall]:
    """The norms of a U-Net at batch 2: before attention, and before and behind the time embedding."""
    found = []
    for size, (widths, concatenated) in levels.items():
        for width in widths:
            found += [
                NormCall(width, size, silu=False),
                NormCall(width, size),
                NormCall(width, size, given=(*AFFINE, "add")),
            ]
        found += [NormCall(channels, size, channels2) for channels, channels2 in concatenated]
    return found


def calls() -> list[NormCall]:
    """SD 1.5 at 512 and SDXL at 1024 (batch 2), their VAE's decoder at 1024; other operands and dtypes."""
    found = _unet(SD15) + _unet(SDXL)
    found += [NormCall(width, size, samples=1, nhwc=nhwc) for width, size in VAE_DECODER for nhwc in (True, False)]
    found += [NormCall(512, 128, samples=1, silu=False)]
    for size in (8, 64):  # guided-diffusion; a residual joined
        found += [NormCall(320, size, given=(*AFFINE, *more)) for more in (("scale", "shift"), ("add", "residual"))]
        found += [NormCall(320, size, dtype=dtype) for dtype in ("fp16", "fp32")]
    return found
