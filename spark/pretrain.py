"""Pretrain any timm convnet on unlabeled images with SparK: config -> objects -> one loop.

    accelerate launch spark/pretrain.py --config configs/pretrain/official_resnet50.yaml \\
        --data.train PATH --output_dir DIR

One process or several, on CPUs or GPUs, run this same file. Every random number is a function of the seed and of the
position in the stream of images (see `spark.training.accelerator`), so a resumed run goes on exactly where it was.
"""

import copy
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import gather_object

from spark.assembly import build_model, choose_layout, resolve, summary, training_sizes, try_forward
from spark.config import PretrainConfig
from spark.errors import UserError, one_line_errors
from spark.images.batches import MaskedBatches, StepPlan
from spark.images.dataset import SampleReader
from spark.images.loader import open_loader
from spark.images.transform import PretrainTransform
from spark.model.normalise import Normalise
from spark.monitor.watch import Watch, build_monitor, fixed_batch
from spark.outputs import Outputs
from spark.report import record_environment
from spark.seeds import Purpose, derive_seed
from spark.start import start_from
from spark.training.accelerator import micro_batch_size, prepare, reduce_sum, start_accelerator
from spark.training.checkpoint import refuse_new_beginning
from spark.training.cli import config_dict, parse_config, save_config
from spark.training.guard import Guard
from spark.training.log import RunLog, progress_bar
from spark.training.optim import (
    build_optimizer,
    lr_at,
    parameter_groups,
    set_hyperparameters,
    update_average,
    weight_decay_at,
)
from spark.training.run_folder import check_output_dir, make_output_dir
from spark.training.sampling import run_length
from spark.training.sharding import shard_average
from spark.training.skipped import UnreadableImages
from spark.training.state import RunState, changes, find_checkpoint, read_extra
from spark.training.stop import StopRequest, resume_command, stop_run

