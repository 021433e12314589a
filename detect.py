"""Detects objects: source -> letterbox -> model -> decode and suppression -> draw and save.

Example:
    python detect.py --weights runs/train/exp/weights/best.pt --source photos/ --save-txt
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from utils.cli.detect_arguments import DetectConfig, parse_arguments
from utils.errors import UserError
from utils.process_exit import leave

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

    from data.sources.frames import Frame, FrameSource
    from engine.inference.ensemble import Ensemble
    from engine.inference.sliced import SlicedPredictor
    from models.export.runtimes import ExportedModel
    from models.model import Model
    from utils.types import Detections, Predictions

    AnyModel = Model | ExportedModel | Ensemble

EMBEDDED_DATA = "shapes.yaml"
__all__ = ["DetectConfig", "Report", "detect", "main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    try:
        detect(parse_arguments(argv))
    except UserError as error:
        print(f"detect.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("detect.py: stopped; what was saved so far is complete", file=sys.stderr)
        return 130
    return 0


@dataclass
class Report:
    """What a run did.

    Attributes:
        folder: where results lie; None if nothing was to be saved.
        frames: images and video frames that were looked at.
        detections: boxes found in all of them.
        skipped: one line for every file that could not be read.
        seconds: of every frame by stage.
        written: files by kind.
    """

    folder: Path | None = None
    frames: int = 0
    detections: int = 0
    skipped: list[str] = field(default_factory=list)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    written: dict[str, int] = field(default_factory=dict)


def detect(config: DetectConfig) -> Report:
    """Finds objects in everything that ``config.source`` names, draws and saves them, and prints a line for each image.

    Raises:
        UserError: weights, source or an option cannot be used, or nothing of the source can be read.
    """
    import torch

    from engine.inference.augmented import AugmentedModel
    from utils.distributed import select_device
    from utils.nms import non_max_suppression
    from utils.precision import autocast
    from utils.run_folders import new_run_dir
    from utils.visual.draw import viewable
    from utils.visual.savers import ResultWriter, SaveOptions

    device = select_device(config.device)
    _check_surroundings(config, device)
    weights = chosen_weights(config)
    model = load_model(weights, device, config)
    looker = AugmentedModel(model) if config.augment else model
    report = Report()
    source = open_frames(config, weights, model, report)
    suppress = partial(
        non_max_suppression,
        conf=config.conf_thres,
        iou=config.iou_thres,
        max_det=config.max_det,
        classes=config.classes,
        agnostic=config.agnostic_nms,
    )
    sliced = sliced_predictor(config, source, looker.predict, suppress, device) if config.slice else None
    options = SaveOptions(
        images=not config.nosave, txt=config.save_txt, csv=config.save_csv, conf=config.save_conf, crops=config.save_crop
    )
    report.folder = new_run_dir(config.project, config.name, exist_ok=config.exist_ok) if options.any or config.visualize else None
    writer = ResultWriter(report.folder or Path(), model.names, options, written=report.written, videos_at_once=source.at_once)
    with closing(source.batches()) as batches, writer:
        for frame, images, found in predict_frames(batches, looker.predict, suppress, device, report, half=config.half):
            if sliced:
                with timed(report, "windows", device), autocast(device, torch.float16 if config.half else None):
                    found = sliced(frame.image, found)
            with timed(report, "drawing and saving", device):
                seen = viewable(frame.image)
                drawn = drawn_on(seen, found, model.names, config)
                number, fps = video_position(frame, config)
                writer.write(frame.output_name, seen, found, drawn=drawn, frame=number, fps=fps)
            report.frames += 1
            report.detections += len(found.boxes)
            windows = len(sliced.windows(frame.image.shape[:2])) if sliced else 0
            seconds = report.seconds["model"][-1] + (report.seconds["windows"][-1] if sliced else 0.0)
            print(f"{frame_line(frame, images, found, model.names, windows=windows)}, {1000 * seconds:.1f} ms")
            if config.visualize and (number or 1) == 1:  # of a video the first frame
                visualize(cast("Model", model), images, writer.folder / "features" / writer.stem(frame.output_name), report)
            if config.view_img and not show(drawn, frame):
                break
    print_report(report)
    return report


def predict_frames(
    batches: Iterator[Sequence[Frame]],
    predict: Callable[[Tensor], Predictions],
    suppress: Callable[[Predictions], list[Detections]],
    device: torch.device,
    report: Report,
    *,
    half: bool,
) -> Iterator[tuple[Frame, Tensor, Detections]]:
    """Each frame as the network sees it (1, C, H, W), 0-1, and what is found on it, in px of the original.

    Files come one by one; the newest frames of several streams go through the network together where their shapes agree.
    """
    import torch

    from engine.inference.predictor import as_batch, in_original_px
    from utils.precision import autocast

    for frames in timed_batches(batches, report, device):
        with timed(report, "to device", device, frames=len(frames)):
            images, letterbox = as_batch(frames, device)  # (B, C, H, W) in 0-1
        with timed(report, "model", device, frames=len(frames)), autocast(device, torch.float16 if half else None):
            predictions = predict(images)
        with timed(report, "suppression", device, frames=len(frames)):
            found = in_original_px(suppress(predictions), letterbox)
        yield from zip(frames, images.split(1), found)


def chosen_weights(config: DetectConfig) -> Path:
    """The file that was named, or the newest run's best.pt."""
    from utils.run_folders import newest_weights

    if config.weights:
        return Path(config.weights)
    weights = newest_weights()
    print(f"no --weights: taking the newest run's, {weights}")
    return weights


