"""The steps of the serving demo: each asks, looks at the receipts of what answered, and says whether that is right.

Why floors instead of exact answers: the adapters are trained in minutes, on a base of 135 million weights. What they
know is measured (`right`); which of them answered, and under whose rights, must be exact.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loramux.demo.serve_home import OTHER, OWNER
from loramux.demo.serve_talk import Answer, Talk, zipped

if TYPE_CHECKING:
    from loramux.data.tasks import TaskRow

ROWS = 8  # questions of a step
AUTO_ROWS = 10  # of each task
LEAST_RIGHT = 0.5  # of a trained adapter's answers on its own task; the base has next to none
LEAST_MIX = 0.25
LEAST_HITS = 0.9
UPLOAD_S = 30.0
WEIGHTS = {"snips": 0.7, "banking": 0.3}


@dataclass(frozen=True)
class Scene:
    """What the steps are about. `refs`: published adapters; `fresh`: the folder of the one to upload."""

    talk: Talk
    rows: dict[str, list[TaskRow]]
    samples: dict[str, list[str]]
    refs: dict[str, str]
    fresh: Path
    known: dict[str, str] = field(default_factory=dict)  # refs of what was uploaded meanwhile

    def ref(self, name: str) -> str | None:
        return self.known.get(name, self.refs.get(name))


@dataclass(frozen=True)
class Outcome:
    """asked, answered: for people."""

    asked: str
    answered: str
    is_right: bool
    detail: dict[str, Any] = field(default_factory=dict)


Step = Callable[[Scene], Outcome]
FRESH = "clinc"  # the task and the name of the adapter that is uploaded


def one_adapter(scene: Scene) -> Outcome:
    """An adapter by its name, and the base beside it in the same batch."""
    rows = scene.rows["snips"][:ROWS]
    asked = [("snips", row) for row in rows] + [(scene.talk.base, row) for row in rows]
    answers = scene.talk.ask_all(asked)
    tuned, plain = answers[: len(rows)], answers[len(rows) :]
    right, before = _right(tuned), _right(plain)
    is_who = all(a.parts == [(scene.ref("snips"), 1.0)] for a in tuned)
    is_who &= all(a.parts == [] for a in plain)
    return Outcome(
        f"model=snips and model={scene.talk.base}, {len(rows)} questions each",
        f"{_who(tuned)}: {right} of {len(rows)} right; {_who(plain)}: {before}",
        is_who and right >= LEAST_RIGHT * len(rows),
        {"right": right, "of": len(rows), "base_right": before},
    )


def a_stream(scene: Scene) -> Outcome:
    """The same answer in pieces, with the receipt in the last chunk."""
    row = scene.rows["clickbait"][0]
    whole = scene.talk.ask("clickbait", row)
    num_pieces, answer = scene.talk.stream("clickbait", row)
    is_same = (answer.text, answer.parts) == (whole.text, whole.parts)
    return Outcome(
        "model=clickbait, stream=True",
        f"{answer.who}: {answer.text!r} in {num_pieces} pieces, whole: {whole.text!r}",
        is_same and answer.refs == (scene.ref("clickbait"),),
    )


def a_weighted_mix(scene: Scene) -> Outcome:
    """Two adapters at once, never saved as one."""
    rows = scene.rows["snips"][:ROWS]
    model = "+".join(f"{name}*{weight}" for name, weight in WEIGHTS.items())
    answers = scene.talk.ask_all([(model, row) for row in rows])
    wanted = [(scene.refs[name], weight) for name, weight in WEIGHTS.items()]
    right = _right(answers)
    return Outcome(
        f"model={model}, {len(rows)} questions of snips",
        f"{_who(answers)}: {right} of {len(rows)} right",
        all(sorted(a.parts) == sorted(wanted) for a in answers) and right >= LEAST_MIX * len(rows),
        {"right": right, "of": len(rows)},
    )


def a_milora(scene: Scene) -> Outcome:
    """A mixture whose router decides by the prompt which linears are adapted."""
    rows = scene.rows["snips"][: ROWS // 2] + scene.rows["banking"][: ROWS // 2]
    answers = scene.talk.ask_all([("router:milora", row) for row in rows])
    right = _right(answers)
    is_who = all(
        a.refs == (scene.ref("milora"),) and a.said["router"]["ref"] == scene.ref("milora")
        for a in answers
    )
    return Outcome(
        f"model=router:milora, {len(rows)} questions of snips and banking",
        f"{_who(answers)} with its router: {right} of {len(rows)} right",
        is_who and right >= LEAST_RIGHT * len(rows),
        {"right": right, "of": len(rows)},
    )


def an_upload(scene: Scene) -> Outcome:
    """An adapter that the server has never seen, used as soon as it is there: by name and by `auto`."""
    row = scene.rows[FRESH][0]
    archive = zipped(scene.fresh)
    began = time.perf_counter()
    reply = scene.talk.upload(FRESH, archive, scene.samples[FRESH])
    stored_s = time.perf_counter() - began
    made = reply.json()
    if reply.status_code != 201:
        return Outcome(f"upload of {FRESH}", f"{reply.status_code}: {made}", False)
    first = scene.talk.ask(FRESH, row)
    used_s = time.perf_counter() - began
    scene.known[FRESH] = made["ref"]
    found = scene.talk.ask("auto", row)
    answers = scene.talk.ask_all([(FRESH, row) for row in scene.rows[FRESH][:ROWS]])
    right = _right(answers)
    is_it = all(a.refs == (made["ref"],) for a in (first, found, *answers))
    is_it &= first.said["parts"][0]["digest"] == made["digest"]
    return Outcome(
        f"POST /v1/adapters, {len(archive) / 1e6:.1f} MB, then model={FRESH} and model=auto",
        f"{first.who}: stored after {stored_s:.2f} s, answered after {used_s:.2f} s, "
        f"{right} of {len(answers)} right; auto chose {found.who}",
        is_it and used_s <= UPLOAD_S and right >= LEAST_RIGHT * len(answers),
        {"stored_s": stored_s, "used_s": used_s, "right": right, "of": len(answers)},
    )


def auto(scene: Scene) -> Outcome:
    """Mixed prompts of four tasks, nobody says which is which."""
    asked = _mixed(scene)
    answers = scene.talk.ask_all([("auto", row) for _, row in asked])
    counts, is_allowed = _choices(scene, [task for task, _ in asked], answers)
    right = _right(answers)
    return Outcome(
        f"model=auto, {AUTO_ROWS} prompts of each of {len(scene.rows)} tasks, mixed",
        f"the task's own adapter {counts['hits']} of {len(asked)} times; {right} answers right",
        is_allowed and counts["hits"] >= LEAST_HITS * len(asked),
        {**counts, "of": len(asked), "right": right},
    )


def auto_without_instruction(scene: Scene) -> Outcome:
    """The same without the sentence that all prompts of a task begin with: the base answers where little fits."""
    asked = [
        (task, replace(row, prompt=row.prompt.partition("? ")[2] or row.prompt))
        for task, row in _mixed(scene)
    ]
    answers = scene.talk.ask_all([("auto", row) for _, row in asked], tokens=1)
    counts, is_allowed = _choices(scene, [task for task, _ in asked], answers)
    return Outcome(
        f"model=auto, the same {len(asked)} prompts without the sentence that names the task",
        f"the task's own adapter {counts['hits']} times, the base {counts['base']}, another {counts['misses']}",
        is_allowed and counts["hits"] >= counts["misses"],
        {**counts, "of": len(asked)},
    )


def _mixed(scene: Scene) -> list[tuple[str, TaskRow]]:
    return [(task, rows[n]) for n in range(AUTO_ROWS) for task, rows in scene.rows.items()]


def _choices(
    scene: Scene, tasks: Sequence[str], answers: Sequence[Answer]
) -> tuple[dict[str, int], bool]:
    """How often the task's own adapter answered, the base, another; and whether it was always one of these."""
    own = sum(a.refs == (scene.ref(task),) for task, a in zip(tasks, answers, strict=True))
    base = sum(a.refs == () for a in answers)
    allowed = {(scene.ref(task),) for task in scene.rows} | {()}
    counts = {"hits": own, "base": base, "misses": len(answers) - own - base}
    return counts, {a.refs for a in answers} <= allowed


