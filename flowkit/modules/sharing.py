"""`Shared`: modules are saved to, loaded from and sent to the places of huggingface_hub."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self, cast

from flowkit import hub
from flowkit.modules import pushed
from flowkit.modules.card import card
from flowkit.modules.trust import trusting


class Shared:
    """Methods with the names and arguments of huggingface_hub's ``ModelHubMixin``.

    Two things differ. A model of the hub is ``hub:owner/name``, so no mistyped path is downloaded.
    The configuration is that of a run, and builds only what flowkit lists or you trust.
    """

    configuration: Mapping[str, Any] | None = None
    """Configuration of the run or the folder that the module was loaded from."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        trust: Sequence[str] = (),
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
    ) -> Self:
        """Load a module, in ``eval`` mode on the CPU.

        Args:
            pretrained_model_name_or_path: A folder that `save_pretrained` or ``flowkit push``
                wrote, a run folder, ``hub:owner/name`` or ``flowkit:name``.
            trust: Names of other classes that the configuration may name, see `load_run`.
            force_download: Whether to download again what is in the cache.
            token: Token of the hub; None takes the one that is logged in.
            cache_dir: Folder of the cache; None is that of huggingface_hub.
            local_files_only: Whether to take the model from the cache only.
            revision: Branch, tag or commit on the hub.

        Raises:
            TypeError: If the module is of another class than this one.
            ValueError, RuntimeError, OSError: As `load_run`.
        """
        from flowkit.modules.checkpoints import load_run  # it builds modules of this class

        options = {"force_download": force_download, "token": token, "cache_dir": cache_dir}
        options |= {"local_files_only": local_files_only, "revision": revision}
        found = load_run(hub.folder_of(pretrained_model_name_or_path, **options), trust=trust)
        if not isinstance(found, cls):
            raise TypeError(
                f"{pretrained_model_name_or_path} must hold a {cls.__name__}, got a "
                f"{type(found).__name__}; FlowModule.from_pretrained takes any"
            )
        return found

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        config: Mapping[str, Any] | None = None,
        dtype: str = "float32",
        license: str | None = None,
        trust: Sequence[str] = (),
        repo_id: str | None = None,
        push_to_hub: bool = False,
        **push_to_hub_kwargs: Any,
    ) -> str | None:
        """Write weights, configuration and model card to a folder, see `flowkit.modules.pushed`.

        A module that was loaded remembers its configuration. That of a module made in Python is
        given as ``config``, and is checked: the module that it builds must have the same parts.

        Args:
            save_directory: A new or empty folder, or one of the same weights.
            config: The module's class and arguments, as in the ``module`` of a run:
                ``{"_target_": "flowkit.modules.ConditionalFlowMatching", "velocity": {...}}``.
            dtype: ``"float32"``, ``"float16"`` or ``"bfloat16"``: type of the numbers in the file.
            license: License of the weights, as the hub names it; an existing card is kept.
            trust: Names of your own classes in ``config``.
            repo_id: ``owner/name`` on the hub; None takes the name of the folder.
            push_to_hub: Whether to send the folder to the hub, too.
            **push_to_hub_kwargs: Arguments of `flowkit.hub.upload`.

        Returns:
            Address of the commit, if the folder was sent.

        Raises:
            ValueError: If the configuration is not known or does not fit, or the folder holds
                other files.
        """
        from flowkit.modules.checkpoints import described

        folder = Path(save_directory)
        pushed.check_place(folder, argument="save_directory")
        with trusting(trust):
            module, configuration = described(cast(Any, self), config, dtype)
        shared = pushed.portable(module, configuration, dtype)
        pushed.check_place(folder, shared["weights"]["hash"], "save_directory")
        text = None if (folder / "README.md").exists() else card(shared, str(folder), license)
        pushed.write(module, folder, shared, {"README.md": text})
        if not push_to_hub:
            return None
        return hub.upload(folder, repo_id or folder.name, **push_to_hub_kwargs)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        config: Mapping[str, Any] | None = None,
        dtype: str = "float32",
        license: str | None = None,
        trust: Sequence[str] = (),
        **options: Any,
    ) -> str:
        """Send the module to the hub.

        Args:
            repo_id: ``owner/name``; the repository is made if there is none.
            config: See `save_pretrained`.
            dtype: See `save_pretrained`.
            license: See `save_pretrained`.
            trust: See `save_pretrained`.
            **options: ``commit_message``, ``private``, ``token``, ``branch`` and ``create_pr``, see
                `flowkit.hub.upload`.

        Returns:
            Address of the commit.

        Raises:
            ValueError: If the name is not one of the hub, or as `save_pretrained`.
            OSError: If the hub does not take the model.
        """
        hub.check_name(repo_id.removeprefix("hub:"), "repo_id")
        with TemporaryDirectory() as made:
            folder = Path(made) / repo_id.rpartition("/")[2]
            self.save_pretrained(folder, config=config, dtype=dtype, license=license, trust=trust)
            return hub.upload(folder, repo_id, **options)
