"""Hand out a depth model: an ONNX or torch.export file for other runtimes, or a folder for the Hugging Face hub.

    spark-export-depth --model RUN/model --output depth.onnx
    spark-export-depth --model RUN/model --output FOLDER --push_to_hub OWNER/NAME

FILE.onnx and FILE.pt2 take RGB images, uint8 [B, 3, H, W], and give depth in metres, float32 [B, 1, H, W], at the size
of the image; normalisation, padding and calibration are inside (docs/use/export.md). A file is written only if it
computes what PyTorch does. A FOLDER gets config.json, model.safetensors and README.md, a model card from the run's own
files.
"""

from collections.abc import Sequence

from finetune.options import ExportDepthConfig
from spark.errors import one_line_errors
from spark.training.cli import parse_config


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; a user's error is one sentence and exit code 2."""
    with one_line_errors():
        config = parse_config(ExportDepthConfig, argv, __doc__ or "")
        from finetune.commands.work.export import export

        export(config)


if __name__ == "__main__":
    raise SystemExit(main())
