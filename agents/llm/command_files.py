"""What `diptych run` is told to run: the module of a FILE, and the FUNCTION in it.

command.py calls it. A file is loaded as `python FILE` would, but not as __main__: its folder can be imported from, and
sys.argv has the file alone, so that examples that read it take their defaults.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

from diptych.protos.errors import DiptychError

from .command_arguments import WrongArguments


@dataclass(frozen=True, slots=True)
class FromFile:
    """`value` is what the name means in the file."""

    name: str
    value: Any


@contextmanager
def from_file(target: str, own: tuple[type, ...]) -> Iterator[FromFile]:
    """What FILE:FUNCTION means, while the file's surroundings hold. `own`: the classes of what is run besides
    functions. Raises WrongArguments, and a DiptychError of the file's own.
    """
    told, colon, name = target.rpartition(":")
    if not colon:
        told, name = target, ""
    path = Path(told)
    if not path.is_file():
        why = "is a folder" if path.is_dir() else "is not there"
        raise WrongArguments(f"the file {told!r} {why}: write FILE:FUNCTION, such as films.py:review")
    argv, paths = list(sys.argv), list(sys.path)
    try:
        sys.argv[:] = [str(path)]
        try:
            module = _loaded(path.resolve())
        except DiptychError:
            raise
        except (Exception, SystemExit) as exc:
            raise WrongArguments(_unloaded(exc, path.resolve(), told)) from exc
        yield FromFile(name, _found(module, told, name, own))
    finally:
        sys.argv[:], sys.path[:] = argv, paths


def _unloaded(exc: BaseException, path: Path, told: str) -> str:
    """The line of the file that is at fault, as near as it can be told."""
    if isinstance(exc, SyntaxError):
        return f"{exc.filename or told}:{exc.lineno}: this is no Python: {exc.msg}"
    lines = [one.lineno for one in traceback.extract_tb(exc.__traceback__) if one.filename == str(path)]
    where = f"{told}:{lines[-1]}" if lines else told
    if isinstance(exc, SystemExit):
        return f"{where}: the file ends the program where it is loaded: put that under if __name__ == '__main__'"
    return f"{where}: {''.join(traceback.format_exception_only(exc)).strip()}"


def _loaded(path: Path) -> ModuleType:
    """As a module of its package, where it lies in one."""
    root, name = path.parent, path.stem
    while (root / "__init__.py").is_file():
        root, name = root.parent, f"{root.name}.{name}"
    sys.path.insert(0, str(root))
    package = name.rpartition(".")[0]
    if package:
        importlib.import_module(package)
    if name in sys.modules:
        if (found := sys.modules[name]).__dict__.get("__file__") == str(path):
            return found
        name += "_of_this_file"  # another module has the name, and keeps it
    loader = SourceFileLoader(name, str(path))
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # hints are resolved by it
    try:
        loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _found(module: ModuleType, told: str, name: str, own: tuple[type, ...]) -> Any:
    there = [one for one, value in vars(module).items() if _is_shown(one, value, module, own)]
    names = f"there are: {', '.join(there)}" if there else "it has none"
    if not name:
        raise WrongArguments(f"say which function of {told}: write {told}:FUNCTION; {names}")
    value: Any = module
    for step in name.split("."):
        try:
            value = getattr(value, step)
        except AttributeError:
            close = get_close_matches(name, there, n=1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise WrongArguments(f"{told} has no {name!r}: {hint}{names}") from None
    if isinstance(value, own) or (callable(value) and not inspect.isclass(value)):
        return value
    kind = "a class" if inspect.isclass(value) else f"of the type {type(value).__name__}"
    raise WrongArguments(f"{told}:{name} is {kind}, neither a call nor an agent nor a function; {names}")


def _is_shown(name: str, value: Any, module: ModuleType, own: tuple[type, ...]) -> bool:
    if name.startswith("_"):
        return False
    is_function = inspect.isfunction(value) and value.__module__ == module.__name__
    return is_function or isinstance(value, own)
