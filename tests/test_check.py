"""`check`: what it finds in sound and in faulty runs, and that it leaves everything as it was."""

from __future__ import annotations

import io
import math
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig
from processes import launch
from rich.console import Console
from test_evaluate import length
from tiny import CHAT_TEMPLATE, character_tokenizer, save_tiny_model, sums, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer

from grao_fast import CheckResult, Finding, GRAOConfig, check, train
from grao_fast.checkup import groups
from grao_fast.checkup.findings import LIMITS, percent
from grao_fast.checkup.groups import Failed, GroupFacts
from grao_fast.checkup.on_groups import on_diversity, on_empty_texts, on_ends, on_truncation
from grao_fast.checkup.on_rewards import on_rewards
from grao_fast.checkup.on_rows import on_references, on_template
from grao_fast.checkup.on_step import on_step
from grao_fast.checkup.rows import READ, Row, RowFacts, fit_of, read_rows
from grao_fast.checkup.step import Memory, StepFacts, Times
from grao_fast.cli.commands import build_parser, main
from grao_fast.data.encoder import TokenIds
from grao_fast.data.encoding import Limits, encode_examples
from grao_fast.data.examples import Example
from grao_fast.training.rollout import Rollout

NAN = math.nan
CONFIG = GRAOConfig(
    num_generations=4, max_new_tokens=200, prompts_per_step=8, temperature=1.0, device="cpu"
)


def digits(completions: list[Any]) -> list[float]:
    """The share of digits, of which references have more than samples of a random model."""
    texts = [each[0]["content"] for each in completions]
    return [sum(map(str.isdigit, text)) / max(1, len(text)) for text in texts]


def no_digits(completions: list[Any]) -> list[float]:
    return [-share for share in digits(completions)]


def constant(completions: list[Any]) -> list[float]:
    return [0.5 for _ in completions]


def rarely(completions: list[Any]) -> list[float | None]:
    return [None if n % 5 < 3 else score for n, score in enumerate(digits(completions))]


def nan_at_times(completions: list[Any], answer: list[str]) -> list[float]:
    pairs = zip(answer, digits(completions), strict=True)
    return [NAN if each in "024" else score for each, score in pairs]


def raises(completions: list[Any]) -> list[float]:
    raise RuntimeError("no [bold]judge[/]\x1b[31m there")


def with_prompt(content: str) -> list[dict[str, Any]]:
    return [*sums(6), {"prompt": [{"role": "user", "content": content}], "reference": "7"}]


def run(model: Path, rows: list[dict[str, Any]], reward: Any, **options: Any) -> CheckResult:
    config = CONFIG.replace(**{k: options.pop(k) for k in list(options) if hasattr(CONFIG, k)})
    options = {"check_prompts": 3} | options
    return check(model, rows, reward, config=config, **options)


def the(result: CheckResult, name: str) -> Finding:
    (finding,) = [each for each in result.findings if each.name == name]
    return finding


# ---- runs with a planted defect, and a sound one


def test_a_sound_run_has_no_findings(tiny_model: Path, tmp_path: Path, unchecked: None) -> None:
    output = tmp_path / "output"
    result = run(tiny_model, sums(12), digits, output_dir=output)
    assert {each.verdict for each in result.findings} == {"ok"}
    assert result.ok
    assert result.summary() == f"All {len(result.findings)} findings are ok."
    assert not output.exists()
    assert "2 of 8 prompts, 32 samples" in the(result, "steps").value
    assert "and end in <eos> (12)" in the(result, "template").value
    assert "extrapolated to 8 prompts" in the(result, "step").value
    assert "extrapolated to 2 steps" in the(result, "run").value


