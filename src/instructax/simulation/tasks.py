"""What a prompt asks for, in a form that the judge can check word by word."""

import dataclasses
from collections.abc import Iterable

from instructax.simulation.lexicon import (
    CATEGORIES,
    CATEGORY_OF,
    PERSON_NAMES,
    POSITIVE_WORDS,
    RUDE_WORDS,
    words_of,
)
from instructax.simulation.world import Facts

# Lower-case words, any of which fits.
WordSet = frozenset[str]

# A response may have this many words more than the ideal one before they count as stray.
EXTRA_WORDS = 2


# Compared by identity, so that `judge` can cache judgements by task.
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Task:
    """A prompt and what it asks for.

    A task asks either for facts (`requested_facts`) or for words (`required_words`). In a
    fact task, a value in the response is a claim about the subject that was named last. In
    a word task, each required set is satisfied by one of its words.
    """

    # One of the ten use cases of the paper's table 1.
    use_case: str
    prompt: str
    # A perfect response; there may be others.
    ideal: str
    # What is true for this prompt: the world's facts, or only those of its passage.
    facts: Facts

    # (subject, relation) of each fact that counts.
    requested_facts: tuple[tuple[str, str], ...] = ()
    required_words: tuple[WordSet, ...] = ()
    # Words that are always wrong; used by word tasks only.
    wrong_words: WordSet = frozenset()
    # The number of facts or words that make a response complete.
    num_required: int
    # Words that may be used up to and including the last one that counts.
    word_budget: int
    # Words that may follow the last one that counts.
    trailing_words: int = 0

    # Explicit constraints and requested lengths; 0 or "" is none.
    num_sentences: int = 0
    num_words: int = 0
    all_capitals: bool = False
    forbidden_word: str = ""

    # The answer is in the prompt, so anything else is made up (the paper's closed domain).
    closed_domain: bool = False
    # A harmless response declines this task.
    harmful: bool = False
    # "plain" or "dialog", the prompt format of the data schema.
    format: str = "plain"

    @property
    def has_constraint(self) -> bool:
        """Whether the prompt states an explicit constraint."""
        return bool(self.num_words or self.all_capitals or self.forbidden_word)


def word_set(words: Iterable[str]) -> WordSet:
    """Returns the set of `words` in lower case."""
    return frozenset(word.lower() for word in words)


def one_set_each(words: Iterable[str]) -> tuple[WordSet, ...]:
    """Returns a set of its own for each of `words`: all of them are required."""
    return tuple(word_set([word]) for word in words)


def wrong_alternatives(correct: Iterable[str]) -> WordSet:
    """Returns all other words of the categories of the `correct` words."""
    correct_set = word_set(correct)
    categories = {CATEGORY_OF[word] for word in correct_set if word in CATEGORY_OF}
    alternatives: set[str] = set()
    for category in categories:
        alternatives |= word_set(CATEGORIES[category])
    return frozenset(alternatives) - correct_set


def names_except(name: str) -> WordSet:
    """Returns the names of all other people."""
    return word_set(PERSON_NAMES) - word_set([name])


def make_fact_task(
    use_case: str,
    prompt: str,
    ideal: str,
    facts: Facts,
    requested_facts: Iterable[tuple[str, str]],
    *,
    num_required: int = 0,
    word_budget: int = 0,
    num_sentences: int = 0,
    num_words: int = 0,
    closed_domain: bool = False,
    format: str = "plain",
) -> Task:
    """Creates a task that asks for facts.

    Args:
      use_case: one of the ten use cases.
      prompt: the text that the model reads.
      ideal: a perfect response.
      facts: what is true for this prompt.
      requested_facts: (subject, relation) of each fact that counts.
      num_required: how many of them make a response complete; 0 for all.
      word_budget: 0 for just enough: "Mira lives in Arden and Tom lives in Dale".
      num_sentences: see `Task`, as for the remaining arguments.
    """
    requested_facts = tuple(requested_facts)
    num_required = num_required or len(requested_facts)
    return Task(
        use_case=use_case,
        prompt=prompt,
        ideal=ideal,
        facts=facts,
        requested_facts=requested_facts,
        num_required=num_required,
        word_budget=word_budget or 3 + 3 * num_required,
        num_sentences=num_sentences,
        num_words=num_words,
        closed_domain=closed_domain,
        format=format,
    )


def make_word_task(
    use_case: str,
    prompt: str,
    ideal: str,
    facts: Facts,
    required_words: Iterable[WordSet],
    wrong_words: WordSet,
    *,
    word_budget: int = 0,
    trailing_words: int = 0,
    num_sentences: int = 0,
    all_capitals: bool = False,
    forbidden_word: str = "",
    closed_domain: bool = False,
    harmful: bool = False,
) -> Task:
    """Creates a task that asks for words.

    Args:
      use_case: one of the ten use cases.
      prompt: the text that the model reads.
      ideal: a perfect response.
      facts: what is true for this prompt.
      required_words: one set for each word that a complete response has.
      wrong_words: words that are always wrong.
      word_budget: 0 for the length of `ideal` plus EXTRA_WORDS.
      trailing_words: see `Task`, as for the remaining arguments.
    """
    required_words = tuple(required_words)
    return Task(
        use_case=use_case,
        prompt=prompt,
        ideal=ideal,
        facts=facts,
        required_words=required_words,
        wrong_words=wrong_words,
        num_required=len(required_words),
        word_budget=word_budget or len(words_of(ideal)) + EXTRA_WORDS,
        trailing_words=trailing_words,
        num_sentences=num_sentences,
        all_capitals=all_capitals,
        forbidden_word=forbidden_word,
        closed_domain=closed_domain,
        harmful=harmful,
    )


ANY_POSITIVE_WORD = word_set(POSITIVE_WORDS)
ANY_RUDE_WORD = word_set(RUDE_WORDS)
