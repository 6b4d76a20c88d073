"""The whole path in minutes on two CPU cores: render rooms, pretrain, export, train depth, evaluate, report.

    python -m tools.demo --output_dir runs/demo

Runs the project's own commands, exactly as they are run by hand, and prints each:

    1. render     a small RGB-D world of furnished rooms                 tools/demo/rooms.py
    2. pretrain   an encoder on the images without depth                 spark/pretrain.py
    3. timm       plain timm loads the exported encoder                  timm.create_model("local-dir:...")
    4. train      UNet++ from scratch and from that encoder, alike       finetune/depth.py, twice
    5. evaluate   both on rooms that no training saw                     finetune/evaluate.py, twice
    6. report     OUTPUT_DIR/report.html                                 finetune/commands/report.py
    7. figure     OUTPUT_DIR/figure.png                                  tools/demo/figure.py

The two trainings run side by side on half of the cores each, and so do the two evaluations. The output of every step is
also in OUTPUT_DIR/logs. A demo that was stopped goes on where it was when the same command is given again. `--fresh`
starts over; it deletes the output folder, and only if a demo made it.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from spark.errors import UserError
from spark.files import write_whole
from spark.training.accelerator import usable_cores

ROOT = Path(__file__).resolve().parents[2]
RECORD = "steps.json"  # in the output folder: what has been run, and the mark that a demo made the folder

SIZE = (120, 160)  # (H, W) of the rendered images [px]
SCENES, VIEWS, UNLABELED = 100, 3, 240
ENCODER = "test_resnet"  # timm's smallest ResNet, 0.4 million parameters: learns within minutes on a CPU
PROTOCOL = "nyu-bts-scaled"  # nyu-bts is for images of 480x640 only

TIMM_CHECK = """
import timm, torch
from spark import load_encoder
plain = timm.create_model("local-dir:{encoder}", pretrained=True, num_classes=0).eval()
ours = load_encoder("{encoder}").eval()
images = torch.randn(2, 3, 96, 128)
difference = (plain.forward_features(images) - ours.forward_features(images)).abs().max().item()
print("loaded by timm.create_model:", type(plain).__name__, "- largest difference of features:", difference)
assert difference == 0
""".strip()


class Step(NamedTuple):
    """A command of the demo.

    Attributes:
        name: what it is called, in the log's file name too.
        title: a sentence about it.
        arguments: of the Python that runs the demo.
        result: file in the output folder that it leaves when it came to its end; "" if its exit status says it all.
        threads: how many it computes with; None leaves it to the libraries.
        once: whether it is skipped when it was done before.
    """

    name: str
    title: str
    arguments: tuple[str, ...]
    result: str = ""
    threads: int | None = None
    once: bool = True

    @property
    def command(self) -> str:
        """The command line as one would type it."""
        threads = f"OMP_NUM_THREADS={self.threads} " if self.threads else ""
        return threads + shlex.join(["python", *self.arguments])


def options(**values: object) -> tuple[str, ...]:
    """Command-line options; `__` stands for the dot of a nested one."""
    pairs = ((f"--{name.replace('__', '.')}", str(value)) for name, value in values.items())
    return tuple(text for pair in pairs for text in pair)


def demo_steps(output: str, seed: int, figure: str) -> list[list[Step]]:
    """All steps for an output folder relative to the repository; those of a list run together."""
    rooms, pretrain = f"{output}/rooms", f"{output}/pretrain"
    half = max(1, usable_cores() // 2)

    def train(name: str, title: str, encoder: str) -> Step:
        settings = options(
            encoder=encoder,
            data__root=rooms,
            data__list="train.txt",
            data__val_list="test.txt",
            data__image_size="[96,128]",
            data__crop_size="[96,128]",
            data__border="null",
            data__zoom="[1.0,1.0]",
            data__mean="[0.485,0.456,0.406]",  # both starts see the same images
            data__std="[0.229,0.224,0.225]",
            data__workers=1,
            model__head_options="{decoder_channels: [32, 24, 16, 12, 8]}",
            optim__lr="2e-3",
            optim__batch_size=8,
            epochs=12,
            validate_every=3,
            log_every=20,
            checkpoint_every=200,
            keep_checkpoints=1,
            protocol=PROTOCOL,
            seed=seed,
            resume="true",
            output_dir=f"{output}/{name}",
        )
        command = ("finetune/depth.py", *settings)
        return Step(f"train_{name}", title, command, f"{name}/evaluation.json", half)

    def evaluate(name: str, title: str) -> Step:
        run = f"{output}/{name}"
        given = options(model=f"{run}/model", data__root=rooms, data__list="test.txt", protocol=PROTOCOL)
        command = ("finetune/evaluate.py", *given, "--output", f"{run}/results.json")
        return Step(f"evaluate_{name}", title, command, f"{name}/results.json", half)

    render = ("-m", "tools.demo.rooms", *options(output=rooms, scenes=SCENES, views=VIEWS))
    render += (*options(unlabeled=UNLABELED, seed=seed), "--size", *map(str, SIZE))
    settings = options(
        model__name=ENCODER,
        model__input_size="[128,160]",
        model__decoder_width=128,
        data__train=f"{rooms}/unlabeled",
        data__workers=1,
        optim__name="adamw",
        optim__base_lr="1.6e-2",
        optim__batch_size=24,
        optim__warmup_epochs=2,
        epochs=12,
        log_every=10,
        checkpoint_every=50,
        keep_checkpoints=1,
        panels_every=50,
        seed=seed,
        resume="true",
        output_dir=pretrain,
    )
    lead = (
        f"A demonstration on rendered rooms: {UNLABELED} images of {SIZE[0]}×{SIZE[1]} to pretrain on, {SCENES} rooms"
        " with exact depth to train and test on, and a few minutes of training. It shows every part at work; what"
        " pretraining is worth is measured on real photos, see docs/results."
    )
    runs = (f"scratch={output}/scratch", f"SparK={output}/spark")
    about = options(steps=f"{output}/{RECORD}", title="SparK demo", lead=lead, output=f"{output}/report.html")
    report = ("-m", "finetune.commands.report", *runs, f"pretraining={pretrain}", *about)
    drawn = ("-m", "tools.demo.figure", "--pretrain", pretrain, "--depth", runs[0], "--depth", runs[1])
    exported = "pretrain/encoder/model.safetensors"
    check = TIMM_CHECK.format(encoder=f"{pretrain}/encoder")
    return [
        [
            Step(
                "render",
                f"Render {SCENES} rooms with depth, {UNLABELED} images without",
                render,
                "rooms/test.txt",
            )
        ],
        [Step("pretrain", f"Pretrain {ENCODER}", ("spark/pretrain.py", *settings), exported)],
        [Step("timm", "Load the exported encoder with plain timm", ("-c", check))],
        [
            train("scratch", "Train UNet++ from scratch", ENCODER),
            train("spark", "Train it from that encoder", f"{pretrain}/encoder"),
        ],
        [
            evaluate("scratch", "Evaluate on unseen rooms: from scratch"),
            evaluate("spark", "and from the pretrained encoder"),
        ],
        [Step("report", "Write the report", report, "report.html", once=False)],
        [Step("figure", "Draw the figure", (*drawn, "--output", figure), once=False)],
    ]


class Running:
    """A step under way, in the repository's folder; its output goes to the terminal and into a log.

    Args:
        step: what to run.
        log: file to append the output to.
        prefix: what its lines begin with on the terminal.
    """

    def __init__(self, step: Step, log: Path, prefix: str):
        self.step, self.log, self.prefix, self.start = step, log, prefix, time.monotonic()
        self.status, self.seconds, self.cpu_seconds = 0, 0.0, 0.0
        # No buffer between the step and the terminal, and UTF-8 for any locale.
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}
        if step.threads:
            environment["OMP_NUM_THREADS"] = str(step.threads)
        self.process = subprocess.Popen(
            [sys.executable, *step.arguments],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
        )
        self.thread = threading.Thread(target=self._follow)
        self.thread.start()

    def _follow(self) -> None:
        """Copy the output to its end, then take status and times."""
        assert self.process.stdout is not None
        with open(self.log, "a", encoding="utf-8") as file, self.process.stdout as lines:
            file.write(f"$ {self.step.command}\n")
            for line in lines:
                file.write(line)
                print(f"{self.prefix}{line}", end="", flush=True)
        _, status, usage = os.wait4(self.process.pid, 0)
        self.process.returncode = self.status = os.waitstatus_to_exitcode(status)
        self.seconds, self.cpu_seconds = time.monotonic() - self.start, usage.ru_utime + usage.ru_stime

    def wait(self) -> None:
        """Wait for its end. Ctrl-C reaches the step too, which saves its state: it is given the time to."""
        while self.thread.is_alive():
            try:
                self.thread.join()
            except KeyboardInterrupt:
                print(f"{self.prefix}stopping ...", flush=True)


def prepare_folder(folder: Path, fresh: bool) -> list[dict]:
    """Make the output folder; with `fresh`, without what an earlier demo left in it. Returns the steps run so far.

    Raises:
        UserError: the folder holds something that no demo made; it is not touched.
    """
    record = folder / RECORD
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: --output_dir is a folder")
    if folder.is_dir() and any(folder.iterdir()):
        if not record.is_file():
            raise UserError(
                f"{folder} is not empty and holds no demo ({RECORD}): choose another --output_dir"
            )
        if fresh:
            shutil.rmtree(folder)
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    if not record.exists():
        write_whole(record, b"[]\n")
    return json.loads(record.read_text(encoding="utf-8"))


def run_demo(folder: Path, entries: list[dict], groups: list[list[Step]]) -> int:
    """Run what is missing of the demo; returns the exit status.

    Args:
        folder: output folder.
        entries: of steps.json, which go into the report: name, command, group, seconds, cpu_seconds, done.
        groups: the steps; those of a group run side by side.

    Raises:
        UserError: a step was run with another command before.
    """
    for number, group in enumerate(groups, start=1):
        running = []
        for step in group:
            print(f"\n[{number}/{len(groups)}] {step.title}\n\n  $ {step.command}\n", flush=True)
            entry = next((entry for entry in entries if entry["name"] == step.name), None)
            if entry and step.once and entry["command"] != step.command:
                raise UserError(
                    f"{folder} holds a demo with other settings (step {step.name} differs): start over with --fresh,"
                    " or choose another --output_dir"
                )
            if entry and step.once and entry["done"]:
                print(f"    done before, in {entry['seconds']:.0f} s", flush=True)
                continue
            log, prefix = folder / "logs" / f"{number}_{step.name}.log", "    "
            running.append(Running(step, log, prefix + f"{step.name:17}" * (len(group) > 1)))
        for run in running:
            run.wait()
        stopped = False
        for run in running:
            # A training that was asked to stop has saved and reports success: its result tells if it came to its end.
            step = run.step
            done = run.status == 0 and (not step.result or (folder / step.result).is_file())
            stopped |= not done
            print(
                f"    {step.name}: {run.seconds:.0f} s, {run.cpu_seconds:.0f} s of processor time", flush=True
            )
            if step.once:
                entry = next((entry for entry in entries if entry["name"] == step.name), None)
                if entry is None:
                    entry = {"name": step.name, "command": step.command, "group": number}
                    entries.append(entry)
                for name in ("seconds", "cpu_seconds"):  # those of several attempts add up
                    entry[name] = round(entry.get(name, 0.0) + getattr(run, name), 1)
                entry["done"] = done
                write_whole(folder / RECORD, (json.dumps(entries, indent=1) + "\n").encode())
            if run.status:
                print(
                    f"\ndemo: step {step.name} failed with exit status {run.status}; its output is in {run.log}",
                    file=sys.stderr,
                )
        if any(run.status for run in running):
            return 1
        if stopped:
            print("\ndemo: stopped; the same command goes on from here", file=sys.stderr)
            return 130
    print(f"\nThe demo is done. Open {folder / 'report.html'} in a browser.")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status: 0, 1 for a step that failed, 2 for a user error, 130 when stopped."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="demo", description=__doc__, formatter_class=formatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/demo"), help="folder (%(default)s)")
    parser.add_argument(
        "--fresh", action="store_true", help="delete an earlier demo in that folder, start over"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the rooms and of all training (%(default)s)")
    parser.add_argument("--figure", type=Path, help="where the figure goes (OUTPUT_DIR/figure.png)")
    args = parser.parse_args(argv)
    try:
        folder = args.output_dir.resolve()
        output = str(folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder)
        figure = str(args.figure.resolve() if args.figure else f"{output}/figure.png")
        return run_demo(folder, prepare_folder(folder, args.fresh), demo_steps(output, args.seed, figure))
    except (ValueError, OSError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