DEFECTS: dict[str, tuple[list[dict[str, Any]], Any, dict[str, Any], str, str]] = {
    "constant reward": (sums(9), constant, {}, "dead groups", "the reward is constant, 0.5"),
    "references lose": (
        sums(9), no_digits, {"check_prompts": 5, "reference_advantage": "signed"},
        "references lose", "100% of 5 references",
    ),
    "long prompts": (with_prompt("a" * 600), digits, {}, "prompts", "max_new_tokens=200: row 6"),
    "truncation": (sums(9), digits, {"max_new_tokens": 2}, "truncation", "max_new_tokens=2;"),
    "None": (sums(9), rarely, {}, "no reward", "75% of samples got None"),
    "NaN": (sums(9), nan_at_times, {}, "calls", "nan_at_times returned nan for completion"),
    "error": (sums(9), raises, {}, "calls", "fails for 3 of 3 prompts: reward raises raised"),
    "memory": (sums(9), digits, {"memory_budget_mib": 1}, "memory", "and 1 MiB are there for it"),
    "metric": (
        sums(9), digits, {"eval_dataset": sums(3), "metric": raises}, "metric", "raises raised",
    ),
}  # fmt: skip


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_is_a_failure(defect: str, tiny_model: Path, unchecked: None) -> None:
    rows, reward, options, name, value = DEFECTS[defect]
    result = run(tiny_model, rows, reward, **options)
    assert [each.name for each in result.of("failure")] == [name]
    assert value in the(result, name).value
    assert not result.ok


def test_odd_templates_are_warnings(tmp_path: Path, unchecked: None) -> None:
    """The template begins with two BOS, and ends turns with a token that ends no sample."""
    model = save_tiny_model(tmp_path / "model")
    template = CHAT_TEMPLATE.replace("\n{% endfor", "<end>{% endfor")
    tokenizer = character_tokenizer("<end>", chat_template=template)
    tokenizer.chat_template = "<pad><pad>" + template
    tokenizer.bos_token = "<pad>"
    loaded = AutoModelForCausalLM.from_pretrained(model)
    loaded.resize_token_embeddings(len(tokenizer))
    loaded.save_pretrained(model)
    tokenizer.save_pretrained(model)
    result = run(model, with_prompt("<end>again"), digits)
    found = [each.value for each in result.findings if each.name == "template"]
    assert found[0] == "the prompt begins with two BOS tokens: rows 0, 1, 2 and 4 more"
    assert found[1] == "messages hold the text of special tokens: row 6"
    assert found[2] == "it ends a turn with <end>, which does not end samples"
    assert {each.verdict for each in result.findings if each.name == "template"} == {"warning"}


def test_rewards_that_fail_are_tried_prompt_by_prompt(tiny_model: Path, unchecked: None) -> None:
    def fails_for_three(completions: list[Any], answer: list[str]) -> list[float]:
        return [1 / (each != "3") for each in answer]

    rows = [row for row in sums(20) if row["answer"] in "36"]
    result = check(tiny_model, rows, fails_for_three, config=CONFIG, check_prompts=len(rows))
    wrong = sum(row["answer"] == "3" for row in rows)
    assert 0 < wrong < len(rows)
    assert f"fails for {wrong} of {len(rows)} prompts" in the(result, "calls").value
    assert "reward unknown" in the(result, "step").value

    def only_one(completions: list[Any]) -> list[float]:
        return length(completions)[:5]

    value = the(run(tiny_model, sums(9), only_one), "calls").value
    assert "fails on all prompts together, and on none alone: reward only_one returned 5" in value


def test_a_reward_that_fails_slowly_is_tried_once(
    tiny_model: Path, unchecked: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(groups, "_PATIENCE", -1.0)
    value = the(run(tiny_model, sums(9), raises), "calls").value
    assert value.startswith("fails: reward raises raised RuntimeError")


# ---- what is left as it was


@pytest.mark.parametrize("lora", [False, True])
def test_a_module_is_left_as_it_was(tiny_model: Path, lora: bool) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model).train()
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    frozen = model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    names, config = list(dict(model.named_modules())), model.config.to_dict()
    peft_config = LoraConfig(r=2, target_modules="all-linear") if lora else None
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    result = check(
        model,
        sums(9),
        digits,
        config=CONFIG.replace(max_new_tokens=8, num_iterations=2, kl_coef=0.1),
        tokenizer=tokenizer,
        peft_config=peft_config,
        check_prompts=1,
    )
    assert the(result, "update").verdict == "ok"
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)
    assert list(dict(model.named_modules())) == names
    assert model.config.to_dict() == config
    assert all(module.training for module in model.modules())
    assert bool((model.lm_head.weight.grad == 1).all())
    assert not frozen.requires_grad
    assert frozen.grad is None


