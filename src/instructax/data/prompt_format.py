"""How records become the text that a model reads: prompts as they are, or chat turns."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

# What starts each turn of a dialog prompt, and the role of its message.
_ROLE_OF_PREFIX = {"Human: ": "user", "Assistant: ": "assistant"}


@dataclasses.dataclass(frozen=True)
class PromptFormat:
    """Maps the prompts and completions of records to the text of a model."""

    # Identifies the format; prepared rows depend on it. "" for plain text.
    hash: str
    # A prompt that ends with its separator → the text up to the start of the completion.
    prompt: Callable[[str], str]
    # A completion → its text up to the end token.
    answer: Callable[[str], str]
    # A formatted prompt → token ids; None encodes it as ordinary text.
    encode: Callable[[str], np.ndarray] | None
    # Special tokens of the format: no prompt or completion may contain their text.
    reserved: Sequence[str]


# Prompts and completions as they are.
PLAIN_FORMAT = PromptFormat(hash="", prompt=str, answer=str, encode=None, reserved=())


def add_separator(prompt: str) -> str:
    """Returns the prompt up to the start of its completion.

    Adds nothing after white space, a blank after a colon ("Assistant:"), and an empty line
    after anything else. Every stage reads prompts through this function, so all stages see
    the same tokens.
    """
    if not prompt or prompt[-1].isspace():
        return prompt
    if prompt.endswith(":"):
        return prompt + " "
    return prompt + "\n\n"


def split_turns(prompt: str) -> list[Mapping[str, str]]:
    """Splits a prompt into chat messages, without the white space around them.

    A dialog "\\n\\nHuman: …\\n\\nAssistant:", whose last turn is still to be written, gives
    one message per turn; any other prompt is a single message of the user.
    """
    is_dialog = prompt.startswith("\n\nHuman: ") and prompt.rstrip().endswith(
        "\n\nAssistant:"
    )
    if not is_dialog:
        return [{"role": "user", "content": prompt.strip()}]

    # The blank makes the last "Assistant:" a turn like the others; it is the one to write.
    paragraphs = [part for part in f"{prompt.rstrip()} ".split("\n\n") if part]
    turns: list[dict[str, str]] = []
    for paragraph in paragraphs[:-1]:
        for prefix, role in _ROLE_OF_PREFIX.items():
            if paragraph.startswith(prefix):
                turns.append({"role": role, "content": paragraph.removeprefix(prefix)})
                break
        else:
            # An empty line within a turn.
            turns[-1]["content"] += f"\n\n{paragraph}"
    return [{**turn, "content": turn["content"].strip()} for turn in turns]
