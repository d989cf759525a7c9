"""The small U-Net the package ships, and reading and writing its weights."""

from pydiff.models.loader import load_model, save_model
from pydiff.models.unet import UNet

__all__ = ["UNet", "load_model", "save_model"]
