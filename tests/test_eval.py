"""Claims about eval.py."""

import json
import math
from pathlib import Path

import pytest
import torch

import data
import eval as evaluation
import searchr1
from retrieval import Passage
from test_searchr1 import PASSAGES

SETTINGS = {
    "max_turns": 2,
    "max_new_tokens": 200,
    "max_obs_length": 300,
    "max_length": 4000,
    "top_k": 2,
    "do_search": True,
    "invalid_message": "official",
}


def test_metrics_are_means_over_all_questions_and_hops_apart():
    """Claim: EM, F1, searches, finished, format: by hand for five questions in batches of two, the last one not dropped.
    Fails if: evaluate drops the last batch, or divides by the number of finished rollouts.
    """
    t, a = "<think>x</think>", "<answer>{}</answer>"
    turns = {
        "q1?": [t + a.format("London")],  # right, one hop, good format
        "q2?": [t + "<search>a</search>", t + a.format("the River Thames")],  # F1 of "river thames" with "thames": 2/3
        "q3?": ["<search>a</search>"] * 3,  # never answers
        "q4?": [a.format("London")],  # right, format bad
        "q5?": [t + "<search>a</search>", t + a.format("Thames")],  # right
    }
    questions = [
        data.Question(q, q, (gold,), path)
        for q, gold, path in zip(turns, ["london", "Thames", "x", "London", "thames"], ["ab", "abc", "abc", "ab", "abc"])
    ]
    tokenizer = searchr1.ByteTokenizer()
    policy = searchr1.ScriptedPolicy(
        tokenizer, {searchr1.make_prompt(q): [list(x.encode()) for x in xs] for q, xs in turns.items()}
    )
    metrics, rollouts = evaluation.evaluate(policy, tokenizer, questions, lambda q, k: [PASSAGES] * len(q), SETTINGS, batch_size=2)
    assert [r.question for r in rollouts] == list(turns)
    want = {
        "em": 3 / 5,
        "f1": (1 + 2 / 3 + 0 + 1 + 1) / 5,
        "sub_em": 4 / 5,  # "thames" stands in "the River Thames"
        "hit": 2 / 5,  # the passages name the Thames: shown for q2, q3 and q5, gold of q2 and q5
        "searches": (0 + 1 + 2 + 0 + 1) / 5,
        "turns": (1 + 2 + 3 + 1 + 2) / 5,
        "finished": 4 / 5,
        "valid_format": 3 / 5,
        "em_1hop": 1.0,
        "em_2hop": 1 / 3,
        "searches_1hop": 0.0,
        "searches_2hop": 4 / 3,
    }
    assert {k: metrics[k] for k in want} == pytest.approx(want)
    assert metrics["response_tokens"] == sum(len(x) for xs in turns.values() for x in xs) / 5


def test_evaluation_is_greedy_and_the_flag_arrives(model, tokenizer, monkeypatch):
    """Claim: evaluate() decodes at temperature 0 down in the sampler, whatever the random state; asked for, it samples.
    Fails if: `temperature=temperature` is dropped from the call of rollout (what happens to the official flag).
    """
    seen, sample = [], searchr1.sample
    monkeypatch.setattr(
        searchr1,
        "sample",
        lambda logits, temperature, generator=None: seen.append(temperature) or sample(logits, temperature, generator),
    )
    questions = [data.Question(str(i), f"who is {name}?", ("x",)) for i, name in enumerate(data.NAMES["person"][:6])]
    settings = SETTINGS | {"max_new_tokens": 8}
    texts = []
    for seed, temperature in ((0, 0.0), (1, 0.0), (2, 1.0)):
        torch.manual_seed(seed)
        _, rollouts = evaluation.evaluate(
            model, tokenizer, questions, lambda q, k: [[Passage("0", "t", "kinake")]] * len(q), settings, temperature
        )
        texts.append([r.ids for r in rollouts])
    assert texts[0] == texts[1] != texts[2] and set(seen) == {0.0, 1.0}


