"""SparK pretraining as a task of the engine: the model, batches of masked images, the loss, the encoder."""

import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from spark.config import ModelConfig, PretrainConfig, SparKConfig
from spark.errors import UserError
from spark.images.batches import MaskedBatches, StepPlan
from spark.images.dataset import SampleReader
from spark.images.loader import open_loader
from spark.images.transform import PretrainTransform
from spark.model.masking import check_masks, mean_ratio, num_visible, ratio_range, visible_at
from spark.model.normalise import Normalise
from spark.model.spark import SparK, norm_kind
from spark.monitor.panels import panels_path, reconstruction_panels, save_panels
from spark.monitor.watch import Watch, build_monitor, fixed_batch
from spark.report import pretraining_page
from spark.seeds import Purpose, derive_seed
from spark.sparse.batch_norm import in_recomputation
from spark.sparse.choice import AUTO, Choice, is_available
from spark.start import start_from
from spark.training.accelerator import check_memory, reduce_sum
from spark.training.optim import build_optimizer, lr_at, parameter_groups, weight_decay_at
from spark.training.option_types import values_of
from spark.training.recipe import misfit
from spark.training.run import Run
from spark.training.sampling import run_length
from spark.training.sharding import on_device
from spark.training.task import Rates, StepLoss, Task
from spark.weights.encoder import save_encoder

SMALL_RATE, FITTING_RATE = 5e-4, 4e-3
"""Peak learning rates of lamb: below the first it hardly learns; the second is between those of the recipes."""


