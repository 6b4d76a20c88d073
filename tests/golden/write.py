"""Write the golden files of the code as it is: python -m tests.golden.write [NAMES].

NAMES are those of JSON files beside this one, all without any. `files` makes the runs and models in files/ anew, which
otherwise stay as they are: they stand for what older versions have written.
"""

import argparse
import subprocess
import tempfile
import time
from pathlib import Path

from tests.golden import cases
from tests.golden.compare import HERE, as_text, origin


def commit() -> str:
    """The commit that is checked out, with + where something outside the golden tests differs from it."""

    def git(*arguments: str) -> str:
        run = subprocess.run(["git", *arguments], cwd=HERE, capture_output=True, text=True, check=True)
        return run.stdout.strip()

    # A commit that changes the golden tests alone computes what the one before it does.
    found = git("log", "-1", "--format=%H", "--", ":/", ":(exclude,top)tests/golden")
    changed = git("status", "--porcelain", "--", ":/", ":(exclude,top)tests/golden")
    return found + ("+" if changed else "")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", choices=[*cases.CASES, "files", []], help="what to write")
    parser.add_argument("--folder", type=Path, default=HERE, help="where JSON files go (beside this file)")
    parser.add_argument("--threads", type=int, default=cases.THREADS, help="of the runs (%(default)s)")
    options = parser.parse_args()
    cases.THREADS = options.threads
    if "files" in options.names:
        with tempfile.TemporaryDirectory() as folder:
            cases.write_files(Path(folder))
    for name in [name for name in options.names or cases.CASES if name in cases.CASES]:
        found = {}
        for case, compute in cases.CASES[name].items():
            with tempfile.TemporaryDirectory() as folder:
                since = time.perf_counter()
                found[case] = compute(Path(folder))
                print(f"{name} {case}: {time.perf_counter() - since:.1f} s", flush=True)
        whole = {
            "origin": origin(commit(), options.threads),
            "tolerance": cases.TOLERANCES[name],
            "cases": found,
        }
        options.folder.mkdir(parents=True, exist_ok=True)
        (options.folder / f"{name}.json").write_text(as_text(whole) + "\n")


if __name__ == "__main__":
    main()
