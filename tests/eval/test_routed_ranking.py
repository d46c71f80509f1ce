"""Ranking and reports through attached mixtures: routing reads the question, nothing else."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import loramux
from loramux.data.tasks import TaskRow
from loramux.eval.harness import LoramuxLM
from loramux.eval.ranking import ChoiceRow, choice_scores
from loramux.eval.run import evaluate, evaluate_model
from loramux.report.routing import observe
from pico import build_pico

ROWS = [
    ChoiceRow((5, 9, 11, 4, 7), ((3,), (8, 2, 6), (3, 3)), (2, 9, 4)),
    ChoiceRow((6, 2, 2, 30, 31, 8, 19), ((40, 41), (40, 42), (13,)), (6, 6, 3)),
]
CONFIGS = {
    "lora": loramux.LoraConfig(r=4),
    "milora": loramux.MiLoRAConfig(r=4, top_k=2),
    "milora-max": loramux.MiLoRAConfig(r=4, top_k=2, pooler="max", gate="prob"),
    "mixlora": loramux.MixLoRAConfig(r=4, num_experts=3),
    "mixlora-dynamic": loramux.MixLoRAConfig(
        r=4, num_experts=3, routing_strategy="mixlora-dynamic", top_p=0.6
    ),
    "mixlora-switch": loramux.MixLoRAConfig(
        r=4, num_experts=3, routing_strategy="mixlora-switch", expert_capacity=1
    ),
}


def randomise(handle, seed=0):
    """Rows and routers wide enough that the adapter and its routing change the answers."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in handle.trainable_parameters().values():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=draw))


def attached(name, family="llama"):
    model = build_pico(family)
    handle = loramux.attach(model, CONFIGS[name])
    randomise(handle)
    return model, handle


def alone(model, prompt, choice):
    mask = torch.tensor([[True] * len(prompt) + [False] * len(choice)])
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + choice]), prompt_mask=mask).logits[0].log_softmax(-1)
    places = range(len(prompt) - 1, len(prompt) + len(choice) - 1)
    return sum(logits[at, token].item() for at, token in zip(places, choice, strict=True))


@pytest.mark.parametrize("layout", ["tree", "rows"])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_method_scores_a_choice_as_in_a_pass_of_its_own(name, layout):
    model, handle = attached(name)
    for scores in choice_scores(model, ROWS, layout=layout):
        expected = [alone(model, scores.row.prompt, choice) for choice in scores.row.choices]
        assert scores.sums == pytest.approx(expected, abs=2e-5)
    handle.use(None)
    bare = choice_scores(model, ROWS[:1], layout=layout)[0]
    assert bare.sums == pytest.approx(
        choice_scores(build_pico("llama"), ROWS[:1], layout=layout)[0].sums, abs=2e-5
    )
    assert bare.sums != pytest.approx(expected[: len(bare.sums)], abs=0.01)


@pytest.mark.parametrize("pool", ["token", "prompt_mean"])
def test_mole_scores_a_choice_as_in_a_pass_of_its_own(pool, tmp_path):
    folders = []
    for seed in (1, 2):
        handle = loramux.attach(build_pico("llama"), CONFIGS["lora"])
        randomise(handle, seed)
        folders.append(str(handle.save(tmp_path / str(seed))))
    model = build_pico("llama")
    randomise(loramux.attach(model, loramux.MoLEConfig(adapters=tuple(folders), pool=pool)))
    for scores in choice_scores(model, ROWS, layout="tree"):
        expected = [alone(model, scores.row.prompt, choice) for choice in scores.row.choices]
        assert scores.sums == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize("family", ["phi3", "gpt2", "gemma"])
def test_milora_ranks_alike_in_both_layouts_on_other_families(family):
    model, _ = attached("milora", family)
    trees, rows = (choice_scores(model, ROWS, layout=layout) for layout in ("tree", "rows"))
    for tree, row in zip(trees, rows, strict=True):
        assert tree.sums == pytest.approx(row.sums, abs=2e-5)


