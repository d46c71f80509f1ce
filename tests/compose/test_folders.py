"""Folders in, a folder out: what PEFT and we compute with it, what is noted beside it, and what is refused."""

import json
import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor

import loramux
from compose.samples import added_logits, our_logits, peft_logits, save_lora
from formats.samples import edit_config, edit_tensors, snapshot
from loramux import compose_adapters
from loramux.compose.mergers import load_merger, merger_names
from loramux.errors import LoramuxError
from loramux.eval.loading import Loaded
from loramux.formats.peft import read_peft
from loramux.formats.scaling import site_scaling
from pico import build_pico

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
PAGE = Path(__file__).parent.parent.parent / "docs" / "compose.md"
STATIC = [name for name in merger_names() if name != "lorahub"]


def changes(folder: Path, weight: float = 1.0) -> dict[str, Tensor]:
    """The dense change of every linear, in fp64."""
    tensors = read_peft(folder)
    ranks = {path: site.rank for path, site in tensors.sites.items()}
    scales = site_scaling(tensors.config, ranks)
    return {
        path: weight * scales[path][2] * site.b.double().T @ site.a.double()
        for path, site in tensors.sites.items()
    }


def summed(*many: dict[str, Tensor]) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    for one in many:
        for path, change in one.items():
            total[path] = total[path] + change if path in total else change
    return total


@pytest.fixture
def mixed(tmp_path: Path) -> list[Path]:
    """Three adapters of one base that differ in rank, alpha, patterns, rsLoRA and targets."""
    model = build_pico("llama")
    return [
        save_lora(model, tmp_path / "a", rank=4, alpha=8, seed=1),
        save_lora(
            model, tmp_path / "b", rank=3, alpha=5, seed=2, targets=("q_proj", "v_proj", "up_proj"),
            rank_pattern={"up_proj": 6}, alpha_pattern={"v_proj": 12},
        ),
        save_lora(
            model, tmp_path / "c", rank=5, alpha=4, seed=3, targets=("down_proj", "q_proj"),
            use_rslora=True,
        ),
    ]  # fmt: skip


@pytest.mark.parametrize("name", STATIC)
def test_peft_computes_with_the_merged_adapter_what_we_do(name: str, mixed, tmp_path: Path):
    options = {"density": 0.5} if name in ("ties", "dare_linear", "dare_ties") else {}
    compose_adapters(name, mixed, tmp_path / "out", seed=2, **options)
    model = build_pico("llama")
    dense = added_logits(model, changes(tmp_path / "out"))
    torch.testing.assert_close(peft_logits(model, tmp_path / "out"), dense, **CLOSE)
    torch.testing.assert_close(our_logits(model, tmp_path / "out"), dense, **CLOSE)
    assert (dense - added_logits(model, {})).abs().max() > 0.01


