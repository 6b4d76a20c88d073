"""The whole path in minutes on two CPU cores: render rooms, pretrain, export, train depth, evaluate, report.

    python tools/demo.py --output_dir runs/demo

Runs the project's own scripts one after another, exactly as they are run by hand, and prints every command:

    1. render     a small RGB-D world of furnished rooms                 tools/render_rooms.py
    2. pretrain   an encoder on the images without depth                 spark/pretrain.py
    3. timm       plain timm loads the exported encoder                  timm.create_model("local-dir:...")
    4. train      UNet++ from scratch and from that encoder, equal budget    finetune/depth.py, twice
    5. evaluate   both on rooms that no training saw                     finetune/evaluate.py, twice
    6. report     OUTPUT_DIR/report.html and OUTPUT_DIR/figure.png       tools/report.py

The output of every step is also in OUTPUT_DIR/logs. A demo that was stopped goes on where it was when the same command
is given again: finished steps are not repeated, a training continues from its checkpoint. `--fresh` starts over; it
deletes the output folder, and only if a demo made it.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RECORD = "steps.json"  # in the output folder: what has been run, and the mark that a demo made the folder

SIZE = (120, 160)  # (H, W) of the rendered images [px]
SCENES, VIEWS, UNLABELED = 100, 3, 240
ENCODER = (
    "test_resnet"  # timm's smallest ResNet, 0.4 million parameters: learns something within minutes on a CPU
)
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
    """

    name: str
    title: str
    arguments: tuple[str, ...]

    @property
    def command(self) -> str:
        """The command line as one would type it."""
        return shlex.join(["python", *self.arguments])


def demo_steps(output: str, seed: int) -> list[Step]:
    """All steps but the report, for an output folder given relative to the repository."""
    rooms, pretrain = f"{output}/rooms", f"{output}/pretrain"
    launch = ("-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1")
    launch += ("--mixed_precision", "no", "--dynamo_backend", "no")

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
                data__workers=1,
                model__head_options="{decoder_channels: [32, 24, 16, 12, 8]}",
                optim__lr="2e-3",
                optim__batch_size=8,
                epochs=25,
                channels_last="true",
                validate_every=5,
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

    return [
        Step(
            "render",
            f"Render {SCENES} rooms with depth and {UNLABELED} images of other rooms without",
            (
                "tools/render_rooms.py",
                *options(output=rooms, scenes=SCENES, views=VIEWS, unlabeled=UNLABELED),
                *("--size", str(SIZE[0]), str(SIZE[1]), "--seed", str(seed)),
            ),
        ),
        Step(
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
                    epochs=30,
                    channels_last="true",
                    log_every=10,
                    checkpoint_every=50,
                    keep_checkpoints=1,
                    panels_every=50,
                    seed=seed,
                    resume="true",
                    output_dir=pretrain,
                ),
            ),
        ),
        Step(
            "timm",
            "Load the exported encoder with plain timm",
            ("-c", TIMM_CHECK.format(encoder=f"{pretrain}/encoder")),
        ),
        Step("train_scratch", "Train UNet++ from scratch", depth("scratch", ENCODER)),
        Step(
            "train_spark", "Train UNet++ from the pretrained encoder", depth("spark", f"{pretrain}/encoder")
        ),
        Step("evaluate_scratch", "Evaluate the one from scratch on unseen rooms", evaluation("scratch")),
        Step("evaluate_spark", "Evaluate the other on the same images", evaluation("spark")),
    ]


