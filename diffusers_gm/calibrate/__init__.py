"""`diffusers_gm.calibrate(pipe)`, and the command `python -m diffusers_gm.calibrate`.

A package, so that both can have the name: it is imported before the function takes its place in `diffusers_gm`, where
later imports leave it.
"""

from ..calibration import calibrate as calibrate
