"""The samples embedded in the report page."""

import pytest

from instructax.report.judging import TRUE_UTILITY, applicable_prompts
from instructax.report.samples import run_samples

pytest_plugins = ("tests.support.report_fixtures",)


def test_samples_have_all_policies_and_a_limited_number_of_prompts(judged):
    samples = run_samples(judged, max_prompts=3)
    assert len(samples["prompts"]) == 3
    first_prompt = samples["prompts"][0]
    assert len(samples["columns"]) == len(first_prompt["responses"]) == 21

    response = first_prompt["responses"][0]
    column = samples["columns"][response["column"]]
    of_policy = judged.responses[column["size"], column["policy"]]
    assert response["utility"] == round(of_policy.opinions[TRUE_UTILITY][0], 2)
    assert len(response["pieces"]) == len(response["logRatios"])
    fails = not of_policy.flags["attempts"][0]
    assert ("fails the task" in response["faults"]) == fails


@pytest.mark.parametrize(
    ("flag", "fault"),
    [("constraint", "breaks the constraint"), ("hallucinates", "hallucinates")],
)
def test_a_sample_has_only_faults_that_apply_to_its_prompt(judged, flag, fault):
    results = judged.results
    samples = run_samples(judged, len(results.prompts))
    applicable = applicable_prompts(results, flag)
    num_faulty = 0
    for prompt, is_applicable in zip(samples["prompts"], applicable, strict=True):
        is_faulty = any(fault in response["faults"] for response in prompt["responses"])
        num_faulty += is_faulty
        assert is_applicable or not is_faulty
    assert 0 < num_faulty <= applicable.sum() < len(applicable)