def load_model(weights: Path, device: torch.device, config: DetectConfig) -> AnyModel:
    """What looks at images: the network of the weights, or several as one."""
    from engine.inference.networks import is_exported, load_networks

    files = (weights, *config.others)
    if config.visualize and (config.others or is_exported(weights)):
        reason = "several models have no common layers" if config.others else f"{weights} shows nothing of its layers"
        raise UserError(f"--visualize: {reason}; give one .pt file")
    model = load_networks(files, device=device, plugins=config.plugins, download=config.download, half=config.half)
    for wanted in config.classes or ():
        if not 0 <= wanted < model.nc:
            raise UserError(f"--classes {wanted}: {weights} knows the classes 0 to {model.nc - 1}")
    return model


def open_frames(config: DetectConfig, weights: Path, model: AnyModel, report: Report) -> FrameSource:
    """The frames of ``--source``, or the validation images; a file that cannot be read is one line."""
    from data.sources.files import FileSource
    from data.sources.opening import open_source

    def skip(line: str) -> None:
        print(line)
        report.skipped.append(line)

    settings = {
        "imgsz": input_size(config, model),
        "stride": model.stride,
        "vid_stride": config.vid_stride,
        "auto_letterbox": getattr(model, "dynamic", True),
        "on_skip": skip,
        "channels": model.ch,
    }
    if config.source:
        return open_source(config.source, **settings)
    return FileSource(tuple(validation_images(config, weights)), **settings)


def input_size(config: DetectConfig, model: AnyModel) -> tuple[int, int]:
    """Height and width of the letterboxed image; without ``--imgsz`` those that a file of fixed size was made for."""
    if getattr(model, "dynamic", True):
        return config.imgsz or (640, 640)
    if config.imgsz not in (None, model.imgsz):
        made_for = " ".join(map(str, model.imgsz))
        given = " ".join(map(str, config.imgsz))
        raise UserError(f"--imgsz {given}: {model.path} was made for {made_for}; leave it out, or export with --dynamic")
    return model.imgsz


def sliced_predictor(
    config: DetectConfig, source: FrameSource, predict: Callable[[Tensor], Predictions], suppress: Callable[..., Any], device: torch.device
) -> SlicedPredictor:
    """What looks at the images through windows, which are letterboxed as the whole images are."""
    from engine.inference.sliced import SlicedPredictor

    assert config.slice is not None
    return SlicedPredictor(
        predict=predict,
        suppress=suppress,
        size_hw=(config.slice[0], config.slice[1]),
        overlap=config.slice_overlap,
        input_hw=source.hw,
        stride=source.stride,
        fixed=not source.auto,
        device=device,
        iou=config.iou_thres,
        max_det=config.max_det,
        agnostic=config.agnostic_nms,
    )


def validation_images(config: DetectConfig, weights: Path) -> list[str]:
    """The images that are looked at when no source is given."""
    from data.dataset_spec import load_dataset_spec
    from data.labels.files import list_images

    data = config.data
    if not data and weights.suffix.lower() == ".pt":
        from models.checkpoints.checkpoint import load_checkpoint

        data = str(load_checkpoint(weights).config.get("data") or "")
    spec = load_dataset_spec(data or EMBEDDED_DATA, need=("val",))
    images = list_images(spec.sources("val"))
    print(f"no --source: taking the {len(images)} validation images of {spec.yaml_path}")
    return images


