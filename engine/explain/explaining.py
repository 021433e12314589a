"""``explain(model, image)``: class activation maps of chosen detections, and what each attention module did, for one image."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.augment.centre_crop import fitted
from data.augment.letterbox import LetterboxedImage
from data.images.reading import ImageError
from engine.inference.image_model import ImageModel
from engine.inference.inputs import ImageSource, as_array
from engine.inference.predictor import collate
from models.analysis.class_activation import METHODS, combined, method_of, resized, scaled
from models.analysis.explained_targets import Target, TargetRequest, check_quantity, choose_classes, choose_target
from models.analysis.module_views import ModuleViews, explainable_modules, module_views
from models.analysis.tracing import Trace, check_rows, head_rows, row_title, trace
from models.layers.explained import Query
from models.model import Model
from tasks import Task
from utils.errors import UserError
from utils.nms import Suppression
from utils.sizes import round_up_to_stride
from utils.types import Detections, Letterbox, Predictions

Chooser = Callable[[Predictions, Detections], tuple[Target, Tensor]]


@dataclass(frozen=True)
class ExplainOptions:
    """What is explained, and how.

    Attributes:
        methods: names of class activation maps; empty for none.
        rows: of which maps are made; empty for those that the head reads.
        target: which detections.
        suppression: how detections are found; None for the task's usual score and the usual rest.
        hw: height and width in px that images are fitted into; None for the task's usual size (640, 224 to classify).
        query_xy: place of interest in px of the image; None for the middle of the first detection that is explained, or of the image where
            results have no place.
        modules: whether attention modules show what they did.
        module_rows: only those of these rows; empty for all.
    """

    methods: tuple[str, ...] = ("layercam",)
    rows: tuple[int, ...] = ()
    target: TargetRequest = field(default_factory=TargetRequest)
    suppression: Suppression | None = None
    hw: tuple[int, int] | None = None
    query_xy: tuple[float, float] | None = None
    modules: bool = True
    module_rows: tuple[int, ...] = ()


@dataclass(frozen=True)
class Placement:
    """Where an image lies in the network's input, which may hold the middle of the image only.

    Attributes:
        input_hw: of the network's input, px.
        top_left: of the image in it, px; negative where the image was cut off.
        inner_hw: of the image in it, px.
        letterbox: the same for tensors.
    """

    input_hw: tuple[int, int]
    top_left: tuple[int, int]
    inner_hw: tuple[int, int]
    letterbox: Letterbox

    @staticmethod
    def of(boxed: LetterboxedImage, original_hw: tuple[int, ...], placement: Letterbox) -> Placement:
        height, width = original_hw[:2]
        inner = (max(round(height * boxed.scale_xy[1]), 1), max(round(width * boxed.scale_xy[0]), 1))
        return Placement(boxed.image.shape[:2], (boxed.pad_xy[1], boxed.pad_xy[0]), inner, placement)

    def crop(self, plane: Tensor) -> Tensor:
        """The part of a plane (H, W) of the network's input that is the image: (inner height, inner width), 0 where it was cut off."""
        of_input, of_image = self._shared()
        part = plane.new_zeros(self.inner_hw)
        part[of_image] = plane[of_input]
        return part

    def uncropped(self, part: Tensor, *, fill: float) -> Tensor:
        """The way back: a plane (inner height, inner width) over the network's input, with a number where no image is."""
        of_input, of_image = self._shared()
        plane = part.new_full(self.input_hw, fill)
        plane[of_input] = part[of_image]
        return plane

    def seen(self, hw: Sequence[int]) -> NDArray[np.bool_]:
        """Which pixels of the image, at a height and width of it, the network saw: (H, W)."""
        axes = zip(hw, self.inner_hw, self.top_left, self.input_hw)
        places = [((np.arange(side) + 0.5) * inner / side + corner, whole) for side, inner, corner, whole in axes]
        rows, columns = ((at >= 0) & (at < whole) for at, whole in places)
        return rows[:, None] & columns

    def _shared(self) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
        """Rows and columns of the network's input, and of the image in it, that are the same pixels."""
        axes = [*zip(self.top_left, self.inner_hw, self.input_hw)]
        spans = [(max(corner, 0), min(corner + inner, whole), corner) for corner, inner, whole in axes]
        of_input, of_image = ([slice(a - shift * corner, b - shift * corner) for a, b, corner in spans] for shift in (0, 1))
        return (of_input[0], of_input[1]), (of_image[0], of_image[1])

    def on_image(self, values: Tensor, reach: tuple[float, float] = (1.0, 1.0), *, smooth: bool = True) -> NDArray[np.float32]:
        """A map (h, w) over ``reach`` times the network's input, over the image: (inner height, inner width)."""
        whole = [max(round(side * share), side) for side, share in zip(self.input_hw, reach)]
        plane = resized(values, (whole[0], whole[1])) if smooth else _in_cells(values.float(), (whole[0], whole[1]))
        return self.crop(plane).cpu().numpy().astype(np.float32)

    def fractions_to_image(self, xy: Tensor) -> Tensor:
        """Places (…, 2) as fractions of the network's input, as fractions of the image; outside it below 0 or above 1."""
        (height, width), (top, left), (inner_h, inner_w) = self.input_hw, self.top_left, self.inner_hw
        size, corner, inner = (torch.tensor(pair, dtype=torch.float32) for pair in ((width, height), (left, top), (inner_w, inner_h)))
        return (xy.cpu().float() * size - corner) / inner


