"""Train a depth model from a pretrained encoder, or from scratch: config -> objects -> one loop.

    python finetune/depth.py --config configs/depth/unetpp_nyu.yaml --encoder ENCODER --data.root NYU --output_dir DIR

One process or several (`accelerate launch finetune/depth.py ...`), on CPUs or GPUs, run this same file. Every random
number is a function of the seed and of the position in the stream of pairs (see `spark.run`), so a resumed run goes on
exactly where it was.
"""

import copy
import hashlib
import math
import os
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import gather_object
from timm.layers.norm_act import convert_sync_batchnorm
from torch import nn
from torch.utils.data import DataLoader

from finetune.config import DepthConfig
from finetune.depth_data import (
    KINDS,
    DepthSet,
    MixedSampler,
    MixedSet,
    TrainingMix,
    TrainTransform,
    collate_depth,
    open_depth_data,
)
from finetune.depth_data.transforms import NYU_FRAME
from finetune.figures import save_figure, triptychs
from finetune.inference import check_ground_truth, check_protocol, score, summary, transform_of
from finetune.losses import NoGroundTruth, WeightedLoss, nothing
from finetune.metrics import write_results
from finetune.model import DepthModel, encoder_options, load_depth_model, start_from
from finetune.protocols import Protocol, get_protocol
from finetune.segmentation import attach_segmentation
from finetune.selection import Selection
from spark.checkpoint import KeyReport, find_run, load_run, read_encoder, save_run
from spark.config import config_changes, config_dict, parse_config, save_config
from spark.encoder import is_own
from spark.images import UnreadableImages
from spark.optim import (
    build_optimizer,
    lr_at,
    one_cycle_at,
    parameter_groups,
    set_hyperparameters,
    update_average,
)
from spark.run import (
    RunLog,
    StopRequest,
    check_finite,
    check_output_dir,
    derive_seed,
    ignore_stop_signals,
    make_output_dir,
    micro_batch_size,
    one_line_errors,
    prepare,
    progress_bar,
    read_rows,
    reduce_sum,
    resume_command,
    run_length,
    start_accelerator,
    worker_count,
)

DESCRIPTION = """Train a depth model (encoder and head) on RGB-D pairs. SIGTERM and Ctrl-C save a checkpoint and end
a run of one process with exit code 0 (a launcher of several may report its own); continue with --resume true. SIGUSR1
to the main process writes the model to output_dir/model at once; the end of the run does so anyway."""

