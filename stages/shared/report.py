"""The result in words: metrics/report.md."""

from typing import Any

import numpy as np
from tabulate import tabulate

from shared.cards import Card
from shared.params import Metric, Params, TrainParams
from shared.significance import FEW_GROUPS, RESAMPLES, Comparison

LONGEST_TEXT = 240  # characters of a passage in an example
ALPHA = 0.05  # significance level: below this p a difference is called one, where the 95% interval agrees
MODELS = {"base": "base", "reference": "reference", "finetuned": "fine-tuned"}
HEADLINE_END = "## How sure"  # what stands before it is also the head of the pull request's comment
PICTURES = {
    "scores": "Scores of base, reference and fine-tuned model with 95% intervals",
    "ranks": "Queries by the rank of their passage before and after",
    "recall": "Recall at k from 1 to 100",
    "length": "Gain over the base model by query length",
    "training": "Training loss, and score on validation rows by step",
}


def title(metric: Metric) -> str:
    """As people write it: NDCG@10, accuracy@1."""
    return metric if metric.startswith("accuracy") else metric.upper()


def headline_metrics(primary: Metric) -> list[Metric]:
    """What tables and pictures show, the primary metric first."""
    return list(dict.fromkeys([primary, "ndcg@10", "mrr@10", "accuracy@1", "accuracy@10"]))


def verdict(comparison: Comparison, metric: Metric, model: str, other: str, queries: int) -> str:
    """What the statistics say: "It is better than the base model by 0.041 NDCG@10 (95% 0.022 to 0.060)"."""
    gain, low, high, p = comparison
    if low > 0 and p < ALPHA:
        return f"{model} is better than {other} by {gain:.3f} {title(metric)} (95% {low:.3f} to {high:.3f})"
    if high < 0 and p < ALPHA:
        return f"{model} is worse than {other} by {-gain:.3f} {title(metric)} (95% {-high:.3f} to {-low:.3f})"
    return (
        f"{model} and {other}: no difference that {queries:,} queries can show"
        f" ({gain:+.3f} {title(metric)}, 95% {low:+.3f} to {high:+.3f})"
    )


def write_report(
    params: Params,
    card: Card,
    data: dict[str, Any],
    scores: dict[str, dict[str, float]],
    intervals: dict[str, tuple[float, float]],
    gains: dict[str, Any],
    training: dict[int, dict[str, float]],
    environments: dict[str, dict[str, Any]],
    examples: dict[str, list[dict[str, Any]]],
    environment: dict[str, Any],
) -> str:
    """`scores` and `intervals` (of the primary metric) are by model: base, reference, finetuned; `gains` is gain.json,
    `training` metrics/train/ by seed; `environments` are those of the baselines; `examples` lists of {"query",
    "passage", "before", "after", "first_before", "first_after"}, before and after being ranks, and first_… None where
    it is the right passage.
    """
    metric, queries = params.evaluate.primary_metric, data["rows"]["test"]
    return f"""# Result

{headline(params, data, gains)}

{score_table(params, scores, intervals)}

{groups_in_words(gains)}, {data["passages"]:,} passages to search.{dropped_in_words(data, card)}{mended_in_words(data)}

Of a query whose right passage has rank r, NDCG@10 is 1 / log2(1 + r) and MRR@10 is 1 / r, beyond rank ten 0; \
accuracy@k: share of the queries whose passage is among the first k.

{picture("scores")}
{picture("ranks")}

{HEADLINE_END}

{gain_table(metric, gains)}

The primary metric is named in params.yaml; the others are for orientation, since of many metrics one may differ by \
luck. Each query has one right passage, so that accuracy@k is also recall@k. Intervals: bootstrap over the groups, \
whose queries stand or fall together; p: paired randomization test over the groups. \
{seeds_in_words(metric, gains)}

{robustness_table(metric, gains)}

{picture("recall")}
{picture("length")}

## What gained and what lost

{example_list("gained", examples["gained"], params.train.seeds)}

{example_list("lost", examples["lost"], params.train.seeds)}

## What was run

**Data** `{data["card"]}`: {card.title}. Revision {data["revision"]}; {data["rows"]["train"]:,} training, \
{data["rows"]["validation"]:,} validation and {queries:,} test rows. Near-duplicates are texts whose sets of \
three-letter sequences have a Jaccard similarity of {params.prepare.near_duplicate_similarity:g} or more. The largest \
group of rows that share texts has {data["largest_group"]:,}.
Licence: {card.licence}. Source: {card.citation}.

**Training** {training_in_words(params.train)} {chosen_in_words(params.train, training)}

**Method** AdamW with a weight decay of 0, betas of 0.9 and 0.999 and gradients cut to a norm of 1, and a rate that \
falls linearly to 0 after the warm-up, unless the arguments above say otherwise. Scale and hardness (which weighs the \
passages that are wrong for a query, not the queries that are wrong for a passage) are for cosines; of another \
similarity both are divided by the scale. Each query is searched for among the passages of all splits, 100 are kept, \
and equal scores rank in the order of the passages' ids. bm25: Lucene's variant, k1 1.5, b 0.75, English stop words \
and stemmer. Intervals: percentile bootstrap of {RESAMPLES:,} draws, expanded as the t distribution asks. p: \
two-sided, of {RESAMPLES:,} random swaps, so that none is below {2 / (RESAMPLES + 1):g}.

**Input** {reading_in_words(environments, data["passages"])}

{picture("training")}

**Environment** of this evaluation, {", ".join(f"{name} {value}" for name, value in environment.items())}; of \
training and of the baselines, see metrics/environment/.
"""


