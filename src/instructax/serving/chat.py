"""Samples from a finished policy: completions, an interactive chat, and batch files."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from instructax.config import ConfigError, require
from instructax.data.chat_template import Message, check_messages, turn_end_mask
from instructax.data.prompt_format import add_separator
from instructax.runtime.files import refuse_constant, write_atomically
from instructax.runtime.redaction import printable
from instructax.serving.engine import SampleRequest
from instructax.serving.policy import Policy, open_served
from instructax.serving.text_stream import TextStream

# Fields that `complete_file` adds to each line.
RESULT_FIELDS = ("answers", "finish", "tokens", "error")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How completions are sampled."""

    max_new_tokens: int
    # 0 = greedy.
    temperature: float
    seed: int
    # Completions of each prompt.
    num_samples: int
    # They end a completion and are not part of it.
    stop_strings: tuple[str, ...]


def stream_completions(
    policy: Policy,
    prompts: Sequence[tuple[int, np.ndarray]],
    sampling: SamplingParams,
    stop_token_mask: np.ndarray | None,
) -> Iterator[tuple[list[str], list[TextStream]]]:
    """Samples `num_samples` completions of each prompt.

    Args:
      policy: the policy.
      prompts: (prompt index, tokens i32[n]) of each prompt. The index and the seed
        determine the random numbers.
      sampling: sampling parameters.
      stop_token_mask: further tokens that end a completion, b[V].

    Yields:
      The new text of each completion, and the streams with all text so far. Completions
      of one prompt are adjacent.
    """
    # Every completion has a sample index of its own, in all batches of a command.
    requests = []
    for index, tokens in prompts:
        for sample in range(sampling.num_samples):
            requests.append(
                SampleRequest(
                    prompt=tokens,
                    seed=sampling.seed,
                    sample_index=index * sampling.num_samples + sample,
                    temperature=sampling.temperature,
                    max_new_tokens=sampling.max_new_tokens,
                )
            )

    streams = [TextStream(policy.tokenizer, sampling.stop_strings) for _ in requests]
    for chunks in policy.engine.stream(requests, stop_token_mask):
        pieces = []
        for stream, chunk in zip(streams, chunks, strict=True):
            piece = stream.add(chunk.tokens, done=chunk.done, hit_eos=chunk.hit_eos)
            pieces.append(piece)
        yield pieces, streams
        # Stop strings may end all completions before the engine does.
        if all(stream.finish_reason for stream in streams):
            return


def print_completions(
    path: str | Path, prompts: Iterable[str], sampling: SamplingParams, *, dtype: Any
) -> None:
    """Prints completions of each prompt, or why a prompt cannot be used.

    A single completion is printed while it is sampled.
    """
    policy = _open_checked(path, sampling, dtype=dtype, batch_size=sampling.num_samples)
    for index, prompt in enumerate(prompts):
        try:
            # Stages separate prompt and completion in the same way.
            tokens = policy.tokenizer.encode(add_separator(prompt))
            _print_streamed(policy, tokens, sampling, index, None)
        except ValueError as error:
            print(f"({printable(str(error))})", flush=True)


def run_chat(
    path: str | Path,
    user_turns: Iterable[str],
    sampling: SamplingParams,
    *,
    dtype: Any,
    system: str,
) -> None:
    """Prints the assistant's answers in one conversation.

    Args:
      path: the finished run.
      user_turns: what the user says; "/new" starts a new conversation.
      sampling: sampling parameters; one sample per turn.
      dtype: the computation's dtype.
      system: system message that starts each conversation, or "".
    """
    policy = _open_checked(path, sampling, dtype=dtype, batch_size=1)
    stop_token_mask = turn_end_mask(policy.tokenizer, policy.template)
    # Every conversation starts with the system message, if there is one.
    opening: list[Message] = []
    if system:
        opening.append({"role": "system", "content": system})

    messages = list(opening)
    for index, text in enumerate(user_turns):
        if text == "/new":
            messages = list(opening)
            continue
        conversation = [*messages, {"role": "user", "content": text}]
        try:
            require(bool(text.strip()), f"the message {text!r} is empty: type a question")
            prompt = policy.encode(conversation)
            (answer,) = _print_streamed(policy, prompt, sampling, index, stop_token_mask)
        except ValueError as error:
            # The failed turn is dropped; the conversation before it stays.
            print(f"({printable(str(error))}; /new starts a new conversation)", flush=True)
        else:
            messages = [*conversation, {"role": "assistant", "content": answer}]


