"""What explain.py does: every image of a source explained, figures and arrays in a run folder, and one page that shows them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from data.dataset_spec import load_dataset_spec
from data.labels.files import list_images
from data.sources.files import FileSource
from data.sources.frames import Frame, FrameSource
from data.sources.opening import open_source
from engine.explain.comparing import compare_figure, explain_as
from engine.explain.error_panels import error_section
from engine.explain.explaining import ExplainOptions, Explanation, explain
from engine.explain.fields import field_figure, field_lines
from engine.explain.numbers import faithfulness_lines, sanity_figure, sanity_lines
from engine.explain.page import Section, write_page
from engine.explain.writing import safe_name, write_explanation, written
from engine.inference.networks import is_exported
from models import load_model
from models.analysis.explained_targets import TargetRequest, check_classes, check_quantity
from models.analysis.faithfulness import randomised
from models.analysis.module_views import explainable_modules
from models.analysis.receptive_field import receptive_fields
from models.analysis.tracing import check_rows, head_rows
from models.checkpoints.checkpoint import load_checkpoint
from models.checkpoints.published import ensure_weights
from models.model import Model
from models.spec.registry import load_plugin
from utils.cli.explain_arguments import ExplainConfig
from utils.distributed import make_current, select_device
from utils.errors import UserError
from utils.nms import Suppression
from utils.run_folders import newest_weights, run_dir_if_used
from utils.types import to_unit_range
from utils.visual.names import short_name

DEFAULT_IMAGES = 8  # of the validation images, where no source is given
LONGEST_LINE = 160  # columns of what is said of an image, whose classes may have long names
FIELD_IMAGES = 8  # whose mean a receptive field is
EMBEDDED_DATA = "shapes.yaml"
PAGE = "index.html"


@dataclass
class Report:
    """What a run did.

    Attributes:
        folder: where everything lies.
        images: that were explained.
        compared: images whose detections were compared with their labels.
        figures: that were written.
        skipped: one line for every file that could not be read.
    """

    folder: Path
    images: int = 0
    compared: int = 0
    figures: int = 0
    skipped: list[str] = field(default_factory=list)


def explain_source(config: ExplainConfig) -> Report:
    """Explains everything that ``config.source`` names, and prints a line for each image.

    Raises:
        UserError: weights, source or an option cannot be used.
    """
    device = select_device(config.device)
    make_current(device)
    weights = Path(config.weights) if config.weights else newest_weights()
    model = open_network(weights, device, config)
    if config.errors and model.task.coco_type is None:
        why = f"tells errors apart by the overlap of upright boxes, which the task {model.task.name!r} does not have"
        raise UserError(f"--errors: {why}; leave it out")
    options = options_of(config, model)
    other = open_compared(config, model, device, weights=weights) if config.compare else None
    with run_dir_if_used(config.project, config.name, exist_ok=config.exist_ok) as folder:
        report = Report(folder)
        sections: list[Section] = []
        if config.errors:
            section, report.compared = error_section(model, config, folder, data=config.data or data_of(weights), weights=str(weights))
            print(*(f"  {kind:<12}{cost:>14}{number:>10}" for kind, cost, number, _ in section.table), *section.lines, sep="\n")
            sections.append(section)
        try:
            if config.explains_images:
                sections.extend(Run(config, model, other, options, report, str(weights)).sections())
        finally:  # also of what was done before an interruption
            if any(section.figures or section.folded or section.table for section in sections):
                write_page(folder / PAGE, f"{weights.name}: what it looks at", sections)
    report.figures = sum(len(section.figures) + len(section.folded) for section in sections)
    counts = [f"images explained: {report.images}"] * (report.images > 0) + [f"compared with labels: {report.compared}"] * config.errors
    print(f"{', '.join(counts)}, figures: {report.figures}; open {report.folder / PAGE}")
    return report


def open_network(weights: Path, device: torch.device, config: ExplainConfig, *, flag: str = "--weights") -> Model:
    """A network with all of its rows, as its YAML numbers them; ``flag`` is what names its file."""
    if is_exported(weights, plugins=config.plugins):
        raise UserError(f"{flag} {weights}: an exported file shows nothing of its rows; give the .pt file that it was made from")
    for plugin in config.plugins:
        load_plugin(plugin)
    ensure_weights(weights, download=config.download)
    return load_model(weights, plugins=config.plugins).to(device).eval()


def open_compared(config: ExplainConfig, model: Model, device: torch.device, *, weights: Path) -> Model:
    """The network of ``--compare``.

    Raises:
        UserError: it cannot take the images of ``model``, shares no class with it, or lacks one of the rows.
    """
    other, said = open_network(Path(config.compare), device, config, flag="--compare"), f"--compare {config.compare}"
    if other.ch != model.ch:
        raise UserError(f"{said}: takes images of {other.ch} channels, but {weights} of {model.ch}; give one of as many")
    if not set(other.names) & set(model.names):
        raise UserError(f"{said}: knows none of the classes of {weights}")
    with naming(f"{said}: --rows"):
        check_rows(other, config.rows or ())
    return other


def options_of(config: ExplainConfig, model: Model) -> ExplainOptions:
    """What is explained, as the flags say.

    Raises:
        UserError: a row, a class or a module that the network does not have.
    """
    check_classes(config.classes or (), model.names, said="--classes")
    check_quantity(config.of, whole_image=model.task.whole_image, said="--of")
    with naming("--rows"):
        check_rows(model, config.rows or ())
    with naming("--modules"):
        explainable_modules(model, config.modules or ())
    query = None if config.query is None else (float(config.query[0]), float(config.query[1]))
    return ExplainOptions(
        methods=() if config.no_cam else config.method,
        rows=config.rows or (),
        target=TargetRequest(config.target or (), config.classes or (), config.of),
        suppression=Suppression(
            conf=model.task.defaults.lowest_score(config.conf_thres),
            iou=Suppression.iou if config.iou_thres is None else config.iou_thres,
            max_det=config.max_det,
        ),
        hw=model.task.defaults.input_hw(config.imgsz),
        query_xy=query,
        modules=not config.no_modules,
        module_rows=config.modules or (),
    )


@contextmanager
def naming(flag: str) -> Iterator[None]:
    """Begins what is wrong with the flag's name."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{flag}: {error}") from None


