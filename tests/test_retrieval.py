"""Claims about retrieval.py."""

import json
import os
import subprocess
import sys

import faiss
import numpy as np
import pytest

from retrieval import HashedEncoder, Passage, SearchEngine, build_index, load_passages


class Fixed:
    """An encoder with given query vectors: text "3" is row 3."""

    def __init__(self, vectors):
        self.vectors, self.dim = vectors, vectors.shape[1]

    def encode(self, texts):
        return self.vectors[[int(t) for t in texts]]


def test_the_flat_index_is_brute_force():
    """Claim: ids and order are those of a full sort of all inner products in float64, on random unit vectors.
    Fails if: rows_K is read in reverse, or encoded queries and their rows fall out of step.
    """
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((500, 64)).astype(np.float32)
    queries = rng.standard_normal((40, 64)).astype(np.float32)
    index = faiss.index_factory(64, "Flat", faiss.METRIC_INNER_PRODUCT)
    index.add(vectors)
    engine = SearchEngine([Passage(str(i), "", "x") for i in range(500)], Fixed(queries), index)
    got = [[int(p.id) for p in found] for found in engine.search([str(i) for i in range(40)], 7)]
    want = np.argsort(-(queries.astype(np.float64) @ vectors.T.astype(np.float64)), axis=1)[:, :7]
    assert got == want.tolist()


def test_the_tiny_worlds_engine_is_brute_force_and_ignores_the_order_of_passages(world, engine):
    """Claim: on the tiny world, too; and shuffled passages give the same answers.
    Fails if: build_index encodes only the text and not the title, or the index is METRIC_L2 on vectors without norm 1.
    """
    queries = [q.question for q in world.test[:200]]
    vectors = engine.encoder.encode([f"{p.title} {p.text}" for p in world.passages]).astype(np.float64)
    scores = engine.encoder.encode(queries).astype(np.float64) @ vectors.T
    shuffled = build_index(world.passages[::-1])
    for found, mirrored, row in zip(engine.search(queries, 3), shuffled.search(queries, 3), scores):
        best = np.sort(row)[::-1][:3]
        for passages in (found, mirrored):
            np.testing.assert_allclose([row[world.passages.index(p)] for p in passages], best, atol=1e-6)


def test_a_word_has_the_same_vector_in_every_process():
    """Claim: vectors depend on the text alone, not on PYTHONHASHSEED; they have norm 1.
    Fails if: blake2b is replaced by the built-in hash().
    """
    code = "from retrieval import HashedEncoder as H; e = H(['kinake lives in rimton', 'rimton']); print(e.encode(['kinake rimton'])[0, :8].tolist())"
    here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=here,
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in "12"
    }
    assert len(outputs) == 1
    vector = HashedEncoder(["kinake lives in rimton", "rimton"]).encode(["kinake rimton"])[0]
    assert json.loads(outputs.pop()) == vector[:8].tolist() and abs(np.linalg.norm(vector) - 1) < 1e-6


def test_nothing_is_returned_that_was_not_found():
    """Claim: k above N gives N passages; a query without a known word gives none; order and length of the list are kept.
    Fails if: the `row >= 0` filter goes (passages[-1] would come back), or the `query_E.any()` test goes.
    """
    engine = build_index([Passage("a", "Ada", "born in London"), Passage("b", "London", "on the Thames")])
    found = engine.search(["", "zzz", "thames", "ada", "thames"], 5)
    assert [len(f) for f in found] == [0, 0, 2, 2, 2]
    assert [f[0].id for f in found[2:]] == ["b", "a", "b"] and engine.search([], 3) == []
    short = SearchEngine(engine.passages, engine.encoder, faiss.index_factory(512, "HNSW4", faiss.METRIC_INNER_PRODUCT))
    assert short.search(["ada"], 2) == [[]]  # an empty index answers -1 only
    with pytest.raises(ValueError, match="top_k=0"):
        engine.search(["ada"], 0)


def test_passages_are_read_as_the_official_corpus_has_them(tmp_path):
    """Claim: id, title without its pair of quotes (and with any of its own), text after the first newline.
    Fails if: every quote is stripped from the title, or the text is split at each newline.
    """
    file = tmp_path / "passages.jsonl"
    records = [
        {"id": 7, "contents": '"Ada"\nline one\nline two'},
        {"id": "x", "contents": '""Weird Al" Yankovic"\ntext'},
        {"id": "y", "contents": "bare\ntext"},
    ]
    file.write_text("".join(json.dumps(r) + "\n" for r in records) + "\n")
    assert load_passages(file) == [
        Passage("7", "Ada", "line one\nline two"),
        Passage("x", '"Weird Al" Yankovic', "text"),
        Passage("y", "bare", "text"),
    ]


@pytest.mark.parametrize(
    "line, message",
    [
        (b"{broken", "not a JSON object"),
        (b"\xff\xfe{}", "not a JSON object"),
        (b"[1]", "needs"),
        (b'["id"]', "needs"),
        (b'{"contents": "T\\ntext"}', "needs"),
        (b'{"id": "1"}', "needs"),
        (b'{"id": "1", "contents": 5}', "needs"),
        (b'{"id": "1", "contents": "\\"T\\""}', "no text"),
        (b'{"id": "0", "contents": "T\\ntext"}', "second time"),
    ],
)
def test_a_bad_passage_is_named_by_file_and_line(tmp_path, line, message):
    """Claim: malformed JSON, broken UTF-8, missing keys, no text, a repeated id: one line with file and line number.
    Fails if: any of the checks in load_passages is removed.
    """
    file = tmp_path / "passages.jsonl"
    file.write_bytes(b'{"id": "0", "contents": "\\"T\\"\\ntext"}\n' + line + b"\n")
    with pytest.raises(ValueError, match=message) as error:
        load_passages(file)
    assert f"{file} line 2" in str(error.value) and "\n" not in str(error.value)
    file.write_bytes(b"\n")
    with pytest.raises(ValueError, match="no passages"):
        load_passages(file)