# What a seed is for, so that no two uses share random numbers.
ENCODER_WEIGHTS, HEAD_WEIGHTS, STEP, DECODER_WEIGHTS = 10, 11, 12, 13


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
    if (auxiliary := criterion.segmentation) is not None:
        check_classes(config, auxiliary.classes)
        torch.manual_seed(derive_seed(config.seed, DECODER_WEIGHTS))
        attach_segmentation(depth_model, auxiliary.classes, auxiliary.decoder_channels)
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
    shown = depth_model if average is None else average  # what is validated and exported
    model, optimizer = prepare(
        accelerator, depth_model, build_optimizer(optim.name, groups, optim.lr, optim.betas, optim.eps)
    )

    # --- resume
    checkpoint = find_run(config.output_dir, config.resume)
    step = empty = 0  # optimizer steps, and micro-batches without ground truth, so far
    if checkpoint is not None:
        state = load_run(
            checkpoint, model=depth_model, optimizer=optimizer, scaler=accelerator.scaler, ema=average
        )
        step, empty = state["step"], state["empty"]
        unreadable.load_state_dict(state["unreadable"])
        accelerator.print(f"continuing from {checkpoint}")
        if "pairs" in state and state["pairs"] != fingerprint(pairs):  # older checkpoints have none
            accelerator.print(
                f"changed since that checkpoint: the pairs to train on, {state['pairs']['count']} then and {len(pairs)}"
                " now, or their names or order; the run goes on with those of now, no longer the run it was"
            )
        for line in config_changes(state["config"], config_dict(config)):
            accelerator.print(f"changed since that checkpoint: {line}")
        if step >= length.steps:
            accelerator.print(
                f"the checkpoint is at step {step}, this run has {length.steps} steps: nothing is left to train"
            )
    elif config.resume:
        accelerator.print(f"no checkpoint in {config.output_dir} yet: starting from the beginning")

    # --- the stream of batches, from the step on
    workers = worker_count(config.data.workers, accelerator)
    stream = MixedSampler(
        pairs,
        micro_batch,
        rank=rank,
        world_size=world,
        start=step * config.accumulation,
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

    # --- logs
    make_output_dir(config.output_dir)
    log = RunLog(config.output_dir, accelerator, None if checkpoint is None else step)
    selection = Selection(config.select, config.patience)
    selection.read(read_rows(log.path) if main_process else [])
    if main_process:
        save_config(config, output / "config.yaml")
        print(
            describe(config, depth_model, report, start, pairs, held_out, length, world, device), flush=True
        )

    def save(keep: int = config.keep_checkpoints) -> Path:
        """Write the state after `step` steps; main process only."""
        return save_run(
            config.output_dir,
            step,
            model=depth_model,
            optimizer=optimizer,
            scaler=accelerator.scaler,
            ema=average,
            extra={
                "config": config_dict(config),
                "unreadable": unreadable.state_dict(),
                "empty": empty,
                "pairs": fingerprint(pairs),
            },
            keep=keep,
        )

    def validate(finished: bool) -> dict[str, Any]:
        """Score and draw the model as it is; main process only.

        At the end of the run it is the exported model that is scored, so that evaluate.py reports the same numbers: in
        fp32, where the validations before it run in the precision of the training.
        """
        assert held_out is not None
        scored = load_depth_model(output / "model").to(device) if finished else shown
        results, rows = score(
            scored, held_out, protocol, transform_of(depth_model), workers=workers, draw=config.triptychs
        )
        if rows:
            title = (
                f"step {step}   {protocol.name}   {results['images']} images   {summary(results['metrics'])}"
            )
            try:
                save_figure(triptychs(rows, title), output / "figures" / f"triptychs_step_{step:07d}.png")
            except OSError as error:  # pictures are no reason to stop
                bar.say(f"no triptychs of step {step}, the run goes on: {error}")
        if finished:
            about = {"model": str(output / "model"), "data": repr(held_out), "step": step}
            write_results(output / "evaluation.json", {**results, **about})
        return results["metrics"]

    def note(metrics: dict[str, float]) -> dict[str, float]:
        """Keep the model if this validation is the best so far; its part of a row. Main process only."""
        better = selection.add(step, metrics)
        if better:
            shown.save(output / "best")
        bar.say(f"step {step}  {protocol.name}  {summary(metrics)}" + "  (best so far)" * better)
        return {f"val_{name}": value for name, value in metrics.items()}

    def out_of_patience() -> bool:
        """Whether validations have stopped to improve; the same answer in all processes, which all ask together."""
        if config.patience is None:
            return False
        return reduce_sum(accelerator, [float(main_process and selection.exhausted)])[0] > 0

    # Batch norm's running statistics change in the forward pass already. To be able to go back to the state before a
    # step whose loss is not finite, they are copied first.
    running = list(depth_model.buffers())
    running_before = [buffer.clone() for buffer in running]

    def rescue() -> Path | None:
        """Write the state before the step under way, unless it is spoilt already; main process only."""
        torch._foreach_copy_(running, running_before)  # pyright: ignore[reportPrivateImportUsage]
        sound = all(torch.isfinite(parameter).all() for parameter in depth_model.parameters())
        return save(config.keep_checkpoints + 1) if sound else None

    # --- the loop
    model.train()
    saved_step = step if checkpoint is not None else -1
    exported_step = -1
    metrics: dict[str, float] | None = None
    since, steps_since, waited = time.perf_counter(), 0, 0.0
    with (
        StopRequest() as stop,
        progress_bar(length.steps, step, every=config.log_every, enabled=main_process) as bar,
    ):
        batches = iter(loader)
        lost = held_out is not None and 0 < step < length.steps and length.validates_after(step)
        if main_process and lost and step not in dict(selection.scores):
            # a crash between checkpoint and validation lost the latter, on which best/ and patience depend
            log.row(step, **note(validate(finished=False)))
        ended = out_of_patience()
        while step < length.steps and not ended and not stop.agreed(accelerator):
            lr = learning_rate(config, length, step)
            set_hyperparameters(optimizer, lr, optim.weight_decay, momentum(config, length, step))
            if depth_model.encoder_frozen != (step < length.frozen):
                depth_model.freeze_encoder(step < length.frozen)
            log_due = (step + 1) % config.log_every == 0 or step + 1 in (1, length.steps)
            torch._foreach_copy_(running_before, running)  # pyright: ignore[reportPrivateImportUsage]

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
                    torch.manual_seed(derive_seed(config.seed, step * config.accumulation + part, rank, STEP))
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
                refuse_empty(config, empty + newly_empty, length.steps * config.accumulation * world)
            except (
                ValueError,
                OSError,
                RuntimeError,
            ) as error:  # RuntimeError: GPU memory, a loader that was killed
                if main_process:
                    unreadable.report(output / "skipped_images.txt")
                    if folder := rescue():
                        bar.say(f"the state before this step is saved in {folder}")
                if isinstance(error, torch.cuda.OutOfMemoryError):
                    raise ValueError(
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
                    accelerator, step + 1, numbers, files=names, output_dir=config.output_dir, save=rescue
                )
                optimizer.step()
                if average is not None and optim.ema_decay is not None:
                    update_average(average, depth_model, optim.ema_decay if step else 0.0)
            optimizer.zero_grad()
            step += 1
            steps_since += 1
            empty += newly_empty

            # save, report, validate, export: the state first, so that none of the others can lose it
            validation_due = held_out is not None and length.validates_after(step)
            save_due = config.checkpoint_every and step % config.checkpoint_every == 0
            if main_process and (save_due or validation_due or step == length.steps):
                save()
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
                "empty_batches": empty,
            }
            if main_process and stop.export and step < length.steps:
                stop.export = False
                try:
                    shown.save(output / "model")
                    bar.say(f"model after step {step} written to {output / 'model'}")
                except (ValueError, OSError) as error:  # the run itself does not need it yet
                    bar.say(f"the model was not written, the run goes on: {error}")
            try:
                if main_process and step == length.steps:
                    shown.save(output / "model")
                    exported_step = step
                if main_process and validation_due:
                    metrics = validate(finished=step == length.steps)
                    row |= note(metrics)
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
            if step != saved_step:
                save()
            if step >= length.steps or ended:
                if step != exported_step:  # a run that ended early, or was resumed at its end or beyond it
                    shown.save(output / "model")
                if held_out is not None and (metrics is None or ended):
                    validate(finished=True)
                if ended:
                    bar.say(
                        f"ended early: the last {config.patience} validations were no better; to go on, resume with "
                        "a larger --patience"
                    )
                bar.say(f"done after step {step}: the model is in {output / 'model'}")
                if selection.best is not None:
                    bar.say(
                        "the best validation ({} {:.3f}, step {}) is that of {}".format(
                            config.select, selection.best[1], selection.best[0], output / "best"
                        )
                    )
            else:
                bar.say(f"stopped and saved after step {step} of {length.steps}; to continue:")
                bar.say(f"  {resume_command(config.output_dir, world)}")
            unreadable.report(output / "skipped_images.txt")
            if unreadable:
                bar.say(
                    f"{len(unreadable)} unreadable pairs were skipped, see skipped_images.txt in the same folder"
                )
            if empty:
                bar.say(f"{empty} micro-batches had no pixel with a ground truth and taught nothing")
    accelerator.wait_for_everyone()
    log.close()