@dataclass(frozen=True)
class Explanation:
    """What a network did with one image.

    Attributes:
        image: (H, W, C) uint8 or uint16, the original.
        found: its detections, in px of the image.
        names: class names.
        task: what the detections are.
        target: what is explained.
        chosen: numbers of the detections that the target is made of; empty where it is made of candidates that are none.
        titles: row -> what it is.
        cams: method -> row -> map (h, w) as the method gives it, before it is scaled.
        planes: method -> map over the image (inner height, inner width) of all rows together, in 0-1; 0 where it was cut off.
        modules: what attention modules did.
        query: the place of interest, in the network's input.
        placement: where the image lies in the network's input.
        trace: maps, predictions and inputs of modules, for further numbers.
    """

    image: NDArray[Any]
    found: Detections
    names: Sequence[str]
    task: Task
    target: Target
    chosen: tuple[int, ...]
    titles: Mapping[int, str]
    cams: Mapping[str, Mapping[int, Tensor]]
    planes: Mapping[str, NDArray[np.float32]]
    modules: Sequence[ModuleViews]
    query: Query
    placement: Placement
    trace: Trace

    @property
    def map(self) -> NDArray[np.float32]:
        """The first method's map of all rows together, in 0-1, at the size of the image (H, W)."""
        if not self.planes:
            raise UserError("no method was asked for, so there is no map")
        plane = torch.from_numpy(next(iter(self.planes.values())))
        return resized(plane, (self.image.shape[0], self.image.shape[1])).numpy()

    def row_plane(self, method: str, row: int) -> NDArray[np.float32]:
        """One row's map in 0-1, over the image (inner height, inner width)."""
        return self.placement.on_image(scaled(self.cams[method][row]))

    def overlay(self, method: str | None = None) -> NDArray[np.uint8]:
        """The image (H, W, 3) RGB with a method's map over it and the boxes that are explained; the first method's if none is named."""
        from engine.explain.figures import overlay

        return overlay(self, method or next(iter(self.planes)))

    def save(self, folder: str | Path, *, stem: str = "image") -> list[Path]:
        """Writes the figures and arrays into a folder, which is made; returns the figures."""
        from engine.explain.writing import write_explanation

        Path(folder).mkdir(parents=True, exist_ok=True)
        return write_explanation(self, Path(folder), stem)

    def _repr_html_(self) -> str:
        """The overlay of the first method, for a notebook."""
        from engine.explain.page import encoded

        if not self.planes:
            return f"<p>{len(self.modules)} modules</p>"
        return f'<img src="data:image/jpeg;base64,{base64.b64encode(encoded(self.overlay())).decode()}">'


