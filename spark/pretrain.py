"""Pretrain any timm convnet on unlabeled images with SparK: config -> objects -> one loop.

    accelerate launch spark/pretrain.py --config configs/pretrain/official_resnet50.yaml \\
        --data.train PATH --output_dir DIR

One process or several, on CPUs or GPUs, run this same file. Every random number is a function of the seed and of the
position in the stream of images (see `spark.run`), so a resumed run goes on exactly where it was.
"""

import copy
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import DataLoader

from spark.checkpoint import find_run, load_run, save_encoder, save_run
from spark.config import PretrainConfig, config_changes, config_dict, parse_config, save_config
from spark.continuation import start_from
from spark.guard import Guard
from spark.images import Normalise, PretrainTransform, UnlabeledImages, UnreadableImages, collate_images
from spark.masking import check_masks, mean_ratio, visible_at
from spark.model import SparK
from spark.monitor import (
    Monitor,
    MonitoredImages,
    collapse_warning,
    read_labelled,
    reconstruction_panels,
    save_panels,
)
from spark.optim import (
    build_optimizer,
    lr_at,
    parameter_groups,
    set_hyperparameters,
    update_average,
    weight_decay_at,
)
from spark.probing import list_labelled
from spark.run import (
    RunLog,
    StopRequest,
    StreamSampler,
    check_output_dir,
    ignore_stop_signals,
    make_output_dir,
    micro_batch_size,
    one_line_errors,
    prepare,
    progress_bar,
    reduce_sum,
    resume_command,
    run_length,
    start_accelerator,
    stop_run,
    worker_count,
)
from spark.seeding import derive_seed
from spark.sources import open_source
from spark.sparse.batch_norm import in_recomputation
from spark.sparse.choice import AUTO, Choice, is_available
from spark.steps import MaskedBatches, StepImages, StepPlan

DESCRIPTION = """Pretrain a timm convnet on unlabeled images with SparK (sparse and hierarchical masked modelling).
SIGTERM and Ctrl-C save a checkpoint; continue with --resume true. A single process then ends with exit code 0; of
several processes the state is saved likewise, but their launcher reports the signal, with an exit code of its own.
SIGUSR1 to the main process writes the encoder to output_dir/encoder at once; the end of the run does so anyway."""

PANEL_IMAGES = 6


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    with one_line_errors():
        pretrain(parse_config(PretrainConfig, argv, DESCRIPTION))


