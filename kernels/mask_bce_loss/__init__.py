"""Mask loss: binary cross-entropy on each RoI's ground-truth channel alone."""

from .op import mask_bce_loss

__all__ = ["mask_bce_loss"]