@dataclass(frozen=True)
class RunLength:
    """How long the phases of a run are.

    Args:
        steps: Optimizer steps of the run.
        warmup: Steps of the warm-up.
        frozen: Steps at the start with a frozen encoder.
        steps_per_epoch: Steps of one pass over the pairs; need not be whole.
        validate_every: Epochs between validations, 0 for the end only.
    """

    steps: int
    warmup: int
    frozen: int
    steps_per_epoch: float
    validate_every: float

    def validates_after(self, step: int) -> bool:
        """Whether `step` (counted from 1) is the last of the run, or the one that completes a validation's epochs."""
        if step == self.steps or not self.validate_every:
            return step == self.steps
        interval = self.validate_every * self.steps_per_epoch
        return math.floor(step / interval + 1e-9) > math.floor((step - 1) / interval + 1e-9)


def run_phases(config: DepthConfig, num_pairs: int) -> RunLength:
    """The phases of a run in steps.

    Raises:
        ValueError: The warm-up, where it is given in steps, is longer than the run.
    """
    per_epoch = num_pairs / config.optim.batch_size
    optim = config.optim
    one_cycle = optim.schedule == "onecycle"
    warmup_epochs, warmup_steps = (0, 0) if one_cycle else (optim.warmup_epochs, optim.warmup_steps)
    steps, warmup = run_length(per_epoch, config.epochs, config.max_steps, warmup_epochs, warmup_steps)
    if one_cycle:
        warmup = round(optim.rise * steps)
    return RunLength(
        steps, warmup, round(config.optim.frozen_epochs * per_epoch), per_epoch, config.validate_every
    )