DESCRIPTION = """Pretrain a timm convnet on unlabeled images with SparK (sparse and hierarchical masked modelling).
SIGTERM and Ctrl-C save a checkpoint; continue with --resume true. A single process then ends with exit code 0; of
several processes the state is saved likewise, but their launcher reports the signal, with an exit code of its own.
SIGUSR1 to the main process writes the encoder to output_dir/encoder at once; the end of the run does so anyway."""


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
    accelerator = start_accelerator(config.output_dir, config.precision, shards=True)
    device = cast(torch.device, accelerator.device)
    rank: int = accelerator.process_index
    world: int = accelerator.num_processes
    main_process: bool = accelerator.is_main_process
    micro_batch = micro_batch_size(config.optim.batch_size, world, config.accumulation)
    torch.backends.cudnn.benchmark = True

    torch.manual_seed(derive_seed(config.seed, 0, Purpose.WEIGHTS))
    spark = build_model(config.model)
    memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
    spark.to(device).to(memory_format=memory_format)
    checkpoint = find_checkpoint(config.output_dir, config.resume)
    if checkpoint is None and config.resume:
        refuse_new_beginning(config.output_dir)
    if checkpoint is None and config.model.init is not None:
        for line in start_from(spark, config.model.init, config.model.name, config.model.init_decoder):
            accelerator.print(line)
    before = None if checkpoint is None else read_extra(checkpoint)
    layout = choose_layout(spark, device.type, config.precision, before)
    if config.compile and layout.layout not in ("masked", "packed"):
        raise UserError(
            f"compile cannot trace the layout {layout.layout} ({layout.reason}): add --model.layout packed, or leave "
            "compile false"
        )
    if config.compile and accelerator.is_fsdp2:
        raise UserError("compile and FSDP have not been made to work together: leave compile false")
    spark.layout = layout.layout
    plan = StepPlan(training_sizes(config, spark), spark.mask_ratio, config.optim.batch_size, config.seed)
    try_forward(spark, device, plan.sizes)

    transform = PretrainTransform(
        spark.input_size,
        config.model.in_chans,
        config.data.crop_scale,
        config.data.mean,
        config.data.std,
        config.data.hflip,
    )
    collate = MaskedBatches(plan, spark.patch_size, spark.mask_block_size)
    reader = SampleReader(transform, config.seed, config.data.max_pixels, config.model.in_chans, plan)
    feed = open_loader(
        config.data,
        reader,
        collate,
        accelerator,
        micro_batch,
        cache=Path(config.output_dir) / "shards",
        before=before,
        length_is_known=config.max_steps is not None
        and (config.optim.warmup_steps is not None or not config.optim.warmup_epochs),
    )
    num_images = (
        feed.size or (config.max_steps or 0) * config.optim.batch_size
    )  # of an epoch, or at least of the run
    unreadable = UnreadableImages(num_images, config.data.max_unreadable, feed.shards)
    config = resolve(config, spark, transform)
    betas, mean, std = config.optim.betas, config.data.mean, config.data.std
    assert betas is not None
    assert mean is not None
    assert std is not None
    normalise = Normalise(mean, std, fused=True).to(device)

    peak_lr = config.optim.base_lr * config.optim.batch_size / 256
    start_decay = config.optim.weight_decay
    end_decay = start_decay if config.optim.weight_decay_end is None else config.optim.weight_decay_end
    total_steps, warmup_steps = run_length(
        num_images / config.optim.batch_size,
        config.epochs,
        config.max_steps,
        config.optim.warmup_epochs,
        config.optim.warmup_steps,
    )
    groups = parameter_groups(spark, start_decay)
    optimizer = build_optimizer(config.optim.name, groups, peak_lr, betas, config.optim.eps)
    ema = None if config.optim.ema_decay is None else copy.deepcopy(spark).requires_grad_(False)
    unsharded = copy.deepcopy(spark).cpu() if accelerator.is_fsdp2 and main_process else None
    model, optimizer = prepare(accelerator, spark, optimizer)
    if accelerator.is_fsdp2 and ema is not None:
        shard_average(ema)
    forward = torch.compile(model) if config.compile else model
    guard = Guard(config.guard)
    facts = {
        "config": config_dict(config),
        "data": feed.facts,
        "stream": feed.state,  # which moves on with the run
        "processes": world,
        "layout": layout.layout,
        "device_type": device.type,
        "sharded": bool(accelerator.is_fsdp2),
    }
    state = RunState(spark, optimizer, accelerator.scaler, ema, guard, unreadable, facts, unsharded)
    writes = main_process or state.sharded  # sharded weights are gathered by all processes

    # --- resume
    if checkpoint is not None and before is not None:
        accelerator.print(f"continuing from {checkpoint}")
        for line in changes(before, facts) + feed.notes:
            accelerator.print(f"changed since that checkpoint: {line}")
        state.resume(checkpoint)
        if state.step >= total_steps:
            accelerator.print(
                f"the checkpoint is at step {state.step}, this run has {total_steps} steps: nothing is left to train"
            )
    elif config.resume:
        accelerator.print(f"no checkpoint in {config.output_dir} yet: starting from the beginning")

    for line in unreadable.add(feed.missing_shards):
        accelerator.print(f"left out the shard {line}")

    def batches_on() -> Iterator[dict[str, Any]]:
        """Batches of this process from where the run is to its end; `accumulation` of them are a step's."""
        return feed.batches(
            (state.step + state.offset) * config.accumulation,
            (total_steps + state.offset) * config.accumulation,
        )

    panel_batch = fixed_batch(feed, spark, config.seed) if main_process else None
    monitor = build_monitor(config, feed, spark, micro_batch, main_process)
    watch = Watch(config.monitor, monitor, state, accelerator)

    # --- logs
    make_output_dir(config.output_dir)
    log = RunLog(config.output_dir, accelerator, None if checkpoint is None else state.step)
    if main_process:
        save_config(config, Path(config.output_dir) / "config.yaml")
        record_environment(config.output_dir, state.step, world)
        print(
            summary(
                config,
                spark,
                plan.sizes,
                layout,
                accelerator,
                feed.title,
                total_steps * config.optim.batch_size / feed.size if feed.size else None,
                total_steps,
                warmup_steps,
                feed.workers,
            ),
            flush=True,
        )

    # --- the loop
    model.train()
    saved_step = drawn_step = -1
    save_due = False
    since, steps_since, waited = time.perf_counter(), 0, 0.0
    with (
        StopRequest(deadline) as stop,
        progress_bar(total_steps, state.step, every=config.log_every, enabled=main_process) as bar,
    ):
        outputs = Outputs(config, state, device, normalise, panel_batch, bar.say)
        batches = batches_on()
        while state.step < total_steps and not stop.agreed(accelerator):
            if stop.export and writes:
                stop.export = False
                if folder := outputs.attempt("the encoder", outputs.export):
                    bar.say(f"encoder after step {state.step} written to {folder}")
            step = state.step  # steps done; this one counts when its update is made, or skipped
            lr = lr_at(step, peak=peak_lr, total_steps=total_steps, warmup_steps=warmup_steps)
            weight_decay = weight_decay_at(step, start=start_decay, end=end_decay, total_steps=total_steps)
            set_hyperparameters(optimizer, lr, weight_decay)
            state.begin_step()

            try:
                # forward and backward, in parts; the processes average their gradients in the last one
                loss_sum = torch.zeros((), device=device)
                names: list[str] = []
                failed: list[str] = []
                lost: list[str] = []
                for part in range(config.accumulation):
                    asked = time.perf_counter()
                    batch = next(batches)
                    waited += time.perf_counter() - asked
                    names += batch["name"]
                    failed += batch["failed"]
                    lost += batch["failed_shards"]
                    pixels = batch["image"].to(device, non_blocking=True, memory_format=memory_format)
                    pixels = normalise(pixels)
                    visible_count = int(batch["visible"].sum())  # here: on a GPU, reading it would wait
                    visible = batch["visible"].to(device, non_blocking=True)
                    torch.manual_seed(
                        derive_seed(
                            config.seed,
                            (step + state.offset) * config.accumulation + part,
                            rank,
                            Purpose.STEP,
                        )
                    )
                    is_last = part == config.accumulation - 1
                    with nullcontext() if is_last else accelerator.no_sync(model):
                        loss = forward(pixels, visible, visible_count).loss / config.accumulation
                        accelerator.backward(loss)
                    loss_sum += loss.detach()
                all_loss, all_failed = reduce_sum(accelerator, [loss_sum.item(), len(failed) + len(lost)])
                mean_loss = all_loss / world
                if all_failed:
                    for line in unreadable.add(gather_object(failed)):
                        bar.say(f"skipped {line}")
                    for line in unreadable.add_shards(gather_object(lost)):
                        bar.say(f"skipped the rest of the shard {line}")
                norm = accelerator.clip_grad_norm_(spark.parameters(), config.optim.clip_grad or math.inf)
            except Exception as error:
                # Whatever it is, a bug or a killed loader too, the steps so far are kept.
                if main_process:
                    try:
                        unreadable.report(Path(config.output_dir) / "skipped_images.txt")
                        if state.sharded:  # the other processes may not be there to gather them
                            bar.say("sharded weights cannot be saved in the middle of a step")
                        elif folder := outputs.rescue():
                            bar.say(f"the state before this step is saved in {folder}")
                    except (
                        Exception
                    ) as failure:  # a broken GPU, a full disk: the first error is the one to show
                        bar.say(f"the state before this step could not be saved: {failure}")
                if isinstance(error, torch.cuda.OutOfMemoryError):
                    raise UserError(
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
            target: Path | None = None
            if verdict is not None and verdict.action == "rollback":
                target = state.rollback_target(config.output_dir)
                if target is None:  # before the first checkpoint
                    reason = f"{verdict.reason}, and there is no checkpoint to roll back to"
                    verdict = guard.skip(reason, verdict.kind)
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
                    save=outputs.rescue,
                    kind=verdict.kind,
                )
            else:
                state.undo_forward()
                if accelerator.scaler is not None:
                    accelerator.scaler.update()
                event = {"event": verdict.action, "reason": verdict.reason}
                to = f" to {target.name}" if target is not None else ""
                bar.say(f"step {step + 1}: {verdict.reason}: {verdict.action}{to}")
            optimizer.zero_grad()
            if verdict is not None and verdict.action == "rollback":
                assert target is not None
                state.roll_back(target)
                accelerator.wait_for_everyone()  # nobody writes checkpoints while others read them
                event["at_step"] = step + 1
                feed.advance()
                batches = batches_on()
                # Interrupted from here on, the run is not to meet the same batches, nor to count anew.
                save_due = False
                saved_step = drawn_step = -1  # these steps come anew, with other weights
                if writes:
                    outputs.keep_on("the checkpoint", outputs.save)
                outputs.keep_on("the rows", partial(log.rewind, state.step, keep_events=True))
                row = {"loss": mean_loss, "lr": lr, "images_per_second": 0.0}
                outputs.keep_on("a row", partial(log.row, state.step, **row, **event))
                since, steps_since, waited = time.perf_counter(), 0, 0.0
                continue
            state.step = step = step + 1
            feed.advance()
            steps_since += 1

            # report, save, draw, export
            now = time.perf_counter()
            elapsed = now - since
            rate = steps_since * config.optim.batch_size / elapsed
            bar.update(step, loss=mean_loss, lr=lr, images_per_second=rate)
            watched: dict[str, float | str] = {}
            if not event:
                watched = watch.measure(step == total_steps, rate, bar.say)
                since += time.perf_counter() - now  # the time of measuring is not that of training
            log_due = step % config.log_every == 0 or step in (1, total_steps)
            if log_due or watched or event:
                row = {
                    "loss": mean_loss,
                    "lr": lr,
                    "weight_decay": weight_decay,
                    "grad_norm": grad_norm,
                    "epoch": feed.epochs((step + state.offset) * config.optim.batch_size),
                    "images_per_second": rate,
                    "data_wait": waited / elapsed,
                    "layout": layout.layout,
                    "mask_ratio": 1 - visible_count / batch["visible"].numel(),
                    "height": pixels.shape[2],
                    "width": pixels.shape[3],
                }
                outputs.keep_on(
                    "a row", partial(log.row, step, **row, **memory_use(device), **watched, **event)
                )
            save_due |= bool(config.checkpoint_every) and step % config.checkpoint_every == 0
            if writes and save_due and not guard.doubtful:
                save_due = False
                if outputs.keep_on("the checkpoint", outputs.save):
                    saved_step = step
                else:
                    event = {"event": "not_saved", "reason": f"no checkpoint of step {step} could be written"}
                    row = {"loss": mean_loss, "lr": lr, "images_per_second": rate}
                    outputs.keep_on("a row", partial(log.row, step, **row, **event))
            if writes and config.panels_every and step % config.panels_every == 0:
                begin = time.perf_counter()
                outputs.attempt("panels", outputs.draw)
                drawn_step = step
                if watch.monitor is not None:
                    watch.monitor.seconds += time.perf_counter() - begin
            if log_due:
                since, steps_since, waited = time.perf_counter(), 0, 0.0

        # --- the end, or an early stop
        if writes:
            # Of sharded weights all processes take part, and only the main one knows if the last save was written.
            if state.sharded or state.step != saved_step:
                outputs.save()
            if state.step >= total_steps:
                if state.step != drawn_step:
                    outputs.attempt("panels", outputs.draw)
                bar.say(f"done after step {state.step}: the encoder is in {outputs.export()}")
            else:
                bar.say(f"stopped and saved after step {state.step} of {total_steps}; to continue:")
                bar.say(f"  {resume_command(config.output_dir, world, state.sharded)}")
        if main_process:
            unreadable.report(Path(config.output_dir) / "skipped_images.txt")
            if unreadable or unreadable.shards:
                shards = f" and the rest of {len(unreadable.shards)} shards" if unreadable.shards else ""
                bar.say(
                    f"{len(unreadable)} unreadable images{shards} were skipped, see skipped_images.txt in the same "
                    "folder"
                )
            outputs.attempt("report.html", outputs.report)
    accelerator.wait_for_everyone()
    log.close()


def memory_use(device: torch.device) -> dict[str, float]:
    """Most GPU memory that this process has used so far [GB]; nothing on other devices."""
    return {"peak_memory_gb": torch.cuda.max_memory_allocated(device) / 1e9} if device.type == "cuda" else {}


if __name__ == "__main__":
    main()
