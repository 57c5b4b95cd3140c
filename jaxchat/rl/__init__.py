"""Reinforcement learning: settings, sampled answers, rewards, batches, and the stage that trains on them."""