def test_the_interval_of_a_mean_is_the_binomials():
    """Claim: for 60 right answers of 200 the bootstrap's 95 % interval is that of the binomial distribution within a
    question; it is the same at every call; without spread it has no width.
    Fails if: the draws are made without replacement (randperm), or the quantiles are 0.05 and 0.95.
    """
    low, high = evaluation.bootstrap_interval([1.0] * 60 + [0.0] * 140)
    # A resampled mean is a binomial (200, 0.3) over 200.
    below = [sum(math.comb(200, k) * 0.3**k * 0.7 ** (200 - k) for k in range(x + 1)) for x in range(201)]
    want = [next(x for x in range(201) if below[x] >= p) / 200 for p in (0.025, 0.975)]
    assert abs(low - want[0]) <= 0.0051 and abs(high - want[1]) <= 0.0051  # a question is 0.005
    assert (low, high) == evaluation.bootstrap_interval([1.0] * 60 + [0.0] * 140)
    assert evaluation.bootstrap_interval([0.5] * 9) == (0.5, 0.5)


def test_the_fixed_sample_is_fixed_and_balanced(world):
    """Claim: the same questions at every call, as many of one hop as of two; a limit of 0 or above all takes all.
    Fails if: fixed_sample draws from all questions alike (three of four would have two hops).
    """
    sample = evaluation.fixed_sample(world.test, 101)
    assert sample == evaluation.fixed_sample(world.test, 101) and len({q.id for q in sample}) == 101
    assert sorted(sum(q.hops == h for q in sample) for h in (1, 2)) == [50, 51]
    assert evaluation.fixed_sample(world.test, 0) == world.test == evaluation.fixed_sample(world.test, 10**6)


@pytest.fixture()
def checkpoint(tmp_path, monkeypatch, model, tokenizer):
    monkeypatch.chdir(tmp_path)
    model.save_pretrained("ck")
    tokenizer.save_pretrained("ck")
    return "ck"


def test_a_checkpoint_alone_is_evaluated_on_the_held_out_questions(checkpoint, capsys, world):
    """Claim: zero flags beside --checkpoint: the tiny world's held-out questions, one and two hops apart; --json keeps
    metrics and one record a question; --ask prints one conversation.
    Fails if: main evaluates world.train.
    """
    evaluation.main(["--checkpoint", "ck", "--limit", "20", "--json", "out.json"])
    printed = capsys.readouterr().out
    assert "20 questions (tiny world 0, held out), greedy" in printed and "em_1hop" in printed and "searches_2hop" in printed
    out = json.loads(Path("out.json").read_text())
    assert {r["question"] for r in out["records"]} == {q.question for q in evaluation.fixed_sample(world.test, 20)}
    assert out["metrics"]["em"] == pytest.approx(sum(r["em"] for r in out["records"]) / 20)
    evaluation.main(["--checkpoint", "ck", "--ask", "who is kinake?"])
    assert "searches, answer:" in capsys.readouterr().out


