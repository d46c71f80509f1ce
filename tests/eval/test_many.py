"""Many adapters in one load of the base: every score is that of the adapter's own evaluation, whoever is beside it."""

import csv
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import loramux
from loramux.cli.main import main
from loramux.errors import LoramuxError
from loramux.eval import many
from loramux.eval.many import evaluate_many
from loramux.eval.ranking import ChoiceRow, choice_scores
from loramux.eval.run import NEW_TOKENS, evaluate
from pico import build_pico, pico_tokenizer

CHOICES = ("yes", "no", "maybe so")
CONFIGS = {
    "lora": loramux.LoraConfig(r=4),
    "dora": loramux.LoraConfig(r=3, use_dora=True),
    "mixlora": loramux.MixLoRAConfig(r=2, num_experts=4),
    "milora": loramux.MiLoRAConfig(r=4, lora_alpha=16),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    build_pico("llama").save_pretrained(folder)
    pico_tokenizer().save_pretrained(folder)
    return folder


def attached(names, model=None, dtype=torch.float32):
    model = build_pico("llama", dtype=dtype) if model is None else model
    handle = None
    for name in names:
        torch.manual_seed(list(CONFIGS).index(name))
        if handle is None:
            handle = loramux.attach(model, CONFIGS[name], name=name)
        else:
            handle.add(CONFIGS[name], name=name)
        adapter = handle.adapters[name].to(dtype)
        with torch.no_grad():
            for parameter in adapter.trainable().values():
                parameter.add_(0.3 * torch.randn(parameter.shape))
    return model, handle


@pytest.fixture(scope="module")
def adapters(tmp_path_factory, base):
    root = tmp_path_factory.mktemp("runs")
    _, handle = attached(list(CONFIGS), AutoModelForCausalLM.from_pretrained(base))
    return [str(handle.save(root / name / "adapter", name=name)) for name in CONFIGS]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    ranked = [
        {"task": "colour", "id": f"c{i}", "prompt": f"is {'x' * (i % 4)} {i}?",
         "choices": CHOICES, "answer": CHOICES[i % 3]}
        for i in range(10)
    ]  # fmt: skip
    said = [
        {"task": "sum", "id": f"s{i}", "prompt": f"{i} and {i}", "answer": "s"} for i in range(2)
    ]
    return [write(folder / "colour.jsonl", ranked), write(folder / "sum.jsonl", said)]


def scores(result):
    keys = ("value", "stderr", "rows")
    return {
        (row["adapter"], row["task"], row["metric"]): [row[key] for key in keys]
        for row in result["results"]
    }


def run(base, adapters, data, **options):
    return evaluate_many(base, adapters, data, batch_size=5, progress=False, **options)


def test_every_score_is_that_of_the_adapters_own_evaluation(base, adapters, data, monkeypatch):
    monkeypatch.setitem(NEW_TOKENS, "exact_match", 1)  # a few tokens tell as much
    ranked, said = data
    found = scores(run(base, adapters, [ranked], against_base=True))
    found |= scores(run(base, adapters[1:3], [said]))
    for name in ["base", *adapters]:
        folder = None if name == "base" else name
        files = data if name in adapters[1:3] else [ranked]
        for row in evaluate(base, folder, files, batch_size=5, progress=False)["results"]:
            want = [row["value"], row["stderr"], row["rows"]]
            assert found.pop((name, row["task"], row["metric"])) == want
    assert not found


def test_log_probabilities_of_mixed_rows_are_those_of_rows_alone_to_1e_9():
    model, handle = attached(list(CONFIGS), dtype=torch.float64)
    rows = [
        ChoiceRow(tuple(range(7, 10 + i)), ((9, 8), (11,), (12, 13, 14)), (2, 1, 3), "t")
        for i in range(len(CONFIGS) + 1)
    ]
    names = [*CONFIGS, None]
    seen = []
    for layout in ("tree", "rows"):
        mixed = choice_scores(model, rows, layout=layout, adapters=names)
        for row, name, scored in zip(rows, names, mixed, strict=True):
            handle.use(name)
            (alone,) = choice_scores(model, [row], layout=layout)
            assert scored.sums == pytest.approx(alone.sums, abs=1e-9)
            seen.append(scored.sums)
    assert len({round(sums[1], 6) for sums in seen}) > len(CONFIGS)  # they are not all the base


def test_the_order_of_adapters_and_who_else_is_there_change_nothing(base, adapters, data):
    whole = scores(run(base, adapters, data[:1], metrics=["token"]))
    turned = scores(run(base, adapters[::-1], data[:1], metrics=["token"]))
    assert turned == whole
    one = scores(run(base, adapters[:1], data[:1], metrics=["token"]))
    assert one.items() <= whole.items()


def test_differences_to_the_base_are_paired_over_the_rows(base, adapters, data):
    result = run(base, adapters[:1], data[:1], metrics=["raw"], against_base=True)
    own, its = (row for row in reversed(result["results"]))
    assert its["adapter"] == "base" and its["difference"] is None
    assert own["difference"] == pytest.approx(own["value"] - its["value"])
    made = many.with_differences(
        [
            {"adapter": name, "task": "t", "metric": "raw", "value": sum(hits) / 4, "stderr": 0.0,
             "rows": 4, "row_scores": hits}
            for name, hits in (("base", [0.0, 1.0, 0.0, 1.0]), ("a", [1.0, 1.0, 1.0, 1.0]))
        ]
    )  # fmt: skip
    assert made[1]["difference"] == 0.5
    assert made[1]["difference_stderr"] == pytest.approx((1 / 3) ** 0.5 / 2)


def test_finished_cells_are_kept_by_content_and_only_missing_ones_are_scored(
    base, adapters, data, tmp_path, monkeypatch
):
    cells = tmp_path / "cells.jsonl"
    data = data[:1]
    first = run(base, adapters[:2], data, cells=cells)
    with cells.open("a") as file:
        file.write('{"key": "cut sho')  # as a kill leaves it
    counted = []
    original = many.hits

    def hits(model, tokenizer, rows, *args):
        counted.append(len(rows))
        return original(model, tokenizer, rows, *args)

    monkeypatch.setattr(many, "hits", hits)
    again = run(base, adapters[:3], data, cells=cells)
    assert counted == [10]  # the third adapter's rows alone
    assert scores(first).items() <= scores(again).items()
    run(base, adapters[:3], data, cells=cells)
    assert counted == [10]
    fewer = run(base, adapters[:1], data[:1], rows=4, cells=cells)
    assert counted == [10, 4]  # other rows are another cell
    assert fewer["results"][0]["rows"] == 4


def test_a_file_that_holds_no_cells_is_refused_and_left_alone(base, adapters, data, tmp_path):
    other = tmp_path / "mine.jsonl"
    other.write_text('{"prompt": "a"}\n')
    with pytest.raises(LoramuxError, match=r"mine.jsonl:1 is no finished cell"):
        run(base, adapters[:1], data, cells=other)
    assert other.read_text() == '{"prompt": "a"}\n'


def test_an_adapter_of_another_base_is_refused_before_anything_is_scored(
    base, adapters, data, tmp_path, monkeypatch
):
    model = build_pico("llama", seed=5)
    _, handle = attached(["mixlora"], model)
    foreign = str(handle.save(tmp_path / "foreign", name="mixlora"))
    monkeypatch.setattr(many.Board, "score", lambda *_: pytest.fail("it was scored"))
    with pytest.raises(LoramuxError, match=f"{foreign}: .*base"):
        run(base, [adapters[0], foreign], data)


def test_an_adapter_called_as_the_bases_own_row_is_refused_and_not_taken_for_it(
    adapters, data, tmp_path, monkeypatch
):
    (tmp_path / "base").symlink_to(adapters[0])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LoramuxError, match=r"write the adapter's folder as \./base"):
        evaluate_many("no/base", ["base"], data, against_base=True, progress=False)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda names: [], "no adapter was given"),
        (lambda names: [names[0], names[0]], "named twice"),
        (lambda names: [names[0], "no/where"], "no adapter folder at 'no/where'"),
    ],
)
def test_what_cannot_be_scored_is_said_before_the_base_is_loaded(adapters, data, change, says):
    with pytest.raises(LoramuxError, match=says):
        evaluate_many("no/base", change(adapters), data, progress=False)


def test_the_command_prints_a_board_and_writes_csv_and_json(base, adapters, data, tmp_path, capsys):
    board, out = tmp_path / "board.csv", tmp_path / "board.json"
    common = ["--metric", "token", "--rows", "4", "--json", str(out), "--csv", str(board)]
    code = main(
        ["eval", "--base", str(base), "--data", data[0], "--adapters", *adapters[:2],
         "--against-base", *common]
    )  # fmt: skip
    assert code == 0
    shown = capsys.readouterr().out
    assert "colour (4 rows)" in shown and "±" in shown
    rows = json.loads(out.read_text())["results"]
    assert [row["adapter"] for row in rows] == ["base", *adapters[:2]]
    with board.open() as file:
        assert [row["adapter"] for row in csv.DictReader(file)] == ["base", *adapters[:2]]


def test_options_that_need_adapters_are_refused_without(base, data, capsys):
    assert main(["eval", "--base", str(base), "--data", data[0], "--against-base"]) != 0
    assert "--against-base goes with --adapters" in capsys.readouterr().err
    assert main(["eval", "--base", str(base)]) != 0
    assert "--tasks NAME" in capsys.readouterr().err
