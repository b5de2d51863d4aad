"""What clients get back, in OpenAI's format."""

import dataclasses
import json
import time
import uuid
from collections.abc import Sequence
from typing import Any

import numpy as np

from instructax.data.tokenizer import Tokenizer
from instructax.serving.engine import Scores
from instructax.serving.text_stream import Finish


def sse(event: Any) -> str:
    """One server-sent event."""
    return f"data: {event if isinstance(event, str) else json.dumps(event, ensure_ascii=False)}\n\n"


def error_object(
    message: str, *, kind: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """An error as OpenAI writes it."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def models(names: Sequence[str], created: int) -> dict[str, Any]:
    """The list of models."""
    data = [
        {"id": name, "object": "model", "created": created, "owned_by": "instructax"}
        for name in names
    ]
    return {"object": "list", "data": data}


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """How many tokens were read and drawn, end tokens and those of stop strings included."""
    total = prompt_tokens + completion_tokens
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": total,
    }


@dataclasses.dataclass(frozen=True)
class Envelope:
    """What the objects of one answer have in common."""

    chat: bool
    model: str
    id: str
    created: int

    @classmethod
    def new(cls, chat: bool, model: str) -> "Envelope":
        """With an id of its own."""
        return cls(
            chat,
            model,
            f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            int(time.time()),
        )

    def _object(self, choices: list[dict[str, Any]], *, piece: bool) -> dict[str, Any]:
        name = (
            f"chat.completion{'.chunk' if piece else ''}"
            if self.chat
            else "text_completion"
        )
        return {
            "id": self.id,
            "object": name,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }

    def whole(
        self,
        texts: Sequence[str],
        finishes: Sequence[Finish],
        logprobs: Sequence[Any],
        used: dict[str, int],
    ) -> dict[str, Any]:
        """The answer of a request that is not streamed."""
        choices = []
        for index, (text, finish, probability) in enumerate(
            zip(texts, finishes, logprobs, strict=True)
        ):
            content: dict[str, Any] = {"text": text}
            if self.chat:
                content = {
                    "message": {"role": "assistant", "content": text, "refusal": None}
                }
            choices.append(
                {
                    "index": index,
                    **content,
                    "logprobs": probability,
                    "finish_reason": finish,
                }
            )
        return {**self._object(choices, piece=False), "usage": used}

    def piece(
        self, index: int, text: str, finish: Finish | None, *, opens: bool = False
    ) -> dict[str, Any]:
        """The next text of an answer that is streamed; `opens`: the first one of a chat,
        which names the role."""
        content: dict[str, Any] = {"text": text}
        if self.chat:
            content = {
                "delta": {"role": "assistant", "content": ""}
                if opens
                else {"content": text}
                if text
                else {}
            }
        choice = {"index": index, **content, "logprobs": None, "finish_reason": finish}
        return self._object([choice], piece=True)

    def last(self, used: dict[str, int]) -> dict[str, Any]:
        """The piece with the numbers of tokens."""
        return {**self._object([], piece=True), "usage": used}


def completion_logprobs(
    tokenizer: Tokenizer, tokens: np.ndarray, scores: Scores, *, first: int, top: int
) -> dict[str, Any]:
    """Of the tokens from `first` on, as /v1/completions has them; nothing predicts the
    first token of a text: null."""
    pieces = [tokenizer.decode([token]) for token in tokens[first:]]
    offsets = np.cumsum([0, *map(len, pieces)])[:-1].tolist()
    places = range(first, len(tokens))
    return {
        "tokens": pieces,
        "token_logprobs": [
            float(scores.logprobs[place]) if place else None for place in places
        ],
        "top_logprobs": [
            _by_text(tokenizer, tokens, scores, place, top) for place in places
        ]
        if top
        else None,
        "text_offset": offsets,
    }


def _by_text(
    tokenizer: Tokenizer, tokens: np.ndarray, scores: Scores, place: int, top: int
) -> dict[str, float] | None:
    """The likeliest texts in a place, and the one that stands there; of tokens of one text
    the likeliest."""
    if place == 0:
        return None
    ids = [*scores.top_ids[place, :top].tolist(), int(tokens[place])]
    logprobs = [*scores.top_logprobs[place, :top].tolist(), float(scores.logprobs[place])]
    found: dict[str, float] = {}
    for token, logprob in zip(ids, logprobs, strict=True):
        found.setdefault(tokenizer.decode([token]), logprob)
    return found


def chat_logprobs(
    tokenizer: Tokenizer, tokens: np.ndarray, scores: Scores, *, first: int, top: int
) -> dict[str, Any]:
    """Of the tokens from `first` on, as /v1/chat/completions has them."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        text = tokenizer.decode([token])
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    content = []
    for place in range(first, len(tokens)):
        pairs = zip(
            scores.top_ids[place, :top].tolist(),
            scores.top_logprobs[place, :top].tolist(),
            strict=True,
        )
        own = entry(int(tokens[place]), float(scores.logprobs[place]))
        content.append(
            {**own, "top_logprobs": [entry(token, logprob) for token, logprob in pairs]}
        )
    return {"content": content, "refusal": None}