def test_curves_of_several_runs_go_into_one_picture(tmp_path, monkeypatch):
    """Claim: --plot draws runs with and without hops, of different length, into a PNG, and writes the points beside it,
    from which the same picture can be drawn again.
    Fails if: plot_runs indexes a metric that a run does not have, or write_points drops the run's name.
    """
    for name, records in (
        ("a", [{"step": 0, "eval/em_1hop": 0.1, "eval/em_2hop": 0.0}, {"step": 1, "reward/mean": 0.5, "kl": 0.1}]),
        ("b", [{"step": 0, "eval/em": 0.3}]),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    figures = []
    monkeypatch.setattr("matplotlib.pyplot.close", figures.append)
    evaluation.main(["--plot", str(tmp_path / "a"), str(tmp_path / "b"), "--output", str(tmp_path / "c.png")])
    assert [len(axis.lines) for axis in figures[0].axes] == [3, 1, 0, 0, 1, 0]
    assert (tmp_path / "c.png").read_bytes()[:4] == b"\x89PNG" and (tmp_path / "c.png").stat().st_size > 20000
    evaluation.main(["--plot", str(tmp_path / "c.csv"), "--output", str(tmp_path / "d.png")])
    assert (tmp_path / "d.csv").read_text() == (tmp_path / "c.csv").read_text() != ""
    assert (tmp_path / "d.png").read_bytes() == (tmp_path / "c.png").read_bytes()


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "give --checkpoint DIR"),
        (["--checkpoint", "nowhere"], "no causal LM"),
        (["--checkpoint", "."], "holds no model"),
        (["--checkpoint", "odd"], "no causal LM"),
        (["--checkpoint", "ck", "--data", "q.jsonl"], "--corpus"),
        (["--checkpoint", "ck", "--data", "gone.jsonl", "--corpus", "gone.jsonl"], "cannot read gone.jsonl"),
        (["--checkpoint", "ck", "--top-k", "0"], "--top-k 0"),
        (["--checkpoint", "ck", "--limit", "-1"], "--limit"),
        (["--plot", "nowhere"], "has no metrics.jsonl"),
        (["--nonsense"], "unrecognized"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(checkpoint, capsys, flags, message):
    """Claim: as for train.py.
    Fails if: load_checkpoint lets transformers' error through.
    """
    Path("odd").mkdir()
    Path("odd/config.json").write_text('{"model_type": "odd"}')
    with pytest.raises(SystemExit) as stopped:
        evaluation.run_main(lambda: evaluation.main(flags))
    error = capsys.readouterr().err.strip()
    assert stopped.value.code == 2 and message in error and "\n" not in error


def test_a_conversation_runs_as_the_checkpoint_was_trained(checkpoint):
    """Claim: search_r1.json decides; without one the paper's settings where a corpus is given, else the tiny world's.
    Fails if: load_settings prefers its defaults, or gives a real model fourteen tokens a turn.
    """
    assert (
        evaluation.load_settings("ck")["max_new_tokens"] == 14
        and evaluation.load_settings("ck", "passages.jsonl")["max_new_tokens"] == 500
    )
    Path("ck/search_r1.json").write_text(json.dumps(SETTINGS | {"world_seed": 5, "corpus": None}))
    assert evaluation.load_settings("ck", "passages.jsonl", top_k=7) == SETTINGS | {"world_seed": 5, "corpus": None, "top_k": 7}


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch):
    """Claim: for a model that is no folder and not in the cache the hub is asked once, before transformers begins to try.
    Fails if: reach_hub is not called in load_checkpoint.
    """
    asked = []

    def silent(url):
        asked.append(url)
        raise OSError("no route")

    monkeypatch.setattr(evaluation.huggingface_hub, "get_hf_file_metadata", silent)
    monkeypatch.setattr(evaluation, "AutoModelForCausalLM", None)  # would be an AttributeError
    with pytest.raises(evaluation.Mistake, match="nor in the hub's cache, and the hub does not give it .*no route"):
        evaluation.load_checkpoint("Some/Model-0.5B")
    assert asked == ["https://huggingface.co/Some/Model-0.5B/resolve/main/config.json"]


def test_a_head_that_is_not_plain_is_refused(checkpoint, model, monkeypatch):
    """Claim: a model whose logits are not head(hidden) is refused, since rollout and trainer would be another policy.
    Fails if: load_checkpoint does not compare.
    """
    monkeypatch.setattr(
        type(model),
        "forward",
        lambda self, input_ids, **_: type(
            "Out", (), {"logits": 30 * torch.tanh(self.lm_head(self.model(input_ids=input_ids).last_hidden_state) / 30)}
        ),
    )
    with pytest.raises(evaluation.Mistake, match="not one linear map"):
        evaluation.load_checkpoint("ck")


def test_the_demonstration_runs(capsys):
    """Claim: `python searchr1.py --demo` shows two searches, a dimmed passage and a reward of 1.
    Fails if: the demo's script and its engine no longer fit.
    """
    searchr1.demo()
    out = capsys.readouterr().out
    assert '1(Title: "Ada Lovelace")' in out and '1(Title: "London")' in out
    assert "2 searches" in out and "\033[2m" in out and "reward: 1.0" in out
