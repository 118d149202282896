"""The last 1x1 convolution of a mask head and its loss, for each RoI's own class alone."""

from .op import mask_predictor_loss

__all__ = ["mask_predictor_loss"]
