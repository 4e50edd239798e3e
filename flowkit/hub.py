"""Models by their names: ``hub:owner/name`` of the Hugging Face hub, ``flowkit:name`` of flowkit.

Every other text is a folder, so no mistyped path is looked for on the hub. A pushed folder holds a
`CONFIG` and no ``config.yaml``, see `flowkit.modules.pushed`.
"""

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flowkit.rules import NAMED, did_you_mean

CONFIG, WEIGHTS = "config.json", "model.safetensors"
SHIPPED = Path(__file__).parent / "weights"
FILES = ["*.json", "*.safetensors", "*.md", "samples.png"]  # what is sent and fetched

FIXES = {
    "GatedRepoError": "ask its owner for access on its page",
    "LocalEntryNotFoundError": "it is not in the cache, so the network is needed",
    "LocalTokenNotFoundError": "log in by `hf auth login`, or give token=",
    "RepositoryNotFoundError": "there is no such repository, or it needs `hf auth login`",
}


def shipped() -> list[str]:
    """Return the names of the models that are part of flowkit, each loaded as ``flowkit:name``."""
    return sorted(file.parent.name for file in SHIPPED.glob(f"*/{CONFIG}"))


def is_pushed(folder: str | Path) -> bool:
    """Return True for a folder with a `CONFIG` that is no run folder."""
    folder = Path(folder)
    return (folder / CONFIG).is_file() and not (folder / "config.yaml").is_file()


def folder_of(place: str | Path, **options: Any) -> Path:
    """Return the folder of a run that is named by a folder, ``hub:owner/name`` or ``flowkit:name``.

    A model of the hub is downloaded to the cache of huggingface_hub, or found there.

    Args:
        place: The name.
        **options: Of ``huggingface_hub.snapshot_download``, such as ``revision``.

    Raises:
        ValueError: If the name is malformed, or flowkit has no such model.
        OSError: If the hub does not give the model.

    >>> folder_of("runs/mine").name
    'mine'
    """
    text = str(place)
    if not text.startswith(("hub:", "flowkit:")):
        return Path(place)
    if not NAMED.fullmatch(text):
        raise ValueError(f"a model must be named hub:owner/name or flowkit:name, got {text}")
    name = text.partition(":")[2]
    if text.startswith("flowkit:"):
        known = shipped()
        if name not in known:
            listed = f"; there are {', '.join(known)}" if known else "; this flowkit has none"
            near = did_you_mean(name, known)
            raise ValueError(f"flowkit: must name a model of flowkit, got {name}{near or listed}")
        return SHIPPED / name
    from huggingface_hub import snapshot_download

    with _one_line(text):
        return Path(snapshot_download(name, **{"allow_patterns": FILES, **options}))


def results_of(place: str | Path) -> Path:
    """Return the folder for results of a run: its own, but for pushed models one of ``runs``.

    So a pushed model stays as it is, wherever it lies.

    >>> results_of("runs/mine").as_posix(), results_of("hub:owner/name").as_posix()
    ('runs/mine', 'runs/hub-owner--name')
    """
    text = str(place)
    if NAMED.fullmatch(text):
        return Path("runs", text.replace(":", "-").replace("/", "--"))
    if is_pushed(place):
        whole = Path(place).resolve()
        return Path("runs", f"pushed-{whole.name}-{zlib.crc32(str(whole).encode()):08x}")
    return Path(place)


def upload(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    branch: str | None = None,
    create_pr: bool | None = None,
    commit_message: str = "Push a model of flowkit",
) -> str:
    """Send a pushed folder to the hub, whose repository is made if there is none.

    Args:
        folder: The folder.
        repo_id: ``owner/name``, also as ``hub:owner/name``.
        private: Whether a new repository is private; None is the owner's default.
        token: Token of the hub; None takes the one that is logged in.
        branch: Branch of the repository; None is its main branch.
        create_pr: Whether to open a pull request instead.
        commit_message: Message of the commit.

    Returns:
        Address of the commit.

    Raises:
        OSError: If the hub does not take the model.
    """
    from huggingface_hub import HfApi

    name = repo_id.removeprefix("hub:")
    check_name(name, "repo_id")
    with _one_line(f"hub:{name}"):
        api = HfApi(token=token)
        found = api.create_repo(name, private=private, exist_ok=True).repo_id
        if branch is not None:
            api.create_branch(found, branch=branch, exist_ok=True)
        sent = api.upload_folder(
            repo_id=found,
            folder_path=folder,
            revision=branch,
            create_pr=create_pr,
            commit_message=commit_message,
            allow_patterns=FILES,
            ignore_patterns=["earlier-*"],  # set aside
        )
    return str(sent.commit_url)


def check_name(name: str, argument: str) -> None:
    """Require a name of the hub.

    Raises:
        ValueError: If it is not ``owner/name``.
    """
    if not NAMED.fullmatch(f"hub:{name}"):
        raise ValueError(f"{argument} must be owner/name on the hub, got {name}")


@contextmanager
def _one_line(place: str) -> Iterator[None]:
    """Give errors of the hub, which are of a dozen kinds, one line."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise  # of the disk
        kind = type(error).__name__
        words = FIXES.get(kind) or " ".join(str(error).split())[:300] or kind
        raise OSError(f"{place} must be reachable, got {kind}: {words}") from error
