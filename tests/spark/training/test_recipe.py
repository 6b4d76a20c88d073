"""spark.training.recipe: what does not fit the data is said before the first step, with the options that would."""

from dataclasses import replace

import pytest

from spark.config import DataConfig, ModelConfig, OptimConfig, PretrainConfig
from spark.errors import UserError
from spark.model.spark import SparK
from spark.task import mask_text, small_rate
from spark.training.recipe import misfit
from spark.training.sampling import run_length


def config(batch_size: int, **options) -> PretrainConfig:
    optim = OptimConfig(batch_size=batch_size, **options.pop("optim", {}))
    return PretrainConfig(
        model=ModelConfig("resnet18"), data=DataConfig("x"), output_dir="o", optim=optim, **options
    )


def said(samples: int, config: PretrainConfig) -> str:
    per_epoch = samples / config.optim.batch_size
    optim = config.optim
    length = run_length(per_epoch, config.epochs, config.max_steps, optim.warmup_epochs, optim.warmup_steps)
    return misfit(config, samples, *length, "images")


def test_three_photos_and_a_batch_of_64() -> None:
    small = config(64, epochs=100, optim={"warmup_epochs": 5})
    assert said(3, small) == (
        "a batch of 64 takes each of the 3 images 21.3 times: the run is 106.7 epochs; the whole run has 5 "
        "steps. What fits: --optim.batch_size 2 --epochs 1334"
    )
    fitting = config(2, epochs=1334, optim={"warmup_epochs": 5})
    assert said(3, fitting) == ""


def test_an_epoch_of_one_step() -> None:
    assert said(24, config(64, epochs=1, optim={"warmup_epochs": 0})).startswith(
        "a batch of 64 takes each of the 24 images 2.7 times: the run is 2.7 epochs; the whole run has 1 step"
    )


def test_mostly_warmup() -> None:
    recipe = config(16, epochs=29, optim={"warmup_epochs": 23})
    assert said(160, recipe).startswith(
        "230 of the 290 steps are warm-up. What fits: --optim.warmup_epochs 2.9"
    )
    assert "warm-up" in said(16, recipe)


def test_a_trial_run_that_is_all_warmup() -> None:
    trial = config(16, max_steps=29)
    assert said(1000, trial) == "all of them are warm-up. What fits: --optim.warmup_steps 2"


def test_a_batch_that_takes_each_image_ten_thousand_times_is_refused() -> None:
    with pytest.raises(
        UserError, match="a batch of 65536 images takes each of the 6 images that there are 10922 times"
    ):
        said(6, config(65536))


def test_the_recipe_of_the_paper_fits_its_data() -> None:
    assert said(1_281_167, config(4096)) == ""
    assert small_rate(config(4096)) == ""


def test_the_rate_of_the_paper_at_a_batch_of_16() -> None:
    assert "1.25e-05 at its peak" in small_rate(config(16))
    assert "--optim.base_lr 0.064" in small_rate(config(16))
    assert small_rate(config(16, optim={"base_lr": 0.064})) == ""
    adamw = config(16, optim={"name": "adamw"})
    assert small_rate(adamw) == ""
    assert small_rate(replace(adamw, optim=replace(adamw.optim, name="lamb"))) != ""


def test_the_mask_ratio_that_is_shown_is_the_real_one() -> None:
    spark = SparK("test_resnet", input_size=64, mask_ratio=0.6, decoder_width=32)  # 2x2 patches, 2 are hidden
    assert mask_text(spark, [(64, 64)]) == "mask 0.5 (mask_ratio 0.6)"
    assert mask_text(spark, [(320, 320)]) == "mask 0.6"
    assert mask_text(spark, [(224, 224), (320, 320)]) == "mask 0.592 to 0.6 (mask_ratio 0.6)"
