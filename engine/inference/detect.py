"""Detection on images, videos and streams: source -> predictor -> draw and save, a line for each image."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from data.sources.files import FileSource
from data.sources.frames import Frame, FrameSource
from data.sources.opening import open_source
from data.sources.read_ahead import read_ahead
from engine.inference.augmented import AugmentedModel
from engine.inference.networks import LoadOptions, is_exported, load_networks
from engine.inference.predictor import INFERENCE, NMS, PRE_PROCESS, Network, Predictor, collate, fixed_size
from engine.inference.sliced import SlicedPredictor, check_slices
from engine.inference.tracking import Tracking, check_tracking, labelled
from tasks.base import DrawStyle, Task
from utils.cli.detect_arguments import DetectConfig
from utils.distributed import make_current, select_device
from utils.errors import UserError
from utils.masks.render import MaskMemoryError
from utils.nms import Suppression
from utils.run_folders import new_run_dir, newest_weights
from utils.stopwatch import Stopwatch
from utils.types import Detections
from utils.visual.draw import viewable
from utils.visual.savers import ResultWriter, SaveOptions

if TYPE_CHECKING:
    from models.model import Model

EMBEDDED_DATA = "shapes.yaml"
READING, WINDOWS, SAVING = "reading and letterbox", "windows", "drawing and saving"


@dataclass
class Report:
    """What a run did.

    Attributes:
        folder: where results lie; None if nothing was to be saved.
        frames: images and video frames that were predicted.
        detections: found in all of them.
        full: images with as many detections as ``--max-det`` lets through.
        skipped: one line for every file that could not be read, and every image whose masks need too much memory.
        seconds: in all, by stage.
        written: files by kind.
    """

    folder: Path | None = None
    frames: int = 0
    detections: int = 0
    full: int = 0
    skipped: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    written: dict[str, int] = field(default_factory=dict)

    def skip(self, line: str) -> None:
        """Prints why something was left out."""
        print(line)
        self.skipped.append(line)


def detect(config: DetectConfig) -> Report:
    """Finds objects in everything that ``config.source`` names, draws and saves them, and prints a line for each image.

    Raises:
        UserError: weights, source or an option cannot be used, or nothing of the source can be read.
    """
    device = select_device(config.device)
    make_current(device)
    _check_machine(config, device)
    _check_data(config)
    weights = chosen_weights(config)
    network = load_network(weights, device, config)
    check_tracking(network.task, config.track)
    report = Report()
    source = open_frames(config, weights, network, report)
    predictor = build_predictor(config, network, device)
    report.seconds = predictor.stopwatch.seconds
    sliced = sliced_predictor(config, predictor, source) if config.slice else None
    options = SaveOptions(
        images=not config.nosave, txt=config.save_txt, csv=config.save_csv, json=config.save_json, conf=config.save_conf,
        crops=config.save_crop,
    )  # fmt: skip
    writes = options.any or config.visualize or config.track
    report.folder = new_run_dir(config.project, config.name, exist_ok=config.exist_ok) if writes else None
    writer = ResultWriter(
        report.folder or Path(), predictor.names, options, predictor.task, written=report.written, videos_at_once=source.at_once
    )
    tracking = Tracking(config.track, writer.folder / "tracks", predictor.task)
    with closing(source.batches()) as batches, closing(in_turn(batches, source)) as read, writer, tracking:
        for predicted in predict_frames(read, predictor, sliced, on_skip=report.skip):
            if config.track:
                predicted = follow(predicted, tracking, writer, config)
            drawn = save_frame(predicted, predictor, writer, config)
            report.frames += 1
            report.detections += len(predicted.detections)
            report.full += not predictor.task.whole_image and len(predicted.detections) >= config.max_det
            print(f"{frame_line(predicted, predictor.names, predictor.task)}, {1000 * predicted.seconds:.1f} ms")
            if config.visualize and (video_position(predicted.frame, config)[0] or 1) == 1:  # of a video the first frame
                stem = writer.stem(predicted.frame.output_name)
                visualize(cast("Model", network), predicted.images, writer.folder / "features" / stem, report)
            if config.view_img and not show(drawn, predicted.frame):
                break
    if tracking.count:
        report.written["track files"] = tracking.count
    print_report(report, predictor.task)
    print_renamed(writer)
    return report


@dataclass(frozen=True)
class PredictedFrame:
    """A frame and what was found on it.

    Attributes:
        images: (1, C, H, W) in 0-1, what the network saw.
        detections: in px of the original.
        windows: how many windows of it went through the network too.
        seconds: of network and windows.
    """

    frame: Frame
    images: Tensor
    detections: Detections
    windows: int
    seconds: float


def in_turn(batches: Iterator[Sequence[Frame]], source: FrameSource) -> Generator[Sequence[Frame], None, None]:
    """The frames of files, each read while the network has the one before; those of streams as they come, or they would be older."""
    yield from read_ahead(batches) if isinstance(source, FileSource) else batches


def predict_frames(
    batches: Iterator[Sequence[Frame]], predictor: Predictor, sliced: SlicedPredictor | None, *, on_skip: Callable[[str], None]
) -> Iterator[PredictedFrame]:
    """Each frame with its detections; ``on_skip`` gets a line for what is left out as its masks need too much memory.

    Files come one by one; the newest frames of several streams go through the network together where their shapes agree.
    """
    stopwatch = predictor.stopwatch
    for frames in stopwatch.draw(batches, READING):  # with the time that reading, or waiting for, each group takes
        with stopwatch.stage(PRE_PROCESS):
            images, placement = collate([f.boxed for f in frames], [f.image.shape[:2] for f in frames], predictor.device)
        start = stopwatch.now()
        with stopwatch.stage(INFERENCE):
            predictions = predictor.forward(images)
        seconds = (stopwatch.now() - start) / len(frames)
        try:
            for frame, image, detections in zip(frames, images.split(1), predictor.detections(predictions, placement)):
                windows, start = 0, stopwatch.now()
                if sliced is not None:
                    windows = len(sliced.windows(frame.image.shape[:2]))
                    with stopwatch.stage(WINDOWS):
                        detections = sliced(frame.image, detections)
                yield PredictedFrame(frame, image, detections, windows, seconds + (stopwatch.now() - start if windows else 0.0))
        except MaskMemoryError as error:
            on_skip(f"skipped: {', '.join(frame.path for frame in frames)}: {error}")


def build_predictor(config: DetectConfig, network: Network, device: torch.device) -> Predictor:
    """The network with the suppression that the flags ask for."""
    conf = network.task.defaults.lowest_score(config.conf_thres)
    suppression = Suppression(conf=conf, iou=config.iou_thres, max_det=config.max_det, classes=config.classes, agnostic=config.agnostic_nms)
    stopwatch = Stopwatch(device, (READING, PRE_PROCESS, INFERENCE, NMS))
    precision = torch.float16 if config.half else None
    network = AugmentedModel(network) if config.augment else network
    return Predictor(network, suppression, device=device, precision=precision, stopwatch=stopwatch)


def sliced_predictor(config: DetectConfig, predictor: Predictor, source: FrameSource) -> SlicedPredictor:
    """Predicts through windows, which are letterboxed as the whole images are; their time is that of the windows alone."""
    assert config.slice is not None
    inner = Predictor(predictor.network, predictor.suppression, device=predictor.device, precision=predictor.precision)
    return SlicedPredictor(inner, (config.slice[0], config.slice[1]), config.slice_overlap, source.hw)


def save_frame(predicted: PredictedFrame, predictor: Predictor, writer: ResultWriter, config: DetectConfig) -> np.ndarray:
    """Writes what is wanted of a frame; returns it (H, W, 3) with its detections, or as it is where nobody will see it."""
    with predictor.stopwatch.stage(SAVING):
        shown, detections = viewable(predicted.frame.image), predicted.detections
        drawn = shown
        if not config.nosave or config.view_img:
            style = DrawStyle(line_thickness=config.line_thickness, hide_labels=config.hide_labels, hide_conf=config.hide_conf)
            drawn = predictor.task.draw(shown, *labelled(detections, predictor.names), style)
        number, fps = video_position(predicted.frame, config)
        writer.write(predicted.frame.output_name, shown, detections, drawn=drawn, frame=number, fps=fps)
    return drawn


def follow(predicted: PredictedFrame, tracking: Tracking, writer: ResultWriter, config: DetectConfig) -> PredictedFrame:
    """The frame with the numbers of its objects."""
    frame, (number, fps) = predicted.frame, video_position(predicted.frame, config)
    found = tracking.follow(frame, predicted.detections, stem=writer.stem(frame.output_name), number=number, fps=fps)
    return replace(predicted, detections=found)


def chosen_weights(config: DetectConfig) -> Path:
    """The file that was named, or the newest run's best.pt."""

    if config.weights:
        return Path(config.weights)
    weights = newest_weights()
    print(f"no --weights: taking the newest run's, {weights}")
    return weights


