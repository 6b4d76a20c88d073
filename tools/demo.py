"""The whole path in minutes on two CPU cores: render rooms, pretrain, export, train depth, evaluate, report.

    python tools/demo.py --output_dir runs/demo

Runs the project's own scripts, exactly as they are run by hand, and prints every command:

    1. render     a small RGB-D world of furnished rooms                 tools/render_rooms.py
    2. pretrain   an encoder on the images without depth                 spark/pretrain.py
    3. timm       plain timm loads the exported encoder                  timm.create_model("local-dir:...")
    4. train      UNet++ from scratch and from that encoder, alike       finetune/depth.py, twice
    5. evaluate   both on rooms that no training saw                     finetune/evaluate.py, twice
    6. report     OUTPUT_DIR/report.html                                finetune/commands/report.py
    7. figure     OUTPUT_DIR/figure.png                                 tools/demo_figure.py

The two trainings run side by side on half of the cores each, and so do the two evaluations. The output of every step is
also in OUTPUT_DIR/logs. A demo that was stopped goes on where it was when the same command is given again: finished
steps are not repeated, a training continues from its checkpoint. `--fresh` starts over; it deletes the output folder,
and only if a demo made it.
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
from dataclasses import dataclass
from pathlib import Path

from spark.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
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


@dataclass(frozen=True)
class Step:
    """A command of the demo.

    Args:
        name: what it is called, in the log's file name too.
        title: a sentence about it.
        arguments: of the Python that runs the demo.
        threads: how many it computes with; None leaves it to the libraries.
    """

    name: str
    title: str
    arguments: tuple[str, ...]
    threads: int | None = None

    @property
    def command(self) -> str:
        """The command line as one would type it."""
        threads = f"OMP_NUM_THREADS={self.threads} " if self.threads else ""
        return threads + shlex.join(["python", *self.arguments])


def demo_steps(output: str, seed: int) -> list[list[Step]]:
    """All steps but page and figure, for an output folder relative to the repository; those of a list run together."""
    rooms, pretrain = f"{output}/rooms", f"{output}/pretrain"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    half = max(1, cores // 2)
    launch = ("-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1")
    launch += ("--mixed_precision", "no", "--dynamo_backend", "no")
    launch += ("--num_cpu_threads_per_process", str(cores))

    def options(**values: object) -> tuple[str, ...]:
        pairs = ((f"--{name.replace('__', '.')}", str(value)) for name, value in values.items())
        return tuple(text for pair in pairs for text in pair)

    def depth(name: str, encoder: str) -> tuple[str, ...]:
        return (
            "finetune/depth.py",
            *options(
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
            ),
        )

    def evaluation(name: str) -> tuple[str, ...]:
        data = options(data__root=rooms, data__list="test.txt", protocol=PROTOCOL)
        run = f"{output}/{name}"
        return ("finetune/evaluate.py", "--model", f"{run}/model", *data, "--output", f"{run}/results.json")

    render = Step(
        "render",
        f"Render {SCENES} rooms with depth and {UNLABELED} images of other rooms without",
        (
            "tools/render_rooms.py",
            *options(output=rooms, scenes=SCENES, views=VIEWS, unlabeled=UNLABELED),
            *("--size", str(SIZE[0]), str(SIZE[1]), "--seed", str(seed)),
        ),
    )
    pretraining = Step(
        "pretrain",
        f"Pretrain {ENCODER} on the images without depth",
        (
            *launch,
            "spark/pretrain.py",
            *options(
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
            ),
        ),
    )
    check = TIMM_CHECK.format(encoder=f"{pretrain}/encoder")
    return [
        [render],
        [pretraining],
        [Step("timm", "Load the exported encoder with plain timm", ("-c", check))],
        [
            Step("train_scratch", "Train UNet++ from scratch", depth("scratch", ENCODER), half),
            Step("train_spark", "Train it from that encoder", depth("spark", f"{pretrain}/encoder"), half),
        ],
        [
            Step("evaluate_scratch", "Evaluate on unseen rooms: from scratch", evaluation("scratch"), half),
            Step("evaluate_spark", "and from the pretrained encoder", evaluation("spark"), half),
        ],
    ]


def report_step(output: str) -> Step:
    """The step that writes the page."""
    lead = (
        f"A demonstration on rendered rooms: {UNLABELED} images of {SIZE[0]}×{SIZE[1]} to pretrain on, {SCENES} rooms"
        " with exact depth to train and test on, and a few minutes of training. It shows every part at work; what"
        " pretraining is worth is measured on real photos, see docs/results."
    )
    return Step(
        "report",
        "Write the report",
        (
            "finetune/commands/report.py",
            *(f"scratch={output}/scratch", f"SparK={output}/spark", f"pretraining={output}/pretrain"),
            *("--steps", f"{output}/{RECORD}", "--title", "SparK demo", "--lead", lead),
            *("--output", f"{output}/report.html"),
        ),
    )


def figure_step(output: str, figure: str) -> Step:
    """The step that draws the figure."""
    depth = ("--depth", f"scratch={output}/scratch", "--depth", f"SparK={output}/spark")
    arguments = ("tools/demo_figure.py", "--pretrain", f"{output}/pretrain", *depth, "--output", figure)
    return Step("figure", "Draw the figure", arguments)


class Record:
    """What has been run, in OUTPUT_DIR/steps.json: survives interruptions, and goes into the report.

    Args:
        folder: output folder of the demo.
    """

    def __init__(self, folder: Path):
        self.path = folder / RECORD
        self.entries: list[dict] = (
            json.loads(self.path.read_text(encoding="utf-8")) if self.path.exists() else []
        )

    def find(self, step: Step) -> dict | None:
        """The entry of a step.

        Raises:
            ValueError: the step was run with another command before.
        """
        for entry in self.entries:
            if entry["name"] == step.name:
                if entry["command"] != step.command:
                    raise UserError(
                        f"{self.path.parent} holds a demo with other settings (step {step.name} differs):"
                        " start over with --fresh, or choose another --output_dir"
                    )
                return entry
        return None

    def add(self, step: Step, group: int, outcome: "Outcome", done: bool) -> None:
        """Add an attempt at a step; the times of several attempts add up. Steps of one group ran side by side."""
        entry = self.find(step)
        if entry is None:
            entry = {
                "name": step.name,
                "command": step.command,
                "group": group,
                "seconds": 0.0,
                "cpu_seconds": 0.0,
            }
            self.entries.append(entry)
        entry["seconds"] = round(entry["seconds"] + outcome.seconds, 1)
        entry["cpu_seconds"] = round(entry["cpu_seconds"] + outcome.cpu_seconds, 1)
        entry["done"] = done
        self.write()

    @property
    def seconds(self) -> float:
        """How long all of it took."""
        groups: dict[int, float] = {}
        for entry in self.entries:
            groups[entry["group"]] = max(groups.get(entry["group"], 0.0), entry["seconds"])
        return sum(groups.values())

    def write(self) -> None:
        """Write the file, whole or not at all."""
        part = self.path.with_name(f".{RECORD}.part")
        part.write_text(json.dumps(self.entries, indent=1) + "\n", encoding="utf-8")
        os.replace(part, self.path)


@dataclass(frozen=True)
class Outcome:
    """How a command ended.

    Args:
        status: exit status.
        seconds: how long it took.
        cpu_seconds: processor time of it and its children.
    """

    status: int
    seconds: float
    cpu_seconds: float


class Running:
    """A step under way, in the repository's folder; its output goes to the terminal and into a log.

    Args:
        step: what to run.
        log: file to append the output to.
        prefix: what its lines begin with on the terminal.
    """

    def __init__(self, step: Step, log: Path, prefix: str):
        self.log, self.prefix, self.start = log, prefix, time.monotonic()
        # No buffer between the step and the terminal, and UTF-8 whatever the locale is.
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
        self.outcome: Outcome | None = None
        self.thread = threading.Thread(target=self._follow, args=(step.command,))
        self.thread.start()

    def _follow(self, command: str) -> None:
        """Copy the output to its end, then take the outcome."""
        assert self.process.stdout is not None
        with open(self.log, "a", encoding="utf-8") as file, self.process.stdout as lines:
            file.write(f"$ {command}\n")
            for line in lines:
                file.write(line)
                print(f"{self.prefix}{line}", end="", flush=True)
        _, status, usage = os.wait4(self.process.pid, 0)
        self.process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.monotonic() - self.start
        self.outcome = Outcome(self.process.returncode, seconds, usage.ru_utime + usage.ru_stime)

    def wait(self) -> Outcome:
        """Wait for its end. Ctrl-C reaches the step too, which saves its state: it is given the time to."""
        while self.thread.is_alive():
            try:
                self.thread.join()
            except KeyboardInterrupt:
                print(f"{self.prefix}stopping ...", flush=True)
        assert self.outcome is not None
        return self.outcome


def prepare_folder(folder: Path, fresh: bool) -> None:
    """Make the output folder; with `fresh`, without what an earlier demo left in it.

    Raises:
        ValueError: the folder holds something that no demo made; it is not touched.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: --output_dir is a folder")
    if folder.is_dir() and any(folder.iterdir()):
        if not (folder / RECORD).is_file():
            raise UserError(
                f"{folder} is not empty and holds no demo ({RECORD}): choose another --output_dir"
            )
        if fresh:
            shutil.rmtree(folder)
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    if not (folder / RECORD).exists():
        Record(folder).write()


