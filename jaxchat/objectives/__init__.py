"""Objectives: functions of parameters and a batch that return a weighted total and its weight, never a mean."""
