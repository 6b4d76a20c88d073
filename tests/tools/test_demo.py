"""The demo: its commands fit the scripts they run, and it stops, goes on and refuses as it says."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from finetune.config import DepthConfig
from finetune.options import EvaluationConfig
from spark.commands.work.report import read_steps
from spark.config import PretrainConfig
from spark.options import ReportConfig
from spark.training.cli import parse_config
from tools.demo import __main__ as demo
from tools.demo import figure as demo_figure
from tools.demo import rooms as render_rooms


def arguments(step: demo.Step, script: str) -> list[str]:
    """What follows the name of the script in a step's command."""
    return list(step.arguments[step.arguments.index(script) + 1 :])


@pytest.fixture
def steps() -> dict[str, demo.Step]:
    return {step.name: step for group in demo.demo_steps("runs/demo", 3, "a.png") for step in group}


def test_every_command_is_understood_by_its_script(steps):
    rooms = render_rooms.parse_arguments(arguments(steps["render"], "tools.demo.rooms"))
    assert (tuple(rooms.size), rooms.seed) == (demo.SIZE, 3)
    pretrain = parse_config(PretrainConfig, arguments(steps["pretrain"], "spark/pretrain.py"), "")
    assert pretrain.model.name == demo.ENCODER
    assert pretrain.data.train == f"{rooms.output}/unlabeled"
    for name in ("scratch", "spark"):
        evaluation = parse_config(
            EvaluationConfig, arguments(steps[f"evaluate_{name}"], "finetune/evaluate.py"), ""
        )
        assert evaluation.model == f"runs/demo/{name}/model"
        assert evaluation.data.list == "test.txt"
    page = parse_config(ReportConfig, arguments(steps["report"], "finetune.commands.report"), "")
    assert page.steps == f"runs/demo/{demo.RECORD}"
    drawn = demo_figure.parse_arguments(arguments(steps["figure"], "tools.demo.figure"))
    assert (drawn.output, drawn.pretrain) == ("a.png", "runs/demo/pretrain")


def test_the_two_trainings_differ_in_their_encoder_only(steps):
    scratch, spark = (
        parse_config(DepthConfig, arguments(steps[f"train_{name}"], "finetune/depth.py"), "")
        for name in ("scratch", "spark")
    )
    assert scratch.encoder == demo.ENCODER
    assert not scratch.pretrained
    assert spark.encoder == "runs/demo/pretrain/encoder"
    scratch.encoder = spark.encoder
    scratch.output_dir = spark.output_dir
    assert scratch == spark


def test_commands_can_be_typed_as_printed(steps):
    for step in steps.values():
        threads = [f"OMP_NUM_THREADS={step.threads}"] if step.threads else []
        assert shlex.split(step.command) == [*threads, "python", *step.arguments]
    compile(steps["timm"].arguments[1], "timm", "exec")


@pytest.fixture
def short(monkeypatch, tmp_path):
    """A demo of a few steps; the second reads what to do from a file, the third runs beside it."""

    def say(name: str, once: bool = True) -> demo.Step:
        code = f"open({str(tmp_path / 'said')!r}, 'a').write('{name} ')"
        return demo.Step(name, f"Say {name}", ("-c", code), once=once)

    order = f"exec(open({str(tmp_path / 'order.py')!r}).read())"
    beside = "import os; print('threads:', os.environ['OMP_NUM_THREADS'])"
    pair = [
        demo.Step("middle", "Do as told", ("-c", order), "result"),
        demo.Step("beside", "Tell", ("-c", beside), threads=3),
    ]
    (tmp_path / "order.py").write_text(FINE)
    monkeypatch.setattr(
        demo,
        "demo_steps",
        lambda output, seed, figure: [
            [say("first")],
            pair,
            [say(f"last{seed}")],
            [say("report", once=False)],
        ],
    )
    monkeypatch.setenv("DEMO", str(tmp_path / "demo"))
    return tmp_path


FINE = "import os, pathlib; pathlib.Path(os.environ['DEMO'], 'result').touch(); print('fine')"


def test_it_goes_on_where_it_failed(short, capsys):
    command = ["--output_dir", str(short / "demo")]
    (short / "order.py").write_text("import sys; print('a word on why'); sys.exit(7)")
    assert demo.main(command) == 1
    shown = capsys.readouterr()
    assert "step middle failed with exit status 7" in shown.err
    log = re.search(r"its output is in (\S+)", shown.err)[1]  # type: ignore[index]
    assert "a word on why" in Path(log).read_text()
    assert re.search(r"middle +a word on why", shown.out)
    assert re.search(r"beside +threads: 3", shown.out)
    (short / "order.py").write_text(FINE)
    assert demo.main(command) == 0
    assert "done before" in capsys.readouterr().out
    assert (short / "said").read_text().split() == ["first", "last0", "report"]
    entries = json.loads((short / "demo" / demo.RECORD).read_text())
    names = ["first", "middle", "beside", "last0"]
    assert [(entry["name"], entry["group"]) for entry in entries] == list(
        zip(names, (1, 2, 2, 3), strict=True)
    )
    assert all(entry["done"] for entry in entries)
    assert read_steps(short / "demo" / demo.RECORD) == entries


def test_a_step_that_was_stopped_is_not_done(short, capsys):
    (short / "order.py").write_text("print('saved, as asked to')")
    assert demo.main(["--output_dir", str(short / "demo")]) == 130
    assert "goes on from here" in capsys.readouterr().err


def test_other_settings_need_a_fresh_start(short, capsys):
    command = ["--output_dir", str(short / "demo")]
    assert demo.main(command) == 0
    steps = demo.demo_steps("", 0, "")
    changed = [[demo.Step("first", "Say else", ("-c", "pass"))], *steps[1:]]
    demo.demo_steps = lambda *_: changed  # the fixture puts the real one back
    assert demo.main(command) == 2
    assert "--fresh" in capsys.readouterr().err
    assert demo.main([*command, "--fresh"]) == 0


def test_only_a_demo_is_deleted(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("years of work")
    assert demo.main(["--output_dir", str(tmp_path), "--fresh"]) == 2
    assert "holds no demo" in capsys.readouterr().err
    assert demo.main(["--output_dir", str(tmp_path / "thesis.tex")]) == 2
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_output_that_is_not_utf8_does_not_stop_it(short, capsys):
    more = "; import sys; print(sys.executable, flush=True); sys.stdout.buffer.write(b'caf\\xe9\\n')"
    (short / "order.py").write_text(FINE + more)
    assert demo.main(["--output_dir", str(short / "demo")]) == 0
    assert sys.executable in capsys.readouterr().out
