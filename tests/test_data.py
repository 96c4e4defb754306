"""Claims about the tiny world, its tokenizer and its base model; about real questions, passages and checkpoints."""

import gzip
import json
import random
import re
import sys
from dataclasses import asdict, replace
from pathlib import Path

import filelock
import huggingface_hub
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3Config

import data
import searchr1
import train
from conftest import random_model
from course import world as course_world
from course.export import write_lines
from data import Mistake
from retrieval import SearchFailed, engine_from, load_passages, written_whole


def entities(text):
    return {word for word in data.WORD.findall(text) if word in data.KIND_OF}


# ----- The tiny world -----


@pytest.mark.paper
def test_no_test_entity_occurs_in_a_training_question(world):
    """Claim: entities of test questions and answers occur in no training question or answer, nor in a passage that
    mentions a training entity. So nothing that is learned by heart can help.
    Fails if: make_world takes `members` of a part from the whole pool.
    """
    of = lambda questions: set().union(*(entities(q.text) | set(q.gold_answers) for q in questions))
    train, test = of(world.train), of(world.test)
    assert len(train) > 250 and len(test) > 250 and not train & test
    assert not any(entities(p.text) & train and entities(p.text) & test for p in world.passages)


@pytest.mark.paper
def test_every_question_is_answered_by_following_its_path(world):
    """Claim: there is one passage a fact (13 relations). A question's path leads over facts to its gold answer, in one
    hop or two, and no two-hop question leads back to where it started.
    Fails if: _questions asks for the first relation's object in a two-hop question.
    """
    assert len(world.passages) == len(world.facts) == 1980 and len({p.text for p in world.passages}) == 1980
    assert len(data.RELATION) == 13 and {q.hops for q in world.test} == {1, 2}
    for q in world.train + world.test:
        entity = q.path[0]
        for relation in q.path[1:]:
            entity = world.facts[relation, entity]
            assert relation in data.WORD.findall(q.text)
        assert (entity,) == q.gold_answers and entity != q.path[0] and q.path[0] in q.text
        assert q.gold_answers[0] not in q.text


@pytest.mark.paper
@pytest.mark.parametrize("top_k", [3, 5])
def test_an_oracle_scores_one(world, engine, top_k):
    """Claim: asking "entity relation" always brings the passage, so the engine does not cap what can be learned. A
    two-hop question counts only if both of its passages were found.
    Fails if: HashedEncoder.text leaves the title out, or oracle_exact_match looks at the last step of a path only.
    """
    assert course_world.oracle_exact_match(world, world.test, engine.search, top_k) == 1.0
    two_hops = [q for q in world.test if q.hops == 2][:200]
    first = {f"{q.path[0]} {q.path[1]}" for q in two_hops}
    search = lambda queries, k: [[] if q in first else found for q, found in zip(queries, engine.search(queries, k))]
    assert course_world.oracle_exact_match(world, two_hops, search, top_k) == 0.0


def test_a_sloppy_query_brings_other_passages(world, engine):
    """Claim: passages share words. The entity alone finds the right passage first less than half the time, the relation
    alone almost never.
    Fails if: HashedEncoder.text is the title alone (the relation would not matter any more).
    """
    asked = [q for q in world.test if q.hops == 1][:400]
    states = lambda q: {f.format(x=q.path[0], y=q.gold_answers[0]) for f in data.RELATION[q.path[1]].facts}
    right = lambda queries: sum(p.text in states(q) for q, (p,) in zip(asked, engine.search(queries, 1))) / len(asked)
    assert right([q.path[0] for q in asked]) < 0.5 and right([q.path[1] for q in asked]) < 0.05
    assert right([f"{q.path[0]} {q.path[1]}" for q in asked]) > 0.95


def test_a_world_is_its_seed(world):
    """Claim: the same seed gives the same world, whatever the global random state. Another seed gives other facts.
    Fails if: make_world draws from the global random state.
    """
    random.seed(1)
    again, other = data.make_world(0), data.make_world(1)
    assert again == world and sum(world.facts.get(k) == v for k, v in other.facts.items()) < 60


def test_questions_are_drawn_by_type(world):
    """Claim: the share of two-hop questions is the one asked for, and relations are drawn uniformly for a given number
    of hops.
    Fails if: draw_questions draws questions uniformly (person relations would be six in ten).
    """
    drawn = data.draw_questions(world.train, 4000, 0.75, random.Random(0))
    assert 0.72 < sum(q.hops == 2 for q in drawn) / 4000 < 0.78
    one_hop = [q.path[1] for q in drawn if q.hops == 1]
    for relation in data.RELATION:
        assert 0.04 < one_hop.count(relation) / len(one_hop) < 0.12  # 1/13 = 0.077


