"""The search engine R of the paper: passages in, a query in, the nearest passages out.

Search-R1 treats the engine as part of the environment [Sec. 3.1, Eq. 1: y ~ pi(. | x; R)]. The policy never sees its
scores and no gradient flows through it, so any engine fits behind one call:

    search(queries: list[str], top_k: int) -> list[list[Passage]]        one list a query, best passage first

The tiny world's engine (build_index) is made in memory in a second; others serve the paper's 21 million passages.

    1. passages     PassageFile                          rows of a file, read from disk on demand
    2. encoders     HashedEncoder, TransformerEncoder    text -> unit vector
    3. rankers      Dense, BM25                          by vectors, by words (course/rerank.py has a third)
    4. R            SearchEngine                         passages and a ranker behind the one call
    5. on disk      build, load_engine                   python retrieval.py build PASSAGES.jsonl --output DIR
    6. over HTTP    Server, HttpEngine, engine_from      python retrieval.py serve DIR

A ranker is anything with rank(queries, k) -> (scores [S, k] fp32, rows [S, k] int64), best first, row -1 where nothing
was found. Shapes: N passages, S queries in flight, E embedding, K top-k, L tokens.
"""

import argparse
import contextlib
import functools
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
import zipfile
import zlib
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

# PITFALL: on a Mac torch and faiss bring an OpenMP library each, and a process with two of them crashes, unless that is
# allowed, torch is loaded first, and faiss keeps to one thread.
if sys.platform == "darwin":
    os.environ.setdefault("KMP_DUPLICATE_LIB_OK", "TRUE")
    import torch
import faiss
import numpy as np
from safetensors import SafetensorError
from tqdm import tqdm

if sys.platform == "darwin":
    faiss.omp_set_num_threads(1)
WORD = re.compile(r"\w+")
ENCODERS = {  # PITFALL: an encoder must be asked as it was trained. A wrong prefix or pooling costs recall silently.
    "e5": ("mean", "query: ", "passage: "),  # model card of intfloat/e5-base-v2, the paper's retriever
    "bge": ("cls", "Represent this sentence for searching relevant passages: ", ""),  # card of BAAI/bge-base-en-v1.5
    "mean": ("mean", "", ""),  # model card of sentence-transformers/all-MiniLM-L6-v2, and most others
}
PROBE = "which encoder is this"  # the manifest keeps its vector: another encoder under the same name is noticed
CARD_BYTES = 2 * 2**30  # a Flat index that takes no more than this in fp16 is searched on the GPU
ENCODER_BYTES = 300 * 2**20  # what an encoder of e5-base's size takes there while it works; an estimate
MAX_BODY, MAX_QUERIES, MAX_TOP_K = 2**24, 8192, 100  # what the server accepts; the paper's batch is 512 * 5 queries

class SearchFailed(Exception):
    """The search engine cannot be reached or answers nonsense. An empty result instead would be trained on."""

@dataclass(frozen=True)
class Passage:
    """A passage of the corpus. Its official `contents` is the title in double quotes, a newline and the text."""

    id: str
    title: str
    text: str

    @property
    def contents(self):
        return f'"{self.title}"\n{self.text}'

@contextlib.contextmanager
def undamaged(file):
    """Inside, an error from reading a damaged file of an index becomes a ValueError with the file's name."""
    try:
        yield file
    except (ValueError, LookupError, TypeError, EOFError, RuntimeError, zipfile.BadZipFile) as error:
        why = (str(error) or repr(error)).splitlines()[-1]
        raise ValueError(f"{file} cannot be read, remove it and build again: {why}") from None

@contextlib.contextmanager
def written_whole(path, mode="w"):
    """Open a file for writing that appears under `path` whole or not at all."""
    part = Path(f"{path}.unfinished")
    try:
        with open(part, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # PITFALL: without it a power cut can leave the new name on an empty file
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)

def numbered_lines(path):
    """Yields every line of a file that is not blank: (its number from 1, its byte offset, its bytes)."""
    position = 0
    with open(path, "rb") as file:
        for number, line in enumerate(tqdm(file, desc="reading", unit=" lines", delay=2), 1):
            if line.strip():
                yield number, position, line
            position += len(line)

# ----- 1. Passages -----

