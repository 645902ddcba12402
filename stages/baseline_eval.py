"""Baseline evaluation: score one model as it is, before any training, on test and validation queries.

Usage   python stages/baseline_eval.py base|reference   (models.base or models.reference in params.yaml)
Reads   data/prepared/{validation,test,corpus}.jsonl
Writes  metrics/<baseline>.json, data/rankings/<baseline>.jsonl: of the test; metrics/validation/<baseline>.json
        metrics/environment/baseline_eval@<baseline>.json: what it ran on, the model's prompts, and what it cuts
"""

import argparse

from shared import records, sources
from shared.errors import run
from shared.params import read_params


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("baseline", choices=["base", "reference"])
    baseline = parser.parse_args().baseline
    params = read_params()
    model_name = params.models.base if baseline == "base" else params.models.reference
    validation, test, corpus = records.read_split("validation"), records.read_split("test"), records.read_corpus()
    folder = None if model_name == "bm25" else sources.model_folder(model_name, baseline)

    # Ten seconds of imports: after the checks above, so that errors come at once.
    from shared import encoders, environment, retrieval

    # One search for both, so that the passages are encoded once.
    evaluator = retrieval.make_evaluator(validation + test, corpus, params.evaluate.batch_size, keep_rankings=True)
    if folder is None:
        rankings = retrieval.search_with_bm25(evaluator)
        machine = environment.describe("bm25s", "PyStemmer")
    else:
        model = encoders.load_encoder(folder, model_name)
        rankings = retrieval.search_with_encoder(evaluator, model, encoders.devices())
        carried = [model_name.removeprefix("package:")] if model_name.startswith("package:") else []
        machine = environment.describe(*carried) | {"similarity": model.similarity_fn_name}
        machine |= encoders.what_it_reads(model, list(corpus.values()))
    of_validation, of_test = rankings[: len(validation)], rankings[len(validation) :]
    metrics, on_validation = retrieval.mean_scores(of_test, test), retrieval.mean_scores(of_validation, validation)

    records.write_jsonl(records.RANKINGS / f"{baseline}.jsonl", of_test)
    records.write_json(records.METRICS / f"{baseline}.json", metrics)
    records.write_json(records.METRICS / f"validation/{baseline}.json", on_validation)
    records.write_json(records.ENVIRONMENT / f"baseline_eval@{baseline}.json", machine)
    print(f"{model_name}: NDCG@10 {metrics['ndcg@10']:.4f}, MRR@10 {metrics['mrr@10']:.4f} on {len(test):,} queries")


if __name__ == "__main__":
    run(main)
