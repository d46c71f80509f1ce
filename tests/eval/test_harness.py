"""The lm-evaluation-harness model: same numbers as its own `hf` model, offline, on a tiny base."""

import json

import pytest
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from loramux.errors import LoramuxError
from loramux.eval.harness import LoramuxLM
from pico import build_pico, pico_tokenizer

PAIRS = [
    ("what is this?", " a cat"),
    ("what is this?", " a dog"),
    ("what is this?", " no"),
    ("and", " that"),
    ("", "starts from nothing"),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    build_pico("llama").save_pretrained(folder)
    pico_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def ours(base):
    return LoramuxLM(base, device="cpu", dtype="float32", batch_size=2)


@pytest.fixture
def theirs(base):
    return HFLM(base, device="cpu", dtype="float32", batch_size=2)


def requests(kind, arguments):
    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


def test_the_model_is_registered_under_its_name():
    assert get_model("loramux") is LoramuxLM


def test_loglikelihoods_and_greedy_flags_equal_the_hf_model(ours, theirs):
    best = theirs.generate_until(requests("generate_until", [("and", {"max_gen_toks": 4})]))[0]
    pairs = requests("loglikelihood", [*PAIRS, ("and", best)])
    mine, expected = (lm.loglikelihood(pairs, disable_tqdm=True) for lm in (ours, theirs))
    assert [value for value, _ in mine] == pytest.approx([v for v, _ in expected], abs=1e-4)
    assert [flag for _, flag in mine] == [flag for _, flag in expected]
    assert mine[-1][1] is True


def test_rolling_loglikelihoods_equal_the_hf_model_also_beyond_its_length(base):
    options = {"device": "cpu", "dtype": "float32", "max_length": 16}
    texts = requests("loglikelihood_rolling", [("a short text",), ("words and words " * 4,)])
    mine, expected = (
        lm(base, **options).loglikelihood_rolling(texts, disable_tqdm=True)
        for lm in (LoramuxLM, HFLM)
    )
    assert mine == pytest.approx(expected, abs=1e-3)


def test_a_context_that_is_too_long_is_cut_as_the_hf_model_cuts_it(base):
    options = {"device": "cpu", "dtype": "float32", "max_length": 12}
    pair = requests("loglikelihood", [("a long context indeed", " an answer")])
    mine, expected = (
        lm(base, **options).loglikelihood(pair, disable_tqdm=True)[0] for lm in (LoramuxLM, HFLM)
    )
    assert mine[0] == pytest.approx(expected[0], abs=1e-4)


def test_generation_equals_the_hf_model(ours, theirs):
    asked = requests(
        "generate_until", [(p, {"max_gen_toks": 6, "until": ["e"]}) for p, _ in PAIRS[2:4]]
    )
    assert ours.generate_until(asked) == theirs.generate_until(asked)


def test_the_continuations_of_one_context_are_one_row(ours):
    widths = []
    ours.model.model.embed_tokens.register_forward_hook(
        lambda _m, args, _o: widths.append(args[0].shape[0])
    )
    ours.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)
    assert widths == [2, 1]  # three contexts in batches of two


def test_the_chat_template_is_the_tokenizers(ours):
    turns = [{"role": "user", "content": "hi"}]
    assert ours.apply_chat_template(turns) == "<|user|>hi<|assistant|>"


@pytest.mark.parametrize("spelling", ["adapter", "peft", "lora_local_path"])
def test_a_missing_adapter_folder_is_refused_under_every_spelling(base, spelling):
    with pytest.raises(LoramuxError, match=f"{spelling}='nowhere' is not a folder"):
        LoramuxLM(base, **{spelling: "nowhere"})


def test_two_spellings_at_once_are_refused(base, tmp_path):
    with pytest.raises(LoramuxError, match="adapter and peft name the adapter twice"):
        LoramuxLM(base, adapter=str(tmp_path), peft=str(tmp_path))


def test_a_local_task_runs_from_end_to_end(base, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [{"q": f"is it {i}?", "choices": ["yes", "no"], "label": i % 2} for i in range(4)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "local_yes_no",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}, "cache_dir": str(tmp_path / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{q}}\nAnswer:",
        "doc_to_choice": "choices",
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc"}],
    }
    scores = [
        simple_evaluate(
            model=name,
            model_args=f"pretrained={base},dtype=float32",
            device="cpu",
            tasks=[task],
            task_manager=TaskManager(include_defaults=False),
            bootstrap_iters=0,
        )["results"]["local_yes_no"]["acc,none"]
        for name in ("loramux", "hf")
    ]
    assert scores[0] == scores[1]