def test_output_dir_is_read_alone(tiny_model: Path, tmp_path: Path, unchecked: None) -> None:
    output, config = tmp_path / "run", CONFIG.replace(max_new_tokens=4, max_steps=2, save_steps=1)
    train(tiny_model, sums(9), digits, config=config, output_dir=output)

    def look() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}

    def checked(**options: Any) -> CheckResult:
        options = {"config": config, "check_prompts": 1, "output_dir": output} | options
        return check(tiny_model, sums(9), digits, **options)

    before = look()
    assert "already holds checkpoint-2" in the(checked(), "output_dir").value
    resumed = checked(resume_from_checkpoint=True, config=config.replace(max_steps=5))
    assert "the run resumes from checkpoint-2" in the(resumed, "output_dir").value
    assert "extrapolated to 3 steps" in the(resumed, "run").value
    other = checked(resume_from_checkpoint=True, config=config.replace(max_steps=1))
    assert "has done 2 steps, and this run has 1" in the(other, "checkpoint").value
    assert not other.ok
    in_file = checked(output_dir=output / "summary.json")
    assert "summary.json' is not a folder; choose" in the(in_file, "output_dir").value
    assert look() == before


@pytest.mark.slow
def test_two_processes_find_the_same_and_leave_a_module_whole(
    tiny_model: Path, tmp_path: Path, unchecked: None
) -> None:
    def body(rank: int) -> None:
        result = run(tiny_model, sums(9), digits)
        assert result.ok
        assert "in 2 processes" in the(result, "model").value
        print([each.value for each in result.findings])
        failed = the(run(tiny_model, sums(9), nan_at_times), "calls").value
        assert "fails for 2 of 3 prompts" in failed
        model = AutoModelForCausalLM.from_pretrained(tiny_model)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        tokenizer = AutoTokenizer.from_pretrained(tiny_model)
        assert run(model, sums(9), digits, tokenizer=tokenizer).ok
        assert all(torch.equal(before[name], now) for name, now in model.state_dict().items())

    one, two = launch(body, tmp_path)
    assert (one.status, two.status) == (0, 0), one.stderr + two.stderr
    assert one.stdout == two.stdout


# ---- limits, and findings on facts


def test_the_page_has_the_limits() -> None:
    page = Path(__file__).parents[1] / "docs/check.md"
    if not page.is_file():
        pytest.skip("needs a checkout")
    rows = re.findall(r"^\| ([^|`]+) \| ([^|]+) \| ([^|]+) \|$", page.read_text("utf-8"), re.M)

    def said(limit: float) -> str:
        return {math.inf: "never", math.ulp(0.0): "any"}.get(limit) or f"{100 * limit:g}%"

    shown = {name: (warning, failure) for name, warning, failure in rows}
    assert {
        name: tuple(map(said, limit)) for name, limit in LIMITS.items()
    }.items() <= shown.items()


@pytest.mark.parametrize("name", LIMITS)
def test_limits_are_shares_in_order(name: str) -> None:
    limit = LIMITS[name]
    assert limit.verdict(0.0) == limit.verdict(NAN) == "ok"
    assert limit.verdict(limit.failure) == "failure"
    assert limit.verdict(limit.warning) == (
        "failure" if limit.failure == limit.warning else "warning"
    )
    assert limit.warning <= limit.failure


def test_percentages_are_whole_only_if_exact() -> None:
    shares = (0.0, 1e-9, 0.5, 0.999999, 1.0, NAN)
    assert [percent(each) for each in shares] == ["0%", "1%", "50%", "99%", "100%", "-"]


def sampled(
    rewards: list[list[float]], texts: list[list[str]] | None = None, **facts: Any
) -> GroupFacts:
    rewards_NK = torch.tensor(rewards, dtype=torch.float64)
    G = rewards_NK.shape[1] - 1
    texts = texts or [[f"text {n}" for n in range(G)]] * len(rewards)
    completions = [
        [SimpleNamespace(token_ids=list(text), finished=not text.endswith("!")) for text in group]
        for group in texts
    ]
    prompts = [SimpleNamespace(reference_ids=[1])] * len(rewards)
    advantages_NK = CONFIG.objective_options.formula.advantages(rewards_NK)
    rollout: Any = (prompts, completions, texts, rewards_NK, advantages_NK, {}, {"reward": 0.1})
    scores_FNG = facts.pop("scores_FNG", rewards_NK[None, :, :-1])
    options = {"names": ["r"], "failed": None, "ends": []} | facts
    return GroupFacts(Rollout(*rollout), scores_FNG=scores_FNG, **options)


