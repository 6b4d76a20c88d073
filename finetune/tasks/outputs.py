"""What the main process of a depth run writes: checkpoints, models, scores and triptychs."""

from collections.abc import Callable
from pathlib import Path

import torch

from finetune.config import DepthConfig
from finetune.depth_data import DepthSet
from finetune.model.depth_model import load_depth_model
from finetune.protocols import Protocol
from finetune.report import depth_page
from finetune.report.figures import WorstRows, save_figure, triptychs
from finetune.scoring.best import Selection
from finetune.scoring.intervals import with_intervals
from finetune.scoring.metrics import write_results
from finetune.scoring.score import score, summary, transform_of
from finetune.tasks.state import RunState


class Outputs:
    """Writes into the folder of a run; main process only.

    Args:
        config: Of the run.
        state: Of the run.
        selection: Which validation is the best.
        protocol: What validations count and how.
        held_out: Pairs to validate on; None: there are none.
        device: That the run computes on.
        workers: Processes that read pairs.
        say: Prints a line.

    Attributes:
        exported_step: Step whose model is in model/, -1 for none; of a resumed run it counts from its beginning.
    """

    def __init__(
        self,
        config: DepthConfig,
        state: RunState,
        selection: Selection,
        protocol: Protocol,
        held_out: DepthSet | None,
        device: torch.device,
        workers: int,
        say: Callable[[str], None],
    ):
        self.config = config
        self.state = state
        self.selection = selection
        self.protocol = protocol
        self.held_out = held_out
        self.device = device
        self.workers = workers
        self.say = say
        self.folder = Path(config.output_dir)
        self.exported_step = -1
        self._told_skipped = False

    def save(self) -> Path:
        """Write a checkpoint.

        Raises:
            OSError: Disk full, or not writable.
        """
        return self.state.save(self.folder, self.config.keep_checkpoints)

    def rescue(self) -> Path | None:
        """Write the state before the step under way, unless it is spoilt already."""
        return self.state.rescue(self.folder, self.config.keep_checkpoints)

    def export(self) -> None:
        """Write the model as it is.

        Raises:
            ValueError, OSError: It could not be written.
        """
        self.state.shown.save(self.folder / "model")
        self.exported_step = self.state.step

    def export_on_request(self) -> None:
        """Write the model as it is, which the run itself does not need yet: a failure is told, and the run goes on."""
        try:
            self.export()
            self.say(f"model after step {self.state.step} written to {self.folder / 'model'}")
        except (ValueError, OSError) as error:
            self.say(f"the model was not written, the run goes on: {error}")

    def validate(self, finished: bool) -> dict[str, float]:
        """Score and draw the model as it is.

        At the end of the run it is the exported model that is scored, so that evaluate.py reports the same numbers: in
        fp32, where the validations before it run in the precision of the training.

        Args:
            finished: It is the end of the run, which writes evaluation.json too.

        Returns:
            The metrics.

        Raises:
            ValueError: A pair cannot be read, or no image has a valid pixel.
            OSError: evaluation.json could not be written.
        """
        assert self.held_out is not None
        step = self.state.step
        scored = self.state.shown
        if finished:
            scored = load_depth_model(self.folder / "model", self.config.own_encoder()).to(self.device)
        worst = WorstRows(self.config.triptychs if finished else 0)
        results, rows = score(
            scored,
            self.held_out,
            self.protocol,
            transform_of(self.state.model),
            workers=self.workers,
            draw=self.config.triptychs,
            worst=worst,
        )
        if results["skipped"] and not self._told_skipped:
            self._told_skipped = True  # they are the same each time
            self.say(
                f"{len(results['skipped'])} of {len(self.held_out)} images to validate on have no pixel that counts and"
                f" are left out, the first is {results['skipped'][0]}"
            )
        title = (
            f"step {step}   {self.protocol.name}   {results['images']} images   {summary(results['metrics'])}"
        )
        for name, drawn, heading in (
            ("triptychs", rows, title),
            ("worst", worst.rows, f"worst AbsRel   {title}"),
        ):
            if not drawn:
                continue
            try:
                save_figure(
                    triptychs(drawn, heading), self.folder / "figures" / f"{name}_step_{step:07d}.png"
                )
            except OSError as error:  # pictures are no reason to stop
                self.say(f"no {name} of step {step}, the run goes on: {error}")
        if finished:
            about = {"model": str(self.folder / "model"), "model_sha256": scored.sha256}
            about |= {"data": repr(self.held_out), "step": step}
            about |= self.held_out.reading()
            write_results(self.folder / "evaluation.json", {**with_intervals(results), **about})
        return results["metrics"]

    def report(self) -> None:
        """Write report.html; where the disk refuses, that is told, and finetune/commands/report.py can do it later."""
        try:
            depth_page(self.folder)
        except (ValueError, OSError) as error:
            self.say(f"report.html was not written: {error}")

    def note(self, metrics: dict[str, float]) -> dict[str, float]:
        """Keep the model if this validation is the best so far; its part of a row.

        Raises:
            ValueError, OSError: The model could not be written.
        """
        better = self.selection.add(self.state.step, metrics)
        if better:
            self.state.shown.save(self.folder / "best")
        self.say(
            f"step {self.state.step}  {self.protocol.name}  {summary(metrics)}" + "  (best so far)" * better
        )
        return {f"val_{name}": value for name, value in metrics.items()}
