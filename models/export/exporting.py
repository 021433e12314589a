"""Exports: a deployed network written to a file that other programs run; only a file that agrees with torch gets its final name."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from models.export.formats import find_format
from models.export.networks import prepare_source
from models.export.parity import Agreement, compare
from models.export.registry import ExportFormat
from models.export.source import ExportOptions
from models.model import Model
from utils.errors import UserError
from utils.files import atomic_write


def export_model(model: Model, file_format: str, path: Path, options: ExportOptions) -> Agreement:
    """Deploys ``model``, writes it and compares the file with torch; ``path`` is only written, or replaced, where they agree.

    Raises:
        UserError: an unknown or refused format, a missing package, an option out of range, a folder that cannot be written, or a file that
            disagrees with torch.
    """
    export_format = find_format(file_format)
    options.validate(stride=model.stride)
    require_packages(export_format)
    deployed = model.deploy(for_suppression=export_format.has_suppression)
    source = prepare_source(deployed, export_format, options)
    try:
        with atomic_write(path) as unverified:
            with _expected_warnings(), torch.no_grad():
                export_format.write(source, unverified)
            agreement = compare(deployed, unverified, facts=source.facts, export_format=export_format, tolerance=options.tolerance)
            if not agreement.holds:
                raise UserError(f"{path}: not written, because the {file_format} export {agreement}; --tolerance PX SCORE allows more")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None
    return agreement


def require_packages(export_format: ExportFormat) -> None:
    """Checks that what a format needs is installed.

    Raises:
        UserError: a package is missing.
    """
    for package in export_format.needs:
        if importlib.util.find_spec(package) is None:
            raise UserError(f"--include {export_format.name}: needs the package {package}: pip install {package}")


@contextmanager
def _expected_warnings() -> Iterator[None]:
    """Hides the warnings that every trace raises, so that any other one is seen.

    Sizes that Python reads while tracing become constants of the file: intended where the size is fixed, and where it is not, compare()
    runs other sizes, which is a test where the warning is only a suspicion.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)
        warnings.filterwarnings("ignore", message="You are using the legacy TorchScript-based ONNX export", category=DeprecationWarning)
        warnings.filterwarnings("ignore", message="Constant folding - Only steps=1", category=UserWarning)  # it is run instead
        warnings.filterwarnings("ignore", message="The feature will be removed", category=DeprecationWarning, module="torch.onnx")
        yield