def verdicts(findings: list[Finding]) -> dict[str, str]:
    return {each.name: each.verdict for each in findings if each.verdict != "ok"}


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        ([[0, 1, 2]] * 4, {}),
        ([[1, 1, 1], [0, 1, 2]], {"dead groups": "warning"}),
        ([[1, 1, 1]] * 9 + [[0, 1, 2]], {"dead groups": "failure"}),
        ([[1, 1, 2], [0, 1, 2]], {"samples alike": "warning"}),
        ([[1, 3, 1.9], [0, 1, 2]], {"references lose": "warning"}),
        ([[1, 3, 2.1], [0, 1, 2]], {}),
        ([[1, 3, 0], [0, 1, -2]] * 3, {"references lose": "failure"}),
        ([[1, 3, 0], [0, 1, -2]] * 2, {"references lose": "warning"}),  # too few prompts
        ([[NAN, 1, 2], [0, 1, 2]], {"no reward": "warning"}),
        ([[0, 1, NAN], [0, 1, 2]], {"no reward": "failure"}),  # half of the references
        ([[NAN, NAN, 1]] * 2, {"no reward": "failure"}),
    ],
)
def test_rewards(rewards: list[list[float]], expected: dict[str, str]) -> None:
    objective = CONFIG.replace(reference_advantage="signed").objective_options
    assert verdicts(on_rewards(sampled(rewards), objective)) == expected


def test_references_that_lose_are_a_warning_where_they_are_not_pushed_down() -> None:
    for name in ("clip", "floor"):
        objective = CONFIG.replace(reference_advantage=name).objective_options
        assert verdicts(on_rewards(sampled([[1, 3, 0]] * 6), objective)) == {
            "references lose": "warning"
        }


def test_one_of_several_functions_is_constant() -> None:
    scores_FNG = torch.tensor([[[0.0, 1.0]], [[2.0, 2.0]]])
    facts = sampled([[2, 3, 2.5]], scores_FNG=scores_FNG, names=["a", "b"])
    (warning,) = [f for f in on_rewards(facts, CONFIG.objective_options) if f.verdict != "ok"]
    assert (warning.name, warning.value) == ("constant function", "b gives every sample 2")


def test_metrics_of_rewards_are_shown() -> None:
    facts = sampled([[0, 1, 2]], measured={"rewards/judge/cost": 0.0125})
    (own,) = [f for f in on_rewards(facts, CONFIG.objective_options) if f.name == "own metrics"]
    assert own.value == "of 1 prompts: judge/cost 0.0125"


def test_failed_rewards_are_not_counted_as_none() -> None:
    facts = sampled([[NAN, NAN, NAN]], failed=Failed(1, 1, "reward r raised"))
    assert verdicts(on_rewards(facts, CONFIG.objective_options)) == {"calls": "failure"}


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["a", "bb"], {}),
        (["a", "a"], {"diversity": "failure"}),
        (["a", ""], {"empty texts": "warning"}),
        (["a", "b!"], {"truncation": "warning"}),
        (["a!", "b!"], {"truncation": "failure"}),
    ],
)
def test_samples(texts: list[str], expected: dict[str, str]) -> None:
    facts = sampled([[0, 1, 2]], [texts])
    found = [on_truncation(facts, CONFIG.sampling), on_empty_texts(facts), on_diversity(facts)]
    assert verdicts(found) == expected


def test_samples_that_never_end_as_references_do() -> None:
    facts = sampled([[0, 1, 2]], ends=["<eot>", "<eot>"])
    assert on_ends(facts, ["<eot>", "<eos>"]) == on_ends(facts, []) == []
    (warning,) = on_ends(facts, ["<eos>"])
    assert warning.value == "samples end in <eot>, references in <eos>"