def pretrain(config: PretrainConfig) -> None:
    """Run one pretraining, from its first step or from a checkpoint, to its end or to a request to stop.

    Args:
        config: the options; the folder `config.output_dir` receives the results.

    Raises:
        ValueError: something about the options, the data or the checkpoint is wrong, or the loss is not finite; the
            sentence says what to do.
        OSError: a file cannot be read or written; likewise.
    """
    deadline = time.monotonic() + config.time_limit_seconds()

    # --- objects; nothing is written before all of them fit together
    check_output_dir(config.output_dir, config.resume)
    accelerator = start_accelerator(config.output_dir, config.precision)
    device = cast(torch.device, accelerator.device)
    rank: int = accelerator.process_index
    world: int = accelerator.num_processes
    main_process: bool = accelerator.is_main_process
    micro_batch = micro_batch_size(config.optim.batch_size, world, config.accumulation)
    torch.backends.cudnn.benchmark = True

    torch.manual_seed(derive_seed(config.seed, 0, 3))
    spark = SparK(
        config.model.name,
        input_size=config.model.input_size,
        mask_ratio=config.model.mask_ratio,
        mask_block_size=config.model.mask_block_size,
        in_chans=config.model.in_chans,
        patch_size=config.model.patch_size,
        decoder_width=config.model.decoder_width,
        layout=config.model.layout,
        drop_path=config.model.drop_path,
        sync_bn=config.model.sync_bn,
        densify_norm=config.model.densify_norm,
        decoder_stages=config.model.decoder_stages,
        densify_kernel=config.model.densify_kernel,
        decoder_maps=config.model.decoder_maps,
        masked_pixels=config.model.masked_pixels,
        target=config.model.target,
        loss_on=config.model.loss_on,
        stride=config.model.stride,
        **({} if config.model.output_stride is None else {"output_stride": config.model.output_stride}),
    )
    if config.model.grad_checkpointing:
        checkpoint_activations(spark, config.model.name)
    memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
    spark.to(device).to(memory_format=memory_format)
    checkpoint = find_run(config.output_dir, config.resume)
    if checkpoint is None and config.model.init is not None:
        for line in start_from(spark, config.model.init, config.model.name, config.model.init_decoder):
            accelerator.print(line)
    before = None if checkpoint is None else read_extra(checkpoint)
    layout = choose_layout(spark, device.type, config.precision, before)
    if config.compile and layout.layout not in ("masked", "packed"):
        raise ValueError(
            f"compile cannot trace the layout {layout.layout} ({layout.reason}): add --model.layout packed, or leave "
            "compile false"
        )
    spark.layout = layout.layout
    plan = StepPlan(training_sizes(config, spark), spark.mask_ratio, config.optim.batch_size, config.seed)
    try_forward(spark, device, plan.sizes)

    cache = config.data.cache or Path(config.output_dir) / "shards"
    source, lost_shards = open_source(config.data.train, cache, config.data.max_unreadable)
    data = {"images": len(source), "names": source.digest()}
    transform = PretrainTransform(
        spark.input_size,
        config.model.in_chans,
        config.data.crop_scale,
        config.data.mean,
        config.data.std,
        config.data.hflip,
    )
    images = UnlabeledImages(source, transform, config.seed, config.data.max_pixels)
    resized = {size: copy.copy(images) for size in plan.sizes}  # the source is shared
    for size, those in resized.items():
        those.transform = replace(transform, input_size=size)
    unreadable = UnreadableImages(len(source), config.data.max_unreadable)
    config = resolve(config, spark, transform)
    betas, mean, std = config.optim.betas, config.data.mean, config.data.std
    assert betas is not None
    assert mean is not None
    assert std is not None
    normalise = Normalise(mean, std, device)

    peak_lr = config.optim.base_lr * config.optim.batch_size / 256
    start_decay = config.optim.weight_decay
    end_decay = start_decay if config.optim.weight_decay_end is None else config.optim.weight_decay_end
    total_steps, warmup_steps = run_length(
        len(source) / config.optim.batch_size,
        config.epochs,
        config.max_steps,
        config.optim.warmup_epochs,
        config.optim.warmup_steps,
    )
    groups = parameter_groups(spark, start_decay)
    optimizer = build_optimizer(config.optim.name, groups, peak_lr, betas, config.optim.eps)
    ema = None if config.optim.ema_decay is None else copy.deepcopy(spark).requires_grad_(False)
    guard = Guard(config.guard)
    model, optimizer = prepare(accelerator, spark, optimizer)
    forward = torch.compile(model) if config.compile else model

    # --- resume
    step = 0
    offset = 0  # batches of the stream that rollbacks have passed over: step n trains on batch n + offset
    if checkpoint is not None and before is not None:
        accelerator.print(f"continuing from {checkpoint}")
        for line in config_changes(before["config"], config_dict(config)):
            accelerator.print(f"changed since that checkpoint: {line}")
        for line in data_changes(before.get("data", data), data):
            accelerator.print(f"changed since that checkpoint: {line}")
        if (old := before.get("layout", before["config"]["model"]["layout"])) != layout.layout:
            accelerator.print(
                f"changed since that checkpoint: the layout was {old} on {before.get('device_type', device.type)}, is "
                f"{layout.layout} on {device.type}: from here on the run agrees with the earlier one to rounding"
            )
        if (old := before.get("processes", world)) != world:
            accelerator.print(
                f"changed since that checkpoint: processes were {old}, are {world}: the same batches of images, "
                "divided anew; the run agrees with the earlier one to rounding, except for what stochastic depth draws"
            )
        state = load_run(checkpoint, model=spark, optimizer=optimizer, scaler=accelerator.scaler, ema=ema)
        step, offset = state["step"], state.get("offset", 0)
        if "guard" in state:
            guard.load_state_dict(state["guard"])
        unreadable.load_state_dict(state["unreadable"])
        if step >= total_steps:
            accelerator.print(
                f"the checkpoint is at step {step}, this run has {total_steps} steps: nothing is left to train"
            )
    elif config.resume:
        accelerator.print(f"no checkpoint in {config.output_dir} yet: starting from the beginning")

    for line in unreadable.add(lost_shards):
        accelerator.print(f"left out the shard {line}")

    # --- the stream of batches, from the step on
    workers = worker_count(config.data.workers, accelerator)

    def batches_from(position: int) -> Iterator[dict[str, Any]]:
        """Batches of this process from one of the stream's on; `accumulation` of them are a step's."""
        stream = StreamSampler(
            len(source),
            micro_batch,
            rank=rank,
            world_size=world,
            seed=config.seed,
            start=position * config.accumulation,
            stop=(total_steps + offset) * config.accumulation,
        )
        loader = DataLoader(
            StepImages(resized, plan),
            batch_sampler=stream,
            num_workers=workers,
            collate_fn=MaskedBatches(plan, spark.patch_size, spark.mask_block_size),
            pin_memory=device.type == "cuda",
            worker_init_fn=ignore_stop_signals,
        )
        return iter(loader)

    panel_batch = fixed_batch(images, spark, config.seed) if main_process else None
    monitor = build_monitor(config, images, spark, micro_batch, main_process)

    # --- logs
    make_output_dir(config.output_dir)
    log = RunLog(config.output_dir, accelerator, None if checkpoint is None else step)
    if main_process:
        save_config(config, Path(config.output_dir) / "config.yaml")
        print(
            summary(
                config,
                spark,
                plan.sizes,
                layout,
                accelerator,
                len(source),
                total_steps,
                warmup_steps,
                workers,
            ),
            flush=True,
        )

    def save(keep: int = config.keep_checkpoints) -> Path:
        """Write the state after `step` steps; main process only."""
        return save_run(
            config.output_dir,
            step,
            model=spark,
            optimizer=optimizer,
            scaler=accelerator.scaler,
            ema=ema,
            extra={
                "config": config_dict(config),
                "unreadable": unreadable.state_dict(),
                "data": data,
                "offset": offset,
                "guard": guard.state_dict(),
                "processes": world,
                "layout": layout.layout,
                "device_type": device.type,
            },
            keep=keep,
        )

    def draw() -> Path:
        """Write reconstruction panels of the fixed images; main process only."""
        assert panel_batch is not None
        pixels, visible = (tensor.to(device) for tensor in panel_batch)
        picture = reconstruction_panels(spark, normalise(pixels), visible, mean, std)
        return save_panels(picture, config.output_dir, step)

    def measure(rate: float) -> dict[str, float | str]:
        """Measure the features of unmasked images, if that keeps within its share of the time; main process only."""
        nonlocal monitor
        assert monitor is not None
        if not monitor.affordable(rate):
            expected = monitor.expected(rate)
            return {
                "monitor": f"skipped: its {expected:.1f} s would exceed monitor.max_share {monitor.max_share}"
            }
        try:
            values = monitor.measure(spark.encoder)
        except ValueError as error:  # labelled images that cannot be read: the run can do without
            bar.say(f"the monitor is off from here on: {error}")
            monitor = None
            return {"monitor": f"off: {error}"}
        text = ", ".join(f"{name} {value:.3g}" for name, value in values.items())
        bar.say(f"unmasked features after step {step}: {text}")
        warning = collapse_warning(values, config.monitor.collapse_rank, config.monitor.collapse_std)
        if warning is None:
            return {**values}
        bar.say(f"warning: after step {step} the {warning}")
        return {**values, "event": "collapse", "reason": warning}

    def export() -> Path:
        """Write the encoder; main process only."""
        folder = Path(config.output_dir) / "encoder"
        trained = ema if ema is not None and config.export_ema else spark
        return save_encoder(trained.encoder, folder, mean, std, spark.input_size)

    def attempt(what: str, write: Callable[[], Path]) -> Path | None:
        """Write what the run can do without: a failure is told, and the run goes on."""
        try:
            return write()
        except OSError as error:
            bar.say(
                f"{what} after step {step} could not be written: {error}. The run goes on without; free space "
                f"or correct the permissions of {config.output_dir} before the next checkpoint"
            )
            return None

    def keep_on(what: str, write: Callable[[], Any]) -> bool:
        """Write what the run needs, and say whether it was written; guard.on_save_error tells if a failure ends it."""
        try:
            write()
        except OSError as error:
            if config.guard.on_save_error == "stop":
                raise
            bar.say(
                f"{what} after step {step} could not be written, training goes on (guard.on_save_error): {error}"
            )
            return False
        return True

    # Batch norm's running statistics change in the forward pass already. To be able to go back to the state before a
    # step whose loss is not finite, they are copied first.
    running = list(spark.buffers())
    running_before = [buffer.clone() for buffer in running]

    def rescue() -> Path | None:
        """Write the state before the step under way, unless it is spoilt already; main process only."""
        torch._foreach_copy_(running, running_before)  # pyright: ignore[reportPrivateImportUsage]
        sound = all(torch.isfinite(parameter).all() for parameter in spark.parameters())
        return save(config.keep_checkpoints + 1) if sound else None

    # --- the loop
    model.train()
    saved_step = drawn_step = -1
    since, steps_since, waited = time.perf_counter(), 0, 0.0
    with (
        StopRequest(deadline) as stop,
        progress_bar(total_steps, step, every=config.log_every, enabled=main_process) as bar,
    ):
        batches = batches_from(step + offset)
        while step < total_steps and not stop.agreed(accelerator):
            lr = lr_at(step, peak=peak_lr, total_steps=total_steps, warmup_steps=warmup_steps)
            weight_decay = weight_decay_at(step, start=start_decay, end=end_decay, total_steps=total_steps)
            set_hyperparameters(optimizer, lr, weight_decay)
            torch._foreach_copy_(running_before, running)  # pyright: ignore[reportPrivateImportUsage]

            try:
                # forward and backward, in parts; the processes average their gradients in the last one
                loss_sum = torch.zeros((), device=device)
                names: list[str] = []
                failed: list[str] = []
                for part in range(config.accumulation):
                    asked = time.perf_counter()
                    batch = next(batches)
                    waited += time.perf_counter() - asked
                    names += batch["name"]
                    failed += batch["failed"]
                    pixels = batch["image"].to(device, non_blocking=True, memory_format=memory_format)
                    pixels = normalise(pixels)
                    visible_count = int(batch["visible"].sum())  # here: on a GPU, reading it would wait
                    visible = batch["visible"].to(device, non_blocking=True)
                    torch.manual_seed(
                        derive_seed(config.seed, (step + offset) * config.accumulation + part, rank, 4)
                    )
                    is_last = part == config.accumulation - 1
                    with nullcontext() if is_last else accelerator.no_sync(model):
                        loss = forward(pixels, visible, visible_count).loss / config.accumulation
                        accelerator.backward(loss)
                    loss_sum += loss.detach()
                all_loss, all_failed = reduce_sum(accelerator, [loss_sum.item(), len(failed)])
                mean_loss = all_loss / world
                if all_failed:
                    for line in unreadable.add(gather_object(failed)):
                        bar.say(f"skipped {line}")
                norm = accelerator.clip_grad_norm_(spark.parameters(), config.optim.clip_grad or math.inf)
            except (
                Exception
            ) as error:  # whatever it is, a bug or a killed loader too, the steps so far are kept
                if main_process:
                    try:
                        unreadable.report(Path(config.output_dir) / "skipped_images.txt")
                        if folder := rescue():
                            bar.say(f"the state before this step is saved in {folder}")
                    except (
                        Exception
                    ) as failure:  # a broken GPU, a full disk: the first error is the one to show
                        bar.say(f"the state before this step could not be saved: {failure}")
                if isinstance(error, torch.cuda.OutOfMemoryError):
                    raise ValueError(
                        f"the GPU has too little memory for {micro_batch} images at once: divide the batch further "
                        f"with accumulation (it is {config.accumulation}), or use precision bf16"
                    ) from error
                raise
            grad_norm = float(norm)  # type: ignore[arg-type]

            # update, unless it would spoil the weights; fp16 skips steps by itself while it seeks its loss scale
            numbers: dict[str, float] = {"the loss": mean_loss}
            if accelerator.scaler is None or accelerator.scaler.get_scale() < 1:
                numbers["the gradient norm"] = grad_norm
            verdict = guard.judge(numbers)
            event: dict[str, float | str] = {}
            if verdict is not None and verdict.action == "rollback":
                target = find_run(config.output_dir, True)
                if target is None:  # before the first checkpoint
                    verdict = guard.skip(f"{verdict.reason}, and there is no checkpoint to roll back to")
            if verdict is None:
                optimizer.step()
                if ema is not None and config.optim.ema_decay is not None:
                    update_average(ema, spark, config.optim.ema_decay if step else 0.0)
            elif verdict.action == "stop":
                stop_run(
                    accelerator,
                    step + 1,
                    verdict.reason,
                    files=names,
                    output_dir=config.output_dir,
                    save=rescue,
                )
            else:
                torch._foreach_copy_(running, running_before)  # pyright: ignore[reportPrivateImportUsage]
                if accelerator.scaler is not None:
                    accelerator.scaler.update()
                event = {"event": verdict.action, "reason": verdict.reason}
                bar.say(f"step {step + 1}: {verdict.reason}: {verdict.action}")
            optimizer.zero_grad()
            if verdict is not None and verdict.action == "rollback":
                assert target is not None
                guard.rollbacks += 1
                state = load_run(target, model=spark, optimizer=optimizer, scaler=accelerator.scaler, ema=ema)
                accelerator.wait_for_everyone()  # nobody writes checkpoints while others read them
                guard.load_state_dict(
                    {**state.get("guard", Guard(config.guard).state_dict()), "rollbacks": guard.rollbacks}
                )
                event["at_step"] = step + 1
                # The stream goes on behind the batch that failed, or the same would happen again.
                position, step = step + offset + 1, state["step"]
                offset = position - step
                batches = batches_from(position)
                keep_on("the rows", partial(log.rewind, step, keep_events=True))
                keep_on(
                    "a row", partial(log.row, step, loss=mean_loss, lr=lr, images_per_second=0.0, **event)
                )
                since, steps_since, waited = time.perf_counter(), 0, 0.0
                continue
            step += 1
            steps_since += 1

            # report, save, draw, export
            now = time.perf_counter()
            elapsed = now - since
            rate = steps_since * config.optim.batch_size / elapsed
            bar.update(step, loss=mean_loss, lr=lr, images_per_second=rate)
            watched: dict[str, float | str] = {}
            if (
                monitor is not None
                and not event
                and (step % config.monitor.every == 0 or step == total_steps)
            ):
                watched = measure(rate)
                since += time.perf_counter() - now  # the time of measuring is not that of training
            log_due = step % config.log_every == 0 or step in (1, total_steps)
            if log_due or watched or event:
                row = {
                    "loss": mean_loss,
                    "lr": lr,
                    "weight_decay": weight_decay,
                    "grad_norm": grad_norm,
                    "epoch": (step + offset) * config.optim.batch_size / len(source),
                    "images_per_second": rate,
                    "data_wait": waited / elapsed,
                    "layout": layout.layout,
                    "mask_ratio": 1 - visible_count / batch["visible"].numel(),
                    "height": pixels.shape[2],
                    "width": pixels.shape[3],
                }
                keep_on("a row", partial(log.row, step, **row, **memory_use(device), **watched, **event))
            if main_process and config.checkpoint_every and step % config.checkpoint_every == 0:
                saved_step = step if keep_on("the checkpoint", save) else saved_step
            if main_process and config.panels_every and step % config.panels_every == 0:
                begin = time.perf_counter()
                attempt("panels", draw)
                drawn_step = step
                if monitor is not None:
                    monitor.seconds += time.perf_counter() - begin
            if main_process and stop.export:
                stop.export = False
                if folder := attempt("the encoder", export):
                    bar.say(f"encoder after step {step} written to {folder}")
            if log_due:
                since, steps_since, waited = time.perf_counter(), 0, 0.0

        # --- the end, or an early stop
        if main_process:
            if step != saved_step:
                save()
            if step >= total_steps:
                if step != drawn_step:
                    attempt("panels", draw)
                bar.say(f"done after step {step}: the encoder is in {export()}")
            else:
                bar.say(f"stopped and saved after step {step} of {total_steps}; to continue:")
                bar.say(f"  {resume_command(config.output_dir, world)}")
            unreadable.report(Path(config.output_dir) / "skipped_images.txt")
            if unreadable:
                bar.say(
                    f"{len(unreadable)} unreadable images were skipped, see skipped_images.txt in the same folder"
                )
    accelerator.wait_for_everyone()
    log.close()


