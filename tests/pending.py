"""Golden vectors of features that this project does not have yet; tests read this table through tests/golden.py.

A row is a prefix of ``folder/name``, in which ``*`` matches anything. A suffix ``:values`` limits it to the test of that part (``values``,
``names``, ``assignment``, ``biases``); the other parts must pass. A vector is pending while any row matches it, and its test must fail
(strict xfail). A row that matches no vector fails test_coverage.py.
"""

from __future__ import annotations

PENDING = {
    # tasks
    "models/*-seg": "segmentation",
    "models/*-dseg": "segmentation",
    "heads/*_Segment": "segmentation",
    "losses/v5_seg:values": "segmentation",
    "losses/v8_seg": "segmentation",
    "losses/v26_seg": "segmentation",
    "blocks/ul_Proto": "segmentation",
    "models/*-pose": "pose",
    "heads/*_Pose": "pose",
    "losses/*_pose": "pose",
    "blocks/ul_RealNVP": "pose",
    "ops/keypoint_flip": "pose",
    "ops/map_keypoints": "pose",
    "ops/oks": "pose",
    "models/*-obb": "rotated boxes",
    "heads/*_OBB": "rotated boxes",
    "losses/*_obb": "rotated boxes",
    "ops/map_obb": "rotated boxes",
    "ops/nms_rotated": "rotated boxes",
    "ops/probiou": "rotated boxes",
    "ops/rboxes": "rotated boxes",
    "models/*-cls": "classification",
    "heads/ul_Classify": "classification",
    "losses/ul_cls": "classification",
    "ops/top_k": "classification",
    "ops/defaults_tasks": "the defaults of the tasks",
}
