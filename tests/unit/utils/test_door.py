"""The door of the scripts: whatever ends one is a line and an exit status; flags out of range are refused before anything is done."""

import importlib.util
import re
import sys

import pytest

from utils.cli import detect_arguments, export_arguments, train_arguments, val_arguments
from utils.cli.flags import LARGEST_WHOLE, flags_of
from utils.cli.parser import OneLineParser
from utils.cli.script import ERRORS, ERRORS_VARIABLE, run_command, run_script
from utils.config import TrainConfig
from utils.distributed import select_device
from utils.errors import PLUGIN_PREFIX, UserError, one_line

SCRIPTS = {"train": train_arguments, "val": val_arguments, "detect": detect_arguments, "export": export_arguments}
COMMANDS = {
    "models.edit.__main__": ["x"], "models.checkpoints.convert": ["x"], "models.analysis.profiling": ["x"], "models.analysis.catalogue": [],
    "data.tools.check": ["x"], "data.tools.convert": ["yolo-to-coco", "x", "--out", "y"], "data.tools.shapes": [], "doctor": [],
}  # fmt: skip


def raising(error: BaseException):
    def body():
        raise error

    return body


def one(text: str) -> str:
    assert text.count("\n") == 1
    assert text.rstrip("\n").isprintable()
    return text.rstrip("\n")


def test_an_unexpected_error_is_one_line_and_a_log(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["detect.py", "--source", "rtsp://user:secret@host"])
    assert run_script("detect.py", raising(KeyError("a\n\x1b[31mb"))) == 1
    said = one(capsys.readouterr().err)
    assert said.startswith("detect.py: internal error, please report: KeyError: ")
    (log,) = (tmp_path / ERRORS).iterdir()
    assert re.fullmatch(r"detect-\d{8}-\d{6}-\d+\.log", log.name)
    assert said.endswith(f"; traceback in {ERRORS / log.name}")
    text = log.read_text()
    assert "Traceback (most recent call last)" in text
    assert "in raising" in text or "in body" in text
    assert "secret" not in text


def test_an_error_of_a_users_file_is_named_by_file_and_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(ERRORS_VARIABLE, str(tmp_path / "run"))
    file = tmp_path / "mine.py"
    file.write_text("def forward(x):\n    return x['a']\n")
    spec = importlib.util.spec_from_file_location(f"{PLUGIN_PREFIX}mine_0", file)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    assert run_script("train.py", lambda: module.forward({})) == 1
    (log,) = (tmp_path / "run").iterdir()
    assert one(capsys.readouterr().err) == f"train.py: mine.py, line 2: KeyError: 'a'; traceback in {log}"


def test_without_a_folder_the_traceback_is_printed(tmp_path, monkeypatch, capsys):
    (tmp_path / "runs").write_text("a file")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "runs" / "tmp"))
    assert run_script("val.py", raising(TypeError("x"))) == 1
    said = capsys.readouterr().err
    assert "Traceback" in said
    assert said.endswith("TypeError: x; no folder for a log can be written, so the traceback is above\n")


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (UserError("a.yaml: wrong\nline \x1b[0m"), 2, r"x: a.yaml: wrong line \x1b[0m"),
        (UserError("y" * 10**6), 2, "x: " + "y" * 4000 + " …"),
        (KeyboardInterrupt(), 130, "x: interrupted; resume"),
        (RecursionError("maximum recursion depth exceeded"), 2, "x: internal error, please report: RecursionError: maximum"),
        (MemoryError(), 2, "x: not enough memory (MemoryError); a smaller"),
        (OSError(28, "No space left on device", "last.pt"), 2, "x: last.pt: No space left on device; traceback in "),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"), 2, "x: internal error, please report: UnicodeDecodeError"),
    ],
)
def test_every_end_is_one_line_and_a_status(tmp_path, monkeypatch, capsys, error, status, said):
    monkeypatch.chdir(tmp_path)
    assert run_command("x", raising(error), failed=2, reason="resume") == status
    assert one(capsys.readouterr().err).startswith(said)


def test_a_reader_that_has_enough_is_no_error(monkeypatch, capfd):
    monkeypatch.setattr("os.dup2", lambda *_: None)
    assert run_command("x", raising(BrokenPipeError())) == 1
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("module", COMMANDS)
def test_every_command_has_the_door(tmp_path, monkeypatch, capsys, module):
    command = importlib.import_module(module)
    monkeypatch.chdir(tmp_path)
    place = "run_command" if hasattr(command, "run_command") else "run_script"
    seen = []
    monkeypatch.setattr(command, place, lambda name, body, **options: seen.append(name) or 0)
    assert command.main(COMMANDS[module]) == 0
    assert len(seen) == 1


@pytest.mark.parametrize("script", SCRIPTS)
def test_usage_errors_are_one_line(script, capsys):
    for line in (["--no-such-flag"], ["--imgsz", "big"], ["--imgsz"], ["--name", "a", "b"], ["--imgsz", "9" * 5000], ["x" * 10**5]):
        with pytest.raises(SystemExit) as ended:
            SCRIPTS[script].parse_arguments(line)
        assert ended.value.code == 2
        assert len(one(capsys.readouterr().err)) < 700


def test_an_unknown_flag_names_the_nearest(capsys):
    with pytest.raises(SystemExit):
        SCRIPTS["train"].parse_arguments(["--epoch-count", "3"])
    assert one(capsys.readouterr().err) == "train.py: unrecognized arguments: --epoch-count 3; did you mean '--epochs'?"


