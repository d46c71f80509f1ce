"""A report folder is complete, says what was measured and lets no markup through."""

import base64
import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest

from loramux.report import join_scores, write_report
from loramux.report.html import duration
from loramux.report.routing import RoutingCounter

PNG = b"\x89PNG\r\n\x1a\n"


def score(task, before, after, metric="token", **more):
    return {"task": task, "metric": metric, "before": before, "after": after, "rows": 50, **more}


def routing(tasks, layers=3, columns=("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")):
    draw = np.random.default_rng(0)
    counter = RoutingCounter()
    for task in tasks:
        for layer in range(layers):
            probs = draw.dirichlet(np.ones(len(columns)), size=8)
            gates = np.where(probs >= np.sort(probs)[:, -2:-1], probs, 0.0)
            counter.add(task, layer, columns, gates, probs)
        counter.count(task, 8)
    return counter.result()


HISTORY = [{"step": i, "loss": 2.0 / (i + 1), "aux": 0.01} for i in range(1, 21)]
HISTORY[9]["val_loss"], HISTORY[19]["val_loss"] = 0.5, 0.4


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """Drawn once; whoever reads it changes nothing."""
    out = tmp_path_factory.mktemp("full") / "out"
    scores = [
        score("clickbait", 0.445, 0.87, stderr_before=0.03, stderr_after=0.02),
        score("clickbait", 0.4, 0.9, metric="raw"),
        score("a_rather_long_task_name", 0.5, 0.4),
        score("e2e", 3.2, 31.5, metric="bleu"),
    ]
    write_report(
        out,
        title="Mixture over 3 tasks",
        scores=scores,
        history=HISTORY,
        routing=routing(["clickbait", "a_rather_long_task_name"]),
        samples=[{"task": "e2e", "prompt": "say", "before": "x", "after": "y", "answer": "z"}],
        settings={"r": 8, "learning_rate": 1e-3},
        seconds=423.2,
    )
    return out


class Page(HTMLParser):
    """Collects tags with their attributes, and the text between them."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append(data.strip())


def page(folder):
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def test_the_folder_holds_page_numbers_and_pictures(full):
    pictures = ["router.png", "routing.png", "routing_difference.png", "loss.png", "scores.png"]
    names = sorted(path.name for path in full.iterdir())
    assert names == sorted(["report.html", "report.json", *pictures])
    for name in pictures:
        data = (full / name).read_bytes()
        assert data.startswith(PNG)
        width, height = (int.from_bytes(data[i : i + 4], "big") for i in (16, 20))
        assert 500 < width < 3000
        assert 400 < height < 3500


def test_the_json_keeps_the_interface(full):
    report = json.loads((full / "report.json").read_text())
    assert report["seconds"] == 423.2
    keys = {"task", "metric", "before", "after", "rows"}
    assert all(keys <= set(task) for task in report["tasks"])
    assert report["tasks"][0]["after"] == 0.87
    assert report["routing"]["tasks"]["clickbait"]["count"] == 8


def test_every_picture_is_inside_the_page(full):
    images = [attrs for tag, attrs in page(full).tags if tag == "img"]
    assert len(images) == 5
    for image in images:
        assert image["alt"]
        kind, data = image["src"].split(",", 1)
        assert kind == "data:image/png;base64"
        assert base64.b64decode(data).startswith(PNG)


def test_the_page_loads_nothing_and_runs_nothing(full):
    found = page(full).tags
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in found}
    text = re.sub(r'src="data:[^"]*"', "", (full / "report.html").read_text(encoding="utf-8"))
    assert "http" not in text
    assert "url(" not in text
    assert "@import" not in text


def test_the_table_shows_per_cent_and_the_change(full):
    texts = page(full).texts
    for shown in ("44.5", "87.0", "+42.5", "-10.0", "31.5", "± 3.0"):
        assert shown in texts
    assert "Accuracy, ranking per token" in texts
    # 44.5 and 50 before, 87 and 40 after: BLEU is no accuracy and the raw score is not the headline.
    assert {"47.2 %", "63.5 %", "+16.2"} <= set(texts)


def test_markup_in_any_text_is_shown_and_not_obeyed(tmp_path):
    evil = "<script>alert(1)</script>"
    write_report(
        tmp_path,
        title=evil,
        scores=[score(evil, 0.1, 0.2)],
        routing=routing([evil]),
        samples=[{"task": evil, "prompt": evil, "before": evil, "after": f"{evil}\n{{{{ 7*7 }}}}"}],
        settings={evil: evil},
        lead=evil,
    )
    found = page(tmp_path)
    assert not [tag for tag, _ in found.tags if tag == "script"]
    assert sum(evil in text for text in found.texts) >= 8
    assert any("{{ 7*7 }}" in text for text in found.texts)


def test_what_was_not_given_is_left_out(tmp_path):
    write_report(tmp_path, title="Bare", scores=[])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json"]
    headings = [tag for tag, _ in page(tmp_path).tags if tag in ("h2", "img", "table")]
    assert headings == []


def test_values_that_are_not_finite_stay_out_of_the_json(tmp_path):
    history = [
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": float("nan")},
        {"step": 3, "loss": 0.5},
    ]
    write_report(tmp_path, title="x", scores=[], history=history)
    report = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert report["history"][1] == {"step": 2, "loss": None}


def test_an_incomplete_score_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"lacks .*'before'"):
        write_report(tmp_path, title="x", scores=[{"task": "a", "metric": "token", "rows": 1}])


def test_the_same_report_is_written_twice_alike(tmp_path):
    for name in ("one", "two"):
        write_report(tmp_path / name, title="x", scores=[score("a", 0.1, 0.2)], history=HISTORY)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def result(task, value, rows=10):
    return {"task": task, "metric": "token", "value": value, "stderr": 0.1, "rows": rows}


def test_results_before_and_after_are_joined_by_task_and_metric():
    joined = join_scores([result("b", 0.2), result("a", 0.1)], [result("a", 0.5), result("b", 0.6)])
    assert [(s["task"], s["before"], s["after"]) for s in joined] == [
        ("a", 0.1, 0.5),
        ("b", 0.2, 0.6),
    ]
    assert joined[0]["stderr_before"] == 0.1


def test_results_over_different_rows_are_not_compared():
    with pytest.raises(ValueError, match="not measured alike"):
        join_scores([result("a", 0.1, rows=10)], [result("a", 0.5, rows=20)])


@pytest.mark.parametrize(("seconds", "text"), [(75, "75 s"), (420, "7.0 min"), (9000, "2.5 h")])
def test_durations_read_in_their_natural_unit(seconds, text):
    assert duration(seconds) == text


def test_importing_the_report_does_not_import_matplotlib():
    code = "import loramux.report, sys; sys.exit('matplotlib' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