def headline(params: Params, data: dict[str, Any], gains: dict[str, Any]) -> str:
    metric, counts = params.evaluate.primary_metric, gains["over_base"]["queries"]
    queries, groups = gains["test"]["queries"], gains["test"]["effective_groups"]
    over_base, over_reference = (Comparison(**gains[f"over_{role}"][metric]) for role in ("base", "reference"))
    reference = f"the reference ({params.models.reference})"
    unseen = gains["over_reference"].get("without_near_duplicates")
    seeds = len(params.train.seeds)
    return (
        f"**{verdict(over_base, metric, 'The fine-tuned model', 'the base model', queries)}."
        f" {near_duplicates_in_words(gains, data)}** {verdict(over_reference, metric, 'It', reference, queries)}"
        f"{'; without them ' + gain_and_p(unseen)[0] if unseen else ''}."
        f" By {title(metric)}, {counts['wins']:,} queries gain over the base model, {counts['ties']:,} stay the same,"
        f" {counts['losses']:,} lose{f' (mean of {seeds} seeds)' if seeds > 1 else ''}.{few_in_words(groups)}"
    )


def groups_in_words(gains: dict[str, Any]) -> str:
    queries, groups, effective = (gains["test"][name] for name in ("queries", "groups", "effective_groups"))
    weigh = f"; they weigh as much as {effective:,} of one size" if effective < groups else ""
    return f"{queries:,} test queries in {groups:,} groups (of rows that share a text{weigh})"


def few_in_words(groups: int) -> str:
    few = f" **The queries weigh as few as {groups} groups of one size: the intervals are too narrow.**"
    return few if groups < FEW_GROUPS else ""


def near_duplicates_in_words(gains: dict[str, Any], data: dict[str, Any]) -> str:
    counts, view = data["near_duplicates"], gains["over_base"].get("without_near_duplicates")
    rows, by = counts["rows"], f" ({counts['queries']:,} by their query, {counts['passages']:,} by their passage)"
    alike = f"{rows:,} of {data['rows']['test']:,} test rows are near-duplicates of training or validation rows"
    alike += by if rows else ""
    if view:
        return f"{alike}; without them the gain is {gain_and_p(view)[0]}."
    return f"{alike}: too few groups are left without them, so this test may measure memory." if rows else f"{alike}."


def picture(name: str) -> str:
    return f"![{PICTURES[name]}](plots/{name}.svg)"


