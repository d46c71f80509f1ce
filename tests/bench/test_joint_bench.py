"""Jobs trained together are timed against jobs in turn, by the trainers themselves."""

from dataclasses import replace

from bench.efforts import TINY
from loramux.bench.joint import JOINT, PEFT, SMALL_LOADS, TURNS, Load, Peft, Rounds, make_jobs
from loramux.bench.run import bench
from loramux.bench.shape import build_base


def test_every_load_is_compared_with_turns_in_peft_and_in_loramux() -> None:
    result = bench("train", part="jobs", effort=replace(TINY, is_quick=True), show_progress=False)
    (load,) = SMALL_LOADS
    pairs = {(row["variant"], row["reference"]) for row in result["rows"]}
    names = [f"{load.title}, {name}" for name in (JOINT, TURNS, PEFT)]
    assert pairs == {(names[0], names[2]), (names[1], names[2]), (names[0], names[1])}
    assert result["rows"][0]["target"] == 0.40
    assert all(row["ms"] > 0 and row["adapters"] == load.jobs for row in result["rows"])


def test_a_round_is_one_step_of_every_job_on_the_same_rows() -> None:
    load = Load(3, 2, 8, "8 jobs/peft")
    rounds = Rounds(build_base(TINY.shape, None), load, joint=True)
    rounds.step()
    rounds.step()
    assert [runner.state.step for runner in rounds.trainer.runners] == [2, 2, 2]
    jobs = make_jobs(load, 64)
    assert len({job.train[0].input_ids for job in jobs}) == 3
    assert sum(jobs[0].train[0].loss_mask) == 4
    turns = Peft(build_base(TINY.shape, None), load)
    assert [batch["input_ids"].shape for batch in turns.batches] == [(2, 8)] * 3
    at_once = Peft(build_base(TINY.shape, None), load, at_once=True)
    assert [batch["input_ids"].shape for batch in at_once.batches] == [(6, 8)]
