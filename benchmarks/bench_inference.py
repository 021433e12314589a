"""Latency of deployed networks and validation end to end, compared with another package at the same number of threads.

    python benchmarks/bench_inference.py --peer-python PATH --threads 2
    python benchmarks/bench_inference.py --peer-python PATH --threads 2 --data bccd.yaml --weights best.pt --peer-weights best.pt

Latency is one image (1, 3, 640, 640) to detections: network, decoding and suppression, at a threshold that about 100 candidates pass. Sides
are this project, the peer, and this project's ONNX file in ONNX Runtime; each round starts a process a side, in turn. The peer sets its
threads when it chooses a device, so both sides set theirs after that, and the table says how many they had.

With ``--data`` whole validations are measured (start, images, network, metrics), in turn. The peer is a Python interpreter with
``ultralytics``; without it only this project is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
NETWORKS = ("yolov8n=yolov8n", "yolov8s=yolov8s", "yolov9-t=yolov9t", "yolov9-c=yolov9c")  # ours=the peer's
CANDIDATES = 100
IOU, MAX_DET = 0.45, 300


def main() -> None:
    """Runs the sides in turn and prints the table."""
    args = _arguments()
    if args.side:
        print(json.dumps((_validation if args.data else _latencies)(args)))
        return
    sides = ["ours"] + ["peer"] * bool(args.peer_python) + ["onnx"] * (not args.data and not args.no_onnx)
    with tempfile.TemporaryDirectory() as folder:
        runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
        for _ in range(args.rounds):
            for side in sides:
                runs[side].append(_run(side, args, folder))
    _report(runs)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS), metavar="OURS=PEER", help="names of YAMLs")
    parser.add_argument("--peer-python", help="a Python with ultralytics")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--imgsz", type=int, default=640)
    parser.add_argument("--calls", type=int, default=9, help="of each network in each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-onnx", action="store_true", help="without ONNX Runtime")
    parser.add_argument("--data", default="", help="measure validation on this data set instead")
    parser.add_argument("--weights", help="of our side, for --data")
    parser.add_argument("--peer-weights", help="of the peer, for --data")
    parser.add_argument("--workers", type=int, default=2, help="of both loaders, for --data")
    parser.add_argument("--batch-size", type=int, default=16, help="for --data")
    parser.add_argument("--side", choices=("ours", "peer", "onnx"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.data and not (args.weights and (args.peer_weights or not args.peer_python)):
        parser.error("--data: needs --weights, and --peer-weights for the peer")
    return args


def _run(side: str, args: argparse.Namespace, folder: str) -> dict[str, Any]:
    """One process of one side; with its seconds and its processor's."""
    python = args.peer_python if side == "peer" else sys.executable
    words = [a for a in sys.argv[1:] if a != "--no-onnx"]
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    run = subprocess.run(
        [python, __file__, *words, "--side", side, "--folder", folder],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(args.threads), "YOLO_OFFLINE": "1"},
    )
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if run.returncode:
        sys.exit(f"{side}: {(run.stderr.strip() or 'no message').splitlines()[-1]}")
    found = json.loads(run.stdout.strip().splitlines()[-1])
    if args.data:
        processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        found = {"validation s": seconds, "validation processor s": processor, **found}
    return found


def _latencies(args: argparse.Namespace) -> dict[str, float]:
    """Median ms of a call by network, peak memory and threads of this process."""
    if args.side != "peer":
        sys.path.insert(0, str(ROOT))
        from utils.cli.allocator import keep_freed_memory

        keep_freed_memory()  # as every script does
    import torch

    make = {"ours": _our_call, "peer": _peer_call, "onnx": _onnx_call}[args.side]
    found: dict[str, float] = {}
    for pair in args.networks:
        torch.manual_seed(0)
        ours, _, peers = pair.partition("=")
        call = make(peers if args.side == "peer" else ours, args)
        torch.set_num_threads(args.threads)  # after the peer has chosen its device
        times = []
        for _ in range(args.calls + 2):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        found[f"{ours} ms"] = 1000 * statistics.median(times[2:])
    return {**found, **_process()}