def explain(
    model: Model | ImageModel, image: ImageSource, options: ExplainOptions | None = None, *, choose: Chooser | None = None, **changes: Any
) -> Explanation:
    """Explains what a network found on an image.

    Args:
        model: of any task and head, as ``load_model`` of ``models`` or of ``engine`` gives it; the latter without auxiliary branches.
        image: a path, a URL, a PIL image, or an array (H, W, C) or (H, W) uint8 or uint16, RGB where C is 3.
        options: what and how.
        choose: takes the predictions and the detections in px of the input, gives the target and the numbers of its detections; by
            ``options.target`` if None.
        **changes: other values of fields of ``options``; further ``method`` for a single method, ``target`` and ``classes`` for numbers of
            detections and of classes, ``quantity`` for score, box or both.

    Example:
        >>> from models import load_model
        >>> from engine.explain import explain
        >>> explain(load_model("best.pt"), "a.jpg", method="gradcam", target=0).save("explained")

    Raises:
        UserError: no model, or an image, a row, a method, a place or a detection that is not there.
    """
    model = _network(model)
    options = _changed(options or ExplainOptions(), changes)
    methods = {name.lower(): method_of(name) for name in options.methods}
    rows = check_rows(model, options.rows) if options.rows else head_rows(model)
    check_quantity(options.target.quantity, whole_image=model.task.whole_image)
    original = _as_image(image, model.ch)
    _check_query(options.query_xy, original.shape[1::-1])
    boxed = letterboxed(original, model, options.hw)
    device = next(model.parameters()).device
    batch, placed = collate([boxed], [original.shape[:2]], device)
    modules = explainable_modules(model, options.module_rows) if options.modules else {}
    traced = trace(model, batch, rows, modules=modules)
    placement = Placement.of(boxed, original.shape, placed)
    found, target, chosen = _chosen(model, traced.predictions, options, choose)
    gradients = traced.gradients(target.value(traced.predictions, placement.input_hw)) if methods else {}
    maps = {row: one.detach() for row, one in traced.maps.items()}
    cams = {name: {row: method(maps[row][0].float(), gradients[row][0].float()) for row in rows} for name, method in methods.items()}
    planes = {name: placement.crop(combined(list(by_row.values()), placement.input_hw)).cpu().numpy() for name, by_row in cams.items()}
    query = _query(options, placement, traced.predictions, target if not model.task.whole_image else None)
    return Explanation(
        image=original,
        found=model.task.to_original([found], placed)[0],
        names=model.names,
        task=model.task,
        target=target,
        chosen=tuple(chosen.tolist()),
        titles={row: row_title(model, row) for row in rows},
        cams=cams,
        planes=planes,
        modules=module_views(modules, traced, query),
        query=query,
        placement=placement,
        trace=traced,
    )


def _changed(options: ExplainOptions, changes: Mapping[str, Any]) -> ExplainOptions:
    """The options with single values in place of some."""
    changes = dict(changes)
    request: dict[str, Any] = {}
    for given, name in (("target", "numbers"), ("classes", "classes")):
        value = changes.pop(given, None)
        if isinstance(value, TargetRequest):
            options = replace(options, target=value)
        elif value is not None:
            request[name] = (value,) if isinstance(value, int) else tuple(value)
    if "quantity" in changes:
        request["quantity"] = changes.pop("quantity")
    if "method" in changes:
        changes["methods"] = (changes.pop("method"),)
    unknown = set(changes) - set(ExplainOptions.__dataclass_fields__)
    if unknown:
        raise UserError(f"explain: unknown option {sorted(unknown)[0]!r}; known are {', '.join(ExplainOptions.__dataclass_fields__)}")
    return replace(options, target=replace(options.target, **request), **changes)


