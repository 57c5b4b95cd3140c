"""Stages: which stream, which objective, which evaluations; everything between a configuration and the loop."""

from jaxchat.stages.running import run

__all__ = ["run"]
