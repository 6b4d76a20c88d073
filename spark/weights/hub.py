"""Download from and upload to the Hugging Face hub."""

from pathlib import Path

from huggingface_hub import HfApi, snapshot_download

from spark.errors import FileError
from spark.weights.encoder import CONFIG, WEIGHTS

PREFIX = "hf-hub:"


def download(name: str) -> Path:
    """The folder of config.json and model.safetensors of `hf-hub:OWNER/NAME[@REVISION]`, downloaded where missing."""
    repo, _, revision = name.removeprefix(PREFIX).partition("@")
    try:
        return Path(snapshot_download(repo, revision=revision or None, allow_patterns=[CONFIG, WEIGHTS]))
    except (OSError, ValueError) as error:  # huggingface_hub's are of these kinds
        raise FileError(
            f"{PREFIX}{repo} could not be downloaded ({' '.join(str(error).split())[:300]}): check the name OWNER/NAME,"
            " connect to the network, and log in with `hf auth login` where it is private; or name a folder"
        ) from error


def push(folder: Path, repo: str, private: bool) -> str:
    """Upload a folder to the hub as OWNER/NAME, which is made where missing; returns its address."""
    api = HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=str(folder), commit_message=f"Upload {folder.name}")
    except (OSError, ValueError) as error:
        raise FileError(
            f"{folder} is written, but was not uploaded as {repo} ({' '.join(str(error).split())[:300]}): check the"
            " name OWNER/NAME, log in with `hf auth login`, and run the same command again"
        ) from error
    return f"https://huggingface.co/{repo}"