def test_the_share_of_two_hop_questions_leans_against_the_drift():
    """Claim: the less the policy searches, the more questions take two searches; both kinds count alike, however many
    there were. The first step, of which nothing is known, gets three in four, a policy that searches as it should one
    in two. One that searches too much is held back, less where one-hop questions are ahead of two-hop ones.
    Fails if: two_hop_share adds the searches instead of subtracting them, has no bounds, does not look at the
    difference of the kinds, leans as far when all one-hop questions are right, or does not look at two-hop ones.
    """
    record = lambda *values: dict(zip([f"env/{k}_{h}hop" for k in ("searches", "em") for h in (1, 2)], values))
    share = lambda *values: data.two_hop_share(record(*values))
    assert data.two_hop_share({}) == data.two_hop_share({"env/searches_2hop": 1.5}) == share(1.5, 1.5) == 0.75
    drifting = [share(0, 0), share(1, 1), share(1.2, 1.6), share(1, 2), share(2, 2), share(2, 1), share(3, 3)]
    assert drifting == pytest.approx([0.9, 0.9, 0.75, 0.5, 0.25, 0.75, 0.2])
    told = [share(2, 2, 0.6, 0.2), share(2, 2, 1, 0), share(2, 2, 1, 1), share(2, 2, 0.2, 0.6), share(1, 1, 1, 0)]
    assert told == pytest.approx([0.45, 0.75, 0.25, 0.25, 0.9])


def test_the_fixed_sample_is_fixed_and_balanced(world):
    """Claim: it holds the same questions at every call, as many of one hop as of two. A limit of 0, or above all, takes
    all.
    Fails if: fixed_sample draws from all questions alike (three of four would have two hops).
    """
    sample = data.fixed_sample(world.test, 101)
    assert sample == data.fixed_sample(world.test, 101) and len({q.id for q in sample}) == 101
    assert sorted(sum(q.hops == h for q in sample) for h in (1, 2)) == [50, 51]
    assert data.fixed_sample(world.test, 0) == world.test == data.fixed_sample(world.test, 10**6)


# ----- Its tokenizer and its base model -----


def test_the_tokenizer_survives_saving(tokenizer, tmp_path):
    """Claim: saved beside the model, AutoTokenizer loads it back: same ids, same chat template. No word of the world is
    unknown.
    Fails if: random_model is made with a Qwen2Config (AutoTokenizer then builds its own kind), or make_tokenizer leaves
    out r.nouns.
    """
    random_model(tokenizer).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, world = AutoTokenizer.from_pretrained(tmp_path), data.make_world(3)
    texts = [p.text for p in world.passages] + [q.text for q in world.train + world.test] + data.THOUGHTS
    texts += [f"<think> not sure </think> <search> {data.NAMES['person'][0]} </search>", searchr1.RETHINK]
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    assert loaded(texts, add_special_tokens=False)["input_ids"] == ids
    assert loaded.chat_template == tokenizer.chat_template
    assert not any(tokenizer.unk_token_id in row for row in ids)


@pytest.mark.paper
def test_the_base_model_is_shown_the_tokens_of_the_rollout(tokenizer, world, engine):
    """Claim: the prompts, passages and turns that the base model is trained on are, id for id, what rollout() makes.
    Fails if: _poor_policy puts something other than "doc" before a passage, or CHAT_TEMPLATE changes a tag.
    """
    encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
    questions = world.train[:50]
    for question, episode in zip(questions, data.poor_episodes(questions, engine.search, 3, random.Random(0))):
        assert encode(episode[0][0]) == searchr1.prompt_ids(question, tokenizer, data.TINY_SETTINGS)
        for (turn, own), (block, _) in zip(episode[1::2], episode[2::2]):
            action = searchr1.parse_action(turn)
            assert own and action.kind == "search"
            (found,) = engine.search([action.content], 3)
            assert encode(block) == searchr1.observation_ids(tokenizer, searchr1.format_information(found), 64)
        assert searchr1.parse_action(episode[-1][0]).kind == "answer"


@pytest.mark.paper
def test_the_base_model_never_sees_the_world_or_a_gold_answer(world, engine, monkeypatch):
    """Claim: the base model is made on worlds of its own, which agree with a world of the reinforcement learning by
    chance only. The poor policy that it imitates reads nothing of a question but its text.
    Fails if: train_base_model calls make_world(config.seed, ...), or poor_episodes draws `searches` from question.hops.
    """
    seen, make_world = [], data.make_world
    monkeypatch.setattr(data, "make_world", lambda *a, **k: seen.append(make_world(*a, **k)) or seen[-1])
    data.train_base_model(data.BaseConfig(seed=0, reading_steps=1, policy_steps=1, batch_size=2))
    (own,) = seen
    assert sum(world.facts.get(k) == v for k, v in own.facts.items()) < 60
    questions = world.train[:20] + world.train[-20:]
    bare = [replace(q, id="", gold_answers=(), hops=0, path=()) for q in questions]
    episodes = [data.poor_episodes(qs, engine.search, 3, random.Random(0)) for qs in (questions, bare)]
    assert episodes[0] == episodes[1]


