"""What a detector does wrong on a data set: kinds of errors with their cost, tables by class and size, panels of the most confident."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.dataset_spec import DatasetSpec, load_dataset_spec
from data.images.reading import read_image
from data.loader import BatchLoader, LoaderOptions, build_loader
from engine.channels import spec_for
from engine.evaluation.evaluate import VALIDATION
from engine.evaluation.validate import by_class_name
from engine.explain.figures import Panel, ShownImage, grid_figure
from engine.explain.page import Section
from engine.explain.tide import KINDS, RIGHT, Case, ErrorReport, ImageResult, find_errors
from engine.explain.writing import written
from engine.inference.predictor import Predictor
from models.model import Model
from utils.cli.explain_arguments import ExplainConfig
from utils.cli.sizes import multiple_of_stride
from utils.config import Hyperparameters
from utils.errors import UserError
from utils.nms import Suppression
from utils.types import Batch, Detections, to_unit_range

SIZES = (("small", 0.0, 32.0**2), ("medium", 32.0**2, 96.0**2), ("large", 96.0**2, np.inf))  # area in px², COCO's
MARGIN = 0.6  # round a box, as a share of its longer side
LEAST_CROP_PX = 48
TRUTH_COLOUR, FOUND_COLOUR = "#009e73", "#e69f00"
EXPLANATIONS = {
    RIGHT: "matched to an object of the class at IoU 0.5",
    "class": "at the place of an object of another class",
    "location": "an object of the class, but IoU from 0.1 to 0.5",
    "both": "IoU from 0.1 to 0.5 with an object of another class",
    "duplicate": "an object that a better detection has",
    "background": "no object there",
    "missed": "objects that no right detection and no class or location error is about",
}


def error_section(model: Model, config: ExplainConfig, folder: Path, *, data: str, weights: str) -> tuple[Section, int]:
    """Runs a data set's validation images, writes ``errors_<kind>.png`` and says what each kind costs; also counts the images.

    Classes are compared by name, and images are read with the network's channels, as val.py does.

    Raises:
        UserError: the data set has another number of classes or of channels than the network.
    """
    spec = load_dataset_spec(data, need=("val",))
    if spec.nc != model.nc:
        raise UserError(f"{data}: {spec.nc} classes, but {weights} was trained for {model.nc}; give the data set of its own")
    spec = spec_for(spec, model, weights=weights)
    network = by_class_name(model, spec, data=data, weights=weights)
    predictor = Predictor(network, suppression_of(config), device=next(model.parameters()).device)
    results = list(image_results(predictor, open_loader(model, spec, config)))
    whole = find_errors(results, classes=spec.nc)
    conf = model.task.defaults.lowest_score(config.conf_thres)
    confident = [above(result, conf) for result in results]
    shown = find_errors(confident, classes=spec.nc)
    section = Section(f"errors on {len(results)} images of {spec.yaml_path.name}", table=cost_table(whole, shown))
    section.lines = [
        f"AP at IoU 0.5: {whole.ap50:.3f}. Cost: rise of it if that kind alone were mended (TIDE, arXiv 2008.08115), of all detections "
        f"with a score above {VALIDATION.conf:g}. Counts and panels: of detections with a score of at least {conf:g}.",
        *size_lines(confident, shown, spec.names),
    ]
    for kind in (RIGHT, *KINDS):
        cases = shown.of_kind(kind)[: config.panels]
        if cases:
            title = f"{kind} ({len(cases)} of {shown.counts[kind]}): {EXPLANATIONS[kind]}"
            path = folder / f"errors_{kind}.png"
            figure = lambda cases=cases, title=title: panels_figure(cases, confident, spec, title, model.ch)  # noqa: E731
            section.figures += [(one, title) for one in written(path, figure)]
    return section, len(results)


def suppression_of(config: ExplainConfig) -> Suppression:
    """As in a validation, but for what the flags say."""
    return replace(VALIDATION, iou=VALIDATION.iou if config.iou_thres is None else config.iou_thres, max_det=config.max_det)


def open_loader(model: Model, spec: DatasetSpec, config: ExplainConfig) -> BatchLoader:
    """The validation images, letterboxed in batches of similar shape."""
    options = LoaderOptions(
        imgsz=multiple_of_stride(model.task.defaults.input_hw(config.imgsz)[0], model.stride),
        batch_size=config.batch_size,
        hyp=Hyperparameters(),
        augment=False,
        rect=True,
        pad=0.5,
        stride=model.stride,
        workers=config.workers,
        whole_batches=True,
    )
    return build_loader(spec, "val", options, task=model.task)


def image_results(predictor: Predictor, batches: Iterable[Batch]) -> Iterator[ImageResult]:
    """Detections and objects of each image, in px of the original."""
    from tqdm import tqdm

    task = predictor.task
    for batch in tqdm(batches, desc="errors", unit="batch"):
        images = to_unit_range(batch.images.to(predictor.device))
        found = predictor.predict_batch(images, batch.letterbox)
        hw = (int(images.shape[2]), int(images.shape[3]))
        truth = task.to_original(task.detections_of_targets(batch.targets, hw, count=len(images)), batch.letterbox)
        for path, detections, objects in zip(batch.paths, found, truth):
            yield ImageResult(path, *_arrays(detections), *_arrays(objects)[::2])


def above(result: ImageResult, conf: float) -> ImageResult:
    """The same with the detections of at least a score."""
    keep = result.scores >= conf
    boxes, scores, classes = result.boxes[keep], result.scores[keep], result.classes[keep]
    return ImageResult(result.path, boxes, scores, classes, result.true_boxes, result.true_classes)


def cost_table(whole: ErrorReport, shown: ErrorReport) -> list[list[str]]:
    """Kind, cost in AP, number: rows of cells."""
    rows = [["kind", "cost in AP50", "number", "what"]]
    rows += [[kind, f"{whole.cost[kind]:+.3f}", str(shown.counts[kind]), EXPLANATIONS[kind]] for kind in KINDS]
    return [*rows, [RIGHT, "", str(shown.counts[RIGHT]), EXPLANATIONS[RIGHT]]]


def size_lines(images: Sequence[ImageResult], report: ErrorReport, names: Sequence[str]) -> list[str]:
    """For each class and size: found, wrong and missed."""
    counts: dict[tuple[int, str], list[int]] = {}
    for case in report.cases:
        image = images[case.image]
        is_miss = case.detection < 0
        box = image.true_boxes[case.object] if is_miss else image.boxes[case.detection]
        label = int(image.true_classes[case.object] if is_miss else image.classes[case.detection])
        column = 2 if is_miss else int(case.kind != RIGHT)
        counts.setdefault((label, size_of(box)), [0, 0, 0])[column] += 1
    order = [name for name, _, _ in SIZES]
    keys = sorted(counts, key=lambda key: (key[0], order.index(key[1])))
    return [f"{names[label]}, {size}: {counts[label, size][0]} right, {counts[label, size][1]} wrong, {counts[label, size][2]} missed"
            for label, size in keys]  # fmt: skip


def size_of(box: NDArray[np.float64]) -> str:
    """COCO's name for the area of a box (4,) xyxy in px."""
    area = float(np.prod(np.clip(box[2:] - box[:2], 0, None)))
    return next(name for name, low, high in SIZES if low <= area < high)


