"""ResNet (arXiv:1512.03385) giving C2..C5."""

from __future__ import annotations

import functools
from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models import get_model_weights
from torchvision.ops import FrozenBatchNorm2d

from ..errors import ConfigError


class FrozenBatchNorm(FrozenBatchNorm2d):
    """torchvision's, but in the dtype of its input: theirs promotes the activations of bf16 autocast to fp32.

    Where the convolution before it has taken its work over (`fold_norms`), it returns its input.
    """

    folded = False

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> the same, scaled and shifted by constants."""
        if self.folded:
            return x
        constants = (self.running_mean, self.running_var, self.weight, self.bias)
        if x.dtype == torch.float64:  # a model made so for exactness; half types take fp32 constants
            constants = [c.double() for c in constants]
        return F.batch_norm(x, *constants, training=False, eps=self.eps)

    def affine(self) -> tuple[Tensor, Tensor]:
        """Scale and shift of each channel, [C]: the normalisation is x * scale + shift."""
        scale = self.weight * torch.rsqrt(self.running_var + self.eps)
        return scale, self.bias - self.running_mean * scale


class FoldedConv2d(nn.Conv2d):
    """A convolution that also does the work of the frozen batch norm behind it.

    The product of its weights and the norm's scale is made anew in each step, in the weights' own precision, so that
    what is trained and saved are the weights without it; the shift is the bias. Of the activations, a pass that scales
    them is spared in forward and in backward, and the scale is not rounded to a half type.
    """

    def __init__(self, conv: nn.Conv2d, norm: FrozenBatchNorm) -> None:
        shape = (conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding)
        super().__init__(*shape, conv.dilation, conv.groups, bias=False, device="meta")
        self.weight = conv.weight
        self._norm = (norm,)  # in a tuple: it is another module's child

    @property
    def norm(self) -> FrozenBatchNorm:
        """The norm behind this convolution."""
        return self._norm[0]

    def folded(self) -> tuple[Tensor, Tensor]:
        """Weights [C', C, k, k] and bias [C'] that do both."""
        scale, shift = self.norm.affine()
        return self.weight * scale[:, None, None, None], shift

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C', H', W'], normalised."""
        return self._conv_forward(x, *self.folded()) if self.norm.folded else super().forward(x)


def fold_norms(module: nn.Module) -> None:
    """Replace each convolution inside `module` that a FrozenBatchNorm follows; names and weights stay as they are."""
    for parent in list(module.modules()):
        for (name, conv), (_, norm) in pairwise(list(parent.named_children())):
            plain = isinstance(conv, nn.Conv2d) and conv.bias is None and conv.padding_mode == "zeros"
            if plain and isinstance(norm, FrozenBatchNorm):
                setattr(parent, name, FoldedConv2d(conv, norm))
                norm.folded = True


NORMS: dict[str, Callable[[int], nn.Module] | None] = {
    "none": None,
    "bn": nn.BatchNorm2d,
    "frozen_bn": FrozenBatchNorm,
    "sync_bn": nn.SyncBatchNorm,
    "gn": functools.partial(nn.GroupNorm, 32),
}


class ResNet(nn.Module):
    """torchvision's ResNet without its classifier.

    Args:
        name: resnet18, resnet34, resnet50 or resnet101.
        norm: bn, frozen_bn (constant statistics and scale), sync_bn (statistics over all processes) or gn (32 groups).
        frozen_stages: how many of the stem, C2, C3, C4 and C5 are not trained. Their batch norm keeps its running
            statistics, too.
    """

    def __init__(self, name: str, norm: str, frozen_stages: int = 0) -> None:
        super().__init__()
        self.name = name
        net = getattr(torchvision.models, name)(weights=None, norm_layer=NORMS[norm])
        fold_norms(net)
        self.stem = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool)
        self.stages = nn.ModuleList([net.layer1, net.layer2, net.layer3, net.layer4])
        self.out_channels = [net.fc.in_features // 2**i for i in (3, 2, 1, 0)]
        self.frozen = [self.stem, *self.stages][:frozen_stages]
        for stage in self.frozen:
            stage.requires_grad_(False)

    def train(self, mode: bool = True) -> ResNet:
        """Like any module's, but the frozen stages stay in evaluation mode."""
        super().train(mode)
        for stage in self.frozen:
            stage.eval()
        return self

    def forward(self, images: Tensor) -> list[Tensor]:
        """[B, 3, H, W] -> C2..C5, [B, c_l, H / 2**l, W / 2**l] for l = 2..5 (rounded up)."""
        x = self.stem(images)
        features = []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        return features


# torchvision's names of a ResNet's parts and ours.
STAGES = {"conv1": "stem.0", "bn1": "stem.1", **{f"layer{i + 1}": f"stages.{i}" for i in range(4)}}


def load_pretrained(backbone: ResNet, weights: str) -> None:
    """Fill `backbone` with torchvision's classification weights of that name, e.g. "DEFAULT" or "IMAGENET1K_V1".

    Files come from torch.hub's cache, else from the network.

    Raises:
        ConfigError: torchvision has no such weights, they cannot be downloaded, or the backbone's norm has no place
            for them.
    """
    known = get_model_weights(backbone.name)
    if weights not in known.__members__:
        names = ", ".join(known.__members__)
        raise ConfigError(f"torchvision has no weights {weights!r} for {backbone.name}; choose one of {names}")
    entry = known[weights]
    try:
        state = entry.get_state_dict(progress=False, check_hash=True)
    except OSError as error:  # URLError is one
        raise ConfigError(
            f"cannot download {entry.url} ({getattr(error, 'reason', error)}): put the file into "
            f"{torch.hub.get_dir()}/checkpoints, or train from scratch with model.weights='', model.frozen_stages=0 "
            "and a norm that learns (bn, gn)"
        ) from None
    except Exception as error:  # whatever the unpickler stumbles over in a file of another kind
        raise ConfigError(
            f"the file of {entry.url} in {torch.hub.get_dir()}/checkpoints is damaged ({type(error).__name__}): "
            "delete it, and it is downloaded again"
        ) from None
    parts = ((*key.partition("."), value) for key, value in state.items())
    renamed = {f"{STAGES[part]}.{rest}": value for part, _, rest, value in parts if part in STAGES}
    missing, unexpected = backbone.load_state_dict(renamed, strict=False)
    # FrozenBatchNorm2d does not count batches.
    lost = [key for key in [*missing, *unexpected] if not key.endswith("num_batches_tracked")]
    if lost:
        raise ConfigError(f"the weights {weights} do not fit this backbone (its norm?): {', '.join(lost[:3])}, ...")
