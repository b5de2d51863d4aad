"""A policy as a model of lm-evaluation-harness (Gao et al., 2021).

Contexts and continuations are tokenized as in the harness's own classes: encoded together
and split where the context alone ends. A context that is too long loses its beginning.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from instructax.config import ConfigError
from instructax.data.chat_template import encode_rendered, render_messages, turn_end_mask
from instructax.serving.engine import SampleRequest, ScoreRequest
from instructax.serving.policy import Policy
from instructax.serving.text_stream import TextStream

# Most tokens of a completion if the task does not say; the harness's own default.
DEFAULT_MAX_GEN_TOKS = 256


class InstructaxLM(TemplateLM):
    """The harness's model interface for a policy.

    Args:
      policy: the policy.
      seed: random seed of tasks that sample.
    """

    def __init__(self, policy: Policy, *, seed: int):
        super().__init__()
        self._engine = policy.engine
        self._tokenizer = policy.tokenizer
        self._template = policy.template
        self._seed = seed
        # A chat model ends its answers with the template's token instead of the end token.
        self._turn_end_mask = turn_end_mask(policy.tokenizer, policy.template)

        # The template's beginning-of-text token, which the harness calls the prefix.
        bos = policy.template.bos_token if policy.template else ""
        if bos:
            ids = encode_rendered(bos, policy.tokenizer, policy.template)
            self._prefix_id = int(ids[0])
        else:
            self._prefix_id = policy.tokenizer.eos_id

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self._tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context: the template's BOS or the end token."""
        return self._prefix_id

    @property
    def tokenizer_name(self) -> str:
        """Key of the harness's request cache."""
        return self._tokenizer.hash

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The Jinja source, for the harness's records."""
        if chat_template and self._template:
            return self._template.source
        return ""

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Renders a conversation; without a generation prompt its last turn stays open."""
        # The harness asks for an open last turn if a task gives the answer's beginning.
        if add_generation_prompt:
            return render_messages(chat_history, self._template, add_generation_prompt=True)
        # The last turn is appended as text, so the model continues it.
        *before, last = chat_history
        rendered = ""
        if before:
            rendered = render_messages(before, self._template, add_generation_prompt=True)
        return rendered + last["content"]

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Encodes a text; special tokens that a chat template wrote become their ids."""
        return encode_rendered(string, self._tokenizer, self._template).tolist()

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        """Scores continuations.

        Args:
          requests: (cache key or None, context ids, continuation ids) of each.
          disable_tqdm: ignored.
          **kwargs: ignored.

        Returns:
          (Σ log p(token | all tokens before it) over the continuation at temperature 1,
          whether all its tokens are the most likely ones) of each.

        Raises:
          ConfigError: a continuation is longer than the model's context.
        """
        # All requests at once: the engine groups them into batches itself.
        score_requests = []
        for _, context, continuation in requests:
            # A sum over a part of the tokens would look like that of a likelier text.
            if len(continuation) > self._engine.max_length:
                raise ConfigError(
                    f"a task scores a continuation of {len(continuation)} tokens, but the "
                    f"model's context is {self._engine.max_length} tokens: leave the task "
                    "out, or use a model with a longer context"
                )
            # The last token is only predicted, so one more than the model's length fits.
            # Something must stand before the continuation to predict its first token.
            before = context or [self._prefix_id]
            ids = [*before, *continuation][-(self._engine.max_length + 1) :]
            start = len(ids) - len(continuation)
            tokens = np.asarray(ids, np.int32)
            score_requests.append(ScoreRequest(tokens=tokens, start=start))

        results = []
        all_scores = self._engine.score(score_requests)
        for index, (cache_key, _, _) in enumerate(requests):
            scores = all_scores[index]
            start = score_requests[index].start
            # Summed in float64: long texts have thousands of tokens.
            total = float(np.sum(scores.logprobs[start:], dtype=np.float64))
            result = (total, bool(np.all(scores.greedy[start:])))
            if cache_key is not None:
                self.cache_hook.add_partial("loglikelihood", cache_key, result)
            results.append(result)
        return results

    def loglikelihood_rolling(
        self, requests: Any, disable_tqdm: bool = False
    ) -> list[float]:
        """Σ log p over all tokens of each text.

        Long texts are split into windows of the model's length; each token is scored once.
        """
        totals = []
        for request in requests:
            (text,) = request.args
            # The prefix token stands before the first window, so the first token is scored
            # too.
            windows = get_rolling_token_windows(
                self.tok_encode(text),
                prefix_token=self._prefix_id,
                max_seq_len=self._engine.max_length,
                context_len=1,
            )
            # Windows overlap; this makes (context, continuation) pairs that do not.
            pairs = [make_disjoint_window(window) for window in windows]
            results = self._loglikelihood_tokens([(None, *pair) for pair in pairs])
            totals.append(sum(total for total, _ in results))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), totals[-1])
        return totals

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Completes each context up to a stop string, its token limit or the end token."""
        parsed = []
        for index, request in enumerate(requests):
            parsed.append(self._parse_generation(index, *request.args))

        # Batches of similar lengths need the least padding.
        def lengths(index: int) -> tuple[int, int]:
            sample, _ = parsed[index]
            return len(sample.prompt), sample.max_new_tokens

        # The sample index is that of the request, so the order changes no sample.
        order = sorted(range(len(parsed)), key=lengths)
        completions = [""] * len(requests)
        for first in range(0, len(order), self._engine.batch_size):
            indices = order[first : first + self._engine.batch_size]
            texts = self._complete([parsed[index] for index in indices])
            for index, text in zip(indices, texts, strict=True):
                completions[index] = text
                self.cache_hook.add_partial("generate_until", requests[index].args, text)
        return completions

    def _parse_generation(
        self, index: int, context: str, gen_kwargs: dict[str, Any]
    ) -> tuple[SampleRequest, list[str]]:
        """Returns (the sample to draw, its stop strings) of one request."""
        # The harness merges the task's options with its defaults.
        options: dict[str, Any] = dict(
            normalize_gen_kwargs(gen_kwargs, DEFAULT_MAX_GEN_TOKS)
        )
        max_new_tokens = int(options.pop("max_gen_toks"))
        stop_strings = options.pop("until", None) or []
        temperature = float(options.pop("temperature", 0.0))
        options.pop("do_sample", None)  # the temperature says it already

        # Values that change nothing are accepted.
        unknown = options.keys() - {"top_p", "top_k"}
        if unknown or options.get("top_p", 1.0) != 1.0 or options.get("top_k", 0):
            raise ConfigError(
                f"a task generates with {options}, which is not supported: "
                "change its gen_kwargs"
            )
        room = self._engine.max_length - max_new_tokens
        if room < 1:
            raise ConfigError(
                f"a task generates up to {max_new_tokens} tokens, but the model's context "
                f"is {self._engine.max_length} tokens: lower max_gen_toks, on the command "
                "line with --gen_kwargs=max_gen_toks=N"
            )

        # The end of a long context matters most: it holds the question.
        prompt = self.tok_encode(context)[-room:] or [self._prefix_id]
        sample = SampleRequest(
            prompt=np.asarray(prompt, np.int32),
            seed=self._seed,
            sample_index=index,
            temperature=temperature,
            max_new_tokens=max_new_tokens,
        )
        if isinstance(stop_strings, str):
            stop_strings = [stop_strings]
        return sample, list(stop_strings)

    def _complete(self, batch: Sequence[tuple[SampleRequest, list[str]]]) -> list[str]:
        requests = []
        streams = []
        for request, stop_strings in batch:
            requests.append(request)
            # Tasks may list empty strings, which would end every completion.
            stop_strings = [stop for stop in stop_strings if stop]
            streams.append(TextStream(self._tokenizer, stop_strings))

        # A chunk holds the new tokens of every request of the batch.
        for chunks in self._engine.stream(requests, self._turn_end_mask):
            for stream, chunk in zip(streams, chunks, strict=True):
                stream.add(chunk.tokens, done=chunk.done, hit_eos=chunk.hit_eos)
            # Stop strings may end all completions before the engine does.
            if all(stream.finish_reason for stream in streams):
                break
        return [stream.text for stream in streams]
