"""Claims about the tiny world, its tokenizer and its base model."""

import gzip
import json
import random
import re
import runpy
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import data
import eval as evaluation
import searchr1
from retrieval import engine_from, load_passages


def entities(text):
    return {word for word in data.WORD.findall(text) if word in data.KIND_OF}


def test_no_test_entity_occurs_in_a_training_question(world):
    """Claim: entities of test questions and answers occur in no training question or answer, nor in a passage that
    mentions a training entity; so nothing learned by heart can help.
    Fails if: make_world takes `members` of a part from the whole pool.
    """
    mentioned = [set().union(*(entities(q.question) | set(q.golden_answers) for q in part)) for part in world.questions]
    assert len(mentioned[0]) > 250 and len(mentioned[1]) > 250 and not mentioned[0] & mentioned[1]
    assert not any(entities(p.text) & mentioned[0] and entities(p.text) & mentioned[1] for p in world.passages)


def test_every_question_is_answered_by_following_its_path(world):
    """Claim: one passage a fact (13 relations), each question's path leads over facts to its gold answer, and no two-hop
    question leads back to where it started.
    Fails if: _questions asks for the first relation's object in a two-hop question.
    """
    assert len(world.passages) == len(world.facts) == 1980 and len({p.text for p in world.passages}) == 1980
    assert len(data.RELATIONS) == 13 and {q.hops for q in world.test} == {1, 2}
    for q in world.train + world.test:
        entity = q.path[0]
        for relation in q.path[1:]:
            entity = world.facts[relation, entity]
            assert relation in data.WORD.findall(q.question)
        assert (entity,) == q.golden_answers and entity != q.path[0] and q.path[0] in q.question
        assert q.golden_answers[0] not in q.question


@pytest.mark.parametrize("top_k", [3, 5])
def test_an_oracle_scores_one(world, engine, top_k):
    """Claim: asking "entity relation" always brings the passage: the engine does not cap what can be learned.
    Fails if: build_index leaves the title out of the text, or HashedEncoder uses the full idf and no title.
    """
    assert data.oracle_exact_match(world, world.test, engine.search, top_k) == 1.0


def test_a_sloppy_query_brings_other_passages(world, engine):
    """Claim: distractors share words: the entity alone finds the right passage first less than half the time, the
    relation alone almost never.
    Fails if: build_index encodes titles alone (the relation would not matter any more).
    """
    asked = [q for q in world.test if q.hops == 1][:400]
    states = lambda q: {f.format(x=q.path[0], y=q.golden_answers[0]) for f in data.RELATION[q.path[1]].facts}
    share = lambda queries: sum(found[0].text in states(q) for q, found in zip(asked, engine.search(queries, 1))) / len(asked)
    assert share([q.path[0] for q in asked]) < 0.5 and share([q.path[1] for q in asked]) < 0.05
    assert share([f"{q.path[0]} {q.path[1]}" for q in asked]) > 0.95


def test_a_world_is_its_seed(world):
    """Claim: the same seed gives the same world, another seed other facts.
    Fails if: make_world draws from the global random state.
    """
    again, other = data.make_world(0), data.make_world(1)
    assert again.passages == world.passages and again.test == world.test
    assert sum(world.facts.get(k) == v for k, v in other.facts.items()) < 60


def test_questions_are_drawn_by_type(world):
    """Claim: the share of two-hop questions is the one asked for, and relations are drawn uniformly within a number of hops.
    Fails if: draw_questions draws questions uniformly (person relations would be six in ten).
    """
    drawn = data.draw_questions(world.train, 4000, 0.75, random.Random(0))
    assert 0.72 < sum(q.hops == 2 for q in drawn) / 4000 < 0.78
    one_hop = [q.path[1] for q in drawn if q.hops == 1]
    for relation in data.RELATION:
        assert 0.04 < one_hop.count(relation) / len(one_hop) < 0.12  # 1/13 = 0.077


