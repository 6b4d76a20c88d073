"""The help of the tools: every option is explained, with its default. Read from the source, as imports take seconds."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = [
    path
    for place in ("tools", "spark/commands", "finetune/commands")
    for path in sorted((ROOT / place).glob("*.py"))
]
DEFAULT = re.compile(r"%\(default\)s|default|\([^()]+\)")
"""How help tells a default: by itself, in words, or in brackets."""


def unexplained(source):
    """Options of argparse without help, or with a default that their help does not tell."""
    for call in ast.walk(ast.parse(source)):
        if not (isinstance(call, ast.Call) and getattr(call.func, "attr", "") == "add_argument"):
            continue
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        told = given.get("help", "")
        defaults = given.get("default", "None") not in ("None", "False", "[]", "''", "argparse.SUPPRESS")
        if not told or (defaults and not DEFAULT.search(told)):
            yield call.args[0].value


@pytest.mark.parametrize("path", TOOLS, ids=lambda path: path.stem)
def test_every_option_is_explained_with_its_default(path):
    assert list(unexplained(path.read_text(encoding="utf-8"))) == []


def test_what_is_not_explained_is_found():
    source = 'p.add_argument("--a", default=3, help="how many"); p.add_argument("--b"); p.add_argument("--c", help="c")'
    assert list(unexplained(source)) == ["--a", "--b"]
