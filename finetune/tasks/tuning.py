"""What every training from an encoder has in common: phases, learning rates, validations, best model, early end."""

import hashlib
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from timm.layers.norm_act import convert_sync_batchnorm
from torch import nn
from torch.optim import Optimizer

from finetune.config import TuningConfig
from finetune.scoring.best import Selection
from finetune.tasks.schedule import RunLength, learning_rate, momentum, run_phases
from spark.training.accelerator import reduce_sum, worker_count
from spark.training.log import read_rows
from spark.training.optim import build_optimizer, parameter_groups
from spark.training.recipe import misfit
from spark.training.run import Run
from spark.training.sharding import on_device
from spark.training.task import Rates, Task


class Tuning(Task):
    """Training of a model whose `encoder` was pretrained, or begins at random.

    A task of this kind sets `modules`, `config`, `held_out` and `facts`, and calls `plan`.

    Attributes:
        config: the options; `select` is the metric that tells which validation is the best.
        held_out: what validations are of; None: there are none.
    """

    config: Any
    held_out: Any

    def plan(self, config: TuningConfig, run: Run, samples: int, select: str) -> None:
        """Bring the modules to the device, and settle the phases of the run, for so many samples to train on."""
        if config.sync_bn and run.world > 1 and run.device.type == "cuda":
            # timm's conversion, because torch's drops the activation inside timm's norms
            convert_sync_batchnorm(self.modules)
        self.modules.to(run.device).to(memory_format=run.memory_format)  # type: ignore[call-overload]
        self.num_samples = samples
        self.length: RunLength = run_phases(config, samples)
        self.total_steps = self.length.steps
        warmup = self.length.warmup if config.optim.schedule == "cosine" else 0
        if warning := misfit(config, samples, self.total_steps, warmup, self.unit):
            run.accelerator.print(f"warning: {warning}")
        if self.length.frozen >= self.total_steps:
            run.accelerator.print(
                f"warning: optim.frozen_epochs {config.optim.frozen_epochs:g} are {self.length.frozen} steps and this "
                f"run has {self.total_steps}, so its encoder does not learn at all: lower them, or raise epochs or "
                "max_steps"
            )
        if self.length.frozen and run.accelerator.ddp_handler is not None:
            run.accelerator.ddp_handler.find_unused_parameters = True  # a frozen encoder has no gradients
        self.selection = Selection(select, config.patience)
        self.workers = worker_count(config.data.workers, run.accelerator)  # type: ignore[attr-defined]
        self.device, self.memory_format = run.device, run.memory_format
        self.rank, self.world, self.micro_batch = run.rank, run.world, run.micro_batch

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
        model = self.model_of(self.modules)
        if model.encoder_frozen != (step < self.length.frozen):
            model.freeze_encoder(step < self.length.frozen)

    def model_of(self, modules: nn.Module) -> Any:
        """The model in the trained modules, with `freeze_encoder`, `encoder_frozen` and `save`."""
        return modules

    # --- validation

    @abstractmethod
    def validate(self, run: Run, model: Any, finished: bool = False) -> dict[str, float]:
        """Score the model on what is held out.

        Args:
            run: of the model.
            model: that is scored, on the device of the run.
            finished: write evaluation.json, too; the model is that of model/.

        Returns:
            The metrics.
        """

    @abstractmethod
    def words(self, metrics: dict[str, float]) -> str:
        """Metrics in a few words, for the terminal."""

    @abstractmethod
    def reload(self, folder: Any) -> Any:
        """The model that was written to a folder."""

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
        run.say(f"step {run.step}  {self.words(metrics)}" + "  (best so far)" * better)
        if better and not run.keep_on("best/", lambda: model.save(run.folder / "best")):
            self.selection.scores.pop()
            return
        values = {f"val_{name}": value for name, value in metrics.items()}
        run.keep_on("the validation", lambda: run.log.amend(run.step, **values))

    # --- what it writes

    def export(self, run: Run) -> Any:
        """Write the model."""
        shown = run.whole(averaged=True)
        return None if shown is None else self.model_of(shown).save(run.folder / "model")

    def finish(self, run: Run) -> list[str]:
        """Write the model, and score what was written, so that what reads it gets the same numbers, in fp32."""
        folder = self.export(run)
        if folder is None:
            return []
        if self.held_out is not None:
            written = self.reload(folder).to(self.device)
            metrics = self.validate(run, written, finished=True)
            if run.step not in dict(self.selection.scores):
                self.note(run, written, metrics)
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
