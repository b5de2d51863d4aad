"""Runs chat templates, which are programs by strangers, in a restricted Jinja environment.

On top of Jinja's immutable sandbox, which hides Python's internals and files, a template
gets a budget of loop iterations and calls, and may not build huge strings or numbers. These
limits catch mistakes and simple attacks; they do not bound memory. A server that runs
untrusted templates also needs a limit of the operating system (`ulimit`, a container).
"""

import functools
from typing import Any

from instructax.config import ConfigError


def render_template(source: str, **variables: Any) -> str:
    """The text that the template `source` makes of `variables`.

    Raises ConfigError if the template cannot be parsed, and any exception that it causes at
    run time.
    """
    template = compile_template(source)
    # Imported only now: `compile_template` reports a missing Jinja.
    from instructax.data.template_environment import Budget, rendering_budget

    # The budget starts anew with every rendering.
    token = rendering_budget.set(Budget())
    try:
        return template.render(**variables)
    finally:
        rendering_budget.reset(token)


@functools.lru_cache(maxsize=8)
def compile_template(source: str) -> Any:
    """The parsed template, with the names that Hugging Face offers to templates.

    Raises ConfigError if Jinja is not installed or the template cannot be parsed.
    """
    try:
        # Jinja is an optional dependency.
        import jinja2

        from instructax.data.template_environment import template_environment
    except ImportError:
        raise ConfigError(
            "a chat template needs jinja2: pip install 'instructax[chat]'"
        ) from None
    try:
        return template_environment().from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(
            f"the chat template cannot be read: line {error.lineno}: {error.message}"
        ) from None
