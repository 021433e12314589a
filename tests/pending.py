"""Golden vectors of features that this project does not have yet; tests read this table through tests/golden.py.

A row is a prefix of ``folder/name``, in which ``*`` matches anything. A suffix ``:values`` limits it to the test of that part (``values``,
``names``, ``assignment``, ``biases``); the other parts must pass. A vector is pending while any row matches it, and its test must fail
(strict xfail). A row that matches no vector fails test_coverage.py.
"""

from __future__ import annotations

PENDING = {
    # families
    "models/ultralytics-rtdetr": "RT-DETR",
    # tasks
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
}
