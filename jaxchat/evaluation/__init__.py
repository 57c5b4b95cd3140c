"""Evaluation of models: likelihood questions, solved problems, bits per byte, comparisons and reports."""
