"""What the search engine finds, how fast, and in how much memory.

    python tests/bench_retrieval.py index [--n 1000000] [--dim 384]        kinds of FAISS index side by side
    python tests/bench_retrieval.py recall QUESTIONS PASSAGES [--encoder DIR] [--cross-encoder DIR]
    python tests/bench_retrieval.py server [--requests 10000] [--clients 64]

index: synthetic unit vectors. Uniform ones would all be equally far from each other, and no index could do better than
to read them all. Embeddings come in clusters and use few directions, so the vectors are drawn from a mixture: 2000
centres (cluster i has a share proportional to 1/(i+10)), noise of 0.7 of the centres' spread around them, direction j
scaled by (j+1)^-1/2. Queries are new draws from the same mixture. Recall@3 is against the exact neighbours.

recall: the share of a question's supporting titles (metadata.supporting_facts, as the FlashRAG collection has them for
HotpotQA) among the first 3 and 10 passages, and the time per query with all queries in one batch. If bm25s is
installed, the scores of our BM25 are compared with those of bm25s.

server: `retrieval.py serve` in a process of its own, and beside it, where fastapi and uvicorn are installed, an app as
the official server is one, on the same index. Many clients ask at once; every tenth request is hostile: malformed, cut
off, slow, huge. Each good answer is compared with the direct call. Then memory and threads of the server. There are 500
questions, so after a while most answers come from the engine's cache.
"""

import argparse
import http.client
import importlib.util
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import faiss
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import retrieval
from course.rerank import Reranker
from retrieval import BM25, Dense, HashedEncoder, HttpEngine, SearchEngine, TransformerEncoder


