"""What every test gets: one thread, fixed seeds, no network, and tiny models made on the spot.

Why here: the environment must be set before torch or transformers are imported anywhere.
"""

import os
import shutil
import tempfile

# Digests and models cached by tests must not land among the user's. One folder for all workers: compiling kernels takes
# longer than most tests, and a worker inherits what the process that started it has set.
if "LORAMUX_TESTS_CACHE" not in os.environ:
    os.environ["LORAMUX_TESTS_CACHE"] = tempfile.mkdtemp(prefix="loramux-tests-")
    os.environ["LORAMUX_TESTS_CACHE_OF"] = str(os.getpid())
os.environ["XDG_CACHE_HOME"] = os.environ["LORAMUX_TESTS_CACHE"]
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from pico import build_pico, pico_tokenizer


def pytest_unconfigure(config: pytest.Config) -> None:
    if os.environ["LORAMUX_TESTS_CACHE_OF"] == str(os.getpid()):
        shutil.rmtree(os.environ["LORAMUX_TESTS_CACHE"], ignore_errors=True)


@pytest.fixture(scope="session", autouse=True)
def one_thread_and_deterministic() -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Each test starts from the same global seed, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def pico_model() -> Callable[..., PreTrainedModel]:
    """Factory of fresh models, free to modify: `pico_model("llama", seed=1, dtype=...)`."""
    return build_pico


@pytest.fixture
def pico() -> PreTrainedModel:
    """A fresh Llama: the family to use where the family does not matter."""
    return build_pico("llama")


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per character; shared, do not modify."""
    return pico_tokenizer()
