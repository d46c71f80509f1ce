"""The measurement of ablation scores: every way gives the plain loop's numbers, and says so."""

from bench.efforts import TINY
from loramux.bench.run import bench


def test_all_ways_to_score_are_timed_and_agree() -> None:
    result = bench("score", effort=TINY, show_progress=False)
    rows = [(row["variant"], row["reference"]) for row in result["rows"]]
    assert rows == [
        ("prefix reuse and batched gates, 3 layers", "plain double loop, 3 layers"),
        ("prefix reuse, 3 layers", "plain double loop, 3 layers"),
        ("the plain loop again, 3 layers", "plain double loop, 3 layers"),
    ]
    assert result["rows"][0]["target"] == 1 / 1.5
    apart = result["details"]["score"]["3 layers"]["largest_difference"]
    assert apart.keys() == {"prefix", "both"}
    assert all(value < 1e-5 for value in apart.values())
