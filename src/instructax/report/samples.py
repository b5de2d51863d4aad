"""The samples on the page: the responses of all policies to a prompt, side by side.

The samples are embedded in the page as JSON; `samples.js` shows those that match the
reader's filters, as text and never as HTML.
"""

from typing import Any

import numpy as np

from instructax.data.tokenizer import END_OF_TEXT
from instructax.report.judging import (
    FLAGS,
    TRUE_UTILITY,
    JudgedExperiment,
    JudgedResponses,
    applicable_prompts,
)
from instructax.report.logs import JsonObject
from instructax.report.results import response_text

# The log-ratio to the SFT policy at which a token has the full color.
FULL_COLOR_NATS = 3.0
# On a page, for all seeds together, so that the page stays below 5 MB. The samples.jsonl of
# the evaluations have all prompts.
MAX_PROMPTS = 300

# How the page names the bad value of each flag.
FAULTS = {
    "attempts": "fails the task",
    "constraint": "breaks the constraint",
    "hallucinates": "hallucinates",
    "appropriate": "inappropriate",
    "truthful": "untrue",
}
BAD_IF_SET = frozenset({"hallucinates"})  # all other flags are bad if they are not set


def page_samples(experiments: list[JudgedExperiment]) -> JsonObject:
    """Returns all data that `samples.js` needs, ready for JSON."""
    max_prompts = MAX_PROMPTS // len(experiments)
    return {
        "fullColorNats": FULL_COLOR_NATS,
        "endOfText": END_OF_TEXT,
        "runs": [run_samples(judged, max_prompts) for judged in experiments],
    }


def run_samples(judged: JudgedExperiment, max_prompts: int) -> JsonObject:
    """Returns the first prompts of a seed, with the responses of all policies."""
    results = judged.results
    records = {}
    for size in results.sizes:
        for policy, samples in size.samples.items():
            records[size.name, policy] = samples

    columns = list(judged.responses)  # (size, policy)
    applicable = {flag: applicable_prompts(results, flag) for flag in FLAGS}
    # The order of the responses is that of the columns, so that policies keep their place.
    prompts = []
    for i, prompt in enumerate(results.prompts[:max_prompts]):
        responses = []
        for column, key in enumerate(columns):
            of_policy = judged.responses[key]
            utility = float(of_policy.opinions[TRUE_UTILITY][i])
            # Two digits: the page shows no more, and JSON grows with each.
            response = {
                "column": column,
                "score": round(float(of_policy.scores[i]), 2),
                "utility": round(utility, 2),
                "faults": _faults(of_policy, applicable, i),
                **_tokens(records[key][i]),
            }
            responses.append(response)
        use_case = results.tasks[prompt].use_case
        prompts.append({"text": prompt, "useCase": use_case, "responses": responses})

    named_columns = []
    for size, policy in columns:
        named_columns.append({"size": size, "policy": policy})
    return {
        "name": results.name,
        "columns": named_columns,
        "prompts": prompts,
    }


def _tokens(record: JsonObject) -> dict[str, list[Any]]:
    """Returns the text of each token and its log-ratio to the SFT policy, in nats.

    A sample that was logged without them is a single piece of text.
    """
    pieces = record.get("pieces") or [response_text(record)]
    # One log-ratio for each piece.
    log_ratios = record.get("token_kl") or [0.0] * len(pieces)
    return {"pieces": pieces, "logRatios": [round(ratio, 2) for ratio in log_ratios]}


def _faults(
    responses: JudgedResponses, applicable: dict[str, np.ndarray], prompt: int
) -> list[str]:
    """Returns the faults of the response to a prompt, given by its index."""
    faults = []
    for flag in FLAGS:
        # A flag says nothing about prompts to which it does not apply.
        is_set = bool(responses.flags[flag][prompt])
        is_bad = is_set == (flag in BAD_IF_SET)
        if applicable[flag][prompt] and is_bad:
            faults.append(FAULTS[flag])
    return faults