def test_usage_errors_of_subcommands_are_one_line(capsys):
    from data.tools.convert import main

    with pytest.raises(SystemExit):
        main(["yolo-to-coco"])
    assert one(capsys.readouterr().err).startswith("python -m data.convert yolo-to-coco: the following arguments are required")
    assert issubclass(OneLineParser().add_subparsers()._parser_class, OneLineParser)


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("number", [2**33, 2**63, 2**64, 10**30, -(2**64)])
def test_no_whole_number_is_unbounded(script, number):
    config_class = SCRIPTS[script].COMMAND.config_class
    for flag in flags_of(config_class):
        if flag.scalar is int and not flag.mixed:
            with pytest.raises(UserError, match=flag.spelling):
                config_class(**{flag.name: (number,) if flag.many else number})


@pytest.mark.parametrize(
    ("script", "line", "said"),
    [
        ("train", "--seed 18446744073709551616", "--seed 18446744073709551616: a whole number from 0 to 4294967295 is needed"),
        ("train", "--imgsz 100000", "--imgsz 100000: a whole number from 32 to 16384 is needed"),
        ("train", "--imgsz 640 100000", "--imgsz 640 100000: whole numbers from 32 to 16384 are needed"),
        ("train", "--freeze 1000000000", "--freeze 1000000000: no model has more than 10000 layers"),
        ("train", "--save-period -2", "--save-period -2: a whole number of at least 0, or -1 for none, is needed"),
        ("train", "--epochs 10000000000", f"--epochs 10000000000: at most {LARGEST_WHOLE} is possible"),
        ("train", "--workers 100000", "--workers 100000: a whole number from 0 to 1024"),
        ("detect", "--line-thickness 100000", "--line-thickness 100000: a whole number from 1 to 1000 is needed"),
        ("detect", "--imgsz 64 1000000", "--imgsz 64 1000000: whole numbers from 1 to 16384 are needed"),
        ("detect", "--slice 10000000000", "--slice"),
        ("val", "--imgsz 1000000", "--imgsz 1000000"),
        ("val", "--study-sizes 1000000", "--study-sizes 1000000"),
        ("export", "--topk-all 99999999", "--topk-all 99999999: a whole number from 1 to 100000 is needed"),
        ("export", "--imgsz 99999999", "--imgsz 99999999"),
        ("train", "--name /abs/exp", "--name: '/abs/exp' is a path; the folder is made below --project"),
        ("val", "--name ../exp", "--name: '../exp' is a path"),
        ("detect", "--name .", "--name: '.' is a path"),
        ("detect", "--source ~nouser-here/x", "--source: ~nouser-here/x: there is no user 'nouser-here'"),
        ("train", "--data " + "a" * 300, "--data: the name aaa"),
        ("train", "--hyp " + "a/" * 3000, "--hyp: the path a/"),
        ("export", "--plugins ok.py " + "a" * 300, "--plugins: the name aaa"),
    ],
)  # fmt: skip
def test_values_out_of_range_are_refused(script, line, said):
    with pytest.raises(UserError) as caught:
        SCRIPTS[script].parse_arguments(line.split())
    assert str(caught.value).startswith(said)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("script", "flag"),
    [("train", f) for f in ("resume", "data", "name", "project", "hyp", "plugins", "attention", "backbone-weights", "cache")]
    + [("val", f) for f in ("weights", "data", "name", "task")] + [("detect", f) for f in ("weights", "source", "data", "name")]
    + [("export", f) for f in ("weights", "include")],
)  # fmt: skip
def test_empty_values_are_refused(script, flag):
    said = rf"^--{flag} '': an empty value \(a shell variable that is not set\?\); give one, or leave --{flag} out$"
    with pytest.raises(UserError, match=said):
        SCRIPTS[script].parse_arguments([f"--{flag}", ""])


def test_empty_values_that_mean_something_are_taken():
    parse = SCRIPTS["train"].parse_arguments
    assert parse(["--weights", "", "--cfg", "yolov8n.yaml", "--device", ""]).weights == ""
    assert parse(["--cfg", "", "--weights", "a.pt"]).cfg == ""
    assert parse(["--save-period", "0"]).save_period == 0
    assert parse(["--name", "group/exp"]).name == "group/exp"
    for line in (["--weights", ""], ["--cfg", "", "--weights", ""]):
        with pytest.raises(UserError, match="nothing says what to train"):
            parse(line)
    assert TrainConfig(data="", weights="", hyp="").data == ""


def test_streams_may_have_long_names():
    url = "http://host/" + "t" * 1000
    assert SCRIPTS["detect"].parse_arguments(["--source", url]).source == url


@pytest.mark.parametrize("name", ["banana", "cuda:x", "0,banana", "-1", "0;1", "9" * 5000, "\x1b"])
def test_an_unknown_device_says_what_is_allowed(name):
    with pytest.raises(UserError) as caught:
        select_device(name)
    assert "cpu, mps, a GPU's number such as 0, or several" in str(caught.value)
    assert len(str(caught.value)) < 250


def test_a_line_is_printable():
    assert one_line("a\n  b\r\n\x00\ud800é猫\u202e") == r"a b \x00\ud800é猫\u202e"
    assert one_line("") == ""