def run_demo(folder: Path, seed: int, figure: Path | None) -> int:
    """Run what is missing of the demo; returns the exit status."""
    record = Record(folder)
    output = os.path.relpath(folder, ROOT)
    if output.startswith(os.pardir):
        output = str(folder)
    pages = [[report_step(output)], [figure_step(output, str(figure or f"{output}/figure.png"))]]
    groups = [*demo_steps(output, seed), *pages]
    for number, group in enumerate(groups, start=1):
        missing = []
        for step in group:
            print(f"\n[{number}/{len(groups)}] {step.title}\n\n  $ {step.command}\n", flush=True)
            found = record.find(step) if step.name not in ("report", "figure") else None
            if found and found["done"]:
                print(f"    done before, in {found['seconds']:.0f} s", flush=True)
            else:
                missing.append(step)
        logs = {step.name: folder / "logs" / f"{number}_{step.name}.log" for step in missing}
        prefixes = {step.name: f"    {step.name:17}" if len(group) > 1 else "    " for step in missing}
        running = [(step, Running(step, logs[step.name], prefixes[step.name])) for step in missing]
        outcomes = [(step, process.wait()) for step, process in running]
        stopped = False
        for step, outcome in outcomes:
            # A training that was asked to stop has saved and reports success: its result tells if it came to its end.
            finished = outcome.status == 0 and is_finished(step.name, folder)
            stopped |= not finished
            if step.name not in ("report", "figure"):
                record.add(step, number, outcome, finished)
            print(
                f"    {step.name}: {outcome.seconds:.0f} s, {outcome.cpu_seconds:.0f} s of processor time",
                flush=True,
            )
        for step, outcome in outcomes:
            if outcome.status:
                print(
                    f"\ndemo: step {step.name} failed with exit status {outcome.status}; its output is in"
                    f" {logs[step.name]}",
                    file=sys.stderr,
                )
                return 1
        if stopped:
            print("\ndemo: stopped; the same command goes on from here", file=sys.stderr)
            return 130
    print(f"\nThe demo took {record.seconds / 60:.1f} minutes. Open {folder / 'report.html'} in a browser.")
    return 0


def is_finished(name: str, folder: Path) -> bool:
    """Whether a step that ended without error left its result."""
    results = {
        "render": "rooms/test.txt",
        "pretrain": "pretrain/encoder/model.safetensors",
        "train_scratch": "scratch/evaluation.json",
        "train_spark": "spark/evaluation.json",
        "evaluate_scratch": "scratch/results.json",
        "evaluate_spark": "spark/results.json",
        "report": "report.html",
    }
    return name not in results or (folder / results[name]).is_file()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status: 0, 1 for a step that failed, 2 for a user error, 130 when stopped."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output_dir", type=Path, default=Path("runs/demo"), help="folder (%(default)s)")
    parser.add_argument(
        "--fresh", action="store_true", help="delete an earlier demo in that folder and start over"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the rooms and of all training (%(default)s)")
    parser.add_argument("--figure", type=Path, help="where the figure goes (OUTPUT_DIR/figure.png)")
    args = parser.parse_args(argv)
    try:
        folder = args.output_dir.resolve()
        prepare_folder(folder, args.fresh)
        return run_demo(folder, args.seed, args.figure.resolve() if args.figure else None)
    except (ValueError, OSError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
