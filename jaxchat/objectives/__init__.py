"""Objectives: functions of (parameters, batch) that return a weighted total and its weight, never a mean."""
