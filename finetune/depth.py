"""Train a depth model from a pretrained encoder, or from scratch: config -> objects -> one loop.

    python finetune/depth.py --config configs/depth/unetpp_nyu.yaml --encoder ENCODER --data.root NYU --output_dir DIR

One process or several (`accelerate launch finetune/depth.py ...`), on CPUs or GPUs, run this same file. Every random
number is a function of the seed and of the position in the stream of pairs (see `spark.training.accelerator`), so a
resumed run goes on exactly where it was.
"""

import copy
import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from accelerate.utils import gather_object
from timm.layers.norm_act import convert_sync_batchnorm
from torch.utils.data import DataLoader

from finetune.config import DepthConfig
from finetune.depth_data import MixedSampler, collate_depth
from finetune.losses import NoGroundTruth, WeightedLoss, nothing
from finetune.model.depth_model import start_from
from finetune.protocols import get_protocol
from finetune.scoring.best import Selection
from finetune.scoring.sources import check_protocol
from finetune.tasks.build import add_segmentation, build_model, open_data
from finetune.tasks.outputs import Outputs
from finetune.tasks.schedule import learning_rate, momentum, run_phases
from finetune.tasks.state import RunState, changes, fingerprint, refuse_empty
from finetune.tasks.summary import describe
from spark.errors import UserError, one_line_errors
from spark.seeds import Purpose, derive_seed
from spark.training.accelerator import (
    micro_batch_size,
    prepare,
    reduce_sum,
    start_accelerator,
    worker_count,
)
from spark.training.checkpoint import find_run, refuse_new_beginning
from spark.training.cli import config_dict, parse_config, save_config
from spark.training.environment import record_environment
from spark.training.log import RunLog, progress_bar, read_rows
from spark.training.optim import build_optimizer, parameter_groups, set_hyperparameters, update_average
from spark.training.run_folder import check_output_dir, make_output_dir
from spark.training.skipped import UnreadableImages
from spark.training.stop import StopRequest, check_finite, ignore_stop_signals, resume_command

