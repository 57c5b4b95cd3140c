"""From text to ids and back, without loss. No jax here: processes that prepare data import this."""

from jaxchat.tokenizer.compare import Report, report
from jaxchat.tokenizer.sentencepiece import SPECIALS, Tokenizer, TokenizerConfig, sample, train_tokenizer

__all__ = ["SPECIALS", "Report", "Tokenizer", "TokenizerConfig", "report", "sample", "train_tokenizer"]
