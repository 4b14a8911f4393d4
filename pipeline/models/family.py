"""Import a family of networks, and build its networks.

The file may be a user's: whatever fails in it becomes a UserError that names the line.
"""

import importlib
import inspect
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from pipeline.runtime.errors import UserError, first_line

#: Packages that are an extra of this project, and what installs them.
_EXTRAS = {"timm": "python -m pip install -e '.[timm]'"}


def family_module(name: str) -> ModuleType:
    """Import a family of networks, pipeline/networks/NAME.py.

    Raises:
        UserError: the import fails, for any reason.
    """
    try:
        return importlib.import_module(f"pipeline.networks.{name}")
    except UserError:
        raise
    except ModuleNotFoundError as error:
        if error.name == f"pipeline.networks.{name}":
            raise UserError(f"there is no `pipeline/networks/{name}.py`.") from None
        if error.name in _EXTRAS:
            remedy = f"Run `{_EXTRAS[error.name]}` in the project's environment"
        else:
            remedy = (
                f"If it is code of yours, move it into {family_file(name)}, because DVC watches no "
                "other file of a family; if it is a package, install it in the project's "
                "environment"
            )
        problem = f"{_place(error, name)} imports `{error.name}`, which cannot be found"
    except (Exception, SystemExit) as error:  # code of a user's, which may do anything
        problem, remedy = describe_failure(error, name), "Correct the file"
    raise UserError(f"family `{name}` cannot be imported: {problem}. {remedy}.")


def build_network(
    family: str,
    network: str,
    sizes: tuple[int, int],
    options: Mapping[str, Any],
    state: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """Call the family's `build`, or its `build_from_file` for a state that holds the network.

    Args:
        sizes: number of classes, number of channels.

    Raises:
        UserError: the family has no such function, it does not take the options, it raises
            anything, or returns no network.
    """
    name = "build" if state is None else "build_from_file"
    make = getattr(family_module(family), name, None)
    called_as = f"`{name}(network, num_classes, in_channels, **options)`"
    if not callable(make):
        raise UserError(
            f"`{family_file(family)}` has no function {called_as}. "
            "docs/examples/own_network.py is a template."
        )
    subject = f"network `{network}` of family `{family}`"
    refused = f"{subject} does not take the options {dict(options)}"
    arguments = (network if state is None else state, *sizes)
    signature = inspect.signature(make).replace(return_annotation=inspect.Signature.empty)
    try:
        signature.bind(*arguments, **options)
    except TypeError as error:
        raise UserError(
            f"{refused}: {error}. `{name}{signature}` of {family_file(family)} is called as "
            f"{called_as}."
        ) from None
    try:
        module = make(*arguments, **options)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        failure = describe_failure(error, family)
        if options and isinstance(error, TypeError):
            raise UserError(f"{refused}: {failure}.") from None
        raise UserError(f"{subject} cannot be built: {failure}.") from None
    if not isinstance(module, nn.Module):
        raise UserError(
            f"`{name}` of {family_file(family)} returns {type(module).__name__} for network "
            f"`{network}`; expected a torch.nn.Module."
        )
    return module


def family_file(name: str) -> str:
    return f"pipeline/networks/{name}.py"


def describe_failure(error: BaseException, family: str) -> str:
    """Describe an exception by class and message, after the line of the family's file that was
    running: `pipeline/networks/mine.py, line 7: NameError: name 'nn' is not defined`."""
    kind, place = type(error).__name__, _place(error, family)
    message = error.msg if isinstance(error, SyntaxError) else first_line(error).rstrip(".")
    text = kind if message == kind else f"{kind}: {message}"
    return f"{place}: {text}" if place else text


def _place(error: BaseException, family: str) -> str:
    """File and line; an empty text if no code of the family's file was running."""
    lines = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    if isinstance(error, SyntaxError) and error.filename:
        lines.append((error.filename, error.lineno))
    own = [n for file, n in lines if Path(file).parts[-2:] == ("networks", f"{family}.py")]
    return f"{family_file(family)}, line {own[-1]}" if own else ""