def complete_file(
    path: str | Path,
    source: Path,
    target: Path,
    sampling: SamplingParams,
    *,
    dtype: Any,
    batch_size: int,
) -> None:
    """Completes the prompts of a JSONL file, in the same order.

    Each line has `prompt` or `messages`; its other fields are kept. Added are `answers`,
    and for each of them `finish` ("stop" or "length") and `tokens`. A prompt that cannot be
    completed gets `error` instead.

    Finished lines are written to `target` + ".partial" first. The same call continues from
    them if it was interrupted.

    Args:
      path: the finished run.
      source: JSONL file to read.
      target: JSONL file to write; it must not exist.
      sampling: sampling parameters.
      dtype: the computation's dtype.
      batch_size: completions that are sampled at a time.

    Raises:
      ConfigError: `target` exists, a line cannot be used, or the partial file belongs to
        another call. Nothing is sampled then.
    """
    require(
        not target.exists(),
        f"--output = {target} exists already: delete it, or choose another name",
    )
    lines = list(_read_lines(source))
    # Everything that the completions depend on.
    call = {
        "path": str(path),
        "input": hashlib.sha256(source.read_bytes()).hexdigest(),
        "dtype": str(dtype),
        **dataclasses.asdict(sampling),
    }
    partial = target.with_name(target.name + ".partial")
    finished = _finished_lines(partial, call)

    # All samples of a prompt are in one batch, so a batch holds at least one prompt.
    batch_size = max(batch_size, sampling.num_samples)
    prompts_per_batch = batch_size // sampling.num_samples
    policy = _open_checked(path, sampling, dtype=dtype, batch_size=batch_size)
    if finished:
        print(f"{partial}: continuing after {len(finished)} of {len(lines)} prompts")
    with partial.open("w", encoding="utf-8") as file:
        file.writelines([json.dumps(call) + "\n", *finished])
        for first in range(len(finished), len(lines), prompts_per_batch):
            batch = lines[first : first + prompts_per_batch]
            for line in _complete_batch(policy, batch, sampling, first):
                file.write(_to_json_line(line))
            # Finished batches survive an interruption.
            file.flush()

    # Without the first line, which describes the call.
    _, *completed = _whole_lines(partial)
    write_atomically(target, completed)
    partial.unlink()
    print(f"{target}: {len(lines)} prompts completed", flush=True)


def _finished_lines(partial: Path, call: dict[str, Any]) -> list[str]:
    """The lines that an interrupted call has completed; raises ConfigError if it was
    another call."""
    if not partial.exists():
        return []
    first, *finished = _whole_lines(partial) or [""]
    require(
        first == json.dumps(call) + "\n",
        f"{partial} was written with other flags or another --input: delete it, or choose "
        "another --output",
    )
    return finished


def _whole_lines(path: Path) -> list[str]:
    """The lines of a file, without the half line of a killed process."""
    # Not `splitlines`, which also splits at characters such as U+2028.
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    return [line + "\n" for line in lines[:-1]]


def _to_json_line(line: dict[str, Any]) -> str:
    text = json.dumps(line, ensure_ascii=False)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        # UTF-8 has no lone surrogates, but JSON can escape them.
        text = json.dumps(line)
    return text + "\n"


