"""Trains a network with an inserted module twice from the same weights: transferred by row number and name, and by structure.

    python benchmarks/bench_transfer.py --data path/to/bccd.yaml --weights runs/train/exp/weights/best.pt --insert FocalModulation@4

The weights were trained on the same data without the module. Both sides have the same random values in tensors that were not transferred,
and train with the same recipe and seed, one after the other, in separate processes; the mAP of every epoch is printed, by COCO's rule.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from models.checkpoints.checkpoint import Checkpoint, load_checkpoint, save_checkpoint  # noqa: E402
from models.edit.rows import edit  # noqa: E402
from models.model import Model  # noqa: E402
from models.spec.parser import load_spec  # noqa: E402
from models.transfer.transfer import Source, transfer  # noqa: E402

SIDES = ("by number", "by structure")
COLUMNS = ("metrics/mAP_0.5", "metrics/mAP_0.5:0.95")


def main() -> None:
    """Prepares both initial checkpoints, trains from them and prints the mAP curves."""
    args = _arguments()
    checkpoint = load_checkpoint(args.weights)
    curves = {}
    with tempfile.TemporaryDirectory() as folder:
        for side in SIDES:
            start = Path(folder) / f"{side.replace(' ', '-')}.pt"
            save_checkpoint(start, _start(checkpoint, args, by_structure=side == SIDES[1]))
            curves[side] = _trained(args, start, Path(folder))
    print(f"\n{args.insert} in {checkpoint.cfg_name}, {args.epochs} epochs at {args.imgsz} px, seed {args.seed}; mAP50 and mAP50-95\n")
    print(f"| epoch | {' | '.join(f'{side} {name}' for side in SIDES for name in ('mAP50', 'mAP50-95'))} |")
    print("|---" * 5 + "|")
    for epoch, rows in enumerate(zip(*curves.values()), start=1):
        print(f"| {epoch} | {' | '.join(f'{value:.3f}' for row in rows for value in row)} |")


def _start(checkpoint: Checkpoint, args: argparse.Namespace, *, by_structure: bool) -> Checkpoint:
    """Saves the edited network with the transferred weights as a checkpoint that train.py loads completely."""
    spec = load_spec({**checkpoint.cfg, "yaml_file": checkpoint.cfg_name}, nc=checkpoint.nc)
    torch.manual_seed(args.seed)
    model = Model(edit(spec, insert=args.insert, init=args.init).spec, names=checkpoint.names)
    if by_structure:
        print(transfer(model, Source(checkpoint.weights, checkpoint.cfg, checkpoint.names, str(args.weights))))
    else:
        own = model.state_dict()
        fitting = {k: v for k, v in checkpoint.weights.items() if k in own and own[k].shape == v.shape}
        model.load_state_dict(fitting, strict=False)
        print(f"{args.weights}, by number and name: {len(fitting)} of {len(own)} tensors")
    return Checkpoint(cfg=model.spec.to_dict(), cfg_name=checkpoint.cfg_name, names=checkpoint.names, weights=model.state_dict())


def _trained(args: argparse.Namespace, start: Path, project: Path) -> list[tuple[float, float]]:
    """mAP50 and mAP50-95 of every epoch."""
    flags = {
        "weights": start, "data": args.data.resolve(), "hyp": args.hyp.resolve(), "imgsz": args.imgsz, "epochs": args.epochs,
        "batch-size": args.batch_size, "workers": args.workers, "seed": args.seed, "device": args.device, "project": project,
        "name": start.stem,
    }  # fmt: skip
    command = [sys.executable, str(ROOT / "train.py"), "--noplots", *(str(w) for k, v in flags.items() for w in (f"--{k}", v))]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if run.returncode:
        sys.exit(f"{' '.join(command)}\n{run.stderr[-2000:]}")
    with (project / start.stem / "results.csv").open(encoding="utf-8") as file:
        return [(float(row[COLUMNS[0]]), float(row[COLUMNS[1]])) for row in csv.DictReader(file)]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path, help="bccd.yaml")
    parser.add_argument("--weights", required=True, type=Path, help="checkpoint trained on the same data, without the module")
    parser.add_argument("--insert", default="FocalModulation@4", help="as in --attention")
    parser.add_argument("--init", default="", choices=["", "identity"], help="how the module starts")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--hyp", type=Path, default=Path(__file__).with_name("hyp.bccd.yaml"))
    parser.add_argument("--imgsz", type=int, default=320)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


if __name__ == "__main__":
    main()
