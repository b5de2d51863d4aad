"""The prompts of the data sets: who writes them, their use cases and their examples."""

import collections

import numpy as np
import pytest
from tests.support.simulated_tasks import SHARES, WORLD

from instructax.simulation import prompts


def test_labelers_write_most_prompts_of_the_demonstrations():
    sizes = {"demonstrations": 600, "comparisons": 400, "prompts": 100, "gpt_prompts": 80}
    sets = prompts.create_prompt_sets(WORLD, 0, sizes)
    for name, share in prompts.LABELER_PROMPT_SHARE.items():
        by_labelers = np.mean([not prompt.organization for prompt in sets[name]])
        assert by_labelers == pytest.approx(share, abs=0.05)

    few_shot = [
        prompt.task for prompt in sets["demonstrations"] if prompt.kind == "few-shot"
    ]
    expected_share = prompts.FEW_SHOT_SHARE["demonstrations"] * 0.89
    assert len(few_shot) / 600 == pytest.approx(expected_share, abs=0.05)
    # Each example adds an empty line after its prompt and one after its response.
    assert all(task.prompt.count("\n\n") in (2, 4) for task in few_shot)
    for prompt in sets["gpt_prompts"]:
        if prompt.task.format == "plain":
            assert prompt.task.prompt.count("\n\n") == 2

    organizations = {prompt.organization for prompt in sets["prompts"]}
    assert 1 < len(organizations) <= len({prompt.user for prompt in sets["prompts"]})


def test_every_set_has_the_shares_and_no_prompt_or_example_of_another():
    sizes = {
        "demonstrations": 2300,
        "comparisons": 6000,
        "prompts": 5600,
        "gpt_prompts": 4000,
    }
    sets = prompts.create_prompt_sets(WORLD, 0, sizes)
    texts = {name: {prompt.task.prompt for prompt in sets[name]} for name in sets}
    for name, created in sets.items():
        counts = collections.Counter(prompt.task.use_case for prompt in created)
        for use_case, share in SHARES.items():
            found = counts[use_case] / len(created)
            assert found == pytest.approx(share / 99.9, abs=0.03), (name, use_case)

        # The parts of a few-shot prompt are prompt, response, prompt, …, open prompt.
        examples = set()
        for prompt in created:
            parts = prompt.task.prompt.split("\n\n")[:-1:2]
            examples |= {part for part in parts if "Human:" not in part}
        for other in sets:
            assert not examples & texts[other]
