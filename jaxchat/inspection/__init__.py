"""Looks into models and training steps. Functions return values that JSON can hold; `pictures` draws such values."""
