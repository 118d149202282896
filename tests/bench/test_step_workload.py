"""Every provider of `mrcnn-bench step` gets the same work: weights, proposals, counts, losses."""

import contextlib
import dataclasses

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.exc import BackendCompilerFailed
from torch.nn.functional import one_hot
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d, box_iou

from bench.step import ours
from bench.step.inference import OurInference
from bench.step.measure_provider import _judge
from bench.step.ours import Options, OurStep, build_ours
from bench.step.torchvision_baseline import TorchvisionInference, TorchvisionStep, build_torchvision
from bench.step.workload import FULL, SMALL, calibrate, given_proposals, keep_computed, make_workload
from bench.step_profile.run import synthetic_batch
from kernels import use_backend
from mrcnn.modeling.backbone import FrozenBatchNorm
from mrcnn.modeling.torchvision_model import from_torchvision

PLAIN = Options(ops="torch", layout="nchw", compiled=False, device_update=False, graph=False)


def no_phase(name):
    return contextlib.nullcontext()


@pytest.fixture(scope="module")
def workload():
    return make_workload(SMALL, torch.device("cpu"))


@pytest.fixture(scope="module")
def steps(workload):
    options = dataclasses.replace(PLAIN, ops="torchvision", joined=False)
    return TorchvisionStep(workload, no_phase, "nchw", "fp32", False), OurStep(workload, no_phase, options)


def test_every_image_draws_its_share_of_positives_from_both_models(workload, steps):
    # 128 of 512 an image: what the paper samples at most. With fewer, the mask head would have less to do.
    images, model = SMALL.batch, SMALL.config.model
    wanted = {"rois": images * model.roi_samples, "rois_positive": images * 128, "mask_rois": images * 128}
    theirs, mine = (step.counts() for step in steps)
    assert int(model.roi_samples * model.roi_positive_fraction) == 128
    assert theirs == mine
    assert {name: mine[name] for name in wanted} == wanted
    assert mine["anchors"] == images * model.rpn_samples and mine["anchors_positive"] > 0


def test_losses_of_both_models_agree(steps):
    # From the same weights, proposals and objects; which of them are drawn is random, a few per cent of a loss.
    theirs, mine = (step() for step in steps)
    assert theirs.keys() == mine.keys() and len(mine) == 5
    for name, loss in theirs.items():
        assert loss.isfinite() and float(mine[name]) == pytest.approx(float(loss), rel=0.1), name


def test_a_loss_that_is_not_finite_or_far_away_is_seen(workload):
    workload = dataclasses.replace(workload, described={"losses": {"loss_mask": 2.0, "loss_box": 1.0}})
    assert _judge({"losses": {"loss_mask": float("nan"), "loss_box": 1.0}}, workload)["status"] == "red"
    judged = _judge({"losses": {"loss_mask": 2.5, "loss_box": 1.05}}, workload)
    assert judged["status"] == "ok" and judged["far_losses"] == ["loss_mask"]


def test_the_weights_are_the_same_and_the_same_ones_are_trained(workload, steps):
    theirs, mine = (step.model for step in steps)
    fresh = build_ours(workload, "nchw").state_dict()
    for name, value in from_torchvision(workload.state).items():
        assert torch.equal(fresh[name], value), name
    trained = {name for name, p in mine.named_parameters() if p.requires_grad}
    of_theirs = {name: p for name, p in theirs.named_parameters() if p.requires_grad}
    assert trained == set(from_torchvision(of_theirs))
    assert not any(name.startswith(("backbone.stem", "backbone.stages.0")) for name in trained)


def test_the_full_size_model_is_torchvisions(workload):
    # As maskrcnn_resnet50_fpn builds it with weights: frozen batch norm, three trainable layers.
    backbone = resnet_fpn_backbone(
        backbone_name="resnet50", weights=None, norm_layer=FrozenBatchNorm2d, trainable_layers=3
    )
    wanted, found = MaskRCNN(backbone, 91), build_torchvision(FULL.config.model, FULL.size)
    shapes = [{name: value.shape for name, value in m.state_dict().items()} for m in (wanted, found)]
    assert shapes[0] == shapes[1]
    trained = [{name for name, p in m.named_parameters() if p.requires_grad} for m in (wanted, found)]
    assert trained[0] == trained[1]
    for name in ("_pre_nms_top_n", "_post_nms_top_n", "nms_thresh", "score_thresh", "min_size"):
        assert getattr(found.rpn, name) == getattr(wanted.rpn, name), name
    for name in ("score_thresh", "nms_thresh", "detections_per_img"):
        assert getattr(found.roi_heads, name) == getattr(wanted.roi_heads, name), name
    assert found.rpn.anchor_generator.sizes == wanted.rpn.anchor_generator.sizes
    assert found.rpn.fg_bg_sampler.batch_size_per_image == wanted.rpn.fg_bg_sampler.batch_size_per_image
    assert found.roi_heads.fg_bg_sampler.batch_size_per_image == 512


def test_full_size_images_hold_objects_and_proposals_fit():
    # 12 images of 800 x 1344, drawn as on a GPU; nothing of the network runs.
    batch = synthetic_batch(FULL.size, 2, FULL.config)
    assert int(batch.targets.count.min()) > 0 and tuple(batch.images.shape[-2:]) == FULL.size
    proposals = given_proposals(batch.targets, FULL.size, 2000)
    check_proposals(proposals, batch.targets, FULL.size)


