"""Lets diffusers find GMSGMPipeline, which is part of the Python package diffusers_gm."""

try:
    from diffusers_gm import GMSGMPipeline  # noqa: F401
except ImportError as error:
    raise ImportError(
        "this model needs the Python package diffusers_gm, version 0.1.0 or newer: "
        "install it, then load the model again"
    ) from error