DESCRIPTION = """Train a depth model (encoder and head) on RGB-D pairs. SIGTERM and Ctrl-C save a checkpoint and end
a run of one process with exit code 0 (a launcher of several may report its own); continue with --resume true. SIGUSR1
to the main process writes the model to output_dir/model at once; the end of the run does so anyway."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    with one_line_errors():
        train(parse_config(DepthConfig, argv, DESCRIPTION))


def train(config: DepthConfig) -> None:
    """Train one depth model, from its first step or from a checkpoint, to its end or to a request to stop.

    Args:
        config: The options; the folder `config.output_dir` receives the results.

    Raises:
        ValueError: Something about the options, the data, the encoder or the checkpoint is wrong, or the loss is not
            finite; the sentence says what to do.
        OSError: A file cannot be read or written; likewise.
    """
    # --- objects; nothing is written before all of them fit together
    check_output_dir(config.output_dir, config.resume)
    accelerator = start_accelerator(config.output_dir, config.precision)
    device = cast(torch.device, accelerator.device)
    rank: int = accelerator.process_index
    world: int = accelerator.num_processes
    main_process: bool = accelerator.is_main_process
    micro_batch = micro_batch_size(config.optim.batch_size, world, config.accumulation)
    torch.backends.cudnn.benchmark = True
    output = Path(config.output_dir)

    depth_model, report = build_model(config)
    start = None
    if config.model.init is not None and find_run(config.output_dir, config.resume) is None:
        start = start_from(depth_model, config.model.init)
    config = replace(config, data=replace(config.data, mean=depth_model.mean, std=depth_model.std))
    criterion = WeightedLoss(config.losses, config.loss_options, depth_model.mean, depth_model.std)
    add_segmentation(depth_model, criterion, config)
    if config.sync_bn and world > 1 and device.type == "cuda":
        # timm's conversion, because torch's drops the activation inside timm's norms
        convert_sync_batchnorm(depth_model)
    memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
    depth_model.to(device).to(memory_format=memory_format)  # pyright: ignore[reportCallIssue]

    protocol = get_protocol(config.protocol, flip_average=config.flip_average)
    check_protocol(depth_model, protocol)
    pairs, held_out = open_data(config, protocol)
    unreadable = UnreadableImages(len(pairs), config.data.max_unreadable)
    criterion.check(depth_model.head.outputs, pairs.entries())

    optim = config.optim
    length = run_phases(config, len(pairs))
    if length.frozen >= length.steps:
        accelerator.print(
            f"warning: optim.frozen_epochs {optim.frozen_epochs:g} are {length.frozen} steps and this run has"
            f" {length.steps}, so its encoder does not learn at all: lower them, or raise epochs or max_steps"
        )
    groups = parameter_groups(
        depth_model,
        optim.weight_decay,
        layer_decay=optim.layer_decay,
        encoder_lr_factor=optim.encoder_lr_factor,
    )
    if length.frozen and accelerator.ddp_handler is not None:
        accelerator.ddp_handler.find_unused_parameters = True  # a frozen encoder has no gradients to exchange
    average = None if optim.ema_decay is None else copy.deepcopy(depth_model).requires_grad_(False)
    model, optimizer = prepare(
        accelerator, depth_model, build_optimizer(optim.name, groups, optim.lr, optim.betas, optim.eps)
    )
    facts = {"config": config_dict(config), "pairs": fingerprint(pairs)}
    state = RunState(depth_model, optimizer, accelerator.scaler, average, unreadable, facts)

    # --- resume
    checkpoint = find_run(config.output_dir, config.resume)
    if checkpoint is not None:
        before = state.resume(checkpoint)
        accelerator.print(f"continuing from {checkpoint}")
        for line in changes(before, facts):
            accelerator.print(f"changed since that checkpoint: {line}")
        if state.step >= length.steps:
            accelerator.print(
                f"the checkpoint is at step {state.step}, this run has {length.steps} steps: nothing is left to train"
            )
    elif config.resume:
        refuse_new_beginning(config.output_dir)
        accelerator.print(f"no checkpoint in {config.output_dir} yet: starting from the beginning")

    # --- logs
    make_output_dir(config.output_dir)
    log = RunLog(config.output_dir, accelerator, None if checkpoint is None else state.step)
    selection = Selection(config.select, config.patience)
    selection.read(read_rows(log.path) if main_process else [])
    if main_process:
        save_config(config, output / "config.yaml")
        record_environment(output, state.step, world)
        print(
            describe(config, depth_model, report, start, pairs, held_out, length, world, device), flush=True
        )

    # --- the stream of batches, from the step on
    workers = worker_count(config.data.workers, accelerator)
    stream = MixedSampler(
        pairs,
        micro_batch,
        rank=rank,
        world_size=world,
        start=state.step * config.accumulation,
        stop=length.steps * config.accumulation,
    )
    loader = DataLoader(
        pairs,
        batch_sampler=stream,
        num_workers=workers,
        collate_fn=collate_depth,
        pin_memory=device.type == "cuda",
        worker_init_fn=ignore_stop_signals,
    )

    def out_of_patience() -> bool:
        """Whether validations have stopped to improve; the same answer in all processes, which all ask together."""
        if config.patience is None:
            return False
        return reduce_sum(accelerator, [float(main_process and selection.exhausted)])[0] > 0

    # --- the loop
    model.train()
    saved_step = state.step if checkpoint is not None else -1
    metrics: dict[str, float] | None = None
    since, steps_since, waited = time.perf_counter(), 0, 0.0
    with (
        StopRequest() as stop,
        progress_bar(length.steps, state.step, every=config.log_every, enabled=main_process) as bar,
    ):
        outputs = Outputs(config, state, selection, protocol, held_out, device, workers, bar.say)
        batches = iter(loader)
        step = state.step
        lost = held_out is not None and 0 < step < length.steps and length.validates_after(step)
        if main_process and lost and step not in dict(selection.scores):
            # a crash between checkpoint and validation lost the latter, on which best/ and patience depend
            made_up = outputs.note(outputs.validate(finished=False))
            known = [row for row in read_rows(log.path) if row["step"] == step]
            log.rewind(step - 1)
            log.row(**{"step": step, **(known[-1] if known else {}), **made_up})
        ended = out_of_patience()
        while state.step < length.steps and not ended and not stop.agreed(accelerator):
            step = state.step  # steps done; this one counts when its update is made
            lr = learning_rate(config, length, step)
            set_hyperparameters(optimizer, lr, optim.weight_decay, momentum(config, length, step))
            if depth_model.encoder_frozen != (step < length.frozen):
                depth_model.freeze_encoder(step < length.frozen)
            log_due = (step + 1) % config.log_every == 0 or step + 1 in (1, length.steps)
            state.begin_step()

            try:
                # forward and backward, in parts; the processes average their gradients in the last one
                # sum over the parts in which it is defined, and their number: of the whole loss, and of each term
                losses = {name: torch.zeros(2, device=device) for name in ("loss", *config.losses)}
                filled = 0
                names: list[str] = []
                failed: list[str] = []
                for part in range(config.accumulation):
                    asked = time.perf_counter()
                    batch = next(batches)
                    waited += time.perf_counter() - asked
                    names += batch["name"]
                    failed += batch["failed"]
                    images = batch["image"].to(device, non_blocking=True, memory_format=memory_format)
                    targets = {
                        key: images if key == "image" else batch[key].to(device, non_blocking=True)
                        for key in criterion.entries & batch.keys()
                    }
                    torch.manual_seed(
                        derive_seed(config.seed, step * config.accumulation + part, rank, Purpose.STEP)
                    )
                    is_last = part == config.accumulation - 1
                    with nullcontext() if is_last else accelerator.no_sync(model):
                        output_maps = model(images)
                        try:
                            loss, each = criterion(output_maps, targets)
                            for name, value in {"loss": loss.detach(), **each}.items():
                                losses[name] += torch.stack((value, torch.ones_like(value)))
                            filled += 1
                        except NoGroundTruth:
                            # Nothing to learn from; the backward pass still runs, for the other processes wait in it.
                            loss = nothing(output_maps)
                        accelerator.backward(loss / config.accumulation)
                sums = torch.stack(list(losses.values())).flatten().tolist()
                *sums, total_filled, total_failed = reduce_sum(accelerator, [*sums, filled, len(failed)])
                if total_failed:
                    for line in unreadable.add(gather_object(failed)):
                        bar.say(f"skipped {line}")
                newly_empty = world * config.accumulation - round(total_filled)
                refuse_empty(config, state.empty + newly_empty, length.steps * config.accumulation * world)
            except (
                ValueError,
                OSError,
                RuntimeError,
            ) as error:  # RuntimeError: GPU memory, a loader that was killed
                if main_process:
                    unreadable.report(output / "skipped_images.txt")
                    if folder := outputs.rescue():
                        bar.say(f"the state before this step is saved in {folder}")
                if isinstance(error, torch.cuda.OutOfMemoryError):
                    raise UserError(
                        f"the GPU has too little memory for {micro_batch} images at once; a larger accumulation than "
                        f"{config.accumulation} divides the batch further, or use precision bf16"
                    ) from error
                raise
            mean_loss, *parts = (
                value / count if count else math.nan
                for value, count in zip(sums[::2], sums[1::2], strict=True)
            )

            # update, unless there is nothing to learn from or it would spoil the weights; fp16 skips steps by itself
            # while it seeks its loss scale
            grad_norm = math.nan
            if total_filled:
                norm = accelerator.clip_grad_norm_(depth_model.parameters(), optim.clip_grad or math.inf)
                grad_norm = float(norm)  # type: ignore[arg-type]
                numbers: dict[str, float] = {"the loss": mean_loss}
                if accelerator.scaler is None or accelerator.scaler.get_scale() < 1:
                    numbers["the gradient norm"] = grad_norm
                check_finite(
                    accelerator,
                    step + 1,
                    numbers,
                    files=names,
                    output_dir=config.output_dir,
                    save=outputs.rescue,
                )
                optimizer.step()
                if average is not None and optim.ema_decay is not None:
                    update_average(average, depth_model, optim.ema_decay if step else 0.0)
            optimizer.zero_grad()
            state.step = step = step + 1
            state.empty += newly_empty
            steps_since += 1

            # save, report, validate, export: the state first, so that none of the others can lose it
            validation_due = held_out is not None and length.validates_after(step)
            save_due = config.checkpoint_every and step % config.checkpoint_every == 0
            if main_process and (save_due or validation_due or step == length.steps):
                outputs.save()
                saved_step = step
            now = time.perf_counter()
            rate = steps_since * optim.batch_size / (now - since)
            bar.update(step, loss=mean_loss, lr=lr, images_per_second=rate)
            row: dict[str, float] = {"loss": mean_loss, "lr": lr}
            if len(parts) > 1:
                each_loss = zip(config.losses, parts, strict=True)
                row |= {
                    f"loss_{n}": v for n, v in each_loss if not math.isnan(v)
                }  # undefined: no such ground truth
            row |= {
                "grad_norm": grad_norm,
                "epoch": step * optim.batch_size / len(pairs),
                "images_per_second": rate,
                "data_wait": waited / (now - since),
                "empty_batches": state.empty,
            }
            if main_process and stop.export and step < length.steps:
                stop.export = False
                outputs.export_on_request()
            try:
                if main_process and step == length.steps:
                    outputs.export()
                if main_process and validation_due:
                    metrics = outputs.validate(finished=step == length.steps)
                    row |= outputs.note(metrics)
            except (ValueError, OSError, RuntimeError):
                bar.say(
                    f"the state after step {step} is saved in {output / 'checkpoints'}, --resume true goes on"
                )
                raise
            finally:
                if log_due or validation_due:
                    log.row(step, **row)
                    since, steps_since, waited = time.perf_counter(), 0, 0.0
            ended = validation_due and out_of_patience()

        # --- the end, or an early stop
        if main_process:
            if state.step != saved_step:
                outputs.save()
            if state.step >= length.steps or ended:
                # unless the loop has: a run that ended early, or was resumed at its end or beyond it
                if state.step != outputs.exported_step:
                    outputs.export()
                if held_out is not None and (metrics is None or ended):
                    outputs.validate(finished=True)
                if ended:
                    bar.say(
                        f"ended early: the last {config.patience} validations were no better; to go on, resume with "
                        "a larger --patience"
                    )
                bar.say(f"done after step {state.step}: the model is in {output / 'model'}")
                if selection.best is not None:
                    bar.say(
                        "the best validation ({} {:.3f}, step {}) is that of {}".format(
                            config.select, selection.best[1], selection.best[0], output / "best"
                        )
                    )
            else:
                bar.say(f"stopped and saved after step {state.step} of {length.steps}; to continue:")
                bar.say(f"  {resume_command(config.output_dir, world)}")
            unreadable.report(output / "skipped_images.txt")
            if unreadable:
                bar.say(
                    f"{len(unreadable)} unreadable pairs were skipped, see skipped_images.txt in the same folder"
                )
            if state.empty:
                bar.say(
                    f"{state.empty} micro-batches had no pixel with a ground truth between {config.model.min_depth:g}"
                    f" and {config.model.max_depth:g} m (model.min_depth, model.max_depth) and taught nothing"
                )
            outputs.report()
    accelerator.wait_for_everyone()
    log.close()


if __name__ == "__main__":
    main()
