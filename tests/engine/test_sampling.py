"""Sampling equals transformers' processors, is repeatable, and no row sees its neighbours."""

import math
from collections import Counter
from itertools import chain

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from loramux.engine import cuts, sampling
from loramux.engine.request import Request, SamplingParams
from loramux.engine.sampling import sample
from loramux.engine.sequence import Sequence

VOCAB = 400
EOS = 1
CUTS = [
    {},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 10**6},
    {"top_p": 0.3},
    {"top_p": 0.95},
    {"top_p": 1e-9},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"top_k": 50, "top_p": 0.8, "min_p": 0.02},
    {"top_p": 0.99, "min_p": 0.001},
    {"repetition_penalty": 1.7, "top_k": 20},
    {"repetition_penalty": 0.6},
]


def sequence(prompt=(5, 9, 9, 30), answer=(7, 7, 12), index=0, **params):
    request = Request(
        prompt=list(prompt), params=SamplingParams(**{"max_tokens": 99} | params), id="r"
    )
    tokens = [*prompt, *answer]
    return Sequence(
        request=request, index=index, tokens=tokens, num_prompt=len(prompt), order=index
    )


def random_logits(rows, seed=0, vocab=VOCAB, std=2.0):
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * std


def expected_distribution(logits_V, tokens, params):
    """What transformers would draw from."""
    steps = LogitsProcessorList()
    if params.repetition_penalty != 1:
        steps.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    steps.append(TemperatureLogitsWarper(float(params.temperature)))
    if params.top_k:
        steps.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        steps.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        steps.append(MinPLogitsWarper(params.min_p))
    return steps(torch.tensor([tokens]), logits_V[None].clone())[0].softmax(-1)


class Fixed:
    """A generator that returns the numbers it was given."""

    def __init__(self, numbers):
        self.numbers = iter(numbers)

    def random(self):
        return next(self.numbers)


def drawn_at(logits_V, uniforms, **params):
    """The tokens drawn for each uniform number: a quantile function of the distribution."""
    rows = [sequence(**params) for _ in uniforms]
    logits = logits_V.expand(len(uniforms), -1)
    sample(logits, rows)
    for row, uniform in zip(rows, uniforms, strict=True):
        row.scratch["sampling"].rng = Fixed([uniform])
    return [made.token for made in sample(logits, rows)]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
