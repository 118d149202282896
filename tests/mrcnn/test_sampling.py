"""The draw of positives and negatives: torchvision's numbers, hard negatives, fixed shapes, one seed one draw."""

import pytest
import torch
import torch.nn.functional as F

from mrcnn.modeling.sampling import sample


def test_sampling_draws_what_torchvision_draws():
    # The balanced sampler's numbers: at most half positive, negatives fill up, never one index twice.
    labels = torch.full((3, 1000), -1)
    labels[0, :400] = 1  # many of both
    labels[0, 400:900] = 0
    labels[1, 5:8] = 1  # few positives
    labels[1, 100:] = 0
    labels[2, :2], labels[2, 2:12] = 1, 0  # too few of both
    index, drawn, positive = sample(labels, 64, 0.5)
    assert index.shape == drawn.shape == positive.shape == (3, 64)
    assert positive.sum(1).tolist() == [32, 3, 2]
    assert drawn.sum(1).tolist() == [64, 64, 12]
    for i in range(3):
        chosen = index[i, drawn[i]]
        assert len(chosen.unique()) == len(chosen)
        assert torch.equal(labels[i, chosen] == 1, positive[i, drawn[i]])
        assert (labels[i, chosen] >= 0).all()
        assert positive[i].sum() == positive[i, : positive[i].sum()].sum()  # positives first


def test_sampling_with_fewer_candidates_than_slots():
    # The limit is a fraction of the slots, not of the candidates: torchvision draws all 40 positives here.
    labels = torch.cat([torch.ones(1, 40), torch.zeros(1, 20)], dim=1)
    index, drawn, positive = sample(labels, 512, 0.25)
    assert index.shape == (1, 60) and drawn.sum() == 60 and positive.sum() == 40


def test_sampling_is_uniform_and_seeded():
    # Every positive must have the same chance; the same seed gives the same draw.
    labels = torch.ones(2000, 10)
    index, _, positive = sample(labels, 4, 0.5)
    counts = torch.bincount(index[positive], minlength=10)
    assert counts.sum() == 4000 and (counts - 400).abs().max() < 100
    torch.manual_seed(1)
    first = sample(labels, 4, 0.5)
    torch.manual_seed(1)
    assert all(torch.equal(a, b) for a, b in zip(first, sample(labels, 4, 0.5), strict=True))


def test_hard_negatives_are_those_of_the_highest_loss():
    # Each image has its own number of positives: three negatives for each, the ones with the highest loss, in order.
    torch.manual_seed(0)
    labels = torch.randint(-1, 1, (3, 500))
    labels[0, :7], labels[1, 100:140], labels[2] = 1, 1, labels[2].clamp(max=0)
    logits = torch.randn(3, 500) * 3
    index, drawn, positive = sample(labels, 64, 0.25, F.softplus(logits), negative_ratio=3.0)
    assert index.shape == (3, 64)
    assert positive.sum(1).tolist() == [7, 16, 0]
    assert drawn.sum(1).tolist() == [28, 64, 3]  # 1:3, up to the slots; an image without objects counts as having one
    for i in range(3):
        negatives = index[i, drawn[i] & ~positive[i]]
        expected = logits[i].masked_fill(labels[i] != 0, -torch.inf).topk(len(negatives)).indices
        assert torch.equal(negatives, expected)


def test_hard_negatives_are_reproducible_from_a_seed():
    # The negatives depend on the losses alone, the positives on the seed.
    labels, hardness = torch.randint(-1, 2, (2, 300)), torch.rand(2, 300)
    torch.manual_seed(1)
    first = sample(labels, 40, 0.25, hardness, 3.0)
    torch.manual_seed(1)
    assert all(torch.equal(a, b) for a, b in zip(first, sample(labels, 40, 0.25, hardness, 3.0), strict=True))
    again = sample(labels, 40, 0.25, hardness, 3.0)
    negatives = [index[drawn & ~positive] for index, drawn, positive in (first, again)]
    assert torch.equal(*negatives) and not torch.equal(first[0], again[0])


@pytest.mark.parametrize("ratio", [0.5, 1.0, 10.0])
def test_the_ratio_limits_random_negatives_too(ratio):
    labels = torch.zeros(1, 400)
    labels[0, :20] = 1
    _, drawn, positive = sample(labels, 100, 0.5, negative_ratio=ratio)
    assert positive.sum() == 20 and drawn.sum() == min(100, 20 + int(20 * ratio))