def whole_characters(text):
    """A str as json.loads may return it -> the same without lone surrogates. JSON can spell half of a character
    ("\\ud800"); no tokenizer takes it, and it cannot be printed. Each half becomes U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")

def split_contents(contents):
    """`"Title"\\ntext` -> (title, text). Only one pair of quotes is removed: a title may have quotes of its own."""
    title, _, text = map(str.strip, whole_characters(contents).partition("\n"))
    return (title[1:-1] if len(title) > 1 and title[0] == title[-1] == '"' else title), text

def parse_passage(line, where):
    """A line of a corpus (bytes) -> Passage. ValueError, beginning with `where`, if it is no passage."""
    with contextlib.suppress(ValueError, RecursionError, KeyError, TypeError, AttributeError):  # the line is no passage
        record = json.loads(line)
        title, text = split_contents(record["contents"])
        if text:
            return Passage(whole_characters(str(record["id"])), title, text)
    raise ValueError(f'{where}: a passage needs "id" and "contents" (a title, a newline, text), here is {line[:80]!r}')

class PassageFile(Sequence):
    """The passages of a corpus by row, read from disk on demand: 8 bytes of memory a passage, however long it is."""

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

def load_passages(path):
    """JSON lines `{"id": ..., "contents": "\\"Title\\"\\ntext"}`, or a .gz of them -> PassageFile.
    ValueError with file and line if a line is no passage or repeats an id."""
    path, offsets, seen = unpacked(Path(path)), array("q"), set()
    for number, position, line in numbered_lines(path):
        id = parse_passage(line, f"{path} line {number}").id
        if hash(id) in seen:  # IRCoT joins passages by id. 64 bits instead of the string: 21 million take 2 GB
            raise ValueError(f"{path} line {number}: id {id!r} appears a second time")
        seen.add(hash(id))
        offsets.append(position)
    if not offsets:
        raise ValueError(f"{path}: no passages in this file")
    return PassageFile(path, np.frombuffer(offsets, np.int64))

def unpacked(path):
    """x.jsonl.gz -> x.jsonl beside it, made unless it is up to date: a gzipped file cannot be read by row. Any other
    path is returned as it is. ValueError if it is not a whole gzip file."""
    plain = path.with_suffix("") if path.suffix == ".gz" else path
    if plain.exists() and plain.stat().st_mtime >= path.stat().st_mtime:
        return plain
    try:
        with gzip.open(path, "rb") as source, written_whole(plain, "wb") as target:
            if source.peek(512)[257:262] == b"ustar":  # PITFALL: the official wiki-18.jsonl.gz is said to be a tar
                archive = tarfile.open(fileobj=source, mode="r|")
                source = next((archive.extractfile(member) for member in archive if member.isfile()), source)
            shutil.copyfileobj(source, target, 2**20)
    except (gzip.BadGzipFile, EOFError, zlib.error, tarfile.ReadError) as error:
        raise ValueError(f"{path}: not a whole gzip file ({error})") from None
    return plain

# ----- 2. Encoders -----

def words(text):
    return WORD.findall(text.lower())

class HashedEncoder:
    """Text -> unit vector [512] fp32: the sum of its words' sign vectors, each weighted by sqrt(count * idf).
    A word's vector is the 512 bits of its BLAKE2b digest as +1 and -1 [random signs: Achlioptas 2003]. Two different
    words are nearly orthogonal (cosine about 1/sqrt(512) = 0.04), and a word has the same vector on every machine.
    PITFALL: with idf, not its root, a rare name outweighs all else: a passage that only mentions it can come first."""

    dim, device, settings = 512, "cpu", {"encoder": "hashed"}

    def __init__(self, passages=(), weight=None):
        """Count the words of the passages to weigh them, or take the {word: weight} of an earlier encoder."""
        counts = Counter(word for p in passages for word in set(words(self.text(p))))
        self.weight = weight or {word: math.sqrt(math.log(1 + len(passages) / n)) for word, n in counts.items()}
        self.vector = functools.lru_cache(2**17)(self.vector)  # of recent words; all of Wikipedia's would take 10 GB

    @staticmethod
    def text(passage):  # "Bako lives in Rimton" mentions both: only the title says that the passage is about Bako
        return f"{passage.title} {passage.text}"

    def vector(self, word):
        bits = np.unpackbits(np.frombuffer(hashlib.blake2b(word.encode(), digest_size=64).digest(), np.uint8))
        return self.weight[word] * (2.0 * bits.astype(np.float32) - 1.0)

    def encode_queries(self, texts):
        """list of S str -> [S, 512] fp32 of norm 1, or 0 where no passage has a word of the text."""
        out_SE = np.zeros((len(texts), self.dim), np.float32)
        for row, text in zip(out_SE, texts):
            for word, count in Counter(words(text)).items():
                if word in self.weight:
                    row += math.sqrt(count) * self.vector(word)
            row /= np.linalg.norm(row) or 1.0
        return out_SE

    def encode_passages(self, passages):
        return self.encode_queries([self.text(p) for p in passages])

class TransformerEncoder:
    """Text -> unit vector [E] fp32, with any encoder that transformers loads from a folder or the hub. Its prefixes and
    pooling are those of the key of ENCODERS that its name contains, else "mean". device: by default a GPU, if any."""

    def __init__(self, model, device=None):
        import torch  # here, so that the hashed engine starts without it
        from transformers import AutoModel, AutoTokenizer
        like = next((key for key in ENCODERS if key in Path(model).name.lower()), "mean")
        self.pooling, self.query_prefix, self.passage_prefix = ENCODERS[like]
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.float16 if self.device.startswith("cuda") else torch.float32
        try:
            self.model = AutoModel.from_pretrained(model, dtype=dtype).to(self.device).eval()
            self.tokenizer = AutoTokenizer.from_pretrained(model)
        except (OSError, ValueError, SafetensorError) as error:
            raise ValueError(f"no encoder could be loaded from {model}: {str(error).strip().splitlines()[0]}") from None
        self.dim = self.model.config.hidden_size
        self.settings = {"encoder": str(model), "like": like, "max_length": 256}

    def encode(self, texts, batch_size=64):
        """list of S str -> [S, E] fp32 of norm 1. Texts of similar length share a batch: less padding."""
        import torch
        out_SE = np.empty((len(texts), self.dim), np.float32)
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        options = dict(padding=True, truncation=True, max_length=self.settings["max_length"], return_tensors="pt")
        for start in range(0, len(texts), batch_size):
            rows = order[start : start + batch_size]
            batch = self.tokenizer([texts[i] for i in rows], **options).to(self.device)
            with torch.no_grad():
                hidden_SLE = self.model(**batch).last_hidden_state.float()
            mask_SL1 = batch["attention_mask"][:, :, None]
            pooled_SE = hidden_SLE[:, 0] if self.pooling == "cls" else (hidden_SLE * mask_SL1).sum(1) / mask_SL1.sum(1)
            out_SE[rows] = torch.nn.functional.normalize(pooled_SE, dim=-1).cpu().numpy()
        return out_SE

    def encode_queries(self, texts):
        return self.encode([self.query_prefix + text for text in texts])

    def encode_passages(self, passages):  # `contents`, title in quotes, as in the official indexes
        return self.encode([self.passage_prefix + p.contents for p in passages])

# ----- 3. Rankers -----

def plan_index(kind, n, dim):
    """Index for n vectors [dim] -> (FAISS factory string, search settings, predicted bytes in memory and on disk).
    kind: one of the five below, or any other factory string of FAISS, whose size is not predicted (None)."""
    cells = max(1, min(2 ** round(math.log2(4 * math.sqrt(n))), n // 39))  # FAISS wants 39 vectors a cell to train on
    probes = {"nprobe": max(min(8, cells), cells // 64)}  # IVF: a query searches a 64th of the cells, at least 8
    ids_and_centres = 8 * n + 4 * cells * dim
    plans = {
        "Flat": ("Flat", {}, 4 * n * dim),  # the query is compared with every vector: exact
        # A graph of near neighbours, 32 links a vector, 64 at the bottom [Malkov, Yashunin 2016]. Fast, largest.
        "HNSW": ("HNSW32", {"efConstruction": 80, "efSearch": 64}, n * (4 * dim + 4 * 64 + 16)),
        "IVF-SQ8": (f"IVF{cells},SQ8", probes, n * dim + ids_and_centres),  # a number in a byte
        "IVF-SQ4": (f"IVF{cells},SQ4", probes, n * (dim // 2) + ids_and_centres),  # half a byte
        # 4 numbers in a byte, which names an entry of a codebook [Jegou et al. 2011]. Smallest.
        "IVF-PQ": (f"IVF{cells},PQ{dim // 4}x8np", probes, n * (dim // 4) + 4 * 256 * dim + ids_and_centres),
    }
    return plans.get(kind, (kind, {}, None))

def make_index(kind, vectors_NE, block=65536):
    """FAISS index of inner products, which are cosines of unit vectors. vectors_NE may be a memory-mapped file."""
    n, dim = vectors_NE.shape
    factory, settings, _ = plan_index(kind, n, dim)
    try:
        index = faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
        for name, value in settings.items():
            faiss.ParameterSpace().set_index_parameter(index, name, value)
        if not index.is_trained:
            sample = np.random.default_rng(0).permutation(n)[: max(100_000, 40 * getattr(index, "nlist", 0))]
            index.train(np.ascontiguousarray(vectors_NE[np.sort(sample)], np.float32))
    except RuntimeError as error:
        raise ValueError(f"--index {kind} does not fit {n} vectors of {dim} numbers (see --help): {error}") from None
    for start in tqdm(range(0, n, block), desc="indexing", delay=2):
        index.add(np.ascontiguousarray(vectors_NE[start : start + block], np.float32))
    return index

class Dense:
    """A ranker by cosine: an encoder and a FAISS index."""

    def __init__(self, encoder, index):
        self.encoder, self.index = encoder, index

    def rank(self, queries, k):
        query_SE = self.encoder.encode_queries(queries)
        scores_SK, rows_SK = self.index.search(query_SE, k)
        rows_SK[~query_SE.any(1)] = -1  # PITFALL: a query without a known word is 0 and ties with every passage
        return scores_SK, rows_SK

class FlatOnCard:
    """A FAISS Flat index as one fp16 matrix on a GPU. A search is one product and one top-k there, where FAISS would
    read every vector with the CPU's cores while the GPU waits. Cosines differ from FAISS's by less than 0.001."""

    def __init__(self, index, device):
        import torch
        self.vectors_NE = torch.from_numpy(index.reconstruct_n(0, index.ntotal)).to(device, torch.float16)

    def search(self, query_SE, k):
        """Like the search of a FAISS index: fp32 [S, E] -> (scores [S, K] fp32, rows [S, K] int64), k <= N."""
        import torch
        from kernels import matmul_fp32
        pieces = torch.from_numpy(query_SE).to(self.vectors_NE).split(64)  # 4 N bytes of scores a query
        # PITFALL: scores in fp16 would tie, 0.0005 apart.
        found = [matmul_fp32(query_sE, self.vectors_NE.T).topk(k) for query_sE in pieces]
        return [torch.cat(parts).cpu().numpy() for parts in zip(*found)]

class BM25:
    """A ranker by shared words: rare words count more, and so do words of short passages [Robertson, Zaragoza 2009].

        score(q, p) = sum over words of q   idf(w) * tf / (tf + k1 (1 - b + b |p| / mean |p|))
        idf(w)      = ln(1 + (N - df + 0.5) / (df + 0.5))

    Lucene's formula and Pyserini's parameters (k1 0.9, b 0.4), as in the official BM25 server. Word w owns the
    slice [starts[w], starts[w+1]) of the arrays rows and weights. They take 12 GB for 21 million passages."""

    def __init__(self, passages, file=None, k1=0.9, b=0.4):
        """Count the words of the passages. `file` keeps the arrays: if it is there already, they are read from it."""
        self.n = len(passages)
        if file and file.exists():
            with undamaged(file), np.load(file) as saved:
                self.starts, self.rows, self.weights = saved["starts"], saved["rows"], saved["weights"]
                self.vocabulary = {word: i for i, word in enumerate(saved["vocabulary"].tobytes().decode().split("\n"))}
            return
        self.vocabulary, table = {}, array("i")  # of each word of a passage: its number, the row, its count
        for row, passage in enumerate(tqdm(passages, desc="counting words", delay=2)):
            for word, count in Counter(words(HashedEncoder.text(passage))).items():
                table.extend((self.vocabulary.setdefault(word, len(self.vocabulary)), row, count))
        word_ids, rows, counts = np.frombuffer(table, np.int32).reshape(-1, 3).T
        order = np.argsort(word_ids, kind="stable")
        df = np.bincount(word_ids, minlength=len(self.vocabulary))
        idf = np.log(1 + (self.n - df + 0.5) / (df + 0.5))
        self.starts = np.concatenate([[0], np.cumsum(df)])
        self.rows, tf = rows[order], counts[order].astype(np.float32)
        lengths = np.bincount(rows, counts, self.n).astype(np.float32)
        norm = k1 * (1 - b + b * lengths / lengths.mean())
        self.weights = (idf[word_ids[order]] * tf / (tf + norm[self.rows])).astype(np.float32)
        if file:
            vocabulary = np.frombuffer("\n".join(self.vocabulary).encode(), np.uint8)
            with written_whole(file, "wb") as out:
                np.savez(out, vocabulary=vocabulary, starts=self.starts, rows=self.rows, weights=self.weights)

    def rank(self, queries, k):
        """S str -> (scores, rows), [S, k], as every ranker; of equal scores the first rows."""
        scores_SK, rows_SK = np.zeros((len(queries), k), np.float32), np.full((len(queries), k), -1)
        for i, query in enumerate(queries):
            score_N = np.zeros(self.n, np.float32)
            for word, count in Counter(words(query)).items():
                if word in self.vocabulary:
                    w = self.vocabulary[word]
                    here = slice(self.starts[w], self.starts[w + 1])
                    score_N[self.rows[here]] += count * self.weights[here]
            # PITFALL: of rows that tie at place k, argpartition takes any, others on another CPU; we take the first.
            least = np.partition(score_N, -min(k, self.n))[-min(k, self.n)]
            best = np.flatnonzero((score_N >= least) & (score_N > 0))
            best = best[np.argsort(-score_N[best], kind="stable")][:k]
            scores_SK[i, : len(best)], rows_SK[i, : len(best)] = score_N[best], best
        return scores_SK, rows_SK

# ----- 4. The engine -----

class SearchEngine:
    """R: passages behind a ranker. It keeps what it found for recent queries: the rollouts of a group ask the same."""

    bytes_on_card = 0

    def __init__(self, passages, ranker, cache_size=65536):
        self.passages, self.ranker, self.cache_size = passages, ranker, cache_size
        self.cache, self.lock = {}, threading.Lock()

    def search(self, queries, top_k):
        """S str -> S lists of at most top_k Passages, best first, [] without a known word. ValueError if top_k < 1."""
        return [[passage for passage, _ in found] for found in self.search_scores(queries, top_k)]

    def search_scores(self, queries, top_k):
        """The same as pairs (Passage, score)."""
        if top_k < 1:
            raise ValueError(f"top_k={top_k}: must be at least 1")
        k = min(top_k, len(self.passages))
        with self.lock:
            if new := [q for q in dict.fromkeys(queries) if (q, k) not in self.cache and q.strip()]:
                for q, scores_K, rows_K in zip(new, *self.ranker.rank(new, k)):
                    # PITFALL: FAISS gives row -1 where it finds fewer than k, and passages[-1] is the last of a list.
                    self.cache[q, k] = [(int(row), float(score)) for row, score in zip(rows_K, scores_K) if row >= 0]
            found = [self.cache.get((q, k), []) for q in queries]
            if len(self.cache) > self.cache_size:
                self.cache.clear()
        return [[(self.passages[row], score) for row, score in pairs] for pairs in found]

def build_index(passages, kind="Flat"):
    """list of Passages -> SearchEngine over hashed word vectors in an index in memory."""
    encoder = HashedEncoder(passages)
    return SearchEngine(passages, Dense(encoder, make_index(kind, encoder.encode_passages(passages))))

# ----- 5. On disk -----

def checksum(passages):
    """A PassageFile -> hex digest of the file's size, the offsets and 1000 whole passages. Reading all 14 GB at every
    start would be too slow. Only an edit that moves no offset and misses the 1000 goes unnoticed."""
    size = os.path.getsize(passages.file.name)
    digest = hashlib.blake2b(passages.offsets.tobytes() + str(size).encode(), digest_size=16)
    for row in np.linspace(0, len(passages) - 1, min(1000, len(passages))).astype(int):
        passages.file.seek(passages.offsets[row])
        digest.update(passages.file.readline())
    return digest.hexdigest()

def make_encoder(name, passages, weight_file, device=None):
    """The encoder of a manifest. The hashed one reads its word weights from weight_file, or makes that file."""
    if name != "hashed":
        return TransformerEncoder(name, device)
    if not weight_file.exists():
        with written_whole(weight_file) as file:
            json.dump(HashedEncoder(tqdm(passages, desc="counting words", delay=2)).weight, file)
    return HashedEncoder(weight=json.loads(weight_file.read_text()))

def embed(encoder, passages, file, block):
    """Passages -> [N, E] fp32, mapped from a file that grows block by block. The whole blocks of an earlier run stay:
    every vector comes from the same batch, with the same rounding, as without a kill."""
    n, block_bytes = len(passages), 4 * block * encoder.dim
    with open(file, "ab") as out:
        done = out.tell() // block_bytes
        out.truncate(done * block_bytes)
        for start in tqdm(range(done * block, n, block), desc="encoding", unit=" passages", unit_scale=block):
            out.write(encoder.encode_passages([passages[row] for row in range(start, min(start + block, n))]))
            out.flush()
    return np.memmap(file, np.float32, "r", shape=(n, encoder.dim))

def build(corpus, output, settings, index="Flat", block=2048):
    """Corpus file, {"encoder": hashed, bm25, folder or hub id} -> folder `output` with manifest.json, offsets.npy and
    index.faiss (or bm25.npz). It is made as output.KEY.partial, where KEY stands for corpus and encoder, and renamed at
    the end: after a kill the same call goes on, with another kind of index, too. ValueError if output exists."""
    output = Path(output)
    if output.exists():
        raise ValueError(f"{output} exists already: remove it, or build into another folder")
    passages = load_passages(Path(corpus).absolute())
    corpus, n = passages.file.name, len(passages)
    manifest = {"corpus": corpus, "n": n, "checksum": checksum(passages)} | settings
    key = hashlib.sha256(repr((manifest, os.stat(corpus).st_mtime_ns)).encode()).hexdigest()[:10]
    work = output.with_name(f"{output.name}.{key}.partial")
    work.mkdir(parents=True, exist_ok=True)
    np.save(work / "offsets.npy", passages.offsets)
    if settings["encoder"] == "bm25":
        BM25(passages, work / "bm25.npz")
    else:
        encoder = make_encoder(settings["encoder"], passages, work / "words.json")
        factory, search, size = plan_index(index, n, encoder.dim)
        predicted = "size unknown" if size is None else f"about {size / 1e9:.3g} GB on disk and in memory"
        print(f"{n:,} passages x {encoder.dim}, encoded with {encoder.settings}")
        print(f"index {factory} {search or ''}: {predicted}; until then, {4e-9 * n * encoder.dim:.3g} GB of embeddings")
        made = make_index(index, embed(encoder, passages, work / "embeddings", block))
        faiss.write_index(made, str(work / "index.faiss"))
        (work / "embeddings").unlink()
        manifest |= encoder.settings | {"dim": encoder.dim, "probe": encoder.encode_queries([PROBE])[0, :8].tolist()}
    (work / "manifest.json").write_text(json.dumps(manifest | {"index": index}))
    os.replace(work, output)

def load_engine(folder, bm25=False, device=None):
    """Folder made by build -> SearchEngine. bm25: rank by words, whatever the index is (the first call makes bm25.npz).
    device: of an encoder and, if that is a GPU, of a small Flat index; by default a GPU, if there is one.
    ValueError with the reason if index, passages and encoder do not belong together."""
    folder = Path(folder)
    with undamaged(folder / "manifest.json") as file:
        manifest = json.loads(file.read_text())
        corpus, digest, name, kind = (manifest[key] for key in ("corpus", "checksum", "encoder", "index"))
    with undamaged(folder / "offsets.npy") as file:
        passages = PassageFile(folder / corpus, np.load(file))
    if checksum(passages) != digest:
        raise ValueError(f"{folder}: {passages.file.name} is not the file that was indexed: build again")
    if bm25 or name == "bm25":
        return SearchEngine(passages, BM25(passages, folder / "bm25.npz"))
    encoder = make_encoder(name, passages, folder / "words.json", device)
    with undamaged(folder / "index.faiss") as file:
        index = faiss.read_index(str(file))
    if (index.ntotal, index.d) != (len(passages), encoder.dim):
        raise ValueError(f"{folder}: index.faiss holds {index.ntotal} x {index.d}, not {len(passages)} x {encoder.dim}")
    if not np.allclose(encoder.encode_queries([PROBE])[0, :8], manifest.get("probe", 0), atol=0.01):
        raise ValueError(f"{folder}: {name} is not the encoder that made this index")
    engine, size = SearchEngine(passages, Dense(encoder, index)), 2 * len(passages) * encoder.dim
    if encoder.device.startswith("cuda"):
        engine.bytes_on_card = ENCODER_BYTES
        if kind == "Flat" and size <= CARD_BYTES:
            engine.ranker.index = FlatOnCard(index, encoder.device)
            engine.bytes_on_card += size
    return engine

# ----- 6. Over HTTP: the protocol of the official retrieval server -----

class Handler(BaseHTTPRequestHandler):
    timeout = 30  # seconds that a thread waits for a body that never arrives
    wbufsize = -1  # headers and body leave together
    log_message = lambda *_: None  # one line a request would be thousands a step

    def do_POST(self):
        """{"queries": [str], "topk": int, "return_scores": bool} -> {"result": one list a query}, or {"error": why}."""
        length = self.headers.get("Content-Length", "")[:9]  # int() refuses long numbers; nine digits exceed MAX_BODY
        if self.path != "/retrieve":
            return self.reply(404, error="only POST /retrieve is answered")
        if not length.isdecimal() or int(length) > MAX_BODY:
            return self.reply(413, error=f"a Content-Length of at most {MAX_BODY} is needed")
        try:
            request = json.loads(self.rfile.read(int(length)))  # a body that is cut short is no JSON, either
            queries, top_k = request.get("queries", [request.get("query")]), request.get("topk") or self.server.top_k
            strings = type(queries) is list and len(queries) <= MAX_QUERIES and all(isinstance(q, str) for q in queries)
            if not (strings and type(top_k) is int and 1 <= top_k <= MAX_TOP_K):  # a bool is an int, too
                raise ValueError
        except (ValueError, RecursionError, AttributeError):  # no JSON; JSON, but no object; or something else in it
            needs = f'{{"queries": up to {MAX_QUERIES} strings, "topk": a whole number up to {MAX_TOP_K}}}'
            return self.reply(400, error=f"the body must be JSON: {needs}")
        try:
            found = self.server.engine.search_scores(queries, top_k)
        except Exception as error:  # whatever breaks in the engine becomes a 500, and the server lives on
            print(f"search failed: {error!r}", file=sys.stderr)
            return self.reply(500, error=f"search failed: {type(error).__name__}")
        result = [[{"document": {"id": p.id, "contents": p.contents}, "score": s} for p, s in pairs] for pairs in found]
        if not request.get("return_scores"):
            result = [[item["document"] for item in items] for items in result]
        self.reply(200, result=result)

    def reply(self, status, **answer):
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

class Server(ThreadingHTTPServer):
    """One thread a connection. The engine's lock lets one search run at a time, which uses all cores by itself."""

    request_queue_size = 128
    allow_reuse_address = os.name != "nt"  # on Windows a second server would share the port

    def __init__(self, engine, host="127.0.0.1", port=8000, top_k=3):
        super().__init__((host, port), Handler)
        self.engine, self.top_k = engine, top_k

    def handle_error(self, request, address):
        print(f"request from {address[0]}: {sys.exc_info()[1]!r}", file=sys.stderr)  # one line, no traceback

