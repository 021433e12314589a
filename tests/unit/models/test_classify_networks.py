"""Classifiers as networks: heads, configs, weights of other programs and of published backbones, and what becomes of them in detectors."""

from __future__ import annotations

import pytest
import torch
from torchvision.transforms import CenterCrop, Compose, Normalize, Resize, ToTensor

from models import build_model
from models.backbones.biformer import BiFormerBackbone
from models.backbones.cloformer import CloFormerBackbone
from models.backbones.focalnet import FocalNetBackbone
from models.checkpoints.checkpoint import Checkpoint, load_checkpoint, load_model, save_checkpoint
from models.heads.base import HeadOutput
from models.heads.classify import Classify, PooledClassify
from models.spec.config_files import CONFIGS
from models.spec.parser import load_spec
from models.spec.planning import plan_layers
from models.transfer.backbone_weights import fill_backbone, load_backbone
from models.transfer.transfer import Source, transfer
from tests.foreign_models import LAYOUTS, convert_model, layout
from utils.config import Hyperparameters
from utils.errors import UserError
from utils.types import Batch, Letterbox, Targets

NAMES = ("ant", "bee", "cow")
TINY = {
    "nc": 3, "scales": {"n": [1.0, 1.0, 1024]}, "scale": "n",
    "backbone": [[-1, 1, "Conv", [8, 3, 2]], [-1, 1, "C2f", [8, True]], [-1, 1, "Conv", [16, 3, 2]]], "head": [[-1, 1, "Classify", ["nc"]]],
}  # fmt: skip
FAMILIES = [*(f"yolov5{s}-cls" for s in "nsmlx"), *(f"yolo{v}{s}-cls" for v in ("v8", "11", "26") for s in "nsmlx")]
PUBLISHED_MILLIONS = {  # with 1000 classes
    "yolov8n-cls": 2.719288, "yolov8l-cls": 37.480744, "yolov8x-cls": 57.422840, "yolo11s-cls": 6.724008, "yolo11m-cls": 11.634216,
    "yolo11x-cls": 29.637064, "yolo26m-cls": 11.634216, "yolov5n-cls": 2.493000,
}  # fmt: skip
WHOLE = {
    "FocalNet-T-srf-cls": lambda: FocalNetBackbone(num_classes=10),
    "BiFormer-T-cls": lambda: BiFormerBackbone(num_classes=10),
    "CloFormer-XXS-cls": lambda: CloFormerBackbone(num_classes=10),
}


def batch(classes: list[int], images: list[int] | None = None, *, count: int = 0) -> Batch:
    count = count or len(classes)
    letterbox = Letterbox(torch.full((count, 2), 8), torch.ones(count, 2), torch.zeros(count, 2))
    image = torch.tensor(images if images is not None else list(range(len(classes))), dtype=torch.long)
    targets = Targets(image, torch.tensor(classes, dtype=torch.long), torch.full((len(classes), 4), 0.5))
    return Batch(torch.zeros(count, 3, 8, 8), targets, ("",) * count, letterbox, 1)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_published_classifier_is_built_by_its_bare_name(name):
    spec = load_spec(f"{name}.yaml")
    assert plan_layers(spec)[-1].name == "Classify"
    if name in PUBLISHED_MILLIONS:
        with torch.device("meta"):
            model = build_model(f"{name}.yaml")
        assert sum(p.numel() for p in model.parameters()) == round(1e6 * PUBLISHED_MILLIONS[name])