@pytest.mark.parametrize("options", CUTS, ids=str)
def test_the_distribution_drawn_from_is_that_of_transformers(options, temperature):
    logits = random_logits(1)[0]
    params = {"temperature": temperature, **options}
    want = expected_distribution(logits, sequence().tokens, SamplingParams(**params))
    num = 1500
    uniforms = [(i + 0.5) / num for i in range(num)]
    shares = Counter(drawn_at(logits, uniforms, **params))
    got = torch.zeros(VOCAB)
    for token, count in shares.items():
        got[token] = count / num
    # An evenly spaced u hits a token of probability p between floor(p * num) and ceil(p * num) times.
    assert (got - want).abs().max() <= 1.01 / num
    assert set(shares) <= set(want.nonzero()[:, 0].tolist())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    top_k=st.integers(0, 60),
    top_p=st.floats(0.01, 1.0),
    min_p=st.floats(0, 0.5),
)
def test_every_token_drawn_is_one_that_transformers_keeps(dtype, seed, top_k, top_p, min_p):
    params = {"temperature": 1.3, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    logits = random_logits(1, seed)[0].to(dtype)
    want = expected_distribution(
        logits.float(),
        sequence().tokens,
        SamplingParams(**params | {"top_p": min(1, top_p + 1e-5)}),
    )
    # Ties at the edge of top_p may be kept in another order: compare by value.
    least = logits[want > 0].min()
    drawn = drawn_at(logits, [i / 200 for i in range(200)], **params)
    assert all(logits[token] >= least for token in drawn)


def test_a_flat_row_draws_from_a_share_of_the_lowest_ids():
    drawn = drawn_at(
        torch.zeros(VOCAB), [i / 997 for i in range(997)], temperature=1.0, top_p=0.2499
    )
    assert set(drawn) == set(range(VOCAB // 4))
    drawn = drawn_at(torch.zeros(VOCAB), [i / 997 for i in range(997)], temperature=1.0, top_k=3)
    assert set(drawn) == set(range(VOCAB)), "top_k keeps all that tie with the k-th"


def test_greedy_equals_argmax_and_draws_nothing():
    logits = random_logits(8)
    rows = [sequence() for _ in range(8)]
    before = [sample(logits, rows)[i].token for i in range(8)]
    states = [row.scratch["sampling"].rng.getstate() for row in rows]
    assert [made.token for made in sample(logits, rows)] == before == logits.argmax(-1).tolist()
    assert [row.scratch["sampling"].rng.getstate() for row in rows] == states


def test_greedy_with_a_repetition_penalty_equals_transformers():
    logits = random_logits(16, std=0.2)
    rows = [sequence(prompt=range(120 + 10 * i), repetition_penalty=1.3) for i in range(16)]
    made = sample(logits, rows)
    for i, row in enumerate(rows):
        want = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([row.tokens]), logits[i : i + 1])
        assert made[i].token == want.argmax().item()


def test_openai_penalties_count_the_answer_only():
    logits = torch.zeros(1, VOCAB)
    logits[0, 5], logits[0, 7], logits[0, 12], logits[0, 40] = 1.0, 2.0, 1.3, 0.9
    # 5 is in the prompt; 7 twice and 12 once in the answer.
    for params, want in [
        ({}, 7),
        ({"presence_penalty": 0.6}, 7),
        ({"presence_penalty": 1.2}, 5),
        ({"frequency_penalty": 0.3}, 7),
        ({"frequency_penalty": 0.45}, 7),
        ({"frequency_penalty": 0.6}, 5),
        ({"frequency_penalty": 0.2, "presence_penalty": -0.5}, 7),
    ]:
        assert sample(logits, [sequence(**params)])[0].token == want, params


def test_penalties_follow_a_growing_answer():
    row = sequence(prompt=[3], answer=[], frequency_penalty=1.0)
    logits = torch.zeros(1, VOCAB)
    logits[0, 10], logits[0, 20] = 1.5, 1.0
    for want in (10, 20, 10, 0):
        token = sample(logits, [row])[0].token
        assert token == want
        row.tokens.append(token)


def test_tokens_beyond_the_head_and_long_prompts_are_counted_without_harm():
    row = sequence(prompt=[VOCAB + 7, *range(300)], repetition_penalty=2.0)
    logits = torch.ones(1, VOCAB)
    assert sample(logits, [row])[0].token == 300


def test_logits_are_left_as_they_are():
    logits = random_logits(3)
    before = logits.clone()
    rows = [
        sequence(repetition_penalty=2.0),
        sequence(temperature=1.0, min_p=0.1),
        sequence(min_tokens=9, stop_token_ids=(4,)),
    ]
    sample(logits, rows, [EOS])
    assert torch.equal(logits, before)


def test_min_tokens_bans_the_end_until_they_are_there():
    logits = torch.zeros(1, VOCAB)
    logits[0, EOS], logits[0, 33], logits[0, 44] = 3.0, 2.0, 1.0
    options = {"stop_token_ids": (33, VOCAB + 5)}
    assert sample(logits, [sequence(min_tokens=4, **options)], [EOS])[0].token == 44
    assert sample(logits, [sequence(min_tokens=3, **options)], [EOS])[0].token == EOS
    assert sample(logits, [sequence(min_tokens=4)], [EOS])[0].token == 33
    assert sample(logits, [sequence(min_tokens=4, ignore_eos=True)], [EOS])[0].token == EOS


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("params", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.5}])
def test_a_row_that_is_not_finite_ends_alone(value, params):
    options = {"seed": 3, "logprobs": 2, "presence_penalty": 0.5, **params}
    clean = random_logits(5)
    spoilt = clean.clone()
    spoilt[2, 17 if value > 0 or math.isnan(value) else slice(None)] = value
    made = sample(spoilt, [sequence(index=i, **options) for i in range(5)])
    want = sample(clean, [sequence(index=i, **options) for i in range(5)])
    assert made[2].token is None and made[2].logprob is None and "finite" in made[2].error
    assert [made[i] for i in (0, 1, 3, 4)] == [want[i] for i in (0, 1, 3, 4)]


def test_a_row_left_without_any_token_is_an_error():
    logits = torch.full((1, VOCAB), -math.inf)
    logits[0, EOS] = 1.0
    assert sample(logits, [sequence(min_tokens=9)], [EOS])[0].error is not None


def mixed_params(i):
    kinds = [*CUTS, {"frequency_penalty": 0.7}, {"logprobs": i % 4}]
    heat = 0.0 if i % 5 == 0 else 0.4 + (i % 3)
    return {"temperature": heat, "seed": i, **kinds[i % len(kinds)]}