class Pretraining(Task):
    """Pretraining of one convnet."""

    unit = "images"
    entry = "spark.pretrain"
    product = "encoder"

    def __init__(self, config: PretrainConfig, run: Run):
        torch.manual_seed(derive_seed(config.seed, 0, Purpose.WEIGHTS))
        self.modules = self.spark = build_model(config.model)
        self.spark.to(run.device).to(memory_format=run.memory_format)  # pyright: ignore[reportCallIssue]
        if run.checkpoint is None and config.model.init is not None:
            for line in start_from(
                self.spark, config.model.init, config.model.name, config.model.init_decoder
            ):
                run.accelerator.print(line)
        self.layout = choose_layout(self.spark, run.device.type, config.precision, run.before)
        self.spark.layout = self.layout.layout
        self.compiled = config.compile
        if self.compiled:
            check_compiled(self.layout, run)
        batch_size = config.optim.batch_size
        self.plan = StepPlan(
            training_sizes(config, self.spark), self.spark.mask_ratio, batch_size, config.seed
        )
        largest = max(self.plan.sizes, key=math.prod)
        check_memory(run.micro_batch, (self.spark.in_chans, *largest), run.device)
        try_forward(self.spark, run.device, self.plan.sizes)

        transform = PretrainTransform(
            self.spark.input_size,
            config.model.in_chans,
            config.data.crop_scale,
            config.data.mean,
            config.data.std,
            config.data.hflip,
        )
        collate = MaskedBatches(self.plan, self.spark.patch_size, self.spark.mask_block_size)
        reader = SampleReader(
            transform, config.seed, config.data.max_pixels, config.model.in_chans, self.plan
        )
        self.loader = open_loader(
            config.data,
            reader,
            collate,
            run.accelerator,
            run.micro_batch,
            cache=run.folder / "shards",
            before=run.before,
            length_is_known=config.max_steps is not None
            and (config.optim.warmup_steps is not None or not config.optim.warmup_epochs),
        )
        self.num_samples = self.loader.size or (config.max_steps or 0) * batch_size
        self.num_shards = self.loader.shards
        self.config = config = resolve(config, self.spark, transform)
        assert config.data.mean is not None
        assert config.data.std is not None
        self.mean, self.std = config.data.mean, config.data.std
        self.normalise = Normalise(self.mean, self.std, fused=True).to(run.device)
        per_epoch = self.num_samples / batch_size
        self.total_steps, self.warmup_steps = run_length(
            per_epoch,
            config.epochs,
            config.max_steps,
            config.optim.warmup_epochs,
            config.optim.warmup_steps,
        )
        for warning in (
            misfit(config, self.num_samples, self.total_steps, self.warmup_steps, self.unit),
            small_rate(config),
        ):
            if warning:
                run.accelerator.print(f"warning: {warning}")
        cooldown = config.optim.cooldown_epochs
        self.cooldown_steps = None if cooldown is None else round(cooldown * per_epoch)
        self.facts = {
            "data": self.loader.facts,
            "stream": self.loader.state,  # which moves on with the run
            "layout": self.layout.layout,
        }
        self.panel_batch = fixed_batch(self.loader, self.spark, config.seed) if run.main else None
        monitor = build_monitor(config, self.loader, self.spark, run.micro_batch, run.main)
        self.watch = Watch(config.monitor, monitor)
        self.device, self.memory_format = run.device, run.memory_format
        self.drawn_step = -1

    # --- what is trained

    @property
    def peak_lr(self) -> float:
        """Learning rate at the end of the warm-up."""
        return self.config.optim.base_lr * self.config.optim.batch_size / 256

    def optimizer(self) -> Optimizer:
        """See `Task`."""
        optim = self.config.optim
        groups = parameter_groups(self.spark, optim.weight_decay)
        return build_optimizer(optim.name, groups, self.peak_lr, optim.betas, optim.eps)

    def rates(self, step: int) -> Rates:
        """See `Task`."""
        optim, total = self.config.optim, self.total_steps
        end = optim.weight_decay if optim.weight_decay_end is None else optim.weight_decay_end
        cooldown = self.cooldown_steps
        return Rates(
            lr_at(
                step,
                peak=self.peak_lr,
                total_steps=total,
                warmup_steps=self.warmup_steps,
                cooldown_steps=cooldown,
            ),
            weight_decay_at(
                step, start=optim.weight_decay, end=end, total_steps=total, cooldown_steps=cooldown
            ),
        )

    def loss(self, model: nn.Module, batch: dict[str, Any]) -> StepLoss:
        """See `Task`."""
        images = batch["image"].to(self.device, non_blocking=True, memory_format=self.memory_format)
        count = int(batch["visible"].sum())  # here: on a GPU, reading it would wait
        visible = batch["visible"].to(self.device, non_blocking=True)
        return StepLoss(model(self.normalise(images), visible, count).loss)

    # --- where its batches come from

    def batches(self, start: int, stop: int) -> Iterator[dict[str, Any]]:
        """See `Task`."""
        return self.loader.batches(start, stop)

    def advance(self) -> None:
        """See `Task`."""
        self.loader.advance()

    def changes(self, before: dict[str, Any]) -> list[str]:
        """See `Task`; older checkpoints lack what they are asked for."""
        data, layout = self.loader.facts, self.layout.layout
        lines = data_changes(before.get("data", data), data)
        if (old := before.get("layout", before["config"]["model"]["layout"])) != layout:
            lines.append(
                f"the layout was {old} on {before.get('device_type', self.device.type)}, is {layout} on "
                f"{self.device.type}: from here on the run agrees with the earlier one to rounding"
            )
        return lines + self.loader.notes

    def started(self, run: Run) -> None:
        """See `Task`."""
        for line in run.state.unreadable.add(self.loader.missing_shards):
            run.accelerator.print(f"left out the shard {line}")

    # --- what it says and writes

    def columns(self, run: Run, batch: dict[str, Any]) -> dict[str, float | str]:
        """See `Task`."""
        visible = batch["visible"]
        return {
            "epoch": self.loader.epochs((run.step + run.state.offset) * self.config.optim.batch_size),
            "layout": self.layout.layout,
            "mask_ratio": 1 - int(visible.sum()) / visible.numel(),
            "height": batch["image"].shape[2],
            "width": batch["image"].shape[3],
        }

    def measure(self, run: Run) -> dict[str, float | str]:
        """See `Task`."""
        return self.watch.measure(run)

    def after_step(self, run: Run) -> None:
        """See `Task`."""
        every = self.config.panels_every
        if run.writers and every and run.step % every == 0:
            begin = time.perf_counter()
            self.drawn_step = run.step
            run.attempt("panels", lambda: self.draw(run))
            if self.watch.monitor is not None:
                self.watch.monitor.seconds += time.perf_counter() - begin

    def make_up(self, run: Run) -> None:
        """Draw the picture of the checkpoint if an interruption has come before."""
        drawn = run.main and panels_path(run.folder, run.step).exists()
        if not reduce_sum(run.accelerator, [float(drawn)])[0]:  # other machines may see the folder later
            self.after_step(run)

    def draw(self, run: Run) -> Path | None:
        """Write reconstruction panels of the fixed images."""
        spark = run.whole(averaged=False)
        if spark is None:
            return None
        assert self.panel_batch is not None
        pixels, visible = (tensor.to(self.device) for tensor in self.panel_batch)
        with on_device(spark, self.device):
            picture = reconstruction_panels(spark, self.normalise(pixels), visible, self.mean, self.std)
        return save_panels(picture, run.folder, run.step)

    def export(self, run: Run) -> Path | None:
        """Write the encoder."""
        trained = run.whole(averaged=self.config.export_ema)
        if trained is None:
            return None
        return save_encoder(
            trained.encoder, run.folder / "encoder", self.mean, self.std, self.spark.input_size
        )

    def finish(self, run: Run) -> list[str]:
        """See `Task`."""
        if run.step != self.drawn_step:
            run.attempt("panels", lambda: self.draw(run))
        return [f"done after step {run.step}: the encoder is in {self.export(run)}"]

    def report(self, run: Run) -> Path:
        """See `Task`."""
        return pretraining_page(run.folder)

    def summary(self, run: Run) -> str:
        """See `Task`."""
        config, spark, optim = self.config, self.spark, self.config.optim

        def millions(module: nn.Module, used: bool = True) -> str:
            counts = [p.numel() for p in module.parameters() if p.requires_grad == used]
            return f"{sum(counts) / 1e6:.2f}M"

        idle = any(not parameter.requires_grad for parameter in spark.encoder.parameters())
        unused = f" ({millions(spark.encoder, used=False)} more are not used)" if idle else ""
        all_warmup = self.warmup_steps >= self.total_steps and self.warmup_steps
        warmup = "all of them warm-up" if all_warmup else f"{self.warmup_steps} of warm-up"
        if self.cooldown_steps is not None:
            warmup += f", {min(self.cooldown_steps, self.total_steps)} of cooldown"
        size = self.loader.size
        epochs = f"{self.total_steps * optim.batch_size / size:.1f}" if size else "unknown"
        family = "ResNets, as it has" if norm_kind(spark.encoder) == "bn" else "ConvNeXts, as it has no"
        recipe = f" (those of {family} batch norm)" if optim.betas == default_betas(spark) else ""
        return "\n".join(
            (
                f"model      {config.model.name}: {millions(spark.encoder)} parameters{unused}, with decoder "
                f"{millions(spark)}; {', '.join(f'{h}x{w}' for h, w in self.plan.sizes)} px, patches of "
                f"{spark.patch_size}, {mask_text(spark, self.plan.sizes)}",
                f"layout     {self.layout.layout} ({self.layout.reason})",
                f"data       {self.loader.title}; loader processes {run.world} x {self.loader.workers}",
                f"batch      {optim.batch_size} images: processes {run.world} x accumulation {config.accumulation} x "
                f"{run.micro_batch} at once; {self.device.type}, {config.precision}",
                f"optimizer  {optim.name}, betas {list(optim.betas or ())}{recipe}, lr {self.peak_lr:.3g} at its peak",
                f"length     {self.total_steps} steps ({warmup}), {epochs} epochs",
                f"output     {config.output_dir}; kill -USR1 {os.getpid()} writes the encoder at once",
            )
        )