class HttpEngine(SearchEngine):
    """R at an address: any server that answers POST /retrieve as the official one does. Of several addresses, joined by
    commas, the next is asked when one fails. Inherited: search(), bytes_on_card. patience, timeout, wait: seconds."""

    def __init__(self, urls, patience=300, timeout=30, wait=0.5):
        self.urls, self.patience, self.timeout, self.wait = urls.split(","), patience, timeout, wait

    def search_scores(self, queries, top_k):
        """Pairs (Passage, score), nan where the server gives no score. Refused connections, timeouts, 5xx and cut
        answers are retried after 0.5, 1, 2, ... s. SearchFailed when patience is at its end, or at once for a 4xx."""
        if top_k < 1:
            raise ValueError(f"top_k={top_k}: must be at least 1")
        asked = [q for q in dict.fromkeys(queries) if q.strip()]
        if not asked:
            return [[] for _ in queries]
        body = json.dumps({"queries": asked, "topk": top_k, "return_scores": True}).encode()
        end, pause = time.monotonic() + self.patience, self.wait
        while True:
            url = self.urls[0]
            try:
                request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
                with urllib.request.urlopen(request, timeout=self.timeout) as response:
                    answer = json.load(response)
                break
            except urllib.error.HTTPError as error:
                trouble = f"HTTP {error.code}"
                with contextlib.suppress(OSError, http.client.HTTPException):  # its reason may never arrive
                    trouble += " " + error.read(300).decode(errors="replace").strip()
                if error.code < 500:
                    raise SearchFailed(f"{url} refuses the request: {trouble}") from None
            except (OSError, http.client.HTTPException, ValueError, RecursionError) as error:  # the last two: no JSON
                trouble = f"{type(error).__name__} {error}"
            if time.monotonic() + pause > end:
                raise SearchFailed(f"{url} did not answer for {self.patience} seconds: {trouble}")
            tqdm.write(f"waiting {pause:.3g} s for the search engine; {url}: {trouble[:100]}")
            time.sleep(pause)
            self.urls, pause = self.urls[1:] + [url], min(2 * pause, 30)
        try:
            found = {}
            for q, items in zip(asked, answer["result"], strict=True):
                documents = [item.get("document", item) for item in items[:top_k]]  # without scores they stand alone
                ids = [whole_characters(str(d.get("id", d["contents"]))) for d in documents]  # some servers give none
                passages = [Passage(id, *split_contents(d["contents"])) for id, d in zip(ids, documents)]
                found[q] = list(zip(passages, [float(item.get("score", "nan")) for item in items]))
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
            raise SearchFailed(f"{url}: not a list of {len(asked)} lists: {str(answer)[:100]}") from None
        return [list(found.get(q, [])) for q in queries]

