"""The restricted Jinja environment of chat templates; importing it requires Jinja.

Loops and calls are charged to a budget, and products and powers are checked.
"""

import contextvars
import dataclasses
import datetime
import functools
import json
from collections.abc import Iterable, Iterator, Sized
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.runtime
import jinja2.sandbox

# Budget of one rendering: an iteration of a loop is one step, and a call, which takes
# longer, is CALL_STEPS. A long conversation needs thousands of steps.
MAX_STEPS = 1_000_000
CALL_STEPS = 20
# Length of a repeated string or list.
MAX_REPEATED_LENGTH = 1_000_000
MAX_EXPONENT = 64


@dataclasses.dataclass
class Budget:
    """The steps that a rendering may still take."""

    steps_left: int = MAX_STEPS

    def spend(self, steps: int) -> None:
        self.steps_left -= steps
        if self.steps_left < 0:
            raise ValueError(f"its loops and calls exceed {MAX_STEPS} steps")


# Compiled templates are cached and shared by threads, so the budget is kept apart.
rendering_budget: contextvars.ContextVar[Budget] = contextvars.ContextVar("template_budget")


class Generation(jinja2.ext.Extension):
    """{% generation %} … {% endgeneration %} marks what is trained.

    The text is unchanged.
    """

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        # The token that opened the block.
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Charges loops and calls to the budget, and checks products and powers."""

    # Operators that go through `call_binop`.
    intercepted_binops = frozenset({"*", "**"})

    def _parse(self, source: str, name: Any, filename: Any) -> Any:
        tree = super()._parse(source, name, filename)
        # {% for x in items %} becomes {% for x in items | charged %}.
        for loop in tree.find_all(jinja2.nodes.For):
            loop.iter = jinja2.nodes.Filter(loop.iter, "charged", [], [], None, None)
        return tree

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        rendering_budget.get().spend(CALL_STEPS)
        # A recursive loop is called with its next items: {{ loop(items) }}.
        if isinstance(function, jinja2.runtime.LoopContext) and args:
            args = (_charge_iterations(args[0]), *args[1:])
        return super().call(context, function, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        _check_operands(operator, left, right)
        return super().call_binop(context, operator, left, right)


# A filter with a context is not evaluated at compile time, when there is no budget.
@jinja2.pass_context
def _charged(context: Any, items: Any) -> Any:
    return _charge_iterations(items)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


@functools.cache
def template_environment() -> Sandbox:
    """The one environment of this process, with what Hugging Face offers to templates."""
    environment = Sandbox(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[jinja2.ext.loopcontrols, Generation],
    )
    environment.filters["charged"] = _charged
    # Jinja's own filter escapes for HTML.
    environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _charge_iterations(items: Any) -> Any:
    """Charges a loop over `items` to the budget: at once if its length is known."""
    budget = rendering_budget.get()
    if isinstance(items, Sized):
        budget.spend(len(items))
        return items
    return _charge_each(items, budget)


def _charge_each(items: Iterable[Any], budget: Budget) -> Iterator[Any]:
    for item in items:
        budget.spend(1)
        yield item


def _check_operands(operator: str, left: Any, right: Any) -> None:
    """Raises ValueError for a product or power that would take all memory."""
    if operator == "**" and isinstance(right, int) and abs(right) > MAX_EXPONENT:
        raise ValueError(f"its power {right} is above {MAX_EXPONENT}")
    if operator != "*":
        return
    # A string or list times a number, in either order.
    for sequence, times in ((left, right), (right, left)):
        if not isinstance(sequence, str | list | tuple) or not isinstance(times, int):
            continue
        if len(sequence) * times > MAX_REPEATED_LENGTH:
            raise ValueError(
                f"it makes a text of more than {MAX_REPEATED_LENGTH} characters"
            )
