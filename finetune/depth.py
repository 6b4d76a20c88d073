"""Train a depth model from a pretrained encoder, or from scratch: config -> objects -> one loop.

    python finetune/depth.py --config configs/depth/unetpp_nyu.yaml --encoder RUN/encoder --data.root NYU --output_dir DIR

One process or several (`accelerate launch finetune/depth.py ...`), on CPUs or GPUs, run this same file. Every random
number is a function of the seed and of the position in the stream of pairs (see `spark.run`), so a resumed run goes on
exactly where it was.
"""

import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from timm.layers import convert_sync_batchnorm
from torch.utils.data import DataLoader

from finetune.config import DepthConfig
from finetune.depth_data import DepthTrainingSet, TrainTransform, collate_depth, open_depth_data
from finetune.figures import save_figure, triptychs
from finetune.inference import score, summary, transform_of
from finetune.losses import NoGroundTruth, WeightedLoss
from finetune.metrics import write_results
from finetune.model import DepthModel
from finetune.protocols import get_protocol
from spark.checkpoint import find_run, load_run, read_encoder, save_run
from spark.config import config_dict, parse_config, save_config
from spark.images import UnreadableImages
from spark.optim import build_optimizer, lr_at, parameter_groups, set_hyperparameters
from spark.run import (
    RunLog,
    StopRequest,
    StreamSampler,
    check_finite,
    derive_seed,
    ignore_stop_signals,
    micro_batch_size,
    one_line_errors,
    prepare_output_dir,
    progress_bar,
    reduce_sum,
    start_accelerator,
    worker_count,
)

DESCRIPTION = """Train a depth model (encoder and head) on RGB-D pairs. SIGTERM and Ctrl-C save a checkpoint and end with
exit code 0; continue with --resume true. SIGUSR1 to the main process writes the model to output_dir/model at once; the
end of the run does so anyway."""

ENCODER_WEIGHTS, HEAD_WEIGHTS, STEP = 10, 11, 12  # what a seed is for, so that no two uses share random numbers


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
    prepare_output_dir(config.output_dir, config.resume)
    accelerator = start_accelerator(config.output_dir, config.precision)
    device, rank, world = accelerator.device, accelerator.process_index, accelerator.num_processes
    micro_batch = micro_batch_size(config.optim.batch_size, world, config.accumulation)
    torch.backends.cudnn.benchmark = True
    output = Path(config.output_dir)

    # The head starts from the same weights whatever the encoder's are, so that encoders can be compared.
    torch.manual_seed(derive_seed(config.seed, ENCODER_WEIGHTS))
    options: dict[str, Any] = {"drop_path_rate": config.model.drop_path} if config.model.drop_path else {}
    encoder, report = read_encoder(config.encoder, in_chans=3, pretrained=config.pretrained, **options)
    torch.manual_seed(derive_seed(config.seed, HEAD_WEIGHTS))
    depth_model = DepthModel(
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
    config = replace(config, data=replace(config.data, mean=depth_model.mean, std=depth_model.std))
    if config.sync_bn and world > 1 and device.type == "cuda":
        depth_model = convert_sync_batchnorm(depth_model)
    memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
    depth_model.to(device=device, memory_format=memory_format)
    criterion = WeightedLoss(config.losses, config.loss_options)
    protocol = get_protocol(config.protocol, flip_average=config.flip_average)

    pairs = open_depth_data(
        config.data.root, config.data.list, "train", depth=config.data.depth, black_border=config.data.black_border
    )
    held_out = None
    if config.data.val_list is not None or config.data.list is None:
        held_out = open_depth_data(
            config.data.root, config.data.val_list, "test", depth=protocol.depth, black_border=config.data.black_border
        )
    training_set = DepthTrainingSet(pairs, train_transform(config), config.seed, skip_unreadable=True)
    unreadable = UnreadableImages(len(pairs), config.data.max_unreadable)

    groups = parameter_groups(
        depth_model,
        config.optim.weight_decay,
        layer_decay=config.optim.layer_decay,
        encoder_lr_factor=config.optim.encoder_lr_factor,
    )
    optimizer = build_optimizer(config.optim.name, groups, config.optim.lr, config.optim.betas, config.optim.eps)
    length = run_length(config, len(pairs))
    if length.frozen and accelerator.ddp_handler is not None:
        accelerator.ddp_handler.find_unused_parameters = True  # a frozen encoder has no gradients to exchange
    model, optimizer = accelerator.prepare(depth_model, optimizer)
    lr_at(0, peak=config.optim.lr, total_steps=length.steps, warmup_steps=length.warmup)  # refuses a bad schedule now
