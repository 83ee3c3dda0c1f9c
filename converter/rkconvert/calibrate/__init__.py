"""Calibration data: texts in the model's own template that the toolkit's quantizer runs through the float model."""

from rkconvert.calibrate.dataset import Sample, validate_dataset, write_dataset

__all__ = ["Sample", "validate_dataset", "write_dataset"]
