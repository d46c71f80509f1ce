"""What the gateway checks serve: a tiny base whose adapters each make it say a word of their own, tenants and keys.

Why such adapters: whose weights made an answer can be read in the answer (see markers.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loramux.registry import Registry, Version
    from loramux.registry.checks import BaseShape
    from loramux.tenancy import Tenancy

ACTOR = "bench"
LOCAL = "local"


@dataclass(frozen=True)
class World:
    """`folders`: content number -> PEFT folder; content i of n names x v versions says the word `word(i)`."""

    home: Path
    shape: BaseShape
    folders: tuple[Path, ...]

    def publish(self, registry: Registry, content: int, name: str, **more: Any) -> Version:
        from loramux.registry.checks import check_upload, from_folder

        with check_upload(from_folder(self.folders[content]), self.shape) as checked:
            return registry.publish(
                checked, **{"tenant": LOCAL, "name": name, "actor": ACTOR, **more}
            )


def word(content: int) -> str:
    """What the base says with this content."""
    return f"m{content}"


def prepare(home: Path, contents: int) -> World:
    """A base under `home/base`, with so many contents under `home/adapters`."""
    from loramux.bench.markers import build_base, write_marked
    from loramux.registry.checks import base_shape

    model = build_base(contents)
    model.save_pretrained(home / "base")
    _tokenizer(contents).save_pretrained(home / "base")
    marked = write_marked(model, home / "adapters", [f"c{i}" for i in range(contents)], 1)
    return World(home, base_shape(home / "base"), tuple(each.folder for each in marked))


def add_tenants(tenancy: Tenancy, names: Sequence[str], **limits: int | None) -> dict[str, str]:
    """A tenant and a key for each name; limits that are not given do not exist."""
    from loramux.tenancy.caller import SCOPES, Limits

    allowed = Limits.from_dict({**Limits.none().to_dict(), **limits})
    made = {}
    for name in names:
        tenancy.tenants.create(name, limits=allowed, actor=ACTOR)
        made[name] = tenancy.keys.create(name, scopes=list(SCOPES), actor=ACTOR).secret
    return made


def _tokenizer(contents: int) -> Any:
    """Words: w0, w1, ... for prompts, then one per content."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from loramux.bench.markers import WORDS

    words = [*(f"w{i}" for i in range(WORDS)), *(word(i) for i in range(contents))]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False)