def build_model(config: ModelConfig) -> SparK:
    """The model of a run, its weights random."""
    dilated: dict[str, Any] = {} if config.output_stride is None else {"output_stride": config.output_stride}
    options: dict[str, Any] = values_of(config, SparKConfig)
    spark = SparK(options.pop("name"), **options, **dilated)
    if config.grad_checkpointing:
        checkpoint_activations(spark, config.name)
    return spark


def training_sizes(config: PretrainConfig, spark: SparK) -> tuple[tuple[int, int], ...]:
    """The sizes (H, W) between which training switches; UserError for one that patches or masks do not fit."""
    if config.model.train_sizes is None:
        return (spark.input_size,)
    sizes = tuple((size, size) if isinstance(size, int) else size for size in config.model.train_sizes)
    for size in sizes:
        check_masks(spark.grid_of(*size), spark.mask_ratio, spark.mask_block_size)
    return sizes


def checkpoint_activations(spark: SparK, name: str) -> None:
    """Let the encoder compute activations again in the backward pass instead of keeping them, which saves memory.

    Raises:
        UserError: the timm model cannot do so, or it runs dense: its batch norms would move their statistics twice.
    """
    if spark.masked_pixels != "absent":
        raise UserError(
            f"model.grad_checkpointing needs model.masked_pixels absent, not {spark.masked_pixels}: a dense encoder "
            "would count every batch twice in its batch statistics. Raise accumulation to save memory"
        )
    switch = getattr(spark.encoder, "set_grad_checkpointing", None)
    advice = "leave model.grad_checkpointing false; a larger accumulation saves memory too"
    if switch is None:
        raise UserError(f"timm model {name} cannot checkpoint its activations: {advice}")
    try:
        switch(True)
    except (AssertionError, NotImplementedError, TypeError) as error:  # what timm's models refuse with
        raise UserError(
            f"timm model {name} refuses to checkpoint its activations ({error}): {advice}"
        ) from error

    def uncount(norm: nn.Module, inputs: tuple[Any, ...]) -> None:
        # batch norm counts its batches as it is called; the second call of a step is no second batch
        if norm.training and in_recomputation():
            cast(Tensor, norm.num_batches_tracked).sub_(1)

    for module in spark.encoder.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.num_batches_tracked is not None:
            module.register_forward_pre_hook(uncount)


