"""Starting a pretraining from weights: official files, runs, exported encoders, timm's published weights.

Nothing in the weights depends on the image size, so they may come from any. What was loaded is told in words, and what
is not loaded keeps its random initialisation.
"""

from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from spark.errors import FileError, UserError
from spark.model.names import is_own
from spark.model.spark import SparK
from spark.training.checkpoint import find_run
from spark.weights.encoder import STATE, WEIGHTS, read_encoder
from spark.weights.keys import KeyReport, fit
from spark.weights.official import read_weights

TIMM = "timm"


def start_from(spark: SparK, source: str, name: str, decoder: str = "auto") -> list[str]:
    """Fill a model with weights to continue from.

    Args:
        spark: Filled in place.
        source: A run, one of its checkpoints, an official `.pth` file, an exported encoder, or "timm" for timm's
            published weights. For another number of channels timm's rule adapts the first convolution.
        name: Of the encoder, timm's or "package.module:factory".
        decoder: "keep" the decoder and densify layers of the source too, "drop" them (random), or "auto": keep them if
            all of them fit.

    Returns:
        What was loaded and what was not, in lines.

    Raises:
        UserError: No such path, weights of another encoder, or no decoder that fits to keep.
        OSError: timm's weights could not be downloaded.
    """
    place: str | Path = source
    if source != TIMM and not (source and Path(source).exists()):
        raise FileError(
            f"model.init {source!r} does not exist: give a run, an exported encoder or a .pth file, or {TIMM} for "
            "timm's published weights of model.name"
        )
    if source != TIMM and (Path(source) / "checkpoints").is_dir():
        found = find_run(source, True)
        if found is None:
            raise UserError(f"model.init {source} is a run without a whole checkpoint")
        place = found
    if source == TIMM:
        if is_own(name):
            raise UserError(
                f"model.init {TIMM} is for encoders of timm, and {name} is not timm's: give a run, an exported encoder "
                "or a file of its weights"
            )
        encoder, report = read_encoder(name, in_chans=spark.in_chans, pretrained=True)
        report = KeyReport(f"timm's weights of {name}", loaded=list(encoder.state_dict()))
    else:
        encoder, report = read_encoder(
            place, in_chans=spark.in_chans, model_name=name, name_option="--model.name"
        )
        if not report.source:
            raise UserError(
                f"model.init {source} is a timm name: for timm's published weights of model.name say {TIMM}"
            )
    fit(
        encoder.state_dict(),
        spark.encoder,
        source=str(source),
        name=f"the encoder {name} of this run",
        advice="Choose the model.name that these weights belong to",
    )
    lines = [f"encoder from {str(report).replace(chr(10), ';')}"]
    if decoder == "drop":
        return [*lines, "decoder and densify layers start at random (model.init_decoder drop)"]

    others = {} if source == TIMM else _decoder_tensors(Path(place))
    rest = {key: value for key, value in spark.state_dict().items() if not key.startswith("encoder.")}
    wrong = [
        f"{key}: {list(others[key].shape) if key in others else 'absent'} there, {list(value.shape)} here"
        for key, value in rest.items()
        if key not in others or others[key].shape != value.shape
    ]
    if not others or wrong:
        why = f"{len(wrong)} tensors do not fit, first {wrong[0]}" if others else "there is none"
        if decoder == "keep":
            raise UserError(
                f"model.init_decoder is keep, and the decoder of {source} cannot be kept: {why}. Take the options of "
                "its run (decoder_width, decoder_stages, densify_norm, ...), or let model.init_decoder drop it"
            )
        return [
            *lines,
            f"decoder and densify layers start at random, from {source} they could not be taken: {why}",
        ]
    spark.load_state_dict({key: others[key] for key in rest}, strict=False)
    return [*lines, f"decoder and densify layers from {source}: {len(rest)} tensors loaded"]


def _decoder_tensors(place: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint folder or an official file that are not the encoder's, under SparK's names."""
    if (place / STATE).is_file():
        tensors = load_file(place / WEIGHTS)
        return {key: value for key, value in tensors.items() if not key.startswith("encoder.")}
    return read_weights(place).others if place.is_file() else {}