def learning_rate(config: DepthConfig, length: RunLength, step: int) -> float:
    """Learning rate of the head at a step, counted from 0."""
    optim = config.optim
    if optim.schedule == "onecycle":
        return one_cycle_at(
            step,
            peak=optim.lr,
            total_steps=length.steps,
            rise=optim.rise,
            start_factor=optim.start_factor,
            end_factor=optim.end_factor,
        )
    return lr_at(
        step,
        peak=config.optim.lr,
        total_steps=length.steps,
        warmup_steps=length.warmup,
        start_factor=config.optim.start_factor,
        end_factor=config.optim.end_factor,
    )


def momentum(config: DepthConfig, length: RunLength, step: int) -> float | None:
    """Momentum at a step, counted from 0; None keeps what the optimizer has."""
    if config.optim.momentum is None:
        return None
    low, high = config.optim.momentum
    return one_cycle_at(
        step,
        peak=low,
        total_steps=length.steps,
        rise=config.optim.rise,
        start_factor=high / low,
        end_factor=high / low,
    )


def build_model(config: DepthConfig) -> tuple[DepthModel, KeyReport]:
    """The model of a run, and what became of the encoder's weights.

    The head is seeded apart from the encoder: it starts from the same weights whatever the encoder's are, so that
    encoders can be compared.

    Raises:
        ValueError: The encoder is none, or `pretrained` or `encoder_name` do not go with it.
        FileNotFoundError: A path that does not exist.
    """
    torch.manual_seed(derive_seed(config.seed, ENCODER_WEIGHTS))
    options = encoder_options(config.encoder, config.model.drop_path)
    advice = (
        "give the loaded encoder to DepthModel in a loop of your own (docs/options.md); the models of this script are "
        "built again from their files, and no file decides which code is run"
    )
    for name in (config.encoder, config.encoder_name or ""):
        if is_own(name):
            raise ValueError(f"{name} is not timm's: {advice}")
    try:
        encoder, report = read_encoder(
            config.encoder,
            in_chans=3,
            pretrained=config.pretrained,
            model_name=config.encoder_name,
            **options,
        )
    except ValueError as error:
        if "which is not timm's" in str(error):
            raise ValueError(f"{str(error).partition(', and no code')[0]}: {advice}") from error
        if "--model_name" not in str(error):
            raise
        sentence = str(error)
        for elsewhere in ("model_name= (--model_name)", "model_name=, --model_name"):
            sentence = sentence.replace(elsewhere, "--encoder_name")
        raise ValueError(sentence) from error
    if config.encoder_name is not None and not os.path.isfile(config.encoder):
        raise ValueError(
            f"encoder_name is for .pth files: {config.encoder} says itself which encoder it is, leave it out"
        )
    if config.pretrained and report.source:
        raise ValueError(
            f"pretrained is for timm names: {report.source} brings its own weights, leave it out"
        )
    torch.manual_seed(derive_seed(config.seed, HEAD_WEIGHTS))
    model = DepthModel(
        encoder,
        head=config.model.head,
        max_depth=config.model.max_depth,
        min_depth=config.model.min_depth,
        initial_depth=config.model.initial_depth,
        image_size=config.data.image_size,
        mean=config.data.mean,
        std=config.data.std,
        **config.model.head_options,
    )
    return model, report


