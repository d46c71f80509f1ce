"""A file of requests in, a file of answers out: the library side of `loramux batch`.

Why its own file: thousands of lines must survive an interruption. All lines are checked before the model is read; an
answer is appended as soon as it is there; lines whose answer is in the output already are not asked again. An answer
carries a key of what was asked, so that an output is never continued with other questions or settings.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Collection, Mapping
from collections.abc import Sequence as Many
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Protocol

from jinja2 import TemplateError

from loramux.engine.request import Completion, Delta, Request, SamplingParams
from loramux.errors import DataError, suggest

PARAMS = tuple(field.name for field in fields(SamplingParams))
KEYS = ("prompt", "messages", "adapter", "tenant", "id", "task", *PARAMS)
NUM_SHOWN = 5  # bad lines in one error
AHEAD = 256  # requests handed to the engine at once: enough to prefetch adapters for

Record = dict[str, Any]


class Answering(Protocol):
    """What is needed of an engine."""

    @property
    def tokenizer(self) -> Any: ...
    def add_request(self, request: Request) -> str: ...
    def step(self) -> list[Delta]: ...
    def completion(self, request_id: str) -> list[Completion] | None: ...


@dataclass(frozen=True)
class Job:
    """One line: what it asks, and the key of all that its answer depends on."""

    line: int
    key: str
    id: str | int | None
    prompt: str | tuple[int, ...] | None  # None: `messages` are what is asked
    messages: tuple[Mapping[str, str], ...]
    adapter: str | Mapping[str, float] | None
    tenant: str
    params: SamplingParams
    task: str | None = None

    def request(self, tokenizer: Any) -> Request:
        """The request; messages go through the tokenizer's chat template."""
        prompt = self._templated(tokenizer) if self.prompt is None else self.prompt
        return Request(
            prompt=prompt,
            adapter=self.adapter,
            params=self.params,
            tenant=self.tenant,
            id=f"line-{self.line}",
            task=self.task,
        )

    def _templated(self, tokenizer: Any) -> list[int]:
        if not getattr(tokenizer, "chat_template", None):
            raise DataError(
                f"line {self.line}: the tokenizer has no chat template; give a prompt, not messages"
            )
        messages = [dict(message) for message in self.messages]
        try:
            text = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        except TemplateError as error:
            raise DataError(
                f"line {self.line}: the chat template refuses the messages ({error})"
            ) from None
        # The template writes the special tokens itself.
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def read_jobs(
    path: Path, adapters: Collection[str] = (), defaults: Mapping[str, Any] | None = None, base: str = ""
) -> list[Job]:  # fmt: skip
    """Every line of a JSONL file, empty ones skipped. Raises DataError that names the bad lines, if there are any.

    A line holds `prompt` (a text or token ids) or `messages`, and may hold `adapter` (a name, or {name: weight}),
    `tenant`, `id` and any sampling parameter; `defaults` are parameters for lines that do not say. `adapters`: the
    names that lines may use; a mapping also says what each stands for, which becomes part of the keys, as `base` does.
    """
    jobs, bad = [], []
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    for number, raw in enumerate(lines, start=1):
        try:
            text = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            if text:
                jobs.append(_parse(text, number, adapters, defaults or {}, base))
        except ValueError as error:
            bad.append(f"line {number}: {error}")
    if bad:
        shown = "; ".join(bad[:NUM_SHOWN])
        more = f"; and {len(bad) - NUM_SHOWN} more" if len(bad) > NUM_SHOWN else ""
        raise DataError(f"{path}: {len(bad)} of {len(lines)} lines cannot be used: {shown}{more}")
    if not jobs:
        raise DataError(f'{path}: no line to answer; each holds e.g. {{"prompt": "Hello"}}')
    return jobs


def _parse(
    text: str, line: int, adapters: Collection[str], defaults: Mapping[str, Any], base: str
) -> Job:
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"not valid JSON ({error.msg} at column {error.colno})") from None
    if not isinstance(row, dict):
        raise DataError(f"a line must hold one JSON object, got {type(row).__name__}")
    for key in row:
        if key not in KEYS:
            raise DataError(f"unknown key {key!r}; {suggest(key, KEYS)}")
    if ("prompt" in row) == ("messages" in row):
        raise DataError("give either 'prompt' or 'messages'")
    values = {**defaults, **{key: row[key] for key in PARAMS if key in row}}
    for key in ("stop", "stop_token_ids"):
        if isinstance(values.get(key), list):
            values[key] = tuple(values[key])
    try:
        params = SamplingParams(**values)
    except TypeError as error:
        raise DataError(f"a parameter has the wrong type ({error})") from None
    prompt = _prompt(row["prompt"]) if "prompt" in row else None
    messages = _messages(row["messages"]) if "messages" in row else ()
    adapter = _adapter(row.get("adapter"), adapters)
    tenant, given = row.get("tenant", "default"), row.get("id")
    if not isinstance(tenant, str) or not tenant:
        raise DataError(f"tenant must be a text that is not empty, got {tenant!r}")
    if given is not None and (isinstance(given, bool) or not isinstance(given, str | int)):
        raise DataError(f"id must be a text or a whole number, got {given!r}")
    task = row.get("task")
    Request(
        prompt=prompt or (0,), adapter=adapter, params=params, tenant=tenant, task=task
    )  # refuses what it refuses
    named = [adapter] if isinstance(adapter, str) else list(adapter or ())
    contents = [str(adapters[name]) for name in named] if isinstance(adapters, Mapping) else []
    asked = [base, prompt, messages, adapter, contents, asdict(params)]
    asked += [] if task is None else [task]
    key = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]
    return Job(line, key, given, prompt, messages, adapter, tenant, params, task)


