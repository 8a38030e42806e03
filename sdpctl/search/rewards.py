"""The rewards of a search: functions of what is known of a scored network, by name or as an expression.

An expression such as `top1 - 2 * gmacs` is text from outside. Python's parser reads it, a list of allowed operations refuses
everything but arithmetic on the fields of `Facts`, and simpleeval evaluates it; Python's `eval` is not used. Importing this
module needs no torch.
"""

import ast
import math
import operator
import warnings
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from sdpctl.errors import UsageError, did_you_mean, shown

if TYPE_CHECKING:
    from simpleeval import SimpleEval


class Facts(NamedTuple):
    """What a reward may depend on: the names of an expression.

    Args:
        top1: top-1 accuracy in per cent.
        top5: top-5 accuracy in per cent; NaN with fewer than six classes.
        loss: mean cross-entropy.
        macs: MACs of one image.
        gmacs: the same in 10^9.
        relative: the same as a share of `full`.
    """

    top1: float
    top5: float
    loss: float
    macs: int
    gmacs: float
    relative: float


Reward = Callable[[Facts, float], float]
"""Takes the facts of a network and `search.weight`; a larger reward is better."""

COSTS = frozenset({"macs", "gmacs", "relative"})
"""The facts that grow with the cost of a network."""


def accuracy(facts: Facts, _: float) -> float:
    """Return top-1 in per cent."""
    return facts.top1


def amc(facts: Facts, _: float) -> float:
    """Return -error * log(MACs) with the error in [0, 1] (He et al. 2018, section 3.3.2)."""
    return -(1 - facts.top1 / 100) * math.log(facts.macs)


def branch(facts: Facts, weight: float) -> float:
    """Return top-1 in per cent less `weight` for each GMAC."""
    return facts.top1 - weight * facts.macs / 1e9


LONGEST = 200
"""Maximum length of an expression, in characters, which also bounds its depth and the size of its numbers."""

ONE, SEVERAL = "one value", "two values or more"
FUNCTIONS: Mapping[str, tuple[Callable[..., float], str]] = {
    "log": (math.log, ONE),
    "exp": (math.exp, ONE),
    "sqrt": (math.sqrt, ONE),
    "abs": (abs, ONE),
    "min": (min, SEVERAL),
    "max": (max, SEVERAL),
}
"""The functions of an expression, and how many values each takes."""

OPERATORS: Mapping[type[ast.AST], Callable[..., float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: math.pow,  # in floating point: a power of integers may have more digits than fit in memory
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}
"""The operators of an expression."""


class Expression:
    """A reward that is written as arithmetic on the fields of `Facts`.

    Args:
        text: the expression, for example `top1 - 2 * gmacs`.

    Raises:
        UsageError: if the text is anything else.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        try:
            if len(text) > LONGEST:
                raise UsageError(f"it has {len(text):,} characters, and {LONGEST} are allowed")
            self.tree = _parsed(text)
            self.names = frozenset(_names(self.tree))
            if not self.names:
                raise UsageError(f"it depends on none of the values {', '.join(Facts._fields)}")
        except UsageError as error:
            raise UsageError(f"{shown(text)} is not a reward: {error}") from None

    def __call__(self, facts: Facts, _: float) -> float:
        """Return the reward of a network.

        Raises:
            ArithmeticError: if it cannot be computed, as with a division by zero.
            ValueError: if a function has no value, as the logarithm of a negative number.
        """
        self._evaluator.names = facts._asdict()
        return float(self._evaluator.eval(self.text, previously_parsed=self.tree))

    @cached_property
    def _evaluator(self) -> "SimpleEval":
        from simpleeval import SimpleEval

        return SimpleEval(operators=dict(OPERATORS), functions={name: entry[0] for name, entry in FUNCTIONS.items()}, names={})


def _parsed(text: str) -> ast.expr:
    try:
        with warnings.catch_warnings():  # Python warns of `1if`
            warnings.simplefilter("ignore")
            return ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError) as error:  # ValueError: the text has a null byte
        where = f" at character {error.offset}" if isinstance(error, SyntaxError) and error.offset else ""
        raise UsageError(f"it cannot be parsed{where}") from None


def _names(node: ast.AST) -> set[str]:
    """Return the names that a part of an expression uses.

    Raises:
        UsageError: if the part is not allowed.
    """
    match node:
        case ast.Constant(value=int() | float()) if not isinstance(node.value, bool):
            return set()
        case ast.Name(id=name):
            if name not in Facts._fields:
                near = did_you_mean(name, Facts._fields)
                raise UsageError(f"there is no value {shown(name)}{near}; the values are {', '.join(Facts._fields)}")
            return {name}
        case ast.UnaryOp(op=op, operand=operand) if type(op) in OPERATORS:
            return _names(operand)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            return _names(left) | _names(right)
        case ast.Call(func=ast.Name(id=name), args=given, keywords=[]):
            if name not in FUNCTIONS:
                near = did_you_mean(name, FUNCTIONS)
                raise UsageError(f"there is no function {shown(name)}{near}; the functions are {', '.join(FUNCTIONS)}")
            takes = FUNCTIONS[name][1]
            if (len(given) == 1) != (takes == ONE) or not given:
                raise UsageError(f"{name} takes {takes}, and gets {len(given)}")
            return set().union(*map(_names, given))
    raise UsageError(f"{shown(ast.unparse(node))} is not allowed; use numbers, values, functions, parentheses and + - * / **")
