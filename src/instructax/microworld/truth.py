"""The true reward: how good any answer to a prompt of the world is.

The prompt is read back with its template, the words of the response are marked one by one, and every part of the task
that is done pays: there is credit at each step from a wrong word to a perfect answer, so a small policy can climb. Word
order counts only through capital letters and full stops. The paper has no true reward: its labelers' judgement is all
there is.
"""

import re

from instructax.microworld.tasks import Task, parse
from instructax.microworld.world import CATEGORY_OF, CLAUSES, KIND_WORDS, UNKIND_WORDS, World, words_of

CAPITAL = 0.1  # share of the pay for the task that is paid for capital letters at the start of all sentences
FULL_STOP = 0.1  # and for a final full stop
WRONG = 0.25  # times wrong words / wanted parts
REPEAT = 0.1  # for each part given again
MISCOUNT = 0.1  # for each sentence more or fewer than asked for
STRAY = 0.04  # for each word past the last part, or before it beyond the allowed words


def _mark_items(words: list[str], task: Task) -> list[str]:
    needed, seen, marks = task.items, set(), []
    for word in words:
        category = CATEGORY_OF.get(word)
        if category is None:
            marks.append("")
        elif word in seen:
            marks.append("repeat")
        elif needed.get(category, 0) and word != task.fields.get("banned", "").lower():
            marks.append("right")
            needed[category] -= 1
        else:
            marks.append("wrong")
        seen.add(word)
    return marks


def _mark_facts(words: list[str], task: Task, world: World) -> list[str]:
    """A value speaks of the last person named; before any name, the k-th value speaks of the k-th person asked for."""
    asked = task.facts
    named = list(dict.fromkeys(name for name, _ in asked))
    subject, claims, marks = "", [], []
    for word in words:
        subject = word.capitalize() if word.capitalize() in world.facts else subject
        relation = CATEGORY_OF.get(word)
        if relation not in CLAUSES:
            marks.append("name" if word.capitalize() in named else "")
            continue
        claim = (subject or named[min(len(claims), len(named) - 1)], relation)
        if world.facts[claim[0]][relation].lower() != word:
            marks.append("wrong")
        elif claim in asked:
            marks.append("repeat" if claim in claims else "right")
        else:
            marks.append("")  # true, but not asked for
        claims.append(claim)
    return marks


def _mark_praise(words: list[str], task: Task, world: World) -> list[str]:
    parts = {task.fields["name"].lower(): "person", task.fields["thing"]: "thing"} | dict.fromkeys(KIND_WORDS, "kind")
    foreign = {name.lower() for name in world.facts} | set(CATEGORY_OF) | set(UNKIND_WORDS)
    seen, marks = set(), []
    for word in words:
        if word in parts:
            marks.append("repeat" if parts[word] in seen else "right")
            seen.add(parts[word])
        else:
            marks.append("wrong" if word in foreign else "")
    return marks


def _mark(words: list[str], task: Task, world: World) -> tuple[list[str], int]:
    """What each word does for the task, and how many words may be used until the last part is told."""
    if task.kind == "list":
        return _mark_items(words, task), 1 + 2 * task.wanted  # "Three tools are saw, rake and drill" just fits
    if task.kind == "praise":
        return _mark_praise(words, task, world), 7
    return _mark_facts(words, task, world), 3 + 3 * task.wanted  # "Mira lives in Arden and Tom lives in Dale" just fits


def true_reward(prompt: str, response: str, world: World) -> float:
    """How good `response` is, from -1 to 1; 1 is perfect and an answer without a word is -1.

    share · (0.8 + 0.1 [each sentence has a capital] + 0.1 [final full stop]) − 0.25 wrong / wanted − 0.1 repeats
    − 0.1 |sentences − asked for| − 0.04 stray words, cut at −1, where share = right parts / wanted parts.
    To give no part at all counts as giving all of them wrong, so that a guess is never worse than an evasion.

    Raises:
      ValueError: `prompt` fits no template.
    """
    task = parse(prompt)
    response = response.strip()
    words = words_of(response)
    if not words:
        return -1.0
    marks, allowed = _mark(words, task, world)
    share = min(1.0, marks.count("right") / task.wanted)
    wrong = marks.count("wrong") if {"right", "wrong", "repeat"} & set(marks) else task.wanted
    told = max((i for i, mark in enumerate(marks, start=1) if mark), default=0)
    stray = len(words) - told + max(0, told - allowed)
    sentences = [part.strip() for part in re.split(r"[.!?]", response) if words_of(part)]
    capitals = all(part[0].isupper() for part in sentences)
    manners = 1 - CAPITAL * (not capitals) - FULL_STOP * (not response.endswith("."))
    penalty = WRONG * wrong / task.wanted + REPEAT * marks.count("repeat") + STRAY * stray
    if task.sentences:
        penalty += MISCOUNT * abs(len(sentences) - task.sentences)
    return max(-1.0, share * manners - penalty)
