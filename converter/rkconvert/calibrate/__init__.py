"""Calibration data: texts that the toolkit's quantizer runs through the float model, in the model's own template."""

from rkconvert.calibrate.dataset import Row, validate_dataset, write_dataset

__all__ = ["Row", "validate_dataset", "write_dataset"]
