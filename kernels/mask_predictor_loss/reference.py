"""A mask head's last convolution and its loss in plain PyTorch, differentiable by autograd."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..mask_bce_loss import mask_bce_loss
from ..mask_bce_loss.reference import weighted_mean


def mask_predictor_loss(
    features: Tensor,
    weight: Tensor,
    bias: Tensor,
    labels: Tensor,
    targets: Tensor,
    weights: Tensor | None,
    relu: bool,
) -> Tensor:
    """Features [N, C, M, M], weight [K, C], bias [K] -> scalar; each RoI's features meet one row of the weight."""
    dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
    empty = (labels < 0)[:, None, None]
    # Replaced before the product, and before the loss, not after it: NaN times a zero gradient is still NaN.
    features = torch.where(empty[..., None], 0, features)
    features = (F.relu(features) if relu else features).to(dtype)
    label = labels.clamp(min=0)
    with torch.autocast(features.device.type, enabled=False):
        logits = torch.bmm(weight[label].to(dtype)[:, None], features.flatten(2)).view(targets.shape)
    logits = torch.where(empty, 0, logits + bias[label].to(dtype)[:, None, None])
    loss = F.binary_cross_entropy_with_logits(logits, targets.to(dtype), reduction="none")
    return weighted_mean(torch.where(empty, 0, loss).mean(dim=(1, 2)), labels, weights)


def ordinary_way(
    features: Tensor,
    weight: Tensor,
    bias: Tensor,
    labels: Tensor,
    targets: Tensor,
    weights: Tensor | None,
    relu: bool,
) -> Tensor:
    """torchvision's: a convolution to all K channels in the features' dtype, then the loss of those that count."""
    features = F.relu(features) if relu else features
    with torch.autocast(features.device.type, enabled=False):
        logits = F.conv2d(features, weight.to(features.dtype)[:, :, None, None], bias.to(features.dtype))
    return mask_bce_loss(logits, labels, targets, weights, backend="torchvision")
