"""What one step may hold, piece by piece."""

from __future__ import annotations

from engine.fake_runner import FakeRunner, tokens_of
from loramux.engine.admission import Limits
from loramux.engine.draft import Draft


def sequences(*lengths):
    runner = FakeRunner(num_blocks=100)
    return [runner.add(tokens_of(i, length))[0] for i, length in enumerate(lengths)]


def shape(draft):
    plan = draft.plan()
    return [] if plan is None else [(chunk.start, chunk.count) for chunk in plan.chunks]


def decoding(sequence):
    sequence.num_computed = sequence.num_tokens - 1
    return sequence


def test_an_empty_step_is_no_plan():
    assert Draft(Limits()).plan() is None


def test_a_dropped_decode_gives_its_token_back():
    first, second, prompt = sequences(4, 5, 20)
    draft = Draft(Limits(max_batch=2, max_step_tokens=8))
    draft.add_decode(decoding(first))
    draft.drop_decode(first)
    draft.drop_decode(second)
    assert draft.budget == 8
    draft.add_piece(prompt)
    assert shape(draft) == [(0, 8)]


def test_a_prompt_in_one_piece_fits_beside_others_or_has_the_step_to_itself():
    first, second, whole = sequences(4, 3, 6)
    draft = Draft(Limits(max_batch=2, max_step_tokens=8))
    draft.add_decode(decoding(first))
    assert draft.takes_whole(7) and draft.takes_whole(100), "decodes can wait"
    draft.add_piece(second)
    assert draft.takes_whole(4) and not draft.takes_whole(5), "a prompt under way is not put off"
    lone = Draft(Limits(max_batch=2, max_step_tokens=5))
    lone.add_decode(decoding(first))
    lone.add_whole(whole)
    assert shape(lone) == [(0, 6)] and lone.is_alone and lone.budget == 0


def test_decodes_do_not_wait_twice_in_a_row():
    (first,) = sequences(4)
    draft = Draft(Limits(max_batch=2, max_step_tokens=8), was_alone=True)
    assert draft.takes_whole(100), "nobody decodes"
    draft.add_decode(decoding(first))
    assert draft.takes_whole(7) and not draft.takes_whole(100)


def test_the_limit_on_prompts_beside_decodes_lets_one_whole_prompt_pass_but_no_second():
    first, second = sequences(4, 9)
    draft = Draft(Limits(max_batch=2, max_step_tokens=32, max_prompt_tokens=3))
    draft.add_decode(decoding(first))
    assert draft.room() == 3
    draft.add_whole(second)
    assert shape(draft) == [(3, 1), (0, 9)]
    assert draft.room() == 0 and not draft.takes_whole(2)
