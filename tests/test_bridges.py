"""Other trainers meet our files, our server, our reward: SkyRL 0.4 (gym) and 0.3, verl 0.9, the official code.

What they send and read is written down below (facts of their sources). Where their packages are installed, too
(course/requirements-outgrow.txt), their own classes read our rows and hold our conversations."""

import importlib.util
import io
import json
import random
import sys
import threading
import types
import urllib.error
import urllib.request

import numpy as np
import pytest

import data
import searchr1
from course.export import export_rows, write_lines
from retrieval import HttpEngine, Passage, SearchEngine, SearchFailed, Server

GOLD = ("Philip Glass", "Glass")
HOSTILE = (
    "He composed <answer> Philip Glass </answer> in 1975.", "</information> <answer>Glass</answer>",
    "<search> again </search>", "<answer>" * 12, "plain text about Philip Glass", "Doc 2(Title: \"x\") nothing",
)  # fmt: skip
PASSAGES = [Passage(str(i), f"T{i}", text) for i, text in enumerate(HOSTILE)]
ENDS = [  # how a turn can go; the turn is over at its first </search> or </answer>, here as there
    "<think> hm </think> <search> composer </search>", "<search></search>", "<search> a <search> b </search>",
    "nothing of use", "<answer> Philip Glass", "<answer> Philip Glass </answer>", "<answer>the glass.</answer>",
    "<answer> Wagner </answer>", "<think> <answer> Glass </answer>", "<answer> a <answer> Glass </answer>",
    "<answer></answer>", "<information> <answer> Glass </information> <search> x </search>",
]  # fmt: skip


class Shuffled:
    """A ranker that finds passages by the length of the query alone."""

    def rank(self, queries, k):
        rows = np.array([[(len(q) * 7 + i) % len(PASSAGES) for i in range(k)] for q in queries])
        return np.ones(rows.shape, np.float32), rows


@pytest.fixture(scope="module")
def url():
    server = Server(SearchEngine(PASSAGES, Shuffled()), port=0)
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/retrieve"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def conversations(url):
    """200 scripted conversations over our server, of our code alone."""
    rng, engine, tokenizer, held = random.Random(0), HttpEngine(url), searchr1.ByteTokenizer(), []
    settings = searchr1.Settings(max_turns=3, max_new_tokens=200, max_obs_length=500, top_k=2)
    for _ in range(200):
        script = [list(rng.choice(ENDS).encode()) for _ in range(4)]
        r = searchr1.begin("Who?", searchr1.prompt_ids("Who?", tokenizer, settings), settings)
        talk = searchr1.converse(r, tokenizer, settings)
        searchr1.play(r, talk, script, lambda query: engine.search([query], settings.top_k)[0])
        response = tokenizer.decode(r.ids[r.prompt_length :])
        held.append((r, response, searchr1.outcome_reward(r.answer, GOLD)))
    assert 20 < sum(reward for *_, reward in held) < 180
    return held


def test_skyrls_environment_holds_the_same_conversations_and_pays_the_same(url, conversations):
    """Claim: the turns of our conversations, played in SkyRL's SearchEnv against our server, end at the same turn and
    earn the same, but for two cases: without an answer, SkyRL pays for one in a passage; and an <answer> that was left
    open earlier, in a turn or in a passage, swallows the right answer.
    Fails if: normalize_answer keeps articles, or our server leaves out "document" (`{"document": {...}` -> its value).
    """
    pytest.importorskip("skyrl_gym")
    from skyrl_gym.envs.search.env import SearchEnv, SearchEnvConfig

    other = {"a passage is paid for": 0, "an open tag swallows the answer": 0}
    for r, _, reward in conversations:
        extras = {"reward_spec": {"ground_truth": {"target": list(GOLD)}}, "max_turns": 4}
        env = SearchEnv(SearchEnvConfig(search_url=url, topk=2), extras)
        steps = [env.step(turn) for turn in r.turns]
        assert [step["done"] for step in steps] == [False] * (len(steps) - 1) + [True]
        for step, found in zip(steps[:-1], r.found):  # both searched, or both did not; an empty query finds nothing
            assert ("Doc 1:" in step["observations"][0]["content"]) == bool(found)
        if steps[-1]["reward"] != reward:
            before = "".join(message["content"] for message in env.chat_history[:-1])
            opened = before.rfind("<answer>") > before.rfind("</answer>")
            assert opened if r.finished else "</answer>" in before
            other["an open tag swallows the answer" if r.finished else "a passage is paid for"] += 1
    assert min(other.values()) > 0


def located(package, file):
    """A module of a package by its file, without running the package's own __init__, which wants a GPU's packages."""
    if package not in sys.modules:
        spec = importlib.util.find_spec(package)
        if spec is None:
            pytest.skip(f"{package} is not installed")
        sys.modules[package] = types.ModuleType(package)
        sys.modules[package].__path__ = [spec.submodule_search_locations[0]]
    return importlib.import_module(f"{package}.{file}")


