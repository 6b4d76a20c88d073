"""Everything that the golden tests import from this repository: whoever moves a module edits its line here.

`MAINS` are the commands by the names that the JSON files know them by; `CONFIGS` are the dataclasses of their options.
"""

from finetune import DepthModel, load_depth_model
from finetune.commands import app, compare, doctor, report
from finetune.commands import export as export_depth
from finetune.commands.calibrate import main as calibrate
from finetune.config import DepthConfig
from finetune.depth import main as train_depth
from finetune.depth_data import open_depth_data
from finetune.evaluate import main as evaluate
from finetune.options import CalibrateConfig, EvaluationConfig, PredictConfig
from finetune.predict import main as predict
from finetune.protocols import PROTOCOLS
from spark import SparK, load_encoder, save_encoder
from spark.commands import export as export_encoder
from spark.commands import prepare as prepare_images
from spark.commands import probe
from spark.config import PretrainConfig
from spark.pretrain import main as pretrain
from tests import depth_layouts
from tests.depth_world import make_depth_world
from tests.golden import tiny
from tests.together import launched, together

__all__ = [
    "CONFIGS",
    "MAINS",
    "PROTOCOLS",
    "DepthModel",
    "SparK",
    "depth_layouts",
    "launched",
    "load_depth_model",
    "load_encoder",
    "make_depth_world",
    "open_depth_data",
    "save_encoder",
    "tiny",
    "together",
]

CONFIGS = {
    "pretrain": PretrainConfig,
    "depth": DepthConfig,
    "evaluate": EvaluationConfig,
    "predict": PredictConfig,
    "calibrate": CalibrateConfig,
}

MAINS = {
    "pretrain": pretrain,
    "depth": train_depth,
    "evaluate": evaluate,
    "predict": predict,
    "calibrate": calibrate,
    "probe": probe.main,
    "prepare_images": prepare_images.main,
    "export_encoder": export_encoder.main,
    "export_depth": export_depth.main,
    "report": report.main,
    "compare": compare.main,
    "app": app.main,
    "doctor": doctor.main,
}