def _network(model: Model | ImageModel) -> Model:
    """The network itself."""
    network = model.model if isinstance(model, ImageModel) else model
    if isinstance(network, Model):
        return network
    if isinstance(model, ImageModel):
        raise UserError("explain: an exported file shows nothing of its rows; load the .pt file that it was made from")
    raise UserError(f"explain: expected a model, as load_model gives it, got {type(model).__name__}")


def _as_image(image: ImageSource, channels: int) -> NDArray[Any]:
    """(H, W, channels) uint8 or uint16, as ``model(image)`` reads it."""
    if isinstance(image, Tensor):
        raise UserError(f"explain: expected a path, a PIL image or an array (H, W, {channels}) uint8 or uint16, got a tensor")
    try:
        return as_array(image, channels)
    except ImageError:
        raise
    except UserError as error:
        raise UserError(f"explain: {error}") from None


def letterboxed(image: NDArray[Any], model: Model, hw: tuple[int, int] | None) -> LetterboxedImage:
    """An image as the network gets it, or its middle for a result of the whole image; ``hw`` in px, None for the task's usual size."""
    height, width = (round_up_to_stride(side, model.stride) for side in model.task.defaults.input_hw(hw))
    return fitted(image, (height, width), whole_image=model.task.whole_image, auto=True, stride=model.stride)


def _chosen(model: Model, predictions: Predictions, options: ExplainOptions, choose: Chooser | None) -> tuple[Detections, Target, Tensor]:
    """The detections in px of the input, what of them is explained, and the numbers of the detections that it is made of."""
    suppression = options.suppression or Suppression(conf=model.task.defaults.conf)
    found = model.task.postprocess(predictions.map(lambda t: t.detach()), suppression)[0]
    if choose is not None:
        return found, *choose(predictions, found)
    chooser = choose_classes if model.task.whole_image else choose_target
    return found, *chooser(predictions, found, options.target, model.names)


def _check_query(xy: tuple[float, float] | None, size: Sequence[int]) -> None:
    """Refuses a place outside of an image of this width and height in px."""
    if xy is not None and not all(0 <= at < side for at, side in zip(xy, size)):
        raise UserError("query {:g} {:g}: lies outside of the image of {}x{} px".format(*xy, *size))


def _query(options: ExplainOptions, placement: Placement, predictions: Predictions, target: Target | None) -> Query:
    """The place of interest in the network's input; without a target that has one, the middle, unless the options name it.

    Raises:
        UserError: the place was cut off from the image.
    """
    height, width = placement.input_hw
    if options.query_xy is not None:
        scale, pad = placement.letterbox.scale_xy[0].tolist(), placement.letterbox.pad_xy[0].tolist()
        x, y = (value * factor + shift for value, factor, shift in zip(options.query_xy, scale, pad))
        if not (0 <= x < width and 0 <= y < height):
            axes = zip("xy", (width, height), pad, scale)
            seen = ", ".join(f"{name} {(0 - shift) / factor:.0f} to {(side - shift) / factor:.0f}" for name, side, shift, factor in axes)
            given = "query {:g} {:g}".format(*options.query_xy)
            raise UserError(f"{given}: lies outside of what the network sees of the image, {seen}")
    elif target is not None and len(target.candidates):
        x1, y1, x2, y2 = predictions.boxes[0, target.candidates[0]].detach().float().tolist()
        x, y = (x1 + x2) / 2, (y1 + y2) / 2
    else:
        x, y = width / 2, height / 2
    return Query(min(max(y / height, 0.0), 1.0), min(max(x / width, 0.0), 1.0))


def _in_cells(values: Tensor, hw: tuple[int, int]) -> Tensor:
    """A map enlarged without blending its cells."""
    rows, columns = (torch.arange(side) * count // side for side, count in zip(hw, values.shape))
    return values.cpu()[rows[:, None], columns]


__all__ = ["METHODS", "ExplainOptions", "Explanation", "Placement", "explain"]
