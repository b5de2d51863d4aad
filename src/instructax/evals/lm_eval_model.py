"""A policy as a model of lm-evaluation-harness (Gao et al., 2021), whose tasks then run on
it.

Contexts and continuations are split into tokens as by the harness's own classes: encoded
together, and cut where the context alone ends. A context that is too long loses its
beginning.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from instructax.config import ConfigError
from instructax.data.chat_template import (
    ChatTemplate,
    encode_rendered,
    render_messages,
    turn_end_mask,
)
from instructax.data.tokenizer import Tokenizer
from instructax.serving.engine import Draw, Engine
from instructax.serving.text_stream import TextStream

MOST_TOKENS = 256  # of an answer, where a task does not say: the harness's own


class InstructaxLM(TemplateLM):
    """Scores and answers of `engine`; `seed` is that of tasks that sample."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        *,
        seed: int,
    ):
        super().__init__()
        self._engine, self._ids, self._template, self._seed = (
            engine,
            tokenizer,
            template,
            seed,
        )
        self._ends = turn_end_mask(tokenizer, template)
        bos = template.bos_token if template else ""
        self._prefix = (
            int(encode_rendered(bos, tokenizer, template)[0]) if bos else tokenizer.eos_id
        )

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self._ids.eos_id

    @property
    def prefix_token_id(self) -> int:
        """Stands before a text that has nothing before it: the template's first token, else
        the end of a text."""
        return self._prefix

    @property
    def tokenizer_name(self) -> str:
        """Tells caches of requests apart."""
        return self._ids.hash

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The Jinja text, for the harness's records."""
        return self._template.source if chat_template and self._template else ""

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The text of a conversation; one whose last turn is open goes on with it."""
        if add_generation_prompt:
            return render_messages(chat_history, self._template, add_generation_prompt=True)
        *before, last = chat_history
        opened = (
            render_messages(before, self._template, add_generation_prompt=True)
            if before
            else ""
        )
        return opened + last["content"]

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """The ids of a text; with a chat template the texts of special tokens are these, as
        they come from it."""
        return encode_rendered(string, self._ids, self._template).tolist()

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        """Σ log p(token | all before it) of each continuation, in nats at temperature 1,
        and whether all are the likeliest; of (texts, tokens of the context, tokens of the
        continuation)."""
        texts = []
        for _, context, continuation in requests:
            tokens = np.asarray(
                [*context, *continuation][-(self._engine.max_length + 1) :], np.int32
            )
            texts.append((tokens, max(len(tokens) - len(continuation), 1)))
        found = []
        for (_, first), scores, request in zip(
            texts, self._engine.score(texts), requests, strict=True
        ):
            result = (
                float(np.sum(scores.logprobs[first:], dtype=np.float64)),
                bool(np.all(scores.greedy[first:])),
            )
            if request[0] is not None:
                self.cache_hook.add_partial("loglikelihood", request[0], result)
            found.append(result)
        return found

    def loglikelihood_rolling(
        self, requests: Any, disable_tqdm: bool = False
    ) -> list[float]:
        """Σ log p of all tokens of each text, in windows of the model's longest text, each
        token scored once."""
        totals = []
        for request in requests:
            (text,) = request.args
            windows = get_rolling_token_windows(
                self.tok_encode(text),
                prefix_token=self._prefix,
                max_seq_len=self._engine.max_length,
                context_len=1,
            )
            parts = self._loglikelihood_tokens(
                [(None, *make_disjoint_window(window)) for window in windows]
            )
            totals.append(sum(total for total, _ in parts))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), totals[-1])
        return totals

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """The answer to each context up to the first of its stop strings, its limit, or the
        end of the text."""
        answers = [""] * len(requests)
        asked = [
            self._draw(number, *request.args) for number, request in enumerate(requests)
        ]
        order = sorted(
            range(len(asked)), key=lambda i: (len(asked[i][0].prompt), asked[i][0].limit)
        )
        for start in range(0, len(order), self._engine.rows):
            places = order[start : start + self._engine.rows]
            for place, text in zip(
                places, self._answers([asked[place] for place in places]), strict=True
            ):
                answers[place] = text
                self.cache_hook.add_partial("generate_until", requests[place].args, text)
        return answers

    def _draw(
        self, number: int, context: str, given: dict[str, Any]
    ) -> tuple[Draw, list[str]]:
        """(what is to be drawn, the stop strings) of one request."""
        options: dict[str, Any] = dict(normalize_gen_kwargs(given, MOST_TOKENS))
        limit, until = int(options.pop("max_gen_toks")), options.pop("until", None) or []
        temperature = float(options.pop("temperature", 0.0))
        sampled = options.pop("do_sample", False)
        if (
            options.keys() - {"top_p", "top_k"}
            or options.get("top_p", 1.0) != 1.0
            or options.get("top_k", 0)
        ):
            raise ConfigError(
                f"a task generates with {options}, which is not supported here: change its gen_kwargs"
            )
        room = self._engine.max_length - limit
        if room < 1:
            raise ConfigError(
                f"a task generates up to {limit} tokens, and the model's longest text is {self._engine.max_length}: "
                "lower max_gen_toks, on the command line with --gen_kwargs=max_gen_toks=N"
            )
        tokens = np.asarray(self.tok_encode(context)[-room:] or [self._prefix], np.int32)
        draw = Draw(
            prompt=tokens,
            seed=self._seed,
            number=number,
            temperature=temperature if sampled or temperature else 0.0,
            limit=limit,
        )
        return draw, [until] if isinstance(until, str) else list(until)

    def _answers(self, asked: Sequence[tuple[Draw, list[str]]]) -> list[str]:
        streams = [
            TextStream(self._ids, [stop for stop in stops if stop]) for _, stops in asked
        ]
        for pieces in self._engine.stream([draw for draw, _ in asked], self._ends):
            for stream, piece in zip(streams, pieces, strict=True):
                stream.add(piece.tokens, over=piece.over, ended=piece.ended)
            if all(stream.finish for stream in streams):
                break
        return [stream.text for stream in streams]
