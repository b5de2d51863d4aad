"""How prompts and answers are worded for a model: as they are, or in the turns of a
conversation."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class PromptFormat:
    """From the texts of a record to those that a model reads and writes.

    `hash` tells wordings apart: prepared rows depend on it.
    """

    hash: str
    prompt: Callable[
        [str], str
    ]  # of a prompt that is `opened`, up to where its completion begins
    answer: Callable[[str], str]  # of a completion, up to the end token
    encode: (
        Callable[[str], np.ndarray] | None
    )  # of a worded prompt; None: as any other text
    reserved: Sequence[
        str
    ]  # texts that no prompt or completion may hold, since the model reads them as its own


PLAIN_FORMAT = PromptFormat(hash="", prompt=str, answer=str, encode=None, reserved=())


def add_separator(prompt: str) -> str:
    """The prompt up to where its completion begins.

    One that ends in white space stands as it is, one that ends with a colon ("Assistant:")
    goes on after a blank, any other after an empty line. The same wherever a prompt is
    read, so that all stages see the same tokens.
    """
    if not prompt or prompt[-1].isspace():
        return prompt
    return prompt + (" " if prompt.endswith(":") else "\n\n")


def split_turns(prompt: str) -> list[Mapping[str, str]]:
    """The messages of a prompt: those of a dialog, "\\n\\nHuman: …\\n\\nAssistant:", whose
    last turn is open, else one of the user; white space around them is left out."""
    names = {"Human: ": "user", "Assistant: ": "assistant"}
    parts = [part for part in f"{prompt.rstrip()} ".split("\n\n") if part]
    dialog = prompt.startswith("\n\nHuman: ") and prompt.rstrip().endswith("\n\nAssistant:")
    if not dialog:
        return [{"role": "user", "content": prompt.strip()}]
    found: list[dict[str, str]] = []
    for part in parts[:-1]:
        name = next((name for name in names if part.startswith(name)), "")
        if name:
            found.append({"role": names[name], "content": part.removeprefix(name)})
        else:  # an empty line inside a turn
            found[-1]["content"] += f"\n\n{part}"
    return [{**turn, "content": turn["content"].strip()} for turn in found]
