"""Breaking a protocol rule on purpose: one function of the runtime with one passage of its source replaced.

The function's code is exchanged in place, so that whoever imported it runs the broken one. A passage that the source no
longer has, or has twice, is an error: mutants go with the code that they break.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from types import FunctionType
from typing import Any

from shmroute.shared import atomic


def store_release(address: int, value: int) -> None:
    """A store that is not sequentially consistent, for mutants; see `machine.StoreBuffers`."""
    machine: Any = atomic._machine
    machine.store_release(address, value)


@dataclass(frozen=True)
class Mutant:
    """One broken rule.

    Attributes
    ----------
    name : str
    rule : str
        What the code no longer keeps to.
    where : str
        ``module:function`` or ``module:Class.method``, inside the package.
    changes : tuple of (str, str)
        Passages of the function's source, and what takes their place.
    worlds : tuple of str
        Where the search looks for it, the likeliest first.
    """

    name: str
    rule: str
    where: str
    changes: tuple[tuple[str, str], ...]
    worlds: tuple[str, ...]

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Break the rule for the length of a block."""
        with _changed(self.where, self.changes):
            yield


@contextlib.contextmanager
def _changed(where: str, changes: tuple[tuple[str, str], ...]) -> Iterator[None]:
    module_name, _, path = where.partition(":")
    module = importlib.import_module(f"shmroute.{module_name}")
    function: Any = module
    for name in path.split("."):
        function = getattr(function, name)
    function = inspect.unwrap(function)
    assert isinstance(function, FunctionType), f"{where} is no function"
    source = inspect.getsource(function)
    for old, new in changes:
        assert source.count(old) == 1, f"{where} has {source.count(old)} times:\n{old}"
        source = source.replace(old, new)
    former = function.__code__
    function.__code__ = _compiled(textwrap.dedent(source), function)
    added = "store_release" not in vars(module)
    if added:
        vars(module)["store_release"] = store_release
    try:
        yield
    finally:
        function.__code__ = former
        if added:
            del vars(module)["store_release"]


def _compiled(source: str, function: FunctionType) -> Any:
    tree = ast.parse(source)
    definition = tree.body[0]
    assert isinstance(definition, ast.FunctionDef)
    definition.decorator_list = []
    definition.returns = None
    for argument in ast.walk(definition.args):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    space = dict(function.__globals__)
    exec(compile(tree, f"<mutant of {function.__qualname__}>", "exec"), space)
    return space[definition.name].__code__
