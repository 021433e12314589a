"""The study folder: the network and the recipe of every variant as files, and the trainings that are made of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.study.plan import Plan, PlannedVariant
from engine.study.records import Cost, Stop
from engine.study.run_files import Job, network_hash, write_json
from engine.study.run_outputs import STUDY, StudyOfRuns, study_content
from models.edit.graph_table import spec_yaml
from utils.errors import UserError
from utils.files import atomic_write


def write_variants(plan: Plan) -> None:
    """Writes ``variants/NAME/model.yaml`` and ``hyp.yaml``.

    Raises:
        UserError: the study folder cannot be written.
    """
    try:
        for planned in plan.variants:
            folder = _folder_of(plan, planned)
            folder.mkdir(parents=True, exist_ok=True)
            with atomic_write(folder / "model.yaml") as partial:
                partial.write_text(spec_yaml(planned.spec, notes=planned.notes), encoding="utf-8")
            with atomic_write(folder / "hyp.yaml") as partial:
                planned.hyp.to_yaml(partial)
    except OSError as error:
        raise UserError(f"{plan.folder}: cannot be written ({error.strerror or error}); give another --project or --name") from None


def write_study(plan: Plan, costs: Mapping[str, Cost], stopped: Mapping[str, Stop], notes: Sequence[str]) -> None:
    """Writes ``study.json``, by which a report of the folder is the study's own."""
    config, names = plan.config, tuple(planned.name for planned in plan.variants)
    study = StudyOfRuns(plan.baseline, config.metric, config.compare, names, tuple(config.seeds), costs, stopped, tuple(notes))
    write_json(plan.folder / STUDY, study_content(study))


def jobs_of(plan: Plan) -> list[Job]:
    """A training for each variant and seed, in the order of the table."""
    return [_job(plan, planned, seed) for planned in plan.variants for seed in plan.config.seeds]


def hash_of(planned: PlannedVariant) -> str:
    """Identifies the variant's network."""
    return network_hash(planned.spec.to_dict())


def _job(plan: Plan, planned: PlannedVariant, seed: int) -> Job:
    config, files = plan.config, _folder_of(plan, planned)
    name = f"{planned.slug}-seed{seed}"
    flags: dict[str, Any] = {
        "cfg": str(files / "model.yaml"), "weights": planned.variant.weights, "data": plan.data, "hyp": str(files / "hyp.yaml"),
        "plugins": config.plugins, "epochs": config.epochs, "batch_size": config.batch_size, "imgsz": planned.variant.imgsz, "seed": seed,
        "workers": config.workers, "project": str(plan.folder / "runs"), "name": name, "exist_ok": True, **plan.train,
    }  # fmt: skip
    return Job(
        planned.name, seed, plan.folder / "runs" / name, flags, planned.hyp.to_dict(), hash_of(planned), config.compare,
        planned.variant.control_of, {**planned.plugins, **planned.weights},
    )  # fmt: skip


def _folder_of(plan: Plan, planned: PlannedVariant) -> Path:
    return plan.folder / "variants" / planned.slug
