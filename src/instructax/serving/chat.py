"""Answers prompts with a finished policy: what `scripts/sample.py` types."""

import dataclasses
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from instructax import sharding
from instructax.checkpoints.parents import open_parent
from instructax.config import ConfigError, construct, require
from instructax.data.chat_template import (
    ChatTemplate,
    Message,
    check_messages,
    encode_messages,
    load_template,
    turn_end_mask,
)
from instructax.data.prompt_format import add_separator
from instructax.data.tokenizer import Tokenizer, load_tokenizer
from instructax.models import ComputeConfig, ModelConfig, Transformer
from instructax.models.init import abstract_params
from instructax.runtime.redaction import printable
from instructax.serving.engine import Draw, Engine
from instructax.serving.text_stream import TextStream
from instructax.sharding import MeshConfig


def open_policy(
    path: str | Path, compute: ComputeConfig
) -> tuple[Transformer, Any, Tokenizer]:
    """(network, parameters, tokenizer) of the finished run at `path`, on the first device,
    as its manifest says."""
    run = open_parent(path, "--workdir")
    manifest = run.manifest
    require(
        manifest["head"] == "tokens",
        f"{path} holds a run of the stage {manifest['stage']!r} with a {manifest['head']} head; "
        "only runs with a tokens head answer prompts",
    )
    model = Transformer(
        construct(ModelConfig, manifest["model"], "model"), compute, "tokens"
    )
    tokenizer = load_tokenizer(str(run.workdir / "tokenizer.json"))
    require(
        tokenizer.hash == manifest["tokenizer"]["hash"],
        f"{run.workdir / 'tokenizer.json'} has changed since the run was trained: restore it",
    )
    mesh = sharding.make_mesh(
        MeshConfig(data=1, fsdp=1, tensor=1), devices=jax.devices()[:1]
    )
    return model, run.load(abstract_params(model, mesh)), tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy:
    """What answers: a network that is ready, its tokenizer, and its chat template if it has
    one."""

    engine: Engine
    tokenizer: Tokenizer
    template: ChatTemplate | None

    def encode(self, messages: Sequence[Message]) -> np.ndarray:
        """The prompt i32[n] to which the assistant's next message is the answer."""
        return encode_messages(messages, self.tokenizer, self.template)