def training_sizes(config: PretrainConfig, spark: SparK) -> tuple[tuple[int, int], ...]:
    """The sizes (H, W) between which training switches.

    Raises:
        ValueError: a size that patches or masks do not fit.
    """
    if config.model.train_sizes is None:
        return (spark.input_size,)
    sizes = tuple((size, size) if isinstance(size, int) else size for size in config.model.train_sizes)
    for size in sizes:
        check_masks(spark.grid_of(*size), spark.mask_ratio, spark.mask_block_size)
    return sizes


def checkpoint_activations(spark: SparK, name: str) -> None:
    """Let the encoder compute activations again in the backward pass instead of keeping them, which saves memory.

    Raises:
        ValueError: the timm model cannot do so, or it runs dense: its batch norms would move their statistics twice.
    """
    if spark.masked_pixels != "absent":
        raise ValueError(
            f"model.grad_checkpointing needs model.masked_pixels absent, not {spark.masked_pixels}: a dense encoder "
            "would count every batch twice in its batch statistics. Raise accumulation to save memory"
        )
    switch = getattr(spark.encoder, "set_grad_checkpointing", None)
    advice = "leave model.grad_checkpointing false; a larger accumulation saves memory too"
    if switch is None:
        raise ValueError(f"timm model {name} cannot checkpoint its activations: {advice}")
    try:
        switch(True)
    except (AssertionError, NotImplementedError, TypeError) as error:  # what timm's models refuse with
        raise ValueError(
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
    """The layout of a run, and why; layouts agree to rounding, so a run keeps to one as long as it can.

    A layout that is named is taken as it is. For "auto", a run that continues on the same type of device takes what was
    chosen before, even if the measurements say otherwise by now; any other run asks the measurements.

    Args:
        spark: the model, its `layout` as asked for.
        device_type: torch's name of it, "cpu" or "cuda".
        precision: fp32, bf16 or fp16.
        before: from `read_extra`, if the run continues.
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

    Evaluation mode and a mask of its own: no statistic moves and no random number of the run is drawn.

    Raises:
        MissingRuleError: an operator of the encoder has no rule for sparse values.
    """
    spark.eval()
    for size in sizes:
        visible = visible_at(
            range(2), spark.grid_of(*size), mean_ratio(spark.mask_ratio), seed=0, device=device
        )
        spark(torch.zeros(2, spark.in_chans, *size, device=device), visible)
    spark.train()


def data_changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Say how the list of images differs from that of the checkpoint, for the positions of the stream are its."""
    if before == now:
        return []
    change = (
        f"data was {before['images']} images, is {now['images']}"
        if before["images"] != now["images"]
        else f"data is {now['images']} images as before, but of other names or in another order"
    )
    return [f"{change}: the stream of images differs from here on"]


def memory_use(device: torch.device) -> dict[str, float]:
    """Most GPU memory that this process has used so far [GB]; nothing on other devices."""
    return {"peak_memory_gb": torch.cuda.max_memory_allocated(device) / 1e9} if device.type == "cuda" else {}


def resolve(config: PretrainConfig, spark: SparK, transform: PretrainTransform) -> PretrainConfig:
    """Fill in what was left to a rule: betas by the encoder's family, mean and std by the transform.

    Betas are those of the paper's recipe (Tian et al., ICLR 2023), which gives them for ResNets and ConvNeXts only. The
    family is the timm module that defines the encoder, not its name.

    Raises:
        ValueError: betas are not set and the encoder belongs to neither family.
    """
    recipes = {"timm.models.resnet": (0.9, 0.95), "timm.models.convnext": (0.9, 0.999)}
    betas = config.optim.betas or recipes.get(type(spark.encoder).__module__)
    if betas is None:
        raise ValueError(
            f"SparK has no recipe for {config.model.name}, which is neither a ResNet nor a ConvNeXt: set optim.betas, "
            "for example --optim.betas [0.9,0.95] (as for ResNets) or [0.9,0.999] (as for ConvNeXts)"
        )
    return replace(
        config,
        optim=replace(config.optim, betas=betas),
        data=replace(config.data, mean=tuple(transform.mean or ()), std=tuple(transform.std or ())),
    )


def fixed_samples(images: UnlabeledImages, most: int) -> list[dict[str, Any]]:
    """At most so many training images, evenly spread, always the same."""
    count = min(most, len(images))
    return [images[position, position * len(images) // count] for position in range(count)]


def fixed_batch(images: UnlabeledImages, spark: SparK, seed: int) -> tuple[Tensor, Tensor]:
    """Images and masks for the panels, always the same and in the model's own size.

    Returns:
        [B, C, H, W] uint8 and [B, 1, fh, fw].
    """
    samples = fixed_samples(images, PANEL_IMAGES)
    plan = StepPlan((spark.input_size,), mean_ratio(spark.mask_ratio), len(samples), seed)
    batch = MaskedBatches(plan, spark.patch_size, spark.mask_block_size)(samples)
    return batch["image"], batch["visible"]


def build_monitor(
    config: PretrainConfig, images: UnlabeledImages, spark: SparK, batch_size: int, main_process: bool
) -> Monitor | None:
    """What watches a run, in its main process; None in the others, which only check the options, and if it is off.

    Raises:
        FileNotFoundError: a split of the labelled folder is missing.
        ValueError: the labelled folder does not fit.
    """
    most, mean, std = config.monitor.max_images, config.data.mean, config.data.std
    if not config.monitor.every:
        return None
    assert mean is not None
    assert std is not None
    if config.monitor.data is None:
        count = min(most, len(images))

        def read() -> MonitoredImages:
            pixels = collate_images(fixed_samples(images, count))["image"]
            return MonitoredImages(Normalise(mean, std)(pixels))
    else:
        if len(mean) not in (1, 3):
            raise ValueError(
                f"monitor.data is a folder of image files, which have 3 channels (colour) or 1 (grey), and "
                f"model.in_chans is {len(mean)}: leave monitor.data null"
            )
        found = list_labelled(Path(config.monitor.data))
        count = sum(min(most, int(part.sum())) for part in (found.train, ~found.train))

        def read() -> MonitoredImages:
            return read_labelled(found, most, spark.input_size, mean, std)

    return Monitor(read, count, config.monitor.max_share, batch_size) if main_process else None


def read_extra(checkpoint: Path) -> dict[str, Any]:
    """What this loop keeps in a checkpoint beside weights and optimizer, read without the rest."""
    return torch.load(checkpoint / "state.pt", map_location="cpu", weights_only=True, mmap=True)["extra"]


def summary(
    config: PretrainConfig,
    spark: SparK,
    sizes: Sequence[tuple[int, int]],
    layout: Choice,
    accelerator: Accelerator,
    num_images: int,
    total_steps: int,
    warmup_steps: int,
    workers: int,
) -> str:
    """What is going to run, in a few lines."""

    def millions(module: nn.Module) -> str:
        return f"{sum(parameter.numel() for parameter in module.parameters()) / 1e6:.2f}M"

    optim, world = config.optim, accelerator.num_processes
    warmup = (
        f"{warmup_steps} of warm-up"
        if warmup_steps < total_steps or not warmup_steps
        else "all of them warm-up"
    )
    return "\n".join(
        (
            f"model      {config.model.name}: {millions(spark.encoder)} parameters, with decoder {millions(spark)}; "
            f"{', '.join(f'{h}x{w}' for h, w in sizes)} px, patches of {spark.patch_size}, "
            f"mask {config.model.mask_ratio}",
            f"layout     {layout.layout} ({layout.reason})",
            f"data       {num_images} images in {config.data.train}; loader processes {world} x {workers}",
            f"batch      {optim.batch_size} images: processes {world} x accumulation {config.accumulation} x "
            f"{optim.batch_size // world // config.accumulation} at once; "
            f"{accelerator.device.type}, {config.precision}",
            f"optimizer  {optim.name}, betas {list(optim.betas or ())}, "
            f"lr {optim.base_lr * optim.batch_size / 256:.3g} at its peak",
            f"length     {total_steps} steps ({warmup}), {total_steps * optim.batch_size / num_images:.1f} epochs",
            f"output     {config.output_dir}; kill -USR1 {os.getpid()} writes the encoder at once",
        )
    )


if __name__ == "__main__":
    main()
