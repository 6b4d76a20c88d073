"""What a run watches itself by: some fixed images for panels, and measurements of the features of unmasked ones."""

from pathlib import Path

from torch import Tensor

from spark.config import MonitorConfig, PretrainConfig
from spark.errors import UserError
from spark.images.batches import MaskedBatches, StepPlan, collate_images
from spark.images.loader import ImageLoader
from spark.model.masking import mean_ratio
from spark.model.normalise import Normalise
from spark.model.spark import SparK
from spark.monitor.measures import Monitor, MonitoredImages, collapse_warning, read_labelled
from spark.monitor.probes import list_labelled
from spark.training.accelerator import reduce_sum
from spark.training.run import Run
from spark.training.sharding import on_device

PANEL_IMAGES = 6


def fixed_batch(feed: ImageLoader, spark: SparK, seed: int) -> tuple[Tensor, Tensor]:
    """Images and masks for the panels, always the same and in the model's own size.

    Returns:
        [B, C, H, W], not normalised, and [B, 1, fh, fw].
    """
    samples = feed.fixed(PANEL_IMAGES)
    plan = StepPlan((spark.input_size,), mean_ratio(spark.mask_ratio), len(samples), seed)
    batch = MaskedBatches(plan, spark.patch_size, spark.mask_block_size)(samples)
    return batch["image"], batch["visible"]


def build_monitor(
    config: PretrainConfig, feed: ImageLoader, spark: SparK, batch_size: int, main_process: bool
) -> Monitor | None:
    """What watches a run, in its main process; None in the others, which only check the options, and if it is off."""
    most, mean, std = config.monitor.max_images, config.data.mean, config.data.std
    if not config.monitor.every:
        return None
    assert mean is not None
    assert std is not None
    if config.monitor.data is None:
        count = min(most, feed.size or most)

        def read() -> MonitoredImages:
            pixels = collate_images(feed.fixed(count))["image"]
            return MonitoredImages(Normalise(mean, std, fused=True)(pixels))
    else:
        if len(mean) not in (1, 3):
            raise UserError(
                f"monitor.data is a folder of image files, which have 3 channels (colour) or 1 (grey), and "
                f"model.in_chans is {len(mean)}: leave monitor.data null"
            )
        found = list_labelled(Path(config.monitor.data))
        count = sum(min(most, int(part.sum())) for part in (found.train, ~found.train))

        def read() -> MonitoredImages:
            return read_labelled(found, most, spark.input_size, mean, std)

    return Monitor(read, count, config.monitor.max_share, batch_size) if main_process else None


class Watch:
    """Measures as `monitor` does while it can be afforded, and says what it finds.

    Args:
        config: when a warning is due.
        monitor: from `build_monitor`; None measures nothing.
    """

    def __init__(self, config: MonitorConfig, monitor: Monitor | None):
        self.config = config
        self.monitor = monitor

    def measure(self, run: Run) -> dict[str, float | str]:
        """Measure the features of unmasked images, if it is time to, and if that keeps within its share of the time.

        Every process calls it after every step.

        Returns:
            What belongs into the row of the step.
        """
        step, every = run.step, self.config.every
        if not every or (step % every and step != run.task.total_steps):
            return {}
        rate = run.pace.rate
        affordable = self.monitor is not None and self.monitor.affordable(rate)
        spark = None
        if run.state.sharded:  # the main process decides, all gather the weights
            affordable = reduce_sum(run.accelerator, [float(affordable)])[0] > 0
        if affordable and run.writers:
            spark = run.whole(averaged=False)
        if self.monitor is None:
            return {}
        if spark is None:
            expected = self.monitor.expected(rate)
            return {
                "monitor": f"skipped: its {expected:.1f} s would exceed monitor.max_share {self.monitor.max_share}"
            }
        try:
            with on_device(spark, run.device):
                values = self.monitor.measure(spark.encoder)
        except ValueError as error:  # labelled images that cannot be read: the run can do without
            run.say(f"the monitor is off from here on: {error}")
            self.monitor = None
            return {"monitor": f"off: {error}"}
        text = ", ".join(f"{name} {value:.3g}" for name, value in values.items())
        run.say(f"unmasked features after step {step}: {text}")
        warning = collapse_warning(
            values, self.monitor.images, self.config.collapse_rank, self.config.collapse_std
        )
        if warning is None:
            return {**values}
        run.say(f"warning: after step {step} the {warning}")
        return {**values, "event": "collapse", "reason": warning}
