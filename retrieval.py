"""The search engine R of the paper: passages in, a query in, the nearest passages out.

Search-R1 treats the engine as part of the environment [Sec. 3.1, Eq. 1: y ~ pi(. | x; R)]. The policy never sees its
scores and no gradient flows through it, so any engine fits behind one call:

    search(queries: list[str], top_k: int) -> list[list[Passage]]        one list a query, best passage first

The smallest engine here is made in memory in a second and needs no model: hashed word vectors in a flat FAISS index
(build_index; the tiny world runs on it). The same file carries a user from there to the 21 million passages of the paper.

    1. passages     PassageFile             rows of a file, read from disk when asked for
    2. encoders     HashedEncoder, TransformerEncoder            text -> unit vector
    3. indexes      plan_index, Dense       vectors -> the nearest rows, exactly or approximately
    4. words        BM25                    the same without vectors
    5. second look  Reranker                a cross-encoder reorders the best few
    6. R            SearchEngine            any of these behind the one call
    7. on disk      build, load_engine      python retrieval.py build PASSAGES.jsonl --output DIR
    8. over HTTP    Server, HttpEngine      python retrieval.py serve DIR; the protocol of the official server
       engine_from  FILE, DIR, bm25:DIR or http://host:port/retrieve -> something with search()

A ranker is anything with rank(queries, k) -> (scores [S, k], rows [S, k]), best first, row -1 where nothing was found.
Shapes: N passages, S queries in flight, E embedding, K top-k.
"""

import argparse
import gzip
import hashlib
import http.client
import json
import math
import os
import re
import shutil
import sys
import tarfile
import threading
import time
import urllib.error
import urllib.request
from array import array
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import faiss
import numpy as np
from tqdm import tqdm

WORD = re.compile(r"\w+")


class SearchFailed(Exception):
    """A search engine that cannot be reached or answers nonsense. Never an empty result: it would be trained on."""


@dataclass(frozen=True)
class Passage:
    """A passage as the official corpus has it: `contents` = title in double quotes, newline, text."""

    id: str
    title: str
    text: str

    @property
    def contents(self):
        return f'"{self.title}"\n{self.text}'


# ----- 1. Passages -----


def split_contents(contents):
    """`"Title"\\ntext` -> (title without its pair of quotes, text). A title may have quotes of its own: one pair goes."""
    title, _, text = contents.partition("\n")
    title = title.strip()
    if len(title) > 1 and title[0] == title[-1] == '"':
        title = title[1:-1]
    return title, text.strip()


def parse_passage(line, where):
    """A line of a corpus (bytes) -> Passage; ValueError beginning with `where` for anything else."""
    try:
        record = json.loads(line)
    except ValueError as error:  # broken JSON or broken UTF-8
        raise ValueError(f"{where}: not a JSON object ({error})") from None
    if not isinstance(record, dict) or "id" not in record or not isinstance(record.get("contents"), str):
        raise ValueError(f'{where}: a passage needs "id" and "contents" (a string: title, newline, text)')
    passage = Passage(str(record["id"]), *split_contents(record["contents"]))
    if not passage.text:
        raise ValueError(f'{where}: passage {passage.id!r} has no text after the title line of "contents"')
    return passage


def scan_passages(path, skip_bad=False):
    """Check every line of a corpus once -> (byte offsets of the good ones, int64 [N]; number of bad ones left out).

    ValueError, naming file and line, for a line that is no passage or repeats an id, unless skip_bad.
    """
    offsets, seen, skipped, position = array("q"), set(), 0, 0
    with open(path, "rb") as file, tqdm(total=os.path.getsize(path), unit="B", unit_scale=True, delay=2, desc="reading") as bar:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    where = f"{path} line {number}"
                    id = parse_passage(line, where).id
                    digest = hash(id)  # 64 bits instead of the string: 21 million ids stay under 2 GB
                    if digest in seen:
                        raise ValueError(f"{where}: id {id!r} appears a second time")
                    seen.add(digest)
                    offsets.append(position)
                except ValueError:
                    if not skip_bad:
                        raise
                    skipped += 1
            position += len(line)
            bar.update(len(line))
    if not offsets:
        raise ValueError(f"{path}: no passages in this file")
    return np.frombuffer(offsets, np.int64), skipped


class PassageFile(Sequence):
    """Passages of a corpus by row, read from disk when asked for: 8 bytes of memory a passage, however long it is."""

    def __init__(self, path, offsets):
        self.offsets, self.file, self.lock = offsets, open(path, "rb"), threading.Lock()

    def __len__(self):
        return len(self.offsets)

    def __getitem__(self, row):
        if not 0 <= row < len(self):  # PITFALL: row -1 is FAISS's "nothing found", not the last passage
            raise IndexError(row)
        with self.lock:
            self.file.seek(self.offsets[row])
            return parse_passage(self.file.readline(), f"{self.file.name} row {row}")