def test_proposals_are_clearly_positive_or_negative(workload):
    check_proposals(workload.proposals, workload.batch.targets, SMALL.size)


def check_proposals(proposals, targets, size):
    for boxes, objects, count in zip(proposals, targets.boxes, targets.count.tolist(), strict=True):
        best = box_iou(boxes, objects[:count]).amax(1)
        assert int((best > 0.6).sum()) == len(boxes) // 4 > 128
        assert int((best < 0.4).sum()) == len(boxes) - len(boxes) // 4 > 384
        assert (boxes >= 0).all() and (boxes[:, 2:] <= torch.tensor([size[1], size[0]])).all()
        order = (best > 0.6).float()
        assert 0.1 < order[: len(boxes) // 2].mean() < 0.4, "positives are not mixed in"


def test_calibrated_norms_give_what_ordinary_ones_would(workload):
    model = build_torchvision(SMALL.config.model, SMALL.size)
    calibrate(model, workload.float_images())
    outputs = []
    for module in model.modules():
        if isinstance(module, FrozenBatchNorm2d):  # a copy: the ReLU behind it works in place
            module.register_forward_hook(lambda module, inputs, out: outputs.append(out.clone()))
    with torch.no_grad():
        model.backbone(model.transform(workload.float_images())[0].tensors)
    assert len(outputs) == 20
    for out in outputs:
        variance, mean = torch.var_mean(out, (0, 2, 3), correction=0)
        assert mean.abs().max() < 1e-3 and (variance - 1).abs().max() < 0.1
    deviations = workload.described["activations_std"]
    assert all(0.1 < value < 10 for value in deviations.values()), deviations


@pytest.mark.parametrize("bad", [1.0, float("inf"), float("nan")])
def test_given_proposals_stay_as_they_are(bad):
    given, computed = torch.rand(3, 4), torch.full((5, 4), bad)
    assert torch.equal(keep_computed(given, computed, torch.tensor(False)), given)
    if bad == 1.0:
        assert not torch.equal(keep_computed(given, computed, torch.tensor(True)), given)


class KeptGraphError(Exception):
    """The graph is all that is wanted: running it takes the interpreter a minute."""


def forward_nodes(workload):
    """Names of the operators in the forward graph, after what is dead in it was removed."""
    found = []

    def keep(graph, inputs):
        found.extend(str(node.target) for node in graph.graph.nodes)
        raise KeptGraphError

    step = OurStep(workload, no_phase, dataclasses.replace(PLAIN, ops="triton"))
    batch = workload.batch
    torch._dynamo.reset()
    compiled = torch.compile(step.model, fullgraph=True, backend=aot_autograd(fw_compiler=keep))
    with use_backend("triton"), pytest.raises(BackendCompilerFailed, match="KeptGraphError"):
        compiled(batch.images, batch.sizes, batch.targets)
    return " ".join(found)


def test_the_proposals_computation_is_in_the_compiled_graph(workload, monkeypatch):
    nodes = forward_nodes(workload)
    assert all(
        f"kernels.{name}" in nodes for name in ("nms_mask", "decode_proposals", "topk_keys", "roi_align_forward")
    )
    # Where nothing needs them they are removed: it is the choice on the device that keeps them.
    monkeypatch.setattr(ours, "keep_computed", lambda given, computed, use_computed: given)
    monkeypatch.setattr(ours.GivenProposals, "forward", without_computed)
    nodes = forward_nodes(workload)
    assert "kernels.nms_mask" not in nodes and "kernels.roi_align_forward" in nodes


def without_computed(self, *arguments, training, **named):
    self.computed(*arguments, training=training, **named)
    return self.boxes, self.valid


def test_taking_layers_apart_changes_no_loss(workload):
    losses = []
    for joined in (True, False):
        torch.manual_seed(3)
        losses.append(OurStep(workload, no_phase, dataclasses.replace(PLAIN, joined=joined))())
    joined, apart = losses
    for name, loss in joined.items():
        torch.testing.assert_close(apart[name], loss, rtol=1e-4, atol=1e-5, msg=name)
    model = build_ours(workload, "nchw", joined=False)
    assert sum(isinstance(m, ours.Apart) for m in model.modules()) == 2
    assert not any(m.folded for m in model.modules() if isinstance(m, FrozenBatchNorm))


def test_both_detect_alike(workload):
    # Class logits are spread, or nothing would reach the score threshold.
    theirs = TorchvisionInference(workload, 2, "nchw", "fp32")()
    mine = OurInference(workload, 2, "eager", print)()
    for one, other in zip(theirs, mine, strict=True):
        assert one["masks"].dtype == other["masks"].dtype == torch.bool
        assert one["masks"].shape == other["masks"].shape == (SMALL.config.model.max_detections, *SMALL.size)
        torch.testing.assert_close(one["scores"], other["scores"], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(one["boxes"], other["boxes"], rtol=1e-3, atol=0.05)
        assert torch.equal(one_hot(one["labels"], 8).sum(0), one_hot(other["labels"], 8).sum(0))
        assert (one["masks"] == other["masks"]).float().mean() > 0.99
