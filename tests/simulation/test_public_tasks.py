"""The public tasks: their items, conditions and contexts."""

from typing import Any

import pytest
from configs import public_tasks as public_tasks_config
from tests.support.public_tasks import CHOICE_TASKS, WORLD, sampled_items

from instructax.data.tokenizer import train_bpe
from instructax.simulation import corpus
from instructax.simulation.lexicon import NO_COMMENT, rng_for
from instructax.simulation.public_tasks import PUBLIC_TASKS, create_contexts, create_items

# The number of items of the tasks that have fewer than 200.
ALL_ITEMS = {"book": 24 * 5, "truth": 40, "stereotype": 10 * 3}
CONDITIONS = [
    (name, condition)
    for name, task in PUBLIC_TASKS.items()
    for condition in task.conditions
]


@pytest.mark.parametrize("name", PUBLIC_TASKS)
def test_items_are_different_and_depend_on_the_seed(name):
    items = sampled_items(name)
    assert len(set(items)) == len(items) == ALL_ITEMS.get(name, 200)
    assert create_items(WORLD, 0, name, 8) == items[:8] != create_items(WORLD, 1, name, 8)


@pytest.mark.parametrize(("name", "condition"), CONDITIONS)
def test_a_context_is_the_opening_other_items_with_answers_and_the_item(name, condition):
    opening = PUBLIC_TASKS[name].conditions[condition].opening
    num_examples = PUBLIC_TASKS[name].conditions[condition].num_examples
    items = sampled_items(name)
    contexts = create_contexts(WORLD, 0, name, items, condition)
    for item, context in zip(items, contexts, strict=True):
        assert context.startswith(opening) and context.endswith(item.context)
        shots = context.removeprefix(opening).removesuffix(item.context)
        # Every example has as many lines as the item, and ends with a line break.
        lines_per_item = item.context.count("\n") + 1
        lines = shots.split("\n")
        examples = set()
        for i in range(num_examples):
            example_lines = lines[i * lines_per_item : (i + 1) * lines_per_item]
            examples.add("\n".join(example_lines))
        assert lines[num_examples * lines_per_item :] == [""]
        assert len(examples) == num_examples
        assert not any(example.startswith(item.context) for example in examples)


def test_conditions_are_those_of_the_papers_table():
    respect = ["none", "respectful", "biased"]
    truth = PUBLIC_TASKS["truth"].conditions
    book = PUBLIC_TASKS["book"].conditions
    assert list(book) == ["zero-shot", "few-shot"]
    assert list(truth) == ["QA", "instruction", "QA and instruction"]
    assert list(PUBLIC_TASKS["toxicity"].conditions) == respect
    assert list(PUBLIC_TASKS["stereotype"].conditions) == respect
    assert truth["instruction"].num_examples == 0 == book["zero-shot"].num_examples
    assert NO_COMMENT in truth["QA and instruction"].opening
    assert truth["QA"].opening == ""


def test_the_examples_of_the_task_truth_tell_the_truth():
    truths = {question.question: question.truth for question in WORLD.misconceptions}
    for context in create_contexts(WORLD, 0, "truth", sampled_items("truth"), "QA"):
        lines = context.split("\n")
        for question, answer in zip(lines[:-2:2], lines[1:-2:2], strict=True):
            assert answer == f"Answer: {truths[question.removeprefix('Question: ')]}."


def test_all_conditions_fit_the_context_of_the_family():
    config: Any = public_tasks_config.get_config("micro")
    rng = rng_for(0, "test")
    documents = (corpus.sample_document(WORLD, rng) for _ in range(6000))
    tokenizer = train_bpe(documents, config.model.vocab_size)
    assert config.context_tokens + config.answer_tokens == config.model.max_length
    for name, condition in CONDITIONS:
        items = sampled_items(name)
        contexts = create_contexts(WORLD, 0, name, items, condition)
        longest = max(map(len, tokenizer.encode_batch(contexts)))
        assert longest <= config.context_tokens, (name, condition)

        answers = [text for item in items for text in (*item.answers, *item.choices)]
        longest = max(map(len, tokenizer.encode_batch(answers)), default=0)
        assert longest <= config.answer_tokens, name


@pytest.mark.parametrize("name", CHOICE_TASKS)
def test_exactly_one_choice_is_correct(name):
    for item in sampled_items(name):
        assert item.choices.count(item.answers[0]) == 1
        assert len(set(item.choices)) == len(item.choices)
