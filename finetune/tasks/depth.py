"""Supervised depth training as a task of the engine: model and losses, pairs, validations, and the model it leaves."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from timm.layers.norm_act import convert_sync_batchnorm
from torch import nn
from torch.optim import Optimizer

from finetune.config import DepthConfig
from finetune.depth_data import MixedSampler, TrainingMix, collate_depth
from finetune.model.depth_model import DepthModel, load_depth_model, start_from
from finetune.model.prediction import transform_of
from finetune.protocols import get_protocol
from finetune.report import depth_page
from finetune.report.figures import save_figure, triptychs
from finetune.scoring.best import Selection
from finetune.scoring.intervals import with_intervals
from finetune.scoring.metrics import summary, write_results
from finetune.scoring.pictures import WorstRows
from finetune.scoring.score import score
from finetune.scoring.sources import check_protocol
from finetune.tasks.build import build_model, build_trained, open_data
from finetune.tasks.schedule import learning_rate, momentum, run_phases
from finetune.tasks.summary import describe
from spark.errors import UserError
from spark.images.loader import load_batches
from spark.training.accelerator import check_memory, reduce_sum, worker_count
from spark.training.log import read_rows
from spark.training.optim import build_optimizer, parameter_groups
from spark.training.recipe import misfit
from spark.training.run import Run
from spark.training.sharding import on_device
from spark.training.task import Rates, StepLoss, Task


class DepthTraining(Task):
    """Training of one depth model on RGB-D pairs.

    Args:
        config: the options.
        run: that trains it.

    Raises:
        UserError: options, data or encoder do not fit; the sentence says what to do.
        OSError: a file cannot be read; likewise.
    """

    unit = "pairs"
    entry = "finetune.depth"

    def __init__(self, config: DepthConfig, run: Run):
        check_memory(run.micro_batch, (3, *config.data.crop_size), run.device)
        self.model, self.encoder_report = build_model(config)
        self.start_report = None
        if config.model.init is not None and run.checkpoint is None:
            self.start_report = start_from(self.model, config.model.init)
        data = replace(config.data, mean=self.model.mean, std=self.model.std)
        self.config = config = replace(config, data=data)
        self.modules = self.trained = build_trained(self.model, config)
        if config.sync_bn and run.world > 1 and run.device.type == "cuda":
            # timm's conversion, because torch's drops the activation inside timm's norms
            convert_sync_batchnorm(self.trained)
        self.trained.to(run.device).to(memory_format=run.memory_format)  # pyright: ignore[reportCallIssue]

        self.protocol = get_protocol(config.protocol, flip_average=config.flip_average)
        check_protocol(self.model, self.protocol)
        self.pairs, self.held_out = open_data(config, self.protocol)
        self.trained.criterion.check(self.pairs.entries(), [one.data for one in self.pairs.sets])
        self.num_samples = len(self.pairs)
        self.terms = tuple(config.losses)
        self.length = run_phases(config, len(self.pairs))
        self.total_steps = self.length.steps
        warmup = self.length.warmup if config.optim.schedule == "cosine" else 0
        if warning := misfit(config, len(self.pairs), self.total_steps, warmup, self.unit):
            run.accelerator.print(f"warning: {warning}")
        if self.length.frozen >= self.total_steps:
            run.accelerator.print(
                f"warning: optim.frozen_epochs {config.optim.frozen_epochs:g} are {self.length.frozen} steps and this "
                f"run has {self.total_steps}, so its encoder does not learn at all: lower them, or raise epochs or "
                "max_steps"
            )
        if self.length.frozen and run.accelerator.ddp_handler is not None:
            run.accelerator.ddp_handler.find_unused_parameters = True  # a frozen encoder has no gradients
        self.facts = {"pairs": fingerprint(self.pairs)}
        self.idle_reason = (
            f"they had no pixel with a ground truth between {config.model.min_depth:g} and "
            f"{config.model.max_depth:g} m (model.min_depth, model.max_depth)"
        )
        self.selection = Selection(config.select, config.patience)
        self.workers = worker_count(config.data.workers, run.accelerator)
        self.device, self.memory_format = run.device, run.memory_format
        self.rank, self.world, self.micro_batch = run.rank, run.world, run.micro_batch
        self._skipped_before = False

    # --- what is trained

    def optimizer(self) -> Optimizer:
        """See `Task`."""
        optim = self.config.optim
        groups = parameter_groups(
            self.trained,
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

    def loss(self, model: nn.Module, batch: dict[str, Any]) -> StepLoss:
        """See `Task`."""
        images = batch["image"].to(self.device, non_blocking=True, memory_format=self.memory_format)
        wanted = self.trained.criterion.entries & batch.keys()
        targets = {name: batch[name].to(self.device, non_blocking=True) for name in wanted - {"image"}}
        loss, terms = model({**targets, "image": images})
        return StepLoss(loss, terms, learns=bool(terms))

    # --- where its batches come from

    def batches(self, start: int, stop: int) -> Iterator[dict[str, Any]]:
        """See `Task`."""
        sampler = MixedSampler(
            self.pairs, self.micro_batch, rank=self.rank, world_size=self.world, start=start, stop=stop
        )
        options = {"batch_sampler": sampler, "collate_fn": collate_depth}
        return load_batches(self.pairs, self.workers, self.device, **options)

    def changes(self, before: Mapping[str, Any]) -> list[str]:
        """See `Task`; older checkpoints lack "pairs"."""
        now = self.facts["pairs"]
        if before.get("pairs", now) == now:
            return []
        return [
            f"the pairs to train on, {before['pairs']['count']} then and {now['count']} now, or their names or order;"
            " the run goes on with those of now, no longer the run it was"
        ]

    def check(self, run: Run, idle: int) -> None:
        """Refuse to go on once too large a share of the run's micro-batches had no ground truth."""
        share, planned = self.config.data.max_empty, self.total_steps * self.config.accumulation * self.world
        if idle > share * planned:
            raise UserError(
                f"{idle} micro-batches taught nothing, more than the accepted share of {share:g} of the {planned} of"
                f" the run: {self.idle_reason}. Check the depth files and model.max_depth, enlarge batch or crop, or"
                " raise data.max_empty"
            )

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
                self.note(run, shown.model, self.validate(run, shown.model))

    def ended(self, run: Run) -> bool:
        """Whether validations have stopped to improve."""
        if self.config.patience is None:
            return False
        return reduce_sum(run.accelerator, [float(run.main and self.selection.exhausted)])[0] > 0

    def validate(self, run: Run, model: DepthModel, finished: bool = False) -> dict[str, float]:
        """Score the model on the held-out pairs, and draw some of them.

        Args:
            run: of the model.
            model: that is scored, on the device of the run.
            finished: write evaluation.json, too; the model is that of model/.

        Returns:
            The metrics.
        """
        assert self.held_out is not None
        worst = WorstRows(self.config.triptychs if finished else 0)
        results, rows = score(
            model,
            self.held_out,
            self.protocol,
            transform_of(model),
            workers=self.workers,
            draw=self.config.triptychs,
            worst=worst,
        )
        if results["skipped"] and not self._skipped_before:
            self._skipped_before = True  # they are the same each time
            run.say(
                f"{len(results['skipped'])} of {len(self.held_out)} images to validate on have no pixel that counts and"
                f" are left out, the first is {results['skipped'][0]}"
            )
        metrics = results["metrics"]
        title = f"step {run.step}   {self.protocol.name}   {results['images']} images   {summary(metrics)}"
        for name, drawn, heading in (
            ("triptychs", rows, title),
            ("worst", worst.rows, f"worst AbsRel   {title}"),
        ):
            try:
                if drawn:
                    picture = run.folder / "figures" / f"{name}_step_{run.step:07d}.png"
                    save_figure(triptychs(drawn, heading), picture)
            except OSError as error:  # pictures are no reason to stop
                run.say(f"no {name} of step {run.step}, the run goes on: {error}")
        if finished:
            about = {"model": str(run.folder / "model"), "model_sha256": model.sha256}
            about |= {"data": repr(self.held_out), "step": run.step, **self.held_out.reading()}
            write_results(run.folder / "evaluation.json", {**with_intervals(results), **about})
        return metrics

    def note(self, run: Run, model: DepthModel, metrics: dict[str, float]) -> None:
        """Add a validation to the row of the step, and keep the model in best/ if it is the best so far.

        One whose model cannot be kept does not count: best/ is always that of the best validation in the rows.
        """
        better = self.selection.add(run.step, metrics)
        run.say(f"step {run.step}  {self.protocol.name}  {summary(metrics)}" + "  (best so far)" * better)
        if better and not run.keep_on("best/", lambda: model.save(run.folder / "best")):
            self.selection.scores.pop()
            return
        values = {f"val_{name}": value for name, value in metrics.items()}
        run.keep_on("the validation", lambda: run.log.amend(run.step, **values))

    # --- what it says and writes

    def columns(self, run: Run, batch: dict[str, Any]) -> dict[str, float | str]:
        """See `Task`."""
        seen = (run.step + run.state.offset) * self.config.optim.batch_size
        return {"epoch": seen / len(self.pairs), "empty_batches": run.state.idle}

    def export(self, run: Run) -> Path | None:
        """Write the model."""
        shown = run.whole(averaged=True)
        return None if shown is None else shown.model.save(run.folder / "model")

    def finish(self, run: Run) -> list[str]:
        """Write the model, and score what was written, so that spark-evaluate reports the same numbers, in fp32."""
        folder = self.export(run)
        if folder is None:
            return []
        if self.held_out is not None:
            written = load_depth_model(folder, self.config.own_encoder()).to(self.device)
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
                f"the best validation ({self.config.select} {best[1]:.3f}, step {best[0]}) is that of "
                f"{run.folder / 'best'}"
            )
        return words

    def report(self, run: Run) -> Path:
        """See `Task`."""
        return depth_page(run.folder)

    def summary(self, run: Run) -> str:
        """See `Task`."""
        return describe(
            self.config,
            self.trained,
            self.encoder_report,
            self.start_report,
            self.pairs,
            self.held_out,
            self.length,
            run,
        )


def fingerprint(pairs: TrainingMix) -> dict[str, Any]:
    """How many pairs, and a digest of their names in order: what a stream of pairs depends on beside the seed."""
    digest = hashlib.sha256("\n".join(pairs.names()).encode("utf-8", "surrogateescape")).hexdigest()
    return {"count": len(pairs), "sha256": digest}