def held(pid):
    """Resident memory in MB and threads of a process (Linux)."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(status["VmRSS"].split()[0]) / 1024, int(status["Threads"])


# ----- Kinds of index -----


def mixture(n, dim, rng, centres):
    """-> [n, dim] fp32: unit vectors of the mixture described above."""
    share = 1 / (np.arange(len(centres)) + 10)
    scale = ((np.arange(dim) + 1) ** -0.5).astype(np.float32)
    out = np.empty((n, dim), np.float32)
    for start in range(0, n, 100_000):
        part = out[start : start + 100_000]
        rng.standard_normal(dtype=np.float32, out=part)
        part *= 0.7
        part += centres[rng.choice(len(centres), size=len(part), p=share / share.sum())]
        part *= scale
        part /= np.linalg.norm(part, axis=1, keepdims=True)
    return out


def index_table(n, dim, kinds, queries=640, batch=64):
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((2000, dim)).astype(np.float32)
    vectors, asked = mixture(n, dim, rng, centres), mixture(queries, dim, rng, centres)
    where = f"{faiss.omp_get_max_threads()} threads, faiss {faiss.__version__}"
    print(f"{n:,} x {dim}, mixture of 2000; {where}, batch of {batch}")
    print("| index | factory | build s | file MB | predicted MB | memory MB | ms a batch | recall@3 |")
    print("|---|---|---|---|---|---|---|---|")
    exact = None
    for kind in kinds:
        factory, settings, size = retrieval.plan_index(kind, n, dim)
        before, start = held("self")[0], time.perf_counter()
        index = retrieval.make_index(kind, vectors)
        built, memory = time.perf_counter() - start, (held("self")[0] - before) * 2**20
        rows, times = [], []
        for i in range(0, queries, batch):
            start = time.perf_counter()
            rows.append(index.search(asked[i : i + batch], 3)[1])
            times.append(time.perf_counter() - start)
        rows = np.concatenate(rows)
        exact = rows if kind == "Flat" else exact
        recall = "" if exact is None else f"{np.mean([len(set(a) & set(b)) / 3 for a, b in zip(rows, exact)]):.3f}"
        with tempfile.NamedTemporaryFile() as file:
            faiss.write_index(index, file.name)
            written = os.path.getsize(file.name)
        name = factory + "".join(f", {k} {v}" for k, v in settings.items())
        sizes = f"{written / 1e6:.0f} | {size / 1e6:.0f} | {memory / 1e6:.0f}"
        milliseconds = 1000 * statistics.median(times)
        print(f"| {kind} | {name} | {built:.0f} | {sizes} | {milliseconds:.1f} | {recall} |", flush=True)
        del index
    for kind in kinds:
        factory, _, size = retrieval.plan_index(kind, 21_015_324, 768)
        print(f"wiki-18 as the paper has it, 21,015,324 x 768, {kind}: {factory}, {size / 1e9:.1f} GB")


# ----- Recall on real questions -----


def recall_table(questions, passages, encoder, cross_encoder):
    records = [json.loads(line) for line in open(questions)]
    questions = [r["question"] for r in records]
    titles = [set(r["metadata"]["supporting_facts"]["title"]) for r in records]
    passages = list(retrieval.load_passages(passages))
    hashed, bm25 = HashedEncoder(passages), BM25(passages)
    flat = Dense(hashed, retrieval.make_index("Flat", hashed.encode_passages(passages)))
    rankers = {"hashed words, Flat": flat, "BM25": bm25}
    if encoder:
        dense = TransformerEncoder(encoder)
        vectors = dense.encode_passages(passages)
        for kind in ("Flat", "SQ8", "SQ4"):  # what it costs to round real embeddings to one byte or half a byte
            rankers[f"{Path(encoder).name}, {kind}"] = Dense(dense, retrieval.make_index(kind, vectors))
        rankers[f"BM25, best 50 reordered by {Path(encoder).name}"] = Reordered(bm25, dense, vectors)
    if cross_encoder:
        rankers[f"BM25, best 10 reranked by {Path(cross_encoder).name}"] = Reranker(bm25, passages, cross_encoder)
    print(f"{len(questions)} questions, {len(passages)} passages")
    print("| engine | recall@3 | recall@10 | ms a query |\n|---|---|---|---|")
    for name, ranker in rankers.items():
        start = time.perf_counter()
        found = SearchEngine(passages, ranker).search(questions, 10)
        spent = time.perf_counter() - start
        hits = lambda want, got: len(want & {p.title for p in got}) / len(want)
        at = lambda k: np.mean([hits(want, got[:k]) for want, got in zip(titles, found)])
        print(f"| {name} | {at(3):.3f} | {at(10):.3f} | {1000 * spent / len(questions):.2f} |", flush=True)
    compare_bm25(bm25, passages, questions)


class Reordered:
    """A ranker: BM25's best 50 in the order of an encoder's cosine. Two vectors in place of a cross-encoder."""

    def __init__(self, ranker, encoder, vectors):
        self.ranker, self.encoder, self.vectors = ranker, encoder, vectors

    def rank(self, queries, k):
        rows = self.ranker.rank(queries, 50)[1]
        scores = np.einsum("sce,se->sc", self.vectors[rows], self.encoder.encode_queries(queries))
        scores[rows < 0] = -np.inf
        order = np.argsort(-scores, axis=1)[:, :k]
        return np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)


def compare_bm25(bm25, passages, questions):
    if not importlib.util.find_spec("bm25s"):
        print("bm25s is not installed: scores not compared")
        return
    import bm25s

    theirs = bm25s.BM25(method="lucene", k1=0.9, b=0.4)
    theirs.index([retrieval.words(HashedEncoder.text(p)) for p in passages], show_progress=False)
    worst = 0.0
    for question in questions:
        scores, rows = bm25.rank([question], len(passages))
        ours = np.zeros(len(passages))
        ours[rows[0][rows[0] >= 0]] = scores[0][rows[0] >= 0]
        known = [w for w in retrieval.words(question) if w in bm25.vocabulary]
        worst = max(worst, np.abs(theirs.get_scores(known) - ours).max())
    setting = f"bm25s {bm25s.__version__} (lucene, k1 0.9, b 0.4)"
    print(f"largest difference to {setting} over all questions and passages: {worst:.1e}")


# ----- The server under load -----


def server_load(requests, clients):
    rng, names = random.Random(0), [f"name{i}" for i in range(2000)]
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "passages.jsonl"
        records = ({"id": str(i), "contents": f'"T{i}"\n{" ".join(rng.choices(names, k=40))}'} for i in range(5000))
        corpus.write_text("".join(json.dumps(record) + "\n" for record in records))
        direct = retrieval.build_index(retrieval.load_passages(corpus))
        asked = []  # every question with its answer, found before the clock runs
        for _ in range(500):
            queries = [" ".join(rng.choices(names, k=3)) for _ in range(rng.randrange(1, 9))]
            asked.append((queries, k := rng.randrange(1, 6), direct.search(queries, k)))
        cells = "server | good | wrong | p50 ms | p99 ms | good/s | what hostile ones got | MB before, after | threads"
        print(f"| {cells} |")
        print("|---|---|---|---|---|---|---|---|---|")
        ours = [sys.executable, "retrieval.py", "serve", str(corpus), "--port", "0"]
        peer = [sys.executable, "tests/bench_retrieval.py", "peer", str(corpus)]
        for title, command in (("ours", ours), ("FastAPI and uvicorn", peer)):
            if title != "ours" and not (importlib.util.find_spec("fastapi") and importlib.util.find_spec("uvicorn")):
                print(f"| {title} | not installed | | | | | | | |")
                continue
            with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
                try:
                    url = next(word for line in process.stdout for word in line.split() if word.startswith("http://"))
                    print(f"| {title} | {load(url, process.pid, requests, clients, asked)} |", flush=True)
                finally:
                    process.terminate()


def load(url, pid, requests, clients, asked):
    """Ask a server from many threads -> the cells of its row."""
    port, times, wrong, statuses = int(url.split(":")[2].split("/")[0]), [], [], {}

    def client(number):
        draw = random.Random(number)
        for i in range(requests // clients):
            if i % 10 == 9:
                status = hostile_request(port, number + i // 10, draw)
                statuses[status] = statuses.get(status, 0) + 1
                continue
            queries, k, want = draw.choice(asked)
            start = time.perf_counter()
            got = HttpEngine(url).search(queries, k)
            times.append(time.perf_counter() - start)
            if got != want:
                wrong.append(queries)

    client(0)  # warm
    times.clear(), statuses.clear()
    before, start = held(pid), time.perf_counter()
    everyone = [threading.Thread(target=client, args=(i,)) for i in range(clients)]
    [c.start() for c in everyone]
    [c.join() for c in everyone]
    spent, ordered = time.perf_counter() - start, sorted(times)
    time.sleep(1)  # connections that were cut off come to their end
    (megabytes, threads), (first, idle) = held(pid), before
    p50, p99 = (1000 * ordered[int(share * len(ordered))] for share in (0.5, 0.99))
    came = ", ".join(f"{status}: {count}" for status, count in sorted(statuses.items(), key=str))
    memory = f"{first:.0f}, {megabytes:.0f} | {idle}, {threads}"
    return f"{len(times)} | {len(wrong)} | {p50:.1f} | {p99:.1f} | {len(times) / spent:.0f} | {came} | {memory}"


def peer(corpus):
    """The official server's shape on our index: one async endpoint of FastAPI, served by uvicorn."""
    import fastapi
    import uvicorn

    engine, app = retrieval.build_index(retrieval.load_passages(corpus)), fastapi.FastAPI()

    @app.post("/retrieve")
    def retrieve(request: dict):
        found = engine.search_scores(request["queries"], request.get("topk") or 3)
        answer = [[{"document": {"id": p.id, "contents": p.contents}, "score": s} for p, s in pairs] for pairs in found]
        return {"result": answer}

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    threading.Timer(1, lambda: print(f"http://127.0.0.1:{port}/retrieve", flush=True)).start()
    uvicorn.run(app, port=port, log_level="critical")


