"""COCO's files: instances JSON as ground truth, detections as results JSON, and pycocotools over both."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from utils.errors import UserError
from utils.masks.coco_outlines import code_of_annotation
from utils.masks.rle import FIELD, codes_to_rows, fitted, rows_at
from utils.metrics.coco_file import (
    SIZE_SLACK_PX,
    CocoContent,
    CocoObject,
    find_image_id,
    image_ids_by_name,
    is_keypoints,
    keypoint_array,
    read_coco_file,
    read_json,
    sound_annotations,
)
from utils.metrics.keypoints import KEYPOINT_STATS
from utils.metrics.metrics import COCO_STATS, GroundTruth, MetricAccumulator

UNUSED_COCO_IDS = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
MAX_SIDE_PX = 2**16  # of an image whose masks are measured
MOST_REMARKS = 3  # faulty annotations that are printed one by one
COCO_CATEGORY_IDS = tuple(i for i in range(1, 91) if i not in UNUSED_COCO_IDS)  # contiguous class 0 … 79 to COCO's id


@dataclass(frozen=True)
class CocoAnnotations:
    """An instances JSON, sorted by image."""

    path: Path
    category_ids: tuple[int, ...]  # per class
    single_class: bool  # whether all categories count as one
    image_ids: dict[str, int]  # by file name, see find_image_id
    starts: dict[int, tuple[int, int]]  # image id: rows
    classes: NDArray[np.int64]  # (M,)
    boxes_ltwh: NDArray[np.float64]  # (M, 4) px
    area: NDArray[np.float64]  # (M,) px²
    crowd: NDArray[np.bool_]  # (M,)
    remarks: tuple[str, ...] = ()  # what of the file is left out, for the user
    masks: NDArray[np.uint8] | None = None  # (M, ·) codes as rows of bytes, where they were asked for
    keypoints: NDArray[np.float64] | None = None  # (M, K, 3) x and y in px, visibility; None where no object has any
    sizes_hw: Mapping[int, tuple[int, int]] = field(default_factory=dict)  # image id: height and width in px, where given

    def ids_of(self, paths: Sequence[str | Path]) -> list[int]:
        """The image ids of files, by file name; a UserError names the first that the JSON does not know."""
        ids = [find_image_id(self.image_ids, p) for p in paths]
        if None in ids:
            raise UserError(f"{self.path}: no image with the file name {Path(paths[ids.index(None)]).name!r}")
        return [i for i in ids if i is not None]

    def serves(self, coco_type: str | None) -> bool:
        """Whether the file holds what results of this type are compared with."""
        return {"segm": self.masks, "keypoints": self.keypoints}.get(coco_type or "", self.boxes_ltwh) is not None

    def check_unique(self, paths: Sequence[str | Path]) -> None:
        """Refuses two files that are one image of the JSON: what is found on both would be counted as found on one.

        Raises:
            UserError: names the two.
        """
        first: dict[int, str | Path] = {}
        for path, image_id in zip(paths, self.ids_of(paths)):
            if (other := first.setdefault(image_id, path)) != path:
                expected = "give its file_name with the folder"
                raise UserError(f"{self.path}: image {image_id} is both {other} and {path}; {expected}, or take one of them away")

    def other_sizes(self, paths: Sequence[str | Path], hws: NDArray[np.int64]) -> str:
        """A line on the images that are of another size (N, 2) px than the file says, by more than rounding; empty for none."""
        pairs = [(path, self.sizes_hw.get(i), (int(h), int(w))) for path, i, (h, w) in zip(paths, self.ids_of(paths), hws)]
        other = [(path, given, hw) for path, given, hw in pairs if given and np.abs(np.subtract(given, hw)).max() > SIZE_SLACK_PX]
        if not other:
            return ""
        path, given, hw = other[0]
        more = f"; {len(other) - 1} more images are like this" if len(other) > 1 else ""
        return f"{self.path}: {path} is {hw[1]}x{hw[0]} px, but the file says {given[1]}x{given[0]}, so its objects may lie elsewhere{more}"

    def truth_of(self, paths: Sequence[str | Path], *, hws: NDArray[np.int64] | None = None) -> GroundTruth:
        """The objects of a batch of files; masks at the sizes ``hws`` (B, 2) px of its images, where given, else at those in the file."""
        rows = [np.arange(*self.starts.get(i, (0, 0))) for i in self.ids_of(paths)]
        image = np.repeat(np.arange(len(rows)), [len(r) for r in rows])
        taken = np.concatenate(rows) if rows else np.zeros(0, dtype=np.int64)
        columns = (image, *(a[taken] for a in (self.classes, self.boxes_ltwh, self.area, self.crowd)))
        image_index, classes, boxes, area, crowd = map(torch.from_numpy, columns)
        known: dict[str, NDArray] = {n: a[taken] for n, a in ((FIELD, self.masks), ("keypoints", self.keypoints)) if a is not None}
        if FIELD in known and hws is not None:
            known[FIELD] = rows_at(known[FIELD], hws[image])
        fields = {name: torch.from_numpy(values) for name, values in known.items()}
        return GroundTruth(image_index, classes, boxes, area, crowd, fields)


def read_instances(
    path: str | Path, names: Sequence[str], *, single_class: bool = False, masks: bool = False, keypoints: int | None = None
) -> CocoAnnotations:
    """Reads an instances JSON as ground truth; what training would not read is left out, and said in the same words.

    Args:
        path: The file.
        names: Class names of the data set, in order; matched to the file's categories by name, else by order if there are as many.
        single_class: Whether every object counts as class 0.
        masks: Whether objects have masks; one whose segmentation is missing or broken has its box.
        keypoints: How many an object has; one with another number counts as one without. None takes the number of the first that has any.

    Raises:
        UserError: If the file is no instances JSON or its categories do not fit ``names``.
    """
    content = read_coco_file(Path(path), None if single_class else names)
    sound = sorted((o for o in content.objects if not o.fault), key=lambda o: o.image_id)
    image = np.array([o.image_id for o in sound], dtype=np.int64)
    ids, first = np.unique(image, return_index=True)
    faults = [f"annotation {o.id} of {content.path.name}: {o.fault}" for o in content.objects if o.fault]
    coded, broken = read_masks(content, sound) if masks else (None, [])
    faults += broken + (_keypoint_faults(content, sound, keypoints) if keypoints else [])
    return CocoAnnotations(
        path=content.path,
        category_ids=content.category_ids[:1] if single_class else content.category_ids,
        single_class=single_class,
        image_ids=image_ids_by_name(content.files),
        starts={int(i): (int(a), int(b)) for i, a, b in zip(ids, first, [*first[1:], len(image)])},
        classes=np.array([o.label for o in sound], dtype=np.int64),
        boxes_ltwh=np.array([o.bbox for o in sound], dtype=np.float64).reshape(-1, 4),
        area=np.array([o.area for o in sound], dtype=np.float64),
        crowd=np.array([o.crowd for o in sound], dtype=bool),
        masks=coded,
        remarks=tuple(text for text in (content.lost, content.unnamed, *faults[:MOST_REMARKS], _and_more(len(faults))) if text),
        keypoints=_keypoints([o.keypoints for o in sound], keypoints),
        sizes_hw=content.sizes_hw,
    )


def _keypoints(given: Sequence[Any], count: int | None) -> NDArray[np.float64] | None:
    """(M, K, 3) where K is ``count`` or the first object's; None where no object has so many."""
    lengths = [len(entry) for entry in given if isinstance(entry, list) and entry]
    length = 3 * count if count else lengths[0] if lengths else 0
    return keypoint_array(given, length // 3) if length in lengths else None


def _keypoint_faults(content: CocoContent, objects: Sequence[CocoObject], count: int) -> list[str]:
    """A line for each object whose keypoints are others than ``count``: it counts as one without."""
    wrong = [found.id for found in objects if found.keypoints and not is_keypoints(found.keypoints, count)]
    expected = f"{count} times x, y in px and visibility 0, 1 or 2 are expected by kpt_shape"
    return [f"annotation {number} of {content.path.name}: keypoints: {expected}; they are not used" for number in wrong]


def read_masks(content: CocoContent, objects: Sequence[CocoObject]) -> tuple[NDArray[np.uint8] | None, list[str]]:
    """The masks of objects as codes in rows of bytes, and a line for each whose segmentation is broken: its box takes its place.

    None where no object of the file has a segmentation.

    Raises:
        UserError: the file does not say how large an image is.
    """
    codes, faults = [], list[str]()
    if objects and not any(found.segmentation for found in objects):
        return None, faults
    for found in objects:
        entry = content.images[found.image_id]
        hw: tuple[Any, Any] = (entry.get("height"), entry.get("width"))
        if not all(isinstance(side, int) and 0 < side <= MAX_SIDE_PX for side in hw):
            raise UserError(f"{content.path}: image {found.image_id}: whole numbers 'height' and 'width' are needed to measure masks")
        code, fault = code_of_annotation(found.segmentation, found.bbox, hw)
        codes.append(code)
        faults += [f"annotation {found.id} of {content.path.name}: {fault}; its box is used"] if fault else []
    return codes_to_rows(codes), faults


def _and_more(faults: int) -> str:
    return f"… and {faults - MOST_REMARKS} more like these" if faults > MOST_REMARKS else ""


def category_ids_of(names: Sequence[str]) -> tuple[int, ...]:
    """The category ids to write where no annotation file says them: COCO's own for its 80 classes, else the class numbers."""
    is_coco = len(names) == 80 and (names[0], names[79]) == ("person", "toothbrush")
    return COCO_CATEGORY_IDS if is_coco else tuple(range(len(names)))


class CollectedState(Protocol):
    """A metric: what holds the detections of an evaluation."""

    def state(self) -> dict[str, Any]: ...


def write_coco_json(
    path: str | Path, accumulator: CollectedState, *, category_ids: Sequence[int], image_ids: Mapping[str, int] | None = None
) -> int:
    """Writes all detections of an evaluation in COCO's results format, with their masks as run-length codes and their keypoints where they
    have any.

    Args:
        path: File to write.
        accumulator: Holds the detections.
        category_ids: Per class.
        image_ids: By the names of the accumulator's images; None where it has COCO's ids for names already.

    Returns:
        The number of detections written.
    """
    state = accumulator.state()
    ids = [image_ids[name] if image_ids else int(name) for name in state["images"]]
    row = '{"image_id":%d,"category_id":%d,"bbox":[%.4f,%.4f,%.4f,%.4f],"score":%.9g%s}'
    dets = state["detections"].tolist()
    fields = state.get("fields", {}).get("detections", {})
    codes, points = fields.get(FIELD), fields.get("keypoints")
    added = [""] * len(dets)
    if codes is not None:
        added = [f',"segmentation":{json.dumps(as_json(code))}' for code in codes]
    elif points is not None:
        added = [_keypoint_text(p) for p in points.reshape(len(points), -1).tolist()]
    rows = (row % (ids[int(d[0])], category_ids[int(d[1])], *d[2:], more) for d, more in zip(dets, added))
    Path(path).write_text("[" + ",\n".join(rows) + "]\n", encoding="utf-8")
    return len(state["detections"])


def _keypoint_text(values: Sequence[float]) -> str:
    """Keypoints as JSON writes them: x, y in px and the confidence of each."""
    return f',"keypoints":[{",".join(f"{value:.4f}" for value in values)}]'


def run_pycocotools(
    annotations: str | Path | dict[str, Any],
    results: str | Path | list[dict[str, Any]],
    *,
    image_ids: Iterable[int] | None = None,
    category_ids: Iterable[int] | None = None,
    use_categories: bool = True,
    kind: str = "bbox",
    sigmas: Sequence[float] = (),
) -> dict[str, float]:
    """The numbers of pycocotools: 12 for boxes and masks, 10 for keypoints.

    Args:
        annotations: Instances JSON, a file or its content.
        results: Results JSON, a file or its content; may be empty.
        image_ids: Only these images are evaluated; None takes all of the annotations.
        category_ids: Only these categories are evaluated; None takes all of the annotations.
        use_categories: False evaluates without regard to class.
        kind: ``bbox``, ``segm`` or ``keypoints``.
        sigmas: Of the keypoints for OKS; () for COCO's.

    Raises:
        UserError: If the files do not fit each other.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    content = read_json(Path(annotations)) if isinstance(annotations, (str, Path)) else annotations
    found = json.loads(Path(results).read_text(encoding="utf-8")) if isinstance(results, (str, Path)) else results
    known = {i["id"] for i in content["images"]}
    unknown = next((r["image_id"] for r in found if r["image_id"] not in known), None)
    if unknown is not None:
        raise UserError(f"the annotations have no image with id {unknown!r}; pycocotools can only compare files that share their image ids")
    if kind in COMPLETED:
        found = [{key: value for key, value in entry.items() if key != "bbox"} for entry in found]  # or it takes the area of that
        content = {**content, "annotations": COMPLETED[kind](content, found)}
    with contextlib.redirect_stdout(io.StringIO()):  # it prints much of no interest
        truth = _indexed(COCO(), content)
        dets = truth.loadRes(found) if found else _indexed(COCO(), {**content, "annotations": []})
        evaluation = COCOeval(truth, dets, kind)
        if sigmas:
            evaluation.params.kpt_oks_sigmas = np.array(sigmas)
        if image_ids is not None:
            evaluation.params.imgIds = sorted(set(image_ids))
        if category_ids is not None:
            evaluation.params.catIds = sorted(set(category_ids))
        evaluation.params.useCats = int(use_categories)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    names = KEYPOINT_STATS if kind == "keypoints" else COCO_STATS
    return {name: float(value) for name, value in zip(names, evaluation.stats)}


def _with_masks(content: Mapping[str, Any], found: Sequence[Mapping[str, Any]]) -> list[Any]:
    """The sound annotations with masks of the size that those of the results have, which may differ from the file's by rounding."""
    sizes = {entry["id"]: (entry["height"], entry["width"]) for entry in content["images"]}
    masks = [(entry["image_id"], entry.get("segmentation")) for entry in found]
    shown = {i: tuple(mask["size"]) for i, mask in masks if isinstance(mask, dict)}
    entries = [(a, a["image_id"]) for a in sound_annotations(content)]
    return [with_segmentation(a, sizes[i], shown=shown.get(i)) for a, i in entries]


def _with_keypoints(content: Mapping[str, Any], found: Sequence[Mapping[str, Any]]) -> list[Any]:
    """The annotations with as many keypoints as the results have, all unlabelled where they have others, and how many are labelled:
    pycocotools ignores an object without, and needs both of every object."""
    entries = [entry for entry in content["annotations"] if isinstance(entry, dict)]
    given = [points for entry in (*found, *entries) if isinstance(points := entry.get("keypoints"), list) and points]
    count = len(given[0]) // 3 if given else 0
    own: list[Any] = [entry.get("keypoints") for entry in entries]
    own = [points if is_keypoints(points, count) else [0] * (3 * count) for points in own]
    return [{**entry, "keypoints": p, "num_keypoints": sum(visible > 0 for visible in p[2::3])} for entry, p in zip(entries, own)]


COMPLETED = {"segm": _with_masks, "keypoints": _with_keypoints}  # what pycocotools needs more of annotations, by kind


def as_coco_documents(accumulator: MetricAccumulator) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What an accumulator holds as annotations and results of COCO's form, to check its numbers with pycocotools.

    Images are numbered from 1 in the order of their names, categories are the class numbers.
    """
    state = accumulator.state()
    number = {name: i for i, name in enumerate(sorted(state["images"]), 1)}
    ids = [number[name] for name in state["images"]]
    keys = ("category_id", "bbox")
    annotations = [
        {"id": i, "image_id": ids[int(t[0])], **dict(zip(keys, (int(t[1]), t[2:6]))), "area": t[6], "iscrowd": int(t[7])}
        for i, t in enumerate(state["truth"].tolist(), 1)
    ]
    results = [{"image_id": ids[int(d[0])], **dict(zip(keys, (int(d[1]), d[2:6]))), "score": d[6]} for d in state["detections"].tolist()]
    categories = [{"id": i, "name": name} for i, name in enumerate(accumulator.names)]
    return {"images": [{"id": i} for i in number.values()], "annotations": annotations, "categories": categories}, results


def with_segmentation(annotation: dict[str, Any], hw: tuple[int, int], *, shown: tuple[int, int] | None = None) -> dict[str, Any]:
    """An annotation with a sound segmentation, that of its box where it has none, at the size ``shown`` of its image if that is another."""
    code, _ = code_of_annotation(annotation.get("segmentation"), annotation["bbox"], hw)
    return {**annotation, "segmentation": as_json(fitted(code, shown or hw))}


def as_json(code: Mapping[str, Any]) -> dict[str, Any]:
    """A run-length code as JSON writes it."""
    counts = code["counts"]
    return {"size": [int(side) for side in code["size"]], "counts": counts.decode() if isinstance(counts, bytes) else counts}


def _indexed(coco: Any, content: dict[str, Any]) -> Any:
    """A COCO object over what of the content is sound."""
    coco.dataset = {"info": {}, **content, "annotations": sound_annotations(content)}
    coco.createIndex()
    return coco
