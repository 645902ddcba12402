"""Gate: fail unless the committed result is of this code and these params, and the gain is as large as asked for.

For CI, and no stage of dvc.yaml: there it would stop the pipeline before the metrics can be read.

Reads   what `shared.status` reads: dvc.lock, metrics/, params.yaml, the code, requirements.txt; no data or models
"""

from typing import Any, Literal

from shared import records, status
from shared.errors import InputError, run
from shared.params import Metric, read_params
from shared.significance import FEW_GROUPS


def main() -> None:
    mismatches = status.mismatches()
    if mismatches:
        print("\n".join(mismatches))
        raise InputError(
            "the result is not of this state, as listed above; `dvc repro` (of other packages: `--force`), then commit"
        )
    print("metrics/, dvc.lock, params.yaml and the code belong together")
    evaluate = read_params().evaluate
    print(gain_in_words(records.read_metrics("gain"), evaluate.primary_metric, evaluate.minimum_gain))


def gain_in_words(gains: dict[str, Any], metric: Metric, minimum: float | Literal["off"]) -> str:
    """What metrics/gain.json says against evaluate.minimum_gain. Raises InputError where it is not more than that."""
    if minimum == "off":
        return "evaluate.minimum_gain is off: no gain is asked for"
    gain = gains["over_base"][metric]
    words = f"the gain over the base model is {gain['gain']:+.4f} {metric}, 95% from {gain['low']:+.4f}"
    groups = gains["test"]["effective_groups"]
    if groups < FEW_GROUPS:
        raise InputError(f"{words}, but test queries that weigh as few as {groups} groups are too few to rely on it")
    if gain["low"] <= minimum:
        raise InputError(f"{words}, and evaluate.minimum_gain asks for more than {minimum:+g}")
    return f"{words}: more than evaluate.minimum_gain, {minimum:+g}"


if __name__ == "__main__":
    run(main)
