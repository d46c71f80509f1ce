"""One page per folder: its numbers are the records', its names are no markup, and it says what it could not show."""

import base64
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer

import loramux
from loramux.report.build import make_report
from loramux.report.records import ReportError, read_folder
from report.folders import LINEARS, make_base, records, train, write_run

EVIL = "<script>alert(1)</script>$\\frac{\u2028&quot;\"'"
HISTORY = [{"step": i, "loss": 3.0 / i, "lr": 1e-3, "tokens": 10 * i} for i in range(1, 11)]


class Page(HTMLParser):
    """Tags with their attributes, and the text between them."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, Any]]] = []
        self.texts: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data.strip())

    @property
    def images(self) -> list[dict[str, Any]]:
        return [attrs for tag, attrs in self.tags if tag == "img"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def mixture(base: Path) -> Path:
    method = {"name": "mixlora", "r": 4, "num_experts": 4}
    return train(base, base.parent / "mixture", method, steps=12)


@pytest.fixture(scope="module")
def full(base: Path, mixture: Path) -> dict[str, Any]:
    """The result for a page with everything that needs the base."""
    out = base.parent / "full.html"
    return make_report(
        mixture, out, sentence="What comes after a?", data=[str(base.parent / "rows.jsonl")], rows=4
    )


def routers(step: int, layers: int, experts: int) -> dict[str, Any]:
    draw = np.random.default_rng(step)
    share = draw.dirichlet(np.ones(experts), layers).round(5)
    share[:, 0] = 0.0
    entries = [
        {
            "path": f"model.layers.{i}.mlp",
            "layer": i,
            "when": "token",
            "columns": 0,
            "count": 100,
            "entropy": 0.5,
            "share": share[i].tolist(),
            "pairs": [[1, 2, 0.25]] if experts > 2 else [],
        }
        for i in range(layers)
    ]
    return {"step": step, "columns": [[str(c) for c in range(experts)]], "routers": entries}


def test_the_numbers_in_the_page_are_those_of_the_run(mixture: Path, full: dict[str, Any]) -> None:
    found = records(Path(full["report"]))
    history = json.loads((mixture / "history.json").read_text())
    assert found["history"]["default"] == history
    (job,) = found["jobs"]
    saved = json.loads((mixture / "result.json").read_text())["jobs"][0]
    assert job["result"] == saved
    assert job["trained_parameters"] == job["expert_parameters"] + job["router_parameters"]
    rows = [json.loads(line) for line in (mixture / "routing.jsonl").read_text().splitlines()]
    late = [row for row in rows if row["step"] > 6]
    shown = found["routing"]["default"]
    assert shown["steps"] == [row["step"] for row in late]
    for number, router in enumerate(shown["routers"]):
        own = [row["routers"][number] for row in late]
        weights = [entry["count"] for entry in own]
        assert router["count"] == sum(weights)
        want = np.average([entry["share"] for entry in own], axis=0, weights=weights)
        assert router["share"] == pytest.approx(want, abs=2e-5)
        assert router["dead"] == int((want == 0).sum())
        assert router["max_violation"] == pytest.approx(4 * want.max() - 1, abs=1e-4)


def test_the_tables_show_the_same_numbers_to_people(full: dict[str, Any]) -> None:
    found = records(Path(full["report"]))
    texts = Page(Path(full["report"])).texts
    assert f"{found['jobs'][0]['trained_parameters']:,}" in texts
    assert "mixlora" in texts
    entropy = found["routing"]["default"]["routers"][0]["entropy"]
    assert f"{round(entropy, 4):.4g}" in texts


def test_the_page_loads_nothing_runs_nothing_and_describes_its_pictures(
    full: dict[str, Any],
) -> None:
    page = Page(Path(full["report"]))
    scripts = [attrs for tag, attrs in page.tags if tag == "script"]
    assert scripts == [{"type": "application/json", "id": "records"}]
    assert not {"link", "iframe", "object", "form"} & {tag for tag, _ in page.tags}
    assert not [a for _, attrs in page.tags for a in attrs if a.startswith("on")]
    text = re.sub(r'src="data:[^"]*"', "", Path(full["report"]).read_text(encoding="utf-8"))
    for outside in ("http:", "https:", "//cdn", "url(", "@import"):
        assert outside not in text
    assert len(page.images) >= 5
    for image in page.images:
        assert len(image["alt"]) > 20
        data = base64.b64decode(image["src"].removeprefix("data:image/png;base64,"))
        width, height = Image.open(io.BytesIO(data)).size
        assert 300 < width < 2600
        assert 200 < height < 3600


def test_gates_over_a_sentence_are_those_of_the_model(
    base: Path, mixture: Path, full: dict[str, Any]
) -> None:
    shown = records(Path(full["report"]))["sentence"]
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    handle = loramux.load(model, mixture / "adapter")
    ids = AutoTokenizer.from_pretrained(base)("What comes after a?", return_tensors="pt")
    assert len(shown["tokens"]) == ids["input_ids"].shape[1]
    with torch.no_grad():
        model(input_ids=ids["input_ids"], use_cache=False)
    for router, record in zip(shown["routers"], handle.routing(), strict=True):
        assert router["path"] == record.path
        np.testing.assert_allclose(router["weights"], record.gates.numpy(), atol=1e-5)


def test_routing_by_task_is_drawn_from_task_files(full: dict[str, Any]) -> None:
    found = records(Path(full["report"]))["routing_by_task"]
    assert set(found["tasks"]) == {"ask", "tell"}
    assert "Routing by task" in full["sections"]


def test_ranks_over_rounds_and_importance_are_those_of_the_edits(tmp_path: Path) -> None:
    paths = [f"model.layers.{layer}.{linear}" for layer in range(2) for linear in LINEARS]
    after = dict.fromkeys(paths, 2) | {paths[0]: 1, paths[1]: 3}
    scores = {path: float(i) for i, path in enumerate(paths)}
    edits = [
        {"step": 4, "what": "round", "site": "", "ranks": after, "importance": scores},
        {"step": 4, "what": "prune", "site": paths[0], "rank": 1},
        {"step": 4, "what": "add", "site": paths[1], "rank": 2},
        {"step": 8, "what": "expand", "site": paths[2], "pruned": [0, 1], "scores": [0.5, 1.5]},
    ]
    folder = write_run(tmp_path / "run", history=HISTORY, edits=edits, method="alora")
    result = make_report(folder)
    found = records(Path(result["report"]))
    ranks = found["ranks"]["default"]
    assert [entry["step"] for entry in ranks["history"]] == [0, 4]
    assert ranks["history"][0]["ranks"] == dict.fromkeys(paths, 2)
    assert ranks["history"][1]["ranks"] == after
    assert ranks["edits"] == edits
    importance = found["importance"]["default"]
    assert importance["rounds"] == [{"step": 4, "scores": scores}]
    assert importance["ranks"] == [{"site": paths[2], "step": 8, "scores": [0.5, 1.5]}]
    texts = Page(Path(result["report"])).texts
    assert {"round", "prune", "add", "expand"} <= set(texts)


@pytest.mark.filterwarnings("error")
def test_hostile_names_are_shown_and_not_obeyed(tmp_path: Path) -> None:
    edits = [
        {"step": 1, "what": EVIL, "site": f"model.layers.0.{EVIL}", "pruned": 1, "scores": [1, 2]}
    ]
    row = routers(5, 2, 3)
    row["columns"] = [[EVIL, "日本", "\x07bell"]]
    row["routers"][0]["path"] = f"model.layers.0.{EVIL}"
    folder = write_run(tmp_path / "run", name="job", history=HISTORY, edits=edits, routing=[row])
    run = json.loads((folder / "run.json").read_text())
    run["jobs"]["job"]["method"]["name"] = EVIL
    (folder / "run.json").write_text(json.dumps({"jobs": {EVIL: run["jobs"]["job"]}}))
    page_path = Path(make_report(folder, tmp_path / "page.html")["report"])
    page = Page(page_path)
    assert [attrs for tag, attrs in page.tags if tag == "script"] == [
        {"type": "application/json", "id": "records"}
    ]
    assert page_path.read_text(encoding="utf-8").count("<script") == 1
    assert sum(EVIL in text for text in page.texts) >= 3
    assert records(page_path)["jobs"][0]["name"] == EVIL


def test_a_page_stays_small_with_a_hundred_layers_and_many_experts(tmp_path: Path) -> None:
    rows = [routers(step, 100, 128) for step in (10, 20, 30, 40)]
    folder = write_run(tmp_path / "run", layers=100, history=HISTORY, routing=rows)
    result = make_report(folder)
    assert result["bytes"] < 3_000_000
    found = records(Path(result["report"]))["routing"]["default"]["routers"]
    assert len(found) == 100
    assert all(router["dead"] >= 1 for router in found)


def test_one_layer_and_two_experts_are_drawn_too(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", layers=1, history=HISTORY[:1], routing=[routers(1, 1, 2)])
    result = make_report(folder)
    assert {"Training", "Experts"} <= set(result["sections"])


def test_what_is_not_there_is_named_with_the_way_to_it(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    (folder / "adapter" / "adapter_model.safetensors").unlink()
    result = make_report(folder)
    missing = {part["what"]: part["how"] for part in result["missing"]}
    assert "cannot be read" in missing["The adapter of default"]
    assert "history.json" in missing["Loss curves"]
    texts = " ".join(Page(Path(result["report"])).texts)
    for what in missing:
        assert what in texts


def test_records_that_were_changed_cost_their_section_only(tmp_path: Path) -> None:
    rows = [{"step": 1, "columns": [["0"]], "routers": [{"path": 3, "share": "all"}]}]
    edits = [{"step": "soon", "what": "prune", "ranks": {"a": "many"}}]
    folder = write_run(tmp_path / "run", history=HISTORY[:2], routing=rows, edits=edits)
    result = make_report(folder)
    missing = {part["what"]: part["how"] for part in result["missing"]}
    for what in ("Experts", "Ranks"):
        assert "not as loramux writes them" in missing[what]
    assert "Training" in result["sections"]


def test_a_saved_adapter_alone_is_reported(mixture: Path, tmp_path: Path) -> None:
    result = make_report(mixture / "adapter", tmp_path / "deep" / "page.html")
    assert result["kind"] == "adapter"
    assert (tmp_path / "deep" / "page.html").is_file()
    missing = [part["what"] for part in result["missing"]]
    assert "Loss curves" in missing
    assert any("Experts" in what for what in missing)


def test_several_jobs_share_a_page(base: Path, tmp_path: Path) -> None:
    jobs = [
        {"name": "one", "method": {"name": "lora", "r": 2}},
        {"name": "two", "method": {"name": "milora", "r": 2}},
    ]
    folder = train(base, tmp_path / "run", {"name": "lora"}, jobs=jobs)
    result = make_report(folder)
    found = records(Path(result["report"]))
    assert [job["name"] for job in found["jobs"]] == ["one", "two"]
    assert set(found["history"]) == set(found["ranks"]) == {"one", "two"}
    assert "Experts of two" in result["sections"]
    assert "Experts of one" not in result["sections"]


def test_a_folder_that_holds_nothing_known_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match=r"holds none of run\.json"):
        read_folder(tmp_path)
    with pytest.raises(ReportError, match="is not a folder"):
        read_folder(tmp_path / "nothing")


def test_a_job_whose_name_leaves_the_folder_is_refused(tmp_path: Path) -> None:
    jobs = {"../other": {}, "two": {}}
    (tmp_path / "run.json").write_text(json.dumps({"jobs": jobs}))
    with pytest.raises(ReportError, match="no name of a folder"):
        read_folder(tmp_path)


def test_a_base_is_asked_for_where_nothing_names_one(mixture: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(mixture / "adapter", tmp_path / "copy")
    header = json.loads((copy / "mixture_config.json").read_text())
    header["base_model_name_or_path"] = ""
    (copy / "mixture_config.json").write_text(json.dumps(header))
    with pytest.raises(ReportError, match="--base"):
        make_report(copy, sentence="hello")
    assert not (copy / "run_report.html").exists()


def test_the_same_folder_gives_the_same_page(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", routing=[routers(5, 1, 2)])
    one = Path(make_report(folder, tmp_path / "one.html")["report"]).read_bytes()
    two = Path(make_report(folder, tmp_path / "two.html")["report"]).read_bytes()
    assert one == two
