"""What a run writes, and what it does where the disk refuses: checkpoints, rows, panels and the encoder."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from spark.checkpoint import save_encoder
from spark.config import PretrainConfig
from spark.images import Normalise
from spark.monitor import reconstruction_panels, save_panels
from spark.state import RunState


class Outputs:
    """Writes into the folder of a run; main process only, except for `keep_on`.

    Args:
        config: of the run, with mean and standard deviation of the images.
        state: of the run.
        normalise: from bytes to what the model receives.
        panel_batch: images [B, C, H, W] uint8 and masks [B, 1, fh, fw] of the panels; None in other processes.
        say: prints a line.
    """

    def __init__(
        self,
        config: PretrainConfig,
        state: RunState,
        normalise: Normalise,
        panel_batch: tuple[Tensor, Tensor] | None,
        say: Callable[[str], None],
    ):
        self.config = config
        self.state = state
        self.normalise = normalise
        self.panel_batch = panel_batch
        self.say = say

    def save(self) -> Path:
        """Write a checkpoint.

        Raises:
            OSError: disk full, or not writable.
        """
        return self.state.save(self.config.output_dir, self.config.keep_checkpoints)

    def rescue(self) -> Path | None:
        """Write the state before the step under way, unless it is spoilt already."""
        return self.state.rescue(self.config.output_dir, self.config.keep_checkpoints)

    def draw(self) -> Path:
        """Write reconstruction panels of the fixed images."""
        assert self.panel_batch is not None
        mean, std = self.config.data.mean, self.config.data.std
        assert mean is not None
        assert std is not None
        spark = self.state.spark
        device = next(spark.parameters()).device
        pixels, visible = (tensor.to(device) for tensor in self.panel_batch)
        picture = reconstruction_panels(spark, self.normalise(pixels), visible, mean, std)
        return save_panels(picture, self.config.output_dir, self.state.step)

    def export(self) -> Path:
        """Write the encoder."""
        mean, std, ema = self.config.data.mean, self.config.data.std, self.state.ema
        assert mean is not None
        assert std is not None
        trained = ema if ema is not None and self.config.export_ema else self.state.spark
        folder = Path(self.config.output_dir) / "encoder"
        return save_encoder(trained.encoder, folder, mean, std, self.state.spark.input_size)

    def attempt(self, what: str, write: Callable[[], Path]) -> Path | None:
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