def choose_layout(spark: SparK, device_type: str, precision: str, before: Mapping[str, Any] | None) -> Choice:
    """The layout of a run, and why.

    A layout that is named is taken as it is. For "auto", a run that continues on the same type of device keeps its
    layout, since layouts agree to rounding only; any other run asks the measurements.
    """
    if (
        before is not None
        and spark.layout == before["config"]["model"]["layout"] == AUTO
        and before["device_type"] == device_type
        and is_available(before["layout"])
    ):
        return Choice(before["layout"], "auto: as before in this run")
    return spark.layout_on(device_type, precision)


@torch.no_grad()
def try_forward(spark: SparK, device: torch.device, sizes: Sequence[tuple[int, int]]) -> None:
    """Send black images of these sizes (H, W) through the model, to learn what it refuses before anything is written.

    No statistic moves and no random number of the run is drawn.
    """
    spark.eval()
    for size in sizes:
        visible = visible_at(
            range(2), spark.grid_of(*size), mean_ratio(spark.mask_ratio), seed=0, device=device
        )
        spark(torch.zeros(2, spark.in_chans, *size, device=device), visible)
    spark.train()


def resolve(config: PretrainConfig, spark: SparK, transform: PretrainTransform) -> PretrainConfig:
    """Fill in what was left to a rule: betas by the encoder's norms, mean and std by the transform."""
    return replace(
        config,
        optim=replace(config.optim, betas=config.optim.betas or default_betas(spark)),
        data=replace(config.data, mean=tuple(transform.mean or ()), std=tuple(transform.std or ())),
    )


def mask_text(spark: SparK, sizes: Sequence[tuple[int, int]]) -> str:
    """The shares of the patches that are hidden, which whole patches round: "mask 0.5 (mask_ratio 0.6)"."""
    real = set()
    for size in sizes:
        grid = spark.grid_of(*size)
        real |= {1 - num_visible(grid, ratio) / math.prod(grid) for ratio in ratio_range(spark.mask_ratio)}
    low, high = f"{min(real):.3g}", f"{max(real):.3g}"
    shown = low if low == high else f"{low} to {high}"
    asked = spark.mask_ratio if isinstance(spark.mask_ratio, float) else list(ratio_range(spark.mask_ratio))
    return f"mask {shown}" + ("" if shown == f"{asked}" else f" (mask_ratio {asked})")


def small_rate(config: PretrainConfig) -> str:
    """A sentence where the paper's learning rate, made for a batch of 4096, is left to a small one; "" elsewhere."""
    optim = config.optim
    peak = optim.base_lr * optim.batch_size / 256
    if optim.name != "lamb" or peak >= SMALL_RATE:
        return ""
    return (
        f"the learning rate is {peak:.3g} at its peak, which is little for lamb, whose steps are relative to the "
        f"weights: the paper has 0.0032 at its batch of 4096, the recipe small 0.008 at 64. What fits: --optim.base_lr "
        f"{FITTING_RATE * 256 / optim.batch_size:.3g}, or --config small"
    )


def default_betas(spark: SparK) -> tuple[float, float]:
    """Betas of the paper's recipes: with batch norm those of ResNets, without those of ConvNeXts.

    Tian et al. (ICLR 2023) give them for these two families only; for others they are an extrapolation, by the rule
    that also chooses the norm between encoder and decoder (`spark.model.spark.norm_kind`).
    """
    return (0.9, 0.95) if norm_kind(spark.encoder) == "bn" else (0.9, 0.999)


def check_compiled(layout: Choice, run: Run) -> None:
    """Refuse layouts that torch.compile cannot trace, and FSDP."""
    if layout.layout not in ("masked", "packed"):
        raise UserError(
            f"compile cannot trace the layout {layout.layout} ({layout.reason}): add --model.layout packed, or leave "
            "compile false"
        )
    if run.accelerator.is_fsdp2:
        raise UserError("compile and FSDP have not been made to work together: leave compile false")


def data_changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """How the images differ from those of the checkpoint, whose positions in the stream they take."""
    if before["names"] == now["names"] or ("shards" in before) != (
        "shards" in now
    ):  # the latter: the feed tells it
        return []
    unit = "shards" if "shards" in now else "images"
    change = (
        f"data was {before[unit]} {unit}, is {now[unit]}"
        if before[unit] != now[unit]
        else f"data is {now[unit]} {unit} as before, but of other names or in another order"
    )
    return [f"{change}: the stream of images differs from here on"]
