"""What a run writes, and what it does where the disk refuses: checkpoints, rows, panels and the encoder."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spark.config import PretrainConfig
from spark.model.normalise import Normalise
from spark.monitor.panels import reconstruction_panels, save_panels
from spark.report import pretraining_page
from spark.training.checkpoint import save_encoder
from spark.training.sharding import on_device
from spark.training.state import RunState


class Outputs:
    """Writes into the folder of a run.

    The main process calls it, and where weights are sharded every process does; only the main one writes, and what is
    called in others returns None.

    Args:
        config: of the run, with mean and standard deviation of the images.
        state: of the run.
        device: that the run computes on.
        normalise: from bytes to what the model receives.
        panel_batch: images [B, C, H, W] uint8 and masks [B, 1, fh, fw] of the panels; None in other processes.
        say: prints a line.
    """

    def __init__(
        self,
        config: PretrainConfig,
        state: RunState,
        device: torch.device,
        normalise: Normalise,
        panel_batch: tuple[Tensor, Tensor] | None,
        say: Callable[[str], None],
    ):
        self.config = config
        self.state = state
        self.device = device
        self.normalise = normalise
        self.panel_batch = panel_batch
        self.say = say

    def save(self) -> Path | None:
        """Write a checkpoint.

        Raises:
            OSError: disk full, or not writable.
        """
        return self.state.save(self.config.output_dir, self.config.keep_checkpoints)

    def rescue(self) -> Path | None:
        """Write the state before the step under way, unless it is spoilt already."""
        return self.state.rescue(self.config.output_dir, self.config.keep_checkpoints)

    def draw(self) -> Path | None:
        """Write reconstruction panels of the fixed images."""
        spark = self.state.whole_model()
        if spark is None:
            return None
        assert self.panel_batch is not None
        mean, std = self.config.data.mean, self.config.data.std
        assert mean is not None
        assert std is not None
        pixels, visible = (tensor.to(self.device) for tensor in self.panel_batch)
        with on_device(spark, self.device):
            picture = reconstruction_panels(spark, self.normalise(pixels), visible, mean, std)
        return save_panels(picture, self.config.output_dir, self.state.step)

    def export(self) -> Path | None:
        """Write the encoder."""
        mean, std = self.config.data.mean, self.config.data.std
        assert mean is not None
        assert std is not None
        trained = self.state.whole_average() if self.config.export_ema else self.state.whole_model()
        if trained is None:
            return None
        folder = Path(self.config.output_dir) / "encoder"
        return save_encoder(trained.encoder, folder, mean, std, self.state.spark.input_size)

    def report(self) -> Path:
        """Write report.html from what is in the folder."""
        return pretraining_page(self.config.output_dir)

    def attempt(self, what: str, write: Callable[[], Path | None]) -> Path | None:
        """Write what the run can do without: a failure is told, and the run goes on."""
        try:
            return write()
        except OSError as error:
            self.say(
                f"{what} after step {self.state.step} could not be written: {told(error)}. The run goes on without; "
                f"free space or correct the permissions of {self.config.output_dir} before the next checkpoint"
            )
            return None

    def keep_on(self, what: str, write: Callable[[], Any]) -> bool:
        """Write what the run needs, and say whether it was written; guard.on_save_error tells if a failure ends it.

        Raises:
            OSError: it was not written, and the run is to stop then.
        """
        try:
            write()
        except OSError as error:
            if self.config.guard.on_save_error == "stop":
                raise
            self.say(
                f"{what} after step {self.state.step} could not be written, training goes on "
                f"(guard.on_save_error): {told(error)}"
            )
            return False
        return True


def told(error: OSError) -> str:
    """An error of the disk in words, without its number."""
    return (error.strerror or str(error)) + (f" ({error.filename})" if error.filename else "")
