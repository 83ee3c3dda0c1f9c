"""Predict whether a model fits a board, and how fast it will be, from its config.json alone."""

from rkconvert.plan.planner import Plan, PlanRequest, make_plan, plan_for, require
from rkconvert.plan.source import ModelSource

__all__ = ["ModelSource", "Plan", "PlanRequest", "make_plan", "plan_for", "require"]