def score_table(params: Params, scores: dict[str, dict[str, float]], intervals: dict[str, tuple[float, float]]) -> str:
    primary, *others = headline_metrics(params.evaluate.primary_metric)
    names = {"base": params.models.base, "reference": params.models.reference}
    names["finetuned"] = f"{params.models.base}, fine-tuned"
    rows = []
    for model, role in MODELS.items():
        own, between = scores[model], "{:.3f} to {:.3f}".format(*intervals[model])
        rows.append([role, names[model], f"{own[primary]:.4f}", between, *(f"{own[metric]:.4f}" for metric in others)])
    return table(rows, ["", "model", title(primary), "95% interval", *map(title, others)])


def gain_table(primary: Metric, gains: dict[str, Any]) -> str:
    over = gains["over_base"], gains["over_reference"]
    rows = [[f"**{title(primary)}** (primary)", *gain_and_p(over[0][primary]), *gain_and_p(over[1][primary])]]
    rows += [
        [f"{title(metric)} (secondary)", *(text for one in over for text in gain_and_p(one["secondary"][metric]))]
        for metric in over[0]["secondary"]
    ]
    return table(rows, ["gain of the fine-tuned model", "over base (95%)", "p", "over reference (95%)", "p"])


def robustness_table(metric: Metric, gains: dict[str, Any]) -> str:
    """Does the gain stand without queries that training nearly saw, and under the other protocol for duplicates?"""
    names = {
        "without_near_duplicates": "without the near-duplicates of training and validation rows",
        "near_duplicates_together": "test rows that are near-duplicates of each other count as one group",
        "one_document_a_row": "one document a row: another row's identical passage is a miss",
        "identical_passages_merged": "identical passages are one document",
    }
    over_base, over_reference = gains["over_base"], gains["over_reference"]
    rows = []
    for name in [name for name in names if name in over_base]:
        base, reference = over_base[name], over_reference[name]
        counts = [f"{base[count]:,}" for count in ("queries", "groups")]
        scores = [f"{score:.4f}" for score in (base["before"], reference["before"], base["after"])]
        few = " (too few groups: intervals are too narrow)" if base["effective_groups"] < FEW_GROUPS else ""
        rows.append([names[name] + few, *counts, *scores, gain_and_p(base)[0], gain_and_p(reference)[0]])
    headers = ["queries", "groups", "base", "reference", "fine-tuned", "over base (95%)", "over reference (95%)"]
    return table(rows, [f"{title(metric)} if …", *headers]) if rows else ""


def seeds_in_words(metric: Metric, gains: dict[str, Any]) -> str:
    by_seed = gains["seeds"]
    if len(by_seed) == 1:
        return "One seed: its luck is not in the intervals; train.seeds takes more."
    each = ", ".join(f"{name} {score:.4f}" for name, score in by_seed.items())
    return f"The intervals are over seeds too; p holds them fixed. {title(metric)} by seed: {each}."


def gain_and_p(comparison: dict[str, float]) -> tuple[str, str]:
    words = "{gain:+.3f} ({low:+.3f} to {high:+.3f})".format(**comparison)
    return words, p_in_words(comparison["p_value"])