@pytest.mark.paper
def test_the_poor_policy_is_poor(world, engine):
    """Claim: the script that the base model imitates is right in at most 0.3 of one-hop and 0.1 of two-hop questions,
    searches 0 to 3 times whatever the question, never for a pair twice, and often for the wrong thing.
    Fails if: _poor_policy answers with the object of the fact that the question asks for; or the weights of the numbers
    of searches are [2, 1, 1, 2]; or asked.add(query) is dropped.
    """
    for hops, bar in ((1, 0.3), (2, 0.1)):
        questions = random.Random(0).sample([q for q in world.train if q.hops == hops], 800)
        episodes = data.poor_episodes(questions, engine.search, 3, random.Random(1))
        answers = [searchr1.extract_answer(episode[-1][0]) for episode in episodes]
        assert 0.01 < sum(searchr1.outcome_reward(a, q.gold_answers) for a, q in zip(answers, questions)) / 800 < bar
        actions = [[searchr1.parse_action(text) for text, own in episode if own] for episode in episodes]
        queries = [[action.content for action in of if action.kind == "search"] for of in actions]
        assert [round(list(map(len, queries)).count(n) / 800, 1) for n in range(4)] == [0.2, 0.3, 0.3, 0.2]
        asked = sum(f"{q.path[0]} {q.path[1]}" in of for q, of in zip(questions, queries)) / sum(map(bool, queries))
        assert 0.2 < asked < 0.95
        pairs = [q for of in queries for q in {q for q in of if of.count(q) > 1 and len(q.split()) == 2}]
        assert len(pairs) < 8  # a pair comes twice only by way of two random words


@pytest.mark.paper
def test_reading_episodes_can_be_read(world):
    """Claim: every answer of a reading episode stands in the passage that states its question's fact.
    Fails if: reading_episode answers with another passage's object.
    """
    facts, rng = sorted(world.facts), random.Random(0)
    for _ in range(200):
        segments = data.reading_episode(world, facts, 3, rng)
        sentences = re.findall(r"doc (.*?\.)", segments[0][0])
        assert len(sentences) == 3 and [own for _, own in segments] == [False] + [False, True] * 3
        for (question, _), (answer, _) in zip(segments[1::2], segments[2::2]):
            (subject,) = entities(question)
            (relation,) = [w for w in data.WORD.findall(question) if w in data.RELATION]
            states = {f.format(x=subject, y=answer.split()[1]) for f in data.RELATION[relation].facts}
            assert any(sentence in states for sentence in sentences)


def test_only_what_the_policy_wrote_counts_in_full(tokenizer):
    """Claim: a batch of episodes is their ids, several in a row where they fit; the loss weight is 1 on the policy's
    own tokens, the given one on the others, 0 on padding and on the first token of an episode, which nothing predicts.
    Fails if: _batch gives the whole episode the weight of its first segment, or predicts an episode from another one.
    """
    a, b, c = [("<question> who", False), ("<answer> who </answer>", True)], [("not sure", True)], [("who is", False)]
    ids, positions, weights = data._batch(tokenizer, [b, a, c], 0.25)
    words = tokenizer.convert_ids_to_tokens(ids.flatten().tolist())
    assert words == ["<question>", "who", "<answer>", "who", "</answer>", "not", "sure", "who", "is", "<eos>"]
    assert positions.tolist() == [[0, 1, 2, 3, 4], [0, 1, 0, 1, 0]]
    assert weights.tolist() == [[0, 0.25, 1, 1, 1], [0, 1, 0, 0.25, 0]] and weights.dtype == torch.float32


def test_a_head_of_the_base_model_begins_by_copying():
    """Claim: before the first step, a head that attends to a token makes that token the likeliest next one, whichever
    token it is, in both layers. (Heads at random: not one token in a hundred.)
    Fails if: the heads are left at random, the product is taken the other way round, or its sign is.
    """
    model, _ = data.train_base_model(data.BaseConfig(reading_steps=0, policy_steps=0))
    embeddings_VD = model.get_input_embeddings().weight
    for layer in model.model.layers:
        written_VD = embeddings_VD @ layer.self_attn.v_proj.weight.T @ layer.self_attn.o_proj.weight.T
        likeliest_V = (written_VD @ embeddings_VD.T).argmax(1)
        assert likeliest_V.tolist() == list(range(len(embeddings_VD)))


def test_episodes_that_share_a_row_do_not_see_each_other(tokenizer, model):
    """Claim: the hidden states of packed episodes are those of each episode alone.
    Fails if: the positions of _batch run on over the whole row.
    """
    episodes = [[(text, True)] for text in ("who is the mayor of the city ?", "not sure", "now i know")]
    ids, positions, _ = data._batch(tokenizer, episodes, 1.0)
    assert ids.shape == (2, 8)
    packed = model.base_model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
    for row, start, text in ((0, 0, episodes[0]), (1, 0, episodes[2]), (1, 3, episodes[1])):
        alone = torch.tensor([tokenizer(text[0][0], add_special_tokens=False)["input_ids"]])
        want = model.base_model(input_ids=alone).last_hidden_state[0]
        torch.testing.assert_close(packed[row, start : start + len(want)], want, atol=1e-5, rtol=1e-4)


