"""A third kind of ranker: a cross-encoder reads query and passage together [Nogueira, Cho 2019].

    python -m course.rerank WHERE MODEL "a question" [--top-k 3] [--candidates 10]

prints the order before and after. WHERE is a file of passages, the folder of an index, or bm25: and either; MODEL a
cross-encoder, folder or hub id, such as cross-encoder/ms-marco-MiniLM-L6-v2.

The encoders of retrieval.py turn a passage into a vector before anyone has asked, so it cannot depend on the query. A
cross-encoder gives every pair of query and passage a pass of its own through the network. It sees which word of one
answers which word of the other, but 21 million passes a query are too many. So a fast ranker chooses the candidates,
and the cross-encoder only puts them in order. What the first has missed the second never sees.

To train with it, serve it, and give train.py the address (--corpus http://127.0.0.1:8000/retrieve):

    Server(SearchEngine(engine.passages, Reranker(engine.ranker, engine.passages, MODEL))).serve_forever()

Shapes: S queries in flight, C candidates, K top-k.
"""

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from data import Mistake, Parser, run_main, task
from retrieval import HashedEncoder, HttpEngine, SearchEngine


class Reranker:
    """A ranker: the best `candidates` of another ranker, in the order of a cross-encoder's scores."""

    def __init__(self, ranker, passages, model, candidates=10):
        self.ranker, self.passages, self.candidates = ranker, passages, candidates
        self.model = AutoModelForSequenceClassification.from_pretrained(model, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(model)

    def rank(self, queries, k):
        """S str -> (scores [S, K] fp32, rows [S, K] int64), best first, row -1 where nothing was found."""
        _, rows_SC = self.ranker.rank(queries, min(max(k, self.candidates), len(self.passages)))
        scores_SC = np.full(rows_SC.shape, -np.inf, np.float32)
        options = dict(padding=True, truncation="only_second", max_length=512, return_tensors="pt")
        # PITFALL: pair a query with its own candidates only. The official server pairs it with those of all queries.
        for query, rows_C, scores_C in zip(queries, rows_SC, scores_SC):
            texts = [HashedEncoder.text(self.passages[row]) for row in rows_C if row >= 0]
            if texts:
                pairs = self.tokenizer([query] * len(texts), texts, **options)
                with torch.no_grad():
                    scores_C[: len(texts)] = self.model(**pairs).logits[:, -1].numpy()
        order = np.argsort(-scores_SC, axis=1, kind="stable")[:, :k]
        return np.take_along_axis(scores_SC, order, 1), np.take_along_axis(rows_SC, order, 1)


def side_by_side(before, after):
    """Two lists of (Passage, score), the candidates in their first order and the best in their last -> a line a place:
    title and score before, title and score after, and the place before in brackets."""
    places = {passage.id: place for place, (passage, _) in enumerate(before, 1)}
    cell = lambda passage, score: f"{passage.title[:40]:40} {score:8.3f}"
    for place, (first, last) in enumerate(zip(before, after), 1):
        yield f"{place:3}  {cell(*first)}    {cell(*last)}  ({places[last[0].id]})"


def main(argv=None):
    parser = Parser(description="Print what is found for a question, before and after a cross-encoder has read it.")
    add = parser.add_argument
    add("where", help="FILE of passages, DIR of an index, or bm25: and either")
    add("model", help="cross-encoder, folder or hub id")
    add("question")
    add("--top-k", type=int, default=3, help="passages to print (default: 3)")
    add("--candidates", type=int, default=10, help="passages that the cross-encoder reads (default: 10)")
    args = parser.parse_args(argv)
    if args.top_k < 1 or args.candidates < args.top_k:
        raise Mistake(f"--top-k {args.top_k}: a number from 1 up to --candidates {args.candidates}")
    engine = task(0, args.where)[1]
    if isinstance(engine, HttpEngine):
        raise Mistake(f"{args.where}: a server does not show its ranker; give a file, a folder, or bm25: and either")
    try:
        reranker = Reranker(engine.ranker, engine.passages, args.model, args.candidates)
    except (OSError, ValueError) as error:
        why = str(error).strip().splitlines()[0]
        raise Mistake(f"no cross-encoder could be loaded from {args.model}: {why}") from None
    before = engine.search_scores([args.question], args.candidates)[0]
    after = SearchEngine(engine.passages, reranker).search_scores([args.question], args.top_k)[0]
    print(*side_by_side(before, after), sep="\n")


if __name__ == "__main__":
    run_main(main)
