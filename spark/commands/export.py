"""Turn any checkpoint into an encoder folder that plain timm loads, or into a graph for other runtimes.

Reads a run (its newest checkpoint), one checkpoint folder of a run, an official SparK `.pth` file of any kind, or an
encoder folder, and says what became of every key. The folder has Hugging Face's layout: config.json, model.safetensors
and README.md, a model card from the run's own files. A FILE.onnx or FILE.pt2 takes images of any size, uint8, and
gives the pyramid of feature maps (docs/use/export.md); it is written only if it computes what PyTorch does.
"""

from collections.abc import Sequence

from spark.errors import one_line_errors
from spark.options import ExportConfig
from spark.training.cli import parse_config


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; a user's error is one sentence and exit code 2."""
    with one_line_errors():
        config = parse_config(ExportConfig, argv, __doc__ or "")
        from spark.commands.work.export import export

        export(config)


if __name__ == "__main__":
    raise SystemExit(main())
