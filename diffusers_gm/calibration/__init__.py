"""Noise levels made for a network: measured on the network itself, without data and without training."""

from .calibrate import Calibration as Calibration
from .calibrate import calibrate as calibrate
from .calibrate import calibrate_in_full as calibrate_in_full