def p_in_words(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def example_list(what: str, examples: list[dict[str, Any]], seeds: list[int]) -> str:
    if not examples:
        return f"No query {what}."
    of_seed = f" with seed {seeds[0]}" if len(seeds) > 1 else ""
    lines = [
        f"The {len(examples)} queries that {what} most{of_seed}; rank of the right passage, base → fine-tuned:",
        "",
    ]
    for number, one in enumerate(examples, start=1):
        lines += [
            # The ranks first: after a query in Arabic or Hebrew they would run from right to left.
            f"{number}. rank {rank_in_words(one['before'])} → {rank_in_words(one['after'])}: {quoted(one['query'])}",
            f"   - right: {quoted(one['passage'])}",
        ]
        lines += [
            f"   - first by {model}: {quoted(one[key])}"
            for model, key in (("base", "first_before"), ("fine-tuned", "first_after"))
            if one[key] is not None
        ]
    return "\n".join(lines)


def rank_in_words(rank: float) -> str:
    return f"{rank:.0f}" if np.isfinite(rank) else "over 100"


def quoted(text: str) -> str:
    """As code, so that nothing in a user's text is taken for Markdown, HTML or the name of a person to notify."""
    short = text if len(text) <= LONGEST_TEXT else text[:LONGEST_TEXT] + "…"
    return "`" + short.replace("`", "'") + "`"


def dropped_in_words(data: dict[str, Any], card: Card) -> str:
    dropped = data["dropped_rows"]
    reasons = {
        "empty": "empty",
        "duplicate": "the same twice",
        "word_overlap": f"over {card.max_word_overlap:g} of the query's words are in its passage: easy to find",
    }
    words = [f"{dropped[reason]:,} ({text})" for reason, text in reasons.items() if dropped[reason]]
    return f" Rows dropped before the split: {', '.join(words)}." if words else ""


def mended_in_words(data: dict[str, Any]) -> str:
    rows, kinds = data["unusual_rows"], ("control_characters", "lone_surrogates", "invisible_marks")
    words = [f"{rows[kind]:,} ({kind.replace('_', ' ')})" for kind in kinds if rows[kind]]
    return f" Rows mended: {', '.join(words)}." if words else ""


def training_in_words(train: TrainParams) -> str:
    seeds = ("seed " if len(train.seeds) == 1 else "seeds ") + ", ".join(map(str, train.seeds))
    return f"{recipe_in_words(train)}, {seeds}."


def recipe_in_words(train: TrainParams) -> str:
    arguments = "".join(f", {name} {value}" for name, value in train.arguments.items())
    processes = f" over {train.processes} processes" if train.processes > 1 else ""
    hardness = f", hardness {train.hardness:g}" if train.hardness else ""
    loss = f"{'symmetric ' if train.symmetric else ''}MultipleNegativesRankingLoss, scale {train.scale:g}{hardness}"
    share = f", backward for {train.gradient_share:.6g} of the squared gradient" if train.gradient_share < 1 else ""
    dropout = "the model's own" if train.dropout == "model" else f"{train.dropout:g}"
    steps = f"warm-up {train.warmup:g}, dropout {dropout}, precision {train.precision}"
    return (
        f"{loss}, learning rate {train.learning_rate:g}, epochs {train.epochs:g}, batch"
        f" {train.batch_size}{processes}{share}, {steps}{arguments}"
    )


def chosen_in_words(train: TrainParams, training: dict[int, dict[str, float]]) -> str:
    """What is best on the validation rows, and of what; `training` is metrics/train/ by seed."""
    steps = f"The best of {train.evaluations} steps on validation rows" if train.evaluations > 1 else "The last step"
    shares = f", with 0 or {train.base_share:g} of the base model's weights, as scores better on validation rows"
    with_share = " with {:g}" if train.base_share else ""
    chosen = "; ".join(
        f"step {own['step']}{with_share.format(own['base_share'])} (seed {seed}, {own['precision']})"
        for seed, own in training.items()
    )
    left_out = max(own["left_out_at_least"] for own in training.values())
    repeated = f" Each epoch leaves out {left_out:,} training rows or more: they fill no batch that has each text once."
    return f"{steps}{shares if train.base_share else ''}: {chosen}.{repeated if left_out else ''}"


def reading_in_words(environments: dict[str, dict[str, Any]], passages: int) -> str:
    """The prompts of the baselines, and what they do not read; nothing of BM25, which has neither."""
    sentences = []
    for model, names in {"base": "Base and fine-tuned model", "reference": "Reference"}.items():
        own = environments[model]
        if "query prompt" not in own:
            continue
        prompts = {role: own[f"{role} prompt"] for role in ("query", "passage")}
        text = ", ".join(f"{quoted(prompt)} before a {role}" for role, prompt in prompts.items() if prompt)
        cut = f"; {own['passages cut']:,} of {passages:,} passages cut" if "passages cut" in own else ""
        limit = f" to the first {own['token limit']:,} tokens" if cut else ""
        share = own.get("unknown tokens", 0)
        unknown = f"; {share:.0%} of their tokens unknown" if share >= 0.01 else ""
        similarity = f"compared by {own['similarity']}"
        sentences.append(f"{names}: {similarity}; {text or 'no prompts'}{cut}{limit}{unknown}.")
    return " ".join(sentences)


def table(rows: list[list[Any]], headers: list[str]) -> str:
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)
