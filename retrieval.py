"""The search engine R of the paper: passages in, a query in, the nearest passages out.

Search-R1 treats the engine as part of the environment [Sec. 3.1, Eq. 1: y ~ pi(. | x; R)]. The policy never sees its
scores and no gradient flows through it, so any engine fits behind one call:

    search(queries: list[str], top_k: int) -> list[list[Passage]]        one list a query, best passage first

This file has the smallest engine that is not a toy: hashed word vectors, weighted by how rare a word is, in a FAISS
flat index. It needs no model, no download and no training, gives the same vectors on every machine, and is exact.

    Passage, load_passages     a passage, and the official corpus format
    HashedEncoder              text -> unit vector
    SearchEngine               encoder + FAISS index + passages = R

Shapes: N passages, S queries in flight, E embedding, K top-k.
"""

import hashlib
import json
import math
import re
from collections import Counter
from dataclasses import dataclass

import faiss
import numpy as np

WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Passage:
    """A passage as the official corpus has it: `contents` = title in double quotes, newline, text."""

    id: str
    title: str
    text: str


# ----- 1. Passages -----


def load_passages(path):
    """Read JSON lines `{"id": ..., "contents": "\\"Title\\"\\ntext"}` -> list[Passage] in the order of the file.

    ValueError, naming the file and the line, for a line that is no JSON object, lacks a key, has no text or repeats
    an id. The quotes around the title are taken off here and put back by searchr1.format_information.
    """
    passages, seen = [], set()
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path} line {number}"
            try:
                record = json.loads(line)
            except ValueError as error:  # broken JSON or broken UTF-8
                raise ValueError(f"{where}: not a JSON object ({error})") from None
            if not isinstance(record, dict) or "id" not in record or not isinstance(record.get("contents"), str):
                raise ValueError(f'{where}: a passage needs "id" and "contents" (a string: title, newline, text)')
            title, _, text = record["contents"].partition("\n")
            title = title.strip()
            if len(title) > 1 and title[0] == title[-1] == '"':  # one pair only: a title may have quotes of its own
                title = title[1:-1]
            passage = Passage(str(record["id"]), title, text.strip())
            if not passage.text:
                raise ValueError(f'{where}: passage {passage.id!r} has no text after the title line of "contents"')
            if passage.id in seen:
                raise ValueError(f"{where}: id {passage.id!r} appears a second time")
            seen.add(passage.id)
            passages.append(passage)
    if not passages:
        raise ValueError(f"{path}: no passages in this file")
    return passages


# ----- 2. The encoder -----


class HashedEncoder:
    """Text -> unit vector [512] fp32: the sum of its words' sign vectors, each weighted by sqrt(count * idf).

    A word's vector is the 512 bits of its BLAKE2b digest read as +1 and -1 [feature hashing by random signs:
    Achlioptas 2003]: two different words are nearly orthogonal (cosine about 1/sqrt(512) = 0.04), the same word is
    the same vector in every process and on every machine. A word that no passage holds weighs nothing.

    The square root of idf, not idf: with the full idf a rare name in a passage outweighs everything else, and the
    passage where it is only mentioned can outrank the passage that is about it.
    """

    dim = 512

    def __init__(self, texts):
        """texts: list of str, the passages as they will be encoded; only their word counts are kept."""
        counts = Counter(word for text in texts for word in set(self.words(text)))
        self.weight = {word: math.sqrt(math.log(1 + len(texts) / n)) for word, n in counts.items()}
        self.vectors = {}

    @staticmethod
    def words(text):
        return WORD.findall(text.lower())

    def vector(self, word):
        if word not in self.vectors:
            bits = np.unpackbits(np.frombuffer(hashlib.blake2b(word.encode(), digest_size=64).digest(), np.uint8))
            self.vectors[word] = self.weight[word] * (2.0 * bits.astype(np.float32) - 1.0)
        return self.vectors[word]

    def encode(self, texts):
        """list of S str -> [S, 512] fp32; rows have norm 1, or are 0 where the text holds no known word."""
        out_SE = np.zeros((len(texts), self.dim), np.float32)
        for row, text in zip(out_SE, texts):
            for word, count in Counter(self.words(text)).items():
                if word in self.weight:
                    row += math.sqrt(count) * self.vector(word)
            row /= np.linalg.norm(row) or 1.0
        return out_SE


# ----- 3. The engine -----


class SearchEngine:
    """R: passages behind an encoder and a FAISS index of inner products, which on unit vectors is the cosine."""

    def __init__(self, passages, encoder, index):
        self.passages, self.encoder, self.index = passages, encoder, index

    def search(self, queries, top_k):
        """list of S str -> S lists of at most top_k Passages, best first, in the order of the queries.

        A query without a single known word gets an empty list: its vector is 0, every passage would tie, and the
        first ones of the file would be returned as if they had been found.
        """
        if top_k < 1:
            raise ValueError(f"top_k={top_k}: must be at least 1")
        if not queries:
            return []
        asked = list(dict.fromkeys(queries))  # the rollouts of a group often ask the same: once is enough
        query_SE = self.encoder.encode(asked)
        _, rows_SK = self.index.search(query_SE, min(top_k, len(self.passages)))
        # PITFALL: FAISS answers -1 where it found fewer than K, and passages[-1] is silently the last passage.
        found = {
            q: [self.passages[row] for row in rows_K if row >= 0] if query_E.any() else []
            for q, query_E, rows_K in zip(asked, query_SE, rows_SK)
        }
        return [list(found[q]) for q in queries]


def build_index(passages, kind="Flat"):
    """list[Passage] -> SearchEngine over hashed word vectors in a FAISS index of the given kind (a factory string).

    The title counts as a word of the text once more: in "Bako lives in Rimton" both are mentioned, but the passage
    is about Bako, and only the title knows.
    """
    texts = [f"{p.title} {p.text}" for p in passages]
    encoder = HashedEncoder(texts)
    index = faiss.index_factory(encoder.dim, kind, faiss.METRIC_INNER_PRODUCT)
    vectors_NE = encoder.encode(texts)
    if not index.is_trained:
        index.train(vectors_NE)
    index.add(vectors_NE)
    return SearchEngine(passages, encoder, index)