def test_the_tokenizer_survives_saving(tokenizer, tmp_path):
    """Claim: saved beside the model, AutoTokenizer loads it back: same ids, same chat template, no <unk> in the world.
    Fails if: the model is made with a Qwen2Config (AutoTokenizer then builds its own kind), or a noun phrase's words are missing.
    """
    from conftest import random_model

    random_model(tokenizer).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    world = data.make_world(3)
    texts = (
        [p.text for p in world.passages]
        + [q.question for q in world.train + world.test]
        + data.THOUGHTS
        + [f"<think> not sure </think> <search> {data.NAMES['person'][0]} </search>", searchr1.RETHINK]
    )
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    assert loaded(texts, add_special_tokens=False)["input_ids"] == ids and loaded.chat_template == tokenizer.chat_template
    unknown = tokenizer.unk_token_id
    assert not any(unknown in row for row in ids)


def test_the_base_model_is_shown_the_tokens_of_the_rollout(tokenizer, world, engine):
    """Claim: prompts, passages and turns that the base model is trained on are, id for id, what rollout() makes.
    Fails if: poor_episodes puts something other than "doc" before a passage, or CHAT_TEMPLATE changes a tag.
    """
    encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
    questions = world.train[:50]
    for question, episode in zip(questions, data.poor_episodes(questions, engine.search, 3, random.Random(0))):
        assert encode(episode[0][0]) == encode(searchr1.make_prompt(question.question, tokenizer))
        for (turn, own), (block, _) in zip(episode[1::2], episode[2::2]):
            action = searchr1.parse_action(turn)
            assert own and action.kind == "search"
            (found,) = engine.search([action.content], 3)
            assert encode(block) == searchr1.observation_ids(tokenizer, searchr1.format_information(found), 64)
        assert searchr1.parse_action(episode[-1][0]).kind == "answer"


def test_the_poor_policy_is_poor(world, engine):
    """Claim: the script that the base model imitates is right in at most 0.3 of one-hop and 0.1 of two-hop questions,
    searches 0 to 3 times whatever the question, and often the wrong thing.
    Fails if: poor_episodes answers with an entity that the question does not name, or draws the number of searches from question.hops.
    """
    for hops, bar in ((1, 0.3), (2, 0.1)):
        questions = random.Random(0).sample([q for q in world.train if q.hops == hops], 800)
        episodes = data.poor_episodes(questions, engine.search, 3, random.Random(1))
        right = (
            sum(searchr1.outcome_reward(searchr1.extract_answer(e[-1][0]), q.golden_answers) for e, q in zip(episodes, questions))
            / 800
        )
        assert 0.01 < right < bar
        searches = [sum(searchr1.parse_action(text).kind == "search" for text, own in e if own) for e in episodes]
        assert [round(searches.count(n) / 800, 1) for n in range(4)] == [0.2, 0.3, 0.3, 0.2]


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
            assert any(
                sentence in {f.format(x=subject, y=answer.split()[1]) for f in data.RELATION[relation].facts}
                for sentence in sentences
            )


def test_the_base_model_is_cached_whole_under_a_hash_of_its_configuration(tmp_path, monkeypatch):
    """Claim: the second call loads the same weights without training; another configuration gets another folder; a run
    that dies half-way leaves no folder of that name.
    Fails if: base_model writes straight into `folder`, or leaves the seed out of the hash.
    """
    config = data.BaseConfig(reading_steps=2, policy_steps=2, batch_size=4)
    model, tokenizer, folder = data.base_model(config, tmp_path)
    monkeypatch.setattr(data, "train_base_model", lambda config: pytest.fail("trained again"))
    again, _, same = data.base_model(config, tmp_path)
    assert same == folder and all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
    assert AutoModelForCausalLM.from_pretrained(folder).config.vocab_size == len(tokenizer)

    class Dying(type(model)):
        def save_pretrained(self, folder):
            (folder / "config.json").write_text("{}")
            raise KeyboardInterrupt

    monkeypatch.setattr(data, "train_base_model", lambda config: (Dying(model.config), tokenizer))
    with pytest.raises(KeyboardInterrupt):
        data.base_model(data.BaseConfig(seed=1, reading_steps=2, policy_steps=2, batch_size=4), tmp_path)
    assert [f.name for f in tmp_path.iterdir() if not f.name.startswith("base-unfinished")] == [folder.name]


