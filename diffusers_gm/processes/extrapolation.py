"""The denoiser between network calls: what makes a sampler second order at one call a step."""

from typing import TypeVar

from torch import Tensor

Length = TypeVar("Length", float, Tensor)


def to_the_middle(before: Length, after: Length) -> Length:
    """The factor a of `D + a (D - D_previous)`: D extrapolated linearly in log sigma to the middle of a step.

    As in DPM-Solver++(2M) (arXiv 2211.01095).

    Args:
        before: length of the step from the previous call to the one of D, `log(sigma_previous / sigma)`, > 0.
        after: length of the step that follows, `log(sigma / sigma_next)`.
    """
    return after / (2 * before)