def panels_figure(cases: Sequence[Case], images: Sequence[ImageResult], spec: DatasetSpec, title: str, channels: int) -> Any:
    """A crop for each case with its detection and its object."""
    panels = [case_panel(case, images[case.image], spec.names, channels) for case in cases]
    return grid_figure(panels, title=title, aspect=1.0, columns=6)


def case_panel(case: Case, image: ImageResult, names: Sequence[str], channels: int) -> Panel:
    """The part of the image round a case."""

    def draw(figure: Any, axes: Any) -> None:
        pixels = read_image(image.path, channels=channels, dtype=None)
        own = image.boxes[case.detection] if case.detection >= 0 else image.true_boxes[case.object]
        left, top, right, bottom = _crop(own, pixels.shape[:2])
        shown = ShownImage(pixels[top:bottom, left:right])
        shown.show(axes, shown.pixels, caption(case, image, names))
        shift = np.array((left, top, left, top))
        if case.object >= 0:
            shown.box(axes, (image.true_boxes[case.object] - shift).tolist(), colour=TRUTH_COLOUR, width=1.5)
        if case.detection >= 0:
            shown.box(axes, (image.boxes[case.detection] - shift).tolist(), colour=FOUND_COLOUR, width=1.5)

    return draw


def caption(case: Case, image: ImageResult, names: Sequence[str]) -> str:
    """Such as ``cat 0.93, is dog (IoU 0.84) a.jpg``."""
    name = Path(image.path).name
    if case.detection < 0:
        best = f", best score near it {case.score:.2f}" if case.score else ""
        return f"{names[int(image.true_classes[case.object])]} missed{best} {name}"
    found = f"{names[int(image.classes[case.detection])]} {case.score:.2f}"
    if case.object < 0:
        return f"{found} {name}"
    true = names[int(image.true_classes[case.object])]
    relation = "" if true == names[int(image.classes[case.detection])] else f", is {true}"
    return f"{found}{relation} (IoU {case.iou:.2f}) {name}"


def _crop(box: NDArray[np.float64], hw: tuple[int, ...]) -> tuple[int, int, int, int]:
    """A square round a box, cut at the image: left, top, right, bottom."""
    height, width = hw[:2]
    centre = (box[:2] + box[2:]) / 2
    half = max(float((box[2:] - box[:2]).max()) * (0.5 + MARGIN), LEAST_CROP_PX / 2)
    left, top = (int(np.clip(value - half, 0, side - 1)) for value, side in zip(centre, (width, height)))
    right, bottom = (int(np.clip(value + half, low + 1, side)) for value, low, side in zip(centre, (left, top), (width, height)))
    return left, top, right, bottom


def _arrays(detections: Detections) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    return detections.boxes.double().numpy(), detections.scores.double().numpy(), detections.classes.numpy()