def test_questions_are_read_as_flashrag_has_them(tmp_path):
    """Claim: id, question, golden_answers; more keys do no harm; a bad line is named by file and number.
    Fails if: golden_answers given as one string is taken for a list of characters.
    """
    file = tmp_path / "q.jsonl"
    good = {"id": "7", "question": "Who?", "golden_answers": ["a", "b"], "metadata": {"type": "bridge"}}
    file.write_text(json.dumps(good) + "\n\n")
    assert data.load_questions(file) == [data.Question("7", "Who?", ("a", "b"))]
    for bad, message in (
        ("{", "JSON"),
        ('{"question": ""}', "question"),
        ('{"question": "q"}', "golden"),
        ('{"question": "q", "golden_answers": "a"}', "golden"),
        ('{"question": "q", "golden_answers": []}', "golden"),
    ):
        file.write_text(json.dumps(good) + "\n" + bad + "\n")
        with pytest.raises(ValueError, match=message) as error:
            data.load_questions(file)
        assert f"{file} line 2" in str(error.value)


# ----- Real questions and passages -----


@pytest.fixture()
def here(tmp_path, monkeypatch):
    """An empty working directory; here(path, records) writes JSON lines into it."""
    monkeypatch.chdir(tmp_path)

    def write(path, *records):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text("".join(json.dumps(r) + "\n" for r in records))
        return Path(path)

    return write


def record(question="Who?", **metadata):
    return {"id": "test_0", "question": question, "golden_answers": ["Ada"], "metadata": metadata}


HOTPOT = record(context={"title": ["Ada", "Bob"], "sentences": [["Ada wrote. ", " She  sang."], ["Bob slept."]]})


def test_sets_by_name_come_with_the_official_splits(here, monkeypatch):
    """Claim: trained on nq, hotpotqa, ...: train; evaluated on test, where there is none on dev [the official data_process
    scripts]; "+" joins; what lies under downloads/ is not asked of the hub; the hub's cache is asked before its server; a
    file of a set's name wins.
    Fails if: hotpotqa is given a "test" split, fetch asks the hub first, or question_files does not look for a file of that name.
    """
    asked = []
    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download", lambda repo, file, **how: asked.append((repo, file, how)) or f"/cache/{file}"
    )
    sets = "nq+triviaqa+popqa+hotpotqa+2wikimultihopqa+musique+bamboogle"
    want = "nq/test triviaqa/test popqa/test hotpotqa/dev 2wikimultihopqa/dev musique/dev bamboogle/test".split()
    assert data.question_files(sets, "eval") == [Path(f"/cache/{name}.jsonl") for name in want]
    assert asked[0] == ("RUC-NLPIR/FlashRAG_datasets", "nq/test.jsonl", {"repo_type": "dataset", "local_files_only": True})
    mine = here("downloads/nq/train.jsonl", record())
    assert data.question_files("nq+hotpotqa", "train") == [mine, Path("/cache/hotpotqa/train.jsonl")]
    assert data.question_files(str(here("nq+mine", record())), "eval") == [Path("nq+mine")]


def test_what_is_not_on_disk_is_downloaded(here, monkeypatch):
    """Claim: the hub is asked for the file's size, which costs one question, and then for the file.
    Fails if: fetch gives up after the cache, or downloads with local_files_only.
    """
    calls = []

    def download(repo, file, local_files_only=False, **_):
        calls.append(local_files_only)
        if local_files_only:
            raise huggingface_hub.errors.LocalEntryNotFoundError("not in the cache")
        return str(here("cache.jsonl", record()))

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda url: calls.append(url) or type("Metadata", (), {"size": 7}))
    assert [q.question for q in data.load_data("bamboogle", "eval")] == ["Who?"]
    url = "https://huggingface.co/datasets/RUC-NLPIR/FlashRAG_datasets/resolve/main/bamboogle/test.jsonl"
    assert calls == [True, url, False]