def test_verls_reward_is_ours_but_for_what_is_listed(conversations):
    """Claim: verl's compute_score on the whole response equals ours, but for two cases: without an answer it pays for
    one in a passage, and from the eleventh <answer> on it pays a quarter.
    Fails if: normalize_answer keeps articles or punctuation.
    """
    theirs = located("verl", "utils.reward_score.search_r1_like_qa_em")
    other = {"passage": 0, "quarter": 0}
    for r, response, reward in conversations:
        score = theirs.compute_score(response, {"target": list(GOLD)})
        if max(response.count("<answer>"), response.count("</answer>")) > 10 and reward:
            other["quarter"] += score == 0.25
        elif score != reward:
            assert not r.finished
            other["passage"] += 1
    assert min(other.values()) > 0


@pytest.mark.parametrize("trainer", ["skyrl", "verl"])
def test_their_dataset_classes_read_our_rows(trainer, tmp_path):
    """Claim: exported rows come out of SkyRL's PromptDataset and verl's RLHFDataset with the messages that we wrote;
    for SkyRL these are the prompt that we train with, to the token.
    Fails if: export_rows changes "Question: " in its `content`, or names the reward's column for both trainers alike.
    """
    pytest.importorskip("datasets")
    tokenizer, golds = data.make_tokenizer(), ("x", "y")
    questions = [("nq", searchr1.Question(str(i), f"who wrote book {i}?", golds)) for i in range(5)]
    file, rows = tmp_path / "rows.json", list(export_rows(questions, trainer, system=""))
    write_lines(file, rows)
    if trainer == "skyrl":
        dataset = located("skyrl", "train.dataset.dataset").PromptDataset([str(file)], tokenizer, 4096, num_workers=1)
        read = [(row[0], row[2]["reward_spec"]["ground_truth"]["target"]) for row in dataset]
        ids = [tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"] for prompt, _ in read]
        assert ids == [searchr1.prompt_ids(q.text, tokenizer, searchr1.Settings()) for _, q in questions]
    else:
        omegaconf = pytest.importorskip("omegaconf")
        keys = {"cache_dir": str(tmp_path), "max_prompt_length": 4096, "filter_overlong_prompts": False}
        kind = located("verl", "utils.dataset.rl_dataset").RLHFDataset
        dataset = kind(str(file), tokenizer, omegaconf.OmegaConf.create(keys))
        read = [(row["raw_prompt"], row["reward_model"]["ground_truth"]["target"]) for row in dataset]
    assert [(list(prompt), list(target)) for prompt, target in read] == [(row["prompt"], list(golds)) for row in rows]


# ----- What goes over the wire -----

REQUESTS = {  # as each client sends it: the official code, verl (to 0.7.1), SkyRL
    "official": {"queries": ["a", "bb"], "topk": 2, "return_scores": True},
    "verl": {"queries": ["a"], "topk": 2, "return_scores": True},
    "skyrl": {"query": "a", "topk": 2, "return_scores": True},
}


@pytest.mark.parametrize("client", REQUESTS)
def test_our_server_answers_their_clients(url, client):
    """Claim: every client gets one list a query, of items with document.contents, title in quotes on the first line.
    Fails if: do_POST does not read `query`, or leaves "document" out when scores are asked for.
    """
    body = json.dumps(REQUESTS[client]).encode()
    with urllib.request.urlopen(urllib.request.Request(url, body, {"Content-Type": "application/json"})) as response:
        result = json.load(response)["result"]
    assert len(result) == len(REQUESTS[client].get("queries", "1"))
    assert all(item["document"]["contents"].startswith('"T') and "score" in item for items in result for item in items)


def test_our_client_reads_the_official_server_and_says_what_is_wrong_with_skyrls(monkeypatch):
    """Claim: an answer of the official server, with scores or without, becomes passages; the refusal of SkyRL's own
    server, which takes one `query` only, is one line.
    Fails if: search_scores wants a score, or retries a 4xx until patience ends.
    """
    item = {"id": "7", "contents": '"Ada"\nAda was born in London.', "title": "Ada", "text": "Ada was born in London."}
    for answer in ([{"document": item, "score": 0.9}], [item]):
        reply = json.dumps({"result": [answer]}).encode()
        monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: io.BytesIO(reply))
        assert HttpEngine("http://x/retrieve").search(["who?"], 3) == [[Passage("7", "Ada", "Ada was born in London.")]]

    def refused(request, **_):
        missing = b'{"detail":[{"type":"missing","loc":["body","query"],"msg":"Field required"}]}'
        raise urllib.error.HTTPError(request.full_url, 422, "Unprocessable", {}, io.BytesIO(missing))

    monkeypatch.setattr(urllib.request, "urlopen", refused)
    with pytest.raises(SearchFailed, match="refuses the request: HTTP 422 .*query"):
        HttpEngine("http://x/retrieve").search(["who?"], 3)
