"""What all training on an encoder shares: rates, frozen epochs, validations, the best model, the last one."""

import hashlib
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from timm.layers.norm_act import convert_sync_batchnorm
from torch import nn
from torch.optim import Optimizer

from finetune.config import TransferConfig
from finetune.model.encoder_model import EncoderModel
from finetune.scoring.best import Selection
from finetune.tasks.schedule import learning_rate, momentum, run_phases
from spark.training.accelerator import reduce_sum, worker_count
from spark.training.log import read_rows
from spark.training.optim import build_optimizer, parameter_groups
from spark.training.run import Run
from spark.training.sharding import on_device
from spark.training.task import Rates, Task


class Transfer(Task):
    """Training of one model on an encoder.

    A subclass makes `model` and `held_out`, calls `place` and `plan`, and says how the model is validated, saved and
    read again.

    Attributes:
        model: that is trained, `modules` itself or a part of it.
        held_out: what validations are made on, None for no validation.
        scored_as: what lines about validations begin with.
    """

    model: Any  # an EncoderModel
    held_out: Any
    scored_as: str
    config: Any

    # --- parts of a constructor

    def place(self, modules: nn.Module, run: Run) -> None:
        """Bring what is trained to the device of the run."""
        config: TransferConfig = self.config
        self.modules = modules
        if config.sync_bn and run.world > 1 and run.device.type == "cuda":
            # timm's conversion, because torch's drops the activation inside timm's norms
            convert_sync_batchnorm(modules)
        modules.to(run.device).to(memory_format=run.memory_format)  # pyright: ignore[reportCallIssue]

    def plan(self, samples: int, run: Run, select: str) -> None:
        """Take the phases of a run over so many samples, whose best validation is told by the metric `select`."""
        config: TransferConfig = self.config
        self.num_samples = samples
        self.length = run_phases(config, samples)
        self.total_steps = self.length.steps
        if self.length.frozen >= self.total_steps:
            run.accelerator.print(
                f"warning: optim.frozen_epochs {config.optim.frozen_epochs:g} are {self.length.frozen} steps and this "
                f"run has {self.total_steps}, so its encoder does not learn at all: lower them, or raise epochs or "
                "max_steps"
            )
        if self.length.frozen and run.accelerator.ddp_handler is not None:
            run.accelerator.ddp_handler.find_unused_parameters = True  # a frozen encoder has no gradients
        self.selection = Selection(select, config.patience)
        self.workers = worker_count(self.config.data.workers, run.accelerator)
        self.device, self.memory_format = run.device, run.memory_format
        self.rank, self.world, self.micro_batch = run.rank, run.world, run.micro_batch

    # --- what a subclass says

    def model_of(self, whole: Any) -> EncoderModel:
        """The model in whole `modules`, or in their average."""
        return whole

    @abstractmethod
    def validate(self, run: Run, model: Any, finished: bool = False) -> dict[str, float]:
        """Score a model on `held_out`.

        Args:
            run: of the model.
            model: that is scored, on the device of the run.
            finished: write evaluation.json, too; the model is what `written` has read.

        Returns:
            The metrics.
        """

    @abstractmethod
    def headline(self, metrics: Mapping[str, float]) -> str:
        """The numbers that the field quotes, in one line."""

    @abstractmethod
    def save(self, model: Any, folder: Path) -> Path:
        """Write a model into a folder, whole or not at all."""

    @abstractmethod
    def written(self, folder: Path) -> nn.Module:
        """The model that `save` wrote."""

    # --- what is trained

    def optimizer(self) -> Optimizer:
        """See `Task`."""
        optim = self.config.optim
        groups = parameter_groups(
            self.modules,
            optim.weight_decay,
            layer_decay=optim.layer_decay,
            encoder_lr_factor=optim.encoder_lr_factor,
        )
        return build_optimizer(optim.name, groups, optim.lr, optim.betas, optim.eps)

    def rates(self, step: int) -> Rates:
        """See `Task`."""
        return Rates(
            learning_rate(self.config, self.length, step),
            self.config.optim.weight_decay,
            momentum(self.config, self.length, step),
        )

    def before_step(self, step: int) -> None:
        """See `Task`; freezes the encoder, or lets it learn."""
        if self.model.encoder_frozen != (step < self.length.frozen):
            self.model.freeze_encoder(step < self.length.frozen)

    # --- validation

    def saves_after(self, step: int) -> bool:
        """See `Task`: validations are of saved states."""
        return self.held_out is not None and self.length.validates_after(step)

    def started(self, run: Run) -> None:
        """See `Task`."""
        self.selection.read(read_rows(run.log.path) if run.main else [])

    def make_up(self, run: Run) -> None:
        """Validate the state of the checkpoint if an interruption has come before: best/ and patience depend on it."""
        if not 0 < run.step < self.total_steps or not self.saves_after(run.step):
            return
        known = run.main and run.step in dict(self.selection.scores)
        if not reduce_sum(run.accelerator, [float(known)])[0]:  # only the main process has read the rows
            self.after_step(run)

    def after_step(self, run: Run) -> None:
        """Validate where it is time to; the last step's validation is that of `finish`."""
        if not run.writers or run.step == self.total_steps or not self.saves_after(run.step):
            return
        shown = run.whole(averaged=True)
        if run.main:
            with on_device(shown, self.device):
                model = self.model_of(shown)
                self.note(run, model, self.validate(run, model))

    def ended(self, run: Run) -> bool:
        """Whether validations have stopped to improve."""
        if self.config.patience is None:
            return False
        return reduce_sum(run.accelerator, [float(run.main and self.selection.exhausted)])[0] > 0

    def note(self, run: Run, model: Any, metrics: dict[str, float]) -> None:
        """Add a validation to the row of the step, and keep the model in best/ if it is the best so far.

        One whose model cannot be kept does not count: best/ is always that of the best validation in the rows.
        """
        better = self.selection.add(run.step, metrics)
        run.say(f"step {run.step}  {self.scored_as}  {self.headline(metrics)}" + "  (best so far)" * better)
        if better and not run.keep_on("best/", lambda: self.save(model, run.folder / "best")):
            self.selection.scores.pop()
            return
        values = {f"val_{name}": value for name, value in metrics.items()}
        run.keep_on("the validation", lambda: run.log.amend(run.step, **values))

    # --- what it says and writes

    def columns(self, run: Run, batch: dict[str, Any]) -> dict[str, float | str]:
        """See `Task`."""
        seen = (run.step + run.state.offset) * self.config.optim.batch_size
        return {"epoch": seen / self.num_samples}

    def export(self, run: Run) -> Path | None:
        """Write the model."""
        shown = run.whole(averaged=True)
        return None if shown is None else self.save(self.model_of(shown), run.folder / "model")

    def finish(self, run: Run) -> list[str]:
        """Write the model, and score what was written, so that whoever reads it gets the same numbers, in fp32."""
        shown = run.whole(averaged=True)
        if shown is None:
            return []
        model = self.model_of(shown)
        folder = self.save(model, run.folder / "model")
        if self.held_out is not None:
            metrics = self.validate(run, self.written(folder).to(self.device), finished=True)
            if run.step not in dict(self.selection.scores):
                self.note(run, model, metrics)
        words = []
        if run.step < self.total_steps:
            words.append(
                f"ended early: the last {self.config.patience} validations were no better; to go on, resume with a "
                "larger --patience"
            )
        words.append(f"done after step {run.step}: the model is in {folder}")
        if (best := self.selection.best) is not None:
            words.append(
                f"the best validation ({self.selection.metric} {best[1]:.3f}, step {best[0]}) is that of "
                f"{run.folder / 'best'}"
            )
        return words


def fingerprint(names: Sequence[str]) -> dict[str, Any]:
    """How many samples, and a digest of their names in order: what a stream depends on beside the seed."""
    digest = hashlib.sha256("\n".join(names).encode("utf-8", "surrogateescape")).hexdigest()
    return {"count": len(names), "sha256": digest}