def load_passages(path, skip_bad=False):
    """JSON lines `{"id": ..., "contents": "\\"Title\\"\\ntext"}` -> a sequence of Passages in the order of the file.

    A gzipped file cannot be read by row: it is unpacked beside itself first, once (x.jsonl.gz -> x.jsonl).
    ValueError as in scan_passages.
    """
    path = Path(path)
    if path.suffix == ".gz":
        packed, path = path, path.with_suffix("")
        if not path.exists() or path.stat().st_mtime < packed.stat().st_mtime:
            unpack(packed, path)
    return PassageFile(path, scan_passages(path, skip_bad)[0])


def unpack(packed, path):
    """Gunzip; `path` appears whole or not at all. ValueError if the file is no gzip file or ends early.

    The official wiki-18.jsonl.gz is said to be a tar archive in spite of its name: of one, the first file is taken.
    """
    part = path.with_name(path.name + ".part")
    try:
        with gzip.open(packed, "rb") as source, open(part, "wb") as target:
            if source.peek(512)[257:262] == b"ustar":  # where a tar archive says what it is
                archive = tarfile.open(fileobj=source, mode="r|")
                source = next((archive.extractfile(member) for member in archive if member.isfile()), source)
            shutil.copyfileobj(source, target, 2**20)
    except (gzip.BadGzipFile, EOFError, tarfile.ReadError) as error:
        part.unlink()
        raise ValueError(f"{packed}: not a whole gzip file ({error})") from None
    os.replace(part, path)


# ----- 2. Encoders -----


def words(text):
    return WORD.findall(text.lower())


class HashedEncoder:
    """Text -> unit vector [512] fp32: the sum of its words' sign vectors, each weighted by sqrt(count * idf).

    A word's vector is the 512 bits of its BLAKE2b digest read as +1 and -1 [feature hashing by random signs:
    Achlioptas 2003]: two different words are nearly orthogonal (cosine about 1/sqrt(512) = 0.04), the same word is
    the same vector in every process and on every machine. A word that no passage holds weighs nothing.

    The square root of idf, not idf: with the full idf a rare name in a passage outweighs everything else, and the
    passage where it is only mentioned can outrank the passage that is about it.
    """

    dim = 512
    settings = {"encoder": "hashed"}

    def __init__(self, passages=(), weight=None):
        """passages: those that will be searched, of which only word counts are kept; or the `weight` of an earlier one."""
        counts = Counter(word for p in passages for word in set(words(self.text(p))))
        self.weight = weight or {word: math.sqrt(math.log(1 + len(passages) / n)) for word, n in counts.items()}
        self.vectors = {}

    @staticmethod
    def text(passage):
        """The title counts as words of the text once more: in "Bako lives in Rimton" both are mentioned, but the
        passage is about Bako, and only the title knows."""
        return f"{passage.title} {passage.text}"

    def vector(self, word):
        if word not in self.vectors:
            bits = np.unpackbits(np.frombuffer(hashlib.blake2b(word.encode(), digest_size=64).digest(), np.uint8))
            self.vectors[word] = self.weight[word] * (2.0 * bits.astype(np.float32) - 1.0)
        return self.vectors[word]

    def encode_queries(self, texts):
        """list of S str -> [S, 512] fp32; rows have norm 1, or are 0 where the text holds no known word."""
        out_SE = np.zeros((len(texts), self.dim), np.float32)
        for row, text in zip(out_SE, texts):
            for word, count in Counter(words(text)).items():
                if word in self.weight:
                    row += math.sqrt(count) * self.vector(word)
            row /= np.linalg.norm(row) or 1.0
        return out_SE

    def encode_passages(self, passages):
        return self.encode_queries([self.text(p) for p in passages])


# What an encoder was trained with decides how it must be asked: the wrong prefix or pooling costs recall silently.
# First row whose word is in the model's name: pooling, prefix of a query, prefix of a passage.
ENCODERS = {
    "e5": ("mean", "query: ", "passage: "),  # model card of intfloat/e5-base-v2, the paper's retriever
    "bge": ("cls", "Represent this sentence for searching relevant passages: ", ""),  # model card of BAAI/bge-base-en-v1.5
    "": ("mean", "", ""),  # model card of sentence-transformers/all-MiniLM-L6-v2, and most others
}