def load_network(weights: Path, device: torch.device, config: DetectConfig) -> Network:
    """The network of the weights, or several as one."""

    files: tuple[str | Path, ...] = (weights, *config.others)
    if config.visualize and (config.others or is_exported(weights, plugins=config.plugins)):
        reason = "several models have no common layers" if config.others else f"{weights} shows nothing of its layers"
        raise UserError(f"--visualize: {reason}; give one .pt file")
    options = LoadOptions(plugins=config.plugins, download=config.download, half=config.half, trust=config.trust, nms=config.nms)
    model = load_networks(files, device=device, options=options)
    check_slices(model.task, config.slice)
    for wanted in config.classes or ():
        if not 0 <= wanted < model.nc:
            raise UserError(f"--classes {wanted}: {weights} knows the classes 0 to {model.nc - 1}")
    return model


def open_frames(config: DetectConfig, weights: Path, model: Network, report: Report) -> FrameSource:
    """The frames of ``--source``, or the validation images; a file that cannot be read is one line."""

    settings: dict[str, Any] = {
        "imgsz": input_size(config, model),
        "stride": model.stride,
        "vid_stride": config.vid_stride,
        "auto_letterbox": fixed_size(model) is None,
        "whole_image": model.task.whole_image,
        "on_skip": report.skip,
        "channels": model.ch,
    }
    if config.source:
        return open_source(config.source, **settings)
    return FileSource(tuple(validation_images(config, weights)), **settings)