def test_the_base_model_is_cached_whole_under_a_hash_of_its_configuration(tmp_path, monkeypatch):
    """Claim: the second call loads the same weights without training. Another configuration gets another folder. A run
    that dies half-way leaves nothing. If another run has finished the model in the meantime, its files are taken.
    Fails if: base_model writes straight into `folder`, leaves the seed out of the hash, or renames without a look.
    """
    config = data.BaseConfig(reading_steps=2, policy_steps=2, batch_size=4)
    model, tokenizer, folder = data.base_model(config, tmp_path)
    monkeypatch.setattr(data, "train_base_model", lambda config: pytest.fail("trained again"))
    again, _, same = data.base_model(config, tmp_path)
    pairs = list(zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    assert same == folder and all(torch.equal(a, b) for a, b in pairs)
    assert AutoModelForCausalLM.from_pretrained(folder).config.vocab_size == len(tokenizer)

    class Dying(type(model)):
        def save_pretrained(self, folder):
            Path(folder, "config.json").write_text("{}")
            raise KeyboardInterrupt

    monkeypatch.setattr(data, "train_base_model", lambda config: (Dying(model.config), tokenizer))
    with pytest.raises(KeyboardInterrupt):
        data.base_model(replace(config, seed=1), tmp_path)
    assert list(tmp_path.iterdir()) == [folder]

    def twice(config):
        monkeypatch.setattr(data, "train_base_model", lambda config: (again, tokenizer))
        data.base_model(config, tmp_path)
        return model, tokenizer

    monkeypatch.setattr(data, "train_base_model", twice)
    _, _, second = data.base_model(replace(config, seed=1), tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([folder, second])


def test_a_world_can_be_looked_at(monkeypatch, capsys):
    """Claim: `python -m course.world` prints a world's size, three two-hop questions with what is found for them, and
    one episode of each kind.
    Fails if: show_world samples one-hop questions.
    """
    monkeypatch.setattr(course_world, "oracle_exact_match", lambda *_: 1.0)
    course_world.main(["--world-seed", "7"])
    out = capsys.readouterr().out
    assert re.match(r"world 7: 1980 passages, \d{4} training and \d{4} test questions, 669 tokens\n", out)
    paths = re.findall("path: (.*)", out)
    assert len(paths) == 3 and all(path.count(" > ") == 2 for path in paths)
    assert "the base model reads:\n    <information> doc" in out and "a poor policy:\n    <question>" in out


# ----- Real questions -----


def record(question="Who?", **metadata):
    return {"id": "test_0", "question": question, "golden_answers": ["Ada"], "metadata": metadata}


HOTPOT = record(context={"title": ["Ada", "Bob"], "sentences": [["Ada wrote. ", " She  sang."], ["Bob slept."]]})


def test_questions_are_read_as_flashrag_has_them(here):
    """Claim: id, question, golden_answers; the hops if metadata has them; more keys do no harm, and without an id the
    line's number is one. A bad line is named by file and number, an empty file by its name.
    Fails if: golden_answers given as one string is taken for a list of characters, or the hops are left out.
    """
    good = {"id": 7, "question": "Who?", "golden_answers": ["a", "b"], "metadata": {"type": "bridge", "hops": 2}}
    file = here("q.jsonl", good)
    file.write_text(file.read_text() + '\n{"question": "q", "golden_answers": ["a"]}')
    assert data.load_questions(file) == [data.Question("7", "Who?", ("a", "b"), 2), data.Question("3", "q", ("a",))]
    for bad, message in (
        ("{", "JSONDecodeError"),
        ("[1]", "TypeError"),
        ('{"golden_answers": ["a"]}', "KeyError('question')"),
        ('{"question": "q"}', "KeyError('golden_answers')"),
        ('{"question": 1, "golden_answers": ["a"]}', "AttributeError"),
        ('{"question": " ", "golden_answers": ["a"]}', "empty"),
        ('{"question": "q", "golden_answers": "a"}', "of another type"),
        ('{"question": "q", "golden_answers": []}', "empty"),
        ('{"question": "q", "golden_answers": ["a"], "metadata": {"hops": "two"}}', "invalid literal"),
        ('{"question": "q", "golden_answers": ["a", 1]}', "of another type"),
    ):
        file.write_text(json.dumps(good) + "\n" + bad + "\n")
        with pytest.raises(Mistake, match='a question needs "question".*"golden_answers"') as error:
            data.load_questions(file)
        line = str(error.value)
        assert f"{file} line 2: " in line and message in line and "\n" not in line
    with pytest.raises(Mistake, match="empty.jsonl: no questions"):
        data.load_questions(here("empty.jsonl"))


@pytest.mark.paper
def test_sets_by_name_come_with_the_official_splits(here, monkeypatch):
    """Claim: nq, hotpotqa, ... are trained on `train` and evaluated on `test`, or `dev` where there is no test [the
    official data_process scripts]. "+" joins. What lies under downloads/ is not asked of the hub; the hub's cache is
    asked before its server; a file of a set's name wins.
    Fails if: hotpotqa is given a "test" split, fetch asks the hub first, or question_files ignores a file of that name.
    """
    asked = []
    get = lambda repo, file, **how: asked.append((repo, file, how)) or f"/cache/{file}"
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", get)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: pytest.fail("downloaded"))
    sets = "nq+triviaqa+popqa+hotpotqa+2wikimultihopqa+musique+bamboogle"
    want = "nq/test triviaqa/test popqa/test hotpotqa/dev 2wikimultihopqa/dev musique/dev bamboogle/test".split()
    assert data.question_files(sets, "eval") == [Path(f"/cache/{name}.jsonl") for name in want]
    assert asked[0] == ("RUC-NLPIR/FlashRAG_datasets", "nq/test.jsonl", {"repo_type": "dataset"})
    mine = here("downloads/nq/train.jsonl", record())
    assert data.question_files("nq+hotpotqa", "train") == [mine, Path("/cache/hotpotqa/train.jsonl")]
    assert data.question_files(str(here("nq+mine", record())), "eval") == [Path("nq+mine")]


def test_all_names_are_checked_before_the_first_download(here, monkeypatch):
    """Claim: a name that is neither a file nor a set, and a set without a training split, are one line that lists what
    there is; nothing is downloaded.
    Fails if: question_files fetches a set before it has seen the next name.
    """
    monkeypatch.setattr(data, "fetch", lambda *_: pytest.fail("fetched"))
    for spec, message in (
        ("nowhere", "cannot read nowhere: no file, and 'nowhere' is none of the sets nq, triviaqa"),
        ("nq+webqa", "'webqa' is none of the sets"),
        ("nq+popqa", "'popqa' is none of the sets nq, triviaqa, hotpotqa, 2wikimultihopqa, musique$"),
    ):
        with pytest.raises(Mistake, match=message):
            data.load_data(spec, "train")


def test_what_is_not_on_disk_is_downloaded(here, monkeypatch):
    """Claim: the hub is asked whether it has the file, which costs one question, and then for the file.
    Fails if: fetch gives up after the cache, or asks for a model of that name.
    """
    calls = []

    def download(repo, file, repo_type, **_):
        calls.append((repo, file, repo_type))
        return str(here("cache.jsonl", record()))

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", calls.append)
    assert [q.text for q in data.load_data("bamboogle", "eval")] == ["Who?"]
    url = "https://huggingface.co/datasets/RUC-NLPIR/FlashRAG_datasets/resolve/main/bamboogle/test.jsonl"
    assert calls == [url, ("RUC-NLPIR/FlashRAG_datasets", "bamboogle/test.jsonl", "dataset")]


@pytest.mark.parametrize("trouble", ["offline", "network", "missing", "gated"])
def test_a_set_out_of_reach_is_one_line_that_says_what_to_put_where(here, monkeypatch, trouble):
    """Claim: offline mode, no network, 404 and no permission end at once in one line with the address and the local
    place. The download, which would try for 20 seconds, is not begun.
    Fails if: fetch catches OSError alone (httpx's errors are none), or skips get_hf_file_metadata.
    """
    errors = huggingface_hub.errors
    answer = type("Response", (), {"headers": {}, "request": None, "status_code": 404})()
    error = {
        "network": errors.HTTPError("[Errno -2] Name or service not known"),
        "missing": errors.RemoteEntryNotFoundError("404 Client Error.\n\nEntry Not Found", response=answer),
        "gated": errors.GatedRepoError("403 Client Error.\n\nAccess is restricted", response=answer),
    }.get(trouble)

    def ask(url):
        raise error

    if error:  # otherwise HF_HUB_OFFLINE, which conftest.py sets, is the trouble
        monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", ask)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: pytest.fail("download begun"))
    with pytest.raises(Mistake) as stopped:
        data.load_data("musique", "eval")
    line = str(stopped.value)
    assert "resolve/main/musique/dev.jsonl" in line and line.startswith("downloads/musique/dev.jsonl is not there")
    assert "\n" not in line and (type(error).__name__ if error else "OfflineModeIsEnabled") in line


def test_joined_sets_keep_their_ids_apart(here):
    """Claim: questions follow one another in the order of the names, with the set's name before an id. One set alone
    keeps its ids. Hops are unknown.
    Fails if: load_data leaves the names out (FlashRAG numbers every set from test_0 on).
    """
    here("downloads/nq/test.jsonl", record("One?"))
    here("downloads/bamboogle/test.jsonl", record("Two?"), record("Three?") | {"id": "test_1"})
    joined = data.load_data("bamboogle+nq", "eval")
    assert [(q.id, q.text, q.hops) for q in joined] == [
        ("bamboogle/test_0", "Two?", 0), ("bamboogle/test_1", "Three?", 0), ("nq/test_0", "One?", 0),
    ]  # fmt: skip
    assert [q.id for q in data.load_data("bamboogle", "eval")] == ["test_0", "test_1"]


# ----- Real passages -----


def test_contexts_are_the_paragraphs_that_came_with_the_questions(here):
    """Claim: HotpotQA's, 2Wiki's and MuSiQue's paragraphs become passages in the official format, in order and each
    once, sentences joined by one space, blank ones left out. Some questions may bring none. The corpus is made once.
    Fails if: sentences are joined without a space, `seen` is not asked, the key "content" is not looked for, or a
    paragraph of blanks is kept (`if text.strip()` -> `if text`).
    """
    paragraph = {"idx": 3, "title": "Dee", "paragraph_text": " Dee swam. "}
    cy = {"title": ["Bob", "Cy", "Void"], "content": [["Bob slept."], ["Cy ran.", "Cy fell."], [" ", " "]]}
    files = [
        here("hotpot.jsonl", HOTPOT, record(), HOTPOT),
        here("2wiki.jsonl", record(context=cy)),
        here(
            "musique.jsonl",
            record(question_decomposition=[{"support_paragraph": paragraph}, {"support_paragraph": None}]),
            record(question_decomposition=[{"support_paragraph": {"title": "E'e", "paragraph_text": "E'e \u00e9."}}]),
        ),
    ]
    corpus = data.contexts_corpus(files, "corpora")
    lines = corpus.read_text(encoding="utf-8").splitlines()
    assert lines[0] == r'{"id": "0", "contents": "\"Ada\"\nAda wrote. She  sang."}' and "E'e \u00e9." in lines[4]
    assert [(r["id"], r["contents"]) for r in map(json.loads, lines[1:])] == [
        ("1", '"Bob"\nBob slept.'), ("2", '"Cy"\nCy ran. Cy fell.'),
        ("3", '"Dee"\nDee swam.'), ("4", '"E\'e"\nE\'e \u00e9.'),
    ]  # fmt: skip
    assert [p.title for p in load_passages(corpus)] == ["Ada", "Bob", "Cy", "Dee", "E'e"]
    time = corpus.stat().st_mtime_ns
    assert data.contexts_corpus(files, "corpora") == corpus and corpus.stat().st_mtime_ns == time
    here("2wiki.jsonl", HOTPOT, HOTPOT)
    assert data.contexts_corpus(files, "corpora") != corpus  # a file that has changed makes another


def test_questions_without_paragraphs_are_one_line_and_leave_nothing(here):
    """Claim: a file in which no question brings a paragraph, and a line in another form, are errors that name the file.
    No half-written corpus stays behind. Half a character is replaced.
    Fails if: the check of `bare` is left out, contexts_corpus opens `corpus` itself, leaves whole_characters out, or
    does not catch RecursionError.
    """
    nq = here("nq.jsonl", record(), record())
    odd = here("odd.jsonl", HOTPOT, record(context={"title": ["A", "B"], "sentences": [["one"]]}))
    with pytest.raises(Mistake, match="nq.jsonl: no question brings paragraphs.*wiki18"):
        data.contexts_corpus([here("hotpot.jsonl", HOTPOT), nq], "corpora")
    with pytest.raises(Mistake, match="odd.jsonl line 2: paragraphs in an unknown form"):
        data.contexts_corpus([odd], "corpora")
    half = here("half.jsonl", record(context={"title": ["A\ud83d"], "content": [["b"]]}))
    deep = here("deep.jsonl", HOTPOT)
    deep.write_text("[" * 100_000 + "\n")
    with pytest.raises(Mistake, match="deep.jsonl line 1: paragraphs in an unknown form"):
        data.contexts_corpus([deep], "corpora")
    with pytest.raises(Mistake, match="give a question file"):
        data.resolve_corpus("contexts", [], folder="corpora")
    assert list(Path("corpora").iterdir()) == []
    assert [p.title for p in load_passages(data.contexts_corpus([half], "corpora"))] == ["A\ufffd"]


def test_a_corpus_by_name_becomes_an_index_once(here, monkeypatch):
    """Claim: `contexts` is a flat index that finds what came with the questions, bm25:contexts finds it by words. Both
    are built at the first call only, while a second run would wait. task() takes them with a set by name. Any other
    --corpus is passed through.
    Fails if: resolve_corpus builds although the folder is complete or without the lock, or strips "bm25:" from a file.
    """
    here("downloads/hotpotqa/dev.jsonl", HOTPOT)
    build, built = data.build, []

    def alone(*how):
        with pytest.raises(filelock.Timeout):
            filelock.FileLock("outputs/corpora/.lock", timeout=0).acquire()
        built.append(build(*how))

    monkeypatch.setattr(data, "build", alone)
    questions, engine, world = data.task(0, "contexts", "hotpotqa")
    assert world is None and [q.text for q in questions] == ["Who?"]
    assert [p.title for p in engine.search(["who wrote and sang?"], 1)[0]] == ["Ada"]
    files = data.question_files("hotpotqa", "eval")
    words = data.resolve_corpus("bm25:contexts", files)
    assert words.startswith("bm25:outputs/corpora/contexts-")
    assert engine_from(words).search(["slept"], 3)[0][0].title == "Bob"
    assert len(built) == 2
    monkeypatch.setattr(data, "build", lambda *_: pytest.fail("built again"))
    assert data.resolve_corpus("bm25:contexts", files) == words
    folder = data.resolve_corpus("contexts", files)
    assert json.loads((Path(folder) / "manifest.json").read_text())["index"] == "Flat"
    for spec in ("bm25:index", "http://127.0.0.1:8000/retrieve", "passages.jsonl"):
        assert data.resolve_corpus(spec, files) == spec


def test_wiki18_is_unpacked_and_indexed_in_a_byte_a_number(here, capsys):
    """Claim: the packed corpus under downloads/wiki18 becomes an IVF-SQ8 index, whose size is said. If the file lies
    unpacked beside it, that one is read.
    Fails if: resolve_corpus builds a Flat index for wiki18, or looks for the corpus elsewhere.
    """
    passages = [{"id": str(i), "contents": f'"T{i}"\nnumber{i} stands here'} for i in range(40)]
    plain = here("downloads/wiki18/wiki-18.jsonl", *passages)
    Path("downloads/wiki18/wiki-18.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    plain.unlink()
    folder = data.resolve_corpus("wiki18", [])
    manifest = json.loads((Path(folder) / "manifest.json").read_text())
    assert manifest["index"] == "IVF-SQ8" and manifest["n"] == 40
    assert "GB on disk and in memory" in capsys.readouterr().out
    assert engine_from(folder).search(["number7"], 1)[0][0].title == "T7"
    here("downloads/wiki18/wiki-18.jsonl", *passages[:10])
    assert len(engine_from(data.resolve_corpus("bm25:wiki18", [])).passages) == 10


def test_a_mistake_about_questions_or_passages_is_found_early_and_is_one_line(here, monkeypatch):
    """Claim: task() reads the questions before it builds an index. A line of a corpus that is no passage, and an
    encoder that does not exist, are Mistakes. A corpus that is not there is an OSError with its name: one line, too.
    Fails if: task resolves the corpus before load_data, or calls resolve_corpus outside of its `try`.
    """
    here("q.jsonl", HOTPOT)
    here("bad.jsonl", HOTPOT, {"question": "no answer"})
    here("p.jsonl", {"id": "0", "contents": '"T"\ntext'}, {"id": "1"})
    for corpus, message in (
        ("p.jsonl", "p.jsonl line 2: a passage needs"),
        ("contexts", "no encoder could be loaded from no/encoder"),
    ):
        with pytest.raises(Mistake, match=message):
            data.task(0, corpus, "q.jsonl", encoder="no/encoder")
    with pytest.raises(OSError, match="No such file or directory: 'gone.jsonl'"):
        data.task(0, "gone.jsonl", "q.jsonl")
    monkeypatch.setattr(data, "build", lambda *_: pytest.fail("built"))
    with pytest.raises(Mistake, match="bad.jsonl line 2"):
        data.task(0, "contexts", "bad.jsonl")


# ----- Checkpoints, and what a user can get wrong -----


def test_the_newest_checkpoint_stands_for_its_run(tmp_path):
    """Claim: the folder of a run means its checkpoint of the highest step; any other name means itself.
    A run begun with --model DIR records the checkpoint.
    Fails if: newest compares names ("checkpoint-20" after "checkpoint-100"), takes what is unfinished, or parse_config
    does not call it.
    """
    others = "unfinished-120", "checkpoint-of-a-friend", "checkpoint-200-mine", "checkpoint-300.zip"
    for name in ("checkpoint-20", "checkpoint-100", *others):
        (tmp_path / name).mkdir()
    assert data.newest(tmp_path) == str(tmp_path / "checkpoint-100")
    for name in (str(tmp_path / "checkpoint-20"), "Qwen/Qwen2.5-0.5B", "model.gguf"):
        assert data.newest(name) == name
    begun = train.parse_config({"model": str(tmp_path), "train_data": "q", "corpus": "p", "output_dir": "none"})
    assert begun.model == str(tmp_path / "checkpoint-100")


def test_a_conversation_runs_as_the_checkpoint_was_trained(tmp_path):
    """Claim: search_r1.json decides about conversations, world, corpus, encoder and method, also one that was written
    before there were `encoder`, `method` and `base`: a policy of --no-search is then asked as r1. Without the file, the
    paper's settings hold for real data, else the tiny world's.
    Fails if: load_settings prefers its defaults, gives a real model fourteen tokens a turn, or ignores do_search.
    """
    settings, about = data.load_settings(tmp_path)
    assert settings == data.TINY_SETTINGS and about["world_seed"] == 0 and about["corpus"] is None
    assert data.load_settings(tmp_path, real=True)[0] == searchr1.Settings()
    assert searchr1.Settings().max_new_tokens == 500
    mine = searchr1.Settings(2, 60, 70, 800, 5, True, searchr1.RETHINK)  # older ones hold the sentence itself
    saved = asdict(mine) | {"world_seed": 5, "corpus": "wiki18"}
    for more, method in (({}, "search-r1"), ({"do_search": False}, "r1"), ({"method": "sft", "encoder": "e5"}, "sft")):
        (tmp_path / "search_r1.json").write_text(json.dumps(saved | more))
        settings, about = data.load_settings(tmp_path, real=True)
        assert settings == replace(mine, do_search=more.get("do_search", True)) and about["base"] is None
        assert (about["world_seed"], about["corpus"], about["method"]) == (5, "wiki18", method)
        assert about["encoder"] == more.get("encoder", "hashed")


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch):
    """Claim: the hub is asked once for a model that is no folder and not in its cache, before transformers tries.
    Fails if: fetch is not called in load_checkpoint.
    """
    asked = []

    def silent(url):
        asked.append(url)
        raise OSError("no route")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", silent)
    monkeypatch.setattr(data, "AutoModelForCausalLM", None)  # would be an AttributeError
    with pytest.raises(Mistake, match="loaded from Some/Model-0.5B: .*config.json is not there and cannot .*no route"):
        data.load_checkpoint("Some/Model-0.5B")
    with pytest.raises(Mistake, match="loaded from runs/1/no-such-checkpoint: .* is not there"):  # can be no hub id
        data.load_checkpoint("runs/1/no-such-checkpoint")
    assert asked == ["https://huggingface.co/Some/Model-0.5B/resolve/main/config.json"]


def test_a_gguf_file_is_unpacked_into_a_plain_model(tmp_path, tokenizer, monkeypatch):
    """Claim: --model FILE.gguf asks transformers for that file in its folder, and gives a model that can be saved like
    any other, in bf16 with the frequencies of its positions in fp32. Without the packages that read it one line names
    them.
    Fails if: load_checkpoint hands the file's own path on, catches no ImportError, keeps quantization_config, gives
    "auto" to torch, or converts the whole model (`from_config(config, dtype=policy.dtype)` ->
    `from_config(config).to(policy.dtype)`).
    """
    file, model, asked = tmp_path / "small.gguf", random_model(tokenizer), []
    file.write_bytes(b"GGUF")

    def missing(*_, **__):
        raise ImportError("gguf")

    monkeypatch.setattr(data.AutoModelForCausalLM, "from_pretrained", missing)
    with pytest.raises(data.Mistake, match="small.gguf: .* pip install gguf accelerate"):
        data.load_checkpoint(str(file))
    weights = {name: t.clone() for name, t in model.state_dict().items()}
    model.config.quantization_config = {"quant_method": "gguf"}
    load = lambda given: lambda where, gguf_file, **_: asked.append((where, gguf_file)) or given
    monkeypatch.setattr(data.AutoModelForCausalLM, "from_pretrained", load(model))
    monkeypatch.setattr(data.AutoTokenizer, "from_pretrained", load(tokenizer))
    policy, _ = data.load_checkpoint(str(file), dtype="auto")  # as eval.py asks on a GPU
    assert asked == [(tmp_path, "small.gguf")] * 2 and policy is not model
    assert not hasattr(policy.config, "quantization_config")
    assert all(torch.equal(t, weights[name]) for name, t in policy.state_dict().items())
    exact = policy.base_model.rotary_emb.inv_freq
    for p in model.parameters():
        p.data = p.data.bfloat16()
    policy, _ = data.load_checkpoint(str(file), dtype="auto")
    assert policy.dtype == torch.bfloat16 and torch.equal(policy.base_model.rotary_emb.inv_freq, exact)


def test_a_head_that_is_not_linear_is_refused(tmp_path, tokenizer, model, monkeypatch):
    """Claim: a model whose logits are not head(hidden), or whose head has a bias, is refused: rollout and trainer would
    work with another policy. So are a file of weights that is not whole, and a model of text and images (Gemma 3),
    whose config has no hidden_size.
    Fails if: load_checkpoint does not compare, does not look at head.bias, nor for hidden_size, or catches no
    SafetensorError.
    """
    model.save_pretrained(tmp_path / "half"), tokenizer.save_pretrained(tmp_path / "half")
    (tmp_path / "half/model.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(data.Mistake, match="no causal LM could be loaded from .*half: "):
        data.load_checkpoint(str(tmp_path / "half"))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert len(data.load_checkpoint(str(tmp_path))[1]) == len(tokenizer)
    model.lm_head.bias = torch.nn.Parameter(torch.ones(len(tokenizer)))
    with monkeypatch.context() as patch:
        patch.setattr(type(model), "from_pretrained", classmethod(lambda *_, **__: model))
        with pytest.raises(Mistake, match="not one linear map"):
            data.load_checkpoint(str(tmp_path))
        patch.setattr(model, "config", Gemma3Config())
        with pytest.raises(Mistake, match="is not a model of text alone"):
            data.load_checkpoint(str(tmp_path))

    def capped(self, input_ids, **_):
        hidden = self.model(input_ids=input_ids).last_hidden_state
        return type("Out", (), {"logits": 30 * torch.tanh(self.lm_head(hidden) / 30)})

    monkeypatch.setattr(type(model), "forward", capped)
    with pytest.raises(Mistake, match="not one linear map"):
        data.load_checkpoint(str(tmp_path))


@pytest.mark.parametrize(
    "error, line",
    [
        (Mistake("--limit cannot be negative"), "--limit cannot be negative"),
        (SearchFailed("the engine is gone"), "the engine is gone"),
        ("full disk", "[Errno 28] No space left on device"),
        (KeyboardInterrupt(), "interrupted"),
        (ValueError("ours"), None),
    ],
)
def test_what_a_user_can_put_right_is_one_line(tmp_path, monkeypatch, capsys, error, line):
    """Claim: a Mistake, an engine that is gone and a disk that is full end in one line and exit code 2, Ctrl-C in exit
    code 130. A disk that fails leaves the old file and no other. Any other error is ours and keeps its traceback.
    Fails if: run_main catches ValueError, or not OSError.
    """
    path = tmp_path / "out.jsonl"
    write_lines(path, [{"old": 1}])

    def main():
        if isinstance(error, Exception | KeyboardInterrupt):
            raise error
        write_lines(path, [{"new": 2}])

    def full(number):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(written_whole.__globals__["os"], "fsync", full)
    monkeypatch.setattr(sys, "argv", ["/some/where/train.py"])
    with pytest.raises(SystemExit if line else ValueError) as stopped:
        data.run_main(main)
    assert path.read_text() == '{"old": 1}\n' and list(tmp_path.iterdir()) == [path]
    if line:
        assert stopped.value.code == (130 if line == "interrupted" else 2)
        assert capsys.readouterr().err == f"train.py: {line}\n"