def hostile_request(port, i, rng):
    """Send one of eight kinds of bad request -> the HTTP status, or what happened instead."""
    head = lambda length: b"POST /retrieve HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % length
    bodies = [
        b"{broken", b"[" * 50000, rng.randbytes(2000), json.dumps({"queries": [{}]}).encode(),
        b'{"queries": ["a"], "topk": 1e99}',
    ]  # fmt: skip
    kind = i % 8
    if kind < 5:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("POST", "/retrieve", bodies[kind], {"Content-Type": "application/json"})
        return connection.getresponse().status
    with socket.create_connection(("127.0.0.1", port), timeout=60) as client:
        if kind == 5:  # a body far over the limit, announced and begun
            client.sendall(head(10**12) + b"x" * 10000)
            client.settimeout(2)
            try:
                return client.recv(100).split(b" ")[1].decode() + " (huge)"
            except (TimeoutError, OSError):
                return "waits (huge)"
        client.sendall(head(1000) + b"{")  # half a body
        if kind == 6:
            time.sleep(0.5)
        return "hung up" if kind == 7 else "slow, hung up"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("index")
    p.add_argument("--n", type=int, default=1_000_000)
    p.add_argument("--dim", type=int, default=384)
    kinds = ["Flat", "IVF-SQ8", "IVF-SQ4", "IVF-PQ", "HNSW"]
    p.add_argument("--kinds", nargs="+", choices=kinds, default=kinds)
    p = commands.add_parser("recall")
    p.add_argument("questions")
    p.add_argument("passages")
    p.add_argument("--encoder", help="folder or hub id of an encoder")
    p.add_argument("--cross-encoder", help="folder or hub id of a cross-encoder")
    p = commands.add_parser("server")
    p.add_argument("--requests", type=int, default=10_000)
    p.add_argument("--clients", type=int, default=64)
    commands.add_parser("peer").add_argument("corpus")
    args = vars(parser.parse_args(argv))
    if args.get("requests", 10_000) < args.get("clients", 0):
        parser.error("--requests: at least one a client")
    command = {"index": index_table, "recall": recall_table, "server": server_load, "peer": peer}[args.pop("command")]
    command(**args)


if __name__ == "__main__":
    main()