def drawn_on(image: np.ndarray, found: Detections, names: Sequence[str], config: DetectConfig) -> np.ndarray:
    """The image (H, W, 3) RGB with boxes on it; itself where nobody will look at it."""
    from utils.visual.draw import draw_detections

    if config.nosave and not config.view_img:
        return image
    return draw_detections(
        image, found, names, line_thickness=config.line_thickness, hide_labels=config.hide_labels, hide_conf=config.hide_conf
    )


def video_position(frame: Frame, config: DetectConfig) -> tuple[int | None, float]:
    """Number of a video frame, from 1, and the frames a second at which the annotated video keeps its speed; None for an image."""
    if frame.video is None:
        return None, 0.0
    return frame.video.number + 1, frame.video.fps / config.vid_stride


def frame_line(frame: Frame, images: Tensor, found: Detections, names: Sequence[str], *, windows: int = 0) -> str:
    """Such as ``image 2/3 bus.jpg: 640x480 4 person, 1 bus``: height and width of the network's input, and what was found."""
    height, width = images.shape[2:]
    of = f"/{frame.total}" if frame.total else ""
    kind = "image" if frame.video is None else f"video frame {frame.video.number + 1}/{frame.video.frames or '?'} of"
    counts = ", ".join(f"{int(n)} {names[label]}" for label, n in enumerate(found.classes.bincount()) if n)
    looks = f" and {windows} windows" if windows else ""
    return f"{kind} {frame.index + 1}{of} {frame.path}: {height}x{width}{looks} {counts or 'nothing found'}"


def visualize(model: Model, images: Tensor, folder: Path, report: Report) -> None:
    """Saves what every layer makes of the image in ``features/<image>/``."""
    from utils.visual.feature_maps import save_feature_maps

    count = save_feature_maps(model.model, lambda: model.predict(images), folder)
    report.written["feature maps"] = report.written.get("feature maps", 0) + count


def show(drawn: np.ndarray, frame: Frame) -> bool:
    """Shows an image in a window; false when q or Esc was pressed."""
    import cv2

    cv2.imshow(f"{frame.path if frame.video and frame.name else 'detect.py'} (q to stop)", cv2.cvtColor(drawn, cv2.COLOR_RGB2BGR))
    return (cv2.waitKey(1 if frame.video else 0) & 0xFF) not in (ord("q"), 27)


def print_report(report: Report) -> None:
    """Speed by stage, and where things lie."""
    frames = max(report.frames, 1)
    speed = ", ".join(f"{stage} {1000 * sum(seconds) / frames:.1f} ms" for stage, seconds in report.seconds.items())
    print(f"Speed per image: {speed}")
    skipped = f", {len(report.skipped)} files could not be read" if report.skipped else ""
    print(f"{report.detections} objects in {report.frames} images{skipped}")
    if report.folder is not None:
        written = ", ".join(f"{count} {kind}" for kind, count in report.written.items())
        print(f"Results in {report.folder}: {written or 'nothing'}")


def timed_batches(batches: Iterator[Sequence[Frame]], report: Report, device: torch.device) -> Iterator[Sequence[Frame]]:
    """The groups of frames, with the time that reading, or waiting for, each takes."""
    while True:
        start = _now(device)
        frames = next(batches, None)
        if frames is None:
            return
        note_time(report, "reading and letterbox", _now(device) - start, frames=len(frames))
        yield frames


@contextmanager
def timed(report: Report, stage: str, device: torch.device, *, frames: int = 1) -> Iterator[None]:
    """Notes the seconds that a stage takes, its work on the device included, as equal shares of the frames."""
    start = _now(device)
    yield
    note_time(report, stage, _now(device) - start, frames=frames)


def note_time(report: Report, stage: str, seconds: float, *, frames: int) -> None:
    """Adds the share of every frame."""
    report.seconds.setdefault(stage, []).extend([seconds / frames] * frames)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)
    return time.perf_counter()


def _check_surroundings(config: DetectConfig, device: torch.device) -> None:
    """Refuses what this machine cannot do before anything is loaded."""
    if config.half and device.type != "cuda":
        raise UserError(f"--half: needs a GPU, this is {device.type}; leave it out")
    if config.view_img:
        import cv2

        no_display = sys.platform.startswith("linux") and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
        gui = next((line.split(":")[1].strip() for line in cv2.getBuildInformation().splitlines() if line.strip().startswith("GUI:")), "")
        if no_display or gui == "NONE":
            reason = "there is no display here" if no_display else "this OpenCV cannot open windows (it is the headless package)"
            raise UserError(f"--view-img: {reason}; leave it out, images are saved anyway")


if __name__ == "__main__":
    leave(main())