def report_step(output: str, figure: str) -> Step:
    """The step that writes the page and the figure."""
    lead = (
        f"A demonstration on rendered rooms: {UNLABELED} images of {SIZE[0]}×{SIZE[1]} to pretrain on, {SCENES} rooms"
        " with exact depth to train and test on, and a few minutes of training. It shows every part at work; what"
        " pretraining is worth is measured on real photos, see docs/results."
    )
    return Step(
        "report",
        "Write the report",
        (
            "tools/report.py",
            *("--pretrain", f"{output}/pretrain"),
            *("--depth", f"scratch={output}/scratch", "--depth", f"SparK={output}/spark"),
            *("--steps", f"{output}/{RECORD}", "--title", "SparK demo", "--lead", lead),
            *("--output", f"{output}/report.html", "--figure", figure),
        ),
    )


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
                    raise ValueError(
                        f"{self.path.parent} holds a demo with other settings (step {step.name} differs):"
                        " start over with --fresh, or choose another --output_dir"
                    )
                return entry
        return None

    def add(self, step: Step, seconds: float, cpu_seconds: float, done: bool) -> None:
        """Add an attempt at a step; the times of several attempts add up."""
        entry = self.find(step)
        if entry is None:
            entry = {
                "name": step.name,
                "command": step.command,
                "seconds": 0.0,
                "cpu_seconds": 0.0,
                "done": False,
            }
            self.entries.append(entry)
        entry["seconds"] = round(entry["seconds"] + seconds, 1)
        entry["cpu_seconds"] = round(entry["cpu_seconds"] + cpu_seconds, 1)
        entry["done"] = done
        self.write()

    def write(self) -> None:
        """Write the file, whole or not at all."""
        part = self.path.with_name(f".{RECORD}.part")
        part.write_text(json.dumps(self.entries, indent=1) + "\n", encoding="utf-8")
        os.replace(part, self.path)


def run_step(step: Step, log: Path) -> tuple[int, float, float]:
    """Run a step in the repository's folder; its output goes to the terminal and into a log.

    Returns:
        Exit status, seconds, and seconds of processor time of it and its children.
    """
    start, before = time.monotonic(), os.times()
    # One buffer less between the step and the terminal, and one UTF-8 whatever the locale is.
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}
    with (
        open(log, "a", encoding="utf-8") as file,
        subprocess.Popen(
            [sys.executable, *step.arguments],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
        ) as process,
    ):
        assert process.stdout is not None
        file.write(f"$ {step.command}\n")
        while True:
            try:
                for line in process.stdout:
                    file.write(line)
                    print(f"    {line}", end="", flush=True)
                break
            except KeyboardInterrupt:  # the step got it too, and saves: let it finish
                print("    stopping ...", flush=True)
        status = process.wait()
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return status, time.monotonic() - start, cpu


def prepare_folder(folder: Path, fresh: bool) -> None:
    """Make the output folder; with `fresh`, without what an earlier demo left in it.

    Raises:
        ValueError: the folder holds something that no demo made; it is not touched.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: --output_dir is a folder")
    if folder.is_dir() and any(folder.iterdir()):
        if not (folder / RECORD).is_file():
            raise ValueError(
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
    steps = demo_steps(output, seed)
    steps.append(report_step(output, str(figure or f"{output}/figure.png")))
    for number, step in enumerate(steps, start=1):
        print(f"\n[{number}/{len(steps)}] {step.title}\n\n  $ {step.command}\n", flush=True)
        found = record.find(step) if step.name != "report" else None
        if found and found["done"]:
            print(f"    done before, in {found['seconds']:.0f} s", flush=True)
            continue
        log = folder / "logs" / f"{number}_{step.name}.log"
        status, seconds, cpu = run_step(step, log)
        # A training that was asked to stop has saved and reports success: its result tells whether it is at its end.
        finished = status == 0 and is_finished(step.name, folder)
        if step.name != "report":
            record.add(step, seconds, cpu, finished)
        if status:
            print(
                f"\ndemo: step {step.name} failed with exit status {status}; its output is in {log}",
                file=sys.stderr,
            )
            return 1
        if not finished:
            print("\ndemo: stopped; the same command goes on from here", file=sys.stderr)
            return 130
        print(f"    {seconds:.0f} s, {cpu:.0f} s of processor time", flush=True)
    total = sum(entry["seconds"] for entry in record.entries)
    print(f"\nThe demo took {total / 60:.1f} minutes. Open {folder / 'report.html'} in a browser.")
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