@pytest.mark.parametrize("weights", [(0.7, 0.3, -0.5), None])
def test_cat_of_adapters_that_differ_in_everything_is_the_weighted_sum(
    weights, mixed, tmp_path: Path
):
    compose_adapters("cat", mixed, tmp_path / "out", weights=weights)
    used = weights or (1 / 3, 1 / 3, 1 / 3)
    wanted = summed(*(changes(f, w) for f, w in zip(mixed, used, strict=True)))
    found = changes(tmp_path / "out")
    assert found.keys() == wanted.keys()
    for path, change in wanted.items():
        torch.testing.assert_close(found[path], change, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("family", ["gpt2", "phi3", "gemma"])
def test_other_families_merge_and_load_in_peft(family: str, tmp_path: Path):
    model = build_pico(family)
    given = [save_lora(model, tmp_path / f"{i}", rank=2 + i, seed=i) for i in range(2)]
    compose_adapters("svd", given, tmp_path / "out", rank=5, weights=(0.6, 0.4))
    wanted = summed(changes(given[0], 0.6), changes(given[1], 0.4))
    dense = added_logits(model, wanted)
    torch.testing.assert_close(peft_logits(model, tmp_path / "out"), dense, **CLOSE)
    torch.testing.assert_close(our_logits(model, tmp_path / "out"), dense, **CLOSE)


def test_a_merged_adapter_has_scale_one_everywhere(mixed, tmp_path: Path):
    compose_adapters("loralego", mixed, tmp_path / "out")
    tensors = read_peft(tmp_path / "out")
    assert tensors.config["use_rslora"] is False
    ranks = {path: site.rank for path, site in tensors.sites.items()}
    assert {entry[2] for entry in site_scaling(tensors.config, ranks).values()} == {1.0}
    assert len(set(ranks.values())) > 1  # every linear its own rank, by the adapters that have it


def test_half_precision_inputs_are_merged_in_wide_precision(tmp_path: Path):
    model = build_pico("llama")
    given = [save_lora(model, tmp_path / f"{i}", seed=i) for i in range(2)]
    for folder in given:
        edit_tensors(
            folder, lambda t: t.update({k: v.bfloat16().contiguous() for k, v in t.items()})
        )
    compose_adapters("cat", given, tmp_path / "out")
    assert all(site.a.dtype == torch.float32 for site in read_peft(tmp_path / "out").sites.values())
    for path, change in summed(*(changes(f, 0.5) for f in given)).items():
        torch.testing.assert_close(changes(tmp_path / "out")[path], change, rtol=1e-5, atol=1e-7)


def test_what_went_in_and_what_came_out_is_noted_beside_it(mixed, tmp_path: Path):
    made = compose_adapters("svd", mixed, tmp_path / "out", rank=3, weights=(1, 2, 3), seed=9)
    noted = json.loads((tmp_path / "out" / "compose.json").read_text())
    assert noted == {key: value for key, value in made.items() if key != "out"}
    assert (noted["method"], noted["weights"], noted["seed"]) == ("svd", [1, 2, 3], 9)
    assert [entry["digest"] for entry in noted["inputs"]] == [read_peft(f).digest for f in mixed]
    assert [entry["name"] for entry in noted["inputs"]] == ["a", "b", "c"]
    assert noted["rank"] == {"min": 3, "max": 3, "mean": 3.0}
    assert noted["versions"]["torch"] == torch.__version__
    whole = summed(*(changes(f, w) for f, w in zip(mixed, (1, 2, 3), strict=True)))
    found = changes(tmp_path / "out")
    for row in noted["sites"]:
        path = row["site"]
        true = float((found[path] - whole[path]).norm() / whole[path].norm())
        assert row["distance"] == pytest.approx(true, rel=1e-4)
        assert row["error"] == pytest.approx(true, rel=1e-4)


def test_the_similarity_of_the_inputs_is_the_cosine_of_their_products(mixed, tmp_path: Path):
    made = compose_adapters("cat", mixed, tmp_path / "out")["similarity"]
    dense = [changes(folder) for folder in mixed]
    flat = [
        torch.cat(
            [
                d[p].flatten() if p in d else torch.zeros_like(dense[0][p]).flatten()
                for p in dense[0]
            ]
        )
        for d in dense
    ]
    for i in range(3):
        for j in range(3):
            cosine = float(flat[i] @ flat[j] / (flat[i].norm() * flat[j].norm()))
            assert made["overall"][i][j] == pytest.approx(cosine, abs=1e-5)
    assert made["names"] == ["a", "b", "c"]
    assert made["by_site"]["model.layers.0.mlp.gate_proj"][1] == [0.0, 0.0, 0.0]


def test_one_folder_may_be_given_twice(mixed, tmp_path: Path):
    compose_adapters("cat", [mixed[0], mixed[0]], tmp_path / "out")
    for path, change in changes(mixed[0]).items():
        torch.testing.assert_close(changes(tmp_path / "out")[path], change, rtol=1e-5, atol=1e-7)


def test_a_linear_draws_its_own_numbers_whatever_else_is_merged(tmp_path: Path):
    model = build_pico("llama")
    few = [save_lora(model, tmp_path / f"{i}", seed=i, targets=("q_proj",)) for i in (0, 1)]
    other = save_lora(model, tmp_path / "other", seed=5, targets=("down_proj", "k_proj"))
    compose_adapters("dare_linear", few, tmp_path / "one", seed=1, weights=(0.5, 0.5))
    compose_adapters("dare_linear", [*few, other], tmp_path / "two", seed=1, weights=(0.5, 0.5, 1))
    one, two = changes(tmp_path / "one"), changes(tmp_path / "two")
    assert all(torch.equal(two[path], change) for path, change in one.items())


def test_linears_with_equal_rows_do_not_lose_the_same_entries(tmp_path: Path):
    given = save_lora(build_pico("llama"), tmp_path / "in", targets=("q_proj",))

    def repeat(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if "layers.0" in name]:
            tensors[name.replace("layers.0", "layers.1")] = tensors[name].clone()

    edit_tensors(given, repeat)
    compose_adapters("dare_linear", [given], tmp_path / "out", rank=32)
    first, second = changes(tmp_path / "out").values()
    assert not torch.allclose(first, second, atol=1e-4)


def test_a_rank_above_what_there_is_is_clamped_with_a_warning(mixed, tmp_path: Path, caplog):
    with caplog.at_level(logging.WARNING, "loramux"):
        made = compose_adapters("loralego", mixed, tmp_path / "out", rank=9)
    assert "rank 9 was asked for" in caplog.text
    assert made["rank"]["max"] == 9 and made["rank"]["min"] == 4


# --- The base -------------------------------------------------------------------------------------


def test_the_base_is_noted_and_checked_when_the_merge_is_loaded(mixed, tmp_path: Path):
    compose_adapters("cat", mixed, tmp_path / "out")
    loramux.load(build_pico("llama"), tmp_path / "out").detach()
    with pytest.raises(ValueError, match="was trained on another base"):
        loramux.load(build_pico("llama", seed=1), tmp_path / "out")


def test_the_base_is_noted_even_where_no_input_has_all_targets(tmp_path: Path):
    model = build_pico("llama")
    given = [save_lora(model, tmp_path / name, targets=(name,)) for name in ("q_proj", "down_proj")]
    compose_adapters("cat", given, tmp_path / "out")
    loramux.load(build_pico("llama"), tmp_path / "out").detach()
    with pytest.raises(ValueError, match="was trained on another base"):
        loramux.load(build_pico("llama", seed=1), tmp_path / "out")


@pytest.mark.parametrize("targets", [None, ("q_proj", "up_proj")])
def test_adapters_of_different_bases_are_refused(targets, tmp_path: Path):
    one = save_lora(build_pico("llama"), tmp_path / "one")
    two = save_lora(build_pico("llama", seed=1), tmp_path / "two", targets=targets)
    with pytest.raises(LoramuxError, match="were trained on different bases"):
        compose_adapters("cat", [one, two], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_adapters_of_other_shapes_are_refused(tmp_path: Path):
    one = save_lora(build_pico("llama"), tmp_path / "one", record=False)
    wide = build_pico("llama", intermediate_size=64)
    two = save_lora(wide, tmp_path / "two", record=False)
    with pytest.raises(LoramuxError, match="48 -> 32 in .* and 64 -> 32 in .* one base"):
        compose_adapters("cat", [one, two], tmp_path / "out")


def test_a_given_base_is_compared_with_every_adapter(tmp_path: Path, tokenizer):
    model = build_pico("llama")
    given = [save_lora(model, tmp_path / f"{i}", seed=i, targets=("q_proj",)) for i in range(2)]
    other = Loaded(build_pico("llama", seed=1), tokenizer, None)
    with pytest.raises(ValueError, match="was trained on another base"):
        compose_adapters("cat", given, tmp_path / "out", base=other)
    (given[0] / "loramux.json").unlink()
    (given[1] / "loramux.json").unlink()
    compose_adapters("cat", given, tmp_path / "out", base=Loaded(model, tokenizer, None))
    with pytest.raises(ValueError, match="was trained on another base"):
        loramux.load(build_pico("llama", seed=1), tmp_path / "out")


# --- Refusals -------------------------------------------------------------------------------------


def test_dora_is_refused_with_the_reason(tmp_path: Path):
    model = build_pico("llama")
    plain = save_lora(model, tmp_path / "plain")
    dora = save_lora(model, tmp_path / "dora", use_dora=True)
    with pytest.raises(LoramuxError, match="is a DoRA adapter: .* not a sum of ranks"):
        compose_adapters("cat", [plain, dora], tmp_path / "out")


def test_a_bias_on_b_is_refused_with_the_reason(tmp_path: Path):
    folder = save_lora(build_pico("llama"), tmp_path / "biased")
    edit_config(folder, lora_bias=True)
    with pytest.raises(ValueError, match="a bias on B; re-train with lora_bias=false"):
        compose_adapters("cat", [folder], tmp_path / "out")


def test_a_mixture_is_refused_and_pointed_to_lower(tmp_path: Path):
    handle = loramux.attach(build_pico("llama"), loramux.MiLoRAConfig(r=2))
    handle.save(tmp_path / "mix")
    with pytest.raises(LoramuxError, match="loramux lower"):
        compose_adapters("cat", [tmp_path / "mix"], tmp_path / "out")


@pytest.mark.parametrize(
    ("method", "more", "message"),
    [
        ("tise", {}, "did you mean 'ties'"),
        ("cat", {"rank": 4}, "cat has no option 'rank'; it has no options"),
        ("ties", {"densty": 0.1}, "did you mean 'density'"),
        ("cat", {"weights": (1, 2)}, "2 weights for 1 adapters"),
        ("cat", {"weights": (float("nan"),)}, "must be finite numbers"),
        ("loralego", {"weights": (-1.0,)}, "must be numbers above 0"),
        ("cat", {"lam": float("inf")}, "lambda must be a finite number"),
        ("cat", {"lam": 0.0}, "changes nothing"),
        ("svd", {"rank": 0}, "rank must be at least 1"),
        ("cat", {"seed": -1}, "seed must be at least 0"),
        ("lorahub", {}, "give a base and data"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_written(
    method: str, more: dict, message: str, tmp_path: Path
):
    folder = save_lora(build_pico("llama"), tmp_path / "a", targets=("q_proj",))
    with pytest.raises(ValueError, match=message):
        compose_adapters(method, [folder], tmp_path / "out", **more)
    assert not (tmp_path / "out").exists()


def test_no_adapters_and_no_folder_are_refused(tmp_path: Path):
    with pytest.raises(LoramuxError, match="no adapter was given"):
        compose_adapters("cat", [], tmp_path / "out")
    with pytest.raises(LoramuxError, match="no adapter folder at 'nowhere'"):
        compose_adapters("cat", ["nowhere"], tmp_path / "out")


def test_a_full_folder_is_replaced_only_by_force_and_only_if_it_holds_an_adapter(tmp_path: Path):
    model = build_pico("llama")
    given = save_lora(model, tmp_path / "a", targets=("q_proj",))
    out = save_lora(model, tmp_path / "out", targets=("v_proj",))
    before = snapshot(out)
    with pytest.raises(LoramuxError, match="is not empty; choose another --out"):
        compose_adapters("cat", [given], out)
    assert snapshot(out) == before
    compose_adapters("cat", [given], out, force=True)
    assert "model.layers.0.self_attn.q_proj" in read_peft(out).sites
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "text").write_text("years of work")
    with pytest.raises(LoramuxError, match="holds no adapter, so --force does not replace it"):
        compose_adapters("cat", [given], other, force=True)
    assert (other / "text").exists()


def test_every_merging_method_says_what_it_is():
    for name in merger_names():
        merger = load_merger(name)
        assert merger.name == name and merger.title and merger.rank
        assert merger.options() is not None
        assert f"`{name}`" in PAGE.read_text(encoding="utf-8")


def test_svd_is_pefts_svd_without_its_dense_matrix(tmp_path: Path):
    from peft import PeftModel

    model = build_pico("llama")
    given = [save_lora(model, tmp_path / f"{i}", rank=2 + i, alpha=3, seed=i) for i in range(2)]
    compose_adapters("svd", given, tmp_path / "out", rank=3, weights=(0.9, 0.4))
    theirs = PeftModel.from_pretrained(model, str(given[0]), adapter_name="a")
    theirs.load_adapter(str(given[1]), adapter_name="b")
    theirs.add_weighted_adapter(
        ["a", "b"], [0.9, 0.4], "merged", combination_type="svd", svd_rank=3
    )
    found = changes(tmp_path / "out")
    for path, change in found.items():
        layer = theirs.base_model.model.get_submodule(path)
        torch.testing.assert_close(
            layer.get_delta_weight("merged").double(), change, rtol=1e-4, atol=1e-5
        )


def test_a_single_adapter_is_still_merged_by_the_method_that_was_asked_for(tmp_path: Path):
    """PEFT turns every method into `linear` where there is one adapter."""
    given = save_lora(build_pico("llama"), tmp_path / "in", targets=("q_proj",))
    made = compose_adapters("ties", [given], tmp_path / "out", density=0.2, rank=32)
    assert made["method"] == "ties"
    for path, change in changes(given).items():
        kept = changes(tmp_path / "out")[path].abs() > 1e-6
        assert float(kept.float().mean()) == pytest.approx(0.2, abs=0.01)
        largest = change.abs().flatten().sort(descending=True).values[int(0.2 * change.numel()) - 1]
        assert float(change.abs()[kept].min()) >= float(largest) - 1e-6