@pytest.mark.parametrize("path", sorted((CONFIGS / "cls").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_whole_backbone_is_planned_as_a_classifier(path):
    assert plan_layers(load_spec(path))[-1].name == "PooledClassify"


@pytest.mark.parametrize("name", WHOLE)
@torch.no_grad()
def test_a_published_classifier_is_loaded_whole(name):
    published = WHOLE[name]().eval()
    model = build_model(f"{name}.yaml", nc=10).eval()
    report = fill_backbone(model, published.state_dict())
    assert report.of_target == report.of_source == 1.0
    images = torch.rand(1, 3, 64, 64)
    (last,) = published(images)[-1:]
    normed = published.norm(last.movedim(1, -1)).movedim(-1, 1) if name.startswith("Focal") else published.norm(last)
    expected = published.head(normed.mean((2, 3)))
    torch.testing.assert_close(model(images).main[0].flatten(1), expected, atol=1e-4, rtol=1e-3)


def test_of_a_published_classifier_with_other_classes_the_norm_is_kept():
    model = build_model("CloFormer-XXS-cls.yaml", nc=4)
    before = model.head.head.weight.clone()
    published = WHOLE["CloFormer-XXS-cls"]()
    published.norm.weight.data.fill_(2)
    fill_backbone(model, published.state_dict())
    assert torch.equal(model.head.head.weight, before)
    assert (model.head.norm.weight == 2).all()


@pytest.mark.parametrize("norm", ["batch", "layer", "group", "none"])
def test_pooled_heads_take_any_size_and_train_every_parameter(norm):
    head = PooledClassify(3, [8], norm=norm).train()
    for hw in ((7, 5), (1, 1), (3, 8)):
        assert head([torch.rand(2, 8, *hw)]).main[0].shape == (2, 3, 1, 1)
    (part,) = head.build_loss(Hyperparameters())(head([torch.rand(2, 8, 4, 4)]), batch([0, 2])).values()
    part.backward()
    assert all(p.grad is not None for p in head.parameters())


def test_a_wrong_norm_or_no_class_is_one_line():
    with pytest.raises(UserError, match="norm 'lyer': unknown, did you mean 'layer'"):
        PooledClassify(3, [8], norm="lyer")
    with pytest.raises(UserError, match="nc 0 with 1 inputs"):
        Classify(0, [8])


def test_label_smoothing_and_class_weights_follow_their_formulas():
    logits = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    raw = HeadOutput(((logits[..., None, None],),))
    log_p = logits.log_softmax(1)
    target = torch.nn.functional.one_hot(torch.tensor([1, 0, 3]), 4) * 0.9 + 0.1 / 4
    loss = Classify(4, [8]).build_loss(Hyperparameters(label_smoothing=0.1))
    assert float(loss(raw, batch([1, 0, 3]))["cls"]) == pytest.approx(float(-(target * log_p).sum(1).mean()), rel=1e-5)
    weighted = Classify(4, [8]).build_loss(Hyperparameters(cls_weights=(1, 2, 1, 0.5)))
    expected = -(log_p[0, 1] * 2 + log_p[1, 0] + log_p[2, 3] * 0.5) / 3
    assert float(weighted(raw, batch([1, 0, 3]))["cls"]) == pytest.approx(float(expected), rel=1e-5)
    with pytest.raises(UserError, match="one number for each of the 4 classes, got 2"):
        Classify(4, [8]).build_loss(Hyperparameters(cls_weights=(1, 2)))


def test_images_without_a_class_count_nowhere_and_no_class_at_all_has_a_gradient():
    logits = torch.randn(2, 3, requires_grad=True)
    loss = Classify(3, [8]).build_loss(Hyperparameters())
    one = loss(HeadOutput(((logits[..., None, None],),)), batch([2], [1], count=2))["cls"]
    assert one.item() == pytest.approx(float(-logits.detach().log_softmax(1)[1, 2]) / 2, rel=1e-5)
    none = loss(HeadOutput(((logits[..., None, None],),)), batch([], [], count=2))["cls"]
    none.backward()
    assert none.item() == 0
    assert (logits.grad == 0).all()


def test_a_classifier_gives_its_backbone_to_a_detector(tmp_path):
    classifier = build_model("yolov8n-cls.yaml", nc=3, names=NAMES)
    weights = {k: v.clone() for k, v in classifier.state_dict().items()}
    save_checkpoint(tmp_path / "cls.pt", Checkpoint(classifier.spec.to_dict(), "yolov8n-cls.yaml", NAMES, weights))
    detector = build_model("yolov8n.yaml", nc=2)
    load_backbone(detector, tmp_path / "cls.pt")
    own = detector.state_dict()
    backbone = [k for k in weights if int(k.split(".")[1]) < 9]
    assert len(backbone) > 100
    assert all(torch.equal(own[k], weights[k]) for k in backbone)
    detector_file = tmp_path / "det.pt"
    save_checkpoint(detector_file, Checkpoint(detector.spec.to_dict(), "yolov8n.yaml", ("a", "b"), own))
    with pytest.raises(UserError, match="a network for the task 'detect'; give it with --weights"):
        load_backbone(detector, detector_file)


def test_weights_go_between_classifiers_by_class_name():
    source, target = (build_model(TINY, nc=len(names), names=names) for names in (NAMES, ("cow", "ant")))
    transfer(target, Source(source.state_dict(), source.spec.to_dict(), NAMES))
    ours, theirs = target.head.linear.weight, source.head.linear.weight
    assert torch.equal(ours, theirs[[2, 0]])
    assert torch.equal(target.head.conv.conv.weight, source.head.conv.conv.weight)


@pytest.fixture
def with_classify(monkeypatch):
    for program, module in (("ultralytics", "ultralytics.nn.modules.head"), ("yolov5", "models.common")):
        monkeypatch.setitem(LAYOUTS, program, LAYOUTS[program] | {"Classify": module})
    monkeypatch.setitem(LAYOUTS["yolov5"], "Model", "models.yolo.ClassificationModel")
    monkeypatch.setitem(LAYOUTS["ultralytics"], "Model", "ultralytics.nn.tasks.ClassificationModel")


@torch.no_grad()
@pytest.mark.parametrize("transforms", [False, True])
def test_a_classifier_of_ultralytics_is_read_whole(tmp_path, with_classify, transforms):
    own = build_model(TINY, names=NAMES).eval()
    with layout("ultralytics") as classes:
        model = convert_model(own, classes, names=list(NAMES), raw=dict(TINY))
        if transforms:  # of its validation, which a training stores
            model.transforms = Compose([Resize(64), CenterCrop(64), ToTensor(), Normalize(mean=torch.zeros(3), std=torch.ones(3))])
        torch.save({"model": model}, tmp_path / "best.pt")
    read = load_model(tmp_path / "best.pt").eval()
    images = torch.rand(1, 3, 32, 32)
    assert torch.equal(read(images).main[0], own(images).main[0])
    assert (read.names, read.task.name) == (NAMES, "classify")


@torch.no_grad()
def test_a_classifier_of_yolov5_keeps_no_yaml_and_is_recognised(tmp_path, with_classify):
    own = build_model("yolov5n-cls.yaml", nc=3, names=NAMES).eval()
    with layout("yolov5") as classes:
        model = convert_model(own, classes, names=list(NAMES), raw={})
        del model.yaml
        torch.save({"model": model}, tmp_path / "mine.pt")
    checkpoint = load_checkpoint(tmp_path / "mine.pt")
    assert (checkpoint.cfg_name, checkpoint.names) == ("yolov5n-cls.yaml", NAMES)
    read = load_model(tmp_path / "mine.pt").eval()
    images = torch.rand(1, 3, 64, 64)
    assert torch.equal(read(images).main[0], own(images).main[0])
    assert {m.eps for m in read.model[:-1].modules() if isinstance(m, torch.nn.BatchNorm2d)} == {1e-3}


def test_the_loss_of_several_ranks_is_that_of_the_whole_batch(monkeypatch):
    """Ranks average their gradients, also where their parts of a batch differ in size."""
    logits = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    loss = Classify(4, [8]).build_loss(Hyperparameters())
    whole = loss(HeadOutput(((logits[..., None, None],),)), batch([0, 1, 2]))["cls"]
    monkeypatch.setattr("models.losses.cross_entropy.world_size", lambda: 2)
    parts = [
        loss(HeadOutput(((logits[part][..., None, None],),)), batch(list(range(3))[part])._replace(step_images=3))["cls"]
        for part in (slice(0, 2), slice(2, 3))
    ]
    assert torch.stack(parts).mean().item() == pytest.approx(whole.item(), rel=1e-6)


@pytest.mark.parametrize("spec", ["SE@8", "EMA@6", "FocalModulation@backbone.last", "EMA@detect"])
def test_attention_can_be_inserted_into_a_classifier(spec):
    from models.edit.rows import edit

    change = edit(load_spec("yolov8n-cls.yaml", nc=3), insert=[spec])
    assert len(plan_layers(change.spec)) == 11