def open_data(config: DepthConfig, protocol: Protocol) -> tuple[TrainingMix, DepthSet | None]:
    """The sets to train on, and the pairs to validate on if there are any.

    Raises:
        ValueError: Either is not there, or the ground truth to validate on does not fit the protocol.
    """
    data = config.data
    transform = train_transform(config)
    sets: list[MixedSet] = []
    for number, entry in enumerate((data, *data.sets), start=1):
        opened = open_depth_data(entry.root, entry.list, "train", kind=entry.kind, **entry.reading())
        name = next(kind for kind, of in KINDS.items() if isinstance(opened, of))
        if name in {one.name for one in sets}:
            name = f"{name}-{number}"
        own = transform if entry is data else replace(transform, border=None)
        sets.append(MixedSet(name, opened, own, entry.weight))
    training = TrainingMix(sets, config.seed)
    pairs = sets[0].data
    if (
        data.val_list is None
        and data.val_root is None
        and (data.list is not None or not pairs.has_test_split())
    ):
        return training, None
    held_out = open_depth_data(
        data.val_root or data.root,
        data.val_list,
        "test",
        kind=data.val_kind or (data.kind if data.val_root is None else None),
        **{**data.reading(), "depth": protocol.depth, "labels": None},
    )
    check_ground_truth(held_out, protocol)
    return training, held_out


def check_classes(config: DepthConfig, classes: int) -> None:
    """Refuse a segmentation of more or fewer classes than the data has; data without labels is refused elsewhere."""
    data = config.data
    if data.labels is not None and classes != (has := data.labels + (data.void == "class")):
        raise ValueError(
            f"the segmentation has {classes} classes and the data {has} (data.labels {data.labels}, data.void"
            f" {data.void}): set loss_options.segmentation.classes to {has}"
        )


def train_transform(config: DepthConfig) -> TrainTransform:
    """The augmentation of a run."""
    data = config.data
    assert data.mean is not None
    assert data.std is not None
    return TrainTransform(
        image_size=data.image_size,
        crop_size=data.crop_size,
        border=data.border,
        zoom=data.zoom,
        flip=data.flip,
        rotation=data.rotation,
        colour=data.colour,
        gamma=data.gamma,
        brightness=data.brightness,
        channel=data.channel,
        contrast=data.contrast,
        min_depth=config.model.min_depth,
        max_depth=config.model.max_depth,
        mean=data.mean,
        std=data.std,
    )


def fingerprint(pairs: TrainingMix) -> dict[str, Any]:
    """How many pairs, and a digest of their names in order: what a stream of pairs depends on beside the seed."""
    digest = hashlib.sha256("\n".join(pairs.names()).encode("utf-8", "surrogateescape")).hexdigest()
    return {"count": len(pairs), "sha256": digest}