def engine_from(where, device=None):
    """FILE of passages (indexed in memory), DIR of an index, bm25:FILE, bm25:DIR, or the URL of a server -> engine."""
    if where.startswith(("http://", "https://")):
        return HttpEngine(where)
    by_words, place = where.startswith("bm25:"), Path(where.removeprefix("bm25:"))
    if place.is_dir():
        return load_engine(place, by_words, device)
    passages = load_passages(place)
    return SearchEngine(passages, BM25(passages)) if by_words else build_index(passages)

def main(argv=None):
    parser = argparse.ArgumentParser(description="Build, ask and serve a search engine over passages.")
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("build", help="make an index in a folder; run again, it continues where it was interrupted")
    p.add_argument("passages", help="JSON lines with id and contents, .gz allowed")
    p.add_argument("--output", required=True, metavar="DIR")
    p.add_argument("--encoder", default="hashed", help="hashed (default), bm25, or folder or hub id of an encoder")
    p.add_argument("--index", default="Flat", help="Flat, HNSW, IVF-SQ8, IVF-SQ4, IVF-PQ, or a FAISS factory string")
    query = commands.add_parser("query", help="print the passages found for a question")
    serve = commands.add_parser("serve", help="answer POST /retrieve")
    for p in (query, serve):
        p.add_argument("where", help="DIR of an index, FILE of passages, bm25: and either, or the URL of a server")
        p.add_argument("--top-k", type=int, default=3)
    query.add_argument("question")
    serve.add_argument("--host", default="127.0.0.1")
    serve.add_argument("--port", type=int, default=8000)
    args = parser.parse_args(argv)
    if args.command == "build":
        build(args.passages, args.output, {"encoder": args.encoder}, args.index)
        print(f'built {args.output}; try: python retrieval.py query {args.output} "a question"')
    elif args.command == "query":
        for passage, score in engine_from(args.where).search_scores([args.question], args.top_k)[0]:
            line = f"{score:8.3f}  {passage.title}  [{passage.id}]\n          {passage.text}\n"
            print("".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in line))  # no escapes for a terminal
    elif not 1 <= args.top_k <= MAX_TOP_K:
        raise ValueError(f"--top-k {args.top_k}: must be from 1 to {MAX_TOP_K}")
    else:
        server = Server(engine_from(args.where), args.host, args.port, args.top_k)
        to = "this machine alone" if args.host in ("127.0.0.1", "localhost") else "every machine that can reach it"
        print(f"{args.where} answers {to} at http://{args.host}:{server.server_port}/retrieve", flush=True)
        server.serve_forever()

if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a pipe may be unable to encode every character of a passage
    try:
        main()
    except (ValueError, OverflowError, OSError, SearchFailed) as error:  # OverflowError: a port that does not exist
        print(f"retrieval.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