def data_of(weights: Path) -> str:
    """The data set that a checkpoint was trained on, or the embedded one."""
    return str(load_checkpoint(weights).config.get("data") or "") or EMBEDDED_DATA


@dataclass
class Run:
    """One network, or two, over the images of a source."""

    config: ExplainConfig
    model: Model
    other: Model | None
    options: ExplainOptions
    report: Report
    weights: str

    def sections(self) -> Iterator[Section]:
        """A section for each image, then those of all images.

        Raises:
            UserError: no image could be explained.
        """
        from tqdm import tqdm

        inputs: list[Tensor] = []
        source = self.source()
        with closing(source.batches()) as batches:
            frames = (frame for group in batches for frame in group)
            for frame in tqdm(frames, desc="explain", unit="image", total=len(source) if isinstance(source, FileSource) else None):
                yield self.frame_section(frame)
                if len(inputs) < FIELD_IMAGES:
                    inputs.append(to_unit_range(torch.from_numpy(frame.boxed.image).permute(2, 0, 1)[None]))
        if not self.report.images:
            raise UserError("no image could be explained, for the reasons above")
        if self.config.receptive_field:
            yield from self.field_sections(inputs)

    def source(self) -> FrameSource:
        """The frames of ``--source``, or the first validation images."""
        model, task = self.model, self.model.task
        settings = {"imgsz": task.defaults.input_hw(self.config.imgsz), "stride": model.stride, "whole_image": task.whole_image}
        settings |= {"on_skip": self.skip, "channels": model.ch, "vid_stride": self.config.vid_stride}
        if self.config.source:
            return open_source(self.config.source, **settings)  # type: ignore[arg-type]
        spec = load_dataset_spec(self.config.data or data_of(Path(self.weights)), need=("val",))
        images = list(islice(list_images(spec.sources("val")), DEFAULT_IMAGES))
        print(f"no --source: taking the first {len(images)} validation images of {spec.yaml_path}")
        return FileSource(tuple(images), **settings)  # type: ignore[arg-type]

    def skip(self, line: str) -> None:
        """Prints why a file was not read."""
        print(line)
        self.report.skipped.append(line)

    def frame_section(self, frame: Frame) -> Section:
        """Explains one image and writes its figures."""
        from tqdm import tqdm

        number = f"_{frame.video.number + 1}" if frame.video is not None else ""
        stem = f"{frame.index:04d}_{safe_name(Path(frame.output_name).stem)}{number}"
        try:
            found = explain(self.model, frame.image, self.options)
        except UserError as error:
            line = f"{frame.path}: {error}"
            self.skip(line)
            return Section(Path(frame.path).name, [str(error)])
        figures = write_explanation(found, self.report.folder, stem)
        section = Section(f"{Path(frame.path).name}{number}", [found.target.text])
        section.lines += [module.problem for module in found.modules if module.problem]
        methods = len(found.planes)
        section.figures = [(path, path.stem) for path in figures[:methods]]
        section.folded = [(path, path.stem) for path in figures[methods:]]
        self.add_numbers(section, found, stem)
        self.add_comparison(section, found, stem)
        self.report.images += 1
        tqdm.write("\n    ".join([f"{frame.path}: {short_name(section.lines[0], most=LONGEST_LINE)}", *section.lines[1:]]))
        return section

    def add_numbers(self, section: Section, found: Explanation, stem: str) -> None:
        """Faithfulness and sanity, where they are asked for."""
        if self.config.faithfulness:
            section.lines += faithfulness_lines(self.model, found)
        if self.config.sanity:
            other = explain_as(found, randomised(self.model), self.options, quantity=self.config.of)
            section.lines += sanity_lines(found, other)
            path = self.report.folder / f"{stem}_random_weights.png"
            section.figures += [(one, path.stem) for one in written(path, lambda: sanity_figure(found, other))]

    def add_comparison(self, section: Section, found: Explanation, stem: str) -> None:
        """The same objects in the other network, or a line where it does not know their classes."""
        if self.other is None:
            return
        try:
            other = explain_as(found, self.other, self.options, quantity=self.config.of)
        except UserError as error:
            section.lines.append(f"{self.config.compare}: not compared: {error}")
            return
        section.lines.append(f"{self.config.compare}: {other.target.text}")
        labels = _labels(self.weights, self.config.compare)
        for method in found.planes:
            path = self.report.folder / f"{stem}_compared_{safe_name(method)}.png"
            made = written(path, lambda method=method: compare_figure((found, other), labels, method))  # type: ignore[misc]
            section.figures += [(one, path.stem) for one in made]

    def field_sections(self, images: Sequence[Tensor]) -> Iterator[Section]:
        """Receptive fields over the images that have the shape of the first."""
        alike = [image.to(next(self.model.parameters()).device) for image in images if image.shape == images[0].shape]
        rows = self.options.rows or head_rows(self.model)
        fields = receptive_fields(self.model, alike, rows)
        if fields:
            section = Section("receptive fields", field_lines(self.model, fields))
            print(*section.lines, sep="\n")
            path = self.report.folder / "receptive_fields.png"
            section.figures = [(one, path.stem) for one in written(path, lambda: field_figure(self.model, fields, images=len(alike)))]
            yield section


def _labels(first: str, second: str) -> tuple[str, str]:
    """File names, or run folders where those are the same."""
    paths = Path(first), Path(second)
    if paths[0].name != paths[1].name:
        return paths[0].name, paths[1].name
    return "/".join(paths[0].parts[-3:]), "/".join(paths[1].parts[-3:])
