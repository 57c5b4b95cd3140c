"""Stages (pretraining, SFT, RL): data stream, objective and evaluations of a run, and the phases around the loop."""

from jaxchat.stages.running import run

__all__ = ["run"]
