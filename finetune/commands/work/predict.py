"""What spark-predict does, once its options are read."""

from contextlib import suppress
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from finetune.model.depth_model import load_depth_model
from finetune.options import PredictConfig
from finetune.predicting.inputs import earlier_outputs, find_inputs, is_video
from finetune.predicting.predictor import Predictor, Progressed
from finetune.predicting.record import RECORD
from finetune.report.terminal import say
from spark.errors import UserError
from spark.training.accelerator import chosen_device


def predict(config: PredictConfig) -> int:
    """Predict every image and video of `config.input`; returns what `main` does."""
    console = Console()
    model = load_depth_model(config.model, config.encoder_name)
    predictor = Predictor(model, config)
    output = Path(config.output)
    present = next(place for place in (output, *output.parents) if place.exists())
    if not present.is_dir():
        raise UserError(f"output {output} cannot be a folder, {present} is a file: choose another --output")
    earlier = earlier_outputs(config.input, output)
    inputs = find_inputs(config.input, output, {path for paths in earlier.values() for path in paths})
    predictor.check_names(inputs)
    model.to(chosen_device(config.device))
    say(console, str(model.calibration) if model.calibration else "")
    for record, paths in earlier.items():
        say(console, f"left out: {len(paths)} files that an earlier prediction wrote, as {record} says")

    images = {path: stem for path, stem in inputs.items() if isinstance(path, Path) and not is_video(path)}
    videos = {source: stem for source, stem in inputs.items() if is_video(source)}
    interrupted = False
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        try:
            predictor.predict_images(images, _advance(bar, "images", visible=bool(images)))
            for source, stem in videos.items():
                predictor.predict_video(source, stem, _advance(bar, Path(stem).name))
        except KeyboardInterrupt:
            interrupted = True
        except Exception as error:
            if not predictor.record.empty:
                with suppress(OSError):  # such as the full disk that was the error
                    predictor.write_record(interrupted, str(error))
                    stopped = f"stopped by an error: {output / RECORD} says what was written before"
                    say(console, stopped, "yellow")
            raise
    predictor.write_record(interrupted)
    predictor.print_record(console, len(images), interrupted)
    return 130 if interrupted else 0 if predictor.record.useful else 1


def _advance(bar: Progress, name: str, visible: bool = True) -> Progressed:
    """Moves a new line of a progress bar."""
    task = bar.add_task(name, total=None, visible=visible)
    return lambda count, total: bar.update(task, advance=count, total=total)