def open_served(path: str | Path, *, dtype: Any, rows: int) -> Policy:
    """The policy of the finished run at `path`, for up to `rows` requests at a time."""
    parts = {
        "microbatch_rows": rows,
        "tail_splits": 0,
        "slots": rows,
        "compaction_steps": 0,
    }
    compute = ComputeConfig(
        dtype=dtype,
        decoding_dtype=dtype,
        attention="jax",
        remat="none",
        head_chunk=64,
        **parts,
    )
    model, params, tokenizer = open_policy(path, compute)
    template = load_template(open_parent(path, "--workdir").workdir, tokenizer)
    engine = Engine(model, params, eos_id=tokenizer.eos_id, rows=rows)
    return Policy(engine=engine, tokenizer=tokenizer, template=template)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How a prompt is answered."""

    length: int  # the most tokens
    temperature: float
    seed: int
    samples: int  # answers to each prompt
    stops: tuple[str, ...]  # texts that end an answer, and are left out of it


def answers(
    policy: Policy,
    prompts: Sequence[tuple[int, np.ndarray]],
    asking: SamplingParams,
    ends: np.ndarray | None,
) -> Iterator[tuple[list[str], list[TextStream]]]:
    """Again and again (what can be shown next of each answer, all answers so far);
    `samples` answers to each prompt.

    A prompt is (its number, its tokens i32[n]): number and seed decide what is drawn. A
    token of `ends` b[V] ends an answer too.
    """
    draws = [
        Draw(
            prompt=tokens,
            seed=asking.seed,
            number=number * asking.samples + sample,
            temperature=asking.temperature,
            limit=asking.length,
        )
        for number, tokens in prompts
        for sample in range(asking.samples)
    ]
    streams = [TextStream(policy.tokenizer, asking.stops) for _ in draws]
    for pieces in policy.engine.stream(draws, ends):
        shown = [
            stream.add(piece.tokens, over=piece.over, ended=piece.ended)
            for stream, piece in zip(streams, pieces, strict=True)
        ]
        yield shown, streams
        if all(stream.finish for stream in streams):
            return


def _opened_for(
    asking: SamplingParams, path: str | Path, *, dtype: Any, rows: int
) -> Policy:
    """As `open_served`; raises ConfigError if answers so long leave a prompt no room."""
    policy = open_served(path, dtype=dtype, rows=rows)
    policy.engine.check(1, asking.length)
    return policy


def talk(
    path: str | Path, prompts: Iterable[str], asking: SamplingParams, *, dtype: Any
) -> None:
    """Prints answers to each prompt, a single one while it is drawn; one that cannot be
    read gets the reason."""
    policy = _opened_for(asking, path, dtype=dtype, rows=asking.samples)
    for number, prompt in enumerate(prompts):
        try:
            _print_answers(
                policy, policy.tokenizer.encode(add_separator(prompt)), asking, number, None
            )
        except ValueError as error:
            print(f"({printable(str(error))})", flush=True)


def converse(
    path: str | Path,
    said: Iterable[str],
    asking: SamplingParams,
    *,
    dtype: Any,
    system: str,
) -> None:
    """As `talk`, as one conversation, which "/new" begins anew; `system`, if not empty,
    opens it."""
    policy = _opened_for(asking, path, dtype=dtype, rows=1)
    ends = turn_end_mask(policy.tokenizer, policy.template)
    opening: list[Message] = [{"role": "system", "content": system}] if system else []
    messages = list(opening)
    for number, text in enumerate(said):
        if text == "/new":
            messages = list(opening)
            continue
        asked = [*messages, {"role": "user", "content": text}]
        try:
            require(bool(text.strip()), "nothing was said")
            (answer,) = _print_answers(policy, policy.encode(asked), asking, number, ends)
        except ValueError as error:
            print(f"({printable(str(error))}; /new begins anew)", flush=True)
        else:
            messages = [*asked, {"role": "assistant", "content": answer}]


def _print_answers(
    policy: Policy,
    prompt: np.ndarray,
    asking: SamplingParams,
    number: int,
    ends: np.ndarray | None,
) -> list[str]:
    streams: list[TextStream] = []
    for shown, streams in answers(policy, [(number, prompt)], asking, ends):  # noqa: B007, the last ones are read below
        if len(shown) == 1:
            print(printable(shown[0]), end="", flush=True)
    if len(streams) == 1:
        print(flush=True)
    else:
        for stream in streams:
            print(printable(stream.text), flush=True)
    return [stream.text for stream in streams]


def answer_file(
    path: str | Path,
    source: Path,
    target: Path,
    asking: SamplingParams,
    *,
    dtype: Any,
    rows: int,
) -> None:
    """Answers the prompts of `source`, one JSON object a line, into `target`, in the same
    order.

    A line has `prompt` or `messages`, and what else it has is kept; added are `answers`
    and, of each, `finish` ("stop" or "length") and `tokens`. A prompt that does not fit
    gets `error` instead. Raises ValueError for a line that cannot be used, before anything
    is drawn, and if `target` is there already.
    """
    require(
        not target.exists(),
        f"--output = {target} is there already: delete it, or choose another name",
    )
    lines = list(_asked(source))
    # One answer in a batch for each sample; a prompt's own are in one batch.
    policy = _opened_for(asking, path, dtype=dtype, rows=max(rows, asking.samples))
    together = max(rows // asking.samples, 1)
    with target.open("w", encoding="utf-8") as file:
        for first in range(0, len(lines), together):
            for line in _answered(policy, lines[first : first + together], asking, first):
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
    print(f"{target}: {len(lines)} prompts answered", flush=True)


def _answered(
    policy: Policy, lines: list[dict[str, Any]], asking: SamplingParams, first: int
) -> list[dict[str, Any]]:
    """`lines` with their answers; the random numbers of a line are those of its number in
    the file."""
    done = list(lines)
    prompts: dict[bool, list[tuple[int, np.ndarray]]] = {
        False: [],
        True: [],
    }  # by whether turns end answers too
    for i, line in enumerate(lines):
        chats = "messages" in line
        try:
            tokens = (
                policy.encode(line["messages"])
                if chats
                else policy.tokenizer.encode(add_separator(line["prompt"]))
            )
            policy.engine.check(len(tokens), asking.length)
            prompts[chats].append((first + i, tokens))
        except ValueError as error:
            done[i] = line | {"error": str(error)}
    for chats, asked in prompts.items():
        ends = turn_end_mask(policy.tokenizer, policy.template) if chats else None
        streams = (
            [streams for _, streams in answers(policy, asked, asking, ends)][-1]
            if asked
            else []
        )
        for place, (number, _) in enumerate(asked):
            own = streams[place * asking.samples : (place + 1) * asking.samples]
            found = {
                "answers": [stream.text for stream in own],
                "finish": [stream.finish for stream in own],
            }
            done[number - first] = (
                lines[number - first]
                | found
                | {"tokens": [stream.tokens for stream in own]}
            )
    return done


def _asked(source: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file of JSON lines that can be answered, blank lines left out."""
    try:
        text = source.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--input = {source} cannot be read: {error}") from None
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield _question(f"{source}:{number}", line)


def _question(place: str, line: str) -> dict[str, Any]:
    try:
        given = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{place}: not JSON: {error}") from None
    require(isinstance(given, dict), f"{place}: not a JSON object ({line[:40]!r})")
    require(
        ("prompt" in given) != ("messages" in given),
        f"{place}: give one of prompt and messages",
    )
    if "prompt" in given:
        require(isinstance(given["prompt"], str), f"{place}: prompt must be a string")
    else:
        check_messages(given["messages"], f"{place}: messages")
    return given