class TransformerEncoder:
    """Text -> unit vector with any encoder that transformers loads, from a folder or the hub."""

    def __init__(self, model, pooling=None, query_prefix=None, passage_prefix=None, max_length=256):
        import torch  # here, so that the embedded engine does not wait for them
        from transformers import AutoModel, AutoTokenizer

        name = Path(model).name.lower()
        preset = next(row for word, row in ENCODERS.items() if word in name)
        given = (pooling, query_prefix, passage_prefix)
        self.pooling, self.query_prefix, self.passage_prefix = (p if g is None else g for g, p in zip(given, preset))
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = torch.float16 if self.device == "cuda" else torch.float32
        try:
            self.model = AutoModel.from_pretrained(model, dtype=dtype).to(self.device).eval()
            self.tokenizer = AutoTokenizer.from_pretrained(model)
        except (OSError, ValueError) as error:
            raise ValueError(f"no encoder could be loaded from {model}: {str(error).strip().splitlines()[0]}") from None
        self.dim = self.model.config.hidden_size
        self.max_length = max_length
        self.settings = {
            "encoder": str(model), "pooling": self.pooling, "query_prefix": self.query_prefix,
            "passage_prefix": self.passage_prefix, "max_length": max_length,
        }  # fmt: skip

    def encode(self, texts, batch_size=64):
        """list of S str -> [S, E] fp32 of norm 1. Texts of like length share a batch, or padding would be most of it."""
        import torch

        out_SE = np.empty((len(texts), self.dim), np.float32)
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        for start in range(0, len(texts), batch_size):
            rows = order[start : start + batch_size]
            batch = self.tokenizer(
                [texts[i] for i in rows], padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
            ).to(self.device)
            with torch.no_grad():
                hidden_SLE = self.model(**batch).last_hidden_state.float()
            mask_SL1 = batch["attention_mask"][:, :, None]
            pooled_SE = hidden_SLE[:, 0] if self.pooling == "cls" else (hidden_SLE * mask_SL1).sum(1) / mask_SL1.sum(1)
            out_SE[rows] = torch.nn.functional.normalize(pooled_SE, dim=-1).cpu().numpy()
        return out_SE

    def encode_queries(self, texts):
        return self.encode([self.query_prefix + text for text in texts])

    def encode_passages(self, passages):  # `contents` as it stands, title in quotes: so are the official indexes built
        return self.encode([self.passage_prefix + p.contents for p in passages])


# ----- 3. Indexes -----

INDEXES = ("Flat", "HNSW", "IVF-SQ8", "IVF-SQ4", "IVF-PQ")


