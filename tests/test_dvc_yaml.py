"""What dvc.yaml and dvc.lock say is true: stages declare what they import; the committed run is of this code."""

import ast
import re
from pathlib import Path

import pytest
import yaml

from conftest import ROOT
from shared.params import TrainParams
from shared.status import out_of_date

STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]


def shared_imports(path: Path) -> set[str]:
    """The files under stages/shared/ that a script imports, directly or through others."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "shared":
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("shared."):
            names.add(node.module.removeprefix("shared."))
    files = {f"stages/shared/{name}.py" for name in names}
    return files.union(*(shared_imports(ROOT / file) for file in files))


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_declares_the_code_that_it_runs(stage):
    definition = STAGES[stage].get("do", STAGES[stage])
    script = re.match(r"python (stages/\w+\.py)", definition["cmd"])[1]
    declared = {dep for dep in definition["deps"] if dep.endswith(".py")}
    assert declared == {script} | shared_imports(ROOT / script)


def test_training_depends_on_all_of_its_params_but_the_list_of_seeds():
    """They are named one by one in dvc.yaml, so that a new one could be forgotten."""
    declared = {name for name in STAGES["train"]["do"]["params"] if name.startswith("train.")}
    assert declared == {f"train.{name}" for name in TrainParams.model_fields} - {"train.seeds"}


def test_the_committed_run_is_of_this_code_and_these_params():
    assert not out_of_date(), "`dvc repro`, then commit dvc.lock and metrics/"


def test_the_readme_shows_the_head_of_the_committed_report():
    report = (ROOT / "metrics/report.md").read_text()
    head = report.removeprefix("# Result").partition("![")[0].strip()
    assert head in (ROOT / "README.md").read_text(), "put the report's head into the README again"
