"""Response bodies in the format of OpenAI's API, as plain dictionaries."""

import dataclasses
import json
import time
import uuid
from collections.abc import Sequence
from typing import Any

import numpy as np

from instructax.data.tokenizer import Tokenizer
from instructax.serving.engine import TokenScores
from instructax.serving.text_stream import REPLACEMENT_CHARACTER, FinishReason


def sse(event: Any) -> str:
    """Formats one server-sent event; a string is sent as it is."""
    if not isinstance(event, str):
        # ASCII only: clients that read by line take U+2028 and others for a line break.
        event = json.dumps(event)
    return f"data: {event}\n\n"


def model_list(names: Sequence[str], created: int) -> dict[str, Any]:
    """The list of models."""
    models = []
    for name in names:
        models.append(
            {"id": name, "object": "model", "created": created, "owned_by": "instructax"}
        )
    return {"object": "list", "data": models}


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Token counts; completions include end tokens and the tokens of stop strings."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


@dataclasses.dataclass(frozen=True)
class Envelope:
    """The fields that all objects of one response share."""

    # The format: /v1/chat/completions or /v1/completions.
    chat: bool
    model: str
    # Unique for each response; all chunks of a stream share it.
    id: str
    # Unix time in seconds.
    created: int

    @classmethod
    def new(cls, chat: bool, model: str) -> "Envelope":
        """An envelope with a new id."""
        prefix = "chatcmpl" if chat else "cmpl"
        return cls(chat, model, f"{prefix}-{uuid.uuid4().hex}", int(time.time()))

    def completion(
        self,
        texts: Sequence[str],
        finish_reasons: Sequence[FinishReason],
        logprobs: Sequence[Any],
        token_usage: dict[str, int],
    ) -> dict[str, Any]:
        """The complete response of a request that is not streamed.

        Args:
          texts: text of each choice.
          finish_reasons: why each choice ended.
          logprobs: log-probabilities of each choice, or None.
          token_usage: what `usage` returns.
        """
        choices = []
        for index, text in enumerate(texts):
            choice: dict[str, Any] = {"index": index}
            if self.chat:
                choice["message"] = {"role": "assistant", "content": text, "refusal": None}
            else:
                choice["text"] = text
            choice["logprobs"] = logprobs[index]
            choice["finish_reason"] = finish_reasons[index]
            choices.append(choice)

        # Not only the field names differ between the two formats, but also the object's.
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self._object(kind, choices), "usage": token_usage}

    def role_chunk(self, index: int) -> dict[str, Any]:
        """The first chunk of a streamed chat choice, which names the role."""
        return self._chunk(index, {"delta": {"role": "assistant", "content": ""}}, None)

    def chunk(
        self, index: int, text: str, finish_reason: FinishReason | None
    ) -> dict[str, Any]:
        """A chunk with the next text of a streamed choice."""
        content: dict[str, Any] = {"text": text}
        if self.chat:
            # The final chunk of a choice may have no text.
            delta = {"content": text} if text else {}
            content = {"delta": delta}
        return self._chunk(index, content, finish_reason)

    def usage_chunk(self, token_usage: dict[str, int]) -> dict[str, Any]:
        """The last chunk of a stream, with the token counts."""
        return {**self._object(self._chunk_kind(), []), "usage": token_usage}

    def _chunk(
        self, index: int, content: dict[str, Any], finish_reason: FinishReason | None
    ) -> dict[str, Any]:
        choice = {"index": index, **content, "logprobs": None}
        choice["finish_reason"] = finish_reason
        return self._object(self._chunk_kind(), [choice])

    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }


def completion_logprobs(
    tokenizer: Tokenizer, tokens: np.ndarray, scores: TokenScores, *, start: int, top: int
) -> dict[str, Any]:
    """Log-probabilities in the format of /v1/completions.

    Args:
      tokenizer: the tokenizer.
      tokens: prompt and completion, i32[n].
      scores: scores of `tokens`.
      start: first token to report.
      top: number of most likely tokens per position; 0 = none.
    """
    pieces = [tokenizer.decode([token]) for token in tokens[start:]]
    # Nothing predicts the first token of a text: null.
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] = []
    for place in range(start, len(tokens)):
        if place == 0:
            token_logprobs.append(None)
            top_logprobs.append(None)
        else:
            token_logprobs.append(float(scores.logprobs[place]))
            top_logprobs.append(_top_by_text(tokenizer, tokens, scores, place, top))
    return {
        "tokens": pieces,
        "token_logprobs": token_logprobs,
        "top_logprobs": top_logprobs if top else None,
        "text_offset": _text_offsets(tokenizer, tokens[start:]),
    }


def _text_offsets(tokenizer: Tokenizer, tokens: np.ndarray) -> list[int]:
    """Where each token begins in the text of all tokens, in characters.

    A token inside a character has the offset of the character.
    """
    offsets = []
    complete = 0
    for count in range(len(tokens)):
        # A token's own text may differ from its part of the whole: an incomplete character
        # has one of its own, and a leading space may be dropped.
        before = tokenizer.decode(tokens[:count]).rstrip(REPLACEMENT_CHARACTER)
        complete = max(complete, len(before))
        offsets.append(complete)
    return offsets


def _top_by_text(
    tokenizer: Tokenizer, tokens: np.ndarray, scores: TokenScores, place: int, top: int
) -> dict[str, float]:
    """Log-probabilities of the most likely tokens and of the actual one, by text.

    Of several tokens with the same text the most likely one counts.
    """
    # Best first, so that `setdefault` keeps the most likely token of a text.
    ids = [*scores.top_ids[place, :top].tolist(), int(tokens[place])]
    logprobs = [*scores.top_logprobs[place, :top].tolist(), float(scores.logprobs[place])]
    by_text: dict[str, float] = {}
    for token, logprob in zip(ids, logprobs, strict=True):
        by_text.setdefault(tokenizer.decode([token]), logprob)
    return by_text


def chat_logprobs(
    tokenizer: Tokenizer, tokens: np.ndarray, scores: TokenScores, *, start: int, top: int
) -> dict[str, Any]:
    """Log-probabilities in the format of /v1/chat/completions.

    The arguments are those of `completion_logprobs`.
    """

    # The bytes tell apart tokens whose text is an incomplete character.
    def entry(token: int, logprob: float) -> dict[str, Any]:
        text = tokenizer.decode([token])
        token_bytes = list(tokenizer.token_bytes(token))
        return {"token": text, "logprob": logprob, "bytes": token_bytes}

    content = []
    for place in range(start, len(tokens)):
        own = entry(int(tokens[place]), float(scores.logprobs[place]))
        ids = scores.top_ids[place, :top].tolist()
        logprobs = scores.top_logprobs[place, :top].tolist()
        own["top_logprobs"] = list(map(entry, ids, logprobs))
        content.append(own)
    return {"content": content, "refusal": None}