@pytest.mark.parametrize("trouble", ["offline", "network", "missing", "gated"])
def test_a_set_out_of_reach_is_one_line_that_says_what_to_put_where(here, monkeypatch, trouble):
    """Claim: offline mode, no network, 404 and no permission end in one line with the address and the local place, at once:
    the download, which would try for 20 seconds, is not begun.
    Fails if: fetch catches OSError alone (httpx's errors are none), or skips get_hf_file_metadata.
    """
    download, errors = huggingface_hub.hf_hub_download, huggingface_hub.errors
    answer = type("Response", (), {"headers": {}, "request": None, "status_code": 404})()
    error = {
        "network": errors.HTTPError("[Errno -2] Name or service not known"),
        "missing": errors.RemoteEntryNotFoundError("404 Client Error.\n\nEntry Not Found", response=answer),
        "gated": errors.GatedRepoError("403 Client Error.\n\nAccess is restricted", response=answer),
    }.get(trouble)

    def ask(url):
        raise error

    if error:
        monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", ask)  # without: HF_HUB_OFFLINE is set in conftest.py
    cache_only = lambda *a, **how: download(*a, **how) if how.get("local_files_only") else pytest.fail("download begun")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", cache_only)
    with pytest.raises(ValueError) as stopped:
        data.load_data("musique", "eval")
    line = str(stopped.value)
    assert "resolve/main/musique/dev.jsonl" in line and line.startswith("downloads/musique/dev.jsonl is not there")
    assert "\n" not in line and (type(error).__name__ if error else "OfflineModeIsEnabled") in line


def test_joined_sets_keep_their_ids_apart(here):
    """Claim: questions follow one another in the order of the names, with the set's name before an id; one set alone
    keeps its ids; hops are unknown.
    Fails if: load_data leaves the names out (FlashRAG numbers every set from test_0 on).
    """
    here("downloads/nq/test.jsonl", record("One?"))
    here("downloads/bamboogle/test.jsonl", record("Two?"), record("Three?") | {"id": "test_1"})
    joined = data.load_data("bamboogle+nq", "eval")
    assert [(q.id, q.question, q.hops) for q in joined] == [
        ("bamboogle/test_0", "Two?", 0), ("bamboogle/test_1", "Three?", 0), ("nq/test_0", "One?", 0),
    ]  # fmt: skip
    assert [q.id for q in data.load_data("bamboogle", "eval")] == ["test_0", "test_1"]


def test_contexts_are_the_paragraphs_that_came_with_the_questions(here, capsys):
    """Claim: HotpotQA's, 2Wiki's and both forms of MuSiQue's paragraphs become passages in the official format, in order and
    each once, sentences joined by one space; questions without any are left out and counted; made once.
    Fails if: sentences are joined without a space, `seen` is not asked, or the key "content" is not looked for.
    """
    paragraph = {"idx": 3, "title": "Dee", "paragraph_text": " Dee swam. "}
    files = [
        here("hotpot.jsonl", HOTPOT, record(), HOTPOT),
        here("2wiki.jsonl", record(context={"title": ["Bob", "Cy"], "content": [["Bob slept."], ["Cy ran.", "Cy fell."]]})),
        here(
            "musique.jsonl",
            record(question_decomposition=[{"id": 1, "support_paragraph": paragraph}, {"id": 2, "support_paragraph": None}]),
            record(question_decomposition=[{"id": 1, "support_paragraph": str(paragraph | {"title": "E'e"})}]),
            record(paragraphs=[{"title": "Flo", "paragraph_text": "Flo \u00e9."}]),
        ),
    ]
    corpus = data.contexts_corpus(files, "corpora")
    lines = corpus.read_text(encoding="utf-8").splitlines()
    assert lines[0] == r'{"id": "0", "contents": "\"Ada\"\nAda wrote. She  sang."}' and "Flo \u00e9." in lines[5]
    assert [(r["id"], r["contents"]) for r in map(json.loads, lines[1:5])] == [
        ("1", '"Bob"\nBob slept.'), ("2", '"Cy"\nCy ran. Cy fell.'), ("3", '"Dee"\nDee swam.'), ("4", '"E\'e"\nDee swam.'),
    ]  # fmt: skip
    assert [p.title for p in load_passages(corpus)] == ["Ada", "Bob", "Cy", "Dee", "E'e", "Flo"]
    said = capsys.readouterr().out
    assert "1 of 3 questions bring none" in said and "0 of 1 questions" in said
    time = corpus.stat().st_mtime_ns
    assert data.contexts_corpus(files, "corpora") == corpus and corpus.stat().st_mtime_ns == time
    here("2wiki.jsonl", HOTPOT, HOTPOT)
    assert data.contexts_corpus(files, "corpora") != corpus  # a file that has changed makes another


