"""Lossless conversion of text to token ids and back. Does not import jax, because data workers import this package."""

from jaxchat.tokenizer.compare import Report, report
from jaxchat.tokenizer.sentencepiece import SPECIALS, Tokenizer, TokenizerConfig, sample, train_tokenizer

__all__ = ["SPECIALS", "Report", "Tokenizer", "TokenizerConfig", "report", "sample", "train_tokenizer"]
