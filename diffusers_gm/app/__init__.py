"""Samplers side by side in a browser: `python -m diffusers_gm.app`. Needs the `app` extra; all but `.page` does without."""
