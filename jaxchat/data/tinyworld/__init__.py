"""A small village with fixed facts, and endless prose about it: a corpus that needs no download.

A document is a pure function of (seed, split, index). Two partitions hold by construction and not by luck: the hash of
a document's own text decides whether it may appear in `train` or in `val`, whatever the seed; and the number facts,
words and questions on the test side of `problems` and `facts` appear in neither.
"""

from jaxchat.data.tinyworld.documents import DOCUMENTS, TRAIN_DOCUMENTS, VAL_DOCUMENTS, document, documents
from jaxchat.data.tinyworld.facts import Fact, facts
from jaxchat.data.tinyworld.problems import KINDS, Problem, problems
from jaxchat.data.tinyworld.talk import CONVERSATIONS, conversation

__all__ = [
    "CONVERSATIONS",
    "DOCUMENTS",
    "KINDS",
    "TRAIN_DOCUMENTS",
    "VAL_DOCUMENTS",
    "Fact",
    "Problem",
    "conversation",
    "document",
    "documents",
    "facts",
    "problems",
]