def test_questions_without_paragraphs_are_one_line_and_leave_nothing(here):
    """Claim: a file none of whose questions brings a paragraph, and a line in another form, are errors that name the file;
    no half-written corpus stays behind.
    Fails if: the check of `bare` is left out, or write_lines writes under the final name.
    """
    nq = here("nq.jsonl", record(), record())
    odd = here("odd.jsonl", HOTPOT, record(context={"title": ["A", "B"], "sentences": [["one"]]}))
    with pytest.raises(ValueError, match="nq.jsonl: no question brings paragraphs.*wiki18"):
        data.contexts_corpus([here("hotpot.jsonl", HOTPOT), nq], "corpora")
    with pytest.raises(ValueError, match="odd.jsonl line 2: paragraphs in an unknown form"):
        data.contexts_corpus([odd], "corpora")
    with pytest.raises(ValueError, match="give a question file"):
        data.resolve_corpus("contexts", [], folder="corpora")
    assert list(Path("corpora").iterdir()) == []


def test_a_corpus_by_name_becomes_an_index_once(here, monkeypatch):
    """Claim: `contexts` is a flat index that finds what came with the questions, bm25:contexts one by words; both are built at
    the first call only; eval.py's task() takes them with a set by name; any other --corpus is passed through.
    Fails if: resolve_corpus builds although the folder is complete, or strips "bm25:" from a file.
    """
    here("downloads/hotpotqa/dev.jsonl", HOTPOT)
    questions, engine, world = evaluation.task(0, "contexts", "hotpotqa")
    assert world is None and [q.question for q in questions] == ["Who?"]
    assert [p.title for p in engine.search(["who wrote and sang?"], 1)[0]] == ["Ada"]
    files = data.question_files("hotpotqa", "eval")
    words = data.resolve_corpus("bm25:contexts", files)
    assert words.startswith("bm25:outputs/corpora/contexts-") and engine_from(words).search(["slept"], 3)[0][0].title == "Bob"
    monkeypatch.setattr(data, "build", lambda *_: pytest.fail("built again"))
    assert data.resolve_corpus("bm25:contexts", files) == words
    folder = data.resolve_corpus("contexts", files)
    assert json.loads((Path(folder) / "manifest.json").read_text())["index"] == "Flat"
    for spec in ("bm25:index", "http://127.0.0.1:8000/retrieve", "passages.jsonl"):
        assert data.resolve_corpus(spec, files) == spec