def _process() -> dict[str, float]:
    import torch

    return {"peak MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, "threads": torch.get_num_threads()}


def _threshold(scores: Any) -> float:
    """The score that ``CANDIDATES`` candidates exceed; ``scores`` are (N, nc)."""
    return float(scores.amax(1).sort(descending=True).values[CANDIDATES])


def _our_call(name: str, args: argparse.Namespace) -> Callable[[], object]:
    import torch

    from engine.inference.predictor import Predictor, collate
    from engine.memory_format import ready_to_infer
    from models import build_model
    from utils.nms import Suppression

    device = torch.device("cpu")
    network = ready_to_infer(build_model(f"{name}.yaml", nc=80).deploy(), device)
    images, placement = collate([_boxed(args.imgsz)], [(args.imgsz, args.imgsz)], device)
    conf = _threshold(network.predict(images).scores[0])
    predictor = Predictor(network, Suppression(conf=conf, iou=IOU, max_det=MAX_DET), device=device)
    return lambda: predictor.predict_batch(images, placement)


def _onnx_call(name: str, args: argparse.Namespace) -> Callable[[], object]:
    import onnxruntime
    import torch

    from models import build_model
    from models.export.networks import ExportedNetwork
    from utils.nms import Suppression

    network = build_model(f"{name}.yaml", nc=80).deploy()
    images, path = torch.rand(1, 3, args.imgsz, args.imgsz), Path(args.folder) / f"{name}.onnx"
    if not path.exists():
        torch.onnx.export(ExportedNetwork(network, network.task).eval(), (images,), str(path), opset_version=17, dynamo=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = args.threads
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: images.numpy()}

    def predictions() -> Any:
        return network.task.from_export([torch.from_numpy(output) for output in session.run(None, feed)], nc=80)

    suppression = Suppression(conf=_threshold(predictions().scores[0]), iou=IOU, max_det=MAX_DET)
    return lambda: network.task.postprocess(predictions(), suppression)


def _peer_call(name: str, args: argparse.Namespace) -> Callable[[], object]:
    import torch
    from ultralytics.nn.tasks import DetectionModel
    from ultralytics.utils.nms import non_max_suppression
    from ultralytics.utils.torch_utils import select_device

    device = select_device("cpu", verbose=False)
    network = DetectionModel(f"{name}.yaml", nc=80, verbose=False).eval().fuse(verbose=False).to(device)
    images = torch.rand(1, 3, args.imgsz, args.imgsz)

    @torch.inference_mode()
    def call(conf: float) -> Any:
        return non_max_suppression(network(images), conf, IOU, max_det=MAX_DET)

    with torch.inference_mode():
        conf = _threshold(network(images)[0][0, 4:].T)
    return lambda: call(conf)


def _boxed(side: int) -> Any:
    import numpy as np

    from data.augment.letterbox import letterbox

    image = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return letterbox(image, (side, side), auto=True, stride=32)


def _validation(args: argparse.Namespace) -> dict[str, float]:
    """A whole validation in this process."""
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()):
        if args.side == "ours":
            sys.path.insert(0, str(ROOT))
            import val

            words = ["--data", args.data, "--weights", args.weights, "--imgsz", str(args.imgsz), "--batch-size", str(args.batch_size)]
            status = val.main([*words, "--workers", str(args.workers), "--device", "cpu", "--project", args.folder])
            if status:
                raise SystemExit(status)
        else:
            import torch
            from ultralytics import YOLO

            model = YOLO(args.peer_weights)
            model.add_callback("on_val_start", lambda validator: torch.set_num_threads(args.threads))  # its device is chosen by then
            options = {"imgsz": args.imgsz, "batch": args.batch_size, "workers": args.workers, "device": "cpu", "project": args.folder}
            model.val(data=args.data, plots=True, verbose=False, **options)
    return _process()


def _report(runs: dict[str, list[dict[str, Any]]]) -> None:
    medians = {side: {key: statistics.median(run[key] for run in rows) for key in rows[0]} for side, rows in runs.items()}
    others = [side for side in medians if side != "ours"]
    print(f"{'':<24}" + "".join(f"{side:>10}" for side in medians) + "".join(f"{'ours / ' + side:>13}" for side in others))
    for key, ours in medians["ours"].items():
        values = "".join(f"{m[key]:>10.1f}" for m in medians.values())
        print(f"{key:<24}{values}" + "".join(f"{ours / medians[side][key]:>13.2f}" for side in others))


if __name__ == "__main__":
    main()