@pytest.mark.parametrize("vocab", [VOCAB, 49152, 50257])
def test_a_row_does_not_see_its_neighbours(vocab):
    logits = random_logits(40, vocab=vocab).bfloat16()  # bf16: many ties
    together = [sequence(index=i, **mixed_params(i)) for i in range(40)]
    alone = [sequence(index=i, **mixed_params(i)) for i in range(40)]
    for _ in range(3):
        made = sample(logits, together)
        for i, row in enumerate(alone):
            assert sample(logits[i : i + 1], [row])[0] == made[i]
        for i in range(40):
            together[i].tokens.append(made[i].token)
            alone[i].tokens.append(made[i].token)


def test_looking_at_few_candidates_or_at_all_draws_the_same(monkeypatch):
    logits = random_logits(30, vocab=50257).bfloat16()
    kinds = [{"top_k": 9}, {"top_p": 0.5}, {"top_p": 0.999}, {"top_k": 500, "top_p": 0.9}]

    def draw():
        rows = [sequence(index=i, temperature=1.5, seed=i, **kinds[i % 4]) for i in range(30)]
        return [[made.token for made in sample(logits, rows)] for _ in range(4)]

    few = draw()
    monkeypatch.setattr(cuts, "FIRST_K", 50257)
    assert draw() == few
    assert len({tuple(tokens) for tokens in few}) == 4


@pytest.mark.parametrize("num", [1, 300, 2000, 50257])
def test_the_largest_found_by_blocks_are_the_largest(num):
    logits = random_logits(6, vocab=50257).bfloat16().float()
    assert cuts.largest(logits, num).tolist() == logits.topk(num).values.tolist()


def test_a_seed_repeats_and_samples_of_one_request_differ():
    logits = random_logits(1).expand(2, -1)
    first = [sequence(index=i, temperature=1.0, seed=11) for i in range(2)]
    again = [sequence(index=i, temperature=1.0, seed=11) for i in range(2)]
    runs = [
        [[made.token for made in sample(logits, rows)] for _ in range(20)]
        for rows in (first, again)
    ]
    assert runs[0] == runs[1]
    assert [a for a, _ in runs[0]] != [b for _, b in runs[0]]
    second = sequence(index=0, temperature=1.0, seed=12)
    alone = [sample(logits[:1], [second])[0].token for _ in range(20)]
    assert alone == [b for _, b in runs[0]], "sample j uses seed + j"


def test_logprobs_are_of_the_raw_distribution():
    logits = random_logits(3)
    rows = [
        sequence(logprobs=3, temperature=0.3, repetition_penalty=5.0, seed=1),
        sequence(),
        sequence(logprobs=0),
    ]
    made = sample(logits.bfloat16(), rows)
    logs = logits.bfloat16().float().log_softmax(-1)
    assert made[1].logprob is None
    assert made[2].logprob.top == ()
    assert made[2].logprob.logprob == pytest.approx(logs[2].max().item())
    first = made[0].logprob
    assert first.token == made[0].token
    assert first.logprob == pytest.approx(logs[0, first.token].item())
    assert [token for token, _ in first.top] == logs[0].topk(3).indices.tolist()


@pytest.mark.parametrize("params", [{"temperature": 1e-30}, {"temperature": 1e-30, "top_k": 5}])
def test_a_vanishing_temperature_is_greedy(params):
    logits = random_logits(4) * 50
    rows = [sequence(seed=i, **params) for i in range(4)]
    assert [made.token for made in sample(logits, rows)] == logits.argmax(-1).tolist()


def test_logits_and_sequences_must_match():
    with pytest.raises(ValueError, match="one row per sequence"):
        sample(random_logits(2), [sequence()])
    assert sample(torch.empty(0, VOCAB), []) == []


def draws_of_many_kinds(device):
    logits = random_logits(40, vocab=50257).bfloat16().to(device)
    rows = [sequence(index=i, min_tokens=5, **mixed_params(i)) for i in range(40)]
    return [[made.token for made in sample(logits, rows, [EOS])] for _ in range(3)]


def test_the_way_of_a_device_draws_the_same(monkeypatch):
    want = draws_of_many_kinds("cpu")
    for module in (cuts, sampling):
        monkeypatch.setattr(module, "host_view", lambda x: None)
    assert draws_of_many_kinds("cpu") == want


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_draws_what_the_cpu_draws():
    on_cpu, on_gpu = (chain(*draws_of_many_kinds(device)) for device in ("cpu", "cuda"))
    differ = sum(a != b for a, b in zip(on_cpu, on_gpu, strict=True))
    assert differ <= 1, "a sum rounded the other way may move one draw"