def plan_index(kind, n, dim):
    """Kind of index for n vectors [dim] -> (FAISS factory string, search settings, predicted bytes in memory and on disk).

    Flat      every vector, every time: exact. 4 bytes a number.
    HNSW      a graph of near neighbours, 32 links a vector and 64 at the bottom [Malkov, Yashunin 2016]; fast, largest.
    IVF-SQ8   vectors in about 4 sqrt(n) cells, a 64th of which is searched; 1 byte a number. IVF-SQ4: half a byte.
    IVF-PQ    the same cells; 4 numbers together become 1 byte, a codebook entry [Jegou et al. 2011]; smallest.
    Anything else is taken as a factory string of FAISS, for which nothing is predicted.
    """
    cells = max(1, min(2 ** round(math.log2(4 * math.sqrt(n))), n // 39))  # FAISS wants 39 vectors a cell to train on
    probes = max(min(8, cells), cells // 64)
    if kind == "Flat":
        return "Flat", {}, 4 * n * dim
    if kind == "HNSW":
        return "HNSW32", {"efConstruction": 80, "efSearch": 64}, n * (4 * dim + 4 * 64 + 16)
    if kind in ("IVF-SQ8", "IVF-SQ4"):
        bits = int(kind[-1])
        return f"IVF{cells},SQ{bits}", {"nprobe": probes}, n * (dim * bits // 8 + 8) + 4 * cells * dim
    if kind == "IVF-PQ":
        if n < 10_000 or dim % 4:
            raise ValueError(
                f"IVF-PQ needs 10,000 passages to learn its codes (here: {n}) and a multiple of 4 dimensions ({dim}): take Flat"
            )
        return f"IVF{cells},PQ{dim // 4}x8np", {"nprobe": probes}, n * (dim // 4 + 8) + 4 * (cells + 256) * dim
    return kind, {}, None


def make_index(kind, vectors_NE, block=65536):
    """FAISS index of inner products (on unit vectors: of cosines) over vectors_NE, which may be a file mapped to memory."""
    n, dim = vectors_NE.shape
    factory, settings, _ = plan_index(kind, n, dim)
    try:
        index = faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError:
        raise ValueError(f"--index {kind}: neither one of {', '.join(INDEXES)} nor a FAISS factory string") from None
    for name, value in settings.items():
        faiss.ParameterSpace().set_index_parameter(index, name, value)
    if not index.is_trained:
        sample = np.random.default_rng(0).permutation(n)[: max(100_000, 40 * getattr(index, "nlist", 0))]
        index.train(np.ascontiguousarray(vectors_NE[np.sort(sample)], np.float32))
    for start in tqdm(range(0, n, block), desc="indexing", delay=2):
        index.add(np.ascontiguousarray(vectors_NE[start : start + block], np.float32))
    return index


class Dense:
    """An encoder and a FAISS index as a ranker."""

    def __init__(self, encoder, index):
        self.encoder, self.index = encoder, index

    def rank(self, queries, k):
        """-> scores, rows [S, k]. A query of which the encoder knows no word is 0 and would tie with everything: -1."""
        query_SE = self.encoder.encode_queries(queries)
        scores_SK, rows_SK = self.index.search(query_SE, k)
        rows_SK[~query_SE.any(1)] = -1
        return scores_SK, rows_SK


# ----- 4. BM25 -----


class BM25:
    """The classic: words that query and passage share, rare ones more, in short passages more [Robertson, Zaragoza 2009].

        score(q, p) = sum over words of q   idf(w) * tf / (tf + k1 (1 - b + b |p| / mean |p|))
        idf(w)      = ln(1 + (N - df + 0.5) / (df + 0.5))

    Lucene's form of the formula and the parameters of Pyserini (k1 0.9, b 0.4), as the official BM25 server. An inverted
    list is a stretch of two arrays, rows and weights, sorted by word: word w owns [starts[w], starts[w+1]). 8 bytes for
    each passage that holds a word: a million passages of a hundred words fit anywhere, 21 million want 12 GB.
    """

    def __init__(self, passages=(), k1=0.9, b=0.4, arrays=None):
        if arrays:
            self.vocabulary, self.starts, self.rows, self.weights, self.n = arrays
            return
        self.vocabulary, word_ids, rows, counts = {}, array("i"), array("i"), array("i")
        lengths = np.zeros(len(passages), np.float32)
        for row, passage in enumerate(tqdm(passages, desc="counting words", delay=2)):
            found = Counter(words(HashedEncoder.text(passage)))
            lengths[row] = found.total()
            for word, count in found.items():
                word_ids.append(self.vocabulary.setdefault(word, len(self.vocabulary)))
                rows.append(row)
                counts.append(count)
        word_ids, rows, counts = (np.frombuffer(a, np.int32) for a in (word_ids, rows, counts))
        order = np.argsort(word_ids, kind="stable")
        df = np.bincount(word_ids, minlength=len(self.vocabulary))
        idf = np.log(1 + (len(passages) - df + 0.5) / (df + 0.5))
        self.starts = np.concatenate([[0], np.cumsum(df)])
        self.rows, tf = rows[order], counts[order].astype(np.float32)
        norm = k1 * (1 - b + b * lengths / lengths.mean())
        self.weights = (idf[word_ids[order]] * tf / (tf + norm[self.rows])).astype(np.float32)
        self.n = len(passages)

    def rank(self, queries, k):
        scores_SK, rows_SK = np.zeros((len(queries), k), np.float32), np.full((len(queries), k), -1)
        for i, query in enumerate(queries):
            score_N = np.zeros(self.n, np.float32)
            for word, count in Counter(words(query)).items():
                w = self.vocabulary.get(word)
                if w is not None:
                    here = slice(self.starts[w], self.starts[w + 1])
                    score_N[self.rows[here]] += count * self.weights[here]
            best = np.argpartition(-score_N, min(k, self.n) - 1)[:k]
            best = best[np.lexsort((best, -score_N[best]))]
            best = best[score_N[best] > 0]
            scores_SK[i, : len(best)], rows_SK[i, : len(best)] = score_N[best], best
        return scores_SK, rows_SK

    def save(self, path):
        vocabulary = np.frombuffer("\n".join(self.vocabulary).encode(), np.uint8)
        with open(f"{path}.part", "wb") as file:
            np.savez(file, vocabulary=vocabulary, starts=self.starts, rows=self.rows, weights=self.weights, n=self.n)
        os.replace(f"{path}.part", path)

    @staticmethod
    def load(path):
        with np.load(path) as saved:
            vocabulary = {word: i for i, word in enumerate(saved["vocabulary"].tobytes().decode().split("\n"))}
            return BM25(arrays=(vocabulary, saved["starts"], saved["rows"], saved["weights"], int(saved["n"])))


# ----- 5. Reranking -----


class Reranker:
    """The best `candidates` of another ranker, reordered by a cross-encoder, which reads query and passage together and
    so judges better than two vectors can, at the price of one forward pass a pair."""

    def __init__(self, ranker, passages, model, candidates=10):
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        self.ranker, self.passages, self.candidates = ranker, passages, candidates
        self.model = AutoModelForSequenceClassification.from_pretrained(model).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(model)

    def rank(self, queries, k):
        import torch

        _, rows_SC = self.ranker.rank(queries, max(k, self.candidates))
        scores_SC = np.full(rows_SC.shape, -np.inf, np.float32)
        for query, rows_C, scores_C in zip(queries, rows_SC, scores_SC):  # a query sees its own candidates and no others
            texts = [HashedEncoder.text(self.passages[row]) for row in rows_C if row >= 0]
            if texts:
                pairs = self.tokenizer(
                    [query] * len(texts), texts, padding=True, truncation="only_second", max_length=512, return_tensors="pt"
                )
                with torch.no_grad():
                    scores_C[: len(texts)] = self.model(**pairs).logits[:, -1].numpy()
        order = np.argsort(-scores_SC, axis=1, kind="stable")[:, :k]
        return np.take_along_axis(scores_SC, order, 1), np.take_along_axis(rows_SC, order, 1)


# ----- 6. The engine -----


class SearchEngine:
    """R: passages behind a ranker. Rows found for recent queries are remembered: the rollouts of a group ask alike."""

    def __init__(self, passages, ranker, cache_size=65536):
        self.passages, self.ranker, self.cache_size = passages, ranker, cache_size
        self.cache, self.lock = OrderedDict(), threading.Lock()

    def search(self, queries, top_k):
        """list of S str -> S lists of at most top_k Passages, best first, in the order of the queries.

        An empty query and one without a known word get an empty list; so nothing is returned that was not found.
        """
        return [[passage for passage, _ in found] for found in self.search_scores(queries, top_k)]

    def search_scores(self, queries, top_k):
        """The same as pairs (Passage, score)."""
        if top_k < 1:
            raise ValueError(f"top_k={top_k}: must be at least 1")
        k = min(top_k, len(self.passages))
        with self.lock:
            new = [q for q in dict.fromkeys(queries) if (q, k) not in self.cache and q.strip()]
            found = {q: self.cache[q, k] for q in queries if (q, k) in self.cache}
            if new:
                for q, scores_K, rows_K in zip(new, *self.ranker.rank(new, k)):
                    # PITFALL: FAISS answers -1 where it found fewer than K, and passages[-1] is a list's last passage.
                    found[q] = [(int(row), float(score)) for row, score in zip(rows_K, scores_K) if row >= 0]
            for q in found:
                self.cache[q, k] = found[q]
                self.cache.move_to_end((q, k))
            while len(self.cache) > self.cache_size:
                self.cache.popitem(last=False)
        return [[(self.passages[row], score) for row, score in found.get(q, [])] for q in queries]


def build_index(passages, kind="Flat"):
    """list of Passages -> SearchEngine over hashed word vectors in an index in memory."""
    encoder = HashedEncoder(passages)
    return SearchEngine(passages, Dense(encoder, make_index(kind, encoder.encode_passages(passages))))


# ----- 7. On disk -----


def write_json(path, value):
    """Whole or not at all, also if the machine stops."""
    part = path.with_name(path.name + ".part")
    with open(part, "w") as file:
        json.dump(value, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def checksum(path, offsets):
    """Of a corpus as an index knows it: its size, where each passage begins, and a thousand passages in full. To read all of
    14 GB at every start would be too slow. A file that was sorted, cut or edited is found out, unless the edit moves
    nothing and is in none of the thousand."""
    sample = offsets[np.linspace(0, len(offsets) - 1, min(1000, len(offsets))).astype(int)]
    sum = hashlib.blake2b(offsets.tobytes() + str(os.path.getsize(path)).encode(), digest_size=16)
    with open(path, "rb") as file:
        for offset in sample:
            file.seek(offset)
            sum.update(file.readline())
    return sum.hexdigest()


PROBE = "which encoder is this"  # its vector stands in the manifest: another encoder under the same name is found out


def make_encoder(settings, passages, weight_file):
    """Settings of a manifest -> encoder; the hashed one reads its word weights from weight_file, or makes and saves them."""
    if settings["encoder"] != "hashed":
        return TransformerEncoder(settings["encoder"], *(settings.get(k) for k in ("pooling", "query_prefix", "passage_prefix")))
    if weight_file.exists():
        return HashedEncoder(weight=json.loads(weight_file.read_text()))
    encoder = HashedEncoder(tqdm(passages, desc="counting words", delay=2))
    write_json(weight_file, encoder.weight)
    return encoder


def build(corpus, output, settings, index="Flat", skip_bad=False, block=2048):
    """Corpus file -> folder `output` with offsets.npy, index.faiss (or bm25.npz) and manifest.json.

    Everything is made in output.partial, which is renamed at the end. Called again after a kill with the same arguments
    it goes on: finished blocks of embeddings are kept, whatever else was in the making is begun again.
    """
    corpus, output = Path(corpus).absolute(), Path(output)
    work = output.with_name(output.name + ".partial")
    if output.exists():
        raise ValueError(f"{output} exists already: remove it, or build into another folder")
    source = {"corpus": str(corpus), "size": corpus.stat().st_size, "changed": corpus.stat().st_mtime_ns}
    job = source | {"index": index, "skip_bad": skip_bad} | settings
    if (work / "job.json").exists() and json.loads((work / "job.json").read_text()) != job:
        if (work / "done.json").exists():
            raise ValueError(
                f"{work} holds unfinished work on something else, or on a corpus that has changed since: remove it first"
            )
        shutil.rmtree(work)
    work.mkdir(parents=True, exist_ok=True)
    write_json(work / "job.json", job)
    if not (work / "manifest.json").exists():
        make_folder(work, corpus, settings, index, skip_bad, block)
    (work / "embeddings.npy").unlink(missing_ok=True)
    os.replace(work, output)


def make_folder(work, corpus, settings, index, skip_bad, block):
    """All that build makes, step by step; what a step of an earlier call has finished is not done again."""
    if corpus.suffix == ".gz":
        packed, corpus = corpus, work / "passages.jsonl"
        if not corpus.exists():
            unpack(packed, corpus)
    if not (work / "offsets.npy").exists():
        offsets, skipped = scan_passages(corpus, skip_bad)
        if skipped:
            print(f"{skipped} bad lines left out, {len(offsets)} passages kept")
        np.save(work / "offsets.part.npy", offsets)
        os.replace(work / "offsets.part.npy", work / "offsets.npy")
    passages = PassageFile(corpus, np.load(work / "offsets.npy"))
    place = corpus.name if corpus.parent == work else str(corpus)  # an unpacked corpus moves with the folder
    manifest = {"corpus": place, "n": len(passages), "checksum": checksum(corpus, passages.offsets), "index": index} | settings
    if settings["encoder"] == "bm25":
        BM25(passages).save(work / "bm25.npz")
    else:
        encoder = make_encoder(settings, passages, work / "words.json")
        n, dim = len(passages), encoder.dim
        factory, search, size = plan_index(index, n, dim)
        predicted = "size unknown" if size is None else f"about {size / 1e9:.3g} GB on disk and in memory"
        print(f"{n:,} passages x {dim}, encoded with {encoder.settings}")
        print(f"index {factory} {search or ''}: {predicted}; until it is made, embeddings of {4e-9 * n * dim:.3g} GB on disk")
        faiss.write_index(make_index(index, write_embeddings(work, passages, encoder, block)), str(work / "index.faiss"))
        manifest |= encoder.settings | {"dim": dim, "probe": encoder.encode_queries([PROBE])[0, :8].tolist()}
    write_json(work / "manifest.json", manifest)


def write_embeddings(work, passages, encoder, block):
    """Encode block by block into work/embeddings.npy; done.json says how many rows are safe. Returns the mapped file."""
    file, done_file, shape = work / "embeddings.npy", work / "done.json", (len(passages), encoder.dim)
    done = json.loads(done_file.read_text()) if done_file.exists() else 0
    vectors_NE = np.lib.format.open_memmap(file, "r+" if done else "w+", np.float32, shape)
    with tqdm(total=len(passages), initial=done, desc="encoding", unit=" passages") as bar:
        for start in range(done, len(passages), block):  # the same blocks as without the kill: the same batches and rounding
            end = min(start + block, len(passages))
            vectors_NE[start:end] = encoder.encode_passages([passages[row] for row in range(start, end)])
            vectors_NE.flush()
            write_json(done_file, end)
            bar.update(end - start)
    return vectors_NE


def load_engine(folder, bm25=False):
    """Folder made by build -> SearchEngine. ValueError, with the reason, where index, passages and encoder do not belong
    together. bm25: rank by words whatever the index (made at the first call, kept in the folder)."""
    folder = Path(folder)
    if not (folder / "manifest.json").exists():
        raise ValueError(f"{folder} holds no index (no manifest.json); python retrieval.py build makes one")
    manifest = json.loads((folder / "manifest.json").read_text())
    corpus, offsets = folder / manifest["corpus"], np.load(folder / "offsets.npy")
    if not corpus.exists():
        raise ValueError(f"{folder}: its passages {corpus} are gone: put them back, or build again")
    if checksum(corpus, offsets) != manifest["checksum"]:
        raise ValueError(f"{folder}: {corpus} is not the file that was indexed, rows would point to other passages: build again")
    passages = PassageFile(corpus, offsets)
    if bm25 or manifest["encoder"] == "bm25":
        if not (folder / "bm25.npz").exists():
            BM25(passages).save(folder / "bm25.npz")
        ranker = BM25.load(folder / "bm25.npz")
    else:
        encoder, index = make_encoder(manifest, passages, folder / "words.json"), faiss.read_index(str(folder / "index.faiss"))
        if (index.ntotal, index.d) != (len(passages), encoder.dim):
            raise ValueError(
                f"{folder}: index.faiss holds {index.ntotal} x {index.d}, passages and encoder say {len(passages)} x {encoder.dim}"
            )
        if not np.allclose(encoder.encode_queries([PROBE])[0, :8], manifest["probe"], atol=0.01):
            raise ValueError(f"{folder}: {manifest['encoder']} is not the encoder that made this index")
        ranker = Dense(encoder, index)
    return SearchEngine(passages, ranker)


# ----- 8. Over HTTP: the protocol of the official retrieval server -----

MAX_BODY, MAX_QUERIES, MAX_TOP_K = 2**24, 8192, 100  # the paper's batch asks 512 * 5 queries at once


class Refused(Exception):
    """A request that cannot be answered: HTTP status and one line."""


def parse_request(body):
    """Body of POST /retrieve (bytes) -> (queries, top_k or None, return_scores); Refused(400, why)."""
    try:
        request = json.loads(body)
    except (ValueError, RecursionError):
        raise Refused(400, "the body is not JSON") from None
    if not isinstance(request, dict):
        raise Refused(400, "the body is not a JSON object")
    queries = [request["query"]] if "query" in request else request.get("queries")  # one string: SkyRL's way
    if not isinstance(queries, list) or not all(isinstance(q, str) for q in queries):
        raise Refused(400, '"queries" must be a list of strings (or "query" a string)')
    if len(queries) > MAX_QUERIES:
        raise Refused(400, f"{len(queries)} queries; at most {MAX_QUERIES} at once")
    top_k, scores = request.get("topk"), request.get("return_scores", False)
    if top_k is not None and (type(top_k) is not int or not 0 <= top_k <= MAX_TOP_K):
        raise Refused(400, f'"topk" must be a whole number up to {MAX_TOP_K}, or null')
    if type(scores) is not bool:
        raise Refused(400, '"return_scores" must be true or false')
    return queries, top_k, scores


class Handler(BaseHTTPRequestHandler):
    protocol_version, timeout = "HTTP/1.1", 30  # a body that never arrives ends its thread after 30 s
    wbufsize = -1  # headers and body leave together

    def do_GET(self):
        if self.path == "/health":
            self.reply(200, {"status": "ok", "passages": len(self.server.engine.passages)})
        else:
            self.reply(404, {"error": "only GET /health and POST /retrieve are answered"})

    def do_POST(self):
        try:
            self.reply(200, {"result": self.retrieve()})
        except Refused as refused:
            status, why = refused.args
            self.close_connection = True  # the rest of the request may be unread
            self.reply(status, {"error": why})

    def retrieve(self):
        if self.path != "/retrieve":
            raise Refused(404, "only GET /health and POST /retrieve are answered")
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            raise Refused(411, "a Content-Length is needed")
        if int(length) > MAX_BODY:
            raise Refused(413, f"the body is over {MAX_BODY} bytes")
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            raise Refused(400, "the body is shorter than its Content-Length")
        queries, top_k, scores = parse_request(body)
        try:
            found = self.server.engine.search_scores(queries, top_k or self.server.top_k)  # 0 is absent, as officially
        except Exception as error:  # the engine's own trouble is 500 and one line, and the server lives on
            print(f"search failed: {error!r}", file=sys.stderr)
            raise Refused(500, f"search failed: {type(error).__name__}") from None
        document = lambda p: {"id": p.id, "contents": p.contents}
        return [[{"document": document(p), "score": s} if scores else document(p) for p, s in pairs] for pairs in found]

    def reply(self, status, value):
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):  # a line a request would be thousands a step
        pass


class Server(ThreadingHTTPServer):
    """One thread a connection; the engine's lock lets one search run at a time, which uses all cores by itself."""

    daemon_threads, request_queue_size = True, 128

    def __init__(self, engine, host="127.0.0.1", port=8000, top_k=3):
        super().__init__((host, port), Handler)
        self.engine, self.top_k = engine, top_k

    def handle_error(self, request, address):
        """A client that hung up is no news; anything else is said in one line."""
        error = sys.exc_info()[1]
        if not isinstance(error, (ConnectionError, TimeoutError)):
            print(f"request from {address[0]}: {error!r}", file=sys.stderr)


class HttpEngine:
    """The search() of any server that answers POST /retrieve as the official one does."""

    def __init__(self, url, timeout=30, attempts=6, wait=0.5):
        self.url, self.timeout, self.attempts, self.wait = url, timeout, attempts, wait

    def search(self, queries, top_k):
        """As SearchEngine.search. Refused connections, timeouts, 5xx and cut answers are tried again after 0.5, 1, 2, ... s;
        SearchFailed after the last attempt, or at once if the server says that the request is wrong."""
        return [[passage for passage, _ in found] for found in self.search_scores(queries, top_k)]

    def search_scores(self, queries, top_k):
        """The same as pairs (Passage, score), nan where the server gives none."""
        asked = [q for q in dict.fromkeys(queries) if q.strip()]
        found = self.ask(asked, top_k) if asked else {}
        return [list(found.get(q, [])) for q in queries]

    def ask(self, asked, top_k):
        """Different queries -> {query: what was found}, in as many attempts as it takes."""
        body = json.dumps({"queries": asked, "topk": top_k, "return_scores": True}).encode()
        request = urllib.request.Request(self.url, body, {"Content-Type": "application/json"})
        for attempt in range(self.attempts):
            if attempt:
                time.sleep(self.wait * 2 ** (attempt - 1))
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as response:
                    return dict(zip(asked, self.read(json.load(response), len(asked), top_k)))
            except urllib.error.HTTPError as error:
                trouble = f"HTTP {error.code} {error.read(300).decode(errors='replace').strip()}"
                if error.code < 500:
                    raise SearchFailed(f"{self.url} refuses the request: {trouble}") from None
            except (OSError, http.client.HTTPException, ValueError) as error:  # refused, timed out; cut off; no JSON
                trouble = f"{type(error).__name__} {error}"
        raise SearchFailed(f"{self.url} did not answer in {self.attempts} attempts: {trouble}")

    def read(self, answer, count, top_k):
        """The JSON of an answer -> lists of (Passage, score); SearchFailed if it is not one list for each query."""
        lists = answer.get("result") if isinstance(answer, dict) else None
        if not isinstance(lists, list) or len(lists) != count or not all(isinstance(found, list) for found in lists):
            raise SearchFailed(f'{self.url}: "result" is not a list of {count} lists: {str(answer)[:100]}')
        try:
            return [[self.scored(item) for item in found[:top_k]] for found in lists]
        except (KeyError, TypeError, ValueError, AttributeError):
            raise SearchFailed(f'{self.url}: a document without "contents": {str(lists)[:100]}') from None

    @staticmethod
    def scored(item):
        document = item.get("document", item)  # without scores the documents stand alone
        return Passage(str(document.get("id", "")), *split_contents(document["contents"])), float(item.get("score", "nan"))


def engine_from(where):
    """FILE of passages (indexed in memory), DIR of an index, bm25:FILE, bm25:DIR, http://host:port/retrieve -> an engine."""
    if where.startswith(("http://", "https://")):
        return HttpEngine(where)
    words_only, place = where.startswith("bm25:"), Path(where.removeprefix("bm25:"))
    if place.is_dir():
        return load_engine(place, bm25=words_only)
    passages = load_passages(place)
    return SearchEngine(passages, BM25(passages)) if words_only else build_index(passages)


# ----- python retrieval.py build | query | serve -----


def main(argv=None):
    parser = argparse.ArgumentParser(description="Build, ask and serve a search engine over passages (JSON lines: id, contents).")
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("build", help="make an index in a folder; goes on where it was interrupted")
    p.add_argument("passages", help="JSON lines, .gz allowed")
    p.add_argument("--output", required=True, metavar="DIR")
    p.add_argument("--encoder", default="hashed", help="hashed, bm25, or folder or hub id of an encoder (default: hashed)")
    p.add_argument("--index", default="Flat", help=f"{', '.join(INDEXES)}, or a FAISS factory string (default: Flat)")
    p.add_argument("--pooling", choices=("mean", "cls"), help="default: by the encoder's name")
    p.add_argument("--query-prefix", help="likewise")
    p.add_argument("--passage-prefix", help="likewise")
    p.add_argument("--skip-bad", action="store_true", help="leave out bad lines and count them")
    for name, help in (("query", "print the passages found for a question"), ("serve", "answer POST /retrieve")):
        p = commands.add_parser(name, help=help)
        p.add_argument(
            "where", help="DIR of an index, a file of passages, bm25: and either, or (query only) http://host:port/retrieve"
        )
        p.add_argument("--top-k", type=int, default=3)
        p.add_argument("--rerank", metavar="MODEL", help="cross-encoder, folder or hub id (with a DIR)")
        if name == "query":
            p.add_argument("question")
        else:
            p.add_argument("--host", default="127.0.0.1")
            p.add_argument("--port", type=int, default=8000)
    args = parser.parse_args(argv)
    if args.command == "build":
        settings = {"encoder": args.encoder}
        for name in ("pooling", "query_prefix", "passage_prefix"):
            if getattr(args, name) is not None:
                settings[name] = getattr(args, name)
        build(args.passages, args.output, settings, args.index, args.skip_bad)
        print(f'built {args.output}; try: python retrieval.py query {args.output} "a question"')
        return
    engine = engine_from(args.where)
    if isinstance(engine, HttpEngine) and (args.rerank or args.command == "serve"):
        raise ValueError(f"{args.where}: only a DIR, a file or bm25: of them can be served or reranked")
    if args.rerank:
        engine = SearchEngine(engine.passages, Reranker(engine.ranker, engine.passages, args.rerank))
    if args.command == "query":
        for passage, score in engine.search_scores([args.question], args.top_k)[0]:
            print(f"{score:8.3f}  {passage.title}  [{passage.id}]\n          {passage.text}\n")
        return
    server = Server(engine, args.host, args.port, args.top_k)
    print(f"{len(engine.passages):,} passages at http://{args.host}:{server.server_port}/retrieve", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OverflowError, OSError, SearchFailed) as error:  # OverflowError: a port that does not exist
        print(f"retrieval.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
