"""What to say where a package of the `evaluation` extra is missing."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def evaluation_extra() -> Iterator[None]:
    """Inside, an import that fails names the extra that brings the package."""
    try:
        yield
    except ImportError as error:
        raise ImportError(f"{error.name} is not installed: pip install diffusers-gm[evaluation]") from error
