"""Lossless conversion of text to token ids and back. Does not import jax, because data workers import this package."""

from jaxchat.tokenizer.compare import Report, report
from jaxchat.tokenizer.load import load_tokenizer
from jaxchat.tokenizer.protocol import Tokenizer
from jaxchat.tokenizer.sentencepiece import TokenizerConfig, sample, train_tokenizer

__all__ = ["Report", "Tokenizer", "TokenizerConfig", "load_tokenizer", "report", "sample", "train_tokenizer"]
