"""YOLOv9's heads with auxiliary branches: they help training and are dropped for inference (arXiv 2402.13616, section 4.1)."""

from __future__ import annotations

from models.heads.anchor_free import DDetect, DetectV9, DistributionHead
from models.spec import channel_rules as rules
from models.spec.registry import register

AUXILIARY, MAIN = 0.25, 1.0  # weights of the branches' losses


@register("DualDetect", channels=rules.head, kind="head")
class DualDetect(DistributionHead):
    """Two ``Detect`` branches: the first half of the inputs is the auxiliary one, the second half the main one."""

    branch_weights = (AUXILIARY, MAIN)
    single = DetectV9


@register("DualDDetect", channels=rules.head, kind="head")
class DualDDetect(DistributionHead):
    """Two ``DDetect`` branches: the first half of the inputs is the auxiliary one, the second half the main one."""

    branch_weights = (AUXILIARY, MAIN)
    box_groups = DDetect.box_groups
    single = DDetect
    single_name = DDetect.single_name


@register("TripleDetect", channels=rules.head, kind="head")
class TripleDetect(DistributionHead):
    """Three ``Detect`` branches: two auxiliary ones, then the main one."""

    branch_weights = (AUXILIARY, AUXILIARY, MAIN)
    single = DetectV9


@register("TripleDDetect", channels=rules.head, kind="head")
class TripleDDetect(DistributionHead):
    """Three ``DDetect`` branches: two auxiliary ones, then the main one."""

    branch_weights = (AUXILIARY, AUXILIARY, MAIN)
    box_groups = DDetect.box_groups
    single = DDetect
    single_name = DDetect.single_name