def facts_of_rows(references: list[int], **facts: Any) -> RowFacts:
    ids = [TokenIds([5], [6] * length, "") for length in references]
    rows = [Row(n, Example("p", None, {}), each, "fits") for n, each in enumerate(ids)]
    empty = {"refused": {}, "exceptions": {}, "cut": [], "doubled": [], "special": []}
    more = {"total": len(rows), "ends": Counter(), "ends_of_turns": [], "context": 100}
    return RowFacts(rows=rows, **(empty | more | facts))


@pytest.mark.parametrize(
    ("references", "facts", "verdict", "value"),
    [
        ([3, 5], {}, "ok", "median 4, longest 5 tokens"),
        ([3, 0], {}, "warning", "50% of rows have none"),
        ([3, 3], {"cut": [1]}, "failure", "50% are cut to None"),
        ([3, 300], {}, "warning", "50% are longer than max_new_tokens=200"),
    ],
)
def test_references(references: list[int], facts: Any, verdict: str, value: str) -> None:
    finding = on_references(facts_of_rows(references, **facts), CONFIG.sampling)
    assert finding.verdict == verdict
    assert value in finding.value


@pytest.mark.parametrize(
    ("facts", "verdict", "value"),
    [
        ({"refused": {1: "no system turn"}}, "failure", r"refuses (no system turn): row 1"),
        ({"exceptions": {"no prefix": [0, 1]}}, "warning", "another beginning"),
        ({"exceptions": {"merged": [1]}}, "warning", "would merge with the reference: row 1"),
    ],
)
def test_templates(facts: Any, verdict: str, value: str) -> None:
    (finding,) = on_template(facts_of_rows([1, 1], **facts))
    assert finding.verdict == verdict
    assert value in finding.value


@pytest.mark.parametrize(
    ("weights", "reward", "expected"),
    [
        (10, 1.0, {}),
        (900, 1.0, {"memory": "warning"}),
        (1000, 1.0, {"memory": "failure"}),
        (10, 3.0, {"step": "warning"}),
        (10, None, {}),
    ],
)
def test_memory_and_time(weights: int, reward: float | None, expected: dict[str, str]) -> None:
    memory = Memory(weights, 10, 20, 0, 30.0, groups=1, device=1000)
    times = Times(4, 0.5, sample=1.0, reward=reward, update=1.0, tflops=0.1)
    findings = on_step(StepFacts(64, memory, times), steps=7200)
    assert verdicts(findings) == expected
    if reward == 1.0:
        assert "extrapolated to 7,200 steps: 6.0 hours" in findings[-1].value


def test_an_update_that_diverges_is_a_failure() -> None:
    memory = Memory(10, 10, 20, 0, 30.0, groups=1, device=1000)
    findings = on_step(StepFacts(64, memory, None, "the gradient's norm is nan"), steps=1)
    assert verdicts(findings) == {"update": "failure"}


# ---- rows


def loaded_with(context: int | None, rows: int) -> Any:
    tokenizer = character_tokenizer()
    return SimpleNamespace(
        tokenizer=tokenizer,
        eos_token_ids=frozenset([1]),
        context_length=context,
        embedding_rows=rows,
    )


@pytest.mark.parametrize(
    ("prompt", "reference", "context", "options", "expected"),
    [
        ("ab", "cd", 10, {"max_new_tokens": 8}, "fits"),
        ("ab", "cd", 10, {"max_new_tokens": 9}, "no room"),
        ("ab", "cdefghij", 10, {"max_new_tokens": 8}, "beyond"),
        ("ab", "cdefghij", 10, {"max_new_tokens": 8, "max_reference_length": 8}, "fits"),
        ("abcd", "a", 10, {"max_new_tokens": 8, "max_prompt_length": 3}, "dropped"),
        ("", "a", 10, {"max_new_tokens": 8}, "blank"),
        ("ab:", "c", None, {"max_new_tokens": 8}, "unknown"),
        ("ab", "cdefghi", 10, {"objective": "sft", "num_generations": 8}, "fits"),
        ("ab", "cdefghij", 10, {"objective": "sft", "num_generations": 8}, "beyond"),
        ("abcdefghij", "c", 10, {"objective": "sft", "num_generations": 8}, "no room"),
    ],
)
def test_rows_fit_as_training_finds(
    prompt: str, reference: str, context: int | None, options: Any, expected: str
) -> None:
    size = len(character_tokenizer())
    loaded = loaded_with(context, size - 2 if expected == "unknown" else size)
    sampling, example = CONFIG.replace(**options).sampling, Example(prompt, reference, {})
    (row,) = read_rows([example], loaded, sampling, seed=0).rows
    assert row.fit == fit_of(row.ids, loaded, sampling) == expected
    limits = Limits(
        sampling.max_new_tokens,
        context,
        sampling.max_prompt_length,
        sampling.max_reference_length,
        loaded.embedding_rows,
        sampling.samples_drawn,
    )
    if expected == "fits":
        (encoded,) = encode_examples([example], loaded.tokenizer, limits, eos_token_ids=[1])
        assert row.encoded == encoded
    else:
        with pytest.raises(ValueError):
            encode_examples([example], loaded.tokenizer, limits, eos_token_ids=[1])


