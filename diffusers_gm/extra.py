"""What to say where a package of an extra is missing."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager


def how_to_install(name: str) -> str:
    """The command that installs an extra, as a shell takes it."""
    return f'pip install "diffusers-gm[{name}]" (in a clone: pip install -e ".[{name}]")'


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Inside, the import of a package that is not there names the extra that brings it."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        raise ImportError(f"{package} is not installed: {how_to_install(name)}") from error


def check_extra(name: str, *packages: str) -> None:
    """Raise an ImportError that names the extra unless its `packages` are installed: for before any work."""
    with extra(name):
        for package in packages:
            importlib.import_module(package)