def refuse_empty(config: DepthConfig, empty: int, planned: int) -> None:
    """Raise ValueError once more micro-batches had no ground truth than the accepted share of those planned."""
    if empty > config.data.max_empty * planned:
        raise ValueError(
            f"{empty} micro-batches had no pixel with a ground truth between {config.model.min_depth:g} and"
            f" {config.model.max_depth:g} m, more than the accepted share of {config.data.max_empty:g} of the {planned}"
            " of the run: check the depth files and model.max_depth, enlarge batch or crop, or raise data.max_empty"
        )


def border_text(border: tuple[int, int, int, int] | None, pairs: DepthSet) -> str:
    """What the border cut means for frames that are not NYU's, judged by the first pair; "" where it needs no word."""
    frame = pairs[0].image.shape[:2]
    if border is None or frame == NYU_FRAME:
        return ""
    rows, columns = frame[0] / NYU_FRAME[0], frame[1] / NYU_FRAME[1]
    top, bottom, left, right = (
        f"{n * f:.0f}" for n, f in zip(border, (rows, rows, columns, columns), strict=True)
    )
    return (
        f"NYU's cut is scaled to these frames of {frame[0]}x{frame[1]}: crops come from rows {top}:{bottom}, columns"
        f" {left}:{right}; --data.border null uses all of them"
    )


def describe(
    config: DepthConfig,
    model: DepthModel,
    report: KeyReport,
    start: KeyReport | None,
    pairs: TrainingMix,
    held_out: DepthSet | None,
    length: RunLength,
    world: int,
    device: torch.device,
) -> str:
    """What is going to run, in a few lines."""

    def millions(*modules: nn.Module) -> str:
        return f"{sum(p.numel() for module in modules for p in module.parameters()) / 1e6:.2f}M"

    optim, data = config.optim, config.data
    if report.source:
        weights = str(report)
    elif config.pretrained:
        weights = f"{config.encoder}: timm's published weights"
    else:
        weights = f"{config.encoder}: random weights (--pretrained true takes timm's published ones)"
    frozen = f", encoder frozen for {length.frozen}" if length.frozen else ""
    return "\n".join(
        (
            f"encoder    {weights}",
            *([f"start      {start}"] if start else []),
            f"model      {millions(model.encoder)} parameters, with {model.head_name} head"
            f" {millions(model.encoder, model.head)}; depth {config.model.min_depth:g} to {config.model.max_depth:g} m",
            *(
                [f"decoder    {millions(model.segmentation)} for segmentation, in training only"]
                if model.segmentation
                else []
            ),
            *(
                f"data       {f'{share:.1%} of the micro-batches: ' if data.sets else ''}{one.name}: {one.data}"
                for one, share in zip(pairs.sets, pairs.shares(), strict=True)
            ),
            f"sizes      frames at {data.image_size[0]}x{data.image_size[1]}, crops of"
            f" {data.crop_size[0]}x{data.crop_size[1]}",
            *([f"border     {border}"] if (border := border_text(data.border, pairs.sets[0].data)) else []),
            f"validation {held_out or 'none: name pairs to validate on with --data.val_list'}",
            f"loss       {' + '.join(f'{weight:g} {name}' for name, weight in config.losses.items())}",
            f"batch      {optim.batch_size} = {world} processes x {config.accumulation} parts x"
            f" {optim.batch_size // world // config.accumulation} pairs; {device.type}, {config.precision}",
            f"optimizer  {optim.name}, lr {optim.lr:.3g} at its peak, encoder x {optim.encoder_lr_factor:g}"
            + (f", layer decay {optim.layer_decay:g}" if optim.layer_decay else ""),
            f"length     {length.steps} steps ({length.warmup} of warm-up{frozen}),"
            f" {length.steps / length.steps_per_epoch:.1f} epochs",
            f"output     {config.output_dir}; kill -USR1 {os.getpid()} writes the model at once",
        )
    )


if __name__ == "__main__":
    main()