def test_of_many_rows_the_longest_are_read() -> None:
    examples = [Example("a" * (2 if n != 2345 else 9), "b", {}) for n in range(3 * READ)]
    facts = read_rows(
        examples, loaded_with(10, 99), CONFIG.replace(max_new_tokens=2).sampling, seed=0
    )
    assert (facts.total, len(facts.rows)) == (3 * READ, READ)
    assert [row.number for row in facts.that("no room")] == [2345]
    assert facts.share("no room") == 1 / facts.total
    assert facts.ends == {"<eos>": READ}
    options = CONFIG.replace(max_reference_length=1).sampling
    assert read_rows(examples[:3], loaded_with(None, 99), options, seed=0).ends == {}
    assert facts.share("fits") == pytest.approx(1 - 1 / facts.total)


# ---- the table and the command


def test_tables_fit_and_hold_no_markup() -> None:
    findings = [
        Finding("data", "prompts", "ok", "[red]a[/] \x1b[2J" + "word " * 40),
        Finding("step", "memory", "failure", "x" * 200, "do\nthis"),
    ]
    result = CheckResult(tuple(findings))
    for width in (80, 120):
        text = io.StringIO()
        Console(file=text, width=width).print(result.table())
        lines = text.getvalue().splitlines()
        assert max(map(len, lines)) <= width
        assert "[red]a[/] \\x1b[2J" in text.getvalue()
        assert "\x1b" not in text.getvalue()
        assert "-> do this" in text.getvalue()
        assert lines[-1].strip() == "1 failure among 2 findings."
    assert result.to_dict()["findings"][1]["remedy"] == "do\nthis"


def test_check_has_the_options_of_train() -> None:
    _, commands = build_parser()
    assert commands["check"].hints.keys() - commands["train"].hints.keys() == {"check_prompts"}
    assert commands["train"].hints.keys() <= commands["check"].hints.keys()


REWARDS = """
def letters(completions):
    return [len(set(each[0]["content"])) for each in completions]

def same(completions):
    return [1.0 for _ in completions]
"""


@pytest.mark.parametrize(("reward", "status"), [("letters", 0), ("same", 1)])
def test_the_command_prints_a_table_and_returns_a_status(
    reward: str,
    status: int,
    tiny_model: Path,
    tmp_path: Path,
    unchecked: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "sums.jsonl", sums(9))
    (tmp_path / "rewards.py").write_text(REWARDS)
    command = (
        f"check --model {tiny_model} --dataset sums.jsonl --reward rewards.py:{reward} "
        "--device cpu --num_generations 2 --max_new_tokens 60 --check_prompts 2 "
        "--reference_advantage clip"
    )
    assert main(command.split()) == status
    printed = capsys.readouterr().out
    assert ("failure   dead groups" in printed) == bool(status)
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix) == [
        "rewards.py",
        "sums.jsonl",
    ]
    assert not (tmp_path / "grao-output").exists()


def test_wrong_numbers_of_prompts_are_refused(tiny_model: Path) -> None:
    for wrong in (0, 2.5, True):
        with pytest.raises(ValueError, match="check_prompts must be a whole number"):
            check(tiny_model, sums(3), digits, config=CONFIG, check_prompts=wrong)  # pyright: ignore
