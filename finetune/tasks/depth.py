"""Supervised depth training as a task of the engine: model and losses, pairs, validations, and the model it leaves."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from finetune.config import DepthConfig
from finetune.depth_data import MixedSampler, collate_depth
from finetune.model.depth_model import DepthModel, load_depth_model, start_from
from finetune.model.prediction import transform_of
from finetune.protocols import get_protocol
from finetune.report import depth_page
from finetune.report.figures import save_figure, triptychs
from finetune.scoring.intervals import with_intervals
from finetune.scoring.metrics import summary, write_results
from finetune.scoring.pictures import WorstRows
from finetune.scoring.score import score
from finetune.scoring.sources import check_protocol
from finetune.tasks.build import build_model, build_trained, open_data
from finetune.tasks.summary import describe
from finetune.tasks.tuning import Tuning, fingerprint
from spark.errors import UserError
from spark.images.loader import load_batches
from spark.training.accelerator import check_memory
from spark.training.run import Run
from spark.training.task import StepLoss


class DepthTraining(Tuning):
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
        self.protocol = get_protocol(config.protocol, flip_average=config.flip_average)
        check_protocol(self.model, self.protocol)
        self.pairs, self.held_out = open_data(config, self.protocol)
        self.trained.criterion.check(self.pairs.entries(), [one.data for one in self.pairs.sets])
        self.terms = tuple(config.losses)
        self.plan(config, run, len(self.pairs), config.select)
        self.facts = {"pairs": fingerprint(self.pairs.names())}
        self.idle_reason = (
            f"they had no pixel with a ground truth between {config.model.min_depth:g} and "
            f"{config.model.max_depth:g} m (model.min_depth, model.max_depth)"
        )
        self._skipped_before = False

    # --- what is trained

    def model_of(self, modules: nn.Module) -> DepthModel:
        """The depth model without what losses train beside it."""
        return modules.model  # pyright: ignore[reportReturnType, reportAttributeAccessIssue]

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

    def validate(self, run: Run, model: DepthModel, finished: bool = False) -> dict[str, float]:
        """See `Tuning`; draws some of the pairs, too."""
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

    def words(self, metrics: dict[str, float]) -> str:
        """Protocol and metrics."""
        return f"{self.protocol.name}  {summary(metrics)}"

    def reload(self, folder: Path) -> DepthModel:
        """The depth model in a folder."""
        return load_depth_model(folder, self.config.own_encoder())

    # --- what it says and writes

    def columns(self, run: Run, batch: dict[str, Any]) -> dict[str, float | str]:
        """See `Task`."""
        seen = (run.step + run.state.offset) * self.config.optim.batch_size
        return {"epoch": seen / len(self.pairs), "empty_batches": run.state.idle}

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
