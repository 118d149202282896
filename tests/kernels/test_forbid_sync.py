"""The context that forbids waiting for the device, which other tests rely on: it sees each thing that waits."""

import pytest
import torch
from forbid_sync import WaitsForDevice, forbid_sync

from kernels import box_iou, use_backend
from kernels.nms import reference


def numbers() -> torch.Tensor:
    return torch.tensor([3, 1, 2])


WAITS = {
    "item": lambda x: x[0].item(),
    "if": lambda x: 1 if x[0] > 0 else 0,
    "int": lambda x: int(x[0]),
    "any": lambda x: bool((x > 1).any()),
    "range": lambda x: list(range(x[0])),
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 1),
    "argwhere": lambda x: torch.argwhere(x > 1),
    "masked_select": lambda x: x.masked_select(x > 1),
    "equal": lambda x: torch.equal(x, x),
    "allclose": lambda x: torch.allclose(x * 1.0, x * 1.0),
    "unique": lambda x: x.unique(),
    "unique_dim": lambda x: torch.unique(x, dim=0),
    "unique_consecutive": lambda x: x.unique_consecutive(),
    "index by a mask": lambda x: x[x > 1],
    "index by a byte mask": lambda x: torch.ops.aten.index(x, [(x > 1).byte()]),
    "index by a mask and a number": lambda x: torch.stack([x, x])[torch.tensor([True, False]), x - 1],
    "index_put by a mask": lambda x: x.index_put((x > 1,), torch.tensor([7, 8])),
    "repeat_interleave": lambda x: x.repeat_interleave(x),
    "bincount": lambda x: x.bincount(),
    "to_sparse": lambda x: x.to_sparse(),
    "tolist": lambda x: x.tolist(),
    "numpy": lambda x: x.numpy(),
    "cpu": lambda x: x.cpu(),
    "the reference of NMS": lambda x: reference.nms_mask(torch.ones(1, 2, 4), torch.ones(1, 2).bool(), 0.5),
}

WAITS_NOT = {
    "index by numbers": lambda x: x[x - 1],
    "index_put by numbers": lambda x: x.__setitem__(x - 1, 0),
    "where of three": lambda x: torch.where(x > 1, x, 0),
    "masked_fill": lambda x: x.masked_fill(x > 1, 0),
    "sort": lambda x: (x.sort(), x.topk(2), x.cumsum(0), x.max()),
    "repeat_interleave of a known size": lambda x: x.repeat_interleave(x, output_size=6),
    "iteration": lambda x: sum(x),
    "shapes": lambda x: x[: len(x) - 1].reshape(-1, 2),
    "box_iou": lambda x: box_iou(torch.ones(2, 4), torch.ones(3, 4)),
}


class WaitsInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * grad[0].item()


WAITS["in a backward"] = lambda x: WaitsInBackward.apply(torch.ones(2, requires_grad=True)).sum().backward()


@pytest.mark.filterwarnings("ignore:indexing with dtype torch.uint8")
@pytest.mark.parametrize("does", WAITS.values(), ids=WAITS)
def test_sees(does):
    # Allowed outside, so that it is the context that raises.
    does(numbers())
    with pytest.raises(WaitsForDevice), forbid_sync():
        does(numbers())


@pytest.mark.parametrize("does", WAITS_NOT.values(), ids=WAITS_NOT)
def test_lets_pass(does):
    # What has a fixed shape and stays on the device: a context that forbade it would push code the wrong way.
    with forbid_sync(), use_backend("torch"):
        does(numbers())
