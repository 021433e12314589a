"""The format ``onnx_end2end``: an ONNX file with suppression inside, whose outputs are detections."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from models.export.onnx import ONNX, open_onnx, write_onnx
from models.export.registry import ExportFormat, register_format


@contextmanager
def expose_candidates(path: Path, conf: float) -> Iterator[Path]:
    """A temporary copy of a file with another confidence threshold, and the candidates of its suppression as further outputs."""
    import numpy as np
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    from models.export.suppression import CANDIDATES

    proto = onnx.load(path)
    name = next(node.input[4] for node in proto.graph.node if node.op_type == "NonMaxSuppression")
    value = numpy_helper.from_array(np.array([conf], np.float32), name)
    for node in proto.graph.node:
        if node.op_type == "Constant" and node.output[0] == name:
            node.attribute[0].t.CopyFrom(value)
    for initializer in proto.graph.initializer:
        if initializer.name == name:
            initializer.CopyFrom(value)
    proto.graph.output.extend(helper.make_tensor_value_info(output, TensorProto.FLOAT, None) for output in CANDIDATES)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / path.name
        onnx.save(proto, copy)
        yield copy


ONNX_END2END = register_format(
    ExportFormat(
        name="onnx_end2end",
        suffix=ONNX.suffix,
        stem="-end2end",
        write=write_onnx,
        open=open_onnx,
        help="the same with suppression inside, as --nms makes it",
        needs=ONNX.needs,
        expose_candidates=expose_candidates,
    )
)
