"""Final evaluation: score the fine-tuned model as the baselines were, and report what training gained.

Reads   models/finetuned, data/prepared/{test,corpus}.jsonl, metrics/{data,base,reference}.json, the data card
Writes  metrics/finetuned.json, metrics/gain.json, metrics/report.md, data/rankings/finetuned.jsonl
"""

from typing import TYPE_CHECKING, Any

from tabulate import tabulate

from shared import cards, records, sources
from shared.errors import InputError, run
from shared.params import Params, read_params

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

NAME = "models/finetuned"


def main() -> None:
    params = read_params()
    card = cards.read_card(params.prepare.card)
    test, corpus = records.read_split("test"), records.read_corpus()
    data, base, reference = (records.read_metrics(name) for name in ("data", "base", "reference"))
    model = load_finetuned()

    from shared import retrieval

    evaluator = retrieval.make_evaluator(test, corpus, params.evaluate.batch_size, "test", keep_rankings=True)
    finetuned, rankings = retrieval.search_with_encoder(evaluator, model)
    gains = {metric: gain(base[metric], finetuned[metric]) for metric in finetuned}
    report = write_report(params, card, data, base, reference, finetuned)

    records.write_jsonl(records.RANKINGS / "finetuned.jsonl", rankings)
    records.write_json(records.METRICS / "finetuned.json", finetuned)
    records.write_json(records.METRICS / "gain.json", gains)
    records.write_text(records.METRICS / "report.md", report)
    print(f"{NAME}: NDCG@10 {finetuned['ndcg@10']:.4f}, {gains['ndcg@10']['absolute']:+.4f} against the base model")


def load_finetuned() -> "SentenceTransformer":
    """The model that train wrote. Raises InputError."""
    try:
        sources.check_model(records.FINETUNED, NAME)
        from shared import encoders  # ten seconds of imports: after the check, so that its error comes at once

        return encoders.load_encoder(records.FINETUNED, NAME)
    except InputError as error:
        remedy = "`dvc checkout --force` brings the last one back, `dvc repro --force train` trains it again"
        raise InputError(f"{error}\n{remedy}") from error


def gain(before: float, after: float) -> dict[str, float | None]:
    """`absolute` in the metric's own unit; `relative` to the base's score (0.1 is 10%), None where that is 0."""
    absolute = round(after - before, records.DIGITS)
    return {"absolute": absolute, "relative": round(absolute / before, records.DIGITS) if before else None}


def write_report(
    params: Params, card: cards.Card, data: dict[str, Any], base: dict, reference: dict, finetuned: dict
) -> str:
    """The result as a person reads it: one table, then what was run on what."""
    models = [
        ("base", params.models.base, base),
        ("reference", params.models.reference, reference),
        ("fine-tuned", f"{params.models.base}, fine-tuned", finetuned),
    ]
    table = tabulate(
        [
            [role, name, scores["mrr@10"], scores["ndcg@10"], "" if role == "base" else change(base, scores)]
            for role, name, scores in models
        ],
        headers=["", "model", "MRR@10", "NDCG@10", "change in NDCG@10"],
        tablefmt="github",
        floatfmt=".4f",
    )
    rows, train = data["rows"], params.train
    arguments = "".join(f", {name} {value}" for name, value in train.arguments.items())
    return f"""# Result

{table}

{rows["test"]:,} test queries over {data["passages"]:,} passages; change is against the base model. With so many \
queries a score is known to ±{widest_interval(rows["test"]):.3f} or better (95%).

**Data** `{data["card"]}`: {card.title}. Revision {data["revision"]}; {rows["train"]:,} training, \
{rows["validation"]:,} validation and {rows["test"]:,} test rows.
Licence: {card.licence}. Source: {card.citation}.

**Training** MultipleNegativesRankingLoss, learning rate {train.learning_rate:g}, {train.epochs:g} epoch(s), batch \
{train.batch_size}, warm-up {train.warmup:g}, precision {train.precision}, seed {train.seed}{arguments}. The \
validation rows chose the checkpoint.
"""


def widest_interval(queries: int) -> float:
    """Half of the 95% interval of a mean of scores between 0 and 1, whose standard deviation is 0.5 at the most."""
    return 1.96 * 0.5 / queries**0.5


def change(base: dict[str, float], scores: dict[str, float]) -> str:
    """The change in NDCG@10 in words: "+0.0420 (+7.1%)"."""
    by = gain(base["ndcg@10"], scores["ndcg@10"])
    return f"{by['absolute']:+.4f}" + ("" if by["relative"] is None else f" ({by['relative']:+.1%})")


if __name__ == "__main__":
    run(main)
