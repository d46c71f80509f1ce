"""What retrieved sets do to the model: Selection, Mixture and Fusion in the engine against plain matrices.

Letters: O output width, I input width.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import loramux
from engine.helpers import merged, plain_logits, read_deltas, record_samples, run_all, write_peft
from loramux.engine.engine import Engine
from loramux.engine.request import Request, SamplingParams
from loramux.retrieval.errors import RetrievalError
from loramux.retrieval.fusing import fuse, fused_folder, fusion_id
from oracles import lora_retriever as oracle
from pico import build_pico, pico_tokenizer

PROMPT = (10, 20, 30, 40, 50, 60)
ALIKE = {"r": 4, "lora_alpha": 8}
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """a to d alike; `zero` changes next to nothing; `odd` has another rank and scale; `attention` few linears."""
    root = tmp_path_factory.mktemp("adapters")
    made = {name: write_peft(root / name, seed=i, **ALIKE) for i, name in enumerate("abcd")}
    made["zero"] = with_tensors(made["a"], root / "zero", silenced)
    made["odd"] = write_peft(root / "odd", seed=9, r=2, lora_alpha=6)
    made["attention"] = write_peft(root / "attention", seed=8, target_modules=["q_proj"], **ALIKE)
    return made


def silenced(name: str, tensor: Tensor) -> Tensor:
    """B of (all but) zero: one of exact zeros counts as never trained and is refused."""
    return 1e-20 * tensor if "lora_B" in name else tensor


def with_tensors(source: Path, target: Path, change: Any) -> Path:
    target.mkdir()
    (target / "adapter_config.json").write_bytes((source / "adapter_config.json").read_bytes())
    tensors = load_file(source / WEIGHTS)
    changed = {name: change(name, t).contiguous() for name, t in tensors.items()}
    save_file(changed, target / WEIGHTS, metadata={"format": "pt"})
    return target


def logits_of(
    folders: Mapping[str, Path], sets: list[dict[str, float] | str | None], prompts: Any = None
) -> list[Tensor]:
    """Logits after the prompt for every set, all in one batch of the engine."""
    engine = Engine(build_pico("llama"), tokenizer=pico_tokenizer())
    for name, folder in folders.items():
        engine.add_adapter(name, folder)
    seen = record_samples(engine)
    params = SamplingParams(max_tokens=1, ignore_eos=True)
    prompts = prompts or [PROMPT] * len(sets)
    requests = [
        Request(prompt=prompt, adapter=own, params=params, id=str(i))
        for i, (own, prompt) in enumerate(zip(sets, prompts, strict=True))
    ]
    run_all(engine, requests)
    engine.close()
    return [seen[str(i), 0, len(prompt)] for i, prompt in enumerate(prompts)]


def dense_logits(deltas: Mapping[str, Tensor], prompt: tuple[int, ...] = PROMPT) -> Tensor:
    """The base with these changes added to its weights."""
    model = build_pico("llama")
    with torch.no_grad():
        for path, delta_OI in deltas.items():
            weight = model.get_submodule(path).weight
            assert isinstance(weight, Tensor)
            weight += delta_OI.to(weight)
    return plain_logits(model, prompt, len(prompt))[0]


def close(left: Tensor, right: Tensor) -> None:
    torch.testing.assert_close(left, right, atol=1e-5, rtol=1e-5)


def factors(folder: Path, path: str) -> tuple[np.ndarray, np.ndarray]:
    tensors = load_file(folder / WEIGHTS)
    return tuple(  # type: ignore[return-value]
        tensors[f"base_model.model.{path}.lora_{part}.weight"].double().numpy() for part in "AB"
    )


def fused_deltas(folders: list[Path], scale: float) -> dict[str, Tensor]:
    """The oracle's fusion at every linear, as a change of its weight."""
    found = {}
    for path in read_deltas(folders[0], build_pico("llama")):
        pairs = [factors(folder, path) for folder in folders]
        a_RI, b_OR = oracle.fusion([a for a, _ in pairs], [b for _, b in pairs], scale)
        found[path] = torch.from_numpy(b_OR @ a_RI)
    return found


