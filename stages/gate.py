"""Gate: fail unless the whole interval of the gain over the base model lies above evaluate.minimum_gain.

For CI, and no stage of dvc.yaml: there it would stop the pipeline before the metrics can be read.

Reads   params.yaml, metrics/gain.json, and what `dvc status` reads: a result of other code or params is none
"""

from shared import records, report, status
from shared.errors import InputError, run
from shared.params import read_params


def main() -> None:
    evaluate = read_params().evaluate
    metric, minimum = evaluate.primary_metric, evaluate.minimum_gain
    if minimum == "off":
        print("evaluate.minimum_gain is off: no gain is asked for")
        return
    changed = status.out_of_date()
    if changed:
        raise InputError(f"metrics/ are of an earlier state ({changed[0]} has changed); `dvc repro`, then commit them")
    gains = records.read_metrics("gain")
    gain = gains["over_base"][metric]
    words = f"the gain over the base model is {gain['gain']:+.4f} {metric}, 95% from {gain['low']:+.4f}"
    groups = gains["test"]["groups"]
    if groups < report.FEW_GROUPS:
        raise InputError(f"{words}, but {groups} groups of test queries are too few for an interval to rely on")
    if gain["low"] <= minimum:
        raise InputError(f"{words}, and evaluate.minimum_gain asks for more than {minimum:+g}")
    print(f"{words}: more than evaluate.minimum_gain, {minimum:+g}")


if __name__ == "__main__":
    run(main)