def _open_checked(
    path: str | Path, sampling: SamplingParams, *, dtype: Any, batch_size: int
) -> Policy:
    """Opens a policy; raises ConfigError if `max_new_tokens` leaves no prompt room."""
    policy = open_served(path, dtype=dtype, batch_size=batch_size)
    policy.engine.check_fits(1, sampling.max_new_tokens)
    return policy


def _print_streamed(
    policy: Policy,
    prompt: np.ndarray,
    sampling: SamplingParams,
    index: int,
    stop_token_mask: np.ndarray | None,
) -> list[str]:
    """Prints and returns the completions of one prompt."""
    streams: list[TextStream] = []
    completions = stream_completions(policy, [(index, prompt)], sampling, stop_token_mask)
    for pieces, current in completions:
        streams = current
        # Several completions would be mixed up, so only a single one is streamed.
        if len(pieces) == 1:
            print(printable(pieces[0]), end="", flush=True)

    if len(streams) == 1:
        print(flush=True)
    else:
        for stream in streams:
            print(printable(stream.text), flush=True)
    return [stream.text for stream in streams]


def _complete_batch(
    policy: Policy, lines: list[dict[str, Any]], sampling: SamplingParams, first: int
) -> list[dict[str, Any]]:
    """Adds completions to `lines`, of which the first is line `first` of the file."""
    # Chats end at turn tokens too, so they need a batch of their own.
    prompts: list[tuple[int, np.ndarray]] = []
    chats: list[tuple[int, np.ndarray]] = []
    completed = list(lines)
    for offset, line in enumerate(lines):
        try:
            if "messages" in line:
                tokens = policy.encode(line["messages"])
                group = chats
            else:
                tokens = policy.tokenizer.encode(add_separator(line["prompt"]))
                group = prompts
            policy.engine.check_fits(len(tokens), sampling.max_new_tokens)
            group.append((first + offset, tokens))
        except ValueError as error:
            completed[offset] = line | {"error": str(error)}

    chat_mask = turn_end_mask(policy.tokenizer, policy.template)
    for group, stop_token_mask in ((prompts, None), (chats, chat_mask)):
        streams: list[TextStream] = []
        if group:
            for _, current in stream_completions(policy, group, sampling, stop_token_mask):
                streams = current
        # Completions of one prompt are adjacent.
        for place, (index, _) in enumerate(group):
            start = place * sampling.num_samples
            own = streams[start : start + sampling.num_samples]
            completed[index - first] = lines[index - first] | {
                "answers": [stream.text for stream in own],
                "finish": [stream.finish_reason for stream in own],
                "tokens": [stream.num_tokens for stream in own],
            }
    return completed


def _read_lines(source: Path) -> Iterator[dict[str, Any]]:
    """The requests of a JSONL file; blank lines are skipped."""
    try:
        # Without a byte order mark, if there is one.
        text = source.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--input = {source} cannot be read: {error}") from None
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield _parse_line(f"{source}:{number}", line)


def _parse_line(where: str, line: str) -> dict[str, Any]:
    try:
        request = json.loads(line, parse_constant=refuse_constant)
    except RecursionError:
        raise ConfigError(f"{where}: JSON is nested too deeply") from None
    except ValueError as error:
        raise ConfigError(f"{where}: not JSON: {error}") from None
    require(isinstance(request, dict), f"{where}: not a JSON object ({line[:40]!r})")
    for name in RESULT_FIELDS:
        require(
            name not in request,
            f"{where}: the field {name!r} would be overwritten by the results: rename it",
        )
    require(
        ("prompt" in request) != ("messages" in request),
        f"{where}: give either prompt or messages",
    )
    if "prompt" in request:
        prompt = request["prompt"]
        require(isinstance(prompt, str), f"{where}: prompt must be a string")
    else:
        try:
            check_messages(request["messages"], f"{where}: messages")
        except ValueError as error:
            raise ConfigError(str(error)) from None
    return request