def bad_uploads(scene: Scene) -> Outcome:
    """Four broken adapters, each refused with the code of its fault, none of them there afterwards."""
    weights = scene.fresh / "adapter_model.safetensors"
    config = (scene.fresh / "adapter_config.json").read_bytes()
    data = weights.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    cases = {
        "no_op": zipped(scene.fresh, adapter_model=data[:header] + bytes(len(data) - header)),
        "corrupt": zipped(scene.fresh, adapter_model=data[:-100]),
        "peft_type": zipped(scene.fresh, adapter_config=config.replace(b'"LORA"', b'"IA3"')),
        "archive_kind": b"\x80\x04 this is a pickle, or anything",
    }
    told, is_right = [], True
    for code, archive in cases.items():
        name = f"broken-{code.replace('_', '-')}"
        reply = scene.talk.upload(name, archive)
        got = reply.json().get("error", {}).get("code")
        gone = scene.talk.http[OWNER].get(f"/adapters/{name}").status_code
        told.append(f"{reply.status_code} {got}")
        is_right &= reply.status_code == 400 and got == code and gone == 404
    return Outcome(
        "uploads: all zero, cut off, another kind, no archive", ", ".join(told), is_right
    )


def another_tenant(scene: Scene) -> Outcome:
    """A private adapter looks to others as if it did not exist: by name, in a mix, in lists, to `auto`."""
    row = scene.rows["snips"][0]
    foreign = _refusal(scene.talk, f"{OWNER}/snips", row)
    missing = _refusal(scene.talk, f"{OWNER}/nothing", row)
    mixed = _refusal(scene.talk, f"{OWNER}/snips*0.5+{OWNER}/banking*0.5", row)
    listed = [m.id for m in scene.talk.clients[OTHER].models.list()]
    found = scene.talk.ask("auto", row, tenant=OTHER)
    is_same = foreign == (missing[0], missing[1].replace("nothing", "snips"))
    is_none = not any(name.startswith(f"{OWNER}/") for name in listed) and found.refs == ()
    return Outcome(
        f"{OTHER} asks model={OWNER}/snips, a name that is missing, a mix, the list, auto",
        f"{foreign[0]}, {missing[0]}, {mixed[0]}; list: {', '.join(listed)}; auto: {found.who}",
        is_same and foreign[0] == mixed[0] == "404 model_not_found" and is_none,
    )


