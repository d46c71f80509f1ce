"""Who runs which micro-batch: whole ones, the largest first, and rows only where they know nothing of each other."""

from typing import Any

import pytest
import torch

from joint.jobs import attached, job, tiny
from loramux.data import Example
from loramux.train.loss import SupervisedForward
from loramux.train.parallel.group import Group
from loramux.train.parallel.shard import calls_of
from loramux.train.parallel.team import Team, rows_are_apart
from loramux.train.runner import JobRunner


def rows(*lengths: int) -> list[Example]:
    return [Example.build("toy", [7] * n, [False] + [True] * (n - 1)) for n in lengths]


@pytest.fixture(scope="module")
def runners() -> dict[str, JobRunner]:
    base: Any = tiny()
    handle = attached(base, ["lora", "smora", "milora"])
    forward = SupervisedForward(base)
    return {name: JobRunner(job(name), base, handle, forward) for name in handle.adapters}


def test_the_largest_micro_batch_goes_first_and_to_who_has_least(
    runners: dict[str, JobRunner],
) -> None:
    parts = [rows(3), rows(9, 9), rows(5, 5), rows(8)]
    owners = Team(Group(0, 2)).owners({"lora": (runners["lora"], parts)})
    assert owners == {"lora": [0, 0, 1, 1]}  # 18 + 3 against 10 + 8
    shares = [Team(Group(rank, 2)).divide([(runners["lora"], parts)])[0] for rank in (0, 1)]
    assert [sorted(share.mine) for share in shares] == [[0, 1], [2, 3]]
    assert {share.owner for share in shares} == {0}


def test_a_job_whose_routers_count_tokens_stays_in_one_process(
    runners: dict[str, JobRunner],
) -> None:
    steps = {name: (runners[name], [rows(6)] * 3) for name in ("smora", "lora")}
    owners = Team(Group(0, 2)).owners(steps)
    assert len(set(owners["smora"])) == 1
    assert sorted(owners["lora"] + owners["smora"]) == [0] * 3 + [1] * 3


def test_rows_are_cut_apart_only_where_they_know_nothing_of_each_other(
    runners: dict[str, JobRunner], monkeypatch: pytest.MonkeyPatch
) -> None:
    lora, part = runners["lora"], rows(3, 4, 5)
    team = Team(Group(0, 2))
    assert not rows_are_apart(lora)  # it has dropout
    assert team.cut({"lora": (lora, [part])}) == {"lora": [part]}
    monkeypatch.setattr("loramux.train.parallel.team.rows_are_apart", lambda runner: True)
    assert team.cut({"lora": (lora, [part])}) == {"lora": [[part[0], part[2]], [part[1]]]}
    assert team.cut({"lora": (lora, [part, part])}) == {"lora": [part, part]}  # enough for two
    one = rows(3)
    assert team.cut({"lora": (lora, [one])}) == {"lora": [one]}


def test_generators_of_further_micro_batches_depend_on_nothing_before_them(
    runners: dict[str, JobRunner],
) -> None:
    lora = runners["lora"]
    before = lora.rng_of(2)
    lora.rng["cpu"] = lora.rng["cpu"].roll(1)
    assert torch.equal(before["cpu"], lora.rng_of(2)["cpu"])
    assert not torch.equal(before["cpu"], lora.rng_of(1)["cpu"])
    assert lora.rng_of(0) is lora.rng


def test_everybody_makes_as_many_calls_as_the_busiest() -> None:
    assert [calls_of([0, 1, 0, 0], rank) for rank in (0, 1, 2)] == [0, 2, 3]