def input_size(config: DetectConfig, network: Network) -> tuple[int, int]:
    """Height and width of the letterboxed image; without ``--imgsz`` those that a file of fixed size was made for."""
    only = fixed_size(network)
    if only is None:
        return network.task.defaults.input_hw(config.imgsz)
    if config.imgsz not in (None, only):
        given, name = " ".join(map(str, config.imgsz or ())), getattr(network, "path", "the network")
        raise UserError(f"--imgsz {given}: {name} was made for {only[0]} {only[1]}; leave it out, or export with --dynamic")
    return only


def _check_data(config: DetectConfig) -> None:
    """Refuses a ``--data`` that is not there, also beside a ``--source``, where it is not read."""
    from data.dataset_spec import find_dataset_yaml

    if config.data:
        find_dataset_yaml(config.data)


def validation_images(config: DetectConfig, weights: Path) -> list[str]:
    """The images that are used when no source is given."""
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


def video_position(frame: Frame, config: DetectConfig) -> tuple[int | None, float]:
    """Number of a video frame, from 1, and the frames a second at which the annotated video keeps its speed; None for an image."""
    if frame.video is None:
        return None, 0.0
    return frame.video.number + 1, frame.video.fps / config.vid_stride


def frame_line(predicted: PredictedFrame, names: Sequence[str], task: Task) -> str:
    """Such as ``image 2/3 bus.jpg: 640x480 4 person, 1 bus``: height and width of the network's input, and what was found."""
    frame, (height, width) = predicted.frame, predicted.images.shape[2:]
    of = f"/{frame.total}" if frame.total else ""
    kind = "image" if frame.video is None else f"video frame {frame.video.number + 1}/{frame.video.frames or '?'} of"
    found = task.summary(predicted.detections, names)
    windows = f" and {predicted.windows} windows" if predicted.windows else ""
    return f"{kind} {frame.index + 1}{of} {frame.path}: {height}x{width}{windows} {found or 'nothing found'}"


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


def print_report(report: Report, task: Task) -> None:
    """Speed by stage, and where things lie."""
    frames = max(report.frames, 1)
    speed = ", ".join(f"{stage} {1000 * seconds / frames:.1f} ms" for stage, seconds in report.seconds.items())
    print(f"Speed per image: {speed}")
    skipped = f", {len(report.skipped)} skipped, for the reasons above" if report.skipped else ""
    what = f"{report.frames} images" if task.whole_image else f"{report.detections} objects in {report.frames} images"
    print(f"{what}{skipped}")
    if report.full:
        print(f"{report.full} images have as many objects as --max-det lets through; raise it to see whether there are more")
    if report.folder is not None:
        written = ", ".join(f"{count} {kind}" for kind, count in report.written.items())
        print(f"Results in {report.folder}: {written or 'nothing'}")


def print_renamed(writer: ResultWriter) -> None:
    """How many results are not called as their source is, since another source has the same name."""
    if writer.renamed:
        source, name = next(iter(writer.renamed.items()))
        print(f"{len(writer.renamed)} sources share their name with another; their results have a number, first: {name} is {source}")


def _check_machine(config: DetectConfig, device: torch.device) -> None:
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