def _prompt(value: Any) -> str | tuple[int, ...]:
    if isinstance(value, str) and value:
        return value
    if isinstance(value, list) and value and all(type(token) is int for token in value):
        return tuple(value)
    raise DataError(f"prompt must be a text or a list of token ids, not empty; got {value!r}")


def _messages(value: Any) -> tuple[Mapping[str, str], ...]:
    if not isinstance(value, list) or not value:
        raise DataError(f"messages must be a list that is not empty, got {value!r}")
    for message in value:
        is_right = isinstance(message, dict) and set(message) == {"role", "content"}
        if not is_right or not all(isinstance(part, str) for part in message.values()):
            raise DataError(f"a message must hold a text 'role' and 'content', got {message!r}")
    return tuple(value)


def _adapter(value: Any, known: Collection[str]) -> str | Mapping[str, float] | None:
    if value is None:
        return None
    names = [value] if isinstance(value, str) else value
    if not (isinstance(value, str | dict) and names):
        raise DataError(
            f"adapter must be a name, a mix of names and weights or null, got {value!r}"
        )
    for name in names:
        if name not in known:
            hint = suggest(str(name), known) if known else "add it with --adapter NAME=DIR"
            raise DataError(f"no adapter {name!r}; {hint}")
    if isinstance(value, str):
        return value
    for weight in value.values():
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise DataError(f"weights of a mix must be numbers, got {weight!r}")
    return {name: float(weight) for name, weight in value.items()}


def read_done(out: Path, jobs: Many[Job]) -> dict[int, Record]:
    """Line -> answer for what an earlier run left in `out`; a line it was interrupted in is cut off."""
    if not out.exists():
        return {}
    data = out.read_bytes()
    whole = data.rfind(b"\n") + 1
    keys = {job.line: job.key for job in jobs}
    done = {}
    for number, raw in enumerate(data[:whole].splitlines(), start=1):
        try:
            record = json.loads(raw)
            line, key = int(record["line"]), record["key"]
        except (ValueError, KeyError, TypeError):
            raise DataError(
                f"{out}: line {number} was not written by this command; give another file"
            ) from None
        if keys.get(line) != key:
            raise DataError(
                f"{out}: holds an answer to line {line} as it was asked with another base, parameter or text; "
                "give another file, or remove it to start over"
            )
        done[line] = record
    if whole < len(data):
        with out.open("r+b") as file:
            file.truncate(whole)
    return done


def run_jobs(
    engine: Answering, jobs: Many[Job], out: Path, on_answer: Callable[[Record], None]
) -> None:
    """Answer all jobs, appending each answer to `out` when it is there (not in the order of lines)."""
    requests = deque((job, job.request(engine.tokenizer)) for job in jobs)
    running: dict[str, Job] = {}
    with out.open("a", encoding="utf-8") as file:

        def write(record: Record) -> None:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            file.flush()
            on_answer(record)

        while requests or running:
            while requests and len(running) < AHEAD:
                job, request = requests.popleft()
                try:
                    running[engine.add_request(request)] = job
                except ValueError as error:
                    write(_record(job, [], str(error)))
            ended = {d.request_id for d in engine.step() if d.finish_reason is not None}
            for request_id in sorted(ended & set(running)):
                completions = engine.completion(request_id)
                if completions is not None:
                    write(_record(running.pop(request_id), completions, None))


def _record(job: Job, completions: Many[Completion], error: str | None) -> Record:
    """What is written for a line. `error` is set if any sample has one; parts that say nothing are left out."""
    errors = [c.error for c in completions if c.error is not None]
    record: Record = {"line": job.line, "key": job.key}
    if job.id is not None:
        record["id"] = job.id
    if completions:
        first = completions[0]
        record["answers"] = [_answer(completion) for completion in completions]
        record["prompt_tokens"] = first.prompt_tokens
        record["base"] = first.answered.base
        record["adapters"] = [
            {"name": name, "digest": digest, "weight": weight}
            for name, digest, weight in first.answered.parts
        ]
    if error is not None or errors:
        record["error"] = error or errors[0]
    return record


def _answer(completion: Completion) -> Record:
    answer: Record = {
        "text": completion.text,
        "token_ids": list(completion.token_ids),
        "finish_reason": completion.finish_reason,
    }
    if completion.logprobs:
        answer["logprobs"] = [asdict(logprob) for logprob in completion.logprobs]
    return answer
