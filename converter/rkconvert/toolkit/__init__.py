"""Conversion with the vendor's rkllm-toolkit, under its own Python interpreter; it is never imported here."""

from rkconvert.toolkit.interpreter import Toolkit, find_toolkit
from rkconvert.toolkit.job import ToolkitJob
from rkconvert.toolkit.runner import ToolkitResult, run_toolkit

__all__ = ["Toolkit", "ToolkitJob", "ToolkitResult", "find_toolkit", "run_toolkit"]