def test_one_hit_is_the_adapter_itself_under_every_rule(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    one = fuse([folders["b"]], tmp_path / "one")
    many = fuse([folders["b"]] * 3, tmp_path / "many")
    plain, mixed, fused, fused3 = logits_of(
        {**folders, "one": one, "many": many}, ["b", {"b": 1.0}, "one", "many"]
    )
    expected = plain_logits(merged({folders["b"]: 1.0}), PROMPT, len(PROMPT))[0]
    for found in (plain, mixed, fused, fused3):
        close(found, expected)


def test_a_batch_of_different_mixtures_equals_each_sum(folders: dict[str, Path]) -> None:
    sets = [("a", "b", "c"), ("b", "c", "d"), ("a", "d", "odd"), ("attention", "b", "odd")]
    prompts = [PROMPT, PROMPT[:3], PROMPT[::-1], (7, 8, 9)]
    found = logits_of(folders, [dict.fromkeys(s, 1 / 3) for s in sets], prompts)
    for logits, ids, prompt in zip(found, sets, prompts, strict=True):
        model = merged({folders[id]: 1 / 3 for id in ids})
        close(logits, plain_logits(model, prompt, len(prompt))[0])


def test_a_mixture_is_the_papers_sum_and_its_form_in_rank_space(folders: dict[str, Path]) -> None:
    path = "model.layers.0.self_attn.q_proj"
    pairs = [factors(folders[name], path) for name in "abcd"]
    a, b = [p[0] for p in pairs], [p[1] for p in pairs]
    _, m_BP = oracle.mapping([("a", "b", "c"), ("b", "c", "d")])
    x_BLI = np.random.default_rng(0).standard_normal((2, 5, a[0].shape[1]))
    scales = [2.0] * 4
    y = oracle.mixture(x_BLI, m_BP, a, b, scales)
    np.testing.assert_allclose(
        y, oracle.mixture_in_rank_space(x_BLI, m_BP, a, b, scales), atol=1e-12
    )
    base = build_pico("llama")
    deltas = [read_deltas(folders[name], base)[path].numpy() for name in "bcd"]
    np.testing.assert_allclose(y[1], x_BLI[1] @ np.mean(deltas, axis=0).T, atol=1e-9)


def test_fusion_is_the_product_of_means_and_not_the_mixture(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    three = [folders[name] for name in "abc"]
    fused = fuse(three, tmp_path / "fused")
    by_fusion, by_mixture = logits_of(
        {**folders, "fused": fused}, ["fused", dict.fromkeys("abc", 1 / 3)]
    )
    close(by_fusion, dense_logits(fused_deltas(three, 2.0)))
    assert (by_fusion - by_mixture).abs().max() > 1e-3


def test_with_one_factor_shared_fusion_is_the_mixture(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    shared = load_file(folders["a"] / WEIGHTS)
    for part in ("lora_A", "lora_B"):

        def change(name: str, tensor: Tensor, part: str = part) -> Tensor:
            return shared[name] if part in name else tensor

        own = [with_tensors(folders[n], tmp_path / f"{n}{part}", change) for n in "abc"]
        fused = fuse(own, tmp_path / part)
        by_fusion, by_mixture = logits_of(
            {"x": own[0], "y": own[1], "z": own[2], "fused": fused},
            ["fused", dict.fromkeys("xyz", 1 / 3)],
        )
        close(by_fusion, by_mixture)


def test_of_independent_adapters_fusion_is_smaller_by_the_root_of_k() -> None:
    draw = np.random.default_rng(0)
    k, r, size = 4, 8, 256
    a = [draw.standard_normal((r, size)) for _ in range(k)]
    b = [draw.standard_normal((size, r)) for _ in range(k)]
    fused_a, fused_b = oracle.fusion(a, b, 1.0)
    mean = np.mean([bj @ aj for aj, bj in zip(a, b, strict=True)], axis=0)
    ratio = np.linalg.norm(fused_b @ fused_a) / np.linalg.norm(mean)
    assert ratio == pytest.approx(1 / np.sqrt(k), rel=0.05)


def test_a_row_does_not_see_the_others_nor_the_order_of_a_set(folders: dict[str, Path]) -> None:
    first, second = dict.fromkeys("abc", 1 / 3), dict.fromkeys("bcd", 1 / 3)
    alone = logits_of(folders, [first])[0]
    found = logits_of(folders, [first, second, None])
    turned = logits_of(folders, [None, second, dict.fromkeys("cab", 1 / 3)])
    close(found[0], alone)
    close(turned[2], alone)
    close(turned[1], found[1])
    close(turned[0], found[2])


def test_an_adapter_that_adds_nothing_only_thins_the_others(folders: dict[str, Path]) -> None:
    mixed, alone, base = logits_of(
        folders, [dict.fromkeys(("a", "b", "zero"), 1 / 3), "zero", None]
    )
    close(mixed, plain_logits(merged({folders["a"]: 1 / 3, folders["b"]: 1 / 3}), PROMPT, 6)[0])
    close(alone, base)


def test_unequal_scales_and_ranks_are_refused_or_handled_as_asked(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    pair = [folders["a"], folders["odd"]]
    with pytest.raises(RetrievalError, match="different scales") as error:
        fuse(pair, tmp_path / "refused")
    assert error.value.code == "unequal_scales" and not (tmp_path / "refused").exists()
    with pytest.raises(RetrievalError, match="different ranks") as error:
        fuse(pair, tmp_path / "refused", fold_scales=True)
    assert error.value.code == "unequal_ranks" and not (tmp_path / "refused").exists()
    folder = fuse(pair, tmp_path / "both", fold_scales=True, pad_ranks=True)
    path = "model.layers.1.mlp.up_proj"
    (a1, b1), (a2, b2) = factors(pair[0], path), factors(pair[1], path)
    a2, b2 = np.pad(a2, ((0, 2), (0, 0))), np.pad(b2, ((0, 0), (0, 2)))
    expected = (2**0.5 * b1 + 3**0.5 * b2) @ (2**0.5 * a1 + 3**0.5 * a2) / 4
    np.testing.assert_allclose(
        read_deltas(folder, build_pico("llama"))[path].numpy(), expected, atol=1e-5
    )


def test_a_missing_linear_counts_as_zero_and_the_others_keep_their_share(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = fuse([folders["a"], folders["attention"]], tmp_path / "fused")
    path = "model.layers.0.mlp.up_proj"
    a, b = factors(folders["a"], path)
    found = read_deltas(folder, build_pico("llama"))[path].numpy()
    np.testing.assert_allclose(found, 2.0 * (b / 2) @ (a / 2), atol=1e-5)


def test_a_fusion_is_made_once_per_set_of_contents(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    name, folder = fused_folder(tmp_path, {"d1": folders["a"], "d2": folders["b"]})
    marked = (folder / WEIGHTS).stat().st_mtime_ns
    again = fused_folder(tmp_path, {"d2": folders["b"], "d1": folders["a"]})
    assert again == (name, folder) and (folder / WEIGHTS).stat().st_mtime_ns == marked
    assert name == fusion_id(["d2", "d1"]) != fusion_id(["d1"])
    with pytest.raises(RetrievalError, match="nothing to fuse"):
        fused_folder(tmp_path, {})


def test_a_fusion_is_a_plain_adapter(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = fuse([folders["a"], folders["b"]], tmp_path / "fused")
    model: nn.Module = build_pico("llama")
    handle = loramux.load(model, folder)
    assert handle.adapters["default"].method.servability == "static"
    handle.detach()
