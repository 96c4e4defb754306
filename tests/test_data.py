"""Claims about the tiny world, its tokenizer and its base model."""

import json
import random
import re

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import data
import searchr1


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
