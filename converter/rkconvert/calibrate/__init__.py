"""Calibration data: texts in the model's own template that the toolkit's quantizer runs through the float model."""

from rkconvert.calibrate.dataset import Row, validate_dataset, write_dataset

__all__ = ["Row", "validate_dataset", "write_dataset"]
