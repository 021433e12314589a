"""Families and tasks that are not here, by their names, heads and blocks: messages say so instead of naming a neighbour."""

from __future__ import annotations

import re
from collections.abc import Collection

from tasks import TASKS

HERE = "here are YOLOv3, v5, v7, v8, v9, v10, YOLO11, YOLO12, YOLOv13, YOLO26, RT-DETR-l and -x, YOLOv4-CSP and YOLOR-CSP"
# How names of YAMLs and checkpoints begin; the first that fits counts.
ABSENT_NAMES = {
    re.compile(pattern, re.IGNORECASE): family
    for pattern, family in {
        r"yolo[-_]?v?([1246])(?!\d)(?!-csp)": "YOLOv{0}",
        r"yolo-?x": "YOLOX",
        r"yolor(?!-csp)": "YOLOR",
        r"yolo[-_]?nas": "YOLO-NAS",
        r"yoloe": "YOLOE",
        r"yolo(v8[a-z]?)?[-_]?world": "YOLO-World",
        r"pp-?yolo": "PP-YOLO",
        r"(damo|gold|fast|hyper)-?yolo": "{0}-YOLO",
        r"rt-?detr-resnet": "RT-DETR on ResNet",
        r"yolo.*-resnet\d": "YOLO on ResNet",
        r"yolov8[a-z]?-rtdetr": "YOLOv8 with the decoder of RT-DETR",
        r"(rt-?detr(?!-[lx]$)(?:-r\d+|v\d)?|rf-?detr|d-?fine|deim)": "{0}",
        r"(fast|mobile)?sam2?[._b-]": "SAM",
    }.items()
}
# Ends of names: the task as registered (empty: none that could be here), and what it is.
NAMED_TASKS = {
    **dict.fromkeys(("seg", "dseg"), ("segment", "segmentation")),
    **dict.fromkeys(("pose", "kpt"), ("pose", "keypoints")),
    "obb": ("obb", "rotated boxes"), "cls": ("classify", "classification"),
    "sem": ("", "semantic segmentation"), "pan": ("", "panoptic segmentation"), "depth": ("", "depth maps"),
}  # fmt: skip
# Heads of other tasks and what a network with one does.
TASK_HEADS = {
    **dict.fromkeys(("Segment", "DSegment", "DualDSegment", "TripleDSegment", "ISegment", "MT"), "segments"),
    **dict.fromkeys(("Segment26", "SemanticSegment"), "segments"),
    "IKeypoint": "predicts keypoints by anchors",
    **dict.fromkeys(("WorldDetect", "YOLOEDetect", "YOLOESegment", "YOLOESegment26"), "detects what a text names"),
    "Panoptic": "segments things and areas",
    "Depth": "estimates depth maps",
    "IBin": "predicts binned box sides",
}  # fmt: skip
TASK_SUFFIX = re.compile(rf"^(yolo|gelan).*-({'|'.join(NAMED_TASKS)})(?![a-z])", re.IGNORECASE)
# Blocks by which a file shows its family, the ones that fewest families have first.
FAMILY_BLOCKS = {
    "YOLO-World or YOLOE": ("C2fAttn", "WorldDetect", "YOLOEDetect"),
    "network on ResNet (as RT-DETR-ResNet50)": ("ResNetLayer",),
}
NUMBERED = re.compile(r"^yolo[-_]?v?(\d+)", re.IGNORECASE)
WITHOUT_V = ("11", "12", "26")  # families whose names are spelled YOLO11, not YOLOv11


def absent_family(stem: str) -> str:
    """What to say of a name of a family or a task that is not here; empty for other names."""
    for pattern, family in ABSENT_NAMES.items():
        if found := pattern.match(stem):
            return f"{family.format(*map(str.upper, found.groups()))} is not here; {HERE}"
    if found := TASK_SUFFIX.match(stem):
        task, what = NAMED_TASKS[found[2].lower()]
        return "" if task in TASKS else f"a network for {what} by its name; {tasks_here()}"
    return ""


def tasks_here() -> str:
    """The tasks that there are, for messages."""
    return f"tasks here are {', '.join(TASKS)}"


def respelled(stem: str) -> str:
    """The name with its family spelled as the published files are: ``yolo11n`` for ``yolov11n``, ``yolov10n`` for ``yolo10n``."""
    return NUMBERED.sub(lambda found: f"yolo{'' if found[1] in WITHOUT_V else 'v'}{found[1]}", stem)


def family_of(modules: Collection[str]) -> str:
    """The family that is not here to which rows of these modules belong; empty where they show none."""
    return next((name for name, blocks in FAMILY_BLOCKS.items() if any(block in modules for block in blocks)), "")