def test_the_routing_of_a_ranked_question_is_that_of_the_question_alone():
    model, handle = attached("milora")
    gates = {}
    for layout in ("tree", "rows"):
        choice_scores(model, ROWS[:1], layout=layout)
        gates[layout] = [record.gates[0].tolist() for record in handle.routing()]
    with torch.no_grad():
        model(torch.tensor([ROWS[0].prompt]))
    alone_gates = [record.gates[0].tolist() for record in handle.routing()]
    assert gates == {"tree": alone_gates, "rows": alone_gates}


@pytest.fixture
def saved(tmp_path, tokenizer):
    """(base folder, adapter folder, attached model)."""
    base = tmp_path / "base"
    build_pico("llama").save_pretrained(base)
    tokenizer.save_pretrained(base)
    # From the folder: a mixture remembers the files of its base.
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    handle = loramux.attach(model, CONFIGS["milora"])
    randomise(handle)
    handle.save(tmp_path / "adapter")
    return str(base), str(tmp_path / "adapter"), model


def rows(task="colour", number=6):
    choices = ("yes", "no", "maybe so")
    return [
        TaskRow(task, f"{task}-{i}", f"is {'x' * (i % 4)} {i}?", choices, choices[i % 3])
        for i in range(number)
    ]


def test_a_saved_mixture_is_evaluated_as_the_one_in_memory(saved, tmp_path, tokenizer):
    base, adapter, model = saved
    data = tmp_path / "colour.jsonl"
    lines = [
        f'{{"task": "colour", "id": "{r.id}", "prompt": "{r.prompt}", '
        f'"choices": ["yes", "no", "maybe so"], "answer": "{r.answer}"}}\n'
        for r in rows()
    ]
    data.write_text("".join(lines))
    result = evaluate(base, adapter, [data], progress=False)
    expected = evaluate_model(model, tokenizer, {"colour": rows()}, progress=False)
    assert result["results"] == expected
    assert result["adapter"] == adapter


def test_the_harness_scores_a_saved_mixture_with_its_context_as_the_prompt(saved, tokenizer):
    base, adapter, model = saved
    lm = LoramuxLM(base, adapter=adapter, device="cpu", dtype="float32")
    context, answer = "what is this?", " a cat"
    prompt, choice = (tokenizer(text)["input_ids"] for text in (context, answer))
    ((value, _),) = lm._loglikelihood_tokens([((context, answer), prompt, choice)])
    assert value == pytest.approx(alone(model, prompt, choice), abs=2e-5)


def test_a_split_of_the_same_tokens_elsewhere_is_another_request(saved, tokenizer):
    base, adapter, model = saved
    lm = LoramuxLM(base, peft=adapter, device="cpu", dtype="float32")
    tokens = tokenizer("what is this?")["input_ids"]
    pairs = [(tokens[:at], tokens[at:]) for at in (3, 8)]
    values = lm._loglikelihood_tokens([(("", ""), *pair) for pair in pairs])
    expected = [alone(model, *pair) for pair in pairs]
    assert [value for value, _ in values] == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize("name", ["milora", "mixlora"])
def test_routing_is_observed_per_task_and_layer(name, tokenizer):
    model, _ = attached(name)
    tasks = {"colour": rows(number=5), "sum": rows("sum", 3)}
    routing = observe(model, tokenizer, tasks, batch_size=2)
    assert routing.layers == (0, 1)
    assert routing.tasks == ("colour", "sum")
    picked = {task: table.sum(1) for task, table in routing.tables.items()}
    assert all(sums == pytest.approx([2.0, 2.0]) for sums in picked.values())  # top-2 everywhere
    if name == "milora":
        assert routing.columns[0] == "self_attn.q_proj"
        assert (routing.unit, dict(routing.counts)) == ("prompts", {"colour": 5, "sum": 3})
    else:
        prompts = [f"Question: {row.prompt}\nAnswer:" for row in tasks["sum"]]
        assert (routing.unit, routing.columns) == ("tokens", ("0", "1", "2"))
        assert routing.counts["sum"] == sum(map(len, prompts))


def test_a_bare_model_has_no_routing_to_observe(tokenizer):
    with pytest.raises(ValueError, match="no adapter attached"):
        observe(build_pico("llama"), tokenizer, {"colour": rows()})