def test_wiki18_is_unpacked_and_indexed_in_a_byte_a_number(here, capsys):
    """Claim: the packed corpus under downloads/wiki18 becomes an IVF-SQ8 index, whose size is said; with the file unpacked
    beside it that one is read.
    Fails if: resolve_corpus builds a Flat index for wiki18, or looks for the corpus elsewhere.
    """
    passages = [{"id": str(i), "contents": f'"T{i}"\nnumber{i} stands here'} for i in range(40)]
    plain = here("downloads/wiki18/wiki-18.jsonl", *passages)
    Path("downloads/wiki18/wiki-18.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    plain.unlink()
    folder = data.resolve_corpus("wiki18", [])
    manifest = json.loads((Path(folder) / "manifest.json").read_text())
    assert manifest["index"] == "IVF-SQ8" and manifest["n"] == 40 and "GB on disk and in memory" in capsys.readouterr().out
    assert engine_from(folder).search(["number7"], 1)[0][0].title == "T7"
    here("downloads/wiki18/wiki-18.jsonl", *passages[:10])
    assert len(engine_from(data.resolve_corpus("bm25:wiki18", [])).passages) == 10


# ----- Export -----

# From verl's and SkyRL's converters, word for word.
VERL_PREFIX = (
    "Answer the given question. You must conduct reasoning inside <think> and </think> "
    "first every time you get new information. After reasoning, if you find you lack "
    "some knowledge, you can call a search engine by <tool_call> query </tool_call> "
    "and it will return the top searched results between <tool_response> and "
    "</tool_response>. You can search as many times as your want. If you find no "
    "further external knowledge needed, you can directly provide the answer inside "
    "<answer> and </answer>, without detailed illustrations. For example, "
    "<answer> Beijing </answer>. Question: "
)


def test_exported_rows_are_those_of_the_converters(here):
    """Claim: verl's row is, key for key and word for word, what its own converter writes (plus agent_name, without which its
    default agent never searches); SkyRL's has env_class and reward_spec, and with --system "" the prompt is exactly ours;
    rows are numbered through both sets.
    Fails if: the rows of each set are numbered from 0, tags are replaced in the question, too, or reward_model keeps its name.
    """
    here("downloads/nq/train.jsonl", record("who said research> first") | {"golden_answers": ["Ada", "A. L."]})
    here("downloads/hotpotqa/train.jsonl", record("Who?"))
    data.main("export verl --data nq+hotpotqa --output verl.json".split())
    first, second = [json.loads(line) for line in Path("verl.json").read_text().splitlines()]
    question, truth = "who said research> first?", {"target": ["Ada", "A. L."]}
    assert first == {
        "data_source": "searchR1_nq",
        "prompt": [
            {"role": "system", "content": "You are a helpful and harmless assistant."},
            {"role": "user", "content": VERL_PREFIX + question},
        ],
        "ability": "fact-reasoning",
        "agent_name": "tool_agent",
        "reward_model": {"style": "rule", "ground_truth": truth},
        "extra_info": {
            "index": 0,
            "need_tools_kwargs": True,
            "question": question,
            "split": "train",
            "tools_kwargs": {
                "search": {"create_kwargs": {"ground_truth": truth, "question": question, "data_source": "searchR1_nq"}}
            },
        },
        "metadata": None,
    }
    assert second["data_source"] == "searchR1_hotpotqa" and second["extra_info"]["index"] == 1
    data.main(["export", "skyrl", "--data", "nq", "--output", "sky.jsonl", "--system", ""])
    (row,) = [json.loads(line) for line in Path("sky.jsonl").read_text().splitlines()]
    assert row.pop("env_class") == "search" and row.pop("reward_spec") == first.pop("reward_model")
    assert row.pop("prompt") == [{"role": "user", "content": searchr1.make_prompt("who said research> first")}]
    first.pop("agent_name"), first.pop("prompt")
    assert row == first
    data.main("export skyrl --data downloads/nq/train.jsonl --split eval --name popqa --output sky.jsonl".split())
    row = json.loads(Path("sky.jsonl").read_text())
    assert row["data_source"] == "searchR1_popqa" and row["extra_info"]["split"] == "test"


@pytest.mark.parametrize(
    "flags, message",
    [
        ("export verl --data nq --output x.jsonl", "ends in .json"),
        ("export verl --data mine.jsonl --output x.json", "--name"),
        ("export verl --data bad.jsonl --name nq --output x.json", "bad.jsonl line 2"),
        ("export skyrl --data nowhere --output x.json", "cannot read nowhere"),
        ("export skyrl --data nq+webqa --output x.json", "'webqa' is none of the sets"),
        ("export skyrl --data popqa --output x.json", "popqa has no training split"),
        ("export skyrl --data mine.jsonl --name nq --output no/x.json", "no/x.json"),
    ],
)
def test_an_export_that_cannot_be_is_one_line_and_writes_nothing(here, monkeypatch, capsys, flags, message):
    """Claim: exit code 2 and one line; no file, whole or half, appears.
    Fails if: data.py lets a ValueError through, or question_files downloads a set before it has seen the next name.
    """
    here("mine.jsonl", record())
    here("bad.jsonl", record(), {"question": "no answer"})
    monkeypatch.setattr(sys, "argv", ["data.py", *flags.split()])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(data.__file__, run_name="__main__")
    error = capsys.readouterr().err.strip()
    assert stopped.value.code == 2 and message in error and "\n" not in error
    assert sorted(p.name for p in Path().iterdir()) == ["bad.jsonl", "mine.jsonl"]
