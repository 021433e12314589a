"""Losses worked out match by match and cell by cell from their formulas: gains, balance, smoothing, positive weights, focal loss."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from models.assigners.anchor_ratio import Scene, anchor_grid
from models.assigners.grid import anchor_points, expected_distances
from models.assigners.targets import pad_targets
from models.heads.anchor_based import AnchorDetect, IDetect
from models.heads.anchor_free import DDetect, Detect
from models.heads.base import HeadOutput
from utils.config import Hyperparameters
from utils.iou import ciou
from utils.types import Batch, Letterbox, Targets

NC, SIZE = 4, 128
BALANCE = {3: (4.0, 1.0, 0.4), 4: (4.0, 1.0, 0.25, 0.06)}  # objectness by level, YOLOv5
VARIANTS = (
    {},
    {"label_smoothing": 0.2},
    {"fl_gamma": 1.5},
    {"fl_gamma": 2.0, "label_smoothing": 0.1, "cls_pw": 2.0, "obj_pw": 0.5},
    {"cls_pw": 3.0},
)


def batch_of(n: int = 6) -> Batch:
    g = torch.Generator().manual_seed(3)
    image = torch.arange(2).repeat_interleave(n)[:, None].float()
    rows = torch.cat((image, torch.randint(NC, (2 * n, 1), generator=g), 0.1 + 0.8 * torch.rand(2 * n, 4, generator=g)), dim=1)
    letterbox = Letterbox(torch.zeros(2, 2), torch.ones(2, 2), torch.zeros(2, 2))
    return Batch(torch.zeros(2, 3, SIZE, SIZE), Targets.of_rows(rows), ("",) * 2, letterbox, n)


def maps_of(width: int, strides) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, width, SIZE // s, SIZE // s, generator=g) for s in strides)


def entropy(x, t, *, weight: float, gamma: float):
    """−w t log p − (1 − t) log(1 − p), with γ times 0.25 or 0.75 and (1 − p_t)^γ (arXiv 1708.02002, eq. 5)."""
    p = x.sigmoid()
    loss = -weight * t * p.log() - (1 - t) * (1 - p).log()
    if not gamma:
        return loss
    p_t = t * p + (1 - t) * (1 - p)
    return (0.25 * t + 0.75 * (1 - t)) * (1 - p_t) ** gamma * loss


@pytest.mark.parametrize("strides", [(8, 16, 32), (8, 16, 32, 64)])
@pytest.mark.parametrize("cls", [AnchorDetect, IDetect])
@pytest.mark.parametrize("changes", VARIANTS)
def test_anchor_based_loss_equals_its_formula(strides, cls, changes):
    hyp = Hyperparameters(box=0.05, cls=0.5, obj=1.0, anchor_t=4.0, **changes)
    anchors = [[s, s, 2 * s, 3 * s, 4 * s, 3 * s] for s in strides]
    head = cls(NC, anchors, [8] * len(strides))
    head.set_strides(strides)
    loss, output, batch = head.build_loss(hyp), HeadOutput((maps_of(3 * (5 + NC), strides),)), batch_of()
    targets = pad_targets(batch.targets, batch.max_boxes, batch_size=2, hw_px=(SIZE, SIZE))
    scene = Scene(output.main, anchor_grid(output.main, head.anchors, strides), head.anchors, strides, targets, False)
    matches = loss.assign(scene)
    fl, smoothing = hyp.fl_gamma, hyp.label_smoothing
    wanted, begin = torch.zeros(3), 0
    for level, (stride, raw) in enumerate(zip(strides, output.main)):
        raw = raw.unflatten(1, (3, 5 + NC))  # (B, anchors, outputs, H, W)
        h, w = raw.shape[-2:]
        boxes, classes, objectness = [], [], torch.zeros(2, 3, h, w)
        for image, row in matches.mask.nonzero().tolist():
            place = int(matches.place[image, row]) - begin
            if not 0 <= place < 3 * h * w:
                continue
            anchor, y, x = place // (h * w), place % (h * w) // w, place % w
            out = raw[image, anchor, :, y, x]
            box = int(matches.box[image, row])
            s = out[:4].sigmoid()
            centre = torch.stack((x + 2 * s[0] - 0.5, y + 2 * s[1] - 0.5)) * stride
            half = (2 * s[2:]) ** 2 * torch.tensor(anchors[level]).view(3, 2)[anchor] / 2
            fit = ciou(torch.cat((centre - half, centre + half)), targets.boxes_xyxy[image, box])
            boxes.append(1 - fit)
            t = torch.full((NC,), smoothing / 2)
            t[targets.labels[image, box]] = 1 - smoothing / 2
            classes.append(entropy(out[5:], t, weight=hyp.cls_pw, gamma=fl).mean())
            objectness[image, anchor, y, x] = fit.clamp(min=0)  # of several the last one counts
        if boxes:
            wanted += torch.stack((torch.stack(boxes).mean(), torch.zeros(()), torch.stack(classes).mean()))
        wanted[1] += BALANCE[len(strides)][level] * entropy(raw[:, :, 4], objectness, weight=hyp.obj_pw, gamma=fl).mean()
        begin += 3 * h * w
    assert len(matches.mask.nonzero()) > 10
    levels = 3 / len(strides)
    wanted *= torch.tensor([0.05 * levels, 1.0 * levels * (SIZE / 640) ** 2, 0.5 * levels * NC / 80])
    torch.testing.assert_close(torch.stack(list(loss(output, batch).values())), wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("cls", [Detect, DDetect])
@pytest.mark.parametrize("changes", VARIANTS)
def test_task_aligned_loss_equals_its_formula(cls, changes):
    strides = (8, 16, 32)
    hyp = Hyperparameters(**changes)
    head = cls(NC, [8] * 3)
    head.set_strides(strides)
    loss, output, batch = head.build_loss(hyp), HeadOutput((maps_of(64 + NC, strides),)), batch_of()
    targets = pad_targets(batch.targets, batch.max_boxes, batch_size=2, hw_px=(SIZE, SIZE))
    points, step = anchor_points(output.main, strides)
    flat = torch.cat([m.flatten(2) for m in output.main], dim=2)  # (B, 64 + nc, N)
    reach = expected_distances(flat[:, :64], torch.arange(16)) * step
    predicted = torch.cat((points - reach[:, :2], points + reach[:, 2:]), dim=1).transpose(1, 2)  # (B, N, 4)
    assigned = loss.assigner(predicted, [m[:, 64:] for m in output.main], strides, targets)
    scores = torch.zeros(2, NC, flat.shape[2])
    box = dfl = torch.zeros(())
    for image, row in assigned.mask.nonzero().tolist():
        cell, score = int(assigned.cell[image, row]), assigned.score[image, row]
        truth, label = targets.boxes_xyxy[image, assigned.box[image, row]], targets.labels[image, assigned.box[image, row]]
        scores[image, :, cell] = score * hyp.label_smoothing / NC
        scores[image, label, cell] += score * (1 - hyp.label_smoothing)
        box = box + score * (1 - ciou(predicted[image, cell], truth))
        sides = torch.cat((points[:, cell] - truth[:2], truth[2:] - points[:, cell])) / step[0, cell]
        for side, logits in zip(sides.clamp(0, 14.99), flat[image, :64, cell].view(4, 16)):
            low, log_s = int(side), logits.log_softmax(0)
            dfl = dfl - score / 4 * ((low + 1 - side) * log_s[low] + (side - low) * log_s[low + 1])
    classes = entropy(flat[:, 64:], scores, weight=hyp.cls_pw, gamma=hyp.fl_gamma).sum()
    normaliser = assigned.score.sum().clamp(min=1)
    torch.testing.assert_close(scores.sum().clamp(min=1), normaliser)  # smoothing moves score, it adds none
    wanted = torch.stack((hyp.box * box, hyp.cls * classes, hyp.dfl * dfl)) / normaliser
    torch.testing.assert_close(torch.stack(list(loss(output, batch).values())), wanted, rtol=1e-4, atol=1e-5)


def test_reference_entropy_equals_torch():
    """The entropy that these tests measure with is torch's."""
    x, t = torch.linspace(-3, 3, 7), torch.linspace(0, 1, 7)
    torch.testing.assert_close(entropy(x, t, weight=1.0, gamma=0.0), F.binary_cross_entropy_with_logits(x, t, reduction="none"))
