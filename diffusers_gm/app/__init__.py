"""Samplers side by side in a browser: `python -m diffusers_gm.app`. Of this, `.page` alone needs the `app` extra."""