def a_share(scene: Scene) -> Outcome:
    """The owner lets the other tenant use an adapter, and ends it."""
    row, http = scene.rows["snips"][0], scene.talk.http[OWNER]
    shared = http.post("/adapters/snips/shares", json={"tenant": OTHER})
    used = scene.talk.ask(f"{OWNER}/snips", row, tenant=OTHER)
    ended = http.delete(f"/adapters/snips/shares/{OTHER}")
    after, _ = _refusal(scene.talk, f"{OWNER}/snips", row)
    return Outcome(
        f"{OWNER} shares snips with {OTHER}, {OTHER} asks; the share ends, {OTHER} asks again",
        f"{used.who}; then {after}",
        (shared.status_code, ended.status_code, after) == (201, 200, "404 model_not_found")
        and used.refs == (scene.ref("snips"),),
    )


def _refusal(talk: Talk, model: str, row: TaskRow) -> tuple[str, str]:
    """("404 code", the whole body) of what OTHER may not use; "answered" if it is answered after all."""
    from openai import APIStatusError

    try:
        talk.ask(model, row, tenant=OTHER)
    except APIStatusError as error:
        return f"{error.status_code} {error.code}", error.response.text
    return "answered", ""


def _right(answers: Sequence[Answer]) -> int:
    return sum(answer.is_right for answer in answers)


def _who(answers: Sequence[Answer]) -> str:
    return ", ".join(dict.fromkeys(answer.who for answer in answers))


ASKING: tuple[tuple[str, Step], ...] = (
    ("one adapter", one_adapter),
    ("a stream", a_stream),
    ("a weighted mix", a_weighted_mix),
    ("a MiLoRA", a_milora),
    ("an upload, used at once", an_upload),
    ("auto", auto),
    ("auto, task not named", auto_without_instruction),
    ("bad uploads", bad_uploads),
    ("another tenant", another_tenant),
    ("a share", a_share),
)
