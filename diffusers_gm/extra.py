"""What to say where a package of an extra is missing."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Inside, an import that fails names the extra that brings the package: `pip install diffusers-gm[name]`."""
    try:
        yield
    except ImportError as error:
        raise ImportError(f"{error.name} is not installed: pip install diffusers-gm[{name}]") from error
