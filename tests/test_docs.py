"""README, docs and run cards: links, options and cards that they name exist; numbers are those of the results."""

import csv
import re
from pathlib import Path
from typing import Any

import pytest

from finetune import options as finetune_options
from finetune.config import ClassifyConfig, DepthConfig, SegmentConfig
from spark import options as spark_options
from spark.config import PretrainConfig
from spark.training.cards import find_card
from spark.training.help import read_options

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted(p for p in (ROOT / "docs").rglob("*.md") if p.name != "log.md")]
CARDS = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if not path.is_symlink())
COMMANDS: dict[str, Any] = {
    "spark-pretrain": PretrainConfig,
    "spark-depth": DepthConfig,
    "spark-classify": ClassifyConfig,
    "spark-segment": SegmentConfig,
    "spark-evaluate": finetune_options.EvaluationConfig,
    "spark-predict": finetune_options.PredictConfig,
    "spark-export": spark_options.ExportConfig,
    "spark-probe": spark_options.ProbeConfig,
    "spark-prepare": spark_options.PrepareConfig,
    "spark-report": spark_options.ReportConfig,
    "spark-calibrate": finetune_options.CalibrateConfig,
    "spark-doctor": finetune_options.DoctorConfig,
    "spark-compare": finetune_options.CompareConfig,
    "spark-export-depth": finetune_options.ExportDepthConfig,
    "spark-app": finetune_options.AppConfig,
}
MODULES = {
    "-m spark.pretrain": "spark-pretrain",
    "python spark/pretrain.py": "spark-pretrain",
    "-m finetune.depth": "spark-depth",
}
EVERYWHERE = {"config", "print_config", "help"}
# Options of other programs that sentences name: accelerate, sbatch, the tools.
OTHERS = {"cpu", "multi_gpu", "num_cpu_threads_per_process", "signal", "write", "models"}


def options_of(command: str) -> tuple[set[str], tuple[str, ...]]:
    """Names of options, and beginnings of entries of options that are dicts."""
    options = list(read_options(COMMANDS[command]))
    return {o.name for o in options} | EVERYWHERE, tuple(
        f"{o.name}." for o in options if re.search(r"\bdict\[", str(o.kind))
    )


def commands_in(text: str) -> list[tuple[str, list[str]]]:
    """Every command line of the text: its name, and its arguments up to the end of the line or of the code."""
    text = re.sub(r"\\\n[#\s]*", " ", text)
    for module, name in MODULES.items():
        text = text.replace(module, name)
    found = re.findall(rf"(?:^|[ `'])({'|'.join(COMMANDS)})((?: [^\n`#;|]*)?)", text, re.M)
    return [(name, rest.replace("'", "").split()) for name, rest in found if "--" in rest]


def test_every_console_command_is_known_here() -> None:
    scripts = re.findall(r"^(spark-[\w-]+) = ", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M)
    assert set(scripts) == set(COMMANDS)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        path, _, heading = target.partition("#")
        goal = page.parent / path if path else page
        assert goal.exists(), f"{page.name}: {target}"
        if heading:
            titles = re.findall(r"^#+ (.*)$", goal.read_text(encoding="utf-8"), re.M)
            known = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert heading in known, f"{page.name}: {target}"


@pytest.mark.parametrize("page", [*PAGES, *CARDS], ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_have_options_and_cards_that_exist(page: Path) -> None:
    for command, arguments in commands_in(page.read_text(encoding="utf-8")):
        names, beginnings = options_of(command)
        for argument, value in zip(arguments, [*arguments[1:], ""], strict=True):
            option = re.match(r"\[?--([\w.]+)", argument)
            if option is None:
                continue
            assert option[1] in names or option[1].startswith(beginnings or "!"), f"{command} --{option[1]}"
            if option[1] == "config" and not value.startswith("...") and page.parent.name != "extend":
                find_card(value, COMMANDS[command].CARDS)


@pytest.mark.parametrize("page", [p for p in PAGES if p.parent.name != "results"], ids=lambda path: path.stem)
def test_options_in_sentences_exist(page: Path) -> None:
    known = set().union(*(options_of(command)[0] for command in COMMANDS)) | OTHERS
    beginnings = tuple(b for command in COMMANDS for b in options_of(command)[1])
    for code in re.findall(r"`(--[^`\n]*)`", page.read_text(encoding="utf-8")):
        for option in re.findall(r"--([\w.]+)", code):
            placeholder = option != option.lower()  # as in --model.NAME
            assert placeholder or option in known or option.startswith(beginnings), f"--{option}"


def test_the_numbers_of_the_readme_are_those_of_the_results() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = text.split("<!-- study -->")[1].strip()
    assert table == (ROOT / "docs" / "results" / "nyu_val_small.md").read_text(encoding="utf-8").strip()
    rows = re.findall(
        r"^\| (speed|peak memory).*\| ([\d.]+)x \| ([\d.]+)x \| \[csv\]\((.*)\) \|$", text, re.M
    )
    assert len(rows) >= 4
    for what, *shown, path in rows:
        column = "speedup_median" if what == "speed" else "peak_step_ratio"
        with (ROOT / path).open(encoding="utf-8") as file:
            measured = {
                r["model"]: float(r[column]) for r in csv.DictReader(file) if r["contender"] == "packed"
            }
        assert shown == [f"{measured[model]:.2f}" for model in ("resnet50", "convnext_tiny")], path
